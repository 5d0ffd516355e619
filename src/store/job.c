/*-------------------------------------------------------------------------
 *
 * job.c
 *		Read and write the rows of omni_refresh_job.
 *
 * See table.c for what the functions need and raise.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "executor/tuptable.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "utils/typcache.h"

#include "base/clock.h"
#include "base/compat.h"
#include "base/fault.h"
#include "shared/counter.h"
#include "store/job.h"
#include "store/row.h"

/* The latest time to accept from a row, in the year 2500, so that adding to it cannot overflow */
#define MAX_TIME	(INT64CONST(500) * 366 * USECS_PER_DAY)

static OmniStatement select_unfinished = {
	.table = &omni_job_table,
	.read = true,
	.text = "SELECT FROM %s WHERE " IN_FLIGHT " AND database = $1 UNION ALL"
	"  SELECT FROM %s WHERE " QUEUED " AND database = $1 LIMIT 1",
	.nargs = 1,
	.argtypes = {OIDOID}
};

static OmniStatement look_at_job = {
	.table = &omni_job_table,
	.read = true,
	.text = "SELECT " JOB_LIST " FROM %s WHERE id = $1",
	.nargs = 1,
	.argtypes = {INT8OID}
};

/* Waits for the row.  In a transaction with an old snapshot, too, it may have just changed. */
static OmniStatement lock_job = {
	.table = &omni_job_table,
	.latest = true,
	.text = "SELECT FROM %s WHERE id = $1 FOR NO KEY UPDATE",
	.nargs = 1,
	.argtypes = {INT8OID}
};

/* Do not ask for max(id): it might be looked for in the primary key, from its end. */
static OmniStatement select_retries = {
	.table = &omni_job_table,
	.read = true,
	.text = "SELECT id FROM %s WHERE retry_of = $1 AND requested_by_oid = $2",
	.nargs = 2,
	.argtypes = {INT8OID, OIDOID}
};

static OmniStatement count_unfinished = {
	.table = &omni_job_table,
	.read = true,
	.text = "SELECT count(*) FILTER (WHERE status = " OMNI_SQL(PENDING) " AND database = $1),"
	"  count(*) FILTER (WHERE status = " OMNI_SQL(SENDING) " AND database = $1),"
	"  count(*) FILTER (WHERE status = " OMNI_SQL(RUNNING) " AND database = $1),"
	"  count(*) FILTER (WHERE status = " OMNI_SQL(PENDING) " AND database = $1 AND run_at < clock_timestamp() - interval '5 min'"
	"   AND NOT is_held),"
	"  count(*) FILTER (WHERE database <> $1)"
	" FROM (SELECT status, database, run_at, kind = 'cache' AND EXISTS (SELECT FROM %s AS refresh WHERE " REFRESHING
	"   AND (requested_by_oid, server, model_id) = (job.requested_by_oid, job.server, job.model_id) AND id < job.id) AS is_held"
	"  FROM %s AS job WHERE " QUEUED " UNION ALL"
	"  SELECT status, database, run_at, false FROM %s WHERE " IN_FLIGHT ") AS job",
	.nargs = 1,
	.argtypes = {OIDOID}
};

static OmniStatement delay_job = {
	.table = &omni_job_table,
	.text = "UPDATE %s SET run_at = $2 WHERE id = $1 AND " IS_PENDING,
	.nargs = 2,
	.argtypes = {INT8OID, TIMESTAMPTZOID}
};

static OmniRow update(int64 id, bool (*wanted) (OmniStatus status), const OmniRowValues *row);
static bool is_unfinished(OmniStatus status);
static void note_attempt(OmniRowValues *row, const OmniJob *job, const OmniOutcome *outcome);
static void insert(OmniJob *job, OmniStatus status, TimestampTz run_at, TimestampTz sent_at);
static void insert_into(OmniWrite *write, const OmniJob *job, OmniStatus status, TimestampTz run_at,
						TimestampTz sent_at);
