# Outcomes that cannot be recorded at once, and listeners that cannot be notified: what was to be told
# is told later, calls go on meanwhile, and the log says once what is in the way.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
my $node = OmniFault::node('recording', conf => "omni_refresh.max_in_flight = 30\nmax_wal_senders = 2\n");

END
{
	my $rc = $?;
	kill 'CONT', $omni->{pid} if $omni;
	$omni->stop if $omni;
	$? = $rc;
}

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
$node->safe_psql('postgres', 'CREATE DATABASE neighbour TEMPLATE postgres');
my $model = $omni->model;
my $refresh = "SELECT status FROM omni_refresh('$model')";
is(OmniFault::call($node, $refresh)->{out}, 'accepted', 'there is a worker');

# How many lines of the log match
sub lines
{
	my ($offset, $pattern) = @_;

	return scalar(() = slurp_file($node->logfile, $offset) =~ /$pattern/g);
}

# Queues refreshes of different models, and returns once all were sent to a stand-in that stands still.
sub queue_and_send
{
	my ($count) = @_;

	kill 'STOP', $omni->{pid};
	my $ids = $node->safe_psql('postgres', qq{
		SELECT string_agg(id::text, ',') FROM (SELECT (omni_refresh_on_commit(gen_random_uuid())).id FROM generate_series(1, $count) OFFSET 0) AS job});
	$node->poll_query_until('postgres', "SELECT count(*) = $count FROM omni_refresh_job WHERE id IN ($ids) AND status = 'sending'") or die;
	return $ids;
}

# What an answer says outlives the transaction that could not record it.
my $locker = OmniLife::session($node, 'postgres');
for my $try (1 .. 3)
{
	my $offset = -s $node->logfile;

	$omni->reset;
	$omni->fault('answer', status => 200, body => '{"status": "running", "jobId": "this is no uuid"}');
	my $id = queue_and_send(1);
	$locker->query("BEGIN; SELECT FROM omni_refresh_job WHERE id = $id FOR UPDATE");
	kill 'CONT', $omni->{pid};
	$node->wait_for_log(qr/could not record the outcome of job $id, will try again: another session holds a lock on its row/, $offset);

	# what comes in between uses memory
	is(OmniFault::call($node, $refresh)->{out}, 'accepted', 'a call goes on while the row of another job is locked') for 1 .. 3;
	$locker->query('ROLLBACK');
	$node->poll_query_until('postgres', "SELECT status = 'accepted' FROM omni_refresh_job WHERE id = $id") or die;
	is($node->safe_psql('postgres', "SELECT detail FROM omni_refresh_event WHERE job = $id ORDER BY id DESC LIMIT 1"),
		q{Omni's jobId is no uuid, so that the job cannot be followed; it reads this is no uuid.},
		'what Omni has answered is recorded once the row is free');
}

# Tables that are locked when many answers come: one line
my $offset = -s $node->logfile;
$omni->reset;
$omni->fault('answer', times => -1, status => 200, body => '{"status": "completed"}');
my $ids = queue_and_send(20);
$locker->query('BEGIN; LOCK TABLE omni_refresh_job IN SHARE MODE');
kill 'CONT', $omni->{pid};
$node->wait_for_log(qr/could not record the outcome of job \d+, will try again: another session holds a lock on the tables/, $offset);
$omni->wait_for_requests(20);
my $call = OmniFault::call($node, $refresh);	# fails after five seconds of attempts to record
is($call->{sqlstate}, '55P03', 'a call cannot begin while the tables are locked');
$locker->query('COMMIT');
$node->poll_query_until('postgres', "SELECT count(*) = 20 FROM omni_refresh_job WHERE id IN ($ids) AND status = 'completed'") or die;
is(lines($offset, qr/could not record the outcome/), 1, 'the log has one line about outcomes that cannot be recorded');

# A transaction with NOTIFY that waits for a standby which is not there
$omni->reset;
my $listener = OmniLife::session($node, 'postgres');
$listener->query('LISTEN omni_refresh');
is(OmniFault::call($node, $refresh, db => 'neighbour')->{out}, 'accepted', 'the other database has a worker');
$offset = -s $node->logfile;
$node->append_conf('postgresql.conf', q{synchronous_standby_names = 'nobody'});
$node->reload;
$node->poll_query_until('postgres', q{SELECT current_setting('synchronous_standby_names') = 'nobody'}) or die;
my $notifier = OmniLife::session($node, 'postgres');
$notifier->send('BEGIN; CREATE TABLE a (); NOTIFY x; COMMIT');
$node->poll_query_until('postgres', "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'") or die;

my $first = $node->safe_psql('postgres', 'SELECT max(id) + 1 FROM omni_refresh_job');
my $seconds = 0;
for my $n (1 .. 8)
{
	my $call = OmniFault::call($node, $refresh, db => $n % 4 == 0 ? 'neighbour' : 'postgres');

	is("$call->{out}$call->{err}", 'accepted', 'a call goes on while nobody can be notified');
	$seconds += $call->{seconds};
}
cmp_ok($seconds, '<', 15, '... and does not wait for that');
$node->wait_for_log(qr/could not notify listeners of omni_refresh, will try again: /, $offset);
is(OmniFault::call($node, $refresh)->{out}, 'accepted', '... nor after the log has told so');
cmp_ok(lines($offset, qr/could not notify listeners/), '<=', 2, '... in one line of each database');

$node->append_conf('postgresql.conf', q{synchronous_standby_names = ''});
$node->reload;
$notifier->answer;
my $last = $node->safe_psql('postgres', 'SELECT max(id) FROM omni_refresh_job');
my %told;
my $until = time + 60;
while (time < $until && keys %told < $last - $first + 1)
{
	my ($out) = $listener->query('SELECT 1');

	$told{$_}++ for $out =~ /"id": (\d+), "status": "accepted"/g;
}
is(join(' ', sort { $a <=> $b } keys %told), join(' ', $first .. $last), 'listeners are notified afterwards of each job');
is(join(' ', grep { $_ != 1 } values %told), '', '... once');
unlike(slurp_file($node->logfile, $offset), qr/notices dropped/, '... and of none in vain');

$_->quit for $locker, $listener, $notifier;
$node->stop;
done_testing();
