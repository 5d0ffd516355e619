# omni_refresh_check(), the doctor: whatever is wrong, it says at which step and what to do, raises
# nothing, writes nothing and shows no key.

use strict;
use warnings FATAL => 'all';

use JSON::PP;
use OmniAPI;
use OmniFault;
use OmniLife;
use OmniTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $test = OmniTest->new('check', 'wal_level = replica', "omni_refresh.idle_timeout = '10 min'");
my ($node, $omni) = ($test->node, $test->omni);
my ($key, $key_file, $ca) = ($omni->key, $test->{key_file}, $omni->ca);
my $user = $test->sql('SELECT current_user');
my $check = 'SELECT json_agg(c) FROM omni_refresh_check() AS c';
my @way = ('server', 'usage', 'user mapping', 'background worker', 'api key', 'name', 'connection', 'tls', 'answer', 'authorization', 'rate limit', 'model');
my @settings = map { "omni_refresh.$_" } qw(call_timeout enabled idle_timeout max_in_flight min_interval on_failure retention retry_for server track track_timeout);
my @rest = ('jobs', 'watches', 'preload', @settings);

# Runs the check, after some statements; returns its lines, as hash references.
sub check
{
	my ($before, $role) = @_;
	my ($stdout, $stderr) = $test->outcome(($before // '') . "; $check", undef, $role);

	unlike($stderr, qr/ERROR|FATAL/, 'the check raises nothing') or return;
	fail("the key is shown: $stdout") if index("$stdout$stderr", $key) >= 0;
	return @{ decode_json(($stdout =~ /^(\[\{.*)/ms)[0]) };
}

sub line
{
	my ($name, @lines) = @_;
	my ($line) = grep { $_->{check_name} eq $name } @lines;

	return $line ? ($line->{ok} ? 'ok: ' : 'not ok: ') . $line->{detail} . (defined $line->{hint} ? "  $line->{hint}" : '') : 'none';
}

sub names { return join ', ', map { $_->{check_name} } @_ }
sub wrong { return join ', ', map { $_->{check_name} } grep { !$_->{ok} } @_ }

# The first step that fails is the one expected, and says what is expected; what comes before it is
# all right, and what has nothing to do with it is there.
sub fails_at
{
	my ($what, $step, $detail, $before, $role) = @_;
	my @lines = check($before, $role);
	my @more = $step eq 'authorization' || $step =~ /^(name|connection|tls|answer)$/ ? ('rate limit') : ();
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	my ($at) = grep { $way[$_] eq $step } 0 .. $#way;
	is(wrong(grep { $_->{check_name} ne 'rate limit' || $step eq 'rate limit' } @lines), $step, "it fails at the right step: $what");
	is(names(@lines), join(', ', @way[0 .. $at], @more, @rest), '... after what precedes it') if defined $at && $step ne 'rate limit';
	like(line($step, @lines), $detail, '... and says why, and what to do');
	return @lines;
}

# Another server, with other options, and a mapping with the same key
my $count = 0;

sub server
{
	my (%options) = @_;
	my $name = 'other' . ++$count;
	my $options = join ', ', map { "$_ '$options{$_}'" } sort keys %options;

	$test->sql("CREATE SERVER $name FOREIGN DATA WRAPPER omni_refresh OPTIONS ($options);
		CREATE USER MAPPING FOR CURRENT_USER SERVER $name OPTIONS (api_key_file '$key_file')");
	return "SET omni_refresh.server = $name";
}

# All is well

my @lines = check();
is(wrong(@lines), '', 'all is well');
is(names(@lines), join(', ', @way, @rest), '... at each step, in the order of a request');
is(line('server', @lines), 'ok: "omni"', '... the server is named');
like(line('usage', @lines), qr/^ok: .*"\Q$user\E"/, '... and the role');
like(line('name', @lines), qr/^ok: 127\.0\.0\.1/, '... and the address');
like(line('tls', @lines), qr/^ok: issued by .*omni_api CA, valid for (29|30) days$/, '... and who has issued the certificate, and for how long');
like(line('answer', @lines), qr/^ok: HTTP status 200 after \d+ ms$/, '... and how long it took');
is(line('rate limit', @lines), 'ok: none', '... and that there is no rate limit');
is(line('jobs', @lines), 'ok: 0 pending, 0 sending, 0 running', '... and that there are no jobs');
like(line('preload', @lines), qr/^ok: no: .*omni_refresh_wake\(\)/, '... and that nothing is preloaded, which is all right');
like(line('model', @lines), qr/^ok: none: each request names its own  .*"model"/, '... and that the server names no model');
is(line('omni_refresh.call_timeout', @lines), 'ok: 1min', '... and each setting, with its unit');
like(line('omni_refresh.idle_timeout', @lines), qr/^ok: 10min; source: configuration file "[^"]+postgresql\.conf", line \d+$/, '... and its source, unless that is the default');
is(join(' ', sort map { $_->{check_name} } grep { defined $_->{hint} } @lines), 'model preload', '... with few hints');
is(scalar(grep { defined $_->{hint} && $_->{hint} !~ /^[A-Z].*\.$/ } @lines), 0, '... which are sentences');
is(line('omni_refresh.retry_for', check('SET omni_refresh.call_timeout = 0.5')), 'ok: 1d', 'a setting of the worker');
is(line('omni_refresh.call_timeout', check(q{SET omni_refresh.call_timeout = '1500 ms'})), 'ok: 1500ms; source: session', '... and one of the session');
$omni->reset;
@lines = check();
my @requests = $omni->requests;
is(scalar(@requests), 1, '... by one request');
is("$requests[0]{method} $requests[0]{path}", 'GET /api/v1/models', '... that changes nothing');
is($test->sql('SELECT (SELECT count(*) FROM omni_refresh_job) + (SELECT count(*) FROM omni_refresh_event)'), '0', '... and is no job');
@lines = check(server(base_url => $omni->http));
is(wrong(@lines), '', 'plain http');
like(line('tls', @lines), qr/^ok: none/, '... has no TLS');
for my $before ('BEGIN READ ONLY', 'BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM omni_refresh_job', 'BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE',
	'BEGIN; CREATE TABLE t ()', 'SET search_path = pg_temp', 'SET omni_refresh.on_failure = warning', 'SET row_security = off')
{
	$omni->reset;
	is(wrong(check($before =~ /search_path/ ? "$before, public" : $before)), '', "it works after $before");
}

# The server, the role, the mapping

$test->sql(qq{
	CREATE FOREIGN DATA WRAPPER strange;
	CREATE SERVER strange FOREIGN DATA WRAPPER strange;
	CREATE ROLE outsider LOGIN;
	CREATE ROLE unmapped LOGIN;
	CREATE ROLE keyless LOGIN;
	CREATE ROLE plain LOGIN;
	GRANT USAGE ON FOREIGN SERVER omni TO unmapped, keyless, plain;
	CREATE USER MAPPING FOR keyless SERVER omni;
	CREATE USER MAPPING FOR plain SERVER omni OPTIONS (api_key_file '$key_file');
	CREATE FUNCTION check_as_owner() RETURNS json LANGUAGE sql SECURITY DEFINER AS \$\$ $check \$\$;});
$omni->reset;
fails_at('no such server', 'server', qr/^not ok: server "nowhere" does not exist.*CREATE SERVER nowhere .*omni_refresh\.server/, 'SET omni_refresh.server = nowhere');
fails_at('a server of another wrapper', 'server', qr/^not ok: server "strange" does not belong to .*"omni_refresh".*omni_refresh\.server/, 'SET omni_refresh.server = strange');
fails_at('no USAGE', 'usage', qr/^not ok: permission denied .*GRANT USAGE ON FOREIGN SERVER omni TO outsider/, '', 'outsider');
fails_at('no mapping', 'user mapping', qr/^not ok: .*"unmapped".*CREATE USER MAPPING FOR unmapped SERVER omni/, '', 'unmapped');
fails_at('a mapping without a key', 'user mapping', qr/^not ok: .* has no API key.*ADD api_key_file '\.\.\.'.*ADD api_key '\.\.\.'/, '', 'keyless');
my $mapping = "CREATE USER MAPPING FOR CURRENT_USER SERVER fresh OPTIONS (api_key 'x')";
my $fresh = 'CREATE SERVER fresh FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url \'https://127.0.0.1:1\')';
fails_at('a server of this transaction', 'server', qr/^not ok: .*Commit first/, "BEGIN; $fresh; $mapping; SET omni_refresh.server = fresh");
$test->sql($fresh);
fails_at('a mapping of this transaction', 'user mapping', qr/^not ok: .*Commit first/, "BEGIN; $mapping; SET omni_refresh.server = fresh");
is(scalar($omni->requests), 0, '... of all which nothing is sent');
is(wrong(check('', 'plain')), '', 'an unprivileged user');
is(line('omni_refresh.idle_timeout', check('', 'plain')), 'ok: 10min; source: configuration file', '... who does not learn where the file is');
like(line('authorization', @{ decode_json($test->sql('SELECT check_as_owner()', undef, 'outsider')) }), qr/^ok/, '... or one in the name of another');

# The key

rename $key_file, "$key_file.away";
fails_at('no key file', 'api key', qr/^not ok: could not read API key file "\Q$key_file\E": No such file or directory.*operating system user may read/);
mkdir $key_file;
fails_at('a folder', 'api key', qr/^not ok: could not read API key file .*regular/);
rmdir $key_file;
append_to_file($key_file, "not a key\n");
fails_at('a file of something else', 'api key', qr/^not ok: API key file "\Q$key_file\E" does not hold an API key/);
unlink $key_file;
append_to_file($key_file, " Bearer $key\n");
fails_at('a file with the header of the key', 'api key', qr/^not ok: API key file "\Q$key_file\E" does not hold an API key.*Give the key alone: "Bearer" is added/);
unlink $key_file;
rename "$key_file.away", $key_file;
SKIP:
{
	skip 'root may read anything', 8 if $> == 0;
	my $os_user = getpwuid($>);
	my $owner = qr/and belongs to user "\Q$os_user\E" and group "[^"]+"; the server runs as user "\Q$os_user\E"\./;
	chmod 0, $key_file;
	fails_at('a file that may not be read', 'api key',
		qr/^not ok: could not read API key file .*Permission denied\.  File "\Q$key_file\E" has mode 0000 $owner .*operating system user may read/);
	chmod 0600, $key_file;
	my $folder = $node->basedir . '/keys';
	mkdir $folder;
	append_to_file("$folder/key", $key);
	chmod 0600, $folder;
	$test->sql("ALTER USER MAPPING FOR CURRENT_USER SERVER omni OPTIONS (SET api_key_file '$folder/key')");
	fails_at('a folder that may not be searched', 'api key', qr/^not ok: .*Permission denied\.  Directory "\Q$folder\E" has mode 0600 $owner/);
	chmod 0700, $folder;
	$test->sql("ALTER USER MAPPING FOR CURRENT_USER SERVER omni OPTIONS (SET api_key_file '$key_file')");
}
is(wrong(check()), '', 'and then it can be read');

# The way

my @tls = (ca_file => $ca);
fails_at('a name that nobody knows', 'name', qr/^not ok: (could not reach|timed out on) server "other\d+" .*looking up the host's name.*Check the host/,
	server(base_url => 'https://omni.invalid', connect_timeout => '5 s'));
fails_at('a refused connection', 'connection', qr/^not ok: could not reach .*connecting.*firewalls/, server(base_url => $omni->url('refused')));
fails_at('a connection that hangs', 'connection', qr/^not ok: timed out .*connecting.*firewalls/, server(base_url => $omni->url('connect_hangs'), connect_timeout => '200 ms'));
fails_at('TLS that hangs', 'tls', qr/^not ok: timed out .*setting up TLS/, server(base_url => $omni->url('tls_hangs'), connect_timeout => '200 ms', @tls));
fails_at('an unknown authority', 'tls', qr/^not ok: could not reach .*setting up TLS.*certificate.*"ca_file"/, server(base_url => $omni->https));
fails_at('no file of authorities', 'tls', qr/^not ok: could not load the certificate authorities .*"\Q$ca\E\.missing".*No such file.*"ca_file"/,
	server(base_url => $omni->https, ca_file => "$ca.missing"));
fails_at('another authority', 'tls', qr/^not ok: .*certificate.*"ca_file"/, server(base_url => $omni->url('https_unknown_ca'), @tls));
fails_at('a certificate that has expired', 'tls', qr/^not ok: .*certificate has expired/, server(base_url => $omni->url('https_expired'), @tls));
fails_at('a certificate for another host', 'tls', qr/^not ok: .*(certificate|host).*"base_url"/, server(base_url => $omni->url('https_wrong_host'), @tls));
my $hasty = server(base_url => $omni->https, timeout => '300 ms', @tls);
for my $case ([ 'hang', qr/^not ok: timed out .*waiting for the answer/ ], [ 'hang_middle', qr/^not ok: timed out .*reading the answer/ ], [ 'close', qr/^not ok: could not reach/ ],
	[ 'reset', qr/^not ok: could not reach/ ])
{
	my ($fault, $detail) = @$case;
	$omni->reset;
	$omni->fault($fault, path => '/models$');
	my @lines = fails_at("an answer that does not come: $fault", 'answer', $detail, $hasty);
	# a newer libcurl forgets the certificate of a connection that it closes
	like(line('tls', @lines), qr/^ok: (issued by .*omni_api CA|set up)/, '... after TLS');
	is(scalar($omni->requests), 1, '... which is tried once');
}

# Omni's answer

for my $case (
	[ 401, qr/Check the API key in the user mapping/ ], [ 403, qr/\S/ ], [ 404, qr/base_url/ ], [ 500, qr/try again later/ ], [ 503, qr/try again later/ ], [ 418, qr/proxy/ ])
{
	my ($status, $hint) = @$case;
	$omni->reset;
	$omni->fault('answer', status => $status, body => '{"detail": "these are Omni\'s words", "status": 0}', path => '/models$');
	my @lines = fails_at("HTTP status $status", 'authorization', qr/^not ok: .*HTTP status $status.*these are Omni's words.*$hint/, $hasty);
	like(line('answer', @lines), qr/^ok: HTTP status $status /, '... after the answer');
	is(scalar($omni->requests), 1, '... to one question');
	$node->restart if $status == 503;	# nothing goes to Omni for a while
}
$omni->reset;
$omni->set(key => 'omni_osk_another');
fails_at('a revoked key', 'authorization', qr/^not ok: .*HTTP status 401.*Missing, invalid or revoked API key/);
$omni->reset;
$omni->set(forbidden => 1);
fails_at('a key that may do nothing', 'authorization', qr/^not ok: .*HTTP status 403.*lacks the permission/);
$omni->reset;
$omni->fault('echo_key', path => '/models$');
fails_at('a key that is quoted', 'authorization', qr/^not ok: .*HTTP status 401.*\[API key\]/);
for my $case ([ 'redirect' ], [ 'empty' ], [ 'wrong_shape' ], [ 'nested' ], [ 'not_utf8' ], [ 'answer', status => 200, body => '<html>Log in</html>' ],
	[ 'answer', status => 200, body => '{"records": null}' ], [ 'answer', status => 204 ])
{
	my ($fault, %extras) = @$case;
	$omni->reset;
	$omni->fault($fault, %extras, path => '/models$');
	fails_at("no answer of Omni's: " . join(' ', $fault, values %extras), 'authorization', qr/^not ok: unexpected response from server "omni".*base_url/);
}
$omni->reset;
$omni->fault('huge', size => 2 << 20, path => '/models$');
unlike(wrong(check()), qr/^$/, 'an answer without end');

# The rate limit

my $limited = server(base_url => $omni->http, rate_limit => 4);
$node->restart;					# the limiter begins anew
$omni->reset;
like(line('rate limit', check($limited)), qr/^ok: 3 of 4 requests a minute are left$/, 'what is left of the rate limit');
like(line('rate limit', check($limited)), qr/^ok: 2 of 4 requests a minute are left$/, '... is less each time');
check($limited);
like(line('rate limit', check($limited)), qr/^not ok: 0 of 4 requests a minute are left  Wait/, '... until there is nothing');
@lines = fails_at('no room', 'rate limit', qr/^not ok: the rate limit of server "other\d+" leaves no room .*"rate_limit"/, "$limited; SET omni_refresh.call_timeout = '300 ms'");
is(scalar($omni->requests), 4, '... for more than there is');
$node->restart;
$omni->reset;
$omni->fault('answer', status => 429, headers => { 'Retry-After' => 1000 }, path => '/models$');
fails_at('HTTP status 429', 'authorization', qr/^not ok: .*HTTP status 429.*60 a minute/);
my ($error) = $test->failure();
like($error, qr/^ERROR:  53000: /, '... which holds for others with this key, too');
is(scalar($omni->requests), 1, '... so that nothing is sent');
$node->restart;

# Jobs

sub job
{
	my ($status, $age, $database) = @_;

	$database //= '(SELECT oid FROM pg_database WHERE datname = current_database())';
	return qq{INSERT INTO omni_refresh_job (status, model_id, kind, server, origin, requested_by, requested_by_oid, requested_at, run_at, database)
		VALUES ('$status', gen_random_uuid(), 'schema', 'omni', 'on_commit', current_user, current_user::regrole,
			now() - interval '$age', now() - interval '$age', $database); };
}
$omni->reset;
check();						# starts the worker
is(line('jobs', check('BEGIN; ' . join '', job('pending', '0'), (job('sending', '1 h')) x 2, (job('running', '1 h')) x 3, (job('completed', '1 h')) x 4)),
	'ok: 1 pending, 2 sending, 3 running', 'jobs are counted');
like(line('jobs', check('BEGIN; ' . job('pending', '10 min') x 2 . job('pending', '1 s'))),
	qr/^not ok: 3 pending, 0 sending, 0 running; 2 should have been sent .*log.*omni_refresh_wake\(\)/, 'stuck ones are told of');
is(line('jobs', check('BEGIN; ' . job('pending', '-10 min'))), 'ok: 1 pending, 0 sending, 0 running', 'one that waits for its time is not stuck');
like(line('jobs', check('BEGIN; ' . job('pending', '1 s', 1) . job('sending', '1 s', 1) . job('canceled', '1 s', 1) . job('running', '1 s'))),
	qr/^not ok: 0 pending, 0 sending, 1 running; 2 are another database's/, 'those of another database are told of');
is($test->sql('SELECT count(*) FROM omni_refresh_job'), '1', 'and there is but the job of the call');

# Held by others

my $locker = OmniLife::session($node, 'postgres');
$locker->query('BEGIN; LOCK TABLE omni_refresh_job, omni_refresh_event IN ACCESS EXCLUSIVE MODE');
@lines = check(q{SET statement_timeout = '20 s'});
is(names(@lines), join(', ', @way, @rest), 'tables that are locked');
like(line('jobs', @lines), qr/^not ok: .*lock/, '... keep nobody waiting for long');
$locker->query('ROLLBACK');
$locker->quit;

# While it waits

for my $case ([ 'SELECT pg_cancel_backend(%d)', '57014' ], [ 'SELECT pg_terminate_backend(%d)', '57P01' ])
{
	my ($sql, $sqlstate) = @$case;
	$omni->reset;
	$omni->fault('hang', path => '/models$');
	my $call = OmniFault::begin($node, 'SELECT * FROM omni_refresh_check();', app => 'checking');
	$omni->wait_for_requests(1);
	my $pid = $test->sql(q{SELECT pid FROM pg_stat_activity WHERE application_name = 'checking'});
	my $seconds = OmniLife::timed(sub { $test->sql(sprintf $sql, $pid); OmniFault::finish($call) });
	is($call->{sqlstate}, $sqlstate, "it can be ended: $sqlstate");
	cmp_ok($seconds, '<', 2, '... at once');
}
$omni->reset;
$omni->fault('hang', path => '/models$');
is(OmniFault::call($node, q{SET statement_timeout = '300 ms'; SELECT * FROM omni_refresh_check();})->{sqlstate}, '57014', '... or by statement_timeout');
$omni->reset;
$omni->fault('hang', path => '/models$');
my $call = OmniFault::begin($node, 'SELECT count(*) FROM omni_refresh_check() WHERE ok;');
$omni->wait_for_requests(1);
$test->sql('SELECT pg_terminate_backend(' . OmniFault::worker($node) . ', 10000)');
OmniFault::finish($call);
is($call->{out}, @way + @rest, 'if the worker ends meanwhile, the next one does it');

# Jobs without a worker

$node->restart;
is(line('jobs', check('SET omni_refresh.server = nowhere')), 'ok: 0 pending, 0 sending, 0 running', 'no worker is needed without jobs');
for my $status ('pending', 'sending', 'running')
{
	like(line('jobs', check('BEGIN; ' . job($status, '1 s') . 'SET omni_refresh.server = nowhere')),
		qr/^not ok: .*\b1 $status.*; there is no background worker  Call omni_refresh_wake\(\)/, "a $status job without a worker");
}
is(OmniFault::worker($node), '', '... of which the check starts none');
like(line('jobs', check('BEGIN; ' . job('pending', '1 s'))),
	qr/^not ok: .*\b1 pending.*; there was no background worker before this check  The check has started one/, '... unless it gets that far, which it tells');
is(line('jobs', check('BEGIN; ' . job('pending', '1 s'))), 'ok: 1 pending, 0 sending, 0 running', '... once');

# Settings

@lines = check('SET omni_refresh.enabled = off');
is(wrong(@lines), 'omni_refresh.enabled', 'omni_refresh.enabled = off');
is(line('omni_refresh.enabled', @lines), 'not ok: off; source: session  Requests are canceled: set it to "on".', '... and what to do about it');
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'omni_refresh'\n");
$node->restart;
@lines = check();
is(wrong(@lines), '', 'the library is preloaded');
like(line('preload', @lines), qr/^ok: yes/, '... and it says so');

# No worker, no primary

$node->append_conf('postgresql.conf', "max_worker_processes = 1\nshared_preload_libraries = ''\n");
$node->restart;
fails_at('no background worker', 'background worker', qr/^not ok: no background worker is available.*max_worker_processes/);
$node->stop;
$node->set_standby_mode;
$node->start;
@lines = check();
is(names(@lines), join(', ', 'primary', @rest), 'a standby');
like(line('primary', @lines), qr/^not ok: cannot send requests to Omni during recovery.*primary/, '... is told of');

$test->done;
