# What many scripts ask of database postgres, by default, of the first server that OmniFault::node() has made.

package OmniSQL;

use strict;
use warnings FATAL => 'all';

use Exporter qw(import);
use OmniFault;
use Test::More;

our @EXPORT = qw(sql wait_for status story);

sub sql
{
	return $OmniFault::first->safe_psql('postgres', @_);
}

# Waits until a condition is true.
sub wait_for
{
	my ($name, $condition, $db) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return ok($OmniFault::first->poll_query_until($db // 'postgres', "SELECT $condition"), $name);
}

sub status
{
	my ($id) = @_;

	return sql("SELECT status FROM omni_refresh_job WHERE id = $id");
}

# What happened to a job, in order
sub story
{
	my ($id) = @_;

	return sql("SELECT string_agg(event, ' ' ORDER BY id) FROM omni_refresh_event WHERE job = $id");
}

1;
