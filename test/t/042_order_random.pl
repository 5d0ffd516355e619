# The order of refreshes and resets of the cache, in random streams of both: requests on commit, alone and
# several in a transaction, calls, cancellations, and faults, while workers are ended and the server
# crashes. What the stand-in has recorded tells when a request came, and the log for which job.
#
# OMNI_ORDER_SEED repeats what was drawn by lot, but not what becomes of it: that is up to the scheduler.

use strict;
use warnings FATAL => 'all';

use HTTP::Tiny;
use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

use OmniAPI;
use OmniFault;
use OmniLife;

my $seed = $ENV{OMNI_ORDER_SEED} || int(Time::HiRes::time * 1000) % 2**31;
my $job_seconds = 2.5;
my $omni = OmniAPI->start;
my $node = OmniFault::node('order_random', conf => <<END);
omni_refresh.track = on
omni_refresh.min_interval = 0
max_connections = 30
client_min_messages = error
timezone = UTC
END

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

note("OMNI_ORDER_SEED=$seed");
srand($seed);
$omni->set(job_seconds => $job_seconds);
OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0, timeout => '2 s');
$node->safe_psql('postgres', 'CREATE ROLE one LOGIN; CREATE ROLE two LOGIN');
my @models = map { $_->{id} } @{
	decode_json(HTTP::Tiny->new(http_proxy => undef, proxy => undef)->get($omni->http . '/api/v1/models',
			{ headers => { Authorization => 'Bearer ' . $omni->key } })->{content})->{records} };
splice @models, 2;

# Each request has a number. Refreshes name a table by it, and resets a policy by their role.

my (@requests, $transactions);

sub one_of { return $_[ rand @_ ] }

# Has the number of a job printed, and the time before it was requested.
sub told
{
	my ($request, $call) = @_;

	push @requests, $request;
	return "SELECT extract(epoch FROM clock_timestamp()) AS at \\gset\nSELECT 'job', $#requests, :at, id FROM $call;\n";
}

