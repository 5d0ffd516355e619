/*-------------------------------------------------------------------------
 *
 * job.c
 *		The tables omni_refresh_job and omni_refresh_event.
 *
 * They are reached through SPI, by statements that name the tables as the
 * catalogs say at that moment, each run as the owner of its table with no more
 * rights than that, and with a search_path of their own: who owns a table may give
 * it triggers and policies, which may then do as they like, and change settings,
 * but only until the statement ends.  The two tables may have two owners, so that no
 * statement reads both.  Only the worker writes, but for the one INSERT of a
 * request that is queued.  Unless a function says that it is for backends, it needs a
 * transaction with an active snapshot and SPI connected; all raise what the
 * statements raise.
 *
 * The table of jobs is also the queue: jobs that are "pending", not of a call, and due.
 *
 * The events of a job tell its life: each attempt has "sending" and, if it
 * failed, what became of it; the last event of a finished job bears the name of
 * its status.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/indexing.h"
#include "catalog/pg_class.h"
#include "catalog/pg_extension.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"
#include "utils/typcache.h"

#include "compat.h"
#include "omni_refresh.h"

/* Jobs to merge in one statement, which takes less than a second */
#define MERGE_LIMIT			20000

/* How often a job that was being sent is sent again when the worker has ended */
#define MAX_RECOVERIES		3

typedef struct Table
{
	const char *name;
	Oid			oid;			/* the following are set by omni_tables_find() */
	Oid			owner;
	char		qualified[2 * (2 * NAMEDATALEN + 3)];	/* quoted */
} Table;

/* Bytes of an extension's version that we compare */
#define MAX_VERSION			64

static Table job_table = {.name = "omni_refresh_job"};
static Table event_table = {.name = "omni_refresh_event"};

/*
 * A statement about a table, whose name stands for each %s in it.  Those that are
 * run in backends pin the search_path, which the worker's is anyway.
 */
typedef struct Statement
{
	Table	   *table;
	bool		in_backend;
	bool		read;			/* and under the latest snapshot */
	const char *text;
	int			nargs;
	Oid			argtypes[16];
	SPIPlanPtr	plan;			/* for planned_for, or NULL */
	char		planned_for[2 * (2 * NAMEDATALEN + 3)];
} Statement;

#define INSERT_JOB \
	"INSERT INTO %s AS job (status, model_id, branch_id, kind, hard, schemas, tables, server," \
	" origin, requested_by, requested_by_oid, requested_at, run_at, sent_at, attempts, database)" \
	" VALUES ($1, $2, $3, 'schema', $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)"
#define INSERT_JOB_NARGS 15
#define INSERT_JOB_ARGTYPES \
	{TEXTOID, UUIDOID, UUIDOID, BOOLOID, TEXTARRAYOID, TEXTARRAYOID, NAMEOID, TEXTOID, NAMEOID, \
		OIDOID, TIMESTAMPTZOID, TIMESTAMPTZOID, TIMESTAMPTZOID, INT4OID, OIDOID}

static Statement insert_job = {
	.table = &job_table,
	.text = INSERT_JOB " RETURNING id::bigint",
	.nargs = INSERT_JOB_NARGS,
	.argtypes = INSERT_JOB_ARGTYPES
};

static Statement queue_job = {
	.table = &job_table,
	.in_backend = true,
	.text = INSERT_JOB " RETURNING job",
	.nargs = INSERT_JOB_NARGS,
	.argtypes = INSERT_JOB_ARGTYPES
};

static Statement select_job = {
	.table = &job_table,
	.in_backend = true,
	.read = true,
	.text = "SELECT job FROM %s AS job WHERE id = $1",
	.nargs = 1,
	.argtypes = {INT8OID}
};

static Statement select_unfinished = {
	.table = &job_table,
	.in_backend = true,
	.read = true,
	.text = "SELECT FROM %s WHERE status = ANY ('{pending, sending, running}') AND database = $1 LIMIT 1",
	.nargs = 1,
	.argtypes = {OIDOID}
};

static Statement update_job = {
	.table = &job_table,
	.text = "UPDATE %s SET status = $2, job_id = $3, finished_at = $4, error = $5,"
	" run_at = coalesce($6, run_at)"
	" WHERE id = $1",
	.nargs = 6,
	.argtypes = {INT8OID, TEXTOID, UUIDOID, TIMESTAMPTZOID, TEXTOID, TIMESTAMPTZOID}
};

static Statement send_job = {
	.table = &job_table,
	.text = "UPDATE %s SET status = 'sending', attempts = $2, sent_at = $3"
	" WHERE id = $1 AND status = 'pending'",
	.nargs = 3,
	.argtypes = {INT8OID, INT4OID, TIMESTAMPTZOID}
};

static Statement delay_job = {
	.table = &job_table,
	.text = "UPDATE %s SET run_at = $2 WHERE id = $1 AND status = 'pending'",
	.nargs = 2,
	.argtypes = {INT8OID, TIMESTAMPTZOID}
};

