/*-------------------------------------------------------------------------
 *
 * seen.c
 *		Watches and what they remember: the tables omni_refresh_watch and
 *		omni_refresh_watch_seen, and how the latter differs from the catalogs.
 *
 * The memory of a watch is what Omni was told of the relations of its schemas.  Nobody
 * interprets DDL: what differs between memory and catalogs is what Omni has to be told.
 *
 * A dump contains the watches, but no memory.  So a watch without memory is a copy, which
 * stays inactive.  The row of the memory that has no names says that there is one, even of no
 * relation.  A dump that was restored over a watch, with triggers disabled, leaves rows of it
 * or of an earlier one beside it; they count as that watch, and its next look deletes them.
 *
 * See table.c for what the functions need and raise.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "commands/event_trigger.h"
#include "commands/trigger.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "storage/lmgr.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "base/compat.h"
#include "omni_refresh.h"
#include "store/job.h"
#include "store/row.h"
#include "watch/seen.h"

/* Name this many tables or schemas in a request; more cost Omni more than what they spare it */
#define MAX_OWED			50

/* The longest delay that counts, in microseconds */
#define MAX_DELAY			USECS_PER_DAY

#define WATCH_COLUMN_TEXT(name, type, required) #name ", "
#define WATCH_LIST \
	OMNI_WATCH_COLUMNS(WATCH_COLUMN_TEXT) \
	"EXISTS (SELECT FROM pg_event_trigger AS t, pg_depend AS d, pg_extension AS e" \
	"  WHERE t.evtenabled <> 'D' AND d.classid = 'pg_event_trigger'::regclass AND d.objid = t.oid" \
	"   AND d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid" \
	"   AND e.extname = '" OMNI_EXTENSION "')"

/* The relations that Omni knows, if they are in a schema that is watched */
#define RELATIONS \
	"c.relkind = ANY ('{r,p,v,m,f}') AND c.relpersistence <> 't'"
#define WATCHED(schemas) \
	"CASE WHEN " schemas " IS NULL" \
	"  THEN n.nspname <> 'information_schema' AND NOT starts_with(n.nspname::text, 'pg_')" \
	"  ELSE n.nspname::text COLLATE \"C\" = ANY (" schemas ") END"

/* Of rows with the same id, which copies are, the latest state comes first. */
#define LATEST_FIRST \
	"job DESC NULLS LAST, unfinished, owed_hard DESC NULLS LAST"

static OmniStatement select_watches = {
	.table = &omni_watch_table,
	.read = true,
	.text = "SELECT " WATCH_LIST " FROM %s ORDER BY server, model_id, branch_id, " LATEST_FIRST
};

static OmniStatement read_watch = {
	.table = &omni_watch_table,
	.text = "SELECT " WATCH_LIST " FROM %s WHERE id = $1 ORDER BY " LATEST_FIRST " FOR NO KEY UPDATE SKIP LOCKED",
	.nargs = 1,
	.argtypes = {UUIDOID}
};

static OmniStatement write_watch = {
	.table = &omni_watch_table,
	.must = true,
	.text = "UPDATE %s SET owed_hard = $2, owed_schemas = $3, owed_tables = $4, job = $5, unfinished = $6, failures = $7,"
	" data_seen = $8 WHERE id = $1",
	.nargs = 8,
	.argtypes = {UUIDOID, BOOLOID, TEXTARRAYOID, TEXTARRAYOID, INT8OID, BOOLOID, INT4OID, INT8OID}
};

#define TARGET		"server = $1 AND model_id = $2 AND branch_id IS NOT DISTINCT FROM $3"

static OmniStatement delete_copies = {
	.table = &omni_watch_table,
	.text = "DELETE FROM %s WHERE ctid = ANY (ARRAY(SELECT ctid FROM %s WHERE " TARGET " AND ctid <>"
	"  (SELECT ctid FROM %s WHERE id = $4 ORDER BY " LATEST_FIRST " LIMIT 1) FOR UPDATE SKIP LOCKED))",
	.nargs = 4,
	.argtypes = {TEXTOID, UUIDOID, UUIDOID, UUIDOID}
};

