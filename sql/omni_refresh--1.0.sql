/* sql/omni_refresh--1.0.sql */

\echo Use "CREATE EXTENSION omni_refresh" to load this file. \quit

/*
 * Untrusted roles may have created objects in the target schema, with names and argument types
 * that fit better than those of pg_catalog.  So look only into pg_catalog, and qualify the names
 * of the extension's own objects.  Name sequences and primary keys explicitly: PostgreSQL
 * chooses another name for them if a default name is taken, while a name that is given is an
 * error then.
 */
SET LOCAL search_path = pg_catalog, pg_temp;

/*
 * Where Omni is, and with which key: options of SQL/MED objects
 */
CREATE FUNCTION @extschema@.omni_refresh_validator(options text[], catalog oid)
	RETURNS void
	AS 'MODULE_PATHNAME', 'omni_refresh_validator'
	LANGUAGE C STRICT VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION @extschema@.omni_refresh_validator(text[], oid) IS
	'checks the options of foreign servers and user mappings of the foreign-data wrapper omni_refresh';

CREATE FOREIGN DATA WRAPPER omni_refresh
	NO HANDLER
	VALIDATOR @extschema@.omni_refresh_validator;
COMMENT ON FOREIGN DATA WRAPPER omni_refresh IS
	'Omni instances (servers: base_url, ...) and their API keys (user mappings: api_key_file or api_key)';

/*
 * The jobs.  Names are text, since a value of type name takes 64 bytes in each version of
 * a row, however short it is.  So are the statuses and the like, since drivers that read a row of
 * the table as a record know no domains; the constraints check what SQL writes, see row.c.  Each
 * row is updated once or twice, soon after it is inserted: with room for that on the same page, the
 * update writes less.
 */
