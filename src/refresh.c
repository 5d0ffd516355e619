/*-------------------------------------------------------------------------
 *
 * refresh.c
 *		The SQL-callable functions: arguments in, rows out.
 *
 * All that can be known to be wrong is said here, in the caller's own view,
 * before anything is sent or written.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "omni_refresh.h"

/* A name in the list of schemas or of tables */
typedef struct ListedName
{
	char	   *text;
	int			position;		/* in the list, from 0 */
} ListedName;

static void read_arguments(FunctionCallInfo fcinfo, OmniJob *job);
static Datum disabled(const OmniJob *job);
static bool in_recovery(OmniError *error);
static bool may_request(const OmniJob *job, OmniError *error);
static void call_worker(OmniJob *job, OmniError *error);
static ArrayType *check_list(FunctionCallInfo fcinfo, int argno, const char *name);
static void check_name(const ListedName *element, const char *name);
static int	compare_names(const void *a, const void *b);

PG_FUNCTION_INFO_V1(omni_refresh);
PG_FUNCTION_INFO_V1(omni_refresh_on_commit);
PG_FUNCTION_INFO_V1(omni_refresh_wake);
PG_FUNCTION_INFO_V1(omni_refresh_keep_out);

/*
 * Asks for a refresh now, waits for Omni's answer and returns the job's row.
 */
Datum
omni_refresh(PG_FUNCTION_ARGS)
{
	OmniJob		job = {0};
	OmniError	error = {0};

	read_arguments(fcinfo, &job);
	if (!omni_enabled)
		PG_RETURN_DATUM(disabled(&job));
	if (TransactionIdIsValid(GetTopTransactionIdIfAny()))
		ereport(WARNING,
				(errmsg("this transaction has made changes that Omni cannot see yet"),
				 errhint("Commit before you call omni_refresh(), or call omni_refresh_on_commit().")));

	if (may_request(&job, &error))
		call_worker(&job, &error);
	if (error.sqlstate != 0)
		omni_error_report(&error, omni_on_failure == OMNI_ON_FAILURE_ERROR ? ERROR : WARNING);
	if (job.id == 0)
		PG_RETURN_DATUM(omni_job_form(&job, "failed", omni_error_text(&error)));

	if (!omni_tables_find())
		elog(ERROR, "extension \"%s\" was dropped meanwhile", OMNI_EXTENSION);
	PG_RETURN_DATUM(omni_job_read(job.id));
}

/*
 * Asks for a refresh once this transaction has committed, and returns the job's
 * row, which is part of the transaction.
 */
Datum
omni_refresh_on_commit(PG_FUNCTION_ARGS)
{
	OmniJob		job = {.queued = true};
	OmniError	error = {0};
	Datum		row;

	read_arguments(fcinfo, &job);
	if (!omni_enabled)
		PG_RETURN_DATUM(disabled(&job));
	if (!may_request(&job, &error))
	{
		omni_error_report(&error, omni_on_failure == OMNI_ON_FAILURE_ERROR ? ERROR : WARNING);
		PG_RETURN_DATUM(omni_job_form(&job, "failed", omni_error_text(&error)));
	}

	row = omni_job_queue(&job);
	omni_wake_on_commit();
	PG_RETURN_DATUM(row);
}

/*
 * Sees to it that what is unfinished goes on.  Returns whether there is any.
 */
Datum
omni_refresh_wake(PG_FUNCTION_ARGS)
{
	OmniError	error;
	bool		any;

	if (in_recovery(&error))
		omni_error_report(&error, ERROR);
	if (!omni_tables_find())
		elog(ERROR, "extension \"%s\" does not exist", OMNI_EXTENSION);
	any = omni_job_any_unfinished();
	if (any && !omni_worker_wake(&error))
		omni_error_report(&error, ERROR);
	PG_RETURN_BOOL(any);
}

/* A trigger that lets no row in: fires for what logical replication brings. */
Datum
omni_refresh_keep_out(PG_FUNCTION_ARGS)
{
	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("omni_refresh_keep_out() must be called as a trigger")));
	PG_RETURN_POINTER(NULL);
}

/*
 * Checks the five arguments that all functions that ask for a refresh have, and
 * makes a job of them.
 */
static void
read_arguments(FunctionCallInfo fcinfo, OmniJob *job)
{
	OmniRequest *request = &job->request;
	bool		selective;

	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("model must not be null"),
				 errhint("Give the uuid of the model, as it stands in the address of its page in Omni.")));
	request->model = *PG_GETARG_UUID_P(0);
	request->has_branch = !PG_ARGISNULL(1);
	if (request->has_branch)
		request->branch = *PG_GETARG_UUID_P(1);
	job->schemas = check_list(fcinfo, 3, "schemas");
	job->tables = check_list(fcinfo, 4, "tables");

	/* Omni's default is a hard refresh, which is always of the whole model */
	selective = job->schemas != NULL || job->tables != NULL;
	request->hard_named = selective || !PG_ARGISNULL(2);
	request->hard = PG_ARGISNULL(2) ? !selective : PG_GETARG_BOOL(2);
	if (request->hard && selective)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("a hard refresh cannot be limited to schemas or tables"),
				 errdetail("Omni always refreshes the whole model then."),
				 errhint("Leave out hard for a soft refresh of what is listed, or leave out schemas and tables.")));

	namestrcpy(&request->server, omni_server);
	request->role = GetUserId();
	namestrcpy(&request->requested_by, GetUserNameFromId(request->role, false));
	request->requested_at = GetCurrentTimestamp();
	if (!omni_tables_find())
		elog(ERROR, "extension \"%s\" does not exist", OMNI_EXTENSION);
}

