#!/bin/sh
# Runs every check there is, and installs the tools that they need where they are missing (Debian).
# Root is for the network namespaces, rules and mounts of the privileged tests: all of those are
# made in namespaces that the tests create. Under sudo everything else runs as the calling user.
#
#   TESTS_ADVISORIES=1  also check the crates against the published advisories. That needs the
#                       network, and its result changes without any change here, so a commit that
#                       passed could fail; a scheduled run is the place for it.
set -eu

cd -- "$(dirname -- "$0")/.."

CARGO_DENY_VERSION=0.20.2
KUBERNETES_VALIDATE_VERSION=1.37.0

started=$(date +%s)
installed=
step=
step_started=$started
timings=

# A step ends where the next one starts.
heading() {
    now=$(date +%s)
    if [ -n "$step" ]; then timings="$timings$(printf '%5ds  %s' "$((now - step_started))" "$step")
"; fi
    step=$1
    step_started=$now
    printf '\n=== %s\n' "$step"
}

finish() {
    status=$?
    if [ -n "$installed" ]; then rm -rf -- "$installed"; fi
    if [ "$status" -ne 0 ]; then
        printf '\nFAILED in "%s" (status %s)\n' "$step" "$status" >&2
    fi
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

fail() {
    printf 'tests/run.sh: %s\n' "$*" >&2
    exit 1
}

# Under sudo, cargo and the checkout belong to the caller: files that root made there would break
# their next build, and tests that need no root should not have it.
as_caller() {
    if [ -n "$caller" ]; then
        sudo -u "$caller" -H -- env "PATH=$PATH" ${CARGO_TARGET_DIR:+"CARGO_TARGET_DIR=$CARGO_TARGET_DIR"} \
            ${CARGO_BUILD_TARGET:+"CARGO_BUILD_TARGET=$CARGO_BUILD_TARGET"} "$@"
    else
        "$@"
    fi
}

heading 'Tools'
[ "$(id -u)" = 0 ] || fail 'the privileged tests need root: run this with sudo'
caller=
case ${SUDO_USER:-root} in
    root) PATH=$PATH:${HOME:-/root}/.cargo/bin ;;
    *[!A-Za-z0-9._-]*) fail "cannot handle the user name $SUDO_USER" ;;
    *)
        home=$(eval "printf '%s' ~$SUDO_USER")
        PATH=$home/.cargo/bin:$PATH
        if [ "$(stat -c %U .)" = "$SUDO_USER" ]; then
            caller=$SUDO_USER
        elif [ -d "$home/.rustup" ]; then
            RUSTUP_HOME=${RUSTUP_HOME:-$home/.rustup}
            export RUSTUP_HOME
        fi
        ;;
esac
# Neither is in every user's PATH.
PATH=$PWD/target/tools/bin:$PATH:/usr/sbin:/sbin
export PATH

# The program or file that is looked for, and the package that has it. The last is upstream's plugin, for the comparison.
missing=
while read -r tool package; do
    [ -e "$tool" ] || command -v "$tool" >/dev/null || missing="$missing $package"
done <<'END'
nft nftables
iptables iptables
iptables-legacy iptables
ipset ipset
conntrack conntrack
ip iproute2
tc iproute2
bpftool bpftool
unshare util-linux
setpriv util-linux
sysctl procps
strace strace
git git
cc gcc
/usr/include/stdlib.h libc6-dev
readelf binutils
shellcheck shellcheck
dash dash
/usr/share/doc/busybox-static busybox-static
curl curl
buildah buildah
systemd-analyze systemd
python3 python3
qemu-system-x86_64 qemu-system-x86
cpio cpio
xz xz-utils
zstd zstd
lz4 lz4
clang-19 clang-19
llvm-strip-19 llvm-19
/usr/include/bpf/bpf_helpers.h libbpf-dev
/usr/lib/cni/portmap containernetworking-plugins
END
if [ -n "$missing" ]; then
    command -v apt-get >/dev/null || fail "missing, and there is no apt-get to install it:$missing"
    printf 'Installing%s\n' "$missing"
    apt-get update
    # shellcheck disable=SC2086 # one argument per package
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing
fi
for tool in cargo rustc rustfmt cargo-clippy; do
    command -v "$tool" >/dev/null || fail "$tool is missing: install Rust with rustfmt and clippy (looked in $PATH)"
done
if ! command -v cargo-deny >/dev/null; then
    # A tool of this machine, whatever the plugin is built for. It runs for a second; optimized, it would take
    # two minutes to build, and without that one.
    as_caller env -u CARGO_BUILD_TARGET CARGO_PROFILE_DEV_DEBUG=false \
        cargo install cargo-deny --debug --locked --version "$CARGO_DENY_VERSION" --root target/tools
fi
# What is tested is what install.sh builds.
CARGO_BUILD_TARGET=$(as_caller scripts/target.sh)
export CARGO_BUILD_TARGET
as_caller rustc --version
printf 'Building for %s\n' "$CARGO_BUILD_TARGET"
as_caller cargo deny --version

heading 'Formatting'
as_caller cargo fmt --check

heading 'Shell scripts'
scripts=$(find . \( -path ./target -o -path ./.git \) -prune -o -type f \( -name '*.sh' -o -path './.ci/*' \) -print)
# shellcheck disable=SC2086 # one argument per script
shellcheck $scripts

