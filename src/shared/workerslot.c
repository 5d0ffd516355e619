/*-------------------------------------------------------------------------
 *
 * workerslot.c
 *		The background worker of each database: find it, start it, let it leave.  Shared
 *		memory has a slot for each worker, with a ring of the calls for it.
 *
 * One lock covers all slots, and with it three decisions that must not race:
 * to put a call into a ring, to start a worker, and a worker's to leave.  A slot
 * exists while a worker is being started (then some backend watches over the
 * start: its starter) or is running; it ends with the worker, or with a start
 * that failed.  The process that frees a slot sets the latches of the callers in
 * its ring, and they hand over their calls anew.  The lock is held briefly, and only an
 * out-of-memory error can be raised under it.
 *
 * Not the slot but a heavyweight lock (see omni_worker_attach()) guarantees that a
 * database has one worker at most, since two versions of this library may each have
 * shared memory of their own.
 *
 * No process watches the start of a worker for queued jobs: one that a commit, the launcher
 * or a worker that ends has requested.  The worker takes the slot over as soon as its
 * process exists.  If it does not within UNWATCHED_START, the next process that looks
 * for the slot frees it.
 *
 * A worker that ends with work left, for whatever reason, hands the slot over to its
 * successor.  The successor rests before it connects to the database, the longer the more
 * workers have ended early in a row, so that a worker that cannot run, or a start that cannot
 * succeed, does not keep the server busy.  A call does not wait for the end of the rest, but
 * ends it.
 *
 * While all worker processes are in use, the launcher, if there is one, tries again
 * to start any worker: the slot of a database that lacks one says so.  Where another database
 * needs that slot, the launcher must look into all databases instead.  While any database lacks
 * a worker, idle workers leave at once; with a launcher, so do workers that only wait.
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
#include "utils/wait_event.h"

#include "base/clock.h"
#include "base/compat.h"
#include "omni_refresh.h"
#include "shared/ending.h"
#include "shared/workerslot.h"

/* Raise the number with each change of the structs below, or of OmniCall */
#define SHARED_NAME			"omni_refresh layout 9"

/* Keep the total under 20 kB, which PostgreSQL 16 and older have to spare */
#define MAX_DATABASES		96
#define RING_SIZE			16

/* How many workers a call starts before it gives up */
#define MAX_STARTS			3

/* How long an unwatched start of a worker may take before it counts as failed, in ms */
#define UNWATCHED_START		5000

/* How long a worker waits at a time for another one to leave, as a setting */
#define ATTACH_ROUND		"1s"

/* A database is taken to lack a worker for this long after its last try to start one, in ms */
#define LACK_LASTS			2000

/* Tell the workers so at most this often, in ms */
#define LACK_ROUND			100

/* How long a successor rests, in ms: the least, doubled after each worker that ended early */
#define REST_MIN			1000
#define REST_MAX			(5 * 60 * 1000)

/* A worker that ends sooner than this after its start has ended early, in ms */
#define EARLY				(60 * 1000)

/* How often the launcher tries to start a worker, in ms */
#define LAUNCH_AGAIN		1000

typedef struct RingEntry
{
	dsm_handle	handle;
	int			caller;			/* index of its PGPROC */
} RingEntry;

typedef enum SlotState
{
	SLOT_FREE,
	SLOT_LACKING,				/* the launcher is to start a worker */
	SLOT_STARTING,
	SLOT_RESTING,				/* the worker has a process, and waits */
	SLOT_RUNNING
} SlotState;

#define NOBODY				(-1)

typedef struct Slot
{
	SlotState	state;
	Oid			database;
	int			flags;			/* OMNI_WAKE_*: what was asked for */
	int			owner;			/* PGPROC of the worker, or of its starter, or
								 * NOBODY */
	int64		made_at;		/* when the state was reached, by omni_clock() */
	int			rest;			/* of the last successor in ms, 0 if there was
								 * none */
	int64		rest_until;		/* by omni_clock() */
	bool		blocked;		/* the worker that starts waits for another
								 * one to leave */
	uint64		generation;		/* never used twice */
	int			first;			/* oldest entry of the ring */
	int			count;			/* entries in use */
	RingEntry	ring[RING_SIZE];
} Slot;

typedef struct Shared
{
	LWLock		lock;			/* protects all of this */
	uint64		generation;		/* of the newest slot */
	int			launcher;		/* its PGPROC, or NOBODY */
	ConditionVariable room;		/* some ring was full and no longer is */
	int64		complained_at;	/* see omni_worker_may_complain() */
	int64		lacked_at;		/* the last time a worker could not start, by
								 * omni_clock(), or 0 */
	bool		forgotten;		/* there was no slot for a database that lacks
								 * a worker */
	Slot		slots[MAX_DATABASES];
} Shared;

