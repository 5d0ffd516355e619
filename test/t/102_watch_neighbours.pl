# DDL never notices a watch: whoever runs it, whatever is locked or lacking, and whatever has
# become of who set the watch. The log and omni_refresh_check() tell.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;
use OmniNode;
use OmniWatch;

my $watch = OmniWatch->new('neighbours', removals => '1 h', conf => "max_wal_senders = 4\nhot_standby = on\n");
my $node = $watch->node;
my $omni = $watch->omni;
my $model = $omni->model;
my $check = q{SELECT detail FROM omni_refresh_check() WHERE check_name LIKE 'watch%'};

END { my $rc = $?; $watch->stop if $watch; $? = $rc; }

# What statements of a role say, beyond what they return; empty if nothing.
sub said
{
	my ($sql, $role) = @_;
	my ($rc, $out, $err) = $node->psql('postgres', "\\set VERBOSITY verbose\nSET client_min_messages = notice;\n$sql", on_error_stop => 0, defined $role ? (extra_params => [ '-U', $role ]) : ());

	return join "\n", map { /((?:ERROR|WARNING|NOTICE|DETAIL|HINT):  .*)/ ? $1 : () } split /\n/, $err;
}

# Who may set a watch, and end it

$watch->sql('CREATE ROLE stranger LOGIN; CREATE ROLE analyst LOGIN; CREATE ROLE other LOGIN; CREATE SCHEMA theirs AUTHORIZATION stranger');
my $set = "SELECT FROM omni_refresh_watch('$model')";
like(said($set, 'stranger'), qr/^ERROR:  42501: permission denied for function omni_refresh_watch$/, 'not everyone may set a watch');
$watch->sql("GRANT EXECUTE ON FUNCTION $_ TO analyst, other") for 'omni_refresh_watch', 'omni_refresh_unwatch', 'omni_refresh_changes';
is(said($set, 'analyst'), '', 'who is granted that may, without owning the event trigger');
is($watch->sql('SELECT evtenabled FROM pg_event_trigger'), 'A', '... which is enabled');
$watch->settle;
my $denied = qr/^ERROR:  42501: permission denied for the watch of role "analyst"\nDETAIL:  Only roles with the privileges of the role that set it/;
like(said($set, 'other'), $denied, 'another role may not replace it');
like(said("SELECT omni_refresh_unwatch('$model')", 'other'), $denied, '... nor end it');
like(said("SELECT * FROM omni_refresh_changes('$model')", 'other'), $denied, '... nor see its changes');
is(said("SELECT omni_refresh_unwatch('$model')", 'analyst'), '', 'its own role may');
is($watch->sql('SELECT evtenabled FROM pg_event_trigger'), 'D', '... which disables the event trigger');

# Arguments

for my $case (
	[ "'$model', delay => '0.5 s'", 'ERROR:  22023: delay must be between 1 s and 1 h' ],
	[ "'$model', delay => '1 day'", 'ERROR:  22023: delay must be between 1 s and 1 h' ],
	[ "'$model', delay => NULL", 'ERROR:  22004: delay must not be null' ],
	[ "'$model', removals => '-1 s'", 'ERROR:  22023: removals must be between 0 s and 1 h' ],
	[ "'$model', schemas => '{}'", "ERROR:  22023: schemas must be a one-dimensional array that is not empty\nHINT:  Leave it out, or give NULL, to watch all schemas." ],
	[ "'$model', schemas => '{NULL}'", 'ERROR:  22004: schemas must not contain nulls' ],
	(map { [ "'$model', schemas => '{sales,$_}'", qq{ERROR:  22023: schema "$_" cannot be watched\nDETAIL:  It is a schema of the system, and watches compare what users have made.\nHINT:  Leave it out of schemas.} ] }
			'pg_catalog', 'information_schema', 'pg_toast', 'pg_temp', 'pg_temp_3'),
	[ "'$model', cache_policy => '..'", 'ERROR:  22023: ".." is not the name of a cache policy' ])
{
	is(said("SELECT FROM omni_refresh_watch($case->[0])"), $case->[1], "omni_refresh_watch($case->[0])");
}
like(said('SELECT FROM omni_refresh_watch()'), qr/^ERROR:  22004: model must be given/, 'without a model');
like(said("SELECT * FROM omni_refresh_changes('$model')"), qr/^ERROR:  42704: there is no watch of this model, server and branch/, 'without a watch');

# A user without any right, and hostile surroundings

$watch->set;
$watch->sql('REVOKE ALL ON SCHEMA public FROM PUBLIC');
is(said(q{
	SET search_path = theirs, pg_catalog, pg_temp;
	CREATE FUNCTION theirs.bad(text, text) RETURNS bool LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION 'caught'; END$$;
	CREATE OPERATOR theirs.= (LEFTARG = text, RIGHTARG = text, FUNCTION = theirs.bad);
	CREATE OPERATOR theirs.<> (LEFTARG = text, RIGHTARG = text, FUNCTION = theirs.bad);
	CREATE FUNCTION theirs.format_type(oid, int) RETURNS text LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION 'caught'; END$$;
	CREATE FUNCTION theirs.starts_with(text, text) RETURNS bool LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION 'caught'; END$$;
	CREATE TABLE theirs.pg_class (a int); CREATE TABLE theirs.pg_attribute (a int);
	SET default_transaction_read_only = off; SET lock_timeout = 1; SET statement_timeout = '60 s';
	CREATE TABLE theirs.t1 (a int)}, 'stranger'), '', 'a user without any right');
