# Omni speaks UTF-8; a database need not.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;

my $omni = OmniAPI->start;
my $node = OmniFault::node('main');
my $model = $omni->model;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

# The bytes of a parameter of the last request
sub parameter
{
	my ($name) = @_;
	my ($value) = (($omni->requests)[-1]->{query}) =~ /(?:^|&)$name=([^&]*)/;
	return $value =~ s/\+/ /gr =~ s/%(..)/chr hex $1/ger;
}

sub is_utf8
{
	my ($text) = @_;
	return utf8::decode($text);
}

$node->safe_psql('postgres', "CREATE DATABASE \"$_\" ENCODING '$_' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
	for 'LATIN1', 'SQL_ASCII', 'EUC_JP';
for my $db ('postgres', 'LATIN1', 'SQL_ASCII', 'EUC_JP')
{
	$node->safe_psql($db, 'CREATE EXTENSION omni_refresh') if $db ne 'postgres';
	OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0, db => $db);
}

# What goes out. psql speaks UTF-8; in SQL_ASCII, bytes are bytes.

my %names = (postgres => 'façade 日本', LATIN1 => 'façade', SQL_ASCII => 'façade 日本', EUC_JP => '日本');
for my $db (sort keys %names)
{
	my $call = OmniFault::call($node, <<EOF, db => $db);
SET client_encoding = '${\ ($db eq 'SQL_ASCII' ? 'SQL_ASCII' : 'UTF8')}';
SELECT status, schemas[1] FROM omni_refresh('$model', schemas => ARRAY['$names{$db}']);
EOF
	is($call->{out}, "accepted|$names{$db}", "a name from a database in the encoding of $db") or diag($call->{err});
	is(parameter('schemas'), $names{$db}, '... arrives in UTF-8');
}
is($node->safe_psql('LATIN1', q{SET client_encoding = 'SQL_ASCII';
		SELECT encode(convert_to(schemas[1], 'LATIN1'), 'hex') FROM omni_refresh_job}),
	'66' . '61e761' . '6465', 'the row has it in the encoding of the database');
my $worker = OmniFault::worker($node, 'SQL_ASCII');
my $requests = () = $omni->requests;
my $call = OmniFault::call($node, qq{SET client_encoding = 'SQL_ASCII';
	SELECT * FROM omni_refresh('$model', schemas => ARRAY[E'fa\\xe7ade'])}, db => 'SQL_ASCII');
is($call->{sqlstate}, '22021', 'bytes that are not UTF-8 are refused');
is(scalar(() = $omni->requests), $requests, '... not sent');
is(OmniFault::worker($node, 'SQL_ASCII'), $worker, '... and the worker stays');

# What comes back

my %answers = (
	'raw' => '{"detail": "caf\u00e9 costs 3 €, 日本 \ud83d\ude00", "status": 400}',
	'escaped' => '{"detail": "caf\\\\u00e9 costs 3 \\\\u20ac \\\\ud83d\\\\ude00", "status": 400}',
	'half' => '{"detail": "half \\\\ud83d of it", "status": 400}',
	'control' => '{"detail": "one\\\\ntwo\\\\u0007\\\\u001b[31m", "status": 400}',
	'html' => '<p>café 日本</p>',
	'long' => '{"detail": "' . '日本é' x 3000 . '"}',
	'long html' => '日本é' x 3000,
	'latin1' => "caf\xe9");
for my $db (sort keys %names)
{
	$worker = OmniFault::worker($node, $db);
	for my $name (sort keys %answers)
	{
		# The stand-in wants bytes that are no UTF-8 as surrogates; JSON::PP encodes characters.
		my $body = $answers{$name};
		$body =~ s/\xe9/\x{dce9}/ if $name eq 'latin1';
		utf8::decode($body) if $name ne 'latin1';
		$body =~ s/\\\\/\\/g;
		$omni->fault('answer', status => 400, body => $body);
		$call = OmniFault::call($node, "SET client_encoding = '${\ ($db eq 'SQL_ASCII' ? 'SQL_ASCII' : 'UTF8')}';
			SELECT * FROM omni_refresh('$model')", db => $db);
		is($call->{sqlstate}, '22023', "$db: an error text that is $name") or diag($call->{err});
		ok(is_utf8($call->{err}), '... comes out in good order');
		is($node->safe_psql($db, q{SELECT left(error, 6) FROM omni_refresh_job ORDER BY id DESC LIMIT 1}), '22023:',
			'... and can be read from its row');
	}
	is(OmniFault::worker($node, $db), $worker, "$db: the worker is the same");
}
$omni->fault('answer', status => 400, body => "{\"detail\": \"caf\x{e9} costs 3 \x{20ac}\"}");
$call = OmniFault::call($node, "SELECT * FROM omni_refresh('$model')");
is($call->{detail}, "Omni says: caf\xc3\xa9 costs 3 \xe2\x82\xac", 'in UTF-8 nothing is lost');

# Answers of the kind that means yes

for my $db (sort keys %names)
{
	for my $fault (qw(nul_escape not_utf8 nul truncated))
	{
		$omni->fault($fault);
		$call = OmniFault::call($node, "SELECT * FROM omni_refresh('$model')", db => $db);
		like($call->{sqlstate}, qr/^08P01$/, "$db: the answer $fault") or diag($call->{err});
	}
	$omni->fault('answer', status => 200, body => "{\"jobId\": \"$model\", \"status\": \"running\", \"note\": \"\x{65e5}\"}");
	$call = OmniFault::call($node, "SELECT status, job_id FROM omni_refresh('$model')", db => $db);
	is($call->{out}, "accepted|$model", "$db: a note in Japanese is no obstacle") or diag($call->{err});
}
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');

done_testing();
