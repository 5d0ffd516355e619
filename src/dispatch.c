/*-------------------------------------------------------------------------
 *
 * dispatch.c
 *		What of the queue goes next, and when the worker looks for it.
 *
 * What is queued stays in its table until it can be sent at once; queue.c has the
 * statements.  The queue is looked at when a commit has set our flag, when something
 * in it is due, and when there is room again for more at a server.
 *
 * One look is short, however long the queue is, since calls are taken between looks.
 * It goes a part of the way round the queue, from role to role, and the next one goes on
 * behind the role that was served last, so that each has its turn.
 *
 * All times here are those of omni_clock(), unless their type is TimestampTz.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "executor/spi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "clock.h"
#include "compat.h"
#include "dispatch.h"
#include "kind.h"
#include "sent.h"
#include "setting.h"
#include "status.h"
#include "throttle.h"
#include "workerslot.h"
#include "xact.h"

/* The least that one look reads of what is due, and the most of what is not */
#define SMALLEST_CLAIM		16
#define LONGEST_LOOK		256

/* After a look at the queue, the next for what is new waits so many times longer */
#define LOOK_PAUSE			4
#define LOOK_PAUSE_MAX		OMNI_MS(200)

/* Between looks at what somebody has locked, in ms */
#define LOCKED_ROUND		300

/* A way round the queue, of several looks if it is long */
typedef struct Round
{
	OmniPlace	at;				/* how far it has come, or is to begin */
	bool		going;			/* else the following is of the last one */
	OmniPlace	from;			/* where it began, and is to end */
	bool		wrapped;		/* it goes on from the start of the queue */
	bool		any;			/* it has seen anything ... */
	bool		several;		/* ... of more than one role and server */
	bool		served;			/* it has taken something in flight ... */
	OmniPlace	served_to;		/* ... behind which the next one begins */
	TimestampTz next_due;		/* of what it has seen, and was not due */
} Round;

static Round circle = {.next_due = DT_NOEND};

static bool settled_all = false;	/* what was left behind ... */
static bool settled_now = false;	/* ... once this transaction is committed */
static bool running_left = true;	/* some jobs may be followed */
static int64 looked_at = 0;		/* the queue, last time or long ago */
static int64 look_at = 0;		/* next time */
static bool look_for_new = true;	/* and then go all the way round */
static int64 look_for_new_from = 0; /* not before this time */
static bool any_locked = false; /* something that is due may be locked */
static bool to_merge_ahead = false; /* what cannot be sent yet */
static bool is_enabled_known = false;	/* see is_enabled() */
static bool queue_left = true;	/* there is something in the queue */
static TimestampTz next_due = DT_NOEND; /* what is left, and is not due yet */

static void look_at_queue(void);
static bool claimed_any(void);
static bool claim(void *unused);
static bool claim_running(void);
static bool go_round(void);
static bool go_on(bool *more);
static void note_heads(const OmniHead *heads, int count);
static bool claim_heads(const OmniHead *heads, int count);
static bool claim_jobs(const OmniJobState *jobs, int count);
static bool merge_ahead(void);
static bool is_enabled(void);
static void take(const OmniJob *job, const OmniWorkKind *kind);
static bool is_alike_in_flight(const OmniJob *job);
static bool is_in_flight(const OmniWorkKind *kind, int64 id);
static int	compare_places(const OmniPlace *one, const OmniPlace *other);
static int64 clock_of(TimestampTz when);

/* Has the queue looked at in the next turn; until then nobody knows that it is empty. */
void
omni_dispatch_soon(void)
{
	look_for_new = true;
	look_at = 0;
	queue_left = true;
}

/* The settings may have changed. */
void
omni_dispatch_reload(void)
{
	is_enabled_known = false;
	omni_dispatch_soon();
}

/* Looks at the queue, if it is time to. */
void
omni_dispatch_due(void)
{
	if (look_for_new_from <= omni_clock() && omni_worker_take_flag())
		omni_dispatch_soon();
	if (look_at <= omni_clock() && (!look_for_new || look_for_new_from <= omni_clock()))
		look_at_queue();
}

/* Has the queue looked at by a time. */
void
omni_dispatch_by(int64 when)
{
	look_at = Min(look_at, when);
}

/* Has the queue looked at no earlier than in so many ms, since something is in the way. */
void
omni_dispatch_pause(int delay)
{
	look_at = omni_clock() + OMNI_MS(delay);
}

