# Random DDL by several sessions at once, with watches that come and go: once all is quiet, the
# model that the stand-in keeps, from nothing but what it is asked, equals the catalogs.
#
# OMNI_SOAK_SEED repeats a run's statements, if not their order.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniFault;
use OmniLife;
use OmniWatch;

my $seed = $ENV{OMNI_SOAK_SEED} || time;
my $rounds = 4;
my $watch = OmniWatch->new('random', removals => '1 s');
my $node = $watch->node;
my $omni = $watch->omni;
my $model = $omni->model;
my $catalog = q{SELECT concat_ws(E'\t', nspname, relname, coalesce(attname, ''), coalesce(format_type(atttypid, atttypmod), ''))
	FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace
	LEFT JOIN pg_attribute AS a ON attrelid = c.oid AND attnum > 0 AND NOT attisdropped
	WHERE relkind IN ('r', 'p', 'v', 'm', 'f') AND relpersistence <> 't' AND nspname !~ '^pg_|^information_schema$' ORDER BY 1};

END { my $rc = $?; $watch->stop if $watch; $? = $rc; }

note("seed $seed");
srand($seed);

# Enough that random DROPs never remove more than half, and that a look takes several slices.
$watch->sql('CREATE SCHEMA base; DO $$ BEGIN FOR i IN 1 .. 300 LOOP EXECUTE format($f$CREATE TABLE base.t%s (a int, b text)$f$, i); END LOOP; END $$');
$watch->sql("CREATE SCHEMA s$_") for 1 .. 4;
my $file = $node->basedir . '/catalog.sql';
append_to_file($file, "SET search_path = pg_catalog;\n$catalog;\n");
$omni->set(catalog => join ' ', $node->installed_command('psql'), '-XAtqf', $file, '-d', '"' . $node->connstr('postgres') . '"');

sub pick { return $_[ int rand @_ ] }

# A statement of a session, which may fail.
sub statement
{
	my ($schema, $other, $table, $new, $column) = ('s' . (1 + int rand 4), 's' . (1 + int rand 4), 't' . int rand 8, 't' . int rand 8, 'c' . int rand 4);
	my $type = pick('int', 'text', 'numeric(8,2)', 'timestamptz');

	return pick(
		"CREATE TABLE $schema.$table ($column $type)", "CREATE TABLE $schema.$table ($column $type, x int)",
		"CREATE TABLE $schema.$table AS SELECT 1 AS one, now() AS $column", "CREATE VIEW $schema.$table AS SELECT 1 AS $column",
		"CREATE VIEW $schema.$table AS TABLE $other.$new", "CREATE MATERIALIZED VIEW $schema.$table AS SELECT 2 AS $column",
		"DROP TABLE $schema.$table CASCADE", "DROP VIEW $schema.$table CASCADE", "DROP TABLE $schema.$table",
		"ALTER TABLE $schema.$table ADD $column $type", "ALTER TABLE $schema.$table DROP $column CASCADE",
		"ALTER TABLE $schema.$table ALTER $column TYPE text", "ALTER TABLE $schema.$table RENAME $column TO c" . int rand 4,
		"ALTER TABLE $schema.$table RENAME TO $new", "ALTER TABLE $schema.$table SET SCHEMA $other",
		"CREATE TEMP TABLE $table (a int)", "CREATE INDEX ON $schema.$table ($column)", "TRUNCATE $schema.$table",
		"BEGIN; CREATE TABLE $schema.${table}_new ($column $type); DROP TABLE IF EXISTS $schema.$table CASCADE; ALTER TABLE $schema.${table}_new RENAME TO $table; COMMIT",
		"BEGIN; CREATE TABLE $schema.$table (r int); ROLLBACK", "BEGIN; CREATE TABLE $schema.$table (p $type); SAVEPOINT a; ALTER TABLE $schema.$table ADD q int; ROLLBACK TO a; COMMIT",
		"BEGIN; CREATE TABLE $schema.$table (p $type); SELECT pg_sleep(0.3); COMMIT",
		"DO \$\$ BEGIN CREATE TABLE $schema.$table (d $type); EXCEPTION WHEN others THEN NULL; END \$\$");
}

# What the stand-in knows, and what there is, in the same form.
sub known
{
	my $known = $omni->known;

	return join "\n", sort map { my $table = $_; %{ $known->{$table} } ? map { "$table.$_ $known->{$table}{$_}" } keys %{ $known->{$table} } : $table } keys %$known;
}

sub is_there
{
	return join "\n", sort map { my ($schema, $table, $column, $type) = split /\t/, $_, -1; $column eq '' ? "$schema.$table" : "$schema.$table.$column $type" }
		split /\n/, $watch->sql("SET search_path = pg_catalog; $catalog");
}

# Waits until nothing is left to ask for: all is in the watch's memory, and then it owes nothing. In one
# statement, the function would see what is later than the tables.
sub quiet
{
	return $watch->until("SELECT NOT EXISTS (SELECT FROM omni_refresh_changes('$model'))") && $watch->until(q{
		SELECT NOT EXISTS (SELECT FROM omni_refresh_watch WHERE owed_hard IS NOT NULL OR unfinished)
			AND NOT EXISTS (SELECT FROM omni_refresh_job WHERE status IN ('pending', 'sending', 'running'))});
}

$watch->set;
for my $round (1 .. $rounds)
{
	my @sessions = map {
		my $sql = join '', map { statement() . ";\nROLLBACK;\nSELECT pg_sleep(random() * 0.05);\n" } 1 .. 60;
		OmniFault::begin($node, "\\set ON_ERROR_STOP 0\n$sql");
	} 1 .. 3;

	# The watch goes and comes back while they run, with what it knows forgotten; Omni keeps it.
	if ($round == 2)
	{
		$watch->sql("SELECT omni_refresh_unwatch('$model')");
		$watch->sql('SELECT FROM ' . $watch->call);
	}
	if ($round == 3)
	{
		# a minute's wait; a second time it would be two more
		$omni->fault('answer', status => 400, times => 1);
	}
	$_->{psql}->finish for @sessions;
	ok(quiet(), "round $round is over");
	if ($round == 2)
	{
		# What was dropped before the watch was set anew is not known to be: a hard refresh tells.
		$watch->sql("SELECT FROM omni_refresh('$model')");
		ok(quiet(), '... also what was forgotten');
	}
	is(known(), is_there(), '... and Omni knows what there is') or note('seed ' . $seed);
}
cmp_ok($watch->sql('SELECT count(*) FROM omni_refresh_job'), '<', 200, 'by few requests');
note($watch->sql(q{SELECT count(*) FILTER (WHERE hard) || ' hard, ' || count(*) FILTER (WHERE NOT hard) || ' soft' FROM omni_refresh_job}));

$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/terminating background worker|no transaction in progress/);
done_testing();
