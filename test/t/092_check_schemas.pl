# omni_refresh_check() with a server that names a model: the model's name, and the schemas of this
# database that Omni does not know.

use strict;
use warnings FATAL => 'all';

use JSON::PP;
use OmniAPI;
use OmniFault;
use OmniTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $test = OmniTest->new('check_schemas', "omni_refresh.idle_timeout = '10 min'");
my ($node, $omni) = ($test->node, $test->omni);
my ($model, $branch) = ($omni->model, $omni->branch);
my $check = 'SELECT json_agg(c) FROM omni_refresh_check() AS c';

# The line of a step
sub line
{
	my ($name, $before, $role) = @_;
	my ($stdout, $stderr) = $test->outcome(($before // '') . "; $check", undef, $role);

	unlike($stderr, qr/ERROR|FATAL/, 'the check raises nothing') or return 'none';
	fail("the key is shown: $stdout") if index("$stdout$stderr", $omni->key) >= 0;
	my ($line) = grep { $_->{check_name} eq $name } @{ decode_json(($stdout =~ /^(\[\{.*)/ms)[0]) };
	return $line ? ($line->{ok} ? 'ok: ' : 'not ok: ') . $line->{detail} . (defined $line->{hint} ? "  $line->{hint}" : '') : 'none';
}

sub paths { return join ' ', map { my $query = $_->{query} ? "?$_->{query}" : ''; "$_->{path}$query" =~ s|^/api/v1/||r } $omni->requests }

# Without a model

like(line('model'), qr/^ok: none/, 'a server that names no model');
is(line('schemas'), 'none', '... whose schemas are not looked for');

# The model

$test->sql("ALTER SERVER omni OPTIONS (ADD model '$model')");
$omni->reset;
is(line('model'), qq{ok: "Model 0" ($model)}, 'the model is named');
is(paths(), "models?modelId=$model models/$model/schemas", '... by one request, and one more for the schemas');
$omni->reset;
my $nameless = (grep { $_ ne $model } split /\n/, $test->sql('SELECT id FROM omni_refresh_models() WHERE name IS NULL'))[0];
is(line('model', "ALTER SERVER omni OPTIONS (SET model '$nameless')"), "ok: $nameless, which has no name", 'a model may have no name');
my $missing = '00000000-0000-0000-0000-000000000001';
$omni->reset;
like(line('model', "ALTER SERVER omni OPTIONS (SET model '$missing')"), qr/^not ok: Omni has no model $missing, .*"model".*omni_refresh_models\(\)/, 'a model that does not exist');
is(paths(), "models?modelId=$missing", '... and whose schemas are not asked for');
is(line('schemas'), 'none', '... or told of');
$test->sql('ALTER SERVER omni OPTIONS (SET model \'' . uc($model) . '\')');
for my $case ([ qq({"records": [1, {"id": 2}, {"id": "$model", "name": "found"}]}), qr/^ok: "found"/ ], [ '{"records": {}}', qr/^not ok: Omni has no model/ ],
	[ qq({"records": [{"id": "$model", "name": "x", "deletedAt": "2025-01-01"}]}), qr/^not ok: Omni has no model/ ],
	[ qq({"records": [{"id": "$model", "name": ["x"]}]}), qr/^ok: $model, which has no name/ ],
	[ qq({"records": [{"id": "$model", "name": ") . $omni->key . '"}]}', qr/^ok: "\[API key\]"/ ],
	[ qq({"records": [{"id": "$model", "name": ") . 'n' x 1000 . '"}]}', qr/^ok: "n{255}" \($model\)$/ ])
{
	$omni->reset;
	$omni->fault('answer', status => 200, body => $case->[0], path => '/models$');
	like(line('model'), $case->[1], 'an answer about the model: ' . substr($case->[0] =~ s/[^\x20-\x7e]/?/gr, 0, 100) =~ s/omni_osk_\w*/KEY/r);
}

# The schemas

$omni->reset;
is(line('schemas'), 'ok: this database has no schemas with tables or views', 'a database without tables');
$test->sql(q{
	CREATE SCHEMA sales; CREATE SCHEMA "Odd. name"; CREATE SCHEMA empty; CREATE SCHEMA views; CREATE SCHEMA "APPLES"; CREATE SCHEMA functions;
	CREATE TABLE sales.orders (); CREATE TABLE "Odd. name".t (); CREATE VIEW views.v AS SELECT 1; CREATE MATERIALIZED VIEW "APPLES".m AS SELECT 1;
	CREATE TYPE empty.pair AS (a int, b int); CREATE SEQUENCE empty.s; CREATE FUNCTION functions.f() RETURNS int LANGUAGE sql AS 'SELECT 1';
	CREATE SCHEMA cron; CREATE TABLE cron.job (); ALTER EXTENSION omni_refresh ADD TABLE cron.job;});
$omni->reset;
like(line('schemas'), qr/^not ok: Omni does not know 4 of 4 schemas .*: "APPLES", "Odd\. name", "sales", "views"  Refresh the whole model.*still ends "completed"\.$/,
	'schemas that Omni does not know');
for my $known ([ 'sales', 'odd. NAME', 'views', 'apples' ], [ 'warehouse.SALES', 'warehouse.Odd. name', 'w.h.views', 'warehouse.APPLES', 'warehouse.more' ])
{
	$omni->set(schemas => $known);
	is(line('schemas'), 'ok: Omni knows all 4 schemas with tables or views of this database', '... and those that it knows, whatever case and catalog');
}
$omni->set(schemas => [ 'sales.odd. name', 'warehouse.views', 'warehouse.apples', 'Sale', 'sales_', '', '.', "'; DROP TABLE sales.orders; --" ]);
like(line('schemas'), qr/^not ok: Omni does not know 1 of 4 schemas .*: "sales"  /, 'a catalog is no schema');
$test->sql(join ';', map { "CREATE SCHEMA many$_; CREATE TABLE many$_.t ()" } 1 .. 20);
like(line('schemas'), qr/^not ok: Omni does not know 21 of 24 schemas .*: "many1", (?:"many\d+", ){8}"many\d+" and 11 more  /, 'of many, some are named');
$test->sql(join ';', map { "DROP SCHEMA many$_ CASCADE" } 1 .. 20);
$test->sql(q{CREATE ROLE plain LOGIN; GRANT USAGE ON FOREIGN SERVER omni TO plain; CREATE USER MAPPING FOR plain SERVER omni OPTIONS (api_key_file '} . $test->{key_file} . q{')});
like(line('schemas', '', 'plain'), qr/^not ok: Omni does not know 1 of 4 schemas/, 'an unprivileged user learns it, too');
is(line('schemas', $_) =~ /^not ok: Omni does not know 1 of 4/, 1, "... also after $_")
	for 'BEGIN READ ONLY', 'BEGIN ISOLATION LEVEL SERIALIZABLE', q{CREATE SCHEMA IF NOT EXISTS trap; CREATE FUNCTION trap.lower(text) RETURNS text LANGUAGE sql AS 'SELECT NULL::text';
		SET search_path = trap, public, pg_catalog};

# The branch

$test->sql("ALTER SERVER omni OPTIONS (ADD branch '$branch')");
$omni->reset;
like(line('schemas'), qr/^not ok: Omni does not know 4 of 4/, 'the branch of the server');
is(paths(), "models?modelId=$model models/$model/schemas?branch_id=$branch", '... is asked for');
$test->sql("ALTER SERVER omni OPTIONS (SET branch '$missing')");
like(line('schemas'), qr/^not ok: .*HTTP status 404.*No such branch of this model/, '... which Omni may not know');
$test->sql('ALTER SERVER omni OPTIONS (DROP branch)');

# Answers of another kind

for my $status (400, 401, 403, 404, 500, 429)
{
	$omni->reset;
	$omni->fault('answer', status => $status, body => '{"detail": "these are Omni\'s words"}', path => '/schemas$');
	like(line('schemas'), qr/^not ok: .*HTTP status $status.*these are Omni's words.*  [A-Z].*\.$/, "HTTP status $status is a line with a hint");
	is(scalar($omni->requests), 2, '... after one try');
}
$node->restart;					# the key may be used again
for my $body ('[]', '{}', '{"schemas": null}', '{"schemas": {"a": 1}}', '{"schemas": [1]}', '{"schemas": [["a"]]}', '{"schemas": [null]}', '<html>', '', '{"schemas": ["\u0000"]}',
	'[' x 100000)
{
	$omni->reset;
	$omni->fault('answer', status => 200, body => $body, path => '/schemas$');
	like(line('schemas'), qr/^not ok: unexpected response from server "omni": it is not a list of schemas  Check that the server's "base_url"/, 'not a list of schemas: ' . substr($body =~ s/[^\x20-\x7e]/?/gr, 0, 40));
}
for my $fault ('close', 'redirect', 'huge', 'not_utf8', 'nested')
{
	$omni->reset;
	$omni->fault($fault, path => '/schemas$', $fault eq 'huge' ? (size => 2 << 20) : ());
	like(line('schemas'), qr/^not ok: \S/, "no answer: $fault");
}
$omni->reset;
$omni->set(schemas => []);
like(line('schemas'), qr/^not ok: Omni does not know 4 of 4/, 'an empty list');
$omni->set(schemas => [ map { "warehouse.schema_$_" } 1 .. 20000 ]);
like(line('schemas'), qr/^not ok: Omni does not know 4 of 4/, 'a long one');

# The rate limit

$test->sql(q{ALTER SERVER omni OPTIONS (SET rate_limit '1')});
$node->restart;
$omni->reset;
like(line('schemas', q{SET omni_refresh.call_timeout = '300 ms'}), qr/^not ok: the rate limit of server "omni" leaves no room/, 'the rate limit holds for the schemas, too');
is(scalar($omni->requests), 1, '... which are not asked for then');

$test->done;
