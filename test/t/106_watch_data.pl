# With quiet, a watch resets the cache once data of its schemas have changed, and then have not for a
# while: from the statistics and the catalogs, so that nobody's load pays for it.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniClock;
use OmniFault;
use OmniLife;
use OmniWatch;

my $watch = OmniWatch->new('data', conf => "autovacuum = off\n", cache_policy => 'nightly', quiet => '1 s', removals => '1 h');
my $node = $watch->node;
my $model = $watch->omni->model;
my $slow;

END { my $rc = $?; $_->stop for grep { $_ } $watch, $slow; $? = $rc; }

my $count = 'SELECT count(*) FROM omni_refresh_job WHERE kind = $$cache$$';
my $now = 'SELECT clock_timestamp()';

# Waits until the worker has ended a look at data after a time, or sends what the look has asked for.
sub looked_after
{
	my ($on, $time) = @_;

	$on->until("SELECT EXISTS (SELECT FROM pg_stat_activity WHERE query ~ '^looking whether data' AND state = 'idle' AND state_change > '$time')
			OR EXISTS (SELECT FROM omni_refresh_job WHERE requested_at > '$time')")
		or die 'no look';
	return;
}

# Waits for a look that was under way, one that finds a change, one that finds it quiet, and one more.
sub looked
{
	looked_after($watch, $watch->sql($now)) for 1 .. 4;
	$watch->settle;
	return;
}

# Runs statements, and returns how many resets follow.
sub resets
{
	my ($sql) = @_;
	my $before = $watch->sql($count);

	$node->psql('postgres', "$sql; SELECT pg_stat_force_next_flush()", on_error_stop => 0);
	looked();
	return $watch->sql($count) - $before;
}

# What is refused

my ($out, $err);
sub refused
{
	my (%options) = @_;
	(undef, $out, $err) = $node->psql('postgres', '\set VERBOSITY verbose
		SELECT FROM ' . $watch->call(%options));
	return $err =~ /ERROR:  (.*)\n(?:HINT:  (.*))?/ ? join ' ', grep { defined } $1, $2 : '';
}

is(refused(cache_policy => undef), '22023: quiet needs a cache policy to reset Give cache_policy, or set the option "cache_policy" of server "omni".', 'quiet needs a cache policy');
is(refused(cache_policy => ''), '22023: quiet needs a cache policy to reset Give cache_policy, or set the option "cache_policy" of server "omni".', '... not an empty one');
is(refused(quiet => $_), '22023: quiet must be between 1 s and 1 h', "$_ are refused") for '999 ms', '3601 s', '1 day', '-1 s';
$watch->sql(q{ALTER SERVER omni OPTIONS (ADD cache_policy 'daily')});
is(refused(cache_policy => undef), '', '... the server\'s policy will do');
like($err, qr/WARNING: .*changes of data will not be noticed after a start of the server until its background worker runs\n.*HINT:  Add omni_refresh to shared_preload_libraries/s, '... without preload, there is a warning');
like($watch->sql(q{SELECT concat_ws(' ', ok, detail, hint) FROM omni_refresh_check() WHERE check_name = 'watch'}),
	qr/^f .*: active, but will not notice changes of data after a start of the server until the background worker runs Add omni_refresh/, '... and omni_refresh_check() says so');
$watch->sql(q{ALTER SERVER omni OPTIONS (DROP cache_policy)});
$watch->sql("SELECT omni_refresh_unwatch('$model')");
$watch->settle;

# What leads to a reset

$watch->sql('CREATE SCHEMA other; CREATE TABLE other.t (a int); CREATE TABLE sales.lines (id int, total numeric);
	CREATE MATERIALIZED VIEW sales.sums AS SELECT count(*) FROM sales.lines;
	CREATE TABLE sales.days (day int) PARTITION BY LIST (day); CREATE TABLE sales.day1 PARTITION OF sales.days FOR VALUES IN (1); CREATE TABLE sales.day2 (day int);
	CREATE TABLE sales.blue (a int); CREATE TABLE sales.green (a int);
	CREATE SCHEMA red; CREATE TABLE red.t (a int); CREATE SCHEMA black; CREATE TABLE black.t (a int);
	SELECT pg_stat_force_next_flush()');
is(resets('SELECT FROM ' . $watch->call), 1, 'a new watch resets once, after its refresh');
is(resets('INSERT INTO sales.orders SELECT i, i FROM generate_series(1, 1000) AS i'), 1, 'INSERT');
is($watch->sql(q{SELECT concat_ws(' ', origin, policy, detail, branch_id) FROM omni_refresh_job AS j JOIN omni_refresh_event AS e ON job = j.id WHERE event = 'changed' ORDER BY e.id DESC LIMIT 1}),
	'ddl nightly data', '... the reset says what it is for');
is(($watch->omni->requests)[-1]{path}, "/api/v1/models/$model/cache_reset/nightly", '... and is sent');
is(resets('UPDATE sales.orders SET total = 0 WHERE id = 1'), 1, 'UPDATE');
is(resets('DELETE FROM sales.orders WHERE id = 1'), 1, 'DELETE');
is(resets('COPY sales.lines FROM PROGRAM $$echo 1,2$$ (FORMAT csv)'), 1, 'COPY');
is(resets('TRUNCATE sales.lines'), 1, 'TRUNCATE');
is(resets('REFRESH MATERIALIZED VIEW sales.sums'), 1, 'REFRESH MATERIALIZED VIEW');
is(resets('INSERT INTO sales.days VALUES (1)'), 1, 'a partition');
is(resets('BEGIN; INSERT INTO sales.orders VALUES (1, 1); PREPARE TRANSACTION $$p$$; COMMIT PREPARED $$p$$'), 1, 'COMMIT PREPARED');
is(resets('BEGIN; ALTER TABLE sales.blue RENAME TO swap; ALTER TABLE sales.green RENAME TO blue; ALTER TABLE sales.swap RENAME TO green; COMMIT'), 1, 'a swap of tables');
is(resets('BEGIN; ALTER SCHEMA red RENAME TO swap; ALTER SCHEMA black RENAME TO red; ALTER SCHEMA swap RENAME TO black; COMMIT'), 1, 'a swap of schemas');
is(resets('ALTER TABLE sales.days ATTACH PARTITION sales.day2 FOR VALUES IN (2)'), 1, 'ATTACH PARTITION');
is(resets('SELECT pg_stat_reset()'), 1, 'statistics that are reset lead to one');

# What does not; our own tables are in a schema that is watched

my $xid = $watch->sql('SELECT pg_snapshot_xmax(pg_current_snapshot())');
is(resets('SELECT 1'), 0, 'nothing leads to nothing');
is($watch->sql('SELECT pg_snapshot_xmax(pg_current_snapshot())'), $xid, '... and takes no transaction id');
is(resets('SELECT count(*) FROM sales.orders; SELECT FROM sales.orders FOR UPDATE; ANALYZE; VACUUM; VACUUM (FREEZE) sales.orders; CHECKPOINT; REINDEX TABLE sales.orders'), 0, 'nor do reading, ANALYZE and VACUUM');
is(resets('CREATE TEMP TABLE t AS SELECT 1 AS a; INSERT INTO t VALUES (1); TRUNCATE t; SELECT lo_create(0); COMMENT ON TABLE sales.orders IS $$x$$'), 0, 'nor do temporary tables and catalogs');
is(resets('SELECT FROM ' . $watch->call(schemas => '{sales,later}')), 1, 'of some schemas');
is(resets('INSERT INTO other.t VALUES (1); TRUNCATE other.t'), 0, '... others lead to nothing');
is(resets('UPDATE sales.orders SET total = 1 WHERE id = 2'), 1, '... these do');

# The worker ends

my $pid = q{SELECT pid FROM pg_stat_activity WHERE backend_type ~ 'omni_refresh'};
my $worker = $watch->sql($pid);
is(resets("SELECT pg_terminate_backend($worker)"), 0, 'a worker\'s successor asks for nothing');
isnt($watch->sql($pid), $worker, '... it is another one');

$node->restart;
$watch->sql('INSERT INTO sales.orders VALUES (2, 2)');
is($watch->sql("SELECT count(*) FROM ($pid) AS w"), '0', 'after a start without preload, no worker looks');
is(resets('SELECT omni_refresh_wake()'), 1, '... the next one finds what has changed meanwhile');

$node->append_conf('postgresql.conf', 'shared_preload_libraries = omni_refresh');
$node->restart;
is(resets('SELECT 1'), 0, 'a restart alone asks for nothing');
is($watch->sql(q{SELECT ok FROM omni_refresh_check() WHERE check_name = 'watch'}), 't', '... with preload, omni_refresh_check() is content');
is(resets('INSERT INTO sales.orders VALUES (2, 2)'), 1, '... the worker looks by itself');
$watch->sql('SELECT FROM ' . $watch->call(quiet => '1 h'));
$watch->settle;
my $before = $watch->sql($count);
$node->stop('immediate');
$node->start;
# a worker that has read the hour looks once a minute
$watch->sql("UPDATE omni_refresh_watch SET quiet = '1 s'; SELECT pg_terminate_backend(pid, 60000) FROM ($pid AND backend_type ~ 'worker') AS w; SELECT omni_refresh_wake()");
is(resets('SELECT omni_refresh_wake()') <= 1, 1, 'a crash, which loses the statistics, leads to one at most');
cmp_ok($watch->sql($count) - $before, '<=', 1, '... in all');
$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/terminating background worker|not properly shut down|was interrupted|WARNING:  changes of data will not be noticed/);

# Quiet, and a load of hours, by a clock that the test sets

SKIP:
{
	skip 'test/shim/clock.c cannot be compiled', 6 unless OmniClock::build();
	my $clock = OmniClock->new('slow', conf => "autovacuum = off\nomni_refresh.min_interval = 0\nclient_min_messages = error\n");
	$slow = OmniWatch->new('slow', node => $clock->node, cache_policy => 'nightly', quiet => '30 min', removals => '1 h');

	# Runs statements, lets time pass by steps of ten minutes, and returns the resets until then.
	my $after = sub {
		my ($steps, $sql) = @_;
		my $had = $slow->sql($count);

		$slow->sql("$sql; SELECT pg_stat_force_next_flush()");
		for (1 .. $steps)
		{
			my $time = $slow->sql($now);
			$clock->pass(601);
			looked_after($slow, $time);
		}
		$slow->settle;
		return $slow->sql($count) - $had;
	};

	$slow->set;
	is($after->(5, 'CREATE TABLE sales.late AS SELECT 1 AS a'), 1, 'a refresh\'s reset covers the data');
	is($after->(3, 'INSERT INTO sales.orders VALUES (1, 1)'), 0, 'data that have not been quiet for long');
	is($after->(3, 'INSERT INTO sales.orders VALUES (1, 1)'), 0, '... change again');
	is($after->(1, 'INSERT INTO sales.orders VALUES (1, 1)'), 1, '... an hour after the first change, there is a reset');
	is($after->(3, 'INSERT INTO sales.orders VALUES (1, 1)'), 0, '... the next change');
	is($after->(1, 'SELECT 1'), 1, '... has one of its own, once the data are quiet');
	$slow->node->stop('fast');
}
done_testing();
