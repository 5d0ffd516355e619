# doc/monitoring/ with the real exporter and the real Prometheus: all that it asks for is there, and each alert
# fires when it should.

use strict;
use warnings FATAL => 'all';

use CPAN::Meta::YAML;
use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniMonitoring;
use OmniProxy;
use OmniSQL qw(sql);

my @missing = grep { !defined OmniProxy::program($_) } qw(prometheus-sql-exporter prometheus promtool);
plan skip_all => "needs @missing" if @missing;

my $omni = OmniAPI->start;
my $node = OmniFault::node('monitoring', conf => "omni_refresh.min_interval = 0\n");
my $model = $omni->model;
my ($exporter, $prometheus);

END { my $rc = $?; $_->stop for grep { $_ } $prometheus, $exporter, $omni; $? = $rc; }

# Waits until a function returns true, and calls another one meanwhile.
sub wait_for
{
	my ($name, $function, $meanwhile) = @_;
	my $end = time + $PostgreSQL::Test::Utils::timeout_default;
	my $result;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	until ($result = $function->() or time > $end)
	{
		$meanwhile->() if $meanwhile;
		select(undef, undef, undef, 0.1);
	}
	return ok($result, $name);
}

sub is_firing
{
	my ($alert) = @_;
	return scalar grep { $_ eq $alert } split / /, $prometheus->firing;
}

sub fires
{
	my ($alert, $meanwhile) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return wait_for("$alert fires", sub { is_firing($alert) }, $meanwhile);
}

sub ends
{
	my ($alert, $meanwhile) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return wait_for('... and ends', sub { !is_firing($alert) }, $meanwhile);
}

