/*-------------------------------------------------------------------------
 *
 * round.c
 *		Rounds of the queue: which queued jobs the worker puts in flight.
 *
 * The queue is ordered by role, server and model, and a round visits all its heads in this
 * order.  It merges due jobs and puts those in flight that nothing holds.  One step of a
 * round reads a bounded number of heads, since the worker takes calls between the steps; so
 * a round of a long queue needs several.  The next round begins behind the last role and
 * server that were served, so that each has its turn.
 *
 * All functions but omni_round_restart() and omni_round_is_complete() need a transaction
 * that has locked the tables, and raise what the statements of queue.c raise.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "utils/timestamp.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/setting.h"
#include "worker/kind.h"
#include "worker/round.h"
#include "worker/sent.h"
#include "worker/throttle.h"

/* Read at most this many heads at a time */
#define MAX_HEADS			256

/* If a due job waits longer than this, an event says why */
#define WAIT_TO_TELL		OMNI_MS(1000)

/* Tell so of this many resets of a head at a time, of those that refreshes hold */
#define MAX_TOLD			4

/*
 * How long to wait for the end of the refreshes that hold resets.  The end of one that this
 * worker has in flight has the queue read at once; it may be another session that ends it,
 * or it has been running for too long.
 */
#define HOLD_PATIENCE		OMNI_MS(60000)

/* The place before the first head of the queue */
static const OmniPlace start = {0};

/* A round */
typedef struct Round
{
	/* how far it has come */
	bool		going;			/* not complete */
	OmniPlace	from;			/* where it began, and ends */
	OmniPlace	at;				/* where the next step, or round, begins */
	bool		wrapped;		/* it began at the start of the queue, or has
								 * come back to it */

	/* the heads that it has found, due or not */
	bool		any;
	bool		several;		/* of more than one role and server */
	OmniPlace	last;			/* if any */
	TimestampTz next_due;		/* the lowest run_at of jobs that are not due */
	bool		any_held;		/* refreshes hold resets */

	/* the jobs that it has put in flight */
	bool		served;			/* any */
	OmniPlace	served_to;		/* the end of the last one's role and server */
} Round;

/* Merging of due jobs that cannot be sent yet */
typedef struct MergeAhead
{
	bool		wanted;			/* there may be jobs to merge */
	OmniPlace	at;				/* where the next step begins */
} MergeAhead;

static Round current;			/* or the last one, if that is complete */
static MergeAhead ahead;

static void begin_round(void);
static bool take_step(bool enabled, bool *more, bool *any_locked);
static bool has_reached_start(const OmniHead *heads, int *count);
static bool has_more_to_merge(const OmniHead *heads, int *count);
static bool is_to_merge(const OmniHead *head);
static void note_heads(const OmniHead *heads, int count);
static void note_held(const OmniHead *head);
static void tell_held(const OmniHead *heads, int count);
static bool claim_heads(const OmniHead *heads, int count, bool *any_locked);
static bool claim_jobs(const OmniJobState *jobs, int count, bool *any_locked);
static void claim_job(const OmniJob *job);
static OmniPlace place_of(const OmniJob *job);
static bool is_alike_in_flight(const OmniJob *job);
static int	compare_places(const OmniPlace *one, const OmniPlace *other);

/*
 * Give up the current round: the next step begins a new one.  With merge_ahead, jobs may
 * have been queued since the last round that can be merged before they can be sent.
 */
void
omni_round_restart(bool merge_ahead)
{
	current.going = false;
	ahead.wanted |= merge_ahead;
}

/*
 * Take the next step of the current round, or the first step of a new one.  If it comes to
 * the end of the queue, and the round began elsewhere, go on from the start of the queue.
 * Unless enabled, put nothing in flight and only find out what there is.  Returns whether the
 * next call may put more in flight.  Sets *any_locked if another session has locked the row
 * of a due job.
 */
bool
omni_round_go_on(bool enabled, bool *any_locked)
{
	bool		more = false;

	if (omni_works_of_role(InvalidOid) >= OMNI_MAX_OF_ALL)
		return false;
	if (!current.going)
		begin_round();
	while (current.going && take_step(enabled, &more, any_locked))
	{
		current.going = !current.wrapped;
		current.wrapped = true;
		current.at = start;
	}
	if (!current.going && current.several && current.served)
		current.at = current.served_to;
	return more || current.going;
}

static void
begin_round(void)
{
	current.going = true;
	current.from = current.at;
	current.wrapped = compare_places(&current.at, &start) == 0;
	current.any = current.several = current.any_held = current.served = false;
	current.next_due = DT_NOEND;
}

/*
 * Return whether the last round is complete.  If so, sets *any to whether the queue had any
 * jobs, and *next_due to the time when the next one will be due, or to DT_NOEND.
 */
bool
omni_round_is_complete(bool *any, TimestampTz *next_due)
{
	if (current.going)
		return false;
	*any = current.any;
	*next_due = current.next_due;
	return true;
}

