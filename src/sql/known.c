/*-------------------------------------------------------------------------
 *
 * known.c
 *		Find out which schemas of this database Omni does not know.
 *
 * Omni's names have a catalog in front, as in warehouse.reporting, and may differ in case.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"

#include "omni/api.h"
#include "sql/known.h"

/*
 * The schemas of this database that have a table or view of a user's, and whether $1 names
 * them: with a catalog or without, and either may have dots in its name.  Case is ignored by the
 * rules of C, since those of the database may be Turkish.
 */
static const char *const select_schemas =
"SELECT nspname::pg_catalog.text, pg_catalog.lower(nspname::pg_catalog.text COLLATE pg_catalog.\"C\")"
"  OPERATOR(pg_catalog.=) ANY ("
"    SELECT pg_catalog.lower(form COLLATE pg_catalog.\"C\")"
"    FROM pg_catalog.unnest($1) AS name, LATERAL (VALUES (name),"
"      (pg_catalog.regexp_replace(name, '^[^.]*[.]', '')),"
"      (pg_catalog.regexp_replace(name, '^.*[.]', ''))) AS forms (form))"
" FROM pg_catalog.pg_namespace AS n"
" WHERE NOT pg_catalog.starts_with(nspname::pg_catalog.text, 'pg_')"
"  AND nspname OPERATOR(pg_catalog.<>) 'information_schema'"
"  AND EXISTS (SELECT FROM pg_catalog.pg_class AS c"
"    WHERE relnamespace OPERATOR(pg_catalog.=) n.oid"
"      AND relkind OPERATOR(pg_catalog.=) ANY ('{r, p, v, m, f}')"
"      AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend"
"        WHERE classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_class'::pg_catalog.regclass"
"          AND objid OPERATOR(pg_catalog.=) c.oid AND deptype OPERATOR(pg_catalog.=) 'e'))"
" ORDER BY nspname";

static ArrayType *read_names(const char *answer, Size length);

/*
 * Parse the answer to omni_api_schemas_lookup() and set *unknown to the names, palloc'd, of
 * the schemas that Omni does not know, and *all to the number of schemas it should know: those
 * with a table or view that users have made.  Returns false if the answer is malformed.
 */
bool
omni_known_compare(const char *answer, Size length, List **unknown, int *all)
{
	MemoryContext context = CurrentMemoryContext;
	ArrayType  *names = read_names(answer, length);
	Oid			argtypes[1] = {TEXTARRAYOID};
	Datum		values[1] = {PointerGetDatum(names)};

	if (names == NULL)
		return false;
	*unknown = NIL;
	SPI_connect();
	if (SPI_execute_with_args(select_schemas, 1, argtypes, values, NULL, true, 0) != SPI_OK_SELECT)
		elog(ERROR, "could not read the schemas");
	*all = (int) SPI_processed;
	for (int i = 0; i < *all; i++)
	{
		HeapTuple	row = SPI_tuptable->vals[i];
		bool		isnull;

		if (!DatumGetBool(SPI_getbinval(row, SPI_tuptable->tupdesc, 2, &isnull)))
		{
			char	   *name = SPI_getvalue(row, SPI_tuptable->tupdesc, 1);
			MemoryContext spi_context = MemoryContextSwitchTo(context);

			*unknown = lappend(*unknown, pstrdup(name));
			MemoryContextSwitchTo(spi_context);
		}
	}
	SPI_finish();
	return true;
}

/* Return the names in an answer as a text[], or NULL if the answer is malformed. */
static ArrayType *
read_names(const char *answer, Size length)
{
	char	   *why;
	Jsonb	   *json = omni_api_json(answer, length, &why);
	JsonbValue	schemas;
	ArrayBuildState *names = initArrayResult(TEXTOID, CurrentMemoryContext, false);

	if (json == NULL || !JB_ROOT_IS_OBJECT(json) ||
		getKeyJsonValueFromContainer(&json->root, "schemas", strlen("schemas"), &schemas) == NULL ||
		schemas.type != jbvBinary || !JsonContainerIsArray(schemas.val.binary.data))
		return NULL;
	for (uint32 i = 0; i < JsonContainerSize(schemas.val.binary.data); i++)
	{
		JsonbValue *name = getIthJsonbValueFromContainer(schemas.val.binary.data, i);

		if (name->type != jbvString)
			return NULL;
		names = accumArrayResult(names,
								 PointerGetDatum(cstring_to_text_with_len(name->val.string.val, name->val.string.len)),
								 false, TEXTOID, CurrentMemoryContext);
	}
	return DatumGetArrayTypeP(makeArrayResult(names, CurrentMemoryContext));
}
