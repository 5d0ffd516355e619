/*-------------------------------------------------------------------------
 *
 * call.c
 *		Calls: a backend hands one over to the worker of its database and waits for the
 *		reply.
 *
 * A call is a DSM segment that the backend makes (see OmniCall).  Its handle goes into
 * the ring of the database's slot (see workerslot.c), the worker takes it from there,
 * writes its results into the segment and sets the caller's latch.
 *
 * A worker that cannot start says why in the segment of the call that it was started for.
 *
 * No caller relies on being woken: each looks every now and then, and has a deadline of its own,
 * for a worker that is stopped, or hangs.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "storage/condition_variable.h"
#include "storage/latch.h"
#include "utils/elog.h"
#include "utils/wait_event.h"

#include "base/clock.h"
#include "base/compat.h"
#include "base/setting.h"
#include "shared/call.h"
#include "shared/workerslot.h"

/* In bytes; enough for any call without long lists */
#define SEGMENT_SIZE		8192

/* How long, and how often, to try to start a worker while none is available, in ms */
#define START_PATIENCE		5000
#define START_RETRY			20

/*
 * How much later than the worker a caller gives up, in ms.  A worker that is only busy has replied
 * by then.
 */
#define GRACE				5000

/* Complain to the log about calls that could not be taken at most this often, in ms */
#define COMPLAIN_ROUND		60000

static dsm_segment *kept_segment = NULL;	/* of this backend's calls */
static dsm_segment *starter_call = NULL;	/* in a worker that is starting */
static emit_log_hook_type next_emit_log_hook = NULL;

static Size reserve(Size *size, Size room);
static bool give_up(OmniCall *call, OmniError *error);
static void wait_for_latch(long timeout);
static void abandon_call(dsm_segment *segment, Datum arg);
static void keep_reason(ErrorData *data);
static dsm_segment *attach_call(dsm_handle handle, bool *failed);
static void lose_call(dsm_segment *segment, Datum arg);

/*
 * Create a segment for a call: for a look-up, or for a job if lookup is NULL.  The segment
 * belongs to the current resource owner until omni_call_end(); if it is detached before
 * that, the call is abandoned.  A session keeps its segment for the next call, since to
 * create one takes a tenth of a call's time.
 */
OmniCall *
omni_call_create(const OmniRequest *request, const char *lookup, dsm_segment **segment)
{
	Size		size = MAXALIGN(sizeof(OmniCall));
	Size		schemas_size = request->schemas != NULL ? VARSIZE(request->schemas) : 0;
	Size		tables_size = request->tables != NULL ? VARSIZE(request->tables) : 0;
	Size		schemas_at = reserve(&size, schemas_size);
	Size		tables_at = reserve(&size, tables_size);
	Size		lookup_at = reserve(&size, lookup != NULL ? strlen(lookup) + 1 : 0);
	Size		answer_at = reserve(&size, lookup != NULL ? OMNI_MAX_ANSWER : 0);
	OmniCall   *call;

	omni_not_in_worker();
	if (kept_segment != NULL && dsm_segment_map_length(kept_segment) < size)
		dsm_detach(kept_segment);
	if (kept_segment != NULL)
		dsm_unpin_mapping(kept_segment);
	else
	{
		kept_segment = dsm_create(Max(size, SEGMENT_SIZE), 0);
		on_dsm_detach(kept_segment, abandon_call, (Datum) 0);
	}
	*segment = kept_segment;
	call = dsm_segment_address(*segment);
	memset(call, 0, sizeof(OmniCall));
	pg_atomic_init_u32(&call->state, OMNI_CALL_WAITING);
	pg_atomic_init_u32(&call->abandoned, 0);
	call->caller = omni_my_proc();
	call->deadline = omni_clock() + OMNI_MS(omni_call_timeout);
	call->request = *request;
	call->request.schemas = call->request.tables = NULL;
	call->schemas = schemas_at;
	call->tables = tables_at;
	call->lookup = lookup_at;
	call->answer = answer_at;
	if (request->schemas != NULL)
		memcpy((char *) call + schemas_at, request->schemas, schemas_size);
	if (request->tables != NULL)
		memcpy((char *) call + tables_at, request->tables, tables_size);
	if (lookup != NULL)
		strcpy((char *) call + lookup_at, lookup);
	return call;
}

/* Add room to the size of a segment.  Returns its offset, or 0 if room is 0. */
static Size
reserve(Size *size, Size room)
{
	Size		offset = room > 0 ? *size : 0;

	*size += MAXALIGN(room);
	return offset;
}

/* End a call whose results are no longer needed. */
void
omni_call_end(dsm_segment *segment)
{
	OmniCall   *call = dsm_segment_address(segment);

	if (pg_atomic_read_u32(&call->state) == OMNI_CALL_DONE &&
		dsm_segment_map_length(segment) <= SEGMENT_SIZE)
		dsm_pin_mapping(segment);
	else
		dsm_detach(segment);
}

