/*-------------------------------------------------------------------------
 *
 * inflight.h
 *		The work that is in flight.  See inflight.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_INFLIGHT_H
#define OMNI_INFLIGHT_H

#include "lib/ilist.h"
#include "storage/fd.h"

#include "omni/http.h"
#include "omni/option.h"
#include "shared/call.h"
#include "shared/rate.h"
#include "store/job.h"

/* How far work has come; see worker.c */
typedef enum OmniStep
{
	NEW,
	PENDING,
	SENDING,
	ANSWERED
} OmniStep;

typedef struct OmniWork OmniWork;

/*
 * What differs between the kinds of work: calls, queued jobs, polls and look-ups.  Unless
 * stated otherwise, the functions run in the transaction that begins or records an attempt.
 * All but url and judge may be NULL.
 */
typedef struct OmniWorkKind
{
	OmniRateClass class;
	const char *method;			/* of HTTP */
	bool		has_caller;		/* a session waits for it until its deadline;
								 * else its job was taken from a table */
	bool		has_row;		/* an attempt changes the row when it begins */
	bool		has_job;		/* the outcome is recorded in a row */
	const char *resting;		/* without has_caller: the status of the row
								 * while it waits for the next attempt */

	/* Prepare for an attempt; may conclude the work instead. */
	void		(*prepare) (OmniWork *work);
	/* Return the URL of the request, palloc'd. */
	char	   *(*url) (const OmniWork *work);
	/* Record that an attempt begins.  Returns false if the row is gone. */
	bool		(*begin) (OmniWork *work);
	/* Record a wait for the rate limit, in microseconds. */
	void		(*delay) (OmniWork *work, int64 wait);
	/* Record an outcome without an attempt. */
	void		(*refuse) (OmniWork *work);
	/* An attempt has begun; called after the commit. */
	void		(*begun) (OmniWork *work);
	/* Decide what an answer means, and set the outcome. */
	void		(*judge) (OmniWork *work, const OmniAnswer *answer);
} OmniWorkKind;

/* A job, a poll of one, or a look-up that is in flight */
struct OmniWork
{
	dlist_node	node;			/* in omni_works */
	const OmniWorkKind *kind;
	MemoryContext context;		/* holds all of this */
	OmniJob		job;			/* of a look-up: server and role only */
	OmniStep	step;
	dsm_segment *segment;		/* of a call or look-up; NULL once the caller
								 * has its reply */
	OmniCall   *call;			/* in that segment, or NULL */

	/* times of omni_clock() */
	int64		taken_at;		/* when it was put in flight */
	int64		deadline;		/* nothing is sent after it, except the first
								 * request of a queued job */
	int64		run_at;			/* if PENDING: of the next attempt */
	int64		write_at;		/* if ANSWERED: of the next try to record the
								 * outcome */

	/* in this turn of the loop */
	bool		beginning;		/* an attempt is to begin */
	bool		recording;		/* the outcome is to be recorded */
	OmniRow		row;			/* what became of the row */

	/* over all attempts */
	bool		may_have_arrived;	/* one ended without an answer */
	OmniError	best_error;		/* the most telling error ... */
	int			best_weight;	/* ... and how much it tells */
	int			write_failures; /* to record the outcome, in a row */
	const char *waited_for;		/* what a call has waited for last, if it was
								 * taken in time; a constant */

	/* the attempt that is about to begin, or has begun */
	MemoryContext attempt;		/* within context; holds what follows */
	OmniTarget	target;
	uint64		rate_id;		/* of the API key, for rate.c */
	bool		has_place;		/* within its rate limit, and has not used it */
	char	   *url;
	OmniTransfer *transfer;		/* NULL before the request is sent */
	int64		delayed_until;	/* by the rate limit; 0 if it is not */
	bool		concluded;		/* outcome is set; not sooner, or an error
								 * would leave half of one */
	OmniOutcome outcome;		/* what it points to is in attempt, or lives
								 * longer */
};

/* All work in flight, in the order in which it was put there */
extern dlist_head omni_works;

extern OmniWork *omni_work_begin(const OmniWorkKind *kind);
extern void omni_work_begin_job(const OmniWorkKind *kind, const OmniJob *job, TimestampTz end);
extern void omni_work_end(OmniWork *work);
extern void omni_work_forget_attempt(OmniWork *work);
extern void omni_work_conclude(OmniWork *work, const char *status, const OmniError *error);
extern void omni_work_reply(OmniWork *work, int64 job_id, const OmniError *error);

/*
 * How many queued jobs and polls may be in flight, each with a file descriptor: calls and the
 * server's own files need most of them
 */
#define OMNI_MAX_OF_ALL		(max_safe_fds / 4)
#define OMNI_MAX_OF_ROLE	(max_safe_fds / 16)

extern bool omni_work_has_room(const OmniWorkKind *kind, const OmniRequest *request);
extern int	omni_works_of_role(Oid role);
extern int	omni_works_count(const OmniWorkKind *kind, const OmniRequest *request);
extern bool omni_work_is_claimed(const OmniWork *work);
extern bool omni_works_any_claimed(void);
extern bool omni_work_is_abandoned(const OmniWork *work);

#endif							/* OMNI_INFLIGHT_H */
