/*-------------------------------------------------------------------------
 *
 * event.c
 *		The event log, omni_refresh_event.
 *
 * The events of a job tell its life: each attempt has "sending" and, if it
 * failed, what became of it; the last event of a finished job bears the name of
 * its status.
 *
 * The events of a transaction are gathered in memory and written by one statement
 * at its end.  See table.c for what the functions need and raise.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "job.h"
#include "table.h"

#define COLUMNS				8

/*
 * Insert "requested" only as the first event of a job.  Do not use EXISTS here: the
 * planner might hash the whole log to answer it for many jobs.
 */
static OmniStatement insert_events = {
	.table = &omni_event_table,
	.text = "INSERT INTO %s (job, requested_by, occurred_at, event, attempt, http_status, duration, detail)"
	" SELECT job, requested_by, occurred_at, event, attempt, http_status, duration, detail"
	" FROM unnest($1, $2, $3, $4, $5, $6, $7, $8) WITH ORDINALITY"
	"  AS new (job, requested_by, occurred_at, event, attempt, http_status, duration, detail, turn)"
	" WHERE event <> " OMNI_SQL(REQUESTED) " OR (SELECT id FROM %s AS old WHERE old.job = new.job LIMIT 1) IS NULL"
	" ORDER BY turn",
	.nargs = COLUMNS,
	.argtypes = {INT8ARRAYOID, NAMEARRAYOID, TIMESTAMPTZARRAYOID, TEXTARRAYOID, INT4ARRAYOID, INT4ARRAYOID,
	INTERVALARRAYOID, TEXTARRAYOID}
};

static OmniStatement insert_merged = {
	.table = &omni_event_table,
	.text = "INSERT INTO %s (job, requested_by, occurred_at, event, detail)"
	" SELECT job, requested_by, occurred_at, event, detail"
	" FROM unnest($1, $2, $3, $4) AS merged (job, requested_by, requested_at, carrier),"
	"  LATERAL (VALUES (1, " OMNI_SQL(REQUESTED) ", requested_at, NULL),"
	"   (2, " OMNI_SQL(MERGED) ", clock_timestamp(), 'carried out by job ' || carrier))"
	"  AS events (turn, event, occurred_at, detail)"
	" WHERE event <> " OMNI_SQL(REQUESTED) " OR (SELECT id FROM %s AS old WHERE old.job = merged.job LIMIT 1) IS NULL"
	" ORDER BY job, turn",
	.nargs = 4,
	.argtypes = {INT8ARRAYOID, NAMEARRAYOID, TIMESTAMPTZARRAYOID, INT8ARRAYOID}
};

static OmniStatement select_recent = {
	.table = &omni_event_table,
	.text = "SELECT array_agg(DISTINCT job) FROM %s WHERE occurred_at > $1 AND event = " OMNI_SQL(SENDING),
	.nargs = 1,
	.argtypes = {TIMESTAMPTZOID}
};

/*
 * Count the recoveries of a job since Omni last answered it.  Search by job alone, so that
 * the planner does not scan the primary key from some id on.
 */
static OmniStatement count_recoveries = {
	.table = &omni_event_table,
	.text = "SELECT count(*) FILTER (WHERE event = " OMNI_SQL(RECOVERED) " AND id > answered)"
	" FROM (SELECT id, event, coalesce(max(id) FILTER (WHERE http_status IS NOT NULL) OVER (), 0) AS answered"
	"  FROM %s WHERE job = $1) AS event",
	.nargs = 1,
	.argtypes = {INT8OID}
};

/*
 * Find an attempt that ended without an answer, so that Omni may have got the request.
 * A response with status 5xx is an answer.
 */
static OmniStatement select_unanswered = {
	.table = &omni_event_table,
	.text = "SELECT FROM %s WHERE job = $1 AND (event = " OMNI_SQL(RECOVERED)
	" OR (event = " OMNI_SQL(ATTEMPT_FAILED) " AND starts_with(detail, '08006:') AND coalesce(http_status, 0) < 500)) LIMIT 1",
	.nargs = 1,
	.argtypes = {INT8OID}
};

static OmniStatement delete_events = {
	.table = &omni_event_table,
	.text = "DELETE FROM %s WHERE id = ANY (ARRAY(SELECT id FROM %s WHERE job = ANY ($1) FOR UPDATE SKIP LOCKED))",
	.nargs = 1,
	.argtypes = {INT8ARRAYOID}
};

