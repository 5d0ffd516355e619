/*-------------------------------------------------------------------------
 *
 * lane.c
 *		Which requests cover others, and which one request can satisfy.
 *
 * A lane is a role at a server: only jobs of one lane are compared.  Jobs are alike if they
 * agree in kind, model, branch and policy, their target.  Of all jobs that are alike, at most
 * three remain when they are merged, however many there are:
 *
 *	- A hard refresh satisfies all others, which it does as a refresh of the whole model.
 *	- Without one, a soft refresh of the whole model satisfies all others.
 *	- Without either, requests with a list of schemas are united, those with a list of tables,
 *	  and those with both.  The last ones ask for a little more than they did, which is
 *	  harmless, since a soft refresh only adds.
 *
 * What would take too much room in a URL becomes a soft refresh of the whole model.  Of resets
 * the latest one counts.
 *
 * This file is plain C over plain data: it knows neither SQL nor a clock.  A transaction that
 * asks for the same again, and the worker that merges, rely on the same functions.
 * test/unit/lane.c compares them with the sets of tables that the requests stand for.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "queue/lane.h"

/* Which lists a request has */
#define HAS_SCHEMAS			1
#define HAS_TABLES			2

static int	lane_lists(const LaneRequest *request);
static bool lane_contains(const LaneNames *all, const LaneNames *some);
static LaneNames lane_union(const LaneNames *a, const LaneNames *b);
static int	lane_cost(const LaneNames *list);
static int	lane_compare(const void *a, const void *b);
static int	lane_join(LaneJob *jobs, int *carriers, int *count, int at, int room);

/*
 * Return whether a job does all that a request like it asks for: whether the two united would
 * be the job as it is.
 */
bool
lane_covers(const LaneRequest *job, const LaneRequest *other)
{
	if (job->has_time && (!other->has_time || other->time > job->time))
		return false;
	if (job->hard || other->hard)
		return job->hard;
	if (lane_lists(job) == 0)
		return true;
	return lane_lists(job) == lane_lists(other) &&
		lane_contains(&job->schemas, &other->schemas) && lane_contains(&job->tables, &other->tables);
}

/*
 * Set *both to what two requests that are alike ask for together; its lists are palloc'd, or
 * those of *a and *b.  Names may take "room" bytes of a URL.  Returns false if the requests
 * must stay apart.  *both may be *a or *b.
 */
bool
lane_unite(const LaneRequest *a, const LaneRequest *b, int room, LaneRequest *both)
{
	LaneRequest united = {
		.hard = a->hard || b->hard,
		.has_time = a->has_time && b->has_time,
		.time = Max(a->time, b->time)
	};

	if (!united.hard && lane_lists(a) != 0 && lane_lists(b) != 0)
	{
		if (lane_lists(a) != lane_lists(b))
			return false;
		united.schemas = lane_union(&a->schemas, &b->schemas);
		united.tables = lane_union(&a->tables, &b->tables);
		if (lane_cost(&united.schemas) + lane_cost(&united.tables) > room)
			united.schemas.count = united.tables.count = 0;
	}
	*both = united;
	return true;
}

/* Return whether two jobs have the same target. */
bool
lane_is_alike(const LaneJob *a, const LaneJob *b)
{
	return a->kind == b->kind && a->has_branch == b->has_branch &&
		memcmp(&a->model, &b->model, sizeof(pg_uuid_t)) == 0 &&
		memcmp(&a->branch, &b->branch, sizeof(pg_uuid_t)) == 0 &&
		strcmp(a->policy, b->policy) == 0;
}

/*
 * Find a carrier for each of some jobs, which are given in order of id: the first one of those
 * that one request can satisfy.  The request of a carrier becomes what all of them ask for.
 */
void
lane_merge(LaneJob *jobs, int count, int room)
{
	int		   *carriers = palloc(Max(count, 1) * sizeof(int));
	int			ncarriers = 0;

	for (int i = 0; i < count; i++)
	{
		int			at = i;

		jobs[i].carrier = i;
		carriers[ncarriers++] = i;
		while ((at = lane_join(jobs, carriers, &ncarriers, at, room)) >= 0)
			 /* a wider request may satisfy further ones */ ;
	}

	/* a carrier comes before the jobs that it carries */
	for (int i = 0; i < count; i++)
		jobs[i].carrier = jobs[jobs[i].carrier].carrier;
	pfree(carriers);
}

/*
 * Join one carrier with another one if a request can satisfy both.  Returns the index of the
 * job that carries both from now on, or -1 if there is no other one to join.
 */
static int
lane_join(LaneJob *jobs, int *carriers, int *count, int at, int room)
{
	for (int i = 0; i < *count; i++)
	{
		int			first = Min(at, carriers[i]);
		int			second = Max(at, carriers[i]);

		if (first == second || !lane_is_alike(&jobs[first], &jobs[second]) ||
			!lane_unite(&jobs[first].request, &jobs[second].request, room, &jobs[first].request))
			continue;
		jobs[second].carrier = first;
		for (int j = 0; j < *count; j++)
		{
			if (carriers[j] == second)
				carriers[j--] = carriers[--*count];
		}
		return first;
	}
	return -1;
}

/* Sort names, and drop those that occur twice. */
void
lane_sort(LaneNames *list)
{
	int			kept = 0;

	if (list->count == 0)
		return;
	qsort(list->names, list->count, sizeof(LaneName), lane_compare);
	for (int i = 0; i < list->count; i++)
	{
		if (kept == 0 || lane_compare(&list->names[kept - 1], &list->names[i]) != 0)
			list->names[kept++] = list->names[i];
	}
	list->count = kept;
}

static int
lane_lists(const LaneRequest *request)
{
	return (request->schemas.count > 0 ? HAS_SCHEMAS : 0) | (request->tables.count > 0 ? HAS_TABLES : 0);
}

/* Return whether a list has all names of another one. */
static bool
lane_contains(const LaneNames *all, const LaneNames *some)
{
	int			found = 0;

	for (int i = 0; i < all->count && found < some->count; i++)
	{
		if (lane_compare(&all->names[i], &some->names[found]) == 0)
			found++;
	}
	return found == some->count;
}

/* Return the names of two lists: one of them, if that has all, or a palloc'd list. */
static LaneNames
lane_union(const LaneNames *a, const LaneNames *b)
{
	LaneNames	both = {0};

	if (lane_contains(a, b))
		return *a;
	if (lane_contains(b, a))
		return *b;
	both.names = palloc((a->count + b->count) * sizeof(LaneName));
	for (int i = 0, j = 0; i < a->count || j < b->count;)
	{
		int			order = i == a->count ? 1 : j == b->count ? -1 :
		lane_compare(&a->names[i], &b->names[j]);

		both.names[both.count++] = order <= 0 ? a->names[i] : b->names[j];
		i += order <= 0;
		j += order >= 0;
	}
	return both;
}

static int
lane_cost(const LaneNames *list)
{
	int			cost = 0;

	for (int i = 0; i < list->count; i++)
		cost += list->names[i].cost;
	return cost;
}

static int
lane_compare(const void *a, const void *b)
{
	return strcmp(((const LaneName *) a)->text, ((const LaneName *) b)->text);
}