/* Whether there may be something in the queue that is not in flight. */
bool
omni_dispatch_any_left(void)
{
	return queue_left;
}

/* When the queue was seen last, or long ago */
int64
omni_dispatch_looked_at(void)
{
	return looked_at;
}

/*
 * How long to wait, in ms, for the queue's sake.  What is new is not looked for more
 * often than it is worth; see look_at_queue().
 */
long
omni_dispatch_delay(void)
{
	int64		next = look_for_new ? Max(look_at, look_for_new_from) : look_at;

	if (look_for_new_from > omni_clock())
		next = Min(next, look_for_new_from);	/* for the flag */
	return omni_clock_until(next);
}

/*
 * Takes in flight what of the queue can be sent now, and decides when to look again.
 *
 * To look for what is new steals the processor from those whose commits have woken us.
 * So there is a pause after it, the longer the look has taken, and the longer the more
 * often it was in vain.
 */
static void
look_at_queue(void)
{
	static int64 pause = 0;		/* microseconds */
	static int	failures = 0;	/* one after the other ... */
	static int64 failing_since;
	static bool complained;		/* ... and it is in the log */
	int64		began = omni_clock();
	bool		for_new = look_for_new;
	dlist_mutable_iter iter;
	OmniError	error;
	OmniTransacted result;

	omni_error_set_locked(&error);
	result = omni_transact(claim, NULL, false, &error);
	if (result == COMMITTED)
	{
		omni_dispatch_settled();
		looked_at = began;
		failures = 0;
		if (for_new)
		{
			if (began > look_for_new_from + LOOK_PAUSE_MAX || claimed_any())
				pause = 0;
			pause = Min(Max(2 * pause, LOOK_PAUSE * (omni_clock() - began)), LOOK_PAUSE_MAX);
			look_for_new_from = omni_clock() + pause;
		}
		return;
	}

	dlist_foreach_modify(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		if (!work->kind->has_caller && work->step == NEW)
			omni_work_end(work);
	}
	if (failures == 0)
	{
		failing_since = began;
		complained = false;
	}
	if (!complained && error.sqlstate != ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE &&	/* that is in the log */
		(result == FAILED || omni_clock() - failing_since > OMNI_MS(OMNI_LOCK_PATIENCE)))
	{
		complained = true;
		ereport(LOG,
				(errcode(error.sqlstate),
				 errmsg("could not look at the queue of omni_refresh, will try again: %s",
						error.message),
				 error.detail[0] != '\0' ? errdetail_internal("%s", error.detail) : 0));
	}
	look_for_new = true;
	circle.going = false;
	running_left = true;
	look_at = omni_clock() +
		OMNI_MS(result == NOT_NOW ? OMNI_LOCAL_DELAY : Min(OMNI_LOCAL_DELAY << Min(failures, 10), OMNI_LOCAL_DELAY_MAX));
	failures++;
}

/* Whether there are jobs that were taken from the queue in this turn. */
static bool
claimed_any(void)
{
	dlist_iter	iter;

	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		if (!work->kind->has_caller && work->step == NEW)
			return true;
	}
	return false;
}

/* The body of that transaction. */
static bool
claim(void *unused)
{
	TimestampTz next_running = DT_NOEND;
	bool		running_due = false;
	bool		more = false;

	if (!omni_tables_find() || !omni_tables_lock())
		return false;
	omni_dispatch_settle();

	running_left |= look_for_new;
	if (running_left && !omni_track)
		omni_job_stop_polling();
	else if (running_left && is_enabled())
		more = claim_running();
	if (running_left)
		running_left = omni_job_next_running(&running_due, &next_running);
	any_locked = !(settled_all || settled_now) || running_due;

	if (look_for_new)
	{
		omni_sent_forget();
		circle.going = look_for_new = false;
		to_merge_ahead = true;
	}
	more |= go_round();
	if (!more && to_merge_ahead)
		more = claimed_any() || merge_ahead();	/* not into what is in flight */
	if (!circle.going)
	{
		next_due = Min(circle.next_due, next_running);
		queue_left = circle.any || running_left || !(settled_all || settled_now);
	}

	look_at = more ? 0 : clock_of(next_due);
	if (any_locked || (running_left && !omni_track))
		look_at = Min(look_at, omni_clock() + OMNI_MS(LOCKED_ROUND));
	if (!is_enabled())
		look_at = OMNI_CLOCK_NEVER; /* SIGHUP ends the wait */
	look_at = Min(look_at, omni_throttle_ends());
	return true;
}

