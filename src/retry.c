/*-------------------------------------------------------------------------
 *
 * retry.c
 *		When to try again: back-off and polling times, as pure functions of plain data.
 *
 *-------------------------------------------------------------------------
 */
#include "c.h"

#include "retry.h"

/* All in ms */
#define BACKOFF_FIRST		1000	/* at most, before the second attempt;
									 * doubled each time */
#define RETRY_AFTER_MAX		(60 * 60 * 1000)	/* no longer wait is granted
												 * to Omni */
#define POLL_LONGEST		30000	/* polls are not further apart */

/*
 * How long to wait after so many attempts that failed, in ms.  The wait doubles with each
 * and is drawn by lot, a random number, so that requests that failed together do not come
 * back together.  retry_after, in s, is what Omni has asked for: a floor.
 */
int64
omni_retry_delay(int attempts, uint32 lot, int retry_after)
{
	int64		longest = OMNI_BACKOFF_MAX;

	if (attempts < 10)
		longest = Min((int64) BACKOFF_FIRST << Max(attempts - 1, 0), OMNI_BACKOFF_MAX);
	return Max((int64) (lot % (longest + 1)), Min(retry_after * INT64CONST(1000), RETRY_AFTER_MAX));
}

/*
 * How long to wait before the next poll of a job that was accepted some time ago, both in
 * ms: half of that time, within limits, as if each wait were one and a half times as long
 * as the one before.
 */
int64
omni_poll_delay(int64 passed)
{
	return Min(OMNI_POLL_FIRST + Max(passed, 0) / 2, POLL_LONGEST);
}