static OmniStatement delete_watch = {
	.table = &omni_watch_table,
	.must = true,
	.text = "DELETE FROM %s WHERE " TARGET,
	.nargs = 3,
	.argtypes = {TEXTOID, UUIDOID, UUIDOID}
};

/*
 * Hash the state of the data of a watch: for each relation its name, its file, which TRUNCATE
 * and rewrites replace, and the rows that the cumulative statistics have counted.  Neither
 * ANALYZE nor autovacuum changes any of that.  Leave out our own tables, lest each reset lead
 * to the next one.  Hash the hash of each row once more, since it is a sum over the columns,
 * which two tables that swap their names would leave as it is.
 */
static OmniStatement select_data = {
	.table = &omni_watch_table,
	.read = true,
	.text = "SELECT (SELECT coalesce(bit_xor(hashint8extended(hash_record_extended(ROW("
	"   n.nspname, c.relname, c.relispartition, c.oid, c.relfilenode, pg_stat_get_tuples_inserted(c.oid),"
	"   pg_stat_get_tuples_updated(c.oid), pg_stat_get_tuples_deleted(c.oid)), 0), 0)), 0)"
	"  FROM pg_class AS c"
	"  CROSS JOIN LATERAL (SELECT nspname FROM pg_namespace WHERE oid = c.relnamespace OFFSET 0) AS n"
	"  WHERE " RELATIONS " AND c.oid <> ALL ($2) AND " WATCHED("w.schemas") "), w.data_seen"
	" FROM %s AS w WHERE w.id = $1 ORDER BY " LATEST_FIRST,
	.nargs = 2,
	.argtypes = {UUIDOID, OIDARRAYOID}
};

static OmniStatement select_window = {
	.table = &omni_seen_table,
	.text = "SELECT c.oid FROM pg_class AS c WHERE c.oid > $1 AND " RELATIONS " ORDER BY c.oid OFFSET $2 LIMIT 1",
	.nargs = 2,
	.argtypes = {OIDOID, INT4OID}
};

/*
 * Compare the relations of a range of OIDs with the memory.  Do not sort columns by name, and
 * privileges at all, since that would cost each relation a sort: difference.c does, for the few
 * rows that are not equal.  Look the memory up by a subquery of its own, lest the planner scan
 * a schema of it for each relation; and compare the bytes of rows, which takes a fraction of the
 * time that comparing arrays of text does.
 */
static OmniStatement select_differences = {
	.table = &omni_seen_table,
	.text = "SELECT n.nspname::text, c.relname::text, c.relispartition AND c.relkind <> 'p',"
	"  a.columns, a.types, r.readers, s.columns, s.types, s.readers"
	" FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace"
	" CROSS JOIN LATERAL (SELECT coalesce(array_agg(attname::text), '{}') AS columns,"
	"   coalesce(array_agg(type), '{}') AS types, count(attacl) AS granted"
	"  FROM (SELECT attname, format_type(atttypid, atttypmod) AS type, attacl FROM pg_attribute"
	"   WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped ORDER BY attnum) AS attribute) AS a"
	" CROSS JOIN LATERAL (SELECT"
	"   CASE WHEN c.relacl IS NULL THEN ARRAY['SELECT ' || c.relowner]"
	"    ELSE ARRAY(SELECT 'SELECT ' || grantee FROM aclexplode(c.relacl) WHERE privilege_type = 'SELECT') END"
	"   || CASE WHEN n.nspacl IS NULL THEN ARRAY['USAGE ' || n.nspowner]"
	"    ELSE ARRAY(SELECT 'USAGE ' || grantee FROM aclexplode(n.nspacl) WHERE privilege_type = 'USAGE') END"
	"   || CASE WHEN a.granted = 0 THEN '{}'"
	"    ELSE ARRAY(SELECT format('SELECT (%%s) %%s', attname, grantee) FROM pg_attribute, aclexplode(attacl)"
	"     WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped AND privilege_type = 'SELECT') END"
	"   AS readers) AS r"
	" LEFT JOIN LATERAL (SELECT * FROM %s WHERE watch = $1 AND schema = n.nspname::text COLLATE \"C\""
	"  AND relation = c.relname::text COLLATE \"C\" OFFSET 0) AS s ON true"
	" WHERE c.oid > $2 AND c.oid <= $3 AND " RELATIONS
	"  AND " WATCHED("$4")
	"  AND (s.watch IS NULL OR ROW(s.leaf, s.columns, s.types, s.readers)::record"
	"   *<> ROW(c.relispartition AND c.relkind <> 'p', a.columns, a.types, r.readers)::record)",
	.nargs = 4,
	.argtypes = {UUIDOID, OIDOID, OIDOID, TEXTARRAYOID}
};