/* calls that nobody waits for any more, and copies of another database's jobs */
static Statement settle_jobs = {
	.table = &job_table,
	.text = "UPDATE %s SET status = CASE WHEN (status = 'sending' OR attempts > 0) AND database = $1"
	" THEN 'unknown' ELSE 'canceled' END,"
	" finished_at = clock_timestamp(), error = CASE WHEN database = $1 THEN $2 ELSE $3 END"
	" WHERE status IN ('pending', 'sending') AND (origin = 'call' OR database <> $1)"
	" RETURNING id::bigint, requested_by::name, status::text, attempts::int, error::text",
	.nargs = 3,
	.argtypes = {OIDOID, TEXTOID, TEXTOID}
};

/* queued jobs that were about to be sent */
static Statement select_sending = {
	.table = &job_table,
	.text = "SELECT id::bigint, requested_by::name, attempts::int FROM %s"
	" WHERE status = 'sending' AND origin <> 'call'",
};

/*
 * Sets of two queued jobs or more, all due, one of which can do for all: what is
 * alike, and then a hard refresh, or else one of the whole model, or what have the
 * one kind of list, or both lists and the same.  Of resets of a cache the latest
 * counts, which is the one of the moment if there is one.  There are no joins here,
 * whose plan would depend on how many rows there were when it was made.
 */
static Statement select_sets = {
	.table = &job_table,
	.text = "WITH due AS ("
	"  SELECT *, coalesce(branch_id::text, policy, '') AS target, count(*) OVER alike AS number,"
	"   bool_or(coalesce(hard, true) OR (schemas IS NULL AND tables IS NULL)) OVER alike AS whole"
	"  FROM %s"
	"  WHERE status = 'pending' AND origin <> 'call' AND database = $1 AND run_at <= $2"
	"  WINDOW alike AS (PARTITION BY model_id, coalesce(branch_id::text, policy, ''), server,"
	"   requested_by, requested_by_oid, kind)"
	" ), sets AS ("
	"  SELECT *, CASE WHEN whole THEN '' WHEN tables IS NULL THEN 'schemas'"
	"   WHEN schemas IS NULL THEN 'tables' ELSE"
	"   (SELECT array_agg(DISTINCT name) FROM unnest(schemas) AS name)::text ||"
	"   (SELECT array_agg(DISTINCT name) FROM unnest(tables) AS name)::text END AS extent"
	"  FROM due WHERE number > 1"
	" )"
	" SELECT array_agg(DISTINCT id), bool_or(hard),"
	"  array_agg(DISTINCT name) FILTER (WHERE is_schema),"
	"  array_agg(DISTINCT name) FILTER (WHERE NOT is_schema),"
	"  CASE WHEN every(reset_at IS NOT NULL) THEN max(reset_at) END"
	" FROM sets LEFT JOIN LATERAL"
	"  (SELECT true, unnest(schemas) UNION ALL SELECT false, unnest(tables))"
	"  AS names (is_schema, name) ON extent <> ''"
	" GROUP BY model_id, target, server, requested_by, requested_by_oid, kind, extent"
	" HAVING min(id) <> max(id)",
	.nargs = 2,
	.argtypes = {OIDOID, TIMESTAMPTZOID}
};

/* Somebody may be about to cancel a job: what is locked stays as it is. */
static Statement lock_job = {
	.table = &job_table,
	.text = "SELECT FROM %s WHERE id = $1 AND status = 'pending' FOR NO KEY UPDATE SKIP LOCKED",
	.nargs = 1,
	.argtypes = {INT8OID}
};

static Statement widen_job = {
	.table = &job_table,
	.text = "UPDATE %s SET hard = $2, schemas = $3, tables = $4, reset_at = $5"
	" WHERE id = $1 AND (hard, schemas, tables, reset_at) IS DISTINCT FROM ($2, $3, $4, $5)",
	.nargs = 5,
	.argtypes = {INT8OID, BOOLOID, TEXTARRAYOID, TEXTARRAYOID, TIMESTAMPTZOID}
};

static Statement merge_jobs = {
	.table = &job_table,
	.text = "WITH locked AS ("
	"  SELECT id, carrier FROM unnest($1, $2) AS members (id, carrier) JOIN %s AS job USING (id)"
	"  WHERE status = 'pending' FOR NO KEY UPDATE OF job SKIP LOCKED"
	" ), merged AS ("
	"  UPDATE %s AS job SET status = 'merged', merged_into = carrier,"
	"   finished_at = clock_timestamp(), error = NULL"
	"  FROM locked WHERE job.id = locked.id"
	"  RETURNING job.id, job.requested_by, job.requested_at, carrier"
	" )"
	" SELECT array_agg(id), array_agg(requested_by), array_agg(requested_at), array_agg(carrier)"
	" FROM merged",
	.nargs = 2,
	.argtypes = {INT8ARRAYOID, INT8ARRAYOID}
};

static Statement insert_merged = {
	.table = &event_table,
	.text = "INSERT INTO %s (job, requested_by, occurred_at, event, detail)"
	" SELECT job, requested_by, occurred_at, event, detail"
	" FROM unnest($1, $2, $3, $4) AS merged (job, requested_by, requested_at, carrier),"
	"  LATERAL (VALUES (1, 'requested', requested_at, NULL),"
	"   (2, 'merged', clock_timestamp(), 'carried out by job ' || carrier))"
	"  AS events (turn, event, occurred_at, detail)"
	" WHERE event <> 'requested' OR NOT EXISTS (SELECT FROM %s AS old WHERE old.job = merged.job)"
	" ORDER BY job, turn",
	.nargs = 4,
	.argtypes = {INT8ARRAYOID, NAMEARRAYOID, TIMESTAMPTZARRAYOID, INT8ARRAYOID}
};

