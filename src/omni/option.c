/*-------------------------------------------------------------------------
 *
 * option.c
 *		The options of foreign servers and user mappings: validate them, and check
 *		which role may use which server with which key.
 *
 * The permission model is SQL/MED's: a role that has USAGE on a server and a user
 * mapping for it (its own or PUBLIC's) may send requests with the key of that mapping.
 * A backend checks this before it hands over a call or queues a job, in its own
 * transaction's view, and does not read the key.  The worker checks it again when it
 * sends, since privileges and options may have changed.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "access/htup_details.h"
#include "access/reloptions.h"
#include "access/xact.h"
#include "catalog/pg_foreign_data_wrapper.h"
#include "catalog/pg_foreign_server.h"
#include "catalog/pg_user_mapping.h"
#include "commands/defrem.h"
#include "foreign/foreign.h"
#include "miscadmin.h"
#include "storage/fd.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/syscache.h"
#include "utils/varlena.h"

#include "base/compat.h"
#include "base/file.h"
#include "omni/api.h"
#include "omni/option.h"
#include "omni_refresh.h"

#define MAX_KEY_FILE_SIZE	4096	/* bytes; keys are shorter than 100 */
#define MAX_RATE_LIMIT		1000000 /* a minute; Omni gives 60, on request 500 */
#define MAX_TIMEOUT			3600	/* seconds; more would only hide trouble */

#define KEY_DETAIL			"An API key consists of printable ASCII characters without spaces."
#define SCHEME_HINT			"Give the key alone: \"Bearer\" is added when it is sent."

typedef struct Option
{
	const char *name;
	Oid			catalog;		/* of the objects that have this option */
	bool		superuser_only; /* only superusers may set it */
	void		(*check) (const char *name, const char *value);
} Option;

static void check_base_url(const char *name, const char *value);
static void check_duration(const char *name, const char *value);
static void check_rate_limit(const char *name, const char *value);
static void check_uuid(const char *name, const char *value);
static void check_policy(const char *name, const char *value);
static void check_proxy(const char *name, const char *value);
static void check_path(const char *name, const char *value);
static void check_key(const char *name, const char *value);

static const Option options[] = {
	{"base_url", ForeignServerRelationId, false, check_base_url},
	{"connect_timeout", ForeignServerRelationId, false, check_duration},
	{"timeout", ForeignServerRelationId, false, check_duration},
	{"rate_limit", ForeignServerRelationId, false, check_rate_limit},
	{"model", ForeignServerRelationId, false, check_uuid},
	{"branch", ForeignServerRelationId, false, check_uuid},
	{"cache_policy", ForeignServerRelationId, false, check_policy},
	{"proxy", ForeignServerRelationId, true, check_proxy},
	{"ca_file", ForeignServerRelationId, true, check_path},
	{"api_key_file", UserMappingRelationId, true, check_path},
	{"api_key", UserMappingRelationId, false, check_key},
};

static const Option *find_option(const char *name, Oid catalog);
pg_noreturn static void unrecognized_option(const char *name, Oid catalog);
static int	parse_duration(const char *value);
static pg_uuid_t *read_uuid(const char *value);
static bool find_server(const char *servername, Oid role, OmniTarget *target,
						ForeignServer **found, OmniError *error);
static bool find_mapping(const ForeignServer *server, Oid role,
						 OmniTarget *target, OmniError *error);
static const char *key_options(const ForeignServer *server, const char *action);
static bool may_use_key_file(const ForeignServer *server, OmniError *error);
static bool may_create_server(Oid role);
static bool is_key(const char *key);
static bool has_scheme(const char *key);

PG_FUNCTION_INFO_V1(omni_refresh_validator);

