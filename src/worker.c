/*-------------------------------------------------------------------------
 *
 * worker.c
 *		The background worker: one for each database that has something to do.
 *
 * The worker goes round one loop.  Each turn moves every job it has in hand one
 * step further, then waits for the network, for a caller, or for a time:
 *
 *	NEW			taken from the ring, and nothing is written; or from the queue,
 *				where its row says "pending"
 *	PENDING		a call's row says "pending": it must wait for the rate limit, or
 *				for the next attempt after one that failed
 *	SENDING		its row says "sending", committed and flushed; from here on the
 *				request may be, or have been, on its way
 *	ANSWERED	there is an outcome, which is not written yet
 *	then its row bears the outcome; a call is PENDING again, or its caller is told
 *	and it is let go; a queued job is let go, and may be "pending" again
 *
 * What is queued stays in its table until it can be sent at once.  The queue is
 * looked at when a commit has set our flag, when something in it is due, and when
 * there is room again for more at a server.
 *
 * Each step is a transaction of its own, and none is open while the network is
 * waited for.  An error ends the transaction, not the worker, and leaves the job
 * at its step.  All jobs whose attempts begin in a turn share one transaction and
 * so one flush of the WAL; outcomes are written as they come, one by one, so that no
 * caller waits for another one's commit.
 *
 * Should the worker end, the rows say how far each job had come: the next worker
 * settles them in its first transaction.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "executor/spi.h"
#include "lib/ilist.h"
#include "libpq/pqsignal.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "tcop/tcopprot.h"
#include "utils/builtins.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timeout.h"
#include "utils/timestamp.h"

#include "compat.h"
#include "omni_refresh.h"

/* All in ms */
#define STATEMENT_LIMIT		30000	/* no statement of ours takes this long */
#define LOCK_PATIENCE		5000	/* how long new calls wait for our tables */
#define RETRY_DELAY			100 /* before something local is tried again */
#define RETRY_DELAY_MAX		30000	/* the same, when it fails again and again */
#define LOOK_ROUND			1000	/* between looks whether others want the
									 * database */
#define BACKOFF_FIRST		1000	/* before a second attempt at most, then
									 * doubled */
#define BACKOFF_MAX			(5 * 60 * 1000)
#define SHORTEST_ATTEMPT	100 /* no attempt with less time than that */

/* Jobs of the queue to read at a time, for those that must wait as well */
#define SMALLEST_CLAIM		16

/* A job that Omni has accepted is asked about for the first time after so many ms ... */
#define FOLLOW_FIRST		2000
#define FOLLOW_LONGEST		30000	/* ... later not less often than that ... */
#define FOLLOW_EARLY		30000	/* ... and may be unknown to it for so
									 * long */

/* Finished jobs are deleted so many at a time, so many ms apart, and again later */
#define PRUNE_LIMIT			200
#define PRUNE_PAUSE			100
#define PRUNE_ROUND			(60 * 60 * 1000)
#define PRUNE_ROUND_MIN		1000

/* After a look at the queue, the next for what is new waits so many times longer */
#define LOOK_PAUSE			4
#define LOOK_PAUSE_MAX		(INT64CONST(200) * 1000)	/* microseconds */

typedef enum Step
{
	NEW,
	PENDING,
	SENDING,
	ANSWERED
} Step;

/* A job in hand */
typedef struct Work
{
	dlist_node	node;
	MemoryContext context;		/* holds all of this */
	OmniJob		job;
	OmniRateClass class;		/* a call, a job of the queue, or a question
								 * about one that is followed */
	bool		lookup;			/* a call that is no job: nothing is written */
	Step		step;
	TimestampTz taken_at;
	dsm_segment *segment;		/* of a call; NULL once the caller knows all */
	OmniCall   *call;			/* in that segment */
	TimestampTz deadline;		/* no attempt begins after it, but a queued
								 * job's first */
	TimestampTz run_at;			/* if PENDING: the next attempt */
	bool		beginning;		/* it is to begin in this turn */
	bool		recording;		/* its outcome is to be written in this turn */
	bool		may_have_arrived;	/* some attempt ended without an answer */
	TimestampTz write_at;		/* if ANSWERED: the next try to write it down */
	int			write_failures;

	/* the attempt that is about to begin, or under way */
	MemoryContext attempt;		/* holds what follows, within context */
	OmniTarget	target;
	uint64		rate_id;
	char	   *url;
	OmniTransfer *transfer;		/* NULL before it is sent */
	TimestampTz delayed_until;	/* by the rate limit, else 0 */
	bool		gone;			/* the row is not pending any more, or is
								 * locked */
	bool		settled;		/* outcome is set */
	OmniOutcome outcome;
} Work;

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

typedef enum Transacted
{
	COMMITTED,
	NOT_NOW,					/* somebody holds a lock on our tables */
	FAILED
} Transacted;

/* In this process settings and search_path are ours. */
bool		omni_in_worker = false;

static dlist_head works = DLIST_STATIC_INIT(works);
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
static TimestampTz busy_at = 0; /* when there was something to do, or long ago */
static TimestampTz looked_round_at = 0; /* for who else wants the database */
static bool to_notify = false;	/* there is something to be told to listeners */
static TimestampTz prune_at = DT_NOBEGIN;	/* next time */
static int64 pruned_to = 0;		/* the job up to which all was looked at */
static bool prune_more = false; /* there are old ones above that */
static uint32 wait_event;

PGDLLEXPORT void omni_refresh_worker_main(Datum main_arg);

