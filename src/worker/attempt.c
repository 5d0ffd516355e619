/*-------------------------------------------------------------------------
 *
 * attempt.c
 *		The steps of an attempt, whatever the kind of work: it begins, its request is
 *		sent, and its outcome is recorded.  What differs between the kinds is in kind_*.c.
 *
 * All attempts that begin in a turn of the loop share one transaction, and so one flush of
 * the WAL; all attempts whose outcomes are recorded share another.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "foreign/foreign.h"
#include "miscadmin.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "base/clock.h"
#include "base/compat.h"
#include "base/fault.h"
#include "base/status.h"
#include "omni_refresh.h"
#include "shared/counter.h"
#include "store/xact.h"
#include "worker/attempt.h"
#include "worker/dispatch.h"
#include "worker/inflight.h"
#include "worker/report.h"
#include "worker/retry.h"
#include "worker/throttle.h"

/* A transaction that work shares */
typedef struct SharedTransaction
{
	/* Return whether work takes part in this turn of the loop. */
	bool		(*takes_part) (const OmniWork *work);
	/* The body: for some work, or for all that takes part if only is NULL */
	bool		(*body) (void *only);
	bool		flush;			/* as in omni_transact() */
	/* Act on the result; *error is set unless that is COMMITTED. */
	void		(*finish) (OmniWork *work, OmniTransacted result, const OmniError *error);
} SharedTransaction;

static OmniTransacted share_transaction(const SharedTransaction *shared);
static void choose(OmniWork *work);
static bool is_beginning(const OmniWork *work);
static bool begin(void *only);
static bool is_lookup(const OmniWork *only);
static void lock_rows(OmniWork *only);
static void begin_one(OmniWork *work);
static bool find_target(OmniWork *work, OmniError *error);
static bool check_kind(const OmniWork *work, OmniError *error);
static bool check_role(OmniWork *work, OmniError *error);
static bool resolve_server(OmniWork *work, OmniError *error);
static void refuse_without_target(OmniWork *work, const OmniError *error);
static void reserve_place(OmniWork *work);
static void give_place_back(OmniWork *work);
static bool is_too_late(const OmniWork *work);
static void conclude_too_late(OmniWork *work, bool was_throttled);
static void conclude_without_place(OmniWork *work, int64 when, bool blocked);
static void refuse(OmniWork *work);
static void finish_begin(OmniWork *work, OmniTransacted result, const OmniError *error);
static bool is_about_resources(int sqlstate);
static int	for_caller(int sqlstate);
static bool is_late(const OmniWork *work);
static void not_begun(OmniWork *work, const OmniError *error);
static void begun(OmniWork *work);
static void wait_for_row(OmniWork *work);
static void send_request(OmniWork *work);
static void not_sent(OmniWork *work, const OmniError *error);
static bool is_wanted(void *work);
static bool is_recording(const OmniWork *work);
static bool record(void *only);
static void decide(OmniWork *work);
static void count_request(const OmniWork *work);
static OmniCounter counter_of_outcome(const OmniWork *work);
static void finish_record(OmniWork *work, OmniTransacted result, const OmniError *error);
static void finished(OmniWork *work);
static void record_later(OmniWork *work, OmniTransacted result, const OmniError *why);
static bool is_news(int sqlstate);
static void reply_unrecorded(OmniWork *work, const OmniError *why);
static void withdraw(OmniWork *work);

static const SharedTransaction beginning = {
	.takes_part = is_beginning,
	.body = begin,
	.flush = true,
	.finish = finish_begin
};

static const SharedTransaction recording = {
	.takes_part = is_recording,
	.body = record,
	.finish = finish_record
};

/*
 * Run a transaction for all work that takes part.  If it fails, run one for each, so that no
 * work suffers for the error of other work.  Locks on the tables do not concern look-ups:
 * if there are any, run a transaction for each look-up.  Returns the result of the
 * transaction for all.
 */
