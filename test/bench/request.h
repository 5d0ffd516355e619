/*
 * A POST request over a kept-alive connection, as any program with libcurl would make it.
 */
#ifndef REQUEST_H
#define REQUEST_H

#include <stdio.h>

#include <curl/curl.h>

/*
 * Prepare a handle for requests that all are the same.  The caller owns it, and NULL means
 * out of memory.  "write" gets the answers, with "arg" as its last argument.
 */
static inline CURL *
prepare_request(const char *url, const char *ca_file, const char *key,
				curl_write_callback write, void *arg)
{
	CURL	   *easy = curl_easy_init();
	char		header[512];

	if (easy == NULL)
		return NULL;
	snprintf(header, sizeof(header), "Authorization: Bearer %s", key);
	curl_easy_setopt(easy, CURLOPT_HTTPHEADER, curl_slist_append(NULL, header));
	curl_easy_setopt(easy, CURLOPT_URL, url);
	curl_easy_setopt(easy, CURLOPT_CAINFO, ca_file);
	curl_easy_setopt(easy, CURLOPT_PROXY, "");
	curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
	curl_easy_setopt(easy, CURLOPT_POSTFIELDS, "");
	curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, write);
	curl_easy_setopt(easy, CURLOPT_WRITEDATA, arg);
	return easy;
}

/* Make the request.  Return the HTTP status, or 0 if there was no answer. */
static inline long
perform_request(CURL *easy)
{
	long		status = 0;

	if (curl_easy_perform(easy) == CURLE_OK)
		curl_easy_getinfo(easy, CURLINFO_RESPONSE_CODE, &status);
	return status;
}

#endif
