/*-------------------------------------------------------------------------
 *
 * rate.h
 *		The rate limiter.  See rate.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_RATE_H
#define OMNI_RATE_H

#include "c.h"

/* The classes of requests that share a rate limit */
typedef enum OmniRateClass
{
	OMNI_RATE_CALL,
	OMNI_RATE_JOB,
	OMNI_RATE_POLL
} OmniRateClass;

#define OMNI_RATE_CLASSES	(OMNI_RATE_POLL + 1)

extern uint64 omni_rate_id(const char *host, const char *key);
extern int64 omni_rate_take(uint64 id, OmniRateClass class, int limit, bool *blocked);
extern void omni_rate_give_back(uint64 id, OmniRateClass class);
extern int	omni_rate_left(uint64 id, int limit);
extern void omni_rate_block(uint64 id, int64 until);
extern void omni_rate_sent(const char *server, OmniRateClass class);
extern int64 omni_rate_sent_lately(const char *server);

#endif							/* OMNI_RATE_H */
