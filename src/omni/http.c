/*-------------------------------------------------------------------------
 *
 * http.c
 *		HTTP for the worker: run concurrent transfers by libcurl's multi interface, and
 *		wait for the worker's next event.
 *
 * libcurl names by callbacks the sockets to watch and the time of its next call;
 * omni_http_wait() watches those together with the latch.  Callbacks only store what they
 * are told, in malloc'd memory.  They must not raise an error, since the jump would cross
 * libcurl's frames.
 *
 * A transfer belongs to the memory context it is started in.  A callback of the context ends
 * the transfer and frees libcurl's part of it, also after an error.  Connections stay open.
 * Later transfers to the same host reuse them, also those of another role, since each request
 * has an Authorization header of its own.
 *
 * The server may close an idle connection at any time.  Before a request is sent on a used
 * connection, allow_request() checks the socket.  If the server has closed it, the transfer
 * starts over on a new connection, and nothing was sent.  libcurl's own check is not enough:
 * older versions (such as 7.88) miss a TLS connection whose closing alert is still unread,
 * and newer ones (such as 8.22) an HTTP/2 connection that the server has asked to close.
 *
 * libcurl sends a request a second time only if the server has said that it did not process it,
 * by refusing its HTTP/2 stream.
 *
 * This file does not depend on Omni's API or on the tables.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <netinet/in.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "lib/ilist.h"
#include "miscadmin.h"
#include "storage/latch.h"
#include "utils/memutils.h"
#include "utils/wait_event.h"

#include "base/clock.h"
#include "base/compat.h"
#include "base/file.h"
#include "omni/http.h"

/*
 * How many connections to keep open: for some dozens of calls at a time by HTTP/1.1.  Any
 * more are closed after their request, and the next one pays for a handshake.
 */
#define MAX_CONNECTIONS		64

/* How often to call libcurl while it connects, in ms: see is_connecting() */
#define CONNECT_INTERVAL	250

/* Maximum size of a header's value that is kept; longer ones are ignored */
#define MAX_HEADER			64

/* Argument of drive(): act on all transfers */
#define EVERYTHING			(-1)

/* A transfer.  The public part comes first, so that both have the same address. */
typedef struct Transfer
{
	OmniTransfer public;
	dlist_node	node;			/* in loop.transfers */
	CURL	   *easy;
	struct curl_slist *headers;
	int64		started_at;		/* by omni_clock() */
	bool		begun;			/* the request was sent, or is about to be */
	bool		stale;			/* it was not, or the server has refused it,
								 * since its connection was closed */
	bool		fresh;			/* it was started over on a new connection */
	uint64		connection;		/* number of its connection; 0: none */
	unsigned long stream;		/* its stream there, if that is HTTP/2 */
	bool		http_proxy;		/* it uses an HTTP proxy */
	bool		socks_proxy;	/* it uses a SOCKS proxy */
	char	   *ca_file;		/* NULL: the system's */
	bool		(*is_wanted) (void *arg);
	void	   *arg;			/* argument of is_wanted */
	char	   *body;			/* malloc'd */
	size_t		capacity;		/* of body, in bytes */
	bool		in_headers;		/* the headers of the answer have not ended */
	char		retry_after[MAX_HEADER];	/* headers, empty if there are
											 * none */
	char		date[MAX_HEADER];
	char		encoding[MAX_HEADER];
	bool		asked_for_certificate;	/* in the TLS handshake */
	char		error[CURL_ERROR_SIZE];
	char		ca_error[1024]; /* why ca_file cannot be used */
	MemoryContextCallback release;
} Transfer;

typedef struct Watch
{
	curl_socket_t socket;
	int			events;			/* WL_SOCKET_READABLE, WL_SOCKET_WRITEABLE */
} Watch;

/* A connection that libcurl has opened, or is opening */
typedef struct Connection
{
	uint64		number;			/* unique in this process */
	curl_socket_t socket;
	bool		used;			/* a request was sent on it, so that the next
								 * fields are set */
	char		host[INET6_ADDRSTRLEN];
	char		local_host[INET6_ADDRSTRLEN];
	int			port;
	int			local_port;
	int			transfers;		/* number of transfers that use it now */
	unsigned long requests;		/* number of requests sent on it */
	bool		closing;		/* the server takes no more requests on it */
} Connection;

/* The state of libcurl and of the event loop.  The arrays are malloc'd. */
typedef struct EventLoop
{
	CURLM	   *multi;			/* NULL until the first request */
	int64		timer;			/* when libcurl wants to be called, in ms by
								 * omni_clock(); -1: never */
	int64		looked_at;		/* when all transfers were last acted on, in
								 * ms by omni_clock() */
	int			running;		/* number of transfers that are not done */
	dlist_head	transfers;		/* all, also those that are done */

	/* the sockets to wait for */
	Watch	   *watches;
	int			nwatches;
	int			watches_capacity;
	bool		watches_changed;	/* since wait_set was made */
	WaitEventSet *wait_set;		/* the latch and the watches */

	/* the connections that are open */
	Connection *connections;
	int			nconnections;
	int			connections_capacity;
	uint64		last_connection;	/* the highest number given */
} EventLoop;

