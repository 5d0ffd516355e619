# What commits is delivered, and what does not commit never is: in each round some clients queue
# requests in transactions that end in every way, while one disaster befalls the worker, a backend, the
# server, Omni, or the network. In the end all heals, and then it shows what has become of each request.
#
# OMNI_SOAK_MINUTES says how long, or else there are two dozen rounds; OMNI_SOAK_SEED repeats what was
# drawn by lot (but not what becomes of it: that is up to the scheduler).
#
# Each request names a schema or a table that no other one names. The same name goes into the table
# "fact" by the same transaction: that table, and no client, knows what was committed, since a client may
# be cut off before it hears so. A name begins with "k" (keep) or "d" (drop), as its transaction ends
# unless it fails. The stand-in's record tells which names it has heard, also by way of a job
# into which the one of the name was merged.

use strict;
use warnings FATAL => 'all';

use JSON::PP;
use List::Util qw(shuffle);
use POSIX ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep time);

use OmniAPI;
use OmniFault;
use OmniLife;
use OmniSoak qw(one_of);

my $rounds = 24;
my ($minutes, $seed) = OmniSoak::lottery(0);
my $clients = 4;
my $unfinished = q{EXISTS (SELECT FROM omni_refresh_job WHERE status IN ('pending', 'sending'))};

my $record = PostgreSQL::Test::Utils::tempdir . '/record';
my $omni = OmniAPI->start($record);
my $node = OmniFault::node('delivery', conf => <<END);
max_prepared_transactions = 200
omni_refresh.min_interval = 0
END
my $soak = OmniSoak->new($node);
my $model = $omni->model;
my $directory = $node->basedir;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0, timeout => '2 s');
OmniFault::server($node, 'limited', url => $omni->http, key => $omni->key, rate_limit => 600, timeout => '300 ms');
$node->safe_psql('postgres', q{
	CREATE ROLE loader LOGIN;
	CREATE TABLE fact (name text PRIMARY KEY, job bigint NOT NULL);
	GRANT ALL ON fact TO loader});
$soak->watch_workers;

# The transactions, each as its statements. Names are numbered as they are drawn.

my ($round, $names) = (0, 0);

sub name
{
	my ($fate) = @_;
	return sprintf '%s%d_%d', $fate, $round, ++$names;
}

sub request
{
	my ($name) = @_;
	my $whole = $name . '_' . one_of('hard', 'soft');
	my ($fact, $arguments) = @{ one_of(
		([ $name, "schemas => '{$name}'" ]) x 90,
		([ $name, "tables => '{$name}'" ]) x 30,
		[ $whole, 'hard => ' . ($whole =~ /hard/ ? 'true' : 'false') ]) };

	return "INSERT INTO fact SELECT '$fact', id FROM omni_refresh_on_commit('$model', $arguments);";
}

sub keep { return request(name('k')) }
sub drop { return request(name('d')) }
sub wait_some { return sprintf 'SELECT pg_sleep(%.3f);', rand 0.06 }

# Prepared transactions bear the name of a request, and so the way in which they should end.
sub prepared
{
	my ($fate, $end) = @_;
	my $name = name($fate);

	return ('BEGIN;', request($name), "PREPARE TRANSACTION '$name';",
		$end ? (wait_some(), ($fate eq 'k' ? 'COMMIT' : 'ROLLBACK') . " PREPARED '$name';") : ());
}

