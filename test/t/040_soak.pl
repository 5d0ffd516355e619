# Chaos, then invariants: clients call for a while, and come and go as they like, while the worker,
# backends and the server are killed, Omni misbehaves and tables are locked. Afterwards the job rows,
# their events, the stand-in's record and what the callers were told must agree.
#
# OMNI_SOAK_MINUTES says how long, OMNI_SOAK_SEED repeats what was drawn by lot (but not what becomes
# of it: that is up to the scheduler).
#
# Each call names a schema that no other call names, by which all that is known of it is found: its
# row, its requests, and its lines in the file of its client.

use strict;
use warnings FATAL => 'all';

use List::Util qw(shuffle);
use POSIX qw(WNOHANG);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

use OmniAPI;
use OmniFault;
use OmniLife;
use OmniSoak qw(one_of);

my ($minutes, $seed) = OmniSoak::lottery(0.3);

# How much later than it was sent the stand-in may come to read a request, and than it was decided an
# attempt may begin, in s: nobody promises that a process gets its turn, but this is more than enough
my $slack = 5;
my $short_slack = 2;

my $omni = OmniAPI->start;
my $node = OmniFault::node('soak', conf => "log_timezone = 'UTC'\n");
my $soak = OmniSoak->new($node);
my $directory = $node->basedir;
my @clients;

END { my $rc = $?; kill 'TERM', @clients; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0, timeout => '2 s');
OmniFault::server($node, 'limited', url => $omni->http, key => $omni->key, rate_limit => 600, timeout => '300 ms');
$node->safe_psql('postgres', 'CREATE ROLE loader LOGIN');
$soak->watch_workers;

# The clients. One writes down when a call begins and, unless it is cut off, what it is told: SQLSTATE,
# id, status. That goes by way of the standard error, which has no buffer to be lost with psql.

sub call
{
	my ($name, @settings) = @_;
	my $now = q{`date '+%F %T.%N%z'`};

	return join '', map { "$_\n" } (map { "SET $_;" } @settings),
		'\unset id', '\unset status',
		"\\warn began $name $now",
		"SELECT id, status FROM omni_refresh('" . $omni->model . "', schemas => '{$name}') \\gset",
		"\\warn told $name :SQLSTATE :id :status $now";
}

sub any_call
{
	my ($name) = @_;

	return call($name,
		'omni_refresh.server = ' . one_of('omni', 'omni', 'limited'),
		'omni_refresh.on_failure = ' . one_of('error', 'warning'),
		q{omni_refresh.call_timeout = } . one_of(q{'50 ms'}, q{'500 ms'}, q{'2 s'}, q{'5 s'}),
		'statement_timeout = ' . one_of(0, 0, 0, 20, 200, 1000));
}

sub client
{
	my ($number, $end) = @_;
	my $test = getppid;
	my $n = 0;

	srand($seed + $number);
	while (time < $end && getppid == $test)
	{
		my $psql = $soak->start_psql("$directory/client$number",
			join('', map { any_call("c${number}_" . ++$n) } 1 .. 1 + int rand 5), '-U', 'loader');
		if (rand() < 0.1)
		{
			sleep rand 0.5;
			kill 'KILL', $psql;
		}
		waitpid($psql, 0);
		sleep rand($? == 0 ? 0.2 : 0.5);
	}
	return;
}

# The havoc: each kind once, in a random order, then again. Faults are there for a few requests.

# Of a caller that waits, if there is one
sub waiting
{
	my @pids = $soak->pids(q{usename = 'loader' AND state = 'active' AND wait_event_type = 'Extension'});
	return @pids ? one_of(@pids) : ();
}

my @havoc = (
	OmniSoak::faults($omni),
	([ 'no more faults', sub { $omni->fault('none') } ]) x 4,
	([ 'a call is canceled', sub { $soak->admin("SELECT pg_cancel_backend($_)") for waiting() } ]) x 3,
	([ 'a caller is terminated', sub { $soak->admin("SELECT pg_terminate_backend($_)") for waiting() } ]) x 2,
	([ 'the worker is terminated', sub { $soak->admin("SELECT pg_terminate_backend($_)") for $soak->worker } ]) x 2,
	[ 'the worker is killed', sub { kill 'KILL', $_ for $soak->worker } ],
	[ 'a caller is killed', sub { kill 'KILL', $_ for waiting() } ],
	[ 'the server is restarted', sub { $node->stop('fast'); $node->start } ],
	[ 'the server is restarted at once', sub { $node->stop('immediate'); $node->start } ],
	# calls are patient for five seconds
	[ 'a table is locked', sub { $soak->lock_table(0.2, 1, 6) } ],
	[ 'the configuration is loaded anew', sub {
			my $timeout = one_of('0', '1 s', '10 min');
			$soak->admin("ALTER SYSTEM SET omni_refresh.idle_timeout = '$timeout'; SELECT pg_reload_conf()");
		} ]);

