# omni_refresh_wait(): until the end of a job, for those who may, and no longer than they want.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

use OmniAPI;
use OmniFault;
use OmniLife;
use OmniNode;
use OmniSQL qw(sql);

my $omni = OmniAPI->start;
my $node = OmniFault::node('wait', conf => "omni_refresh.track = on\nomni_refresh.min_interval = 0\nmax_connections = 60\nmax_wal_senders = 4\nhot_standby = on\n");
my $model = $omni->model;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);

sub queue
{
	my ($settings) = @_;

	return sql(($settings ? "SET $settings;" : '') . "SELECT id FROM omni_refresh_on_commit('$model')");
}

sub wait_sql
{
	my ($id, $timeout) = @_;

	return "SELECT id, status FROM omni_refresh_wait($id" . (defined $timeout ? ", '$timeout')" : ')');
}

# Queues a job that runs until finish() lets it end; returns its number.
sub running
{
	my $id = queue();

	$node->poll_query_until('postgres', "SELECT status = 'running' FROM omni_refresh_job WHERE id = $id") or die;
	return $id;
}

# Lets Omni say what has become of jobs.
sub finish
{
	my ($status, @ids) = @_;

	$omni->fault('answer', path => sql("SELECT job_id FROM omni_refresh_job WHERE id = $_"), status => 200, body => qq({"status": "$status"}))
		for @ids;
	sql(q{UPDATE omni_refresh_job SET run_at = clock_timestamp() WHERE status = 'running'; SELECT omni_refresh_wake()});
	return;
}

# Starts to wait in a session of its own, until it is seen to.
sub begin
{
	my ($sql, $app, %options) = @_;
	my $call = OmniFault::begin($node, "$sql;", %options, app => $app);

	$call->{backend} = OmniFault::wait_until_waiting($node, $app);
	return $call;
}

# Waits for the end of a session; returns how long that was after a time.
sub took
{
	my ($call, $since) = @_;

	OmniFault::finish($call);
	return Time::HiRes::time - $since;
}

$omni->set(job_seconds => 1000);

# To the end

my $id = running();
my $call = begin(wait_sql($id), 'end');
finish('COMPLETED', $id);
$node->poll_query_until('postgres', "SELECT status = 'completed' FROM omni_refresh_job WHERE id = $id");
my $since = Time::HiRes::time;
my $seconds = took($call, $since);
is("$call->{out}$call->{err}", "$id|completed", 'who waits gets the job when it is completed');
cmp_ok($seconds, '<', 1, '... within a second');
$call = OmniFault::call($node, wait_sql($id) . ';');
is("$call->{out}$call->{err}", "$id|completed", 'who comes later gets it, too');
cmp_ok($call->{seconds}, '<', 0.5, '... at once');
is(sql("SELECT (SELECT j FROM omni_refresh_job j WHERE id = $id) = (SELECT w FROM omni_refresh_wait($id) w)"), 't', '... the row as it is');
is(sql(wait_sql($id, '0')), "$id|completed", '... also by a timeout of 0');
is(sql("BEGIN READ ONLY; " . wait_sql($id) . '; COMMIT'), "$id|completed", '... in a transaction that is read-only');

$id = running();
$call = begin(wait_sql($id), 'failed');
finish('FAILED', $id);
took($call, 0);
is("$call->{out}$call->{err}", "$id|failed", 'a job that failed is no error of who waits');

# From the queue on

$omni->fault('hang');
$id = queue();
$omni->wait_for_requests(1, qr/refresh/);
$call = begin(wait_sql($id), 'progress');
$omni->set(job_seconds => 0);
$omni->fault('none');
took($call, 0);
is($call->{out}, "$id|completed", 'who waits from the sending on gets the end');
like($call->{err}, qr/NOTICE:  00000: job $id is running$/m, '... and is told on the way');
is(() = $call->{err} =~ /is running/g, 1, '... once');
$omni->reset;
$omni->set(job_seconds => 1000);

# Merged jobs

my ($carrier, $merged) = split /\n/, sql("SELECT id FROM omni_refresh_on_commit('$model', hard => false) UNION ALL SELECT id FROM omni_refresh_on_commit('$model')");
$node->poll_query_until('postgres', "SELECT status = 'running' FROM omni_refresh_job WHERE id = $carrier") or die;
is(sql("SELECT status, merged_into FROM omni_refresh_job WHERE id = $merged"), "merged|$carrier", 'of a job that was merged');
$call = begin(wait_sql($merged), 'merged');
finish('COMPLETED', $carrier);
took($call, 0);
is("$call->{out}$call->{err}", "$carrier|completed", '... the one that carries it out is waited for, and returned');
sql("DELETE FROM omni_refresh_job WHERE id = $carrier");
$call = OmniFault::call($node, wait_sql($merged) . ';');
is("$call->{out}$call->{err}", "$merged|merged", '... unless it is gone');