static EventLoop loop = {.timer = -1,.transfers = DLIST_STATIC_INIT(loop.transfers)};

static void start_libcurl(void);
static void add_header(Transfer *transfer, const char *header);
static void release_transfer(void *arg);
static int	note_socket(CURL *easy, curl_socket_t socket, int what, void *arg,
						void *socket_arg);
static int	note_open(void *arg, curl_socket_t socket, curlsocktype purpose);
static int	note_close(void *arg, curl_socket_t socket);
static Connection *find_connection(const char *host, const char *local_host, int port,
								   int local_port);
static bool is_bound_to(curl_socket_t socket, const char *host, int port);
static bool has_ended(curl_socket_t socket);
static void leave_connection(Transfer *transfer);
static int	allow_request(void *arg, char *host, char *local_host, int port, int local_port);
static int	note_timer(CURLM *unused, long timeout, void *arg);
static int	note_text(CURL *easy, curl_infotype type, char *data, size_t size, void *arg);
static size_t note_header(char *line, size_t size, size_t count, void *arg);
static void note_goaway(uint64 number, unsigned long last_stream);
static void keep_header(const char *line, size_t length, const char *name, bool cut, char *value);
static size_t keep_body(char *data, size_t size, size_t count, void *arg);
static bool is_connecting(void);
static void drive(curl_socket_t socket, int mask);
static void collect_done(void);
static bool start_over(Transfer *transfer);
static void fill_answer(Transfer *transfer, CURLcode code);
static int	seconds_to_wait(const char *value, const char *date);
static void tell_connection(CURL *easy, OmniAnswer *answer);
static bool failed_at_proxy(Transfer *transfer, CURLcode code, long connect_status);
static bool is_about_tls(CURLcode code);
static bool mentions(const char *text, const char *const *phrases);
static OmniPhase phase_reached(Transfer *transfer, CURLcode code);
static void make_wait_set(void);

#define CHECK_MULTI(call) \
	do { \
		CURLMcode	code_ = (call); \
		if (code_ != CURLM_OK) \
			elog(ERROR, "libcurl: %s", curl_multi_strerror(code_)); \
	} while (0)

#define CHECK_EASY(call) \
	do { \
		CURLcode	code_ = (call); \
		if (code_ != CURLE_OK) \
			elog(ERROR, "libcurl: %s", curl_easy_strerror(code_)); \
	} while (0)

#define SETOPT(option, value) \
	CHECK_EASY(curl_easy_setopt(transfer->easy, option, value))

/*
 * Start a request.  The strings in *request are copied.  The transfer is palloc'd; it may be
 * done when this returns, or after any later omni_http_wait().
 */
