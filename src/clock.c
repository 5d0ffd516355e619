/*-------------------------------------------------------------------------
 *
 * clock.c
 *		Time that nobody sets.
 *
 * Whatever this extension waits for, it measures by a monotonic clock: CLOCK_REALTIME
 * may be stepped by an administrator, by NTP, or by a virtual machine that resumes.
 *
 * The times in rows are CLOCK_REALTIME's, since users read them and they outlive a
 * restart.  To compare them with "now", the worker keeps a second idea of CLOCK_REALTIME
 * that follows the monotonic clock and takes a step over only gradually.  The later of
 * the two says what is due, so that a step back delays nothing; the earlier one says
 * whose time is over, so that a step forward ends nothing.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "portability/instr_time.h"
#include "utils/timestamp.h"

#include "clock.h"

/* Differences of less than this are no step, but an adjustment of the clock's speed */
#define SMALLEST_STEP		(2 * USECS_PER_SEC)

static TimestampTz steady_clock(void);

/* The time since some moment in the past, the same for all processes, in microseconds. */
int64
omni_clock(void)
{
	instr_time	now;

	INSTR_TIME_SET_CURRENT(now);
	return (int64) INSTR_TIME_GET_MICROSEC(now);
}

/* How many milliseconds are left until a time of omni_clock(), rounded up; 0 if none. */
long
omni_clock_until(int64 when)
{
	int64		left = when - omni_clock();

	if (left <= 0)
		return 0;
	return (long) Min((left + 999) / 1000, PG_INT32_MAX);
}

/* The time by which to tell whether something in a row is due. */
TimestampTz
omni_latest_now(void)
{
	return Max(GetCurrentTimestamp(), steady_clock());
}

/* The time by which to tell whether the time of something in a row is over. */
TimestampTz
omni_earliest_now(void)
{
	return Min(GetCurrentTimestamp(), steady_clock());
}

/*
 * CLOCK_REALTIME as it would be without its latest steps.  After a step, the distance
 * shrinks by half of the time that passes.
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
