# What Omni, or whoever answers in its place, may say to a call, and what becomes of it.

use strict;
use warnings FATAL => 'all';

use JSON::PP;
use OmniTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $test = OmniTest->new('answer');
my ($node, $omni) = ($test->node, $test->omni);
my $model = $omni->model;

$test->call;
my $worker = $test->workers;

my $argument_hint = 'Check the arguments; branch is required when the connection\'s setting "Branch-based '
	. 'schema refresh" is on, and must be left out when it is off.';
my $key_hint = 'Check the API key in the user mapping: it may have been revoked, or belong to another instance.';
my $role_hint = 'Modelers may refresh only on connections with exactly one shared model; '
	. 'Connection Admins on every connection they administer.';
my $model_hint = 'Check the model\'s uuid, and that the server\'s "base_url" is the instance that has it.';
my $other_hint = 'Omni does not document this status; it may come from a proxy in between.';
my $shape_hint = 'Check that the server\'s "base_url" is the login host of an Omni instance, '
	. 'and what proxies are in between.';

my $arrived_hint = 'Omni has got the request: look there before you send it again.';

# An error as psql shows it, and as a job has it
sub error
{
	my ($sqlstate, $message, $detail, $hint) = @_;
	return join("\n", "ERROR:  $sqlstate: $message", defined $detail ? "DETAIL:  $detail" : (),
		defined $hint ? "HINT:  $hint" : ());
}

