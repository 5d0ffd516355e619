/*-------------------------------------------------------------------------
 *
 * attempt.c
 *		How the worker carries out a job that it has in hand: an attempt begins, is sent,
 *		and what became of it is written down.
 *
 * All jobs whose attempts begin in a turn of the loop share one transaction and so one
 * flush of the WAL, and all whose answers have come share another.  If that fails, each
 * gets one of its own, so that nobody suffers for another one's error.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "clock.h"
#include "compat.h"
#include "job.h"
#include "omni_refresh.h"
#include "option.h"
#include "rate.h"
#include "call.h"
#include "setting.h"
#include "work.h"

/* All in ms */
#define BACKOFF_FIRST		1000	/* before a second attempt at most, then
									 * doubled */
#define BACKOFF_MAX			(5 * 60 * 1000)
#define SHORTEST_ATTEMPT	100 /* no attempt with less time than that */

/* A job that Omni has accepted is asked about for the first time after so many ms ... */
#define FOLLOW_FIRST		2000
#define FOLLOW_LONGEST		30000	/* ... later not less often than that ... */
#define FOLLOW_EARLY		30000	/* ... and may be unknown to it for so
									 * long */

static bool is_about_resources(int sqlstate);
static bool is_late(OmniWork *work);
static bool choose(OmniWork *work);
static bool begin(void *only);
static bool is_lookup(const OmniWork *only);
static void lock_rows(OmniWork *only);
static void begin_one(OmniWork *work);
static void refuse(OmniWork *work);
static bool find_target(OmniWork *work, OmniError *error);
static void begun(OmniWork *work);
static void send_request(OmniWork *work);
static void record_later(OmniWork *work, OmniTransacted result, const OmniError *why);
static void finished(OmniWork *work);
static bool record(void *only);
static void decide(OmniWork *work);
static void consider_next_question(OmniWork *work);
static const char *looked_up(OmniWork *work);
static bool is_probe(OmniWork *work);
static void tell_probed(OmniWork *work, const OmniAnswer *answer);
static void consider_retry(OmniWork *work);
static void keep_telling_error(OmniWork *work, const OmniAnswer *answer);
static void withdraw(OmniWork *work);
static void settle(OmniWork *work, const char *status, const OmniError *error);
static void tell(OmniWork *work, int64 job_id, const OmniError *error);
static bool is_wanted(void *work);

/*
 * Writes down the attempts that should begin, in one transaction.  If that fails,
 * each gets one of its own, so that nobody suffers for another one's error.
 * Returns false if it must be tried again.
 */
bool
omni_attempts_begin(void)
{
	dlist_mutable_iter iter;
	OmniError	error;
	OmniTransacted result = COMMITTED;
	int			count = 0;

	dlist_foreach_modify(iter, &omni_works)
	{
		if (choose(dlist_container(OmniWork, node, iter.cur)))
			count++;
	}
	if (count > 0)
		result = omni_transact(begin, NULL, true, &error);

	dlist_foreach_modify(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);
		OmniTransacted own = result;

		if (!work->beginning)
			continue;
		if ((own == FAILED && count > 1) || (own == NOT_NOW && work->lookup))
			own = omni_transact(begin, work, true, &error);

		if (work->class != OMNI_RATE_CALL && (own == NOT_NOW || (own == FAILED && is_about_resources(error.sqlstate))))
		{
			omni_work_end(work);	/* it stays in the queue */
			omni_claim_pause(own == NOT_NOW ? RETRY_DELAY : RETRY_DELAY_MAX / 10);
			continue;
		}
		if (own == NOT_NOW && is_late(work))
		{
			omni_error_set(&error, ERRCODE_LOCK_NOT_AVAILABLE,
						   "could not write down the request in time");
			omni_error_detail(&error, "Another session holds a lock on the tables of omni_refresh.%s",
							  work->step == NEW ? "  Nothing was sent." : "");
			omni_error_hint(&error, "Look for it in pg_locks.");
			own = FAILED;
		}

		if (own == COMMITTED)
			begun(work);
		else if (own == FAILED && work->call != NULL && work->step == NEW)
		{
			/* an earlier worker's job, which may have been sent, is there */
			if (work->call->job_id != 0)
				omni_call_lost(work->call, &error);
			tell(work, work->call->job_id, &error);
		}
		else if (own == FAILED)
		{
			settle(work, "failed", &error);
			work->step = ANSWERED;
		}
	}
	return result != NOT_NOW;
}

