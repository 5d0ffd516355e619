-- What omni_refresh() refuses before anything is sent or written, and in which order
\set ECHO none
\pset format unaligned
\pset tuples_only true
SET client_min_messages = error;	-- there is a warning in a transaction that has written

CREATE EXTENSION pgtap;
CREATE EXTENSION omni_refresh;
CREATE FOREIGN DATA WRAPPER regress_files;
CREATE ROLE regress_omni_user;
CREATE ROLE regress_omni_poor;
CREATE ROLE regress_omni_stranger;
CREATE SERVER omni FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url 'https://omni.invalid');
CREATE SERVER "Odd ""server""" FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url 'https://omni.invalid');
CREATE USER MAPPING FOR regress_omni_user SERVER "Odd ""server""" OPTIONS (api_key 'omni_osk_123');
CREATE SERVER bare FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url 'https://omni.invalid');
CREATE SERVER files FOREIGN DATA WRAPPER regress_files;
GRANT USAGE ON FOREIGN SERVER omni, bare, "Odd ""server""" TO regress_omni_user, regress_omni_poor;
CREATE USER MAPPING FOR regress_omni_user SERVER omni OPTIONS (api_key 'omni_osk_123');
CREATE USER MAPPING FOR regress_omni_poor SERVER omni;
CREATE USER MAPPING FOR PUBLIC SERVER omni OPTIONS (api_key 'omni_osk_456');
CREATE SERVER poors FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url 'https://omni.invalid');
ALTER SERVER poors OWNER TO regress_omni_poor;
CREATE SERVER keyless FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url 'https://omni.invalid');
GRANT USAGE ON FOREIGN SERVER keyless TO PUBLIC;
CREATE USER MAPPING FOR PUBLIC SERVER keyless;

BEGIN;
-- The error of a command, run by a role. What it did is undone.
CREATE FUNCTION pg_temp.failure(command text, role name DEFAULT 'regress_omni_user') RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
	detail text;
	hint text;
BEGIN
	EXECUTE format('SET LOCAL ROLE %I', role);
	EXECUTE command;
	RAISE SQLSTATE 'TST00';
EXCEPTION
	WHEN SQLSTATE 'TST00' THEN
		RETURN 'none';
	WHEN OTHERS THEN
		GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
		RETURN concat_ws(E'\n', SQLSTATE || ': ' || SQLERRM, nullif(detail, ''), nullif(hint, ''));
END
$$;

-- The error of a call with these further arguments, that is, after these commands
CREATE FUNCTION pg_temp.call(arguments text DEFAULT '', commands text DEFAULT '',
							 role name DEFAULT 'regress_omni_user') RETURNS text
LANGUAGE sql AS $$
	SELECT pg_temp.failure(commands || format(
		'; SELECT * FROM omni_refresh(''00000000-0000-0000-0000-000000000001''%s)', arguments), role)
$$;

SELECT plan(81);

-- The model and the policy
SELECT is(pg_temp.failure(format('SELECT * FROM %s', call)), $$22004: model must be given
The argument "model" is null or left out, and the server "omni" has no option "model".
Pass the uuid of a model, as it stands in the address of its page in Omni, or set it for every request with ALTER SERVER omni OPTIONS (ADD model '...').$$,
	format('%s is refused if the server has no model, either', call))
FROM unnest(ARRAY['omni_refresh()', 'omni_refresh(NULL)', 'omni_refresh_on_commit()', 'omni_refresh_cache()',
	'omni_refresh_cache_on_commit(policy => ''x'')']) AS call;
SELECT is(pg_temp.failure(format('SELECT * FROM %s', call)), $$22004: policy must be given
The argument "policy" is null or left out, and the server "omni" has no option "cache_policy".
Pass the name of a cache policy of the model, or set it for every request with ALTER SERVER omni OPTIONS (ADD cache_policy '...').$$,
	format('%s is refused if the server has no policy, either', call))
FROM unnest(ARRAY['omni_refresh_cache(''00000000-0000-0000-0000-000000000001'')',
	'omni_refresh_cache_on_commit(''00000000-0000-0000-0000-000000000001'', NULL, ''2026-01-01'')']) AS call;
SELECT alike(pg_temp.failure('SET LOCAL omni_refresh.server = ''Odd "server"''; SELECT * FROM omni_refresh()'),
	'22004: %no option "model".%ALTER SERVER "Odd ""server""" OPTIONS%', 'A hint quotes the name of the server');
