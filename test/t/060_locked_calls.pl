# The worker never waits for a row lock: whatever row somebody keeps locked, the calls and jobs of others
# go on, and the row itself comes to its end once the lock is gone, by the same worker. Here the row is
# that of a call, or one that an ended worker has left behind.

use strict;
use warnings FATAL => 'all';

use Test::More;

use OmniFault;
use OmniLife;
use OmniLock;

OmniLock::start('locked_calls');
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
				'sending recovered sending accepted', '... as its events tell');
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
OmniLife::until_true('... is sent again when that is over', sub { sql("SELECT status FROM omni_refresh_job WHERE id = $id") eq 'accepted' });

OmniLock::finish();
