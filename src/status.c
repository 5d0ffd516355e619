/*-------------------------------------------------------------------------
 *
 * status.c
 *		The statuses of a job: from a name to a constant and back.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "status.h"

#define STATUS_ENTRY(name) [OMNI_STATUS_ ## name] = OMNI_NAME_ ## name,

static const char *const names[] = {
	OMNI_STATUSES_UNFINISHED(STATUS_ENTRY,)
	OMNI_STATUSES_FINAL(STATUS_ENTRY,)
};

const char *
omni_status_name(OmniStatus status)
{
	return names[status];
}

/* Sets *status; returns false if no status has that name. */
bool
omni_status_find(const char *name, OmniStatus *status)
{
	for (int i = 0; i < lengthof(names); i++)
	{
		if (strcmp(names[i], name) == 0)
		{
			*status = (OmniStatus) i;
			return true;
		}
	}
	return false;
}

/* Whether a job of that status has come to its end. */
bool
omni_status_is_final(OmniStatus status)
{
	return status >= OMNI_STATUS_COMPLETED;
}

bool
omni_status_is_pending(OmniStatus status)
{
	return status == OMNI_STATUS_PENDING;
}
