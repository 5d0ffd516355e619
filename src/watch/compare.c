/*-------------------------------------------------------------------------
 *
 * compare.c
 *		How the worker serves watches: when it looks for changes, and what it asks Omni for.
 *
 * A look compares the relations of a watch with its memory (seen.c), in short transactions,
 * since the worker serves calls in between: first the catalogs by ranges of OIDs, for what was
 * added, then the memory by names, for what is gone.  Each transaction writes what it has found
 * into the memory, and what Omni is owed because of it into the watch's row, so that neither
 * can be lost; the last one turns that debt into a job.
 *
 * What was added is asked for at once, by a soft refresh.  What was removed stays in the memory
 * until no DDL has come for a while: dbt and pg_restore drop what they create anew.  Then a look
 * that tells removals asks for a hard refresh, unless all has come back.
 *
 * At most one job of a watch is unfinished.  While it is, Omni may still look, and a further
 * request would have to wait; so the watch waits.
 *
 * A hard refresh removes from Omni's model what is missing while Omni works, such as a view that
 * dbt is about to create anew; the memory still has it.  So if DDL was committed meanwhile, a
 * soft refresh of all follows once nothing is missing.
 *
 * With "quiet", a change of data, too, resets the cache: once in a while, a look of its own
 * compares one hash of the state of all data with the one that the last reset is for.
 *
 * Times are those of omni_clock().
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <limits.h>

#include "access/transam.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "base/clock.h"
#include "base/status.h"
#include "shared/workerslot.h"
#include "store/job.h"
#include "store/xact.h"
#include "watch/compare.h"
#include "watch/seen.h"
#include "watch/words.h"

/*
 * A transaction of a look should take this long.  It visits a number of relations within these
 * limits: twice as many as the one before if that was short, since the next ones may have far
 * more columns.
 */
#define SLICE_TIME			OMNI_MS(10)
#define SLICE_MIN			32
#define SLICE_MAX			512

/*
 * After two looks that have found nothing, wait this many times as long as the last one has
 * taken, but no longer than the maximum
 */
#define PAUSE_FACTOR		20
#define PAUSE_MAX			OMNI_MS(60 * 1000)

/* Do not take the flag of the slot again for this long, in ms */
#define FLAG_PAUSE			300

/* How often to see what has become of jobs and of old transactions, in ms */
#define FOLLOW_ROUND		1000

/* How often to try again while another session is in the way, and after an error, in ms */
#define LOCKED_ROUND		300
#define FAILED_ROUND		60000

/* Write about the same to the log at most this often, in ms */
#define COMPLAIN_ROUND		60000

/* Look at all watches this often, in ms */
#define LOOK_ROUND			(60 * 60 * 1000)

/* Removals wait no longer than this after the first one, in ms; by default, this long */
#define REMOVALS_MAX		(60 * 60 * 1000)
#define REMOVALS_DEFAULT	(10 * 60 * 1000)

/* Look at the data of a watch twice within its time of quiet, within these limits, in ms */
#define DATA_ROUND_MIN		1000
#define DATA_ROUND_MAX		(60 * 1000)

/* A reset for changes of data waits no longer than this after the first one, in ms */
#define QUIET_MAX			(60 * 60 * 1000)

/* After a job without success, in ms; doubled up to the maximum */
#define FAILURE_DELAY		(60 * 1000)
#define FAILURE_DELAY_MAX	(60 * 60 * 1000)

/* A watch that is active in this database */
typedef struct Watched
{
	OmniWatch	watch;
	int64		look_at;		/* the next look, or OMNI_CLOCK_NEVER */
	int64		not_before;		/* no look before this time */
	int64		changed_at;		/* the last time that DDL was committed, or 0 */
	int64		looked_at;		/* when the last look began, or 0 */
	bool		disturbed;		/* DDL was committed during the last hard
								 * refresh */
	int64		removed_at;		/* since when removals wait, or 0 */
	bool		in_vain;		/* the last look has found nothing */
	int64		held_at;		/* since when another session has been in the
								 * way of a look, or 0 */
	bool		mostly_gone;	/* so much is missing that it is not asked for */
	int			missing;		/* relations that the log was told about ... */
	int64		told_at;		/* ... at this time, or 0 */

	/* data, if the watch has quiet */
	int64		data_at;		/* the next look at them */
	int64		data;			/* their state at the last look */
	int64		data_changed_at;	/* when a look found that to be another
									 * one */
	int64		data_waits_at;	/* since when a reset waits, or 0 */
} Watched;

