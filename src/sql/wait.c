/*-------------------------------------------------------------------------
 *
 * wait.c
 *		omni_refresh_wait() and omni_refresh_await(): wait until a job has ended.
 *
 * Both poll the table of jobs.  Between two looks they see to it that a worker is there, and
 * report each change of the status.
 *
 * A function holds the snapshot of its statement, which keeps VACUUM from removing the rows
 * that are deleted meanwhile, in the whole database.  The procedure therefore commits before
 * it waits, and holds none.  Where a procedure must not commit, it waits as the function does.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "executor/spi.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "storage/latch.h"
#include "tcop/pquery.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#include "base/clock.h"
#include "base/compat.h"
#include "base/status.h"
#include "shared/workerslot.h"
#include "sql/request.h"
#include "store/job.h"

/* How often to read the row of the job, in ms: the delay doubles from the first to the last */
#define LOOK_FIRST			10
#define LOOK_LAST			500

/* How often to make sure that there is a worker, in ms */
#define WAKE_ROUND			5000

/* How often to report that a job has not ended yet, in ms */
#define REPORT_ROUND		30000

static void wait_for_end(int64 id, int64 timeout, bool commits, OmniJobState *own,
						 OmniJobState *carrier);
static bool may_commit(FunctionCallInfo fcinfo);
static int64 timeout_argument(FunctionCallInfo fcinfo);
static bool has_ended(const OmniJobState *state);
static void wait_for_latch(long timeout);

PG_FUNCTION_INFO_V1(omni_refresh_wait);
PG_FUNCTION_INFO_V1(omni_refresh_await);

/*
 * Wait until a job, or its carrier, has ended, and return the row.  After the timeout,
 * raise a WARNING and return the row as it is then.
 */
Datum
omni_refresh_wait(PG_FUNCTION_ARGS)
{
	int64		id = omni_job_argument(fcinfo);
	int64		timeout = timeout_argument(fcinfo);
	OmniJobState own;
	OmniJobState carrier;

	omni_not_in_worker();
	wait_for_end(id, timeout, false, &own, &carrier);
	PG_RETURN_DATUM(omni_job_result(&own, &carrier));
}

/*
 * The same, as a procedure with the row as an INOUT argument.  Commit what the caller has
 * done, if that is possible, then wait without a snapshot.
 */
Datum
omni_refresh_await(PG_FUNCTION_ARGS)
{
	int64		id = omni_job_argument(fcinfo);
	int64		timeout = timeout_argument(fcinfo);
	bool		commits = may_commit(fcinfo);
	OmniJobState own;
	OmniJobState carrier;
	TupleDesc	result;
	Datum		job;
	bool		isnull = false;

	omni_not_in_worker();
	if (commits)
	{
		SPI_connect_ext(SPI_OPT_NONATOMIC);
		SPI_commit();
	}
	wait_for_end(id, timeout, commits, &own, &carrier);
	if (commits)
		SPI_finish();			/* before the result is palloc'd */

	job = omni_job_result(&own, &carrier);
	if (get_call_result_type(fcinfo, NULL, &result) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "the procedure returns no record");
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(result), &job, &isnull)));
}

/*
 * Wait until a job, or its carrier, has ended, or raise a WARNING after the timeout, in
 * microseconds.  Sets *own and *carrier, but for their lists.  If commits is true, which
 * needs a nonatomic connection to SPI, commit after each look.
 */
static void
wait_for_end(int64 id, int64 timeout, bool commits, OmniJobState *own, OmniJobState *carrier)
{
	int64		began = omni_clock();
	int64		until = began + timeout;
	int64		woken = 0;
	int64		reported = began;
	bool		complained = false;
	char		last[sizeof(((OmniJobState *) NULL)->status)] = "";
	long		delay = LOOK_FIRST;
	MemoryContext looks = AllocSetContextCreate(CurrentMemoryContext, "omni_refresh wait",
												ALLOCSET_SMALL_SIZES);
	OmniError	error;

	for (;;)
	{
		int64		now = omni_clock();
		MemoryContext context = MemoryContextSwitchTo(looks);

		if (commits)
			EnsurePortalSnapshotExists();	/* the commit has released it */
		omni_job_find(id, OMNI_USE_SEE, own, carrier);
		MemoryContextSwitchTo(context);
		MemoryContextReset(looks);
		if (has_ended(carrier))
			break;
		if (carrier->uncommitted)
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					 errmsg("job " INT64_FORMAT " was requested by this transaction, which is not committed", id),
					 errdetail("It is sent after the commit."),
					 errhint("Commit first.")));
		if (now >= until)
		{
			ereport(WARNING,
					(errmsg("timed out waiting for job " INT64_FORMAT, carrier->job.id),
					 errdetail("The job is %s.", carrier->status),
					 errhint("See its events in table \"omni_refresh_event\".")));
			break;
		}

		if ((woken == 0 || now - woken >= OMNI_MS(WAKE_ROUND)) && !RecoveryInProgress())
		{
			if (!omni_worker_wake(OMNI_WAKE_QUEUE, &error) && !complained)
			{
				omni_error_report(&error, WARNING);
				complained = true;
			}
			woken = now;
		}
		if ((last[0] != '\0' && strcmp(last, carrier->status) != 0) ||
			now - reported >= OMNI_MS(REPORT_ROUND))
		{
			ereport(NOTICE,
					(errmsg("job " INT64_FORMAT " is %s", carrier->job.id, carrier->status)));
			reported = now;
		}
		strcpy(last, carrier->status);

		if (commits)
			SPI_commit();
		wait_for_latch(Max(Min(delay, (until - now) / 1000), 1));
		delay = Min(2 * delay, LOOK_LAST);
	}
}

/*
 * Whether a procedure may commit: not in a transaction block, nor where a function, a
 * procedure with SET clauses or a SECURITY DEFINER one is around it, nor in a block with
 * EXCEPTION.
 */
static bool
may_commit(FunctionCallInfo fcinfo)
{
	return fcinfo->context != NULL && IsA(fcinfo->context, CallContext) &&
		!castNode(CallContext, fcinfo->context)->atomic && !IsSubTransaction();
}

/* Return the second argument, how long to wait, in microseconds. */
static int64
timeout_argument(FunctionCallInfo fcinfo)
{
	Interval   *timeout = PG_ARGISNULL(1) ? NULL : PG_GETARG_INTERVAL_P(1);
	double		microseconds;

	if (timeout == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("timeout must not be null")));
	microseconds = timeout->time + (double) USECS_PER_DAY *
		(timeout->day + (double) DAYS_PER_MONTH * timeout->month);
	if (microseconds < 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("timeout must not be negative")));
	return (int64) Min(microseconds, (double) USECS_PER_DAY * 365 * 100);
}

static bool
has_ended(const OmniJobState *state)
{
	OmniStatus	status;

	return !omni_status_find(state->status, &status) || omni_status_is_final(status);
}

static void
wait_for_latch(long timeout)
{
	static uint32 wait_event = 0;

	if (wait_event == 0)
		wait_event = WaitEventExtensionNew("OmniRefreshWait");
	(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, timeout, wait_event);
	ResetLatch(MyLatch);
	CHECK_FOR_INTERRUPTS();
}
