/*-------------------------------------------------------------------------
 *
 * api.c
 *		Omni's REST API: what a request looks like and what an answer means.
 *
 * This file does no I/O.  It follows docs.omni.co and the OpenAPI file of Omni's own
 * command-line client; where the two differ, it accepts both.
 *
 * An answer comes from outside and may be anything.  No answer raises an error: each
 * makes an outcome.  Every text from outside goes through quote(), which removes the
 * API key and all characters that do not belong in a line of text.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_collation.h"
#include "catalog/pg_type.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/datetime.h"
#include "utils/formatting.h"
#include "utils/json.h"
#include "utils/jsonb.h"
#include "utils/timestamp.h"

#include "base/compat.h"
#include "base/status.h"
#include "omni/api.h"

/* Omni's answers are two or three levels deep */
#define MAX_NESTING			32

/* The most digits of a number that jsonb is given */
#define MAX_DIGITS			32

#define HEX_DIGITS			"0123456789abcdefABCDEF"

/* Of UTF-8 */
static const char byte_order_mark[] = "\xef\xbb\xbf";

/*
 * How many bytes of a remote text to show.  An error holds 1 kB; the rest allows for white
 * space, which quote() removes.
 */
#define MAX_READ			4096

/* The messages about requests without a job of their own */
static const OmniJobKind poll = {.refused = "server \"%s\" refused the question about a job: HTTP status %d"};
static const OmniJobKind lookup = {.refused = "server \"%s\" refused the request: HTTP status %d"};

static char *uuid_text(const pg_uuid_t *uuid);
static char *escape(const char *text);
static char *list_text(ArrayType *list);
static void add_parameter(CURLU *url, const char *name, const char *value);
static bool read_answer(const OmniRequest *request, const char *key, const OmniAnswer *answer,
						const OmniJobKind *kind, OmniOutcome *outcome);
static void read_failure(const OmniRequest *request, const char *key,
						 const OmniAnswer *answer, const OmniJobKind *kind, OmniOutcome *outcome);
static void read_refusal(const OmniRequest *request, const char *key,
						 const OmniAnswer *answer, const OmniJobKind *kind, OmniOutcome *outcome);
static void read_acceptance(const OmniRequest *request, const char *key,
							const OmniAnswer *answer, OmniOutcome *outcome);
static void read_reset(const OmniRequest *request, const char *key,
					   const OmniAnswer *answer, OmniOutcome *outcome);
static const char *describe_id(const char *job_id, const char *key);
static bool is_known_status(const char *status);
static void set_failed(const OmniRequest *request, OmniOutcome *outcome);
static void set_malformed(const OmniRequest *request, OmniOutcome *outcome, const char *what);
static void set_unreadable(const OmniRequest *request, const char *key,
						   const OmniAnswer *answer, const char *why, OmniOutcome *outcome);
static void note_arrival(const OmniAnswer *answer, OmniOutcome *outcome);
static bool begins_with_tag(const OmniAnswer *answer);
static bool is_gateway_timeout(const OmniAnswer *answer);
static void set_not_json(const OmniRequest *request, const char *key,
						 const OmniAnswer *answer, const char *why, OmniOutcome *outcome);
static bool try_input(PGFunction function, const char *text, Datum *value);
static char *to_utf8(const char *body, size_t length, char **why);
static bool leave_out_odd(char *json);
static char *end_of_string(char *json, bool *odd);
static char *ascii_only(const char *text);
static bool nests_too_deep(const char *json);
static bool has_value(Jsonb *object, const char *name);
static bool looks_like_uuid(const char *text);
static char *error_text(const OmniAnswer *answer, const char *key);

static char *quote(const char *bytes, size_t length, const char *key);
static int	clean(const char *bytes, size_t length, StringInfo text);
static bool is_invisible(pg_wchar character);
static bool is_escape(const char *text);
static char *lower_case(const char *text);

/*
 * Return the host and port of a URL, as in "acme.omniapp.co:443", or with the scheme and
 * without a default port, as in "https://acme.omniapp.co".  NULL if libcurl finds no host.
 * The result is palloc'd and in lower case.
 */
char *
omni_api_host(const char *text, bool with_scheme)
{
	CURLU	   *url = curl_url();
	char	   *scheme = NULL;
	char	   *host = NULL;
	char	   *port = NULL;
	char	   *result = NULL;

	if (url != NULL &&
		curl_url_set(url, CURLUPART_URL, text, CURLU_NON_SUPPORT_SCHEME) == CURLUE_OK &&
		curl_url_get(url, CURLUPART_SCHEME, &scheme, 0) == CURLUE_OK &&
		curl_url_get(url, CURLUPART_HOST, &host, 0) == CURLUE_OK)
	{
		(void) curl_url_get(url, CURLUPART_PORT, &port,
							with_scheme ? CURLU_NO_DEFAULT_PORT : CURLU_DEFAULT_PORT);
		result = psprintf("%s%s%s%s%s", with_scheme ? scheme : "", with_scheme ? "://" : "",
						  host, port != NULL ? ":" : "", port != NULL ? port : "");
	}
	curl_free(scheme);
	curl_free(host);
	curl_free(port);
	curl_url_cleanup(url);
	return result != NULL ? str_tolower(result, strlen(result), C_COLLATION_OID) : NULL;
}

static char *
uuid_text(const pg_uuid_t *uuid)
{
	return DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(uuid)));
}

/* Encode a text for use in a URL, in UTF-8; palloc'd. */
static char *
escape(const char *text)
{
	char	   *utf8 = pg_server_to_any(text, strlen(text), PG_UTF8);
	char	   *escaped = curl_easy_escape(NULL, utf8, 0);
	char	   *result;

	if (escaped == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("out of memory")));
	result = pstrdup(escaped);
	curl_free(escaped);
	return result;
}

