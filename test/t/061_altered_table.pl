# Who owns our tables may alter them as he likes: that may fail every request, with an error that says
# so, but it crashes neither the server nor the worker, and all is well once it is undone.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
my $node = OmniFault::node('altered', conf => "omni_refresh.min_interval = 0\nomni_refresh.track = on\n");
my $model = $omni->model;
my @databases = map { "altered$_" } 1 .. 4;
my @cases;						# not run yet
my $seen = 0;					# of the log, in bytes

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

# What every case begins with, and so undoes what the last one did. The views and the policies would
# keep most columns from being altered.
my $fresh = qq{
	SET client_min_messages = error;
	DROP EXTENSION IF EXISTS omni_refresh CASCADE;
	CREATE EXTENSION omni_refresh;
	CREATE SERVER omni FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url '${\ $omni->http}', rate_limit '0');
	GRANT USAGE ON FOREIGN SERVER omni TO PUBLIC;
	CREATE USER MAPPING FOR PUBLIC SERVER omni OPTIONS (api_key '${\ $omni->key}');
	ALTER TABLE omni_refresh_job OWNER TO alice;
	ALTER TABLE omni_refresh_event OWNER TO alice;
};
my $no_views = q{
	ALTER EXTENSION omni_refresh DROP VIEW omni_refresh_status;
	ALTER EXTENSION omni_refresh DROP VIEW omni_refresh_freshness;
	ALTER EXTENSION omni_refresh DROP FUNCTION omni_refresh_outcomes;
	DROP VIEW omni_refresh_status, omni_refresh_freshness;
	DROP FUNCTION omni_refresh_outcomes;
};
my $bare = $no_views . q{
	SET ROLE alice;
	DROP POLICY omni_refresh_job_own ON omni_refresh_job;
	DROP POLICY omni_refresh_event_own ON omni_refresh_event;
	ALTER TABLE omni_refresh_event DROP CONSTRAINT omni_refresh_event_job_fkey, DROP CONSTRAINT omni_refresh_event_event_check,
		DROP CONSTRAINT omni_refresh_event_pkey;
	ALTER TABLE omni_refresh_job DROP CONSTRAINT omni_refresh_job_pkey, DROP CONSTRAINT omni_refresh_job_status_check,
		DROP CONSTRAINT omni_refresh_job_kind_check, DROP CONSTRAINT omni_refresh_job_origin_check;
	DROP INDEX omni_refresh_job_queue_idx, omni_refresh_job_refreshing_idx, omni_refresh_job_active_idx, omni_refresh_job_finished_idx, omni_refresh_event_attempt_idx, omni_refresh_event_job_idx;
	RESET ROLE;
};

