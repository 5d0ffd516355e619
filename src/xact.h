/*-------------------------------------------------------------------------
 *
 * xact.h
 *		A transaction of the worker's.  See xact.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_XACT_H
#define OMNI_XACT_H

#include "error.h"

/* All in ms */
#define OMNI_LOCK_PATIENCE	5000	/* how long new calls wait for our tables */
#define OMNI_LOCAL_DELAY	100 /* before something local is tried again ... */
#define OMNI_LOCAL_DELAY_MAX	30000	/* ... and again and again */

typedef enum OmniTransacted
{
	COMMITTED,
	NOT_NOW,					/* somebody holds a lock on our tables */
	FAILED
} OmniTransacted;

extern OmniTransacted omni_transact(bool (*body) (void *), void *arg, bool flush,
									OmniError *error);
extern void omni_error_set_locked(OmniError *error);
extern void omni_notify_listeners(void);

#endif							/* OMNI_XACT_H */
