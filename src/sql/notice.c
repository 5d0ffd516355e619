/*-------------------------------------------------------------------------
 *
 * notice.c
 *		The event trigger: notice that a transaction may have changed tables or columns.
 *
 * It runs in other people's DDL, so it does next to nothing and raises no error.  It does
 * not find out what has changed: the worker compares the catalogs with what Omni was told.
 * A command that is noticed for nothing costs a comparison in the background.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_class.h"
#include "commands/event_trigger.h"
#include "commands/extension.h"
#include "fmgr.h"
#include "nodes/parsenodes.h"
#include "nodes/primnodes.h"

#include "shared/wakeup.h"

static bool is_harmless(CommandTag tag);
static bool is_temporary(Node *command);
static bool names_temporary(const RangeVar *relation);

PG_FUNCTION_INFO_V1(omni_refresh_notice_ddl);

Datum
omni_refresh_notice_ddl(PG_FUNCTION_ARGS)
{
	EventTriggerData *trigger = (EventTriggerData *) fcinfo->context;

	if (!CALLED_AS_EVENT_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_EVENT_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("omni_refresh_notice_ddl() must be called as an event trigger")));

	/* CREATE EXTENSION itself follows the commands of its script */
	if (!creating_extension && !is_harmless(trigger->tag) && !is_temporary(trigger->parsetree))
		omni_wake_on_change();
	PG_RETURN_NULL();
}

/*
 * Return whether no command with a tag changes what a comparison looks at.  DROP of a type,
 * a function or an operator may remove views and columns by CASCADE, so that it can.
 */
static bool
is_harmless(CommandTag tag)
{
	switch (tag)
	{
		case CMDTAG_ALTER_AGGREGATE:
		case CMDTAG_ALTER_DEFAULT_PRIVILEGES:
		case CMDTAG_ALTER_FUNCTION:
		case CMDTAG_ALTER_INDEX:
		case CMDTAG_ALTER_POLICY:
		case CMDTAG_ALTER_PROCEDURE:
		case CMDTAG_ALTER_PUBLICATION:
		case CMDTAG_ALTER_ROUTINE:
		case CMDTAG_ALTER_SEQUENCE:
		case CMDTAG_ALTER_STATISTICS:
		case CMDTAG_ALTER_SUBSCRIPTION:
		case CMDTAG_ALTER_TRIGGER:
		case CMDTAG_ALTER_USER_MAPPING:
		case CMDTAG_COMMENT:
		case CMDTAG_CREATE_AGGREGATE:
		case CMDTAG_CREATE_FUNCTION:
		case CMDTAG_CREATE_INDEX:
		case CMDTAG_CREATE_POLICY:
		case CMDTAG_CREATE_PROCEDURE:
		case CMDTAG_CREATE_PUBLICATION:
		case CMDTAG_CREATE_ROUTINE:
		case CMDTAG_CREATE_SEQUENCE:
		case CMDTAG_CREATE_STATISTICS:
		case CMDTAG_CREATE_SUBSCRIPTION:
		case CMDTAG_CREATE_TRIGGER:
		case CMDTAG_CREATE_USER_MAPPING:
		case CMDTAG_DROP_INDEX:
		case CMDTAG_DROP_POLICY:
		case CMDTAG_DROP_PUBLICATION:
		case CMDTAG_DROP_STATISTICS:
		case CMDTAG_DROP_SUBSCRIPTION:
		case CMDTAG_DROP_TRIGGER:
		case CMDTAG_DROP_USER_MAPPING:
		case CMDTAG_REFRESH_MATERIALIZED_VIEW:
		case CMDTAG_REINDEX:
		case CMDTAG_SECURITY_LABEL:
			return true;
		default:
			return false;
	}
}

/* Return whether a command creates a temporary object. */
static bool
is_temporary(Node *command)
{
	if (IsA(command, CreateStmt))
		return names_temporary(((CreateStmt *) command)->relation);
	if (IsA(command, CreateTableAsStmt))
		return names_temporary(((CreateTableAsStmt *) command)->into->rel);
	if (IsA(command, ViewStmt))
		return names_temporary(((ViewStmt *) command)->view);
	return false;
}

static bool
names_temporary(const RangeVar *relation)
{
	return relation->relpersistence == RELPERSISTENCE_TEMP;
}