static void override_settings(void);
static Transacted transact(bool (*body) (void *), void *arg, bool flush, OmniError *error);
static bool turn(void);
static void notify(void);
static bool send_notices(void *unused);
static long prune(void);
static bool prune_some(void *unused);
static bool is_extension_same(void);
static bool look_at_extension(void *same);
static bool has_queued(void);
static long move_on(void);
static void take_calls(void);
static Work *make_work(OmniRateClass class);
static ArrayType *copy_list(MemoryContext context, OmniCall *call, Size offset);
static void look_soon(void);
static long queue_delay(void);
static void look_at_queue(void);
static bool claimed_any(void);
static bool claim(void *unused);
static bool claim_due(OmniRateClass class, TimestampTz now);
static ArrayType *list_held(OmniRateClass class, TimestampTz now);
static int	in_flight(OmniRateClass class, const NameData *server);
static bool is_in_hand(OmniRateClass class, int64 id);
static TimestampTz held_until(OmniJob *job, TimestampTz now);
static void note_sent(int64 merge_key, TimestampTz sent_at);
static void forget_sent(TimestampTz before);
static void settle_left_behind(void);
static bool begin_due(void);
static bool is_late(Work *work);
static bool choose(Work *work);
static bool begin(void *only);
static void lock_queued(Work *only);
static void begin_one(Work *work);
static void refuse(Work *work);
static void hold(Work *work, TimestampTz until);
static TimestampTz rate_held_until(Work *work);
static bool find_target(Work *work, OmniError *error);
static void begun(Work *work);
static void send_request(Work *work);
static void record_due(void);
static bool record(void *only);
static void record_later(Work *work, Transacted result, const OmniError *why);
static void decide(Work *work);
static void consider_next_question(Work *work);
static const char *looked_up(Work *work);
static bool is_probe(Work *work);
static void tell_probed(Work *work, const OmniAnswer *answer);
static void finished(Work *work);
static bool is_about_resources(int sqlstate);
static void consider_retry(Work *work);
static void withdraw(Work *work);
static void settle(Work *work, const char *status, const OmniError *error);
static void tell(Work *work, int64 job_id, const OmniError *error);
static void end_attempt(Work *work);
static void let_go(Work *work);
static bool is_forsaken(Work *work);
static bool is_wanted(void *work);
static bool is_waited_for(void);

/*
 * The entry point.  The argument is the OID of the database.
 */
void
omni_refresh_worker_main(Datum main_arg)
{
	MemoryContext context = CurrentMemoryContext;
	volatile bool leave = false;
	bool		leave_at_once;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	leave_at_once = omni_worker_begin();
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
	omni_worker_attach();
	CommitTransactionCommand();

	if (!leave_at_once)
		busy_at = GetCurrentTimestamp();
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
			 * outside of transact() comes of a lack of something, and may
			 * have caught a call on its way: end, so that its caller begins
			 * anew.
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
		{"session_replication_role", "origin"},
		{"statement_timeout", "0"},
		{"idle_in_transaction_session_timeout", "0"},
		{"lock_timeout", "5s"},
		{"jit", "off"},

		/* plans that were made for empty tables must do for full ones */
		{"plan_cache_mode", "force_generic_plan"},
		{"enable_seqscan", "off"},
		{"enable_bitmapscan", "off"},
		{"enable_hashjoin", "off"},
		{"enable_mergejoin", "off"},
	};

	for (int i = 0; i < lengthof(settings); i++)
		SetConfigOption(settings[i][0], settings[i][1], PGC_SUSET, PGC_S_OVERRIDE);
}

/*
 * Runs a function in a transaction, with SPI and a snapshot.  If it returns
 * false, or raises an error, what it did is rolled back; an error that comes of
 * what others are doing means NOT_NOW, too.  With flush, what it did
 * is on this server's disk afterwards; no standby is waited for, since a dead one
 * must not keep us.
 *
 * The setting statement_timeout does nothing in a background worker, so that the
 * timeout itself is armed.
 */
static Transacted
transact(bool (*body) (void *), void *arg, bool flush, OmniError *error)
{
	MemoryContext context = CurrentMemoryContext;
	volatile Transacted result = FAILED;

	PG_TRY();
	{
		SetCurrentStatementStartTimestamp();
		StartTransactionCommand();
		SetConfigOption("synchronous_commit", flush ? "local" : "off",
						PGC_SUSET, PGC_S_OVERRIDE);
		enable_timeout_after(STATEMENT_TIMEOUT, STATEMENT_LIMIT);
		SPI_connect();
		PushActiveSnapshot(GetTransactionSnapshot());
		omni_events_begin();
		omni_notify_begin();
		result = body(arg) ? COMMITTED : NOT_NOW;
		if (result == COMMITTED)
			omni_events_write();
		PopActiveSnapshot();
		SPI_finish();
		disable_timeout(STATEMENT_TIMEOUT, false);
		if (result == COMMITTED)
			CommitTransactionCommand();
		else
			AbortCurrentTransaction();
	}
	PG_CATCH();
	{
		disable_timeout(STATEMENT_TIMEOUT, false);
		omni_error_catch(error, context);
		AbortCurrentTransaction();
		result = error->sqlstate == ERRCODE_QUERY_CANCELED ||
			error->sqlstate == ERRCODE_LOCK_NOT_AVAILABLE ||
			ERRCODE_TO_CATEGORY(error->sqlstate) == ERRCODE_TRANSACTION_ROLLBACK ? NOT_NOW : FAILED;
	}
	PG_END_TRY();

	MemoryContextSwitchTo(context);
	if (result == COMMITTED)
		to_notify = omni_notify_committed();
	return result;
}

