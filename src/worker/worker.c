/*-------------------------------------------------------------------------
 *
 * worker.c
 *		The background worker: one for each database that has something to do.
 *
 * The worker runs one loop.  Each turn moves all work in flight one step further, then
 * waits for the network, for a latch, or for a time.  dispatch.c puts queued jobs and polls
 * in flight, attempt.c carries out the steps:
 *
 *	NEW			a call was taken from the ring and has no row yet; or a queued job was
 *				taken from the queue, and its row says "pending"
 *	PENDING		the row of a call says "pending": the call waits for the rate limit, or
 *				backs off after an attempt that failed
 *	SENDING		the row says "sending", committed and flushed; from now on the request
 *				may have been sent
 *	ANSWERED	there is an outcome, which is not recorded yet
 *
 * Once its outcome is recorded, a call is PENDING again, or its caller gets the reply.  A
 * queued job is no longer in flight then; its row may say "pending" again.
 *
 * Each step is a transaction of its own, and none is open while the worker waits for the
 * network.  An error ends the transaction, not the worker, and leaves the work at its
 * step.  If the worker ends, the rows say how far each job has come, and the next worker
 * settles them.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "libpq/pqsignal.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/timestamp.h"

#include "base/clock.h"
#include "base/compat.h"
#include "base/setting.h"
#include "omni_refresh.h"
#include "shared/ending.h"
#include "shared/workerslot.h"
#include "store/xact.h"
#include "watch/compare.h"
#include "worker/attempt.h"
#include "worker/dispatch.h"
#include "worker/kind.h"
#include "worker/report.h"

/* How often to check whether another process waits for this worker to leave, in ms */
#define CHECK_ROUND			1000
#define CHECK_AGAIN			200 /* if that is not certain yet */

/* Delete at most this many old jobs at a time, this many ms apart */
#define PRUNE_LIMIT			200
#define PRUNE_PAUSE			100

/* How long a worker that is not for a call waits for another one to leave, in ms */
#define ATTACH_PATIENCE		5000

/*
 * Where other databases lack a worker, leave if there is nothing to do for at least this long, in
 * ms, and come back after no more than that
 */
#define YIELD_LEAST			1000
#define YIELD_MOST			60000

/* How many calls may be in flight, each with a file descriptor; the others stay in the ring */
#define MAX_CALLS			(max_safe_fds / 2)

/* When none is left, look for old jobs again after a tenth of the retention, within limits */
#define PRUNE_ROUND			(60 * 60 * 1000)
#define PRUNE_ROUND_MIN		1000

/* The state of the loop; times by omni_clock() */
typedef struct Worker
{
	uint32		wait_event;

	/* when to leave */
	int64		busy_at;		/* the last time there was any work, or 0 */
	int64		check_at;		/* the next check whether to leave */

	/* deletion of old jobs */
	int64		prune_at;		/* the next time */
	int64		pruned_to;		/* jobs up to this id are done */
	bool		prune_more;		/* there may be old ones above it */
} Worker;

static Worker worker;

PGDLLEXPORT void omni_refresh_worker_main(Datum main_arg);

static void override_settings(void);
static bool attach(void);
static long prune(void);
static bool prune_some(void *unused);
static bool turn(void);
static bool is_extension_same(void);
static bool compare_extension(void *same);
static bool has_work_for_next(void);
static bool has_caller(void);
static long move_on(void);
static bool take_calls(void);
static void begin_call(dsm_segment *segment);
static ArrayType *copy_list(MemoryContext context, OmniCall *call, Size offset);

/* The entry point of the worker.  The argument is the OID of the database. */
void
omni_refresh_worker_main(Datum main_arg)
{
	MemoryContext context = CurrentMemoryContext;
	dsm_handle	starter;
	bool		leave_at_once;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	omni_ending_watch();
	leave_at_once = omni_worker_begin(&starter);
	omni_call_watch_start(starter);
	if (starter == DSM_HANDLE_INVALID && !omni_worker_take_slot())
		return;
	BackgroundWorkerInitializeConnectionByOid(DatumGetObjectId(main_arg), InvalidOid, 0);
	override_settings();
	omni_in_worker = true;
	worker.wait_event = WaitEventExtensionNew("OmniRefreshWorker");

	StartTransactionCommand();
	if (!omni_extension_is_same())
	{
		if (starter != DSM_HANDLE_INVALID)
			ereport(FATAL,
					(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					 errmsg("extension \"%s\" does not exist in this database", OMNI_EXTENSION),
					 errhint("If it was created by the transaction that uses it, commit first.")));
		omni_worker_turn_back();
		return;
	}
	CommitTransactionCommand();
	if (!attach())
		return;
	omni_call_started();

	omni_report_begin();
	if (!leave_at_once)
		worker.busy_at = omni_clock();

	/*
	 * An error outside omni_transact() means that some resource is lacking,
	 * and may have left a call half taken: it ends the worker, so that the
	 * caller hands the call over to the next one.
	 */
	omni_block_cancel();
	while (turn())
		MemoryContextSwitchTo(context);
}

/*
 * Override settings that ALTER DATABASE or ALTER ROLE may have changed for sessions.
 * Autovacuum does the same.
 */
