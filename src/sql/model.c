/*-------------------------------------------------------------------------
 *
 * model.c
 *		omni_refresh_models(): list the models of the Omni instance.
 *
 * Each page is a call to the worker, which returns Omni's answer unparsed.  Parse it in
 * this session, with no more than one page in memory at a time.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "funcapi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "utils/tuplestore.h"

#include "base/clock.h"
#include "base/compat.h"
#include "base/setting.h"
#include "shared/call.h"
#include "sql/request.h"

/* How long the rate limit may delay a page, in addition to call_timeout, in ms */
#define RATE_PATIENCE		70000

/* Limit in bytes for each of name, kind and cursor in a URL, so that all three fit */
#define MAX_PARAMETER		((OMNI_MAX_PATH - 200) / 3)

/* The columns of the result */
enum
{
	ID,
	NAME,
	KIND,
	CONNECTION_ID,
	BASE_MODEL_ID,
	BRANCHES,
	UPDATED_AT,
	COLUMNS
};

static char *text_argument(FunctionCallInfo fcinfo, int argno, const char *name);
static bool is_known(const List *cursors, const char *cursor);
static Jsonb *ask(const char *name, const char *kind, const char *cursor);
static char *put_page(ReturnSetInfo *result, Jsonb *page);
static void put_model(ReturnSetInfo *result, JsonbContainer *model);
static void set_uuid(JsonbContainer *model, const char *name, Datum *value, bool *isnull);
static JsonbContainer *container(JsonbContainer *object, const char *name, JsonbValue *value);
pg_noreturn static void malformed(const char *what);

PG_FUNCTION_INFO_V1(omni_refresh_models);

/*
 * Return the models; with a name or a kind, only those that have it.
 */
Datum
omni_refresh_models(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	char	   *name = text_argument(fcinfo, 0, "name");
	char	   *kind = text_argument(fcinfo, 1, "kind");
	char	   *cursor = NULL;
	List	   *cursors = NIL;	/* of all pages so far */
	MemoryContext page_context = AllocSetContextCreate(CurrentMemoryContext, "omni_refresh page",
													   ALLOCSET_DEFAULT_SIZES);

	omni_materialize_compat(fcinfo);
	do
	{
		MemoryContext context = MemoryContextSwitchTo(page_context);
		char	   *next = put_page(result, ask(name, kind, cursor));

		MemoryContextSwitchTo(context);
		cursor = next != NULL ? pstrdup(next) : NULL;
		MemoryContextReset(page_context);
		if (cursor != NULL && is_known(cursors, cursor))
			malformed("The cursors of the pages form a cycle.");
		cursors = lappend(cursors, cursor);
		CHECK_FOR_INTERRUPTS();
	} while (cursor != NULL);
	return (Datum) 0;
}

/* Return a text argument, or NULL.  Raises an error if it is too long for a URL. */
static char *
text_argument(FunctionCallInfo fcinfo, int argno, const char *name)
{
	char	   *value = PG_ARGISNULL(argno) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(argno));

	if (value != NULL &&
		(strlen(value) > MAX_PARAMETER || omni_api_encoded_length(value) > MAX_PARAMETER))
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("%s is too long", name),
				 errdetail("It may have %d bytes, or fewer if they must be percent-encoded.", MAX_PARAMETER)));
	return value;
}

static bool
is_known(const List *cursors, const char *cursor)
{
	ListCell   *cell;

	foreach(cell, cursors)
	{
		if (strcmp(lfirst(cell), cursor) == 0)
			return true;
	}
	return false;
}

/* Request a page and return it.  Raises an error if that fails. */
static Jsonb *
ask(const char *name, const char *kind, const char *cursor)
{
	OmniJob		job;
	OmniTarget	target;
	OmniError	error = {0};
	dsm_segment *segment;
	OmniCall   *call;
	Jsonb	   *page = NULL;
	char	   *why = NULL;

	omni_job_init(&job, OMNI_ORIGIN_CALL);
	if (!omni_may_request(&job, &target, &error))
		omni_error_report(&error, ERROR);
	call = omni_call_create(&job.request, omni_api_models_lookup(name, kind, cursor), &segment);
	if (cursor != NULL)
		call->deadline += OMNI_MS(RATE_PATIENCE);
	if (omni_call_run(segment, &error))
		error = call->error;
	if (error.sqlstate == 0)
		page = omni_api_json((char *) call + call->answer, call->length, &why);
	omni_call_end(segment);

	if (error.sqlstate != 0)
		omni_error_report(&error, ERROR);
	if (page == NULL || why != NULL)
		malformed("The answer is not JSON, or has values that cannot be read.");
	return page;
}

