/*-------------------------------------------------------------------------
 *
 * throttle.c
 *		Roles whose rate limit at a server is reached: what they have in the queue waits.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "clock.h"
#include "setting.h"
#include "throttle.h"

/* A role whose rate limit at a server leaves no room for a kind of work for a while */
typedef struct Throttled
{
	NameData	server;
	Oid			role;
	const OmniWorkKind *kind;
	int64		until;
} Throttled;

static List *throttled = NIL;	/* of Throttled, in TopMemoryContext */

/* Lets what a role has for a server wait, of the same kind. */
void
omni_throttle(const OmniWork *work, int64 until)
{
	MemoryContext context = MemoryContextSwitchTo(TopMemoryContext);
	Throttled  *new = palloc(sizeof(Throttled));

	new->server = work->job.request.server;
	new->role = work->job.request.role;
	new->kind = work->kind;
	new->until = until;
	throttled = lappend(throttled, new);
	MemoryContextSwitchTo(context);
}

/* Until when omni_throttle() lets something wait, or 0. */
int64
omni_throttled_until(const OmniWork *work)
{
	ListCell   *cell;

	foreach(cell, throttled)
	{
		Throttled  *this = lfirst(cell);

		if (this->kind == work->kind && this->role == work->job.request.role && this->until > omni_clock() &&
			strcmp(NameStr(this->server), NameStr(work->job.request.server)) == 0)
			return this->until;
	}
	return 0;
}

/* When the first of these waits ends, or OMNI_CLOCK_NEVER. */
int64
omni_throttle_ends(void)
{
	int64		first = OMNI_CLOCK_NEVER;
	ListCell   *cell;

	foreach(cell, throttled)
		first = Min(first, ((Throttled *) lfirst(cell))->until);
	return first;
}

/*
 * Lists what cannot be sent at the moment: servers that have enough of a kind in flight, and
 * roles that are throttled.
 */
void
omni_throttle_list(const OmniWorkKind *kind, OmniHeld *names)
{
	const char *last = "";
	ListCell   *cell;
	dlist_iter	iter;

	names->servers = names->roles = NIL;
	foreach(cell, throttled)
	{
		Throttled  *this = lfirst(cell);

		if (this->until <= omni_clock())
		{
			pfree(this);
			throttled = foreach_delete_current(throttled, cell);
		}
		else if (this->kind == kind)
			names->roles = lappend(names->roles, psprintf("%u %s", this->role, NameStr(this->server)));
	}
	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);
		NameData   *server = &work->job.request.server;

		if (work->kind == kind && strcmp(NameStr(*server), last) != 0 &&
			omni_works_count(kind, server) >= omni_max_in_flight)
		{
			last = NameStr(*server);
			names->servers = lappend(names->servers, pstrdup(last));
		}
	}
}
