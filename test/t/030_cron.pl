# Who calls: pg_cron, whose every run is a session of its own, and procedures that load data and then
# refresh, of which no failure of Omni's may undo the load.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;

my $omni = OmniAPI->start;
my $node = OmniFault::node('main');
my $model = $omni->model;
my $nobody = '00000000-0000-0000-0000-000000000000';

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);

# A procedure that loads, commits, and refreshes, come what may

$node->safe_psql('postgres', q{
	CREATE TABLE loaded (what text);
	CREATE TABLE problem (sqlstate text, message text, detail text, hint text);
	GRANT ALL ON loaded, problem TO PUBLIC;
	CREATE PROCEDURE load(what text, model uuid) LANGUAGE plpgsql AS $$
	DECLARE
		problem problem;
	BEGIN
		INSERT INTO loaded VALUES (what);
		COMMIT;
		BEGIN
			PERFORM omni_refresh(model);
		EXCEPTION WHEN OTHERS THEN
			GET STACKED DIAGNOSTICS problem.sqlstate = RETURNED_SQLSTATE, problem.message = MESSAGE_TEXT,
				problem.detail = PG_EXCEPTION_DETAIL, problem.hint = PG_EXCEPTION_HINT;
			INSERT INTO problem VALUES (problem.*);
		END;
		INSERT INTO loaded VALUES (what || ', refreshed');
	END $$;
	CREATE PROCEDURE load_anyhow(what text, model uuid) LANGUAGE plpgsql AS $$
	DECLARE
		job omni_refresh_job;
	BEGIN
		INSERT INTO loaded VALUES (what);
		COMMIT;
		SET LOCAL omni_refresh.on_failure = warning;
		job := omni_refresh(model);
		INSERT INTO loaded VALUES (what || ', ' || job.status);
	END $$;
	CREATE PROCEDURE load_and_wait(what text, model uuid) LANGUAGE plpgsql AS $$
	DECLARE
		job omni_refresh_job;
	BEGIN
		INSERT INTO loaded VALUES (what);
		job := omni_refresh_on_commit(model);
		CALL omni_refresh_await(job.id, job => job);
		INSERT INTO loaded VALUES (what || ', ' || job.status);
	END $$});
sub loaded
{
	my $loaded = $node->safe_psql('postgres',
		q{SELECT string_agg(what, '; ' ORDER BY what) FROM loaded});
	$node->safe_psql('postgres', 'TRUNCATE loaded');
	return $loaded;
}

my $call = OmniFault::call($node, "CALL load('a', '$model'); CALL load_anyhow('b', '$model')");
is("$call->{status}$call->{err}", '0', 'a procedure that loads and refreshes') or diag($call->{err});
is(loaded(), 'a; a, refreshed; b; b, accepted', '... does both');
$call = OmniFault::call($node, "CALL load('a', '$nobody'); CALL load_anyhow('b', '$nobody')");
is($call->{status}, 0, 'if the refresh fails, it goes on') or diag($call->{err});
is($call->{sqlstate}, '42704', '... with a warning where that was asked for');
is(loaded(), 'a; a, refreshed; b; b, failed', '... and the load is done');
is($node->safe_psql('postgres', q{SELECT sqlstate, message, detail, hint <> '' FROM problem}),
	'42704|server "omni" refused the refresh: HTTP status 404|Omni says: No such model|t',
	'... and the handler knows what has happened');
is($node->safe_psql('postgres', q{SELECT string_agg(status, ' ' ORDER BY id) FROM omni_refresh_job}),
	'accepted accepted failed failed', '... and the jobs are on record');