StaticAssertDecl(sizeof(Shared) < 20 * 1024, "too much shared memory");

/* What the starter of a worker passes to it, in bgw_extra */
typedef struct StartInfo
{
	char		layout[sizeof(SHARED_NAME)];	/* of the starter's library */
	dsm_handle	call;			/* of the starter's, or DSM_HANDLE_INVALID */
	bool		leave_at_once;	/* if there is nothing to do */
} StartInfo;

StaticAssertDecl(sizeof(StartInfo) <= BGW_EXTRALEN, "too much for bgw_extra");

static Shared *shared = NULL;
static LOCKTAG worker_lock;		/* held by the worker of the database */
static Oid	worker_database;	/* of this worker */
static bool (*has_work) (void) = NULL;	/* see omni_worker_attach() */

static void init_shared(OMNI_SHARED_INIT_ARGS);
static Slot *find_slot(Oid database);
static Slot *make_slot(Oid database, SlotState state, int owner);
static void free_slot(Slot *slot);
static void empty_ring(Slot *slot);
static void set_state(Slot *slot, SlotState state, int owner);
static bool start_worker(Oid database, const StartInfo *info, BackgroundWorkerHandle **handle);
static OmniHandOver ensure_worker(Oid database, int flags, bool at_once, bool leave_at_once,
								  BackgroundWorkerHandle **handle);
static OmniHandOver start_in_slot(Oid database, int owner, const StartInfo *info,
								  BackgroundWorkerHandle **handle, Slot **slot);
static bool is_mine(const Slot *slot);
static void note_lack(void);
static bool others_lack(void);
static bool acquire_lock(void);
static bool rests(long *left, bool *leave);
static void end_rest(Slot *slot);
static void wake_callers(const Slot *slot);
static OmniHandOver start_successor(Slot *slot, bool in_order);
static int	next_rest(const Slot *slot, bool in_order);
static bool leave_to_launcher(Slot *slot);
static void report_successor(OmniHandOver result);
static void forget_launcher(int code, Datum arg);
static bool start_has_failed(const Slot *slot);
static bool lock_on_database(VirtualTransactionId *holder);
static void leave_slot(int code, Datum arg);

/*
 * Make sure that this database has a worker, and that it does what the flags say.  Raises
 * no error.  The slots must be attached.
 */
OmniHandOver
omni_worker_ensure(int flags)
{
	return ensure_worker(MyDatabaseId, flags, false, false, NULL);
}

/*
 * Make sure that a call that no worker has taken yet is in the ring of a slot whose worker
 * is running or starting.  May be called any number of times.
 */
OmniHandOver
omni_worker_hand_over(OmniWaiter *waiter)
{
	StartInfo	info = {.layout = SHARED_NAME,.call = waiter->call};
	OmniHandOver result = HANDED_OVER;
	Slot	   *slot;
	pid_t		pid;

	omni_workerslots_attach();
	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(MyDatabaseId);

	if (slot != NULL && slot->state == SLOT_STARTING && slot->owner == omni_my_proc() &&
		GetBackgroundWorkerPid(waiter->start, &pid) == BGWH_STOPPED)
	{
		if (slot->rest == 0 || !leave_to_launcher(slot))
			free_slot(slot);
		result = START_FAILED;
	}
	else if (slot == NULL || slot->state == SLOT_LACKING || slot->state == SLOT_RESTING)
	{
		if (waiter->starts == MAX_STARTS)
			result = START_FAILED;
		else if (slot != NULL && slot->state == SLOT_RESTING)
			end_rest(slot);
		else
			result = start_in_slot(MyDatabaseId, omni_my_proc(), &info, &waiter->start, &slot);
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

			entry->handle = waiter->call;
			entry->caller = omni_my_proc();
			waiter->generation = slot->generation;
			if (slot->state == SLOT_RUNNING)
				omni_set_latch(slot->owner);
		}
	}
	LWLockRelease(&shared->lock);
	return result;
}

/*
 * Set *error to say why there is no worker; for a call, with the error that the worker
 * started for it reported.
 */
void
omni_worker_explain(OmniHandOver result, const OmniError *start_error, OmniError *error)
{
	if (result == NO_WORKER)
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
		omni_error_detail(error, "At most %d databases can have a background worker at a time.", MAX_DATABASES);
		omni_error_hint(error, "Try again later: a worker leaves for another database as soon as it has nothing to do.");
	}
	else
	{
		omni_error_set(error, ERRCODE_CONFIGURATION_LIMIT_EXCEEDED,
					   "could not start the background worker of omni_refresh");
		if (start_error->sqlstate != 0)
			omni_error_detail(error, "The worker reported: %s.", start_error->message);
		omni_error_hint(error, "%s",
						start_error->hint[0] != '\0' ? start_error->hint :
						start_error->sqlstate != 0 ? "The server's log says more." :
						"The server's log says why.  If the library was replaced, by an upgrade, open a new session.");
	}
}

