# Whom the worker trusts: certificates, connections that are open already, proxies.

use strict;
use warnings FATAL => 'all';

use File::Copy qw(copy);
use OmniTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $test = OmniTest->new('tls');
my ($node, $omni) = ($test->node, $test->omni);
my ($model, $ca) = ($omni->model, $omni->ca);
my $hint = 'HINT:  Check that "base_url" names the host its certificate is for; '
	. 'a private certificate authority is named in the option "ca_file".';
my $empty = $node->basedir . '/empty.pem';
my $junk = $node->basedir . '/junk.pem';
append_to_file($empty, '');
append_to_file($junk, "-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n");

# A call of a server like omni, with other options.
sub call_with
{
	my (%options) = @_;
	my $options = join(', ', map { "$_ '$options{$_}'" } sort keys %options);
	$test->sql(qq{
		DROP SERVER IF EXISTS other CASCADE;
		CREATE SERVER other FOREIGN DATA WRAPPER omni_refresh OPTIONS (rate_limit '0', $options);
		CREATE USER MAPPING FOR CURRENT_USER SERVER other OPTIONS (api_key_file '$test->{key_file}')});
	return $test->outcome("SET omni_refresh.server = other; SELECT status FROM omni_refresh('$model')");
}

is($test->call->{status}, 'accepted', 'a certificate that is in order will do');
foreach my $case (
	[ 'for another host', base_url => $omni->url('https_wrong_host'), ca_file => $ca ],
	[ 'that has expired', base_url => $omni->url('https_expired'), ca_file => $ca ],
	[ 'of an authority that nobody knows', base_url => $omni->url('https_unknown_ca'), ca_file => $ca ],
	[ 'of an authority that the system does not know', base_url => $omni->https ])
{
	my ($what, %options) = @$case;
	$omni->reset;
	my ($stdout, $stderr) = call_with(%options);
	my $job = $test->job;
	is($stdout, '', "a certificate $what will not do");
	like($stderr, qr/^ERROR:  08001: could not reach server "other" after \d+ ms of setting up TLS$/m, "... and why: $what");
	like($stderr, qr/^DETAIL:  .*(?:certificate|CA|trust anchors).*\n\Q$hint\E$/mi, "... in detail: $what") if $what !~ /expired/;
	like($stderr, qr/^HINT:  The certificate has expired or is not valid yet/m, "... with a hint: $what") if $what =~ /expired/;
	is(scalar($omni->requests), 0, "... and nothing is sent: $what");
	is($job->{status}, 'failed', "... and the job has failed: $what");
	is($job->{attempts}, 1, "... at once: $what");
	is($test->events($job->{id}), "sending attempt 1\nattempt_failed attempt 1, took time\nfailed",
		"... as the events say: $what");
}

# A file of authorities that cannot be used is named as such.
my $user = getpwuid($>);
my $denied = qr/belongs to user "\Q$user\E" and group "[^"]+"; the server runs as user "\Q$user\E"\./;
my $closed = $node->basedir . '/closed.pem';
my $closed_folder = $node->basedir . '/closed';
copy($ca, $closed);
chmod 0, $closed;
mkdir $closed_folder;
copy($ca, "$closed_folder/ca.pem");
chmod 0, $closed_folder;
foreach my $case (
	[ 'that is missing', "$ca.missing", qr/The file cannot be read: No such file or directory\.$/ ],
	[ 'that is a folder', $node->basedir, qr/The file cannot be read: Is a directory\.$/ ],
	[ 'that may not be read', $closed, qr/The file cannot be read: Permission denied\. File "\Q$closed\E" has mode 0000 and $denied$/ ],
	[ 'in a folder that may not be searched', "$closed_folder/ca.pem",
		qr/The file cannot be read: Permission denied\. Directory "\Q$closed_folder\E" has mode 0000 and $denied$/ ],
	[ 'that is empty', $empty, qr/The file holds no certificate in PEM format\.$/ ],
	[ 'that is a key', $test->{key_file}, qr/The file holds no certificate in PEM format\.$/ ],
	[ 'with a certificate of junk', $junk, qr/\S/ ])
{
	my ($what, $file, $detail) = @$case;
	next if $> == 0 && $what =~ /may not/;	# root may
	$omni->reset;
	my ($stdout, $stderr) = call_with(base_url => $omni->https, ca_file => $file);
	my $job = $test->job;
	like($stderr, qr/^ERROR:  08001: could not load the certificate authorities of server "other" from file "\Q$file\E"$/m, "a ca_file $what is named");
	my ($said) = $stderr =~ /^DETAIL:  (.*)/m;
	like($said, $detail, '... and what is wrong with it');
	like($stderr, qr/^HINT:  The option "ca_file" must name a file of certificates in PEM format /m, '... and what it must be');
	is(scalar($omni->requests), 0, '... and nothing is sent');
	is("$job->{status} $job->{attempts}", 'failed 1', '... and the job has failed at once');
	is($test->events($job->{id}), "sending attempt 1\nattempt_failed attempt 1, took time\nfailed", '... as the events say');
}
chmod 0700, $closed_folder;
$omni->reset;
is($test->call->{status}, 'accepted', 'the server with the right file is served all the while');
is((call_with(base_url => $omni->https =~ s/127\.0\.0\.1/localhost/r, ca_file => $ca))[0], 'accepted',
	'a certificate may be for a name');

# The proxy learns the host, not the key. The stand-in plays one, which refuses.
$omni->reset;
my ($stdout, $stderr) = do {
	$test->sql(qq{ALTER DATABASE postgres SET omni_refresh.call_timeout = '200ms'});
	call_with(base_url => $omni->https, ca_file => $ca, proxy => $omni->http);
};
$test->sql('ALTER DATABASE postgres RESET omni_refresh.call_timeout');
my @requests = $omni->requests;
like($stderr, qr/^ERROR:  0800[16]: could not reach server "other"/m, 'a proxy that refuses is an error');
cmp_ok(scalar(@requests), '>=', 1, 'the proxy is asked');
is((grep { $_->{method} ne 'CONNECT' } @requests), 0, 'the proxy is asked for a connection only');
is((grep { defined $_->{headers}{authorization} } @requests), 0, 'the proxy does not learn the key');
is($test->job->{status}, 'failed', 'the job has failed: Omni cannot have heard of it');
is($test->call->{status}, 'accepted', 'other servers do without the proxy');

$test->done;
