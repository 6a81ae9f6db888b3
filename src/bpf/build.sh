#!/bin/sh
# Builds the eBPF objects that are committed, so that building the crate needs no compiler for C:
#   portmap.bpf.o                          what the plugin embeds
#   portmap.bpf.o.revision                 the beginning of its SHA-256, which names its pins
#   ../../testdata/bpf/{older,newer}.bpf.o the same with other numbers in layout.h, for tests
#   ../../testdata/bpf/standins.bpf.o      programs that tests put in the place of others'
#   CLANG                                  what they were built with
#
#   build.sh          build and replace them
#   build.sh --check  build elsewhere and compare: 0 if every byte is the same
#
# Environment: CLANG and LLVM_STRIP name other programs than clang-19 and llvm-strip-19.
set -eu

cd -- "$(dirname -- "$0")"

clang=${CLANG:-clang-19}
strip=${LLVM_STRIP:-llvm-strip-19}
tests=../../testdata/bpf

for tool in "$clang" "$strip"; do
    if ! command -v "$tool" >/dev/null; then
        printf 'build.sh: %s is missing (Debian: clang-19, llvm-19)\n' "$tool" >&2
        exit 1
    fi
done

# <asm/types.h> is in a directory of the machine's architecture, which the BPF target does not know.
arch=
for directory in /usr/include/*-linux-gnu; do
    if [ -e "$directory/asm/types.h" ]; then arch=$directory; fi
done

version() {
    dpkg-query --show --showformat='${Version}' "$1" 2>/dev/null || printf unknown
}

# The types of the context are in the object, hence the versions of the headers.
describe() {
    "$clang" --version | head -n 1
    printf 'linux-libc-dev %s\n' "$(version linux-libc-dev)"
    printf 'libbpf-dev %s\n' "$(version libbpf-dev)"
}

# Usage: compile SOURCE OBJECT [FLAG]...
# Only .BTF is left of what -g makes: maps are defined there, the rest is for debuggers.
compile() {
    source=$1
    object=$2
    shift 2
    "$clang" -O2 -g -target bpf -mcpu=v2 -Wall -Wextra -Werror -Wno-missing-field-initializers \
        -ffile-compilation-dir=. ${arch:+-idirafter "$arch"} "$@" -c "$source" -o "$object"
    "$strip" --strip-debug --remove-section=.BTF.ext --remove-section=.rel.BTF.ext \
        --remove-section=.llvm_addrsig "$object"
}

# Usage: build OBJECT OLDER NEWER STANDINS
build() {
    compile portmap.bpf.c "$1"
    compile portmap.bpf.c "$2" -DLAYOUT=0 -DREVISION=0
    compile portmap.bpf.c "$3" -DLAYOUT=2 -DREVISION=2
    compile "$tests/standins.bpf.c" "$4"
}

case ${1:-} in
    '')
        mkdir -p "$tests"
        build portmap.bpf.o "$tests/older.bpf.o" "$tests/newer.bpf.o" "$tests/standins.bpf.o"
        sha256sum portmap.bpf.o | cut -c 1-16 >portmap.bpf.o.revision
        describe >CLANG
        ;;
    --check)
        made=$(mktemp -d)
        trap 'rm -rf -- "$made"' EXIT
        build "$made/portmap.bpf.o" "$made/older.bpf.o" "$made/newer.bpf.o" "$made/standins.bpf.o"
        differ=
        for object in portmap.bpf.o "$tests/older.bpf.o" "$tests/newer.bpf.o" "$tests/standins.bpf.o"; do
            cmp -- "$object" "$made/${object##*/}" || differ="$differ $object"
        done
        if [ -z "$differ" ]; then exit 0; fi
        describe >"$made/CLANG"
        printf 'build.sh: not what the sources give:%s\n' "$differ" >&2
        if cmp -s CLANG "$made/CLANG"; then
            printf 'The compiler is the same: run src/bpf/build.sh and commit the result.\n' >&2
        else
            printf 'They were built with\n%s\nand this machine has\n%s\n' \
                "$(cat CLANG)" "$(cat "$made/CLANG")" >&2
        fi
        exit 1
        ;;
    *)
        printf 'usage: build.sh [--check]\n' >&2
        exit 2
        ;;
esac
