# The key is where it was put and in the worker's memory; whatever happens, and whatever the other
# side sends back, it is nowhere else.

use strict;
use warnings FATAL => 'all';

use File::Find ();
use File::Spec;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;

my $omni = OmniAPI->start;
my $node = OmniFault::node('main', conf => "log_min_messages = debug5\nlog_error_verbosity = verbose\n");
my $model = $omni->model;
my $refresh = "SELECT * FROM omni_refresh('$model');";

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

# A key as Omni's, and one of all that has a meaning somewhere; both from a file outside of the
# data directory, so that there is no good reason for them to be in it.
my $file = File::Spec->rel2abs(PostgreSQL::Test::Utils::tempdir) . '/key';
my %keys = (
	'usual' => $omni->key,
	'odd' => 'k"\\/<>&%41+=?#\'{}[]$^.*|()!~,;:@`-_' . substr($omni->key, -12));

OmniFault::server($node, 'omni', url => $omni->https, ca_file => $omni->ca, key => 'x', rate_limit => 0,
	timeout => '2 s');
$node->safe_psql('postgres',
	"ALTER USER MAPPING FOR PUBLIC SERVER omni OPTIONS (DROP api_key, ADD api_key_file '$file')");

# The spellings in which a key may come back
sub percent { return join '', map { /[A-Za-z0-9._~-]/ ? $_ : sprintf '%%%02X', ord } split //, $_[0] }
sub escape { return join '', map { sprintf "\\u%04$_[1]", ord } split //, $_[0] }
sub json { return $_[0] =~ s/([\\"])/\\$1/gr }
sub slashes { return json($_[0]) =~ s/\//\\\//gr }
sub spellings
{
	my ($key) = @_;
	return (
		'as it is' => $key,
		'percent-encoded' => percent($key),
		'percent-encoded in small letters' => percent($key) =~ s/(%..)/lc $1/ger,
		'escaped as \u006f' => escape($key, 'x'),
		'escaped as \u006F' => escape($key, 'X'),
		'escaped in part' => escape(substr($key, 0, 5), 'x') . json(substr($key, 5)),
		'as JSON' => json($key),
		'as JSON with \/' => slashes($key));
}

# Whether a text, undone of all that may disguise it, has a key or most of it. Its end is alike in
# both keys and has no character to be escaped; so is any longer part of it a sign.
my $end = substr($omni->key, -12);
sub tells
{
	my ($text) = @_;
	my $plain = $text =~ s/\\u00([0-9a-fA-F]{2})/chr hex $1/ger;
	my $percent = $text =~ s/%([0-9a-fA-F]{2})/chr hex $1/ger;
	return (grep { index(lc, lc $end) >= 0 } $text, $plain, $percent) ? 1 : 0;
}
for my $key (values %keys)
{
	my %spellings = spellings($key);
	is(tells($spellings{$_}), 1, "this test would notice a key $_") for sort keys %spellings;
}
ok(!tells('[API key]'), '... and knows what is harmless');

my $seen = 0;

sub check
{
	my ($name, $call) = @_;
	my $tables = $node->safe_psql('postgres', qq{
		SELECT concat_ws(' ', j.error, e.detail) FROM omni_refresh_job j
			JOIN omni_refresh_event e ON e.job = j.id
		WHERE j.id > $seen});
	is(tells($call->{err}) + tells($call->{out}), 0, "$name: not told the caller") or diag($call->{err} =~ s/x{9,}/x/gr);
	is(tells($tables), 0, '... nor written down');
	$seen = $node->safe_psql('postgres', 'SELECT max(id) FROM omni_refresh_job');
	return;
}

for my $kind (sort keys %keys)
{
	my $key = $keys{$kind};

	unlink $file;
	append_to_file($file, $key);
	$omni->set(key => $key);
	my $call = OmniFault::call($node, $refresh);
	is($call->{status}, 0, "the $kind key is sent") or diag($call->{err});
	is((($omni->requests)[-1]->{headers}{authorization}), "Bearer $key", '... as it is');
	check("$kind key, success", $call);

	$omni->fault('echo_key');
	$call = OmniFault::call($node, $refresh);
	check("$kind key, echo", $call);
	is($call->{detail}, 'Omni says: Invalid token [API key], which is [API key]', '... but what else was said is');
	my %spellings = spellings($key);
	for my $how (sort keys %spellings)
	{
		my $spelling = $spellings{$how};
		my @bodies = (
			[ 401, "{\"detail\": \"no $spelling here\"}" ], [ 400, "{\"errors\": [\"$spelling\"]}" ],
			[ 400, "{\"error\": \"$spelling\", \"message\": \"$spelling\"}" ],
			[ 403, "<p>$spelling</p>" ], [ 404, "{\"detail\": \"cut $spelling" ],
			[ 418, 'x' x 900 . $spelling ], [ 422, 'x' x 980 . $spelling ],
			[ 200, $spelling ], [ 200, "{\"status\": \"$spelling" ],
			[ 200, "{\"jobId\": \"$spelling\", \"status\": \"$spelling\"}" ]);

		# In a text that is no URL, percent signs are nobody's business.
		@bodies = () if $how =~ /percent/;
		$omni->fault('answer', status => $_->[0], body => $_->[1]) for @bodies;
		$omni->fault('redirect', location => "https://elsewhere.example/$spelling?token=$spelling#$spelling");
		$omni->fault('redirect', location => "/$spelling");
		$call = OmniFault::call($node, "\\set ON_ERROR_STOP off\n" . $refresh x (@bodies + 2));
		is(() = $call->{err} =~ /ERROR:/g, @bodies + 2, "the $kind key comes back $how");
		check("$kind key, $how", $call);
	}
	is($node->safe_psql('postgres', q{SELECT count(*) FROM omni_refresh_job WHERE status IN ('pending', 'sending')}), '0',
		'all of them came to an end');

	# While it is on its way
	$omni->fault('hang');
	my $hanging = OmniFault::begin($node, $refresh, app => 'hanging');
	OmniFault::wait_until_waiting($node, 'hanging');
	is(tells($node->safe_psql('postgres', 'SELECT string_agg(s::text, chr(10)) FROM pg_stat_activity s')), 0,
		'no session shows the key');
	is($node->safe_psql('postgres', q{SELECT count(*) FROM pg_stat_activity
			WHERE backend_type = 'omni_refresh worker' AND query LIKE '%Omni%'}), '1', '... though the worker says what it does');
	my ($commands, $segments) = ('', '');
	for my $pid (split /\n/, $node->safe_psql('postgres', 'SELECT pid FROM pg_stat_activity'))
	{
		$commands .= join '', map { -r $_ ? slurp_file($_) : '' } "/proc/$pid/cmdline", "/proc/$pid/environ";
	}
	is(tells($commands), 0, '... nor does a process');
	my $directory = $node->data_dir . '/pg_dynshmem';
	$segments .= slurp_file("$directory/$_") for grep { !/^\./ } slurp_dir($directory);
	isnt($segments, '', 'there is shared memory') ;
	is(tells($segments), 0, '... in which the key is not');
	OmniFault::kill_client($hanging);
	$omni->reset;
}

# All of it, in the end
is(tells($node->safe_psql('postgres', 'SELECT string_agg(t::text, chr(10)) FROM omni_refresh_job t')), 0, 'no job has the key');
is(tells($node->safe_psql('postgres', 'SELECT string_agg(t::text, chr(10)) FROM omni_refresh_event t')), 0, 'no event has it');
$node->stop('fast');
my @found;
my $files = 0;
File::Find::find(sub {
	return if !-f $_ || !-s _;
	$files++;
	my $content = slurp_file($_);
	push @found, $File::Find::name if index($content, $end) >= 0;
}, $node->data_dir);
cmp_ok($files, '>', 500, 'the data directory');
is("@found", '', '... has the key nowhere');
my $log = slurp_file($node->logfile);
like($log, qr/DEBUG/, 'the log has all there is to say');
is(tells($log), 0, '... but not the key');

done_testing();
