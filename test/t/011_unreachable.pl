# When Omni cannot be reached, the error says how far the attempt came and how long that took; when
# there is no worker to try it, why.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;

my $omni = OmniAPI->start;
my $node = OmniFault::node('main');
my $bare = OmniFault::node('bare', conf => "max_worker_processes = 0\n");
my $refresh = q{SELECT * FROM omni_refresh('} . $omni->model . q{');};
my @common = (ca_file => $omni->ca, key => $omni->key, rate_limit => 0);

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

# This takes 5 s, so let it go on meanwhile.
OmniFault::server($bare, 'omni', url => $omni->https, @common);
my $no_worker = OmniFault::begin($bare, $refresh);
my $no_worker_warning = OmniFault::begin($bare, <<EOF);
SET omni_refresh.on_failure = warning;
SELECT id IS NULL, status, attempts, error LIKE '53400: %max_worker_processes%'
FROM omni_refresh('${\ $omni->model}');
EOF

# Calls a server of the stand-in's that has the given fault by itself, or the given fault.
my $count = 0;

sub fails
{
	my ($name, $server, $state, $phase, $hint, $story, %options) = @_;
	my $fault = delete $options{fault};
	my $timeout = delete $options{call_timeout} // '300 ms';
	my $server_name = 'server' . ++$count;

	OmniFault::server($node, $server_name, url => $omni->url($server), @common, %options);
	$omni->fault(ref $fault ? @$fault : $fault, times => -1) if defined $fault;
	my $call = OmniFault::call($node,
		"SET omni_refresh.server = '$server_name'; SET omni_refresh.call_timeout = '$timeout'; $refresh");
	my ($ms) = $call->{message} =~ / after (\d+) ms of /;

	subtest $name => sub {
		is($call->{sqlstate}, $state, 'SQLSTATE') or diag($call->{err});
		like($call->{message}, $phase, 'message');
		ok(defined $ms && $ms <= $call->{seconds} * 1000, 'it took no longer than the call');
		like($call->{detail}, qr/\S/, 'detail');
		like($call->{hint}, $hint, 'hint');
		like(OmniFault::story($node), $story, 'job and events');
		is($node->safe_psql('postgres', q{
				SELECT split_part(error, ':', 1), finished_at IS NOT NULL, attempts >= 1,
					(SELECT bool_and(duration BETWEEN interval '0' AND j.finished_at - j.requested_at)
					 FROM omni_refresh_event WHERE job = j.id AND event = 'attempt_failed')
				FROM omni_refresh_job j ORDER BY id DESC LIMIT 1}),
			"$state|t|t|t", 'row and event have the error and the time');
	};
	$omni->reset;
	return ($call, $ms);
}

my $once = qr/^failed: sending attempt_failed failed$/;
my $unknown = qr/^unknown: sending attempt_failed unknown$/;
my $again = qr/^failed:( sending attempt_failed)+ failed$/;
my $tls = qr/^could not reach server "server\d+" after \d+ ms of setting up TLS$/;

fails('a refused connection', 'refused', '08001',
	qr/^could not reach server "server\d+" after \d+ ms of connecting$/, qr/firewalls/, $again);
my ($call, $ms) = fails('a connection that hangs', 'connect_hangs', '08001',
	qr/^timed out on server "server\d+" after \d+ ms of connecting$/, qr/firewalls/, $once);
cmp_ok($ms, '>=', 200, '... is given its time');
(undef, $ms) = fails('a connection that hangs, with a short connect_timeout', 'connect_hangs', '08001',
	qr/^timed out on server .* connecting$/, qr/firewalls/, $again,
	connect_timeout => '30 ms');
cmp_ok($ms, '<', 250, '... ends sooner, so that it can be tried again');

for my $bad (qw(https_wrong_host https_expired https_unknown_ca))
{
	($call) = fails("the certificate $bad", $bad, '08001', $tls, qr/"ca_file"/, $once,
		call_timeout => '20 s');
	cmp_ok($call->{seconds}, '<', 10, '... is not tried again');
}
fails('TLS that hangs', 'tls_hangs', '08001',
	qr/^timed out on server .* ms of setting up TLS$/, qr/"ca_file"/, $once);
is(scalar($omni->requests), 0, 'no request went out so far');

# From here on Omni may have got the request: that is not a failure, but unknown
(undef, $ms) = fails('no answer', 'https', '08006',
	qr/^timed out on server .* ms of waiting for the answer$/, qr/look there before/, $unknown,
	fault => 'hang');
cmp_ok($ms, '>=', 200, '... is waited for');
fails('no answer, with a short timeout', 'https', '08006',
	qr/^timed out on server .* ms of waiting for the answer$/, qr/look there before/,
	qr/^unknown:( sending attempt_failed)+ unknown$/,
	fault => 'hang', timeout => '50 ms');
for my $fault (qw(reset close))
{
	fails("a connection lost by $fault", 'https', '08006',
		qr/^could not reach server .* ms of waiting for the answer$/, qr/look there before/,
		qr/^unknown:( sending attempt_failed)+ unknown$/, fault => $fault);
}
fails('an answer cut off within its headers', 'https', '08006',
	qr/^could not reach server .* ms of reading the answer$/, qr/Omni has got the request/,
	qr/^unknown:( sending attempt_failed)+ unknown$/, fault => 'close_in_headers');
