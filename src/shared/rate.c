/*-------------------------------------------------------------------------
 *
 * rate.c
 *		The rate limiter: limit the requests a minute with each API key.
 *
 * Omni counts all requests with a key over the last minute.  So does the rate limiter, in
 * shared memory, for all databases of the cluster, so that a worker's end resets no count.
 * It divides the minute into slices that each have a count, and includes the whole of the
 * oldest slice, so that no minute has more requests than the limit.  It identifies a key by
 * a hash of the key and the host.  The salt of the hash changes with each start of the server.
 *
 * Calls, queued jobs and polls each have a share of the limit.  The other classes do not
 * use that share while a class is being refused and has not used it up.  In addition, jobs and
 * polls always leave some places free, so that a call need not wait until their requests are
 * a minute old.
 *
 * Omni may still answer 429, for others use the key, too.  Then omni_rate_block() stops all
 * requests with the key until the time that Omni gave.
 *
 * For monitoring, count what each database sends to each of its servers in the same way.
 *
 * The counts of keys and servers are entries of one table, in a DSM segment that the first process makes
 * that needs it.  An entry is found by its id in one of many sets.  It is in use for a
 * minute after each request.  If all entries of its set are in use, a further key must wait: no
 * key ever exceeds its limit because its count was forgotten.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "common/hashfn.h"
#include "miscadmin.h"
#include "storage/dsm.h"

#include "base/clock.h"
#include "base/compat.h"
#include "omni_refresh.h"
#include "shared/rate.h"

#define SHARED_NAME			"omni_refresh rates layout 6"

/*
 * 12 whole slices and the current one are a minute and a second or more.  The second
 * allows for a request that takes longer to reach Omni than a later one.
 */
#define SLICES				13
#define SLICE_LENGTH		OMNI_MS(5100)

/*
 * The table has places for 4096 keys and servers.  As their ids are hashes that nobody can
 * foresee, they fill the sets evenly.
 */
#define SETS				256
#define SET_SIZE			16

/* Jobs and polls leave one n-th of the limit free for calls */
#define FREE_FOR_CALLS		6

/* How many slices to sum up as the last minute */
#define SLICES_SHOWN		12

typedef struct Rate
{
	uint64		id;				/* 0: not in use */
	int64		slice;			/* number of the newest slice, by omni_clock() */
	uint32		counts[SLICES][OMNI_RATE_CLASSES];	/* slice n is at n modulo
													 * SLICES */
	int64		refused[OMNI_RATE_CLASSES]; /* slice of the last refusal */
	int64		blocked_until;	/* by omni_clock(), or 0 */
} Rate;

typedef struct Shared
{
	LWLock		lock;			/* protects the table, too */
	uint64		salt;
	dsm_handle	table;			/* DSM_HANDLE_INVALID before it is made */
} Shared;

typedef Rate Set[SET_SIZE];

/* Each class has one n-th of the limit as its share */
static const int shares[OMNI_RATE_CLASSES] = {
	[OMNI_RATE_CALL] = 2,
	[OMNI_RATE_JOB] = 4,
	[OMNI_RATE_POLL] = 8
};

static Shared *shared = NULL;
static Set *table = NULL;		/* SETS of them */

static void attach_shared(void);
static void init_shared(OMNI_SHARED_INIT_ARGS);
static void attach_table(void);
static bool has_room(const Rate *rate, OmniRateClass class, int limit,
					 const uint32 *used, int64 all);
static uint64 hash(const char *text);
static uint64 server_id(const char *server);
static Rate *find_rate(uint64 id, int64 *free_at);
static int64 in_use_until(const Rate *rate);

/* Return an identifier of a key at a host, which is valid until the server stops. */
uint64
omni_rate_id(const char *host, const char *key)
{
	char	   *text = psprintf("%s %s", host, key);
	uint64		id = hash(text);

	explicit_bzero(text, strlen(text));
	pfree(text);
	return id;
}

/* Return an identifier of a text that nobody can foresee. */
static uint64
hash(const char *text)
{
	uint64		id;

	attach_shared();
	id = hash_bytes_extended((const unsigned char *) text, strlen(text), shared->salt);
	return id != 0 ? id : 1;
}

