# What may go better the next time is tried again: with patience, within call_timeout, and never
# beyond what the rate limit and Omni allow.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;

my $omni = OmniAPI->start;
my $node = OmniFault::node('main');
my $function = q{omni_refresh('} . $omni->model . q{')};
my $refresh = "SELECT * FROM $function;";

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);

# Makes a call with a server and a key of its own, so that no other call gets into its way.
my $count = 0;

sub fresh
{
	my (%options) = @_;
	my $name = 'fresh' . ++$count;
	my $timeout = delete $options{call_timeout} // '20 s';

	OmniFault::server($node, $name, url => $omni->http, key => $name, rate_limit => 0, %options);
	$omni->set(key => $name);
	return OmniFault::call($node,
		"SET omni_refresh.server = '$name'; SET omni_refresh.call_timeout = '$timeout'; $refresh");
}

# How often, and how many seconds after the first one, the requests of a key came
sub sent_at
{
	my ($key) = @_;
	my @times = map { $_->{time} }
		grep { $_->{headers}{authorization} eq "Bearer $key" } $omni->requests(qr/refresh$/);
	return map { $_ - $times[0] } @times;
}

# Locked tables are waited for: 5 s, in a database of its own and in the background.
$node->safe_psql('postgres', 'CREATE DATABASE locked');
$node->safe_psql('locked', 'CREATE EXTENSION omni_refresh');
OmniFault::server($node, 'omni', url => $omni->http, key => 'locked', db => 'locked');
my $lock = $node->background_psql('locked');
$lock->query_safe('BEGIN; LOCK TABLE omni_refresh_event');
my $locked = OmniFault::begin($node, $refresh, db => 'locked');

# Retries

for my $status (500, 503)
{
	$omni->fault('answer', status => $status, body => '{"detail": "Later"}');
	my $call = fresh();
	is($call->{status}, 0, "a call outlives an answer with status $status") or diag($call->{err});
	is($call->{err}, '', '... without a word');
	is(OmniFault::story($node), 'accepted: sending attempt_failed sending accepted',
		'... but with events');
	is($node->safe_psql('postgres', q{
			SELECT attempts, error IS NULL, (SELECT string_agg(attempt || coalesce(':' || http_status, ''), ' ' ORDER BY id)
				FROM omni_refresh_event WHERE job = j.id AND attempt IS NOT NULL)
			FROM omni_refresh_job j ORDER BY id DESC LIMIT 1}),
		"2|t|1 1:$status 2 2:200", '... that are numbered');
	my @times = sent_at("fresh$count");
	is(scalar(@times), 2, '... and two requests');
	cmp_ok($times[1], '<', 5, '... of which the second comes soon');
}
$omni->fault('reset');
is(fresh()->{status}, 0, 'a call outlives a connection that is reset');
is(OmniFault::story($node), 'accepted: sending attempt_failed sending accepted',
	'... by a second attempt');

# Retry-After

sub http_date
{
	my ($s, $m, $h, $day, $month, $year, $weekday) = gmtime $_[0];
	return sprintf '%s, %02d %s %d %02d:%02d:%02d GMT', (qw(Sun Mon Tue Wed Thu Fri Sat))[$weekday], $day,
		(qw(Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec))[$month], 1900 + $year, $h, $m, $s;
}
$omni->fault('answer', status => 429, body => '', headers => { 'Retry-After' => '2' });
is(fresh()->{status}, 0, 'Retry-After in seconds');
my @times = sent_at("fresh$count");
cmp_ok($times[-1], '>=', 2, '... is a floor');
is(scalar(@times), 2, '... for one attempt');
my $then = time + 3;
$omni->fault('answer', status => 503, body => '', headers => { 'Retry-After' => http_date($then) });
is(fresh()->{status}, 0, 'Retry-After as a date');
cmp_ok(($omni->requests)[-1]->{time}, '>=', $then, '... is a floor, too');
for my $value ('soon', '-5', http_date(time - 100), '')
{
	$omni->fault('answer', status => 503, body => '', headers => { 'Retry-After' => $value });
	is(fresh()->{status}, 0, "Retry-After: \"$value\" does no harm");
	cmp_ok((sent_at("fresh$count"))[1], '<', 5, '... nor delays anything');
}
for my $value (3000, 9999999999, http_date(time + 3000))
{
	$omni->fault('answer', status => 503, body => '', headers => { 'Retry-After' => $value });
	my $call = fresh();
	is($call->{sqlstate}, '08006', "Retry-After: $value, beyond call_timeout, fails");
	cmp_ok($call->{seconds}, '<', 5, '... at once');
	is(scalar(sent_at("fresh$count")), 1, '... after one attempt');
}

