# What is alike is merged, exactly: Omni is asked for all that was requested, for no more, and no more
# often than it takes.

use strict;
use warnings FATAL => 'all';

use JSON::PP;
use HTTP::Tiny;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

use OmniAPI;
use OmniFault;
use OmniLife;
use OmniMerge;

my $seed = $ENV{OMNI_MERGE_SEED} || int(Time::HiRes::time * 1000) % 2**31;
my $omni = OmniAPI->start;
my $node = OmniFault::node('merge', conf => "omni_refresh.min_interval = 0\nomni_refresh.max_in_flight = 16\n");
my $all_done = q{SELECT count(*) = 0 FROM omni_refresh_job WHERE status IN ('pending', 'sending')};

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

note("OMNI_MERGE_SEED=$seed");
srand($seed);
OmniFault::server($node, $_, url => $omni->http, key => $omni->key, rate_limit => 0) for 'omni', 'twin';
$node->safe_psql('postgres', 'CREATE ROLE one LOGIN; CREATE ROLE two LOGIN; GRANT one, two TO CURRENT_USER');

# In the configuration file this holds what is queued, or lets it go.
sub enable
{
	my ($value) = @_;

	$node->append_conf('postgresql.conf', "omni_refresh.enabled = $value\n");
	$node->reload;
	return;
}

# Begins anew, with so many models.
sub clear
{
	my ($models) = @_;

	enable('off');
	$omni->reset;
	$omni->set(models => $models);
	my $list = "/api/v1/models?pageSize=100";
	my (@ids, $cursor);
	do
	{
		my $page = decode_json(HTTP::Tiny->new(http_proxy => undef, proxy => undef)->get(
				$omni->http . $list . (defined $cursor ? '&cursor=' . $cursor =~ s/([+=])/sprintf '%%%02X', ord $1/ger : ''),
				{ headers => { Authorization => 'Bearer ' . $omni->key } })->{content});
		push @ids, map { $_->{id} } @{ $page->{records} };
		$cursor = $page->{pageInfo}{nextCursor};
	} while (defined $cursor);
	$node->safe_psql('postgres', 'TRUNCATE omni_refresh_job, omni_refresh_event');
	return @ids;
}

# Random requests for many models: each model and branch is a case of its own

