# The worker does not grow, however many calls it makes and however they end, nor much when models
# are many; nor does the session.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

plan skip_all => 'needs /proc/PID/status'
	if !-r "/proc/$$/status" || slurp_file("/proc/$$/status") !~ /^RssAnon:/m;

my $omni = OmniAPI->start;
my $node = OmniFault::node('memory', conf => "log_min_messages = error\n");
my $model = $omni->model;
my $other = '00000000-0000-0000-0000-000000000000';

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
$omni->set(record => 0);

# 10,000 models

# The most that a process has had of memory, in kB
sub peak
{
	my ($pid) = @_;

	return (slurp_file("/proc/$pid/status") =~ /^VmHWM:\s+(\d+) kB/m)[0];
}

my $count = 'SELECT count(*) FROM omni_refresh_models()';
my $session = OmniLife::session($node, 'postgres');
$omni->set(models => 100);
is(($session->query($count))[0], '100', 'a session warms up');
my @pids = ($session->{pid}, OmniFault::worker($node));
my @before = map { peak($_) } @pids;
$omni->set(models => 10000);
is(($session->query($count))[0], '10000', '10,000 models');
my @after = map { peak($_) } @pids;
note("... the session's memory grew by @{[$after[0] - $before[0]]} kB, the worker's by @{[$after[1] - $before[1]]} kB");
cmp_ok($after[0] - $before[0], '<', 12000, '... without much memory in the session');
cmp_ok($after[1] - $before[1], '<', 4000, '... or in the worker');
$session->quit;

# Many calls: of ten, three are refused, one has no server, and one has long lists.
my $calls = <<END;
SET omni_refresh.on_failure = warning;
SET client_min_messages = error;
SELECT omni_refresh('$other');
SELECT omni_refresh('$other', schemas => '{a,b}');
SELECT omni_refresh('$other', tables => '{a.b}');
SELECT omni_refresh('$model', schemas => (SELECT array_agg('schema_' || i) FROM generate_series(1, 300) AS i));
SET omni_refresh.server = nobody;
SELECT omni_refresh('$model');
RESET omni_refresh.server;
SELECT omni_refresh('$model');
SELECT omni_refresh('$model', hard => true);
SELECT omni_refresh('$model', schemas => '{a}');
SELECT omni_refresh('$model');
SELECT omni_refresh('$model');
END

# Makes ten times as many calls; returns what the worker has of its own, in kB.
sub call
{
	my ($times) = @_;
	my $bench = OmniLife::bench($node, 'postgres', $calls, '-c', 4, '-t', $times / 4);

	is(OmniLife::benched($bench), 0, 'calls succeed and fail') or diag($bench->{err});
	my ($size) = slurp_file('/proc/' . OmniFault::worker($node) . '/status') =~ /^RssAnon:\s+(\d+) kB/m;
	return $size;
}

$omni->fault($_, times => 10) for qw(nested huge not_utf8 empty);
my $first = call(48);
my $worker = OmniFault::worker($node);
$omni->fault($_, times => 40) for qw(nested not_utf8 empty wrong_shape);
my $last = call(252);
cmp_ok($last - $first, '<', 4096,	# of which malloc keeps 1 or 2 MB after long answers
	"2500 calls later, the worker has grown by less than 4 MB: $first kB, $last kB");
is(OmniFault::worker($node), $worker, '... and is the same');
is($node->safe_psql('postgres', q{SELECT count(*) > 2000, count(*) FILTER (WHERE status = 'failed') > 600,
		count(*) FILTER (WHERE status = 'accepted') > 1000, count(*) FILTER (WHERE finished_at IS NULL)
		FROM omni_refresh_job}), 't|t|t|0', '... and has done all that');

$node->stop('fast');
OmniLife::clean($node, 'the log is clean');
done_testing();