/*
 * Hand a call over to the worker, starting one if necessary, and wait for the results.
 * Returns false and sets *error if no worker is available or replies in time; errors of the call itself
 * are among its results.  Can be interrupted.
 *
 * If the worker ends meanwhile, the call is handed over to the next worker.  If the call
 * has a job by then, its request may have been sent, so the next worker does not send it
 * again, but only settles the job.
 */
bool
omni_call_run(dsm_segment *segment, OmniError *error)
{
	OmniCall   *call = dsm_segment_address(segment);
	OmniWaiter	waiter = {.call = dsm_segment_handle(segment)};
	int64		began = omni_clock();

	for (;;)
	{
		OmniCallState state = pg_atomic_read_u32(&call->state);

		pg_read_barrier();
		if (state == OMNI_CALL_DONE)
			return true;
		if (state == OMNI_CALL_LOST)
		{
			pg_atomic_write_u32(&call->state, OMNI_CALL_WAITING);
			waiter.generation = 0;
		}

		if (omni_clock() >= call->deadline + OMNI_MS(GRACE))
		{
			ConditionVariableCancelSleep();
			return !give_up(call, error);
		}
		if (state == OMNI_CALL_TAKEN)
			wait_for_latch(OMNI_LOOK_ROUND);
		else
		{
			OmniHandOver result = omni_worker_hand_over(&waiter);

			if (result == HANDED_OVER)
				wait_for_latch(OMNI_LOOK_ROUND);
			else if (result == RING_FULL)
				omni_worker_wait_for_room();
			else if ((result == NO_WORKER || result == NO_SLOT) &&
					 omni_clock() - began < OMNI_MS(START_PATIENCE))
				wait_for_latch(START_RETRY);
			else
			{
				ConditionVariableCancelSleep();
				if (call->job_id != 0)
					omni_call_lost(call, error);
				else
					omni_worker_explain(result, &call->start_error, error);
				return false;
			}
		}
	}
}

/*
 * Give up a call: from now on, the worker sends nothing for it.  Returns false if the worker
 * has just replied.
 *
 * Read the number of the job only once, since the worker may set it meanwhile.
 *
 * The worker tells the number of the job before it looks whether the call is abandoned, and only then
 * sends the request.  So if no number is seen after the exchange, which is a barrier, nothing is
 * sent.
 */
static bool
give_up(OmniCall *call, OmniError *error)
{
	static const char *const late = "the background worker of omni_refresh has not answered in time";
	char	   *why;
	int64		job_id;
	bool		taken;

	(void) pg_atomic_exchange_u32(&call->abandoned, 1);
	job_id = *(volatile int64 *) &call->job_id;
	taken = pg_atomic_read_u32(&call->state) == OMNI_CALL_TAKEN;
	if (pg_atomic_read_u32(&call->state) == OMNI_CALL_DONE)
	{
		pg_read_barrier();
		return false;
	}
	why = omni_worker_describe(taken);
	if (job_id != 0)
		omni_error_set(error, ERRCODE_TRANSACTION_RESOLUTION_UNKNOWN,
					   "%s; job " INT64_FORMAT " may have been sent", late, job_id);
	else
		omni_error_set(error, ERRCODE_CONNECTION_FAILURE, "%s", late);
	omni_error_detail(error, "%s%s.", why, job_id != 0 || (taken && call->lookup != 0) ? "" :
					  "; the request was not sent");
	omni_error_hint(error, "Look for the worker in pg_stat_activity: its process may be stopped, or wait for something.");
	return true;
}

/* Set *error to say that the worker ended before the job of a call did. */
void
omni_call_lost(const OmniCall *call, OmniError *error)
{
	omni_error_set(error, ERRCODE_TRANSACTION_RESOLUTION_UNKNOWN,
				   "the background worker ended before job " INT64_FORMAT " was finished",
				   call->job_id);
	omni_error_detail(error,
					  "If the job's status is now \"unknown\", Omni may have received the request; if it is \"canceled\", the request was not sent.");
	omni_error_hint(error,
					"Look in Omni before you send it again.  The server's log says why the worker ended.");
}

/* Wait for this process's latch, for up to timeout ms, and reset it. */
static void
wait_for_latch(long timeout)
{
	static uint32 wait_event = 0;

	if (wait_event == 0)
		wait_event = WaitEventExtensionNew("OmniRefreshCall");
	ConditionVariableCancelSleep();
	(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_EXIT_ON_PM_DEATH | WL_TIMEOUT, timeout,
					 wait_event);
	ResetLatch(MyLatch);
	CHECK_FOR_INTERRUPTS();
}

/*
 * on_dsm_detach callback of a backend, which runs on ERROR and FATAL, too: mark a call
 * that is not done as abandoned, and wake the worker to see it.
 */
static void
abandon_call(dsm_segment *segment, Datum arg)
{
	OmniCall   *call = dsm_segment_address(segment);

	kept_segment = NULL;
	if (pg_atomic_read_u32(&call->state) == OMNI_CALL_DONE)
		return;

	pg_atomic_write_u32(&call->abandoned, 1);
	omni_worker_abandon_call();
}