static OmniStatement select_relations = {
	.table = &omni_seen_table,
	.text = "SELECT schema, relation, leaf, (SELECT c.oid FROM pg_class AS c"
	"  WHERE c.relname = s.relation::name AND c.relnamespace ="
	"   (SELECT n.oid FROM pg_namespace AS n WHERE n.nspname = s.schema::name) AND " RELATIONS ") IS NULL"
	" FROM (SELECT schema, relation, leaf FROM %s WHERE watch = $1 AND (schema, relation) > ($2, $3)"
	"  ORDER BY schema, relation LIMIT $4) AS s",
	.nargs = 4,
	.argtypes = {UUIDOID, TEXTOID, TEXTOID, INT4OID}
};

static OmniStatement select_memory = {
	.table = &omni_seen_table,
	.read = true,
	.text = "SELECT FROM %s WHERE watch = $1 AND schema = '' AND relation = ''",
	.nargs = 1,
	.argtypes = {UUIDOID}
};

/* Do not wait for a row that another session has locked: calls would wait, too. */
#define RELATION	"watch = $1 AND schema = $2 AND relation = $3"
#define LOCKED_RELATION \
	RELATION " AND EXISTS (SELECT FROM %s WHERE " RELATION " FOR UPDATE NOWAIT)"

static OmniStatement update_relation = {
	.table = &omni_seen_table,
	.must = true,
	.text = "UPDATE %s SET leaf = $4, columns = $5, types = $6, readers = $7 WHERE " LOCKED_RELATION,
	.nargs = 7,
	.argtypes = {UUIDOID, TEXTOID, TEXTOID, BOOLOID, TEXTARRAYOID, TEXTARRAYOID, TEXTARRAYOID}
};

static OmniStatement delete_relation = {
	.table = &omni_seen_table,
	.must = true,
	.text = "DELETE FROM %s WHERE " LOCKED_RELATION,
	.nargs = 3,
	.argtypes = {UUIDOID, TEXTOID, TEXTOID}
};

static OmniStatement delete_memory = {
	.table = &omni_seen_table,
	.text = "DELETE FROM %s WHERE watch = $1",
	.nargs = 1,
	.argtypes = {UUIDOID}
};

static bool is_of(const OmniWatch *watch, const OmniRequest *request);
static void decode_watch(int row, OmniWatch *watch);
static ArrayType *copy_array(int row, int column);
static char *copy_text(int row, int column);
static void delete_rows(const OmniWatch *watch, OmniStatement *statement);
static int64 interval_length(const Interval *interval);
static void insert_relation(const OmniWatch *watch, const char *schema, const char *relation,
							bool leaf, const OmniShape *shape);
static bool is_plain(const char *name);
static ArrayType *add_name(ArrayType *names, const char *name);

/*
 * Return all watches, palloc'd, in this database or copied from another one.  Of those for the
 * same server, model and branch, return the one that is active, if any is.
 */
List *
omni_watches(void)
{
	List	   *rows = NIL;
	List	   *result = NIL;
	ListCell   *cell;
	int			count = (int) omni_run(&select_watches, NULL, NULL);

	for (int i = 0; i < count; i++)
	{
		OmniWatch  *watch = palloc(sizeof(OmniWatch));

		decode_watch(i, watch);
		rows = lappend(rows, watch);
	}
	foreach(cell, rows)
	{
		OmniWatch  *watch = lfirst(cell);
		OmniWatch  *last = result != NIL ? llast(result) : NULL;

		if (last == NULL || !is_of(last, &watch->request))
			result = lappend(result, watch);
		else if (!omni_watch_is_active(last) && omni_watch_is_active(watch))
			llast(result) = watch;
	}
	return result;
}