static OmniTransacted
share_transaction(const SharedTransaction *shared)
{
	dlist_mutable_iter iter;
	OmniError	error;
	OmniError	own_error;
	OmniTransacted result = COMMITTED;
	int			count = 0;

	dlist_foreach_modify(iter, &omni_works)
	{
		if (shared->takes_part(dlist_container(OmniWork, node, iter.cur)))
			count++;
	}
	if (count > 0)
		result = omni_transact(shared->body, NULL, shared->flush, &error);

	dlist_foreach_modify(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		if (!shared->takes_part(work))
			continue;
		if ((result == FAILED && count > 1) || (result == NOT_NOW && !work->kind->has_job))
		{
			OmniTransacted own = omni_transact(shared->body, work, shared->flush, &own_error);

			shared->finish(work, own, &own_error);
		}
		else
			shared->finish(work, result, &error);
	}
	return result;
}

/*
 * Begin the attempts that are due, and record that before anything is sent.  Returns false if
 * that must be tried again, because another session is in the way.
 */
bool
omni_attempts_begin(void)
{
	dlist_mutable_iter iter;

	dlist_foreach_modify(iter, &omni_works)
		choose(dlist_container(OmniWork, node, iter.cur));
	return share_transaction(&beginning) != NOT_NOW;
}

/* Decide whether an attempt begins in this turn.  Ends or withdraws abandoned calls. */
static void
choose(OmniWork *work)
{
	work->beginning = false;
	if (!omni_work_is_abandoned(work))
		work->beginning = work->step == NEW ||
			(work->step == PENDING && work->run_at <= omni_clock());
	else if (work->step == NEW)
		omni_work_end(work);	/* nothing is recorded */
	else if (work->step == PENDING)
		withdraw(work);
}

static bool
is_beginning(const OmniWork *work)
{
	return work->beginning;
}

/* The body of the transaction.  Returns false if the tables are locked. */
static bool
begin(void *only)
{
	dlist_iter	iter;

	if (!omni_tables_find())
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("extension \"%s\" no longer exists", OMNI_EXTENSION)));
	if (!is_lookup(only))
	{
		if (!omni_tables_lock())
			return false;
		omni_dispatch_settle();
		OMNI_FAULT_POINT("begin: settled");
		lock_rows(only);
		OMNI_FAULT_POINT("begin: rows locked");
	}
	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		if (work->beginning && (only == NULL || only == work))
			begin_one(work);
	}
	OMNI_FAULT_POINT("begin: done");
	return true;
}

/* Return whether a transaction is for one look-up, which has no row and needs no locks. */
static bool
is_lookup(const OmniWork *only)
{
	return only != NULL && !only->kind->has_job;
}

/*
 * Lock the rows of the jobs whose attempts begin, except those of new calls, which have none
 * yet, and of polls, which change nothing.  Sets row of all work.
 */
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
 * Begin an attempt: record that it begins, or that it must wait, or why it does not begin at
 * all.  The work moves on only in begun(), after the commit.
 */
static void
begin_one(OmniWork *work)
{
	OmniError	error;
	bool		was_throttled = work->delayed_until != 0;

	give_place_back(work);		/* of a transaction that was rolled back */
	omni_work_forget_attempt(work);
	work->concluded = false;
	work->delayed_until = 0;

	if (work->row != OMNI_ROW_OURS)
		return;
	if (!work->kind->has_caller)
	{
		/* other work may have been throttled in this transaction */
		work->delayed_until = omni_throttled_until(work);
		if (work->delayed_until != 0)
			return;
	}
	if (work->kind->prepare != NULL)
		work->kind->prepare(work);
	if (work->concluded)
		return;
	if (is_too_late(work))
	{
		conclude_too_late(work, was_throttled);
		refuse(work);
		return;
	}
	OMNI_FAULT_POINT("begin: prepared");
	if (find_target(work, &error))
		reserve_place(work);
	else
		refuse_without_target(work, &error);
}

/*
 * Find out where to send the request, in the committed view, and with which key.  Returns
 * false and sets *error if it cannot be sent.
 */
static bool
find_target(OmniWork *work, OmniError *error)
{
	MemoryContext context = MemoryContextSwitchTo(work->attempt);
	bool		found = check_kind(work, error) && check_role(work, error) && resolve_server(work, error) &&
	omni_target_read_key(&work->target, error);

	if (found)
	{
		work->rate_id = omni_rate_id(omni_api_host(work->target.base_url, false),
									 work->target.key);
		work->url = work->kind->url(work);
	}
	MemoryContextSwitchTo(context);
	return found;
}

