/*-------------------------------------------------------------------------
 *
 * trigger.c
 *		The triggers of the extension's tables: one keeps out what logical replication
 *		and restores copy, the other deletes events with their jobs.
 *
 * The second takes the place of a foreign key, which would cost each event an index look-up
 * and a lock when it is inserted.  It costs only when jobs are deleted.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "executor/spi.h"
#include "executor/tuptable.h"
#include "fmgr.h"
#include "utils/builtins.h"
#include "utils/rel.h"
#include "utils/tuplestore.h"
#include "utils/uuid.h"

#include "store/table.h"
#include "watch/seen.h"

/* Jobs whose events to delete by one statement */
#define BATCH				1000

static bool is_copy(const TriggerData *trigger);
static void delete_events(TupleDesc rowtype, Tuplestorestate *jobs);

PG_FUNCTION_INFO_V1(omni_refresh_keep_out);
PG_FUNCTION_INFO_V1(omni_refresh_delete_events);

/*
 * BEFORE ROW trigger: skip the INSERT, UPDATE or DELETE of logical replication, and the INSERT
 * of a copy of a watch.  Look at session_replication_role, too: ALTER TABLE ... ENABLE TRIGGER
 * ALL, which pg_restore --disable-triggers leaves behind, has the trigger fire for all others.
 */
Datum
omni_refresh_keep_out(PG_FUNCTION_ARGS)
{
	TriggerData *trigger = (TriggerData *) fcinfo->context;

	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("omni_refresh_keep_out() must be called as a trigger")));
	if (SessionReplicationRole == SESSION_REPLICATION_ROLE_REPLICA || is_copy(trigger))
		PG_RETURN_POINTER(NULL);
	PG_RETURN_POINTER(TRIGGER_FIRED_BY_UPDATE(trigger->tg_event) ? trigger->tg_newtuple : trigger->tg_trigtuple);
}

/*
 * Return whether a row is inserted for a server, model and branch that have a watch.  What the
 * extension itself inserts fires no trigger.
 */
static bool
is_copy(const TriggerData *trigger)
{
	const AttrNumber *numbers = omni_watch_table.numbers;
	OmniRequest request = {0};
	OmniWatch	watch;
	bool		isnull[3];
	Datum		values[3];
	bool		found;

	if (!TRIGGER_FIRED_BY_INSERT(trigger->tg_event) || !TRIGGER_FIRED_FOR_ROW(trigger->tg_event) ||
		!omni_tables_find() || RelationGetRelid(trigger->tg_relation) != omni_watch_table.oid)
		return false;
	omni_check_table(&omni_watch_table);
	values[0] = heap_getattr(trigger->tg_trigtuple, numbers[OMNI_WATCH_server],
							 RelationGetDescr(trigger->tg_relation), &isnull[0]);
	values[1] = heap_getattr(trigger->tg_trigtuple, numbers[OMNI_WATCH_model_id],
							 RelationGetDescr(trigger->tg_relation), &isnull[1]);
	values[2] = heap_getattr(trigger->tg_trigtuple, numbers[OMNI_WATCH_branch_id],
							 RelationGetDescr(trigger->tg_relation), &isnull[2]);
	if (isnull[0] || isnull[1])
		return false;			/* which is an error */
	request.server = omni_name(values[0]);
	request.model = *DatumGetUUIDP(values[1]);
	request.has_branch = !isnull[2];
	if (request.has_branch)
		request.branch = *DatumGetUUIDP(values[2]);
	SPI_connect();
	found = omni_watch_find(&request, &watch);
	SPI_finish();
	return found;
}

/*
 * AFTER STATEMENT trigger of the table of jobs: delete the events of the jobs that were
 * deleted; with TRUNCATE all events.  Refuse to be the trigger of any other table, whose
 * owner may have no right to delete events.
 */
Datum
omni_refresh_delete_events(PG_FUNCTION_ARGS)
{
	TriggerData *trigger = (TriggerData *) fcinfo->context;

	if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_FOR_STATEMENT(trigger->tg_event) ||
		!omni_tables_find() || RelationGetRelid(trigger->tg_relation) != omni_job_table.oid)
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("omni_refresh_delete_events() must be called as a statement trigger of the table of jobs")));
	SPI_connect();
	if (TRIGGER_FIRED_BY_TRUNCATE(trigger->tg_event))
		omni_events_delete_every();
	else if (trigger->tg_oldtable != NULL)
		delete_events(RelationGetDescr(trigger->tg_relation), trigger->tg_oldtable);
	SPI_finish();
	PG_RETURN_POINTER(NULL);
}

/* Delete the events of jobs, in batches. */
static void
delete_events(TupleDesc rowtype, Tuplestorestate *jobs)
{
	TupleTableSlot *slot = MakeSingleTupleTableSlot(rowtype, &TTSOpsMinimalTuple);
	int			number = SPI_fnumber(rowtype, "id");
	int64		ids[BATCH];
	int			n = 0;

	if (number <= 0 || SPI_gettypeid(rowtype, number) != INT8OID)
		omni_table_differs(&omni_job_table, "Jobs have no numbers.");
	while (tuplestore_gettupleslot(jobs, true, false, slot))
	{
		bool		isnull;
		Datum		id = slot_getattr(slot, number, &isnull);

		if (!isnull)
			ids[n++] = DatumGetInt64(id);
		if (n == BATCH)
		{
			omni_events_delete_all(ids, n);
			n = 0;
		}
	}
	omni_events_delete_all(ids, n);
	ExecDropSingleTupleTableSlot(slot);
}
