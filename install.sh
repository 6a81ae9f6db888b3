#!/bin/sh
# Puts portmap where the container runtime looks for CNI plugins. Safe to repeat, and safe at any
# moment: the runtime may be starting the old file while this runs, and this may be killed.
# Needs a POSIX shell and coreutils (or busybox); curl or wget only for --url, cargo only when there
# is no binary to copy. On Debian it then installs the linker that cargo needs.
set -eu

# The tools' messages are recognised below.
LC_ALL=C
export LC_ALL
umask 022

nl='
'

usage() {
    cat <<'END'
Usage: install.sh [--binary FILE | --url URL --sha256 HASH] [--dest DIR]
                  [--conflist PATH|auto] [--conf-dir DIR] [--demo]
       install.sh --uninstall [--dest DIR] [--conflist PATH|auto] [--conf-dir DIR] [--force]

Installs portmap as DIR/portmap, replacing what is there in one step.

  --binary FILE    install this file; otherwise the file `portmap` beside install.sh,
                   otherwise build it with cargo
  --url URL        download it: the binary, or a release's .tar.gz
  --sha256 HASH    what sha256sum must say of the download before anything in it is used
  --dest DIR       where the runtime looks for plugins
                   (default: $CNI_BIN_DIR, or /opt/cni/bin if that is not set)
  --conflist LIST  also put portmap into this plugin list; auto is the one that runtimes take.
                   With --uninstall: take it out (see portmap install --help)
  --conf-dir DIR   where the runtime looks for lists (default: /etc/cni/net.d)
  --demo           afterwards run `portmap demo`
  --uninstall      remove DIR/portmap, unless a list or a pod still needs it
  --force          remove it also then
  --help           print this

DIR is elsewhere on some nodes: the bin_dir of containerd, cni_plugin_dirs or plugin_dirs of CRI-O.
END
}

say() { printf '%s\n' "$*"; }
die() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}
misuse() {
    printf 'install.sh: %s (see install.sh --help)\n' "$*" >&2
    exit 2
}

# --- Files ---------------------------------------------------------------------------------------

tmp=
download=
cleanup() {
    if [ -n "$tmp" ]; then rm -f -- "$tmp"; fi
    if [ -n "$download" ]; then rm -rf -- "$download"; fi
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# SIGKILL leaves a temporary file behind; its name says which process made it. A process number
# means nothing without /proc, so then only a file with our own number goes: nobody else has that.
remove_stale() {
    for stale in "$dest"/.portmap.*; do
        pid=${stale##*/.portmap.}
        case $pid in '' | *[!0-9]*) continue ;; esac
        if [ "$pid" = "$$" ] || { [ -d "/proc/$$" ] && [ ! -d "/proc/$pid" ]; }; then
            rm -f -- "$stale" 2>/dev/null || :
        fi
    done
}

# A broken sha256sum must mean "different", never "equal".
same() {
    [ -f "$1" ] && [ -f "$2" ] || return 1
    a=$(sha256sum <"$1") && b=$(sha256sum <"$2") || return 1
    [ "$a" = "$b" ]
}

# What a file says of itself. Upstream's plugin introduces itself on stderr, and only when there is
# no CNI_COMMAND. A file that waits for something must not hold up a node's start.
introduce() (
    unset CNI_COMMAND
    # Before 1.30 busybox spelled this differently.
    if timeout 10 true 2>/dev/null; then
        timeout 10 "$1" --version </dev/null 2>&1
    else
        "$1" --version </dev/null 2>&1
    fi
)

bytes() { od -An -tx1 -j"$2" -N"$3" "$1" 2>/dev/null | tr -d ' \n'; }

# A program for another processor must not be started at all: what the kernel refuses, shell and
# timeout(1) would run as a shell script. The processor is the one of od itself, or the kernel's
# where the programs are 32-bit ones.
is_foreign() {
    [ "$(bytes "$1" 0 4)" = 7f454c46 ] || return 1
    case $(uname -m) in
        x86_64) native=3e00 ;;
        aarch64) native=b700 ;;
        *) native= ;;
    esac
    machine=$(bytes "$1" 18 2)
    [ "$machine" != "$native" ] && [ "$machine" != "$(bytes /proc/self/exe 18 2)" ]
}

