# A trigger of the owner of the tables, who is no superuser, calls back from within the worker:
# the worker does not wait for itself, and nobody waits for it.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;

my $omni = OmniAPI->start;
my $node = OmniFault::node('call_in_worker');
my $model = $omni->model;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
$node->safe_psql('postgres', q{
	CREATE ROLE owner LOGIN;
	GRANT CREATE, USAGE ON SCHEMA public TO owner;
	ALTER TABLE omni_refresh_job OWNER TO owner;
	ALTER TABLE omni_refresh_event OWNER TO owner;
	CREATE ROLE bob LOGIN;
});

my %calls = (
	omni_refresh => 'omni_refresh(new.model_id, hard => false)',
	omni_refresh_models => 'omni_refresh_models()',
	omni_refresh_check => 'omni_refresh_check()',
	omni_refresh_wait => 'omni_refresh_wait(new.id)');

for my $name (sort keys %calls)
{
	$node->safe_psql('postgres', qq{
		DELETE FROM omni_refresh_job;
		SET ROLE owner;
		CREATE OR REPLACE FUNCTION call_back() RETURNS trigger LANGUAGE plpgsql SET search_path = public AS \$\$
		BEGIN
			IF new.status = 'accepted' THEN
				PERFORM $calls{$name};
			END IF;
			RETURN new;
		EXCEPTION WHEN feature_not_supported THEN
			RAISE LOG '$name: refused';
			RETURN new;
		END \$\$;
		CREATE OR REPLACE TRIGGER call_back BEFORE UPDATE ON omni_refresh_job FOR EACH ROW EXECUTE FUNCTION call_back();
	});
	my $from = -s $node->logfile;
	my $call = OmniFault::call($node, "SET omni_refresh.call_timeout = '20s'; SELECT status FROM omni_refresh('$model');", user => 'bob');
	is($call->{out}, 'accepted', "$name within the worker: the call of another user ends well") or diag($call->{err});
	like(slurp_file($node->logfile, $from), qr/$name: refused/, '... and it is refused there');
}

done_testing();
