/*-------------------------------------------------------------------------
 *
 * rendezvous.c
 *		Where backends and the worker of their database meet: shared memory, the
 *		start and the end of the worker, the hand-over of calls.
 *
 * A call is a DSM segment that the backend makes (see OmniCall).  Its handle goes
 * into the ring of the database's slot, the worker takes it from there, writes
 * its results into the segment and sets the caller's latch.
 *
 * One lock covers all slots, and with it three decisions that must not cross:
 * to put a call into a ring, to start a worker, and a worker's to leave.  A slot
 * exists while a worker is being started (then some backend watches over the
 * start: its starter) or is running; it ends with the worker, or with a start
 * that failed.  Whoever ends it sets the latches of the callers in its ring, and
 * they begin anew.  The lock is held for moments only, and nothing that raises
 * an error happens under it but for want of memory.
 *
 * That there is one worker at most is not promised by the slot but by a lock of
 * the heavyweight kind (see omni_worker_attach()), since two versions of this library
 * may each have shared memory of their own.
 *
 * A worker that cannot start says why in the segment of its starter's call.
 *
 * A transaction that has queued something wakes the worker when it has committed, or
 * starts it.  Nobody watches over such a start: if nothing comes of it, the slot
 * stays as it is for a while, so that a worker that cannot start is not tried by
 * each commit; a call takes the slot over then.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_database.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "storage/condition_variable.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lock.h"
#include "storage/proc.h"
#include "utils/elog.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#include "clock.h"
#include "compat.h"
#include "omni_refresh.h"

/* To be raised with each change of the structs below, or of OmniCall */
#define SHARED_NAME			"omni_refresh layout 4"

/* Together under 20 kB, which 16 and older have to spare */
#define MAX_DATABASES		96
#define RING_SIZE			16

/* Enough for a call but for one with long lists, in bytes */
#define SEGMENT_SIZE		8192

/* How long to try to get a background worker of the server's, in ms */
#define START_PATIENCE		5000
#define START_RETRY			20

/* How long an unwatched start may take before it is taken for failed, in ms */
#define UNWATCHED_START		5000

/* How many workers may die under one call before it gives up */
#define MAX_STARTS			3

typedef struct RingEntry
{
	dsm_handle	handle;
	int			caller;			/* index of its PGPROC */
} RingEntry;

typedef enum SlotState
{
	SLOT_FREE,
	SLOT_STARTING,
	SLOT_RUNNING
} SlotState;

#define NOBODY				(-1)

typedef struct Slot
{
	SlotState	state;
	Oid			database;
	bool		flag;			/* something was queued */
	int			owner;			/* PGPROC of the worker, or of its starter, or
								 * NOBODY */
	int64		made_at;		/* by omni_clock() */
	uint64		generation;		/* never the same again */
	int			first;			/* oldest entry of the ring */
	int			count;			/* entries in use */
	RingEntry	ring[RING_SIZE];
} Slot;

typedef struct Shared
{
	LWLock		lock;			/* protects all of this */
	int			tranche;
	uint64		generation;		/* the last one given */
	ConditionVariable room;		/* some ring was full and no longer is */
	Slot		slots[MAX_DATABASES];
} Shared;

StaticAssertDecl(sizeof(Shared) < 20 * 1024, "too much shared memory");

/* What a worker is told by its starter, in bgw_extra */
typedef struct StartInfo
{
	char		layout[sizeof(SHARED_NAME)];	/* of the starter's library */
	dsm_handle	call;			/* of the starter's, or DSM_HANDLE_INVALID */
	bool		leave_at_once;	/* if there is nothing to do */
} StartInfo;

StaticAssertDecl(sizeof(StartInfo) <= BGW_EXTRALEN, "too much for bgw_extra");

/* What a backend knows of the call it waits for */
typedef struct Waiter
{
	dsm_segment *segment;
	uint64		generation;		/* of the slot whose ring it is in, or was */
	BackgroundWorkerHandle *start;	/* of the worker that it has started */
	int			starts;
} Waiter;

