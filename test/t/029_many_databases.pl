# More databases with something to do than slots in shared memory, and far more than worker processes: each
# gets its turn.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
my $node = OmniFault::node('many', settings => "max_worker_processes = 8\nfsync = off\n", conf => "autovacuum = off\n");
my @databases = map { "many$_" } 1 .. 110;
my $job = 'SELECT omni_refresh_on_commit(gen_random_uuid())';

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
$node->safe_psql('postgres', join ";\n", map { "CREATE DATABASE $_ TEMPLATE postgres" } @databases);

# Without the launcher, an idle worker leaves as soon as a call lacks one.

my @calls = map { OmniFault::begin($node, "SELECT status FROM omni_refresh('${\ $omni->model}');", db => $_) } @databases[0 .. 11];
OmniFault::finish($_) for @calls;
is(join(' ', map { $_->{out} || $_->{message} } @calls), join(' ', ('accepted') x 12),
	'calls of more databases than there are worker processes');

# One job each, when the server starts

sub queue_everywhere
{
	$node->safe_psql('postgres', join "\n", map { "\\connect $_\nSET client_min_messages = error;\n$job;" } @databases);
	return;
}

sub all_served
{
	my ($name) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return OmniLife::until_true($name, sub { my %models = map { $_->{path} => 1 } $omni->requests(qr/refresh$/); keys %models >= @databases }, 300);
}

$omni->fault('hang', times => -1);
queue_everywhere();
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'omni_refresh'\nomni_refresh.track = on\n");
$node->stop('immediate');
$omni->reset;
$node->start;
all_served('after a start each database is served');

# One job each, while the server runs: those whose worker could not start are remembered.

$omni->reset;
queue_everywhere();
all_served('jobs of more databases than slots are all sent');

$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/could not start a background worker for queued requests/,
	qr/the database system/);
done_testing();
