/*-------------------------------------------------------------------------
 *
 * claim.c
 *		What the worker takes in hand of the queue, and when it looks for it.
 *
 * What is queued stays in its table until it can be sent at once; queue.c has the
 * statements.  The queue is looked at when a commit has set our flag, when something
 * in it is due, and when there is room again for more at a server.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "omni_refresh.h"
#include "work.h"

/* Jobs of the queue to read at a time, for those that must wait as well */
#define SMALLEST_CLAIM		16

/* After a look at the queue, the next for what is new waits so many times longer */
#define LOOK_PAUSE			4
#define LOOK_PAUSE_MAX		(INT64CONST(200) * 1000)	/* microseconds */

/* A role whose rate limit at a server leaves no room for a class for a while */
typedef struct Held
{
	NameData	server;
	Oid			role;
	OmniRateClass class;
	TimestampTz until;
} Held;

/* When something of a merge key was sent from the queue last */
typedef struct LastSent
{
	int64		merge_key;		/* hash key */
	TimestampTz sent_at;
} LastSent;

static bool settled_all = false;	/* what was left behind */
static bool following = true;	/* some jobs may be followed */
static TimestampTz looked_at = 0;	/* the queue, last time or long ago */
static TimestampTz look_at = DT_NOBEGIN;	/* next time */
static bool look_for_new = true;	/* and then merge */
static TimestampTz look_for_new_from = DT_NOBEGIN;	/* not before this time */
static bool queue_left = true;	/* there is something in the queue */
static TimestampTz next_due = DT_NOEND; /* what is left, and is not due yet */
static List *held = NIL;		/* of Held */
static HTAB *last_sent = NULL;	/* of LastSent */

static void look_at_queue(void);
static bool claimed_any(void);
static bool claim(void *unused);
static bool claim_due(OmniRateClass class, TimestampTz now);
static ArrayType *list_held(OmniRateClass class, TimestampTz now);
static bool is_in_hand(OmniRateClass class, int64 id);
static TimestampTz held_until(OmniJob *job, TimestampTz now);
static void forget_sent(TimestampTz before);

/* Has the queue looked at in the next turn; until then nobody knows that it is empty. */
void
omni_claim_soon(void)
{
	look_for_new = true;
	look_at = DT_NOBEGIN;
	queue_left = true;
}

/* Looks at the queue, if it is time to. */
void
omni_claim_due(void)
{
	if (look_for_new_from <= GetCurrentTimestamp() && omni_worker_take_flag())
		omni_claim_soon();
	if (look_at <= GetCurrentTimestamp() && (!look_for_new || look_for_new_from <= GetCurrentTimestamp()))
		look_at_queue();
}

/* Has the queue looked at by a time. */
void
omni_claim_by(TimestampTz when)
{
	look_at = Min(look_at, when);
}

/* Has the queue looked at no earlier than in so many ms, since something is in the way. */
void
omni_claim_pause(int delay)
{
	look_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), delay);
}

/* Whether there may be something in the queue that is not in hand. */
bool
omni_claim_any_left(void)
{
	return queue_left;
}

/* When the queue was seen last, or long ago */
TimestampTz
omni_claim_last(void)
{
	return looked_at;
}

/*
 * How long to wait, in ms, for the queue's sake.  What is new is not looked for more
 * often than it is worth; see look_at_queue().
 */
long
omni_claim_delay(void)
{
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz next = look_for_new ? Max(look_at, look_for_new_from) : look_at;

	if (look_for_new_from > now)
		next = Min(next, look_for_new_from);	/* for the flag */
	return TimestampDifferenceMilliseconds(now, next);
}

/*
 * Takes in hand what of the queue can be sent now, and decides when to look again.
 *
 * To look for what is new takes time with the length of the queue, and steals the
 * processor from those whose commits have woken us.  So there is a pause after it,
 * the longer the look has taken, and the longer the more often it was in vain.
 * Nothing is sent that has not been looked at so.
 */
