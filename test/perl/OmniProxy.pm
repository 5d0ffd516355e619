# Real servers between the worker and the stand-in for Omni: nginx and haproxy in front of it, and
# tinyproxy for CONNECT. Each runs as the test's own user on free ports of 127.0.0.1.
#
#	my $front = OmniProxy->nginx($omni, keepalive => '300ms');
#	... a server with base_url $front->url('tls13') ...
#	$front->wait_until_closed('tls13');
#	END { my $rc = $?; $front->stop if $front; $? = $rc; }
#
# The processes run in the test's temporary directory, by which test/run finds and ends whatever a
# killed test leaves behind.

package OmniProxy;

use strict;
use warnings FATAL => 'all';

use File::Basename qw(dirname);
use IO::Socket::INET;
use POSIX ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;

# The ways in which nginx and haproxy serve, each on a port of its own
my %ways = (
	plain => {},
	tls12 => { tls => '1.2' },
	tls13 => { tls => '1.3' },
	h2_tls12 => { tls => '1.2', http2 => 1 },
	h2_tls13 => { tls => '1.3', http2 => 1 });

sub ways { return sort keys %ways }

# The path of a program, or undef where it is not installed. The directories of system programs are
# not in every user's PATH.
sub program
{
	my ($name) = @_;

	return (grep { -x } map { "$_/$name" } split(/:/, $ENV{PATH}), '/usr/local/sbin', '/usr/sbin')[0];
}

# Starts nginx in front of a stand-in. It closes idle connections after "keepalive".
sub nginx
{
	my ($class, $omni, %options) = @_;
	my $self = $class->prepare($omni);
	my $upstream = $omni->http;
	my $servers = '';

	foreach my $name (ways())
	{
		my $way = $ways{$name};
		my $listen = "127.0.0.1:$self->{ports}{$name}"
			. ($way->{tls} ? ' ssl' : '') . ($way->{http2} ? ' http2' : '');
		my $tls = $way->{tls}
			? "ssl_certificate both.pem; ssl_certificate_key both.pem; ssl_protocols TLSv$way->{tls};" : '';
		$servers .= "\tserver { listen $listen; $tls location / { proxy_pass $upstream; } }\n";
	}
	$self->write('nginx.conf', <<EOF);
daemon off;
master_process off;
pid nginx.pid;
events {
}
http {
	log_format connections '\$server_port \$connection';
	access_log access.log connections;
	client_body_temp_path body;
	proxy_temp_path proxy;
	fastcgi_temp_path fastcgi;
	uwsgi_temp_path uwsgi;
	scgi_temp_path scgi;
	keepalive_timeout $options{keepalive};
$servers}
EOF
	return $self->run(program('nginx'), '-p', "$self->{directory}/", '-c', "$self->{directory}/nginx.conf",
		'-e', "$self->{directory}/error.log");
}

# Starts haproxy, likewise.
sub haproxy
{
	my ($class, $omni, %options) = @_;
	my $self = $class->prepare($omni);
	my ($upstream) = $omni->http =~ m{^http://(.*)};
	my $binds = '';

	foreach my $name (ways())
	{
		my $way = $ways{$name};
		my $version = $way->{tls} ? "TLSv$way->{tls}" : '';
		my $tls = $way->{tls}
			? "ssl crt both.pem ssl-min-ver $version ssl-max-ver $version alpn " . ($way->{http2} ? 'h2' : 'http/1.1') : '';
		$binds .= "\tbind 127.0.0.1:$self->{ports}{$name} $tls\n";
	}
	$self->write('haproxy.cfg', <<EOF);
defaults
	mode http
	timeout connect 10s
	timeout client 60s
	timeout server 60s
	timeout http-request 60s
	timeout http-keep-alive $options{keepalive}
frontend front
$binds	default_backend omni
backend omni
	server omni $upstream
EOF
	return $self->run(program('haproxy'), '-db', '-f', 'haproxy.cfg');
}

# What both need: ports, a directory, and the stand-in's certificate with its key in one file
sub prepare
{
	my ($class, $omni) = @_;
	my $self = bless { owner => $$, directory => PostgreSQL::Test::Utils::tempdir() }, $class;
	my $from = dirname($omni->ca);

	$self->{ports}{$_} = PostgreSQL::Test::Cluster::get_free_port() foreach ways();
	$self->write('both.pem', slurp_file("$from/good.pem") . slurp_file("$from/server.key"));
	return $self;
}

sub write
{
	my ($self, $name, $text) = @_;

	append_to_file("$self->{directory}/$name", $text);
	return;
}

# Starts the program and waits until it serves.
sub run
{
	my ($self, @command) = @_;
	my $end = time + $PostgreSQL::Test::Utils::timeout_default;

	defined($self->{pid} = fork) or die "fork: $!\n";
	if ($self->{pid} == 0)
	{
		chdir $self->{directory} or die "$self->{directory}: $!\n";
		open STDIN, '<', '/dev/null';
		open STDOUT, '>', 'output';
		open STDERR, '>&', \*STDOUT;
		exec { $command[0] } @command or POSIX::_exit(1);
	}
	foreach my $port (values %{ $self->{ports} })
	{
		while (!IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $port))
		{
			die "$command[0] does not serve: " . $self->log('output')
				if time > $end || waitpid($self->{pid}, POSIX::WNOHANG()) != 0;
			select(undef, undef, undef, 0.05);
		}
	}
	return $self;
}

sub url
{
	my ($self, $name) = @_;
	return ($ways{$name} && $ways{$name}{tls} ? 'https' : 'http') . "://127.0.0.1:$self->{ports}{$name}";
}

sub log
{
	my ($self, $name) = @_;
	return slurp_file("$self->{directory}/$name");
}

# How many connections nginx has had requests on, on one of its ports
sub connections
{
	my ($self, $name) = @_;
	my %seen = map { $_ => 1 } $self->log('access.log') =~ /^$self->{ports}{$name} (\d+)$/mg;
	return scalar keys %seen;
}

# Waits until the server has closed the connections to one of its ports.
sub wait_until_closed
{
	my ($self, $name) = @_;
	return wait_for_connections($self->{ports}{$name}, sub { !$_[0] });
}

# Waits until a condition holds for each connection to a port of 127.0.0.1, as the kernel sees its
# client's end: whether it is established, and how many bytes nobody has read yet.
sub wait_for_connections
{
	my ($port, $condition) = @_;
	my $end = time + $PostgreSQL::Test::Utils::timeout_default;
	my $peer = sprintf '0100007F:%04X', $port;
	my $waiting = 1;

	while ($waiting)
	{
		$waiting = 0;
		foreach my $line (split /\n/, slurp_file('/proc/net/tcp'))
		{
			my (undef, undef, $remote, $state, $queues) = split ' ', $line;
			$waiting++ if $remote eq $peer && !$condition->($state eq '01', hex((split /:/, $queues)[1] // 0));
		}
		die "the connections to port $port stay as they are\n" if time > $end;
		select(undef, undef, undef, 0.02) if $waiting;
	}
	return;
}

# Harmless when repeated, in an END block, and in a forked child.
sub stop
{
	my ($self) = @_;
	my $pid = delete $self->{pid};
	return if !defined $pid || $self->{owner} != $$;

	local ($!, $?);				# the exit status of the test is not waitpid's to change
	kill 'TERM', $pid;
	waitpid($pid, 0);
	return;
}

sub DESTROY
{
	my ($self) = @_;
	$self->stop;
	return;
}

1;
