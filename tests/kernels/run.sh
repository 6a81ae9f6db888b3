#!/bin/sh
# Shows the eBPF backend on other kernels: in a guest of each the demonstration, with no tool in reach
# of the plugin, the whole traffic matrix, and what not every machine's kernel can do (SCTP, VLAN,
# ipvlan, netkit), and what they say of sockets.
#
# usage: run.sh PORTMAP MATRIX KERNELS NETLINK [KERNEL...]
#
#   PORTMAP  the plugin, a static binary
#   MATRIX   the test program of tests/matrix
#   KERNELS  the test program of tests/kernels
#   NETLINK  the test program of tests/netlink
#   KERNEL   as boot.sh takes it; by default Debian's from the oldest to the newest. One with options
#            gets the demonstration alone.
#
# The guests run under software emulation and need neither root nor KVM. Kernels are downloaded once,
# to target/kernels.
set -eu

cd -- "$(dirname -- "$0")/../.."

portmap=$1
matrix=$2
kernels=$3
netlink=$4
shift 4
# By default also: cgroup v2 mounted nowhere, and a kernel without netfilter.
[ $# -gt 0 ] || set -- 5.10 6.1 6.12 newest \
    '5.10,cgroup=v1,name=5.10-cgroup-v1' \
    '6.12,no=nf_.*|nft_.*|nfnetlink.*|ip_tables|ip6_tables|ip6?table_.*|x_tables|xt_.*,name=6.12-without-netfilter'

payload=$(mktemp -d)
trap 'rm -rf -- "$payload"' EXIT
# Symbols and debugging information would be carried into the guests' memory.
strip -o "$payload/portmap" "$portmap"
strip -o "$payload/matrix" "$matrix"
strip -o "$payload/kernels" "$kernels"
strip -o "$payload/netlink" "$netlink"
cp -R -- testdata/samples "$payload/samples"
# Where the test programs look for the plugin (beside the directory that cargo put them into) and for
# recordings. Not shipped to these paths: the guest may mount something over them.
plugin=$(dirname "$(dirname "$(realpath "$matrix")")")/portmap
cat >"$payload/test.sh" <<END
#!/bin/sh
set -eu
mkdir -p '$(dirname "$plugin")' '$PWD/testdata'
cp portmap '$plugin'
cp -R samples '$PWD/testdata/'
# Nothing but the kernel forwards.
env -i '$plugin' demo --backend ebpf
case \$KM_LABEL in *[!0-9.newst]*) exit 0 ;; esac
case \$(uname -r) in
    5.* | 6.[0-7].*) netkit='--skip netkit' ;;
    *) netkit= ;;
esac
./netlink --ignored --test-threads 1 socket_diag
./kernels --ignored --test-threads 1 \$netkit
./matrix --ignored --test-threads 1 ebpf
END
chmod 755 "$payload/test.sh"

# The maps are sized for a node, and every test makes its own.
logs=target/kernels/logs
mkdir -p "$logs"
tests/kernels/boot.sh -m 1536 -T 1500 -j "$(nproc)" -l "$logs" -p "$payload" \
    -t bash -t ip -t iptables -t ip6tables -t nft -t tc -f /usr/lib/*-linux-gnu/xtables "$@" >"$payload/summary" || {
    status=$?
    cat "$payload/summary"
    # Label, release, verdict, seconds and log of each.
    sed -n 's/.* FAIL .* //p' "$payload/summary" | while read -r log; do
        printf '\n--- %s\n' "$log"
        tail -n 60 "$log"
    done >&2
    exit "$status"
}
cat "$payload/summary"