/*
 * Return, palloc'd, what a call waits for: whether a worker has taken it or not, the beginning of a
 * sentence about that worker.
 */
char *
omni_worker_describe(bool taken)
{
	Slot	   *slot;
	bool		running;
	bool		blocked;
	int			pid = 0;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(MyDatabaseId);
	running = slot != NULL && slot->state == SLOT_RUNNING;
	blocked = slot != NULL && slot->blocked;
	if (running)
		pid = ProcGlobal->allProcs[slot->owner].pid;
	LWLockRelease(&shared->lock);

	if (blocked)
		return pstrdup("The worker has not started, since one of another version of the library still serves older sessions");
	if (!running)
		return pstrdup("The worker has not started");
	return psprintf(taken ? "The worker (PID %d) has taken the call and not replied" :
					"The worker (PID %d) has not taken the call", pid);
}

/* Wait until a ring that was full has room, for a while. */
void
omni_worker_wait_for_room(void)
{
	static uint32 wait_event = 0;

	if (wait_event == 0)
		wait_event = WaitEventExtensionNew("OmniRefreshRing");
	(void) ConditionVariableTimedSleep(&shared->room, OMNI_LOOK_ROUND, wait_event);
}

/*
 * A call of this process was abandoned: wake the worker to see it; or, if this process
 * was watching the start of one, free the slot.
 */
void
omni_worker_abandon_call(void)
{
	Slot	   *slot;

	if (shared == NULL)			/* could not be attached, so nothing was
								 * handed over */
		return;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(MyDatabaseId);
	if (slot != NULL && slot->state == SLOT_RUNNING)
		omni_set_latch(slot->owner);
	else if (slot != NULL && slot->owner == omni_my_proc())
		free_slot(slot);
	LWLockRelease(&shared->lock);
}

/*
 * Make sure that a database has a worker, running, starting or resting; no process watches
 * the start.  Have the worker do what the flags say; with at_once, even if it rests.  If
 * handle is not NULL, sets *handle when a worker was started.  If it is NULL, raises no error,
 * since it may be called after a commit.
 */
static OmniHandOver
ensure_worker(Oid database, int flags, bool at_once, bool leave_at_once,
			  BackgroundWorkerHandle **handle)
{
	StartInfo	info = {
		.layout = SHARED_NAME,.call = DSM_HANDLE_INVALID,.leave_at_once = leave_at_once
	};
	OmniHandOver result = HANDED_OVER;
	Slot	   *slot;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(database);
	if (slot == NULL || slot->state == SLOT_LACKING)
		result = start_in_slot(database, NOBODY, &info, handle, &slot);
	else if (at_once && slot->state == SLOT_RESTING)
		end_rest(slot);
	if (result == HANDED_OVER && (flags & ~slot->flags) != 0)
	{
		slot->flags |= flags;
		if (slot->state == SLOT_RUNNING)
			omni_set_latch(slot->owner);
	}
	LWLockRelease(&shared->lock);
	return result;
}

/*
 * Start the worker of a database for the launcher.  If the database has one already, or its
 * worker rests, *handle stays unchanged.  Returns false if no worker is available at the moment.
 */
bool
omni_worker_launch(Oid database, BackgroundWorkerHandle **handle)
{
	StartInfo	info = {.layout = SHARED_NAME,.call = DSM_HANDLE_INVALID,.leave_at_once = true};
	OmniHandOver result = HANDED_OVER;
	Slot	   *slot;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(database);
	if (slot == NULL || (slot->state == SLOT_LACKING && slot->rest_until <= omni_clock()))
		result = start_in_slot(database, NOBODY, &info, handle, &slot);
	LWLockRelease(&shared->lock);
	return result == HANDED_OVER;
}

/* Become the process that starts the workers that could not be started at once. */
void
omni_launcher_attach(void)
{
	omni_workerslots_attach();
	before_shmem_exit(forget_launcher, (Datum) 0);
	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	shared->launcher = omni_my_proc();
	LWLockRelease(&shared->lock);
}

/* before_shmem_exit callback of the launcher.  The next launcher goes on. */
static void
forget_launcher(int code, Datum arg)
{
	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	shared->launcher = NOBODY;
	LWLockRelease(&shared->lock);
}

/*
 * In the launcher: start the workers that databases lack, first where one has been lacking for
 * longest.  Returns how long to wait for the next try, in ms, or -1 if no database lacks one.
 */
