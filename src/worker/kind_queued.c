/*-------------------------------------------------------------------------
 *
 * kind_queued.c
 *		Queued jobs: jobs that no session waits for.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/clock.h"
#include "base/setting.h"
#include "base/status.h"
#include "worker/kind.h"
#include "worker/sent.h"

static void prepare(OmniWork *work);
static void begun(OmniWork *work);


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
	.judge = omni_kind_job_judge
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