/*
 * Whether what is queued may be sent.  Of "omni_refresh.enabled", the configuration file,
 * the command line and the database count, as they are now, but not what ALTER ROLE has
 * set for the role that this process happens to run as.  Needs a transaction with SPI
 * connected, the first time after a reload.
 */
static bool
is_enabled(void)
{
	static bool enabled;
	char	   *value;

	if (is_enabled_known)
		return enabled;
	if (SPI_execute("SELECT coalesce("
					" (SELECT option_value FROM pg_db_role_setting, pg_options_to_table(setconfig)"
					"  WHERE setrole = 0 AND setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())"
					"   AND option_name = 'omni_refresh.enabled'),"
					" (SELECT setting FROM pg_settings WHERE name = 'omni_refresh.enabled' AND source = 'command line'),"
					" (SELECT setting FROM pg_file_settings WHERE lower(name) = 'omni_refresh.enabled' AND error IS NULL"
					"  ORDER BY seqno DESC LIMIT 1))", true, 1) != SPI_OK_SELECT || SPI_processed != 1)
		elog(ERROR, "could not read the setting \"omni_refresh.enabled\"");
	value = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1);
	if (value == NULL || !parse_bool(value, &enabled))
		enabled = true;
	is_enabled_known = true;
	return enabled;
}

/* A time of omni_clock(), for what is due in a row; it may be infinite. */
static int64
clock_of(TimestampTz when)
{
	return TIMESTAMP_IS_NOEND(when) ? OMNI_CLOCK_NEVER : omni_clock() + Max(when - omni_latest_now(), 0);
}

/*
 * Settles what an earlier worker has left, and is in nobody's hands; and learns, the first
 * time, what it has sent.  Rows that somebody has locked are settled later.
 */
void
omni_dispatch_settle(void)
{
	int64	   *in_flight;
	int			count = 0;
	dlist_iter	iter;

	if (settled_all)
		return;
	dlist_foreach(iter, &omni_works)
		count++;
	in_flight = palloc((count + 1) * sizeof(int64));
	count = 0;
	dlist_foreach(iter, &omni_works)
		in_flight[count++] = dlist_container(OmniWork, node, iter.cur)->job.id;
	settled_now = omni_job_settle(in_flight, count);

	omni_sent_recall();
}

/* The transaction that called omni_dispatch_settle() is committed. */
void
omni_dispatch_settled(void)
{
	settled_all |= settled_now;
}

/* Takes in flight what is running and to be asked about.  Returns true if there may be more. */
static bool
claim_running(void)
{
	int			limit = Max(omni_max_in_flight, SMALLEST_CLAIM) + omni_works_count(&omni_poll_kind, NULL);
	OmniHeld	names;
	OmniJobState *jobs;
	bool		any;
	int			count;

	do
	{
		any = false;
		omni_throttle_list(&omni_poll_kind, &names);
		jobs = omni_job_due_running(&names, limit, &count);
		for (int i = 0; i < count; i++)
		{
			OmniJob    *job = &jobs[i].job;

			/* a question does not change its row */
			if (is_in_flight(&omni_poll_kind, job->id) ||
				omni_works_count(&omni_poll_kind, &job->request.server) >= omni_max_in_flight)
				continue;
			take(job, &omni_poll_kind);
			any = true;
		}
	} while (count == limit && !any);
	return count == limit;
}

/*
 * Goes on around the queue, and takes in flight what can be sent now.  Returns true if there
 * may be more.
 */
static bool
go_round(void)
{
	static const OmniPlace start = {0};
	bool		more = false;

	if (!circle.going)
	{
		circle.going = true;
		circle.from = circle.at;
		circle.wrapped = compare_places(&circle.at, &start) == 0;
		circle.any = circle.several = circle.served = false;
		circle.next_due = DT_NOEND;
	}
	while (circle.going && go_on(&more))
	{
		circle.going = !circle.wrapped;
		circle.wrapped = true;
		circle.at = start;
	}
	if (!circle.going && circle.several && circle.served)
		circle.at = circle.served_to;
	return more || circle.going;
}

/*
 * A step of that.  Returns true if it came to the end of the queue, or to where the round
 * has begun.
 */