/* Validate the options of an object of the given catalog; raise an error if one is invalid. */
Datum
omni_refresh_validator(PG_FUNCTION_ARGS)
{
	List	   *list = untransformRelOptions(PG_GETARG_DATUM(0));
	Oid			catalog = PG_GETARG_OID(1);
	bool		has_base_url = false;
	bool		has_model = false;
	bool		has_branch = false;
	bool		has_key = false;
	ListCell   *cell;

	foreach(cell, list)
	{
		DefElem    *def = lfirst_node(DefElem, cell);
		const Option *option = find_option(def->defname, catalog);
		char	   *value;

		if (option == NULL)
			unrecognized_option(def->defname, catalog);

		if (option->superuser_only && !superuser())
			ereport(ERROR,
					(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
					 errmsg("permission denied for option \"%s\"", option->name),
					 errdetail("Only a superuser may set this option, or change other options of an object that has it."),
					 catalog == UserMappingRelationId ?
					 errhint("Ask a superuser to make the change, or use the option \"api_key\".") :
					 errhint("Ask a superuser to make the change.")));

		value = defGetString(def);
		option->check(option->name, value);

		if (option->catalog == UserMappingRelationId)
		{
			if (has_key)
				ereport(ERROR,
						(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
						 errmsg("options \"api_key\" and \"api_key_file\" cannot be given together"),
						 errhint("Drop one of them: OPTIONS (DROP api_key, ADD api_key_file '...').")));
			has_key = true;
		}
		if (strcmp(option->name, "base_url") == 0)
			has_base_url = true;
		else if (strcmp(option->name, "model") == 0)
			has_model = true;
		else if (strcmp(option->name, "branch") == 0)
			has_branch = true;
	}

	if (catalog == ForeignServerRelationId && !has_base_url)
		ereport(ERROR,
				(errcode(ERRCODE_FDW_OPTION_NAME_NOT_FOUND),
				 errmsg("option \"base_url\" is required"),
				 errhint("Give the address you log in to Omni with: OPTIONS (base_url 'https://acme.omniapp.co').")));
	if (has_branch && !has_model)
		ereport(ERROR,
				(errcode(ERRCODE_FDW_OPTION_NAME_NOT_FOUND),
				 errmsg("option \"branch\" requires the option \"model\""),
				 errdetail("A branch belongs to one model."),
				 errhint("Add the model with OPTIONS (ADD model '...'), or drop both with OPTIONS (DROP model, DROP branch).")));

	PG_RETURN_VOID();
}

static const Option *
find_option(const char *name, Oid catalog)
{
	for (int i = 0; i < lengthof(options); i++)
	{
		if (options[i].catalog == catalog && strcmp(options[i].name, name) == 0)
			return &options[i];
	}
	return NULL;
}

/* Raise an error that suggests the nearest valid name. */
static void
unrecognized_option(const char *name, Oid catalog)
{
	const Option *nearest = NULL;
	int			least = Max((int) strlen(name) / 2, 3);

	/* varstr_levenshtein() rejects longer texts */
	for (int i = 0; i < lengthof(options) && strlen(name) < NAMEDATALEN; i++)
	{
		int			distance;

		if (options[i].catalog != catalog)
			continue;
		distance = varstr_levenshtein(name, strlen(name), options[i].name,
									  strlen(options[i].name), 1, 1, 1, true);
		if (distance <= least)
		{
			least = distance;
			nearest = &options[i];
		}
	}

	ereport(ERROR,
			(errcode(ERRCODE_FDW_INVALID_OPTION_NAME),
			 errmsg("unrecognized option \"%s\"", name),
			 nearest != NULL ?
			 errhint("Perhaps you meant the option \"%s\".", nearest->name) :
			 catalog == ForeignServerRelationId ?
			 errhint("Options of a server are base_url, connect_timeout, timeout, rate_limit, model, branch, cache_policy, proxy and ca_file.") :
			 catalog == UserMappingRelationId ?
			 errhint("Options of a user mapping are api_key_file and api_key.") :
			 errhint("There are no options in this context.")));
}

/*
 * Parse a URL; raise an error if libcurl rejects it, or if it names a user.  Do not show a
 * value with "@", which may hold a password.  The caller must free the result with
 * curl_url_cleanup() before it raises an error.
 */
static CURLU *
parse_url(const char *name, const char *value)
{
	CURLU	   *url;
	CURLUcode	code;

	for (const char *c = value; *c != '\0'; c++)
	{
		if (*c <= ' ' || *c > '~')
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("invalid value for option \"%s\"", name),
					 errdetail("A URL consists of printable ASCII characters without spaces.")));
	}

	url = curl_url();
	if (url == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("out of memory")));
	code = curl_url_set(url, CURLUPART_URL, value,
						CURLU_DISALLOW_USER | CURLU_NON_SUPPORT_SCHEME);
	if (code != CURLUE_OK)
	{
		curl_url_cleanup(url);
		if (code == CURLUE_USER_NOT_ALLOWED)
			ereport(ERROR,
					(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
					 errmsg("invalid value for option \"%s\"", name),
					 errdetail("The URL must not name a user or a password.")));
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 strchr(value, '@') != NULL ?
				 errmsg("invalid value for option \"%s\"", name) :
				 errmsg("invalid value for option \"%s\": \"%s\"", name, value),
				 errdetail("This is not a URL."),
				 errhint("Give it in full, as in \"https://acme.omniapp.co\".")));
	}
	return url;
}