# Sets `version`, or `problem`. The file must already be where it is going to run: it may be that
# nothing can be started from there.
is_portmap() {
    if is_foreign "$1"; then
        problem="it does not run on this machine ($(uname -m)): it was built for another one"
        return 1
    fi
    status=0
    version=$(introduce "$1") || status=$?
    version=${version%%"$nl"*}
    case $status:$version in
        0:'portmap '*) return 0 ;;
        0:*) problem="it is not a portmap of this project; asked for its version it says: ${version:-nothing}" ;;
        124:*) problem="it does not answer when asked for its version" ;;
        126:*[Pp]'ermission denied'*) problem="nothing can be run from $dest (a noexec mount?): $version" ;;
        *) problem="it does not run on this machine (status $status): ${version:-no output}" ;;
    esac
    return 1
}

# From a tool's message to what a person can do about it.
advice() {
    case $1 in
        *[Rr]ead-only*) printf '%s' "$dest is on a read-only file system: choose a writable directory in which the runtime looks for plugins, with --dest or CNI_BIN_DIR" ;;
        *[Pp]'ermission denied'* | *'not permitted'*) printf '%s' "$dest is not writable by $(id -un 2>/dev/null || id -u): run this as root, or choose another directory with --dest or CNI_BIN_DIR" ;;
        *'o space left'*) printf '%s' "the file system of $dest is full" ;;
        *) printf '%s' "cannot write to $dest" ;;
    esac
    printf ' (%s)' "$1"
}

# Copies $1 to the temporary file, proves that it works there and renames it over $2. Until the
# rename $2 is untouched, and as nobody ever writes to $2 itself there is no "text file busy".
put() {
    tmp=$dest/.portmap.$$
    problem=
    err=$( (set -C && : >"$tmp") 2>&1) || { problem=$(advice "$err") && return 1; }
    err=$(cp -- "$1" "$tmp" 2>&1) || { problem=$(advice "$err") && return 1; }
    err=$(chmod 0755 "$tmp" 2>&1) || { problem=$(advice "$err") && return 1; }
    # With a label that the policy does not expect, SELinux keeps the runtime from starting it.
    if [ -e /sys/fs/selinux/enforce ] && [ -e "$2" ] && command -v chcon >/dev/null; then
        chcon --reference="$2" "$tmp" || say "warning: the SELinux label of $2 could not be kept" >&2
    fi
    # Without this a crash soon after the rename can leave an empty file under the final name.
    # A sync that takes no arguments syncs everything and says so; a failure is a real one.
    err=$(sync "$tmp" 2>&1) || { problem=$(advice "$err") && return 1; }
    is_portmap "$tmp" || { problem="$1 was not installed: $problem" && return 1; }
    err=$(mv -f -- "$tmp" "$2" 2>&1) || { problem=$(advice "$err") && return 1; }
    tmp=
    if [ -e /sys/fs/selinux/enforce ] && [ "$existed" = no ] && command -v restorecon >/dev/null; then
        restorecon "$2" || say "warning: the SELinux label of $2 could not be set" >&2
    fi
    # Some network file systems refuse to sync a directory alone.
    sync "$dest" 2>/dev/null || sync
}

# Sets `list` to the first of those that are meant which mentions portmap.
listed() {
    if [ "$conflist" = auto ]; then
        set -- "${conf_dir:-/etc/cni/net.d}"
        set -- "$1"/*.conf "$1"/*.conflist "$1"/*.json "$1"/*/*.conf
    else
        set -- "$conflist"
    fi
    for list in "$@"; do
        if [ ! -f "$list" ]; then continue; fi
        case $(cat -- "$list") in *'"portmap"'*) return 0 ;; esac
    done
    return 1
}

# --- Building ------------------------------------------------------------------------------------

# sudo drops the PATH in which rustup put cargo, and root has another home directory.
invoker_home() {
    case ${SUDO_USER:-root} in
        root | *[!A-Za-z0-9._-]*) return 1 ;;
        *) eval "printf '%s' ~$SUDO_USER" ;;
    esac
}

# Runs a command as the user whose build it is.
as_builder() {
    if [ -n "$as" ]; then
        sudo -u "$as" -H -- env "PATH=$PATH" ${CARGO_TARGET_DIR:+"CARGO_TARGET_DIR=$CARGO_TARGET_DIR"} \
            ${CARGO_BUILD_TARGET:+"CARGO_BUILD_TARGET=$CARGO_BUILD_TARGET"} "$@"
    else
        "$@"
    fi
}

