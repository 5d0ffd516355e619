# A watch asks Omni for what DDL has changed, by the least request that does, and says so in words.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniLife;
use OmniWatch;

my $watch = OmniWatch->new('watch');
my $node = $watch->node;
my $model = $watch->omni->model;

END { my $rc = $?; $watch->stop if $watch; $? = $rc; }

# Setting one

is($watch->sql('SELECT evtenabled FROM pg_event_trigger'), 'D', 'without a watch, the event trigger is disabled');
is($watch->sql("SELECT server, model_id, branch_id, schemas, delay, removals, cache_policy, requested_by = current_user, failures FROM omni_refresh_watch('$model')"),
	"omni|$model|||00:00:05|00:10:00||t|0", 'a watch has defaults');
$watch->set(removals => '1 h');
is($watch->sql('SELECT count(*) FROM omni_refresh_watch'), '1', 'a second call replaces the first');
is($watch->sql('SELECT evtenabled FROM pg_event_trigger'), 'A', '... and the event trigger fires whatever the role of the session');
is($watch->sql(q{SELECT string_agg(DISTINCT concat_ws(' ', origin, status, hard, schemas, tables, detail), '') FROM omni_refresh_job AS j JOIN omni_refresh_event AS e ON job = j.id AND event = 'changed' WHERE status <> 'merged'}),
	'ddl accepted f all, since the watch is new', '... Omni is asked for all, and not to remove anything');
is($watch->sql('SELECT count(*) FROM omni_refresh_watch_seen WHERE watch NOT IN (SELECT id FROM omni_refresh_watch)'), '0', '... the memory of the first one is gone');
is($watch->changes, '', '... there are no changes');

# Additions

is($watch->told('CREATE TABLE sales.t1 (id int)'), 'added sales.t1', 'a table is told');
is($watch->asked, 'soft sales/t1', '... and asked for by its name');
is($watch->told('BEGIN; CREATE TABLE sales.t2 AS SELECT 1 AS one; SELECT 1 AS two INTO sales.t3; CREATE VIEW sales.v1 AS TABLE sales.t2; CREATE MATERIALIZED VIEW sales.v2 AS TABLE sales.t2; COMMIT'),
	'added sales.t2 to sales.v2 (4)', 'so are CREATE TABLE AS, SELECT INTO and views');
is($watch->asked, 'soft sales/t2,t3,v1,v2', '... by one request');
is($watch->told('ALTER TABLE sales.orders ADD COLUMN "Discount %" numeric(5,2)'), 'sales.orders: + "Discount %" numeric(5,2)', 'a column is told');
is($watch->asked, 'soft sales/orders', '... and its table asked for');
is($watch->told('BEGIN; CREATE TABLE sales."a,b" (); CREATE TABLE sales."c.d" (); COMMIT'), 'added sales."a,b", sales."c.d"', 'names that Omni would read as several');
is($watch->asked, 'soft sales', '... are not named to it');
is($watch->told('CREATE SCHEMA "x.y"; CREATE TABLE "x.y".z ()'), 'added "x.y".z', 'nor are schemas');
is($watch->asked, 'soft', '... all is asked for');
is($watch->told('DO $$ BEGIN FOR i IN 1 .. 60 LOOP EXECUTE format($f$CREATE TABLE sales.n%s ()$f$, i); END LOOP; END $$'), 'added sales.n1 to sales.n60 (60)', 'many tables are told in short');
is($watch->asked, 'soft sales', '... and not named');
is($watch->told('BEGIN; CREATE TABLE sales.u1 (); ROLLBACK; BEGIN; SAVEPOINT a; CREATE TABLE sales.u2 (); ROLLBACK TO a; COMMIT; BEGIN; SAVEPOINT a; CREATE TABLE sales.u3 (); ROLLBACK TO a; CREATE TABLE sales.u3 (a int); COMMIT'),
	'added sales.u3', 'what is rolled back is not told');
is($watch->told('SET session_replication_role = replica; CREATE TABLE sales.u4 ()'), 'added sales.u4', 'what a superuser does without triggers is');
is($watch->told('CREATE FUNCTION sales.f() RETURNS void LANGUAGE sql AS $$CREATE TABLE sales.u5 ()$$; SELECT sales.f()'), 'added sales.u5', 'and what a function does');
is($watch->told('CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w; CREATE FOREIGN TABLE sales.u6 (a int) SERVER s'), 'added sales.u6', 'and a foreign table');
is($watch->told('BEGIN; CREATE TABLE sales.u7 (); PREPARE TRANSACTION $$p$$'), '', 'what is prepared is not told');
is($watch->told('COMMIT PREPARED $$p$$'), 'added sales.u7', '... before it is committed');
is($watch->told('CREATE ROLE reader; CREATE ROLE loader LOGIN; BEGIN; GRANT SELECT ON sales.orders TO reader; GRANT SELECT (id) ON sales.t1 TO reader; COMMIT'), 'sales.orders: + SELECT for reader; sales.t1: + SELECT (id) for reader', 'grants are told');
is($watch->asked, 'soft sales/orders,t1', '... and asked for');
is($watch->told('GRANT INSERT, UPDATE ON sales.orders TO reader; GRANT CREATE ON SCHEMA sales TO loader; GRANT SELECT ON sales.orders TO reader WITH GRANT OPTION'), '', '... unless they are not for reading');
is($watch->told('GRANT USAGE ON SCHEMA "x.y" TO reader'), '"x.y".z: + USAGE for reader', 'a schema may be used');

