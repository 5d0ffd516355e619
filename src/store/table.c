/*-------------------------------------------------------------------------
 *
 * table.c
 *		The tables of the extension, and how statements on them are run.
 *
 * Statements are run through SPI and name a table as the catalogs do at that moment.  Each
 * is run with the privileges of its table's owner and no others, and with a search_path of
 * its own, since the owner may have given the table triggers and policies.  These may do
 * what the owner may do, and change settings, but only until the statement ends.  The
 * tables may have different owners, so no statement uses two of them.
 *
 * Only the worker writes to the tables, except when a user's transaction queues or cancels
 * a job.  The functions need a transaction with an active snapshot and SPI connected, and
 * raise what the statements raise.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/dependency.h"
#include "catalog/indexing.h"
#include "catalog/pg_class.h"
#include "catalog/pg_extension.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/guc.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/typcache.h"

#include "base/compat.h"
#include "omni_refresh.h"
#include "store/job.h"
#include "store/table.h"

/* Size of an extension's version, with its terminating NUL; longer ones are clipped */
#define MAX_VERSION			64

#define REPAIR				"Undo what ALTER TABLE has changed, or drop and create the extension."
#define DIFFERS				"table \"%s\" is not as the extension made it"

#define COLUMN(name, type, required) {#name, type, required},

static const OmniColumn job_columns[] = {OMNI_JOB_COLUMNS(COLUMN)};
static const OmniColumn event_columns[] = {OMNI_EVENT_COLUMNS(COLUMN)};
static const OmniColumn watch_columns[] = {OMNI_WATCH_COLUMNS(COLUMN)};
static const OmniColumn seen_columns[] = {OMNI_SEEN_COLUMNS(COLUMN)};

OmniTable	omni_job_table = {
	.name = "omni_refresh_job",.columns = job_columns,.ncolumns = lengthof(job_columns),.nchecks = 3
};
OmniTable	omni_event_table = {
	.name = "omni_refresh_event",.columns = event_columns,.ncolumns = lengthof(event_columns),.nchecks = 1
};
OmniTable	omni_watch_table = {
	.name = "omni_refresh_watch",.columns = watch_columns,.ncolumns = lengthof(watch_columns)
};
OmniTable	omni_seen_table = {
	.name = "omni_refresh_watch_seen",.columns = seen_columns,.ncolumns = lengthof(seen_columns)
};

static OmniTable *const tables[] = {
	&omni_job_table, &omni_event_table, &omni_watch_table, &omni_seen_table
};

bool		omni_in_worker = false;

/* The table of the last statement, for messages */
static OmniTable *last_table;

/* The version of the extension at the first call of omni_extension_is_same() */
static char first_version[MAX_VERSION] = "";

static bool find_extension(Oid *schema, char *version);
static bool find_tables(void);
static bool find_table(OmniTable *table);
static bool lock_table(OmniTable *table);
static void plan_statement(OmniStatement *statement);
static const char *find_difference(const OmniTable *table, TupleDesc desc);
static const char *find_nullable(const OmniTable *table, TupleDesc desc);
static void forget_check(Datum arg, Oid relation);

/*
 * Find the tables of the extension, which may have been moved, renamed or given away.
 * Returns false if the extension does not exist.  Do not look for it as long as the tables
 * that it had exist: then it exists, too.
 */
bool
omni_tables_find(void)
{
	Oid			schema;

	if (find_tables())
		return true;
	if (!find_extension(&schema, NULL))
		return false;
	for (int i = 0; i < lengthof(tables); i++)
	{
		tables[i]->oid = get_relname_relid(tables[i]->name, schema);
		tables[i]->checked = false;
	}
	return find_tables();
}

static bool
find_tables(void)
{
	for (int i = 0; i < lengthof(tables); i++)
	{
		if (!find_table(tables[i]))
			return false;
	}
	return true;
}

/*
 * Return whether the extension and its tables exist, and it has the version that it had at
 * the first call of this function.
 */
bool
omni_extension_is_same(void)
{
	char		version[MAX_VERSION];

	if (!omni_tables_find() || !find_extension(NULL, version))
		return false;
	if (first_version[0] == '\0')
		strcpy(first_version, version);
	return strcmp(first_version, version) == 0;
}

