/*-------------------------------------------------------------------------
 *
 * dispatch.c
 *		When the worker reads its queue, and the transaction in which it does.
 *
 * A queued job stays in its table until its request can be sent at once.  The worker reads
 * the queue when a commit has set the flag of its slot, when a job is due, and when there is
 * room for more jobs in flight.  It then polls the running jobs that are due, and takes
 * a step of a round of the queue: round.c puts queued jobs in flight.  Before that, it
 * settles what an earlier worker has left behind.
 *
 * A reading is short, however long the queue is, since the worker takes calls in between.
 *
 * Times are those of omni_clock() unless their type is TimestampTz.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "executor/spi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "base/clock.h"
#include "base/fault.h"
#include "base/setting.h"
#include "base/status.h"
#include "shared/workerslot.h"
#include "store/xact.h"
#include "worker/dispatch.h"
#include "worker/kind.h"
#include "worker/polls.h"
#include "worker/report.h"
#include "worker/round.h"
#include "worker/sent.h"
#include "worker/throttle.h"

/*
 * After a reading for new jobs, wait this many times as long as it has taken before the
 * next one, but no longer than the maximum, which is in the unit of omni_clock()
 */
#define PAUSE_FACTOR		4
#define PAUSE_MAX			OMNI_MS(200)

/* How often to try rows that another session has locked, in ms */
#define LOCKED_ROUND		300

/* What the worker knows about its queue */
typedef struct Dispatch
{
	/* when to read the queue */
	int64		next;			/* the next time ... */
	bool		for_new;		/* ... and then for new jobs, in a new round */
	int64		for_new_from;	/* but for those not before this time */
	int64		pause;			/* between two readings for new jobs, in
								 * microseconds */
	int64		last;			/* the last time, or 0 */

	/* what may be left to do */
	bool		queue_left;		/* there may be jobs that are not in flight */
	bool		running_left;	/* there may be running jobs */
	bool		settled_all;	/* an earlier worker left no jobs behind ... */
	bool		settled_now;	/* ... once this transaction has committed */

	/* readings that failed */
	int			failures;		/* in a row */
	int64		failing_since;	/* if any */
	bool		complained;		/* the log tells about them */

	/* "omni_refresh.enabled"; see is_enabled() */
	bool		enabled;
	bool		enabled_known;
} Dispatch;

static Dispatch dispatch = {
	.for_new = true,
	.queue_left = true,
	.running_left = true
};

static void read_queue(void);
static void pause_reading(int64 began);
static void give_up_reading(OmniTransacted result, const OmniError *error, int64 began);
static bool claim(void *unused);
static bool poll_running(bool enabled, TimestampTz *next);
static void schedule(bool enabled, bool more, bool any_locked, TimestampTz next_due);
static bool is_enabled(void);
static int64 clock_of(TimestampTz when);

/* Read the queue in the next turn of the loop.  Until then it does not count as empty. */
void
omni_dispatch_soon(void)
{
	dispatch.for_new = true;
	dispatch.next = 0;
	dispatch.queue_left = true;
}

/* Read the queue in the next turn, since settings may have changed. */
void
omni_dispatch_reload(void)
{
	dispatch.enabled_known = false;
	omni_dispatch_soon();
}

/* Read the queue if it is time to. */
void
omni_dispatch_due(void)
{
	if (dispatch.for_new_from <= omni_clock() && omni_worker_take_flag(OMNI_WAKE_QUEUE))
		omni_dispatch_soon();
	if (dispatch.next <= omni_clock() &&
		(!dispatch.for_new || dispatch.for_new_from <= omni_clock()))
		read_queue();
}

/* Read the queue at a given time at the latest. */
void
omni_dispatch_by(int64 when)
{
	dispatch.next = Min(dispatch.next, when);
}

/* Do not read the queue for a while, in ms: something would keep its jobs from being sent. */
void
omni_dispatch_pause(int delay)
{
	dispatch.next = omni_clock() + OMNI_MS(delay);
}

/* Return whether there may be jobs that are not in flight. */
bool
omni_dispatch_any_left(void)
{
	return dispatch.queue_left;
}

/* Return when the queue was last read, or 0. */
int64
omni_dispatch_read_at(void)
{
	return dispatch.last;
}

/* Return how long to wait, in ms, until it is time to read the queue, or to see its flag. */
long
omni_dispatch_delay(void)
{
	int64		next = dispatch.next;

	if (dispatch.for_new)
		next = Max(next, dispatch.for_new_from);
	if (dispatch.for_new_from > omni_clock())
		next = Min(next, dispatch.for_new_from);
	return omni_clock_until(next);
}

