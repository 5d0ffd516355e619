/*
 * Clocks that a test can set, to be preloaded into the server: $OMNI_CLOCK names a
 * file of two 64-bit integers, the nanoseconds that the real-time clock and the
 * monotonic clock are ahead.  A process maps the file once, so that a change takes
 * effect in all processes at once.  The calls are interposed in libc; what the kernel
 * times, such as a wait for a socket, follows its own clock.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SECOND	INT64_C(1000000000)

static int	(*next_clock_gettime) (clockid_t, struct timespec *);
static const volatile int64_t *ahead;

/* Runs before the server's signal handlers, which ask for the time, can run. */
static void __attribute__((constructor))
prepare(void)
{
	const char *path = getenv("OMNI_CLOCK");
	int			file = path != NULL ? open(path, O_RDONLY | O_CLOEXEC) : -1;

	next_clock_gettime = (int (*) (clockid_t, struct timespec *)) dlsym(RTLD_NEXT, "clock_gettime");
	if (file >= 0)
	{
		void	   *memory = mmap(NULL, 2 * sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);

		if (memory != MAP_FAILED)
			ahead = memory;
		close(file);
	}
}

int
clock_gettime(clockid_t clock, struct timespec *now)
{
	int			result;
	int64_t		nanoseconds;

	if (next_clock_gettime == NULL)
		prepare();
	result = next_clock_gettime(clock, now);
	if (result != 0 || ahead == NULL)
		return result;
	if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)
		nanoseconds = ahead[0];
	else if (clock == CLOCK_MONOTONIC || clock == CLOCK_MONOTONIC_COARSE ||
			 clock == CLOCK_MONOTONIC_RAW || clock == CLOCK_BOOTTIME)
		nanoseconds = ahead[1];
	else
		return 0;

	nanoseconds += now->tv_sec * SECOND + now->tv_nsec;
	now->tv_sec = nanoseconds / SECOND;
	now->tv_nsec = nanoseconds % SECOND;
	return 0;
}

int
gettimeofday(struct timeval *restrict now, void *restrict zone __attribute__((unused)))
{
	struct timespec precise;

	clock_gettime(CLOCK_REALTIME, &precise);
	now->tv_sec = precise.tv_sec;
	now->tv_usec = precise.tv_nsec / 1000;
	return 0;
}

time_t
time(time_t *now)
{
	struct timespec precise;

	clock_gettime(CLOCK_REALTIME, &precise);
	if (now != NULL)
		*now = precise.tv_sec;
	return precise.tv_sec;
}
