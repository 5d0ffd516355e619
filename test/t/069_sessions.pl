# Other sessions, transactions, triggers and keys do nothing to a request; and what a cancel promises.

use strict;
use warnings FATAL => 'all';

use Test::More;

use OmniFault;
use OmniLife;
use OmniNeighbour;

OmniNeighbour::start('sessions');
my $id;

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

OmniNeighbour::finish();
