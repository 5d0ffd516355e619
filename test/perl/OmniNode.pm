# A server that polls through one session. PostgreSQL::Test::Cluster starts psql ten times a second,
# which would be most of what the suite costs.

package OmniNode;

use strict;
use warnings FATAL => 'all';

use OmniLife;
use PostgreSQL::Test::Utils ();
use Test::More ();

use parent -norequire, 'PostgreSQL::Test::Cluster';
use PostgreSQL::Test::Cluster;

# As in PostgreSQL::Test::Cluster: an error, or the end of the session, does not end the wait.
sub poll_query_until
{
	my ($self, $database, $query, $expected) = @_;
	my $end = time + $PostgreSQL::Test::Utils::timeout_default;
	my ($session, $out, $err);

	$expected //= 't';
	while (1)
	{
		$session //= OmniLife::session($self, $database);
		($out, $err) = $session->query($query);
		my $done = $out eq $expected && $err eq '';
		if ($done || $session->{exited} || time > $end)
		{
			$session->quit;
			undef $session;
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