typedef enum HandOver
{
	HANDED_OVER,
	HANDED_OVER_UNWATCHED,		/* to a worker whose start nobody watches */
	RING_FULL,
	NO_WORKER,					/* max_worker_processes are in use */
	NO_SLOT,					/* MAX_DATABASES are in use */
	START_FAILED
} HandOver;

static Shared *shared = NULL;
static dsm_segment *kept_segment = NULL;	/* of this backend's calls */
static LOCKTAG worker_lock;		/* held by the worker of the database */
static dsm_segment *starter_call = NULL;	/* in a worker that is starting */
static emit_log_hook_type next_emit_log_hook = NULL;
static bool has_queued = false; /* this transaction, in this backend */
static bool (*has_work) (void) = NULL;	/* the worker, for the next one */

static Size reserve(Size *size, Size room);
static void attach_shared(void);
static void init_shared(OMNI_SHARED_INIT_ARGS);
static Slot *find_slot(Oid database);
static Slot *make_slot(Oid database, SlotState state, int owner);
static void free_slot(Slot *slot);
static int	my_proc(void);
static void set_latch(int proc);
static HandOver hand_over(Waiter *waiter);
static bool start_worker(Oid database, const StartInfo *info, BackgroundWorkerHandle **handle);
static HandOver see_to_worker(Oid database, bool flag, bool leave_at_once,
							  BackgroundWorkerHandle **handle);
static HandOver start_in_slot(Oid database, int owner, const StartInfo *info,
							  BackgroundWorkerHandle **handle, Slot **slot);
static HandOver start_successor(void);
static void tell_of_successor(HandOver result);
static bool start_has_failed(const Slot *slot);
static void at_transaction_end(XactEvent event, void *arg);
static void explain(HandOver result, const OmniCall *call, OmniError *error);
static void wait_for_room(void);
static void wait_for_latch(long timeout);
static void forsake_call(dsm_segment *segment, Datum arg);
static void keep_reason(ErrorData *data);
static bool is_database_locked(void);
static void leave_slot(int code, Datum arg);
static void lose_call(dsm_segment *segment, Datum arg);

/*
 * Makes a segment for a call: a job, or a look-up unless that is NULL.  It belongs
 * to the current resource owner until omni_call_end(); when it goes before that, the
 * worker learns that the caller has left.  To make one is a tenth of a call's time,
 * so a session keeps its segment.
 */
OmniCall *
omni_call_create(const OmniJob *job, const char *lookup, dsm_segment **segment)
{
	Size		size = MAXALIGN(sizeof(OmniCall));
	Size		schemas_at = reserve(&size, job->schemas != NULL ? VARSIZE(job->schemas) : 0);
	Size		tables_at = reserve(&size, job->tables != NULL ? VARSIZE(job->tables) : 0);
	Size		lookup_at = reserve(&size, lookup != NULL ? strlen(lookup) + 1 : 0);
	Size		answer_at = reserve(&size, lookup != NULL ? OMNI_MAX_ANSWER : 0);
	OmniCall   *call;

	attach_shared();
	if (kept_segment != NULL && dsm_segment_map_length(kept_segment) < size)
		dsm_detach(kept_segment);
	if (kept_segment != NULL)
		dsm_unpin_mapping(kept_segment);
	else
	{
		kept_segment = dsm_create(Max(size, SEGMENT_SIZE), 0);
		on_dsm_detach(kept_segment, forsake_call, (Datum) 0);
	}
	*segment = kept_segment;
	call = dsm_segment_address(*segment);
	memset(call, 0, sizeof(OmniCall));
	pg_atomic_init_u32(&call->state, OMNI_CALL_WAITING);
	pg_atomic_init_u32(&call->forsaken, 0);
	call->caller = my_proc();
	call->deadline = omni_clock() + OMNI_MS(omni_call_timeout);
	call->request = job->request;
	call->schemas = schemas_at;
	call->tables = tables_at;
	call->lookup = lookup_at;
	call->answer = answer_at;
	if (job->schemas != NULL)
		memcpy((char *) call + schemas_at, job->schemas, VARSIZE(job->schemas));
	if (job->tables != NULL)
		memcpy((char *) call + tables_at, job->tables, VARSIZE(job->tables));
	if (lookup != NULL)
		strcpy((char *) call + lookup_at, lookup);
	return call;
}

