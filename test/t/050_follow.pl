# What Omni has accepted is followed to its end: asked about in good order, through faults, reloads
# and restarts, and told to those who listen.

use strict;
use warnings FATAL => 'all';

use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;
use OmniSQL qw(sql wait_for status story);

my $omni = OmniAPI->start;
my $node = OmniFault::node('follow', conf => "omni_refresh.track = on\nomni_refresh.min_interval = 0\n");
my $model = $omni->model;
my $keys = 0;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);

sub queue
{
	return sql("SELECT id FROM omni_refresh_on_commit('$model')");
}

# How often Omni was asked about a job, or about any
sub polls
{
	my ($uuid) = @_;

	return scalar(() = $omni->requests($uuid // qr{/jobs/}));
}

sub sends
{
	return scalar(() = $omni->requests(qr/refresh/));
}

sub configure
{
	my (%settings) = @_;

	$node->append_conf('postgresql.conf', join '', map { "omni_refresh.$_ = $settings{$_}\n" } sort keys %settings);
	$node->reload;
	return;
}

sub end_worker
{
	sql(q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
	return;
}

# What Omni is to say next about jobs, or about one
sub say
{
	my ($status, $path, $times) = @_;

	$omni->fault('answer', status => 200, path => $path // '/jobs/', times => $times // 1,
		body => encode_json({ job_type => 'refresh_schema', job_id => $model, status => $status }));
	return;
}

# Queues a job that runs until Omni is told to say otherwise; returns its number.
sub running
{
	my $id = queue();

	$node->poll_query_until('postgres', "SELECT status <> 'pending' AND status <> 'sending' FROM omni_refresh_job WHERE id = $id");
	return $id;
}

# Lets the time come for a question about the jobs that run.
sub hurry
{
	sql(q{UPDATE omni_refresh_job SET run_at = clock_timestamp() WHERE status = 'running'; SELECT omni_refresh_wake()});
	return;
}

# Jobs that were accepted so long ago, and are not asked about before hurry(), each at a server
# whose key, and so whose pauses, are its own; returns their numbers and Omni's ids.
sub accepted
{
	my (@ages) = @_;
	my $url = $omni->http;
	my $sql = '';

	for my $age (@ages)
	{
		my $server = 's' . ++$keys;
		$sql .= qq{
			CREATE SERVER $server FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url '$url', rate_limit '0');
			CREATE USER MAPPING FOR PUBLIC SERVER $server OPTIONS (api_key '$server-key');
			INSERT INTO omni_refresh_job (status, job_id, model_id, kind, hard, server, origin, requested_by, requested_by_oid,
				requested_at, sent_at, run_at, attempts, database)
			SELECT 'running', gen_random_uuid(), '$model', 'schema', true, '$server', 'on_commit', current_user, r.oid,
				t, t, clock_timestamp() + '30 min', 1, d.oid
			FROM pg_roles r, pg_database d, (SELECT clock_timestamp() - interval '$age') AS s (t)
			WHERE rolname = current_user AND datname = current_database()
			RETURNING id, job_id;};
	}
	return map { [ split /\|/ ] } split /\n/, sql($sql);
}

# From the request to the end, without help

my $listener = OmniLife::session($node, 'postgres');
$listener->query('LISTEN omni_refresh');
my %notices;

# What was told of a job, once so much of it was
sub told
{
	my ($id, $wanted, $name) = @_;
	my $end = time + 30;

	do
	{
		my ($out) = $listener->query('SELECT');
		while ($out =~ /"omni_refresh" with payload "(.*)" received/g)
		{
			my $payload = decode_json($1);
			my $status = delete $payload->{status};
			push @{ $notices{ delete $payload->{id} } }, $status, map { "and $_" } keys %$payload;
		}
	} while (@{ $notices{$id} // [] } < split(' ', $wanted) && time < $end);
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is(join(' ', @{ $notices{$id} // [] }), $wanted, $name);
}

$omni->set(job_seconds => 0);
my $job = decode_json(sql("SELECT row_to_json(j) FROM omni_refresh('$model') AS j"));
is("$job->{status} $job->{attempts}", 'running 1', 'a call returns the job that runs');
like($job->{job_id}, qr/^[0-9a-f-]{36}$/, '... with the id that Omni gave it');
is($job->{finished_at}, undef, '... and it is not finished');
is(sql("SELECT run_at - occurred_at BETWEEN '1.9 s' AND '2.1 s' FROM omni_refresh_job j JOIN omni_refresh_event e ON e.job = j.id WHERE event = 'accepted'"),
	't', 'it is asked about for the first time after 2 s');
is(polls(), 0, '... and not before');
wait_for('... and then it is at its end', "status = 'completed' AND error IS NULL FROM omni_refresh_job WHERE id = $job->{id}");
is(polls("/api/v1/jobs/$job->{job_id}/status"), 1, '... which one question has told');
my ($poll) = $omni->requests(qr{/jobs/});
is("$poll->{method} $poll->{query}$poll->{body} $poll->{headers}{authorization}", 'GET  Bearer ' . $omni->key, '... as Omni wants it asked');
is(story($job->{id}), 'sending accepted completed', '... as the events tell');
is(sql("SELECT sent_at = '$job->{sent_at}' AND attempts = 1 AND job_id = '$job->{job_id}'
		AND finished_at - sent_at BETWEEN '1.9 s' AND '20 s' AND finished_at = (SELECT max(occurred_at) FROM omni_refresh_event WHERE job = j.id)
	FROM omni_refresh_job j WHERE id = $job->{id}"), 't', '... and the row: sent once, finished later');
is(sql('SELECT count(DISTINCT requested_by), min(requested_by) = current_user FROM omni_refresh_event'), '1|t', '... all of the requester');
told($job->{id}, 'running completed', '... and so are listeners');

# What is said about jobs. The statuses of the answers, or faults, in order; if the job is not at
# its end then, the next answer is that it is.

my @cases = (
	map({ [ "\"$_\"", '1 s', [$_], 'completed' ] } 'COMPLETED', 'completed', 'Completed'),
	map({ [ "\"$_\"", '1 s', [$_], 'failed', '38000: ' ] } 'FAILED', 'failed'),
	map({ [ "\"$_\"", '1 s', [$_], 'running' ] } 'RUNNING', 'IN_PROGRESS', 'QUEUED', 'CANCELED', 'COMPLETE', '', 'unknown'),
	[ '404 at first', '0 s', [ { status => 404 }, { status => 404 } ], 'running' ],
	[ '404 later', '31 s', [ { status => 404 } ], 'unknown', '42704: ' ],
	map({ [ "$_->[0]", '1 s', [ { status => $_->[0] } ], 'unknown', $_->[1] ] } [ 400, '22023: ' ], [ 401, '28000: ' ], [ 403, '42501: ' ], [ 418, '38000: ' ]),
	map({ [ $_, '1 s', [ { status => $_ } ], 'running' ] } 429, 500, 502, 503, 504),
	map({ [ $_, '1 s', [ { fault => $_ } ], 'running' ] } qw(empty html_502 wrong_shape truncated nested not_utf8 nul nul_escape redirect reset close huge)),
	map({ [ $_, '1 s', [ { fault => 'answer', status => 200, body => $_ } ], 'running' ] }
			'{"status": null}', '{"status": ["COMPLETED"]}', '{"status": 1}', '{}', '"COMPLETED"', '{"state": "COMPLETED"}'),
	[ 'the key', '1 s', [ { fault => 'echo_key' } ], 'unknown', '28000: ' ],
	[ 'nothing for longer than track_timeout', '2 h', ['RUNNING'], 'unknown', '08007: .*track_timeout' ],
	[ '503 for longer than track_timeout', '2 h', [ { status => 503 } ], 'unknown', '08006: ' ],
	[ 'at last, after that', '2 h', ['COMPLETED'], 'completed' ],
);
$omni->reset;
my @accepted = accepted(map { $_->[1] } @cases);
for my $case (@cases)
{
	my ($what, $age, $answers, $status) = @$case;
	my ($id, $uuid) = @{ shift @accepted };

	for my $answer (@$answers)
	{
		my %extras = ref $answer ? %$answer : ();
		if (!ref $answer) { say($answer, $uuid) }
		else { $omni->fault(delete $extras{fault} // 'answer', %extras, path => $uuid) }
	}
	say('COMPLETED', $uuid) if $status eq 'running';
	@$case[5, 6] = ($id, $uuid);
}
hurry();
wait_for('jobs that were accepted are asked about', q{count(*) = 0 FROM omni_refresh_job WHERE status = 'running'});
my @asked = $omni->requests(qr{/jobs/});
my %rows = map { my ($id, @row) = split /\|/, $_, 4; $id => \@row } split /\n/, sql(q{
	SELECT id, (SELECT string_agg(event, ' ' ORDER BY e.id) FROM omni_refresh_event e WHERE job = j.id) || ' ' || attempts || ' '
		|| (sent_at = requested_at AND finished_at >= sent_at), status, translate(error, E'\n', ' ')
	FROM omni_refresh_job j});
for my $case (@cases)
{
	my ($what, $age, $answers, $status, $error, $id, $uuid) = @$case;
	my $end = $status eq 'running' ? 'completed' : $status;
	my $more = $status eq 'running' ? 1 : 0;

	my ($story, @row) = @{ $rows{$id} };
	like("@row", defined $error ? qr/^$end $error/ : qr/^$end $/, "when Omni says $what" . ($more ? ', it is asked again' : ''));
	is(scalar(grep { $_->{path} =~ $uuid } @asked) . " $story", @$answers + $more . " $end 1 true", '... as Omni, the events and the row tell');
	told($id, $end, '... and listeners, once') if $id % 7 == 0;
}
is(sends(), 0, 'no question is a request');
is(sql(q{SELECT count(*) FROM omni_refresh_event WHERE event IN ('failed', 'unknown') AND detail IS NULL}), '0', 'who fails says why, in the events as well');
is(sql(q{SELECT count(*) FROM omni_refresh_event e, pg_foreign_server s WHERE strpos(e::text, srvname || '-key') > 0}), '0', '... and nobody tells the key');

# Slower and slower

sql('TRUNCATE omni_refresh_job, omni_refresh_event');
$omni->reset;
my %ages = ('0 s' => [ 2, 2.9 ], '3 s' => [ 3.5, 4.4 ], '20 s' => [ 12, 12.9 ], '59 min' => [ 29, 30 ]);
my %ids;
@ids{ sort keys %ages } = map { $_->[0] } accepted(sort keys %ages);
say('RUNNING', '/jobs/', -1);
hurry();
$omni->wait_for_requests(4);
for my $age (sort keys %ages)
{
	my ($least, $most) = @{ $ages{$age} };
	wait_for("the next question about a job of $age is due in time", "run_at - clock_timestamp() BETWEEN '1 s' AND '$most s' AND run_at - sent_at > interval '$age' + interval '$least s'
		FROM omni_refresh_job WHERE id = $ids{$age}");
}
is(polls(), 4, '... nobody is asked twice');

# A question that takes its time

sql('TRUNCATE omni_refresh_job, omni_refresh_event');
$omni->reset;
$omni->set(job_seconds => 1000);
$omni->fault('answer', path => '/jobs/', status => 503, times => 1);
my $id = running();
hurry();
wait_for('an answer that does not help is kept', "error LIKE '08006: %' FROM omni_refresh_job WHERE id = $id");
$omni->reset;
$omni->set(job_seconds => 1000);
$omni->fault('hang', path => '/jobs/');
hurry();
$omni->wait_for_requests(1);
for (1 .. 3)
{
	my $other = running();
	sql("UPDATE omni_refresh_job SET run_at = now() + interval '1 h' WHERE id = $other");
}
is(polls(), 1, 'who has been asked is not asked again before there is an answer');
configure(track => 'off');
wait_for('when nobody is to follow any more, what runs is as it was accepted', q{count(*) = 4 FROM omni_refresh_job WHERE status = 'accepted' AND finished_at IS NOT NULL AND error IS NULL});
is(story($id), 'sending accepted accepted', '... as the events tell');
told($id, 'running accepted', '... and listeners are told');
$omni->fault('none');
$id = queue();
wait_for('... and what comes is accepted at once', "status = 'accepted' AND finished_at IS NOT NULL FROM omni_refresh_job WHERE id = $id");
is(sql("SELECT status FROM omni_refresh('$model')"), 'accepted', '... as a call');
is(sql(q{SELECT string_agg(DISTINCT status, ' ') FROM omni_refresh_job}), 'accepted', '... the late answer changes nothing');
is(sql(q{SELECT count(*) FROM omni_refresh_event WHERE event = 'unknown'}), '0', '... nor is it told');
told($id, 'accepted', '... that alone is told');
is(polls(), 1, '... without a question');
configure(track => 'on');

# What needs no following

sql('TRUNCATE omni_refresh_job, omni_refresh_event');
$omni->reset;
for my $case ([ 'completed', refresh_status => 'completed' ], [ 'accepted', job_id => 0 ])
{
	my ($status, @setting) = @$case;
	$omni->reset;
	$omni->set(@setting);
	$id = queue();
	wait_for("a job that is at its end at once is not followed: $status", "status = '$status' AND finished_at IS NOT NULL FROM omni_refresh_job WHERE id = $id");
	told($id, $status, '... but listeners are told');
	is(polls(), 0, '... and Omni is not asked');
}
$omni->reset;
$omni->set(refresh_status => 'failed');
my $call = OmniFault::call($node, "SELECT omni_refresh('$model');");
is($call->{sqlstate}, '38000', '... failed');

# Merged jobs

$omni->reset;
$omni->set(job_seconds => 0);
sql("SELECT id FROM omni_refresh_on_commit('$model', hard => false) UNION ALL SELECT id FROM omni_refresh_on_commit('$model')");
my ($carrier, $merged) = split /\n/, sql('SELECT id FROM omni_refresh_job ORDER BY id DESC LIMIT 2 OFFSET 0') =~ s/(\d+)\n(\d+)/$2\n$1/r;
wait_for('of jobs that were merged', "status = 'running' FROM omni_refresh_job WHERE id = $carrier");
hurry();
wait_for('... one is followed', "status = 'completed' FROM omni_refresh_job WHERE id = $carrier");
is(status($merged), 'merged', '... the other stays as it is');
told($carrier, 'running completed', '... one is told');
is(join(' ', @{ $notices{$merged} // [] }), '', '... the other is not');
is(polls(), 1, '... and Omni is asked once');

# The worker stays, and when it ends, the next one goes on

sql('TRUNCATE omni_refresh_job, omni_refresh_event');
$omni->reset;
$omni->set(job_seconds => 1000);
configure(idle_timeout => 0);
$id = running();
my $worker = OmniFault::worker($node);
my $call_id = sql("SELECT id FROM omni_refresh('$model')");
sql('SELECT pg_sleep(0.5)');			# there is nothing to be seen until it has left
is(OmniFault::worker($node), $worker, 'a worker does not leave while something runs');
for my $end ('of the worker', 'fast', 'immediate')
{
	if ($end eq 'of the worker') { end_worker() }
	else { $node->stop($end); $node->start }
	is(sql(qq{SELECT string_agg(status, ' ') FROM omni_refresh_job}), 'running running', "after the end $end: what runs, runs");
	my $before = polls();
	hurry();
	$omni->wait_for_requests($before + 2, qr{/jobs/});
	pass('... and Omni is asked about it');
}
is(sends(), 2, '... nothing is sent again');
say('COMPLETED', '/jobs/', -1);
hurry();
wait_for('... and in the end it is completed', q{count(*) = 2 FROM omni_refresh_job WHERE status = 'completed' AND attempts = 1});
is(story($id) . ', ' . story($call_id), join(', ', ('sending accepted completed') x 2), '... as the events tell');
wait_for('... and then the worker leaves', q{count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
configure(idle_timeout => "'10 min'");

# Those who may no longer ask

my $key_file = $node->basedir . '/key';
append_to_file($key_file, $omni->key);
sql('TRUNCATE omni_refresh_job, omni_refresh_event');
$omni->reset;
$omni->set(job_seconds => 1000);
my %loss = (
	unmapped => [ 'DROP USER MAPPING FOR PUBLIC SERVER unmapped', '28000: ' ],
	revoked => [ 'REVOKE USAGE ON FOREIGN SERVER revoked FROM PUBLIC', '42501: ' ],
	leaving => [ 'DROP ROLE leaver', '42704: role "leaver"' ]);
sql("CREATE ROLE leaver; CREATE ROLE reader; CREATE SERVER filed FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url '" . $omni->http . "', rate_limit '0');
	GRANT USAGE ON FOREIGN SERVER filed TO PUBLIC; CREATE USER MAPPING FOR PUBLIC SERVER filed OPTIONS (api_key_file '$key_file')");
for my $server (sort keys %loss)
{
	OmniFault::server($node, $server, url => $omni->http, key => $omni->key, rate_limit => 0);
	my $role = $server eq 'leaving' ? 'leaver' : 'reader';
	($loss{$server}[2]) = sql("SET omni_refresh.server = $server; SET ROLE $role; SELECT id FROM omni_refresh('$model')");
}
my $filed = sql("SET omni_refresh.server = filed; SELECT id FROM omni_refresh('$model')");
rename $key_file, "$key_file.away";
sql($loss{$_}[0]) for sort keys %loss;
my $asked = polls();	# usually none: the first poll comes after 2 s
hurry();
for my $server (sort keys %loss)
{
	my ($how, $error, $lost) = @{ $loss{$server} };
	wait_for("who may no longer ask does not know: $how", "status = 'unknown' AND finished_at IS NOT NULL AND error ~ '^$error' FROM omni_refresh_job WHERE id = $lost");
	is(story($lost), 'sending accepted unknown', '... as the events tell');
}
wait_for('but a key file that is not there is waited for', "status = 'running' AND run_at > now() + interval '4 min' AND error ~ '^28000' FROM omni_refresh_job WHERE id = $filed");
is(polls(), $asked, '... and nothing is asked');
rename "$key_file.away", $key_file;
say('COMPLETED');
hurry();
wait_for('... and then it goes on', "status = 'completed' AND error IS NULL FROM omni_refresh_job WHERE id = $filed");
is(story($filed), 'sending accepted waiting completed', '... as the events tell');

# Questions have their share of the rate limit, and leave to calls theirs

sql('TRUNCATE omni_refresh_job, omni_refresh_event');
$omni->reset;
$node->restart;					# the limiter begins anew
$omni->set(rate_limit => 16, job_seconds => 1000);
say('RUNNING', '/jobs/', -1);
sql(q{ALTER SERVER omni OPTIONS (SET rate_limit '16')});
sql(qq{
	INSERT INTO omni_refresh_job (status, job_id, model_id, kind, hard, server, origin, requested_by, requested_by_oid,
		requested_at, sent_at, run_at, attempts, database)
	SELECT 'running', gen_random_uuid(), '$model', 'schema', true, 'omni', 'on_commit', current_user, r.oid,
		clock_timestamp(), clock_timestamp(), clock_timestamp(), 1, d.oid
	FROM pg_roles r, pg_database d, generate_series(1, 100) WHERE rolname = current_user AND datname = current_database();
	SELECT omni_refresh_wake()});
$omni->wait_for_requests(2);
my $seconds = OmniLife::timed(sub { $call = OmniFault::call($node, "SET omni_refresh.call_timeout = '5 s'; SELECT status FROM omni_refresh('$model');") });
is("$call->{out}$call->{err}", 'running', 'while a hundred jobs run, a call gets through');
cmp_ok($seconds, '<', 4, '... at once');
cmp_ok($omni->stats->{requests}, '<=', 16, '... and all stays within the rate limit');
is(sql(q{SELECT count(*) FROM omni_refresh_job WHERE status = 'running'}), '101', '... for which nobody suffers but by waiting');

is(sql(q{SELECT count(*) FROM omni_refresh_job WHERE strpos(error, 'omni_osk') > 0}), '0', 'no error tells the key');
$listener->quit;
$node->stop('fast');
ok(index(slurp_file($node->logfile), $omni->key) < 0, 'the key is not in the log');
OmniLife::clean($node, 'the log is clean', qr/ERROR:  Omni could not refresh the model/);
done_testing();
