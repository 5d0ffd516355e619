# The recipes of the README do what it says, word for word but for the model's uuid.

use strict;
use warnings FATAL => 'all';

use File::Basename qw(dirname);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
my $node = OmniFault::node('recipes', conf => "omni_refresh.track = on\nomni_refresh.min_interval = 0\n");
my $model = $omni->model;
my $hook_model = q{{{ var("omni_model") }}};

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
$omni->set(job_seconds => 0);

my ($section) = slurp_file(dirname(__FILE__) . '/../../README.md') =~ /^## Recipes\n(.*?)^## /ms;
my ($wait, $procedure, $hook, $only_first, $cron) = $section =~ /^```(?:sql|yaml)\n(.*?)^```/msg;
my $count = () = $section =~ /^```(?:sql|yaml)$/mg;
is($count, 5, 'there are five recipes');
s/98c7ad96-5c04-4fb7-b33a-1389a65d16ed/$model/ for $wait, $cron;

# The requests so far, as "refresh" or "reset", hard unless told otherwise
sub asked
{
	my @asked = map { $_->{path} =~ /cache_reset/ ? 'reset' : $_->{query} =~ /hard_refresh=false/ ? 'soft refresh' : 'refresh' }
		$omni->requests(qr/refresh|cache_reset/);

	$omni->reset;
	$omni->set(job_seconds => 0);
	return join ', ', @asked;
}

sub all_done
{
	return $node->poll_query_until('postgres', q{SELECT count(*) = 0 FROM omni_refresh_job WHERE status IN ('pending', 'sending', 'running')});
}

# Refresh, wait, and tell those who listen

like($node->safe_psql('postgres', $wait), qr/^\(1,completed,/, 'to refresh and wait');
is(asked(), 'refresh', '... is one request');
like($node->safe_psql('postgres', "LISTEN omni_refresh;\n$wait"), qr/"omni_refresh" with payload "\{"id": 2, "status": "completed"\}"/,
	'... and listeners are told');
asked();
$node->safe_psql('postgres', $procedure);
is($node->psql('postgres', "CALL refresh_and_wait('$model')"), 0, 'the same in one statement');
is(asked(), 'refresh', '... is one request');
$omni->fault('answer', status => 404);
my $err;
$node->psql('postgres', "CALL refresh_and_wait('$model')", stderr => \$err);
like($err, qr/ERROR:  refresh 4 is failed: 42704: /, '... which fails if that fails');
asked();

# dbt's hook, as dbt renders it

my ($statement) = $hook =~ /^  - "(.*)"$/m;
$statement =~ s/\\"/"/g;
$statement =~ s/\Q$hook_model\E/$model/ or die "the hook names no model: $statement";
like($node->safe_psql('postgres', "BEGIN; $statement; COMMIT"), qr/^\d+$/, q{dbt's hook});
all_done();
is(asked(), 'soft refresh', '... is a soft refresh');

# Only the first load refreshes

$node->safe_psql('postgres', 'TRUNCATE omni_refresh_job, omni_refresh_event');
$node->safe_psql('postgres', $only_first);
for my $load (1 .. 3)
{
	$node->safe_psql('postgres', "CALL after_load('$model', 'Daily cache')");
	all_done();
}
is(asked(), 'refresh, reset, reset', 'only the first load refreshes');
$omni->fault('answer', status => 404);
$node->safe_psql('postgres', 'TRUNCATE omni_refresh_job, omni_refresh_event');
for my $load (1 .. 2)
{
	$node->safe_psql('postgres', "CALL after_load('$model', 'Daily cache')");
	all_done();
}
is(asked(), 'refresh, refresh', '... or the next one, if that fails');

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
	$node->safe_psql('postgres', $cron =~ s/'15 5 \* \* \*'/'\@reboot'/r);
	$node->restart;
	ok($node->poll_query_until('postgres', q{SELECT status = 'succeeded' FROM cron.job_run_details}), q{pg_cron's job});
	all_done();
	is(asked(), 'refresh', '... is a hard refresh');
}

$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/ERROR:  refresh 4 is failed/);
done_testing();
