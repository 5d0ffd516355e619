# The owner of the table of jobs, who is no superuser, has a trigger rename it and ask for a job:
# no session of others crashes, nor does the worker.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
my $node = OmniFault::node('rename_in_trigger');
my $model = $omni->model;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
$node->safe_psql('postgres', q{
	CREATE ROLE owner LOGIN;
	GRANT CREATE, USAGE ON SCHEMA public TO owner;
	ALTER TABLE omni_refresh_job OWNER TO owner;
	ALTER TABLE omni_refresh_event OWNER TO owner;
	SET ROLE owner;
	CREATE FUNCTION rename() RETURNS trigger LANGUAGE plpgsql SET search_path = public AS $$
	BEGIN
		IF new.branch_id IS NULL THEN
			ALTER TABLE omni_refresh_job RENAME TO renamed;
			PERFORM omni_refresh_on_commit(new.model_id, branch => gen_random_uuid());
			ALTER TABLE renamed RENAME TO omni_refresh_job;
		END IF;
		RETURN new;
	END $$;
	CREATE TRIGGER rename BEFORE INSERT ON omni_refresh_job FOR EACH ROW EXECUTE FUNCTION rename();
});

for my $round (1 .. 3)
{
	my $call = OmniFault::call($node, "SELECT id FROM omni_refresh_on_commit('$model');" x 3);
	is($call->{err}, '', "round $round: what is queued meanwhile is queued");
	OmniFault::call($node, "SELECT id FROM omni_refresh('$model');");
	ok($node->safe_psql('postgres', 'SELECT count(*) > 0 FROM omni_refresh_job') eq 't', '... and the server is still there');
}
unlike(slurp_file($node->logfile), qr/terminated by signal/, 'nothing has crashed');

done_testing();
