/*-------------------------------------------------------------------------
 *
 * queue.c
 *		The queue of pending jobs that no session waits for, and the running
 *		jobs, which the worker polls when they are due.
 *
 * The queue consists of rows of omni_refresh_job.  omni_refresh_job_queue_idx orders the
 * queued jobs by role, server and model; omni_refresh_job_active_idx has the jobs that a
 * worker has, or had, in flight.  See table.c for what the functions need and raise.
 *
 * The queue may be of any length, and most of its jobs may be one role's.  So every
 * statement here reads a bounded number of rows, and the jobs of one role never delay
 * those of another: omni_queue_heads() steps through the index from the first job of one
 * role, server and model (a head) to the next head, and skips servers and roles that
 * cannot send now.  Jobs are merged and claimed only from the heads so found.
 *
 * A reset of a cache is held until all earlier refreshes of the model have ended, or else the
 * cache would fill again with what is stale; see HOLDING.  A head may have any number of
 * resets that are held: they are in a range of the index of their own, of which only the
 * first ones are read.  They are not merged either, since a refresh that was merged becomes
 * pending again, between two resets, if its carrier is canceled.
 *
 * No statement waits for a row that another session has locked; a later run of the
 * statement will find the row unlocked.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "base/clock.h"
#include "base/compat.h"
#include "base/setting.h"
#include "shared/counter.h"
#include "store/job.h"
#include "store/row.h"

/* Jobs to merge in a statement, which takes some ten ms; calls are delayed meanwhile */
#define MERGE_LIMIT			500

/*
 * Rows of a head that are merged together at least: of fewer, some would be merged into
 * jobs that are merged themselves a moment later.
 */
#define MERGE_LEAST			64

/* Jobs to settle in a statement, of those that an earlier worker or another database left behind */
#define SETTLE_LIMIT		1000

/* How often to recover a job that was being sent when the worker ended */
#define MAX_RECOVERIES		3

/*
 * Whether a job is due at $2.  A run_at after $3 is later than any delay can set it, so
 * the clock was stepped back; treat such a job as due.  A job that was never delayed has
 * run_at = requested_at and is due whatever the clock says.
 */
#define DUE					"(run_at <= greatest($2, requested_at) OR run_at > $3)"
#define DUE_NARGS			3

/* Jobs that Omni works on, and that are no copies of another database's */
#define RUNNING				"status = " OMNI_SQL(RUNNING) " AND database = $1"

/* The order of the index on the queue; the jobs that agree in LANE have one head. */
#define LANE				"requested_by_oid, server, model_id"
#define QUEUE_ORDER			LANE ", (kind <> 'cache'), run_at, id"

/* The two sorts of jobs, as the index on the queue has them: those that hold resets, and resets */
#define HOLDS_RESETS		"(kind <> 'cache')"
#define IS_RESET			"NOT (kind <> 'cache')"

/* Due jobs of one sort of a head, at most so many; the limit stops the scan also if none are due. */
#define DUE_OF_KIND(list, kind, role, server, model, limit) \
	"(SELECT " list " FROM (SELECT *, xmin FROM %s AS job WHERE " QUEUED \
	"  AND (" LANE ") = (" role ", " server ", " model ") AND " kind \
	"  ORDER BY " QUEUE_ORDER " LIMIT " limit ") AS job WHERE " DUE ")"

/*
 * The unfinished refreshes of a requester, server and model.  Those of any branch count, since
 * the cache belongs to the model, and those of calls.  BETWEEN, in place of "=", keeps the
 * planner from reading the primary key in order of id.
 */
#define REFRESHES(role, server, model) \
	"%s AS refresh WHERE " REFRESHING " AND requested_by_oid = " role " AND server = " server \
	" AND model_id BETWEEN " model " AND " model

/*
 * The first refresh for which resets wait, by its number.  Refreshes that are running since $4
 * or longer do not count; the inner LIMIT bounds how many of them are read.
 */
#define HOLDING(role, server, model) \
	"(SELECT (SELECT id FROM (SELECT id, status, sent_at FROM " REFRESHES(role, server, model) \
	"  ORDER BY " LANE ", id LIMIT 10000) AS refresh WHERE " HOLDS("$4") " LIMIT 1) AS first) AS holding"

/* Whether an unfinished refresh holds the resets behind it.  One that has been running for too long does not. */
#define HOLDS(since)		"(status = " OMNI_SQL(RUNNING) " AND sent_at <= " since ") IS NOT TRUE"

/* Whether a reset is free: no refresh with a lower number holds it. */
#define FREE				"coalesce(id < first, true)"

/* Resets to read of a head, to find those that are free */
#define RESETS				"64"

/* For how long a running refresh holds resets, in microseconds */
#define HOLD_RUNNING		(15 * USECS_PER_MINUTE)

/*
 * Jobs that an earlier worker has left behind, or copies of another database's jobs.
 * $2 has the ids of the jobs that this worker has in flight.
 */
#define LEFT_BEHIND \
	IN_FLIGHT " AND (status <> " OMNI_SQL(RUNNING) " OR database <> $1) AND id <> ALL ($2)"

static OmniStatement select_left = {
	.table = &omni_job_table,
	.text = "SELECT " JOB_LIST " FROM %s WHERE " LEFT_BEHIND " ORDER BY requested_by_oid, server, run_at, id LIMIT $3"
	" FOR NO KEY UPDATE SKIP LOCKED",
	.nargs = 3,
	.argtypes = {OIDOID, INT8ARRAYOID, INT8OID}
};

static OmniStatement any_left = {
	.table = &omni_job_table,
	.text = "SELECT FROM %s WHERE " LEFT_BEHIND " LIMIT 1",
	.nargs = 2,
	.argtypes = {OIDOID, INT8ARRAYOID}
};

