/*-------------------------------------------------------------------------
 *
 * row.c
 *		Insert, update and read single rows of the tables, without SQL.
 *
 * Each job costs a few such writes, and to start the executor for a statement would cost
 * more than the write itself.  So do as the apply worker of logical replication does: use
 * the executor's functions for simple writes.  Row triggers, constraints, defaults,
 * generated columns and privileges of the owner hold as they do in SQL; rules, statement
 * triggers and row-level security do not, nor the extension's own CHECK constraints.
 *
 * All is done as the owner of the table; see omni_as_owner().  A write needs an active
 * snapshot, and raises what triggers and constraints raise.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_trigger.h"
#include "commands/trigger.h"
#include "executor/executor.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "rewrite/rewriteHandler.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

#include "base/compat.h"
#include "store/row.h"

static void make_range_table(OmniWrite *write, const OmniRowValues *update);
static bool fires_triggers(const OmniTable *table, Relation relation);
static void skip_checks(OmniWrite *write);
static Oid	find_index(const OmniTable *table, Relation relation);
static void fill_default(OmniWrite *write, AttrNumber number);
static void fill(OmniWrite *write, const OmniRowValues *row);
static void check_written(const OmniWrite *write);
static bool find_job(OmniWrite *write, int64 id, ItemPointer place, OmniStatus *status);
static SysScanDesc begin_scan(const OmniTable *table, Relation relation, Oid index,
							  Snapshot snapshot, int64 id);
static bool lock_row(OmniWrite *write, ItemPointer place);

/* Set a column. */
void
omni_set(OmniRowValues *row, int column, Datum value)
{
	row->values[column] = value;
	row->nulls[column] = false;
	row->set[column] = true;
}

void
omni_set_null(OmniRowValues *row, int column)
{
	row->nulls[column] = true;
	row->set[column] = true;
}

/*
 * Begin to write into a table.  "update" has the columns that will be updated, and is NULL
 * if rows will be inserted.
 */
void
omni_write_begin(OmniWrite *write, OmniTable *table, const OmniRowValues *update)
{
	AclResult	allowed;

	PreventCommandIfReadOnly(update != NULL ? "UPDATE" : "INSERT");
	omni_as_owner(table, &write->before);
	write->table = table;
	write->update = update != NULL;
	write->relation = table_open(table->oid, RowExclusiveLock);
	allowed = pg_class_aclcheck(table->oid, table->owner, write->update ? ACL_UPDATE : ACL_INSERT);
	if (allowed != ACLCHECK_OK)
		aclcheck_error(allowed, OBJECT_TABLE, table->name);

	write->estate = CreateExecutorState();
	make_range_table(write, update);
	write->estate->es_output_cid = GetCurrentCommandId(true);
	write->result = makeNode(ResultRelInfo);
	InitResultRelInfo(write->result, write->relation, 1, NULL, 0);
	if (!fires_triggers(table, write->relation))
		write->result->ri_TrigDesc = NULL;
	skip_checks(write);
	/* where ExecGetTriggerResultRel() looks */
	write->estate->es_opened_result_relations = list_make1(write->result);
	ExecOpenIndices(write->result, false);
	write->old = table_slot_create(write->relation, &write->estate->es_tupleTable);
	write->new = table_slot_create(write->relation, &write->estate->es_tupleTable);
	if (write->update)
	{
		PushActiveSnapshot(GetLatestSnapshot());
		write->estate->es_snapshot = GetActiveSnapshot();
		write->by_id = find_index(table, write->relation);
	}
	AfterTriggerBeginQuery();
}

/* Give the executor its range table, which names the columns to update for triggers. */
static void
make_range_table(OmniWrite *write, const OmniRowValues *update)
{
	RangeTblEntry *entry = makeNode(RangeTblEntry);
	Bitmapset  *updated = NULL;

	for (int i = 0; update != NULL && i < write->table->ncolumns; i++)
	{
		if (update->set[i])
			updated = bms_add_member(updated, write->table->numbers[i] - FirstLowInvalidHeapAttributeNumber);
	}
	entry->rtekind = RTE_RELATION;
	entry->relid = write->table->oid;
	entry->relkind = RELKIND_RELATION;
	entry->rellockmode = RowExclusiveLock;
	init_range_table_compat(write->estate, entry, updated);
}

/*
 * Return whether any row trigger of a table fires for what the extension writes.  Those that
 * keep copied rows out do not, even if ALTER TABLE ... ENABLE TRIGGER ALL has changed them.
 */
static bool
fires_triggers(const OmniTable *table, Relation relation)
{
	TriggerDesc *triggers = relation->trigdesc;
	char		keep_out[NAMEDATALEN];

	snprintf(keep_out, sizeof(keep_out), "%s_keep_out", table->name);
	for (int i = 0; triggers != NULL && i < triggers->numtriggers; i++)
	{
		const Trigger *trigger = &triggers->triggers[i];

		if (TRIGGER_FOR_ROW(trigger->tgtype) && strcmp(trigger->tgname, keep_out) != 0 &&
			(TRIGGER_FOR_INSERT(trigger->tgtype) || TRIGGER_FOR_UPDATE(trigger->tgtype)) &&
			(trigger->tgenabled == TRIGGER_FIRES_ON_ORIGIN || trigger->tgenabled == TRIGGER_FIRES_ALWAYS))
			return true;
	}
	return false;
}

