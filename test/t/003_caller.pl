# Who makes a call (role, key, database, schema, encoding), and who may switch calls off.

use strict;
use warnings FATAL => 'all';

use OmniTest;
use POSIX qw(mkfifo);
use PostgreSQL::Test::Utils;
use Test::More;

# All that PostgreSQL can log
my $test = OmniTest->new('access', 'log_min_messages = debug5', 'debug_print_parse = on',
	'debug_print_plan = on', 'log_error_verbosity = verbose', 'log_min_duration_statement = 0');
my ($node, $omni) = ($test->node, $test->omni);
my ($model, $key, $key_file) = ($omni->model, $omni->key, $test->{key_file});
my $user = $test->sql('SELECT current_user');

# Keys of several users: those in files hold the key of that name, which Omni knows when told.
sub key_of
{
	my ($name) = @_;
	my $file = $node->basedir . "/$name.key";
	append_to_file($file, "omni_osk_$name");
	return $file;
}
my %files = map { $_ => key_of($_) } qw(alice everyone);
$test->sql(qq{
	CREATE ROLE alice LOGIN;
	CREATE ROLE bob LOGIN;
	CREATE ROLE "Carol ""C"" D" LOGIN;
	CREATE ROLE outsider LOGIN;
	GRANT USAGE ON FOREIGN SERVER omni TO alice, bob, "Carol ""C"" D";
	CREATE USER MAPPING FOR alice SERVER omni OPTIONS (api_key_file '$files{alice}');
	CREATE USER MAPPING FOR PUBLIC SERVER omni OPTIONS (api_key_file '$files{everyone}');});

# The key that a call was made with, by what Omni was told
sub key_used
{
	my ($request) = $omni->requests;
	return $request->{headers}{authorization} =~ s/^Bearer omni_osk_//r;
}

