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
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"
#include "utils/tuplestore.h"

#include "call.h"
#include "compat.h"
#include "job.h"
#include "omni_refresh.h"
#include "option.h"
#include "request.h"
#include "setting.h"

/* Report a certificate that expires in fewer days than this */
#define DAYS_LEFT			14

static void say(ReturnSetInfo *result, const char *name, bool ok,
				const char *format,...) pg_attribute_printf(4, 5);
static void say_error(ReturnSetInfo *result, const char *name, const OmniError *error);
static bool check_access(ReturnSetInfo *result, const OmniJob *job);
static void check_way(ReturnSetInfo *result, OmniJob *job);
static void check_connection(ReturnSetInfo *result, const OmniCall *call);
static void check_certificate(ReturnSetInfo *result, const OmniProbe *probed);
static void check_jobs(ReturnSetInfo *result);
static void check_settings(ReturnSetInfo *result);

PG_FUNCTION_INFO_V1(omni_refresh_check);

Datum
omni_refresh_check(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	OmniJob		job;

	omni_materialize_compat(fcinfo);
	omni_job_init(&job, OMNI_ORIGIN_CALL);
	if (check_access(result, &job))
		check_way(result, &job);
	check_jobs(result);
	check_settings(result);
	return (Datum) 0;
}

/* Add a row to the result. */
static void
say(ReturnSetInfo *result, const char *name, bool ok, const char *format,...)
{
	char		text[2048];
	Datum		values[3] = {CStringGetTextDatum(name), BoolGetDatum(ok)};
	bool		isnull[3] = {false};
	va_list		args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	values[2] = CStringGetTextDatum(text);
	tuplestore_putvalues(result->setResult, result->setDesc, values, isnull);
}

static void
say_error(ReturnSetInfo *result, const char *name, const OmniError *error)
{
	say(result, name, false, "%s%s%s%s%s", error->message,
		error->detail[0] != '\0' ? ".  " : "", error->detail,
		error->hint[0] != '\0' ? "  " : "", error->hint);
}

/* Check server, USAGE and user mapping.  Returns whether a request may be sent. */
static bool
check_access(ReturnSetInfo *result, const OmniJob *job)
{
	static const char *const steps[] = {"server", "usage", "user mapping"};
	OmniTarget	target;
	OmniError	error = {0};
	int			reached = lengthof(steps);

	if (omni_in_recovery(&error))
	{
		say_error(result, "primary", &error);
		return false;
	}
	if (!omni_target_find(NameStr(job->request.server), job->request.role, &target, &error))
		reached = target.base_url != NULL ? 2 :
			error.sqlstate == ERRCODE_INSUFFICIENT_PRIVILEGE ? 1 : 0;

	if (reached > 0)
		say(result, steps[0], true, "\"%s\"", NameStr(job->request.server));
	if (reached > 1)
		say(result, steps[1], true, "granted to \"%s\"", NameStr(job->request.requested_by));
	if (reached > 2)
		say(result, steps[2], true, target.key_file != NULL ? "with a key file" : "with a key");
	else
		say_error(result, steps[reached], &error);
	return reached == lengthof(steps);
}