for my $fault ([ 'hang_middle' ], [ 'drip', delay => 0.005 ])
{
	fails("an answer that never ends: $fault->[0]", 'https', '08006',
		qr/^timed out on server .* ms of reading the answer$/, qr/Omni has got the request/,
		$unknown, fault => $fault);
}

# A lost answer followed by one that proves nothing: still unknown
OmniFault::server($node, 'lost', url => $omni->https, @common, key => 'lost', timeout => '200 ms');
$omni->fault('hang');
$omni->fault('answer', status => 503, headers => { 'Retry-After' => 3000 });
$call = OmniFault::call($node, "SET omni_refresh.server = 'lost'; $refresh");
is($call->{sqlstate}, '08006', 'a lost answer, then a refusal to be retried');
is(OmniFault::story($node),
	'unknown: sending attempt_failed sending attempt_failed unknown',
	'... leaves open what became of the first');
$omni->reset;

# A connection that is no longer one: the worker has it open when the other side closes
my $before = OmniFault::worker($node);
OmniFault::server($node, 'omni', url => $omni->https, @common);
is(OmniFault::call($node, $refresh)->{status}, 0, 'the same worker still makes calls');
$omni->fault('delay', delay => 0.1);
is(OmniFault::call($node, $refresh)->{status}, 0, 'and waits for an answer that takes its time');
is(OmniFault::worker($node), $before, '... with the process it had');

# No worker

OmniFault::finish($no_worker);
is($no_worker->{sqlstate}, '53400', 'without a free process, a call fails');
like($no_worker->{detail}, qr/max_worker_processes \(0\)/, '... and says that they are in use');
like($no_worker->{hint}, qr/Increase the setting "max_worker_processes"/, '... and what to do');
cmp_ok($no_worker->{seconds}, '<', 10, '... soon');
OmniFault::finish($no_worker_warning);
is("$no_worker_warning->{status} $no_worker_warning->{out}", '0 t|failed|0|t',
	'... or warns and returns a row, though none could be written');
is($bare->safe_psql('postgres', 'SELECT count(*) FROM omni_refresh_job'), '0', '... indeed');

$bare->stop;
$bare->append_conf('postgresql.conf', "max_worker_processes = 16\n");
$bare->set_standby_mode;
$bare->start;
my $standby = OmniFault::call($bare, $refresh);
is($standby->{sqlstate}, '25006', 'a standby makes no calls');
like($standby->{hint}, qr/primary/, '... and says where to');
$standby = OmniFault::call($bare, <<EOF);
SET omni_refresh.on_failure = warning;
SELECT id IS NULL, status, left(error, 6) FROM omni_refresh('${\ $omni->model}');
EOF
is("$standby->{sqlstate} $standby->{out}", '25006 t|failed|25006:', '... or warns');
is(OmniFault::worker($bare), '', 'and no worker is started there');

# Not committed yet

for my $case (
	[ 'a server', q{CREATE SERVER fresh FOREIGN DATA WRAPPER omni_refresh
		OPTIONS (base_url 'https://127.0.0.1:1'); CREATE USER MAPPING FOR PUBLIC SERVER fresh
		OPTIONS (api_key 'k'); SET LOCAL omni_refresh.server = fresh} ],
	[ 'an option', q{ALTER SERVER omni OPTIONS (SET rate_limit '7')} ],
	[ 'a key', q{ALTER USER MAPPING FOR PUBLIC SERVER omni OPTIONS (SET api_key 'k')} ],
	[ 'a mapping', q{CREATE USER MAPPING FOR CURRENT_USER SERVER omni OPTIONS (api_key 'k')} ],
	[ 'a privilege', q{REVOKE USAGE ON FOREIGN SERVER omni FROM PUBLIC; CREATE ROLE fresh;
		GRANT USAGE ON FOREIGN SERVER omni TO fresh; SET LOCAL ROLE fresh} ])
{
	$call = OmniFault::call($node, "BEGIN; $case->[1]; SET client_min_messages = error; $refresh");
	is($call->{sqlstate}, '55000', "$case->[0] that is not committed cannot be used");
	like($call->{hint}, qr/commit first/i, '... and the hint says: commit first');
}
$node->safe_psql('postgres', 'CREATE DATABASE fresh');
$call = OmniFault::call($node, <<EOF, db => 'fresh');
BEGIN;
CREATE EXTENSION omni_refresh;
CREATE SERVER omni FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url 'https://127.0.0.1:1');
CREATE USER MAPPING FOR PUBLIC SERVER omni OPTIONS (api_key 'k');
SET client_min_messages = error;
$refresh
EOF
is($call->{sqlstate}, '55000', 'nor can the extension itself');
like($call->{hint}, qr/commit first/i, '... with the same hint');

unlike(slurp_file($_->logfile), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed')
	for $node, $bare;

done_testing();
