# A copy stays silent: what was asked for in one database is never sent from another.

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
my $node = OmniFault::node('original', conf => "wal_level = logical\nmax_wal_senders = 4\nomni_refresh.enabled = off\n");
my $model = $omni->model;
my $queue = "SET omni_refresh.enabled = on; SELECT status FROM omni_refresh_on_commit('$model')";
my $jobs = q{SELECT string_agg(status, ' ' ORDER BY id) FROM omni_refresh_job};
my $all_done = q{SELECT count(*) = 0 FROM omni_refresh_job WHERE status IN ('pending', 'sending')};

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

# Whether a configuration file says on or off; what is queued goes on or is held.
sub enable
{
	my ($on, $value) = @_;

	$on->append_conf('postgresql.conf', "omni_refresh.enabled = $value\n");
	$on->reload;
	return;
}

# What is queued is held while the configuration file says so: the worker has looked and waits.

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
is($node->safe_psql('postgres', "SELECT status FROM omni_refresh_on_commit('$model')"), 'canceled', 'a request that is switched off is canceled');
is($node->safe_psql('postgres', $queue), 'pending', 'what is queued all the same');
is($node->safe_psql('postgres', 'SELECT omni_refresh_wake()'), 't', '... is unfinished');
is($node->safe_psql('postgres', $jobs), 'pending', '... and is held');

# pg_dump, by the superuser and by an owner who is none

$node->safe_psql('postgres', 'CREATE ROLE owner LOGIN; ALTER DATABASE postgres OWNER TO owner; GRANT ALL ON SCHEMA public TO owner');
$node->safe_psql('postgres', 'SET ROLE owner; CREATE TABLE theirs (what text)');
for my $user (scalar getpwuid($<), 'owner')
{
	my $dump = $node->basedir . "/$user.sql";
	$node->command_ok([ 'pg_dump', '-U', $user, '-f', $dump, $node->connstr('postgres') ], "pg_dump by $user");
	unlike(slurp_file($dump), qr/COPY \S*omni_refresh_(?:job|event)\b|pending/, '... takes no jobs along');
	$node->safe_psql('postgres', "CREATE DATABASE restored_$user");
	if ($user eq 'owner')
	{
		$node->safe_psql('restored_owner', 'CREATE EXTENSION omni_refresh; GRANT ALL ON SCHEMA public TO owner');
	}
	# An owner who is no superuser may not restore what is not theirs: psql goes on.
	$node->command_ok([ 'psql', '-XqU', $user, '-f', $dump, $node->connstr("restored_$user") ], '... is restored');
	is($node->safe_psql("restored_$user", "SELECT count(*), to_regclass('theirs') FROM omni_refresh_job"), '0|theirs', '... with all but the jobs');
	is($node->safe_psql("restored_$user", 'SELECT omni_refresh_wake()'), 'f', '... so that there is nothing to send');
}

# CREATE DATABASE ... TEMPLATE. The copy alone is switched on: the worker of the original, which made way, comes back.

$node->safe_psql('template1', 'CREATE DATABASE copied TEMPLATE postgres');
is($node->safe_psql('copied', $jobs), 'pending', 'a template takes the jobs along');
is($node->safe_psql('copied', 'SELECT omni_refresh_wake()'), 'f', '... of which none is its own');
$node->safe_psql('template1', 'ALTER DATABASE copied SET omni_refresh.enabled = on');
$node->safe_psql('template1', q{SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE datname = 'copied' AND backend_type = 'omni_refresh worker'});
is($node->safe_psql('copied', $queue), 'pending', '... it has some of its own');
ok($node->poll_query_until('copied', $all_done), '... which is done');
is($node->safe_psql('copied', $jobs), 'canceled accepted', '... and what is not is canceled');
like($node->safe_psql('copied', q{SELECT error FROM omni_refresh_job WHERE status = 'canceled'}), qr/^55000: the job was asked for in another database, of which this is a copy$/, '... and says why');
is(scalar(() = $omni->requests), 1, '... without having been sent');

# Logical replication of all tables, between two databases that have the same OID

