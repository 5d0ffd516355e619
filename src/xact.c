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

#include "access/xact.h"
#include "executor/spi.h"
#include "pgstat.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timeout.h"

#include "compat.h"
#include "job.h"
#include "workerslot.h"
#include "xact.h"

/* In ms; no transaction of the worker's takes this long unless something is wrong */
#define STATEMENT_LIMIT		30000

static bool to_notify = false;	/* committed notices wait to be sent */

static bool send_notices(void *unused);


/*
 * Run a function in a transaction, with SPI and a snapshot.  Roll back and return NOT_NOW if
 * the function returns false or raises an error that other sessions have caused, FAILED if it
 * raises any other error.  Sets *error if an error was raised.  With flush, what the function
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
		PopActiveSnapshot();
		SPI_finish();
		disable_timeout(STATEMENT_TIMEOUT, false);
		omni_worker_keep();
		if (result == COMMITTED)
			CommitTransactionCommand();
		else
			AbortCurrentTransaction();
	}
	PG_CATCH();
	{
		disable_timeout(STATEMENT_TIMEOUT, false);
		omni_error_catch(error, context);
		AbortCurrentTransaction();
		omni_worker_keep_after_error();
		result = error->sqlstate == ERRCODE_QUERY_CANCELED ||
			error->sqlstate == ERRCODE_LOCK_NOT_AVAILABLE ||
			ERRCODE_TO_CATEGORY(error->sqlstate) == ERRCODE_TRANSACTION_ROLLBACK ? NOT_NOW : FAILED;
	}
	PG_END_TRY();

	MemoryContextSwitchTo(context);
	if (result == COMMITTED)
		to_notify = omni_notify_committed();
	return result;
}

/* Set *error to say that another session holds a lock on the tables. */
void
omni_error_set_locked(OmniError *error)
{
	omni_error_set(error, ERRCODE_LOCK_NOT_AVAILABLE,
				   "another session holds a lock on the tables of omni_refresh");
}

/* Send the notices of transactions that have committed, in a transaction of their own. */
void
omni_notify_listeners(void)
{
	OmniError	error;

	if (!to_notify)
		return;
	if (omni_transact(send_notices, NULL, false, &error) == FAILED)
		ereport(LOG,
				(errcode(error.sqlstate),
				 errmsg("could not notify listeners of omni_refresh: %s", error.message)));
	omni_notify_end();
	to_notify = false;
}

/* The body of the transaction. */
static bool
send_notices(void *unused)
{
	omni_notify_send();
	return true;
}
