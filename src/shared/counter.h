/*-------------------------------------------------------------------------
 *
 * counter.h
 *		The counters of what happens at each server.  See counter.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_COUNTER_H
#define OMNI_COUNTER_H

#include "datatype/timestamp.h"

#include "base/status.h"

/* One for each final status of a job */
#define OMNI_COUNT_JOBS(name) OMNI_COUNT_JOBS_ ## name,

/* omni_refresh_get_counters() returns them in this order. */
typedef enum OmniCounter
{
	/* requests, by what became of them */
	OMNI_COUNT_OK,
	OMNI_COUNT_RATE_LIMITED,
	OMNI_COUNT_REFUSED,
	OMNI_COUNT_FAILED,
	OMNI_COUNT_UNANSWERED,
	/* some of these requests */
	OMNI_COUNT_POLLS,
	OMNI_COUNT_LOOKUPS,
	OMNI_COUNT_RETRIED,
	OMNI_COUNT_TIME,			/* that all of them took, in microseconds */
	/* requests that were held back instead */
	OMNI_COUNT_THROTTLED,
	/* jobs that have ended */
	OMNI_STATUSES_FINAL(OMNI_COUNT_JOBS,)
} OmniCounter;

#define OMNI_COUNTERS		(OMNI_COUNT_JOBS_UNKNOWN + 1)

extern void omni_count(const NameData *server, OmniCounter counter, int64 amount);
extern void omni_count_jobs(const NameData *server, const char *status, int64 jobs);
extern TimestampTz omni_counters_read(Oid server, int64 *counts);

#endif							/* OMNI_COUNTER_H */
