/*-------------------------------------------------------------------------
 *
 * once.c
 *		Remember which jobs this transaction has queued, so that a request that one of them
 *		covers adds no row.
 *
 * A job covers the requests that the worker would merge into it without changing it; see
 * omni_queue_merge().  The same role must have called, too, since a job's row is shown to its
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
#include "catalog/pg_type.h"
#include "utils/datum.h"
#include "utils/memutils.h"

#include "once.h"
#include "setting.h"

/*
 * How many jobs to remember.  A request is compared with all of them, so this limits what
 * a transaction with many different requests pays for each, and the memory that it takes.
 */
#define MAX_REMEMBERED		256

/* A list of schemas or tables, sorted for comparison; count is 0 if there is no list */
typedef struct Names
{
	int			count;
	Datum	   *names;			/* of text */
} Names;

/* A request and its lists */
typedef struct Asked
{
	const OmniRequest *request;
	Names		schemas;
	Names		tables;
} Asked;

/* A job that this transaction has queued, allocated in CurTransactionContext */
typedef struct Remembered
{
	Asked		asked;
	Datum		row;			/* as omni_refresh_on_commit() returned it */
	OmniRowVersion version;
	int			level;			/* of the subtransaction, from 1 */
} Remembered;

/* In the order of their requests, and thus of their levels */
static Remembered *remembered[MAX_REMEMBERED];
static int	count = 0;

static Asked prepare(const OmniRequest *request);
static OmniRequest *copy_request(const OmniRequest *request);
static bool is_recent(const OmniRequest *job, const OmniRequest *other);
static bool covers(const Asked *job, const Asked *other);
static bool is_alike(const OmniRequest *a, const OmniRequest *b);
static bool contains(const Names *all, const Names *some);
static Names sort_names(ArrayType *list);
static int	compare_names(const void *a, const void *b);
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
	Asked		asked;

	/* if the transaction has become read-only, let the INSERT raise its error */
	if (count == 0 || XactReadOnly)
		return false;
	asked = prepare(request);

	/* the newest first: if an older one was canceled, a newer one replaces it */
	for (int i = count - 1; i >= 0; i--)
	{
		Remembered *job = remembered[i];

		if (covers(&job->asked, &asked) && is_recent(job->asked.request, request) &&
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
	job->asked = prepare(copy_request(request));
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
		const OmniRequest *job = remembered[i]->asked.request;

		if (job->kind != OMNI_KIND_CACHE || job->role != refresh->role ||
			memcmp(&job->model, &refresh->model, UUID_LEN) != 0 ||
			strcmp(NameStr(job->server), NameStr(refresh->server)) != 0)
			remembered[kept++] = remembered[i];
	}
	count = kept;
}

/* Sort the lists of a request, which must live as long as the result. */
static Asked
prepare(const OmniRequest *request)
{
	Asked		asked = {
		.request = request,
		.schemas = sort_names(request->schemas),
		.tables = sort_names(request->tables)
	};

	return asked;
}

static OmniRequest *
copy_request(const OmniRequest *request)
{
	OmniRequest *copy = palloc(sizeof(OmniRequest));

	*copy = *request;
	if (request->schemas != NULL)
		copy->schemas = DatumGetArrayTypePCopy(PointerGetDatum(request->schemas));
	if (request->tables != NULL)
		copy->tables = DatumGetArrayTypePCopy(PointerGetDatum(request->tables));
	return copy;
}

/*
 * Whether a job does all that another request asks for, and the same role called.  A reset
 * without a time is one of the moment when it is sent, and so the latest.
 */
static bool
covers(const Asked *job, const Asked *other)
{
	const OmniRequest *has = job->request;
	const OmniRequest *wants = other->request;

	if (!is_alike(has, wants) || has->caller != wants->caller)
		return false;
	if (has->kind == OMNI_KIND_CACHE)
		return !has->has_reset_at || (wants->has_reset_at && wants->reset_at <= has->reset_at);
	if (has->hard || wants->hard)
		return has->hard;
	if (job->schemas.count == 0 && job->tables.count == 0)
		return true;

	/*
	 * Omni refreshes what both lists name: jobs with other lists are not
	 * merged
	 */
	if (job->schemas.count != 0 && job->tables.count != 0 &&
		(job->schemas.count != other->schemas.count || job->tables.count != other->tables.count))
		return false;
	return contains(&job->schemas, &other->schemas) && contains(&job->tables, &other->tables);
}

/* Whether two requests agree in the columns of ALIKE, as jobs that are merged must. */
static bool
is_alike(const OmniRequest *a, const OmniRequest *b)
{
	return memcmp(&a->model, &b->model, UUID_LEN) == 0 &&
		a->has_branch == b->has_branch && memcmp(&a->branch, &b->branch, UUID_LEN) == 0 &&
		a->kind == b->kind && strcmp(a->policy, b->policy) == 0 &&
		a->role == b->role && strcmp(NameStr(a->server), NameStr(b->server)) == 0;
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

/* Whether two lists are both missing, or the first one has all names of the second one. */
static bool
contains(const Names *all, const Names *some)
{
	int			found = 0;

	if ((all->count == 0) != (some->count == 0))
		return false;
	for (int i = 0; i < all->count && found < some->count; i++)
	{
		int			order = compare_names(&all->names[i], &some->names[found]);

		if (order > 0)
			return false;
		if (order == 0)
			found++;
	}
	return found == some->count;
}

/* Sort the names of a list, which has no duplicates.  The list may be NULL. */
static Names
sort_names(ArrayType *list)
{
	Names		sorted = {0};

	if (list != NULL)
	{
		deconstruct_array(list, TEXTOID, -1, false, TYPALIGN_INT,
						  &sorted.names, NULL, &sorted.count);
		qsort(sorted.names, sorted.count, sizeof(Datum), compare_names);
	}
	return sorted;
}

/* Any order will do. */
static int
compare_names(const void *a, const void *b)
{
	text	   *left = DatumGetTextPP(*(const Datum *) a);
	text	   *right = DatumGetTextPP(*(const Datum *) b);
	int			length = VARSIZE_ANY_EXHDR(left);

	if (length != VARSIZE_ANY_EXHDR(right))
		return length < VARSIZE_ANY_EXHDR(right) ? -1 : 1;
	return memcmp(VARDATA_ANY(left), VARDATA_ANY(right), length);
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