/* Return the URL of a job's request; palloc'd. */
char *
omni_api_job_url(const char *base_url, const OmniRequest *request)
{
	const OmniJobKind *kind = &omni_job_kinds[request->kind];
	char	   *path = psprintf("/api/v1/models/%s/%s%s%s", uuid_text(&request->model), kind->path,
								kind->takes_policy ? "/" : "",
								kind->takes_policy ? escape(request->policy) : "");
	char	   *text = NULL;
	char	   *volatile result = NULL;
	CURLU	   *url = curl_url();

	if (url == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("out of memory")));
	PG_TRY();
	{
		if (curl_url_set(url, CURLUPART_URL, base_url, 0) != CURLUE_OK ||
			curl_url_set(url, CURLUPART_PATH, path, 0) != CURLUE_OK)
			elog(ERROR, "libcurl could not make a URL of \"%s\"", base_url);

		if (request->has_branch)
			add_parameter(url, "branch_id", uuid_text(&request->branch));
		if (request->hard_named)
			add_parameter(url, "hard_refresh", request->hard ? "true" : "false");
		if (request->schemas != NULL)
			add_parameter(url, "schemas", list_text(request->schemas));
		if (request->tables != NULL)
			add_parameter(url, "tables", list_text(request->tables));

		if (curl_url_get(url, CURLUPART_URL, &text, 0) != CURLUE_OK)
			elog(ERROR, "libcurl could not make a URL");
		result = pstrdup(text);
	}
	PG_FINALLY();
	{
		curl_free(text);
		curl_url_cleanup(url);
	}
	PG_END_TRY();

	return result;
}

/* Return the body of a job's request, as JSON; palloc'd, or NULL if it has none. */
char *
omni_api_job_body(const OmniRequest *request)
{
	char		text[MAXDATELEN + 1];
	int			utc = 0;

	if (!request->has_reset_at)
		return NULL;
	JsonEncodeDateTime(text, TimestampTzGetDatum(request->reset_at), TIMESTAMPTZOID, &utc);
	return psprintf("{\"resetAt\": \"%s\"}", text);
}

/* Return the URL of a poll, by Omni's id of the job; palloc'd. */
char *
omni_api_poll_url(const char *base_url, const pg_uuid_t *job_id)
{
	return omni_api_lookup_url(base_url, psprintf("jobs/%s/status", uuid_text(job_id)));
}

/* Return the URL of a look-up, given as a path below /api/v1/ with its query; palloc'd. */
char *
omni_api_lookup_url(const char *base_url, const char *lookup)
{
	/* keep scheme and host: the path of a base URL is empty, "/", or "/api" */
	const char *host = strstr(base_url, "://") + 3;

	return psprintf("%.*s/api/v1/%s", (int) (host - base_url + strcspn(host, "/")), base_url, lookup);
}

/* Return the look-up of a page of models, the first one if cursor is NULL; palloc'd. */
char *
omni_api_models_lookup(const char *name, const char *kind, const char *cursor)
{
	return psprintf("models?pageSize=100&include=activeBranches%s%s%s%s%s%s",
					name != NULL ? "&name=" : "", name != NULL ? escape(name) : "",
					kind != NULL ? "&modelKind=" : "", kind != NULL ? escape(kind) : "",
					cursor != NULL ? "&cursor=" : "", cursor != NULL ? escape(cursor) : "");
}

/* Return the look-up of one model, as a page of models; palloc'd. */
char *
omni_api_model_lookup(const pg_uuid_t *model)
{
	return psprintf("models?modelId=%s", uuid_text(model));
}

/* Return the look-up of the schemas of a model; branch may be NULL; palloc'd. */
char *
omni_api_schemas_lookup(const pg_uuid_t *model, const pg_uuid_t *branch)
{
	return psprintf("models/%s/schemas%s%s", uuid_text(model),
					branch != NULL ? "?branch_id=" : "", branch != NULL ? uuid_text(branch) : "");
}

/*
 * Return how many bytes a text may take in a URL.  This is an upper bound: libcurl may
 * encode a space by one byte in place of three.
 */
Size
omni_api_encoded_length(const char *text)
{
	Size		length = 0;

	for (const char *c = pg_server_to_any(text, strlen(text), PG_UTF8); *c != '\0'; c++)
		length += strchr("-._~", *c) != NULL || (!IS_HIGHBIT_SET(*c) && isalnum((unsigned char) *c)) ? 1 : 3;
	return length;
}

/* Return how many bytes a name may take in a list in a URL, with the comma before it. */
int
omni_api_name_length(const char *name)
{
	return strlen("%2C") + omni_api_encoded_length(name);
}

/* Return how many bytes the names of both lists may take in the URL of any refresh. */
int
omni_api_room(void)
{
	OmniRequest longest = {.has_branch = true,.hard_named = true};

	return OMNI_MAX_PATH - omni_api_path_length(&longest) - strlen("?schemas=?tables=");
}

/* Return how many bytes the path and the query of a refresh may take. */
Size
omni_api_path_length(const OmniRequest *request)
{
	static const char uuid[] = "00000000-0000-0000-0000-000000000000";
	Size		length = strlen("/api/v1/models/") + strlen(uuid) + strlen("/refresh");

	if (request->has_branch)
		length += strlen("?branch_id=") + strlen(uuid);
	if (request->hard_named)
		length += strlen("?hard_refresh=") + strlen(request->hard ? "true" : "false");
	if (request->schemas != NULL)
		length += strlen("?schemas=") + omni_api_encoded_length(list_text(request->schemas));
	if (request->tables != NULL)
		length += strlen("?tables=") + omni_api_encoded_length(list_text(request->tables));
	return length;
}

/*
 * Check that the URL of a refresh is short enough for servers and proxies.  Of the request,
 * only has_branch, hard_named, hard and the lists matter: a uuid's length is fixed.
 */
bool
omni_api_fits(const OmniRequest *request)
{
	return omni_api_path_length(request) <= OMNI_MAX_PATH;
}

/*
 * Return whether a text can be the name of a cache policy.  It is a segment of a path, where
 * "." and ".." have a meaning of their own.
 */
bool
omni_api_is_policy(const char *text)
{
	return text[strspn(text, " \t\r\n")] != '\0' && strlen(text) < OMNI_MAX_POLICY &&
		strcmp(text, ".") != 0 && strcmp(text, "..") != 0;
}

/* Join the elements of a list by commas, as Omni expects it. */
static char *
list_text(ArrayType *list)
{
	StringInfoData names;
	Datum	   *elements;
	int			count;

	deconstruct_array(list, TEXTOID, -1, false, TYPALIGN_INT, &elements, NULL, &count);
	initStringInfo(&names);
	for (int i = 0; i < count; i++)
		appendStringInfo(&names, "%s%s", i == 0 ? "" : ",", TextDatumGetCString(elements[i]));
	return names.data;
}

