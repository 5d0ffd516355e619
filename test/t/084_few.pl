# What is tried again only a few times, and what is waited for: a 500 that repeats, answers that are not Omni's,
# a server that does not exist, min_interval.

use strict;
use warnings FATAL => 'all';

use Test::More;

use OmniFault;
use OmniLife;
use OmniNeighbour;

OmniNeighbour::start('few');

sub story
{
	my ($id) = @_;
	return sql("SELECT string_agg(event, ' ' ORDER BY id) FROM omni_refresh_event WHERE job = $id");
}

# Lets a job begin its next attempt now.
sub hurry
{
	my ($id) = @_;
	return sql("UPDATE omni_refresh_job SET run_at = now() WHERE id = $id; SELECT omni_refresh_wake()");
}

sub attempted
{
	my ($id, $attempts) = @_;
	return until_true("attempt $attempts has failed", "attempts = $attempts AND status <> 'sending' FROM omni_refresh_job WHERE id = $id");
}

my @waits = (10, 60, 300, 900);
for my $case (
	[ 'HTTP 500', '08006', 'answer', status => 500, body => '{"detail": "Oops"}' ],
	[ 'HTTP 501', '08006', 'answer', status => 501 ],
	[ 'HTML', '08P01', 'answer', status => 200, body => '<html>Log in</html>' ],
	[ 'a redirect', '08P01', 'redirect' ],
	[ 'JSON of another form', '08P01', 'wrong_shape' ])
{
	my ($name, $state, $fault, %extras) = @$case;

	note($name);
	$omni->reset;
	$omni->fault($fault, %extras, times => -1);
	my $id = queue();
	for my $failure (1 .. 4)
	{
		attempted($id, $failure);
		my ($wait) = sql("SELECT extract(epoch FROM run_at - sent_at) FROM omni_refresh_job WHERE id = $id");
		my $expected = $waits[$failure - 1];
		ok($wait > $expected * 0.7 && $wait < $expected * 1.25 + 10, "... and the next is about $expected s later") or diag($wait);
		hurry($id);
	}
	until_true("$name, five times: the job has failed", "status = 'failed' AND error ~ '^$state' FROM omni_refresh_job WHERE id = $id");
	is(story($id), 'sending attempt_failed ' x 5 . 'failed', '... as the events tell');
}

# In a row: any other end of an attempt begins the count anew.

$omni->reset;
$omni->fault('answer', status => 500, times => 4);
$omni->fault('answer', status => 503, headers => { 'Retry-After' => 300 });
$omni->fault('answer', status => 500, times => 4);
OmniFault::server($node, 'later', url => $omni->http, key => 'later', rate_limit => 0);
$omni->set(key => 'later');
my $id = queue(undef, 'omni_refresh.server = later');
for my $attempt (1 .. 4, 5, 6 .. 9)
{
	attempted($id, $attempt);
	if ($attempt == 5)
	{
		end_worker();			# which has throttled the key for as long as Omni has asked
		sql(q{DROP USER MAPPING FOR PUBLIC SERVER later; CREATE USER MAPPING FOR PUBLIC SERVER later OPTIONS (api_key 'even-later')});
		$omni->set(key => 'even-later');
	}
	hurry($id);
}
ends($id, 'accepted', 'four 500, a 503, four 500: the tenth attempt is made');
$omni->set(key => $omni->key);

# Calls are not repeated for an answer that is not Omni's.

$omni->reset;
$omni->fault('wrong_shape');
my $call = OmniFault::call($node, "SELECT omni_refresh('$model');");
is($call->{sqlstate}, '08P01', 'a call fails at the first answer that is not one of Omni\'s');
is(scalar(() = $omni->requests), 1, '... and is not repeated');

# A server that is renamed or gone is waited for, and what is merged into a job waits with it.

$omni->reset;
sql('DELETE FROM omni_refresh_job');
configure(enabled => 'off');
my @ids = map { held("{s$_}") } 1 .. 3;
sql('ALTER SERVER omni RENAME TO elsewhere');
configure(enabled => 'on');
end_worker();
sql('SELECT omni_refresh_wake()');
until_true('jobs of a server that is renamed wait', qq{count(*) = 3 AND bool_and(status = 'merged' OR status = 'pending' AND run_at > now() + interval '4 min')
	FROM omni_refresh_job WHERE id IN (@{[ join ', ', @ids ]})});
like(sql("SELECT detail FROM omni_refresh_event WHERE event = 'waiting' AND job = $ids[0]"), qr/^42704: server "omni" does not exist/, '... as an event tells');
hurry($ids[0]);
until_true('they are looked at again', "run_at > now() + interval '4 min' FROM omni_refresh_job WHERE id = $ids[0]");
is(sql("SELECT count(*) FROM omni_refresh_event WHERE event = 'waiting' AND job = $ids[0]"), '1', '... which is told once');
is(scalar(() = $omni->requests), 0, 'nothing is sent');
sql('ALTER SERVER elsewhere RENAME TO omni');
hurry($ids[0]);
ends($_, 'accepted', 'when the server is back, they are sent') for @ids;
is(scalar(() = $omni->requests), 1, '... together');

$id = queue("schemas => '{gone}'", 'omni_refresh.enabled = on');
ends($id, 'accepted', 'a job of a server');
configure(enabled => 'off');
$id = held('{gone}');
sql(q{ALTER SERVER omni RENAME TO elsewhere});
configure(enabled => 'on', retry_for => '1s');
end_worker();
sql('SELECT pg_sleep(1.1), omni_refresh_wake()');
until_true('a server that stays away longer than retry_for', "status = 'failed' AND error ~ '^42704' FROM omni_refresh_job WHERE id = $id");
sql(q{ALTER SERVER elsewhere RENAME TO omni});

# min_interval

configure(min_interval => '5min', retry_for => '24h');
end_worker();
$omni->reset;
sql('DELETE FROM omni_refresh_job');
ends(queue(), 'accepted', 'the first request goes at once');
$id = queue();
until_true('the second is told to wait', "count(*) = 1 FROM omni_refresh_event WHERE job = $id AND event = 'waiting' AND detail ~ 'min_interval'");
is(story($id), 'waiting', '... once');
is(sql("SELECT status, run_at > now() + interval '4 min' FROM omni_refresh_job WHERE id = $id"), 'pending|t', '... and waits');

OmniNeighbour::finish();
