# What comes over the wire in another form than expected. An answer that says that Omni has accepted a
# request counts, however it is wrapped; one that cannot be read is never followed by a second request.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

my $omni = OmniAPI->start;
my $node = OmniFault::node('wire', conf => "omni_refresh.min_interval = 0\n");
my ($model, $id) = ($omni->model, '11111111-2222-4333-8444-555555555555');
my $running = qq({"jobId": "$id", "status": "running"});
my $queue = "SELECT id FROM omni_refresh_on_commit('$model')";
my $refresh = "SELECT status, job_id FROM omni_refresh('$model');";
my $reset = "SELECT status FROM omni_refresh_cache('$model', 'hourly');";
my @options = (url => $omni->http, key => $omni->key, rate_limit => 0);

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

OmniFault::server($node, 'omni', @options, timeout => '60 s');
OmniFault::server($node, 'hasty', @options, timeout => '300 ms');

sub value
{
	my ($sql) = @_;
	return $node->safe_psql('postgres', $sql);
}

# Has the stand-in answer so.
sub answer
{
	my ($status, $body, %more) = @_;

	$omni->reset;
	$omni->fault('answer', path => 'refresh|cache_reset', times => -1, status => $status, body => $body, %more);
	return;
}

sub html { return (headers => { 'Content-Type' => 'text/html' }) }

# Queues a job, and returns its number, status and error once it is at its end.
sub queued
{
	my $job = value($queue);

	$node->poll_query_until('postgres', "SELECT finished_at IS NOT NULL FROM omni_refresh_job WHERE id = $job");
	return split /\|/, value("SELECT id, status, coalesce(error, '') FROM omni_refresh_job WHERE id = $job"), 3;
}

# Answers that Omni has accepted the request