/*
 * Reserve a place within a limit of requests a minute (0 means no limit) for one request.
 * Return 0 if the request may be sent now, else the time of omni_clock() to try again, and in
 * *blocked whether that time is due to omni_rate_block().
 */
int64
omni_rate_take(uint64 id, OmniRateClass class, int limit, bool *blocked)
{
	int64		when;
	Rate	   *rate;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	rate = find_rate(id, &when);
	*blocked = rate != NULL && rate->blocked_until != 0;
	if (*blocked)
		when = rate->blocked_until;
	else if (limit == 0)
		when = 0;
	else if (rate != NULL)
	{
		uint32		used[OMNI_RATE_CLASSES] = {0};
		int64		all;
		int64		oldest = rate->slice - SLICES + 1;

		for (int i = 0; i < SLICES; i++)
		{
			for (int c = 0; c < OMNI_RATE_CLASSES; c++)
				used[c] += rate->counts[i][c];
		}
		all = used[OMNI_RATE_CALL] + used[OMNI_RATE_JOB] + used[OMNI_RATE_POLL];

		/* find the time at which enough of the oldest slices no longer count */
		while (!has_room(rate, class, limit, used, all) && oldest <= rate->slice)
		{
			for (int c = 0; c < OMNI_RATE_CLASSES; c++)
			{
				used[c] -= rate->counts[oldest % SLICES][c];
				all -= rate->counts[oldest % SLICES][c];
			}
			oldest++;
			when = (oldest - 1) * SLICE_LENGTH; /* start of slice oldest +
												 * SLICES - 1 */
		}
	}

	if (rate != NULL && when == 0)
		rate->counts[rate->slice % SLICES][class]++;
	else if (rate != NULL)
		rate->refused[class] = rate->slice;
	LWLockRelease(&shared->lock);
	return when;
}

/*
 * Return whether a class may send one more request, given the counts of the last minute.
 * It may if it has not used its share up, or if the unused shares of the classes that were
 * refused lately remain free.  Polls always leave the share of calls free: polls continue
 * for as long as jobs run, and a call that had to wait for them could miss its deadline.
 */
static bool
has_room(const Rate *rate, OmniRateClass class, int limit, const uint32 *used, int64 all)
{
	int64		free = class == OMNI_RATE_CALL ? 0 : limit / FREE_FOR_CALLS;
	int64		kept = 0;

	for (int c = 0; c < OMNI_RATE_CLASSES; c++)
	{
		int64		share = Max(limit / shares[c], 1);

		if (c == class && used[c] < share)
			return all + free < limit;
		if (c != class && used[c] < share &&
			(rate->refused[c] > rate->slice - SLICES ||
			 (c == OMNI_RATE_CALL && class == OMNI_RATE_POLL)))
			kept += share - used[c];
	}
	return all + Max(kept, free) < limit;
}

/* Give back a place that was reserved a moment ago, for a request that is not sent. */
void
omni_rate_give_back(uint64 id, OmniRateClass class)
{
	int64		free_at;
	Rate	   *rate;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	rate = find_rate(id, &free_at);
	if (rate != NULL && rate->counts[rate->slice % SLICES][class] > 0)
		rate->counts[rate->slice % SLICES][class]--;
	LWLockRelease(&shared->lock);
}

/* Return how many requests a limit of requests a minute allows now. */
int
omni_rate_left(uint64 id, int limit)
{
	int			left = limit;
	int64		free_at;
	Rate	   *rate;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	rate = find_rate(id, &free_at);
	for (int i = 0; rate != NULL && i < SLICES; i++)
	{
		for (int c = 0; c < OMNI_RATE_CLASSES; c++)
			left -= rate->counts[i][c];
	}
	if (rate == NULL || rate->blocked_until != 0)
		left = 0;
	LWLockRelease(&shared->lock);
	return Max(left, 0);
}

/* Refuse all requests with a key until a time of omni_clock(). */
void
omni_rate_block(uint64 id, int64 until)
{
	int64		free_at;
	Rate	   *rate;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	rate = find_rate(id, &free_at);
	if (rate != NULL)
		rate->blocked_until = Max(rate->blocked_until, until);
	LWLockRelease(&shared->lock);
}

