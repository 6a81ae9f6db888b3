#!/bin/sh
# Shows the eBPF backend on other kernels: the demonstration and the whole traffic matrix in a guest
# of each, with no tool in reach of the plugin.
#
# usage: run.sh PORTMAP MATRIX [KERNEL...]
#
#   PORTMAP  the plugin, a static binary
#   MATRIX   the test program of tests/matrix, which finds the plugin by the path it was built with
#   KERNEL   as boot.sh takes it; by default Debian's from the oldest to the newest
#
# The guests run under software emulation and need neither root nor KVM. Kernels are downloaded once.
set -eu

here=$(cd -- "$(dirname -- "$0")" && pwd)
portmap=$(realpath "$1")
matrix=$(realpath "$2")
shift 2
[ $# -gt 0 ] || set -- 5.10 6.1 6.12 7.2

payload=$(mktemp -d)
trap 'rm -rf -- "$payload"' EXIT
cp -- "$matrix" "$payload/matrix"
cat >"$payload/test.sh" <<END
#!/bin/sh
set -eu
uname -r
# An empty PATH: nothing but the kernel forwards.
env -i $portmap demo --backend ebpf
./matrix --ignored --test-threads 1 ebpf
END
chmod 755 "$payload/test.sh"

# The traffic matrix needs more memory than boot.sh gives by default: its maps are sized for a node.
"$here/boot.sh" -m 1536 -T 900 -j "$(nproc)" -l "$payload/logs" -p "$payload" -f "$portmap" "$@" || {
    status=$?
    tail -n 60 "$payload"/logs/*.log >&2
    exit "$status"
}