/* Check that the row names a kind of job that this version knows. */
static bool
check_kind(const OmniWork *work, OmniError *error)
{
	if (work->job.request.kind != OMNI_KIND_UNRECOGNIZED)
		return true;
	omni_error_set(error, ERRCODE_INVALID_PARAMETER_VALUE,
				   "job " INT64_FORMAT " is of an unrecognized kind", work->job.id);
	omni_error_hint(error, "A newer version of the extension may have queued it.");
	return false;
}

/* Check that the requesting role exists; a new role of the same name is another one. */
static bool
check_role(OmniWork *work, OmniError *error)
{
	OmniRequest *request = &work->job.request;

	if (GetUserNameFromId(request->role, true) != NULL)
		return true;
	omni_error_set(error, ERRCODE_UNDEFINED_OBJECT,
				   work->kind->has_caller ? "role \"%s\" does not exist" : "role \"%s\" was dropped",
				   NameStr(request->requested_by));
	if (work->kind->has_caller)
		omni_error_hint(error, "If this transaction has created it, commit first.");
	return false;
}

/*
 * Find the server and the user mapping.  A caller has found them in its own view, with the
 * privilege to use them.  If they are missing here, its transaction has not committed yet, or
 * another one has just committed.
 */
static bool
resolve_server(OmniWork *work, OmniError *error)
{
	OmniRequest *request = &work->job.request;
	char	   *why;

	if (omni_target_find(NameStr(request->server), request->role, &work->target, error))
		return true;
	if (!work->kind->has_caller)
		return false;
	why = pstrdup(error->message);
	omni_error_set(error, ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
				   "the background worker may not use server \"%s\" on behalf of \"%s\"",
				   NameStr(request->server), NameStr(request->requested_by));
	omni_error_detail(error, "The worker sees only what is committed: %s.", why);
	omni_error_hint(error,
					"If this transaction has created or granted what is missing, commit first.");
	return false;
}

/*
 * Conclude work whose request cannot be sent.  A queued job or poll is tried again instead if
 * its server does not exist, or its key file cannot be read: they may come back.
 */
static void
refuse_without_target(OmniWork *work, const OmniError *error)
{
	omni_work_conclude(work, OMNI_NAME_FAILED, error);
	if (!work->kind->has_caller && work->job.request.kind != OMNI_KIND_UNRECOGNIZED && omni_clock() < work->deadline &&
		(work->target.key_file != NULL ||
		 !OidIsValid(get_foreign_server_oid(NameStr(work->job.request.server), true))))
	{
		omni_event_add_waiting(&work->job, omni_error_text(error));
		work->outcome.quiet = true;
		work->outcome.status = work->kind->resting;
		work->outcome.again = true;
		work->outcome.delay = Min(OMNI_MS(OMNI_BACKOFF_MAX), work->deadline - omni_clock());
	}
	refuse(work);
}

/*
 * Reserve a place within the rate limit, and record that the attempt begins.  If the limit is
 * reached, record that it must wait; conclude a call that would wait beyond its deadline.
 */
static void
reserve_place(OmniWork *work)
{
	bool		blocked;
	int64		when = omni_rate_take(work->rate_id, work->kind->class, work->target.rate_limit,
									  &blocked);

	OMNI_FAULT_POINT("begin: place reserved");
	if (when != 0)
		omni_count(&work->job.request.server, OMNI_COUNT_THROTTLED, 1);
	if (when == 0)
	{
		work->has_place = true;
		if (work->kind->begin != NULL && !work->kind->begin(work))
			work->row = OMNI_ROW_GONE;
	}
	else if (when < work->deadline || !work->kind->has_caller)
	{
		work->delayed_until = when;
		if (work->kind->delay != NULL)
			work->kind->delay(work, when - omni_clock());
		if (!work->kind->has_caller)
			omni_throttle(work, when);
	}
	else
	{
		conclude_without_place(work, when, blocked);
		refuse(work);
	}
}

/* Give back the place of a request that is not sent. */
static void
give_place_back(OmniWork *work)
{
	if (work->has_place)
		omni_rate_give_back(work->rate_id, work->kind->class);
	work->has_place = false;
}

