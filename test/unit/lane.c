/*
 * Compares src/lane.c with sets: a request stands for the pairs of a schema and a table that it
 * has refreshed. Makes up requests by a seed, given with the number of cases as arguments, and
 * prints the first case that goes wrong, if any. See test/t/047_lane.pl.
 */
#include "postgres.h"

#include "queue/lane.h"

/* the server's own are not linked */
#undef printf
#undef fprintf
#undef exit

#define SCHEMAS		4
#define TABLES		3
#define ROOM		30
#define JOBS		12

/* A set of pairs, with one more schema and table for all that have no name here; removals are a pair, too */
typedef uint32 Set;

#define PAIR(schema, table)	((Set) 1 << ((schema) * (TABLES + 1) + (table)))
#define REMOVALS			((Set) 1 << 31)

static const LaneName schema_names[SCHEMAS] = {{"a", 2}, {"b", 3}, {"bb", 5}, {"c", 7}};
static const LaneName table_names[TABLES] = {{"t", 2}, {"u", 9}, {"uu", 4}};

static uint64 state;
static long the_case;

void *
palloc(Size size)
{
	return malloc(size);
}

void
pfree(void *pointer)
{
	free(pointer);
}

#undef qsort
void
pg_qsort(void *base, size_t count, size_t size, int (*compare) (const void *, const void *))
{
	qsort(base, count, size, compare);
}

static int
random_below(int n)
{
	state = state * UINT64CONST(6364136223846793005) + UINT64CONST(1442695040888963407);
	return (int) ((state >> 33) % n);
}

static void
expect(bool ok, const char *what)
{
	if (ok)
		return;
	printf("case %ld: %s\n", the_case, what);
	exit(1);
}

static LaneNames
random_names(const LaneName *from, int count)
{
	LaneNames	list = {.names = malloc(2 * count * sizeof(LaneName))};

	do
	{
		for (int i = 0; i < count; i++)
		{
			if (random_below(2) == 0)
				list.names[list.count++] = from[random_below(count)];
		}
	} while (list.count == 0);
	lane_sort(&list);
	for (int i = 1; i < list.count; i++)
		expect(strcmp(list.names[i - 1].text, list.names[i].text) < 0, "names are not sorted");
	return list;
}

static int
cost(const LaneRequest *request)
{
	int			sum = 0;

	for (int i = 0; i < request->schemas.count; i++)
		sum += request->schemas.names[i].cost;
	for (int i = 0; i < request->tables.count; i++)
		sum += request->tables.names[i].cost;
	return sum;
}

/* A request that is not refused: its names have room in a URL. */
static LaneRequest
random_request(int kind)
{
	LaneRequest request = {0};

	if (kind == 1)
	{
		request.has_time = random_below(3) > 0;
		request.time = random_below(4);
		return request;
	}
	request.hard = random_below(12) == 0;
	if (request.hard || random_below(12) == 0)
		return request;
	do
	{
		request.schemas.count = request.tables.count = 0;
		if (random_below(2))
			request.schemas = random_names(schema_names, SCHEMAS);
		if (random_below(2))
			request.tables = random_names(table_names, TABLES);
	} while (cost(&request) == 0 || cost(&request) > ROOM);
	return request;
}

static bool
has(const LaneNames *list, const LaneName *of, int i, int n)
{
	for (int j = 0; j < list->count; j++)
	{
		if (i < n && strcmp(list->names[j].text, of[i].text) == 0)
			return true;
	}
	return list->count == 0;
}

static Set
set_of(const LaneRequest *request)
{
	Set			set = request->hard ? REMOVALS : 0;

	for (int s = 0; s <= SCHEMAS; s++)
	{
		for (int t = 0; t <= TABLES; t++)
		{
			if (has(&request->schemas, schema_names, s, SCHEMAS) && has(&request->tables, table_names, t, TABLES))
				set |= PAIR(s, t);
		}
	}
	return set;
}

static int
lists(const LaneRequest *request)
{
	return (request->schemas.count > 0) + 2 * (request->tables.count > 0);
}

static bool
is_later(const LaneRequest *a, const LaneRequest *b)
{
	return !a->has_time || (b->has_time && a->time >= b->time);
}

static bool
is_same(const LaneRequest *a, const LaneRequest *b)
{
	return set_of(a) == set_of(b) && lists(a) == lists(b) && is_later(a, b) && is_later(b, a);
}

/* Two requests */
static void
try_two(void)
{
	int			kind = random_below(4) == 0;
	LaneRequest a = random_request(kind);
	LaneRequest b = random_below(8) == 0 ? a : random_request(kind);
	LaneRequest both;
	LaneRequest back;
	bool		united = lane_unite(&a, &b, ROOM, &both);
	bool		large;

	expect(united == (lists(&a) == lists(&b) || lists(&a) == 0 || lists(&b) == 0), "what can be united");
	expect(lane_covers(&a, &b) == (united && is_same(&a, &both)), "a job covers what would leave it as it is");
	if (!united)
		return;
	large = lists(&a) == lists(&b) && lists(&a) != 0 && lists(&both) == 0;
	expect((set_of(&a) & ~set_of(&both)) == 0 && (set_of(&b) & ~set_of(&both)) == 0, "all that was asked for is there");
	expect(is_later(&both, &a) && is_later(&both, &b), "the latest time counts");
	expect(is_same(&both, &a) || is_same(&both, &b) || (lists(&a) == lists(&b) && lists(&a) != 0), "no more than the lists");
	expect(!large || !both.hard, "what is too large is soft");
	expect(cost(&both) <= ROOM, "there is room");
	expect(lane_unite(&b, &a, ROOM, &back) && is_same(&both, &back), "the order does not matter");
}

