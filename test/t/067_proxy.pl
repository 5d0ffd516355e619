# When a proxy is what keeps a request from Omni, the error says so, and what to do about it.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Utils;
use Test::More;

use OmniProxy;
use OmniTest;

my $test = OmniTest->new('proxy');
my ($omni, $model) = ($test->omni, $test->omni->model);
my $front = OmniProxy->front($omni);
my ($port) = $omni->https =~ /:(\d+)$/;
my (%proxies, @failed);

END { my $rc = $?; $_->stop foreach grep { defined } $front, values %proxies; $? = $rc; }

my $needs_tinyproxy = defined OmniProxy::program('tinyproxy');
if ($needs_tinyproxy)
{
	%proxies = (
		open => OmniProxy->tinyproxy($omni, map { "ConnectPort $_" } $port, $omni->url('https_unknown_ca') =~ /:(\d+)$/),
		other_port => OmniProxy->tinyproxy($omni, 'ConnectPort 443'),
		other_host => OmniProxy->tinyproxy($omni, 'Allow 192.0.2.1'),
		password => OmniProxy->tinyproxy($omni, 'BasicAuth user secret'));
}

# Calls with the options of a server; returns what it printed and said, the job and its events.
sub call
{
	my (%options) = @_;
	%options = (base_url => $omni->https, ca_file => $omni->ca, rate_limit => 0, %options);
	my $options = join ', ', map { "$_ '$options{$_}'" } sort keys %options;

	$test->sql(qq{
		DROP SERVER IF EXISTS other CASCADE;
		CREATE SERVER other FOREIGN DATA WRAPPER omni_refresh OPTIONS ($options);
		CREATE USER MAPPING FOR CURRENT_USER SERVER other OPTIONS (api_key_file '$test->{key_file}');});
	my ($stdout, $stderr) = $test->outcome(qq{
		SET omni_refresh.server = other;
		SET omni_refresh.call_timeout = '2s';
		SELECT status FROM omni_refresh('$model')});
	return ($stdout, $stderr, $test->job);
}

# A call that must fail without a request to Omni: what it does and how it is explained. "again"
# tells whether it may be tried again.
sub fails
{
	my ($name, %options) = @_;
	my ($doing, $detail, $hint, $again) = delete @options{qw(doing detail hint again)};

	$omni->reset;
	my (undef, $stderr, $job) = call(%options);
	subtest $name => sub {
		like($stderr, qr/^ERROR:  08001: (?:could not reach|timed out on) server "other" after \d+ ms of $doing$/m, 'message');
		like($stderr, qr/^DETAIL:  .*$detail/m, 'detail');
		like($stderr, qr/^HINT:  .*$hint/m, 'hint');
		is($job->{status}, 'failed', 'the job has failed: Omni cannot have heard of it');
		is($job->{attempts} > 1 ? 'yes' : 'no', $again, 'whether it is tried again') if defined $again;
		is(scalar(grep { $_->{path} =~ /refresh/ } $omni->requests), 0, 'nothing is sent to Omni');
	};
	return;
}

my $connecting = 'connecting through the proxy';
my $tls = 'setting up TLS';

SKIP:
{
	skip 'needs tinyproxy', 6 if !$needs_tinyproxy;

	is((call(proxy => $proxies{open}->url('proxy')))[0], 'accepted', 'a call goes through a proxy');
	fails('a proxy that forbids the port',
		proxy => $proxies{other_port}->url('proxy'), doing => $connecting, detail => '403',
		hint => 'The proxy does not let this host connect to host and port', again => 'no');
	fails('a proxy that forbids the client',
		proxy => $proxies{other_host}->url('proxy'), doing => $connecting, detail => '403',
		hint => 'The proxy does not let this host connect to host and port', again => 'no');
	fails('a proxy that wants a password',
		proxy => $proxies{password}->url('proxy'), doing => $connecting, detail => '407',
		hint => 'Proxies that want authentication are not supported', again => 'no');
	fails('the wrong certificate behind a proxy',
		proxy => $proxies{open}->url('proxy'), base_url => $omni->url('https_unknown_ca'),
		doing => $tls, detail => '.', hint => 'Check that "base_url" names the host its certificate is for', again => 'no');
	my (undef, $stderr) = call(proxy => $proxies{open}->url('proxy'), ca_file => $omni->ca . '.missing');
	like($stderr, qr/^ERROR:  08001: could not load the certificate authorities of server "other" from file ".*\.missing"$/m,
		'a missing ca_file is not the fault of the proxy');
}

