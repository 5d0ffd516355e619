/*-------------------------------------------------------------------------
 *
 * counter.c
 *		Count, for each server, requests by their outcome and jobs by their end.
 *
 * The counters are in shared memory, and only the end of the database server resets them.
 * What a transaction counts is added once it commits, so that a transaction that is rolled
 * back and repeated counts once.  COMMIT PREPARED calls nothing here: a transaction that is
 * prepared counts nothing.
 *
 * Counting raises no error: without shared memory for it, a process counts nothing.
 *
 * There is a fixed number of entries for all databases of the cluster.  When all are in use,
 * a server that needs one takes that of a server that has not counted anything for an hour.
 * If there is none, what happens is counted in one entry for all others.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "foreign/foreign.h"
#include "miscadmin.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "base/clock.h"
#include "base/compat.h"
#include "base/error.h"
#include "shared/counter.h"

#define SHARED_NAME			"omni_refresh counters layout 2"

#define MAX_SERVERS			64

/* Another server may take the entry of one that has counted nothing for this long */
#define IDLE				OMNI_MS(60 * 60 * 1000)

typedef struct Counters
{
	Oid			database;		/* InvalidOid: not in use */
	Oid			server;
	int64		used_at;		/* by omni_clock() */
	TimestampTz since;
	int64		counts[OMNI_COUNTERS];
} Counters;

typedef struct Shared
{
	LWLock		lock;
	Counters	others;			/* for servers without an entry */
	Counters	servers[MAX_SERVERS];
} Shared;

StaticAssertDecl(sizeof(Shared) < 20 * 1024, "too much shared memory");

/* What a subtransaction has counted for a server, to be added when all is committed */
typedef struct Pending
{
	Oid			server;			/* InvalidOid: it does not exist */
	SubTransactionId subtransaction;
	int64		counts[OMNI_COUNTERS];
} Pending;

static Shared *shared = NULL;
static List *pending = NIL;		/* in TopTransactionContext */

static bool may_count(void);
static void attach_shared(void);
static void init_shared(OMNI_SHARED_INIT_ARGS);
static Pending *find_pending(Oid server, SubTransactionId subtransaction);
static Pending *begin_pending(Oid server);
static void at_transaction_end(XactEvent event, void *arg);
static void at_subtransaction_end(SubXactEvent event, SubTransactionId mySubid,
								  SubTransactionId parentSubid, void *arg);
static void add_pending(void);
static void add_counts(int64 *sums, const int64 *counts);
static Counters *find_counters(const Pending *counted);
static Counters *find_dispensable(void);

/* Add an amount to a counter of a server once this transaction commits. */
void
omni_count(const NameData *server, OmniCounter counter, int64 amount)
{
	Oid			id;
	Pending    *counted;

	if (!may_count())
		return;
	id = get_foreign_server_oid(NameStr(*server), true);
	counted = find_pending(id, GetCurrentSubTransactionId());
	if (counted == NULL)
		counted = begin_pending(id);
	counted->counts[counter] += amount;
}

/* Count jobs that have ended with a status. */
void
omni_count_jobs(const NameData *server, const char *status, int64 jobs)
{
	OmniStatus	end;

	if (omni_status_find(status, &end) && omni_status_is_final(end))
		omni_count(server, OMNI_COUNT_JOBS_COMPLETED + (end - OMNI_STATUS_COMPLETED), jobs);
}

/*
 * Read the counters of a server of this database, or with InvalidOid those of all servers
 * that have no entry.  They are zeros for a server that has counted nothing.  Returns the
 * time since when they count.  May raise an error.
 */
TimestampTz
omni_counters_read(Oid server, int64 *counts)
{
	TimestampTz since;

	attach_shared();
	LWLockAcquire(&shared->lock, LW_SHARED);
	memcpy(counts, shared->others.counts, sizeof(shared->others.counts));
	since = shared->others.since;
	if (OidIsValid(server))
	{
		memset(counts, 0, sizeof(shared->others.counts));
		for (int i = 0; i < MAX_SERVERS; i++)
		{
			const Counters *entry = &shared->servers[i];

			if (entry->database == MyDatabaseId && entry->server == server)
			{
				memcpy(counts, entry->counts, sizeof(entry->counts));
				since = entry->since;
			}
		}
	}
	LWLockRelease(&shared->lock);
	return since;
}