/* Return a part of a URL, empty if it is missing; palloc'd. */
static char *
url_part(CURLU *url, CURLUPart part)
{
	char	   *text = NULL;
	char	   *copy;

	if (curl_url_get(url, part, &text, 0) != CURLUE_OK)
		return pstrdup("");
	copy = pstrdup(text);
	curl_free(text);
	return copy;
}

static bool
is_loopback(const char *host)
{
	struct in_addr address;

	if (inet_pton(AF_INET, host, &address) == 1)
		return (ntohl(address.s_addr) >> 24) == 127;
	return strcmp(host, "[::1]") == 0 || pg_strcasecmp(host, "localhost") == 0;
}

/*
 * Check a base URL: the login host's, as a browser shows it, or with "/api", as Omni's
 * documentation shows it.  Allow http for loopback addresses only, which tests need: it would
 * send the key unencrypted.
 */
static void
check_base_url(const char *name, const char *value)
{
	CURLU	   *url = parse_url(name, value);
	char	   *scheme = url_part(url, CURLUPART_SCHEME);
	char	   *host = url_part(url, CURLUPART_HOST);
	char	   *path = url_part(url, CURLUPART_PATH);
	const char *detail = NULL;
	const char *after_scheme;
	bool		plain;

	curl_url_cleanup(url);

	plain = strcmp(scheme, "http") == 0 && is_loopback(host);

	/* libcurl accepts any number of slashes */
	after_scheme = strstr(value, "://");
	if (after_scheme == NULL || strchr("/?#", after_scheme[3]) != NULL)
		detail = "The scheme and \"://\" must be followed by the host.";
	else if (!plain && strcmp(scheme, "https") != 0)
		detail = "The scheme must be https, or http for a loopback address.";
	else if (strlen(value) > OMNI_MAX_BASE_URL)
		detail = psprintf("The URL must not be longer than %d bytes.", OMNI_MAX_BASE_URL);
	else if (strpbrk(value, "?#") != NULL)
		detail = "The URL must not have a query or a fragment.";
	else if (strcmp(path, "") != 0 && strcmp(path, "/") != 0 &&
			 strcmp(path, "/api") != 0 && strcmp(path, "/api/") != 0)
		detail = "The path must be empty or \"/api\".";

	if (detail != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid value for option \"%s\": \"%s\"", name, value),
				 errdetail("%s", detail),
				 errhint("Give the address you log in to Omni with, as in \"https://acme.omniapp.co\".")));

	if (plain && !superuser())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for a base URL without TLS"),
				 errdetail("Only a superuser may set one, or change other options of a server that has one."),
				 errhint("Use https.")));
}

static void
check_proxy(const char *name, const char *value)
{
	static const char *const schemes[] = {
		"http", "https", "socks4", "socks4a", "socks5", "socks5h"
	};
	CURLU	   *url = parse_url(name, value);
	char	   *scheme = url_part(url, CURLUPART_SCHEME);

	curl_url_cleanup(url);
	for (int i = 0; i < lengthof(schemes); i++)
	{
		if (strcmp(scheme, schemes[i]) == 0)
			return;
	}
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("invalid value for option \"%s\": \"%s\"", name, value),
			 errdetail("The scheme must be http, https, socks4, socks4a, socks5 or socks5h.")));
}

/* Return a duration in ms, given in seconds or with a unit; 0 if it is invalid or out of range. */
static int
parse_duration(const char *value)
{
	double		seconds;

	if (!parse_real(value, &seconds, GUC_UNIT_S, NULL) ||
		!(seconds >= 0.001 && seconds <= MAX_TIMEOUT))
		return 0;
	return (int) (seconds * 1000);
}

static void
check_duration(const char *name, const char *value)
{
	if (parse_duration(value) == 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid value for option \"%s\": \"%s\"", name, value),
				 errhint("Give a duration between \"1 ms\" and \"1 h\"; without a unit, it is in seconds.")));
}

