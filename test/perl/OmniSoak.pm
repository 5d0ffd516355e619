# What the scripts have in common that let chaos reign and then look whether all agree.
#
#	my $soak = OmniSoak->new($node);
#	$soak->watch_workers;
#	...
#	$soak->load('request', 'name text, answer text', @rows);
#	$soak->holds(sub { ... }, [ 'every request is answered', 'request', 'answer IS NOT NULL' ]);
#	$soak->one_worker_at_a_time;
#	$soak->end;

package OmniSoak;

use strict;
use warnings FATAL => 'all';

use Exporter qw(import);
use POSIX ();
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

use OmniFault;

our @EXPORT_OK = qw(one_of);

my ($minutes, $seed);

sub new
{
	my ($class, $node) = @_;
	return bless { node => $node, directory => $node->basedir, lockers => [] }, $class;
}

# Begins the lottery: how many minutes it is to last, unless told otherwise, and its seed.
sub lottery
{
	($minutes) = @_;
	$minutes = $ENV{OMNI_SOAK_MINUTES} || $minutes;
	$seed = $ENV{OMNI_SOAK_SEED} || int(time * 1000) % 2**31;
	note("OMNI_SOAK_MINUTES=$minutes OMNI_SOAK_SEED=$seed");
	srand($seed);
	return ($minutes, $seed);
}

sub one_of { return $_[rand @_] }

# Starts psql with a script; what it says is added to a file.
sub start_psql
{
	my ($self, $file, $sql, @options) = @_;

	open(my $script, '>', "$file.sql") or die;
	print $script $sql;
	close $script;
	my $pid = fork // die;
	return $pid if $pid != 0;
	open(STDIN, '<', '/dev/null') && open(STDOUT, '>>', $file) && open(STDERR, '>>', $file)
		&& exec($self->{node}->installed_command('psql'), '-XAtq', '-v', 'VERBOSITY=verbose',
			'-d', $self->{node}->connstr('postgres'), '-f', "$file.sql", @options);
	POSIX::_exit(1);
}

# Runs statements as a superuser. Returns what they print, or nothing if they fail; then it is in $@.
sub try
{
	my ($self, $sql) = @_;
	my ($out, $err);

	# psql() dies if there is nobody to read what it writes: a psql that cannot connect is gone so fast.
	my $status = eval { $self->{node}->psql('postgres', $sql, stdout => \$out, stderr => \$err) } // return;
	$@ = $err;
	return $status == 0 ? $out : undef;
}

# The same, again and again if the server is not there
sub admin
{
	my ($self, $sql) = @_;
	my $end = time + $PostgreSQL::Test::Utils::timeout_default;
	my $out;

	while (!defined($out = $self->try($sql)))
	{
		die $@ if time > $end;
		sleep 0.05;
	}
	return $out;
}

# Processes that are known to pg_stat_activity

sub pids
{
	my ($self, $whose) = @_;
	return split /\n/, $self->admin("SELECT pid FROM pg_stat_activity WHERE $whose");
}

sub worker { return $_[0]->pids(q{backend_type = 'omni_refresh worker'}) }

# What Omni may do: pairs of a name and of a function that orders it for a few requests.

sub fault
{
	my ($omni, $name, %extras) = @_;
	return [ $name, sub { $omni->fault($name, times => 1 + int rand 5, %extras) } ];
}

sub unavailable
{
	my ($omni, $status, %headers) = @_;
	my (undef, $function) = @{ fault($omni, 'answer', status => $status, body => '', headers => \%headers) };
	return [ "HTTP $status", $function ];
}

sub faults
{
	my ($omni) = @_;

	return unavailable($omni, 503), unavailable($omni, 503, 'Retry-After' => 3), unavailable($omni, 429, 'Retry-After' => 1),
		unavailable($omni, 500), unavailable($omni, 404),
		(map { fault($omni, $_) } qw(hang hang_middle reset close close_in_headers drip html_502 truncated not_utf8 nested)),
		fault($omni, 'delay', delay => 0.4), fault($omni, 'huge', size => 2 << 20);
}

# Locks one of our tables, for one of some times in s.
sub lock_table
{
	my ($self, @seconds) = @_;
	my $table = one_of('omni_refresh_job', 'omni_refresh_event');
	my $seconds = one_of(@seconds);

	push @{ $self->{lockers} }, $self->start_psql("$self->{directory}/locker" . @{ $self->{lockers} }, qq{
		SET lock_timeout = '5 s';
		BEGIN; LOCK TABLE $table IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep($seconds); COMMIT;});
	return;
}

sub wait_for_lockers
{
	my ($self) = @_;

	waitpid($_, 0) for @{ $self->{lockers} };
	return;
}

# Has the workers leave a trace of each time that they write.
sub watch_workers
{
	my ($self) = @_;

	$self->{node}->safe_psql('postgres', q{
		CREATE TABLE turn (n bigint GENERATED ALWAYS AS IDENTITY, worker text);
		CREATE FUNCTION note_turn() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			INSERT INTO public.turn (worker)
			SELECT concat_ws(' ', pid, backend_start) FROM pg_stat_get_activity(pg_backend_pid())
			WHERE backend_type = 'omni_refresh worker';
			RETURN NULL;
		END$$;
		CREATE TRIGGER note_turn AFTER INSERT OR UPDATE ON omni_refresh_job
			FOR EACH ROW EXECUTE FUNCTION note_turn()});
	return;
}

sub one_worker_at_a_time
{
	my ($self) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is($self->{node}->safe_psql('postgres', q{
			SELECT worker FROM (SELECT worker, lag(worker) OVER (ORDER BY n) AS before FROM turn) AS t
			WHERE worker IS DISTINCT FROM before GROUP BY worker HAVING count(*) > 1}),
		'', 'no two workers are at work at a time');
}

# Makes a table with some columns and rows.
sub load
{
	my ($self, $table, $columns, @rows) = @_;
	my $file = "$self->{directory}/$table";

	open(my $out, '>', $file) or die;
	print $out join("\t", map { $_ // '\N' } @$_), "\n" for @rows;
	close $out;
	$self->{node}->safe_psql('postgres', "CREATE TABLE $table ($columns); COPY $table FROM '$file'");
	return;
}

# Invariants: a name, a table, and what must hold of each of its rows. A function says more about
# the rows of which it does not.
sub holds
{
	my ($self, $more, @invariants) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	for (@invariants)
	{
		my ($name, $table, $condition) = @$_;
		my $rows = $self->{node}->safe_psql('postgres', "SELECT $table FROM $table WHERE ($condition) IS NOT TRUE LIMIT 10");
		is($rows, '', $name) or diag($more->($rows));
	}
	return;
}

sub end
{
	my ($self) = @_;
	my $node = $self->{node};

	$node->stop('fast');
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is(join("\n", grep { /PANIC|TRAP|signal (?!9\b)\d/ } split /\n/, slurp_file($node->logfile)), '',
		'nothing has died that was not killed');
	is(OmniFault::segments($node), '', 'no segment of shared memory is left');
	diag("to repeat it: make soak MINUTES=$minutes SEED=$seed, with KEEP=1 to keep the log") if !Test::More->builder->is_passing;
	return;
}

1;
