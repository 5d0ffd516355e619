# omni_refresh_models(): every page of Omni's list, as rows; nothing of it is believed, and nothing of
# it becomes a job.

use strict;
use warnings FATAL => 'all';
use utf8;

use HTTP::Tiny;
use JSON::PP;
use OmniFault;
use OmniLife;
use OmniTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $test = OmniTest->new('models', 'wal_level = replica', "omni_refresh.idle_timeout = '10 min'");
my ($node, $omni) = ($test->node, $test->omni);
my $json = JSON::PP->new;
my $count = 'SELECT count(*) FROM omni_refresh_models()';

# Some models of the stand-in, by themselves; returns them as Omni tells them.
sub make_models
{
	my ($number) = @_;
	my ($cursor, @records) = ('');

	$omni->set(models => $number);
	while (defined $cursor)
	{
		my $answer = HTTP::Tiny->new(http_proxy => undef, proxy => undef)->get(
			$omni->http . "/api/v1/models?pageSize=100&include=activeBranches$cursor",
			{ headers => { Authorization => 'Bearer ' . $omni->key } });
		my $page = decode_json($answer->{content});
		push @records, @{ $page->{records} };
		$cursor = $page->{pageInfo}{nextCursor};
		$cursor = "&cursor=%2B" . substr($cursor, 1, -1) . "%3D" if defined $cursor;
	}
	return @records;
}

# The requests that came from the database
sub asked
{
	return grep { $_->{headers}{'user-agent'} =~ /^omni_refresh/ } $omni->requests;
}

# The parameters of a request: names to values, as they are
sub parameters
{
	my ($request) = @_;
	my %parameters;

	foreach my $pair (split /&/, $request->{query})
	{
		my ($name, $value) = map { s/\+/ /gr =~ s/%([0-9A-Fa-f]{2})/chr hex $1/ger } split /=/, $pair, 2;
		utf8::decode($value) or fail("parameter $name is UTF-8");
		$parameters{$name} = $value;
	}
	return \%parameters;
}

# The result of a query, rows of omni_refresh_models(), as hash references
sub rows
{
	my ($from) = @_;
	my $rows = $test->sql("SET timezone = 'UTC'; SELECT coalesce(json_agg(m), '[]') FROM $from AS m");

	return @{ decode_json($rows) };
}

# What they should be for models of Omni's
sub as_rows
{
	return map { {
			id => $_->{id}, name => $_->{name}, kind => $_->{modelKind}, connection_id => $_->{connectionId},
			base_model_id => $_->{baseModelId}, branches => $_->{branches}, updated_at => $_->{updatedAt} =~ s/\.000Z$/+00:00/r } } @_;
}

# A page that Omni might answer with
sub page
{
	my ($cursor, @records) = @_;
	my $more = defined $cursor ? JSON::PP::true : JSON::PP::false;

	return $json->encode({ pageInfo => { hasNextPage => $more, nextCursor => $cursor, pageSize => 100, totalRecords => 1000 },
			records => \@records });
}

sub answer
{
	my ($body, %extras) = @_;

	$omni->fault('answer', status => 200, body => $body, path => '/models$', %extras);
	return;
}

sub quoted
{
	my ($text) = @_;

	utf8::encode($text);
	return "'" . $text =~ s/'/''/gr . "'";
}