/* Find the watch of a server, model and branch.  Returns false if there is none. */
bool
omni_watch_find(const OmniRequest *request, OmniWatch *watch)
{
	List	   *watches = omni_watches();
	ListCell   *cell;

	foreach(cell, watches)
	{
		*watch = *(OmniWatch *) lfirst(cell);
		if (is_of(watch, request))
			return true;
	}
	return false;
}

/* Return whether a watch is for the server, model and branch of a request. */
static bool
is_of(const OmniWatch *watch, const OmniRequest *request)
{
	const OmniRequest *own = &watch->request;

	return strcmp(NameStr(own->server), NameStr(request->server)) == 0 &&
		memcmp(&own->model, &request->model, sizeof(own->model)) == 0 &&
		own->has_branch == request->has_branch &&
		(!own->has_branch || memcmp(&own->branch, &request->branch, sizeof(own->branch)) == 0);
}

/*
 * Read a watch and lock its row.  Returns false if it no longer exists, or its row is locked
 * by another session.
 */
bool
omni_watch_read(const pg_uuid_t *id, OmniWatch *watch)
{
	Datum		values[1] = {UUIDPGetDatum(id)};

	if (omni_run(&read_watch, values, NULL) == 0)
		return false;
	decode_watch(0, watch);
	return true;
}

/* Decode a row that the last statement has returned as WATCH_LIST.  See omni_job_decode(). */
static void
decode_watch(int row, OmniWatch *watch)
{
#define VALUE(name, type) omni_value(row, OMNI_WATCH_ ## name, type)
#define VALUE_OR_NULL(name, type) omni_value_or_null(row, OMNI_WATCH_ ## name, type, &isnull)
	OmniRequest *request = &watch->request;
	bool		isnull;
	Datum		value;

	memset(watch, 0, sizeof(*watch));
	watch->id = *DatumGetUUIDP(VALUE(id, UUIDOID));
	omni_request_decode(request, row, OMNI_WATCH_server, OMNI_WATCH_model_id, OMNI_WATCH_branch_id,
						OMNI_WATCH_cache_policy, OMNI_WATCH_requested_by, OMNI_WATCH_requested_by_oid);
	request->requested_at = DatumGetTimestampTz(VALUE(requested_at, TIMESTAMPTZOID));
	watch->schemas = copy_array(row, OMNI_WATCH_schemas);
	watch->delay = interval_length(DatumGetIntervalP(VALUE(delay, INTERVALOID)));
	value = VALUE_OR_NULL(removals, INTERVALOID);
	watch->removals = isnull ? -1 : interval_length(DatumGetIntervalP(value));
	value = VALUE_OR_NULL(quiet, INTERVALOID);
	watch->quiet = isnull || request->policy[0] == '\0' ? -1 : interval_length(DatumGetIntervalP(value));
	watch->database = DatumGetObjectId(VALUE(database, OIDOID));
	value = VALUE_OR_NULL(owed_hard, BOOLOID);
	watch->owes = !isnull;
	watch->owes_hard = !isnull && DatumGetBool(value);
	watch->owed_schemas = copy_array(row, OMNI_WATCH_owed_schemas);
	watch->owed_tables = copy_array(row, OMNI_WATCH_owed_tables);
	value = VALUE_OR_NULL(job, INT8OID);
	watch->job = isnull ? 0 : DatumGetInt64(value);
	watch->unfinished = DatumGetBool(VALUE(unfinished, BOOLOID));
	watch->failures = Max(DatumGetInt32(VALUE(failures, INT4OID)), 0);
	value = VALUE_OR_NULL(data_seen, INT8OID);
	watch->has_data = !isnull;
	watch->data = isnull ? 0 : DatumGetInt64(value);
	watch->triggered = DatumGetBool(omni_value(row, OMNI_WATCH_NCOLUMNS, BOOLOID));
#undef VALUE
#undef VALUE_OR_NULL
}

/* Copy an array of the last statement's result; NULL if it is null. */
static ArrayType *
copy_array(int row, int column)
{
	bool		isnull;
	Datum		value = omni_value_or_null(row, column, TEXTARRAYOID, &isnull);

	return isnull ? NULL : DatumGetArrayTypePCopy(value);
}