/* Whether an error is this server's state, and not the job's fault. */
static bool
is_about_resources(int sqlstate)
{
	int			category = ERRCODE_TO_CATEGORY(sqlstate);

	return category == ERRCODE_INSUFFICIENT_RESOURCES ||
		category == ERRCODE_OPERATOR_INTERVENTION || category == ERRCODE_SYSTEM_ERROR;
}

/* Whether an attempt has waited too long for our tables. */
static bool
is_late(OmniWork *work)
{
	int64		now = omni_clock();

	return now >= work->deadline ||
		now - (work->step == NEW ? work->taken_at : work->run_at) > OMNI_MS(LOCK_PATIENCE);
}

/* Decides whether an attempt should begin in this turn, or never. */
static bool
choose(OmniWork *work)
{
	work->beginning = false;
	if (omni_work_is_forsaken(work))
	{
		if (work->step == NEW)
			omni_work_end(work);	/* nothing is written */
		else if (work->step == PENDING)
			withdraw(work);
		return false;
	}

	work->beginning = work->step == NEW || (work->step == PENDING && work->run_at <= omni_clock());
	return work->beginning;
}

/* The body of that transaction, for one job, or for all if only is NULL. */
static bool
begin(void *only)
{
	dlist_iter	iter;

	if (!omni_tables_find())
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("extension \"%s\" does not exist any more", OMNI_EXTENSION)));
	if (!is_lookup(only))
	{
		if (!omni_tables_lock())
			return false;
		omni_claim_settle();
		lock_rows(only);
	}
	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		if (work->beginning && (only == NULL || only == work))
			begin_one(work);
	}
	return true;
}

/* Whether a transaction is for a look-up only, which is not written down: it needs no locks. */
static bool
is_lookup(const OmniWork *only)
{
	return only != NULL && only->lookup;
}

/* Locks the rows of the jobs that are to begin, and are queued or have begun before. */
static void
lock_rows(OmniWork *only)
{
	List	   *works = NIL;
	ListCell   *cell;
	int64	   *ids;
	OmniRow    *rows;
	dlist_iter	iter;

	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		work->row = OMNI_ROW_OURS;
		if (work->beginning && !work->lookup && work->class != OMNI_RATE_POLL && (only == NULL || only == work) &&
			(work->class == OMNI_RATE_JOB || work->step == PENDING))
			works = lappend(works, work);
	}
	if (works == NIL)
		return;

	ids = palloc(list_length(works) * sizeof(int64));
	foreach(cell, works)
		ids[foreach_current_index(cell)] = ((OmniWork *) lfirst(cell))->job.id;
	rows = omni_job_lock(ids, list_length(works));
	foreach(cell, works)
		((OmniWork *) lfirst(cell))->row = rows[foreach_current_index(cell)];
}

/*
 * Writes down that an attempt begins, or why not.  What that means for the job is
 * decided here but takes effect in begun(), after the commit.
 */
