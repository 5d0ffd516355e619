# A session that cannot attach the extension's shared memory: DDL never notices, calls say why.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniLife;
use OmniWatch;

my $watch = OmniWatch->new('no_memory', conf => "autovacuum = off\n");
my $node = $watch->node;

END { my $rc = $?; $watch->stop if $watch; $? = $rc; }

my ($major) = $node->safe_psql('postgres', 'SHOW server_version_num') =~ /^(\d\d)/;
plan(skip_all => 'from 17 on, the shared memory of extensions is not bounded by the server') if $major >= 17;

$watch->set;
$node->restart;

# The server's table of locks takes what is left of its shared memory, and keeps it.
my ($rc, undef, $err) = $node->psql('postgres', 'SELECT count(pg_advisory_lock(i)) FROM generate_series(1, 10000000) AS i');
like($err, qr/out of shared memory/, 'all shared memory is in use');

my $session = OmniLife::session($node, 'postgres');
for my $table ('t1', 't2')
{
	my (undef, $said) = $session->query("CREATE TABLE sales.$table (id int)");
	is($said, '', 'DDL does not notice');
}
my (undef, $said) = $session->query("BEGIN; SAVEPOINT s; CREATE TABLE sales.t3 (id int); ROLLBACK TO s; CREATE TABLE sales.t4 (id int); COMMIT");
is($said, '', '... nor does it in a transaction block');
is($watch->sql(q{SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class WHERE relname ~ '^t\d$'}), 't1 t2 t4', 'its tables are there');
(undef, $said) = $session->query("SELECT FROM omni_refresh('" . $watch->omni->model . "')");
like($said, qr/^ERROR:  53200: not enough shared memory/, 'a call says why it fails');
$session->quit;
my @lines = slurp_file($node->logfile) =~ /LOG: .*could not start a background worker to look for changes of tables: (.*)/g;
is(scalar(@lines), 1, 'the log says it once for a session');
like($lines[0], qr/^not enough shared memory/, '... and why');

$node->restart;
$watch->sql('SELECT omni_refresh_wake()');
is($watch->marked, 'added sales.t1, sales.t2, sales.t4', 'the changes are found after a restart');
done_testing();