/* Add a parameter to a URL, in UTF-8. */
static void
add_parameter(CURLU *url, const char *name, const char *value)
{
	char	   *parameter = psprintf("%s=%s", name, pg_server_to_any(value, strlen(value), PG_UTF8));

	if (curl_url_set(url, CURLUPART_QUERY, parameter,
					 CURLU_APPENDQUERY | CURLU_URLENCODE) != CURLUE_OK)
		elog(ERROR, "libcurl could not encode the parameter \"%s\"", name);
}

/*
 * Find out what the answer to a job's request means for the job.  Needs a transaction, since
 * it parses JSON.  Strings in *outcome are constants.
 */
void
omni_api_job_outcome(const OmniRequest *request, const char *key,
					 const OmniAnswer *answer, OmniOutcome *outcome)
{
	const OmniJobKind *kind = &omni_job_kinds[request->kind];

	if (!read_answer(request, key, answer, kind, outcome))
		return;
	if (kind->is_followed)
		read_acceptance(request, key, answer, outcome);
	else
		read_reset(request, key, answer, outcome);
}

/*
 * Find out what the answer to a poll means for the job.  Return true if Omni has finished
 * the job; if not, *outcome may hold an error of the poll.  Needs a transaction.
 */
bool
omni_api_poll_outcome(const OmniRequest *request, const char *key,
					  const OmniAnswer *answer, OmniOutcome *outcome)
{
	char	   *why = NULL;
	Jsonb	   *json;
	char	   *status;

	if (!read_answer(request, key, answer, &poll, outcome))
		return false;
	json = omni_api_json(answer->body, answer->length, &why);
	status = json != NULL ? omni_api_member(&json->root, "status") : NULL;
	if (status == NULL)
		set_malformed(request, outcome, "The answer about a job does not have the expected form.");
	else if (pg_strcasecmp(status, "completed") == 0)
	{
		outcome->status = OMNI_NAME_COMPLETED;
		return true;
	}
	else if (pg_strcasecmp(status, "failed") == 0)
	{
		set_failed(request, outcome);
		return true;
	}
	return false;
}

/* Set the outcome of a look-up: an error, or none.  The caller reads the body. */
void
omni_api_lookup_outcome(const OmniRequest *request, const char *key,
						const OmniAnswer *answer, OmniOutcome *outcome)
{
	if (read_answer(request, key, answer, &lookup, outcome))
		outcome->status = OMNI_NAME_COMPLETED;
}

/* Set the outcome of a check.  Parse the page of models here, since the caller does not. */
void
omni_api_probe_outcome(const OmniRequest *request, const char *key,
					   const OmniAnswer *answer, OmniOutcome *outcome)
{
	char	   *why = NULL;
	Jsonb	   *json;

	omni_api_lookup_outcome(request, key, answer, outcome);
	if (outcome->error.sqlstate != 0)
		return;
	json = omni_api_json(answer->body, answer->length, &why);
	if (json == NULL)
		set_not_json(request, key, answer, why, outcome);
	else if (!JB_ROOT_IS_OBJECT(json) || !has_value(json, "records"))
		set_malformed(request, outcome, "The answer is JSON, but does not have the expected form.");
}

/*
 * Find a model in a page of models, and copy its name, which is empty if it has none.  Returns
 * false if the model is not there, or deleted.
 */
bool
omni_api_find_model(const OmniAnswer *answer, const pg_uuid_t *model, const char *key,
					char *name, Size size)
{
	char	   *why;
	Jsonb	   *page = omni_api_json(answer->body, answer->length, &why);
	JsonbValue	records;

	if (page == NULL || !JB_ROOT_IS_OBJECT(page) ||
		getKeyJsonValueFromContainer(&page->root, "records", strlen("records"), &records) == NULL ||
		records.type != jbvBinary || !JsonContainerIsArray(records.val.binary.data))
		return false;
	for (uint32 i = 0; i < JsonContainerSize(records.val.binary.data); i++)
	{
		JsonbValue *record = getIthJsonbValueFromContainer(records.val.binary.data, i);
		char	   *id = record->type == jbvBinary ?
		omni_api_member(record->val.binary.data, "id") : NULL;

		if (id != NULL && pg_strcasecmp(id, uuid_text(model)) == 0)
		{
			omni_api_copy(name, size, omni_api_member(record->val.binary.data, "name"), key);
			return omni_api_member(record->val.binary.data, "deletedAt") == NULL;
		}
	}
	return false;
}

/*
 * Begin the outcome of any answer.  Return true if it has HTTP status 200, or another 2xx with a
 * body, so that the caller must read the body; else the outcome is complete.
 */
static bool
read_answer(const OmniRequest *request, const char *key, const OmniAnswer *answer,
			const OmniJobKind *kind, OmniOutcome *outcome)
{
	bool		has_body = answer->length > 0 || answer->encoding != NULL;

	memset(outcome, 0, sizeof(*outcome));
	outcome->http_status = answer->status;
	outcome->elapsed = answer->elapsed;
	outcome->retry_after = Max(answer->retry_after, 0);

	if (answer->failed)
		read_failure(request, key, answer, kind, outcome);
	else if (answer->status == 200 || (answer->status / 100 == 2 && has_body))
		return true;
	else
		read_refusal(request, key, answer, kind, outcome);
	return false;
}