foreach my $status (500, 502, 503)
{
	fails("a proxy that answers $status",
		proxy => $front->url("proxy_$status"), doing => $connecting, detail => $status,
		hint => 'The proxy could not connect to the host in "base_url"');
}
cmp_ok($front->tell('count')->{proxy_503}, '>', 1, 'such a proxy is asked again');
fails('a proxy that closes the connection',
	proxy => $front->url('proxy_close'), doing => $connecting, detail => '.', hint => 'Check the option "proxy"');
fails('a proxy that is not there',
	proxy => $omni->url('refused') =~ s/https/http/r, doing => $connecting, detail => '.', hint => 'Check the option "proxy"');
fails('a proxy whose name does not resolve',
	proxy => 'http://proxy.invalid:3128', doing => "looking up the proxy's name", detail => '.',
	hint => 'Check the host in the option "proxy"');
fails('a proxy with a certificate of an authority that nobody knows',
	proxy => $front->url('fin_tls13'), doing => 'setting up TLS with the proxy', detail => '.',
	hint => 'Check the option "proxy"', again => 'no');

# TLS that is too old, or none
fails('a server with TLS 1.1 only',
	base_url => $front->url('tls11'), doing => $tls, detail => '.', hint => 'TLS 1\.2 or newer is needed', again => 'no');
fails('a server that says so',
	base_url => $front->url('alert'), doing => $tls, detail => '.', hint => 'TLS 1\.2 or newer is needed', again => 'no');
fails('a server without TLS',
	base_url => $front->url('no_tls'), doing => $tls, detail => '.', hint => 'does not speak TLS');

# A certificate that is wanted of us, and one that is too old
foreach my $way (qw(certificate_tls12 certificate_tls13))
{
	fails("a server that asks for a certificate: $way",
		base_url => $front->url($way), doing => $tls, detail => '.', hint => 'The server asks for a client certificate', again => 'no');
}
fails('a proxy that asks for a certificate',
	proxy => $front->url('certificate_tls12'), ca_file => $omni->ca, doing => 'setting up TLS with the proxy', detail => '.', hint => '.', again => 'no');
fails('a certificate that has expired',
	base_url => $omni->url('https_expired'), doing => $tls, detail => 'expired', hint => 'The certificate has expired', again => 'no');

# An answer that is not Omni's
my (undef, $stderr) = call(base_url => $front->url('nginx_400'));
like($stderr, qr/^HINT:  .*asks for a client certificate/m, 'nginx, which wants a certificate, answers 400');
foreach my $headers (qw(long_header long_headers))
{
	(undef, $stderr, my $job) = call(base_url => $front->url($headers));
	like($stderr, qr/^ERROR:  08P01: unexpected response from server "other"$/m, "an answer with 1 MB of headers: $headers");
	like($stderr, qr/^DETAIL:  The headers of the answer are too long\.$/m, '... is refused for that');
	is($job->{attempts}, 1, '... at once');
}
(undef, $stderr) = call(base_url => $front->url('html_400'));
like($stderr, qr/^ERROR:  22023: .*HTTP status 400$/m, 'an HTTP status 400 with a page is an error');
like($stderr, qr/^HINT:  The answer is not JSON, so it comes from a proxy or load balancer in between/m,
	'... which is not about the branch');

$test->done;