my @transactions = (
	(sub { keep() }) x 4,
	sub { ('BEGIN;', keep(), 'COMMIT;') },
	sub { ('BEGIN;', keep(), wait_some(), keep(), 'COMMIT;') },
	(sub { ('BEGIN;', drop(), wait_some(), 'ROLLBACK;') }) x 2,
	sub { ('BEGIN;', drop(), 'SELECT 1/0;', drop(), 'COMMIT;') },
	sub { ('BEGIN;', keep(), 'SAVEPOINT s;', drop(), 'ROLLBACK TO s;', 'COMMIT;') },
	sub { ('BEGIN;', 'SAVEPOINT s;', drop(), 'ROLLBACK TO s;', keep(), 'COMMIT;') },
	sub { ('BEGIN;', 'SAVEPOINT s;', drop(), wait_some(), 'ROLLBACK TO s;', 'COMMIT;') },
	sub { ('BEGIN;', 'SAVEPOINT s;', keep(), 'RELEASE s;', wait_some(), 'COMMIT;') },
	sub { ('BEGIN;', keep(), 'COMMIT AND CHAIN;', drop(), 'ROLLBACK;') },
	sub { ('BEGIN;', 'SAVEPOINT s;', keep(), 'SAVEPOINT t;', drop(), 'SELECT 1/0;', 'ROLLBACK TO t;', 'COMMIT;') },
	sub { ('DO $$ BEGIN', keep(), 'COMMIT;', drop(), 'ROLLBACK;', keep(), 'END $$;') },
	sub { ('DO $$ BEGIN BEGIN', drop(), 'RAISE division_by_zero; EXCEPTION WHEN division_by_zero THEN END;', keep(), 'END $$;') },
	(sub { prepared('k', 1) }) x 2,
	sub { prepared('d', 1) },
	sub { prepared('k', 0) },
	sub { prepared('d', 0) });

sub script
{
	my @statements = map { (one_of(@transactions)->(), rand() < 0.5 ? wait_some() : ()) } 1 .. 4 + rand 5;

	unshift @statements, 'SET omni_refresh.server = ' . one_of('omni', 'omni', 'omni', 'limited') . ';';
	push @statements, 'BEGIN;', drop() if rand() < 0.3;	# the session ends before its transaction
	return join '', map { "$_\n" } @statements;
}

# Ends what was prepared and is left. A transaction may still be in the hands of a session that ends.
sub end_prepared
{
	for my $name (split /\n/, $soak->admin('SELECT gid FROM pg_prepared_xacts'))
	{
		$soak->try(($name =~ /^k/ ? 'COMMIT' : 'ROLLBACK') . " PREPARED '$name'");
	}
	return;
}

# The disasters: each once, in a random order, then again.

sub client_backend
{
	my @pids = $soak->pids(q{usename = 'loader'});
	return @pids ? one_of(@pids) : ();
}

sub terminate
{
	$soak->admin("SELECT pg_terminate_backend($_)") for @_;
	return;
}

sub kill_server
{
	OmniLife::kill_server($node) or die 'something of the server is left';
	$node->start;
	return;
}

sub kill_omni
{
	$omni->kill;
	sleep rand 0.7;
	$omni->revive;
	return;
}

# Once more than it is sent again without an answer
sub end_workers
{
	my ($kill) = @_;

	$omni->fault('hang', times => -1);
	for (1 .. 5)
	{
		waitpid($soak->start_psql("$directory/extra", keep()), 0);
		sleep 0.1;
		$kill->($soak->worker);
	}
	$omni->fault('none');
	return;
}

sub configure
{
	my (%settings) = @_;

	$node->append_conf('postgresql.conf', join '', map { "omni_refresh.$_ = '$settings{$_}'\n" } sort keys %settings);
	$soak->admin('SELECT pg_reload_conf()');
	return;
}

my @disasters = (
	([ 'the worker is killed', sub { kill 'KILL', $soak->worker } ]) x 3,
	([ 'the worker is terminated', sub { terminate($soak->worker) } ]) x 3,
	[ 'the worker is terminated again and again', sub { end_workers(\&terminate) } ],
	[ 'the worker is killed again and again', sub { end_workers(sub { kill 'KILL', @_ }) } ],
	([ 'a client is killed', sub { kill 'KILL', client_backend() } ]) x 2,
	[ 'a client is terminated', sub { terminate(client_backend()) } ],
	([ 'the postmaster is killed', \&kill_server ]) x 3,
	([ 'the server is stopped at once', sub { $node->stop('immediate'); $node->start } ]) x 2,
	[ 'the server is restarted', sub { $node->stop('fast'); $node->start } ],
	([ 'Omni is killed', \&kill_omni ]) x 3,
	[ 'Omni and the worker are killed', sub { $omni->kill; kill 'KILL', $soak->worker; sleep rand 0.3; $omni->revive } ],
	[ 'Omni is frozen', sub { $omni->freeze(one_of(0.2, 0.7, 1.5)) } ],
	[ 'connections are cut', sub { $omni->fault('hang', times => 5); sleep rand 0.5; $omni->fault('none') } ],
	[ 'a table is locked', sub { $soak->lock_table(0.2, 1) } ]);