/*
 * Decide what finished work means for the queue: read it in the next turn if the role has room
 * for more jobs at the server now, or a refresh has ended for which resets may have waited; and when
 * the job is due again if it is to be tried again or polled.
 */
void
omni_dispatch_finished(const OmniWork *work)
{
	const OmniOutcome *outcome = &work->outcome;

	if (dispatch.queue_left &&
		((!work->kind->has_caller &&
		  omni_works_count(work->kind, &work->job.request) <= omni_max_in_flight * 3 / 4 + 1) ||
		 (omni_round_any_held() && !outcome->again && work->kind->has_job &&
		  omni_job_kinds[work->job.request.kind].holds_resets)))
	{
		dispatch.next = 0;
		omni_round_restart(false);
	}
	if (outcome->again)
	{
		omni_dispatch_by(omni_clock() + outcome->delay);
		dispatch.queue_left = true;
		if (strcmp(outcome->status, OMNI_NAME_RUNNING) == 0)
			dispatch.running_left = true;
	}
}

/* Put jobs in flight that can be sent now, and decide when to read the queue again. */
static void
read_queue(void)
{
	int64		began = omni_clock();
	bool		for_new = dispatch.for_new;
	OmniError	error;
	OmniTransacted result;

	result = omni_transact(claim, NULL, false, &error);
	if (result != COMMITTED)
	{
		give_up_reading(result, &error, began);
		return;
	}
	omni_dispatch_settled();
	dispatch.last = began;
	dispatch.failures = 0;
	if (for_new)
		pause_reading(began);
}

/*
 * After a reading for new jobs, do not read for new jobs again for a while.  Reading takes
 * processor time from the sessions whose commits have woken the worker, so the pause grows
 * with the time that the reading has taken, and with the number of readings in vain.
 */
static void
pause_reading(int64 began)
{
	int64		now = omni_clock();

	if (began > dispatch.for_new_from + PAUSE_MAX || omni_works_any_claimed())
		dispatch.pause = 0;
	dispatch.pause = Min(Max(2 * dispatch.pause, PAUSE_FACTOR * (now - began)), PAUSE_MAX);
	dispatch.for_new_from = now + dispatch.pause;
}

/*
 * A reading has failed, and its transaction was rolled back: forget the work that it has put
 * in flight, and begin anew after a while.  Write to the log about the first failure of
 * several, but about locks only after OMNI_LOCK_PATIENCE.
 */
static void
give_up_reading(OmniTransacted result, const OmniError *error, int64 began)
{
	int			delay = OMNI_LOCAL_DELAY;
	dlist_mutable_iter iter;

	dlist_foreach_modify(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);

		if (omni_work_is_claimed(work))
			omni_work_end(work);
	}

	if (dispatch.failures == 0)
	{
		dispatch.failing_since = began;
		dispatch.complained = false;
	}

	/*
	 * omni_check_table() of table.c writes to the log itself about a table
	 * that was altered
	 */
	if (!dispatch.complained && error->sqlstate != ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE &&
		(result == FAILED || omni_clock() - dispatch.failing_since > OMNI_MS(OMNI_LOCK_PATIENCE)))
	{
		dispatch.complained = true;
		ereport(LOG,
				(errcode(error->sqlstate),
				 errmsg("could not read the queue of omni_refresh, will try again: %s",
						error->message),
				 error->detail[0] != '\0' ? errdetail_internal("%s", error->detail) : 0));
	}

	if (result == FAILED)
		delay = Min(OMNI_LOCAL_DELAY << Min(dispatch.failures, 10), OMNI_LOCAL_DELAY_MAX);
	dispatch.next = omni_clock() + OMNI_MS(delay);
	dispatch.failures++;
	dispatch.for_new = true;
	dispatch.running_left = true;
	dispatch.queue_left = true;
	omni_polls_restart();
	omni_round_restart(false);
}

