/*-------------------------------------------------------------------------
 *
 * request.c
 *		What the SQL-callable functions share: make a job, complete it by the options of its
 *		server, queue it, and find one by its id.
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
#include "utils/guc.h"
#include "utils/inval.h"
#include "utils/timestamp.h"

#include "base/compat.h"
#include "base/setting.h"
#include "base/status.h"
#include "omni_refresh.h"
#include "shared/wakeup.h"
#include "sql/once.h"
#include "sql/request.h"
#include "store/job.h"

static bool find_retry(const OmniJob *job, Datum *row);
static bool look(int64 id, OmniJobState *own, OmniJobState *carrier);
static bool may_use(const OmniRequest *request, OmniUse use);

/*
 * Initialize a job of the current user for the server that omni_refresh.server names.  In a
 * SECURITY DEFINER function the outer user is the one who called it.  That role may have been
 * dropped.
 */
void
omni_job_init(OmniJob *job, const char *origin)
{
	OmniRequest *request = &job->request;
	const char *caller = GetUserNameFromId(GetOuterUserId(), true);

	memset(job, 0, sizeof(*job));
	job->origin = origin;
	namestrcpy(&request->server, omni_server);
	request->role = GetUserId();
	namestrcpy(&request->requested_by, GetUserNameFromId(request->role, false));
	if (caller != NULL)
	{
		request->caller = GetOuterUserId();
		namestrcpy(&request->called_by, caller);
	}
	namestrcpy(&request->application, application_name);
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
 * Return whether the requester may send requests to the job's server, and read the options of
 * that into *target.  Sets *error if not.  The worker checks again, with its own view of the
 * catalogs.
 */
bool
omni_may_request(const OmniJob *job, OmniTarget *target, OmniError *error)
{
	AcceptInvalidationMessages();	/* what others have revoked by now */
	return !omni_in_recovery(error) &&
		omni_target_find(NameStr(job->request.server), job->request.role, target, error);
}

/* Raise an error for an argument that is null and an option that could replace it. */
pg_noreturn static void
missing(const OmniRequest *request, const char *argument, const char *option, const char *value)
{
	ereport(ERROR,
			(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
			 errmsg("%s must be given", argument),
			 errdetail("The argument \"%s\" is null or left out, and the server \"%s\" has no option \"%s\".",
					   argument, NameStr(request->server), option),
			 errhint("Pass %s, or set it for every request with ALTER SERVER %s OPTIONS (ADD %s '...').",
					 value, quote_identifier(NameStr(request->server)), option)));
}

/*
 * Call omni_may_request() for a job, and take what its request leaves out from the options of
 * the server.  If these lack it, raise an error even if omni_refresh.on_failure is warning:
 * an argument is wrong.
 */
bool
omni_job_complete(OmniJob *job, OmniError *error)
{
	OmniRequest *request = &job->request;
	const OmniJobKind *kind = &omni_job_kinds[request->kind];
	OmniTarget	target;

	if (!omni_may_request(job, &target, error))
		return false;
	if (!request->has_model)
	{
		if (target.model == NULL)
			missing(request, "model", "model", "the uuid of a model, as it stands in the address of its page in Omni");
		request->model = *target.model;
		request->has_model = true;
		if (kind->takes_branch && !request->has_branch && target.branch != NULL)
		{
			request->branch = *target.branch;
			request->has_branch = true;
			omni_request_check_length(request);
		}
	}
	if (kind->needs_branch && !request->has_branch)
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("branch must be given"),
				 errdetail("Omni does this for one branch of a model only."),
				 errhint("Pass the uuid of a branch, or leave out model, too, if the server has the options \"model\" and \"branch\".")));
	if (kind->takes_policy && request->policy[0] == '\0')
	{
		if (target.cache_policy == NULL)
			missing(request, "policy", "cache_policy", "the name of a cache policy of the model");
		strlcpy(request->policy, target.cache_policy, OMNI_MAX_POLICY);
	}
	return true;
}