/* what would come later than any wait of ours comes of a clock that was set back */
static Statement reclock_jobs = {
	.table = &job_table,
	.text = "UPDATE %s SET run_at = $1 WHERE status = 'pending' AND origin <> 'call' AND run_at > $2",
	.nargs = 2,
	.argtypes = {TIMESTAMPTZOID, TIMESTAMPTZOID}
};

#define MERGE_KEY \
	"hashtextextended(concat_ws(' ', server, requested_by_oid, kind, model_id, branch_id, policy), 0)"

/*
 * The first jobs that are due, but for some servers and some roles at some servers,
 * and for those that somebody else is about to change.
 */
static Statement select_due = {
	.table = &job_table,
	.text = "SELECT id::bigint, server::name, requested_by::name, requested_by_oid::oid,"
	"  requested_at::timestamptz, model_id::uuid, branch_id::uuid, coalesce(hard, true),"
	"  schemas::text[], tables::text[], attempts::int, " MERGE_KEY
	" FROM %s AS job"
	" WHERE status = 'pending' AND origin <> 'call' AND database = $1 AND run_at <= $2"
	"  AND server::text <> ALL ($3) AND concat_ws(' ', server, requested_by_oid) <> ALL ($3)"
	" ORDER BY run_at, id LIMIT $4 FOR NO KEY UPDATE SKIP LOCKED",
	.nargs = 4,
	.argtypes = {OIDOID, TIMESTAMPTZOID, TEXTARRAYOID, INT8OID}
};

/* whether any are left, and when the next one will be due */
static Statement select_next = {
	.table = &job_table,
	.text = "SELECT EXISTS (SELECT FROM %s"
	"   WHERE status = 'pending' AND origin <> 'call' AND database = $1),"
	"  (SELECT run_at::timestamptz FROM %s"
	"   WHERE status = 'pending' AND origin <> 'call' AND database = $1 AND run_at > $2"
	"   ORDER BY run_at LIMIT 1)",
	.nargs = 2,
	.argtypes = {OIDOID, TIMESTAMPTZOID}
};

static Statement select_sent = {
	.table = &job_table,
	.text = "SELECT " MERGE_KEY ", max(sent_at)::timestamptz FROM %s"
	" WHERE id = ANY ($1) AND origin <> 'call' AND sent_at IS NOT NULL GROUP BY 1",
	.nargs = 1,
	.argtypes = {INT8ARRAYOID}
};

static Statement select_recent = {
	.table = &event_table,
	.text = "SELECT array_agg(DISTINCT job) FROM %s WHERE occurred_at > $1 AND event = 'sending'",
	.nargs = 1,
	.argtypes = {TIMESTAMPTZOID}
};

/* since there was an answer to the job */
static Statement count_recoveries = {
	.table = &event_table,
	.text = "SELECT count(*) FROM %s WHERE job = $1 AND event = 'recovered'"
	" AND id > coalesce((SELECT max(id) FROM %s WHERE job = $1 AND http_status IS NOT NULL), 0)",
	.nargs = 1,
	.argtypes = {INT8OID}
};

/* an attempt that ended without an answer; an answer of 5xx is one */
static Statement select_unanswered = {
	.table = &event_table,
	.text = "SELECT FROM %s WHERE job = $1 AND (event = 'recovered'"
	" OR (event = 'attempt_failed' AND starts_with(detail, '08006:') AND coalesce(http_status, 0) < 500)) LIMIT 1",
	.nargs = 1,
	.argtypes = {INT8OID}
};

/* one or two events of a job; that it was requested is the first or nothing */
static Statement insert_events = {
	.table = &event_table,
	.text = "INSERT INTO %s (job, requested_by, occurred_at, event, attempt, http_status, duration, detail)"
	" SELECT $1, $2, events.* FROM (VALUES ($3, $4, $5, $6, $7, $8), ($9, $10, $11, $12, $13, $14))"
	"  AS events (occurred_at, event)"
	" WHERE event IS NOT NULL"
	"  AND (event <> 'requested' OR NOT EXISTS (SELECT FROM %s AS old WHERE old.job = $1))",
	.nargs = 14,
	.argtypes = {INT8OID, NAMEOID,
		TIMESTAMPTZOID, TEXTOID, INT4OID, INT4OID, INTERVALOID, TEXTOID,
	TIMESTAMPTZOID, TEXTOID, INT4OID, INT4OID, INTERVALOID, TEXTOID}
};

/* A line of the event log */
typedef struct Event
{
	TimestampTz occurred_at;
	const char *event;
	int			attempt;		/* 0 means NULL */
	int			http_status;	/* 0 means NULL */
	int64		duration;		/* microseconds, 0 means NULL */
	const char *detail;			/* may be NULL */
} Event;

static uint64 run(Statement *statement, Datum *values, const char *nulls);
static Datum result(int row, int column, bool *isnull);
static bool look_at_extension(Oid *schema, char *version);
static bool look_at_table(Table *table);
static void insert(Statement *statement, OmniJob *job, const char *status, TimestampTz run_at,
				   TimestampTz sent_at);
