/*-------------------------------------------------------------------------
 *
 * dispatch.h
 *		What of the queue goes next.  See dispatch.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_DISPATCH_H
#define OMNI_DISPATCH_H

#include "inflight.h"

extern void omni_dispatch_due(void);
extern void omni_dispatch_soon(void);
extern void omni_dispatch_reload(void);
extern void omni_dispatch_by(int64 when);
extern void omni_dispatch_pause(int delay);
extern long omni_dispatch_delay(void);
extern bool omni_dispatch_any_left(void);
extern int64 omni_dispatch_looked_at(void);
extern void omni_dispatch_settle(void);
extern void omni_dispatch_settled(void);
extern void omni_dispatch_finished(const OmniWork *work);

#endif							/* OMNI_DISPATCH_H */