OmniTransfer *
omni_http_start(const OmniHttpRequest *request)
{
	Transfer   *transfer;
	char	   *authorization;

	start_libcurl();

	transfer = palloc0(sizeof(Transfer));
	transfer->started_at = omni_clock();
	transfer->release.func = release_transfer;
	transfer->release.arg = transfer;
	MemoryContextRegisterResetCallback(CurrentMemoryContext, &transfer->release);
	dlist_push_tail(&loop.transfers, &transfer->node);

	transfer->easy = curl_easy_init();
	if (transfer->easy == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("out of memory")));

	SETOPT(CURLOPT_PRIVATE, transfer);
	SETOPT(CURLOPT_ERRORBUFFER, transfer->error);
	SETOPT(CURLOPT_HEADERFUNCTION, note_header);
	SETOPT(CURLOPT_HEADERDATA, transfer);
	SETOPT(CURLOPT_WRITEFUNCTION, keep_body);
	SETOPT(CURLOPT_WRITEDATA, transfer);
	SETOPT(CURLOPT_DEBUGFUNCTION, note_text);
	SETOPT(CURLOPT_DEBUGDATA, transfer);
	SETOPT(CURLOPT_VERBOSE, 1L);

	/*
	 * Without this, libcurl would take any request on a used connection for
	 * one that it may send again, and not tell of a refused stream.  It has
	 * no other effect on HTTP.  A libcurl without RTSP does not know it.
	 */
	(void) curl_easy_setopt(transfer->easy, CURLOPT_RTSP_REQUEST, (long) CURL_RTSPREQ_RECEIVE);

	/* The request */
	SETOPT(CURLOPT_URL, request->url);
	SETOPT(CURLOPT_CUSTOMREQUEST, request->method);
	if (strcmp(request->method, "POST") == 0)
	{
		SETOPT(CURLOPT_POSTFIELDSIZE, -1L);
		SETOPT(CURLOPT_COPYPOSTFIELDS, request->body != NULL ? request->body : "");
	}
	authorization = psprintf("Authorization: Bearer %s", request->bearer);
	add_header(transfer, authorization);
	explicit_bzero(authorization, strlen(authorization));
	add_header(transfer, "Accept: application/json");

	/* Decode an answer that is encoded, but do not ask for that */
	SETOPT(CURLOPT_ACCEPT_ENCODING, "");
	add_header(transfer, "Accept-Encoding:");
	add_header(transfer,
			   request->body != NULL ? "Content-Type: application/json" : "Content-Type:");
	SETOPT(CURLOPT_HTTPHEADER, transfer->headers);
	SETOPT(CURLOPT_USERAGENT, "omni_refresh/" OMNI_REFRESH_VERSION
		   " (PostgreSQL " PG_VERSION "; libcurl " LIBCURL_VERSION ")");

	/* Timeouts */
	SETOPT(CURLOPT_CONNECTTIMEOUT_MS, (long) request->connect_timeout);
	SETOPT(CURLOPT_TIMEOUT_MS, (long) request->timeout);
	SETOPT(CURLOPT_TCP_KEEPALIVE, 1L);

	/*
	 * Send the key to this host only: no redirects, no proxy from the
	 * environment
	 */
	CHECK_EASY(curl_allow_protocols_compat(transfer->easy));
	SETOPT(CURLOPT_FOLLOWLOCATION, 0L);
	SETOPT(CURLOPT_PROXY, request->proxy != NULL ? request->proxy : "");
	transfer->socks_proxy = request->proxy != NULL &&
		pg_strncasecmp(request->proxy, "socks", 5) == 0;
	transfer->http_proxy = request->proxy != NULL && !transfer->socks_proxy;
	SETOPT(CURLOPT_NOPROXY, "");
	SETOPT(CURLOPT_HEADEROPT, (long) CURLHEADER_SEPARATE);
	SETOPT(CURLOPT_SUPPRESS_CONNECT_HEADERS, 1L);

	/*
	 * Always verify certificates.  Use no directory of certificates, which is
	 * Debian's default besides the file: with one, libcurl would not cache
	 * the certificates it has read.
	 */
	SETOPT(CURLOPT_SSLVERSION, (long) CURL_SSLVERSION_TLSv1_2);
	SETOPT(CURLOPT_SSL_VERIFYPEER, 1L);
	SETOPT(CURLOPT_SSL_VERIFYHOST, 2L);
	SETOPT(CURLOPT_CAPATH, NULL);
	if (request->ca_file != NULL)
	{
		transfer->ca_file = pstrdup(request->ca_file);
		SETOPT(CURLOPT_CAINFO, request->ca_file);
	}

	if (request->probe)
	{
		SETOPT(CURLOPT_FRESH_CONNECT, 1L);
		SETOPT(CURLOPT_CERTINFO, 1L);
	}

	/* A hanging name look-up must delay neither signals nor the worker's exit */
	SETOPT(CURLOPT_NOSIGNAL, 1L);
	CHECK_EASY(curl_quick_exit_compat(transfer->easy));

	SETOPT(CURLOPT_SOCKOPTFUNCTION, note_open);
	SETOPT(CURLOPT_CLOSESOCKETFUNCTION, note_close);
	transfer->is_wanted = request->is_wanted;
	transfer->arg = request->arg;
	CHECK_EASY(curl_before_request_compat(transfer->easy, allow_request, transfer));

	CHECK_MULTI(curl_multi_add_handle(loop.multi, transfer->easy));
	loop.timer = -1;
	drive(CURL_SOCKET_TIMEOUT, 0);
	collect_done();
	return &transfer->public;
}

/*
 * Wait until the latch is set (and reset it), until timeout milliseconds have passed (-1 means
 * no limit), or until libcurl has made progress on a transfer.  The caller then looks for
 * transfers that are done, and checks for interrupts.
 */
void
omni_http_wait(long timeout, uint32 wait_event)
{
	WaitEvent	events[16];
	int			nevents;

	if (loop.timer >= 0)
	{
		long		until_timer = Max(loop.timer - omni_clock() / 1000, 0);

		if (timeout < 0 || until_timer < timeout)
			timeout = until_timer;
	}
	if (is_connecting() && (timeout < 0 || timeout > CONNECT_INTERVAL))
		timeout = CONNECT_INTERVAL;

	if (loop.wait_set == NULL || loop.watches_changed)
		make_wait_set();
	nevents = WaitEventSetWait(loop.wait_set, timeout, events, lengthof(events), wait_event);

	for (int i = 0; i < nevents; i++)
	{
		int			mask = 0;

		if (events[i].events & WL_LATCH_SET)
		{
			ResetLatch(MyLatch);
			continue;
		}
		if (events[i].events & WL_SOCKET_READABLE)
			mask |= CURL_CSELECT_IN;
		if (events[i].events & WL_SOCKET_WRITEABLE)
			mask |= CURL_CSELECT_OUT;
		drive(events[i].fd, mask);
	}

	if (loop.timer >= 0 && loop.timer <= omni_clock() / 1000)
	{
		loop.timer = -1;
		drive(CURL_SOCKET_TIMEOUT, 0);
	}
	if (is_connecting() && omni_clock() / 1000 - loop.looked_at >= CONNECT_INTERVAL)
		drive(CURL_SOCKET_TIMEOUT, EVERYTHING);
	if (loop.multi != NULL)
		collect_done();
}

