/*-------------------------------------------------------------------------
 *
 * kind_queued.c
 *		Queued jobs: jobs that no session waits for.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/setting.h"
#include "base/status.h"
#include "worker/kind.h"
#include "worker/sent.h"

static void prepare(OmniWork *work);
static void begun(OmniWork *work);
static void judge(OmniWork *work, const OmniAnswer *answer);


const OmniWorkKind omni_queued_kind = {
	.class = OMNI_RATE_JOB,
	.method = "POST",
	.has_row = true,
	.has_job = true,
	.resting = OMNI_NAME_PENDING,
	.prepare = prepare,
	.url = omni_kind_job_url,
	.begin = omni_kind_job_begin,
	.delay = omni_kind_job_delay,
	.refuse = omni_kind_job_refuse,
	.begun = begun,
	.judge = judge
};

static void
prepare(OmniWork *work)
{
	work->may_have_arrived = work->job.may_have_arrived;
}

static void
begun(OmniWork *work)
{
	if (omni_job_is_first_reset(&work->job))
		work->deadline = omni_clock() + omni_retry_for * USECS_PER_SEC;
	work->job.attempts++;
	omni_sent_note(work->job.merge_key);
}

static void
judge(OmniWork *work, const OmniAnswer *answer)
{
	omni_api_job_outcome(&work->job.request, work->target.key, answer, &work->outcome);
	OMNI_FAULT_POINT("record: answer read");
	omni_kind_consider_retry(work);
	omni_kind_follow(work);
}