static void
check_rate_limit(const char *name, const char *value)
{
	int			limit;

	if (!parse_int(value, &limit, 0, NULL) || limit < 0 || limit > MAX_RATE_LIMIT)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid value for option \"%s\": \"%s\"", name, value),
				 errhint("Give a number of requests a minute between 0 and %d; 0 means no limit.",
						 MAX_RATE_LIMIT)));
}

/* Return the uuid of a model or branch, palloc'd; NULL if the value is not one. */
static pg_uuid_t *
read_uuid(const char *value)
{
	pg_uuid_t  *uuid = palloc(sizeof(pg_uuid_t));

	return omni_api_any_uuid(value, uuid) ? uuid : NULL;
}

static void
check_uuid(const char *name, const char *value)
{
	if (read_uuid(value) == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid value for option \"%s\": \"%s\"", name, value),
				 errhint("Give a uuid; omni_refresh_models() lists those of the models and of their branches.")));
}

static void
check_policy(const char *name, const char *value)
{
	if (!omni_api_is_policy(value))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid value for option \"%s\": \"%s\"", name, value),
				 errhint("Give the name of a cache policy, which may have %d bytes.", OMNI_MAX_POLICY - 1)));
}

static void
check_path(const char *name, const char *value)
{
	if (!is_absolute_path(value))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid value for option \"%s\": \"%s\"", name, value),
				 errhint("Give an absolute path on the database server's host.")));
}

/* Check an API key.  Never show the value, not even an invalid one. */
static void
check_key(const char *name, const char *value)
{
	if (!is_key(value))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid value for option \"%s\"", name),
				 errdetail(KEY_DETAIL),
				 has_scheme(value) ? errhint(SCHEME_HINT) : 0));
}

/* Return whether a text can be a key, which must not end the line of its HTTP header. */
static bool
is_key(const char *key)
{
	if (*key == '\0')
		return false;
	for (; *key != '\0'; key++)
	{
		if (*key <= ' ' || *key > '~')
			return false;
	}
	return true;
}

/* Return whether a text begins like the value of the HTTP header that has the key. */
static bool
has_scheme(const char *key)
{
	return pg_strncasecmp(key, "Bearer ", strlen("Bearer ")) == 0;
}

/*
 * Check that a role may use a server, and read the options of both server and user mapping.
 * Return false and set *error if it may not.  Needs a transaction; the strings in *target are
 * palloc'd.
 */
bool
omni_target_find(const char *servername, Oid role, OmniTarget *target, OmniError *error)
{
	ForeignServer *server;

	memset(target, 0, sizeof(*target));
	return find_server(servername, role, target, &server, error) &&
		find_mapping(server, role, target, error);
}

/*
 * Set the error for a server or user mapping that this transaction has changed.  The format of
 * the message has the server's name as its argument.
 */
static bool
not_committed(OmniError *error, const char *format, const char *servername)
{
	omni_error_set(error, ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, format, servername);
	omni_error_detail(error, "The request is sent by a background worker, which sees only what is committed.");
	omni_error_hint(error, "Commit first.");
	return false;
}

