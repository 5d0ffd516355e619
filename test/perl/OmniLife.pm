# What the tests of the worker's life need: sessions that stay, pgbench, counts of workers started,
# and an installation of PostgreSQL of one's own, whose files can be replaced.
#
#	my $session = OmniLife::session($node, 'postgres');
#	my ($out, $err) = $session->query('SELECT 1');
#	$session->send($refresh);
#	...
#	($out, $err) = $session->answer;

package OmniLife;

use strict;
use warnings FATAL => 'all';

use Cwd qw(abs_path);
use IO::Handle;
use IPC::Run ();
use POSIX qw(WNOHANG);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

# psql writes into files, which are polled: IPC::Run would only feed it while it is waited for.
sub session
{
	my ($node, $db) = @_;
	my $self = bless { map { $_ => PostgreSQL::Test::Utils::tempdir . "/$_" } 'out', 'err' };

	open(my $out, '>>', $self->{out}) or die;
	open(my $err, '>>', $self->{err}) or die;
	pipe(my $in, $self->{in}) or die;
	$self->{in}->autoflush;
	$self->{owner} = $$;
	$self->{psql} = fork // die;
	if ($self->{psql} == 0)
	{
		open(STDIN, '<&', $in) && open(STDOUT, '>&', $out) && open(STDERR, '>&', $err)
			&& exec($node->installed_command('psql'), '-XAtq', '-v', 'VERBOSITY=verbose', '-d', $node->connstr($db));
		POSIX::_exit(1);
	}
	$self->{pid} = ($self->query('SELECT pg_backend_pid()'))[0];
	return $self;
}

# Hands statements over without waiting for them.
sub send
{
	my ($self, $sql) = @_;

	local $SIG{PIPE} = 'IGNORE';	# psql may have exited
	truncate($self->{$_}, 0) for 'out', 'err';
	$self->{in}->print("$sql;\n\\echo <end>\n\\warn <end>\n");
	return;
}

# Waits for what they print and what they say, or for the end of the session.
sub answer
{
	my ($self) = @_;
	my $end = time + $PostgreSQL::Test::Utils::timeout_default;
	my @texts;

	local ($!, $?);
	while (1)
	{
		$self->{exited} ||= waitpid($self->{psql}, WNOHANG) != 0;
		@texts = map { slurp_file($_) } @$self{qw(out err)};
		last if $self->{exited} || 2 == grep { /^<end>\n\z/m } @texts;
		die 'no answer' if time > $end;
		select(undef, undef, undef, 0.005);
	}
	s/^<end>\n\z//m for @texts;
	chomp @texts;
	return @texts;
}

sub query
{
	my ($self, $sql) = @_;

	$self->send($sql);
	return $self->answer;
}

sub quit
{
	my ($self) = @_;
	local $?;

	close $self->{in};
	waitpid($self->{psql}, 0);
	return;
}

# Starts pgbench with a script, which goes on until its time is over or its backends are.
sub bench
{
	my ($node, $db, $sql, @options) = @_;
	my $self = { out => '', err => '' };
	my $file = PostgreSQL::Test::Utils::tempdir . '/script.sql';

	append_to_file($file, "$sql\n");
	$self->{run} = IPC::Run::start(
		[ $node->installed_command('pgbench'), '-n', '-f', $file, @options, '-d', $node->connstr($db) ],
		'<', '/dev/null', '>', \$self->{out}, '2>', \$self->{err},
		IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default));
	return $self;
}

# Waits for its end; returns its exit status.
sub benched
{
	my ($self) = @_;

	$self->{run}->finish;
	return $self->{run}->full_result(0) >> 8;
}

