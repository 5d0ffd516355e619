/*-------------------------------------------------------------------------
 *
 * launcher.c
 *		The launcher: with shared_preload_libraries, starts the worker once in each
 *		database after a start of the server or a promotion, so that queued jobs are
 *		sent without a new request.
 *
 * A worker that finds nothing to do exits at once.  The launcher then sleeps instead of
 * exiting: so the postmaster restarts it after the crash of a backend, which ends all
 * workers.  It wakes up to start a worker that another process could not start, because all
 * worker processes were in use; if there was no slot to remember its database, it looks into all
 * databases again.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/heapam.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_database.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/latch.h"
#include "tcop/tcopprot.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#include "base/clock.h"
#include "base/compat.h"
#include "omni_refresh.h"
#include "shared/ending.h"
#include "shared/workerslot.h"
#include "worker/launcher.h"

/* How soon the postmaster restarts a launcher that has failed, in s */
#define RESTART_AFTER		60

/* How long to wait for a worker that was just started, in ms */
#define MOMENT				250

/* How often to try to start a worker while none is available, in ms */
#define PATIENCE			1000

PGDLLEXPORT void omni_refresh_launcher_main(Datum main_arg);

static List *list_databases(void);
static bool launch(Oid database);
static void wait_for_latch(long timeout);

/* Register the launcher.  Called while the library is preloaded. */
void
omni_launcher_register(void)
{
	BackgroundWorker worker = {
		.bgw_name = "omni_refresh launcher",
		.bgw_type = "omni_refresh launcher",
		.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION,
		.bgw_start_time = BgWorkerStart_RecoveryFinished,
		.bgw_restart_time = RESTART_AFTER,
		.bgw_library_name = OMNI_EXTENSION,
		.bgw_function_name = "omni_refresh_launcher_main"
	};

	RegisterBackgroundWorker(&worker);
}

void
omni_refresh_launcher_main(Datum main_arg)
{
	List	   *databases;

	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	omni_ending_watch();
	BackgroundWorkerInitializeConnection(NULL, NULL, 0);
	omni_launcher_attach();

	databases = list_databases();
	for (;;)
	{
		bool		all_in_use = databases != NIL && !launch(linitial_oid(databases));

		if (databases != NIL && !all_in_use)
			databases = list_delete_first(databases);
		else if (all_in_use)
			wait_for_latch(PATIENCE);
		else if (omni_worker_take_forgotten())
			databases = list_databases();
		else
			wait_for_latch(omni_worker_launch_lacking());
	}
}

/* List the databases that accept connections and are not templates. */
static List *
list_databases(void)
{
	MemoryContext context = CurrentMemoryContext;
	List	   *result = NIL;
	Relation	relation;
	TableScanDesc scan;
	HeapTuple	tuple;

	StartTransactionCommand();
	(void) GetTransactionSnapshot();
	relation = table_open(DatabaseRelationId, AccessShareLock);
	scan = table_beginscan_catalog(relation, 0, NULL);
	while ((tuple = heap_getnext(scan, ForwardScanDirection)) != NULL)
	{
		Form_pg_database database = (Form_pg_database) GETSTRUCT(tuple);

		if (database->datallowconn && !database->datistemplate && database->datconnlimit >= -1)
		{
			MemoryContext old = MemoryContextSwitchTo(context);

			result = lappend_oid(result, database->oid);
			MemoryContextSwitchTo(old);
		}
	}
	table_endscan(scan);
	table_close(relation, AccessShareLock);
	CommitTransactionCommand();
	return result;
}

/*
 * Start the worker of a database.  Then give the worker a moment to find out whether it has
 * anything to do, so that no more than a few of max_worker_processes are in use at a time.
 * Returns false if no background worker is available.
 */
static bool
launch(Oid database)
{
	BackgroundWorkerHandle *handle = NULL;
	int64		began = omni_clock();
	pid_t		pid;

	if (!omni_worker_launch(database, &handle))
		return false;
	while (handle != NULL && GetBackgroundWorkerPid(handle, &pid) != BGWH_STOPPED &&
		   omni_clock() - began < OMNI_MS(MOMENT))
		wait_for_latch(omni_clock_until(began + OMNI_MS(MOMENT)));
	if (handle != NULL)
		pfree(handle);
	return true;
}

/* Wait for this process's latch, for up to timeout ms (-1 means no limit), and reset it. */
static void
wait_for_latch(long timeout)
{
	(void) WaitLatch(MyLatch,
					 WL_LATCH_SET | WL_EXIT_ON_PM_DEATH | (timeout >= 0 ? WL_TIMEOUT : 0),
					 timeout, WaitEventExtensionNew("OmniRefreshLauncher"));
	ResetLatch(MyLatch);
	CHECK_FOR_INTERRUPTS();
}