long
omni_worker_launch_lacking(void)
{
	StartInfo	info = {.layout = SHARED_NAME,.call = DSM_HANDLE_INVALID,.leave_at_once = true};
	bool		any_rests = false;
	Slot	   *next;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	do
	{
		next = NULL;
		for (int i = 0; i < MAX_DATABASES; i++)
		{
			Slot	   *slot = &shared->slots[i];

			if (slot->state != SLOT_LACKING)
				continue;
			if (slot->rest_until > omni_clock())
				any_rests = true;
			else if (next == NULL || slot->made_at < next->made_at)
				next = slot;
		}
	} while (next != NULL &&
			 start_in_slot(next->database, NOBODY, &info, NULL, &next) == HANDED_OVER);
	LWLockRelease(&shared->lock);
	return next != NULL || any_rests ? LAUNCH_AGAIN : -1;
}

/*
 * In the launcher: return whether a database that lacks a worker has no slot, since the last
 * call of this function.
 */
bool
omni_worker_take_forgotten(void)
{
	bool		forgotten;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	forgotten = shared->forgotten;
	shared->forgotten = false;
	LWLockRelease(&shared->lock);
	return forgotten;
}

/* Return whether this database has a worker, running, starting or resting. */
bool
omni_worker_exists(void)
{
	Slot	   *slot;
	bool		exists;

	omni_workerslots_attach();
	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(MyDatabaseId);
	exists = slot != NULL && slot->state != SLOT_LACKING;
	LWLockRelease(&shared->lock);
	return exists;
}

/* Have the worker do what the flags say.  Returns false and sets *error if there is no worker. */
bool
omni_worker_wake(int flags, OmniError *error)
{
	OmniHandOver result;

	omni_workerslots_attach();
	result = ensure_worker(MyDatabaseId, flags, true, false, NULL);
	if (result != HANDED_OVER)
		omni_worker_explain(result, NULL, error);
	return result == HANDED_OVER;
}

/*
 * Return true to the first process that asks within a round, and false to the others, so that
 * sessions that fail in the same way write one message.  Without shared memory, return true
 * to each process once in a round.
 */
bool
omni_worker_may_complain(int64 round)
{
	static int64 own = 0;
	int64	   *complained_at = shared != NULL ? &shared->complained_at : &own;
	int64		now = omni_clock();
	bool		may;

	if (shared != NULL)
		LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	may = *complained_at == 0 || now - *complained_at >= round;
	if (may)
		*complained_at = now;
	if (shared != NULL)
		LWLockRelease(&shared->lock);
	return may;
}

/*
 * Start a worker in *slot, which is SLOT_LACKING, or in a new slot if *slot is NULL.  If that
 * fails, and there is a launcher, it tries again; the launcher itself knows what it has not
 * started.  Called with the lock held.
 */
static OmniHandOver
start_in_slot(Oid database, int owner, const StartInfo *info, BackgroundWorkerHandle **handle,
			  Slot **slot)
{
	bool		is_new = *slot == NULL;

	if (is_new)
		*slot = make_slot(database, SLOT_STARTING, owner);
	if (*slot == NULL)
	{
		note_lack();
		return NO_SLOT;
	}
	if (!start_worker(database, info, handle))
	{
		if (is_new && (shared->launcher == omni_my_proc() || !leave_to_launcher(*slot)))
			free_slot(*slot);
		note_lack();
		return NO_WORKER;
	}
	if ((*slot)->rest == 0)
		(*slot)->rest_until = 0;	/* it has only waited for a job to be due */
	shared->lacked_at = 0;		/* who still lacks one says so again */
	set_state(*slot, SLOT_STARTING, owner);
	return HANDED_OVER;
}

/*
 * A worker could not be started: have workers that only wait leave.  Called with the lock held,
 * as the next function.
 */
static void
note_lack(void)
{
	int64		now = omni_clock();

	if (shared->lacked_at != 0 && now - shared->lacked_at < OMNI_MS(LACK_ROUND))
		return;
	shared->lacked_at = now;
	for (int i = 0; i < MAX_DATABASES; i++)
	{
		const Slot *slot = &shared->slots[i];

		if (slot->state == SLOT_RUNNING || slot->state == SLOT_RESTING)
			omni_set_latch(slot->owner);
	}
}

static bool
others_lack(void)
{
	return shared->lacked_at != 0 && omni_clock() - shared->lacked_at < OMNI_MS(LACK_LASTS);
}

/* Return whether an unwatched start has taken too long.  Called with the lock held. */
static bool
start_has_failed(const Slot *slot)
{
	return slot->state == SLOT_STARTING && slot->owner == NOBODY &&
		omni_clock() - slot->made_at >= OMNI_MS(UNWATCHED_START);
}