/* Adds room to the size of a segment; returns its offset, or 0 for none. */
static Size
reserve(Size *size, Size room)
{
	Size		offset = room > 0 ? *size : 0;

	*size += MAXALIGN(room);
	return offset;
}

/* Ends a call, whose results are no longer needed. */
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
 * Hands a call over to the worker, which is started if need be, and waits for
 * its results.  Returns false, and says why in *error, if there is no worker to be
 * had; errors of the call itself are among its results.  Can be interrupted.
 *
 * If the worker ends meanwhile, the call is handed over to the next one.  If there
 * is a job by then, which may have been sent, the next worker settles it, and that
 * is all it does about it.
 */
bool
omni_call_run(dsm_segment *segment, OmniError *error)
{
	OmniCall   *call = dsm_segment_address(segment);
	Waiter		waiter = {.segment = segment};
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

		if (state == OMNI_CALL_TAKEN)
			wait_for_latch(-1);
		else
		{
			HandOver	result = hand_over(&waiter);

			if (result == HANDED_OVER)
				wait_for_latch(-1);
			else if (result == HANDED_OVER_UNWATCHED)
				wait_for_latch(UNWATCHED_START);
			else if (result == RING_FULL)
				wait_for_room();
			else if (result == NO_WORKER &&
					 omni_clock() - began < OMNI_MS(START_PATIENCE))
				wait_for_latch(START_RETRY);
			else
			{
				ConditionVariableCancelSleep();
				explain(result, call, error);
				return false;
			}
		}
	}
}

/* Says why there is no worker, for a call if it is not NULL. */
static void
explain(HandOver result, const OmniCall *call, OmniError *error)
{
	if (call != NULL && call->job_id != 0)
		omni_call_lost(call, error);
	else if (result == NO_WORKER)
	{
		omni_error_set(error, ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
					   "no background worker is available");
		omni_error_detail(error, "All of the server's max_worker_processes (%d) are in use.",
						  max_worker_processes);
		omni_error_hint(error, "Increase the setting \"max_worker_processes\"; omni_refresh needs one for each database that uses it at a time.");
	}
	else if (result == NO_SLOT)
	{
		omni_error_set(error, ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
					   "too many databases use omni_refresh at once");
		omni_error_detail(error, "There may be %d at a time.", MAX_DATABASES);
		omni_error_hint(error, "Try again when a worker has left; the setting \"omni_refresh.idle_timeout\" says when it does.");
	}
	else
	{
		omni_error_set(error, ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
					   "could not start the background worker of omni_refresh");
		if (call->start_error.sqlstate != 0)
			omni_error_detail(error, "The worker reported: %s.", call->start_error.message);
		omni_error_hint(error, "%s",
						call->start_error.hint[0] != '\0' ? call->start_error.hint :
						call->start_error.sqlstate != 0 ? "The server's log says more." :
						"The server's log says why.  If the library was replaced, by an upgrade, open a new session.");
	}
}

/* Says that a job was left behind by its worker. */
void
omni_call_lost(const OmniCall *call, OmniError *error)
{
	omni_error_set(error, ERRCODE_TRANSACTION_RESOLUTION_UNKNOWN,
				   "the background worker ended before job " INT64_FORMAT " was finished",
				   call->job_id);
	omni_error_detail(error, "Whether Omni has got the request is not known if the job's status is now \"unknown\"; it was not sent if that is \"canceled\".");
	omni_error_hint(error, "Look in Omni before you send it again.  The server's log says why the worker ended.");
}

