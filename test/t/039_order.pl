# The order of refreshes and resets of the cache: a queued reset is sent once the earlier refreshes of its
# model have ended, or the cache would fill again with what is stale.

use strict;
use warnings FATAL => 'all';

use HTTP::Tiny;
use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;
use OmniSQL qw(sql wait_for);

my $omni = OmniAPI->start;
my $node = OmniFault::node('order', conf => "omni_refresh.track = on\nomni_refresh.min_interval = 0\nomni_refresh.max_in_flight = 16\nclient_min_messages = error\n");
my $branch = $omni->branch;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, $_, url => $omni->http, key => $omni->key, rate_limit => 0) for 'omni', 'twin';
sql('CREATE ROLE other LOGIN');

sub models
{
	my $list = HTTP::Tiny->new(http_proxy => undef, proxy => undef)
		->get($omni->http . '/api/v1/models', { headers => { Authorization => 'Bearer ' . $omni->key } });

	return map { $_->{id} } @{ decode_json($list->{content})->{records} };
}

my ($model, $elsewhere) = models();

# Begins anew: refreshes run until end_refreshes().
sub begin
{
	my (%settings) = @_;

	sql('TRUNCATE omni_refresh_job, omni_refresh_event');
	$omni->reset;
	# the reset has made other models
	($model, $elsewhere) = models();
	$omni->set(job_seconds => 100_000, %settings);
	return;
}