/*
 * Add the models of a page to the result.  Returns the next page's cursor, or NULL if
 * the page says that it is the last one, even if it has a cursor.
 */
static char *
put_page(ReturnSetInfo *result, Jsonb *page)
{
	JsonbValue	value;
	JsonbContainer *info = container(&page->root, "pageInfo", &value);
	JsonbContainer *records = container(&page->root, "records", &value);
	bool		says;			/* the page has a flag for a next page */
	char	   *next;

	if (info == NULL || records == NULL || !JsonContainerIsArray(records))
		malformed("The answer is JSON, but its structure is not that of a page of models.");
	for (uint32 i = 0; i < JsonContainerSize(records); i++)
	{
		JsonbValue *model = getIthJsonbValueFromContainer(records, i);

		if (model->type != jbvBinary || !JsonContainerIsObject(model->val.binary.data))
			malformed("A model in the answer is not a JSON object.");
		put_model(result, model->val.binary.data);
	}

	says = JsonContainerIsObject(info) &&
		getKeyJsonValueFromContainer(info, "hasNextPage", strlen("hasNextPage"), &value) != NULL &&
		value.type == jbvBool;
	next = omni_api_member(info, "nextCursor");
	if (next != NULL &&
		(strlen(next) > MAX_PARAMETER || omni_api_encoded_length(next) > MAX_PARAMETER))
		malformed("The cursor for the next page is too long for a URL.");
	if (says && value.val.boolean && next == NULL)
		malformed("The page is not the last one, but has no cursor for the next page.");
	return says && !value.val.boolean ? NULL : next;
}

/* Add a model to the result, unless it was deleted in Omni. */
static void
put_model(ReturnSetInfo *result, JsonbContainer *model)
{
	Datum		values[COLUMNS] = {0};
	bool		isnull[COLUMNS];
	JsonbValue	branches;
	char	   *text;

	if (omni_api_member(model, "deletedAt") != NULL)
		return;
	memset(isnull, true, sizeof(isnull));
	set_uuid(model, "id", &values[ID], &isnull[ID]);
	set_uuid(model, "connectionId", &values[CONNECTION_ID], &isnull[CONNECTION_ID]);
	set_uuid(model, "baseModelId", &values[BASE_MODEL_ID], &isnull[BASE_MODEL_ID]);
	if ((text = omni_api_member(model, "name")) != NULL)
	{
		values[NAME] = CStringGetTextDatum(text);
		isnull[NAME] = false;
	}
	if ((text = omni_api_member(model, "modelKind")) != NULL)
	{
		values[KIND] = CStringGetTextDatum(text);
		isnull[KIND] = false;
	}
	if (container(model, "branches", &branches) != NULL)
	{
		values[BRANCHES] = JsonbPGetDatum(JsonbValueToJsonb(&branches));
		isnull[BRANCHES] = false;
	}
	if ((text = omni_api_member(model, "updatedAt")) != NULL)
	{
		if (!omni_api_time(text, &values[UPDATED_AT]))
			malformed("The update time of a model is not a valid timestamp.");
		isnull[UPDATED_AT] = false;
	}
	if (isnull[ID])
		malformed("A model in the answer has no id.");
	tuplestore_putvalues(result->setResult, result->setDesc, values, isnull);
}

static void
set_uuid(JsonbContainer *model, const char *name, Datum *value, bool *isnull)
{
	char	   *text = omni_api_member(model, name);

	*isnull = text == NULL;
	if (text != NULL && !omni_api_uuid(text, value))
		malformed("An id of a model in the answer is not a valid UUID.");
}

/* Return the object or array that is a member of a JSON object, or NULL; set *value to it. */
static JsonbContainer *
container(JsonbContainer *object, const char *name, JsonbValue *value)
{
	if (!JsonContainerIsObject(object) ||
		getKeyJsonValueFromContainer(object, name, strlen(name), value) == NULL ||
		value->type != jbvBinary)
		return NULL;
	return value->val.binary.data;
}

static void
malformed(const char *what)
{
	ereport(ERROR,
			(errcode(ERRCODE_PROTOCOL_VIOLATION),
			 errmsg("unexpected response from server \"%s\"", omni_server),
			 errdetail_internal("%s", what),
			 errhint("Check that the server's \"base_url\" is the login host of an Omni instance, and what proxies are in between.")));
}
