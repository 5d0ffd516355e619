# The worker is in nobody's way: not of those who drop, rename or copy its database or drop its
# extension, nor of those who end it, whatever it is doing.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
my $node = OmniFault::node('ddl', conf => "log_min_messages = debug1\nmax_connections = 50\nautovacuum = off\n");
my $refresh = q{SELECT status FROM omni_refresh('} . $omni->model . q{')};
my $count = 0;
my $workers_of = q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker' AND datname =};

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

$node->safe_psql('postgres', 'CREATE DATABASE pattern');
$node->safe_psql('pattern', 'CREATE EXTENSION omni_refresh');
OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0,
	timeout => '500 s', db => 'pattern');

# Makes a database with a worker in some state. Returns its name, and for some states what holds
# them up: a session that waits, or pgbench.
sub make
{
	my ($state) = @_;
	my $db = 'db' . ++$count;
	my $held;

	$omni->reset;
	$node->safe_psql('postgres', "CREATE DATABASE $db TEMPLATE pattern");
	$node->safe_psql($db, $refresh);
	if ($state eq 'hanging' || $state eq 'abandoned')
	{
		$omni->fault('hang');
		$held = OmniLife::session($node, $db);
		$held->send("SET omni_refresh.call_timeout = '500 s'; $refresh");
		$omni->wait_for_requests(2);
		if ($state eq 'abandoned')
		{
			$node->safe_psql('postgres', "SELECT pg_terminate_backend($held->{pid}, 10000)");
			$held = undef;
		}
	}
	elsif ($state eq 'busy')
	{
		$held = OmniLife::bench($node, $db, "$refresh;", '-c', 4, '-T', 3);
		$omni->wait_for_requests(20);
	}
	return ($db, $held);
}