# Roles
foreach my $case (
	[ 'a role with a mapping of its own', 'alice', '', 'alice', 'alice' ],
	[ 'a role without one', 'bob', '', 'everyone', 'bob' ],
	[ 'a role with an odd name', 'Carol "C" D', '', 'everyone', 'Carol "C" D' ],
	[ 'another role after SET ROLE', $user, 'SET ROLE alice;', 'alice', 'alice' ],
	[ 'another role after SET SESSION AUTHORIZATION', $user, 'SET SESSION AUTHORIZATION bob;', 'everyone', 'bob' ])
{
	my ($what, $login, $before, $used, $requested_by) = @$case;
	$omni->reset;
	$omni->set(key => "omni_osk_$used");
	is($test->sql("$before SELECT status, requested_by, requested_by_oid = quote_ident(requested_by)::regrole
			FROM omni_refresh('$model')", undef, $login),
		"accepted|$requested_by|t", "$what calls");
	is(key_used(), $used, "$what calls with the right key");
}

$test->sql(qq{
	CREATE FUNCTION refresh() RETURNS omni_refresh_job
		LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp
		AS \$\$SELECT omni_refresh('$model')\$\$;
	ALTER FUNCTION refresh() OWNER TO alice;});
$omni->reset;
$omni->set(key => 'omni_osk_alice');
is($test->sql('SELECT status, requested_by FROM refresh()', undef, 'outsider'), 'accepted|alice',
	'a SECURITY DEFINER function calls on behalf of its owner');
is(key_used(), 'alice', 'a SECURITY DEFINER function calls with the key of its owner');
is($test->sql('SELECT requested_by, called_by FROM omni_refresh_job', undef, 'outsider'), 'alice|outsider',
	'who calls such a function sees its job');
is($test->sql('SELECT count(*) FROM omni_refresh_event', undef, 'outsider'), '0', '... but not its events');
is($test->sql('SELECT DISTINCT requested_by FROM omni_refresh_job', undef, 'alice'), 'alice',
	'a role sees its own jobs only');
like(($test->failure('', undef, 'outsider'))[0],
	qr/^ERROR:  42501: permission denied for foreign server omni$/m, 'a role without USAGE does not call');

# What is not committed
$omni->reset;
$test->sql('GRANT USAGE ON FOREIGN SERVER omni TO PUBLIC');
my ($stdout, $stderr) = $test->outcome(qq{
	BEGIN; CREATE ROLE dave IN ROLE alice; SET LOCAL ROLE dave; SELECT * FROM omni_refresh('$model'); ROLLBACK;
	BEGIN; REVOKE USAGE ON FOREIGN SERVER omni FROM PUBLIC; SET LOCAL ROLE alice;
	SELECT * FROM omni_refresh('$model'); ROLLBACK;});
like($stderr, qr/^ERROR:  42704: role "dave" does not exist\nHINT:  .*commit first/m,
	'a role that is not committed cannot call');
like($stderr, qr/^ERROR:  55000: server "omni" was changed by this transaction$/m,
	'a privilege that is not committed is of no use');
is(scalar($omni->requests), 0, 'nothing is sent for it');
$test->sql('REVOKE USAGE ON FOREIGN SERVER omni FROM PUBLIC');

# Keys in files
$omni->reset;
$omni->set(key => 'omni_osk_rotated');
like(($test->failure)[0], qr/^ERROR:  28000: /m, 'a revoked key does not work');
$test->write_key('omni_osk_rotated');
is($test->call->{status}, 'accepted', 'a key is rotated by writing a file');
foreach my $case (
	[ 'a line break', "omni_osk_rotated\n" ], [ 'white space', " \t\r\nomni_osk_rotated \r\n\n" ],
	[ 'as much white space as fits', "omni_osk_rotated" . "\n" x (4096 - 16) ])
{
	my ($what, $text) = @$case;
	$test->write_key($text);
	is($test->call->{status}, 'accepted', "$what around a key does not matter");
}
$omni->reset;
my $hint = 'HINT:  The file must be a regular one of at most 4096 bytes that the database server\'s '
	. 'operating system user may read.';
my $form = 'DETAIL:  An API key consists of printable ASCII characters without spaces.';
foreach my $case (
	[ 'is missing', sub { }, "could not read API key file \"$key_file\": No such file or directory\n$hint" ],
	[ 'is a FIFO', sub { mkfifo($key_file, 0600) or die }, "could not read API key file \"$key_file\": Invalid argument\n$hint" ],
	[ 'is a directory', sub { mkdir $key_file or die }, "could not read API key file \"$key_file\": Invalid argument\n$hint" ],
	[ 'leads to a device', sub { symlink('/dev/zero', $key_file) or die },
	  "could not read API key file \"$key_file\": Invalid argument\n$hint" ],
	[ 'is too large', sub { $test->write_key('x' x 4097) },
	  "could not read API key file \"$key_file\": File too large\n$hint" ],
	map { my ($what, $text) = @$_;
		[ $what, sub { $test->write_key($text) }, "API key file \"$key_file\" does not hold an API key\n$form" ] }
		([ 'is empty', '' ], [ 'is blank', " \n" ], [ 'has two lines', "$key\nX-Evil: 1\n" ], [ 'has a space', 'omni osk' ],
		 [ 'has a carriage return inside', "$key\rX-Evil: 1" ], [ 'has a NUL', "$key\0more" ], [ 'ends with a NUL', "$key\0" ],
		 [ 'is not ASCII', "omni_osk_\xc3\xa9" ], [ 'has a byte order mark', "\xef\xbb\xbf$key" ]))
{
	my ($what, $make, $error) = @$case;
	-d $key_file && !-l $key_file ? rmdir $key_file : unlink $key_file;
	$make->();
	my ($stderr, $job) = $test->failure;
	is($stderr, "ERROR:  28000: $error", "a call fails when the key's file $what");
	is($job->{status}, 'failed', "the job has failed when the key's file $what");
	is($test->events($job->{id}), "failed", "nothing is sent when the key's file $what");
}
is(scalar($omni->requests), 0, 'Omni has not heard of any of that');
$test->write_key($key);

# Other servers, for a transaction
$omni->reset;
$test->sql("CREATE SERVER \"Other \"\"one\"\"\" FOREIGN DATA WRAPPER omni_refresh
		OPTIONS (base_url '" . $omni->http . "', rate_limit '0');
	CREATE USER MAPPING FOR CURRENT_USER SERVER \"Other \"\"one\"\"\" OPTIONS (api_key_file '$key_file')");
is($test->sql(qq{
	BEGIN;
	SET LOCAL omni_refresh.server = 'Other "one"';
	SELECT server FROM omni_refresh('$model');
	COMMIT;
	SELECT server FROM omni_refresh('$model')}), qq{Other "one"\nomni}, 'a setting names the server');
is(join(' ', map { $_->{tls} ? 'TLS' : 'plain' } $omni->requests), 'plain TLS', 'and that is where the call goes');

# Schemas: an odd one, and whatever the caller has in the way
$test->sql('CREATE DATABASE "odd ""db"""');
$test->sql('CREATE SCHEMA "We ird %s schema, ä"', 'odd "db"');
$test->set_up('odd "db"', '"We ird %s schema, ä"');
is($test->sql(qq{SELECT status FROM "We ird %s schema, ä".omni_refresh('$model')}, 'odd "db"'), 'accepted',
	'the schema may have an odd name');
is($test->sql(qq{
	CREATE SCHEMA evil;
	CREATE TABLE evil.omni_refresh_job AS SELECT * FROM "We ird %s schema, ä".omni_refresh_job WITH NO DATA;
	CREATE TEMP TABLE omni_refresh_event (job int);
	CREATE FUNCTION evil.no(bigint, bigint) RETURNS bool LANGUAGE sql AS 'SELECT 1/0 = 1';
	CREATE OPERATOR evil.= (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = evil.no);
	CREATE DOMAIN evil.text AS int;
	SET search_path = evil, pg_temp, pg_catalog;
	SET quote_all_identifiers = on;
	SELECT status FROM "We ird %s schema, ä".omni_refresh('$model');
	SELECT pg_catalog.count(*) FROM "We ird %s schema, ä".omni_refresh_job;
	SELECT pg_catalog.count(*) FROM evil.omni_refresh_job}, 'odd "db"'), "accepted\n2\n0",
	'the search_path of the caller does not matter');
is($test->sql(qq{
	SET search_path = ''; SELECT status FROM "We ird %s schema, ä".omni_refresh('$model')}, 'odd "db"'), 'accepted',
	'an empty search_path will do');
isnt($test->sql('SELECT DISTINCT database FROM "We ird %s schema, ä".omni_refresh_job', 'odd "db"'),
	$test->job->{database}, 'each database has its own jobs');
is($test->workers =~ s/^\d+ //mgr, qq{odd "db"\npostgres}, 'each database has its own worker');

# What a database sets for its sessions does not stop the worker.
$test->sql(qq{
	ALTER DATABASE "odd ""db""" SET default_transaction_read_only = on;
	ALTER DATABASE "odd ""db""" SET default_transaction_isolation = serializable;
	ALTER DATABASE "odd ""db""" SET search_path = evil;
	ALTER DATABASE "odd ""db""" SET statement_timeout = '1 h';
	ALTER DATABASE "odd ""db""" SET session_replication_role = replica;
	ALTER DATABASE "odd ""db""" SET row_security = off;
	ALTER DATABASE "odd ""db""" SET omni_refresh.server = omni;
	SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity
	WHERE backend_type = 'omni_refresh worker' AND datname = 'odd "db"'});
is($test->sql(qq{SELECT status FROM "We ird %s schema, ä".omni_refresh('$model')}, 'odd "db"'), 'accepted',
	'what a database sets for its sessions does not matter');

# DROP EXTENSION, and another one, under the same worker
$test->sql('SET default_transaction_read_only = off; DROP EXTENSION omni_refresh CASCADE; CREATE SCHEMA fresh', 'odd "db"');
$test->sql('ALTER DATABASE "odd ""db""" RESET ALL');
$test->set_up('odd "db"', 'fresh');
is($test->sql("SELECT id FROM fresh.omni_refresh('$model')", 'odd "db"'), '1',
	'after DROP EXTENSION there can be another one');
$test->sql('DROP DATABASE "odd ""db"""');
is($test->workers =~ s/^\d+ //mgr, 'postgres', 'a worker does not keep its database from being dropped');

# Another encoding than Omni's
$test->sql(q{CREATE DATABASE latin1 TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'});
$test->set_up('latin1');
$omni->reset;
$test->sql("SET client_encoding = UTF8; SELECT omni_refresh('$model', schemas => '{Gr\xc3\xb6\xc3\x9fe}')", 'latin1');
is(uc(($omni->requests)[0]{query} =~ s/.*schemas=//r), 'GR%C3%B6%C3%9FE', 'Omni gets UTF-8 whatever the database has');
$omni->reset;
$omni->fault('answer', status => 409, body => qq({"detail": "\xe8\xa1\xa8 \\u8868 Gr\xc3\xb6\xc3\x9fe"}));
like(($test->failure('', 'latin1'))[0], qr/^DETAIL:  Omni says: .*\? \S*\? Gr\S+e$/m,
	'a database that lacks a character still has the rest of the error');
is($test->job(undef, 'latin1')->{status}, 'failed', 'and its job has failed');

# "enabled"
$omni->reset;
foreach my $case (
	[ 'a session', 'SET omni_refresh.enabled = off;', $user, '' ],
	[ 'a role', '', 'bob', 'ALTER ROLE bob SET omni_refresh.enabled = off' ],
	[ 'a database', '', $user, 'ALTER DATABASE postgres SET omni_refresh.enabled = off' ])
{
	my ($what, $before, $login, $setting) = @$case;
	$test->sql($setting);
	is_deeply([ $test->outcome(qq{$before
		SELECT status, model_id, hard, schemas, origin, requested_by, sent_at, finished_at IS NOT NULL, attempts, error
		FROM omni_refresh('$model', schemas => '{a}')}, undef, $login) ],
		[ "canceled|$model|f|{a}|call|$login||t|0|",
		  'NOTICE:  00000: the request was canceled because "omni_refresh.enabled" is off' ],
		"requests of $what may be switched off");
}
is(scalar($omni->requests), 0, 'nothing is sent for those');
$test->sql('SET omni_refresh.enabled = on; ALTER DATABASE postgres RESET omni_refresh.enabled');

# Nobody tells keys.
my $log = slurp_file($node->logfile);
ok($log =~ /DEBUG:  00000:/ && $log =~ /api_key_file/, 'the log has all that there is');
my %told = map { $_ => 1 } $log =~ /(omni_osk_(?:alice|everyone|rotated))/g;
is(join(' ', sort keys %told), '', 'the log has no key');
unlike($test->sql('SELECT * FROM pg_stat_activity; TABLE omni_refresh_job; TABLE omni_refresh_event'),
	qr/omni_osk_[a-z0-9]{4}/, 'neither tables nor pg_stat_activity have a key');

$test->done;
