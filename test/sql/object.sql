-- What CREATE EXTENSION makes: tables, privileges, row security, comments
\set ECHO none
\pset format unaligned
\pset tuples_only true
SET client_min_messages = warning;

BEGIN;
CREATE EXTENSION pgtap;
SELECT plan(104);

-- All there is of ours in the catalogs, except for what is pgTAP's, by kind and name
CREATE VIEW pg_temp.ours AS
	SELECT 'relation' AS kind, oid::regclass::text AS name FROM pg_class WHERE relname ~ 'omni_refresh'
	UNION ALL
	SELECT 'type', oid::regtype::text FROM pg_type WHERE typname ~ 'omni_refresh'
	UNION ALL
	SELECT 'function', oid::regprocedure::text FROM pg_proc WHERE proname ~ 'omni_refresh'
	UNION ALL
	SELECT 'wrapper', fdwname FROM pg_foreign_data_wrapper WHERE fdwname ~ 'omni_refresh'
	UNION ALL
	SELECT 'event trigger', evtname FROM pg_event_trigger WHERE evtname ~ 'omni_refresh'
	UNION ALL
	SELECT 'policy', polname FROM pg_policy WHERE polname ~ 'omni_refresh'
	UNION ALL
	SELECT 'constraint', conname FROM pg_constraint WHERE conname ~ 'omni_refresh'
	UNION ALL
	SELECT 'comment', description FROM pg_description WHERE description ~* 'omni';

SELECT is_empty('TABLE pg_temp.ours', 'There is nothing of ours before CREATE EXTENSION');
CREATE EXTENSION omni_refresh;
SELECT isnt_empty('TABLE pg_temp.ours', 'CREATE EXTENSION makes something');
DROP EXTENSION omni_refresh;
SELECT is_empty('TABLE pg_temp.ours', 'DROP EXTENSION leaves nothing');

-- Any schema, at the time of CREATE EXTENSION
CREATE SCHEMA "We ird schema, ä";
CREATE EXTENSION omni_refresh SCHEMA "We ird schema, ä";
SELECT throws_ok('ALTER EXTENSION omni_refresh SET SCHEMA public', '0A000',
	'extension "omni_refresh" does not support SET SCHEMA',
	'The extension stays in the schema it was created in');
SELECT is_empty($$
	SELECT pg_describe_object(classid, objid, objsubid)
	FROM pg_depend
	JOIN pg_extension e ON refclassid = 'pg_extension'::regclass AND refobjid = e.oid
	CROSS JOIN LATERAL pg_identify_object(classid, objid, objsubid) AS object
	WHERE extname = 'omni_refresh' AND deptype = 'e' AND object.schema <> quote_ident('We ird schema, ä')$$,
	'All that has a schema is in the schema chosen');
SELECT has_function('We ird schema, ä', 'omni_refresh', ARRAY['uuid', 'uuid', 'boolean', 'text[]', 'text[]'],
	'A schema with an odd name will do');
DROP EXTENSION omni_refresh;
CREATE EXTENSION omni_refresh;

SELECT is((SELECT (relocatable, superuser, trusted)::text FROM pg_available_extension_versions
		   WHERE name = 'omni_refresh' AND installed),
	'(f,t,f)', 'The extension is not relocatable, for superusers, not trusted');
SELECT is((SELECT extconfig FROM pg_extension WHERE extname = 'omni_refresh'), ARRAY['omni_refresh_watch'::regclass]::oid[],
	'Dumps have the watches, and neither history nor pending work');

-- The tables
CREATE FUNCTION pg_temp.columns(tablename regclass) RETURNS TABLE(name text, type text, not_null bool)
LANGUAGE sql AS $$
	SELECT attname::text, format_type(atttypid, atttypmod), attnotnull
	FROM pg_attribute
	WHERE attrelid = tablename AND attnum > 0 AND NOT attisdropped
	ORDER BY attnum
$$;

SELECT is_empty($$
	SELECT relname::text AS name, attname::text, typname FROM pg_class
		JOIN pg_attribute ON attrelid = pg_class.oid JOIN pg_type ON pg_type.oid = atttypid
	WHERE relname ~ '^omni_refresh' AND typtype = 'd'
	UNION ALL
	SELECT proname::text, NULL, typname FROM pg_proc
		JOIN pg_type ON pg_type.oid = ANY (coalesce(proallargtypes, '{}') || proargtypes || prorettype)
	WHERE proname ~ '^omni_refresh' AND typtype = 'd'$$,
	'Nothing is of a domain: drivers that read a record do not know it');
