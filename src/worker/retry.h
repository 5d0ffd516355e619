/*-------------------------------------------------------------------------
 *
 * retry.h
 *		When to try again, as pure functions.  See retry.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_RETRY_H
#define OMNI_RETRY_H

#include "c.h"

/* The longest back-off unless Omni asks for a longer one, in ms */
#define OMNI_BACKOFF_MAX	(5 * 60 * 1000)

/* How long after Omni has accepted a job to poll it for the first time, in ms */
#define OMNI_POLL_FIRST		2000

/* How long after Omni has accepted a job it may not know the job yet, in ms */
#define OMNI_POLL_EARLY		30000

/*
 * How often in a row a queued job is tried if Omni answers with a 500, or somebody else
 * answers: Omni asks its users to report such a failure rather than to repeat the request.
 */
#define OMNI_FEW_ATTEMPTS	5

extern int64 omni_retry_few_delay(int failures, uint32 lot, int retry_after);
extern int64 omni_retry_delay(int attempts, uint32 lot, int retry_after);
extern int64 omni_poll_delay(int64 passed);

#endif							/* OMNI_RETRY_H */