static void
look_at_queue(void)
{
	static int64 pause = 0;		/* microseconds */
	static int	failures = 0;	/* one after the other ... */
	static TimestampTz failing_since;
	static bool complained;		/* ... and it is in the log */
	TimestampTz began = GetCurrentTimestamp();
	dlist_mutable_iter iter;
	OmniError	error;
	OmniTransacted result;

	if (next_due <= began)
		look_for_new = true;
	look_at = DT_NOEND;
	omni_error_set(&error, ERRCODE_LOCK_NOT_AVAILABLE,
				   "another session holds a lock on the tables of omni_refresh");
	result = omni_transact(claim, NULL, false, &error);
	if (result == COMMITTED)
	{
		omni_claim_settled();
		following = omni_track;
		looked_at = began;
		failures = 0;
		if (!look_for_new)		/* else there is more to merge */
		{
			if (began > look_for_new_from + LOOK_PAUSE_MAX || claimed_any())
				pause = 0;
			pause = Min(Max(2 * pause, LOOK_PAUSE * (GetCurrentTimestamp() - began)), LOOK_PAUSE_MAX);
			look_for_new_from = GetCurrentTimestamp() + pause;
		}
		return;
	}

	dlist_foreach_modify(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		if (work->class != OMNI_RATE_CALL && work->step == NEW)
			omni_work_end(work);
	}
	if (failures == 0)
	{
		failing_since = began;
		complained = false;
	}
	if (!complained &&
		(result == FAILED || TimestampDifferenceExceeds(failing_since, GetCurrentTimestamp(), LOCK_PATIENCE)))
	{
		complained = true;
		ereport(LOG,
				(errcode(error.sqlstate),
				 errmsg("could not look at the queue of omni_refresh, will try again: %s",
						error.message)));
	}
	look_for_new = true;
	look_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), result == NOT_NOW ? RETRY_DELAY :
										  Min(RETRY_DELAY << Min(failures, 10), RETRY_DELAY_MAX));
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

		if (work->class != OMNI_RATE_CALL && work->step == NEW)
			return true;
	}
	return false;
}

/* The body of that transaction. */
static bool
claim(void *unused)
{
	TimestampTz now = GetCurrentTimestamp();
	bool		more = false;
	ListCell   *cell;

	if (!omni_tables_find() || !omni_tables_lock())
		return false;
	omni_claim_settle();

	if (!omni_track && following)
		omni_job_stop_following();
	if (omni_track && omni_enabled)
		more = claim_due(OMNI_RATE_POLL, now);
	if (omni_enabled)
	{
		bool		unmerged = false;

		if (look_for_new)
		{
			int64		longest = Max(OMNI_MAX_WAIT, omni_min_interval * INT64CONST(1000));

			forget_sent(now - omni_min_interval * INT64CONST(1000));
			omni_job_reclock(now, now + longest + USECS_PER_HOUR);
			look_for_new = unmerged = omni_job_merge(now);
		}
		more |= unmerged || claim_due(OMNI_RATE_JOB, now);
	}

	queue_left = omni_job_next(now, &next_due);
	if (!omni_enabled)
		next_due = DT_NOEND;	/* SIGHUP ends the wait */
	look_at = more ? now : next_due;
	foreach(cell, held)
		look_at = Min(look_at, ((Held *) lfirst(cell))->until);
	return true;
}

/*
 * Takes in hand what is due and may be sent now.  Returns true if there may be
 * more of it.
 */
static bool
claim_due(OmniRateClass class, TimestampTz now)
{
	int			limit = Max(omni_max_in_flight, SMALLEST_CLAIM) + omni_works_count(class, NULL);
	bool		any = false;
	int			count;

	do
	{
		OmniJob    *jobs = omni_job_due(now, class == OMNI_RATE_POLL, list_held(class, now), limit, &count);

		for (int i = 0; i < count; i++)
		{
			OmniJob    *job = &jobs[i];
			TimestampTz until;
			OmniWork   *work;
			MemoryContext context;

			if (is_in_hand(class, job->id))
				continue;		/* a question does not change its row */
			if (omni_works_count(class, &job->request.server) >= omni_max_in_flight)
				continue;		/* the next round leaves them out */
			if (class == OMNI_RATE_JOB && (until = held_until(job, now)) != 0)
			{
				omni_job_defer(job->id, until);
				continue;
			}
			work = omni_work_begin(class);
			work->job = *job;
			context = MemoryContextSwitchTo(work->context);
			if (job->schemas != NULL)
				work->job.schemas = DatumGetArrayTypePCopy(PointerGetDatum(job->schemas));
			if (job->tables != NULL)
				work->job.tables = DatumGetArrayTypePCopy(PointerGetDatum(job->tables));
			MemoryContextSwitchTo(context);
			work->deadline = class == OMNI_RATE_POLL ? job->sent_at + omni_track_timeout * USECS_PER_SEC :
				job->request.requested_at + omni_retry_for * USECS_PER_SEC;
			any = true;
		}
	} while (count == limit && !any);
	return count == limit;
}

/*
 * Who can be sent nothing of a class at the moment, as omni_job_due() wants it:
 * servers with enough in flight, and roles that have reached a rate limit.
 */
