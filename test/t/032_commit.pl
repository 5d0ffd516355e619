# What is asked for with omni_refresh_on_commit() reaches Omni if and only if the transaction
# commits, however it does.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
my $node = OmniFault::node('commit', conf => <<END);
omni_refresh.min_interval = 0
max_prepared_transactions = 4
client_min_messages = warning
END
my $model = $omni->model;
my $count = 0;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);

# A request, known by the name of a schema
sub request
{
	my ($name) = @_;

	return "omni_refresh_on_commit('$model', schemas => '{$name}')";
}

sub queue
{
	my ($name) = @_;

	return 'SELECT FROM ' . request($name) . ';';
}

# The names that Omni has heard, in order and once each.
sub delivered
{
	my %names = map { $_ => 1 } map { split /%2c/i } map { $_->{query} =~ /schemas=([^&]*)/ } $omni->requests;

	return join ' ', sort keys %names;
}

# Runs statements; then, when all that they have queued is sent, exactly these names were delivered.
# What comes last shows that the worker has looked.
sub delivers
{
	my ($names, $sql, $what) = @_;
	my $last = 'z' . ++$count;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$omni->reset;
	$node->psql('postgres', "$sql\n" . queue($last), on_error_stop => 0, stderr => \my $err);
	$node->poll_query_until('postgres',
		q{SELECT count(*) = 0 FROM omni_refresh_job WHERE status IN ('pending', 'sending')}) or die;
	is(delivered(), join(' ', split(' ', $names), $last), $what) or diag($err);
	return $err;
}

# Its row

is($node->safe_psql('postgres', q{
		BEGIN;
		SELECT status, job_id, model_id = '} . $model . q{', kind, hard, schemas, tables, server, origin,
			requested_by = current_user, requested_at = run_at, sent_at, finished_at, attempts, error
		FROM } . request('a') . q{;
		SELECT count(*) FROM omni_refresh_job WHERE status = 'pending';
		SELECT count(*) FROM omni_refresh_event;
		ROLLBACK}), "pending||t|schema|f|{a}||omni|on_commit|t|t|||0|\n1\n0",
	'a request is a row of the transaction, and nothing else');
is($node->safe_psql('postgres', 'SELECT count(*) FROM omni_refresh_job'), '0', '... which a rollback takes with it');
$node->safe_psql('postgres', queue('a'));
is(($omni->wait_for_requests(1))[0]{query}, 'hard_refresh=false&schemas=a', 'a statement by itself commits');
ok($node->poll_query_until('postgres', q{SELECT status = 'accepted' FROM omni_refresh_job}), '... and is sent');
is($node->safe_psql('postgres', q{
		SELECT status, attempts, sent_at >= requested_at, finished_at >= sent_at, job_id IS NOT NULL, merged_into
		FROM omni_refresh_job}), 'accepted|1|t|t|t|', '... and then the row tells the rest');
is($node->safe_psql('postgres', q{
		SELECT string_agg(event, ' ' ORDER BY e.id), bool_and(e.requested_by = j.requested_by),
			min(occurred_at) = j.sent_at
		FROM omni_refresh_event e JOIN omni_refresh_job j ON j.id = e.job GROUP BY j.id}),
	'sending accepted|t|t', '... and so does the event log');

# Before the commit

my $session = OmniLife::session($node, 'postgres');
$omni->reset;
$session->query('BEGIN; ' . queue('open'));
$node->safe_psql('postgres', queue('other'));
$omni->wait_for_requests(1);
is(delivered(), 'other', 'nothing is sent before the commit');
$session->query('COMMIT');
$omni->wait_for_requests(2);
is(delivered(), 'open other', '... but after it');
$session->quit;

# Transactions of every kind

delivers('a b', 'BEGIN; ' . queue('a') . queue('b') . 'COMMIT;', 'a transaction that commits');
delivers('', 'BEGIN; ' . queue('a') . 'ROLLBACK;', '... that is rolled back');
delivers('', 'BEGIN; ' . queue('a') . 'SELECT 1/0; COMMIT;', '... that fails');
delivers('a', 'BEGIN; ' . queue('a') . 'COMMIT AND CHAIN; ' . queue('b') . 'ROLLBACK;', '... that is chained to the next');
delivers('b', 'BEGIN; ' . queue('a') . 'ROLLBACK AND CHAIN; ' . queue('b') . 'COMMIT;', '... that follows one rolled back');
delivers('a c', 'BEGIN; ' . queue('a') . 'SAVEPOINT s; ' . queue('b') . 'ROLLBACK TO s; ' . queue('c') . 'COMMIT;',
	'what a savepoint takes back is not sent');
