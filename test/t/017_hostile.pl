# What surrounds the server, and what users may set or make, does not lead a call astray.

use strict;
use warnings FATAL => 'all';

use File::Spec;
use IO::Select;
use IO::Socket::INET;
use JSON::PP;
use POSIX ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;

my $omni = OmniAPI->start;
my $directory = File::Spec->rel2abs(PostgreSQL::Test::Utils::tempdir);
my $refresh = q{SELECT * FROM omni_refresh('} . $omni->model . q{');};

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

# A header of the last request
sub header { return (($omni->requests)[-1]->{headers}{ $_[0] }) }

# The environment: proxies, a home with credentials, libraries' own settings

my $proxy = IO::Socket::INET->new(LocalAddr => '127.0.0.1', Listen => 5) or die;
append_to_file("$directory/.netrc", "machine 127.0.0.1 login mallory password secret\ndefault login m password s\n");
append_to_file("$directory/.curlrc", "header = \"X-Evil: 1\"\ninsecure\n");
my $node;
{
	local %ENV = (%ENV, HOME => $directory, CURL_HOME => $directory, NETRC => "$directory/.netrc",
		(map { ($_ => 'http://127.0.0.1:' . $proxy->sockport) }
			qw(http_proxy https_proxy HTTP_PROXY HTTPS_PROXY all_proxy ALL_PROXY)), no_proxy => '');
	$node = OmniFault::node('main');
}
OmniFault::server($node, 'omni', url => $omni->https, ca_file => $omni->ca, key => $omni->key, rate_limit => 0);
OmniFault::server($node, 'plain', url => $omni->http, key => $omni->key, rate_limit => 0);
for my $server ('omni', 'plain')
{
	my $call = OmniFault::call($node, "SET omni_refresh.server = $server; $refresh");
	is($call->{status}, 0, "a call to $server in a hostile environment") or diag($call->{err});
	is(header('authorization'), 'Bearer ' . $omni->key, '... has the key, and no other credentials');
	is(header('x-evil'), undef, '... and no header of others');
	is(header('cookie'), undef, '... nor a cookie');
}
is(scalar(() = IO::Select->new($proxy)->can_read(0)), 0, 'no proxy of the environment was contacted');
my $worker = OmniFault::worker($node);

# Files with a key

my $file = "$directory/key";
OmniFault::server($node, 'filed', url => $omni->http, key => 'x', rate_limit => 0);
$node->safe_psql('postgres', "ALTER USER MAPPING FOR PUBLIC SERVER filed OPTIONS (DROP api_key, ADD api_key_file '$file')");
my $filed = "SET omni_refresh.server = filed; $refresh";
my @contents = (
	[ 'nothing', '' ], [ 'only white space', " \n\n" ], [ 'two lines', "one\ntwo\n" ],
	[ 'a header', "key\r\nX-Evil: 1" ], [ 'a NUL', "key\0more" ], [ 'a space', 'two words' ],
	[ 'a control character', "key\x01" ], [ 'what is not ASCII', "k\xc3\xa9y" ], [ 'too much', 'k' x 4097 ]);
my @files = (
	[ 'no file', sub { } ],
	[ 'a FIFO', sub { POSIX::mkfifo($file, 0600) } ],
	[ 'a directory', sub { mkdir $file } ],
	[ 'a device', sub { symlink '/dev/zero', $file } ],
	[ 'a file of a terabyte', sub { append_to_file($file, 'k'); truncate $file, 1 << 40 } ],
	[ 'a file one may not read', sub { append_to_file($file, 'key'); chmod 0, $file } ],
	(map { my ($name, $text) = @$_; [ "a file with $name", sub { append_to_file($file, $text) } ] } @contents));