static ArrayType *keep_list(ArrayType *list);
static const char *origin_of(const char *name);
static TimestampTz to_finite(TimestampTz time);

/*
 * Record that a job is about to be sent to a URL, which contains no secret.  Commit
 * before sending the request, so that a crash cannot hide the attempt, and count the
 * attempt in job->attempts then.  Returns false if the job is no longer pending.
 *
 * Its time is that of the transaction's start.  So whatever was committed before that time was
 * seen when the row was locked, such as a refresh that holds a reset; see omni_job_lock().
 */
bool
omni_job_begin(OmniJob *job, const char *url)
{
	TimestampTz now = GetCurrentTransactionStartTimestamp();
	OmniEvent	sending = {
		.occurred_at = now,
		.event = OMNI_NAME_SENDING,
		.attempt = job->attempts + 1,
		.detail = psprintf("POST %s", url)
	};

	if (job->id == 0)
		insert(job, OMNI_STATUS_SENDING, now, now);
	else
	{
		OmniRowValues row = {0};

		omni_set(&row, OMNI_JOB_status, CStringGetTextDatum(OMNI_NAME_SENDING));
		omni_set(&row, OMNI_JOB_attempts, Int32GetDatum(job->attempts + 1));
		omni_set(&row, OMNI_JOB_sent_at, TimestampTzGetDatum(now));
		if (omni_job_is_first_reset(job))
			omni_set(&row, OMNI_JOB_renewed_at, TimestampTzGetDatum(now));
		if (update(job->id, omni_status_is_pending, &row) != OMNI_ROW_OURS)
			return false;
	}
	omni_event_add(job, &sending);
	OMNI_FAULT_POINT("begin: recorded");
	return true;
}

/*
 * Return whether a job is a reset of a cache that is sent for the first time.  Refreshes may
 * have held it for longer than retry_for, so its retries count from its first attempt.
 */
bool
omni_job_is_first_reset(const OmniJob *job)
{
	return !omni_job_kinds[job->request.kind].holds_resets && job->attempts == 0;
}

/*
 * Record that a job is throttled by the rate limit for "wait" microseconds.  The run_at
 * of a queued job stays the same, so that the job keeps its place in the queue.
 */
void
omni_job_delay(OmniJob *job, int64 wait)
{
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz run_at = omni_latest_now() + wait;
	OmniEvent	limited = {
		.occurred_at = now,
		.event = OMNI_NAME_RATE_LIMITED,
		.detail = psprintf("not to be sent before %s", timestamptz_to_str(now + wait))
	};

	if (job->id == 0)
		insert(job, OMNI_STATUS_PENDING, run_at, 0);
	else if (strcmp(job->origin, OMNI_ORIGIN_CALL) == 0)
		omni_job_defer(job->id, run_at);
	omni_event_add(job, &limited);
}

/* Delay a pending job until run_at. */
void
omni_job_defer(int64 id, TimestampTz run_at)
{
	Datum		values[2] = {Int64GetDatum(id), TimestampTzGetDatum(run_at)};

	(void) omni_run(&delay_job, values, NULL);
}

/*
 * Record the outcome of a job that is not sent at all.  If the job has a row, the caller
 * has locked it.
 */
void
omni_job_refuse(OmniJob *job, const OmniOutcome *outcome)
{

	if (job->id == 0)
		insert(job, OMNI_STATUS_PENDING, job->request.requested_at, 0);
	(void) omni_job_record(job, outcome);
}

/*
 * In a backend: add a job to the queue and return its row, palloc'd.  Sets *version for
 * omni_job_is_unchanged().
 */
Datum
omni_job_queue(const OmniJob *job, OmniRowVersion *version)
{
	OmniWrite	write;
	Datum		row;

	insert_into(&write, job, OMNI_STATUS_PENDING, job->request.requested_at, 0);
	row = omni_written_row(&write);
	omni_written_version(&write, version);
	omni_write_end(&write);
	return row;
}

/*
 * In the worker: add a job of a watch to the queue, and set job->id.  The watch's role may have
 * been renamed since.
 */
