# nginx and haproxy close connections that are idle for too long. The next request is then sent on a
# new one, as its first and only attempt.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Utils;
use Test::More;

use OmniProxy;
use OmniTest;

plan skip_all => 'needs nginx and haproxy' if grep { !defined OmniProxy::program($_) } qw(nginx haproxy);

my $calls = 4;					# of each server
my $test = OmniTest->new('idle');
my ($omni, $model) = ($test->omni, $test->omni->model);
my %fronts = (
	nginx => OmniProxy->nginx($omni, keepalive => '300ms'),
	haproxy => OmniProxy->haproxy($omni, keepalive => '300ms'),
	patient => OmniProxy->nginx($omni, keepalive => '10m'));
my @servers;

END { my $rc = $?; $_->stop foreach values %fronts; $? = $rc; }

foreach my $front (sort keys %fronts)
{
	foreach my $way (OmniProxy->ways)
	{
		my ($server, $url) = ("${front}_$way", $fronts{$front}->url($way));
		$test->sql(qq{
			CREATE SERVER $server FOREIGN DATA WRAPPER omni_refresh OPTIONS (
				base_url '$url', rate_limit '0'} . ($url =~ /^https/ ? ", ca_file '" . $omni->ca . "'" : '') . qq{);
			CREATE USER MAPPING FOR CURRENT_USER SERVER $server OPTIONS (api_key_file '$test->{key_file}');});
		push @servers, [ $server, $fronts{$front}, $way ];
	}
}

# One call of each server after the other; a failed one leaves its row.
my $statements = join '', map {
	"SET omni_refresh.server = $_->[0]; SELECT FROM omni_refresh('$model');\n"
} @servers;

foreach my $call (1 .. $calls)
{
	$test->sql("SET omni_refresh.on_failure = warning; SET client_min_messages = error; $statements");
	foreach my $server (@servers)
	{
		my ($name, $front, $way) = @$server;
		# with HTTP/2, a newer haproxy asks the client to close and waits for that
		$front->wait_until_closed($way, $way =~ /^h2/) if $name !~ /^patient/;
	}
}

foreach my $server (@servers)
{
	my ($name, $front, $way) = @$server;
	is( $test->sql(qq{
			SELECT string_agg(count || ' ' || status || ' after ' || attempts, ', ' ORDER BY count DESC)
			FROM (SELECT count(*), status, attempts FROM omni_refresh_job WHERE server = '$name'
				  GROUP BY status, attempts) AS outcome}),
		"$calls accepted after 1", "each call of $name takes one attempt");
	is($front->connections($way), $name =~ /^patient/ ? 1 : $calls,
		$name =~ /^patient/ ? '... and one connection serves all' : '... on a connection of its own')
		if $name !~ /^haproxy/;
}
is(scalar($omni->requests(qr/refresh/)), $calls * @servers, 'no request is sent twice');

$test->done;
