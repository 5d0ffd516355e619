/*-------------------------------------------------------------------------
 *
 * compare.h
 *		How the worker serves watches.  See compare.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_COMPARE_H
#define OMNI_COMPARE_H

extern bool omni_watches_due(void);
extern long omni_watches_delay(void);
extern bool omni_watches_any_left(void);

#endif							/* OMNI_COMPARE_H */