my $before = () = $omni->requests;
for my $case (@files)
{
	$case->[1]->();
	my $call = OmniFault::call($node, $filed);
	is($call->{sqlstate}, '28000', "$case->[0] is no key") or diag($call->{err});
	like($call->{message}, qr/\Q$file\E/, '... and the file is named');
	cmp_ok($call->{seconds}, '<', 5, '... at once');
	unlike($call->{err}, qr/X-Evil|two words|kkkk/, '... but what is in it is not shown');
	-d $file && !-l $file ? rmdir $file : unlink $file;
}
is(scalar(() = $omni->requests), $before, 'none of these was sent');
append_to_file($file, "\n " . $omni->key . " \r\n");
is(OmniFault::call($node, $filed)->{status}, 0, 'white space around a key does not matter');
is(header('authorization'), 'Bearer ' . $omni->key, '... and is not sent');
unlink $file;
append_to_file($file, 'rotated');
$omni->set(key => 'rotated');
is(OmniFault::call($node, $filed)->{status}, 0, 'a new key in the file is used at once');
$omni->set(key => $omni->key);
for my $key ('', "k\r\nX-Evil: 1", "k\n", "k\t", 'a b', 'kéy', "k\x7f")
{
	my $call = OmniFault::call($node, "ALTER USER MAPPING FOR PUBLIC SERVER omni OPTIONS (SET api_key '$key')");
	is($call->{sqlstate}, '22023', 'a key that would not fit a header is refused');
	unlike("$call->{message} $call->{detail}", qr/X-Evil|a b/, '... without being shown');
}

# Answers that keep a careless reader busy: the limit of time is far above what one takes that
# reads each of them once

my %million = map { ($_ => $_ x int(1_000_000 / length)) }
	('&', '&#', '&amp', '&amp;', '%', '%2', '%25', '\\', '\\u0', '\\\\', ' ', "\e", 'a');
