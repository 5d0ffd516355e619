/*-------------------------------------------------------------------------
 *
 * watch.c
 *		The SQL-callable functions that set and end watches, and show what one has found.
 *
 * A watch is set for a server, model and branch.  Only its requester and the owner of the
 * table of watches may replace or end it.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/catalog.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/timestamp.h"
#include "utils/tuplestore.h"

#include "base/compat.h"
#include "base/setting.h"
#include "shared/wakeup.h"
#include "shared/workerslot.h"
#include "sql/request.h"
#include "store/job.h"
#include "watch/seen.h"

#define MIN_DELAY			USECS_PER_SEC
#define MAX_DELAY			USECS_PER_HOUR

static void read_target(FunctionCallInfo fcinfo, OmniJob *job);
static void complete(OmniJob *job);
static void read_policy(FunctionCallInfo fcinfo, OmniJob *job);
static ArrayType *read_schemas(FunctionCallInfo fcinfo);
static Interval *read_interval(FunctionCallInfo fcinfo, int argno, const char *name, int64 least);
static void check_quiet(const OmniRequest *request);
static bool find_own(const OmniRequest *request, OmniWatch *watch);
static Oid	role_of(const OmniWatch *watch);
static void show(ReturnSetInfo *result, const char *schema, const char *relation,
				 const char *change, const char *refresh);

PG_FUNCTION_INFO_V1(omni_refresh_watch);
PG_FUNCTION_INFO_V1(omni_refresh_unwatch);
PG_FUNCTION_INFO_V1(omni_refresh_changes);

/* Set a watch, or replace it, and return its row. */
Datum
omni_refresh_watch(PG_FUNCTION_ARGS)
{
	OmniJob		job;
	OmniWatch	watch = {0};
	OmniWatch	replaced;
	Interval   *delay;
	Interval   *removals;
	Interval   *quiet;
	OmniError	error = {0};
	Datum		row;

	omni_job_init(&job, OMNI_ORIGIN_DDL);
	read_target(fcinfo, &job);
	watch.schemas = read_schemas(fcinfo);
	delay = read_interval(fcinfo, 3, "delay", MIN_DELAY);
	if (delay == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("delay must not be null")));
	removals = read_interval(fcinfo, 4, "removals", 0);
	quiet = read_interval(fcinfo, 6, "quiet", MIN_DELAY);
	if (!omni_job_complete(&job, &error))
		omni_error_report(&error, ERROR);
	read_policy(fcinfo, &job);
	if (quiet != NULL)
		check_quiet(&job.request);

	watch.request = job.request;
	watch.id = *DatumGetUUIDP(DirectFunctionCall1(gen_random_uuid, (Datum) 0));
	omni_watch_lock();
	SPI_connect();
	if (find_own(&job.request, &replaced))
		omni_watch_delete(&replaced);
	omni_seen_begin(&watch);
	row = SPI_datumTransfer(omni_watch_add(&watch, delay, removals, quiet), false, -1);
	omni_watch_enable_trigger(true);
	SPI_finish();
	omni_wake_on_change();
	PG_RETURN_DATUM(row);
}

/* End a watch.  Returns whether there was one. */
Datum
omni_refresh_unwatch(PG_FUNCTION_ARGS)
{
	OmniJob		job;
	OmniWatch	watch;
	bool		found;

	omni_job_init(&job, OMNI_ORIGIN_DDL);
	read_target(fcinfo, &job);
	complete(&job);
	omni_watch_lock();
	SPI_connect();
	found = find_own(&job.request, &watch);
	if (found)
	{
		omni_watch_delete(&watch);
		if (!omni_watch_any())
			omni_watch_enable_trigger(false);
	}
	SPI_finish();
	if (found)
		omni_wake_on_change();	/* the worker is to forget it */
	PG_RETURN_BOOL(found);
}

/* Show how the relations of a watch differ from what Omni was told. */
Datum
omni_refresh_changes(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	OmniJob		job;
	OmniWatch	watch;
	List	   *list;
	ListCell   *cell;

	omni_materialize_compat(fcinfo);
	omni_job_init(&job, OMNI_ORIGIN_DDL);
	read_target(fcinfo, &job);
	complete(&job);
	SPI_connect();
	if (!find_own(&job.request, &watch))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("there is no watch of this model, server and branch"),
				 errhint("Call omni_refresh_watch() to set one.")));

	list = omni_seen_differences(&watch, OMNI_SEEN_START, OID_MAX);
	foreach(cell, list)
	{
		OmniDifference *difference = lfirst(cell);

		if (!difference->known)
			show(result, difference->schema, difference->relation, "added", "soft");
		else if (difference->adds || difference->removes)
			show(result, difference->schema, difference->relation, difference->words,
				 !difference->removes ? "soft" : watch.removals >= 0 ? "hard" : "none");
	}
	list = omni_seen_relations(&watch, NULL, PG_INT32_MAX);
	foreach(cell, list)
	{
		OmniSeen   *seen = lfirst(cell);

		if (seen->gone)
			show(result, seen->schema, seen->relation, "removed",
				 !seen->leaf && watch.removals >= 0 ? "hard" : "none");
	}
	SPI_finish();
	return (Datum) 0;
}