static void recover(void);
static void add_members(HeapTuple set, TupleDesc desc, Datum *members, Datum *carriers, int *count);
static void add_events(int64 job, const NameData *requested_by,
					   const Event *first, const Event *second);

/*
 * Looks where the extension's tables are at this moment.  Returns false if there
 * is no such extension.  As long as the tables that it had are there, so is it.
 */
bool
omni_tables_find(void)
{
	Oid			schema;

	if (look_at_table(&job_table) && look_at_table(&event_table))
		return true;
	if (!look_at_extension(&schema, NULL))
		return false;
	job_table.oid = get_relname_relid(job_table.name, schema);
	event_table.oid = get_relname_relid(event_table.name, schema);
	return look_at_table(&job_table) && look_at_table(&event_table);
}

/*
 * Whether the extension is still there, with its tables, and still of the version
 * that it had when this was asked for the first time.
 */
bool
omni_extension_is_same(void)
{
	static char first[MAX_VERSION] = "";
	char		version[MAX_VERSION];

	if (!omni_tables_find() || !look_at_extension(NULL, version))
		return false;
	if (first[0] == '\0')
		strcpy(first, version);
	return strcmp(first, version) == 0;
}

/* Sets *schema and *version, of MAX_VERSION bytes, unless NULL; false if there is none. */
static bool
look_at_extension(Oid *schema, char *version)
{
	Relation	extensions = table_open(ExtensionRelationId, AccessShareLock);
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;
	bool		found;
	bool		isnull;

	ScanKeyInit(&key, Anum_pg_extension_extname, BTEqualStrategyNumber, F_NAMEEQ,
				CStringGetDatum(OMNI_EXTENSION));
	scan = systable_beginscan(extensions, ExtensionNameIndexId, true, NULL, 1, &key);
	tuple = systable_getnext(scan);
	found = HeapTupleIsValid(tuple);
	if (found && schema != NULL)
		*schema = ((Form_pg_extension) GETSTRUCT(tuple))->extnamespace;
	if (found && version != NULL)
		strlcpy(version, TextDatumGetCString(heap_getattr(tuple, Anum_pg_extension_extversion,
														  RelationGetDescr(extensions), &isnull)),
				MAX_VERSION);
	systable_endscan(scan);
	table_close(extensions, AccessShareLock);
	return found;
}

/* Sets a table's owner and name; false if it does not exist (any more). */
static bool
look_at_table(Table *table)
{
	HeapTuple	tuple = SearchSysCache1(RELOID, ObjectIdGetDatum(table->oid));
	Form_pg_class class;

	if (!HeapTupleIsValid(tuple))
		return false;
	class = (Form_pg_class) GETSTRUCT(tuple);
	table->owner = class->relowner;
	strlcpy(table->qualified,
			quote_qualified_identifier(get_namespace_name(class->relnamespace),
									   NameStr(class->relname)),
			sizeof(table->qualified));
	ReleaseSysCache(tuple);
	return true;
}

/*
 * Locks the tables for writing, for the rest of the transaction, if nobody holds
 * a lock against that: it never waits.  After omni_tables_find().
 */
bool
omni_tables_lock(void)
{
	return ConditionalLockRelationOid(job_table.oid, RowExclusiveLock) &&
		ConditionalLockRelationOid(event_table.oid, RowExclusiveLock);
}

/*
 * Runs a statement as the owner of its table and returns how many rows it had,
 * for result().  nulls is as in SPI_execute_plan().
 */
static uint64
run(Statement *statement, Datum *values, const char *nulls)
{
	Oid			user;
	int			security_context;
	int			nest_level;
	int			code;

	nest_level = NewGUCNestLevel();
	if (statement->in_backend)
		(void) set_config_option("search_path", "pg_catalog, pg_temp", PGC_USERSET,
								 PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);

	GetUserIdAndSecContext(&user, &security_context);
	SetUserIdAndSecContext(statement->table->owner,
						   security_context | SECURITY_RESTRICTED_OPERATION);

	if (statement->plan == NULL ||
		strcmp(statement->planned_for, statement->table->qualified) != 0)
	{
		const char *name = statement->table->qualified;
		SPIPlanPtr	plan = SPI_prepare(psprintf(statement->text, name, name, name, name),
									   statement->nargs, statement->argtypes);

		if (plan == NULL)
			elog(ERROR, "SPI_prepare failed: %s", SPI_result_code_string(SPI_result));
		SPI_keepplan(plan);
		if (statement->plan != NULL)
			SPI_freeplan(statement->plan);
		statement->plan = plan;
		strlcpy(statement->planned_for, statement->table->qualified,
				sizeof(statement->planned_for));
	}

	code = SPI_execute_snapshot(statement->plan, values, nulls,
								statement->read ? GetLatestSnapshot() : InvalidSnapshot,
								InvalidSnapshot, statement->read, true, 0);
	SetUserIdAndSecContext(user, security_context);
	AtEOXact_GUC(false, nest_level);
	if (code < 0)
		elog(ERROR, "SPI_execute_snapshot failed: %s", SPI_result_code_string(code));
	return SPI_processed;
}

/* A value that the last statement has returned; row and column count from 0. */
static Datum
result(int row, int column, bool *isnull)
{
	return SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, column + 1, isnull);
}

