/*
 * A yardstick of the benchmark: the bare request, without a database.  Each of CLIENTS threads
 * makes COUNT requests over a connection of its own.  Prints the mean time between two requests,
 * of all threads together, in microseconds.
 *
 *	request URL CA-FILE KEY COUNT CLIENTS
 */
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "request.h"

static char **arguments;
static int	count;
static pthread_barrier_t connected;

static size_t
ignore(char *data, size_t size, size_t nmemb, void *arg)
{
	return size * nmemb;
}

static void
request(CURL *easy)
{
	long		status = perform_request(easy);

	if (status != 200)
	{
		fprintf(stderr, "HTTP status %ld\n", status);
		exit(1);
	}
}

static void *
run_client(void *unused)
{
	CURL	   *easy = prepare_request(arguments[1], arguments[2], arguments[3], ignore, NULL);

	if (easy == NULL)
		abort();
	request(easy);				/* opens the connection */
	pthread_barrier_wait(&connected);
	for (int i = 0; i < count; i++)
		request(easy);
	return NULL;
}

int
main(int argc, char **argv)
{
	struct timespec from;
	struct timespec to;
	pthread_t  *threads;
	int			clients;

	if (argc != 6)
		return 2;
	arguments = argv;
	count = atoi(argv[4]);
	clients = atoi(argv[5]);

	curl_global_init(CURL_GLOBAL_DEFAULT);
	pthread_barrier_init(&connected, NULL, clients + 1);
	threads = calloc(clients, sizeof(pthread_t));
	for (int i = 0; i < clients; i++)
	{
		if (pthread_create(&threads[i], NULL, run_client, NULL) != 0)
			abort();
	}
	pthread_barrier_wait(&connected);
	clock_gettime(CLOCK_MONOTONIC, &from);
	for (int i = 0; i < clients; i++)
		pthread_join(threads[i], NULL);
	clock_gettime(CLOCK_MONOTONIC, &to);

	printf("%.1f\n",
		   ((to.tv_sec - from.tv_sec) * 1e6 + (to.tv_nsec - from.tv_nsec) / 1e3) / count / clients);
	return 0;
}
