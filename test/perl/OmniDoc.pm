# The documentation, README.md and doc/*.md, as the tests read it: its blocks of code, in order.
#
#	my ($wrapper) = map { $_->{text} } OmniDoc::find(qr/CREATE FUNCTION refresh_sales/);
#
# A block has
#
#	file, line	where it begins
#	language	of its fence: "sql", "yaml", ... or "" for output and signatures
#	text		its lines
#	output		the text of the block without a language that follows a block of SQL at once, or undef
#	orders		what the comment before it tells a test to do, as a hash reference: <!-- test: as loader; expanded -->
#				becomes { as => 'loader', expanded => '' }. Readers do not see such comments.

package OmniDoc;

use strict;
use warnings FATAL => 'all';

use File::Basename qw(dirname);
use PostgreSQL::Test::Utils;

my $root = dirname(__FILE__) . '/../..';

# The files, README.md first, relative to the root of the source.
sub files
{
	return 'README.md', map { s/^\Q$root\E\///r } sort glob "$root/doc/*.md";
}

sub text
{
	my ($file) = @_;
	return slurp_file("$root/$file");
}

sub blocks
{
	my ($file) = @_;
	my $text = text($file);
	my @blocks;
	my $end = 0;

	while ($text =~ /^(?:<!-- test: (?<orders>[^\n]*) -->\n)?```(?<language>\w*)\n(?<text>.*?)^```$/msg)
	{
		my $block = {
			file => $file,
			line => 1 + (substr($text, 0, $-[0]) =~ tr/\n//),
			%+{qw(language text)},
			orders => { map { /^(\S+)\s*(.*)$/ } split /;\s*/, $+{orders} // '' },
		};
		my ($start, $after) = ($-[0], $+[0]);

		if ($block->{language} eq '' && @blocks && $blocks[-1]{language} eq 'sql'
			&& substr($text, $end, $start - $end) =~ /\A\s*\z/)
		{
			$blocks[-1]{output} = $block->{text};
		}
		else
		{
			push @blocks, $block;
		}
		$end = $after;
	}
	return @blocks;
}

# The blocks of all files whose text matches.
sub find
{
	my ($regex) = @_;
	return grep { $_->{text} =~ $regex } map { blocks($_) } files();
}

1;