# Fills both tables with jobs of every kind that the worker or a function reads, whatever the columns
# are by now: one of them is NULL, or holds the first of some values that its type takes.
$node->safe_psql('postgres', 'CREATE ROLE alice LOGIN');
my $functions = qq{
	CREATE DOMAIN texts AS text;
	GRANT ALL ON SCHEMA public TO PUBLIC;
	CREATE FUNCTION put(place text, "row" jsonb, odd text, is_null bool) RETURNS void LANGUAGE plpgsql AS \$\$
	DECLARE
		names text;
		value jsonb;
	BEGIN
		SELECT string_agg(quote_ident(attname), ', ') INTO names FROM pg_attribute
		WHERE attrelid = place::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
			AND ("row" ? attname OR attname = odd);
		odd := coalesce(odd, '');
		FOR value IN SELECT CASE WHEN turn = 1 THEN "row"->odd ELSE v END
			FROM jsonb_array_elements('[null, "7", "{7}", "2020-01-01", "1 s", "x", true, null]') WITH ORDINALITY AS t (v, turn)
		LOOP
			IF is_null THEN
				value := 'null';
			END IF;
			BEGIN
				EXECUTE format('INSERT INTO %1\$s (%2\$s) OVERRIDING SYSTEM VALUE SELECT %2\$s FROM jsonb_populate_record(NULL::%1\$s, \$1)', place, names)
				USING "row" || jsonb_build_object(odd, value);
				RETURN;
			EXCEPTION WHEN OTHERS THEN
				NULL;
			END;
		END LOOP;
	END \$\$;
	CREATE FUNCTION seed(odd_job text, odd_event text, is_null bool) RETURNS void LANGUAGE plpgsql AS \$\$
	DECLARE
		number int := 1000;
		what jsonb;
		base jsonb := jsonb_build_object('model_id', '$model', 'kind', 'schema', 'hard', false, 'schemas', '{s}', 'tables', NULL,
			'server', 'omni', 'origin', 'on_commit', 'requested_by', current_user, 'requested_by_oid', current_user::regrole::oid,
			'requested_at', now(), 'run_at', now(), 'sent_at', now(), 'finished_at', NULL, 'attempts', 1,
			'database', (SELECT oid FROM pg_database WHERE datname = current_database()));
	BEGIN
		FOR what IN SELECT jsonb_array_elements('[
			{"status": "failed", "finished_at": "2020-01-01", "error": "00000: x"},
			{"status": "pending", "attempts": 0}, {"status": "pending", "schemas": null, "tables": "{t}"},
			{"status": "pending", "attempts": 0, "schemas": "{s,t}"}, {"status": "pending", "attempts": 0, "hard": true, "schemas": null},
			{"status": "pending", "attempts": 0, "kind": "cache", "schemas": null, "policy": "p", "reset_at": "2020-01-01"},
			{"status": "pending", "attempts": 0, "kind": "cache", "schemas": null, "policy": "p"},
			{"status": "pending", "origin": "call"}, {"status": "sending", "origin": "call"}, {"status": "sending"},
			{"status": "pending", "database": 1}, {"status": "running", "database": 1},
			{"status": "running", "job_id": "98c7ad96-5c04-4fb7-b33a-1389a65d16ed"}, {"status": "running"},
			{"status": "pending", "attempts": 0, "server": "nowhere"},
			{"status": "merged", "merged_into": 1001}]')
		LOOP
			PERFORM put('omni_refresh_job', base || what || jsonb_build_object('id', number), odd_job, is_null);
			PERFORM put('omni_refresh_event', jsonb_build_object('id', 10 * number + n, 'job', number, 'requested_by', current_user, 'requested_by_oid', 10,
				'occurred_at', now(), 'event', event, 'attempt', 1, 'duration', '1 s', 'detail', '08006: x'), odd_event, is_null)
			FROM unnest('{sending, recovered, attempt_failed}'::text[]) WITH ORDINALITY AS t (event, n);
			number := number + 1;
		END LOOP;
	END \$\$};
for my $database (@databases)
{
	$node->safe_psql('postgres', "CREATE DATABASE $database TEMPLATE template0");
	$node->safe_psql($database, $functions);
}

# All that the extension can do. The worker begins anew, and finds what an earlier one has left.
my $use = qq{
	SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
		WHERE backend_type = 'omni_refresh worker' AND datname = current_database();
	SET omni_refresh.call_timeout = '200 ms';
	SELECT omni_refresh('$model');
	SET omni_refresh.on_failure = warning;
	SELECT omni_refresh('$model', schemas => '{s}');
	SELECT omni_refresh_cache('$model', 'p');
	SELECT omni_refresh_on_commit('$model', schemas => '{s}');
	SELECT omni_refresh_cache_on_commit('$model', 'p');
	SELECT omni_refresh_wait(1001, '40 ms');
	SELECT omni_refresh_wait(1012, '40 ms');
	SELECT omni_refresh_cancel(1001);
	SELECT omni_refresh_cancel(1014);
	SELECT omni_refresh_retry(1000);
	SELECT omni_refresh_retry(1015);
	SELECT omni_refresh_wake();
	SELECT * FROM omni_refresh_status;
	SELECT * FROM omni_refresh_check();
	SELECT omni_refresh('$model');
};

# What the log has to say of a crash since the last time that this was asked.
sub crashes
{
	my $text = substr(slurp_file($node->logfile), $seen);

	$seen += length $text;
	return join "\n", $text =~ /^.*(?:terminated by signal|TRAP|PANIC).*$/mg;
}

# Uses altered tables, each in a database of its own. Returns what there is to say of a crash.
sub run
{
	my @sessions = map { OmniFault::begin($node, "\\unset ON_ERROR_STOP\n$_[$_]{sql}", db => $databases[$_]) } 0 .. $#_;
	my @lost = grep { /server closed the connection|connection to server was lost/ } map { OmniFault::finish($_)->{err} } @sessions;
	my $crashes = crashes();

	OmniLife::until_true('a session is lost', sub { $crashes ||= crashes() }) if @lost;
	$node->poll_query_until('postgres', 'SELECT true') or die if $crashes ne '';
	return $crashes;
}

