/*-------------------------------------------------------------------------
 *
 * setting.c
 *		The settings, omni_refresh.*.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/guc.h"

#include "base/compat.h"
#include "base/setting.h"

bool		omni_is_preloaded;

/* Settings of sessions */
char	   *omni_server;
int			omni_on_failure;
int			omni_call_timeout;	/* ms */
bool		omni_enabled;

/* Settings of the worker */
int			omni_idle_timeout;	/* ms */
int			omni_min_interval;	/* ms */
int			omni_retry_for;		/* s */
int			omni_max_in_flight;
bool		omni_track;
int			omni_track_timeout; /* s */
int			omni_retention;		/* min, -1 means forever */

static const struct config_enum_entry on_failure_options[] = {
	{"error", OMNI_ON_FAILURE_ERROR, false},
	{"warning", OMNI_ON_FAILURE_WARNING, false},
	{NULL, 0, false}
};

/* Define all settings.  Called when the library is loaded. */
void
omni_settings_define(void)
{
	DefineCustomStringVariable("omni_refresh.server",
							   "Sets the foreign server that names the Omni instance to call.",
							   NULL, &omni_server, "omni",
							   PGC_USERSET, GUC_IS_NAME, NULL, NULL, NULL);
	DefineCustomEnumVariable("omni_refresh.on_failure",
							 "Sets whether a failed call raises an error or warns and returns the failed job.",
							 NULL, &omni_on_failure, OMNI_ON_FAILURE_ERROR,
							 on_failure_options,
							 PGC_USERSET, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("omni_refresh.call_timeout",
							"Sets how long a call may take, with its retries.",
							NULL, &omni_call_timeout, 60 * 1000, 1, INT_MAX,
							PGC_USERSET, GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomBoolVariable("omni_refresh.enabled",
							 "Sets whether requests are sent; otherwise new requests are canceled.",
							 NULL, &omni_enabled, true,
							 PGC_SUSET, 0, NULL, NULL, NULL);

	DefineCustomIntVariable("omni_refresh.idle_timeout",
							"Sets how long an idle worker waits for requests before it exits.",
							NULL, &omni_idle_timeout, 60 * 1000, 0, INT_MAX,
							PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomIntVariable("omni_refresh.min_interval",
							"Sets the minimum time between two queued requests that could be merged.",
							NULL, &omni_min_interval, 10 * 1000, 0, INT_MAX,
							PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomIntVariable("omni_refresh.retry_for",
							"Sets how long a queued request is retried.",
							NULL, &omni_retry_for, 24 * 3600, 0, INT_MAX,
							PGC_SIGHUP, GUC_UNIT_S, NULL, NULL, NULL);
	DefineCustomIntVariable("omni_refresh.max_in_flight",
							"Sets the maximum number of queued requests in flight for one role at one server.",
							NULL, &omni_max_in_flight, 4, 1, 1000,
							PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomBoolVariable("omni_refresh.track",
							 "Sets whether jobs that Omni has accepted are followed to their end.",
							 NULL, &omni_track, true,
							 PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("omni_refresh.track_timeout",
							"Sets how long a job that Omni has accepted is followed.",
							NULL, &omni_track_timeout, 3600, 1, INT_MAX,
							PGC_SIGHUP, GUC_UNIT_S, NULL, NULL, NULL);
	DefineCustomIntVariable("omni_refresh.retention",
							"Sets how long finished jobs and their events are kept.",
							"-1 keeps them forever.",
							&omni_retention, 30 * 24 * 60, -1, INT_MAX,
							PGC_SIGHUP, GUC_UNIT_MIN, NULL, NULL, NULL);
	MarkGUCPrefixReserved("omni_refresh");
}
