# Row locks: has somebody hold the row of a job while others go on. Alice's jobs are the ones whose rows
# are locked; bob has an instance of his own.

package OmniLock;

use strict;
use warnings FATAL => 'all';

use Exporter qw(import);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;
use OmniLife;

our @EXPORT = qw($omni $other $node $model sql call queue job configure end_worker others hold until_due says);

our ($omni, $other, $node, $model);
my $worker;

END { my $rc = $?; $_->stop for grep { $_ } $omni, $other; $? = $rc; }

sub start
{
	my ($name) = @_;

	$omni = OmniAPI->start;
	$other = OmniAPI->start;
	$node = OmniFault::node($name, conf => "omni_refresh.min_interval = 0\nomni_refresh.max_in_flight = 10\n");
	$model = $omni->model;
	OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);
	OmniFault::server($node, 'other', url => $other->http, key => $other->key, rate_limit => 0);
	OmniFault::server($node, 'slow', url => $omni->http, key => 'another-key', rate_limit => 1);
	$node->safe_psql('postgres', 'CREATE ROLE alice LOGIN; CREATE ROLE bob LOGIN');
	return;
}

sub sql
{
	return $node->safe_psql('postgres', @_);
}

# Begins a call of alice's.
sub call
{
	my ($settings) = @_;

	return OmniFault::begin($node, join('', map { "SET $_;" } @{ $settings // [] }) . "SELECT status FROM omni_refresh('$model');",
		user => 'alice');
}

# Queues a job of alice's; returns its number.
sub queue
{
	return sql("SET ROLE alice; SELECT id FROM omni_refresh_on_commit('$model')");
}

# Waits for a job of alice's, the last one if none is named, and returns its number.
sub job
{
	my ($condition, $id) = @_;

	$id //= q{(SELECT max(id) FROM omni_refresh_job WHERE requested_by = 'alice')};
	$node->poll_query_until('postgres', "SELECT count(*) = 1 FROM omni_refresh_job WHERE id = $id AND $condition")
		or die "no job with $condition";
	return sql("SELECT $id");
}

sub configure
{
	my (%settings) = @_;

	$node->append_conf('postgresql.conf', join '', map { "omni_refresh.$_ = $settings{$_}\n" } sort keys %settings);
	$node->reload;
	return;
}

# Ends the worker; the next one finds what it had in flight.
sub end_worker
{
	sql(q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type = 'omni_refresh worker'});
	return;
}

# The calls and the queue of another user go on: at once, where the fault makes them wait for five
# seconds or more, or fail.
sub others
{
	my ($name) = @_;
	my $call = OmniFault::call($node, "SET omni_refresh.server = other; SET omni_refresh.call_timeout = '10 s';
		SELECT status FROM omni_refresh('" . $other->model . "');", user => 'bob');

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	like($call->{out}, qr/^(accepted|running)$/, "$name: another's call") or diag($call->{err});
	cmp_ok($call->{seconds}, '<', 4, '... is not kept');
	my $id = sql("SET ROLE bob; SET omni_refresh.server = other; SELECT id FROM omni_refresh_on_commit('" . $other->model . "')");
	OmniLife::until_true("... nor is another's job in the queue", sub {
			sql("SELECT sent_at - requested_at < '4 s' AND status IN ('accepted', 'running', 'completed') FROM omni_refresh_job WHERE id = $id") eq 't' });
	return;
}

# Who wants a row for himself
my %locks = (
	'FOR UPDATE' => sub { "SELECT FROM omni_refresh_job WHERE id = $_[0] FOR UPDATE" },
	'FOR SHARE' => sub { "SELECT FROM omni_refresh_job WHERE id = $_[0] FOR SHARE" },
	'DELETE' => sub { "DELETE FROM omni_refresh_job WHERE id = $_[0]" },
	'cancel' => sub { "SET SESSION AUTHORIZATION alice; SELECT omni_refresh_cancel($_[0])" },
	'events' => sub { "SELECT FROM omni_refresh_event WHERE job = $_[0] FOR UPDATE" });

# Holds a row in a transaction while others go on, then ends that and waits for the end of the job.
# "after" does what makes the worker want the row, and "end" looks at what became of alice's session.
sub hold
{
	my ($name, $lock, $last, $status, $begin, %more) = @_;
	my $log = -s $node->logfile;

	$name .= ", $lock, $last";
	note($name);
	$_->reset for $omni, $other;
	my $session = OmniLife::session($node, 'postgres');
	my ($id, $call) = $begin->();
	my ($out, $err) = $session->query('BEGIN; ' . $locks{$lock}->($id));
	is("$out$err", $lock eq 'cancel' ? 't' : '', "$name: the row is held") or diag($err);
	$more{after}->($id, $call) if $more{after};
	others($name);
	others('... a second time') if $more{twice};
	$worker = OmniFault::worker($node);
	$session->query($last);
	OmniLife::until_true("... the job itself comes to its end: $status", sub {
			sql("SELECT coalesce((SELECT status FROM omni_refresh_job WHERE id = $id), 'none')") =~ /^(?:$status)$/ })
		or diag(sql("SELECT status, attempts, run_at - now() FROM omni_refresh_job WHERE id = $id"));
	is(OmniFault::worker($node), $worker, '... by the same worker');
	$omni->fault('none');
	OmniFault::finish($call) if $call;
	$more{end}->($id, $call) if $more{end};
	$session->quit;
	sql(q{DELETE FROM omni_refresh_job WHERE requested_by = 'alice' AND status IN ('pending', 'sending', 'running')});
	my @lines = grep { /LOG:|WARNING:|ERROR:|FATAL:/ && /lock|omni_refresh|job/ } split /\n/, substr(slurp_file($node->logfile), $log);
	cmp_ok(scalar(@lines), '<', 10, '... without much ado in the log') or diag(join "\n", @lines[0 .. 9]);
	return;
}

sub until_due
{
	my ($id) = @_;

	job('run_at <= clock_timestamp()', $id);
	return;
}

sub says
{
	my ($sqlstate, $out) = @_;

	return sub {
		my ($id, $call) = @_;
		like($call->{sqlstate}, qr/^(?:$sqlstate)$/, '... its caller is told') or diag($call->{err});
		is($call->{out}, $out // '', '... the truth');
	};
}

# Ends a script.
sub finish
{
	$node->stop('fast');
	OmniLife::clean($node, 'the log is clean', qr/could not record/, qr/could not read the queue/, qr/terminating/,
		qr/the background worker ended before job/, qr/could not delete old jobs/, qr/HTTP status 401/, qr/database system was not properly shut down|interrupted/);
	done_testing();
	return;
}

1;