/* The copies of another database's queued jobs, for one head */
static OmniStatement select_copies = {
	.table = &omni_job_table,
	.text = "SELECT " JOB_LIST " FROM %s"
	" WHERE " QUEUED " AND (" LANE ") = ($3, $4, $5) AND database <> $1"
	" ORDER BY " QUEUE_ORDER " LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED",
	.nargs = 5,
	.argtypes = {OIDOID, INT8OID, OIDOID, TEXTOID, UUIDOID}
};

/*
 * The heads behind a place in the index ($5 to $7), until there are enough of them ($8)
 * or of those that are due ($9); of one role and server at most so many that are due
 * ($10).  Nothing is taken of roles that are held ($11), be it at a server ("role server") or
 * at all ("role"): these have one head each.
 * A head of which two jobs or more of a kind are due may have something to merge.
 *
 * Resets come first in the index.  So if the first row of a head is a refresh, there are no
 * resets, and it is all there is to read.
 */
static OmniStatement select_heads = {
	.table = &omni_job_table,
	.text = "WITH RECURSIVE head (role, server, model, run_at, held_since, free, is_due, is_held, number, due, due_of_server) AS ("
	"  SELECT $5, $6 COLLATE \"C\", $7, $2, $2, 0, false, false, 0, 0, 0"
	" UNION ALL"
	"  SELECT next.role, next.server, next.model, next.run_at, next.held_since, next.free, next.is_due, next.is_held,"
	"   number + 1, due + next.is_due::int,"
	"   CASE WHEN next.role = head.role AND next.server = head.server THEN due_of_server ELSE 0 END + next.is_due::int"
	"  FROM head, LATERAL ("
	"   SELECT role, server, model, is_held, job.* FROM ("
	"    SELECT *, concat_ws(' ', role, server) = ANY ($11) OR role::text = ANY ($11) AS is_held FROM ("
	"     SELECT requested_by_oid AS role, server, model_id AS model, kind, run_at, " DUE " AS is_due"
	"     FROM %s AS job WHERE " QUEUED " AND (" LANE ") > (head.role, head.server,"
	"      CASE WHEN head.is_held OR due_of_server >= $10 THEN 'ffffffff-ffff-ffff-ffff-ffffffffffff' ELSE head.model END)"
	"     ORDER BY " QUEUE_ORDER " LIMIT 1) AS first) AS place,"
	"   LATERAL (SELECT coalesce(min(run_at), 'infinity') AS run_at, min(held_since) AS held_since, coalesce(sum(free), 0)::int AS free,"
	"     coalesce(bool_or(is_due), false) AS is_due FROM ("
	"    SELECT place.run_at, NULL::timestamptz AS held_since, 0 AS free, place.is_due WHERE place.kind <> 'cache' AND NOT is_held"
	"    UNION ALL"
	"    (SELECT run_at, NULL, 0, " DUE " FROM %s AS job WHERE place.kind = 'cache' AND NOT is_held"
	"      AND " QUEUED " AND (" LANE ") = (place.role, place.server, place.model) AND " HOLDS_RESETS " ORDER BY " QUEUE_ORDER " LIMIT 1)"
	"    UNION ALL"
	"    SELECT (SELECT run_at FROM %s AS job WHERE " QUEUED " AND (" LANE ") = (place.role, place.server, place.model) AND " IS_RESET
	"      AND run_at > $2 ORDER BY " QUEUE_ORDER " LIMIT 1),"
	"     min(run_at) FILTER (WHERE NOT " FREE "), count(*) FILTER (WHERE " FREE ")::int, bool_or(" FREE ")"
	"    FROM " HOLDING("place.role", "place.server", "place.model") ","
	"     LATERAL " DUE_OF_KIND("id, run_at, requested_at", IS_RESET, "place.role", "place.server", "place.model", RESETS) " AS reset"
	"    WHERE place.is_due"
	"    HAVING place.kind = 'cache' AND NOT is_held) AS job) AS job) AS next"
	"  WHERE number < $8 AND due < $9"
	" )"
	" SELECT role, server, model, run_at, held_since, free > 0, is_due, is_held, is_due AND (free > 1 OR"
	"  (SELECT count(*) FROM " DUE_OF_KIND("", HOLDS_RESETS, "head.role", "head.server", "head.model", "2") " AS two) = 2)"
	" FROM head WHERE number > 0 ORDER BY number",
	.nargs = 11,
	.argtypes = {OIDOID, TIMESTAMPTZOID, TIMESTAMPTZOID, TIMESTAMPTZOID, OIDOID, TEXTOID, UUIDOID,
	INT8OID, INT8OID, INT8OID, TEXTARRAYOID}
};

/*
 * The first due jobs of each of some heads ($5 to $7), at most so many of one ($9): its
 * refreshes and, if any are free ($8), its free resets
 */
static OmniStatement select_due = {
	.table = &omni_job_table,
	.text = "SELECT job.* FROM unnest($5, $6, $7, $8) AS head (head_role, head_server, head_model, head_free), LATERAL ("
	DUE_OF_KIND(JOB_LIST, HOLDS_RESETS, "head_role", "head_server", "head_model", "$9")
	" UNION ALL (SELECT reset.* FROM " HOLDING("head_role", "head_server", "head_model") ","
	" LATERAL " DUE_OF_KIND(JOB_LIST, IS_RESET, "head_role", "head_server", "head_model", "greatest($9, " RESETS ")") " AS reset"
	" WHERE head_free AND " FREE ")"
	" ORDER BY run_at, id LIMIT $9) AS job",
	.nargs = 9,
	.argtypes = {OIDOID, TIMESTAMPTZOID, TIMESTAMPTZOID, TIMESTAMPTZOID, OIDARRAYOID, TEXTARRAYOID, UUIDARRAYOID,
	BOOLARRAYOID, INT8OID}
};

