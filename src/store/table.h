/*-------------------------------------------------------------------------
 *
 * table.h
 *		Shared by the files that access the tables: table.c, job.c, queue.c, event.c
 *		and seen.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_TABLE_H
#define OMNI_TABLE_H

#include "executor/spi.h"

#include "base/compat.h"
#include "base/status.h"
#include "store/job.h"

/* Maximum size of a table's name, quoted and with its schema, after "ONLY " */
#define OMNI_MAX_QUALIFIED	(5 + 2 * (2 * NAMEDATALEN + 3))

/* A column that the statements use */
typedef struct OmniColumn
{
	const char *name;
	Oid			type;
	bool		required;		/* NOT NULL */
} OmniColumn;

#define OMNI_MAX_COLUMNS	32

typedef struct OmniTable
{
	const char *name;
	const OmniColumn *columns;
	int			ncolumns;
	int			nchecks;		/* CHECK constraints */

	/* set by omni_tables_find() */
	Oid			oid;
	Oid			owner;
	char		qualified[OMNI_MAX_QUALIFIED];

	/* set by omni_check_table() */
	AttrNumber	numbers[OMNI_MAX_COLUMNS];	/* of the columns */
	Oid			sequence;		/* of the ids */
	bool		checked;		/* the columns are as they should be */
	bool		complained;		/* the log tells about a difference */
} OmniTable;

/* The columns of omni_refresh_job that omni_job_decode() reads: name, type, whether NOT NULL */
#define OMNI_JOB_COLUMNS(X) \
	X(id, INT8OID, true) \
	X(status, TEXTOID, true) \
	X(job_id, UUIDOID, false) \
	X(model_id, UUIDOID, true) \
	X(branch_id, UUIDOID, false) \
	X(kind, TEXTOID, true) \
	X(hard, BOOLOID, false) \
	X(schemas, TEXTARRAYOID, false) \
	X(tables, TEXTARRAYOID, false) \
	X(policy, TEXTOID, false) \
	X(reset_at, TIMESTAMPTZOID, false) \
	X(server, TEXTOID, true) \
	X(origin, TEXTOID, true) \
	X(requested_by, TEXTOID, true) \
	X(requested_by_oid, OIDOID, true) \
	X(requested_at, TIMESTAMPTZOID, true) \
	X(run_at, TIMESTAMPTZOID, true) \
	X(sent_at, TIMESTAMPTZOID, false) \
	X(finished_at, TIMESTAMPTZOID, false) \
	X(attempts, INT4OID, true) \
	X(may_have_arrived, BOOLOID, false) \
	X(few_failures, INT4OID, false) \
	X(recoveries, INT4OID, false) \
	X(merged_into, INT8OID, false) \
	X(renewed_at, TIMESTAMPTZOID, false) \
	X(retry_of, INT8OID, false) \
	X(called_by, TEXTOID, false) \
	X(called_by_oid, OIDOID, false) \
	X(application, TEXTOID, false) \
	X(database, OIDOID, true) \
	X(error, TEXTOID, false)

/* The columns of omni_refresh_event */
#define OMNI_EVENT_COLUMNS(X) \
	X(id, INT8OID, true) \
	X(job, INT8OID, true) \
	X(requested_by, TEXTOID, true) \
	X(requested_by_oid, OIDOID, true) \
	X(occurred_at, TIMESTAMPTZOID, true) \
	X(event, TEXTOID, true) \
	X(attempt, INT4OID, false) \
	X(http_status, INT4OID, false) \
	X(sqlstate, TEXTOID, false) \
	X(duration, INTERVALOID, false) \
	X(detail, TEXTOID, false)

/* The columns of omni_refresh_watch */
#define OMNI_WATCH_COLUMNS(X) \
	X(id, UUIDOID, true) \
	X(server, TEXTOID, true) \
	X(model_id, UUIDOID, true) \
	X(branch_id, UUIDOID, false) \
	X(schemas, TEXTARRAYOID, false) \
	X(delay, INTERVALOID, true) \
	X(removals, INTERVALOID, false) \
	X(cache_policy, TEXTOID, false) \
	X(requested_by, TEXTOID, true) \
	X(requested_by_oid, OIDOID, true) \
	X(requested_at, TIMESTAMPTZOID, true) \
	X(database, OIDOID, true) \
	X(owed_hard, BOOLOID, false) \
	X(owed_schemas, TEXTARRAYOID, false) \
	X(owed_tables, TEXTARRAYOID, false) \
	X(job, INT8OID, false) \
	X(unfinished, BOOLOID, true) \
	X(failures, INT4OID, true) \
	X(quiet, INTERVALOID, false) \
	X(data_seen, INT8OID, false)

/* The columns of omni_refresh_watch_seen */
#define OMNI_SEEN_COLUMNS(X) \
	X(watch, UUIDOID, true) \
	X(schema, TEXTOID, true) \
	X(relation, TEXTOID, true) \
	X(leaf, BOOLOID, true) \
	X(columns, TEXTARRAYOID, true) \
	X(types, TEXTARRAYOID, true) \
	X(readers, TEXTARRAYOID, true)