/*
 * Set up libcurl at first use, in the worker, since its state and threads do not survive
 * a fork.  The exit of the process cleans up.
 */
static void
start_libcurl(void)
{
	if (loop.multi != NULL)
		return;

	CHECK_EASY(curl_global_init(CURL_GLOBAL_DEFAULT));
	loop.multi = curl_multi_init();
	if (loop.multi == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("out of memory")));
	CHECK_MULTI(curl_multi_setopt(loop.multi, CURLMOPT_SOCKETFUNCTION, note_socket));
	CHECK_MULTI(curl_multi_setopt(loop.multi, CURLMOPT_TIMERFUNCTION, note_timer));
	CHECK_MULTI(curl_multi_setopt(loop.multi, CURLMOPT_MAXCONNECTS, (long) MAX_CONNECTIONS));
}

static void
add_header(Transfer *transfer, const char *header)
{
	struct curl_slist *longer = curl_slist_append(transfer->headers, header);

	if (longer == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("out of memory")));
	transfer->headers = longer;
}

/* Reset callback of a transfer's memory context: free libcurl's part.  Must not raise an error. */
static void
release_transfer(void *arg)
{
	Transfer   *transfer = arg;

	dlist_delete(&transfer->node);
	leave_connection(transfer);
	if (transfer->easy != NULL)
	{
		curl_multi_remove_handle(loop.multi, transfer->easy);
		curl_easy_cleanup(transfer->easy);
	}
	for (struct curl_slist *header = transfer->headers; header != NULL; header = header->next)
		explicit_bzero(header->data, strlen(header->data));
	curl_slist_free_all(transfer->headers);
	free(transfer->body);
}

/* libcurl callback: start or stop watching a socket. */
static int
note_socket(CURL *easy, curl_socket_t socket, int what, void *arg, void *socket_arg)
{
	int			i = 0;

	while (i < loop.nwatches && loop.watches[i].socket != socket)
		i++;

	loop.watches_changed = true;
	if (what == CURL_POLL_REMOVE)
	{
		if (i < loop.nwatches)
			loop.watches[i] = loop.watches[--loop.nwatches];
		return 0;
	}

	if (i == loop.watches_capacity)
	{
		int			capacity = 2 * loop.watches_capacity + 8;
		Watch	   *larger = realloc(loop.watches, capacity * sizeof(Watch));

		if (larger == NULL)
			return -1;
		loop.watches = larger;
		loop.watches_capacity = capacity;
	}
	if (i == loop.nwatches)
		loop.nwatches++;
	loop.watches[i].socket = socket;
	loop.watches[i].events = ((what & CURL_POLL_IN) ? WL_SOCKET_READABLE : 0) |
		((what & CURL_POLL_OUT) ? WL_SOCKET_WRITEABLE : 0);
	return 0;
}

/* libcurl callback: remember the socket of a new connection. */
static int
note_open(void *arg, curl_socket_t socket, curlsocktype purpose)
{
	Connection *connection;

	if (loop.nconnections == loop.connections_capacity)
	{
		int			capacity = 2 * loop.connections_capacity + 8;
		Connection *larger = realloc(loop.connections, capacity * sizeof(Connection));

		if (larger == NULL)
			return CURL_SOCKOPT_ERROR;
		loop.connections = larger;
		loop.connections_capacity = capacity;
	}
	connection = &loop.connections[loop.nconnections++];
	memset(connection, 0, sizeof(Connection));
	connection->number = ++loop.last_connection;
	connection->socket = socket;
	return CURL_SOCKOPT_OK;
}

/* libcurl callback: close the socket of a connection, and forget the connection. */
static int
note_close(void *arg, curl_socket_t socket)
{
	for (int i = 0; i < loop.nconnections; i++)
	{
		if (loop.connections[i].socket == socket)
		{
			loop.connections[i] = loop.connections[--loop.nconnections];
			break;
		}
	}
	return close(socket);
}

/*
 * Find a connection by the addresses of its two ends, as libcurl gives them; NULL if there
 * is none.  Remember the addresses at the first use, since the kernel forgets them when the
 * connection is reset.
 */
static Connection *
find_connection(const char *host, const char *local_host, int port, int local_port)
{
	if (host == NULL || local_host == NULL)
		return NULL;
	for (int i = 0; i < loop.nconnections; i++)
	{
		Connection *connection = &loop.connections[i];

		if (connection->used && connection->port == port && connection->local_port == local_port &&
			strcmp(connection->host, host) == 0 && strcmp(connection->local_host, local_host) == 0)
			return connection;
	}
	for (int i = 0; i < loop.nconnections; i++)
	{
		Connection *connection = &loop.connections[i];

		if (!connection->used && is_bound_to(connection->socket, local_host, local_port))
		{
			strlcpy(connection->host, host, sizeof(connection->host));
			strlcpy(connection->local_host, local_host, sizeof(connection->local_host));
			connection->port = port;
			connection->local_port = local_port;
			return connection;
		}
	}
	return NULL;
}

