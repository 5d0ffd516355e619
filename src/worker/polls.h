/*-------------------------------------------------------------------------
 *
 * polls.h
 *		Which running jobs to poll.  See polls.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_POLLS_H
#define OMNI_POLLS_H

#include "datatype/timestamp.h"

extern void omni_polls_restart(void);
extern bool omni_polls_claim(bool *any, TimestampTz *next);

#endif							/* OMNI_POLLS_H */
