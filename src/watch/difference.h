/*-------------------------------------------------------------------------
 *
 * difference.h
 *		How a relation differs from what Omni was told of it.  See difference.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_DIFFERENCE_H
#define OMNI_DIFFERENCE_H

#include "utils/array.h"

/* What there is to know of a relation: arrays of text */
typedef struct OmniShape
{
	ArrayType  *columns;
	ArrayType  *types;			/* of the columns */
	ArrayType  *readers;		/* privileges, each with the OID of a role */
} OmniShape;

/* A relation that is not as Omni was told */
typedef struct OmniDifference
{
	const char *schema;
	const char *relation;
	bool		leaf;			/* a partition without partitions of its own */
	bool		known;			/* Omni was told of it */
	OmniShape	now;			/* as it is */
	OmniShape	seen;			/* as Omni was told, if known */

	/* set by omni_difference_find() */
	bool		adds;			/* something that a soft refresh finds */
	bool		removes;		/* something that only a hard refresh removes */
	OmniShape	added;			/* what Omni was told once it is told the
								 * additions */
	char	   *words;			/* what differs; empty if that is the order
								 * only */
} OmniDifference;

extern void omni_difference_find(OmniDifference *difference);

#endif							/* OMNI_DIFFERENCE_H */
