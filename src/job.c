/*-------------------------------------------------------------------------
 *
 * job.c
 *		The tables omni_refresh_job and omni_refresh_event.
 *
 * They are reached through SPI, by statements that name the tables as the
 * catalogs say at that moment, each run as the owner of its table with no more
 * rights than that, and with a search_path of their own: who owns a table may give
 * it triggers and policies, which may then do as they like, and change settings,
 * but only until the statement ends.  Only the worker
 * writes; all of these functions need a transaction with an active snapshot and
 * SPI connected, and raise what the statements raise.
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

typedef struct Table
{
	const char *name;
	Oid			oid;			/* the following are set by omni_tables_find() */
	Oid			owner;
	char		qualified[2 * (2 * NAMEDATALEN + 3)];	/* quoted */
} Table;

static Table job_table = {.name = "omni_refresh_job"};
static Table event_table = {.name = "omni_refresh_event"};

/* A statement about a table, whose name stands for the %s in it */
typedef struct Statement
{
	Table	   *table;
	const char *text;
	int			nargs;
	Oid			argtypes[16];
	SPIPlanPtr	plan;			/* for planned_for, or NULL */
	char		planned_for[2 * (2 * NAMEDATALEN + 3)];
} Statement;

static Statement insert_job = {
	.table = &job_table,
	.text = "INSERT INTO %s (status, model_id, branch_id, kind, hard, schemas, tables, server,"
	" origin, requested_by, requested_by_oid, requested_at, run_at, sent_at, attempts, database)"
	" VALUES ($1, $2, $3, 'schema', $4, $5, $6, $7, 'call', $8, $9, $10, $11, $12, $13, $14)"
	" RETURNING id::bigint",
	.nargs = 14,
	.argtypes = {TEXTOID, UUIDOID, UUIDOID, BOOLOID, TEXTARRAYOID, TEXTARRAYOID, NAMEOID,
		NAMEOID, OIDOID, TIMESTAMPTZOID, TIMESTAMPTZOID, TIMESTAMPTZOID, INT4OID, OIDOID
	}
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
	.text = "UPDATE %s SET status = 'sending', attempts = $2, sent_at = $3 WHERE id = $1",
	.nargs = 3,
	.argtypes = {INT8OID, INT4OID, TIMESTAMPTZOID}
};

static Statement delay_job = {
	.table = &job_table,
	.text = "UPDATE %s SET run_at = $2 WHERE id = $1",
	.nargs = 2,
	.argtypes = {INT8OID, TIMESTAMPTZOID}
};

static Statement settle_jobs = {
	.table = &job_table,
	.text = "UPDATE %s SET status = CASE WHEN (status = 'sending' OR attempts > 0) AND database = $1"
	" THEN 'unknown' ELSE 'canceled' END,"
	" finished_at = clock_timestamp(), error = $2"
	" WHERE status IN ('pending', 'sending') AND origin = 'call'"
	" RETURNING id::bigint, requested_by::name, status::text, attempts::int",
	.nargs = 2,
	.argtypes = {OIDOID, TEXTOID}
};

/* one or two events of a job */
static Statement insert_events = {
	.table = &event_table,
	.text = "INSERT INTO %s (job, requested_by, occurred_at, event, attempt, http_status, duration, detail)"
	" SELECT $1, $2, events.* FROM (VALUES ($3, $4, $5, $6, $7, $8), ($9, $10, $11, $12, $13, $14))"
	" AS events (occurred_at, event) WHERE event IS NOT NULL",
	.nargs = 14,
	.argtypes = {INT8OID, NAMEOID,
		TIMESTAMPTZOID, TEXTOID, INT4OID, INT4OID, INTERVALOID, TEXTOID,
	TIMESTAMPTZOID, TEXTOID, INT4OID, INT4OID, INTERVALOID, TEXTOID}
};

