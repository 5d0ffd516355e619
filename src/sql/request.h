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

#include "omni/option.h"
#include "store/job.h"

#define OMNI_TOO_LONG_HINT	"For a soft refresh of the whole model, leave out schemas and tables and set hard to false."

extern void omni_job_init(OmniJob *job, const char *origin);
extern void omni_tables_require(void);
extern bool omni_may_request(const OmniJob *job, OmniTarget *target, OmniError *error);
extern bool omni_job_complete(OmniJob *job, OmniError *error);
extern void omni_request_check_length(const OmniRequest *request);
extern bool omni_in_recovery(OmniError *error);
extern Datum omni_queue_job(OmniJob *job);
extern Datum omni_job_form_disabled(const OmniJob *job);
extern int64 omni_job_argument(FunctionCallInfo fcinfo);

/* Who may use a job, apart from the owner of the table */
typedef enum OmniUse
{
	OMNI_USE_MANAGE,			/* its requester */
	OMNI_USE_SEE				/* who called, too */
} OmniUse;

extern void omni_job_find(int64 id, OmniUse use, OmniJobState *own, OmniJobState *carrier);
extern Datum omni_job_result(const OmniJobState *own, const OmniJobState *carrier);
extern bool omni_job_can_be_retried(const OmniJobState *carrier);

#endif							/* OMNI_REQUEST_H */