/* Set the outcome of an attempt that got no answer, or only a part of one. */
static void
read_failure(const OmniRequest *request, const char *key,
			 const OmniAnswer *answer, const OmniJobKind *kind, OmniOutcome *outcome)
{
	/* The messages have the server's name and milliseconds as their arguments */
	typedef struct Phase
	{
		const char *failed;
		const char *timed_out;
		const char *hint;
	} Phase;
	static const Phase phases[] = {
		[OMNI_PHASE_NAME] = {
			"could not reach server \"%s\" after " INT64_FORMAT " ms of looking up the host's name",
			"timed out on server \"%s\" after " INT64_FORMAT " ms of looking up the host's name",
			"Check the host in the option \"base_url\" and the name service of the database server's host."
		},
		[OMNI_PHASE_CONNECT] = {
			"could not reach server \"%s\" after " INT64_FORMAT " ms of connecting",
			"timed out on server \"%s\" after " INT64_FORMAT " ms of connecting",
			"Check that the database server's host may connect to this address: firewalls, routes, or the option \"proxy\"."
		},
		[OMNI_PHASE_TLS] = {
			"could not reach server \"%s\" after " INT64_FORMAT " ms of setting up TLS",
			"timed out on server \"%s\" after " INT64_FORMAT " ms of setting up TLS",
			"Check that \"base_url\" names the host its certificate is for; a private certificate authority is named in the option \"ca_file\"."
		},
		[OMNI_PHASE_WAIT] = {
			"could not reach server \"%s\" after " INT64_FORMAT " ms of waiting for the answer",
			"timed out on server \"%s\" after " INT64_FORMAT " ms of waiting for the answer",
			"Omni may have got the request: look there before you send it again.  The option \"timeout\" says how long to wait."
		},
		[OMNI_PHASE_READ] = {
			"could not reach server \"%s\" after " INT64_FORMAT " ms of reading the answer",
			"timed out on server \"%s\" after " INT64_FORMAT " ms of reading the answer",
			"Omni has got the request: look there before you send it again.  The option \"timeout\" says how long to wait."
		},
	};

	/*
	 * The same of attempts that failed at the proxy, before the request was
	 * sent
	 */
	static const Phase proxy_phases[] = {
		[OMNI_PHASE_NAME] = {
			"could not reach server \"%s\" after " INT64_FORMAT " ms of looking up the proxy's name",
			"timed out on server \"%s\" after " INT64_FORMAT " ms of looking up the proxy's name",
			"Check the host in the option \"proxy\" and the name service of the database server's host."
		},
		[OMNI_PHASE_CONNECT] = {
			"could not reach server \"%s\" after " INT64_FORMAT " ms of connecting through the proxy",
			"timed out on server \"%s\" after " INT64_FORMAT " ms of connecting through the proxy",
			"Check the option \"proxy\", and that the database server's host may connect to the proxy."
		},
		[OMNI_PHASE_TLS] = {
			"could not reach server \"%s\" after " INT64_FORMAT " ms of setting up TLS with the proxy",
			"timed out on server \"%s\" after " INT64_FORMAT " ms of setting up TLS with the proxy",
			"Check the option \"proxy\": the proxy needs a certificate for its host, of an authority that the system knows; \"ca_file\" is not for proxies."
		},
	};
	const Phase *phase = answer->at_proxy && answer->phase < lengthof(proxy_phases) ?
	&proxy_phases[answer->phase] : &phases[answer->phase];
	const char *hint = phase->hint;
	char	   *reason;

	if (answer->proxy_status == 407)
		hint = "Proxies that want authentication are not supported; use one in the option \"proxy\" that lets this host connect without.";
	else if (answer->proxy_status >= 500)
		hint = "The proxy could not connect to the host in \"base_url\", or is in trouble itself; try again later.";
	else if (answer->proxy_status != 0)
		hint = "The proxy does not let this host connect to host and port of \"base_url\": check what it allows.";
	else if (answer->tls_version)
		hint = "The server offers no version of TLS that is accepted: TLS 1.2 or newer is needed.";
	else if (answer->no_tls)
		hint = answer->at_proxy ?
			"The proxy does not speak TLS: check scheme and port in the option \"proxy\"." :
			"The server does not speak TLS: check the port in \"base_url\".";
	else if (answer->wants_certificate)
		hint = answer->at_proxy ?
			"The proxy asks for a client certificate, which omni_refresh cannot give: check the option \"proxy\"." :
			"The server asks for a client certificate, which omni_refresh cannot give: check \"base_url\", and what proxies are in between.";
	else if (answer->expired)
		hint = "The certificate has expired or is not valid yet, or an authority's in the option \"ca_file\"; or the clock of the database server's host is wrong.";
	else if (answer->bad_ca_file != NULL)
		hint = "The option \"ca_file\" must name a file of certificates in PEM format that the database server's operating system user may read; without the option, the system's certificates are used.";

	if (answer->too_large || answer->long_headers)
	{
		set_malformed(request, outcome, answer->too_large ? "The answer is longer than 1 MB." :
					  "The headers of the answer are too long.");
		if (answer->status / 100 == 2 && kind->name != NULL)
			note_arrival(answer, outcome);
		return;
	}

	outcome->status = answer->sent ? OMNI_NAME_UNKNOWN : OMNI_NAME_FAILED;
	outcome->may_have_arrived = answer->sent;
	outcome->attempt_event = OMNI_NAME_ATTEMPT_FAILED;
	outcome->retryable = answer->retryable;
	if (answer->bad_ca_file != NULL)
		omni_error_set(&outcome->error, ERRCODE_SQLCLIENT_UNABLE_TO_ESTABLISH_SQLCONNECTION,
					   "could not load the certificate authorities of server \"%s\" from file \"%s\"",
					   NameStr(request->server), answer->bad_ca_file);
	else
		omni_error_set(&outcome->error,
					   answer->phase >= OMNI_PHASE_WAIT ? ERRCODE_CONNECTION_FAILURE :
					   ERRCODE_SQLCLIENT_UNABLE_TO_ESTABLISH_SQLCONNECTION,
					   answer->timed_out ? phase->timed_out : phase->failed,
					   NameStr(request->server), answer->elapsed / 1000);
	reason = quote(answer->reason, strlen(answer->reason), key);
	if (reason != NULL)
		omni_error_detail(&outcome->error, "%s", reason);
	omni_error_hint(&outcome->error, "%s", hint);
}

