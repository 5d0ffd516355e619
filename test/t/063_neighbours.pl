# Names, ages and settings that are beside a request do nothing to it.

use strict;
use warnings FATAL => 'all';

use Test::More;

use OmniFault;
use OmniNeighbour;

OmniNeighbour::start('neighbours');
my $id;

# A server whose name is that of another one and the number of a role

for my $why ('rate_limit', 'max_in_flight')
{
	note("a namesake: $why");
	$_->reset for $omni, $other;
	configure(max_in_flight => 1);
	OmniFault::server($node, "omni $alice", url => $other->http, key => $other->key, rate_limit => $why eq 'rate_limit' ? 1 : 0);
	$other->fault('hang', times => -1) if $why eq 'max_in_flight';
	OmniFault::call($node, qq{SET omni_refresh.server = 'omni $alice'; SELECT omni_refresh_on_commit(gen_random_uuid()) FROM generate_series(1, 3);}, user => 'bob');
	$other->wait_for_requests(1);
	until_true("$why: a server is held up", q{count(*) > 0 FROM omni_refresh_event WHERE event = 'rate_limited'}) if $why eq 'rate_limit';
	ends(queue(), 'accepted', "$why at a server that is named \"omni $alice\": alice, who has that number, goes on at server omni");
	$other->reset;
	end_worker();
	sql(qq{DELETE FROM omni_refresh_job; DROP SERVER "omni $alice" CASCADE});
}

# ... and the other way round: alice has reached the limit at omni, which is nobody else's matter

note('a namesake: the other way round');
$_->reset for $omni, $other;
configure(max_in_flight => 4);
OmniFault::server($node, "omni $alice", url => $other->http, key => $other->key, rate_limit => 0);
sql(q{ALTER SERVER omni OPTIONS (SET rate_limit '1')});
OmniFault::call($node, 'SELECT omni_refresh_on_commit(gen_random_uuid()) FROM generate_series(1, 3);', user => 'alice');
until_true('alice has reached a limit', q{count(*) > 0 FROM omni_refresh_event WHERE event = 'rate_limited'});
$id = OmniFault::call($node, qq{SET omni_refresh.server = 'omni $alice'; SELECT id FROM omni_refresh_on_commit('${\ $other->model}');}, user => 'bob')->{out};
ends($id, 'accepted', "... and bob goes on at server \"omni $alice\"");
end_worker();
sql(q{DELETE FROM omni_refresh_job; ALTER SERVER omni OPTIONS (SET rate_limit '0')});

# max_in_flight is for each role at a server: jobs of alice's that hang there are nobody else's matter, either.

note('the same server');
$omni->reset;
$omni->fault('hang', times => -1, path => "/models/(?!$model)");
sql(q{ALTER SERVER omni OPTIONS (ADD timeout '10 min')});
OmniFault::call($node, 'SELECT count(omni_refresh_on_commit(gen_random_uuid())) FROM generate_series(1, 400);', user => 'alice');
OmniLife::until_true('jobs of alice hang', sub { $omni->stats->{in_flight} == 4 }, 60);
for (1 .. 3)
{
	$id = OmniFault::call($node, "SELECT id FROM omni_refresh_on_commit('$model');", user => 'bob')->{out};
	until_true('... and bob goes on at the same server', "status = 'accepted' FROM omni_refresh_job WHERE id = $id", 60);
}
is($omni->stats->{in_flight}, 4, '... while no more of hers are sent');
end_worker();
sql(q{DELETE FROM omni_refresh_job; ALTER SERVER omni OPTIONS (DROP timeout)});

# A request that is merged into an older one has its own time to be tried again.

for my $age ('59 min 59 s', '2 h')
{
	for my $again (0, 1)
	{
		note("an older request, $age ago, the worker ends: $again");
		$omni->reset;
		configure(retry_for => q{'1 h'}, enabled => 'off');
		$omni->fault('answer', status => 503, headers => { 'Retry-After' => 2 });
		my ($old, $young) = map { held("{$_}") } 'old', 'young';
		sql("UPDATE omni_refresh_job SET requested_at = now() - interval '$age', run_at = now() - interval '$age' WHERE id = $old");
		end_worker();
		configure(enabled => 'on');
		sql('SELECT omni_refresh_wake()');
		$omni->wait_for_requests(1, qr/refresh/);
		until_true('... the first attempt fails', "status <> 'sending' AND attempts = 1 FROM omni_refresh_job WHERE id = $old");
		is(sql("SELECT merged_into FROM omni_refresh_job WHERE id = $young"), $old, "a request is merged into one that was made $age ago");
		if ($again)
		{
			end_worker();
			sql('SELECT omni_refresh_wake()');
		}
		ends($young, 'accepted', '... it is tried again' . ($again ? ', by the next worker' : ''));
	}
}
configure(retry_for => q{'24 h'});

