/*-------------------------------------------------------------------------
 *
 * retry.c
 *		When to try again: back-off and polling times, as pure functions of plain data.
 *
 *-------------------------------------------------------------------------
 */
#include "c.h"

#include "worker/retry.h"

/* All in ms */
#define BACKOFF_FIRST		1000	/* longest wait before the second attempt */
#define RETRY_AFTER_MAX		(60 * 60 * 1000)	/* wait no longer, even if
												 * Omni asks for it */
#define POLL_LONGEST		30000	/* longest wait between two polls */

/*
 * Return how long to back off after a number of attempts that failed, in ms.  The longest
 * wait doubles with each attempt, and lot, a random number, chooses a wait up to it, so that
 * requests that failed together are not sent again together.  Wait at least retry_after
 * seconds, which Omni has asked for, up to a limit.
 */
int64
omni_retry_delay(int attempts, uint32 lot, int retry_after)
{
	int64		longest = OMNI_BACKOFF_MAX;

	if (attempts < 10)
		longest = Min((int64) BACKOFF_FIRST << Max(attempts - 1, 0), OMNI_BACKOFF_MAX);
	return Max((int64) (lot % (longest + 1)),
			   Min(retry_after * INT64CONST(1000), RETRY_AFTER_MAX));
}

/*
 * Return how long to wait, in ms, after a number of failures in a row of which only a few are
 * tolerated: about 10 s, then 1, 5 and 15 min, a quarter more or less by lot, a random number.
 * retry_after, in s, is a floor.
 */
int64
omni_retry_few_delay(int failures, uint32 lot, int retry_after)
{
	static const int64 delays[OMNI_FEW_ATTEMPTS - 1] = {10000, 60000, 300000, 900000};
	int64		delay = delays[Min(Max(failures, 1), OMNI_FEW_ATTEMPTS - 1) - 1];

	return Max(delay * 3 / 4 + (int64) (lot % (delay / 2 + 1)),
			   Min(retry_after * INT64CONST(1000), RETRY_AFTER_MAX));
}

/*
 * Return how long to wait before the next poll of a job that was accepted some time ago,
 * both in ms: half of that time, within limits, so that each wait is about one and a half
 * times as long as the one before.
 */
int64
omni_poll_delay(int64 passed)
{
	return Min(OMNI_POLL_FIRST + Max(passed, 0) / 2, POLL_LONGEST);
}