/* Return whether the deadline of a call has come, so that nothing is sent any more. */
static bool
is_too_late(const OmniWork *work)
{
	return work->kind->has_caller && omni_clock() >= work->deadline;
}

/*
 * Conclude a call that is not sent since its deadline has come: with the error of the last
 * attempt if there was one, else with what it has waited for.
 */
static void
conclude_too_late(OmniWork *work, bool was_throttled)
{
	OmniError	error = work->best_error;

	if (was_throttled)
	{
		conclude_without_place(work, omni_clock(), false);
		return;
	}
	if (error.sqlstate == 0)
	{
		omni_error_set(&error, ERRCODE_CONNECTION_FAILURE,
					   "\"omni_refresh.call_timeout\" was over before the request to server \"%s\" could be sent",
					   NameStr(work->job.request.server));
		omni_error_detail(&error, "It waited for %s, and was not sent.",
						  work->taken_at >= work->deadline ? "the background worker to take it" :
						  work->waited_for);
	}
	omni_work_conclude(work, OMNI_NAME_FAILED, &error);
}

/*
 * Conclude a call that may not be sent before a time of omni_clock() that is too late: with
 * the error of the last attempt, if there was one.
 */
static void
conclude_without_place(OmniWork *work, int64 when, bool blocked)
{
	OmniError	error = work->best_error;

	if (work->job.attempts == 0)
	{
		TimestampTz until = GetCurrentTimestamp() + (when - omni_clock());

		omni_error_set(&error, ERRCODE_INSUFFICIENT_RESOURCES,
					   "the rate limit of server \"%s\" leaves no room for this request before %s",
					   NameStr(work->job.request.server), timestamptz_to_str(until));
		omni_error_detail(&error,
						  "That would be after the end of \"omni_refresh.call_timeout\"; the request was not sent.");
		if (blocked)
			omni_error_hint(&error,
							"Omni has asked for a pause with this key; others may be using it, too.");
		else
			omni_error_hint(&error,
							work->target.rate_limit == 1 ?
							"The option \"rate_limit\" of the server allows %d request a minute with one key, from all databases." :
							"The option \"rate_limit\" of the server allows %d requests a minute with one key, from all databases.",
							work->target.rate_limit);
	}
	omni_work_conclude(work, OMNI_NAME_FAILED, &error);
}

/* Record a conclusion, for kinds that are recorded. */
static void
refuse(OmniWork *work)
{
	if (work->kind->refuse != NULL)
		work->kind->refuse(work);
}

/* Act on the result of the transaction in which an attempt was to begin. */
static void
finish_begin(OmniWork *work, OmniTransacted result, const OmniError *error)
{
	if (result == COMMITTED)
	{
		begun(work);
		return;
	}
	give_place_back(work);
	if (error->sqlstate == ERRCODE_LOCK_NOT_AVAILABLE)
		work->waited_for = "a lock on the tables of omni_refresh";
	if (!work->kind->has_caller &&
		(result == NOT_NOW || is_about_resources(error->sqlstate)))
	{
		omni_work_end(work);	/* the job stays in its table */
		omni_dispatch_pause(result == NOT_NOW ? OMNI_LOCAL_DELAY : OMNI_LOCAL_DELAY_MAX / 10);
	}
	else if (result == FAILED && (work->step == NEW || !is_about_resources(error->sqlstate)))
		not_begun(work, error);
	else if (is_late(work))
	{
		OmniError	late;

		omni_error_set(&late, for_caller(error->sqlstate), "could not record the request in time");
		omni_error_detail(&late, work->step == NEW ? "%c%s.  Nothing was sent." : "%c%s.",
						  pg_ascii_toupper(error->message[0]), &error->message[1]);
		if (error->sqlstate == ERRCODE_LOCK_NOT_AVAILABLE)
			omni_error_hint(&late, "Look for the lock in pg_locks.");
		not_begun(work, &late);
	}
}

/* Return whether an error is due to the state of the server, and not to the job. */
static bool
is_about_resources(int sqlstate)
{
	int			category = ERRCODE_TO_CATEGORY(sqlstate);

	return category == ERRCODE_INSUFFICIENT_RESOURCES ||
		category == ERRCODE_OPERATOR_INTERVENTION || category == ERRCODE_SYSTEM_ERROR;
}

