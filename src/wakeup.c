/*-------------------------------------------------------------------------
 *
 * wakeup.c
 *		The commit hook: a transaction that has queued a job wakes the worker, or starts
 *		one, once it has committed.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "utils/elog.h"

#include "wakeup.h"
#include "workerslot.h"

static bool has_queued = false; /* a job, in this transaction */

static void at_transaction_end(XactEvent event, void *arg);

/*
 * Wake the worker once the current transaction has committed.  Call this after queueing a
 * job.  Raises an error if shared memory cannot be attached.
 */
void
omni_wake_on_commit(void)
{
	static bool registered = false;

	omni_workerslots_attach();	/* an error after the commit would be a PANIC */
	if (!registered)
		RegisterXactCallback(at_transaction_end, NULL);
	registered = true;
	has_queued = true;
}

/*
 * Make sure before the commit that a worker runs, when a WARNING still reaches the client;
 * wake it after the commit, when an error would be a PANIC.  If all jobs were queued in a
 * savepoint that was rolled back, the worker reads the queue in vain.  COMMIT PREPARED does
 * not call this; its jobs wait until the worker reads the queue for another reason.
 */
static void
at_transaction_end(XactEvent event, void *arg)
{
	OmniHandOver result;

	if (!has_queued)
		return;
	if (event == XACT_EVENT_PRE_COMMIT)
	{
		result = omni_worker_ensure(false);
		if (result != HANDED_OVER)
		{
			OmniError	error;

			omni_worker_explain(result, NULL, &error);
			ereport(WARNING,
					(errcode(error.sqlstate),
					 errmsg("could not start a background worker for queued requests: %s",
							error.message),
					 errdetail_internal("%s", error.detail),
					 errhint("%s", error.hint)));
		}
		return;
	}
	if (event == XACT_EVENT_COMMIT)
		(void) omni_worker_ensure(true);
	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT || event == XACT_EVENT_PREPARE)
		has_queued = false;
}