# Sets `source` to a fresh release build.
build() {
    [ -f "$here/Cargo.toml" ] || die "there is no portmap beside install.sh and no source to build it from: give --binary FILE"
    as=
    if home=$(invoker_home); then
        # Their toolchain comes first: it is the one they expect to be used.
        PATH=$home/.cargo/bin:$PATH
        # As root, cargo would leave files in their tree that they can neither change nor remove.
        if [ "$(id -u)" = 0 ] && [ "$(stat -c %U "$here")" = "$SUDO_USER" ]; then
            as=$SUDO_USER
        elif [ -d "$home/.rustup" ]; then
            RUSTUP_HOME=${RUSTUP_HOME:-$home/.rustup}
            export RUSTUP_HOME
        fi
    else
        # A node's init script has a shorter PATH than a login.
        PATH=$PATH:${HOME:-/root}/.cargo/bin
    fi
    export PATH
    command -v cargo >/dev/null || die "there is no portmap beside install.sh, and no cargo to build it with (looked in $PATH): give --binary FILE, or install Rust"

    # Rust links with cc, which Debian's base has not got.
    if ! command -v cc >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        say "Installing gcc and libc6-dev, which Rust links with."
        apt-get update -q >&2 || die "apt-get cannot update its lists"
        DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends gcc libc6-dev >&2 ||
            die "apt-get cannot install gcc and libc6-dev, without which Rust cannot link"
    fi

    say "Building portmap with $(command -v cargo)${as:+ as $as}; this takes a minute or two."
    # The first directory is where .cargo/config.toml applies.
    cd "$here"
    built_for=$(as_builder ./scripts/target.sh) || die "rustc does not work; its messages are above"
    messages=$(as_builder cargo build --release --locked --bin portmap --target "$built_for" \
        --message-format=json-render-diagnostics) || die "cargo could not build portmap; its messages are above"
    # Where the file is depends on the target directory and the target: cargo knows.
    source=
    while IFS= read -r line; do
        case $line in
            *'"executable":"'*)
                source=${line##*'"executable":"'}
                source=${source%%'"'*}
                ;;
        esac
    done <<END
$messages
END
    [ -f "$source" ] || die "cargo did not say where it put portmap"
}

# --- Downloading ---------------------------------------------------------------------------------