void
omni_job_add(OmniJob *job)
{
	const char *rolename = GetUserNameFromId(job->request.role, true);

	if (rolename != NULL)
		namestrcpy(&job->request.requested_by, rolename);
	insert(job, OMNI_STATUS_PENDING, job->request.requested_at, 0);
}

/*
 * In a backend, after omni_tables_find(): return whether a row is still as this transaction
 * has inserted it.  The transaction must not have rolled back the insertion.  A change by the
 * same transaction counts at once, and no longer once it is rolled back.
 */
bool
omni_job_is_unchanged(const OmniRowVersion *version)
{
	Relation	relation;
	bool		unchanged = false;

	if (version->table != omni_job_table.oid)
		return false;			/* DROP EXTENSION, CREATE EXTENSION */
	relation = table_open(version->table, NoLock);	/* locked since the INSERT */
	if (relation->rd_rel->relfilenode == version->file)
	{
		TupleTableSlot *slot = table_slot_create(relation, NULL);
		ItemPointerData tid = version->tid;

		unchanged = table_tuple_fetch_row_version(relation, &tid, SnapshotSelf, slot);
		ExecDropSingleTupleTableSlot(slot);
	}
	table_close(relation, NoLock);
	return unchanged;
}

/* Insert a job, and set job->id.  sent_at is 0 if it is not sent yet. */
static void
insert(OmniJob *job, OmniStatus status, TimestampTz run_at, TimestampTz sent_at)
{
	OmniWrite	write;

	insert_into(&write, job, status, run_at, sent_at);
	job->id = DatumGetInt64(omni_written_value(&write, OMNI_JOB_id));
	omni_write_end(&write);
}

/* Begin a write and insert a job. */
static void
insert_into(OmniWrite *write, const OmniJob *job, OmniStatus status, TimestampTz run_at,
			TimestampTz sent_at)
{
	const OmniRequest *request = &job->request;
	OmniRowValues row = {0};

	omni_set(&row, OMNI_JOB_status, CStringGetTextDatum(omni_status_name(status)));
	omni_set(&row, OMNI_JOB_model_id, UUIDPGetDatum(&request->model));
	if (request->has_branch)
		omni_set(&row, OMNI_JOB_branch_id, UUIDPGetDatum(&request->branch));
	omni_set(&row, OMNI_JOB_kind, CStringGetTextDatum(omni_job_kinds[request->kind].name));
	if (omni_job_kinds[request->kind].takes_policy)
		omni_set(&row, OMNI_JOB_policy, CStringGetTextDatum(request->policy));
	if (omni_job_kinds[request->kind].takes_extent)
		omni_set(&row, OMNI_JOB_hard, BoolGetDatum(request->hard));
	if (request->schemas != NULL)
		omni_set(&row, OMNI_JOB_schemas, PointerGetDatum(request->schemas));
	if (request->tables != NULL)
		omni_set(&row, OMNI_JOB_tables, PointerGetDatum(request->tables));
	if (request->has_reset_at)
		omni_set(&row, OMNI_JOB_reset_at, TimestampTzGetDatum(request->reset_at));
	omni_set(&row, OMNI_JOB_server, CStringGetTextDatum(NameStr(request->server)));
	omni_set(&row, OMNI_JOB_origin, CStringGetTextDatum(job->origin));
	omni_set(&row, OMNI_JOB_requested_by, CStringGetTextDatum(NameStr(request->requested_by)));
	omni_set(&row, OMNI_JOB_requested_by_oid, ObjectIdGetDatum(request->role));
	omni_set(&row, OMNI_JOB_requested_at, TimestampTzGetDatum(request->requested_at));
	omni_set(&row, OMNI_JOB_run_at, TimestampTzGetDatum(run_at));
	if (sent_at != 0)
		omni_set(&row, OMNI_JOB_sent_at, TimestampTzGetDatum(sent_at));
	omni_set(&row, OMNI_JOB_attempts, Int32GetDatum(sent_at != 0 ? 1 : 0));
	if (job->retry_of != 0)
		omni_set(&row, OMNI_JOB_retry_of, Int64GetDatum(job->retry_of));
	if (OidIsValid(request->caller))
	{
		omni_set(&row, OMNI_JOB_called_by, CStringGetTextDatum(NameStr(request->called_by)));
		omni_set(&row, OMNI_JOB_called_by_oid, ObjectIdGetDatum(request->caller));
	}
	if (NameStr(request->application)[0] != '\0')
		omni_set(&row, OMNI_JOB_application, CStringGetTextDatum(NameStr(request->application)));
	omni_set(&row, OMNI_JOB_database, ObjectIdGetDatum(MyDatabaseId));

	omni_write_begin(write, &omni_job_table, NULL);
	omni_write_insert(write, &row);
}

