# A watch, and what it asks Omni for because of DDL:
#
#	my $watch = OmniWatch->new('watch', removals => '1 h');
#	is($watch->told('CREATE TABLE sales.t1 (id int)'), 'added sales.t1', '...');
#	is($watch->asked, 'soft sales/t1', '...');
#
# There is one node, one OmniAPI, and a watch of the superuser's whose delay is a second. While a test waits, the
# node's time passes fast, if test/shim/clock.c can be compiled. Since nothing tells that a watch has found
# nothing, each told() ends with a table of its own, which the watch finds in any case.

package OmniWatch;

use strict;
use warnings FATAL => 'all';

use OmniAPI;
use OmniClock;
use OmniFault;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

# Options: conf, as OmniFault::node() has it, or node, whose time passes as ever, and the arguments of
# omni_refresh_watch().
sub new
{
	my ($class, $name, %options) = @_;
	my $conf = delete $options{conf} // '';
	my $node = delete $options{node};
	my @node = ($name, conf => "omni_refresh.min_interval = 0\nmax_prepared_transactions = 4\nclient_min_messages = warning\n$conf");
	my $clock = !$node && OmniClock::build() ? OmniClock->new(@node) : undef;
	my $self = bless {
		omni => OmniAPI->start,
		clock => $clock,
		node => $node // ($clock ? $clock->node : OmniFault::node(@node)),
		options => { delay => '1 s', %options },
		marks => 0,
	}, $class;

	OmniFault::server($self->node, 'omni', url => $self->omni->http, key => $self->omni->key, rate_limit => 0);
	$self->sql('CREATE SCHEMA mark; CREATE SCHEMA sales; CREATE TABLE sales.orders (id int, total numeric)');
	return $self;
}

sub omni { return $_[0]{omni} }
sub node { return $_[0]{node} }

sub sql
{
	my ($self, $sql, $database) = @_;
	return $self->node->safe_psql($database // 'postgres', $sql);
}

# The call of omni_refresh_watch() for the stand-in's model.
sub call
{
	my ($self, %options) = @_;
	my %all = (%{ $self->{options} }, %options);

	return "omni_refresh_watch('" . $self->omni->model . "'"
		. join('', map { ", $_ => " . (defined $all{$_} ? "'$all{$_}'" : 'NULL') } sort keys %all) . ')';
}

# Sets the watch, and waits until its first look is over.
sub set
{
	my ($self, %options) = @_;

	$self->sql('SELECT FROM ' . $self->call(%options));
	$self->settle;
	$self->{last} = $self->sql('SELECT max(id) FROM omni_refresh_job');
	$self->{hard} = $self->{last};
	return;
}

# Waits until a query returns true, for which time passes by the second.
sub until
{
	my ($self, $query) = @_;
	my $end = time + $PostgreSQL::Test::Utils::timeout_default;
	my $worker;

	while ($self->sql($query) ne 't')
	{
		return 0 if time > $end;
		select(undef, undef, undef, 0.03);
		next if !$self->{clock};
		$self->{clock}->pass(1);
		# the kernel, by whose clock the worker sleeps, has another one
		kill 'HUP', $worker if $worker = OmniFault::worker($self->node);
	}
	return 1;
}

# Waits until no job is unfinished and no watch owes anything.
sub settle
{
	my ($self) = @_;

	$self->until(q{
		SELECT NOT EXISTS (SELECT FROM omni_refresh_watch WHERE owed_hard IS NOT NULL OR unfinished)
			AND NOT EXISTS (SELECT FROM omni_refresh_job WHERE status IN ('pending', 'sending', 'running'))})
		or die 'not settled';
	return;
}

# Runs statements, of which some may fail, and returns what the watch tells because of them, but
# for removals that it has not asked for.
sub told
{
	my ($self, $sql, %options) = @_;
	my $mark = 'm' . ++$self->{marks};

	$self->node->psql($options{db} // 'postgres', $sql, on_error_stop => 0, extra_params => $options{params} // []);
	return $self->marked($mark);
}

# Makes a table, and returns what the watch has told since the last time, and of this table.
sub marked
{
	my ($self, $mark) = @_;

	$mark //= 'm' . ++$self->{marks};
	$self->sql("CREATE TABLE mark.$mark ()");
	$self->until("SELECT EXISTS (SELECT FROM omni_refresh_event WHERE event = 'changed' AND detail ~ 'mark.$mark\\y')")
		or die "$mark was not seen";
	$self->settle;
	my @told = split /\n/, $self->sql("SELECT detail FROM omni_refresh_event
		WHERE event = 'changed' AND job > $self->{last} ORDER BY id");
	$self->{asked} = [ split /\n/, $self->sql("SELECT CASE WHEN hard THEN 'hard' ELSE 'soft' END || coalesce(' ' || array_to_string(schemas, ','), '')
			|| coalesce('/' || array_to_string(tables, ','), '')
		FROM omni_refresh_job WHERE kind = 'schema' AND id > $self->{last} ORDER BY id") ];
	$self->{last} = $self->sql('SELECT max(id) FROM omni_refresh_job');
	s/(^|; )added mark\.m[^;]*//g, s/^; // for @told;
	return join '; ', grep { $_ ne '' } @told;
}

# What the watch has asked for until the last told(), but for the table of its own.
sub asked
{
	my ($self) = @_;
	my @asked = @{ $self->{asked} };

	for (@asked)
	{
		s{/(.*)}{'/' . join ',', grep { !/^m\d+$/ } split /,/, $1}e;
		s{ (\S+?)(?=/|$)}{' ' . join ',', grep { $_ ne 'mark' } split /,/, $1}e;
		$_ = '' if $_ eq 'soft /' || $_ eq 'soft ';
	}
	return join '; ', grep { $_ ne '' } @asked;
}

# What would be asked for now.
sub changes
{
	my ($self) = @_;

	return $self->sql("SELECT string_agg(format('%s.%s %s %s', schema, relation, change, refresh), '; ' ORDER BY schema, relation)
		FROM omni_refresh_changes('" . $self->omni->model . "')");
}

# Waits for a hard refresh, and returns what it tells.
sub removed
{
	my ($self) = @_;

	$self->until("SELECT EXISTS (SELECT FROM omni_refresh_job WHERE hard AND id > $self->{hard} AND status = 'accepted')")
		or die 'no hard refresh';
	$self->settle;
	my $told = $self->sql("SELECT string_agg(detail, '; ' ORDER BY e.id) FROM omni_refresh_event AS e JOIN omni_refresh_job AS j ON j.id = job
		WHERE event = 'changed' AND hard AND j.id > $self->{hard}");
	$self->{last} = $self->{hard} = $self->sql('SELECT max(id) FROM omni_refresh_job');
	return $told;
}

sub stop
{
	my ($self) = @_;

	$self->omni->stop;
	return;
}

1;