like($watch->marked, qr/^added theirs\.pg_class, theirs\.pg_attribute, theirs\.t1$/, '... is served like any other');
$watch->sql('GRANT USAGE ON SCHEMA public TO PUBLIC');
$watch->sql(qq{SET search_path = theirs, pg_catalog; SELECT count(*) FROM public.omni_refresh_changes('$model')});
pass('omni_refresh_changes() is not led astray by a search_path');

# While the tables are locked

my $locker = OmniLife::session($node, 'postgres');
$locker->query('BEGIN; LOCK TABLE omni_refresh_watch, omni_refresh_watch_seen IN ACCESS EXCLUSIVE MODE');
is(said(q{SET statement_timeout = '60 s'; CREATE TABLE theirs.t2 ()}, 'stranger'), '', 'while the tables of watches are locked, DDL does not wait');
is($watch->sql("SET omni_refresh.call_timeout = '60 s'; SELECT status FROM omni_refresh('$model')"), 'accepted', '... nor do calls');
is($watch->sql("SET statement_timeout = '60 s'; $check"), 'another session holds a lock on the tables of watches', '... omni_refresh_check() says so');
$locker->query('LOCK TABLE omni_refresh_job, omni_refresh_event IN ACCESS EXCLUSIVE MODE');
is(said(q{SET statement_timeout = '60 s'; CREATE TABLE theirs.t3 ()}, 'stranger'), '', '... or all tables');
$locker->query('COMMIT');
is($watch->marked, 'added theirs.t2, theirs.t3', '... and all is told afterwards');
$locker->query('BEGIN; SELECT FROM omni_refresh_watch FOR UPDATE');
is(said(q{SET statement_timeout = '60 s'; CREATE TABLE theirs.t4 ()}, 'stranger'), '', 'while the row of a watch is locked');
$locker->query('COMMIT');
is($watch->marked, 'added theirs.t4', '... likewise');

# An older transaction, whose DDL no event trigger saw

$watch->sql("SELECT omni_refresh_unwatch('$model')");
$locker->query('BEGIN; CREATE TABLE theirs.unseen ()');
$watch->set;
$locker->query('COMMIT');
ok($node->poll_query_until('postgres', q{SELECT EXISTS (SELECT FROM omni_refresh_event WHERE detail ~ 'added theirs.unseen')}), 'what an older transaction has made is told');
$locker->quit;
$watch->settle;

# Two who set and end watches at once