/* Sends what is to be said about jobs whose rows say so by now. */
static void
notify(void)
{
	OmniError	error;

	if (!to_notify)
		return;
	if (transact(send_notices, NULL, false, &error) == FAILED)
		ereport(LOG,
				(errcode(error.sqlstate),
				 errmsg("could not notify listeners of omni_refresh: %s", error.message)));
	omni_notify_end();
	to_notify = false;
}

static bool
send_notices(void *unused)
{
	omni_notify_send();
	return true;
}

/*
 * Deletes some of what was finished longer ago than "omni_refresh.retention", if it is
 * time to.  Returns how long to wait for the next time, in ms.
 */
static long
prune(void)
{
	TimestampTz now = GetCurrentTimestamp();
	OmniError	error;

	if (omni_retention < 0)
		return LOOK_ROUND;
	if (prune_at <= now)
	{
		prune_more = false;
		if (transact(prune_some, NULL, false, &error) == FAILED)
			ereport(LOG,
					(errcode(error.sqlstate),
					 errmsg("could not delete old jobs of omni_refresh: %s", error.message)));
		if (!prune_more)
			pruned_to = 0;
		prune_at = TimestampTzPlusMilliseconds(now, prune_more ? PRUNE_PAUSE :
											   Max(Min(omni_retention * INT64CONST(60000) / 10, PRUNE_ROUND), PRUNE_ROUND_MIN));
	}
	return TimestampDifferenceMilliseconds(now, prune_at);
}

static bool
prune_some(void *unused)
{
	TimestampTz before = GetCurrentTimestamp() - omni_retention * USECS_PER_MINUTE;

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
	TimestampTz now;

	CHECK_FOR_INTERRUPTS();
	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		ProcessConfigFile(PGC_SIGHUP);
		look_soon();
		prune_at = DT_NOBEGIN;
	}

	delay = move_on();
	notify();
	delay = Min(delay, prune());
	if (prune_more)
		busy_at = GetCurrentTimestamp();
	pgstat_report_stat(false);

	if (dlist_is_empty(&works) && !queue_left)
	{
		long		idle_left = omni_idle_timeout -
		Min(TimestampDifferenceMilliseconds(busy_at, GetCurrentTimestamp()), INT_MAX);

		if (idle_left <= 0 && TimestampDifferenceExceeds(looked_at, GetCurrentTimestamp(), LOOK_ROUND))
			look_soon();		/* once more: COMMIT PREPARED wakes nobody */
		else if (idle_left <= 0 && omni_worker_leave_if_idle(false))
			return false;
		pgstat_report_activity(STATE_IDLE, NULL);
		delay = Min(Max(idle_left, 0), delay);
	}
	now = GetCurrentTimestamp();
	if (now < looked_round_at || TimestampDifferenceExceeds(looked_round_at, now, LOOK_ROUND))
	{
		looked_round_at = now;
		if (!is_waited_for() && (omni_worker_is_unwanted() || !is_extension_same()) &&
			omni_worker_leave_if_idle(has_queued()))
			return false;
	}
	omni_http_wait(delay, wait_event);
	return true;
}

/* Whether the extension is the one we began with, as far as can be told. */
static bool
is_extension_same(void)
{
	OmniError	error;
	bool		same = true;

	(void) transact(look_at_extension, &same, false, &error);
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
	return queue_left || in_flight(OMNI_RATE_JOB, NULL) > 0 || in_flight(OMNI_RATE_POLL, NULL) > 0;
}

/* Whether some caller waits for one of the jobs in hand. */
static bool
is_waited_for(void)
{
	dlist_iter	iter;

	dlist_foreach(iter, &works)
	{
		Work	   *work = dlist_container(Work, node, iter.cur);

		if (work->segment != NULL && !is_forsaken(work))
			return true;
	}
	return false;
}

/*
 * Moves all jobs in hand as far as they get without waiting.  Returns how long,
 * in ms, to wait at most before the next time.
 */
static long
move_on(void)
{
	dlist_iter	iter;
	long		delay = LOOK_ROUND;

	take_calls();
	if (look_for_new_from <= GetCurrentTimestamp() && omni_worker_take_flag())
		look_soon();
	if (look_at <= GetCurrentTimestamp() && (!look_for_new || look_for_new_from <= GetCurrentTimestamp()))
		look_at_queue();
	if (queue_left)
		busy_at = GetCurrentTimestamp();
	delay = Min(delay, queue_delay());
	if (dlist_is_empty(&works))
		return delay;

	busy_at = GetCurrentTimestamp();
	pgstat_report_activity(STATE_RUNNING, "sending refreshes to Omni");
	if (!begin_due())
		delay = RETRY_DELAY;

	dlist_foreach(iter, &works)
	{
		Work	   *work = dlist_container(Work, node, iter.cur);

		if (work->step == SENDING && work->transfer == NULL)
			send_request(work);
		if (work->step == SENDING && work->transfer->done)
			work->step = ANSWERED;
	}
	record_due();

	dlist_foreach(iter, &works)
	{
		Work	   *work = dlist_container(Work, node, iter.cur);

		if (work->step == ANSWERED)
			delay = Min(delay, TimestampDifferenceMilliseconds(GetCurrentTimestamp(), work->write_at));
		else if (work->step == PENDING && !work->beginning)
			delay = Min(delay, TimestampDifferenceMilliseconds(GetCurrentTimestamp(), work->run_at));
	}
	return Min(delay, queue_delay());
}

