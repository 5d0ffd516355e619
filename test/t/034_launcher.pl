# What is queued goes on after a crash, a restart and a promotion: with the next request, when
# somebody says so, or, if the library is preloaded, by itself.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;
use OmniNode;

my $omni = OmniAPI->start;
my $node = OmniFault::node('main', conf => "log_min_messages = debug1\nomni_refresh.min_interval = 0\nmax_wal_senders = 4\nhot_standby = on\n");
my $model = $omni->model;
my $refresh = "SELECT status FROM omni_refresh('$model')";
my $queue = "SELECT id FROM omni_refresh_on_commit('$model')";
my $worker_is = q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'};

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);

sub wait_for
{
	my ($name, $condition, $on, $db) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return ok(($on // $node)->poll_query_until($db // 'postgres', "SELECT $condition"), $name);
}

# Leaves one job that was being sent when the server crashed, and one that nobody has seen.
sub leave_behind
{
	$omni->reset;
	$omni->fault('hang');
	my $id = $node->safe_psql('postgres', $queue);
	$omni->wait_for_requests(1);
	$node->safe_psql('postgres', "INSERT INTO omni_refresh_job (status, model_id, kind, hard, server, origin, requested_by,
			requested_by_oid, requested_at, run_at, database)
		SELECT 'pending', gen_random_uuid(), kind, hard, server, origin, requested_by, requested_by_oid, now(), now(), database
		FROM omni_refresh_job WHERE id = $id");
	return $id;
}

sub story
{
	my ($id, $on) = @_;

	return ($on // $node)->safe_psql('postgres', "SELECT string_agg(event, ' ' ORDER BY id) FROM omni_refresh_event WHERE job = $id");
}

my $all_done = q{count(*) = 0 FROM omni_refresh_job WHERE status IN ('pending', 'sending')};
my $recovered = 'sending recovered sending accepted';

# Without the launcher

is($node->safe_psql('postgres', 'SELECT omni_refresh_wake()'), 'f', 'when nothing is unfinished there is nothing to wake');
is($node->safe_psql('postgres', $worker_is), '0', '... and no worker starts');
for my $mode ('immediate', 'fast')
{
	my $id = leave_behind();
	$node->stop($mode);
	$node->start;
	is($node->safe_psql('postgres', $worker_is), '0', "after a stop ($mode) nobody looks at the queue");
	is($node->safe_psql('postgres', 'SELECT omni_refresh_wake()'), 't', '... until somebody wakes the worker');
	wait_for('... then all of it is sent', $all_done);
	is(story($id), $recovered, '... also what was being sent');
}
is($node->safe_psql('postgres', 'SELECT omni_refresh_wake()'), 'f', '... and then there is nothing left');

# A standby

$node->safe_psql('postgres', q{CREATE ROLE replicator REPLICATION LOGIN});
$node->backup('backup');
my $standby = OmniNode->new('standby');
$standby->init_from_backup($node, 'backup', has_streaming => 1);
$standby->start;
my $forks = OmniLife::forks($standby);
for my $call ("omni_refresh('$model')", "omni_refresh_on_commit('$model')", 'omni_refresh_wake()')
{
	my ($out, $err);
	$standby->psql('postgres', "\\set VERBOSITY verbose\nSELECT * FROM $call", stderr => \$err);
	like($err, qr/ERROR:  25006: cannot send requests to Omni during recovery\nHINT:  Call the function on the primary\./, "a standby refuses $call");
}
is(OmniLife::forks($standby), $forks, '... without a worker');
my $id = leave_behind();
$node->wait_for_catchup($standby);
$node->stop('immediate');
$omni->reset;
$standby->promote;
is($standby->safe_psql('postgres', 'SELECT omni_refresh_wake()'), 't', 'a promoted one goes on when it is woken');
wait_for('... and sends all', $all_done, $standby);
is(story($id, $standby), $recovered, '... also what the old primary was about to send');
$standby->stop;

# With the launcher

$node->append_conf('postgresql.conf', "shared_preload_libraries = 'omni_refresh'\n");
$node->start;
wait_for('with the library preloaded, what is left goes on by itself', $all_done);
is(story($id), $recovered, '... also what was being sent');
$node->safe_psql('postgres', "CREATE DATABASE $_") for qw(without idle busy closed);
$node->safe_psql($_, 'CREATE EXTENSION omni_refresh') for qw(idle busy closed);
OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0, db => 'busy');
is($node->safe_psql('busy', $refresh), 'accepted', 'calls are as ever');
$node->safe_psql('busy', "INSERT INTO omni_refresh_job (status, model_id, kind, hard, server, origin, requested_by,
		requested_by_oid, requested_at, run_at, database)
	SELECT 'pending', model_id, kind, hard, server, 'on_commit', requested_by, requested_by_oid, now(), now(), database FROM omni_refresh_job");
$node->safe_psql('postgres', 'ALTER DATABASE closed ALLOW_CONNECTIONS false');
$node->stop('fast');
my $before = length slurp_file($node->logfile);
$node->start;
wait_for('after a start the worker is there where there is something to do',
	q{count(*) = 1 AND bool_and(datname = 'busy') FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
wait_for('... which is done', $all_done, $node, 'busy');
my $log = substr(slurp_file($node->logfile), $before);
OmniLife::until_true('... it looks into each database', sub { ($log = substr(slurp_file($node->logfile), $before)) =~ /(starting background worker process "omni_refresh worker.*){4}/s });
is(scalar(() = $log =~ /starting background worker process "omni_refresh worker/g), 4, '... once, but not where nobody can connect');
is(join("\n", $log =~ /.*(?:ERROR|FATAL|WARNING|omni_refresh.*exited with exit code [1-9]).*/g), '', '... and nothing of that is an error');
is($node->safe_psql('idle', 'SELECT count(*) FROM omni_refresh_job'), '0', '... or leaves a trace');

$id = leave_behind();
kill 'KILL', OmniFault::worker($node);
$node->poll_query_until('postgres', 'SELECT true');
wait_for('after a crash the launcher is there again, and what was being sent goes on', $all_done);
is(story($id), $recovered, '... as the events tell');
is($node->safe_psql('postgres', q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'omni_refresh launcher'}), '1', '... with one launcher');

$standby = OmniNode->new('ready');
$node->backup('ready');
$standby->init_from_backup($node, 'ready', has_streaming => 1);
$standby->start;
$id = leave_behind();
$node->wait_for_catchup($standby);
is($standby->safe_psql('postgres', q{SELECT count(*) FROM pg_stat_activity WHERE backend_type ~ 'omni_refresh'}), '0', 'on a standby there is no launcher');
$node->stop('immediate');
$omni->reset;
$standby->promote;
wait_for('... but after its promotion, and what is queued goes on by itself', $all_done, $standby);
is(story($id, $standby), $recovered, '... also what the old primary was about to send');

# When there is no room for its workers, it waits

$standby->append_conf('postgresql.conf', "max_worker_processes = 2\n");	# the logical replication launcher's and ours
$standby->restart;
is($standby->safe_psql('postgres', q{SELECT count(*) FROM pg_stat_activity WHERE backend_type ~ 'omni_refresh'}), '1', 'without room for a worker the launcher waits');
$standby->stop('fast');
OmniLife::clean($standby, 'the log is clean', qr/terminating (connection|walreceiver)/, qr/could not (receive data from|connect to)/, qr/the database system is/, qr/invalid record length/);
done_testing();
