# A statement that makes the same call more than once, as (omni_refresh(...)).* does for each column, is
# warned; loops, several rows and several statements are not.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;

my $omni = OmniAPI->start;
my $node = OmniFault::node('repeat');
my $m = $omni->model;
my $f = "omni_refresh('$m')";
my $c = "omni_refresh_cache('$m', 'Daily')";

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
my $columns = $node->safe_psql('postgres', q{SELECT count(*) FROM pg_attribute WHERE attrelid = 'omni_refresh_job'::regclass AND attnum > 0});
$node->safe_psql('postgres', q{
	CREATE TABLE t (id bigint, status text);
	CREATE TABLE models AS SELECT '} . $m . q{'::uuid AS m FROM generate_series(1, 3)});

# Runs statements; returns how many requests they made, and how many warnings of this kind there were.
my $call;

sub counts
{
	my ($sql) = @_;

	$omni->reset;
	$call = OmniFault::call($node, $sql =~ /;$/ ? $sql : "$sql;");
	is($call->{status}, 0, 'it runs') or diag($call->{err});
	return join ' requests, ', scalar(() = $omni->requests), scalar(() = $call->{err} =~ /WARNING:  01000: this statement calls/g);
}

sub block { return "DO \$\$ DECLARE a omni_refresh_job; b omni_refresh_job; x text; i int; BEGIN $_[0] END \$\$" }

is(counts("SELECT ($f).*"), "$columns requests, " . ($columns - 1), 'a call for each column: a warning from the second on');
is($call->{message}, 'this statement calls omni_refresh() again with the same arguments', '... which says so');
is($call->{detail}, 'Each call sends a request of its own.', '... and what that means');
is($call->{hint}, 'Write SELECT * FROM omni_refresh(...): PostgreSQL expands (omni_refresh(...)).* into a call for each column.', '... and what to do');
is(counts("SELECT ($c).*"), "$columns requests, " . ($columns - 1), 'a cache policy likewise');
like($call->{hint}, qr/SELECT \* FROM omni_refresh_cache\(\.\.\.\)/, '... by its name');

my %repeated = (
	'two columns' => "SELECT ($f).id, ($f).status",
	'lists that are alike' => "SELECT (omni_refresh('$m', schemas => '{b, a}')).id, (omni_refresh('$m', schemas => '{b, a, b}')).status",
	'what is inserted' => "INSERT INTO t SELECT ($f).id, ($f).status",
	'what is returned' => "INSERT INTO t VALUES (1, 'x') RETURNING ($f).id, ($f).status",
	'an expression of PL/pgSQL' => block("x := ($f).status || ($f).id;"),
	'a statement of PL/pgSQL' => block("SELECT ($f).id, ($f).status INTO i, x;"),
	'prepared' => "PREPARE p AS SELECT ($f).id, ($f).status; EXECUTE p",
	'failing' => "SET omni_refresh.on_failure = warning; SELECT (omni_refresh(m)).id, (omni_refresh(m)).status FROM (VALUES (gen_random_uuid())) AS v (m)");
for my $how (sort keys %repeated)
{
	is(counts($repeated{$how}), '2 requests, 1', "two calls: $how");
}
is(counts('SELECT (omni_refresh(m)).id, (omni_refresh(m)).status FROM models'), '6 requests, 3', 'two calls for each row: a warning for each row');

