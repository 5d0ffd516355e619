/*-------------------------------------------------------------------------
 *
 * notify.c
 *		NOTIFY omni_refresh, for those who LISTEN to what becomes of jobs.
 *
 * What a transaction has to tell is gathered, and sent by a later one of its own:
 * a notification that fails must not take the outcome of a job along, and those that
 * commit one take a lock that holds up each other.  Anyone may listen, so that
 * there is nothing in it but the number and the status of a job.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "commands/async.h"
#include "nodes/pg_list.h"
#include "utils/memutils.h"

#include "compat.h"
#include "job.h"

#define CHANNEL				"omni_refresh"

typedef struct Notice
{
	int64		job;
	char		status[16];
} Notice;

static Notice *notices = NULL;
static int	capacity = 0;
static int	count = 0;
static int	committed = 0;		/* the first of them, whose transaction is */

/* A notice of this transaction, in a backend */
typedef struct Queued
{
	Notice		notice;
	int			level;			/* of the subtransaction, from 1 */
} Queued;

static List *queued = NIL;		/* of Queued, in TopTransactionContext */

static void queue_notice(int64 job, const char *status);
static void at_transaction_end(XactEvent event, void *arg);
static void at_subtransaction_end(SubXactEvent event, SubTransactionId own, SubTransactionId parent, void *arg);
static void send_notice(int64 job, const char *status);

/* Begins a transaction: forgets what one that was rolled back has left. */
void
omni_notify_begin(void)
{
	count = committed;
}

/* Tells of a job, once this transaction is committed. */
void
omni_notify(int64 job, const char *status)
{
	if (!omni_in_worker)
	{
		queue_notice(job, status);
		return;
	}
	if (count == capacity)
	{
		capacity = 2 * capacity + 16;
		notices = notices == NULL ? MemoryContextAlloc(TopMemoryContext, capacity * sizeof(Notice)) :
			repalloc_huge(notices, capacity * sizeof(Notice));
	}
	notices[count].job = job;
	strlcpy(notices[count].status, status, sizeof(notices[count].status));
	count++;
}

/* The transaction is committed.  Returns whether there is anything to send. */
bool
omni_notify_committed(void)
{
	committed = count;
	return committed > 0;
}

/* Sends it all when this transaction, which needs to do nothing else, commits. */
void
omni_notify_send(void)
{
	for (int i = 0; i < committed; i++)
		send_notice(notices[i].job, notices[i].status);
}

/* Forgets what was sent, or could not be. */
void
omni_notify_end(void)
{
	count = committed = 0;
}

/*
 * In a backend: tells of a job when the user's transaction commits.  Until then it is not
 * a transaction that has executed NOTIFY, which could not be prepared.  One that is
 * prepared tells nobody.
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

/* What a savepoint that is rolled back has done is not told. */
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