my $bench = OmniLife::bench($node, 'postgres', q{SELECT FROM omni_refresh_watch(md5((:client_id % 2)::text)::uuid);
SELECT omni_refresh_unwatch(md5((:client_id % 2)::text)::uuid);}, '-c', 4, '-t', 25);
is(OmniLife::benched($bench), 0, 'watches are set and ended by several sessions at once') or note $bench->{err};
$watch->settle;
is($watch->sql(q{SELECT evtenabled::text || ' ' || count(*) FROM pg_event_trigger, omni_refresh_watch GROUP BY evtenabled}) =~ s/^A //r, $watch->sql('SELECT count(DISTINCT watch) FROM omni_refresh_watch_seen'), '... and no memory is left without a watch');
$watch->{last} = $watch->sql('SELECT max(id) FROM omni_refresh_job');
is($watch->told('CREATE TABLE theirs.t5 ()'), 'added theirs.t5', '... the other one goes on') or note $watch->sql('TABLE omni_refresh_watch');

# A job that fails: the memory is not what Omni was told

$omni->fault('answer', status => 400);
my $last = $watch->sql('SELECT max(id) FROM omni_refresh_job');
$watch->sql('CREATE TABLE theirs.t6 ()');
ok($node->poll_query_until('postgres', 'SELECT failures = 1 AND owed_hard IS NOT NULL AND owed_schemas IS NULL FROM omni_refresh_watch'), 'if a job fails, all is owed');
my $failed = $watch->sql("SELECT id FROM omni_refresh_job WHERE status = 'failed' AND id > $last");
like($watch->sql($check), qr/: its last job, job $failed, has failed$/, '... omni_refresh_check() says so');
ok($node->wait_for_log(qr/job $failed ended as "failed" \(.*, origin ddl, /), '... and the log, with what asked for it');
my $merged = $watch->sql("INSERT INTO omni_refresh_job (status, merged_into, model_id, kind, hard, server, origin, requested_by, requested_by_oid,
		requested_at, run_at, finished_at, database)
	SELECT 'merged', id, model_id, kind, hard, server, origin, requested_by, requested_by_oid, requested_at, run_at, finished_at, database
	FROM omni_refresh_job WHERE id = $failed RETURNING id");
$watch->sql("UPDATE omni_refresh_watch SET job = $merged");
like($watch->sql($check), qr/: its last job, job $failed, has failed$/, '... naming the one with the events, if it was merged into that');
$watch->sql("UPDATE omni_refresh_watch SET job = $failed; DELETE FROM omni_refresh_job WHERE id = $merged");
$watch->sql('CREATE TABLE theirs.t7 ()');
is($watch->sql("SELECT count(*) FROM omni_refresh_job WHERE id > $last"), '1', '... and is not asked for again at once');
$watch->set;

# Its role loses the mapping, then its existence

$watch->sql("SELECT omni_refresh_unwatch('$model')");
$watch->sql('DROP USER MAPPING FOR PUBLIC SERVER omni; CREATE USER MAPPING FOR analyst SERVER omni OPTIONS (api_key $$' . $omni->key . '$$)');
is(said("SELECT FROM omni_refresh_watch('$model', delay => '1 s')", 'analyst'), '', 'a watch of a role with a mapping of its own');
$watch->settle;
$watch->sql('DROP USER MAPPING FOR analyst SERVER omni');
like($watch->sql($check), qr/: cannot send requests: .*mapping/, 'a role that has lost its mapping is told of');
is(said('CREATE TABLE theirs.t8 ()', 'stranger'), '', '... DDL does not notice');
ok($node->poll_query_until('postgres', 'SELECT failures > 0 FROM omni_refresh_watch'), '... the job fails');
$watch->sql('DROP OWNED BY analyst; DROP ROLE analyst');
like($watch->sql($check), qr/: cannot send requests, since role "analyst" no longer exists$/, '... likewise a role that is gone');
is(said('CREATE TABLE theirs.t9 ()', 'stranger'), '', '... DDL does not notice');
$watch->sql('CREATE USER MAPPING FOR PUBLIC SERVER omni OPTIONS (api_key $$' . $omni->key . '$$)');
$watch->set;
is($watch->told('CREATE TABLE theirs.t10 ()'), 'added theirs.t10', 'the owner of the table may replace its watch');

# A table that was altered

$watch->sql('ALTER TABLE omni_refresh_watch_seen DROP COLUMN readers');
is(said('CREATE TABLE theirs.t11 ()', 'stranger'), '', 'with a table that was altered, DDL does not notice');
ok($node->wait_for_log(qr/LOG:  table "omni_refresh_watch_seen" is not as the extension made it/), '... the log tells');
is($watch->sql("SELECT status FROM omni_refresh('$model')"), 'accepted', '... calls go on');
$watch->sql('DROP EXTENSION omni_refresh CASCADE');
is(said('CREATE TABLE theirs.t12 ()', 'stranger'), '', 'without the extension, nothing is left');

# A standby, and its promotion

$watch->sql('CREATE EXTENSION omni_refresh');
OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
$watch->set;
$node->backup('copy');
my $standby = OmniNode->new('standby');
$standby->init_from_backup($node, 'copy', has_streaming => 1);
$standby->start;
$node->wait_for_catchup($standby, 'replay');
for my $statement ($set, "SELECT omni_refresh_unwatch('$model')")
{
	my ($rc, $out, $err) = $standby->psql('postgres', "\\set VERBOSITY verbose\n$statement");
	like($err, qr/ERROR:  25006: /, "on a standby: $statement");
}
is($standby->safe_psql('postgres', "SELECT count(*) FROM omni_refresh_changes('$model')"), '0', '... changes are shown');
$node->stop('immediate');
$standby->promote;
$standby->safe_psql('postgres', 'CREATE TABLE theirs.promoted ()');
ok($standby->poll_query_until('postgres', q{SELECT EXISTS (SELECT FROM omni_refresh_event WHERE detail ~ 'added theirs.promoted')}), '... after the promotion, the watch goes on');

# Without a worker

$standby->append_conf('postgresql.conf', "max_worker_processes = 1\n");	# which is PostgreSQL's own
$standby->restart;
$watch->{node} = $node = $standby;
is(said('CREATE TABLE theirs.t13 ()', 'stranger') . said('CREATE TABLE theirs.t14 ()', 'stranger'), '', 'without a worker process, DDL does not notice');
my $told = () = slurp_file($standby->logfile) =~ /LOG:  could not start a background worker to look for changes of tables: no background worker is available/g;
is($told, 1, '... and the log tells once');
$standby->append_conf('postgresql.conf', "max_worker_processes = 16\n");
$standby->restart;
is($standby->safe_psql('postgres', 'SELECT omni_refresh_wake()'), 't', 'omni_refresh_wake()');
ok($standby->poll_query_until('postgres', q{SELECT EXISTS (SELECT FROM omni_refresh_event WHERE detail ~ 'added theirs.t13, theirs.t14')}), '... finds what was missed');

$standby->stop('fast');
OmniLife::clean($standby, 'the log is clean', qr/terminating|could not start a background worker|could not receive data from WAL|could not connect to the primary|could not send/);
done_testing();