/* The first due resets of each of some heads ($5 to $7) that are held, at most so many of one ($8) */
static OmniStatement select_held = {
	.table = &omni_job_table,
	.text = "SELECT job.* FROM unnest($5, $6, $7) AS head (head_role, head_server, head_model), LATERAL ("
	" SELECT reset.* FROM " HOLDING("head_role", "head_server", "head_model") ","
	"  LATERAL " DUE_OF_KIND(JOB_LIST, IS_RESET, "head_role", "head_server", "head_model", RESETS) " AS reset"
	" WHERE NOT " FREE " ORDER BY run_at, id LIMIT $8) AS job",
	.nargs = 8,
	.argtypes = {OIDOID, TIMESTAMPTZOID, TIMESTAMPTZOID, TIMESTAMPTZOID, OIDARRAYOID, TEXTARRAYOID,
	UUIDARRAYOID, INT8OID}
};

/*
 * Lock pending jobs, except rows that another session has locked, and queued resets that a
 * refresh holds by now ($2): it may have been committed since they were found to be free.
 */
static OmniStatement lock_jobs = {
	.table = &omni_job_table,
	.text = "SELECT id FROM %s AS job WHERE id = ANY ($1) AND " IS_PENDING
	" AND NOT (" IS_RESET " AND origin <> 'call' AND EXISTS (SELECT FROM "
	REFRESHES("job.requested_by_oid", "job.server", "job.model_id") " AND id < job.id AND " HOLDS("$2") "))"
	" FOR NO KEY UPDATE SKIP LOCKED",
	.nargs = 2,
	.argtypes = {INT8ARRAYOID, TIMESTAMPTZOID}
};

/* Find pending jobs, locked or not. */
static OmniStatement look_for_jobs = {
	.table = &omni_job_table,
	.text = "SELECT id FROM %s WHERE id = ANY ($1) AND " IS_PENDING,
	.nargs = 1,
	.argtypes = {INT8ARRAYOID}
};

/*
 * The running jobs of one role at one server are a lane.  The lanes behind a role and server
 * ($4, $5), at most so many ($6): whether the first job is due, and when it will be.
 */
static OmniStatement select_lanes = {
	.table = &omni_job_table,
	.text = "WITH RECURSIVE lane (role, server, run_at, number) AS ("
	"  SELECT $4, $5 COLLATE \"C\", $2, 0"
	" UNION ALL"
	"  SELECT next.role, next.server, next.run_at, number + 1 FROM lane, LATERAL ("
	"   SELECT requested_by_oid AS role, server, run_at FROM %s"
	"   WHERE " RUNNING " AND (requested_by_oid, server) > (lane.role, lane.server)"
	"   ORDER BY requested_by_oid, server, run_at, id LIMIT 1) AS next"
	"  WHERE number < $6"
	" )"
	" SELECT role, server, run_at, run_at <= $2 OR EXISTS (SELECT FROM %s"
	"  WHERE " RUNNING " AND (requested_by_oid, server) = (role, lane.server) AND run_at > $3)"
	" FROM lane WHERE number > 0 ORDER BY number",
	.nargs = 6,
	.argtypes = {OIDOID, TIMESTAMPTZOID, TIMESTAMPTZOID, OIDOID, TEXTOID, INT8OID}
};

/* The first due running jobs of each of some lanes ($4, $5), at most so many of one ($6) */
static OmniStatement select_due_running = {
	.table = &omni_job_table,
	.text = "SELECT job.* FROM unnest($4, $5) AS lane (role, lane_server), LATERAL ("
	" (SELECT " JOB_LIST " FROM %s WHERE " RUNNING
	"   AND (requested_by_oid, server) = (role, lane_server) AND run_at <= $2"
	"  ORDER BY requested_by_oid, server, run_at, id LIMIT $6)"
	" UNION ALL"
	" (SELECT " JOB_LIST " FROM %s WHERE " RUNNING
	"   AND (requested_by_oid, server) = (role, lane_server) AND run_at > $3"
	"  ORDER BY requested_by_oid, server, run_at, id LIMIT $6)) AS job",
	.nargs = 6,
	.argtypes = {OIDOID, TIMESTAMPTZOID, TIMESTAMPTZOID, OIDARRAYOID, TEXTARRAYOID, INT8OID}
};

static OmniStatement any_running = {
	.table = &omni_job_table,
	.text = "SELECT FROM %s WHERE " RUNNING " LIMIT 1",
	.nargs = 1,
	.argtypes = {OIDOID}
};

static OmniStatement stop_polling = {
	.table = &omni_job_table,
	.text = "UPDATE %s SET status = " OMNI_SQL(ACCEPTED) ", finished_at = clock_timestamp(), error = NULL"
	" WHERE id = ANY (ARRAY(SELECT id FROM %s WHERE status = " OMNI_SQL(RUNNING) " AND database = $1 LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED))"
	" RETURNING id, requested_by, requested_by_oid, status, attempts, 'not followed to its end', server",
	.nargs = 2,
	.argtypes = {OIDOID, INT8OID}
};

/*
 * Read the next batch in order of id, which is the order of the requests.  Keep a merged
 * job while its carrier is unfinished: canceling the carrier puts the job back into the
 * queue.
 */
static OmniStatement select_old = {
	.table = &omni_job_table,
	.text = "SELECT array_agg(id) FILTER (WHERE finished_at < $2 AND"
	"  (SELECT status FROM %s AS carrier WHERE carrier.id = job.merged_into)"
	"   = ANY (" OMNI_SQL_UNFINISHED ") IS NOT TRUE),"
	"  max(id), (array_agg(requested_at ORDER BY id DESC))[1] >= $2"
	" FROM (SELECT id, finished_at, requested_at, merged_into FROM %s WHERE id > $1 ORDER BY id LIMIT $3) AS job",
	.nargs = 3,
	.argtypes = {INT8OID, TIMESTAMPTZOID, INT8OID}
};