static OmniStatement select_without = {
	.table = &omni_event_table,
	.text = "SELECT array_agg(id) FROM unnest($1) AS job (id)"
	" WHERE (SELECT event.id FROM %s AS event WHERE event.job = job.id LIMIT 1) IS NULL",
	.nargs = 1,
	.argtypes = {INT8ARRAYOID}
};

/* The events of this transaction that are still to be written, one array for each column */
static ArrayBuildState *gathered[COLUMNS];

static void gather(int column, Datum value, bool isnull);

/* Discard events of an earlier transaction that was rolled back, at the start of a new one. */
void
omni_events_begin(void)
{
	memset(gathered, 0, sizeof(gathered));
}

/* Add an event of a job, which omni_events_write() will write. */
void
omni_event_add(const OmniJob *job, const OmniEvent *event)
{
	Interval	duration = {.time = event->duration};

	gather(0, Int64GetDatum(job->id), false);
	gather(1, NameGetDatum(&job->request.requested_by), false);
	gather(2, TimestampTzGetDatum(event->occurred_at), false);
	gather(3, CStringGetTextDatum(event->event), false);
	gather(4, Int32GetDatum(event->attempt), event->attempt == 0);
	gather(5, Int32GetDatum(event->http_status), event->http_status == 0);
	gather(6, IntervalPGetDatum(&duration), event->duration == 0);
	gather(7, event->detail != NULL ? CStringGetTextDatum(event->detail) : (Datum) 0, event->detail == NULL);
}

/* Add the first event of a job; omni_events_write() leaves it out if the job has any. */
void
omni_event_add_requested(const OmniJob *job)
{
	OmniEvent	event = {.occurred_at = job->request.requested_at,.event = OMNI_NAME_REQUESTED};

	omni_event_add(job, &event);
}

static void
gather(int column, Datum value, bool isnull)
{
	static const Oid types[COLUMNS] = {
		INT8OID, NAMEOID, TIMESTAMPTZOID, TEXTOID, INT4OID, INT4OID, INTERVALOID, TEXTOID
	};

	if (gathered[column] == NULL)
		gathered[column] = initArrayResult(types[column], CurrentMemoryContext, false);
	(void) accumArrayResult(gathered[column], value, isnull, types[column], CurrentMemoryContext);
}

/* Write the events of this transaction in one statement. */
void
omni_events_write(void)
{
	Datum		values[COLUMNS];

	if (gathered[0] == NULL)
		return;
	for (int i = 0; i < COLUMNS; i++)
		values[i] = makeArrayResult(gathered[i], CurrentMemoryContext);
	omni_events_begin();
	(void) omni_run(&insert_events, values, NULL);
}

/*
 * Write the events of merged jobs.  The four arrays have one element for each job: its id,
 * its requester, the time of the request and the carrier's id.
 */
void
omni_events_merged(Datum jobs, Datum requesters, Datum requested_at, Datum carriers)
{
	Datum		values[4] = {jobs, requesters, requested_at, carriers};

	(void) omni_run(&insert_merged, values, NULL);
}

/*
 * Delete the events of jobs, except events that another session has locked.  Returns the
 * ids of the jobs that have no events left, or NULL if there are no such jobs.
 */
ArrayType *
omni_events_delete(ArrayType *jobs)
{
	Datum		values[1] = {PointerGetDatum(jobs)};
	Datum		without;
	bool		isnull;

	(void) omni_run(&delete_events, values, NULL);
	(void) omni_run(&select_without, values, NULL);
	without = omni_value_or_null(0, 0, INT8ARRAYOID, &isnull);
	return isnull ? NULL : DatumGetArrayTypeP(without);
}

/* Return the ids of the jobs that were sent since a time, or NULL if there are none. */
ArrayType *
omni_events_sent(TimestampTz since)
{
	Datum		values[1] = {TimestampTzGetDatum(since)};
	Datum		jobs;
	bool		isnull;

	(void) omni_run(&select_recent, values, NULL);
	jobs = omni_value_or_null(0, 0, INT8ARRAYOID, &isnull);
	return isnull ? NULL : DatumGetArrayTypeP(jobs);
}

/* Count how often a job was recovered since Omni last answered it. */
int64
omni_events_recoveries(int64 job)
{
	Datum		values[1] = {Int64GetDatum(job)};

	(void) omni_run(&count_recoveries, values, NULL);
	return DatumGetInt64(omni_value(0, 0, INT8OID));
}

/* Whether Omni may have got the request of an earlier attempt at a job. */
bool
omni_job_may_have_arrived(int64 id)
{
	Datum		values[1] = {Int64GetDatum(id)};

	return omni_run(&select_unanswered, values, NULL) > 0;
}