/*
 * Writes down that a job is about to be sent to a URL, which holds no secret.
 * The request may be sent once this is committed; then the number of attempts is
 * one more.  Returns false if it is not pending any more: somebody was faster.
 */
bool
omni_job_begin(OmniJob *job, const char *url)
{
	TimestampTz now = GetCurrentTimestamp();
	Event		requested = {.occurred_at = job->request.requested_at,.event = "requested"};
	Event		sending = {
		.occurred_at = now,
		.event = "sending",
		.attempt = job->attempts + 1,
		.detail = psprintf("POST %s", url)
	};

	if (job->id == 0)
		insert(&insert_job, job, "sending", now, now);
	else
	{
		Datum		values[3] = {
			Int64GetDatum(job->id),
			Int32GetDatum(job->attempts + 1),
			TimestampTzGetDatum(now)
		};

		if (run(&send_job, values, NULL) == 0)
			return false;
	}
	if (job->attempts == 0)
		add_events(job->id, &job->request.requested_by, &requested, &sending);
	else
		add_events(job->id, &job->request.requested_by, &sending, NULL);
	return true;
}

/*
 * Writes down that a job must wait for its turn within the rate limit.  A job of
 * the queue keeps its place there.
 */
void
omni_job_delay(OmniJob *job, TimestampTz run_at)
{
	Event		requested = {.occurred_at = job->request.requested_at,.event = "requested"};
	Event		limited = {
		.occurred_at = GetCurrentTimestamp(),
		.event = "rate_limited",
		.detail = psprintf("not to be sent before %s", timestamptz_to_str(run_at))
	};

	if (job->id == 0)
		insert(&insert_job, job, "pending", run_at, 0);
	else if (!job->queued)
		omni_job_defer(job->id, run_at);
	add_events(job->id, &job->request.requested_by, &requested, &limited);
}

/*
 * Keeps a pending job from being changed by others until the end of the transaction.
 * Returns false if it is not pending any more, or somebody else is about to
 * change it, for whom nobody waits.
 */
bool
omni_job_lock(int64 id)
{
	Datum		values[1] = {Int64GetDatum(id)};

	return run(&lock_job, values, NULL) > 0;
}

/* Lets a pending job wait. */
void
omni_job_defer(int64 id, TimestampTz run_at)
{
	Datum		values[2] = {Int64GetDatum(id), TimestampTzGetDatum(run_at)};

	(void) run(&delay_job, values, NULL);
}

/* Writes down a job that is not sent at all. */
void
omni_job_refuse(OmniJob *job, const OmniOutcome *outcome)
{
	Event		requested = {.occurred_at = job->request.requested_at,.event = "requested"};

	if (job->id == 0)
		insert(&insert_job, job, "pending", job->request.requested_at, 0);
	add_events(job->id, &job->request.requested_by, &requested, NULL);
	omni_job_record(job, outcome);
}

/* Puts a job into the queue, in a backend; returns its row, palloc'd. */
Datum
omni_job_queue(OmniJob *job)
{
	Datum		row;
	bool		isnull;

	SPI_connect();
	insert(&queue_job, job, "pending", job->request.requested_at, 0);
	row = SPI_datumTransfer(result(0, 0, &isnull), false, -1);
	SPI_finish();
	return row;
}

/* Sets job->id, unless the statement returns something else. */
static void
insert(Statement *statement, OmniJob *job, const char *status, TimestampTz run_at,
	   TimestampTz sent_at)
{
	OmniRequest *request = &job->request;
	bool		isnull;
	Datum		values[INSERT_JOB_NARGS] = {
		CStringGetTextDatum(status),
		UUIDPGetDatum(&request->model),
		UUIDPGetDatum(&request->branch),
		BoolGetDatum(request->hard),
		PointerGetDatum(job->schemas),
		PointerGetDatum(job->tables),
		NameGetDatum(&request->server),
		CStringGetTextDatum(job->queued ? "on_commit" : "call"),
		NameGetDatum(&request->requested_by),
		ObjectIdGetDatum(request->role),
		TimestampTzGetDatum(request->requested_at),
		TimestampTzGetDatum(run_at),
		TimestampTzGetDatum(sent_at),
		Int32GetDatum(sent_at != 0 ? 1 : 0),
		ObjectIdGetDatum(MyDatabaseId)
	};
	char		nulls[INSERT_JOB_NARGS + 1] = "               ";

	if (!request->has_branch)
		nulls[2] = 'n';
	if (job->schemas == NULL)
		nulls[4] = 'n';
	if (job->tables == NULL)
		nulls[5] = 'n';
	if (sent_at == 0)
		nulls[12] = 'n';

	if (run(statement, values, nulls) != 1)
		elog(ERROR, "a trigger kept a job from being written");
	if (statement == &insert_job)
		job->id = DatumGetInt64(result(0, 0, &isnull));
}