typedef enum LookStep
{
	LOOK_AT_CATALOGS,
	LOOK_AT_MEMORY,
	LOOK_TO_ASK
} LookStep;

/* The look under way; what it points to is in words.context, another one after each step */
typedef struct Look
{
	Watched    *watched;		/* NULL if there is none */
	bool		removes;		/* it tells removals */
	LookStep	step;
	int64		next;			/* when to go on */
	int64		took;			/* time spent so far */

	/* how far it has come */
	int			slice;			/* relations to visit at a time */
	Oid			after;			/* of the catalogs */
	Oid			to;
	OmniSeen   *last;			/* of the memory, or NULL */
	OmniSeen   *reached;

	/* what it has found */
	const char *reason;			/* why more is asked for, or NULL */
	OmniWords	words;
	int			relations;		/* in the memory ... */
	int			gone;			/* ... that do not exist any more */
	int			altered;		/* relations that have lost something */
	int			visited;		/* by this transaction, for what follows ... */
	int			missing;		/* ... and gone of these */
	bool		asked;
	char	   *not_asked;		/* what is told only, or NULL */
	bool		lost;			/* the watch is gone, or its row is locked */
} Look;

/* All watches */
typedef struct Watching
{
	MemoryContext context;		/* of the list */
	List	   *list;			/* of Watched */
	bool		known;			/* the list is up to date ... */
	int64		read_at;		/* ... or to be read then */
	int64		flag_from;		/* do not take the flag before */
	int64		all_at;			/* look at all then */
	int64		follow_at;		/* see what has become of jobs then */
	int64		complained_at;	/* to the log */
	bool		queued;			/* a job, in this turn of the loop */

	/*
	 * Once every transaction has ended that is older than this, if it is
	 * valid, look at all again: such a transaction may have run DDL before
	 * the event trigger was enabled, or was prepared
	 */
	TransactionId older;
} Watching;

static Watching watching = {.read_at = 0};
static Look look;

static void note_change(void);
static OmniTransacted transact(bool (*body) (void *), Watched *watched, OmniError *error);
static void read_list(void);
static bool read_watches(void *unused);
static Watched *find_watched(List *list, const pg_uuid_t *id);
static void copy_watch(OmniWatch *watch, const OmniWatch *from);
static void await_older(void);
static bool have_older_ended(void *ended);
static int64 removals_due(const Watched *watched);
static void look_at_all(void);
static void follow(void);
static bool follow_watch(void *watched);
static void follow_job(OmniWatch *watch, bool *was_hard);
static int64 failure_delay(int failures);
static void begin_look(void);
static void begin(Watched *watched, bool removes);
static void go_on(void);
static bool take_step(void *watched);
static void look_at_catalogs(OmniWatch *watch);
static void consider(OmniWatch *watch, OmniDifference *difference);
static void look_at_memory(OmniWatch *watch);
static void ask(OmniWatch *watch);
static void ask_for_refresh(OmniWatch *watch, const char *changes);
static bool is_mostly_gone(void);
static void tell_only(const OmniWatch *watch, const char *changes);
static void advance(void);
static void finish(void);
static void end(void);
static void tell_mostly_gone(void);
static bool tell_missing(void *unused);
static void look_at_data(void);
static bool compare_data(void *watched);
static bool is_reset_due(Watched *watched, int64 data);
static void queue_reset(const OmniWatch *watch, const char *changes);
static void complain(const OmniError *error, const char *what);

/* Serve the watches as far as it is time to.  Return whether any has queued a job. */
bool
omni_watches_due(void)
{
	int64		now = omni_clock();

	watching.queued = false;
	if (watching.flag_from <= now)
		note_change();
	if (look.watched == NULL && !watching.known && watching.read_at <= now)
		read_list();
	if (watching.list == NIL)
		return false;
	if (watching.all_at <= now)
		look_at_all();
	if (watching.follow_at <= now)
		follow();
	if (look.watched == NULL)
		begin_look();
	if (look.watched == NULL)
		look_at_data();
	if (look.watched != NULL && look.next <= now)
		go_on();
	return watching.queued;
}

