/*-------------------------------------------------------------------------
 *
 * model.c
 *		omni_refresh_models(): the models that Omni has.
 *
 * Each page is a call to the worker, whose answer comes back as it is and is read
 * here.  No more than one page is in memory at a time.
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

#include "call.h"
#include "clock.h"
#include "compat.h"
#include "request.h"
#include "setting.h"

/* What the rate limit may keep a page waiting, on top of call_timeout, in ms */
#define RATE_PATIENCE		70000

/* Bytes of a URL that the name, the kind and the cursor may take, each, so that it is taken */
#define MAX_PARAMETER		((OMNI_MAX_PATH - 200) / 3)

/* A circle of cursors */
typedef struct Circle
{
	char	   *cursor;			/* one that was there before, or NULL */
	int			steps;			/* taken since then */
	int			limit;			/* then another one is kept instead */
} Circle;

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
static bool closes(Circle *circle, const char *cursor);
static Jsonb *ask(const char *name, const char *kind, const char *cursor);
static char *put_page(ReturnSetInfo *result, Jsonb *page);
static void put_model(ReturnSetInfo *result, JsonbContainer *model);
static void set_uuid(JsonbContainer *model, const char *name, Datum *value, bool *isnull);
static JsonbContainer *container(JsonbContainer *object, const char *name, JsonbValue *value);
pg_noreturn static void malformed(const char *what);

PG_FUNCTION_INFO_V1(omni_refresh_models);

/*
 * The models, of a name and of a kind, unless these are NULL.
 */
Datum
omni_refresh_models(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	char	   *name = text_argument(fcinfo, 0, "name");
	char	   *kind = text_argument(fcinfo, 1, "kind");
	char	   *cursor = NULL;
	Circle		circle = {.limit = 1};
	MemoryContext page_context = AllocSetContextCreate(CurrentMemoryContext, "omni_refresh page",
													   ALLOCSET_DEFAULT_SIZES);

	omni_materialize_compat(fcinfo);
	do
	{
		MemoryContext context = MemoryContextSwitchTo(page_context);
		char	   *next = put_page(result, ask(name, kind, cursor));

		MemoryContextSwitchTo(context);
		if (cursor != NULL)
			pfree(cursor);
		cursor = next != NULL ? pstrdup(next) : NULL;
		MemoryContextReset(page_context);
		if (cursor != NULL && closes(&circle, cursor))
			malformed("The pages of models go round in a circle.");
		CHECK_FOR_INTERRUPTS();
	} while (cursor != NULL);
	return (Datum) 0;
}

/* An argument, or NULL.  Raises an error if a URL could not hold two like it and a cursor. */
static char *
text_argument(FunctionCallInfo fcinfo, int argno, const char *name)
{
	char	   *value = PG_ARGISNULL(argno) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(argno));

	if (value != NULL && (strlen(value) > MAX_PARAMETER || omni_api_encoded_length(value) > MAX_PARAMETER))
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("%s is too long", name),
				 errdetail("It may have %d bytes, or fewer if they must be percent-encoded.", MAX_PARAMETER)));
	return value;
}

/*
 * Whether a cursor was there before.  Of those that were, only one is kept, and each
 * for twice as many steps as the one before: so a circle is found late, but it is
 * found, whatever its length and the way into it.
 */
static bool
closes(Circle *circle, const char *cursor)
{
	if (circle->cursor != NULL && strcmp(cursor, circle->cursor) == 0)
		return true;
	if (++circle->steps == circle->limit)
	{
		if (circle->cursor != NULL)
			pfree(circle->cursor);
		circle->cursor = pstrdup(cursor);
		circle->steps = 0;
		circle->limit *= 2;
	}
	return false;
}

/* Asks for a page.  Raises an error if there is none. */
static Jsonb *
ask(const char *name, const char *kind, const char *cursor)
{
	OmniJob		job;
	OmniError	error = {0};
	dsm_segment *segment;
	OmniCall   *call;
	Jsonb	   *page = NULL;
	char	   *why;

	omni_job_init(&job, OMNI_ORIGIN_CALL);
	if (!omni_may_request(&job, &error))
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
	if (page == NULL)
		malformed("The answer is not JSON.");
	return page;
}

/*
 * Adds the models of a page to the result.  Returns the next page's cursor, or NULL,
 * also if the page says that it is the last one and has a cursor.
 */
static char *
put_page(ReturnSetInfo *result, Jsonb *page)
{
	JsonbValue	value;
	JsonbContainer *info = container(&page->root, "pageInfo", &value);
	JsonbContainer *records = container(&page->root, "records", &value);
	bool		says;			/* whether there is a next page */
	char	   *next;

	if (info == NULL || records == NULL || !JsonContainerIsArray(records))
		malformed("The answer is JSON, but not of the shape that a page of models has.");
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
	if (next != NULL && (strlen(next) > MAX_PARAMETER || omni_api_encoded_length(next) > MAX_PARAMETER))
		malformed("A page of models names the next by more than a URL can hold.");
	if (says && value.val.boolean && next == NULL)
		malformed("A page of models is not the last one, and does not name the next.");
	return says && !value.val.boolean ? NULL : next;
}

/* Adds a model to the result, unless it was deleted in Omni. */
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
			malformed("The time at which a model was updated is none.");
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
		malformed("An id of a model in the answer is no uuid.");
}

/* An object or array in a JSON object, and as a value; NULL when there is none. */
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
			 errmsg("server \"%s\" did not answer as Omni does", omni_server),
			 errdetail_internal("%s", what),
			 errhint("Check that the server's \"base_url\" is the login host of an Omni instance, and what proxies are in between.")));
}