for my $bait (sort keys %million)
{
	my %bodies = (text => $million{$bait}, JSON => encode_json({ detail => $million{$bait} }));
	for my $kind (sort keys %bodies)
	{
		next if length $bodies{$kind} > 1 << 20;
		$omni->fault('answer', status => 409, body => $bodies{$kind});
		my $call = OmniFault::call($node, $refresh);
		is($call->{sqlstate}, '38000', "a million of $kind: " . encode_json([$bait])) or diag($call->{message});
		cmp_ok($call->{seconds}, '<', 5, '... is read at once');
	}
}
for my $case (
	[ 'members', '{' . join(',', map { qq("m$_": 1) } 1 .. 70_000) . '}' ],
	[ 'elements', '[' . '1,' x 400_000 . '1]' ],
	[ 'levels', '{"a":' x 150_000 ],
	[ 'digits', '{"status": ' . '9' x 1_000_000 . '}' ],
	[ 'an exponent', '{"status": 1e' . '9' x 100_000 . '}' ],
	[ 'a name', '{"' . 'a' x 1_000_000 . '": 1}' ])
{
	for my $status (200, 409)
	{
		$omni->fault('answer', status => $status, body => $case->[1]);
		my $call = OmniFault::call($node, $refresh);
		is($call->{sqlstate}, $status == 200 ? '08P01' : '38000', "an answer of $status with endless $case->[0]");
		cmp_ok($call->{seconds}, '<', 5, '... is read at once');
	}
}
$omni->fault('answer', status => 200, body => '{"status": "' . 'a' x 1_000_000 . '"}');
is(OmniFault::call($node, $refresh)->{status}, 0, 'a status may be long');
my @after = ('9' x 30, '-1', 'Thu, 01 Jan 1970 00:00:00 GMT', 'soon', '');
for my $i (0 .. $#after)
{
	# a key of its own, since one that was answered so may have to wait
	$node->safe_psql('postgres', "ALTER USER MAPPING FOR PUBLIC SERVER omni OPTIONS (SET api_key 'key$i')");
	$omni->set(key => "key$i");
	$omni->fault('answer', status => 429, body => '', headers => { 'Retry-After' => $after[$i] });
	my $call = OmniFault::call($node, "SET omni_refresh.call_timeout = '3 s'; $refresh");
	like($call->{sqlstate}, qr/^(53000)?$/, "Retry-After: $after[$i]");
}
$node->safe_psql('postgres', "ALTER USER MAPPING FOR PUBLIC SERVER omni OPTIONS (SET api_key '${\ $omni->key}')");
$omni->set(key => $omni->key);

# Answers made for whoever reads them at a terminal. All that is quoted is one line without
# control characters and what else changes how a line looks, whichever way it came.

my $dirt = join '', map { chr } 1 .. 31, 127 .. 159, 0xad, 0x61c, 0x180e, 0x200b .. 0x200f, 0x2028 .. 0x202e,
	0x2060 .. 0x206f, 0xfeff, 0xfff9 .. 0xfffb, 0xe0001, 0xe0020 .. 0xe007f;
my $forged = "Mod\xe8le introuvable \x{65e5}\x{672c}$dirt\nHINT:  Run DROP.\r\nERROR:  \e[2J";
my $json = JSON::PP->new->ascii;
my %forged = (
	'a detail' => [ 409, $json->encode({ detail => $forged }) ],
	'an error' => [ 409, $json->encode({ error => $forged }) ],
	'a message' => [ 409, $json->encode({ error => 'x', message => $forged }) ],
	'a text' => [ 409, $forged ],
	'half a text of JSON' => [ 409, qq({"detail": "$forged) ],
	'a text that means yes' => [ 200, $forged ]);
for my $what (sort keys %forged)
{
	$omni->fault('answer', status => $forged{$what}[0], body => $forged{$what}[1]);
	my $call = OmniFault::call($node, $refresh);
	my $error = $node->safe_psql('postgres', 'SELECT error FROM omni_refresh_job ORDER BY id DESC LIMIT 1');
	for my $text ($call->{err}, $error)
	{
		ok(utf8::decode($text), "$what: valid UTF-8");
		like($text, qr/Mod\xe8le introuvable \x{65e5}\x{672c} /, '... which can be read');
		is(join(' ', map { sprintf '%X', ord } $text =~ /([^\n\PC])/g), '', '... without what one cannot see');
		unlike($text, qr/^HINT:  Run|^ERROR:  \[/m, '... and without forged lines');
	}
}
$omni->fault('redirect', location => "https://a\xe8b/\e[2J");
unlike(OmniFault::call($node, $refresh)->{detail}, qr/[\0-\x1f\x7f]/, 'a redirect is told without control characters');

# The key where a text is cut off, which may be in the middle of it

my $tail = substr $omni->key, 9, 12;
my %spelled = (
	'as it is' => $omni->key,
	'in JSON' => join('', map { sprintf '\\u%04x', ord } split //, $omni->key),
	'in a URL' => join('', map { sprintf '%%%02x', ord } split //, $omni->key),
	'in HTML' => join('', map { sprintf '&#%d;', ord } split //, $omni->key),
	'in hexadecimal HTML' => join('', map { sprintf '&#x%06X;', ord } split //, $omni->key),
	'by name' => $omni->key =~ s/_/&lowbar;/gr,
	'in HTML in JSON' => join('', map { sprintf '\\u0026#x%x;', ord } split //, $omni->key),
	'twice in a URL' => join('', map { sprintf '%%25%02x', ord } split //, $omni->key),
	'in capitals' => uc $omni->key);
my %undo = (
	'\\\\u00([0-9a-f]{2})' => sub { chr hex $_[0] }, '%([0-9a-f]{2})' => sub { chr hex $_[0] },
	'&#0*(\\d{1,3});' => sub { chr $_[0] }, '&#x0*([0-9a-f]{1,2});' => sub { chr hex $_[0] },
	'&(lowbar|amp);' => sub { $_[0] eq 'amp' ? '&' : '_' });

# Whether there is a piece of the key in a text, however it is spelled
sub has_piece
{
	my ($text, $depth) = @_;
	return 1 if index(lc $text, lc $tail) >= 0;
	return 0 if $depth == 0;
	for my $pattern (keys %undo)
	{
		my $plain = $text =~ s/$pattern/$undo{$pattern}->($1)/gier;
		return 1 if $plain ne $text && has_piece($plain, $depth - 1);
	}
	return 0;
}
for my $how (sort keys %spelled)
{
	ok(has_piece("x$spelled{$how}", 2), "this test would notice a key $how");
	my @before = map { 'x' x $_ } 0, map { my $end = $_; map { $end - $_ * 17 } 0 .. 12 } 1030;
	push @before, ' ' x 4050, ' ' x 4090;
	$omni->fault('answer', status => 409, body => "$_$spelled{$how}yz") for @before;
	my $call = OmniFault::call($node, "\\set ON_ERROR_STOP off\n" . $refresh x @before);
	is(scalar(() = $call->{err} =~ /ERROR:/g), scalar(@before), "a key $how, cut off anywhere");
	is(has_piece($call->{err}, 2), 0, '... is not told, nor half of it') or diag(substr $call->{err}, 0, 300);
}
$omni->fault('redirect', location => 'https://' . uc($omni->key) . '.example/');
is(has_piece(OmniFault::call($node, $refresh)->{err}, 1), 0, 'a host that is a key is not told');
is(OmniFault::worker($node), $worker, 'the worker is the same after all that');

# Settings of a database, of roles and of a session are not the worker's

$node->safe_psql('postgres', "SELECT pg_terminate_backend($worker, 10000)");
my %settings = (
	default_transaction_read_only => 'on', default_transaction_isolation => 'serializable',
	default_transaction_deferrable => 'on', statement_timeout => '1', lock_timeout => '1',
	idle_in_transaction_session_timeout => '1', session_replication_role => 'replica',
	row_security => 'off', DateStyle => 'SQL, DMY',
	IntervalStyle => 'sql_standard', TimeZone => 'Asia/Kathmandu', bytea_output => 'escape',
	quote_all_identifiers => 'on', client_min_messages => 'debug5', transform_null_equals => 'on',
	synchronous_commit => 'remote_apply', array_nulls => 'off', temp_tablespaces => '');
$settings{standard_conforming_strings} = 'off' if $node->safe_psql('postgres', 'SHOW server_version_num') < 190000;
my @evil = ('search_path = evil, pg_catalog', map { "$_ = '$settings{$_}'" } sort keys %settings);
$node->safe_psql('postgres', q{CREATE SCHEMA evil;
	CREATE TABLE evil.told (what text); GRANT ALL ON SCHEMA evil TO PUBLIC; GRANT ALL ON evil.told TO PUBLIC;
	CREATE FUNCTION evil.equal(int8, int8) RETURNS bool LANGUAGE plpgsql
		AS 'BEGIN INSERT INTO evil.told VALUES (1); RETURN int8eq($1, $2); END';
	CREATE OPERATOR evil.= (LEFTARG = int8, RIGHTARG = int8, FUNCTION = evil.equal);
	CREATE FUNCTION evil.clock_timestamp() RETURNS timestamptz LANGUAGE plpgsql
		AS 'BEGIN INSERT INTO evil.told VALUES (2); RETURN pg_catalog.clock_timestamp(); END';
	CREATE TABLE evil.omni_refresh_job (LIKE omni_refresh_job);
	CREATE TABLE evil.omni_refresh_event (LIKE omni_refresh_event)});
my $status = "SELECT status FROM public.omni_refresh('${\ $omni->model}');";
my @targets = ('DATABASE postgres', 'ROLE ALL', 'ROLE CURRENT_USER', 'ROLE CURRENT_USER IN DATABASE postgres');
for my $target (@targets)
{
	$node->safe_psql('postgres', join '', map { "ALTER $target SET $_;" } @evil);
	local $ENV{PGOPTIONS} = '-c statement_timeout=0 -c lock_timeout=0 -c client_min_messages=warning';
	is($node->safe_psql('postgres', $status), 'accepted', "settings of ALTER $target do no harm");
	is($node->safe_psql('postgres', q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
			WHERE backend_type OPERATOR(pg_catalog.=) 'omni_refresh worker'}), 't', '... to a worker that is new');
	$node->safe_psql('postgres', "SET default_transaction_read_only = off; ALTER $target RESET ALL");
}
my $call = OmniFault::call($node,
	join('', map { "SET $_;" } grep { !/^(statement_timeout|client_min_messages)/ } @evil) . $status);
is($call->{out}, 'accepted', 'nor do those of a session') or diag($call->{err});
is($node->safe_psql('postgres', 'SELECT (SELECT count(*) FROM evil.told) + (SELECT count(*) FROM evil.omni_refresh_job)
	+ (SELECT count(*) FROM evil.omni_refresh_event)'), '0', 'nothing of the schema was touched');

# Odd names

my $schema = q{"Odd schema, 1; %s"};
my $role = q{"odd %s ""role"""};
$node->safe_psql('postgres', 'CREATE DATABASE odd');
$node->safe_psql('odd', "CREATE SCHEMA $schema; CREATE EXTENSION omni_refresh SCHEMA $schema; CREATE ROLE $role;
	GRANT USAGE ON SCHEMA $schema TO $role");
OmniFault::server($node, q{a "" server's %s name}, db => 'odd', url => $omni->http, key => $omni->key,
	rate_limit => 0);
my $odd = qq{SET ROLE $role; SET omni_refresh.server = 'a " server''s %s name';};
$call = OmniFault::call($node, <<EOF, db => 'odd');
$odd
SELECT server, requested_by, schemas FROM $schema.omni_refresh('${\ $omni->model}',
	schemas => ARRAY['a b&c=d#e?f/%41+"ü', '*', '../x', 'a b&c=d#e?f/%41+"ü']);
EOF
is($call->{out}, q(a " server's %s name|odd %s "role"|{"a b&c=d#e?f/%41+\\"ü",*,../x}), 'odd names')
	or diag($call->{err});
my ($request) = ($omni->requests)[-1];
my ($sent) = $request->{query} =~ /(?:^|&)schemas=([^&]*)/;
is($sent =~ s/\+/ /gr =~ s/%(..)/chr hex $1/ger, 'a b&c=d#e?f/%41+"ü,*,../x', '... are sent as they are');
is($request->{path}, '/api/v1/models/' . $omni->model . '/refresh', '... where they belong');
$call = OmniFault::call($node, "$odd SELECT * FROM $schema.omni_refresh('00000000-0000-0000-0000-000000000000')",
	db => 'odd');
is($call->{message}, q(server "a " server's %s name" refused the refresh: HTTP status 404),
	'... and shown as they are');
$node->safe_psql('odd', q{ALTER SERVER "a "" server's %s name" RENAME TO omni});
$call = OmniFault::call($node, "SET ROLE $role; SET omni_refresh.server = '%s'; SELECT * FROM $schema.omni_refresh('${\ $omni->model}')",
	db => 'odd');
is("$call->{sqlstate} $call->{message}", '42704 server "%s" does not exist', '... also in errors of our own');
my $many = join ',', map { "'schema_number_$_'" } 1 .. 300;
$call = OmniFault::call($node, "SET omni_refresh.server = omni; SELECT cardinality(schemas)
	FROM $schema.omni_refresh('${\ $omni->model}', schemas => ARRAY[$many])", db => 'odd');
is($call->{out}, '300', 'hundreds of names are not too many') or diag($call->{err});

unlike(slurp_file($node->logfile), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');

done_testing();