/*
 * In a worker that is starting: until omni_call_started(), report errors in the segment of
 * the call that the worker was started for, if any.
 */
void
omni_call_watch_start(dsm_handle call)
{
	if (call != DSM_HANDLE_INVALID)
		starter_call = dsm_attach(call);
	if (starter_call != NULL)
		dsm_pin_mapping(starter_call);
	next_emit_log_hook = emit_log_hook;
	emit_log_hook = keep_reason;
}

/* In a worker that is starting: return whether the caller that it was started for waits for it. */
bool
omni_call_starter_waits(void)
{
	OmniCall   *call;

	if (starter_call == NULL)
		return false;
	call = dsm_segment_address(starter_call);
	return pg_atomic_read_u32(&call->state) == OMNI_CALL_WAITING &&
		pg_atomic_read_u32(&call->abandoned) == 0 &&
		omni_clock() < call->deadline + OMNI_MS(GRACE);
}

/* The worker has started: stop reporting errors in the segment. */
void
omni_call_started(void)
{
	emit_log_hook = next_emit_log_hook;
	if (starter_call != NULL)
		dsm_detach(starter_call);
	starter_call = NULL;
}

/* emit_log_hook: keep an error of the start in the segment of the call. */
static void
keep_reason(ErrorData *data)
{
	if (starter_call != NULL && data->elevel >= ERROR)
	{
		OmniCall   *call = dsm_segment_address(starter_call);

		omni_error_set(&call->start_error, data->sqlerrcode, "%s", data->message);
		if (data->hint != NULL)
			omni_error_hint(&call->start_error, "%s", data->hint);
	}
	if (next_emit_log_hook != NULL)
		next_emit_log_hook(data);
}

/*
 * Take the next call out of the ring and return its segment, or NULL.  The segment stays
 * attached until it is detached explicitly; if that happens before omni_call_finish(), the
 * caller learns that its call was lost.  Sets *again if a segment could not be attached, for lack of memory
 * or of a file descriptor: its call stays in the ring, behind the others.
 */
dsm_segment *
omni_call_next(bool *again)
{
	dsm_handle	handle;

	*again = false;
	while (!*again && (handle = omni_worker_next_call()) != DSM_HANDLE_INVALID)
	{
		dsm_segment *segment = NULL;

		if (dsm_find_mapping(handle) == NULL)	/* not taken already */
			segment = attach_call(handle, again);
		omni_worker_remove_call(*again);
		if (segment != NULL)
			return segment;
	}
	return NULL;
}

/*
 * Attach the segment of a call.  Returns NULL if the caller has left, or with *failed set if
 * there was an error.
 */
static dsm_segment *
attach_call(dsm_handle handle, bool *failed)
{
	static int64 complained_at = 0;
	MemoryContext context = CurrentMemoryContext;
	dsm_segment *volatile segment = NULL;
	OmniError	error = {0};

	PG_TRY();
	{
		segment = dsm_attach(handle);
		if (segment != NULL)
		{
			OmniCall   *call = dsm_segment_address(segment);

			dsm_pin_mapping(segment);
			on_dsm_detach(segment, lose_call, (Datum) 0);
			pg_atomic_write_u32(&call->state, OMNI_CALL_TAKEN);
		}
	}
	PG_CATCH();
	{
		omni_error_catch(&error, context);

		/* a segment that could not be mapped counts as attached */
		segment = dsm_find_mapping(handle);
		if (segment != NULL)
			dsm_detach(segment);
		segment = NULL;
	}
	PG_END_TRY();

	*failed = error.sqlstate != 0;
	if (*failed && (complained_at == 0 || omni_clock() - complained_at >= OMNI_MS(COMPLAIN_ROUND)))
	{
		complained_at = omni_clock();
		ereport(LOG,
				(errcode(error.sqlstate),
				 errmsg("could not take a call, will try again: %s", error.message)));
	}
	return segment;
}

/*
 * Reply to the caller of a call, and detach the segment, which the caller may use again
 * at once.
 */
void
omni_call_finish(dsm_segment *segment, int64 job_id, const OmniError *error)
{
	OmniCall   *call = dsm_segment_address(segment);
	int			caller = call->caller;

	call->job_id = job_id;
	call->error = *error;
	cancel_on_dsm_detach(segment, lose_call, (Datum) 0);
	pg_write_barrier();
	pg_atomic_write_u32(&call->state, OMNI_CALL_DONE);
	omni_set_latch(caller);
	dsm_detach(segment);
}

/* on_dsm_detach callback of the worker: mark a call that is not done as lost. */
static void
lose_call(dsm_segment *segment, Datum arg)
{
	OmniCall   *call = dsm_segment_address(segment);

	if (pg_atomic_read_u32(&call->state) == OMNI_CALL_DONE)
		return;
	pg_write_barrier();
	pg_atomic_write_u32(&call->state, OMNI_CALL_LOST);
	omni_set_latch(call->caller);
}