/* Waits until some ring has had room. */
static void
wait_for_room(void)
{
	static uint32 wait_event = 0;

	if (wait_event == 0)
		wait_event = WaitEventExtensionNew("OmniRefreshRing");
	ConditionVariableSleep(&shared->room, wait_event);
}

/* -1 means no time limit.  Resets the latch. */
static void
wait_for_latch(long timeout)
{
	static uint32 wait_event = 0;

	if (wait_event == 0)
		wait_event = WaitEventExtensionNew("OmniRefreshCall");
	ConditionVariableCancelSleep();
	(void) WaitLatch(MyLatch,
					 WL_LATCH_SET | WL_EXIT_ON_PM_DEATH | (timeout >= 0 ? WL_TIMEOUT : 0),
					 timeout, wait_event);
	ResetLatch(MyLatch);
	CHECK_FOR_INTERRUPTS();
}

/*
 * Sees to it that a call that nobody has taken yet is in the ring of a slot with
 * a worker, running or on its way.  May be called any number of times.
 */
static HandOver
hand_over(Waiter *waiter)
{
	OmniCall   *call = dsm_segment_address(waiter->segment);
	StartInfo	info = {.layout = SHARED_NAME,.call = dsm_segment_handle(waiter->segment)};
	HandOver	result = HANDED_OVER;
	Slot	   *slot;
	pid_t		pid;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(MyDatabaseId);

	if (slot != NULL && slot->state == SLOT_STARTING && slot->owner == my_proc() &&
		GetBackgroundWorkerPid(waiter->start, &pid) == BGWH_STOPPED)
	{
		free_slot(slot);
		result = START_FAILED;
	}
	else if (slot == NULL)
	{
		if (waiter->starts == MAX_STARTS)
			result = START_FAILED;
		else
			result = start_in_slot(MyDatabaseId, my_proc(), &info, &waiter->start, &slot);
		if (result == HANDED_OVER)
			waiter->starts++;
	}

	if (result == HANDED_OVER && slot->generation != waiter->generation)
	{
		if (slot->count == RING_SIZE)
			result = RING_FULL;
		else
		{
			RingEntry  *entry = &slot->ring[(slot->first + slot->count++) % RING_SIZE];

			entry->handle = dsm_segment_handle(waiter->segment);
			entry->caller = call->caller;
			waiter->generation = slot->generation;
			if (slot->state == SLOT_RUNNING)
				set_latch(slot->owner);
		}
	}
	if (result == HANDED_OVER && slot->owner == NOBODY)
		result = HANDED_OVER_UNWATCHED;
	LWLockRelease(&shared->lock);
	return result;
}

/*
 * Sees to it that a database has a worker, or one on its way, whose start nobody
 * watches.  With flag, it shall look at the queue.  Sets *handle, unless NULL, if
 * it was started.  With handle being NULL, raises no error: it is called when a
 * transaction has committed.
 */
static HandOver
see_to_worker(Oid database, bool flag, bool leave_at_once, BackgroundWorkerHandle **handle)
{
	StartInfo	info = {
		.layout = SHARED_NAME,.call = DSM_HANDLE_INVALID,.leave_at_once = leave_at_once
	};
	HandOver	result = HANDED_OVER;
	Slot	   *slot;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(database);
	if (slot == NULL)
		result = start_in_slot(database, NOBODY, &info, handle, &slot);
	if (flag && result == HANDED_OVER && !slot->flag)
	{
		slot->flag = true;
		if (slot->state == SLOT_RUNNING)
			set_latch(slot->owner);
	}
	LWLockRelease(&shared->lock);
	return result;
}

/*
 * Starts the worker of a database, for the launcher, unless it is there; then
 * *handle stays as it is.  Returns false if none is to be had at the moment.
 */
