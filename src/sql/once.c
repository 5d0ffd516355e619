/*-------------------------------------------------------------------------
 *
 * once.c
 *		Remember which jobs this transaction has queued, so that a request that one of them
 *		covers adds no row.
 *
 * A job covers the requests that the worker would merge into it without changing it; see
 * lane.c.  The same role must have called, too, since a job's row is shown to its
 * caller only.  NOTIFY does likewise: it sends equal notifications of a transaction once.  A
 * trigger FOR EACH ROW may therefore ask as often as it fires.
 *
 * What is remembered belongs to the subtransaction that has queued the job: a rollback of
 * that forgets it, a release hands it to the parent.  A job may also be canceled, or its
 * row changed or deleted by SQL, and such a change may be rolled back in its turn.  No
 * bookkeeping follows these; instead, omni_job_is_unchanged() looks at the row itself each
 * time.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "utils/datum.h"
#include "utils/memutils.h"

#include "base/setting.h"
#include "sql/once.h"

/*
 * How many jobs to remember.  A request is compared with all of them, so this limits what
 * a transaction with many different requests pays for each, and the memory that it takes.
 */
#define MAX_REMEMBERED		256

/* A job that this transaction has queued, allocated in CurTransactionContext */
typedef struct Remembered
{
	OmniRequest *request;
	LaneJob		lane;			/* the same, for lane.c */
	Datum		row;			/* as omni_refresh_on_commit() returned it */
	OmniRowVersion version;
	int			level;			/* of the subtransaction, from 1 */
} Remembered;

/* In the order of their requests, and thus of their levels */
static Remembered *remembered[MAX_REMEMBERED];
static int	count = 0;

static bool is_of_lane(const OmniRequest *job, const OmniRequest *other);
static bool is_recent(const OmniRequest *job, const OmniRequest *other);
static void at_transaction_end(XactEvent event, void *arg);
static void at_subtransaction_end(SubXactEvent event, SubTransactionId own,
								  SubTransactionId parent, void *arg);

/*
 * Find a pending job of this transaction that covers a request.  Sets *row to its row,
 * palloc'd, as it was returned when the job was queued; returns false if there is none.
 */
bool
omni_once_find(const OmniRequest *request, Datum *row)
{
	LaneJob		asked;

	/* if the transaction has become read-only, let the INSERT raise its error */
	if (count == 0 || XactReadOnly)
		return false;
	omni_lane_job(request, &asked);

	/* the newest first: if an older one was canceled, a newer one replaces it */
	for (int i = count - 1; i >= 0; i--)
	{
		Remembered *job = remembered[i];

		if (lane_is_alike(&job->lane, &asked) && is_of_lane(job->request, request) &&
			lane_covers(&job->lane.request, &asked.request) && is_recent(job->request, request) &&
			omni_job_is_unchanged(&job->version))
		{
			*row = datumCopy(job->row, false, -1);
			return true;
		}
	}
	return false;
}

/* Remember a job that was just queued, unless there are too many or its version is not known. */
void
omni_once_remember(const OmniRequest *request, Datum row, const OmniRowVersion *version)
{
	static bool registered = false;
	MemoryContext context;
	Remembered *job;

	if (count == MAX_REMEMBERED || !OidIsValid(version->table))
		return;
	if (!registered)
	{
		RegisterXactCallback(at_transaction_end, NULL);
		RegisterSubXactCallback(at_subtransaction_end, NULL);
	}
	registered = true;

	context = MemoryContextSwitchTo(CurTransactionContext);
	job = palloc(sizeof(Remembered));
	job->request = palloc(sizeof(OmniRequest));
	*job->request = *request;
	omni_lane_job(job->request, &job->lane);
	job->row = datumCopy(row, false, -1);
	job->version = *version;
	job->level = GetCurrentTransactionNestLevel();
	remembered[count++] = job;
	MemoryContextSwitchTo(context);
}

/*
 * A refresh is requested: forget the resets that wait for earlier refreshes of its model only.
 * A later reset must wait for this one, too.
 */
void
omni_once_forget_resets(const OmniRequest *refresh)
{
	int			kept = 0;

	for (int i = 0; i < count; i++)
	{
		const OmniRequest *job = remembered[i]->request;

		if (omni_job_kinds[job->kind].holds_resets || job->role != refresh->role ||
			memcmp(&job->model, &refresh->model, UUID_LEN) != 0 ||
			strcmp(NameStr(job->server), NameStr(refresh->server)) != 0)
			remembered[kept++] = remembered[i];
	}
	count = kept;
}

/* Return whether two requests are of the same role at the same server, and the same role called. */
static bool
is_of_lane(const OmniRequest *a, const OmniRequest *b)
{
	return a->role == b->role && a->caller == b->caller &&
		strcmp(NameStr(a->server), NameStr(b->server)) == 0;
}

/*
 * Whether a job may stand for a later request.  The job is retried for retry_for after its
 * own request, so in a long transaction the later one would be given up early: by a tenth
 * of that time at most.
 */
static bool
is_recent(const OmniRequest *job, const OmniRequest *other)
{
	return omni_retry_for == 0 ||
		other->requested_at - job->requested_at <= omni_retry_for * USECS_PER_SEC / 10;
}

/* Forget all.  CurTransactionContext is freed, or, of a prepared transaction, soon will be. */
static void
at_transaction_end(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT || event == XACT_EVENT_PREPARE)
		count = 0;
}

/* Forget the jobs of a subtransaction that is rolled back; hand others to its parent. */
static void
at_subtransaction_end(SubXactEvent event, SubTransactionId own,
					  SubTransactionId parent, void *arg)
{
	int			level = GetCurrentTransactionNestLevel();

	if (event == SUBXACT_EVENT_ABORT_SUB)
	{
		while (count > 0 && remembered[count - 1]->level >= level)
			count--;
	}
	else if (event == SUBXACT_EVENT_COMMIT_SUB)
	{
		for (int i = count - 1; i >= 0 && remembered[i]->level >= level; i--)
			remembered[i]->level = level - 1;
	}
}
