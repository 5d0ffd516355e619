# Every way in which Omni, or the way to it, can fail is an error that says what, where and why.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;

my $omni = OmniAPI->start;
my $node = OmniFault::node('main');
my $refresh = q{SELECT * FROM omni_refresh('} . $omni->model . q{');};
my @common = (ca_file => $omni->ca, key => $omni->key, rate_limit => 0);

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->https, @common);

# Calls once, without a retry, and compares the error and the job with what is expected:
# SQLSTATE, message, detail and hint (regular expressions), and the job's story.
sub fails
{
	my ($name, $state, $message, $detail, $hint, $story, %options) = @_;
	my $server = $options{server} // 'omni';
	my $timeout = $options{call_timeout} // '20 s';
	my $model = $options{model} // $omni->model;
	my $call = OmniFault::call($node, <<EOF);
SET omni_refresh.server = '$server';
SET omni_refresh.call_timeout = '$timeout';
SELECT * FROM omni_refresh('$model');
EOF
	subtest $name => sub {
		is($call->{sqlstate}, $state, 'SQLSTATE') or diag($call->{err});
		like($call->{message}, $message, 'message');
		like($call->{detail}, $detail, 'detail');
		like($call->{hint}, $hint, 'hint');
		is(OmniFault::story($node), $story, 'job and events');
		is($node->safe_psql('postgres', q{
				SELECT split_part(j.error, ':', 1), j.finished_at IS NOT NULL, j.job_id IS NULL,
					j.error LIKE '%HINT:  %'
				FROM omni_refresh_job j ORDER BY id DESC LIMIT 1}),
			"$state|t|t|t", 'the row has the error');
	};
	return $call;
}

# What Omni refuses

my %words = (
	1 => qr/^Omni says: No such model$/,
	2 => qr/^Omni says: No such model$/,
	3 => qr/^Omni says: Not Found: No such model$/);