/* Update one job; see omni_write_update(). */
static OmniRow
update(int64 id, bool (*wanted) (OmniStatus status), const OmniRowValues *row)
{
	OmniWrite	write;
	OmniRow		result;

	omni_write_begin(&write, &omni_job_table, row);
	result = omni_write_update(&write, id, wanted, row);
	omni_write_end(&write);
	return result;
}

static bool
is_unfinished(OmniStatus status)
{
	return !omni_status_is_final(status);
}

/*
 * Record the outcome of an attempt in the job's row and in the event log.  Writes
 * neither if another session has locked, finished or deleted the row.
 */
OmniRow
omni_job_record(OmniJob *job, const OmniOutcome *outcome)
{
	TimestampTz now = GetCurrentTimestamp();
	bool		at_end = !outcome->again;
	char	   *error = outcome->error.sqlstate != 0 ? omni_error_text(&outcome->error) : NULL;
	char	   *job_error = outcome->job_error != NULL ? omni_error_text(outcome->job_error) : error;
	OmniRowValues row = {0};
	OmniRow		result;
	OmniEvent	attempt = {
		.occurred_at = now,
		.event = outcome->attempt_event,
		.attempt = job->attempts,
		.http_status = outcome->http_status,
		.sqlstate = outcome->error.sqlstate,
		.duration = outcome->elapsed,
		.detail = error != NULL ? error : outcome->note
	};
	OmniEvent	end = {.occurred_at = now,.event = outcome->status};

	Assert(outcome->status != NULL);
	omni_set(&row, OMNI_JOB_status, CStringGetTextDatum(outcome->status));
	if (outcome->has_job_id)
		omni_set(&row, OMNI_JOB_job_id, UUIDPGetDatum(&outcome->job_id));
	if (at_end)
		omni_set(&row, OMNI_JOB_finished_at, TimestampTzGetDatum(now));
	else
		omni_set(&row, OMNI_JOB_run_at, TimestampTzGetDatum(omni_latest_now() + outcome->delay));
	if (job_error != NULL)
		omni_set(&row, OMNI_JOB_error, CStringGetTextDatum(job_error));
	else
		omni_set_null(&row, OMNI_JOB_error);
	if (outcome->attempted || outcome->recovered)
		note_attempt(&row, job, outcome);

	result = update(job->id, is_unfinished, &row);
	OMNI_FAULT_POINT("record: row updated");
	if (result != OMNI_ROW_OURS)
		return result;
	if (at_end)
		omni_count_jobs(&job->request.server, outcome->status, 1);
	if (outcome->quiet)
		return OMNI_ROW_OURS;
	if (strcmp(outcome->status, OMNI_NAME_PENDING) != 0)
		omni_notify(job->id, outcome->status);
	if (outcome->attempt_event == NULL)
		attempt.event = outcome->status;
	omni_event_add(job, &attempt);
	if (outcome->attempt_event != NULL && at_end)
		omni_event_add(job, &end);
	return OMNI_ROW_OURS;
}

/*
 * Note in a row what the next attempt must know of one that has ended, or was under way when the
 * worker ended.
 */