static void
take_calls(void)
{
	dsm_segment *segment;

	while ((segment = omni_worker_next_call()) != NULL)
	{
		Work	   *work = make_work(OMNI_RATE_CALL);
		OmniCall   *call = dsm_segment_address(segment);

		work->lookup = call->lookup != 0;
		work->job.origin = OMNI_ORIGIN_CALL;
		work->job.request = call->request;
		work->job.schemas = copy_list(work->context, call, call->schemas);
		work->job.tables = copy_list(work->context, call, call->tables);
		work->deadline = call->deadline;
		work->segment = segment;
		work->call = call;
	}
}

/* Takes a job in hand. */
static Work *
make_work(OmniRateClass class)
{
	MemoryContext context = AllocSetContextCreate(TopMemoryContext, "omni_refresh job",
												  ALLOCSET_SMALL_SIZES);
	Work	   *work = MemoryContextAllocZero(context, sizeof(Work));

	work->context = context;
	work->attempt = AllocSetContextCreate(context, "omni_refresh attempt",
										  ALLOCSET_SMALL_SIZES);
	work->class = class;
	work->taken_at = GetCurrentTimestamp();
	dlist_push_tail(&works, &work->node);
	return work;
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

/* Has the queue looked at in the next turn; until then nobody knows that it is empty. */
static void
look_soon(void)
{
	look_for_new = true;
	look_at = DT_NOBEGIN;
	queue_left = true;
}

/*
 * How long to wait, in ms, for the queue's sake.  What is new is not looked for more
 * often than it is worth; see look_at_queue().
 */
static long
queue_delay(void)
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
	Transacted	result;

	if (next_due <= began)
		look_for_new = true;
	look_at = DT_NOEND;
	omni_error_set(&error, ERRCODE_LOCK_NOT_AVAILABLE,
				   "another session holds a lock on the tables of omni_refresh");
	result = transact(claim, NULL, false, &error);
	if (result == COMMITTED)
	{
		settled_all = true;
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

	dlist_foreach_modify(iter, &works)
	{
		Work	   *work = dlist_container(Work, node, iter.cur);

		if (work->class != OMNI_RATE_CALL && work->step == NEW)
			let_go(work);
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

	dlist_foreach(iter, &works)
	{
		Work	   *work = dlist_container(Work, node, iter.cur);

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
	settle_left_behind();

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
	int			limit = Max(omni_max_in_flight, SMALLEST_CLAIM) + in_flight(class, NULL);
	bool		any = false;
	int			count;

	do
	{
		OmniJob    *jobs = omni_job_due(now, class == OMNI_RATE_POLL, list_held(class, now), limit, &count);

		for (int i = 0; i < count; i++)
		{
			OmniJob    *job = &jobs[i];
			TimestampTz until;
			Work	   *work;
			MemoryContext context;

			if (is_in_hand(class, job->id))
				continue;		/* a question does not change its row */
			if (in_flight(class, &job->request.server) >= omni_max_in_flight)
				continue;		/* the next round leaves them out */
			if (class == OMNI_RATE_JOB && (until = held_until(job, now)) != 0)
			{
				omni_job_defer(job->id, until);
				continue;
			}
			work = make_work(class);
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
	dlist_foreach(iter, &works)
	{
		Work	   *work = dlist_container(Work, node, iter.cur);
		NameData   *server = &work->job.request.server;

		if (work->class == class && strcmp(NameStr(*server), last) != 0 &&
			in_flight(class, server) >= omni_max_in_flight)
		{
			last = NameStr(*server);
			accumArrayResult(names, CStringGetTextDatum(last), false, TEXTOID, CurrentMemoryContext);
		}
	}
	return DatumGetArrayTypeP(makeArrayResult(names, CurrentMemoryContext));
}

/* How many of a class are in hand for a server, or for any if that is NULL. */
static int
in_flight(OmniRateClass class, const NameData *server)
{
	int			n = 0;
	dlist_iter	iter;

	dlist_foreach(iter, &works)
	{
		Work	   *work = dlist_container(Work, node, iter.cur);

		if (work->class == class &&
			(server == NULL || strcmp(NameStr(work->job.request.server), NameStr(*server)) == 0))
			n++;
	}
	return n;
}

static bool
is_in_hand(OmniRateClass class, int64 id)
{
	dlist_iter	iter;

	dlist_foreach(iter, &works)
	{
		Work	   *work = dlist_container(Work, node, iter.cur);

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
	dlist_foreach(iter, &works)
	{
		Work	   *work = dlist_container(Work, node, iter.cur);

		if (work->class == OMNI_RATE_JOB && work->job.merge_key == job->merge_key)
			until = TimestampTzPlusMilliseconds(now, omni_min_interval);
	}
	sent = hash_search(last_sent, &job->merge_key, HASH_FIND, NULL);
	if (until == 0 && sent != NULL && sent->sent_at <= now)
		until = TimestampTzPlusMilliseconds(sent->sent_at, omni_min_interval);
	return until > now ? until : 0;
}

static void
note_sent(int64 merge_key, TimestampTz sent_at)
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
static void
settle_left_behind(void)
{
	HASHCTL		info = {.keysize = sizeof(int64),.entrysize = sizeof(LastSent)};

	if (settled_all)
		return;
	omni_job_settle();
	if (last_sent != NULL)
		hash_destroy(last_sent);
	last_sent = hash_create("omni_refresh last sent", 64, &info, HASH_ELEM | HASH_BLOBS);
	omni_job_recent(GetCurrentTimestamp() - omni_min_interval * INT64CONST(1000), note_sent);
}

/*
 * Writes down the attempts that should begin, in one transaction.  If that fails,
 * each gets one of its own, so that nobody suffers for another one's error.
 * Returns false if it must be tried again.
 */
static bool
begin_due(void)
{
	dlist_mutable_iter iter;
	OmniError	error;
	Transacted	result = COMMITTED;
	int			count = 0;

	dlist_foreach_modify(iter, &works)
	{
		if (choose(dlist_container(Work, node, iter.cur)))
			count++;
	}
	if (count > 0)
		result = transact(begin, NULL, true, &error);

	dlist_foreach_modify(iter, &works)
	{
		Work	   *work = dlist_container(Work, node, iter.cur);
		Transacted	own = result;

		if (!work->beginning)
			continue;
		if (own == FAILED && count > 1)
			own = transact(begin, work, true, &error);

		if (work->class != OMNI_RATE_CALL && (own == NOT_NOW || (own == FAILED && is_about_resources(error.sqlstate))))
		{
			let_go(work);		/* it stays in the queue */
			look_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(),
												  own == NOT_NOW ? RETRY_DELAY : RETRY_DELAY_MAX / 10);
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
			tell(work, work->call->job_id, &error);
		}
		else if (own == FAILED)
		{
			settle(work, "failed", &error);
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
is_late(Work *work)
{
	TimestampTz now = GetCurrentTimestamp();

	return now >= work->deadline ||
		TimestampDifferenceExceeds(work->step == NEW ? work->taken_at : work->run_at,
								   now, LOCK_PATIENCE);
}

/* Decides whether an attempt should begin in this turn, or never. */
static bool
choose(Work *work)
{
	TimestampTz now = GetCurrentTimestamp();

	work->beginning = false;
	if (is_forsaken(work))
	{
		if (work->step == NEW)
			let_go(work);		/* nothing is written */
		else if (work->step == PENDING)
			withdraw(work);
		return false;
	}

	/* a time later than any wait of ours comes of a clock that was set back */
	work->beginning = work->step == NEW ||
		(work->step == PENDING && (work->run_at <= now || work->run_at > now + OMNI_MAX_WAIT));
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
	if (!omni_tables_lock())
		return false;

	settle_left_behind();
	lock_queued(only);
	dlist_foreach(iter, &works)
	{
		Work	   *work = dlist_container(Work, node, iter.cur);

		if (work->beginning && (only == NULL || only == work))
			begin_one(work);
	}
	return true;
}

/* Sets whether the jobs of the queue that are to begin are gone, or locked by others. */
static void
lock_queued(Work *only)
{
	List	   *queued = NIL;
	ListCell   *cell;
	int64	   *ids;
	bool	   *locked;
	dlist_iter	iter;

	dlist_foreach(iter, &works)
	{
		Work	   *work = dlist_container(Work, node, iter.cur);

		work->gone = false;
		if (work->beginning && work->class == OMNI_RATE_JOB && (only == NULL || only == work))
			queued = lappend(queued, work);
	}
	if (queued == NIL)
		return;

	ids = palloc(list_length(queued) * sizeof(int64));
	foreach(cell, queued)
		ids[foreach_current_index(cell)] = ((Work *) lfirst(cell))->job.id;
	locked = omni_job_lock(ids, list_length(queued));
	foreach(cell, queued)
		((Work *) lfirst(cell))->gone = !locked[foreach_current_index(cell)];
}

/*
 * Writes down that an attempt begins, or why not.  What that means for the job is
 * decided here but takes effect in begun(), after the commit.
 */
static void
begin_one(Work *work)
{
	TimestampTz now = GetCurrentTimestamp();
	OmniError	error;
	TimestampTz when;
	bool		blocked;

	if (work->step == NEW && work->class == OMNI_RATE_CALL)
		work->job.id = 0;		/* this may be the second try */
	end_attempt(work);
	work->settled = false;
	work->delayed_until = 0;

	if (work->class != OMNI_RATE_CALL)
	{
		work->delayed_until = rate_held_until(work);	/* set just now, by
														 * others of its kind */
		if (work->gone || work->delayed_until != 0)
			return;
	}
	if (work->class == OMNI_RATE_JOB && work->job.attempts > 0)
		work->may_have_arrived = omni_job_may_have_arrived(work->job.id);
	if (work->step == NEW && work->class == OMNI_RATE_CALL && work->call->job_id != 0)
	{
		/* it was an earlier worker's, and is settled now */
		work->job.id = work->call->job_id;
		omni_call_lost(work->call, &error);
		settle(work, "unknown", &error);
		return;
	}
	if (!find_target(work, &error))
	{
		settle(work, "failed", &error);
		if (work->class != OMNI_RATE_CALL && work->target.key_file != NULL && now < work->deadline)
		{
			/* the file cannot be read, but may come back */
			work->outcome.quiet = work->class == OMNI_RATE_POLL;
			work->outcome.status = work->outcome.quiet ? "running" : "pending";
			work->outcome.attempt_event = "attempt_failed";
			work->outcome.run_at = TimestampTzPlusMilliseconds(now, BACKOFF_MAX);
		}
		refuse(work);
		return;
	}

	when = omni_rate_take(work->rate_id, work->class, work->target.rate_limit, &blocked);
	if (when == 0)
	{
		if (work->class != OMNI_RATE_POLL && !work->lookup)
			work->gone = !omni_job_begin(&work->job, work->url);
	}
	else if (when < work->deadline || work->class != OMNI_RATE_CALL)
	{
		work->delayed_until = when;
		if (work->class != OMNI_RATE_POLL && !work->lookup)
			omni_job_delay(&work->job, when);
		if (work->class != OMNI_RATE_CALL)
			hold(work, when);
	}
	else if (work->job.attempts > 0)
	{
		error = work->outcome.error;	/* of the last attempt */
		settle(work, "failed", &error);
		refuse(work);
	}
	else
	{
		omni_error_set(&error, ERRCODE_INSUFFICIENT_RESOURCES,
					   "the rate limit of server \"%s\" leaves no room for this request before %s",
					   NameStr(work->job.request.server), timestamptz_to_str(when));
		omni_error_detail(&error, "That would be after the end of \"omni_refresh.call_timeout\"; the request was not sent.");
		if (blocked)
			omni_error_hint(&error, "Omni has asked for a pause with this key; others may be using it, too.");
		else
			omni_error_hint(&error, "The option \"rate_limit\" of the server allows %d requests a minute with one key, from all databases.",
							work->target.rate_limit);
		settle(work, "canceled", &error);
		refuse(work);
	}
}

/* Writes down that an attempt does not even begin. */
static void
refuse(Work *work)
{
	if (work->class == OMNI_RATE_POLL)
		omni_job_record(&work->job, &work->outcome);
	else if (!work->lookup)
		omni_job_refuse(&work->job, &work->outcome);
}

/* Lets what a role has for a server wait, of the same class. */
static void
hold(Work *work, TimestampTz until)
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

/* Until when hold() lets something wait, or 0. */
static TimestampTz
rate_held_until(Work *work)
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

/*
 * Finds out where the request goes, in the committed view.  The caller of a call has
 * seen server and mapping, and that he may use them: if we do not, his transaction is
 * not committed, or another one just was.
 */
static bool
find_target(Work *work, OmniError *error)
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
		if (work->class == OMNI_RATE_CALL)
			omni_error_hint(error, "If this transaction has created or renamed it, commit first.");
	}
	else if (!(found = omni_target_find(NameStr(request->server), request->role, &work->target, error)) &&
			 work->class == OMNI_RATE_CALL)
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
		work->url = work->lookup ? omni_api_lookup_url(work->target.base_url, looked_up(work)) :
			work->class == OMNI_RATE_POLL ? omni_api_follow_url(work->target.base_url, &work->job.job_id) :
			omni_api_job_url(work->target.base_url, &work->job);
	}
	MemoryContextSwitchTo(context);
	return found;
}

/* What begin_one() did is committed. */
static void
begun(Work *work)
{
	settled_all = true;
	work->beginning = false;
	if (work->call != NULL)
		work->call->job_id = work->job.id;

	if (work->gone && work->call == NULL)
	{
		/* somebody has changed it meanwhile, or is about to */
		look_at = Min(look_at, TimestampTzPlusMilliseconds(GetCurrentTimestamp(), RETRY_DELAY));
		let_go(work);
	}
	else if (work->gone)
	{
		OmniError	error;

		omni_error_set(&error, ERRCODE_NO_DATA_FOUND,
					   "job " INT64_FORMAT " was deleted or ended by another session before it was sent", work->job.id);
		tell(work, work->job.id, &error);
	}
	else if (work->settled)
		finished(work);
	else if (work->delayed_until != 0 && work->class != OMNI_RATE_CALL)
	{
		look_at = Min(look_at, work->delayed_until);
		let_go(work);
	}
	else if (work->delayed_until != 0)
	{
		work->run_at = work->delayed_until;
		work->step = PENDING;
	}
	else
	{
		if (work->class != OMNI_RATE_POLL)
			work->job.attempts++;
		work->step = SENDING;
		if (work->class == OMNI_RATE_JOB)
			note_sent(work->job.merge_key, GetCurrentTimestamp());
	}
}

/* Sends the request of a job; when it comes to that, unless its caller has left. */
static void
send_request(Work *work)
{
	MemoryContext context = CurrentMemoryContext;
	long		left = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), work->deadline);
	OmniHttpRequest request = {
		.method = work->lookup || work->class == OMNI_RATE_POLL ? "GET" : "POST",
		.url = work->url,
		.bearer = work->target.key,
		.probe = work->lookup && work->call->probe,
		.ca_file = work->target.ca_file,
		.proxy = work->target.proxy,
		.connect_timeout = work->target.connect_timeout,
		.timeout = work->class != OMNI_RATE_CALL ? work->target.timeout : Max(Min(work->target.timeout, left), 1),
		.is_wanted = is_wanted,
		.arg = work
	};
	OmniError	error;

	PG_TRY();
	{
		MemoryContextSwitchTo(work->attempt);
		request.body = omni_api_job_body(&work->job);
		work->transfer = omni_http_start(&request);
	}
	PG_CATCH();
	{
		omni_error_catch(&error, context);
		settle(work, "failed", &error);
		work->step = ANSWERED;
	}
	PG_END_TRY();
	MemoryContextSwitchTo(context);
}

/*
 * Writes down what became of attempts, in one transaction for all whose answers
 * have come meanwhile.  If that fails, each gets one of its own.
 */
static void
record_due(void)
{
	dlist_mutable_iter iter;
	OmniError	error;
	Transacted	result = COMMITTED;
	int			count = 0;

	dlist_foreach_modify(iter, &works)
	{
		Work	   *work = dlist_container(Work, node, iter.cur);

		work->recording = work->step == ANSWERED && work->write_at <= GetCurrentTimestamp();
		if (work->recording)
			count++;
	}
	if (count > 0)
		result = transact(record, NULL, false, &error);

	dlist_foreach_modify(iter, &works)
	{
		Work	   *work = dlist_container(Work, node, iter.cur);
		Transacted	own = result;

		if (!work->recording)
			continue;
		if (own == FAILED && count > 1)
			own = transact(record, work, false, &error);
		work->recording = false;
		if (own == COMMITTED)
			finished(work);
		else
			record_later(work, own, &error);
	}
}

/*
 * The outcome of a job could not be written: the job stays in our hands and is not
 * sent again until it is.
 */
static void
record_later(Work *work, Transacted result, const OmniError *why)
{
	OmniError	error = *why;
	int			delay;

	if (result == NOT_NOW)
		omni_error_set(&error, ERRCODE_LOCK_NOT_AVAILABLE,
					   "another session holds a lock on the tables of omni_refresh");
	if (work->write_failures == 0)
		ereport(LOG,
				(errcode(error.sqlstate),
				 errmsg("could not write down the outcome of job " INT64_FORMAT ", will try again: %s",
						work->job.id, error.message)));
	delay = result == NOT_NOW ? RETRY_DELAY :
		Min(RETRY_DELAY << Min(work->write_failures, 10), RETRY_DELAY_MAX);
	work->write_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), delay);
	work->write_failures++;
	if (work->segment != NULL && GetCurrentTimestamp() >= work->deadline)
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
finished(Work *work)
{
	bool		goes_on = work->outcome.run_at != 0;	/* now, or when its row
														 * says */

	if (goes_on && work->class == OMNI_RATE_CALL && strcmp(work->outcome.status, "pending") == 0)
	{
		work->run_at = work->outcome.run_at;
		work->write_at = 0;
		work->write_failures = 0;
		work->step = PENDING;
		return;
	}
	if (goes_on)
	{
		look_at = Min(look_at, work->outcome.run_at);
		next_due = Min(next_due, work->outcome.run_at);
	}
	if (queue_left && work->class != OMNI_RATE_CALL &&
		in_flight(work->class, &work->job.request.server) <= omni_max_in_flight * 3 / 4 + 1)
		look_at = DT_NOBEGIN;	/* there is room for more */
	queue_left |= goes_on;
	tell(work, work->job.id, &work->outcome.error);
}

/* The body of that transaction, for one job, or for all if only is NULL. */
static bool
record(void *only)
{
	dlist_iter	iter;
	bool		exists = omni_tables_find();	/* else the log was dropped
												 * with the extension */

	if (exists && !omni_tables_lock())
		return false;
	dlist_foreach(iter, &works)
	{
		Work	   *work = dlist_container(Work, node, iter.cur);

		if (!work->recording || (only != NULL && only != work))
			continue;
		decide(work);
		if (exists && !work->lookup)
			omni_job_record(&work->job, &work->outcome);
	}
	return true;
}

/* Finds out, once, what the answer to an attempt means for its job. */
static void
decide(Work *work)
{
	const OmniAnswer *answer = work->transfer != NULL ? &work->transfer->answer : NULL;
	OmniOutcome *outcome = &work->outcome;

	if (!work->settled && answer->withdrawn)
		withdraw(work);
	if (work->settled)
		return;

	work->settled = true;
	if (work->lookup)
	{
		if (is_probe(work))
			omni_api_probe_outcome(&work->job, work->target.key, answer, outcome);
		else
			omni_api_lookup_outcome(&work->job, work->target.key, answer, outcome);
		consider_retry(work);
		tell_probed(work, answer);
	}
	else if (work->class == OMNI_RATE_POLL)
	{
		if (omni_api_follow_outcome(&work->job, work->target.key, answer, outcome))
			outcome->elapsed = 0;	/* of the question, not of the job */
		else
			consider_next_question(work);
	}
	else
	{
		omni_api_job_outcome(&work->job, work->target.key, answer, outcome);
		consider_retry(work);
		if (omni_track && outcome->has_job_id && strcmp(outcome->status, "accepted") == 0)
		{
			outcome->status = "running";
			outcome->attempt_event = "accepted";
			outcome->run_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), FOLLOW_FIRST);
		}
	}
}