delivers('a b', 'BEGIN; ' . queue('a') . 'SAVEPOINT s; ' . queue('b') . 'RELEASE s; COMMIT;', '... but what it keeps');
delivers('', 'BEGIN; SAVEPOINT s; ' . queue('a') . 'ROLLBACK TO s; COMMIT;', '... if that is all, nothing is');
delivers('b', 'BEGIN; SAVEPOINT s; ' . queue('a') . 'ROLLBACK TO s; ' . queue('b') . 'COMMIT;',
	'... and something is, if it comes later');
for my $level ('REPEATABLE READ', 'SERIALIZABLE')
{
	delivers('a', "BEGIN ISOLATION LEVEL $level; SELECT 1; " . queue('a') . 'COMMIT;', "in $level");
}
like(delivers('', 'BEGIN READ ONLY; ' . queue('a') . 'COMMIT;', 'nothing in a transaction that is read-only'),
	qr/ERROR:  cannot execute INSERT in a read-only transaction/, '... which is an error');
$node->safe_psql('postgres', q{
	CREATE TABLE once (n int UNIQUE DEFERRABLE INITIALLY DEFERRED);
	INSERT INTO once VALUES (1)});
delivers('', 'BEGIN; ' . queue('a') . 'INSERT INTO once VALUES (1); COMMIT;', '... nor in one that fails at its very end');

# Procedures, functions, triggers

delivers('a d', 'DO $$ BEGIN PERFORM ' . request('a') . '; BEGIN PERFORM ' . request('b') .
	q{; RAISE 'no'; EXCEPTION WHEN OTHERS THEN NULL; END; BEGIN PERFORM } . request('d') .
	'; EXCEPTION WHEN OTHERS THEN NULL; END; END $$;', 'what an exception takes back is not sent');
delivers('a c', 'DO $$ BEGIN PERFORM ' . request('a') . '; COMMIT; PERFORM ' . request('b') . '; ROLLBACK; PERFORM ' .
	request('c') . '; COMMIT; PERFORM ' . request('d') . '; RAISE \'no\'; END $$;', 'a procedure with transactions of its own');
$node->safe_psql('postgres', q{
	CREATE TABLE loaded (what text);
	CREATE FUNCTION request() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM omni_refresh_on_commit('} . $model . q{', schemas => ARRAY[NEW.what]);
		RETURN NULL;
	END $$;
	CREATE CONSTRAINT TRIGGER request AFTER INSERT ON loaded DEFERRABLE INITIALLY DEFERRED
		FOR EACH ROW EXECUTE FUNCTION request()});
delivers('a b', q{INSERT INTO loaded VALUES ('a'), ('b');}, 'a deferred trigger');
delivers('b', q{BEGIN; INSERT INTO loaded VALUES ('a'); ROLLBACK; INSERT INTO loaded VALUES ('b');}, '... which is rolled back');

# Two-phase commit: nobody is told of COMMIT PREPARED, so that such a request waits for the next look,
# at the latest when the worker is about to leave.

delivers('', 'BEGIN; ' . queue('a') . "PREPARE TRANSACTION 'a';", 'a prepared transaction');
delivers('a', "COMMIT PREPARED 'a';", '... is sent once it is committed');
delivers('', 'BEGIN; ' . queue('b') . "PREPARE TRANSACTION 'b'; ROLLBACK PREPARED 'b';", '... and never if it is rolled back');
$node->safe_psql('postgres', 'BEGIN; ' . queue('c') . "PREPARE TRANSACTION 'c'");
$node->restart;
delivers('c', "COMMIT PREPARED 'c';", '... also after a restart');

$node->append_conf('postgresql.conf', "omni_refresh.idle_timeout = '2 s'\n");
$node->reload;
$omni->reset;
$node->safe_psql('postgres', 'BEGIN; ' . queue('d') . "PREPARE TRANSACTION 'd'");
$node->safe_psql('postgres', queue('e') . "COMMIT PREPARED 'd'");
ok($node->poll_query_until('postgres', q{SELECT bool_and(status <> 'pending') FROM omni_refresh_job WHERE schemas <@ '{d, e}'}),
	'... before the worker leaves');
$node->append_conf('postgresql.conf', "omni_refresh.idle_timeout = '10 min'\n");
$node->reload;

# What is refused at once

