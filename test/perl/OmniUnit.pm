# Tests of a file of src/ alone, without a server: each has a program in test/unit.

package OmniUnit;

use strict;
use warnings FATAL => 'all';

use File::Basename qw(dirname);
use File::Spec;
use IPC::Run ();
use PostgreSQL::Test::Utils;

# Compiles test/unit/NAME.c with src/FOLDER/NAME.c and returns the path of the program.
sub compile
{
	my ($name) = @_;
	my $top = File::Spec->rel2abs(dirname(__FILE__) . '/../..');
	my $program = PostgreSQL::Test::Utils::tempdir() . "/$name";
	my $include = `pg_config --includedir-server`;
	chomp $include;
	my ($file) = glob "$top/src/*/$name.c";

	IPC::Run::run([ $ENV{CC} // 'cc', '-O1', '-o', $program, "-I$top/src", "-I$include", "$top/test/unit/$name.c", $file ])
		or die("could not compile $file");
	return $program;
}

# Runs a program with arguments in a string and some input, and returns its output without the last newline.
sub output
{
	my ($program, $arguments, $input) = @_;

	IPC::Run::run([ $program, split / /, $arguments // '' ], '<', \($input // ''), '>', \my $out);
	chomp $out;
	return $out;
}

1;