static void
override_settings(void)
{
	static const char *const settings[][2] = {
		{"search_path", "pg_catalog, pg_temp"},
		{"default_transaction_read_only", "off"},
		{"default_transaction_isolation", "read committed"},
		{"default_transaction_deferrable", "off"},
		{"role", "none"},
		{"row_security", "on"},
		{"session_replication_role", "origin"},
		{"exit_on_error", "off"},
		{"statement_timeout", "0"},
		{"idle_in_transaction_session_timeout", "0"},
		{"transaction_timeout", "0"},	/* 17 added it */
		{"lock_timeout", OMNI_LOCK_TIMEOUT},
		{"jit", "off"},

		/* each look of a watch reads each number once */
		{"stats_fetch_consistency", "none"},

		/* plans are made when tables are empty, and must suit full ones */
		{"plan_cache_mode", "force_generic_plan"},
		{"enable_indexscan", "on"},
		{"enable_nestloop", "on"},
		{"enable_seqscan", "off"},
		{"enable_bitmapscan", "off"},
		{"enable_sort", "off"},
		{"enable_hashjoin", "off"},
		{"enable_mergejoin", "off"},
	};

	for (int i = 0; i < lengthof(settings); i++)
	{
		if (GetConfigOption(settings[i][0], true, false) != NULL)
			SetConfigOption(settings[i][0], settings[i][1], PGC_SUSET, PGC_S_OVERRIDE);
	}
}

/*
 * Become the worker of the database once another one has left, which may serve calls of older
 * sessions, with another version of the library.  The caller that this worker was started for
 * knows how long to wait.  Returns false if that caller no longer waits.
 */
static bool
attach(void)
{
	bool		for_call = omni_call_starter_waits();
	int64		began = omni_clock();

	while (!omni_worker_attach(has_work_for_next))
	{
		if (for_call && !omni_call_starter_waits())
			return false;
		if (!for_call && omni_clock() - began >= OMNI_MS(ATTACH_PATIENCE))
			ereport(FATAL,
					(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
					 errmsg("another background worker of omni_refresh has not left")));
	}
	return true;
}

/*
 * Delete a batch of the jobs that were finished longer ago than "omni_refresh.retention",
 * if it is time to.  Returns how long to wait for the next time, in ms.
 */
static long
prune(void)
{
	int64		round;
	OmniTransacted result;
	OmniError	error;

	if (omni_retention < 0)
		return CHECK_ROUND;
	if (worker.prune_at > omni_clock())
		return omni_clock_until(worker.prune_at);

	worker.prune_more = false;
	result = omni_transact(prune_some, NULL, false, &error);
	if (result != COMMITTED)
		worker.prune_more = false;	/* begin anew in the next round */

	/*
	 * omni_check_table() of table.c writes to the log itself about a table
	 * that was altered
	 */
	if (result == FAILED &&
		error.sqlstate != ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE)
		ereport(LOG,
				(errcode(error.sqlstate),
				 errmsg("could not delete old jobs of omni_refresh: %s", error.message)));
	if (!worker.prune_more)
		worker.pruned_to = 0;
	round = Max(Min(omni_retention * INT64CONST(60000) / 10, PRUNE_ROUND), PRUNE_ROUND_MIN);
	worker.prune_at = omni_clock() + OMNI_MS(worker.prune_more ? PRUNE_PAUSE : round);
	return omni_clock_until(worker.prune_at);
}

/* The body of the transaction.  Returns false if the tables are locked. */
static bool
prune_some(void *unused)
{
	TimestampTz before = omni_earliest_now() - omni_retention * USECS_PER_MINUTE;

	if (!omni_tables_find())
		return true;
	if (!omni_tables_lock())
		return false;
	worker.prune_more = omni_job_prune(&worker.pruned_to, before, PRUNE_LIMIT);
	return true;
}

/* Run one turn of the loop.  Returns false if the worker must leave. */
static bool
turn(void)
{
	long		delay;
	long		notify;
	bool		again;

	CHECK_FOR_INTERRUPTS();
	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		ProcessConfigFile(PGC_SIGHUP);
		omni_dispatch_reload();
		worker.prune_at = 0;
	}

	if (omni_watches_due())
		omni_dispatch_soon();
	delay = move_on();
	notify = omni_notify_listeners();
	if (notify >= 0)
	{
		delay = Min(delay, notify);
		worker.busy_at = omni_clock();
	}
	omni_report_left_out();
	delay = Min(delay, prune());
	delay = Min(delay, omni_watches_delay());
	if (worker.prune_more || omni_watches_any_left())
		worker.busy_at = omni_clock();
	pgstat_report_stat(false);

	if (dlist_is_empty(&omni_works) && !omni_dispatch_any_left() && !omni_watches_any_left())
	{
		long		idle_left = omni_worker_others_lack() ? 0 :
		omni_clock_until(worker.busy_at + OMNI_MS(omni_idle_timeout));

		if (idle_left <= 0 && omni_clock() - omni_dispatch_read_at() > OMNI_MS(CHECK_ROUND))
			omni_dispatch_soon();	/* once more: COMMIT PREPARED sets no flag */
		else if (idle_left <= 0 && omni_worker_leave_if_idle())
			return false;
		pgstat_report_activity(STATE_IDLE, NULL);
		delay = Min(idle_left, delay);
	}
	else if (dlist_is_empty(&omni_works) && !omni_watches_any_left() &&
			 omni_dispatch_delay() >= YIELD_LEAST && omni_worker_others_lack() &&
			 omni_worker_yield(Min(omni_dispatch_delay(), YIELD_MOST)))
		return false;
	if (worker.check_at <= omni_clock())
	{
		bool		unwanted = omni_worker_is_unwanted(&again);

		worker.check_at = omni_clock() + OMNI_MS(again ? CHECK_AGAIN : CHECK_ROUND);
		if (!has_caller() && (unwanted || !is_extension_same()) && omni_worker_leave_if_idle())
			return false;
	}
	omni_http_wait(Min(delay, omni_clock_until(worker.check_at)), worker.wait_event);
	return true;
}

