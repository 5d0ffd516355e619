# Whoever waits for Omni can stop waiting, one way or another: at once, without a trace in shared
# memory, without the worker minding; and the job tells the truth about what became of it.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;

my $omni = OmniAPI->start;
my $node = OmniFault::node('main');
my $refresh = q{SELECT * FROM omni_refresh('} . $omni->model . q{');};

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, $_, url => $omni->http, key => $omni->key, rate_limit => 0,
	timeout => '500 s') for 'omni', 'another';
is(OmniFault::call($node, $refresh)->{status}, 0, 'a first call starts the worker');
my $worker = OmniFault::worker($node);
my $segments = OmniFault::segments($node);
my $set = "SET omni_refresh.call_timeout = '1000 s';";

# What is to become of the answer to a request whose caller has left, and of the job by it
sub leave
{
	my ($name, $sql, $state, $act) = @_;
	my $before = () = $omni->requests;

	# Sent, and an answer comes
	$omni->fault('hang');
	my $call = OmniFault::begin($node, "$set $sql $refresh", app => 'leaver');
	my $pid = OmniFault::wait_until_waiting($node, 'leaver');
	$omni->wait_for_requests($before + 1);
	is(OmniFault::story($node), 'sending: sending', "$name: on its way");
	isnt(OmniFault::segments($node), $segments, '... by way of shared memory');
	$act->($pid, $call);
	if (defined $state)
	{
		OmniFault::finish($call);
		is($call->{sqlstate}, $state, '... and back') or diag($call->{err});
	}
	ok($node->poll_query_until('postgres',
			"SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $pid"), '... and the session gone');
	is(OmniFault::story($node), 'sending: sending', '... which changes nothing for the request');
	$omni->fault('none');
	OmniFault::poll_story($node, 'unknown: sending attempt_failed unknown',
		'... the loss of whose answer is recorded');
	OmniFault::poll_segments($node, $segments, '... and nothing is left in shared memory');
	is(OmniFault::worker($node), $worker, '... and the worker is the same');
	return;
}

leave('cancel', '', '57014',
	sub { $node->safe_psql('postgres', "SELECT pg_cancel_backend($_[0])") });
leave('statement_timeout', "SET statement_timeout = '1 s';", '57014', sub { });
leave('terminate', '', '57P01',
	sub { $node->safe_psql('postgres', "SELECT pg_terminate_backend($_[0])") });
leave('a client that is gone', '', undef, sub { OmniFault::kill_client($_[1]) });

# An answer that arrives later is what counts
for my $case ([ 'running', 'accepted' ], [ 'completed', 'completed' ], [ 'failed', 'failed' ])
{
	my ($status, $end) = @$case;
	$omni->set(refresh_status => $status);
	$omni->fault('delay', delay => 1);
	my $requests = () = $omni->requests;
	my $call = OmniFault::begin($node, "$set $refresh", app => 'early');
	my $pid = OmniFault::wait_until_waiting($node, 'early');
	$omni->wait_for_requests($requests + 1);
	$node->safe_psql('postgres', "SELECT pg_cancel_backend($pid)");
	is(OmniFault::finish($call)->{sqlstate}, '57014', "the caller left before Omni said: $status");
	OmniFault::poll_story($node, "$end: sending $end", '... which is recorded all the same');
}
$omni->reset;

# Not sent again
my $requests = () = $omni->requests;
$omni->fault('answer', status => 503, body => '', headers => { 'Retry-After' => 900 });
OmniFault::server($node, 'down', url => $omni->http, key => $omni->key . '2', rate_limit => 0);
my $down = "$set SET omni_refresh.server = down;";
my $call = OmniFault::begin($node, "$down $refresh", app => 'retrier');
my $pid = OmniFault::wait_until_waiting($node, 'retrier');
OmniFault::poll_story($node, 'pending: sending attempt_failed', 'between two attempts');
my $queued = OmniFault::begin($node, "$down $refresh", app => 'queued');
my $queued_pid = OmniFault::wait_until_waiting($node, 'queued');
OmniFault::poll_story($node, 'pending: rate_limited', 'before the first');
$node->safe_psql('postgres', "SELECT pg_cancel_backend($queued_pid)");
is(OmniFault::finish($queued)->{sqlstate}, '57014', 'a call that was never sent is canceled');
OmniFault::poll_story($node, 'canceled: rate_limited canceled', '... and so is its job');
$node->safe_psql('postgres', "SELECT pg_cancel_backend($pid)");
is(OmniFault::finish($call)->{sqlstate}, '57014', 'a call between two attempts is canceled');
ok($node->poll_query_until('postgres', q{
		SELECT count(*) = 2 FROM omni_refresh_job WHERE server = 'down' AND status = 'canceled'}),
	'... and so is its job');