/*
 * Register a worker with the postmaster.  Returns false if none is available.  With a
 * handle, or in the launcher, the latch of this process is set when the worker starts and when
 * it ends; without one, nothing is allocated and no error raised.
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
	if (handle != NULL || shared->launcher == omni_my_proc())
		worker.bgw_notify_pid = MyProcPid;
	memcpy(worker.bgw_extra, info, sizeof(*info));
	return RegisterDynamicBackgroundWorker(&worker, handle);
}

/*
 * Begin a worker.  Sets *call to the call that it was started for, or DSM_HANDLE_INVALID.
 * Returns whether to leave at once if there is nothing to do.
 *
 * If its library is not the starter's, it cannot take a call: raise an error if the starter
 * watches the start.  Otherwise it is for queued jobs, which it finds in their table.
 */
bool
omni_worker_begin(dsm_handle *call)
{
	StartInfo	info;

	memcpy(&info, MyBgworkerEntry->bgw_extra, sizeof(info));
	if (strncmp(info.layout, SHARED_NAME, sizeof(info.layout)) != 0)
	{
		if (MyBgworkerEntry->bgw_notify_pid != 0)
			ereport(FATAL,
					(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					 errmsg("the library of omni_refresh is not the one that the session has loaded"),
					 errhint("It was replaced, by an upgrade: open a new session.")));
		info.call = DSM_HANDLE_INVALID;
		info.leave_at_once = false;
	}

	worker_database = DatumGetObjectId(MyBgworkerEntry->bgw_main_arg);
	omni_workerslots_attach();
	before_shmem_exit(leave_slot, (Datum) 0);
	*call = info.call;
	return info.leave_at_once;
}

/*
 * Before the worker connects to its database: take over the slot if no process watches this
 * start, and rest as long as the slot says.  Returns false if the database has another worker,
 * which is then to read the queue; or if another database lacks a worker, and the launcher starts
 * this one again later.
 */
bool
omni_worker_take_slot(void)
{
	Slot	   *slot;
	bool		taken;
	bool		leave = false;
	long		left;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(worker_database);
	if (slot == NULL)
		slot = make_slot(worker_database, SLOT_STARTING, NOBODY);
	taken = slot == NULL || slot->state == SLOT_LACKING ||
		(slot->state == SLOT_STARTING && slot->owner == NOBODY);
	if (taken && slot != NULL)
	{
		set_state(slot, slot->rest_until > omni_clock() ? SLOT_RESTING : SLOT_STARTING,
				  omni_my_proc());
		if (slot->state == SLOT_RESTING)
			wake_callers(slot); /* to end the rest */
	}
	else if (!taken)
	{
		slot->flags |= OMNI_WAKE_QUEUE;
		if (slot->state == SLOT_RUNNING)
			omni_set_latch(slot->owner);
	}
	LWLockRelease(&shared->lock);

	while (taken && rests(&left, &leave))
	{
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_EXIT_ON_PM_DEATH | WL_TIMEOUT, left,
						 WaitEventExtensionNew("OmniRefreshRest"));
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
	return taken && !leave;
}

/*
 * Return whether this worker has to rest, and for how long; if no longer, end the rest.  Sets
 * *leave instead if another database lacks a worker.
 */
static bool
rests(long *left, bool *leave)
{
	Slot	   *slot;
	bool		resting;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(worker_database);
	resting = is_mine(slot) && slot->state == SLOT_RESTING;
	if (resting)
	{
		*left = omni_clock_until(slot->rest_until);
		resting = *left > 0;
		if (!resting)
			end_rest(slot);
		else if (others_lack() && leave_to_launcher(slot))
		{
			*leave = true;
			resting = false;
		}
	}
	LWLockRelease(&shared->lock);
	return resting;
}

/* End the rest of a worker.  Called with the lock held. */
static void
end_rest(Slot *slot)
{
	set_state(slot, SLOT_STARTING, slot->owner);
	omni_set_latch(slot->owner);
}

/* Return whether a slot, or NULL, belongs to this worker.  Called with the lock held. */
static bool
is_mine(const Slot *slot)
{
	return slot != NULL && slot->owner == omni_my_proc();
}

/* There is no extension: free the slot instead of omni_worker_attach(). */
void
omni_worker_turn_back(void)
{
	Slot	   *slot;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(worker_database);
	if (is_mine(slot))
		free_slot(slot);
	LWLockRelease(&shared->lock);
}

/*
 * Raise an error in a worker, for functions that wait for it: triggers of the tables' owner
 * run here, and the worker would wait for itself.
 */
void
omni_not_in_worker(void)
{
	if (has_work != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("the background worker of omni_refresh cannot wait for itself"),
				 errhint("In a trigger of its tables, call omni_refresh_on_commit().")));
}

/*
 * Make this process the worker of its database.  Waits for another worker to leave, for a
 * while; returns false if it has not left.
 *
 * The lock is held for the life of the process.  It is of the advisory kind,
 * which survives aborted transactions, with a fourth field that the SQL
 * functions for advisory locks cannot reach.
 *
 * *has_work_for_next is called when this worker leaves: whether the next worker would
 * have anything to do.  It must raise no error.
 */