for my $shape (1, 2, 3)
{
	$omni->set(error_shape => $shape);
	fails("a model that does not exist, in Omni's spelling no. $shape", '42704',
		qr/^server "omni" refused the refresh: HTTP status 404$/, $words{$shape},
		qr/model's uuid.*base_url/, 'failed: sending refused failed', model => '00000000-0000-0000-0000-000000000000');
}
$omni->set(error_shape => 1);

$omni->set(branch_based_refresh => 1);
fails('a branch is required', '22023', qr/HTTP status 400$/,
	qr/^Omni says: branch_id: required, /, qr/branch is required when/,
	'failed: sending refused failed');
$omni->set(branch_based_refresh => 0, key => 'another');
fails('a revoked key', '28000', qr/HTTP status 401$/,
	qr/^Omni says: Missing, invalid or revoked API key$/, qr/user mapping.*revoked/,
	'failed: sending refused failed');
$omni->set(key => $omni->key, forbidden => 1);
fails('a key without permission', '42501', qr/HTTP status 403$/,
	qr/^Omni says: This API key lacks/, qr/Connection Admins/,
	'failed: sending refused failed');
$omni->set(forbidden => 0);

for my $status (402, 410, 418, 422)
{
	$omni->fault('answer', status => $status, body => '{"detail": "Not today"}');
	my $call = fails("HTTP status $status", '38000', qr/HTTP status $status$/,
		qr/^Omni says: Not today$/, qr/\S/, 'failed: sending refused failed');
}

# An answer that arrived is told even if there is nothing to read in it, and nothing makes the
# worker leave. Retries, which have a test of their own, are cut off by a Retry-After.
my @later = (headers => { 'Retry-After' => 3000 });
my $malformed = 'failed: sending attempt_failed failed';
my $arrived = 'unknown: sending attempt_failed unknown';
$omni->fault('answer', status => 429, body => '', @later);
OmniFault::server($node, 'limited', url => $omni->http, @common, key => 'limited');
fails('HTTP status 429', '53000', qr/HTTP status 429$/, qr/^$/, qr/60 a minute/,
	'failed: sending rate_limited failed', server => 'limited');
$omni->fault('answer', status => 503, body => '{"detail": "Maintenance"}', @later);
OmniFault::server($node, 'down', url => $omni->http, @common, key => 'down');
fails('HTTP status 503', '08006', qr/HTTP status 503$/, qr/^Omni says: Maintenance$/,
	qr/maintenance or overloaded/, $malformed, server => 'down');
$omni->fault('answer', status => 500, body => '[]', @later);
fails('HTTP status 500', '08006', qr/HTTP status 500$/, qr/^The answer reads: \[\]$/,
	qr/Omni's side/, $malformed);

$omni->fault('html_502', times => -1);
my $call = OmniFault::call($node, "SET omni_refresh.call_timeout = '1 s'; $refresh");
is($call->{sqlstate}, '08006', 'HTML from a proxy in between is a failure of the connection');
like($call->{detail}, qr/^The answer reads: <html>.*502 Bad Gateway/, '... and is quoted');
$omni->reset;

$omni->set(refresh_status => 'failed');
my $failed = OmniFault::call($node, $refresh);
is($failed->{sqlstate}, '38000', 'a refresh that failed at once is an error');
like($failed->{detail}, qr/status "failed"/, '... that says so');
like($failed->{hint}, qr/\S/, '... with a hint');
is(OmniFault::story($node), 'failed: sending failed', '... and so does the job');
is($node->safe_psql('postgres',
		'SELECT job_id IS NOT NULL FROM omni_refresh_job ORDER BY id DESC LIMIT 1'),
	't', "... which has Omni's id");
$omni->reset;

# What is not an answer of Omni's

my %odd = (
	empty => qr/not JSON: it is empty/,
	wrong_shape => qr/does not have the expected form/,
	truncated => qr/not JSON: /,
	nested => qr/not JSON: it is nested more than/,
	not_utf8 => qr/not JSON: it is not valid UTF-8/,
	nul => qr/not JSON: it has a NUL byte/,
	nul_escape => qr/not JSON: it reads .*\.\.\.\./,
	huge => qr/longer than 1 MB/,
	redirect => qr{redirects to .*elsewhere\.example});
for my $fault (sort keys %odd)
{
	$omni->fault($fault);
	my $json = $fault !~ /wrong_shape|redirect/;	# that cannot be read
	fails("the answer $fault", '08P01', qr/^unexpected response from server "omni"$/,
		$odd{$fault}, $json ? qr/Omni has got the request/ : qr/base_url/, $json ? $arrived : $malformed);
}
my %strange = (
	'"running"' => 'a string',
	'{"status": 7}' => 'a status that is a number',
	'{"status": "sleeping", "jobId": "x"}' => 'a status that is unknown, of a job that is no uuid',
	'{"status": "", "jobId": 1}' => 'no status, of a job that is a number',
	'{}' => 'nothing');
for my $body (sort keys %strange)
{
	$omni->fault('answer', status => 200, body => $body);
	fails("$strange{$body} instead of an answer", '08P01', qr/unexpected response/, qr/expected form/,
		qr/base_url/, $malformed);
}
$omni->fault('answer', status => 204, body => '', headers => { 'Content-Length' => undef });
fails('success without content', '08P01', qr/unexpected response/, qr/HTTP status 204/, qr/\S/, $arrived);

# Nor is what goes on after 1 MB read to its end
$omni->fault('huge', size => 1 << 34);
$call = OmniFault::call($node, $refresh);
cmp_ok($call->{seconds}, '<', 5, 'an answer without end is not read to its end');
$omni->reset;

is(scalar(grep { $_->{path} =~ /login/ } $omni->requests), 0, 'no redirect was followed');
is($node->safe_psql('postgres', qq{$refresh; SELECT count(*) FROM omni_refresh_job
		WHERE status IN ('pending', 'sending')}) =~ s/.*\n//sr, '0', 'nothing is left behind');
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');

done_testing();