/*
 * Find the extension.  Sets *schema and version, of MAX_VERSION bytes, unless these are NULL.
 * Returns false if it does not exist.
 */
static bool
find_extension(Oid *schema, char *version)
{
	Relation	extensions = table_open(ExtensionRelationId, AccessShareLock);
	ScanKeyData key;
	SysScanDesc scan;
	HeapTuple	tuple;
	bool		found;
	bool		isnull;

	ScanKeyInit(&key, Anum_pg_extension_extname, BTEqualStrategyNumber, F_NAMEEQ,
				CStringGetDatum(OMNI_EXTENSION));
	scan = systable_beginscan(extensions, ExtensionNameIndexId, true, NULL, 1, &key);
	tuple = systable_getnext(scan);
	found = HeapTupleIsValid(tuple);
	if (found && schema != NULL)
		*schema = ((Form_pg_extension) GETSTRUCT(tuple))->extnamespace;
	if (found && version != NULL)
		strlcpy(version, TextDatumGetCString(heap_getattr(tuple, Anum_pg_extension_extversion,
														  RelationGetDescr(extensions), &isnull)),
				MAX_VERSION);
	systable_endscan(scan);
	table_close(extensions, AccessShareLock);
	return found;
}

/* Set the owner and the qualified name of a table.  Returns false if it does not exist. */
static bool
find_table(OmniTable *table)
{
	HeapTuple	tuple = SearchSysCache1(RELOID, ObjectIdGetDatum(table->oid));
	Form_pg_class class;

	if (!HeapTupleIsValid(tuple))
		return false;
	class = (Form_pg_class) GETSTRUCT(tuple);
	table->owner = class->relowner;
	snprintf(table->qualified, sizeof(table->qualified), "ONLY %s",
			 quote_qualified_identifier(get_namespace_name(class->relnamespace),
										NameStr(class->relname)));
	ReleaseSysCache(tuple);
	return true;
}

/*
 * Lock the tables of jobs and events for writing until the end of the transaction.  Never
 * waits: returns false if another session holds a conflicting lock.  Call omni_tables_find()
 * before.
 */
bool
omni_tables_lock(void)
{
	return lock_table(&omni_job_table) && lock_table(&omni_event_table);
}

/* The same for the tables of watches. */
bool
omni_watch_tables_lock(void)
{
	return lock_table(&omni_watch_table) && lock_table(&omni_seen_table);
}

/*
 * Lock a table and the sequence of its ids: a session that drops the extension may have
 * locked the sequence while it waits for the table.
 */
static bool
lock_table(OmniTable *table)
{
	if (!ConditionalLockRelationOid(table->oid, RowExclusiveLock))
		return false;
	omni_check_table(table);
	return !OidIsValid(table->sequence) ||
		ConditionalLockRelationOid(table->sequence, RowExclusiveLock);
}

/* Change a setting until the end of the statement. */
static void
set_locally(const char *name, const char *value)
{
	(void) set_config_option(name, value, PGC_SUSET, PGC_S_SESSION, GUC_ACTION_SAVE,
							 true, 0, false);
}

/*
 * Check a table, and act as its owner until omni_as_before(), with no more rights than
 * that and with settings that the owner's functions cannot misuse.  An error that ends
 * the transaction or subtransaction ends this, too.
 */
void
omni_as_owner(OmniTable *table, OmniOwner *before)
{
	omni_check_table(table);
	before->nest_level = NewGUCNestLevel();
	if (!omni_in_worker)
	{
		set_locally("search_path", "pg_catalog, pg_temp");

		/*
		 * Otherwise the triggers that keep replicated rows out would take
		 * ours for such rows.
		 */
		set_locally("session_replication_role", "origin");
	}
	GetUserIdAndSecContext(&before->user, &before->security_context);
	SetUserIdAndSecContext(table->owner, before->security_context | SECURITY_RESTRICTED_OPERATION);
}

void
omni_as_before(const OmniOwner *before)
{
	SetUserIdAndSecContext(before->user, before->security_context);
	AtEOXact_GUC(false, before->nest_level);
}

/*
 * Run a statement as the owner of its table.  Returns the number of rows that it has
 * returned, which omni_value() reads, or processed.  nulls is as in SPI_execute_plan().
 */
