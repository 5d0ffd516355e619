# A server whose tests ask through one session. PostgreSQL::Test::Cluster starts psql for each statement,
# and ten times a second while it polls, which would be most of what the suite costs.

package OmniNode;

use strict;
use warnings FATAL => 'all';

use OmniLife;
use PostgreSQL::Test::Utils ();
use Test::More ();

use parent -norequire, 'PostgreSQL::Test::Cluster';
use PostgreSQL::Test::Cluster;

# What may stand before a parenthesis in a statement that only reads, and leaves nothing behind
my %harmless = map { $_ => 1 } qw(all and any array_agg array_to_string as avg between bool_and bool_or by clock_timestamp coalesce concat_ws
	count date_trunc distinct exists extract filter format from in interval left length lower max min not now numeric on or over
	regexp_match regexp_replace row_to_json select starts_with string_agg substr sum text then to_char unnest values when where);

sub only_reads
{
	my ($sql) = @_;

	return $sql =~ /\A\s*SELECT\b/i && $sql !~ /;\s*\S|--|\\|\b(?:INTO|FOR\s+(?:UPDATE|SHARE|KEY|NO))\b/i
		&& !grep { !$harmless{ lc $_ } } $sql =~ /(\w+)\s*\(/g;
}

# The session of this process that asks database postgres.
sub asker
{
	my ($self) = @_;

	delete $self->{asker} if $self->{asker} && $self->{asker}{owner} != $$;
	return $self->{asker} //= OmniLife::session($self, 'postgres');
}

# Ends it, if there is one: while it is connected, its database cannot be copied or dropped, and what was set
# for new sessions has no effect on it.
sub forget_asker
{
	my ($self) = @_;

	$self->{asker}->quit if $self->{asker} && $self->{asker}{owner} == $$;
	delete $self->{asker};
	return;
}

# Whatever it does not answer as it should is left to a session of its own.
sub safe_psql
{
	my ($self, $database, $sql, %params) = @_;

	if (!%params && $database eq 'postgres' && only_reads($sql))
	{
		my ($out, $err) = $self->asker->query($sql);
		return $out if $err eq '' && !$self->{asker}{exited};
		$self->forget_asker;
	}
	return $self->SUPER::safe_psql($database, $sql, %params);
}

sub psql
{
	my ($self, $database, $sql, @params) = @_;

	$self->forget_asker if $sql =~ /\bDATABASE\b|\bALTER\s+(?:ROLE|USER)\b/i;
	return $self->SUPER::psql($database, $sql, @params);
}

sub stop
{
	my ($self, @params) = @_;

	$self->forget_asker;		# a smart stop would wait for it
	return $self->SUPER::stop(@params);
}

# A server keeps what its environment has beside the test's.
sub start
{
	my ($self, @params) = @_;
	local %ENV = (%ENV, %{ $self->{environment} // {} });

	return $self->SUPER::start(@params);
}

sub restart
{
	my ($self, @params) = @_;
	local %ENV = (%ENV, %{ $self->{environment} // {} });

	return $self->SUPER::restart(@params);
}

# As in PostgreSQL::Test::Cluster: an error, or the end of the session, does not end the wait.
sub poll_query_until
{
	my ($self, $database, $query, $expected) = @_;
	my $end = time + $PostgreSQL::Test::Utils::timeout_default;
	my $shared = $database eq 'postgres' && only_reads($query);
	my ($session, $out, $err);

	$expected //= 't';
	while (1)
	{
		$session //= $shared ? $self->asker : OmniLife::session($self, $database);
		($out, $err) = $session->query($query);
		my $done = $out eq $expected && $err eq '';
		if ($session->{exited} || (!$shared && ($done || time > $end)))
		{
			$session->quit;
			undef $session;
			delete $self->{asker} if $shared;
		}
		return 1 if $done;
		last if time > $end;
		select(undef, undef, undef, 0.03);
	}
	Test::More::diag("poll_query_until timed out executing this query:\n$query\nexpecting this output:\n$expected\n"
		. "last actual query output:\n$out\nwith stderr:\n$err");
	return 0;
}

1;
