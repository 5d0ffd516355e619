/*
 * Prints the times of retries and polls, for test/t/008_times.pl: a line for each line of
 * numbers read, "retry ATTEMPTS LOT RETRY_AFTER", "few FAILURES LOT RETRY_AFTER" or "poll PASSED".
 */
#include "c.h"

#include "worker/retry.h"

#undef printf					/* the server's own is not linked */

int
main(void)
{
	char		what[16];
	long		a;
	unsigned long lot;
	int			after;

	while (scanf("%15s %ld", what, &a) == 2)
	{
		if (strcmp(what, "poll") == 0)
			printf("%lld\n", (long long) omni_poll_delay(a));
		else if (scanf("%lu %d", &lot, &after) == 2)
			printf("%lld\n", (long long) (strcmp(what, "few") == 0 ?
										 omni_retry_few_delay((int) a, (uint32) lot, after) :
										 omni_retry_delay((int) a, (uint32) lot, after)));
	}
	return 0;
}
