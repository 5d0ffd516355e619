/*-------------------------------------------------------------------------
 *
 * clock.h
 *		Time that does not jump when the system's clock is set.  See clock.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_CLOCK_H
#define OMNI_CLOCK_H

#include "datatype/timestamp.h"

/* Convert milliseconds to the unit of omni_clock() */
#define OMNI_MS(ms)			((int64) (ms) * 1000)

/* Later than any time of omni_clock() */
#define OMNI_CLOCK_NEVER	PG_INT64_MAX

extern int64 omni_clock(void);
extern long omni_clock_until(int64 when);
extern TimestampTz omni_latest_now(void);
extern TimestampTz omni_earliest_now(void);

#endif							/* OMNI_CLOCK_H */
