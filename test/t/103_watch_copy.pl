# A copy of a watch is inert, whatever made it: a dump, a template, replication. It says so.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;
use OmniNode;
use OmniWatch;

my $watch = OmniWatch->new('original', conf => "wal_level = logical\nmax_wal_senders = 4\n");
my $node = $watch->node;
my $omni = $watch->omni;
my $check = q{SELECT concat_ws(' ', ok, detail, hint) FROM omni_refresh_check() WHERE check_name LIKE 'watch%'};
my $inert = qr/^f model \S+, server "omni": inactive, since it was copied from another database Call omni_refresh_watch\(\) again, or omni_refresh_unwatch\(\)\.$/;
my $call = 'SELECT FROM ' . $watch->call;

END { my $rc = $?; $watch->stop if $watch; $? = $rc; }

# Whether DDL in a database asks for nothing. A queued request shows that the worker has looked.
sub is_inert
{
	my ($on, $db, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$on->safe_psql($db, 'CREATE TABLE sales.copy (); SELECT omni_refresh_wake()');
	$on->safe_psql($db, q{SELECT FROM omni_refresh_on_commit('} . $omni->model . q{')});
	$on->poll_query_until($db, q{SELECT count(*) = 0 FROM omni_refresh_job WHERE status IN ('pending', 'sending')});
	is($on->safe_psql($db, q{SELECT count(*) FROM omni_refresh_job WHERE origin = 'ddl' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())}), '0', $name);
	like($on->safe_psql($db, $check), $inert, '... and omni_refresh_check() says so');
	return;
}

$watch->set;
like($watch->sql($check), qr/^t model \S+, server "omni": active$/, 'a watch is active');

# pg_dump, by the superuser and by an owner who is none; in a database of another OID, and of the same

$watch->sql('CREATE ROLE owner LOGIN');
my $dump = $node->basedir . '/dump.sql';
$node->command_ok([ 'pg_dump', '-f', $dump, $node->connstr('postgres') ], 'pg_dump');
like(slurp_file($dump), qr/COPY public\.omni_refresh_watch /, '... takes the watch along');
unlike(slurp_file($dump), qr/omni_refresh_watch_seen/, '... but not its memory');
$node->command_ok([ 'pg_dump', '-U', 'owner', '-t', 'omni_refresh_watch', '-f', $node->basedir . '/owner.sql', $node->connstr('postgres') ], '... as anybody may');
$watch->sql('CREATE DATABASE restored');
$node->command_ok([ 'psql', '-XqAtv', 'ON_ERROR_STOP=1', '-f', $dump, $node->connstr('restored') ], '... it is restored');
is($node->safe_psql('restored', 'SELECT evtenabled FROM pg_event_trigger'), 'D', '... with the event trigger disabled');
is_inert($node, 'restored', '... where it is inert');

my $other = OmniFault::node('other', extension => 0, conf => "omni_refresh.min_interval = 0\n");
$other->safe_psql('postgres', 'CREATE ROLE reader; CREATE ROLE owner');
$other->command_ok([ 'psql', '-XqAt', '-f', $dump, $other->connstr('postgres') ], 'in another cluster, in a database of the same OID');
is($other->safe_psql('postgres', 'SELECT database = (SELECT oid FROM pg_database WHERE datname = current_database()) FROM omni_refresh_watch'), 't', '... as the watch has');
like($other->safe_psql('postgres', $check), qr/^f model \S+, server "omni": inactive/, '... it is inert');
$other->safe_psql('postgres', $call);
like($other->safe_psql('postgres', $check), qr/^t .*: active$/, '... until it is set anew');
$other->stop('fast');

# Another watch in the copy enables the event trigger; the copied one stays as it is

$node->safe_psql('restored', q{SELECT FROM omni_refresh_watch(gen_random_uuid())});
is($node->safe_psql('restored', qq{SELECT count(*) FROM ($check) AS c (text) WHERE text LIKE '%: inactive%'}), '1', 'another watch does not wake the copied one');
$node->safe_psql('restored', q{SELECT omni_refresh_unwatch(model_id) FROM omni_refresh_watch});
is($node->safe_psql('restored', 'SELECT evtenabled FROM pg_event_trigger'), 'D', 'a copy can be ended like any watch');

# CREATE DATABASE ... TEMPLATE takes the memory along, too, and leaves the event trigger enabled

$node->safe_psql('template1', 'CREATE DATABASE copied TEMPLATE postgres');
is($node->safe_psql('copied', 'SELECT evtenabled FROM pg_event_trigger'), 'A', 'a template');
is_inert($node, 'copied', '... makes a copy that is inert');
$node->safe_psql('copied', $call);
ok($node->poll_query_until('copied', q{SELECT count(*) = 1 FROM omni_refresh_job WHERE origin = 'ddl' AND status = 'accepted' AND database = (SELECT oid FROM pg_database WHERE datname = 'copied')}), '... until it is set anew');

# Logical replication of all tables, into a database of the same OID

my $subscriber = OmniFault::node('subscriber');
$subscriber->safe_psql('postgres', 'CREATE TABLE theirs (what text)');
$watch->sql('CREATE TABLE theirs (what text); CREATE PUBLICATION everything FOR ALL TABLES');
$subscriber->safe_psql('postgres', 'CREATE SCHEMA mark; CREATE SCHEMA sales; CREATE TABLE sales.orders (id int, total numeric); CREATE SUBSCRIPTION everything CONNECTION $$' . $node->connstr('postgres') . '$$ PUBLICATION everything');
$watch->sql($call);
$watch->sql('INSERT INTO theirs VALUES (1)');
ok($subscriber->poll_query_until('postgres', 'SELECT count(*) = 1 FROM theirs'), 'logical replication');
is($subscriber->safe_psql('postgres', 'SELECT (SELECT count(*) FROM omni_refresh_watch) + (SELECT count(*) FROM omni_refresh_watch_seen)'), '0', '... brings no watch');
$subscriber->safe_psql('postgres', 'DROP SUBSCRIPTION everything');
$subscriber->stop('fast');

# The original goes on, also after pg_upgrade

$watch->settle;
$watch->{last} = $watch->sql('SELECT max(id) FROM omni_refresh_job');
is($watch->told('CREATE TABLE sales.more ()'), 'added sales.more', 'the original goes on') or note $watch->sql('SELECT job, detail FROM omni_refresh_event WHERE event = $$changed$$');
$node->safe_psql('template1', "DROP DATABASE $_") for 'copied', 'restored';
$node->stop('fast');
my $upgraded = OmniNode->new('upgraded');
$upgraded->init(extra => [ '--encoding=UTF8', '--no-locale' ]);
$upgraded->append_conf('postgresql.conf', "omni_refresh.track = off\nomni_refresh.min_interval = 0\nmax_prepared_transactions = 4\nwal_level = logical\n");
chomp(my $bindir = `pg_config --bindir`);
chdir PostgreSQL::Test::Utils::tempdir or die;
$omni->reset;
$upgraded->command_ok([ 'pg_upgrade', '-d', $node->data_dir, '-D', $upgraded->data_dir, '-b', $bindir, '-B', $bindir,
		'-s', $node->host, '-p', $node->port, '-P', $upgraded->port ], 'pg_upgrade');
$upgraded->start;
is(scalar(() = $omni->requests(qr/refresh/)), 0, '... asks for nothing');
$watch->{node} = $upgraded;
is($watch->told('CREATE TABLE sales.upgraded ()'), 'added sales.upgraded', '... and keeps the watch with its memory');
$upgraded->stop('fast');
OmniLife::clean($upgraded, 'the log is clean', qr/terminating background worker/);
done_testing();
