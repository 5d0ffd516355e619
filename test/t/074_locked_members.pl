# A transaction that stays open has canceled very many jobs that would be merged: the worker
# neither tries again without a pause, nor does the job that is to carry them out wait.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
my $node = OmniFault::node('locked_members', conf => "omni_refresh.min_interval = 0\nomni_refresh.enabled = off\n");
my $model = $omni->model;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
$node->safe_psql('postgres', "SET omni_refresh.enabled = on; " . OmniFault::equal_jobs("'$model', hard => false", 1500));

my $session = OmniLife::session($node, 'postgres');
$session->query('BEGIN; SELECT count(*) FILTER (WHERE omni_refresh_cancel(id)) FROM omni_refresh_job WHERE id > 1');


$node->append_conf('postgresql.conf', "omni_refresh.enabled = on\n");
$node->reload;
ok(OmniLife::until_true('the first job is sent', sub { $node->safe_psql('postgres',
	'SELECT status FROM omni_refresh_job WHERE id = 1') eq 'accepted' }, 15));
is($node->safe_psql('postgres', q{SELECT count(*) FROM omni_refresh_job WHERE status = 'pending'}), 1499, 'the locked ones stay');
$session->query('ROLLBACK');
ok(OmniLife::until_true('they go on after that', sub { $node->safe_psql('postgres',
	q{SELECT count(*) FROM omni_refresh_job WHERE status = 'pending'}) eq '0' }, 15));

$session->quit;
done_testing();
