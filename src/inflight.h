/*-------------------------------------------------------------------------
 *
 * inflight.h
 *		What the worker has in flight.  See inflight.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_INFLIGHT_H
#define OMNI_INFLIGHT_H

#include "lib/ilist.h"

#include "call.h"
#include "http.h"
#include "job.h"
#include "option.h"
#include "rate.h"

/* How far a piece of work has come; see worker.c */
typedef enum OmniStep
{
	NEW,
	PENDING,
	SENDING,
	ANSWERED
} OmniStep;

typedef struct OmniWork OmniWork;

/*
 * What differs between the kinds of work: calls, queued jobs, polls and look-ups.  The
 * functions run in the transaction that begins or records an attempt, unless they say
 * otherwise; all but url and judge may be NULL.
 */
typedef struct OmniWorkKind
{
	OmniRateClass class;
	const char *method;			/* of HTTP */
	bool		has_caller;		/* somebody waits, until the deadline; else it
								 * is taken from a table, and may go back */
	bool		has_row;		/* which is changed when an attempt begins */
	bool		has_job;		/* which is recorded at all */
	const char *resting;		/* status of a row to which to come back later */
	bool		rests_quietly;	/* without an event */

	/* Before an attempt: may conclude the work instead. */
	void		(*prepare) (OmniWork *work);
	/* The URL of the request, palloc'd. */
	char	   *(*url) (const OmniWork *work);
	/* Writes that it is about to be sent; false if its row is gone. */
	bool		(*begin) (OmniWork *work);
	/* Writes that it must wait for the rate limit, for so many microseconds. */
	void		(*delay) (OmniWork *work, int64 wait);
	/* Writes an outcome without an attempt. */
	void		(*refuse) (OmniWork *work);
	/* After the commit: it is about to be sent. */
	void		(*begun) (OmniWork *work);
	/* Decides what an answer means. */
	void		(*judge) (OmniWork *work, const OmniAnswer *answer);
} OmniWorkKind;

/* A job, a poll of one, or a look-up, in the worker's hands */
struct OmniWork
{
	dlist_node	node;
	const OmniWorkKind *kind;
	MemoryContext context;		/* holds all of this */
	OmniJob		job;			/* of a look-up: server and role only */
	OmniStep	step;
	dsm_segment *segment;		/* of a call or look-up; NULL once the caller
								 * has its reply */
	OmniCall   *call;			/* in that segment */

	/* times of omni_clock() */
	int64		taken_at;
	int64		deadline;		/* no attempt begins after it, but a queued
								 * job's first */
	int64		run_at;			/* if PENDING: the next attempt */
	int64		write_at;		/* if ANSWERED: the next try to record it */

	/* in this turn of the loop */
	bool		beginning;		/* an attempt is to begin */
	bool		recording;		/* the outcome is to be recorded */
	OmniRow		row;			/* what became of the row */

	/* over all attempts */
	bool		may_have_arrived;	/* one ended without an answer */
	OmniError	best_error;		/* the error that tells most, ... */
	int			best_weight;	/* ... and how much */
	int			write_failures;

	/* the attempt that is about to begin, or under way */
	MemoryContext attempt;		/* holds what follows, within context */
	OmniTarget	target;
	uint64		rate_id;
	char	   *url;
	OmniTransfer *transfer;		/* NULL before it is sent */
	int64		delayed_until;	/* by the rate limit, else 0 */
	bool		concluded;		/* outcome is set */
	OmniOutcome outcome;
};

extern dlist_head omni_works;

extern OmniWork *omni_work_begin(const OmniWorkKind *kind);
extern void omni_work_begin_job(const OmniWorkKind *kind, const OmniJob *job, TimestampTz end);
extern void omni_work_end(OmniWork *work);
extern void omni_work_forget_attempt(OmniWork *work);
extern void omni_work_conclude(OmniWork *work, const char *status, const OmniError *error);
extern void omni_work_reply(OmniWork *work, int64 job_id, const OmniError *error);
extern int	omni_works_count(const OmniWorkKind *kind, const NameData *server);
extern bool omni_work_is_claimed(const OmniWork *work);
extern bool omni_works_any_claimed(void);
extern bool omni_work_is_abandoned(const OmniWork *work);

#endif							/* OMNI_INFLIGHT_H */