/* Set the outcome of an answer with another HTTP status than 200, by Omni or a proxy. */
static void
read_refusal(const OmniRequest *request, const char *key,
			 const OmniAnswer *answer, const OmniJobKind *kind, OmniOutcome *outcome)
{
	static const struct
	{
		int			status;
		int			sqlstate;
		const char *hint;
	}			refusals[] = {
		{400, ERRCODE_INVALID_PARAMETER_VALUE,
		"Check the arguments."},
		{401, ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
		"Check the API key in the user mapping: it may have been revoked, or belong to another instance."},
		{403, ERRCODE_INSUFFICIENT_PRIVILEGE,
		"The owner of the API key needs the permission for this in Omni."},
		{404, ERRCODE_UNDEFINED_OBJECT,
		"Check what is asked for, and that the server's \"base_url\" is the instance that has it."},
		{407, ERRCODE_EXTERNAL_ROUTINE_EXCEPTION,
		"Proxies that want authentication are not supported."},
		{429, ERRCODE_INSUFFICIENT_RESOURCES,
		"Omni limits the requests of a key, by default to 60 a minute; others may be using the same key."},
		{503, ERRCODE_CONNECTION_FAILURE,
		"Omni is under maintenance or overloaded; try again later."},
		{504, ERRCODE_CONNECTION_FAILURE,
		"A proxy in between had no answer from Omni in time; try again later."},
		{524, ERRCODE_CONNECTION_FAILURE,
		"A proxy in between had no answer from Omni in time; try again later."},
	};
	char	   *text = error_text(answer, key);
	char	   *why;

	outcome->status = OMNI_NAME_FAILED;
	outcome->attempt_event = OMNI_NAME_REFUSED;

	if (answer->status >= 300 && answer->status < 400)
	{
		char	   *host = NULL;

		if (answer->redirect_url != NULL)
			host = omni_api_host(answer->redirect_url, true);
		host = host != NULL ? quote(host, strlen(host), key) : NULL;
		set_malformed(request, outcome, host != NULL ?
					  psprintf("The server redirects to %s.", host) :
					  psprintf("The server answered with HTTP status %d.", answer->status));
		omni_error_hint(&outcome->error, "Redirects are not followed, since the API key is for one host only; set \"base_url\" to the login host of the instance.");
		return;
	}
	if (answer->status < 400)
	{
		set_malformed(request, outcome,
					  psprintf("The server answered with HTTP status %d.", answer->status));
		if (kind->name != NULL)
			note_arrival(answer, outcome);
		return;
	}

	omni_error_set(&outcome->error,
				   answer->status >= 500 ? ERRCODE_CONNECTION_FAILURE :
				   ERRCODE_EXTERNAL_ROUTINE_EXCEPTION,
				   kind->refused, NameStr(request->server), answer->status);
	omni_error_hint(&outcome->error, answer->status >= 500 ?
					"The trouble is on Omni's side, or in a proxy in between; try again later." :
					"Omni does not document this status; it may come from a proxy in between.");
	for (int i = 0; i < lengthof(refusals); i++)
	{
		if (refusals[i].status == answer->status)
		{
			outcome->error.sqlstate = refusals[i].sqlstate;
			omni_error_hint(&outcome->error, "%s", refusals[i].hint);
		}
	}
	for (const OmniHint *special = kind->hints; special->status != 0; special++)
	{
		if (special->status == answer->status)
			omni_error_hint(&outcome->error, "%s", special->hint);
	}
	if (is_gateway_timeout(answer) && kind->name != NULL)
		omni_error_hint(&outcome->error, "A proxy in between had no answer from Omni in time, but Omni may have got the request: look there before you send it again.");
	if (answer->status == 400 && text != NULL && strstr(text, "SSL certificate") != NULL)
		omni_error_hint(&outcome->error, "The answer comes from a proxy in between, which asks for a client certificate; omni_refresh cannot give one.");
	else if (answer->status == 400 && omni_api_json(answer->body, answer->length, &why) == NULL)
		omni_error_hint(&outcome->error, "The answer is not JSON, so it comes from a proxy or load balancer in between, not from Omni: check scheme, host and port of the server's \"base_url\".");
	if (text != NULL)
		omni_error_detail(&outcome->error, "%s", text);

	if (answer->status == 429)
		outcome->attempt_event = OMNI_NAME_RATE_LIMITED;
	else if (answer->status >= 500)
		outcome->attempt_event = OMNI_NAME_ATTEMPT_FAILED;
	outcome->retryable = answer->status == 429 || answer->status >= 500;
	outcome->few = answer->status >= 500 && answer->status != 502 && answer->status != 503 &&
		!is_gateway_timeout(answer);
	outcome->slow_down = answer->status == 429 || answer->status == 503;
	outcome->may_have_arrived = is_gateway_timeout(answer);
}

/* Return whether a proxy says that it had no answer in time; 524 is Cloudflare's. */
static bool
is_gateway_timeout(const OmniAnswer *answer)
{
	return answer->status == 504 || answer->status == 524;
}

/*
 * Set the outcome of a refresh from an answer with HTTP status 2xx.  One other than 200 that has
 * a job's id says enough.
 */
static void
read_acceptance(const OmniRequest *request, const char *key,
				const OmniAnswer *answer, OmniOutcome *outcome)
{
	char	   *why = NULL;
	Jsonb	   *json = omni_api_json(answer->body, answer->length, &why);
	char	   *status;
	char	   *job_id;
	bool		has_id;

	if (json == NULL)
	{
		set_unreadable(request, key, answer, why, outcome);
		return;
	}
	status = omni_api_member(&json->root, "status");
	job_id = omni_api_member(&json->root, "jobId");
	has_id = job_id != NULL && looks_like_uuid(job_id);
	if (status == NULL && has_id && answer->status != 200)
		status = "running";
	if (status == NULL && why != NULL)
	{
		set_unreadable(request, key, answer, NULL, outcome);
		return;
	}
	if (status == NULL || (!has_id && has_value(json, "jobId") && !is_known_status(status)))
	{
		set_malformed(request, outcome, "The answer is JSON, but does not have the expected form.");
		return;
	}

	if (has_id)
	{
		outcome->job_id = *DatumGetUUIDP(DirectFunctionCall1(uuid_in, CStringGetDatum(job_id)));
		outcome->has_job_id = true;
	}
	else if (has_value(json, "jobId"))
		outcome->note = describe_id(job_id, key);
	if (pg_strcasecmp(status, "completed") == 0)
		outcome->status = OMNI_NAME_COMPLETED;
	else if (pg_strcasecmp(status, "failed") == 0)
		set_failed(request, outcome);
	else
	{
		outcome->status = OMNI_NAME_ACCEPTED;
		if (!has_value(json, "jobId"))
			outcome->note = "Omni's answer has no jobId, so that the job cannot be followed.";
	}
}

/* Say why a job cannot be followed whose id is no uuid; NULL: the id is no text. */
static const char *
describe_id(const char *job_id, const char *key)
{
	char	   *text = job_id != NULL ? quote(job_id, strlen(job_id), key) : NULL;

	if (job_id == NULL)
		return "Omni's jobId is no text, so that the job cannot be followed.";
	if (text == NULL)
		return "Omni's jobId is no uuid, so that the job cannot be followed; it is empty.";
	return psprintf("Omni's jobId is no uuid, so that the job cannot be followed; it reads %s.", text);
}

/* Return whether a status of a refresh is one that Omni documents. */
static bool
is_known_status(const char *status)
{
	static const char *const known[] = {"running", "in_progress", "completed", "failed"};

	for (int i = 0; i < lengthof(known); i++)
	{
		if (pg_strcasecmp(status, known[i]) == 0)
			return true;
	}
	return false;
}

