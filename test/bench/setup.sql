-- What the benchmark needs in a database. The variables http, https and far are URLs, ca and
-- key_file are paths.

CREATE EXTENSION omni_refresh;
CREATE SERVER http FOREIGN DATA WRAPPER omni_refresh
	OPTIONS (base_url :'http', rate_limit '0');
CREATE SERVER https FOREIGN DATA WRAPPER omni_refresh
	OPTIONS (base_url :'https', ca_file :'ca', rate_limit '0');
CREATE SERVER far FOREIGN DATA WRAPPER omni_refresh
	OPTIONS (base_url :'far', ca_file :'ca', rate_limit '0');
CREATE USER MAPPING FOR CURRENT_USER SERVER http OPTIONS (api_key_file :'key_file');
CREATE USER MAPPING FOR CURRENT_USER SERVER https OPTIONS (api_key_file :'key_file');
CREATE USER MAPPING FOR CURRENT_USER SERVER far OPTIONS (api_key_file :'key_file');

-- A row of the job's shape, without what makes it a job
CREATE TABLE bare (LIKE omni_refresh_job INCLUDING DEFAULTS INCLUDING IDENTITY, PRIMARY KEY (id));

-- What a user would write
CREATE FUNCTION handmade_request(url text, ca_file text, key text) RETURNS text
	AS 'handmade' LANGUAGE C STRICT;
CREATE TABLE handmade (
	id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
	model_id uuid NOT NULL,
	requested_at timestamptz NOT NULL DEFAULT clock_timestamp(),
	answer jsonb NOT NULL
);

-- What is loaded, by a transaction ...
CREATE TABLE loaded (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, what text);

-- ... and by one statement with a trigger for each row
CREATE TABLE asking (what int);
CREATE FUNCTION ask() RETURNS trigger LANGUAGE plpgsql
	AS $$BEGIN
		PERFORM omni_refresh_on_commit('00000000-0000-4000-8000-000000000001');
		RETURN NULL;
	END$$;
CREATE TRIGGER ask AFTER INSERT ON asking FOR EACH ROW EXECUTE FUNCTION ask();
CREATE TABLE notifying (what int);
CREATE FUNCTION notify() RETURNS trigger LANGUAGE plpgsql
	AS $$BEGIN PERFORM pg_notify('loaded', 'sales'); RETURN NULL; END$$;
CREATE TRIGGER notify AFTER INSERT ON notifying FOR EACH ROW EXECUTE FUNCTION notify();

-- Jobs of one model or of models of their own, each in a transaction, also while the queue is held
CREATE PROCEDURE queue(number int, different bool) LANGUAGE plpgsql AS $$
BEGIN
	FOR i IN 1 .. number LOOP
		PERFORM omni_refresh_on_commit(CASE WHEN different THEN gen_random_uuid()
			ELSE '00000000-0000-4000-8000-000000000001' END);
		COMMIT;
	END LOOP;
END $$;

CREATE FUNCTION any_unfinished() RETURNS bool LANGUAGE sql SET enable_seqscan = off AS $$
	SELECT EXISTS (SELECT FROM omni_refresh_job WHERE status = 'pending' AND origin <> 'call')
		OR EXISTS (SELECT FROM omni_refresh_job WHERE status = ANY ('{sending, running}')
			OR (status = 'pending' AND origin = 'call'))
$$;
CREATE PROCEDURE until_done() LANGUAGE plpgsql AS $$
BEGIN
	WHILE any_unfinished() LOOP
		COMMIT;
		PERFORM pg_sleep(0.05);
	END LOOP;
END $$;