CREATE TABLE @extschema@.omni_refresh_job (
	id				bigint GENERATED ALWAYS AS IDENTITY (SEQUENCE NAME omni_refresh_job_id_seq)
					CONSTRAINT omni_refresh_job_pkey PRIMARY KEY,
	status			text NOT NULL
					CONSTRAINT omni_refresh_job_status_check
					CHECK (status = ANY ('{pending, sending, running, completed, failed,
						accepted, canceled, merged, unknown}')),
	job_id			uuid,
	model_id		uuid NOT NULL,
	branch_id		uuid,
	kind			text NOT NULL
					CONSTRAINT omni_refresh_job_kind_check
					CHECK (kind = ANY ('{schema, cache, dbt}')),
	hard			boolean,
	schemas			text[],
	tables			text[],
	policy			text,
	reset_at		timestamptz,
	server			text COLLATE "C" NOT NULL,
	origin			text NOT NULL
					CONSTRAINT omni_refresh_job_origin_check
					CHECK (origin = ANY ('{call, on_commit, ddl, retry}')),
	requested_by	text COLLATE "C" NOT NULL,
	requested_by_oid oid NOT NULL,
	requested_at	timestamptz NOT NULL,
	run_at			timestamptz NOT NULL,
	sent_at			timestamptz,
	finished_at		timestamptz,
	attempts		int NOT NULL DEFAULT 0,
	may_have_arrived boolean,
	few_failures	int,
	recoveries		int,
	merged_into		bigint,
	renewed_at		timestamptz,
	retry_of		bigint,
	called_by		text COLLATE "C",
	called_by_oid	oid,
	application		text,
	database		oid NOT NULL,
	error			text
) WITH (fillfactor = 50);
COMMENT ON SEQUENCE @extschema@.omni_refresh_job_id_seq IS 'the numbers of the jobs';
COMMENT ON TABLE @extschema@.omni_refresh_job IS 'requests to Omni, one row each';
COMMENT ON CONSTRAINT omni_refresh_job_status_check ON @extschema@.omni_refresh_job IS 'the statuses';
COMMENT ON CONSTRAINT omni_refresh_job_kind_check ON @extschema@.omni_refresh_job IS 'the kinds';
COMMENT ON CONSTRAINT omni_refresh_job_origin_check ON @extschema@.omni_refresh_job IS 'the origins';
COMMENT ON COLUMN @extschema@.omni_refresh_job.id IS 'the number of this job in this database';
COMMENT ON COLUMN @extschema@.omni_refresh_job.status IS
	'pending, sending, running; or an end: completed, failed, accepted, canceled, merged, unknown';
COMMENT ON COLUMN @extschema@.omni_refresh_job.job_id IS 'Omni''s own id of the job, once Omni has accepted it';
COMMENT ON COLUMN @extschema@.omni_refresh_job.model_id IS 'the model to refresh';
COMMENT ON COLUMN @extschema@.omni_refresh_job.branch_id IS 'the branch of the model, where the connection is refreshed by branch';
COMMENT ON COLUMN @extschema@.omni_refresh_job.kind IS 'schema: a refresh of the schema model; cache: a reset of a cache policy; dbt: a dbt sync';
COMMENT ON COLUMN @extschema@.omni_refresh_job.hard IS 'whether Omni is to remove what the database no longer has, too';
COMMENT ON COLUMN @extschema@.omni_refresh_job.schemas IS 'refresh these schemas only';
COMMENT ON COLUMN @extschema@.omni_refresh_job.tables IS 'refresh these tables only';
COMMENT ON COLUMN @extschema@.omni_refresh_job.policy IS 'the cache policy to reset';
COMMENT ON COLUMN @extschema@.omni_refresh_job.reset_at IS 'the time the cache policy is reset to';
COMMENT ON COLUMN @extschema@.omni_refresh_job.server IS 'the foreign server that names the Omni instance';
COMMENT ON COLUMN @extschema@.omni_refresh_job.origin IS 'what asked for the job: call, on_commit, ddl or retry';
COMMENT ON COLUMN @extschema@.omni_refresh_job.requested_by IS 'the name that the role had that asked, whose API key is used';
COMMENT ON COLUMN @extschema@.omni_refresh_job.requested_by_oid IS 'the OID of that role, by which it is known';
COMMENT ON COLUMN @extschema@.omni_refresh_job.requested_at IS 'when it was asked for';
COMMENT ON COLUMN @extschema@.omni_refresh_job.run_at IS 'not to be sent before this time';
COMMENT ON COLUMN @extschema@.omni_refresh_job.sent_at IS 'when the last attempt began';
COMMENT ON COLUMN @extschema@.omni_refresh_job.finished_at IS 'when the job reached its end';
COMMENT ON COLUMN @extschema@.omni_refresh_job.attempts IS 'how often it was sent, raised before each sending';
COMMENT ON COLUMN @extschema@.omni_refresh_job.may_have_arrived IS 'whether an attempt has ended without an answer, so that Omni may have got the request';
COMMENT ON COLUMN @extschema@.omni_refresh_job.few_failures IS 'how many answers in a row were of those after which only a few more attempts are made';
COMMENT ON COLUMN @extschema@.omni_refresh_job.recoveries IS 'how often the job went on after the end of a worker that was sending it, since Omni last answered';
COMMENT ON COLUMN @extschema@.omni_refresh_job.merged_into IS 'the job that carries this one out';
COMMENT ON COLUMN @extschema@.omni_refresh_job.renewed_at IS
	'when the newest request was made that this job carries out, too; of a reset, not before its first attempt: retries count from here';
COMMENT ON COLUMN @extschema@.omni_refresh_job.retry_of IS 'the job that this one repeats';
COMMENT ON COLUMN @extschema@.omni_refresh_job.called_by IS
	'the name that the role of the session had that asked: not requested_by, but its caller, if a SECURITY DEFINER function asked';
COMMENT ON COLUMN @extschema@.omni_refresh_job.called_by_oid IS 'the OID of that role, by which it is known';
COMMENT ON COLUMN @extschema@.omni_refresh_job.application IS 'the application_name of that session';
COMMENT ON COLUMN @extschema@.omni_refresh_job.database IS 'the OID of the database it was asked for in; copies elsewhere are never sent';
COMMENT ON COLUMN @extschema@.omni_refresh_job.error IS 'the last error: SQLSTATE, message, detail and hint';

/*
 * What is unfinished is found without reading what is: what waits in the queue, so that
 * one goes from role to role and from model to model by steps, whatever else waits ...
 */
CREATE INDEX omni_refresh_job_queue_idx ON @extschema@.omni_refresh_job
	(requested_by_oid, server, model_id, (kind <> 'cache'), run_at, id)
	WHERE status = 'pending' AND origin <> 'call';
COMMENT ON INDEX @extschema@.omni_refresh_job_queue_idx IS 'the queue: jobs that are pending, and not of a call';

/* ... and what a worker has, or had, in flight */
CREATE INDEX omni_refresh_job_active_idx ON @extschema@.omni_refresh_job (requested_by_oid, server, run_at, id)
	WHERE status = ANY ('{sending, running}')
		OR (status = 'pending' AND origin = 'call');
COMMENT ON INDEX @extschema@.omni_refresh_job_active_idx IS 'the jobs that are being carried out';

/* ... and, of the refreshes that have not ended, the first one of a model, for which resets of its cache wait */
CREATE INDEX omni_refresh_job_refreshing_idx ON @extschema@.omni_refresh_job (requested_by_oid, server, model_id, id)
	WHERE kind <> 'cache' AND status = ANY ('{pending, sending, running}');
COMMENT ON INDEX @extschema@.omni_refresh_job_refreshing_idx IS 'the refreshes that have not ended, in the order of their numbers';

/* what came to an end, and when: merged jobs, of which there may be many, come to none of their own */
CREATE INDEX omni_refresh_job_finished_idx ON @extschema@.omni_refresh_job (server, status, finished_at)
	WHERE status = ANY ('{completed, failed, accepted, canceled, unknown}');
COMMENT ON INDEX @extschema@.omni_refresh_job_finished_idx IS 'the jobs that are at an end, by server and status, in order of time';

/* whether a job was repeated */
CREATE INDEX omni_refresh_job_retry_idx ON @extschema@.omni_refresh_job (retry_of) WHERE retry_of IS NOT NULL;
COMMENT ON INDEX @extschema@.omni_refresh_job_retry_idx IS 'the retries of a job';

/*
 * when each model was refreshed last, for omni_refresh_freshness.  The all-zero branch stands
 * for none, because a comparison of rows that meets a null is neither true nor false.
 */
CREATE INDEX omni_refresh_job_outcome_idx ON @extschema@.omni_refresh_job (server, model_id, kind,
		COALESCE(branch_id, '00000000-0000-0000-0000-000000000000'), status, finished_at)
	WHERE status = ANY ('{completed, failed, accepted, unknown}');
COMMENT ON INDEX @extschema@.omni_refresh_job_outcome_idx IS 'the jobs that succeeded or failed, by what they asked for and status, in order of time';

/*
 * The event log
 */
CREATE TABLE @extschema@.omni_refresh_event (
	id				bigint GENERATED ALWAYS AS IDENTITY (SEQUENCE NAME omni_refresh_event_id_seq)
					CONSTRAINT omni_refresh_event_pkey PRIMARY KEY,
	job				bigint NOT NULL,
	requested_by	text COLLATE "C" NOT NULL,
	requested_by_oid oid NOT NULL,
	occurred_at		timestamptz NOT NULL,
	event			text NOT NULL
					CONSTRAINT omni_refresh_event_event_check
					CHECK (event = ANY ('{sending, accepted, attempt_failed, refused,
						rate_limited, merged, released, canceled, recovered, waiting, changed,
						completed, failed, unknown}')),
	attempt			int,
	http_status		int,
	sqlstate		text,
	duration		interval,
	detail			text
);
COMMENT ON SEQUENCE @extschema@.omni_refresh_event_id_seq IS 'the numbers of the events';
COMMENT ON TABLE @extschema@.omni_refresh_event IS 'the event log: one row for each thing that happened to a job';
COMMENT ON CONSTRAINT omni_refresh_event_event_check ON @extschema@.omni_refresh_event IS 'the events';
COMMENT ON COLUMN @extschema@.omni_refresh_event.id IS 'the number of this event in this database';
COMMENT ON COLUMN @extschema@.omni_refresh_event.job IS 'the job it happened to';
COMMENT ON COLUMN @extschema@.omni_refresh_event.requested_by IS 'the name that the role had that asked for the job';
COMMENT ON COLUMN @extschema@.omni_refresh_event.requested_by_oid IS 'the OID of that role, by which it is known';
COMMENT ON COLUMN @extschema@.omni_refresh_event.occurred_at IS 'when it happened, by the clock';
COMMENT ON COLUMN @extschema@.omni_refresh_event.event IS
	'sending, accepted, attempt_failed, refused, rate_limited, merged, released, canceled, recovered, waiting, changed, completed, failed or unknown';
COMMENT ON COLUMN @extschema@.omni_refresh_event.attempt IS 'the number of the attempt it belongs to';
COMMENT ON COLUMN @extschema@.omni_refresh_event.http_status IS 'the HTTP status that Omni answered with';
COMMENT ON COLUMN @extschema@.omni_refresh_event.sqlstate IS 'the SQLSTATE of what went wrong';
COMMENT ON COLUMN @extschema@.omni_refresh_event.duration IS 'how long the attempt took';
COMMENT ON COLUMN @extschema@.omni_refresh_event.detail IS 'what there is to say about it';

/* what was sent and answered a short while ago, but nothing of what was merged instead */
CREATE INDEX omni_refresh_event_attempt_idx ON @extschema@.omni_refresh_event (occurred_at)
	WHERE event = 'sending' OR duration IS NOT NULL;
COMMENT ON INDEX @extschema@.omni_refresh_event_attempt_idx IS 'the attempts and their answers, in order of time';

CREATE INDEX omni_refresh_event_job_idx ON @extschema@.omni_refresh_event (job);
COMMENT ON INDEX @extschema@.omni_refresh_event_job_idx IS 'the events of a job';

/*
 * The watches.  A dump contains them, but not what they remember: a watch is active only in
 * the database that it was made in.  The last columns are the worker's.
 *
 * There is one watch for a server, model and branch, but no constraint says so: a dump that is
 * restored over what is there, perhaps with triggers disabled, must not fail because of it.
 * With no key to tell rows apart, logical replication publishes them as a whole.
 */
CREATE TABLE @extschema@.omni_refresh_watch (
	id				uuid NOT NULL,
	server			text COLLATE "C" NOT NULL,
	model_id		uuid NOT NULL,
	branch_id		uuid,
	schemas			text[],
	delay			interval NOT NULL,
	removals		interval,
	cache_policy	text,
	requested_by	text COLLATE "C" NOT NULL,
	requested_by_oid oid NOT NULL,
	requested_at	timestamptz NOT NULL,
	database		oid NOT NULL,
	owed_hard		boolean,
	owed_schemas	text[],
	owed_tables		text[],
	job				bigint,
	unfinished		boolean NOT NULL DEFAULT false,
	failures		int NOT NULL DEFAULT 0,
	quiet			interval,
	data_seen		bigint
);
ALTER TABLE @extschema@.omni_refresh_watch REPLICA IDENTITY FULL;
COMMENT ON TABLE @extschema@.omni_refresh_watch IS 'the models that are refreshed by themselves when tables or columns have changed';
COMMENT ON COLUMN @extschema@.omni_refresh_watch.id IS 'identifies the watch in omni_refresh_watch_seen; another one with each omni_refresh_watch()';
COMMENT ON COLUMN @extschema@.omni_refresh_watch.server IS 'the foreign server that names the Omni instance';
COMMENT ON COLUMN @extschema@.omni_refresh_watch.model_id IS 'the model to refresh';
COMMENT ON COLUMN @extschema@.omni_refresh_watch.branch_id IS 'the branch of the model, where the connection is refreshed by branch';
COMMENT ON COLUMN @extschema@.omni_refresh_watch.schemas IS 'the schemas that are watched; NULL: all but those of the system';
COMMENT ON COLUMN @extschema@.omni_refresh_watch.delay IS 'how long after a change the schemas are compared';
COMMENT ON COLUMN @extschema@.omni_refresh_watch.removals IS
	'for how long no DDL must have been committed before removals are asked for; NULL: they are not';
COMMENT ON COLUMN @extschema@.omni_refresh_watch.cache_policy IS 'the cache policy to reset after each refresh';
COMMENT ON COLUMN @extschema@.omni_refresh_watch.requested_by IS 'the name that the role had that set the watch, whose API key is used';
COMMENT ON COLUMN @extschema@.omni_refresh_watch.requested_by_oid IS 'the OID of that role, by which it is known';
COMMENT ON COLUMN @extschema@.omni_refresh_watch.requested_at IS 'when the watch was set';
COMMENT ON COLUMN @extschema@.omni_refresh_watch.database IS 'the OID of the database it was set in; copies elsewhere are inactive';
COMMENT ON COLUMN @extschema@.omni_refresh_watch.owed_hard IS
	'whether the refresh that is to be asked for next is hard; NULL: nothing is to be asked for';
COMMENT ON COLUMN @extschema@.omni_refresh_watch.owed_schemas IS 'the schemas of that refresh; NULL: the whole model';
COMMENT ON COLUMN @extschema@.omni_refresh_watch.owed_tables IS 'the tables of that refresh; NULL: all of these schemas';
COMMENT ON COLUMN @extschema@.omni_refresh_watch.job IS 'the last refresh that the watch has asked for';
COMMENT ON COLUMN @extschema@.omni_refresh_watch.unfinished IS 'whether that job has not come to its end';
COMMENT ON COLUMN @extschema@.omni_refresh_watch.failures IS 'how many jobs of the watch in a row have ended without success';
COMMENT ON COLUMN @extschema@.omni_refresh_watch.quiet IS
	'for how long no data must have changed before the cache is reset because of them; NULL: it is not';
COMMENT ON COLUMN @extschema@.omni_refresh_watch.data_seen IS 'a hash of the state of the data that the last reset is for';

/*
 * What Omni was told: a row for each relation, and one without names for the watch itself
 */
CREATE TABLE @extschema@.omni_refresh_watch_seen (
	watch			uuid NOT NULL,
	schema			text COLLATE "C" NOT NULL,
	relation		text COLLATE "C" NOT NULL,
	leaf			boolean NOT NULL,
	columns			text[] NOT NULL,
	types			text[] NOT NULL,
	readers			text[] NOT NULL,
	CONSTRAINT omni_refresh_watch_seen_pkey PRIMARY KEY (watch, schema, relation)
);
COMMENT ON TABLE @extschema@.omni_refresh_watch_seen IS
	'what Omni was told for each watch: a row for each relation, and one without names for the watch itself';
COMMENT ON COLUMN @extschema@.omni_refresh_watch_seen.watch IS 'the id of the watch';
COMMENT ON COLUMN @extschema@.omni_refresh_watch_seen.schema IS 'the schema of the relation';
COMMENT ON COLUMN @extschema@.omni_refresh_watch_seen.relation IS 'the name of the relation';
COMMENT ON COLUMN @extschema@.omni_refresh_watch_seen.leaf IS 'whether it is a partition without partitions of its own';
COMMENT ON COLUMN @extschema@.omni_refresh_watch_seen.columns IS 'its columns';
COMMENT ON COLUMN @extschema@.omni_refresh_watch_seen.types IS 'the types of these columns';
COMMENT ON COLUMN @extschema@.omni_refresh_watch_seen.readers IS
	'the privileges to read it, each with the OID of a role: of the relation, of columns, and of the schema';

/*
 * Delete events with their jobs.  A foreign key would do this, but would also cost each
 * event a look-up and a lock of its job.
 */
CREATE FUNCTION @extschema@.omni_refresh_delete_events()
	RETURNS trigger
	AS 'MODULE_PATHNAME', 'omni_refresh_delete_events'
	LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION @extschema@.omni_refresh_delete_events() IS 'deletes the events of jobs that are deleted';
CREATE TRIGGER omni_refresh_job_delete_events AFTER DELETE ON @extschema@.omni_refresh_job
	REFERENCING OLD TABLE AS jobs FOR EACH STATEMENT EXECUTE FUNCTION @extschema@.omni_refresh_delete_events();
CREATE TRIGGER omni_refresh_job_truncate_events AFTER TRUNCATE ON @extschema@.omni_refresh_job
	FOR EACH STATEMENT EXECUTE FUNCTION @extschema@.omni_refresh_delete_events();
COMMENT ON TRIGGER omni_refresh_job_delete_events ON @extschema@.omni_refresh_job IS 'deletes the events of jobs that are deleted';
COMMENT ON TRIGGER omni_refresh_job_truncate_events ON @extschema@.omni_refresh_job IS 'deletes all events if all jobs are deleted';

/*
 * Keep out what logical replication applies: the jobs are another database's, which
 * may have the same OID as this one, and as both number their jobs from 1, changes would
 * be applied to jobs of this database.  The triggers act with session_replication_role =
 * replica only, as in an apply or table synchronization worker.  TRUNCATE has no row triggers:
 * it could only be made to fail, which would stop the subscription.
 *
 * The trigger of the watches also keeps out a copy of a watch that is there, as pg_restore
 * inserts it.
 */
CREATE FUNCTION @extschema@.omni_refresh_keep_out()
	RETURNS trigger
	AS 'MODULE_PATHNAME', 'omni_refresh_keep_out'
	LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION @extschema@.omni_refresh_keep_out() IS 'keeps out changes that logical replication applies, and copies of watches';
CREATE TRIGGER omni_refresh_job_keep_out BEFORE INSERT OR UPDATE OR DELETE ON @extschema@.omni_refresh_job
	FOR EACH ROW EXECUTE FUNCTION @extschema@.omni_refresh_keep_out();
CREATE TRIGGER omni_refresh_event_keep_out BEFORE INSERT OR UPDATE OR DELETE ON @extschema@.omni_refresh_event
	FOR EACH ROW EXECUTE FUNCTION @extschema@.omni_refresh_keep_out();
COMMENT ON TRIGGER omni_refresh_job_keep_out ON @extschema@.omni_refresh_job IS 'keeps out changes of jobs that logical replication applies';
COMMENT ON TRIGGER omni_refresh_event_keep_out ON @extschema@.omni_refresh_event IS 'keeps out changes of events that logical replication applies';
CREATE TRIGGER omni_refresh_watch_keep_out BEFORE INSERT OR UPDATE OR DELETE ON @extschema@.omni_refresh_watch
	FOR EACH ROW EXECUTE FUNCTION @extschema@.omni_refresh_keep_out();
CREATE TRIGGER omni_refresh_watch_seen_keep_out BEFORE INSERT OR UPDATE OR DELETE ON @extschema@.omni_refresh_watch_seen
	FOR EACH ROW EXECUTE FUNCTION @extschema@.omni_refresh_keep_out();
COMMENT ON TRIGGER omni_refresh_watch_keep_out ON @extschema@.omni_refresh_watch IS 'keeps out changes of watches that logical replication applies, and copies of those that exist';
COMMENT ON TRIGGER omni_refresh_watch_seen_keep_out ON @extschema@.omni_refresh_watch_seen IS 'keeps out changes of what watches remember that logical replication applies';
ALTER TABLE @extschema@.omni_refresh_watch ENABLE ALWAYS TRIGGER omni_refresh_watch_keep_out;
ALTER TABLE @extschema@.omni_refresh_watch_seen ENABLE REPLICA TRIGGER omni_refresh_watch_seen_keep_out;
ALTER TABLE @extschema@.omni_refresh_job ENABLE REPLICA TRIGGER omni_refresh_job_keep_out;
ALTER TABLE @extschema@.omni_refresh_event ENABLE REPLICA TRIGGER omni_refresh_event_keep_out;

/*
 * Everyone sees the jobs requested or called by roles whose privileges they have, and the
 * events of those requested by them; monitors see all.  A role is its OID: its name may
 * change, and become another role's.  Each subquery is run once a statement and hashed, so that
 * many roles cost little, and the OID of a dropped role is no error.
 */
ALTER TABLE @extschema@.omni_refresh_job ENABLE ROW LEVEL SECURITY;
ALTER TABLE @extschema@.omni_refresh_event ENABLE ROW LEVEL SECURITY;

CREATE POLICY omni_refresh_job_own ON @extschema@.omni_refresh_job FOR SELECT
	USING (requested_by_oid = ANY (
			SELECT oid FROM pg_roles WHERE pg_has_role(oid, 'USAGE'))
		OR called_by_oid = ANY (
			SELECT oid FROM pg_roles WHERE pg_has_role(oid, 'USAGE')));
CREATE POLICY omni_refresh_job_monitor ON @extschema@.omni_refresh_job FOR SELECT
	TO pg_monitor USING (true);
CREATE POLICY omni_refresh_event_own ON @extschema@.omni_refresh_event FOR SELECT
	USING (requested_by_oid = ANY (
		SELECT oid FROM pg_roles WHERE pg_has_role(oid, 'USAGE')));
CREATE POLICY omni_refresh_event_monitor ON @extschema@.omni_refresh_event FOR SELECT
	TO pg_monitor USING (true);
COMMENT ON POLICY omni_refresh_job_own ON @extschema@.omni_refresh_job IS 'the jobs requested or called by roles whose privileges one has';
COMMENT ON POLICY omni_refresh_job_monitor ON @extschema@.omni_refresh_job IS 'monitors see every job';
COMMENT ON POLICY omni_refresh_event_own ON @extschema@.omni_refresh_event IS 'the events of the jobs requested by roles whose privileges one has';
COMMENT ON POLICY omni_refresh_event_monitor ON @extschema@.omni_refresh_event IS 'monitors see every event';

GRANT SELECT ON @extschema@.omni_refresh_job, @extschema@.omni_refresh_event TO PUBLIC;

/*
 * Watches are visible to everyone, so that everyone can make a dump, and contain nothing
 * but the names of what everyone sees in the catalogs.
 */
GRANT SELECT ON @extschema@.omni_refresh_watch TO PUBLIC;
SELECT pg_extension_config_dump('@extschema@.omni_refresh_watch', '');

/*
 * The functions.  Who may use which key is a matter of foreign servers and user
 * mappings, so that EXECUTE stays with PUBLIC.
 */
CREATE FUNCTION @extschema@.omni_refresh(
	model uuid DEFAULT NULL,
	branch uuid DEFAULT NULL,
	hard boolean DEFAULT NULL,
	schemas text[] DEFAULT NULL,
	tables text[] DEFAULT NULL)
	RETURNS @extschema@.omni_refresh_job
	AS 'MODULE_PATHNAME', 'omni_refresh'
	LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION @extschema@.omni_refresh(uuid, uuid, boolean, text[], text[]) IS
	'asks Omni to refresh a model (NULL: that of the server''s options) now, waits for its answer and returns the job; schemas and tables are arrays, as in ''{sales}''';

CREATE FUNCTION @extschema@.omni_refresh_on_commit(
	model uuid DEFAULT NULL,
	branch uuid DEFAULT NULL,
	hard boolean DEFAULT NULL,
	schemas text[] DEFAULT NULL,
	tables text[] DEFAULT NULL)
	RETURNS @extschema@.omni_refresh_job
	AS 'MODULE_PATHNAME', 'omni_refresh_on_commit'
	LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION @extschema@.omni_refresh_on_commit(uuid, uuid, boolean, text[], text[]) IS
	'queues a refresh of a model (NULL: that of the server''s options), which is sent if and when the transaction commits, and returns the job; schemas and tables are arrays, as in ''{sales}''';

CREATE FUNCTION @extschema@.omni_refresh_cache(
	model uuid DEFAULT NULL,
	policy text DEFAULT NULL,
	reset_at timestamptz DEFAULT NULL)
	RETURNS @extschema@.omni_refresh_job
	AS 'MODULE_PATHNAME', 'omni_refresh_cache'
	LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION @extschema@.omni_refresh_cache(uuid, text, timestamptz) IS
	'asks Omni to reset a cache policy of a model (NULL: those of the server''s options) now, waits for its answer and returns the job';

CREATE FUNCTION @extschema@.omni_refresh_cache_on_commit(
	model uuid DEFAULT NULL,
	policy text DEFAULT NULL,
	reset_at timestamptz DEFAULT NULL)
	RETURNS @extschema@.omni_refresh_job
	AS 'MODULE_PATHNAME', 'omni_refresh_cache_on_commit'
	LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION @extschema@.omni_refresh_cache_on_commit(uuid, text, timestamptz) IS
	'queues the reset of a cache policy of a model (NULL: those of the server''s options), which is sent if and when the transaction commits, and returns the job';

CREATE FUNCTION @extschema@.omni_refresh_dbt_sync(
	model uuid DEFAULT NULL,
	branch uuid DEFAULT NULL)
	RETURNS @extschema@.omni_refresh_job
	AS 'MODULE_PATHNAME', 'omni_refresh_dbt_sync'
	LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION @extschema@.omni_refresh_dbt_sync(uuid, uuid) IS
	'asks Omni to compile the dbt manifest of a branch of a model anew (NULL: those of the server''s options) now, waits for its answer and returns the job';

CREATE FUNCTION @extschema@.omni_refresh_dbt_sync_on_commit(
	model uuid DEFAULT NULL,
	branch uuid DEFAULT NULL)
	RETURNS @extschema@.omni_refresh_job
	AS 'MODULE_PATHNAME', 'omni_refresh_dbt_sync_on_commit'
	LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION @extschema@.omni_refresh_dbt_sync_on_commit(uuid, uuid) IS
	'queues a dbt sync of a branch of a model (NULL: those of the server''s options), which is sent if and when the transaction commits, and returns the job';

CREATE FUNCTION @extschema@.omni_refresh_wait(
	id bigint,
	timeout interval DEFAULT '5 min')
	RETURNS @extschema@.omni_refresh_job
	AS 'MODULE_PATHNAME', 'omni_refresh_wait'
	LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION @extschema@.omni_refresh_wait(bigint, interval) IS
	'waits until a job, or the one that carries it out, has come to its end, and returns it';

/*
 * The row is a record.  A default of the table's own row type would keep ALTER TABLE from
 * adding columns with a default to the table.
 */
CREATE PROCEDURE @extschema@.omni_refresh_await(
	id bigint,
	timeout interval DEFAULT '5 min',
	INOUT job record DEFAULT NULL)
	AS 'MODULE_PATHNAME', 'omni_refresh_await'
	LANGUAGE C;
COMMENT ON PROCEDURE @extschema@.omni_refresh_await(bigint, interval, record) IS
	'commits, and waits for a job as omni_refresh_wait() does, but without keeping VACUUM from removing rows';

CREATE FUNCTION @extschema@.omni_refresh_cancel(id bigint)
	RETURNS boolean
	AS 'MODULE_PATHNAME', 'omni_refresh_cancel'
	LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION @extschema@.omni_refresh_cancel(bigint) IS
	'cancels a job if it is still pending, and puts those back into the queue that were merged into it';

CREATE FUNCTION @extschema@.omni_refresh_retry(id bigint)
	RETURNS @extschema@.omni_refresh_job
	AS 'MODULE_PATHNAME', 'omni_refresh_retry'
	LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION @extschema@.omni_refresh_retry(bigint) IS
	'queues what a failed, canceled or unknown job asked for once more, and returns the new job';

CREATE FUNCTION @extschema@.omni_refresh_models(
	name text DEFAULT NULL,
	kind text DEFAULT NULL)
	RETURNS TABLE (
		id uuid,
		name text,
		kind text,
		connection_id uuid,
		base_model_id uuid,
		branches jsonb,
		updated_at timestamptz)
	AS 'MODULE_PATHNAME', 'omni_refresh_models'
	LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION @extschema@.omni_refresh_models(text, text) IS
	'the models that Omni has, of a name and of a kind if these are given';

CREATE FUNCTION @extschema@.omni_refresh_check()
	RETURNS TABLE (check_name text, ok boolean, detail text, hint text)
	AS 'MODULE_PATHNAME', 'omni_refresh_check'
	LANGUAGE C VOLATILE PARALLEL UNSAFE ROWS 30;
COMMENT ON FUNCTION @extschema@.omni_refresh_check() IS
	'goes the way of a request, step by step, and says what is wrong and what to do';

CREATE FUNCTION @extschema@.omni_refresh_wake()
	RETURNS boolean
	AS 'MODULE_PATHNAME', 'omni_refresh_wake'
	LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION @extschema@.omni_refresh_wake() IS
	'starts the background worker if any job is unfinished or there is a watch, and returns whether that is so';

CREATE FUNCTION @extschema@.omni_refresh_requests_last_minute(server name)
	RETURNS bigint
	AS 'MODULE_PATHNAME', 'omni_refresh_requests_last_minute'
	LANGUAGE C STRICT VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION @extschema@.omni_refresh_requests_last_minute(name) IS
	'how many HTTP requests this database has sent to a server in the last minute, polls and look-ups included';

/*
 * Watches.  Who may refresh a model at any time may do it at each change, too; but a watch
 * works on for as long as it exists, so that only who is trusted with that may set one.
 */
CREATE FUNCTION @extschema@.omni_refresh_watch(
	model uuid DEFAULT NULL,
	branch uuid DEFAULT NULL,
	schemas text[] DEFAULT NULL,
	delay interval DEFAULT '5 s',
	removals interval DEFAULT '10 min',
	cache_policy text DEFAULT NULL,
	quiet interval DEFAULT NULL)
	RETURNS @extschema@.omni_refresh_watch
	AS 'MODULE_PATHNAME', 'omni_refresh_watch'
	LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION @extschema@.omni_refresh_watch(uuid, uuid, text[], interval, interval, text, interval) IS
	'has a model refreshed by itself whenever tables or columns have changed; a second call replaces the first';

CREATE FUNCTION @extschema@.omni_refresh_unwatch(
	model uuid DEFAULT NULL,
	branch uuid DEFAULT NULL)
	RETURNS boolean
	AS 'MODULE_PATHNAME', 'omni_refresh_unwatch'
	LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION @extschema@.omni_refresh_unwatch(uuid, uuid) IS
	'ends what omni_refresh_watch() has begun, and returns whether there was a watch';

CREATE FUNCTION @extschema@.omni_refresh_changes(
	model uuid DEFAULT NULL,
	branch uuid DEFAULT NULL)
	RETURNS TABLE (
		schema text,
		relation text,
		change text,
		refresh text)
	AS 'MODULE_PATHNAME', 'omni_refresh_changes'
	LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION @extschema@.omni_refresh_changes(uuid, uuid) IS
	'what has changed since Omni was told last, and the refresh that a watch asks for because of it: soft, hard or none';

REVOKE EXECUTE ON FUNCTION @extschema@.omni_refresh_watch(uuid, uuid, text[], interval, interval, text, interval),
	@extschema@.omni_refresh_unwatch(uuid, uuid),
	@extschema@.omni_refresh_changes(uuid, uuid) FROM PUBLIC;

/*
 * The first watch enables the event trigger, and the last one to go disables it.  It only
 * notices that something has happened, so that it needs no tags: DROP TYPE removes columns, too.
 */
CREATE FUNCTION @extschema@.omni_refresh_notice_ddl()
	RETURNS event_trigger
	AS 'MODULE_PATHNAME', 'omni_refresh_notice_ddl'
	LANGUAGE C VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION @extschema@.omni_refresh_notice_ddl() IS 'has watches look for changes once the transaction has committed';
CREATE EVENT TRIGGER omni_refresh_watch ON ddl_command_end EXECUTE FUNCTION @extschema@.omni_refresh_notice_ddl();
COMMENT ON EVENT TRIGGER omni_refresh_watch IS 'has watches look for changes; enabled while there is a watch';
ALTER EVENT TRIGGER omni_refresh_watch DISABLE;

/*
 * For monitoring.  Whatever the tables hold, it reads no more than what is unfinished,
 * what came to an end in the last hour, the last jobs of each server, and a bounded number
 * of attempts and of failures.  So that an index finds them, the times must not be those
 * of clock_timestamp(), which is volatile, and each status must be asked for by itself: the
 * condition that makes the index one that may be used is none that it is searched by.
 *
 * Let no plan depend on statistics, which there are none of until the first ANALYZE: a
 * subquery with LIMIT is not joined in another way, and with ORDER BY it reads the index,
 * as long as it expects few rows: of a range with both ends it does.
 */
CREATE VIEW @extschema@.omni_refresh_status AS
WITH answers AS MATERIALIZED (
	SELECT
		job_server,
		percentile_cont(0.5::double precision) WITHIN GROUP (ORDER BY duration) AS p50,
		percentile_cont(0.95::double precision) WITHIN GROUP (ORDER BY duration) AS p95
	FROM (
		SELECT job, duration FROM @extschema@.omni_refresh_event
		WHERE occurred_at > (statement_timestamp() - interval '1 hour')
			AND occurred_at < 'infinity'::timestamptz
			AND duration IS NOT NULL AND http_status IS NOT NULL
		ORDER BY occurred_at DESC LIMIT 10000) AS attempt, LATERAL (
		SELECT server AS job_server FROM @extschema@.omni_refresh_job WHERE id = attempt.job LIMIT 1) AS job
	GROUP BY job_server
)
SELECT
	srvname AS server,
	pending, sending, running,
	oldest_pending, oldest_unfinished,
	completed, accepted, failed, canceled, unknown,
	last_success,
	last_failure,
	last_error,
	failures_in_a_row,
	p50, p95,
	@extschema@.omni_refresh_requests_last_minute(srvname) AS requests_last_minute,
	worker_pid
FROM pg_foreign_server
	JOIN pg_foreign_data_wrapper AS w
		ON w.oid = srvfdw AND fdwname = 'omni_refresh',
	LATERAL (
		SELECT
			count(*) FILTER (WHERE status = 'pending') AS pending,
			count(*) FILTER (WHERE status = 'sending') AS sending,
			count(*) FILTER (WHERE status = 'running') AS running,
			clock_timestamp() -
				min(requested_at) FILTER (WHERE status = 'pending') AS oldest_pending,
			clock_timestamp() - min(requested_at) AS oldest_unfinished
		FROM (
			SELECT status, requested_at FROM @extschema@.omni_refresh_job
			WHERE status = 'pending' AND origin <> 'call'
				AND server = srvname::text
			UNION ALL
			SELECT status, requested_at FROM @extschema@.omni_refresh_job
			WHERE (status = ANY ('{sending, running}')
					OR (status = 'pending' AND origin = 'call'))
				AND server = srvname::text) AS job
	) AS unfinished,
	LATERAL (
		SELECT
			max(number) FILTER (WHERE name = 'completed') AS completed,
			max(number) FILTER (WHERE name = 'accepted') AS accepted,
			max(number) FILTER (WHERE name = 'failed') AS failed,
			max(number) FILTER (WHERE name = 'canceled') AS canceled,
			max(number) FILTER (WHERE name = 'unknown') AS unknown
		FROM (VALUES ('completed'), ('accepted'), ('failed'), ('canceled'), ('unknown')) AS ends (name), LATERAL (
			SELECT count(*) AS number FROM @extschema@.omni_refresh_job
			WHERE status = ANY ('{completed, failed, accepted, canceled, unknown}')
				AND server = srvname::text AND status = name
				AND finished_at > (statement_timestamp() - interval '1 hour')) AS job
	) AS finished,
	LATERAL (
		SELECT max(last) AS last_success
		FROM (VALUES ('completed'), ('accepted')) AS ends (name), LATERAL (
			SELECT finished_at AS last FROM @extschema@.omni_refresh_job
			WHERE status = ANY ('{completed, failed, accepted, canceled, unknown}')
				AND server = srvname::text AND status = name
			ORDER BY finished_at DESC LIMIT 1) AS job
	) AS success
	LEFT JOIN LATERAL (
		SELECT last AS last_failure, why AS last_error
		FROM (VALUES ('failed'), ('unknown')) AS ends (name), LATERAL (
			SELECT finished_at AS last, error AS why FROM @extschema@.omni_refresh_job
			WHERE status = ANY ('{completed, failed, accepted, canceled, unknown}')
				AND server = srvname::text AND status = name
			ORDER BY finished_at DESC LIMIT 1) AS job
		ORDER BY last DESC LIMIT 1
	) AS failure ON true,
	LATERAL (
		SELECT count(*) AS failures_in_a_row
		FROM (
			SELECT FROM (VALUES ('failed'), ('unknown')) AS ends (name), LATERAL (
				SELECT FROM @extschema@.omni_refresh_job
				WHERE status = ANY ('{completed, failed, accepted, canceled, unknown}')
					AND server = srvname::text AND status = name
					AND finished_at > COALESCE(last_success, '-infinity')
				ORDER BY finished_at DESC LIMIT 1000) AS job
			LIMIT 1000) AS failures
	) AS failures
	LEFT JOIN LATERAL (
		SELECT p50, p95 FROM answers WHERE job_server = srvname::text
	) AS answer ON true,
	LATERAL (
		SELECT max(pid) AS worker_pid FROM pg_stat_activity
		WHERE backend_type = 'omni_refresh worker' AND datname = current_database()
	) AS worker;
COMMENT ON VIEW @extschema@.omni_refresh_status IS 'for monitoring: a row for each server';
COMMENT ON COLUMN @extschema@.omni_refresh_status.server IS 'the foreign server that names the Omni instance';
COMMENT ON COLUMN @extschema@.omni_refresh_status.pending IS 'jobs that wait to be sent';
COMMENT ON COLUMN @extschema@.omni_refresh_status.sending IS 'jobs that were sent and are not answered';
COMMENT ON COLUMN @extschema@.omni_refresh_status.running IS 'jobs that Omni works on';
COMMENT ON COLUMN @extschema@.omni_refresh_status.oldest_pending IS 'for how long the oldest pending job has been waiting';
COMMENT ON COLUMN @extschema@.omni_refresh_status.oldest_unfinished IS 'how long ago the oldest job was requested that is pending, sending or running';
COMMENT ON COLUMN @extschema@.omni_refresh_status.completed IS 'jobs that were completed in the last hour';
COMMENT ON COLUMN @extschema@.omni_refresh_status.accepted IS 'jobs that were accepted in the last hour, and not followed';
COMMENT ON COLUMN @extschema@.omni_refresh_status.failed IS 'jobs that failed in the last hour';
COMMENT ON COLUMN @extschema@.omni_refresh_status.canceled IS 'jobs that were canceled in the last hour';
COMMENT ON COLUMN @extschema@.omni_refresh_status.unknown IS 'jobs whose end became unknown in the last hour';
COMMENT ON COLUMN @extschema@.omni_refresh_status.last_success IS 'when a job was completed or accepted last';
COMMENT ON COLUMN @extschema@.omni_refresh_status.last_failure IS 'when a job failed, or its end became unknown, last';
COMMENT ON COLUMN @extschema@.omni_refresh_status.last_error IS 'why that was';
COMMENT ON COLUMN @extschema@.omni_refresh_status.failures_in_a_row IS 'jobs that failed, or whose end became unknown, since the last success; counted up to 1000';
COMMENT ON COLUMN @extschema@.omni_refresh_status.p50 IS 'median time to Omni''s answer in the last hour, of the last 10000 attempts that were answered';
COMMENT ON COLUMN @extschema@.omni_refresh_status.p95 IS '95th percentile of that';
COMMENT ON COLUMN @extschema@.omni_refresh_status.requests_last_minute IS
	'HTTP requests sent by this database in the last minute, polls and look-ups included; other databases may use the same key, too';
COMMENT ON COLUMN @extschema@.omni_refresh_status.worker_pid IS 'the process of this database''s background worker, if there is one';
GRANT SELECT ON @extschema@.omni_refresh_status TO pg_monitor;

/*
 * For everyone: how fresh each model is, by the jobs that one sees.
 *
 * Monitors see every job.  For them, the view steps backward through
 * omni_refresh_job_outcome_idx, from the newest job of a server, model, kind, branch and
 * status to that of the preceding one.  Only a comparison and an order by all columns of
 * the index make every plan use it.
 *
 * Whoever sees some jobs only must not step over all others one by one: for them, this
 * function reads the table once, by a condition that fits no index.  In the view itself, its
 * cost would make PostgreSQL compile the plan of monitors, too, which takes longer than to run it.
 */
CREATE FUNCTION @extschema@.omni_refresh_outcomes()
	RETURNS TABLE (
		server text,
		model_id uuid,
		kind text,
		branch_id uuid,
		status text,
		finished_at timestamptz,
		error text)
	LANGUAGE sql VOLATILE PARALLEL UNSAFE ROWS 100
	SET jit = off SET work_mem = '64MB'
BEGIN ATOMIC
	SELECT DISTINCT ON (server, model_id, kind, branch_id, status)
		server, model_id, kind, branch_id, status, finished_at, error
	FROM @extschema@.omni_refresh_job
	WHERE status <> ALL ('{pending, sending, running, canceled, merged}')
	ORDER BY server, model_id, kind, branch_id, status, finished_at DESC;
END;
COMMENT ON FUNCTION @extschema@.omni_refresh_outcomes() IS
	'the newest job of each server, model, kind, branch and status that one sees, for omni_refresh_freshness';

CREATE VIEW @extschema@.omni_refresh_freshness WITH (security_invoker = true) AS
WITH RECURSIVE newest AS (
	(SELECT server, model_id, kind, branch_id, status, finished_at, error
		FROM @extschema@.omni_refresh_job
		WHERE status = ANY ('{completed, failed, accepted, unknown}')
			AND pg_has_role('pg_monitor', 'USAGE')
		ORDER BY server DESC, model_id DESC, kind DESC,
			COALESCE(branch_id, '00000000-0000-0000-0000-000000000000') DESC, status DESC, finished_at DESC
		LIMIT 1)
	UNION ALL
	SELECT preceding.* FROM newest AS last, LATERAL (
		SELECT server, model_id, kind, branch_id, status, finished_at, error
		FROM @extschema@.omni_refresh_job
		WHERE status = ANY ('{completed, failed, accepted, unknown}')
			AND ROW(server, model_id, kind, COALESCE(branch_id, '00000000-0000-0000-0000-000000000000'), status)
				< ROW(last.server, last.model_id, last.kind,
					COALESCE(last.branch_id, '00000000-0000-0000-0000-000000000000'), last.status)
		ORDER BY server DESC, model_id DESC, kind DESC,
			COALESCE(branch_id, '00000000-0000-0000-0000-000000000000') DESC, status DESC, finished_at DESC
		LIMIT 1) AS preceding
)
SELECT server, model_id, branch_id, kind,
	max(finished_at) FILTER (WHERE status = ANY ('{completed, accepted}')) AS last_success,
	max(finished_at) FILTER (WHERE status = ANY ('{failed, unknown}')) AS last_failure,
	(array_agg(error ORDER BY finished_at DESC)
		FILTER (WHERE status = ANY ('{failed, unknown}')))[1] AS last_error,
	min(requested_at) AS unfinished_since
FROM (
	SELECT server, model_id, kind, branch_id, status, finished_at, error, NULL::timestamptz AS requested_at FROM newest
	UNION ALL
	SELECT server, model_id, kind, branch_id, status, finished_at, error, NULL FROM @extschema@.omni_refresh_outcomes()
	WHERE NOT pg_has_role('pg_monitor', 'USAGE')
	UNION ALL
	SELECT server, model_id, kind, branch_id, status, NULL, NULL, requested_at FROM @extschema@.omni_refresh_job
	WHERE status = 'pending' AND origin <> 'call'
	UNION ALL
	SELECT server, model_id, kind, branch_id, status, NULL, NULL, requested_at FROM @extschema@.omni_refresh_job
	WHERE status = ANY ('{sending, running}')
		OR (status = 'pending' AND origin = 'call')) AS job
GROUP BY server, model_id, kind, branch_id;
COMMENT ON VIEW @extschema@.omni_refresh_freshness IS 'how fresh each model is: a row for each server, model, branch and kind of job that one sees';
COMMENT ON COLUMN @extschema@.omni_refresh_freshness.server IS 'the foreign server that names the Omni instance';
COMMENT ON COLUMN @extschema@.omni_refresh_freshness.model_id IS 'the model';
COMMENT ON COLUMN @extschema@.omni_refresh_freshness.branch_id IS 'the branch of the model, if the jobs name one';
COMMENT ON COLUMN @extschema@.omni_refresh_freshness.kind IS 'schema: a refresh of the schema model; cache: a reset of a cache policy; dbt: a dbt sync';
COMMENT ON COLUMN @extschema@.omni_refresh_freshness.last_success IS 'when a job was completed or accepted last';
COMMENT ON COLUMN @extschema@.omni_refresh_freshness.last_failure IS 'when a job failed, or its end became unknown, last';
COMMENT ON COLUMN @extschema@.omni_refresh_freshness.last_error IS 'why that was';
COMMENT ON COLUMN @extschema@.omni_refresh_freshness.unfinished_since IS 'when the oldest job was requested that is pending, sending or running';
GRANT SELECT ON @extschema@.omni_refresh_freshness TO PUBLIC;

/*
 * Counters, which only the end of the database server resets, as scrapers of metrics need
 * them.  Servers that had no room for an entry, or do not exist, are counted together.
 */
CREATE FUNCTION @extschema@.omni_refresh_get_counters(
	server oid,
	OUT requests_ok bigint,
	OUT requests_rate_limited bigint,
	OUT requests_refused bigint,
	OUT requests_failed bigint,
	OUT requests_unanswered bigint,
	OUT polls bigint,
	OUT lookups bigint,
	OUT retried bigint,
	OUT request_time double precision,
	OUT throttled bigint,
	OUT jobs_completed bigint,
	OUT jobs_failed bigint,
	OUT jobs_accepted bigint,
	OUT jobs_canceled bigint,
	OUT jobs_merged bigint,
	OUT jobs_unknown bigint,
	OUT since timestamptz)
	AS 'MODULE_PATHNAME', 'omni_refresh_get_counters'
	LANGUAGE C STRICT VOLATILE PARALLEL UNSAFE;
COMMENT ON FUNCTION @extschema@.omni_refresh_get_counters(oid) IS
	'what was counted for a foreign server of this database, or with 0 for all servers without an entry of their own';
REVOKE EXECUTE ON FUNCTION @extschema@.omni_refresh_get_counters(oid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION @extschema@.omni_refresh_get_counters(oid) TO pg_monitor;

CREATE VIEW @extschema@.omni_refresh_counters AS
SELECT
	srvname AS server,
	requests_ok, requests_rate_limited, requests_refused, requests_failed, requests_unanswered,
	polls, lookups, retried,
	request_time,
	throttled,
	jobs_completed, jobs_accepted, jobs_failed, jobs_canceled, jobs_merged, jobs_unknown,
	since
FROM (
		SELECT s.oid, srvname::text FROM pg_foreign_server AS s
			JOIN pg_foreign_data_wrapper AS w
				ON w.oid = srvfdw AND fdwname = 'omni_refresh'
		UNION ALL
		SELECT 0::oid, NULL::text
	) AS servers (id, srvname),
	LATERAL @extschema@.omni_refresh_get_counters(id);
COMMENT ON VIEW @extschema@.omni_refresh_counters IS
	'for monitoring: a row of counters for each server, and one with no name for all servers of the cluster that have none or no longer exist';
COMMENT ON COLUMN @extschema@.omni_refresh_counters.server IS 'the foreign server that names the Omni instance; NULL: servers of any database that are not counted by themselves';
COMMENT ON COLUMN @extschema@.omni_refresh_counters.requests_ok IS 'requests that Omni answered as expected, or by telling that it could not do what was asked';
COMMENT ON COLUMN @extschema@.omni_refresh_counters.requests_rate_limited IS 'requests that Omni refused because of its own rate limit, with HTTP status 429';
COMMENT ON COLUMN @extschema@.omni_refresh_counters.requests_refused IS 'requests that were refused with another HTTP status from 400 to 499';
COMMENT ON COLUMN @extschema@.omni_refresh_counters.requests_failed IS 'requests with any other answer: another HTTP status, or not of the form of Omni''s answers';
COMMENT ON COLUMN @extschema@.omni_refresh_counters.requests_unanswered IS 'requests without a complete answer: not sent at all, or timed out, or cut off';
COMMENT ON COLUMN @extschema@.omni_refresh_counters.polls IS 'those of the requests that asked how far a job has come';
COMMENT ON COLUMN @extschema@.omni_refresh_counters.lookups IS 'those of the requests that asked for models, or were sent by omni_refresh_check()';
COMMENT ON COLUMN @extschema@.omni_refresh_counters.retried IS 'those of the requests after which another attempt was planned';
COMMENT ON COLUMN @extschema@.omni_refresh_counters.request_time IS 'how long all requests took, in milliseconds';
COMMENT ON COLUMN @extschema@.omni_refresh_counters.throttled IS 'requests that were held back by the server''s rate_limit, or by a pause that Omni had asked for';
COMMENT ON COLUMN @extschema@.omni_refresh_counters.jobs_completed IS 'jobs that Omni has completed';
COMMENT ON COLUMN @extschema@.omni_refresh_counters.jobs_failed IS 'jobs that failed';
COMMENT ON COLUMN @extschema@.omni_refresh_counters.jobs_accepted IS 'jobs that were accepted and not followed';
COMMENT ON COLUMN @extschema@.omni_refresh_counters.jobs_canceled IS 'jobs that were canceled';
COMMENT ON COLUMN @extschema@.omni_refresh_counters.jobs_merged IS 'jobs that were merged into another one';
COMMENT ON COLUMN @extschema@.omni_refresh_counters.jobs_unknown IS 'jobs whose end became unknown';
COMMENT ON COLUMN @extschema@.omni_refresh_counters.since IS 'when counting began: after the start of the database server';
GRANT SELECT ON @extschema@.omni_refresh_counters TO pg_monitor;
