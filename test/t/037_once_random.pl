# Random transactions whose requests overlap, with nested savepoints, exceptions, roles, servers, and jobs
# that are canceled, deleted or changed. A reference keeps each request that commits, as if it had
# a row of its own, and leaves all else to merging: Omni must be sent the same. Of each request the
# reference says which jobs of the transaction cover it, too: one of these is returned, or else a new one.
# Some requests are made by way of a function of another role: the jobs of each caller stay apart.
#
# A request that is returned a job shares its fate: who cancels the job has canceled the request.
#
# Resets are about models that are never refreshed: 039_order.pl tests that a refresh parts them.

use strict;
use warnings FATAL => 'all';

use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Storable qw(dclone);
use Test::More;
use Time::HiRes ();

use OmniAPI;
use OmniFault;
use OmniMerge;

my $seed = $ENV{OMNI_ONCE_SEED} || int(Time::HiRes::time * 1000) % 2**31;
my %omni = map { $_ => OmniAPI->start } 'omni', 'twin';
my $node = OmniFault::node('once_random', conf => <<END);
omni_refresh.min_interval = 0
omni_refresh.max_in_flight = 16
omni_refresh.enabled = off
max_prepared_transactions = 4
client_min_messages = error
END
my @models = map { sprintf '00000000-0000-0000-0000-%012d', $_ } 1 .. 3;
my @roles = qw(one two);
my @times = map { "2026-01-0$_ 00:00:00+00" } 1 .. 3;

END { my $rc = $?; $_->stop for values %omni; $? = $rc; }

note("OMNI_ONCE_SEED=$seed");
srand($seed);
OmniFault::server($node, $_, url => $omni{$_}->http, key => $omni{$_}->key, rate_limit => 0) for sort keys %omni;
$node->safe_psql('postgres', q{
	CREATE ROLE one; CREATE ROLE two;
	CREATE TABLE asked (request int, job bigint);	-- within a DO block
	GRANT ALL ON asked TO PUBLIC;
	CREATE FUNCTION wrapped(call text, OUT id bigint) LANGUAGE plpgsql SECURITY DEFINER SET search_path = public AS
		$$ BEGIN EXECUTE 'SELECT id FROM ' || call INTO id; END $$;
	ALTER FUNCTION wrapped OWNER TO one;
	CREATE FUNCTION cancel(job bigint) RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = public AS $$
	BEGIN PERFORM omni_refresh_cancel(id) FROM omni_refresh_job WHERE id = job; END $$;
	CREATE FUNCTION remove(job bigint) RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = public AS
		'DELETE FROM omni_refresh_job WHERE id = job';
	CREATE FUNCTION narrow(job bigint) RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = public AS
		'UPDATE omni_refresh_job SET hard = false, schemas = ''{n}'', tables = NULL WHERE id = job AND status = ''pending'' AND kind = ''schema''';
	CREATE FUNCTION touch(job bigint) RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = public AS
		'SELECT FROM omni_refresh_job WHERE id = job FOR UPDATE';
	CREATE FUNCTION cancel_in_vain(job bigint) RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = public AS $$
	BEGIN PERFORM cancel(job); RAISE division_by_zero; EXCEPTION WHEN division_by_zero THEN END $$;
	CREATE FUNCTION block(calls text[], fail bool) RETURNS bigint[] LANGUAGE plpgsql AS $$
	DECLARE
		ids bigint[];
		id bigint;
		call text;
	BEGIN
		FOREACH call IN ARRAY calls LOOP
			EXECUTE 'SELECT id FROM ' || call INTO id;
			ids := ids || id;
		END LOOP;
		IF fail THEN RAISE division_by_zero; END IF;
		RETURN ids;
	EXCEPTION WHEN division_by_zero THEN
		RETURN ids;
	END $$});

# Requests, which are numbered. Those of a transaction are about one model, and some are repeated.

my (@requests, @recent, $model);

