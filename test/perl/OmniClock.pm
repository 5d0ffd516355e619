# A server whose clocks a test can set while it runs, by way of test/shim/clock.c. The test itself, psql
# and the stand-in for Omni keep the true time.
#
#	my $clock = OmniClock->new('back', conf => "omni_refresh.track = on\n");
#	$clock->step(-7200);		# somebody sets the clock: the monotonic clock goes on as ever
#	$clock->pass(60);			# a minute passes at once: both clocks are set

package OmniClock;

use strict;
use warnings FATAL => 'all';

use File::Basename qw(dirname);
use File::Spec;
use PostgreSQL::Test::Utils;

use OmniFault;

my $library;

# Compiles the library. Returns false if the compiler cannot.
sub build
{
	return 1 if defined $library;
	my $source = File::Spec->rel2abs(dirname(__FILE__) . '/../shim/clock.c');
	my $compiler = $ENV{CC} // 'cc';

	my $file = File::Spec->rel2abs(PostgreSQL::Test::Utils::tempdir) . '/clock.so';
	return 0 if system("$compiler -shared -fPIC -o '$file' '$source' -ldl >/dev/null 2>&1") != 0;
	$library = $file;
	return 1;
}

# Starts a server that has the true time. The options are those of OmniFault::node().
sub new
{
	my ($class, $name, %options) = @_;
	my $self = bless { real => 0, monotonic => 0 }, $class;

	$self->{file} = File::Spec->rel2abs(PostgreSQL::Test::Utils::tempdir) . "/$name.clock";
	$self->write;
	my %environment = (OMNI_CLOCK => $self->{file}, LD_PRELOAD => join ' ', $library, $ENV{LD_PRELOAD} // ());
	local @ENV{ keys %environment } = values %environment;
	$self->{node} = OmniFault::node($name, %options);
	$self->{node}{environment} = \%environment;
	return $self;
}

sub node { return $_[0]{node} }

# How many seconds the real-time clock is ahead
sub ahead { return $_[0]{real} }

sub step
{
	my ($self, $seconds) = @_;

	$self->{real} += $seconds;
	$self->write;
	return;
}

sub pass
{
	my ($self, $seconds) = @_;

	$self->{monotonic} += $seconds;
	$self->step($seconds);
	return;
}

# One write of the whole, in place, since the server has mapped the file.
sub write
{
	my ($self) = @_;

	open(my $file, -e $self->{file} ? '+<' : '+>', $self->{file}) or die "$self->{file}: $!\n";
	syswrite($file, pack('q2', map { $_ * 1_000_000_000 } @$self{qw(real monotonic)})) == 16 or die;
	close $file;
	return;
}

1;