/*
 * Let the executor find no expressions for the CHECK constraints of a table, if it has those only that
 * the extension made: it would read them from the catalog for each write, which costs as much as
 * to insert a row.  They list the names of status.h, kinds and origins, and no others are written here.
 */
static void
skip_checks(OmniWrite *write)
{
	const TupleConstr *constraints = RelationGetDescr(write->relation)->constr;

	if (constraints != NULL && constraints->num_check == write->table->nchecks)
		write->result->ri_CheckConstraintExprs =
			MemoryContextAllocZero(write->estate->es_query_cxt, write->table->nchecks * sizeof(ExprState *));
}

/* Return the primary key if its only column is id, as the extension made it. */
static Oid
find_index(const OmniTable *table, Relation relation)
{
	Oid			index = RelationGetPrimaryKeyIndex(relation, true);
	HeapTuple	tuple = SearchSysCache1(INDEXRELID, ObjectIdGetDatum(index));
	bool		ours;

	if (!HeapTupleIsValid(tuple))
		return InvalidOid;
	ours = ((Form_pg_index) GETSTRUCT(tuple))->indnatts == 1 &&
		((Form_pg_index) GETSTRUCT(tuple))->indkey.values[0] == table->numbers[OMNI_JOB_id];
	ReleaseSysCache(tuple);
	return ours ? index : InvalidOid;
}

/*
 * Insert a row.  Columns that are not set get their default.  Raises an error if a trigger
 * has kept the row out.
 */
void
omni_write_insert(OmniWrite *write, const OmniRowValues *row)
{
	TupleTableSlot *slot = ExecClearTuple(write->new);

	ResetPerTupleExprContext(write->estate);
	memset(slot->tts_isnull, true, slot->tts_tupleDescriptor->natts * sizeof(bool));
	for (int i = 0; i < slot->tts_tupleDescriptor->natts; i++)
		fill_default(write, i + 1);
	fill(write, row);
	ExecSimpleRelationInsert(write->result, write->estate, slot);
	check_written(write);
}

/* Raise an error if a trigger has kept the row from being written. */
static void
check_written(const OmniWrite *write)
{
	if (!ItemPointerIsValid(&write->new->tts_tid))
		omni_not_written(write->table);
}

/* Set a column of the new row to its default, if it has one. */
static void
fill_default(OmniWrite *write, AttrNumber number)
{
	Form_pg_attribute attribute = TupleDescAttr(write->new->tts_tupleDescriptor, number - 1);
	Expr	   *expression;

	if (attribute->attisdropped || attribute->attgenerated != '\0' ||
		(!attribute->atthasdef && attribute->attidentity == '\0'))
		return;
	expression = (Expr *) build_column_default(write->relation, number);
	if (expression != NULL)
		write->new->tts_values[number - 1] =
			ExecEvalExprSwitchContext(ExecPrepareExpr(expression, write->estate),
									  GetPerTupleExprContext(write->estate),
									  &write->new->tts_isnull[number - 1]);
}

/*
 * Update the job with an id if its status is wanted, without waiting.  Returns whether
 * that was done; or that another session has locked or just changed the row; or that
 * there is no such job, or it has another status.  Raises an error if a trigger has kept
 * the row as it was.
 */
OmniRow
omni_write_update(OmniWrite *write, int64 id, bool (*wanted) (OmniStatus status),
				  const OmniRowValues *row)
{
	TupleTableSlot *slot = ExecClearTuple(write->new);
	EPQState	epqstate;
	ItemPointerData place;
	OmniStatus	status;

	ResetPerTupleExprContext(write->estate);
	if (!find_job(write, id, &place, &status) || !wanted(status))
		return OMNI_ROW_GONE;
	if (!lock_row(write, &place))
		return OMNI_ROW_LOCKED;
	slot_getallattrs(write->old);
	memcpy(slot->tts_values, write->old->tts_values, slot->tts_tupleDescriptor->natts * sizeof(Datum));
	memcpy(slot->tts_isnull, write->old->tts_isnull, slot->tts_tupleDescriptor->natts * sizeof(bool));
	fill(write, row);
	EvalPlanQualInit(&epqstate, write->estate, NULL, NIL, -1, NIL);
	ExecSimpleRelationUpdate(write->result, write->estate, &epqstate, write->old, slot);
	EvalPlanQualEnd(&epqstate);
	check_written(write);
	return OMNI_ROW_OURS;
}

/*
 * Find the latest committed version of a job, and its status; false if there is none, or
 * it has no status that we know.
 */
