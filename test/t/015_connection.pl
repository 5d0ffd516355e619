# A host may have an address that does not answer, and a server may end a connection while requests are
# on it: every request arrives, once.

use strict;
use warnings FATAL => 'all';

use File::Basename qw(dirname);
use File::Spec;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniProxy;

my $omni = OmniAPI->start;
my $model = $omni->model;
my @options = (ca_file => $omni->ca, key => $omni->key, rate_limit => 0);
my $library = File::Spec->rel2abs(PostgreSQL::Test::Utils::tempdir) . '/name_lookup.so';
my $source = File::Spec->rel2abs(dirname(__FILE__) . '/../shim/name_lookup.c');
my $has_library = system(($ENV{CC} // 'cc') . " -shared -fPIC -o '$library' '$source' -ldl >/dev/null 2>&1") == 0;
my ($node, %fronts);
{
	local $ENV{LD_PRELOAD} = join ' ', $has_library ? $library : (), $ENV{LD_PRELOAD} // ();
	$node = OmniFault::node('connection', conf => "max_connections = 100\nomni_refresh.min_interval = 0\nomni_refresh.max_in_flight = 100\n");
}

END { my $rc = $?; $_->stop foreach values %fronts; $omni->stop if $omni; $? = $rc; }

# Two addresses, of which the first hangs

SKIP:
{
	skip 'test/shim/name_lookup.c cannot be compiled', 4 unless $has_library;

	OmniFault::server($node, 'two', url => $omni->url('second_address'), @options, connect_timeout => '4 s', timeout => '60 s');
	my $call = OmniFault::call($node, "SET omni_refresh.server = two; SET omni_refresh.call_timeout = '25 s'; SELECT status, attempts FROM omni_refresh('$model');");
	is($call->{out}, 'accepted|1', 'a host is reached by its second address, by the first attempt') or diag($call->{err});
	is(scalar(() = $omni->requests), 1, '... which sends one request');
	my $job = $node->safe_psql('postgres', "SET omni_refresh.server = two; SELECT id FROM omni_refresh_on_commit('$model')");
	ok($node->poll_query_until('postgres', "SELECT status = 'accepted' AND attempts = 1 FROM omni_refresh_job WHERE id = $job"),
		'... also of a job in the queue');
	is($node->safe_psql('postgres', "SELECT count(*) FROM omni_refresh_event WHERE event = 'attempt_failed'"), '0', 'no attempt has failed');
}

# A server that serves three requests of a connection, and refuses the others on it

SKIP:
{
	skip 'needs nginx', 1 if !defined OmniProxy::program('nginx');

	$fronts{nginx} = OmniProxy->nginx($omni, keepalive => '10m', requests => 3);
	foreach my $way (grep { /^h2/ } OmniProxy->ways)
	{
		$omni->reset;
		OmniFault::server($node, $way, url => $fronts{nginx}->url($way), @options);
		my $from = length slurp_file($node->logfile);
		my ($rounds, $calls, $jobs) = (4, 20, 20);
		foreach my $round (1 .. $rounds)
		{
			my @calls = map { OmniFault::begin($node, "SET omni_refresh.server = $way; SELECT status, attempts FROM omni_refresh('$model');") } 1 .. $calls;
			$node->safe_psql('postgres', "SET omni_refresh.server = $way; SELECT FROM generate_series(1, $jobs) i, omni_refresh_on_commit('$model', schemas => ARRAY['s' || i])")
				if $round == 1;
			OmniFault::finish($_) for @calls;
			is(scalar(grep { $_->{out} eq 'accepted|1' } @calls), $calls, "$way, round $round: each call takes one attempt")
				or diag(map { "$_->{out} $_->{err}\n" } @calls);
		}
		ok($node->poll_query_until('postgres', "SELECT bool_and(finished_at IS NOT NULL) FROM omni_refresh_job WHERE server = '$way'"),
			"$way: the jobs of the queue end");
		is($node->safe_psql('postgres', "SELECT count(*) FROM omni_refresh_job WHERE server = '$way' AND NOT (status = 'accepted' AND attempts = 1 OR status = 'merged')"),
			'0', '... by one attempt, too');
		my $sent = $node->safe_psql('postgres', "SELECT count(*) FROM omni_refresh_event JOIN omni_refresh_job j ON j.id = job
			WHERE server = '$way' AND event = 'sending'");
		is(scalar(() = $omni->requests(qr/refresh/)), $sent, '... and no request arrives twice');
		cmp_ok($fronts{nginx}->connections($way), '>', 3, '... though connections end');
		unlike(substr(slurp_file($node->logfile), $from), qr/outage/, '... which is no outage');
		is($node->safe_psql('postgres', "SELECT count(*), detail FROM omni_refresh_event WHERE event = 'attempt_failed' GROUP BY 2"), '', '... nor a failed attempt');
	}
}

unlike(slurp_file($node->logfile), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');
done_testing();
