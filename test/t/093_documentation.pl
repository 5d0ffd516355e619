# What README.md and doc/*.md show is true: every block of SQL is run, in order, in a database of its file,
# and what it shows as its result is compared; signatures, options, settings, columns, statuses, events,
# messages and links are those that there are.
#
# A comment before a block, which readers do not see, tells how to run it (see OmniDoc.pm):
#
#	<!-- test: skip REASON -->			not at all; there is a limit to those
#	<!-- test: as ROLE -->				as this role, not as the superuser
#	<!-- test: before STATEMENT -->		after this statement
#	<!-- test: expanded -->				with psql's expanded output
#	<!-- test: running -->				with a stand-in for Omni that answers "running", not "completed"
#	<!-- test: job STATUS -->			with a job of this status; its number replaces 42
#	<!-- test: log -->					no SQL, but lines that omni_refresh writes to the server's log
#
# The files beside the README presuppose what its first block sets up. Three things are replaced in each
# block: Omni's address, with the authority that the stand-in's certificate needs; the key's file; and 42.

use strict;
use warnings FATAL => 'all';

use File::Basename qw(dirname);
use IPC::Run ();
use JSON::PP;
use OmniAPI;
use OmniDoc;
use OmniFault;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $model = '98c7ad96-5c04-4fb7-b33a-1389a65d16ed';
my $omni = do { local $ENV{OMNI_API_MODEL} = $model; OmniAPI->start };
my $node = OmniFault::node('documentation', extension => 0,
	conf => "omni_refresh.track = on\nomni_refresh.min_interval = 0\nwal_level = logical\n");
my $key_file = $node->basedir . '/omni.key';
my $url = $omni->https;
my $ca = $omni->ca;
my $unfinished = q{SELECT count(*) = 0 FROM omni_refresh_job WHERE status IN ('pending', 'sending', 'running')};
my $most_skipped = 0;

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

append_to_file($key_file, $omni->key . "\n");

# What the examples presuppose: an application's roles, tables and procedure, and pg_cron, whose function is
# replaced by one that only remembers the commands: they are run below as pg_cron runs them.
$node->safe_psql('postgres', q{
	CREATE ROLE loader LOGIN; CREATE ROLE analyst LOGIN; CREATE ROLE grafana LOGIN; CREATE DATABASE staging});

sub set_up
{
	my ($file) = @_;
	my $database = lc $file =~ s/\W+/_/gr;

	$node->safe_psql('postgres', "CREATE DATABASE $database");
	$node->safe_psql($database, q{
		CREATE SCHEMA sales CREATE TABLE orders (id int PRIMARY KEY) CREATE TABLE customers (id int PRIMARY KEY);
		CREATE PROCEDURE load_orders() LANGUAGE sql AS 'INSERT INTO sales.orders SELECT count(*) FROM sales.orders';
		CREATE SCHEMA cron CREATE TABLE job (name text PRIMARY KEY, command text);
		CREATE FUNCTION cron.schedule(name text, schedule text, command text) RETURNS bigint LANGUAGE sql
			AS 'INSERT INTO cron.job VALUES (name, command) RETURNING 1'});
	if ($file ne 'README.md')
	{
		my ($first) = grep { $_->{language} eq 'sql' } OmniDoc::blocks('README.md');
		run_block($database, { %$first, orders => {} });		# the job needs no polls then
		$node->safe_psql($database, 'GRANT USAGE ON FOREIGN SERVER omni TO loader; GRANT USAGE ON FOREIGN DATA WRAPPER omni_refresh TO analyst');
	}
	return $database;
}

# Runs psql; returns whether it succeeded, and all that it wrote.
sub psql
{
	my ($database, $input, @options) = @_;
	my $output = '';
	my $ok = IPC::Run::run(
		[ $node->installed_command('psql'), '-Xqv', 'ON_ERROR_STOP=1', '-d', $node->connstr($database), @options ],
		'<', \$input, '>&', \$output, IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default));

	return ($ok, $output =~ s/^psql:<stdin>:\d+: //mgr);
}

# Makes a job that ends with a status; returns its number.
sub job
{
	my ($database, $status) = @_;

	$omni->set(refresh_status => 'completed');
	$omni->fault('answer', status => 404, body => '{"detail": "No such model", "status": 404}') if $status eq 'failed';
	my $id = $node->safe_psql($database, 'SELECT id FROM omni_refresh_on_commit()');
	$node->poll_query_until($database, "SELECT status = '$status' FROM omni_refresh_job WHERE id = $id") or die;
	return $id;
}