static bool
go_on(bool *more)
{
	static const OmniPlace start = {0};
	int			due_limit = 2 * Max(omni_max_in_flight, SMALLEST_CLAIM);
	OmniHeld	names;
	OmniHead   *heads;
	int			count;
	int			due = 0;
	int			crowded = 0;
	bool		at_end;

	omni_throttle_list(&omni_queued_kind, &names);
	heads = omni_queue_heads(&circle.at, &names, LONGEST_LOOK, due_limit, omni_max_in_flight, &count);
	for (int i = 0; i < count; i++)
		due += heads[i].is_due;
	at_end = count < LONGEST_LOOK && due < due_limit;

	if (circle.wrapped && compare_places(&circle.from, &start) != 0)
	{
		while (count > 0 && compare_places(&heads[count - 1].place, &circle.from) > 0)
		{
			count--;
			at_end = true;
		}
	}
	/* the next step goes on where there is too much to merge in this one */
	for (int i = 0; i < count; i++)
	{
		if (heads[i].is_due && heads[i].has_more && ++crowded > OMNI_MERGE_HEADS)
		{
			count = i;
			at_end = false;
		}
	}
	if (count > 0)
	{
		note_heads(heads, count);
		circle.at = heads[count - 1].place;
		if (is_enabled())
			*more |= claim_heads(heads, count);
	}
	return at_end;
}

/* Learns from heads whether there is anything in the queue, and when that is due. */
static void
note_heads(const OmniHead *heads, int count)
{
	static Oid	role;
	static NameData server;

	for (int i = 0; i < count; i++)
	{
		const OmniPlace *place = &heads[i].place;

		if (circle.any && (place->role != role || strcmp(NameStr(place->server), NameStr(server)) != 0))
			circle.several = true;
		circle.any = true;
		role = place->role;
		server = place->server;
		if (!heads[i].is_due && !heads[i].is_held)
			circle.next_due = Min(circle.next_due, heads[i].run_at);
	}
}

/*
 * Takes in flight what of some heads is due and may be sent now, once it is merged.  Returns
 * true if there may be more of it.
 */
static bool
claim_heads(const OmniHead *heads, int count)
{
	OmniHead   *due = palloc(count * sizeof(OmniHead));
	OmniHead   *crowded = palloc(count * sizeof(OmniHead));
	OmniJobState *jobs;
	int			ndue = 0;
	int			ncrowded = 0;
	int			njobs;
	bool		more = false;

	for (int i = 0; i < count; i++)
	{
		if (heads[i].is_due && heads[i].has_more)
			crowded[ncrowded++] = heads[i];
		else if (heads[i].is_due)
			due[ndue++] = heads[i];
	}
	if (ncrowded > 0)
		omni_queue_merge(crowded, ncrowded);
	for (int i = 0; i < ncrowded; i++)
	{
		if (crowded[i].has_more)
			more = true;		/* still: not sent before it is merged */
		else
			due[ndue++] = crowded[i];
	}
	if (ndue == 0)
		return more;
	jobs = omni_queue_due(due, ndue, Max(omni_max_in_flight, SMALLEST_CLAIM), &njobs);
	return claim_jobs(jobs, njobs) || more;
}

/* Takes in flight what of some jobs may be sent now.  Returns true if there may be more. */
static bool
claim_jobs(const OmniJobState *jobs, int count)
{
	int64	   *ids = palloc(Max(count, 1) * sizeof(int64));
	OmniRow    *rows;
	bool		more = false;

	for (int i = 0; i < count; i++)
		ids[i] = jobs[i].job.id;
	rows = omni_job_lock(ids, count);

	for (int i = 0; i < count; i++)
	{
		const OmniJob *job = &jobs[i].job;
		const OmniRequest *request = &job->request;
		OmniPlace	place = {.role = request->role,.server = request->server,.model = request->model};
		int64		wait;

		if (rows[i] == OMNI_ROW_LOCKED)
			any_locked = true;
		if (rows[i] != OMNI_ROW_OURS)
			continue;
		if (job->database != MyDatabaseId)
		{
			if (!more)
				omni_queue_cancel_copies(&place);
			more = true;
			continue;
		}
		if (omni_works_count(&omni_queued_kind, &request->server) >= omni_max_in_flight)
			continue;
		wait = is_alike_in_flight(job) ? OMNI_MS(omni_min_interval) : omni_sent_wait(job);
		if (wait > 0)
		{
			TimestampTz run_at = omni_latest_now() + wait;

			omni_job_defer(job->id, run_at);
			circle.next_due = Min(circle.next_due, run_at);
			continue;
		}
		take(job, &omni_queued_kind);
		circle.served = true;
		circle.served_to = place;
		memset(&circle.served_to.model, 0xff, sizeof(pg_uuid_t));
	}
	return more;
}