static void
begin_one(OmniWork *work)
{
	int64		now = omni_clock();
	OmniError	error;
	int64		when;
	bool		blocked;

	if (work->step == NEW && work->class == OMNI_RATE_CALL)
		work->job.id = 0;		/* this may be the second try */
	omni_attempt_forget(work);
	work->settled = false;
	work->delayed_until = 0;

	if (work->row != OMNI_ROW_OURS)
		return;
	if (work->class != OMNI_RATE_CALL)
	{
		work->delayed_until = omni_claim_held_until(work);	/* set just now, by
															 * others of its kind */
		if (work->delayed_until != 0)
			return;
	}
	if (work->class == OMNI_RATE_JOB && work->job.attempts > 0)
		work->may_have_arrived = omni_job_may_have_arrived(work->job.id);
	if (work->step == NEW && work->class == OMNI_RATE_CALL && work->call->job_id != 0)
	{
		/* it was an earlier worker's, and is settled now */
		work->job.id = work->call->job_id;
		omni_call_lost(work->call, &error);
		settle(work, "unknown", &error);
		return;
	}
	if (!find_target(work, &error))
	{
		settle(work, "failed", &error);
		if (work->class != OMNI_RATE_CALL && work->target.key_file != NULL && now < work->deadline)
		{
			/* the file cannot be read, but may come back */
			work->outcome.quiet = work->class == OMNI_RATE_POLL;
			work->outcome.status = work->outcome.quiet ? "running" : "pending";
			work->outcome.attempt_event = "attempt_failed";
			work->outcome.again = true;
			work->outcome.delay = OMNI_MS(BACKOFF_MAX);
		}
		refuse(work);
		return;
	}

	when = omni_rate_take(work->rate_id, work->class, work->target.rate_limit, &blocked);
	if (when == 0)
	{
		if (work->class != OMNI_RATE_POLL && !work->lookup && !omni_job_begin(&work->job, work->url))
			work->row = OMNI_ROW_GONE;
	}
	else if (when < work->deadline || work->class != OMNI_RATE_CALL)
	{
		work->delayed_until = when;
		if (work->class != OMNI_RATE_POLL && !work->lookup)
			omni_job_delay(&work->job, when - now);
		if (work->class != OMNI_RATE_CALL)
			omni_claim_hold(work, when);
	}
	else if (work->job.attempts > 0)
	{
		error = work->telling;
		settle(work, "failed", &error);
		refuse(work);
	}
	else
	{
		omni_error_set(&error, ERRCODE_INSUFFICIENT_RESOURCES,
					   "the rate limit of server \"%s\" leaves no room for this request before %s",
					   NameStr(work->job.request.server), timestamptz_to_str(GetCurrentTimestamp() + (when - now)));
		omni_error_detail(&error, "That would be after the end of \"omni_refresh.call_timeout\"; the request was not sent.");
		if (blocked)
			omni_error_hint(&error, "Omni has asked for a pause with this key; others may be using it, too.");
		else
			omni_error_hint(&error, "The option \"rate_limit\" of the server allows %d requests a minute with one key, from all databases.",
							work->target.rate_limit);
		settle(work, "canceled", &error);
		refuse(work);
	}
}

/* Writes down that an attempt does not even begin. */
static void
refuse(OmniWork *work)
{
	if (work->class == OMNI_RATE_POLL)
		work->row = omni_job_record(&work->job, &work->outcome);
	else if (!work->lookup)
		omni_job_refuse(&work->job, &work->outcome);
}

/*
 * Finds out where the request goes, in the committed view.  The caller of a call has
 * seen server and mapping, and that he may use them: if we do not, his transaction is
 * not committed, or another one just was.
 */
