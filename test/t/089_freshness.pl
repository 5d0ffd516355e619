# The view omni_refresh_freshness: what it says of each model, to whom, and at what price.

use strict;
use warnings FATAL => 'all';

use JSON::PP;
use OmniFault;
use OmniTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $test = OmniTest->new('freshness', 'omni_refresh.min_interval = 0', 'autovacuum = off');
my ($node, $omni) = ($test->node, $test->omni);
my $model = $omni->model;

# The rows that a role sees, as it describes them
sub rows
{
	my ($columns, $role) = @_;

	return $test->sql("SELECT concat_ws(' ', $columns) FROM omni_refresh_freshness ORDER BY server, model_id, branch_id NULLS FIRST, kind", undef, $role);
}

# Writes jobs down, as if they had been: (status, number, how long ago they came to their end, more columns)
sub insert
{
	my ($status, $number, $age, %more) = @_;
	my %columns = (status => "'$status'", model_id => "'$model'", kind => "'schema'", server => "'omni'", origin => "'on_commit'",
		requested_by => 'current_user', requested_by_oid => '10', requested_at => "now() - interval '$age'", run_at => "now() - interval '$age'",
		database => '1', $status =~ /^(pending|sending|running)$/ ? () : (finished_at => "now() - interval '$age'"), %more);

	$columns{requested_by_oid} = "coalesce(to_regrole($columns{requested_by})::oid, 10)";
	$test->sql('INSERT INTO omni_refresh_job (' . join(', ', sort keys %columns) . ') SELECT '
		. join(', ', map { $columns{$_} } sort keys %columns) . " FROM generate_series(1, $number) AS i");
	return;
}

sub clear
{
	$test->sql('TRUNCATE omni_refresh_job, omni_refresh_event');
	return;
}

$test->sql(q{
	CREATE ROLE loader LOGIN; CREATE ROLE other LOGIN; CREATE ROLE team; CREATE ROLE member LOGIN; GRANT team TO member;
	CREATE ROLE monitor LOGIN; GRANT pg_monitor TO monitor;});

# What happens to jobs

is(rows('server'), '', 'without jobs, there is nothing to say');
is($test->sql(q{SELECT string_agg(attname || ' ' || format_type(atttypid, -1), ', ' ORDER BY attnum) FROM pg_attribute WHERE attrelid = 'omni_refresh_freshness'::regclass}),
	'server text, model_id uuid, branch_id uuid, kind text, last_success timestamp with time zone, last_failure timestamp with time zone, last_error text, '
	. 'unfinished_since timestamp with time zone', 'these are the columns');
$test->call;
is(rows('server, model_id, branch_id, kind, last_failure, last_error, unfinished_since'), "omni $model schema", 'a refresh is of its server and model');
is(rows('last_success = (SELECT max(finished_at) FROM omni_refresh_job)'), 't', '... with the time of its success');
$omni->fault('answer', status => 404, body => '{"detail": "gone astray"}');
$test->failure;
is(rows('last_success < last_failure, last_failure = (SELECT max(finished_at) FROM omni_refresh_job)'), 't t', 'a failure is one more time');
like(rows('last_error'), qr/^42704: .*gone astray/s, '... with its error');
$test->call;
is(rows('last_success > last_failure, last_error IS NOT NULL'), 't t', '... which the next success leaves');
$test->sql("SELECT omni_refresh_cache('$model', 'hourly')");
is(rows('kind'), "cache\nschema", 'a reset of a cache is a row of its own');

# Which jobs count

