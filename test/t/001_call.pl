# A synchronous call, from SQL to Omni and back: what is asked of Omni, what is written down, and
# when.

use strict;
use warnings FATAL => 'all';

use JSON::PP;
use OmniTest;
use PostgreSQL::Test::Utils;
use Test::More;

# A proxy that the environment names is no business of ours.
$ENV{$_} = 'http://127.0.0.1:1' foreach qw(http_proxy https_proxy HTTPS_PROXY all_proxy ALL_PROXY);
my $test = OmniTest->new('call');
my ($node, $omni) = ($test->node, $test->omni);
my $user = $test->sql('SELECT current_user');
my ($model, $branch) = ($omni->model, $omni->branch);

# The job
my $job = $test->call;
is($job->{status}, 'accepted', 'Omni accepts a refresh');
like($job->{job_id}, qr/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/, 'Omni gives it an id');
my %expected = (
	model_id => $model, branch_id => undef, kind => 'schema', hard => JSON::PP::true,
	schemas => undef, tables => undef, policy => undef, reset_at => undef, server => 'omni',
	origin => 'call', requested_by => $user, called_by => $user, retry_of => undef, attempts => 1, merged_into => undef, error => undef);
is_deeply({ map { $_ => $job->{$_} } keys %expected }, \%expected, 'the row says what was asked for');
is_deeply($test->job, $job, 'the row that is returned is the row in the table');
is($test->sql(qq{
	SELECT requested_by_oid = current_user::regrole AND
		database = (SELECT oid FROM pg_database WHERE datname = current_database())
	FROM omni_refresh_job}), 't', 'the row names role and database by OID, too');
