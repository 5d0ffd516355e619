/*-------------------------------------------------------------------------
 *
 * kind_lookup.c
 *		Look-ups: questions that sessions wait for, and that have no job.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/clock.h"
#include "worker/kind.h"

static char *url(const OmniWork *work);
static void begun(OmniWork *work);
static void judge(OmniWork *work, const OmniAnswer *answer);
static void reply(OmniWork *work, const OmniAnswer *answer);


const OmniWorkKind omni_lookup_kind = {
	.class = OMNI_RATE_CALL,
	.method = "GET",
	.has_caller = true,
	.url = url,
	.begun = begun,
	.judge = judge
};

/* Return the URL of what to look up, which is in the caller's segment. */
static char *
url(const OmniWork *work)
{
	return omni_api_lookup_url(work->target.base_url, (char *) work->call + work->call->lookup);
}

static void
begun(OmniWork *work)
{
	work->job.attempts++;
}

static void
judge(OmniWork *work, const OmniAnswer *answer)
{
	bool		probe = work->segment != NULL && work->call->probe;

	if (probe)
		omni_api_probe_outcome(&work->job.request, work->target.key, answer, &work->outcome);
	else
		omni_api_lookup_outcome(&work->job.request, work->target.key, answer, &work->outcome);
	omni_kind_consider_retry(work);
	if (work->segment != NULL && work->call->once)
		work->outcome.again = false;
	else
		omni_kind_keep_telling_error(work, answer);
	reply(work, answer);
}

/*
 * Write the answer into the caller's segment; for a probe, how the connection to Omni was
 * made, and whether Omni has the model.
 */
static void
reply(OmniWork *work, const OmniAnswer *answer)
{
	OmniCall   *call = work->call;
	OmniProbe  *probed = &call->probed;

	if (work->segment == NULL)
		return;
	if (call->probe)
	{
		memset(probed, 0, sizeof(*probed));
		probed->begun = true;
		probed->answered = !answer->failed;
		probed->phase = answer->phase;
		probed->http_status = answer->status;
		probed->elapsed = answer->elapsed;
		probed->rate_limit = work->target.rate_limit;
		probed->rate_left = omni_rate_left(work->rate_id, work->target.rate_limit);
		omni_api_copy(probed->address, sizeof(probed->address), answer->address, work->target.key);
		probed->secure = pg_strncasecmp(work->target.base_url, "https:", 6) == 0;
		omni_api_copy(probed->issuer, sizeof(probed->issuer), answer->issuer, work->target.key);
		omni_api_copy(probed->expires, sizeof(probed->expires), answer->expires, work->target.key);
		probed->has_model = work->outcome.error.sqlstate == 0 && call->request.has_model &&
			omni_api_find_model(answer, &call->request.model, work->target.key,
								probed->model, sizeof(probed->model));
	}
	else if (work->outcome.error.sqlstate == 0)
	{
		call->length = answer->length;
		if (answer->length > 0)
			memcpy((char *) call + call->answer, answer->body, answer->length);
	}
}