sub random_request
{
	my $request = rand() < 0.7 ? OmniMerge::random_request($model) :
		{ model => $model =~ s/^0/f/r, policy => rand() < 0.5 ? 'p' : 'q', rand() < 0.5 ? (reset_at => $times[ rand @times ]) : () };

	delete $request->{branch} if rand() < 0.5;
	$request = { %{ $recent[ rand @recent ] } } if @recent && rand() < 0.3;
	$request->{wrapped} = rand() < 0.2;
	$request->{number} = @requests;
	push @$_, $request for \@requests, \@recent;
	return $request;
}

sub begin_requests
{
	$model = $models[ rand @models ];
	@recent = ();
	return;
}

sub call
{
	my ($request) = @_;

	return 'wrapped($c$' . call({ %$request, wrapped => 0 }) . '$c$)' if $request->{wrapped};
	return OmniMerge::call($request) if !defined $request->{policy};
	return "omni_refresh_cache_on_commit('$request->{model}', '$request->{policy}'" . (defined $request->{reset_at} ? ", '$request->{reset_at}')" : ')');
}

# Whether one request covers another one that is alike.
sub covers
{
	my ($a, $b) = @_;
	my ($here, $there) = (OmniMerge::extent($a), OmniMerge::extent($b));

	return !defined $a->{reset_at} || defined $b->{reset_at} && $b->{reset_at} le $a->{reset_at} if defined $a->{policy};
	return $there ne 'hard' if $here eq 'soft';
	return 1 if $here eq 'hard' || $here eq $there;
	return 0 if grep { defined $a->{$_} != defined $b->{$_} } qw(schemas tables);
	my %names = map { $_ => 1 } split /[ ,]/, $here;
	return !grep { !$names{$_} } split /[ ,]/, $there;
}

# The reference

my ($committed, $now, @saved);	# each of rows, role and server, as of the savepoints, too
my (@wrong, %seen);

