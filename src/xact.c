/*-------------------------------------------------------------------------
 *
 * xact.c
 *		A transaction of the worker's, and the notices that follow it.
 *
 * Nothing is open while the network is waited for.  An error ends the transaction, not
 * the worker.
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

#define STATEMENT_LIMIT		30000	/* no statement of ours takes this long */

static bool to_notify = false;	/* listeners, of what is committed */

static bool send_notices(void *unused);


/*
 * Runs a function in a transaction, with SPI and a snapshot.  If it returns
 * false, or raises an error, what it did is rolled back; an error that comes of
 * what others are doing means NOT_NOW, too.  With flush, what it did
 * is on this server's disk afterwards; no standby is waited for, since a dead one
 * must not keep us.
 *
 * The setting statement_timeout does nothing in a background worker, so that the
 * timeout itself is armed.
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
		omni_worker_keep();
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

/* Says that a lock on our tables is in the way. */
void
omni_error_set_locked(OmniError *error)
{
	omni_error_set(error, ERRCODE_LOCK_NOT_AVAILABLE,
				   "another session holds a lock on the tables of omni_refresh");
}

/* Sends what is to be said about jobs whose rows say so by now. */
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

static bool
send_notices(void *unused)
{
	omni_notify_send();
	return true;
}