/*
 * Merges what is due, but cannot be sent yet, so that it need not be when its turn comes;
 * a part of the queue at a time.  Returns true if there is more of it.
 */
static bool
merge_ahead(void)
{
	static const OmniPlace start = {0};
	static OmniPlace at = {0};
	OmniPlace	next;
	OmniHeld	none = {0};
	OmniHead   *heads;
	int			count;
	int			ncrowded = 0;

	if (!to_merge_ahead || !is_enabled())
		return false;
	heads = omni_queue_heads(&at, &none, LONGEST_LOOK, LONGEST_LOOK, LONGEST_LOOK, &count);
	next = count == LONGEST_LOOK ? heads[count - 1].place : start;
	to_merge_ahead = count == LONGEST_LOOK;
	for (int i = 0; i < count; i++)
	{
		if (!heads[i].is_due || !heads[i].has_more)
			continue;
		if (ncrowded == OMNI_MERGE_HEADS)
		{
			next = heads[ncrowded - 1].place;
			to_merge_ahead = true;
			break;
		}
		heads[ncrowded++] = heads[i];
	}
	if (ncrowded > 0)
		omni_queue_merge(heads, ncrowded);
	for (int i = 0; i < ncrowded; i++)
	{
		if (heads[i].has_more)
		{
			to_merge_ahead = true;
			return true;		/* once more from here */
		}
	}
	at = next;
	return to_merge_ahead;
}

static void
take(const OmniJob *job, const OmniWorkKind *kind)
{
	OmniWork   *work = omni_work_begin(kind);
	MemoryContext context = MemoryContextSwitchTo(work->context);
	TimestampTz end = kind == &omni_poll_kind ? job->sent_at + omni_track_timeout * USECS_PER_SEC :
	job->renewed_at + omni_retry_for * USECS_PER_SEC;

	work->job = *job;
	if (job->request.schemas != NULL)
		work->job.request.schemas = DatumGetArrayTypePCopy(PointerGetDatum(job->request.schemas));
	if (job->request.tables != NULL)
		work->job.request.tables = DatumGetArrayTypePCopy(PointerGetDatum(job->request.tables));
	MemoryContextSwitchTo(context);
	work->deadline = omni_clock() + (end - omni_earliest_now());
}

/* Whether something alike is being sent, and a job that was not tried before must wait. */
static bool
is_alike_in_flight(const OmniJob *job)
{
	dlist_iter	iter;

	if (job->attempts > 0)
		return false;
	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		if (work->kind == &omni_queued_kind && work->job.merge_key == job->merge_key)
			return true;
	}
	return false;
}

static bool
is_in_flight(const OmniWorkKind *kind, int64 id)
{
	dlist_iter	iter;

	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		if (work->kind == kind && work->job.id == id)
			return true;
	}
	return false;
}

/* There is room for more where a job was in flight, which may come back to the queue. */
void
omni_dispatch_finished(const OmniWork *work)
{
	const OmniOutcome *outcome = &work->outcome;

	if (queue_left && !work->kind->has_caller &&
		omni_works_count(work->kind, &work->job.request.server) <= omni_max_in_flight * 3 / 4 + 1)
	{
		look_at = 0;
		circle.going = false;
	}
	if (outcome->again)
	{
		look_at = Min(look_at, omni_clock() + outcome->delay);
		queue_left = true;
		if (strcmp(outcome->status, OMNI_NAME_RUNNING) == 0)
			running_left = true;
		else
			next_due = Min(next_due, omni_latest_now() + outcome->delay);
	}
}

/* As the index on the queue does */
static int
compare_places(const OmniPlace *one, const OmniPlace *other)
{
	int			order;

	if (one->role != other->role)
		return one->role < other->role ? -1 : 1;
	order = strcmp(NameStr(one->server), NameStr(other->server));
	return order != 0 ? order : memcmp(&one->model, &other->model, sizeof(pg_uuid_t));
}