bool
omni_worker_launch(Oid database, BackgroundWorkerHandle **handle)
{
	attach_shared();
	return see_to_worker(database, false, true, handle) == HANDED_OVER;
}

/* Has the worker look at the queue.  Returns false, and says why, if there is none. */
bool
omni_worker_wake(OmniError *error)
{
	HandOver	result;

	attach_shared();
	result = see_to_worker(MyDatabaseId, true, false, NULL);
	if (result != HANDED_OVER)
		explain(result, NULL, error);
	return result == HANDED_OVER;
}

/*
 * To be called in a transaction that queues something: wakes the worker once it
 * has committed.
 */
void
omni_wake_on_commit(void)
{
	static bool registered = false;

	attach_shared();
	if (!registered)
		RegisterXactCallback(at_transaction_end, NULL);
	registered = true;
	has_queued = true;
}

/*
 * Before the commit is the time to complain, after it the time to act, where an
 * error would bring the server down.  A savepoint that is rolled back may have
 * queued it all: then the worker looks in vain.  COMMIT PREPARED does not come by
 * here; what it commits waits for the next time that the worker looks.
 */
static void
at_transaction_end(XactEvent event, void *arg)
{
	HandOver	result;

	if (!has_queued)
		return;
	if (event == XACT_EVENT_PRE_COMMIT)
	{
		result = see_to_worker(MyDatabaseId, false, false, NULL);
		if (result != HANDED_OVER)
		{
			OmniError	error;

			explain(result, NULL, &error);
			ereport(WARNING,
					(errcode(error.sqlstate),
					 errmsg("the requests to Omni are queued, but nobody can send them now: %s",
							error.message),
					 errdetail_internal("%s", error.detail),
					 errhint("%s", error.hint)));
		}
		return;
	}
	if (event == XACT_EVENT_COMMIT)
		(void) see_to_worker(MyDatabaseId, true, false, NULL);
	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT || event == XACT_EVENT_PREPARE)
		has_queued = false;
}

/* Makes a slot and starts its worker.  Called with the lock held. */
static HandOver
start_in_slot(Oid database, int owner, const StartInfo *info, BackgroundWorkerHandle **handle,
			  Slot **slot)
{
	*slot = make_slot(database, SLOT_STARTING, owner);
	if (*slot == NULL)
		return NO_SLOT;
	if (!start_worker(database, info, handle))
	{
		free_slot(*slot);
		return NO_WORKER;
	}
	return HANDED_OVER;
}

/* Called with the lock held. */
static bool
start_has_failed(const Slot *slot)
{
	return slot->state == SLOT_STARTING && slot->owner == NOBODY &&
		omni_clock() - slot->made_at >= OMNI_MS(UNWATCHED_START);
}

/*
 * Asks the postmaster for a worker.  Returns false if it has none to give.  With a
 * handle, our latch is set when it starts and when it ends; without one, nothing is
 * allocated and no error raised.
 */
static bool
start_worker(Oid database, const StartInfo *info, BackgroundWorkerHandle **handle)
{
	BackgroundWorker worker = {0};

	snprintf(worker.bgw_name, BGW_MAXLEN, "omni_refresh worker for database %u", database);
	strlcpy(worker.bgw_type, "omni_refresh worker", BGW_MAXLEN);
	strlcpy(worker.bgw_library_name, OMNI_EXTENSION, BGW_MAXLEN);
	strlcpy(worker.bgw_function_name, "omni_refresh_worker_main", BGW_MAXLEN);
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION |
		BGWORKER_INTERRUPTIBLE;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = BGW_NEVER_RESTART;
	worker.bgw_main_arg = ObjectIdGetDatum(database);
	if (handle != NULL)
		worker.bgw_notify_pid = MyProcPid;
	memcpy(worker.bgw_extra, info, sizeof(*info));
	return RegisterDynamicBackgroundWorker(&worker, handle);
}

/*
 * Runs in a backend when the segment of its call goes, also on ERROR and FATAL:
 * tells the worker that nobody waits any more, and leaves no start unwatched.
 */
