/*-------------------------------------------------------------------------
 *
 * answer.c
 *		A libFuzzer target for all that reads answers, in a PostgreSQL backend.
 *
 * test/fuzz/run builds it together with the extension's files and calls
 * omni_fuzz() with libFuzzer's arguments.
 *
 * An input is an answer: lines that set fields, "status 409", "failed 1" and the
 * like, up to an empty one; then the body.  "kind" is of the request and "encoding"
 * of the database.  An answer must not raise an error, and what is told of it must
 * be clean and without the key.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/tupdesc.h"
#include "catalog/pg_type.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/formatting.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"

/* its other half, which reads the pages of models, is static */
#define omni_refresh_models omni_fuzz_models
#include "../../src/sql/model.c"

#define KEY			"omni_osk_q7/Zk+B%41&x-\"3"

/* The kinds of requests */
enum
{
	REFRESH,
	RESET,
	FOLLOW,
	MODELS,
	PROBE,
	KINDS
};

/* What an input says of its answer besides OmniAnswer's fields */
typedef struct Input
{
	OmniAnswer	answer;
	int			kind;
	int			encoding;
} Input;

static MemoryContext run_context;

extern int	LLVMFuzzerRunDriver(int *argc, char ***argv, int (*test) (const uint8 *data, size_t size));

static int	test(const uint8 *data, size_t size);
static void read_input(const uint8 *data, size_t size, Input *input);
static char *exact(const char *text, size_t length);
static void check(int kind, const OmniAnswer *answer);
static void check_outcome(const OmniOutcome *outcome, bool may_be_empty);
static void check_text(const char *text);
static bool spells_key(const char *text, int depth);
static char *undone(const char *text, int escape);
static void check_models(const OmniAnswer *answer);

