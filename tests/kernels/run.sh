#!/bin/sh
# Shows the eBPF backend on other kernels: in a guest of each the demonstration, with no tool in reach
# of the plugin, what of the traffic matrix kernels can differ in, and what not every machine's kernel
# can do (SCTP, VLAN, ipvlan, netkit), and what they say of sockets and of the bpffs.
#
# usage: run.sh PORTMAP MATRIX KERNELS NETLINK BPF [KERNEL...]
#
#   PORTMAP  the plugin, a static binary
#   MATRIX   the test program of tests/matrix
#   KERNELS  the test program of tests/kernels
#   NETLINK  the test program of tests/netlink
#   BPF      the test program of tests/bpf
#   KERNEL   as boot.sh takes it; by default Debian's from the oldest to the newest. One with options
#            gets the demonstration alone; one whose name ends in -without-ipv6 or -without-netfilter what
#            is to be tried there, too.
#
# The guests run under software emulation and need neither root nor KVM. Kernels are downloaded once,
# to target/kernels.
set -eu

cd -- "$(dirname -- "$0")/../.."

portmap=$1
matrix=$2
kernels=$3
netlink=$4
bpf=$5
shift 5
# By default also: cgroup v2 mounted nowhere, a kernel without netfilter, and one without IPv6. What takes longest goes first.
[ $# -gt 0 ] || set -- newest 5.10 6.12 6.1 \
    '5.10,cgroup=v1,name=5.10-cgroup-v1' \
    '6.12,append=ipv6.disable=1,name=6.12-without-ipv6' \
    '6.12,no=nf_.*|nft_.*|nfnetlink.*|ip_tables|ip6_tables|ip6?table_.*|x_tables|xt_.*,name=6.12-without-netfilter'

payload=$(mktemp -d)
trap 'rm -rf -- "$payload"' EXIT
# Symbols and debugging information would be carried into the guests' memory.
strip -o "$payload/portmap" "$portmap"
strip -o "$payload/matrix" "$matrix"
strip -o "$payload/kernels" "$kernels"
strip -o "$payload/netlink" "$netlink"
strip -o "$payload/bpf" "$bpf"
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
# Usage: tests LEAST PROGRAM [FILTER]... Of a filter that fits no name any more the program would say that
# all is well.
tests() {
    least=\$1
    shift
    found=\$("\$@" --ignored --list | grep -c ': test\$') || true
    if [ "\$found" -lt "\$least" ]; then
        printf '%s: %s tests, at least %s expected\n' "\$*" "\$found" "\$least" >&2
        exit 1
    fi
    "\$@" --ignored --test-threads 1
}
# The tools are there and the kernel's part is not: \`auto\` passes them over, and who asks for one is told.
without_netfilter() {
    cat >list <<'LIST'
{"cniVersion": "1.1.0", "name": "n", "plugins": [
    {"type": "ptp"}, {"type": "portmap", "capabilities": {"portMappings": true}}]}
LIST
    '$plugin' check-config list | tee said
    grep -q 'auto, on this node ebpf' said
    for backend in iptables nftables; do
        printf '{"cniVersion": "1.1.0", "name": "n", "type": "portmap", "backend": "%s"}' "\$backend" >conf
        if CNI_COMMAND=STATUS CNI_PATH=/opt/cni/bin '$plugin' <conf >said; then
            echo "STATUS finds nothing wrong with \$backend" >&2
            exit 1
        fi
        cat said
        grep -q '"code":50.*Protocol not supported' said
    done
}
case \$KM_LABEL in
    *-without-netfilter) without_netfilter; exit 0 ;;
    *-without-ipv6) tests 2 ./kernels ipv6:: --skip ipv6_may_go; exit 0 ;;
    *[!0-9.newst]*) exit 0 ;;
esac
# Many calls at once, emulated, on a machine that has more to do.
export TESTS_TIMEOUT=20
# The kernel loads it for no rule and no device.
modprobe br_netfilter
tests 9 ./netlink socket_diag
# Times of directories are what calls go by.
tests 1 ./bpf pins::stamps
case \$(uname -r) in
    5.* | 6.[0-7].*) tests 5 ./kernels --skip netkit --skip ipv6:: ;;
    *) tests 6 ./kernels --skip ipv6:: ;;
esac
# Tests of rules are about tools, and replays and versions about what runtimes send: no kernel changes that.
tests 44 ./matrix --skip iptables --skip nftables --skip rules_for_one_family --skip a_chain_of_others_marks \\
    --skip the_other_syntax_is_an_error --skip replay:: --skip versions::
END
chmod 755 "$payload/test.sh"

# The maps are sized for a node, and every test makes its own.
logs=target/kernels/logs
mkdir -p "$logs"
tests/kernels/boot.sh -m 1536 -T 1500 -j "$(nproc)" -l "$logs" -p "$payload" \
    -t bash -t ip -t iptables -t ip6tables -t iptables-restore -t ip6tables-restore -t nft -t tc -t xtables-nft-multi -t xtables-legacy-multi -f /usr/lib/*-linux-gnu/xtables "$@" >"$payload/summary" || {
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