/* Return whether a socket's local address is the given one. */
static bool
is_bound_to(curl_socket_t socket, const char *host, int port)
{
	union
	{
		struct sockaddr any;
		struct sockaddr_in v4;
		struct sockaddr_in6 v6;
	}			address;
	socklen_t	length = sizeof(address);
	char		text[INET6_ADDRSTRLEN];

	if (getsockname(socket, &address.any, &length) != 0)
		return false;
	if (address.any.sa_family == AF_INET)
		return ntohs(address.v4.sin_port) == port &&
			inet_ntop(AF_INET, &address.v4.sin_addr, text, sizeof(text)) != NULL &&
			strcmp(text, host) == 0;
	if (address.any.sa_family == AF_INET6)
		return ntohs(address.v6.sin6_port) == port &&
			inet_ntop(AF_INET6, &address.v6.sin6_addr, text, sizeof(text)) != NULL &&
			strcmp(text, host) == 0;
	return false;
}

/*
 * Return whether an idle connection must not be used: the server has closed or reset it, or
 * has sent data, such as the alert that closes TLS, or an early answer like HTTP status 408.
 * HTTP/2 allows some frames at any time.  libcurl has just read those; one that arrived since
 * only costs a new connection.  libcurl's sockets are non-blocking.
 */
static bool
has_ended(curl_socket_t socket)
{
	char		byte;

	return recv(socket, &byte, 1, MSG_PEEK) >= 0 ||
		(errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR);
}

/* Remember that a transfer no longer uses its connection. */
static void
leave_connection(Transfer *transfer)
{
	for (int i = 0; i < loop.nconnections; i++)
	{
		if (loop.connections[i].number == transfer->connection)
			loop.connections[i].transfers--;
	}
	transfer->connection = 0;
}

/*
 * libcurl callback: allow a request to be sent if it is still wanted and its connection is still
 * open.  Allow it once, unless note_text() has learned that it was refused unprocessed.  Without
 * this, libcurl would silently send a request again when the server closes a used connection
 * without an answer.
 */
static int
allow_request(void *arg, char *host, char *local_host, int port, int local_port)
{
	Transfer   *transfer = arg;
	Connection *connection = find_connection(host, local_host, port, local_port);

	if (transfer->begun || !transfer->is_wanted(transfer->arg))
		return 1;				/* CURL_PREREQFUNC_ABORT */
	if (connection != NULL)
	{
		/* with HTTP/2, unread data may belong to another transfer */
		if (connection->closing || (connection->used && connection->transfers == 0 &&
									has_ended(connection->socket)))
		{
			/* otherwise libcurl would keep an HTTP/2 connection open */
			curl_easy_setopt(transfer->easy, CURLOPT_FORBID_REUSE, 1L);
			transfer->stale = true;
			return 1;
		}
		connection->used = true;
		connection->transfers++;
		transfer->connection = connection->number;
		transfer->stream = 2 * connection->requests++ + 1;
	}
	transfer->begun = true;
	transfer->stale = false;
	return 0;
}

/* libcurl callback: set the time of its next call, in ms from now; -1 means never. */
static int
note_timer(CURLM *unused, long timeout, void *arg)
{
	loop.timer = timeout < 0 ? -1 : omni_clock() / 1000 + timeout;
	return 0;
}

/*
 * libcurl callback: note from libcurl's log what it does not tell in another way, and do without
 * it if a version of libcurl words it differently:
 *
 * - the server has refused a stream of HTTP/2, by REFUSED_STREAM or GOAWAY, so that it has not
 * processed the request, which libcurl is about to send again; otherwise its answer is lost
 * - by GOAWAY, the server takes no more streams on the connection
 * - the server asks for a certificate
 */
static int
note_text(CURL *easy, curl_infotype type, char *data, size_t size, void *arg)
{
	static const char *const certificate[] = {"handshake, Request CERT", NULL};
	static const char refused[] = "REFUSED_STREAM";
	static const char last_stream[] = "last_stream=";
	Transfer   *transfer = arg;
	char		text[128];
	size_t		length = Min(size, sizeof(text) - 1);
	const char *last;

	if (type != CURLINFO_TEXT)
		return 0;
	memcpy(text, data, length);
	text[length] = '\0';
	if (strncmp(text, refused, strlen(refused)) == 0)
	{
		leave_connection(transfer);
		transfer->begun = false;
	}
	else if (strstr(text, "GOAWAY") != NULL && (last = strstr(text, last_stream)) != NULL)
		note_goaway(transfer->connection, strtoul(last + strlen(last_stream), NULL, 10));
	else if (mentions(text, certificate))
		transfer->asked_for_certificate = true;
	return 0;
}

/*
 * Note that a server has announced the last stream of a connection that it processes.  libcurl
 * sends the requests of later streams again, or ends them without an answer.
 */
