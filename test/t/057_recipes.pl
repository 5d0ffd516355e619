# The recipes of the documentation do what it says; 093_documentation.pl shows that they run.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniDoc;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
my $node = OmniFault::node('recipes', conf => "omni_refresh.track = on\nomni_refresh.min_interval = 0\n");
my $unfinished = q{SELECT count(*) = 0 FROM omni_refresh_job WHERE status IN ('pending', 'sending', 'running')};

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0, model => $omni->model);
$node->safe_psql('postgres', q{
	CREATE SCHEMA sales CREATE TABLE orders (id int);
	CREATE PROCEDURE load_orders() LANGUAGE sql AS 'INSERT INTO sales.orders VALUES (1), (2), (3)'});
reset_omni();

# The stand-in answers that a refresh is completed at once, so that nothing has to be polled.
sub reset_omni
{
	$omni->reset;
	$omni->set(refresh_status => 'completed');
	return;
}

# The text of the only block that matches
sub recipe
{
	my ($regex) = @_;
	my @blocks = OmniDoc::find($regex);

	is(scalar @blocks, 1, "there is one recipe with $regex");
	return $blocks[0]{text};
}

# The requests since the last time, once all jobs have ended
sub asked
{
	$node->poll_query_until('postgres', $unfinished) or die;
	my @asked = map { $_->{path} =~ /cache_reset/ ? 'reset' : $_->{query} =~ /hard_refresh=false/ ? 'soft refresh' : 'refresh' }
		$omni->requests(qr/refresh|cache_reset/);

	reset_omni();
	return join ', ', @asked;
}

# A load with refresh and cache, of which only the load may fail

my $load = recipe(qr/^SET LOCAL omni_refresh\.on_failure = warning;\nSELECT id, status/m);
$node->safe_psql('postgres', $load);
is(asked(), 'soft refresh, reset', 'a load, a refresh and a reset');
$node->safe_psql('postgres', $load =~ s/COMMIT/ROLLBACK/r);
is(asked(), '', '... of which none is sent after a rollback');
$node->safe_psql('postgres', 'TRUNCATE sales.orders; ALTER SERVER omni RENAME TO other');
$node->safe_psql('postgres', $load);
is($node->safe_psql('postgres', 'SELECT count(*) FROM sales.orders'), '3', '... and only the load is done if there is no server');
isnt($node->psql('postgres', $load =~ s/^SET LOCAL.*\n//mr), 0, '... unless on_failure is left out');
$node->safe_psql('postgres', 'ALTER SERVER other RENAME TO omni');
is(asked(), '', '... and nothing is sent');

# Refresh, wait, and tell those who listen

my $wait = recipe(qr/\\gset/);
like($node->safe_psql('postgres', $wait), qr/^\(\d+,completed,/, 'to refresh and wait');
is(asked(), 'soft refresh', '... is one request');
like($node->safe_psql('postgres', "LISTEN omni_refresh;\n$wait"), qr/"omni_refresh" with payload "\{"id": \d+, "status": "completed"\}"/,
	'... and listeners are told');
is(asked(), 'soft refresh', '... by one request');
$node->safe_psql('postgres', recipe(qr/PROCEDURE refresh_and_wait\(/) =~ s/^SELECT cron.*\n//mr);
is($node->psql('postgres', 'CALL refresh_and_wait()'), 0, 'the same in one statement');
is(asked(), 'soft refresh', '... is one request');
$omni->fault('answer', status => 404);
$node->psql('postgres', 'CALL refresh_and_wait()', stderr => \my $err);
like($err, qr/ERROR:  refresh \d+ is failed: 42704: /, '... which fails if that fails');
asked();

# Only the first load refreshes

$node->safe_psql('postgres', 'TRUNCATE omni_refresh_job, omni_refresh_event');
$node->safe_psql('postgres', recipe(qr/PROCEDURE after_load\(/));
for my $load ('refresh, reset', 'reset', 'reset')
{
	$node->safe_psql('postgres', 'CALL after_load()');
	is(asked(), $load, "only the first load refreshes: $load");
}
$node->safe_psql('postgres', 'TRUNCATE omni_refresh_job, omni_refresh_event');
for my $load (1 .. 2)
{
	$omni->fault('answer', status => 404, path => '/refresh$') if $load == 1;
	$node->safe_psql('postgres', 'CALL after_load()');
	is(asked(), 'refresh, reset', '... or the next one, if that fails');
}

# A trigger FOR EACH ROW

$node->safe_psql('postgres', recipe(qr/CREATE TRIGGER refresh_orders/));
$node->safe_psql('postgres', 'INSERT INTO sales.orders SELECT generate_series(1, 1000)');
is(asked(), 'reset', 'a trigger asks once a transaction');
$node->safe_psql('postgres', 'DROP TRIGGER refresh_orders ON sales.orders');

# After an outage

my $retry = recipe(qr/omni_refresh_retry\(lost\.id\)/);
$node->safe_psql('postgres', 'TRUNCATE omni_refresh_job, omni_refresh_event');
for my $status (401, 404)
{
	$omni->fault('answer', status => $status);
	$node->psql('postgres', "SELECT omni_refresh(hard => $status = 401)");
}
asked();
like($node->safe_psql('postgres', $retry), qr/^\d+\|pending\|.*$/, 'what the key has failed is retried');
is(asked(), 'refresh', '... by one request');
$node->safe_psql('postgres', $retry);
is(asked(), '', '... once only');

# pg_cron, which may not be there

SKIP:
{
	skip 'pg_cron is not installed', 2
		if $node->safe_psql('postgres', q{SELECT count(*) FROM pg_available_extensions WHERE name = 'pg_cron'}) eq '0';
	$node->append_conf('postgresql.conf', <<END);
shared_preload_libraries = 'pg_cron'
cron.database_name = 'postgres'
cron.use_background_workers = on
END
	$node->restart;
	$node->safe_psql('postgres', 'CREATE EXTENSION pg_cron');
	# Its version 1.4 knows no seconds; each start of the server is one of these.
	$node->safe_psql('postgres', recipe(qr/cron\.schedule\('load orders'/) =~ s/'[0-9]+ [0-9*]+ \* \* \*'/'\@reboot'/gr);
	$node->restart;
	ok($node->poll_query_until('postgres', q{SELECT count(*) = 2 FROM cron.job_run_details WHERE status = 'succeeded'}), q{pg_cron's jobs});
	my %asked = map { $_ => 1 } split /, /, asked();
	is(join(', ', sort keys %asked), 'refresh, soft refresh', '... refresh');
}

$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/ERROR:  refresh \d+ is failed/,
	qr/server "omni" does not exist/, qr/HTTP status 40[14]/, qr/terminating background worker "pg_cron launcher"/);
done_testing();
