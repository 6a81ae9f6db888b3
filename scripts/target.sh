#!/bin/sh
# Prints for which target cargo should build: musl's, where Rust has its standard library or rustup can
# get it, otherwise the compiler's own. Either makes one static file.
#
# A runtime starts a process per pod and verb. Before a program begins glibc asks the processor what it
# has, and every such question a virtual machine leaves to its hypervisor: that can take longer than all
# the rest of starting.
set -eu

if [ -n "${CARGO_BUILD_TARGET:-}" ]; then
    printf '%s\n' "$CARGO_BUILD_TARGET"
    exit
fi
host=$(rustc --version --verbose | sed -n 's/^host: //p')
[ -n "$host" ] || {
    echo 'target.sh: rustc does not tell its target' >&2
    exit 1
}
target=$host
case $host in
    *-linux-gnu)
        musl=${host%-gnu}-musl
        has_musl() {
            set -- "$(rustc --print target-libdir --target "$musl")"/libstd-*.rlib
            [ -e "$1" ]
        }
        # Under sudo it may be the caller's, who could not change any more what root has put there.
        owns_rustup() {
            command -v rustup >/dev/null &&
                [ "$(stat -c %u "${RUSTUP_HOME:-${HOME:-/root}/.rustup}" 2>/dev/null)" = "$(id -u)" ]
        }
        # Without a network it gives up soon.
        if has_musl || { owns_rustup && timeout 120 rustup target add "$musl" >&2 && has_musl; }; then
            target=$musl
        fi
        ;;
esac
printf '%s\n' "$target"
