# The rate limiter: a hundred keys at once, and calls beside a long queue.

use strict;
use warnings FATAL => 'all';

use List::Util qw(max);
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
my $node = OmniFault::node('rates', conf => "omni_refresh.min_interval = 0\n");
my $model = $omni->model;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

# A hundred roles with a key each, all within the same minute; Omni refuses them, which counts as well.

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 5);
my @roles = map { "role$_" } 1 .. 100;
$node->safe_psql('postgres', join '', map { "CREATE ROLE $_; CREATE USER MAPPING FOR $_ SERVER omni OPTIONS (api_key 'key_of_$_');" } @roles);
my $began = time;
OmniFault::call($node, "SET client_min_messages = error; SET omni_refresh.on_failure = warning; SET omni_refresh.call_timeout = '1 s';"
	. join('', map { "SET ROLE $_; SELECT 1 FROM omni_refresh('$model');" x 4 } (@roles) x 3));
my %sent;
$sent{$_->{headers}{authorization}}++ for $omni->requests;
SKIP:
{
	skip 'this took more than a minute', 1 if time - $began >= 60;
	is(max(values %sent), 5, 'no key of a hundred is used more often than its limit');
}
is(scalar(keys %sent), 100, '... and each is used');

# Calls beside a burst of the queue, whose jobs are polled

$omni->reset;
$omni->set(key => 'burst', rate_limit => 60, job_seconds => 1000);
$node->append_conf('postgresql.conf', "omni_refresh.track = on\n");
$node->reload;
OmniFault::server($node, 'burst', url => $omni->http, key => 'burst');
$node->safe_psql('postgres', q{SET omni_refresh.server = burst;
	SELECT count(omni_refresh_on_commit(gen_random_uuid())) FROM generate_series(1, 2000)});
ok($node->poll_query_until('postgres', q{SELECT count(*) > 0 FROM omni_refresh_event WHERE event = 'rate_limited'}),
	'a long queue uses the rate limit up');
$omni->wait_for_requests(50);
my @calls = map { OmniFault::call($node, "SET omni_refresh.server = burst; SET omni_refresh.call_timeout = '20 s';
	SELECT status FROM omni_refresh('$model');") } 1 .. 8;
is(join(' ', map { $_->{out} || $_->{sqlstate} } @calls), join(' ', ('running') x 8), '... but for a share that calls have');
is($node->safe_psql('postgres', q{SELECT count(*) FROM omni_refresh_job
		WHERE server = 'burst' AND origin = 'call' AND sent_at < requested_at + interval '10 s'}), 8, '... which begin at once');
is($node->safe_psql('postgres', q{SELECT count(*) FROM omni_refresh_event WHERE http_status = 429}), 0, '... and Omni refuses none');

$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/job \d+ ended/, qr/WARNING/);
done_testing();