sub end_refreshes
{
	my ($status) = @_;

	$omni->fault('answer', path => '/status$', status => 200, times => -1, body => '{"status": "' . ($status // 'COMPLETED') . '"}');
	return;
}

sub refresh { my ($arguments, $of) = @_; return "SELECT id FROM omni_refresh_on_commit('" . ($of // $model) . "'" . ($arguments ? ", $arguments" : '') . ')' }
sub reset_p { my ($policy, $of) = @_; return "SELECT id FROM omni_refresh_cache_on_commit('" . ($of // $model) . "', '" . ($policy // 'p') . "')" }

# Runs statements in one transaction; returns the numbers of their jobs.
sub transaction
{
	return split /\n/, sql(join(";\n", 'BEGIN', @_, 'COMMIT'));
}

sub until_status
{
	my ($id, $status, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return wait_for($name, "status = '$status' FROM omni_refresh_job WHERE id = $id");
}

# A later event of the worker's shows that it has looked at the queue: here a request of another role's.
sub look
{
	my $id = sql('SET ROLE other; ' . reset_p('look', $elsewhere));

	# it may be merged into one that a crash has made pending again
	$node->poll_query_until('postgres', "SELECT status IN ('completed', 'merged') FROM omni_refresh_job WHERE id = $id") or die;
	return;
}

# A reset is held, and it is told why.
sub held
{
	my ($id, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	wait_for("$name: the reset waits, and says so", "count(*) = 1 FROM omni_refresh_event WHERE job = $id AND event = 'waiting'");
	look();
	return is(sql("SELECT status, attempts FROM omni_refresh_job WHERE id = $id"), 'pending|0', '... it is not sent');
}

# What Omni was asked, in order, but for polls and looks.
sub asked
{
	return join ' ', map { $_->{path} =~ /refresh$/ ? 'refresh' : $_->{path} =~ m{cache_reset/(?!look)(.*)} ? $1 : () } $omni->requests;
}

# Whether a reset was sent after the end of some job.
sub follows
{
	my ($reset, $refresh, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return is(sql("SELECT min(e.occurred_at) >= max(f.finished_at) FROM omni_refresh_event e, omni_refresh_job f
		WHERE e.job = $reset AND e.event = 'sending' AND f.id = $refresh"), 't', $name);
}

# In one transaction

{
	begin();
	my ($refresh, $reset) = transaction(refresh(), reset_p());
	until_status($refresh, 'running', 'a refresh runs');
	held($reset, 'in the same transaction');
	is(sql("SELECT detail FROM omni_refresh_event WHERE job = $reset AND event = 'waiting'"),
		'for the refreshes of the model that were requested before', '... for the refresh');
	look();
	end_refreshes();
	until_status($reset, 'completed', 'the reset is sent in the end');
	follows($reset, $refresh, '... after the refresh');
	is(asked(), 'refresh p', '... and once');
	is(sql("SELECT string_agg(event, ' ' ORDER BY id) FROM omni_refresh_event WHERE job = $reset"), 'waiting sending completed', '... as the log says, which told of the wait once');
}

# Whatever the end

for my $case ([ FAILED => 'failed' ], [ ODD => 'running' ])
{
	my ($status, $end) = @$case;
	begin();
	my ($refresh, $reset) = transaction(refresh(), reset_p());
	until_status($refresh, 'running', "a refresh will be $end");
	if ($end eq 'running')
	{
		held($reset, 'that runs');
		sql("UPDATE omni_refresh_job SET sent_at = sent_at - interval '14 min' WHERE id = $refresh");
		look();
		is(sql("SELECT status FROM omni_refresh_job WHERE id = $reset"), 'pending', '... for 14 minutes');
		sql("UPDATE omni_refresh_job SET run_at = run_at - interval '14 min' WHERE id = $reset");
		is(sql(q{SELECT ok FROM omni_refresh_check() WHERE check_name = 'jobs'}), 't', '... which is no fault');
		sql("UPDATE omni_refresh_job SET sent_at = sent_at - interval '1 min' WHERE id = $refresh");
		look();
	}
	else { end_refreshes($status) }
	until_status($reset, 'completed', '... and the reset is sent');
	is(sql("SELECT status FROM omni_refresh_job WHERE id = $refresh"), $end, "... while it is $end");
}

{
	begin();
	$omni->fault('answer', path => 'refresh$', status => 400);
	my ($refresh, $reset) = transaction(refresh(), reset_p());
	until_status($reset, 'completed', 'a refresh that is refused');
	follows($reset, $refresh, '... lets the reset go');
	is(sql("SELECT status FROM omni_refresh_job WHERE id = $refresh"), 'failed', '... once it has failed');
}

# Pending: a refresh that is to be retried holds the reset, and its cancellation lets that go.

# Omni's answers, from now on, have a job retried, here in an hour.
sub fails { my ($path) = @_; return $omni->fault('html_502', path => $path, times => -1) }

sub postpone
{
	my ($id) = @_;

	OmniLife::until_true('a job is to be retried', sub {
			sql("UPDATE omni_refresh_job SET run_at = now() + interval '50 min' WHERE id = $id AND status = 'pending' AND attempts > 0 RETURNING id") ne '' });
	sql('SELECT omni_refresh_wake()');	# or the worker looks at what is behind it in a minute
	return;
}

{
	begin();
	fails('refresh$');
	my ($refresh, $reset) = transaction(refresh(), reset_p());
	postpone($refresh);
	held($reset, 'behind it');
	sql("SELECT omni_refresh_cancel($refresh)");
	until_status($reset, 'completed', 'its cancellation lets the reset go');
}

# Merged: it counts as its carrier, and for itself when that is canceled.

{
	begin();
	fails('refresh$');
	my ($first, $before, $second, $after) = transaction(refresh("tables => '{a}'"), reset_p(), refresh("tables => '{b}'"), reset_p());
	isnt($before, $after, 'a reset does not stand for one behind another refresh');
	postpone($first);
	held($after, 'the refreshes are merged');
	$omni->fault('none');
	is(sql("SELECT status, merged_into FROM omni_refresh_job WHERE id = $second"), "merged|$first", '... into one that is to be retried');
	sql("SELECT omni_refresh_cancel($first)");
	until_status($before, 'completed', 'its cancellation lets the first reset go');
	until_status($second, 'running', '... and the second refresh');
	held($after, '... which the second reset waits for');
	end_refreshes();
	until_status($after, 'completed', '... to its end');
	follows($after, $second, '... as it should');
	like(asked() =~ s/^(refresh )+//r, qr/^p (refresh )?p$/, 'and no reset has carried the other one');
}

# Merging: resets that have waited for the same merge.

{
	begin();
	my ($refresh) = transaction(refresh());
	until_status($refresh, 'running', 'a refresh runs');
	my @resets = map { (transaction(reset_p()))[0] } 1 .. 5;
	held($resets[0], 'after it');
	end_refreshes();
	wait_for('... and all resets', "count(*) = 0 FROM omni_refresh_job WHERE status NOT IN ('completed', 'merged')");
	is(asked(), 'refresh p', '... are merged when it ends');
	is(sql("SELECT DISTINCT merged_into FROM omni_refresh_job WHERE id IN ($resets[1], $resets[4])"), $resets[0], '... into the first one');
}

# On both sides of a refresh

{
	begin();
	fails('cache_reset/p');
	my ($before) = transaction(reset_p());
	postpone($before);
	$omni->fault('none');
	my ($refresh, $after) = transaction(refresh(), reset_p());
	held($after, 'behind it, and behind a refresh');
	sql("UPDATE omni_refresh_job SET run_at = now() WHERE id = $before; SELECT omni_refresh_wake()");
	until_status($before, 'completed', 'the first reset goes, when it is due');
	is(sql("SELECT status FROM omni_refresh_job WHERE id = $after"), 'pending', '... and does not carry the second one');
	end_refreshes();
	until_status($after, 'completed', '... which is sent after the refresh');
	is(asked() =~ s/^(p )+//r, 'refresh p p', '... on its own');
}

# What holds nothing

{
	begin();
	sql("SET ROLE other; SET omni_refresh.server = omni; " . refresh());
	sql('SET omni_refresh.server = twin; ' . refresh());
	sql(refresh(undef, $elsewhere));
	wait_for('refreshes of another role, server and model run', "count(*) = 3 FROM omni_refresh_job WHERE status = 'running'");
	my ($reset) = transaction(reset_p());
	until_status($reset, 'completed', '... and hold no reset');
	my ($again, $refresh) = transaction(reset_p('q'), refresh());
	until_status($again, 'completed', 'nor does a later refresh');
	until_status($refresh, 'running', '... which runs');
	is(sql("SELECT status FROM omni_refresh_cache('$model', 'call')"), 'completed', 'a call goes at once');
	is(sql("SELECT count(*) FROM omni_refresh_event WHERE event = 'waiting'"), '0', 'none of them has waited');
}

# A call, and a branch

{
	begin(branch_based_refresh => 1);
	is(sql("SELECT status FROM omni_refresh('$model', '$branch')"), 'running', 'a call has a branch refreshed');
	my $reset = sql(reset_p());
	held($reset, 'a refresh of any branch counts');
	end_refreshes();
	until_status($reset, 'completed', '... to its end');
}

{
	begin();
	$omni->fault('delay', delay => 1000, path => 'refresh$');
	my $call = OmniFault::begin($node, "SELECT status FROM omni_refresh('$model');");
	$omni->wait_for_requests(1, qr/refresh$/);
	my $reset = sql(reset_p());
	held($reset, 'a call waits for its answer');
	$call->{psql}->signal('INT');
	$omni->fault('none');
	OmniFault::finish($call);
	until_status($reset, 'completed', 'the reset goes when the call has failed');
}

# Once a transaction

{
	begin();
	my ($first, $reset, $covered, $same) = transaction(refresh(), reset_p(), refresh("tables => '{a}'"), reset_p());
	is("$covered $same", "$first $reset", 'a refresh that is covered by an earlier one does not part two resets');
	my ($one, $call, $two) = transaction(reset_p('q'), "SELECT id FROM omni_refresh('$model')", reset_p('q'));
	ok($one < $call && $call < $two, 'a call does');
	my ($failed) = transaction(refresh("tables => '{x}'"));
	held($two, 'behind both');
	until_status($failed, 'running', 'another one');
	end_refreshes('FAILED');
	until_status($failed, 'failed', '... fails');
	wait_for('... and the resets go, the second one as part of the first if both were held until then',
		"count(*) = 0 FROM omni_refresh_job WHERE id IN ($one, $two) AND status NOT IN ('completed', 'merged')");
	$omni->fault('none');
	my ($three, $retry, $four) = transaction(reset_p('r'), "SELECT id FROM omni_refresh_retry($failed)", reset_p('r'));
	ok($three < $retry && $retry < $four, 'so does a refresh that is repeated');
	my ($five, $six) = transaction(reset_p('s'), 'SAVEPOINT s', refresh("tables => '{y}'"), 'ROLLBACK TO s', reset_p('s'));
	ok(defined $six, 'one that is rolled back does no harm');
	end_refreshes();
}

# A refresh with a lower number that commits later

{
	begin();
	my $session = OmniLife::session($node, 'postgres');
	my ($first) = transaction(refresh());
	until_status($first, 'running', 'a refresh runs');
	my ($late) = $session->query('BEGIN; ' . refresh("tables => '{a}'"));
	my ($reset) = transaction(reset_p());
	cmp_ok($late, '<', $reset, 'another one is requested before a reset');
	held($reset, 'after the first one');
	$session->query('COMMIT');
	until_status($late, 'running', '... and committed after it');
	sql("UPDATE omni_refresh_job SET sent_at = sent_at - interval '15 min' WHERE id = $first");
	look();
	is(sql("SELECT status FROM omni_refresh_job WHERE id = $reset"), 'pending', '... which waits for both');
	$session->quit;
	end_refreshes();
	until_status($reset, 'completed', '... to their end');
	follows($reset, $late, '... as it should');
}

# Locked rows

{
	begin();
	my $session = OmniLife::session($node, 'postgres');
	my ($refresh) = transaction(refresh());
	until_status($refresh, 'running', 'a refresh runs');
	my ($locked, $free) = transaction(reset_p('locked'), reset_p('free'));
	held($locked, 'after it');
	$session->query("BEGIN; SELECT FROM omni_refresh_job WHERE id = $locked FOR UPDATE");
	end_refreshes();
	until_status($free, 'completed', 'a row that is locked delays no other reset');
	is(sql("SELECT status FROM omni_refresh_job WHERE id = $locked"), 'pending', '... but its own');
	$session->query('COMMIT');
	$session->quit;
	until_status($locked, 'completed', '... until it is unlocked');
}

# Time: a reset that was held for long is retried as long as any.

{
	begin();
	$omni->fault('answer', path => 'cache_reset/p', status => 503);
	my ($refresh, $reset) = transaction(refresh(), reset_p());
	held($reset, 'a refresh runs');
	sql("UPDATE omni_refresh_job SET requested_at = requested_at - interval '2 d', run_at = run_at - interval '2 d' WHERE id = $reset; SELECT omni_refresh_wake()");
	held($reset, '... for long');
	end_refreshes();
	until_status($reset, 'completed', 'the reset is tried again, older than retry_for as it is');
	is(sql("SELECT attempts FROM omni_refresh_job WHERE id = $reset"), '2', '... with success');
}

# A refresh that was tried and is older than retry_for, as after a long rest of the server: it holds resets until
# its last attempt, and goes on for no newer ones, which would make the resets wait for ever.

{
	begin();
	fails('refresh$');
	my ($refresh, $reset) = transaction(refresh(), reset_p());
	postpone($refresh);
	sql("UPDATE omni_refresh_job SET requested_at = requested_at - interval '25 h' WHERE id IN ($refresh, $reset); SELECT omni_refresh_wake()");
	held($reset, 'behind it, older than retry_for');
	my ($newer) = transaction("UPDATE omni_refresh_job SET run_at = now() WHERE id = $refresh", refresh());
	until_status($reset, 'completed', '... until it ends');
	is(sql("SELECT status FROM omni_refresh_job WHERE id = $refresh"), 'failed', '... as failed, at its next attempt');
	follows($reset, $refresh, '... which the reset follows');
	is(sql("SELECT merged_into FROM omni_refresh_job WHERE id = $newer"), '', '... and a newer one goes on alone');
	sql("SELECT omni_refresh_cancel($newer)");
}

# Behind many refreshes that have been running for too long

{
	begin();
	sql("INSERT INTO omni_refresh_job (status, model_id, kind, hard, server, origin, requested_by, requested_by_oid, requested_at, run_at, sent_at, attempts, job_id, database)
		SELECT 'running', '$model', 'schema', true, 'omni', 'on_commit', current_user, current_user::regrole, now(), now() + interval '50 min',
			now() - interval '20 min', 1, gen_random_uuid(), oid FROM pg_database, generate_series(1, 200) WHERE datname = current_database()");
	my ($before) = transaction(reset_p());
	until_status($before, 'completed', 'two hundred refreshes that have been running for 20 minutes hold no reset');
	my ($refresh, $reset) = transaction(refresh(), reset_p());
	until_status($refresh, 'running', '... one behind them runs');
	held($reset, '... and does');
	end_refreshes();
	until_status($reset, 'completed', '... to its end');
}

# A refresh with a lower number that commits after the worker has found the reset free: a trigger keeps the worker
# at the end of the transaction in which it has.

{
	begin();
	sql(q{CREATE TABLE gate AS SELECT; CREATE FUNCTION wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			WHILE EXISTS (SELECT FROM public.gate) LOOP PERFORM pg_sleep(0.05); END LOOP;
			RETURN NEW;
		END $$;
		CREATE TRIGGER gate BEFORE INSERT ON omni_refresh_event FOR EACH ROW WHEN (NEW.event = 'merged' AND NEW.detail ~ '^carries') EXECUTE FUNCTION wait_at_gate()});
	my $session = OmniLife::session($node, 'postgres');
	my ($refresh) = transaction(refresh());
	until_status($refresh, 'running', 'a refresh runs');
	my ($late) = $session->query('BEGIN; ' . refresh("tables => '{a}'"));
	my ($reset, $merged) = map { (transaction(reset_p()))[0] } 1, 2;
	held($reset, 'after it, and another one is requested before the resets');
	sql("UPDATE omni_refresh_job SET sent_at = sent_at - interval '15 min' WHERE id = $refresh; SELECT omni_refresh_wake()");
	wait_for('the worker finds the resets free', "count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker' AND wait_event = 'PgSleep'");
	$session->query('COMMIT');
	$session->quit;
	sql('DELETE FROM gate');
	until_status($late, 'running', '... and then the other refresh is committed');
	look();
	is(sql("SELECT status, attempts FROM omni_refresh_job WHERE id = $reset"), 'pending|0', '... for which the reset waits after all');
	is(sql("SELECT merged_into FROM omni_refresh_job WHERE id = $merged"), $reset, '... with the one that it carries');
	sql('DROP TRIGGER gate ON omni_refresh_event; DROP FUNCTION wait_at_gate(); DROP TABLE gate');
	end_refreshes();
	until_status($reset, 'completed', '... to its end');
	follows($reset, $late, '... as it should');
}

# A crash

{
	begin();
	$omni->fault('hang', path => 'refresh$');
	my ($sending, $reset) = transaction(refresh(), reset_p());
	held($reset, 'a refresh is sent');
	kill 'KILL', OmniFault::worker($node);
	OmniLife::until_true('... when the server crashes', sub { ($node->psql('postgres', 'SELECT omni_refresh_wake()'))[0] == 0 }) or die;
	until_status($sending, 'running', '... and sent again');
	look();
	is(sql("SELECT status, attempts FROM omni_refresh_job WHERE id = $reset"), 'pending|0', '... before the reset');
	kill 'KILL', OmniFault::worker($node);
	OmniLife::until_true('the server crashes while it runs', sub { ($node->psql('postgres', 'SELECT omni_refresh_wake()'))[0] == 0 }) or die;
	look();
	is(sql("SELECT status, attempts FROM omni_refresh_job WHERE id = $reset"), 'pending|0', '... which holds the reset still');
	end_refreshes();
	until_status($reset, 'completed', '... to its end');
	follows($reset, $sending, '... as it should');
}

# One at a time, with min_interval: neither kind is kept waiting by a stream of the other.

{
	begin(job_seconds => 0);
	$node->append_conf('postgresql.conf', "omni_refresh.max_in_flight = 1\nomni_refresh.min_interval = '1 s'\n");
	$node->reload;
	for my $stream ([ reset_p(), refresh() ], [ refresh(), reset_p() ])
	{
		my ($steady, $other) = @$stream;
		my $bench = OmniLife::bench($node, 'postgres', $steady . ';', '-T', 100);
		wait_for('a steady stream', 'count(*) > 100 FROM omni_refresh_job');
		my $id = sql($other);
		until_status($id, 'completed', '... keeps no other request from being sent');
		$bench->{run}->kill_kill;
		begin(job_seconds => 0);
	}
	$node->append_conf('postgresql.conf', "omni_refresh.max_in_flight = 16\nomni_refresh.min_interval = 0\n");
	$node->reload;
}

# A hundred thousand resets behind a refresh

{
	begin();
	my ($refresh) = transaction(refresh());
	until_status($refresh, 'running', 'a refresh runs');
	sql("BEGIN; INSERT INTO omni_refresh_job (status, model_id, kind, policy, server, origin, requested_by, requested_by_oid, requested_at, run_at, database)
		SELECT status, model_id, 'cache', 'p', server, origin, requested_by, requested_by_oid, requested_at, requested_at, database
		FROM omni_refresh_on_commit('$model', tables => '{gone}') AS job, generate_series(1, 100000);
		DELETE FROM omni_refresh_job WHERE tables = '{gone}'; COMMIT");
	my ($next) = transaction(refresh("tables => '{next}'"));
	until_status($next, 'running', 'many resets wait for it, and keep no refresh of the model waiting');
	# The statistics of a worker come late; what it has read until now comes before its end.
	sql("SELECT pg_terminate_backend(" . OmniFault::worker($node) . ", 60000)");
	look();
	sub reads { return sql(q{SELECT pg_stat_get_tuples_returned('omni_refresh_job_queue_idx'::regclass)}) }
	my $before = reads();
	look() for 1 .. 10;
	OmniLife::until_true('the worker looks', sub { reads() > $before });
	cmp_ok(reads() - $before, '<', 10000, '... and does not read them again and again');
	end_refreshes();
	wait_for('they go in the end', "count(*) = 0 FROM omni_refresh_job WHERE status IN ('pending', 'sending', 'running')");
	is(asked(), 'refresh refresh p', '... by one request');
}

# With track off, acceptance is the end.

{
	begin();
	$node->append_conf('postgresql.conf', "omni_refresh.track = off\n");
	$node->reload;
	my ($refresh, $reset) = transaction(refresh(), reset_p());
	until_status($reset, 'completed', 'with track off');
	is(sql("SELECT status FROM omni_refresh_job WHERE id = $refresh"), 'accepted', '... a reset is sent');
	follows($reset, $refresh, '... once the refresh is accepted');
}

$node->stop('fast');
done_testing();
