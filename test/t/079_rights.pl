# The rights: who may call, make servers and mappings, and see the jobs.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;

my $omni = OmniAPI->start;
my $node = OmniFault::node('main');
my $refresh = q{SELECT * FROM omni_refresh('} . $omni->model . q{');};
my ($http, $https, $ca) = ($omni->http, $omni->https, $omni->ca);

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

$node->safe_psql('postgres', qq{
	CREATE ROLE alice LOGIN;
	CREATE ROLE bob LOGIN;
	CREATE ROLE carol LOGIN;
	CREATE ROLE watcher LOGIN IN ROLE pg_monitor;
	CREATE ROLE team;
	CREATE ROLE member LOGIN IN ROLE team;
	CREATE ROLE heir LOGIN NOINHERIT IN ROLE alice;
	GRANT CREATE ON DATABASE postgres TO alice;
	CREATE SERVER omni FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url '$http', rate_limit '0');
});

# Runs statements as a role; returns the SQLSTATE, 00000 if all went well.
my $last;

sub state_of
{
	my ($user, $sql) = @_;

	$last = OmniFault::call($node, $sql, user => $user);
	return $last->{status} == 0 ? '00000' : $last->{sqlstate};
}

# The key of the last request
sub key
{
	return (($omni->requests)[-1]->{headers}{authorization} // '') =~ s/^Bearer //r;
}

# USAGE, then a mapping, then a call

is(state_of('alice', $refresh), '42501', 'without USAGE there is no call');
like($last->{hint}, qr/GRANT USAGE ON FOREIGN SERVER omni TO alice/, '... but a hint');
$node->safe_psql('postgres', 'GRANT USAGE ON FOREIGN SERVER omni TO alice, team');
is(state_of('alice', $refresh), '28000', 'nor without a mapping');
like($last->{hint}, qr/CREATE USER MAPPING FOR alice SERVER omni/, '... but a hint');
is(state_of('alice', "CREATE USER MAPPING FOR alice SERVER omni"), '00000', 'with USAGE one may make one');
is(state_of('alice', $refresh), '28000', '... which is of no use without a key');
like($last->{hint}, qr/ALTER USER MAPPING FOR alice SERVER omni OPTIONS \(ADD api_key_file '\.\.\.'\) as a superuser, or with \(ADD api_key '/, '... as the hint says');
is(scalar($omni->requests), 0, 'so far nothing was sent');
is($node->safe_psql('postgres', 'SELECT count(*) FROM omni_refresh_job'), '0', '... nor written');
$omni->set(key => 'alices');
is(state_of('alice', "ALTER USER MAPPING FOR alice SERVER omni OPTIONS (ADD api_key 'alices')"), '00000',
	'a user can set the own key');
is(state_of('alice', $refresh), '00000', '... and make calls with it');
is(key(), 'alices', '... indeed');

$node->safe_psql('postgres', "CREATE USER MAPPING FOR PUBLIC SERVER omni OPTIONS (api_key 'publics')");
$omni->set(key => 'publics');
is(state_of('bob', $refresh), '42501', "PUBLIC's mapping is of no use without USAGE");
is(state_of('member', $refresh), '00000', "... which may come by way of a group");
is(key(), 'publics', "... and lends PUBLIC's key");
is(state_of('alice', $refresh), '28000', 'an own mapping goes before');
is(key(), 'alices', '... even if Omni has revoked its key');
is(state_of('heir', $refresh), '42501', 'a role that does not inherit has no part in it');
$omni->set(key => 'alices');
is(state_of('heir', "SET ROLE alice; $refresh"), '00000', '... until it sets its role');

# Wrappers lend the key of their owner

$node->safe_psql('postgres', 'GRANT CREATE ON SCHEMA public TO alice');
is(state_of('alice', qq{
		CREATE FUNCTION refresh_for_all() RETURNS text LANGUAGE sql SECURITY DEFINER
		SET search_path = public AS 'SELECT status FROM omni_refresh(''${\ $omni->model}'')'}),
	'00000', 'a function of alice');
is(state_of('carol', 'SELECT refresh_for_all()'), '00000', '... may be called by others');
is(key(), 'alices', '... with her key');
is($node->safe_psql('postgres', 'SELECT requested_by FROM omni_refresh_job ORDER BY id DESC LIMIT 1'),
	'alice', '... on her behalf');
is(state_of('carol', $refresh), '42501', '... which lends nothing else');

# Servers and options

for my $case (
	[ '42704', 'SET omni_refresh.server = nowhere', 'a server that does not exist' ],
	[ '42809', 'SET omni_refresh.server = foreigner', 'a server of another wrapper' ])
{
	$node->safe_psql('postgres', 'CREATE FOREIGN DATA WRAPPER other; CREATE SERVER foreigner
		FOREIGN DATA WRAPPER other; CREATE USER MAPPING FOR alice SERVER foreigner OPTIONS (api_key \'x\');
		GRANT USAGE ON FOREIGN SERVER foreigner TO alice') if $case->[0] eq '42809';
	is(state_of('alice', "$case->[1]; $refresh"), $case->[0], $case->[2]);
	like($last->{hint}, qr/"omni_refresh.server"/, '... with a hint');
}
$node->safe_psql('postgres', 'GRANT USAGE ON FOREIGN DATA WRAPPER omni_refresh TO alice');
my $create = 'CREATE SERVER own FOREIGN DATA WRAPPER omni_refresh OPTIONS';
is(state_of('alice', "$create (base_url '$http')"), '42501', 'http is for superusers');
for my $option ("proxy '$http'", "ca_file '$ca'")
{
	is(state_of('alice', "$create (base_url 'https://a.example', $option)"), '42501',
		"only a superuser may set $option" =~ s/ '.*//r);
}
is(state_of('alice', "$create (base_url 'https://a.example')"), '00000', 'a server of her own');
is(state_of('alice', "ALTER SERVER own OPTIONS (ADD proxy '$http')"), '42501', '... cannot get a proxy later');
is(state_of('alice', "CREATE USER MAPPING FOR alice SERVER own OPTIONS (api_key_file '/etc/hostname')"),
	'42501', '... nor does a mapping read files');
$node->safe_psql('postgres', "ALTER SERVER own OPTIONS (ADD ca_file '$ca')");
is(state_of('alice', "ALTER SERVER own OPTIONS (SET base_url 'https://b.example')"), '42501',
	'what a superuser has set keeps her from redirecting it');
like("$last->{detail} $last->{hint}", qr/superuser/, '... as she is told');
is(state_of('alice', "ALTER SERVER own OPTIONS (DROP ca_file, SET base_url 'https://b.example')"), '00000',
	'... unless she drops it: the validator does not know what an option was');
for my $url ('http://a.example', 'https://u:p@a.example', 'https://a.example/x', 'https://a.example?x',
	'ftp://a.example', 'file:///etc/passwd', "https://a.example/\nx", 'https://a.example/api#x')
{
	my $call = OmniFault::call($node, "ALTER SERVER own OPTIONS (SET base_url '$url')");
	is($call->{sqlstate}, '22023', 'not a base URL: ' . $url =~ s/\n/\\n/r);
}
for my $name ('http_proxy', 'verify', 'api_key', 'url')
{
	my $call = OmniFault::call($node, "ALTER SERVER own OPTIONS (ADD $name 'off')");
	is($call->{sqlstate}, 'HV00D', "not an option of a server: $name");
	like($call->{hint}, qr/\S/, '... with a hint');
}
is(state_of('alice', q{LOAD 'omni_refresh'; SET omni_refresh.enabled = off}), '42501', 'only a superuser switches calls off');

# Rights that change while a call waits for its next attempt

sub change
{
	my ($name, $change, $state, $undo) = @_;
	my $requests = () = $omni->requests;

	$omni->fault('answer', status => 503, body => '', headers => { 'Retry-After' => 1 });
	my $call = OmniFault::begin($node, $refresh, user => 'alice');
	OmniFault::poll_story($node, 'pending: sending attempt_failed', "$name between two attempts");
	$node->safe_psql('postgres', $change);
	OmniFault::finish($call);
	like($call->{sqlstate}, $state, '... is noticed') or diag($call->{err});
	is(scalar(() = $omni->requests), $requests + 1, '... before the second');
	like(OmniFault::story($node), qr/^failed: /, '... and recorded');
	$node->safe_psql('postgres', $undo);
	return;
}
change('a revoked USAGE', 'REVOKE USAGE ON FOREIGN SERVER omni FROM alice', qr/^(42501|55000)$/,
	'GRANT USAGE ON FOREIGN SERVER omni TO alice');
change('a server that was dropped', 'ALTER SERVER omni RENAME TO gone', qr/^(42704|55000)$/,
	'ALTER SERVER gone RENAME TO omni');

# Who sees what

my $seen = 'SELECT string_agg(DISTINCT requested_by::text, %s ORDER BY requested_by::text) FROM %s';
for my $table ('omni_refresh_job', 'omni_refresh_event')
{
	my $sql = sprintf $seen, "' '", $table;
	my $called = $table eq 'omni_refresh_job' ? 'alice' : '';	# with her wrapper
	my %sees = (alice => 'alice', member => 'member', carol => $called, heir => '', watcher => 'alice member');
	is(OmniFault::call($node, $sql, user => $_)->{out}, $sees{$_}, "what $_ sees of $table")
		for sort keys %sees;
	is(state_of('alice', "DELETE FROM $table"), '42501', "nobody but its owner changes $table");
	is(state_of('watcher', "UPDATE $table SET requested_by = 'watcher'"), '42501', '... no monitor either');
}
$node->safe_psql('postgres', 'DROP OWNED BY member; DROP ROLE member');
is(OmniFault::call($node, sprintf($seen, "' '", 'omni_refresh_job'), user => 'watcher')->{out},
	'alice member', 'the jobs of a dropped role stay for monitors');
is(OmniFault::call($node, 'SELECT count(*) > 0 FROM omni_refresh_job', user => 'alice')->{out}, 't',
	'... and disturb nobody');
is(state_of('alice', 'INSERT INTO omni_refresh_job DEFAULT VALUES'), '42501', 'nobody but Omni makes jobs');

done_testing();
