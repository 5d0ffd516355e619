/*
 * The yardstick of the benchmark: so many POST requests over one kept-alive
 * connection, as any program with libcurl would make them.  Prints the mean
 * time of one, in microseconds.
 *
 *	request URL CA-FILE COUNT <KEY-FILE
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <curl/curl.h>

static size_t
ignore(char *data, size_t size, size_t count, void *arg)
{
	return size * count;
}

int
main(int argc, char **argv)
{
	CURL	   *easy = curl_easy_init();
	char		key[256];
	char		header[512];
	int			count;
	struct timespec from;
	struct timespec to;

	if (argc != 4 || fgets(key, sizeof(key), stdin) == NULL)
		return 2;
	key[strcspn(key, "\n")] = '\0';
	count = atoi(argv[3]);

	snprintf(header, sizeof(header), "Authorization: Bearer %s", key);
	curl_easy_setopt(easy, CURLOPT_HTTPHEADER, curl_slist_append(NULL, header));
	curl_easy_setopt(easy, CURLOPT_URL, argv[1]);
	curl_easy_setopt(easy, CURLOPT_CAINFO, argv[2]);
	curl_easy_setopt(easy, CURLOPT_PROXY, "");
	curl_easy_setopt(easy, CURLOPT_POSTFIELDS, "");
	curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, ignore);

	for (int i = 0; i <= count; i++)
	{
		long		status = 0;

		if (i == 1)				/* the first one opens the connection */
			clock_gettime(CLOCK_MONOTONIC, &from);
		curl_easy_perform(easy);
		curl_easy_getinfo(easy, CURLINFO_RESPONSE_CODE, &status);
		if (status != 200)
		{
			fprintf(stderr, "HTTP status %ld\n", status);
			return 1;
		}
	}
	clock_gettime(CLOCK_MONOTONIC, &to);
	printf("%.0f\n", ((to.tv_sec - from.tv_sec) * 1e9 + to.tv_nsec - from.tv_nsec) / 1e3 / count);
	return 0;
}