static OmniStatement lock_old = {
	.table = &omni_job_table,
	.text = "SELECT array_agg(id) FROM (SELECT id FROM %s WHERE id = ANY ($1) FOR UPDATE SKIP LOCKED) AS job",
	.nargs = 1,
	.argtypes = {INT8ARRAYOID}
};

static OmniStatement delete_jobs = {
	.table = &omni_job_table,
	.must = true,
	.text = "DELETE FROM %s WHERE id = ANY ($1)",
	.nargs = 1,
	.argtypes = {INT8ARRAYOID}
};

/* The status is "unknown" instead of "canceled" if Omni may have got the request. */
static OmniStatement cancel_job = {
	.table = &omni_job_table,
	.text = "UPDATE %s SET status = CASE WHEN may_have_arrived THEN " OMNI_SQL(UNKNOWN) " ELSE " OMNI_SQL(CANCELED) " END, finished_at = clock_timestamp(), error = NULL"
	" WHERE id = $1 AND " IS_PENDING
	" RETURNING id, requested_by, requested_by_oid, status, attempts, $2, server",
	.nargs = 2,
	.argtypes = {INT8OID, TEXTOID}
};

/* Put merged jobs back into the queue.  Their ids are greater than their carrier's. */
static OmniStatement release_jobs = {
	.table = &omni_job_table,
	.text = "UPDATE %s SET status = " OMNI_SQL(PENDING) ", merged_into = NULL, finished_at = NULL"
	" WHERE id > $1 AND merged_into = $1 AND status = " OMNI_SQL(MERGED)
	" RETURNING id, requested_by, requested_by_oid, " OMNI_SQL(RELEASED) ", attempts, 'job ' || $1 || ' was canceled', server",
	.nargs = 1,
	.argtypes = {INT8OID}
};

static OmniStatement select_jobs = {
	.table = &omni_job_table,
	.text = "SELECT " JOB_LIST " FROM %s WHERE id = ANY ($1) AND origin <> 'call' AND sent_at IS NOT NULL",
	.nargs = 1,
	.argtypes = {INT8ARRAYOID}
};

static OmniJobState *decode_all(int *count);
static void add_rows_events(void);
static void settle(OmniJobState *left, int count,
				   void (*tell) (const OmniJob *job, const OmniOutcome *outcome));
static void recover(const OmniJob *job, OmniOutcome *outcome);
static void set_due(Datum *values);
static void set_free(Datum *values);
static Datum text_array(List *texts);
static void set_heads(Datum *values, const OmniHead *heads, int count);
static void set_any_free(Datum *value, const OmniHead *heads, int count);
static bool is_of_head(const OmniJob *job, const OmniHead *head);
static bool is_worn_out(const OmniJob *job);
static int	compare_ids(const void *a, const void *b);
static int	merge_jobs(const OmniJobState *states, int count);
static int	carry(const OmniJobState *states, const LaneJob *jobs, int count, int carrier);
static bool widen(const OmniJobState *carrier, const LaneRequest *request, TimestampTz renewed_at);
static int	merge_into(const OmniJob *carrier, const int64 *ids, int count);
static char *jobs_text(const int64 *ids, int count);
static LaneNames lane_list(ArrayType *list);
static void set_names(OmniRowValues *row, int column, const LaneNames *list);
static void delete_old(Datum ids);

/*
 * Lock pending jobs until the end of the transaction, without waiting.  Returns a palloc'd
 * array with an element for each of ids: whether the job's row is locked by us, locked by
 * another session, or gone, that is, no longer pending or deleted.  A queued reset that a
 * refresh holds counts as locked.
 */
OmniRow *
omni_job_lock(const int64 *ids, int count)
{
	OmniRow    *rows = palloc(count * sizeof(OmniRow));
	OmniStatement *statements[] = {&lock_jobs, &look_for_jobs};
	OmniRow		meanings[] = {OMNI_ROW_OURS, OMNI_ROW_LOCKED};
	Datum		values[2] = {
		PointerGetDatum(omni_bigints(ids, count)),
		TimestampTzGetDatum(omni_earliest_now() - HOLD_RUNNING)
	};
	int			found = 0;

	for (int i = 0; i < count; i++)
		rows[i] = OMNI_ROW_GONE;
	for (int pass = 0; pass < lengthof(statements) && found < count; pass++)
	{
		uint64		nrows = omni_run(statements[pass], values, NULL);

		for (uint64 row = 0; row < nrows; row++)
		{
			int64		id = DatumGetInt64(omni_value(row, 0, INT8OID));

			for (int i = 0; i < count; i++)
			{
				if (ids[i] == id && rows[i] == OMNI_ROW_GONE)
				{
					rows[i] = meanings[pass];
					found++;
				}
			}
		}
	}
	return rows;
}

/* Decode all jobs that the last statement has returned; the result is palloc'd. */
static OmniJobState *
decode_all(int *count)
{
	OmniJobState *states;

	*count = (int) SPI_processed;
	states = palloc(Max(*count, 1) * sizeof(OmniJobState));
	for (int i = 0; i < *count; i++)
		omni_job_decode(i, &states[i]);
	return states;
}

/*
 * Settle a batch of jobs that an earlier worker has left behind; in_flight has the ids of
 * the jobs that this worker has in flight.  Calls tell() with each job and its outcome.
 * Returns false if more such jobs remain, some perhaps because another session has locked
 * their rows.
 */
bool
omni_job_settle(const int64 *in_flight, int count,
				void (*tell) (const OmniJob *job, const OmniOutcome *outcome))
{
	Datum		values[3] = {
		ObjectIdGetDatum(MyDatabaseId),
		PointerGetDatum(omni_bigints(in_flight, count)),
		Int64GetDatum(SETTLE_LIMIT)
	};
	OmniJobState *left;
	int			nleft;

	(void) omni_run(&select_left, values, NULL);
	left = decode_all(&nleft);
	settle(left, nleft, tell);
	return omni_run(&any_left, values, NULL) == 0;
}