/* The body of the transaction.  Returns false if the tables are locked or do not exist. */
static bool
claim(void *unused)
{
	TimestampTz next_poll = DT_NOEND;
	TimestampTz next_due = DT_NOEND;
	bool		any_locked = false;
	bool		more = false;
	bool		enabled;
	bool		any;

	if (!omni_tables_find() || !omni_tables_lock())
		return false;
	OMNI_FAULT_POINT("look: tables locked");
	omni_dispatch_settle();
	OMNI_FAULT_POINT("look: settled");
	enabled = is_enabled();
	OMNI_FAULT_POINT("look: enabled");

	dispatch.running_left |= dispatch.for_new;
	if (dispatch.running_left)
		more = poll_running(enabled, &next_poll);
	OMNI_FAULT_POINT("look: polls claimed");

	if (dispatch.for_new)
	{
		omni_sent_forget();
		omni_round_restart(true);
		dispatch.for_new = false;
	}
	more |= omni_round_go_on(enabled, &any_locked);
	if (!more && enabled)
		more = omni_round_merge_ahead();
	if (omni_round_is_complete(&any, &next_due))
		dispatch.queue_left = any || dispatch.running_left ||
			!(dispatch.settled_all || dispatch.settled_now);

	schedule(enabled, more, any_locked, Min(next_due, next_poll));
	OMNI_FAULT_POINT("look: done");
	return true;
}

/*
 * Put polls in flight of running jobs that are due; or, with "omni_refresh.track" off, end
 * these jobs.  Returns whether there may be more.  If not, sets *next to the time when the
 * next one will be due, or to DT_NOEND.
 */
static bool
poll_running(bool enabled, TimestampTz *next)
{
	if (!omni_track)
		dispatch.running_left = omni_job_stop_polling();
	else if (enabled)
		return omni_polls_claim(&dispatch.running_left, next);
	return false;
}

/* Decide when to read the queue again. */
static void
schedule(bool enabled, bool more, bool any_locked, TimestampTz next_due)
{
	dispatch.next = more ? 0 : clock_of(next_due);
	if (any_locked || !(dispatch.settled_all || dispatch.settled_now) ||
		(dispatch.running_left && !omni_track))
		omni_dispatch_by(omni_clock() + OMNI_MS(LOCKED_ROUND));
	if (!enabled)
		dispatch.next = OMNI_CLOCK_NEVER;	/* until SIGHUP */
	omni_dispatch_by(omni_throttle_ends());
}

/* Convert the time at which a row is due, which may be infinite, to omni_clock()'s. */
static int64
clock_of(TimestampTz when)
{
	if (TIMESTAMP_IS_NOEND(when))
		return OMNI_CLOCK_NEVER;
	return omni_clock() + Max(when - omni_latest_now(), 0);
}

/*
 * Return whether jobs of the queue may be sent.  This is "omni_refresh.enabled" as the
 * configuration file, the command line and the database have it now: ALTER ROLE may have set
 * another value for the role that the worker happens to run as.  Needs a transaction with
 * SPI connected, the first time after a reload.
 */
static bool
is_enabled(void)
{
	char	   *value;

	if (dispatch.enabled_known)
		return dispatch.enabled;
	if (SPI_execute("SELECT coalesce("
					" (SELECT option_value FROM pg_db_role_setting, pg_options_to_table(setconfig)"
					"  WHERE setrole = 0 AND setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())"
					"   AND option_name = 'omni_refresh.enabled'),"
					" (SELECT setting FROM pg_settings WHERE name = 'omni_refresh.enabled' AND source = 'command line'),"
					" (SELECT setting FROM pg_file_settings WHERE lower(name COLLATE \"C\") = 'omni_refresh.enabled' AND error IS NULL"
					"  ORDER BY seqno DESC LIMIT 1))", true, 1) != SPI_OK_SELECT || SPI_processed != 1)
		elog(ERROR, "could not read the setting \"omni_refresh.enabled\"");
	value = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1);
	if (value == NULL || !parse_bool(value, &dispatch.enabled))
		dispatch.enabled = true;
	dispatch.enabled_known = true;
	return dispatch.enabled;
}

/*
 * Settle a batch of the jobs that an earlier worker has left behind, except those that are in
 * flight here; rows that another session has locked are settled later.  The first time, also
 * read what that worker has sent lately.  Needs a transaction that has locked the tables;
 * once it has committed, call omni_dispatch_settled().
 */
void
omni_dispatch_settle(void)
{
	int64	   *in_flight;
	int			count = 0;
	dlist_iter	iter;

	if (dispatch.settled_all)
		return;
	dlist_foreach(iter, &omni_works)
		count++;
	in_flight = palloc((count + 1) * sizeof(int64));
	count = 0;
	dlist_foreach(iter, &omni_works)
		in_flight[count++] = dlist_container(OmniWork, node, iter.cur)->job.id;
	omni_report_settling();
	dispatch.settled_now = omni_job_settle(in_flight, count, omni_report_add_settled);

	omni_sent_recall();
}

/* Note that the transaction that has called omni_dispatch_settle() has committed. */
void
omni_dispatch_settled(void)
{
	dispatch.settled_all |= dispatch.settled_now;
	omni_report_settled();
}
