# One user's share of the worker: however many servers he has that do not answer, and however many jobs that
# Omni works on, others go on.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;
use OmniNeighbour;

OmniNeighbour::start('share');
configure(track => 'on', max_in_flight => 4, idle_timeout => '10min');
OmniFault::server($node, 'other', url => $other->http, key => $other->key, rate_limit => 0);

sub as_bob
{
	my ($name) = @_;

	my $call = OmniFault::call($node, "SET omni_refresh.server = other; SELECT status FROM omni_refresh('${\ $other->model}');", user => 'bob');
	is($call->{out}, 'running', "$name: a call of bob's") or diag($call->{err});
	my $id = OmniFault::call($node, "SET omni_refresh.server = other; SELECT id FROM omni_refresh_on_commit('${\ $other->model}');", user => 'bob')->{out};
	ends($id, 'completed', '... and a job, to its end');
	return;
}

# Jobs in flight take file descriptors: a role may have a sixteenth of them, whatever its servers.

$node->append_conf('postgresql.conf', "max_files_per_process = 320\n");
$node->restart;
my @servers = map { "s$_" } 1 .. 60;
sql(join '', map { "CREATE SERVER $_ FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url '${\ $omni->http}', rate_limit '0', timeout '10 min');
	GRANT USAGE ON FOREIGN SERVER $_ TO alice; CREATE USER MAPPING FOR alice SERVER $_ OPTIONS (api_key '${\ $omni->key}');" } @servers);
$omni->fault('hang', times => -1);
OmniFault::call($node, join('', map { "SET omni_refresh.server = $_; SELECT omni_refresh_on_commit(gen_random_uuid());" } @servers), user => 'alice');
OmniLife::until_true('as many jobs of a role as may be are in flight', sub { $omni->stats->{in_flight} >= 15 });
as_bob('jobs that hang at sixty servers');
my $hanging = $omni->stats->{in_flight};
cmp_ok($hanging, '<=', 20, 'no more of them are sent meanwhile');
is(sql(q{SELECT count(*) FROM omni_refresh_job WHERE requested_by = 'alice' AND status = 'pending'}), 60 - $hanging, '... the others wait');
$omni->fault('none');
until_true('they are sent when those end', q{count(*) = 60 FROM omni_refresh_job WHERE requested_by = 'alice' AND status IN ('completed', 'failed', 'unknown')}, 60);

# Jobs that are polled: those of a server whose polls hang are not read again and again.

end_worker();
$omni->reset;
$omni->fault('hang', times => -1, path => '/status$');
sql(q{DELETE FROM omni_refresh_job});
sql(qq{INSERT INTO omni_refresh_job (status, job_id, model_id, kind, hard, server, origin, requested_by, requested_by_oid, requested_at,
		run_at, sent_at, attempts, database)
	SELECT 'running', gen_random_uuid(), gen_random_uuid(), 'schema', false, 's' || n % 2 + 1, 'on_commit', 'alice', $alice, now(),
		now(), now(), 1, (SELECT oid FROM pg_database WHERE datname = current_database())
	FROM generate_series(1, 100000) AS n});
sql('SELECT omni_refresh_wake()');
OmniLife::until_true('as many polls as may be are in flight', sub { $omni->stats->{in_flight} == 8 });

sub reads
{
	return sql(q{SELECT pg_stat_get_tuples_returned('omni_refresh_job_active_idx'::regclass)});
}
my $before = reads();
as_bob('a hundred thousand running jobs') for 1 .. 10;
sql('SELECT omni_refresh_wake()');
OmniLife::until_true('the worker tells what it has read', sub { reads() > $before }, 30);
cmp_ok(reads() - $before, '<', 400000, 'they are read when the worker starts, and not each time that it looks');
is($omni->stats->{in_flight}, 8, 'and no more are polled');

OmniNeighbour::finish();