static char *
copy_text(int row, int column)
{
	return TextDatumGetCString(omni_value(row, column, TEXTOID));
}

/* Convert an interval to microseconds, between 0 and MAX_DELAY. */
static int64
interval_length(const Interval *interval)
{
	if (interval->month > 0 || interval->day > 0)
		return MAX_DELAY;
	return Min(Max(interval->time, 0), MAX_DELAY);
}

/* In a backend: add a watch that owes a refresh of all, and return its row, palloc'd. */
Datum
omni_watch_add(const OmniWatch *watch, Interval *delay, Interval *removals, Interval *quiet)
{
	const OmniRequest *request = &watch->request;
	OmniRowValues row = {0};
	OmniWrite	write;
	Datum		result;

	omni_set(&row, OMNI_WATCH_id, UUIDPGetDatum(&watch->id));
	omni_set(&row, OMNI_WATCH_server, CStringGetTextDatum(NameStr(request->server)));
	omni_set(&row, OMNI_WATCH_model_id, UUIDPGetDatum(&request->model));
	if (request->has_branch)
		omni_set(&row, OMNI_WATCH_branch_id, UUIDPGetDatum(&request->branch));
	if (watch->schemas != NULL)
		omni_set(&row, OMNI_WATCH_schemas, PointerGetDatum(watch->schemas));
	omni_set(&row, OMNI_WATCH_delay, IntervalPGetDatum(delay));
	if (removals != NULL)
		omni_set(&row, OMNI_WATCH_removals, IntervalPGetDatum(removals));
	if (quiet != NULL)
		omni_set(&row, OMNI_WATCH_quiet, IntervalPGetDatum(quiet));
	if (request->policy[0] != '\0')
		omni_set(&row, OMNI_WATCH_cache_policy, CStringGetTextDatum(request->policy));
	omni_set(&row, OMNI_WATCH_requested_by, CStringGetTextDatum(NameStr(request->requested_by)));
	omni_set(&row, OMNI_WATCH_requested_by_oid, ObjectIdGetDatum(request->role));
	omni_set(&row, OMNI_WATCH_requested_at, TimestampTzGetDatum(request->requested_at));
	omni_set(&row, OMNI_WATCH_database, ObjectIdGetDatum(MyDatabaseId));
	omni_set(&row, OMNI_WATCH_owed_hard, BoolGetDatum(false));

	omni_write_begin(&write, &omni_watch_table, NULL);
	omni_write_insert(&write, &row);
	result = omni_written_row(&write);
	omni_write_end(&write);
	return result;
}

/*
 * Note that a relation is to be refreshed.  Name tables only while they are few, and have no
 * character that Omni reads as a part of the list, of a qualified name or of a pattern.
 */
void
omni_watch_owe(OmniWatch *watch, const char *schema, const char *relation)
{
	if (watch->owes && watch->owed_schemas == NULL)
		return;					/* all */
	if (!is_plain(schema))
	{
		omni_watch_owe_all(watch, false);
		return;
	}
	if (!watch->owes || watch->owed_tables != NULL)
		watch->owed_tables = is_plain(relation) ? add_name(watch->owed_tables, relation) : NULL;
	watch->owed_schemas = add_name(watch->owed_schemas, schema);
	watch->owes = true;
	if (watch->owed_schemas == NULL)
		omni_watch_owe_all(watch, false);
}

/* Note that the whole model is to be refreshed; with hard, what was removed is to go, too. */
void
omni_watch_owe_all(OmniWatch *watch, bool hard)
{
	watch->owes = true;
	watch->owes_hard |= hard;
	watch->owed_schemas = watch->owed_tables = NULL;
}

static bool
is_plain(const char *name)
{
	return strpbrk(name, ",.*") == NULL && name[strspn(name, " \t\r\n")] != '\0';
}

