/*-------------------------------------------------------------------------
 *
 * sent.c
 *		Queued requests that were sent lately: requests that are alike must be at least
 *		min_interval apart.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/hsearch.h"
#include "utils/timestamp.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/setting.h"
#include "worker/sent.h"

/* When a queued job with a merge key was last sent */
typedef struct LastSent
{
	int64		merge_key;		/* hash key */
	int64		sent_at;		/* by omni_clock() */
} LastSent;

static HTAB *last_sent = NULL;	/* of LastSent */

static void remember_sent(int64 merge_key, TimestampTz sent_at);

/*
 * The first time, read from the tables what an earlier worker has sent.  Needs a transaction
 * that has locked the tables.  May be called any number of times.
 */
void
omni_sent_recall(void)
{
	static bool recalled = false;
	HASHCTL		info = {.keysize = sizeof(int64),.entrysize = sizeof(LastSent)};

	if (recalled)
		return;
	if (last_sent == NULL)
		last_sent = hash_create("omni_refresh last sent", 64, &info, HASH_ELEM | HASH_BLOBS);
	OMNI_FAULT_POINT("look: to recall what was sent");
	omni_job_recent(GetCurrentTimestamp() - OMNI_MS(omni_min_interval), remember_sent);
	recalled = true;
}

/* Note that an earlier worker has sent a job at a time of its row. */
static void
remember_sent(int64 merge_key, TimestampTz sent_at)
{
	LastSent   *sent = hash_search(last_sent, &merge_key, HASH_ENTER, NULL);

	sent->sent_at = omni_clock() - Max(GetCurrentTimestamp() - sent_at, 0);
}

/* Note that a job with a merge key is about to be sent. */
void
omni_sent_note(int64 merge_key)
{
	LastSent   *sent = hash_search(last_sent, &merge_key, HASH_ENTER, NULL);

	sent->sent_at = omni_clock();
}

/*
 * Return how long, in microseconds, a due job must wait because a job like it was sent less
 * than min_interval ago; 0 if it need not.  A job that was tried before backs off instead.
 */
int64
omni_sent_wait(const OmniJob *job)
{
	LastSent   *sent;

	if (job->attempts > 0 || omni_min_interval == 0)
		return 0;
	sent = hash_search(last_sent, &job->merge_key, HASH_FIND, NULL);
	return sent != NULL ? Max(sent->sent_at + OMNI_MS(omni_min_interval) - omni_clock(), 0) : 0;
}

/* Drop entries older than min_interval, since they no longer delay any job. */
void
omni_sent_forget(void)
{
	int64		before = omni_clock() - OMNI_MS(omni_min_interval);
	HASH_SEQ_STATUS status;
	LastSent   *sent;

	if (last_sent == NULL)
		return;
	hash_seq_init(&status, last_sent);
	while ((sent = hash_seq_search(&status)) != NULL)
	{
		if (sent->sent_at < before)
			(void) hash_search(last_sent, &sent->merge_key, HASH_REMOVE, NULL);
	}
}