/* Set the outcome of a job that Omni reports as failed. */
static void
set_failed(const OmniRequest *request, OmniOutcome *outcome)
{
	const OmniJobKind *kind = &omni_job_kinds[request->kind];

	outcome->status = OMNI_NAME_FAILED;
	omni_error_set(&outcome->error, ERRCODE_EXTERNAL_ROUTINE_EXCEPTION,
				   kind->failed, NameStr(request->server));
	omni_error_detail(&outcome->error, "Omni accepted the request and reported the status \"failed\", without a reason.");
	if (kind->failed_hint != NULL)
		omni_error_hint(&outcome->error, "%s", kind->failed_hint);
}

/* Set the outcome of a cache reset from an answer with HTTP status 2xx. */
static void
read_reset(const OmniRequest *request, const char *key,
		   const OmniAnswer *answer, OmniOutcome *outcome)
{
	char	   *why = NULL;
	Jsonb	   *json = omni_api_json(answer->body, answer->length, &why);
	JsonbValue	success;

	if (json == NULL)
		set_unreadable(request, key, answer, why, outcome);
	else if (!JB_ROOT_IS_OBJECT(json) ||
			 getKeyJsonValueFromContainer(&json->root, "success", strlen("success"),
										  &success) == NULL ||
			 success.type != jbvBool)
	{
		if (why != NULL)
			set_unreadable(request, key, answer, NULL, outcome);
		else
			set_malformed(request, outcome, "The answer is JSON, but does not have the expected form.");
	}
	else if (success.val.boolean)
		outcome->status = OMNI_NAME_COMPLETED;
	else
	{
		set_failed(request, outcome);
		omni_error_detail(&outcome->error, "Omni accepted the reset of \"%s\" and reported no success, without a reason.",
						  request->policy);
	}
}

/*
 * Set the outcome of an answer that does not come from Omni.  A call is not tried again: a
 * change of the configuration may be needed.  A queued job is, a few times: the answer may be
 * that of a proxy that has a hiccup.
 */
static void
set_malformed(const OmniRequest *request, OmniOutcome *outcome, const char *what)
{
	outcome->few = true;
	outcome->status = OMNI_NAME_FAILED;
	outcome->attempt_event = OMNI_NAME_ATTEMPT_FAILED;
	omni_error_set(&outcome->error, ERRCODE_PROTOCOL_VIOLATION,
				   "unexpected response from server \"%s\"",
				   NameStr(request->server));
	omni_error_detail(&outcome->error, "%s", what);
	omni_error_hint(&outcome->error, "Check that the server's \"base_url\" is the login host of an Omni instance, and what proxies are in between.");
}

/* The same as set_not_json(), of an answer with HTTP status 2xx to the request of a job. */
static void
set_unreadable(const OmniRequest *request, const char *key,
			   const OmniAnswer *answer, const char *why, OmniOutcome *outcome)
{
	set_not_json(request, key, answer, why, outcome);
	note_arrival(answer, outcome);
}

/*
 * Set the status of a job whose answer with HTTP status 2xx cannot be read.  If it claims to be
 * JSON, Omni has got the request, and it must not be sent again.  If not, or if it is HTML all the
 * same, it is the page of a proxy.
 */
static void
note_arrival(const OmniAnswer *answer, OmniOutcome *outcome)
{
	if (!answer->json || begins_with_tag(answer))
		return;
	outcome->few = false;
	outcome->status = OMNI_NAME_UNKNOWN;
	omni_error_hint(&outcome->error, "Omni has got the request: look there before you send it again.");
}

static bool
begins_with_tag(const OmniAnswer *answer)
{
	size_t		i = 0;

	if (answer->length >= strlen(byte_order_mark) && memcmp(answer->body, byte_order_mark, strlen(byte_order_mark)) == 0)
		i = strlen(byte_order_mark);
	while (i < answer->length && isspace((unsigned char) answer->body[i]))
		i++;
	return i < answer->length && answer->body[i] == '<';
}

/* Set the outcome of an answer that omni_api_json() rejected, given its reason or NULL. */
static void
set_not_json(const OmniRequest *request, const char *key,
			 const OmniAnswer *answer, const char *why, OmniOutcome *outcome)
{
	char	   *body = why == NULL ? quote(answer->body, answer->length, key) : NULL;

	if (answer->encoding != NULL)
		why = psprintf("it is encoded as \"%s\"", quote(answer->encoding, strlen(answer->encoding), key));
	else if (body != NULL)
		why = psprintf("it reads %s", body);
	else if (why == NULL)
		why = "it is blank";
	set_malformed(request, outcome, psprintf("The answer is not JSON: %s.", why));
}

/*
 * Parse the body of an answer.  Return NULL if it is not JSON, or is nested deeper than Omni's
 * answers.  Then set *why to the reason, or to NULL if the body itself shows it.  If the result
 * lacks values that cannot be read, set *why, too.
 *
 * In an encoding other than UTF-8, replace all characters outside of ASCII by question marks: a
 * name that cannot be converted must not make a refresh fail.
 */
Jsonb *
omni_api_json(const char *body, size_t length, char **why)
{
	char	   *text = to_utf8(body, length, why);
	bool		complete;
	Datum		json;

	if (text == NULL)
		return NULL;
	complete = !leave_out_odd(text);
	if (GetDatabaseEncoding() != PG_UTF8)
		text = ascii_only(text);
	if (nests_too_deep(text))
	{
		*why = psprintf("it is nested more than %d levels deep", MAX_NESTING);
		return NULL;
	}
	*why = NULL;
	if (!try_input(jsonb_in, text, &json))
		return NULL;
	if (!complete)
		*why = "it has values that cannot be read";
	return DatumGetJsonbP(json);
}

/*
 * Call an input function; return false if it rejects the text.  Catch its errors without a
 * subtransaction, since it changes nothing outside of its memory, and rethrow all other errors.
 * Not inline: with setjmp() in it, the compiler would warn about clobbered variables of callers.
 */
static pg_noinline bool
try_input(PGFunction function, const char *text, Datum *value)
{
	MemoryContext context = CurrentMemoryContext;
	volatile bool accepted = true;

	PG_TRY();
	{
		*value = DirectFunctionCall3(function, CStringGetDatum(text),
									 ObjectIdGetDatum(InvalidOid), Int32GetDatum(-1));
	}
	PG_CATCH();
	{
		int			sqlstate = geterrcode();

		if (ERRCODE_TO_CATEGORY(sqlstate) != ERRCODE_DATA_EXCEPTION &&
			ERRCODE_TO_CATEGORY(sqlstate) != ERRCODE_PROGRAM_LIMIT_EXCEEDED)
			PG_RE_THROW();
		MemoryContextSwitchTo(context);
		FlushErrorState();
		accepted = false;
	}
	PG_END_TRY();
	return accepted;
}