static bool
find_target(OmniWork *work, OmniError *error)
{
	OmniRequest *request = &work->job.request;
	MemoryContext context = MemoryContextSwitchTo(work->attempt);
	char	   *rolename;
	bool		found;

	rolename = GetUserNameFromId(request->role, true);
	found = rolename != NULL && strcmp(rolename, NameStr(request->requested_by)) == 0;
	if (!found)
	{
		/* a new namesake must not lend its key */
		omni_error_set(error, ERRCODE_UNDEFINED_OBJECT,
					   "role \"%s\" was dropped or renamed", NameStr(request->requested_by));
		if (work->class == OMNI_RATE_CALL)
			omni_error_hint(error, "If this transaction has created or renamed it, commit first.");
	}
	else if (!(found = omni_target_find(NameStr(request->server), request->role, &work->target, error)) &&
			 work->class == OMNI_RATE_CALL)
	{
		char	   *why = pstrdup(error->message);

		omni_error_set(error, ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
					   "the background worker may not use server \"%s\" on behalf of \"%s\"",
					   NameStr(request->server), NameStr(request->requested_by));
		omni_error_detail(error, "It sees only what is committed: %s.", why);
		omni_error_hint(error, "If this transaction has created or granted what is missing, commit first.");
	}
	else if (found && (found = omni_target_read_key(&work->target, error)))
	{
		work->rate_id = omni_rate_id(omni_api_host(work->target.base_url, false), work->target.key);
		work->url = work->lookup ? omni_api_lookup_url(work->target.base_url, looked_up(work)) :
			work->class == OMNI_RATE_POLL ? omni_api_follow_url(work->target.base_url, &work->job.job_id) :
			omni_api_job_url(work->target.base_url, &work->job.request);
	}
	MemoryContextSwitchTo(context);
	return found;
}

/* What begin_one() did is committed. */
static void
begun(OmniWork *work)
{
	if (!work->lookup)
		omni_claim_settled();
	work->beginning = false;
	if (work->call != NULL)
		work->call->job_id = work->job.id;

	if (work->row != OMNI_ROW_OURS && work->call == NULL)
	{
		/* somebody has changed it meanwhile, or is about to */
		omni_claim_by(omni_clock() + OMNI_MS(RETRY_DELAY));
		omni_work_end(work);
	}
	else if (work->row == OMNI_ROW_LOCKED && omni_clock() < work->deadline)
		work->run_at = omni_clock() + OMNI_MS(RETRY_DELAY);
	else if (work->row == OMNI_ROW_LOCKED)
	{
		OmniError	error;

		omni_error_set(&error, ERRCODE_LOCK_NOT_AVAILABLE,
					   "another session holds a lock on the row of job " INT64_FORMAT, work->job.id);
		omni_error_detail(&error, "The request is not sent again.");
		omni_error_hint(&error, "Look for a transaction that is open and has canceled the job.");
		settle(work, "failed", &error);
		work->step = ANSWERED;
	}
	else if (work->row == OMNI_ROW_GONE)
	{
		OmniError	error;

		omni_error_set(&error, ERRCODE_NO_DATA_FOUND,
					   "job " INT64_FORMAT " was deleted or ended by another session before it was sent", work->job.id);
		tell(work, work->job.id, &error);
	}
	else if (work->settled)
		finished(work);
	else if (work->delayed_until != 0 && work->class != OMNI_RATE_CALL)
	{
		omni_claim_by(work->delayed_until);
		omni_work_end(work);
	}
	else if (work->delayed_until != 0)
	{
		work->run_at = work->delayed_until;
		work->step = PENDING;
	}
	else
	{
		if (work->class != OMNI_RATE_POLL)
			work->job.attempts++;
		work->step = SENDING;
		if (work->class == OMNI_RATE_JOB)
			omni_claim_sent(work->job.merge_key);
	}
}

/* Sends the requests of the attempts that have begun. */
void
omni_attempts_send(void)
{
	dlist_iter	iter;

	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		if (work->step == SENDING && work->transfer == NULL)
			send_request(work);
		if (work->step == SENDING && work->transfer != NULL && work->transfer->done)
			work->step = ANSWERED;
	}
}

