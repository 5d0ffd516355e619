/*-------------------------------------------------------------------------
 *
 * queue.c
 *		The queue: jobs that are "pending", not of a call, and due; and those that are
 *		"running", to be asked about when that is due.
 *
 * It is nothing but rows of omni_refresh_job, found by way of the index on those
 * that are unfinished.  See table.c for what the functions need and raise.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "omni_refresh.h"
#include "table.h"

/* Jobs to merge in one statement, which takes less than a second */
#define MERGE_LIMIT			20000

/* How often a job that was being sent is sent again when the worker has ended */
#define MAX_RECOVERIES		3

static OmniStatement delay_job = {
	.table = &omni_job_table,
	.text = "UPDATE %s SET run_at = $2 WHERE id = $1 AND " IS_PENDING,
	.nargs = 2,
	.argtypes = {INT8OID, TIMESTAMPTZOID}
};

/* calls that nobody waits for any more, and copies of another database's jobs */
static OmniStatement settle_jobs = {
	.table = &omni_job_table,
	.text = "UPDATE %s SET status = CASE WHEN (status = 'sending' OR attempts > 0) AND database = $1"
	" THEN 'unknown' ELSE 'canceled' END,"
	" finished_at = clock_timestamp(), error = CASE WHEN database = $1 THEN $2 ELSE $3 END"
	" WHERE status = ANY ('{pending, sending, running}')"
	"  AND (database <> $1 OR (origin = 'call' AND status <> 'running'))"
	" RETURNING id::bigint, requested_by::name, status::text, attempts::int, error::text",
	.nargs = 3,
	.argtypes = {OIDOID, TEXTOID, TEXTOID}
};

