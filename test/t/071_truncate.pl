# A replicated TRUNCATE empties the subscriber's tables, as doc/operations.md warns, unless the publication
# is one of those that it recommends.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniFault;

my $publisher = OmniFault::node('publisher', conf => "wal_level = logical\nmax_wal_senders = 4\n");
my $subscriber = OmniFault::node('subscriber');
my $rows = q{SELECT (SELECT count(*) FROM omni_refresh_job) || ' ' || (SELECT count(*) FROM omni_refresh_event)};
my $count = 0;

$_->safe_psql('postgres', 'CREATE SCHEMA sales; CREATE TABLE sales.orders (id int PRIMARY KEY)') for $publisher, $subscriber;

# Has the publisher truncate the tables while the subscriber subscribes to a publication; returns
# how many jobs and events the subscriber has then.
sub after_truncate
{
	my ($publication) = @_;

	for my $node ($publisher, $subscriber)
	{
		$node->safe_psql('postgres', q{
			TRUNCATE omni_refresh_job, omni_refresh_event, sales.orders RESTART IDENTITY;
			INSERT INTO omni_refresh_job (id, status, model_id, kind, server, origin, requested_by, requested_by_oid,
				requested_at, run_at, finished_at, database) OVERRIDING SYSTEM VALUE
			VALUES (1, 'failed', gen_random_uuid(), 'schema', 'omni', 'call', current_user, 10, now(), now(), now(), 1);
			INSERT INTO omni_refresh_event (job, requested_by, requested_by_oid, occurred_at, event) VALUES (1, current_user, 10, now(), 'failed')});
	}
	$publisher->safe_psql('postgres', "CREATE PUBLICATION p $publication");
	$subscriber->safe_psql('postgres', 'CREATE SUBSCRIPTION s CONNECTION $$' . $publisher->connstr('postgres') . '$$ PUBLICATION p');
	ok($subscriber->poll_query_until('postgres', q{SELECT bool_and(srsubstate IN ('r', 's')) FROM pg_subscription_rel}), "a subscription to $publication");
	$publisher->safe_psql('postgres', 'TRUNCATE omni_refresh_job, omni_refresh_event; INSERT INTO sales.orders VALUES (1)');
	ok($subscriber->poll_query_until('postgres', 'SELECT count(*) = 1 FROM sales.orders'), '... gets all changes');
	my $left = $subscriber->safe_psql('postgres', $rows);
	$subscriber->safe_psql('postgres', 'DROP SUBSCRIPTION s');
	$publisher->safe_psql('postgres', 'DROP PUBLICATION p');
	return $left;
}

is(after_truncate('FOR ALL TABLES'), '0 0', '... a TRUNCATE of the jobs, too');
for my $publication ('FOR TABLE sales.orders', 'FOR TABLES IN SCHEMA sales',
	q{FOR ALL TABLES WITH (publish = 'insert, update, delete')})
{
	is(after_truncate($publication), '1 1', '... but no TRUNCATE of the jobs');
}

$_->stop('fast') for $publisher, $subscriber;
done_testing();
