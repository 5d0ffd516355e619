/*-------------------------------------------------------------------------
 *
 * throttle.h
 *		Throttled roles.  See throttle.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_THROTTLE_H
#define OMNI_THROTTLE_H

#include "worker/inflight.h"

extern void omni_throttle(const OmniWork *work, int64 until);
extern int64 omni_throttled_until(const OmniWork *work);
extern int64 omni_throttle_ends(void);
extern void omni_throttle_list(const OmniWorkKind *kind, OmniHeld *held);
extern bool omni_is_held(const OmniHeld *held, const OmniPlace *place);

#endif							/* OMNI_THROTTLE_H */
