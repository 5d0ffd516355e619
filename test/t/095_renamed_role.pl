# A role is its OID, and its name is only shown. A role that is renamed keeps what it has requested, called and
# watches; a new role of its old name sees and lends nothing of that. What a dropped role has queued fails.

use strict;
use warnings FATAL => 'all';

use Test::More;

use OmniRoles;

OmniRoles::start('renamed');
my ($http, $branch) = ($omni->http, $omni->branch);
sql(qq{
	CREATE ROLE loader LOGIN; CREATE ROLE tenant LOGIN; CREATE ROLE leaver LOGIN; CREATE ROLE boss LOGIN;
	CREATE SERVER omni FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url '$http', rate_limit '0', model '$model');
	GRANT USAGE ON FOREIGN SERVER omni TO PUBLIC;
	CREATE USER MAPPING FOR loader SERVER omni OPTIONS (api_key 'loaders');
	CREATE USER MAPPING FOR leaver SERVER omni OPTIONS (api_key 'leavers');
	GRANT EXECUTE ON FUNCTION omni_refresh_watch, omni_refresh_unwatch, omni_refresh_changes TO loader;
	CREATE SCHEMA wrapper; GRANT ALL ON SCHEMA wrapper TO loader; GRANT USAGE ON SCHEMA wrapper TO PUBLIC;
	GRANT SET ON PARAMETER omni_refresh.enabled TO PUBLIC;
	SET ROLE loader;
	CREATE FUNCTION wrapper.queue() RETURNS bigint LANGUAGE sql SECURITY DEFINER SET search_path = public SET omni_refresh.enabled = on
		AS 'SELECT id FROM omni_refresh_on_commit()'});
$omni->set(key => 'loaders');

sub queue
{
	my ($role, $arguments) = @_;

	return as($role, "SET omni_refresh.enabled = on; SELECT id FROM omni_refresh_on_commit($arguments)");
}
my $count = 'SELECT count(*) FROM omni_refresh_job';
my $events = 'SELECT count(*) FROM omni_refresh_event';

# What a role has queued is its own by any name

my $ended = as('loader', 'SELECT id FROM omni_refresh()');
hold(1);
my @queued = map { queue('loader', "schemas => '{s$_}'") } 1 .. 3;
my $called = as('tenant', 'SELECT wrapper.queue()');
my $dropped = queue('leaver', '');
is(as('loader', $count), '5', 'a role sees what it has requested');
is(as('tenant', $count), '1', '... and another one what it has called');
my $seen = as('loader', $events);
sql(q{ALTER ROLE loader RENAME TO cargo; ALTER ROLE tenant RENAME TO lodger; ALTER USER MAPPING FOR cargo SERVER omni OPTIONS (SET api_key 'cargos');
	DROP OWNED BY leaver; DROP ROLE leaver; CREATE ROLE loader LOGIN; CREATE ROLE tenant LOGIN; CREATE ROLE leaver LOGIN;
	CREATE USER MAPPING FOR loader SERVER omni OPTIONS (api_key 'loaders');
	CREATE USER MAPPING FOR leaver SERVER omni OPTIONS (api_key 'cargos')});
$omni->set(key => 'cargos');
is(as('cargo', $count), '5', 'once renamed, it sees the same');
is(as('lodger', $count), '1', '... and so does who has called');
is(as('cargo', $events), $seen, '... also of the event log');
is(as($_, "$count; $events"), "0\n0", "a new role $_ sees nothing") for qw(loader tenant leaver);
for my $case ([ loader => $queued[0] ], [ tenant => $called ], [ leaver => $dropped ], [ loader => $ended ])
{
	my ($role, $id) = @$case;

	is(as($role, "SELECT omni_refresh_$_($id)"), '42501', "... and does not $_ a job that is not its own") for qw(wait cancel retry);
}
is(queue('cargo', "schemas => '{s4}'") > $dropped, 1, 'the renamed role goes on');
my $queued_later = queue('loader', '');
is(as('cargo', "SELECT omni_refresh_cancel($queued[2])"), 't', '... and cancels what it has queued before');
hold(0);
until_true('what is queued comes to its end', q{bool_and(finished_at IS NOT NULL) FROM omni_refresh_job});
is(sql("SELECT string_agg(DISTINCT status, ' ') FROM omni_refresh_job WHERE id IN ($queued[0], $queued[1], $called) AND status <> 'merged'"),
	'accepted', '... by the renamed role');
is(scalar(grep { $_->{headers}{authorization} eq 'Bearer loaders' } $omni->requests), 2, '... with its own key');
is(sql("SELECT count(*) FROM omni_refresh_job WHERE merged_into = $queued[0] AND requested_by = 'cargo'"), '1',
	'... one request for what it has queued by both names');