heading 'Kubernetes manifests'
# It carries the schemas of all these versions, so that nothing is asked for while it validates.
if ! command -v kubernetes-validate >/dev/null && [ ! -x target/tools/python/bin/kubernetes-validate ]; then
    python3 -c 'import ensurepip' 2>/dev/null || DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv
    as_caller python3 -m venv target/tools/python
    as_caller target/tools/python/bin/pip install --quiet "kubernetes-validate==$KUBERNETES_VALIDATE_VERSION"
fi
PATH=$PATH:$PWD/target/tools/python/bin
for version in 1.32 1.37; do
    kubernetes-validate --strict --quiet -k "$version" examples/kubernetes/*.yaml
done

heading 'JSON of the commands'
# Tests compare the output with these files byte for byte. jsonschema came with kubernetes-validate.
for golden in testdata/golden/commands/*.json; do
    schema=testdata/schema/$(basename "$golden" .json | sed 's/-\(again\|bad\|orphan\|some\)$//').json
    jsonschema=$(dirname "$(command -v kubernetes-validate)")/jsonschema
    PYTHONWARNINGS=ignore "$jsonschema" --instance "$golden" "$schema"
done

heading 'eBPF objects'
src/bpf/build.sh --check

heading 'Clippy'
as_caller cargo clippy --all-targets --locked -- -D warnings

heading 'Dependencies: licences, bans, sources'
as_caller cargo deny --locked check licenses bans sources
if [ -n "${TESTS_ADVISORIES:-}" ]; then
    heading 'Dependencies: advisories'
    as_caller cargo deny --locked check advisories
fi

heading 'Documentation'
as_caller env RUSTDOCFLAGS='-D warnings' cargo doc --no-deps --locked --document-private-items

heading 'Tests without privileges'
as_caller cargo test --locked

heading 'Tests with privileges'
# Built by the caller, run by root. `"test":true` in the profile tells them from the plugin itself.
messages=$(as_caller cargo test --locked --no-run --message-format=json-render-diagnostics)
tests=$(printf '%s\n' "$messages" |
    sed -n 's/.*"profile":{[^}]*"test":true[^}]*}.*"executable":"\([^"]*\)".*/\1/p')
[ -n "$tests" ] || fail 'cargo named no test program'
# As cargo does, for tests that start cargo or look for files of the package while running.
CARGO_MANIFEST_DIR=$PWD
export CARGO_MANIFEST_DIR
# Everything else goes with the namespaces that the tests make; programs at the root of cgroup v2, which is
# the whole machine's, would stay and act.
cgroup=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
[ -n "$cgroup" ] || fail 'cgroup v2 is mounted nowhere'
programs() {
    shown=$(bpftool cgroup show "$cgroup") || fail "bpftool cannot show the programs at $cgroup"
    printf '%s\n' "$shown" | awk '$NF ~ /^pm_/' | sort
}
programs_before=$(programs)
# Namespaces that tests make have its settings for themselves (Linux 5.3). Its first one is to put the frames of this
# machine's own bridges through the machine's rules, which is none of the tests' business.
bridge=/proc/sys/net/bridge
if [ ! -e "$bridge" ]; then
    # A kernel with modules comes with kmod, by its package's dependencies.
    modprobe br_netfilter || fail 'some tests need br_netfilter, which modprobe cannot load'
    for calls in iptables ip6tables arptables; do
        printf '0\n' >"$bridge/bridge-nf-call-$calls"
    done
fi
matrix=
kernels=
netlink=
bpf=
for test in $tests; do
    case ${test##*/} in
        matrix-*) matrix=$test ;;
        netlink-*) netlink=$test ;;
        bpf-*) bpf=$test ;;
        # For guests: this kernel may lack what it needs.
        kernels-*)
            kernels=$test
            continue
            ;;
    esac
    printf '%s\n' "$test"
    suite_started=$(date +%s)
    # A test that waits for ever would be found by nobody: this says which one it was.
    timeout --foreground --kill-after=10 1800 "$test" --ignored
    printf '%5ds\n' "$(($(date +%s) - suite_started))"
    programs_left=$(programs)
    [ "$programs_left" = "$programs_before" ] ||
        fail "$test has left programs at $cgroup, or taken some away: $programs_left"
done

heading 'Installation of a release build'
# The only build with the release profile, and by the command that people use.
installed=$(mktemp -d)
./install.sh --dest "$installed"
# On a node there is no library and no loader to go with it.
if readelf --dynamic --program-headers --wide "$installed/portmap" | grep -E 'NEEDED|INTERP'; then
    fail 'the release build is not static'
fi
# What a call would have to relocate before it begins.
readelf --file-header "$installed/portmap" | grep -q 'Type: *EXEC' || fail 'the release build is position-independent'
# Functions that another compiler gives other names would be left where they are, which nothing else tells.
gathered=$(readelf --section-headers --wide "$installed/portmap" |
    sed -n 's/.* \.text\.called *PROGBITS *[0-9a-f]* *[0-9a-f]* *\([0-9a-f]*\) .*/\1/p')
case $(scripts/target.sh) in
    *-musl) [ "$((0x${gathered:-0}))" -ge 500000 ] || fail 'scripts/functions.ld names few functions that there are (run scripts/functions.sh), or this machine links with another linker than GNU ld' ;;
esac
"$installed/portmap" --version
./install.sh --uninstall --force --dest "$installed"
rmdir "$installed"
installed=

heading 'Other kernels'
release=$(as_caller cargo build --release --locked --message-format=json-render-diagnostics |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p')
as_caller tests/kernels/run.sh "$release" "$matrix" "$kernels" "$netlink" "$bpf"

heading 'Summary'
printf '%s%5ds  all of it\n' "$timings" "$(($(date +%s) - started))"
printf 'All checks passed.\n'
