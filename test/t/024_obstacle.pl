# What is wrong with the server, or done by others, does not spread: a standby that is dead, locks on
# the tables, outcomes that cannot be written.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
my $node = OmniFault::node('obstacle', conf => "max_wal_senders = 2\n");
my $refresh = q{SELECT status FROM omni_refresh('} . $omni->model . q{')};

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

$node->safe_psql('postgres', 'CREATE DATABASE elsewhere');
$node->safe_psql('elsewhere', 'CREATE EXTENSION omni_refresh');
OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0, timeout => '100 s', db => $_)
	for 'postgres', 'elsewhere';
is($node->safe_psql($_, $refresh), 'accepted', "a call from $_") for 'postgres', 'elsewhere';
my $worker = OmniFault::worker($node);

# A dead synchronous standby

$node->safe_psql('postgres', q{
	ALTER SYSTEM SET synchronous_standby_names = 'nobody';
	SELECT pg_reload_conf()});
ok($node->poll_query_until('postgres', "SELECT current_setting('synchronous_standby_names') = 'nobody'"), 'a standby is missing');
my $writer = OmniLife::session($node, 'postgres');
$writer->send('CREATE TABLE waits (x int)');
ok($node->poll_query_until('postgres', q{SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'}),
	'... and keeps those who write');
for my $sync ('on', 'remote_apply')
{
	my $call = OmniFault::call($node, "SET synchronous_commit = $sync; $refresh;");
	is($call->{out}, 'accepted', "... but no call: synchronous_commit = $sync") or diag($call->{err});
	cmp_ok($call->{seconds}, '<', 2, '... for any time');
}
$node->safe_psql('postgres', "SELECT pg_terminate_backend($worker, 5000)");
is($node->safe_psql('postgres', $refresh), 'accepted', '... nor a worker that begins');
$worker = OmniFault::worker($node);
$node->safe_psql('postgres', 'ALTER SYSTEM RESET synchronous_standby_names; SELECT pg_reload_conf()');
$writer->answer;
$writer->quit;

# Somebody locks our tables while one call is on its way and others come.

for my $case ([ 'omni_refresh_job', 'ACCESS EXCLUSIVE' ], [ 'omni_refresh_event', 'SHARE' ])
{
	my ($table, $mode) = @$case;

	$omni->reset;
	$omni->fault('hang');
	my $flight = OmniLife::session($node, 'postgres');
	$flight->send($refresh);
	$omni->wait_for_requests(1);
	# Of a session that has not called yet, ACCESS EXCLUSIVE would keep the parser.
	my ($locker, $patient, $hasty) = map { OmniLife::session($node, 'postgres') } 1 .. 3;
	is(($_->query("\\timing on\nSET omni_refresh.server = nobody; SET omni_refresh.on_failure = warning; $refresh"))[1] =~ /42704/,
		1, 'a session is prepared') for $patient, $hasty;
	$_->query('RESET omni_refresh.server; RESET omni_refresh.on_failure') for $patient, $hasty;
	$locker->query("BEGIN; LOCK TABLE $table IN $mode MODE");
	$hasty->query("SET omni_refresh.call_timeout = '1 s'");
	$_->send($refresh) for $patient, $hasty;
	my $other = OmniFault::call($node, "$refresh;", db => 'elsewhere');
	is($other->{out}, 'accepted', "$mode on $table: another database's call") or diag($other->{err});
	cmp_ok($other->{seconds}, '<', 2, '... is not kept');
	for my $case ([ $hasty, 1, 'when its time is over' ], [ $patient, 4.9, 'after five seconds' ])
	{
		my ($session, $least, $when) = @$case;
		my ($out, $err) = $session->answer;
		my ($ms) = $out =~ /^Time: ([\d.]+) ms/m;
		like($err, qr/^ERROR:  55P03: .*\nDETAIL:  .*holds a lock on the tables of omni_refresh\.  Nothing was sent/m,
			"... a call fails $when");
		cmp_ok($ms / 1000, '>=', $least, '... not before');
		cmp_ok($ms / 1000, '<', $least + 2, '... nor much later');
	}
	is(scalar(() = $omni->requests), 2, '... and nothing was sent for either');
	my $models = OmniFault::call($node, 'SELECT count(*) > 0 FROM omni_refresh_models();');
	is($models->{out}, 't', '... but models are found, of which nothing is written down') or diag($models->{err});
	cmp_ok($models->{seconds}, '<', 2, '... at once');
	$omni->fault('none');
	$locker->query('ROLLBACK');
	is(($flight->answer)[0], 'accepted', '... and what was on its way comes to its end');
	is(OmniFault::worker($node), $worker, '... all with one worker');
	is($node->safe_psql('postgres', q{SELECT count(*) FROM omni_refresh_job WHERE finished_at IS NULL}), '0',
		'... nothing is left undecided');
	is($node->safe_psql('postgres', $refresh), 'accepted', '... and calls go on');

	# A lock that goes in time
	$locker->query("BEGIN; LOCK TABLE $table IN $mode MODE");
	$patient->send($refresh);
	ok($node->poll_query_until('postgres', "SELECT wait_event_type = 'Extension' FROM pg_stat_activity WHERE pid = $patient->{pid}"),
		'... a call waits');
	$locker->query('ROLLBACK');
	like(($patient->answer)[0], qr/^accepted\n/, '... and goes on as soon as it may');
	$_->quit for $flight, $locker, $patient, $hasty;
}

# The worker ends while one call is on its way, and somebody's lock keeps the next one from settling it.

for my $on_failure ('error', 'warning')
{
	$omni->reset;
	$omni->fault('hang');
	my ($flight, $locker) = map { OmniLife::session($node, 'postgres') } 1 .. 2;
	$flight->query("SET omni_refresh.on_failure = $on_failure; SET omni_refresh.call_timeout = '3 s'");
	$flight->send($refresh);
	$omni->wait_for_requests(1);
	$locker->query('BEGIN; LOCK TABLE omni_refresh_job IN SHARE MODE');
	$node->safe_psql('postgres', "SELECT pg_terminate_backend($worker, 5000)");
	my ($out, $err) = $flight->answer;
	like($err, qr/^\U$on_failure\E:  08007: the background worker ended before job \d+ was finished/m,
		"a call whose worker has ended, while a lock keeps the next one: $on_failure");
	unlike($err, qr/[Nn]othing was sent/, '... does not say that nothing was sent');
	is($out, $on_failure eq 'warning' ? 'sending' : '', '... and has its row, if that is what was asked for');
	$omni->fault('none');
	$locker->query('ROLLBACK');
	is($node->safe_psql('postgres', $refresh), 'accepted', '... calls go on');
	is($node->safe_psql('postgres', q{
			SELECT string_agg(status, ' ' ORDER BY id) FROM (SELECT * FROM omni_refresh_job ORDER BY id DESC LIMIT 2) AS j}),
		'unknown accepted', '... the next one has settled it');
	is(scalar(() = $omni->requests), 2, '... and it was not sent again');
	$worker = OmniFault::worker($node);
	$_->quit for $flight, $locker;
}

# An answer comes, and its outcome cannot be written for a while. The disk is full for some rows only,
# by a trigger that looks into a table of its own.

$node->safe_psql('postgres', q{
	CREATE TABLE disk (is_full_for text);
	CREATE FUNCTION disk_full() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		IF EXISTS (SELECT FROM public.disk WHERE is_full_for = NEW.server AND NEW.status <> 'sending') THEN
			RAISE disk_full;
		END IF;
		RETURN NEW;
	END$$;
	CREATE TRIGGER disk_full BEFORE INSERT OR UPDATE ON omni_refresh_job
		FOR EACH ROW EXECUTE FUNCTION disk_full()});
OmniFault::server($node, 'unlucky', url => $omni->http, key => $omni->key, rate_limit => 0);
for my $timeout ('100 s', '1 s')
{
	$omni->reset;
	$node->safe_psql('postgres', q{INSERT INTO disk VALUES ('unlucky')});
	my $unlucky = OmniFault::begin($node,
		"SET omni_refresh.server = unlucky; SET omni_refresh.call_timeout = '$timeout'; $refresh;");
	$omni->wait_for_requests(1);
	OmniLife::until_true("the disk is full for an outcome, call_timeout = $timeout", sub {
		(() = slurp_file($node->logfile) =~ /could not record the outcome of job \d+, will try again: disk_full/g) >= ($timeout eq "1 s" ? 2 : 1) });
	for (1 .. 5)
	{
		my $call = OmniFault::call($node, "$refresh;");
		is($call->{out}, 'accepted', '... which another call does not mind') or diag($call->{err});
		cmp_ok($call->{seconds}, '<', 2, '... nor wait for');
	}
	is($node->safe_psql('postgres', q{SELECT status FROM omni_refresh_job WHERE server = 'unlucky' ORDER BY id DESC LIMIT 1}),
		'sending', '... the row says what is known');
	if ($timeout eq '1 s')
	{
		OmniFault::finish($unlucky);
		is($unlucky->{sqlstate}, '53100', '... its caller is told in the end');
		like($unlucky->{message}, qr/^could not record the outcome of job \d+/, '... why');
		cmp_ok($unlucky->{seconds}, '<', 3, '... in time');
	}
	$node->safe_psql('postgres', 'DELETE FROM disk');
	OmniFault::finish($unlucky);
	is($unlucky->{out}, 'accepted', '... and told the truth') if $timeout ne '1 s';
	ok($node->poll_query_until('postgres', q{
			SELECT status = 'accepted' AND job_id IS NOT NULL AND attempts = 1
			FROM omni_refresh_job WHERE server = 'unlucky' ORDER BY id DESC LIMIT 1}),
		'... and the outcome is written once there is room');
	is(scalar(() = $omni->requests), 6, '... and nothing was sent twice');
	is(scalar(() = slurp_file($node->logfile) =~ /could not record the outcome of job \d+, will try again: disk_full/g),
		$timeout eq '1 s' ? 2 : 1, '... and the log has it once');
}

# Nor can the intent be written: nothing is sent, and those who come with it do not suffer.

$node->safe_psql('postgres', q{
	CREATE OR REPLACE FUNCTION disk_full() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		IF NEW.server = 'unlucky' THEN RAISE disk_full; END IF;
		RETURN NEW;
	END$$});
$omni->reset;
my @calls = map {
	OmniFault::begin($node, 'SET omni_refresh.server = ' . ($_ % 2 ? 'omni' : 'unlucky') . "; $refresh;") } 1 .. 8;
OmniFault::finish($_) for @calls;
is(join(' ', map { $_->{out} || $_->{sqlstate} } @calls), join(' ', ('accepted 53100') x 4),
	'a request that cannot be written down is refused, others that come with it are not');
is(scalar(() = $omni->requests), 4, '... and only those are sent');
is(OmniFault::worker($node), $worker, 'all with one worker');

# A worker that was woken does not leave before it could look, whatever its idle_timeout.

$omni->reset;
$node->append_conf('postgresql.conf', "omni_refresh.idle_timeout = '100 ms'\n");
$node->reload;
$writer = OmniLife::session($node, 'postgres');
$writer->query('BEGIN; LOCK TABLE omni_refresh_event IN SHARE MODE');
my $queued = $node->safe_psql('postgres', q{SELECT id FROM omni_refresh_on_commit('} . $omni->model . q{')});
OmniLife::until_true('a worker cannot look at the queue, and says so after a while', sub {
		slurp_file($node->logfile) =~ /could not read the queue of omni_refresh, will try again: another session holds a lock/ });
is($node->safe_psql('postgres', "SELECT status FROM omni_refresh_job WHERE id = $queued"), 'pending', '... the job waits');
$writer->query('COMMIT');
$writer->quit;
ok($node->poll_query_until('postgres', "SELECT status = 'accepted' FROM omni_refresh_job WHERE id = $queued"),
	'... and goes on once the lock is gone, though nobody asks');

$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/could not record/, qr/could not read the queue/, qr/server "nobody" does not exist/,
	qr/the background worker ended before job/);
done_testing();