static void
note_goaway(uint64 number, unsigned long last_stream)
{
	dlist_iter	iter;

	if (number == 0)
		return;
	for (int i = 0; i < loop.nconnections; i++)
		loop.connections[i].closing |= loop.connections[i].number == number;
	dlist_foreach(iter, &loop.transfers)
	{
		Transfer   *transfer = dlist_container(Transfer, node, iter.cur);

		if (transfer->connection == number && transfer->stream > last_stream)
		{
			leave_connection(transfer);
			transfer->begun = false;
			transfer->stale = !transfer->fresh;
		}
	}
}

/*
 * libcurl callback: keep some headers of the last answer, which may follow interim ones.  Note
 * where the headers begin and end, which libcurl does not check: it takes an answer cut off
 * within its headers for one without a body.
 */
static size_t
note_header(char *line, size_t size, size_t count, void *arg)
{
	Transfer   *transfer = arg;
	size_t		n = size * count;

	if (n >= 5 && memcmp(line, "HTTP/", 5) == 0)
	{
		transfer->in_headers = true;
		transfer->retry_after[0] = transfer->date[0] = transfer->encoding[0] = '\0';
	}
	else if (n > 0 && (line[0] == '\r' || line[0] == '\n'))
		transfer->in_headers = false;
	keep_header(line, n, "Retry-After:", false, transfer->retry_after);
	keep_header(line, n, "Date:", false, transfer->date);
	keep_header(line, n, "Content-Encoding:", true, transfer->encoding);
	return n;
}

/*
 * Copy the value of a header, without white space around it, if the line is that header.  A value
 * that is too long is cut, or not copied.
 */
static void
keep_header(const char *line, size_t length, const char *name, bool cut, char *value)
{
	const char *end = line + length;

	if (length < strlen(name) || pg_strncasecmp(line, name, strlen(name)) != 0)
		return;
	line += strlen(name);
	while (line < end && isspace((unsigned char) *line))
		line++;
	while (line < end && isspace((unsigned char) end[-1]))
		end--;
	if (cut && end - line >= MAX_HEADER)
		end = line + MAX_HEADER - 1;
	if (end - line < MAX_HEADER)
	{
		memcpy(value, line, end - line);
		value[end - line] = '\0';
	}
}

/* libcurl callback: append a piece of the body.  Return less than its size to give up. */
static size_t
keep_body(char *data, size_t size, size_t count, void *arg)
{
	Transfer   *transfer = arg;
	OmniAnswer *answer = &transfer->public.answer;
	size_t		n = size * count;

	if (n > OMNI_MAX_ANSWER - answer->length)
	{
		answer->too_large = true;
		return 0;
	}
	if (answer->length + n > transfer->capacity)
	{
		size_t		capacity = Max(2 * transfer->capacity, answer->length + n);
		char	   *larger = realloc(transfer->body, capacity);

		if (larger == NULL)
			return 0;
		transfer->body = larger;
		transfer->capacity = capacity;
	}
	memcpy(transfer->body + answer->length, data, n);
	answer->length += n;
	return n;
}

/*
 * Return whether libcurl is connecting: it has a socket on which no request was sent.  Then call
 * it from time to time.  When it gives up one address of a host and tries the next one, some
 * versions (such as 7.88) do not name the new socket by note_socket().
 */
static bool
is_connecting(void)
{
	if (loop.running == 0)
		return false;
	for (int i = 0; i < loop.nconnections; i++)
	{
		if (!loop.connections[i].used)
			return true;
	}
	return false;
}

/*
 * Let libcurl act on one socket, on its timers, or on everything.  Block all signals meanwhile, so that a
 * thread it starts for a name look-up inherits the mask and never runs our handlers.
 */
static void
drive(curl_socket_t socket, int mask)
{
	sigset_t	all;
	sigset_t	old;

	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, &old);
	if (mask == EVERYTHING)
	{
		(void) curl_multi_socket_all(loop.multi, &loop.running);
		loop.looked_at = omni_clock() / 1000;
	}
	else
		(void) curl_multi_socket_action(loop.multi, socket, mask, &loop.running);
	sigprocmask(SIG_SETMASK, &old, NULL);
}

static void
collect_done(void)
{
	CURLMsg    *message;
	int			left;

	while ((message = curl_multi_info_read(loop.multi, &left)) != NULL)
	{
		Transfer   *transfer;
		CURLcode	code = message->data.result;

		curl_easy_getinfo(message->easy_handle, CURLINFO_PRIVATE, (char **) &transfer);
		leave_connection(transfer);
		if (transfer->stale && code != CURLE_OPERATION_TIMEDOUT && start_over(transfer))
			continue;
		fill_answer(transfer, code);
		curl_multi_remove_handle(loop.multi, transfer->easy);
		transfer->public.done = true;
	}
}

/* Restart a transfer on a new connection; return false if libcurl refuses. */
static bool
start_over(Transfer *transfer)
{
	curl_multi_remove_handle(loop.multi, transfer->easy);
	transfer->stale = false;
	transfer->fresh = true;
	transfer->error[0] = '\0';
	return curl_easy_setopt(transfer->easy, CURLOPT_FORBID_REUSE, 0L) == CURLE_OK &&
		curl_easy_setopt(transfer->easy, CURLOPT_FRESH_CONNECT, 1L) == CURLE_OK &&
		curl_multi_add_handle(loop.multi, transfer->easy) == CURLM_OK;
}

