/*-------------------------------------------------------------------------
 *
 * omni_refresh.h
 *		What the files of the extension share, by the file that defines it.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_REFRESH_H
#define OMNI_REFRESH_H

#include "datatype/timestamp.h"
#include "fmgr.h"
#include "port/atomics.h"
#include "postmaster/bgworker.h"
#include "storage/dsm.h"
#include "utils/array.h"
#include "utils/jsonb.h"
#include "utils/uuid.h"

/* Defined by the Makefile from the control file */
#ifndef OMNI_REFRESH_VERSION
#error "OMNI_REFRESH_VERSION is not defined"
#endif

#define OMNI_EXTENSION "omni_refresh"	/* also the name of the FDW */

/*
 * How long a URL may be, in bytes: servers and proxies commonly take 8 kB.  A longer
 * one not only is refused; with HTTP/2, it ends the connection and the requests of
 * others on it.  A base URL has a host's name, of at most 253 bytes, and a port.
 */
#define OMNI_MAX_URL		8000
#define OMNI_MAX_BASE_URL	300

/* What of it is left for the path and the query */
#define OMNI_MAX_PATH		(OMNI_MAX_URL - OMNI_MAX_BASE_URL)

/* An answer of Omni's is a few hundred bytes, a page of models some 100 kB */
#define OMNI_MAX_ANSWER		(1024 * 1024)

/* No wait that Omni asks for is longer, in microseconds */
#define OMNI_MAX_WAIT	USECS_PER_HOUR

/*
 * An error in ereport's terms, as plain data: it is made in the worker, crosses
 * shared memory, and is raised in the caller.  Longer texts are clipped; a
 * remote text is redacted before it gets here.
 */
typedef struct OmniError
{
	int			sqlstate;		/* 0 means no error */
	char		message[512];
	char		detail[1024];	/* may be empty */
	char		hint[512];		/* may be empty */
} OmniError;

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
	char		policy[OMNI_MAX_POLICY];
	bool		has_reset_at;
	TimestampTz reset_at;		/* if has_reset_at */
	NameData	server;
	NameData	requested_by;	/* role whose key is used ... */
	Oid			role;			/* ... and its OID */
	TimestampTz requested_at;
} OmniRequest;

/* Where and how to reach Omni: the options of a server and a user mapping */
typedef struct OmniTarget
{
	char	   *base_url;
	char	   *ca_file;		/* NULL: the system's */
	char	   *proxy;			/* NULL: none */
	int			connect_timeout;	/* ms */
	int			timeout;		/* ms, of one attempt */
	int			rate_limit;		/* requests a minute, 0 means no limit */
	char	   *key_file;		/* NULL: key is set */
	char	   *key;
} OmniTarget;

/* How far an attempt came, in the order of events */
typedef enum OmniPhase
{
	OMNI_PHASE_NAME,
	OMNI_PHASE_CONNECT,
	OMNI_PHASE_TLS,
	OMNI_PHASE_WAIT,			/* for the first byte of the answer */
	OMNI_PHASE_READ
} OmniPhase;

/* What became of one HTTP request; strings live as long as the transfer */
typedef struct OmniAnswer
{
	bool		failed;			/* no complete answer: see the next fields */
	OmniPhase	phase;			/* where it failed */
	bool		timed_out;
	bool		retryable;		/* the same request might fare better later */
	bool		too_large;		/* the answer was longer than we accept */
	const char *reason;			/* libcurl's words */
	bool		at_proxy;		/* it failed at the proxy, not at the host */
	int			proxy_status;	/* HTTP status by which the proxy refused to
								 * connect, 0 when there was none */
	bool		tls_version;	/* no version of TLS that both sides accept */
	bool		no_tls;			/* the other side does not speak TLS */

	bool		sent;			/* some of the request left this host */
	bool		withdrawn;		/* it did not, since it was not wanted any
								 * more */
	int			status;			/* HTTP status, 0 when there was none */
	const char *body;			/* not NUL-terminated; NULL when empty */
	size_t		length;			/* bytes in body */
	const char *redirect_url;	/* of a 3xx, or NULL */
	int			retry_after;	/* seconds, 0 when not given */
	int64		elapsed;		/* microseconds */

	/* if they were asked for: in the host's words, NULL when not known */
	const char *address;		/* whom it was connected to */
	const char *issuer;			/* of the certificate */
	const char *expires;		/* the certificate */
} OmniAnswer;

