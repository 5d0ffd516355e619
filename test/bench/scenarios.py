"""What the benchmark measures: the scenarios, in the order of the table. See README.md.

    scenarios.py --rounds N --scale X --finished N ROOT [SCENARIO...]

ROOT is the directory of the run, with a server that the script "run" has started.
"""
import argparse
import os
import platform
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

from meter import (CPUS, Sample, bench, interleave, measure, pgbench, pinned, run, scaled, settings,
                   show, show_head, show_ratio, show_row, show_times, sql, start, worker)

HERE = Path(__file__).resolve().parent
MODEL = '00000000-0000-4000-8000-000000000001'
KEY = 'omni_osk_benchmark'
ROUND_TRIP = 40                         # ms, to the distant Omni
IN_FLIGHT = 16                          # omni_refresh.max_in_flight while a queue is drained
HOUR = 3600                             # requests of an hour with the default rate_limit

CALL = f"SELECT id FROM omni_refresh('{MODEL}');"
ASK = f"SELECT id FROM omni_refresh_on_commit('{MODEL}');"
LOAD = "INSERT INTO loaded (what) VALUES ('row');"
VIEW = 'SELECT * FROM omni_refresh_status;'


# The subjects. Each is a function that measures so many requests and returns a sample of one.

def request(url, clients=1):
    """The bare request, by a program with libcurl"""
    def subject(count):
        return Sample(float(run(HERE / 'request', f'{url}/api/v1/models/{MODEL}/refresh', bench.ca,
                                KEY, max(count // clients, 1), clients)))
    return subject


def statement(text, clients=1, db='postgres', **options):
    """A statement that leaves nothing for the worker to do"""
    def subject(count):
        sql('VACUUM', db=db)
        return measure(count, lambda: pgbench(text, count, clients, db, **options), db)
    return subject


def handmade(url, *arguments, **options):
    """What a user would write: a request in the backend, and an INSERT of the answer"""
    arguments_of_request = f"'{url}/api/v1/models/{MODEL}/refresh', '{bench.ca}', '{KEY}'"
    return statement("INSERT INTO handmade (model_id, answer) VALUES"
                     f" ('{MODEL}', handmade_request({arguments_of_request})::jsonb);",
                     *arguments, **options)


def on_commit(text, clients=1, db='postgres'):
    """A transaction that queues a request, which the worker merges"""
    def subject(count):
        finish(db)
        return measure(count, lambda: pgbench(text, count, clients, db), db, lambda: finish(db))
    return subject


def one_statement(text):
    """A statement that makes all requests"""
    def subject(count):
        finish()
        return measure(count, lambda: pgbench(text.format(count=count), 1) / count, finish=finish)
    return subject


def answer_of_job(db='postgres'):
    """A job that is queued by itself: from the request to the answer in its row"""
    def subject(count):
        finish(db)
        settings(min_interval='0')
        last = last_job(db)
        pgbench(f'SELECT pg_sleep(0.5); {ASK}', count, db=db)   # the worker pauses after each look
        until_done(db)
        return Sample(1e6 * float(sql(
            "SELECT extract(epoch FROM percentile_cont(0.5) WITHIN GROUP"
            f" (ORDER BY finished_at - requested_at)) FROM omni_refresh_job WHERE id > {last}", db=db)))
    return subject


def drain(different, db='postgres'):
    """A queue that was held"""
    def subject(count):
        finish(db)
        last = hold_and_queue(count, different, db)
        return measure(count, lambda: release(last, db) / count, db)
    return subject


# What the subjects need

def until_done(db='postgres'):
    """Waits until the worker has sent and heard all."""
    sql("SET statement_timeout = '20min'", 'CALL until_done()', db=db)


def finish(db='postgres'):
    """Has the worker send at once what is queued, and cleans up behind it."""
    settings(min_interval='0')
    until_done(db)
    settings(min_interval='10s')
    sql('VACUUM', db=db)


def last_job(db='postgres'):
    return sql('SELECT coalesce(max(id), 0) FROM omni_refresh_job', db=db)


def hold_and_queue(count, different, db='postgres'):
    """Queues jobs while the worker may send none. Returns the id of the last job before them."""
    last = last_job(db)
    settings(enabled='off', min_interval='0', max_in_flight=IN_FLIGHT)
    sql("LOAD 'omni_refresh'", 'SET omni_refresh.enabled = on', 'SET synchronous_commit = off',
        f'CALL queue({count}, {different})', db=db)
    return last


def release(last, db='postgres'):
    """Lets the worker send them. Returns the time until all jobs above the id are finished."""
    begin = sql("LOAD 'omni_refresh'", 'ALTER SYSTEM SET omni_refresh.enabled = on',
                'SELECT clock_timestamp() FROM pg_reload_conf()')
    until_done(db)
    settings(max_in_flight=4)
    return 1e6 * float(sql(f"SELECT extract(epoch FROM max(finished_at) - '{begin}')"
                           f' FROM omni_refresh_job WHERE id > {last}', db=db))


def insert_like(request_text, db='postgres', table='bare', at='clock_timestamp()', source=''):
    """Returns an INSERT of a row like that of a request's job, whatever columns that has. The
    expression "at" stands for each time.
    """
    return sql('BEGIN', request_text, f"""
        SELECT format('INSERT INTO {table} (%s) SELECT %s {source};', string_agg(key, ', '),
            string_agg(CASE WHEN key LIKE '%\\_at' THEN '{at}' ELSE quote_literal(value) END, ', '))
        FROM (SELECT * FROM omni_refresh_job ORDER BY id DESC LIMIT 1) AS job,
            jsonb_each_text(to_jsonb(job))
        WHERE key <> 'id' AND value IS NOT NULL""", 'ROLLBACK', db=db).split('\n', 1)[1]


def number_of(clients):
    return f'{clients} client{"s" if clients > 1 else ""}'


# The scenarios. What a scenario's comment says is its heading in the table.

def call():
    """a call, over a connection that is open"""
    for clients, count in (1, 4000), (8, 8000), (32, 16000):
        for protocol in 'http', 'https':
            url = bench.urls[protocol]
            with pinned(clients == 1):
                found = interleave(scaled(count), request=request(url, clients),
                                   insert=statement(insert_like(CALL), clients),
                                   handmade=handmade(url, clients),
                                   ours=statement(CALL, clients, server=protocol))
            name = f'{protocol}, {number_of(clients)}'
            aims = ('1.5', '1.0') if name == 'https, 1 client' else ('', '')
            show_times(f'{name}: libcurl request', found['request'])
            show_times(f'{name}: committed INSERT', found['insert'])
            show_times(f'{name}: handmade', found['handmade'])
            show_times(f'{name}: omni_refresh()', found['ours'])
            show_ratio('times request + INSERT', found['ours'], found['request'], found['insert'],
                       aim=aims[0])
            show_ratio('times handmade', found['ours'], found['handmade'], aim=aims[1])


def follow():
    """a call whose job is followed to its end, which takes one poll"""
    def followed(count):
        settings(track='on')
        sample = measure(count, lambda: pgbench(CALL, count), finish=until_done)
        settings(track='off')
        return sample

    with pinned():
        found = interleave(scaled(4000), alone=statement(CALL), followed=followed)
    show_times('https, 1 client: not followed', found['alone'])
    show_times('https, 1 client: followed', found['followed'])


def connect():
    """a session for each call, with Omni at a distance"""
    url = bench.urls['far']
    with pinned():
        found = interleave(scaled(25), request=request(url), handmade=handmade(url, reconnect=True),
                           ours=statement(CALL, server='far', reconnect=True))
    show_times('libcurl request, connection open: one round trip', found['request'], 'ms')
    show_times('session and handmade', found['handmade'], 'ms')
    show_ratio('round trips', found['handmade'], found['request'])
    show_times('session and omni_refresh()', found['ours'], 'ms')
    show_ratio('round trips', found['ours'], found['request'], aim='1.15')


def row_and_request(clients, db='postgres'):
    return on_commit(f'BEGIN; {LOAD} {ASK} COMMIT;', clients, db)


def commit():
    """a transaction that loads a row and asks"""
    for clients, count in (1, 5000), (8, 20000):
        bare = on_commit(f'BEGIN; {LOAD} {insert_like(ASK)} COMMIT;', clients)
        with pinned(clients == 1):
            found = interleave(scaled(count), bare=bare, ours=row_and_request(clients))
        show_times(f'{number_of(clients)}: row and bare row', found['bare'])
        show_times(f'{number_of(clients)}: row and request', found['ours'])
        show_ratio('of the rate of row and bare row', found['bare'], found['ours'], aim='0.9')


def trigger():
    """a statement with a trigger for each row"""
    with pinned():
        found = interleave(scaled(100000), **{
            table: one_statement(f'INSERT INTO {table} SELECT generate_series(1, {{count}});')
            for table in ('notifying', 'asking')})
    show_times(f'{scaled(100000):,} rows, each with pg_notify()', found['notifying'])
    show_times(f'{scaled(100000):,} rows, each with omni_refresh_on_commit()', found['asking'])
    show_ratio('times pg_notify()', found['asking'], found['notifying'], aim='4')


def answer():
    """a queued job by itself"""
    with pinned():
        found = interleave(scaled(10), ours=answer_of_job())
    show_times('request to answer', found['ours'], 'ms')


def drain_queue():
    """a queue that was held"""
    for name, count, aim in ('different', 20000, '4,000'), ('equal', 100000, ''):
        found = interleave(scaled(count), drain=drain(name == 'different'))['drain']
        show(f'{scaled(count):,} {name} jobs, a second', [1e6 / one.time for one in found], aim,
             found)


def wal():
    """equal requests, each in a transaction of its own, with their merging"""
    with pinned():
        found = interleave(scaled(20000), ours=one_statement('CALL queue({count}, false);'))['ours']
    show('WAL of a request, bytes', [sample.wal for sample in found], '1,000', found)


def memory():
    """private memory (RssAnon) of a new worker"""
    def size(name, aim=''):
        of_worker = Path(f'/proc/{worker()}/status').read_text()
        kilobytes = int(re.search(r'^RssAnon:\s*(\d+) kB', of_worker, re.M)[1])
        show(f'after {name}, MB', [kilobytes / 1024], aim)

    def begin():
        finish()
        sql(f'SELECT pg_terminate_backend({worker()}, 10000)')
        pgbench(CALL, 1)

    begin()
    size('1 call')
    done = 1
    for total in scaled(1000), scaled(10000), scaled(100000):
        pgbench(CALL, total - done, 8)
        done = total
        size(f'{total:,} calls', '6')
    begin()
    for count in scaled(20000), scaled(100000):
        release(hold_and_queue(count, False))
        size(f'{count:,} merges', '6')
    shared = sql("SELECT sum(allocated_size) / 1024 FROM pg_shmem_allocations"
                 " WHERE name LIKE 'omni_refresh%'")
    if shared:
        show('shared memory of the cluster, kB', [float(shared)], '25')


def watch():
    """DDL beside watches, and what they take to look"""
    sql('CREATE DATABASE watched')
    prepare('watched')
    for number in range(20):
        sql(f"SELECT omni_refresh_watch(md5('{number}')::uuid, delay => '1 h')", db='watched')
    until_done('watched')

    def compare(name, text):
        with pinned():
            found = interleave(scaled(2000), none=statement(text),
                               watched=statement(text, db='watched'))
        show_times(f'{name}: without a watch', found['none'])
        show_times(f'{name}: with 20', found['watched'])
        show_ratio('times without', found['watched'], found['none'], aim='1.05')

    compare('a temporary table', 'BEGIN; CREATE TEMP TABLE t (a int) ON COMMIT DROP; COMMIT;')
    compare('a table made and dropped', 'BEGIN; CREATE TABLE t (a int); DROP TABLE t; COMMIT;')

    sql('SELECT omni_refresh_unwatch(model_id) FROM omni_refresh_watch', db='watched')
    columns = ', '.join(f'column_{n} {("int", "text", "numeric(10,2)", "timestamptz")[n % 4]}'
                        for n in range(20))
    for schema in range(10):
        sql(f'CREATE SCHEMA s{schema}', f"""DO $$ BEGIN FOR i IN 1 .. {scaled(500)} LOOP
            EXECUTE format('CREATE TABLE s{schema}.t%s ({columns})', i); END LOOP; END $$""", db='watched')
    sql('VACUUM ANALYZE', f"SELECT omni_refresh_watch('{MODEL}', delay => '1 s')", db='watched')
    until_done('watched')

    def look(count):
        def load():
            for _ in range(count):
                before = sql('SELECT max(id) FROM omni_refresh_job', db='watched')
                sql('CREATE TABLE IF NOT EXISTS public.n (); ALTER TABLE public.n'
                    f' ADD c{time.monotonic_ns()} int', db='watched')
                while sql(f"SELECT EXISTS (SELECT FROM omni_refresh_job WHERE id > {before}"
                          " AND finished_at IS NOT NULL)", db='watched') != 't':
                    time.sleep(0.05)
            return 0
        return measure(count, load, 'watched')

    found = interleave(5, look=look)['look']
    show(f'a look at {10 * scaled(500):,} tables, ms of worker CPU',
         [sum(sample.worker) / 1000 for sample in found], '150')

    # The worker does nothing else meanwhile but what it did before
    def idle(count):
        return measure(count, lambda: time.sleep(count) or 0, 'watched')

    none = interleave(20, idle=idle)['idle']
    sql(f"SELECT omni_refresh_watch('{MODEL}', cache_policy => 'daily', quiet => '1 s')", db='watched')
    until_done('watched')
    found = interleave(20, idle=idle)['idle']
    show(f'a look at data of {10 * scaled(500):,} tables, ms of worker CPU',
         [(sum(sample.worker) - sum(before.worker)) / 1000 for sample, before in zip(found, none)], '20')


def make_hour(db='postgres'):
    """Makes the requests of an hour, and the statistics that autovacuum would make."""
    pgbench(CALL, HOUR, 8, db)
    sql('VACUUM ANALYZE', db=db)


def status():
    """the view for monitoring, after as many requests as an hour allows"""
    sql('TRUNCATE omni_refresh_job, omni_refresh_event')
    make_hour()
    with pinned():
        found = interleave(scaled(100), view=statement(VIEW))
    show_times('omni_refresh_status', found['view'])


def history():
    """the same with many finished jobs"""
    if not bench.finished:
        sys.exit('The scenario "history" needs FINISHED.')
    databases = ('postgres', 'history')
    sql('CREATE DATABASE history')
    prepare('history')
    sql('TRUNCATE omni_refresh_job, omni_refresh_event')
    sql(insert_like(CALL, 'history', 'omni_refresh_job', 'at', f"""FROM (
            SELECT now() - interval ''1 hour'' - n * interval ''29 days'' / {bench.finished} AS at
            FROM generate_series({bench.finished}, 1, -1) AS n) AS finished"""), db='history')
    for db in databases:
        make_hour(db)

    def compare(name, count, subject, to_one=True):
        with pinned(to_one):
            found = interleave(scaled(count), **{db: subject(db) for db in databases})
        show_times(f'{name}: without', found['postgres'])
        show_times(f'{name}: with {bench.finished:,}', found['history'])
        show_ratio('times without', found['history'], found['postgres'], aim='1.1')

    compare('omni_refresh_status', 100, lambda db: statement(VIEW, db=db))
    compare('call, https, 1 client', 4000, lambda db: statement(CALL, db=db))
    for clients, count in (1, 5000), (8, 20000):
        compare(f'row and request, {number_of(clients)}', count,
                lambda db: row_and_request(clients, db), clients == 1)
    compare('request to answer', 10, answer_of_job)
    compare(f'drain, each of {scaled(20000):,}', 20000, lambda db: drain(True, db), False)


SCENARIOS = {'call': call, 'follow': follow, 'connect': connect, 'commit': commit,
             'trigger': trigger, 'answer': answer, 'drain': drain_queue, 'wal': wal,
             'memory': memory, 'status': status, 'watch': watch, 'history': history}


# Start

def listens(port):
    with socket.socket() as sock:
        return sock.connect_ex(('127.0.0.1', port)) == 0


def start_omni():
    """Starts nginx, which answers as Omni does, and the relay that puts it at a distance."""
    directory = bench.root / 'nginx'
    directory.mkdir()
    bench.ca = directory / 'cert.pem'
    run('openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1',
        '-nodes', '-days', 30, '-subj', '/CN=Omni', '-addext', 'subjectAltName=IP:127.0.0.1',
        '-keyout', directory / 'key.pem', '-out', bench.ca)
    with socket.create_server(('127.0.0.1', 0)) as one, \
            socket.create_server(('127.0.0.1', 0)) as two:
        http, https = one.getsockname()[1], two.getsockname()[1]
    text = (HERE / 'nginx.conf').read_text()
    text = text.replace('PLAIN_PORT', str(http)).replace('TLS_PORT', str(https))
    (directory / 'nginx.conf').write_text(text)
    program = shutil.which('nginx', path=f'{os.environ["PATH"]}:/usr/local/sbin:/usr/sbin')
    nginx = start(program, '-p', directory, '-c', directory / 'nginx.conf',
                  '-e', directory / 'error.log')
    while not (listens(http) and listens(https)):
        if nginx.poll() is not None:
            sys.exit((directory / 'error.log').read_text())
        time.sleep(0.01)
    relay = start(sys.executable, HERE / 'relay.py', https, ROUND_TRIP)
    far = int(relay.stdout.readline())
    bench.urls = {'http': f'http://127.0.0.1:{http}', 'https': f'https://127.0.0.1:{https}',
                  'far': f'https://127.0.0.1:{far}'}


def prepare(db):
    """Makes a database ready, with a worker and open connections."""
    variables = {**bench.urls, 'ca': bench.ca, 'key_file': bench.root / 'key'}
    run('psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-d', db, '-f', HERE / 'setup.sql',
        *(f'--set={name}={value}' for name, value in variables.items()))
    for server in bench.urls:
        pgbench(CALL, 10, db=db, server=server)


def main():
    os.environ.update(PGHOST=str(bench.root / 'tmp'), PGDATABASE='postgres')
    (bench.root / 'key').write_text(KEY)
    bench.postmaster = int((bench.root / 'data/postmaster.pid').read_text().split()[0])
    start_omni()
    prepare('postgres')

    print(f'PostgreSQL {sql("SHOW server_version")}, {run("curl-config", "--version").strip()}, '
          f'Linux {platform.release()}, {len(CPUS)} CPUs (load {os.getloadavg()[0]:.1f}), '
          f'{bench.rounds} rounds, scale {bench.scale:g}\n')
    show_head()
    for name in bench.scenarios or [*SCENARIOS][:None if bench.finished else -1]:
        bench.scenario = name
        show_row(f'**{name}**: {SCENARIOS[name].__doc__}', *[''] * 6)
        SCENARIOS[name]()
        error = sql("SELECT error FROM omni_refresh_job"
                    " WHERE status IN ('failed', 'canceled', 'unknown') LIMIT 1")
        if error:
            sys.exit(f'The figures are of requests that failed: {error}')


def scenario(name):
    if name not in SCENARIOS:
        raise argparse.ArgumentTypeError(f'no scenario "{name}"; there are {", ".join(SCENARIOS)}')
    return name


parser = argparse.ArgumentParser()
parser.add_argument('--rounds', type=int)
parser.add_argument('--scale', type=float)
parser.add_argument('--finished', type=int)
parser.add_argument('root', type=Path)
parser.add_argument('scenarios', nargs='*', type=scenario)
parser.parse_args(namespace=bench)
try:
    main()
except KeyboardInterrupt:
    sys.exit(128 + signal.SIGINT)