uint64
omni_run(OmniStatement *statement, Datum *values, const char *nulls)
{
	OmniOwner	before;
	volatile int code = 0;

	last_table = statement->table;
	omni_as_owner(statement->table, &before);

	plan_statement(statement);
	statement->running++;
	PG_TRY();
	{
		code = SPI_execute_snapshot(statement->plan, values, nulls,
									statement->read || statement->latest ? GetLatestSnapshot() : InvalidSnapshot,
									InvalidSnapshot, statement->read, true, 0);
	}
	PG_FINALLY();
	{
		statement->running--;
	}
	PG_END_TRY();
	omni_as_before(&before);
	if (code < 0)
		elog(ERROR, "SPI_execute_snapshot failed: %s", SPI_result_code_string(code));
	if (statement->must && SPI_processed == 0)
		omni_not_written(statement->table);
	return SPI_processed;
}

/* Raise an error about a row that a statement should have written, and has not. */
void
omni_not_written(const OmniTable *table)
{
	ereport(ERROR,
			(errcode(ERRCODE_TRIGGERED_ACTION_EXCEPTION),
			 errmsg("a trigger of table \"%s\" kept a row from being written", table->name)));
}

/* Plan a statement, unless it has a plan for the present name of its table. */
static void
plan_statement(OmniStatement *statement)
{
	const char *name = statement->table->qualified;
	SPIPlanPtr	plan;

	if (statement->plan != NULL && strcmp(statement->planned_for, name) == 0)
		return;
	plan = SPI_prepare(psprintf(statement->text, name, name, name, name, name, name),
					   statement->nargs, statement->argtypes);
	if (plan == NULL)
		elog(ERROR, "SPI_prepare failed: %s", SPI_result_code_string(SPI_result));
	SPI_keepplan(plan);

	/*
	 * If a trigger of this very statement has renamed the table, the old plan
	 * is still being executed.  Leak it then.
	 */
	if (statement->plan != NULL && statement->running == 0)
		SPI_freeplan(statement->plan);
	statement->plan = plan;
	strlcpy(statement->planned_for, name, sizeof(statement->planned_for));
}

/*
 * Check that a table has the columns that the statements use, since its owner may have
 * altered it.  Raises an error if one is missing or has another type; added columns do no
 * harm.  A column that has lost its NOT NULL raises no error here, but a null does when it is
 * read.  The worker writes to the log once about either.
 */
void
omni_check_table(OmniTable *table)
{
	static bool registered = false;
	Relation	relation;
	const char *difference;
	const char *nullable;
	List	   *sequences;

	if (table->checked)
		return;
	if (!registered)
		CacheRegisterRelcacheCallback(forget_check, (Datum) 0);
	registered = true;

	relation = table_open(table->oid, AccessShareLock);
	difference = find_difference(table, RelationGetDescr(relation));
	nullable = find_nullable(table, RelationGetDescr(relation));
	sequences = getOwnedSequences(table->oid);
	for (int i = 0; i < table->ncolumns; i++)
		table->numbers[i] = SPI_fnumber(RelationGetDescr(relation), table->columns[i].name);
	table->sequence = sequences != NIL ? linitial_oid(sequences) : InvalidOid;
	table->checked = difference == NULL;
	table_close(relation, AccessShareLock);
	if ((difference != NULL || nullable != NULL) && !table->complained && omni_in_worker)
		ereport(LOG,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg(DIFFERS, table->name),
				 errdetail_internal("%s", difference != NULL ? difference : nullable)));
	table->complained = difference != NULL || nullable != NULL;
	if (difference != NULL)
		omni_table_differs(table, difference);
}

/*
 * Return a sentence that says in what a table differs from the one that the extension made,
 * or NULL if in nothing.
 */
static const char *
find_difference(const OmniTable *table, TupleDesc desc)
{
	for (int i = 0; i < table->ncolumns; i++)
	{
		const OmniColumn *column = &table->columns[i];
		int			number = SPI_fnumber(desc, column->name);
		Form_pg_attribute attribute;

		if (number <= 0)
			return psprintf("Column \"%s\" does not exist.", column->name);
		attribute = TupleDescAttr(desc, number - 1);
		if (attribute->atttypid != column->type)
			return psprintf("Column \"%s\" is of type %s, and should be of type %s.", column->name,
							format_type_be(attribute->atttypid), format_type_be(column->type));
	}
	return NULL;
}

