/*-------------------------------------------------------------------------
 *
 * refresh.c
 *		The SQL-callable functions that request a refresh, the reset of a cache or a dbt sync.
 *
 * They check all arguments in the session of the requester, before anything is sent to
 * Omni or written to a table, so that an error names what the requester wrote.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "base/setting.h"
#include "base/status.h"
#include "shared/call.h"
#include "sql/once.h"
#include "sql/repeat.h"
#include "sql/request.h"
#include "store/job.h"

/* Limit in bytes for a list with its duplicates, which are removed before the URL is measured */
#define MAX_NAMES			1000000

/* A name in the list of schemas or of tables */
typedef struct ListedName
{
	char	   *text;
	int			position;		/* in the list, from 0 */
} ListedName;

/* Stores the arguments of a function in a job */
typedef void (*ReadArguments) (FunctionCallInfo fcinfo, OmniJob *job);

static Datum queue(FunctionCallInfo fcinfo, ReadArguments read);
static Datum call(FunctionCallInfo fcinfo, ReadArguments read);
static void read_refresh(FunctionCallInfo fcinfo, OmniJob *job);
static void read_reset(FunctionCallInfo fcinfo, OmniJob *job);
static void read_dbt_sync(FunctionCallInfo fcinfo, OmniJob *job);
static void read_model(FunctionCallInfo fcinfo, OmniRequest *request);
static void read_branch(FunctionCallInfo fcinfo, OmniRequest *request);
static void read_policy(FunctionCallInfo fcinfo, OmniRequest *request);
static void call_worker(OmniJob *job, OmniError *error);
static ArrayType *check_list(FunctionCallInfo fcinfo, int argno, const char *name);
static void check_name(const ListedName *element, const char *name);
static int	compare_names(const void *a, const void *b);

PG_FUNCTION_INFO_V1(omni_refresh);
PG_FUNCTION_INFO_V1(omni_refresh_on_commit);
PG_FUNCTION_INFO_V1(omni_refresh_cache);
PG_FUNCTION_INFO_V1(omni_refresh_cache_on_commit);
PG_FUNCTION_INFO_V1(omni_refresh_dbt_sync);
PG_FUNCTION_INFO_V1(omni_refresh_dbt_sync_on_commit);

/*
 * Request a refresh now, wait for Omni's answer and return the job's row.
 */
Datum
omni_refresh(PG_FUNCTION_ARGS)
{
	PG_RETURN_DATUM(call(fcinfo, read_refresh));
}

/*
 * Queue a refresh, to be sent once this transaction has committed, and return the job's
 * row, which is part of the transaction.
 */
Datum
omni_refresh_on_commit(PG_FUNCTION_ARGS)
{
	PG_RETURN_DATUM(queue(fcinfo, read_refresh));
}

/* Request the reset of a cache policy now, as omni_refresh() does a refresh. */
Datum
omni_refresh_cache(PG_FUNCTION_ARGS)
{
	PG_RETURN_DATUM(call(fcinfo, read_reset));
}

/* Queue the reset of a cache policy, as omni_refresh_on_commit() does a refresh. */
Datum
omni_refresh_cache_on_commit(PG_FUNCTION_ARGS)
{
	PG_RETURN_DATUM(queue(fcinfo, read_reset));
}

/* Request a dbt sync now, as omni_refresh() does a refresh. */
Datum
omni_refresh_dbt_sync(PG_FUNCTION_ARGS)
{
	PG_RETURN_DATUM(call(fcinfo, read_dbt_sync));
}

/* Queue a dbt sync, as omni_refresh_on_commit() does a refresh. */
Datum
omni_refresh_dbt_sync_on_commit(PG_FUNCTION_ARGS)
{
	PG_RETURN_DATUM(queue(fcinfo, read_dbt_sync));
}

/* Add the job that the arguments ask for to the queue, and return its row. */
static Datum
queue(FunctionCallInfo fcinfo, ReadArguments read)
{
	OmniJob		job;

	omni_job_init(&job, OMNI_ORIGIN_ON_COMMIT);
	read(fcinfo, &job);
	return omni_queue_job(&job);
}

/*
 * Hand the job that the arguments ask for over to the worker, wait for its end and return
 * its row.
 */
static Datum
call(FunctionCallInfo fcinfo, ReadArguments read)
{
	OmniJob		job;
	const OmniJobKind *kind;
	const char *name;
	OmniError	error = {0};
	bool		may;

	omni_job_init(&job, OMNI_ORIGIN_CALL);
	read(fcinfo, &job);
	kind = &omni_job_kinds[job.request.kind];
	name = kind->function;
	may = omni_job_complete(&job, &error);

	if (!omni_enabled)
		return omni_job_form_disabled(&job);
	if (omni_call_is_repeated(fcinfo->flinfo, &job.request))
		ereport(WARNING,
				(errmsg("this statement calls %s() again with the same arguments", name),
				 errdetail("Each call sends a request of its own."),
				 errhint("Write SELECT * FROM %s(...): PostgreSQL expands (%s(...)).* into a call for each column.",
						 name, name)));
	if (TransactionIdIsValid(GetTopTransactionIdIfAny()))
		ereport(WARNING,
				(errmsg("this transaction has made changes that Omni cannot see yet"),
				 errhint("Commit before you call %s(), or call %s_on_commit().", name, name)));

	if (may && kind->holds_resets)
		omni_once_forget_resets(&job.request);
	if (may)
		call_worker(&job, &error);
	if (error.sqlstate != 0)
		omni_error_report(&error, omni_on_failure == OMNI_ON_FAILURE_ERROR ? ERROR : WARNING);
	if (job.id == 0)
		return omni_job_form(&job, OMNI_NAME_FAILED, omni_error_text(&error));

	omni_tables_require();
	return omni_job_read(job.id);
}