/* Return the code of an error of the worker's for a caller, whose own query nobody has canceled. */
static int
for_caller(int sqlstate)
{
	return sqlstate == ERRCODE_QUERY_CANCELED ? ERRCODE_CONNECTION_FAILURE : sqlstate;
}

/* Return whether an attempt has waited too long for locks on the tables. */
static bool
is_late(const OmniWork *work)
{
	int64		now = omni_clock();
	int64		since = work->step == NEW ? work->taken_at : work->run_at;

	return now >= work->deadline || now - since > OMNI_MS(OMNI_LOCK_PATIENCE);
}

/*
 * An attempt could not begin: reply to the caller of a new call, and conclude any other work.
 * If a new call has a job already, an earlier worker may have sent the request.
 */
static void
not_begun(OmniWork *work, const OmniError *error)
{
	OmniError	lost;

	if (work->call == NULL || work->step != NEW)
	{
		omni_work_conclude(work, OMNI_NAME_FAILED, error);
		work->step = ANSWERED;
		return;
	}
	if (work->call->job_id != 0)
	{
		omni_call_lost(work->call, &lost);
		error = &lost;
	}
	omni_work_reply(work, work->call->job_id, error);
}

/* The transaction of begin_one() has committed: move the work on. */
static void
begun(OmniWork *work)
{
	if (work->kind->has_job)
		omni_dispatch_settled();
	work->beginning = false;
	if (work->call != NULL)
	{
		work->call->job_id = work->job.id;
		pg_memory_barrier();	/* before is_wanted(): see give_up() in call.c */
	}

	if (work->row != OMNI_ROW_OURS && work->call == NULL)
	{
		/*
		 * another session has changed the row, or is about to, or a refresh
		 * holds the reset
		 */
		omni_dispatch_by(omni_clock() + OMNI_MS(OMNI_LOCAL_DELAY));
		omni_work_end(work);
	}
	else if (work->row == OMNI_ROW_LOCKED)
		wait_for_row(work);
	else if (work->row == OMNI_ROW_GONE)
	{
		OmniError	error;

		omni_error_set(&error, ERRCODE_NO_DATA_FOUND,
					   "job " INT64_FORMAT " was deleted or ended by another session before it was sent",
					   work->job.id);
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

/* The row of a call is locked: try again soon, or conclude the call after its deadline. */
static void
wait_for_row(OmniWork *work)
{
	OmniError	error;

	if (omni_clock() < work->deadline)
	{
		work->run_at = omni_clock() + OMNI_MS(OMNI_LOCAL_DELAY);
		work->waited_for = "a lock on the row of its job";
		return;
	}
	omni_error_set(&error, ERRCODE_LOCK_NOT_AVAILABLE,
				   "another session holds a lock on the row of job " INT64_FORMAT, work->job.id);
	omni_error_detail(&error, "The request is not sent again.");
	omni_error_hint(&error, "Look for a transaction that is open and has canceled the job.");
	omni_work_conclude(work, OMNI_NAME_FAILED, &error);
	work->step = ANSWERED;
}

/* Send the requests of the attempts that have begun, and see which transfers are done. */
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

/*
 * Start the transfer of a request.  It may be some time until libcurl sends the request; then
 * is_wanted() tells whether the work is abandoned.
 */
static void
send_request(OmniWork *work)
{
	MemoryContext context = CurrentMemoryContext;
	OmniHttpRequest request = {
		.method = work->kind->method,
		.url = work->url,
		.bearer = work->target.key,
		.probe = work->call != NULL && work->call->probe,
		.ca_file = work->target.ca_file,
		.proxy = work->target.proxy,
		.connect_timeout = work->target.connect_timeout,
		.timeout = work->target.timeout,
		.is_wanted = is_wanted,
		.arg = work
	};
	OmniError	error;

	if (!is_wanted(work))		/* libcurl may be too old to ask later */
	{
		give_place_back(work);
		withdraw(work);
		return;
	}
	if (work->kind->has_caller)
		request.timeout = Max(Min(request.timeout, omni_clock_until(work->deadline)), 1);
	PG_TRY();
	{
		MemoryContextSwitchTo(work->attempt);
		request.body = omni_api_job_body(&work->job.request);
		omni_rate_sent(NameStr(work->job.request.server), work->kind->class);
		OMNI_FAULT_POINT("send: counted");
		work->transfer = omni_http_start(&request);
		work->has_place = false;
	}
	PG_CATCH();
	{
		omni_error_catch(&error, context);
		not_sent(work, &error);
	}
	PG_END_TRY();
	MemoryContextSwitchTo(context);
}

/*
 * A request could not be sent, for lack of memory for example: conclude the work, but try a
 * queued job or poll again if that is not its fault.
 */
static void
not_sent(OmniWork *work, const OmniError *error)
{
	OmniOutcome *outcome = &work->outcome;

	give_place_back(work);
	omni_work_forget_attempt(work);
	omni_work_conclude(work, OMNI_NAME_FAILED, error);
	if (!work->kind->has_caller && is_about_resources(error->sqlstate) &&
		omni_clock() < work->deadline)
	{
		outcome->status = work->kind->resting;
		outcome->quiet = !work->kind->has_row;
		outcome->attempt_event = OMNI_NAME_ATTEMPT_FAILED;
		outcome->again = true;
		outcome->delay = OMNI_MS(OMNI_LOCAL_DELAY_MAX / 10);
	}
	work->step = ANSWERED;
}

/* Callback of OmniHttpRequest: return whether the request is still to be sent. */
static bool
is_wanted(void *work)
{
	return !omni_work_is_abandoned(work) && !is_too_late(work);
}

/* Record the outcomes of attempts, and finish the work. */
void
omni_attempts_record(void)
{
	dlist_iter	iter;

	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		work->recording = work->step == ANSWERED && work->write_at <= omni_clock();
	}
	share_transaction(&recording);
}

static bool
is_recording(const OmniWork *work)
{
	return work->recording;
}

/* The body of the transaction.  Returns false if the tables are locked. */
static bool
record(void *only)
{
	bool		exists = omni_tables_find();	/* if not, there is nothing to
												 * record in */
	dlist_iter	iter;

	if (exists && !is_lookup(only) && !omni_tables_lock())
		return false;
	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		if (!work->recording || (only != NULL && only != work))
			continue;
		decide(work);
		work->row = OMNI_ROW_OURS;
		if (exists && work->kind->has_job)
			work->row = omni_job_record(&work->job, &work->outcome);
		OMNI_FAULT_POINT("record: recorded");
		if (work->outcome.attempted && work->row != OMNI_ROW_LOCKED)
			count_request(work);
	}
	OMNI_FAULT_POINT("record: done");
	return true;
}