SELECT results_eq($$SELECT * FROM pg_temp.columns('omni_refresh_job')$$, $$VALUES
	('id', 'bigint', true),
	('status', 'text', true),
	('job_id', 'uuid', false),
	('model_id', 'uuid', true),
	('branch_id', 'uuid', false),
	('kind', 'text', true),
	('hard', 'boolean', false),
	('schemas', 'text[]', false),
	('tables', 'text[]', false),
	('policy', 'text', false),
	('reset_at', 'timestamp with time zone', false),
	('server', 'text', true),
	('origin', 'text', true),
	('requested_by', 'text', true),
	('requested_by_oid', 'oid', true),
	('requested_at', 'timestamp with time zone', true),
	('run_at', 'timestamp with time zone', true),
	('sent_at', 'timestamp with time zone', false),
	('finished_at', 'timestamp with time zone', false),
	('attempts', 'integer', true),
	('may_have_arrived', 'boolean', false),
	('few_failures', 'integer', false),
	('recoveries', 'integer', false),
	('merged_into', 'bigint', false),
	('renewed_at', 'timestamp with time zone', false),
	('retry_of', 'bigint', false),
	('called_by', 'text', false),
	('called_by_oid', 'oid', false),
	('application', 'text', false),
	('database', 'oid', true),
	('error', 'text', false)$$,
	'omni_refresh_job has the columns of its documentation');
SELECT results_eq($$SELECT * FROM pg_temp.columns('omni_refresh_event')$$, $$VALUES
	('id', 'bigint', true),
	('job', 'bigint', true),
	('requested_by', 'text', true),
	('requested_by_oid', 'oid', true),
	('occurred_at', 'timestamp with time zone', true),
	('event', 'text', true),
	('attempt', 'integer', false),
	('http_status', 'integer', false),
	('sqlstate', 'text', false),
	('duration', 'interval', false),
	('detail', 'text', false)$$,
	'omni_refresh_event has the columns of its documentation');
SELECT results_eq($$SELECT * FROM pg_temp.columns('omni_refresh_watch')$$, $$VALUES
	('id', 'uuid', true),
	('server', 'text', true),
	('model_id', 'uuid', true),
	('branch_id', 'uuid', false),
	('schemas', 'text[]', false),
	('delay', 'interval', true),
	('removals', 'interval', false),
	('cache_policy', 'text', false),
	('requested_by', 'text', true),
	('requested_by_oid', 'oid', true),
	('requested_at', 'timestamp with time zone', true),
	('database', 'oid', true),
	('owed_hard', 'boolean', false),
	('owed_schemas', 'text[]', false),
	('owed_tables', 'text[]', false),
	('job', 'bigint', false),
	('unfinished', 'boolean', true),
	('failures', 'integer', true),
	('quiet', 'interval', false),
	('data_seen', 'bigint', false)$$,
	'omni_refresh_watch has the columns of its documentation');
SELECT results_eq($$SELECT * FROM pg_temp.columns('omni_refresh_watch_seen')$$, $$VALUES
	('watch', 'uuid', true),
	('schema', 'text', true),
	('relation', 'text', true),
	('leaf', 'boolean', true),
	('columns', 'text[]', true),
	('types', 'text[]', true),
	('readers', 'text[]', true)$$,
	'omni_refresh_watch_seen has the columns of its documentation');
SELECT results_eq($$SELECT evtname::text COLLATE "default", evtevent::text COLLATE "default", evtenabled::text, evttags FROM pg_event_trigger$$,
	$$VALUES ('omni_refresh_watch', 'ddl_command_end', 'D', NULL::text[])$$, 'The event trigger is disabled');
SELECT col_is_pk(name, 'id', name || ' has the primary key id')
FROM unnest(ARRAY['omni_refresh_job', 'omni_refresh_event']) AS name;
SELECT throws_ok(format('INSERT INTO %I (id) VALUES (1)', name), '428C9', NULL,
	'Nobody makes up an id of ' || name)
FROM unnest(ARRAY['omni_refresh_job', 'omni_refresh_event']) AS name;

CREATE FUNCTION pg_temp.add_job(role name, status text DEFAULT 'pending', kind text DEFAULT 'schema',
								origin text DEFAULT 'call') RETURNS void
