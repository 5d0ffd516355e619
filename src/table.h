/*-------------------------------------------------------------------------
 *
 * table.h
 *		What the files share that know the two tables: table.c, job.c, queue.c and
 *		event.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_TABLE_H
#define OMNI_TABLE_H

#include "executor/spi.h"

/* Bytes of a table's name, quoted and with its schema */
#define OMNI_MAX_QUALIFIED	(2 * (2 * NAMEDATALEN + 3))

typedef struct OmniTable
{
	const char *name;
	Oid			oid;			/* the following are set by omni_tables_find() */
	Oid			owner;
	char		qualified[OMNI_MAX_QUALIFIED];
} OmniTable;

/*
 * What a job is that was found by its number.  Written as "status =" these would be
 * conditions of the index on what is unfinished, which a plan made for an empty
 * table might go through from end to end instead.
 */
#define IS_PENDING		"starts_with(status, 'pending')"
#define IS_UNFINISHED	"status <> ALL ('{completed, failed, accepted, canceled, merged, unknown}')"

/* A statement about a table, whose name stands for each %s in it. */
typedef struct OmniStatement
{
	OmniTable  *table;
	bool		read;			/* under the latest snapshot */
	const char *text;
	int			nargs;
	Oid			argtypes[18];
	SPIPlanPtr	plan;			/* for planned_for, or NULL */
	char		planned_for[OMNI_MAX_QUALIFIED];
} OmniStatement;

/* A line of the event log */
typedef struct OmniEvent
{
	TimestampTz occurred_at;
	const char *event;
	int			attempt;		/* 0 means NULL */
	int			http_status;	/* 0 means NULL */
	int64		duration;		/* microseconds, 0 means NULL */
	const char *detail;			/* may be NULL */
} OmniEvent;

/* in table.c */
extern OmniTable omni_job_table;
extern OmniTable omni_event_table;
extern uint64 omni_run(OmniStatement *statement, Datum *values, const char *nulls);
extern Datum omni_result(int row, int column, bool *isnull);

/* in event.c */
extern void omni_event_add(const OmniJob *job, const OmniEvent *event);
extern void omni_events_merged(Datum jobs, Datum requesters, Datum requested_at, Datum carriers);
extern int64 omni_events_recoveries(int64 job);
extern ArrayType *omni_events_sent(TimestampTz since);

#endif							/* OMNI_TABLE_H */
