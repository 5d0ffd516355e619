# A transaction that serves a watch and is rolled back leaves no trace in the memory of the worker:
# what it has found is told once, a job is followed on, and nothing is kept longer than its look.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniFault;
use OmniLife;
use OmniWatch;

my $watch = OmniWatch->new('rollback', removals => '1 h');
my $node = $watch->node;
my $omni = $watch->omni;
my $model = $omni->model;

END { my $rc = $?; $watch->stop if $watch; $? = $rc; }

# A row of the memory is locked, that of the last table of a step: the worker waits for nothing,
# the log says why the look does not go on, and then all is told once.

$watch->set;
my $maker = OmniLife::session($node, 'postgres');
my $locker = OmniLife::session($node, 'postgres');
$maker->query('BEGIN; CREATE TABLE sales.t1 (a int); CREATE TABLE sales.t2 (a int); CREATE SCHEMA "Odd, name"; CREATE TABLE "Odd, name".t3 ()');
is($watch->told('CREATE TABLE sales.last (a int)'), 'added sales.last', 'a table that is made after those of an open transaction');
for my $lock ('FOR UPDATE', 'FOR KEY SHARE')
{
	my $log = -s $node->logfile;

	$locker->query("BEGIN; SELECT FROM omni_refresh_watch_seen WHERE relation = 'last' $lock");
	$watch->sql('ALTER TABLE sales.last ADD b' . length($lock) . ' int');
	$maker->query($lock eq 'FOR UPDATE' ? 'COMMIT' : 'CREATE TABLE sales.t4 ()');
	ok($node->wait_for_log(qr/LOG: .*could not look for changes of tables, and will try again: .*lock/, $log), "while its row of the memory is locked $lock, the log says so") if $lock eq 'FOR UPDATE';
	is($watch->sql(q{
		CREATE TEMP TABLE waits (what text);
		DO $$ BEGIN FOR i IN 1 .. 40 LOOP
			PERFORM pg_stat_clear_snapshot(), pg_sleep(0.05);
			INSERT INTO waits SELECT wait_event FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker' AND wait_event_type = 'Lock';
		END LOOP; END $$;
		SELECT count(*) FROM waits}), '0', '... the worker does not wait for it');
	is($watch->sql("SELECT status FROM omni_refresh('$model')"), 'accepted', '... and serves calls');
	$watch->{last} = $watch->sql('SELECT max(id) FROM omni_refresh_job') if $lock eq 'FOR UPDATE';
	$locker->query('COMMIT');
	my $told = $lock eq 'FOR UPDATE' ? 'added sales.t1, sales.t2; added "Odd, name".t3; sales.last: + b10 integer' : 'added sales.t4; sales.last: + b13 integer';
	is($watch->marked, $told, '... and all is told, once');
	is($watch->changes, '', '... and remembered');
}

# Likewise the row of the watch

$watch->sql('SELECT pg_terminate_backend(' . OmniFault::worker($node) . ', 60000)');	# so that the log says it anew
my $from = -s $node->logfile;
$locker->query('BEGIN; SELECT FROM omni_refresh_watch FOR UPDATE');
$watch->sql('CREATE TABLE sales.t5 ()');
ok($node->wait_for_log(qr/LOG: .*could not look for changes of tables, and will try again: another session holds a lock/, $from), 'while the row of the watch is locked, the log says so');
$locker->query('COMMIT');
is($watch->marked, 'added sales.t5', '... and all is told afterwards');

# The last write of a look fails, with an error that has it tried again soon: the event of its job

$watch->sql(q{
	CREATE SEQUENCE mark.tries;
	CREATE FUNCTION mark.fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM nextval('mark.tries'); RAISE 'not yet' USING ERRCODE = '40001'; END $$;
	CREATE TRIGGER fail BEFORE INSERT ON omni_refresh_event FOR EACH ROW WHEN (NEW.event = 'changed') EXECUTE FUNCTION mark.fail()});
$watch->sql('CREATE TABLE sales.u1 (); ALTER TABLE sales.t1 ADD b int');
ok($node->poll_query_until('postgres', 'SELECT last_value >= 3 FROM mark.tries'), 'while a job cannot be queued');
is($watch->sql('SELECT unfinished FROM omni_refresh_watch'), 'f', '... the watch has none');
$watch->sql('DROP TRIGGER fail ON omni_refresh_event');
is($watch->marked, 'added sales.u1; sales.t1: + b integer', '... then, what it is to ask for is told once');
is($watch->asked, 'soft sales/t1,u1', '... and asked for');

# What a look has found is kept in words, short, and no longer than the look

$watch->sql('DO $$ BEGIN FOR i IN 1 .. 1500 LOOP EXECUTE format($f$CREATE TABLE sales.many_%s ()$f$, i); END LOOP; END $$');
is($watch->marked, 'added sales.many_1 to sales.many_1500 (1500)', 'many tables');
my $log = -s $node->logfile;
$watch->sql('SELECT pg_log_backend_memory_contexts(' . OmniFault::worker($node) . ')');
ok($node->wait_for_log(qr/Grand total: /, $log), 'the memory of the worker');
unlike(slurp_file($node->logfile, $log), qr/omni_refresh look/, '... has nothing left of the look');

$node->stop('fast');
done_testing();
