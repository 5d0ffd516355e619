# A database whose rules for letters are Turkish: the small letter of I is not i there. What has to do with
# case goes by the rules of C, wherever the database is.

use strict;
use warnings FATAL => 'all';

use Test::More;

use OmniTest;

my $test = OmniTest->new('turkish', 'omni_refresh.min_interval = 0');
my ($node, $omni) = ($test->node, $test->omni);
my $model = $omni->model;
my %databases = (icu => "LOCALE_PROVIDER icu ICU_LOCALE 'tr-TR' LOCALE 'C'", libc => "LOCALE 'tr_TR.utf8'");

for my $database (sort keys %databases)
{
  SKIP:
	{
		my $made = $node->psql('postgres', "CREATE DATABASE $database TEMPLATE template0 ENCODING UTF8 $databases{$database}") == 0
		  && $test->sql(q{SELECT lower('I' COLLATE "default") = 'ı'}, $database) eq 't';

		skip "the server knows no Turkish of $database", 4 if !$made;
		$test->set_up($database);
		$test->sql(qq{ALTER SERVER omni OPTIONS (ADD model '$model'); CREATE SCHEMA "INVOICES"; CREATE TABLE "INVOICES".t ();
			CREATE SCHEMA limits; CREATE TABLE limits.t ()}, $database);
		for my $known ([ 'invoices', 'LIMITS' ], [ 'Warehouse.Invoices', 'Warehouse.Limits' ], [ 'INVOICES', 'limits' ])
		{
			$omni->set(schemas => $known);
			is($test->sql(q{SELECT ok, detail FROM omni_refresh_check() WHERE check_name = 'schemas'}, $database),
				't|Omni knows all 2 schemas with tables or views of this database', "$database: Omni knows @$known");
		}

		# The name of a setting in the configuration file
		$node->append_conf('postgresql.conf', "omni_refresh.enabled = off\n");
		$node->reload;
		$test->sql('SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE backend_type = \'omni_refresh worker\'');
		my $id = $test->sql('SET omni_refresh.enabled = on; SELECT id FROM omni_refresh_on_commit()', $database);
		$node->append_conf('postgresql.conf', "OMNI_REFRESH.ENABLED = on\n");
		$node->reload;
		ok($node->poll_query_until($database, "SELECT status = 'accepted' FROM omni_refresh_job WHERE id = $id"),
			"$database: ... and a setting in capitals is read");
	}
}

$test->done;
