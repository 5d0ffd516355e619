# Once a transaction: a request that a job of the same transaction covers adds no row. It is the same
# job that is returned, as long as that is neither rolled back nor canceled nor changed; and nothing that
# is refused without such a job is granted because of it.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
my $node = OmniFault::node('once', conf => <<END);
omni_refresh.min_interval = 0
omni_refresh.max_in_flight = 16
omni_refresh.enabled = off
max_prepared_transactions = 4
client_min_messages = error
END
my $model = $omni->model;
my $other = '00000000-0000-0000-0000-000000000001';
my $jobs = 'SELECT count(*) FROM omni_refresh_job;';

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, $_, url => $omni->http, key => $omni->key, rate_limit => 0) for 'omni', 'twin';
$node->safe_psql('postgres', 'CREATE ROLE one LOGIN; CREATE ROLE two LOGIN; CREATE ROLE keeper LOGIN');

# The call of a function: the arguments of a refresh, or "reset" and those of a reset.
sub call
{
	my ($what, $of) = @_;
	my $function = $what =~ s/^reset // ? 'omni_refresh_cache_on_commit' : 'omni_refresh_on_commit';

	return "$function('" . ($of // $model) . "'" . ($what eq '' ? ')' : ", $what)");
}

# A request, as a statement that prints the number of its job.
sub ask
{
	my ($what, $of) = @_;

	return q{SELECT '#' || id FROM } . call($what // '', $of) . ";\n";
}

# A statement that fails, and that prints its SQLSTATE.
sub fails
{
	my ($sql) = @_;

	return "$sql\n\\echo :SQLSTATE\n";
}

# What statements print; jobs by letters, in the order in which they were returned for the first time.
sub prints
{
	my ($sql) = @_;
	my (%letters, $next);

	$node->psql('postgres', "SET omni_refresh.enabled = on;\n$sql", on_error_stop => 0, stdout => \my $out, stderr => \my $err);
	$out =~ s/#(\d+)/$letters{$1} \/\/= chr(ord('a') + $next++)/ge;
	note($err) if $err ne '';
	return join ' ', split /\n/, $out;
}

# Statements within a transaction, which is rolled back in the end, print what is expected.
sub within
{
	my ($sql, $expected, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return is(prints("BEGIN;\n$sql\nROLLBACK;"), $expected, $name);
}

# In the configuration file this holds what is queued, or lets it go.
sub enable
{
	my ($value) = @_;

	$node->append_conf('postgresql.conf', "omni_refresh.enabled = $value\n");
	$node->reload;
	return;
}

# What is returned

within(ask() . ask() . $jobs, 'a a 1', 'a second request adds no row');
within(q{SELECT job::text AS first FROM } . call("schemas => '{b, a}'") . q{ AS job \gset} . "\nSELECT a::text = :'first', a IS NOT DISTINCT FROM b FROM "
	  . call("schemas => '{a}'") . ' AS a, omni_refresh_job AS b;', 't|t', 'what is returned is the row as it was returned first');
is(prints(ask() . ask() . $jobs . 'DELETE FROM omni_refresh_job;'), 'a b 2', 'each transaction has a job of its own');
is(prints('BEGIN;' . ask() . 'COMMIT AND CHAIN;' . ask() . 'COMMIT;' . $jobs . 'DELETE FROM omni_refresh_job;'), 'a b 2', '... also if it is chained to another');

# What covers what: just what the worker merges without changing the job that is there. "as" stands for a
# request that has the time of the first one as its time.

my @cases = (
	map({ [ $_->[0], $_->[1], 1 ] }
		[ '', '' ], [ '', 'hard => true' ], [ 'hard => true', '' ], map({ [ '', $_ ] } 'hard => false', "schemas => '{a}'", "tables => '{t}'",
			"schemas => '{a}', tables => '{t}'"),
		map({ [ 'hard => false', $_ ] } 'hard => false', "schemas => '{a}'", "tables => '{t}'", "schemas => '{a}', tables => '{t}'"),
		map({ [ "schemas => '{c, a, b}'", "schemas => '$_'" ] } '{c,a,b}', '{b, c, a}', '{a}', '{b}', '{c}', '{b, b}', '{c, a}'),
		map({ [ "tables => '{ss, t, u}'", "tables => '$_'" ] } '{ss, t, u}', '{u, ss, t}', '{t}', '{u, t}', '{ss}'),
		[ "schemas => '{a}'", "hard => false, schemas => '{a}'" ],
		map({ [ "schemas => '{a, b}', tables => '{t, u}'", $_ ] } "schemas => '{b, a}', tables => '{u, t}'", "schemas => '{a}', tables => '{t, u}'",
			"schemas => '{a, b}', tables => '{t}'", "schemas => '{b}', tables => '{u}'"),
		[ "branch => '$other'", "branch => '$other', hard => false" ],
		[ q{reset 'p'}, q{reset 'p'} ], [ q{reset 'p'}, q{reset 'p', '2026-01-01'} ],
		[ q{reset 'p', '2026-01-02'}, q{reset 'p', '2026-01-02'} ], [ q{reset 'p', '2026-01-02'}, q{reset 'p', '2026-01-01'} ]),
	map({ [ $_->[0], $_->[1], 0 ] }
		map({ [ $_, '' ] } 'hard => false', "schemas => '{a}'", "tables => '{t}'", "schemas => '{a}', tables => '{t}'"),
		map({ [ $_, 'hard => false' ] } "schemas => '{a}'", "tables => '{t}'", "schemas => '{a}', tables => '{t}'"),
		map({ [ "schemas => '{c, a, b}'", $_ ] } "schemas => '{a, d}'", "schemas => '{a, b, c, d}'", "schemas => '{d}'", "schemas => '{A}'",
			"schemas => '{aa}'", "tables => '{a}'", "schemas => '{a}', tables => '{a}'"),
		map({ [ "tables => '{t, u}'", $_ ] } "tables => '{t, v}'", "tables => '{tt}'", "schemas => '{t}'", "schemas => '{t}', tables => '{t}'"),
		map({ [ "schemas => '{a, b}', tables => '{t, u}'", $_ ] } "schemas => '{a, b}'", "tables => '{t, u}'",
			"schemas => '{a, b}', tables => '{t, v}'", "schemas => '{c}', tables => '{t}'", "schemas => '{a, b, c}', tables => '{t, u}'"),
		[ "branch => '$other'", '' ], [ '', "branch => '$other'" ], [ "branch => '$other'", "branch => '$model'" ],
		[ "branch => '00000000-0000-0000-0000-000000000000'", '' ],
		[ q{reset 'p', '2026-01-02'}, q{reset 'p'} ], [ q{reset 'p', '2026-01-02'}, q{reset 'p', '2026-01-03'} ],
		[ q{reset 'p'}, q{reset 'q'} ], [ q{reset 'p'}, q{reset 'P'} ], [ q{reset 'p'}, '' ], [ '', q{reset 'p'} ]));

for my $case (@cases)
{
	my ($first, $second, $covered) = @$case;
	within(ask($first) . ask($second), $covered ? 'a a' : 'a b', "a request ($first) " . ($covered ? 'covers' : 'does not cover') . " a request ($second)");
}

# The same two requests in two transactions, which the worker merges: each pair has a model of its own.
$node->safe_psql('postgres', 'SET omni_refresh.enabled = on; CREATE TABLE pair (model uuid, covered bool);' . join '', map {
	my ($first, $second, $covered) = @{ $cases[$_] };
	my $of = sprintf '00000000-0000-0000-0000-%012d', $_;
	ask($first, $of) . ask($second, $of) . "INSERT INTO pair VALUES ('$of', '$covered');" } 0 .. $#cases);
$node->safe_psql('postgres', 'CREATE TABLE before AS SELECT * FROM omni_refresh_job');
enable('on');
ok($node->poll_query_until('postgres', q{SELECT count(*) = 0 FROM omni_refresh_job WHERE status IN ('pending', 'sending')}), 'all that is queued is sent');
is($node->safe_psql('postgres', q{
		SELECT model FROM pair
		WHERE covered <> EXISTS (SELECT FROM omni_refresh_job AS job
			JOIN omni_refresh_job AS carrier ON carrier.id = job.merged_into JOIN before ON before.id = carrier.id
			WHERE job.model_id = model AND (carrier.hard, carrier.reset_at) IS NOT DISTINCT FROM (before.hard, before.reset_at)
				AND ARRAY(SELECT unnest(carrier.schemas) ORDER BY 1) = ARRAY(SELECT unnest(before.schemas) ORDER BY 1)
				AND ARRAY(SELECT unnest(carrier.tables) ORDER BY 1) = ARRAY(SELECT unnest(before.tables) ORDER BY 1))}),
	'', 'a request covers just what is merged into it without changing it');
enable('off');
$node->safe_psql('postgres', 'TRUNCATE omni_refresh_job, omni_refresh_event');

within(ask("schemas => '{a}'") . ask("schemas => '{b}'") . ask("schemas => '{a, b}'") . ask("schemas => '{b}'") . ask() . ask("schemas => '{a}'"),
	'a b c c d d', 'of several that cover it, a request gets the newest');
within(ask() . ask('', $other) . ask() . ask('', $other), 'a b a b', 'models stay apart');

# Roles, servers, settings

within('SET LOCAL ROLE one;' . ask() . 'SET LOCAL ROLE two;' . ask() . 'SET LOCAL ROLE one;' . ask() . 'RESET ROLE;' . ask(), 'a b a c', 'roles stay apart');
within('SET LOCAL ROLE one;' . ask() . 'RESET ROLE; ALTER ROLE one RENAME TO uno; SET LOCAL ROLE uno;' . ask(), 'a a', '... but not a role by two names');
within('CREATE ROLE three; SET LOCAL ROLE three;' . ask() . 'RESET ROLE; DROP ROLE three; CREATE ROLE three; SET LOCAL ROLE three;' . ask(), 'a b',
	'... and a later role of the same name');
within(ask() . 'SET LOCAL omni_refresh.server = twin;' . ask() . 'SET LOCAL omni_refresh.server = omni;' . ask(), 'a b a', 'servers stay apart');
within(ask() . 'SET LOCAL omni_refresh.enabled = off; SELECT status, id FROM ' . call('') . '; SET LOCAL omni_refresh.enabled = on;' . ask(), 'a canceled| a',
	'a request that is switched off is canceled');
$node->safe_psql('postgres', q{GRANT CREATE ON SCHEMA public TO one; SET ROLE one;
	CREATE FUNCTION wrapped() RETURNS bigint LANGUAGE sql SECURITY DEFINER AS $$SELECT id FROM } . call('') . q{$$});
within(ask() . q{SELECT '#' || wrapped();} x 2 . ask() . 'SET LOCAL ROLE one;' . ask(), 'a b b a c', 'a function that runs with the rights of another role asks as that one, for its caller');

# Savepoints and exceptions

within('SAVEPOINT s;' . ask() . 'ROLLBACK TO s;' . ask() . ask() . $jobs, 'a b b 1', 'what a savepoint takes back is forgotten');
within('SAVEPOINT s;' . ask() . 'RELEASE s;' . ask() . $jobs, 'a a 1', '... but not what is released');
within(ask() . 'SAVEPOINT s;' . ask() . 'ROLLBACK TO s;' . ask() . $jobs, 'a a a 1', '... nor what was there before');
within('SAVEPOINT s; SAVEPOINT t;' . ask() . 'RELEASE t;' . ask() . 'ROLLBACK TO s;' . ask(), 'a a b', 'what is released into a savepoint is taken back with it');
within('SAVEPOINT s; SAVEPOINT t; SAVEPOINT u;' . ask() . 'RELEASE t;' . ask() . 'RELEASE s;' . ask(), 'a a a', 'several levels are released at once');
within('SAVEPOINT s;' . ask("schemas => '{a}'") . 'SAVEPOINT t;' . ask("schemas => '{b}'") . 'ROLLBACK TO t;' . ask("schemas => '{a}'") . ask("schemas => '{b}'") . 'RELEASE s;'
	  . ask("schemas => '{a}'") . ask("schemas => '{b}'"), 'a b a c a c', 'some is kept and some is not');
within('SAVEPOINT s;' . ask() . fails('SELECT 1/0;') . 'ROLLBACK TO s;' . ask(), 'a 22012 b', 'an error takes back, too');
within(q{CREATE FUNCTION asks(fail bool) RETURNS text LANGUAGE plpgsql AS $$
	DECLARE
		id text;
	BEGIN
		SELECT '#' || job.id INTO id FROM } . call('') . q{ AS job;
		IF fail THEN RAISE division_by_zero; END IF;
		RETURN id;
	EXCEPTION WHEN division_by_zero THEN
		RETURN id;
	END $$;
	SELECT asks(true); SELECT asks(false); SELECT asks(true); SELECT asks(false);} . $jobs, 'a b b b 1', 'so do exceptions that are caught');
within("CREATE TABLE loaded (n int);
	CREATE FUNCTION asks() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM " . call('') =~ s/'/''/gr . "; RETURN NULL; END';
	CREATE TRIGGER asks AFTER INSERT ON loaded FOR EACH ROW EXECUTE FUNCTION asks();
	CREATE CONSTRAINT TRIGGER at_last AFTER INSERT ON loaded DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION asks();
	INSERT INTO loaded SELECT generate_series(1, 5000); $jobs INSERT INTO loaded VALUES (0); SET CONSTRAINTS ALL IMMEDIATE; $jobs", '1 1',
	'a trigger for each row adds one row, also a deferred one');
within("DECLARE c CURSOR FOR SELECT '#' || (" . call('') . ').id FROM generate_series(1, 9);
	FETCH 2 FROM c; SAVEPOINT s; FETCH 1 FROM c;' . ask() . 'ROLLBACK TO s; FETCH 1 FROM c;' . $jobs, 'a a a a a 1', 'a cursor that goes on');
is(prints('BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT (' . call('') . ").id FROM generate_series(1, 9); COMMIT; $jobs DELETE FROM omni_refresh_job;"), '1',
	'... or is run at the commit');

# The end of a transaction

is(prints('BEGIN;' . ask() . q{PREPARE TRANSACTION 'p';} . 'BEGIN;' . ask() . ask() . "ROLLBACK; COMMIT PREPARED 'p';" . ask() . $jobs . 'DELETE FROM omni_refresh_job;'), 'a b b c 2',
	'a transaction that is prepared is at its end');
is(prints('BEGIN;' . ask() . 'ROLLBACK;' . ask() . $jobs . 'DELETE FROM omni_refresh_job;'), 'a b 1', '... and so is one that is rolled back');
is(prints('BEGIN;' . ask() . fails('SELECT 1/0;') . 'COMMIT;' . ask() . $jobs . 'DELETE FROM omni_refresh_job;'), 'a 22012 b 1', '... or has failed');
is(prints('DO $$ BEGIN PERFORM ' . call('') . '; PERFORM ' . call('') . '; COMMIT; PERFORM ' . call('') . '; ROLLBACK; PERFORM ' . call('') . '; PERFORM ' . call('')
		  . "; END \$\$; $jobs DELETE FROM omni_refresh_job;"), '2', 'a procedure with transactions of its own has a job for each that commits');

# Canceled, changed, deleted

my $cancel = 'SELECT omni_refresh_cancel(max(id)) FROM omni_refresh_job;';
within(ask() . $cancel . ask() . ask() . $jobs, 'a t b b 2', 'what is canceled is asked for again');
within(ask() . "SAVEPOINT s; $cancel" . ask() . 'ROLLBACK TO s;' . ask() . $jobs, 'a t b a 1', '... unless that is taken back');
within(ask() . "SAVEPOINT s; $cancel RELEASE s;" . ask(), 'a t b', '... but not if it is released');
within('SAVEPOINT s;' . ask() . "SAVEPOINT t; $cancel ROLLBACK TO t; RELEASE s;" . ask(), 'a t a', 'what is canceled in vain is released');
within(ask() . $cancel . ask() . $cancel . ask() . ask(), 'a t b t c c', 'what is canceled again and again');
within(ask() . ask("schemas => '{a}'", $other) . $cancel . ask() . ask("schemas => '{a}'", $other), 'a b t a c', '... is forgotten alone');
within(ask("schemas => '{a}'") . ask("schemas => '{b}'") . ask("schemas => '{a, b}'") . $cancel . ask("schemas => '{a}'") . ask("schemas => '{b}'"), 'a b c t a b',
	'... and what was there before does for it as before');

within("SET TRANSACTION ISOLATION LEVEL $_;" . ask() . ask() . $cancel . ask() . ask() . $jobs, 'a a t b b 2', "the same when it is $_") for 'REPEATABLE READ', 'SERIALIZABLE';
my $truncate = 'TRUNCATE omni_refresh_job, omni_refresh_event RESTART IDENTITY;';
for my $case ([ q{UPDATE omni_refresh_job SET schemas = '{x}', hard = false;}, 2 ], [ q{UPDATE omni_refresh_job SET status = 'canceled';}, 2 ],
	[ 'DELETE FROM omni_refresh_job;', 1 ], [ $truncate, 1 ])
{
	my ($change, $count) = @$case;
	within(ask() . $change . ask() . $jobs, "a b $count", "after $change what was asked for is asked for again");
	within(ask() . "SAVEPOINT s; $change ROLLBACK TO s;" . ask() . $jobs, 'a a 1', '... unless that is taken back');
	within(ask() . "SAVEPOINT s; $change" . ask() . 'ROLLBACK TO s;' . ask() . $jobs, 'a b a 1', '... also if it was asked for meanwhile');
}
within($truncate . ask() . $truncate . ask("schemas => '{a}'") . ask() . ask() . $jobs, 'a a b c 3', 'a table that was emptied twice, and has used an id again, is relied on no more');
within(ask() . q{WITH gone AS (DELETE FROM omni_refresh_job RETURNING *) SELECT '#' || job.id FROM gone, LATERAL } . call("branch => gone.branch_id") . ' AS job;' . $jobs, 'a b 1', 'a change by the very statement is noticed');
within(ask() . 'CLUSTER omni_refresh_job USING omni_refresh_job_pkey;' . ask(), 'a b', 'in a table that is written anew');
within(ask() . 'SELECT FROM omni_refresh_job FOR UPDATE; SAVEPOINT s; SELECT FROM omni_refresh_job FOR KEY SHARE;' . ask(), 'a a', 'a lock on the row changes nothing');
within(ask() . q{ALTER TABLE omni_refresh_job ADD more int; SELECT '#' || id, more FROM } . call('') . ';', 'a a|', 'nor does a column that is added');

# The owner of the table decides what the rows are

within(q{CREATE FUNCTION narrow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.hard := false; NEW.schemas := coalesce(NEW.schemas, '{x}'); RETURN NEW; END $$;
	CREATE TRIGGER narrow BEFORE INSERT ON omni_refresh_job FOR EACH ROW EXECUTE FUNCTION narrow();} . ask() . ask("schemas => '{a}'") . $jobs, 'a b 2',
	'what a trigger may have changed covers nothing');
within(q{CREATE FUNCTION cancel() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN UPDATE public.omni_refresh_job SET status = 'canceled' WHERE id = NEW.id; RETURN NULL; END $$;
	CREATE TRIGGER cancel AFTER INSERT ON omni_refresh_job FOR EACH ROW EXECUTE FUNCTION cancel();} . ask() . ask() . $jobs, 'a b 2', '... nor what a trigger has changed');
within(q{CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
	CREATE TRIGGER look BEFORE INSERT ON omni_refresh_job FOR EACH ROW EXECUTE FUNCTION look(); ALTER TABLE omni_refresh_job DISABLE TRIGGER look;} . ask() . ask(), 'a a',
	'a trigger that is disabled changes nothing');

# What is refused without a job that covers the request is refused with one

within(ask() . $_->[0] . fails(ask()), "a $_->[1]", "after $_->[0]") for
	[ 'DROP USER MAPPING FOR PUBLIC SERVER omni;', '28000' ],
	[ 'ALTER USER MAPPING FOR PUBLIC SERVER omni OPTIONS (DROP api_key);', '55000' ],
	[ q{CREATE USER MAPPING FOR CURRENT_USER SERVER omni OPTIONS (api_key 'another');}, '55000' ],
	[ q{ALTER SERVER omni OPTIONS (SET base_url 'https://omni.invalid');}, '55000' ],
	[ 'ALTER SERVER omni RENAME TO former;', '42704' ],
	[ 'DROP SERVER omni CASCADE;', '42704' ],
	[ 'DROP EXTENSION omni_refresh CASCADE; CREATE EXTENSION omni_refresh;', '42704' ],
	[ 'SET TRANSACTION READ ONLY;', '25006' ];
within('SET LOCAL ROLE one;' . ask() . "RESET ROLE; $_->[0] SET LOCAL ROLE one;" . fails(ask()), "a $_->[1]", "after $_->[0]") for
	[ 'REVOKE USAGE ON FOREIGN SERVER omni FROM PUBLIC;', '42501' ],
	[ 'GRANT USAGE ON FOREIGN SERVER omni TO two; GRANT two TO one; REVOKE USAGE ON FOREIGN SERVER omni FROM PUBLIC; REVOKE two FROM one;', '42501' ];
within(ask() . 'SAVEPOINT s; DROP USER MAPPING FOR PUBLIC SERVER omni; ROLLBACK TO s;' . ask(), 'a a', 'what is dropped in vain is still there');
within(ask() . 'SET LOCAL omni_refresh.on_failure = warning; DROP USER MAPPING FOR PUBLIC SERVER omni; SELECT status, id FROM ' . call('') . ';', 'a failed|',
	'... and a warning is one');

my $session = OmniLife::session($node, 'postgres');
$session->query('SET omni_refresh.enabled = on; SET ROLE one');
my ($id) = $session->query('BEGIN; SELECT id FROM ' . call(''));
$node->safe_psql('postgres', 'REVOKE USAGE ON FOREIGN SERVER omni FROM PUBLIC');
my (undef, $error) = $session->query('SELECT id FROM ' . call(''));
like($error, qr/ERROR:  42501: /, 'what another session has revoked meanwhile is noticed, too');
$session->query('ROLLBACK');
$session->quit;
$node->safe_psql('postgres', 'GRANT USAGE ON FOREIGN SERVER omni TO PUBLIC');

# A job that is repeated is a job of its own

within(ask() . $cancel . q{SELECT '#' || id FROM omni_refresh_retry((SELECT max(id) FROM omni_refresh_job)) AS again;} . ask() . ask()
	  . q{SELECT '#' || id FROM omni_refresh_retry((SELECT min(id) FROM omni_refresh_job)) AS again;} . ask(), 'a t b c c b c',
	'what is repeated adds a row, but one only, and covers nothing');

# A job is given up retry_for after its request: it does not stand for one that comes much later.

for my $case ([ '0', 'a a' ], [ '1s', 'a b' ], [ '1d', 'a a' ])
{
	my ($time, $expected) = @$case;
	$node->append_conf('postgresql.conf', "omni_refresh.retry_for = '$time'\n");
	$node->restart;
	within(ask() . 'SELECT FROM pg_sleep(0.2);' . ask(), $expected, "requests that are 0.2 s apart, when retry_for is $time");
}

# The number of a job comes from a sequence: what the documents say of lastval() behind a trigger

$node->safe_psql('postgres', qq{CREATE TABLE orders (id serial); GRANT ALL ON orders, orders_id_seq TO one;
	CREATE FUNCTION ask_once() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM ${\ (call('') =~ s/'/''/gr)}; RETURN NULL; END';
	CREATE TRIGGER ask_once AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION ask_once()});
my ($rc, $out, $err) = $node->psql('postgres', q{SET omni_refresh.enabled = on; SET ROLE one;
	INSERT INTO orders DEFAULT VALUES RETURNING id; SELECT currval('orders_id_seq'); SELECT lastval()}, on_error_stop => 0,
	extra_params => [ '-v', 'VERBOSITY=verbose' ]);
is($out, "1\n1", 'INSERT ... RETURNING and currval() tell the number that an INSERT has given, though its trigger has asked');
like($err, qr/ERROR:  42501: .*omni_refresh_job_id_seq/, '... and lastval() is about the last sequence, whose number is not shown');
$node->safe_psql('postgres', 'DELETE FROM omni_refresh_job; DROP TABLE orders');

# Very many requests

my $memory = q{SELECT sum(total_bytes) AS bytes FROM pg_backend_memory_contexts \gset} . "\n";
my $grown = q{SELECT sum(total_bytes) - :bytes < 2000000 FROM pg_backend_memory_contexts;};
my $many = sub { 'SELECT count(DISTINCT (' . call($_[0], $_[1]) . ").id) FROM generate_series(1, $_[2]) AS n;" };
within($many->('', undef, 10) . $memory . $many->('', undef, 100000) . $jobs . $grown, '1 1 1 t', 'a hundred thousand equal requests add one row, and take no memory');
within($many->('schemas => ARRAY[n::text]', undef, 1000) . $memory . $many->('schemas => ARRAY[n::text]', undef, 20000) . $grown . ask("schemas => '{1}'") . ask("schemas => '{1}'"),
	'1000 20000 t a a', 'twenty thousand different ones take not much, and the first is still remembered');
within($memory . "DO \$\$ BEGIN FOR n IN 1 .. 2000 LOOP BEGIN PERFORM " . call('') . "; RAISE division_by_zero; EXCEPTION WHEN division_by_zero THEN END; END LOOP; END \$\$;"
	  . $grown . ask() . ask() . $jobs, 't a a 1', 'nor do two thousand that are taken back');

$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/WARNING:  user mapping for .* does not exist/);
done_testing();