/* Return whether the round, or the last one, has found resets that wait for refreshes. */
bool
omni_round_any_held(void)
{
	return current.any_held;
}

/*
 * Take one step of the round.  Returns whether it has come to the end of the queue, or to
 * the place where the round began.  Sets *more if the heads that it has read may have more
 * jobs to put in flight.
 */
static bool
take_step(bool enabled, bool *more, bool *any_locked)
{
	int			due_limit = 2 * Max(omni_max_in_flight, OMNI_CLAIM_MIN);
	int			due = 0;
	OmniHeld	held;
	OmniHead   *heads;
	int			count;
	bool		at_end;

	omni_throttle_list(&omni_queued_kind, &held);
	heads = omni_queue_heads(&current.at, &held, MAX_HEADS, due_limit, omni_max_in_flight, &count);
	for (int i = 0; i < count; i++)
		due += heads[i].is_due;
	OMNI_FAULT_POINT("claim: heads read");
	at_end = count < MAX_HEADS && due < due_limit;
	if (has_reached_start(heads, &count))
		at_end = true;
	if (has_more_to_merge(heads, &count))
		at_end = false;

	if (count > 0)
	{
		note_heads(heads, count);
		current.at = heads[count - 1].place;
		if (enabled)
		{
			tell_held(heads, count);
			*more |= claim_heads(heads, count, any_locked);
		}
	}
	return at_end;
}

/* Leave out the heads behind the place where the round began.  Returns whether any are. */
static bool
has_reached_start(const OmniHead *heads, int *count)
{
	int			all = *count;

	if (!current.wrapped || compare_places(&current.from, &start) == 0)
		return false;
	while (*count > 0 && compare_places(&heads[*count - 1].place, &current.from) > 0)
		(*count)--;
	return *count < all;
}

/*
 * If more than OMNI_MERGE_HEADS heads have jobs to merge, leave out the first one that is too
 * many and those behind it, for the next step.  Returns whether any are left out.
 */
static bool
has_more_to_merge(const OmniHead *heads, int *count)
{
	int			to_merge = 0;

	for (int i = 0; i < *count; i++)
	{
		if (is_to_merge(&heads[i]) && ++to_merge > OMNI_MERGE_HEADS)
		{
			*count = i;
			return true;
		}
	}
	return false;
}

/* Return whether a due head has other due jobs behind it, which may be merged. */
static bool
is_to_merge(const OmniHead *head)
{
	return head->is_due && head->has_more;
}

/* Note what the round has found. */
static void
note_heads(const OmniHead *heads, int count)
{
	for (int i = 0; i < count; i++)
	{
		const OmniPlace *place = &heads[i].place;

		if (current.any && (place->role != current.last.role ||
							strcmp(NameStr(place->server), NameStr(current.last.server)) != 0))
			current.several = true;
		current.any = true;
		current.last = *place;
		if (!heads[i].is_due && !heads[i].is_held)
			current.next_due = Min(current.next_due, heads[i].run_at);
		if (heads[i].held_since != 0)
			note_held(&heads[i]);
	}
}

/* Note that refreshes hold resets of a head: when to tell so, and when to look again. */
static void
note_held(const OmniHead *head)
{
	TimestampTz now = omni_latest_now();
	TimestampTz tell_at = head->held_since + WAIT_TO_TELL;

	current.any_held = true;
	current.next_due = Min(current.next_due, now + HOLD_PATIENCE);
	if (tell_at >= now)
		current.next_due = Min(current.next_due, tell_at);
}

/* Tell why resets wait, if refreshes hold them for so long that it matters. */
static void
tell_held(const OmniHead *heads, int count)
{
	TimestampTz since = omni_latest_now() - WAIT_TO_TELL;
	OmniHead   *waiting = palloc(count * sizeof(OmniHead));
	OmniJobState *resets;
	int			nwaiting = 0;
	int			nresets;

	for (int i = 0; i < count; i++)
	{
		if (heads[i].held_since != 0 && heads[i].held_since < since)
			waiting[nwaiting++] = heads[i];
	}
	if (nwaiting == 0)
		return;
	resets = omni_queue_held(waiting, nwaiting, MAX_TOLD, &nresets);
	for (int i = 0; i < nresets; i++)
	{
		if (resets[i].job.request.requested_at < since)
			omni_event_add_waiting(&resets[i].job, "for the refreshes of the model that were requested before");
	}
}

/*
 * Merge the due jobs of some heads, and put those in flight that may be sent now.  Returns
 * whether there may be more of them.
 */
