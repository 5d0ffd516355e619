# Random requests of refreshes, what must be sent for them by the rules of merging, and what was sent:
# the reference for the tests of what merges.
#
#	my $request = OmniMerge::random_request($omni->model);	# { model, branch, hard, schemas, tables }
#	$node->safe_psql('postgres', OmniMerge::sql($request));
#	is_deeply({ OmniMerge::sent($omni) }, { "$request->{model} " => [ OmniMerge::expected($request) ] });

package OmniMerge;

use strict;
use warnings FATAL => 'all';

# The function call of a request, of which all but the model may be missing.
sub call
{
	my ($request) = @_;
	my @arguments = ("'$request->{model}'");

	push @arguments, "branch => '$request->{branch}'" if $request->{branch};
	push @arguments, 'hard => ' . ($request->{hard} ? 'true' : 'false') if defined $request->{hard};
	for my $list (qw(schemas tables))
	{
		push @arguments, "$list => '{" . join(',', @{ $request->{$list} }) . "}'" if $request->{$list};
	}
	return 'omni_refresh_on_commit(' . join(', ', @arguments) . ')';
}

sub sql
{
	return 'SELECT FROM ' . call(@_);
}

# A list in words of which two are equal if it is the same; undef if it is missing.
sub list
{
	my ($request, $name) = @_;
	my %set = map { $_ => 1 } @{ $request->{$name} // return };

	return join ',', sort keys %set;
}

# What a request asks for, in such words.
sub extent
{
	my ($request) = @_;
	my ($schemas, $tables) = map { scalar list($request, $_) } qw(schemas tables);

	return 'hard' if $request->{hard} || (!defined $request->{hard} && !defined $schemas && !defined $tables);
	return 'soft' if !defined $schemas && !defined $tables;
	return join ' ', (defined $schemas ? "schemas $schemas" : ()), (defined $tables ? "tables $tables" : ());
}

# What must be sent for some requests for one model and branch: by the rules, one after the other.
sub expected
{
	my (@requests) = @_;
	my @extents = map { extent($_) } @requests;
	my (%schemas, %tables, @both);

	return ('hard') if grep { $_ eq 'hard' } @extents;
	return ('soft') if grep { $_ eq 'soft' } @extents;
	for my $request (@requests)
	{
		if ($request->{schemas} && $request->{tables}) { push @{ $both[0]{$_} }, @{ $request->{$_} } for qw(schemas tables) }
		elsif ($request->{schemas}) { $schemas{$_} = 1 for @{ $request->{schemas} } }
		else { $tables{$_} = 1 for @{ $request->{tables} } }
	}
	return sort map({ extent($_) } @both), (%schemas ? 'schemas ' . join(',', sort keys %schemas) : ()), (%tables ? 'tables ' . join(',', sort keys %tables) : ());
}

# What a stand-in for Omni was sent, as "MODEL BRANCH" => [ extents ].
sub sent
{
	my ($omni) = @_;
	my %sent;

	for my $request ($omni->requests(qr/refresh$/))
	{
		my %parameters = map { my ($name, $value) = split /=/; $value =~ s/%([0-9a-f]{2})/chr hex $1/gie; $name => $value }
			split /&/, $request->{query} // '';
		my ($model) = $request->{path} =~ m{models/([^/]*)/};
		my %lists = map { $_ => [ split /,/, $parameters{$_} ] } grep { defined $parameters{$_} } qw(schemas tables);
		my $hard = defined $parameters{hard_refresh} ? $parameters{hard_refresh} eq 'true' : undef;
		push @{ $sent{ $model . ' ' . ($parameters{branch_id} // '') } }, extent({ hard => $hard, %lists });
	}
	return map { $_ => [ sort @{ $sent{$_} } ] } keys %sent;
}

sub some
{
	my @names = @_;
	my @chosen = grep { rand() < 0.4 } @names;

	return @chosen ? \@chosen : [ $names[ rand @names ] ];
}

sub random_request
{
	my ($model) = @_;
	my %request = (model => $model);
	my $kind = rand;

	$request{branch} = '00000000-0000-0000-0000-00000000000' . int rand 2 if rand() < 0.3;
	if ($kind < 0.05) { }
	elsif ($kind < 0.1) { $request{hard} = 1 }
	elsif ($kind < 0.2) { $request{hard} = 0 }
	else
	{
		$request{schemas} = some(qw(a b c d)) if $kind < 0.75;
		$request{tables} = some(qw(u v w)) if $kind >= 0.5;
		$request{hard} = 0 if rand() < 0.3;
	}
	return \%request;
}

1;
