# For make check-valgrind: all that can go wrong on the way to Omni, once, with no regard to time.
# What it is for is what valgrind says meanwhile; whether errors read well is for test/t to tell.

use strict;
use warnings FATAL => 'all';

use File::Basename qw(dirname);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
my $node = OmniFault::node('main');
my $refresh = q{SELECT concat_ws(' ', status, left(error, 5)) FROM omni_refresh('} . $omni->model . q{')};

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

# Servers for all the addresses that the stand-in has
my @bad = qw(refused connect_hangs tls_hangs https_wrong_host https_expired https_unknown_ca);
OmniFault::server($node, $_, url => $omni->url($_), ca_file => $omni->ca, key => $omni->key,
	rate_limit => 0, connect_timeout => '5 s', timeout => '10 s') for 'http', 'https', @bad;
OmniFault::server($node, 'nowhere', url => 'https://nowhere.invalid', key => $omni->key);

my $session = OmniLife::session($node, 'postgres');
$session->query('SET omni_refresh.on_failure = warning');

# Each fault, once. What is tried again is accepted then; most of the others are odd answers.
my ($faults) = slurp_file(dirname(__FILE__) . '/../omni_api.py') =~ /^FAULTS = \{\n(.*?)^\}/ms;
my %end = (
	echo_key => 'failed 28000',
	map { $_ => 'accepted' } qw(answer html_502 hang hang_middle reset close delay drip));
for my $server ('http', 'https')
{
	$session->query("SET omni_refresh.server = $server");
	for my $fault ($faults =~ /^    "(\w+)":/mg)
	{
		$omni->fault($fault);
		is(($session->query($refresh))[0], $end{$fault} // 'failed 08P01', "$fault, by $server");
	}
}

# Each way not to get there
$session->query("SET omni_refresh.call_timeout = '6 s'");
for my $server (@bad, 'nowhere')
{
	$session->query("SET omni_refresh.server = $server");
	is(($session->query($refresh))[0], 'failed 08001', $server);
}
$session->query('RESET omni_refresh.call_timeout; SET omni_refresh.server = https');

# Nobody waits any longer, neither the caller
$omni->reset;
$omni->fault('hang');
$session->send($refresh);
$omni->wait_for_requests(1);
$node->safe_psql('postgres', "SELECT pg_cancel_backend($session->{pid})");
like(($session->answer)[1], qr/ERROR:  57014/, 'a call that is canceled');
$omni->fault('none');
OmniFault::poll_story($node, 'unknown: requested sending attempt_failed unknown', '... ends');

# ... nor the worker
$omni->reset;
$omni->fault('hang');
$session->send($refresh);
$omni->wait_for_requests(1);
$node->safe_psql('postgres', 'SELECT pg_terminate_backend(' . OmniFault::worker($node) . ', 60000)');
is(($session->answer)[0], 'unknown 08007', 'a worker that is terminated');
is(($session->query($refresh))[0], 'accepted', '... has a successor');

# ... nor the server
$omni->fault('hang');
$session->send($refresh);
$omni->wait_for_requests(3);
$node->stop('fast');
like(($session->answer)[1], qr/57P01|server closed/, 'a server that is stopped');
$session->quit;

done_testing();
