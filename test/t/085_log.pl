# The server's log has a line for each job that ends badly without a caller who hears of it, and two lines
# for each outage of a server. Nobody can flood the log, hide another's failure, or forge a line.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniClock;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
my %options = (conf => "log_error_verbosity = verbose\nomni_refresh.min_interval = 0\n");
my $clock = OmniClock::build() ? OmniClock->new('log', %options) : undef;
my $node = $clock ? $clock->node : OmniFault::node('log', %options);
my $model = $omni->model;
my $refresh = "SELECT status FROM omni_refresh('$model')";
my $queue = "SELECT id FROM omni_refresh_on_commit('$model')";
my $key = $omni->key;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $key, rate_limit => 0, timeout => '500 s');
$node->safe_psql('postgres', 'CREATE ROLE alice LOGIN; CREATE ROLE mallory LOGIN');

# A new worker has a new minute.
my $from;
sub begin
{
	$omni->reset;
	$node->safe_psql('postgres', q{SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
	$node->safe_psql('postgres', $refresh);
	$from = length slurp_file($node->logfile);
	return;
}

# The lines of the worker, without what PostgreSQL puts before and behind them.
sub lines
{
	return map { s/^.*? LOG:  (\S{5}: )?//r } grep { / LOG:  .*\b(?:job \d+ ended|outage of|left out)/ }
		split /\n/, substr(slurp_file($node->logfile), $from);
}

# Waits for lines, and for no more than these; a regular expression for each.
sub are_told
{
	my ($name, @expected) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	OmniLife::until_true("$name: so many lines", sub { scalar(my @lines = lines()) >= @expected });
	$node->safe_psql('postgres', $refresh);	# the worker has gone on
	my @lines = lines();
	is(scalar @lines, scalar @expected, "$name: and no more") or return diag(join "\n", @lines);
	like($lines[$_], $expected[$_], "$name: line $_") for 0 .. $#expected;
	return;
}

sub ended
{
	my ($id, $status, $origin, $rest, $server, $role) = @_;
	($server, $role) = map { quotemeta $_ } $server // 'omni', $role // $node->safe_psql('postgres', 'SELECT current_user');

	return qr/^job $id ended as "$status" \(server "$server", model $model, origin $origin, requested by "$role"\): $rest/;
}

# Jobs

begin();
$omni->fault('answer', status => 400, body => qq({"detail": "first\\nLOG:  forged\\r\\u001b[1m $key \\u2028end", "status": 400}));
my $id = $node->safe_psql('postgres', $queue);
are_told('a refused job', ended($id, 'failed', 'on_commit',
	qr/22023: server "omni" refused the refresh: HTTP status 400; Omni says: first LOG: forged \[1m \[API key\] end$/));
unlike(slurp_file($node->logfile), qr/\Q$key\E/, '... without the key');
like(slurp_file($node->logfile), qr/LOG:  22023: job $id ended/, '... with its SQLSTATE, where that is wanted');

begin();
$omni->fault('answer', status => 404);
$id = $node->safe_psql('postgres', "SELECT (omni_refresh_retry($id)).id");
are_told('a retry', ended($id, 'failed', 'retry', qr/42704: /));

begin();
$id = $node->safe_psql('postgres', "CREATE ROLE leaver; SET ROLE leaver; BEGIN; $queue; RESET ROLE; DROP ROLE leaver; COMMIT");
are_told('a job that cannot be sent', ended($id, 'failed', 'on_commit', qr/42704: role "leaver" was dropped$/, 'omni', 'leaver'));

begin();
$omni->fault('answer', status => 404, times => 2);
my $call = OmniFault::call($node, "$refresh;");
is($call->{sqlstate}, '42704', 'a caller hears it');
$call = OmniFault::call($node, "SET omni_refresh.on_failure = warning; $refresh;");
is($call->{out}, 'failed', '... or reads it');
are_told('... and the log does not tell it');

begin();
$omni->fault('hang');
my $caller = OmniLife::session($node, 'postgres');
$caller->send($refresh);
$omni->wait_for_requests(2);
$node->safe_psql('postgres', "SELECT pg_terminate_backend($caller->{pid}, 60000)");
$caller->quit;
$id = $node->safe_psql('postgres', 'SELECT max(id) FROM omni_refresh_job');
$node->safe_psql('postgres', q{SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
are_told('a call whose caller and worker have left', ended($id, 'unknown', 'call', qr/08007: the background worker or the server ended/));

begin();
$omni->fault('hang');
$caller = OmniLife::session($node, 'postgres');
$caller->send($refresh);
$omni->wait_for_requests(2);
$node->safe_psql('postgres', q{SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
like(($caller->answer)[1], qr/ERROR:  08007: /, 'the caller of a worker that has ended hears it');
are_told('... and the log does not tell it');
$caller->quit;

# Polls

$node->safe_psql('postgres', 'ALTER SYSTEM SET omni_refresh.track = on; SELECT pg_reload_conf()');
begin();
$omni->set(job_result => 'FAILED', job_seconds => 0.1);
my ($called) = $node->safe_psql('postgres', "SELECT id FROM omni_refresh('$model')");
my ($queued) = $node->safe_psql('postgres', $queue);
OmniLife::until_true('jobs that run fail', sub { (my @lines = lines()) >= 2 });
my %lines = map { /^job (\d+)/ ? ($1 => $_) : () } lines();
like($lines{$called} // '', ended($called, 'failed', 'call', qr/38000: /), '... one that was called for');
like($lines{$queued} // '', ended($queued, 'failed', 'on_commit', qr/38000: /), '... and one that was queued');
$node->safe_psql('postgres', 'ALTER SYSTEM RESET omni_refresh.track; SELECT pg_reload_conf()');

# An outage

begin();
$omni->fault('answer', status => 502, times => 3);
$id = $node->safe_psql('postgres', $queue);
$node->poll_query_until('postgres', "SELECT status = 'accepted' FROM omni_refresh_job WHERE id = $id");
are_told('an outage', qr/^outage of server "omni" begins, its jobs are tried again: 08006: .*HTTP status 502/,
	qr/^outage of server "omni" has ended after \d+ s, failed attempts: 3$/);
$omni->fault('answer', status => 502);
$id = $node->safe_psql('postgres', $queue);
$node->poll_query_until('postgres', "SELECT status = 'accepted' FROM omni_refresh_job WHERE id = $id");
is(scalar(my @outages = lines()), 2, 'the next one of the same minute is not told');
$node->safe_psql('postgres', q{SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
are_told('... but counted', map({ qr/^outage/ } 1, 2), qr/^1 more line about jobs and servers was left out, see table "omni_refresh_job"$/);

begin();
$omni->fault('answer', status => 502, times => 2);
$call = OmniFault::call($node, "$refresh;");
is($call->{out}, 'accepted', 'a call survives an outage');
are_told('... of which the log does not tell');

# A flood

begin();
$omni->set(forbidden => 1);
$node->safe_psql('postgres', join(';', map { "SELECT FROM omni_refresh_on_commit(gen_random_uuid())" } 1 .. 40), extra_params => [ '-U', 'mallory' ]);
ok($node->poll_query_until('postgres', q{SELECT count(*) = 40 FROM omni_refresh_job WHERE requested_by = 'mallory' AND status = 'failed'}),
	"many of one role's jobs fail");
$id = $node->safe_psql('postgres', $queue, extra_params => [ '-U', 'alice' ]);
OmniLife::until_true("... and one of another role's, which is told", sub { scalar grep { $_ =~ ended($id, 'failed', 'on_commit', qr/42501/, 'omni', 'alice') } lines() });
is(scalar(grep { /requested by "mallory"/ } lines()), 4, '... as are a few of the others');
$node->safe_psql('postgres', q{SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
OmniLife::until_true('... and how many more there were', sub { scalar grep { /^36 more lines/ } lines() });

SKIP:
{
	skip 'test/shim/clock.c cannot be compiled', 6 unless $clock;
	begin();
	$omni->set(forbidden => 1);
	my $fail = sub {
		$node->safe_psql('postgres', join(';', map { "SELECT FROM omni_refresh_on_commit(gen_random_uuid())" } 1 .. 6), extra_params => [ '-U', 'mallory' ]);
		return $node->poll_query_until('postgres', q{SELECT bool_and(status = 'failed') FROM omni_refresh_job WHERE requested_by = 'mallory'});
	};
	ok($fail->(), 'a minute with too many failures');
	my @lines = lines();
	is(scalar @lines, 4, '... which is not over yet');
	my $worker = OmniFault::worker($node);
	$clock->pass(60);
	OmniLife::until_true('at its end, the worker says how many there were', sub { (lines())[-1] =~ /^2 more lines about jobs and servers were left out/ });
	ok($fail->(), '... and goes on');
	OmniLife::until_true('... with the lines of the next minute', sub { @lines = lines(); @lines == 9 });
	is(OmniFault::worker($node), $worker, '... without an end of its own');
}

my @roles = map { "role$_" } 1 .. 14;
$node->safe_psql('postgres', join ';', map { "CREATE ROLE $_ LOGIN" } @roles);
begin();
$omni->set(forbidden => 1);
for my $role (@roles)
{
	$node->safe_psql('postgres', join(';', map { "SELECT FROM omni_refresh_on_commit(gen_random_uuid())" } 1 .. 3), extra_params => [ '-U', $role ]);
}
ok($node->poll_query_until('postgres', q{SELECT count(*) = 42 FROM omni_refresh_job WHERE requested_by ~ '^role' AND status = 'failed'}),
	"many roles' jobs fail");
$node->safe_psql('postgres', q{SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
OmniLife::until_true('... and 12 lines tell of it', sub { scalar grep { /^30 more lines/ } lines() });
is(scalar(grep { /^job/ } lines()), 12, '... not more');
my %told = map { /requested by "(\w+)"/ ? ($1 => 1) : () } lines();
cmp_ok(scalar keys %told, '>=', 8, '... and of most roles');

# Outages of many servers, which end at once

SKIP:
{
	skip 'test/shim/clock.c cannot be compiled', 5 unless $clock;
	my $many = q{FROM omni_refresh_job WHERE server ~ '^many'};
	my $hurry = q{UPDATE omni_refresh_job SET run_at = clock_timestamp() WHERE status = 'pending'; SELECT omni_refresh_wake()};
	my $since = '-infinity';

	begin();
	$omni->fault('answer', status => 502, times => -1);
	for my $number (1 .. 14)
	{
		OmniFault::server($node, "many$number", url => $omni->http, key => $key, rate_limit => 0);
		$node->safe_psql('postgres', "SET omni_refresh.server = many$number; $queue");
	}
	for my $minute (1 .. 4)		# the role's lines are four a minute
	{
		$node->poll_query_until('postgres', "SELECT bool_and(status = 'pending' AND sent_at > '$since') $many") or die;
		$clock->pass(61);
		$since = $node->safe_psql('postgres', 'SELECT clock_timestamp()');
		$node->safe_psql('postgres', $hurry);
	}
	OmniLife::until_true('fourteen outages begin, and the log tells it little by little', sub { grep({ /^outage of server "many\d+" begins/ } lines()) == 14 });
	is(scalar(grep { /has ended/ } lines()), 0, '... and none ends');
	$clock->pass(61);
	$omni->reset;
	$node->safe_psql('postgres', $hurry);
	ok($node->poll_query_until('postgres', "SELECT bool_and(status = 'accepted') $many"), 'they end at once');
	$clock->pass(61);
	OmniLife::until_true('... and the log counts those that it does not tell', sub { (lines())[-1] =~ /^2 more lines/ });
	is(scalar(grep { /has ended/ } lines()), 12, '... which are but a few');
}

# Names

my $server = qq(o"mni\n2026-01-01 LOG:  job 1);
my $role = qq(b"ob\tb);
$node->safe_psql('postgres', qq{
	CREATE ROLE "b""ob\tb" LOGIN;
	CREATE SERVER "o""mni\n2026-01-01 LOG:  job 1" FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url '} . $omni->http . qq{', rate_limit '0');
	GRANT USAGE ON FOREIGN SERVER "o""mni\n2026-01-01 LOG:  job 1" TO PUBLIC;
	CREATE USER MAPPING FOR PUBLIC SERVER "o""mni\n2026-01-01 LOG:  job 1" OPTIONS (api_key '$key')});
begin();
$omni->fault('answer', status => 404);
$id = $node->safe_psql('postgres', qq{SET ROLE "b""ob\tb"; SET omni_refresh.server = E'o"mni\\n2026-01-01 LOG:  job 1'; $queue});
are_told('names', ended($id, 'failed', 'on_commit', qr/42704: /, 'o""mni 2026-01-01 LOG:  job 1', 'b""ob b'));

# The end of the server

$from = length slurp_file($node->logfile);
$node->stop('fast');
unlike(substr(slurp_file($node->logfile), $from), qr/FATAL:  (?!57P01: terminating (?:connection|autovacuum process))/, 'a stop says nothing FATAL');
unlike(slurp_file($node->logfile), qr/\Q$key\E(?!'\))/, 'the key is not in the log');
done_testing();
