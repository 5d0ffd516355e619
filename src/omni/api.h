/*-------------------------------------------------------------------------
 *
 * api.h
 *		Omni's REST API.  See api.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_API_H
#define OMNI_API_H

#include "datatype/timestamp.h"
#include "utils/array.h"
#include "utils/jsonb.h"
#include "utils/uuid.h"

#include "base/error.h"
#include "omni/http.h"
#include "omni/jobkind.h"

/*
 * The maximum length of a URL, in bytes: servers and proxies commonly accept 8 kB.  With
 * HTTP/2, a server may answer a longer one by closing the connection, which also ends the
 * other requests on it.  A base URL has a host name of at most 253 bytes, and a port.
 */
#define OMNI_MAX_URL		8000
#define OMNI_MAX_BASE_URL	300

/* The part of OMNI_MAX_URL for the path and the query */
#define OMNI_MAX_PATH		(OMNI_MAX_URL - OMNI_MAX_BASE_URL)

/* The longest Retry-After that is obeyed, in microseconds */
#define OMNI_MAX_WAIT		USECS_PER_HOUR

/* Maximum size of a cache policy's name, with its terminating NUL */
#define OMNI_MAX_POLICY		256

/* What a job asks for.  Plain data except for the two lists. */
typedef struct OmniRequest
{
	OmniKind	kind;
	pg_uuid_t	model;			/* if has_model */
	bool		has_model;		/* false in a look-up, and until
								 * omni_job_complete() */
	pg_uuid_t	branch;			/* if has_branch */
	bool		has_branch;
	bool		hard;			/* as given, or by default */
	bool		hard_named;		/* send the parameter hard_refresh */
	ArrayType  *schemas;		/* text[], or NULL */
	ArrayType  *tables;			/* text[], or NULL */
	char		policy[OMNI_MAX_POLICY];	/* empty: none */
	bool		has_reset_at;
	TimestampTz reset_at;		/* if has_reset_at */
	NameData	server;
	Oid			role;			/* whose key is used; known by its OID ... */
	NameData	requested_by;	/* ... and shown by the name that it had */
	Oid			caller;			/* role of the session, as of a wrapper's
								 * caller; 0 if it was dropped */
	NameData	called_by;		/* the name that it had, or empty */
	NameData	application;	/* application_name, may be empty */
	TimestampTz requested_at;
} OmniRequest;

/* What an attempt means for its job */
typedef struct OmniOutcome
{
	const char *status;			/* the job's status from now on */
	bool		again;			/* the job is not finished: go on with it ... */
	int64		delay;			/* ... after this time, in microseconds */
	const char *attempt_event;	/* the event to log, NULL: the status */
	bool		quiet;			/* log no event */
	bool		attempted;		/* it is the outcome of an HTTP request */
	bool		retryable;		/* the same request might fare better later */
	bool		few;			/* but not often: see OMNI_FEW_ATTEMPTS */
	bool		recovered;		/* the worker ended during the attempt */
	bool		may_have_arrived;	/* no answer of Omni's came, and Omni may
									 * have got the request */
	bool		slow_down;		/* send nothing with this key for a while */
	int			retry_after;	/* seconds, 0 when not given */
	bool		has_job_id;
	pg_uuid_t	job_id;			/* Omni's */
	int			http_status;	/* 0 when there was none */
	int64		elapsed;		/* microseconds */
	const char *note;			/* for the event, if there is no error */
	OmniError	error;			/* of the attempt ... */
	const OmniError *job_error; /* ... and of the job, NULL: the same */
} OmniOutcome;

extern char *omni_api_host(const char *text, bool with_scheme);
extern char *omni_api_job_url(const char *base_url, const OmniRequest *request);
extern char *omni_api_job_body(const OmniRequest *request);
extern char *omni_api_poll_url(const char *base_url, const pg_uuid_t *job_id);
extern char *omni_api_lookup_url(const char *base_url, const char *lookup);
extern Size omni_api_encoded_length(const char *text);
extern int	omni_api_name_length(const char *name);
extern int	omni_api_room(void);
extern Size omni_api_path_length(const OmniRequest *request);
extern bool omni_api_fits(const OmniRequest *request);
extern char *omni_api_models_lookup(const char *name, const char *kind, const char *cursor);
extern char *omni_api_model_lookup(const pg_uuid_t *model);
extern char *omni_api_schemas_lookup(const pg_uuid_t *model, const pg_uuid_t *branch);
extern void omni_api_job_outcome(const OmniRequest *request, const char *key,
								 const OmniAnswer *answer, OmniOutcome *outcome);
extern bool omni_api_poll_outcome(const OmniRequest *request, const char *key,
								  const OmniAnswer *answer, OmniOutcome *outcome);
extern void omni_api_lookup_outcome(const OmniRequest *request, const char *key,
									const OmniAnswer *answer, OmniOutcome *outcome);
extern void omni_api_probe_outcome(const OmniRequest *request, const char *key,
								   const OmniAnswer *answer, OmniOutcome *outcome);
extern bool omni_api_find_model(const OmniAnswer *answer, const pg_uuid_t *model, const char *key,
								char *name, Size size);
extern void omni_api_copy(char *buffer, Size size, const char *text, const char *key);
extern Jsonb *omni_api_json(const char *body, size_t length, char **why);
extern bool omni_api_is_policy(const char *text);
extern bool omni_api_uuid(const char *text, Datum *uuid);
extern bool omni_api_any_uuid(const char *text, pg_uuid_t *uuid);
extern bool omni_api_time(const char *text, Datum *time);
extern char *omni_api_member(JsonbContainer *object, const char *name);

#endif							/* OMNI_API_H */
