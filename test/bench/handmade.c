/*
 * A yardstick of the benchmark: what a user would write, a function that makes a request in the
 * backend, over a connection that it keeps open for the next one, and returns the answer.  The
 * statement that calls it inserts the answer into a table.
 *
 * It is short, and not fit for use: a request that hangs cannot be canceled.
 */
#include "postgres.h"

#include "fmgr.h"
#include "utils/builtins.h"

#include "request.h"

PG_MODULE_MAGIC;

typedef struct Answer
{
	char		data[4096];
	size_t		length;
} Answer;

PG_FUNCTION_INFO_V1(handmade_request);

static size_t
keep(char *data, size_t size, size_t nmemb, void *arg)
{
	Answer	   *answer = arg;
	size_t		length = size * nmemb;

	if (length > sizeof(answer->data) - answer->length)
		return 0;
	memcpy(answer->data + answer->length, data, length);
	answer->length += length;
	return length;
}

/* handmade_request(url text, ca_file text, key text): all requests of a session are the same. */
Datum
handmade_request(PG_FUNCTION_ARGS)
{
	static CURL *easy = NULL;
	static Answer answer;
	long		status;

	if (easy == NULL)
		easy = prepare_request(text_to_cstring(PG_GETARG_TEXT_PP(0)),
							   text_to_cstring(PG_GETARG_TEXT_PP(1)),
							   text_to_cstring(PG_GETARG_TEXT_PP(2)), keep, &answer);
	if (easy == NULL)
		elog(ERROR, "out of memory");
	answer.length = 0;
	status = perform_request(easy);
	if (status != 200)
		elog(ERROR, "HTTP status %ld", status);
	PG_RETURN_TEXT_P(cstring_to_text_with_len(answer.data, answer.length));
}
