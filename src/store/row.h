/*-------------------------------------------------------------------------
 *
 * row.h
 *		Insert, update and read single rows of the tables.  See row.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_ROW_H
#define OMNI_ROW_H

#include "nodes/execnodes.h"

#include "store/table.h"

/* What to write into a row.  Its columns are numbered as OMNI_JOB_id or OMNI_EVENT_id are. */
typedef struct OmniRowValues
{
	Datum		values[OMNI_MAX_COLUMNS];
	bool		nulls[OMNI_MAX_COLUMNS];
	bool		set[OMNI_MAX_COLUMNS];	/* others keep their value, or get
										 * their default */
} OmniRowValues;

/* A table being written, between omni_write_begin() and omni_write_end() */
typedef struct OmniWrite
{
	OmniTable  *table;
	bool		update;			/* of jobs; else rows are inserted */
	Relation	relation;
	EState	   *estate;
	ResultRelInfo *result;
	TupleTableSlot *old;		/* the version of a row that is updated */
	TupleTableSlot *new;		/* the row written last */
	Oid			by_id;			/* an index of the jobs' numbers, if any */
	OmniOwner	before;
} OmniWrite;

extern void omni_set(OmniRowValues *row, int column, Datum value);
extern void omni_set_null(OmniRowValues *row, int column);
extern void omni_write_begin(OmniWrite *write, OmniTable *table, const OmniRowValues *update);
extern void omni_write_insert(OmniWrite *write, const OmniRowValues *row);
extern OmniRow omni_write_update(OmniWrite *write, int64 id, bool (*wanted) (OmniStatus status),
								 const OmniRowValues *row);
extern Datum omni_written_value(const OmniWrite *write, int column);
extern Datum omni_written_row(const OmniWrite *write);
extern void omni_written_version(const OmniWrite *write, OmniRowVersion *version);
extern void omni_write_end(OmniWrite *write);
extern bool omni_row_read(OmniTable *table, int64 id, Datum *row);

#endif							/* OMNI_ROW_H */
