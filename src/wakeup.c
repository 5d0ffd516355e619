/*-------------------------------------------------------------------------
 *
 * wakeup.c
 *		The commit hook: a transaction that has queued something wakes the worker once
 *		it has committed, or starts it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "utils/elog.h"

#include "wakeup.h"
#include "workerslot.h"

static bool has_queued = false; /* this transaction */

static void at_transaction_end(XactEvent event, void *arg);

/*
 * To be called in a transaction that queues something: wakes the worker once it
 * has committed.
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
 * Before the commit is the time to complain, after it the time to act, where an
 * error would bring the server down.  A savepoint that is rolled back may have
 * queued it all: then the worker looks in vain.  COMMIT PREPARED does not come by
 * here; what it commits waits for the next time that the worker looks.
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
					 errmsg("the requests to Omni are queued, but nobody can send them now: %s",
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
