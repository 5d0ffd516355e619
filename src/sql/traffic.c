/*-------------------------------------------------------------------------
 *
 * traffic.c
 *		omni_refresh_requests_last_minute(): for the view omni_refresh_status, count the
 *		requests that were sent to a server.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"

#include "shared/rate.h"

PG_FUNCTION_INFO_V1(omni_refresh_requests_last_minute);

Datum
omni_refresh_requests_last_minute(PG_FUNCTION_ARGS)
{
	PG_RETURN_INT64(omni_rate_sent_lately(NameStr(*PG_GETARG_NAME(0))));
}
