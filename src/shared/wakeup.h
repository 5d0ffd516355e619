/*-------------------------------------------------------------------------
 *
 * wakeup.h
 *		Waking the worker at commit.  See wakeup.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_WAKEUP_H
#define OMNI_WAKEUP_H

extern void omni_wake_on_commit(void);
extern void omni_wake_on_change(void);

#endif							/* OMNI_WAKEUP_H */