my $end = time + 60 * $minutes;
for my $number (1 .. 6)
{
	my $pid = fork // die;
	if ($pid == 0)
	{
		client($number, $end);
		POSIX::_exit(0);
	}
	push @clients, $pid;
}

my @deck;
while (time < $end)
{
	@deck = shuffle(@havoc) if !@deck;
	my ($name, $function) = @{ shift @deck };
	note(sprintf '%.1f s left: %s', $end - time, $name);
	$function->();
	sleep rand 0.5;
}

# All is well again: what was left behind is settled, by the worker that is there or by the next one.

$omni->fault('none');
OmniLife::until_true('every client comes to its end',
	sub { !(@clients = grep { waitpid($_, WNOHANG) == 0 } @clients) }, 60);
$soak->wait_for_lockers;
$soak->admin('ALTER SYSTEM RESET omni_refresh.idle_timeout; SELECT pg_reload_conf()');
waitpid($soak->start_psql("$directory/client0", call('last'), '-U', 'loader'), 0);
like(slurp_file("$directory/client0"), qr/^told last 00000 \d+ accepted /m, 'a last call succeeds');
ok($node->poll_query_until('postgres', q{
		SELECT NOT EXISTS (SELECT FROM omni_refresh_job WHERE status IN ('pending', 'sending'))}),
	'no job is left undecided');
OmniLife::until_true('no request is left unanswered', sub { $omni->stats->{in_flight} == 0 });

# What the stand-in, the clients and the server's log know

$soak->load('request', 'name text, at float8, answer text',
	map { [ $_->{query} =~ /schemas=(\w+)/ ? $1 : undef, $_->{time}, $_->{status} ] } $omni->requests);

# A line may have been cut off by the end of its psql.
my $time = qr/(\d{4}-\S+ \d\S+)$/m;
my (%call, %heard);
for my $text (map { slurp_file($_) } glob "$directory/client?")
{
	$heard{$2} = $1 while $text =~ /(began (\w+) .*?)(?=began |\z)/gs;
	$call{$1} = [ $1, $2 ] while $text =~ /began (\w+) $time/g;
	push @{ $call{$1} }, $5, $2, map { /^:/ ? undef : $_ } $3, $4
		while $text =~ /told (\w+) (\w{5}) (\S+) (\S+) $time/g;
}
$soak->load('call', 'name text PRIMARY KEY, began timestamptz, ended timestamptz, sqlstate text, id bigint, outcome text',
	map { [ (@$_, (undef) x 4)[0 .. 5] ] } values %call);

# Between a crash and the server's return, outcomes of the last moment may be lost.
my (@crashes, $began);
for (split /\n/, slurp_file($node->logfile))
{
	$began //= $1 if /^(\S+ \S+ \S+) .*(?:was terminated by signal|received immediate shutdown request)/;
	if (defined $began && /^(\S+ \S+ \S+) .*database system is ready to accept connections/)
	{
		push @crashes, [ $began, $1 ];
		undef $began;
	}
}
$soak->load('crash', 'began timestamptz, ended timestamptz', @crashes);

$node->safe_psql('postgres', q{
	CREATE INDEX ON request (name);
	CREATE TABLE life AS
	SELECT j.id, schemas[1] AS name, origin, status, attempts, j.job_id, requested_at, finished_at, error,
		story, sendings, last_sending, http_answers, requests, answers, last_request
	FROM omni_refresh_job AS j,
		LATERAL (SELECT string_agg(event, ' ' ORDER BY id) AS story,
				coalesce(array_agg(attempt ORDER BY id) FILTER (WHERE event = 'sending'), '{}') AS sendings,
				max(occurred_at) FILTER (WHERE event = 'sending') AS last_sending,
				count(http_status) AS http_answers
			FROM omni_refresh_event WHERE job = j.id) AS e,
		LATERAL (SELECT count(*) AS requests, coalesce(array_agg(answer ORDER BY at), '{}') AS answers,
				to_timestamp(max(at)) AS last_request
			FROM request WHERE name = schemas[1]) AS r;
	CREATE INDEX ON life (name);
	CREATE TABLE told AS
	SELECT c.*, to_jsonb(l) AS life, l.id AS own, status, answers, requests, last_request, last_sending,
		EXISTS (SELECT FROM crash WHERE c.began < crash.ended AND crash.began < finished_at) AS crashed
	FROM call AS c LEFT JOIN life AS l USING (name)
	WHERE sqlstate IS NOT NULL});

