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

/* The longest wait between two attempts that Omni has not asked for, in ms */
#define OMNI_BACKOFF_MAX	(5 * 60 * 1000)

/* A job that Omni has accepted is polled for the first time after so many ms. */
#define OMNI_POLL_FIRST		2000

/* Omni may not know a job that it has accepted less than so many ms ago. */
#define OMNI_POLL_EARLY		30000

extern int64 omni_retry_delay(int attempts, uint32 lot, int retry_after);
extern int64 omni_poll_delay(int64 passed);

#endif							/* OMNI_RETRY_H */
