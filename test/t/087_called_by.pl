# The columns called_by and application: tenants behind one login, who SET ROLE, call functions with the
# rights of one owner. Each tenant sees the jobs that it has called, and may wait for them; none sees another's.

use strict;
use warnings FATAL => 'all';

use Test::More;

use OmniLife;
use OmniRoles;

OmniRoles::start('called', login => 'pooler', conf => "omni_refresh.max_in_flight = 1\n");

sub who
{
	my ($id) = @_;

	return sql("SELECT requested_by, called_by, application FROM omni_refresh_job WHERE id = $id");
}

sql(qq{
	CREATE ROLE owner; CREATE ROLE pooler LOGIN NOINHERIT; CREATE ROLE watcher IN ROLE pg_monitor;
	CREATE ROLE one; CREATE ROLE two; CREATE ROLE three; CREATE ROLE heir IN ROLE one; CREATE ROLE guest NOINHERIT IN ROLE one;
	GRANT one, two, three, heir, guest, owner, watcher TO pooler;
	CREATE SERVER omni FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url '${\ $omni->http}', rate_limit '0');
	GRANT USAGE ON FOREIGN SERVER omni TO owner;
	CREATE USER MAPPING FOR owner SERVER omni OPTIONS (api_key '${\ $omni->key}');
	CREATE SCHEMA wrapper;
	GRANT USAGE, CREATE ON SCHEMA wrapper TO PUBLIC;
	GRANT SET ON PARAMETER omni_refresh.enabled TO owner, one, two, three;
	SET ROLE owner; SET search_path = wrapper, public;
	CREATE FUNCTION call() RETURNS bigint LANGUAGE sql SECURITY DEFINER SET search_path = public
		AS 'SELECT id FROM omni_refresh(''$model'')';
	CREATE FUNCTION queue(schemas text[] DEFAULT NULL) RETURNS bigint LANGUAGE sql SECURITY DEFINER
		SET search_path = public SET omni_refresh.enabled = on
		AS 'SELECT id FROM omni_refresh_on_commit(''$model'', schemas => \$1)';
	CREATE FUNCTION retry(job bigint) RETURNS bigint LANGUAGE sql SECURITY DEFINER SET search_path = public
		AS 'SELECT id FROM omni_refresh_retry(\$1)';
	RESET ROLE; SET ROLE three; SET search_path = wrapper, public;
	CREATE FUNCTION queue_by_three() RETURNS bigint LANGUAGE sql SECURITY DEFINER AS 'SELECT wrapper.queue()';
	CREATE FUNCTION refused() RETURNS omni_refresh_job LANGUAGE sql SECURITY DEFINER
		SET omni_refresh.on_failure = warning SET search_path = public AS 'SELECT omni_refresh_on_commit(''$model'')'});

# Who asked

my $call = as('one', q{SET application_name = 'loads'; SELECT wrapper.call()});
is(who($call), 'owner|one|loads', 'a call says for whom its function was run, and by what');
my $queued = as('two', q{SET application_name = 'dbt'; SELECT wrapper.queue()});
is(who($queued), 'owner|two|dbt', '... a queued job, too');
until_true('... which is sent', "status = 'accepted' FROM omni_refresh_job WHERE id = $queued");
is(who($queued), 'owner|two|dbt', '... and then says the same');
$omni->fault('answer', status => 400, body => '{"detail": "no", "status": 400}');
my $failed = as('one', 'SELECT wrapper.queue()');
until_true('a job fails', "status = 'failed' FROM omni_refresh_job WHERE id = $failed");
my $again = as('two', "SELECT wrapper.retry($failed)");
like(who($again), qr/^owner\|two\|/, 'who repeats it is its caller');
until_true('... and is heard', "status = 'accepted' FROM omni_refresh_job WHERE id = $again");
like(who(as('one', 'SELECT wrapper.queue_by_three()')), qr/^owner\|one\|/, 'a function that is called by another one is called by the caller of that');
like(who(as('owner', "SELECT id FROM omni_refresh_on_commit('$model')")), qr/^owner\|owner\|/, 'without such a function, who asks is who calls');
is(as('one', q{SET application_name = 'x'; SELECT id, status, requested_by, called_by, application FROM wrapper.refused()}),
	'|failed|three|one|x', 'a row that is not written says it, too');