/*
 * Decides what to do about a job that has not come to its end as far as Omni's
 * answer tells, if there was one.  Soon after it was accepted, Omni may not know it
 * yet.  It is asked about again, but not after a refusal, or after the time that we
 * follow a job: then nobody knows.
 *
 * The time to the next question is half of what has passed, within limits: as if
 * each were one and a half times as long as the one before.
 */
static void
consider_next_question(Work *work)
{
	OmniOutcome *outcome = &work->outcome;
	TimestampTz now = GetCurrentTimestamp();
	int64		passed = Max(now - work->job.sent_at, 0) / 1000;
	int64		delay = Min(FOLLOW_FIRST + passed / 2, FOLLOW_LONGEST);
	bool		early = outcome->http_status == 404 && passed < FOLLOW_EARLY;

	outcome->elapsed = 0;
	outcome->attempt_event = NULL;
	if (outcome->slow_down)
	{
		delay = Max(delay, Min(outcome->retry_after * INT64CONST(1000), OMNI_MAX_WAIT / 1000));
		omni_rate_block(work->rate_id, TimestampTzPlusMilliseconds(now, delay));
	}
	if (early)
		outcome->error.sqlstate = 0;
	else if (now >= work->deadline ||
			 (outcome->http_status >= 400 && !outcome->retryable))
	{
		outcome->status = "unknown";
		if (outcome->error.sqlstate == 0)
		{
			omni_error_set(&outcome->error, ERRCODE_TRANSACTION_RESOLUTION_UNKNOWN,
						   "Omni has not finished the job within \"omni_refresh.track_timeout\"");
			omni_error_hint(&outcome->error, "It may go on: look at the model in Omni.");
		}
		return;
	}
	outcome->status = "running";
	outcome->quiet = true;
	outcome->run_at = TimestampTzPlusMilliseconds(now, delay);
}