/* The row of a job that is not even queued because omni_refresh.enabled is off. */
static Datum
disabled(const OmniJob *job)
{
	ereport(NOTICE,
			(errmsg("the request was canceled because \"omni_refresh.enabled\" is off")));
	return omni_job_form(job, "canceled", NULL);
}

/* Whether this user may make requests to the server, as far as one sees from here. */
static bool
may_request(const OmniJob *job, OmniError *error)
{
	OmniTarget	target;

	return !in_recovery(error) &&
		omni_target_find(NameStr(job->request.server), job->request.role, &target, error);
}

/* A standby has no worker, which writes. */
static bool
in_recovery(OmniError *error)
{
	if (!RecoveryInProgress())
		return false;
	omni_error_set(error, ERRCODE_READ_ONLY_SQL_TRANSACTION,
				   "cannot send requests to Omni during recovery");
	omni_error_hint(error, "Call the function on the primary.");
	return true;
}

/*
 * Has the worker carry out a job.  Sets job->id if it was written down, and *error
 * if it failed.
 */
static void
call_worker(OmniJob *job, OmniError *error)
{
	dsm_segment *segment;
	OmniCall   *call = omni_call_create(&job->request, job->schemas, job->tables, &segment);

	if (omni_call_run(segment, error))
		*error = call->error;
	job->id = call->job_id;
	omni_call_end(segment);
}

/*
 * Checks a list of names, which go to Omni as they are, separated by commas.
 * Returns it without its duplicates, or NULL if the argument is.
 */
static ArrayType *
check_list(FunctionCallInfo fcinfo, int argno, const char *name)
{
	ArrayType  *list;
	Datum	   *elements;
	bool	   *nulls;
	int			count;
	ListedName *names;
	Size		length = 0;
	int			kept = 0;

	if (PG_ARGISNULL(argno))
		return NULL;
	list = PG_GETARG_ARRAYTYPE_P(argno);
	if (ARR_NDIM(list) > 1)
		ereport(ERROR,
				(errcode(ERRCODE_ARRAY_SUBSCRIPT_ERROR),
				 errmsg("%s must be a one-dimensional array", name)));
	deconstruct_array(list, TEXTOID, -1, false, TYPALIGN_INT, &elements, &nulls, &count);
	if (count == 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s must not be an empty array", name),
				 errhint("Leave it out, or give NULL, to refresh all of them.")));

	names = palloc(count * sizeof(ListedName));
	for (int i = 0; i < count; i++)
	{
		CHECK_FOR_INTERRUPTS();
		if (nulls[i])
			ereport(ERROR,
					(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
					 errmsg("%s must not contain nulls", name),
					 errdetail("Element %d is null.", i + 1)));
		length += VARSIZE_ANY_EXHDR(DatumGetPointer(elements[i]));
		if (length > OMNI_MAX_LIST)
			ereport(ERROR,
					(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
					 errmsg("%s is too long", name),
					 errdetail("Its names may have %d bytes together.", OMNI_MAX_LIST),
					 errhint("Leave it out to refresh all of them.")));
		names[i].text = TextDatumGetCString(elements[i]);
		names[i].position = i;
		check_name(&names[i], name);
	}

	/* equal names side by side, the first of them first; then back in order */
	qsort(names, count, sizeof(ListedName), compare_names);
	for (int i = 1; i < count; i++)
	{
		if (strcmp(names[i].text, names[i - 1].text) == 0)
			nulls[names[i].position] = true;
	}
	for (int i = 0; i < count; i++)
	{
		if (!nulls[i])
			elements[kept++] = elements[i];
	}
	return construct_array(elements, kept, TEXTOID, -1, false, TYPALIGN_INT);
}

/* Raises an error if Omni could not take a name for what it is. */
static void
check_name(const ListedName *element, const char *name)
{
	if (element->text[strspn(element->text, " \t\r\n")] == '\0')
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s must not contain empty names", name),
				 errdetail("Element %d is empty.", element->position + 1)));
	if (strchr(element->text, ',') != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s must not contain names with a comma", name),
				 errdetail("Element %d is \"%s\"; Omni takes the comma for a separator.",
						   element->position + 1, element->text),
				 errhint("Give each name as an element of its own; leave out the list to refresh a name with a comma.")));
}

static int
compare_names(const void *a, const void *b)
{
	const ListedName *left = a;
	const ListedName *right = b;
	int			order = strcmp(left->text, right->text);

	return order != 0 ? order : left->position - right->position;
}