is(sql("SELECT status, error FROM omni_refresh_job WHERE id = $dropped"), 'failed|42704: role "leaver" was dropped',
	'a job of a dropped role fails, whatever its namesake has');
like(sql("SELECT status, error FROM omni_refresh_job WHERE id = $queued_later"), qr/^failed\|28000: /, 'the new role has a key of its own');
like(as('lodger', "SELECT status FROM omni_refresh_wait($called)"), qr/^accepted$/, 'who has called waits by its new name');

# A call goes on, too

$omni->fault('answer', status => 503, body => '', headers => { 'Retry-After' => 1 });
my $call = OmniFault::begin($node, 'SELECT status FROM omni_refresh()', user => 'cargo');
OmniFault::poll_story($node, 'pending: sending attempt_failed', 'a call waits for its next attempt');
sql('ALTER ROLE cargo RENAME TO hauler');
OmniFault::finish($call);
is($call->{status}, 0, '... which is made, though the role was renamed') or diag($call->{err});

# A watch

is(as('hauler', 'SELECT requested_by FROM omni_refresh_watch(delay => \'1 s\')'), 'hauler', 'a role watches');
my $first = q{FROM omni_refresh_watch JOIN omni_refresh_job AS job ON job.id = omni_refresh_watch.job};
until_true('... and asks for all', "count(*) = 1 $first WHERE job.status = 'accepted'");
my $last = sql("SELECT job.id $first");
sql('ALTER ROLE hauler RENAME TO mover; CREATE ROLE hauler LOGIN; GRANT EXECUTE ON FUNCTION omni_refresh_watch, omni_refresh_unwatch, omni_refresh_changes TO hauler');
sql(q{CREATE USER MAPPING FOR hauler SERVER omni OPTIONS (api_key 'haulers'); CREATE TABLE noticed (i int)});
until_true('its watch goes on by its new name', "count(*) = 1 $first WHERE job.id > $last AND job.status = 'accepted' AND job.requested_by = 'mover'");
like(sql(q{SELECT ok, detail FROM omni_refresh_check() WHERE check_name = 'watch'}), qr/^t\|.*: active$/, '... as the check says');
like(as('hauler', "SELECT $_") . $error, qr{^42501.*watch of role "mover"}s, "its namesake does not call $_") for 'omni_refresh_watch()', 'omni_refresh_unwatch()', 'omni_refresh_changes()';
is(as('mover', 'SELECT omni_refresh_unwatch()'), 't', '... but the role itself');

# A retry by the role is one whatever its name was

$omni->fault('answer', status => 404);
my $failed = as('mover', q{SET omni_refresh.on_failure = warning; SELECT id FROM omni_refresh()});
my $retry = as('mover', "SELECT id FROM omni_refresh_retry($failed)");
sql('ALTER ROLE mover RENAME TO carrier');
is(as('carrier', "SELECT id FROM omni_refresh_retry($failed)"), $retry, 'a renamed role finds its retry');

is(sql(q{SELECT count(*) FROM omni_refresh_event AS e JOIN omni_refresh_job AS j ON j.id = e.job WHERE e.requested_by_oid <> j.requested_by_oid}), '0',
	'each event has the OID of its job');

# Row security costs little, however many roles there are: the plan looks each row up in a hash table.

for my $table (qw(omni_refresh_job omni_refresh_event))
{
	my $plan = as('boss', "EXPLAIN (COSTS off) SELECT count(*) FROM $table");

	like($plan, qr/hashed SubPlan/, "$table hashes the roles");
	unlike($plan, qr/^(?!.*hashed SubPlan).*Filter:.*\bSubPlan/m, '... and looks for none row by row');
}
sql(qq{DO \$\$ BEGIN FOR i IN 1 .. 5000 LOOP EXECUTE 'CREATE ROLE r' || i; END LOOP; END \$\$;
	INSERT INTO omni_refresh_job (status, model_id, kind, hard, server, origin, requested_by, requested_by_oid, requested_at, run_at, finished_at, database)
	SELECT 'accepted', '$model', 'schema', true, 'omni', 'on_commit', 'gone', 1, now(), now(), now(), 1 FROM generate_series(1, 50000)});
is(as('boss', "SET statement_timeout = '20s'; $count"), '0', 'one of thousands of roles sees none of many jobs of a role that is gone');
is(as('carrier', 'SELECT count(*) > 5 FROM omni_refresh_job'), 't', '... and one sees its own among them');

$node->stop('fast');
done_testing();
