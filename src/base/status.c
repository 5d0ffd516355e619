/*-------------------------------------------------------------------------
 *
 * status.c
 *		The statuses of a job: from a name to a constant and back.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/status.h"

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

/* Find a status by its name, and set *status.  Returns false if there is none. */
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

/* Return whether a job with a status has ended. */
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
