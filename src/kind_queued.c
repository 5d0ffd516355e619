/*-------------------------------------------------------------------------
 *
 * kind_queued.c
 *		Queued jobs: requests that nobody waits for.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "kind.h"
#include "sent.h"

static void prepare(OmniWork *work);
static char *url(const OmniWork *work);
static bool begin(OmniWork *work);
static void delay(OmniWork *work, int64 wait);
static void refuse(OmniWork *work);
static void begun(OmniWork *work);
static void judge(OmniWork *work, const OmniAnswer *answer);


const OmniWorkKind omni_queued_kind = {
	.class = OMNI_RATE_JOB,
	.method = "POST",
	.has_row = true,
	.has_job = true,
	.resting = "pending",
	.prepare = prepare,
	.url = url,
	.begin = begin,
	.delay = delay,
	.refuse = refuse,
	.begun = begun,
	.judge = judge
};

static void
prepare(OmniWork *work)
{
	if (work->job.attempts > 0)
		work->may_have_arrived = omni_job_may_have_arrived(work->job.id);
}

static char *
url(const OmniWork *work)
{
	return omni_api_job_url(work->target.base_url, &work->job.request);
}

static bool
begin(OmniWork *work)
{
	return omni_job_begin(&work->job, work->url);
}

static void
delay(OmniWork *work, int64 wait)
{
	omni_job_delay(&work->job, wait);
}

static void
refuse(OmniWork *work)
{
	omni_job_refuse(&work->job, &work->outcome);
}

static void
begun(OmniWork *work)
{
	work->job.attempts++;
	omni_sent_note(work->job.merge_key);
}

static void
judge(OmniWork *work, const OmniAnswer *answer)
{
	omni_api_job_outcome(&work->job.request, work->target.key, answer, &work->outcome);
	omni_kind_consider_retry(work);
	omni_kind_follow(work);
}
