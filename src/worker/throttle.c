/*-------------------------------------------------------------------------
 *
 * throttle.c
 *		Throttled roles: their due jobs and polls are held while the rate limit of their
 *		keys at a server is reached.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"

#include "base/clock.h"
#include "base/setting.h"
#include "worker/throttle.h"

/* A role that is throttled at a server, for a kind of work */
typedef struct Throttled
{
	NameData	server;
	Oid			role;
	const OmniWorkKind *kind;
	int64		until;			/* by omni_clock() */
} Throttled;

static List *throttled = NIL;	/* of Throttled, in TopMemoryContext */

static List *add_once(List *list, char *string);
static bool contains(const List *list, const char *string);

/*
 * Throttle the role and server of some work until a time of omni_clock(), for all work of its
 * kind.
 */
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

/* Return until when the role and server of some work are throttled, or 0. */
int64
omni_throttled_until(const OmniWork *work)
{
	const OmniRequest *request = &work->job.request;
	ListCell   *cell;

	foreach(cell, throttled)
	{
		Throttled  *this = lfirst(cell);

		if (this->kind == work->kind && this->until > omni_clock() &&
			this->role == request->role &&
			strcmp(NameStr(this->server), NameStr(request->server)) == 0)
			return this->until;
	}
	return 0;
}

/* Return when the first role is no longer throttled, or OMNI_CLOCK_NEVER. */
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
 * Set *held to what holds jobs of a kind at the moment: roles that are throttled at a server,
 * have enough work of that kind in flight there, or have enough work in flight.  The list is
 * palloc'd.
 */
void
omni_throttle_list(const OmniWorkKind *kind, OmniHeld *held)
{
	ListCell   *cell;
	dlist_iter	iter;

	held->roles = NIL;
	foreach(cell, throttled)
	{
		Throttled  *this = lfirst(cell);

		if (this->until <= omni_clock())
		{
			pfree(this);
			throttled = foreach_delete_current(throttled, cell);
		}
		else if (this->kind == kind)
			held->roles = lappend(held->roles, psprintf("%u %s", this->role,
														NameStr(this->server)));
	}
	dlist_foreach(iter, &omni_works)
	{
		OmniWork   *work = dlist_container(OmniWork, node, iter.cur);
		const OmniRequest *request = &work->job.request;

		if (!work->kind->has_caller && omni_works_of_role(request->role) >= OMNI_MAX_OF_ROLE)
			held->roles = add_once(held->roles, psprintf("%u", request->role));
		if (work->kind == kind && omni_works_count(kind, request) >= omni_max_in_flight)
			held->roles = add_once(held->roles, psprintf("%u %s", request->role, NameStr(request->server)));
	}
}

/* Add a string to a list that does not contain it. */
static List *
add_once(List *list, char *string)
{
	return contains(list, string) ? list : lappend(list, string);
}

static bool
contains(const List *list, const char *string)
{
	ListCell   *cell;

	foreach(cell, list)
	{
		if (strcmp(lfirst(cell), string) == 0)
			return true;
	}
	return false;
}

/* Return whether the jobs of a role at a server are held. */
bool
omni_is_held(const OmniHeld *held, const OmniPlace *place)
{
	return contains(held->roles, psprintf("%u", place->role)) ||
		contains(held->roles, psprintf("%u %s", place->role, NameStr(place->server)));
}