/* The same for columns that have lost their NOT NULL. */
static const char *
find_nullable(const OmniTable *table, TupleDesc desc)
{
	for (int i = 0; i < table->ncolumns; i++)
	{
		const OmniColumn *column = &table->columns[i];
		int			number = SPI_fnumber(desc, column->name);

		if (column->required && number > 0 && !TupleDescAttr(desc, number - 1)->attnotnull)
			return psprintf("Column \"%s\" may be null.", column->name);
	}
	return NULL;
}

/*
 * Relation cache callback: check a table again, since it may have been altered; all tables if
 * relation is invalid.
 */
static void
forget_check(Datum arg, Oid relation)
{
	for (int i = 0; i < lengthof(tables); i++)
	{
		if (!OidIsValid(relation) || relation == tables[i]->oid)
			tables[i]->checked = false;
	}
}

/* Raise an error about a table that was altered. */
void
omni_table_differs(const OmniTable *table, const char *detail)
{
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg(DIFFERS, table->name),
			 errdetail_internal("%s", detail),
			 errhint(REPAIR)));
}

/* Check the columns of a table as omni_check_table() does, and return its row type, palloc'd. */
TupleDesc
omni_table_rowtype(OmniTable *table)
{
	TupleDesc	rowtype = lookup_rowtype_tupdesc_copy(get_rel_type_id(table->oid), -1);
	const char *difference = find_difference(table, rowtype);

	if (difference != NULL)
		omni_table_differs(table, difference);
	return rowtype;
}

/*
 * Return whether the tables are as the extension made them; if not, set *error.  For
 * omni_refresh_check(): skip a table that another session has locked.
 */
bool
omni_tables_check(OmniError *error)
{
	for (int i = 0; i < lengthof(tables); i++)
	{
		Relation	relation;
		const char *difference;

		if (!ConditionalLockRelationOid(tables[i]->oid, AccessShareLock))
			continue;
		relation = table_open(tables[i]->oid, NoLock);
		difference = find_difference(tables[i], RelationGetDescr(relation));
		if (difference == NULL)
			difference = find_nullable(tables[i], RelationGetDescr(relation));
		table_close(relation, AccessShareLock);
		if (difference != NULL)
		{
			omni_error_set(error, ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, DIFFERS,
						   tables[i]->name);
			omni_error_detail(error, "%s", difference);
			omni_error_hint(error, REPAIR);
			return false;
		}
	}
	return true;
}

/*
 * Return a value of the last statement's result; row and column count from 0.  Raises an
 * error if it does not exist, has another type or is null: the table may have been altered
 * since it was checked.
 */
Datum
omni_value(int row, int column, Oid type)
{
	bool		isnull;
	Datum		value = omni_value_or_null(row, column, type, &isnull);

	if (isnull)
		omni_table_differs(last_table,
						   psprintf("Column %d of a statement's result is null.", column + 1));
	return value;
}

/* The same for a value that may be null. */
Datum
omni_value_or_null(int row, int column, Oid type, bool *isnull)
{
	SPITupleTable *rows = SPI_tuptable;
	Oid			found;

	if (rows == NULL || row >= rows->numvals || column >= rows->tupdesc->natts)
		omni_table_differs(last_table, "A statement has returned nothing.");
	found = SPI_gettypeid(rows->tupdesc, column + 1);
	if (found != type)
		omni_table_differs(last_table,
						   psprintf("Column %d of a statement's result is of type %s, and should be of type %s.",
									column + 1, format_type_be(found), format_type_be(type)));
	return SPI_getbinval(rows->vals[row], rows->tupdesc, column + 1, isnull);
}

/* Convert numbers to an array, palloc'd. */
ArrayType *
omni_bigints(const int64 *numbers, int count)
{
	Datum	   *elements = palloc(Max(count, 1) * sizeof(Datum));

	for (int i = 0; i < count; i++)
		elements[i] = Int64GetDatum(numbers[i]);
	return construct_array(elements, count, INT8OID, sizeof(int64), FLOAT8PASSBYVAL, TYPALIGN_DOUBLE);
}

/* Convert a text to a name; what is too long is cut off. */
NameData
omni_name(Datum text)
{
	return *DatumGetName(DirectFunctionCall1(text_name, text));
}
