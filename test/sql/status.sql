-- src/base/status.h lists the statuses and events that the tables allow
\set ECHO none
\pset format unaligned
\pset tuples_only true
SET client_min_messages = warning;
\getenv srcdir PG_ABS_SRCDIR
\set header :srcdir '/../src/base/status.h'

BEGIN;
CREATE EXTENSION pgtap;
CREATE EXTENSION omni_refresh;
SELECT plan(9);

CREATE TABLE pg_temp.source AS SELECT pg_read_file(:'header') AS text;

-- The names in a list of the header, in order of name; an error if there is no such list
CREATE FUNCTION pg_temp.list(list text) RETURNS text LANGUAGE sql AS $$
	SELECT string_agg(name[1], ' ' ORDER BY name[1] COLLATE "C")
	FROM pg_temp.source,
		substring(text FROM '#define ' || list || '\(X, SEP\)((?:[^\n]*\\\n)+[^\n]*)') AS body,
		regexp_matches(body, 'X\((\w+)\)', 'g') AS item
		LEFT JOIN LATERAL regexp_matches(text, '#define OMNI_NAME_' || item[1] || '\s+"(\w+)"') AS name ON true
$$;

-- The names in an expression, in order of name
CREATE FUNCTION pg_temp.names(expression text) RETURNS text LANGUAGE sql AS $$
	SELECT string_agg(DISTINCT name[1], ' ' ORDER BY name[1])
	FROM (SELECT name[1] COLLATE "C" FROM regexp_matches(expression, '''([^'']+)''', 'g') AS quoted,
			regexp_matches(quoted[1], '(\w+)', 'g') AS name) AS found (name_),
		LATERAL (SELECT ARRAY[name_]) AS item (name)
$$;

CREATE FUNCTION pg_temp.allowed(name text) RETURNS text LANGUAGE sql AS $$
	SELECT pg_temp.names(pg_get_constraintdef(oid)) FROM pg_constraint WHERE conname = name
$$;

CREATE FUNCTION pg_temp.indexed(index regclass) RETURNS text LANGUAGE sql AS $$
	SELECT pg_temp.names(pg_get_expr(indpred, indrelid)) FROM pg_index WHERE indexrelid = index
$$;

-- Names in order, but for some
CREATE FUNCTION pg_temp.sorted(names text, VARIADIC others text[] DEFAULT '{}') RETURNS text LANGUAGE sql AS $$
	SELECT string_agg(name, ' ' ORDER BY name COLLATE "C")
	FROM unnest(string_to_array(names, ' ')) AS name WHERE name <> ALL (others)
$$;

SELECT is(pg_temp.allowed('omni_refresh_job_status_check'),
	pg_temp.sorted(pg_temp.list('OMNI_STATUSES_UNFINISHED') || ' ' || pg_temp.list('OMNI_STATUSES_FINAL')),
	'The table of jobs allows the statuses that the code knows');
SELECT is(pg_temp.allowed('omni_refresh_event_event_check'), pg_temp.list('OMNI_EVENTS'),
	'The event log allows the events that the code knows');
SELECT is(pg_temp.indexed('omni_refresh_job_queue_idx'), 'call pending',
	'The index on the queue has pending jobs, but those of calls');
SELECT is(pg_temp.sorted(pg_temp.indexed('omni_refresh_job_active_idx'), 'call'), pg_temp.list('OMNI_STATUSES_UNFINISHED'),
	'The index on the jobs of a worker has the statuses that are not final');
SELECT is(pg_temp.sorted(pg_temp.indexed('omni_refresh_job_refreshing_idx'), 'cache'), pg_temp.list('OMNI_STATUSES_UNFINISHED'),
	'The index on refreshes that have not ended has the same');
SELECT is(pg_temp.indexed('omni_refresh_job_finished_idx'), pg_temp.sorted(pg_temp.list('OMNI_STATUSES_FINAL'), 'merged'),
	'The index on finished jobs has the final statuses, but merged');
SELECT is(pg_temp.indexed('omni_refresh_job_outcome_idx'), pg_temp.sorted(pg_temp.list('OMNI_STATUSES_FINAL'), 'canceled', 'merged'),
	'The index on outcomes has the final statuses, but canceled and merged');
SELECT is(pg_temp.sorted(pg_temp.list('OMNI_STATUSES_FINAL'),
		VARIADIC string_to_array(pg_temp.list('OMNI_EVENTS'), ' ')), NULL,
	'Each final status has an event of that name');
SELECT is(pg_temp.indexed('omni_refresh_event_attempt_idx'), 'sending',
	'The index on attempts has the event that begins one');

SELECT * FROM finish();
ROLLBACK;