/* Writes down what became of an attempt, and of the job with it. */
void
omni_job_record(OmniJob *job, const OmniOutcome *outcome)
{
	TimestampTz now = GetCurrentTimestamp();
	bool		at_end = outcome->run_at == 0;
	char	   *error = outcome->error.sqlstate != 0 ? omni_error_text(&outcome->error) : NULL;
	Datum		values[6] = {
		Int64GetDatum(job->id),
		CStringGetTextDatum(outcome->status),
		UUIDPGetDatum(&outcome->job_id),
		TimestampTzGetDatum(now),
		error != NULL ? CStringGetTextDatum(error) : (Datum) 0,
		TimestampTzGetDatum(outcome->run_at)
	};
	char		nulls[7] = "      ";
	Event		attempt = {
		.occurred_at = now,
		.event = outcome->attempt_event,
		.attempt = job->attempts,
		.http_status = outcome->http_status,
		.duration = outcome->elapsed,
		.detail = error
	};
	Event		end = {.occurred_at = now,.event = outcome->status};

	if (!outcome->has_job_id)
		nulls[2] = 'n';
	if (!at_end)
		nulls[3] = 'n';
	if (error == NULL)
		nulls[4] = 'n';
	if (at_end)
		nulls[5] = 'n';

	if (run(&update_job, values, nulls) == 0)
		return;					/* someone has deleted it: no events either */

	if (outcome->attempt_event != NULL)
		add_events(job->id, &job->request.requested_by, &attempt, at_end ? &end : NULL);
	else
	{
		attempt.event = outcome->status;
		add_events(job->id, &job->request.requested_by, &attempt, NULL);
	}
}

/*
 * Settles what an earlier worker has left behind.  Nobody waits for a synchronous
 * call any more: it is not sent again, and what an earlier attempt has done is not
 * known.  What was queued goes back to the queue.  What was copied from another
 * database was never sent from here, and never is.
 */
void
omni_job_settle(void)
{
	OmniError	left;
	OmniError	copied;
	Datum		values[3] = {ObjectIdGetDatum(MyDatabaseId)};
	SPITupleTable *rows;
	uint64		count;

	omni_error_set(&left, ERRCODE_TRANSACTION_RESOLUTION_UNKNOWN,
				   "the background worker or the server ended before the answer came");
	omni_error_hint(&left, "If the job was being sent, look in Omni before you send it again.");
	omni_error_set(&copied, ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
				   "the job was asked for in another database, of which this is a copy");
	values[1] = CStringGetTextDatum(omni_error_text(&left));
	values[2] = CStringGetTextDatum(omni_error_text(&copied));
	count = run(&settle_jobs, values, NULL);
	rows = SPI_tuptable;

	for (uint64 i = 0; i < count; i++)
	{
		Datum		columns[5];
		bool		isnull = false;

		/* who owns the table may have let NULLs into it */
		for (int column = 0; column < 5 && !isnull; column++)
			columns[column] = SPI_getbinval(rows->vals[i], rows->tupdesc, column + 1, &isnull);
		if (!isnull)
		{
			Event		end = {
				.occurred_at = GetCurrentTimestamp(),
				.event = TextDatumGetCString(columns[2]),
				.attempt = DatumGetInt32(columns[3]),
				.detail = TextDatumGetCString(columns[4])
			};

			add_events(DatumGetInt64(columns[0]), DatumGetName(columns[1]), &end, NULL);
		}
	}
	recover();
}

/*
 * Puts queued jobs that were about to be sent back into the queue, but not for
 * ever: it may have been such a job that has ended the worker or the server.
 */
static void
recover(void)
{
	uint64		count = run(&select_sending, NULL, NULL);
	SPITupleTable *rows = SPI_tuptable;

	for (uint64 i = 0; i < count; i++)
	{
		OmniOutcome outcome = {.status = "pending",.run_at = GetCurrentTimestamp()};
		OmniJob		job = {0};
		bool		isnull;
		Datum		values[1] = {SPI_getbinval(rows->vals[i], rows->tupdesc, 1, &isnull)};

		job.id = DatumGetInt64(values[0]);
		job.request.requested_by = *DatumGetName(SPI_getbinval(rows->vals[i], rows->tupdesc, 2, &isnull));
		job.attempts = DatumGetInt32(SPI_getbinval(rows->vals[i], rows->tupdesc, 3, &isnull));
		(void) run(&count_recoveries, values, NULL);
		if (DatumGetInt64(result(0, 0, &isnull)) < MAX_RECOVERIES)
			outcome.attempt_event = "recovered";
		else
		{
			outcome.status = "unknown";
			outcome.run_at = 0;
			omni_error_set(&outcome.error, ERRCODE_TRANSACTION_RESOLUTION_UNKNOWN,
						   "the background worker or the server ended %d times while the job was being sent",
						   MAX_RECOVERIES + 1);
			omni_error_hint(&outcome.error, "Look in Omni whether it has arrived.  The server's log says why the worker ended.");
		}
		omni_job_record(&job, &outcome);
	}
}

/* Whether Omni may have got the request of an earlier attempt at a job. */
bool
omni_job_may_have_arrived(int64 id)
{
	Datum		values[1] = {Int64GetDatum(id)};

	return run(&select_unanswered, values, NULL) > 0;
}

/*
 * Merges queued jobs that are due: the oldest of a set is widened to what they ask
 * for together, and carries out the others.  Returns true if there may be more
 * to merge, once this is committed.
 */