/* Cancel a batch of the jobs of one head that are copies of another database's jobs. */
void
omni_queue_cancel_copies(const OmniPlace *place)
{
	Datum		values[5] = {
		ObjectIdGetDatum(MyDatabaseId),
		Int64GetDatum(SETTLE_LIMIT),
		ObjectIdGetDatum(place->role),
		CStringGetTextDatum(NameStr(place->server)),
		UUIDPGetDatum(&place->model)
	};
	OmniJobState *copies;
	int			ncopies;

	(void) omni_run(&select_copies, values, NULL);
	copies = decode_all(&ncopies);
	settle(copies, ncopies, NULL);
}

/*
 * Settle jobs whose rows the caller has locked.  The session of a call is gone, so do not
 * send the call again; its status is "unknown" if an attempt had begun.  Put a queued job
 * back into the queue.  Cancel a copy of another database's job, which must never be sent
 * from this database.
 */
static void
settle(OmniJobState *left, int count,
	   void (*tell) (const OmniJob *job, const OmniOutcome *outcome))
{
	for (int i = 0; i < count; i++)
	{
		OmniJob    *job = &left[i].job;
		OmniOutcome outcome = {.status = OMNI_NAME_CANCELED};

		if (job->database != MyDatabaseId)
			omni_error_set(&outcome.error, ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
						   "the job was asked for in another database, of which this is a copy");
		else if (strcmp(job->origin, OMNI_ORIGIN_CALL) == 0)
		{
			if (job->attempts > 0)
				outcome.status = OMNI_NAME_UNKNOWN;
			omni_error_set(&outcome.error, ERRCODE_TRANSACTION_RESOLUTION_UNKNOWN,
						   "the background worker or the server ended before the answer came");
			omni_error_hint(&outcome.error, "If the job was being sent, look in Omni before you send it again.");
		}
		else
			recover(job, &outcome);
		if (omni_job_record(job, &outcome) == OMNI_ROW_OURS && tell != NULL)
			tell(job, &outcome);
	}
}

/*
 * Put a queued job that was being sent back into the queue, at most MAX_RECOVERIES times:
 * the job itself may be what crashes the worker or the server.
 */
static void
recover(const OmniJob *job, OmniOutcome *outcome)
{
	outcome->recovered = true;
	if (job->recoveries < MAX_RECOVERIES)
	{
		outcome->status = OMNI_NAME_PENDING;
		outcome->again = true;
		outcome->attempt_event = OMNI_NAME_RECOVERED;
	}
	else
	{
		outcome->status = OMNI_NAME_UNKNOWN;
		omni_error_set(&outcome->error, ERRCODE_TRANSACTION_RESOLUTION_UNKNOWN,
					   "the background worker or the server ended %d times while the job was being sent",
					   MAX_RECOVERIES + 1);
		omni_error_hint(&outcome->error, "Look in Omni whether it has arrived.  The server's log says why the worker ended.");
	}
}

/*
 * Add an event for each row that the last statement has returned; its columns are job,
 * requester and its OID, event, attempts, detail and the server.  Unless the event is "released",
 * it has the name of the job's status, of which to notify listeners, and which ends the job.
 */
static void
add_rows_events(void)
{
	uint64		count = SPI_processed;

	for (uint64 row = 0; row < count; row++)
	{
		OmniJob		job = {.id = DatumGetInt64(omni_value(row, 0, INT8OID))};
		OmniEvent	event = {
			.occurred_at = GetCurrentTimestamp(),
			.event = TextDatumGetCString(omni_value(row, 3, TEXTOID)),
			.attempt = DatumGetInt32(omni_value(row, 4, INT4OID)),
			.detail = TextDatumGetCString(omni_value(row, 5, TEXTOID))
		};

		job.request.requested_by = omni_name(omni_value(row, 1, TEXTOID));
		job.request.role = DatumGetObjectId(omni_value(row, 2, OIDOID));
		job.request.server = omni_name(omni_value(row, 6, TEXTOID));
		omni_event_add(&job, &event);
		if (strcmp(event.event, OMNI_NAME_RELEASED) != 0)
		{
			omni_notify(job.id, event.event);
			omni_count_jobs(&job.request.server, event.event, 1);
		}
	}
}

/* Set $1 to $3, which the condition DUE uses. */
static void
set_due(Datum *values)
{
	TimestampTz now = omni_latest_now();
	int64		longest = Max(OMNI_MAX_WAIT, OMNI_MS(omni_min_interval));

	values[0] = ObjectIdGetDatum(MyDatabaseId);
	values[1] = TimestampTzGetDatum(now);
	values[2] = TimestampTzGetDatum(now + longest + USECS_PER_MINUTE);
}

/* Set $1 to $4, which DUE and HOLDING use. */
static void
set_free(Datum *values)
{
	set_due(values);
	values[3] = TimestampTzGetDatum(omni_earliest_now() - HOLD_RUNNING);
}

/* Convert a list of C strings to an array of text. */
static Datum
text_array(List *texts)
{
	Datum	   *elements = palloc(Max(list_length(texts), 1) * sizeof(Datum));
	ListCell   *cell;

	foreach(cell, texts)
		elements[foreach_current_index(cell)] = CStringGetTextDatum(lfirst(cell));
	return PointerGetDatum(construct_array(elements, list_length(texts), TEXTOID, -1, false, TYPALIGN_INT));
}

/*
 * Return the heads of the queue behind a place: at most "limit" heads, of which at most
 * due_limit are due.  A role that *held names yields at most one head, whose is_due is false.  Sets *count.  The result is palloc'd.
 */