static bool
find_job(OmniWrite *write, int64 id, ItemPointer place, OmniStatus *status)
{
	OmniTable  *table = write->table;
	bool		found = false;
	SysScanDesc scan = begin_scan(table, write->relation, write->by_id, write->estate->es_snapshot, id);
	HeapTuple	tuple = systable_getnext(scan);

	if (HeapTupleIsValid(tuple))
	{
		bool		isnull;
		Datum		value = heap_getattr(tuple, table->numbers[OMNI_JOB_status],
										 RelationGetDescr(write->relation), &isnull);

		found = !isnull && omni_status_find(TextDatumGetCString(value), status);
		*place = tuple->t_self;
	}
	systable_endscan(scan);
	return found;
}

/* Begin a scan for a job, by an index unless that is invalid. */
static SysScanDesc
begin_scan(const OmniTable *table, Relation relation, Oid index, Snapshot snapshot, int64 id)
{
	ScanKeyData key;

	ScanKeyInit(&key, table->numbers[OMNI_JOB_id], BTEqualStrategyNumber, F_INT8EQ, Int64GetDatum(id));
	return systable_beginscan(relation, index, OidIsValid(index), snapshot, 1, &key);
}

/* Lock a version of a row and read it; false if another session has locked or changed it. */
static bool
lock_row(OmniWrite *write, ItemPointer place)
{
	TM_FailureData failure;
	TM_Result	result = table_tuple_lock(write->relation, place, write->estate->es_snapshot, write->old,
										  write->estate->es_output_cid, LockTupleNoKeyExclusive,
										  LockWaitSkip, 0, &failure);

	return result == TM_Ok;
}

/* Put the columns that are set into the new row. */
static void
fill(OmniWrite *write, const OmniRowValues *row)
{
	TupleTableSlot *slot = write->new;

	for (int i = 0; i < write->table->ncolumns; i++)
	{
		int			number = write->table->numbers[i];

		if (row->set[i])
		{
			slot->tts_values[number - 1] = row->values[i];
			slot->tts_isnull[number - 1] = row->nulls[i];
		}
	}
	ExecStoreVirtualTuple(slot);
}

/* Return a value of the row written last, which may not be NULL. */
Datum
omni_written_value(const OmniWrite *write, int column)
{
	bool		isnull;
	Datum		value = slot_getattr(write->new, write->table->numbers[column], &isnull);

	if (isnull)
		omni_table_differs(write->table, psprintf("Column \"%s\" is null.", write->table->columns[column].name));
	return value;
}

/* Return the row written last as a value of the table's row type, palloc'd. */
Datum
omni_written_row(const OmniWrite *write)
{
	return ExecFetchSlotHeapTupleDatum(write->new);
}

/*
 * Note the version of the row inserted last.  It counts as not known if a BEFORE INSERT
 * trigger of the table's owner may have put something else into the row.  The same is true
 * if this transaction has given the table another file: it could truncate that file in
 * place and use its tids again.
 */
void
omni_written_version(const OmniWrite *write, OmniRowVersion *version)
{
	Relation	relation = write->relation;
	TriggerDesc *triggers = write->result->ri_TrigDesc;
	bool		known = relation->rd_firstRelfilelocatorSubid == InvalidSubTransactionId &&
	(triggers == NULL || !triggers->trig_insert_before_row);

	version->table = known ? RelationGetRelid(relation) : InvalidOid;
	version->file = relation->rd_rel->relfilenode;
	version->tid = write->new->tts_tid;
}

/* Fire the triggers that are left, and be who we were. */
void
omni_write_end(OmniWrite *write)
{
	AfterTriggerEndQuery(write->estate);
	if (write->update)
		PopActiveSnapshot();
	ExecCloseIndices(write->result);
	ExecResetTupleTable(write->estate->es_tupleTable, false);
	FreeExecutorState(write->estate);
	table_close(write->relation, NoLock);
	omni_as_before(&write->before);
	CommandCounterIncrement();
}

/*
 * Return a job as a value of the table's row type, palloc'd, under the latest snapshot.
 * Returns false if there is none.  No code of the table's owner is run.
 */
bool
omni_row_read(OmniTable *table, int64 id, Datum *row)
{
	Relation	relation = try_table_open(table->oid, AccessShareLock);
	Snapshot	snapshot;
	SysScanDesc scan;
	HeapTuple	tuple;

	if (relation == NULL)
		return false;			/* DROP EXTENSION was faster */
	omni_check_table(table);
	snapshot = RegisterSnapshot(GetLatestSnapshot());
	scan = begin_scan(table, relation, find_index(table, relation), snapshot, id);
	tuple = systable_getnext(scan);
	if (HeapTupleIsValid(tuple))
		*row = heap_copy_tuple_as_datum(tuple, RelationGetDescr(relation));
	systable_endscan(scan);
	table_close(relation, AccessShareLock);
	UnregisterSnapshot(snapshot);
	return HeapTupleIsValid(tuple);
}
