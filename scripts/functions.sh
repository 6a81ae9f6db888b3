#!/bin/sh
# Writes scripts/functions.ld anew: the functions that runtimes' calls run through, for the linker to put
# side by side (build.rs). The kernel maps a binary in windows of 64 KiB when they are first touched, and a
# process that lives for a millisecond spends a tenth of it on these, if what it needs is spread over all
# that commands need, too.
#
#   sudo scripts/functions.sh
#
# Needs valgrind, iptables, nft and iproute2. All calls are made in namespaces of its own. Functions
# that are missing from the list, or are gone, cost time and nothing else: run it now and then.
set -eu

cd -- "$(dirname -- "$0")/.."

if [ "${1:-}" != inside ]; then
    target=$(scripts/target.sh)
    # Names of functions are needed. Of several that are alike the compiler keeps one, by the names of crates,
    # and these depend on the profile: this is the release's, and only linking is other.
    cargo rustc --release --locked --bin portmap --target "$target" --target-dir target/functions -- -C strip=none
    out=$(mktemp -d)
    trap 'rm -rf -- "$out"' EXIT
    unshare --net --mount --pid --fork --mount-proc sh scripts/functions.sh inside "target/functions/$target/release/portmap" "$out"
    # Before the rest comes what pods wait for, and first of all with eBPF, which has no tools to wait for.
    cd -- "$out"
    comm -12 ebpf.tcp.ADD ebpf.tcp.DEL |
        cat - ebpf.tcp.ADD ebpf.tcp.DEL ./*.ADD ./*.DEL ./*.*.* |
        awk '!seen[$0]++' >all
    cd -- "$OLDPWD"
    {
        printf '/* Made by functions.sh. The hashes of crates, and references to names within names, which depend on\n'
        printf '   their length, are left open: they change with the compiler and the checkout'\''s path. */\n'
        printf 'SECTIONS\n{\n  .text.called :\n  {\n'
        # What begins a process, and musl, of which every call needs a little of everything: 42 KB.
        printf '    *crt1.o(.text .text.*)\n    *crtbegin*.o(.text .text.*)\n    *(.text.main)\n    *libc.a:*(.text .text.*)\n'
        # Those that are called #[cold] have sections of another name.
        sed 's/.*/    *(.text.& .text.unlikely.&)/' "$out/all"
        printf '  }\n}\nINSERT BEFORE .text;\n'
        # A call looks at what it forwards by, and not at the programs themselves, two fifths of all constants.
        printf 'SECTIONS\n{\n  .rodata.object :\n  {\n    *(.rodata.*_7portmap7backend4ebpf6loaded7ALIGNED*)\n  }\n}\nINSERT AFTER .rodata;\n'
    } >scripts/functions.ld
    wc -l scripts/functions.ld
    exit
fi

portmap=$2
out=$3
mount -t bpf bpf /sys/fs/bpf
mount -t tmpfs tmpfs /run
# Programs at the root of cgroup v2 would outlive the namespaces. Not before both are mounted: what is there
# otherwise is the machine's.
trap '"$portmap" flush --all --yes >/dev/null' EXIT
mkdir /run/netns
ip link set lo up
ip link add eth0 type veth peer name outside
ip link set eth0 up
ip link set outside up
ip addr add 192.0.2.1/24 dev eth0
ip addr add 2001:db8:1::1/64 dev eth0 nodad
ip route add default via 192.0.2.2
ip netns add pod
ip link add pod type veth peer name eth0 netns pod
ip link set pod up
ip addr add 10.88.0.1/32 dev pod
ip route add 10.88.0.2/32 dev pod
ip route add 2001:db8::2/128 dev pod
ip netns exec pod ip addr add 10.88.0.2/24 dev eth0
ip netns exec pod ip addr add 2001:db8::2/64 dev eth0 nodad
ip netns exec pod ip link set eth0 up

export CNI_NETNS=/run/netns/pod CNI_IFNAME=eth0 CNI_PATH=/nonexistent

# conf BACKEND PORT...
conf() {
    backend=$1
    shift
    mappings=
    for port; do
        mappings="$mappings${mappings:+,}{\"hostPort\":$port,\"containerPort\":80,\"protocol\":\"${protocol:-tcp}\"}"
    done
    cat <<CONF
{"cniVersion":"1.1.0","name":"net","type":"portmap","capabilities":{"portMappings":true},"snat":true,"backend":"$backend",
"runtimeConfig":{"portMappings":[$mappings]},"cni.dev/valid-attachments":[{"containerID":"resident","ifname":"eth0"}],
"prevResult":{"cniVersion":"1.1.0","interfaces":[{"name":"pod"},{"name":"eth0","sandbox":"/run/netns/pod"}],
"ips":[{"address":"10.88.0.2/24","gateway":"10.88.0.1","interface":1},{"address":"2001:db8::2/64","interface":1}]}}
CONF
}

# call VERB CONTAINER, with the configuration on stdin
call() {
    CNI_COMMAND=$1 CNI_CONTAINERID=$2 "$portmap"
}

# profiled NAME VERB CONTAINER: what is called, to the file NAME.VERB
profiled() {
    CNI_COMMAND=$2 CNI_CONTAINERID=$3 valgrind -q --log-file=/dev/null --tool=callgrind --demangle=no --callgrind-out-file="$out/calls" "$portmap"
    sed -n "s/^c\{0,1\}fn=([0-9]*) \(_R[^' ]*\).*/\1/p" "$out/calls" |
        sed -E 's/Cs[0-9A-Za-z]+_([0-9])/Cs*_\1/g; s/B[0-9A-Za-z]*_/B*_/g; s/\.[0-9]+$//; s/B\*_$//' | awk '
            # A crate and no name in it, at the end: names have their lengths before them, which awk takes for
            # the number that such a text is.
            match($0, /Cs\*_[0-9]+[A-Za-z_0-9]+$/) {
                crate = substr($0, RSTART + 4)
                if (length(crate) == crate + length(crate + 0))
                    $0 = substr($0, 1, RSTART - 1)
            }
            { print $0 "*" }' | sort -u >"$out/$1.$2"
}

for backend in ebpf nftables iptables; do
    conf "$backend" 8001 | call ADD resident
    for protocol in tcp udp; do
        # Every pod comes with a link that is new.
        ip link add "new-$protocol" type veth peer name "far-$protocol"
        ip link set "new-$protocol" up
        conf "$backend" 8080 8081 | profiled "$backend.$protocol" ADD pod
        conf "$backend" 8080 8081 | profiled "$backend.$protocol" CHECK pod
        conf "$backend" 8080 8081 | profiled "$backend.$protocol" DEL pod
        ip link del "new-$protocol"
    done
    conf "$backend" 8080 8081 | profiled "$backend.gone" DEL pod
    conf "$backend" | profiled "$backend.none" ADD pod
    protocol=tcp
    conf "$backend" 8080 | call ADD pod
    conf "$backend" | profiled "$backend.tcp" GC pod
    conf "$backend" | profiled "$backend.tcp" STATUS pod
    conf "$backend" 8001 | call DEL resident
    echo '{"cniVersion":"1.1.0"}' | profiled "$backend.tcp" VERSION pod
    "$portmap" flush --all --yes
done >/dev/null
