# Whoever owns our tables can hang code of all kinds on them. It runs with the owner's rights and no
# others, changes no session, and all it can spoil is the record, with an error that says so.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;

my $omni = OmniAPI->start;
my $node = OmniFault::node('main');
my $refresh = q{SELECT * FROM omni_refresh('} . $omni->model . q{');};

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
is(OmniFault::call($node, $refresh)->{status}, 0, 'a first call starts the worker');
my $worker = OmniFault::worker($node);
my ($superuser, $path) = split / /, $node->safe_psql('postgres', q{
	SELECT current_user || ' ' || translate(current_setting('search_path'), ' ', '')});

# A schema whose operators tell who uses them, and a trigger that tries what it should not. What
# it has managed to do, and as whom, goes to the table told.
my $operators = join '', map {
	my ($type, $function) = @$_;
	qq{CREATE FUNCTION equal($type, $type) RETURNS bool LANGUAGE plpgsql
		AS 'BEGIN INSERT INTO evil.told VALUES (''operator''); RETURN pg_catalog.$function(\$1, \$2); END';
	CREATE OPERATOR evil.= (LEFTARG = $type, RIGHTARG = $type, FUNCTION = evil.equal);}
} [ 'int8', 'int8eq' ], [ 'text', 'texteq' ], [ 'oid', 'oideq' ], [ 'name', 'nameeq' ];
$node->safe_psql('postgres', qq{
	CREATE ROLE alice LOGIN;
	CREATE SCHEMA evil AUTHORIZATION alice;
	SET ROLE alice;
	SET search_path = evil;
	CREATE TABLE told (what text, who name DEFAULT current_user);
	GRANT ALL ON SCHEMA evil TO PUBLIC;
	GRANT ALL ON told TO PUBLIC;
	$operators
	CREATE FUNCTION clock_timestamp() RETURNS timestamptz LANGUAGE plpgsql
		AS 'BEGIN INSERT INTO evil.told VALUES (''function''); RETURN pg_catalog.clock_timestamp(); END';
	CREATE FUNCTION try() RETURNS trigger LANGUAGE plpgsql AS \$\$
	DECLARE
		attack text;
	BEGIN
		INSERT INTO evil.told VALUES ('trigger');
		FOREACH attack IN ARRAY ARRAY[
			'SET ROLE $superuser', 'RESET ROLE', 'SET SESSION AUTHORIZATION $superuser',
			'RESET SESSION AUTHORIZATION', 'CREATE ROLE mallory SUPERUSER', 'ALTER ROLE alice SUPERUSER',
			'SET session_replication_role = replica', 'COPY evil.told (what) TO PROGRAM ''cat''',
			'CREATE TEMP TABLE omni_refresh_job (id int)', 'SET log_statement = ''all''',
			'SELECT pg_terminate_backend(pg_backend_pid())', 'SELECT pg_read_file(''postgresql.conf'')',
			'CREATE EXTENSION pg_prewarm', 'GRANT $superuser TO alice', 'COMMIT']
		LOOP
			BEGIN
				EXECUTE attack;
				INSERT INTO evil.told VALUES (attack);
			EXCEPTION WHEN OTHERS THEN
				NULL;
			END;
		END LOOP;
		PERFORM set_config('search_path', 'evil, pg_catalog, public', false);
		RETURN NEW;
	END \$\$;
	CREATE FUNCTION set() RETURNS trigger LANGUAGE plpgsql AS \$\$
	BEGIN
		PERFORM set_config('lock_timeout', '1', false);
		PERFORM set_config('default_transaction_read_only', 'on', false);
		PERFORM set_config('default_transaction_isolation', 'serializable', false);
		RETURN NEW;
	END \$\$;
	CREATE FUNCTION deferred() RETURNS trigger LANGUAGE plpgsql
		AS 'BEGIN INSERT INTO evil.told VALUES (''deferred''); RETURN NULL; END';
});

# Calls as many times as have the statements planned, and asks what was done.
sub told
{
	my ($name) = @_;

	for (1 .. 2)
	{
		my $call = OmniFault::call($node, $refresh);
		is($call->{status}, 0, "$name: calls go on") or diag($call->{err});
	}
	is($node->safe_psql('postgres', q{SELECT string_agg(DISTINCT what || ' as ' || who, ', ') FROM evil.told
			WHERE who <> 'alice'}), '', '... nothing of hers is run as anybody else');
	is($node->safe_psql('postgres', q{SELECT string_agg(DISTINCT what, ', ') FROM evil.told
			WHERE what NOT IN ('trigger', 'operator', 'function')}), '', '... nor does she get anything done');
	is(OmniFault::worker($node), $worker, '... the worker is the same');
	return;
}

