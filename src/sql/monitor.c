/*-------------------------------------------------------------------------
 *
 * monitor.c
 *		The SQL-callable function that reads the counters, for the view
 *		omni_refresh_counters.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "fmgr.h"
#include "funcapi.h"
#include "utils/timestamp.h"

#include "shared/counter.h"

PG_FUNCTION_INFO_V1(omni_refresh_get_counters);

/*
 * Return the counters of a server, or with 0 those of all servers without an entry, and the
 * time since when they count.
 */
Datum
omni_refresh_get_counters(PG_FUNCTION_ARGS)
{
	int64		counts[OMNI_COUNTERS];
	TimestampTz since = omni_counters_read(PG_GETARG_OID(0), counts);
	Datum		values[OMNI_COUNTERS + 1];
	bool		isnull[OMNI_COUNTERS + 1] = {false};
	TupleDesc	rowtype;

	if (get_call_result_type(fcinfo, NULL, &rowtype) != TYPEFUNC_COMPOSITE ||
		rowtype->natts != OMNI_COUNTERS + 1)
		elog(ERROR, "unexpected result type of omni_refresh_get_counters()");
	for (int i = 0; i < OMNI_COUNTERS; i++)
		values[i] = Int64GetDatum(counts[i]);
	values[OMNI_COUNT_TIME] = Float8GetDatum(counts[OMNI_COUNT_TIME] / 1000.0);
	values[OMNI_COUNTERS] = TimestampTzGetDatum(since);
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(rowtype, values, isnull)));
}
