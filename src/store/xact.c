/*-------------------------------------------------------------------------
 *
 * xact.c
 *		The worker's transactions, and the notices that follow them.
 *
 * No transaction is open while the worker waits for the network.  An error ends the
 * transaction, not the worker.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <signal.h>

#include "access/xact.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timeout.h"
#include "utils/timestamp.h"

#include "base/clock.h"
#include "base/compat.h"
#include "base/fault.h"
#include "shared/workerslot.h"
#include "store/job.h"
#include "store/xact.h"

/* In ms; no transaction of the worker's takes this long unless something is wrong */
#define STATEMENT_LIMIT		30000

/*
 * How long the transaction that notifies listeners may wait for a lock, which stalls all calls; and
 * how long, in ms, to wait at most until it is tried again, if another session is in the way
 */
#define NOTIFY_LOCK_LIMIT	"20ms"
#define NOTIFY_DELAY_MAX	1000

/* The transactions that notify listeners; times of omni_clock() */
typedef struct Notifying
{
	int			failures;		/* in a row */
	int64		failing_since;	/* if any */
	int64		next;			/* no try before it */
	int64		told_at;		/* the last line in the log, or 0 */
} Notifying;

static Notifying notifying;

static void set_cancel(int how);
static void keep_notices(OmniTransacted result, const OmniError *error);
static bool send_notices(void *unused);

/*
 * Keep pg_cancel_backend() from having any effect outside transactions: an error between a
 * commit and what follows it would leave work in flight at a step that is behind it.  At most,
 * the next transaction is canceled, which is then tried again.
 */
void
omni_block_cancel(void)
{
	set_cancel(SIG_BLOCK);
	QueryCancelPending = false;
}

/* Block or unblock the signal that cancels a query, which timeouts raise, too. */
static void
set_cancel(int how)
{
	sigset_t	set;

	sigemptyset(&set);
	sigaddset(&set, SIGINT);
	sigprocmask(how, &set, NULL);
}

/*
 * Run a function in a transaction, with SPI and a snapshot.  Roll back and return NOT_NOW if
 * the function returns false or raises an error that other sessions have caused, FAILED if it
 * raises any other error.  Sets *error unless it returns COMMITTED.  With flush, what the function
 * did is on this server's disk afterwards; do not wait for a standby, since a dead one must
 * not block the worker.
 *
 * Arm the timeout itself, since the setting statement_timeout does nothing in a background
 * worker.
 */
OmniTransacted
omni_transact(bool (*body) (void *), void *arg, bool flush, OmniError *error)
{
	MemoryContext context = CurrentMemoryContext;
	volatile OmniTransacted result = FAILED;

	PG_TRY();
	{
		SetCurrentStatementStartTimestamp();
		StartTransactionCommand();
		omni_worker_hold();
		set_cancel(SIG_UNBLOCK);
		SetConfigOption("synchronous_commit", flush ? "local" : "off",
						PGC_SUSET, PGC_S_OVERRIDE);
		enable_timeout_after(STATEMENT_TIMEOUT, STATEMENT_LIMIT);
		SPI_connect();
		PushActiveSnapshot(GetTransactionSnapshot());
		omni_events_begin();
		omni_notify_begin();
		result = body(arg) ? COMMITTED : NOT_NOW;
		if (result == COMMITTED)
			omni_events_write();
		OMNI_FAULT_POINT("to commit");
		PopActiveSnapshot();
		SPI_finish();
		disable_timeout(STATEMENT_TIMEOUT, false);
		omni_worker_keep();
		if (result == COMMITTED)
			CommitTransactionCommand();
		else
		{
			AbortCurrentTransaction();
			omni_error_set(error, ERRCODE_LOCK_NOT_AVAILABLE,
						   "another session holds a lock on the tables of omni_refresh");
		}
		omni_block_cancel();
	}
	PG_CATCH();
	{
		disable_timeout(STATEMENT_TIMEOUT, false);
		omni_block_cancel();
		AbortCurrentTransaction();	/* first, since it frees memory */
		omni_error_catch(error, context);
		omni_worker_keep_after_error();
		result = error->sqlstate == ERRCODE_QUERY_CANCELED ||
			error->sqlstate == ERRCODE_LOCK_NOT_AVAILABLE ||
			ERRCODE_TO_CATEGORY(error->sqlstate) == ERRCODE_TRANSACTION_ROLLBACK ? NOT_NOW : FAILED;
	}
	PG_END_TRY();

	MemoryContextSwitchTo(context);
	if (result == COMMITTED)
		omni_notify_committed();
	return result;
}

/*
 * Send the notices of transactions that have committed, in transactions of their own.  Returns
 * how long to wait, in ms, until it is time to try again, or -1 if nothing is left.
 */
long
omni_notify_listeners(void)
{
	OmniError	error;

	while (omni_notify_left(NULL) > 0 && notifying.next <= omni_clock())
	{
		OmniTransacted result = omni_transact(send_notices, NULL, false, &error);

		if (result == COMMITTED)
		{
			omni_notify_sent();
			notifying.failures = 0;
		}
		else
			keep_notices(result, &error);
	}
	return omni_notify_left(NULL) > 0 ? omni_clock_until(notifying.next) : -1;
}

/* Notices could not be sent: try again later.  Tell so once a minute, and if it lasts. */
static void
keep_notices(OmniTransacted result, const OmniError *error)
{
	int64		now = omni_clock();
	int			longest = result == NOT_NOW ? NOTIFY_DELAY_MAX : OMNI_LOCAL_DELAY_MAX;
	int			dropped;
	int			left = omni_notify_left(&dropped);

	if (notifying.failures == 0)
		notifying.failing_since = now;
	notifying.next = now + OMNI_MS(Min(OMNI_LOCAL_DELAY << Min(notifying.failures, 10), longest));
	notifying.failures++;
	if ((notifying.told_at != 0 && now - notifying.told_at < USECS_PER_MINUTE) ||
		(result == NOT_NOW && now - notifying.failing_since < OMNI_MS(NOTIFY_DELAY_MAX)))
		return;
	notifying.told_at = now;
	ereport(LOG,
			(errcode(error->sqlstate),
			 errmsg("could not notify listeners of omni_refresh, will try again: %s", error->message),
			 errdetail_internal("Notices to be sent: %d; dropped, since there were too many: %d.%s", left, dropped,
								error->sqlstate == ERRCODE_LOCK_NOT_AVAILABLE ?
								"  The transaction of another session that has executed NOTIFY is still being committed; it may wait for a synchronous standby." : "")));
}

/* The body of the transaction. */
static bool
send_notices(void *unused)
{
	(void) set_config_option("lock_timeout", NOTIFY_LOCK_LIMIT, PGC_SUSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
	omni_notify_send();
	return true;
}
