# The view omni_refresh_status: what it says of each server, to whom, and at what price.

use strict;
use warnings FATAL => 'all';

use JSON::PP;
use OmniAPI;
use OmniFault;
use OmniTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $test = OmniTest->new('status', "omni_refresh.idle_timeout = '10 min'", 'omni_refresh.min_interval = 0', 'autovacuum = off');
my ($node, $omni) = ($test->node, $test->omni);
my $model = $omni->model;
my $second = OmniAPI->start;
my $second_key = $node->basedir . '/second.key';
my @numbers = qw(pending sending running completed accepted failed canceled unknown failures_in_a_row requests_last_minute);
my @others = qw(oldest_pending oldest_unfinished last_success last_failure last_error p50 p95 worker_pid);

END { my $rc = $?; $second->stop if $second; $? = $rc; }

append_to_file($second_key, $second->key);
$test->sql(q{CREATE SERVER second FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url '} . $second->https . q{', ca_file '} . $second->ca . qq{', rate_limit '0');
	CREATE USER MAPPING FOR CURRENT_USER SERVER second OPTIONS (api_key_file '$second_key');
	CREATE FOREIGN DATA WRAPPER strange;
	CREATE SERVER strange FOREIGN DATA WRAPPER strange;});

# The row of a server
sub status
{
	my ($server, $role) = @_;

	return decode_json($test->sql("SELECT row_to_json(s) FROM omni_refresh_status AS s WHERE server = '$server'", undef, $role));
}

# The numbers of a row that are not 0, but that of requests, which are forgotten after a minute
sub counts
{
	my ($row) = @_;

	return join ', ', map { $row->{$_} && $_ ne 'requests_last_minute' ? "$_ $row->{$_}" : () } @numbers;
}