# The error that tells most is kept

$omni->fault('answer', status => 503, body => '{"detail": "out for lunch"}', headers => { 'Retry-After' => '1' });
$omni->fault('hang', times => -1);
my $kept = fresh(call_timeout => '1500 ms');
is($kept->{sqlstate}, '08006', 'a last attempt that has too little time');
like($kept->{message}, qr/HTTP status 503/, '... leaves the caller the error that says why') or diag($kept->{err});
like($node->safe_psql('postgres', 'SELECT error FROM omni_refresh_job ORDER BY id DESC LIMIT 1'), qr/out for lunch/,
	'... and the job');
like($node->safe_psql('postgres', q{SELECT string_agg(detail, '|' ORDER BY id) FROM omni_refresh_event
	WHERE job = (SELECT max(id) FROM omni_refresh_job) AND attempt IS NOT NULL}), qr/HTTP status 503.*timed out/s, '... while the events have all');
$omni->reset;

# The end of call_timeout

$omni->fault('answer', status => 500, body => '', times => -1);
my $call = fresh(call_timeout => '1500 ms');
is($call->{sqlstate}, '08006', 'at the end of call_timeout the last error is raised');
cmp_ok($call->{seconds}, '<', 5, '... in time');
like(OmniFault::story($node), qr/^failed:( sending attempt_failed)+ failed$/, '... and recorded');
is($node->safe_psql('postgres', 'SELECT attempts FROM omni_refresh_job ORDER BY id DESC LIMIT 1'),
	scalar(sent_at("fresh$count")), '... with as many attempts as there were requests');
$call = fresh(call_timeout => '1 ms');
like($call->{sqlstate}, qr/^08/, 'even a millisecond gives a clear error');
$omni->reset;

# Our own limit, before Omni has to say anything

$node->safe_psql('postgres', 'CREATE DATABASE other');
$node->safe_psql('other', 'CREATE EXTENSION omni_refresh');
$omni->set(key => 'shared');
my @shared = (url => $omni->http, key => 'shared', rate_limit => 3);
OmniFault::server($node, 'shared', @shared);
OmniFault::server($node, 'shared', @shared, db => 'other');
OmniFault::server($node, 'generous', @shared, rate_limit => 5);
my $use = 'SET omni_refresh.call_timeout = \'5 s\'; SET omni_refresh.server = ';

$omni->fault('answer', status => 500, body => '');
is(OmniFault::call($node, "$use shared; $refresh", db => 'other')->{status}, 0,
	'two attempts of a limit of three');
is(OmniFault::call($node, "$use shared; $refresh")->{status}, 0, 'one in another database');
for my $db ('postgres', 'other')
{
	$call = OmniFault::call($node, "$use shared; $refresh", db => $db);
	is($call->{sqlstate}, '53000', "there is no fourth, asked in $db");
	like($call->{detail}, qr/not sent/, '... which was not sent');
	like($call->{hint}, qr/3 requests a minute/, '... because of the limit');
	cmp_ok($call->{seconds}, '<', 4, '... as one hears at once');
	is(OmniFault::story($node, $db), 'failed: failed', '... and is on record');
}
is(OmniFault::call($node, "$use generous; $refresh")->{status}, 0,
	'a server with a higher limit has more');
