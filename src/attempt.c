/*-------------------------------------------------------------------------
 *
 * attempt.c
 *		The steps of an attempt, whatever the kind of work: it begins, is sent, and its
 *		outcome is recorded.  What differs between kinds is in their files, kind_*.c.
 *
 * All attempts that begin in a turn of the loop share one transaction and so one flush
 * of the WAL, and all whose answers have come share another.  If that fails, each gets
 * one of its own, so that nobody suffers for another one's error.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "attempt.h"
#include "clock.h"
#include "compat.h"
#include "dispatch.h"
#include "inflight.h"
#include "omni_refresh.h"
#include "retry.h"
#include "status.h"
#include "throttle.h"
#include "xact.h"

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
static void withdraw(OmniWork *work);
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
		if ((own == FAILED && count > 1) || (own == NOT_NOW && !work->kind->has_job))
			own = omni_transact(begin, work, true, &error);

		if (!work->kind->has_caller && (own == NOT_NOW || (own == FAILED && is_about_resources(error.sqlstate))))
		{
			omni_work_end(work);	/* it stays in the queue */
			omni_dispatch_pause(own == NOT_NOW ? OMNI_LOCAL_DELAY : OMNI_LOCAL_DELAY_MAX / 10);
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
			omni_work_reply(work, work->call->job_id, &error);
		}
		else if (own == FAILED)
		{
			omni_work_conclude(work, OMNI_NAME_FAILED, &error);
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
		now - (work->step == NEW ? work->taken_at : work->run_at) > OMNI_MS(OMNI_LOCK_PATIENCE);
}

/* Decides whether an attempt should begin in this turn, or never. */
static bool
choose(OmniWork *work)
{
	work->beginning = false;
	if (omni_work_is_abandoned(work))
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
		omni_dispatch_settle();
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
	return only != NULL && !only->kind->has_job;
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
		if (work->beginning && work->kind->has_row && (only == NULL || only == work) &&
			(!work->kind->has_caller || work->step == PENDING))
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

	omni_work_forget_attempt(work);
	work->concluded = false;
	work->delayed_until = 0;

	if (work->row != OMNI_ROW_OURS)
		return;
	if (!work->kind->has_caller)
	{
		/* set just now, by others of its kind */
		work->delayed_until = omni_throttled_until(work);
		if (work->delayed_until != 0)
			return;
	}
	if (work->kind->prepare != NULL)
		work->kind->prepare(work);
	if (work->concluded)
		return;
	if (!find_target(work, &error))
	{
		omni_work_conclude(work, OMNI_NAME_FAILED, &error);
		if (!work->kind->has_caller && work->target.key_file != NULL && now < work->deadline)
		{
			/* the file cannot be read, but may come back */
			work->outcome.quiet = work->kind->rests_quietly;
			work->outcome.status = work->kind->resting;
			work->outcome.attempt_event = OMNI_NAME_ATTEMPT_FAILED;
			work->outcome.again = true;
			work->outcome.delay = OMNI_MS(OMNI_BACKOFF_MAX);
		}
		refuse(work);
		return;
	}

	when = omni_rate_take(work->rate_id, work->kind->class, work->target.rate_limit, &blocked);
	if (when == 0)
	{
		if (work->kind->begin != NULL && !work->kind->begin(work))
			work->row = OMNI_ROW_GONE;
	}
	else if (when < work->deadline || !work->kind->has_caller)
	{
		work->delayed_until = when;
		if (work->kind->delay != NULL)
			work->kind->delay(work, when - now);
		if (!work->kind->has_caller)
			omni_throttle(work, when);
	}
	else if (work->job.attempts > 0)
	{
		error = work->best_error;
		omni_work_conclude(work, OMNI_NAME_FAILED, &error);
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
		omni_work_conclude(work, OMNI_NAME_CANCELED, &error);
		refuse(work);
	}
}

/* Writes that an attempt does not even begin, for kinds that are written down. */
static void
refuse(OmniWork *work)
{
	if (work->kind->refuse != NULL)
		work->kind->refuse(work);
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
		if (work->kind->has_caller)
			omni_error_hint(error, "If this transaction has created or renamed it, commit first.");
	}
	else if (!(found = omni_target_find(NameStr(request->server), request->role, &work->target, error)) &&
			 work->kind->has_caller)
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
		work->url = work->kind->url(work);
	}
	MemoryContextSwitchTo(context);
	return found;
}

