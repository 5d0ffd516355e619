# DDL while a look is under way: between two transactions of it, and while Omni carries out what it
# has asked for.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniFault;
use OmniLife;
use OmniWatch;

my $watch = OmniWatch->new('slices', removals => '1 h');
my $node = $watch->node;
my $omni = $watch->omni;
my ($locker, $session);

END { my $rc = $?; $watch->stop if $watch; $? = $rc; }

# A look waits where it writes what it has found about sales.gate, as long as a session holds an
# advisory lock. That look's transaction has read the tables with lower OIDs then, and the later
# ones have not begun.

$watch->sql('CREATE TABLE sales.low1 (a int); CREATE TABLE sales.low2 (a int); CREATE TABLE sales.low3 (a int); CREATE TABLE sales.low4 (a int); CREATE TABLE sales.gate (id int);
	CREATE SCHEMA filler; DO $$ BEGIN FOR i IN 1 .. 600 LOOP EXECUTE format($f$CREATE TABLE filler.t%s (a int)$f$, i); END LOOP; END $$;
	CREATE TABLE sales.high_gate (id int); CREATE TABLE sales.high1 (b int); CREATE TABLE sales.high2 (b int); CREATE TABLE sales.high3 (b int); CREATE TABLE sales.high4 (b int);
	CREATE SCHEMA old; CREATE TABLE old.high5 (b int); CREATE SCHEMA other;
	CREATE FUNCTION mark.wait() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_catalog.pg_advisory_xact_lock_shared(1); RETURN NEW; END$$');
$watch->set;
$watch->sql(q{CREATE TRIGGER gate BEFORE UPDATE ON omni_refresh_watch_seen FOR EACH ROW WHEN (NEW.relation ~ 'gate') EXECUTE FUNCTION mark.wait()});
$watch->marked;
$locker = OmniLife::session($node, 'postgres');

sub waits
{
	my ($key) = @_;

	return $node->poll_query_until('postgres', "SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND objid = $key AND NOT granted");
}

# Runs statements while a look is between two slices. The first one has 32 relations, each other twice
# as many at most.
sub between
{
	my ($opening, $sql, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$locker->query('SELECT pg_advisory_lock(1)');
	$watch->sql($opening);
	ok(waits(1), "$name: a look is under way");
	$watch->sql($sql);
	$locker->query('SELECT pg_advisory_unlock(1)');
	return;
}

between('ALTER TABLE sales.gate ADD c1 int', q{
	ALTER TABLE sales.low1 SET SCHEMA other; ALTER TABLE sales.high1 SET SCHEMA other;
	ALTER TABLE sales.low2 RENAME TO low2_new; ALTER TABLE sales.high2 RENAME TO high2_new;
	ALTER TABLE sales.low3 RENAME COLUMN a TO a_new; ALTER TABLE sales.high3 RENAME COLUMN b TO b_new;
	BEGIN; ALTER TABLE sales.low4 RENAME TO swap; ALTER TABLE sales.high4 RENAME TO low4; ALTER TABLE sales.swap RENAME TO high4; COMMIT;
	ALTER SCHEMA old RENAME TO new}, 'SET SCHEMA and RENAME');
is($watch->marked, 'added other.high1; added sales.high2_new; added new.high5; sales.gate: + c1 integer; sales.high3: - b, + b_new integer; sales.low4: - a, + b integer; '
		. 'added other.low1; added sales.low2_new; sales.low3: - a, + a_new integer; sales.high4: + a integer, - b',
	'... what that look had not reached is told by it, the rest by the next one');
is($watch->changes, join('; ', 'old.high5 removed hard', 'sales.high1 removed hard', 'sales.high2 removed hard', 'sales.high3 - b hard', 'sales.high4 - b hard',
		'sales.low1 removed hard', 'sales.low2 removed hard', 'sales.low3 - a hard', 'sales.low4 - a hard'), '... what is gone waits');

between('ALTER TABLE sales.gate ADD c2 int', q{
	ALTER TABLE other.low1 SET SCHEMA sales; ALTER TABLE other.high1 SET SCHEMA sales;
	ALTER TABLE sales.low2_new RENAME TO low2; ALTER TABLE sales.high2_new RENAME TO high2;
	ALTER TABLE sales.low3 RENAME COLUMN a_new TO a; ALTER TABLE sales.high3 RENAME COLUMN b_new TO b;
	BEGIN; ALTER TABLE sales.low4 RENAME TO swap; ALTER TABLE sales.high4 RENAME TO low4; ALTER TABLE sales.swap RENAME TO high4; COMMIT;
	ALTER SCHEMA new RENAME TO old}, 'and back');
is($watch->marked, 'sales.gate: + c2 integer', '... is not told, since it was known');
is($watch->changes, join('; ', 'new.high5 removed hard', 'other.high1 removed hard', 'other.low1 removed hard', 'sales.high2_new removed hard', 'sales.high3 - b_new hard', 'sales.high4 - a hard',
		'sales.low2_new removed hard', 'sales.low3 - a_new hard', 'sales.low4 - b hard'), '... and what was there meanwhile is gone');

# A hard refresh removes from the model what is missing while Omni works on it, such as a view that
# dbt's CASCADE has dropped. Omni waits where it reads the catalogs.

my $file = $node->basedir . '/catalog.sql';
append_to_file($file, q{SET search_path = pg_catalog; SELECT '' FROM pg_advisory_lock_shared(2) WHERE false;
	SELECT nspname || E'\t' || relname || E'\t\t' FROM pg_class JOIN pg_namespace AS n ON n.oid = relnamespace, pg_advisory_lock_shared(2) WHERE relkind IN ('r', 'v') AND nspname = 'sales';});
$omni->set(catalog => join ' ', $node->installed_command('psql'), '-XAtqf', $file, '-d', '"' . $node->connstr('postgres') . '"');
$watch->set(removals => '1 s');
$watch->sql('CREATE VIEW sales.report AS SELECT 1 AS one');
is($watch->marked, 'added sales.report', 'a view');
ok(exists $omni->known->{'sales.report'}, '... which Omni knows');
$locker->query('SELECT pg_advisory_lock(2)');
$watch->sql('DROP TABLE sales.high2');
ok(waits(2), 'while a hard refresh is under way');
$watch->sql(q{UPDATE omni_refresh_watch SET removals = '1 h'; DROP VIEW sales.report});
$locker->query('SELECT pg_advisory_unlock(2)');
ok($node->poll_query_until('postgres', q{SELECT status = 'accepted' FROM omni_refresh_job WHERE hard ORDER BY id DESC LIMIT 1}), '... the view is dropped');
is($watch->marked, 'removed sales.high2', '... while it is missing, nothing more is asked for');
is($watch->changes, 'sales.report removed hard', '... since it may come back');
is($watch->told('CREATE VIEW sales.report AS SELECT 1 AS one'), 'all, since DDL was committed during a hard refresh', '... when it does, all is asked for');
is($watch->asked, 'soft', '... softly');
is($watch->changes, '', '... so that nothing is left');
ok(exists $omni->known->{'sales.report'}, '... and Omni knows the view again');
ok(!exists $omni->known->{'sales.high2'}, '... but not what was removed');
is($watch->told('CREATE TABLE sales.next ()'), 'added sales.next', '... once');

# A look that the end of the worker cuts short

$locker->query('SELECT pg_advisory_lock(1)');
$watch->sql('ALTER TABLE sales.low1 ADD c1 int; ALTER TABLE sales.high_gate ADD c1 int');
ok(waits(1), 'a look that has found something');
is($watch->sql('SELECT concat_ws($$ $$, owed_hard, owed_schemas, owed_tables) FROM omni_refresh_watch'), 'f {sales} {low1}', '... owes it');
$watch->sql("SELECT pg_terminate_backend(" . OmniFault::worker($node) . ", 60000)");
$locker->query('SELECT pg_advisory_unlock(1)');
is($watch->marked, 'what a look that was cut short had found; sales.high_gate: + c1 integer', '... and is cut short: the next worker asks for it');
is($watch->asked, 'soft sales/low1,high_gate', '... as well');

$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/terminating background worker/);
done_testing();