# Calls a query that must fail; returns the error.
sub fails
{
	my ($sql, $role) = @_;
	my ($stdout, $stderr) = $test->outcome($sql // $count, undef, $role);
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	is($stdout, '', 'what fails returns nothing: ' . ($stderr =~ /^(.*)/)[0]);
	return $stderr;
}

# One page, and several

my @models = make_models(5);
is_deeply([ rows('omni_refresh_models()') ], [ as_rows(@models) ], 'the models of one page are as Omni tells them');
my ($request, @more) = asked();
is(scalar(@more), 0, '... by one request');
is("$request->{method} $request->{path} $request->{body}", 'GET /api/v1/models ', '... for the list of models');
is_deeply(parameters($request), { pageSize => '100', include => 'activeBranches' }, '... a hundred a page, with their branches');
is($test->sql('SELECT pg_typeof(id), pg_typeof(branches), pg_typeof(updated_at), branches -> 0 ->> \'id\'
	FROM omni_refresh_models() LIMIT 1'), 'uuid|jsonb|timestamp with time zone|' . $omni->branch, '... of the types that one expects');
ok((grep { !defined $_->{name} } @models) && (grep { !defined $_->{modelKind} } @models), '... some of which have no name or no kind');

for my $number (0, 1, 100, 101, 250)
{
	$omni->reset;
	@models = make_models($number);
	is_deeply([ rows('omni_refresh_models()') ], [ as_rows(@models) ], "$number models are all there, once, in order");
	is(scalar(asked()), $number > 200 ? 3 : $number > 100 ? 2 : 1, '... by as many requests as there are pages');
}
my @asked = asked();
like($asked[1]{query}, qr/&cursor=%2B[0-9a-f-]{36}%3D$/i, 'a cursor is percent-encoded');
is_deeply([ map { parameters($_)->{cursor} } @asked ], [ undef, "+$models[99]{id}=", "+$models[199]{id}=" ], '... and arrives as it was');
is(scalar(keys %{ { map { $_->{connection} => 1 } @asked } }), 1, '... on one connection');
is($test->sql("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY; $count; COMMIT"), '250', 'a transaction that only reads will do');

# Filters are Omni's

$omni->reset;
@models = make_models(40);
is_deeply([ rows(q{omni_refresh_models('Model 4')}) ], [ as_rows(grep { ($_->{name} // '') eq 'Model 4' } @models) ], 'a name');
is_deeply([ rows(q{omni_refresh_models(kind => 'SHARED')}) ], [ as_rows(grep { ($_->{modelKind} // '') eq 'SHARED' } @models) ], 'a kind');
is_deeply([ rows(q{omni_refresh_models('Model 4', 'SHARED')}) ], [ as_rows($models[4]) ], 'both');
is_deeply([ rows(q{omni_refresh_models('Model 4', 'SCHEMA')}) ], [], 'none is of both');
is_deeply([ rows(q{omni_refresh_models(NULL, NULL)}) ], [ as_rows(@models) ], 'NULL is no filter');
is_deeply([ rows(q{omni_refresh_models('')}) ], [], 'an empty name is one');
my $size = { pageSize => '100', include => 'activeBranches' };
is_deeply([ map { parameters($_) } asked() ], [
		{ %$size, name => 'Model 4' }, { %$size, modelKind => 'SHARED' }, { %$size, name => 'Model 4', modelKind => 'SHARED' },
		{ %$size, name => 'Model 4', modelKind => 'SCHEMA' }, $size, { %$size, name => '' } ], '... as Omni is asked');
for my $name ('a&cursor=b', 'a=b#c', '100%', '%41', 'a+b', 'a b', 'it\'s "q"', 'back\\slash', "tab\tnew\nline", '?/../..', 'Größe', '表', '😀')
{
	$omni->reset;
	is($test->sql('SELECT count(*) FROM omni_refresh_models(' . quoted($name) . ', ' . quoted($name) . ')'), '0', 'a filter that needs encoding');
	($request) = asked();
	is_deeply(parameters($request), { %$size, name => $name, modelKind => $name }, '... arrives as it was written');
	like($request->{query}, qr/^[!-~]+$/, '... in printable ASCII');
}
$omni->reset;
for my $filter ([ 'x', 2500 ], [ '/', 833 ], [ 'é', 416 ])
{
	my ($character, $most) = @$filter;
	for my $argument ('name', 'kind')
	{
		is($test->sql("SELECT count(*) FROM omni_refresh_models($argument => repeat('$character', $most))"), '0', "a long $argument is sent");
		like(fails("SELECT omni_refresh_models($argument => repeat('$character', $most + 1))"),
			qr/^ERROR:  54000: $argument is too long\nDETAIL:  It may have 2500 bytes/, '... but not one that is too long');
	}
}
is(scalar(asked()), 6, '... which is not sent');
like(fails(q{SELECT omni_refresh_models(repeat('x', 20000000))}), qr/^ERROR:  54000/, 'a name that is far too long is no internal error');

# What is deleted, what is missing, how names are spelled

$omni->reset;
my $id = $omni->model;
my %whole = (id => $id, name => 'n', modelKind => 'SHARED', connectionId => $id, baseModelId => undef,
	updatedAt => '2025-06-01T10:00:00.123Z', deletedAt => undef, branches => []);
answer(page(undef, { %whole, name => 'alive' }, { %whole, name => 'dead', deletedAt => '2025-06-02T00:00:00.000Z' }));
is($test->sql('SELECT name FROM omni_refresh_models()'), 'alive', 'what is deleted is left out');
answer(page(undef, { %whole, id => uc $id }, { id => $id }, { %whole, map { $_ => undef } qw(name modelKind connectionId branches updatedAt) }));
is($test->sql(q{SET timezone = 'Asia/Tokyo'; SELECT id, name, kind, connection_id, base_model_id, branches, updated_at FROM omni_refresh_models()}),
	"$id|n|SHARED|$id||[]|2025-06-01 19:00:00.123+09\n$id||||||\n$id||||||", 'what is null or missing is NULL');
answer(page(undef, { %whole, branches => [ { id => $id, name => "b\x{e4}" }, { id => $id, name => undef, more => { deep => [ 1, { } ] } } ] }));
is_deeply([ map { $_->{branches} } rows('omni_refresh_models()') ],
	[ [ { id => $id, name => "b\x{e4}" }, { id => $id, name => undef, more => { deep => [ 1, { } ] } } ] ], 'branches are as they come');
my @names = ('', ' ', 'a"b\\c/d', "tab\t\x{1}\x{7f}", 'Größe', 'مرحبا', "e\x{301}", '😀', 'x' x 100000, '$$', '%s%n', "<script>");
for my $spelling ($json, JSON::PP->new->ascii)
{
	answer($spelling->encode({ pageInfo => {}, records => [ map { { %whole, name => $_ } } @names ] }));
	is_deeply([ map { $_->{name} } rows('omni_refresh_models()') ], \@names, 'names are as they are, whatever they hold and however it is spelled');
}
answer(page(undef, map { { %whole, name => $_ } } 7, [ 'x' ], JSON::PP::true));
is($test->sql('SELECT count(*), count(name) FROM omni_refresh_models()'), '3|0', 'a name that is no text is none');

$test->sql("CREATE DATABASE latin1 ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0");
$test->set_up('latin1');
answer(page(undef, { %whole, name => "Gr\x{f6}\x{df}e \x{1f600}" }));
like($test->sql(q{SELECT name FROM omni_refresh_models(U&'Gr\00f6\00dfe')}, 'latin1'), qr/^Gr\?+e \?+$/, 'another encoding than UTF-8 makes question marks of names');
is(parameters((asked())[-1])->{name}, "Gr\x{f6}\x{df}e", '... but asks for the right ones');

# Wherever a function may stand

$omni->reset;
@models = make_models(250);
is($test->sql('SELECT id FROM omni_refresh_models() LIMIT 1'), $models[0]{id}, 'one row is enough for LIMIT 1');
is($test->sql('SELECT count(*) FROM (SELECT (omni_refresh_models()).id LIMIT 3) AS few'), '3', '... and in a list of columns');
is($test->sql('WITH a AS (SELECT * FROM omni_refresh_models()) SELECT count(*) FROM a JOIN omni_refresh_models() AS b USING (id)'), '250', 'a join');
is($test->sql(q{SELECT count(*) FROM (VALUES ('Model 0'), ('Model 1'), ('none')) AS wanted (name), omni_refresh_models(wanted.name) AS m}),
	'2', 'a lateral one');
is($test->sql(q{SELECT EXISTS (SELECT FROM omni_refresh_models('Model 249'))}), 't', 'a subquery');
is(($test->outcome(q{DO $$ DECLARE n int := 0; m record; BEGIN
	FOR m IN SELECT * FROM omni_refresh_models() LOOP n := n + 1; EXIT WHEN n = 7; END LOOP;
	BEGIN PERFORM omni_refresh_models('x', 'y') FROM omni_refresh_models(E'\x01') WHERE 1 / (n - 7) = 0; EXCEPTION WHEN division_by_zero THEN END;
	RAISE NOTICE '% %', n, (SELECT count(*) FROM omni_refresh_models()); END $$}))[1], 'NOTICE:  00000: 7 250', 'PL/pgSQL');

# A great many

$omni->set(models => 10000);
$omni->set(record => 0);
my $began = $omni->stats->{requests};
my $seconds = OmniLife::timed(sub {
	is($test->sql('SELECT count(*), count(DISTINCT id), count(name) FROM omni_refresh_models()'), '10000|10000|6667', '10,000 models are all there') });
note("... in $seconds s");
is($omni->stats->{requests} - $began, 100, '... on a hundred pages');
$omni->set(record => 1);

# Answers that are none

for my $case (
	[ 'a page that names itself', [ page('a'), page('a') ] ],
	[ 'two pages that name each other', [ map { page($_) } ('a', 'b') x 4 ] ],
	[ 'a way into a circle', [ map { page($_) } 'x', 'y', 'z', ('a' .. 'g') x 3 ] ])
{
	my ($what, $pages) = @$case;
	$omni->reset;
	answer($_) for @$pages;
	like(fails(), qr/^ERROR:  08P01: unexpected response from server "omni"\nDETAIL:  .+\nHINT:  .+/m, "it ends: $what");
	cmp_ok(scalar(asked()), '<', 20, '... soon');
}
$omni->reset;
answer(page("c $_ & + = \x{f6}", { %whole, name => "n$_" })) for 1 .. 10;
answer(page(undef, { %whole, name => 'last' }));
is($test->sql('SELECT count(*), count(DISTINCT name) FROM omni_refresh_models()'), '11|11', 'pages that go on are no circle');
is(parameters((asked())[10])->{cursor}, "c 10 & + = \x{f6}", '... whatever their names are');
$omni->reset;
answer($json->encode({ pageInfo => { hasNextPage => JSON::PP::false, nextCursor => 'last' }, records => [ \%whole ] }));
is($test->sql($count), '1', 'a last page may have a cursor');
is(scalar(asked()), 1, '... that nobody follows');

for my $case (
	[ 'empty' ], [ 'wrong_shape' ], [ 'truncated' ], [ 'nested' ], [ 'not_utf8' ], [ 'nul' ], [ 'nul_escape' ], [ 'redirect' ],
	[ 'huge', size => 2 << 20 ],
	map({ [ 'answer', status => 200, body => $_ ] } 'null', '7', '"x"', '{}', '<html></html>', ' ',
		'{"records": []}', '{"pageInfo": {}}', '{"pageInfo": [], "records": {}}', '{"pageInfo": {}, "records": [7]}',
		'{"pageInfo": {"hasNextPage": true, "nextCursor": null}, "records": []}', '{"pageInfo": {"hasNextPage": true}, "records": []}',
		'{"pageInfo": {}, "records": [[]]}', '{"pageInfo": null, "records": []}', '{"pageInfo": {}, "records": [null]}'),
	map({ [ 'answer', status => 200, body => page(undef, \%whole, { %whole, %$_ }) ] } { id => undef }, { id => 'x' }, { id => "{$id}" }, { id => '' },
		{ connectionId => 'x' }, { baseModelId => "$id " }, { updatedAt => 'soon' }, { updatedAt => '' }, { name => "a\0b" }),
	[ 'answer', status => 204 ], [ 'answer', status => 302, headers => { Location => 'https://elsewhere.example/' } ])
{
	my ($fault, %extras) = @$case;
	$omni->reset;
	$omni->fault($fault, %extras, path => '/models$');
	my $what = substr join(' ', $fault, map { $_ // '' } @extras{sort keys %extras}), 0, 60;
	like(fails(), qr/^ERROR:  08P01: unexpected response from server "omni"\nDETAIL:  .+\nHINT:  .+/m, "it is not Omni: $what");
	is(scalar(asked()), 1, '... and is not asked again');
}
$omni->reset;
answer(page('next', \%whole));
answer('[]');
like(fails(), qr/^ERROR:  08P01: /m, 'half a list is none');

# Refusals, with Omni's own words

for my $case (
	[ { status => 400 }, '22023' ], [ { status => 401 }, '28000' ], [ { status => 403 }, '42501' ], [ { status => 404 }, '42704' ], [ { status => 418 }, '38000' ],
	[ { status => 500 }, '08006' ], [ { status => 502 }, '08006' ], [ { status => 503 }, '08006' ])
{
	my ($extras, $sqlstate) = @$case;
	$omni->reset;
	$omni->fault('answer', %$extras, body => '{"detail": "no, since öä"}', times => -1, path => '/models$');
	like(fails("SET omni_refresh.call_timeout = '300 ms'; $count"),
		qr/^ERROR:  $sqlstate: server "omni" refused the \w+: HTTP status $extras->{status}\nDETAIL:  Omni says: no, since \xc3\xb6\xc3\xa4\nHINT:  .+/m,
		"HTTP status $extras->{status}");
	cmp_ok(scalar(asked()), '==', 1, '... is not tried again') if $extras->{status} < 500;
}
$omni->reset;
$omni->set(key => 'omni_osk_another');
like(fails(), qr/^ERROR:  28000: .*HTTP status 401\nDETAIL:  Omni says: Missing, invalid or revoked API key\n/m, 'a revoked key');
$omni->reset;
$omni->fault('echo_key', path => '/models$');
my $error = fails();
like($error, qr/^ERROR:  28000: .*HTTP status 401\nDETAIL:  .*\[API key\]/m, 'a key that is quoted');
ok(index($error, $omni->key) < 0, '... is not shown');
for my $fault ('close', 'reset', 'html_502')
{
	$omni->reset;
	make_models(150);
	$omni->fault('delay', delay => 0, path => '/models$');
	$omni->fault($fault, path => '/models$');
	is($test->sql($count), '150', "what fails once is tried again: $fault");
}

# The rate limit

$omni->reset;
make_models(300);
$omni->fault('delay', delay => 0, path => '/models$');
$omni->fault('answer', status => 429, headers => { 'Retry-After' => 2 }, path => '/models$');
is($test->sql($count), '300', 'what Omni wants to wait is waited for');
@asked = asked();
is(join(' ', map { parameters($_)->{cursor} // 'first' } @asked[1, 2]), join(' ', (parameters($asked[1])->{cursor}) x 2), '... and then the same page is asked for');
cmp_ok($asked[2]{time} - $asked[1]{time}, '>=', 1.9, '... not sooner');
is(scalar(@asked), 4, '... and each other page once');

$test->sql(q{ALTER SERVER omni OPTIONS (SET rate_limit '20')});
$node->restart;					# the limiter begins anew
$omni->reset;
make_models(3000);
$omni->set(rate_limit => 24);	# some of which was ours
my $call = OmniFault::call($node, "SET statement_timeout = '5 s'; $count");
is($call->{sqlstate}, '57014', 'pages beyond the rate limit wait');
is(scalar(asked()), 20, '... and are not asked for');
is((grep { $_->{status} != 200 } asked()), 0, '... so that Omni need not say so');
$error = fails("SET omni_refresh.call_timeout = '300 ms'; $count");
like($error, qr/^ERROR:  53000: the rate limit of server "omni" leaves no room/m, 'a first page does not wait longer than a call');
$test->sql(q{ALTER SERVER omni OPTIONS (SET rate_limit '0')});

# In the middle

for my $case ([ 'canceled', 'SELECT pg_cancel_backend(%d)', '57014' ], [ 'terminated', 'SELECT pg_terminate_backend(%d)', '57P01' ])
{
	my ($what, $sql, $sqlstate) = @$case;
	$omni->reset;
	make_models(150);
	$omni->fault('delay', delay => 0, path => '/models$');
	$omni->fault('hang', path => '/models$');
	my $call = OmniFault::begin($node, "$count;", app => 'listing');
	$omni->wait_for_requests(4);	# two of them ours
	my $pid = $test->sql(q{SELECT pid FROM pg_stat_activity WHERE application_name = 'listing'});
	my $seconds = OmniLife::timed(sub { $test->sql(sprintf $sql, $pid); OmniFault::finish($call) });
	is($call->{sqlstate}, $sqlstate, "a list that is $what");
	cmp_ok($seconds, '<', 2, '... ends at once');
	is($call->{out}, '', '... and there is no half of it');
	is($test->sql($count), '150', '... and the next one is whole');
}
$omni->reset;
make_models(150);
$omni->fault('delay', delay => 0, path => '/models$');
$omni->fault('hang', path => '/models$');
$call = OmniFault::call($node, "SET statement_timeout = '300 ms'; $count");
is($call->{sqlstate}, '57014', 'statement_timeout');
is($test->sql($count), '150', '... and the next one is whole');
$omni->reset;
@models = make_models(150);
$omni->fault('delay', delay => 0, path => '/models$');
$omni->fault('hang', path => '/models$');
$call = OmniFault::begin($node, 'SELECT count(*), count(DISTINCT id) FROM omni_refresh_models();');
$omni->wait_for_requests(4);
$test->sql('SELECT pg_terminate_backend(' . OmniFault::worker($node) . ', 10000)');
OmniFault::finish($call);
is($call->{out}, '150|150', 'the next worker goes on where the last one ended') or diag($call->{err});

# Who may not

$omni->reset;
$test->sql('CREATE ROLE lister LOGIN; CREATE ROLE outsider LOGIN; GRANT USAGE ON FOREIGN SERVER omni TO lister');
like(fails($count, 'lister'), qr/^ERROR:  28000: user mapping for "lister" on server "omni" does not exist\nHINT:  .+/m, 'no mapping');
like(fails($count, 'outsider'), qr/^ERROR:  42501: permission denied for foreign server omni\nHINT:  .+/m, 'no USAGE');
like(fails("SET omni_refresh.server = elsewhere; $count"), qr/^ERROR:  42704: server "elsewhere" does not exist\nHINT:  .+/m, 'no server');
rename $test->{key_file}, "$test->{key_file}.away";
like(fails(), qr/^ERROR:  28000: could not read API key file/m, 'no key file');
rename "$test->{key_file}.away", $test->{key_file};
is(scalar($omni->requests), 0, '... and nothing is sent');
is($test->sql('SELECT (SELECT count(*) FROM omni_refresh_job) + (SELECT count(*) FROM omni_refresh_event), pg_sequence_last_value(\'omni_refresh_job_id_seq\')'),
	'0|', 'nothing of all this is a job');

# No worker, no primary

my $session = OmniLife::session($node, 'postgres');
$test->sql('ALTER DATABASE postgres ALLOW_CONNECTIONS false; SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
	WHERE backend_type = \'omni_refresh worker\'', 'latin1');
like(($session->query($count))[1], qr/ERROR:  53400: could not start the background worker of omni_refresh\nDETAIL:  .+\nHINT:  .+/m, 'no background worker');
$test->sql('ALTER DATABASE postgres ALLOW_CONNECTIONS true', 'latin1');
$session->quit;
$node->stop;
$node->set_standby_mode;
$node->start;
like(fails(), qr/^ERROR:  25006: cannot send requests to Omni during recovery\nHINT:  Call the function on the primary\.$/m, 'a standby');
is(scalar($omni->requests), 0, '... sends nothing');

$test->done;
