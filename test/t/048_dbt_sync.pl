# omni_refresh_dbt_sync() and omni_refresh_dbt_sync_on_commit(): what Omni is asked, and what comes of it; and
# a kind of job that this version does not know.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;

my $omni = OmniAPI->start;
my $node = OmniFault::node('dbt', conf => "omni_refresh.track = on\nomni_refresh.min_interval = 0\n");
my $model = $omni->model;
my $branch = $omni->branch;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
$node->safe_psql('postgres', "CREATE SERVER whole FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url '" . $omni->http . "', model '$model', branch '$branch');
	CREATE USER MAPPING FOR PUBLIC SERVER whole OPTIONS (api_key '" . $omni->key . "')");

# What a statement prints, and all that it complains of.
sub said
{
	my ($sql) = @_;
	my ($rc, $out, $err) = $node->psql('postgres', "\\set VERBOSITY verbose\n$sql");

	return join "\n", grep { $_ ne '' } $out, map { /(?:ERROR|WARNING|NOTICE|DETAIL|HINT):  (.*)/ ? $1 : () } split /\n/, $err;
}

# What Omni was asked since the last time
my $asked = 0;
sub asked
{
	my @requests = $omni->requests(qr/dbt-sync|cache_reset/);
	my @asked = map { "$_->{method} $_->{path}" . (length($_->{query} // '') ? "?$_->{query}" : '') . (length($_->{body} // '') ? " $_->{body}" : '') } splice @requests, $asked;

	$asked += @asked;
	return join ', ', @asked;
}

sub ends
{
	my ($id, $expected, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return ok($node->poll_query_until('postgres', "SELECT status = '$expected' FROM omni_refresh_job WHERE id = $id"), $name);
}

# Both functions

like(said("SELECT status, kind, hard, schemas, tables, branch_id, job_id IS NOT NULL FROM omni_refresh_dbt_sync('$model', '$branch')"),
	qr/^(running|completed)\|dbt\|\|\|\|\Q$branch\E\|t$/, 'dbt is synced');
is(asked(), "POST /api/v1/models/$model/dbt-sync?branch_id=$branch", '... by this request, without a body');
ends(1, 'completed', '... and followed to its end');
$node->safe_psql('postgres', "SELECT omni_refresh_dbt_sync_on_commit('$model', '$branch') FROM generate_series(1, 2)");
ends(2, 'completed', 'a queued one, too');
is(asked(), "POST /api/v1/models/$model/dbt-sync?branch_id=$branch", '... once for a transaction that asks for it twice');
$node->safe_psql('postgres', 'SET omni_refresh.server = whole; SELECT FROM omni_refresh_dbt_sync_on_commit()');
ends(3, 'completed', 'model and branch may be those of the server');
is(asked(), "POST /api/v1/models/$model/dbt-sync?branch_id=$branch", '... which are asked for');
is($node->safe_psql('postgres', "BEGIN; SELECT FROM omni_refresh_dbt_sync_on_commit('$model', '$branch'); ROLLBACK; SELECT count(*) FROM omni_refresh_job"), '3',
	'what is rolled back leaves nothing');

# Arguments

is(said("SELECT omni_refresh_dbt_sync('$model')"), "22004: branch must be given\nOmni does this for one branch of a model only.\n"
	  . 'Pass the uuid of a branch, or leave out model, too, if the server has the options "model" and "branch".', 'a branch is needed');
like(said("SET omni_refresh.server = whole; SELECT omni_refresh_dbt_sync_on_commit('$model')"), qr/^22004: branch must be given$/m, '... also where the server has one, if a model is given');
like(said('SELECT omni_refresh_dbt_sync()'), qr/^22004: model must be given$/m, '... and a model');
is(asked(), '', '... before anything is sent');

# What it has in common with refreshes

$omni->set(job_seconds => 3600);
$node->safe_psql('postgres', "BEGIN; SELECT FROM omni_refresh_dbt_sync_on_commit('$model', '$branch'); SELECT FROM omni_refresh_cache_on_commit('$model', 'daily'); COMMIT");
ok($node->poll_query_until('postgres', q{SELECT string_agg(concat_ws(' ', kind, status), ', ' ORDER BY id DESC) LIKE 'cache pending, dbt running%' FROM omni_refresh_job}),
	'a reset waits for the sync before it');
ok($node->poll_query_until('postgres', q{SELECT count(*) = 1 FROM omni_refresh_event WHERE event = 'waiting'}), '... as its event tells');
unlike(asked(), qr/cache_reset/, '... and is not sent');
$omni->set(job_seconds => 0);
$node->safe_psql('postgres', q{UPDATE omni_refresh_job SET job_id = gen_random_uuid(), sent_at = now() - interval '16 min' WHERE status = 'running'});
ok($node->poll_query_until('postgres', q{SELECT status = 'completed' FROM omni_refresh_job WHERE kind = 'cache'}), '... until that has ended, or has taken too long');
is(asked(), "POST /api/v1/models/$model/cache_reset/daily", '... and then it is');

# What Omni refuses

my @refusals = (
	[ { dbt => 0 }, '38000', 'The connection of the model has no dbt: set it up in Omni.' ],
	[ { fault => [ 'answer', path => 'dbt-sync', status => 422, body => '{"detail": "Compilation Error in model orders", "status": 422}' ] }, '38000',
		'dbt itself has failed: look at the dbt settings of the connection in Omni, and at the project.' ]);
for my $case (@refusals)
{
	my ($what, $sqlstate, $hint) = @$case;
	$what->{fault} ? $omni->fault(@{ $what->{fault} }) : $omni->set(%$what);
	my $said = said("SELECT omni_refresh_dbt_sync('$model', '$branch')");
	like($said, qr/^$sqlstate: server "omni" refused the dbt sync: HTTP status \d+$/m, 'a refusal is named');
	like($said, qr/^\Q$hint\E$/m, '... with a hint of its own');
	$what->{fault} ? $omni->fault('none') : $omni->set(dbt => 1);
}
like(said("SELECT omni_refresh_dbt_sync('$model', '00000000-0000-0000-0000-000000000001')"), qr/^42704: .*\nOmni says: No such branch of this model\nCheck the uuids of model and branch/, 'a branch that is not there');
$omni->set(refresh_status => 'failed');
is(said("SELECT omni_refresh_dbt_sync('$model', '$branch')"), "38000: Omni could not sync dbt for the model on server \"omni\"\n"
	  . "Omni accepted the request and reported the status \"failed\", without a reason.\n"
	  . 'Look at the dbt settings of the connection in Omni: dbt may have failed, or Omni may not reach its repository.', 'a sync that fails says so');
$omni->set(refresh_status => 'running');
asked();

# A kind that a newer version may have queued

$node->safe_psql('postgres', q{
	ALTER TABLE omni_refresh_job DROP CONSTRAINT omni_refresh_job_kind_check;
	SET omni_refresh.server = whole;
	BEGIN;
	SELECT FROM omni_refresh_dbt_sync_on_commit();
	UPDATE omni_refresh_job SET kind = 'prophecy' WHERE status = 'pending';
	COMMIT});
ok($node->poll_query_until('postgres', q{SELECT status = 'failed' AND error LIKE '22023: job % is of an unrecognized kind%' FROM omni_refresh_job WHERE kind = 'prophecy'}),
	'a job of an unrecognized kind fails at once, and says why');
is(asked(), '', '... and nothing is sent for it');

$node->stop('fast');
done_testing();