static ArrayType *
list_held(OmniRateClass class, TimestampTz now)
{
	ArrayBuildState *names = initArrayResult(TEXTOID, CurrentMemoryContext, false);
	const char *last = "";
	ListCell   *cell;
	dlist_iter	iter;

	foreach(cell, held)
	{
		Held	   *this = lfirst(cell);

		if (this->until > now)
		{
			char	   *name = psprintf("%s %u", NameStr(this->server), this->role);

			if (this->class == class)
				accumArrayResult(names, CStringGetTextDatum(name), false, TEXTOID, CurrentMemoryContext);
		}
		else
		{
			pfree(this);
			held = foreach_delete_current(held, cell);
		}
	}
	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);
		NameData   *server = &work->job.request.server;

		if (work->class == class && strcmp(NameStr(*server), last) != 0 &&
			omni_works_count(class, server) >= omni_max_in_flight)
		{
			last = NameStr(*server);
			accumArrayResult(names, CStringGetTextDatum(last), false, TEXTOID, CurrentMemoryContext);
		}
	}
	return DatumGetArrayTypeP(makeArrayResult(names, CurrentMemoryContext));
}

static bool
is_in_hand(OmniRateClass class, int64 id)
{
	dlist_iter	iter;

	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		if (work->class == class && work->job.id == id)
			return true;
	}
	return false;
}

/*
 * Until when a job must wait since something alike was sent a short while ago; 0
 * if it need not.  What has been tried before has its own time to wait for.
 */
static TimestampTz
held_until(OmniJob *job, TimestampTz now)
{
	TimestampTz until = 0;
	LastSent   *sent;
	dlist_iter	iter;

	if (job->attempts > 0 || omni_min_interval == 0)
		return 0;
	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		if (work->class == OMNI_RATE_JOB && work->job.merge_key == job->merge_key)
			until = TimestampTzPlusMilliseconds(now, omni_min_interval);
	}
	sent = hash_search(last_sent, &job->merge_key, HASH_FIND, NULL);
	if (until == 0 && sent != NULL && sent->sent_at <= now)
		until = TimestampTzPlusMilliseconds(sent->sent_at, omni_min_interval);
	return until > now ? until : 0;
}

void
omni_claim_sent(int64 merge_key, TimestampTz sent_at)
{
	LastSent   *sent = hash_search(last_sent, &merge_key, HASH_ENTER, NULL);

	sent->sent_at = sent_at;
}

/* Nobody asks for what is so long ago that nothing needs to wait for it. */
static void
forget_sent(TimestampTz before)
{
	HASH_SEQ_STATUS status;
	LastSent   *sent;

	hash_seq_init(&status, last_sent);
	while ((sent = hash_seq_search(&status)) != NULL)
	{
		if (sent->sent_at < before)
			(void) hash_search(last_sent, &sent->merge_key, HASH_REMOVE, NULL);
	}
}

/* Settles what an earlier worker has left, and learns what it has sent. */
void
omni_claim_settle(void)
{
	HASHCTL		info = {.keysize = sizeof(int64),.entrysize = sizeof(LastSent)};

	if (settled_all)
		return;
	omni_job_settle();
	if (last_sent != NULL)
		hash_destroy(last_sent);
	last_sent = hash_create("omni_refresh last sent", 64, &info, HASH_ELEM | HASH_BLOBS);
	omni_job_recent(GetCurrentTimestamp() - omni_min_interval * INT64CONST(1000), omni_claim_sent);
}

/* What omni_claim_settle() did is committed. */
void
omni_claim_settled(void)
{
	settled_all = true;
}

/* There is room for more where a job was in hand, which may come back to the queue. */
void
omni_claim_finished(const OmniWork *work)
{
	TimestampTz run_at = work->outcome.run_at;

	if (queue_left && work->class != OMNI_RATE_CALL &&
		omni_works_count(work->class, &work->job.request.server) <= omni_max_in_flight * 3 / 4 + 1)
		look_at = DT_NOBEGIN;
	if (run_at != 0)
	{
		look_at = Min(look_at, run_at);
		next_due = Min(next_due, run_at);
		queue_left = true;
	}
}

/* Lets what a role has for a server wait, of the same class. */
void
omni_claim_hold(const OmniWork *work, TimestampTz until)
{
	MemoryContext context = MemoryContextSwitchTo(TopMemoryContext);
	Held	   *new = palloc(sizeof(Held));

	new->server = work->job.request.server;
	new->role = work->job.request.role;
	new->class = work->class;
	new->until = until;
	held = lappend(held, new);
	MemoryContextSwitchTo(context);
}

/* Until when omni_claim_hold() lets something wait, or 0. */
TimestampTz
omni_claim_held_until(const OmniWork *work)
{
	ListCell   *cell;

	foreach(cell, held)
	{
		Held	   *this = lfirst(cell);

		if (this->class == work->class && this->role == work->job.request.role && this->until > GetCurrentTimestamp() &&
			strcmp(NameStr(this->server), NameStr(work->job.request.server)) == 0)
			return this->until;
	}
	return 0;
}
