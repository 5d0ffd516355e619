/*-------------------------------------------------------------------------
 *
 * kind_call.c
 *		Calls: requests whose sessions wait for Omni's answer.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/status.h"
#include "worker/kind.h"

static void prepare(OmniWork *work);
static void begun(OmniWork *work);


const OmniWorkKind omni_call_kind = {
	.class = OMNI_RATE_CALL,
	.method = "POST",
	.has_caller = true,
	.has_row = true,
	.has_job = true,
	.prepare = prepare,
	.url = omni_kind_job_url,
	.begin = omni_kind_job_begin,
	.delay = omni_kind_job_delay,
	.refuse = omni_kind_job_refuse,
	.begun = begun,
	.judge = omni_kind_job_judge
};

/*
 * Before the first attempt: if the call has a job already, an earlier worker has taken the
 * call and ended.  It may have sent the request, so conclude the call instead.
 */
static void
prepare(OmniWork *work)
{
	OmniError	error;

	if (work->step != NEW)
		return;
	work->job.id = work->call->job_id;
	if (work->job.id != 0)
	{
		omni_call_lost(work->call, &error);
		omni_work_conclude(work, OMNI_NAME_UNKNOWN, &error);
	}
}

static void
begun(OmniWork *work)
{
	work->job.attempts++;
}