static void
forsake_call(dsm_segment *segment, Datum arg)
{
	OmniCall   *call = dsm_segment_address(segment);
	Slot	   *slot;

	kept_segment = NULL;
	if (pg_atomic_read_u32(&call->state) == OMNI_CALL_DONE)
		return;

	pg_atomic_write_u32(&call->forsaken, 1);
	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(MyDatabaseId);
	if (slot != NULL && slot->state == SLOT_RUNNING)
		set_latch(slot->owner);
	else if (slot != NULL && slot->owner == my_proc())
		free_slot(slot);
	LWLockRelease(&shared->lock);
}

/*
 * The first thing that a worker does: checks that its library is its starter's,
 * and lets the starter know what errors it meets before omni_worker_attach().
 * Returns whether to leave at once if there is nothing to do.
 */
bool
omni_worker_begin(void)
{
	StartInfo	info;

	memcpy(&info, MyBgworkerEntry->bgw_extra, sizeof(info));
	if (strncmp(info.layout, SHARED_NAME, sizeof(info.layout)) != 0)
		ereport(FATAL,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("the library of omni_refresh is not the one that the session has loaded"),
				 errhint("It was replaced, by an upgrade: open a new session.")));

	if (info.call != DSM_HANDLE_INVALID)
		starter_call = dsm_attach(info.call);
	if (starter_call != NULL)
		dsm_pin_mapping(starter_call);
	next_emit_log_hook = emit_log_hook;
	emit_log_hook = keep_reason;
	return info.leave_at_once;
}

/* Instead of omni_worker_attach(): who comes next may start another one. */
void
omni_worker_turn_back(void)
{
	Slot	   *slot;

	attach_shared();
	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(MyDatabaseId);
	if (slot != NULL && slot->state == SLOT_STARTING && slot->owner == NOBODY)
		free_slot(slot);
	LWLockRelease(&shared->lock);
}

/* Called for each message that is logged. */
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
 * Makes this process the worker of its database.  Waits for up to lock_timeout
 * for another one to leave, then raises an error.  Needs a transaction.
 *
 * The lock is held for the life of the process.  It is of the advisory kind,
 * which survives aborted transactions, with a fourth field that the SQL
 * functions for advisory locks cannot reach.
 *
 * *has_work says, when it leaves, whether there is anything for the next one; it
 * raises no errors.
 */
void
omni_worker_attach(bool (*has_work_for_next) (void))
{
	Slot	   *slot;

	has_work = has_work_for_next;
	attach_shared();
	SET_LOCKTAG_ADVISORY(worker_lock, MyDatabaseId, 0x6f6d6e69, 0x72667368, 0x4f52);	/* "omnirfsh" */
	(void) LockAcquire(&worker_lock, ExclusiveLock, true, false);
	before_shmem_exit(leave_slot, (Datum) 0);

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(MyDatabaseId);
	if (slot == NULL)
		slot = make_slot(MyDatabaseId, SLOT_RUNNING, my_proc());
	if (slot != NULL)
	{
		slot->state = SLOT_RUNNING;
		slot->owner = my_proc();
	}
	LWLockRelease(&shared->lock);

	if (slot == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("too many databases use omni_refresh at once")));

	emit_log_hook = next_emit_log_hook;
	if (starter_call != NULL)
		dsm_detach(starter_call);
	starter_call = NULL;
}

/*
 * Holds the lock for this transaction, too: somebody's trigger may call
 * pg_advisory_unlock_all(), which releases what the session holds.
 */
void
omni_worker_hold(void)
{
	(void) LockAcquire(&worker_lock, ExclusiveLock, false, true);
}

/*
 * Before the end of the transaction, or after it if there was an error: makes sure that the
 * session holds the lock, and none of what a trigger may have locked.  If another worker
 * has got it in between, this one ends.
 */
