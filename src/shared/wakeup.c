/*-------------------------------------------------------------------------
 *
 * wakeup.c
 *		The commit hook: a transaction that has queued a job, or changed what watches look
 *		at, wakes the worker, or starts one, once it has committed.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "utils/elog.h"

#include "base/clock.h"
#include "shared/wakeup.h"
#include "shared/workerslot.h"

/* Complain to the log about DDL that wakes no worker at most this often, in ms */
#define COMPLAIN_ROUND		60000

/* OMNI_WAKE_*: what this transaction asks the worker for */
static int	wanted = 0;

static void register_callback(void);
static void at_transaction_end(XactEvent event, void *arg);
static void make_sure(void);
static void complain(const OmniError *error);

/*
 * Wake the worker once the current transaction has committed.  Call this after queueing a
 * job.  Raises an error if shared memory cannot be attached.
 */
void
omni_wake_on_commit(void)
{
	omni_workerslots_attach();	/* an error after the commit would be a PANIC */
	register_callback();
	wanted |= OMNI_WAKE_QUEUE;
}

/*
 * Have the worker look for changes of tables and columns once the current transaction has
 * committed.  Raises no error: the transaction is not ours.
 */
void
omni_wake_on_change(void)
{
	OmniError	error;

	if ((wanted & OMNI_WAKE_WATCHES) != 0)
		return;
	if (!omni_error_try(omni_workerslots_attach, &error))
	{
		complain(&error);
		return;
	}
	register_callback();
	wanted |= OMNI_WAKE_WATCHES;
}

static void
register_callback(void)
{
	static bool registered = false;

	if (!registered)
		RegisterXactCallback(at_transaction_end, NULL);
	registered = true;
}

/*
 * Make sure before the commit that a worker runs, when a WARNING still reaches the client;
 * wake it after the commit, when an error would be a PANIC.  If all jobs were queued in a
 * savepoint that was rolled back, the worker reads the queue in vain.  COMMIT PREPARED does
 * not call this; its jobs wait until the worker reads the queue for another reason.  A
 * change is looked for once all transactions of now have ended, the prepared one included.
 */
static void
at_transaction_end(XactEvent event, void *arg)
{
	if (wanted == 0)
		return;
	if (event == XACT_EVENT_PRE_PREPARE || event == XACT_EVENT_PREPARE)
		wanted &= OMNI_WAKE_WATCHES;
	if (event == XACT_EVENT_PRE_COMMIT || (event == XACT_EVENT_PRE_PREPARE && wanted != 0))
		make_sure();
	else if (event == XACT_EVENT_COMMIT)
		(void) omni_worker_ensure(wanted);
	else if (event == XACT_EVENT_PREPARE && wanted != 0)
		(void) omni_worker_ensure(OMNI_WAKE_PREPARED);
	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT || event == XACT_EVENT_PREPARE)
		wanted = 0;
}

/*
 * Make sure that a worker runs.  If none can, warn who has queued a job; who has run DDL may
 * not know of us, so that only the log is told.
 */
static void
make_sure(void)
{
	OmniHandOver result = omni_worker_ensure(0);
	OmniError	error;

	if (result == HANDED_OVER)
		return;
	omni_worker_explain(result, NULL, &error);
	if ((wanted & OMNI_WAKE_QUEUE) == 0)
		complain(&error);
	else
		ereport(WARNING,
				(errcode(error.sqlstate),
				 errmsg("could not start a background worker for queued requests: %s",
						error.message),
				 errdetail_internal("%s", error.detail),
				 errhint("%s", error.hint)));
}

/* Say in the log, but not for each transaction, why changes are not looked for. */
static void
complain(const OmniError *error)
{
	if (!omni_worker_may_complain(OMNI_MS(COMPLAIN_ROUND)))
		return;
	ereport(LOG,
			(errcode(error->sqlstate),
			 errmsg("could not start a background worker to look for changes of tables: %s",
					error->message),
			 error->detail[0] != '\0' ? errdetail_internal("%s", error->detail) : 0,
			 errhint("The changes are found when the worker runs again, at the latest after omni_refresh_wake().")));
}