# The stand-in's faults that give Omni's answer, or none, so that Omni may have acted on the request;
# the others say no
my $yes = q{'{200, delay, drip}'};
my $perhaps = q{'{200, delay, drip, hang, hang_middle, reset, close, close_in_headers}'};

# What holds of each row of a table
my @invariants = (
	# job rows and events
	[ 'every job has come to its end', 'life',
		q{status IN ('accepted', 'completed', 'failed', 'canceled', 'unknown') AND finished_at >= requested_at} ],
	[ 'the events of every job tell one life, one attempt after the other, which ends with its status', 'life',
		q{' ' || story ~ ('^( rate_limited)*( sending( attempt_failed| rate_limited)( rate_limited)*)*( sending( refused)?)? '
			|| status || '$')} ],
	[ 'every attempt is in the event log', 'life',
		q{sendings = ARRAY(SELECT generate_series(1, attempts))} ],
	[ 'every job that has failed, or is not known to have succeeded, says why', 'life',
		q{status NOT IN ('failed', 'unknown') OR error IS NOT NULL} ],
	[ q{every job that Omni has accepted bears Omni's id}, 'life',
		q{status NOT IN ('accepted', 'completed') OR job_id IS NOT NULL} ],
	# ... and the stand-in's record
	[ 'every request belongs to one job', 'request',
		q{(SELECT count(*) FROM life WHERE life.name = request.name) = 1} ],
	[ 'no job was sent more often than its row says', 'life', q{requests <= attempts} ],
	[ 'every answer in the event log was given', 'life', q{http_answers <= requests} ],
	[ 'every job that is accepted or completed was accepted by Omni', 'life',
		qq{status NOT IN ('accepted', 'completed') OR answers && $yes} ],
	[ 'no job that is failed or canceled may have been accepted by Omni', 'life',
		qq{status NOT IN ('failed', 'canceled') OR NOT answers && $perhaps AND array_position(answers, NULL) IS NULL} ],
	[ 'no job was sent after its end', 'life',
		qq{last_request IS NULL OR last_request < finished_at + interval '$slack s'} ],
	# ... and the callers
	[ 'every call has one job at most', 'call',
		q{(SELECT count(*) FROM life WHERE life.name = call.name) <= 1} ],
	[ 'every job that a caller was told is his own', 'told', q{id IS NULL OR own = id} ],
	[ 'every caller was told what the row says, unless a crash has forgotten it', 'told',
		q{id IS NULL OR outcome = status OR outcome IN ('pending', 'sending')
			OR (crashed AND status IN ('unknown', 'canceled'))} ],
	[ 'every success that a caller was told is one', 'told',
		qq{outcome IS NULL OR outcome NOT IN ('accepted', 'completed') OR answers && $yes} ],
	[ 'every call that failed without a job was not sent', 'told',
		q{NOT (sqlstate = '53400' OR sqlstate = '00000' AND id IS NULL) OR own IS NULL AND requests IS NULL} ],
	[ 'no call was sent after its caller was told', 'told',
		qq{last_request IS NULL OR last_request < ended + interval '$slack s'} ],
	[ '... nor is another attempt made', 'told',
		qq{last_sending IS NULL OR last_sending < ended + interval '$short_slack s'} ],
	[ 'every error that a caller was told is one of those that are documented', 'told',
		q{sqlstate IN ('00000', '08001', '08006', '08007', '08P01', '22023', '28000',
			'42501', '42704', '38000', '53000', '53400', '55P03', '57014')} ]);

$soak->holds(sub { map { $heard{$_} // () } $_[0] =~ /\bc\d_\d+\b/g }, @invariants);
$soak->one_worker_at_a_time;

note($node->safe_psql('postgres', $_)) for
	q{SELECT 'jobs: ' || string_agg(concat_ws(' ', n, status), ', ') FROM (SELECT status, count(*) AS n FROM life GROUP BY 1) AS s},
	q{SELECT 'told: ' || string_agg(concat_ws(' ', n, coalesce(sqlstate, 'nothing')), ', ') FROM (SELECT sqlstate, count(*) AS n FROM call GROUP BY 1) AS s},
	q{SELECT 'requests: ' || string_agg(concat_ws(' ', n, answer), ', ') FROM (SELECT answer, count(*) AS n FROM request GROUP BY 1) AS s},
	q{SELECT concat_ws(' ', (SELECT count(DISTINCT worker) FROM turn), 'workers,', (SELECT count(*) FROM crash), 'crashes')};

$soak->end;
done_testing();
