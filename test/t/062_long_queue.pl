# A long queue of one user's holds up nobody else: neither while it is merged, nor while it is sent, nor
# as long as it must wait. OMNI_QUEUE_ROWS=1000000 makes it longer.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

my $rows = $ENV{OMNI_QUEUE_ROWS} // 200000;
my $half = $rows / 2;
my $calls = 20;
my $omni = OmniAPI->start;
my $other = OmniAPI->start;
my $node = OmniFault::node('long', conf => "omni_refresh.min_interval = 0\n");

END { my $rc = $?; $_->stop for grep { $_ } $omni, $other; $? = $rc; }

# Alice's server does not answer, so that her queue stays long; bob's does.
OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0, timeout => '1 h');
OmniFault::server($node, 'other', url => $other->http, key => $other->key, rate_limit => 0);
$omni->fault('hang', times => -1);
sql(q{CREATE ROLE alice LOGIN; CREATE ROLE bob LOGIN});

sub sql
{
	return $node->safe_psql('postgres', @_);
}

# Bob makes so many calls, one after the other, each with a request for the queue before it if that is
# wanted. None takes long. Returns what each has taken, in ms.
sub calls
{
	my ($name, $queued, $number) = @_;
	my $queue = $queued ? 'SELECT status FROM omni_refresh_on_commit(gen_random_uuid());' : '';
	my $bob = OmniFault::call($node, 'SET omni_refresh.server = other;' . join('', ("$queue
		SELECT clock_timestamp() AS began \\gset
		SELECT status FROM omni_refresh('" . $other->model . "');
		SELECT 'took ' || extract(epoch FROM clock_timestamp() - :'began') * 1000;\n") x ($number // $calls)), user => 'bob');
	my @took = sort { $a <=> $b } $bob->{out} =~ /^took (\S+)$/mg;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is(scalar(() = $bob->{out} =~ /^accepted$/mg), $number // $calls, "$name: calls of another user") or diag($bob->{err});
	cmp_ok($took[-1] // 0, '<', 1000, '... of which none takes a second');
	note(sprintf '%s: median %.1f ms, longest %.1f ms', $name, $took[@took / 2] // 0, $took[-1] // 0);
	return @took;
}

calls('no queue');
calls('no queue', 1);

my $seconds = OmniLife::timed(sub {
		sql("INSERT INTO omni_refresh_job (status, model_id, kind, hard, schemas, server, origin, requested_by, requested_by_oid,
				requested_at, run_at, database)
			SELECT 'pending', CASE WHEN n % 2 = 0 THEN '" . $omni->model . "' ELSE gen_random_uuid() END, 'schema', false,
				CASE WHEN n % 4 = 0 THEN '{a}'::text[] ELSE '{b,c}' END, 'omni', 'on_commit', 'alice', 'alice'::regrole,
				now(), now(), (SELECT oid FROM pg_database WHERE datname = current_database())
			FROM generate_series(1, $rows) AS n");
	});
note("$rows jobs queued in $seconds s");

# Others go on while it is merged ...

sql('SELECT omni_refresh_wake()');
my $merged = 0;
my $rounds = 0;
my $began = time;
while ($merged < $half - 1 && time - $began < 120)
{
	calls(++$rounds == 1 ? 'a long queue begins' : 'while it is merged', 0, $rounds == 1 ? $calls : 5);
	$merged = sql(q{SELECT count(*) FROM omni_refresh_job WHERE status = 'merged' AND requested_by = 'alice'});
}
note('merged in ' . (time - $began) . ' s');
is($merged, $half - 1, 'what is alike is merged in the end');

# ... and while the rest waits, though what comes in has the worker look at it again and again.

is(scalar($omni->wait_for_requests(1)) > 0, 1, 'what is left is sent');
calls('what is left waits');
calls('what is left waits, and more comes', 1);
my $carrier = sql(q{SELECT DISTINCT merged_into FROM omni_refresh_job WHERE status = 'merged' AND requested_by = 'alice'});
is(sql("SELECT schemas FROM omni_refresh_job WHERE id = $carrier"), '{a,b,c}', 'the first one asks for what all have asked for');
is(sql(q{SELECT count(*) FROM omni_refresh_job WHERE status IN ('pending', 'sending') AND requested_by = 'alice'}),
	$half + 1, '... and nothing else is merged, or lost');
OmniLife::until_true('... and what another user has queued meanwhile is done', sub {
		sql(q{SELECT count(*) FROM omni_refresh_job WHERE status IN ('pending', 'sending') AND requested_by = 'bob'}) == 0 });
is(sql(q{SELECT max(sent_at - requested_at) < '5 s' FROM omni_refresh_job WHERE requested_by = 'bob' AND origin = 'on_commit'}), 't',
	'... without a long wait');

# The worker can still be ended, and the next one finds its way.

$omni->reset;
$omni->fault('hang', times => -1);
$seconds = OmniLife::timed(sub {
		sql(q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'}) });
cmp_ok($seconds, '<', 5, 'the worker ends when it is told to');
calls('the next worker begins');

$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/terminating (?:background worker|autovacuum)/);
done_testing();