LANGUAGE sql AS $$
	WITH job AS (
		INSERT INTO omni_refresh_job (status, model_id, kind, server, origin,
			requested_by, requested_by_oid, requested_at, run_at, database)
		VALUES (status, '00000000-0000-0000-0000-000000000000', kind, 'omni', origin,
			role, coalesce(to_regrole(role::text)::oid, 1), now(), now(), 1)
		RETURNING id, requested_by, requested_by_oid, requested_at)
	INSERT INTO omni_refresh_event (job, requested_by, requested_by_oid, occurred_at, event)
	SELECT id, requested_by, requested_by_oid, requested_at, 'sending' FROM job
$$;

SELECT lives_ok(format('SELECT pg_temp.add_job(''x'', status => %L)', status),
	format('The status of a job can be %L', status))
FROM unnest('{pending,sending,running,completed,failed,accepted,canceled,merged,unknown}'::text[]) AS status;
SELECT throws_ok(format('SELECT pg_temp.add_job(''x'', status => %L)', status), '23514', NULL,
	format('The status of a job cannot be %L', status))
FROM unnest('{"",Pending,sent,"pending ",done}'::text[]) AS status;
SELECT throws_ok($$SELECT pg_temp.add_job('x', status => NULL)$$, '23502', NULL, 'The status of a job cannot be NULL');
SELECT lives_ok(format('SELECT pg_temp.add_job(''x'', kind => %L)', kind), format('The kind of a job can be %L', kind))
FROM unnest('{schema,cache}'::text[]) AS kind;
SELECT throws_ok(format('SELECT pg_temp.add_job(''x'', kind => %L)', kind), '23514', NULL,
	format('The kind of a job cannot be %L', kind))
FROM unnest('{"",model}'::text[]) AS kind;
SELECT lives_ok(format('SELECT pg_temp.add_job(''x'', origin => %L)', origin),
	format('The origin of a job can be %L', origin))
FROM unnest('{call,on_commit,ddl,retry}'::text[]) AS origin;
SELECT throws_ok(format('SELECT pg_temp.add_job(''x'', origin => %L)', origin), '23514', NULL,
	format('The origin of a job cannot be %L', origin))
FROM unnest('{"",trigger}'::text[]) AS origin;

CREATE FUNCTION pg_temp.add_event(event text) RETURNS void LANGUAGE sql AS $$
	INSERT INTO omni_refresh_event (job, requested_by, requested_by_oid, occurred_at, event)
	SELECT max(id), 'x', 1, now(), event FROM omni_refresh_job
$$;
SELECT lives_ok(format('SELECT pg_temp.add_event(%L)', event), format('An event can be %L', event))
FROM unnest('{sending,accepted,attempt_failed,refused,rate_limited,merged,released,canceled,
	recovered,waiting,changed,completed,failed,unknown}'::text[]) AS event;
SELECT throws_ok(format('SELECT pg_temp.add_event(%L)', event), '23514', NULL, format('An event cannot be %L', event))
FROM unnest('{"",pending,running,sent}'::text[]) AS event;

SELECT is(count(*), 16::bigint, 'There are jobs with events') FROM omni_refresh_event WHERE event = 'sending';
DELETE FROM omni_refresh_job WHERE id % 2 = 0;
SELECT is_empty('SELECT FROM omni_refresh_event WHERE job % 2 = 0', 'With a job go its events');
SELECT isnt_empty('SELECT FROM omni_refresh_event WHERE job % 2 = 1', 'but not those of other jobs');
DO $$ BEGIN PERFORM pg_temp.add_job('x') FROM generate_series(1, 2500); END $$;
DELETE FROM omni_refresh_job WHERE requested_by = 'x' AND id > 20;
SELECT is_empty('SELECT FROM omni_refresh_event WHERE job > 20', 'nor do those of many jobs stay');
TRUNCATE omni_refresh_job;
SELECT is_empty('TABLE omni_refresh_event', 'TRUNCATE takes all events');
DO $$ BEGIN PERFORM pg_temp.add_job('x'); END $$;
TRUNCATE omni_refresh_event, omni_refresh_job;
SELECT is_empty('TABLE omni_refresh_event', 'so does that of both tables');
CREATE TABLE pg_temp.mine (id bigint);
CREATE TRIGGER mine AFTER INSERT ON pg_temp.mine FOR EACH STATEMENT EXECUTE FUNCTION omni_refresh_delete_events();
SELECT throws_ok('INSERT INTO pg_temp.mine VALUES (1)', '39P01', NULL, 'Events are not deleted for other tables');
SELECT is_empty($$SELECT 1 FROM pg_constraint
	WHERE contype = 'f' AND conrelid = 'omni_refresh_job'::regclass$$,
	'merged_into has no foreign key');
