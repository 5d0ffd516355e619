# The view omni_refresh_counters: what it counts, once each, for whom, and who can spoil it.

use strict;
use warnings FATAL => 'all';

use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;
use OmniSQL qw(sql);

my $omni = OmniAPI->start;
my $node = OmniFault::node('counters', conf => "omni_refresh.min_interval = 0\nmax_prepared_transactions = 1\n");
my $model = $omni->model;
my $refresh = "SELECT status FROM omni_refresh('$model')";
my %before;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

# The counters of a server that are not 0, without times
sub counters
{
	my ($server, $db) = @_;
	my $condition = defined $server ? "server = '$server'" : 'server IS NULL';
	my $row = decode_json($node->safe_psql($db // 'postgres',
		"SELECT row_to_json(c) FROM omni_refresh_counters AS c WHERE $condition"));

	delete @$row{qw(server since request_time)};
	return $row;
}

# Remembers what has been counted so far ...
sub mark
{
	%before = %{ counters($_[0] // 'omni') };
	return;
}

# ... and checks what is counted since then, for a moment, as what the worker does may be under way.
sub counted
{
	my ($expected, $name, $server) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return OmniFault::poll(sub {
			my $now = counters($server // 'omni');

			return join ', ', map { $now->{$_} == $before{$_} ? () : "$_ " . ($now->{$_} - $before{$_}) } sort keys %$now;
		}, $node, $expected, $name);
}

sub call
{
	my ($settings) = @_;

	return OmniFault::call($node, join('', map { "SET $_;" } @{ $settings // [] }) . "$refresh;");
}

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
OmniFault::server($node, 'slow', url => $omni->http, key => 'another-key', rate_limit => 1);
sql(q{CREATE ROLE monitor LOGIN IN ROLE pg_monitor; CREATE ROLE alice LOGIN; CREATE ROLE bob LOGIN;
	CREATE FOREIGN DATA WRAPPER strange; CREATE SERVER strange FOREIGN DATA WRAPPER strange});

# Who sees what

my $as_monitor = [ '-U', 'monitor' ];
my $names = q{SELECT string_agg(coalesce(server, 'NULL'), ' ' ORDER BY server) FROM omni_refresh_counters};
is(sql($names, extra_params => $as_monitor), 'omni slow NULL', 'pg_monitor sees a row for each server, and one for the rest');
is(sql(q{SELECT count(*) FROM omni_refresh_counters AS c, json_each_text(row_to_json(c))
	WHERE value IS DISTINCT FROM '0' AND key NOT IN ('server', 'since')}), 0, '... of zeros');
is(sql('SELECT count(DISTINCT since), max(since) <= now() FROM omni_refresh_counters'), '1|t', '... since the server started');
for my $statement ('TABLE omni_refresh_counters', 'SELECT omni_refresh_get_counters(0)')
{
	my ($rc, undef, $stderr) = $node->psql('postgres', $statement, extra_params => [ '-U', 'alice' ]);
	like($stderr, qr/permission denied/, "others see nothing: $statement");
}
is(sql('SELECT omni_refresh_get_counters(NULL)'), '', 'no server has no counters');

# Requests, by what becomes of them, and the jobs

mark();
call() for 1 .. 2;
counted('jobs_accepted 2, requests_ok 2', 'calls that are accepted');
is(sql(q{SELECT request_time > 0 AND request_time < 60000 FROM omni_refresh_counters WHERE server = 'omni'}), 't', '... take time');

mark();
$omni->fault('answer', status => 503, times => 2);
call();
counted('jobs_accepted 1, requests_failed 2, requests_ok 1, retried 2', 'what is tried again');

mark();
$omni->fault('answer', status => 429, headers => { 'Retry-After' => '1' });
call();
counted('jobs_accepted 1, requests_ok 1, requests_rate_limited 1, retried 1', 'what Omni has no time for');

mark();
$omni->fault('answer', status => 404);
call();
counted('jobs_failed 1, requests_refused 1', 'what Omni refuses');

mark();
$omni->fault('html_502');
$omni->fault('reset');
call();
counted('jobs_accepted 1, requests_failed 1, requests_ok 1, requests_unanswered 1, retried 2', 'what nobody answers');

mark();
$omni->fault('answer', status => 200, body => '<html>Log in</html>');
call();
counted('jobs_failed 1, requests_failed 1', 'what somebody else answers');

mark();
sql('SELECT count(*) FROM omni_refresh_models(); SELECT count(*) FROM omni_refresh_check()');
counted('lookups 2, requests_ok 2', 'look-ups');

mark('slow');
call([ 'omni_refresh.server = slow' ]);
call([ 'omni_refresh.server = slow', "omni_refresh.call_timeout = '1 s'" ]);
counted('jobs_failed 2, requests_refused 1, throttled 1', 'what must wait for the rate limit', 'slow');

$node->append_conf('postgresql.conf', 'omni_refresh.track = on');
$node->reload;
mark();
sql("SELECT omni_refresh_wait(id) FROM omni_refresh('$model')");
counted('jobs_completed 1, polls 1, requests_ok 2', 'a job that is followed, with one poll');
$omni->set(job_seconds => 3600);
mark();
call();
counted('requests_ok 1', 'a job that runs has no end yet');
$node->append_conf('postgresql.conf', 'omni_refresh.track = off');
$node->reload;
counted('jobs_accepted 1, requests_ok 1', '... unless it is followed no longer');

# Jobs that are ended by others

mark();
sql("BEGIN; SELECT omni_refresh_on_commit('$model'); COMMIT");
counted('jobs_accepted 1, requests_ok 1', 'a queued job');
mark();
sql(OmniFault::equal_jobs("'$model'", 4));
counted('jobs_accepted 1, jobs_merged 3, requests_ok 1', 'jobs that are merged');
sql(q{ALTER SYSTEM SET omni_refresh.min_interval = '1 h'});
$node->reload;
sql("SELECT omni_refresh_on_commit('$model')");
$node->poll_query_until('postgres', q{SELECT count(*) = 1 FROM omni_refresh_job WHERE status = 'pending'}) or die;
mark();
my $cancel = q{PERFORM omni_refresh_cancel(id) FROM omni_refresh_job WHERE status = 'pending'};
my $fail = 'RAISE division_by_zero; EXCEPTION WHEN division_by_zero THEN';
sql("BEGIN; DO \$\$ BEGIN $cancel; END \$\$; ROLLBACK");
sql("DO \$\$ BEGIN $cancel; $fail NULL; END \$\$");
sql("DO \$\$ BEGIN BEGIN $cancel; EXCEPTION WHEN syntax_error THEN NULL; END; $fail NULL; END \$\$");
sql("BEGIN; SAVEPOINT a; SAVEPOINT b; DO \$\$ BEGIN $cancel; END \$\$; RELEASE b; ROLLBACK TO a; COMMIT");
sql("BEGIN; DO \$\$ BEGIN $cancel; END \$\$; PREPARE TRANSACTION 'x'; ROLLBACK PREPARED 'x'");
counted('', 'nobody cancels by a transaction or subtransaction that is rolled back');
my $catch = 'EXCEPTION WHEN syntax_error THEN NULL';
sql("DO \$\$ BEGIN BEGIN BEGIN $cancel; $catch; END; $catch; END; BEGIN $fail NULL; END; $catch; END \$\$");
counted('jobs_canceled 1', '... but by one that commits');
sql('ALTER SYSTEM RESET omni_refresh.min_interval');
$node->reload;

# An outcome that cannot be recorded at once

mark();
$omni->fault('hang');
my $requests = () = $omni->requests(qr/refresh/);
my $call = OmniFault::begin($node, "$refresh;");
$omni->wait_for_requests($requests + 1, qr/refresh/);
my $session = OmniLife::session($node, 'postgres');
$session->query(q{BEGIN; SELECT FROM omni_refresh_job WHERE status = 'sending' FOR UPDATE});
$omni->fault('none');
$node->wait_for_log(qr/could not record the outcome of job \d+, will try again/);
counted('', 'what is not recorded yet is not counted');
$session->query('ROLLBACK');
OmniFault::finish($call);
counted('jobs_accepted 1, requests_ok 1, requests_unanswered 1, retried 1', '... and what is recorded later is counted once');
$session->quit;

# A worker's end, another database, and a server that does not exist

mark();
sql('SELECT pg_terminate_backend(' . OmniFault::worker($node) . ', 60000)');
counted('', 'the counters outlive the worker');
$node->safe_psql('postgres', 'CREATE DATABASE other');
$node->safe_psql('other', 'CREATE EXTENSION omni_refresh');
OmniFault::server($node, 'omni', db => 'other', url => $omni->http, key => $omni->key, rate_limit => 0);
OmniFault::call($node, "$refresh;", db => 'other');
is(counters('omni', 'other')->{requests_ok}, 1, 'each database has counters of its own');
counted('', '... of a server of the same name, too');

sql(q{CREATE SERVER gone FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url 'http://localhost:1'); CREATE USER MAPPING FOR PUBLIC SERVER gone OPTIONS (api_key 'x')});
my $id = sql("BEGIN; SET LOCAL omni_refresh.server = gone; SELECT id FROM omni_refresh_on_commit('$model'); COMMIT");
sql('DROP SERVER gone CASCADE');
$node->poll_query_until('postgres', "SELECT EXISTS (SELECT FROM omni_refresh_job WHERE id = $id AND status = 'pending')") or die;
mark();
%before = %{ counters(undef) };
sql("SELECT omni_refresh_cancel($id)");
is(counters(undef)->{jobs_canceled} - $before{jobs_canceled}, 1, 'what happens to a server that is gone is counted among the rest');

# More servers than there is room for

$omni->reset;
sql(join '', map { qq{
		CREATE SERVER a$_ FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url '} . $omni->http . qq{', rate_limit '0');
		CREATE USER MAPPING FOR PUBLIC SERVER a$_ OPTIONS (api_key '} . $omni->key . qq{');
		SET omni_refresh.server = a$_;
		$refresh;\n} } 1 .. 70);
my $owned = sql(q{SELECT count(*) FROM omni_refresh_counters WHERE requests_ok > 0 AND server LIKE 'a%'});
cmp_ok($owned, '<', 64, 'there is room for a limited number of servers');
is(counters(undef)->{requests_ok}, 70 - $owned, '... and the rest is counted together');
is(sql($names . q{ WHERE requests_ok > 0 AND server IN ('omni', 'slow')}), 'omni', 'a server that was counted before still is');
mark();
call();
counted('jobs_accepted 1, requests_ok 1', '... and goes on');

# The end

my $since = sql(q{SELECT extract(epoch FROM min(since)) FROM omni_refresh_counters});
$node->restart;
is(sql("SELECT sum(requests_ok) || ' ' || bool_and(since > to_timestamp($since)) FROM omni_refresh_counters"), '0 true',
	'counting begins anew with the server');
$node->stop;
is(() = slurp_file($node->logfile) =~ /TRAP:|PANIC:|could not attach the counters/g, 0, 'nothing has crashed');
done_testing();