is(OmniFault::call($node, "$use generous; $refresh")->{status}, 0, '... of what is shared');
is(OmniFault::call($node, "$use generous; $refresh")->{sqlstate}, '53000', '... and no more');
my $worker = OmniFault::worker($node);
$node->safe_psql('postgres', "SELECT pg_terminate_backend($worker, 10000)");
is(OmniFault::call($node, "$use shared; $refresh")->{sqlstate}, '53000', 'a new worker knows the count');
isnt(OmniFault::worker($node), $worker, '... though it is new');
is(scalar(sent_at('shared')), 5, 'Omni has got no request too many');
is(OmniFault::call($node, "$use omni; $refresh")->{sqlstate}, '28000', 'another key is free to be used');

# When Omni says no

$omni->set(key => 'busy', rate_limit => 1, rate_window => 1, retry_after => 'seconds');
OmniFault::server($node, 'busy', url => $omni->http, key => 'busy', rate_limit => 0);
OmniFault::server($node, 'busy', url => $omni->http, key => 'busy', rate_limit => 0, db => 'other');
is(OmniFault::call($node, "$use busy; $refresh $refresh")->{status}, 0, 'Omni\'s limit is waited for');
$omni->set(rate_window => 1000);
$call = OmniFault::call($node, "$use busy; $refresh");
is($call->{sqlstate}, '53000', '... but not beyond call_timeout');
is($call->{detail}, 'Omni says: Rate limit exceeded', "... with Omni's words");
my $sent = sent_at('busy');
$call = OmniFault::call($node, "$use busy; $refresh", db => 'other');
is($call->{sqlstate}, '53000', 'nobody else asks with this key until then');
is(scalar(sent_at('busy')), $sent, '... indeed');
$omni->reset;

# Warnings

$call = OmniFault::call($node, <<EOF);
SET omni_refresh.on_failure = warning;
SELECT id IS NOT NULL, status, attempts, left(error, 6)
FROM omni_refresh('00000000-0000-0000-0000-000000000000');
EOF
is("$call->{status} $call->{out}", '0 t|failed|1|42704:', 'a failed call that warns returns the row');
is("$call->{sqlstate} $call->{detail}", '42704 Omni says: No such model', '... and warns like the error');
like($call->{err}, qr/WARNING/, '... by a warning');
$call = OmniFault::call($node, q{SET omni_refresh.on_failure = warning; SELECT omni_refresh(NULL)});
is("$call->{status} $call->{sqlstate}", '3 22004', 'a mistake of the caller is still an error');

$call = OmniFault::call($node, "BEGIN; CREATE TABLE fresh (i int); $refresh ROLLBACK");
is("$call->{status} $call->{sqlstate}", '0 01000', 'changes that are not committed are warned of');
like($call->{hint}, qr/Commit before/, '... with a hint');
is(OmniFault::story($node), 'accepted: sending accepted', 'no rollback undoes the record');
$call = OmniFault::call($node, "BEGIN; SELECT count(*) FROM pg_class; $refresh COMMIT");
is("$call->{status} $call->{err}", '0 ', 'without changes there is no warning');

# Locks

OmniFault::finish($locked);
is($locked->{sqlstate}, '55P03', 'a lock on the tables makes a call fail');
like($locked->{detail}, qr/Nothing was sent/, '... and nothing was sent');
cmp_ok($locked->{seconds}, '<', 15, '... soon enough');
$lock->query_safe('COMMIT');
$lock->quit;
is(scalar(sent_at('locked')), 0, 'Omni has not heard of it');

$lock = $node->background_psql('postgres');
$lock->query_safe('BEGIN; LOCK TABLE omni_refresh_event');
my $requests = $omni->requests;
my $late = OmniFault::begin($node, "SET omni_refresh.call_timeout = '200 ms'; $refresh", app => 'late');
OmniFault::finish($late);
is($late->{sqlstate}, '55P03', 'a call whose time is up before the lock goes fails');
$lock->query_safe('COMMIT');
$lock->quit;
is(scalar($omni->requests), $requests, '... and was not sent');

done_testing();
