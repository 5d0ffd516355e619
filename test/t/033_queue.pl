# What is queued is sent in good order: not too often, not too much at once, tried again as long as
# that makes sense, and in nobody's way.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;
use OmniSQL qw(sql wait_for status story);

my $omni = OmniAPI->start;
my $other = OmniAPI->start;
my $node = OmniFault::node('queue');
my $model = $omni->model;
my $unfinished = q{SELECT count(*) FROM omni_refresh_job WHERE status IN ('pending', 'sending')};

END { my $rc = $?; $_->stop for grep { $_ } $omni, $other; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
OmniFault::server($node, 'other', url => $other->http, key => $other->key, rate_limit => 0);

# Changes settings in the configuration file. No worker is there that has not heard of it.
sub configure
{
	my (%settings) = @_;

	$node->append_conf('postgresql.conf', join '', map { "omni_refresh.$_ = $settings{$_}\n" } sort keys %settings);
	$node->reload;
	sql(q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
	return;
}

# Begins anew, with nothing in the tables.
sub clear
{
	my (%settings) = @_;

	$_->reset for $omni, $other;
	configure(%settings);
	sql('TRUNCATE omni_refresh_job, omni_refresh_event RESTART IDENTITY');
	return;
}

# Queues a request; returns the number of its job.
sub queue
{
	my ($arguments, $settings) = @_;

	return sql(($settings ? "SET $settings;" : '') . "SELECT id FROM omni_refresh_on_commit('$model'" . ($arguments ? ", $arguments)" : ')'));
}

# The same for the other instance, where nothing is in the way.
sub queue_elsewhere
{
	return sql("SET omni_refresh.server = other; SELECT id FROM omni_refresh_on_commit('" . $other->model . "')");
}

sub all_done
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return wait_for($name // '... and all is sent in the end', "($unfinished) = 0");
}

# min_interval: the first goes at once, what comes in between merges

clear(min_interval => "'1 h'");
queue();
all_done('the first request of its kind is sent at once');
queue() for 1 .. 3;
wait_for('... what comes soon after it waits', "bool_and(run_at - requested_at > '50 min')
	FROM omni_refresh_job WHERE status = 'pending'");
is($omni->stats->{requests}, 1, '... and is not sent');
queue("branch => '" . $omni->branch . "'");
queue('hard => false', 'omni_refresh.server = other');
$omni->wait_for_requests(2);
$other->wait_for_requests(1);
pass('... unlike what is of another kind');
sql(q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
queue();
wait_for('... the next worker knows, too', q{count(*) = 0 FROM omni_refresh_job WHERE status = 'pending' AND run_at <= now()});
is(scalar(() = $omni->requests(qr/refresh/)), 2, '... and waits');
configure(min_interval => "'1 ms'");
sql(q{UPDATE omni_refresh_job SET run_at = now() WHERE status = 'pending'});
queue();
all_done('... until its time has come');
is(sql(q{SELECT count(*) FROM omni_refresh_job WHERE status = 'merged'}), '4', '... all at once');

# Retries

for my $case ([ 'answer', { status => 503 } ], [ 'answer', { status => 500 } ], [ 'answer', { status => 429 } ], [ 'close' ], [ 'reset' ])
{
	my ($fault, $extras) = @$case;

	clear(min_interval => 0);
	$omni->fault($fault, %{ $extras // {} }, times => 2);
	my $id = queue();
	my $name = join ' ', $fault, %{ $extras // {} };
	for my $attempts (($extras->{status} // 0) == 500 ? (1, 2) : ())
	{
		# not after 10 s and a minute
		wait_for("a wait after attempt $attempts", "status = 'pending' AND attempts = $attempts AND run_at > now() FROM omni_refresh_job WHERE id = $id");
		sql("UPDATE omni_refresh_job SET run_at = now() WHERE id = $id; SELECT omni_refresh_wake()");
	}
	wait_for("what fails is tried again: $name", "status = 'accepted' AND attempts = 3 AND error IS NULL FROM omni_refresh_job WHERE id = $id");
	my $event = ($extras->{status} // 0) == 429 ? 'rate_limited' : 'attempt_failed';
	is(story($id), "sending $event sending $event sending accepted", '... as the events tell');
}
clear();
$omni->fault('answer', status => 503, headers => { 'Retry-After' => 3000 });
my $id = queue();
wait_for('Retry-After is heeded', "status = 'pending' AND attempts = 1 AND run_at - now() BETWEEN '2900 s' AND '3001 s' FROM omni_refresh_job WHERE id = $id");
is(queue('hard => false') . status($id), '2pending', '... and by others with this key');
wait_for('... who are told', "count(*) = 1 FROM omni_refresh_event WHERE job = 2 AND event = 'rate_limited'");
is($omni->stats->{requests}, 1, '... nothing is sent');
$node->restart;

for my $case ([ 404, 'No such model' ], [ 403, '' ], [ 401, '' ], [ 400, '' ], [ 418, '' ])
{
	my ($status) = @$case;

	clear();
	$omni->fault('answer', status => $status);
	my $id = queue();
	wait_for("a refusal is final: $status", "status = 'failed' AND attempts = 1 FROM omni_refresh_job WHERE id = $id");
	is(story($id), 'sending refused failed', '... as the events tell');
}

clear(retry_for => 0);
$omni->fault('answer', status => 503);
$id = queue();
wait_for('after retry_for there are no more attempts', "status = 'failed' AND attempts = 1 AND error ~ '^08006' FROM omni_refresh_job WHERE id = $id");
$omni->fault('close');
$id = queue();
wait_for('... and if there was no answer, nobody knows', "status = 'unknown' FROM omni_refresh_job WHERE id = $id");

# An attempt that may have arrived is not forgotten when a later one is refused.

for my $fault ('hang_middle', 'close', 'worker')
{
	clear(retry_for => "'1 h'");
	sql(q{ALTER SERVER omni OPTIONS (ADD timeout '300 ms')});
	$omni->fault($fault eq 'worker' ? 'hang' : $fault);
	$omni->fault('answer', status => 404);
	$id = queue();
	if ($fault eq 'worker')
	{
		$omni->wait_for_requests(1);
		sql(q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
		queue_elsewhere();
	}
	wait_for("a refusal after an attempt that may have arrived: $fault", "status = 'unknown' AND attempts = 2 AND error ~ '^42704' FROM omni_refresh_job WHERE id = $id");
	like(story($id), qr/^sending (recovered|attempt_failed) sending refused unknown$/, '... as the events tell');
	sql(q{ALTER SERVER omni OPTIONS (DROP timeout)});
}
clear();
$omni->fault('answer', status => 502);
$omni->fault('answer', status => 404);
$id = queue();
wait_for('... but Omni has said no twice here', "status = 'failed' AND attempts = 2 FROM omni_refresh_job WHERE id = $id");

# Those who may no longer

clear(retry_for => "'1 h'", enabled => 'off');
sql(q{CREATE ROLE leaving LOGIN; CREATE ROLE revoked LOGIN; CREATE ROLE unmapped LOGIN;
	CREATE SERVER short FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url 'http://127.0.0.1:1');
	GRANT USAGE ON FOREIGN SERVER short TO revoked, unmapped;
	CREATE USER MAPPING FOR PUBLIC SERVER short OPTIONS (api_key 'x');});
my %ids = map {
	my ($role, $server) = @$_;
	$role => sql("SET omni_refresh.enabled = on; SET omni_refresh.server = $server; SET ROLE $role; SELECT id FROM omni_refresh_on_commit('$model')");
} [ leaving => 'omni' ], [ revoked => 'short' ], [ unmapped => 'short' ];
sql(q{DROP ROLE leaving; CREATE ROLE leaving; REVOKE USAGE ON FOREIGN SERVER short FROM revoked;
	DROP USER MAPPING FOR PUBLIC SERVER short});
is($omni->stats->{requests}, 0, 'what is queued stays there while the configuration file says off');
is(sql($unfinished), '3', '... all of it');
$node->append_conf('postgresql.conf', "omni_refresh.enabled = on\n");
$node->reload;
all_done('... and goes on when it says on');
my %why = (leaving => '42704: role "leaving" was dropped$', revoked => '42501: ', unmapped => '28000: ');
for my $role (sort keys %why)
{
	like(sql("SELECT status || ' ' || error FROM omni_refresh_job WHERE id = $ids{$role}"), qr/^failed $why{$role}/, "... unless the requester may no longer: $role");
	is(story($ids{$role}), 'failed', '... as the events tell');
}
is($omni->stats->{requests}, 0, '... of which nothing is sent');

# A key that is missing for a while

my $key_file = $node->basedir . '/key';
append_to_file($key_file, $omni->key);
clear();
sql("CREATE SERVER filed FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url '" . $omni->http . "', rate_limit '0');
	CREATE USER MAPPING FOR CURRENT_USER SERVER filed OPTIONS (api_key_file '$key_file')");
rename $key_file, "$key_file.away";
$id = queue('', 'omni_refresh.server = filed');
wait_for('a key file that is not there is waited for', "status = 'pending' AND attempts = 0 AND run_at > now() + interval '4 min' AND error ~ '^28000' FROM omni_refresh_job WHERE id = $id");
rename "$key_file.away", $key_file;
sql("UPDATE omni_refresh_job SET run_at = now() WHERE id = $id");
queue_elsewhere();
wait_for('... and then it goes on', "status = 'accepted' AND error IS NULL FROM omni_refresh_job WHERE id = $id");

# Not too much at once, and nobody waits for another server or for the queue

clear(max_in_flight => 2);
$omni->set(models => 10);
$omni->fault('hang', times => -1);
my @models = map { $_->{id} } @{ JSON::PP::decode_json(HTTP::Tiny->new->get($omni->http . '/api/v1/models',
			{ headers => { Authorization => 'Bearer ' . $omni->key } })->{content})->{records} };
$omni->reset;
$omni->set(models => 10);
$omni->fault('hang', times => -1);
sql(join ';', map { "SELECT omni_refresh_on_commit(gen_random_uuid())" } 1 .. 6);
$omni->wait_for_requests(2, qr/refresh/);
$id = queue_elsewhere();
wait_for('a server that hangs does not keep another one', "status = 'accepted' FROM omni_refresh_job WHERE id = $id");
is($omni->stats->{in_flight}, 2, '... and has no more than max_in_flight');
my $call = OmniFault::begin($node, "SELECT status FROM omni_refresh('$model', hard => true);");
$omni->wait_for_requests(3, qr/refresh/);
pass('... which a call does not wait for');
$omni->fault('none');
OmniFault::finish($call);
all_done('... and the others follow');

# A rate limit, with a share for each

clear(max_in_flight => 10);
$node->restart;					# the limiter begins anew
$omni->set(rate_limit => 20);
sql(q{ALTER SERVER omni OPTIONS (SET rate_limit '20')});
sql('SELECT count(omni_refresh_on_commit(gen_random_uuid())) FROM generate_series(1, 50)');
wait_for('queued requests use a rate limit up', q{count(*) > 0 FROM omni_refresh_event WHERE event = 'rate_limited'});
is($omni->stats->{requests}, 17, '... but for a sixth, which calls may need');
is(sql(q{SELECT count(*) FROM omni_refresh_event WHERE http_status = 429}), '0', '... so that Omni need not say so');
is(sql(q{SELECT count(*) FROM omni_refresh_job WHERE status = 'pending'}), '33', '... the others wait');
is(sql(q{SELECT count(*) <= 2 FROM omni_refresh_event WHERE event = 'rate_limited'}), 't', '... without much ado');
is(sql(q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'}), '1', '... and so does the worker');
configure(idle_timeout => 0);
queue_elsewhere();
$other->wait_for_requests(1);
is(sql(q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'}), '1', '... which does not leave before they are sent');
sql(q{ALTER SERVER omni OPTIONS (SET rate_limit '0')});
$omni->set(rate_limit => 0);
$node->restart;
queue_elsewhere();
all_done('... as they are when they may');
wait_for('... and then it leaves', q{count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});

# The worker ends while a request is on its way

clear(idle_timeout => "'1 min'");
for my $times (1 .. 4)
{
	$omni->fault('hang');
	if ($times == 1) { $id = queue() } else { queue_elsewhere() }
	$omni->wait_for_requests($times, qr/refresh/);
	sql(q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
	is(status($id), 'sending', "a worker ends before the answer: $times");
}
queue_elsewhere();
all_done();
is(status($id), 'unknown', 'three times it is sent again, and then nobody knows');
is(story($id), 'sending recovered sending recovered sending recovered sending unknown', '... as the events tell');
is(sql("SELECT attempts FROM omni_refresh_job WHERE id = $id"), '4', '... and the attempts');
is($omni->stats->{requests}, 4, '... and Omni');

clear();
$omni->fault('hang');
$id = queue();
$omni->wait_for_requests(1);
$node->stop('immediate');
$node->start;
queue_elsewhere();
all_done('what was on its way when the server crashed');
is(status($id) . ' ' . story($id), 'accepted sending recovered sending accepted', '... is sent again');

# What is another database's

clear(enabled => 'off');
sql("SET omni_refresh.enabled = on; SELECT omni_refresh_on_commit('$model')");
sql('CREATE DATABASE copy TEMPLATE postgres');
$node->append_conf('postgresql.conf', "omni_refresh.enabled = on\n");
$node->reload;
$node->safe_psql('copy', "SET omni_refresh.server = other; SELECT omni_refresh_on_commit('" . $other->model . "')");
ok($node->poll_query_until('copy', q{SELECT string_agg(status, ' ' ORDER BY id) = 'canceled accepted' FROM omni_refresh_job}),
	'a copy of a database does not send what the other one has queued');
is($node->safe_psql('copy', q{SELECT string_agg(event, ' ' ORDER BY id) FROM omni_refresh_event WHERE job = 1}), 'canceled', '... which its events tell');
queue_elsewhere();
all_done('... but the other one does');
is($omni->stats->{requests}, 1, '... once, both together');

# A great many

clear();
sql(OmniFault::equal_jobs("'$model'", 100000));
my $seconds = OmniLife::timed(sub { all_done('100,000 jobs of one model') });
note("... are sent in $seconds s");
is($omni->stats->{requests}, 1, '... are one request');
is(sql(q{SELECT string_agg(status || n, ' ' ORDER BY status) FROM (SELECT status, count(*) AS n FROM omni_refresh_job GROUP BY 1) AS s}),
	'accepted1 merged99999', '... that carries out the others');
is(sql(q{SELECT string_agg(event || n, ' ' ORDER BY event) FROM (SELECT event, count(*) AS n FROM omni_refresh_event
		WHERE event <> 'merged' GROUP BY 1) AS s}), 'accepted1 sending1', '... as its events tell');
is(sql(q{SELECT sum(name[2]::int - name[1]::int + 1) FROM omni_refresh_event,
		regexp_match(detail, '^carries out jobs (\d+) (?:to|and) (\d+), too$') AS name WHERE event = 'merged'}),
	'99999', '... which name them all');

$node->stop('fast');
OmniLife::clean($node, 'the log is clean');
done_testing();