# How many workers the postmaster has started so far, if log_min_messages is debug1; of a database, if its
# OID is given.
sub forks
{
	my ($node, $oid) = @_;
	my $name = 'omni_refresh' . ($oid ? " worker for database $oid\"" : '');

	return scalar(() = slurp_file($node->logfile) =~ /starting background worker process "$name/g);
}

# Whether a database, by its OID, has a worker that seems to rest: one that goes on sleeping. One that
# only waits for a lock does not sleep for long.
sub rests
{
	my ($oid) = @_;
	my ($pid) = map { (eval { slurp_file("$_/cmdline") } // '') =~ /omni_refresh worker for database $oid\b/ ? m{(\d+)$} : () } glob '/proc/[0-9]*';

	for my $try (1 .. 10)
	{
		return 0 if !defined $pid || (eval { slurp_file("/proc/$pid/stat") } // '') !~ /\) S /;
		select(undef, undef, undef, 0.02);
	}
	return 1;
}

sub timed
{
	my ($function) = @_;
	my $began = Time::HiRes::time;

	$function->();
	return Time::HiRes::time - $began;
}

# Polls until a function returns true, for up to a minute.
sub until_true
{
	my ($name, $function, $seconds) = @_;
	my $end = time + ($seconds // 60);
	my $result;

	while (!($result = $function->()) && time < $end)
	{
		select(undef, undef, undef, 0.1);
	}
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return ok($result, $name);
}

# Kills a server. Returns true once nothing of it is left, so that it can be started again.
sub kill_server
{
	my ($node) = @_;
	my ($postmaster) = slurp_file($node->data_dir . '/postmaster.pid') =~ /^(\d+)/;
	my $end = time + 30;

	kill 'STOP', $postmaster;	# what is not there now will not be
	my @children = map { /^(\d+) \(.*\) \S $postmaster /s ? $1 : () } map { eval { slurp_file($_) } // () } glob '/proc/[0-9]*/stat';
	$node->kill9;
	while (kill(0, $postmaster) || grep { alive($_) } @children)
	{
		return 0 if time > $end;
		select(undef, undef, undef, 0.02);
	}
	return 1;
}

# Whether a process is there; one whose parent does not care about its end is not.
sub alive
{
	my ($pid) = @_;
	my $stat = eval { slurp_file("/proc/$pid/stat") };

	return kill(0, $pid) && !(defined $stat && $stat =~ /\) Z/);
}

# Waits for the end of a crash restart, which is over when sessions are let in.
sub recovered
{
	my ($node) = @_;

	return $node->poll_query_until('postgres', 'SELECT NOT pg_is_in_recovery()');
}

# Nothing in the log is worse than expected. A server that is stopped may end a session that was
# about to leave. Jobs that fail are for 085_log.pl; what Omni said of them may look like an error.
sub clean
{
	my ($node, $name, @expected) = @_;

	push @expected, qr/FATAL:  terminating (?:connection|autovacuum process) due to administrator command/,
		qr/could not send data to client: Broken pipe/, qr/LOG:  (?:job \d+ ended as|outage of server) /;
	my @lines = grep { /PANIC|TRAP|terminated by signal|FATAL|could not|WARNING/ && !/ DEBUG: / }
		split /\n/, slurp_file($node->logfile);

	for my $line (@expected)
	{
		@lines = grep { $_ !~ $line } @lines;
	}
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is(join("\n", @lines), '', $name);
}

# Copies the installation of PostgreSQL, by links where that can be: replace files, do not write
# into them. Returns its path and the folder of libraries, or nothing if it cannot be copied.
sub installation
{
	my %folders = map { chomp(my $path = `pg_config --$_`); $_ => abs_path($path) } qw(bindir pkglibdir sharedir);
	my $common = $folders{bindir};

	$common =~ s{/[^/]*$}{} while index("$folders{pkglibdir}/", "$common/") != 0 || index("$folders{sharedir}/", "$common/") != 0;
	return if $common eq '' || $folders{bindir} !~ m{/bin$} || !-w $folders{pkglibdir};

	my $root = PostgreSQL::Test::Utils::tempdir;
	for my $folder (map { s{/bin$}{}r } @folders{qw(bindir sharedir)})
	{
		my $target = $root . substr($folder, length $common);
		system("mkdir -p '$target' && (cp -al '$folder/.' '$target' 2>/dev/null || cp -a '$folder/.' '$target')") == 0 or return;
	}
	return map { $root . substr($_, length $common) } $folders{bindir} =~ s{/bin$}{}r, @folders{qw(pkglibdir sharedir)};
}

1;
