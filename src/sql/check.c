/*-------------------------------------------------------------------------
 *
 * check.c
 *		omni_refresh_check(): diagnose the configuration.  Take the steps of a request
 *		one by one and report for each whether it succeeds, and if not, what to do.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "executor/spi.h"
#include "funcapi.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/timestamp.h"
#include "utils/tuplestore.h"

#include "base/compat.h"
#include "base/setting.h"
#include "omni/option.h"
#include "omni_refresh.h"
#include "shared/call.h"
#include "shared/workerslot.h"
#include "sql/known.h"
#include "sql/request.h"
#include "store/job.h"
#include "watch/seen.h"

/* Report a certificate that expires in fewer days than this */
#define DAYS_LEFT			14

/* Name at most this many schemas */
#define MAX_NAMES			10

static void say(ReturnSetInfo *result, const char *name, bool ok, const char *hint,
				const char *format,...) pg_attribute_printf(5, 6);
static void say_error(ReturnSetInfo *result, const char *name, const OmniError *error);
static bool check_access(ReturnSetInfo *result, const OmniJob *job, OmniTarget *target);
static void check_way(ReturnSetInfo *result, OmniJob *job, const OmniTarget *target);
static void check_connection(ReturnSetInfo *result, const OmniCall *call);
static void check_certificate(ReturnSetInfo *result, const OmniProbe *probed);
static bool check_model(ReturnSetInfo *result, const OmniTarget *target, const OmniProbe *probed);
static void check_schemas(ReturnSetInfo *result, const OmniJob *job, const OmniTarget *target);
static void report_schemas(ReturnSetInfo *result, const List *unknown, int all);
static void check_jobs(ReturnSetInfo *result, bool had_worker);
static void check_settings(ReturnSetInfo *result);
static void check_watches(ReturnSetInfo *result);
static void check_watch(ReturnSetInfo *result, const OmniWatch *watch);

PG_FUNCTION_INFO_V1(omni_refresh_check);

Datum
omni_refresh_check(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	OmniJob		job;
	OmniTarget	target;
	bool		had_worker = omni_worker_exists();

	omni_materialize_compat(fcinfo);
	omni_job_init(&job, OMNI_ORIGIN_CALL);
	if (check_access(result, &job, &target))
		check_way(result, &job, &target);
	check_jobs(result, had_worker);
	check_watches(result);
	check_settings(result);
	return (Datum) 0;
}

/* Add a row to the result.  The hint may be NULL. */
static void
say(ReturnSetInfo *result, const char *name, bool ok, const char *hint, const char *format,...)
{
	StringInfoData text;
	Datum		values[4] = {CStringGetTextDatum(name), BoolGetDatum(ok)};
	bool		isnull[4] = {false};
	int			needed;

	initStringInfo(&text);
	do
	{
		va_list		args;

		va_start(args, format);
		needed = appendStringInfoVA(&text, format, args);
		va_end(args);
		if (needed > 0)
			enlargeStringInfo(&text, needed);
	} while (needed > 0);

	values[2] = CStringGetTextDatum(text.data);
	isnull[3] = hint == NULL || hint[0] == '\0';
	if (!isnull[3])
		values[3] = CStringGetTextDatum(hint);
	tuplestore_putvalues(result->setResult, result->setDesc, values, isnull);
}

static void
say_error(ReturnSetInfo *result, const char *name, const OmniError *error)
{
	say(result, name, false, error->hint, "%s%s%s", error->message,
		error->detail[0] != '\0' ? ".  " : "", error->detail);
}

/* Check server, USAGE and user mapping.  Returns whether a request may be sent. */
static bool
check_access(ReturnSetInfo *result, const OmniJob *job, OmniTarget *target)
{
	static const char *const steps[] = {"server", "usage", "user mapping"};
	OmniError	error = {0};
	int			reached = lengthof(steps);

	if (omni_in_recovery(&error))
	{
		say_error(result, "primary", &error);
		return false;
	}
	if (!omni_target_find(NameStr(job->request.server), job->request.role, target, &error))
		reached = target->base_url != NULL ? 2 :
			error.sqlstate == ERRCODE_INSUFFICIENT_PRIVILEGE ? 1 : 0;

	if (reached > 0)
		say(result, steps[0], true, NULL, "\"%s\"", NameStr(job->request.server));
	if (reached > 1)
		say(result, steps[1], true, NULL, "granted to \"%s\"", NameStr(job->request.requested_by));
	if (reached > 2)
		say(result, steps[2], true, NULL, target->key_file != NULL ? "with a key file" : "with a key");
	else
		say_error(result, steps[reached], &error);
	return reached == lengthof(steps);
}

/*
 * Check the worker, and by a look-up of the worker's the key, the connection and the answer;
 * if the server names a model, look that up.  Then look up the model's schemas.
 */