/* Sends the request of a job; when it comes to that, unless its caller has left. */
static void
send_request(OmniWork *work)
{
	MemoryContext context = CurrentMemoryContext;
	long		left = omni_clock_until(work->deadline);
	OmniHttpRequest request = {
		.method = work->lookup || work->class == OMNI_RATE_POLL ? "GET" : "POST",
		.url = work->url,
		.bearer = work->target.key,
		.probe = work->lookup && work->call->probe,
		.ca_file = work->target.ca_file,
		.proxy = work->target.proxy,
		.connect_timeout = work->target.connect_timeout,
		.timeout = work->class != OMNI_RATE_CALL ? work->target.timeout : Max(Min(work->target.timeout, left), 1),
		.is_wanted = is_wanted,
		.arg = work
	};
	OmniError	error;

	if (omni_work_is_forsaken(work))	/* libcurl may be too old to ask later */
	{
		withdraw(work);
		return;
	}
	PG_TRY();
	{
		MemoryContextSwitchTo(work->attempt);
		request.body = omni_api_job_body(&work->job.request);
		work->transfer = omni_http_start(&request);
	}
	PG_CATCH();
	{
		omni_error_catch(&error, context);
		settle(work, "failed", &error);
		work->step = ANSWERED;
	}
	PG_END_TRY();
	MemoryContextSwitchTo(context);
}

/*
 * Writes down what became of attempts, in one transaction for all whose answers
 * have come meanwhile.  If that fails, each gets one of its own.
 */
void
omni_attempts_record(void)
{
	dlist_mutable_iter iter;
	OmniError	error;
	OmniTransacted result = COMMITTED;
	int			count = 0;

	dlist_foreach_modify(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		work->recording = work->step == ANSWERED && work->write_at <= omni_clock();
		if (work->recording)
			count++;
	}
	if (count > 0)
		result = omni_transact(record, NULL, false, &error);

	dlist_foreach_modify(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);
		OmniTransacted own = result;

		if (!work->recording)
			continue;
		if ((own == FAILED && count > 1) || (own == NOT_NOW && work->lookup))
			own = omni_transact(record, work, false, &error);
		work->recording = false;
		if (own == COMMITTED && work->row != OMNI_ROW_LOCKED)
			finished(work);
		else
		{
			if (own == COMMITTED)
				own = NOT_NOW;
			record_later(work, own, &error);
		}
	}
}

/*
 * The outcome of a job could not be written: the job stays in our hands and is not
 * sent again until it is.
 */
static void
record_later(OmniWork *work, OmniTransacted result, const OmniError *why)
{
	OmniError	error;
	int			delay;

	if (result == NOT_NOW)
		omni_error_set(&error, ERRCODE_LOCK_NOT_AVAILABLE,
					   work->row == OMNI_ROW_LOCKED ? "another session holds a lock on its row" :
					   "another session holds a lock on the tables of omni_refresh");
	else
		error = *why;
	if (work->write_failures == 0)
		ereport(LOG,
				(errcode(error.sqlstate),
				 errmsg("could not write down the outcome of job " INT64_FORMAT ", will try again: %s",
						work->job.id, error.message)));
	delay = result == NOT_NOW ? RETRY_DELAY :
		Min(RETRY_DELAY << Min(work->write_failures, 10), RETRY_DELAY_MAX);
	work->write_at = omni_clock() + OMNI_MS(delay);
	work->write_failures++;
	if (work->segment != NULL && omni_clock() >= work->deadline)
	{
		OmniError	late;

		omni_error_set(&late, error.sqlstate,
					   "could not write down the outcome of job " INT64_FORMAT ": %s",
					   work->job.id, error.message);
		omni_error_hint(&late, "It will be in the row of the job as soon as possible.");
		omni_call_finish(work->segment, work->job.id, &late);
		work->segment = NULL;
	}
}

/*
 * The outcome is committed: tells the caller of a job that is at its end and lets go
 * of it.
 */
static void
finished(OmniWork *work)
{
	if (work->class == OMNI_RATE_CALL && work->outcome.again && strcmp(work->outcome.status, "pending") == 0)
	{
		work->run_at = omni_clock() + work->outcome.delay;
		work->write_at = 0;
		work->write_failures = 0;
		work->step = PENDING;
		return;
	}
	omni_claim_finished(work);
	tell(work, work->job.id, work->outcome.job_error != NULL ? work->outcome.job_error : &work->outcome.error);
}

