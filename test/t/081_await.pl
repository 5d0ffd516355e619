# omni_refresh_await(): waits as omni_refresh_wait() does, but commits first and holds no snapshot, so that
# a long wait does not keep VACUUM from its work.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

use OmniAPI;
use OmniFault;
use OmniLife;
use OmniSQL qw(sql);

my $omni = OmniAPI->start;
my $node = OmniFault::node('await', conf => "omni_refresh.track = on\nomni_refresh.min_interval = 0\nautovacuum = off\n");
my $model = $omni->model;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
$omni->set(job_seconds => 1000);

# Queues a job that runs until finish() lets it end; returns its number.
sub running
{
	my ($before) = @_;
	my $id = sql(($before // '') . "SELECT id FROM omni_refresh_on_commit('$model')");

	$node->poll_query_until('postgres', "SELECT status = 'running' FROM omni_refresh_job WHERE id = $id") or die;
	return $id;
}

# Lets Omni say that a job is completed.
sub finish
{
	my ($id) = @_;

	$omni->fault('answer', path => sql("SELECT job_id FROM omni_refresh_job WHERE id = $id"), status => 200, body => '{"status": "COMPLETED"}');
	sql(q{UPDATE omni_refresh_job SET run_at = clock_timestamp() WHERE status = 'running'; SELECT omni_refresh_wake()});
	return;
}

# Starts to wait in a session of its own, until it is seen to.
sub begin
{
	my ($sql, %options) = @_;
	my $call = OmniFault::begin($node, "$sql;", app => 'waiting', %options);

	$call->{backend} = OmniFault::wait_until_waiting($node, 'waiting');
	return $call;
}

# The id and the status in a printed row of a job
sub job
{
	my ($out) = @_;
	return join '|', ($out =~ /^\((\d+),(\w+),/m)[0, 1];
}

sql('CREATE TABLE done (what text); CREATE TABLE bulk AS SELECT generate_series(1, 1000) AS i; GRANT ALL ON done TO PUBLIC; VACUUM bulk');

# Holds no snapshot

# Deletes rows while a session waits; returns whether VACUUM comes to remove them, or, where that is not
# expected, whether it does at once.
sub removed
{
	my ($expected) = @_;

	sql('DELETE FROM bulk WHERE i IN (SELECT i FROM bulk LIMIT 10)');
	for my $try (1 .. ($expected ? 100 : 1))
	{
		my $err;
		$node->psql('postgres', 'VACUUM (VERBOSE) bulk', stderr => \$err);
		return 1 if $err =~ /[1-9]\d* removed, \d+ remain, 0 are dead/;
		Time::HiRes::sleep(0.05);
	}
	return 0;
}

my $id = running();
my $call = begin("SELECT id FROM omni_refresh_wait($id)");
ok(!removed(0), 'while a function waits, VACUUM cannot remove rows');
is(sql("SELECT backend_xmin IS NULL FROM pg_stat_activity WHERE pid = $call->{backend}"), 'f', '... since it holds a snapshot');
sql("SELECT pg_cancel_backend($call->{backend})");
OmniFault::finish($call);
ok(removed(1), '... which goes with it');

my %waits = (
	'CALL' => "CALL omni_refresh_await($id)",
	'CALL under REPEATABLE READ' => "SET default_transaction_isolation = 'repeatable read'; CALL omni_refresh_await($id)",
	'CALL under SERIALIZABLE' => "SET default_transaction_isolation = 'serializable'; CALL omni_refresh_await($id)",
	'CALL after a block' => "BEGIN; SELECT count(*) FROM done; COMMIT; CALL omni_refresh_await($id)",
	'DO' => "DO \$\$ DECLARE j omni_refresh_job; BEGIN PERFORM count(*) FROM done; CALL omni_refresh_await($id, job => j); END \$\$",
	'a loop' => "DO \$\$ DECLARE j omni_refresh_job; r record; BEGIN FOR r IN SELECT * FROM done LOOP CALL omni_refresh_await($id, job => j); END LOOP; END \$\$");
sql(q{INSERT INTO done VALUES ('something')});
for my $how (sort keys %waits)
{
	$call = begin($waits{$how});
	ok(removed(1), "while a procedure waits, VACUUM removes rows: $how");
	ok($node->poll_query_until('postgres', "SELECT backend_xmin IS NULL AND backend_xid IS NULL FROM pg_stat_activity WHERE pid = $call->{backend}"),
		'... since it holds no snapshot');
	sql("SELECT pg_cancel_backend($call->{backend})");
	OmniFault::finish($call);
}

# To the end

$call = begin("CALL omni_refresh_await($id)");
finish($id);
OmniFault::finish($call);
is(job($call->{out}) . $call->{err}, "$id|completed", 'who waits gets the job when it is completed');
is(job(sql("CALL omni_refresh_await($id)")), "$id|completed", 'who comes later gets it, too');
is(sql("CALL omni_refresh_await($id)"), sql("SELECT job FROM omni_refresh_job AS job WHERE id = $id"), '... the row as it is');
is(job(sql("CALL omni_refresh_await($id, '0')")), "$id|completed", '... also by a timeout of 0');
is(job(sql("CALL omni_refresh_await(id => $id, timeout => '1 h', job => NULL)")), "$id|completed", '... or by the names of the arguments');
is(job(sql("SET default_transaction_read_only = on; CALL omni_refresh_await($id)")), "$id|completed", '... in transactions that are read-only');
is(job(sql("UPDATE omni_refresh_job SET error = (SELECT string_agg(md5(i::text), ' ') FROM generate_series(1, 10000) AS i) WHERE id = $id;"
	. "SET client_encoding = 'UTF8'; CALL omni_refresh_await($id)")), "$id|completed", '... with a long error');

my ($carrier, $merged) = split /\n/, sql("SELECT (omni_refresh_on_commit('$model', hard => false)).id UNION ALL SELECT (omni_refresh_on_commit('$model', hard => true)).id");
$node->poll_query_until('postgres', "SELECT status = 'running' FROM omni_refresh_job WHERE id = $carrier") or die;
is(sql("SELECT status, merged_into FROM omni_refresh_job WHERE id = $merged"), "merged|$carrier", 'of a job that was merged');
$call = begin("CALL omni_refresh_await($merged)");
finish($carrier);
OmniFault::finish($call);
is(job($call->{out}) . $call->{err}, "$carrier|completed", '... the one that carries it out is waited for, and returned');

# Progress

$omni->fault('hang');
$id = sql("SELECT id FROM omni_refresh_on_commit('$model')");
$omni->wait_for_requests(1, qr/refresh/);
$call = begin("CALL omni_refresh_await($id)");
$omni->set(job_seconds => 0);
$omni->fault('none');
OmniFault::finish($call);
is(job($call->{out}), "$id|completed", 'who waits from the sending on gets the end');
is(() = $call->{err} =~ /NOTICE:  00000: job $id is running$/mg, 1, '... and is told on the way');
$omni->reset;
$omni->set(job_seconds => 1000);

# The row's type

$call = OmniFault::call($node, "DO \$\$ DECLARE j $_; BEGIN CALL omni_refresh_await($id, job => j); RAISE NOTICE 'it is %', j.status; END \$\$;")
	and like($call->{err}, qr/NOTICE:  00000: it is completed$/m, "PL/pgSQL takes the row into a variable: $_") for 'omni_refresh_job', 'record';
$call = OmniFault::call($node, "DO \$\$ BEGIN CALL omni_refresh_await($id); END \$\$;");
is($call->{sqlstate}, '42601', '... without which it does not call');
is($node->psql('postgres', q{BEGIN; ALTER TABLE omni_refresh_job ADD note text DEFAULT 'none'; ROLLBACK}), 0, 'the owner can add columns to the table');

# Arguments, timeouts

$id = running();
for my $timeout ('0', '0.2 s')
{
	$call = OmniFault::call($node, "CALL omni_refresh_await($id, '$timeout');");
	is(job($call->{out}), "$id|running", "after a timeout the row is returned as it is: $timeout");
	like($call->{err}, qr/WARNING:  01000: timed out waiting for job $id\nDETAIL:  The job is running\.\nHINT: /, '... with a warning');
}
for my $case ([ "$id, '-1 s'", '22023', 'timeout must not be negative' ], [ "$id, NULL", '22004', 'timeout must not be null' ],
	[ 'NULL', '22004', 'id must not be null' ])
{
	my ($arguments, $sqlstate, $message) = @$case;
	$call = OmniFault::call($node, "DO \$\$ DECLARE j omni_refresh_job; BEGIN INSERT INTO done VALUES ('wrong'); CALL omni_refresh_await($arguments, job => j); END \$\$;");
	is("$call->{sqlstate} $call->{message}", "$sqlstate $message", "arguments are checked: $arguments");
}
is(sql(q{SELECT count(*) FROM done WHERE what = 'wrong'}), '0', '... before anything is committed');
$call = OmniFault::call($node, 'CALL omni_refresh_await(1000000);');
is("$call->{sqlstate} $call->{message}", '42704 job 1000000 does not exist', 'there must be a job of that number');

# Commits

sub done
{
	my $done = sql(q{SELECT string_agg(what, ' ' ORDER BY what) FROM done});
	sql('TRUNCATE done');
	return $done;
}

# A procedure's or a block's body: queues a job, and waits for it.
sub body
{
	my ($await) = @_;
	return qq{
	DECLARE
		mine bigint;
		j omni_refresh_job;
	BEGIN
		INSERT INTO done VALUES ('before');
		SELECT id INTO mine FROM omni_refresh_on_commit('$model');
		$await
		INSERT INTO done VALUES ('after, ' || j.status);
	END};
}
my $await = 'CALL omni_refresh_await(mine, job => j);';
my $guarded = "BEGIN $await EXCEPTION WHEN division_by_zero THEN NULL; END;";
sql(join '', 'CREATE PROCEDURE plain() LANGUAGE plpgsql AS $$', body($await), '$$;',
	q{CREATE PROCEDURE setting() LANGUAGE plpgsql SET work_mem = '1MB' AS $$}, body($await), '$$;',
	'CREATE PROCEDURE definer() LANGUAGE plpgsql SECURITY DEFINER AS $$', body($await), '$$;',
	'CREATE PROCEDURE guarded() LANGUAGE plpgsql AS $$', body($guarded), '$$;',
	'CREATE PROCEDURE handled() LANGUAGE plpgsql AS $$', body("COMMIT; $guarded"), '$$;',
	'CREATE PROCEDURE outer_plain() LANGUAGE plpgsql AS $$ BEGIN CALL plain(); END $$;',
	'CREATE PROCEDURE outer_setting() LANGUAGE plpgsql SET work_mem = 64 AS $$ BEGIN CALL plain(); END $$;',
	'CREATE FUNCTION wrapped() RETURNS void LANGUAGE plpgsql AS $$', body($await), '$$;');
$omni->set(job_seconds => 0);
done();
for my $how ('DO $$' . body($await) . '$$', 'CALL plain()', 'CALL outer_plain()', 'CALL handled()')
{
	my $name = $how =~ /^DO/ ? 'a block' : $how;
	$call = OmniFault::call($node, "$how;");
	is($call->{status}, 0, "what was done is committed before the wait: $name") or diag($call->{err});
	is(done(), 'after, completed before', '... or the job would not be sent, and what follows is, too');
}
$omni->set(job_seconds => 1000);
$call = begin('CALL plain()');
is(done(), 'before', '... which others see while it waits');
sql("SELECT pg_cancel_backend($call->{backend})");
is(OmniFault::finish($call)->{sqlstate}, '57014', '... and which a cancel does not undo');
sql(q{INSERT INTO done VALUES ('1'), ('2')});
$omni->set(job_seconds => 0);
$call = OmniFault::call($node, q{DO $$ DECLARE r record; j omni_refresh_job; BEGIN
	FOR r IN SELECT what FROM done ORDER BY what LOOP
		j := omni_refresh_on_commit('} . $model . q{');
		CALL omni_refresh_await(j.id, job => j);
		UPDATE done SET what = what || ' ' || j.status WHERE what = r.what;
	END LOOP;
END $$;});
is($call->{status} . done(), '01 completed 2 completed', 'a loop over a query goes on after it');

# Not where it must not commit: there it waits, with a snapshot

for my $how ('BEGIN; CALL plain(); COMMIT', 'CALL setting()', 'CALL outer_setting()', 'CALL definer()', 'CALL guarded()', 'SELECT wrapped()',
	'BEGIN; SAVEPOINT s; CALL plain(); COMMIT')
{
	$call = OmniFault::call($node, "$how;");
	is($call->{sqlstate}, '55000', "it does not commit, and a job of one's own is an error: $how");
	is(done(), '', '... which undoes what was done');
}
$omni->set(job_seconds => 1000);
$id = running();
for my $case ([ 'BEGIN; CALL omni_refresh_await(%d)', 'ROLLBACK' ], [ 'BEGIN; SAVEPOINT s; CALL omni_refresh_await(%d)', 'ROLLBACK' ],
	[ q{DO $$ DECLARE j omni_refresh_job; BEGIN BEGIN CALL omni_refresh_await(%d, job => j); EXCEPTION WHEN division_by_zero THEN NULL; END; END $$} ],
	[ q{DO $$ DECLARE j omni_refresh_job; BEGIN COMMIT; BEGIN CALL omni_refresh_await(%d, job => j); EXCEPTION WHEN division_by_zero THEN NULL; END; END $$} ])
{
	my $how = sprintf $case->[0], $id;
	$call = begin($how);
	sql("SELECT pg_cancel_backend($call->{backend})");
	is(OmniFault::finish($call)->{sqlstate}, '57014', "... but it waits for another one: $case->[0]");
}
$call = begin("SELECT 1 AS one \\; CALL omni_refresh_await($id)");
finish($id);
OmniFault::finish($call);
is(job($call->{out}) . $call->{err}, "$id|completed", '... to its end: several statements sent as one');

# Those who do not wait to the end

$id = running();
my %ends = (
	cancel => [ sub { sql("SELECT pg_cancel_backend($_[0])") }, '57014' ],
	terminate => [ sub { sql("SELECT pg_terminate_backend($_[0])") }, '57P01' ],
	statement_timeout => [ sub { }, '57014', q{SET statement_timeout = '5 s'; } ]);
for my $end (sort keys %ends)
{
	my ($how, $sqlstate, $before) = @{ $ends{$end} };
	for my $block (0, 1)
	{
		my $sql = $block ? "DO 'DECLARE j omni_refresh_job; BEGIN CALL omni_refresh_await($id, job => j); END'" : "CALL omni_refresh_await($id)";
		$call = begin(($before // '') . $sql);
		$how->($call->{backend});
		is(OmniFault::finish($call)->{sqlstate}, $sqlstate, "who waits can be ended by $end" . ($block ? ', also in a block' : ''));
	}
}
$call = begin("CALL omni_refresh_await($id)");
OmniFault::kill_client($call);
ok($node->poll_query_until('postgres', "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $call->{backend}"), 'a client that leaves is missed');
is(sql("SELECT status FROM omni_refresh_job WHERE id = $id"), 'running', '... none of which ends the job');
$call = begin("CALL omni_refresh_await($id)");
sql("DELETE FROM omni_refresh_job WHERE id = $id");
OmniFault::finish($call);
is("$call->{sqlstate} $call->{message}", "42704 job $id does not exist", 'who waits for a job that is deleted is told');
my $session = OmniLife::session($node, 'postgres');
$id = running();
my ($out, $err) = $session->query("CALL omni_refresh_await($id, '100 ms')");
like($err, qr/timed out waiting/, 'a session');
($out, $err) = $session->query("SET statement_timeout = '100 ms'; CALL omni_refresh_await($id)");
like($err, qr/57014/, '... whose wait was canceled');
($out, $err) = $session->query("RESET statement_timeout; CALL omni_refresh_await($id, '10 ms'); SELECT 'fine'");
like($out, qr/fine/, '... can go on');
$session->quit;

# What a commit cannot do

sql('CREATE TABLE checked (i int UNIQUE DEFERRABLE INITIALLY DEFERRED)');
$call = OmniFault::call($node, "DO \$\$ DECLARE j omni_refresh_job; BEGIN INSERT INTO checked VALUES (1), (1); CALL omni_refresh_await($id, job => j); END \$\$;");
is($call->{sqlstate}, '23505', 'a commit that fails is an error of the wait');
$call = OmniFault::call($node, "DO \$\$ DECLARE j omni_refresh_job; r record; BEGIN FOR r IN INSERT INTO done VALUES ('x') RETURNING what LOOP
	CALL omni_refresh_await($id, job => j); END LOOP; END \$\$;");
is($call->{sqlstate}, '55000', '... as is a commit in a loop over a query that writes');
is(done(), '', '... and undoes it');

# Who may

sql(q{CREATE ROLE asker LOGIN; CREATE ROLE stranger LOGIN; CREATE ROLE member LOGIN IN ROLE asker});
my $theirs = running('SET ROLE asker; ');
$call = OmniFault::call($node, "CALL omni_refresh_await($theirs);", user => 'stranger');
is("$call->{out}$call->{sqlstate}", '42501', 'others may not wait');
$call = OmniFault::call($node, "CALL omni_refresh_await($theirs, '0');", user => $_)
	and is(job($call->{out}), "$theirs|running", "the requester may, and who is as he is: $_") for qw(asker member);
$call = begin("SET ROLE asker; CALL omni_refresh_await($theirs)");
finish($theirs);
OmniFault::finish($call);
is(job($call->{out}) . $call->{err}, "$theirs|completed", '... or becomes him, also across commits');
sql('CREATE ROLE apart LOGIN NOINHERIT IN ROLE asker');
$theirs = running('SET ROLE asker; ');
$call = OmniFault::call($node, "DO \$\$ DECLARE j omni_refresh_job; BEGIN SET LOCAL ROLE asker; CALL omni_refresh_await($theirs, '0', j); END \$\$;", user => 'apart');
is($call->{sqlstate}, '42501', '... but not only until the commit');

# Psql

like(sql("CALL omni_refresh_await($theirs, '0') \\gset\n\\echo :job"), qr/^\($theirs,running,/, 'psql takes the row into a variable');

ok(index(slurp_file($node->logfile), $omni->key) < 0, 'the key is not in the log');
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|terminated by signal|snapshot|leak/i, 'nothing has crashed, or leaked');
done_testing();