# Timeouts

$id = running();
for my $timeout ('0', '0.2 s', '-1 month 30 days 200 ms')
{
	$call = OmniFault::call($node, wait_sql($id, $timeout) . ';');
	is($call->{out}, "$id|running", "after a timeout the row is returned as it is: $timeout");
	like($call->{err}, qr/WARNING:  01000: timed out waiting for job $id\nDETAIL:  The job is running\.\nHINT: /, '... with a warning');
	cmp_ok($call->{seconds}, '>=', $timeout eq '0' ? 0 : 0.19, '... not sooner');
	cmp_ok($call->{seconds}, '<', 2, '... nor much later');
}
for my $case ([ "'-1 s'", '22023' ], [ "'-1 month 29 days'", '22023' ], [ 'NULL', '22004' ])
{
	my ($timeout, $sqlstate) = @$case;
	$call = OmniFault::call($node, "SELECT omni_refresh_wait($id, $timeout);");
	is($call->{sqlstate}, $sqlstate, "a timeout that is none: $timeout");
	like($call->{message}, qr/^timeout must not be /, '... which the message says');
}
$call = OmniFault::call($node, 'SELECT omni_refresh_wait(NULL);');
is("$call->{sqlstate} $call->{message}", '22004 id must not be null', 'a job must be named');
for my $unknown (0, -1, 1000000, '9223372036854775807')
{
	$call = OmniFault::call($node, wait_sql($unknown) . ';');
	is("$call->{sqlstate} $call->{message}", "42704 job $unknown does not exist", "... which there is: $unknown");
}
my $version = sql('SHOW server_version_num');
my @long = map { begin(wait_sql($id, $_), "long" . length) } '178000000 years', ($version >= 170000 ? 'infinity' : '100000 years');
is(scalar(@long), 2, 'a timeout may be as long as there are');
for (@long)
{
	sql("SELECT pg_cancel_backend($_->{backend})");
	took($_, 0);
}

# Who may

sql(q{CREATE ROLE asker LOGIN; CREATE ROLE stranger LOGIN; CREATE ROLE member LOGIN IN ROLE asker; CREATE ROLE monitor LOGIN IN ROLE pg_monitor;
	CREATE ROLE apart LOGIN NOINHERIT IN ROLE asker; CREATE ROLE boss LOGIN SUPERUSER});
my $theirs = sql("SET ROLE asker; SELECT id FROM omni_refresh_on_commit('$model')");
$node->poll_query_until('postgres', "SELECT status = 'running' FROM omni_refresh_job WHERE id = $theirs") or die;
for my $role (qw(stranger monitor apart))
{
	$call = OmniFault::call($node, wait_sql($theirs) . ';', user => $role);
	like("$call->{out}$call->{sqlstate}", qr/^42(501|704)$/, "others may not wait: $role");
	cmp_ok($call->{seconds}, '<', 1, '... which they learn at once');
}
$call = OmniFault::call($node, wait_sql($id, '0') . ';', user => 'asker');
like("$call->{out}$call->{sqlstate}", qr/^42(501|704)$/, '... nor may the one for what a superuser asked');
for my $role (qw(asker member boss))
{
	$call = OmniFault::call($node, wait_sql($theirs, '0') . ';', user => $role);
	is($call->{out}, "$theirs|running", "the requester may, and who is as he is: $role");
}
is(sql("SET ROLE apart; SET ROLE asker; SET client_min_messages = error; " . wait_sql($theirs, '0')), "$theirs|running", '... or becomes him');
sql('CREATE ROLE owner LOGIN; GRANT CREATE ON SCHEMA public TO owner; ALTER TABLE omni_refresh_job OWNER TO owner; ALTER TABLE omni_refresh_event OWNER TO owner');
$call = OmniFault::call($node, wait_sql($theirs, '0') . ';', user => 'owner');
is($call->{out}, "$theirs|running", '... or owns the table');
sql('ALTER TABLE omni_refresh_job OWNER TO boss; ALTER TABLE omni_refresh_event OWNER TO boss');

# A job of one's own transaction