SELECT alike(pg_temp.failure('SET LOCAL omni_refresh.on_failure = warning; SELECT * FROM ' || call), '22004: %',
	'It is an error even where a failure is a warning: ' || call)
FROM unnest(ARRAY['omni_refresh()', 'omni_refresh_on_commit()', 'omni_refresh_cache()', 'omni_refresh_cache_on_commit()']) AS call;
SELECT is(pg_temp.failure($$SELECT * FROM omni_refresh('model')$$),
	'22P02: invalid input syntax for type uuid: "model"', 'A model is a uuid');
SELECT is(pg_temp.call($$, branch => 'main'$$),
	'22P02: invalid input syntax for type uuid: "main"', 'A branch is a uuid');

-- Either list
SELECT is(pg_temp.call(format(', %s => %s', list, value)), format(error, list),
		  format('%s cannot %s', list, what))
FROM unnest(ARRAY['schemas', 'tables']) AS list, (VALUES
	('be empty', '''{}''', $$22023: %s must not be an empty array
Leave it out, or give NULL, to refresh all of them.$$),
	('have two dimensions', $$'{{a,b},{c,d}}'$$, '2202E: %s must be a one-dimensional array'),
	('have two dimensions, even with one element', $$'{{a}}'$$, '2202E: %s must be a one-dimensional array'),
	('be one NULL', '''{NULL}''', $$22004: %s must not contain nulls
Element 1 is null.$$),
	('have a NULL', '''{a,NULL,c}''', $$22004: %s must not contain nulls
Element 2 is null.$$),
	('have a NULL, whatever its subscripts', '''[7:8]={a,NULL}''', $$22004: %s must not contain nulls
Element 2 is null.$$),
	('have an empty name', $$'{a,b,""}'$$, $$22023: %s must not contain empty names
Element 3 is empty.$$),
	('have a name of nothing but white space', $$E'{" \t\r\n "}'$$, $$22023: %s must not contain empty names
Element 1 is empty.$$),
	('have a comma', $$'{a,"b,c"}'$$, $$22023: %s must not contain names with a comma
Element 2 is "b,c"; Omni takes the comma for a separator.
Give each name as an element of its own; leave out the list to refresh a name with a comma.$$),
	('have a comma first', $$'{",a"}'$$, $$22023: %s must not contain names with a comma
Element 1 is ",a"; Omni takes the comma for a separator.
Give each name as an element of its own; leave out the list to refresh a name with a comma.$$),
	('have nothing but a comma', $$'{","}'$$, $$22023: %s must not contain names with a comma
Element 1 is ","; Omni takes the comma for a separator.
Give each name as an element of its own; leave out the list to refresh a name with a comma.$$),
	('have a NULL after duplicates', '''{a,a,a,NULL}''', $$22004: %s must not contain nulls
Element 4 is null.$$),
	('go with a hard refresh', '''{a}'', hard => true',
	 $$22023: a hard refresh cannot be limited to schemas or tables
Omni always refreshes the whole model then.
Leave out hard for a soft refresh of what is listed, or leave out schemas and tables.$$))
	AS v(what, value, error);
SELECT alike(pg_temp.call($$, schemas => '{a}', tables => '{b}', hard => true$$),
	'22023: a hard refresh cannot be limited%', 'Both lists do not go with a hard refresh, either');

-- Lists may be long: no time, and no memory, that grows with their square
CREATE FUNCTION pg_temp.is_quick(names int) RETURNS bool LANGUAGE plpgsql AS $$
DECLARE
	began timestamptz := clock_timestamp();
BEGIN
	PERFORM pg_temp.call(format(', schemas => (SELECT array_agg(''schema '' || i) FROM generate_series(1, %s) AS i)',
								names), 'SET LOCAL omni_refresh.server = nowhere');
	RETURN clock_timestamp() < began + interval '1 s';
END
$$;
SELECT ok(pg_temp.is_quick(10000), 'A long list is checked in moments');

-- Servers
SELECT is(pg_temp.call('', 'SET LOCAL omni_refresh.server = nowhere', session_user), $$42704: server "nowhere" does not exist
Create it with CREATE SERVER nowhere FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url 'https://acme.omniapp.co'), or name another one in the setting "omni_refresh.server".$$,
	'A server must exist');
SELECT is(pg_temp.call('', 'SET LOCAL omni_refresh.server = nowhere'), $$42704: server "nowhere" does not exist
Ask a superuser to create it, or to GRANT USAGE ON FOREIGN DATA WRAPPER omni_refresh TO regress_omni_user; or name another one in the setting "omni_refresh.server".$$,
	'Who may not create a server is told who may');
SELECT alike(pg_temp.call('', 'SET LOCAL omni_refresh.server = ''Odd "name"''', session_user),
	E'42704: server "Odd "name"" does not exist\nCreate it with CREATE SERVER "Odd ""name""" FOREIGN%',
	'A hint quotes names');
