/*-------------------------------------------------------------------------
 *
 * workerslot.h
 *		The background worker of each database: find, start, leave.  See workerslot.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_WORKERSLOT_H
#define OMNI_WORKERSLOT_H

#include "postmaster/bgworker.h"
#include "storage/dsm.h"

#include "base/error.h"

/* How often a waiting caller looks whether its worker is still there, in ms */
#define OMNI_LOOK_ROUND		1000

/* The worker's lock_timeout */
#define OMNI_LOCK_TIMEOUT	"5s"

/* What a commit asks the worker for */
#define OMNI_WAKE_QUEUE		1	/* read the queue */
#define OMNI_WAKE_WATCHES	2	/* look for changes of tables and columns ... */
#define OMNI_WAKE_PREPARED	4	/* ... that a prepared transaction has made */

/* The result of handing over a call, or of making sure that there is a worker */
typedef enum OmniHandOver
{
	HANDED_OVER,
	RING_FULL,
	NO_WORKER,					/* max_worker_processes are in use */
	NO_SLOT,					/* the slots of all databases are in use */
	START_FAILED
} OmniHandOver;

/* A backend's state of waiting for a call */
typedef struct OmniWaiter
{
	dsm_handle	call;			/* the segment of the call */
	uint64		generation;		/* of the slot whose ring it is in, or was */
	BackgroundWorkerHandle *start;	/* of the worker that it has started */
	int			starts;
} OmniWaiter;

/* in backends */
extern OmniHandOver omni_worker_hand_over(OmniWaiter *waiter);
extern void omni_workerslots_attach(void);
extern OmniHandOver omni_worker_ensure(int flags);
extern bool omni_worker_may_complain(int64 round);
extern void omni_worker_explain(OmniHandOver result, const OmniError *start_error,
								OmniError *error);
extern char *omni_worker_describe(bool taken);
extern void omni_worker_wait_for_room(void);
extern void omni_worker_abandon_call(void);
extern bool omni_worker_wake(int flags, OmniError *error);
extern bool omni_worker_exists(void);

/* in the launcher */
extern void omni_launcher_attach(void);
extern bool omni_worker_launch(Oid database, BackgroundWorkerHandle **handle);
extern long omni_worker_launch_lacking(void);
extern bool omni_worker_take_forgotten(void);

/* in the worker */
extern void omni_not_in_worker(void);
extern bool omni_worker_begin(dsm_handle *call);
extern bool omni_worker_take_slot(void);
extern void omni_worker_turn_back(void);
extern bool omni_worker_attach(bool (*has_work) (void));
extern void omni_worker_hold(void);
extern void omni_worker_keep(void);
extern void omni_worker_keep_after_error(void);
extern bool omni_worker_is_unwanted(bool *again);
extern bool omni_worker_leave_if_idle(void);
extern bool omni_worker_others_lack(void);
extern bool omni_worker_yield(long wait);
extern bool omni_worker_take_flag(int flag);
extern dsm_handle omni_worker_next_call(void);
extern void omni_worker_remove_call(bool again);

/* in both */
extern int	omni_my_proc(void);
extern void omni_set_latch(int proc);

#endif							/* OMNI_WORKERSLOT_H */
