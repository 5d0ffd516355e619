/*-------------------------------------------------------------------------
 *
 * event.c
 *		The event log, omni_refresh_event.
 *
 * The events of a job tell its life: each attempt has "sending" and, if it
 * failed, what became of it; the last event of a finished job bears the name of
 * its status.
 *
 * The events of a transaction are gathered in memory and written together at its end.
 * See table.c for what the functions need and raise.
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
#include "row.h"

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
 * Count the attempts of a job, the last ones in a row, of which only a few are made: those
 * that ended with a 5xx but 502, 503 and 504, or with an answer that is not Omni's.
 */
#define FEW \
	"(event = " OMNI_SQL(ATTEMPT_FAILED) " AND (starts_with(detail, '08P01:')" \
	" OR http_status >= 500 AND http_status NOT IN (502, 503, 504)))"
static OmniStatement count_few = {
	.table = &omni_event_table,
	.text = "SELECT count(*) FILTER (WHERE few AND id > other)"
	" FROM (SELECT id, " FEW " AS few, coalesce(max(id) FILTER (WHERE NOT " FEW ") OVER (), 0) AS other"
	"  FROM %s WHERE job = $1 AND (http_status IS NOT NULL OR duration IS NOT NULL"
	"   OR event = " OMNI_SQL(RECOVERED) ")) AS event",
	.nargs = 1,
	.argtypes = {INT8OID}
};

/* Find out whether a job was said to wait for a reason. */
static OmniStatement select_waiting = {
	.table = &omni_event_table,
	.text = "SELECT FROM %s WHERE job = $1 AND event = " OMNI_SQL(WAITING) " AND detail = $2 LIMIT 1",
	.nargs = 2,
	.argtypes = {INT8OID, TEXTOID}
};

/*
 * Find an attempt that ended without an answer, so that Omni may have got the request.
 * A response with status 5xx is an answer, but a 504 is a proxy's that has got none.
 */
static OmniStatement select_unanswered = {
	.table = &omni_event_table,
	.text = "SELECT FROM %s WHERE job = $1 AND (event = " OMNI_SQL(RECOVERED)
	" OR (event = " OMNI_SQL(ATTEMPT_FAILED) " AND starts_with(detail, '08006:') AND (coalesce(http_status, 0) < 500 OR http_status = 504))) LIMIT 1",
	.nargs = 1,
	.argtypes = {INT8OID}
};

static OmniStatement delete_events = {
	.table = &omni_event_table,
	.text = "DELETE FROM %s WHERE id = ANY (ARRAY(SELECT id FROM %s WHERE job = ANY ($1) FOR UPDATE SKIP LOCKED))",
	.nargs = 1,
	.argtypes = {INT8ARRAYOID}
};

/* Delete the events of jobs, and wait for those that another session has locked. */
static OmniStatement delete_all_events = {
	.table = &omni_event_table,
	.text = "DELETE FROM %s WHERE job = ANY ($1)",
	.nargs = 1,
	.argtypes = {INT8ARRAYOID}
};

/* Not TRUNCATE, which fails if the command that fired our trigger truncates both tables. */
static OmniStatement delete_every_event = {
	.table = &omni_event_table,
	.text = "DELETE FROM %s"
};

/*
 * Do not use EXISTS here: the planner might hash the whole log to answer it for many jobs.
 */
static OmniStatement select_without = {
	.table = &omni_event_table,
	.text = "SELECT array_agg(id) FROM unnest($1) AS job (id)"
	" WHERE (SELECT event.id FROM %s AS event WHERE event.job = job.id LIMIT 1) IS NULL",
	.nargs = 1,
	.argtypes = {INT8ARRAYOID}
};

/* The events of this transaction that are still to be written, each an OmniRowValues */
static List *gathered = NIL;

/* The jobs of those events of which "requested" is left out if they have any events */
static ArrayBuildState *to_check = NULL;

static bool is_requested(const OmniRowValues *row);
static bool is_next(ArrayType *jobs, int *next, Datum job);
static ArrayType *find_without(ArrayType *jobs);

/* Discard events of an earlier transaction that was rolled back, at the start of a new one. */
void
omni_events_begin(void)
{
	gathered = NIL;
	to_check = NULL;
}

/* Add an event of a job, which omni_events_write() will write. */
void
omni_event_add(const OmniJob *job, const OmniEvent *event)
{
	OmniRowValues *row = palloc0(sizeof(OmniRowValues));
	Interval   *duration = palloc0(sizeof(Interval));

	duration->time = event->duration;
	omni_set(row, OMNI_EVENT_job, Int64GetDatum(job->id));
	omni_set(row, OMNI_EVENT_requested_by, CStringGetTextDatum(NameStr(job->request.requested_by)));
	omni_set(row, OMNI_EVENT_occurred_at, TimestampTzGetDatum(event->occurred_at));
	omni_set(row, OMNI_EVENT_event, CStringGetTextDatum(event->event));
	if (event->attempt != 0)
		omni_set(row, OMNI_EVENT_attempt, Int32GetDatum(event->attempt));
	if (event->http_status != 0)
		omni_set(row, OMNI_EVENT_http_status, Int32GetDatum(event->http_status));
	if (event->duration != 0)
		omni_set(row, OMNI_EVENT_duration, IntervalPGetDatum(duration));
	if (event->detail != NULL)
		omni_set(row, OMNI_EVENT_detail, CStringGetTextDatum(event->detail));
	gathered = lappend(gathered, row);
}