/* One HTTP request on its way */
typedef struct OmniTransfer
{
	bool		done;			/* then answer is valid */
	OmniAnswer	answer;
} OmniTransfer;

typedef struct OmniHttpRequest
{
	const char *method;
	const char *url;
	const char *bearer;
	const char *body;			/* JSON, or NULL */
	bool		probe;			/* on a connection of its own, which is told
								 * of */
	const char *ca_file;		/* NULL: the system's */
	const char *proxy;			/* NULL: none */
	int			connect_timeout;	/* ms */
	int			timeout;		/* ms */

	/*
	 * Asked just before the request goes out.  Runs inside libcurl: it may
	 * look at memory, no more.
	 */
	bool		(*is_wanted) (void *arg);
	void	   *arg;
} OmniHttpRequest;

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

#define OMNI_ORIGIN_CALL		"call"
#define OMNI_ORIGIN_ON_COMMIT	"on_commit"
#define OMNI_ORIGIN_RETRY		"retry"

/* A job, in a backend or in the worker's hands; see worker.c for its life */
typedef struct OmniJob
{
	int64		id;				/* 0 as long as there is no row */
	const char *origin;			/* as in the table */
	int64		merge_key;		/* if queued: a hash of what makes jobs alike */
	OmniRequest request;
	ArrayType  *schemas;		/* text[], or NULL */
	ArrayType  *tables;			/* text[], or NULL */
	int			attempts;		/* begun so far */
	Oid			database;		/* it was asked for in; not ours: a copy */
	TimestampTz renewed_at;		/* the newest request that it carries */

	/* of one that is followed */
	pg_uuid_t	job_id;			/* Omni's */
	TimestampTz sent_at;
} OmniJob;

/* What became of a row that was to be locked or changed */
typedef enum OmniRow
{
	OMNI_ROW_OURS,
	OMNI_ROW_LOCKED,			/* by another session */
	OMNI_ROW_GONE				/* deleted, or not of that status any more */
} OmniRow;

/* A place in the queue, which is ordered like this */
typedef struct OmniPlace
{
	Oid			role;
	NameData	server;
	pg_uuid_t	model;
} OmniPlace;

/* The first job of a role, server and model in the queue */
typedef struct OmniHead
{
	OmniPlace	place;
	TimestampTz run_at;
	bool		is_held;		/* nothing can be sent for it now */
	bool		is_due;			/* and not held */
	bool		has_more;		/* behind it, which are due, too */
} OmniHead;

/* What cannot be sent at the moment */
typedef struct OmniHeld
{
	List	   *servers;		/* names of those with enough in flight */
	List	   *roles;			/* "role server", with the role's OID: of those
								 * whose rate limit is reached */
} OmniHeld;

/* How a connection to Omni was made, as plain data */
typedef struct OmniProbe
{
	bool		begun;			/* else the error says why not */
	bool		answered;
	OmniPhase	phase;			/* where it failed, if not answered */
	int			http_status;
	int64		elapsed;		/* microseconds */
	int			rate_limit;		/* requests a minute, 0 means no limit */
	int			rate_left;		/* of them, for now */
	char		address[64];
	bool		secure;			/* by TLS */
	char		issuer[256];	/* empty where libcurl forgets it with the
								 * connection */
	char		expires[64];
} OmniProbe;

/* Those who share a rate limit */
typedef enum OmniRateClass
{
	OMNI_RATE_CALL,
	OMNI_RATE_JOB,
	OMNI_RATE_POLL
} OmniRateClass;

#define OMNI_RATE_CLASSES	(OMNI_RATE_POLL + 1)

/* How far the hand-over of a call has come */
typedef enum OmniCallState
{
	OMNI_CALL_WAITING,			/* nobody has taken it yet */
	OMNI_CALL_TAKEN,			/* the worker has it */
	OMNI_CALL_DONE,				/* the results are in */
	OMNI_CALL_LOST				/* the worker ended before that */
} OmniCallState;

/*
 * A call on its way from a backend to the worker and back: the head of a DSM
 * segment that the backend made.  The backend writes all but the results before
 * it hands the segment over; the worker writes the results before it sets the
 * state to OMNI_CALL_DONE.
 */