/* Read a uuid in its standard form; return false if the text is not one. */
bool
omni_api_uuid(const char *text, Datum *uuid)
{
	return looks_like_uuid(text) && try_input(uuid_in, text, uuid);
}

/* Read a uuid in any form that uuid_in() accepts; return false if the text is not one. */
bool
omni_api_any_uuid(const char *text, pg_uuid_t *uuid)
{
	Datum		value;

	if (!try_input(uuid_in, text, &value))
		return false;
	*uuid = *DatumGetUUIDP(value);
	return true;
}

/* Read a timestamp; return false if the text is not one. */
bool
omni_api_time(const char *text, Datum *time)
{
	return try_input(timestamptz_in, text, time);
}

/*
 * Copy a body, which must be UTF-8, without a byte-order mark.  Return NULL and set *why if it is
 * not a string in this encoding.
 */
static char *
to_utf8(const char *body, size_t length, char **why)
{
	if (body == NULL || length == 0)
		*why = "it is empty";
	else if (memchr(body, '\0', length) != NULL)
		*why = "it has a NUL byte";
	else if (pg_verify_mbstr(PG_UTF8, body, length, true) == false)
		*why = "it is not valid UTF-8";
	else if (length >= strlen(byte_order_mark) && memcmp(body, byte_order_mark, strlen(byte_order_mark)) == 0)
		return pnstrdup(body + strlen(byte_order_mark), length - strlen(byte_order_mark));
	else
		return pnstrdup(body, length);
	return NULL;
}

/*
 * Replace, in place, what may be in JSON but not in jsonb, since it may be in a member that is
 * not read: a string with the escape of a NUL or with half a surrogate pair becomes null, or empty
 * if it is a name; a number of many digits or with an exponent becomes 0, since no number is read.
 * Return whether a string was replaced.
 */
static bool
leave_out_odd(char *json)
{
	bool		any = false;

	while (*json != '\0')
	{
		char	   *end = json + 1;
		const char *other = NULL;
		bool		odd = false;

		if (*json == '"')
		{
			end = end_of_string(json, &odd);
			if (odd)
				other = end[strspn(end, " \t\r\n")] == ':' ? "\"\"" : "null";
			any |= odd;
		}
		else if (isdigit((unsigned char) *json))
		{
			end = json + strspn(json, "0123456789.eE+-");
			if (end - json > MAX_DIGITS || memchr(json, 'e', end - json) != NULL ||
				memchr(json, 'E', end - json) != NULL)
				other = "0";
		}
		if (other != NULL)
		{
			memset(json, ' ', end - json);
			memcpy(json, other, strlen(other));
		}
		json = end;
	}
	return any;
}

/* Return the end of a JSON string.  Set *odd if it has escapes that jsonb rejects. */
static char *
end_of_string(char *json, bool *odd)
{
	bool		half = false;	/* of a surrogate pair, directly before */

	for (json++; *json != '\0' && *json != '"'; json++)
	{
		uint32		code = 1;

		if (*json == '\\' && json[1] == 'u' && strspn(json + 2, HEX_DIGITS) >= 4)
		{
			char		digits[] = {json[2], json[3], json[4], json[5], '\0'};

			code = strtoul(digits, NULL, 16);
			json += 5;
		}
		else if (*json == '\\' && json[1] != '\0')
			json++;
		*odd |= code == 0 || half != (code >= 0xdc00 && code <= 0xdfff);
		half = code >= 0xd800 && code <= 0xdbff;
	}
	*odd |= half;
	return *json == '"' ? json + 1 : json;
}

/* Copy a text, with a '?' for each byte and each \u escape outside of ASCII. */
static char *
ascii_only(const char *text)
{
	char	   *copy = palloc(strlen(text) + 1);
	char	   *out = copy;

	while (*text != '\0')
	{
		if (text[0] == '\\' && text[1] == 'u' &&
			strspn(text + 2, HEX_DIGITS) >= 4 &&
			!(text[2] == '0' && text[3] == '0' && text[4] <= '7'))
		{
			*out++ = '?';
			text += 6;
		}
		else if (text[0] == '\\' && text[1] != '\0')
		{
			*out++ = *text++;
			*out++ = *text++;
		}
		else
		{
			*out++ = IS_HIGHBIT_SET(*text) ? '?' : *text;
			text++;
		}
	}
	*out = '\0';
	return copy;
}

/*
 * Return whether JSON is nested deeper than Omni's answers.  The parser is recursive: check
 * before parsing.
 */
static bool
nests_too_deep(const char *json)
{
	bool		in_string = false;
	int			depth = 0;

	for (; *json != '\0'; json++)
	{
		if (*json == '"')
			in_string = !in_string;
		else if (in_string)
		{
			if (*json == '\\' && json[1] != '\0')
				json++;
		}
		else if (*json == '{' || *json == '[')
		{
			if (++depth > MAX_NESTING)
				return true;
		}
		else if (*json == '}' || *json == ']')
			depth--;
	}
	return false;
}

/* Return a string member of a JSON object; NULL if there is none. */
char *
omni_api_member(JsonbContainer *object, const char *name)
{
	JsonbValue	value;

	if (!JsonContainerIsObject(object) ||
		getKeyJsonValueFromContainer(object, name, strlen(name), &value) == NULL ||
		value.type != jbvString)
		return NULL;
	return pnstrdup(value.val.string.val, value.val.string.len);
}

/* Return whether a JSON object has a member of this name that is not null. */
static bool
has_value(Jsonb *object, const char *name)
{
	JsonbValue	value;

	return getKeyJsonValueFromContainer(&object->root, name, strlen(name), &value) != NULL &&
		value.type != jbvNull;
}

/* Return whether a text is a uuid in its standard form, which uuid_in() accepts. */
static bool
looks_like_uuid(const char *text)
{
	for (int i = 0; i < 36; i++)
	{
		if (i == 8 || i == 13 || i == 18 || i == 23 ?
			text[i] != '-' : !isxdigit((unsigned char) text[i]))
			return false;
	}
	return text[36] == '\0';
}

/*
 * Return the error text of an answer, for errdetail: the "detail", or "error" and "message", of
 * Omni's two kinds of error objects, else the body as it is.  NULL if there is nothing to show.
 */
