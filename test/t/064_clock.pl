# Somebody sets the clock while the server runs, far and a little, back and forward: nothing waits
# until the clock is where it was, and nothing is over before its time.
#
# In each server the worker of database "postgres" is idle at that moment, the one of "busy" has
# things of every kind on their way, and the one of "leaving" will not be needed any more.

use strict;
use warnings FATAL => 'all';

use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep stat time);

use OmniAPI;
use OmniClock;
use OmniFault;
use OmniLife;

OmniClock::build() or plan skip_all => 'test/shim/clock.c cannot be compiled';

# All in seconds
my $far = 2 * 60 * 60;
my $near = 40;					# longer than anything below should take
my $pause = 6;					# until what is waited for when the clock is set
my $slack = 20;					# what a busy machine may need on top of it
my $idle = 15;

my $omni = OmniAPI->start;
my $rated = OmniAPI->start;		# with a rate limit

END
{
	my $rc = $?;
	$_->stop for grep { $_ } $omni, $rated;
	$? = $rc;
}

$_->set(models => 100) for $omni, $rated;
$rated->set(refresh_status => 'completed');
my %models = map { $_ => [ models($_) ] } $omni, $rated;

# The uuids of all models
sub models
{
	my ($api) = @_;
	my $response = $api->{client}->get($api->http . '/api/v1/models?pageSize=100',
		{ headers => { Authorization => 'Bearer ' . $api->key } });

	return map { $_->{id} } @{ decode_json($response->{content})->{records} };
}

