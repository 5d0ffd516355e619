/*-------------------------------------------------------------------------
 *
 * kind.c
 *		What several kinds of work have in common.  Each kind has a file, kind_*.c.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/timestamp.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/setting.h"
#include "base/status.h"
#include "worker/kind.h"
#include "worker/retry.h"

/* Begin no attempt later than this before the deadline, in ms */
#define SHORTEST_ATTEMPT	100

static void follow(OmniWork *work);


/*
 * Decide whether to back off and try again.  Try again if the next attempt can begin before
 * the deadline, and the outcome is retryable; a queued job also whenever no answer came, and
 * a few times whatever came instead of Omni's answer.
 */
void
omni_kind_consider_retry(OmniWork *work)
{
	OmniOutcome *outcome = &work->outcome;
	int64		delay;
	uint32		lot = 0;

	work->may_have_arrived |= outcome->may_have_arrived;
	if (work->may_have_arrived && outcome->attempt_event != NULL)
		outcome->status = OMNI_NAME_UNKNOWN;
	if (!outcome->retryable &&
		(work->kind->has_caller || (outcome->http_status != 0 && !outcome->few)))
		return;

	(void) pg_strong_random(&lot, sizeof(lot));
	if (outcome->few && !work->kind->has_caller)
	{
		int			failures = work->job.few_failures + 1;

		if (failures >= OMNI_FEW_ATTEMPTS)
			return;
		delay = OMNI_MS(omni_retry_few_delay(failures, lot, outcome->retry_after));
	}
	else
		delay = OMNI_MS(omni_retry_delay(work->job.attempts, lot, outcome->retry_after));
	if (outcome->slow_down)
		omni_rate_block(work->rate_id, omni_clock() + delay);

	if (omni_clock() + delay < work->deadline - OMNI_MS(SHORTEST_ATTEMPT) &&
		!omni_work_is_abandoned(work))
	{
		outcome->status = OMNI_NAME_PENDING;
		outcome->again = true;
		outcome->delay = delay;
	}
}

/*
 * Keep the most telling error of all attempts of a call, for the caller to receive if the
 * call fails: that Omni answered 503, or that its certificate is invalid, tells more than
 * that the last attempt, which had a few milliseconds left, has timed out.
 */
void
omni_kind_keep_telling_error(OmniWork *work, const OmniAnswer *answer)
{
	OmniOutcome *outcome = &work->outcome;
	int			weight;

	if (outcome->error.sqlstate == 0)
		return;
	if (answer->status != 0)
		weight = 3;
	else if (!answer->timed_out)
		weight = 2;
	else
		weight = answer->elapsed >= OMNI_MS(work->target.timeout) / 2 ? 1 : 0;

	if (weight >= work->best_weight)
	{
		work->best_error = outcome->error;
		work->best_weight = weight;
	}
	else if (!outcome->again)
		outcome->job_error = &work->best_error;
}

/* The functions that calls and queued jobs have in common; see OmniWorkKind. */
char *
omni_kind_job_url(const OmniWork *work)
{
	return omni_api_job_url(work->target.base_url, &work->job.request);
}

bool
omni_kind_job_begin(OmniWork *work)
{
	return omni_job_begin(&work->job, work->url);
}

void
omni_kind_job_delay(OmniWork *work, int64 wait)
{
	omni_job_delay(&work->job, wait);
}

void
omni_kind_job_refuse(OmniWork *work)
{
	omni_job_refuse(&work->job, &work->outcome);
}

void
omni_kind_job_judge(OmniWork *work, const OmniAnswer *answer)
{
	omni_api_job_outcome(&work->job.request, work->target.key, answer, &work->outcome);
	OMNI_FAULT_POINT("record: answer read");
	omni_kind_consider_retry(work);
	if (work->kind->has_caller)
		omni_kind_keep_telling_error(work, answer);
	follow(work);
}

/* Have a job polled that Omni has accepted, unless it has no id or "omni_refresh.track" is off. */
static void
follow(OmniWork *work)
{
	OmniOutcome *outcome = &work->outcome;

	if (!omni_track || !outcome->has_job_id || strcmp(outcome->status, OMNI_NAME_ACCEPTED) != 0)
		return;
	outcome->status = OMNI_NAME_RUNNING;
	outcome->attempt_event = OMNI_NAME_ACCEPTED;
	outcome->again = true;
	outcome->delay = OMNI_MS(OMNI_POLL_FIRST);
}
