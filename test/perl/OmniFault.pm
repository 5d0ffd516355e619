# What the tests of refusals, faults and races need: a node whose worker meets the stand-in for
# Omni, and calls whose error is taken apart.
#
#	my $node = OmniFault::node('main', conf => "omni_refresh.idle_timeout = '10 min'\n");
#	OmniFault::server($node, 'omni', url => $omni->https, ca_file => $omni->ca, key => $omni->key);
#	my $call = OmniFault::call($node, $refresh);
#	is($call->{sqlstate}, '53000', '...');

package OmniFault;

use strict;
use warnings FATAL => 'all';

use IPC::Run ();
use OmniNode;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

our $first;						# node
my ($directory, $count);

my $settings = <<'EOF';
dynamic_shared_memory_type = mmap
max_worker_processes = 16
restart_after_crash = on
wal_level = replica
log_statement = none
client_connection_check_interval = 100
omni_refresh.idle_timeout = '10 min'
EOF

# Starts a server. Its DSM segments are files in the data directory, where they can be counted.
# Options: conf, further lines of configuration; and, in place of what is usual here, settings, more
# such lines; initdb, a list of options; extension, false for a server without it; install_path, as in
# PostgreSQL::Test::Cluster.
sub node
{
	my ($name, %options) = @_;
	my $node = OmniNode->new($name, defined $options{install_path} ? (install_path => $options{install_path}) : ());

	$first //= $node;
	$node->init(extra => $options{initdb} // [ '--encoding=UTF8', '--no-locale' ]);
	$node->append_conf('postgresql.conf', "lc_messages = 'C'\nomni_refresh.track = off\n"
		. ($options{settings} // $settings) . ($options{conf} // ''));
	$node->start;
	$node->safe_psql('postgres', 'CREATE EXTENSION omni_refresh') if $options{extension} // 1;
	return $node;
}

# Makes a foreign server that everyone may use, with a key for PUBLIC.
sub server
{
	my ($node, $name, %options) = @_;
	my $url = delete $options{url};
	my $key = delete $options{key};
	my $db = delete $options{db} // 'postgres';
	my $more = join '', map { ", $_ '$options{$_}'" } sort keys %options;

	$node->safe_psql($db, qq{
		CREATE SERVER "$name" FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url '$url'$more);
		GRANT USAGE ON FOREIGN SERVER "$name" TO PUBLIC;
		CREATE USER MAPPING FOR PUBLIC SERVER "$name" OPTIONS (api_key '$key')});
	return;
}

# A statement that queues so many equal jobs. Requests would not: a transaction's equal ones have one job.
sub equal_jobs
{
	my ($arguments, $count) = @_;
	my $columns = 'status, model_id, kind, hard, server, origin, requested_by, requested_by_oid, requested_at, run_at, database';

	return "WITH job AS (SELECT * FROM omni_refresh_on_commit($arguments))
		INSERT INTO omni_refresh_job ($columns) SELECT $columns FROM job, generate_series(2, $count)";
}

# Starts psql with some statements and does not wait for it. Options: db, user, app.
sub begin
{
	my ($node, $sql, %options) = @_;
	my $connstr = $node->connstr($options{db} // 'postgres');
	my $self = { out => '', err => '', seconds => 0 };

	$connstr .= " user=$options{user}" if defined $options{user};
	$connstr .= " application_name=$options{app}" if defined $options{app};
	# A file: a string would not be written into a pipe before finish().
	my $file = sprintf '%s/%d.sql', $directory //= PostgreSQL::Test::Utils::tempdir, ++$count;
	append_to_file($file, "\\set VERBOSITY verbose\n\\timing\n$sql");
	$self->{psql} = IPC::Run::start(
		[ $node->installed_command('psql'), '-XAtq', '-v', 'ON_ERROR_STOP=1',
			'-d', $connstr, '-f', $file ],
		'<', '/dev/null', '>', \$self->{out}, '2>', \$self->{err},
		IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default));
	return $self;
}

# Waits for its end, adds up the time of its statements, and takes apart what the last error or
# warning says.
sub finish
{
	my ($self) = @_;

	$self->{psql}->finish;
	$self->{status} = $self->{psql}->full_result(0) >> 8;
	$self->{seconds} += $1 / 1000 while $self->{out} =~ s/^Time: ([\d.]+) ms.*\n?//m;
	chomp @$self{qw(out err)};
	if ($self->{err} =~ /.*(?:ERROR|FATAL|WARNING|NOTICE):  (\S{5}): (.*)/s)
	{
		($self->{sqlstate}, my $text) = ($1, $2);
		($self->{message}) = $text =~ /\A(.*)/;
		($self->{detail}) = $text =~ /^DETAIL:  (.*)/m;
		($self->{hint}) = $text =~ /^HINT:  (.*)/m;
	}
	$self->{$_} //= '' for qw(sqlstate message detail hint);
	return $self;
}

sub call
{
	return finish(begin(@_));
}

# Makes a client vanish without a word.
sub kill_client
{
	my ($self) = @_;

	$self->{psql}->signal('KILL');
	eval { $self->{psql}->finish };
	return;
}

# The backend of a session that was begun with "app", once it waits for the worker.
sub wait_until_waiting
{
	my ($node, $app) = @_;

	$node->poll_query_until('postgres', qq{
		SELECT count(*) = 1 FROM pg_stat_activity
		WHERE application_name = '$app' AND state = 'active' AND wait_event_type = 'Extension'})
		or die "$app does not wait";
	return $node->safe_psql('postgres',
		"SELECT pid FROM pg_stat_activity WHERE application_name = '$app'");
}

# The process id of a database's worker, empty if there is none.
sub worker
{
	my ($node, $db) = @_;

	return $node->safe_psql('postgres', sprintf(q{
		SELECT pid FROM pg_stat_activity
		WHERE backend_type = 'omni_refresh worker' AND datname = '%s'}, $db // 'postgres'));
}

# The status of the newest job, and what happened to it, in order.
sub story
{
	my ($node, $db) = @_;

	return $node->safe_psql($db // 'postgres', q{
		SELECT j.status || ': ' || string_agg(e.event, ' ' ORDER BY e.id)
		FROM omni_refresh_job j JOIN omni_refresh_event e ON e.job = j.id
		WHERE j.id = (SELECT max(id) FROM omni_refresh_job) GROUP BY j.id});
}

sub poll
{
	my ($function, $node, $wanted, $name) = @_;
	my $end = time + 60;
	my $now;

	while (($now = $function->($node)) ne $wanted && time < $end)
	{
		select(undef, undef, undef, 0.05);
	}
	local $Test::Builder::Level = $Test::Builder::Level + 2;
	return is($now, $wanted, $name);
}

sub poll_story    { return poll(\&story, @_) }
sub poll_segments { return poll(\&segments, @_) }

# The files of DSM segments; those of PostgreSQL's own are there from the start.
sub segments
{
	my ($node) = @_;

	return join ' ', sort grep { /^mmap/ } slurp_dir($node->data_dir . '/pg_dynshmem');
}

1;
