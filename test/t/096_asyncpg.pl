# asyncpg, the driver that is strictest about types: it reads each value in binary form, and a record by the
# types of its members, of which it knows the built-in ones only.

use strict;
use warnings FATAL => 'all';

use IPC::Run ();
use PostgreSQL::Test::Utils;
use Test::More;

use OmniRoles;

plan skip_all => 'asyncpg is not installed' if system('/usr/bin/python3 -c "import asyncpg" 2>/dev/null') != 0;

OmniRoles::start('asyncpg');
OmniFault::server($node, 'omni', url => $omni->http, key => $omni->key, rate_limit => 0);

# Runs statements, and says of each how many values the row has that it returns, or what the error is. Each has
# a connection of its own, which has learned no types from another statement.
my $program = $node->basedir . '/ask.py';
append_to_file($program, <<'EOF');
import asyncio, asyncpg, os, sys, uuid

async def ask(statement, arguments):
    connection = await asyncpg.connect(host=os.environ['PGHOST'], port=int(os.environ['PGPORT']),
                                       user=sys.argv[1], database='postgres')
    try:
        return await connection.fetchrow(statement, *arguments)
    finally:
        await connection.close()

async def main():
    model = uuid.UUID(sys.argv[2])
    number = [(await ask('SELECT id FROM omni_refresh_on_commit($1)', [model]))['id']]
    for name, statement, arguments in (
            ('call', 'SELECT * FROM omni_refresh($1)', [model]),
            ('row', 'SELECT omni_refresh_on_commit($1)', [model]),
            ('wait', 'SELECT * FROM omni_refresh_wait($1)', number),
            ('await', 'CALL omni_refresh_await(%d)' % number[0], []),
            ('job', 'SELECT job FROM omni_refresh_job AS job WHERE id = $1', number),
            ('event', 'SELECT event FROM omni_refresh_event AS event WHERE job = $1 LIMIT 1', number),
            ('record', 'SELECT ROW(status, kind, origin) FROM omni_refresh_job WHERE id = $1', number),
            ('freshness', 'SELECT * FROM omni_refresh_freshness LIMIT 1', []),
            ('status', 'SELECT status FROM omni_refresh_status AS status LIMIT 1', []),
            ('check', 'SELECT omni_refresh_check() LIMIT 1', [])):
        try:
            row = await ask(statement, arguments)
            while len(row) == 1:
                row = row[0]
            print(name, 'ok', len(row))
        except Exception as error:
            print(name, type(error).__name__, error)

asyncio.run(main())
EOF
my ($out, $err);

{
	local $ENV{PGHOST} = $node->host;
	local $ENV{PGPORT} = $node->port;
	IPC::Run::run([ '/usr/bin/python3', $program, sql('SELECT current_user'), $model ], '>', \$out, '2>', \$err) or diag($err);
}
my $columns = sql(q{SELECT count(*) FROM pg_attribute WHERE attrelid = 'omni_refresh_job'::regclass AND attnum > 0});
my %columns = (map({ $_ => $columns } qw(call row wait await job)), record => 3);
my %said = map { /^(\w+) (.*)/ ? ($1 => $2) : () } split /\n/, $out;
for my $name (qw(call row wait await job event record freshness status check))
{
	my $number = $columns{$name} // '\d+';

	like($said{$name} // 'nothing', qr/^ok $number$/, "asyncpg reads what $name returns");
}

$node->stop('fast');
done_testing();