# Some calls that fail soon, if they do, and without a word
sub call
{
	my ($server, $number) = @_;

	return OmniFault::call($node, "SET omni_refresh.server = $server; SET omni_refresh.call_timeout = '1 s';
		SET omni_refresh.on_failure = warning; SELECT omni_refresh('$model') FROM generate_series(1, $number)");
}

OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
OmniFault::server($node, 'slow', url => $omni->http, key => $omni->key, rate_limit => 1);
sql(q{CREATE ROLE omni_monitor LOGIN IN ROLE pg_monitor; REVOKE USAGE ON FOREIGN SERVER omni, slow FROM PUBLIC});
call('omni', 1);

# pgwatch's queries

my $pgwatch = CPAN::Meta::YAML->read_string(OmniMonitoring::file('pgwatch.yaml'))->[0];
is(join(' ', sort keys %{ $pgwatch->{presets}{omni_refresh}{metrics} }), join(' ', sort keys %{ $pgwatch->{metrics} }),
	'the preset for pgwatch has all metrics');
foreach my $name (sort keys %{ $pgwatch->{metrics} })
{
	my $row = decode_json(sql("SELECT row_to_json(m) FROM ($pgwatch->{metrics}{$name}{sqls}{15}) AS m ORDER BY tag_server DESC LIMIT 1",
			extra_params => [ '-U', 'omni_monitor' ]));
	ok($row->{epoch_ns} > 1e18 && defined $row->{tag_server}, "pgwatch can read $name");
	is_deeply([ grep { !/^tag_/ && defined $row->{$_} && $row->{$_} !~ /^-?[\d.]+(e-?\d+)?$/ } sort keys %$row ], [], '... which are numbers');
}

# The exporter's queries

$exporter = OmniMonitoring->exporter($omni, $node, 'omni_monitor');
$prometheus = OmniMonitoring->prometheus($omni, $exporter);
wait_for('the exporter exports', sub { my $metrics = $exporter->metrics; $metrics->{sql_omni_refresh_freshness} && $metrics->{sql_exporter_last_scrape_failed} });
my $metrics = $exporter->metrics;
my $queries = CPAN::Meta::YAML->read_string(replace_lists(OmniMonitoring::file('sql_exporter.yml')))->[0]{jobs}[0]{queries};
foreach my $query (@$queries)
{
	is_deeply([ sort keys %{ $metrics->{"sql_$query->{name}"} } ], [ sort @{ $query->{values} } ], "the exporter exports $query->{name}");
}

is(join("\n", grep { /"level":"(?:warn|error)"/ } split /\n/, $exporter->log('output')), '', '... and complains of nothing');

# CPAN::Meta::YAML knows no lists in brackets.
sub replace_lists
{
	my ($text) = @_;

	$text =~ s/labels: \[.*\]/labels: ""/g;
	return $text;
}

# Checks that an expression uses only what the exporter exports, that Prometheus accepts it, and that it finds
# something where it must.
sub check
{
	my ($name, $expression, $finds) = @_;
	my @selectors = $expression =~ /(sql_\w+)(?:\{([^}]*)\})?/g;
	my @unknown;

	while (my ($metric, $labels) = splice @selectors, 0, 2)
	{
		my ($operator, $pattern) = ($labels // '') =~ /\bcol(=~?)"([^"]*)"/;
		push @unknown, $metric if !$metrics->{$metric};
		next if !defined $pattern;
		foreach my $column ($operator eq '=' ? quotemeta $pattern : split /\|/, $pattern)
		{
			push @unknown, "$metric $column" if !grep { /^$column$/ } keys %{ $metrics->{$metric} // {} };
		}
	}
	is("@unknown", '', "$name uses what is exported");
	my $result = $prometheus->ask('query', query => $expression);
	ok(defined $result, '... and is valid');
	wait_for('... and finds something', sub { @{ $prometheus->ask('query', query => $expression)->{result} } }) if $finds;
	return;
}

# The rules

my $alerts = PostgreSQL::Test::Utils::tempdir() . '/alerts.yml';
append_to_file($alerts, OmniMonitoring::file('alerts.yml'));
command_like([ 'promtool', 'check', 'rules', $alerts ], qr/SUCCESS: 7 rules found/, 'promtool accepts the rules');
wait_for('Prometheus loads the rules, and reads the metrics',
	sub { @{ ($prometheus->ask('query', query => 'sql_omni_refresh_freshness') // {})->{result} // [] } });
my @rules = map { @{ $_->{rules} } } @{ $prometheus->ask('rules')->{groups} };
is(scalar @rules, 7, 'Prometheus has them all');
foreach my $rule (@rules)
{
	check($rule->{name}, $rule->{query}, 0);
	is_deeply([ grep { !$_ } $rule->{duration}, $rule->{labels}{severity}, @{ $rule->{annotations} }{qw(summary description)} ],
		[], '... and has all that an alert needs');
}

# The dashboard

my $dashboard = decode_json(OmniMonitoring::file('grafana.json'));
my (%ids, @places);
foreach my $panel (@{ $dashboard->{panels} })
{
	my %place = %{ $panel->{gridPos} };
	ok(!$ids{ $panel->{id} }++ && $place{x} + $place{w} <= 24
			&& !grep({ $place{x} < $_->{x} + $_->{w} && $_->{x} < $place{x} + $place{w} && $place{y} < $_->{y} + $_->{h} && $_->{y} < $place{y} + $place{h} } @places),
		"panel \"$panel->{title}\" has a place of its own");
	push @places, \%place;
	foreach my $target (@{ $panel->{targets} })
	{
		my $expression = $target->{expr};

		$expression =~ s/\$__rate_interval/4s/g;
		$expression =~ s/\$(?:database|server)\b/.*/g;
		check("panel \"$panel->{title}\"", $expression, 1);
	}
}
foreach my $variable (grep { $_->{type} eq 'query' } @{ $dashboard->{templating}{list} })
{
	my ($metric) = $variable->{query} =~ /^label_values\((sql_\w+).*, $variable->{name}\)$/;
	ok($metrics->{ $metric // '' }, "variable $variable->{name} is made from what is exported");
}

# All is well, as far as there is news

wait_for('no alert fires while all is well', sub { $prometheus->firing eq '' });

# An outage: the counters tell it

$omni->fault('answer', status => 503, times => -1);
my $queued = sql("SELECT id FROM omni_refresh_on_commit('$model')");
fires('OmniRefreshOutage', sub { call('omni', 1) });
is(sql("SELECT status FROM omni_refresh_job WHERE id = $queued") =~ /^(?:pending|sending)$/, 1, '... while what is queued is tried again');
fires('OmniRefreshJobsFailed', sub { call('omni', 1) });
fires('OmniRefreshModelStale');
$omni->fault('none');
sql("SELECT omni_refresh_wait($queued)");
ends('OmniRefreshModelStale', sub { call('omni', 1) });
ends('OmniRefreshOutage', sub { call('omni', 1) });
ends('OmniRefreshJobsFailed');

# A rate limit

fires('OmniRefreshRateLimited', sub { call('slow', 20) });
ends('OmniRefreshRateLimited');

# ... keeps calls back to their end, which have failed then, until one succeeds
fires('OmniRefreshModelStale');
sql(q{ALTER SERVER slow OPTIONS (SET rate_limit '0')});
ends('OmniRefreshModelStale', sub { call('slow', 1) });

# Jobs that nobody carries out

sql('SELECT pg_terminate_backend(' . OmniFault::worker($node) . ', 60000)');
sql(q{INSERT INTO omni_refresh_job (status, model_id, kind, server, origin, requested_by, requested_by_oid, requested_at, run_at, database)
	SELECT 'pending', model_id, kind, server, 'on_commit', requested_by, requested_by_oid, now() - interval '1 day', now() - interval '1 day', database
	FROM omni_refresh_job WHERE status = 'accepted' LIMIT 1});
fires($_) foreach qw(OmniRefreshNoWorker OmniRefreshQueueStuck OmniRefreshModelStale);
is(sql('SELECT omni_refresh_wake()'), 't', 'what the runbook says');
ends($_) foreach qw(OmniRefreshNoWorker OmniRefreshQueueStuck OmniRefreshModelStale);

# Nobody looks

sql('REVOKE pg_monitor FROM omni_monitor');
fires('OmniRefreshNotMonitored');
sql('GRANT pg_monitor TO omni_monitor');
ends('OmniRefreshNotMonitored');
$exporter->stop;
fires('OmniRefreshNotMonitored');

done_testing();