typedef struct OmniCall
{
	pg_atomic_uint32 state;		/* OmniCallState */
	pg_atomic_uint32 forsaken;	/* set when the caller has left */
	int			caller;			/* index of its PGPROC */
	int64		deadline;		/* end of call_timeout, by omni_clock() */
	OmniRequest request;		/* of a look-up: server and role only */
	Size		schemas;		/* offset of a flat text[] in the segment, 0
								 * if NULL */
	Size		tables;			/* likewise */
	Size		lookup;			/* offset of what to look up, as in
								 * "models?name=x"; 0: it is a job */
	Size		answer;			/* of a look-up: offset of room for the answer */
	bool		probe;			/* of a look-up: tell how it was reached */

	/* results */
	int64		job_id;			/* 0 when there is no row */
	Size		length;			/* of a look-up's answer, in bytes */
	OmniProbe	probed;
	OmniError	error;
	OmniError	start_error;	/* of the worker that was started for it */
} OmniCall;

/* A job as it stands in its table, for those who do something about it */
typedef struct OmniJobState
{
	OmniJob		job;
	char		status[16];
	int64		merged_into;	/* 0 if it is not */
	bool		uncommitted;	/* this transaction has written it */
} OmniJobState;

/* What is left to do in this database */
typedef struct OmniJobCounts
{
	int64		pending;
	int64		sending;
	int64		running;
	int64		stuck;			/* pending, and due for minutes */
	int64		foreign;		/* another database's, which will be canceled */
} OmniJobCounts;

/* in omni_refresh.c */
extern bool omni_is_preloaded;
extern char *omni_server;
extern int	omni_on_failure;
extern int	omni_call_timeout;
extern bool omni_enabled;
extern int	omni_idle_timeout;
extern int	omni_min_interval;
extern int	omni_retry_for;
extern int	omni_max_in_flight;
extern bool omni_track;
extern int	omni_track_timeout;
extern int	omni_retention;

#define OMNI_ON_FAILURE_ERROR	0
#define OMNI_ON_FAILURE_WARNING 1

extern void omni_error_set(OmniError *error, int sqlstate,
						   const char *format,...) pg_attribute_printf(3, 4);
extern void omni_error_detail(OmniError *error,
							  const char *format,...) pg_attribute_printf(2, 3);
extern void omni_error_hint(OmniError *error,
							const char *format,...) pg_attribute_printf(2, 3);
extern void omni_error_catch(OmniError *error, MemoryContext context);
extern void omni_error_report(const OmniError *error, int elevel);
extern char *omni_error_text(const OmniError *error);

/* in refresh.c */
extern void omni_job_init(OmniJob *job, const char *origin);
extern bool omni_may_request(const OmniJob *job, OmniError *error);
extern Datum omni_queue_job(OmniJob *job);
extern bool omni_in_recovery(OmniError *error);

/* in option.c */
extern bool omni_target_find(const char *servername, Oid role,
							 OmniTarget *target, OmniError *error);
extern bool omni_target_read_key(OmniTarget *target, OmniError *error);

/* in rendezvous.c */
extern OmniCall *omni_call_create(const OmniJob *job, const char *lookup,
								  dsm_segment **segment);
extern bool omni_call_run(dsm_segment *segment, OmniError *error);
extern void omni_call_end(dsm_segment *segment);
extern void omni_call_lost(const OmniCall *call, OmniError *error);
extern void omni_wake_on_commit(void);
extern bool omni_worker_wake(OmniError *error);
extern bool omni_worker_launch(Oid database, BackgroundWorkerHandle **handle);
extern bool omni_worker_begin(void);
extern void omni_worker_turn_back(void);
extern void omni_worker_attach(bool (*has_work) (void));
extern void omni_worker_hold(void);
extern void omni_worker_keep(void);
extern bool omni_worker_is_unwanted(void);
extern bool omni_worker_leave_if_idle(void);
extern bool omni_worker_take_flag(void);
extern dsm_segment *omni_worker_next_call(void);
extern void omni_call_finish(dsm_segment *segment, int64 job_id,
							 const OmniError *error);

/* in launcher.c */
extern void omni_launcher_register(void);

/* in worker.c */
extern bool omni_in_worker;

/* in table.c */
extern bool omni_tables_find(void);
extern bool omni_extension_is_same(void);
extern bool omni_tables_lock(void);
extern bool omni_tables_check(OmniError *error);