bool
omni_worker_attach(bool (*has_work_for_next) (void))
{
	Slot	   *slot;

	SET_LOCKTAG_ADVISORY(worker_lock, MyDatabaseId, 0x6f6d6e69, 0x72667368, 0x4f52);	/* "omnirfsh" */
	if (!acquire_lock())
	{
		LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
		slot = find_slot(worker_database);
		if (slot != NULL && slot->state == SLOT_STARTING)
			slot->blocked = true;
		LWLockRelease(&shared->lock);
		return false;
	}
	has_work = has_work_for_next;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(worker_database);
	if (slot == NULL)
		slot = make_slot(worker_database, SLOT_RUNNING, omni_my_proc());
	if (slot != NULL)
		set_state(slot, SLOT_RUNNING, omni_my_proc());
	LWLockRelease(&shared->lock);

	if (slot == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("too many databases use omni_refresh at once")));
	return true;
}

/*
 * Acquire the lock of the worker for this session, in a transaction of its own.  Wait in the
 * lock's queue, where the other worker sees it.  Returns false after ATTACH_ROUND.
 */
static bool
acquire_lock(void)
{
	MemoryContext context = CurrentMemoryContext;
	volatile bool acquired = false;

	SetConfigOption("lock_timeout", ATTACH_ROUND, PGC_SUSET, PGC_S_OVERRIDE);
	StartTransactionCommand();
	PG_TRY();
	{
		(void) LockAcquire(&worker_lock, ExclusiveLock, true, false);
		acquired = true;
	}
	PG_CATCH();
	{
		if (geterrcode() != ERRCODE_LOCK_NOT_AVAILABLE)
			PG_RE_THROW();
		MemoryContextSwitchTo(context);
		FlushErrorState();
	}
	PG_END_TRY();
	if (acquired)
		CommitTransactionCommand();
	else
		AbortCurrentTransaction();
	MemoryContextSwitchTo(context);
	SetConfigOption("lock_timeout", OMNI_LOCK_TIMEOUT, PGC_SUSET, PGC_S_OVERRIDE);
	return acquired;
}

/*
 * Hold the lock for this transaction, too: a user's trigger may call
 * pg_advisory_unlock_all(), which releases the locks of the session.
 */
void
omni_worker_hold(void)
{
	(void) LockAcquire(&worker_lock, ExclusiveLock, false, true);
}

/*
 * Before the end of the transaction, while omni_worker_hold() still holds this lock: make sure
 * that the session holds it, and no advisory lock that a trigger may have taken.
 */
void
omni_worker_keep(void)
{
	LockReleaseSession(USER_LOCKMETHOD);
	omni_worker_keep_after_error();
}

/*
 * After an error has ended the transaction: make sure that the session holds this lock.
 * Release no other one, which could only be done with this one, and would hand it to another worker that
 * waits for it; the next transaction does so.  If another worker has acquired the lock, since a
 * trigger has released it, this one ends.
 */
void
omni_worker_keep_after_error(void)
{
	if (LockAcquire(&worker_lock, ExclusiveLock, true, true) == LOCKACQUIRE_NOT_AVAIL)
		ereport(FATAL,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("another background worker of omni_refresh has taken over")));
}

/*
 * Return whether another process waits for this worker to leave: a worker of another version of
 * the library, or a session that drops, renames or copies the database.  Sets *again if
 * that is not certain, so that the caller asks again soon.
 *
 * Any role may run DROP DATABASE, which locks the database before it checks who owns it.
 * As the next worker sends again what this one has sent, only a lock counts that one
 * transaction holds for a while.
 */
bool
omni_worker_is_unwanted(bool *again)
{
	static VirtualTransactionId last = {0};
	VirtualTransactionId holder = {0};
	bool		locked = lock_on_database(&holder);
	bool		same = locked && VirtualTransactionIdEquals(holder, last);

	last = holder;
	*again = locked && !same;
	return same || LockHasWaiters(&worker_lock, ExclusiveLock, true);
}

/*
 * Return whether a session holds a lock on the database that keeps new sessions out, to
 * drop, rename or copy it; sets *holder to the first such session's transaction.
 */
static bool
lock_on_database(VirtualTransactionId *holder)
{
	LOCKTAG		database;
	VirtualTransactionId *holders;
	int			count;

	SET_LOCKTAG_OBJECT(database, InvalidOid, DatabaseRelationId, MyDatabaseId, 0);
	holders = GetLockConflicts(&database, RowExclusiveLock, &count);
	if (count > 0)
		*holder = holders[0];
	pfree(holders);
	return count > 0;
}