/* Fill in the answer of a transfer that has ended. */
static void
fill_answer(Transfer *transfer, CURLcode code)
{
	/* messages of OpenSSL and GnuTLS */
	static const char *const version[] = {
		"protocol version", "unsupported protocol", "unsupported version", NULL
	};
	static const char *const no_tls[] = {
		"wrong version number", "packet length too long", "unexpected TLS packet", NULL
	};
	static const char *const expired[] = {
		"expired", "not yet valid", "not yet activated", NULL
	};
	static const char *const no_certificate[] = {
		"certificate required", "ertificate is required", NULL
	};
	static const char *const alert[] = {"alert", NULL};
	static const char *const long_headers[] = {"response headers", NULL};
	OmniAnswer *answer = &transfer->public.answer;
	CURL	   *easy = transfer->easy;
	long		status = 0;
	long		connect_status = 0;
	long		request_size = 0;
	char	   *type = NULL;

	curl_easy_getinfo(easy, CURLINFO_RESPONSE_CODE, &status);
	answer->status = status / 100 == 1 ? 0 : (int) status;
	curl_easy_getinfo(easy, CURLINFO_REQUEST_SIZE, &request_size);
	curl_easy_getinfo(easy, CURLINFO_HTTP_CONNECTCODE, &connect_status);
	answer->wants_certificate = code != CURLE_OK && answer->status == 0 &&
		(mentions(transfer->error, no_certificate) ||
		 (transfer->asked_for_certificate && mentions(transfer->error, alert)));
	answer->sent = transfer->begun && !answer->wants_certificate && (connect_status == 0 || connect_status / 100 == 2) &&
		(request_size > 0 || code == CURLE_ABORTED_BY_CALLBACK);
	answer->withdrawn = !transfer->begun && code == CURLE_ABORTED_BY_CALLBACK;
	answer->elapsed = omni_clock() - transfer->started_at;
	if (answer->status != 0)
		answer->retry_after = seconds_to_wait(transfer->retry_after, transfer->date);
	curl_easy_getinfo(easy, CURLINFO_CONTENT_TYPE, &type);
	answer->json = type != NULL && strcasestr(type, "json") != NULL;
	curl_easy_getinfo(easy, CURLINFO_REDIRECT_URL, &answer->redirect_url);
	answer->body = transfer->body;
	tell_connection(easy, answer);

	if (code == CURLE_BAD_CONTENT_ENCODING && transfer->encoding[0] != '\0')
	{
		/* the answer has come, although its body cannot be read */
		code = CURLE_OK;
		answer->encoding = transfer->encoding;
		answer->length = 0;
	}
	if (code == CURLE_OK && (transfer->in_headers || answer->status == 0))
	{
		code = CURLE_PARTIAL_FILE;
		strlcpy(transfer->error, transfer->in_headers ?
				"The connection was closed within the headers of the answer" :
				status != 0 ? "The connection was closed after an interim answer" :
				"The connection was closed without an answer",
				sizeof(transfer->error));
	}
	if (code != CURLE_OK)
	{
		answer->failed = true;
		answer->at_proxy = failed_at_proxy(transfer, code, connect_status);
		answer->proxy_status = answer->at_proxy ? (int) connect_status : 0;
		answer->phase = phase_reached(transfer, code);
		answer->timed_out = code == CURLE_OPERATION_TIMEDOUT;
		answer->tls_version = code == CURLE_SSL_CONNECT_ERROR && mentions(transfer->error, version);
		answer->no_tls = code == CURLE_SSL_CONNECT_ERROR && mentions(transfer->error, no_tls);
		answer->expired = code == CURLE_PEER_FAILED_VERIFICATION &&
			mentions(transfer->error, expired);
		answer->long_headers = transfer->in_headers &&
			(code == CURLE_OUT_OF_MEMORY || code == CURLE_TOO_LARGE || mentions(transfer->error, long_headers));
		answer->retryable = !answer->too_large && !answer->long_headers &&
			!answer->wants_certificate &&
			code != CURLE_PEER_FAILED_VERIFICATION &&
			code != CURLE_SSL_CACERT_BADFILE &&
			!answer->tls_version &&
			(answer->proxy_status < 400 || answer->proxy_status >= 500);
		answer->reason = code == CURLE_ABORTED_BY_CALLBACK ?
			"The connection was closed without an answer" :
			transfer->error[0] != '\0' ? transfer->error : curl_easy_strerror(code);
		if (code == CURLE_SSL_CACERT_BADFILE && transfer->ca_file != NULL && !answer->at_proxy)
		{
			answer->bad_ca_file = transfer->ca_file;
			if (!omni_file_has_certificate(transfer->ca_file, transfer->ca_error,
										   sizeof(transfer->ca_error)))
				answer->reason = transfer->ca_error;
		}
	}
}