for my $case (
	[ 'a transaction', 'BEGIN', 'COMMIT' ], [ 'one with a savepoint', 'BEGIN; SAVEPOINT s', 'COMMIT' ],
	[ 'one with a savepoint that is released', 'BEGIN; SAVEPOINT s', 'COMMIT', 'RELEASE s' ],
	[ 'one that sees a snapshot of its own', 'BEGIN ISOLATION LEVEL REPEATABLE READ', 'COMMIT' ])
{
	my ($name, $begin, $end, $between) = @$case;
	$call = OmniFault::call($node, "$begin; SELECT id AS mine FROM omni_refresh_on_commit('$model') \\gset\n"
		  . ($between ? "$between;" : '') . 'SELECT omni_refresh_wait(:mine);');
	is($call->{sqlstate}, '55000', "nobody waits for a job of $name, who is in it");
	like($call->{hint}, qr/Commit first/, '... as the hint says');
	cmp_ok($call->{seconds}, '<', 1, '... at once');
}
$call = OmniFault::call($node, qq{
	DO \$\$
	DECLARE
		mine bigint;
	BEGIN
		BEGIN
			SELECT id INTO mine FROM omni_refresh_on_commit('$model');
			PERFORM omni_refresh_wait(mine);
		EXCEPTION WHEN object_not_in_prerequisite_state THEN
			RAISE NOTICE 'caught';
		END;
		BEGIN
			SELECT id INTO mine FROM omni_refresh_on_commit('$model');
		EXCEPTION WHEN division_by_zero THEN NULL;
		END;
		PERFORM omni_refresh_wait(mine);
	END
	\$\$;});
is($call->{sqlstate}, '55000', '... nor for one of a block with exceptions');
like($call->{err}, qr/NOTICE:  00000: caught/, '... in which that can be caught');
$call = OmniFault::call($node, "BEGIN; SELECT id AS mine FROM omni_refresh_on_commit('$model') \\gset\nSELECT omni_refresh_cancel(:mine); SELECT status FROM omni_refresh_wait(:mine); ROLLBACK;");
is($call->{out}, "t\ncanceled", '... but one that is at its end is there at once');

# What a snapshot does not show

for my $level ('READ COMMITTED', 'REPEATABLE READ', 'SERIALIZABLE')
{
	$id = running();
	$call = begin("BEGIN ISOLATION LEVEL $level; SELECT count(*) FROM omni_refresh_job WHERE false; " . wait_sql($id), 'snapshot');
	finish('COMPLETED', $id);
	took($call, 0);
	is("$call->{out}$call->{err}", "0\n$id|completed", "the end is seen under $level");
}

# Those who do not wait to the end

$id = running();
my %ends = (
	cancel => [ sub { sql("SELECT pg_cancel_backend($_[0])") }, '57014' ],
	terminate => [ sub { sql("SELECT pg_terminate_backend($_[0])") }, '57P01' ],
	statement_timeout => [ sub { }, '57014', q{SET statement_timeout = '500 ms'; } ]);
