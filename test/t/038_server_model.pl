# The options model, branch and cache_policy of a server: what the functions take for arguments that are
# null or left out, and when; several models at one Omni instance are several servers.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;
use OmniSQL qw(sql);

my $omni = OmniAPI->start;
my $node = OmniFault::node('model', conf => "omni_refresh.min_interval = 0\n");
my ($model, $branch) = ($omni->model, $omni->branch);
my ($other, $twig) = map { sprintf '00000000-0000-0000-0000-%012d', $_ } 1, 2;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
$node->safe_psql('postgres', 'CREATE ROLE loader LOGIN; CREATE ROLE stranger LOGIN; REVOKE USAGE ON FOREIGN SERVER omni FROM PUBLIC;
	GRANT USAGE ON FOREIGN SERVER omni TO loader');

# Any model and branch will do.
sub forget
{
	$omni->reset;
	$omni->fault('answer', status => 200, body => qq({"status": "running", "jobId": "$other"}), times => -1, path => 'refresh');
	$node->safe_psql('postgres', 'TRUNCATE omni_refresh_job, omni_refresh_event');
	return;
}

sub options
{
	my ($options, $server) = @_;

	return sql('ALTER SERVER ' . ($server // 'omni') . " OPTIONS ($options)");
}

# What statements print and complain of, with names for the uuids.
sub said
{
	my ($sql, %options) = @_;
	my $call = OmniFault::call($node, $sql, %options);

	return named(join ' ', grep { $_ ne '' } $call->{out} =~ s/\n/ /gr, @$call{qw(sqlstate detail)});
}

sub named
{
	my ($text) = @_;
	my %names = ($model => 'model', $branch => 'branch', $other => 'other', $twig => 'twig');

	$text =~ s/$_/$names{$_}/g for keys %names;
	return $text;
}

# The requests that have arrived: model, or with a policy, and branch.
sub asked
{
	return join ', ', map {
		my ($of, $what) = $_->{path} =~ m{/models/([^/]+)/(?:refresh|cache_reset/(.*))$};
		named(join ' ', grep { defined } $of, $what, ($_->{query} // '') =~ /branch_id=([^&]+)/) } $omni->requests(qr/models/);
}

sub settled
{
	return $node->poll_query_until('postgres', q{SELECT count(*) = 0 FROM omni_refresh_job WHERE status IN ('pending', 'sending')});
}

# A call, and the same on commit, has these columns and makes this request.
sub takes
{
	my ($function, $arguments, $columns, $request) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	for my $which ("$function($arguments)", "${function}_on_commit($arguments)")
	{
		forget();
		is(said("SELECT concat_ws(' ', model_id, branch_id, policy) FROM $which"), $columns, "the row of $which");
		ok(settled(), '... is sent');
		is(asked(), $request // $columns, '... as this request');
		is(named(sql(q{SELECT concat_ws(' ', model_id, branch_id, policy) FROM omni_refresh_job})), $columns, '... and written down');
	}
	return;
}

# What is taken, and when

like(said('SELECT omni_refresh()'), qr/^22004 .*"omni" has no option "model"/, 'without the option, the argument is needed');
options("ADD model '{\U$model\E}'");
takes('omni_refresh', '', 'model');
takes('omni_refresh', 'NULL', 'model');
takes('omni_refresh', "NULL, NULL, false, '{sales}', '{orders}'", 'model');
takes('omni_refresh', "schemas => '{sales}'", 'model');
takes('omni_refresh', "'$other'", 'other');
takes('omni_refresh', "branch => '$twig'", 'model twig');
like(said("SELECT $_()"), qr/^22004 .*"omni" has no option "cache_policy"/, "$_() needs a policy, too") for 'omni_refresh_cache', 'omni_refresh_cache_on_commit';
takes('omni_refresh_cache', "policy => 'hourly'", 'model hourly');

options("ADD branch '$branch', ADD cache_policy 'nightly'");
takes('omni_refresh', '', 'model branch');
takes('omni_refresh', "'$other'", 'other');
takes('omni_refresh', "'$model'", 'model');
takes('omni_refresh', "branch => '$twig'", 'model twig');
takes('omni_refresh', "'$other', '$twig', true", 'other twig');
takes('omni_refresh_cache', '', 'model nightly');
takes('omni_refresh_cache', "'$model'", 'model nightly');
takes('omni_refresh_cache', "NULL, 'hourly'", 'model hourly');
takes('omni_refresh_cache', "reset_at => '2026-01-01'", 'model nightly');

# A branch that is taken counts in the length of the URL.

my $most = 7700 - length "/api/v1/models/$model/refresh?hard_refresh=false&tables=";
my $long = sub { "tables => ARRAY[repeat('x', $_[0])]" };
forget();
for my $function ('omni_refresh', 'omni_refresh_on_commit')
{
	is(said("SELECT model_id FROM $function('$model', " . $long->($most) . ')'), 'model', "as much as fits without a branch: $function()");
	is(said("SELECT branch_id FROM $function(" . $long->($most - length "&branch_id=$branch") . ')'), 'branch', '... and with the branch of the server');
	is(said("SELECT $function(" . $long->($most + 1 - length "&branch_id=$branch") . ')'),
		'54000 The path and the query of its URL would have 7701 bytes, and may have 7700.', '... but not a byte more');
}
ok(settled(), 'what fits is sent');

# Frozen at the request

forget();
$node->append_conf('postgresql.conf', "omni_refresh.enabled = off\n");
$node->reload;
my $on = 'SET omni_refresh.enabled = on;';
is(said("$on SELECT model_id, branch_id FROM omni_refresh_on_commit(); SELECT model_id, policy FROM omni_refresh_cache_on_commit()"),
	'model|branch model|nightly', 'what is queued');
options("SET model '$other', SET branch '$twig', SET cache_policy 'hourly'");
$node->append_conf('postgresql.conf', "omni_refresh.enabled = on\n");
$node->reload;
ok(settled(), '... is sent');
is(join(', ', sort split /, /, asked()), 'model branch, model nightly', '... as it was requested, whatever the options are now');

$omni->reset;
$omni->fault('answer', status => 403, body => '{}', times => 2, path => 'refresh|reset');
like(said('SELECT omni_refresh()'), qr/^42501/, 'a call that is refused');
like(said('SELECT omni_refresh_cache()'), qr/^42501/, 'another');
options("DROP model, DROP branch, DROP cache_policy");
is(said(q{SELECT concat_ws(' ', again.model_id, again.branch_id, again.policy) FROM omni_refresh_job AS job, omni_refresh_retry(job.id) AS again
	WHERE job.status = 'failed' ORDER BY job.id}), 'other twig other hourly', '... is repeated as it was, though the server has no options any more');
ok(settled(), '... and sent');
options("ADD model '$model'");

# Own changes must be committed first; others' count when they are, also within a transaction.

like(said("BEGIN; ALTER SERVER omni OPTIONS (SET model '$other'); SELECT omni_refresh()"), qr/^55000 /, 'what this transaction has changed must be committed first');
forget();
my $session = OmniLife::session($node, 'postgres');
my $first = ($session->query('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT id FROM omni_refresh_on_commit()'))[0];
is(($session->query('SELECT id FROM omni_refresh_on_commit()'))[0], $first, 'once a transaction');
is(($session->query("SELECT id FROM omni_refresh_on_commit('$model')"))[0], $first, '... also with the model as an argument');
isnt(($session->query("SELECT id FROM omni_refresh_on_commit('$other')"))[0], $first, '... but not another one');
options("SET model '$other'");
is(named(($session->query('SELECT model_id FROM omni_refresh_on_commit()'))[0]), 'other', '... which is taken once the option names it');
is(($session->query('SELECT count(*) FROM omni_refresh_job'))[0], 2, '... and adds no row');
options("SET model '$model', ADD branch '$branch'");
is(named(($session->query('SELECT model_id, branch_id FROM omni_refresh_on_commit()'))[0]), 'model|branch', 'a branch');
is(($session->query('SELECT count(*) FROM omni_refresh_job'))[0], 3, '... is something else');
$session->query('COMMIT');
$session->quit;
ok(settled(), 'they are sent');
is(join(', ', sort split /, /, asked()), 'model, model branch, other', '... each once');
options('DROP branch');

# Where nothing is sent

forget();
is(said('SET omni_refresh.enabled = off; SELECT status, model_id FROM omni_refresh(); SELECT status, model_id FROM omni_refresh_on_commit()'),
	'canceled|model canceled|model 00000', 'a request that is switched off has the model');
like(said("SET omni_refresh.enabled = off; SET omni_refresh.server = nowhere; SELECT status, model_id, policy FROM $_"), qr/^canceled\|\| 00000/,
	"... or none without the server: $_") for 'omni_refresh()', 'omni_refresh_on_commit()', 'omni_refresh_cache()', 'omni_refresh_cache_on_commit()';
like(said('SET omni_refresh.enabled = off; SET ROLE stranger; SELECT status, model_id FROM omni_refresh()'), qr/^canceled\| 00000/, '... nor for who may not use it');
like(said("SET omni_refresh.enabled = off; SELECT $_()"), qr/^22004 /, "... but what is missing is an error: $_()") for 'omni_refresh_cache', 'omni_refresh_cache_on_commit';
like(said('SELECT omni_refresh()', user => 'stranger'), qr/^42501( |$)/, 'who may not use the server gets no model');
like(said("SET omni_refresh.on_failure = warning; SET omni_refresh.server = nowhere; SELECT status, model_id, policy, id FROM $_"), qr/^failed\|\|\| 42704/,
	"a failure that is a warning: $_") for 'omni_refresh()', 'omni_refresh_on_commit()', 'omni_refresh_cache()', 'omni_refresh_cache_on_commit()';
is(asked(), '', 'nothing is sent');
is(sql('SELECT count(*) FROM omni_refresh_job'), 0, '... or written down');

# Several models: several servers, by role, database and transaction, with one key and one rate limit

$omni->set(key => 'shared');
OmniFault::server($node, $_->[0], url => $omni->http, key => 'shared', rate_limit => 3, model => $_->[1]) for [ 'sales', $model ], [ 'stock', $other ];
forget();
my $models = "SELECT (SELECT model_id FROM omni_refresh_on_commit()), current_setting('omni_refresh.server');";
is(said("BEGIN; SET LOCAL omni_refresh.server = sales; $models SET LOCAL omni_refresh.server = stock; $models $models COMMIT", user => 'loader'),
	'model|sales other|stock other|stock', 'a transaction asks for two models');
sql('ALTER ROLE loader SET omni_refresh.server = stock; ALTER DATABASE postgres SET omni_refresh.server = sales');
ok(settled(), 'both are sent');
is(join(', ', sort split /, /, asked()), 'model, other', '... each to its own');
is(sql(q{SELECT string_agg(server || ' ' || status, ', ' ORDER BY id) FROM omni_refresh_job}), 'sales accepted, stock accepted', '... by its own server');
is(said('SELECT model_id, server FROM omni_refresh()', user => 'loader'), 'other|stock', 'a role has its own model, and takes the last request of the minute');
my $use = "SET omni_refresh.call_timeout = '5 s';";
like(said("$use SELECT omni_refresh()"), qr/^53000 .*not sent/, 'the other server, which the database names, has none left: they share the limit of their key');
options('SET rate_limit \'4\'', 'sales');
is(said("$use SELECT model_id, server FROM omni_refresh()"), 'model|sales', '... against which each holds its own');
like(said("$use SELECT omni_refresh()", user => 'loader'), qr/^53000 /, '... and the first has none left, either');
sql('ALTER ROLE loader RESET ALL; ALTER DATABASE postgres RESET ALL');

# What has evaded the validator is as if it were not there.

sql('ALTER FOREIGN DATA WRAPPER omni_refresh NO VALIDATOR');
options("SET model 'none', ADD branch 'none', ADD cache_policy '" . 'x' x 1000 . q{'});
like(said('SELECT omni_refresh()'), qr/^22004 .*"model"/, 'an option that is no uuid is no model');
like(said("SELECT omni_refresh_cache('$model')"), qr/^22004 .*"cache_policy"/, 'a policy that is too long is none');
options("SET model '$model'");
$omni->set(key => $omni->key);
takes('omni_refresh', '', 'model');
sql('ALTER FOREIGN DATA WRAPPER omni_refresh VALIDATOR omni_refresh_validator');

done_testing();
