# The way to Omni may hang before anything is sent: in the look-up of a name, in a handshake.

use strict;
use warnings FATAL => 'all';

use File::Basename qw(dirname);
use File::Spec;
use IO::Select;
use IO::Socket::INET;
use POSIX ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;

my $omni = OmniAPI->start;
my $relay;

END
{
	my $rc = $?;
	kill 'KILL', $relay if $relay;
	$omni->stop if $omni;
	$? = $rc;
}

my $source = File::Spec->rel2abs(dirname(__FILE__) . '/../shim/name_lookup.c');
my $library = File::Spec->rel2abs(PostgreSQL::Test::Utils::tempdir) . '/name_lookup.so';
my $compiler = $ENV{CC} // 'cc';
my $compiled = system("$compiler -shared -fPIC -o '$library' '$source' -ldl >/dev/null 2>&1") == 0;
my $node;
{
	local $ENV{LD_PRELOAD} = $library if $compiled;
	$node = OmniFault::node('main');
}
my $refresh = q{SELECT * FROM omni_refresh('} . $omni->model . q{');};
my @common = (ca_file => $omni->ca, key => $omni->key, rate_limit => 0);

OmniFault::server($node, 'omni', url => $omni->https, @common);
is(OmniFault::call($node, $refresh)->{status}, 0, 'a first call starts the worker');
my $worker = OmniFault::worker($node);
my $segments = OmniFault::segments($node);

# A handshake that hangs until its caller has left

my $listener = IO::Socket::INET->new(LocalAddr => '127.0.0.1', Listen => 5) or die;

OmniFault::server($node, 'relay', url => 'https://127.0.0.1:' . $listener->sockport, @common);
my $requests = () = $omni->requests;
my $call = OmniFault::begin($node, "SET omni_refresh.server = relay; $refresh", app => 'leaver');
my $client = $listener->accept;
$client->sysread(my $hello, 5) or die;
is(OmniFault::story($node), 'sending: sending', 'a request that waits for TLS');
my $pid = OmniFault::wait_until_waiting($node, 'leaver');
$node->safe_psql('postgres', "SELECT pg_cancel_backend($pid)");
is(OmniFault::finish($call)->{sqlstate}, '57014', '... does not keep its caller');

# Carries on between client and server, in a process of its own.
sub relay
{
	my ($hello, $client, $server) = @_;
	my $select = IO::Select->new($client, $server);

	$server->syswrite($hello);
	while (my @ready = $select->can_read)
	{
		for my $socket (@ready)
		{
			$socket->sysread(my $data, 65536) or return;
			($socket == $client ? $server : $client)->syswrite($data);
		}
	}
	return;
}
my ($port) = $omni->https =~ /(\d+)$/;
$relay = fork // die;
if ($relay == 0)
{
	eval { relay($hello, $client, IO::Socket::INET->new("127.0.0.1:$port")) };
	POSIX::_exit(0);
}
close $client;
ok($node->poll_query_until('postgres', q{
		SELECT finished_at IS NOT NULL FROM omni_refresh_job ORDER BY id DESC LIMIT 1}),
	'its job comes to an end');
is(scalar(() = $omni->requests), $requests, 'what was not sent when its caller left is not sent later');
like(OmniFault::story($node), qr/^canceled: /, '... but canceled');
OmniFault::poll_segments($node, $segments, '... and gone from shared memory');
kill 'KILL', $relay;
waitpid $relay, 0;
undef $relay;

SKIP:
{
	skip "$compiler does not compile $source", 1 if !$compiled;

	# Names that are not found

	for my $host ('nowhere', 'later')
	{
		OmniFault::server($node, $host, url => "https://$host.example", @common);
		$call = OmniFault::call($node,
			"SET omni_refresh.server = $host; SET omni_refresh.call_timeout = '300 ms'; $refresh");
		is($call->{sqlstate}, '08001', "a name that is not found: $host");
		like($call->{message}, qr/ after \d+ ms of looking up the host's name$/, '... says so');
		like($call->{detail}, qr/$host\.example/, '... names it');
		like($call->{hint}, qr/"base_url".*name service/, '... with a hint');
		like(OmniFault::story($node), qr/^failed:( sending attempt_failed)+ failed$/,
			'... as is recorded');
	}

	# A name that hangs

	OmniFault::server($node, 'hang', url => 'https://hang.example', @common, connect_timeout => '300 s');
	my $hang = "SET omni_refresh.server = hang; SET omni_refresh.call_timeout =";
	$call = OmniFault::call($node, "$hang '300 ms'; $refresh");
	is($call->{sqlstate}, '08001', 'a look-up that hangs');
	like($call->{message}, qr/^timed out on .* of looking up the host's name$/, '... says so');
	cmp_ok($call->{seconds}, '<', 5, '... in time');
	is(OmniFault::story($node), 'failed: sending attempt_failed failed',
		'... and nothing was sent');

	my @hanging = map { OmniFault::begin($node, "$hang '300 s'; $refresh", app => "hanging$_") } 1 .. 3;
	my @pids = map { OmniFault::wait_until_waiting($node, "hanging$_") } 1 .. 3;
	ok($node->poll_query_until('postgres',
			q{SELECT count(*) = 3 FROM omni_refresh_job WHERE status = 'sending'}),
		'three look-ups hang');
	for (1 .. 3)
	{
		$call = OmniFault::call($node, $refresh);
		is($call->{status}, 0, 'a call beside them');
		cmp_ok($call->{seconds}, '<', 5, '... is not kept');
	}
	is(OmniFault::worker($node), $worker, '... by the same worker');
	$node->safe_psql('postgres', "SELECT pg_cancel_backend($pids[0])");
	is(OmniFault::finish($hanging[0])->{sqlstate}, '57014', 'a caller can leave');
	cmp_ok($hanging[0]{seconds}, '<', 5, '... at once');

	is($node->safe_psql('postgres', "SELECT pg_terminate_backend($worker, 5000)"), 't',
		'the worker can be terminated while a look-up hangs');
	is(OmniFault::finish($_)->{sqlstate}, '08007', '... which its callers learn')
		for @hanging[1, 2];
	isnt(OmniFault::worker($node), $worker, '... from a new one');
	is($node->safe_psql('postgres',
			q{SELECT count(*) FROM omni_refresh_job WHERE status IN ('pending', 'sending')}),
		'0', '... and nothing is left undecided');
	is(OmniFault::call($node, $refresh)->{status}, 0, '... and calls go on');
	OmniFault::poll_segments($node, $segments, 'nothing is left in shared memory');

	my $last = OmniFault::begin($node, "$hang '300 s'; $refresh", app => 'last');
	OmniFault::wait_until_waiting($node, 'last');
	my $began = time;
	$node->stop('fast');
	cmp_ok(time - $began, '<', 5, 'nor does the server take long to stop');
	OmniFault::finish($last);
}
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');

done_testing();
