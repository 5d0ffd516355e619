/*-------------------------------------------------------------------------
 *
 * words.c
 *		Say in words what has changed, for the event log: short, however much it is.
 *
 *		added sales.t1 to sales.t40 (40); sales.orders: + discount numeric, - total
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/builtins.h"

#include "watch/words.h"

/* Name this many relations of a schema; of more, the first and the last one */
#define MAX_NAMED			3

/* Name this many schemas */
#define MAX_SCHEMAS			20

/* Clip the text on altered relations after so many bytes */
#define MAX_ALTERED			2000

/* The relations of a schema, in the order in which they were found */
typedef struct Group
{
	char	   *schema;
	char	   *named[MAX_NAMED];
	char	   *last;
	int			count;
} Group;

static List *copy_groups(List *groups);
static List *add(OmniWords *words, List *groups, const char *schema, const char *relation);
static void say_groups(StringInfo text, const char *verb, List *groups);

/* Begin to collect, in a memory context. */
void
omni_words_begin(OmniWords *words, MemoryContext context)
{
	MemoryContext before = MemoryContextSwitchTo(context);

	words->context = context;
	words->added = words->removed = NIL;
	words->altered = makeStringInfo();
	words->unsaid = 0;
	MemoryContextSwitchTo(before);
}

/* Copy what was collected into another memory context. */
void
omni_words_copy(OmniWords *words, const OmniWords *from, MemoryContext context)
{
	MemoryContext before = MemoryContextSwitchTo(context);
	OmniWords	copy = *from;

	copy.context = context;
	copy.added = copy_groups(from->added);
	copy.removed = copy_groups(from->removed);
	copy.altered = makeStringInfo();
	appendStringInfoString(copy.altered, from->altered->data);
	*words = copy;
	MemoryContextSwitchTo(before);
}

static List *
copy_groups(List *groups)
{
	List	   *result = NIL;
	ListCell   *cell;

	foreach(cell, groups)
	{
		const Group *from = lfirst(cell);
		Group	   *group = palloc(sizeof(Group));

		*group = *from;
		group->schema = pstrdup(from->schema);
		for (int i = 0; i < Min(from->count, MAX_NAMED); i++)
			group->named[i] = pstrdup(from->named[i]);
		if (from->last != NULL)
			group->last = pstrdup(from->last);
		result = lappend(result, group);
	}
	return result;
}

void
omni_words_added(OmniWords *words, const char *schema, const char *relation)
{
	words->added = add(words, words->added, schema, relation);
}

void
omni_words_removed(OmniWords *words, const char *schema, const char *relation)
{
	words->removed = add(words, words->removed, schema, relation);
}

/* Keep nothing in the words' context but what is in the groups: there may be many relations. */
static List *
add(OmniWords *words, List *groups, const char *schema, const char *relation)
{
	const char *name = quote_qualified_identifier(schema, relation);
	MemoryContext before = MemoryContextSwitchTo(words->context);
	Group	   *group = NULL;
	ListCell   *cell;

	foreach(cell, groups)
	{
		if (strcmp(((Group *) lfirst(cell))->schema, schema) == 0)
			group = lfirst(cell);
	}
	if (group == NULL && list_length(groups) == MAX_SCHEMAS)
		group = llast(groups);	/* counts what is in further schemas, too */
	else if (group == NULL)
	{
		group = palloc0(sizeof(Group));
		group->schema = pstrdup(schema);
		groups = lappend(groups, group);
	}
	if (group->count < MAX_NAMED)
		group->named[group->count] = pstrdup(name);
	else
	{
		if (group->last != NULL)
			pfree(group->last);
		group->last = pstrdup(name);
	}
	group->count++;
	MemoryContextSwitchTo(before);
	return groups;
}

/* Note how a relation has changed that is neither new nor gone. */
void
omni_words_altered(OmniWords *words, const char *schema, const char *relation, const char *what)
{
	if (words->altered->len > MAX_ALTERED)
		words->unsaid++;
	else
		appendStringInfo(words->altered, "%s%s: %s", words->altered->len > 0 ? "; " : "",
						 quote_qualified_identifier(schema, relation), what);
}

/* Return what was collected, palloc'd; empty if that is nothing. */
char *
omni_words_text(const OmniWords *words)
{
	StringInfoData text;

	initStringInfo(&text);
	say_groups(&text, "added", words->added);
	say_groups(&text, "removed", words->removed);
	if (words->altered->len > 0)
		appendStringInfo(&text, "%s%s", text.len > 0 ? "; " : "", words->altered->data);
	if (words->unsaid > 0)
		appendStringInfo(&text, "; and %d more", words->unsaid);
	return text.data;
}

static void
say_groups(StringInfo text, const char *verb, List *groups)
{
	ListCell   *cell;

	foreach(cell, groups)
	{
		Group	   *group = lfirst(cell);

		appendStringInfo(text, "%s%s", text->len > 0 ? "; " : "", verb);
		if (group->last != NULL)
			appendStringInfo(text, " %s to %s (%d)", group->named[0], group->last, group->count);
		else
		{
			for (int i = 0; i < group->count; i++)
				appendStringInfo(text, "%s %s", i > 0 ? "," : "", group->named[i]);
		}
	}
}