void
omni_worker_keep(void)
{
	LockReleaseSession(USER_LOCKMETHOD);
	if (LockAcquire(&worker_lock, ExclusiveLock, true, true) == LOCKACQUIRE_NOT_AVAIL)
		ereport(FATAL,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("another background worker of omni_refresh has taken over")));
}

/*
 * Whether somebody waits for us to leave: a worker of another version of the
 * library, or who wants to drop, rename or copy our database.
 */
bool
omni_worker_is_unwanted(void)
{
	return LockHasWaiters(&worker_lock, ExclusiveLock, true) || is_database_locked();
}

/* Who wants to drop, rename or copy our database keeps new sessions out of it by a lock. */
static bool
is_database_locked(void)
{
	LOCKTAG		database;

	SET_LOCKTAG_OBJECT(database, InvalidOid, DatabaseRelationId, MyDatabaseId, 0);
	if (LockAcquire(&database, RowExclusiveLock, true, true) == LOCKACQUIRE_NOT_AVAIL)
		return true;
	(void) LockRelease(&database, RowExclusiveLock, true);
	return false;
}

/*
 * Ends the worker's part, unless somebody has asked for something since.  If there is
 * work left, another worker is started to go on with it.
 */
bool
omni_worker_leave_if_idle(void)
{
	bool		relieved = LockHasWaiters(&worker_lock, ExclusiveLock, true);
	Slot	   *slot;
	bool		idle;
	HandOver	result = HANDED_OVER;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(MyDatabaseId);
	idle = slot == NULL || (slot->count == 0 && !slot->flag);
	if (idle && slot != NULL)
	{
		/* the next worker must not find the lock taken */
		LockReleaseSession(USER_LOCKMETHOD);
		free_slot(slot);
	}
	if (idle && !relieved && has_work())
		result = start_successor();
	LWLockRelease(&shared->lock);

	tell_of_successor(result);
	return idle;
}

/*
 * Runs when the worker exits, however.  From 19 on, who wants to rename or copy the
 * database has workers ended: then, too, another one is to go on.
 */
static void
leave_slot(int code, Datum arg)
{
	Slot	   *slot;
	bool		locked;
	HandOver	result = HANDED_OVER;

	/* what ShutdownPostgres() is about to do, so that the lock goes first */
	AbortOutOfAnyTransaction();
	locked = is_database_locked();
	LockReleaseAll(USER_LOCKMETHOD, true);

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(MyDatabaseId);
	if (slot != NULL && slot->state == SLOT_RUNNING && slot->owner == my_proc())
	{
		bool		wanted = locked && (slot->flag || has_work());

		free_slot(slot);
		if (wanted)
			result = start_successor();
	}
	LWLockRelease(&shared->lock);

	tell_of_successor(result);
}

/*
 * Starts the worker after us, which waits like any new session until those are done
 * who want the database.  Called with the lock held.
 */
static HandOver
start_successor(void)
{
	StartInfo	info = {.layout = SHARED_NAME,.call = DSM_HANDLE_INVALID,.leave_at_once = true};
	Slot	   *slot;

	return start_in_slot(MyDatabaseId, NOBODY, &info, NULL, &slot);
}

static void
tell_of_successor(HandOver result)
{
	if (result != HANDED_OVER)
		ereport(LOG,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("the requests to Omni are queued, but nobody can send them now"),
				 errhint("Call omni_refresh_wake() when there is a background worker to spare.")));
}

/* Whether something was queued since this was asked last. */
bool
omni_worker_take_flag(void)
{
	Slot	   *slot;
	bool		flag;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(MyDatabaseId);
	flag = slot != NULL && slot->flag;
	if (flag)
		slot->flag = false;
	LWLockRelease(&shared->lock);
	return flag;
}

/*
 * The next call that some backend waits for, or NULL.  The segment lives until
 * it is detached; if that happens before omni_call_finish(), the caller learns
 * that its call was lost.
 */
