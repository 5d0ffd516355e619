/*-------------------------------------------------------------------------
 *
 * difference.c
 *		How a relation differs from what Omni was told of it: what was added, what was
 *		removed, and in words.
 *
 * Additions are told by a soft refresh, at once; removals by a hard one, later.  In between,
 * the memory holds what was removed, together with what was added.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/builtins.h"

#include "watch/difference.h"

/* Clip what is said of one relation after so many bytes */
#define MAX_WORDS			400

/* A list of texts */
typedef struct Texts
{
	char	  **texts;
	int			count;
} Texts;

/* A column and its type */
typedef struct Column
{
	char	   *name;
	char	   *type;
} Column;

static void compare_columns(OmniDifference *difference, StringInfo words);
static void compare_readers(OmniDifference *difference, StringInfo words);
static Column *read_columns(const OmniShape *shape, int *count);
static int	compare_columns_by_name(const void *a, const void *b);
static Texts read_texts(ArrayType *array);
static ArrayType *make_array(const Texts *texts);
static void say(StringInfo words, const char *format,...) pg_attribute_printf(2, 3);
static const char *privilege_words(const char *reader);
static int	compare_texts(const void *a, const void *b);

/* Find out in what a relation that Omni was told of differs. */
void
omni_difference_find(OmniDifference *difference)
{
	StringInfoData words;

	initStringInfo(&words);
	difference->adds = difference->removes = false;
	compare_columns(difference, &words);
	compare_readers(difference, &words);
	difference->words = words.data;
}

/* Columns may have changed their places, so sort them by name. */
static void
compare_columns(OmniDifference *difference, StringInfo words)
{
	int			nnow;
	int			nseen;
	Column	   *now = read_columns(&difference->now, &nnow);
	Column	   *seen = read_columns(&difference->seen, &nseen);
	Texts		names = {.texts = palloc((nnow + nseen) * sizeof(char *))};
	Texts		types = {.texts = palloc((nnow + nseen) * sizeof(char *))};
	int			i = 0;
	int			j = 0;

	while (i < nnow || j < nseen)
	{
		int			order = i == nnow ? 1 : j == nseen ? -1 : strcmp(now[i].name, seen[j].name);
		const Column *told = order < 0 ? &now[i] : &seen[j];

		names.texts[names.count++] = told->name;
		types.texts[types.count++] = told->type;
		if (order < 0)
		{
			difference->adds = true;
			say(words, "+ %s %s", quote_identifier(told->name), told->type);
		}
		else if (order > 0)
		{
			difference->removes = true;
			say(words, "- %s", quote_identifier(told->name));
		}
		else if (strcmp(now[i].type, told->type) != 0)
		{
			difference->removes = true;
			say(words, "%s from %s to %s", quote_identifier(told->name), told->type, now[i].type);
		}
		i += order <= 0 ? 1 : 0;
		j += order >= 0 ? 1 : 0;
	}
	difference->added.columns = make_array(&names);
	difference->added.types = make_array(&types);
}

/* Read the columns of a shape, sorted by name. */
static Column *
read_columns(const OmniShape *shape, int *count)
{
	Texts		names = read_texts(shape->columns);
	Texts		types = read_texts(shape->types);
	Column	   *columns = palloc(Max(names.count, 1) * sizeof(Column));

	/*
	 * unless the table's owner has changed a row, there is a type for each
	 * column
	 */
	*count = Min(names.count, types.count);
	for (int i = 0; i < *count; i++)
	{
		columns[i].name = names.texts[i];
		columns[i].type = types.texts[i];
	}
	qsort(columns, *count, sizeof(Column), compare_columns_by_name);
	return columns;
}

static int
compare_columns_by_name(const void *a, const void *b)
{
	return strcmp(((const Column *) a)->name, ((const Column *) b)->name);
}

/* Privileges are in the order in which they were granted, so sort them. */
static void
compare_readers(OmniDifference *difference, StringInfo words)
{
	Texts		now = read_texts(difference->now.readers);
	Texts		seen = read_texts(difference->seen.readers);
	Texts		both = {.texts = palloc((now.count + seen.count) * sizeof(char *))};
	int			i = 0;
	int			j = 0;

	qsort(now.texts, now.count, sizeof(char *), compare_texts);
	qsort(seen.texts, seen.count, sizeof(char *), compare_texts);
	while (i < now.count || j < seen.count)
	{
		int			order = i == now.count ? 1 : j == seen.count ? -1 :
		strcmp(now.texts[i], seen.texts[j]);
		char	   *text = order < 0 ? now.texts[i] : seen.texts[j];

		both.texts[both.count++] = text;
		if (order < 0)
		{
			difference->adds = true;
			say(words, "+ %s", privilege_words(text));
		}
		else if (order > 0)
		{
			difference->removes = true;
			say(words, "- %s", privilege_words(text));
		}
		/* several grantors may have granted the same */
		while (i < now.count && strcmp(now.texts[i], text) == 0)
			i++;
		while (j < seen.count && strcmp(seen.texts[j], text) == 0)
			j++;
	}
	difference->added.readers = make_array(&both);
}

/* Read an array of text; a null in it is an empty text. */
static Texts
read_texts(ArrayType *array)
{
	Texts		result;
	Datum	   *elements;
	bool	   *nulls;

	deconstruct_array(array, TEXTOID, -1, false, TYPALIGN_INT, &elements, &nulls, &result.count);
	result.texts = palloc(Max(result.count, 1) * sizeof(char *));
	for (int i = 0; i < result.count; i++)
		result.texts[i] = nulls[i] ? "" : TextDatumGetCString(elements[i]);
	return result;
}

static ArrayType *
make_array(const Texts *texts)
{
	Datum	   *elements = palloc(Max(texts->count, 1) * sizeof(Datum));

	for (int i = 0; i < texts->count; i++)
		elements[i] = CStringGetTextDatum(texts->texts[i]);
	return construct_array(elements, texts->count, TEXTOID, -1, false, TYPALIGN_INT);
}

/* Append to the words, after a comma. */
static void
say(StringInfo words, const char *format,...)
{
	char		text[2 * NAMEDATALEN + 3 * MAX_WORDS];
	va_list		args;

	if (words->len > MAX_WORDS)
	{
		if (words->data[words->len - 1] != '.')
			appendStringInfoString(words, ", ...");
		return;
	}
	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	appendStringInfo(words, "%s%s", words->len > 0 ? ", " : "", text);
}

/* Convert "SELECT 16384" to "SELECT for alice"; palloc'd. */
static const char *
privilege_words(const char *reader)
{
	const char *number = strrchr(reader, ' ');
	Oid			role = number != NULL ? atooid(number + 1) : InvalidOid;
	char	   *rolename = OidIsValid(role) ? GetUserNameFromId(role, true) : "PUBLIC";

	if (number == NULL)
		return reader;
	return psprintf("%.*s for %s", (int) (number - reader), reader,
					rolename == NULL ? number + 1 : OidIsValid(role) ? quote_identifier(rolename) : rolename);
}

static int
compare_texts(const void *a, const void *b)
{
	return strcmp(*(char *const *) a, *(char *const *) b);
}
