/*-------------------------------------------------------------------------
 *
 * rate.c
 *		The rate limiter: how many requests may be made with a key.
 *
 * Omni counts the requests of a key, whoever makes them, over the last minute.
 * So do we, in shared memory, for all databases of the cluster and beyond the
 * life of a worker.  The minute is cut into slices that each have a count; the
 * oldest is counted whole, so that in no minute more requests may begin than the
 * limit says.  A key is known by a hash of it and of the host, salted anew at each
 * start of the server.
 *
 * Calls, queued jobs and polls each have a share of the limit, which the others
 * leave to them as long as they have been asking for it.
 *
 * When Omni says no all the same, because others use the key too, nothing more
 * is sent with it before the time that Omni gave.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "common/hashfn.h"

#include "clock.h"
#include "compat.h"
#include "omni_refresh.h"
#include "rate.h"

#define SHARED_NAME			"omni_refresh rates layout 3"

/*
 * 12 slices and the one that is counted whole make a minute and a second or
 * more, so that a request that was slow on its way does no harm.
 */
#define SLICES				13
#define SLICE_LENGTH		OMNI_MS(5100)

/* When there are more keys than this in a minute, some may send more than their limit */
#define MAX_KEYS			32

typedef struct Rate
{
	uint64		id;				/* 0: not in use */
	int64		slice;			/* number of the newest slice, by omni_clock() */
	uint32		counts[SLICES][OMNI_RATE_CLASSES];	/* of slice n at n modulo
													 * SLICES */
	int64		refused[OMNI_RATE_CLASSES]; /* slice of the last refusal */
	int64		blocked_until;	/* by omni_clock(), or 0 */
} Rate;

typedef struct Shared
{
	LWLock		lock;
	int			tranche;
	uint64		salt;
	Rate		rates[MAX_KEYS];
} Shared;

/* A class has this part of the limit to itself, as soon as it wants it */
static const int shares[OMNI_RATE_CLASSES] = {
	[OMNI_RATE_CALL] = 2,
	[OMNI_RATE_JOB] = 4,
	[OMNI_RATE_POLL] = 8
};

static Shared *shared = NULL;

static void attach_shared(void);
static void init_shared(OMNI_SHARED_INIT_ARGS);
static bool has_room(const Rate *rate, OmniRateClass class, int limit, const uint32 *used, int64 all);
static Rate *find_rate(uint64 id);
static bool is_dispensable(const Rate *one, const Rate *other);

/* The identity of a key at a host, as long as the server runs. */
uint64
omni_rate_id(const char *host, const char *key)
{
	char	   *text = psprintf("%s %s", host, key);
	uint64		id;

	attach_shared();
	id = hash_bytes_extended((unsigned char *) text, strlen(text), shared->salt);
	explicit_bzero(text, strlen(text));
	pfree(text);
	return id != 0 ? id : 1;
}

/*
 * Reserves a place within the rate limit, of so many requests a minute (0 means no
 * limit), for one request now.  Returns 0 if there is one, else the time to ask again,
 * by omni_clock(), and whether it is that late because of omni_rate_block().
 */
int64
omni_rate_take(uint64 id, OmniRateClass class, int limit, bool *blocked)
{
	int64		when = 0;
	Rate	   *rate;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	rate = find_rate(id);
	*blocked = rate->blocked_until != 0;
	if (*blocked)
		when = rate->blocked_until;
	else if (limit > 0)
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

		/* there is room for it when enough of the oldest no longer count */
		while (!has_room(rate, class, limit, used, all) && oldest <= rate->slice)
		{
			for (int c = 0; c < OMNI_RATE_CLASSES; c++)
			{
				used[c] -= rate->counts[oldest % SLICES][c];
				all -= rate->counts[oldest % SLICES][c];
			}
			oldest++;
			when = (oldest - 1) * SLICE_LENGTH; /* begins slice oldest +
												 * SLICES - 1 */
		}
	}

	if (when == 0)
		rate->counts[rate->slice % SLICES][class]++;
	else
		rate->refused[class] = rate->slice;
	LWLockRelease(&shared->lock);
	return when;
}

