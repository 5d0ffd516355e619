# What covers what, and what is merged: src/lane.c alone, without a server, compared with sets of tables.

use strict;
use warnings FATAL => 'all';

use OmniUnit;
use Test::More;
use Time::HiRes ();

my $seed = $ENV{OMNI_LANE_SEED} || int(Time::HiRes::time * 1000) % 2**31;
my $program = OmniUnit::compile('lane');

is(OmniUnit::output($program, "$seed 100000"), 'ok', 'a hundred thousand random requests and lanes') or diag("OMNI_LANE_SEED=$seed");

done_testing();
