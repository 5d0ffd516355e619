# A server, and statements of several roles there: what they print, or how they are refused.
#
#	OmniRoles::start('called', login => 'pooler', conf => "omni_refresh.max_in_flight = 1\n");
#	is(as('one', 'SELECT omni_refresh_cancel(1)'), '42501', '...');

package OmniRoles;

use strict;
use warnings FATAL => 'all';

use Exporter qw(import);
use Test::More;

use OmniAPI;
use OmniFault;

our @EXPORT = qw($omni $node $model $error sql as until_true hold);

our ($omni, $node, $model, $error);
my @login;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

# Options: conf, as for OmniFault::node(); login, the role whose sessions SET ROLE, if not a superuser's.
sub start
{
	my ($name, %options) = @_;

	@login = (extra_params => [ '-U', $options{login} ]) if $options{login};
	$omni = OmniAPI->start;
	$node = OmniFault::node($name, conf => "omni_refresh.min_interval = 0\n" . ($options{conf} // ''));
	$model = $omni->model;
	return;
}

sub sql
{
	return $node->safe_psql('postgres', @_);
}

# What statements of a role print, or the SQLSTATE of their error; $error has all that they complain of. An
# empty role: who has logged in.
sub as
{
	my ($role, $sql) = @_;
	my $set = $role eq '' ? '' : "SET ROLE $role;";
	my ($rc, $out, $err) = $node->psql('postgres', "\\set VERBOSITY verbose\n$set\n$sql", @login);

	$error = $err;
	return $err =~ /ERROR:  (\w{5}): / ? "$out$1" : $out;
}

sub until_true
{
	my ($name, $condition) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return ok($node->poll_query_until('postgres', "SELECT $condition"), $name);
}

# In the configuration file: holds what is queued, or lets it go.
sub hold
{
	my ($on) = @_;
	my ($enabled, $what) = $on ? ('off', 'held') : ('on', 'let go');
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$node->append_conf('postgresql.conf', "omni_refresh.enabled = $enabled\n");
	$node->reload;
	return until_true("the queue is $what", "current_setting('omni_refresh.enabled') = '$enabled' FROM omni_refresh_wake()");
}

1;