/* What to look up, as its caller has written it. */
static const char *
looked_up(Work *work)
{
	return (char *) work->call + work->call->lookup;
}

/* Whether it is asked how Omni is reached, which takes one attempt. */
static bool
is_probe(Work *work)
{
	return work->lookup && work->segment != NULL && work->call->probe;
}

/* Writes the answer to a look-up where its caller will find it, or how it was reached. */
static void
tell_probed(Work *work, const OmniAnswer *answer)
{
	OmniCall   *call = work->call;
	OmniProbe  *probed = &call->probed;

	if (work->segment == NULL)
		return;
	if (call->probe)
	{
		memset(probed, 0, sizeof(*probed));
		probed->begun = true;
		probed->answered = !answer->failed;
		probed->phase = answer->phase;
		probed->http_status = answer->status;
		probed->elapsed = answer->elapsed;
		probed->rate_limit = work->target.rate_limit;
		probed->rate_left = omni_rate_left(work->rate_id, work->target.rate_limit);
		strlcpy(probed->address, answer->address != NULL ? answer->address : "", sizeof(probed->address));
		probed->secure = pg_strncasecmp(work->target.base_url, "https:", 6) == 0;
		strlcpy(probed->issuer, answer->issuer != NULL ? answer->issuer : "", sizeof(probed->issuer));
		strlcpy(probed->expires, answer->expires != NULL ? answer->expires : "", sizeof(probed->expires));
	}
	else if (work->outcome.error.sqlstate == 0)
	{
		call->length = answer->length;
		memcpy((char *) call + call->answer, answer->body, answer->length);
	}
}