# A model for which nothing has been requested yet
sub model
{
	my ($api) = @_;
	return shift(@{ $models{ $api // $omni } }) // die 'no model is left';
}

# Starts a server with its databases.
sub start
{
	my ($name) = @_;
	my $clock = OmniClock->new($name, conf => <<CONF);
omni_refresh.track = on
omni_refresh.track_timeout = '1 h'
omni_refresh.retry_for = '1 h'
omni_refresh.min_interval = '$pause s'
omni_refresh.idle_timeout = '$idle s'
CONF
	my $node = $clock->node;

	OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
	OmniFault::server($node, 'impatient', url => $omni->http, key => $omni->key, rate_limit => 0, timeout => "$pause s");
	# The same by another name: a pause that Omni asks for holds for one name.
	OmniFault::server($node, 'paused', url => $omni->http =~ s/127\.0\.0\.1/localhost/r, key => $omni->key, rate_limit => 0);
	OmniFault::server($node, 'rated', url => $rated->http, key => $rated->key, rate_limit => 2);
	$node->safe_psql('postgres', "CREATE DATABASE $_ TEMPLATE postgres") for 'busy', 'leaving';
	return $clock;
}

sub sql
{
	my ($clock, $db, $sql) = @_;
	return $clock->node->safe_psql($db, $sql);
}

# Queues a request; returns the job's number.
sub queue
{
	my ($clock, $db, $model, $server) = @_;
	return sql($clock, $db, 'SET omni_refresh.server = ' . ($server // 'omni') . "; SELECT id FROM omni_refresh_on_commit('$model')");
}

# Writes the row of a queued job, without a word to the worker; returns its number.
sub insert
{
	my ($clock, $db, $model, %columns) = @_;
	my $job_id = $columns{job_id} ? "'$columns{job_id}'" : 'NULL';
	my $sent_at = $columns{job_id} ? 'clock_timestamp()' : 'NULL';
	my $status = $columns{job_id} ? 'running' : 'pending';

	return sql($clock, $db, qq{
		INSERT INTO omni_refresh_job (status, job_id, model_id, kind, hard, server, origin, requested_by, requested_by_oid,
			requested_at, sent_at, run_at, attempts, database)
		SELECT '$status', $job_id, '$model', 'schema', true, 'omni', 'on_commit', current_user, r.oid,
			clock_timestamp(), $sent_at, $columns{run_at}, 0, d.oid
		FROM pg_roles r, pg_database d WHERE rolname = current_user AND datname = current_database()
		RETURNING id});
}

sub field
{
	my ($clock, $db, $id, $column) = @_;
	return sql($clock, $db, "SELECT $column FROM omni_refresh_job WHERE id = $id");
}

sub terminate_worker
{
	my ($clock, $db) = @_;

	sql($clock, 'postgres', qq{
		SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
		WHERE backend_type = 'omni_refresh worker' AND datname = '$db'});
	return;
}

# The requests for a model, or about a job, so far
sub requests
{
	my ($path, $api) = @_;
	return ($api // $omni)->requests($path);
}

# Waits until something is as it should be before the clock is set.
sub until_ready
{
	my ($what, $function) = @_;
	my $end = time + $PostgreSQL::Test::Utils::timeout_default;

	until ($function->())
	{
		die "waited in vain for $what" if time > $end;
		sleep 0.05;
	}
	return;
}

# Tells whether something has come no later than so many seconds after a time. The function returns
# when it came, or nothing: it may be asked much later.
sub in_time
{
	my ($name, $since, $seconds, $function) = @_;
	my $came;

	while (!($came = $function->()) && time < $since + $seconds)
	{
		sleep 0.05;
	}
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return ok($came && $came < $since + $seconds, $name);
}

# Tells the same of the first requests for a model.
sub sent_in_time
{
	my ($name, $since, $seconds, $model, $count, $api) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return in_time($name, $since, $seconds, sub { ((requests($model, $api))[($count // 1) - 1] // {})->{time} });
}

# Tells the same of a job that is completed; finished_at is set by the server's clock.
sub completed_in_time
{
	my ($name, $since, $seconds, $clock, $job) = @_;
	my $ahead = $clock->ahead;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return in_time($name, $since, $seconds, sub {
		field($clock, 'busy', $job->{id}, "CASE WHEN status = 'completed' THEN extract(epoch FROM finished_at) - $ahead END") });
}

# Starts a statement in a session of its own.
sub begin
{
	my ($clock, $db, $sql) = @_;
	my $session = OmniLife::session($clock->node, $db);

	@$session{qw(clock since)} = ($clock, time);
	$session->send($sql);
	return $session;
}

# Tells whether it ends in time, and whether it returns and says what it should.
sub ends_in_time
{
	my ($name, $session, $since, $seconds, $out, $err) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $wrote = sub { slurp_file($session->{err}) =~ /^<end>$/m && (stat $session->{err})[9] };
	if (in_time($name, $since, $seconds, $wrote))
	{
		my @texts = $session->answer;
		like($texts[0], $out, '... and returns what it should');
		like($texts[1], $err, '... and says what it should');
	}
	else
	{
		fail('... and returns what it should');
		fail('... and says what it should');
		sql($session->{clock}, 'postgres', "SELECT pg_terminate_backend($session->{pid})");
	}
	$session->quit;
	return;
}

# What is on its way in "busy" when the clock is set back

sub prepare_busy
{
	my ($clock) = @_;
	my %busy = map { $_ => { model => model() } } qw(followed endless retried paused merged slow hanging);

	$omni->set(refresh_status => 'running', job_seconds => 1000);
	for my $job (@busy{qw(followed endless)})
	{
		$job->{id} = queue($clock, 'busy', $job->{model});
		until_ready('a job that runs', sub { field($clock, 'busy', $job->{id}, 'status') eq 'running' });
		$job->{job_id} = field($clock, 'busy', $job->{id}, 'job_id');
	}
	$omni->set(refresh_status => 'completed');
	$omni->fault('hang', path => $busy{hanging}{model}, times => -1);
	$busy{answer} = PostgreSQL::Test::Utils::tempdir . '/answer';
	$omni->fault('hold', path => $busy{slow}{model}, file => $busy{answer});
	$omni->fault('answer', path => $busy{retried}{model}, status => 504, headers => { 'Retry-After' => $pause });
	$omni->fault('answer', path => $busy{paused}{model}, status => 429, headers => { 'Retry-After' => $pause });

	$busy{wait} = begin($clock, 'busy', "SELECT status FROM omni_refresh_wait($busy{endless}{id}, '$pause s')");
	$busy{call} = begin($clock, 'busy', "SET omni_refresh.call_timeout = '$pause s'; SELECT status FROM omni_refresh('$busy{hanging}{model}')");
	$busy{$_}{id} = queue($clock, 'busy', $busy{$_}{model}, $_ eq 'paused' ? $_ : 'omni') for qw(retried paused merged slow);
	until_ready('a request', sub { requests($busy{merged}{model}) == 1 });
	queue($clock, 'busy', $busy{merged}{model}) for 1 .. 2;
	for my $job (@busy{qw(retried paused)})
	{
		until_ready('a job to be tried again', sub { field($clock, 'busy', $job->{id}, "status = 'pending' AND attempts = 1") eq 't' });
	}
	until_ready('requests that are not answered', sub { requests($busy{slow}{model}) && requests($busy{hanging}{model}) });
	return \%busy;
}

# Sets the clock, and then has the slow answer come.
sub set_back
{
	my ($clock, $busy, $step) = @_;

	$clock->step($step);
	append_to_file($busy->{answer}, '');
	return;
}

# What becomes of all that, when the clock was set back at a time
sub check_busy
{
	my ($when, $clock, $busy, $since) = @_;
	my $followed = $busy->{followed};
	my @limit = ($since, $pause + $slack);

	sent_in_time("$when: a job is tried again in time", @limit, $busy->{retried}{model}, 2);
	sent_in_time('... after a pause for which Omni has asked', @limit, $busy->{paused}{model}, 2);
	sent_in_time("$when: what waits for min_interval is sent in time", @limit, $busy->{merged}{model}, 2);
	is(sql($clock, 'busy', "SELECT count(*) FROM omni_refresh_job WHERE model_id = '$busy->{merged}{model}' AND status = 'merged'"), '1', '... merged');
	completed_in_time("$when: an answer that comes later is written down", @limit, $clock, $busy->{slow});
	in_time("$when: Omni is asked about a job again and again", @limit,
		sub { ((grep { $_->{time} > $since } requests($followed->{job_id}))[1] // {})->{time} });
	is(field($clock, 'busy', $followed->{id}, 'status'), 'running', '... which runs');
	$omni->fault('answer', path => $followed->{job_id}, status => 200, body => '{"status": "COMPLETED"}');
	completed_in_time('... until it is completed', time, $pause + $slack, $clock, $followed);
	ends_in_time("$when: omni_refresh_wait() that has begun before ends in time", $busy->{wait}, @limit,
		qr/^running$/, qr/^WARNING:  01000: timed out waiting for job $busy->{endless}{id}/m);
	ends_in_time("$when: a call that has begun before ends in time", $busy->{call}, @limit, qr/^$/, qr/^ERROR:  08/m);
	return;
}

# The rate limit: two requests are sent, the third must wait.
sub prepare_rate
{
	my ($clock) = @_;
	my @models = map { model($rated) } 1 .. 3;

	for my $model (@models[0, 1])
	{
		queue($clock, 'busy', $model, 'rated');
		until_ready('a request within the limit', sub { requests($model, $rated) == 1 });
	}
	my $id = queue($clock, 'busy', $models[2], 'rated');
	until_ready('a job that waits for the limit', sub {
		sql($clock, 'busy', "SELECT count(*) FROM omni_refresh_event WHERE job = $id AND event = 'rate_limited'") eq '1' });
	$clock->{limited} = $models[2];
	$clock->{first} = (requests($models[0], $rated))[0]{time};
	return;
}

# It is not forgotten.
sub check_rate
{
	my ($when, $clock) = @_;

	is(scalar(grep { $_->{time} < $clock->{first} + 60 } requests($clock->{limited}, $rated)), 0, "$when: the rate limit holds");
	return;
}

# After a minute there is room again. If the server has clocks that a test cannot set, that takes a minute.
sub check_rate_later
{
	my ($when, $clock) = @_;

	check_rate($when, $clock);
	$clock->pass(70);
	sent_in_time('... for a minute', time, 80, $clock->{limited}, 1, $rated);
	return;
}

# Has workers that have nothing to do; returns their pids.
sub prepare_idle
{
	my ($clock, @dbs) = @_;
	my %workers;

	for my $db (@dbs)
	{
		my $id = queue($clock, $db, model());
		until_ready('an idle worker', sub {
			field($clock, $db, $id, 'status') eq 'completed' && sql($clock, $db, qq{
				SELECT state FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker' AND datname = '$db'}) eq 'idle' });
		$workers{$db} = OmniFault::worker($clock->node, $db);
	}
	return \%workers;
}

# Commits a request; returns its job and model.
sub check_commit
{
	my ($when, $clock, $db) = @_;
	my ($model, $since) = (model(), time);
	my $id = queue($clock, $db, $model);

	sent_in_time("$when: what is committed is sent in time: $db", $since, $slack, $model);
	return ($id, $model);
}

# Tells whether both a session and the worker of "postgres", which has sent that, have the time that was set.
sub check_clock
{
	my ($when, $clock, $id, $model) = @_;
	my $now = sql($clock, 'postgres', 'SELECT extract(epoch FROM clock_timestamp())') - time;
	my ($request) = requests($model);

	cmp_ok(abs($now - $clock->ahead), '<', 10, "$when: sessions have that time");
	SKIP:
	{
		skip 'the worker has sent nothing', 1 if !$request;
		my $sent = sql($clock, 'postgres', "SELECT extract(epoch FROM occurred_at) FROM omni_refresh_event WHERE job = $id AND event = 'sending'");
		cmp_ok(abs($sent - $request->{time} - $clock->ahead), '<', 10, '... and so has the worker');
	}
	return;
}

# What is asked of workers after the clock was set back
sub check_requests
{
	my ($when, $clock) = @_;

	check_clock($when, $clock, check_commit($when, $clock, 'postgres'));
	check_commit($when, $clock, 'busy');
	my ($model, $since) = (model(), time);
	insert($clock, 'postgres', $model, run_at => 'clock_timestamp()');
	is(sql($clock, 'postgres', 'SELECT omni_refresh_wake()'), 't', "$when: omni_refresh_wake() sees a job");
	sent_in_time('... which is sent', $since, $slack, $model);
	$model = model();
	my $call = begin($clock, 'postgres', "SELECT status FROM omni_refresh('$model')");
	ends_in_time("$when: a call is answered", $call, $call->{since}, $slack, qr/^completed$/, qr/^$/);
	return;
}

# Begins a call and a wait, both with a time limit.
sub begin_limited
{
	my ($clock, $busy) = @_;
	my $model = model();

	$omni->fault('hang', path => $model, times => -1);
	return (begin($clock, 'postgres', "SET omni_refresh.call_timeout = '2 s'; SELECT status FROM omni_refresh('$model')"),
		begin($clock, 'busy', "SELECT status FROM omni_refresh_wait($busy->{endless}{id}, '2 s')"));
}

sub check_limited
{
	my ($when, $busy, $call, $wait) = @_;

	ends_in_time("$when: a call that begins afterwards ends in time", $call, $call->{since}, $slack, qr/^$/, qr/^ERROR:  08/m);
	ends_in_time("$when: omni_refresh_wait() that begins afterwards ends in time", $wait, $wait->{since}, $slack,
		qr/^running$/, qr/^WARNING:  01000: timed out waiting for job $busy->{endless}{id}/m);
	return;
}

my ($back, $little, $forward) = map { start($_) } qw(back little forward);

# The clock is set back

my @back = ({ clock => $back, when => 'two hours back', step => -$far }, { clock => $little, when => 'a little back', step => -$near });

for my $this (@back)
{
	my ($when, $clock) = @$this{qw(when clock)};

	prepare_rate($clock);
	$this->{busy} = prepare_busy($clock);
	my $workers = prepare_idle($clock, 'leaving', 'postgres');
	set_back($clock, $this->{busy}, $this->{step});
	$this->{since} = time;
	is(OmniFault::worker($clock->node, $_), $workers->{$_}, "$when: an idle worker is there: $_") for 'leaving', 'postgres';
	$this->{limited} = [ begin_limited($clock, $this->{busy}) ];
	$this->{leaving} = begin($clock, 'postgres', q{
		DO $$ BEGIN
			WHILE EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker' AND datname = 'leaving')
			LOOP
				PERFORM pg_sleep(0.1), pg_stat_clear_snapshot();
			END LOOP;
		END $$});
	check_requests($when, $clock);
}

# The clock is set forward

$omni->set(refresh_status => 'running', job_seconds => 1000);
prepare_rate($forward);
my %job = map { $_ => { model => model() } } qw(followed asked retried impatient answered repeated);
for my $job (@job{qw(followed asked)})
{
	$job->{id} = queue($forward, 'busy', $job->{model});
	until_ready('a job that runs', sub { field($forward, 'busy', $job->{id}, 'status') eq 'running' });
	$job->{job_id} = field($forward, 'busy', $job->{id}, 'job_id');
}
$omni->fault('delay', path => $job{asked}{job_id}, delay => $pause / 2);
$omni->set(refresh_status => 'completed');
$omni->fault('answer', path => $job{retried}{model}, status => 504, headers => { 'Retry-After' => $pause });
$omni->fault('answer', path => $job{retried}{model}, status => 504);
$omni->fault('hang', path => $job{impatient}{model});
$omni->fault('delay', path => $job{answered}{model}, delay => $pause / 2);
$omni->fault('answer', path => $job{repeated}{model}, status => 500, headers => { 'Retry-After' => $pause });
until_ready('questions', sub { requests($job{followed}{job_id}) && requests($job{asked}{job_id}) });

my $wait = begin($forward, 'busy', "SELECT status FROM omni_refresh_wait($job{followed}{id}, '1 min')");
$job{$_}{call} = begin($forward, 'busy', "SET omni_refresh.call_timeout = '1 min'; SELECT status FROM omni_refresh('$job{$_}{model}')") for 'answered', 'repeated';
$job{retried}{id} = queue($forward, 'busy', $job{retried}{model});
$job{impatient}{id} = queue($forward, 'busy', $job{impatient}{model}, 'impatient');
until_ready('requests', sub { !grep { requests($_->{model}) == 0 } @job{qw(retried impatient answered repeated)} });
until_ready('jobs to be tried again', sub {
	sql($forward, 'busy', "SELECT count(*) FROM omni_refresh_job WHERE model_id IN ('$job{retried}{model}', '$job{repeated}{model}') AND status = 'pending'") eq '2' });
prepare_idle($forward, 'postgres');
$forward->step($far);
my $when = 'two hours forward';
my $since = time;

check_clock($when, $forward, check_commit($when, $forward, 'postgres'));
for my $name ('followed', 'asked')
{
	my $job = $job{$name};

	in_time("$when: Omni is asked about a job again: $name", $since, $pause + $slack,
		sub { ((grep { $_->{time} > $since } requests($job->{job_id}))[0] // {})->{time} })
		if $name eq 'followed';
	until_ready('the answer about a job', sub { field($forward, 'busy', $job->{id}, "status <> 'running' OR run_at > clock_timestamp()") eq 't' });
	is(field($forward, 'busy', $job->{id}, 'status'), 'running', "$when: a job runs, as Omni says: $name");
	$omni->fault('answer', path => $job->{job_id}, status => 200, body => '{"status": "COMPLETED"}');
	sql($forward, 'busy', "UPDATE omni_refresh_job SET run_at = clock_timestamp() WHERE id = $job->{id} AND status = 'running'; SELECT omni_refresh_wake()");
	completed_in_time('... until it is completed', time, $slack, $forward, $job);
}
ends_in_time("$when: omni_refresh_wait() goes on until then", $wait, time, $slack, qr/^completed$/, qr/^(?!.*WARNING)/s);
for my $name ('retried', 'impatient')
{
	completed_in_time("$when: a job whose attempt fails is tried again: $name", $since, 2 * $pause + $slack, $forward, $job{$name});
	is(field($forward, 'busy', $job{$name}{id}, 'attempts'), $name eq 'retried' ? 3 : 2, '... until it succeeds');
}
ends_in_time("$when: a call gets the answer that it waits for", $job{answered}{call}, $since, $pause + $slack, qr/^completed$/, qr/^$/);
ends_in_time("$when: a call is tried again", $job{repeated}{call}, $since, $pause + $slack, qr/^completed$/, qr/^$/);
check_rate($when, $forward);

# What was on its way when the clock was set back

for my $this (@back)
{
	check_limited($this->{when}, $this->{busy}, @{ $this->{limited} });
	check_busy(@$this{qw(when clock busy since)});
}

# The clock is set right again: there are rows, and things in the workers' memory, of hours ahead.

$when = 'forward and back';
my $busy = prepare_busy($forward);
prepare_idle($forward, 'postgres');
terminate_worker($forward, 'leaving');
my @pending = (model(), model());
insert($forward, 'leaving', $pending[0], run_at => 'clock_timestamp()');
insert($forward, 'leaving', $pending[1], run_at => "clock_timestamp() + '$pause s'");
my $running = insert($forward, 'leaving', model(), run_at => 'clock_timestamp()', job_id => $busy->{endless}{job_id});
set_back($forward, $busy, -$far);
$since = time;
is(sql($forward, 'leaving', 'SELECT omni_refresh_wake()'), 't', "$when: a worker begins with what it finds");
my @limited = begin_limited($forward, $busy);
check_requests($when, $forward);
check_limited($when, $busy, @limited);
check_busy($when, $forward, $busy, $since);
sent_in_time("$when: a job of hours ahead is sent in time", $since, 75, $_) for @pending;
in_time('... and Omni is asked about another one', $since, 75,
	sub { field($forward, 'leaving', $running, "CASE WHEN run_at < clock_timestamp() + '1 h' THEN extract(epoch FROM clock_timestamp()) END") });

# What takes its time

for my $this (@back)
{
	ends_in_time("$this->{when}: a worker leaves when it has been idle long enough", $this->{leaving}, $this->{since}, $idle + $slack,
		qr/^$/, qr/^$/);
}
check_rate_later(@$_{qw(when clock)}) for @back;
check_rate_later($when, $forward);

for my $clock ($back, $little, $forward)
{
	$clock->node->stop('fast');
	my @crashes = slurp_file($clock->node->logfile) =~ /^.*(?:TRAP:|PANIC:|terminated by signal).*$/mg;
	is("@crashes", '', 'nothing has crashed');
}

done_testing();
