# A worker that ends with work left, whoever has ended it, starts its successor: after a while that
# grows with the failures, without preloading, and also while all worker processes are in use.

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
my %options = (conf => "log_min_messages = debug1\nomni_refresh.min_interval = 0\n");
my $clock = OmniClock::build() ? OmniClock->new('successor', %options) : undef;
my $node = $clock ? $clock->node : OmniFault::node('successor', %options);
my $model = $omni->model;
my $refresh = "SELECT status FROM omni_refresh('$model')";
my $queue = "SELECT id FROM omni_refresh_on_commit('$model')";

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0, timeout => '500 s');

sub wait_for
{
	my ($name, $condition, $db) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return ok($node->poll_query_until($db // 'postgres', "SELECT $condition"), $name);
}

sub has_status
{
	my ($name, $id, $status, $db) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return wait_for($name, "status = '$status' FROM omni_refresh_job WHERE id = $id", $db);
}

sub terminate
{
	my ($db) = @_;
	return $node->safe_psql('postgres', q{SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity
		WHERE backend_type = 'omni_refresh worker' AND datname = '} . ($db // 'postgres') . q{'});
}

# Queues a job whose next attempt is seconds away. A 503 makes others with its key wait, too; after
# a 500, the wait is not below 7 s.
sub leave_job
{
	my ($db, $seconds) = @_;

	$omni->fault('answer', status => $seconds < 60 ? 503 : 500, headers => { 'Retry-After' => $seconds }, times => 1);
	my $id = $node->safe_psql($db, $queue);
	has_status("a job waits in $db", "$id AND attempts = 1", 'pending', $db);
	return $id;
}

# Has the time of any rest pass at once, if the clock can be set.
sub end_rest
{
	return if !$clock;
	$clock->pass(300);
	$node->reload;				# wakes what rests: the kernel has its own clock
	return;
}

sub log_since
{
	my ($from) = @_;
	return substr(slurp_file($node->logfile), $from);
}

# Whatever is left

my $id = leave_job('postgres', 3);
my $worker = OmniFault::worker($node);
is(terminate(), 't', 'a worker is terminated while a job waits');
has_status('... its successor sends the job', $id, 'accepted');
isnt(OmniFault::worker($node), $worker, '... by itself');

$omni->reset;
$omni->fault('hang');
$id = $node->safe_psql('postgres', $queue);
$omni->wait_for_requests(1);
terminate();
has_status('a job that is being sent is sent again', $id, 'accepted');

$node->safe_psql('postgres', 'ALTER SYSTEM SET omni_refresh.track = on; SELECT pg_reload_conf()');
$omni->reset;
$id = $node->safe_psql('postgres', $queue);
wait_for('a job runs', "status IN ('running', 'completed') FROM omni_refresh_job WHERE id = $id");
terminate();
has_status('... and is followed to its end', $id, 'completed');
$node->safe_psql('postgres', 'ALTER SYSTEM RESET omni_refresh.track; SELECT pg_reload_conf()');

$omni->reset;
$omni->fault('hang');
my $caller = OmniLife::session($node, 'postgres');
$caller->send($refresh);
$omni->wait_for_requests(1);
$node->safe_psql('postgres', "SELECT pg_terminate_backend($caller->{pid}, 60000)");
$caller->quit;
terminate();
has_status('a call whose caller has left is settled', '(SELECT max(id) FROM omni_refresh_job)', 'unknown');

# A signal, as the operating system may send it

$omni->reset;
$id = leave_job('postgres', 3);
$worker = OmniFault::worker($node);
my $from = length slurp_file($node->logfile);
kill 'TERM', $worker;
has_status('a worker that is ended by a signal has a successor, too', $id, 'accepted');
is(join("\n", log_since($from) =~ /^.*(?:FATAL|ERROR|WARNING).*$/mg), '', '... without an error in the log');
like(log_since($from), qr/LOG:  terminating background worker "omni_refresh worker" due to administrator command/,
	'... which says why');

# An error: a trigger of the tables' owner turns its own into one that ends the process.

$node->safe_psql('postgres', q{
	CREATE SEQUENCE errors;
	CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		IF nextval('public.errors') <= 2 THEN
			SET exit_on_error = on;
			RAISE 'this ends the worker';
		END IF;
		RETURN NEW;
	END $$;
	CREATE TRIGGER fail BEFORE UPDATE ON omni_refresh_job FOR EACH ROW WHEN (NEW.status = 'sending') EXECUTE FUNCTION fail()});
$worker = OmniFault::worker($node);
$from = length slurp_file($node->logfile);
$id = $node->safe_psql('postgres', $queue);
has_status('a worker that ends by an error has a successor, as has that one', $id, 'accepted');
is(() = log_since($from) =~ /FATAL:  this ends the worker$/mg, 2, '... two have ended');
isnt(OmniFault::worker($node), $worker, '... and the third goes on');
$node->safe_psql('postgres', 'DROP TRIGGER fail ON omni_refresh_job');

# A call does not wait for the rest of the successor

$id = leave_job('postgres', 3000);
my $database = $node->safe_psql('postgres', q{SELECT oid FROM pg_database WHERE datname = 'postgres'});
for (1 .. 4)
{
	terminate();	# each ends early: the rest doubles
	OmniLife::until_true('... the next one', sub {
		return 1 if OmniFault::worker($node) ne '';
		end_rest() if OmniLife::rests($database);
		return 0;
	}, 120) if $_ < 4;
}
my $forks = OmniLife::forks($node);
my $call = OmniFault::call($node, "$refresh;");
is($call->{out}, 'accepted', 'a call ends the rest') or diag($call->{err});
is(OmniLife::forks($node), $forks, '... by the worker that rests');
terminate();
is($node->safe_psql('postgres', 'SELECT omni_refresh_wake()'), 't', 'so does omni_refresh_wake()');
wait_for('... at once', q{count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
is($node->safe_psql('postgres', "SELECT omni_refresh_cancel($id)"), 't', 'the job is canceled');
$node->safe_psql('postgres', "ALTER SYSTEM SET omni_refresh.idle_timeout = 0; SELECT pg_reload_conf()");
wait_for('without work, the worker leaves', q{count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
$forks = OmniLife::forks($node);
$node->safe_psql('postgres', 'CHECKPOINT');
is(OmniLife::forks($node), $forks, '... and has no successor');

# The extension is dropped, the database is dropped, or closed

$node->safe_psql('postgres', 'CREATE DATABASE other');
$node->safe_psql('other', 'CREATE EXTENSION omni_refresh');
OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0, db => 'other');
leave_job('other', 600);
$from = length slurp_file($node->logfile);
$forks = OmniLife::forks($node);
$node->safe_psql('other', 'SET client_min_messages = error; DROP EXTENSION omni_refresh CASCADE');
wait_for('the extension is dropped: the worker leaves', q{count(*) = 0 FROM pg_stat_activity WHERE datname = 'other'});
OmniLife::until_true('... a successor comes, and goes', sub {
	(() = log_since($from) =~ /background worker "omni_refresh worker[^"]*" \(PID \d+\) exited with exit code 0/g) == 2 });
is(OmniLife::forks($node), $forks + 1, '... once');

$node->safe_psql('other', 'CREATE EXTENSION omni_refresh');
OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0, db => 'other');
leave_job('other', 600);
$from = length slurp_file($node->logfile);
$forks = OmniLife::forks($node);
$node->safe_psql('postgres', 'DROP DATABASE other');
OmniLife::until_true('the database is dropped: a successor comes, and ends', sub {
	(() = log_since($from) =~ /background worker "omni_refresh worker[^"]*" \(PID \d+\) exited/g) == 2 });
is(OmniLife::forks($node), $forks + 1, '... once');
is(join("\n", log_since($from) =~ /^.*(?:FATAL|ERROR|WARNING).*$/mg), '', '... without an error in the log');

$node->safe_psql('postgres', 'CREATE DATABASE closed');
$node->safe_psql('closed', 'CREATE EXTENSION omni_refresh');
OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0, db => 'closed');
$id = leave_job('closed', 5);
my $session = OmniLife::session($node, 'closed');
$session->query('SELECT count(*) FROM omni_refresh_job');
$node->safe_psql('postgres', 'ALTER DATABASE closed ALLOW_CONNECTIONS false');
$forks = OmniLife::forks($node);
$from = length slurp_file($node->logfile);
my $began = time;
terminate('closed');
OmniLife::until_true('a database is closed: its successors try to come', sub {
	(() = log_since($from) =~ /FATAL:  database "closed" is not currently accepting connections/g) >= 3 });
$session->query($queue) for 1 .. 20;
# One each after 1, 2, 4, ... s
cmp_ok(2 ** (OmniLife::forks($node) - $forks - 1), '<=', time - $began + 2, '... each later than the one before, whatever is queued');
my (undef, $err) = $session->query($refresh);
like($err, qr/^ERROR:  53400: could not start the background worker of omni_refresh/, '... a call learns it');
$node->safe_psql('postgres', 'ALTER DATABASE closed ALLOW_CONNECTIONS true');
is(($session->query('SELECT omni_refresh_wake()'))[0], 't', '... and when it is open again');
has_status('... the job is sent', $id, 'accepted', 'closed');
$session->quit;

# A database that stays closed, for longer than the longest rest

SKIP:
{
	skip 'test/shim/clock.c cannot be compiled', 6 unless $clock;
	$id = leave_job('closed', 3000);
	$node->safe_psql('postgres', 'ALTER DATABASE closed ALLOW_CONNECTIONS false');
	my $oid = $node->safe_psql('postgres', q{SELECT oid FROM pg_database WHERE datname = 'closed'});
	$forks = OmniLife::forks($node, $oid);
	$from = length slurp_file($node->logfile);
	terminate('closed');
	my $given_up = qr/LOG:  could not start a background worker for queued requests\n.*DETAIL:  All attempts have failed for several minutes\.\n.*HINT:  Call omni_refresh_wake\(\)/;
	OmniLife::until_true('when the rest was the longest one, none comes any more', sub {
		end_rest() if OmniLife::rests($oid);
		return log_since($from) =~ $given_up;
	}, 120);
	cmp_ok(OmniLife::forks($node, $oid) - $forks, '>=', 10, '... each but the first has rested longer than the one before');
	$forks = OmniLife::forks($node, $oid);
	$clock->pass(600);
	$node->reload;
	is($node->safe_psql('postgres', $refresh), 'accepted', '... others are served');
	is(OmniLife::forks($node, $oid), $forks, '... and nothing is started');
	$node->safe_psql('postgres', 'ALTER DATABASE closed ALLOW_CONNECTIONS true');
	is($node->safe_psql('closed', 'SELECT omni_refresh_wake()'), 't', '... until it is asked for');
	has_status('... and then the job is sent', $id, 'accepted', 'closed');
}

# A copy is made while a job waits, and the worker comes back by itself: 021_ddl.pl. The successor
# makes way, too.

$id = leave_job('closed', 8);
for my $copy (1 .. 3)
{
	my ($out, $err) = ('', '');
	$node->psql('postgres', "CREATE DATABASE copy$copy TEMPLATE closed", stderr => \$err);
	is($err, '', "copy $copy is made while a job waits");
}
has_status('... which is sent by itself', $id, 'accepted', 'closed');

# A crash

$id = leave_job('postgres', 600);
$node->safe_psql('postgres', 'CHECKPOINT');	# outcomes are flushed by whoever comes next
kill 'KILL', OmniFault::worker($node);
OmniLife::until_true('a server that has crashed is there again', sub { OmniLife::recovered($node) });
is($node->safe_psql('postgres', q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'}), '0',
	'... without a worker');
is($node->safe_psql('postgres', "SELECT omni_refresh_cancel($id)"), 't', '... and the job can be canceled');

# All worker processes are in use: one is PostgreSQL's own, another the launcher's if there is one.

for my $preload (0, 1)
{
	$node->append_conf('postgresql.conf', "omni_refresh.idle_timeout = '10 min'\nmax_worker_processes = " . (2 + $preload) . "\n");
	$node->append_conf('postgresql.conf', "shared_preload_libraries = 'omni_refresh'\n") if $preload;
	$node->restart;
	$omni->reset;
	$id = leave_job('postgres', 5);
	$from = length slurp_file($node->logfile);
	terminate();
	OmniLife::until_true('a worker that cannot start its successor says so', sub {
		log_since($from) =~ /LOG:  could not start a background worker for queued requests$/m });
	if ($preload)
	{
		like(log_since($from), qr/HINT:  The launcher tries again\./, '... and who will');
	}
	else
	{
		like(log_since($from), qr/HINT:  Call omni_refresh_wake\(\)/, '... and what to do');
		is($node->safe_psql('postgres', 'SELECT omni_refresh_wake()'), 't', '... which works');
	}
	has_status('... and the job is sent', $id, 'accepted');
}

$omni->reset;
$omni->fault('hang');
$node->safe_psql('closed', $queue);
$omni->wait_for_requests(1);
my $warning;
$node->psql('postgres', $queue, stdout => \$id, stderr => \$warning);
like($warning, qr/WARNING:  could not start a background worker for queued requests/, 'a commit that cannot start a worker warns');
like($node->safe_psql('postgres', q{SELECT ok, detail FROM omni_refresh_check() WHERE check_name = 'jobs'}),
	qr/^f\|1 pending, .*; there is no background worker$/, '... as does the check');
$omni->fault('none');
has_status('... but the launcher starts it later', $id, 'accepted');

# A stop

$id = leave_job('postgres', 600);
$from = length slurp_file($node->logfile);
$node->stop('fast');
unlike(log_since($from), qr/starting background worker process|FATAL(?!:  terminating (?:connection|autovacuum process))/, 'a server that stops starts no successor, and says nothing FATAL');
OmniLife::clean($node, 'the log is clean', qr/this ends the worker/, qr/is not currently accepting connections/, qr/could not start/, qr/terminated by signal 9/,
	qr/because of crash of another server process/, qr/FATAL:  the database system is/, qr/not properly shut down/);
done_testing();
