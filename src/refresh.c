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
#include "executor/spi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "omni_refresh.h"

/*
 * How long the names of a list may be together, in bytes.  Servers refuse longer
 * URLs than this, and libcurl longer ones than 8 MB.
 */
#define MAX_LIST			500000

/* A name in the list of schemas or of tables */
typedef struct ListedName
{
	char	   *text;
	int			position;		/* in the list, from 0 */
} ListedName;

static void call_worker(const OmniRequest *request, ArrayType *schemas, ArrayType *tables,
						int64 *job_id, OmniError *error);
static void fill_request(FunctionCallInfo fcinfo, OmniRequest *request,
						 ArrayType **schemas, ArrayType **tables);
static ArrayType *check_list(FunctionCallInfo fcinfo, int argno, const char *name);
static void check_name(const ListedName *element, const char *name);
static int	compare_names(const void *a, const void *b);

PG_FUNCTION_INFO_V1(omni_refresh);

/*
 * Asks for a refresh now, waits for Omni's answer and returns the job's row.
 */
Datum
omni_refresh(PG_FUNCTION_ARGS)
{
	OmniRequest request;
	ArrayType  *schemas;
	ArrayType  *tables;
	OmniError	error = {0};
	int64		job_id = 0;
	Datum		row;

	fill_request(fcinfo, &request, &schemas, &tables);
	if (!omni_tables_find())
		elog(ERROR, "extension \"%s\" does not exist", OMNI_EXTENSION);
	if (!omni_enabled)
	{
		ereport(NOTICE,
				(errmsg("the request was canceled because \"omni_refresh.enabled\" is off")));
		PG_RETURN_DATUM(omni_job_form(&request, schemas, tables, "canceled", NULL));
	}
	if (TransactionIdIsValid(GetTopTransactionIdIfAny()))
		ereport(WARNING,
				(errmsg("this transaction has made changes that Omni cannot see yet"),
				 errhint("Commit before you call omni_refresh().")));

	call_worker(&request, schemas, tables, &job_id, &error);
	if (error.sqlstate != 0)
		omni_error_report(&error, omni_on_failure == OMNI_ON_FAILURE_ERROR ? ERROR : WARNING);
	if (job_id == 0)
		PG_RETURN_DATUM(omni_job_form(&request, schemas, tables, "failed", omni_error_text(&error)));

	if (!omni_tables_find())
		elog(ERROR, "extension \"%s\" was dropped meanwhile", OMNI_EXTENSION);
	SPI_connect();
	row = omni_job_read(job_id);
	SPI_finish();
	PG_RETURN_DATUM(row);
}

/*
 * Has the worker carry out a request.  Sets *job_id if there is a job, and *error
 * if the request failed.
 */
static void
call_worker(const OmniRequest *request, ArrayType *schemas, ArrayType *tables,
			int64 *job_id, OmniError *error)
{
	OmniTarget	target;
	dsm_segment *segment;
	OmniCall   *call;

	if (RecoveryInProgress())
	{
		omni_error_set(error, ERRCODE_READ_ONLY_SQL_TRANSACTION,
					   "cannot send requests to Omni during recovery");
		omni_error_hint(error, "Call the function on the primary.");
		return;
	}
	if (!omni_target_find(NameStr(request->server), request->role, &target, error))
		return;

	call = omni_call_create(request, schemas, tables, &segment);
	if (omni_call_run(segment, error))
		*error = call->error;
	*job_id = call->job_id;
	omni_call_end(segment);
}

/*
 * Checks the five arguments that all functions that ask for a refresh have, and
 * makes a request of them.
 */
static void
fill_request(FunctionCallInfo fcinfo, OmniRequest *request,
			 ArrayType **schemas, ArrayType **tables)
{
	bool		selective;

	memset(request, 0, sizeof(*request));
	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("model must not be null"),
				 errhint("Give the uuid of the model, as it stands in the address of its page in Omni.")));
	request->model = *PG_GETARG_UUID_P(0);
	request->has_branch = !PG_ARGISNULL(1);
	if (request->has_branch)
		request->branch = *PG_GETARG_UUID_P(1);
	*schemas = check_list(fcinfo, 3, "schemas");
	*tables = check_list(fcinfo, 4, "tables");

	/* Omni's default is a hard refresh, which is always of the whole model */
	selective = *schemas != NULL || *tables != NULL;
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
		if (length > MAX_LIST)
			ereport(ERROR,
					(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
					 errmsg("%s is too long", name),
					 errdetail("Its names may have %d bytes together.", MAX_LIST),
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
