# A private PostgreSQL for test/tools/run, test/tools/demo and .ci/run, which source this file.
#
# All happens below one temporary directory, $root, which is gone in the end, whatever the end:
#
#	$root/usr		copies of the server's folders, for the extension to be installed into:
#					PostgreSQL finds its files by way of its programs' own place
#	$root/source	a copy of the checkout, to be built and tested in
#	$root/tmp		sockets and the like
#
# PostgreSQL refuses to run as root, and root's checkout may be hidden from others. So what root
# starts is run, and $root is owned, by "nobody".
# shellcheck shell=bash

set -euo pipefail
export LC_ALL=C.UTF-8
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd /							# "nobody" may have no right to be where root is
exec </dev/null

if [ "$(id -u)" = 0 ]; then
	as_root=()
	as_user=(setpriv --reuid=nobody --regid=nogroup --clear-groups)
else
	as_root=(sudo)
	as_user=()
fi

die()
{
	printf '%s: %s\n' "${0##*/}" "$*" >&2
	exit 1
}

# Prints the major version to use: PG_MAJOR, or the newest that can build extensions here, if any.
pg_major()
{
	local pgxs=(/usr/lib/postgresql/*/lib/pgxs)

	[ -d "${pgxs[0]}" ] || pgxs=()
	echo "${PG_MAJOR:-$(printf '%s\n' "${pgxs[@]}" | cut -d / -f 5 | sort -n | tail -n 1)}"
}

# Installs what is missing to build and run the extension, and the packages given, in whose names
# NN stands for the major version. $major is known from here on.
need()
{
	local package name
	local missing=()

	command -v dpkg-query >/dev/null ||
		die 'this needs Debian or Ubuntu; elsewhere: make && make install && make installcheck'
	major=$(pg_major)
	command -v curl-config >/dev/null || set -- libcurl4-openssl-dev "$@"
	set -- gcc libc6-dev make perl python3 openssl postgresql-NN postgresql-server-dev-NN "$@"
	for package; do
		name=${package/NN/$major}
		dpkg-query -W -f '${db:Status-Status}\n' "${name%\?}" 2>/dev/null |
			grep -qx installed || missing+=("$package")
	done
	[ ${#missing[@]} -gt 0 ] || return 0

	[ ${#as_root[@]} = 0 ] || command -v sudo >/dev/null ||
		die "root or sudo is needed to install ${missing[*]}"
	"${as_root[@]}" "$checkout/test/tools/packages" "$major" "${missing[@]}"
	major=$(pg_major)
}

# Makes $root with its copies.
private_root()
{
	root=$("${as_user[@]}" mktemp -d "${TMPDIR:-/tmp}/omni_refresh.XXXXXX" 2>/dev/null ||
		"${as_user[@]}" mktemp -d /tmp/omni_refresh.XXXXXX)
	trap cleanup EXIT
	trap 'exit 129' HUP
	trap 'exit 130' INT
	trap 'exit 143' TERM

	local usr=$root/usr
	"${as_user[@]}" mkdir -p "$root"/{source,tmp} "$usr"/{lib,share}/postgresql
	"${as_user[@]}" cp -R "/usr/lib/postgresql/$major" "$usr/lib/postgresql/"
	"${as_user[@]}" cp -R "/usr/share/postgresql/$major" "$usr/share/postgresql/"
	"${as_user[@]}" ln -s /usr/include "$usr/include"
	tar -C "$checkout" --exclude-vcs --exclude='./tmp_check*' -c . | "${as_user[@]}" tar -C "$root/source" -x
	private make clean
}

# Runs a command in $root/source, as the unprivileged user and with nothing of the caller's
# environment (locale, proxies, PG..., the flags of the outer make). It is run in the background
# because Bash heeds no signal while it waits for a foreground command.
private()
{
	(
		cd "$root/source"
		exec "${as_user[@]}" env -i --default-signal=INT,QUIT HOME="$root/tmp" TMPDIR="$root/tmp" \
			PATH="$root/usr/lib/postgresql/$major/bin:/usr/local/bin:/usr/bin:/bin" \
			LANG=C.UTF-8 MAKEFLAGS='s --no-print-directory with_llvm=no' \
			PG_TEST_TIMEOUT_DEFAULT="${PG_TEST_TIMEOUT_DEFAULT:-180}" "$@"
	) <&0 &
	wait $!
}

private_install()
{
	echo "Building for PostgreSQL $major"
	private make -j "$(nproc)" ${CC:+CC="$CC"} COPT="${COPT:-}"
	private make install
}

# Prints the processes of this run: those whose program or directory is below $root. The user who
# runs them is asked, since in a container not even root may look at what others run.
processes()
{
	"${as_user[@]}" find /proc -mindepth 2 -maxdepth 2 \( -name exe -o -name cwd \) \
		-lname "$root*" -printf '%h\n' 2>/dev/null | sed 's|/proc/||' | sort -u
}

end_processes()
{
	local pids signal

	for signal in TERM QUIT KILL; do
		mapfile -t pids < <(processes)
		[ ${#pids[@]} -gt 0 ] || return 0
		kill -s "$signal" "${pids[@]}" 2>/dev/null || true
		for _ in {1..30}; do
			[ -n "$(processes)" ] || return 0
			sleep 0.1
		done
	done
}

cleanup()
{
	trap '' HUP INT TERM
	end_processes
	# A server that was killed leaves a System V segment, which its postmaster.pid names.
	"${as_user[@]}" find "$root" -name postmaster.pid -exec sed -n '7s/.* /-m/p' {} \; |
		"${as_user[@]}" xargs -r ipcrm 2>/dev/null || true
	if [ -n "${KEEP:-}" ]; then
		echo "Kept: $root"
	else
		rm -rf "$root"
	fi
}
