-- The options of foreign servers and user mappings: what the validator takes and refuses
\set ECHO none
\pset format unaligned
\pset tuples_only true
SET client_min_messages = warning;

BEGIN;
CREATE EXTENSION pgtap;
CREATE EXTENSION omni_refresh;
CREATE ROLE regress_omni_owner;
GRANT USAGE ON FOREIGN DATA WRAPPER omni_refresh TO regress_omni_owner;

-- What becomes of a command, run by a role: "done" or its error. What it did is undone.
CREATE FUNCTION pg_temp.outcome(command text, role name DEFAULT session_user) RETURNS text
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
		RETURN 'done';
	WHEN OTHERS THEN
		GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
		RETURN concat_ws(E'\n', SQLSTATE || ': ' || SQLERRM, nullif(detail, ''), nullif(hint, ''));
END
$$;

CREATE FUNCTION pg_temp.server(options text, role name DEFAULT session_user) RETURNS text
LANGUAGE sql RETURN pg_temp.outcome(
	'CREATE SERVER s FOREIGN DATA WRAPPER omni_refresh OPTIONS (' || options || ')', role);

CREATE FUNCTION pg_temp.mapping(options text, role name DEFAULT session_user) RETURNS text
LANGUAGE sql RETURN pg_temp.outcome(
	'CREATE USER MAPPING FOR CURRENT_USER SERVER omni OPTIONS (' || options || ')', role);

CREATE FUNCTION pg_temp.first_line(message text) RETURNS text
LANGUAGE sql RETURN split_part(message, E'\n', 1);

CREATE SERVER omni FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url 'https://acme.omniapp.co');
GRANT USAGE ON FOREIGN SERVER omni TO regress_omni_owner;

SELECT plan(232);

-- base_url
SELECT is(pg_temp.server(format('base_url %L', url)), 'done', format('%L is a base URL', url))
FROM unnest(ARRAY[
	'https://acme.omniapp.co',
	'https://acme.omniapp.co/',
	'https://acme.omniapp.co/api',
	'https://acme.omniapp.co/api/',
	'https://acme.playground.exploreomni.dev/api',
	'https://acme.omniapp.co:8443',
	'https://acme.omniapp.co:65535/api',
	'HTTPS://ACME.OMNIAPP.CO',
	'https://192.0.2.1',
	'https://[2001:db8::1]:8443/api',
	'http://localhost:8080',
	'http://LOCALHOST',
	'http://127.0.0.1',
	'http://127.255.255.254:1/api',
	'http://[::1]:8080/'
]) AS url;

SELECT is(pg_temp.first_line(pg_temp.server(format('base_url %L', url))),
		  format('22023: invalid value for option "base_url": "%s"', url),
		  format('%L is no base URL', url))
FROM unnest(ARRAY[
	'',
	'acme.omniapp.co',
	'//acme.omniapp.co',
	'https://',
	'https://acme.omniapp.co:65536',
	'https://acme.omniapp.co:http',
	'https://acme.omniapp.co/login',
	'https://acme.omniapp.co/api/v1',
	'https://acme.omniapp.co/apis',
	'https://acme.omniapp.co/API',
	'https://acme.omniapp.co?',
	'https://acme.omniapp.co/api?x=1',
	'https://acme.omniapp.co#',
	'https://acme.omniapp.co/#models',
	'ftp://acme.omniapp.co',
	'file:///etc/passwd',
	'http://acme.omniapp.co',
	'http://192.0.2.1',
	'http://126.255.255.255',
	'http://128.0.0.1',
	'http://0.0.0.0',
	'http://[::2]',
	'http://[::]',
	'http://127.0.0.1.example.com',
	'http://localhost.example.com',
	'http://example.com#127.0.0.1',
	'http://example.com/127.0.0.1'
]) AS url;

SELECT is(pg_temp.server('base_url ' || quote_literal(url)),
		  E'22023: invalid value for option "base_url"\nA URL consists of printable ASCII characters without spaces.',
		  'A URL with ' || what || ' is refused')
FROM (VALUES
	('a space', 'https://acme.omniapp.co/ api'),
	('a line break', E'https://acme.omniapp.co\r\nX-Evil: 1'),
	('a tab', E'https://acme.omniapp.co\t'),
	('a DEL', E'https://acme.omniapp.co\x7f'),
	('a letter outside of ASCII', U&'https://acm\00E9.omniapp.co')) AS v(what, url);