/* queued jobs that were about to be sent */
static OmniStatement select_sending = {
	.table = &omni_job_table,
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
static OmniStatement select_sets = {
	.table = &omni_job_table,
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
static OmniStatement lock_jobs = {
	.table = &omni_job_table,
	.text = "SELECT id::bigint FROM %s WHERE id = ANY ($1) AND " IS_PENDING " FOR NO KEY UPDATE SKIP LOCKED",
	.nargs = 1,
	.argtypes = {INT8ARRAYOID}
};

static OmniStatement widen_job = {
	.table = &omni_job_table,
	.text = "UPDATE %s SET hard = $2, schemas = $3, tables = $4, reset_at = $5"
	" WHERE id = $1 AND (hard, schemas, tables, reset_at) IS DISTINCT FROM ($2, $3, $4, $5)",
	.nargs = 5,
	.argtypes = {INT8OID, BOOLOID, TEXTARRAYOID, TEXTARRAYOID, TIMESTAMPTZOID}
};

/*
 * What somebody has changed between the two looks at a row is found where it was and
 * no more: it stays as it is.
 */
static OmniStatement merge_jobs = {
	.table = &omni_job_table,
	.text = "WITH locked AS ("
	"  SELECT job.ctid AS place, carrier FROM unnest($1, $2) AS members (id, carrier) JOIN %s AS job USING (id)"
	"  WHERE " IS_PENDING " FOR NO KEY UPDATE OF job SKIP LOCKED"
	" ), merged AS ("
	"  UPDATE %s AS job SET status = 'merged', merged_into = carrier,"
	"   finished_at = clock_timestamp(), error = NULL"
	"  FROM locked WHERE job.ctid = place"
	"  RETURNING job.id, job.requested_by, job.requested_at, carrier"
	" )"
	" SELECT array_agg(id), array_agg(requested_by), array_agg(requested_at), array_agg(carrier)"
	" FROM merged",
	.nargs = 2,
	.argtypes = {INT8ARRAYOID, INT8ARRAYOID}
};

/* what would come later than any wait of ours comes of a clock that was set back */
static OmniStatement reclock_jobs = {
	.table = &omni_job_table,
	.text = "UPDATE %s SET run_at = $1 WHERE status = ANY ('{pending, running}')"
	" AND (status = 'running' OR origin <> 'call') AND run_at > $2",
	.nargs = 2,
	.argtypes = {TIMESTAMPTZOID, TIMESTAMPTZOID}
};

#define MERGE_KEY \
	"hashtextextended(concat_ws(' ', server, requested_by_oid, kind, model_id, branch_id, policy), 0)"

/*
 * The first jobs that are due, but for some servers and some roles at some servers,
 * and for those that somebody else is about to change.
 */
#define SELECT_DUE(condition) \
	"SELECT id::bigint, server::name, requested_by::name, requested_by_oid::oid," \
	"  requested_at::timestamptz, model_id::uuid, branch_id::uuid, coalesce(hard, true)," \
	"  schemas::text[], tables::text[], attempts::int, " MERGE_KEY "," \
	"  kind = 'cache', policy::text, reset_at::timestamptz, job_id::uuid, sent_at::timestamptz" \
	" FROM %s AS job" \
	" WHERE " condition " AND database = $1 AND run_at <= $2" \
	"  AND server::text <> ALL ($3) AND concat_ws(' ', server, requested_by_oid) <> ALL ($3)" \
	" ORDER BY run_at, id LIMIT $4 FOR NO KEY UPDATE SKIP LOCKED"
#define SELECT_DUE_COLUMNS	17
#define SELECT_DUE_NARGS	4
#define SELECT_DUE_ARGTYPES	{OIDOID, TIMESTAMPTZOID, TEXTARRAYOID, INT8OID}

static OmniStatement select_due = {
	.table = &omni_job_table,
	.text = SELECT_DUE("status = 'pending' AND origin <> 'call'"),
	.nargs = SELECT_DUE_NARGS,
	.argtypes = SELECT_DUE_ARGTYPES
};

/* to be asked about */
static OmniStatement select_due_running = {
	.table = &omni_job_table,
	.text = SELECT_DUE("status = 'running'"),
	.nargs = SELECT_DUE_NARGS,
	.argtypes = SELECT_DUE_ARGTYPES
};

/* whether any are left, and when the next one will be due */
#define UNFINISHED \
	"status = ANY ('{pending, running}') AND (status = 'running' OR origin <> 'call') AND database = $1"

static OmniStatement select_next = {
	.table = &omni_job_table,
	.text = "SELECT EXISTS (SELECT FROM %s WHERE " UNFINISHED "),"
	"  (SELECT run_at::timestamptz FROM %s WHERE " UNFINISHED " AND run_at > $2 ORDER BY run_at LIMIT 1)",
	.nargs = 2,
	.argtypes = {OIDOID, TIMESTAMPTZOID}
};

static OmniStatement stop_following = {
	.table = &omni_job_table,
	.text = "UPDATE %s SET status = 'accepted', finished_at = clock_timestamp(), error = NULL"
	" WHERE status = 'running' AND database = $1"
	" RETURNING id::bigint, requested_by::name, status::text, attempts::int, 'not followed to its end'",
	.nargs = 1,
	.argtypes = {OIDOID}
};

/*
 * The next of them by their numbers, which come about as they were asked for.  What
 * was merged stays as long as the end of its carrier may put it back into the queue.
 */
static OmniStatement select_old = {
	.table = &omni_job_table,
	.text = "SELECT array_agg(id) FILTER (WHERE finished_at < $2 AND"
	"  (SELECT status FROM %s AS carrier WHERE carrier.id = job.merged_into)"
	"   = ANY ('{pending, sending, running}') IS NOT TRUE),"
	"  max(id), (array_agg(requested_at ORDER BY id DESC))[1] >= $2"
	" FROM (SELECT id, finished_at, requested_at, merged_into FROM %s WHERE id > $1 ORDER BY id LIMIT $3) AS job",
	.nargs = 3,
	.argtypes = {INT8OID, TIMESTAMPTZOID, INT8OID}
};

static OmniStatement delete_jobs = {
	.table = &omni_job_table,
	.text = "DELETE FROM %s WHERE id = ANY (ARRAY(SELECT id FROM %s WHERE id = ANY ($1) FOR UPDATE SKIP LOCKED))",
	.nargs = 1,
	.argtypes = {INT8ARRAYOID}
};

static OmniStatement cancel_job = {
	.table = &omni_job_table,
	.text = "UPDATE %s AS job SET status = 'canceled', finished_at = clock_timestamp(), error = NULL"
	" WHERE id = $1 AND " IS_PENDING
	" RETURNING id::bigint, requested_by::name, status::text, attempts::int, $2",
	.nargs = 2,
	.argtypes = {INT8OID, TEXTOID}
};

/* who carries out a set has the lowest number of it */
static OmniStatement release_jobs = {
	.table = &omni_job_table,
	.text = "UPDATE %s SET status = 'pending', merged_into = NULL, finished_at = NULL"
	" WHERE id > $1 AND merged_into = $1 AND status = 'merged'"
	" RETURNING id::bigint, requested_by::name, 'released', attempts::int, 'job ' || $1 || ' was canceled'",
	.nargs = 1,
	.argtypes = {INT8OID}
};

static OmniStatement select_sent = {
	.table = &omni_job_table,
	.text = "SELECT " MERGE_KEY ", max(sent_at)::timestamptz FROM %s"
	" WHERE id = ANY ($1) AND origin <> 'call' AND sent_at IS NOT NULL GROUP BY 1",
	.nargs = 1,
	.argtypes = {INT8ARRAYOID}
};

static ArrayType *make_bigints(Datum *elements, int count);
static void add_rows_events(void);
static void recover(void);
static void add_members(HeapTuple set, TupleDesc desc, Datum *members, Datum *carriers, int *count);

/*
 * Keeps pending jobs from being changed by others until the end of the transaction.
 * Says of which, by their places in ids: not of those that are not pending any more,
 * or that somebody else is about to change, for whom nobody waits.  The result is
 * palloc'd.
 */
bool *
omni_job_lock(const int64 *ids, int count)
{
	bool	   *locked = palloc0(count * sizeof(bool));
	Datum	   *elements = palloc(count * sizeof(Datum));
	Datum		values[1];
	uint64		nlocked;

	for (int i = 0; i < count; i++)
		elements[i] = Int64GetDatum(ids[i]);
	values[0] = PointerGetDatum(make_bigints(elements, count));
	nlocked = omni_run(&lock_jobs, values, NULL);
	for (uint64 row = 0; row < nlocked; row++)
	{
		bool		isnull;
		int64		id = DatumGetInt64(omni_result(row, 0, &isnull));

		for (int i = 0; i < count; i++)
			locked[i] |= ids[i] == id;
	}
	return locked;
}

static ArrayType *
make_bigints(Datum *elements, int count)
{
	return construct_array(elements, count, INT8OID, sizeof(int64), FLOAT8PASSBYVAL, TYPALIGN_DOUBLE);
}

/* Lets a pending job wait. */
void
omni_job_defer(int64 id, TimestampTz run_at)
{
	Datum		values[2] = {Int64GetDatum(id), TimestampTzGetDatum(run_at)};

	(void) omni_run(&delay_job, values, NULL);
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

	omni_error_set(&left, ERRCODE_TRANSACTION_RESOLUTION_UNKNOWN,
				   "the background worker or the server ended before the answer came");
	omni_error_hint(&left, "If the job was being sent, look in Omni before you send it again.");
	omni_error_set(&copied, ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
				   "the job was asked for in another database, of which this is a copy");
	values[1] = CStringGetTextDatum(omni_error_text(&left));
	values[2] = CStringGetTextDatum(omni_error_text(&copied));
	(void) omni_run(&settle_jobs, values, NULL);
	add_rows_events();
	recover();
}

/*
 * Adds an event for each row that the last statement has returned, of which they
 * are job, requester, event, attempts and detail, and tells of those whose status
 * that is.
 */
static void
add_rows_events(void)
{
	SPITupleTable *rows = SPI_tuptable;
	uint64		count = SPI_processed;

	for (uint64 i = 0; i < count; i++)
	{
		OmniJob		job = {0};
		OmniEvent	event = {.occurred_at = GetCurrentTimestamp()};
		Datum		columns[5];
		bool		isnull = false;

		/* who owns the table may have let NULLs into it */
		for (int column = 0; column < 5 && !isnull; column++)
			columns[column] = SPI_getbinval(rows->vals[i], rows->tupdesc, column + 1, &isnull);
		if (isnull)
			continue;
		job.id = DatumGetInt64(columns[0]);
		job.request.requested_by = *DatumGetName(columns[1]);
		event.event = TextDatumGetCString(columns[2]);
		event.attempt = DatumGetInt32(columns[3]);
		event.detail = TextDatumGetCString(columns[4]);
		omni_event_add(&job, &event);
		if (strcmp(event.event, "released") != 0)
			omni_notify(job.id, event.event);
	}
}

/*
 * Puts queued jobs that were about to be sent back into the queue, but not for
 * ever: it may have been such a job that has ended the worker or the server.
 */
static void
recover(void)
{
	uint64		count = omni_run(&select_sending, NULL, NULL);
	SPITupleTable *rows = SPI_tuptable;

	for (uint64 i = 0; i < count; i++)
	{
		OmniOutcome outcome = {.status = "pending",.run_at = GetCurrentTimestamp()};
		OmniJob		job = {0};
		bool		isnull;

		job.id = DatumGetInt64(SPI_getbinval(rows->vals[i], rows->tupdesc, 1, &isnull));
		job.request.requested_by = *DatumGetName(SPI_getbinval(rows->vals[i], rows->tupdesc, 2, &isnull));
		job.attempts = DatumGetInt32(SPI_getbinval(rows->vals[i], rows->tupdesc, 3, &isnull));
		if (omni_events_recoveries(job.id) < MAX_RECOVERIES)
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
	uint64		nsets = omni_run(&select_sets, values, NULL);
	SPITupleTable *sets = SPI_tuptable;
	bool		isnull;

	members = palloc(MERGE_LIMIT * sizeof(Datum));
	carriers = palloc(MERGE_LIMIT * sizeof(Datum));
	for (uint64 i = 0; i < nsets && count < MERGE_LIMIT; i++)
		add_members(sets->vals[i], sets->tupdesc, members, carriers, &count);
	if (count == 0)
		return false;

	values[0] = PointerGetDatum(make_bigints(members, count));
	values[1] = PointerGetDatum(make_bigints(carriers, count));
	(void) omni_run(&merge_jobs, values, NULL);
	for (int i = 0; i < 4; i++)
		values[i] = omni_result(0, i, &isnull);
	if (!isnull)
		omni_events_merged(values[0], values[1], values[2], values[3]);
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
	int64		carrier;

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
	carrier = DatumGetInt64(ids[0]);
	if (!*omni_job_lock(&carrier, 1))
		return;
	(void) omni_run(&widen_job, values, nulls);
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

	(void) omni_run(&reclock_jobs, values, NULL);
}

/*
 * The first jobs of the queue that are due, or of those that are followed, at most
 * limit of them, and their number.  held is an array of what is left out: servers
 * by name, and roles at a server by its name, a space and their OID.  The result is
 * palloc'd.
 */
OmniJob *
omni_job_due(TimestampTz now, bool running, ArrayType *held, int limit, int *count)
{
	Datum		values[4] = {
		ObjectIdGetDatum(MyDatabaseId),
		TimestampTzGetDatum(now),
		PointerGetDatum(held),
		Int64GetDatum(limit)
	};
	OmniJob    *jobs;

	*count = omni_run(running ? &select_due_running : &select_due, values, NULL);
	jobs = palloc0(*count * sizeof(OmniJob));
	for (int i = 0; i < *count; i++)
	{
		OmniJob    *job = &jobs[i];
		OmniRequest *request = &job->request;
		Datum		columns[SELECT_DUE_COLUMNS];
		bool		isnull[SELECT_DUE_COLUMNS];

		for (int column = 0; column < SELECT_DUE_COLUMNS; column++)
			columns[column] = omni_result(i, column, &isnull[column]);

		job->origin = OMNI_ORIGIN_ON_COMMIT;	/* or alike */
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
		if (DatumGetBool(columns[12]))
			request->kind = OMNI_KIND_CACHE;
		if (!isnull[13])
			strlcpy(request->policy, TextDatumGetCString(columns[13]), sizeof(request->policy));
		request->has_reset_at = !isnull[14];
		if (request->has_reset_at)
			request->reset_at = DatumGetTimestampTz(columns[14]);
		if (!isnull[15])
			job->job_id = *DatumGetUUIDP(columns[15]);
		if (!isnull[16])
			job->sent_at = DatumGetTimestampTz(columns[16]);
	}
	return jobs;
}

/* Lets go of the jobs that are followed. */
void
omni_job_stop_following(void)
{
	Datum		values[1] = {ObjectIdGetDatum(MyDatabaseId)};

	(void) omni_run(&stop_following, values, NULL);
	add_rows_events();
}

/*
 * Deletes jobs, with their events, that were finished before a time: of so many
 * with a number above *after, which is raised.  Returns false if no older ones
 * follow.
 */
bool
omni_job_prune(int64 *after, TimestampTz before, int limit)
{
	Datum		values[3] = {Int64GetDatum(*after), TimestampTzGetDatum(before), Int64GetDatum(limit)};
	bool		none_old;
	bool		none;
	bool		isnull;
	bool		reached;

	(void) omni_run(&select_old, values, NULL);
	values[0] = omni_result(0, 0, &none_old);
	values[1] = omni_result(0, 1, &none);
	reached = none || DatumGetBool(omni_result(0, 2, &isnull));
	if (!none)
		*after = DatumGetInt64(values[1]);
	if (!none_old)
		(void) omni_run(&delete_jobs, values, NULL);
	return !reached;
}

/*
 * Cancels a pending job, in a backend, and puts those back into the queue that it
 * was to carry out.  Returns false if it is not pending any more.
 */
bool
omni_job_cancel(const OmniJob *job, const char *by)
{
	Datum		values[2] = {Int64GetDatum(job->id), CStringGetTextDatum(psprintf("by \"%s\"", by))};
	OmniEvent	requested = {.occurred_at = job->request.requested_at,.event = "requested"};

	omni_events_begin();
	if (omni_run(&cancel_job, values, NULL) == 0)
		return false;
	omni_event_add(job, &requested);
	add_rows_events();
	(void) omni_run(&release_jobs, values, NULL);
	add_rows_events();
	omni_events_write();
	return true;
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

	(void) omni_run(&select_next, values, NULL);
	value = omni_result(0, 1, &isnull);
	*next = isnull ? DT_NOEND : DatumGetTimestampTz(value);
	return DatumGetBool(omni_result(0, 0, &isnull));
}

/* Tells, for each merge key of the queue's sent since a time, when that was. */
void
omni_job_recent(TimestampTz since, void (*tell) (int64 merge_key, TimestampTz sent_at))
{
	ArrayType  *jobs = omni_events_sent(since);
	Datum		values[1] = {PointerGetDatum(jobs)};
	bool		isnull;
	uint64		count;

	if (jobs == NULL)
		return;
	count = omni_run(&select_sent, values, NULL);
	for (uint64 i = 0; i < count; i++)
		tell(DatumGetInt64(omni_result(i, 0, &isnull)), DatumGetTimestampTz(omni_result(i, 1, &isnull)));
}