/* Return how long to wait, in ms, until there is something to do for a watch. */
long
omni_watches_delay(void)
{
	int64		now = omni_clock();
	int64		next = watching.list != NIL ? Min(watching.all_at, watching.follow_at) : OMNI_CLOCK_NEVER;
	ListCell   *cell;

	if (watching.flag_from > now)
		next = Min(next, watching.flag_from);
	if (look.watched != NULL)
		return omni_clock_until(Min(next, look.next));
	if (!watching.known)
		next = Min(next, watching.read_at);
	foreach(cell, watching.list)
	{
		Watched    *watched = lfirst(cell);

		if (watched->watch.quiet >= 0)
			next = Min(next, watched->data_at);
		if (!watched->watch.unfinished)
			next = Min(next, Min(Max(watched->look_at, watched->not_before), removals_due(watched)));
	}
	return omni_clock_until(next);
}

/* Return whether watches have anything unfinished.  Raises no error. */
bool
omni_watches_any_left(void)
{
	ListCell   *cell;

	if (!watching.known || look.watched != NULL || TransactionIdIsValid(watching.older))
		return true;
	foreach(cell, watching.list)
	{
		Watched    *watched = lfirst(cell);

		if (watched->look_at != OMNI_CLOCK_NEVER || watched->watch.quiet >= 0 || watched->watch.unfinished || watched->watch.owes ||
			removals_due(watched) != OMNI_CLOCK_NEVER)
			return true;
	}
	return false;
}

/*
 * If DDL was committed, or a watch set, have each watch looked at after its delay.  A commit
 * that finds the flag set does not wake the worker, so do not take it too often.
 */
static void
note_change(void)
{
	int64		now = omni_clock();
	bool		prepared = omni_worker_take_flag(OMNI_WAKE_PREPARED);
	ListCell   *cell;

	if (prepared)
		await_older();
	if (!omni_worker_take_flag(OMNI_WAKE_WATCHES) && !prepared)
		return;
	watching.flag_from = now + OMNI_MS(FLAG_PAUSE);
	watching.known = false;
	watching.read_at = now;
	foreach(cell, watching.list)
	{
		Watched    *watched = lfirst(cell);

		watched->changed_at = now;
		watched->look_at = Min(watched->look_at, now + watched->watch.delay);
	}
}

/*
 * Run a transaction that serves a watch.  What it changes of the watch in memory is as it was
 * before, unless it has committed.
 */
static OmniTransacted
transact(bool (*body) (void *), Watched *watched, OmniError *error)
{
	Watched		before = *watched;
	OmniTransacted result = omni_transact(body, watched, false, error);

	if (result != COMMITTED)
		*watched = before;
	return result;
}

/* Read which watches there are. */
static void
read_list(void)
{
	OmniError	error;
	OmniTransacted result = omni_transact(read_watches, NULL, false, &error);

	watching.known = result != NOT_NOW;
	watching.read_at = omni_clock() + OMNI_MS(LOCKED_ROUND);
	if (result == FAILED)
		complain(&error, "could not read the watches");
}

/* The body of the transaction.  Returns false if the tables are locked. */
static bool
read_watches(void *unused)
{
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "omni_refresh watches",
												  ALLOCSET_SMALL_SIZES);
	List	   *watches = NIL;
	List	   *list = NIL;
	bool		any_new = false;
	ListCell   *cell;

	if (omni_tables_find())
	{
		if (!omni_watch_try_lock())
			return false;
		watches = omni_watches();
	}
	foreach(cell, watches)
	{
		OmniWatch  *watch = lfirst(cell);
		MemoryContext before;
		Watched    *watched;
		Watched    *known = find_watched(watching.list, &watch->id);

		if (!omni_watch_is_active(watch))
			continue;
		before = MemoryContextSwitchTo(context);
		watched = palloc0(sizeof(Watched));
		watched->look_at = watch->owes ? omni_clock() : omni_clock() + watch->delay;
		watched->changed_at = omni_clock();
		if (known != NULL)
			*watched = *known;
		copy_watch(&watched->watch, watch);
		list = lappend(list, watched);
		MemoryContextSwitchTo(before);
		any_new |= known == NULL;
	}

	if (any_new)
		await_older();
	if (list == NIL)
		watching.older = InvalidTransactionId;
	if (watching.list == NIL)
		watching.all_at = omni_clock() + OMNI_MS(LOOK_ROUND);
	MemoryContextSetParent(context, TopMemoryContext);
	if (watching.context != NULL)
		MemoryContextDelete(watching.context);
	watching.context = context;
	watching.list = list;
	return true;
}

