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
 * No process watches a start that a commit requested.  If that start fails, the slot stays
 * occupied for OMNI_UNWATCHED_START, so that not each commit starts a worker that cannot
 * run; then the next process that looks for the slot frees it.
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

#include "clock.h"
#include "compat.h"
#include "omni_refresh.h"
#include "workerslot.h"

/* Raise the number with each change of the structs below, or of OmniCall */
#define SHARED_NAME			"omni_refresh layout 6"

/* Keep the total under 20 kB, which PostgreSQL 16 and older have to spare */
#define MAX_DATABASES		96
#define RING_SIZE			16

/* How many workers a call starts before it gives up */
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
	uint64		generation;		/* never used twice */
	int			first;			/* oldest entry of the ring */
	int			count;			/* entries in use */
	RingEntry	ring[RING_SIZE];
} Slot;

typedef struct Shared
{
	LWLock		lock;			/* protects all of this */
	uint64		generation;		/* of the newest slot */
	ConditionVariable room;		/* some ring was full and no longer is */
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
static bool (*has_work) (void) = NULL;	/* see omni_worker_attach() */

static void init_shared(OMNI_SHARED_INIT_ARGS);
static Slot *find_slot(Oid database);
static Slot *make_slot(Oid database, SlotState state, int owner);
static void free_slot(Slot *slot);
static bool start_worker(Oid database, const StartInfo *info, BackgroundWorkerHandle **handle);
static OmniHandOver ensure_worker(Oid database, bool flag, bool leave_at_once,
								  BackgroundWorkerHandle **handle);
static OmniHandOver start_in_slot(Oid database, int owner, const StartInfo *info,
								  BackgroundWorkerHandle **handle, Slot **slot);
static OmniHandOver start_successor(void);
static void report_successor(OmniHandOver result);
static bool start_has_failed(const Slot *slot);
static bool lock_on_database(VirtualTransactionId *holder);
static void leave_slot(int code, Datum arg);

/*
 * Make sure that this database has a worker; with flag, that it reads the queue.  Raises
 * no error.  The slots must be attached.
 */
OmniHandOver
omni_worker_ensure(bool flag)
{
	return ensure_worker(MyDatabaseId, flag, false, NULL);
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
		free_slot(slot);
		result = START_FAILED;
	}
	else if (slot == NULL)
	{
		if (waiter->starts == MAX_STARTS)
			result = START_FAILED;
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
	if (result == HANDED_OVER && slot->owner == NOBODY)
		result = HANDED_OVER_UNWATCHED;
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
		omni_error_hint(error, "Try again when a worker has left; the setting \"omni_refresh.idle_timeout\" says when it does.");
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

/* Wait until a ring that was full has room. */
void
omni_worker_wait_for_room(void)
{
	static uint32 wait_event = 0;

	if (wait_event == 0)
		wait_event = WaitEventExtensionNew("OmniRefreshRing");
	ConditionVariableSleep(&shared->room, wait_event);
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
 * Make sure that a database has a worker, running or starting; no process watches the
 * start.  With flag, have the worker read the queue.  If handle is not NULL, sets *handle
 * when a worker was started.  If it is NULL, raises no error, since it may be called after
 * a commit.
 */
static OmniHandOver
ensure_worker(Oid database, bool flag, bool leave_at_once, BackgroundWorkerHandle **handle)
{
	StartInfo	info = {
		.layout = SHARED_NAME,.call = DSM_HANDLE_INVALID,.leave_at_once = leave_at_once
	};
	OmniHandOver result = HANDED_OVER;
	Slot	   *slot;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(database);
	if (slot == NULL)
		result = start_in_slot(database, NOBODY, &info, handle, &slot);
	if (flag && result == HANDED_OVER && !slot->flag)
	{
		slot->flag = true;
		if (slot->state == SLOT_RUNNING)
			omni_set_latch(slot->owner);
	}
	LWLockRelease(&shared->lock);
	return result;
}

/*
 * Start the worker of a database for the launcher.  If the database has one already,
 * *handle stays unchanged.  Returns false if no worker is available at the moment.
 */
bool
omni_worker_launch(Oid database, BackgroundWorkerHandle **handle)
{
	omni_workerslots_attach();
	return ensure_worker(database, false, true, handle) == HANDED_OVER;
}

/* Have the worker read the queue.  Returns false and sets *error if there is no worker. */
bool
omni_worker_wake(OmniError *error)
{
	OmniHandOver result;

	omni_workerslots_attach();
	result = ensure_worker(MyDatabaseId, true, false, NULL);
	if (result != HANDED_OVER)
		omni_worker_explain(result, NULL, error);
	return result == HANDED_OVER;
}

/* Make a slot and start its worker.  Called with the lock held. */
static OmniHandOver
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

/* Return whether an unwatched start has taken too long.  Called with the lock held. */
static bool
start_has_failed(const Slot *slot)
{
	return slot->state == SLOT_STARTING && slot->owner == NOBODY &&
		omni_clock() - slot->made_at >= OMNI_MS(OMNI_UNWATCHED_START);
}

/*
 * Register a worker with the postmaster.  Returns false if none is available.  With a
 * handle, the latch of this process is set when the worker starts and when it ends;
 * without one, nothing is allocated and no error raised.
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
 * Begin a worker: raise an error unless its library is the starter's.  Sets *call to the
 * call that it was started for, or DSM_HANDLE_INVALID.  Returns whether to leave at once
 * if there is nothing to do.
 */
bool
omni_worker_begin(dsm_handle *call)
{
	StartInfo	info;

	memcpy(&info, MyBgworkerEntry->bgw_extra, sizeof(info));
	if (strncmp(info.layout, SHARED_NAME, sizeof(info.layout)) != 0)
		ereport(FATAL,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("the library of omni_refresh is not the one that the session has loaded"),
				 errhint("It was replaced, by an upgrade: open a new session.")));

	*call = info.call;
	return info.leave_at_once;
}

/* Free the slot instead of omni_worker_attach(), so that another worker can be started. */
void
omni_worker_turn_back(void)
{
	Slot	   *slot;

	omni_workerslots_attach();
	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(MyDatabaseId);
	if (slot != NULL && slot->state == SLOT_STARTING && slot->owner == NOBODY)
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
 * Make this process the worker of its database.  Waits for up to lock_timeout for
 * another worker to leave, then raises an error.  Needs a transaction.
 *
 * The lock is held for the life of the process.  It is of the advisory kind,
 * which survives aborted transactions, with a fourth field that the SQL
 * functions for advisory locks cannot reach.
 *
 * *has_work_for_next is called when this worker leaves: whether the next worker would
 * have anything to do.  It must raise no error.
 */
void
omni_worker_attach(bool (*has_work_for_next) (void))
{
	Slot	   *slot;

	has_work = has_work_for_next;
	omni_workerslots_attach();
	SET_LOCKTAG_ADVISORY(worker_lock, MyDatabaseId, 0x6f6d6e69, 0x72667368, 0x4f52);	/* "omnirfsh" */
	(void) LockAcquire(&worker_lock, ExclusiveLock, true, false);
	before_shmem_exit(leave_slot, (Datum) 0);

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(MyDatabaseId);
	if (slot == NULL)
		slot = make_slot(MyDatabaseId, SLOT_RUNNING, omni_my_proc());
	if (slot != NULL)
	{
		slot->state = SLOT_RUNNING;
		slot->owner = omni_my_proc();
	}
	LWLockRelease(&shared->lock);

	if (slot == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("too many databases use omni_refresh at once")));
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
 * Before the end of the transaction, or after it if there was an error: make sure that the
 * session holds this lock, and no advisory lock that a trigger may have taken.  If another
 * worker has acquired the lock in between, this one ends.
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

	report_successor(result);
	return idle;
}

/*
 * before_shmem_exit callback: free the slot on every way out.  From 19 on, a session that
 * renames or copies the database terminates its workers: start another one then.
 */
static void
leave_slot(int code, Datum arg)
{
	Slot	   *slot;
	bool		locked;
	VirtualTransactionId holder;
	OmniHandOver result = HANDED_OVER;

	/*
	 * as ShutdownPostgres() will do, so that the lock is released before the
	 * slot
	 */
	AbortOutOfAnyTransaction();
	locked = lock_on_database(&holder);
	LockReleaseAll(USER_LOCKMETHOD, true);

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(MyDatabaseId);
	if (slot != NULL && slot->state == SLOT_RUNNING && slot->owner == omni_my_proc())
	{
		bool		wanted = locked && (slot->flag || has_work());

		free_slot(slot);
		if (wanted)
			result = start_successor();
	}
	LWLockRelease(&shared->lock);

	report_successor(result);
}

/*
 * Start the next worker, which waits like any new session while the database is locked.
 * Called with the lock held.
 */
static OmniHandOver
start_successor(void)
{
	StartInfo	info = {.layout = SHARED_NAME,.call = DSM_HANDLE_INVALID,.leave_at_once = true};
	Slot	   *slot;

	return start_in_slot(MyDatabaseId, NOBODY, &info, NULL, &slot);
}

static void
report_successor(OmniHandOver result)
{
	if (result != HANDED_OVER)
		ereport(LOG,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("could not start a background worker for queued requests"),
				 errhint("Call omni_refresh_wake() when a background worker is available.")));
}

/* Return whether a job was queued since the last call of this function. */
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

/* Remove the oldest call from the ring.  Returns its segment, or DSM_HANDLE_INVALID. */
dsm_handle
omni_worker_next_call(void)
{
	dsm_handle	handle = DSM_HANDLE_INVALID;
	bool		was_full = false;
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

	if (was_full)
		ConditionVariableBroadcast(&shared->room);
	return handle;
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

/* Make a slot for a database.  Returns NULL if all are in use. */
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

/* Free a slot.  The callers in its ring hand over their calls anew. */
static void
free_slot(Slot *slot)
{
	for (int i = 0; i < slot->count; i++)
		omni_set_latch(slot->ring[(slot->first + i) % RING_SIZE].caller);
	slot->state = SLOT_FREE;
	ConditionVariableBroadcast(&shared->room);
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