/* Add a name to an array, which may be NULL.  Returns NULL if there would be too many. */
static ArrayType *
add_name(ArrayType *names, const char *name)
{
	Datum	   *elements = NULL;
	int			count = 0;
	Datum		all[MAX_OWED];

	if (names != NULL)
		deconstruct_array(names, TEXTOID, -1, false, TYPALIGN_INT, &elements, NULL, &count);
	if (count > MAX_OWED)
		return NULL;
	for (int i = 0; i < count; i++)
	{
		all[i] = elements[i];
		if (strcmp(TextDatumGetCString(elements[i]), name) == 0)
			return names;
	}
	if (count == MAX_OWED)
		return NULL;
	all[count++] = CStringGetTextDatum(name);
	return construct_array(all, count, TEXTOID, -1, false, TYPALIGN_INT);
}

/* Write what a watch owes, what has become of its job, and the data that it has seen. */
void
omni_watch_write(const OmniWatch *watch)
{
	Datum		values[8] = {
		UUIDPGetDatum(&watch->id), BoolGetDatum(watch->owes_hard), PointerGetDatum(watch->owed_schemas),
		PointerGetDatum(watch->owed_tables), Int64GetDatum(watch->job), BoolGetDatum(watch->unfinished),
		Int32GetDatum(watch->failures), Int64GetDatum(watch->data)
	};
	char		nulls[] = "        ";

	if (!watch->owes)
		nulls[1] = 'n';
	if (watch->owed_schemas == NULL)
		nulls[2] = 'n';
	if (watch->owed_tables == NULL)
		nulls[3] = 'n';
	if (watch->job == 0)
		nulls[4] = 'n';
	if (!watch->has_data)
		nulls[7] = 'n';
	(void) omni_run(&write_watch, values, nulls);
}

/*
 * Find out the state of a watch's data as it is now, and as it was seen last, unless the watch
 * is new.  Returns false if the watch no longer exists.
 */
bool
omni_watch_data(const pg_uuid_t *id, int64 *data, int64 *seen, bool *is_new)
{
	Datum		own[] = {
		ObjectIdGetDatum(omni_job_table.oid), ObjectIdGetDatum(omni_event_table.oid),
		ObjectIdGetDatum(omni_watch_table.oid), ObjectIdGetDatum(omni_seen_table.oid)
	};
	ArrayType  *tables = construct_array(own, lengthof(own), OIDOID, sizeof(Oid), true, TYPALIGN_INT);
	Datum		values[2] = {UUIDPGetDatum(id), PointerGetDatum(tables)};

	if (omni_run(&select_data, values, NULL) == 0)
		return false;
	*data = DatumGetInt64(omni_value(0, 0, INT8OID));
	*seen = DatumGetInt64(omni_value_or_null(0, 1, INT8OID, is_new));
	return true;
}

/* Delete a watch and its memory, and whatever a restore has copied beside it. */
void
omni_watch_delete(const OmniWatch *watch)
{
	omni_seen_forget_all(watch);
	delete_rows(watch, &delete_watch);
}

/* Delete what a restore has copied beside an active watch, which the caller has locked. */
void
omni_watch_delete_copies(const OmniWatch *watch)
{
	delete_rows(watch, &delete_copies);
}

static void
delete_rows(const OmniWatch *watch, OmniStatement *statement)
{
	const OmniRequest *request = &watch->request;
	Datum		values[4] = {
		CStringGetTextDatum(NameStr(request->server)), UUIDPGetDatum(&request->model),
		UUIDPGetDatum(&request->branch), UUIDPGetDatum(&watch->id)
	};

	(void) omni_run(statement, values, request->has_branch ? NULL : "  n ");
}

/* In a backend: return whether any watch is active. */
bool
omni_watch_any(void)
{
	bool		any = false;
	List	   *watches;
	ListCell   *cell;

	SPI_connect();
	watches = omni_watches();
	foreach(cell, watches)
		any |= omni_watch_is_active(lfirst(cell));
	SPI_finish();
	return any;
}

/* Return whether a watch was set in this database, and is no copy. */
bool
omni_watch_is_active(const OmniWatch *watch)
{
	Datum		values[1] = {UUIDPGetDatum(&watch->id)};

	return watch->database == MyDatabaseId && watch->triggered &&
		omni_run(&select_memory, values, NULL) > 0;
}

/* Return the owner of the table of watches; call omni_tables_find() first. */
Oid
omni_watch_owner(void)
{
	return omni_watch_table.owner;
}