/*
 * Decide what the answer to an attempt means, unless an earlier try to record it did.  An
 * error leaves the decision to the next try.  The outcome must outlive this transaction, which
 * may be rolled back.
 */
static void
decide(OmniWork *work)
{
	const OmniAnswer *answer = work->transfer != NULL ? &work->transfer->answer : NULL;

	if (work->concluded)
		return;
	if (answer->withdrawn)
	{
		withdraw(work);
		return;
	}

	OMNI_FAULT_POINT("record: to judge");
	work->kind->judge(work, answer);
	OMNI_FAULT_POINT("record: judged");
	if (work->outcome.note != NULL)
		work->outcome.note = MemoryContextStrdup(work->attempt, work->outcome.note);
	work->outcome.attempted = true;
	work->concluded = true;
}

/* Count a request whose outcome is recorded in this transaction. */
static void
count_request(const OmniWork *work)
{
	const NameData *server = &work->job.request.server;

	omni_count(server, counter_of_outcome(work), 1);
	omni_count(server, OMNI_COUNT_TIME, work->transfer->answer.elapsed);
	if (work->kind->class == OMNI_RATE_POLL)
		omni_count(server, OMNI_COUNT_POLLS, 1);
	if (!work->kind->has_job)
		omni_count(server, OMNI_COUNT_LOOKUPS, 1);
	if (work->outcome.again && strcmp(work->outcome.status, OMNI_NAME_PENDING) == 0)
		omni_count(server, OMNI_COUNT_RETRIED, 1);
}

