# The worker comes and goes under its callers: none is lost, none waits in vain, and if it cannot
# come they learn why, without a storm of attempts.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
my $node = OmniFault::node('start', conf => "log_min_messages = debug1\nmax_connections = 80\n");
my $refresh = q{SELECT status FROM omni_refresh('} . $omni->model . q{')};
my $worker_is = q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'};

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);

# A worker that leaves as soon as it has nothing to do. Who wrote which job, in order:

$node->safe_psql('postgres', q{
	ALTER SYSTEM SET omni_refresh.idle_timeout = 0;
	SELECT pg_reload_conf();
	CREATE TABLE turn (n bigint GENERATED ALWAYS AS IDENTITY, worker text);
	CREATE FUNCTION note_turn() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		INSERT INTO public.turn (worker)
		SELECT concat_ws(' ', pid, backend_start) FROM pg_stat_get_activity(pg_backend_pid());
		RETURN NULL;
	END$$;
	CREATE TRIGGER note_turn AFTER INSERT ON omni_refresh_job
		FOR EACH ROW EXECUTE FUNCTION note_turn()});

for my $case ([ 1, 1 ], [ 3, 1 ], [ 50, 2, '-C' ], [ 50, 2 ])
{
	my ($clients, $seconds, @options) = @$case;
	my $name = join ' ', $clients, @options;

	$omni->reset;
	$omni->set(record => 0);
	$node->safe_psql('postgres', 'TRUNCATE omni_refresh_job, omni_refresh_event, turn');
	my $forks = OmniLife::forks($node);
	my $bench = OmniLife::bench($node, 'postgres', "$refresh;", @options, '-c', $clients, '-j', 2,
		'-T', $seconds, '-L', 4000);
	is(OmniLife::benched($bench), 0, "clients against a worker that does not linger: $name")
		or diag($bench->{err});
	my ($calls) = $bench->{out} =~ /actually processed: (\d+)/;
	my ($late) = $bench->{out} =~ /latency limit: (\d+)/;
	my ($failed) = $bench->{out} =~ /failed transactions: (\d+)/;
	cmp_ok($calls, '>=', $clients, '... each gets through');
	is($late, 0, '... none waits long');
	is($failed // 0, 0, '... none fails');
	is($node->safe_psql('postgres', q{
			SELECT string_agg(concat_ws(' ', status, attempts, n), ', ')
			FROM (SELECT status, attempts, count(*) AS n FROM omni_refresh_job GROUP BY 1, 2) AS s}),
		"accepted 1 $calls", '... each has its job, which was sent once');
	is($omni->stats->{requests}, $calls, '... and so it was');
	my ($workers, $changes) = split /\|/, $node->safe_psql('postgres', q{
		SELECT count(DISTINCT worker), count(*) FILTER (WHERE worker IS DISTINCT FROM before)
		FROM (SELECT worker, lag(worker) OVER (ORDER BY n) AS before FROM turn) AS t});
	is($changes, $workers, '... and no two workers are at work at a time');
	cmp_ok($workers, '>', 2, '... though workers come and go') if $clients <= 3;
	cmp_ok(OmniLife::forks($node) - $forks, '<=', $workers + $clients, '... and few come for nothing');
	note("$name: $calls calls, $workers workers, ", OmniLife::forks($node) - $forks, ' forks');
}
ok($node->poll_query_until('postgres', "SELECT ($worker_is) = 0"), 'the last one leaves, too');
$node->safe_psql('postgres', q{
	DROP TRIGGER note_turn ON omni_refresh_job;
	ALTER SYSTEM RESET omni_refresh.idle_timeout;
	SELECT pg_reload_conf()});

# A database that lets nobody in

$node->safe_psql('postgres', 'CREATE DATABASE closed');
$node->safe_psql('closed', 'CREATE EXTENSION omni_refresh');
OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0, db => 'closed');
my @sessions = map { OmniLife::session($node, 'closed') } 1 .. 6;
$node->safe_psql('postgres', 'ALTER DATABASE closed ALLOW_CONNECTIONS false');
my $closed = qr/^ERROR:  53400: could not start the background worker of omni_refresh\nDETAIL:  The worker reported: database "closed" is not currently accepting connections\.\nHINT:  \S/m;
my $forks = OmniLife::forks($node);
$omni->reset;
for (1 .. 5)
{
	my $err;
	my $seconds = OmniLife::timed(sub { (undef, $err) = $sessions[0]->query($refresh) });
	like($err, $closed, 'the worker is not let in, and its caller learns why');
	cmp_ok($seconds, '<', 2, '... at once');
}
is(OmniLife::forks($node), $forks + 5, '... and it was tried once for each');
like(($sessions[0]->query("SET omni_refresh.on_failure = warning; $refresh"))[1], qr/^WARNING:  53400: could not start/,
	'... or warned, if that is what was asked for');
$_->send($refresh) for @sessions;
like(($_->answer)[1], qr/: 53400: could not start|  53400: could not start/, '... several at once, too') for @sessions;
cmp_ok(OmniLife::forks($node), '<=', $forks + 6 + @sessions, '... not more often than there are callers');
$forks = OmniLife::forks($node);
$node->safe_psql('postgres', 'ALTER DATABASE closed ALLOW_CONNECTIONS true');
is(($sessions[1]->query($refresh))[0], 'accepted', '... and as soon as it is let in, it works');
is(OmniLife::forks($node), $forks + 1, '... and nobody tried meanwhile');
is(scalar(() = $omni->requests), 1, '... and what failed is not sent later');
$_->quit for @sessions;

# No background worker to be had

$node->append_conf('postgresql.conf', "max_worker_processes = 2\n");	# one is PostgreSQL's own
$node->restart;
$omni->reset;
$omni->fault('hang');
my $held = OmniFault::begin($node, "$refresh;", db => 'closed');
$omni->wait_for_requests(1);	# a worker has taken the last place of the server, and is busy
my $holder = OmniFault::worker($node, 'closed');
$forks = OmniLife::forks($node);
my $call = OmniFault::call($node, "$refresh;");
is($call->{sqlstate}, '53400', 'the call of another database fails');
like($call->{message}, qr/^no background worker is available$/, '... says so');
like($call->{detail}, qr/max_worker_processes \(2\)/, '... names the limit');
like($call->{hint}, qr/"max_worker_processes"/, '... and what to do');
cmp_ok($call->{seconds}, '>=', 4.9, '... not before it has tried for a while');
cmp_ok($call->{seconds}, '<', 7, '... but then');
is(OmniLife::forks($node), $forks, '... without a fork');
is(OmniFault::worker($node, 'closed'), $holder, '... or harm to the other one');
my $waiting = OmniFault::begin($node, "$refresh;", app => 'waiting');
OmniFault::wait_until_waiting($node, 'waiting');
$omni->fault('none');
OmniFault::finish($waiting);
is($waiting->{out}, 'accepted', 'a call that waits for a place gets it once the other worker has nothing to do') or diag($waiting->{err});
is(OmniFault::finish($held)->{out}, 'accepted', '... which it has done');
cmp_ok($node->safe_psql('postgres', $worker_is), '<=', 1, '... and there is no more than one worker');

$node->stop('fast');
OmniLife::clean($node, 'nothing else went wrong', qr/is not currently accepting connections$/,
	qr/could not start the background worker/);
done_testing();
