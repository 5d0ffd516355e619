# omni_refresh_cancel(), omni_refresh_retry() and retention: who may, what becomes of what was merged,
# and what others notice of it.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;
use OmniSQL qw(sql wait_for story);

my $omni = OmniAPI->start;
my $node = OmniFault::node('manage', conf => "omni_refresh.min_interval = 0\n");
my $model = $omni->model;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
$node->safe_psql('postgres', "CREATE ROLE loader LOGIN; CREATE ROLE other LOGIN; CREATE ROLE boss LOGIN;
	GRANT loader TO boss; CREATE ROLE keeper LOGIN");

# What a statement of a role's prints and what it complains of, as "SQLSTATE: message".
sub as
{
	my ($role, $sql) = @_;
	my ($rc, $out, $err) = $node->psql('postgres', "\\set VERBOSITY verbose\nSET ROLE $role;\n$sql");

	return $err =~ /(?:ERROR|WARNING|NOTICE):  (.*)/ ? "$out$1" : $out;
}

# In the configuration file this holds what is queued, or lets it go.
sub hold
{
	my ($on) = @_;

	$node->append_conf('postgresql.conf', 'omni_refresh.enabled = ' . ($on ? 'off' : 'on') . "\n");
	$node->reload;
	sql('SELECT omni_refresh_wake()') if !$on;
	return;
}

# Queues something while the queue is held; returns its number.
sub queue
{
	my ($arguments, $role) = @_;

	return sql('SET ROLE ' . ($role // 'loader') . "; SET omni_refresh.enabled = on; SELECT id FROM omni_refresh_on_commit('$model'"
		. ($arguments ? ", $arguments)" : ')'));
}

sub job
{
	my ($id, $columns) = @_;

	return sql('SELECT ' . ($columns // 'status') . " FROM omni_refresh_job WHERE id = $id");
}

# A job that has failed at once
sub failed
{
	my ($role, $arguments) = @_;

	$omni->fault('answer', status => 400, body => '{"detail": "no", "status": 400}');
	my $id = queue($arguments, $role);
	wait_for("a job of ${role}'s is refused", "status = 'failed' FROM omni_refresh_job WHERE id = $id");
	return $id;
}

# Cancel

sql('ALTER SYSTEM RESET ALL; GRANT SET ON PARAMETER omni_refresh.enabled TO loader, other, keeper, boss');
hold(1);
my $id = queue();
like(as('other', "SELECT omni_refresh_cancel($id)"), qr/^42501: permission denied for job $id$/, 'a job is not for everyone to cancel');
like(as('loader', 'SELECT omni_refresh_cancel(0)'), qr/^42704: job 0 does not exist$/, 'one that is none cannot be');
like(as('loader', 'SELECT omni_refresh_cancel(NULL)'), qr/^22004: id must not be null$/, '... nor can NULL');
is(as('loader', "BEGIN; SELECT omni_refresh_cancel($id); ROLLBACK"), 't', 'its requester may cancel it');
is(job($id), 'pending', '... which is undone by a rollback');
is(story($id), '', '... without a trace');
is(as('boss', "SELECT omni_refresh_cancel($id)"), 't', 'who has the privileges of its requester may');
is(job($id, 'status, finished_at >= requested_at, attempts, error IS NULL'), 'canceled|t|0|t', '... and its row says so');
is(sql("SELECT event, detail FROM omni_refresh_event WHERE job = $id ORDER BY id"), "canceled|by \"boss\"", '... and the log says who');
is(as('loader', "SELECT omni_refresh_cancel($id)"), 'f', 'a second time there is nothing to cancel');
is(sql("SELECT omni_refresh_cancel(" . queue() . ')'), 't', 'a superuser may');
sql('ALTER TABLE omni_refresh_job OWNER TO keeper');
is(as('keeper', "SELECT omni_refresh_cancel(" . queue() . ')'), 't', 'the owner of the table may');
sql('ALTER TABLE omni_refresh_job OWNER TO CURRENT_USER');
is(as('loader', "SET omni_refresh.enabled = on; BEGIN; SELECT omni_refresh_cancel(id) FROM omni_refresh_on_commit('$model'); COMMIT"), 't',
	'what this transaction has queued can be canceled');
hold(0);
is(sql(q{SELECT count(*) FROM omni_refresh_job WHERE status <> 'canceled'}), '0', 'nothing else is there');
is(scalar($omni->requests), 0, '... and nothing is sent');

$omni->fault('hang');
$id = queue();
$omni->wait_for_requests(1);
is(sql("SELECT omni_refresh_cancel($id)"), 'f', 'what is being sent cannot be canceled');
$omni->reset;
wait_for('... and goes on', "status IN ('accepted', 'pending') FROM omni_refresh_job WHERE id = $id");
wait_for('... to its end', "status = 'accepted' FROM omni_refresh_job WHERE id = $id");
is(sql("SELECT omni_refresh_cancel($id)"), 'f', 'what is at its end cannot be canceled');
is(job($id), 'accepted', '... and stays what it is');

# What was merged into it is put back.

hold(1);
my @merged = map { queue("schemas => '{s$_}'") } 1 .. 3;
$omni->reset;
$omni->fault('close', times => -1);
hold(0);
wait_for('a set of jobs waits for another attempt', "count(*) = 2 FROM omni_refresh_job WHERE merged_into = $merged[0] AND status = 'merged'
	AND (SELECT attempts >= 1 AND status = 'pending' FROM omni_refresh_job WHERE id = $merged[0])");
hold(1);
wait_for('... and is held there', "status = 'pending' FROM omni_refresh_job WHERE id = $merged[0]");
is(as('loader', "BEGIN; SELECT omni_refresh_cancel($merged[0]); ROLLBACK"), 't', 'the job that carries out others is canceled');
is(job($merged[1]), 'merged', '... in vain if rolled back');
is(sql("SELECT omni_refresh_cancel($merged[1])"), 'f', 'one that is merged has no more to cancel');
is(sql("SELECT omni_refresh_cancel($merged[0])"), 't', 'the job that carries out others is canceled for good');
is(job($merged[0], 'status, attempts > 0'), 'unknown|t', '... after an attempt that may have arrived');
is(sql("SELECT string_agg(concat_ws(' ', status, merged_into, finished_at), ', ') FROM omni_refresh_job WHERE id IN ($merged[1], $merged[2])"),
	'pending, pending', '... and the others are pending again');
is(story($merged[1]), 'released', '... as the log says');
is(sql("SELECT detail FROM omni_refresh_event WHERE job = $merged[2] AND event = 'released'"), "job $merged[0] was canceled", '... and why');
$omni->reset;
hold(0);
wait_for('they are carried out, together', "string_agg(concat_ws(' ', status, merged_into), ', ' ORDER BY id) = 'accepted, merged $merged[1]'
	FROM omni_refresh_job WHERE id IN ($merged[1], $merged[2])");
is(story($merged[2]), 'released', '... as the log says');
my ($request) = $omni->requests(qr/refresh/);
like($request->{query} // $request->{path}, qr/s2%2cs3/i, '... without the one that was canceled');
unlike($request->{query} // $request->{path}, qr/s1/, '... indeed');

# Cancel and the worker at once, and two who cancel; Omni does not know these models

$omni->reset;
my @sessions = map { OmniLife::session($node, 'postgres') } 1 .. 2;
my %count;
for my $round (1 .. 40)
{
	my $job = sql("SELECT id FROM omni_refresh_on_commit(gen_random_uuid(), schemas => '{round$round}')");
	$_->send("SELECT omni_refresh_cancel($job)") for @sessions;
	my @said = map { ($_->answer)[0] } @sessions;
	$count{ join '', sort @said }++;
	sql("DO \$\$ BEGIN WHILE EXISTS (SELECT FROM omni_refresh_job WHERE id = $job AND status IN ('pending', 'sending'))
		LOOP PERFORM pg_sleep(0.005); END LOOP; END \$\$");
	my $canceled = grep { $_ eq 't' } @said;
	my $sent = grep { ($_->{query} // $_->{path}) =~ /round$round\b/ } $omni->requests(qr/refresh/);
	if ($canceled > 1 || $canceled + $sent != 1 || job($job) ne ($canceled ? 'canceled' : 'failed'))
	{
		fail("round $round: said (@said), sent $sent times, ends as " . job($job) . ': ' . story($job));
	}
}
$_->quit for @sessions;
is(($count{ft} // 0) + ($count{ff} // 0), 40, 'a job is either canceled, by one, or sent');
note(join ', ', map { "$_: $count{$_}" } sort keys %count);

# Retry

$omni->reset;
$omni->set(branch_based_refresh => 1);
my $failed = failed('loader', "schemas => '{a,b}', branch => '" . $omni->branch . q{'});
like(as('other', "SELECT omni_refresh_retry($failed)"), qr/^42501: permission denied for job $failed$/, 'a job is not for everyone to repeat');
like(as('loader', 'SELECT omni_refresh_retry(0)'), qr/^42704: job 0 does not exist$/, 'one that is none cannot be');
like(as('loader', 'SELECT omni_refresh_retry(NULL)'), qr/^22004: id must not be null$/, '... nor can NULL');
my $jobs = sql('SELECT count(*) FROM omni_refresh_job');
like(as('loader', "BEGIN; SELECT status FROM omni_refresh_retry($failed); ROLLBACK"), qr/^pending$/, 'its requester may repeat it');
is(sql('SELECT count(*) FROM omni_refresh_job'), $jobs, '... but not if the transaction is rolled back');
my $again = as('loader', "SELECT id FROM omni_refresh_retry($failed)");
wait_for('it is sent once it is committed', "status = 'accepted' FROM omni_refresh_job WHERE id = $again");
is(job($again, 'origin, model_id, branch_id, hard, schemas, tables, server, requested_by'),
	"retry|$model|" . $omni->branch . '|f|{a,b}||omni|loader', '... as it was');
is(job($failed), 'failed', '... and what failed stays what it is');
for my $status ('pending', 'sending', 'running', 'completed', 'accepted')
{
	hold(1) if $status eq 'pending';
	sql("UPDATE omni_refresh_job SET status = '$status' WHERE id = $again");
	like(as('loader', "SELECT omni_refresh_retry($again)"), qr/^55000: job $again is $status$/, "what is $status is not repeated");
}
for my $status ('canceled', 'unknown', 'failed')
{
	sql("UPDATE omni_refresh_job SET status = '$status' WHERE id = $again");
	like(as('loader', "SELECT status FROM omni_refresh_retry($again)"), qr/^canceled.*enabled/, "what is $status is, if who asks is not switched off");
}
sql("DELETE FROM omni_refresh_job WHERE status = 'pending'");
sql("UPDATE omni_refresh_job SET status = 'merged', merged_into = $failed WHERE id = $again");
hold(0);
like(as('loader', "SELECT status, schemas FROM omni_refresh_retry($again)"), qr/^pending\|\{a,b\}$/, 'what was merged into one that failed is repeated');
sql("UPDATE omni_refresh_job SET merged_into = $merged[1] WHERE id = $again");
like(as('loader', "SELECT omni_refresh_retry($again)"), qr/^55000: job $merged[1] is accepted$/, '... but not if that one did not fail');

sql("CREATE USER MAPPING FOR boss SERVER omni OPTIONS (api_key 'the-key-of-boss')");
$omni->reset;
$omni->set(key => 'the-key-of-boss', branch_based_refresh => 1);
$again = as('boss', "SELECT id FROM omni_refresh_retry($failed)");
wait_for('who repeats the job of another uses a key of his own', "status = 'accepted' AND requested_by = 'boss' FROM omni_refresh_job WHERE id = $again");
$omni->set(key => $omni->key);

my $reset = as('loader', "SELECT id FROM omni_refresh_cache_on_commit('$model', 'every hour', '2026-01-02 03:04:05.678901+00')");
wait_for('a reset of a cache is done', "status <> 'pending' AND status <> 'sending' FROM omni_refresh_job WHERE id = $reset");
sql("UPDATE omni_refresh_job SET status = 'unknown' WHERE id = $reset");
is(as('loader', "SELECT kind, policy, reset_at = '2026-01-02 03:04:05.678901+00', hard FROM omni_refresh_retry($reset)"), 'cache|every hour|t|',
	'... and repeated as it was');
sql('ALTER SERVER omni RENAME TO gone');
like(as('loader', "SELECT omni_refresh_retry($failed)"), qr/^42704: server "omni" does not exist$/, 'a server that is gone is an error');
sql('ALTER SERVER gone RENAME TO omni');
like(as('loader', "SET omni_refresh.enabled = off; SELECT status FROM omni_refresh_retry($failed)"), qr/^canceled/, 'who is switched off repeats nothing');
wait_for('all is done', q{count(*) = 0 FROM omni_refresh_job WHERE status IN ('pending', 'sending')});

# Retention

sql(q{TRUNCATE omni_refresh_job, omni_refresh_event});
$omni->fault('answer', status => 503, headers => { 'Retry-After' => 3000 });
my $waiting = queue("schemas => '{w}'");
wait_for('a job waits for another attempt', "attempts = 1 AND status = 'pending' FROM omni_refresh_job WHERE id = $waiting");
my $insert = q{INSERT INTO omni_refresh_job (status, model_id, kind, hard, schemas, server, origin, requested_by, requested_by_oid, requested_at, run_at,
	finished_at, merged_into, database) SELECT status, gen_random_uuid(), 'schema', false, '{w}', 'omni', 'on_commit', 'loader', 'loader'::regrole,
	finished_at, finished_at, finished_at, nullif(carrier, 0), (SELECT oid FROM pg_database WHERE datname = current_database())};
sql("$insert FROM generate_series(1, 3000), LATERAL (VALUES ('completed', now() - interval '2 h', 0)) AS v (status, finished_at, carrier);
	$insert FROM (VALUES ('merged', now() - interval '2 h', $waiting), ('failed', now() - interval '2 h', 0), ('failed', now(), 0)) AS v (status, finished_at, carrier);
	INSERT INTO omni_refresh_event (job, requested_by, requested_by_oid, occurred_at, event) SELECT id, requested_by, requested_by_oid, requested_at, 'sending' FROM omni_refresh_job WHERE status = 'completed'");
my $kept = sql(q{SELECT id FROM omni_refresh_job WHERE status = 'merged'});
my $old = sql(q{SELECT min(id) FROM omni_refresh_job WHERE status = 'failed'});
my $locker = OmniLife::session($node, 'postgres');
$locker->query("BEGIN; SELECT FROM omni_refresh_job WHERE id = $old FOR UPDATE");
my $reader = OmniLife::session($node, 'postgres');
$reader->query('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM omni_refresh_job');
is(sql(q{SELECT count(*) FROM omni_refresh_job}), '3004', 'as long as they are kept, they are kept');
$node->append_conf('postgresql.conf', "omni_refresh.retention = '1 h'\nomni_refresh.idle_timeout = 0\n");
$node->reload;
wait_for('old jobs are deleted, but for what is locked', "string_agg(status, ' ' ORDER BY id) = 'pending merged failed failed' FROM omni_refresh_job");
is(sql(q{SELECT count(*) FROM omni_refresh_event WHERE event = 'sending'}), '1', '... with their events');
is(($reader->query('SELECT count(*) FROM omni_refresh_job'))[0], '3004', '... while others look at them');
$reader->query('COMMIT');
$locker->query('COMMIT');
is(sql("SELECT omni_refresh_cancel($waiting)"), 't', 'what was merged is kept for as long as it may be put back');
is(job($kept), 'pending', '... as it is now');
$_->quit for $locker, $reader;

done_testing();