/* Places of the columns in OmniTable and OmniRowValues: OMNI_JOB_id, OMNI_EVENT_id and so on */
#define OMNI_JOB_PLACE(name, type, required) OMNI_JOB_ ## name,
#define OMNI_EVENT_PLACE(name, type, required) OMNI_EVENT_ ## name,
enum
{
	OMNI_JOB_COLUMNS(OMNI_JOB_PLACE)
	OMNI_JOB_NCOLUMNS
};
enum
{
	OMNI_EVENT_COLUMNS(OMNI_EVENT_PLACE)
	OMNI_EVENT_NCOLUMNS
};
#define OMNI_WATCH_PLACE(name, type, required) OMNI_WATCH_ ## name,
#define OMNI_SEEN_PLACE(name, type, required) OMNI_SEEN_ ## name,
enum
{
	OMNI_WATCH_COLUMNS(OMNI_WATCH_PLACE)
	OMNI_WATCH_NCOLUMNS
};
enum
{
	OMNI_SEEN_COLUMNS(OMNI_SEEN_PLACE)
	OMNI_SEEN_NCOLUMNS
};

/* Jobs that agree in these columns may be merged, and share one min_interval. */
#define ALIKE \
	"server, requested_by_oid, kind, model_id, branch_id, policy"

/* The select list that omni_job_decode() expects, for a table without an alias */
#define OMNI_JOB_COLUMN_TEXT(name, type, required) #name ", "
#define JOB_LIST \
	OMNI_JOB_COLUMNS(OMNI_JOB_COLUMN_TEXT) "hashtextextended(ROW(" ALIKE ")::text, 0), xmin"

/* The predicate of omni_refresh_job_queue_idx: jobs that wait in the queue */
#define QUEUED		"status = " OMNI_SQL(PENDING) " AND origin <> 'call'"

/* The predicate of omni_refresh_job_active_idx: jobs that a worker has, or had, in flight */
#define IN_FLIGHT \
	"(status = ANY ('{" OMNI_NAME_SENDING ", " OMNI_NAME_RUNNING "}')" \
	" OR (status = " OMNI_SQL(PENDING) " AND origin = 'call'))"

/* The predicate of omni_refresh_job_refreshing_idx: refreshes that have not ended */
#define REFRESHING	"kind <> 'cache' AND status = ANY (" OMNI_SQL_UNFINISHED ")"

/*
 * Conditions for a job that is looked up by id.  Do not write them as "status =": they
 * would then imply the predicates above, and a plan made for an empty table might scan
 * one of these indexes from end to end instead of using the primary key.
 */
#define IS_PENDING		"starts_with(status, " OMNI_SQL(PENDING) ")"
#define IS_UNFINISHED	"status <> ALL (" OMNI_SQL_FINAL ")"

/* A statement on one table; omni_run() replaces each %s by the table's name. */
typedef struct OmniStatement
{
	OmniTable  *table;
	bool		read;			/* read-only, with the latest snapshot */
	bool		latest;			/* with the latest snapshot, though it locks
								 * rows */
	bool		must;			/* writes a row that exists: an error if not */
	const char *text;
	int			nargs;
	Oid			argtypes[13];
	SPIPlanPtr	plan;			/* or NULL */
	char		planned_for[OMNI_MAX_QUALIFIED];	/* the table's name in it */
	int			running;		/* how many executions are under way */
} OmniStatement;

/* A line of the event log */
typedef struct OmniEvent
{
	TimestampTz occurred_at;
	const char *event;
	int			attempt;		/* 0 means NULL */
	int			http_status;	/* 0 means NULL */
	int			sqlstate;		/* 0 means NULL */
	int64		duration;		/* microseconds, 0 means NULL */
	const char *detail;			/* may be NULL */
} OmniEvent;

/* What to change while a statement runs as the owner of its table */
typedef struct OmniOwner
{
	Oid			user;
	int			security_context;
	int			nest_level;
} OmniOwner;

/* in table.c */
extern OmniTable omni_job_table;
extern OmniTable omni_event_table;
extern OmniTable omni_watch_table;
extern OmniTable omni_seen_table;
extern uint64 omni_run(OmniStatement *statement, Datum *values, const char *nulls);
extern void omni_check_table(OmniTable *table);
extern void omni_as_owner(OmniTable *table, OmniOwner *before);
extern void omni_as_before(const OmniOwner *before);
pg_noreturn extern void omni_not_written(const OmniTable *table);
pg_noreturn extern void omni_table_differs(const OmniTable *table, const char *detail);
extern TupleDesc omni_table_rowtype(OmniTable *table);
extern NameData omni_name(Datum text);
extern ArrayType *omni_bigints(const int64 *numbers, int count);
extern Datum omni_value(int row, int column, Oid type);
extern Datum omni_value_or_null(int row, int column, Oid type, bool *isnull);

/* in job.c */
extern void omni_job_decode(int row, OmniJobState *state);
extern void omni_request_decode(OmniRequest *request, int row, int server, int model, int branch, int policy,
								int requested_by, int requested_by_oid);

/* in event.c */
extern void omni_event_add(const OmniJob *job, const OmniEvent *event);
extern ArrayType *omni_events_sent(TimestampTz since);
extern ArrayType *omni_events_delete(ArrayType *jobs);
extern void omni_events_delete_all(const int64 *jobs, int count);
extern void omni_events_delete_every(void);

#endif							/* OMNI_TABLE_H */