# Any kind of failure can be caught, but that of a cancel
for my $fault (qw(hang reset html_502 huge nested echo_key redirect))
{
	$omni->fault($fault, times => -1);
	$call = OmniFault::call($node, "SET omni_refresh.call_timeout = '500 ms'; CALL load('a', '$model');
		CALL load_anyhow('b', '$model')");
	is($call->{status}, 0, "$fault is survived") or diag($call->{err});
	like(loaded(), qr/^a; a, refreshed; b; b, (failed|unknown)$/, '... by both');
	$omni->fault('none');
}
$omni->reset;
$omni->fault('hang');
my $canceled = OmniFault::begin($node, "CALL load('a', '$model')", app => 'canceled');
$omni->wait_for_requests(1);
$node->safe_psql('postgres',
	q{SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = 'canceled'});
is(OmniFault::finish($canceled)->{sqlstate}, '57014', 'a cancel is not survived');
is(loaded(), 'a', '... but the load is, if it was committed');
$omni->reset;

# In a subtransaction that is rolled back, in a cursor loop, in a trigger
$call = OmniFault::call($node, qq{
	BEGIN;
	SAVEPOINT s;
	SELECT omni_refresh('$nobody');
	ROLLBACK TO s;
	SELECT status FROM omni_refresh('$model');
	COMMIT} =~ s/^/\\set ON_ERROR_STOP off\n/r);
like($call->{out}, qr/accepted/, 'after a rollback to a savepoint, calls go on');
$call = OmniFault::call($node, qq{BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY;
	SELECT 1 FROM pg_class LIMIT 1; SELECT status FROM omni_refresh('$model'); COMMIT});
like($call->{out}, qr/accepted/, 'a serializable, read-only transaction gets its row, too') or diag($call->{err});

# pg_cron. Its version 1.4 knows no seconds, but "@reboot": each run of the server is one of these

SKIP:
{
	my $version = $node->safe_psql('postgres', q{SELECT max(default_version) FROM pg_available_extensions WHERE name = 'pg_cron'});
	skip 'pg_cron is not installed', 1 if $version eq '';

	$node->append_conf('postgresql.conf', <<'EOF');
shared_preload_libraries = 'pg_cron'
cron.database_name = 'postgres'
cron.use_background_workers = on
EOF
	$node->restart;
	my $id = $node->safe_psql('postgres', q{SELECT max(id) FROM omni_refresh_job WHERE status = 'accepted'});
	$node->safe_psql('postgres', qq{
		CREATE EXTENSION pg_cron;
		CREATE ROLE loader LOGIN;
		CREATE ROLE stranger LOGIN;
		GRANT USAGE ON SCHEMA cron TO loader, stranger;
		SELECT cron.schedule('good', '\@reboot', 'SELECT * FROM omni_refresh(''$model'')');
		SELECT cron.schedule('bad', '\@reboot', 'SELECT * FROM omni_refresh(''$nobody'')');
		SELECT cron.schedule('load', '\@reboot', 'CALL load(''load'', ''$nobody'')');
		SELECT cron.schedule('wait', '\@reboot', 'CALL load_and_wait(''wait'', ''$model'')');
		SELECT cron.schedule('await', '\@reboot', 'CALL omni_refresh_await($id)');
		SET ROLE loader;
		SELECT cron.schedule('loader', '\@reboot', 'SELECT * FROM omni_refresh(''$model'')');
		SET ROLE stranger;
		SELECT cron.schedule('stranger', '\@reboot', 'SELECT * FROM omni_refresh(''$model'')');
		RESET ROLE;
		REVOKE USAGE ON FOREIGN SERVER omni FROM PUBLIC;
		GRANT USAGE ON FOREIGN SERVER omni TO loader;
		TRUNCATE problem;
		DELETE FROM omni_refresh_job WHERE id <> $id});
	$node->restart;
	ok($node->poll_query_until('postgres', q{
			SELECT count(*) = 7 FROM cron.job_run_details WHERE status IN ('succeeded', 'failed')}),
		'pg_cron runs its jobs');
	is($node->safe_psql('postgres', q{
			SELECT jobname, status, return_message ~ 'HTTP status 404', return_message ~ 'permission denied'
			FROM cron.job_run_details JOIN cron.job USING (jobid) ORDER BY jobname}),
		"await|succeeded|f|f\nbad|failed|t|f\ngood|succeeded|f|f\nload|succeeded|f|f\nloader|succeeded|f|f\nstranger|failed|f|t\nwait|succeeded|f|f",
		'... and knows how each of them ended');
	is($node->safe_psql('postgres', q{
			SELECT string_agg(requested_by || ' ' || status, ', ' ORDER BY requested_by = 'loader', status)
			FROM omni_refresh_job WHERE id <> } . $id) =~ s/\S+ (failed|accepted)/$1/gr,
		'accepted, accepted, failed, failed, accepted', '... as do our jobs');
	is(loaded(), 'load; load, refreshed; wait; wait, accepted', 'a load survives a failed refresh there, and can wait, too');
	is($node->safe_psql('postgres', 'SELECT string_agg(sqlstate, \' \') FROM problem'), '42704', '... and knows of it');
	is($node->safe_psql('postgres', q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'}),
		'1', 'one worker served them all');
}
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');

done_testing();
