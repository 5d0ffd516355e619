/*
 * Look-ups of names as a test wants them, to be preloaded into the server: the
 * host "hang.example" keeps whoever asks waiting, "nowhere.example" does not
 * exist, "later.example" may exist another time, "two.example" has two addresses.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <string.h>
#include <unistd.h>

int
getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
			struct addrinfo **result)
{
	int			(*next) (const char *, const char *, const struct addrinfo *,
						 struct addrinfo **) = dlsym(RTLD_NEXT, "getaddrinfo");

	if (node != NULL && strcmp(node, "hang.example") == 0)
	{
		/* not for ever: a server that waits for us should fail its test */
		for (int i = 0; i < 30; i++)
			sleep(1);
		return EAI_AGAIN;
	}
	if (node != NULL && strcmp(node, "nowhere.example") == 0)
		return EAI_NONAME;
	if (node != NULL && strcmp(node, "later.example") == 0)
		return EAI_AGAIN;
	if (node != NULL && strcmp(node, "two.example") == 0)
	{
		struct addrinfo numeric = *hints;
		int			failed;

		numeric.ai_flags |= AI_NUMERICHOST;
		failed = next("127.0.0.2", service, &numeric, result);
		return failed ? failed : next("127.0.0.3", service, &numeric, &(*result)->ai_next);
	}
	return next(node, service, hints, result);
}
