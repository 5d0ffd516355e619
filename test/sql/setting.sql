-- The settings: names, defaults, units, limits, and who may change them
\set ECHO none
\pset format unaligned
\pset tuples_only true
SET client_min_messages = warning;

-- A name that nobody knows yet, before the library reserves its prefix
SET omni_refresh.nonsense = 1;

BEGIN;
CREATE EXTENSION pgtap;
SET client_min_messages = error;	-- it says which misspelled settings there are
LOAD 'omni_refresh';
SET client_min_messages = warning;
CREATE ROLE regress_omni_user;

CREATE FUNCTION pg_temp.outcome(command text, role name DEFAULT session_user) RETURNS text
LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE format('SET LOCAL ROLE %I', role);
	EXECUTE command;
	RAISE SQLSTATE 'TST00';
EXCEPTION
	WHEN SQLSTATE 'TST00' THEN
		RETURN 'done';
	WHEN OTHERS THEN
		RETURN SQLSTATE || ': ' || SQLERRM;
END
$$;

SELECT plan(41);

SELECT results_eq($$
	SELECT name, boot_val, unit, vartype, context, min_val
	FROM pg_settings WHERE name LIKE 'omni\_refresh.%' AND name <> 'omni_refresh.nonsense'
	ORDER BY name COLLATE "C"$$, $$VALUES
	('omni_refresh.call_timeout', '60000', 'ms', 'integer', 'user', '1'),
	('omni_refresh.enabled', 'on', NULL, 'bool', 'superuser', NULL),
	('omni_refresh.idle_timeout', '60000', 'ms', 'integer', 'sighup', '0'),
	('omni_refresh.max_in_flight', '4', NULL, 'integer', 'sighup', '1'),
	('omni_refresh.min_interval', '10000', 'ms', 'integer', 'sighup', '0'),
	('omni_refresh.on_failure', 'error', NULL, 'enum', 'user', NULL),
	('omni_refresh.retention', '43200', 'min', 'integer', 'sighup', '-1'),
	('omni_refresh.retry_for', '86400', 's', 'integer', 'sighup', '0'),
	('omni_refresh.server', 'omni', NULL, 'string', 'user', NULL),
	('omni_refresh.track', 'on', NULL, 'bool', 'sighup', NULL),
	('omni_refresh.track_timeout', '3600', 's', 'integer', 'sighup', '1')$$,
	'The settings are those of the documentation');
SELECT is(current_setting('omni_refresh.' || name), value, format('%s is %s unless told otherwise', name, value))
FROM (VALUES ('server', 'omni'), ('on_failure', 'error'), ('call_timeout', '1min'), ('enabled', 'on'),
	('min_interval', '10s'), ('retry_for', '1d'), ('max_in_flight', '4'), ('track', 'on'),
	('track_timeout', '1h'), ('retention', '30d'), ('idle_timeout', '1min')) AS v(name, value);
SELECT is_empty($$
	SELECT name, short_desc FROM pg_settings
	WHERE name LIKE 'omni\_refresh.%' AND name <> 'omni_refresh.nonsense'
	AND short_desc !~ '^Sets [^.]+[.]$'$$,
	'Each setting says in a sentence what it sets');

SELECT is(pg_temp.outcome(format('SET omni_refresh.%s = %s', name, value), 'regress_omni_user'), 'done',
		  format('Any user can set %s to %s', name, value))
FROM (VALUES ('server', 'other'), ('server', '"We""ird"'), ('on_failure', 'warning'), ('on_failure', 'ERROR'),
	('call_timeout', '1'), ('call_timeout', '''5 s'''), ('call_timeout', '2147483647')) AS v(name, value);
SELECT is(pg_temp.outcome(format('SET omni_refresh.%s = %s', name, value)),
		  format('22023: invalid value for parameter "omni_refresh.%s": "%s"', name, btrim(value, '''')),
		  format('%s cannot be %s', name, value))
FROM (VALUES ('on_failure', 'notice'), ('on_failure', 'off'), ('on_failure', ''''''), ('call_timeout', 'soon'),
	('call_timeout', '''5 kB''')) AS v(name, value);
SELECT alike(pg_temp.outcome(format('SET omni_refresh.call_timeout = %s', value)),
			 format('22023: %s ms is outside the valid range for parameter "omni_refresh.call_timeout" (1%%', value),
			 format('call_timeout cannot be %s', value))
FROM unnest(ARRAY['0', '-1']) AS value;

SELECT is(pg_temp.outcome('SET omni_refresh.enabled = off'), 'done', 'A superuser can switch requests off');
SELECT is(pg_temp.outcome('SET omni_refresh.enabled = off', 'regress_omni_user'),
	'42501: permission denied to set parameter "omni_refresh.enabled"', 'An ordinary user cannot');
SELECT is(pg_temp.outcome('ALTER ROLE regress_omni_user SET omni_refresh.enabled = off'), 'done',
	'A superuser can switch requests off for a role');
SELECT is(pg_temp.outcome(format('SET omni_refresh.%s = %s', name, value)),
		  format('55P02: parameter "omni_refresh.%s" cannot be changed now', name),
		  format('%s is for the configuration file only', name))
FROM (VALUES ('idle_timeout', '1'), ('min_interval', '1'), ('retry_for', '1'), ('max_in_flight', '1'), ('track', 'off'),
	('track_timeout', '1'), ('retention', '1')) AS v(name, value);
SELECT is(pg_temp.outcome('ALTER ROLE regress_omni_user SET omni_refresh.track = off'),
	'55P02: parameter "omni_refresh.track" cannot be changed now', 'What is for the worker cannot be set for a role');

-- The prefix is reserved.
SELECT is(pg_temp.outcome('SET omni_refresh.timeout = 1'),
	'42602: invalid configuration parameter name "omni_refresh.timeout"', 'A misspelled setting is refused');
SELECT is(current_setting('omni_refresh.nonsense', true), NULL,
	'A misspelled setting of before is removed');

-- The name of the server is a name
SET LOCAL client_min_messages = error;
DO $$ BEGIN PERFORM set_config('omni_refresh.server', repeat('x', 70), true); END $$;
SELECT is(current_setting('omni_refresh.server'), repeat('x', 63), 'A name that is too long is cut off, as names are');

SELECT * FROM finish();
ROLLBACK;