static Watched *
find_watched(List *list, const pg_uuid_t *id)
{
	ListCell   *cell;

	foreach(cell, list)
	{
		Watched    *watched = lfirst(cell);

		if (memcmp(&watched->watch.id, id, sizeof(*id)) == 0)
			return watched;
	}
	return NULL;
}

/* Copy a watch as far as it is used between transactions: without its arrays. */
static void
copy_watch(OmniWatch *watch, const OmniWatch *from)
{
	*watch = *from;
	watch->schemas = watch->owed_schemas = watch->owed_tables = NULL;
}

/* Look at all again once every transaction of before now has ended. */
static void
await_older(void)
{
	watching.older = XidFromFullTransactionId(ReadNextFullTransactionId());
	watching.follow_at = omni_clock() + OMNI_MS(FOLLOW_ROUND);
}

/* The body of a transaction: find out whether they have. */
static bool
have_older_ended(void *ended)
{
	*(bool *) ended = !TransactionIdPrecedes(GetActiveSnapshot()->xmin, watching.older);
	return true;
}

/* Return when to tell the removals of a watch that wait, or OMNI_CLOCK_NEVER. */
static int64
removals_due(const Watched *watched)
{
	int64		removals = watched->watch.removals;

	if (watched->removed_at == 0 || watched->mostly_gone)
		return OMNI_CLOCK_NEVER;
	if (removals < 0)
		removals = OMNI_MS(REMOVALS_DEFAULT);
	return Max(Min(watched->changed_at + removals, watched->removed_at + OMNI_MS(REMOVALS_MAX)),
			   watched->not_before);
}

/* Look at all watches as soon as possible. */
static void
look_at_all(void)
{
	ListCell   *cell;

	watching.all_at = omni_clock() + OMNI_MS(LOOK_ROUND);
	foreach(cell, watching.list)
	{
		Watched    *watched = lfirst(cell);

		watched->look_at = Min(watched->look_at, omni_clock());
	}
}

/* See what has become of the watches' jobs, and of old transactions. */
static void
follow(void)
{
	OmniError	error;
	int64		round = FOLLOW_ROUND;
	bool		ended = false;
	bool		any = false;
	ListCell   *cell;

	if (TransactionIdIsValid(watching.older) &&
		omni_transact(have_older_ended, &ended, false, &error) == COMMITTED && ended)
	{
		watching.older = InvalidTransactionId;
		look_at_all();
	}
	foreach(cell, watching.list)
	{
		Watched    *watched = lfirst(cell);

		if (!watched->watch.unfinished)
			continue;
		any = true;
		if (transact(follow_watch, watched, &error) == FAILED)
		{
			complain(&error, "could not find out what has become of the jobs of watches");
			round = FAILED_ROUND;
		}
	}
	watching.follow_at = any || TransactionIdIsValid(watching.older) ?
		omni_clock() + OMNI_MS(round) : OMNI_CLOCK_NEVER;
}

/* The body of the transaction.  Returns false if the tables are locked. */
static bool
follow_watch(void *arg)
{
	Watched    *watched = arg;
	OmniWatch	watch;
	bool		was_hard = false;

	if (!omni_tables_find() || !omni_watch_tables_lock() || !omni_tables_lock())
		return false;
	if (!omni_watch_read(&watched->watch.id, &watch))
	{
		watching.known = false; /* it was replaced, or is about to be */
		return true;
	}
	follow_job(&watch, &was_hard);
	copy_watch(&watched->watch, &watch);
	if (was_hard && watched->changed_at >= watched->looked_at)
		watched->disturbed = true;
	if (!watch.unfinished && watch.owes)
	{
		watched->not_before = omni_clock() + failure_delay(watch.failures);
		watched->look_at = watched->not_before;
	}
	return true;
}

/*
 * See whether a watch's job has ended, or the one that carries it out.  Unless Omni has got
 * the request, the memory is not what Omni was told: then the watch owes a refresh of all.
 * Sets *was_hard if a hard refresh has ended well.
 */