SELECT alike(pg_temp.call('', 'SET LOCAL omni_refresh.server = ''OMNI'''), '42704: server "OMNI" does not exist%',
	'The name of a server is taken as it is');
SELECT alike(pg_temp.call('', 'SET LOCAL omni_refresh.server = '''''), '42704: server "" does not exist%',
	'No server is a server that does not exist');
SELECT is(pg_temp.call('', 'SET LOCAL omni_refresh.server = files'),
	$$42809: server "files" does not belong to the foreign-data wrapper "omni_refresh"
Name a server of that wrapper in the setting "omni_refresh.server".$$,
	'A server of another wrapper is refused');
SELECT is(pg_temp.call('', '', 'regress_omni_stranger'), $$42501: permission denied for foreign server omni
The server's owner can grant it: GRANT USAGE ON FOREIGN SERVER omni TO regress_omni_stranger.$$,
	'PUBLIC''s mapping is of no use without USAGE');
SELECT is(pg_temp.call('', 'SET LOCAL omni_refresh.server = bare'),
	$$28000: user mapping for "regress_omni_user" on server "bare" does not exist
Create it with CREATE USER MAPPING FOR regress_omni_user SERVER bare OPTIONS (api_key_file '...') as a superuser, or with (api_key '...') if the statement may appear in the server's log.$$,
	'A mapping must exist');
SELECT alike(pg_temp.call('', 'SET LOCAL omni_refresh.server = bare', session_user), '28000: user mapping for %',
	'A superuser needs a mapping like anybody else');
SELECT is(pg_temp.call('', '', 'regress_omni_poor'),
	$$28000: user mapping for "regress_omni_poor" on server "omni" has no API key
Add it with ALTER USER MAPPING FOR regress_omni_poor SERVER omni OPTIONS (ADD api_key_file '...') as a superuser, or with (ADD api_key '...') if the statement may appear in the server's log.$$,
	'A mapping without a key is not made up for by PUBLIC''s');
SELECT is(pg_temp.call('', 'SET LOCAL omni_refresh.server = keyless'),
	$$28000: user mapping for "regress_omni_user" on server "keyless" has no API key
Add it with ALTER USER MAPPING FOR PUBLIC SERVER keyless OPTIONS (ADD api_key_file '...') as a superuser, or with (ADD api_key '...') if the statement may appear in the server's log.$$,
	'PUBLIC''s mapping without a key is named in the hint');
SELECT is(pg_temp.call('', 'SET LOCAL omni_refresh.server = poors', 'regress_omni_poor'),
	$$28000: user mapping for "regress_omni_poor" on server "poors" does not exist
Create it with CREATE USER MAPPING FOR regress_omni_poor SERVER poors OPTIONS (api_key '...'); "api_key_file" needs a server that a superuser owns.$$,
	'Only a superuser''s server takes a key from a file, as the hint says');

-- Order: arguments in their order, then the server, its wrapper, USAGE, the mapping
SELECT alike(pg_temp.failure($$SELECT * FROM omni_refresh(NULL, schemas => '{}')$$), '22023: schemas%',
	'The lists come before a model that is missing');
SELECT alike(pg_temp.failure($$SELECT * FROM omni_refresh_cache(NULL, '..')$$), '22023: "..%', '... and so does the policy');
SELECT alike(pg_temp.failure($$SELECT * FROM omni_refresh_cache(reset_at => 'infinity')$$), '22023: reset_at%',
	'... and the time');
SELECT alike(pg_temp.failure('SET LOCAL omni_refresh.server = bare; SELECT * FROM omni_refresh()'), '28000: %',
	'The server and the mapping come before a model that is missing');
SELECT alike(pg_temp.call($$, schemas => '{}', tables => '{NULL}'$$), '22023: schemas%', 'Schemas come before tables');
SELECT alike(pg_temp.call($$, schemas => '{a}', tables => '{NULL}', hard => true$$), '22004: tables%',
	'The lists come before what does not go together');
SELECT alike(pg_temp.call($$, schemas => '{"",NULL}'$$), '22023: schemas must not contain empty names%',
	'The first element at fault is named');
SELECT alike(pg_temp.call($$, schemas => '{}'$$, 'SET LOCAL omni_refresh.server = nowhere'), '22023: schemas%',
	'The arguments come before the server');
SELECT alike(pg_temp.call($$, schemas => '{a}', hard => true$$, 'SET LOCAL omni_refresh.server = nowhere'), '22023: a hard%',
	'What does not go together comes before the server');
SELECT alike(pg_temp.call('', 'SET LOCAL omni_refresh.server = files', 'regress_omni_stranger'), '42809: %',
	'The wrapper comes before USAGE');
SELECT alike(pg_temp.call('', 'SET LOCAL omni_refresh.server = bare', 'regress_omni_stranger'), '42501: %',
	'USAGE comes before the mapping');
SELECT alike(pg_temp.call($$, schemas => '{}'$$, 'SET LOCAL omni_refresh.on_failure = warning'), '22023: schemas%',
	'A bad argument is an error even where a failure is a warning');
SELECT alike(pg_temp.failure($$SET LOCAL omni_refresh.enabled = off; SELECT * FROM omni_refresh(NULL)$$, session_user),
	'22004: model%', 'A bad argument is an error even where nothing is sent');

-- What is not committed is not there for the worker
SELECT is(pg_temp.call('', $$
	CREATE SERVER fresh FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url 'https://omni.invalid');
	CREATE USER MAPPING FOR CURRENT_USER SERVER fresh OPTIONS (api_key 'omni_osk_789');
	SET LOCAL omni_refresh.server = fresh$$, session_user),
	$$55000: server "fresh" was changed by this transaction
The request is sent by a background worker, which sees only what is committed.
Commit first.$$,
	'A new server must be committed first');
SELECT is(pg_temp.call('', commands, session_user),
	$$55000: server "omni" was changed by this transaction
The request is sent by a background worker, which sees only what is committed.
Commit first.$$,
	format('%s must be committed first', what))
FROM (VALUES
	('Another option of a server', 'ALTER SERVER omni OPTIONS (ADD timeout ''5'')'),
	('A new version of a server', 'ALTER SERVER omni VERSION ''2'''),
	('A new owner of a server', 'ALTER SERVER omni OWNER TO CURRENT_USER; ALTER SERVER omni OPTIONS (ADD timeout ''5'')'),
	('Another name of a server', 'ALTER SERVER omni RENAME TO omni2; ALTER SERVER omni2 RENAME TO omni'),
	('A granted privilege', 'GRANT USAGE ON FOREIGN SERVER omni TO regress_omni_stranger; SET LOCAL ROLE regress_omni_stranger'))
	AS v(what, commands);
