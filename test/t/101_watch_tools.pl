# dbt, pg_dump and pg_restore drop what they create anew: a watch asks for no hard refresh while
# they are at it, and for none if all comes back.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniLife;
use OmniWatch;

my $watch = OmniWatch->new('tools');
my $node = $watch->node;

END { my $rc = $?; $watch->stop if $watch; $? = $rc; }

# The statements of dbt-postgres for a model of each materialization: %2$s is its name, %3$s its
# query, and %1$s "table", "view" or, where there is a temporary table, a number that is new in each run.

my $swap = q{
BEGIN;
create %1$s "wh"."%2$s__dbt_tmp" as (%3$s);
alter table if exists "wh"."%2$s" rename to "%2$s__dbt_backup";
alter table "wh"."%2$s__dbt_tmp" rename to "%2$s";
COMMIT;
BEGIN;
drop %1$s if exists "wh"."%2$s__dbt_backup" cascade;
COMMIT;
};
my $merge = q{
BEGIN;
create temporary table "%2$s__dbt_tmp%1$s" as (%3$s);
%4$s
insert into "wh"."%2$s" (id) select id from "%2$s__dbt_tmp%1$s";
COMMIT;
};
my %statements = (
	table => $swap,
	view => $swap,
	incremental => sprintf($merge, '%1$s', '%2$s', '%3$s', 'delete from "wh"."%2$s" where (id) in (select (id) from "%2$s__dbt_tmp%1$s");'),
	snapshot => sprintf($merge, '%1$s', '%2$s', '%3$s', 'alter table "wh"."%2$s" add column if not exists "note" text;'));
my $run = 0;

sub model
{
	my ($kind, $name, $query) = @_;

	return sprintf $statements{$kind}, $statements{$kind} eq $swap ? $kind : ++$run, $name, $query;
}

my @dbt = map { model(@$_) } (
	[ 'table', 'stage', 'select id, total from wh.raw' ],
	[ 'view', 'staged', 'select * from wh.stage' ],
	[ 'table', 'facts', 'select id, sum(total) as total from wh.staged group by id' ],
	[ 'view', 'report', 'select * from wh.facts' ],
	[ 'incremental', 'steps', 'select id from wh.facts' ],
	[ 'snapshot', 'history', 'select id from wh.facts' ]);

$watch->sql(join ';', 'CREATE SCHEMA wh; CREATE TABLE wh.raw AS SELECT 1 AS id, 1.0 AS total', 'CREATE TABLE wh.steps (id int)',
	'CREATE TABLE wh.history (id int, note text)', map { "CREATE TABLE wh.other$_ ()" } 1 .. 10);
$watch->sql($_) for @dbt;

# A run takes longer than the delay, so that looks come between: what CASCADE has dropped is
# missing until its own turn.

$watch->set(removals => '1 h');
for my $model (@dbt)
{
	$watch->sql($model);
	$watch->marked;
}
is($watch->sql("SELECT count(*) FROM omni_refresh_job WHERE hard"), '0', 'dbt: no hard refresh while a run lasts');
is($watch->changes, '', '... and no removal is left after it');

# A run within the delay

$watch->set(delay => '20 s', removals => '1 h');
is($watch->told(join '', @dbt), '', 'a whole run nets to nothing');
is($watch->asked, '', '... and asks nothing');
is($watch->told(join '', @dbt, model('table', 'facts', 'select id, 1 as one, sum(total) as total from wh.staged group by id'), model('view', 'report', 'select * from wh.facts')),
	'wh.facts: + one integer; wh.report: + one integer', '... but for what has changed');

# Without a model that the project no longer has

$watch->set(removals => '1 s');
$watch->sql('DROP VIEW wh.report');
is($watch->removed, 'removed wh.report', 'what dbt leaves out is removed in the end');

# pg_restore --clean drops all first

my $dump = $node->basedir . '/wh.dump';
$node->command_ok([ 'pg_dump', '-Fc', '-n', 'wh', '-f', $dump, $node->connstr('postgres') ], 'pg_dump');
$watch->set(removals => '1 h');
my $before = $watch->sql('SELECT max(id) FROM omni_refresh_job');
$node->command_ok([ 'pg_restore', '--clean', '-d', $node->connstr('postgres'), $dump ], 'pg_restore --clean');
is($watch->marked, '', '... leaves all as it was');
is($watch->changes, '', '... no removal is left');
is($watch->sql("SELECT count(*) FROM omni_refresh_job WHERE hard AND id > $before"), '0', '... no hard refresh was asked for');

# ... and its end may be far from its beginning: half of it, a look, and the other half

my $script = $node->basedir . '/wh.sql';
$node->command_ok([ 'pg_restore', '--clean', '-f', $script, $dump ], 'pg_restore into a script');
my ($drops, $creates) = slurp_file($script) =~ s{^\\(?:un)?restrict.*$}{}mgr =~ /\A(.*?)(^CREATE SCHEMA wh.*)\z/ms;
$watch->sql($drops);
is($watch->marked, '', 'between the two halves');
like($watch->changes, qr/wh\.facts removed hard/, '... all is missing');
$watch->sql($creates);
is($watch->marked, '', '... and back in the end');
is($watch->changes, '', '... without a removal');
is($watch->sql("SELECT count(*) FROM omni_refresh_job WHERE hard AND id > $before"), '0', '... or a hard refresh');

# IMPORT FOREIGN SCHEMA, and extensions

SKIP:
{
	skip 'no postgres_fdw', 2 if $watch->sql(q{SELECT count(*) FROM pg_available_extensions WHERE name = 'postgres_fdw'}) eq '0';
	$watch->sql('CREATE EXTENSION postgres_fdw; CREATE SERVER self FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host $$' . $node->host . '$$, port $$' . $node->port . '$$);
		CREATE USER MAPPING FOR CURRENT_USER SERVER self; CREATE SCHEMA imported');
	is($watch->told('IMPORT FOREIGN SCHEMA sales FROM SERVER self INTO imported'), 'added imported.orders', 'IMPORT FOREIGN SCHEMA');
	is($watch->told('DROP EXTENSION postgres_fdw CASCADE') . $watch->changes, 'imported.orders removed hard', '... DROP EXTENSION');
}
SKIP:
{
	skip 'no pg_stat_statements', 3 if $watch->sql(q{SELECT count(*) FROM pg_available_extensions WHERE name = 'pg_stat_statements'}) eq '0';
	is($watch->told(q{CREATE EXTENSION pg_stat_statements SCHEMA sales VERSION '1.8'}), 'added sales.pg_stat_statements', 'CREATE EXTENSION');
	like($watch->told('ALTER EXTENSION pg_stat_statements UPDATE'), qr/added sales.pg_stat_statements_info; sales.pg_stat_statements: (- \w+, )*\+ /, '... ALTER EXTENSION UPDATE');
	like($watch->told('ALTER EXTENSION pg_stat_statements SET SCHEMA wh'), qr/added wh.pg_stat_statements(_info)?, wh.pg_stat_statements/, '... SET SCHEMA');
}

$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/terminating background worker/);
done_testing();