/* Return whether this process has all that counting needs; try to get it only once. */
static bool
may_count(void)
{
	static bool tried = false;
	static bool can = false;
	OmniError	error;

	if (tried)
		return can;
	tried = true;
	can = omni_error_try(attach_shared, &error);
	if (can)
	{
		RegisterXactCallback(at_transaction_end, NULL);
		RegisterSubXactCallback(at_subtransaction_end, NULL);
	}
	else
		ereport(LOG,
				(errcode(error.sqlstate),
				 errmsg("could not attach the counters of omni_refresh: %s", error.message)));
	return can;
}

static void
attach_shared(void)
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
	new->others.since = GetCurrentTimestamp();
}

/* Return what a subtransaction has counted for a server, or NULL if that is nothing. */
static Pending *
find_pending(Oid server, SubTransactionId subtransaction)
{
	ListCell   *cell;

	foreach(cell, pending)
	{
		Pending    *counted = lfirst(cell);

		if (counted->server == server && counted->subtransaction == subtransaction)
			return counted;
	}
	return NULL;
}

/* Begin to count for a server in the current subtransaction. */
static Pending *
begin_pending(Oid server)
{
	MemoryContext context = MemoryContextSwitchTo(TopTransactionContext);
	Pending    *counted = palloc0(sizeof(Pending));

	counted->server = server;
	counted->subtransaction = GetCurrentSubTransactionId();
	pending = lappend(pending, counted);
	MemoryContextSwitchTo(context);
	return counted;
}

/* Nothing here may raise an error: after the commit, that would be a PANIC. */
static void
at_transaction_end(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_COMMIT && pending != NIL)
		add_pending();
	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT || event == XACT_EVENT_PREPARE)
		pending = NIL;
}

/* Forget what a subtransaction has counted, or if it commits, pass it on to its parent. */
static void
at_subtransaction_end(SubXactEvent event, SubTransactionId mySubid,
					  SubTransactionId parentSubid, void *arg)
{
	ListCell   *cell;

	if (event != SUBXACT_EVENT_COMMIT_SUB && event != SUBXACT_EVENT_ABORT_SUB)
		return;
	foreach(cell, pending)
	{
		Pending    *counted = lfirst(cell);
		Pending    *of_parent = find_pending(counted->server, parentSubid);

		if (counted->subtransaction != mySubid)
			continue;
		if (event == SUBXACT_EVENT_COMMIT_SUB && of_parent == NULL)
			counted->subtransaction = parentSubid;
		else
		{
			if (event == SUBXACT_EVENT_COMMIT_SUB)
				add_counts(of_parent->counts, counted->counts);
			pending = foreach_delete_current(pending, cell);
		}
	}
}

static void
add_pending(void)
{
	ListCell   *cell;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	foreach(cell, pending)
	{
		const Pending *counted = lfirst(cell);

		add_counts(find_counters(counted)->counts, counted->counts);
	}
	LWLockRelease(&shared->lock);
}

static void
add_counts(int64 *sums, const int64 *counts)
{
	for (int i = 0; i < OMNI_COUNTERS; i++)
		sums[i] += counts[i];
}

/* Return the entry to count in for a server. */
static Counters *
find_counters(const Pending *counted)
{
	Counters   *entry;

	if (!OidIsValid(counted->server))
		return &shared->others;
	for (int i = 0; i < MAX_SERVERS; i++)
	{
		entry = &shared->servers[i];
		if (entry->database == MyDatabaseId && entry->server == counted->server)
		{
			entry->used_at = omni_clock();
			return entry;
		}
	}

	entry = find_dispensable();
	if (entry == NULL)
		return &shared->others;
	memset(entry, 0, sizeof(Counters));
	entry->database = MyDatabaseId;
	entry->server = counted->server;
	entry->used_at = omni_clock();
	entry->since = GetCurrentTimestamp();
	return entry;
}

/* Return an entry that a server may take: the one unused for longest, or NULL if all are in use. */
static Counters *
find_dispensable(void)
{
	Counters   *found = &shared->servers[0];

	for (int i = 1; i < MAX_SERVERS; i++)
	{
		if (shared->servers[i].used_at < found->used_at)
			found = &shared->servers[i];
	}
	return !OidIsValid(found->database) || omni_clock() - found->used_at > IDLE ? found : NULL;
}