OmniHead *
omni_queue_heads(const OmniPlace *place, const OmniHeld *held, int limit, int due_limit, int due_limit_of_server,
				 int *count)
{
	Datum		values[11];
	OmniHead   *heads;

	set_free(values);
	values[4] = ObjectIdGetDatum(place->role);
	values[5] = CStringGetTextDatum(NameStr(place->server));
	values[6] = UUIDPGetDatum(&place->model);
	values[7] = Int64GetDatum(limit);
	values[8] = Int64GetDatum(due_limit);
	values[9] = Int64GetDatum(due_limit_of_server);
	values[10] = text_array(held->roles);
	*count = omni_run(&select_heads, values, NULL);

	heads = palloc0(Max(*count, 1) * sizeof(OmniHead));
	for (int i = 0; i < *count; i++)
	{
		OmniHead   *head = &heads[i];
		bool		none_held;
		Datum		held_since = omni_value_or_null(i, 4, TIMESTAMPTZOID, &none_held);

		head->place.role = DatumGetObjectId(omni_value(i, 0, OIDOID));
		namestrcpy(&head->place.server, TextDatumGetCString(omni_value(i, 1, TEXTOID)));
		head->place.model = *DatumGetUUIDP(omni_value(i, 2, UUIDOID));
		head->run_at = DatumGetTimestampTz(omni_value(i, 3, TIMESTAMPTZOID));
		head->held_since = none_held ? 0 : DatumGetTimestampTz(held_since);
		head->any_free = DatumGetBool(omni_value(i, 5, BOOLOID));
		head->is_due = DatumGetBool(omni_value(i, 6, BOOLOID));
		head->is_held = DatumGetBool(omni_value(i, 7, BOOLOID));
		head->has_more = DatumGetBool(omni_value(i, 8, BOOLOID));
	}
	return heads;
}

/* Set three arguments to the places of heads. */
static void
set_heads(Datum *values, const OmniHead *heads, int count)
{
	Datum	   *roles = palloc(count * sizeof(Datum));
	Datum	   *models = palloc(count * sizeof(Datum));
	List	   *servers = NIL;

	for (int i = 0; i < count; i++)
	{
		roles[i] = ObjectIdGetDatum(heads[i].place.role);
		servers = lappend(servers, pstrdup(NameStr(heads[i].place.server)));
		models[i] = UUIDPGetDatum(&heads[i].place.model);
	}
	values[0] = PointerGetDatum(construct_array(roles, count, OIDOID, sizeof(Oid), true, TYPALIGN_INT));
	values[1] = text_array(servers);
	values[2] = PointerGetDatum(construct_array(models, count, UUIDOID, UUID_LEN, false, TYPALIGN_CHAR));
}

/* Set an argument to whether heads have free resets. */
static void
set_any_free(Datum *value, const OmniHead *heads, int count)
{
	Datum	   *any = palloc(count * sizeof(Datum));

	for (int i = 0; i < count; i++)
		any[i] = BoolGetDatum(heads[i].any_free);
	*value = PointerGetDatum(construct_array(any, count, BOOLOID, sizeof(bool), true, TYPALIGN_CHAR));
}

/*
 * Return the first due jobs of the given heads, at most "limit" for each head.  Some may be
 * copies of another database's jobs.  Sets *count.  The result is palloc'd.
 */
OmniJobState *
omni_queue_due(const OmniHead *heads, int nheads, int limit, int *count)
{
	Datum		values[9];

	set_free(values);
	set_heads(&values[4], heads, nheads);
	set_any_free(&values[7], heads, nheads);
	values[8] = Int64GetDatum(limit);
	(void) omni_run(&select_due, values, NULL);
	return decode_all(count);
}

/*
 * Return the first due resets of the given heads that are held by refreshes, at most "limit"
 * for each head.  Sets *count.  The result is palloc'd.
 */
OmniJobState *
omni_queue_held(const OmniHead *heads, int nheads, int limit, int *count)
{
	Datum		values[8];

	set_free(values);
	set_heads(&values[4], heads, nheads);
	values[7] = Int64GetDatum(limit);
	(void) omni_run(&select_held, values, NULL);
	return decode_all(count);
}

/*
 * Merge the due jobs of the given heads: widen the oldest job of those that one request can
 * satisfy, and make it the carrier of the others.  Sets has_more of a head if so many jobs
 * were merged that another round should precede the next attempt.  Only what was merged
 * counts, or rows that another session has locked would be tried again and again.
 */
void
omni_queue_merge(OmniHead *heads, int nheads)
{
	int			limit = Max(MERGE_LIMIT / nheads, MERGE_LEAST);
	OmniJobState *states;
	int			count;
	int			end;

	states = omni_queue_due(heads, nheads, limit, &count);
	for (int i = 0; i < nheads; i++)
		heads[i].has_more = false;
	for (int first = 0; first < count; first = end)
	{
		OmniHead   *head = heads;
		int			merged;

		while (!is_of_head(&states[first].job, head))
			head++;
		for (end = first + 1; end < count && is_of_head(&states[end].job, head);)
			end++;
		merged = merge_jobs(&states[first], end - first);
		head->has_more = merged >= limit / 2 && merged >= MERGE_LIMIT / 25;
	}
}

static bool
is_of_head(const OmniJob *job, const OmniHead *head)
{
	return job->request.role == head->place.role &&
		strcmp(NameStr(job->request.server), NameStr(head->place.server)) == 0 &&
		memcmp(&job->request.model, &head->place.model, sizeof(pg_uuid_t)) == 0;
}

/*
 * Merge jobs of one head, and return how many were merged.  Leave out copies of another
 * database's jobs, and refreshes that are worn out.
 */
static int
merge_jobs(const OmniJobState *states, int count)
{
	OmniJobState *in_order = palloc(count * sizeof(OmniJobState));
	LaneJob    *jobs = palloc(count * sizeof(LaneJob));
	int			njobs = 0;
	int			merged = 0;

	for (int i = 0; i < count; i++)
	{
		if (states[i].job.database == MyDatabaseId && !is_worn_out(&states[i].job))
			in_order[njobs++] = states[i];
	}
	qsort(in_order, njobs, sizeof(OmniJobState), compare_ids);
	for (int i = 0; i < njobs; i++)
		omni_lane_job(&in_order[i].job.request, &jobs[i]);
	lane_merge(jobs, njobs, omni_api_room());
	for (int i = 0; i < njobs; i++)
	{
		if (jobs[i].carrier == i)
			merged += carry(in_order, jobs, njobs, i);
	}
	return merged;
}

