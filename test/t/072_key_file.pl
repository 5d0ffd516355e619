# A key in a file is used with a server of a superuser only: another owner could redirect it by
# changing base_url and dropping proxy and ca_file.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;

my $omni = OmniAPI->start;
my $elsewhere = OmniAPI->start;
my $node = OmniFault::node('main', conf => "omni_refresh.min_interval = 0\n");
my $file = $node->basedir . '/key';
my $model = $omni->model;
my $superuser = $node->safe_psql('postgres', 'SELECT quote_ident(current_user)');

END { my $rc = $?; $_->stop foreach grep { $_ } $omni, $elsewhere; $? = $rc; }

append_to_file($file, $omni->key);
OmniFault::server($node, 'omni', url => $omni->https, ca_file => $omni->ca, key => 'x', rate_limit => 0);
$node->safe_psql('postgres', qq{
	CREATE ROLE owner LOGIN;
	CREATE ROLE loader LOGIN;
	ALTER USER MAPPING FOR PUBLIC SERVER omni OPTIONS (DROP api_key, ADD api_key_file '$file')});

# Calls each function that makes a request, as a role; returns the SQLSTATEs that they raise.
my $last;

sub states
{
	my ($user) = @_;
	my @states;

	for my $call ("omni_refresh('$model')", "omni_refresh_on_commit('$model')", "omni_refresh_cache('$model', 'p')",
		"omni_refresh_cache_on_commit('$model', 'p')", 'omni_refresh_models()')
	{
		$last = OmniFault::call($node, "SELECT * FROM $call", user => $user);
		push @states, $last->{sqlstate} || '00000';
	}
	return join ' ', @states;
}

sub all_done
{
	return $node->poll_query_until('postgres', q{SELECT count(*) = 0 FROM omni_refresh_job WHERE status IN ('pending', 'sending')});
}

# The steps that omni_refresh_check() reports, up to the first that fails
sub checked
{
	return $node->safe_psql('postgres', q{SET ROLE loader; SELECT check_name || ' ' || ok || ': ' || detail FROM omni_refresh_check()});
}

is(states('loader'), join(' ', ('00000') x 5), 'a key in a file is used with a server of a superuser');
ok(all_done(), '... by what is queued, too');
is($node->safe_psql('postgres', q{SELECT count(*) FROM omni_refresh_job WHERE status NOT IN ('accepted', 'completed')}), '0', '... with success');

# A server of somebody else, who redirects it

my $jobs = $node->safe_psql('postgres', 'SELECT count(*) FROM omni_refresh_job');
$omni->reset;
$node->safe_psql('postgres', 'ALTER SERVER omni OWNER TO owner');
is(states('loader'), join(' ', ('42501') x 5), 'it is not used with a server of somebody else');
is($last->{message}, 'server "omni" must be owned by a superuser for its mappings to use "api_key_file"', '... as the message says');
is($last->{detail}, 'Its owner "owner" is not a superuser and could redirect the key.', '... and why');
is($last->{hint}, 'Have a superuser run ALTER SERVER omni OWNER TO CURRENT_USER, or use the option "api_key".', '... and what to do');
is(states($superuser), join(' ', ('42501') x 5), '... not even by a superuser');
like(checked(), qr/^user mapping false: .*server "omni" must be owned by a superuser/m, '... and the check says so');
is(OmniFault::call($node, qq{ALTER SERVER omni OPTIONS (DROP ca_file, SET base_url '${\ $elsewhere->https}')}, user => 'owner')->{status}, 0,
	'that owner can drop what a superuser has set');
is(states('loader'), join(' ', ('42501') x 5), '... and does not get the key');
is(scalar(() = $omni->requests, $elsewhere->requests), 0, '... of all that, nothing is sent');
is($node->safe_psql('postgres', 'SELECT count(*) FROM omni_refresh_job'), $jobs, '... or written');

# What was queued before the owner changed

$node->safe_psql('postgres', qq{ALTER SERVER omni OWNER TO $superuser;
	ALTER SERVER omni OPTIONS (ADD ca_file '${\ $omni->ca}', SET base_url '${\ $omni->https}')});
$node->append_conf('postgresql.conf', "omni_refresh.enabled = off\n");
$node->reload;
ok($node->poll_query_until('postgres', q{SELECT current_setting('omni_refresh.enabled') = 'off' FROM (SELECT omni_refresh_wake()) AS loaded}), 'the queue is held');
my $id = $node->safe_psql('postgres', "SET omni_refresh.enabled = on; SELECT id FROM omni_refresh_on_commit('$model')");
$node->safe_psql('postgres', qq{ALTER SERVER omni OWNER TO owner});
$node->append_conf('postgresql.conf', "omni_refresh.enabled = on\n");
$node->reload;
ok($node->poll_query_until('postgres', qq{SELECT error IS NOT NULL FROM omni_refresh_job WHERE id = $id}), 'a job of the queue is looked at');
like($node->safe_psql('postgres', "SELECT status || ' ' || error FROM omni_refresh_job WHERE id = $id"),
	qr/^failed 42501: server "omni" must be owned by a superuser/, '... and not sent');
is(scalar(() = $omni->requests), 0, '... indeed');

# What does without a file, or without such an owner

$node->safe_psql('postgres', "ALTER USER MAPPING FOR PUBLIC SERVER omni OPTIONS (DROP api_key_file, ADD api_key '${\ $omni->key}')");
is(states('loader'), join(' ', ('00000') x 5), 'a key in the mapping is used with a server of anybody');
$node->safe_psql('postgres', "ALTER USER MAPPING FOR PUBLIC SERVER omni OPTIONS (DROP api_key, ADD api_key_file '$file'); ALTER ROLE owner SUPERUSER");
is(states('loader'), join(' ', ('00000') x 5), 'an owner may become a superuser');
$node->safe_psql('postgres', 'ALTER ROLE owner NOSUPERUSER');
is(states('loader'), join(' ', ('42501') x 5), '... and cease to be one');

done_testing();