static bool
find_server(const char *servername, Oid role, OmniTarget *target,
			ForeignServer **found, OmniError *error)
{
	ForeignServer *server = GetForeignServerByName(servername, true);
	HeapTuple	tuple;
	bool		own;
	ListCell   *cell;

	if (server == NULL)
	{
		omni_error_set(error, ERRCODE_UNDEFINED_OBJECT,
					   "server \"%s\" does not exist", servername);
		if (may_create_server(role))
			omni_error_hint(error, "Create it with CREATE SERVER %s FOREIGN DATA WRAPPER " OMNI_EXTENSION
							" OPTIONS (base_url 'https://acme.omniapp.co'), or name another one in the setting \"omni_refresh.server\".",
							quote_identifier(servername));
		else
			omni_error_hint(error, "Ask a superuser to create it, or to GRANT USAGE ON FOREIGN DATA WRAPPER " OMNI_EXTENSION
							" TO %s; or name another one in the setting \"omni_refresh.server\".",
							quote_identifier(GetUserNameFromId(role, false)));
		return false;
	}
	if (strcmp(GetForeignDataWrapper(server->fdwid)->fdwname, OMNI_EXTENSION) != 0)
	{
		omni_error_set(error, ERRCODE_WRONG_OBJECT_TYPE,
					   "server \"%s\" does not belong to the foreign-data wrapper \"%s\"",
					   servername, OMNI_EXTENSION);
		omni_error_hint(error, "Name a server of that wrapper in the setting \"omni_refresh.server\".");
		return false;
	}
	if (object_aclcheck(ForeignServerRelationId, server->serverid, role, ACL_USAGE) != ACLCHECK_OK)
	{
		omni_error_set(error, ERRCODE_INSUFFICIENT_PRIVILEGE,
					   "permission denied for foreign server %s", servername);
		omni_error_hint(error, "The server's owner can grant it: GRANT USAGE ON FOREIGN SERVER %s TO %s.",
						quote_identifier(servername),
						quote_identifier(GetUserNameFromId(role, false)));
		return false;
	}

	tuple = SearchSysCache1(FOREIGNSERVEROID, ObjectIdGetDatum(server->serverid));
	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for foreign server %u", server->serverid);
	own = TransactionIdIsCurrentTransactionId(HeapTupleHeaderGetXmin(tuple->t_data));
	ReleaseSysCache(tuple);
	if (own)
		return not_committed(error, "server \"%s\" was changed by this transaction", servername);

	target->connect_timeout = 10000;
	target->timeout = 30000;
	target->rate_limit = 60;
	foreach(cell, server->options)
	{
		DefElem    *def = lfirst_node(DefElem, cell);
		char	   *value = defGetString(def);

		if (strcmp(def->defname, "base_url") == 0)
			target->base_url = value;
		else if (strcmp(def->defname, "ca_file") == 0)
			target->ca_file = value;
		else if (strcmp(def->defname, "proxy") == 0)
			target->proxy = value;
		else if (strcmp(def->defname, "connect_timeout") == 0)
			target->connect_timeout = parse_duration(value);
		else if (strcmp(def->defname, "timeout") == 0)
			target->timeout = parse_duration(value);
		else if (strcmp(def->defname, "rate_limit") == 0)
			(void) parse_int(value, &target->rate_limit, 0, NULL);
		else if (strcmp(def->defname, "model") == 0)
			target->model = read_uuid(value);
		else if (strcmp(def->defname, "branch") == 0)
			target->branch = read_uuid(value);
		else if (strcmp(def->defname, "cache_policy") == 0 && omni_api_is_policy(value))
			target->cache_policy = value;
	}
	*found = server;
	return true;
}

static bool
find_mapping(const ForeignServer *server, Oid role, OmniTarget *target, OmniError *error)
{
	const char *servername = server->servername;
	char	   *rolename = GetUserNameFromId(role, false);
	HeapTuple	tuple;
	bool		is_public;
	bool		own;
	Datum		datum;
	bool		isnull;
	ListCell   *cell;

	tuple = SearchSysCache2(USERMAPPINGUSERSERVER, ObjectIdGetDatum(role),
							ObjectIdGetDatum(server->serverid));
	is_public = !HeapTupleIsValid(tuple);
	if (is_public)
		tuple = SearchSysCache2(USERMAPPINGUSERSERVER, ObjectIdGetDatum(InvalidOid),
								ObjectIdGetDatum(server->serverid));
	if (!HeapTupleIsValid(tuple))
	{
		omni_error_set(error, ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
					   "user mapping for \"%s\" on server \"%s\" does not exist",
					   rolename, servername);
		omni_error_hint(error, "Create it with CREATE USER MAPPING FOR %s SERVER %s %s.",
						quote_identifier(rolename), quote_identifier(servername), key_options(server, ""));
		return false;
	}

	own = TransactionIdIsCurrentTransactionId(HeapTupleHeaderGetXmin(tuple->t_data));
	datum = SysCacheGetAttr(USERMAPPINGUSERSERVER, tuple,
							Anum_pg_user_mapping_umoptions, &isnull);
	foreach(cell, isnull ? NIL : untransformRelOptions(datum))
	{
		DefElem    *def = lfirst_node(DefElem, cell);

		if (strcmp(def->defname, "api_key") == 0)
			target->key = defGetString(def);
		else if (strcmp(def->defname, "api_key_file") == 0)
			target->key_file = defGetString(def);
	}
	ReleaseSysCache(tuple);

	if (own)
		return not_committed(error, "user mapping for server \"%s\" was changed by this transaction", servername);
	if (target->key == NULL && target->key_file == NULL)
	{
		omni_error_set(error, ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
					   "user mapping for \"%s\" on server \"%s\" has no API key",
					   rolename, servername);
		omni_error_hint(error, "Add it with ALTER USER MAPPING FOR %s SERVER %s %s.",
						is_public ? "PUBLIC" : quote_identifier(rolename), quote_identifier(servername),
						key_options(server, "ADD "));
		return false;
	}
	if (target->key_file != NULL && !may_use_key_file(server, error))
	{
		/*
		 * The worker would retry if key_file were set, as it does for a file
		 * that it cannot read.
		 */
		target->key_file = NULL;
		return false;
	}
	return true;
}

