# Jobs of two users and two instances of Omni, which should not matter to each other.

package OmniNeighbour;

use strict;
use warnings FATAL => 'all';

use Exporter qw(import);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

our @EXPORT = qw($omni $other $node $model $alice $superuser sql configure end_worker queue held until_true ends);

our ($omni, $other, $node, $model, $alice, $superuser);

END { my $rc = $?; $_->stop for grep { $_ } $omni, $other; $? = $rc; }

sub start
{
	my ($name) = @_;

	$omni = OmniAPI->start;
	$other = OmniAPI->start;
	$node = OmniFault::node($name, conf => join '', map { "$_\n" }
		  'wal_level = logical', 'max_wal_senders = 4', 'max_prepared_transactions = 10', 'omni_refresh.min_interval = 0');
	$model = $omni->model;
	OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
	sql('CREATE ROLE alice LOGIN; CREATE ROLE bob LOGIN');
	$alice = sql(q{SELECT 'alice'::regrole::oid});
	$superuser = sql('SELECT current_user');
	return;
}

sub sql
{
	return $node->safe_psql('postgres', @_);
}

sub configure
{
	my (%settings) = @_;

	$node->append_conf('postgresql.conf', join '', map { "omni_refresh.$_ = $settings{$_}\n" } sort keys %settings);
	$node->reload;
	return;
}

sub end_worker
{
	sql(q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
	return;
}

# Queues a job of alice's, in a session of her own; returns its number.
sub queue
{
	my ($arguments, $settings) = @_;

	$arguments = $arguments ? ", $arguments" : '';
	my $call = OmniFault::call($node, ($settings ? "SET $settings;" : '') . "SELECT id FROM omni_refresh_on_commit('$model'$arguments);", user => 'alice');
	$call->{out} =~ /^\d+\z/ or die $call->{err};
	return $call->{out};
}

# The same while the configuration file holds the queue
sub held
{
	my ($schemas) = @_;

	return sql('SET omni_refresh.enabled = on; SET ROLE alice; SELECT id FROM omni_refresh_on_commit('
		  . "'$model', schemas => '" . ($schemas // '{held}') . q{')});
}

sub until_true
{
	my ($name, $condition, $seconds) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return OmniLife::until_true($name, sub { sql("SELECT $condition") eq 't' }, $seconds // 15)
		|| diag(sql('SELECT id, status, attempts, server, requested_by, error FROM omni_refresh_job ORDER BY id DESC LIMIT 3'));
}

# Waits for the end of a job, or of the one that carries it out.
sub ends
{
	my ($job, $status, $name) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return until_true($name, "status = '$status' FROM omni_refresh_job WHERE id = (SELECT coalesce(merged_into, id) FROM omni_refresh_job WHERE id = $job)");
}

# Ends a script.
sub finish
{
	$node->stop('fast');
	my @crashes = slurp_file($node->logfile) =~ /^.*(?:TRAP:|PANIC:|terminated by signal).*$/mg;
	is("@crashes", '', 'nothing has crashed');
	done_testing();
	return;
}

1;
