# The SECURITY DEFINER function of the README, word for word but for the model's uuid and a role: its callers
# cannot choose the server. Without its SET clauses they could.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniDoc;
use OmniFault;

my $omni = OmniAPI->start;
my $other = OmniAPI->start;
my $node = OmniFault::node('main', conf => "omni_refresh.min_interval = 0\n");
my $model = $omni->model;

END { my $rc = $?; $_->stop foreach grep { $_ } $omni, $other; $? = $rc; }

my ($wrapper) = map { $_->{text} } OmniDoc::find(qr/CREATE FUNCTION refresh_sales\(\)/);
isnt($wrapper //= '', '', 'the README has a function');
is($wrapper =~ s/ TO analyst;/ TO loader;/, 1, '... and one role');

# The owner may use two servers, which its callers may not.
$node->safe_psql('postgres', qq{
	CREATE ROLE owner LOGIN; CREATE ROLE loader LOGIN; CREATE ROLE stranger LOGIN;
	GRANT CREATE ON SCHEMA public TO owner;
	CREATE SCHEMA AUTHORIZATION loader;
	CREATE SERVER omni FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url '${\ $omni->http}', model '$model', rate_limit '0');
	CREATE SERVER other FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url '${\ $other->http}', model '$model', rate_limit '0');
	GRANT USAGE ON FOREIGN SERVER omni, other TO owner;
	CREATE USER MAPPING FOR owner SERVER omni OPTIONS (api_key '${\ $omni->key}');
	CREATE USER MAPPING FOR owner SERVER other OPTIONS (api_key '${\ $other->key}')});

# Has the loader call the function after some statements; returns what the call printed, or the
# SQLSTATE, and the servers that were asked, however often: requests that are alike may be merged.
sub called
{
	my ($before, $user) = @_;

	$_->reset for $omni, $other;
	my $call = OmniFault::call($node, "$before; SELECT public.refresh_sales()", user => $user // 'loader');
	$node->poll_query_until('postgres', q{SELECT count(*) = 0 FROM omni_refresh_job WHERE status IN ('pending', 'sending')}) or die;
	return join ' ', $call->{status} == 0 ? $call->{out} =~ s/.*\n//sr : $call->{sqlstate},
		(scalar(() = $omni->requests) ? 'omni' : ()), (scalar(() = $other->requests) ? 'other' : ());
}

$node->safe_psql('postgres', $wrapper =~ s/^ +SET .*\n//mgr, extra_params => [ '-U', 'owner' ]);
is(called(q{SET omni_refresh.server = 'other'}), 'pending other', "a function without SET takes its caller's server");
$node->safe_psql('postgres', 'DROP FUNCTION refresh_sales()');

$node->safe_psql('postgres', $wrapper, extra_params => [ '-U', 'owner' ]);
is(called('SELECT'), 'pending omni', 'the function of the README uses its own');
for my $before ('', 'SELECT * FROM omni_refresh_wake(); ')	# which loads the library
{
	my $when = $before ? 'once the library is loaded' : 'before the library is loaded';
	is(called(qq{${before}SET omni_refresh.server = 'other'}), 'pending omni', "... whatever its caller sets $when");
	is(called(qq{${before}BEGIN; SET LOCAL omni_refresh.server = 'other'; SELECT public.refresh_sales(); COMMIT}), 'pending omni',
		'... or sets for a transaction');
}
$node->safe_psql('postgres', q{ALTER ROLE loader SET omni_refresh.server = 'other'});
is(called('SELECT'), 'pending omni', "... or the caller's role has set");
$node->safe_psql('postgres', 'ALTER ROLE loader RESET ALL');
is(called(q{SET omni_refresh.server = 'other'; DO $$ BEGIN
		PERFORM public.refresh_sales();
		IF current_setting('omni_refresh.server') <> 'other' THEN RAISE 'changed'; END IF;
	END $$}), 'pending omni', '... which stays as it was for the caller');
is(called(q{
	CREATE FUNCTION loader.omni_refresh_on_commit(uuid) RETURNS public.omni_refresh_job LANGUAGE plpgsql AS 'BEGIN RAISE ''hostile''; END';
	CREATE TEMP TABLE omni_refresh_job (id int);
	SET search_path = loader, public}), 'pending omni', '... and so is the search_path');
is(called('SELECT', 'stranger'), '42501', 'others may not call it');
is(OmniFault::call($node, "SELECT * FROM omni_refresh('$model')", user => 'loader')->{sqlstate}, '42501', '... and its callers may call nothing else');

# The owner of the tables writes jobs as others.

$_->reset for $omni, $other;
$node->safe_psql('postgres', qq{
	CREATE ROLE keeper LOGIN;
	ALTER TABLE omni_refresh_job OWNER TO keeper;
	SET ROLE keeper;
	INSERT INTO omni_refresh_job (status, model_id, kind, hard, server, origin, requested_by, requested_by_oid, requested_at, run_at, database)
	SELECT 'pending', '$model', 'schema', true, 'omni', 'on_commit', 'owner', 'owner'::regrole, now(), now(), oid
	FROM pg_database WHERE datname = current_database();
	SELECT omni_refresh_wake()});
is(OmniFault::call($node, "SELECT * FROM omni_refresh('$model')", user => 'keeper')->{sqlstate}, '42501', 'the owner of the tables may make no calls');
ok($node->poll_query_until('postgres', q{SELECT count(*) = 0 FROM omni_refresh_job WHERE status IN ('pending', 'sending')}), '... but write jobs');
is(join(' ', map { $_->{headers}{authorization} } $omni->requests), 'Bearer ' . $omni->key, "... which are sent with others' keys, as the README says");

done_testing();
