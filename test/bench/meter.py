"""How the benchmark measures: runs SQL and pgbench, pins processes, reads CPU time and WAL, and
prints the table. Times are in microseconds.
"""
import contextlib
import math
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

TICKS = os.sysconf('SC_CLK_TCK')
CPUS = os.sched_getaffinity(0)
LIMIT = 1800                            # s, for one program

# What the command line and the start set: rounds, scale, finished and scenarios; root, the
# directory of the run; postmaster, its pid; helpers, the pids of nginx and the relay; urls and ca,
# of nginx; and scenario, the name of the one that runs.
bench = SimpleNamespace(helpers=[])


class Sample(NamedTuple):
    """What one request took and cost: the total, divided by the number of requests."""
    time: float
    backend: tuple = None               # CPU of the sessions: in user mode, in the kernel
    worker: tuple = None                # CPU of the worker, likewise
    wal: float = None                   # bytes


# Processes

def run(*command, **environment):
    """Runs a program and returns what it prints."""
    done = subprocess.run([str(word) for word in command], env={**os.environ, **environment},
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, timeout=LIMIT, check=False)
    if done.returncode != 0:
        sys.exit(f'{" ".join(done.args)}: {done.stderr}')
    return done.stdout


def start(*command):
    """Starts a program that serves until the script "run" ends it; Ctrl-C does not."""
    process = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, text=True, start_new_session=True)
    bench.helpers.append(process.pid)
    return process


def stat(pid):
    """Returns the fields of /proc/PID/stat behind the program's name, which may have blanks."""
    return Path(f'/proc/{pid}/stat').read_text().rpartition(') ')[2].split()


def children(parent):
    """Returns the command lines of the processes that a process has started, by their pids."""
    found = {}
    for entry in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            if stat(entry.name)[1] == str(parent):
                found[int(entry.name)] = (entry / 'cmdline').read_text()
    return found


def cpu(pid, of_children=False):
    """Returns the CPU time of a process, or of its children that have ended."""
    first = 13 if of_children else 11
    return [int(ticks) / TICKS * 1e6 for ticks in stat(pid)[first:first + 2]]


def cpu_of_sessions():
    """Returns the CPU time of all sessions so far. Waits until they have ended and none is a zombie."""
    while not all(command and '[local]' not in command
                  for command in children(bench.postmaster).values()):
        time.sleep(0.01)
    return cpu(bench.postmaster, of_children=True)


def pin(cpus):
    """Lets server, worker, endpoint and what is started from now on use these CPUs only."""
    for pid in (os.getpid(), bench.postmaster, *children(bench.postmaster), *bench.helpers):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(pid, cpus)


@contextlib.contextmanager
def pinned(to_one=True):
    """Pins all processes to one CPU, if so asked. Otherwise the time of a single session depends
    most on which processes the scheduler happens to put together.
    """
    if to_one:
        pin({max(CPUS)})
    try:
        yield
    finally:
        pin(CPUS)


# SQL

def sql(*statements, db='postgres'):
    options = [option for statement in statements for option in ('-c', statement)]
    return run('psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-d', db, *options,
               PGOPTIONS='-c omni_refresh.server=https').strip()


def settings(**values):
    """Changes settings of omni_refresh in the configuration file."""
    sql("LOAD 'omni_refresh'", *(f"ALTER SYSTEM SET omni_refresh.{name} = '{value}'"
                                 for name, value in values.items()), 'SELECT pg_reload_conf()')


def worker(db='postgres'):
    """Returns the pid of a database's worker."""
    return int(sql("SELECT pid FROM pg_stat_activity"
                   f" WHERE backend_type = 'omni_refresh worker' AND datname = '{db}'"))


def pgbench(statements, count, clients=1, db='postgres', server='https', reconnect=False):
    """Has clients run statements so many times in all. Returns the elapsed time by that number."""
    script = bench.root / 'tmp/script.sql'
    script.write_text(statements)
    output = run('pgbench', '-n', '-f', script, '-c', clients, '-j', min(clients, len(CPUS)),
                 '-t', max(count // clients, 1), *(['-C'] if reconnect else []), db,
                 PGOPTIONS=f'-c omni_refresh.server={server}')
    return 1e6 / float(re.search(r'^tps = ([0-9.]+)', output, re.M)[1])


# Measuring

def scaled(count):
    return max(int(count * bench.scale), 1)


def measure(count, load, db='postgres', finish=lambda: None):
    """Measures a load of so many requests. The worker's CPU time and the WAL include "finish"."""
    def position():
        return float(sql("SELECT pg_current_wal_insert_lsn() - '0/0'", db=db))

    def each(now, before):
        return tuple((one - other) / count for one, other in zip(now, before))

    pid = worker(db)
    before = position(), cpu_of_sessions(), cpu(pid)
    took = load()
    sessions = cpu_of_sessions()
    finish()
    return Sample(took, each(sessions, before[1]), each(cpu(pid), before[2]),
                  (position() - before[0]) / count)


def interleave(count, **subjects):
    """Measures each subject once a round, after a short round to warm up. Returns their samples."""
    samples = {name: [] for name in subjects}
    for number in range(bench.rounds + 1):
        for name, subject in subjects.items():
            if sys.stderr.isatty():
                print(f'\r\033[K{bench.scenario}: round {number} of {bench.rounds}, {name}', end='',
                      file=sys.stderr, flush=True)
            sample = subject(count if number > 0 else max(count // 20, 1))
            if number > 0:
                samples[name].append(sample)
    return samples


# The table

def figure(number):
    """Returns a number with three digits or more, or 0."""
    if number == 0:
        return '0'
    digits = 2 - math.floor(math.log10(max(abs(number), 1)))
    return f'{number:,.{max(digits, 0)}f}'


def show_row(*cells):
    if sys.stderr.isatty():
        print('\r\033[K', end='', file=sys.stderr, flush=True)
    print('| {:<58} | {:>7} | {:>16} | {:>13} | {:>13} | {:>7} | {:>5} |'.format(*cells),
          flush=True)


def show_head():
    show_row('', 'median', 'least to most', 'backend CPU', 'worker CPU', 'WAL', 'aim')
    print('| :-- | --: | --: | --: | --: | --: | --: |')


def show(name, values, aim='', samples=()):
    """Prints median and range of the values, one a round, and the medians of the samples' costs."""
    def median(numbers):
        return figure(statistics.median(numbers))

    def pair(field):
        pairs = [getattr(sample, field) for sample in samples if getattr(sample, field)]
        return ' + '.join(median(numbers) for numbers in zip(*pairs))

    spread = f'{figure(min(values))} to {figure(max(values))}' if len(values) > 1 else ''
    wal = [sample.wal for sample in samples if sample.wal is not None]
    show_row(name, median(values), spread, pair('backend'), pair('worker'),
             median(wal) if wal else '', aim)


def show_times(name, samples, unit='µs', aim=''):
    divisor = {'µs': 1, 'ms': 1e3}[unit]
    show(f'{name}, {unit}', [sample.time / divisor for sample in samples], aim, samples)


def show_ratio(name, samples, *yardsticks, aim=''):
    """Prints the ratio of the times of each round, to those of the yardsticks together."""
    show(f'... {name}', [sample.time / sum(one.time for one in others)
                         for sample, *others in zip(samples, *yardsticks)], aim)