SELECT is(pg_temp.server('base_url ' || quote_literal(url)),
		  E'22023: invalid value for option "base_url"\nThe URL must not name a user or a password.',
		  'A URL with ' || what || ' is refused, and not shown')
FROM (VALUES
	('a user', 'https://somebody@acme.omniapp.co'),
	('a password', 'https://somebody:hunter2@acme.omniapp.co'),
	('a password only', 'https://:hunter2@acme.omniapp.co'),
	('a user that looks like a loopback host', 'http://127.0.0.1@example.com')) AS v(what, url);

SELECT is(E'\n' || pg_temp.server($$base_url 'http://acme.omniapp.co'$$), $$
22023: invalid value for option "base_url": "http://acme.omniapp.co"
The scheme must be https, or http for a loopback address.
Give the address you log in to Omni with, as in "https://acme.omniapp.co".$$,
	'The refusal of plain http says what to give');
SELECT is(pg_temp.server($$base_url 'https://acme.omniapp.co'$$, 'regress_omni_owner'), 'done',
	'Who has USAGE on the wrapper can create a server');
SELECT is(E'\n' || pg_temp.server($$base_url 'http://127.0.0.1'$$, 'regress_omni_owner'), $$
42501: permission denied for a base URL without TLS
Only a superuser may set one, or change other options of a server that has one.
Use https.$$,
	'Only a superuser can do without TLS');
SELECT is(E'\n' || pg_temp.server($$timeout '5'$$), $$
HV00J: option "base_url" is required
Give the address you log in to Omni with: OPTIONS (base_url 'https://acme.omniapp.co').$$,
	'A server needs a base URL');
SELECT is(pg_temp.first_line(pg_temp.outcome('CREATE SERVER s FOREIGN DATA WRAPPER omni_refresh')),
	'HV00J: option "base_url" is required',
	'A server without any options is refused');
SELECT is(pg_temp.first_line(pg_temp.outcome('ALTER SERVER omni OPTIONS (DROP base_url)')),
	'HV00J: option "base_url" is required',
	'The base URL cannot be dropped');
SELECT is(pg_temp.first_line(pg_temp.outcome($$ALTER SERVER omni OPTIONS (SET base_url 'nonsense')$$)),
	'22023: invalid value for option "base_url": "nonsense"',
	'ALTER SERVER is held to the same rules');

-- connect_timeout, timeout
SELECT is(pg_temp.server(format('base_url %L, %I %L', 'https://acme.omniapp.co', option, value)), 'done',
		  format('%s can be %L', option, value))
FROM unnest(ARRAY['connect_timeout', 'timeout']) AS option,
	 unnest(ARRAY['1', '0.001', '1ms', '2.5', ' 5 s ', '90 s', '10min', '1h', '3600', '3600 s']) AS value;

SELECT is(E'\n' || pg_temp.server(format('base_url %L, %I %L', 'https://acme.omniapp.co', option, value)),
		  format($$
22023: invalid value for option "%s": "%s"
Give a duration between "1 ms" and "1 h"; without a unit, it is in seconds.$$, option, value),
		  format('%s cannot be %L', option, value))
FROM unnest(ARRAY['connect_timeout', 'timeout']) AS option,
	 unnest(ARRAY['', '0', '-1', '0.0009', '3600.001', '61 min', '1d', 'soon', '5 S', '5 kB',
				  'NaN', 'inf', '1e999', '5 s s']) AS value;

-- rate_limit
SELECT is(pg_temp.server(format('base_url %L, rate_limit %L', 'https://acme.omniapp.co', value)), 'done',
		  format('rate_limit can be %L', value))
FROM unnest(ARRAY['0', '1', '60', '500', '1000000']) AS value;
SELECT is(E'\n' || pg_temp.server(format('base_url %L, rate_limit %L', 'https://acme.omniapp.co', value)),
		  format($$
22023: invalid value for option "rate_limit": "%s"
Give a number of requests a minute between 0 and 1000000; 0 means no limit.$$, value),
		  format('rate_limit cannot be %L', value))
