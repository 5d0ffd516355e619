# omni_refresh is built, installed and tested like any extension:
#
#	make && make install	for the pg_config in PATH, or for PG_CONFIG=/path/to/pg_config
#	make installcheck		all tests, by an unprivileged user; they start servers of their own
#
# On Debian and Ubuntu more targets need nothing but git and make (see test/tools/private.sh):
#
#	make demo				shows a refresh; with OMNI_URL=... OMNI_KEY_FILE=... OMNI_MODEL=...
#							(and OMNI_BRANCH=...) of a real instance
#	make test				builds and tests a copy, and leaves this directory as it is
#	make check-asan			the same with AddressSanitizer and UndefinedBehaviorSanitizer
#	make check-valgrind		every fault of the stand-in for Omni, with a server run by valgrind
#	make fuzz				made-up answers of Omni's for a minute, or SECONDS=600
#	make soak				random kills and faults, of calls and then of what is queued, for ten
#							minutes each, or MINUTES=30; SEED= of a run that failed repeats its
#							schedule
#	make bench				measures what the README promises of speed and size; SCENARIOS="call trigger"
#							chooses, ROUNDS=3 and SCALE=0.1 are for less, FINISHED=10000000 for more; see
#							test/bench/README.md
#
# One test of each kind alone, also with installcheck; an empty list skips a kind:
#
#	make test REGRESS=option ISOLATION= TAP_TESTS=
#	make test REGRESS= ISOLATION= PROVE_TESTS=test/t/001_call.pl PROVE_FLAGS=-v
#
# PG_MAJOR=17 chooses another PostgreSQL, KEEP=1 keeps the temporary directory, and CC= and COPT=
# choose the compiler and add flags for it, as in CC=clang COPT=-DUSE_ASSERT_CHECKING.

EXTENSION = omni_refresh
EXTVERSION := $(shell sed -n "s/^default_version *= *'\(.*\)'.*/\1/p" $(EXTENSION).control)
MODULE_big = $(EXTENSION)
SOURCES := $(wildcard src/*.c src/*/*.c)
OBJS = $(SOURCES:.c=.o)
DATA = $(wildcard sql/*.sql)

# Lists that are empty, or set to be, switch a kind of test off.
REGRESS := $(patsubst test/sql/%.sql,%,$(wildcard test/sql/*.sql))
REGRESS_OPTS = --inputdir=test --temp-instance=tmp_check_regress --temp-config=test/tools/omni_refresh.conf
ISOLATION := $(patsubst test/specs/%.spec,%,$(wildcard test/specs/*.spec))
ISOLATION_OPTS = --inputdir=test --outputdir=. --temp-instance=tmp_check_iso --temp-config=test/tools/omni_refresh.conf \
	--temp-config=test/specs/held.conf
TAP_TESTS := $(wildcard test/t/*.pl)
# The slowest first, or the last of those that run side by side would run alone
slow := 027_fault_point 009_wire 086_successor 029_many_databases 106_watch_data 028_stopped_worker 039_order 100_watch 105_watch_random 101_watch_tools 068_locked_jobs 033_queue 022_crash 021_ddl \
	041_delivery 063_neighbours 061_altered_table 081_await 023_library 064_clock 054_models 024_obstacle 102_watch_neighbours \
	060_locked_calls 104_watch_requests 080_share 026_stop 107_watch_slices 050_follow 090_monitoring 017_hostile 040_soak
scripts := $(slow:%=test/t/%.pl)
scripts += $(filter-out $(scripts),$(sort $(wildcard test/t/*.pl)))
PROVE_TESTS ?= $(scripts)
EXTRA_CLEAN = tmp_check_regress

# The databases' encoding and locale, whatever those of the environment are
ENCODING = UTF8
NO_LOCALE = 1

goals := $(or $(MAKECMDGOALS),all)
private := test fuzz soak bench demo check-asan check-valgrind

# libcurl. The floor is RHEL 9's; src/base/compat.h repeats it.
ifneq ($(filter-out $(private) clean distclean maintainer-clean uninstall %installcheck,$(goals)),)
CURL_FLOOR = 7.76.1
CURL_VERSION := $(shell pkg-config --modversion libcurl 2>/dev/null || curl-config --version 2>/dev/null | sed 's/^libcurl *//')
ifeq ($(CURL_VERSION),)
$(error libcurl's headers are missing: install libcurl4-openssl-dev (Debian, Ubuntu) or libcurl-devel (Red Hat, SUSE), or let pkg-config or curl-config find them)
endif
ifneq ($(shell printf '%s\n' $(CURL_FLOOR) $(CURL_VERSION) | sort -V | head -n 1),$(CURL_FLOOR))
$(error libcurl $(CURL_VERSION) is too old: omni_refresh needs $(CURL_FLOOR) or newer)
endif
PG_CPPFLAGS := $(shell pkg-config --cflags libcurl 2>/dev/null || curl-config --cflags)
SHLIB_LINK := $(shell pkg-config --libs libcurl 2>/dev/null || curl-config --libs)
endif
PG_CPPFLAGS += -I$(dir $(firstword $(MAKEFILE_LIST)))src -DOMNI_REFRESH_VERSION='"$(EXTVERSION)"'

# A server built by gcc brings flags and an attribute that CC=clang has never heard of.
ifneq ($(findstring clang,$(CC)),)
PG_CFLAGS = -Wno-unknown-warning-option -Wno-ignored-optimization-argument -Wno-ignored-attributes
endif

# PostgreSQL. The targets that install it themselves must do without.
ifneq ($(filter-out $(private),$(goals)),)
PG_CONFIG = pg_config
PGXS := $(shell $(PG_CONFIG) --pgxs 2>/dev/null)
ifeq ($(wildcard $(PGXS)),)
$(error PostgreSQL's files for building extensions are missing: install postgresql-server-dev-NN (Debian, Ubuntu) or postgresqlNN-devel (Red Hat, SUSE), or name its pg_config by PG_CONFIG=)
endif
include $(PGXS)

$(OBJS) $(OBJS:.o=.bc): $(wildcard src/*.h src/*/*.h) $(EXTENSION).control

# Not PROVE_FLAGS, which is the user's
PG_PROVE_FLAGS += -I test/perl
installcheck prove_installcheck: export TEMP_CONFIG = $(CURDIR)/test/tools/omni_refresh.conf

.PHONY: prove_installcheck
prove_installcheck:
	$(prove_installcheck)
endif

.PHONY: $(private)
test:
	@test/tools/run
fuzz:
	@test/fuzz/run -max_total_time='$(or $(SECONDS),60)'
soak:
	@REGRESS= ISOLATION= PROVE_TESTS='test/t/04?_*.pl' PROVE_FLAGS=-v \
		OMNI_SOAK_MINUTES='$(or $(MINUTES),10)' OMNI_SOAK_SEED='$(SEED)' test/tools/run
bench:
	@ROUNDS='$(ROUNDS)' SCALE='$(SCALE)' FINISHED='$(FINISHED)' test/bench/run $(SCENARIOS)
demo:
	@test/tools/demo
check-asan:
	@test/tools/asan
check-valgrind:
	@test/tools/valgrind