sub begin
{
	@saved = ();
	$now = dclone($committed //= { rows => {} });
	$_->{mine} = 0 for values %{ $now->{rows} };
	@$now{qw(role server)} = ('', 'omni');
	return;
}

# What must be the same for two requests to be alike.
sub place
{
	my ($request) = @_;

	return join ' ', map { $_ // '-' } $now->{server}, $request->{wrapped} ? 'one' : $now->{role}, @$request{qw(model branch policy)};
}

sub asked
{
	my ($request, $id) = @_;
	my $place = place($request);
	my $rows = $now->{rows};
	my @covering = grep { $rows->{$_}{mine} && $rows->{$_}{place} eq $place && $rows->{$_}{caller} eq $now->{role} && covers($rows->{$_}{requests}[0], $request) } keys %$rows;

	push @wrong, "request $request->{number} got job $id, and not one of (@covering)" if @covering ? !grep { $_ == $id } @covering : $seen{$id};
	$seen{$id} = 1;
	$rows->{$id} //= { place => $place, caller => $now->{role}, mine => 1 };
	push @{ $rows->{$id}{requests} }, $request;
	return;
}

sub narrowed
{
	my ($id) = @_;
	my $row = $now->{rows}{$id};

	@$row{qw(requests mine)} = ([ { %{ $row->{requests}[0] }, hard => 0, schemas => ['n'], tables => undef } ], 0) if $row && !defined $row->{requests}[0]{policy};
	return;
}

# The transactions. Each step is SQL, and what it means for the reference, which is told the jobs of the
# requests: these are known only afterwards.

my @steps;
my %job;						# of each request

sub step
{
	my ($sql, $meaning) = @_;

	push @steps, [ $sql, $meaning // sub { } ];
	return;
}

sub step_ask
{
	my ($known) = @_;
	my $request = random_request();
	my $n = $request->{number};

	step('SELECT id AS r' . $n . ' FROM ' . call($request) . " \\gset\n\\echo $n :r$n", sub { asked($request, $job{$n}) });
	push @$known, $n;
	return;
}

sub step_block
{
	my ($known) = @_;
	my @asked = map { random_request() } 1 .. 1 + rand 3;
	my @numbers = map { $_->{number} } @asked;
	my $fail = rand() < 0.5;

	step('SELECT ' . join(', ', map { "ids[$_] AS r$numbers[$_ - 1]" } 1 .. @asked) . ' FROM block(ARRAY['
		  . join(', ', map { '$$' . call($_) . '$$' } @asked) . '], ' . ($fail ? 'true' : 'false') . ") AS ids \\gset\n"
		  . join("\n", map { "\\echo $_ :r$_" } @numbers),
		sub {
			my $before = dclone($now);
			asked($_, $job{ $_->{number} }) for @asked;
			$now = $before if $fail;
		});
	push @$known, @numbers if !$fail;
	return;
}

# Something that is done to a job
sub step_change
{
	my ($known) = @_;
	my %changes = (cancel => sub { delete $now->{rows}{ $_[0] } }, remove => sub { delete $now->{rows}{ $_[0] } }, narrow => \&narrowed);
	my $function = (qw(cancel cancel cancel remove narrow touch cancel_in_vain))[ rand 7 ];
	my $n = @$known ? $known->[ -1 - int(rand(rand @$known)) ] : return;

	step("SELECT $function(:r$n);", sub { $changes{$function}->($job{$n}) if $changes{$function} });
	return;
}

sub step_server { my $server = (sort keys %omni)[ rand 2 ]; return step("SET LOCAL omni_refresh.server = $server;", sub { $now->{server} = $server }) }

sub step_role
{
	my $role = ('', @roles)[ rand 3 ];

	return step($role ? "SET LOCAL ROLE $role;" : 'RESET ROLE;', sub { $now->{role} = $role });
}

# Savepoints are numbered from 1. Some are released, or rolled back to, perhaps after an error.

sub step_savepoint
{
	my ($depth) = @_;

	step("SAVEPOINT s$$depth;", sub { push @saved, dclone($now) }) if ++$$depth;
	return;
}

sub step_release
{
	my ($depth) = @_;
	my $to = $$depth ? 1 + int rand $$depth : return;

	step("RELEASE s$to;", sub { $#saved = $to - 2 });
	$$depth = $to - 1;
	return;
}

sub step_rollback_to
{
	my ($depth) = @_;
	my $to = $$depth ? 1 + int rand $$depth : return;

	step((rand() < 0.3 ? 'SELECT 1/0; ' : '') . "ROLLBACK TO s$to;", sub { $#saved = $to - 1; $now = dclone($saved[-1]) });
	$$depth = $to;
	return;
}

sub transaction
{
	my ($known) = @_;
	my $depth = 0;
	my @kinds = ((sub { step_ask($known) }) x 10, (sub { step_block($known) }) x 2, (sub { step_change($known) }) x 3,
		\&step_role, \&step_server, (sub { step_savepoint(\$depth) }) x 3, sub { step_release(\$depth) }, (sub { step_rollback_to(\$depth) }) x 2);
	my $commits = rand() < 0.75;
	my $end = $commits ? 'COMMIT' : 'ROLLBACK';

	begin_requests();
	step('BEGIN;', \&begin);
	$kinds[ rand @kinds ]->() for 1 .. 3 + rand 20;
	$end = 'SELECT 1/0; COMMIT' if !$commits && rand() < 0.3;
	$end = "RESET ROLE; PREPARE TRANSACTION 'p'; $end PREPARED 'p'" if $end !~ / / && rand() < 0.3;
	step("$end;", sub { $committed = $now if $commits });
	return;
}

# A procedure with some transactions of its own
sub procedure
{
	my $sql = '';
	my @parts;

	begin_requests();
	for (1 .. 1 + rand 3)
	{
		my @asked = map { random_request() } 1 .. 1 + rand 3;
		my $commits = rand() < 0.7;
		push @parts, [ $commits, @asked ];
		$sql .= join('', map { "INSERT INTO asked SELECT $_->{number}, id FROM " . call($_) . '; ' } @asked) . ($commits ? 'COMMIT; ' : 'ROLLBACK; ');
	}
	step("DO \$\$ BEGIN $sql END \$\$;", sub {
			for my $part (@parts)
			{
				my ($commits, @asked) = @$part;
				next if !$commits;
				begin();
				asked($_, $job{ $_->{number} }) for @asked;
				$committed = $now;
			}
		});
	return;
}

# What is sent in the end

sub resets_expected
{
	my @times = map { $_->{reset_at} } @_;
	my @none = grep { !defined } @times;

	return @none ? 'now' : (sort @times)[-1] =~ s/ .*//r;
}

sub expected
{
	my ($server) = @_;
	my (%by_place, %expected);

	push @{ $by_place{ $_->{place} } }, @{ $_->{requests} } for grep { $_->{place} =~ /^$server / } values %{ $committed->{rows} };
	for my $requests (values %by_place)
	{
		my $request = $requests->[0];
		if (defined $request->{policy}) { push @{ $expected{"$request->{model} reset $request->{policy}"} }, resets_expected(@$requests) }
		else { push @{ $expected{ "$request->{model} " . ($request->{branch} // '') } }, OmniMerge::expected(@$requests) }
	}
	return { map { $_ => [ sort @{ $expected{$_} } ] } keys %expected };
}

sub sent
{
	my ($omni) = @_;
	my %sent = OmniMerge::sent($omni);

	for my $request ($omni->requests(qr/cache_reset/))
	{
		my ($model, $policy) = $request->{path} =~ m{models/([^/]*)/cache_reset/(.*)};
		my $at = $request->{body} ? decode_json($request->{body})->{resetAt} : undef;
		push @{ $sent{"$model reset $policy"} }, defined $at ? $at =~ s/T.*//r : 'now';
	}
	return { map { $_ => [ sort @{ $sent{$_} } ] } keys %sent };
}

sub enable
{
	my ($value) = @_;

	$node->append_conf('postgresql.conf', "omni_refresh.enabled = $value\n");
	$node->reload;
	return;
}

# No more in a round than the worker merges at once
for my $round (1 .. 6)
{
	my @known;					# requests whose jobs may be changed

	$_->reset for values %omni;
	enable('off');
	$node->safe_psql('postgres', 'TRUNCATE omni_refresh_job, omni_refresh_event, asked');
	@requests = @steps = ();
	$committed = undef;
	%job = ();
	for (1 .. 30) { rand() < 0.85 ? transaction(\@known) : procedure() }

	$node->psql('postgres', "SET omni_refresh.enabled = on;\n" . join("\n", map { $_->[0] } @steps) . "\nSELECT request, job FROM asked;\n",
		on_error_stop => 0, extra_params => [ '-F', ' ' ], stdout => \my $out, stderr => \my $err);
	is(join("\n", grep { /ERROR/ && !/division by zero/ } split /\n/, $err), '', "round $round: " . @requests . ' requests are made');
	%job = (%job, $out =~ /^(\d+) (\d+)$/mg);
	$_->[1]->() for @steps;
	is(join("\n", splice @wrong), '', '... each is returned a job of its transaction that covers it, or else a new one') or diag("OMNI_ONCE_SEED=$seed");

	my $rows = $node->safe_psql('postgres', q{SELECT count(*) FROM omni_refresh_job WHERE status = 'pending'});
	is($rows, scalar(keys %{ $committed->{rows} }), '... and just the rows of those jobs are there');
	my $kept = 0;
	$kept += @{ $_->{requests} } for values %{ $committed->{rows} };
	cmp_ok($rows, '<', $kept, "... which are fewer than the requests: $rows for $kept");
	enable('on');
	ok($node->poll_query_until('postgres', q{SELECT count(*) = 0 FROM omni_refresh_job WHERE status IN ('pending', 'sending')}), '... all is sent');
	is_deeply(sent($omni{$_}), expected($_), "... to $_, what it would be sent if each request had a row") or diag("OMNI_ONCE_SEED=$seed") for sort keys %omni;
}

$node->stop('fast');
done_testing();