/*
 * Return whether the extension is the one that this worker began with.  True if that cannot
 * be told at the moment.
 */
static bool
is_extension_same(void)
{
	OmniError	error;
	bool		same = true;

	(void) omni_transact(compare_extension, &same, false, &error);
	return same;
}

/* The body of the transaction. */
static bool
compare_extension(void *same)
{
	*(bool *) same = omni_extension_is_same();
	return true;
}

/* Return whether the next worker would have anything to do.  Raises no error. */
static bool
has_work_for_next(void)
{
	dlist_iter	iter;

	dlist_foreach(iter, &omni_works)
	{
		if (dlist_container(OmniWork, node, iter.cur)->kind->has_job)
			return true;
	}
	return omni_dispatch_any_left() || omni_watches_any_left();
}

/* Return whether the caller of any call in flight waits for it. */
static bool
has_caller(void)
{
	dlist_iter	iter;

	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		if (work->segment != NULL && !omni_work_is_abandoned(work))
			return true;
	}
	return false;
}

/*
 * Put work in flight, and move all work in flight as far as it gets without waiting.
 * Returns how long, in ms, to wait at most before the next time.
 */
static long
move_on(void)
{
	dlist_iter	iter;
	long		delay = CHECK_ROUND;

	if (!take_calls())
		delay = OMNI_LOCAL_DELAY;
	omni_dispatch_due();
	if (omni_dispatch_any_left())
		worker.busy_at = omni_clock();
	delay = Min(delay, omni_dispatch_delay());
	if (dlist_is_empty(&omni_works))
		return delay;

	worker.busy_at = omni_clock();
	pgstat_report_activity(STATE_RUNNING, "sending refreshes to Omni");
	if (!omni_attempts_begin())
		delay = Min(delay, OMNI_LOCAL_DELAY);

	omni_attempts_send();
	omni_attempts_record();

	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		if (work->step == ANSWERED)
			delay = Min(delay, omni_clock_until(work->write_at));
		else if (work->step == PENDING && !work->beginning)
			delay = Min(delay, omni_clock_until(work->run_at));
	}
	return Min(delay, omni_dispatch_delay());
}

/* Put the calls of the ring in flight.  Returns false if one must be tried again soon. */
static bool
take_calls(void)
{
	MemoryContext context = CurrentMemoryContext;
	dsm_segment *segment;
	bool		again = false;

	while (omni_works_count(&omni_call_kind, NULL) + omni_works_count(&omni_lookup_kind, NULL) < MAX_CALLS &&
		   (segment = omni_call_next(&again)) != NULL)
	{
		PG_TRY();
		{
			begin_call(segment);
		}
		PG_CATCH();
		{
			OmniError	error;

			omni_error_catch(&error, context);
			omni_call_finish(segment, ((OmniCall *) dsm_segment_address(segment))->job_id, &error);
		}
		PG_END_TRY();
	}
	return !again;
}

/* Put a call in flight.  Once nothing can fail, the work owns the segment. */
static void
begin_call(dsm_segment *segment)
{
	OmniCall   *call = dsm_segment_address(segment);
	OmniWork   *work = omni_work_begin(call->lookup != 0 ? &omni_lookup_kind : &omni_call_kind);

	PG_TRY();
	{
		work->job.request = call->request;
		work->job.request.schemas = copy_list(work->context, call, call->schemas);
		work->job.request.tables = copy_list(work->context, call, call->tables);
	}
	PG_CATCH();
	{
		omni_work_end(work);
		PG_RE_THROW();
	}
	PG_END_TRY();
	work->job.origin = OMNI_ORIGIN_CALL;
	work->deadline = call->deadline;
	work->segment = segment;
	work->call = call;
}

/* Copy the list at an offset of a call.  Returns NULL if the offset is 0. */
static ArrayType *
copy_list(MemoryContext context, OmniCall *call, Size offset)
{
	ArrayType  *list = (ArrayType *) ((char *) call + offset);
	ArrayType  *copy;

	if (offset == 0)
		return NULL;
	copy = MemoryContextAlloc(context, VARSIZE(list));
	memcpy(copy, list, VARSIZE(list));
	return copy;
}