/*
 * In a backend: lock the table of watches until the end of the transaction, so that nobody
 * else sets or ends one.
 */
void
omni_watch_lock(void)
{
	PreventCommandIfReadOnly("UPDATE"); /* lest the lock fail on a standby */
	LockRelationOid(omni_watch_table.oid, ShareRowExclusiveLock);
	omni_check_table(&omni_watch_table);
}

/* Lock the tables for reading.  Never waits: returns false if they are locked. */
bool
omni_watch_try_lock(void)
{
	return ConditionalLockRelationOid(omni_watch_table.oid, AccessShareLock) &&
		ConditionalLockRelationOid(omni_seen_table.oid, AccessShareLock);
}

/*
 * In a backend with the table locked: enable or disable the event trigger, as its owner,
 * unless it is already.
 */
void
omni_watch_enable_trigger(bool enable)
{
	int			security_context;
	Oid			user;
	Oid			owner;
	bool		isnull;
	AlterEventTrigStmt *statement = makeNode(AlterEventTrigStmt);

	if (SPI_execute("SELECT t.evtname, t.evtowner, t.evtenabled::pg_catalog.text"
					" FROM pg_catalog.pg_event_trigger AS t, pg_catalog.pg_depend AS d, pg_catalog.pg_extension AS e"
					" WHERE d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_event_trigger'::pg_catalog.regclass"
					"  AND d.objid OPERATOR(pg_catalog.=) t.oid"
					"  AND d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_extension'::pg_catalog.regclass"
					"  AND d.refobjid OPERATOR(pg_catalog.=) e.oid AND e.extname OPERATOR(pg_catalog.=) '" OMNI_EXTENSION "'",
					false, 0) != SPI_OK_SELECT || SPI_processed != 1)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("the event trigger of extension \"%s\" does not exist", OMNI_EXTENSION),
				 errhint("Drop and create the extension.")));
	statement->trigname = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1);
	owner = DatumGetObjectId(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2, &isnull));
	statement->tgenabled = enable ? TRIGGER_FIRES_ALWAYS : TRIGGER_DISABLED;
	if (SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 3)[0] == statement->tgenabled)
		return;
	GetUserIdAndSecContext(&user, &security_context);
	SetUserIdAndSecContext(owner, security_context | SECURITY_LOCAL_USERID_CHANGE);
	AlterEventTrigger(statement);
	SetUserIdAndSecContext(user, security_context);
}

/* Return the OID of the relation that is "count" places after an OID; the highest one if none is. */
Oid
omni_seen_window(Oid after, int count)
{
	Datum		values[2] = {ObjectIdGetDatum(after), Int32GetDatum(count)};

	if (omni_run(&select_window, values, NULL) == 0)
		return OID_MAX;
	return DatumGetObjectId(omni_value(0, 0, OIDOID));
}

/* Return the relations, each an OmniDifference, that are not as Omni was told; by a range of OIDs. */
List *
omni_seen_differences(const OmniWatch *watch, Oid after, Oid to)
{
	Datum		values[4] = {
		UUIDPGetDatum(&watch->id), ObjectIdGetDatum(after), ObjectIdGetDatum(to),
		PointerGetDatum(watch->schemas)
	};
	int			count = (int) omni_run(&select_differences, values, watch->schemas == NULL ? "   n" : NULL);
	List	   *result = NIL;

	for (int i = 0; i < count; i++)
	{
		OmniDifference *difference = palloc0(sizeof(OmniDifference));

		difference->schema = copy_text(i, 0);
		difference->relation = copy_text(i, 1);
		difference->leaf = DatumGetBool(omni_value(i, 2, BOOLOID));
		difference->now.columns = copy_array(i, 3);
		difference->now.types = copy_array(i, 4);
		difference->now.readers = copy_array(i, 5);
		difference->seen.columns = copy_array(i, 6);
		difference->seen.types = copy_array(i, 7);
		difference->seen.readers = copy_array(i, 8);
		difference->known = difference->seen.columns != NULL && difference->seen.types != NULL &&
			difference->seen.readers != NULL;
		if (difference->known)
			omni_difference_find(difference);
		result = lappend(result, difference);
	}
	return result;
}