/*
 * Whether a class may make one more request, with so many used in a minute: if
 * it has not had its share, or if the others that have been refused lately keep
 * what is left of theirs.  Calls keep it from polls in any case: these go on for as
 * long as jobs run, and a call would come too late for its caller.
 */
static bool
has_room(const Rate *rate, OmniRateClass class, int limit, const uint32 *used, int64 all)
{
	int64		kept = 0;

	for (int c = 0; c < OMNI_RATE_CLASSES; c++)
	{
		int64		share = Max(limit / shares[c], 1);

		if (c == class && used[c] < share)
			return all < limit;
		if (c != class && used[c] < share &&
			(rate->refused[c] > rate->slice - SLICES || (c == OMNI_RATE_CALL && class == OMNI_RATE_POLL)))
			kept += share - used[c];
	}
	return all + kept < limit;
}

/* How many requests there is room for now, within a limit of so many a minute. */
int
omni_rate_left(uint64 id, int limit)
{
	int			left = limit;
	Rate	   *rate;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	rate = find_rate(id);
	for (int i = 0; i < SLICES; i++)
	{
		for (int c = 0; c < OMNI_RATE_CLASSES; c++)
			left -= rate->counts[i][c];
	}
	if (rate->blocked_until != 0)
		left = 0;
	LWLockRelease(&shared->lock);
	return Max(left, 0);
}

/* Lets nothing more be sent before a time of omni_clock(). */
void
omni_rate_block(uint64 id, int64 until)
{
	Rate	   *rate;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	rate = find_rate(id);
	rate->blocked_until = Max(rate->blocked_until, until);
	LWLockRelease(&shared->lock);
}

/*
 * The counts of a key, those of the last minute left, and 0 as blocked_until if it
 * is not blocked.  A new key takes the place of another one.
 */
static Rate *
find_rate(uint64 id)
{
	int64		now = omni_clock();
	int64		slice = now / SLICE_LENGTH + SLICES;	/* the first one has
														 * others before it */
	Rate	   *rate = NULL;

	for (int i = 0; i < MAX_KEYS; i++)
	{
		Rate	   *other = &shared->rates[i];

		if (other->blocked_until <= now)
			other->blocked_until = 0;
		if (other->id == id)
		{
			rate = other;
			break;
		}
		if (rate == NULL || is_dispensable(other, rate))
			rate = other;
	}
	if (rate->id != id)
	{
		memset(rate, 0, sizeof(Rate));
		rate->id = id;
		rate->slice = slice;
	}

	for (int64 i = Max(rate->slice, slice - SLICES) + 1; i <= slice; i++)
		memset(rate->counts[i % SLICES], 0, sizeof(rate->counts[0]));
	rate->slice = slice;
	return rate;
}

/*
 * Whether less is lost with one entry than with another: one without a pause that Omni
 * has asked for, and of these the one not used for longer; else the longer pause, since
 * the shorter one may be a neighbour's of somebody who fills the table with long ones.
 */
static bool
is_dispensable(const Rate *one, const Rate *other)
{
	if (one->blocked_until == 0 && other->blocked_until == 0)
		return one->slice < other->slice;
	return one->blocked_until == 0 || (other->blocked_until != 0 && one->blocked_until > other->blocked_until);
}

static void
attach_shared(void)
{
	if (shared != NULL)
		return;
	shared = shared_memory_compat(SHARED_NAME, sizeof(Shared), init_shared);
	LWLockRegisterTranche_compat(shared->tranche, OMNI_EXTENSION);
}

static void
init_shared(OMNI_SHARED_INIT_ARGS)
{
	Shared	   *new = memory;

	memset(new, 0, sizeof(Shared));
	new->tranche = LWLockNewTrancheId_compat(OMNI_EXTENSION);
	LWLockInitialize(&new->lock, new->tranche);
	if (!pg_strong_random(&new->salt, sizeof(new->salt)))
		new->salt = omni_clock();
}
