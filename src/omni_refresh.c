/*-------------------------------------------------------------------------
 *
 * omni_refresh.c
 *		Loading of the library, its settings, and errors as plain data.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/elog.h"
#include "utils/guc.h"

#include "compat.h"
#include "omni_refresh.h"

PG_MODULE_MAGIC_EXT(.name = OMNI_EXTENSION,.version = OMNI_REFRESH_VERSION);

bool		omni_is_preloaded;

/* For users */
char	   *omni_server;
int			omni_on_failure;
int			omni_call_timeout;	/* ms */
bool		omni_enabled;

/* For the worker */
int			omni_idle_timeout;	/* ms */
int			omni_min_interval;	/* ms */
int			omni_retry_for;		/* s */
int			omni_max_in_flight;
bool		omni_track;
int			omni_track_timeout; /* s */
int			omni_retention;		/* min, -1 means for ever */

static void format_clipped(char *buffer, size_t size, const char *format, va_list args)
			pg_attribute_printf(3, 0);

static const struct config_enum_entry on_failure_options[] = {
	{"error", OMNI_ON_FAILURE_ERROR, false},
	{"warning", OMNI_ON_FAILURE_WARNING, false},
	{NULL, 0, false}
};

PGDLLEXPORT void _PG_init(void);

void
_PG_init(void)
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
							 "Sets whether requests are sent; if not, they are canceled.",
							 NULL, &omni_enabled, true,
							 PGC_SUSET, 0, NULL, NULL, NULL);

	DefineCustomIntVariable("omni_refresh.idle_timeout",
							"Sets how long the worker waits for more to do before it exits.",
							NULL, &omni_idle_timeout, 60 * 1000, 0, INT_MAX,
							PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomIntVariable("omni_refresh.min_interval",
							"Sets the least time between two queued requests for the same thing.",
							NULL, &omni_min_interval, 10 * 1000, 0, INT_MAX,
							PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomIntVariable("omni_refresh.retry_for",
							"Sets how long a queued request is tried again.",
							NULL, &omni_retry_for, 24 * 3600, 0, INT_MAX,
							PGC_SIGHUP, GUC_UNIT_S, NULL, NULL, NULL);
	DefineCustomIntVariable("omni_refresh.max_in_flight",
							"Sets how many queued requests a server is sent at once.",
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
							"-1 keeps them for ever.",
							&omni_retention, 30 * 24 * 60, -1, INT_MAX,
							PGC_SIGHUP, GUC_UNIT_MIN, NULL, NULL, NULL);
	MarkGUCPrefixReserved("omni_refresh");

	omni_is_preloaded = process_shared_preload_libraries_in_progress;
	if (process_shared_preload_libraries_in_progress && !IsBinaryUpgrade)
		omni_launcher_register();
}

/*
 * Formats a text of an error into its fixed place; what does not fit is cut off
 * between characters.
 */
static void
format_clipped(char *buffer, size_t size, const char *format, va_list args)
{
	int			length = vsnprintf(buffer, size, format, args);

	if (length >= size)
		strcpy(buffer + pg_mbcliplen(buffer, strlen(buffer), size - 4), "...");
}

/* Sets the code and the message of an error, and empties its other texts. */
void
omni_error_set(OmniError *error, int sqlstate, const char *format,...)
{
	va_list		args;

	error->sqlstate = sqlstate;
	error->detail[0] = '\0';
	error->hint[0] = '\0';
	va_start(args, format);
	format_clipped(error->message, sizeof(error->message), format, args);
	va_end(args);
}

void
omni_error_detail(OmniError *error, const char *format,...)
{
	va_list		args;

	va_start(args, format);
	format_clipped(error->detail, sizeof(error->detail), format, args);
	va_end(args);
}

void
omni_error_hint(OmniError *error, const char *format,...)
{
	va_list		args;

	va_start(args, format);
	format_clipped(error->hint, sizeof(error->hint), format, args);
	va_end(args);
}

/*
 * Makes plain data of the error being caught, which is then no longer being
 * handled.  To be called in PG_CATCH().
 */
void
omni_error_catch(OmniError *error, MemoryContext context)
{
	ErrorData  *data;

	MemoryContextSwitchTo(context);
	data = CopyErrorData();
	FlushErrorState();
	omni_error_set(error, data->sqlerrcode, "%s", data->message);
	if (data->detail != NULL)
		omni_error_detail(error, "%s", data->detail);
	if (data->hint != NULL)
		omni_error_hint(error, "%s", data->hint);
	FreeErrorData(data);
}

/* Reports an error at a level of ereport's. */
void
omni_error_report(const OmniError *error, int elevel)
{
	ereport(elevel,
			(errcode(error->sqlstate),
			 errmsg_internal("%s", error->message),
			 error->detail[0] != '\0' ? errdetail_internal("%s", error->detail) : 0,
			 error->hint[0] != '\0' ? errhint("%s", error->hint) : 0));
}

/* An error as a column of a table shows it, the way psql would; palloc'd. */
char *
omni_error_text(const OmniError *error)
{
	return psprintf("%s: %s%s%s%s%s", unpack_sql_state(error->sqlstate), error->message,
					error->detail[0] != '\0' ? "\nDETAIL:  " : "", error->detail,
					error->hint[0] != '\0' ? "\nHINT:  " : "", error->hint);
}
