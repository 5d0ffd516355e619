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

my $watch = OmniWatch->new('requests', removals => '1 h', conf => "log_min_messages = debug1\nautovacuum = off\n");
my $node = $watch->node;
my $omni = $watch->omni;
my $model = $omni->model;

END { my $rc = $?; $watch->stop if $watch; $? = $rc; }

# How many looks there were
sub looks { return scalar(() = slurp_file($node->logfile) =~ /DEBUG:  omni_refresh has looked at a watch/g) }

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

# A transaction with DDL: with a watch or with 20, it takes the locks, scans and writes the rows that
# it does without. The least of several counts, since whatever others commit may empty its caches.

my $session = OmniLife::session($node, 'postgres');
sub cost
{
	my ($ddl) = @_;
	my $sum = 'SELECT sum(seq_scan + coalesce(idx_scan, 0) + n_tup_ins + n_tup_upd + n_tup_del) AS before FROM pg_stat_xact_all_tables';
	my @costs = sort map { ($session->query("BEGIN; $sum \\gset\n$ddl; SELECT format('%s locks, %s scans and rows',
			(SELECT to_char(count(*), '000') FROM pg_locks WHERE pid = pg_backend_pid()), to_char(($sum) - :before, '00000')); ROLLBACK"))[0] } 1 .. 8;

	return $costs[0];
}
sub costs { return map { $_ => cost($_) } 'CREATE TABLE sales.c (a int)', 'CREATE TEMP TABLE c (a int)', 'ALTER TABLE sales.orders ADD c int', 'DROP TABLE sales.orders' }

$watch->sql("SELECT omni_refresh_unwatch('$model')");
my %without = costs();
$watch->set;
is_deeply({ costs() }, \%without, 'DDL takes no lock, scans nothing and writes no row because of a watch') or note(explain(\%without));
$watch->sql(q{SELECT FROM generate_series(1, 19) AS n, omni_refresh_watch(md5(n::text)::uuid, delay => '1 h')});
is_deeply({ costs() }, \%without, '... or of 20');
is(($session->query('BEGIN; CREATE TABLE IF NOT EXISTS sales.orders (); SELECT pg_current_xact_id_if_assigned()'))[0], '', '... and takes no transaction id');
$session->query('ROLLBACK');
$watch->sql("SELECT omni_refresh_unwatch(model_id) FROM omni_refresh_watch WHERE model_id <> '$model'");
$watch->settle;

# Temporary tables ask for nothing, however many: not even for a look

$watch->set;
$watch->marked;
my $looks = looks();
my $bench = OmniLife::bench($node, 'postgres', 'CREATE TEMP TABLE IF NOT EXISTS tt (a int) ON COMMIT DROP', '-c', 2, '-t', 2500);
is(OmniLife::benched($bench), 0, 'thousands of temporary tables');
is(looks(), $looks, '... cause no look');
is($watch->told('SELECT 1'), '', '... and are not told');
cmp_ok(looks(), '>', $looks, '... other tables do');

# What is written for each request again and again is updated in place, so that nothing grows

my $size = q{SELECT (pg_total_relation_size('omni_refresh_watch') + pg_total_relation_size('omni_refresh_watch_seen')) / current_setting('block_size')::int};
my $before = $watch->sql($size);
$bench = OmniLife::bench($node, 'postgres', q{UPDATE omni_refresh_watch SET owed_hard = false, owed_schemas = '{sales}', job = job + 1;
UPDATE omni_refresh_watch SET owed_hard = NULL, owed_schemas = NULL, unfinished = false;
UPDATE omni_refresh_watch_seen SET columns = columns || '{}', types = types, readers = readers WHERE relation = 'orders';}, '-t', 500);
is(OmniLife::benched($bench), 0, 'hundreds of changes of a watch');
cmp_ok($watch->sql($size), '<=', $before + 4, '... do not make its tables grow');
$session->quit;

$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/terminating background worker/);
done_testing();