# Sets `source` to what is at the URL. Nothing of it is looked at before its hash is known to be right.
fetch() {
    download=$(mktemp -d) || die "cannot make a temporary directory"
    file=$download/file
    if command -v curl >/dev/null; then
        err=$(curl -fsSL --retry 3 -o "$file" -- "$url" 2>&1) || die "cannot download $url: $err"
    elif command -v wget >/dev/null; then
        err=$(wget -q -O "$file" -- "$url" 2>&1) || die "cannot download $url: ${err:-wget failed}"
    else
        die "neither curl nor wget is there to download $url with: download it elsewhere and give --binary FILE"
    fi
    is=$(sha256sum <"$file") || die "cannot compute the hash of what was downloaded"
    is=${is%% *}
    [ "$is" = "$sha256" ] || die "$url has the SHA-256 $is, and it should be $sha256: nothing was installed"
    case $url in
        *.tar.gz | *.tgz)
            mkdir "$download/unpacked"
            tar -xzf "$file" -C "$download/unpacked" || die "cannot unpack $url"
            source=
            for file in "$download"/unpacked/portmap "$download"/unpacked/*/portmap; do
                if [ -f "$file" ]; then source=$file; fi
            done
            [ -n "$source" ] || die "there is no portmap in $url"
            ;;
        *) source=$file ;;
    esac
}

# --- What was asked for --------------------------------------------------------------------------

dest=${CNI_BIN_DIR:-/opt/cni/bin}
source=
url=
sha256=
conflist=
conf_dir=
demo=no
uninstall=no
force=no
while [ $# -gt 0 ]; do
    case $1 in
        --binary=?* | --dest=?* | --url=?* | --sha256=?* | --conflist=?* | --conf-dir=?*)
            option=${1%%=*}
            value=${1#*=}
            shift
            set -- "$option" "$value" "$@"
            continue
            ;;
        --binary | --dest | --url | --sha256 | --conflist | --conf-dir)
            if [ $# -lt 2 ] || [ -z "$2" ]; then misuse "$1 needs a value"; fi
            case $1 in
                --binary) source=$2 ;;
                --dest) dest=$2 ;;
                --url) url=$2 ;;
                --sha256) sha256=$(printf '%s' "$2" | tr A-F a-f) ;;
                --conflist) conflist=$2 ;;
                --conf-dir) conf_dir=$2 ;;
            esac
            shift
            ;;
        --demo) demo=yes ;;
        --uninstall) uninstall=yes ;;
        --force) force=yes ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) misuse "unknown argument: $1" ;;
    esac
    shift
done
if [ "$uninstall" = yes ] && { [ "$demo" = yes ] || [ -n "$source$url$sha256" ]; }; then
    misuse "--uninstall goes with --dest only, and with --conflist, --conf-dir and --force"
fi
if [ "$force" = yes ] && [ "$uninstall" = no ]; then misuse "--force goes with --uninstall"; fi
if [ -n "$url" ] || [ -n "$sha256" ]; then
    [ -z "$source" ] || misuse "--binary and --url exclude each other"
    if [ -z "$url" ] || [ -z "$sha256" ]; then misuse "--url and --sha256 go together"; fi
    case $sha256 in *[!0-9a-f]*) sha256= ;; esac
    [ "${#sha256}" = 64 ] || misuse "--sha256 needs the 64 hexadecimal digits that sha256sum prints"
fi
# Paths are the caller's: a build changes the directory.
case $dest in /*) ;; *) dest=$PWD/$dest ;; esac
dest=${dest%/}
case $source in '' | /*) ;; *) source=$PWD/$source ;; esac
case $conflist in '' | auto | /*) ;; *) conflist=$PWD/$conflist ;; esac
case $conf_dir in '' | /*) ;; *) conf_dir=$PWD/$conf_dir ;; esac
here=$(cd -- "$(dirname -- "$0")" && pwd)
target=$dest/portmap

if [ "$uninstall" = yes ]; then
    remove_stale
    set -- uninstall --dest "$dest"
    if [ -n "$conflist" ]; then set -- "$@" --conflist "$conflist"; fi
    if [ -n "$conf_dir" ]; then set -- "$@" --conf-dir "$conf_dir"; fi
    if [ "$force" = yes ]; then set -- "$@" --force; fi
    if [ ! -e "$target" ] && [ ! -L "$target" ]; then
        if [ -n "$conflist" ] && listed; then
            # With a list that names a plugin which is not there, runtimes fail every ADD and every DEL.
            problem="there is none beside install.sh either"
            { [ -f "$here/portmap" ] && is_portmap "$here/portmap"; } ||
                die "$list names portmap, and there is no $target that could take it out ($problem): install it again first, or edit the list by hand"
            said=$("$here/portmap" "$@" 2>&1) || die "$said"
            say "$said"
            exit 0
        fi
        say "$target is not installed; nothing to do"
        exit 0
    fi
    # Upstream's plugin has the same name, and pods may depend on it.
    is_portmap "$target" || die "$target was left alone: $problem"
    # One that has no such command yet is asked nothing.
    if "$target" uninstall --help >/dev/null 2>&1; then
        said=$("$target" "$@" 2>&1) || die "$said"
        if [ -n "$conflist" ]; then say "$said"; fi
    elif [ -n "$conflist" ]; then
        die "$target ($version) cannot take itself out of a list: edit $conflist by hand"
    fi
    err=$(rm -f -- "$target" 2>&1) || die "$(advice "$err")"
    say "Removed $target ($version)"
    say "Pods that still have hostPorts need a portmap there when they are deleted."
    exit 0
fi

if [ -n "$url" ]; then
    fetch
elif [ -n "$source" ]; then
    [ -e "$source" ] || die "$source does not exist"
    [ -f "$source" ] || die "$source is not a file"
    [ -r "$source" ] || die "$source is not readable by $(id -un 2>/dev/null || id -u)"
elif [ -f "$here/portmap" ]; then
    source=$here/portmap
else
    build
fi

if [ ! -d "$dest" ]; then
    err=$(mkdir -p -- "$dest" 2>&1) || die "$dest does not exist and cannot be created: $(advice "$err")"
    say "Created $dest"
fi
# mv would move the file into it.
[ ! -d "$target" ] || die "$target is a directory"
remove_stale

existed=no
if same "$source" "$target" && [ -x "$target" ]; then
    is_portmap "$target" || die "$source is already installed as $target, but $problem"
    say "$target is already up to date ($version)"
else
    before=
    if [ -e "$target" ]; then
        existed=yes
        is_foreign "$target" || before=$(introduce "$target") || before=
        before=${before%%"$nl"*}
    fi
    # An installer in a container that has this directory mounted sees other process numbers and
    # can take our temporary file for a stale one. Only then it is gone, and a second try helps.
    put "$source" "$target" || { [ ! -e "$tmp" ] && put "$source" "$target"; } || die "$problem"
    say "Installed $target ($version)"
    if [ "$existed" = yes ]; then say "It replaces another one there: ${before:-it does not tell its version}"; fi
fi

if [ -n "$conflist" ]; then
    set -- install --dest "$dest" --conflist "$conflist"
    if [ -n "$conf_dir" ]; then set -- "$@" --conf-dir "$conf_dir"; fi
    "$target" "$@"
fi
if [ "$demo" = yes ]; then "$target" demo; fi