/* The body of that transaction, for one job, or for all if only is NULL. */
static bool
record(void *only)
{
	dlist_iter	iter;
	bool		exists = omni_tables_find();	/* else the log was dropped
												 * with the extension */

	if (exists && !is_lookup(only) && !omni_tables_lock())
		return false;
	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		if (!work->recording || (only != NULL && only != work))
			continue;
		decide(work);
		work->row = exists && !work->lookup ? omni_job_record(&work->job, &work->outcome) : OMNI_ROW_OURS;
	}
	return true;
}

/* Finds out, once, what the answer to an attempt means for its job. */
static void
decide(OmniWork *work)
{
	const OmniAnswer *answer = work->transfer != NULL ? &work->transfer->answer : NULL;
	OmniOutcome *outcome = &work->outcome;

	if (!work->settled && answer->withdrawn)
		withdraw(work);
	if (work->settled)
		return;

	work->settled = true;
	if (work->lookup)
	{
		if (is_probe(work))
			omni_api_probe_outcome(&work->job.request, work->target.key, answer, outcome);
		else
			omni_api_lookup_outcome(&work->job.request, work->target.key, answer, outcome);
		consider_retry(work);
		keep_telling_error(work, answer);
		tell_probed(work, answer);
	}
	else if (work->class == OMNI_RATE_POLL)
	{
		if (omni_api_follow_outcome(&work->job.request, work->target.key, answer, outcome))
			outcome->elapsed = 0;	/* of the question, not of the job */
		else
			consider_next_question(work);
	}
	else
	{
		omni_api_job_outcome(&work->job.request, work->target.key, answer, outcome);
		consider_retry(work);
		keep_telling_error(work, answer);
		if (omni_track && outcome->has_job_id && strcmp(outcome->status, "accepted") == 0)
		{
			outcome->status = "running";
			outcome->attempt_event = "accepted";
			outcome->again = true;
			outcome->delay = OMNI_MS(FOLLOW_FIRST);
		}
	}
}

/*
 * Decides what to do about a job that has not come to its end as far as Omni's
 * answer tells, if there was one.  Soon after it was accepted, Omni may not know it
 * yet.  It is asked about again, but not after a refusal, or after the time that we
 * follow a job: then nobody knows.
 *
 * The time to the next question is half of what has passed, within limits: as if
 * each were one and a half times as long as the one before.
 */
static void
consider_next_question(OmniWork *work)
{
	OmniOutcome *outcome = &work->outcome;
	int64		passed = Max(omni_earliest_now() - work->job.sent_at, 0) / 1000;
	int64		delay = Min(FOLLOW_FIRST + passed / 2, FOLLOW_LONGEST);
	bool		early = outcome->http_status == 404 && passed < FOLLOW_EARLY;

	outcome->elapsed = 0;
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
		outcome->status = "unknown";
		if (outcome->error.sqlstate == 0)
		{
			omni_error_set(&outcome->error, ERRCODE_TRANSACTION_RESOLUTION_UNKNOWN,
						   "Omni has not finished the job within \"omni_refresh.track_timeout\"");
			omni_error_hint(&outcome->error, "It may go on: look at the model in Omni.");
		}
		return;
	}
	outcome->status = "running";
	outcome->quiet = true;
	outcome->again = true;
	outcome->delay = OMNI_MS(delay);
}

/* What to look up, as its caller has written it. */
static const char *
looked_up(OmniWork *work)
{
	return (char *) work->call + work->call->lookup;
}

/* Whether it is asked how Omni is reached, which takes one attempt. */
static bool
is_probe(OmniWork *work)
{
	return work->lookup && work->segment != NULL && work->call->probe;
}

/* Writes the answer to a look-up where its caller will find it, or how it was reached. */
static void
tell_probed(OmniWork *work, const OmniAnswer *answer)
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
	}
	else if (work->outcome.error.sqlstate == 0)
	{
		call->length = answer->length;
		if (answer->length > 0)
			memcpy((char *) call + call->answer, answer->body, answer->length);
	}
}