# A call fails like this, once, and so says its job.
sub fails_with
{
	my ($what, $event, $status, @error) = @_;
	my $error = error(@error);
	my ($stderr, $job) = $test->failure;

	is($stderr, $error, "$what: the caller gets an error");
	is($job->{status}, 'failed', "$what: the job has failed");
	is($job->{error}, $error =~ s/^ERROR:  //r, "$what: the job has the error");
	is($job->{job_id}, undef, "$what: the job has no id of Omni's");
	is($test->events($job->{id}), "sending attempt 1\n$event attempt 1, HTTP $status, took time\nfailed",
		"$what: the events tell it");
	is(scalar($omni->requests), 1, "$what: the request is not sent again");
	return;
}

# Refusals, in each of the shapes that they may have
foreach my $shape (1 .. 3)
{
	foreach my $case (
		[ 401, 'Unauthorized', '28000', { key => 'another' }, 'Missing, invalid or revoked API key', $key_hint ],
		[ 403, 'Forbidden', '42501', { forbidden => 1 }, 'This API key lacks the permission', $role_hint ],
		[ 400, 'Bad Request', '22023', { branch_based_refresh => 1 },
		  'branch_id: required, branch-based schema refresh is on', $argument_hint ])
	{
		my ($status, $phrase, $sqlstate, $setting, $text, $hint) = @$case;
		$omni->reset;
		$omni->set(error_shape => $shape, %$setting);
		fails_with("$status of shape $shape", 'refused', $status, $sqlstate,
			qq{server "omni" refused the refresh: HTTP status $status},
			'Omni says: ' . ($shape == 3 ? "$phrase: " : '') . $text, $hint);
	}
}
$omni->reset;
my $no_model = '00000000-0000-0000-0000-000000000000';
is(($test->outcome("SELECT * FROM omni_refresh('$no_model')"))[1],
	error('42704', 'server "omni" refused the refresh: HTTP status 404', 'Omni says: No such model', $model_hint),
	'a model that does not exist is an undefined object');

foreach my $status (402, 405, 409, 410, 418, 422, 499)
{
	$omni->reset;
	$omni->fault('answer', status => $status, body => '{"detail": "No."}');
	fails_with($status, 'refused', $status, '38000', qq{server "omni" refused the refresh: HTTP status $status},
		'Omni says: No.', $other_hint);
}

# What a refusal says, whatever it is
foreach my $case (
	[ 'nothing', '', undef ],
	[ 'JSON without a text', '{"status": 409}', 'The answer reads: {"status": 409}' ],
	[ 'JSON with another type', '{"detail": {"a": 1}}', 'The answer reads: {"detail": {"a": 1}}' ],
	[ 'an error only', '{"error": "Conflict"}', 'Omni says: Conflict' ],
	[ 'a message only', '{"message": "Busy"}', 'Omni says: Busy' ],
	[ 'HTML', "<html>\r\n\t<b>No</b>\r\n</html>\r\n", 'The answer reads: <html> <b>No</b> </html>' ],
	[ 'control characters', "a\0b\e[31mc\x7f", 'The answer reads: a b [31mc' ],
	[ 'text', "Gr\xf6\xdfe \x{8868}", "The answer reads: Gr\xc3\xb6\xc3\x9fe \xe8\xa1\xa8" ],
	[ 'no text at all', "\x{dcff}\x{dcfe}", 'The answer reads: ??' ],	# surrogates stand for bytes
	[ 'nothing that can be seen', "\x{200b}\x{2028}\0 \e", undef ],
	[ 'another language', '{"detail": "Gr\u00f6\u00dfe \u8868"}', "Omni says: Gr\xc3\xb6\xc3\x9fe \xe8\xa1\xa8" ],
	[ 'several lines', '{"detail": "one\ntwo"}', "Omni says: one two" ])
{
	my ($what, $body, $detail) = @$case;
	$omni->reset;
	$omni->fault('answer', status => 409, body => $body);
	my ($stderr, $job) = $test->failure;
	utf8::encode(my $written = $job->{error});
	is($stderr, error('38000', 'server "omni" refused the refresh: HTTP status 409', $detail, $other_hint), "a refusal may say $what");
	is($written, $stderr =~ s/^ERROR:  //r, "the job has it: $what");
}
foreach my $case ([ 'JSON', '{"detail": "' . "\x{8868}" x 5000 . '"}' ], [ 'text', "\x{8868}" x 5000 ])
{
	my ($what, $body) = @$case;
	$omni->reset;
	$omni->fault('answer', status => 409, body => $body);
	my ($stderr, $job) = $test->failure;
	like($stderr, qr/^DETAIL:  .{900,1100}\.\.\.$/m, "a long $what is cut off");
	ok(utf8::decode(my $copy = $stderr), "a long $what is cut off between characters");
}

# What is not an answer of Omni's
foreach my $case (
	[ 'empty', {}, 'The answer is not JSON: it is empty.', 'arrived' ],
	[ 'answer', { status => 200, body => '<html></html>' }, qr/^The answer is not JSON: .*</ ],
	[ 'truncated', {}, qr/^The answer is not JSON: .*comp/, 'arrived' ],
	[ 'nested', {}, 'The answer is not JSON: it is nested more than 32 levels deep.', 'arrived' ],
	[ 'not_utf8', {}, 'The answer is not JSON: it is not valid UTF-8.', 'arrived' ],
	[ 'nul', {}, 'The answer is not JSON: it has a NUL byte.', 'arrived' ],
	[ 'nul_escape', {}, qr/^The answer is not JSON: it reads .*\.\.\.\.$/, 'arrived' ],
	[ 'answer', { status => 200, body => '{"status": "running"} x' }, qr/^The answer is not JSON: /, 'arrived' ],
	[ 'answer', { status => 200, body => '{"status": "\ud800"}' }, qr/^The answer is not JSON: /, 'arrived' ],
	[ 'huge', {}, 'The answer is longer than 1 MB.', 'arrived' ],
	map { [ 'answer', { status => 200, body => $_ }, 'The answer is JSON, but does not have the expected form.' ] }
		'[1, 2]', '"running"', 'null', '{}', '{"status": null}', '{"status": 200}', '{"status": ["running"]}',
		'{"jobId": "00000000-0000-0000-0000-000000000000"}', '[{"status": "running"}]',
		map { qq({"status": "queued", "jobId": $_}) } '""', '"nonsense"', '7')
{
	my ($fault, $extras, $detail, $arrived) = @$case;
	$omni->reset;
	$omni->fault($fault, %$extras);
	my ($stderr, $job) = $test->failure;
	my $hint = $arrived ? $arrived_hint : $shape_hint;
	my $expected = ref $detail ? qr/$detail/ : qr/^\Q$detail\E$/;
	my ($found) = $stderr =~ /^DETAIL:  (.*)$/m;
	my $what = $extras->{body} // $fault;
	like($stderr, qr/^ERROR:  08P01: unexpected response from server "omni"$/m, "an answer is refused: $what");
	like($found // '', $expected, "and the reason told: $what");
	like($stderr, qr/^HINT:  \Q$hint\E$/m, "and a hint given: $what");
	is($job->{status}, $arrived ? 'unknown' : 'failed', "the job has this end: $what");
	is(scalar($omni->requests), 1, "the request is not sent again: $what");
}
$omni->reset;
$omni->fault('answer', status => 204);
like(($test->failure)[0], qr/^ERROR:  08P01: .*\nDETAIL:  The server answered with HTTP status 204\.$/m, "204 is not an answer of Omni's");
foreach my $case (
	[ 'redirect', { location => $omni->http . '/elsewhere?a=b' }, 'The server redirects to ' . $omni->http . '.' ],
	[ 'redirect', { location => 'https://elsewhere.example/login' },
	  'The server redirects to https://elsewhere.example.' ],
	[ 'redirect', { location => '/login' }, 'The server redirects to ' . $omni->https . '.' ],
	(map { [ 'answer', { status => $_, headers => { Location => $omni->http . '/elsewhere' } },
	   'The server redirects to ' . $omni->http . '.' ] } 302, 303, 307, 308),
	[ 'answer', { status => 304 }, 'The server answered with HTTP status 304.' ])
{
	my ($fault, $extras, $detail) = @$case;
	$omni->reset;
	$omni->fault($fault, %$extras);
	my ($stderr) = $test->failure;
	is($stderr, error('08P01', 'unexpected response from server "omni"', $detail,
		'Redirects are not followed, since the API key is for one host only; '
		. 'set "base_url" to the login host of the instance.'), "a redirect is an error: $detail");
	is(scalar($omni->requests), 1, "a redirect is not followed: $detail");
}

# With an id that is none, Omni works on the job all the same, and nobody can follow it.
foreach my $id ('""', '"nonsense"', '"' . '0' x 32 . '"', '"{00000000-0000-0000-0000-000000000000}"',
	'"00000000-0000-0000-0000-0000000000000"', '7', '{"id": 7}')
{
	foreach my $case ([ 'running', 'accepted' ], [ 'In_Progress', 'accepted' ], [ 'completed', 'completed' ])
	{
		$omni->reset;
		$omni->fault('answer', status => 200, body => qq({"status": "$case->[0]", "jobId": $id}));
		my $job = $test->call;
		is($job->{status}, $case->[1], "when Omni says $case->[0] of job $id, the job is $case->[1]");
		is($job->{job_id}, undef, '... without an id');
		is($job->{error}, undef, '... or an error');
		my ($text) = $id =~ /^"(.*)"$/;
		my ($detail) = $test->sql("SELECT detail FROM omni_refresh_event WHERE job = $job->{id} ORDER BY id DESC LIMIT 1") =~ /(.*)/;
		my $expected = defined $text && $text ne '' ? "Omni's jobId is no uuid, so that the job cannot be followed; it reads $text" :
			defined $text ? "Omni's jobId is no uuid, so that the job cannot be followed; it is empty." :
			"Omni's jobId is no text, so that the job cannot be followed.";
		like($detail, qr/^\Q$expected\E/, '... as the event says');
	}
}

# What Omni says about the job
foreach my $case (
	[ 'running', undef, 'accepted' ], [ 'completed', undef, 'completed' ],
	[ 'COMPLETED', '{"status": "COMPLETED"}', 'completed' ], [ 'queued', '{"status": "queued"}', 'accepted' ],
	[ 'an id of null', '{"status": "running", "jobId": null}', 'accepted' ])
{
	my ($what, $body, $status) = @$case;
	$omni->reset;
	defined $body ? $omni->fault('answer', status => 200, body => $body) : $omni->set(refresh_status => $what);
	my $job = $test->call;
	is($job->{status}, $status, "when Omni says $what, the job is $status");
	is($test->events($job->{id}), "sending attempt 1\n$status attempt 1, HTTP 200, took time",
		"when Omni says $what, so do the events");
	is($test->sql("SELECT detail FROM omni_refresh_event WHERE job = $job->{id} AND event = '$status'"),
		($body // '') =~ /running|queued/ ? "Omni's answer has no jobId, so that the job cannot be followed." : '',
		'... which tell of an id that is missing if the job goes on');
	is($job->{error}, undef, "when Omni says $what, there is no error");
	is(defined $job->{job_id}, !defined $body, "when Omni gives an id, the job has it: $what");
}
$omni->reset;
$omni->set(job_id => 0);
my $job = $test->call;
is($job->{status}, 'accepted', 'an older instance that gives no id accepts a refresh, too');
is($job->{job_id}, undef, 'the job has no id then');

$omni->reset;
$omni->set(refresh_status => 'failed');
my ($stderr, $failed) = $test->failure;
is($stderr, error('38000', 'Omni could not refresh the model on server "omni"',
	'Omni accepted the request and reported the status "failed", without a reason.',
	'Look at the connection in Omni: it may not reach the database, or lack privileges there.'),
	'when Omni says failed, the call fails');
is($failed->{status}, 'failed', 'when Omni says failed, the job has failed');
ok(defined $failed->{job_id}, 'when Omni says failed, it has given an id');
is($test->events($failed->{id}), "sending attempt 1\nfailed attempt 1, HTTP 200, took time",
	'when Omni says failed, so do the events');

# A key that is sent back
foreach my $case ([ 'echo_key' ], [ 'redirect', location => 'https://elsewhere.example/' . $omni->key ],
	[ 'answer', status => 409, body => '<p>' . $omni->key . '</p>' ],
	map { [ 'answer', status => $_, body => $omni->key ] } 200, 409)
{
	$omni->reset;
	$omni->fault(@$case);
	my ($stderr, $job) = $test->failure;
	my $key = $omni->key;
	my $what = join(' ', @$case) =~ s/\Q$key\E/KEY/r;
	unlike("$stderr $job->{error}", qr/\Q$key\E/, "the key is not repeated: $what");
	like($stderr, qr/\[API key\]/, "something else is in its place: $what") unless $what =~ /^redirect/;
}
unlike($test->sql('TABLE omni_refresh_event'), qr/omni_osk_/, 'no event has the key');

# After all that
is($test->workers, $worker, 'the worker is still the same');
$omni->reset;
is($test->call->{status}, 'accepted', 'the next call succeeds');

$test->done;
