# Nothing of a call is sent after its deadline: not if the worker takes it too late, and not if it goes
# on too late after a wait.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;

my $omni = OmniAPI->start;
my $node = OmniFault::node('deadline');
my $apps = 0;
my $worker;

END
{
	my $rc = $?;
	kill 'CONT', $worker if defined $worker;
	$omni->stop if $omni;
	$? = $rc;
}

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
my $model = $omni->model;
my $refresh = "SELECT status FROM omni_refresh('$model')";
is(OmniFault::call($node, $refresh)->{out}, 'accepted', 'there is a worker');
$worker = OmniFault::worker($node);

# Makes a call whose worker stops at a certain time and goes on after its deadline.
sub too_late
{
	my ($timeout, $stop_at, $sql) = @_;
	my $app = 'late' . ++$apps;

	kill 'STOP', $worker if !defined $stop_at;
	my $call = OmniFault::begin($node, "SET omni_refresh.call_timeout = '$timeout'; $sql", app => $app);
	OmniFault::wait_until_waiting($node, $app);
	if (defined $stop_at)
	{
		$node->poll_query_until('postgres', $stop_at) or die;
		kill 'STOP', $worker;
	}
	# the call's time begins a little after its statement
	$node->poll_query_until('postgres', "SELECT clock_timestamp() > query_start + interval '$timeout' + interval '1 s' FROM pg_stat_activity WHERE application_name = '$app'") or die;
	kill 'CONT', $worker;
	return OmniFault::finish($call);
}

# A worker that takes the call too late
for my $timeout ('1 ms', '300 ms')
{
	$omni->reset;
	my $call = too_late($timeout, undef, $refresh);
	is("$call->{sqlstate} $call->{message}", '08006 "omni_refresh.call_timeout" was over before the request to server "omni" could be sent',
		"a call that is taken after $timeout is told so");
	is($call->{detail}, 'It waited for the background worker to take it, and was not sent.', '... and why');
	is(OmniFault::story($node), 'failed: failed', '... its job has failed');
	is(scalar($omni->requests), 0, '... and nothing was sent');
}

my $models = OmniFault::call($node, 'SELECT count(*) FROM omni_refresh_models()');
is($models->{out}, 5, 'a look-up is answered');
$omni->reset;
$models = too_late('300 ms', undef, 'SELECT count(*) FROM omni_refresh_models()');
is($models->{sqlstate}, '08006', 'one that is taken too late is not');
is(scalar($omni->requests), 0, '... and nothing was sent');

# Calls of one millisecond, of which some may be in time
$omni->reset;
my $sent = 0;
for (1 .. 10)
{
	my $call = OmniFault::call($node, "SET omni_refresh.call_timeout = '1 ms'; $refresh");
	$sent++ if $call->{message} !~ /could be sent$/;
}
cmp_ok(scalar($omni->requests), '<=', $sent, 'no call of a millisecond is sent after its deadline');

# A worker that does not come back to a call in time: the call has waited for a pause, or has failed before
my $waits = q{SELECT status = 'pending' FROM omni_refresh_job ORDER BY id DESC LIMIT 1};
$omni->reset;
$omni->fault('answer', status => 429, headers => { 'Retry-After' => '2' });
is(OmniFault::call($node, "SET omni_refresh.call_timeout = '1 s'; $refresh")->{sqlstate}, '53000', 'Omni asks for a pause');
my $call = too_late('3 s', $waits, $refresh);
is($call->{sqlstate}, '53000', 'a call that the pause has kept back to its end is told so');
is(OmniFault::story($node), 'failed: rate_limited failed', '... its job has failed');
is(scalar($omni->requests), 1, '... and nothing was sent');

$omni->reset;
$omni->fault('answer', status => 503, headers => { 'Retry-After' => '2' });
$call = too_late('3 s', q{SELECT status = 'pending' AND attempts = 1 FROM omni_refresh_job ORDER BY id DESC LIMIT 1}, $refresh);
like("$call->{sqlstate} $call->{message}", qr/^08006 .*HTTP status 503/, 'a call that was to be tried again too late gets the error of its attempt');
like(OmniFault::story($node), qr/^failed: .*attempt_failed/, '... its job has failed');
is(scalar($omni->requests), 1, '... and was not sent again');

# No place within the rate limit before the deadline
OmniFault::server($node, 'narrow', url => $omni->http, key => 'another', rate_limit => 1);
$omni->reset;
$omni->fault('answer', times => -1, status => 200, body => '{"status": "completed"}');
is(OmniFault::call($node, "SET omni_refresh.server = narrow; $refresh")->{out}, 'completed', 'the rate limit has room for a call');
$call = OmniFault::call($node, "SET omni_refresh.server = narrow; SET omni_refresh.call_timeout = '5 s'; $refresh");
is($call->{sqlstate}, '53000', '... and none for another');
is(OmniFault::story($node), 'failed: failed', '... whose job has failed');
is(scalar($omni->requests), 1, '... and was not sent');

$node->stop;
done_testing();
