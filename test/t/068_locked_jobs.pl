# The worker never waits for a row lock: whatever row somebody keeps locked, the calls and jobs of others
# go on, and the row itself comes to its end once the lock is gone, by the same worker. Here the row is
# that of a job in the queue, of an answer that comes, of a job that is followed, or of an old one.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Utils;
use Test::More;

use OmniFault;
use OmniLife;
use OmniLock;

my $worker;

OmniLock::start('locked_jobs');
others('to begin with');

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

my $answers = 0;

sub answer_comes
{
	my ($name, $begin, $timeout) = @_;
	my $session = OmniLife::session($node, 'postgres');

	note($name);
	$_->reset for $omni, $other;
	my $file = $node->basedir . '/answer' . ++$answers;
	$_->fault('hold', file => $file) for $omni, $other;
	my ($id, $call) = $begin->();
	my $bob = OmniFault::begin($node, "SET omni_refresh.server = other; SELECT status FROM omni_refresh('" . $other->model . "');", user => 'bob');
	$_->wait_for_requests(1) for $omni, $other;
	$session->query("BEGIN; SELECT FROM omni_refresh_job WHERE id = $id FOR UPDATE");
	append_to_file($file, '');
	my $seconds = OmniLife::timed(sub { OmniFault::finish($bob) });
	is($bob->{out}, 'accepted', "$name: another's answer, which comes at about the same time") or diag($bob->{err});
	cmp_ok($seconds, '<', 4, '... is not kept');
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
			sql("SELECT status FROM omni_refresh_job WHERE id = $id") eq 'accepted' });
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

OmniLock::finish();
