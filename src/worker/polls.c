/*-------------------------------------------------------------------------
 *
 * polls.c
 *		Which running jobs to poll.
 *
 * The running jobs of one role at one server are a lane.  A reading visits the lanes in the
 * order of their index and polls the jobs that are due in those that are not held.  So it
 * never reads the jobs of a lane that is held, however many there are.
 *
 * The functions need a transaction that has locked the tables, and raise what the statements
 * of queue.c raise.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/setting.h"
#include "worker/kind.h"
#include "worker/polls.h"
#include "worker/throttle.h"

/* Visit at most this many lanes in a reading */
#define MAX_LANES			256

/* A pass over all lanes, of several readings if there are very many */
typedef struct Pass
{
	OmniPlace	last;			/* the last lane visited; zeros: none */
	bool		any;			/* it has found lanes */
	TimestampTz next;			/* the lowest run_at of those not due */
} Pass;

static const Pass new_pass = {.next = DT_NOEND};
static Pass pass = {.next = DT_NOEND};

static int	due_lanes(OmniHead *lanes, int count, const OmniHeld *held);
static bool is_polled(int64 id);

/* Begin a new pass: what the last reading has put in flight was given up. */
void
omni_polls_restart(void)
{
	pass = new_pass;
}

/*
 * Put polls in flight of running jobs that are due.  Returns whether there may be more in
 * lanes that the next reading visits.  If not, sets *any to whether there are running jobs,
 * and *next to the time when the next one that is not held will be due, or to DT_NOEND.
 */
bool
omni_polls_claim(bool *any, TimestampTz *next)
{
	OmniHeld	held;
	OmniHead   *lanes;
	OmniJobState *jobs;
	int			count;
	int			njobs;
	bool		more;

	omni_throttle_list(&omni_poll_kind, &held);
	lanes = omni_running_lanes(&pass.last, MAX_LANES, &count);
	more = count == MAX_LANES;
	if (count > 0)
	{
		pass.any = true;
		pass.last = lanes[count - 1].place;
	}

	OMNI_FAULT_POINT("look: lanes read");
	count = due_lanes(lanes, count, &held);
	jobs = omni_running_due(lanes, count,
							omni_max_in_flight + omni_works_count(&omni_poll_kind, NULL), &njobs);
	for (int i = 0; i < njobs; i++)
	{
		const OmniJob *job = &jobs[i].job;

		/* a poll in flight has not changed the row of its job */
		if (!is_polled(job->id) && omni_work_has_room(&omni_poll_kind, &job->request))
			omni_work_begin_job(&omni_poll_kind, job,
								job->sent_at + omni_track_timeout * USECS_PER_SEC);
	}

	if (!more)
	{
		*any = pass.any;
		*next = pass.next;
		pass = new_pass;
	}
	return more;
}

/*
 * Keep only those lanes that are due and not held; returns how many.  Note when the
 * others will be due.
 */
static int
due_lanes(OmniHead *lanes, int count, const OmniHeld *held)
{
	int			due = 0;

	for (int i = 0; i < count; i++)
	{
		if (omni_is_held(held, &lanes[i].place))
			continue;
		if (lanes[i].is_due)
			lanes[due++] = lanes[i];
		else
			pass.next = Min(pass.next, lanes[i].run_at);
	}
	return due;
}

/* Return whether a poll of a job is in flight. */
static bool
is_polled(int64 id)
{
	dlist_iter	iter;

	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		if (work->kind == &omni_poll_kind && work->job.id == id)
			return true;
	}
	return false;
}