is($test->sql('SELECT requested_at <= sent_at AND run_at <= sent_at AND sent_at < finished_at
		AND finished_at <= clock_timestamp() AND requested_at > clock_timestamp() - interval \'1 h\'
	FROM omni_refresh_job'), 't', 'its times are in order');
is($test->events($job->{id}), "sending attempt 1\naccepted attempt 1, HTTP 200, took time",
	'its events are in order');
is($test->sql('
	SELECT bool_and(requested_by = current_user AND occurred_at >= before)
	FROM (SELECT *, lag(occurred_at, 1, occurred_at) OVER (ORDER BY id) AS before
		  FROM omni_refresh_event) AS events'), 't', 'they have their role and happen one after the other');
is($test->sql('
	SELECT bool_and(occurred_at = CASE event WHEN \'requested\' THEN requested_at WHEN \'sending\' THEN sent_at
									ELSE finished_at END)
	FROM omni_refresh_event AS event JOIN omni_refresh_job AS job ON event.job = job.id'), 't',
	'and when the job says so');

# The request
my ($request) = $omni->requests;
is($request->{method}, 'POST', 'a refresh is a POST');
is($request->{path}, "/api/v1/models/$model/refresh", 'the path names the model');
is($request->{query}, '', 'a plain call has no parameters');
is($request->{body}, '', 'a call has no body');
is($request->{tls}, JSON::PP::true, 'a call goes over TLS');
my $headers = $request->{headers};
is($headers->{authorization}, 'Bearer ' . $omni->key, 'the key is a bearer token');
is($headers->{accept}, 'application/json', 'JSON is asked for');
my ($version) = split / /, $test->sql('SHOW server_version');
like($headers->{'user-agent'}, qr/^omni_refresh\/\d+(\.\d+)+ \(PostgreSQL \Q$version\E.*; libcurl \d+(\.\d+)+\)$/,
	'Omni learns who calls');
is($headers->{'content-length'}, '0', 'the body that is not there has no length');
is(join(' ', sort keys %$headers), 'accept authorization content-length host user-agent',
	'there are no other headers');
is($test->sql('SELECT detail FROM omni_refresh_event WHERE event = \'sending\''),
	'POST ' . $omni->https . "/api/v1/models/$model/refresh", 'the event log has the URL');

# The parameters: names to values, decoded
sub parameters
{
	my ($query) = @_;
	my %parameters;

	foreach my $pair (split /&/, $query)
	{
		my ($name, $value) = map { s/\+/ /gr =~ s/%([0-9A-Fa-f]{2})/chr hex $1/ger } split /=/, $pair, 2;
		fail("parameter $name is repeated") if exists $parameters{$name};
		utf8::decode($value) or fail("parameter $name is UTF-8");
		$parameters{$name} = $value;
	}
	return \%parameters;
}

foreach my $case (
	[ 'hard => true', 't', { hard_refresh => 'true' } ],
	[ 'hard => false', 'f', { hard_refresh => 'false' } ],
	[ "schemas => '{public}'", 'f', { hard_refresh => 'false', schemas => 'public' } ],
	[ "tables => '{orders,items}'", 'f', { hard_refresh => 'false', tables => 'orders,items' } ],
	[ "schemas => '{a,b}', tables => '{c}'", 'f', { hard_refresh => 'false', schemas => 'a,b', tables => 'c' } ],
	[ "schemas => '{a}', hard => false", 'f', { hard_refresh => 'false', schemas => 'a' } ],
	[ "schemas => '[5:7]={a,b,c}'", 'f', { hard_refresh => 'false', schemas => 'a,b,c' } ],
	[ "schemas => '{b,a,b,b,A,a,c}'", 'f', { hard_refresh => 'false', schemas => 'b,a,A,c' } ],
	[ "schemas => NULL, tables => NULL, hard => NULL", 't', {} ])
{
	my ($arguments, $hard, $parameters) = @$case;
	$omni->reset;
	my $job = $test->call($arguments);
	is_deeply(parameters(($omni->requests)[0]{query}), $parameters, "Omni is asked for $arguments");
	is($test->sql("SELECT hard, array_to_string(schemas, ','), array_to_string(tables, ',')
			FROM omni_refresh_job WHERE id = $job->{id}"),
		join('|', $hard, $parameters->{schemas} // '', $parameters->{tables} // ''),
		"the row has what is in effect for $arguments");
}

# Names that need encoding, as they are
my @names = ('a b', ' a ', 'a&b', 'a=b&hard_refresh=true', '100%', '%2C', 'a+b', 'sales_*', '?', '#1', 'a/b', 'a;b',
	'"Q"', "it's", 'back\\slash', '{curly}', '[a-z]', "tab\tnew\nline", "Gr\x{f6}\x{df}e", "\x{8868}",
	"\x{1f600}", "e\x{301}", '~-_.!$()@:');
my $list = 'ARRAY[' . join(', ', map { my $name = s/'/''/gr; utf8::encode($name); "'$name'" } @names) . ']';
$omni->reset;
$test->call("schemas => $list, tables => $list");
my $query = ($omni->requests)[0]{query};
like($query, qr/^[!-~]+$/, 'a query is printable ASCII');
is_deeply(parameters($query),
	{ hard_refresh => 'false', schemas => join(',', @names), tables => join(',', @names) },
	'any name arrives as it was written');


# As much as a URL can hold, and a byte more
my $path = "/api/v1/models/$model/refresh?hard_refresh=false";
my $most = 7700 - length "$path&tables=";
my $encoded = int($most / 3);
my $rest = $most % 3;
foreach my $case (
	[ 'one name', "tables => ARRAY[repeat('x', %s)]", $most ],
	[ 'schemas', "schemas => ARRAY[repeat('x', %s)]", $most - 1 ],
	[ 'characters that are encoded', "tables => ARRAY[repeat('/', $encoded) || repeat('x', %s)]", $rest ],
	[ 'others that are', "tables => ARRAY[repeat('\x{e9}', 1000) || repeat('x', %s)]", $most - 6000 ],
	[ 'commas', "tables => ARRAY['a', 'b', repeat('x', %s)]", $most - 8 ],
	[ 'both lists', "schemas => ARRAY[repeat('s', 3000)], tables => ARRAY[repeat('t', %s)]", $most - 3009 ],
	[ 'a branch', "branch => '$branch', tables => ARRAY[repeat('x', %s)]", $most - length "&branch_id=$branch" ],
	[ 'duplicates', "tables => array_fill(repeat('y', 90), ARRAY[9000]) || repeat('x', %s)", $most - 93 ])
{
	my ($what, $format, $length) = @$case;
	utf8::encode($format);
	$omni->reset;
	$omni->set(branch_based_refresh => $what eq 'a branch' ? 1 : 0);
	$test->call(sprintf $format, $length);
	my ($request) = $omni->requests;
	is(length "$request->{path}?$request->{query}", 7700, "as much as fits is sent: $what");
	my $last = $test->job->{id};
	my $arguments = sprintf $format, $length + 1;
	foreach my $function ('omni_refresh', 'omni_refresh_on_commit')
	{
		is(($test->outcome("SELECT $function('$model', $arguments)"))[1], join("\n",
			'ERROR:  54000: the names in schemas and tables are too long for one request',
			'DETAIL:  The path and the query of its URL would have 7701 bytes, and may have 7700.',
			'HINT:  For a soft refresh of the whole model, leave out schemas and tables and set hard to false.'),
			"a byte more is refused by $function: $what");
	}
	is(scalar($omni->requests), 1, "... not sent: $what");
	is($test->job->{id}, $last, "... and not written down: $what");
}
$omni->reset;
my ($stderr) = $test->failure("tables => ARRAY[repeat('x', 9000000)]");
like($stderr, qr/^ERROR:  54000: .*\nDETAIL:  .*\nHINT:  For a soft/, 'names that are far too long are refused alike');
is(scalar($omni->requests), 0, 'nothing is sent for them');

# Branches
$omni->reset;
$omni->set(branch_based_refresh => 1);
$job = $test->call("branch => upper('$branch')::uuid");
is_deeply(parameters(($omni->requests)[0]{query}), { branch_id => $branch }, 'Omni is told the branch');
is($job->{branch_id}, $branch, 'the row has the branch');
$test->call("'$branch', false, ARRAY['s'], ARRAY['t']");
is_deeply(parameters(($omni->requests)[1]{query}),
	{ branch_id => $branch, hard_refresh => 'false', schemas => 's', tables => 't' },
	'arguments may be given by position, and all at once');

# One connection for all that, from some thirty sessions and one worker
my %connections = map { $_->{connection} => 1 } $omni->requests;
is_deeply([ keys %connections ], [ $request->{connection} ],
	'all sessions share one connection');

# The base URL with a path
$omni->reset;
foreach my $path ('/', '/api', '/api/')
{
	$test->sql("ALTER SERVER omni OPTIONS (SET base_url '" . $omni->https . "$path')");
	$test->call;
	is(($omni->requests)[-1]{path}, "/api/v1/models/$model/refresh", "the base URL may end in $path");
}

# What the caller does later does not matter.
my $id = $test->sql("BEGIN; SELECT id FROM omni_refresh('$model'); ROLLBACK");
is($test->job($id)->{status}, 'accepted', 'the row outlives a ROLLBACK');
like($test->events($id), qr/^sending.*\naccepted.*$/, 'so do the events');
$id = $test->sql("BEGIN; SAVEPOINT s; SELECT id FROM omni_refresh('$model'); ROLLBACK TO s; COMMIT");
is($test->job($id)->{status}, 'accepted', 'the row outlives a ROLLBACK TO SAVEPOINT');
foreach my $mode ('REPEATABLE READ', 'SERIALIZABLE', 'SERIALIZABLE READ ONLY DEFERRABLE', 'READ COMMITTED READ ONLY')
{
	$omni->reset;
	my ($first, $second, $seen) = split /\n/, $test->sql("
		BEGIN ISOLATION LEVEL $mode;
		SELECT count(*) FROM omni_refresh_job;
		SELECT status || id FROM omni_refresh('$model');
		SELECT count(*) FROM omni_refresh_job;
		COMMIT");
	my ($id) = $second =~ /^accepted(\d+)$/;
	ok(defined $id, "the row is returned in $mode");
	is($seen - $first, $mode =~ /COMMITTED/ ? 1 : 0, "a later statement sees it, or not, as $mode has it");
	is($test->job($id)->{status}, 'accepted', "the row of a call in $mode is there");
}
like(($test->outcome("CREATE TABLE t (); SELECT status FROM omni_refresh('$model')"))[1], qr/^$/,
	'a transaction that has written nothing gets no warning');
is_deeply([ $test->outcome("BEGIN; CREATE TABLE u (); SELECT status FROM omni_refresh('$model'); ROLLBACK") ],
	[ 'accepted', "WARNING:  01000: this transaction has made changes that Omni cannot see yet\n"
	  . 'HINT:  Commit before you call omni_refresh(), or call omni_refresh_on_commit().' ], 'a transaction that has written is warned');

# Inside of PL/pgSQL, where an error is caught
$omni->reset;
is(($test->outcome(qq{
	DO \$\$
	DECLARE
		job omni_refresh_job;
	BEGIN
		FOR i IN 1..3 LOOP
			BEGIN
				SELECT * FROM omni_refresh(CASE i WHEN 2 THEN gen_random_uuid() ELSE '$model' END) INTO job;
				RAISE NOTICE 'job %', job.status;
			EXCEPTION WHEN undefined_object THEN
				RAISE NOTICE 'error %', SQLERRM;
			END;
		END LOOP;
	END
	\$\$}))[1] =~ s/^NOTICE:  00000: //mgr, "job accepted\n"
	. qq{error server "omni" refused the refresh: HTTP status 404\njob accepted},
	'a caught error does no harm to the next call');
is(scalar($omni->requests), 3, 'each call is one request');

$test->done;