static void
note_attempt(OmniRowValues *row, const OmniJob *job, const OmniOutcome *outcome)
{
	if (outcome->may_have_arrived || outcome->recovered)
		omni_set(row, OMNI_JOB_may_have_arrived, BoolGetDatum(true));
	if (outcome->few || job->few_failures > 0)
		omni_set(row, OMNI_JOB_few_failures, Int32GetDatum(outcome->few ? job->few_failures + 1 : 0));
	if (outcome->recovered || (outcome->http_status != 0 && job->recoveries > 0))
		omni_set(row, OMNI_JOB_recoveries, Int32GetDatum(outcome->recovered ? job->recoveries + 1 : 0));
}

/* In a backend: return whether any job of this database is unfinished. */
bool
omni_job_any_unfinished(void)
{
	Datum		values[1] = {ObjectIdGetDatum(MyDatabaseId)};
	bool		any;

	SPI_connect();
	any = omni_run(&select_unfinished, values, NULL) > 0;
	SPI_finish();
	return any;
}

/*
 * In a backend, after omni_tables_find(): return a job's row, palloc'd, as the result of
 * an SQL function.
 */
Datum
omni_job_read(int64 id)
{
	Datum		row;

	if (!omni_row_read(&omni_job_table, id, &row))
		ereport(ERROR,
				(errcode(ERRCODE_NO_DATA_FOUND),
				 errmsg("job " INT64_FORMAT " was deleted while it was waited for", id)));
	return row;
}

/*
 * The same for a merged job: what it has asked for, and what became of its carrier.
 */
Datum
omni_job_read_outcome(int64 id, int64 carrier)
{
	static const int columns[] = {
		OMNI_JOB_status, OMNI_JOB_job_id, OMNI_JOB_sent_at, OMNI_JOB_finished_at, OMNI_JOB_attempts, OMNI_JOB_error
	};
	int			numbers[lengthof(columns)];
	Datum		values[lengthof(columns)];
	bool		nulls[lengthof(columns)];
	HeapTupleHeader outcome;
	HeapTupleData job;
	HeapTuple	result;

	/* keep the table from being altered in between */
	LockRelationOid(omni_job_table.oid, AccessShareLock);
	outcome = DatumGetHeapTupleHeader(omni_job_read(carrier));
	job.t_data = DatumGetHeapTupleHeader(omni_job_read(id));
	job.t_len = HeapTupleHeaderGetDatumLength(job.t_data);
	ItemPointerSetInvalid(&job.t_self);
	job.t_tableOid = InvalidOid;
	for (int i = 0; i < lengthof(columns); i++)
	{
		numbers[i] = omni_job_table.numbers[columns[i]];
		values[i] = GetAttributeByNum(outcome, numbers[i], &nulls[i]);
	}
	result = heap_modify_tuple_by_cols(&job, omni_table_rowtype(&omni_job_table), lengthof(columns),
									   numbers, values, nulls);
	UnlockRelationOid(omni_job_table.oid, AccessShareLock);
	return HeapTupleGetDatum(result);
}

/*
 * In a backend, after omni_tables_find(): return the id of the newest retry of the job that a
 * job is to repeat, by the same requester, or 0.  Locks the repeated job until the end of the
 * transaction: who retries it at the same time waits, and then finds this retry.
 */
int64
omni_job_last_retry(const OmniJob *job)
{
	Datum		values[2] = {Int64GetDatum(job->retry_of), ObjectIdGetDatum(job->request.role)};
	int64		last = 0;
	uint64		count;

	SPI_connect();
	(void) omni_run(&lock_job, values, NULL);
	count = omni_run(&select_retries, values, NULL);
	for (uint64 row = 0; row < count; row++)
		last = Max(last, DatumGetInt64(omni_value(row, 0, INT8OID)));
	SPI_finish();
	return last;
}

/*
 * In a backend with SPI connected, after omni_tables_find(): read a job under the latest
 * snapshot.  Returns false if there is no such job.  The lists of schemas and tables are
 * palloc'd in the context of SPI's caller.
 */
