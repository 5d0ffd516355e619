# The worker never waits for a row lock: whatever row somebody keeps locked, the calls and jobs of others
# go on, and the row itself comes to its end once the lock is gone, by the same worker.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

# Alice's jobs are the ones whose rows are locked; bob has an instance of his own.
my $omni = OmniAPI->start;
my $other = OmniAPI->start;
my $node = OmniFault::node('locks', conf => "omni_refresh.min_interval = 0\nomni_refresh.max_in_flight = 10\n");
my $model = $omni->model;
my $worker;

END { my $rc = $?; $_->stop for grep { $_ } $omni, $other; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
OmniFault::server($node, 'other', url => $other->http, key => $other->key, rate_limit => 0);
OmniFault::server($node, 'slow', url => $omni->http, key => 'another-key', rate_limit => 1);
$node->safe_psql('postgres', 'CREATE ROLE alice LOGIN; CREATE ROLE bob LOGIN');
my $database = sql('SELECT oid FROM pg_database WHERE datname = current_database()');

sub sql
{
	return $node->safe_psql('postgres', @_);
}

# Begins a call of alice's.
sub call
{
	my ($settings) = @_;

	return OmniFault::begin($node, join('', map { "SET $_;" } @{ $settings // [] }) . "SELECT status FROM omni_refresh('$model');",
		user => 'alice');
}

# Queues a job of alice's; returns its number.
sub queue
{
	return sql("SET ROLE alice; SELECT id FROM omni_refresh_on_commit('$model')");
}

# Waits for a job of alice's, the last one if none is named, and returns its number.
sub job
{
	my ($condition, $id) = @_;

	$id //= q{(SELECT max(id) FROM omni_refresh_job WHERE requested_by = 'alice')};
	$node->poll_query_until('postgres', "SELECT count(*) = 1 FROM omni_refresh_job WHERE id = $id AND $condition")
		or die "no job with $condition";
	return sql("SELECT $id");
}

sub configure
{
	my (%settings) = @_;

	$node->append_conf('postgresql.conf', join '', map { "omni_refresh.$_ = $settings{$_}\n" } sort keys %settings);
	$node->reload;
	return;
}

# Ends the worker; the next one finds what it had in hand.
sub end_worker
{
	sql(q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
	return;
}

# The calls and the queue of another user go on: at once, where the fault makes them wait for five
# seconds or more, or fail.
sub others
{
	my ($name) = @_;
	my $call = OmniFault::call($node, "SET omni_refresh.server = other; SET omni_refresh.call_timeout = '10 s';
		SELECT status FROM omni_refresh('" . $other->model . "');", user => 'bob');

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	like($call->{out}, qr/^(accepted|running)$/, "$name: another's call") or diag($call->{err});
	cmp_ok($call->{seconds}, '<', 4, '... is not kept');
	my $id = sql("SET ROLE bob; SET omni_refresh.server = other; SELECT id FROM omni_refresh_on_commit('" . $other->model . "')");
	OmniLife::until_true("... nor is another's job in the queue", sub {
			sql("SELECT sent_at - requested_at < '4 s' AND status IN ('accepted', 'running', 'completed') FROM omni_refresh_job WHERE id = $id") eq 't' }, 8);
	return;
}

# Who wants a row for himself
my %locks = (
	'FOR UPDATE' => sub { "SELECT FROM omni_refresh_job WHERE id = $_[0] FOR UPDATE" },
	'FOR SHARE' => sub { "SELECT FROM omni_refresh_job WHERE id = $_[0] FOR SHARE" },
	'DELETE' => sub { "DELETE FROM omni_refresh_job WHERE id = $_[0]" },
	'cancel' => sub { "SET SESSION AUTHORIZATION alice; SELECT omni_refresh_cancel($_[0])" },
	'events' => sub { "SELECT FROM omni_refresh_event WHERE job = $_[0] FOR UPDATE" });

# Holds a row in a transaction while others go on, then ends that and waits for the end of the job.
# "after" does what makes the worker want the row, and "end" looks at what became of alice's session.
sub hold
{
	my ($name, $lock, $last, $status, $begin, %more) = @_;
	my $log = -s $node->logfile;

	$name .= ", $lock, $last";
	note($name);
	$_->reset for $omni, $other;
	my $session = OmniLife::session($node, 'postgres');
	my ($id, $call) = $begin->();
	my ($out, $err) = $session->query('BEGIN; ' . $locks{$lock}->($id));
	is("$out$err", $lock eq 'cancel' ? 't' : '', "$name: the row is held") or diag($err);
	$more{after}->($id, $call) if $more{after};
	others($name);
	others('... a second time') if $more{twice};
	$worker = OmniFault::worker($node);
	$session->query($last);
	OmniLife::until_true("... the job itself comes to its end: $status", sub {
			sql("SELECT coalesce((SELECT status FROM omni_refresh_job WHERE id = $id), 'none')") =~ /^(?:$status)$/ }, 15)
		or diag(sql("SELECT status, attempts, run_at - now() FROM omni_refresh_job WHERE id = $id"));
	is(OmniFault::worker($node), $worker, '... by the same worker');
	$omni->fault('none');
	OmniFault::finish($call) if $call;
	$more{end}->($id, $call) if $more{end};
	$session->quit;
	sql(q{DELETE FROM omni_refresh_job WHERE requested_by = 'alice' AND status IN ('pending', 'sending', 'running')});
	my @lines = grep { /LOG:|WARNING:|ERROR:|FATAL:/ && /lock|omni_refresh|job/ } split /\n/, substr(slurp_file($node->logfile), $log);
	cmp_ok(scalar(@lines), '<', 10, '... without much ado in the log') or diag(join "\n", @lines[0 .. 9]);
	return;
}

sub until_due
{
	my ($id) = @_;

	job('run_at <= clock_timestamp()', $id);
	return;
}

sub says
{
	my ($sqlstate, $out) = @_;

	return sub {
		my ($id, $call) = @_;
		like($call->{sqlstate}, qr/^(?:$sqlstate)$/, '... its caller is told') or diag($call->{err});
		is($call->{out}, $out // '', '... the truth');
	};
}

others('to begin with');

# A call that waits for Retry-After. Its time comes while the row is held.

my $retry_after = sub {
	$omni->fault('answer', status => 503, headers => { 'Retry-After' => 2 });
	my $call = call();
	return (job(q{status = 'pending' AND attempts = 1}), $call);
};
hold('a call waits for Retry-After', 'cancel', 'COMMIT', 'canceled', $retry_after, after => \&until_due, twice => 1, end => says('\w{5}'));
hold('a call waits for Retry-After', 'cancel', 'ROLLBACK', 'accepted', $retry_after, after => \&until_due, twice => 1, end => says('', 'accepted'));
hold('a call waits for Retry-After', 'FOR SHARE', 'COMMIT', 'accepted', $retry_after, after => \&until_due, twice => 1, end => says('', 'accepted'));
hold('a call waits for Retry-After', 'DELETE', 'COMMIT', 'none', $retry_after, after => \&until_due, twice => 1, end => says('\w{5}'));

# ... and so does the end of its time, or its caller leaves.

my $hasty = sub {
	$omni->fault('answer', status => 503, headers => { 'Retry-After' => 1 });
	my $call = call([ q{omni_refresh.call_timeout = '3 s'} ]);
	return (job(q{status = 'pending' AND attempts = 1}), $call);
};
hold('a call whose time is over', 'FOR UPDATE', 'COMMIT', 'failed|canceled|unknown', $hasty,
	after => sub {
		my ($id, $call) = @_;
		OmniFault::finish($call);
		like($call->{sqlstate}, qr/^\w{5}$/, '... its caller is told of an error');
		cmp_ok($call->{seconds}, '<', 8, '... in time');
	});
for my $lock ('cancel', 'FOR UPDATE')
{
	hold('a call whose caller has left', $lock, 'ROLLBACK', 'failed|canceled', $retry_after, twice => 1,
		after => sub {
			sql(q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE usename = 'alice' AND query ~ 'omni_refresh\('}) });
}

# A call that waits for the rate limit. After the first request it has more than a minute to wait.

sql("SET ROLE alice; SET omni_refresh.server = slow; SET omni_refresh.on_failure = warning; SELECT omni_refresh('$model')");
hold('a call waits for the rate limit', $_, 'ROLLBACK', 'canceled',
	sub {
		my $call = call([ q{omni_refresh.server = slow}, q{omni_refresh.call_timeout = '10 min'} ]);
		return (job(q{status = 'pending' AND attempts = 0}), $call);
	},
	twice => 1,
	after => sub {
		sql(q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE usename = 'alice' AND query ~ 'omni_refresh\('}) })
	for 'cancel', 'FOR UPDATE';

# What an ended worker has left behind. The next one must settle it: at once what it can.

my $sending_call = sub {
	$omni->fault('hang');
	my $call = call();
	$omni->wait_for_requests(1);
	return (job(q{status = 'sending'}), $call);
};
my $sending_job = sub {
	$omni->fault('hang');
	my $id = queue();
	$omni->wait_for_requests(1);
	return job(q{status = 'sending'}, $id);
};
for my $last ('COMMIT', 'ROLLBACK')
{
	hold('a call that was being sent when the worker ended', 'FOR UPDATE', $last, 'unknown', $sending_call, after => \&end_worker,
		twice => 1, end => sub {
			my ($id, $call) = @_;
			is($call->{sqlstate}, '08007', '... its caller is told');
			is($omni->stats->{requests}, 1, '... and it is not sent again');
		});
	hold('a job that was being sent when the worker ended', 'FOR UPDATE', $last, 'accepted', $sending_job, after => \&end_worker,
		twice => 1, end => sub {
			my ($id) = @_;
			is($omni->stats->{requests}, 2, '... it is sent again');
			is(sql("SELECT string_agg(event, ' ' ORDER BY id) FROM omni_refresh_event WHERE job = $id"),
				'requested sending recovered sending accepted', '... as its events tell');
		});
}
hold('a call that was waiting when the worker ended', 'cancel', 'ROLLBACK', 'unknown|canceled|failed|accepted', $retry_after,
	after => \&end_worker, twice => 1);
hold('a call that was waiting when the worker ended', 'cancel', 'COMMIT', 'canceled', $retry_after, after => \&end_worker, twice => 1,
	end => says('\w{5}'));

my $copy = 0;
for my $case ([ 'pending', 'FOR UPDATE' ], [ 'sending', 'FOR SHARE' ], [ 'running', 'FOR UPDATE' ], [ 'pending', 'cancel' ])
{
	my ($status, $lock) = @$case;

	hold("a copy of another database's job that is $status", $lock, 'ROLLBACK', 'canceled',
		sub {
			$copy = sql("INSERT INTO omni_refresh_job (status, model_id, kind, server, origin, requested_by, requested_by_oid, requested_at, run_at, database)
				VALUES ('$status', '$model', 'schema', 'omni', 'on_commit', 'alice', 'alice'::regrole, now(), now(), 1) RETURNING id");
			return $copy;
		},
		after => \&end_worker, twice => 1, end => sub { is($omni->stats->{requests}, 0, '... and is not sent') });
}

# The lock of a prepared transaction outlives a crash of the server

$omni->reset;
my $id = $sending_job->();
sql("BEGIN; SELECT FROM omni_refresh_job WHERE id = $id FOR UPDATE; PREPARE TRANSACTION 'held'");
$node->stop('immediate');
$node->start;
others('a job that was being sent when the server crashed, held by a prepared transaction');
sql(q{ROLLBACK PREPARED 'held'});
OmniLife::until_true('... is sent again when that is over', sub { sql("SELECT status FROM omni_refresh_job WHERE id = $id") eq 'accepted' }, 15);

# The queue: what is pending, what waits for another attempt, and what is too late for any wait

for my $case ([ 'cancel', 'COMMIT', 'canceled' ], [ 'cancel', 'ROLLBACK', 'accepted' ], [ 'FOR UPDATE', 'COMMIT', 'accepted' ],
	[ 'FOR SHARE', 'ROLLBACK', 'accepted' ], [ 'DELETE', 'ROLLBACK', 'accepted' ])
{
	hold('a pending job of the queue', @$case,
		sub {
			configure(enabled => 'off');
			my $id = sql("SET omni_refresh.enabled = on; SET ROLE alice; SELECT id FROM omni_refresh_on_commit('$model')");
			return $id;
		},
		after => sub { configure(enabled => 'on') });
	hold('a job waits for another attempt', @$case,
		sub {
			$omni->fault('answer', status => 503, headers => { 'Retry-After' => 2 });
			return job(q{status = 'pending' AND attempts = 1}, queue());
		},
		after => \&until_due, twice => 1);
}
hold('a job for tomorrow, by a clock that was set back', $_, 'ROLLBACK', 'accepted',
	sub {
		configure(enabled => 'off');
		my $id = sql("SET omni_refresh.enabled = on; SET ROLE alice; SELECT id FROM omni_refresh_on_commit('$model')");
		sql("UPDATE omni_refresh_job SET run_at = now() + interval '1 day' WHERE id = $id");
		return $id;
	},
	after => sub { configure(enabled => 'on') }, twice => 1)
	for 'FOR UPDATE', 'cancel';

# An answer comes for a row that somebody has locked meanwhile.

sub answer_comes
{
	my ($name, $begin, $timeout) = @_;
	my $session = OmniLife::session($node, 'postgres');

	note($name);
	$_->reset for $omni, $other;
	$omni->fault('delay', delay => 1.5);
	$other->fault('delay', delay => 1.5);
	my ($id, $call) = $begin->();
	my $bob = OmniFault::begin($node, "SET omni_refresh.server = other; SELECT status FROM omni_refresh('" . $other->model . "');", user => 'bob');
	$_->wait_for_requests(1) for $omni, $other;
	$session->query("BEGIN; SELECT FROM omni_refresh_job WHERE id = $id FOR UPDATE");
	OmniFault::finish($bob);
	is($bob->{out}, 'accepted', "$name: another's answer, which comes at about the same time") or diag($bob->{err});
	cmp_ok($bob->{seconds}, '<', 5, '... is not kept');
	OmniLife::until_true('... the answer has come', sub { $omni->stats->{in_flight} == 0 });
	others('... meanwhile');
	is(sql("SELECT status FROM omni_refresh_job WHERE id = $id"), 'sending', '... the row says what is known');
	if ($timeout)
	{
		OmniFault::finish($call);
		is($call->{sqlstate}, '55P03', '... the caller is told when its time is over') or diag($call->{err});
		cmp_ok($call->{seconds}, '<', $timeout + 4, '... not much later');
		others('... and still');
	}
	$worker = OmniFault::worker($node);
	$session->query('ROLLBACK');
	$session->quit;
	OmniLife::until_true('... the outcome is written when the lock is gone', sub {
			sql("SELECT status FROM omni_refresh_job WHERE id = $id") eq 'accepted' }, 15);
	is(OmniFault::worker($node), $worker, '... by the same worker');
	is($omni->stats->{requests}, 1, '... and nothing was sent again');
	return if !$call || $timeout;
	OmniFault::finish($call);
	is($call->{out}, 'accepted', '... and the caller is told') or diag($call->{err});
	return;
}
answer_comes('a call whose row is held when the answer comes',
	sub { my $call = call(); $omni->wait_for_requests(1); return (job(q{status = 'sending'}), $call) });
answer_comes('a call whose row is held beyond its time',
	sub { my $call = call([ q{omni_refresh.call_timeout = '4 s'} ]); $omni->wait_for_requests(1); return (job(q{status = 'sending'}), $call) }, 4);
answer_comes('a job whose row is held when the answer comes',
	sub { my $id = queue(); $omni->wait_for_requests(1); return job(q{status = 'sending'}, $id) });

# A job that is followed: held before it is asked about, while it is, and when nobody wants to know any more

configure(track => 'on');
for my $lock ('FOR UPDATE', 'FOR SHARE')
{
	hold('a running job', $lock, 'COMMIT', 'completed', sub { return job(q{status = 'running'}, queue()) }, after => \&until_due, twice => 1);
}
hold('a running job that Omni is asked about', 'FOR UPDATE', 'ROLLBACK', 'completed',
	sub {
		$omni->fault('delay', delay => 1, path => 'jobs');
		my $id = queue();
		$omni->wait_for_requests(1, qr/jobs/);
		return job(q{status = 'running'}, $id);
	},
	after => sub { OmniLife::until_true('... the answer has come', sub { $omni->stats->{in_flight} == 0 }) }, twice => 1);
hold('a running job when following ends', 'FOR UPDATE', 'ROLLBACK', 'accepted',
	sub { $omni->set(job_seconds => 100); return job(q{status = 'running'}, queue()) },
	after => sub { configure(track => 'off') }, twice => 1);

# Old jobs that retention is to delete, and their events

for my $lock ('FOR UPDATE', 'FOR SHARE', 'events')
{
	hold('an old job', $lock, 'ROLLBACK', 'none',
		sub {
			my $id = job(q{status = 'accepted'}, queue());
			my $old = job(q{status = 'accepted'}, queue());
			sql("UPDATE omni_refresh_job SET requested_at = now() - interval '2 h', finished_at = now() - interval '2 h' WHERE id IN ($id, $old)");
			return $id;
		},
		after => sub {
			configure(retention => q{'1 min'});
			others('... meanwhile') for 1 .. 3;
		},
		twice => 1);
	configure(retention => q{'30 d'});
}

$node->stop('fast');
OmniLife::clean($node, 'the log is clean', qr/could not write down/, qr/could not look at the queue/, qr/terminating/,
	qr/the background worker ended before job/, qr/could not delete old jobs/, qr/HTTP status 401/, qr/database system was not properly shut down|interrupted/);
done_testing();