/*
 * Return relations that Omni was told of, each an OmniSeen, in order of their names: "count"
 * of those after one, or the first ones if that is NULL.
 */
List *
omni_seen_relations(const OmniWatch *watch, const OmniSeen *after, int count)
{
	Datum		values[4] = {
		UUIDPGetDatum(&watch->id), CStringGetTextDatum(after != NULL ? after->schema : ""),
		CStringGetTextDatum(after != NULL ? after->relation : ""), Int32GetDatum(count)
	};
	List	   *result = NIL;

	count = (int) omni_run(&select_relations, values, NULL);
	for (int i = 0; i < count; i++)
	{
		OmniSeen   *seen = palloc(sizeof(OmniSeen));

		seen->schema = copy_text(i, 0);
		seen->relation = copy_text(i, 1);
		seen->leaf = DatumGetBool(omni_value(i, 2, BOOLOID));
		seen->gone = DatumGetBool(omni_value(i, 3, BOOLOID));
		result = lappend(result, seen);
	}
	return result;
}

/* Count the relations that Omni was told of, and those of them that no longer exist. */
void
omni_seen_count(const OmniWatch *watch, int *relations, int *gone)
{
	List	   *list = omni_seen_relations(watch, NULL, PG_INT32_MAX);
	ListCell   *cell;

	*relations = list_length(list);
	*gone = 0;
	foreach(cell, list)
	{
		OmniSeen   *seen = lfirst(cell);

		if (seen->gone && !seen->leaf)
			(*gone)++;
	}
}

/* In a backend: begin the memory of a watch. */
void
omni_seen_begin(const OmniWatch *watch)
{
	ArrayType  *none = construct_empty_array(TEXTOID);
	OmniShape	empty = {none, none, none};

	insert_relation(watch, "", "", false, &empty);
}

/* Remember a relation as it is, or with its additions only. */
void
omni_seen_remember(const OmniWatch *watch, const OmniDifference *difference, const OmniShape *shape)
{
	Datum		values[7] = {
		UUIDPGetDatum(&watch->id), CStringGetTextDatum(difference->schema),
		CStringGetTextDatum(difference->relation), BoolGetDatum(difference->leaf),
		PointerGetDatum(shape->columns), PointerGetDatum(shape->types), PointerGetDatum(shape->readers)
	};

	if (!difference->known)
		insert_relation(watch, difference->schema, difference->relation, difference->leaf, shape);
	else
		(void) omni_run(&update_relation, values, NULL);
}

static void
insert_relation(const OmniWatch *watch, const char *schema, const char *relation, bool leaf,
				const OmniShape *shape)
{
	OmniRowValues row = {0};
	OmniWrite	write;

	omni_set(&row, OMNI_SEEN_watch, UUIDPGetDatum(&watch->id));
	omni_set(&row, OMNI_SEEN_schema, CStringGetTextDatum(schema));
	omni_set(&row, OMNI_SEEN_relation, CStringGetTextDatum(relation));
	omni_set(&row, OMNI_SEEN_leaf, BoolGetDatum(leaf));
	omni_set(&row, OMNI_SEEN_columns, PointerGetDatum(shape->columns));
	omni_set(&row, OMNI_SEEN_types, PointerGetDatum(shape->types));
	omni_set(&row, OMNI_SEEN_readers, PointerGetDatum(shape->readers));
	omni_write_begin(&write, &omni_seen_table, NULL);
	omni_write_insert(&write, &row);
	omni_write_end(&write);
}

/* Forget a relation. */
void
omni_seen_forget(const OmniWatch *watch, const OmniSeen *relation)
{
	Datum		values[3] = {
		UUIDPGetDatum(&watch->id), CStringGetTextDatum(relation->schema),
		CStringGetTextDatum(relation->relation)
	};

	(void) omni_run(&delete_relation, values, NULL);
}

/* Delete the memory of a watch. */
void
omni_seen_forget_all(const OmniWatch *watch)
{
	Datum		values[1] = {UUIDPGetDatum(&watch->id)};

	(void) omni_run(&delete_memory, values, NULL);
}
