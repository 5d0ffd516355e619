# No request without a trace: what is written down before a request is sent, and what is left of it
# when the caller, the worker or the server ends. The life of the worker.

use strict;
use warnings FATAL => 'all';

use OmniLife;
use OmniTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $test = OmniTest->new('trace');
my ($node, $omni) = ($test->node, $test->omni);
my ($model, $key) = ($omni->model, $omni->key);
my $call = "SELECT status FROM omni_refresh('$model')";

# The caller that waits, as one row of pg_stat_activity has it
my $caller = "FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
	AND query LIKE '%omni_refresh(%'";

# Starts a call, waits until its request hangs; returns the session and the id of the job.
sub hanging_call
{
	$omni->reset;
	$omni->fault('hang');
	my $session = $test->start($call);
	$omni->wait_for_requests(1);
	return ($session, $test->job->{id});
}

# Waits until a job has a status.
sub wait_for_status
{
	my ($id, $status) = @_;
	return $node->poll_query_until('postgres', "SELECT status = '$status' FROM omni_refresh_job WHERE id = $id");
}

# The life of the worker
is($test->workers, '', 'there is no worker before there is something to do');
$test->call;
my $worker = $test->workers;
like($worker, qr/^\d+ postgres$/, 'the first call starts one');
$test->call;
is($test->workers, $worker, 'the next call finds it there');
ok($node->poll_query_until('postgres', "SELECT state = 'idle' AND xact_start IS NULL AND backend_xmin IS NULL
	FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'"), 'it is idle in between');
$node->append_conf('postgresql.conf', "omni_refresh.idle_timeout = '1ms'");
$node->reload;
ok($node->poll_query_until('postgres',
	"SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'"),
	'it exits when it has been idle for idle_timeout, which may change meanwhile');
foreach my $i (1 .. 5)
{
	is($test->sql($call), 'accepted', "a call starts another one: $i");
}
$node->append_conf('postgresql.conf', "omni_refresh.idle_timeout = '1h'");
$node->reload;

# The trace is there before the request is.
my ($session, $id) = hanging_call();
my $job = $test->job($id);
is($job->{status}, 'sending', 'when a request arrives, the job says so');
is($job->{attempts}, 1, 'its attempt is counted');
ok(defined $job->{sent_at} && !defined $job->{finished_at}, 'it has begun and not ended');
is($test->events($id), "sending attempt 1", 'the event is there');
is($test->sql("SELECT state, xact_start IS NULL, coalesce(backend_xmin::text, ''), query = ''
	FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'"), 'active|t||f',
	'the worker says what it does, and has no transaction open meanwhile');
is($test->sql($call), 'accepted', 'another call does not wait for one that hangs');

# The caller leaves.
$test->sql("SELECT pg_cancel_backend(pid) $caller");
my ($stdout, $stderr) = $test->finish($session);
is("$stdout$stderr", 'ERROR:  57014: canceling statement due to user request',
	'a call can be canceled');
$omni->fault('none');
ok(wait_for_status($id, 'unknown'), 'whether Omni has heard of its job is not known');
like($test->events($id), qr/^sending attempt 1\n.*\nunknown[^\n]*$/s, 'as the events say');
OmniLife::until_true('the stand-in has seen the end of it', sub { $omni->stats->{in_flight} == 0 });
is((grep { $_->{status} eq 'hang' } $omni->requests), 1, 'it is not sent again');

$omni->reset;
$omni->fault('hang');
is(($test->outcome("SET statement_timeout = '200ms';
	DO \$\$
	BEGIN
		PERFORM omni_refresh('$model');
	EXCEPTION WHEN OTHERS THEN
		RAISE NOTICE 'caught';
	END
	\$\$"))[1] =~ s/^CONTEXT:.*//mrs, "ERROR:  57014: canceling statement due to statement timeout\n",
	'statement_timeout ends a call, and WHEN OTHERS does not catch that');
($session) = hanging_call();
$test->sql("SELECT pg_terminate_backend(pid) $caller");
($stdout, $stderr) = $test->finish($session);
like($stderr, qr/^FATAL:  57P01: /m, 'a session that calls can be terminated');
is($test->sql($call), 'accepted', 'the next call succeeds');

# Somebody deletes the job under way.
($session, $id) = hanging_call();
$test->sql("DELETE FROM omni_refresh_job WHERE id = $id");
$omni->fault('none');
($stdout, $stderr) = $test->finish($session);
is($stdout, '', 'a call whose job was deleted returns nothing');
like($stderr, qr/^ERROR:  \w{5}: .*(?:deleted|could not reach)/m, 'it says so');
is($test->sql("SELECT count(*) FROM omni_refresh_event WHERE job = $id"), '0', 'there are no events of a deleted job');

# The worker ends.
($session, $id) = hanging_call();
$test->sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'");
($stdout, $stderr) = $test->finish($session);
like($stderr, qr/^ERROR:  08007: the background worker ended before job $id was finished$/m,
	'who waits learns at once that the worker has ended');
ok(wait_for_status($id, 'unknown'), 'whether Omni has heard of the job is not known then');
is(scalar($omni->requests), 1, 'it is not sent again');

# The server ends.
($session, $id) = hanging_call();
$node->stop('immediate');
$test->finish($session);
$omni->reset;
$node->start;
is($test->job($id)->{status}, 'sending', 'a crash does not undo the trace of a request');
is($test->events($id), "sending attempt 1", 'nor its event');
is($test->workers, '', 'without a preloaded library nobody looks after it yet');
is($test->sql($call), 'accepted', 'after a crash the next call succeeds');
$job = $test->job($id);
is($job->{status}, 'unknown', 'by then the job of before is settled: nobody knows');
ok(defined $job->{finished_at}, 'that is its end');
like($job->{error}, qr/^08007: /, 'and it says why');
is($test->events($id), "sending attempt 1\nunknown attempt 1", 'so do its events');
is(scalar($omni->requests), 1, 'it is not sent again');

# More callers than the worker has places for
$omni->reset;
my $script = $node->basedir . '/calls.sql';
append_to_file($script, "$call;\n");
my $before = $test->sql('SELECT count(*) FROM omni_refresh_job');
command_ok([ 'pgbench', '-n', '-c', '24', '-j', '4', '-t', '5', '-f', $script, $node->connstr('postgres') ],
	'many sessions call at once');
is(scalar($omni->requests), 120, 'each call is one request');
is($test->sql("SELECT count(*), count(DISTINCT job_id), string_agg(DISTINCT status, ' ')
	FROM (SELECT * FROM omni_refresh_job ORDER BY id DESC LIMIT 120) AS jobs"), '120|120|accepted',
	'each call has a job of its own');
is($test->sql('SELECT count(*) FROM omni_refresh_job') - $before, 120, 'and no more');
like($test->workers, qr/^\d+ postgres$/, 'one worker does it all');

# Who owns a table may give it triggers; they have no more rights than he.
$test->sql(q{
	CREATE ROLE mallory;
	CREATE TABLE seen (who text);
	GRANT INSERT ON seen TO PUBLIC;
	ALTER TABLE omni_refresh_job OWNER TO mallory;
	GRANT CREATE ON SCHEMA public TO mallory;
	SET ROLE mallory;
	CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS
		'BEGIN INSERT INTO public.seen VALUES (current_user); RETURN NEW; END';
	CREATE TRIGGER look AFTER INSERT OR UPDATE ON omni_refresh_job FOR EACH ROW EXECUTE FUNCTION look()});
is($test->sql($call), 'accepted', 'another owner of the table does no harm');
is($test->sql('SELECT DISTINCT who FROM seen'), 'mallory', 'triggers run as the owner of the table');
foreach my $escape ('RESET ROLE', 'SET SESSION AUTHORIZATION DEFAULT', 'CREATE TEMP TABLE t ()')
{
	$omni->reset;
	$test->sql(qq{SET ROLE mallory; CREATE OR REPLACE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS
		'BEGIN $escape; RETURN NEW; END'});
	like(($test->outcome($call))[1], qr/^ERROR:  42501: .*security-restricted operation$/m, "no trigger does $escape");
	is(scalar($omni->requests), 0, 'what could not be written down is not sent');
}
$test->sql(q{SET ROLE mallory; CREATE OR REPLACE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS
		'BEGIN INSERT INTO public.seen VALUES (current_user); RETURN NEW; END';
	DROP TRIGGER look ON omni_refresh_job;
	CREATE CONSTRAINT TRIGGER look AFTER INSERT ON omni_refresh_job DEFERRABLE INITIALLY DEFERRED
		FOR EACH ROW EXECUTE FUNCTION look()});
like(($test->outcome($call))[1], qr/^ERROR:  42501: .*security-restricted operation$/m,
	'no trigger waits for the end of the transaction');
is($test->sql('SELECT DISTINCT who FROM seen'), 'mallory', 'no trigger has run with other rights');
$test->sql('DROP TRIGGER look ON omni_refresh_job');
is($test->sql($call), 'accepted', 'the worker has survived all that');

$test->done;
