/*-------------------------------------------------------------------------
 *
 * known.h
 *		The schemas that Omni knows.  See known.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_KNOWN_H
#define OMNI_KNOWN_H

#include "nodes/pg_list.h"

extern bool omni_known_compare(const char *answer, Size length, List **unknown, int *all);

#endif							/* OMNI_KNOWN_H */