SELECT is(pg_temp.call('', commands, session_user),
	$$55000: user mapping for server "omni" was changed by this transaction
The request is sent by a background worker, which sees only what is committed.
Commit first.$$,
	format('%s must be committed first', what))
FROM (VALUES
	('A new mapping', 'CREATE USER MAPPING FOR CURRENT_USER SERVER omni OPTIONS (api_key ''omni_osk_789'')'),
	('A new mapping without a key', 'CREATE USER MAPPING FOR CURRENT_USER SERVER omni'),
	('Another key', 'ALTER USER MAPPING FOR PUBLIC SERVER omni OPTIONS (SET api_key ''omni_osk_789'')'),
	('A mapping in place of another', 'DROP USER MAPPING FOR PUBLIC SERVER omni;
		CREATE USER MAPPING FOR PUBLIC SERVER omni OPTIONS (api_key ''omni_osk_456'')'))
	AS v(what, commands);
SELECT alike(pg_temp.call('', 'DROP SERVER omni CASCADE', session_user), '42704: server "omni" does not exist%',
	'A server that is dropped is gone, though not yet for the worker');
SELECT alike(pg_temp.call('', 'REVOKE USAGE ON FOREIGN SERVER omni FROM regress_omni_user; SET LOCAL ROLE regress_omni_user',
	session_user), '42501: %', 'A privilege that is revoked is gone, though not yet for the worker');

SELECT is_empty('SELECT 1 FROM omni_refresh_job UNION ALL SELECT 1 FROM omni_refresh_event',
	'Of all that, nothing is written down');
SELECT is_empty($$SELECT 1 FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'$$,
	'Of all that, no worker hears');

SELECT * FROM finish();
ROLLBACK;

DROP EXTENSION omni_refresh CASCADE;
DROP FOREIGN DATA WRAPPER regress_files CASCADE;
DROP EXTENSION pgtap;
DROP ROLE regress_omni_user, regress_omni_poor, regress_omni_stranger;