/* Add the first event of a job; omni_events_write() leaves it out if the job has any. */
void
omni_event_add_requested(const OmniJob *job)
{
	OmniEvent	event = {.occurred_at = job->request.requested_at,.event = OMNI_NAME_REQUESTED};

	omni_event_add(job, &event);
	to_check = accumArrayResult(to_check, Int64GetDatum(job->id), false, INT8OID, CurrentMemoryContext);
}

/* Add an event that says why a due job waits, unless it has one for this reason. */
void
omni_event_add_waiting(const OmniJob *job, const char *reason)
{
	Datum		values[2] = {Int64GetDatum(job->id), CStringGetTextDatum(reason)};
	OmniEvent	event = {
		.occurred_at = GetCurrentTimestamp(),
		.event = OMNI_NAME_WAITING,
		.detail = reason
	};

	if (omni_run(&select_waiting, values, NULL) > 0)
		return;
	omni_event_add_requested(job);
	omni_event_add(job, &event);
}

/* Add an event that says what has changed, of the job that asks to refresh it. */
void
omni_event_add_changed(const OmniJob *job, const char *changes)
{
	OmniEvent	event = {
		.occurred_at = GetCurrentTimestamp(),
		.event = OMNI_NAME_CHANGED,
		.detail = changes
	};

	omni_event_add_requested(job);
	omni_event_add(job, &event);
}

/* Write the events of this transaction. */
void
omni_events_write(void)
{
	List	   *events = gathered;
	ArrayType  *new = NULL;
	int			nnew = 0;
	ListCell   *cell;
	OmniWrite	write;

	if (events == NIL)
		return;
	if (to_check != NULL)
		new = find_without(DatumGetArrayTypeP(makeArrayResult(to_check, CurrentMemoryContext)));
	omni_events_begin();
	omni_write_begin(&write, &omni_event_table, NULL);
	foreach(cell, events)
	{
		OmniRowValues *row = lfirst(cell);

		if (!is_requested(row) || is_next(new, &nnew, row->values[OMNI_EVENT_job]))
			(void) omni_write_insert(&write, row);
	}
	omni_write_end(&write);
}

static bool
is_requested(const OmniRowValues *row)
{
	return strcmp(TextDatumGetCString(row->values[OMNI_EVENT_event]), OMNI_NAME_REQUESTED) == 0;
}

/* Return whether a job is the next one in an array, which is in the order of the events. */
static bool
is_next(ArrayType *jobs, int *next, Datum job)
{
	if (jobs == NULL || *next == ARR_DIMS(jobs)[0] ||
		((int64 *) ARR_DATA_PTR(jobs))[*next] != DatumGetInt64(job))
		return false;
	(*next)++;
	return true;
}

/*
 * Return the ids of those jobs that have no events, in the same order, or NULL if there are
 * no such jobs.
 */
static ArrayType *
find_without(ArrayType *jobs)
{
	Datum		values[1] = {PointerGetDatum(jobs)};
	Datum		without;
	bool		isnull;

	(void) omni_run(&select_without, values, NULL);
	without = omni_value_or_null(0, 0, INT8ARRAYOID, &isnull);
	return isnull ? NULL : DatumGetArrayTypeP(without);
}

/*
 * Delete the events of jobs, except events that another session has locked.  Returns the
 * ids of the jobs that have no events left, or NULL if there are no such jobs.
 */
ArrayType *
omni_events_delete(ArrayType *jobs)
{
	Datum		values[1] = {PointerGetDatum(jobs)};

	(void) omni_run(&delete_events, values, NULL);
	return find_without(jobs);
}

/* Delete all events of jobs. */
void
omni_events_delete_all(const int64 *jobs, int count)
{
	Datum		values[1] = {PointerGetDatum(omni_bigints(jobs, count))};

	(void) omni_run(&delete_all_events, values, NULL);
}

/* Delete all events. */
void
omni_events_delete_every(void)
{
	(void) omni_run(&delete_every_event, NULL, NULL);
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

/*
 * Count the last attempts at a job, in a row, that ended with an answer after which only a few
 * are made: a 5xx but 502, 503 and 504, or one that is not Omni's.
 */
int
omni_job_few_failures(int64 id)
{
	Datum		values[1] = {Int64GetDatum(id)};

	(void) omni_run(&count_few, values, NULL);
	return (int) DatumGetInt64(omni_value(0, 0, INT8OID));
}
