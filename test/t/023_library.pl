# The library is missing, of another layout, or replaced under a worker; and as many databases as a
# server may have workers.

use strict;
use warnings FATAL => 'all';

use File::Basename qw(dirname);
use File::Copy qw(copy);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;
use OmniNode;

my $omni = OmniAPI->start;
my $refresh = q{SELECT status FROM omni_refresh('} . $omni->model . q{')};

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

# An installation whose library can be replaced by one that has shared memory of its own
my ($installation, $libraries, $share) = OmniLife::installation();
plan skip_all => 'the installation of PostgreSQL cannot be copied' if !defined $installation;

my $source = dirname(__FILE__) . '/../..';
my $build = PostgreSQL::Test::Utils::tempdir;
system("cd '$source' && cp -pR Makefile *.control sql src '$build' && cd '$build'"
	# only these files are compiled anew
	. q{ && sed -i -E 's/"(omni_refresh( rates)? layout) [0-9]+"/"\1 0"/' $(grep -lE '"omni_refresh( rates)? layout [0-9]+"' src/*/*.c)}
	. ' && make with_llvm=no all >make.log 2>&1') == 0
	or plan skip_all => 'another library cannot be built';
my $library = "$libraries/omni_refresh.so";
copy($library, "$build/old.so") or die;

# Puts a library in the place of the other one, which processes may go on using.
sub replace
{
	my ($file) = @_;

	copy($file, "$library.new") or die;
	rename("$library.new", $library) or die;
	return;
}

my $node = OmniNode->new('library', install_path => $installation);
$node->init(extra => [ '--encoding=UTF8', '--no-locale' ]);
$node->append_conf('postgresql.conf', <<END);
restart_after_crash = on
max_worker_processes = 80
max_connections = 100
log_min_messages = debug1
lc_messages = 'C'
omni_refresh.track = off
omni_refresh.idle_timeout = '10 min'
END
$node->start;
$node->safe_psql('postgres', 'CREATE EXTENSION omni_refresh');
OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
my $workers = q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'};

# No library

my $old = OmniLife::session($node, 'postgres');
like(($old->query("SET omni_refresh.server = nobody; $refresh"))[1], qr/ERROR:  42704: /, 'a session loads the library');
$old->query('RESET omni_refresh.server');
rename($library, "$library.away") or die;
my $forks = OmniLife::forks($node);
for (1 .. 3)
{
	my $err;
	my $seconds = OmniLife::timed(sub { $err = ($old->query($refresh))[1] });
	like($err, qr/^ERROR:  53400: could not start the background worker of omni_refresh\nHINT:  .*log says why.*replaced/m,
		'a library that is missing keeps the worker from starting');
	cmp_ok($seconds, '<', 2, '... which its caller learns at once');
}
like(slurp_file($node->logfile), qr/could not (access|load).*omni_refresh/, '... and the log says why');
is(OmniLife::forks($node), $forks + 3, '... which was tried once for each call');

# Another one, which the session does not have

replace("$build/omni_refresh.so");
$forks = OmniLife::forks($node);
for (1 .. 3)
{
	my $err = ($old->query($refresh))[1];
	like($err, qr/^ERROR:  53400: could not start.*\nHINT:  .*log says why.*replaced.*new session/m,
		'a session whose library was replaced cannot start a worker, and says why');
}
is(OmniLife::forks($node), $forks + 3, '... tried once for each call');
is(scalar(() = slurp_file($node->logfile) =~ /FATAL:  the library of omni_refresh is not the one/g), 3, '... and the log says why');
is(scalar(() = $omni->requests), 0, '... and nothing was sent');
is($node->safe_psql('postgres', $refresh), 'accepted', '... but a new session can');

# Two layouts at once: a worker of the new one, an old session

like(($old->query($refresh))[1], qr/^ERROR:  53400: could not start/, '... whose worker the old session does not use');
is($node->safe_psql('postgres', $workers), '1', '... and there is one worker');

# ... and back: an old worker, new sessions
replace("$build/old.so");
$node->safe_psql('postgres', q{SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
	WHERE backend_type = 'omni_refresh worker'});
is(($old->query($refresh))[0], 'accepted', 'with the old library, the old session can start a worker');
replace("$build/omni_refresh.so");
my $worker = OmniFault::worker($node);
is(($old->query($refresh))[0], 'accepted', 'a worker whose library is replaced goes on');
is(OmniFault::worker($node), $worker, '... as it was');
my $out;
my $seconds = OmniLife::timed(sub { $out = $node->safe_psql('postgres', $refresh) });
is($out, 'accepted', '... until the call of a new session');
cmp_ok($seconds, '<', 4, '... which does not wait long for it to leave');
isnt(OmniFault::worker($node), $worker, '... then there is another one');
is($node->safe_psql('postgres', $workers), '1', '... and only that');

# ... while the old one has something to do
replace("$build/old.so");
$node->safe_psql('postgres', q{SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
	WHERE backend_type = 'omni_refresh worker'});
$omni->reset;
$omni->fault('delay', delay => 2);
$old->send($refresh);
$omni->wait_for_requests(1);
replace("$build/omni_refresh.so");
$worker = OmniFault::worker($node);
my $new = OmniLife::session($node, 'postgres');
$new->send($refresh);
is(($old->answer)[0], 'accepted', 'a worker of the old library ends what it has begun');
is(($new->answer)[0], 'accepted', '... before one of the new one begins');
isnt(OmniFault::worker($node), $worker, '... which takes its place');
is($node->safe_psql('postgres', q{SELECT string_agg(e.event, ' ' ORDER BY e.id) FROM omni_refresh_event e
		WHERE job > (SELECT max(id) - 2 FROM omni_refresh_job)}),
	'sending accepted sending accepted', '... one after the other');

# ... and sessions of the new one wait for it, longer than for any other lock, but not beyond their call_timeout
replace("$build/old.so");
$node->safe_psql('postgres', q{SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
	WHERE backend_type = 'omni_refresh worker'});
$node->safe_psql('postgres', q{
	CREATE FUNCTION trouble() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		IF NEW.schemas = '{trouble}' THEN RAISE 'trouble'; END IF;
		RETURN NEW;
	END$$;
	CREATE TRIGGER trouble BEFORE INSERT ON omni_refresh_job FOR EACH ROW EXECUTE FUNCTION trouble()});
$omni->reset;
$omni->fault('hang');
my $troubled = OmniLife::session($node, 'postgres');
$troubled->query("SET omni_refresh.server = nobody; $refresh");
$troubled->query('RESET omni_refresh.server');
$old->send($refresh);
$omni->wait_for_requests(1);
replace("$build/omni_refresh.so");
my $hasty = OmniLife::session($node, 'postgres');
$hasty->query("SET omni_refresh.call_timeout = '1 s'");
$new->quit;
$new = OmniLife::session($node, 'postgres');
$_->send($refresh) for $new, $hasty;
ok($node->poll_query_until('postgres', q{SELECT count(*) > 0 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted}),
	'a worker of the new library waits for the old one');
like(($troubled->query($refresh =~ s/'\)/', schemas => '{trouble}')/r))[1], qr/ERROR:  P0001: trouble/, '... in which a trigger raises an error');
my ($answer, $why) = $hasty->answer;
like($why, qr/^ERROR:  08006: the background worker of omni_refresh has not answered in time\nDETAIL:  .*another version of the library/m,
	'... and a session of the new library learns what it has waited for');
unlike($why, qr/lock timeout/, '... and not of a lock');
$omni->fault('none');
is(($old->answer)[0], 'accepted', '... which does not disturb the others');
is(($new->answer)[0], 'accepted', '... and one of the new library waits its turn');
$node->safe_psql('postgres', 'DROP FUNCTION trouble() CASCADE');
$_->quit for $hasty, $troubled;

# ... while a job waits
replace("$build/old.so");
$node->safe_psql('postgres', q{SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
	WHERE backend_type = 'omni_refresh worker'});
$omni->reset;
is(($old->query($refresh))[0], 'accepted', 'a worker of the old library');
$omni->fault('answer', status => 503, headers => { 'Retry-After' => 3 });
my ($id) = $old->query(q{SELECT id FROM omni_refresh_on_commit('} . $omni->model . q{')});
$node->poll_query_until('postgres', "SELECT attempts = 1 AND status = 'pending' FROM omni_refresh_job WHERE id = $id");
replace("$build/omni_refresh.so");
$node->safe_psql('postgres', q{SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
	WHERE backend_type = 'omni_refresh worker'});
ok($node->poll_query_until('postgres', "SELECT status = 'accepted' FROM omni_refresh_job WHERE id = $id"),
	'... ends with a job left, which its successor of the new library sends');
$_->quit for $old, $new;

# Seventy databases at once. The server's last ten places are for others.

is($node->safe_psql('postgres', q{SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
	WHERE backend_type = 'omni_refresh worker'}), 't', 'all begins anew');
$node->safe_psql('postgres', join ";\n", map { "CREATE DATABASE many$_ TEMPLATE postgres" } 1 .. 70);
$omni->reset;
$omni->fault('hang', times => 70);
my @sessions = map { OmniLife::session($node, "many$_") } 1 .. 70;
$_->send($refresh) for @sessions;
$omni->wait_for_requests(70);
is($node->safe_psql('postgres', "$workers; SELECT count(DISTINCT datname) FROM pg_stat_activity
		WHERE backend_type = 'omni_refresh worker'"), "70\n70", 'seventy databases have a worker each');
$omni->fault('none');
is(join(' ', map { ($_->answer)[0] } @sessions), join(' ', ('accepted') x 70), '... which try again when cut off');
$_->send($refresh) for @sessions;
is(join(' ', map { ($_->answer)[0] } @sessions), join(' ', ('accepted') x 70), '... and so they all go on');
is($node->safe_psql('postgres', $workers), '70', '... with as many workers');
$_->quit for @sessions;
$seconds = OmniLife::timed(sub { $node->stop('fast') });
cmp_ok($seconds, '<', 5, 'a server with seventy workers is stopped quickly');
OmniLife::clean($node, 'the log is clean', qr/could not (start|access|load)/, qr/library of omni_refresh is not the one/,
	qr/has not answered in time/);
done_testing();