/*
 * Free the slot, unless a call or a wake-up has arrived.  If any work is left, start
 * another worker for it.  Returns whether this worker must leave.
 */
bool
omni_worker_leave_if_idle(void)
{
	bool		relieved = LockHasWaiters(&worker_lock, ExclusiveLock, true);
	Slot	   *slot;
	bool		idle;
	OmniHandOver result = HANDED_OVER;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(worker_database);
	idle = slot == NULL || (slot->count == 0 && slot->flags == 0);
	if (idle && slot != NULL)
	{
		/* the next worker must not find the lock taken */
		LockReleaseSession(USER_LOCKMETHOD);
		if (!relieved && has_work())
			result = start_successor(slot, true);
		else
			free_slot(slot);
	}
	LWLockRelease(&shared->lock);

	report_successor(result);
	return idle;
}

/* Return whether any database lacks a worker. */
bool
omni_worker_others_lack(void)
{
	bool		lack;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	lack = others_lack();
	LWLockRelease(&shared->lock);
	return lack;
}

/*
 * This worker has nothing to do for some ms, and another database lacks a worker: have the
 * launcher start the next one after that time.  Returns whether this worker must leave; not if
 * there is no launcher, or a call or a wake-up has arrived.
 */
bool
omni_worker_yield(long wait)
{
	Slot	   *slot;
	bool		yields;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(worker_database);
	yields = is_mine(slot) && slot->count == 0 && slot->flags == 0 &&
		shared->launcher != NOBODY;
	if (yields)
	{
		LockReleaseSession(USER_LOCKMETHOD);
		slot->rest = 0;
		slot->rest_until = omni_clock() + OMNI_MS(wait);
		(void) leave_to_launcher(slot);
	}
	LWLockRelease(&shared->lock);
	return yields;
}

/*
 * before_shmem_exit callback: on every way out, free the slot if it is this worker's, and
 * start a successor if any work is left, or if that is not known.  ShutdownPostgres(), which
 * has run before, has released the lock.
 *
 * From 19 on, a session that renames or copies the database terminates its workers: that is
 * in order, as if this worker had left by itself.
 */
static void
leave_slot(int code, Datum arg)
{
	VirtualTransactionId holder;
	bool		locked = OidIsValid(MyDatabaseId) && lock_on_database(&holder);
	OmniHandOver result = HANDED_OVER;
	Slot	   *slot;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(worker_database);
	if (is_mine(slot) && !omni_ending_is_final() &&
		(has_work == NULL || slot->flags != 0 || has_work()))
		result = start_successor(slot, locked);
	else if (is_mine(slot))
		free_slot(slot);
	LWLockRelease(&shared->lock);

	report_successor(result);
}

/*
 * Hand the slot of this worker over to its successor, which rests first.  Then the successor
 * waits like any new session while the database is locked.  Give up after the longest rest if
 * this worker and those before it have failed before they were attached.  Called with the lock
 * held.
 */
static OmniHandOver
start_successor(Slot *slot, bool in_order)
{
	StartInfo	info = {.layout = SHARED_NAME,.call = DSM_HANDLE_INVALID,.leave_at_once = true};
	int			rest = next_rest(slot, in_order);
	bool		give_up = has_work == NULL && slot->rest == REST_MAX;

	free_slot(slot);
	if (give_up)
		return START_FAILED;
	slot = make_slot(worker_database, SLOT_STARTING, NOBODY);	/* one is free */
	slot->rest = rest;
	slot->rest_until = omni_clock() + OMNI_MS(rest);
	if (start_worker(worker_database, &info, NULL))
		return HANDED_OVER;
	if (!leave_to_launcher(slot))
		free_slot(slot);
	return NO_WORKER;
}

/* Return how long the successor of this worker rests, in ms. */
static int
next_rest(const Slot *slot, bool in_order)
{
	bool		early = slot->state != SLOT_RUNNING ||
	omni_clock() - slot->made_at < OMNI_MS(EARLY);

	if (in_order || !early || slot->rest == 0)
		return REST_MIN;
	return Min(2 * slot->rest, REST_MAX);
}

/*
 * Have the launcher start a worker in a slot.  Returns false if there is no launcher.  Called
 * with the lock held.
 */
static bool
leave_to_launcher(Slot *slot)
{
	if (shared->launcher == NOBODY)
		return false;
	empty_ring(slot);
	slot->generation = ++shared->generation;
	set_state(slot, SLOT_LACKING, NOBODY);
	omni_set_latch(shared->launcher);
	return true;
}

static void
report_successor(OmniHandOver result)
{
	if (result != HANDED_OVER)
		ereport(LOG,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("could not start a background worker for queued requests"),
				 result == START_FAILED ?
				 errdetail("All attempts have failed for several minutes.") :
				 errdetail("All of the server's max_worker_processes (%d) are in use.",
						   max_worker_processes),
				 result == NO_WORKER && shared->launcher != NOBODY ?
				 errhint("The launcher tries again.") :
				 errhint("Call omni_refresh_wake() when a background worker can start.")));
}