# Settings of roles are for their sessions. The worker is nobody's.

for my $whose ("ROLE $superuser", 'ROLE ALL', "ROLE $superuser IN DATABASE postgres")
{
	note($whose);
	$omni->reset;
	end_worker();
	sql("ALTER $whose SET omni_refresh.enabled = off");
	{
		local $ENV{PGOPTIONS} = '-c omni_refresh.enabled=on';
		$id = sql("SELECT id FROM omni_refresh_on_commit('$model')");
	}
	ends($id, 'accepted', "ALTER $whose SET omni_refresh.enabled = off: what is queued is sent");
	sql("ALTER $whose RESET omni_refresh.enabled");
	$node->reload;
	ends(queue(), 'accepted', '... as it is after RESET, by the same worker');
	end_worker();
	sql('DELETE FROM omni_refresh_job');
}

# The database's count, as does the configuration file.
sql('ALTER DATABASE postgres SET omni_refresh.enabled = off');
$id = held();
OmniFault::call($node, q{SELECT count(*) FROM omni_refresh_models();}, user => 'alice');
is(sql("SELECT status FROM omni_refresh_job WHERE id = $id"), 'pending', 'ALTER DATABASE SET omni_refresh.enabled = off holds the queue');
sql('ALTER DATABASE postgres RESET omni_refresh.enabled');
end_worker();
sql('SELECT omni_refresh_wake()');
ends($id, 'accepted', '... until it is reset');

# Other settings may be anything, wherever they are set. Our own sessions undo them.

my %settings = (
	statement_timeout => [ '1ms', 0 ],
	lock_timeout => [ '1ms', 0 ],
	idle_in_transaction_session_timeout => [ '1ms', 0 ],
	default_transaction_read_only => [ 'on', 'off' ],
	default_transaction_isolation => [ 'serializable', 'read\ committed' ],
	default_transaction_deferrable => [ 'on', 'off' ],
	session_replication_role => [ 'replica', 'origin' ],
	search_path => [ 'nowhere', 'public' ],
	row_security => [ 'off', 'on' ],
	array_nulls => [ 'off', 'on' ],
	transform_null_equals => [ 'on', 'off' ],
	enable_indexscan => [ 'off', 'on' ],
	IntervalStyle => [ 'sql_standard', 'postgres' ],
	DateStyle => [ 'SQL,DMY', 'ISO' ],
	TimeZone => [ 'Pacific/Kiritimati', 'UTC' ],
	role => [ 'alice', 'none' ]);
$settings{transaction_timeout} = [ '200ms', 0 ] if $node->pg_version >= 17;
$ENV{PGOPTIONS} = join ' ', map { "-c $_=$settings{$_}[1]" } sort keys %settings;
configure(track => 'on');
for my $whose ("ROLE $superuser", 'ROLE ALL', 'DATABASE postgres', 'SYSTEM')
{
	my @names = grep { $whose ne 'SYSTEM' || $_ ne 'role' } sort keys %settings;

	note($whose);
	$omni->reset;
	$node->psql('postgres', join ";\n", map { sprintf q{ALTER %s SET %s = %s}, $whose, $_, $_ eq 'DateStyle' ? 'SQL,DMY' : "'$settings{$_}[0]'" } @names);
	$node->reload;
	end_worker();
	my $call = OmniFault::call($node, "SELECT status FROM omni_refresh('$model');");
	is($call->{out}, 'running', "ALTER $whose SET @names: a call") or diag($call->{err});
	until_true('... and its end', q{status = 'completed' FROM omni_refresh_job ORDER BY id DESC LIMIT 1});
	ends(sql("SELECT id FROM omni_refresh_on_commit('$model')"), 'completed', '... and a job');
	sql(join ";\n", map { sprintf q{ALTER %s RESET %s}, $whose, $_ } @names);
	$node->reload;
}
delete $ENV{PGOPTIONS};
configure(track => 'off');
end_worker();

OmniNeighbour::finish();