static void
check_way(ReturnSetInfo *result, OmniJob *job, const OmniTarget *target)
{
	const char *lookup = omni_api_models_lookup(NULL, NULL, NULL);
	dsm_segment *segment;
	OmniCall   *call;
	OmniError	error;
	bool		has_model = false;

	if (target->model != NULL)
	{
		job->request.model = *target->model;
		job->request.has_model = true;
		lookup = omni_api_model_lookup(target->model);
	}
	call = omni_call_create(&job->request, lookup, &segment);
	call->once = call->probe = true;
	if (!omni_call_run(segment, &error))
		say_error(result, "background worker", &error);
	else
	{
		say(result, "background worker", true, NULL, "running");
		if (call->probed.begun)
		{
			say(result, "api key", true, NULL, "can be read");
			check_connection(result, call);
			has_model = call->error.sqlstate == 0 && check_model(result, target, &call->probed);
		}
		else
			say_error(result,
					  call->error.sqlstate == ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION ? "api key" :
					  call->error.sqlstate == ERRCODE_INSUFFICIENT_RESOURCES ? "rate limit" :
					  "request", &call->error);
	}
	omni_call_end(segment);
	if (has_model)
		check_schemas(result, job, target);
}

static void
check_connection(ReturnSetInfo *result, const OmniCall *call)
{
	const OmniProbe *probed = &call->probed;
	OmniPhase	phase = probed->answered ? OMNI_PHASE_READ : probed->phase;
	static const char *const names[] = {
		[OMNI_PHASE_NAME] = "name",
		[OMNI_PHASE_CONNECT] = "connection",
		[OMNI_PHASE_TLS] = "tls",
		[OMNI_PHASE_WAIT] = "answer",
		[OMNI_PHASE_READ] = "answer"
	};

	if (phase > OMNI_PHASE_NAME)
		say(result, names[OMNI_PHASE_NAME], true, NULL, "%s",
			probed->address[0] != '\0' ? probed->address : "is known");
	if (phase > OMNI_PHASE_CONNECT)
		say(result, names[OMNI_PHASE_CONNECT], true, NULL, "established");
	if (phase > OMNI_PHASE_TLS)
		check_certificate(result, probed);

	if (!probed->answered)
		say_error(result, names[phase], &call->error);
	else
		say(result, names[phase], true, NULL, "HTTP status %d after " INT64_FORMAT " ms",
			probed->http_status, probed->elapsed / 1000);
	if (probed->answered && call->error.sqlstate == 0)
		say(result, "authorization", true, NULL, "Omni accepts the API key");
	else if (probed->answered)
		say_error(result, "authorization", &call->error);

	if (probed->rate_limit == 0)
		say(result, "rate limit", true, NULL, "none");
	else
		say(result, "rate limit", probed->rate_left > 0, probed->rate_left > 0 ? NULL :
			"Wait for a minute, or let fewer requests use this key.",
			probed->rate_left == 1 ? "%d of %d requests a minute is left" : "%d of %d requests a minute are left", probed->rate_left, probed->rate_limit);
}

static void
check_certificate(ReturnSetInfo *result, const OmniProbe *probed)
{
	time_t		expires = probed->expires[0] != '\0' ? curl_getdate(probed->expires, NULL) : -1;
	int			days = expires >= 0 ? (int) ((expires - time(NULL)) / SECS_PER_DAY) : 0;

	if (!probed->secure)
		say(result, "tls", true, NULL, "none: plain http");
	else if (probed->issuer[0] == '\0')
		say(result, "tls", true, NULL, "set up, with a certificate that is valid");
	else if (expires < 0)
		say(result, "tls", true, NULL, "issued by %s", probed->issuer);
	else
		say(result, "tls", days >= DAYS_LEFT, days >= DAYS_LEFT ? NULL : "Have the certificate renewed.",
			days == 1 ? "issued by %s, valid for %d day" : "issued by %s, valid for %d days", probed->issuer, days);
}

/* Check the model that the server names.  Returns whether Omni has it. */
static bool
check_model(ReturnSetInfo *result, const OmniTarget *target, const OmniProbe *probed)
{
	char	   *id;

	if (target->model == NULL)
	{
		say(result, "model", true,
			"Set the server's option \"model\" to leave the argument out, and to have the schemas checked.",
			"none: each request names its own");
		return false;
	}
	id = DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(target->model)));
	if (!probed->has_model)
		say(result, "model", false,
			"Check the server's option \"model\"; omni_refresh_models() lists the models that the API key can see.",
			"Omni has no model %s, or does not show it to this API key", id);
	else if (probed->model[0] == '\0')
		say(result, "model", true, NULL, "%s, which has no name", id);
	else
		say(result, "model", true, NULL, "\"%s\" (%s)", probed->model, id);
	return probed->has_model;
}

