# Callers whose worker does not answer: it is stopped, lacks file descriptors, or cannot start. Each has a
# deadline of its own, a few seconds behind call_timeout, and learns what it has waited for.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
# The worker, both launchers, and no process more: a worker cannot start its successor itself
my $node = OmniFault::node('stopped', conf => "shared_preload_libraries = 'omni_refresh'\nmax_worker_processes = 3\n"
	. "max_connections = 150\ndynamic_shared_memory_type = posix\n");
my $refresh = q{SELECT status FROM omni_refresh('} . $omni->model . q{');};
my $stopped;

END
{
	my $rc = $?;
	kill 'CONT', $stopped if $stopped;
	$omni->stop if $omni;
	$? = $rc;
}

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0, timeout => '100 s');

# More calls than the ring has room for, and look-ups, while the worker is stopped

is(OmniFault::call($node, $refresh)->{out}, 'accepted', 'a call');
$stopped = OmniFault::worker($node);
$omni->reset;
eval
{
	kill 'STOP', $stopped or die;
	my @calls = map { OmniFault::begin($node, "SET omni_refresh.call_timeout = '1 s'; $_") }
		(($refresh) x 20, 'SELECT count(*) FROM omni_refresh_models();',
		q{SELECT detail || ' HINT: ' || hint FROM omni_refresh_check() WHERE check_name = 'background worker';});
	OmniFault::finish($_) for @calls;
	my $check = pop @calls;
	is(join(' ', map { $_->{sqlstate} } @calls), join(' ', ('08006') x 21), 'while the worker is stopped, every call ends');
	is($calls[$_]{message}, 'the background worker of omni_refresh has not answered in time', '... with an error of its own')
		for 0, 20;
	is($calls[$_]{detail}, "The worker (PID $stopped) has not taken the call; the request was not sent.",
		'... that says what it has waited for') for 0, 19, 20;
	like($calls[0]{hint}, qr/pg_stat_activity/, '... and where to look');
	cmp_ok($_->{seconds}, '<', 30, '... in time') for sort { $b->{seconds} <=> $a->{seconds} } $calls[0];
	like($check->{out}, qr/has not answered in time\.  The worker \(PID $stopped\).* HINT: .*pg_stat_activity/,
		'omni_refresh_check() ends, too, and says it');
	1;
} or fail("with a stopped worker: $@");
kill 'CONT', $stopped;
is(OmniFault::call($node, $refresh)->{out}, 'accepted', 'a worker that goes on serves the next call');
is(OmniFault::worker($node), $stopped, '... the same worker');
is(scalar($omni->requests), 1, '... and sends nothing for those who have left');

# What may have been sent is not known.

$omni->reset;
$omni->fault('hang');
my $sent = OmniFault::begin($node, "SET omni_refresh.call_timeout = '5 s'; $refresh");
$omni->wait_for_requests(1);
eval
{
	kill 'STOP', $stopped or die;
	OmniFault::finish($sent);
	my $job = $node->safe_psql('postgres', 'SELECT max(id) FROM omni_refresh_job');
	is($sent->{sqlstate}, '08007', 'the end of a call that was sent is not known');
	is($sent->{message}, "the background worker of omni_refresh has not answered in time; job $job may have been sent",
		'... and its error names the job');
	1;
} or fail("with a worker stopped later: $@");
kill 'CONT', $stopped;
$omni->fault('none');
is(OmniFault::call($node, $refresh)->{out}, 'accepted', '... after which calls go on');
ok($node->poll_query_until('postgres', q{SELECT count(*) = 0 FROM omni_refresh_job WHERE finished_at IS NULL}),
	'... and nothing is left undecided');

# A database that nobody can connect to for a moment: who waits for room in the ring is not forgotten.

$node->safe_psql('postgres', 'CREATE DATABASE closed');
$node->safe_psql('closed', 'CREATE EXTENSION omni_refresh');
OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0, db => 'closed');
my $script = "SET omni_refresh.on_failure = warning;\nSET omni_refresh.call_timeout = '10 s';\n"
	. "SELECT pg_advisory_lock_shared(1), pg_advisory_unlock_shared(1);\n$refresh";
my $gate = OmniLife::session($node, 'closed');
for my $try (1 .. 3)
{
	$gate->query(q{SELECT pg_advisory_lock(1); SELECT omni_refresh_on_commit(gen_random_uuid());
		UPDATE omni_refresh_job SET run_at = now() + interval '30 min' WHERE status = 'pending'});
	my $bench = OmniLife::bench($node, 'closed', $script, '-c', 60, '-t', 1);
	$node->poll_query_until('postgres', q{SELECT count(*) = 60 FROM pg_stat_activity WHERE datname = 'closed' AND wait_event = 'advisory'});
	$node->safe_psql('postgres', q{ALTER DATABASE closed ALLOW_CONNECTIONS false;
		SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = 'closed' AND backend_type = 'omni_refresh worker'});
	$gate->query('SELECT pg_advisory_unlock(1)');
	$node->safe_psql('postgres', 'SELECT pg_sleep(1.5); ALTER DATABASE closed ALLOW_CONNECTIONS true');
	is(OmniLife::benched($bench), 0, 'sixty sessions whose database is closed for a moment come to their end');
}
$gate->quit;

# Fewer file descriptors than calls: none is lost, and the worker stays.

$node->safe_psql('postgres', 'DROP DATABASE closed WITH (FORCE)');
$node->append_conf('postgresql.conf', "max_worker_processes = 8\nlog_min_messages = debug1\n");
$node->stop;
system("prlimit --pid $$ --nofile=130:") == 0 or die;
$node->start;
system("prlimit --pid $$ --nofile=1024:") == 0 or die;
is(OmniFault::call($node, $refresh)->{out}, 'accepted', 'a server with few file descriptors');
my $worker = OmniFault::worker($node);
$omni->reset;
$omni->fault('delay', delay => 3, times => -1);
my $last = $node->safe_psql('postgres', 'SELECT max(id) FROM omni_refresh_job');
my $bench = OmniLife::bench($node, 'postgres', "SET omni_refresh.call_timeout = '100 s';\n$refresh", '-c', 120, '-t', 1);
is(OmniLife::benched($bench), 0, 'a call in each of 120 sessions') or diag($bench->{err});
is($node->safe_psql('postgres', "SELECT status, count(*) FROM omni_refresh_job WHERE id > $last GROUP BY status"),
	'accepted|120', '... all are accepted');
is(OmniFault::worker($node), $worker, '... by one worker');

$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/not currently accepting connections/, qr/could not start a background worker/,
	qr/job \d+ may have been sent/, qr/WARNING:  could not start the background worker/, qr/has not answered in time/,
	qr/the background worker ended before job/, qr/WARNING:  no background worker/);
done_testing();
