/*-------------------------------------------------------------------------
 *
 * request.h
 *		What the SQL-callable functions share.  See request.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_REQUEST_H
#define OMNI_REQUEST_H

#include "fmgr.h"

#include "job.h"

extern void omni_job_init(OmniJob *job, const char *origin);
extern void omni_tables_require(void);
extern bool omni_may_request(const OmniJob *job, OmniError *error);
extern bool omni_in_recovery(OmniError *error);
extern Datum omni_queue_job(OmniJob *job);
extern Datum omni_job_form_disabled(const OmniJob *job);
extern int64 omni_job_argument(FunctionCallInfo fcinfo);
extern void omni_job_find(int64 id, OmniJobState *own, OmniJobState *carrier);

#endif							/* OMNI_REQUEST_H */