# Nothing to ask for

is($watch->told(q{
	CREATE TEMP TABLE tt (a int); CREATE INDEX ON tt (a); DROP TABLE tt; CREATE TEMP VIEW tv AS SELECT 1; BEGIN; CREATE TEMP TABLE td (a int) ON COMMIT DROP; COMMIT;
	CREATE INDEX i ON sales.t1 (id); REINDEX INDEX sales.i; DROP INDEX sales.i; TRUNCATE sales.t1; REFRESH MATERIALIZED VIEW sales.v2;
	ALTER TABLE sales.t1 SET (fillfactor = 50); ALTER TABLE sales.t1 ALTER id SET NOT NULL, ALTER id SET DEFAULT 1; ALTER TABLE sales.t1 ADD PRIMARY KEY (id);
	COMMENT ON TABLE sales.t1 IS 'comment'; COMMENT ON COLUMN sales.t1.id IS 'comment'; VACUUM FULL sales.t1; CLUSTER sales.t1 USING t1_pkey; ANALYZE sales.t1;
	ALTER TABLE sales.t1 SET UNLOGGED; ALTER TABLE sales.t1 SET LOGGED; CREATE SEQUENCE sales.s; CREATE STATISTICS sales.st ON id, total FROM sales.orders;
	CREATE TYPE sales.ty AS (a int); CREATE FUNCTION sales.g() RETURNS int LANGUAGE sql AS 'SELECT 1'; ALTER TABLE sales.t1 ENABLE ROW LEVEL SECURITY;
	BEGIN; CREATE TABLE sales.gone (); DROP TABLE sales.gone; ALTER TABLE sales.t1 ADD gone int; ALTER TABLE sales.t1 DROP gone; ALTER TABLE sales.t1 RENAME TO t0; ALTER TABLE sales.t0 RENAME TO t1; COMMIT}),
	'', 'what leaves tables and columns as they are is not told');
is($watch->asked, '', '... and nothing is asked for');
is($watch->changes, '', '... nor left to be');

# Blue and green

$watch->set(delay => '5 s', removals => '1 h');
is($watch->told(q{BEGIN; CREATE TABLE sales.t1_new (id int); DROP TABLE sales.t1; ALTER TABLE sales.t1_new RENAME TO t1; GRANT SELECT (id) ON sales.t1 TO reader; COMMIT}), '', 'a swap in one transaction is not told');
is($watch->told(q{CREATE TABLE sales.t1_new (id int); ALTER TABLE sales.t1 RENAME TO t1_old; ALTER TABLE sales.t1_new RENAME TO t1; GRANT SELECT (id) ON sales.t1 TO reader; DROP TABLE sales.t1_old}), '', 'nor one in several');
is($watch->told(q{BEGIN; CREATE SCHEMA new; CREATE TABLE new.t1 (id int); ALTER SCHEMA "x.y" RENAME TO old; ALTER SCHEMA new RENAME TO "x.y"; CREATE TABLE "x.y".z (); GRANT USAGE ON SCHEMA "x.y" TO reader; DROP SCHEMA old CASCADE; COMMIT}), 'added "x.y".t1', 'of a schema, the difference is');
is($watch->changes, '', '... and nothing is left');

# Partitions

$watch->set(removals => '1 h');
is($watch->told('BEGIN; CREATE TABLE sales.p (day date) PARTITION BY RANGE (day); CREATE TABLE sales.p1 PARTITION OF sales.p FOR VALUES FROM (\'2026-01-01\') TO (\'2026-01-02\'); COMMIT'), 'added sales.p, sales.p1', 'a partition is told');
is($watch->told('CREATE TABLE sales.p2 PARTITION OF sales.p FOR VALUES FROM (\'2026-01-02\') TO (\'2026-01-03\'); DROP TABLE sales.p1'), 'added sales.p2', 'the next one, too');
is($watch->changes, '', '... that the oldest one is dropped is no change');

# Removals wait, here for an hour

