/*-------------------------------------------------------------------------
 *
 * repeat.c
 *		Find calls that one statement repeats without meaning to.
 *
 * PostgreSQL expands (omni_refresh(...)).* into a call for each column, and each of them sends
 * a request.  The executor makes all of them while it evaluates one list of expressions for
 * one row.  So they share a memory context, that of the row, which is reset before the next
 * row, and in PL/pgSQL before the next statement.  And each has its own FmgrInfo, while a call
 * that is made for several rows, or by a loop, has the same one each time, whether or not the
 * memory was reset.  Therefore remember each call until its memory context is reset, and look
 * for an equal call with another FmgrInfo.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "lib/ilist.h"
#include "utils/memutils.h"

#include "sql/repeat.h"

/* A call, in the memory context of its row */
typedef struct RecentCall
{
	dlist_node	node;
	MemoryContext context;
	FmgrInfo   *flinfo;
	OmniRequest request;		/* its lists are in the same context */
	MemoryContextCallback forget;
} RecentCall;

static dlist_head recent_calls = DLIST_STATIC_INIT(recent_calls);

static bool is_same(const OmniRequest *a, const OmniRequest *b);
static bool is_same_list(const ArrayType *a, const ArrayType *b);
static void forget_call(void *arg);

/*
 * Remember a call.  Returns whether the same statement has made an equal one for the same
 * row.  The lists of *request must be in the current memory context.
 */
bool
omni_call_is_repeated(FmgrInfo *flinfo, const OmniRequest *request)
{
	RecentCall *call;
	dlist_iter	iter;
	bool		found = false;

	if (flinfo->fn_expr == NULL)	/* not called by an expression */
		return false;

	dlist_foreach(iter, &recent_calls)
	{
		RecentCall *earlier = dlist_container(RecentCall, node, iter.cur);

		if (earlier->context == CurrentMemoryContext && earlier->flinfo != flinfo &&
			is_same(&earlier->request, request))
			found = true;
	}

	call = palloc(sizeof(RecentCall));
	call->context = CurrentMemoryContext;
	call->flinfo = flinfo;
	call->request = *request;
	call->forget.func = forget_call;
	call->forget.arg = call;
	dlist_push_tail(&recent_calls, &call->node);
	MemoryContextRegisterResetCallback(CurrentMemoryContext, &call->forget);
	return found;
}

/* Whether two requests of one role ask for the same. */
static bool
is_same(const OmniRequest *a, const OmniRequest *b)
{
	return a->kind == b->kind && strcmp(NameStr(a->server), NameStr(b->server)) == 0 &&
		memcmp(&a->model, &b->model, UUID_LEN) == 0 &&
		a->has_branch == b->has_branch && memcmp(&a->branch, &b->branch, UUID_LEN) == 0 &&
		a->hard == b->hard &&
		is_same_list(a->schemas, b->schemas) && is_same_list(a->tables, b->tables) &&
		strcmp(a->policy, b->policy) == 0 &&
		a->has_reset_at == b->has_reset_at && a->reset_at == b->reset_at;
}

static bool
is_same_list(const ArrayType *a, const ArrayType *b)
{
	if (a == NULL || b == NULL)
		return a == b;
	return VARSIZE(a) == VARSIZE(b) && memcmp(a, b, VARSIZE(a)) == 0;
}

/* Reset callback of the memory context that a call is remembered in */
static void
forget_call(void *arg)
{
	RecentCall *call = arg;

	dlist_delete(&call->node);
}
