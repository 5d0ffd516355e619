/*-------------------------------------------------------------------------
 *
 * request.c
 *		What the SQL-callable functions share: make a job, queue it, and find one by its id.
 *
 * The files of the SQL-callable functions use this one, and none of them uses another.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xlog.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/inval.h"
#include "utils/timestamp.h"

#include "job.h"
#include "omni_refresh.h"
#include "once.h"
#include "option.h"
#include "request.h"
#include "setting.h"
#include "status.h"
#include "wakeup.h"

static bool is_own(const OmniRequest *request);

/*
 * Initialize a job of the current user for the server that omni_refresh.server names.
 */
void
omni_job_init(OmniJob *job, const char *origin)
{
	OmniRequest *request = &job->request;

	memset(job, 0, sizeof(*job));
	job->origin = origin;
	namestrcpy(&request->server, omni_server);
	request->role = GetUserId();
	namestrcpy(&request->requested_by, GetUserNameFromId(request->role, false));
	request->requested_at = GetCurrentTimestamp();
	omni_tables_require();
}

/*
 * Find the extension's tables, or raise an error.
 */
void
omni_tables_require(void)
{
	if (!omni_tables_find())
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("extension \"%s\" does not exist", OMNI_EXTENSION)));
}

/*
 * Return whether the requester may send requests to the job's server.  Sets *error if not.  The
 * worker checks again, with its own view of the catalogs.
 */
bool
omni_may_request(const OmniJob *job, OmniError *error)
{
	OmniTarget	target;

	AcceptInvalidationMessages();	/* what others have revoked by now */
	return !omni_in_recovery(error) &&
		omni_target_find(NameStr(job->request.server), job->request.role, &target, error);
}

/* Set *error and return true on a standby, where no worker runs, since a worker writes. */
bool
omni_in_recovery(OmniError *error)
{
	if (!RecoveryInProgress())
		return false;
	omni_error_set(error, ERRCODE_READ_ONLY_SQL_TRANSACTION,
				   "cannot send requests to Omni during recovery");
	omni_error_hint(error, "Call the function on the primary.");
	return true;
}

/*
 * Insert a queued job as a part of this transaction and return its row.  If an on-commit
 * job of this transaction covers the request, insert nothing and return that job's row.
 * A job that is to be repeated is always inserted.
 */
Datum
omni_queue_job(OmniJob *job)
{
	bool		once = strcmp(job->origin, OMNI_ORIGIN_ON_COMMIT) == 0;
	OmniError	error = {0};
	OmniRowVersion version;
	Datum		row;

	if (!omni_enabled)
		return omni_job_form_disabled(job);
	if (!omni_may_request(job, &error))
	{
		omni_error_report(&error, omni_on_failure == OMNI_ON_FAILURE_ERROR ? ERROR : WARNING);
		return omni_job_form(job, OMNI_NAME_FAILED, omni_error_text(&error));
	}

	if (once && omni_once_find(&job->request, &row))
		return row;
	if (job->request.kind == OMNI_KIND_SCHEMA)
		omni_once_forget_resets(&job->request);
	row = omni_job_queue(job, &version);
	if (once)
		omni_once_remember(&job->request, row, &version);
	omni_wake_on_commit();
	return row;
}

/* Form the row of a job that is not inserted because omni_refresh.enabled is off. */
Datum
omni_job_form_disabled(const OmniJob *job)
{
	ereport(NOTICE,
			(errmsg("the request was canceled because \"omni_refresh.enabled\" is off")));
	return omni_job_form(job, OMNI_NAME_CANCELED, NULL);
}

/* Return the first argument, the id of a job, which must not be null. */
int64
omni_job_argument(FunctionCallInfo fcinfo)
{
	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("id must not be null"),
				 errhint("Give the id of a job in omni_refresh_job.")));
	return PG_GETARG_INT64(0);
}

/*
 * Read the job with an id, and its carrier: the job itself unless it was merged.  Raises
 * an error if the job does not exist or the current user may not manage it.
 */
void
omni_job_find(int64 id, OmniJobState *own, OmniJobState *carrier)
{
	OmniJobState next;
	bool		found;

	omni_tables_require();
	SPI_connect();
	found = omni_job_look(id, own);
	*carrier = *own;

	/*
	 * a carrier has the lower number: rows written by hand must not make this
	 * loop for ever
	 */
	while (found && carrier->merged_into != 0 && carrier->merged_into < carrier->job.id &&
		   omni_job_look(carrier->merged_into, &next))
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
				 errdetail("Only roles with the privileges of the role that requested it, or of the owner of the table, may use it.")));
}

/*
 * Return whether the current user has the privileges of the requester or of the table's owner.
 * Compare the name, too: the OID of a dropped role may be in use again.
 */
static bool
is_own(const OmniRequest *request)
{
	char	   *rolename = GetUserNameFromId(request->role, true);

	return has_privs_of_role(GetUserId(), omni_job_owner()) ||
		(rolename != NULL && strcmp(rolename, NameStr(request->requested_by)) == 0 &&
		 has_privs_of_role(GetUserId(), request->role));
}
