/*-------------------------------------------------------------------------
 *
 * words.h
 *		Say in words what has changed.  See words.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_WORDS_H
#define OMNI_WORDS_H

#include "lib/stringinfo.h"
#include "nodes/pg_list.h"

/* What a look has found */
typedef struct OmniWords
{
	MemoryContext context;		/* of all that follows */
	List	   *added;			/* relations, by schema */
	List	   *removed;
	StringInfo	altered;		/* text */
	int			unsaid;			/* altered relations that are not in the text */
} OmniWords;

extern void omni_words_begin(OmniWords *words, MemoryContext context);
extern void omni_words_copy(OmniWords *words, const OmniWords *from, MemoryContext context);
extern void omni_words_added(OmniWords *words, const char *schema, const char *relation);
extern void omni_words_removed(OmniWords *words, const char *schema, const char *relation);
extern void omni_words_altered(OmniWords *words, const char *schema, const char *relation,
							   const char *what);
extern char *omni_words_text(const OmniWords *words);

#endif							/* OMNI_WORDS_H */