/*
 * Decides whether there is another attempt: if it can begin before the end of the
 * call, or of the time that a queued job has.  What is queued is tried again
 * whenever there was no answer.  The wait doubles with each attempt and is drawn
 * by lot, so that those who failed together do not come back together; Retry-After
 * is a floor.
 */
static void
consider_retry(OmniWork *work)
{
	OmniOutcome *outcome = &work->outcome;
	int64		longest = BACKOFF_MAX;
	int64		delay;
	uint32		lot = 0;

	work->may_have_arrived |= outcome->may_have_arrived;
	if (work->may_have_arrived && outcome->attempt_event != NULL)
		outcome->status = "unknown";
	if (!outcome->retryable && !(work->class == OMNI_RATE_JOB && outcome->http_status == 0))
		return;

	if (work->job.attempts < 10)
		longest = Min(BACKOFF_FIRST << (work->job.attempts - 1), BACKOFF_MAX);
	(void) pg_strong_random(&lot, sizeof(lot));
	delay = Max(lot % (longest + 1), Min(outcome->retry_after * INT64CONST(1000), OMNI_MAX_WAIT / 1000));
	if (outcome->slow_down)
		omni_rate_block(work->rate_id, omni_clock() + OMNI_MS(delay));

	if (omni_clock() + OMNI_MS(delay) < work->deadline - OMNI_MS(SHORTEST_ATTEMPT) && !omni_work_is_forsaken(work) &&
		!is_probe(work))
	{
		outcome->status = "pending";
		outcome->again = true;
		outcome->delay = OMNI_MS(delay);
	}
}

/*
 * Keeps the error of the attempt that tells most about why a call fails, and has the
 * caller hear of that one: that a server answered 503, or wants a certificate, says more
 * than that the last attempt, which had only milliseconds left, has timed out.
 */
static void
keep_telling_error(OmniWork *work, const OmniAnswer *answer)
{
	OmniOutcome *outcome = &work->outcome;
	int			weight;

	if (work->class != OMNI_RATE_CALL || outcome->error.sqlstate == 0)
		return;
	if (answer->status != 0)
		weight = 3;
	else if (!answer->timed_out)
		weight = 2;
	else
		weight = answer->elapsed >= OMNI_MS(work->target.timeout) / 2 ? 1 : 0;

	if (weight >= work->telling_weight)
	{
		work->telling = outcome->error;
		work->telling_weight = weight;
	}
	else if (!outcome->again)
		outcome->job_error = &work->telling;
}

/* Ends a job whose caller has left before its attempt was sent. */
static void
withdraw(OmniWork *work)
{
	OmniError	error = work->outcome.error;	/* of the last attempt, if any */

	settle(work, "canceled", &error);
	work->step = ANSWERED;
}

/*
 * Sets an outcome that does not come from Omni.  If it may be at work on an earlier
 * attempt, nobody knows the end.
 */
static void
settle(OmniWork *work, const char *status, const OmniError *error)
{
	memset(&work->outcome, 0, sizeof(work->outcome));
	work->outcome.status = work->may_have_arrived || work->class == OMNI_RATE_POLL ? "unknown" : status;
	work->outcome.error = *error;
	work->settled = true;
}

/* Tells the caller of a job how it ended, and lets go of it. */
static void
tell(OmniWork *work, int64 job_id, const OmniError *error)
{
	if (work->segment != NULL)
		omni_call_finish(work->segment, job_id, error);
	work->segment = NULL;
	omni_work_end(work);
}

/* Forgets an attempt.  What it has of libcurl goes with its memory. */
void
omni_attempt_forget(OmniWork *work)
{
	if (work->target.key != NULL)
		explicit_bzero(work->target.key, strlen(work->target.key));
	memset(&work->target, 0, sizeof(work->target));
	work->transfer = NULL;
	MemoryContextReset(work->attempt);
}

/* The same question, for libcurl's callback. */
static bool
is_wanted(void *work)
{
	return !omni_work_is_forsaken(work);
}