/*
 * Return whether a refresh was tried, and is older than retry_for.  Do not have it carry newer
 * ones: it would go on for as long as they come, and hold resets for as long.
 */
static bool
is_worn_out(const OmniJob *job)
{
	return omni_job_kinds[job->request.kind].holds_resets && job->attempts > 0 &&
		job->request.requested_at < omni_earliest_now() - omni_retry_for * USECS_PER_SEC;
}

static int
compare_ids(const void *a, const void *b)
{
	int64		left = ((const OmniJobState *) a)->job.id;
	int64		right = ((const OmniJobState *) b)->job.id;

	return left < right ? -1 : left > right;
}

/*
 * Have a carrier, given by its index, carry out the jobs that lane_merge() has found for it.
 * Returns how many were merged: none if another session has locked the carrier's row.
 */
static int
carry(const OmniJobState *states, const LaneJob *jobs, int count, int carrier)
{
	int64	   *ids = palloc(count * sizeof(int64));
	int			nids = 0;
	TimestampTz renewed_at = states[carrier].job.renewed_at;

	for (int i = carrier + 1; i < count; i++)
	{
		if (jobs[i].carrier != carrier)
			continue;
		ids[nids++] = states[i].job.id;
		renewed_at = Max(renewed_at, states[i].job.renewed_at);
	}
	if (nids == 0 || !widen(&states[carrier], &jobs[carrier].request, renewed_at))
		return 0;
	return merge_into(&states[carrier].job, ids, nids);
}

/*
 * Change what a job that is to carry others asks for.  Returns false if the job is no longer
 * pending, or another session has locked it.
 */
static bool
widen(const OmniJobState *carrier, const LaneRequest *request, TimestampTz renewed_at)
{
	OmniRowValues row = {0};
	OmniWrite	write;
	bool		done;

	omni_set(&row, OMNI_JOB_renewed_at, TimestampTzGetDatum(renewed_at));
	omni_set(&row, OMNI_JOB_reset_at, TimestampTzGetDatum(request->time));
	if (!request->has_time)
		omni_set_null(&row, OMNI_JOB_reset_at);
	if (omni_job_kinds[carrier->job.request.kind].takes_extent)
	{
		omni_set(&row, OMNI_JOB_hard, BoolGetDatum(request->hard));
		set_names(&row, OMNI_JOB_schemas, &request->schemas);
		set_names(&row, OMNI_JOB_tables, &request->tables);
	}
	omni_write_begin(&write, &omni_job_table, &row);
	done = omni_write_update(&write, carrier->job.id, omni_status_is_pending, &row) == OMNI_ROW_OURS;
	omni_write_end(&write);
	return done;
}

/* Set *lane to a request as lane.c has it.  Its lists are palloc'd. */
void
omni_lane_job(const OmniRequest *request, LaneJob *lane)
{
	memset(lane, 0, sizeof(*lane));
	lane->kind = request->kind;
	lane->model = request->model;
	lane->branch = request->branch;
	lane->has_branch = request->has_branch;
	lane->policy = request->policy;
	lane->request.hard = request->hard;
	lane->request.schemas = lane_list(request->schemas);
	lane->request.tables = lane_list(request->tables);
	lane->request.has_time = request->has_reset_at;
	lane->request.time = request->reset_at;
}

static LaneNames
lane_list(ArrayType *list)
{
	LaneNames	names = {0};
	Datum	   *elements;
	bool	   *nulls;
	int			count;

	if (list == NULL)
		return names;
	deconstruct_array(list, TEXTOID, -1, false, TYPALIGN_INT, &elements, &nulls, &count);
	names.names = palloc(Max(count, 1) * sizeof(LaneName));
	for (int i = 0; i < count; i++)
	{
		LaneName   *name = &names.names[names.count];

		if (nulls[i])
			continue;			/* not written by us */
		name->text = TextDatumGetCString(elements[i]);
		name->cost = omni_api_name_length(name->text);
		names.count++;
	}
	lane_sort(&names);
	return names;
}

/* Set a column to a list of names, or to NULL if there is none. */
static void
set_names(OmniRowValues *row, int column, const LaneNames *list)
{
	Datum	   *elements = palloc(Max(list->count, 1) * sizeof(Datum));

	for (int i = 0; i < list->count; i++)
		elements[i] = CStringGetTextDatum(list->names[i].text);
	omni_set(row, column, PointerGetDatum(construct_array(elements, list->count, TEXTOID, -1, false, TYPALIGN_INT)));
	if (list->count == 0)
		omni_set_null(row, column);
}

/*
 * Mark jobs as merged into their carrier, except those that another session has locked,
 * and add an event of the carrier.  Returns how many were merged.
 */
static int
merge_into(const OmniJob *carrier, const int64 *ids, int count)
{
	int64	   *merged = palloc(count * sizeof(int64));
	int			nmerged = 0;
	TimestampTz now = GetCurrentTimestamp();
	OmniRowValues row = {0};
	OmniWrite	write;

	omni_set(&row, OMNI_JOB_status, CStringGetTextDatum(OMNI_NAME_MERGED));
	omni_set(&row, OMNI_JOB_merged_into, Int64GetDatum(carrier->id));
	omni_set(&row, OMNI_JOB_finished_at, TimestampTzGetDatum(now));
	omni_set_null(&row, OMNI_JOB_error);
	omni_write_begin(&write, &omni_job_table, &row);
	for (int i = 0; i < count; i++)
	{
		if (omni_write_update(&write, ids[i], omni_status_is_pending, &row) == OMNI_ROW_OURS)
			merged[nmerged++] = ids[i];
	}
	omni_write_end(&write);
	if (nmerged > 0)
	{
		OmniEvent	event = {
			.occurred_at = now,
			.event = OMNI_NAME_MERGED,
			.detail = psprintf("carries out %s, too", jobs_text(merged, nmerged))
		};

		omni_event_add(carrier, &event);
		omni_count_jobs(&carrier->request.server, OMNI_NAME_MERGED, nmerged);
	}
	return nmerged;
}