# What comes along with it: some faults, so that there is always something on its way, and other settings
sub surround
{
	my @faults = (OmniSoak::faults($omni), ([ delay => sub { $omni->fault('delay', delay => rand 0.1, times => 20) } ]) x 10);
	my @orders = map { one_of(@faults) } 1 .. one_of(1, 1, 2, 3);

	$omni->fault('none') if rand() < 0.5;
	$_->[1]->() for @orders;
	configure(
		min_interval => one_of(0, 0, 0, '200 ms', '1 s'),
		idle_timeout => one_of('0', '20 ms', '1 s', '10 min'),
		max_in_flight => one_of(1, 4, 4)) if rand() < 0.5;
	return join ', ', map { $_->[0] } @orders;
}

my $end = time + 60 * $minutes;
my @deck;
while ($minutes > 0 ? time < $end : $round < $rounds)
{
	$round++;
	@deck = shuffle(@disasters) if !@deck;
	my ($name, $function) = @{ shift @deck };
	my $around = surround();
	note("round $round: $name ($around)");

	my @pids = map { $soak->start_psql("$directory/client$_", script(), '-U', 'loader') } 1 .. $clients;
	sleep rand 0.4;
	$function->();
	push @pids, map { $soak->start_psql("$directory/client$_", script(), '-U', 'loader') } $clients + 1 .. $clients + 2;
	waitpid($_, 0) for @pids;
	end_prepared();
}

# All is well again. Time is made to pass, so that nobody waits for the next try; and what was prepared,
# or left behind, goes out with the next request.

$omni->fault('none');
$soak->wait_for_lockers;
configure(min_interval => 0, max_in_flight => 4, idle_timeout => '10 min');
OmniLife::until_true('every job comes to its end', sub {
		end_prepared();
		$soak->admin(q{UPDATE omni_refresh_job SET run_at = now() WHERE status = 'pending' AND run_at > now()});
		$soak->try(keep());
		sleep 0.2;
		return $soak->admin("SELECT $unfinished OR EXISTS (SELECT FROM pg_prepared_xacts)") eq 'f';
	}, 60);

# A commit that no other one follows wakes the worker, or starts one, even if it is just about to leave.

my $session = OmniLife::session($node, 'postgres');
for my $timeout ('10 min', '20 ms')
{
	my ($times, $late) = ($rounds, 0);

	configure(idle_timeout => $timeout);
	while ($times-- > 0 && !$late)
	{
		my $end = time + 20;

		sleep rand 0.03;
		$session->query(keep());
		sleep 0.005 while ($session->query("SELECT $unfinished"))[0] eq 't' && !($late = time > $end);
	}
	ok(!$late, "a request is sent though no other one follows: idle_timeout = $timeout");
}
$session->quit;
OmniLife::until_true('no request is left unanswered', sub { $omni->stats->{in_flight} == 0 });

# What the stand-ins know: the last line about a request bears what became of it, if anything did.

