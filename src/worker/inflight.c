/*-------------------------------------------------------------------------
 *
 * inflight.c
 *		The work that is in flight: one list of calls, queued jobs, polls and look-ups.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "base/clock.h"
#include "base/setting.h"
#include "base/status.h"
#include "worker/inflight.h"

dlist_head	omni_works = DLIST_STATIC_INIT(omni_works);

/* Put work of a kind in flight.  It lasts until omni_work_end(). */
OmniWork *
omni_work_begin(const OmniWorkKind *kind)
{
	MemoryContext context = AllocSetContextCreate(TopMemoryContext, "omni_refresh job",
												  ALLOCSET_SMALL_SIZES);
	OmniWork   *work = MemoryContextAllocZero(context, sizeof(OmniWork));

	work->context = context;
	work->attempt = AllocSetContextCreate(context, "omni_refresh attempt",
										  ALLOCSET_SMALL_SIZES);
	work->kind = kind;
	work->waited_for = "the background worker";
	work->taken_at = omni_clock();
	dlist_push_tail(&omni_works, &work->node);
	return work;
}

/*
 * Put a queued or running job in flight, as work of a kind.  A copy of the job is made.  end
 * is the deadline, in the time of rows.
 */
void
omni_work_begin_job(const OmniWorkKind *kind, const OmniJob *job, TimestampTz end)
{
	OmniWork   *work = omni_work_begin(kind);
	MemoryContext context = MemoryContextSwitchTo(work->context);
	OmniRequest *request = &work->job.request;

	work->job = *job;
	if (request->schemas != NULL)
		request->schemas = DatumGetArrayTypePCopy(PointerGetDatum(request->schemas));
	if (request->tables != NULL)
		request->tables = DatumGetArrayTypePCopy(PointerGetDatum(request->tables));
	work->deadline = omni_clock() + (end - omni_earliest_now());
	MemoryContextSwitchTo(context);
}

/* End work, whatever its state.  A caller without a reply learns that its call was lost. */
void
omni_work_end(OmniWork *work)
{
	dlist_delete(&work->node);
	omni_work_forget_attempt(work);
	if (work->segment != NULL)
		dsm_detach(work->segment);
	MemoryContextDelete(work->context);
}

/* Forget an attempt: erase the key, and free the memory, with which the transfer ends. */
void
omni_work_forget_attempt(OmniWork *work)
{
	if (work->target.key != NULL)
		explicit_bzero(work->target.key, strlen(work->target.key));
	memset(&work->target, 0, sizeof(work->target));
	work->transfer = NULL;
	work->outcome.note = NULL;
	MemoryContextReset(work->attempt);
}

/*
 * Set the outcome to one that does not come from Omni.  If an earlier attempt may have
 * reached Omni, the status becomes "unknown" instead.
 */
void
omni_work_conclude(OmniWork *work, const char *status, const OmniError *error)
{
	memset(&work->outcome, 0, sizeof(work->outcome));
	work->outcome.status = work->may_have_arrived ? OMNI_NAME_UNKNOWN : status;
	work->outcome.error = *error;
	work->concluded = true;
}

/* Reply to the caller, if there is one, and end the work. */
void
omni_work_reply(OmniWork *work, int64 job_id, const OmniError *error)
{
	if (work->segment != NULL)
		omni_call_finish(work->segment, job_id, error);
	work->segment = NULL;
	work->call = NULL;
	omni_work_end(work);
}

/*
 * Count the work of a kind that is in flight for the role and server of a request, or for all if
 * that is NULL.
 */
int
omni_works_count(const OmniWorkKind *kind, const OmniRequest *request)
{
	int			n = 0;
	dlist_iter	iter;

	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		if (work->kind == kind &&
			(request == NULL || (work->job.request.role == request->role &&
								 strcmp(NameStr(work->job.request.server), NameStr(request->server)) == 0)))
			n++;
	}
	return n;
}

/*
 * Return whether another piece of work of a kind, from a table, may be put in flight: all
 * share the file descriptors of this process, so a role at a server, a role and the whole have limits.
 */
bool
omni_work_has_room(const OmniWorkKind *kind, const OmniRequest *request)
{
	return omni_works_count(kind, request) < omni_max_in_flight &&
		omni_works_of_role(request->role) < OMNI_MAX_OF_ROLE &&
		omni_works_of_role(InvalidOid) < OMNI_MAX_OF_ALL;
}

/* Count the work from a table that is in flight for a role, or for all roles if it is 0. */
int
omni_works_of_role(Oid role)
{
	int			n = 0;
	dlist_iter	iter;

	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		if (!work->kind->has_caller && (role == InvalidOid || work->job.request.role == role))
			n++;
	}
	return n;
}

/* Return whether work was taken from a table in this turn of the loop, and has not begun. */
bool
omni_work_is_claimed(const OmniWork *work)
{
	return !work->kind->has_caller && work->step == NEW;
}

/* Return whether there is such work. */
bool
omni_works_any_claimed(void)
{
	dlist_iter	iter;

	dlist_foreach(iter, &omni_works)
	{
		if (omni_work_is_claimed(dlist_container(OmniWork, node, iter.cur)))
			return true;
	}
	return false;
}

/* Return whether work is abandoned: its caller has left or no longer waits. */
bool
omni_work_is_abandoned(const OmniWork *work)
{
	return work->kind->has_caller &&
		(work->segment == NULL || pg_atomic_read_u32(&work->call->abandoned) != 0);
}
