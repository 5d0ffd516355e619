# Servers between the worker and the stand-in for Omni: the real nginx and haproxy in front of it, the
# real tinyproxy for CONNECT, and test/front.py for what these do not do. Each runs as the test's own
# user on free ports of 127.0.0.1.
#
#	my $front = OmniProxy->nginx($omni, keepalive => '300ms');
#	... a server with base_url $front->url('tls13') ...
#	$front->wait_until_closed('tls13');
#	END { my $rc = $?; $front->stop if $front; $? = $rc; }
#
# The processes run in the test's temporary directory, by which test/tools/run finds and ends whatever a
# killed test leaves behind.

package OmniProxy;

use strict;
use warnings FATAL => 'all';

use File::Basename qw(dirname);
use File::Spec;
use IO::Socket::INET;
use IPC::Open2 qw(open2);
use JSON::PP;
use POSIX ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;

my $script = File::Spec->rel2abs(dirname(__FILE__) . '/../front.py');

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

# Starts nginx in front of a stand-in. It closes idle connections after "keepalive", and each one after
# so many "requests".
sub nginx
{
	my ($class, $omni, %options) = @_;
	my $self = $class->prepare($omni, ways());
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
	keepalive_requests ${\ ($options{requests} // 1000)};
$servers}
EOF
	return $self->run(program('nginx'), '-p', "$self->{directory}/", '-c', "$self->{directory}/nginx.conf",
		'-e', "$self->{directory}/error.log");
}

# Starts haproxy, likewise.
sub haproxy
{
	my ($class, $omni, %options) = @_;
	my $self = $class->prepare($omni, ways());
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

# Starts tinyproxy, with further lines of configuration.
sub tinyproxy
{
	my ($class, $omni, @configuration) = @_;
	my $self = $class->prepare($omni, 'proxy');

	$self->write('tinyproxy.conf', join '', map { "$_\n" } "Port $self->{ports}{proxy}", 'Listen 127.0.0.1',
		'LogFile "proxy.log"', 'LogLevel Connect', @configuration);
	return $self->run(program('tinyproxy'), '-d', '-c', 'tinyproxy.conf');
}

# Starts front.py.
sub front
{
	my ($class, $omni) = @_;
	my $self = $class->prepare($omni);
	my $python = $ENV{OMNI_PYTHON} // (-x '/usr/bin/python3' ? '/usr/bin/python3' : 'python3');

	$self->{pid} = open2($self->{out}, $self->{in}, $python, qw(-W ignore), $script, "$self->{directory}/both.pem");
	$self->{ports} = $self->hear;
	return $self;
}

# Gives front.py a command, and returns its counts.
sub tell
{
	my ($self, $command) = @_;

	print { $self->{in} } "$command\n";
	return $self->hear;
}

sub hear
{
	my ($self) = @_;
	my $line = do { local $/ = "\n"; readline $self->{out} };

	return decode_json($line // die "front.py has ended\n");
}

# What all need: ports, a directory, and the stand-in's certificate with its key in one file
sub prepare
{
	my ($class, $omni, @ports) = @_;
	my $self = bless { owner => $$, directory => PostgreSQL::Test::Utils::tempdir() }, $class;
	my $from = dirname($omni->ca);

	$self->{ports}{$_} = PostgreSQL::Test::Cluster::get_free_port() foreach @ports;
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
	return ($name =~ /tls|alert/ ? 'https' : 'http') . "://127.0.0.1:$self->{ports}{$name}";
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

# Waits until the server has closed all connections to one of its ports, or, if that will do, has
# sent something that nobody has read yet: as the kernel sees the client's end.
sub wait_until_closed
{
	my ($self, $name, $or_unread) = @_;
	my $end = time + $PostgreSQL::Test::Utils::timeout_default;
	my $port = $self->{ports}{$name};
	my $peer = sprintf '0100007F:%04X', $port;
	my $waiting = 1;

	while ($waiting)
	{
		$waiting = 0;
		foreach my $line (split /\n/, slurp_file('/proc/net/tcp'))
		{
			my (undef, undef, $remote, $state, $queues) = split ' ', $line;
			my $established = $state eq '01';
			my $unread = $queues =~ /:.*[^0]/;
			$waiting++ if $remote eq $peer && $established && !($or_unread && $unread);
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
	close $self->{in} if $self->{in};
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
