# Who is no superuser comes to a refresh by doing what the errors and their hints say.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;

my $omni = OmniAPI->start;
my $node = OmniFault::node('newcomer');
my $refresh = q{SELECT * FROM omni_refresh('} . $omni->model . q{')};
my $https = $omni->https;
my $file = $node->basedir . '/key';

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

$node->safe_psql('postgres', 'CREATE ROLE dora LOGIN; CREATE DATABASE doras OWNER dora');
append_to_file($file, $omni->key);

# Runs statements as dora; returns the SQLSTATE, 00000 if all went well.
my $last;

sub state_of
{
	my ($sql, $db) = @_;

	$last = OmniFault::call($node, "$sql;", user => 'dora', db => $db // 'postgres');
	return $last->{status} == 0 ? '00000' : $last->{sqlstate};
}

# The statement in the last hint that a regular expression matches, with a value in place of the example's
sub statement
{
	my ($expression, $value) = @_;
	my ($statement) = $last->{hint} =~ $expression;

	return ($statement // die "no such statement: $last->{hint}") =~ s/'[^']*'/'$value'/r;
}

sub superuser { return $node->safe_psql('postgres', statement(@_)) }

# The extension

is(state_of('CREATE EXTENSION omni_refresh', 'doras'), '42501', 'an owner of a database cannot create the extension');
like($last->{hint}, qr/superuser/, '... as the hint says');

# A server of her own

my $own = "SET omni_refresh.server = own; $refresh";
is(state_of("CREATE SERVER own FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url '$https')"), '42501', 'nor a server');
is(state_of($own), '42704', 'a call of a server that is not there');
superuser(qr/(GRANT USAGE ON FOREIGN DATA WRAPPER omni_refresh TO dora);/, '');
is(state_of($own), '42704', '... says what to grant, and once that is granted');
is(state_of(statement(qr/(CREATE SERVER own .*?\))/, $https)), '00000', '... how to create the server');
is(state_of($own), '28000', '... after which a call');
is(state_of(statement(qr/(CREATE USER MAPPING FOR dora SERVER own .*?\))/, $omni->key)), '00000', '... says how to create a mapping');
is(state_of($own), '08001', '... after which there is only the certificate left');
like($last->{detail}, qr/certificate/, '... which nobody has signed whom the system trusts');
is(state_of(qq{ALTER USER MAPPING FOR dora SERVER own OPTIONS (DROP api_key, ADD api_key_file '$file')}), '42501', 'a key in a file');
is($last->{hint}, 'Ask a superuser to make the change, or use the option "api_key".', '... is for superusers');

# A superuser's server

$node->safe_psql('postgres', "CREATE SERVER omni FOREIGN DATA WRAPPER omni_refresh OPTIONS (base_url '${\ $omni->http}', rate_limit '0')");
is(state_of($refresh), '42501', "somebody else's server");
superuser(qr/(GRANT USAGE ON FOREIGN SERVER omni TO dora)\./, '');
is(state_of($refresh), '28000', '... says what to grant, and once that is granted');
superuser(qr/(CREATE USER MAPPING FOR dora SERVER omni OPTIONS \(api_key_file .*?\)) as a superuser/, $file);
is(state_of($refresh), '00000', '... which mapping a superuser is to create, and that is all');
is((($omni->requests)[-1]->{headers}{authorization}), 'Bearer ' . $omni->key, '... with the key in a file');
$node->safe_psql('postgres', 'ALTER USER MAPPING FOR dora SERVER omni OPTIONS (DROP api_key_file)');
is(state_of($refresh), '28000', 'without a key');
superuser(qr/(ALTER USER MAPPING FOR dora SERVER omni OPTIONS \(ADD api_key_file .*?\)) as a superuser/, $file);
is(state_of($refresh), '00000', '... the hint says how to add it');

done_testing();
