# An error at every step of an attempt, of a look at the queue and of a claim, and the worker without
# memory: each job comes to its right end, by the right number of requests.

use strict;
use warnings FATAL => 'all';

use File::Basename qw(dirname);
use File::Copy qw(copy);
use POSIX ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;
use OmniNode;

# Only a library with assertions has fault points: src/fault.c.
my ($installation, $libraries) = OmniLife::installation();
plan skip_all => 'the installation of PostgreSQL cannot be copied' if !defined $installation;

my $omni = OmniAPI->start;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

my $source = dirname(__FILE__) . '/../..';
my $build = PostgreSQL::Test::Utils::tempdir;
system("cd '$source' && cp -pR Makefile *.control sql src '$build' && cd '$build' && rm -f src/*.o src/*/*.o"
	. ' && make with_llvm=no COPT=-DUSE_ASSERT_CHECKING all >make.log 2>&1') == 0
	or BAIL_OUT('the library cannot be built: ' . slurp_file("$build/make.log"));
copy("$build/omni_refresh.so", "$libraries/omni_refresh.so.new") or die;
rename("$libraries/omni_refresh.so.new", "$libraries/omni_refresh.so") or die;

# What is asked for, what Omni answers, and what becomes of it: status and number of requests. A job
# that is tried again after a while is canceled then.
my $completed = [ 200, '{"status": "completed"}' ];
my $reset = [ 200, '{"success": true}' ];
my $refused = [ 400, '{"detail": "No."}' ];
my $broken = [ 500, '' ];
my $done = [ 200, '{"job_id": "JOB", "job_type": "refresh_schema", "status": "COMPLETED"}' ];
my @scenarios = (
	[ 'call', [$completed], 'completed', 1 ],
	[ 'call', [$refused], 'failed', 1 ],
	[ 'call', [ $broken, $completed ], 'completed', 2 ],
	[ 'call', [ undef, $completed ], 'completed', 2 ],
	[ 'queued', [$completed], 'completed', 1 ],
	[ 'queued', [$refused], 'failed', 1 ],
	[ 'queued', [$broken], 'canceled', 1 ],
	[ 'queued', [ undef, $completed ], 'completed', 2 ],
	[ 'reset', [$reset], 'completed', 1 ],
	[ 'reset', [$refused], 'failed', 1 ],
	[ 'reset', [$broken], 'canceled', 1 ],
	[ 'reset', [ undef, $reset ], 'completed', 2 ],
	[ 'poll', [$done], 'completed', 1 ],
	[ 'poll', [$refused], 'unknown', 1 ],
	[ 'poll', [ $broken, $done ], 'completed', 2 ],
	[ 'poll', [ undef, $done ], 'completed', 2 ]);

my %statements = (
	call => q{SELECT id FROM omni_refresh('MODEL')},
	queued => q{SELECT id FROM omni_refresh_on_commit('MODEL')},
	reset => q{SELECT id FROM omni_refresh_cache_on_commit('MODEL', 'daily')},
	poll => q{SELECT id FROM omni_refresh_on_commit('MODEL')});