/* What must be sent for the jobs of a target: a reference that knows them all */
static int
reference(const LaneJob *jobs, int count, const LaneJob *like, LaneRequest *expected)
{
	Set			sets[4] = {0};
	int			costs[4];
	int			n = 0;
	bool		hard = false;
	bool		whole = false;
	LaneRequest latest = {.has_time = true,.time = -1};
	bool		seen[4][SCHEMAS + TABLES] = {0};

	for (int i = 0; i < count; i++)
	{
		const LaneRequest *request = &jobs[i].request;

		if (!lane_is_alike(&jobs[i], like))
			continue;
		hard |= request->hard;
		whole |= lists(request) == 0;
		if (is_later(request, &latest))
			latest = *request;
		for (int s = 0; s < SCHEMAS; s++)
			seen[lists(request)][s] |= request->schemas.count > 0 && has(&request->schemas, schema_names, s, SCHEMAS);
		for (int t = 0; t < TABLES; t++)
			seen[lists(request)][SCHEMAS + t] |= request->tables.count > 0 && has(&request->tables, table_names, t, TABLES);
		sets[lists(request)] = 1;
	}
	for (int class = 1; class < 4; class++)
	{
		costs[class] = 0;
		for (int s = 0; s < SCHEMAS; s++)
			costs[class] += seen[class][s] ? schema_names[s].cost : 0;
		for (int t = 0; t < TABLES; t++)
			costs[class] += seen[class][SCHEMAS + t] ? table_names[t].cost : 0;
		whole |= costs[class] > ROOM;
	}
	if (like->kind == 1 || hard || whole)
	{
		expected[0] = latest;
		expected[0].hard = hard;
		expected[0].schemas.count = expected[0].tables.count = 0;
		return 1;
	}
	for (int class = 1; class < 4; class++)
	{
		LaneRequest *united = &expected[n];

		if (sets[class] == 0)
			continue;
		memset(united, 0, sizeof(*united));
		united->schemas.names = malloc(SCHEMAS * sizeof(LaneName));
		united->tables.names = malloc(TABLES * sizeof(LaneName));
		for (int s = 0; s < SCHEMAS; s++)
		{
			if (seen[class][s])
				united->schemas.names[united->schemas.count++] = schema_names[s];
		}
		for (int t = 0; t < TABLES; t++)
		{
			if (seen[class][SCHEMAS + t])
				united->tables.names[united->tables.count++] = table_names[t];
		}
		n++;
	}
	return n;
}

/* A lane of jobs */
static void
try_lane(void)
{
	LaneJob		jobs[JOBS];
	LaneJob		asked[JOBS];
	int			count = random_below(JOBS + 1);

	for (int i = 0; i < count; i++)
	{
		LaneJob		job = {.id = i + 1,.kind = random_below(4) == 0,.policy = ""};

		job.model.data[15] = random_below(2);
		if (job.kind == 1)
			job.policy = random_below(2) ? "p" : "q";
		else if (random_below(4) == 0)
		{
			job.has_branch = true;
			job.branch.data[0] = random_below(2);
		}
		job.request = random_request(job.kind);
		jobs[i] = job;
		asked[i] = job;
	}
	lane_merge(jobs, count, ROOM);
	for (int i = 0; i < count; i++)
	{
		LaneRequest expected[3];
		int			n = reference(asked, count, &asked[i], expected);
		const LaneJob *carrier = &jobs[jobs[i].carrier];
		int			found = 0;

		expect(carrier->carrier == jobs[i].carrier && jobs[i].carrier <= i, "the first job carries the others");
		expect(lane_is_alike(&jobs[i], carrier), "targets stay apart");
		expect((set_of(&asked[i].request) & ~set_of(&carrier->request)) == 0 &&
			   is_later(&carrier->request, &asked[i].request), "a carrier does all that was asked for");
		for (int j = 0; j < count; j++)
		{
			bool		known = false;

			if (jobs[j].carrier != j || !lane_is_alike(&jobs[j], &jobs[i]))
				continue;
			found++;
			for (int k = 0; k < n; k++)
				known |= is_same(&jobs[j].request, &expected[k]);
			expect(known, "a carrier does what the rules say");
		}
		expect(found == n && n <= 3, "no more carriers remain than it takes");
	}
}

int
main(int argc, char **argv)
{
	long		cases = atol(argv[2]);

	state = strtoull(argv[1], NULL, 10);
	for (the_case = 1; the_case <= cases; the_case++)
	{
		try_two();
		try_lane();
	}
	printf("ok\n");
	return 0;
}