static void
follow_job(OmniWatch *watch, bool *was_hard)
{
	OmniJobState own;
	OmniJobState state;
	OmniStatus	status = OMNI_STATUS_UNKNOWN;
	bool		found = omni_job_look_carrier(watch->job, &own, &state);

	if (found && (!omni_status_find(state.status, &status) || !omni_status_is_final(status)))
		return;
	watch->unfinished = false;
	if (status == OMNI_STATUS_COMPLETED || status == OMNI_STATUS_ACCEPTED)
	{
		watch->failures = 0;
		*was_hard = state.job.request.hard;
	}
	else
	{
		watch->failures++;
		omni_watch_owe_all(watch, found && state.merged_into == 0 && state.job.request.hard);
	}
	omni_watch_write(watch);
}

/* Return how long to wait after so many jobs without success. */
static int64
failure_delay(int failures)
{
	return Min(OMNI_MS(FAILURE_DELAY) << Min(Max(failures - 1, 0), 10), OMNI_MS(FAILURE_DELAY_MAX));
}

/*
 * Begin the next look if one is due.  One that tells removals begins only if no other look is
 * due, so that the last one has seen what is missing.
 */
static void
begin_look(void)
{
	int64		now = omni_clock();
	ListCell   *cell;

	foreach(cell, watching.list)
	{
		Watched    *watched = lfirst(cell);

		if (watched->watch.unfinished || watched->not_before > now)
			continue;
		if (watched->look_at <= now)
		{
			begin(watched, false);
			return;
		}
		if (removals_due(watched) <= now)
		{
			begin(watched, true);
			return;
		}
	}
}

static void
begin(Watched *watched, bool removes)
{
	memset(&look, 0, sizeof(look));
	look.watched = watched;
	look.removes = removes;
	look.slice = SLICE_MIN;
	look.after = OMNI_SEEN_START;
	omni_words_begin(&look.words, AllocSetContextCreate(TopMemoryContext, "omni_refresh look",
														ALLOCSET_SMALL_SIZES));
	watched->look_at = OMNI_CLOCK_NEVER;
	watched->looked_at = omni_clock();
	if (watched->watch.failures > 0)
		look.reason = "all, since the last job has come to no success";
	else if (watched->watch.owes && watched->watch.job == 0)
		look.reason = "all, since the watch is new";
	else if (watched->watch.owes)
		look.reason = "what a look that was cut short had found";
}

/*
 * Take the next step of the look, and plan the one after it.  Unless the step has committed,
 * the look is as it was before: it must not tell twice what is found twice.
 */
static void
go_on(void)
{
	int64		began = omni_clock();
	Watched    *watched = look.watched;
	Look		before = look;
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "omni_refresh look",
												  ALLOCSET_SMALL_SIZES);
	OmniError	error;
	OmniTransacted result;

	pgstat_report_activity(STATE_RUNNING, "comparing tables and columns with what Omni was told");
	omni_error_set(&error, ERRCODE_LOCK_NOT_AVAILABLE,
				   "another session holds a lock on rows of the memory of a watch");
	omni_words_copy(&look.words, &before.words, context);
	result = transact(take_step, watched, &error);
	if (result == COMMITTED)
		MemoryContextSetParent(context, TopMemoryContext);
	else
		look = before;
	MemoryContextDelete(result == COMMITTED ? before.words.context : context);
	look.took += omni_clock() - began;
	if (result == NOT_NOW || (result == COMMITTED && look.lost))
	{
		if (watched->held_at == 0)
			watched->held_at = began;
		else if (omni_clock() - watched->held_at >= OMNI_MS(OMNI_LOCK_PATIENCE))
			complain(&error, "could not look for changes of tables");
	}
	if (result == NOT_NOW)
		look.next = omni_clock() + OMNI_MS(LOCKED_ROUND);
	else if (result == FAILED)
	{
		complain(&error, "could not look for changes of tables");
		watched->look_at = watched->not_before = omni_clock() + OMNI_MS(FAILED_ROUND);
		watching.known = false;
		end();
	}
	else if (look.lost)
	{
		watched->look_at = omni_clock() + OMNI_MS(LOCKED_ROUND);
		watching.known = false;
		end();
	}
	else
	{
		if (omni_clock() - began > SLICE_TIME)
			look.slice = Max(look.slice / 2, SLICE_MIN);
		else if (omni_clock() - began < SLICE_TIME / 2)
			look.slice = Min(look.slice * 2, SLICE_MAX);
		advance();
	}
}

/*
 * The body of the transaction.  Returns false if the tables are locked.  The look is lost if the
 * watch no longer exists, or its row is locked.
 */