dsm_segment *
omni_worker_next_call(void)
{
	for (;;)
	{
		dsm_handle	handle = DSM_HANDLE_INVALID;
		bool		was_full = false;
		dsm_segment *segment;
		OmniCall   *call;
		Slot	   *slot;

		LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
		slot = find_slot(MyDatabaseId);
		if (slot != NULL && slot->count > 0)
		{
			handle = slot->ring[slot->first].handle;
			was_full = slot->count == RING_SIZE;
			slot->first = (slot->first + 1) % RING_SIZE;
			slot->count--;
		}
		LWLockRelease(&shared->lock);

		if (handle == DSM_HANDLE_INVALID)
			return NULL;
		if (was_full)
			ConditionVariableBroadcast(&shared->room);

		if (dsm_find_mapping(handle) != NULL)	/* it is in hand already */
			continue;
		segment = dsm_attach(handle);
		if (segment == NULL)	/* the caller has left */
			continue;
		dsm_pin_mapping(segment);
		on_dsm_detach(segment, lose_call, (Datum) 0);
		call = dsm_segment_address(segment);
		pg_atomic_write_u32(&call->state, OMNI_CALL_TAKEN);
		return segment;
	}
}

/*
 * Tells the caller what became of its call, and lets go of the segment: the caller
 * may use it again at once.
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
	set_latch(caller);
	dsm_detach(segment);
}

/* Runs in the worker when it lets go of a call. */
static void
lose_call(dsm_segment *segment, Datum arg)
{
	OmniCall   *call = dsm_segment_address(segment);

	if (pg_atomic_read_u32(&call->state) == OMNI_CALL_DONE)
		return;
	pg_write_barrier();
	pg_atomic_write_u32(&call->state, OMNI_CALL_LOST);
	set_latch(call->caller);
}

static void
attach_shared(void)
{
	if (shared != NULL)
		return;
	shared = shared_memory_compat(SHARED_NAME, sizeof(Shared), init_shared);
	LWLockRegisterTranche_compat(shared->tranche, OMNI_EXTENSION);
}

static void
init_shared(OMNI_SHARED_INIT_ARGS)
{
	Shared	   *new = memory;

	memset(new, 0, sizeof(Shared));
	new->tranche = LWLockNewTrancheId_compat(OMNI_EXTENSION);
	LWLockInitialize(&new->lock, new->tranche);
	ConditionVariableInit(&new->room);
}

/*
 * The slot of a database, or NULL.  An unwatched start that has failed leaves one
 * that is freed here.  The next four are called with the lock held, as this is.
 */
static Slot *
find_slot(Oid database)
{
	for (int i = 0; i < MAX_DATABASES; i++)
	{
		Slot	   *slot = &shared->slots[i];

		if (start_has_failed(slot))
			free_slot(slot);
		if (slot->state != SLOT_FREE && slot->database == database)
			return slot;
	}
	return NULL;
}

/* Returns NULL when there is none left. */
static Slot *
make_slot(Oid database, SlotState state, int owner)
{
	for (int i = 0; i < MAX_DATABASES; i++)
	{
		Slot	   *slot = &shared->slots[i];

		if (slot->state == SLOT_FREE)
		{
			slot->state = state;
			slot->database = database;
			slot->flag = false;
			slot->owner = owner;
			slot->made_at = omni_clock();
			slot->generation = ++shared->generation;
			slot->first = 0;
			slot->count = 0;
			return slot;
		}
	}
	return NULL;
}

/* Those who wait in the ring begin anew. */
static void
free_slot(Slot *slot)
{
	for (int i = 0; i < slot->count; i++)
		set_latch(slot->ring[(slot->first + i) % RING_SIZE].caller);
	slot->state = SLOT_FREE;
	ConditionVariableBroadcast(&shared->room);
}

static int
my_proc(void)
{
	return MyProc - ProcGlobal->allProcs;
}

static void
set_latch(int proc)
{
	SetLatch(&ProcGlobal->allProcs[proc].procLatch);
}