sub refresh
{
	my ($role, $model, $transaction, $function) = @_;
	my $n = @requests;
	my $arguments = rand() < 0.8 ? "tables => '{t$n}'" : "tables => '{t$n}', schemas => '{s$n}'";

	return told({ kind => 'refresh', role => $role, model => $model, transaction => $transaction }, ($function // 'omni_refresh_on_commit') . "('$model', $arguments)");
}

sub reset_cache
{
	my ($role, $model, $transaction) = @_;

	return told({ kind => 'reset', role => $role, model => $model, transaction => $transaction },
		"omni_refresh_cache_on_commit('$model', '${role}_" . one_of('p', 'q') . "')");
}

sub done
{
	my ($transaction) = @_;

	return "SELECT 'done', $transaction, extract(epoch FROM clock_timestamp());\n";
}

sub transaction
{
	my ($role) = @_;
	my $model = one_of(@models);
	my $n = ++$transactions;
	my $lot = rand;

	return refresh($role, $model, $n, 'omni_refresh') . done($n) if $lot < 0.1;
	return "SELECT omni_refresh_cache('$model', 'call');\n" if $lot < 0.15;
	return "SELECT 'canceled', omni_refresh_cancel(id) FROM omni_refresh_job WHERE status = 'pending' AND requested_by = current_user ORDER BY random() LIMIT 1;\n"
		if $lot < 0.25;
	my $sql = "BEGIN;\n";
	for (1 .. 1 + rand 4)
	{
		$sql .= rand() < 0.5 ? refresh($role, $model, $n) : reset_cache($role, $model, $n);
		$sql .= 'SELECT pg_sleep(' . rand(0.2) . ");\n" if rand() < 0.2;
	}
	return $sql . "COMMIT;\n" . done($n);
}

sub client
{
	my ($role) = @_;

	return OmniFault::begin($node, "\\set ON_ERROR_STOP 0\n"
		. join('', map { transaction($role) . 'SELECT pg_sleep(' . rand(0.15) . ");\n" } 1 .. 10), user => $role);
}

sub crash
{
	my $worker = OmniFault::worker($node);

	kill 'KILL', $worker if $worker;
	$node->poll_query_until('postgres', 'SELECT true');
	return;
}

my @disasters = (
	sub { $omni->fault('html_502', times => 3, path => one_of('refresh$', 'cache_reset', 'status$')) },
	sub { $omni->fault('close', times => 2, path => one_of('refresh$', 'cache_reset', '.')) },
	sub { $omni->fault('answer', times => 1, status => 400, path => 'refresh$') },
	sub { $node->append_conf('postgresql.conf', "omni_refresh.max_in_flight = 1\nomni_refresh.min_interval = '1 s'\n"); $node->reload },
	sub { $node->append_conf('postgresql.conf', "omni_refresh.max_in_flight = 4\nomni_refresh.min_interval = 0\n"); $node->reload },
	sub { $node->psql('postgres', q{SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'}) },
	\&crash);

# What the clients print
my (%jobs, %done);
my ($crashes, $end) = (0, Time::HiRes::time + 12);
for (my $wave = 0; $wave < 6 || Time::HiRes::time < $end; $wave++)
{
	my @clients = map { client($_) } 'one', 'two', 'one';
	my $disaster = one_of(@disasters);
	$crashes++ if $disaster == \&crash;
	select(undef, undef, undef, rand 0.5);
	$disaster->();
	for my $client (@clients)
	{
		OmniFault::finish($client);
		$jobs{$1} = { requested => $2, id => $3 } while $client->{out} =~ /^job\|(\d+)\|([\d.]+)\|(\d+)$/mg;
		$done{$1} = $2 while $client->{out} =~ /^done\|(\d+)\|([\d.]+)$/mg;
	}
	$node->poll_query_until('postgres', 'SELECT true') or die;
}

$omni->fault('none');
$node->append_conf('postgresql.conf', "omni_refresh.max_in_flight = 16\nomni_refresh.min_interval = 0\n");
$node->reload;
OmniLife::until_true('all comes to an end', sub { ($node->psql('postgres', 'SELECT omni_refresh_wake()'))[1] eq 'f' }, 120);

# What became of the jobs: by number, their carriers, their ends, and when they were sent

my %row;
for my $line (split /\n/, $node->safe_psql('postgres', q{
	SELECT id, coalesce(merged_into, id), status, requested_by, model_id, coalesce(policy, ''), extract(epoch FROM finished_at),
		(SELECT string_agg(extract(epoch FROM occurred_at)::text, ' ' ORDER BY id) FROM omni_refresh_event AS e WHERE job = j.id AND event = 'sending')
	FROM omni_refresh_job AS j}))
{
	my ($id, $carrier, $status, $role, $model, $policy, $finished, $sent) = split /\|/, $line, -1;
	$row{$id} = { id => $id, carrier => $carrier, status => $status, role => $role, model => $model, policy => $policy, finished => $finished, sent => [ split / /, $sent ] };
}
my $carrier = sub { my $job = $row{ $_[0] }; $job = $row{ $job->{carrier} } while $job->{carrier} != $job->{id}; return $job };

# By the log: the last attempt of a reset begins after the end of each refresh that its transaction, or an
# earlier one, has requested before it.

my $pairs = 0;
my @wrong;
my @known = grep { $jobs{$_} && defined $done{ $requests[$_]{transaction} } } 0 .. $#requests;
for my $n (grep { $requests[$_]{kind} eq 'reset' } @known)
{
	my $reset = $carrier->($jobs{$n}{id});
	my $sent = $reset->{sent}[-1] // next;		# canceled
	for my $m (grep { $requests[$_]{kind} eq 'refresh' && $requests[$_]{role} eq $requests[$n]{role} && $requests[$_]{model} eq $requests[$n]{model} } @known)
	{
		# of a transaction of its own, the reset may be returned an earlier job, whose number counts for others
		next if $requests[$m]{transaction} == $requests[$n]{transaction} ? $m > $n :
			$done{ $requests[$m]{transaction} } > $jobs{$n}{requested} || $jobs{$m}{id} > $jobs{$n}{id};
		my $refresh = $carrier->($jobs{$m}{id});
		$pairs++;
		push @wrong, "reset $jobs{$n}{id} (carrier $reset->{id}) was sent at $sent, and refresh $jobs{$m}{id} (carrier $refresh->{id}) ended at $refresh->{finished}"
			if $refresh->{finished} > $sent;
	}
}
is(join("\n", @wrong[ 0 .. ($#wrong < 9 ? $#wrong : 9) ]), '', 'no reset is sent before the end of a refresh that was requested before it') or diag("OMNI_ORDER_SEED=$seed");
cmp_ok($pairs, '>', 0, "... of $pairs pairs; " . @requests . " requests, $crashes crashes");

# By the record: no reset arrives while a refresh with a lower number runs that was committed before.

my @refreshes;
my $resets = 0;
@wrong = ();
for my $request (sort { $a->{time} <=> $b->{time} } $omni->requests)
{
	my ($model, $what) = $request->{path} =~ m{/models/([^/]*)/(.*)} or next;
	if ($what eq 'refresh')
	{
		next if $request->{status} ne '200';
		push @refreshes, { model => $model, time => $request->{time}, numbers => [ $request->{query} =~ /\bt(\d+)/g ] };
		next;
	}
	my ($role, $policy) = $what =~ /^cache_reset\/((one|two)_.)/ ? ($2, $1) : next;
	my @sent = map { my $job = $_; map { [ $_, $job ] } grep { $_ <= $request->{time} } @{ $job->{sent} } }
		grep { $_->{model} eq $model && $_->{policy} eq $policy } values %row;
	my ($sent, $reset) = @{ (sort { $b->[0] <=> $a->[0] } @sent)[0] };
	$resets++;
	for my $refresh (grep { $_->{model} eq $model && $_->{time} + $job_seconds > $request->{time} } @refreshes)
	{
		for my $n (grep { $requests[$_]{role} eq $role && $jobs{$_} } @{ $refresh->{numbers} })
		{
			my $committed = $done{ $requests[$n]{transaction} } // next;
			push @wrong, "reset $reset->{id}, sent at $sent, came at $request->{time}, and refresh $jobs{$n}{id} at $refresh->{time}"
				if $committed < $sent && $jobs{$n}{id} < $reset->{id} && $carrier->($jobs{$n}{id})->{status} eq 'completed';
		}
	}
}
is(join("\n", @wrong[ 0 .. ($#wrong < 9 ? $#wrong : 9) ]), '', 'none arrives while such a refresh runs') or diag("OMNI_ORDER_SEED=$seed");
cmp_ok($resets, '>', 0, "... of $resets that arrived");

$node->stop('fast');
done_testing();
