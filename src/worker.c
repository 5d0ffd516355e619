/*-------------------------------------------------------------------------
 *
 * worker.c
 *		The background worker: one for each database that has something to do.
 *
 * The worker goes round one loop.  Each turn moves every piece of work in flight one step
 * further, then waits for the network, for a caller, or for a time.  dispatch.c puts queued
 * jobs and polls in flight, attempt.c carries out the steps:
 *
 *	NEW			a call was taken from the ring, and has no row yet; or a queued job from
 *				the queue, where its row says "pending"
 *	PENDING		the row of a call says "pending": it waits for the rate limit, or for
 *				another attempt after one that failed
 *	SENDING		the row says "sending", committed and flushed; from here on the request
 *				may have been sent
 *	ANSWERED	there is an outcome, which is not recorded yet
 *
 * Once the outcome is recorded, a call is PENDING again, or its caller gets the reply; a
 * queued job leaves the flight, and its row may say "pending" again.
 *
 * Each step is a transaction of its own, and none is open while the worker waits for the
 * network.  An error ends the transaction, not the worker, and leaves the work at its
 * step.  If the worker ends, the rows say how far each job had come: the next worker
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

#include "attempt.h"
#include "clock.h"
#include "compat.h"
#include "dispatch.h"
#include "kind.h"
#include "omni_refresh.h"
#include "setting.h"
#include "workerslot.h"
#include "xact.h"

/* All in ms */
#define LOOK_ROUND			1000	/* between looks whether others want the
									 * database */
#define LOOK_AGAIN			200 /* the same, when somebody may */

/* Finished jobs are deleted so many at a time, so many ms apart, and again later */
#define PRUNE_LIMIT			200
#define PRUNE_PAUSE			100
#define PRUNE_ROUND			(60 * 60 * 1000)
#define PRUNE_ROUND_MIN		1000

static int64 busy_at = 0;		/* when there was something to do, or long ago */
static int64 look_round_at = 0; /* next time, for who else wants the database */
static int64 prune_at = 0;		/* next time */
static int64 pruned_to = 0;		/* the job up to which all was looked at */
static bool prune_more = false; /* there are old ones above that */
static uint32 wait_event;

PGDLLEXPORT void omni_refresh_worker_main(Datum main_arg);

static void override_settings(void);
static long prune(void);
static bool prune_some(void *unused);
static bool turn(void);
static bool is_extension_same(void);
static bool look_at_extension(void *same);
static bool has_queued(void);
static bool is_waited_for(void);
static long move_on(void);
static void take_calls(void);
static ArrayType *copy_list(MemoryContext context, OmniCall *call, Size offset);

/*
 * The entry point.  The argument is the OID of the database.
 */
void
omni_refresh_worker_main(Datum main_arg)
{
	MemoryContext context = CurrentMemoryContext;
	volatile bool leave = false;
	dsm_handle	starter;
	bool		leave_at_once;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	leave_at_once = omni_worker_begin(&starter);
	omni_call_watch_start(starter);
	BackgroundWorkerInitializeConnectionByOid(DatumGetObjectId(main_arg), InvalidOid, 0);
	override_settings();
	omni_in_worker = true;
	wait_event = WaitEventExtensionNew("OmniRefreshWorker");

	StartTransactionCommand();
	if (!omni_extension_is_same())
	{
		if (!leave_at_once)
			ereport(FATAL,
					(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					 errmsg("extension \"%s\" does not exist in this database", OMNI_EXTENSION),
					 errhint("If it was created by the transaction that uses it, commit first.")));
		omni_worker_turn_back();
		return;
	}
	omni_worker_attach(has_queued);
	omni_call_started();
	CommitTransactionCommand();

	if (!leave_at_once)
		busy_at = omni_clock();
	while (!leave)
	{
		PG_TRY();
		{
			leave = !turn();
		}
		PG_CATCH();
		{
			/*
			 * Somebody canceled "our query": there is none.  Any other error
			 * outside of omni_transact() comes of a lack of something, and
			 * may have caught a call on its way: end, so that its caller
			 * begins anew.
			 */
			if (geterrcode() != ERRCODE_QUERY_CANCELED)
				PG_RE_THROW();
			MemoryContextSwitchTo(context);
			FlushErrorState();
		}
		PG_END_TRY();
		MemoryContextSwitchTo(context);
	}
}

/*
 * What ALTER DATABASE and ALTER ROLE set is meant for others; autovacuum does the
 * same.
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
		{"lock_timeout", "5s"},
		{"jit", "off"},

		/* plans that were made for empty tables must do for full ones */
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
 * Deletes some of what was finished longer ago than "omni_refresh.retention", if it is
 * time to.  Returns how long to wait for the next time, in ms.
 */