sql(q{SET omni_refresh.enabled = off; SET application_name = 'y';
	SELECT 1 / (called_by = current_user AND application = 'y')::int FROM omni_refresh_on_commit(gen_random_uuid())});

# The application

my $long = 'x' x 200;
is(who(as('one', 'SET application_name = ' . $_->[0] . '; SELECT wrapper.' . $_->[2])), "owner|one|$_->[1]", "application_name $_->[0] of $_->[2]")
	for map { my $how = $_; map { [ @$_, $how ] } [ q{''}, '' ], [ "'$long'", substr($long, 0, 63) ], [ q{$$it's "quoted" \ $$}, q{it's "quoted" \ } ] } 'queue()', 'call()';
is(sql(q{SELECT count(*) FROM omni_refresh_job WHERE application = ''}), '0', 'an empty one is NULL');
unlike(who(as('one', q{SET application_name = E'\u00fc'; SELECT wrapper.queue()})), qr/\x{fc}/, 'others than ASCII are as in pg_stat_activity');

# Who sees it

my $seen = q{SELECT coalesce(string_agg(DISTINCT called_by, ' ' ORDER BY called_by), 'none') FROM omni_refresh_job};
my %sees = (one => 'one', two => 'two', three => 'none', '' => 'none', heir => 'one', guest => 'none', owner => 'one owner two', watcher => 'one owner two');
is(as($_, $seen), $sees{$_}, 'what ' . ($_ || 'the login') . ' sees') for sort keys %sees;
is(as($_, 'SELECT count(*) > 0 FROM omni_refresh_event'), $_ eq 'owner' ? 't' : 'f', "whether $_ sees events") for qw(one two three heir owner);
is(as('one', "$seen WHERE id = $queued"), 'none', 'nor is it seen when asked for');

# Who may wait, cancel, retry

