/*-------------------------------------------------------------------------
 *
 * ending.h
 *		What the server's log says when a process of ours ends.  See ending.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_ENDING_H
#define OMNI_ENDING_H

extern void omni_ending_watch(void);
extern bool omni_ending_is_final(void);

#endif							/* OMNI_ENDING_H */
