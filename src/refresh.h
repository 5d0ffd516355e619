/*-------------------------------------------------------------------------
 *
 * refresh.h
 *		What the SQL-callable functions share.  See refresh.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_REFRESH_FUNCTIONS_H
#define OMNI_REFRESH_FUNCTIONS_H

#include "job.h"

extern void omni_job_init(OmniJob *job, const char *origin);
extern bool omni_may_request(const OmniJob *job, OmniError *error);
extern Datum omni_queue_job(OmniJob *job);
extern bool omni_in_recovery(OmniError *error);

#endif							/* OMNI_REFRESH_FUNCTIONS_H */
