# The stand-in for Omni's REST API (test/omni_api.py), started and commanded from a Perl test:
#
#	my $omni = OmniAPI->start;
#	$omni->fault('answer', status => 503, times => 2);
#	...
#	is(scalar($omni->requests(qr/refresh/)), 3, 'a refresh outlives two refusals');
#
# It needs nothing but Perl's core modules; OMNI_PYTHON may name another Python. The process ends
# with the object, with the test, or with whatever kills the test, since any of these closes the
# pipe that is its standard input.

package OmniAPI;

use strict;
use warnings FATAL => 'all';

use Carp qw(croak);
use File::Basename qw(dirname);
use File::Path qw(rmtree);
use File::Spec;
use HTTP::Tiny;
use IO::Socket::INET;
use IPC::Open2 qw(open2);
use JSON::PP;

my $script = File::Spec->rel2abs(dirname(__FILE__) . '/../omni_api.py');

# Starts a server and waits until it serves. If a file is named, to which each request is added,
# it can be killed, and revived in the same place.
sub start
{
	my ($class, $record) = @_;
	my $self = bless { owner => $$, record => $record }, $class;	# a forked child must not stop its parent's server

	# Bound, but not listening: nobody else gets the port while the server is dead.
	$self->{place} = IO::Socket::INET->new(LocalAddr => '127.0.0.1', Proto => 'tcp', ReuseAddr => 1)
		// die "no port: $@\n" if defined $record;
	return $self->revive;
}

sub revive
{
	my ($self) = @_;
	my $python = $ENV{OMNI_PYTHON} // (-x '/usr/bin/python3' ? '/usr/bin/python3' : 'python3');
	local @ENV{qw(OMNI_API_PORT OMNI_API_RECORD)} = ($self->{place}->sockport, $self->{record}) if $self->{place};
	local @ENV{qw(OMNI_API_KEY OMNI_API_MODEL)} = ($self->key, $self->model) if $self->{ready};
	my $pid = open2(my $out, my $in, $python, $script);
	my $line = do { local $/ = "\n"; <$out> };
	if (!defined $line)
	{
		waitpid($pid, 0);
		die "omni_api.py ended before it was ready\n";
	}
	$self->{pid} = $pid;
	$self->{in} = $in;
	$self->{ready} = decode_json($line);
	# Not by way of a proxy that the environment may name.
	$self->{client} = HTTP::Tiny->new(http_proxy => undef, proxy => undef);
	return $self;
}

# What the server told when it was ready: addresses, path of the CA, key, model and branch.
sub url
{
	my ($self, $name) = @_;
	return $self->{ready}{$name} // croak "omni_api.py has no \"$name\"";
}

sub http   { return $_[0]->url('http') }
sub https  { return $_[0]->url('https') }
sub ca     { return $_[0]->url('ca') }
sub key    { return $_[0]->url('key') }
sub model  { return $_[0]->url('model') }
sub branch { return $_[0]->url('branch') }

# Changes settings; omni_api.py lists them. 1 and 0 stand for true and false.
sub set
{
	my ($self, %settings) = @_;
	$self->control(POST => 'set', \%settings);
	return;
}

# Orders a fault, for one refresh unless the extras "times" and "path" tell otherwise.
sub fault
{
	my ($self, $name, %extras) = @_;
	$self->control(POST => 'fault', { %extras, fault => $name });
	return;
}

# Returns the requests recorded since the last reset, oldest first, as hash references; with a
# regular expression, those whose path it matches.
sub requests
{
	my ($self, $path) = @_;
	my $requests = $self->control(GET => 'requests');
	return grep { !defined $path || $_->{path} =~ $path } @$requests;
}

# Returns the requests as above once there are $n of them.
sub wait_for_requests
{
	my ($self, $n, $path) = @_;
	my $deadline = time + 60;

	while (1)
	{
		my @requests = $self->requests($path);
		return @requests if @requests >= $n;
		if (time > $deadline)
		{
			my $which = defined $path ? "requests whose path matches $path" : 'requests';
			croak "waited 60 s for $n $which, but got " . scalar(@requests);
		}
		select(undef, undef, undef, 0.05);
	}
}

# Returns { requests => ..., connections => ..., in_flight => ... }.
sub stats
{
	my ($self) = @_;
	return $self->control(GET => 'stats');
}

# Returns the model that the setting "catalog" makes it keep: { "schema.table" => { column => type } }.
sub known
{
	my ($self) = @_;
	return $self->control(GET => 'known');
}

# Returns to the state after the start; ends the requests that a fault holds up.
sub reset
{
	my ($self) = @_;
	$self->control(POST => 'reset');
	return;
}

sub control
{
	my ($self, $method, $action, $arguments) = @_;
	my $response = $self->{client}->request($method, $self->http . "/control/$action",
		{ content => defined $arguments ? encode_json($arguments) : '' });

	croak "omni_api.py: $response->{content}" if !$response->{success};
	return decode_json($response->{content});
}

# Stops the server. Harmless when repeated, in an END block, and in a forked child.
sub stop
{
	my ($self, $signal) = @_;
	my $pid = delete $self->{pid};
	return if !defined $pid || $self->{owner} != $$;

	local ($!, $?);				# the exit status of the test is not waitpid's to change
	CORE::kill($signal // 'TERM', $pid);
	waitpid($pid, 0);
	return;
}

# Ends it without a word, wherever it is.
sub kill
{
	my ($self) = @_;
	$self->stop('KILL');
	rmtree(dirname($self->ca));
	return;
}

# Lets it do nothing for a while: what is sent to it meanwhile, it reads afterwards.
sub freeze
{
	my ($self, $seconds) = @_;
	CORE::kill('STOP', $self->{pid});
	select(undef, undef, undef, $seconds);
	CORE::kill('CONT', $self->{pid});
	return;
}

sub DESTROY
{
	my ($self) = @_;
	$self->stop;
	return;
}

1;