# Whether some columns of a server's row are as they should be, in SQL
sub is_so
{
	my ($name, $condition, $server) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return is($test->sql("SELECT $condition FROM omni_refresh_status WHERE server = '" . ($server // 'omni') . q{'}), 't', $name);
}

# Writes jobs down, as if they had been: (status, number, how long ago they came to their end, more columns)
sub insert
{
	my ($status, $number, $age, %more) = @_;
	my %columns = (status => "'$status'", model_id => 'gen_random_uuid()', kind => "'schema'", server => "'omni'", origin => "'on_commit'",
		requested_by => 'current_user', requested_by_oid => 'current_user::regrole', requested_at => "now() - interval '$age'",
		run_at => "now() - interval '$age'", database => '(SELECT oid FROM pg_database WHERE datname = current_database())',
		$status =~ /^(pending|sending|running)$/ ? () : (finished_at => "now() - interval '$age'"), %more);

	$test->sql('INSERT INTO omni_refresh_job (' . join(', ', sort keys %columns) . ') SELECT '
		. join(', ', map { $columns{$_} } sort keys %columns) . " FROM generate_series(1, $number) AS i");
	return;
}

sub clear
{
	$test->sql('TRUNCATE omni_refresh_job, omni_refresh_event');
	return;
}

# Nothing has happened yet

is($test->sql('SELECT string_agg(server, \' \' ORDER BY server) FROM omni_refresh_status'), 'omni second', 'each server of the wrapper has a row, and no other');
my $row = status('omni');
is(counts($row), '', 'a server without jobs has zeros');
is_deeply([ grep { !defined $row->{$_} } @numbers ], [], '... no NULLs');
is_deeply([ grep { defined $row->{$_} } @others ], [], '... but NULLs where there is nothing to say');
is(join(' ', sort keys %$row), join(' ', sort 'server', @numbers, @others), 'these are all columns');

# What happens to jobs, and to which server

$test->call for 1 .. 3;
$row = status('omni');
is(counts($row), 'accepted 3', 'calls are counted');
is_so('... the last success is that of the last one', 'last_success = (SELECT max(finished_at) FROM omni_refresh_job)');
is_so('... the time to the answer is that of the events', q{
	p50 = (SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY duration) FROM omni_refresh_event WHERE duration IS NOT NULL)
	AND p95 BETWEEN p50 AND (SELECT max(duration) FROM omni_refresh_event) AND p50 > '0'});
is($row->{worker_pid}, OmniFault::worker($node), '... and there is a worker');
is(status('second')->{worker_pid}, $row->{worker_pid}, '... which is that of all servers');
is($row->{last_failure} // $row->{last_error} // $row->{oldest_pending}, undef, '... and nothing went wrong');
$row = status('second');
is(counts($row), '', 'the other server has nothing of it');
is($row->{last_success} // $row->{p50} // $row->{p95}, undef, '... at all');

$second->fault('answer', status => 404, body => '{"detail": "gone astray"}');
$test->outcome("SET omni_refresh.server = second; SELECT * FROM omni_refresh('" . $second->model . "')");
$row = status('second');
is(counts($row), 'failed 1, failures_in_a_row 1', 'a failure is counted where it happened');
like($row->{last_error}, qr/^42704: .*HTTP status 404.*gone astray/s, '... with its error');
is_so('... and its time', 'last_failure = (SELECT max(finished_at) FROM omni_refresh_job) AND last_success IS NULL', 'second');
is(counts(status('omni')), 'accepted 3', '... and nowhere else');
$second->set(refresh_status => 'completed');
$test->sql("SET omni_refresh.server = second; SELECT * FROM omni_refresh('" . $second->model . "')");
is(counts(status('second')), 'completed 1, failed 1', 'what is completed is a success');
is_so('... which is later than the failure', 'last_success > last_failure AND last_error IS NOT NULL', 'second');

# Attempts that failed

clear();
$omni->fault('answer', status => 503, times => 2);
$test->call;
is(counts(status('omni')), 'accepted 1', 'each attempt is a request');
$test->sql(q{ALTER SERVER omni OPTIONS (ADD timeout '200 ms')});
$omni->fault('hang', times => -1);
$test->outcome(q{SET omni_refresh.call_timeout = '400 ms'; } . $test->call_sql);
like(counts(status('omni')), qr/^accepted 1, unknown 1, failures_in_a_row 1$/, 'what nobody knows is no success');
like(status('omni')->{last_error}, qr/^08006: /, '... but a failure');
$omni->reset;
$test->sql(q{ALTER SERVER omni OPTIONS (DROP timeout)});

# Those that are followed

clear();
$node->append_conf('postgresql.conf', "omni_refresh.track = on\n");
$node->reload;
$test->sql(q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
$omni->set(job_seconds => 1);
my $id = $test->call->{id};
is(counts(status('omni')), 'running 1', 'what Omni works on is running');
is(status('omni')->{last_success}, undef, '... and no success yet');
$test->sql("SELECT omni_refresh_wait($id)");
is(counts(status('omni')), 'completed 1', 'what is completed is a success');
is_so('... of which the time to the answer is told, not to the end', q{p95 < '1 s' AND last_success IS NOT NULL});

# Requests. They are forgotten after a minute: on a machine that takes longer, try again.

my $most = 0;
for my $try (1 .. 5)
{
	my $began = time;
	my $server = "counted$try";
	$test->sql(qq{CREATE SERVER $server FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url '} . $omni->http . qq{', rate_limit '0');
		CREATE USER MAPPING FOR CURRENT_USER SERVER $server OPTIONS (api_key_file '$test->{key_file}')});
	$omni->reset;
	$omni->set(job_seconds => 1);
	$test->sql("SET omni_refresh.server = $server; SELECT omni_refresh_wait((omni_refresh('$model')).id); SELECT count(*) FROM omni_refresh_models()");
	my ($requests, $counted) = (scalar($omni->requests), status($server)->{requests_last_minute});
	$most = $requests;
	cmp_ok($counted, '<=', $requests, 'no more requests are counted than are sent');
	next if time - $began > 50;
	is($counted, $requests, 'a refresh, its polls and a look-up are counted');
	last;
}
cmp_ok($most, '>=', 3, '... of which there are some');
is($test->sql(q{SELECT omni_refresh_requests_last_minute('nowhere')}), '0', '... and none of a server that does not exist');
$omni->reset;

# Unfinished ones. No worker is there to settle them.

$node->append_conf('postgresql.conf', "omni_refresh.enabled = off\nomni_refresh.track = off\n");
$node->restart;
is(status('omni')->{worker_pid}, undef, 'no worker is no pid');
clear();
insert('pending', 1, '2 h');
insert('pending', 3, '1 min', run_at => q{now() + interval '1 h'});
insert('sending', 4, '3 h');
insert('running', 5, '4 h');
insert('pending', 1, '9 h', server => q{'second'});
insert('pending', 1, '9 h', server => q{'dropped'});
is(counts(status('omni')), 'pending 4, sending 4, running 5', 'what is unfinished is counted');
is_so('... and how old the oldest pending one is', q{oldest_pending BETWEEN '2 h' AND '2 h 1 min'});
is_so('... and the oldest one of all', q{oldest_unfinished BETWEEN '4 h' AND '4 h 1 min'});
is_so('... at each server', q{oldest_pending BETWEEN '9 h' AND '9 h 1 min' AND pending = 1}, 'second');
is($test->sql(q{BEGIN; SELECT pg_sleep(0.3); SELECT oldest_pending > '2 h 0.3 s' FROM omni_refresh_status WHERE server = 'omni'}),
	"\nt", '... by the clock, not by the transaction');

# Finished ones

clear();
insert($_->[0], $_->[1], '59 min') for [ completed => 1 ], [ accepted => 2 ], [ failed => 3 ], [ canceled => 4 ], [ unknown => 5 ], [ merged => 6 ];
insert($_, 7, '61 min') for qw(completed accepted failed canceled unknown merged);
is(counts(status('omni')), 'completed 1, accepted 2, failed 3, canceled 4, unknown 5, failures_in_a_row 8', 'what came to an end in the last hour is counted');
for my $case ([ 'failed', 'unknown' ], [ 'unknown', 'failed' ])
{
	my ($earlier, $later) = @$case;
	clear();
	insert('completed', 1, '3 days');
	insert('accepted', 1, '2 days');
	insert('canceled', 1, '1 h');
	insert($earlier, 1, '5 days', error => q{'earlier'});
	insert($later, 1, '4 days', error => q{'later'});
	insert('merged', 1, '1 h');
	is_so('the last success may be long ago', q{last_success = now() - interval '2 days' - (now() - last_success - interval '2 days')
		AND now() - last_success BETWEEN '2 days' AND '2 days 1 min'});
	is_so("... and so may the last failure, of those the later one: $later", q{now() - last_failure BETWEEN '4 days' AND '4 days 1 min' AND last_error = 'later'});
	is(counts(status('omni')), '', '... and there was nothing in the last hour');
	insert($_, 2, '1 day') for $earlier, $later;
	insert('canceled', 1, '1 h');
	insert('failed', 1, '1 day', server => q{'second'});
	is(counts(status('omni')), 'failures_in_a_row 4', '... but failures since the last success');
}

clear();
insert('unknown', 600, '2 days');
insert('failed', 600, '2 days');
is(counts(status('omni')), 'failures_in_a_row 1000', 'failures are counted up to a limit');
insert('accepted', 1, '1 day');
is(counts(status('omni')), '', '... and no more after a success');

# Answers

clear();
insert('accepted', 1, '1 min');
insert('accepted', 1, '1 min', server => q{'second'});
$test->sql(q{
	INSERT INTO omni_refresh_event (job, requested_by, requested_by_oid, occurred_at, event, attempt, http_status, duration)
	SELECT (SELECT min(id) FROM omni_refresh_job), current_user, 10, now() - i * interval '1 s', 'accepted', 1, 200, i * interval '1 ms'
	FROM generate_series(0, 100) AS i;
	INSERT INTO omni_refresh_event (job, requested_by, requested_by_oid, occurred_at, event, attempt, http_status, duration)
	SELECT (SELECT min(id) FROM omni_refresh_job), current_user, 10, now() - interval '2 h', 'accepted', 1, 200, '1 h'
	FROM generate_series(1, 1000) AS i;
	INSERT INTO omni_refresh_event (job, requested_by, requested_by_oid, occurred_at, event, attempt, duration)
	SELECT (SELECT min(id) FROM omni_refresh_job), current_user, 10, now(), 'attempt_failed', 1, '1 us'
	FROM generate_series(1, 1000) AS i;
	INSERT INTO omni_refresh_event (job, requested_by, requested_by_oid, occurred_at, event, attempt)
	SELECT (SELECT min(id) FROM omni_refresh_job), current_user, 10, now() - i * interval '10 s', 'sending', 1
	FROM generate_series(0, 100) AS i;
	INSERT INTO omni_refresh_event (job, requested_by, requested_by_oid, occurred_at, event, attempt, http_status, duration)
	VALUES ((SELECT max(id) FROM omni_refresh_job), current_user, 10, now(), 'accepted', 1, 200, '1 min')});
is_so('the median and the 95th percentile are those of the last hour, of answers only', q{p50 = '50 ms' AND p95 = '95 ms'});
is_so('... at each server', q{p50 = '1 min' AND p95 = '1 min'}, 'second');

# Many

clear();
insert('accepted', 50000, '1 h', server => q{CASE i % 3 WHEN 0 THEN 'second' ELSE 'omni' END}, finished_at => q{now() - interval '2 h' - i * interval '40 s'},
	status => q{('{completed,failed,accepted,canceled,unknown,merged}'::text[])[1 + i % 6]}, error => q{repeat('x', 200)});
$test->sql(q{
	INSERT INTO omni_refresh_event (job, requested_by, requested_by_oid, occurred_at, event, attempt, http_status, duration)
	SELECT id, requested_by, requested_by_oid, finished_at, CASE n WHEN 0 THEN 'sending' ELSE 'accepted' END, 1, CASE n WHEN 1 THEN 200 END, CASE n WHEN 1 THEN interval '1 s' END
	FROM omni_refresh_job, generate_series(0, 1) AS n});
insert('failed', 20, '10 min', error => q{'recent'});
insert('pending', 20, '10 min');
$test->sql(q{
	INSERT INTO omni_refresh_event (job, requested_by, requested_by_oid, occurred_at, event, attempt, http_status, duration)
	SELECT id, requested_by, requested_by_oid, now() - interval '30 s', CASE n WHEN 0 THEN 'sending' ELSE 'attempt_failed' END, 1, CASE n WHEN 1 THEN 503 END, CASE n WHEN 1 THEN interval '2 s' END
	FROM omni_refresh_job, generate_series(0, 1) AS n WHERE error = 'recent';});

# What a plan reads, all loops together: each scan of our tables as [kind, rows], from its JSON
sub scans
{
	my ($plan) = @_;
	my @scans = map { scans($_) } @{ $plan->{Plans} // [] };

	push @scans, [ $plan->{'Node Type'}, $plan->{'Actual Loops'} * ($plan->{'Actual Rows'} + ($plan->{'Rows Removed by Filter'} // 0)) ]
		if ($plan->{'Relation Name'} // '') =~ /^omni_refresh_/;
	return @scans;
}

for my $state ('before they are analyzed', 'when they are analyzed', 'when they are vacuumed, too')
{
	$test->sql('ANALYZE omni_refresh_job, omni_refresh_event') if $state =~ /when .*analyzed/;
	$test->sql('VACUUM omni_refresh_job, omni_refresh_event') if $state =~ /vacuumed/;
	my $plan = decode_json($test->sql('EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT * FROM omni_refresh_status'))->[0]{Plan};
	my @scans = scans($plan);
	my $rows = 0;
	$rows += $_->[1] for @scans;
	cmp_ok(scalar(@scans), '>=', 5, "the plan reads our tables $state");
	is(join(', ', map { $_->[0] } grep { $_->[0] !~ /Index|Bitmap/ } @scans), '', '... by their indexes');
	cmp_ok($rows, '<', 1000, '... and a few of their 150,000 rows');
	my $blocks = $plan->{'Shared Hit Blocks'} + $plan->{'Shared Read Blocks'};
	cmp_ok($blocks, '<', 700, '... on a few of their blocks');
	note("$rows rows, $blocks blocks");
	is(counts(status('omni')), 'pending 20, failed 20, failures_in_a_row 21', '... which are the right ones');
	is_so('... and the last, too', q{last_error = 'recent' AND now() - last_success BETWEEN '2 h' AND '3 h' AND p50 = '2 s'});
}

# To whom

$test->sql(q{
	CREATE ROLE monitor LOGIN; GRANT pg_monitor TO monitor;
	CREATE ROLE loader LOGIN; GRANT USAGE ON FOREIGN SERVER omni TO loader;
	CREATE ROLE stats LOGIN; GRANT pg_read_all_stats TO stats;});
$node->append_conf('postgresql.conf', "omni_refresh.enabled = on\n");
$node->reload;
clear();
$test->call;
$row = status('omni', 'monitor');
is(counts($row), 'accepted 1', 'monitors see it all');
is($row->{worker_pid}, OmniFault::worker($node), '... the worker, too');
is_deeply($row, status('omni'), '... as superusers do');
for my $role ('loader', 'stats')
{
	like(($test->outcome('SELECT * FROM omni_refresh_status', undef, $role))[1], qr/^ERROR:  42501: permission denied for view omni_refresh_status/,
		"others may not: $role");
}
for my $role ('monitor', 'loader')
{
	like(($test->outcome("UPDATE omni_refresh_status SET pending = 0; DELETE FROM omni_refresh_status", undef, $role))[1], qr/^ERROR:  (42501|55000): /,
		"nobody writes it: $role");
}

# Another database, another worker

$test->sql('CREATE DATABASE elsewhere');
$test->set_up('elsewhere', 'public');
is($test->sql('SELECT worker_pid IS NULL FROM omni_refresh_status', 'elsewhere'), 't', 'the worker is that of this database');
$test->sql("SELECT omni_refresh('$model')", 'elsewhere');
isnt($test->sql('SELECT worker_pid FROM omni_refresh_status', 'elsewhere'), status('omni')->{worker_pid}, '... each of its own');
is(counts(status('omni')), 'accepted 1', '... and so are the jobs');

# Servers come and go

$test->sql('DROP SERVER second CASCADE; ALTER SERVER omni RENAME TO "Omni 2"');
is($test->sql(q{SELECT string_agg(server, ' ') FROM omni_refresh_status WHERE server !~ '^counted'}), 'Omni 2', 'a server that is dropped or renamed has no row');
is(counts(status('Omni 2')), '', '... and its jobs keep its name');
is($test->sql('CREATE SCHEMA trap; CREATE VIEW trap.omni_refresh_job AS SELECT 1; SET search_path = trap; SELECT count(*) FROM public.omni_refresh_status WHERE server = \'Omni 2\''), '1',
	'the search_path does not matter');

$test->done;