#define CHECK(condition) \
	do { \
		if (!(condition)) \
		{ \
			fprintf(stderr, "failed: %s, line %d\n", #condition, __LINE__); \
			abort(); \
		} \
	} while (0)

PG_FUNCTION_INFO_V1(omni_fuzz);

/* Runs libFuzzer with the arguments in a text[]; does not return. */
Datum
omni_fuzz(PG_FUNCTION_ARGS)
{
	Datum	   *elements;
	int			argc;
	char	  **argv;

	deconstruct_array(PG_GETARG_ARRAYTYPE_P(0), TEXTOID, -1, false, TYPALIGN_INT, &elements, NULL, &argc);
	argv = palloc0((argc + 1) * sizeof(char *));
	for (int i = 0; i < argc; i++)
		argv[i] = TextDatumGetCString(elements[i]);
	run_context = AllocSetContextCreate(TopMemoryContext, "omni_fuzz", ALLOCSET_DEFAULT_SIZES);
	PG_RETURN_INT32(LLVMFuzzerRunDriver(&argc, &argv, test));
}

static int
test(const uint8 *data, size_t size)
{
	MemoryContext context = MemoryContextSwitchTo(run_context);
	Input		input;

	read_input(data, size, &input);
	SetDatabaseEncoding(input.encoding);
	PG_TRY();
	{
		check(input.kind, &input.answer);
	}
	PG_CATCH();
	{
		EmitErrorReport();
		CHECK(!"an error was raised");
	}
	PG_END_TRY();
	SetDatabaseEncoding(PG_UTF8);

	free((char *) input.answer.body);
	free((char *) input.answer.reason);
	free((char *) input.answer.redirect_url);
	MemoryContextSwitchTo(context);
	MemoryContextReset(run_context);
	return 0;
}

/* Makes an answer as http.c does: what has no length ends with a NUL. */
static void
read_input(const uint8 *data, size_t size, Input *input)
{
	static const int encodings[] = {PG_UTF8, PG_LATIN1, PG_SQL_ASCII, PG_EUC_JP};
	const char *at = (const char *) data;
	const char *end = at + size;
	OmniAnswer *answer = &input->answer;

	memset(input, 0, sizeof(*input));
	input->encoding = PG_UTF8;
	answer->status = 200;
	while (at < end)
	{
		const char *newline = memchr(at, '\n', end - at);
		const char *line_end = newline != NULL ? newline : end;
		char	   *line = pnstrdup(at, line_end - at);
		char	   *value = strchr(line, ' ');
		int			number;

		at = newline != NULL ? newline + 1 : end;
		if (line[0] == '\0' || value == NULL)
			break;
		*value++ = '\0';
		number = (int) strtol(value, NULL, 10);
		if (strcmp(line, "status") == 0)
			answer->status = number;
		else if (strcmp(line, "failed") == 0)
			answer->failed = number != 0;
		else if (strcmp(line, "phase") == 0)
			answer->phase = (OmniPhase) ((unsigned int) number % (OMNI_PHASE_READ + 1));
		else if (strcmp(line, "timed_out") == 0)
			answer->timed_out = number != 0;
		else if (strcmp(line, "retryable") == 0)
			answer->retryable = number != 0;
		else if (strcmp(line, "sent") == 0)
			answer->sent = number != 0;
		else if (strcmp(line, "too_large") == 0)
			answer->too_large = number != 0;
		else if (strcmp(line, "retry_after") == 0)
			answer->retry_after = number;
		else if (strcmp(line, "elapsed") == 0)
			answer->elapsed = number;
		else if (strcmp(line, "kind") == 0)
			input->kind = (unsigned int) number % KINDS;
		else if (strcmp(line, "encoding") == 0)
			input->encoding = encodings[(unsigned int) number % lengthof(encodings)];
		else if (strcmp(line, "reason") == 0 && answer->reason == NULL)
			answer->reason = exact(value, strlen(value) + 1);
		else if (strcmp(line, "redirect_url") == 0 && answer->redirect_url == NULL)
			answer->redirect_url = exact(value, strlen(value) + 1);
	}
	if (answer->reason == NULL)
		answer->reason = exact("", 1);
	answer->length = end - at;
	if (answer->length > 0)
		answer->body = exact(at, answer->length);
}

/* A copy of bytes by malloc(), so that AddressSanitizer knows where they end. */
static char *
exact(const char *text, size_t length)
{
	return memcpy(malloc(length), text, length);
}

/* Reads the answer as one to a kind of request. */
static void
check(int kind, const OmniAnswer *answer)
{
	OmniRequest request = {.kind = kind == RESET ? OMNI_KIND_CACHE : OMNI_KIND_SCHEMA};
	OmniOutcome outcome;
	bool		ended = true;

	namestrcpy(&request.server, "omni");
	strcpy(request.policy, "nightly");
	memset(&outcome, 0x7f, sizeof(outcome));
	if (kind == FOLLOW)
		ended = omni_api_poll_outcome(&request, KEY, answer, &outcome);
	else if (kind == MODELS)
		omni_api_lookup_outcome(&request, KEY, answer, &outcome);
	else if (kind == PROBE)
		omni_api_probe_outcome(&request, KEY, answer, &outcome);
	else
		omni_api_job_outcome(&request, KEY, answer, &outcome);
	check_outcome(&outcome, !ended);
	if (kind == MODELS && outcome.error.sqlstate == 0)
		check_models(answer);
}

/* That of a question about a job that goes on may have neither status nor error. */
static void
check_outcome(const OmniOutcome *outcome, bool may_be_empty)
{
	static const char *const ends[] = {"completed", "accepted", "failed", "unknown"};
	const char *status = outcome->status;
	bool		known = status == NULL && may_be_empty;

	for (int i = 0; i < lengthof(ends); i++)
		known |= status != NULL && strcmp(status, ends[i]) == 0;
	CHECK(known);
	if (status != NULL)
	{
		bool		good = strcmp(status, "completed") == 0 || strcmp(status, "accepted") == 0;

		CHECK(good == (outcome->error.sqlstate == 0));
	}
	else
		CHECK(outcome->error.sqlstate == 0);
	CHECK(outcome->retry_after >= 0);
	CHECK(outcome->error.sqlstate == 0 || outcome->error.message[0] != '\0');
	CHECK(!outcome->has_job_id || outcome->http_status == 200);

	CHECK(memchr(outcome->error.message, '\0', sizeof(outcome->error.message)) != NULL);
	CHECK(memchr(outcome->error.detail, '\0', sizeof(outcome->error.detail)) != NULL);
	CHECK(memchr(outcome->error.hint, '\0', sizeof(outcome->error.hint)) != NULL);
	check_text(outcome->error.message);
	check_text(outcome->error.detail);
	check_text(outcome->error.hint);
	CHECK(!spells_key(outcome->error.detail, 2));
}

/* Fit for a terminal and a column of this database */
static void
check_text(const char *text)
{
	CHECK(pg_verify_mbstr(GetDatabaseEncoding(), text, strlen(text), true));
	for (const unsigned char *c = (const unsigned char *) text; *c != '\0'; c++)
	{
		CHECK(*c >= ' ' && *c != 0x7f);
		if (GetDatabaseEncoding() != PG_UTF8)
			CHECK(*c < 0x80);
		CHECK(!(c[0] == 0xc2 && (c[1] < 0xa0 || c[1] == 0xad)));
		CHECK(!(c[0] == 0xe2 && c[1] == 0x80 && ((c[2] >= 0x8b && c[2] <= 0x8f) || (c[2] >= 0xa8 && c[2] <= 0xae))));
		CHECK(!(c[0] == 0xe2 && c[1] == 0x81 && c[2] >= 0xa0 && c[2] <= 0xaf));
		CHECK(!(c[0] == 0xef && c[1] == 0xbb && c[2] == 0xbf));
		CHECK(!(c[0] == 0xf3 && c[1] == 0xa0 && c[2] <= 0x81));
	}
}

/*
 * Whether the key is in a text, or in what it spells.  This shares nothing with
 * api.c, so that a fault there is no fault here.
 */
static bool
spells_key(const char *text, int depth)
{
	static char *key = NULL;

	if (key == NULL)
		key = MemoryContextStrdup(TopMemoryContext, asc_tolower(KEY, strlen(KEY)));
	if (strstr(asc_tolower(text, strlen(text)), key) != NULL)
		return true;
	if (depth == 0)
		return false;
	for (int escape = 0; escape < 3; escape++)
	{
		char	   *plain;

		if (strchr(text, "\\%&"[escape]) == NULL)
			continue;
		plain = undone(text, escape);
		if (strlen(plain) < strlen(text) && spells_key(plain, depth - 1))
			return true;
	}
	return false;
}

/* Undoes one kind of escapes: JSON's, URLs' or HTML's. */
static char *
undone(const char *text, int escape)
{
	static const char *const entities[] = {
		"&amp;", "&", "&lt;", "<", "&gt;", ">", "&quot;", "\"", "&apos;", "'", "&sol;", "/",
		"&plus;", "+", "&percnt;", "%", "&lowbar;", "_"
	};
	static const char hex[] = "0123456789abcdefABCDEF";
	char	   *result = palloc(strlen(text) + 1);
	char	   *out = result;

	while (*text != '\0')
	{
		unsigned long code = *(const unsigned char *) text;
		int			used = 1;
		int			length;

		if (escape == 0 && text[0] == '\\' && text[1] == 'u' && strspn(text + 2, hex) >= 4)
		{
			code = strtoul(pnstrdup(text + 2, 4), NULL, 16);
			used = 6;
		}
		else if (escape == 0 && text[0] == '\\' && text[1] != '\0')
		{
			code = (unsigned char) text[1];
			used = 2;
		}
		else if (escape == 1 && text[0] == '%' && strspn(text + 1, hex) >= 2)
		{
			code = strtoul(pnstrdup(text + 1, 2), NULL, 16);
			used = 3;
		}
		else if (escape == 2 && pg_strncasecmp(text, "&#x", 3) == 0 &&
				 (length = strspn(text + 3, hex)) > 0 && text[3 + length] == ';')
		{
			code = strtoul(text + 3, NULL, 16);
			used = length + 4;
		}
		else if (escape == 2 && strncmp(text, "&#", 2) == 0 &&
				 (length = strspn(text + 2, "0123456789")) > 0 && text[2 + length] == ';')
		{
			code = strtoul(text + 2, NULL, 10);
			used = length + 3;
		}
		else if (escape == 2)
		{
			for (int i = 0; i < lengthof(entities); i += 2)
			{
				if (pg_strncasecmp(text, entities[i], strlen(entities[i])) == 0)
				{
					code = entities[i + 1][0];
					used = strlen(entities[i]);
				}
			}
		}
		*out++ = code > 0 && code <= 0xff ? code : 1;
		text += used;
	}
	*out = '\0';
	return result;
}

/* Reads the answer as a page of models, which may only be of no such shape. */
static void
check_models(const OmniAnswer *answer)
{
	static TupleDesc desc = NULL;
	MemoryContext context = CurrentMemoryContext;
	ReturnSetInfo result = {0};
	char	   *why = NULL;
	Jsonb	   *page = omni_api_json(answer->body, answer->length, &why);

	if (page == NULL)
	{
		if (why != NULL)
			check_text(why);
		return;
	}
	if (desc == NULL)
	{
		static const Oid types[] = {UUIDOID, TEXTOID, TEXTOID, UUIDOID, UUIDOID, JSONBOID, TIMESTAMPTZOID};

		MemoryContextSwitchTo(TopMemoryContext);
		desc = CreateTemplateTupleDesc(COLUMNS);
		for (int i = 0; i < COLUMNS; i++)
			TupleDescInitEntry(desc, i + 1, "column", types[i], -1, 0);
		MemoryContextSwitchTo(context);
	}
	result.setDesc = desc;
	result.setResult = tuplestore_begin_heap(false, false, 1024);
	PG_TRY();
	{
		(void) put_page(&result, page);
	}
	PG_CATCH();
	{
		if (geterrcode() != ERRCODE_PROTOCOL_VIOLATION)
			PG_RE_THROW();
		MemoryContextSwitchTo(context);
		FlushErrorState();
	}
	PG_END_TRY();
}