static bool
claim_heads(const OmniHead *heads, int count, bool *any_locked)
{
	OmniHead   *ready = palloc(count * sizeof(OmniHead));
	OmniHead   *to_merge = palloc(count * sizeof(OmniHead));
	OmniJobState *jobs;
	int			nready = 0;
	int			nto_merge = 0;
	int			njobs;
	bool		more = false;

	for (int i = 0; i < count; i++)
	{
		if (is_to_merge(&heads[i]))
			to_merge[nto_merge++] = heads[i];
		else if (heads[i].is_due)
			ready[nready++] = heads[i];
	}
	if (nto_merge > 0)
		omni_queue_merge(to_merge, nto_merge);
	for (int i = 0; i < nto_merge; i++)
	{
		if (to_merge[i].has_more)
			more = true;		/* send nothing before all is merged */
		else
			ready[nready++] = to_merge[i];
	}
	if (nready == 0)
		return more;
	jobs = omni_queue_due(ready, nready, Max(omni_max_in_flight, OMNI_CLAIM_MIN), &njobs);
	return claim_jobs(jobs, njobs, any_locked) || more;
}

/*
 * Put those of some due jobs in flight that may be sent now.  Returns whether there may be
 * more.
 */
static bool
claim_jobs(const OmniJobState *jobs, int count, bool *any_locked)
{
	int64	   *ids = palloc(Max(count, 1) * sizeof(int64));
	OmniRow    *rows;
	bool		any_copies = false;

	for (int i = 0; i < count; i++)
		ids[i] = jobs[i].job.id;
	OMNI_FAULT_POINT("claim: due jobs read");
	rows = omni_job_lock(ids, count);
	OMNI_FAULT_POINT("claim: rows locked");

	for (int i = 0; i < count; i++)
	{
		const OmniJob *job = &jobs[i].job;

		if (rows[i] == OMNI_ROW_LOCKED)
			*any_locked = true;
		if (rows[i] != OMNI_ROW_OURS)
			continue;
		if (job->database == MyDatabaseId)
			claim_job(job);
		else if (!any_copies)
		{
			OmniPlace	place = place_of(job);

			omni_queue_cancel_copies(&place);
			any_copies = true;
		}
	}
	return any_copies;
}

/*
 * Put a job in flight, unless there is no room for it, or a request like it was sent less
 * than min_interval ago: then defer it.
 */
static void
claim_job(const OmniJob *job)
{
	int64		wait;

	if (!omni_work_has_room(&omni_queued_kind, &job->request))
		return;
	wait = is_alike_in_flight(job) ? OMNI_MS(omni_min_interval) : omni_sent_wait(job);
	if (wait > 0)
	{
		TimestampTz run_at = omni_latest_now() + wait;

		omni_job_defer(job->id, run_at);
		if (wait > WAIT_TO_TELL)
			omni_event_add_waiting(job, "for \"omni_refresh.min_interval\": a request for the same was sent just before");
		current.next_due = Min(current.next_due, run_at);
		return;
	}
	omni_work_begin_job(&omni_queued_kind, job, job->renewed_at + omni_retry_for * USECS_PER_SEC);
	OMNI_FAULT_POINT("claim: in flight");
	current.served = true;
	current.served_to = place_of(job);
	memset(&current.served_to.model, 0xff, sizeof(pg_uuid_t));
}

static OmniPlace
place_of(const OmniJob *job)
{
	OmniPlace	place = {
		.role = job->request.role,.server = job->request.server,.model = job->request.model
	};

	return place;
}

/*
 * Return whether a job like this one is in flight, and this one must wait for it.  A job that
 * was tried before backs off instead.
 */
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

/*
 * Merge due jobs that cannot be sent yet, so that they need not be merged when their turn
 * comes: one step through the queue, after a round that had nothing to put in flight.
 * Returns whether another step should follow.
 */
bool
omni_round_merge_ahead(void)
{
	OmniHeld	none = {0};
	OmniHead   *heads;
	OmniPlace	next;
	int			count;
	int			nto_merge = 0;
	bool		more;

	if (!ahead.wanted)
		return false;
	if (omni_works_any_claimed())
		return true;			/* not now: their rows are still pending */
	heads = omni_queue_heads(&ahead.at, &none, MAX_HEADS, MAX_HEADS, MAX_HEADS, &count);
	more = count == MAX_HEADS;
	if (has_more_to_merge(heads, &count))
		more = true;
	next = more ? heads[count - 1].place : start;

	for (int i = 0; i < count; i++)
	{
		if (is_to_merge(&heads[i]))
			heads[nto_merge++] = heads[i];
	}
	if (nto_merge > 0)
		omni_queue_merge(heads, nto_merge);
	for (int i = 0; i < nto_merge; i++)
	{
		if (heads[i].has_more)
			return true;		/* the next step begins where this one did */
	}
	ahead.at = next;
	ahead.wanted = more;
	return more;
}

/* Compare two places as the index on the queue orders them. */
static int
compare_places(const OmniPlace *one, const OmniPlace *other)
{
	int			order;

	if (one->role != other->role)
		return one->role < other->role ? -1 : 1;
	order = strcmp(NameStr(one->server), NameStr(other->server));
	return order != 0 ? order : memcmp(&one->model, &other->model, sizeof(pg_uuid_t));
}