# ... but if the first attempt may have arrived, nobody knows
OmniFault::server($node, 'lossy', url => $omni->http, key => $omni->key . '3', rate_limit => 0,
	timeout => '100 ms');
$omni->fault('hang');
$omni->fault('answer', status => 503, body => '', headers => { 'Retry-After' => 900 });
$call = OmniFault::begin($node, "$set SET omni_refresh.server = lossy; $refresh", app => 'lossy');
$pid = OmniFault::wait_until_waiting($node, 'lossy');
OmniFault::poll_story($node, 'pending: sending attempt_failed sending attempt_failed',
	'after an attempt that may have arrived');
$node->safe_psql('postgres', "SELECT pg_cancel_backend($pid)");
OmniFault::finish($call);
OmniFault::poll_story($node,
	'unknown: sending attempt_failed sending attempt_failed unknown',
	'a job of which one attempt may have arrived is not called canceled');

# Many come and go at once; more than a ring holds
$omni->reset;
$omni->fault('hang', times => -1);
my @calls = map { OmniFault::begin($node, "$set $refresh", app => "many$_") } 1 .. 24;
$omni->wait_for_requests(24);
$node->safe_psql('postgres',
	q{SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'many%'});
is(join(' ', map { OmniFault::finish($_)->{sqlstate} } @calls), join(' ', ('57014') x 24),
	'two dozen callers leave at once');
is(OmniFault::worker($node), $worker, '... the worker stays');

# A hanging instance does not keep another one's calls
$omni->reset;
$omni->fault('hang');
my $hanging = OmniFault::begin($node, "$set $refresh", app => 'hanging');
$omni->wait_for_requests(1);
for (1 .. 3)
{
	$call = OmniFault::call($node, "SET omni_refresh.server = another; $refresh");
	is($call->{status}, 0, 'a call beside one that hangs');
	cmp_ok($call->{seconds}, '<', 5, '... is not kept by it');
}
OmniFault::kill_client($hanging);
# Before its backend has left, the end of the request would be followed by another attempt.
ok($node->poll_query_until('postgres', q{SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = 'hanging'}),
	'... nor by its end');
$omni->reset;
OmniFault::poll_segments($node, $segments, 'nothing is left in shared memory');

# The caller of a worker that goes away learns it
$omni->fault('hang');
$call = OmniFault::begin($node, "$set $refresh", app => 'orphan');
$omni->wait_for_requests(1);
$node->safe_psql('postgres', "SELECT pg_terminate_backend($worker, 10000)");
OmniFault::finish($call);
is($call->{sqlstate}, '08007', 'the caller of a worker that was terminated learns it');
like($call->{detail}, qr/may have received/, '... with what is known');
cmp_ok($call->{seconds}, '<', 10, '... at once');
is(OmniFault::story($node), 'unknown: sending unknown', '... and the job says so, too');
isnt(OmniFault::worker($node), $worker, '... by another worker');
is(OmniFault::call($node, $refresh)->{status}, 0, '... which makes the next call');
OmniFault::poll_segments($node, $segments, 'nothing is left in shared memory');

# A canceled worker is nobody's canceled query
$worker = OmniFault::worker($node);
$omni->reset;
$omni->fault('delay', delay => 1);
$call = OmniFault::begin($node, $refresh, app => 'bystander');
$omni->wait_for_requests(1);
$node->safe_psql('postgres', "SELECT pg_cancel_backend($worker)");
is(OmniFault::finish($call)->{status}, 0, 'pg_cancel_backend() on the worker harms no call')
	or diag($call->{err});
is(OmniFault::worker($node), $worker, '... nor the worker');

$node->stop('fast');
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');

done_testing();
