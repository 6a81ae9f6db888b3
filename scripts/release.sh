#!/bin/sh
# Makes a release: a tarball that is the same bytes wherever and whenever it is made from one commit, an
# SBOM (CycloneDX) of what is linked into the binary, and their hashes.
#
#   scripts/release.sh [--out DIR] [--target TRIPLE]...
#
# The date inside is the commit's, or SOURCE_DATE_EPOCH. Needs cargo with the targets, GNU tar, gzip and,
# for the SBOM, cargo-cyclonedx (cargo install --locked cargo-cyclonedx).
set -eu

LC_ALL=C
TZ=UTC
export LC_ALL TZ
umask 022

die() {
    printf 'release.sh: %s\n' "$*" >&2
    exit 1
}

cd -- "$(dirname -- "$0")/.."
root=$PWD
out=$root/target/dist
targets=
while [ $# -gt 0 ]; do
    case $1 in
        --out | --target)
            [ $# -ge 2 ] || die "$1 needs a value"
            if [ "$1" = --out ]; then out=$2; else targets="$targets $2"; fi
            shift
            ;;
        *) die "unknown argument: $1" ;;
    esac
    shift
done
targets=${targets:- x86_64-unknown-linux-musl}

command -v cargo-cyclonedx >/dev/null || die "cargo-cyclonedx is missing: cargo install --locked cargo-cyclonedx"
version=$(cargo metadata --format-version 1 --no-deps --locked | sed -n 's/.*"name":"portmap","version":"\([^"]*\)".*/\1/p')
[ -n "$version" ] || die "cargo does not tell the version"
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH

rm -rf -- "$out"
mkdir -p "$out"
out=$(cd -- "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
# Only what is committed, whatever else lies around.
mkdir "$work/source"
git archive HEAD | tar -xf - -C "$work/source"

# Paths of the machine that builds, which panic messages would otherwise show.
home=${CARGO_HOME:-$HOME/.cargo}
remap="'--remap-path-prefix', '$work/source=/portmap', '--remap-path-prefix', '$home=/cargo'"

for target in $targets; do
    arch=${target%%-*}
    name=portmap-$version-$arch
    dir=$work/$name
    (
        cd "$work/source"
        # Added to the flags in .cargo/config.toml; those in RUSTFLAGS would replace them.
        unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS
        CARGO_TARGET_DIR=$work/target cargo build --release --locked --bin portmap --target "$target" \
            --config "target.'cfg(target_os = \"linux\")'.rustflags = [$remap]"
        CARGO_TARGET_DIR=$work/target cargo cyclonedx --format json --target "$target" \
            --no-build-deps --spec-version 1.5 --override-filename "$name.cdx"
    )
    mkdir -p "$dir/man" "$dir/completions"
    cp "$work/target/$target/release/portmap" "$dir/portmap"
    (cd "$work/source" && cp -R install.sh LICENSE README.md CHANGELOG.md examples "$dir/")
    # Texts are the same for every processor: whichever binary runs here writes them.
    if [ -z "${texts:-}" ]; then
        texts=$work/texts
        mkdir -p "$texts/man" "$texts/completions"
        "$dir/portmap" man >"$texts/man/portmap.8"
        for command in $("$dir/portmap" --help | sed -n '/^Commands:/,/^$/s/^  \([a-z-]*\) .*/\1/p'); do
            case $command in help) continue ;; esac
            "$dir/portmap" man "$command" >"$texts/man/portmap-$command.8"
        done
        for shell in bash zsh fish; do
            "$dir/portmap" completions "$shell" >"$texts/completions/portmap.$shell"
        done
    fi
    cp "$texts"/man/* "$dir/man/"
    cp "$texts"/completions/* "$dir/completions/"
    # On its own as well, for what fetches a single file (Ignition, curl).
    cp "$dir/portmap" "$out/$name"
    # The package's own reference is the path of its source.
    sed "s|$work/source|/portmap|g" "$work/source/$name.cdx.json" >"$out/$name.cdx.json"
    tar -C "$work" --sort=name --format=gnu --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner \
        --mode='u=rwX,go=rX' -cf - "$name" | gzip -9 -n >"$out/$name.tar.gz"
done
cd "$out"
sha256sum -- * >"$work/SHA256SUMS"
mv "$work/SHA256SUMS" "$out/SHA256SUMS"
cat SHA256SUMS
