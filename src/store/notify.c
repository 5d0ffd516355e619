/*-------------------------------------------------------------------------
 *
 * notify.c
 *		NOTIFY omni_refresh, for sessions that LISTEN to the outcome of jobs.
 *
 * The worker collects the notifications of a transaction and sends them in a later,
 * separate transaction: a notification that fails must not roll back the outcome of a
 * job, and transactions that commit notifications block each other on a lock.  One that
 * waits for a synchronous standby holds that lock meanwhile.  So the worker waits for the
 * lock only for a moment, and keeps what it cannot send.  Any role may listen, so a
 * notification contains only the id and the status of a job.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "commands/async.h"
#include "nodes/pg_list.h"
#include "utils/memutils.h"

#include "base/compat.h"
#include "store/job.h"

#define CHANNEL				"omni_refresh"

/* Send at most this many notices in a transaction, and keep at most so many */
#define SEND_LIMIT			1000
#define KEEP_LIMIT			100000

typedef struct Notice
{
	int64		job;
	char		status[16];
} Notice;

/* In the worker: the notices that it has collected */
typedef struct Collected
{
	Notice	   *notices;		/* in TopMemoryContext */
	int			capacity;		/* of that array */
	int			count;
	int			committed;		/* how many of them, from the first, have
								 * committed */
	int			dropped;		/* how many were too many to keep */
} Collected;

/* In a backend: a notice of the current transaction */
typedef struct Queued
{
	Notice		notice;
	int			level;			/* of the subtransaction, from 1 */
} Queued;

static Collected collected;
static List *queued = NIL;		/* of Queued, in TopTransactionContext */

static void remove_first(int n);
static void queue_notice(int64 job, const char *status);
static void at_transaction_end(XactEvent event, void *arg);
static void at_subtransaction_end(SubXactEvent event, SubTransactionId own,
								  SubTransactionId parent, void *arg);
static void send_notice(int64 job, const char *status);

/* Discard notices of an earlier transaction that was rolled back, at the start of a new one. */
void
omni_notify_begin(void)
{
	collected.count = collected.committed;
}

/* Notify listeners of a job's status once this transaction has committed. */
void
omni_notify(int64 job, const char *status)
{
	Notice	   *notice;

	if (!omni_in_worker)
	{
		queue_notice(job, status);
		return;
	}
	if (collected.count == collected.capacity)
	{
		int			capacity = 2 * collected.capacity + 16;
		Size		size = capacity * sizeof(Notice);

		collected.notices = collected.notices == NULL ?
			MemoryContextAlloc(TopMemoryContext, size) : repalloc_huge(collected.notices, size);
		collected.capacity = capacity;
	}
	notice = &collected.notices[collected.count++];
	notice->job = job;
	strlcpy(notice->status, status, sizeof(notice->status));
}

/* After commit: mark all notices as ready.  Drop the oldest ones if there are too many. */
void
omni_notify_committed(void)
{
	int			too_many = collected.count - KEEP_LIMIT;

	collected.committed = collected.count;
	if (too_many > 0)
	{
		remove_first(too_many);
		collected.dropped += too_many;
	}
}

/* Return how many notices are to be sent; and in *dropped, unless NULL, how many were dropped. */
int
omni_notify_left(int *dropped)
{
	if (dropped != NULL)
		*dropped = collected.dropped;
	return collected.committed;
}

/* Send the first notices in this transaction, which should do nothing else. */
void
omni_notify_send(void)
{
	for (int i = 0; i < Min(collected.committed, SEND_LIMIT); i++)
		send_notice(collected.notices[i].job, collected.notices[i].status);
}

/* The transaction has committed: forget what it has sent. */
void
omni_notify_sent(void)
{
	remove_first(Min(collected.committed, SEND_LIMIT));
	collected.dropped = 0;
}

static void
remove_first(int n)
{
	collected.count -= n;
	collected.committed -= n;
	memmove(collected.notices, collected.notices + n, collected.count * sizeof(Notice));
}

/*
 * In a backend: keep a notice until the user's transaction commits.  Do not execute NOTIFY
 * earlier, because a transaction that has done so cannot be prepared.  A transaction that
 * is prepared sends no notices.
 */
static void
queue_notice(int64 job, const char *status)
{
	static bool registered = false;
	MemoryContext context = MemoryContextSwitchTo(TopTransactionContext);
	Queued	   *new = palloc(sizeof(Queued));

	if (!registered)
	{
		RegisterXactCallback(at_transaction_end, NULL);
		RegisterSubXactCallback(at_subtransaction_end, NULL);
	}
	registered = true;
	new->notice.job = job;
	strlcpy(new->notice.status, status, sizeof(new->notice.status));
	new->level = GetCurrentTransactionNestLevel();
	queued = lappend(queued, new);
	MemoryContextSwitchTo(context);
}

static void
at_transaction_end(XactEvent event, void *arg)
{
	ListCell   *cell;

	if (event == XACT_EVENT_PRE_COMMIT)
	{
		foreach(cell, queued)
		{
			Queued	   *this = lfirst(cell);

			send_notice(this->notice.job, this->notice.status);
		}
	}
	queued = NIL;
}

/* Discard the notices of a subtransaction that is rolled back; hand others to its parent. */
static void
at_subtransaction_end(SubXactEvent event, SubTransactionId own, SubTransactionId parent, void *arg)
{
	int			level = GetCurrentTransactionNestLevel();
	ListCell   *cell;

	foreach(cell, queued)
	{
		Queued	   *this = lfirst(cell);

		if (this->level < level)
			continue;
		if (event == SUBXACT_EVENT_ABORT_SUB)
			queued = foreach_delete_current(queued, cell);
		else if (event == SUBXACT_EVENT_COMMIT_SUB)
			this->level = level - 1;
	}
}

static void
send_notice(int64 job, const char *status)
{
	Async_Notify(CHANNEL, psprintf("{\"id\": " INT64_FORMAT ", \"status\": \"%s\"}", job, status));
}
