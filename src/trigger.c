/*-------------------------------------------------------------------------
 *
 * trigger.c
 *		omni_refresh_keep_out(): the trigger that keeps logical replication out of the
 *		extension's tables.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "commands/trigger.h"
#include "fmgr.h"

PG_FUNCTION_INFO_V1(omni_refresh_keep_out);

/*
 * BEFORE ROW trigger: skip the INSERT, UPDATE or DELETE.  On the extension's tables it is
 * enabled as a replica trigger, so that it fires for changes by logical replication only.
 */
Datum
omni_refresh_keep_out(PG_FUNCTION_ARGS)
{
	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("omni_refresh_keep_out() must be called as a trigger")));
	PG_RETURN_POINTER(NULL);
}