bool
omni_job_look(int64 id, OmniJobState *state)
{
	Datum		values[1] = {Int64GetDatum(id)};

	if (omni_run(&look_at_job, values, NULL) != 1)
		return false;
	omni_job_decode(0, state);
	if (state->job.request.schemas != NULL)
		state->job.request.schemas = keep_list(state->job.request.schemas);
	if (state->job.request.tables != NULL)
		state->job.request.tables = keep_list(state->job.request.tables);
	return true;
}

/*
 * Read a job and its carrier: the job itself unless it was merged.  Returns false if there is
 * no such job.
 *
 * A carrier has the lower number: rows written by hand must not make this loop for ever.
 */
bool
omni_job_look_carrier(int64 id, OmniJobState *own, OmniJobState *carrier)
{
	OmniJobState next;

	if (!omni_job_look(id, own))
		return false;
	*carrier = *own;
	while (carrier->merged_into != 0 && carrier->merged_into < carrier->job.id &&
		   omni_job_look(carrier->merged_into, &next))
		*carrier = next;
	return true;
}

/*
 * In a backend with SPI connected: return the id of a job's carrier, or of the job itself if it
 * was not merged, has been deleted, or another session holds a conflicting lock on the table.
 */
int64
omni_job_carrier(int64 id)
{
	OmniJobState own;
	OmniJobState carrier;

	if (!ConditionalLockRelationOid(omni_job_table.oid, AccessShareLock))
		return id;
	if (omni_job_look_carrier(id, &own, &carrier))
		id = carrier.job.id;
	UnlockRelationOid(omni_job_table.oid, AccessShareLock);
	return id;
}

static ArrayType *
keep_list(ArrayType *list)
{
	return (ArrayType *) DatumGetPointer(SPI_datumTransfer(PointerGetDatum(list), false, -1));
}

/*
 * Decode a row that the last statement has returned as JOB_LIST.  No other function reads
 * such rows.  The table's owner may have changed anything, so check types and NULLs, and
 * clamp numbers and times to their range.  The lists of schemas and tables live as long
 * as SPI's result.
 */
