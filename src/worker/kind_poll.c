/*-------------------------------------------------------------------------
 *
 * kind_poll.c
 *		Polls: requests that ask Omni how far a running job has come.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/timestamp.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/status.h"
#include "worker/kind.h"
#include "worker/retry.h"

static void prepare(OmniWork *work);
static char *url(const OmniWork *work);
static void refuse(OmniWork *work);
static void judge(OmniWork *work, const OmniAnswer *answer);
static void consider_next_poll(OmniWork *work);


const OmniWorkKind omni_poll_kind = {
	.class = OMNI_RATE_POLL,
	.method = "GET",
	.has_job = true,
	.resting = OMNI_NAME_RUNNING,
	.prepare = prepare,
	.url = url,
	.refuse = refuse,
	.judge = judge
};

/* Omni has accepted the job, so its end is unknown unless Omni reports it. */
static void
prepare(OmniWork *work)
{
	work->may_have_arrived = true;
}

static char *
url(const OmniWork *work)
{
	return omni_api_poll_url(work->target.base_url, &work->job.job_id);
}

static void
refuse(OmniWork *work)
{
	work->row = omni_job_record(&work->job, &work->outcome);
}

static void
judge(OmniWork *work, const OmniAnswer *answer)
{
	if (!omni_api_poll_outcome(&work->job.request, work->target.key, answer, &work->outcome))
		consider_next_poll(work);
	OMNI_FAULT_POINT("record: answer read");
	work->outcome.elapsed = 0;	/* the poll's, not the job's */
}

/*
 * Decide what to do about a job that has not ended as far as is known: Omni has answered so,
 * or not answered.  Poll it again, unless Omni has refused the poll or track_timeout is over:
 * then its end is unknown.  Ignore a 404 shortly after Omni has accepted the job, since Omni
 * may not know it yet.
 */
static void
consider_next_poll(OmniWork *work)
{
	OmniOutcome *outcome = &work->outcome;
	int64		passed = Max(omni_earliest_now() - work->job.sent_at, 0) / 1000;
	int64		delay = omni_poll_delay(passed);
	bool		early = outcome->http_status == 404 && passed < OMNI_POLL_EARLY;

	outcome->attempt_event = NULL;
	if (outcome->slow_down)
	{
		delay = Max(delay, Min(outcome->retry_after * INT64CONST(1000), OMNI_MAX_WAIT / 1000));
		omni_rate_block(work->rate_id, omni_clock() + OMNI_MS(delay));
	}
	if (early)
		outcome->error.sqlstate = 0;
	else if (omni_clock() >= work->deadline ||
			 (outcome->http_status >= 400 && !outcome->retryable))
	{
		outcome->status = OMNI_NAME_UNKNOWN;
		if (outcome->error.sqlstate == 0)
		{
			omni_error_set(&outcome->error, ERRCODE_TRANSACTION_RESOLUTION_UNKNOWN,
						   "Omni has not finished the job within \"omni_refresh.track_timeout\"");
			omni_error_hint(&outcome->error, "The job may go on: look at the model in Omni.");
		}
		return;
	}
	outcome->status = OMNI_NAME_RUNNING;
	outcome->quiet = true;
	outcome->again = true;
	outcome->delay = OMNI_MS(delay);
}