FROM unnest(ARRAY['', '-1', '1000001', '99999999999', 'many', '60/min', '60 s']) AS value;

-- model, branch
SELECT is(pg_temp.server(format('base_url %L, model %L, branch %L', 'https://acme.omniapp.co', value, value)), 'done',
		  format('model and branch can be %L', value))
FROM unnest(ARRAY['98c7ad96-5c04-4fb7-b33a-1389a65d16ed', '98C7AD96-5C04-4FB7-B33A-1389A65D16ED',
	'{98c7ad96-5c04-4fb7-b33a-1389a65d16ed}', '98c7ad965c044fb7b33a1389a65d16ed',
	'00000000-0000-0000-0000-000000000000']) AS value;
SELECT is(E'\n' || pg_temp.server(format('base_url %L, model %L, branch %L', 'https://acme.omniapp.co',
			CASE option WHEN 'model' THEN value ELSE '98c7ad96-5c04-4fb7-b33a-1389a65d16ed' END, value)),
		  format($$
22023: invalid value for option "%s": "%s"
Give a uuid; omni_refresh_models() lists those of the models and of their branches.$$, option, value),
		  format('%s cannot be %L', option, value))
FROM unnest(ARRAY['model', 'branch']) AS option,
	 unnest(ARRAY['', 'main', '98c7ad96-5c04-4fb7-b33a-1389a65d16e', '98c7ad96-5c04-4fb7-b33a-1389a65d16ed ',
				  ' 98c7ad96-5c04-4fb7-b33a-1389a65d16ed', '98c7ad96-5c04-4fb7-b33a-1389a65d16eg',
				  '{98c7ad96-5c04-4fb7-b33a-1389a65d16ed', 'NULL']) AS value;
SELECT is(E'\n' || pg_temp.server($$base_url 'https://acme.omniapp.co', branch '98c7ad96-5c04-4fb7-b33a-1389a65d16ed'$$), $$
HV00J: option "branch" requires the option "model"
A branch belongs to one model.
Add the model with OPTIONS (ADD model '...'), or drop both with OPTIONS (DROP model, DROP branch).$$,
	'A branch needs its model');
SELECT is(pg_temp.server($$branch '98c7ad96-5c04-4fb7-b33a-1389a65d16ed', base_url 'https://acme.omniapp.co', model '98c7ad96-5c04-4fb7-b33a-1389a65d16ed'$$),
	'done', '... which may come after it');
SELECT is(pg_temp.first_line(pg_temp.outcome($$ALTER SERVER omni OPTIONS (ADD branch '98c7ad96-5c04-4fb7-b33a-1389a65d16ed')$$)),
	'HV00J: option "branch" requires the option "model"', '... also if it is added');
SELECT is(pg_temp.first_line(pg_temp.outcome($$
	ALTER SERVER omni OPTIONS (ADD model '98c7ad96-5c04-4fb7-b33a-1389a65d16ed', ADD branch '98c7ad96-5c04-4fb7-b33a-1389a65d16ed');
	ALTER SERVER omni OPTIONS (DROP model)$$)),
	'HV00J: option "branch" requires the option "model"', '... which cannot be dropped alone');
SELECT is(pg_temp.outcome($$
	ALTER SERVER omni OPTIONS (ADD model '98c7ad96-5c04-4fb7-b33a-1389a65d16ed', ADD branch '98c7ad96-5c04-4fb7-b33a-1389a65d16ed');
	ALTER SERVER omni OPTIONS (DROP model, DROP branch)$$), 'done', '... but with it, as the hint says');

-- cache_policy
SELECT is(pg_temp.server(format('base_url %L, cache_policy %L', 'https://acme.omniapp.co', value)), 'done',
		  format('cache_policy can be %s', left(value, 20)))
FROM unnest(ARRAY['nightly', 'every hour', ' x ', '...', 'a/b?c', repeat('x', 255)]) AS value;
SELECT is(E'\n' || pg_temp.server(format('base_url %L, cache_policy %L', 'https://acme.omniapp.co', value)),
		  format($$
22023: invalid value for option "cache_policy": "%s"
Give the name of a cache policy, which may have 255 bytes.$$, value),
		  format('cache_policy cannot be %s', left(value, 20)))
