/*-------------------------------------------------------------------------
 *
 * event.c
 *		The event log, omni_refresh_event.
 *
 * The events of a job tell its life to people: each attempt has "sending" and, if it
 * failed, what became of it; the last event of a finished job bears the name of
 * its status.  What the worker must know of earlier attempts is in the columns of the job.
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

#include "base/compat.h"
#include "store/job.h"
#include "store/row.h"

static OmniStatement select_recent = {
	.table = &omni_event_table,
	.text = "SELECT array_agg(DISTINCT job) FROM %s WHERE occurred_at > $1 AND event = " OMNI_SQL(SENDING),
	.nargs = 1,
	.argtypes = {TIMESTAMPTZOID}
};

/* Find out whether a job was said to wait for a reason. */
static OmniStatement select_waiting = {
	.table = &omni_event_table,
	.text = "SELECT FROM %s WHERE job = $1 AND event = " OMNI_SQL(WAITING) " AND detail = $2 LIMIT 1",
	.nargs = 2,
	.argtypes = {INT8OID, TEXTOID}
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

/* Discard events of an earlier transaction that was rolled back, at the start of a new one. */
void
omni_events_begin(void)
{
	gathered = NIL;
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
	omni_set(row, OMNI_EVENT_requested_by_oid, ObjectIdGetDatum(job->request.role));
	omni_set(row, OMNI_EVENT_occurred_at, TimestampTzGetDatum(event->occurred_at));
	omni_set(row, OMNI_EVENT_event, CStringGetTextDatum(event->event));
	if (event->attempt != 0)
		omni_set(row, OMNI_EVENT_attempt, Int32GetDatum(event->attempt));
	if (event->http_status != 0)
		omni_set(row, OMNI_EVENT_http_status, Int32GetDatum(event->http_status));
	if (event->duration != 0)
		omni_set(row, OMNI_EVENT_duration, IntervalPGetDatum(duration));
	if (event->sqlstate != 0)
		omni_set(row, OMNI_EVENT_sqlstate, CStringGetTextDatum(unpack_sql_state(event->sqlstate)));
	if (event->detail != NULL)
		omni_set(row, OMNI_EVENT_detail, CStringGetTextDatum(event->detail));
	gathered = lappend(gathered, row);
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

	omni_event_add(job, &event);
}

/* Write the events of this transaction. */
void
omni_events_write(void)
{
	List	   *events = gathered;
	ListCell   *cell;
	OmniWrite	write;

	if (events == NIL)
		return;
	omni_events_begin();
	omni_write_begin(&write, &omni_event_table, NULL);
	foreach(cell, events)
		omni_write_insert(&write, lfirst(cell));
	omni_write_end(&write);
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
