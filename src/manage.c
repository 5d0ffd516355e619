/*-------------------------------------------------------------------------
 *
 * manage.c
 *		The SQL-callable functions about a job that is there: wait, cancel, retry.
 *
 * They are for the one who asked for the job, and for who owns the table of jobs.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "storage/latch.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#include "clock.h"
#include "compat.h"
#include "job.h"
#include "omni_refresh.h"
#include "refresh.h"
#include "wakeup.h"
#include "workerslot.h"

/* How often to look at a job that is waited for, in ms: less and less often */
#define LOOK_FIRST			10
#define LOOK_LAST			500

/* How often to see to it that there is a worker, in ms */
#define WAKE_ROUND			5000

/* How often to say that a job is still on its way, in ms */
#define TELL_ROUND			30000

static int64 job_argument(FunctionCallInfo fcinfo);
static void look(int64 id, OmniJobState *own, OmniJobState *carrier);
static bool is_own(const OmniRequest *request);
static bool at_end(const OmniJobState *state);
static int64 timeout_argument(FunctionCallInfo fcinfo);
static void wait_for_latch(long timeout);

PG_FUNCTION_INFO_V1(omni_refresh_wait);
PG_FUNCTION_INFO_V1(omni_refresh_cancel);
PG_FUNCTION_INFO_V1(omni_refresh_retry);

/*
 * Waits until a job, or the one that carries it out, has come to its end, and
 * returns its row; after the timeout with a WARNING, as it is then.
 */
Datum
omni_refresh_wait(PG_FUNCTION_ARGS)
{
	int64		id = job_argument(fcinfo);
	int64		began = omni_clock();
	int64		until = began + timeout_argument(fcinfo);
	int64		woken = 0;
	int64		told = began;
	bool		complained = false;
	char		last[sizeof(((OmniJobState *) NULL)->status)] = "";
	long		delay = LOOK_FIRST;
	MemoryContext looks = AllocSetContextCreate(CurrentMemoryContext, "omni_refresh wait",
												ALLOCSET_SMALL_SIZES);
	OmniJobState own;
	OmniJobState state;
	OmniError	error;

	for (;;)
	{
		int64		now = omni_clock();
		MemoryContext context = MemoryContextSwitchTo(looks);

		look(id, &own, &state);
		MemoryContextSwitchTo(context);
		MemoryContextReset(looks);
		if (at_end(&state))
			break;
		if (state.uncommitted)
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					 errmsg("job " INT64_FORMAT " was requested by this transaction, which is not committed", id),
					 errdetail("It is sent after the commit."),
					 errhint("Commit first.")));
		if (now >= until)
		{
			ereport(WARNING,
					(errmsg("job " INT64_FORMAT " did not come to its end in time: it is %s", state.job.id, state.status),
					 errhint("omni_refresh_event tells what it has come to so far.")));
			break;
		}

		if ((woken == 0 || now - woken >= OMNI_MS(WAKE_ROUND)) && !RecoveryInProgress())
		{
			if (!omni_worker_wake(&error) && !complained)
			{
				omni_error_report(&error, WARNING);
				complained = true;
			}
			woken = now;
		}
		if ((last[0] != '\0' && strcmp(last, state.status) != 0) ||
			now - told >= OMNI_MS(TELL_ROUND))
		{
			ereport(NOTICE,
					(errmsg("job " INT64_FORMAT " is %s", state.job.id, state.status)));
			told = now;
		}
		strcpy(last, state.status);

		wait_for_latch(Max(Min(delay, (until - now) / 1000), 1));
		delay = Min(2 * delay, LOOK_LAST);
	}
	PG_RETURN_DATUM(omni_job_read(state.job.id));
}

/*
 * Cancels a job that is pending, if it still is, which it returns.
 */
Datum
omni_refresh_cancel(PG_FUNCTION_ARGS)
{
	int64		id = job_argument(fcinfo);
	OmniJobState own;
	OmniJobState carrier;
	bool		canceled;

	look(id, &own, &carrier);
	SPI_connect();
	canceled = omni_job_cancel(&own.job, GetUserNameFromId(GetUserId(), false));
	SPI_finish();
	if (canceled)
		omni_wake_on_commit();	/* for those that were merged into it */
	PG_RETURN_BOOL(canceled);
}

/*
 * Queues what a job asked for once more, on behalf of the current user, and
 * returns the new job's row.
 */
Datum
omni_refresh_retry(PG_FUNCTION_ARGS)
{
	int64		id = job_argument(fcinfo);
	OmniJobState own;
	OmniJobState carrier;
	OmniJob		job;
	OmniRequest *request = &own.job.request;

	look(id, &own, &carrier);
	if (strcmp(carrier.status, "failed") != 0 && strcmp(carrier.status, "canceled") != 0 &&
		strcmp(carrier.status, "unknown") != 0)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("job " INT64_FORMAT " is %s", carrier.job.id, carrier.status),
				 errhint("Only a job that is failed, canceled or unknown can be repeated.")));

	omni_job_init(&job, OMNI_ORIGIN_RETRY);
	request->role = job.request.role;
	request->requested_by = job.request.requested_by;
	request->requested_at = job.request.requested_at;
	job.request = *request;
	job.request.schemas = own.job.request.schemas;
	job.request.tables = own.job.request.tables;
	PG_RETURN_DATUM(omni_queue_job(&job));
}

/* The first argument, the number of a job */
static int64
job_argument(FunctionCallInfo fcinfo)
{
	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("id must not be null"),
				 errhint("Give the id of a job in omni_refresh_job.")));
	return PG_GETARG_INT64(0);
}

/* The second argument, how long to wait, in microseconds */
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

/* Looks at a job, and at the one that carries it out.  Raises an error if there is none. */
static void
look(int64 id, OmniJobState *own, OmniJobState *carrier)
{
	OmniJobState next;
	bool		found;

	if (!omni_tables_find())
		elog(ERROR, "extension \"%s\" does not exist", OMNI_EXTENSION);
	SPI_connect();
	found = omni_job_look(id, own);
	*carrier = *own;
	while (found && carrier->merged_into != 0 && omni_job_look(carrier->merged_into, &next))
		*carrier = next;
	SPI_finish();
	if (!found)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("job " INT64_FORMAT " does not exist", id)));
	if (!is_own(&own->job.request))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for job " INT64_FORMAT, id),
				 errhint("It is for those who have the privileges of the role that requested it, or of the owner of the table.")));
}

/* Whether the current user has what the requester has, or what the table's owner has. */
static bool
is_own(const OmniRequest *request)
{
	char	   *rolename = GetUserNameFromId(request->role, true);

	return has_privs_of_role(GetUserId(), omni_job_owner()) ||
		(rolename != NULL && strcmp(rolename, NameStr(request->requested_by)) == 0 &&
		 has_privs_of_role(GetUserId(), request->role));
}

static bool
at_end(const OmniJobState *state)
{
	return strcmp(state->status, "pending") != 0 && strcmp(state->status, "sending") != 0 &&
		strcmp(state->status, "running") != 0;
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