FROM unnest(ARRAY['', ' ', E' \t\r\n', '.', '..', repeat('x', 256)]) AS value;

-- proxy, ca_file
SELECT is(pg_temp.server($$base_url 'https://acme.omniapp.co', proxy 'http://proxy.example:3128'$$),
	'done', 'A superuser can set a proxy');
SELECT is(pg_temp.first_line(pg_temp.server(format('base_url %L, proxy %L', 'https://acme.omniapp.co', value))),
		  format('22023: invalid value for option "proxy": "%s"', value),
		  format('%L is no proxy', value))
FROM unnest(ARRAY['', 'proxy.example', 'http://', 'http://proxy.example:99999']) AS value;
SELECT is(pg_temp.server($$base_url 'https://acme.omniapp.co', proxy 'http://me:hunter2@proxy.example'$$),
	E'22023: invalid value for option "proxy"\nThe URL must not name a user or a password.',
	'A proxy with a password is refused, and not shown');
SELECT unalike(pg_temp.server($$base_url 'https://acme.omniapp.co', proxy 'me:hunter2@proxy.example:3128'$$),
	'%hunter2%', 'A proxy with a password but without a scheme is not shown, either');
SELECT is(pg_temp.server($$base_url 'https://acme.omniapp.co', ca_file '/etc/ssl/own.pem'$$),
	'done', 'A superuser can name a file of certificate authorities');
SELECT is(E'\n' || pg_temp.server(format('base_url %L, ca_file %L', 'https://acme.omniapp.co', value)),
		  format($$
22023: invalid value for option "ca_file": "%s"
Give an absolute path on the database server's host.$$, value),
		  format('%L is no ca_file', value))
FROM unnest(ARRAY['', 'own.pem', './own.pem', '~/own.pem']) AS value;

-- What only a superuser may set
SELECT is(E'\n' || pg_temp.server(format('base_url %L, %I %L', 'https://acme.omniapp.co', option, value),
								  'regress_omni_owner'),
		  format($$
42501: permission denied for option "%s"
Only a superuser may set this option, or change other options of an object that has it.
Ask a superuser to make the change.$$, option),
		  format('An ordinary role cannot set %s', option))
FROM (VALUES ('proxy', 'http://proxy.example:3128'), ('ca_file', '/etc/ssl/own.pem')) AS v(option, value);
SELECT is(pg_temp.server(format('base_url %L, %I %L', 'https://acme.omniapp.co', option, '5'),
						 'regress_omni_owner'),
		  'done', format('An ordinary role can set %s', option))
FROM unnest(ARRAY['connect_timeout', 'timeout', 'rate_limit', 'cache_policy']) AS option;
SELECT is(pg_temp.server($$base_url 'https://acme.omniapp.co', model '98c7ad96-5c04-4fb7-b33a-1389a65d16ed'$$, 'regress_omni_owner'),
	'done', 'An ordinary role can set model');

CREATE SERVER guarded FOREIGN DATA WRAPPER omni_refresh
	OPTIONS (base_url 'https://acme.omniapp.co', ca_file '/etc/ssl/own.pem');
ALTER SERVER guarded OWNER TO regress_omni_owner;
SELECT is(pg_temp.first_line(pg_temp.outcome(
	$$ALTER SERVER guarded OPTIONS (SET base_url 'https://elsewhere.example')$$, 'regress_omni_owner')),
	'42501: permission denied for option "ca_file"',
	'A server with such an option is closed to its owner');
SELECT is(pg_temp.outcome(
	$$ALTER SERVER guarded OPTIONS (SET base_url 'https://elsewhere.example')$$),
	'done', 'A server with such an option is open to a superuser');
CREATE SERVER plain FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url 'http://localhost:1');
ALTER SERVER plain OWNER TO regress_omni_owner;
SELECT is(pg_temp.first_line(pg_temp.outcome(
	$$ALTER SERVER plain OPTIONS (ADD timeout '5')$$, 'regress_omni_owner')),
	'42501: permission denied for a base URL without TLS',
	'A server without TLS is closed to its owner, too');

-- api_key, api_key_file
SELECT is(pg_temp.mapping('api_key ' || quote_literal(key), 'regress_omni_owner'), 'done',
		  'A key can be ' || what)