static bool
take_step(void *arg)
{
	Watched    *watched = arg;
	OmniWatch	watch;

	look.visited = look.missing = 0;
	if (!omni_tables_find() || !omni_watch_tables_lock() ||
		(look.step == LOOK_TO_ASK && !omni_tables_lock()))
		return false;
	look.lost = !omni_watch_read(&watched->watch.id, &watch);
	if (look.lost)
		return true;
	if (look.step == LOOK_AT_CATALOGS)
		look_at_catalogs(&watch);
	else if (look.step == LOOK_AT_MEMORY)
		look_at_memory(&watch);
	else
		ask(&watch);
	copy_watch(&watched->watch, &watch);
	return true;
}

/* Compare the next range of OIDs with the memory. */
static void
look_at_catalogs(OmniWatch *watch)
{
	List	   *differences;
	ListCell   *cell;

	look.to = omni_seen_window(look.after, look.slice);
	differences = omni_seen_differences(watch, look.after, look.to);
	foreach(cell, differences)
		consider(watch, lfirst(cell));
	if (differences != NIL)
		omni_watch_write(watch);
}

/* Remember a relation that is not as Omni was told, and note what Omni is owed. */
static void
consider(OmniWatch *watch, OmniDifference *difference)
{
	bool		adds = !difference->known || difference->adds;
	bool		removes = difference->known && difference->removes;

	if (removes && !look.removes)
		look.missing++;
	if (!adds && removes && !look.removes)
		return;
	omni_seen_remember(watch, difference,
					   removes && !look.removes ? &difference->added : &difference->now);
	if (!difference->known)
		omni_words_added(&look.words, difference->schema, difference->relation);
	else if (adds || removes)
		omni_words_altered(&look.words, difference->schema, difference->relation, difference->words);
	if (adds)
		omni_watch_owe(watch, difference->schema, difference->relation);
	if (removes && look.removes && watch->removals >= 0)
		omni_watch_owe_all(watch, true);
}

/* Find out which of the next relations of the memory are gone. */
static void
look_at_memory(OmniWatch *watch)
{
	List	   *relations = omni_seen_relations(watch, look.last, look.slice);
	bool		changed = false;
	ListCell   *cell;

	look.visited = list_length(relations);
	foreach(cell, relations)
	{
		OmniSeen   *seen = lfirst(cell);

		if (!seen->gone)
			continue;
		if (!seen->leaf)
			look.missing++;
		if (seen->leaf || look.removes)
			omni_seen_forget(watch, seen);
		if (!seen->leaf && look.removes)
		{
			omni_words_removed(&look.words, seen->schema, seen->relation);
			changed = true;
		}
	}
	if (changed && watch->removals >= 0)
	{
		omni_watch_owe_all(watch, true);
		omni_watch_write(watch);
	}

	look.reached = NULL;
	if (look.visited == look.slice)
	{
		OmniSeen   *last = llast(relations);

		look.reached = MemoryContextAlloc(look.words.context, sizeof(OmniSeen));
		look.reached->schema = MemoryContextStrdup(look.words.context, last->schema);
		look.reached->relation = MemoryContextStrdup(look.words.context, last->relation);
	}
}

/* Turn what Omni is owed into a job. */
static void
ask(OmniWatch *watch)
{
	char	   *changes = omni_words_text(&look.words);

	omni_watch_delete_copies(watch);
	if (look.watched->disturbed && look.gone == 0 && look.altered == 0)
	{
		omni_watch_owe_all(watch, false);
		if (look.reason == NULL)
			look.reason = "all, since DDL was committed during a hard refresh";
	}
	if (look.reason != NULL)
		changes = psprintf("%s%s%s", look.reason, changes[0] != '\0' && watch->job != 0 ? "; " : "",
						   watch->job != 0 ? changes : "");
	if (watch->owes)
		ask_for_refresh(watch, changes);
	else if (changes[0] != '\0')
		tell_only(watch, changes);
	look.asked = watch->owes || changes[0] != '\0';
	watch->owes = watch->owes_hard = false;
	watch->owed_schemas = watch->owed_tables = NULL;
	if (look.asked)
		omni_watch_write(watch);
}

