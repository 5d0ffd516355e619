/*-------------------------------------------------------------------------
 *
 * call.h
 *		Calls: handed over by a backend, answered by the worker.  See call.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_CALL_H
#define OMNI_CALL_H

#include "port/atomics.h"
#include "storage/dsm.h"

#include "base/error.h"
#include "omni/api.h"

/* The result of a probe: how the connection to Omni was made.  Plain data. */
typedef struct OmniProbe
{
	bool		begun;			/* if not, the error says why */
	bool		answered;
	OmniPhase	phase;			/* where it failed, if not answered */
	int			http_status;
	int64		elapsed;		/* microseconds */
	int			rate_limit;		/* requests a minute, 0 means no limit */
	int			rate_left;		/* how many of them are left now */
	char		address[64];
	bool		secure;			/* with TLS */
	char		issuer[256];	/* of the server's certificate; empty if the
								 * connection was reused and libcurl no longer
								 * knows it */
	char		expires[64];	/* likewise */
	bool		has_model;		/* Omni has the model that the request names */
	char		model[256];		/* its name; may be empty */
} OmniProbe;

/* The state of a call between backend and worker */
typedef enum OmniCallState
{
	OMNI_CALL_WAITING,			/* no worker has taken it yet */
	OMNI_CALL_TAKEN,			/* the worker has it */
	OMNI_CALL_DONE,				/* the results are written */
	OMNI_CALL_LOST				/* the worker ended before that */
} OmniCallState;

/*
 * A call: the head of a DSM segment that a backend makes.  The backend writes all fields but
 * the results before it hands the segment over to the worker; the worker writes the results
 * before it sets the state to OMNI_CALL_DONE.
 */
typedef struct OmniCall
{
	pg_atomic_uint32 state;		/* OmniCallState */
	pg_atomic_uint32 abandoned; /* not 0: the caller has left */
	int			caller;			/* index of its PGPROC */
	int64		deadline;		/* end of call_timeout, by omni_clock() */
	OmniRequest request;		/* of a look-up: server and role only; of a
								 * probe: maybe the model to look for */
	Size		schemas;		/* offset of a flat text[] in the segment, 0
								 * if NULL */
	Size		tables;			/* likewise */
	Size		lookup;			/* offset of the part of the URL that says
								 * what to look up, as in "models?name=x"; 0
								 * if this is no look-up */
	Size		answer;			/* of a look-up: offset of room for the answer */
	bool		once;			/* of a look-up: do not try again */
	bool		probe;			/* of a look-up: describe the connection, too */

	/* results */
	int64		job_id;			/* 0 when there is no row */
	Size		length;			/* of a look-up's answer, in bytes */
	OmniProbe	probed;
	OmniError	error;
	OmniError	start_error;	/* of the worker that was started for it */
} OmniCall;

/* in backends */
extern OmniCall *omni_call_create(const OmniRequest *request, const char *lookup,
								  dsm_segment **segment);
extern bool omni_call_run(dsm_segment *segment, OmniError *error);
extern void omni_call_end(dsm_segment *segment);

/* in the worker */
extern void omni_call_watch_start(dsm_handle call);
extern bool omni_call_starter_waits(void);
extern void omni_call_started(void);
extern dsm_segment *omni_call_next(bool *again);
extern void omni_call_finish(dsm_segment *segment, int64 job_id,
							 const OmniError *error);

/* in both */
extern void omni_call_lost(const OmniCall *call, OmniError *error);

#endif							/* OMNI_CALL_H */