for my $tables ([ 'omni_refresh_event' ], [ 'omni_refresh_job' ], [ 'omni_refresh_job', 'omni_refresh_event' ])
{
	for my $table (@$tables)
	{
		$node->safe_psql('postgres', qq{ALTER TABLE $table OWNER TO alice;
			CREATE TRIGGER try BEFORE INSERT OR UPDATE ON $table FOR EACH ROW EXECUTE FUNCTION evil.try()});
	}
	told("alice owns @$tables");
	cmp_ok($node->safe_psql('postgres', q{SELECT count(*) FROM evil.told WHERE what = 'trigger' AND who = 'alice'}),
		'>=', 4, '... though her trigger was run');
	$node->safe_psql('postgres', 'TRUNCATE evil.told; '
		  . join '', map { "DROP TRIGGER try ON $_; ALTER TABLE $_ OWNER TO $superuser;" } @$tables);
}
$node->safe_psql('postgres', "ALTER TABLE $_ OWNER TO alice") for 'omni_refresh_job', 'omni_refresh_event';

# A policy is run in the session of whoever calls

$node->safe_psql('postgres', q{
	CREATE FUNCTION evil.policy() RETURNS bool LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM set_config('search_path', 'evil, pg_catalog', false);
		PERFORM set_config('omni_refresh.server', 'evil', false);
		INSERT INTO evil.told VALUES ('policy');
		RETURN true;
	END $$;
	CREATE POLICY evil ON omni_refresh_job USING (evil.policy());
	ALTER TABLE omni_refresh_job FORCE ROW LEVEL SECURITY});
