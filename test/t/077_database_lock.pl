# Everybody may try to drop a database, and so take, or wait for, the lock by which its owner
# keeps new sessions out of it: that does not end the worker, nor what it has in flight.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
my $node = OmniFault::node('database_lock');
my $queue = "SELECT id FROM omni_refresh_on_commit('" . $omni->model . q{')};

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
$node->safe_psql('postgres', 'CREATE ROLE mallory LOGIN');
# While somebody waits for that lock, PostgreSQL lets no new session in.
my $session = OmniLife::session($node, 'postgres');
$session->query("SELECT omni_refresh('" . $omni->model . q{')});

# Queues a job that Omni takes 4 s to answer, while the attackers are at work.
sub goes_on
{
	my ($name, @attackers) = @_;
	my ($worker, $id);

	OmniLife::until_true("$name: they have begun", sub { ($session->query(
		q{SELECT count(*) FROM pg_stat_activity WHERE usename = 'mallory'}))[0] >= @attackers });
	$omni->reset;
	$omni->fault('delay', delay => 4, times => -1);
	($id) = ($session->query($queue))[0] =~ /^(\d+)$/m;
	OmniLife::until_true("$name: the request is sent", sub { scalar $omni->requests });
	OmniLife::until_true("$name: and answered", sub { ($session->query(
		"SELECT status FROM omni_refresh_job WHERE id = $id"))[0] =~ /accepted/ }, 15);
	is(($session->query("SELECT count(*) FROM omni_refresh_event WHERE job = $id AND event = 'recovered'"))[0], 0,
		"$name: the worker has stayed");
	is(scalar(my @requests = $omni->requests), 1, "$name: the request was sent once");
	$_->{psql}->signal('TERM') for @attackers;
	eval { $_->{psql}->finish } for @attackers;
	return;
}

my $holder = OmniFault::begin($node, q{BEGIN; ALTER ROLE mallory IN DATABASE postgres SET work_mem = '1MB'; SELECT pg_sleep(600);},
	user => 'mallory', db => 'template1');
$node->poll_query_until('template1', q{SELECT count(*) > 0 FROM pg_locks
	WHERE classid = 'pg_database'::regclass AND mode = 'AccessShareLock'}) or die;
my $waiter = OmniFault::begin($node, 'DROP DATABASE postgres;', user => 'mallory', db => 'template1');
goes_on('somebody waits to drop a database of others', $holder, $waiter);

my $many = "\\set ON_ERROR_STOP 0\n" . "DROP DATABASE postgres;\n" x 30000;
goes_on('two try again and again', map { OmniFault::begin($node, $many, user => 'mallory', db => 'template1') } 1, 2);

$session->quit;
done_testing();