# Each fault point is passed once or more often; those that do not depend on the answer, by one
# scenario of each kind. A new worker passes some of them only once.
my @points = map { [ $_, 1 ] } sort { ($b =~ /recall/) <=> ($a =~ /recall/) || $a cmp $b } keys %{ { map { $_ => 1 } map { slurp_file($_) =~ /OMNI_FAULT_POINT\("([^"]+)"\)/g } glob "$build/src/*.c $build/src/*/*.c" } };
cmp_ok(scalar(@points), '>', 20, 'the library has fault points');
push @points, map { my $n = $_; map { [ $_, $n ] } 'look: lanes read', 'look: polls claimed', 'look: done', 'to commit' } 2 .. 4;
push @points, [ 'to commit', 5 ], [ 'to commit', 6 ];

sub points
{
	my ($kind, $answers) = @_;

	return @points if $answers->[0] && $answers->[0][0] == 200;
	return grep { $_->[0] =~ /^(?:record|to commit)/ } @points;
}


my $node = OmniFault::node('fault', install_path => $installation, settings => '', conf => <<'END');
max_worker_processes = 40
max_connections = 100
restart_after_crash = on
fsync = off
log_statement = none
omni_refresh.track = on
END
OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);

# Waits for the end of a model's only job. What is polled is polled at once; what is tried again after
# more than a few seconds is canceled.
my $wait = <<'END';
DO $$
DECLARE job omni_refresh_job;
BEGIN
	FOR i IN 1 .. 2400 LOOP
		SELECT * INTO job FROM omni_refresh_job WHERE model_id = 'MODEL';
		EXIT WHEN job.id IS NULL OR job.finished_at IS NOT NULL;
		IF job.status = 'running' AND job.run_at > now() + interval '0.2 s' THEN
			UPDATE omni_refresh_job SET run_at = now() WHERE id = job.id AND status = 'running';
			PERFORM omni_refresh_wake();
		ELSIF job.status = 'pending' AND job.attempts > 0 AND job.run_at > now() + interval '5 s' THEN
			PERFORM omni_refresh_cancel(job.id);
		END IF;
		COMMIT;
		PERFORM pg_sleep(0.05);
	END LOOP;
END $$;
SELECT coalesce(max(status), 'none') || CASE WHEN count(*) > 1 THEN ' and others' ELSE '' END FROM omni_refresh_job WHERE model_id = 'MODEL'
END

my $models = 0;
my @states = qw(58030 53200 57014);

# Orders an error at a fault point, and runs a scenario. Returns what was wrong, and whether the fault
# point was reached.
sub run
{
	my ($session, $file, $scenario, $point, $passes, $sqlstate) = @_;
	my ($kind, $answers, $status, $requests) = @$scenario;
	my $model = sprintf '%08x-0000-4000-8000-%012x', $$, ++$models;
	my $asked = qr/$model/;
	my @wrong;

	if ($kind eq 'poll')
	{
		$omni->fault('answer', path => $model, status => 200, times => 1,
			body => sprintf '{"jobId": "%s", "status": "running"}', $model =~ s/^./f/r);
		$model =~ s/^./f/;
		$asked = qr/jobs.$model/;
	}
	for my $answer (@$answers)
	{
		$omni->fault('close', path => $model, times => 1) if !$answer;
		$omni->fault('answer', path => $model, times => 1, status => $answer->[0], body => $answer->[1] =~ s/JOB/$model/r) if $answer;
	}
	my $requested = $kind eq 'poll' ? sprintf('%08x', $$) . substr($model, 8) : $model;

	append_to_file("$file.new", "$sqlstate $passes $point\n");
	rename("$file.new", $file) or die;
	my ($id, $err) = $session->query($statements{$kind} =~ s/MODEL/$requested/r);
	my ($found, $trouble) = $session->query($wait =~ s/MODEL/$requested/gr);
	my $reached = !-e $file;
	unlink $file;
	my $sent = () = $omni->requests($asked);

	# A call that could not begin was not sent, and its caller knows.
	return ($reached) if $kind eq 'call' && $err =~ /$sqlstate: .*fault point/ && $sent == 0 && $found =~ /^(?:none|failed)$/;
	push @wrong, "is $found, not $status" if $found ne $status;
	push @wrong, "$sent requests, not $requests" if $sent != $requests;
	push @wrong, "the caller got: $err" if $kind eq 'call' && ($err eq '') != ($status eq 'completed');
	push @wrong, $trouble if $trouble =~ /ERROR|FATAL|server closed/;
	return ($reached, @wrong);
}

# Each scenario has a database, and so a worker, of its own.
my (%reached, @faults, @results);
my $number = 0;
for my $scenario (@scenarios)
{
	my $database = 'scenario' . $number++;

	$node->safe_psql('template1', "CREATE DATABASE $database TEMPLATE postgres");
	my $oid = $node->safe_psql('postgres', "SELECT oid FROM pg_database WHERE datname = '$database'");
	pipe(my $out, my $in) or die;
	my $child = fork // die;
	if ($child == 0)
	{
		my $session = OmniLife::session($node, $database);
		my $n = $number;

		for (points(@$scenario))
		{
			my ($point, $passes) = @$_;
			my $sqlstate = $states[ $n++ % @states ];
			my ($reached, @wrong) = eval { run($session, $node->data_dir . "/omni_refresh.fault.$oid", $scenario, $point, $passes, $sqlstate) };

			push @wrong, $@ if $@ ne '';
			print $in "reached $point\n" if $reached;
			print $in "$point, pass $passes, $sqlstate: " . join('; ', map { s/\n/ /gr } @wrong) . "\n" if @wrong;
		}
		close $in;
		POSIX::_exit(0);
	}
	close $in;
	push @results, [ $scenario, $out, $child ];
}
for (@results)
{
	my ($scenario, $out, $child) = @$_;
	my @lines = <$out>;

	waitpid $child, 0;
	$reached{$_} = 1 for map { /^reached (.*)/ } @lines;
	is(join('', grep { !/^reached / } @lines), '',
		"each step that fails is made good: $scenario->[0], answers " . join(' ', map { $_ ? $_->[0] : 'none' } @{ $scenario->[1] }));
}
is(join(', ', grep { !$reached{$_} } map { $_->[0] } @points), '', 'each fault point was reached');
unlike(slurp_file($node->logfile), qr/terminated by signal|PANIC|TRAP/, '... and the server is up');
unlike(slurp_file($node->logfile), qr/another session holds a lock/, '... and no lock is blamed');
like(slurp_file($node->logfile), qr/could not record the outcome of job \d+, will try again: fault point/, '... but what happened');

# An attempt that does not begin uses up none of the rate limit.
OmniFault::server($node, 'narrow', url => $omni->http, key => 'another', rate_limit => 1);
my $order = $node->data_dir . '/omni_refresh.fault.' . $node->safe_psql('postgres', q{SELECT oid FROM pg_database WHERE datname = 'postgres'});
my $narrow = sprintf '%08x-0000-4000-8000-000000000000', $$;
$omni->fault('answer', path => $narrow, status => 200, body => $completed->[1]);
append_to_file($order, "57014 1 begin: done\n");
my $call = OmniFault::call($node, "SET omni_refresh.server = narrow; SELECT status FROM omni_refresh('$narrow')");
is("$call->{out}$call->{err}", 'completed', 'an attempt that does not begin uses up none of the rate limit');
ok(!-e $order, '... and its transaction has failed');

# The worker has hardly any memory when an answer of a megabyte comes.
SKIP:
{
	my $worker = OmniFault::worker($node);

	skip 'there is no prlimit', 1 if system("prlimit --pid $worker --as >/dev/null 2>&1") != 0;
	my @ends;
	for my $megabytes (0, 1, 2, 3, 4, 5, 6, 8, 10)
	{
		my $model = sprintf '%08x-0000-4000-8000-%012x', $$, 1000 + $megabytes;
		my $offset = -s $node->logfile;

		$omni->fault('answer', path => $model, times => -1, status => 400, body => '{"detail": "' . 'x' x 1_000_000 . '"}');
		$node->safe_psql('postgres', 'SELECT count(*) FROM omni_refresh_models()');	# by a worker, then
		my $worker = OmniFault::worker($node);
		my ($size) = slurp_file("/proc/$worker/status") =~ /^VmSize:\s+(\d+) kB/m;
		my $limit = ($size + 1024 * $megabytes) * 1024;
		system('prlimit', '--pid', $worker, "--as=$limit:unlimited") == 0 or die;
		my $call = OmniFault::begin($node, "SELECT status FROM omni_refresh('$model')");
		my $until = time + 60;
		while (time < $until && $call->{psql}->pumpable && slurp_file($node->logfile, $offset) !~ /could not (?:record the outcome|take a call)|out of memory/)
		{
			$call->{psql}->pump_nb;
			select(undef, undef, undef, 0.02);
		}
		system("prlimit --pid $worker --as=unlimited:unlimited 2>/dev/null");
		OmniFault::finish($call);
		my $end = $node->safe_psql('postgres', "SELECT status FROM omni_refresh_job WHERE model_id = '$model'");

		# Without memory to begin or send it, or to read the answer, it may also end otherwise; and as lost if the worker ends.
		push @ends, "$megabytes MB: $call->{sqlstate} $end"
			if "$call->{sqlstate} $end" !~ /^(?:22023 failed|53200 (?:failed)?|(?:08001|08006|08007) (?:unknown|failed|canceled))$/;
	}
	is(join("\n", @ends), '', 'a worker without memory records an answer once it has some');
	unlike(slurp_file($node->logfile), qr/terminated by signal|PANIC|TRAP/, '... and the server is up');
}

$node->stop;
done_testing();