/* Queue the refresh that Omni is owed and, if the watch has a cache policy, its reset. */
static void
ask_for_refresh(OmniWatch *watch, const char *changes)
{
	OmniJob		job = {.origin = OMNI_ORIGIN_DDL,.request = watch->request};
	OmniRequest *request = &job.request;

	request->kind = OMNI_KIND_SCHEMA;
	/* if a hard one has failed before, do not have it empty the model now */
	request->hard = watch->owes_hard && !is_mostly_gone();
	request->hard_named = !request->hard;
	request->schemas = watch->owed_schemas;
	request->tables = watch->owed_tables;
	request->requested_at = GetCurrentTimestamp();
	if (!omni_api_fits(request))
		request->tables = NULL;
	if (!omni_api_fits(request))
		request->schemas = NULL;
	omni_job_add(&job);
	omni_event_add_changed(&job, changes);
	watch->job = job.id;
	watch->unfinished = true;

	if (request->policy[0] != '\0')
		queue_reset(watch, NULL);
	if (watch->quiet >= 0)		/* that reset is for the data, too */
	{
		int64		seen;
		bool		is_new;

		watch->has_data = omni_watch_data(&watch->id, &watch->data, &seen, &is_new);
		look.watched->data_waits_at = 0;
	}
}

/* Queue a reset of the cache of a watch, with the changes that it is for, unless a refresh has them. */
static void
queue_reset(const OmniWatch *watch, const char *changes)
{
	OmniJob		job = {.origin = OMNI_ORIGIN_DDL,.request = watch->request};

	job.request.kind = OMNI_KIND_CACHE;
	job.request.has_branch = false;
	job.request.requested_at = GetCurrentTimestamp();
	omni_job_add(&job);
	if (changes != NULL)
		omni_event_add_changed(&job, changes);
}

/* Return whether more than half of what the memory has is gone, and remains in it. */
static bool
is_mostly_gone(void)
{
	return !look.removes && look.gone * 2 > look.relations;
}

/* Say what was removed in an event of the last job, and have finish() say it in the log: it is not asked for. */
static void
tell_only(const OmniWatch *watch, const char *changes)
{
	OmniJobState state;

	if (omni_job_look(watch->job, &state))
		omni_event_add_changed(&state.job, psprintf("not asked for: %s", changes));
	look.not_asked = MemoryContextStrdup(look.words.context, changes);
}

/* The transaction of a step has committed: go to the next one. */
static void
advance(void)
{
	look.next = look.watched->held_at = 0;
	if (look.step == LOOK_AT_CATALOGS)
	{
		look.altered += look.missing;
		look.after = look.to;
		if (look.to == OID_MAX)
		{
			look.step = LOOK_AT_MEMORY;
			look.slice = SLICE_MIN;
		}
	}
	else if (look.step == LOOK_AT_MEMORY)
	{
		look.relations += look.visited;
		look.gone += look.missing;
		look.last = look.reached;
		if (look.last == NULL)
			look.step = LOOK_TO_ASK;
	}
	else
		finish();
}

/* The look is complete: decide when the next one is due. */
static void
finish(void)
{
	Watched    *watched = look.watched;
	int64		now = omni_clock();
	bool		missing = !look.removes && (look.gone > 0 || look.altered > 0);

	if (!missing)
		watched->removed_at = 0;
	else if (watched->removed_at == 0)
		watched->removed_at = now;
	watched->mostly_gone = missing && is_mostly_gone();
	if (!watched->mostly_gone)
		watched->missing = 0;
	else if (watched->missing != look.gone &&
			 (watched->told_at == 0 || now - watched->told_at >= OMNI_MS(COMPLAIN_ROUND)))
		tell_mostly_gone();

	if (look.not_asked != NULL)
		ereport(LOG,
				(errmsg("omni_refresh has seen changes of tables that it does not ask Omni for: %s", look.not_asked)));
	if (look.asked && !missing)
		watched->disturbed = false;
	if (watched->watch.unfinished)
	{
		watching.follow_at = Min(watching.follow_at, now + OMNI_MS(FOLLOW_ROUND));
		watching.queued = true;
	}
	ereport(DEBUG1, (errmsg_internal("omni_refresh has looked at a watch for " INT64_FORMAT " us", look.took)));
	if (!look.asked && watched->in_vain)
		watched->not_before = now + Min(PAUSE_FACTOR * look.took, PAUSE_MAX);
	watched->in_vain = !look.asked;
	end();
}

/* End the look, complete or not. */
static void
end(void)
{
	MemoryContextDelete(look.words.context);
	look.watched = NULL;
}

