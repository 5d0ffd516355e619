/*-------------------------------------------------------------------------
 *
 * error.c
 *		Errors as plain data: the worker makes them, the caller raises them, and tables
 *		store them.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "mb/pg_wchar.h"
#include "utils/elog.h"
#include "utils/resowner.h"

#include "base/error.h"

static void format_clipped(char *buffer, size_t size, const char *format, va_list args)
			pg_attribute_printf(3, 0);

/* Format a text into a buffer of fixed size; clip it between characters if it is too long. */
static void
format_clipped(char *buffer, size_t size, const char *format, va_list args)
{
	int			length = vsnprintf(buffer, size, format, args);

	if (length >= size)
		strcpy(buffer + pg_mbcliplen(buffer, strlen(buffer), size - 4), "...");
}

/* Set the code and the message of an error, and clear its detail and hint. */
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

/* Copy the error being caught into *error, and flush it.  Call this in PG_CATCH() only. */
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

/*
 * Call a function that may raise an error.  If it does, copy the error into *error, release
 * the locks and the like that the function has left behind, and return false.
 */
bool
omni_error_try(void (*function) (void), OmniError *error)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	volatile bool success = false;

	BeginInternalSubTransaction(NULL);
	PG_TRY();
	{
		function();
		ReleaseCurrentSubTransaction();
		success = true;
	}
	PG_CATCH();
	{
		omni_error_catch(error, context);
		RollbackAndReleaseCurrentSubTransaction();
	}
	PG_END_TRY();
	MemoryContextSwitchTo(context);
	CurrentResourceOwner = owner;
	return success;
}

/* Report an error at the given level of ereport(). */
void
omni_error_report(const OmniError *error, int elevel)
{
	ereport(elevel,
			(errcode(error->sqlstate),
			 errmsg_internal("%s", error->message),
			 error->detail[0] != '\0' ? errdetail_internal("%s", error->detail) : 0,
			 error->hint[0] != '\0' ? errhint("%s", error->hint) : 0));
}

/* Format an error for a column of a table, the way psql shows it; palloc'd. */
char *
omni_error_text(const OmniError *error)
{
	return psprintf("%s: %s%s%s%s%s", unpack_sql_state(error->sqlstate), error->message,
					error->detail[0] != '\0' ? "\nDETAIL:  " : "", error->detail,
					error->hint[0] != '\0' ? "\nHINT:  " : "", error->hint);
}