SELECT has_index('omni_refresh_event', 'omni_refresh_event_job_idx', ARRAY['job'],
	'The events of a job are found by an index');
SELECT is((SELECT pg_get_expr(indpred, indrelid) FROM pg_index
		   WHERE indexrelid = 'omni_refresh_job_queue_idx'::regclass),
	$$((status = 'pending'::text) AND (origin <> 'call'::text))$$,
	'What is queued has an index of its own');
SELECT is((SELECT pg_get_expr(indpred, indrelid) FROM pg_index
		   WHERE indexrelid = 'omni_refresh_job_active_idx'::regclass),
	$$((status = ANY ('{sending,running}'::text[])) OR ((status = 'pending'::text) AND (origin = 'call'::text)))$$,
	'So has what is being carried out');
SELECT is((SELECT pg_get_expr(indpred, indrelid) FROM pg_index
		   WHERE indexrelid = 'omni_refresh_job_refreshing_idx'::regclass),
	$$((kind <> 'cache'::text) AND (status = ANY ('{pending,sending,running}'::text[])))$$,
	'So have the refreshes that have not ended');

-- Functions
SELECT is_empty($$SELECT proname FROM pg_proc
	WHERE proname ~ '^omni_refresh' AND (provolatile, proparallel) <> ('v', 'u')$$,
	'All functions are volatile and parallel unsafe');
SELECT function_returns('omni_refresh', ARRAY['uuid', 'uuid', 'boolean', 'text[]', 'text[]'],
	'omni_refresh_job', 'A call returns the row of its job');
SELECT results_eq($$
	SELECT proname::text COLLATE "default", array_to_string(proargnames, ' ') COLLATE "default" || ' '
		|| (pronargs - pronargdefaults) || ' ' || proisstrict || ' ' || prosecdef || ' ' || proretset
	FROM pg_proc WHERE proname ~ '^omni_refresh(_cache|_dbt_sync)?(_on_commit)?$' ORDER BY 1$$, $$VALUES
	('omni_refresh', 'model branch hard schemas tables 0 false false false'),
	('omni_refresh_cache', 'model policy reset_at 0 false false false'),
	('omni_refresh_cache_on_commit', 'model policy reset_at 0 false false false'),
	('omni_refresh_dbt_sync', 'model branch 0 false false false'),
	('omni_refresh_dbt_sync_on_commit', 'model branch 0 false false false'),
	('omni_refresh_on_commit', 'model branch hard schemas tables 0 false false false')$$,
	'All arguments may be left out');

-- Comments
SELECT is_empty($$
	SELECT pg_describe_object(classid, objid, 0)
	FROM pg_depend
	JOIN pg_extension e ON refclassid = 'pg_extension'::regclass AND refobjid = e.oid
	WHERE extname = 'omni_refresh' AND deptype = 'e'
	AND classid <> 'pg_type'::regclass	-- the tables' row types, members from 17 on
	AND coalesce(obj_description(objid, classid::regclass::name), '') = ''$$,
	'Each object has a comment');
SELECT is_empty($$
	SELECT attrelid::regclass, attname
	FROM pg_attribute
	JOIN pg_class c ON c.oid = attrelid
	WHERE relname ~ '^omni_refresh' AND relkind IN ('r', 'v') AND attnum > 0 AND NOT attisdropped
	AND coalesce(col_description(attrelid, attnum), '') = ''$$,
	'Each column has a comment');

-- Privileges
CREATE ROLE regress_omni_alice;
CREATE ROLE regress_omni_bob;
CREATE ROLE regress_omni_heir IN ROLE regress_omni_alice;
CREATE ROLE regress_omni_guest NOINHERIT;
GRANT regress_omni_alice TO regress_omni_guest;
CREATE ROLE regress_omni_monitor IN ROLE pg_monitor;
SELECT results_eq($$
	SELECT relname::text COLLATE "default", grantee = 0, privilege_type COLLATE "default", is_grantable
	FROM pg_class, aclexplode(relacl)
	WHERE relname ~ '^omni_refresh_(job|event|watch|watch_seen)$' AND grantee <> relowner
	ORDER BY relname, privilege_type$$,
	$$VALUES ('omni_refresh_event', true, 'SELECT', false), ('omni_refresh_job', true, 'SELECT', false),
		('omni_refresh_watch', true, 'SELECT', false)$$,
	'PUBLIC may read the tables; nobody may do more');