/* Say in the log, and in an event, that so much is missing that it is not asked for. */
static void
tell_mostly_gone(void)
{
	OmniError	error;

	look.watched->told_at = omni_clock();
	if (omni_transact(tell_missing, NULL, false, &error) == COMMITTED)
		look.watched->missing = look.gone;	/* else tell it again */
	ereport(LOG,
			(errmsg("omni_refresh does not ask Omni to remove %d of %d relations that no longer exist",
					look.gone, look.relations),
			 errdetail("They are more than half of those that a watch of server \"%s\" knows.",
					   NameStr(look.watched->watch.request.server)),
			 errhint("If they are not to come back, call omni_refresh_watch() again, and request a hard refresh.")));
}

/* The body of the transaction. */
static bool
tell_missing(void *unused)
{
	OmniJobState state;

	if (!omni_tables_find() || !omni_tables_lock())
		return false;
	if (omni_job_look(look.watched->watch.job, &state))
		omni_event_add_changed(&state.job,
							   psprintf("not asked for: %d of %d relations no longer exist, which are more than half",
										look.gone, look.relations));
	return true;
}

/* Look at the data of the watches for which that is due. */
static void
look_at_data(void)
{
	ListCell   *cell;

	foreach(cell, watching.list)
	{
		Watched    *watched = lfirst(cell);
		int64		began = omni_clock();
		int64		round = Max(Min(watched->watch.quiet / 2, OMNI_MS(DATA_ROUND_MAX)), OMNI_MS(DATA_ROUND_MIN));
		OmniError	error;
		OmniTransacted result;

		if (watched->watch.quiet < 0 || watched->data_at > began)
			continue;
		pgstat_report_activity(STATE_RUNNING, "looking whether data have changed");
		result = transact(compare_data, watched, &error);
		if (result == NOT_NOW)
			round = OMNI_MS(LOCKED_ROUND);
		else if (result == FAILED)
		{
			complain(&error, "could not look for changes of data");
			round = OMNI_MS(FAILED_ROUND);
		}
		pgstat_report_activity(STATE_IDLE, NULL);
		watched->data_at = omni_clock() + Max(round, PAUSE_FACTOR * (omni_clock() - began));
	}
}

/*
 * The body of the transaction.  Returns false if the tables are locked.  Locks the watch's row
 * only to change it, since that costs a transaction id.
 */
static bool
compare_data(void *arg)
{
	Watched    *watched = arg;
	OmniWatch	watch;
	int64		data;
	int64		seen;
	bool		is_new;

	if (!omni_tables_find() || !omni_watch_tables_lock() || !omni_tables_lock())
		return false;
	if (!omni_watch_data(&watched->watch.id, &data, &seen, &is_new))
	{
		watching.known = false;
		return true;
	}
	if (!is_new && data == seen)
	{
		watched->data_waits_at = 0;
		return true;
	}
	if (!is_new && !is_reset_due(watched, data))
		return true;
	if (!omni_watch_read(&watched->watch.id, &watch))
		return false;			/* it is gone, or its row is locked */
	watch.has_data = true;
	watch.data = data;
	omni_watch_write(&watch);
	watched->data_waits_at = 0;
	if (!is_new)
	{
		queue_reset(&watch, "data");
		watching.queued = true;
	}
	return true;
}

/* Note the state of data that differ from what the last reset is for.  Returns whether to reset now. */
static bool
is_reset_due(Watched *watched, int64 data)
{
	int64		now = omni_clock();

	if (watched->data_waits_at == 0)
		watched->data_waits_at = watched->data_changed_at = now;
	else if (watched->data != data)
		watched->data_changed_at = now;
	watched->data = data;
	return now - watched->data_changed_at >= watched->watch.quiet ||
		now - watched->data_waits_at >= OMNI_MS(QUIET_MAX);
}

/*
 * Write an error to the log, at most once a minute.  omni_check_table() of table.c writes about a
 * table that was altered itself.
 */
static void
complain(const OmniError *error, const char *what)
{
	if (error->sqlstate == ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE ||
		(watching.complained_at != 0 && omni_clock() - watching.complained_at < OMNI_MS(COMPLAIN_ROUND)))
		return;
	watching.complained_at = omni_clock();
	ereport(LOG,
			(errcode(error->sqlstate),
			 errmsg("omni_refresh %s, and will try again: %s", what, error->message),
			 error->detail[0] != '\0' ? errdetail_internal("%s", error->detail) : 0));
}