/* Store the first argument, the model. */
static void
read_model(FunctionCallInfo fcinfo, OmniRequest *request)
{
	request->has_model = !PG_ARGISNULL(0);
	if (request->has_model)
		request->model = *PG_GETARG_UUID_P(0);
}

/* Store the second argument, the branch. */
static void
read_branch(FunctionCallInfo fcinfo, OmniRequest *request)
{
	request->has_branch = !PG_ARGISNULL(1);
	if (request->has_branch)
		request->branch = *PG_GETARG_UUID_P(1);
}

/* Store the two arguments of a function that requests a dbt sync. */
static void
read_dbt_sync(FunctionCallInfo fcinfo, OmniJob *job)
{
	job->request.kind = OMNI_KIND_DBT;
	read_model(fcinfo, &job->request);
	read_branch(fcinfo, &job->request);
}

/* Check and store the three arguments of a function that resets a cache policy. */
static void
read_reset(FunctionCallInfo fcinfo, OmniJob *job)
{
	OmniRequest *request = &job->request;

	request->kind = OMNI_KIND_CACHE;
	read_model(fcinfo, request);
	read_policy(fcinfo, request);
	request->has_reset_at = !PG_ARGISNULL(2);
	if (request->has_reset_at)
	{
		request->reset_at = PG_GETARG_TIMESTAMPTZ(2);
		if (TIMESTAMP_NOT_FINITE(request->reset_at) || request->reset_at > GetCurrentTimestamp())
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("reset_at must not be in the future"),
					 errhint("Leave it out to reset the cache as of the moment of the request.")));
	}
}

/* Check and store the second argument of such a function, the policy. */
static void
read_policy(FunctionCallInfo fcinfo, OmniRequest *request)
{
	char	   *policy;

	if (PG_ARGISNULL(1))
		return;
	policy = text_to_cstring(PG_GETARG_TEXT_PP(1));
	if (strlen(policy) >= OMNI_MAX_POLICY)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("policy is too long"),
				 errdetail("It may have %d bytes.", OMNI_MAX_POLICY - 1)));
	if (!omni_api_is_policy(policy))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("\"%s\" is not the name of a cache policy", policy)));
	strcpy(request->policy, policy);
}

/* Check and store the five arguments of a function that requests a refresh. */
static void
read_refresh(FunctionCallInfo fcinfo, OmniJob *job)
{
	OmniRequest *request = &job->request;
	bool		selective;

	read_model(fcinfo, request);
	read_branch(fcinfo, request);
	job->request.schemas = check_list(fcinfo, 3, "schemas");
	job->request.tables = check_list(fcinfo, 4, "tables");

	/* Omni's default is a hard refresh, which is always of the whole model */
	selective = job->request.schemas != NULL || job->request.tables != NULL;
	request->hard_named = selective || !PG_ARGISNULL(2);
	request->hard = PG_ARGISNULL(2) ? !selective : PG_GETARG_BOOL(2);
	if (request->hard && selective)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("a hard refresh cannot be limited to schemas or tables"),
				 errdetail("Omni always refreshes the whole model then."),
				 errhint("Leave out hard for a soft refresh of what is listed, or leave out schemas and tables.")));
	omni_request_check_length(request);
}

/*
 * Hand a job over to the worker and wait for its end.  Sets job->id if the worker has
 * inserted a row, and *error if the job failed.
 */
static void
call_worker(OmniJob *job, OmniError *error)
{
	dsm_segment *segment;
	OmniCall   *call = omni_call_create(&job->request, NULL, &segment);

	if (omni_call_run(segment, error))
		*error = call->error;
	job->id = call->job_id;
	omni_call_end(segment);
}

/*
 * Check a list of names, which are sent to Omni unchanged, separated by commas.
 * Returns the list without duplicates, or NULL if the argument is null.
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
		if (length > MAX_NAMES)
			ereport(ERROR,
					(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
					 errmsg("%s is too long", name),
					 errdetail("Its names, with their duplicates, may have %d bytes together.", MAX_NAMES),
					 errhint(OMNI_TOO_LONG_HINT)));
		names[i].text = TextDatumGetCString(elements[i]);
		names[i].position = i;
		check_name(&names[i], name);
	}

	/*
	 * sort to find duplicates; keep the first of each name, in the order of
	 * the list
	 */
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

/* Raise an error if Omni could not read a name in a list correctly. */
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