/* Name jobs, given in order, in a few words; the result is palloc'd. */
static char *
jobs_text(const int64 *ids, int count)
{
	int64		last = ids[count - 1];

	if (count == 1)
		return psprintf("job " INT64_FORMAT, last);
	if (count == 2)
		return psprintf("jobs " INT64_FORMAT " and " INT64_FORMAT, ids[0], last);
	if (last - ids[0] == count - 1)
		return psprintf("jobs " INT64_FORMAT " to " INT64_FORMAT, ids[0], last);
	return psprintf("%d jobs from " INT64_FORMAT " to " INT64_FORMAT, count, ids[0], last);
}

/*
 * Return the lanes of running jobs behind a place, in order, at most "limit".  Their places
 * have no model.  Sets *count.  The result is palloc'd.
 */
OmniHead *
omni_running_lanes(const OmniPlace *place, int limit, int *count)
{
	Datum		values[6];
	OmniHead   *lanes;

	set_due(values);
	values[3] = ObjectIdGetDatum(place->role);
	values[4] = CStringGetTextDatum(NameStr(place->server));
	values[5] = Int64GetDatum(limit);
	*count = omni_run(&select_lanes, values, NULL);
	lanes = palloc0(Max(*count, 1) * sizeof(OmniHead));
	for (int i = 0; i < *count; i++)
	{
		lanes[i].place.role = DatumGetObjectId(omni_value(i, 0, OIDOID));
		lanes[i].place.server = omni_name(omni_value(i, 1, TEXTOID));
		lanes[i].run_at = DatumGetTimestampTz(omni_value(i, 2, TIMESTAMPTZOID));
		lanes[i].is_due = DatumGetBool(omni_value(i, 3, BOOLOID));
	}
	return lanes;
}

/*
 * Return the first due running jobs of the given lanes, at most "limit" for each lane.  Sets
 * *count.  The result is palloc'd.
 */
OmniJobState *
omni_running_due(const OmniHead *lanes, int nlanes, int limit, int *count)
{
	Datum		values[6];

	*count = 0;
	if (nlanes == 0)
		return NULL;
	set_due(values);
	set_heads(&values[3], lanes, nlanes);
	values[5] = Int64GetDatum(limit);
	(void) omni_run(&select_due_running, values, NULL);
	return decode_all(count);
}

/*
 * Finish a batch of running jobs as "accepted", without polling them any longer.  Returns
 * whether any are left, some perhaps because another session has locked their rows.
 */
bool
omni_job_stop_polling(void)
{
	Datum		values[2] = {ObjectIdGetDatum(MyDatabaseId), Int64GetDatum(SETTLE_LIMIT)};

	(void) omni_run(&stop_polling, values, NULL);
	add_rows_events();
	return omni_run(&any_running, values, NULL) > 0;
}

/* Delete jobs and their events, except jobs of which another session has locked a row. */
static void
delete_old(Datum ids)
{
	bool		isnull;
	ArrayType  *jobs;

	(void) omni_run(&lock_old, &ids, NULL);
	ids = omni_value_or_null(0, 0, INT8ARRAYOID, &isnull);
	jobs = isnull ? NULL : omni_events_delete(DatumGetArrayTypeP(ids));
	if (jobs != NULL)
	{
		ids = PointerGetDatum(jobs);
		(void) omni_run(&delete_jobs, &ids, NULL);
	}
}

/*
 * Delete jobs that were finished before a time, and their events.  Looks at the next
 * "limit" jobs with an id above *after, and advances *after.  Returns false if no older
 * jobs follow.
 */
bool
omni_job_prune(int64 *after, TimestampTz before, int limit)
{
	Datum		values[3] = {Int64GetDatum(*after), TimestampTzGetDatum(before), Int64GetDatum(limit)};
	bool		none_old;
	bool		none;
	bool		reached;
	Datum		last;

	(void) omni_run(&select_old, values, NULL);
	values[0] = omni_value_or_null(0, 0, INT8ARRAYOID, &none_old);
	last = omni_value_or_null(0, 1, INT8OID, &none);
	reached = none || DatumGetBool(omni_value(0, 2, BOOLOID));
	if (!none)
		*after = DatumGetInt64(last);
	if (!none_old)
		delete_old(values[0]);
	return !reached;
}

/*
 * In a backend: cancel a pending job, and put the jobs that were merged into it back into
 * the queue.  Returns false if the job is no longer pending.
 */
bool
omni_job_cancel(const OmniJob *job, const char *by)
{
	Datum		values[2] = {Int64GetDatum(job->id), CStringGetTextDatum(psprintf("by \"%s\"", by))};

	omni_events_begin();
	if (omni_run(&cancel_job, values, NULL) == 0)
		return false;
	add_rows_events();
	(void) omni_run(&release_jobs, values, NULL);
	add_rows_events();
	omni_events_write();
	return true;
}

/* Call tell() with the merge key and sent_at of each queued job sent since a time. */
void
omni_job_recent(TimestampTz since, void (*tell) (int64 merge_key, TimestampTz sent_at))
{
	ArrayType  *ids = omni_events_sent(since);
	Datum		values[1] = {PointerGetDatum(ids)};
	OmniJobState *sent;
	int			count;

	if (ids == NULL)
		return;
	(void) omni_run(&select_jobs, values, NULL);
	sent = decode_all(&count);
	for (int i = 0; i < count; i++)
		tell(sent[i].job.merge_key, sent[i].job.sent_at);
}