sub accepted
{
	my ($name, $expected) = @_;
	my $call = OmniFault::call($node, $refresh);

	is($call->{out}, $expected // "accepted|$id", "accepted: $name") or diag($call->{err});
	is(scalar(() = $omni->requests), 1, '... once');
	is((queued())[1], 'accepted', '... also of a job in the queue');
	is(scalar(() = $omni->requests), 2, '... once');
	return;
}

for my $case ([ 201, $running ], [ 202, $running ], [ 203, $running ], [ 202, qq({"jobId": "$id"}) ])
{
	answer(@$case);
	accepted("HTTP $case->[0], $case->[1]");
}
answer(201, '{"status": "running"}');
accepted('HTTP 201 without an id', 'accepted|');
for my $encoding (qw(gzip x-gzip deflate identity))
{
	answer(200, $running, encoding => $encoding);
	accepted("as $encoding");
}
is((($omni->requests)[-1])->{headers}{'accept-encoding'}, undef, 'none of these is asked for');
answer(200, "\x{feff}$running");
accepted('a byte-order mark');
for my $note ('"\ud800"', '"\udc00\ud800 x"', '"a\u0000b"', '"\ud83d\ud83d\ude00"', '{"deep": ["\udfff", "\u0000"]}', '1' x 200_000, '-2.' . '3' x 200_000,
	'1e400000', '-7E-99999999', '["\\\\u0000 is none", "\"", 1e5, -0]')
{
	answer(200, qq({"note": $note, "jobId": "$id", "status": "running"}));
	accepted('a note of ' . substr($note, 0, 40));
}
answer(200, qq({"no\\u0000te": 1, "no\\u0000te" : "x", "jobId": "$id", "status": "running"}));
accepted('an odd name');
for my $case ([ 201, '{"success": true}' ], [ 200, '{"success": true, "cache_reset": {"id": "\ud800"}}' ],
	[ 200, '{"success": true}', encoding => 'gzip' ])
{
	answer(@$case);
	is(OmniFault::call($node, $reset)->{out}, 'completed', "a cache reset: @$case");
	is(scalar(() = $omni->requests), 1, '... once');
}

# Answers of the kind that means yes, which cannot be read

for my $case (
	[ 'half of an answer', 'running', 200, qq({"jobId": "$id", "status": "running") ],
	[ 'nothing', 'it is empty', 200, '' ],
	[ 'nothing of 204', 'HTTP status 204', 204, '' ],
	[ 'another encoding than UTF-8', 'not valid UTF-8', 200, qq({"note": "caf\x{dce9}", "status": "running"}) ],
	[ 'a NUL', 'NUL byte', 202, "{\"status\": \"running\", \"note\": \"\0\"}" ],
	[ 'half a surrogate pair in the status', 'it reads {', 200, qq({"jobId": "$id", "status": "\\ud800"}) ],
	[ 'a NUL in the status', 'it reads {', 200, qq({"jobId": "$id", "status": "runn\\u0000ing"}) ],
	[ 'many levels', '32 levels', 200, '{"status": "running", "a": ' . '[' x 40 . ']' x 40 . '}' ],
	[ 'an encoding that is not one', 'encoded as "compress"', 200, $running, encoding => 'compress' ],
	[ 'a long encoding that is not one', 'encoded as "x-xxxx', 200, $running, headers => { 'Content-Encoding' => 'x-' . 'x' x 100 } ],
	[ 'gzip that is none', 'encoded as "gzip"', 200, $running, headers => { 'Content-Encoding' => 'gzip' } ])
{
	my ($name, $detail, @answer) = @$case;

	answer(@answer);
	my $call = OmniFault::call($node, $refresh);
	is($call->{sqlstate}, '08P01', "unreadable: $name") or diag($call->{err}, $call->{out});
	like($call->{detail}, qr/\Q$detail/, '... as the detail says');
	like($call->{hint}, qr/Omni has got the request/, '... and the hint');
	is(value('SELECT status FROM omni_refresh_job ORDER BY id DESC LIMIT 1'), 'unknown', '... so that the end of the job is unknown');
	is(scalar(() = $omni->requests), 1, '... and it is not sent again');
	my (undef, $status, $error) = queued();
	is($status, 'unknown', '... nor is one of the queue');
	like($error, qr/^08P01/, '... with the same error');
	is(scalar(() = $omni->requests), 2, '... indeed');
	OmniFault::call($node, $reset);
	is(value('SELECT status FROM omni_refresh_job ORDER BY id DESC LIMIT 1'), 'unknown', '... nor is a cache reset');
}

# The page of a proxy is not an answer of Omni's.

for my $case ([ 'a page', 200, '<html>Log in</html>', html() ], [ 'a page of type JSON', 200, " \n<html>Log in</html>" ],
	[ 'a page with a byte-order mark', 200, "\x{feff}<html>Log in</html>" ],
	[ 'a page of 202', 202, '<html>Wait</html>', html() ], [ 'text', 200, 'OK', headers => { 'Content-Type' => 'text/plain' } ],
	[ 'JSON of another form', 200, '{"state": "running"}' ])
{
	my ($name, @answer) = @$case;

	answer(@answer);
	my $call = OmniFault::call($node, $refresh);
	is($call->{sqlstate}, '08P01', "not Omni's: $name");
	is(value('SELECT status FROM omni_refresh_job ORDER BY id DESC LIMIT 1'), 'failed', '... the call has failed');
	my $job = value($queue);
	ok($node->poll_query_until('postgres', "SELECT status = 'pending' AND attempts = 1 AND run_at > requested_at FROM omni_refresh_job WHERE id = $job"),
		'... and a job of the queue is tried again');
	value("SELECT omni_refresh_cancel($job)");
}

# A 504 is a proxy's, behind which Omni may have got the request; so is 524.

for my $status (524, 504)
{
	answer($status, '<html>Gateway Timeout</html>', html());
	my $call = OmniFault::call($node, "SET omni_refresh.call_timeout = '1500 ms'; $refresh");
	is($call->{sqlstate}, '08006', "a $status that repeats");
	like($call->{hint}, qr/Omni may have got the request/, '... with a hint');
	like(OmniFault::story($node), qr/^unknown:( sending attempt_failed)+ unknown$/, '... leaves the end of the job unknown');
}
$omni->fault('answer', status => 400);
my $job = value($queue);
ok($node->poll_query_until('postgres', "SELECT status = 'pending' AND attempts > 0 FROM omni_refresh_job WHERE id = $job"),
	'a job of the queue is tried again');
value(q{SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
answer(400, '{"detail": "No."}');
value("UPDATE omni_refresh_job SET run_at = now() WHERE id = $job; SELECT omni_refresh_wake()");
ok($node->poll_query_until('postgres', "SELECT status = 'unknown' FROM omni_refresh_job WHERE id = $job"),
	'... by another worker, too, and its end is unknown even when Omni refuses it then');

# Interim answers are not answers.

for my $interim (100, 102, 103)
{
	my $line = "HTTP/1.1 $interim Interim\r\n" . ($interim == 103 ? "Retry-After: 3000\r\nLink: </x>; rel=preload\r\n" : '') . "\r\n";

	for my $hang (0, 1)
	{
		$omni->reset;
		$omni->fault('raw', data => $line, hang => $hang, times => -1);
		my $call = OmniFault::call($node, "SET omni_refresh.server = hasty; SET omni_refresh.call_timeout = '@{[ $hang ? 1 : 3 ]} s'; $refresh");
		my $name = "HTTP $interim, then " . ($hang ? 'silence' : 'the end of the connection');
		is($call->{sqlstate}, '08006', $name) or diag($call->{err});
		like($call->{message}, qr/waiting for the answer/, '... is no answer');
		like($call->{hint}, qr/Omni may have got the request/, '... so that nobody knows');
		is(value('SELECT count(*) FROM omni_refresh_event WHERE http_status IS NOT NULL AND job = (SELECT max(id) FROM omni_refresh_job)'), '0',
			'... and has no status');
		cmp_ok(scalar(() = $omni->requests), '>', 1, '... nor a Retry-After') if !$hang;
	}
	$omni->reset;
	$omni->fault('raw', data => $line . "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: " . length($running) . "\r\n\r\n$running");
	is(OmniFault::call($node, $refresh)->{out}, "accepted|$id", "HTTP $interim before an answer does no harm");
}

# An attempt whose answer is cut is one of an outage.

sub outages { my ($from) = @_; return grep { /LOG:  .*outage of/ } split /\n/, substr(slurp_file($node->logfile), $from) }

my $attempts = 0;
sub cut_answers
{
	my ($first, $next) = @_;

	value(q{SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
	$omni->reset;
	$omni->fault(@$_, times => 2) for $first, $next;
	my $from = length slurp_file($node->logfile);
	my ($job, $status) = queued();
	is($status, 'accepted', 'the job is accepted in the end');
	OmniLife::until_true('an outage has begun and ended', sub { outages($from) >= 2 });
	my @lines = outages($from);
	is(scalar @lines, 2, '... once');
	like($lines[0], qr/begins/, '... with the first attempt');
	like($lines[1], qr/has ended after \d+ s, failed attempts: 4$/, '... and with the answer after the last one');
	return;
}
my @cut = ('raw', data => "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{\"jobId\": ");
note('cut answers only');
cut_answers(\@cut, [ 'close_in_headers' ]);
note('cut answers within an outage');
cut_answers([ 'answer', status => 502 ], \@cut);

# Retry-After: a date is read by the clock of the server that gives it.

sub date
{
	my ($s, $m, $h, $day, $month, $year, $weekday) = gmtime $_[0];
	return sprintf '%s, %02d %s %d %02d:%02d:%02d GMT', (qw(Sun Mon Tue Wed Thu Fri Sat))[$weekday], $day,
		(qw(Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec))[$month], 1900 + $year, $h, $m, $s;
}

# How long after a 503 with these headers its job is tried again
my $keys = 0;
sub pause
{
	my (%headers) = @_;
	my $key = 'key' . ++$keys;

	OmniFault::server($node, $key, url => $omni->http, key => $key, rate_limit => 0);
	$omni->reset;
	$omni->set(key => $key);
	$omni->fault('answer', status => 503, body => '', headers => \%headers, times => -1);
	my $job = value("SET omni_refresh.server = $key; $queue");
	$node->poll_query_until('postgres', "SELECT attempts > 0 AND status = 'pending' FROM omni_refresh_job WHERE id = $job") or die;
	my $pause = value("SELECT round(extract(epoch FROM run_at - sent_at)) FROM omni_refresh_job WHERE id = $job");
	value("SELECT omni_refresh_cancel($job)");
	return $pause;
}
for my $year (1600, 1800, 1899, 1930, 1958, 1969, 1970, 2001)
{
	cmp_ok(pause('Retry-After' => "Wed, 01 Jan $year 00:00:00 GMT"), '<', 60, "Retry-After: a date of $year is no pause");
}
for my $value ('-1', '-' . '9' x 12, '9' x 30, '1.5e9', 'soon', '3000 s', '3000, 3000')
{
	cmp_ok(pause('Retry-After' => $value), '<', 60, "Retry-After: $value is no pause");
}
for my $off (-90_000, -7200, 0, 7200, 90_000)
{
	my $now = time + $off;
	cmp_ok(pause('Retry-After' => date($now + 5), Date => date($now)), '<', 60, "Retry-After: a date 5 s ahead of a clock that is $off s off");
	my $pause = pause('Retry-After' => date($now + 600), Date => date($now));
	ok($pause >= 600 && $pause < 700, '... and one 600 s ahead of it') or diag($pause);
	cmp_ok(pause('Retry-After' => date($now - 600), Date => date($now)), '<', 60, '... and one in its past');
}
my $pause = pause('Retry-After' => date(time + 600), Date => 'nonsense');
ok($pause > 500 && $pause < 700, 'Retry-After: a date without a date to compare it with is read by our clock') or diag($pause);
for my $value (90_000, '0' x 20 . '7200', 'Fri, 31 Dec 9999 23:59:59 GMT')
{
	$pause = pause('Retry-After' => $value);
	ok($pause >= 3600 && $pause < 3700, "Retry-After: $value is a pause of an hour") or diag($pause);
}

unlike(slurp_file($node->logfile), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');
done_testing();