my %intended = (
	'one row' => [ "SELECT * FROM $f; SELECT $f; SELECT ($f).status", 3 ],
	'several rows' => [ 'SELECT omni_refresh(m) FROM models', 3 ],
	'several rows, in a join' => [ q{SET enable_nestloop = off; SET enable_hashjoin = off;
		SELECT count(*) FROM models AS a LEFT JOIN models AS b ON a.m = b.m AND (omni_refresh(a.m)).status = b.m::text}, 9 ],
	'several rows, by columns' => [ 'SELECT (r).* FROM (SELECT omni_refresh(m) AS r FROM models OFFSET 0) AS s', 3 ],
	'several rows, in FROM' => [ 'SELECT j.* FROM models, omni_refresh(m) AS j', 3 ],
	'other arguments' => [ "SET omni_refresh.on_failure = warning; SELECT ($f).id, (omni_refresh('$m', hard => false)).id, (omni_refresh('$m', schemas => '{a}')).id, (omni_refresh('$m', schemas => '{a, b}')).id,
		(omni_refresh('$m', tables => '{a}')).id, (omni_refresh('$m', '${\ $omni->branch}')).id", 6 ],
	'other policies' => [ "SELECT ($c).id, (omni_refresh_cache('$m', 'Other')).id, (omni_refresh_cache('$m', 'Daily', now())).id, ($f).id", 4 ],
	'two functions in FROM' => [ "SELECT a.id, b.id FROM $f AS a, $f AS b", 2 ],
	'a query of two parts' => [ "SELECT $f UNION ALL SELECT $f", 2 ],
	'several statements' => [ "SELECT $f \\; SELECT $f", 2 ],
	'a function of two statements' => [ "CREATE FUNCTION pg_temp.f() RETURNS omni_refresh_job LANGUAGE sql AS \$\$ SELECT $f; SELECT $f; \$\$; SELECT pg_temp.f()", 2 ],
	'two assignments' => [ block("a := $f; b := $f;"), 2 ],
	'two conditions' => [ block("IF ($f).status = 'x' THEN i := 1; ELSIF ($f).status = 'y' THEN i := 2; END IF;"), 2 ],
	'a loop of assignments' => [ block("FOR i IN 1 .. 3 LOOP a := $f; END LOOP;"), 3 ],
	'a loop of assignments, planned anew' => [ block("FOR i IN 1 .. 3 LOOP a := $f; EXECUTE 'CREATE SCHEMA s' || i; END LOOP; ROLLBACK;"), 3 ],
	'a loop with commits' => [ block("FOR i IN 1 .. 3 LOOP a := $f; COMMIT; END LOOP;"), 3 ],
	'a loop with exceptions' => [ block("FOR i IN 1 .. 3 LOOP BEGIN a := $f; RAISE division_by_zero; EXCEPTION WHEN division_by_zero THEN NULL; END; END LOOP;"), 3 ],
	'a loop of queries' => [ block("FOR i IN 1 .. 3 LOOP PERFORM $f; SELECT * INTO a FROM $f; END LOOP;"), 6 ],
	'a loop over rows' => [ block('FOR a IN SELECT j.* FROM models, omni_refresh(m) AS j LOOP END LOOP;'), 3 ],
	'prepared, twice' => [ "PREPARE p AS SELECT ($f).status; EXECUTE p; EXECUTE p", 2 ],
	'a trigger' => [ "BEGIN; CREATE FUNCTION pg_temp.g() RETURNS trigger LANGUAGE plpgsql AS \$\$ DECLARE j omni_refresh_job; BEGIN j := $f; RETURN NULL; END \$\$;
		CREATE TRIGGER g AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION pg_temp.g(); INSERT INTO t VALUES (1), (2); ROLLBACK", 2 ],
	'turned off' => [ "SET omni_refresh.enabled = off; SELECT ($f).*", 0 ]);
for my $how (sort keys %intended)
{
	my ($sql, $requests) = @{ $intended{$how} };
	is(counts($sql), "$requests requests, 0", "no warning: $how") or diag($call->{err});
}

# A statement that is canceled leaves nothing behind.

$omni->reset;
$omni->fault('hang', times => -1);
$call = OmniFault::begin($node, "\\set ON_ERROR_STOP off\nSET statement_timeout = '500 ms'; SELECT ($f).id, ($f).status; SELECT ($f).id; SELECT ($f).id;");
OmniFault::finish($call);
is(scalar(() = $call->{err} =~ /57014/g), 3, 'statements that are canceled');
unlike($call->{err}, qr/this statement calls/, '... have nothing to do with each other');

unlike(slurp_file($node->logfile), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');
done_testing();
