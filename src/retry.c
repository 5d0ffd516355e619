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
 * Return how long to wait before the next poll of a job that was accepted some time ago,
 * both in ms: half of that time, within limits, so that each wait is about one and a half
 * times as long as the one before.
 */
int64
omni_poll_delay(int64 passed)
{
	return Min(OMNI_POLL_FIRST + Max(passed, 0) / 2, POLL_LONGEST);
}