my $subscriber = OmniFault::node('subscriber');
OmniFault::server($subscriber, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
$subscriber->safe_psql('postgres', 'CREATE TABLE theirs (what text)');
$node->safe_psql('postgres', q{CREATE PUBLICATION everything FOR ALL TABLES; INSERT INTO theirs VALUES ('first')});
is($subscriber->safe_psql('postgres', 'SELECT oid FROM pg_database WHERE datname = current_database()'),
	$node->safe_psql('postgres', 'SELECT oid FROM pg_database WHERE datname = current_database()'), 'two databases of one OID');
$omni->reset;
$subscriber->safe_psql('postgres', 'CREATE SUBSCRIPTION everything CONNECTION $$' . $node->connstr('postgres') . '$$ PUBLICATION everything');
ok($subscriber->poll_query_until('postgres', q{SELECT count(*) = 1 FROM theirs}), '... one of which subscribes to the other');
is($node->safe_psql('postgres', $queue), 'pending', '... the first has another request');
$node->safe_psql('postgres', q{INSERT INTO theirs VALUES ('second')});
ok($subscriber->poll_query_until('postgres', q{SELECT count(*) = 2 FROM theirs}), '... and the second has its rows');
is($subscriber->safe_psql('postgres', 'SELECT count(*) FROM omni_refresh_job'), '0', '... but for the jobs');
is($subscriber->safe_psql('postgres', "SELECT omni_refresh_wake(), id FROM omni_refresh('$model')"), 'f|1', '... it has jobs of its own');
is($subscriber->safe_psql('postgres', 'SELECT count(*) FROM omni_refresh_event'), '2', '... and events');
is(scalar(() = $omni->requests), 1, '... which alone are sent');

# Both databases number their jobs from 1: rows of the publisher that change or go are not to be
# taken for the subscriber's rows of the same ids, whichever columns identify a row.

my $rows = q{
	SELECT string_agg(concat_ws(' ', 'job', id, status, error), ', ' ORDER BY id) FROM omni_refresh_job
	UNION ALL
	SELECT string_agg(concat_ws(' ', 'event', id, event, detail), ', ' ORDER BY id) FROM omni_refresh_event};
for my $identity ('DEFAULT', 'FULL')
{
	for my $on ($node, $subscriber)
	{
		my $name = $on->name;
		$on->safe_psql('postgres', qq{
			ALTER TABLE omni_refresh_job REPLICA IDENTITY $identity;
			ALTER TABLE omni_refresh_event REPLICA IDENTITY $identity;
			INSERT INTO omni_refresh_job (id, status, model_id, kind, server, origin, requested_by, requested_by_oid,
				requested_at, run_at, finished_at, database, error) OVERRIDING SYSTEM VALUE
			SELECT i, 'failed', '$model', 'schema', 'omni', 'call', current_user, 10, now(), now(), now(), 1, '$name'
			FROM generate_series(1001, 1003) AS i;
			INSERT INTO omni_refresh_event (id, job, requested_by, requested_by_oid, occurred_at, event, detail) OVERRIDING SYSTEM VALUE
			SELECT i, i, current_user, 10, now(), 'failed', '$name' FROM generate_series(1001, 1003) AS i});
	}
	my $kept = $subscriber->safe_psql('postgres', $rows);
	like($kept, qr/job 1001 failed subscriber, .*event 1001 failed subscriber, /s, "the subscriber has rows of the same ids, identity $identity");
	$node->safe_psql('postgres', q{
		UPDATE omni_refresh_job SET error = 'changed' WHERE id = 1001;
		UPDATE omni_refresh_event SET detail = 'changed' WHERE id = 1001;
		DELETE FROM omni_refresh_event WHERE id = 1002;
		DELETE FROM omni_refresh_job WHERE id = 1003;
		INSERT INTO theirs VALUES ('changes')});
	my $markers = $node->safe_psql('postgres', 'SELECT count(*) FROM theirs');
	ok($subscriber->poll_query_until('postgres', "SELECT count(*) = $markers FROM theirs"), '... and has got all changes');
	is($subscriber->safe_psql('postgres', $rows), $kept, '... but for those of the jobs and events');
	$_->safe_psql('postgres', 'DELETE FROM omni_refresh_job WHERE id >= 1001') for $node, $subscriber;
	is($subscriber->safe_psql('postgres', 'SELECT count(*) FROM omni_refresh_event WHERE id >= 1001'), '0', '... which it can delete by itself');
}
$subscriber->safe_psql('postgres', 'DROP SUBSCRIPTION everything');

# The original

enable($node, 'on');
$node->safe_psql('postgres', 'SELECT omni_refresh_wake()');
ok($node->poll_query_until('postgres', $all_done), 'the original sends what it has queued');
is($node->safe_psql('postgres', $jobs), 'accepted merged', '... once');
is(scalar(() = $omni->requests), 2, '... and merged');

# pg_upgrade, with the library preloaded on both sides

enable($node, 'off');
is($node->safe_psql('postgres', $queue), 'pending', 'something is left');
my $history = q{SELECT string_agg(concat_ws(' ', job, id, event, occurred_at, detail), ';' ORDER BY id) FROM omni_refresh_event};
my $events = $node->safe_psql('postgres', $history);
$node->stop('fast');
my $upgraded = OmniNode->new('upgraded');
$upgraded->init(extra => [ '--encoding=UTF8', '--no-locale' ]);
$_->append_conf('postgresql.conf', "shared_preload_libraries = 'omni_refresh'\nomni_refresh.enabled = on\nomni_refresh.track = off\n") for $node, $upgraded;
chomp(my $bindir = `pg_config --bindir`);
$omni->reset;
chdir PostgreSQL::Test::Utils::tempdir or die;
$upgraded->command_ok([ 'pg_upgrade', '-d', $node->data_dir, '-D', $upgraded->data_dir, '-b', $bindir, '-B', $bindir,
		'-s', $node->host, '-p', $node->port, '-P', $upgraded->port ], 'pg_upgrade');
is(scalar(() = $omni->requests), 0, '... sends nothing meanwhile');
$upgraded->start;
ok($upgraded->poll_query_until('postgres', $all_done), '... what is left goes on afterwards');
is($upgraded->safe_psql('postgres', $jobs), 'accepted merged accepted', '... of all there was');
like($upgraded->safe_psql('postgres', $history), qr/\A\Q$events\E;/, '... with their events');
is(scalar(() = $omni->requests), 1, '... once');

$_->stop('fast') for $subscriber, $upgraded;
OmniLife::clean($node, 'the log is clean', qr/terminating connection|ERROR|no privileges were granted|connection to client lost/);
done_testing();