static long
prune(void)
{
	OmniError	error;

	if (omni_retention < 0)
		return LOOK_ROUND;
	if (prune_at <= omni_clock())
	{
		prune_more = false;
		if (omni_transact(prune_some, NULL, false, &error) == FAILED &&
			error.sqlstate != ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE) /* that is in the log */
			ereport(LOG,
					(errcode(error.sqlstate),
					 errmsg("could not delete old jobs of omni_refresh: %s", error.message)));
		if (!prune_more)
			pruned_to = 0;
		prune_at = omni_clock() +
			OMNI_MS(prune_more ? PRUNE_PAUSE :
					Max(Min(omni_retention * INT64CONST(60000) / 10, PRUNE_ROUND), PRUNE_ROUND_MIN));
	}
	return omni_clock_until(prune_at);
}

static bool
prune_some(void *unused)
{
	TimestampTz before = omni_earliest_now() - omni_retention * USECS_PER_MINUTE;

	if (!omni_tables_find())
		return true;
	if (!omni_tables_lock())
		return false;
	prune_more = omni_job_prune(&pruned_to, before, PRUNE_LIMIT);
	return true;
}

/* One turn of the loop.  Returns false when the worker has no reason to stay. */
static bool
turn(void)
{
	long		delay;
	int64		now;
	bool		again;

	CHECK_FOR_INTERRUPTS();
	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		ProcessConfigFile(PGC_SIGHUP);
		omni_dispatch_reload();
		prune_at = 0;
	}

	delay = move_on();
	omni_notify_listeners();
	delay = Min(delay, prune());
	if (prune_more)
		busy_at = omni_clock();
	pgstat_report_stat(false);

	if (dlist_is_empty(&omni_works) && !omni_dispatch_any_left())
	{
		long		idle_left = omni_clock_until(busy_at + OMNI_MS(omni_idle_timeout));

		if (idle_left <= 0 && omni_clock() - omni_dispatch_read_at() > OMNI_MS(LOOK_ROUND))
			omni_dispatch_soon();	/* once more: COMMIT PREPARED wakes nobody */
		else if (idle_left <= 0 && omni_worker_leave_if_idle())
			return false;
		pgstat_report_activity(STATE_IDLE, NULL);
		delay = Min(idle_left, delay);
	}
	now = omni_clock();
	if (look_round_at <= now)
	{
		bool		unwanted = omni_worker_is_unwanted(&again);

		look_round_at = now + OMNI_MS(again ? LOOK_AGAIN : LOOK_ROUND);
		if (!is_waited_for() && (unwanted || !is_extension_same()) && omni_worker_leave_if_idle())
			return false;
	}
	omni_http_wait(Min(delay, omni_clock_until(look_round_at)), wait_event);
	return true;
}

/* Whether the extension is the one we began with, as far as can be told. */
static bool
is_extension_same(void)
{
	OmniError	error;
	bool		same = true;

	(void) omni_transact(look_at_extension, &same, false, &error);
	return same;
}

/* The body of that transaction. */
static bool
look_at_extension(void *same)
{
	*(bool *) same = omni_extension_is_same();
	return true;
}

/* Whether there is anything that the next worker would go on with. */
static bool
has_queued(void)
{
	return omni_dispatch_any_left() || omni_works_count(&omni_queued_kind, NULL) > 0 || omni_works_count(&omni_poll_kind, NULL) > 0;
}

/* Whether some caller waits for one of the jobs in flight. */
static bool
is_waited_for(void)
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
 * Moves all jobs in flight as far as they get without waiting.  Returns how long,
 * in ms, to wait at most before the next time.
 */
static long
move_on(void)
{
	dlist_iter	iter;
	long		delay = LOOK_ROUND;

	take_calls();
	omni_dispatch_due();
	if (omni_dispatch_any_left())
		busy_at = omni_clock();
	delay = Min(delay, omni_dispatch_delay());
	if (dlist_is_empty(&omni_works))
		return delay;

	busy_at = omni_clock();
	pgstat_report_activity(STATE_RUNNING, "sending refreshes to Omni");
	if (!omni_attempts_begin())
		delay = OMNI_LOCAL_DELAY;

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

static void
take_calls(void)
{
	dsm_segment *segment;

	while ((segment = omni_call_next()) != NULL)
	{
		OmniCall   *call = dsm_segment_address(segment);
		OmniWork   *work = omni_work_begin(call->lookup != 0 ? &omni_lookup_kind : &omni_call_kind);

		work->job.origin = OMNI_ORIGIN_CALL;
		work->job.request = call->request;
		work->job.request.schemas = copy_list(work->context, call, call->schemas);
		work->job.request.tables = copy_list(work->context, call, call->tables);
		work->deadline = call->deadline;
		work->segment = segment;
		work->call = call;
	}
}

/* Copies a list that lies at an offset in a call; NULL if there is none. */
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