/*
 * Decides whether there is another attempt: if it can begin before the end of the
 * call, or of the time that a queued job has.  What is queued is tried again
 * whenever there was no answer.  The wait doubles with each attempt and is drawn
 * by lot, so that those who failed together do not come back together; Retry-After
 * is a floor.
 */
static void
consider_retry(Work *work)
{
	OmniOutcome *outcome = &work->outcome;
	int64		longest = BACKOFF_MAX;
	int64		delay;
	uint32		lot = 0;
	TimestampTz run_at;

	work->may_have_arrived |= outcome->may_have_arrived;
	if (work->may_have_arrived && outcome->attempt_event != NULL)
		outcome->status = "unknown";
	if (!outcome->retryable && !(work->class == OMNI_RATE_JOB && outcome->http_status == 0))
		return;

	if (work->job.attempts < 10)
		longest = Min(BACKOFF_FIRST << (work->job.attempts - 1), BACKOFF_MAX);
	(void) pg_strong_random(&lot, sizeof(lot));
	delay = Max(lot % (longest + 1), Min(outcome->retry_after * INT64CONST(1000), OMNI_MAX_WAIT / 1000));
	run_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), delay);
	if (outcome->slow_down)
		omni_rate_block(work->rate_id, run_at);

	if (run_at < TimestampTzPlusMilliseconds(work->deadline, -SHORTEST_ATTEMPT) && !is_forsaken(work) &&
		!is_probe(work))
	{
		outcome->status = "pending";
		outcome->run_at = run_at;
	}
}