bool
omni_job_merge(TimestampTz now)
{
	Datum		values[4] = {ObjectIdGetDatum(MyDatabaseId), TimestampTzGetDatum(now)};
	Datum	   *members;
	Datum	   *carriers;
	int			count = 0;
	uint64		nsets = run(&select_sets, values, NULL);
	SPITupleTable *sets = SPI_tuptable;
	bool		isnull;

	members = palloc(MERGE_LIMIT * sizeof(Datum));
	carriers = palloc(MERGE_LIMIT * sizeof(Datum));
	for (uint64 i = 0; i < nsets && count < MERGE_LIMIT; i++)
		add_members(sets->vals[i], sets->tupdesc, members, carriers, &count);
	if (count == 0)
		return false;

	values[0] = PointerGetDatum(construct_array(members, count, INT8OID, sizeof(int64),
												FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
	values[1] = PointerGetDatum(construct_array(carriers, count, INT8OID, sizeof(int64),
												FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
	(void) run(&merge_jobs, values, NULL);
	for (int i = 0; i < 4; i++)
		values[i] = result(0, i, &isnull);
	if (!isnull)
		(void) run(&insert_merged, values, NULL);
	return count == MERGE_LIMIT;
}

/*
 * Widens the oldest of a set and adds the others to the list, as many as there is
 * room for.  If that one is locked, or the lists would be too long together, the
 * set stays as it is.
 */
static void
add_members(HeapTuple set, TupleDesc desc, Datum *members, Datum *carriers, int *count)
{
	bool		isnull[5];
	Datum		values[5];
	char		nulls[6] = "     ";
	Datum	   *ids;
	int			nids;

	for (int i = 0; i < 5; i++)
	{
		values[i] = SPI_getbinval(set, desc, i + 1, &isnull[i]);
		if (isnull[i])
			nulls[i] = 'n';
	}
	for (int i = 2; i < 4; i++)
	{
		if (!isnull[i] && VARSIZE_ANY(DatumGetPointer(values[i])) > OMNI_MAX_LIST)
			return;
	}

	deconstruct_array(DatumGetArrayTypeP(values[0]), INT8OID, sizeof(int64),
					  FLOAT8PASSBYVAL, TYPALIGN_DOUBLE, &ids, NULL, &nids);
	values[0] = ids[0];
	if (!omni_job_lock(DatumGetInt64(ids[0])))
		return;
	(void) run(&widen_job, values, nulls);
	for (int i = 1; i < nids && *count < MERGE_LIMIT; i++)
	{
		members[*count] = ids[i];
		carriers[(*count)++] = ids[0];
	}
}

/* Makes those jobs due that would be later than a time, which no wait of ours is. */
void
omni_job_reclock(TimestampTz now, TimestampTz latest)
{
	Datum		values[2] = {TimestampTzGetDatum(now), TimestampTzGetDatum(latest)};

	(void) run(&reclock_jobs, values, NULL);
}

/*
 * The first jobs of the queue that are due, at most OMNI_MAX_DUE of them, and
 * their number.  held is an array of what is left out: servers by name, and roles at
 * a server by its name, a space and their OID.  The result is palloc'd.
 */
OmniJob *
omni_job_due(TimestampTz now, ArrayType *held, int *count)
{
	Datum		values[4] = {
		ObjectIdGetDatum(MyDatabaseId),
		TimestampTzGetDatum(now),
		PointerGetDatum(held),
		Int64GetDatum(OMNI_MAX_DUE)
	};
	OmniJob    *jobs;

	*count = run(&select_due, values, NULL);
	jobs = palloc0(*count * sizeof(OmniJob));
	for (int i = 0; i < *count; i++)
	{
		OmniJob    *job = &jobs[i];
		OmniRequest *request = &job->request;
		Datum		columns[12];
		bool		isnull[12];

		for (int column = 0; column < 12; column++)
			columns[column] = result(i, column, &isnull[column]);

		job->queued = true;
		job->id = DatumGetInt64(columns[0]);
		request->server = *DatumGetName(columns[1]);
		request->requested_by = *DatumGetName(columns[2]);
		request->role = DatumGetObjectId(columns[3]);
		request->requested_at = DatumGetTimestampTz(columns[4]);
		request->model = *DatumGetUUIDP(columns[5]);
		request->has_branch = !isnull[6];
		if (request->has_branch)
			request->branch = *DatumGetUUIDP(columns[6]);
		request->hard = DatumGetBool(columns[7]);
		request->hard_named = !request->hard;	/* it is Omni's default */
		job->schemas = isnull[8] ? NULL : DatumGetArrayTypeP(columns[8]);
		job->tables = isnull[9] ? NULL : DatumGetArrayTypeP(columns[9]);
		job->attempts = DatumGetInt32(columns[10]);
		job->merge_key = DatumGetInt64(columns[11]);
	}
	return jobs;
}

/*
 * Whether there is anything in the queue, due or not; *next is when something
 * will be due that is not yet, or DT_NOEND.
 */
bool
omni_job_next(TimestampTz now, TimestampTz *next)
{
	Datum		values[2] = {ObjectIdGetDatum(MyDatabaseId), TimestampTzGetDatum(now)};
	bool		isnull;
	Datum		value;

	(void) run(&select_next, values, NULL);
	value = result(0, 1, &isnull);
	*next = isnull ? DT_NOEND : DatumGetTimestampTz(value);
	return DatumGetBool(result(0, 0, &isnull));
}

/* Tells, for each merge key of the queue's sent since a time, when that was. */
void
omni_job_recent(TimestampTz since, void (*tell) (int64 merge_key, TimestampTz sent_at))
{
	Datum		values[1] = {TimestampTzGetDatum(since)};
	bool		isnull;
	uint64		count;

	(void) run(&select_recent, values, NULL);
	values[0] = result(0, 0, &isnull);
	if (isnull)
		return;
	count = run(&select_sent, values, NULL);
	for (uint64 i = 0; i < count; i++)
		tell(DatumGetInt64(result(i, 0, &isnull)), DatumGetTimestampTz(result(i, 1, &isnull)));
}

/* Adds one or two lines about a job to the event log. */
static void
add_events(int64 job, const NameData *requested_by, const Event *first, const Event *second)
{
	const Event *events[2] = {first, second};
	Interval	durations[2] = {0};
	Datum		values[14] = {Int64GetDatum(job), NameGetDatum(requested_by)};
	char		nulls[15] = "  nnnnnnnnnnnn";

	for (int i = 0; i < 2 && events[i] != NULL; i++)
	{
		const Event *event = events[i];
		Datum	   *value = &values[2 + 6 * i];
		char	   *null = &nulls[2 + 6 * i];

		durations[i].time = event->duration;
		value[0] = TimestampTzGetDatum(event->occurred_at);
		value[1] = CStringGetTextDatum(event->event);
		value[2] = Int32GetDatum(event->attempt);
		value[3] = Int32GetDatum(event->http_status);
		value[4] = IntervalPGetDatum(&durations[i]);
		value[5] = event->detail != NULL ? CStringGetTextDatum(event->detail) : (Datum) 0;
		null[0] = null[1] = ' ';
		null[2] = event->attempt != 0 ? ' ' : 'n';
		null[3] = event->http_status != 0 ? ' ' : 'n';
		null[4] = event->duration != 0 ? ' ' : 'n';
		null[5] = event->detail != NULL ? ' ' : 'n';
	}
	(void) run(&insert_events, values, nulls);
}

/* Whether there is a job that is not at its end, in a backend. */
bool
omni_job_any_unfinished(void)
{
	Datum		values[1] = {ObjectIdGetDatum(MyDatabaseId)};
	bool		any;

	SPI_connect();
	any = run(&select_unfinished, values, NULL) > 0;
	SPI_finish();
	return any;
}

/*
 * A job as a row, for a function that returns one.  In a backend; after
 * omni_tables_find().  The result is palloc'd.
 */
Datum
omni_job_read(int64 id)
{
	Datum		values[1] = {Int64GetDatum(id)};
	Datum		row;
	bool		isnull;

	SPI_connect();
	if (run(&select_job, values, NULL) != 1)
		ereport(ERROR,
				(errcode(ERRCODE_NO_DATA_FOUND),
				 errmsg("job " INT64_FORMAT " was deleted while it was waited for", id)));
	row = SPI_datumTransfer(result(0, 0, &isnull), false, -1);
	SPI_finish();
	return row;
}

/*
 * A job that is in no table, as a row: one that was not even written down.  In a
 * backend; after omni_tables_find().  The result is palloc'd.
 */
Datum
omni_job_form(const OmniJob *job, const char *status, const char *error)
{
	const OmniRequest *request = &job->request;
	TupleDesc	rowtype = lookup_rowtype_tupdesc_copy(get_rel_type_id(job_table.oid), -1);
	Datum	   *values = palloc0(rowtype->natts * sizeof(Datum));
	bool	   *nulls = palloc(rowtype->natts * sizeof(bool));

#define SET(column, value, isnull) \
	do { \
		int			i_ = SPI_fnumber(rowtype, column) - 1; \
		if (i_ < 0) \
			elog(ERROR, "column \"%s\" of the table of jobs does not exist", column); \
		if (!(isnull)) \
			values[i_] = (value); \
		nulls[i_] = (isnull); \
	} while (0)

	memset(nulls, true, rowtype->natts);
	SET("status", CStringGetTextDatum(status), false);
	SET("model_id", UUIDPGetDatum(&request->model), false);
	SET("branch_id", UUIDPGetDatum(&request->branch), !request->has_branch);
	SET("kind", CStringGetTextDatum("schema"), false);
	SET("hard", BoolGetDatum(request->hard), false);
	SET("schemas", PointerGetDatum(job->schemas), job->schemas == NULL);
	SET("tables", PointerGetDatum(job->tables), job->tables == NULL);
	SET("server", NameGetDatum(&request->server), false);
	SET("origin", CStringGetTextDatum(job->queued ? "on_commit" : "call"), false);
	SET("requested_by", NameGetDatum(&request->requested_by), false);
	SET("requested_by_oid", ObjectIdGetDatum(request->role), false);
	SET("requested_at", TimestampTzGetDatum(request->requested_at), false);
	SET("run_at", TimestampTzGetDatum(request->requested_at), false);
	SET("finished_at", TimestampTzGetDatum(GetCurrentTimestamp()), false);
	SET("attempts", Int32GetDatum(0), false);
	SET("database", ObjectIdGetDatum(MyDatabaseId), false);
	SET("error", error == NULL ? (Datum) 0 : CStringGetTextDatum(error), error == NULL);
#undef SET

	return HeapTupleGetDatum(heap_form_tuple(rowtype, values, nulls));
}
