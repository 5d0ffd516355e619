# Whatever is killed, and at whichever step of a call: what the log says afterwards is true, nothing
# is sent again, and calls go on.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
my $node = OmniFault::node('crash', conf => "restart_after_crash = on\nlog_min_messages = debug1\n");
my $call = q{SELECT status FROM omni_refresh('} . $omni->model . q{')};
my $blocker;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0, timeout => '500 s');

# The steps of a call: how to get there; the job's story there, and after the worker has died, as
# the next worker tells it.
my @steps = (
	[ 'before sending', 'slow', sub { }, 0,
	  'pending: rate_limited', 'canceled: rate_limited canceled' ],
	[ 'before the answer', 'omni', sub { $omni->fault('hang') }, 1,
	  'sending: sending', 'unknown: sending unknown' ],
	[ 'in the middle of the answer', 'omni', sub { $omni->fault('hang_middle') }, 1,
	  'sending: sending', 'unknown: sending unknown' ],
	[ 'before a retry', 'down', sub { $omni->fault('answer', status => 503, body => '', headers => { 'Retry-After' => 900 }) }, 1,
	  'pending: sending attempt_failed', 'unknown: sending attempt_failed unknown' ],
	[ 'before a retry of what may have arrived', 'lossy2', sub {
			$omni->fault('hang');
			$omni->fault('answer', status => 503, body => '', headers => { 'Retry-After' => 900 }) }, 2,
	  'pending: sending attempt_failed sending attempt_failed',
	  'unknown: sending attempt_failed sending attempt_failed unknown' ],
	[ 'with an answer that cannot be written', 'omni', sub { $omni->fault('delay', delay => 3) }, 1,
	  'sending: sending', 'unknown: sending unknown' ]);

# Who dies, and what the caller hears of it
my @deaths = (
	[ 'the worker is terminated', qr/^ERROR:  08007: /m, 0, sub {
			my ($worker) = @_;
			$node->safe_psql('postgres', "SELECT pg_terminate_backend($worker, 10000)") } ],
	[ 'the worker is killed', undef, 1, sub { kill 'KILL', $_[0] } ],
	[ 'the caller is killed', undef, 1, sub { kill 'KILL', $_[1] } ],
	[ 'the server is killed', undef, 1, sub {
			ok(OmniLife::kill_server($node), 'the server is dead, and so is everything of it');
			$node->start;
		} ]);

my $n = 0;
for my $death (@deaths)
{
	my ($who, $said, $crash, $kill) = @$death;

	for my $step (@steps)
	{
		my ($when, $server, $prepare, $requests, $before, $after) = @$step;
		my $name = "$who $when";

		# A key of its own for each, whose limits nobody else has touched
		$n++;
		my $own = "own$n";
		OmniFault::server($node, $own, url => $omni->http, key => $omni->key . $n,
			rate_limit => $server eq 'slow' ? 1 : 0, timeout => $server eq 'lossy2' ? '100 ms' : '500 s');
		$omni->reset;
		$omni->set(key => $omni->key . $n);
		$node->safe_psql('postgres', "SET omni_refresh.server = $own; $call") if $server eq 'slow';
		my $first = () = $omni->requests;
		$prepare->();
		my $session = OmniLife::session($node, 'postgres');
		$session->send("SET omni_refresh.server = $own; SET omni_refresh.call_timeout = '1000 s'; $call");
		$omni->wait_for_requests($first + $requests);
		OmniFault::poll_story($node, $before, $name);
		if ($when =~ /cannot be written/)
		{
			$blocker = OmniLife::session($node, 'postgres');
			$blocker->query('BEGIN; LOCK TABLE omni_refresh_job IN SHARE MODE');
			OmniLife::until_true('... is waited for', sub {
				slurp_file($node->logfile) =~ /could not record the outcome of job \d+(?!.*database system is)/s });
		}
		# Outcomes are flushed by whoever comes next.
		$node->safe_psql('postgres', 'CREATE TABLE IF NOT EXISTS flush (x int); INSERT INTO flush VALUES (1)');
		my $worker = OmniFault::worker($node);
		my $sent = () = $omni->requests;
		my $forks = OmniLife::forks($node);
		if ($when =~ /cannot be written/ && !$crash)
		{
			$node->safe_psql('postgres', "SELECT pg_terminate_backend($worker, 10000)");
			$blocker->query('ROLLBACK');
		}
		else
		{
			$kill->($worker, $session->{pid});
		}

		my ($out, $err) = $session->answer;
		if (defined $said)
		{
			like($err, $said, '... the caller learns it');
		}
		else
		{
			isnt($err, '', '... the caller learns it');
			OmniLife::recovered($node);
		}
		is($out, '', '... by no row');
		is(OmniLife::forks($node), $forks, '... no worker starts by itself') if $crash;
		$omni->fault('none');
		$session->quit;
		$blocker->quit if $blocker;
		undef $blocker;

		$omni->set(key => $omni->key);
		is($node->safe_psql('postgres', $call), 'accepted', '... the next call succeeds');
		is(scalar(() = $omni->requests), $sent + 1, '... which is all that is sent');
		is($node->safe_psql('postgres', q{
			SELECT j.status || ': ' || string_agg(e.event, ' ' ORDER BY e.id)
			FROM omni_refresh_job j JOIN omni_refresh_event e ON e.job = j.id
			WHERE j.id = (SELECT max(id) FROM omni_refresh_job WHERE server <> 'omni') GROUP BY j.id}),
			$after, '... and the log is right');
		is($node->safe_psql('postgres', q{
			SELECT count(*) FROM omni_refresh_job WHERE status IN ('pending', 'sending')
				OR (finished_at IS NULL) OR (status <> 'accepted' AND error IS NULL)}),
			'0', '... and complete');
	}
}

$node->stop('fast');
my $log = slurp_file($node->logfile);
unlike($log, qr/PANIC|TRAP|signal (?!9)\d/, 'nothing has died that was not killed');
done_testing();