/* in event.c */
extern void omni_events_begin(void);
extern void omni_events_write(void);
extern bool omni_job_may_have_arrived(int64 id);

/* in notify.c */
extern void omni_notify_begin(void);
extern void omni_notify(int64 job, const char *status);
extern bool omni_notify_committed(void);
extern void omni_notify_send(void);
extern void omni_notify_end(void);

/* in job.c */
extern bool omni_job_begin(OmniJob *job, const char *url);
extern void omni_job_delay(OmniJob *job, int64 wait);
extern void omni_job_refuse(OmniJob *job, const OmniOutcome *outcome);
extern OmniRow omni_job_record(OmniJob *job, const OmniOutcome *outcome);
extern bool omni_job_any_unfinished(void);
extern Datum omni_job_queue(OmniJob *job);
extern Datum omni_job_read(int64 id);
extern bool omni_job_look(int64 id, OmniJobState *state);
extern Oid	omni_job_owner(void);
extern bool omni_job_count(OmniJobCounts *counts);
extern Datum omni_job_form(const OmniJob *job, const char *status,
						   const char *error);

/* in queue.c */
extern OmniRow *omni_job_lock(const int64 *ids, int count);
extern void omni_job_defer(int64 id, TimestampTz run_at);
extern bool omni_job_settle(const int64 *in_hand, int count);
extern OmniHead *omni_queue_heads(const OmniPlace *place, const OmniHeld *held, int limit,
								  int due_limit, int due_limit_of_server, int *count);
extern void omni_queue_merge(OmniHead *heads, int nheads);
extern OmniJobState *omni_queue_due(const OmniHead *heads, int nheads, int limit, int *count);
extern void omni_queue_cancel_copies(const OmniPlace *place);
extern OmniJobState *omni_job_due_running(const OmniHeld *held, int limit, int *count);
extern bool omni_job_next_running(bool *any_due, TimestampTz *next);
extern void omni_job_stop_following(void);
extern bool omni_job_prune(int64 *after, TimestampTz before, int limit);
extern bool omni_job_cancel(const OmniJob *job, const char *by);
extern void omni_job_recent(TimestampTz since,
							void (*tell) (int64 merge_key, TimestampTz sent_at));

/* in api.c */
extern char *omni_api_host(const char *text, bool with_scheme);
extern char *omni_api_job_url(const char *base_url, const OmniJob *job);
extern char *omni_api_job_body(const OmniJob *job);
extern char *omni_api_follow_url(const char *base_url, const pg_uuid_t *job_id);
extern char *omni_api_lookup_url(const char *base_url, const char *lookup);
extern Size omni_api_encoded_length(const char *text);
extern Size omni_api_path_length(const OmniJob *job);
extern bool omni_api_fits(const OmniJob *job);
extern char *omni_api_models_lookup(const char *name, const char *kind, const char *cursor);
extern void omni_api_job_outcome(const OmniJob *job, const char *key,
								 const OmniAnswer *answer, OmniOutcome *outcome);
extern bool omni_api_follow_outcome(const OmniJob *job, const char *key,
									const OmniAnswer *answer, OmniOutcome *outcome);
extern void omni_api_lookup_outcome(const OmniJob *job, const char *key,
									const OmniAnswer *answer, OmniOutcome *outcome);
extern void omni_api_probe_outcome(const OmniJob *job, const char *key,
								   const OmniAnswer *answer, OmniOutcome *outcome);
extern void omni_api_copy(char *buffer, Size size, const char *text, const char *key);
extern Jsonb *omni_api_json(const char *body, size_t length, char **why);
extern bool omni_api_uuid(const char *text, Datum *uuid);
extern bool omni_api_time(const char *text, Datum *time);
extern char *omni_api_member(JsonbContainer *object, const char *name);

/* in rate.c */
extern uint64 omni_rate_id(const char *host, const char *key);
extern int64 omni_rate_take(uint64 id, OmniRateClass class, int limit, bool *blocked);
extern int	omni_rate_left(uint64 id, int limit);
extern void omni_rate_block(uint64 id, int64 until);

/* in http.c */
extern OmniTransfer *omni_http_start(const OmniHttpRequest *request);
extern void omni_http_wait(long timeout, uint32 wait_event);

#endif							/* OMNI_REFRESH_H */
