# What a watch asks for, and what it costs: few requests, a cache reset after each, only the
# schemas that are watched; and nothing in the transaction that runs DDL.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniFault;
use OmniLife;
use OmniWatch;

my $watch = OmniWatch->new('requests', removals => '1 h');
my $node = $watch->node;
my $omni = $watch->omni;
my $model = $omni->model;

END { my $rc = $?; $watch->stop if $watch; $? = $rc; }

# Many transactions

$watch->set(delay => '5 s');
$omni->reset;
my $script = join '', map { "CREATE TABLE sales.t$_ (id int);\n" } 1 .. 300;
$watch->sql($script);
is($watch->marked, 'added sales.t1 to sales.t300 (300)', '300 tables in 300 transactions') or note explain [ map { $_->{query} } $omni->requests ];
cmp_ok(scalar(() = $omni->requests(qr/refresh/)), '<=', 3, '... are few requests');

# A job that is not sent yet: nothing more is asked for meanwhile

$watch->set;
$omni->fault('hang');
$watch->sql('CREATE TABLE sales.u1 ()');
$omni->wait_for_requests(1, qr/refresh/);
ok($node->poll_query_until('postgres', q{SELECT unfinished FROM omni_refresh_watch}), 'while a job is being sent');
$watch->sql('CREATE TABLE sales.u2 ()');
$watch->sql(q{SELECT FROM omni_refresh_models()});
is($watch->sql(q{SELECT count(*) FROM omni_refresh_job WHERE status IN ('pending', 'sending')}), '1', '... nothing more is asked for');
$omni->fault('none');
is($watch->marked, 'added sales.u1; added sales.u2', '... but when it has ended');

# Only the schemas that are watched, and a reset of the cache after each refresh

$watch->sql('CREATE SCHEMA secret');
$watch->set(schemas => '{sales,mark,later}', cache_policy => 'nightly');
$omni->reset;
$watch->{last} = $watch->sql('SELECT max(id) FROM omni_refresh_job');
is($watch->told('BEGIN; CREATE TABLE secret.t (); CREATE SCHEMA later; CREATE TABLE later.t (); COMMIT'), 'added later.t', 'only what is watched is told, also in a schema that comes later');
is(join(' ', map { $_->{path} =~ s{.*/$model/}{}r } $omni->requests(qr/refresh|cache/)), 'refresh cache_reset/nightly', '... the cache is reset after the refresh');
is($watch->sql('SELECT count(*) FROM omni_refresh_watch_seen WHERE schema = $$secret$$'), '0', '... other schemas are not remembered');

# Removals that are never asked for are told only

$watch->set(removals => undef);
$watch->sql('BEGIN; DROP TABLE sales.u1; CREATE TABLE sales.u1 (a int); DROP TABLE sales.u2; COMMIT');
$watch->marked;
is($watch->changes, 'sales.u2 removed none', 'with removals NULL, no hard refresh is asked for');

# Options of the server

$watch->sql("SELECT omni_refresh_unwatch('$model')");
$watch->sql("ALTER SERVER omni OPTIONS (ADD model '$model', ADD cache_policy 'daily')");
is($watch->sql('SELECT model_id, cache_policy FROM omni_refresh_watch()'), "$model|daily", 'model and cache policy may be the server\'s');
is($watch->sql('SELECT count(*) FROM omni_refresh_changes()') >= 0 ? 'shown' : '', 'shown', '... also of changes');
is($watch->sql(q{SELECT cache_policy IS NULL FROM omni_refresh_watch(cache_policy => '')}), 't', '... an empty policy is none');
is($watch->sql('SELECT omni_refresh_unwatch()'), 't', '... and of the end');
$watch->sql('ALTER SERVER omni OPTIONS (DROP model, DROP cache_policy)');

# A transaction with DDL

$watch->set;
my $session = OmniLife::session($node, 'postgres');
$session->query('BEGIN; CREATE TABLE sales.v1 (); CREATE TEMP TABLE v2 ()');
is($watch->sql("SELECT string_agg(relation::regclass::text, ' ') FROM pg_locks WHERE pid = $session->{pid} AND relation::regclass::text ~ 'omni_refresh'"), '', 'DDL takes no lock on our tables');
is(($session->query(q{SELECT coalesce(sum(seq_scan + idx_scan + n_tup_ins + n_tup_upd), 0) FROM pg_stat_xact_user_tables WHERE relname ~ 'omni_refresh'}))[0], '0', '... reads and writes none');
$session->query('COMMIT');
is($watch->marked, 'added sales.v1', '... and is told');
$session->quit;

# Temporary tables ask for nothing, however many: not even for a look

my $before = $watch->sql('SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()');
my $bench = OmniLife::bench($node, 'postgres', 'CREATE TEMP TABLE IF NOT EXISTS tt (a int) ON COMMIT DROP', '-c', 2, '-t', 1000);
is(OmniLife::benched($bench), 0, 'thousands of temporary tables');
is($watch->told('SELECT 1'), '', '... are not told');

$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/terminating background worker/);
done_testing();
