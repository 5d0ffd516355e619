# The times of retries and polls, which are pure functions: src/retry.c alone, without a server.

use strict;
use warnings FATAL => 'all';

use OmniUnit;
use Test::More;

my $program = OmniUnit::compile('retry');

# Asks for one time, in ms.
sub ms
{
	return OmniUnit::output($program, '', "$_[0]\n");
}

# The wait is drawn by lot, up to a bound that doubles with each attempt: the lot just below the
# bound is the wait, and the next one is none.
my $bound = 1000;
for my $attempts (1 .. 12)
{
	is(ms("retry $attempts $bound 0"), $bound, "after attempt $attempts the longest wait is $bound ms");
	is(ms('retry ' . join(' ', $attempts, $bound + 1, 0)), 0, '... and the shortest is none');
	$bound = $bound * 2 > 300_000 ? 300_000 : $bound * 2;
}
is(ms('retry 1 4294967295 0'), 4294967295 % 1001, 'any lot will do');
is(ms('retry 0 1000 0'), 1000, 'a job without attempts waits like one with one');
is(ms('retry 2000000000 300000 0'), 300_000, 'the bound is that of many attempts for ever');

is(ms('retry 1 500 7'), 7000, 'Retry-After is a floor');
is(ms('retry 9 200000 7'), 200_000, '... and no bound');
is(ms('retry 1 0 3600'), 3_600_000, 'an hour is granted');
is(ms("retry 1 0 2147483647"), 3_600_000, '... but no more');

my @few = (10, 60, 300, 900);
for my $failures (1 .. 4)
{
	my $delay = 1000 * $few[$failures - 1];

	is(ms("few $failures 0 0"), $delay * 3 / 4, "after failure $failures of a few the shortest wait is three quarters of $delay ms");
	is(ms("few $failures " . $delay / 2 . ' 0'), $delay * 5 / 4, '... and the longest five quarters');
	is(ms("few $failures " . ($delay / 2 + 1) . ' 0'), $delay * 3 / 4, '... by lot');
}
is(ms('few 1 0 3000'), 3_000_000, '... unless Retry-After asks for more');

is(ms('poll 0'), 2000, 'a job is polled 2 s after it was accepted');
is(ms('poll -5000'), 2000, '... also if a clock says that this is in the future');
is(ms('poll 2000'), 3000, '... and 3 s later');
is(ms('poll 5000'), 4500, '... each time half as long again');
is(ms('poll 55999'), 29_999, '... up to 30 s');
is(ms("poll $_"), 30_000, "... and no more after $_ ms") foreach 56_000, 3_600_000, 2147483647;

done_testing();