void
omni_job_decode(int row, OmniJobState *state)
{
#define COLUMN_NUMBER(name, type, required) column_ ## name,
	enum
	{
		OMNI_JOB_COLUMNS(COLUMN_NUMBER)
		column_merge_key,
		column_xmin
	};
#define VALUE(name, type) omni_value(row, column_ ## name, type)
#define VALUE_OR_NULL(name, type) omni_value_or_null(row, column_ ## name, type, &isnull)
	OmniJob    *job = &state->job;
	OmniRequest *request = &job->request;
	bool		isnull;
	Datum		value;

	memset(state, 0, sizeof(*state));
	job->id = DatumGetInt64(VALUE(id, INT8OID));
	strlcpy(state->status, TextDatumGetCString(VALUE(status, TEXTOID)), sizeof(state->status));
	value = VALUE_OR_NULL(job_id, UUIDOID);
	if (!isnull)
		job->job_id = *DatumGetUUIDP(value);
	omni_request_decode(request, row, column_server, column_model_id, column_branch_id, column_policy,
						column_requested_by, column_requested_by_oid);
	request->kind = omni_kind_find(TextDatumGetCString(VALUE(kind, TEXTOID)));
	value = VALUE_OR_NULL(hard, BOOLOID);	/* true is Omni's default */
	request->hard = omni_job_kinds[request->kind].takes_extent && (isnull || DatumGetBool(value));
	request->hard_named = omni_job_kinds[request->kind].takes_extent && !request->hard;
	value = VALUE_OR_NULL(schemas, TEXTARRAYOID);
	job->request.schemas = isnull ? NULL : DatumGetArrayTypeP(value);
	value = VALUE_OR_NULL(tables, TEXTARRAYOID);
	job->request.tables = isnull ? NULL : DatumGetArrayTypeP(value);
	value = VALUE_OR_NULL(reset_at, TIMESTAMPTZOID);
	request->has_reset_at = !isnull && !TIMESTAMP_NOT_FINITE(DatumGetTimestampTz(value));
	if (request->has_reset_at)
		request->reset_at = DatumGetTimestampTz(value);
	job->origin = origin_of(TextDatumGetCString(VALUE(origin, TEXTOID)));
	value = VALUE_OR_NULL(called_by, TEXTOID);
	if (!isnull)
		request->called_by = omni_name(value);
	value = VALUE_OR_NULL(called_by_oid, OIDOID);
	request->caller = isnull ? InvalidOid : DatumGetObjectId(value);
	request->requested_at = to_finite(DatumGetTimestampTz(VALUE(requested_at, TIMESTAMPTZOID)));
	value = VALUE_OR_NULL(renewed_at, TIMESTAMPTZOID);
	job->renewed_at = isnull ? request->requested_at : Max(request->requested_at, to_finite(DatumGetTimestampTz(value)));
	value = VALUE_OR_NULL(sent_at, TIMESTAMPTZOID);
	job->sent_at = isnull ? 0 : to_finite(DatumGetTimestampTz(value));
	job->attempts = Min(Max(DatumGetInt32(VALUE(attempts, INT4OID)), 0), INT_MAX - 1);
	value = VALUE_OR_NULL(may_have_arrived, BOOLOID);
	job->may_have_arrived = !isnull && DatumGetBool(value);
	value = VALUE_OR_NULL(few_failures, INT4OID);
	job->few_failures = isnull ? 0 : Min(Max(DatumGetInt32(value), 0), INT_MAX - 1);
	value = VALUE_OR_NULL(recoveries, INT4OID);
	job->recoveries = isnull ? 0 : Min(Max(DatumGetInt32(value), 0), INT_MAX - 1);
	value = VALUE_OR_NULL(merged_into, INT8OID);
	state->merged_into = isnull ? 0 : DatumGetInt64(value);
	job->database = DatumGetObjectId(VALUE(database, OIDOID));
	job->merge_key = DatumGetInt64(VALUE(merge_key, INT8OID));
	state->uncommitted = TransactionIdIsCurrentTransactionId(DatumGetTransactionId(VALUE(xmin, XIDOID)));
#undef VALUE
#undef VALUE_OR_NULL
}

/*
 * Decode what a row of a job and one of a watch have alike: the server, model and branch, the
 * cache policy and the requester.  Columns count from 0 in the last statement's result.
 */
void
omni_request_decode(OmniRequest *request, int row, int server, int model, int branch, int policy,
					int requested_by, int requested_by_oid)
{
	bool		isnull;
	Datum		value;

	request->server = omni_name(omni_value(row, server, TEXTOID));
	request->model = *DatumGetUUIDP(omni_value(row, model, UUIDOID));
	request->has_model = true;
	value = omni_value_or_null(row, branch, UUIDOID, &isnull);
	request->has_branch = !isnull;
	if (!isnull)
		request->branch = *DatumGetUUIDP(value);
	value = omni_value_or_null(row, policy, TEXTOID, &isnull);
	if (!isnull)
		strlcpy(request->policy, TextDatumGetCString(value), sizeof(request->policy));
	request->requested_by = omni_name(omni_value(row, requested_by, TEXTOID));
	request->role = DatumGetObjectId(omni_value(row, requested_by_oid, OIDOID));
}

/* Return the origin with a name; that of most queued jobs if its row was tampered with. */
static const char *
origin_of(const char *name)
{
	static const char *const origins[] = {OMNI_ORIGIN_CALL, OMNI_ORIGIN_RETRY, OMNI_ORIGIN_DDL};

	for (int i = 0; i < lengthof(origins); i++)
	{
		if (strcmp(name, origins[i]) == 0)
			return origins[i];
	}
	return OMNI_ORIGIN_ON_COMMIT;
}

/* Clamp a time, "infinity" in particular, so that intervals can be added to it. */
static TimestampTz
to_finite(TimestampTz time)
{
	return Min(Max(time, 0), MAX_TIME);
}