FROM (VALUES ('one of Omni''s', 'omni_osk_0123456789abcdef'), ('one character', 'x'),
	('all of printable ASCII', (SELECT string_agg(chr(i), '') FROM generate_series(33, 126) AS i)))
	AS v(what, key);
SELECT is(pg_temp.mapping('api_key ' || quote_literal(key)),
		  E'22023: invalid value for option "api_key"\nAn API key consists of printable ASCII characters without spaces.',
		  'A key cannot ' || what || ', and is not shown')
FROM (VALUES ('be empty', ''), ('have a space', 'omni_osk_ 123'), ('have a space before it', ' omni_osk_123'),
	('have a line break', E'omni_osk_123\n'), ('have a header', E'omni_osk_123\r\nX-Evil: 1'),
	('have a control character', E'omni_osk_\x01'), ('have a DEL', E'omni_osk_\x7f'),
	('have a letter outside of ASCII', U&'omni_osk_\00E9')) AS v(what, key);
SELECT is(E'\n' || pg_temp.mapping('api_key ' || quote_literal(key)), $$
22023: invalid value for option "api_key"
An API key consists of printable ASCII characters without spaces.
Give the key alone: "Bearer" is added when it is sent.$$,
	'A key is given without the words of its header: ' || key)
FROM unnest(ARRAY['Bearer omni_osk_123', 'bearer omni_osk_123', 'BEARER  omni_osk_123 ']) AS key;
SELECT is(pg_temp.mapping($$api_key 'Bearer_omni_osk_123'$$), 'done', 'A key may begin with a word like it');
SELECT unalike(pg_temp.mapping($$api_kay 'omni_osk_123'$$), '%omni_osk_123%',
	'A key under a misspelled name is not shown');
SELECT unalike(pg_temp.server($$base_url 'https://acme.omniapp.co', api_key 'omni_osk_123'$$),
	'%omni_osk_123%', 'A key in the wrong place is not shown');
SELECT unalike(pg_temp.mapping($$api_key 'omni_osk_123', api_key_file '/etc/omni.key'$$),
	'%omni_osk_123%', 'A key that is given twice is not shown');

SELECT is(pg_temp.mapping($$api_key_file '/etc/omni.key'$$), 'done',
	'A superuser can name a file for the key');
