# A dump that is restored over a database with a watch, in every way, does no harm: the restore goes
# through, the watch goes on, and nothing that was copied becomes active. Nor does it harm that this
# leaves triggers enabled otherwise than the extension made them.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniFault;
use OmniLife;
use OmniWatch;

my $watch = OmniWatch->new('restore', removals => '1 h', conf => "wal_level = logical\n");
my $node = $watch->node;
my $omni = $watch->omni;
my $model = $omni->model;
my $check = q{SELECT string_agg(concat_ws(' ', ok, detail), '; ') FROM omni_refresh_check() WHERE check_name LIKE 'watch%'};
my $active = qq{t model $model, server "omni": active};
my $inactive = qr/^f model \S+, server "omni": inactive, since (?:it was copied from another database|the event trigger is disabled)$/;
my $tables = 0;

END { my $rc = $?; $watch->stop if $watch; $? = $rc; }

# Whether the watch is the one that there was, and serves what is added, altered and dropped.
sub goes_on
{
	my ($name) = @_;
	my $n = ++$tables;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	is($watch->sql($check), $active, "$name: the watch is active");
	is($watch->told("CREATE TABLE sales.g$n (a int); ALTER TABLE sales.altered ADD c$n text"), "added sales.g$n; sales.altered: + c$n text", '... what is added and altered is told');
	is($watch->asked, "soft sales/altered,g$n", '... asked for');
	is($watch->changes, '', '... and remembered');
	return;
}

sub rows { return $watch->sql('SELECT count(*) FROM omni_refresh_watch') }

# Dumps of two watches of the model: the one that is replaced, with a job that has not ended, and
# the one in its place.

my %dump;
sub dump_as
{
	my ($name, @options) = @_;
	$dump{$name} = $node->basedir . "/$name";
	$node->command_ok([ 'pg_dump', @options, '-f', $dump{$name}, $node->connstr('postgres') ], "a dump, $name");
	return;
}
$watch->sql('INSERT INTO sales.orders VALUES (1, 1); CREATE TABLE sales.altered ()');
$watch->set;
$watch->sql('UPDATE omni_refresh_watch SET unfinished = true, job = 0, owed_hard = true');
dump_as('replaced', '-Fc');
dump_as('replaced.sql', '--data-only');
$watch->set;
dump_as('current', '-Fc');
dump_as('current.sql', '--data-only', '--inserts');
dump_as('triggers.sql', '--data-only', '--disable-triggers');

# Only data, over the watch: whether errors end the restore or not, there are none.

for my $case (
	[ 'pg_restore', '--data-only' ],
	[ 'pg_restore', '--data-only', '--single-transaction', '--exit-on-error' ],
	[ 'pg_restore', '--data-only', '-j', '2', '--exit-on-error' ],
	[ 'psql', '-Xq1v', 'ON_ERROR_STOP=1' ],
	[ 'psql', '-Xq1v', 'ON_ERROR_STOP=1', '-c', 'SET session_replication_role = replica' ],
	[ 'pg_restore', '--data-only', '--disable-triggers', '--single-transaction', '--exit-on-error' ],
	[ 'pg_restore', '--data-only', '--disable-triggers' ],
	[ 'psql', '-Xq1v', 'ON_ERROR_STOP=1', '-c', 'SET client_min_messages = warning' ])
{
	my ($program, @options) = @$case;
	for my $dump ("@options" =~ /client_min_messages/ ? 'triggers' : ('replaced', 'current'))
	{
		my $name = "@$case over the watch, $dump";
		my $orders = $watch->sql('SELECT count(*) FROM sales.orders');

		$node->command_ok([ $program, @options, '-d', $node->connstr('postgres'), $program eq 'psql' ? ('-f', $dump{"$dump.sql"}) : $dump{$dump} ], $name);
		cmp_ok($watch->sql('SELECT count(*) FROM sales.orders'), '>', $orders, '... the user\'s data are restored');
		is(rows(), '1', '... and no watch') unless $name =~ /triggers/;
		goes_on($name);
		is(rows(), '1', '... and what was copied is gone');
	}
}
is($watch->sql(qq{SELECT omni_refresh_unwatch('$model')}), 't', 'it can be ended');
is(rows(), '0', '... with all its copies');
is($watch->sql('SELECT count(*) FROM omni_refresh_watch_seen'), '0', '... and its memory');
is($watch->sql('SELECT evtenabled FROM pg_event_trigger'), 'D', '... which disables the event trigger');
$node->command_ok([ 'pg_restore', '--data-only', '--disable-triggers', '-1', '-e', '-d', $node->connstr('postgres'), $dump{current} ], 'restored where it was ended');
like($watch->sql($check), $inactive, '... it is inactive');
my $jobs = $watch->sql('SELECT count(*) FROM omni_refresh_job');
$watch->sql("CREATE TABLE sales.unasked (); SELECT status FROM omni_refresh('$model')");
is($watch->sql('SELECT count(*) FROM omni_refresh_job') - $jobs, 1, '... and asks for nothing');
$watch->set;
is(rows(), '1', '... until it is set again, in place of its copy');
goes_on('set again');

# All anew, over the database and beside it