/* Count a request that is sent to a server of this database. */
void
omni_rate_sent(const char *server, OmniRateClass class)
{
	uint64		id = server_id(server);
	int64		free_at;
	Rate	   *rate;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	rate = find_rate(id, &free_at);
	if (rate != NULL)
		rate->counts[rate->slice % SLICES][class]++;
	LWLockRelease(&shared->lock);
}

/*
 * Return how many requests this database has sent to a server in the last minute.  Make no
 * entry, since anyone may ask, for any name.
 */
int64
omni_rate_sent_lately(const char *server)
{
	uint64		id = server_id(server);
	int64		first = omni_clock() / SLICE_LENGTH + SLICES - SLICES_SHOWN + 1;
	int64		sent = 0;

	LWLockAcquire(&shared->lock, LW_SHARED);
	for (int i = 0; i < SET_SIZE; i++)
	{
		const Rate *rate = &table[id % SETS][i];

		if (rate->id != id)
			continue;
		for (int64 slice = first; slice <= rate->slice; slice++)
		{
			for (int c = 0; c < OMNI_RATE_CLASSES; c++)
				sent += rate->counts[slice % SLICES][c];
		}
	}
	LWLockRelease(&shared->lock);
	return sent;
}

/* Return an identifier of a server of this database, which is valid until the server stops. */
static uint64
server_id(const char *server)
{
	char	   *text = psprintf("%u %s", MyDatabaseId, server);
	uint64		id = hash(text);

	pfree(text);
	return id;
}

/*
 * Return the entry of a key or server.  Clear the counts of slices older than a minute, and blocked_until
 * if its time has passed.  A new key or server gets an entry that is no longer in use.  If
 * there is none, return NULL, and in *free_at when there may be one.
 */
static Rate *
find_rate(uint64 id, int64 *free_at)
{
	int64		now = omni_clock();
	int64		slice = now / SLICE_LENGTH + SLICES;	/* the first slice needs
														 * predecessors */
	Rate	   *rate = NULL;

	for (int i = 0; i < SET_SIZE; i++)
	{
		Rate	   *other = &table[id % SETS][i];

		if (other->id == id)
		{
			rate = other;
			break;
		}
		if (rate == NULL || in_use_until(other) < in_use_until(rate))
			rate = other;
	}
	*free_at = in_use_until(rate);
	if (rate->id != id && *free_at > now)
		return NULL;
	*free_at = 0;
	if (rate->id != id)
	{
		memset(rate, 0, sizeof(Rate));
		rate->id = id;
		rate->slice = slice;
	}

	for (int64 i = Max(rate->slice, slice - SLICES) + 1; i <= slice; i++)
		memset(rate->counts[i % SLICES], 0, sizeof(rate->counts[0]));
	rate->slice = slice;
	if (rate->blocked_until <= now)
		rate->blocked_until = 0;
	return rate;
}

/*
 * Return until when an entry is in use: its newest slice counts for a minute, and a block
 * must be kept.
 */
static int64
in_use_until(const Rate *rate)
{
	return rate->id == 0 ? 0 : Max(rate->slice * SLICE_LENGTH, rate->blocked_until);
}

static void
attach_shared(void)
{
	if (shared == NULL)
		shared = shared_memory_compat(SHARED_NAME, sizeof(Shared), init_shared);
	if (table == NULL)
		attach_table();
}

static void
init_shared(OMNI_SHARED_INIT_ARGS)
{
	Shared	   *new = memory;

	memset(new, 0, sizeof(Shared));
	LWLockInitialize(&new->lock, LWLockNewTrancheId(OMNI_EXTENSION));
	if (!pg_strong_random(&new->salt, sizeof(new->salt)))
		new->salt = omni_clock();
	new->table = DSM_HANDLE_INVALID;
}

/* Attach the table for the life of this process; the first process makes it. */
static void
attach_table(void)
{
	dsm_segment *segment;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	if (shared->table != DSM_HANDLE_INVALID)
		segment = dsm_attach(shared->table);
	else
	{
		segment = dsm_create(SETS * sizeof(Set), 0);
		memset(dsm_segment_address(segment), 0, SETS * sizeof(Set));
		dsm_pin_segment(segment);
		shared->table = dsm_segment_handle(segment);
	}
	LWLockRelease(&shared->lock);
	dsm_pin_mapping(segment);
	table = dsm_segment_address(segment);
}
