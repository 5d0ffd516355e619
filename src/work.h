/*-------------------------------------------------------------------------
 *
 * work.h
 *		What the files of the background worker share: the jobs that it has in hand.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_WORK_H
#define OMNI_WORK_H

#include "lib/ilist.h"

#include "job.h"
#include "option.h"
#include "rate.h"
#include "call.h"

/* All in ms */
#define LOCK_PATIENCE		5000	/* how long new calls wait for our tables */
#define RETRY_DELAY			100 /* before something local is tried again */
#define RETRY_DELAY_MAX		30000	/* the same, when it fails again and again */

/* How far a job has come in this worker's hands; see worker.c */
typedef enum OmniStep
{
	NEW,
	PENDING,
	SENDING,
	ANSWERED
} OmniStep;

/* A job in hand */
typedef struct OmniWork
{
	dlist_node	node;
	MemoryContext context;		/* holds all of this */
	OmniJob		job;
	OmniRateClass class;		/* a call, a job of the queue, or a question
								 * about one that is followed */
	bool		lookup;			/* a call that is no job: nothing is written */
	OmniStep	step;
	dsm_segment *segment;		/* of a call; NULL once the caller knows all */
	OmniCall   *call;			/* in that segment */
	/* times of omni_clock() */
	int64		taken_at;
	int64		deadline;		/* no attempt begins after it, but a queued
								 * job's first */
	int64		run_at;			/* if PENDING: the next attempt */
	bool		beginning;		/* it is to begin in this turn */
	bool		recording;		/* its outcome is to be written in this turn */
	bool		may_have_arrived;	/* some attempt ended without an answer */
	OmniError	telling;		/* of all attempts' errors, the one that tells
								 * most, and how much */
	int			telling_weight;
	int64		write_at;		/* if ANSWERED: the next try to write it down */
	int			write_failures;
	OmniRow		row;			/* what became of it in this turn */

	/* the attempt that is about to begin, or under way */
	MemoryContext attempt;		/* holds what follows, within context */
	OmniTarget	target;
	uint64		rate_id;
	char	   *url;
	OmniTransfer *transfer;		/* NULL before it is sent */
	int64		delayed_until;	/* by the rate limit, else 0 */
	bool		settled;		/* outcome is set */
	OmniOutcome outcome;
} OmniWork;

typedef enum OmniTransacted
{
	COMMITTED,
	NOT_NOW,					/* somebody holds a lock on our tables */
	FAILED
} OmniTransacted;

/* in worker.c */
extern dlist_head omni_works;

extern OmniTransacted omni_transact(bool (*body) (void *), void *arg, bool flush,
									OmniError *error);
extern OmniWork *omni_work_begin(OmniRateClass class);
extern void omni_work_end(OmniWork *work);
extern int	omni_works_count(OmniRateClass class, const NameData *server);
extern bool omni_work_is_forsaken(OmniWork *work);
extern bool omni_worker_is_enabled(void);

/* in claim.c */
extern void omni_claim_soon(void);
extern void omni_claim_by(int64 when);
extern void omni_claim_pause(int delay);
extern void omni_claim_due(void);
extern long omni_claim_delay(void);
extern bool omni_claim_any_left(void);
extern int64 omni_claim_last(void);
extern void omni_claim_settle(void);
extern void omni_claim_settled(void);
extern void omni_claim_sent(int64 merge_key);
extern void omni_claim_finished(const OmniWork *work);
extern void omni_claim_hold(const OmniWork *work, int64 until);
extern int64 omni_claim_held_until(const OmniWork *work);

/* in attempt.c */
extern bool omni_attempts_begin(void);
extern void omni_attempts_send(void);
extern void omni_attempts_record(void);
extern void omni_attempt_forget(OmniWork *work);

#endif							/* OMNI_WORK_H */