/* Add a row to the result. */
static void
show(ReturnSetInfo *result, const char *schema, const char *relation, const char *change,
	 const char *refresh)
{
	Datum		values[4] = {
		CStringGetTextDatum(schema), CStringGetTextDatum(relation), CStringGetTextDatum(change),
		CStringGetTextDatum(refresh)
	};
	bool		isnull[4] = {false};

	tuplestore_putvalues(result->setResult, result->setDesc, values, isnull);
}

/* Store the first two arguments, the model and the branch. */
static void
read_target(FunctionCallInfo fcinfo, OmniJob *job)
{
	OmniRequest *request = &job->request;

	request->has_model = !PG_ARGISNULL(0);
	if (request->has_model)
		request->model = *PG_GETARG_UUID_P(0);
	request->has_branch = !PG_ARGISNULL(1);
	if (request->has_branch)
		request->branch = *PG_GETARG_UUID_P(1);
}

/* Take the model from the server if it is left out; otherwise the server may be out of reach. */
static void
complete(OmniJob *job)
{
	OmniError	error;

	if (!job->request.has_model && !omni_job_complete(job, &error))
		omni_error_report(&error, ERROR);
}

/* Store the cache policy; if it is null, the server's.  An empty one means none. */
static void
read_policy(FunctionCallInfo fcinfo, OmniJob *job)
{
	char	   *policy;
	OmniTarget	target;
	OmniError	error;

	if (!omni_may_request(job, &target, &error))
		omni_error_report(&error, ERROR);
	policy = PG_ARGISNULL(5) ? target.cache_policy : text_to_cstring(PG_GETARG_TEXT_PP(5));
	if (policy == NULL || policy[0] == '\0')
		return;
	if (!omni_api_is_policy(policy))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("\"%s\" is not the name of a cache policy", policy)));
	strlcpy(job->request.policy, policy, sizeof(job->request.policy));
}

/* Check the schemas to watch.  Returns NULL for all. */
static ArrayType *
read_schemas(FunctionCallInfo fcinfo)
{
	ArrayType  *schemas;
	Datum	   *names;
	int			count;

	if (PG_ARGISNULL(2))
		return NULL;
	schemas = PG_GETARG_ARRAYTYPE_P(2);
	if (ARR_NDIM(schemas) != 1)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("schemas must be a one-dimensional array that is not empty"),
				 errhint("Leave it out, or give NULL, to watch all schemas.")));
	if (array_contains_nulls(schemas))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("schemas must not contain nulls")));
	deconstruct_array(schemas, TEXTOID, -1, false, TYPALIGN_INT, &names, NULL, &count);
	for (int i = 0; i < count; i++)
	{
		char	   *name = TextDatumGetCString(names[i]);

		if (IsReservedName(name) || strcmp(name, "information_schema") == 0)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("schema \"%s\" cannot be watched", name),
					 errdetail("It is a schema of the system, and watches compare what users have made."),
					 errhint("Leave it out of schemas.")));
	}
	return schemas;
}

/* Check an interval, which may be null. */
static Interval *
read_interval(FunctionCallInfo fcinfo, int argno, const char *name, int64 least)
{
	Interval   *interval;

	if (PG_ARGISNULL(argno))
		return NULL;
	interval = PG_GETARG_INTERVAL_P(argno);
	if (interval->month != 0 || interval->day != 0 ||
		interval->time < least || interval->time > MAX_DELAY)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s must be between %d s and 1 h", name, (int) (least / USECS_PER_SEC))));
	return interval;
}

/* Check that there is something to reset, and warn if a worker may be missing. */
static void
check_quiet(const OmniRequest *request)
{
	if (request->policy[0] == '\0')
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("quiet needs a cache policy to reset"),
				 errhint("Give cache_policy, or set the option \"cache_policy\" of server \"%s\".",
						 NameStr(request->server))));
	if (!omni_is_preloaded)
		ereport(WARNING,
				(errmsg("changes of data will not be noticed after a start of the server until its background worker runs"),
				 errhint("Add omni_refresh to shared_preload_libraries, or call omni_refresh_wake() after each start.")));
}

/* Find the watch of a request, which must be the current user's.  Returns false if there is none. */
static bool
find_own(const OmniRequest *request, OmniWatch *watch)
{
	Oid			role;

	if (!omni_watch_find(request, watch))
		return false;
	role = role_of(watch);
	if (!has_privs_of_role(GetUserId(), omni_watch_owner()) &&
		!(OidIsValid(role) && has_privs_of_role(GetUserId(), role)))
	{
		const char *rolename = OidIsValid(role) ? GetUserNameFromId(role, true) : NULL;

		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for the watch of role \"%s\"",
						rolename != NULL ? rolename : NameStr(watch->request.requested_by)),
				 errdetail("Only roles with the privileges of the role that set it, or of the owner of the table of watches, may replace or end it.")));
	}
	return true;
}

/*
 * Return the role that has set a watch, or 0 if there is none.  In a copy of another cluster's
 * watch, OIDs are those of other roles, so that only the name tells.
 */
static Oid
role_of(const OmniWatch *watch)
{
	if (omni_watch_is_active(watch))
		return watch->request.role;
	return get_role_oid(NameStr(watch->request.requested_by), true);
}
