# CREATE EXTENSION in a schema in which an untrusted role has made objects of its own: none of them
# becomes part of the extension, and none runs as whoever uses the extension.

use strict;
use warnings FATAL => 'all';

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

use OmniAPI;
use OmniFault;

my $omni = OmniAPI->start;
my $node = OmniFault::node('main');
my $first_user_oid = 16384;		# FirstNormalObjectId: initdb has made what is below

END { my $rc = $?; $omni->stop if $omni; $? = $rc; }

sub sql
{
	my ($sql, $db) = @_;

	return $node->safe_psql($db // 'postgres', $sql);
}

# All that belongs to the extension, from its members down to indexes, rules and column defaults
my $members = q{
	WITH RECURSIVE member AS (
		SELECT 'pg_extension'::regclass::oid AS classid, oid AS objid FROM pg_extension WHERE extname = 'omni_refresh'
		UNION
		SELECT d.classid, d.objid FROM pg_depend AS d JOIN member AS m ON (d.refclassid, d.refobjid) = (m.classid, m.objid)
		WHERE deptype IN ('e', 'i', 'a'))};

# The node trees of a database's extension (rules, policies, checks, predicates, defaults), as
# [catalog.column, object, text]. The catalogs tell which columns hold node trees.
sub trees
{
	my ($db) = @_;
	my @trees;

	for my $column (split /\n/, sql(q{
			SELECT a.attrelid::regclass, a.attname, k.attname FROM pg_attribute AS a JOIN pg_attribute AS k ON k.attrelid = a.attrelid AND k.attnum = 1
			WHERE a.atttypid = 'pg_node_tree'::regtype AND a.attrelid < 16384 ORDER BY 1, 2}, $db))
	{
		my ($catalog, $attribute, $key) = split /\|/, $column;
		# An index is an object of pg_class.
		my $class = $catalog eq 'pg_index' ? 'pg_class' : $catalog;
		push @trees, map { [ "$catalog.$attribute", split /\|/, $_, 2 ] } split /\n/, sql(qq{
			$members SELECT objid, translate(c.${attribute}::text, E'\\n', ' ') FROM member JOIN $catalog AS c ON c.$key = objid
			WHERE classid = '$class'::regclass AND c.$attribute IS NOT NULL}, $db);
	}
	return @trees;
}

# The OIDs in a node tree, of all fields that may hold one or of those whose names match
sub oids
{
	my ($tree, $fields) = @_;
	my %oids;

	while ($tree =~ /:(\w+) (?:(\d+)(?= )|\(o ([\d ]+)\))/g)
	{
		my ($field, $oid, $list) = ($1, $2, $3);
		next if $field =~ /^(?:location|constlen|stmt_\w+)$/ || defined $fields && $field !~ $fields;
		$oids{$_} = 1 foreach defined $list ? split ' ', $list : $oid;
	}
	return keys %oids;
}

# What the extension uses, as it is where nobody is in its way

my @trees = trees('postgres');
my %in = map { $_->[0] => 1 } @trees;
is(join(' ', grep { !$in{$_} } qw(pg_constraint.conbin pg_index.indpred pg_policy.polqual pg_proc.proargdefaults pg_rewrite.ev_action)), '',
	'the node trees are read');
my $used = join ', ', map { oids($_->[2], qr/(?:funcid|fnoid|opno|eqop|sortop|type|typeid|relid)$/i) } @trees;
my @functions = split /\n/, sql(qq{
	SELECT proname, CASE WHEN prokind <> 'a' THEN 'function' WHEN aggkind = 'n' THEN 'aggregate' ELSE 'ordered' END,
		max(pronargs), string_agg(DISTINCT format_type(prorettype, NULL), ',')
	FROM pg_proc AS p LEFT JOIN pg_aggregate AS a ON aggfnoid = p.oid
	WHERE p.oid IN ($used) AND p.oid < $first_user_oid GROUP BY 1, 2});
my @operators = split /\n/, sql(qq{
	SELECT oprname, max(format_type(oprresult, NULL)) FROM pg_operator WHERE oid IN ($used) GROUP BY 1});
my @types = split /\n/, sql(qq{
	$members, used AS (
		SELECT oid FROM pg_type WHERE oid IN ($used)
		UNION SELECT atttypid FROM pg_attribute JOIN member ON objid = attrelid AND classid = 'pg_class'::regclass
		UNION SELECT unnest(prorettype || proargtypes::oid[] || proallargtypes) FROM pg_proc JOIN member ON objid = oid AND classid = 'pg_proc'::regclass)
	SELECT DISTINCT typname FROM pg_type JOIN used USING (oid) WHERE oid < $first_user_oid AND typtype <> 'p' AND typname !~ '^pg_'});
my @relations = split /\n/, sql(qq{
	SELECT relname FROM pg_class WHERE oid IN ($used) AND oid < $first_user_oid AND relkind IN ('r', 'v') AND relnamespace = 'pg_catalog'::regnamespace});
for my $case ([ percentile_cont => \@functions ], [ pg_has_role => \@functions ], [ '=' => \@operators ], [ '-' => \@operators ],
	[ text => \@types ], [ uuid => \@types ], [ pg_roles => \@relations ], [ pg_stat_activity => \@relations ])
{
	my ($name, $list) = @$case;
	is(scalar(grep { /^\Q$name\E(?:\||$)/ } @$list), 1, "$name is known to be used");
}

# An untrusted role makes functions, aggregates and operators of these names for all types of
# arguments, types and relations of these names, and casts to the types. What runs is told.

my @arguments = ('boolean', 'smallint', 'integer', 'bigint', 'oid', 'numeric', 'real', 'double precision', 'text', 'varchar', 'bpchar', '"char"', 'name',
	'uuid', 'interval', 'timestamptz', 'timestamp', 'date', 'text[]', 'name[]', 'bigint[]', 'anyelement', 'anyarray');
my $trap = q{
	CREATE TABLE trap.told (what text);
	GRANT ALL ON trap.told TO PUBLIC;
	CREATE FUNCTION trap.tell(what text) RETURNS void LANGUAGE plpgsql AS 'BEGIN INSERT INTO trap.told VALUES ($1); END';};
my %made;

# A trap function; IMMUTABLE, so that an index may use it
sub trap_function
{
	my ($name, $result, @types) = @_;
	my $arguments = join ', ', @types;

	$result = $1 if $result =~ /^any/ && ($arguments =~ /(anyelement|anyarray)/ or return 0);
	return 1 if $made{"$name($arguments)"}++;
	$trap .= qq{CREATE FUNCTION trap."$name"($arguments) RETURNS $result LANGUAGE plpgsql IMMUTABLE
		AS \$\$ BEGIN PERFORM trap.tell('$name($arguments)'); RETURN NULL; END \$\$;\n};
	return 1;
}

# All lists of so many types
sub lists
{
	my ($count) = @_;

	return [] if $count == 0;
	my @shorter = lists($count - 1);
	return map { my $type = $_; map { [ $type, @$_ ] } @shorter } @arguments;
}

for my $operator (@operators)
{
	my ($name, $result) = split /\|/, $operator;
	for my $types (lists(2))
	{
		trap_function("operator $result", $result, @$types);
		$trap .= qq{CREATE OPERATOR trap.$name (LEFTARG = $types->[0], RIGHTARG = $types->[1], FUNCTION = trap."operator $result");\n};
	}
}
for my $function (@functions)
{
	my ($name, $kind, $count, $results) = split /\|/, $function;
	my %results = map { $_ => 1 } split /,/, $results;
	my ($any) = sort keys %results;
	if ($kind eq 'function')
	{
		trap_function($name, $any, @$_) for $count <= 2 ? lists($count) : ();
		trap_function($name, $any, 'integer DEFAULT 0') if $count == 0;
		next;
	}
	$any = 'interval' if $any =~ /^any/;
	$trap .= qq{CREATE AGGREGATE trap."$name"(*) (SFUNC = trap."step", STYPE = $any);\n} if trap_function('step', $any, $any);
	for my $type (grep { !/^any/ } @arguments)
	{
		my $result = $results{$type} ? $type : $any;
		trap_function('step', $result, $result, $type);
		for my $direct ($kind eq 'ordered' ? grep { !/^any/ } @arguments : '')
		{
			my $signature = $direct ? "$direct ORDER BY $type" : $type;
			$trap .= qq{CREATE AGGREGATE trap."$name"($signature) (SFUNC = trap."step", STYPE = $result);\n};
		}
	}
}
for my $type (@types)
{
	next if $type =~ /^_/;
	$trap .= qq{CREATE TYPE trap."$type" AS ENUM ('trap');
		CREATE CAST (trap."$type" AS pg_catalog."$type") WITH INOUT AS IMPLICIT;
		CREATE CAST (pg_catalog."$type" AS trap."$type") WITH INOUT AS IMPLICIT;\n};
}
$trap .= qq{CREATE VIEW trap."$_" AS SELECT c.* FROM pg_catalog."$_" AS c, trap.tell('$_');\n} for @relations;

sql('CREATE DATABASE trapped; CREATE DATABASE taken; CREATE ROLE mallory; CREATE ROLE reader');
sql("CREATE SCHEMA trap AUTHORIZATION mallory; GRANT USAGE ON SCHEMA trap TO PUBLIC; SET ROLE mallory; SET search_path = '';\n$trap", 'trapped');
cmp_ok(sql(q{SELECT count(*) FROM pg_proc WHERE pronamespace = 'trap'::regnamespace}, 'trapped'), '>', 1500, 'an untrusted role has made functions');
cmp_ok(sql(q{SELECT count(*) FROM pg_operator WHERE oprnamespace = 'trap'::regnamespace}, 'trapped'), '>', 1500, '... and operators');

# No object of the extension has anything to do with these

sql('CREATE EXTENSION omni_refresh SCHEMA trap', 'trapped');
is(sql(qq{$members
	SELECT pg_describe_object(d.classid, d.objid, d.objsubid) || ' depends on ' || pg_describe_object(refclassid, refobjid, refobjsubid)
	FROM pg_depend AS d JOIN member USING (classid, objid)
	WHERE (refclassid, refobjid) NOT IN (SELECT classid, objid FROM member) AND refobjid >= $first_user_oid
		AND (refclassid, refobjid) <> ('pg_namespace'::regclass, 'trap'::regnamespace)}, 'trapped'), '',
	'the extension depends on nothing but what initdb has made, and itself');
my @trapped = trees('trapped');
is(scalar(@trapped), scalar(@trees), 'there are as many node trees as elsewhere');
for my $tree (@trapped)
{
	my ($column, $object, $text) = @$tree;
	my $oids = join ', ', grep { $_ >= $first_user_oid && $_ < 4294967296 } oids($text);
	is($oids eq '' ? '' : sql(qq{$members, named AS (SELECT unnest(ARRAY[$oids]::oid[]) AS oid)
			SELECT string_agg(pg_describe_object(c.classid, named.oid, 0), ', ')
			FROM named, (VALUES ('pg_proc'::regclass), ('pg_operator'), ('pg_type'), ('pg_class'), ('pg_collation')) AS c (classid)
			WHERE CASE classid
				WHEN 'pg_proc'::regclass THEN EXISTS (SELECT FROM pg_proc AS o WHERE o.oid = named.oid)
				WHEN 'pg_operator'::regclass THEN EXISTS (SELECT FROM pg_operator AS o WHERE o.oid = named.oid)
				WHEN 'pg_type'::regclass THEN EXISTS (SELECT FROM pg_type AS o WHERE o.oid = named.oid)
				WHEN 'pg_class'::regclass THEN EXISTS (SELECT FROM pg_class AS o WHERE o.oid = named.oid)
				ELSE EXISTS (SELECT FROM pg_collation AS o WHERE o.oid = named.oid) END
			AND (classid, named.oid) NOT IN (SELECT classid, objid FROM member)}, 'trapped'), '', "$column of object $object names nothing else");
}

# ... and none of them runs

OmniFault::server($node, 'omni', db => 'trapped', url => $omni->http, key => $omni->key, rate_limit => 0);
for my $path ('', 'SET search_path = trap;')
{
	is(sql(qq{$path SELECT status FROM trap.omni_refresh('${\ $omni->model}')}, 'trapped'), 'accepted', 'a call is made' . ($path && ', with these in the path'));
	is(sql(qq{SET ROLE reader; $path SELECT status FROM trap.omni_refresh_job}, 'trapped'), '', '... and not seen by others');
	is(sql(qq{$path SELECT server, accepted, p50 IS NOT NULL FROM trap.omni_refresh_status}, 'trapped'), $path ? 'omni|2|t' : 'omni|1|t', '... but by the superuser');
}
is(sql('SELECT DISTINCT what FROM trap.told', 'trapped'), '', '... and nothing of the untrusted role was run');

# What has a name of the extension's own already is neither taken over nor worked around. A routine that takes a
# record cannot be there before: only C functions do.

my @names = split /\n/, sql(qq{$members
	SELECT CASE relkind WHEN 'r' THEN 'TABLE' WHEN 'v' THEN 'VIEW' ELSE 'SEQUENCE' END, quote_ident(relname) FROM member
	JOIN pg_class ON oid = objid AND classid = 'pg_class'::regclass AND relnamespace = 'public'::regnamespace
	UNION ALL
	SELECT 'TYPE', quote_ident(typname) FROM member
	JOIN pg_type ON oid = objid AND classid = 'pg_type'::regclass AND typname ~ '^omni' AND typnamespace = 'public'::regnamespace
	UNION ALL
	SELECT 'FUNCTION', oid::regprocedure::text FROM member JOIN pg_proc ON oid = objid AND classid = 'pg_proc'::regclass
	WHERE 'record'::regtype <> ALL (proargtypes::oid[])});
my %definition = (TABLE => '(id bigint)', VIEW => 'AS SELECT 1 AS id', SEQUENCE => '', TYPE => 'AS (id bigint)',
	FUNCTION => q{RETURNS void LANGUAGE plpgsql AS 'BEGIN END'});
cmp_ok(scalar(@names), '>=', 24, 'the names of the extension are known');
sql('CREATE SCHEMA trap AUTHORIZATION mallory', 'taken');
for my $name (@names)
{
	my ($kind, $object) = split /\|/, $name;
	my ($out, $err);
	my $definition = $object eq 'omni_refresh_keep_out()' ? q{RETURNS trigger LANGUAGE plpgsql AS 'BEGIN END'} : $definition{$kind};
	$node->psql('taken', "\\set VERBOSITY verbose\nBEGIN; SET LOCAL ROLE mallory; CREATE $kind trap.$object $definition;
		RESET ROLE; CREATE EXTENSION omni_refresh SCHEMA trap; ROLLBACK", stdout => \$out, stderr => \$err);
	like($err, qr/ERROR:  (?:42P07|42710|42723): .* already exists/, "a \L$kind\E $object that is there already is an error");
}

done_testing();