/*
 * In a backend: count the unfinished jobs.  Returns false, without waiting, if another
 * session holds a conflicting lock on the table.
 */
bool
omni_job_count(OmniJobCounts *counts)
{
	Datum		values[1] = {ObjectIdGetDatum(MyDatabaseId)};
	int64	   *fields[] = {&counts->pending, &counts->sending, &counts->running, &counts->stuck, &counts->foreign};

	if (!ConditionalLockRelationOid(omni_job_table.oid, AccessShareLock))
		return false;
	SPI_connect();
	(void) omni_run(&count_unfinished, values, NULL);
	for (int i = 0; i < lengthof(fields); i++)
		*fields[i] = DatumGetInt64(omni_value(0, i, INT8OID));
	SPI_finish();
	UnlockRelationOid(omni_job_table.oid, AccessShareLock);
	return true;
}

/* Return the owner of the table of jobs; call omni_tables_find() first. */
Oid
omni_job_owner(void)
{
	return omni_job_table.owner;
}

/*
 * In a backend, after omni_tables_find(): form a row, palloc'd, for a job that was never
 * written to the table.  If the server could not be used, the row lacks what was to be taken
 * from the server's options.
 */
Datum
omni_job_form(const OmniJob *job, const char *status, const char *error)
{
	const OmniRequest *request = &job->request;
	TupleDesc	rowtype = omni_table_rowtype(&omni_job_table);
	Datum	   *values = palloc0(rowtype->natts * sizeof(Datum));
	bool	   *nulls = palloc(rowtype->natts * sizeof(bool));

#define SET(column, value, isnull) \
	do { \
		int			i_ = SPI_fnumber(rowtype, column) - 1; \
		values[i_] = (value); \
		nulls[i_] = (isnull); \
	} while (0)

	memset(nulls, true, rowtype->natts);
	SET("status", CStringGetTextDatum(status), false);
	SET("model_id", UUIDPGetDatum(&request->model), !request->has_model);
	SET("branch_id", UUIDPGetDatum(&request->branch), !request->has_branch);
	SET("kind", CStringGetTextDatum(omni_job_kinds[request->kind].name), false);
	SET("hard", BoolGetDatum(request->hard), !omni_job_kinds[request->kind].takes_extent);
	SET("schemas", PointerGetDatum(job->request.schemas), job->request.schemas == NULL);
	SET("tables", PointerGetDatum(job->request.tables), job->request.tables == NULL);
	SET("policy", CStringGetTextDatum(request->policy), request->policy[0] == '\0');
	SET("reset_at", TimestampTzGetDatum(request->reset_at), !request->has_reset_at);
	SET("server", CStringGetTextDatum(NameStr(request->server)), false);
	SET("origin", CStringGetTextDatum(job->origin), false);
	SET("requested_by", CStringGetTextDatum(NameStr(request->requested_by)), false);
	SET("requested_by_oid", ObjectIdGetDatum(request->role), false);
	SET("requested_at", TimestampTzGetDatum(request->requested_at), false);
	SET("run_at", TimestampTzGetDatum(request->requested_at), false);
	SET("finished_at", TimestampTzGetDatum(GetCurrentTimestamp()), false);
	SET("attempts", Int32GetDatum(0), false);
	SET("retry_of", Int64GetDatum(job->retry_of), job->retry_of == 0);
	SET("called_by", CStringGetTextDatum(NameStr(request->called_by)), !OidIsValid(request->caller));
	SET("called_by_oid", ObjectIdGetDatum(request->caller), !OidIsValid(request->caller));
	SET("application", CStringGetTextDatum(NameStr(request->application)), NameStr(request->application)[0] == '\0');
	SET("database", ObjectIdGetDatum(MyDatabaseId), false);
	SET("error", error == NULL ? (Datum) 0 : CStringGetTextDatum(error), error == NULL);
#undef SET

	return HeapTupleGetDatum(heap_form_tuple(rowtype, values, nulls));
}