SELECT is_empty($$
	SELECT oid::regclass FROM pg_class
	WHERE relname ~ '^omni_refresh'
	AND CASE relkind WHEN 'S' THEN has_sequence_privilege('regress_omni_bob', oid, 'SELECT, USAGE, UPDATE') END$$,
	'Nobody but the owner touches the sequences');
SELECT is((SELECT reloptions FROM pg_class WHERE oid = 'omni_refresh_freshness'::regclass), '{security_invoker=true}',
	'omni_refresh_freshness shows everybody what row security does');
SELECT is(has_function_privilege('regress_omni_bob', 'omni_refresh(uuid, uuid, bool, text[], text[])', 'EXECUTE'),
	true, 'Everybody may call omni_refresh; what counts is the key');
SELECT is(string_agg(oid::regprocedure::text, ' ' ORDER BY proname), 'omni_refresh_changes(uuid,uuid) omni_refresh_unwatch(uuid,uuid) omni_refresh_watch(uuid,uuid,text[],interval,interval,text,interval)',
	'but a watch is not everybody''s')
FROM pg_proc WHERE proname IN ('omni_refresh_watch', 'omni_refresh_unwatch', 'omni_refresh_changes') AND NOT has_function_privilege('regress_omni_bob', oid, 'EXECUTE');

-- Row security
SELECT results_eq($$
	SELECT relname::text COLLATE "default", relrowsecurity FROM pg_class
	WHERE relname IN ('omni_refresh_job', 'omni_refresh_event') ORDER BY 1$$,
	$$VALUES ('omni_refresh_event', true), ('omni_refresh_job', true)$$,
	'Row security is on');
DO $$
BEGIN
	PERFORM pg_temp.add_job(role) FROM unnest('{regress_omni_alice,regress_omni_bob}'::name[]) AS role;
END
$$;

-- Whose jobs and events a role sees
CREATE FUNCTION pg_temp.seen(role name) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	jobs text;
	events text;
BEGIN
	EXECUTE format('SET LOCAL ROLE %I', role);
	SELECT string_agg(replace(requested_by, 'regress_omni_', ''), ' ' ORDER BY requested_by)
	FROM omni_refresh_job INTO jobs;
	SELECT string_agg(replace(requested_by, 'regress_omni_', ''), ' ' ORDER BY requested_by)
	FROM omni_refresh_event INTO events;
	RESET ROLE;
	RETURN 'jobs: ' || coalesce(jobs, 'none') || ', events: ' || coalesce(events, 'none');
END
$$;

SELECT is(pg_temp.seen('regress_omni_' || role), format('jobs: %1$s, events: %1$s', rows), description)
FROM (VALUES
	('alice', 'alice', 'A role sees what it has asked for'),
	('bob', 'bob', 'Another role sees something else'),
	('heir', 'alice', 'A role sees what the roles have asked for whose privileges it inherits'),
	('guest', 'none', 'A role does not see what it could see only after SET ROLE'),
	('monitor', 'alice bob', 'pg_monitor sees everything')) AS v(role, rows, description);
SELECT is(pg_temp.seen(session_user), 'jobs: alice bob, events: alice bob', 'A superuser sees everything');

CREATE FUNCTION pg_temp.as_alice(command text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
	SET LOCAL ROLE regress_omni_alice;
	EXECUTE command;
END
$$;
SELECT throws_ok(format('SELECT pg_temp.as_alice(%L)', format(command, name)), '42501',
	'permission denied for table ' || name,
	'Not even one''s own rows are to be changed: ' || format(command, name))
FROM unnest(ARRAY['omni_refresh_job', 'omni_refresh_event']) AS name,
	 unnest(ARRAY['INSERT INTO %I DEFAULT VALUES', 'UPDATE %I SET requested_by = ''x''', 'DELETE FROM %I',
				  'TRUNCATE %I CASCADE', 'SELECT 1 FROM %I FOR UPDATE', 'LOCK TABLE %I IN SHARE MODE']) AS command;

DROP ROLE regress_omni_guest, regress_omni_heir, regress_omni_alice;
SELECT is(pg_temp.seen('regress_omni_bob'), 'jobs: bob, events: bob', 'A role that is gone harms nobody');
SELECT is(pg_temp.seen('regress_omni_monitor'), 'jobs: alice bob, events: alice bob',
	'What a role has asked for stays when it goes');

SELECT * FROM finish();
ROLLBACK;
