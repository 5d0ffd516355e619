/*-------------------------------------------------------------------------
 *
 * dispatch.h
 *		When the worker reads its queue.  See dispatch.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_DISPATCH_H
#define OMNI_DISPATCH_H

#include "worker/inflight.h"

/* when to read the queue */
extern void omni_dispatch_due(void);
extern void omni_dispatch_soon(void);
extern void omni_dispatch_reload(void);
extern void omni_dispatch_by(int64 when);
extern void omni_dispatch_pause(int delay);
extern long omni_dispatch_delay(void);
extern void omni_dispatch_finished(const OmniWork *work);

/* what is known of it */
extern bool omni_dispatch_any_left(void);
extern int64 omni_dispatch_read_at(void);

/* what an earlier worker left behind */
extern void omni_dispatch_settle(void);
extern void omni_dispatch_settled(void);

#endif							/* OMNI_DISPATCH_H */