for my $role (undef, 'monitor', 'loader')
{
	my $to = $role // 'a superuser';

	clear();
	insert('completed', 2, '5 days', requested_by => q{'loader'});
	insert('accepted', 1, '4 days', requested_by => q{'loader'});
	insert('failed', 1, '3 days', requested_by => q{'loader'}, error => q{'earlier'});
	insert('unknown', 1, '2 days', requested_by => q{'loader'}, error => q{'later'});
	insert($_, 1, '1 hour', requested_by => q{'loader'}, error => q{'none'}) for 'canceled', 'merged';
	is(rows(q{date_trunc('day', now() - last_success), date_trunc('day', now() - last_failure), last_error, unfinished_since}, $role), '4 days 2 days later',
		"the last success and the last failure, not what was canceled or merged, to $to");
	insert('failed', 1, '1 day', requested_by => q{'loader'});
	is(rows(q{date_trunc('day', now() - last_failure), last_error}, $role), '1 day', '... whose error is not that of an earlier one');
	insert($_->[0], 1, $_->[1], requested_by => q{'loader'}, $_->[2] ? (origin => q{'call'}) : ()) for [ 'sending', '3 h' ], [ 'pending', '2 h' ], [ 'running', '1 h' ];
	is(rows(q{date_trunc('hour', now() - unfinished_since)}, $role), '03:00:00', '... and since when something is unfinished');
	insert('pending', 1, '4 h', requested_by => q{'loader'}, origin => q{'call'});
	is(rows(q{date_trunc('hour', now() - unfinished_since)}, $role), '04:00:00', '... of a call, too');

	clear();
	my ($first, $second) = ('11111111-1111-1111-1111-111111111111', '22222222-2222-2222-2222-222222222222');
	for my $branch ('NULL', "'$first'", "'$second'")
	{
		insert('completed', 2, '1 h', requested_by => q{'loader'}, model_id => "'$_'", branch_id => $branch) for $first, $second;
	}
	insert('failed', 1, '1 h', requested_by => q{'loader'}, model_id => "'$first'", branch_id => 'NULL', server => q{'Other server'}, kind => q{'cache'});
	insert('running', 1, '1 h', requested_by => q{'loader'}, model_id => "'$second'");
	is(rows(q{left(server, 1), left(model_id::text, 1), COALESCE(left(branch_id::text, 1), '-'), kind, last_success IS NOT NULL, last_failure IS NOT NULL,
		unfinished_since IS NOT NULL}, $role), <<'ROWS' =~ s/\n\z//r, "each server, model, branch and kind has a row, to $to");
O 1 - cache f t f
o 1 - schema t f f
o 1 1 schema t f f
o 1 2 schema t f f
o 2 - schema t f t
o 2 1 schema t f f
o 2 2 schema t f f
ROWS
}

# To whom

clear();
insert('completed', 1, '1 day', requested_by => q{'loader'});
insert('completed', 1, '1 h', requested_by => q{'other'});
insert('failed', 1, '1 h', requested_by => q{'other'}, error => q{'secret'});
insert('running', 1, '1 h', requested_by => q{'other'});
insert('completed', 1, '1 h', requested_by => q{'team'}, model_id => 'gen_random_uuid()');
is(rows(q{now() - last_success >= '1 day', last_failure, last_error, unfinished_since}, 'loader'), 't', 'jobs of others say nothing');
is(rows(q{now() - last_success < '1 day', last_error, unfinished_since IS NOT NULL}, 'other'), 't secret t', '... but to themselves');
is(rows('last_error', 'member'), '', '... and a member sees those of a role');
is($test->sql('SELECT count(*) FROM omni_refresh_freshness', undef, $_->[0]), $_->[1], "... so $_->[0] sees as many models") for [ 'loader', 1 ], [ 'member', 1 ], [ 'monitor', 2 ];
is($test->sql('SET ROLE loader; CREATE TEMP VIEW omni_refresh_job AS SELECT 1; SELECT count(*) FROM omni_refresh_freshness'), '1', 'the search_path does not matter');
like(($test->outcome('DELETE FROM omni_refresh_freshness', undef, 'loader'))[1], qr/^ERROR:  (42501|55000): /, 'nobody writes it');

# Many

clear();
insert('accepted', 60000, '2 h', finished_at => q{now() - interval '2 h' - i * interval '40 s'}, model_id => q{md5((i % 5)::text)::uuid},
	branch_id => q{CASE WHEN i % 2 = 0 THEN md5('b')::uuid END}, requested_by => q{CASE i % 7 WHEN 0 THEN 'loader' ELSE 'other' END},
	status => q{('{completed,failed,accepted,canceled,unknown,merged}'::text[])[1 + i % 6]}, error => q{repeat('x', 200)});

# What a plan reads, all loops together: each scan of our tables as [kind, rows], from its JSON
sub scans
{
	my ($plan) = @_;
	my @scans = map { scans($_) } @{ $plan->{Plans} // [] };

	push @scans, [ $plan->{'Node Type'}, $plan->{'Actual Loops'} * ($plan->{'Actual Rows'} + ($plan->{'Rows Removed by Filter'} // 0)) ]
		if ($plan->{'Relation Name'} // '') =~ /^omni_refresh_/ && $plan->{'Actual Loops'};
	return @scans;
}

for my $state ('before they are analyzed', 'when they are analyzed', 'when they are vacuumed, too')
{
	$test->sql('ANALYZE omni_refresh_job') if $state =~ /when .*analyzed/;
	$test->sql('VACUUM omni_refresh_job') if $state =~ /vacuumed/;
	my ($rows, @scans) = (0, scans(decode_json($test->sql('EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT * FROM omni_refresh_freshness', undef, 'monitor'))->[0]{Plan}));
	$rows += $_->[1] for @scans;
	is(join(', ', grep { !/Index|Bitmap/ } map { $_->[0] } @scans), '', "the plan of a monitor reads jobs by their indexes $state");
	cmp_ok($rows, '<', 200, '... and a few of the 60,000');
	is($test->sql('SELECT count(*), min(last_success) = max(last_success) FROM omni_refresh_freshness', undef, 'monitor') =~ s/\|.*//r, '10', '... which are the right ones');
}
my $plain = q{SELECT server, model_id, branch_id, kind, max(finished_at) FILTER (WHERE status IN ('completed', 'accepted')), max(finished_at) FILTER (WHERE status IN ('failed', 'unknown'))
	FROM omni_refresh_job GROUP BY 1, 2, 3, 4};
my $view = 'SELECT server, model_id, branch_id, kind, last_success, last_failure FROM omni_refresh_freshness';
is($test->sql("SELECT count(*) FROM (($plain EXCEPT $view) UNION ALL ($view EXCEPT $plain)) AS differing", undef, $_), '0', "it agrees with the table, to $_")
	for 'monitor', 'loader', 'other', 'member';

$test->done;
