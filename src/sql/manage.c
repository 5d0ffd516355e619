/*-------------------------------------------------------------------------
 *
 * manage.c
 *		The SQL-callable functions that manage queued jobs: cancel, retry, wake.
 *
 * Only the requester of a job and the owner of the table of jobs may cancel or retry it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "executor/spi.h"
#include "miscadmin.h"

#include "base/status.h"
#include "shared/wakeup.h"
#include "shared/workerslot.h"
#include "sql/request.h"
#include "store/job.h"
#include "watch/seen.h"

PG_FUNCTION_INFO_V1(omni_refresh_cancel);
PG_FUNCTION_INFO_V1(omni_refresh_retry);
PG_FUNCTION_INFO_V1(omni_refresh_wake);

/*
 * Cancel a job if it is pending.  Returns whether it was.
 */
Datum
omni_refresh_cancel(PG_FUNCTION_ARGS)
{
	int64		id = omni_job_argument(fcinfo);
	OmniJobState own;
	OmniJobState carrier;
	bool		canceled;

	omni_job_find(id, OMNI_USE_MANAGE, &own, &carrier);
	SPI_connect();
	canceled = omni_job_cancel(&own.job, GetUserNameFromId(GetUserId(), false));
	SPI_finish();
	if (canceled)
		omni_wake_on_commit();	/* it goes on with jobs that were merged into
								 * this one */
	PG_RETURN_BOOL(canceled);
}

/*
 * Queue the request of a job again, on behalf of the current user, and return the new
 * job's row.  If that was done already, and not in vain, return the row of that job.
 */
Datum
omni_refresh_retry(PG_FUNCTION_ARGS)
{
	int64		id = omni_job_argument(fcinfo);
	OmniJobState own;
	OmniJobState carrier;
	OmniJob		job;
	OmniRequest *request = &own.job.request;

	omni_job_find(id, OMNI_USE_MANAGE, &own, &carrier);
	if (!omni_job_can_be_retried(&carrier))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("job " INT64_FORMAT " is %s", carrier.job.id, carrier.status),
				 errhint("Only a job that is failed, canceled or unknown can be repeated.")));

	omni_job_init(&job, OMNI_ORIGIN_RETRY);
	request->role = job.request.role;
	request->requested_by = job.request.requested_by;
	request->caller = job.request.caller;
	request->called_by = job.request.called_by;
	request->application = job.request.application;
	request->requested_at = job.request.requested_at;
	job.request = *request;
	job.retry_of = id;
	job.request.schemas = own.job.request.schemas;
	job.request.tables = own.job.request.tables;
	PG_RETURN_DATUM(omni_queue_job(&job));
}

/*
 * Start or wake the worker if any job has not ended, or there is a watch.  Returns whether
 * there is such a thing.
 */
Datum
omni_refresh_wake(PG_FUNCTION_ARGS)
{
	OmniError	error;
	bool		any;

	if (omni_in_recovery(&error))
		omni_error_report(&error, ERROR);
	omni_tables_require();
	any = omni_job_any_unfinished() || omni_watch_any();
	if (any && !omni_worker_wake(OMNI_WAKE_QUEUE | OMNI_WAKE_WATCHES, &error))
		omni_error_report(&error, ERROR);
	PG_RETURN_BOOL(any);
}
