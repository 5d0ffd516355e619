/*-------------------------------------------------------------------------
 *
 * table.c
 *		The two tables of the extension, and the statements that reach them.
 *
 * They are reached through SPI, by statements that name the tables as the
 * catalogs say at that moment, each run as the owner of its table with no more
 * rights than that, and with a search_path of their own: who owns a table may give
 * it triggers and policies, which may then do as they like, and change settings,
 * but only until the statement ends.  The two tables may have two owners, so that no
 * statement reads both.
 *
 * Only the worker writes, but for what a transaction of a user queues or cancels.
 * Unless a function says that it is for backends, it needs a transaction with an
 * active snapshot and SPI connected; all raise what the statements raise.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/indexing.h"
#include "catalog/pg_class.h"
#include "catalog/pg_extension.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

#include "compat.h"
#include "omni_refresh.h"
#include "table.h"

/* Bytes of an extension's version that we compare */
#define MAX_VERSION			64

OmniTable	omni_job_table = {.name = "omni_refresh_job"};
OmniTable	omni_event_table = {.name = "omni_refresh_event"};

static bool look_at_extension(Oid *schema, char *version);
static bool look_at_table(OmniTable *table);

/*
 * Looks where the extension's tables are at this moment.  Returns false if there
 * is no such extension.  As long as the tables that it had are there, so is it.
 */
bool
omni_tables_find(void)
{
	Oid			schema;

	if (look_at_table(&omni_job_table) && look_at_table(&omni_event_table))
		return true;
	if (!look_at_extension(&schema, NULL))
		return false;
	omni_job_table.oid = get_relname_relid(omni_job_table.name, schema);
	omni_event_table.oid = get_relname_relid(omni_event_table.name, schema);
	return look_at_table(&omni_job_table) && look_at_table(&omni_event_table);
}

/*
 * Whether the extension is still there, with its tables, and still of the version
 * that it had when this was asked for the first time.
 */
bool
omni_extension_is_same(void)
{
	static char first[MAX_VERSION] = "";
	char		version[MAX_VERSION];

	if (!omni_tables_find() || !look_at_extension(NULL, version))
		return false;
	if (first[0] == '\0')
		strcpy(first, version);
	return strcmp(first, version) == 0;
}

/* Sets *schema and *version, of MAX_VERSION bytes, unless NULL; false if there is none. */
static bool
look_at_extension(Oid *schema, char *version)
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

/* Sets a table's owner and name; false if it does not exist (any more). */
static bool
look_at_table(OmniTable *table)
{
	HeapTuple	tuple = SearchSysCache1(RELOID, ObjectIdGetDatum(table->oid));
	Form_pg_class class;

	if (!HeapTupleIsValid(tuple))
		return false;
	class = (Form_pg_class) GETSTRUCT(tuple);
	table->owner = class->relowner;
	strlcpy(table->qualified,
			quote_qualified_identifier(get_namespace_name(class->relnamespace),
									   NameStr(class->relname)),
			sizeof(table->qualified));
	ReleaseSysCache(tuple);
	return true;
}

/*
 * Locks the tables for writing, for the rest of the transaction, if nobody holds
 * a lock against that: it never waits.  After omni_tables_find().
 */
bool
omni_tables_lock(void)
{
	return ConditionalLockRelationOid(omni_job_table.oid, RowExclusiveLock) &&
		ConditionalLockRelationOid(omni_event_table.oid, RowExclusiveLock);
}

/*
 * Runs a statement as the owner of its table and returns how many rows it had,
 * for omni_result().  nulls is as in SPI_execute_plan().
 */
uint64
omni_run(OmniStatement *statement, Datum *values, const char *nulls)
{
	Oid			user;
	int			security_context;
	int			nest_level;
	int			code;

	nest_level = NewGUCNestLevel();
	if (!omni_in_worker)
		(void) set_config_option("search_path", "pg_catalog, pg_temp", PGC_USERSET,
								 PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);

	GetUserIdAndSecContext(&user, &security_context);
	SetUserIdAndSecContext(statement->table->owner,
						   security_context | SECURITY_RESTRICTED_OPERATION);

	if (statement->plan == NULL ||
		strcmp(statement->planned_for, statement->table->qualified) != 0)
	{
		const char *name = statement->table->qualified;
		SPIPlanPtr	plan = SPI_prepare(psprintf(statement->text, name, name, name, name),
									   statement->nargs, statement->argtypes);

		if (plan == NULL)
			elog(ERROR, "SPI_prepare failed: %s", SPI_result_code_string(SPI_result));
		SPI_keepplan(plan);
		if (statement->plan != NULL)
			SPI_freeplan(statement->plan);
		statement->plan = plan;
		strlcpy(statement->planned_for, statement->table->qualified,
				sizeof(statement->planned_for));
	}

	code = SPI_execute_snapshot(statement->plan, values, nulls,
								statement->read ? GetLatestSnapshot() : InvalidSnapshot,
								InvalidSnapshot, statement->read, true, 0);
	SetUserIdAndSecContext(user, security_context);
	AtEOXact_GUC(false, nest_level);
	if (code < 0)
		elog(ERROR, "SPI_execute_snapshot failed: %s", SPI_result_code_string(code));
	return SPI_processed;
}

/* A value that the last statement has returned; row and column count from 0. */
Datum
omni_result(int row, int column, bool *isnull)
{
	return SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, column + 1, isnull);
}