for my $options ([ '--clean', '--if-exists' ], [ '--clean', '--single-transaction', '--exit-on-error' ])
{
	my $name = "pg_restore @$options";
	my $n = @$options;

	dump_as("all $n", '-Fc');
	$node->command_ok([ 'pg_restore', @$options, '-d', $node->connstr('postgres'), $dump{"all $n"} ], $name);
	like($watch->sql($check), $inactive, '... leaves a copy, which is inactive');
	is($watch->sql('SELECT evtenabled FROM pg_event_trigger'), 'D', '... with the event trigger disabled');
	$watch->set;
	goes_on("$name, and set again");
}
$watch->sql('CREATE DATABASE beside');
$node->command_ok([ 'pg_restore', '-1', '-e', '-d', $node->connstr('beside'), $dump{current} ], 'pg_restore into a new database');
like($watch->sql($check, 'beside'), $inactive, '... leaves a copy, which is inactive');
is($watch->sql(qq{SELECT omni_refresh_unwatch('$model')}, 'beside'), 't', '... and can be ended');
is($watch->sql('SELECT count(*) FROM omni_refresh_watch', 'beside'), '0', '... as any watch');
goes_on('beside its copy');

# Triggers that are enabled otherwise than the extension made them

my @tables = map { "omni_refresh_$_" } 'job', 'event', 'watch', 'watch_seen';
for my $how ('DISABLE TRIGGER ALL', 'ENABLE TRIGGER ALL', 'ENABLE ALWAYS TRIGGER keep_out')
{
	$watch->sql(join '; ', map { "ALTER TABLE $_ " . $how =~ s/keep_out/${_}_keep_out/r } @tables);
	goes_on($how);
	my $events = $watch->sql('SELECT count(*) FROM omni_refresh_event');
	is($watch->sql("SELECT status FROM omni_refresh('$model')"), 'accepted', '... calls are served');
	is($watch->sql('SELECT count(*) FROM omni_refresh_event') - $events, 2, '... and leave their events');
	is($watch->sql("BEGIN; CREATE TEMP TABLE j AS SELECT id FROM omni_refresh_on_commit('$model', schemas => '{a}'); SELECT FROM omni_refresh_on_commit('$model', schemas => '{a}'); SELECT count(DISTINCT id) FROM (SELECT id FROM j UNION ALL SELECT id FROM omni_refresh_on_commit('$model', schemas => '{a}')) AS ids"), '1', '... equal requests of a transaction are one');
	is($watch->sql('WITH d AS (DELETE FROM omni_refresh_job WHERE id = (SELECT max(id) FROM omni_refresh_job) RETURNING id) SELECT count(*) FROM d'), '1', '... and jobs can be deleted');
	$watch->sql("SET session_replication_role = replica; DELETE FROM omni_refresh_watch") if $how =~ /ALWAYS/;
	is(rows(), '1', '... what is replicated is kept out') if $how =~ /ALWAYS/;
	is($watch->sql("SELECT omni_refresh_unwatch('$model')"), 't', '... the watch can be ended');
	is(rows(), '0', '... and is gone');
	$watch->set;
}

# A trigger that does keep our writes from happening is no secret

sub said
{
	my ($sql) = @_;
	my (undef, undef, $err) = $node->psql('postgres', "\\set VERBOSITY verbose\n$sql");
	return $err =~ /((?:ERROR|WARNING):  .*)/ ? $1 : '';
}
$watch->sql(q{CREATE FUNCTION mark.skip() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'});
my $kept = sub { qr/^ERROR:  09000: a trigger of table "$_[0]" kept a row from being written/ };
for my $case (
	[ 'DELETE ON omni_refresh_watch', "SELECT omni_refresh_unwatch('$model')", 'omni_refresh_watch' ],
	[ 'INSERT ON omni_refresh_watch_seen', 'SELECT FROM ' . $watch->call, 'omni_refresh_watch_seen' ],
	[ 'INSERT ON omni_refresh_event', "SELECT FROM omni_refresh('$model')", 'omni_refresh_event' ],
	[ 'INSERT ON omni_refresh_job', "SELECT FROM omni_refresh_on_commit('$model')", 'omni_refresh_job' ])
{
	my ($when, $sql, $table) = @$case;

	$watch->sql("CREATE TRIGGER skip BEFORE $when FOR EACH ROW EXECUTE FUNCTION mark.skip()");
	like(said("SET omni_refresh.call_timeout = '1 s'; $sql"), $kept->($table), "a trigger BEFORE $when that skips the row");
	$watch->sql("DROP TRIGGER skip ON $table");
}
$watch->sql('CREATE TRIGGER skip BEFORE UPDATE ON omni_refresh_watch FOR EACH ROW EXECUTE FUNCTION mark.skip()');
my $log = -s $node->logfile;
$watch->sql('CREATE TABLE sales.skipped ()');
ok($node->wait_for_log(qr/LOG: .*could not look for changes of tables, and will try again: a trigger of table "omni_refresh_watch" kept a row/, $log), 'the log tells of one that skips what a look has found');
is($watch->changes, 'sales.skipped added soft', '... which is not lost');
$watch->sql('DROP TRIGGER skip ON omni_refresh_watch');
$watch->set;
goes_on('without it');

$node->stop('fast');
done_testing();