/* Return whether a flag was set since the last call of this function for it. */
bool
omni_worker_take_flag(int flag)
{
	Slot	   *slot;
	bool		is_set;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(worker_database);
	is_set = slot != NULL && (slot->flags & flag) != 0;
	if (is_set)
		slot->flags &= ~flag;
	LWLockRelease(&shared->lock);
	return is_set;
}

/* Return the segment of the oldest call in the ring, or DSM_HANDLE_INVALID. */
dsm_handle
omni_worker_next_call(void)
{
	dsm_handle	handle = DSM_HANDLE_INVALID;
	Slot	   *slot;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(worker_database);
	if (slot != NULL && slot->count > 0)
		handle = slot->ring[slot->first].handle;
	LWLockRelease(&shared->lock);
	return handle;
}

/*
 * Remove the oldest call from the ring, which this worker has taken; or, if it is to be tried
 * again, make it the newest one.
 */
void
omni_worker_remove_call(bool again)
{
	bool		was_full = false;
	Slot	   *slot;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(worker_database);
	if (slot != NULL && slot->count > 0)
	{
		RingEntry	oldest = slot->ring[slot->first];

		was_full = slot->count == RING_SIZE && !again;
		slot->first = (slot->first + 1) % RING_SIZE;
		if (again)
			slot->ring[(slot->first + slot->count - 1) % RING_SIZE] = oldest;
		else
			slot->count--;
	}
	LWLockRelease(&shared->lock);

	if (was_full)
		ConditionVariableBroadcast(&shared->room);
}

/*
 * Attach the shared memory of the slots.  Raises an error if that fails.  The functions
 * of this file that may raise one attach it themselves; a caller of those that must not
 * does it in advance.
 */
void
omni_workerslots_attach(void)
{
	if (shared == NULL)
		shared = shared_memory_compat(SHARED_NAME, sizeof(Shared), init_shared);
}

static void
init_shared(OMNI_SHARED_INIT_ARGS)
{
	Shared	   *new = memory;

	memset(new, 0, sizeof(Shared));
	LWLockInitialize(&new->lock, LWLockNewTrancheId(OMNI_EXTENSION));
	new->launcher = NOBODY;
	ConditionVariableInit(&new->room);
}

/*
 * Find the slot of a database.  Returns NULL if it has none.  Frees the slots of unwatched
 * starts that have failed.  Called with the lock held, as the next two functions.
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

/*
 * Make a slot for a database, if need be of one that lacks a worker, which the launcher then
 * has to find.  Returns NULL if all are in use by workers.
 */
static Slot *
make_slot(Oid database, SlotState state, int owner)
{
	Slot	   *slot = NULL;

	for (int i = 0; i < MAX_DATABASES && (slot == NULL || slot->state != SLOT_FREE); i++)
	{
		Slot	   *other = &shared->slots[i];

		if (other->state == SLOT_FREE || (other->state == SLOT_LACKING && slot == NULL))
			slot = other;
	}
	if ((slot == NULL || slot->state == SLOT_LACKING) && shared->launcher != NOBODY)
	{
		shared->forgotten = true;
		omni_set_latch(shared->launcher);
	}
	if (slot == NULL)
		return NULL;

	set_state(slot, state, owner);
	slot->database = database;
	slot->flags = 0;
	slot->rest = 0;
	slot->rest_until = 0;
	slot->generation = ++shared->generation;
	slot->first = 0;
	slot->count = 0;
	return slot;
}

static void
free_slot(Slot *slot)
{
	empty_ring(slot);
	slot->state = SLOT_FREE;
}

/*
 * Empty the ring of a slot that ends: the callers in it, and those who wait for room, hand over their
 * calls anew.  Called with the lock held.
 */
static void
empty_ring(Slot *slot)
{
	wake_callers(slot);
	slot->count = 0;
	ConditionVariableBroadcast(&shared->room);
}

/* Set the latches of the callers in the ring of a slot.  Called with the lock held. */
static void
wake_callers(const Slot *slot)
{
	for (int i = 0; i < slot->count; i++)
		omni_set_latch(slot->ring[(slot->first + i) % RING_SIZE].caller);
}

/* Called with the lock held. */
static void
set_state(Slot *slot, SlotState state, int owner)
{
	slot->state = state;
	slot->owner = owner;
	slot->blocked = false;
	slot->made_at = omni_clock();
}

int
omni_my_proc(void)
{
	return MyProc - ProcGlobal->allProcs;
}

void
omni_set_latch(int proc)
{
	SetLatch(&ProcGlobal->allProcs[proc].procLatch);
}
