/*-------------------------------------------------------------------------
 *
 * round.h
 *		Rounds of the queue.  See round.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_ROUND_H
#define OMNI_ROUND_H

#include "datatype/timestamp.h"

/* Read at least this many due jobs at a time, even if fewer may be in flight */
#define OMNI_CLAIM_MIN		16

extern void omni_round_restart(bool merge_ahead);
extern bool omni_round_go_on(bool enabled, bool *any_locked);
extern bool omni_round_is_complete(bool *any, TimestampTz *next_due);
extern bool omni_round_any_held(void);
extern bool omni_round_merge_ahead(void);

#endif							/* OMNI_ROUND_H */
