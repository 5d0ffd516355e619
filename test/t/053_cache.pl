# omni_refresh_cache() and omni_refresh_cache_on_commit(): what Omni is asked, and what comes of it.

use strict;
use warnings FATAL => 'all';
use utf8;

use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniSQL qw(sql wait_for);

my $omni = OmniAPI->start;
my $node = OmniFault::node('cache', conf => "omni_refresh.track = on\nomni_refresh.min_interval = 0\n");
my $model = $omni->model;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
$node->safe_psql('postgres', 'CREATE ROLE loader LOGIN');

# What a statement prints, and all that it complains of.
sub said
{
	my ($sql, $db) = @_;
	my ($rc, $out, $err) = $node->psql($db // 'postgres', "\\set VERBOSITY verbose\n$sql");

	return join "\n", grep { $_ ne '' } $out, map { /(?:ERROR|WARNING|NOTICE|DETAIL|HINT):  (.*)/ ? $1 : () } split /\n/, $err;
}

sub reset_sql
{
	my ($policy, $reset_at) = @_;

	return "SELECT status, kind, hard, schemas, tables, job_id FROM omni_refresh_cache('$model', '$policy'" . (defined $reset_at ? ", '$reset_at')" : ')');
}

my $all_done = q{count(*) = 0 FROM omni_refresh_job WHERE status IN ('pending', 'sending', 'running')};

# What Omni is asked

is(said(reset_sql('nightly')), 'completed|cache||||', 'a cache is reset, and that is its end');
my ($request) = $omni->requests;
is("$request->{method} $request->{path}", "POST /api/v1/models/$model/cache_reset/nightly", '... by this request');
ok(!length($request->{body} // ''), '... which names no time') or note($request->{body});
is(sql(q{SELECT string_agg(event, ' ' ORDER BY id) FROM omni_refresh_event}), 'sending completed', '... as the log says');
is(sql('SELECT policy, reset_at, server, origin, requested_by = current_user, finished_at >= sent_at FROM omni_refresh_job'), 'nightly||omni|call|t|t',
	'... and the job');

for my $case ([ '2026-01-02 03:04:05.678901+00', '2026-01-02 03:04:05.678901+00' ], [ '2026-01-02 03:04:05+05:30', '2026-01-01 21:34:05+00' ],
	[ '1999-12-31', '1999-12-31 00:00:00+01' ])
{
	my ($given, $meant) = @$case;
	$omni->reset;
	like(said("SET timezone = 'Europe/Berlin'; SET datestyle = 'German'; " . reset_sql('nightly', $given)), qr/^completed/, "as of $given");
	($request) = $omni->requests;
	my $at = decode_json($request->{body})->{resetAt};
	like($at, qr/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:?\d\d)$/, '... in ISO 8601');
	is(sql("SELECT '$at'::timestamptz = '$meant'"), 't', '... is what Omni is told') or note($at);
	like($request->{headers}{'Content-Type'} // $request->{headers}{'content-type'} // '', qr{^application/json}, '... in JSON');
}

for my $case ([ 'every hour', 'every%20hour' ], [ 'a/b?c#d%41', 'a%2Fb%3Fc%23d%2541' ], [ 'täglich', 't%C3%A4glich' ], [ q{it''s "x"}, q{it%27s%20%22x%22} ], [ '...', '...' ])
{
	my ($policy, $encoded) = @$case;
	$omni->reset;
	utf8::encode(my $bytes = $policy);
	like(said(reset_sql($bytes)), qr/^completed/, "the policy $bytes");
	($request) = $omni->requests;
	is(lc($request->{path}), lc("/api/v1/models/$model/cache_reset/$encoded"), '... is encoded');
}

# What is refused before anything is sent

$omni->reset;
for my $case (
	[ "NULL, 'x'", qr/^22004: model must be given/ ], [ "'$model', NULL", qr/^22004: policy must be given/ ],
	[ "'$model', ''", qr/^22023: "" is not the name of a cache policy/ ], [ "'$model', E' \\t'", qr/^22023: / ],
	[ "'$model', '.'", qr/^22023: / ], [ "'$model', '..'", qr/^22023: / ], [ "'$model', repeat('x', 256)", qr/^54000: policy is too long/ ],
	[ "'$model', 'x', 'infinity'", qr/^22023: reset_at must not be in the future/ ], [ "'$model', 'x', '-infinity'", qr/^22023: / ],
	[ "'$model', 'x', now() + '1 h'", qr/^22023: .*\n.*Leave it out/ ])
{
	my ($arguments, $error) = @$case;
	like(said("SELECT $_($arguments)"), $error, "$_($arguments)") for 'omni_refresh_cache', 'omni_refresh_cache_on_commit';
}
like(said("SET omni_refresh.server = none; SELECT omni_refresh_cache('$model', 'x')"), qr/^42704: /, 'without a server');
sql('REVOKE USAGE ON FOREIGN SERVER omni FROM PUBLIC');
like(said("SET ROLE loader; SELECT omni_refresh_cache$_('$model', 'x')"), qr/^42501: /, "without USAGE: omni_refresh_cache$_()") for '', '_on_commit';
sql('GRANT USAGE ON FOREIGN SERVER omni TO PUBLIC');
like(said("SET omni_refresh.enabled = off; SELECT status, id FROM omni_refresh_cache('$model', 'x')"), qr/^canceled\|\n/, 'switched off');
is(scalar($omni->requests), 0, '... nothing is sent');
like(said("BEGIN; CREATE TABLE t (); SELECT status FROM omni_refresh_cache('$model', 'x'); ROLLBACK"), qr/cannot see yet.*omni_refresh_cache_on_commit\(\)/s,
	'what Omni cannot see yet is worth a warning');

# What Omni says

for my $case ([ 400, '22023' ], [ 401, '28000' ], [ 403, '42501' ], [ 404, '42704' ])
{
	my ($status, $sqlstate) = @$case;
	$omni->reset;
	$omni->fault('answer', path => 'cache_reset', status => $status, body => qq({"detail": "because of $status", "status": $status}));
	my $said = said(reset_sql('x'));
	like($said, qr/^$sqlstate: .*because of $status/s, "Omni's own words with HTTP status $status");
	unlike($said, qr/branch|refresh /, '... and no hint about refreshes');
	is(scalar($omni->requests), 1, '... after one request');
}
for my $status (500, 503, 429)
{
	$omni->reset;
	$omni->fault('answer', path => 'cache_reset', status => $status, headers => { 'Retry-After' => 0 });
	like(said(reset_sql('x')), qr/^completed/, "HTTP status $status is worth another attempt");
	is(scalar($omni->requests), 2, '... which is made');
}
$omni->reset;
$omni->fault('answer', path => 'cache_reset', status => 403, body => '{"error": "no", "message": "never"}');
like(said("SET omni_refresh.on_failure = warning; SELECT status FROM omni_refresh_cache('$model', 'x')"), qr/^failed\n42501: /, 'a failure can be a warning');

# On commit

$omni->reset;
sql('TRUNCATE omni_refresh_job, omni_refresh_event');
sql("BEGIN; SELECT omni_refresh_cache_on_commit('$model', 'never'); ROLLBACK");
is(sql("SELECT status, kind, policy, reset_at, hard, origin FROM omni_refresh_cache_on_commit('$model', 'once')"), 'pending|cache|once|||on_commit', 'queued is the reset of a cache');
wait_for('... and done', $all_done);
is(sql(q{SELECT string_agg(policy || ' ' || status, ', ') FROM omni_refresh_job}), 'once completed', '... but not what was rolled back');

# One transaction makes them, so that the worker sees them together.
sub merges
{
	my ($name, $requests, $expected) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$omni->reset;
	sql('TRUNCATE omni_refresh_job, omni_refresh_event');
	sql('BEGIN; ' . join('', map { "SELECT $_; " } @$requests) . 'COMMIT');
	wait_for("$name: done", $all_done);
	my @asked = sort map { ($_->{path} =~ m{/([^/?]+)$})[0] . ($_->{body} ? ' ' . (decode_json($_->{body})->{resetAt} // '') : '') } $omni->requests(qr/refresh|reset/);
	is(join(', ', map { s/T.*//r } @asked), $expected, $name);
	return;
}

my ($old, $new) = ('2026-01-01 12:00+00', '2026-02-02 12:00+00');
sub cache { return 'omni_refresh_cache_on_commit(' . join(', ', "'$model'", map { "'$_'" } @_) . ')' }
merges('of resets of one policy the latest wins', [ cache('a', $old), cache('a', $new), cache('a', $old) ], 'a 2026-02-02');
merges('one of the moment is the latest', [ cache('a', $old), cache('a'), cache('a', $new) ], 'a');
merges('policies stay apart', [ cache('a', $old), cache('b', $old), cache('b', $new) ], 'a 2026-01-01, b 2026-02-02');
merges('a refresh of the model is something else', [ "omni_refresh_on_commit('$model')", cache('a'), "omni_refresh_on_commit('$model', hard => false)" ], 'a, refresh');

# Another encoding

sql(q{CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0});
$node->safe_psql('latin', 'CREATE EXTENSION omni_refresh');
OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0, db => 'latin');
$omni->reset;
utf8::encode(my $policy = 'täglich');
like(said("SET client_encoding = 'UTF8'; " . reset_sql($policy), 'latin'), qr/^completed/, 'in a database of another encoding');
($request) = $omni->requests;
is(lc($request->{path}), lc("/api/v1/models/$model/cache_reset/t%C3%A4glich"), '... the address is in UTF-8');

done_testing();
