# Rows that the owner of the table has written by hand, and a setting in an odd spelling.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
my $node = OmniFault::node('odd_rows', conf => "omni_refresh.min_interval = 0\n");
my $model = $omni->model;
my $row = q{model_id, kind, hard, server, origin, requested_by, requested_by_oid, requested_at, run_at, database};
my $values = qq{'$model', 'schema', false, 'omni', 'on_commit', current_user, current_user::regrole, now(), now(),
	(SELECT oid FROM pg_database WHERE datname = current_database())};

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
$node->safe_psql('postgres', 'CREATE ROLE bob LOGIN');

sub status
{
	return $node->safe_psql('postgres', "SELECT status FROM omni_refresh_job WHERE id = $_[0]");
}

# Lists that hold a NULL are in nobody else's way.

$node->safe_psql('postgres', "INSERT INTO omni_refresh_job (status, schemas, $row) SELECT 'pending', '{NULL}', $values FROM generate_series(1, 2)");
my $id = OmniFault::call($node, "SELECT id FROM omni_refresh_on_commit('$model');", user => 'bob')->{out};
OmniLife::until_true('two jobs with a NULL in a list: those of others are sent', sub { status($id) eq 'accepted' }, 15);
$node->safe_psql('postgres', 'DELETE FROM omni_refresh_job');

# A job that is carried out by itself

$id = $node->safe_psql('postgres', "INSERT INTO omni_refresh_job (status, $row) SELECT 'merged', $values RETURNING id");
$node->safe_psql('postgres', "UPDATE omni_refresh_job SET merged_into = id WHERE id = $id");
my $call = OmniFault::call($node, "SET statement_timeout = '5s'; SELECT status FROM omni_refresh_wait($id);");
is($call->{out}, 'merged', 'a job that is merged into itself is not waited for for ever') or diag($call->{err});

# CHECK constraints that somebody has added hold for what the extension writes, beside its own.

$node->safe_psql('postgres', q{ALTER TABLE omni_refresh_job ADD CONSTRAINT odd CHECK (origin <> 'on_commit') NOT VALID});
is(OmniFault::call($node, "SELECT id FROM omni_refresh_on_commit('$model');")->{sqlstate}, '23514', 'a CHECK constraint of somebody holds');
$node->safe_psql('postgres', 'ALTER TABLE omni_refresh_job DROP CONSTRAINT odd');
is(OmniFault::call($node, "SELECT status FROM omni_refresh_on_commit('$model');")->{out}, 'pending', '... until it is dropped');

# The case of a setting's name does not matter in the file either.

$node->append_conf('postgresql.conf', "Omni_Refresh.ENABLED = off\n");
$node->safe_psql('postgres', q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
$node->reload;
$node->poll_query_until('postgres', q{SELECT setting = 'off' FROM pg_file_settings WHERE name = 'Omni_Refresh.ENABLED'}) or die;
$id = $node->safe_psql('postgres', qq{LOAD 'omni_refresh'; SET omni_refresh.enabled = on; SELECT id FROM omni_refresh_on_commit('$model')});
OmniFault::call($node, "SET omni_refresh.enabled = on; SELECT omni_refresh('$model');") for 1 .. 3;	# the worker has looked by then
is(status($id), 'pending', 'a name in capitals holds the queue, too');

done_testing();