/* Return the counter of requests with the outcome of a request. */
static OmniCounter
counter_of_outcome(const OmniWork *work)
{
	const OmniAnswer *answer = &work->transfer->answer;

	if (answer->failed)
		return OMNI_COUNT_UNANSWERED;
	if (answer->status == 429)
		return OMNI_COUNT_RATE_LIMITED;
	if (answer->status >= 400 && answer->status < 500)
		return OMNI_COUNT_REFUSED;
	if (answer->status / 100 == 2 && work->outcome.error.sqlstate != ERRCODE_PROTOCOL_VIOLATION)
		return OMNI_COUNT_OK;
	return OMNI_COUNT_FAILED;
}

/* Act on the result of the transaction in which an outcome was to be recorded. */
static void
finish_record(OmniWork *work, OmniTransacted result, const OmniError *error)
{
	work->recording = false;
	if (result != COMMITTED)
		record_later(work, result, error);
	else if (work->row == OMNI_ROW_LOCKED)
	{
		OmniError	locked;

		omni_error_set(&locked, ERRCODE_LOCK_NOT_AVAILABLE,
					   "another session holds a lock on its row");
		record_later(work, NOT_NOW, &locked);
	}
	else
		finished(work);
}

/* The outcome is committed: let a call wait for its next attempt, and end any other work. */
static void
finished(OmniWork *work)
{
	const OmniOutcome *outcome = &work->outcome;

	omni_report_finished(work);
	if (work->kind->has_caller && outcome->again &&
		strcmp(outcome->status, OMNI_NAME_PENDING) == 0)
	{
		work->run_at = omni_clock() + outcome->delay;
		work->write_at = 0;
		work->write_failures = 0;
		work->step = PENDING;
		return;
	}
	omni_dispatch_finished(work);
	omni_work_reply(work, work->job.id,
					outcome->job_error != NULL ? outcome->job_error : &outcome->error);
}

/*
 * An outcome could not be recorded: keep the work in flight, so that the job is not sent
 * again, and try to record the outcome later.
 */
static void
record_later(OmniWork *work, OmniTransacted result, const OmniError *why)
{
	int			delay = OMNI_LOCAL_DELAY;

	if (result == FAILED)
		delay = Min(OMNI_LOCAL_DELAY << Min(work->write_failures, 10), OMNI_LOCAL_DELAY_MAX);
	if (is_news(why->sqlstate))
		ereport(LOG,
				(errcode(why->sqlstate),
				 errmsg("could not record the outcome of job " INT64_FORMAT ", will try again: %s",
						work->job.id, why->message)));
	work->write_at = omni_clock() + OMNI_MS(delay);
	work->write_failures++;
	if (work->segment != NULL && omni_clock() >= work->deadline)
		reply_unrecorded(work, why);
}

/*
 * Return whether to tell that an outcome cannot be recorded: not if others cannot, either, and
 * the log has told so.  Of several reasons, tell another one a minute.
 */
static bool
is_news(int sqlstate)
{
	static int	told = 0;
	static int64 told_at = 0;
	int64		now = omni_clock();
	bool		stalled = false;
	dlist_iter	iter;

	dlist_foreach(iter, &omni_works)
		stalled |= dlist_container(OmniWork, node, iter.cur)->write_failures > 0;
	if (stalled && (sqlstate == told || now - told_at < 60 * USECS_PER_SEC))
		return false;
	told = sqlstate;
	told_at = now;
	return true;
}

/* Reply to a caller whose deadline has come before its outcome could be recorded. */
static void
reply_unrecorded(OmniWork *work, const OmniError *why)
{
	OmniError	error;

	omni_error_set(&error, for_caller(why->sqlstate),
				   "could not record the outcome of job " INT64_FORMAT ": %s",
				   work->job.id, why->message);
	omni_error_hint(&error, "The outcome will be recorded as soon as possible.");
	omni_call_finish(work->segment, work->job.id, &error);
	work->segment = NULL;
	work->call = NULL;
}

/* Conclude a call whose next request was not sent, since it is abandoned or too late. */
static void
withdraw(OmniWork *work)
{
	OmniError	error = work->outcome.error;	/* of the last attempt, if any */

	if (omni_work_is_abandoned(work))
		omni_work_conclude(work, OMNI_NAME_CANCELED, &error);
	else
		conclude_too_late(work, false);
	work->step = ANSWERED;
}