is($watch->told('DROP TABLE sales.t2 CASCADE; ALTER TABLE sales.orders DROP total; ALTER TABLE sales.t3 ALTER two TYPE bigint'), '', 'removals are not told');
is($watch->asked, '', '... nor asked for');
my $removed = 'sales.orders - total hard; sales.t2 removed hard; sales.t3 two from integer to bigint hard; sales.v1 removed hard; sales.v2 removed hard';
is($watch->changes, $removed, '... but can be seen');
is($watch->told('ALTER TABLE sales.orders ADD tax numeric'), 'sales.orders: + tax numeric, - total', 'what is added later is told at once');
is($watch->changes, $removed, '... and changes nothing about removals');
is($watch->told('BEGIN; CREATE TABLE sales.t2 (one int); CREATE VIEW sales.v1 AS TABLE sales.t2; CREATE MATERIALIZED VIEW sales.v2 AS TABLE sales.t2; ALTER TABLE sales.orders ADD total numeric; ALTER TABLE sales.t3 ALTER two TYPE int; COMMIT'), '', 'what comes back is not told');
is($watch->changes, '', '... and no removal is left');
is($watch->sql('SELECT count(*) FROM omni_refresh_job WHERE hard'), '0', 'no hard refresh was asked for');

# ... and then are told once

$watch->set(removals => '1 s');
$watch->sql('BEGIN; DROP TABLE sales.n1, sales.n2; ALTER TABLE sales.orders RENAME tax TO vat; REVOKE SELECT ON sales.orders FROM reader; COMMIT');
is($watch->removed, 'removed sales.n1, sales.n2; sales.orders: - tax, - SELECT for reader', 'removals are told once no DDL has come for a while')
	or note $watch->sql('SELECT job, event, detail FROM omni_refresh_event WHERE event = $$changed$$ ORDER BY id DESC LIMIT 5');
is($watch->changes, '', '... and nothing is left');
$watch->sql('BEGIN; ALTER TABLE sales.n3 SET SCHEMA mark; ALTER SCHEMA "x.y" RENAME TO z; COMMIT');
is($watch->removed, 'removed sales.n3; removed "x.y".t1, "x.y".z', 'what has another name or schema is gone under the old one');
$watch->sql('BEGIN; DROP TYPE sales.ty CASCADE; DROP FOREIGN DATA WRAPPER w CASCADE; COMMIT');
is($watch->removed, 'removed sales.u6', 'so is what CASCADE drops');
$watch->sql('BEGIN; CREATE FUNCTION sales.h() RETURNS int LANGUAGE sql AS $$SELECT 1$$; CREATE VIEW sales.vh AS SELECT sales.h(); CREATE TYPE sales.ty AS (a int); ALTER TABLE sales.orders ADD t sales.ty; COMMIT');
$watch->marked;
$watch->sql('BEGIN; DROP FUNCTION sales.h CASCADE; DROP TYPE sales.ty CASCADE; COMMIT');
is($watch->removed, 'removed sales.vh; sales.orders: - t', '... a function, or a type');
$watch->sql('BEGIN; CREATE TABLE sales.mine (); ALTER TABLE sales.mine OWNER TO loader; COMMIT');
$watch->marked;
$watch->sql('DROP OWNED BY loader');
like($watch->removed, qr/removed sales.mine/, '... or a role');

# More than half

$watch->sql('DROP SCHEMA sales CASCADE');
ok($node->wait_for_log(qr/LOG:  omni_refresh does not ask Omni to remove \d+ of \d+ relations that no longer exist/), 'if more than half is gone, the log says so');
like($watch->sql(q{SELECT detail FROM omni_refresh_check() WHERE check_name = 'watch'}), qr/does not ask Omni to remove \d+ of \d+ relations/, '... and so does omni_refresh_check()');
is($watch->marked, '', '... what is added is told all the same');
like($watch->sql('SELECT string_agg(detail, $$$$) FROM omni_refresh_event'), qr/not asked for: \d+ of \d+ relations no longer exist, which are more than half/, '... and an event tells about the rest');
is($watch->sql("SELECT count(*) FROM omni_refresh_job WHERE hard AND id > $watch->{hard}"), '0', '... which is not asked for');
$watch->set;
is($watch->changes, '', '... until the watch is set anew');

# Ending it

is($watch->sql("SELECT omni_refresh_unwatch('$model')"), 't', 'a watch is ended');
is($watch->sql("SELECT omni_refresh_unwatch('$model')"), 'f', '... once');
is($watch->sql('SELECT evtenabled FROM pg_event_trigger'), 'D', '... the last one disables the event trigger');
is($watch->sql('SELECT (SELECT count(*) FROM omni_refresh_watch) + (SELECT count(*) FROM omni_refresh_watch_seen)'), '0', '... and nothing is remembered');

$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/terminating background worker/);
done_testing();