/* Check that Omni knows the schemas of this database. */
static void
check_schemas(ReturnSetInfo *result, const OmniJob *job, const OmniTarget *target)
{
	dsm_segment *segment;
	OmniCall   *call = omni_call_create(&job->request,
										omni_api_schemas_lookup(target->model, target->branch),
										&segment);
	OmniError	error;
	List	   *unknown;
	int			all;

	call->once = true;
	if (omni_call_run(segment, &error))
		error = call->error;
	if (error.sqlstate != 0)
		say_error(result, "schemas", &error);
	else if (!omni_known_compare((char *) call + call->answer, call->length, &unknown, &all))
		say(result, "schemas", false,
			"Check that the server's \"base_url\" is the login host of an Omni instance, and what proxies are in between.",
			"unexpected response from server \"%s\": it is not a list of schemas",
			NameStr(job->request.server));
	else
		report_schemas(result, unknown, all);
	omni_call_end(segment);
}

static void
report_schemas(ReturnSetInfo *result, const List *unknown, int all)
{
	StringInfoData names;
	ListCell   *cell;

	if (unknown == NIL)
	{
		if (all == 0)
			say(result, "schemas", true, NULL, "this database has no schemas with tables or views");
		else
			say(result, "schemas", true, NULL, all == 1 ? "Omni knows the %d schema with tables or views of this database" :
				"Omni knows all %d schemas with tables or views of this database", all);
		return;
	}
	initStringInfo(&names);
	foreach(cell, unknown)
	{
		if (foreach_current_index(cell) == MAX_NAMES)
		{
			appendStringInfo(&names, " and %d more", list_length(unknown) - MAX_NAMES);
			break;
		}
		appendStringInfo(&names, "%s\"%s\"", foreach_current_index(cell) > 0 ? ", " : "",
						 (char *) lfirst(cell));
	}
	say(result, "schemas", false,
		"Refresh the whole model, or check which schemas the connection in Omni includes.  A request that lists a schema unknown to Omni refreshes nothing, and still ends \"completed\".",
		"Omni does not know %d of %d schemas with tables or views of this database: %s",
		list_length(unknown), all, names.data);
}

/*
 * Count the jobs that have not ended.  Without a worker none of them goes on, except on a
 * standby, whose primary has the worker.  The check needs a worker, too: say so if it had to
 * start one, since the jobs have stood still until now.
 */
static void
check_jobs(ReturnSetInfo *result, bool had_worker)
{
	OmniJobCounts counts;
	OmniError	error;
	bool		any;
	const char *hint = NULL;
	StringInfoData text;

	if (!omni_tables_check(&error))
	{
		say_error(result, "tables", &error);
		return;
	}
	if (!omni_job_count(&counts))
	{
		say(result, "jobs", false, "Look for the lock in pg_locks.",
			"another session holds a lock on the table of jobs");
		return;
	}

	any = counts.pending + counts.sending + counts.running + counts.foreign > 0;
	initStringInfo(&text);
	appendStringInfo(&text, INT64_FORMAT " pending, " INT64_FORMAT " sending, " INT64_FORMAT " running",
					 counts.pending, counts.sending, counts.running);
	if (counts.foreign > 0)
	{
		appendStringInfo(&text, counts.foreign == 1 ? "; " INT64_FORMAT " is another database's, of which this is a copy" :
						 "; " INT64_FORMAT " are another database's, of which this is a copy", counts.foreign);
		hint = "The background worker will cancel the copies.";
	}
	if (counts.stuck > 0)
	{
		appendStringInfo(&text, "; " INT64_FORMAT " should have been sent minutes ago", counts.stuck);
		hint = "Read the server's log, and call omni_refresh_wake().";
	}
	if (any && !had_worker && !omni_in_recovery(&error))
	{
		if (omni_worker_exists())
		{
			appendStringInfoString(&text, "; there was no background worker before this check");
			hint = "The check has started one, which goes on with them.  After a start of the server, call omni_refresh_wake(), or preload the library.";
		}
		else
		{
			appendStringInfoString(&text, "; there is no background worker");
			hint = "Call omni_refresh_wake(), and read the server's log.";
		}
	}
	say(result, "jobs", hint == NULL, hint, "%s", text.data);
}

/* Check each watch. */
static void
check_watches(ReturnSetInfo *result)
{
	List	   *watches;
	ListCell   *cell;
	OmniError	error;

	if (!omni_tables_check(&error))
		return;					/* check_jobs() has reported it */
	if (!omni_watch_try_lock())
	{
		say(result, "watches", false, "Look for the lock in pg_locks.",
			"another session holds a lock on the tables of watches");
		return;
	}
	SPI_connect();
	watches = omni_watches();
	if (watches == NIL)
		say(result, "watches", true, NULL, "none");
	foreach(cell, watches)
		check_watch(result, lfirst(cell));
	SPI_finish();
}

