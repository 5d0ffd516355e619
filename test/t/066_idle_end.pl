# Whichever way an idle connection has ended, or if the server has sent something on it that nobody
# asked for, the next request is sent on a new one. A connection that ends when the request is on its
# way is another matter: then the request may have arrived.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Utils;
use Test::More;

use OmniProxy;
use OmniTest;

my $test = OmniTest->new('idle_end');
my ($omni, $model) = ($test->omni, $test->omni->model);
my $front = OmniProxy->front($omni);
my $calls = 3;

END { my $rc = $?; $front->stop if $front; $? = $rc; }

# Calls by way of one of the ports; returns what became of it.
sub call
{
	my ($name) = @_;

	return $test->sql(qq{
		SET omni_refresh.server = $name;
		SET omni_refresh.on_failure = warning;
		SELECT concat_ws(', ', status, attempts, error) FROM omni_refresh('$model')});
}

sub server
{
	my ($name) = @_;

	my $url = $front->url($name);
	$test->sql(qq{
		CREATE SERVER $name FOREIGN DATA WRAPPER omni_refresh OPTIONS (
			base_url '$url', rate_limit '0'} . ($url =~ /^https/ ? ", ca_file '" . $omni->ca . "'" : '') . qq{);
		CREATE USER MAPPING FOR CURRENT_USER SERVER $name OPTIONS (api_key_file '$test->{key_file}');});
	return;
}

my @endings = grep { /^(?:close_notify|fin|rst|answer_408)_/ } sort keys %{ $front->{ports} };
my %outcomes;

server($_) foreach @endings;
foreach my $call (1 .. $calls)
{
	push @{ $outcomes{$_} }, call($_) foreach @endings;
	$front->tell('leave');
	$front->wait_until_closed($_, 1) foreach @endings;
}
my $counts = $front->tell('count');
foreach my $name (@endings)
{
	is(join('; ', @{ $outcomes{$name} }), join('; ', ('accepted, 1') x $calls), "each call after $name takes one attempt");
	is($counts->{$name}, $calls, '... and one request');
}
is($counts->{late}, undef, 'no request is sent after the end');

foreach my $name (qw(race_plain race_tls12 race_tls13))
{
	server($name);
	is(call($name), 'accepted, 1', "$name: the first call is answered");
	is(call($name), 'accepted, 2', '... the second meets the end of the connection, and is sent again');
	is($test->sql(q{
			SELECT detail LIKE '08006: could not reach server % ms of waiting for the answer%' FROM omni_refresh_event
			WHERE job = (SELECT max(id) FROM omni_refresh_job) AND event = 'attempt_failed'}),
		't', '... as an attempt that may have arrived');
	is($front->tell('count')->{$name}, 3, '... so that the server has seen it twice');
}

$test->done;