# Returns a block's SQL as it is run.
sub substituted
{
	my ($database, $block) = @_;
	my $sql = $block->{text};
	my $more = exists $block->{orders}{as} ? '' : ", ca_file '$ca', rate_limit '0'";
	my $id = exists $block->{orders}{job} ? job($database, $block->{orders}{job}) : 42;

	$sql =~ s{'https://acme\.omniapp\.co'}{'$url'$more}g;
	$sql =~ s{/etc/postgresql/omni\.key}{$key_file}g;
	$sql =~ s{\b42\b}{$id}g;
	return $sql;
}

sub run_block
{
	my ($database, $block) = @_;
	my $orders = $block->{orders};
	my $sql = substituted($database, $block);

	$omni->set(refresh_status => exists $orders->{running} ? 'running' : 'completed');
	$node->safe_psql($database, $orders->{before}) if exists $orders->{before};
	my ($ok, $output) = psql($database, $sql, '-f', '-',
		(exists $orders->{expanded} ? '-x' : ()), (exists $orders->{as} ? ('-U', $orders->{as}) : ()));
	$node->poll_query_until($database, $unfinished) or die
		if $node->safe_psql($database, q{SELECT count(*) FROM pg_extension WHERE extname = 'omni_refresh'}) eq '1';
	return ($ok, $output);
}

# A text in which only what is the same in each run is left: no uuids but the model's, no times, no widths of columns.
sub normal
{
	my ($text) = @_;
	my $uuid = qr/[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}/;

	$text =~ s/($uuid)/$1 eq $model ? 'MODEL' : 'UUID'/eg;
	$text =~ s/\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?(?:[-+]\d\d)?/TIME/g;
	$text =~ s/\d\d:\d\d:\d\d\.\d+/DURATION/g;
	$text =~ s/-{2,}/-/g;
	$text =~ s/[ \t]+/ /g;
	$text =~ s/^ | $//mg;
	return $text =~ s/\s+\z/\n/r;
}

# Whether what psql wrote is what a block shows, in which a line "..." stands for any lines.
sub is_shown
{
	my ($output, $shown, $name) = @_;
	my $regex = join '', map { $_ eq '...' ? '(?s:.*)' : quotemeta("$_\n") } split /\n/, normal($shown);

	return like(normal($output), qr/\A$regex\z/, $name);
}

# The blocks

my $skipped = 0;

for my $file (OmniDoc::files())
{
	my @blocks = grep { $_->{language} eq 'sql' } OmniDoc::blocks($file) or next;
	my $database = set_up($file);

	for my $block (@blocks)
	{
		my $name = "$file:$block->{line}";

		if (exists $block->{orders}{skip})
		{
			isnt($block->{orders}{skip}, '', "$name is not run: $block->{orders}{skip}");
			$skipped++;
			next;
		}
		my ($ok, $output) = run_block($database, $block);
		ok($ok, "$name runs") or diag($output);
		if (defined $block->{output})
		{
			is_shown($output, $block->{output}, "... and writes what it shows");
		}
		else
		{
			unlike($output, qr/^(?:WARNING|ERROR):/m, '... and warns of nothing');
		}
		for my $command (split /\0/, $node->safe_psql($database, q{
			WITH job AS (DELETE FROM cron.job RETURNING command) SELECT string_agg(command, chr(1)) FROM job}) =~ tr/\1/\0/r)
		{
			($ok, $output) = psql($database, '', '-c', $command);
			ok($ok && $output !~ /WARNING/, "... and pg_cron runs: $command") or diag($output);
		}
	}
}
cmp_ok($skipped, '<=', $most_skipped, 'few blocks are not run');

# dbt's hook, in a transaction or not: dbt leaves that open.
my ($yaml) = grep { $_->{language} eq 'yaml' } OmniDoc::blocks('README.md');
my ($hook) = $yaml->{text} =~ /^  - "(.*)"$/ms;
for my $autocommit ('on', 'off')
{
	$node->safe_psql('readme_md', 'TRUNCATE omni_refresh_job');
	my ($ok, $output) = psql('readme_md', '', '-v', "AUTOCOMMIT=$autocommit", '-c', $hook);
	ok($ok, "dbt's hook runs with autocommit $autocommit") or diag($output);
	$node->poll_query_until('readme_md', $unfinished) or die;
	is($node->safe_psql('readme_md', q{SELECT string_agg(kind || ' ' || status, ', ' ORDER BY id) FROM omni_refresh_job}),
		'schema completed, cache completed', '... and refreshes, and resets the cache');
}

# What there is. A table of the documentation by the name of its first column, as a list of rows of cells.