for my $round (1 .. 3)
{
	my @models = clear(250);
	my (%requests, @sql);

	for my $model (@models)
	{
		for (1 .. 1 + rand 7)
		{
			my $request = OmniMerge::random_request($model);
			push @{ $requests{ $model . ' ' . ($request->{branch} // '') } }, $request;
			push @sql, [ rand, OmniMerge::sql($request) . ';' ];
		}
	}
	@sql = map { $_->[1] } sort { $a->[0] <=> $b->[0] } @sql;
	# in transactions of several
	for (my $i = 0; $i < @sql; $i += 1 + int rand 5) { $sql[$i] = "COMMIT; BEGIN; $sql[$i]" }
	$node->safe_psql('postgres', "SET client_min_messages = error; SET omni_refresh.enabled = on; BEGIN;\n" . join("\n", @sql) . "\nCOMMIT");
	enable('on');
	ok($node->poll_query_until('postgres', $all_done), 'round ' . $round . ': ' . @sql . ' requests');

	my %sent = OmniMerge::sent($omni);
	my %expected = map { $_ => [ OmniMerge::expected(@{ $requests{$_} }) ] } keys %requests;
	is_deeply(\%sent, \%expected, '... make just those that are needed')
		or diag("OMNI_MERGE_SEED=$seed");
	is($node->safe_psql('postgres', q{
			SELECT count(*) FROM omni_refresh_job AS job LEFT JOIN omni_refresh_job AS carrier ON carrier.id = job.merged_into
			WHERE (job.status = 'merged') <> (job.merged_into IS NOT NULL)
				OR job.status = 'merged' AND NOT (carrier.id < job.id AND carrier.model_id = job.model_id
					AND carrier.branch_id IS NOT DISTINCT FROM job.branch_id AND carrier.attempts = 1
					AND (carrier.hard >= job.hard) AND (carrier.schemas IS NULL OR job.schemas <@ carrier.schemas)
					AND (carrier.tables IS NULL OR job.tables <@ carrier.tables) AND job.finished_at <= carrier.finished_at
					AND (carrier.schemas IS NULL OR job.schemas IS NOT NULL) AND (carrier.tables IS NULL OR job.tables IS NOT NULL))}),
		'0', '... each is merged into an older one that does for it');
	is($node->safe_psql('postgres', q{
			SELECT count(*) FROM (
				SELECT job.status, string_agg(event, ' ' ORDER BY e.id) AS story
				FROM omni_refresh_job AS job LEFT JOIN omni_refresh_event AS e ON e.job = job.id GROUP BY job.id) AS s
			WHERE (story ~ CASE status WHEN 'merged' THEN '^$' WHEN 'accepted' THEN '^(merged )*sending accepted$'
				ELSE '^(merged )*sending refused failed$' END) IS DISTINCT FROM (status <> 'merged' OR NULL)}),
		'0', '... as the events of those that were sent tell');
	is($node->safe_psql('postgres', q{
			SELECT count(*) FROM omni_refresh_job AS carrier,
				LATERAL (SELECT string_agg(detail, '; ' ORDER BY id) AS told FROM omni_refresh_event WHERE job = carrier.id AND event = 'merged') AS e,
				LATERAL (SELECT count(*) AS n, min(id) AS first, max(id) AS last FROM omni_refresh_job WHERE merged_into = carrier.id) AS m
			WHERE carrier.status <> 'merged' AND n > 0 AND told !~ ('^carries out .*jobs? (' || first || '|.* ' || last || ')\M')
				OR n = 0 AND told IS NOT NULL}), '0', '... and which they carry out');
}

# What stays apart

my ($model) = clear(1);
my $queue = "SELECT FROM omni_refresh_on_commit('$model')";
$node->safe_psql('postgres', "SET omni_refresh.enabled = on; $queue; SET ROLE one; $queue; SET ROLE two; $queue; RESET ROLE;
	SET omni_refresh.server = twin; $queue; $queue");
enable('on');
ok($node->poll_query_until('postgres', $all_done), 'requests of three roles, and for another server');
is(scalar(() = $omni->requests(qr/refresh$/)), 4, '... are not merged with one another');

# One that is on its way has perhaps been too early for a newer one.

($model) = clear(1);
enable('on');
$omni->fault('hang');
$node->safe_psql('postgres', "$queue");
$omni->wait_for_requests(1, qr/refresh$/);
$node->safe_psql('postgres', $queue) for 1, 2;
$omni->wait_for_requests(2, qr/refresh$/);
ok($node->poll_query_until('postgres', q{SELECT bool_or(status = 'accepted') FROM omni_refresh_job}), 'what comes while one is on its way is sent');
is($node->safe_psql('postgres', q{SELECT string_agg(status, ' ' ORDER BY id) FROM omni_refresh_job WHERE status <> 'merged'}),
	$node->safe_psql('postgres', q{SELECT count(*) FROM omni_refresh_job WHERE status = 'merged'}) ? 'sending accepted' : 'sending accepted accepted', '... by itself');
$omni->fault('none');
ok($node->poll_query_until('postgres', $all_done), '... and the other one goes on');

# One that waits for another attempt may carry newer ones.

($model) = clear(1);
enable('on');
$omni->fault('answer', status => 503, headers => { 'Retry-After' => 1 });
$node->safe_psql('postgres', "SELECT FROM omni_refresh_on_commit('$model', schemas => '{a}')");
$omni->wait_for_requests(1, qr/refresh$/);
$node->safe_psql('postgres', "SELECT FROM omni_refresh_on_commit('$model', schemas => '{b}')");
ok($node->poll_query_until('postgres', $all_done), 'what waits for another attempt');
is($node->safe_psql('postgres', q{SELECT string_agg(concat_ws(' ', status, attempts, schemas), '; ' ORDER BY id) FROM omni_refresh_job}),
	'accepted 2 {a,b}; merged 0 {b}', '... carries newer ones out');

# Somebody is about to cancel the oldest, or another one: nobody waits, and nothing is lost.

for my $n (0, 1)
{
	($model) = clear(1);
	$node->safe_psql('postgres', "SET omni_refresh.enabled = on; " . join ';', map { "SELECT FROM omni_refresh_on_commit('$model', schemas => '{$_}')" } 'a' .. 'c');
	my $session = OmniLife::session($node, 'postgres');
	$session->query("BEGIN; UPDATE omni_refresh_job SET status = 'canceled', finished_at = now() WHERE id = (SELECT id FROM omni_refresh_job ORDER BY id OFFSET $n LIMIT 1)");
	enable('on');
	my $name = $n == 0 ? 'the oldest' : 'another one';
	$omni->wait_for_requests(1, qr/refresh$/);
	ok($node->poll_query_until('postgres', q{SELECT count(*) >= 1 FROM omni_refresh_job WHERE status = 'accepted'}), "while $name is locked, the others go on");
	$session->query('COMMIT');
	$session->quit;
	ok($node->poll_query_until('postgres', $all_done), '... and all come to an end');
	my %sent = OmniMerge::sent($omni);
	my $names = join ' ', map { @$_ } values %sent;
	like($names, qr/\b$_\b/, "... $_ is sent") for grep { $_ ne ($n == 0 ? 'a' : 'b') } 'a' .. 'c';
	is($node->safe_psql('postgres', q{SELECT count(*) FROM omni_refresh_job WHERE status = 'canceled'}), '1', '... but not what was canceled');
}

# Lists that would be too long together become the whole model, and then all else merges with it: a
# backlog of any length is one request.

($model) = clear(1);
$node->safe_psql('postgres', "SET omni_refresh.enabled = on;
	SELECT FROM omni_refresh_on_commit('$model', tables => '{t}');
	SELECT FROM omni_refresh_on_commit('$model', schemas => '{s}', tables => '{t}');
	SELECT count(omni_refresh_on_commit('$model', schemas => ARRAY(SELECT n || '_' || i || repeat('x', 50) FROM generate_series(1, 110) AS i))) FROM generate_series(1, 600) AS n");
enable('on');
ok($node->poll_query_until('postgres', $all_done), 'lists that would be too long together');
is_deeply([ OmniMerge::sent($omni) ], [ "$model ", ['soft'] ], '... are one soft refresh of the whole model, with all else that was asked for');
is($node->safe_psql('postgres', q{SELECT count(*), min(id) = min(id) FILTER (WHERE status <> 'merged') FROM omni_refresh_job WHERE status = 'merged' OR attempts = 1}),
	'602|t', '... and the oldest job carries it out');

# ... however many there are, so that nobody else's calls wait for what is done about them.

($model) = clear(1);
$node->safe_psql('postgres', "SET omni_refresh.enabled = on; SET ROLE one;
	SELECT count(omni_refresh_on_commit('$model', $_ => ARRAY(SELECT 'schema_of_tenant_' || n || '_' || i || '_' || md5(i::text) FROM generate_series(1, 110) AS i)))
	FROM generate_series(1, 300) AS n") for 'schemas', 'tables';
enable('on');
my $slowest = 0;
for (1 .. 10)
{
	my $took = OmniLife::timed(sub { $node->safe_psql('postgres', "SET omni_refresh.enabled = on; SET ROLE two; SELECT FROM omni_refresh('$model', schemas => '{of_two}')") });
	$slowest = $took if $took > $slowest;
}
note("the slowest call beside them took $slowest s");
ok($node->poll_query_until('postgres', $all_done), 'six hundred long lists');
cmp_ok(scalar(() = grep { ($_->{query} // '') !~ /of_two/ } $omni->requests(qr/refresh$/)), '<=', 4, '... make a few requests');
is($node->safe_psql('postgres', q{SELECT count(*) FROM omni_refresh_job WHERE requested_by = 'one' AND status NOT IN ('merged', 'accepted')}), '0', '... for all of them');

# A great many pairs

clear(1);
$node->safe_psql('postgres', q{SET omni_refresh.enabled = on;
	SELECT count(omni_refresh_on_commit(model, schemas => ARRAY[n::text]))
	FROM (SELECT gen_random_uuid() AS model FROM generate_series(1, 5000)) AS m, generate_series(1, 2) AS n});
enable('on');
my $seconds = OmniLife::timed(sub { $node->poll_query_until('postgres', q{SELECT count(*) = 5000 FROM omni_refresh_job WHERE status = 'merged'}) });
is($node->safe_psql('postgres', q{SELECT count(*) FROM omni_refresh_job WHERE status = 'merged'}), '5000', 'five thousand pairs are merged');
note("in $seconds s");

$node->stop('fast');
OmniLife::clean($node, 'the log is clean');
done_testing();