/* What begin_one() did is committed. */
static void
begun(OmniWork *work)
{
	if (work->kind->has_job)
		omni_dispatch_settled();
	work->beginning = false;
	if (work->call != NULL)
		work->call->job_id = work->job.id;

	if (work->row != OMNI_ROW_OURS && work->call == NULL)
	{
		/* somebody has changed it meanwhile, or is about to */
		omni_dispatch_by(omni_clock() + OMNI_MS(OMNI_LOCAL_DELAY));
		omni_work_end(work);
	}
	else if (work->row == OMNI_ROW_LOCKED && omni_clock() < work->deadline)
		work->run_at = omni_clock() + OMNI_MS(OMNI_LOCAL_DELAY);
	else if (work->row == OMNI_ROW_LOCKED)
	{
		OmniError	error;

		omni_error_set(&error, ERRCODE_LOCK_NOT_AVAILABLE,
					   "another session holds a lock on the row of job " INT64_FORMAT, work->job.id);
		omni_error_detail(&error, "The request is not sent again.");
		omni_error_hint(&error, "Look for a transaction that is open and has canceled the job.");
		omni_work_conclude(work, OMNI_NAME_FAILED, &error);
		work->step = ANSWERED;
	}
	else if (work->row == OMNI_ROW_GONE)
	{
		OmniError	error;

		omni_error_set(&error, ERRCODE_NO_DATA_FOUND,
					   "job " INT64_FORMAT " was deleted or ended by another session before it was sent", work->job.id);
		omni_work_reply(work, work->job.id, &error);
	}
	else if (work->concluded)
		finished(work);
	else if (work->delayed_until != 0 && !work->kind->has_caller)
	{
		omni_dispatch_by(work->delayed_until);
		omni_work_end(work);
	}
	else if (work->delayed_until != 0)
	{
		work->run_at = work->delayed_until;
		work->step = PENDING;
	}
	else
	{
		work->step = SENDING;
		if (work->kind->begun != NULL)
			work->kind->begun(work);
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
		.method = work->kind->method,
		.url = work->url,
		.bearer = work->target.key,
		.probe = work->call != NULL && work->call->probe,
		.ca_file = work->target.ca_file,
		.proxy = work->target.proxy,
		.connect_timeout = work->target.connect_timeout,
		.timeout = !work->kind->has_caller ? work->target.timeout : Max(Min(work->target.timeout, left), 1),
		.is_wanted = is_wanted,
		.arg = work
	};
	OmniError	error;

	if (omni_work_is_abandoned(work))	/* libcurl may be too old to ask later */
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
		omni_work_conclude(work, OMNI_NAME_FAILED, &error);
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
		if ((own == FAILED && count > 1) || (own == NOT_NOW && !work->kind->has_job))
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
	delay = result == NOT_NOW ? OMNI_LOCAL_DELAY :
		Min(OMNI_LOCAL_DELAY << Min(work->write_failures, 10), OMNI_LOCAL_DELAY_MAX);
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
	if (work->kind->has_caller && work->outcome.again && strcmp(work->outcome.status, OMNI_NAME_PENDING) == 0)
	{
		work->run_at = omni_clock() + work->outcome.delay;
		work->write_at = 0;
		work->write_failures = 0;
		work->step = PENDING;
		return;
	}
	omni_dispatch_finished(work);
	omni_work_reply(work, work->job.id, work->outcome.job_error != NULL ? work->outcome.job_error : &work->outcome.error);
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
		work->row = exists && work->kind->has_job ? omni_job_record(&work->job, &work->outcome) : OMNI_ROW_OURS;
	}
	return true;
}

/* Decides, once, what the answer to an attempt means. */
static void
decide(OmniWork *work)
{
	const OmniAnswer *answer = work->transfer != NULL ? &work->transfer->answer : NULL;

	if (!work->concluded && answer->withdrawn)
		withdraw(work);
	if (work->concluded)
		return;

	work->concluded = true;
	work->kind->judge(work, answer);
}

/* Ends a job whose caller has left before its attempt was sent. */
static void
withdraw(OmniWork *work)
{
	OmniError	error = work->outcome.error;	/* of the last attempt, if any */

	omni_work_conclude(work, OMNI_NAME_CANCELED, &error);
	work->step = ANSWERED;
}

/* The same question, for libcurl's callback. */
static bool
is_wanted(void *work)
{
	return !omni_work_is_abandoned(work);
}
