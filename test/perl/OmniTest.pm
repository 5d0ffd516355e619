# Servers with omni_refresh and a stand-in for Omni, and what the TAP scripts ask of both:
#
#	my $test = OmniTest->new('call');
#	is($test->call('hard => true')->{status}, 'accepted', 'a hard refresh is accepted');
#	$test->done;
#
# There is one node, made by OmniFault::node(), and one OmniAPI; database postgres has the
# extension, a server "omni" over verified TLS, and a mapping for the superuser, whose key is in a
# file, so that no statement holds it. Jobs are not followed ("track" is off): they end when Omni
# has accepted them.

package OmniTest;

use strict;
use warnings FATAL => 'all';

use IPC::Run ();
use JSON::PP;
use OmniAPI;
use OmniFault;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $last_job = 'SELECT row_to_json(job) FROM omni_refresh_job AS job ORDER BY id DESC LIMIT 1';

# Lines of configuration may follow the name.
sub new
{
	my ($class, $name, @configuration) = @_;
	my $self = bless {
		omni => OmniAPI->start,
		node => OmniFault::node($name, initdb => [], settings => '', extension => 0,
			conf => join '', map { "$_\n" } @configuration),
	}, $class;

	$self->{key_file} = $self->node->basedir . '/omni.key';
	$self->write_key($self->omni->key . "\n");
	$self->set_up('postgres');
	return $self;
}

sub omni { return $_[0]{omni} }
sub node { return $_[0]{node} }

# Makes the extension, server and mapping in a database.
sub set_up
{
	my ($self, $database, $schema) = @_;

	$schema //= 'public';
	$self->sql(qq{
		CREATE EXTENSION omni_refresh SCHEMA $schema;
		CREATE SERVER omni FOREIGN DATA WRAPPER omni_refresh OPTIONS (
			base_url '} . $self->omni->https . qq{', ca_file '} . $self->omni->ca . qq{', rate_limit '0');
		CREATE USER MAPPING FOR CURRENT_USER SERVER omni OPTIONS (api_key_file '$self->{key_file}');},
		$database);
	return;
}

sub write_key
{
	my ($self, $text) = @_;

	unlink $self->{key_file};
	append_to_file($self->{key_file}, $text);
	return;
}

# Runs statements that must succeed; returns what they print.
sub sql
{
	my ($self, $sql, $database, $role) = @_;
	return $self->node->safe_psql($database // 'postgres', $sql,
		defined $role ? (extra_params => [ '-U', $role ]) : ());
}

# Runs statements; returns what they print and what they say, as in
# "ERROR:  28000: message\nDETAIL:  ...\nHINT:  ...".
sub outcome
{
	my ($self, $sql, $database, $role) = @_;
	my ($stdout, $stderr);

	$self->node->psql($database // 'postgres', "\\set VERBOSITY verbose\n$sql",
		stdout => \$stdout, stderr => \$stderr, on_error_stop => 0,
		extra_params => defined $role ? [ '-U', $role ] : []);
	$stderr =~ s/^psql:<stdin>:\d+: //mg;
	$stderr =~ s/^LOCATION: .*\n?//mg;
	chomp $stderr;
	return ($stdout, $stderr);
}

# The call of omni_refresh() for the stand-in's model, with further arguments.
sub call_sql
{
	my ($self, $arguments) = @_;
	my $more = $arguments ? ", $arguments" : '';
	return "SELECT row_to_json(job) FROM omni_refresh('" . $self->omni->model . "'$more) AS job";
}

# Calls omni_refresh(), which must succeed; returns the job it returned, as a hash reference.
sub call
{
	my ($self, $arguments, $database, $role) = @_;
	return decode_json($self->sql($self->call_sql($arguments), $database, $role));
}

# Calls omni_refresh(), which must fail; returns the error, and the job that was written last.
sub failure
{
	my ($self, $arguments, $database, $role) = @_;
	my ($stdout, $stderr) = $self->outcome(
		$self->call_sql($arguments) . ";\n$last_job", $database, $role);
	is($stdout =~ tr/\n//, 0, 'a call that fails returns nothing');
	return ($stderr, $stdout eq '' ? undef : decode_json($stdout));
}

# A job as it stands in its table, the last one without an id.
sub job
{
	my ($self, $id, $database) = @_;
	my $row = $self->sql(
		defined $id ? "SELECT row_to_json(job) FROM omni_refresh_job AS job WHERE id = $id" : $last_job,
		$database);
	return $row eq '' ? undef : decode_json($row);
}

# The events of a job as "EVENT attempt ATTEMPT, HTTP STATUS, took time", as far as there is such.
sub events
{
	my ($self, $id, $database) = @_;
	return $self->sql(qq{
		SELECT concat_ws(', ', event || coalesce(' attempt ' || attempt, ''), 'HTTP ' || http_status,
						 CASE WHEN duration > interval '0' THEN 'took time' END)
		FROM omni_refresh_event WHERE job = $id ORDER BY id}, $database);
}

# Starts psql with a statement and returns at once; the result goes to finish().
sub start
{
	my ($self, $sql) = @_;
	my $session = { stdin => '', stdout => '', stderr => '' };

	$session->{run} = IPC::Run::start(
		[ 'psql', '-XAtq', '-v', 'VERBOSITY=verbose', '-d', $self->node->connstr('postgres'),
			'-c', $sql ],
		'<', \$session->{stdin}, '>', \$session->{stdout}, '2>', \$session->{stderr},
		IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default));
	return $session;
}

# Returns what that psql printed and said.
sub finish
{
	my ($self, $session) = @_;
	$session->{run}->finish;
	$session->{stderr} =~ s/^LOCATION: .*\n?//mg;
	chomp(my @outputs = @$session{qw(stdout stderr)});
	return @outputs;
}

# The workers that there are, as "PID DATABASE" lines.
sub workers
{
	my ($self) = @_;
	return $self->sql("SELECT pid || ' ' || datname FROM pg_stat_activity
		WHERE backend_type = 'omni_refresh worker' ORDER BY datname");
}

# Ends a script: nothing has crashed, and nobody has told the key.
sub done
{
	my ($self) = @_;
	my $log = slurp_file($self->node->logfile);
	my $key = $self->omni->key;

	# Not unlike(), which would print all of the log.
	my @crashes = $log =~ /^.*(?:TRAP:|PANIC:|terminated by signal).*$/mg;
	is("@crashes", '', 'nothing has crashed');
	ok(index($log, $key) < 0, 'the key is not in the log');
	$self->node->stop;
	$self->omni->stop;
	done_testing();
	return;
}

1;
