# The server stops in any mode and a new version of the extension is installed, whatever the worker
# is doing.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;
use OmniNode;

my $omni = OmniAPI->start;
my ($installation, undef, $share) = OmniLife::installation();
my $refresh = q{SELECT status FROM omni_refresh('} . $omni->model . q{')};
my $node = OmniNode->new('stop', defined $installation ? (install_path => $installation) : ());

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

$node->init(extra => [ '--encoding=UTF8', '--no-locale' ]);
$node->append_conf('postgresql.conf', <<END);
log_min_messages = debug1
lc_messages = 'C'
omni_refresh.track = off
omni_refresh.idle_timeout = '10 min'
END
$node->start;
$node->safe_psql('postgres', 'CREATE EXTENSION omni_refresh; CREATE TABLE flush (x int)');
OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0, timeout => '500 s');

# Brings the worker into a state; returns what is to be cleaned up.
sub bring
{
	my ($state) = @_;
	my $held;

	$omni->reset;
	$node->safe_psql('postgres', $refresh);
	if ($state eq 'hanging' || $state eq 'abandoned')
	{
		$omni->fault('hang');
		$held = OmniLife::session($node, 'postgres');
		$held->send("SET omni_refresh.call_timeout = '500 s'; $refresh");
		$omni->wait_for_requests(2);
		$node->safe_psql('postgres', "SELECT pg_terminate_backend($held->{pid}, 10000)") if $state eq 'abandoned';
	}
	elsif ($state eq 'busy')
	{
		$held = OmniLife::bench($node, 'postgres', "$refresh;", '-c', 4, '-T', 20);
		$omni->wait_for_requests(20);
	}
	# Outcomes are flushed by whoever comes next.
	$node->safe_psql('postgres', 'INSERT INTO flush VALUES (1)');
	return $held;
}

for my $mode ('smart', 'fast', 'immediate')
{
	for my $state ('idle', 'abandoned', 'hanging', 'busy')
	{
		# Smart means to wait for those who are connected.
		next if $mode eq 'smart' && ($state eq 'hanging' || $state eq 'busy');
		my $held = bring($state);
		my $forks = OmniLife::forks($node);
		my $seconds = OmniLife::timed(sub { $node->stop($mode) });
		cmp_ok($seconds, '<', 2, "$mode shutdown, the worker $state, is quick");
		is(OmniLife::forks($node), $forks, '... and starts no worker') if $state ne 'busy';
		isnt(OmniLife::benched($held), 0, '... which the callers learn') if $state eq 'busy';
		like(($held->answer)[1], qr/57P01|server closed|57P02/, '... which the caller learns') if $state eq 'hanging';
		$held->quit if $state eq 'hanging' || $state eq 'abandoned';
		$omni->reset;
		$node->start;
		is($node->safe_psql('postgres', $refresh), 'accepted', '... and then calls go on');
		is(scalar(() = $omni->requests), 1, '... and nothing else is sent');
		is($node->safe_psql('postgres', q{
				SELECT count(*) FROM omni_refresh_job j WHERE finished_at IS NULL OR status <>
					(SELECT event FROM omni_refresh_event WHERE job = j.id ORDER BY id DESC LIMIT 1)}),
			'0', '... and every job has an end, which its last event tells');
		is($node->safe_psql('postgres', 'SELECT status FROM omni_refresh_job ORDER BY id DESC OFFSET 1 LIMIT 1'),
			$state eq 'idle' ? 'accepted' : 'unknown', '... and the right one') if $state ne 'busy';
	}
}

SKIP:
{
	skip 'the installation of PostgreSQL cannot be copied', 1 if !defined $installation;

	append_to_file("$share/extension/omni_refresh--1.0--1.1.sql", "CREATE FUNCTION newer() RETURNS int LANGUAGE sql AS 'SELECT 1';\n");
	append_to_file("$share/extension/omni_refresh--1.1--1.0.sql", "DROP FUNCTION newer();\n");
	for my $state ('idle', 'abandoned', 'hanging', 'busy')
	{
		my $held = bring($state);
		my ($out, $err);
		for my $version ('1.1', '1.0')
		{
			my $seconds = OmniLife::timed(sub {
					$node->psql('postgres', "ALTER EXTENSION omni_refresh UPDATE TO '$version'", stderr => \$err) });
			is($err, '', "the extension is updated to $version, the worker $state");
			cmp_ok($seconds, '<', 2, '... in time');
		}
		is($node->safe_psql('postgres', $refresh), 'accepted', '... and calls go on');
		if ($state eq 'hanging')
		{
			$node->safe_psql('postgres', "SELECT pg_cancel_backend($held->{pid})");
			like(($held->answer)[1], qr/ERROR:  57014/, '... or end as they would');
		}
		$omni->fault('none');
		$held->quit if $state eq 'hanging' || $state eq 'abandoned';
		if ($state eq 'busy')
		{
			$node->safe_psql('postgres', q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pgbench'});
			OmniLife::benched($held);
			unlike($held->{err}, qr/ERROR/, '... none fails');
		}
	}
	is($node->safe_psql('postgres', "$refresh; ALTER EXTENSION omni_refresh UPDATE TO '1.1'"), 'accepted', 'after an update');
	ok($node->poll_query_until('postgres', q{
			SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'}),
		'... the worker makes way for the one of the new version');
	is($node->safe_psql('postgres', $refresh), 'accepted', '... and then calls go on');
}

$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/terminating (connection|walreceiver)/, qr/the database system is/,
	qr/connection to client lost/);
done_testing();
