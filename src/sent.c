/*-------------------------------------------------------------------------
 *
 * sent.c
 *		What was sent from the queue a short while ago: requests that are alike keep
 *		min_interval.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/hsearch.h"
#include "utils/timestamp.h"

#include "clock.h"
#include "sent.h"
#include "setting.h"

/* When something of a merge key was sent from the queue last */
typedef struct LastSent
{
	int64		merge_key;		/* hash key */
	int64		sent_at;		/* by omni_clock() */
} LastSent;

static HTAB *last_sent = NULL;	/* of LastSent */

static void remember_sent(int64 merge_key, TimestampTz sent_at);

/*
 * Learns from the tables, the first time, what an earlier worker has sent.  In a
 * transaction; raises what the statements raise.
 */
void
omni_sent_recall(void)
{
	HASHCTL		info = {.keysize = sizeof(int64),.entrysize = sizeof(LastSent)};

	if (last_sent != NULL)
		return;
	last_sent = hash_create("omni_refresh last sent", 64, &info, HASH_ELEM | HASH_BLOBS);
	omni_job_recent(GetCurrentTimestamp() - OMNI_MS(omni_min_interval), remember_sent);
}

/* Something was sent by an earlier worker. */
static void
remember_sent(int64 merge_key, TimestampTz sent_at)
{
	LastSent   *sent = hash_search(last_sent, &merge_key, HASH_ENTER, NULL);

	sent->sent_at = omni_clock() - Max(GetCurrentTimestamp() - sent_at, 0);
}

/* Something of a merge key is about to be sent. */
void
omni_sent_note(int64 merge_key)
{
	LastSent   *sent = hash_search(last_sent, &merge_key, HASH_ENTER, NULL);

	sent->sent_at = omni_clock();
}

/*
 * How long, in microseconds, a job must wait since something alike was sent a short while
 * ago; 0 if it need not.  What has been tried before has its own time to wait for.
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

/* Drops what is older than min_interval, and delays nothing any more. */
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