static void
check_watch(ReturnSetInfo *result, const OmniWatch *watch)
{
	const OmniRequest *request = &watch->request;
	char	   *model = DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(&request->model)));
	char	   *rolename = GetUserNameFromId(request->role, true);
	const char *problem = NULL;
	const char *hint = "Call omni_refresh_watch() again.";
	OmniTarget	target;
	OmniError	error;
	int			relations;
	int			gone;

	if (!omni_watch_is_active(watch))
	{
		problem = watch->database == MyDatabaseId && !watch->triggered ?
			"inactive, since the event trigger is disabled" :
			"inactive, since it was copied from another database";
		hint = "Call omni_refresh_watch() again, or omni_refresh_unwatch().";
	}
	else if (rolename == NULL)
	{
		problem = psprintf("cannot send requests, since role \"%s\" no longer exists", NameStr(request->requested_by));
		hint = "Have the owner of the table of watches call omni_refresh_watch() again.";
	}
	else if (!omni_target_find(NameStr(request->server), request->role, &target, &error))
	{
		problem = psprintf("cannot send requests: %s", error.message);
		hint = error.hint;
	}
	else if (watch->failures > 0)
	{
		problem = watch->failures == 1 ? psprintf("its last job, job " INT64_FORMAT ", has failed", omni_job_carrier(watch->job)) :
			psprintf("%d jobs in a row have failed, the last one is job " INT64_FORMAT, watch->failures, omni_job_carrier(watch->job));
		hint = "Read the events of that job.";
	}
	else if (omni_seen_count(watch, &relations, &gone), gone * 2 > relations)
	{
		problem = psprintf("does not ask Omni to remove %d of %d relations that no longer exist", gone, relations);
		hint = "If they are not to come back, call omni_refresh_watch() again, and request a hard refresh.";
	}
	else if (watch->quiet >= 0 && !omni_is_preloaded)
	{
		problem = "active, but will not notice changes of data after a start of the server until the background worker runs";
		hint = "Add omni_refresh to shared_preload_libraries, or call omni_refresh_wake() after each start.";
	}
	else if (watch->quiet >= 0 && !pgstat_track_counts)
	{
		problem = "active, but notices few changes of data, since track_counts is off";
		hint = "Set track_counts to on.";
	}
	say(result, "watch", problem == NULL, problem == NULL ? NULL : hint, "model %s, server \"%s\": %s",
		model, NameStr(request->server), problem == NULL ? "active" : problem);
}

/* Report each setting by its name, with its value, unit and source. */
static void
check_settings(ReturnSetInfo *result)
{
	say(result, "preload", true, omni_is_preloaded ? NULL :
		"Add omni_refresh to shared_preload_libraries to have queued jobs and watches go on by themselves.",
		"%s", omni_is_preloaded ?
		"yes: queued jobs go on by themselves after a start of the server" :
		"no: after a start of the server, queued jobs go on with the next request or omni_refresh_wake()");

	SPI_connect();
	if (SPI_execute("SELECT name, pg_catalog.current_setting(name), unit, source, sourcefile, sourceline"
					" FROM pg_catalog.pg_show_all_settings()"
					" WHERE pg_catalog.starts_with(name, 'omni_refresh.') ORDER BY name",
					true, 0) != SPI_OK_SELECT)
		elog(ERROR, "could not read the settings");
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		enum
		{
			NAME, VALUE, UNIT, SOURCE, FILE,
						LINE,
						COLUMNS
		};
		char	   *row[COLUMNS];
		bool		ok;
		StringInfoData text;

		for (int column = 0; column < COLUMNS; column++)
			row[column] = SPI_getvalue(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, column + 1);
		ok = omni_enabled || strcmp(row[NAME], "omni_refresh.enabled") != 0;
		initStringInfo(&text);
		appendStringInfoString(&text, row[VALUE]);
		/* a value that is 0 or -1 is shown without its unit */
		if (row[UNIT] != NULL && strspn(row[VALUE], "-0123456789") == strlen(row[VALUE]))
			appendStringInfo(&text, " %s", row[UNIT]);
		if (strcmp(row[SOURCE], "default") != 0)
			appendStringInfo(&text, "; source: %s", row[SOURCE]);
		if (row[FILE] != NULL)
			appendStringInfo(&text, " \"%s\", line %s", row[FILE], row[LINE]);
		say(result, row[NAME], ok, ok ? NULL : "Requests are canceled: set it to \"on\".", "%s", text.data);
	}
	SPI_finish();
}