sub quickly
{
	my ($name, $sql, $db) = @_;
	my ($out, $err) = ('', '');
	my $seconds = OmniLife::timed(sub {
			$node->psql($db // 'postgres', $sql, stdout => \$out, stderr => \$err) });

	# PostgreSQL itself waits for 5 seconds before it gives up.
	is($err, '', $name);
	cmp_ok($seconds, '<', 4, '... in time');
	return $out;
}

# Waits until so many workers have been started, and no more.
sub forked
{
	my ($count, $name) = @_;

	OmniLife::until_true("$name: it is started", sub { OmniLife::forks($node) >= $count });
	$node->safe_psql('postgres', 'CHECKPOINT');
	return is(OmniLife::forks($node), $count, $name);
}

# What cannot be done while somebody is connected

for my $state ('idle', 'abandoned')
{
	# Of an abandoned call, the next worker has something to settle.
	my $left = $state eq 'abandoned';
	my ($db) = make($state);
	my $forks = OmniLife::forks($node);
	quickly("a database is dropped, its worker $state", "DROP DATABASE $db");

	($db) = make($state);
	quickly("a database is renamed, its worker $state", "ALTER DATABASE $db RENAME TO ${db}_new");
	forked($forks + ($left ? 3 : 1), $left ? '... and a worker comes once to settle its call' : '... and no worker tries to come back');
	is($node->safe_psql("${db}_new", $refresh), 'accepted', '... and then calls go on');
	is($node->safe_psql("${db}_new", q{SELECT string_agg(status, ' ' ORDER BY id) FROM omni_refresh_job}),
		$state eq 'idle' ? 'accepted accepted' : 'accepted unknown accepted', '... and the log is right');

	($db) = make($state);
	$forks = OmniLife::forks($node);
	my $requests = () = $omni->requests;
	quickly("a database is copied, its worker $state", "CREATE DATABASE ${db}_copy TEMPLATE $db");
	if ($left)
	{
		# The successor comes once to settle the call, rests first and leaves at once.
		$node->poll_query_until($db, q{SELECT status = 'unknown' FROM omni_refresh_job ORDER BY id DESC LIMIT 1}) or die;
		$node->poll_query_until('postgres', "$workers_of '$db'", '0') or die;
	}
	is($node->safe_psql('postgres', "$workers_of '${db}_copy'"), '0', '... and the copy has no worker');
	$omni->reset;
	is($node->safe_psql("${db}_copy", $refresh), 'accepted', '... but may have one');
	is(scalar(() = $omni->requests), 1, '... which does not send what the other one did');
	is($node->safe_psql($db, $refresh), 'accepted', '... and the other one goes on');
	is(OmniLife::forks($node), $forks + 2 + $left, '... each with one worker');

	($db) = make($state);
	$forks = OmniLife::forks($node);
	quickly("a database is moved, its worker $state", "ALTER DATABASE $db SET TABLESPACE pg_default");
	quickly("... and is dropped by force", "DROP DATABASE $db WITH (FORCE)");
	forked($forks + $left, $left ? '... and one worker tries to come back' : '... and no worker tries to come back');
}

# The worker comes back by itself if there is anything to go on with.

for my $ddl ('ALTER DATABASE %1$s RENAME TO %1$s_new', 'CREATE DATABASE %1$s_new TEMPLATE %1$s')
{
	my ($db) = make('idle');

	$omni->fault('answer', status => 503, headers => { 'Retry-After' => 3 }, times => 1);
	my $job = $node->safe_psql($db, q{SELECT id FROM omni_refresh_on_commit('} . $omni->model . q{')});
	$node->poll_query_until($db, "SELECT status = 'pending' AND attempts = 1 FROM omni_refresh_job WHERE id = $job");
	quickly(sprintf($ddl, 'a database that has a job queued'), sprintf($ddl, $db));
	$db .= '_new' if $ddl =~ /^ALTER/;
	ok($node->poll_query_until('postgres', "$workers_of '$db'", '1'), '... the worker comes back');
	ok($node->poll_query_until($db, "SELECT status = 'accepted' AND attempts = 2 FROM omni_refresh_job WHERE id = $job"),
		'... and the job goes on');
	is($node->safe_psql('postgres', "$workers_of '${db}_new'"), '0', '... only there');
}
for my $state ('hanging', 'busy')
{
	my ($db, $held) = make($state);
	quickly("a database is dropped by force, its worker $state", "DROP DATABASE $db WITH (FORCE)");
	if ($state eq 'busy')
	{
		isnt(OmniLife::benched($held), 0, '... which its callers learn');
	}
	else
	{
		like(($held->answer)[1], qr/57P01: /, '... which its caller learns');
	}
	my $forks = OmniLife::forks($node);
	$node->safe_psql('postgres', 'CHECKPOINT') for 1 .. 5;
	is(OmniLife::forks($node), $forks, '... and no worker tries to come back');
	is($node->safe_psql('postgres', q{SELECT count(*) FROM pg_stat_activity
			WHERE backend_type = 'omni_refresh worker' AND datname IS NULL}), '0', '... or is left over');
}

# What can be done at any time

for my $state ('idle', 'abandoned', 'hanging', 'busy')
{
	# Not relocatable
	my ($db, $held) = make($state);
	my ($out, $err);
	my $worker = OmniFault::worker($node, $db);
	$node->psql($db, 'CREATE SCHEMA other');
	my $seconds = OmniLife::timed(sub {
			$node->psql($db, "\\set VERBOSITY verbose\nALTER EXTENSION omni_refresh SET SCHEMA other", stderr => \$err) });
	like($err, qr/0A000: extension "omni_refresh" does not support SET SCHEMA/, "the extension stays where it is, its worker $state");
	cmp_ok($seconds, '<', 2, '... which is said at once');

	# SIGHUP
	$node->append_conf('postgresql.conf', 'omni_refresh.min_interval = ' . ($count + 10));
	$node->reload;
	is(OmniFault::worker($node, $db), $worker, '... SIGHUP does not end it');
	if ($state eq 'hanging')
	{
		$omni->fault('answer', path => 'nothing');
		is($node->safe_psql($db, $refresh), 'accepted', '... nor keeps it from its work');
	}

	# The worker is terminated
	is(quickly("... it can be terminated", "SELECT pg_terminate_backend($worker, 5000)"), 't', '... at once');
	if ($state eq 'hanging')
	{
		like(($held->answer)[1], qr/^ERROR:  08007: .* ended before job \d+ was finished$/m, '... which its caller learns');
		$held->quit;
	}
	elsif ($state eq 'busy')
	{
		OmniLife::benched($held);
		unlike($held->{err}, qr/ERROR:  (?!the background worker ended before job)/, '... which its callers learn, if at all');
	}
	is($node->safe_psql($db, $refresh), 'accepted', '... and calls go on');
	isnt(OmniFault::worker($node, $db), $worker, '... with another worker');
	is($node->safe_psql($db, q{SELECT count(*) FROM omni_refresh_job WHERE status NOT IN ('accepted', 'unknown')}),
		'0', '... and every job has an end');
	is($node->safe_psql($db, q{
			SELECT count(*) FROM omni_refresh_job j WHERE status <>
				(SELECT event FROM omni_refresh_event WHERE job = j.id ORDER BY id DESC LIMIT 1)}),
		'0', '... which its last event tells');
	$node->safe_psql('postgres', "DROP DATABASE $db WITH (FORCE)");

	# DROP EXTENSION
	($db, $held) = make($state);
	my $forks = OmniLife::forks($node);
	quickly("the extension is dropped, its worker $state", 'SET client_min_messages = warning; DROP EXTENSION omni_refresh CASCADE', $db);
	if ($state eq 'hanging')
	{
		$omni->fault('none');
		like(($held->answer)[1], qr/^ERROR:  \w{5}: \S/m, '... which its caller learns');
		$held->quit;
	}
	elsif ($state eq 'busy')
	{
		isnt(OmniLife::benched($held), 0, '... which its callers learn');
	}
	OmniLife::until_true('... and the worker leaves soon', sub { OmniFault::worker($node, $db) eq '' }, 5);
	cmp_ok(OmniLife::forks($node) - $forks, '<=', { busy => 4, abandoned => 1 }->{$state} // 0, '... and does not try to come back');
	$omni->reset;
	$node->safe_psql($db, 'CREATE SCHEMA again; CREATE EXTENSION omni_refresh SCHEMA again');
	OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0, db => $db);
	is($node->safe_psql($db, "SET search_path = again; $refresh"), 'accepted', '... until there is one again');
	$node->safe_psql('postgres', "DROP DATABASE $db");
}

$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/terminating connection/,
	qr/ERROR:  .*ended before job/, qr/ERROR:  job \d+ was deleted while it was waited for/, qr/connection to client lost/, qr/will try again: another session holds a lock/);
done_testing();
