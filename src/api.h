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

#include "error.h"
#include "http.h"

/*
 * How long a URL may be, in bytes: servers and proxies commonly take 8 kB.  A longer
 * one not only is refused; with HTTP/2, it ends the connection and the requests of
 * others on it.  A base URL has a host's name, of at most 253 bytes, and a port.
 */
#define OMNI_MAX_URL		8000
#define OMNI_MAX_BASE_URL	300

/* What of it is left for the path and the query */
#define OMNI_MAX_PATH		(OMNI_MAX_URL - OMNI_MAX_BASE_URL)

/* No wait that Omni asks for is longer, in microseconds */
#define OMNI_MAX_WAIT	USECS_PER_HOUR

/* Bytes of a cache policy's name, with its end */
#define OMNI_MAX_POLICY		256

typedef enum OmniKind
{
	OMNI_KIND_SCHEMA,			/* refresh a model of the schema */
	OMNI_KIND_CACHE				/* reset a cache policy */
} OmniKind;

/* What a job asks for, as plain data, but for its two lists */
typedef struct OmniRequest
{
	OmniKind	kind;
	pg_uuid_t	model;
	pg_uuid_t	branch;			/* if has_branch */
	bool		has_branch;
	bool		hard;			/* what is in effect */
	bool		hard_named;		/* say so in the request */
	ArrayType  *schemas;		/* text[], or NULL */
	ArrayType  *tables;			/* text[], or NULL */
	char		policy[OMNI_MAX_POLICY];
	bool		has_reset_at;
	TimestampTz reset_at;		/* if has_reset_at */
	NameData	server;
	NameData	requested_by;	/* role whose key is used ... */
	Oid			role;			/* ... and its OID */
	TimestampTz requested_at;
} OmniRequest;

/* What an attempt means for its job */
typedef struct OmniOutcome
{
	const char *status;			/* the job's status from now on */
	bool		again;			/* that is no end: it goes on ... */
	int64		delay;			/* ... after so many microseconds */
	const char *attempt_event;	/* of an attempt, if not the status */
	bool		quiet;			/* no event at all */
	bool		retryable;		/* the same request might fare better later */
	bool		may_have_arrived;	/* there was no answer, and Omni may be at
									 * it */
	bool		slow_down;		/* Omni wants to be left alone for a while */
	int			retry_after;	/* seconds, 0 when not given */
	bool		has_job_id;
	pg_uuid_t	job_id;			/* Omni's */
	int			http_status;	/* 0 when there was none */
	int64		elapsed;		/* microseconds */
	OmniError	error;			/* of the attempt ... */
	const OmniError *job_error; /* ... and of the job, if that is another one */
} OmniOutcome;

extern char *omni_api_host(const char *text, bool with_scheme);
extern char *omni_api_job_url(const char *base_url, const OmniRequest *request);
extern char *omni_api_job_body(const OmniRequest *request);
extern char *omni_api_follow_url(const char *base_url, const pg_uuid_t *job_id);
extern char *omni_api_lookup_url(const char *base_url, const char *lookup);
extern Size omni_api_encoded_length(const char *text);
extern Size omni_api_path_length(const OmniRequest *request);
extern bool omni_api_fits(const OmniRequest *request);
extern char *omni_api_models_lookup(const char *name, const char *kind, const char *cursor);
extern void omni_api_job_outcome(const OmniRequest *request, const char *key,
								 const OmniAnswer *answer, OmniOutcome *outcome);
extern bool omni_api_follow_outcome(const OmniRequest *request, const char *key,
									const OmniAnswer *answer, OmniOutcome *outcome);
extern void omni_api_lookup_outcome(const OmniRequest *request, const char *key,
									const OmniAnswer *answer, OmniOutcome *outcome);
extern void omni_api_probe_outcome(const OmniRequest *request, const char *key,
								   const OmniAnswer *answer, OmniOutcome *outcome);
extern void omni_api_copy(char *buffer, Size size, const char *text, const char *key);
extern Jsonb *omni_api_json(const char *body, size_t length, char **why);
extern bool omni_api_uuid(const char *text, Datum *uuid);
extern bool omni_api_time(const char *text, Datum *time);
extern char *omni_api_member(JsonbContainer *object, const char *name);

#endif							/* OMNI_API_H */