/*
 * Return how long to wait, in seconds, by a Retry-After header: a number, or a date, which is
 * compared with the Date header of the same answer, since the server's clock may differ from this
 * one.  A date in the past, and what is no such value, counts as none.
 */
static int
seconds_to_wait(const char *value, const char *date)
{
	int64		seconds = 0;

	if (value[0] != '\0' && value[strspn(value, "0123456789")] == '\0')
	{
		errno = 0;
		seconds = strtoll(value, NULL, 10);
		if (errno == ERANGE)
			seconds = 0;
	}
	else
	{
		time_t		until = curl_getdate(value, NULL);
		time_t		now = curl_getdate(date, NULL);

		if (now == -1)
			now = time(NULL);
		if (until != -1)
			seconds = (int64) until - now;
	}
	return (int) Min(Max(seconds, 0), PG_INT32_MAX);
}

/* Fill in the address and the certificate of the host that a transfer was connected to. */
static void
tell_connection(CURL *easy, OmniAnswer *answer)
{
	struct curl_certinfo *chain = NULL;
	char	   *address = NULL;

	curl_easy_getinfo(easy, CURLINFO_PRIMARY_IP, &address);
	if (address != NULL && address[0] != '\0')
		answer->address = address;
	curl_easy_getinfo(easy, CURLINFO_CERTINFO, &chain);
	if (chain == NULL || chain->num_of_certs == 0)
		return;
	for (struct curl_slist *line = chain->certinfo[0]; line != NULL; line = line->next)
	{
		if (strncmp(line->data, "Issuer:", strlen("Issuer:")) == 0)
			answer->issuer = line->data + strlen("Issuer:");
		else if (strncmp(line->data, "Expire date:", strlen("Expire date:")) == 0)
			answer->expires = line->data + strlen("Expire date:");
	}
}

/*
 * Return whether a transfer failed at the proxy.  An HTTP proxy answers CONNECT before the
 * host is involved.  There is no CONNECT for plain http or on a reused connection: then any
 * failure before the request is sent counts as the proxy's.
 */
static bool
failed_at_proxy(Transfer *transfer, CURLcode code, long connect_status)
{
	if (transfer->public.answer.sent)
		return false;
	if (code == CURLE_COULDNT_RESOLVE_PROXY || code == CURLE_COULDNT_CONNECT || code == CURLE_PROXY)
		return transfer->http_proxy || transfer->socks_proxy;
	if (connect_status != 0)
		return connect_status / 100 != 2;
	return transfer->http_proxy && !transfer->begun;
}

static bool
is_about_tls(CURLcode code)
{
	return code == CURLE_SSL_CONNECT_ERROR || code == CURLE_PEER_FAILED_VERIFICATION ||
		code == CURLE_SSL_CACERT_BADFILE;
}

/* Return whether a text contains any of the phrases, whose list ends with NULL. */
static bool
mentions(const char *text, const char *const *phrases)
{
	while (*phrases != NULL && strstr(text, *phrases) == NULL)
		phrases++;
	return *phrases != NULL;
}

/*
 * Return the phase in which a transfer failed.  Rely only on libcurl's count of connections
 * and its time of the name look-up (0 if that has not ended): what it reports about later
 * phases depends on its version.
 */
static OmniPhase
phase_reached(Transfer *transfer, CURLcode code)
{
	long		connections = 0;
	curl_off_t	name = 0;

	curl_easy_getinfo(transfer->easy, CURLINFO_NUM_CONNECTS, &connections);
	curl_easy_getinfo(transfer->easy, CURLINFO_NAMELOOKUP_TIME_T, &name);

	if (transfer->public.answer.status != 0)
		return OMNI_PHASE_READ;
	if (transfer->public.answer.sent)
		return OMNI_PHASE_WAIT;
	if (code == CURLE_COULDNT_RESOLVE_HOST || code == CURLE_COULDNT_RESOLVE_PROXY)
		return OMNI_PHASE_NAME;
	if (transfer->public.answer.at_proxy && connections > 0 && !is_about_tls(code))
		return OMNI_PHASE_CONNECT;
	if (connections > 0 || code == CURLE_SSL_CACERT_BADFILE)
		return OMNI_PHASE_TLS;
	if (name != 0)
		return OMNI_PHASE_CONNECT;
	return OMNI_PHASE_NAME;
}

/* Create wait_set anew, since events cannot be removed from a set. */
static void
make_wait_set(void)
{
	if (loop.wait_set != NULL)
		FreeWaitEventSet(loop.wait_set);
	loop.wait_set = NULL;		/* in case the next line raises an error */
	loop.wait_set = CreateWaitEventSet(NULL, loop.nwatches + 2);

	AddWaitEventToSet(loop.wait_set, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
	AddWaitEventToSet(loop.wait_set, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
	for (int i = 0; i < loop.nwatches; i++)
	{
		Watch	   *watch = &loop.watches[i];

		if (watch->events != 0)
			AddWaitEventToSet(loop.wait_set, watch->events, watch->socket, NULL, NULL);
	}
	loop.watches_changed = false;
}
