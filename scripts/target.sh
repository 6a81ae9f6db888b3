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
        has_musl() { [ -d "$(rustc --print target-libdir --target "$musl")" ]; }
        # Without a network it gives up soon.
        if has_musl || { command -v rustup >/dev/null && timeout 120 rustup target add "$musl" >&2 && has_musl; }; then
            target=$musl
        fi
        ;;
esac
printf '%s\n' "$target"
