/*-------------------------------------------------------------------------
 *
 * http.h
 *		HTTP requests.  See http.c.
 *
 *-------------------------------------------------------------------------
 */
#ifndef OMNI_HTTP_H
#define OMNI_HTTP_H

#include "c.h"

/* Maximum size of a body.  Omni's answers have some 100 bytes, pages of models some 100 kB. */
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

/* The result of an HTTP request; strings live as long as the transfer */
typedef struct OmniAnswer
{
	bool		failed;			/* no complete answer came: see the next
								 * fields */
	OmniPhase	phase;			/* the phase that failed */
	bool		timed_out;
	bool		retryable;		/* the same request might fare better later */
	bool		too_large;		/* the body exceeded OMNI_MAX_ANSWER */
	bool		long_headers;	/* the headers exceeded what libcurl takes */
	const char *reason;			/* libcurl's message */
	bool		at_proxy;		/* it failed at the proxy, not at the host */
	int			proxy_status;	/* HTTP status by which the proxy refused to
								 * connect, 0 when there was none */
	bool		tls_version;	/* no version of TLS that both sides accept */
	bool		no_tls;			/* the other side does not speak TLS */
	bool		expired;		/* the certificate is not valid at this time */
	bool		wants_certificate;	/* the other side wants one of us */
	const char *bad_ca_file;	/* the request's, if that is the reason, or
								 * NULL */

	bool		sent;			/* some of the request left this host, and the
								 * other side has not refused to process it */
	bool		withdrawn;		/* nothing was sent: is_wanted returned false */
	int			status;			/* HTTP status, 0 when there was none but of
								 * interim answers */
	bool		json;			/* the type of the body is JSON */
	const char *encoding;		/* of the body, if libcurl could not decode
								 * it, or NULL */
	const char *body;			/* not NUL-terminated; NULL when empty */
	size_t		length;			/* bytes in body */
	const char *redirect_url;	/* of a 3xx, or NULL */
	int			retry_after;	/* seconds, 0 when not given */
	int64		elapsed;		/* microseconds */

	/* of a probe; NULL when not known */
	const char *address;		/* IP address of the host or proxy */
	const char *issuer;			/* of the host's certificate */
	const char *expires;		/* end of the certificate's validity */
} OmniAnswer;

/* An HTTP request that was started */
typedef struct OmniTransfer
{
	bool		done;			/* if so, answer is valid */
	OmniAnswer	answer;
} OmniTransfer;

typedef struct OmniHttpRequest
{
	const char *method;
	const char *url;
	const char *bearer;
	const char *body;			/* JSON, or NULL */
	bool		probe;			/* use a new connection, and describe it in
								 * the answer */
	const char *ca_file;		/* NULL: the system's */
	const char *proxy;			/* NULL: none */
	int			connect_timeout;	/* ms */
	int			timeout;		/* ms */

	/*
	 * Called just before the request is sent; false withdraws it.  Runs
	 * inside libcurl: it may read memory only, and must not raise an error.
	 */
	bool		(*is_wanted) (void *arg);
	void	   *arg;
} OmniHttpRequest;

extern OmniTransfer *omni_http_start(const OmniHttpRequest *request);
extern void omni_http_wait(long timeout, uint32 wait_event);

#endif							/* OMNI_HTTP_H */