/* Raise an error if the URL of a refresh would be too long. */
void
omni_request_check_length(const OmniRequest *request)
{
	if (!omni_api_fits(request))
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("the names in schemas and tables are too long for one request"),
				 errdetail("The path and the query of its URL would have %zu bytes, and may have %d.",
						   omni_api_path_length(request), OMNI_MAX_PATH),
				 errhint(OMNI_TOO_LONG_HINT)));
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
 * job of this transaction covers the request, insert nothing and return that job's row;
 * likewise if a job that is to be repeated was repeated before, unless in vain.
 */
Datum
omni_queue_job(OmniJob *job)
{
	bool		once = strcmp(job->origin, OMNI_ORIGIN_ON_COMMIT) == 0;
	OmniError	error = {0};
	bool		may = omni_job_complete(job, &error);
	OmniRowVersion version;
	Datum		row;

	if (!omni_enabled)
		return omni_job_form_disabled(job);
	if (!may)
	{
		omni_error_report(&error, omni_on_failure == OMNI_ON_FAILURE_ERROR ? ERROR : WARNING);
		return omni_job_form(job, OMNI_NAME_FAILED, omni_error_text(&error));
	}

	if (once && omni_once_find(&job->request, &row))
		return row;
	if (job->retry_of != 0 && find_retry(job, &row))
		return row;
	if (omni_job_kinds[job->request.kind].holds_resets)
		omni_once_forget_resets(&job->request);
	row = omni_job_queue(job, &version);
	if (once)
		omni_once_remember(&job->request, row, &version);
	omni_wake_on_commit();
	return row;
}

/*
 * Find an earlier retry of the job that a job is to repeat, which is unfinished or has
 * succeeded.  Only the newest may be: it was queued because those before it were neither.
 */
static bool
find_retry(const OmniJob *job, Datum *row)
{
	int64		last = omni_job_last_retry(job);
	OmniJobState own;
	OmniJobState carrier;

	if (last == 0 || !look(last, &own, &carrier) || omni_job_can_be_retried(&carrier))
		return false;
	*row = omni_job_read(last);
	return true;
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
 * an error if the job does not exist or the current user may not use it so.
 */
void
omni_job_find(int64 id, OmniUse use, OmniJobState *own, OmniJobState *carrier)
{
	omni_tables_require();
	if (!look(id, own, carrier))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("job " INT64_FORMAT " does not exist", id)));
	if (!may_use(&own->job.request, use))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for job " INT64_FORMAT, id),
				 use == OMNI_USE_SEE ?
				 errdetail("Only roles with the privileges of the role that requested or called it, or of the owner of the table, may wait for it.") :
				 errdetail("Only roles with the privileges of the role that requested it, or of the owner of the table, may use it.")));
}

/* Read a job and its carrier.  Returns false if there is no such job. */
static bool
look(int64 id, OmniJobState *own, OmniJobState *carrier)
{
	bool		found;

	SPI_connect();
	found = omni_job_look_carrier(id, own, carrier);
	SPI_finish();
	return found;
}

/*
 * Return the row of a job's carrier.  To whoever may not see that, as somebody else has called,
 * return the row of the job itself, with the outcome of its carrier.
 */
Datum
omni_job_result(const OmniJobState *own, const OmniJobState *carrier)
{
	if (may_use(&carrier->job.request, OMNI_USE_SEE))
		return omni_job_read(carrier->job.id);
	return omni_job_read_outcome(own->job.id, carrier->job.id);
}

/* Return whether a job, or its carrier, has ended without success. */
bool
omni_job_can_be_retried(const OmniJobState *carrier)
{
	return strcmp(carrier->status, OMNI_NAME_FAILED) == 0 ||
		strcmp(carrier->status, OMNI_NAME_CANCELED) == 0 ||
		strcmp(carrier->status, OMNI_NAME_UNKNOWN) == 0;
}

/* Return whether the current user may use a job; its row is shown to the same roles. */
static bool
may_use(const OmniRequest *request, OmniUse use)
{
	return has_privs_of_role(GetUserId(), omni_job_owner()) ||
		has_privs_of_role(GetUserId(), request->role) ||
		(use == OMNI_USE_SEE && OidIsValid(request->caller) && has_privs_of_role(GetUserId(), request->caller));
}