for my $end (sort keys %ends)
{
	my ($how, $sqlstate, $before) = @{ $ends{$end} };
	for my $block (0, 1)
	{
		my $sql = $block ? "DO 'BEGIN PERFORM omni_refresh_wait($id); EXCEPTION WHEN OTHERS THEN RAISE NOTICE ''swallowed''; END'" : wait_sql($id);
		$call = begin(($before // '') . $sql, $end);
		$since = Time::HiRes::time;
		$how->($call->{backend});
		$seconds = took($call, $since);
		is($call->{sqlstate}, $sqlstate, "who waits can be ended by $end" . ($block ? ', also in a block that catches others' : ''));
		cmp_ok($seconds, '<', 2, '... at once');
	}
}
$call = begin(wait_sql($id), 'client');
OmniFault::kill_client($call);
ok($node->poll_query_until('postgres', "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $call->{backend}"), 'a client that leaves is missed');
is(sql("SELECT status FROM omni_refresh_job WHERE id = $id"), 'running', '... none of which ends the job');

# A job that is deleted

$call = begin(wait_sql($id), 'deleted');
sql("DELETE FROM omni_refresh_job WHERE id = $id");
took($call, 0);
is("$call->{sqlstate} $call->{message}", "42704 job $id does not exist", 'who waits for a job that is deleted is told');

# One that is canceled

$omni->fault('answer', status => 503, headers => { 'Retry-After' => 3 });
$id = queue();
$node->poll_query_until('postgres', "SELECT status = 'pending' AND attempts = 1 FROM omni_refresh_job WHERE id = $id") or die;
$call = begin(wait_sql($id), 'canceled');
is(sql("SELECT omni_refresh_cancel($id)"), 't', 'a job that is waited for can be canceled');
took($call, 0);
is("$call->{out}$call->{err}", "$id|canceled", '... which is its end');
$node->restart;					# the limiter forgets the pause

# No worker

sql('DELETE FROM omni_refresh_job');
is(OmniFault::worker($node), '', 'after a restart there is no worker');
my $held = sql("INSERT INTO omni_refresh_job (status, model_id, kind, hard, server, origin, requested_by, requested_by_oid, requested_at, run_at, database)
	SELECT 'pending', '$model', 'schema', true, 'omni', 'on_commit', current_user, r.oid, now(), now(), d.oid
	FROM pg_roles r, pg_database d WHERE rolname = current_user AND datname = current_database() RETURNING id");
$omni->set(job_seconds => 0);
$call = OmniFault::call($node, wait_sql($held, '20 s') . ';');
is($call->{out}, "$held|completed", '... who waits starts one');
$omni->set(job_seconds => 1000);
$id = running();
$call = begin(wait_sql($id), 'worker');
sql(q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
$omni->fault('answer', path => '/jobs/', status => 200, body => '{"status": "COMPLETED"}', times => -1);
sql(q{UPDATE omni_refresh_job SET run_at = clock_timestamp() WHERE status = 'running'});
took($call, 0);
is("$call->{out}$call->{err}", "$id|completed", '... or, when it ends meanwhile, another one');
$omni->fault('none');

# Many

$id = running();
my @calls = map { OmniFault::begin($node, wait_sql($id) . ';', app => 'many') } 1 .. 30;
ok($node->poll_query_until('postgres', q{SELECT count(*) = 30 FROM pg_stat_activity WHERE application_name = 'many' AND wait_event_type = 'Extension'}), 'thirty wait for one job');
$since = Time::HiRes::time;
finish('COMPLETED', $id);
took($_, 0) for @calls;
is(scalar(grep { "$_->{out}$_->{err}" eq "$id|completed" } @calls), 30, '... and all get it');
cmp_ok(Time::HiRes::time - $since, '<', 3, '... soon');
my @ids = map { running() } 1 .. 5;
$call = begin(join('; ', map { wait_sql($_) } @ids), 'several');
finish('COMPLETED', @ids);
took($call, 0);
is($call->{out}, join("\n", map { "$_|completed" } @ids), 'one can wait for several, one after the other');

# A standby

$id = sql('SELECT max(id) FROM omni_refresh_job');
$omni->fault('none');
my $unfinished = running();
$node->backup('backup');
my $standby = OmniNode->new('standby');
$standby->init_from_backup($node, 'backup', has_streaming => 1);
$standby->start;
is($standby->safe_psql('postgres', wait_sql($id)), "$id|completed", 'on a standby there is what is at its end');
like($standby->safe_psql('postgres', "CALL omni_refresh_await($id)"), qr/^\($id,completed,/, '... for the procedure, too');
$call = OmniFault::call($standby, wait_sql($unfinished, '300 ms') . ';');
is("$call->{out} $call->{sqlstate}", "$unfinished|running 01000", '... what is not can be waited for');
# Not by the function: replay may have to wait for its snapshot, and cancels it in the end.
$call = OmniFault::begin($standby, "CALL omni_refresh_await($unfinished, '2 min');", app => 'there');
OmniFault::wait_until_waiting($standby, 'there');
finish('COMPLETED', $unfinished);
took($call, 0);
like("$call->{out}$call->{err}", qr/^\($unfinished,completed,/, '... to its end');
is(OmniFault::worker($standby), '', '... without a worker');
$standby->stop('fast');

# No room for a worker

$node->append_conf('postgresql.conf', "max_worker_processes = 1\n");	# which is PostgreSQL's own
$node->restart;
$call = OmniFault::call($node, wait_sql(queue(), '300 ms') . ';');
like($call->{err}, qr/\A.*WARNING:  53400: no background worker is available\n(?:.*\n)*.*WARNING:  01000: timed out waiting for job \d+\nDETAIL:  The job is pending\.\n/,
	'who waits where no worker can be had is told, once');
is(scalar(() = $call->{err} =~ /WARNING/g), 2, '... and what has become of the job');

ok(index(slurp_file($node->logfile), $omni->key) < 0, 'the key is not in the log');
$node->stop('fast');
# This script updates rows that the worker may be about to write.
OmniLife::clean($node, 'the log is clean', qr/connection to client lost/, qr/could not record the outcome of job \d+, will try again: another session holds a lock/, qr/WARNING:  timed out waiting for job \d+/, qr/WARNING:  .*no background worker is available/);
done_testing();
