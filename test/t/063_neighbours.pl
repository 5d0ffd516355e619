# Names, settings, triggers, sessions and keys that are beside a request do nothing to it.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
my $other = OmniAPI->start;
my $node = OmniFault::node('neighbours', conf => join '', map { "$_\n" }
	  'wal_level = logical', 'max_wal_senders = 4', 'max_prepared_transactions = 10', 'omni_refresh.min_interval = 0');
my $model = $omni->model;
my $id;

END { my $rc = $?; $_->stop for grep { $_ } $omni, $other; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
sql('CREATE ROLE alice LOGIN; CREATE ROLE bob LOGIN');
my $alice = sql(q{SELECT 'alice'::regrole::oid});
my $superuser = sql('SELECT current_user');

sub sql
{
	return $node->safe_psql('postgres', @_);
}

sub configure
{
	my (%settings) = @_;

	$node->append_conf('postgresql.conf', join '', map { "omni_refresh.$_ = $settings{$_}\n" } sort keys %settings);
	$node->reload;
	return;
}

sub end_worker
{
	sql(q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
	return;
}

# Queues a job of alice's, in a session of her own; returns its number.
sub queue
{
	my ($arguments, $settings) = @_;

	$arguments = $arguments ? ", $arguments" : '';
	my $call = OmniFault::call($node, ($settings ? "SET $settings;" : '') . "SELECT id FROM omni_refresh_on_commit('$model'$arguments);", user => 'alice');
	$call->{out} =~ /^\d+\z/ or die $call->{err};
	return $call->{out};
}

# The same while the configuration file holds the queue
sub held
{
	my ($schemas) = @_;

	return sql('SET omni_refresh.enabled = on; SET ROLE alice; SELECT id FROM omni_refresh_on_commit('
		  . "'$model', schemas => '" . ($schemas // '{held}') . q{')});
}

sub until_true
{
	my ($name, $condition, $seconds) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return OmniLife::until_true($name, sub { sql("SELECT $condition") eq 't' }, $seconds // 15)
		|| diag(sql('SELECT id, status, attempts, server, requested_by, error FROM omni_refresh_job ORDER BY id DESC LIMIT 3'));
}

# Waits for the end of a job, or of the one that carries it out.
sub ends
{
	my ($job, $status, $name) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return until_true($name, "status = '$status' FROM omni_refresh_job WHERE id = (SELECT coalesce(merged_into, id) FROM omni_refresh_job WHERE id = $job)");
}

# A server whose name is that of another one and the number of a role

for my $why ('rate_limit', 'max_in_flight')
{
	note("a namesake: $why");
	$_->reset for $omni, $other;
	configure(max_in_flight => 1);
	OmniFault::server($node, "omni $alice", url => $other->http, key => $other->key, rate_limit => $why eq 'rate_limit' ? 1 : 0);
	$other->fault('hang', times => -1) if $why eq 'max_in_flight';
	OmniFault::call($node, qq{SET omni_refresh.server = 'omni $alice'; SELECT omni_refresh_on_commit(gen_random_uuid()) FROM generate_series(1, 3);}, user => 'bob');
	$other->wait_for_requests(1);
	until_true("$why: a server is held up", q{count(*) > 0 FROM omni_refresh_event WHERE event = 'rate_limited'}) if $why eq 'rate_limit';
	ends(queue(), 'accepted', "$why at a server that is named \"omni $alice\": alice, who has that number, goes on at server omni");
	$other->reset;
	end_worker();
	sql(qq{DELETE FROM omni_refresh_job; DROP SERVER "omni $alice" CASCADE});
}

# ... and the other way round: alice has reached the limit at omni, which is nobody else's matter

note('a namesake: the other way round');
$_->reset for $omni, $other;
configure(max_in_flight => 4);
OmniFault::server($node, "omni $alice", url => $other->http, key => $other->key, rate_limit => 0);
sql(q{ALTER SERVER omni OPTIONS (SET rate_limit '1')});
OmniFault::call($node, 'SELECT omni_refresh_on_commit(gen_random_uuid()) FROM generate_series(1, 3);', user => 'alice');
until_true('alice has reached a limit', q{count(*) > 0 FROM omni_refresh_event WHERE event = 'rate_limited'});
$id = OmniFault::call($node, qq{SET omni_refresh.server = 'omni $alice'; SELECT id FROM omni_refresh_on_commit('${\ $other->model}');}, user => 'bob')->{out};
ends($id, 'accepted', "... and bob goes on at server \"omni $alice\"");
end_worker();
sql(q{DELETE FROM omni_refresh_job; ALTER SERVER omni OPTIONS (SET rate_limit '0')});

# A request that is merged into an older one has its own time to be tried again.

for my $age ('59 min 59 s', '2 h')
{
	for my $again (0, 1)
	{
		note("an older request, $age ago, the worker ends: $again");
		$omni->reset;
		configure(retry_for => q{'1 h'}, enabled => 'off');
		$omni->fault('answer', status => 503, headers => { 'Retry-After' => 2 });
		my ($old, $young) = map { held("{$_}") } 'old', 'young';
		sql("UPDATE omni_refresh_job SET requested_at = now() - interval '$age', run_at = now() - interval '$age' WHERE id = $old");
		end_worker();
		configure(enabled => 'on');
		sql('SELECT omni_refresh_wake()');
		$omni->wait_for_requests(1, qr/refresh/);
		until_true('... the first attempt fails', "status <> 'sending' AND attempts = 1 FROM omni_refresh_job WHERE id = $old");
		is(sql("SELECT merged_into FROM omni_refresh_job WHERE id = $young"), $old, "a request is merged into one that was made $age ago");
		if ($again)
		{
			end_worker();
			sql('SELECT omni_refresh_wake()');
		}
		ends($young, 'accepted', '... it is tried again' . ($again ? ', by the next worker' : ''));
	}
}
configure(retry_for => q{'24 h'});

# Settings of roles are for their sessions. The worker is nobody's.

for my $whose ("ROLE $superuser", 'ROLE ALL', "ROLE $superuser IN DATABASE postgres")
{
	note($whose);
	$omni->reset;
	end_worker();
	sql("ALTER $whose SET omni_refresh.enabled = off");
	{
		local $ENV{PGOPTIONS} = '-c omni_refresh.enabled=on';
		$id = sql("SELECT id FROM omni_refresh_on_commit('$model')");
	}
	ends($id, 'accepted', "ALTER $whose SET omni_refresh.enabled = off: what is queued is sent");
	sql("ALTER $whose RESET omni_refresh.enabled");
	$node->reload;
	ends(queue(), 'accepted', '... as it is after RESET, by the same worker');
	end_worker();
	sql('DELETE FROM omni_refresh_job');
}

# The database's count, as does the configuration file.
sql('ALTER DATABASE postgres SET omni_refresh.enabled = off');
$id = held();
OmniFault::call($node, q{SELECT count(*) FROM omni_refresh_models();}, user => 'alice');
is(sql("SELECT status FROM omni_refresh_job WHERE id = $id"), 'pending', 'ALTER DATABASE SET omni_refresh.enabled = off holds the queue');
sql('ALTER DATABASE postgres RESET omni_refresh.enabled');
end_worker();
sql('SELECT omni_refresh_wake()');
ends($id, 'accepted', '... until it is reset');

# Other settings may be anything, wherever they are set. Our own sessions undo them.

my %settings = (
	statement_timeout => [ '1ms', 0 ],
	lock_timeout => [ '1ms', 0 ],
	idle_in_transaction_session_timeout => [ '1ms', 0 ],
	default_transaction_read_only => [ 'on', 'off' ],
	default_transaction_isolation => [ 'serializable', 'read\ committed' ],
	default_transaction_deferrable => [ 'on', 'off' ],
	session_replication_role => [ 'replica', 'origin' ],
	search_path => [ 'nowhere', 'public' ],
	row_security => [ 'off', 'on' ],
	array_nulls => [ 'off', 'on' ],
	transform_null_equals => [ 'on', 'off' ],
	enable_indexscan => [ 'off', 'on' ],
	IntervalStyle => [ 'sql_standard', 'postgres' ],
	DateStyle => [ 'SQL,DMY', 'ISO' ],
	TimeZone => [ 'Pacific/Kiritimati', 'UTC' ],
	role => [ 'alice', 'none' ]);
$settings{transaction_timeout} = [ '200ms', 0 ] if $node->pg_version >= 17;
$ENV{PGOPTIONS} = join ' ', map { "-c $_=$settings{$_}[1]" } sort keys %settings;
configure(track => 'on');
for my $whose ("ROLE $superuser", 'ROLE ALL', 'DATABASE postgres', 'SYSTEM')
{
	my @names = grep { $whose ne 'SYSTEM' || $_ ne 'role' } sort keys %settings;

	note($whose);
	$omni->reset;
	$node->psql('postgres', join ";\n", map { sprintf q{ALTER %s SET %s = %s}, $whose, $_, $_ eq 'DateStyle' ? 'SQL,DMY' : "'$settings{$_}[0]'" } @names);
	$node->reload;
	end_worker();
	my $call = OmniFault::call($node, "SELECT status FROM omni_refresh('$model');");
	is($call->{out}, 'running', "ALTER $whose SET @names: a call") or diag($call->{err});
	until_true('... and its end', q{status = 'completed' FROM omni_refresh_job ORDER BY id DESC LIMIT 1});
	ends(sql("SELECT id FROM omni_refresh_on_commit('$model')"), 'completed', '... and a job');
	sql(join ";\n", map { sprintf q{ALTER %s RESET %s}, $whose, $_ } @names);
	$node->reload;
}
delete $ENV{PGOPTIONS};
configure(track => 'off');
end_worker();

# A session, or an apply worker, of the replica kind

$omni->reset;
my ($rc, $out, $err) = $node->psql('postgres', "SET session_replication_role = replica; SELECT id FROM omni_refresh_on_commit('$model')");
is($err, '', 'a request of a session whose role is replica');
ends($out, 'accepted', '... is sent') if $out ne '';
$omni->reset;
sql('CREATE DATABASE source TEMPLATE template0');
$node->safe_psql('source', 'CREATE TABLE loaded (n int PRIMARY KEY); CREATE PUBLICATION loaded FOR TABLE loaded');
$node->safe_psql('source', q{SELECT pg_create_logical_replication_slot('loaded', 'pgoutput')});
sql(qq{CREATE TABLE loaded (n int PRIMARY KEY);
	CREATE FUNCTION refresh() RETURNS trigger LANGUAGE plpgsql
		AS 'BEGIN PERFORM public.omni_refresh_on_commit(''$model'', schemas => ARRAY[''n'' || NEW.n]); RETURN NULL; END';
	CREATE TRIGGER refresh AFTER INSERT ON loaded FOR EACH ROW EXECUTE FUNCTION refresh();
	ALTER TABLE loaded ENABLE ALWAYS TRIGGER refresh});
sql('CREATE SUBSCRIPTION loaded CONNECTION $$' . $node->connstr('source') . q{$$ PUBLICATION loaded WITH (create_slot = false, copy_data = false, slot_name = 'loaded')});
for my $n (1, 2)
{
	$node->safe_psql('source', "INSERT INTO loaded VALUES ($n)");
	until_true('a row comes by logical replication', "count(*) = $n FROM loaded");
	until_true('... its trigger asks for a refresh, which is sent', "count(*) = 1 FROM omni_refresh_job WHERE schemas = '{n$n}' AND status = 'accepted'");
}
sql("ALTER SUBSCRIPTION loaded DISABLE;\nALTER SUBSCRIPTION loaded SET (slot_name = NONE);\nDROP SUBSCRIPTION loaded");
OmniLife::until_true('... which ends', sub {
		$node->safe_psql('source', q{SELECT count(*) = 0 FROM pg_replication_slots WHERE slot_name = 'loaded' AND active}) eq 't' });
$node->safe_psql('source', q{SELECT pg_drop_replication_slot('loaded')});

# Cancel, two-phase commit, and what listeners hear of it

configure(enabled => 'off');
my $listener = OmniLife::session($node, 'postgres');
my $marks = 0;
$listener->query('LISTEN omni_refresh');

# What was told of a job since this was asked last
sub heard
{
	my ($job) = @_;
	my $mark = 'mark ' . ++$marks;
	my $text = '';

	sql("SELECT pg_notify('omni_refresh', '$mark')");
	OmniLife::until_true("... $mark", sub { $text .= join '', $listener->query('SELECT 1'); $text =~ /$mark\b/ });
	return join ' ', $text =~ /\{"id": $job, "status": "(\w+)"\}/g;
}

$id = held();
($rc, $out, $err) = $node->psql('postgres', "BEGIN; SELECT omni_refresh_cancel($id); PREPARE TRANSACTION 'canceled'");
is("$out $err", 't ', 'a transaction that has canceled a job can be prepared');
is(sql("SELECT status FROM omni_refresh_job WHERE id = $id"), 'pending', '... the job is still there');
$node->psql('postgres', q{COMMIT PREPARED 'canceled'});
is(sql("SELECT status FROM omni_refresh_job WHERE id = $id"), 'canceled', '... and is canceled when that is committed');
$id = held();
$node->psql('postgres', "BEGIN; SELECT omni_refresh_cancel($id); PREPARE TRANSACTION 'canceled'; ROLLBACK PREPARED 'canceled'");
is(heard($id) . sql("SELECT status FROM omni_refresh_job WHERE id = $id"), 'pending', '... and stays if that is rolled back');
$node->psql('postgres', "BEGIN; SELECT omni_refresh_cancel($id); ROLLBACK");
is(heard($id), '', 'a cancel that is rolled back is not told');
$node->psql('postgres', "BEGIN; SAVEPOINT s; SELECT omni_refresh_cancel($id); ROLLBACK TO s; COMMIT");
is(heard($id), '', '... nor one of a savepoint that is');
$node->psql('postgres', "BEGIN; SAVEPOINT s; SELECT omni_refresh_cancel($id); ROLLBACK TO s; SELECT omni_refresh_cancel(0); ROLLBACK");
is(heard($id), '', '... nor one that an error follows');
$node->psql('postgres', "BEGIN; SAVEPOINT s; SELECT omni_refresh_cancel($id); RELEASE s; SELECT 1; COMMIT");
is(heard($id), 'canceled', 'one that is committed is told, once');
my @two = map { held() } 1 .. 2;
$node->psql('postgres', "BEGIN; SELECT omni_refresh_cancel($two[0]); SAVEPOINT s; SELECT omni_refresh_cancel($two[1]); ROLLBACK TO s; COMMIT");
is(heard($two[0]), 'canceled', '... of two, of which one is rolled back');
$node->psql('postgres', "BEGIN; SELECT omni_refresh_cancel($two[1]); SAVEPOINT s; SELECT 1; ROLLBACK TO s; COMMIT");
is(heard($two[1]), 'canceled', '... and then the other one');
$listener->quit;
sql(q{DELETE FROM omni_refresh_job WHERE status = 'pending'});
configure(enabled => 'on');

# A trigger of the tables' owner that gives away locks

sql(q{CREATE FUNCTION unlock() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_advisory_unlock_all(); RETURN NEW; END';
	ALTER TABLE omni_refresh_job OWNER TO alice; ALTER TABLE omni_refresh_event OWNER TO alice;
	CREATE TRIGGER unlock BEFORE INSERT OR UPDATE ON omni_refresh_job FOR EACH ROW EXECUTE FUNCTION unlock();
	CREATE TRIGGER unlock BEFORE INSERT OR UPDATE ON omni_refresh_event FOR EACH ROW EXECUTE FUNCTION unlock()});
my $lock = q{SELECT string_agg(pid::text, ' ') FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 20306 AND granted
	AND database = (SELECT oid FROM pg_database WHERE datname = current_database())};
$omni->reset;
sql("SELECT omni_refresh('$model')");
my $worker = OmniFault::worker($node);
is(sql($lock), $worker, 'a trigger that unlocks all leaves the worker its lock: after a call');
ends(queue(), 'accepted', '... and a job');
is(sql($lock), $worker, '... as well');
sql('DROP TRIGGER unlock ON omni_refresh_job; DROP TRIGGER unlock ON omni_refresh_event');
sql("SELECT omni_refresh('$model')");
is(OmniFault::worker($node), $worker, '... the worker is the same');
end_worker();
is(sql("SELECT status FROM omni_refresh('$model')"), 'accepted', '... and the next one gets the lock');
is(sql($lock), OmniFault::worker($node), '... as it should');
sql('ALTER TABLE omni_refresh_job OWNER TO CURRENT_USER; ALTER TABLE omni_refresh_event OWNER TO CURRENT_USER');

# To cancel a job of which an attempt may have arrived ends it, and so returns true, but nobody can
# promise that it was not sent: it is unknown.

OmniFault::server($node, 'refused', url => $omni->url('refused'), key => $omni->key, rate_limit => 0);
for my $case ([ 'close', 1, 'unknown' ], [ 'hang', 1, 'unknown' ], [ 'worker', 1, 'unknown' ], [ 'close, then 503', 2, 'unknown' ],
	[ '503', 1, 'canceled' ], [ 'refused', 1, 'canceled' ], [ 'not sent', 0, 'canceled' ])
{
	my ($what, $attempts, $end) = @$case;

	note("cancel: $what");
	$omni->reset;
	configure(enabled => $what eq 'not sent' ? 'off' : 'on');
	sql(q{ALTER SERVER omni OPTIONS (ADD timeout '300 ms')}) if $what eq 'hang';
	$omni->fault('close', times => $what =~ /then/ ? 1 : -1) if $what =~ /close/;
	$omni->fault('hang', times => -1) if $what eq 'hang' || $what eq 'worker';
	$omni->fault('answer', status => 503, times => -1) if $what =~ /503/;
	$id = $what eq 'not sent' ? held() : queue('', 'omni_refresh.server = ' . ($what eq 'refused' ? 'refused' : 'omni'));
	$omni->wait_for_requests(1) if $what eq 'worker';
	until_true("a job is tried: $what", "attempts >= $attempts AND status IN ('pending', 'sending') FROM omni_refresh_job WHERE id = $id");
	configure(enabled => 'off');
	end_worker() if $what eq 'worker';
	sql('SELECT omni_refresh_wake()');
	until_true('... and waits', "status = 'pending' FROM omni_refresh_job WHERE id = $id");
	is(sql("SELECT omni_refresh_cancel($id)"), 't', '... it is ended by hand');
	is(sql("SELECT status, finished_at IS NOT NULL FROM omni_refresh_job WHERE id = $id"), "$end|t", "... and is $end");
	is(sql("SELECT event FROM omni_refresh_event WHERE job = $id ORDER BY id DESC LIMIT 1"), $end, '... as the last event says');
	like(sql("SELECT detail FROM omni_refresh_event WHERE job = $id ORDER BY id DESC LIMIT 1"), qr/by "\Q$superuser\E"/, '... with who has done it');
	sql(q{ALTER SERVER omni OPTIONS (DROP timeout)}) if $what eq 'hang';
}
configure(enabled => 'on');

# A key that Omni has asked for a pause stays paused, however many others are used. It is the first that
# the limiter has heard of since the server was started.

$omni->reset;
$node->restart;
OmniFault::server($node, "key $_", url => $omni->http, key => "key-number-$_", rate_limit => 0) for 1 .. 40;
$omni->fault('answer', status => 429, headers => { 'Retry-After' => 300 });
my $paused = "SET omni_refresh.call_timeout = '1 s'; SELECT omni_refresh('$model');";
my $call = OmniFault::call($node, $paused);
is($call->{sqlstate}, '53000', 'Omni asks for a pause with a key');
is(scalar(() = $omni->requests), 1, '... after one request');
OmniFault::call($node, $paused);
is(scalar(() = $omni->requests), 1, '... so that there is no other');
OmniFault::call($node, 'SET omni_refresh.on_failure = warning;'
	  . join '', (map { "SET omni_refresh.server = 'key $_'; SELECT omni_refresh('$model');" } 1 .. 40));
is(scalar(() = $omni->requests), 41, '... others are used');
$call = OmniFault::call($node, $paused);
is($call->{sqlstate}, '53000', '... that key is not') or diag($call->{err});
is(scalar(() = $omni->requests), 41, '... indeed');

$node->stop('fast');
my @crashes = slurp_file($node->logfile) =~ /^.*(?:TRAP:|PANIC:|terminated by signal).*$/mg;
is("@crashes", '', 'nothing has crashed');
done_testing();