until_true('all is done', q{count(*) = 0 FROM omni_refresh_job WHERE status IN ('pending', 'sending')});
my %may = (one => 0, two => 1, three => 0, '' => 0, heir => 0, guest => 0, owner => 1, watcher => 0);
for my $role (sort keys %may)
{
	my $what = ($role || 'the login') . ($may{$role} ? ' may' : ' may not') . " wait for a job of two's";
	is(as($role, "SELECT status FROM omni_refresh_wait($queued)"), $may{$role} ? 'accepted' : '42501', $what);
	like(as($role, "CALL omni_refresh_await($queued)"), $may{$role} ? qr/^\($queued,accepted,/ : qr/^42501$/, '... by the procedure, either');
}
like($error, qr/DETAIL:  Only roles with the privileges of the role that requested or called it, or of the owner of the table, may wait for it\./, '... as the error says');
is(as('heir', "SELECT status FROM omni_refresh_wait($call)"), 'accepted', 'a role waits for what roles called whose privileges it has');
is(as('one', "SELECT omni_refresh_cancel($call)"), '42501', 'who called a job does not cancel it');
is(as('one', "SELECT omni_refresh_retry($failed)"), '42501', '... nor repeats it');

# Once a transaction: each caller has jobs of its own, whose application is that of the first request

is(as('one', q{BEGIN; SET application_name = 'first'; SELECT wrapper.queue() AS first \gset
	SET application_name = 'second'; SELECT wrapper.queue() AS second, wrapper.queue() AS third \gset
	SET LOCAL ROLE two; SELECT wrapper.queue() AS other \gset
	SET LOCAL ROLE one; SELECT wrapper.queue() AS fourth \gset
	SELECT :second = :first, :third = :first, :fourth = :first, :other = :first; SELECT called_by, application FROM omni_refresh_job WHERE id >= :first; COMMIT}),
	"t|t|t|f\none|first", 'requests of two callers in a transaction have jobs of their own');

# Merged: by who asked, not by who called

until_true('all is done', q{count(*) = 0 FROM omni_refresh_job WHERE status IN ('pending', 'sending')});
hold(1);
my @jobs = map { as($_->[0], "SELECT wrapper.queue('{$_->[1]}')") } [ 'one', 'a' ], [ 'two', 'b' ], [ 'two', 'c' ];
my $short = as('two', "SET client_min_messages = error; SELECT id, status, schemas FROM omni_refresh_wait($jobs[1], '0')");
is($short, "$jobs[1]|pending|{b}", 'who waits for too short a time gets its job as it is');
$omni->fault('close', times => -1);
hold(0);
until_true('jobs of two callers are merged', "count(*) = 2 FROM omni_refresh_job WHERE merged_into = $jobs[0]");
until_true('... and tried', "attempts > 0 AND status = 'pending' FROM omni_refresh_job WHERE id = $jobs[0]");
$short = as('two', "SET client_min_messages = error; SELECT id, status, merged_into, schemas, called_by, error ~ '^08006' FROM omni_refresh_wait($jobs[1], '0')");
is($short, "$jobs[1]|pending|$jobs[0]|{b}|two|t", 'who waits gets its own job, as far as its carrier has come');
$omni->reset;
my $outcome = "SELECT id, status, merged_into, schemas, called_by, attempts > 1, sent_at < finished_at, job_id IS NOT NULL, error FROM omni_refresh_wait";
is(as('two', "$outcome($jobs[1])"), "$jobs[1]|accepted|$jobs[0]|{b}|two|t|t|t|", '... and with its end');
is(as('two', qq{CALL omni_refresh_await($jobs[2]) \\gset\nSELECT :'job'}) =~ /^\(($jobs[2]),accepted,.*,"?\{c\}"?,/ ? $1 : $error, $jobs[2], '... also by the procedure');
is(as('one', "$outcome($jobs[0])"), "$jobs[0]|accepted||{a,b,c}|one|t|t|t|", 'who called the carrier sees what it carries out');
is(as('owner', "$outcome($jobs[1])"), "$jobs[0]|accepted||{a,b,c}|one|t|t|t|", 'who requested both gets the carrier');
is(as('one', "$outcome($jobs[1])"), '42501', 'who called the carrier does not wait for what it carries out');
is(as('two', "$seen WHERE id = $jobs[0]"), 'none', 'nor does the other one see the carrier');
is(sql("SELECT string_agg(id || ' ' || status || ' ' || called_by, ', ' ORDER BY id) FROM omni_refresh_job WHERE id >= $jobs[0]"),
	"$jobs[0] accepted one, $jobs[1] merged two, $jobs[2] merged two", '... whose rows are what they were');

# Roles that go

hold(1);
my $of_three = as('three', 'SELECT wrapper.queue()');
sql('DROP OWNED BY three; DROP ROLE three');
hold(0);
until_true('a job is sent, though its caller is gone', "status = 'accepted' FROM omni_refresh_job WHERE id = $of_three");
is(as('one', $seen), 'one', '... and nobody else sees it');
is(as('one', "SELECT omni_refresh_wait($of_three)"), '42501', '... or waits for it');
is(as('owner', "SELECT status FROM omni_refresh_wait($of_three)"), 'accepted', '... but who requested it');

my $session = OmniLife::session($node, 'postgres');
sql('CREATE ROLE brief');
$session->query('SET ROLE brief');
sql('DROP ROLE brief');
my ($id, $err) = $session->query('SELECT wrapper.queue()');
like($err, qr/^$/, 'a role that is gone while its session goes on may still call');
is(sql("SELECT requested_by, called_by IS NULL FROM omni_refresh_job WHERE id = $id"), 'owner|t', '... as nobody');
($id, $err) = $session->query('SELECT wrapper.call()');
is(sql("SELECT requested_by, called_by IS NULL, status FROM omni_refresh_job WHERE id = $id"), 'owner|t|accepted', '... also if it waits');
$session->quit;

# What the owner of the table has written

sql(qq{INSERT INTO omni_refresh_job (status, model_id, kind, hard, server, origin, requested_by, requested_by_oid, called_by, called_by_oid, application, requested_at, run_at, database)
	SELECT 'failed', '$model', 'schema', true, 'omni', 'on_commit', 'owner', 'owner'::regrole, 'one', caller, repeat('x', 1000), now(), now(), 1
	FROM unnest(ARRAY[NULL, 0, 1, 6, 4294967295, 1259]::oid[]) AS caller});
is(as('one', $seen), 'one', 'odd callers are nobody');
is(as('one', "SELECT omni_refresh_wait($_)"), '42501', '... who might wait') for split /\n/, sql(q{SELECT id FROM omni_refresh_job ORDER BY id DESC LIMIT 6});

$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/terminating background worker/, qr/WARNING:  .*permission denied/, qr/WARNING:  timed out waiting/);
done_testing();