/*
 * Return the OPTIONS clause that gives a key to a user mapping of the server, followed by
 * advice.  A key in a file comes first: the text of a statement may reach the server's log.
 */
static const char *
key_options(const ForeignServer *server, const char *action)
{
	if (superuser_arg(server->owner))
		return psprintf("OPTIONS (%sapi_key_file '...') as a superuser, or with (%sapi_key '...') if the statement may appear in the server's log",
						action, action);
	return psprintf("OPTIONS (%sapi_key '...'); \"api_key_file\" needs a server that a superuser owns", action);
}

/* Whether a role may create servers of our wrapper. */
static bool
may_create_server(Oid role)
{
	Oid			wrapper = get_foreign_data_wrapper_oid(OMNI_EXTENSION, true);

	return OidIsValid(wrapper) &&
		object_aclcheck(ForeignDataWrapperRelationId, wrapper, role, ACL_USAGE) == ACLCHECK_OK;
}

/*
 * Check that only superusers can alter the server of a mapping with a key file.  Any
 * other owner could have the key sent to a host of its own: the validator does not see
 * what the options were before, and thus cannot keep proxy and ca_file from being dropped.
 */
static bool
may_use_key_file(const ForeignServer *server, OmniError *error)
{
	if (superuser_arg(server->owner))
		return true;
	omni_error_set(error, ERRCODE_INSUFFICIENT_PRIVILEGE,
				   "server \"%s\" must be owned by a superuser for its mappings to use \"api_key_file\"",
				   server->servername);
	omni_error_detail(error, "Its owner \"%s\" is not a superuser and could redirect the key.",
					  GetUserNameFromId(server->owner, false));
	omni_error_hint(error, "Have a superuser run ALTER SERVER %s OWNER TO CURRENT_USER, or use the option \"api_key\".",
					quote_identifier(server->servername));
	return false;
}

/*
 * Read target->key from target->key_file, if that is set, without the white space around it.
 * Return false and set *error if that fails.  Open the file without blocking: a FIFO or a
 * device must not block the worker.
 */
bool
omni_target_read_key(OmniTarget *target, OmniError *error)
{
	const char *path = target->key_file;
	char	   *key;
	char	   *end;
	struct stat st;
	ssize_t		length = -1;
	int			fd;

	if (path == NULL)
		return true;

	key = palloc(MAX_KEY_FILE_SIZE + 1);
	fd = OpenTransientFile(path, O_RDONLY | O_NONBLOCK | PG_BINARY);
	if (fd >= 0 && fstat(fd, &st) == 0)
	{
		if (!S_ISREG(st.st_mode))
			errno = EINVAL;
		else if (st.st_size > MAX_KEY_FILE_SIZE)
			errno = EFBIG;
		else
			length = read(fd, key, MAX_KEY_FILE_SIZE);
	}
	if (length < 0)
	{
		int			reason = errno;
		char		denial[2 * MAXPGPATH] = "";

		omni_error_set(error, ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
					   "could not read API key file \"%s\": %s", path, strerror(reason));
		if (reason == EACCES)
			omni_file_explain_denial(path, denial, sizeof(denial));
		omni_error_detail(error, "%s", denial);
		omni_error_hint(error, "The file must be a regular one of at most %d bytes that the database server's operating system user may read.",
						MAX_KEY_FILE_SIZE);
	}
	if (fd >= 0)
		CloseTransientFile(fd);
	if (length < 0)
		return false;

	end = key + length;
	while (end > key && isspace((unsigned char) end[-1]))
		end--;
	while (key < end && isspace((unsigned char) *key))
		key++;
	*end = '\0';
	if (!is_key(key) || key + strlen(key) != end)
	{
		omni_error_set(error, ERRCODE_INVALID_AUTHORIZATION_SPECIFICATION,
					   "API key file \"%s\" does not hold an API key", path);
		omni_error_detail(error, KEY_DETAIL);
		if (has_scheme(key))
			omni_error_hint(error, SCHEME_HINT);
		return false;
	}
	target->key = key;
	return true;
}