/* Ends a job whose caller has left before its attempt was sent. */
static void
withdraw(Work *work)
{
	OmniError	error = work->outcome.error;	/* of the last attempt, if any */

	settle(work, "canceled", &error);
	work->step = ANSWERED;
}

/*
 * Sets an outcome that does not come from Omni.  If it may be at work on an earlier
 * attempt, nobody knows the end.
 */
static void
settle(Work *work, const char *status, const OmniError *error)
{
	memset(&work->outcome, 0, sizeof(work->outcome));
	work->outcome.status = work->may_have_arrived || work->class == OMNI_RATE_POLL ? "unknown" : status;
	work->outcome.error = *error;
	work->settled = true;
}

/* Tells the caller of a job how it ended, and lets go of it. */
static void
tell(Work *work, int64 job_id, const OmniError *error)
{
	if (work->segment != NULL)
		omni_call_finish(work->segment, job_id, error);
	work->segment = NULL;
	let_go(work);
}

/* Forgets an attempt.  What it has of libcurl goes with its memory. */
static void
end_attempt(Work *work)
{
	if (work->target.key != NULL)
		explicit_bzero(work->target.key, strlen(work->target.key));
	memset(&work->target, 0, sizeof(work->target));
	work->transfer = NULL;
	MemoryContextReset(work->attempt);
}

static void
let_go(Work *work)
{
	dlist_delete(&work->node);
	end_attempt(work);
	if (work->segment != NULL)
		dsm_detach(work->segment);
	MemoryContextDelete(work->context);
}

/* Whether nobody waits for a job any more. */
static bool
is_forsaken(Work *work)
{
	return work->class == OMNI_RATE_CALL &&
		(work->segment == NULL || pg_atomic_read_u32(&work->call->forsaken) != 0);
}

/* The same question, for libcurl's callback. */
static bool
is_wanted(void *work)
{
	return !is_forsaken(work);
}
