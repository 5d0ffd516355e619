/*-------------------------------------------------------------------------
 *
 * job.h
 *		Jobs, the queue and the event log: what the files of the tables' layer offer.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_JOB_H
#define OMNI_JOB_H

#include "nodes/pg_list.h"
#include "storage/itemptr.h"

#include "base/error.h"
#include "omni/api.h"
#include "queue/lane.h"

#define OMNI_ORIGIN_CALL		"call"
#define OMNI_ORIGIN_ON_COMMIT	"on_commit"
#define OMNI_ORIGIN_RETRY		"retry"
#define OMNI_ORIGIN_DDL			"ddl"

/* A job, in a backend or in the worker; src/README describes its life. */
typedef struct OmniJob
{
	int64		id;				/* 0 as long as there is no row */
	const char *origin;			/* OMNI_ORIGIN_* */
	int64		retry_of;		/* id of the job that this one repeats, or 0;
								 * not read from rows */
	int64		merge_key;		/* of a queued job: a hash of the columns in
								 * which merged jobs agree */
	OmniRequest request;
	int			attempts;		/* how many have begun */
	bool		may_have_arrived;	/* an attempt has ended without an answer,
									 * so that Omni may have got it */
	int			few_failures;	/* answers in a row that allow a few more
								 * attempts only */
	int			recoveries;		/* since Omni last answered */
	Oid			database;		/* where it was requested; if this is another
								 * one, the row is a copy */
	TimestampTz renewed_at;		/* time of the newest request that it carries;
								 * of a reset, not before its first attempt */

	/* of a running job */
	pg_uuid_t	job_id;			/* Omni's */
	TimestampTz sent_at;
} OmniJob;

/* The result of locking or changing a row */
typedef enum OmniRow
{
	OMNI_ROW_OURS,
	OMNI_ROW_LOCKED,			/* by another session */
	OMNI_ROW_GONE				/* deleted, or no longer has that status */
} OmniRow;

/* The version of a row that this transaction has inserted */
typedef struct OmniRowVersion
{
	Oid			table;			/* InvalidOid if the version is not known */
	Oid			file;			/* the table's relfilenode */
	ItemPointerData tid;
} OmniRowVersion;

/* A place in the queue, which is ordered by these fields */
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
	bool		is_held;		/* due or not, its role is held */
	bool		is_due;			/* and not held */
	bool		has_more;		/* other due jobs are behind it */
	bool		any_free;		/* no refresh holds some of its due resets */
	TimestampTz held_since;		/* since when refreshes hold others, or 0 */
} OmniHead;

/* What is held at the moment */
typedef struct OmniHeld
{
	List	   *roles;			/* roles with enough in flight, as "OID", and
								 * roles that are throttled or have enough in
								 * flight at a server, as "OID server" */
} OmniHeld;

/* A job as its row has it */
typedef struct OmniJobState
{
	OmniJob		job;
	char		status[16];
	int64		merged_into;	/* id of its carrier, or 0 */
	bool		uncommitted;	/* this transaction has written the row */
} OmniJobState;

/* Numbers of unfinished jobs in this database */
typedef struct OmniJobCounts
{
	int64		pending;
	int64		sending;
	int64		running;
	int64		stuck;			/* pending, and due for minutes, but for
								 * resets that wait for a refresh */
	int64		foreign;		/* copies of another database's jobs */
} OmniJobCounts;

/* This process is the background worker, which has overridden settings and search_path. */
extern bool omni_in_worker;

/* in table.c */
extern bool omni_tables_find(void);
extern bool omni_extension_is_same(void);
extern bool omni_tables_lock(void);
extern bool omni_watch_tables_lock(void);
extern bool omni_tables_check(OmniError *error);

/* in event.c */
extern void omni_events_begin(void);
extern void omni_events_write(void);
extern void omni_event_add_waiting(const OmniJob *job, const char *reason);
extern void omni_event_add_changed(const OmniJob *job, const char *changes);

/* in notify.c */
extern void omni_notify_begin(void);
extern void omni_notify(int64 job, const char *status);
extern void omni_notify_committed(void);
extern int	omni_notify_left(int *dropped);
extern void omni_notify_send(void);
extern void omni_notify_sent(void);

/* in job.c */
extern bool omni_job_begin(OmniJob *job, const char *url);
extern bool omni_job_is_first_reset(const OmniJob *job);
extern void omni_job_delay(OmniJob *job, int64 wait);
extern void omni_job_defer(int64 id, TimestampTz run_at);
extern void omni_job_refuse(OmniJob *job, const OmniOutcome *outcome);
extern OmniRow omni_job_record(OmniJob *job, const OmniOutcome *outcome);
extern bool omni_job_any_unfinished(void);
extern Datum omni_job_queue(const OmniJob *job, OmniRowVersion *version);
extern void omni_job_add(OmniJob *job);
extern bool omni_job_is_unchanged(const OmniRowVersion *version);
extern Datum omni_job_read(int64 id);
extern Datum omni_job_read_outcome(int64 id, int64 carrier);
extern int64 omni_job_last_retry(const OmniJob *job);
extern bool omni_job_look(int64 id, OmniJobState *state);
extern bool omni_job_look_carrier(int64 id, OmniJobState *own, OmniJobState *carrier);
extern int64 omni_job_carrier(int64 id);
extern Oid	omni_job_owner(void);
extern bool omni_job_count(OmniJobCounts *counts);
extern Datum omni_job_form(const OmniJob *job, const char *status,
						   const char *error);

/* in queue.c */
extern OmniRow *omni_job_lock(const int64 *ids, int count);
extern bool omni_job_settle(const int64 *in_flight, int count,
							void (*tell) (const OmniJob *job, const OmniOutcome *outcome));
extern OmniHead *omni_queue_heads(const OmniPlace *place, const OmniHeld *held, int limit,
								  int due_limit, int due_limit_of_server, int *count);

/* Merge at most this many heads at a time, since the rows of all are locked at once */
#define OMNI_MERGE_HEADS	16

extern void omni_queue_merge(OmniHead *heads, int nheads);
extern void omni_lane_job(const OmniRequest *request, LaneJob *lane);
extern OmniJobState *omni_queue_due(const OmniHead *heads, int nheads, int limit, int *count);
extern OmniJobState *omni_queue_held(const OmniHead *heads, int nheads, int limit, int *count);
extern void omni_queue_cancel_copies(const OmniPlace *place);
extern OmniHead *omni_running_lanes(const OmniPlace *place, int limit, int *count);
extern OmniJobState *omni_running_due(const OmniHead *lanes, int nlanes, int limit, int *count);
extern bool omni_job_stop_polling(void);
extern bool omni_job_prune(int64 *after, TimestampTz before, int limit);
extern bool omni_job_cancel(const OmniJob *job, const char *by);
extern void omni_job_recent(TimestampTz since,
							void (*tell) (int64 merge_key, TimestampTz sent_at));

#endif							/* OMNI_JOB_H */