my $call = OmniFault::call($node, <<EOF);
SET client_min_messages = error;
SELECT status FROM omni_refresh('${\ $omni->model}');
SELECT omni_refresh_cancel((SELECT max(id) FROM omni_refresh_job));
SELECT translate(current_setting('search_path'), ' ', ''), current_setting('omni_refresh.server'), current_user;
EOF
is($call->{out} =~ s/.*\n.*\n//r, "$path|omni|$superuser", "a policy of hers changes nothing in a caller's session");
is($node->safe_psql('postgres', 'SELECT DISTINCT who FROM evil.told'), 'alice', '... and is run as herself');
$node->safe_psql('postgres', 'ALTER TABLE omni_refresh_job NO FORCE ROW LEVEL SECURITY;
	DROP POLICY evil ON omni_refresh_job; TRUNCATE evil.told');

# Errors

sub with_trigger
{
	my ($name, $when, $body, $state, $message) = @_;
	my ($requests, $jobs) = (scalar(() = $omni->requests),
		$node->safe_psql('postgres', 'SELECT count(*) FROM omni_refresh_job'));

	$node->safe_psql('postgres', qq{
		CREATE FUNCTION evil.fail() RETURNS trigger LANGUAGE plpgsql AS \$\$ BEGIN $body END \$\$;
		ALTER FUNCTION evil.fail() OWNER TO alice;
		CREATE TRIGGER fail $when EXECUTE FUNCTION evil.fail()});
	$call = OmniFault::call($node, "SET omni_refresh.call_timeout = '1 s'; $refresh");
	like($call->{sqlstate}, $state, "$name fails the call") or diag($call->{err});
	like($call->{message}, $message, '... and says why');
	isnt($call->{sqlstate}, '57014', '... not as if the user had canceled');
	if ($when =~ /INSERT/)
	{
		is(scalar(() = $omni->requests), $requests, '... before anything is sent');
		is($node->safe_psql('postgres', 'SELECT count(*) FROM omni_refresh_job'), $jobs, '... or written');
	}
	$node->safe_psql('postgres', 'DROP FUNCTION evil.fail() CASCADE');
	OmniFault::poll_story($node, 'accepted: sending accepted',
		'... and the outcome is written as soon as it can be') if $when =~ /UPDATE/;
	is(OmniFault::call($node, $refresh)->{status}, 0, '... and the next call is fine');
	is(OmniFault::worker($node), $worker, '... by the same worker');
	return;
}
my ($on_job, $on_event) = map { "BEFORE INSERT ON omni_refresh_$_ FOR EACH ROW" } 'job', 'event';
with_trigger('an error on a job', $on_job, q{RAISE 'not on my watch';}, qr/^P0001$/, qr/^not on my watch$/);
with_trigger('an error on an event', $on_event, q{RAISE 'not on my watch';}, qr/^P0001$/, qr/^not on my watch$/);
with_trigger('a division by zero', $on_job, q{NEW.id := 1 / 0; RETURN NEW;}, qr/^22012$/, qr/division by zero/);
with_trigger('a swallowed job', $on_job, 'RETURN NULL;', qr/^\w{5}$/, qr/trigger/);
with_trigger('a changed id', $on_job, 'NEW.id := NULL; RETURN NEW;', qr/^\w{5}$/, qr/\S/);
with_trigger('a pretended cancel', $on_job, q{RAISE 'x' USING ERRCODE = '57014';}, qr/^(?!57014)\w{5}$/, qr/\S/);
with_trigger('an error on an outcome', 'BEFORE UPDATE ON omni_refresh_job FOR EACH ROW',
	q{RAISE 'not on my watch';}, qr/^P0001$/, qr/could not record the outcome.*not on my watch/);

# A trigger that is deferred would be run without her rights' limits
$node->safe_psql('postgres', 'CREATE CONSTRAINT TRIGGER deferred AFTER INSERT ON omni_refresh_job
	DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION evil.deferred()');
$call = OmniFault::call($node, $refresh);
is($node->safe_psql('postgres', q{SELECT count(*) FROM evil.told WHERE who <> 'alice'}), '0',
	'a deferred trigger is not run as somebody else');
like($call->{message}, qr/deferred trigger/, '... if at all');
$node->safe_psql('postgres', 'DROP TRIGGER deferred ON omni_refresh_job');

# Tables that are no longer what they were

my $restarts = sub { () = slurp_file($node->logfile) =~ /terminated by signal|TRAP/g };
for my $case (
	[ 'a column renamed', 'job RENAME COLUMN error TO err', 'job RENAME COLUMN err TO error' ],
	[ 'a table renamed', 'job RENAME TO hidden', undef, 'ALTER TABLE hidden RENAME TO omni_refresh_job' ])
{
	my ($name, $change, $back, $undo) = @$case;
	$node->safe_psql('postgres', "ALTER TABLE omni_refresh_$change");
	$call = OmniFault::call($node, qq{SET omni_refresh.server = 'nowhere'; SET omni_refresh.on_failure = warning;
		$refresh}) for 1 .. 3;
	like("$call->{status} $call->{sqlstate}", qr/^3 (?!57P)\w{5}$/, "$name: an error") if defined $back;
	OmniFault::call($node, "SET omni_refresh.call_timeout = '1 s'; $refresh");
	is(scalar($restarts->()), 0, "$name: nothing crashes");
	$node->safe_psql('postgres', $undo // "ALTER TABLE omni_refresh_$back");
	is(OmniFault::call($node, $refresh)->{status}, 0, '... and all is well once it is undone');
}
$worker = OmniFault::worker($node);
my ($model, $oid) = ($omni->model, $node->safe_psql('postgres',
	q{SELECT oid FROM pg_database WHERE datname = 'postgres'}));
$node->safe_psql('postgres', qq{
	SET ROLE alice;
	ALTER TABLE omni_refresh_job ALTER COLUMN requested_by DROP NOT NULL, ALTER COLUMN attempts DROP NOT NULL;
	INSERT INTO omni_refresh_job (status, model_id, kind, server, origin, requested_by, requested_by_oid,
		requested_at, run_at, attempts, database)
	VALUES ('sending', '$model', 'schema', 'omni', 'call', NULL, 0, now(), now(), NULL, $oid);
	RESET ROLE;
	SELECT pg_terminate_backend($worker, 10000)});
OmniFault::call($node, $refresh);
is(scalar($restarts->()), 0, 'a job of nobody, left behind, does not crash the next worker');
$node->poll_query_until('postgres', 'SELECT true') or die;
$node->safe_psql('postgres', 'DELETE FROM omni_refresh_job WHERE requested_by IS NULL');
is(OmniFault::call($node, $refresh)->{status}, 0, '... and all is well without it');

# Settings of the worker are none of hers

$node->safe_psql('postgres', 'CREATE TRIGGER set BEFORE INSERT ON omni_refresh_event
	FOR EACH ROW EXECUTE FUNCTION evil.set()');
OmniFault::call($node, "SET omni_refresh.call_timeout = '1 s'; $refresh");
$node->safe_psql('postgres', 'DROP TRIGGER set ON omni_refresh_event');
$call = OmniFault::call($node, $refresh);
is($call->{status}, 0, 'what a trigger sets is gone with it') or diag($call->{err});

done_testing();