# Alters, fills the tables, and uses them: several at a time, and if anything crashes each by itself.
sub altered
{
	my ($name, $alter, %more) = @_;

	push @cases, {
		name => $name,
		sql => $fresh . ($more{bare} // 1 ? $bare : '') . "SET ROLE alice; $alter; RESET ROLE;\nRESET client_min_messages;\n"
		  . sprintf('SELECT seed(%s, %s, %s);', (map { defined $_ ? "'$_'" : 'NULL' } @more{ 'job', 'event' }), $more{null} ? 'true' : 'false')
		  . $use } if defined $name;
	return if defined $name && @cases < @databases;

	my $together = run(@cases);
	my $failed = 0;
	for my $case (@cases)
	{
		my $crashes = $together eq '' ? '' : run({ sql => $case->{sql} . $use });
		$failed++ if !is($crashes, '', "$case->{name}: nothing crashes");
	}
	is($together, '', '... nor do these: ' . join ', ', map { $_->{name} } @cases) if !$failed;
	@cases = ();
	return;
}

# The columns as the extension makes them

$node->safe_psql('postgres', $fresh);
my %columns;
for my $table ('job', 'event')
{
	push @{ $columns{$table} }, [ split /\|/ ] for split /\n/, $node->safe_psql('postgres', qq{
		SELECT attname, format_type(atttypid, NULL), attnotnull FROM pg_attribute
		WHERE attrelid = 'omni_refresh_$table'::regclass AND attnum > 0 ORDER BY attnum});
}
my %types = (
	'bigint' => [ 'int', 'numeric', 'text' ],
	'integer' => [ 'bigint', 'text' ],
	'text' => [ 'varchar', 'name', 'int', 'text[]', 'texts' ],
	'uuid' => [ 'text', 'bytea', 'int' ],
	'name' => [ 'text', 'varchar', 'int' ],
	'boolean' => [ 'text', 'int' ],
	'oid' => [ 'bigint', 'int', 'text' ],
	'text[]' => [ 'text', 'varchar[]', 'name[]', 'int[]' ],
	'timestamp with time zone' => [ 'timestamp', 'date', 'text', 'bigint' ],
	'interval' => [ 'text', 'bigint' ]);
is($node->safe_psql($databases[0], "$fresh SELECT seed(NULL, NULL, false);
		SELECT (SELECT count(*) FROM omni_refresh_job), (SELECT count(*) FROM omni_refresh_event)") =~ s/\A\n//r, '16|48', 'the tables are filled');
altered('nothing altered', 'SELECT 1', bare => 0);

for my $table ('job', 'event')
{
	for my $column (@{ $columns{$table} })
	{
		my ($name, $type, $not_null) = @$column;
		my $alter = "ALTER TABLE omni_refresh_$table";
		my $free = $name eq 'id' ? "$alter ALTER id DROP IDENTITY;" : '';

		altered("$table.$name is NULL", "$free $alter ALTER $name DROP NOT NULL", $table => $name, null => 1);
		altered("$table.$name is $_", "$free $alter ALTER $name DROP DEFAULT, ALTER $name TYPE $_ USING NULL", $table => $name)
			for @{ $types{$type} };
		altered("$table.$name is gone", "$alter DROP $name");
		altered("$table.$name has another name", "$alter RENAME $name TO other", $table => 'other');
	}
	altered("$table has one column more, $_", "ALTER TABLE omni_refresh_$table ADD more $_", $table => 'more', bare => 0)
		for 'int', 'int NOT NULL', 'int NOT NULL DEFAULT 1', 'timestamptz DEFAULT clock_timestamp()', 'text CHECK (more IS NOT NULL)',
		'bigint GENERATED ALWAYS AS (id * 2) STORED', 'bigint GENERATED ALWAYS AS (1 / (id - id)) STORED', 'texts[]';
	altered("$table.id: $_", "ALTER TABLE omni_refresh_$table ALTER id $_", bare => 0)
		for 'DROP IDENTITY', 'SET GENERATED BY DEFAULT', 'SET MINVALUE -10 RESTART WITH -5';
	altered("$table: rule $_", "CREATE RULE odd AS ON $_", bare => 0)
		for map { my $to = $_; map { sprintf $_, $to, "omni_refresh_$table" }
			'%s TO %s DO INSTEAD NOTHING', '%s TO %s DO INSTEAD SELECT 1', '%s TO %s DO ALSO SELECT 1' } 'INSERT', 'UPDATE', 'DELETE';
	altered("$table has a child with the same rows", "CREATE TABLE child_$table () INHERITS (omni_refresh_$table);
		CREATE RULE same AS ON INSERT TO omni_refresh_$table DO ALSO INSERT INTO child_$table SELECT NEW.*");
	altered("$table: row-level security for its owner", "ALTER TABLE omni_refresh_$table FORCE ROW LEVEL SECURITY");
}
altered('job.attempts has no default', 'ALTER TABLE omni_refresh_job ALTER attempts DROP DEFAULT', bare => 0);
altered();

# What is wrong is told: once by the worker in the log, by the doctor, and by those who ask

for my $case (
	[ 'job', 'a column that may be NULL', 'ALTER server DROP NOT NULL', 'ALTER server SET NOT NULL' ],
	[ 'job', 'a column of another name', 'RENAME error TO other', 'RENAME other TO error' ],
	[ 'job', 'a column of another type', 'ALTER model_id TYPE text', 'ALTER model_id TYPE uuid USING model_id::uuid' ],
	[ 'job', 'a list of another type', 'ALTER schemas TYPE varchar[]', 'ALTER schemas TYPE text[]' ],
	[ 'job', 'a column that is gone', 'DROP reset_at', 'ADD reset_at timestamptz' ],
	[ 'event', 'a column that may be NULL', 'ALTER requested_by DROP NOT NULL', 'ALTER requested_by SET NOT NULL' ],
	[ 'event', 'a column of another type', 'ALTER detail TYPE varchar', 'ALTER detail TYPE text' ],
	[ 'event', 'a column that is gone', 'DROP http_status', 'ADD http_status int' ])
{
	my ($table, $name, $do, $undo) = @$case;
	my $sql = sub { return $node->safe_psql('postgres', @_) };
	my $log;

	$name = "omni_refresh_$table: $name";
	$sql->("$fresh $no_views");
	$sql->("SELECT omni_refresh('$model')");
	my $worker = OmniFault::worker($node);
	$log = -s $node->logfile;
	$sql->("SET ROLE alice; ALTER TABLE omni_refresh_$table $do");
	OmniFault::call($node, "SET omni_refresh.call_timeout = '300 ms'; SET omni_refresh.on_failure = warning; SELECT omni_refresh('$model');") for 1 .. 3;
	my $queue = OmniFault::call($node, "SELECT omni_refresh_on_commit('$model');");
	my $told = sub { return scalar(() = substr(slurp_file($node->logfile), $log) =~ /\[$worker\] \w+:  (?!could not ).*omni_refresh_$table\b.* is not as .* made it/g) };
	OmniLife::until_true("$name: the worker says so", sub { $told->() > 0 }, 5);
	my $check = OmniFault::call($node, 'SELECT check_name, ok, detail FROM omni_refresh_check();');
	like($check->{out}, qr/^[^|]*\|f\|.*omni_refresh_$table\b.* is not as .* made it/m, '... so does the doctor') or diag("$check->{out}\n$check->{err}");
	is($told->(), 1, '... and the worker has said it once');
	is(OmniFault::worker($node), $worker, '... the worker is the same');
	$sql->("SET ROLE alice; ALTER TABLE omni_refresh_$table $undo");
	my $call = OmniFault::call($node, "SELECT status FROM omni_refresh('$model');");
	is($call->{out}, 'running', '... and all is well once it is undone') or diag($call->{err});
	$check = OmniFault::call($node, q{SELECT string_agg(check_name || ': ' || detail, ', ') FROM omni_refresh_check() WHERE NOT ok;});
	unlike($check->{out}, qr/is not as/, '... as the doctor says');
	OmniLife::until_true('... and nothing is left', sub {
			$sql->(q{SELECT count(*) FROM omni_refresh_job WHERE status IN ('pending', 'sending')}) == 0 }, 15);
}

is(crashes(), '', 'nothing has crashed');
$node->stop('fast');
done_testing();
