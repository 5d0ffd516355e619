/*-------------------------------------------------------------------------
 *
 * ending.c
 *		What the server's log says when the worker or the launcher ends.
 *
 * PostgreSQL ends a background worker by a FATAL error, also when an administrator has
 * terminated it, when the server stops, and when its database was dropped before it could
 * connect.  Those ends are in order, and somebody who watches the log for FATAL should not be
 * called for them: write such an error as LOG, or DEBUG1 if nobody needs to know.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "utils/elog.h"

#include "shared/ending.h"

static emit_log_hook_type next_emit_log_hook = NULL;
static bool database_is_gone = false;

static void soften(ErrorData *data);

/* In a process of ours that has just begun: watch how it ends. */
void
omni_ending_watch(void)
{
	next_emit_log_hook = emit_log_hook;
	emit_log_hook = soften;
}

/* Return whether this process ends because its database is gone. */
bool
omni_ending_is_final(void)
{
	return database_is_gone;
}

/*
 * emit_log_hook: write the errors of ends that are in order with a lower level.  A hook may
 * keep an error out of the log, but not change it.
 *
 * The error about a missing database has a detail if it may have been renamed meanwhile.
 */
static void
soften(ErrorData *data)
{
	if (data->elevel == FATAL && (data->sqlerrcode == ERRCODE_ADMIN_SHUTDOWN ||
								  data->sqlerrcode == ERRCODE_UNDEFINED_DATABASE))
	{
		database_is_gone = data->sqlerrcode == ERRCODE_UNDEFINED_DATABASE && data->detail == NULL;
		data->output_to_server = false;
		HOLD_INTERRUPTS();
		ereport(data->sqlerrcode == ERRCODE_ADMIN_SHUTDOWN ? LOG : DEBUG1,
				(errcode(data->sqlerrcode),
				 errmsg_internal("%s", data->message)));
		RESUME_INTERRUPTS();
	}
	else if (next_emit_log_hook != NULL)
		next_emit_log_hook(data);
}