/* run in backends */
static Statement select_job = {
	.table = &job_table,
	.text = "SELECT job FROM %s AS job WHERE id = $1",
	.nargs = 1,
	.argtypes = {INT8OID}
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

static uint64 run(Statement *statement, Datum *values, const char *nulls, bool read);
static bool look_at_table(Table *table);
static void insert(OmniJob *job, const char *status, TimestampTz run_at, TimestampTz sent_at);
static void add_events(int64 job, const NameData *requested_by,
					   const Event *first, const Event *second);

/*
 * Looks where the extension's tables are at this moment.  Returns false if there
 * is no such extension.  As long as the tables that it had are there, so is it.
 */
bool
omni_tables_find(void)
{
	Oid			schema = InvalidOid;
	Relation	extensions;
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;

	if (look_at_table(&job_table) && look_at_table(&event_table))
		return true;

	extensions = table_open(ExtensionRelationId, AccessShareLock);
	ScanKeyInit(&key, Anum_pg_extension_extname, BTEqualStrategyNumber, F_NAMEEQ,
				CStringGetDatum(OMNI_EXTENSION));
	scan = systable_beginscan(extensions, ExtensionNameIndexId, true, NULL, 1, &key);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
		schema = ((Form_pg_extension) GETSTRUCT(tuple))->extnamespace;
	systable_endscan(scan);
	table_close(extensions, AccessShareLock);

	if (!OidIsValid(schema))
		return false;
	job_table.oid = get_relname_relid(job_table.name, schema);
	event_table.oid = get_relname_relid(event_table.name, schema);
	return look_at_table(&job_table) && look_at_table(&event_table);
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
 * Runs a statement as the owner of its table and returns how many rows it had.
 * nulls is as in SPI_execute_plan().  Reading is done under the latest snapshot,
 * whatever the transaction's isolation level.
 */
static uint64
run(Statement *statement, Datum *values, const char *nulls, bool read)
{
	Oid			user;
	int			security_context;
	int			nest_level;
	int			result;

	nest_level = NewGUCNestLevel();
	if (read)					/* the worker's is that always */
		(void) set_config_option("search_path", "pg_catalog, pg_temp", PGC_USERSET,
								 PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);

	GetUserIdAndSecContext(&user, &security_context);
	SetUserIdAndSecContext(statement->table->owner,
						   security_context | SECURITY_RESTRICTED_OPERATION);

	if (statement->plan == NULL ||
		strcmp(statement->planned_for, statement->table->qualified) != 0)
	{
		SPIPlanPtr	plan = SPI_prepare(psprintf(statement->text, statement->table->qualified),
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

	result = SPI_execute_snapshot(statement->plan, values, nulls,
								  read ? GetLatestSnapshot() : InvalidSnapshot,
								  InvalidSnapshot, read, true, 0);
	SetUserIdAndSecContext(user, security_context);
	AtEOXact_GUC(false, nest_level);
	if (result < 0)
		elog(ERROR, "SPI_execute_snapshot failed: %s", SPI_result_code_string(result));
	return SPI_processed;
}

/*
 * Writes down that a job is about to be sent to a URL, which holds no secret.
 * The request may be sent once this is committed; then the number of attempts is
 * one more.
 */
void
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
	{
		insert(job, "sending", now, now);
		add_events(job->id, &job->request.requested_by, &requested, &sending);
	}
	else
	{
		Datum		values[3] = {
			Int64GetDatum(job->id),
			Int32GetDatum(job->attempts + 1),
			TimestampTzGetDatum(now)
		};

		if (run(&send_job, values, NULL, false) == 0)
			ereport(ERROR,
					(errcode(ERRCODE_NO_DATA_FOUND),
					 errmsg("job " INT64_FORMAT " was deleted before it was sent", job->id)));
		add_events(job->id, &job->request.requested_by, &sending, NULL);
	}
}

/* Writes down a job that must wait for its turn within the rate limit. */
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
	{
		insert(job, "pending", run_at, 0);
		add_events(job->id, &job->request.requested_by, &requested, &limited);
	}
	else
	{
		Datum		values[2] = {Int64GetDatum(job->id), TimestampTzGetDatum(run_at)};

		if (run(&delay_job, values, NULL, false) > 0)
			add_events(job->id, &job->request.requested_by, &limited, NULL);
	}
}

/* Writes down a job that is not sent at all. */
void
omni_job_refuse(OmniJob *job, const OmniOutcome *outcome)
{
	Event		requested = {.occurred_at = job->request.requested_at,.event = "requested"};

	if (job->id == 0)
	{
		insert(job, "pending", job->request.requested_at, 0);
		add_events(job->id, &job->request.requested_by, &requested, NULL);
	}
	omni_job_record(job, outcome);
}

/* Sets job->id. */
static void
insert(OmniJob *job, const char *status, TimestampTz run_at, TimestampTz sent_at)
{
	OmniRequest *request = &job->request;
	bool		isnull;
	Datum		values[14] = {
		CStringGetTextDatum(status),
		UUIDPGetDatum(&request->model),
		UUIDPGetDatum(&request->branch),
		BoolGetDatum(request->hard),
		PointerGetDatum(job->schemas),
		PointerGetDatum(job->tables),
		NameGetDatum(&request->server),
		NameGetDatum(&request->requested_by),
		ObjectIdGetDatum(request->role),
		TimestampTzGetDatum(request->requested_at),
		TimestampTzGetDatum(run_at),
		TimestampTzGetDatum(sent_at),
		Int32GetDatum(sent_at != 0 ? 1 : 0),
		ObjectIdGetDatum(MyDatabaseId)
	};
	char		nulls[15] = "              ";

	if (!request->has_branch)
		nulls[2] = 'n';
	if (job->schemas == NULL)
		nulls[4] = 'n';
	if (job->tables == NULL)
		nulls[5] = 'n';
	if (sent_at == 0)
		nulls[11] = 'n';

	if (run(&insert_job, values, nulls, false) != 1)
		elog(ERROR, "a trigger kept a job from being written");
	job->id = DatumGetInt64(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
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

	if (run(&update_job, values, nulls, false) == 0)
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
 * Settles the jobs that an earlier worker has left behind.  Nobody waits for a
 * synchronous one any more: it is not sent again, and what an earlier attempt has
 * done is not known.  What was copied from another database was never sent from
 * here.
 */
void
omni_job_settle(void)
{
	OmniError	error;
	char	   *explanation;
	Datum		values[2];
	SPITupleTable *rows;
	uint64		count;

	omni_error_set(&error, ERRCODE_TRANSACTION_RESOLUTION_UNKNOWN,
				   "the background worker or the server ended before the answer came");
	omni_error_hint(&error, "If the job was being sent, look in Omni before you send it again.");
	explanation = omni_error_text(&error);
	values[0] = ObjectIdGetDatum(MyDatabaseId);
	values[1] = CStringGetTextDatum(explanation);
	count = run(&settle_jobs, values, NULL, false);
	rows = SPI_tuptable;

	for (uint64 i = 0; i < count; i++)
	{
		Datum		columns[4];
		bool		isnull = false;

		/* who owns the table may have let NULLs into it */
		for (int column = 0; column < 4 && !isnull; column++)
			columns[column] = SPI_getbinval(rows->vals[i], rows->tupdesc, column + 1, &isnull);
		if (!isnull)
		{
			Event		end = {
				.occurred_at = GetCurrentTimestamp(),
				.event = TextDatumGetCString(columns[2]),
				.attempt = DatumGetInt32(columns[3]),
				.detail = explanation
			};

			add_events(DatumGetInt64(columns[0]), DatumGetName(columns[1]), &end, NULL);
		}
	}
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
	(void) run(&insert_events, values, nulls, false);
}

/*
 * A job as a row, for a function that returns one.  In a backend; after
 * omni_tables_find().  The result is in the caller's memory, that is, in the one
 * that was current before SPI_connect().
 */
Datum
omni_job_read(int64 id)
{
	Datum		values[1] = {Int64GetDatum(id)};
	Datum		row;
	bool		isnull;

	if (run(&select_job, values, NULL, true) != 1)
		ereport(ERROR,
				(errcode(ERRCODE_NO_DATA_FOUND),
				 errmsg("job " INT64_FORMAT " was deleted while it was waited for", id)));
	row = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull);
	return SPI_datumTransfer(row, false, -1);
}

/*
 * A job that is in no table, as a row: one that was not even written down.  In a
 * backend; after omni_tables_find().  The result is palloc'd.
 */
Datum
omni_job_form(const OmniRequest *request, ArrayType *schemas, ArrayType *tables,
			  const char *status, const char *error)
{
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
	SET("schemas", PointerGetDatum(schemas), schemas == NULL);
	SET("tables", PointerGetDatum(tables), tables == NULL);
	SET("server", NameGetDatum(&request->server), false);
	SET("origin", CStringGetTextDatum("call"), false);
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
