# A job is repeated once: a second retry of it returns the first one, as long as that is unfinished or has
# succeeded, also if two sessions retry it at once. One statement repeats all jobs that an outage or a revoked
# key has failed, and changes nothing when it is run again.

use strict;
use warnings FATAL => 'all';

use Test::More;

use OmniFault;
use OmniLife;
use OmniRoles;

OmniRoles::start('retry_of');
OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
sql('CREATE ROLE loader LOGIN; CREATE ROLE boss LOGIN; GRANT loader TO boss');

# A job of loader's that has failed
sub failed
{
	my $columns = 'model_id, kind, hard, schemas, server, requested_by, requested_by_oid, database';

	return sql("INSERT INTO omni_refresh_job (status, origin, $columns, requested_at, run_at, finished_at, error)
		SELECT 'failed', 'on_commit', '$model', 'schema', false, '{a}', 'omni', 'loader', 'loader'::regrole, oid, now(), now(), now(), '08006: no'
		FROM pg_database WHERE datname = current_database() RETURNING id");
}

sub retry
{
	my ($id, $role) = @_;

	return as($role // 'loader', "SET omni_refresh.enabled = on; SELECT id FROM omni_refresh_retry($id)");
}

sub ends
{
	my ($id, $status) = @_;

	sql("UPDATE omni_refresh_job SET status = '$status', finished_at = now(), merged_into = NULL WHERE id = $id");
	return;
}

sub retries
{
	my ($id) = @_;

	return sql("SELECT count(*) FROM omni_refresh_job WHERE retry_of = $id");
}

sql('GRANT SET ON PARAMETER omni_refresh.enabled TO loader, boss');
hold(1);

# One after the other

my $job = failed();
my $first = retry($job);
is(sql("SELECT origin, status, retry_of FROM omni_refresh_job WHERE id = $first"), "retry|pending|$job", 'a retry says what it repeats');
is(sql("SELECT retry_of FROM omni_refresh_job WHERE id = $job"), '', '... and what it repeats was none');
for my $status (qw(pending sending running completed accepted))
{
	ends($first, $status);
	is(retry($job), $first, "a retry that is $status is enough");
}
is(retries($job), 1, '... so there is one');
my @retries = $first;
for my $status (qw(failed canceled unknown))
{
	ends($retries[-1], $status);
	push @retries, retry($job);
	isnt($retries[-1], $retries[-2], "one that is $status is not");
	is(retry($job), $retries[-1], '... but the one after it is');
}
is(retries($job), 4, '... so there are four');
ends($retries[-1], 'failed');
my $deep = retry($retries[-1]);
is(sql("SELECT retry_of FROM omni_refresh_job WHERE id = $deep"), $retries[-1], 'a retry is repeated');
is(retry($retries[-1]), $deep, '... once');

# One that was merged is what its carrier is.

my $merged = retry($job);
for my $status (qw(pending running accepted))
{
	ends($first, $status);
	sql("UPDATE omni_refresh_job SET status = 'merged', merged_into = $first WHERE id = $merged");
	is(retry($job), $merged, "a retry that was merged into a job that is $status is enough");
}
ends($first, 'failed');
$first = retry($job);
isnt($first, $merged, '... but not if that one fails');

# Each requester has retries of its own; nobody else's are found.

my $of_boss = retry($job, 'boss');
isnt($of_boss, $first, 'another requester repeats a job, too');
is(retry($job, 'boss'), $of_boss, '... once');
is(retry($job), $first, '... and the first one as before');
is(sql("SELECT string_agg(requested_by, ' ' ORDER BY id) FROM omni_refresh_job WHERE id IN ($first, $of_boss)"), 'loader boss', '... each for itself');
sql('ALTER ROLE boss RENAME TO chef; CREATE ROLE boss; GRANT loader TO boss; GRANT SET ON PARAMETER omni_refresh.enabled TO boss');
my $of_next = retry($job, 'boss');
isnt($of_next, $of_boss, 'a namesake is somebody else');

# Within a transaction

$job = failed();
is(as('loader', "SET omni_refresh.enabled = on; BEGIN; SAVEPOINT s; SELECT FROM omni_refresh_retry($job); ROLLBACK TO s;
	SELECT count(*) FROM omni_refresh_job WHERE retry_of = $job; SELECT count(DISTINCT id) FROM generate_series(1, 3), omni_refresh_retry($job); COMMIT") =~ s/^\n//r,
	"0\n1", 'one that is rolled back is none, and in a transaction there is one');
is(retries($job), 1, '... indeed');
is(as('loader', "SET omni_refresh.enabled = on; SET default_transaction_read_only = on; SELECT omni_refresh_retry($job)"), '25006', 'a transaction that is read-only repeats nothing');
is(as('loader', "SET omni_refresh.enabled = off; SELECT id, status, retry_of FROM omni_refresh_retry($job)"), "|canceled|$job", 'nor does who is switched off');

# At once

my @sessions = map { OmniLife::session($node, 'postgres') } 1 .. 2;
$_->query('SET ROLE loader; SET omni_refresh.enabled = on') for @sessions;
my ($one, $two) = @sessions;
my $blocked = "count(*) = 1 FROM pg_stat_activity WHERE pid = $two->{pid} AND wait_event_type = 'Lock'";
for my $level ('READ COMMITTED', 'REPEATABLE READ', 'SERIALIZABLE')
{
	for my $end ('COMMIT', 'ROLLBACK')
	{
		my $name = "$level, $end:";
		$two->query("BEGIN ISOLATION LEVEL $level; SELECT count(*) FROM omni_refresh_job");
		$job = failed();			# later than the snapshot
		$one->query('BEGIN');
		my ($id) = $one->query("SELECT id FROM omni_refresh_retry($job)");
		$two->send("SELECT id, status FROM omni_refresh_retry($job)");
		until_true("$name who repeats a job waits for who does", $blocked);
		$one->query($end);
		my ($out, $err) = $two->answer;
		like($out, qr/^\d+\|pending$/, '... gets a retry') or diag($err);
		($end eq 'COMMIT' ? \&is : \&isnt)->($out, "$id|pending", $end eq 'COMMIT' ? '... that one' : '... of its own');
		$two->query('COMMIT');
		is(retries($job), 1, '... and there is one');
	}
}

# Who retries while the job is deleted
$job = failed();
my $owner = OmniLife::session($node, 'postgres');
$owner->query("BEGIN; DELETE FROM omni_refresh_job WHERE id = $job");
$two->send("SELECT status, retry_of FROM omni_refresh_retry($job)");
until_true('who repeats a job that is being deleted waits', $blocked);
$owner->query('COMMIT');
is(($two->answer)[0], "pending|$job", '... and has repeated what it asked for');

# The worker waits for nobody who repeats a job.
$job = failed();
$one->query('BEGIN');
$one->query("SELECT id FROM omni_refresh_retry($job)");
sql("UPDATE omni_refresh_job SET status = 'canceled', finished_at = now() WHERE status IN ('pending', 'sending', 'running')");
hold(0);
is(sql("SELECT status FROM omni_refresh('$model')"), 'accepted', 'calls go on while a job is being repeated');
my $other = sql("SELECT id FROM omni_refresh_on_commit('$model')");
until_true('... and so does the queue', "status = 'accepted' FROM omni_refresh_job WHERE id = $other");
$one->query('COMMIT');
until_true('... and the retry, then', "status = 'accepted' FROM omni_refresh_job WHERE retry_of = $job");
$_->quit for @sessions, $owner;

# Many at once

hold(1);
$job = failed();
my $bench = OmniLife::bench($node, 'postgres', "SELECT id FROM omni_refresh_retry($job)", '-c', 8, '-t', 20);
OmniLife::benched($bench);
is(retries($job), 0, 'nobody has repeated it while the queue is held');
sql('ALTER ROLE loader SET omni_refresh.enabled = on');
$bench = OmniLife::bench($node, 'postgres', "SELECT id FROM omni_refresh_retry($job)", '-c', 8, '-t', 20, '-U', 'loader');
is(OmniLife::benched($bench), 0, 'eight sessions repeat a job');
is(retries($job), 1, '... once');
sql('ALTER ROLE loader RESET ALL');
sql('TRUNCATE omni_refresh_job');
hold(0);

# The recipe: what an outage or a revoked key has failed

my $recipe = <<'END';
WITH lost AS MATERIALIZED (
	SELECT id
	FROM omni_refresh_job AS job
	WHERE requested_by_oid = current_user::regrole
		AND (status = 'unknown' OR status = 'failed' AND error ~ '^(08|28|42501|53)')
		AND finished_at > now() - interval '1 day'
		AND NOT EXISTS (SELECT FROM omni_refresh_job AS retry
			WHERE retry.retry_of = job.id AND retry.requested_by_oid = job.requested_by_oid)
		AND NOT EXISTS (SELECT FROM omni_refresh_job AS later
			WHERE later.status IN ('completed', 'accepted') AND later.finished_at > job.requested_at
				AND later.sent_at > coalesce(job.renewed_at, job.requested_at)
				AND (later.server, later.kind, later.model_id) = (job.server, job.kind, job.model_id)
				AND (later.branch_id, later.policy) IS NOT DISTINCT FROM (job.branch_id, job.policy)
				AND (later.schemas IS NULL AND later.tables IS NULL AND later.hard >= job.hard
					OR (later.schemas, later.tables, later.hard) IS NOT DISTINCT FROM (job.schemas, job.tables, job.hard)
						AND coalesce(later.reset_at, later.sent_at) >= coalesce(job.reset_at, job.requested_at)))
	ORDER BY id)
SELECT retry.* FROM lost, omni_refresh_retry(lost.id) AS retry;
END
my $other_model = sql("SELECT id FROM omni_refresh_models() WHERE id <> '$model' LIMIT 1");

# Runs the recipe; returns the jobs that it has repeated.
sub recipe
{
	my ($role) = @_;

	return join ' ', split /\n/, as($role // 'loader', 'SET omni_refresh.enabled = on; ' . $recipe =~ s/SELECT retry\.\*/SELECT retry.retry_of/r);
}

# A job, by columns
sub row
{
	my %columns = (status => "'failed'", model_id => "'$model'", kind => "'schema'", hard => 'false', server => "'omni'", origin => "'on_commit'",
		requested_by => "'loader'", requested_by_oid => "'loader'::regrole", requested_at => q{now() - interval '10 min'}, finished_at => q{now() - interval '5 min'},
		error => "'08006: no'", database => '(SELECT oid FROM pg_database WHERE datname = current_database())', @_);
	my @names = sort keys %columns;

	return sql('INSERT INTO omni_refresh_job (' . join(', ', 'run_at', @names) . ') VALUES (' . join(', ', 'now()', @columns{@names}) . ') RETURNING id');
}

# A success after some job, or before it
sub success
{
	my ($later, @columns) = @_;

	return row(status => "'completed'", error => 'NULL', sent_at => 'now() - interval ' . ($later ? "'8 min'" : "'12 min'"), finished_at => "now() - interval '7 min'", @columns);
}

# An outage, and then a revoked key: jobs that were merged fail with their carrier, and are not repeated by
# themselves.

my $unfinished = q{status IN ('pending', 'sending', 'running')};
$node->append_conf('postgresql.conf', "omni_refresh.retry_for = '1 s'\n");
hold(1);
sql("SET ROLE loader; SET omni_refresh.enabled = on; SELECT FROM $_") for
	map({ "omni_refresh_on_commit($_)" } "'$model', schemas => '{a}'", "'$model', schemas => '{b}'", "'$other_model', schemas => '{c}'", "'$model', schemas => '{d}'"),
	"omni_refresh_cache_on_commit('$model', 'p')";
sql(q{ALTER SERVER omni OPTIONS (SET base_url 'http://127.0.0.1:1')});
hold(0);
until_true('an outage fails all', q{string_agg(status, ' ' ORDER BY id) = 'failed merged failed merged failed' FROM omni_refresh_job});
my @failed = split / /, sql(q{SELECT string_agg(id::text, ' ' ORDER BY id) FROM omni_refresh_job WHERE status = 'failed'});
hold(1);
is(recipe(), "@failed", 'the recipe repeats what has failed, and not what was merged into it');
is(recipe(), '', '... once');
is(recipe('boss'), '', '... and nothing of others');
sql("ALTER SERVER omni OPTIONS (SET base_url '${\ $omni->http}')");
$omni->set(key => 'another');
hold(0);
until_true('the key is revoked', q{count(*) = 6 FROM omni_refresh_job WHERE status = 'failed'});
hold(1);
my @again = split / /, sql(q{SELECT string_agg(id::text, ' ' ORDER BY id) FROM omni_refresh_job WHERE retry_of IS NOT NULL});
is(recipe(), "@again", 'it repeats the retries that have failed in their turn, and not what they have repeated');
is(recipe(), '', '... once');
$omni->set(key => $omni->key);
my $before = () = $omni->requests;
hold(0);
until_true('the key is valid again', "count(*) = 0 FROM omni_refresh_job WHERE $unfinished");
hold(1);
is(recipe(), '', '... and nothing is left to be repeated');
is(sql(q{SELECT string_agg(status, ' ' ORDER BY id) FROM omni_refresh_job WHERE id > } . $again[-1]), 'accepted accepted completed', '... since all is done');
my @requests = $omni->requests;
# libcurl 8 escapes in capitals
is(join(' ', sort map { lc($_->{query} || 'reset') } @requests[ $before .. $#requests ]),
	'hard_refresh=false&schemas=a%2cb%2cd hard_refresh=false&schemas=c reset', '... by three requests, for what was merged, too');

# A revoked key, and the rest: each case is what has failed, what else there is, and whether it is repeated.
my @cases = (
	[ 'a revoked key', { error => q{'28000: no'} }, [], 1 ],
	[ 'a key without rights', { error => q{'42501: no'} }, [], 1 ],
	[ 'too many requests', { error => q{'53000: no'} }, [], 1 ],
	[ 'bad arguments', { error => q{'22023: no'} }, [], 0 ],
	[ 'a model that is gone', { error => q{'42704: no'} }, [], 0 ],
	[ 'what is unknown', { status => q{'unknown'}, error => 'NULL' }, [], 1 ],
	[ 'what is canceled', { status => q{'canceled'}, error => 'NULL' }, [], 0 ],
	[ 'what is merged', { status => q{'merged'}, merged_into => 1 }, [], 0 ],
	[ 'what is pending', { status => q{'pending'} }, [], 0 ],
	[ 'what failed two days ago', { finished_at => q{now() - interval '2 days'} }, [], 0 ],
	[ q{another's job}, { requested_by_oid => '10' }, [], 0 ],
	[ 'what was done later', {}, [1], 0 ],
	[ 'what was done before', {}, [0], 1 ],
	[ 'what was renewed since', { renewed_at => q{now() - interval '7 min'} }, [1], 1 ],
	[ 'a hard one after a soft one', { hard => 'true' }, [1], 1 ],
	[ 'a soft one before a hard one', {}, [ 1, hard => 'true' ], 0 ],
	[ 'a part before the whole', { schemas => q{'{a}'} }, [1], 0 ],
	[ 'the whole before a part', {}, [ 1, schemas => q{'{a}'} ], 1 ],
	[ 'a part before the same', { tables => q{'{a}'} }, [ 1, tables => q{'{a}'} ], 0 ],
	[ 'a part before another', { schemas => q{'{a}'} }, [ 1, schemas => q{'{b}'} ], 1 ],
	[ 'one of a branch', { branch_id => "'$other_model'" }, [1], 1 ],
	[ 'one of the same branch', { branch_id => "'$other_model'" }, [ 1, branch_id => "'$other_model'" ], 0 ],
	[ 'one of another model', { model_id => "'$other_model'" }, [1], 1 ],
	[ 'one of a server', {}, [ 1, server => q{'another'} ], 1 ],
	[ 'a reset', { kind => q{'cache'}, policy => q{'p'}, hard => 'NULL' }, [1], 1 ],
	[ 'a reset before the same', { kind => q{'cache'}, policy => q{'p'}, hard => 'NULL' }, [ 1, kind => q{'cache'}, policy => q{'p'}, hard => 'NULL' ], 0 ],
	[ 'a reset before another', { kind => q{'cache'}, policy => q{'p'}, hard => 'NULL' }, [ 1, kind => q{'cache'}, policy => q{'q'}, hard => 'NULL' ], 1 ],
	[ 'a reset before an older one', { kind => q{'cache'}, policy => q{'p'}, hard => 'NULL' },
		[ 1, kind => q{'cache'}, policy => q{'p'}, hard => 'NULL', reset_at => q{now() - interval '1 h'} ], 1 ]);
for my $case (@cases)
{
	my ($name, $what, $success, $repeated) = @$case;
	sql('TRUNCATE omni_refresh_job');
	my $id = row(%$what);
	success(@$success) if @$success;
	is(recipe(), $repeated ? $id : '', 'the recipe and ' . $name . ($repeated ? '' : ': no'));
	is(recipe(), '', '... once') if $repeated;
}

$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/terminating background worker/);
done_testing();