static char *
error_text(const OmniAnswer *answer, const char *key)
{
	char	   *why;
	Jsonb	   *json = omni_api_json(answer->body, answer->length, &why);
	char	   *text = NULL;

	if (answer->encoding != NULL)
		return psprintf("The answer is encoded as \"%s\".",
						quote(answer->encoding, strlen(answer->encoding), key));
	if (json != NULL)
	{
		char	   *error = omni_api_member(&json->root, "error");

		text = omni_api_member(&json->root, "detail");
		if (text == NULL)
			text = omni_api_member(&json->root, "message");
		if (text != NULL && error != NULL)
			text = psprintf("%s: %s", error, text);
		else if (text == NULL)
			text = error;
	}
	if (text != NULL)
		text = quote(text, strlen(text), key);
	if (text != NULL)
		return psprintf("Omni says: %s", text);

	text = quote(answer->body, answer->length, key);
	return text != NULL ? psprintf("The answer reads: %s", text) : NULL;
}

/*
 * Copy a remote text, or NULL, into a buffer of fixed size after quote() has cleaned it.  Clip
 * it between characters.
 */
void
omni_api_copy(char *buffer, Size size, const char *text, const char *key)
{
	char	   *quoted = text != NULL ? quote(text, strlen(text), key) : NULL;

	buffer[0] = '\0';
	if (quoted != NULL)
		strlcpy(buffer, quoted, pg_mbcliplen(quoted, strlen(quoted), size - 1) + 1);
}

/*
 * Prepare the beginning of a remote text for an error: one line, in the database's encoding,
 * with the API key replaced wherever it occurs, in any case.  NULL if there is nothing to show.
 *
 * An escape, such as those of JSON, URLs and HTML, may hide the key.  The text ends before the
 * first word that has one; what JSON has escaped in Omni's own messages is no longer so here.
 *
 * Read more than is shown: the key may begin in the shown part and end behind it.
 */
static char *
quote(const char *bytes, size_t length, const char *key)
{
	size_t		key_length = strlen(key);
	StringInfoData text;
	StringInfoData result;
	char	   *lower;
	char	   *lower_key = lower_case(key);
	int			shown;
	int			word = 0;		/* where the last word begins, in the result */
	bool		cut = length > MAX_READ;

	initStringInfo(&text);
	shown = clean(bytes, Min(length, MAX_READ + key_length), &text);
	lower = lower_case(text.data);

	initStringInfo(&result);
	for (int i = 0; i < shown;)
	{
		if (strncmp(lower + i, lower_key, key_length) == 0)
		{
			appendStringInfoString(&result, "[API key]");
			i += key_length;
			continue;
		}
		if (is_escape(text.data + i))
		{
			result.len = word;
			cut = true;
			break;
		}
		if (text.data[i] == ' ')
			word = result.len;
		appendStringInfoChar(&result, text.data[i++]);
	}
	while (result.len > 0 && result.data[result.len - 1] == ' ')
		result.len--;
	result.data[result.len] = '\0';
	if (result.len > 0 && cut)
		appendStringInfoString(&result, "...");
	return result.len > 0 ? result.data : NULL;
}

/* Return whether a text begins with an escape: "\u006f", "%6f", "&#111;", "&amp;". */
static bool
is_escape(const char *text)
{
	const unsigned char *next = (const unsigned char *) text + 1;

	return text[0] == '\\' || (text[0] == '%' && isxdigit(next[0]) && isxdigit(next[1])) ||
		(text[0] == '&' && (next[0] == '#' || isalpha(next[0])));
}

/*
 * Append remote bytes, which should be UTF-8, to a text as one line in the database's
 * encoding.  Replace invalid and unsupported characters by question marks, and sequences of
 * invisible ones by a space.  Return the length of the text that the first MAX_READ bytes make.
 */
static int
clean(const char *bytes, size_t length, StringInfo text)
{
	int			shown = -1;
	size_t		used;

	for (size_t i = 0; i < length; i += used)
	{
		const unsigned char *c = (const unsigned char *) bytes + i;
		bool		space = false;

		if (i >= MAX_READ && shown < 0)
			shown = text->len;
		used = *c < 0x80 ? 1 : *c < 0xe0 ? 2 : *c < 0xf0 ? 3 : 4;
		if (used == 1)
			space = *c <= ' ' || *c == 0x7f;
		else if (used > length - i || !pg_utf8_islegal(c, used))
			used = 1;
		else
			space = is_invisible(utf8_to_unicode(c));

		if (!space && (*c < 0x80 || (used > 1 && GetDatabaseEncoding() == PG_UTF8)))
			appendBinaryStringInfo(text, (const char *) c, used);
		else if (!space)
			appendStringInfoChar(text, '?');
		else if (text->len > 0 && text->data[text->len - 1] != ' ')
			appendStringInfoChar(text, ' ');
	}
	return shown >= 0 ? shown : text->len;
}

/*
 * Return whether a character outside of ASCII is invisible: one of Unicode's categories Cc, Cf,
 * Zl and Zp, or a noncharacter such as U+FFFE.
 */
static bool
is_invisible(pg_wchar character)
{
	static const struct
	{
		pg_wchar	first;
		pg_wchar	last;
	}			ranges[] = {
		{0x80, 0x9f}, {0xad, 0xad}, {0x600, 0x605}, {0x61c, 0x61c}, {0x6dd, 0x6dd},
		{0x70f, 0x70f}, {0x890, 0x891}, {0x8e2, 0x8e2}, {0x180e, 0x180e},
		{0x200b, 0x200f}, {0x2028, 0x202e}, {0x2060, 0x206f}, {0xfdd0, 0xfdef},
		{0xfeff, 0xfeff}, {0xfff9, 0xfffb}, {0x110bd, 0x110bd}, {0x110cd, 0x110cd},
		{0x13430, 0x1343f}, {0x1bca0, 0x1bca3}, {0x1d173, 0x1d17a}, {0xe0000, 0xe007f}
	};

	for (int i = 0; i < lengthof(ranges); i++)
	{
		if (character >= ranges[i].first && character <= ranges[i].last)
			return true;
	}
	return (character & 0xfffe) == 0xfffe;
}

/* Copy a text, with ASCII letters in lower case; palloc'd. */
static char *
lower_case(const char *text)
{
	char	   *copy = pstrdup(text);

	for (char *c = copy; *c != '\0'; c++)
		*c = pg_ascii_tolower(*c);
	return copy;
}