/* Check the worker, and by a look-up of the worker's the key, the connection and the answer. */
static void
check_way(ReturnSetInfo *result, OmniJob *job)
{
	dsm_segment *segment;
	OmniCall   *call = omni_call_create(&job->request, omni_api_models_lookup(NULL, NULL, NULL),
										&segment);
	OmniError	error;

	call->probe = true;
	if (!omni_call_run(segment, &error))
		say_error(result, "background worker", &error);
	else
	{
		say(result, "background worker", true, "running");
		if (call->probed.begun)
		{
			say(result, "api key", true, "can be read");
			check_connection(result, call);
		}
		else
			say_error(result,
					  call->error.sqlstate == ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION ? "api key" :
					  call->error.sqlstate == ERRCODE_INSUFFICIENT_RESOURCES ? "rate limit" :
					  "request", &call->error);
	}
	omni_call_end(segment);
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
		say(result, names[OMNI_PHASE_NAME], true, "%s",
			probed->address[0] != '\0' ? probed->address : "is known");
	if (phase > OMNI_PHASE_CONNECT)
		say(result, names[OMNI_PHASE_CONNECT], true, "established");
	if (phase > OMNI_PHASE_TLS)
		check_certificate(result, probed);

	if (!probed->answered)
		say_error(result, names[phase], &call->error);
	else
		say(result, names[phase], true, "HTTP status %d after " INT64_FORMAT " ms",
			probed->http_status, probed->elapsed / 1000);
	if (probed->answered && call->error.sqlstate == 0)
		say(result, "authorization", true, "Omni accepts the API key");
	else if (probed->answered)
		say_error(result, "authorization", &call->error);

	if (probed->rate_limit == 0)
		say(result, "rate limit", true, "none");
	else
		say(result, "rate limit", probed->rate_left > 0, probed->rate_left > 0 ?
			"%d of %d requests a minute are left" :
			"%d of %d requests a minute are left; wait for a minute, or let fewer requests use this key",
			probed->rate_left, probed->rate_limit);
}

static void
check_certificate(ReturnSetInfo *result, const OmniProbe *probed)
{
	time_t		expires = probed->expires[0] != '\0' ? curl_getdate(probed->expires, NULL) : -1;
	int			days = expires >= 0 ? (int) ((expires - time(NULL)) / SECS_PER_DAY) : 0;

	if (!probed->secure)
		say(result, "tls", true, "none: plain http");
	else if (probed->issuer[0] == '\0')
		say(result, "tls", true, "set up, with a certificate that is valid");
	else if (expires < 0)
		say(result, "tls", true, "issued by %s", probed->issuer);
	else
		say(result, "tls", days >= DAYS_LEFT, "issued by %s, valid for %d days%s", probed->issuer, days,
			days >= DAYS_LEFT ? "" : ": have it renewed");
}

/* Count the jobs that have not ended and are visible to this user. */
static void
check_jobs(ReturnSetInfo *result)
{
	OmniJobCounts counts;
	OmniError	error;

	if (!omni_tables_check(&error))
	{
		say_error(result, "tables", &error);
		return;
	}
	if (!omni_job_count(&counts))
	{
		say(result, "jobs", false, "another session holds a lock on the table of jobs: look for it in pg_locks");
		return;
	}
	say(result, "jobs", counts.stuck == 0 && counts.foreign == 0,
		INT64_FORMAT " pending, " INT64_FORMAT " sending, " INT64_FORMAT " running%s%s", counts.pending, counts.sending,
		counts.running,
		counts.stuck > 0 ? psprintf("; " INT64_FORMAT " should have been sent minutes ago: see the server's log, and call omni_refresh_wake()", counts.stuck) : "",
		counts.foreign > 0 ? psprintf("; " INT64_FORMAT " are another database's, of which this is a copy, and will be canceled", counts.foreign) : "");
}

static void
check_settings(ReturnSetInfo *result)
{
	static const char *const names[] = {
		"enabled", "server", "on_failure", "call_timeout", "min_interval", "retry_for", "max_in_flight",
		"track", "track_timeout", "retention", "idle_timeout"
	};
	StringInfoData text;

	say(result, "enabled", omni_enabled, omni_enabled ? "on" :
		"off: requests are canceled; set omni_refresh.enabled = on");
	say(result, "preload", true, "%s", omni_is_preloaded ?
		"yes: what is queued goes on by itself after a start of the server" :
		"no: after a start of the server, what is queued goes on with the next request or omni_refresh_wake()");
	initStringInfo(&text);
	for (int i = 0; i < lengthof(names); i++)
		appendStringInfo(&text, "%somni_refresh.%s = %s", i > 0 ? ", " : "", names[i],
						 GetConfigOptionByName(psprintf("omni_refresh.%s", names[i]), NULL, false));
	say(result, "settings", true, "%s", text.data);
}