sub table
{
	my ($file, $heading) = @_;
	my ($rows) = OmniDoc::text($file) =~ /^\| \Q$heading\E \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)/m;

	return map { [ map { s/^ | $//gr } /(?<=\|)([^|]*)(?=\|)/g ] } split /\n/, $rows // die "no table $heading";
}

# The text of a file without its blocks
sub prose
{
	my ($file) = @_;
	return OmniDoc::text($file) =~ s/^```.*?^```$//msgr;
}

sub names
{
	return join ' ', sort map { $_->[0] =~ /`([^`]+)`/g } table(@_);
}

my $database = set_up('what_there_is');
my $reference = 'doc/reference.md';

# Whole statements within the text, and calls with arguments
for my $file (OmniDoc::files())
{
	my %statements = map { s/\s+/ /gr => 1 }
		grep { /^(?:SELECT .*FROM \w+(?:\(\))?|SELECT \w+\(\)|(?:LISTEN|REVOKE|LOAD) .+|GRANT .+ TO .+|omni_refresh\w*\(.+ => .+\))$/s } prose($file) =~ /`([^`]+)`/g;

	for my $statement (sort keys %statements)
	{
		my ($ok, $output) = psql($database, 'BEGIN; ' . $statement =~ s/^(?=omni_)/SELECT * FROM /r . '; ROLLBACK');
		ok($ok && $output !~ /WARNING/, "$file has a statement that runs: $statement") or diag($output);
	}
}

sub list
{
	my ($sql) = @_;
	return $node->safe_psql($database, "LOAD 'omni_refresh'; SELECT string_agg(name, ' ' ORDER BY name COLLATE \"C\") FROM ($sql) AS list (name)");
}

my $signatures = join "\n", sort map { s/\n(?=\w)/\0/gr =~ s/\s+/ /gr =~ s/ ?\0 ?/\n/gr =~ s/timestamp with time zone/timestamptz/gr } map { split /\n(?=\w)/, $_->{text} =~ s/\n\z//r }
	grep { $_->{language} eq '' && $_->{text} =~ /^(PROCEDURE )?omni_refresh\w*\(/ } OmniDoc::blocks($reference);
is($signatures, join("\n", sort split /\n/, $node->safe_psql($database, q{
		SELECT replace(regexp_replace(concat(CASE prokind WHEN 'p' THEN 'PROCEDURE ' END, proname, '(', pg_get_function_arguments(p.oid), ')',
			' RETURNS ' || pg_get_function_result(p.oid)), '::\w+( with time zone)?(\[\])?', '', 'g'), 'timestamp with time zone', 'timestamptz')
		FROM pg_proc AS p JOIN pg_depend ON classid = 'pg_proc'::regclass AND objid = p.oid AND deptype = 'e'
			JOIN pg_extension AS e ON e.oid = refobjid AND extname = 'omni_refresh'
		WHERE prorettype NOT IN ('trigger'::regtype, 'event_trigger'::regtype) AND proname NOT IN ('omni_refresh_validator', 'omni_refresh_get_counters', 'omni_refresh_outcomes',
			'omni_refresh_requests_last_minute')})),
	'the functions and their signatures');

for my $kind ('server', 'user mapping')
{
	my $create = $kind eq 'server' ? 'SERVER none FOREIGN DATA WRAPPER omni_refresh' : 'USER MAPPING FOR loader SERVER omni';
	my (undef, $output) = psql($database, "CREATE $create OPTIONS (zzzzzzzzzzzzzzzzzzzz '1')");
	my ($options) = $output =~ /HINT:  Options of a $kind are (.*)\./;

	is(names($reference, "option of a $kind"), join(' ', sort split /, | and /, $options), "the options of a $kind");
}

my %boot = map { split /\|/, $_, 2 } split /\n/, $node->safe_psql($database,
	q{LOAD 'omni_refresh'; SELECT name, boot_val, unit FROM pg_settings WHERE name LIKE 'omni_refresh.%'});
my %in_ms = (ms => 1, s => 1000, min => 60_000, h => 3_600_000, d => 86_400_000);
is(names($reference, 'setting'), join(' ', sort keys %boot), 'the settings');
for my $row (table($reference, 'setting'))
{
	my ($name, $shown) = map { /`(.*)`/ } @$row[0, 1];
	my ($value, $unit) = split /\|/, $boot{$name};
	my ($number, $shown_unit) = $shown =~ /^(\d+)(ms|s|min|h|d)$/;

	is(defined $number ? $number * $in_ms{$shown_unit} / $in_ms{$unit} : $shown, $value, "... and the default of $name");
}

for my $relation (split ' ', list(q{SELECT relname FROM pg_class AS c JOIN pg_depend ON classid = 'pg_class'::regclass AND objid = c.oid
	JOIN pg_extension AS e ON e.oid = refobjid AND extname = 'omni_refresh' WHERE deptype = 'e' AND relkind IN ('r', 'v')}))
{
	is(names($reference, "column of `$relation`"), list("SELECT attname FROM pg_attribute WHERE attrelid = '$relation'::regclass AND attnum > 0 AND NOT attisdropped"),
		"the columns of $relation");
}

my %words = map { $_ => list(qq{SELECT (regexp_matches(pg_get_constraintdef(oid), '[{,"'']+([a-z_]+)(?=["'',}])', 'g'))[1]
	FROM pg_constraint WHERE conname = 'omni_refresh_$_'}) } qw(job_status_check event_event_check);
is(names($reference, 'status'), $words{job_status_check}, 'the statuses');
is(names($reference, 'event'), $words{event_event_check}, 'the events');
my ($mermaid) = map { $_->{text} } grep { $_->{language} eq 'mermaid' } OmniDoc::blocks('README.md');
my %drawn = map { $_ => 1 } grep { $_ ne '[*]' } $mermaid =~ /^ *(\S+) --> (\w+)/mg;
is(join(' ', sort keys %drawn), $words{job_status_check}, '... which are all drawn');

# Messages in bold code are the program's, or PostgreSQL's; "..." stands for any text.

my %postgresql = (
	'permission denied for foreign-data wrapper omni_refresh' => 'CREATE SERVER x FOREIGN DATA WRAPPER omni_refresh',
	'permission denied to create extension "omni_refresh"' => 'CREATE EXTENSION omni_refresh',
	'malformed array literal: "sales"' => q{SELECT * FROM omni_refresh(schemas => 'sales')});
my $sources = join '', map { slurp_file($_) } map { glob dirname(__FILE__) . "/../../src/$_" } '*.c', '*/*.c';
my %macros = (INT64_FORMAT => '%d', OMNI_EXTENSION => 'omni_refresh');
my $token = qr/"(?:[^"\\\n]|\\.)*"|INT64_FORMAT|OMNI_EXTENSION/;
my @formats;

while ($sources =~ /($token(?:\s+$token)*)/g)
{
	my $format = join '', map { $macros{$_} // s/^"|"$//gr =~ s/\\(.)/$1/gr } $1 =~ /$token/g;
	my @parts = split /%[-.*\d]*[a-z]/, $format, -1;

	push @formats, join '.+', map { quotemeta } @parts if length join('', @parts) > 10;
}
for my $message (OmniDoc::text('doc/operations.md') =~ /\*\*`(.*?)`\*\*/g)
{
	if (my $statement = $postgresql{$message})
	{
		my (undef, $output) = psql($message =~ /create extension/ ? 'staging' : $database, $statement, '-U', 'grafana');

		like($output, qr/ERROR:  \Q$message\E$/m, "PostgreSQL says: $message");
	}
	else
	{
		ok((grep { $message =~ /\A$_\z/ } @formats), "omni_refresh says: $message");
	}
}

# The server's log has the lines that are shown, but for numbers: a failed job leaves one, an outage two.
my $role = $node->safe_psql($database, 'SELECT current_user');
$omni->fault('answer', status => 502);
job($database, 'completed');
job($database, 'failed');
for my $block (grep { exists $_->{orders}{log} } map { OmniDoc::blocks($_) } OmniDoc::files())
{
	for my $line (split /\n/, $block->{text})
	{
		my $regex = join '\d+', map { quotemeta } split /(?<![-\w])\d+(?![-\w])/, $line =~ s/"loader"/"$role"/r, -1;

		ok($node->wait_for_log(qr/$regex$/m), "the log has: $line");
	}
}

# Links lead to files and headings.

my %anchors;

for my $file (OmniDoc::files())
{
	my $text = prose($file);

	$anchors{$file}{ lc s/[^\w\- ]//gr =~ tr/ /-/r } = 1 for $text =~ /^#+ (.*)$/mg;
}
for my $file (OmniDoc::files())
{
	my $text = prose($file);
	my @wrong;

	for my $link ($text =~ /\]\(([^)\s]+)\)/g)
	{
		next if $link =~ /^https:/;
		my ($path, $anchor) = $link =~ /^([^#]*)(?:#(.*))?$/;
		my $target = $path eq '' ? $file : $file =~ m{/} ? "doc/$path" =~ s{^doc/\.\./}{}r : $path;

		push @wrong, $link if !-e dirname(__FILE__) . "/../../$target" || (defined $anchor && !$anchors{$target}{$anchor});
	}
	is("@wrong", '', "the links of $file");
}

my $log = slurp_file($node->logfile);
ok(index($log, $omni->key) < 0, 'the key is not in the log');
unlike($log, qr/PANIC|TRAP|terminated by signal/, 'nothing has crashed');
done_testing();