my %request;
for (map { decode_json($_) } split /\n/, slurp_file($record))
{
	$request{"$_->{process} $_->{n}"} = $_;
}
$soak->load('request', 'at timestamptz, hard bool, kind text, names text[], answer text', map {
		my ($kind, $list) = $_->{query} =~ /\b(schemas|tables)=([^&]*)/;
		my $time = POSIX::strftime('%F %T', gmtime $_->{time}) . sprintf('.%06d+00', 1e6 * ($_->{time} - int $_->{time}));

		[ $time, $_->{query} =~ /hard_refresh=false/ ? 'f' : 't', $kind, '{' . ($list // '') =~ s/%2C/,/gir . '}', $_->{status} ]
	} values %request);

# What the log knows. "way" leads from each job to the one that carries it out in the end.

$node->safe_psql('postgres', q{
	CREATE TABLE life AS
	SELECT j.*, CASE WHEN schemas IS NOT NULL THEN 'schemas' WHEN tables IS NOT NULL THEN 'tables' END AS extent,
		ARRAY(SELECT unnest(coalesce(schemas, tables, '{}')) ORDER BY 1) AS names,
		story, sendings, last_sending, http_answers
	FROM omni_refresh_job AS j,
		LATERAL (SELECT string_agg(event, ' ' ORDER BY id) AS story,
				coalesce(array_agg(attempt ORDER BY id) FILTER (WHERE event = 'sending'), '{}') AS sendings,
				max(occurred_at) FILTER (WHERE event = 'sending') AS last_sending,
				count(http_status) AS http_answers
			FROM omni_refresh_event WHERE job = j.id) AS e;
	ALTER TABLE life ADD PRIMARY KEY (id);
	UPDATE request SET names = ARRAY(SELECT unnest(names) ORDER BY 1);
	CREATE INDEX ON request (names);
	CREATE TABLE heard AS SELECT unnest(names) AS name, count(*) AS times FROM request GROUP BY 1;
	ALTER TABLE heard ADD PRIMARY KEY (name);

	CREATE TABLE delivery AS
	WITH RECURSIVE way AS (
		SELECT id AS member, id AS carrier, cardinality(sendings) AS sendings FROM life
		UNION ALL
		SELECT member, next.id, way.sendings + cardinality(next.sendings)
		FROM way JOIN life ON life.id = carrier JOIN life AS next ON next.id = life.merged_into AND next.id < life.id
	)
	SELECT fact.name, job, carrier, way.sendings, coalesce(times, 0) AS times, status AS ended
	FROM fact LEFT JOIN (way JOIN life ON life.id = carrier AND life.merged_into IS NULL) ON member = job LEFT JOIN heard USING (name);
	CREATE TABLE total AS SELECT (SELECT count(*) FROM request) AS requests, sum(attempts) AS attempts FROM life;
	ANALYZE});

my $yes = q{'{200, delay, drip}'};
my $perhaps = q{'{200, delay, drip, hang, hang_middle, reset, close, close_in_headers}'};

# The last attempt of a job, as the stand-in knows it. It was recorded between two lines of the log.
my $last = q{SELECT FROM request WHERE names = life.names AND kind IS NOT DISTINCT FROM extent
	AND request.hard = coalesce(life.hard, true) AND at BETWEEN last_sending AND finished_at};

# With a row goes what carries its job out.
sub carriers
{
	my @ids = $_[0] =~ /^\((?:\w+,)?(\d+),/mg;
	return @ids ? $node->safe_psql('postgres', 'SELECT carriers FROM life AS carriers WHERE id IN
		(SELECT merged_into FROM life WHERE id IN (' . join(', ', @ids) . ') UNION SELECT carrier FROM delivery WHERE job IN (' . join(', ', @ids) . '))') : ();
}

$soak->holds(\&carriers,
	# what was committed, and nothing else, is in the tables
	[ 'what is committed is what should be', 'fact', q{name LIKE 'k%'} ],
	[ '... and each has its job', 'fact', q{(SELECT name = ANY (names) OR extent IS NULL FROM life WHERE id = job)} ],
	[ '... and each job is of one that is committed, or of several of its transaction', 'life', q{EXISTS (SELECT FROM fact WHERE job = id)} ],
	# ... and was delivered
	[ 'what is committed is delivered, unless its job has ended so that nobody knows', 'delivery',
		q{times > 0 OR ended = 'unknown' OR (SELECT extent IS NULL FROM life WHERE id = carrier)} ],
	[ 'what is not committed is not delivered', 'heard', q{EXISTS (SELECT FROM fact WHERE fact.name = heard.name)} ],
	[ 'nothing is delivered more often than the log says', 'delivery', q{times <= sendings} ],
	[ '... and only what was sent again is delivered twice', 'delivery', q{times <= 1 OR sendings > 1} ],
	# ... as the log says
	[ 'every job has come to an end', 'life', q{status IN ('accepted', 'failed', 'merged', 'unknown') AND finished_at >= requested_at} ],
	[ 'the events of every job tell one life', 'life',
		q{status = 'merged' AND story IS NULL OR
			' ' || story ~ ('^( rate_limited| merged)*( sending( attempt_failed| rate_limited| recovered)( rate_limited| merged)*)*'
			|| CASE status WHEN 'accepted' THEN ' sending accepted' WHEN 'failed' THEN ' sending (refused|attempt_failed) failed'
			WHEN 'unknown' THEN ' sending( refused| attempt_failed)? unknown' ELSE '' END || '$')} ],
	[ 'every attempt is in the event log', 'life', q{sendings = ARRAY(SELECT generate_series(1, attempts))} ],
	[ 'only what was sent four times without an answer, or refused after it had been sent without one, or has an answer that nobody can read, is unknown', 'life',
		q{status <> 'unknown' OR error ~ 'Omni has got the request' OR story ~ '(sending recovered .*){3}sending unknown$'
			OR story ~ 'sending (recovered|attempt_failed) .*sending (refused|attempt_failed) unknown$'} ],
	[ 'every job that is accepted was accepted, as it stands in its row', 'life', qq{status <> 'accepted' OR job_id IS NOT NULL
		AND EXISTS ($last AND answer = ANY ($yes))} ],
	[ 'every job that is failed was refused', 'life', qq{status <> 'failed' OR error IS NOT NULL AND EXISTS ($last AND answer <> ALL ($yes))} ],
	[ '... each time that it was sent, but for what was merged into it after an attempt of its own', 'life', qq{status <> 'failed' OR extent IS NULL OR NOT EXISTS (SELECT FROM request
		WHERE names <@ life.names AND kind = extent AND (answer IS NULL OR answer = ANY ($perhaps))
			AND NOT EXISTS (SELECT FROM life AS m WHERE m.merged_into = life.id AND m.attempts > 0 AND names <@ m.names))} ],
	# ... which also tells of the merging
	[ 'what is merged has a carrier', 'life', q{(status = 'merged') = (merged_into IS NOT NULL)} ],
	[ '... that was asked for before, does the same and was sent later', 'life',
		q{status <> 'merged' OR (SELECT c.id < life.id AND (c.extent IS NULL OR c.extent = life.extent AND c.names @> life.names)
			AND (c.hard OR NOT life.hard) AND c.server = life.server AND c.requested_by = life.requested_by
			AND CASE c.status WHEN 'merged' THEN c.finished_at ELSE c.last_sending END >= life.finished_at
			FROM life AS c WHERE c.id = life.merged_into)} ],
	[ '... and leads to a job that was sent', 'delivery', q{ended IN ('accepted', 'failed', 'unknown')} ],
	[ 'there are no more requests than attempts', 'total', q{requests <= attempts} ]);
$soak->one_worker_at_a_time;

note($node->safe_psql('postgres', $_)) for
	"SELECT concat_ws(' ', 'names: $names drawn,', count(*), 'committed') FROM fact",
	q{SELECT 'jobs: ' || string_agg(concat_ws(' ', n, status), ', ') FROM (SELECT status, count(*) AS n FROM life GROUP BY 1) AS s},
	q{SELECT 'requests: ' || string_agg(concat_ws(' ', n, answer), ', ') FROM (SELECT answer, count(*) AS n FROM request GROUP BY 1) AS s},
	q{SELECT 'heard: ' || string_agg(concat_ws(' ', n, 'names', times, 'times'), ', ' ORDER BY times) FROM (SELECT times, count(*) AS n FROM delivery GROUP BY 1) AS s},
	q{SELECT concat_ws(' ', 'not heard by name:', count(*) FILTER (WHERE extent IS NULL), 'by way of the whole model,',
		count(*) FILTER (WHERE extent IS NOT NULL), 'unknown') FROM delivery JOIN life ON id = carrier WHERE times = 0},
	q{SELECT 'sent again after: ' || string_agg(concat_ws(' ', n, event), ', ') FROM (SELECT event, count(*) AS n FROM omni_refresh_event
		WHERE event IN ('recovered', 'attempt_failed') OR event = 'rate_limited' AND http_status IS NOT NULL GROUP BY 1) AS s},
	q{SELECT concat_ws(' ', (SELECT count(DISTINCT worker) FROM turn), 'workers')};

$soak->end;
done_testing();