SELECT is(E'\n' || pg_temp.mapping('api_key_file ' || quote_literal(path)), format($$
22023: invalid value for option "api_key_file": "%s"
Give an absolute path on the database server's host.$$, path),
	format('%L is no api_key_file', path))
FROM unnest(ARRAY['', 'omni.key', '../omni.key']) AS path;
SELECT is(E'\n' || pg_temp.mapping($$api_key_file '/etc/passwd'$$, 'regress_omni_owner'), $$
42501: permission denied for option "api_key_file"
Only a superuser may set this option, or change other options of an object that has it.
Ask a superuser to make the change, or use the option "api_key".$$,
	'An ordinary role cannot have the server read a file');
SELECT is(E'\n' || pg_temp.mapping(options), $$
22023: options "api_key" and "api_key_file" cannot be given together
Drop one of them: OPTIONS (DROP api_key, ADD api_key_file '...').$$,
	'A key is given once: ' || which)
FROM (VALUES ('key, file', $$api_key 'omni_osk_123', api_key_file '/etc/omni.key'$$),
	('file, key', $$api_key_file '/etc/omni.key', api_key 'omni_osk_123'$$)) AS v(which, options);

CREATE USER MAPPING FOR PUBLIC SERVER omni OPTIONS (api_key 'omni_osk_123');
SELECT is(pg_temp.first_line(pg_temp.outcome(
	$$ALTER USER MAPPING FOR PUBLIC SERVER omni OPTIONS (ADD api_key_file '/etc/omni.key')$$)),
	'22023: options "api_key" and "api_key_file" cannot be given together',
	'A file cannot be added to a key');
SELECT is(pg_temp.outcome(
	$$ALTER USER MAPPING FOR PUBLIC SERVER omni OPTIONS (DROP api_key, ADD api_key_file '/etc/omni.key')$$),
	'done', 'A file can take the place of a key, as the hint says');
SELECT is(pg_temp.outcome('CREATE USER MAPPING FOR CURRENT_USER SERVER omni'), 'done',
	'A mapping can wait for its key');

-- Names
SELECT is(E'\n' || pg_temp.server(format('base_url %L, %I %L', 'https://acme.omniapp.co', option, '5')), format($$
HV00D: unrecognized option "%s"
Perhaps you meant the option "%s".$$, option, meant),
	format('%I on a server is taken for %s', option, meant))
FROM (VALUES ('timeuot', 'timeout'), ('connection_timeout', 'connect_timeout'), ('ratelimit', 'rate_limit'),
	('CA_file', 'ca_file'), ('models', 'model'), ('model_id', 'model'), ('branch_id', 'branch'), ('cachepolicy', 'cache_policy'), ('proxi', 'proxy'), ('Base_URL', 'base_url')) AS v(option, meant);
SELECT is(E'\n' || pg_temp.mapping(format('%I %L', option, '5')), format($$
HV00D: unrecognized option "%s"
Perhaps you meant the option "%s".$$, option, meant),
	format('%I on a mapping is taken for %s', option, meant))
FROM (VALUES ('apikey', 'api_key'), ('api-key', 'api_key'), ('key_file', 'api_key_file')) AS v(option, meant);
SELECT is(E'\n' || pg_temp.server(format('base_url %L, %I %L', 'https://acme.omniapp.co', option, '5')), format($$
HV00D: unrecognized option "%s"
Options of a server are base_url, connect_timeout, timeout, rate_limit, model, branch, cache_policy, proxy and ca_file.$$, option),
	'An option of a server that is like no other gets a list of them: ' || option)
FROM unnest(ARRAY['wallet', 'verify_peer', 'sslmode']) AS option;
SELECT is(E'\n' || pg_temp.mapping($$password_required 'false'$$), $$
HV00D: unrecognized option "password_required"
Options of a user mapping are api_key_file and api_key.$$,
	'An option of a mapping that is like no other gets a list of them');
SELECT alike(pg_temp.server($$base_url 'https://acme.omniapp.co', api_key 'omni_osk_123'$$),
	'HV00D: unrecognized option "api_key"%', 'The key does not belong to the server');
SELECT alike(pg_temp.mapping($$api_key 'omni_osk_123', base_url 'https://acme.omniapp.co'$$),
	'HV00D: unrecognized option "base_url"%', 'The base URL does not belong to the mapping');
SELECT is(pg_temp.outcome(
	$$ALTER FOREIGN DATA WRAPPER omni_refresh OPTIONS (ADD base_url 'https://acme.omniapp.co')$$),
	E'HV00D: unrecognized option "base_url"\nThere are no options in this context.',
	'The wrapper itself has no options');
SELECT alike(pg_temp.outcome(
	$$CREATE FOREIGN TABLE t (a int) SERVER omni OPTIONS (base_url 'https://acme.omniapp.co')$$),
	'HV00D: unrecognized option "base_url"%', 'A foreign table has no options');
SELECT alike(pg_temp.outcome('CREATE FOREIGN TABLE t (a int) SERVER omni; SELECT * FROM t'),
	'55000: foreign-data wrapper "omni_refresh" has no handler', 'A foreign table cannot be read');


-- The validator is a function that anyone can call, with anything
SELECT is(pg_temp.outcome(format('SELECT omni_refresh_validator(%L, %L::regclass)', options, catalog)),
		  outcome, 'The validator, called by hand, stands ' || what)
FROM (VALUES
	('a very long name', ARRAY[repeat('x', 200) || '=1', 'base_url=https://acme.omniapp.co'], 'pg_foreign_server',
		'HV00D: unrecognized option "' || repeat('x', 200) || E'"\nOptions of a server are '
		'base_url, connect_timeout, timeout, rate_limit, model, branch, cache_policy, proxy and ca_file.'),
	('an option without a value', ARRAY['base_url'], 'pg_foreign_server',
		'42601: base_url requires a parameter'),
	('no option at all', '{}', 'pg_user_mapping', 'done'),
	('a catalog without options', '{}', 'pg_class', 'done')) AS v(what, options, catalog, outcome);

SELECT * FROM finish();
ROLLBACK;