my $nobody = 'SET omni_refresh.server = nobody; SELECT status, id, error FROM ' . request('a') . ';';
my $error = 'server "nobody" does not exist';
like(delivers('', "BEGIN; $nobody COMMIT; RESET omni_refresh.server;", 'a request without a server is refused'),
	qr/ERROR:  $error/, '... with an error');
like($node->safe_psql('postgres', "SET omni_refresh.on_failure = warning; SET client_min_messages = error; $nobody"),
	qr/\Afailed\|\|42704: $error\nHINT:  \S/, '... or, where that is asked for, with a warning and a row that is not there');
like(delivers('', 'SET omni_refresh.enabled = off; ' . queue('a') . 'RESET omni_refresh.enabled;', 'nor is one sent that is switched off'),
	qr/^$/, '... without an error');
is($node->safe_psql('postgres', 'SET client_min_messages = error; SET omni_refresh.enabled = off; SELECT status, id FROM ' . request('a')),
	'canceled|', '... but its row says so');

# A server without room for a worker

$node->append_conf('postgresql.conf', "max_worker_processes = 1\n");	# which is PostgreSQL's own
$node->restart;
my ($out, $err);
$node->psql('postgres', "\\set VERBOSITY verbose\nBEGIN; " . queue('a') . 'CREATE TABLE kept (); COMMIT;', stderr => \$err);
like($err, qr/^(psql\S+ )?WARNING:  53400: could not start a background worker for queued requests: no background worker is available\nDETAIL:  .*max_worker_processes.*\nHINT:  /,
	'without room for a worker there is a warning');
unlike($err, qr/ERROR/, '... and no more than that');
is($node->safe_psql('postgres', q{SELECT status, to_regclass('kept') FROM omni_refresh_job WHERE status = 'pending'}),
	'pending|kept', '... the transaction commits');
$node->append_conf('postgresql.conf', "max_worker_processes = 8\n");
$node->restart;
delivers('a', '', '... and the request is sent when there is room');

# Many sessions at once, against a worker that does not linger: all that they commit and nothing else

$node->append_conf('postgresql.conf', "omni_refresh.idle_timeout = 0\n");
$node->reload;
$omni->reset;
my $bench = OmniLife::bench($node, 'postgres', join("\n", '\set n random(1, 1000000000)', 'BEGIN;',
		"SELECT FROM omni_refresh_on_commit('$model', schemas => ARRAY['k' || :n]);", 'COMMIT;', 'BEGIN;',
		"SELECT FROM omni_refresh_on_commit('$model', schemas => ARRAY['r' || :n]);", 'ROLLBACK;'),
	'-c', 8, '-j', 2, '-T', 3);
is(OmniLife::benched($bench), 0, 'eight sessions commit and roll back') or diag($bench->{err});
my ($calls) = $bench->{out} =~ /actually processed: (\d+)/;
ok($node->poll_query_until('postgres',
		q{SELECT count(*) = 0 FROM omni_refresh_job WHERE status IN ('pending', 'sending')}), '... all is sent');
my %seen = map { $_ => 1 } split ' ', delivered();
# ... by its name, or in a refresh of the whole model, which the names of many make
my $merged = q{FROM omni_refresh_job AS job JOIN omni_refresh_job AS carrier ON carrier.id = job.merged_into WHERE job.schemas[1] ~ '^k'};
my @kept = split /\n/, $node->safe_psql('postgres', "SELECT DISTINCT job.schemas[1] $merged AND carrier.schemas IS NOT NULL AND carrier.status <> 'merged'");
is(scalar(grep { !$seen{$_} } @kept), 0, '... what is committed is');
is($node->safe_psql('postgres', "SELECT count(*) $merged AND carrier.status NOT IN ('accepted', 'merged')"), '0', '... or carried out with others');
is(scalar(grep { /^r/ } keys %seen), 0, '... and what is rolled back is not');
cmp_ok($node->safe_psql('postgres', 'SELECT count(*) FROM omni_refresh_job'), '>=', $calls, '... of each there is a row');
is($node->safe_psql('postgres', q{
		SELECT count(*) FROM omni_refresh_job j WHERE status <> 'merged' AND (status <>
			(SELECT event FROM omni_refresh_event WHERE job = j.id ORDER BY id DESC LIMIT 1)
			OR 1 <> (SELECT count(*) FROM omni_refresh_event WHERE job = j.id AND event = 'accepted'))}),
	'0', '... and its events tell how it ended');
ok($node->poll_query_until('postgres', q{
		SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'}), '... and the worker leaves');

$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/WARNING:  could not start a background worker for queued requests/,
	qr/WARNING:  $error/);
done_testing();
