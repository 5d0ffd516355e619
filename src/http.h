/*-------------------------------------------------------------------------
 *
 * http.h
 *		HTTP requests to whom it may be.  See http.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_HTTP_H
#define OMNI_HTTP_H

#include "c.h"

/* An answer of Omni's is a few hundred bytes, a page of models some 100 kB */
#define OMNI_MAX_ANSWER		(1024 * 1024)

/* How far an attempt came, in the order of events */
typedef enum OmniPhase
{
	OMNI_PHASE_NAME,
	OMNI_PHASE_CONNECT,
	OMNI_PHASE_TLS,
	OMNI_PHASE_WAIT,			/* for the first byte of the answer */
	OMNI_PHASE_READ
} OmniPhase;

/* What became of one HTTP request; strings live as long as the transfer */
typedef struct OmniAnswer
{
	bool		failed;			/* no complete answer: see the next fields */
	OmniPhase	phase;			/* where it failed */
	bool		timed_out;
	bool		retryable;		/* the same request might fare better later */
	bool		too_large;		/* the answer was longer than we accept */
	const char *reason;			/* libcurl's words */
	bool		at_proxy;		/* it failed at the proxy, not at the host */
	int			proxy_status;	/* HTTP status by which the proxy refused to
								 * connect, 0 when there was none */
	bool		tls_version;	/* no version of TLS that both sides accept */
	bool		no_tls;			/* the other side does not speak TLS */

	bool		sent;			/* some of the request left this host */
	bool		withdrawn;		/* it did not, since it was not wanted any
								 * more */
	int			status;			/* HTTP status, 0 when there was none */
	const char *body;			/* not NUL-terminated; NULL when empty */
	size_t		length;			/* bytes in body */
	const char *redirect_url;	/* of a 3xx, or NULL */
	int			retry_after;	/* seconds, 0 when not given */
	int64		elapsed;		/* microseconds */

	/* if they were asked for: in the host's words, NULL when not known */
	const char *address;		/* whom it was connected to */
	const char *issuer;			/* of the certificate */
	const char *expires;		/* the certificate */
} OmniAnswer;

/* One HTTP request on its way */
typedef struct OmniTransfer
{
	bool		done;			/* then answer is valid */
	OmniAnswer	answer;
} OmniTransfer;

typedef struct OmniHttpRequest
{
	const char *method;
	const char *url;
	const char *bearer;
	const char *body;			/* JSON, or NULL */
	bool		probe;			/* on a connection of its own, which is told
								 * of */
	const char *ca_file;		/* NULL: the system's */
	const char *proxy;			/* NULL: none */
	int			connect_timeout;	/* ms */
	int			timeout;		/* ms */

	/*
	 * Asked just before the request goes out.  Runs inside libcurl: it may
	 * look at memory, no more.
	 */
	bool		(*is_wanted) (void *arg);
	void	   *arg;
} OmniHttpRequest;

extern OmniTransfer *omni_http_start(const OmniHttpRequest *request);
extern void omni_http_wait(long timeout, uint32 wait_event);

#endif							/* OMNI_HTTP_H */
