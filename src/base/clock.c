/*-------------------------------------------------------------------------
 *
 * clock.c
 *		Time that does not jump when the system's clock is set.
 *
 * Measure all waits by a monotonic clock: an administrator, NTP, or a virtual machine that
 * resumes may step CLOCK_REALTIME.
 *
 * The times in rows are CLOCK_REALTIME's, since users read them and they must survive a
 * restart.  To compare them with "now", the worker keeps a steady clock, which starts as
 * CLOCK_REALTIME, follows the monotonic clock, and adopts a step of CLOCK_REALTIME gradually.
 * The later of the two clocks decides whether a job is due, so that a step back delays no
 * job; the earlier one decides whether a time limit is over, so that a step forward ends no
 * job.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <time.h>

#include "utils/timestamp.h"

#include "base/clock.h"

/* Smaller differences are not steps, but adjustments of the clock's speed: adopt them at once */
#define SMALLEST_STEP		(2 * USECS_PER_SEC)

static TimestampTz steady_clock(void);

/*
 * Return monotonic time in microseconds, since a moment that is the same for all processes.
 * Do not use instr_time: from 19 on, the setting timing_clock_source of each session decides
 * what it counts from.
 */
int64
omni_clock(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * USECS_PER_SEC + now.tv_nsec / 1000;
}

/* Return the milliseconds left until a time of omni_clock(), rounded up; 0 if it has passed. */
long
omni_clock_until(int64 when)
{
	int64		left = when - omni_clock();

	if (left <= 0)
		return 0;
	return (long) Min((left + 999) / 1000, PG_INT32_MAX);
}

/* Return the time to compare with run_at, to decide whether a job is due. */
TimestampTz
omni_latest_now(void)
{
	return Max(GetCurrentTimestamp(), steady_clock());
}

/* Return the time to compare with the end of a job's time limit. */
TimestampTz
omni_earliest_now(void)
{
	return Min(GetCurrentTimestamp(), steady_clock());
}

/*
 * Return CLOCK_REALTIME without its latest steps.  After a step, shrink the distance
 * between the two by half of the time that passes.
 */
static TimestampTz
steady_clock(void)
{
	static TimestampTz steady = 0;
	static int64 read_at;
	int64		now = omni_clock();
	TimestampTz real = GetCurrentTimestamp();
	int64		passed = now - read_at;
	int64		distance = real - (steady + passed);

	if (steady == 0 || (distance < SMALLEST_STEP && distance > -SMALLEST_STEP))
		steady = real;
	else
		steady += passed + (distance > 0 ? Min(distance, passed / 2) : Max(distance, -passed / 2));
	read_at = now;
	return steady;
}
