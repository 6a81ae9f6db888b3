#!/usr/bin/env bash
# boot.sh: run one payload on several distribution kernels under QEMU.
#
# usage: boot.sh [options] -p DIR KERNEL...
#
#   -p DIR   payload directory; DIR/test.sh is run as root in the guest, from
#            /payload. Exit status 0 is PASS, 77 is SKIP, anything else FAIL.
#            Files the test leaves under /out come back to LOGS/<label>.out/.
#   -t BIN   also ship this program of the host, with its libraries (repeatable)
#   -f PATH  also ship this file or directory, at the same path (repeatable)
#   -l DIR   logs                              (default ./logs)
#   -c DIR   cache of kernels                  (default target/kernels of this
#            repository)
#   -T SEC   limit for one boot                (default 120)
#   -j N     boots at a time                   (default 1; each uses one core)
#   -a ACC   tcg or kvm                        (default tcg)
#   -m MIB   guest memory                      (default 512)
#   -u       look for newer packages instead of using the cached choice
#   -n       no network: cached kernels only
#   -d       download and unpack only, boot nothing
#   -i       serial console on this terminal: a shell instead of test.sh
#
# KERNEL is VERSION[,OPTION...]. VERSION is one of
#   6.1  6.12.117                              newest Debian package that matches
#   newest                                     the newest of all
#   debian:linux-image-6.1.0-56-cloud-amd64    exactly this package
# and the options are
#   no=REGEX      leave out modules whose name matches, e.g. no=nf_tables|nft_.*
#   cgroup=MODE   v2 (default, v1 controllers off), v1, hybrid or none
#   smp=N         virtual CPUs (default 1; more still share one host core)
#   append=WORD   one more kernel command line word (repeatable)
#   name=LABEL    name in the report and of the log file
#
# Needs qemu-system-x86, busybox-static, cpio, xz-utils, zstd, lz4 (older
# kernels boot slower without it), and apt with mirrors in reach for the first
# run; not root. Exit status: 0 when no kernel failed, 1 when one did, 2 when the
# run could not be set up.
set -euo pipefail

die() { echo "boot.sh: $*" >&2; exit 2; }

payload='' logs=$PWD/logs limit=120 jobs=1 accel=tcg mem=512
cache=$(dirname "$0")/../../target/kernels
update='' offline='' only_download='' interactive=''
tools=() files=()
while getopts p:t:f:l:c:T:j:a:m:undih o; do
  case $o in
    p) payload=$OPTARG ;;
    t) tools+=("$(command -v -- "$OPTARG")") || die "no such program: $OPTARG" ;;
    f) files+=("$OPTARG") ;;
    l) logs=$OPTARG ;; c) cache=$OPTARG ;; T) limit=$OPTARG ;;
    j) jobs=$OPTARG ;; a) accel=$OPTARG ;; m) mem=$OPTARG ;;
    u) update=1 ;; n) offline=1 ;; d) only_download=1 ;; i) interactive=1 ;;
    h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
(($#)) || die "no kernel given (-h for help)"
[[ $only_download || -x $payload/test.sh ]] || die "-p: no executable test.sh in '$payload'"
for c in apt-get dpkg-deb cpio xz zstd qemu-system-x86_64; do
  command -v "$c" >/dev/null || die "$c is not installed"
done
busybox=$(command -v busybox) || die "busybox is not installed"
# Not by grep -q: it leaves at the first match, and what writes into the pipe fails then.
if ldd "$busybox" >/dev/null 2>&1 || ! "$busybox" --list | grep -x depmod >/dev/null; then
  die "$busybox is not the one of busybox-static"
fi
mkdir -p "$cache/kernels" "$cache/choice" "$logs"
cache=$(realpath "$cache") logs=$(realpath "$logs")
work=$(mktemp -d "${TMPDIR:-/tmp}/boot.XXXXXX")
trap 'kill $(jobs -rp) 2>/dev/null || true; wait; rm -rf "$work" "$cache"/apt/*/*.bin' EXIT
trap 'echo "boot.sh: failed at line $LINENO" >&2' ERR
trap 'exit 130' INT TERM

# ---- packages ---------------------------------------------------------------

# The mirrors that this system's apt already uses.
mirror() { # suite pattern
  { cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
      sed -n 's/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\) \([^ ]*\) .*/\2 \3/p'
    awk '/^URIs:/ {u = $2} /^Suites:/ {for (i = 2; i <= NF; i++) print u, $i}' /etc/apt/sources.list.d/*.sources 2>/dev/null
  } | awk -v re="$1" '$2 ~ re && !got {print $1; got = 1}'
}
KM_DEBIAN=${KM_DEBIAN:-$(mirror '^[a-z]+$')}
KM_DEBIAN_SECURITY=${KM_DEBIAN_SECURITY:-$(mirror '-security$')}
KM_DEBIAN_SUITES=${KM_DEBIAN_SUITES:-bullseye bookworm bookworm-backports trixie trixie-backports}
KM_DEBIAN_SECURITY_SUITES=${KM_DEBIAN_SECURITY_SUITES:-bullseye-security bookworm-security trixie-security}

# An apt of its own under the cache: the system's lists are not touched.
apt_for() { # distro
  local d=$cache/apt/$1
  APT=(-qq -o Dir::State="$d" -o Dir::State::lists="$d/lists" -o Dir::State::status="$d/status"
    -o Dir::Cache="$d" -o Dir::Cache::pkgcache=pkgcache.bin -o Dir::Cache::srcpkgcache=src.bin
    -o Dir::Etc::sourcelist="$d/sources.list" -o Dir::Etc::sourceparts=/dev/null
    -o Dir::Etc::preferencesparts=/dev/null -o APT::Architecture=amd64
    -o APT::Architectures=amd64 -o Acquire::GzipIndexes=true -o APT::Sandbox::User="$(id -un)" -o Acquire::Languages=none
    -o Acquire::Retries=3 -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
    -o Acquire::IndexTargets::deb::CNF::DefaultEnabled=false)
}

# Fetches the lists once a run, and only when a kernel has to be looked for.
declare -A updated
apt_ready() { # distro
  local d=$cache/apt/$1 s k=/usr/share/keyrings/debian-archive-keyring.gpg
  apt_for "$1"
  [[ ${updated[$1]:-} ]] && return
  [[ $offline ]] && return 1
  mkdir -p "$d/lists/partial" "$d/archives/partial"
  touch "$d/status"
  case $1 in
    debian)
      for s in $KM_DEBIAN_SUITES; do echo "deb [signed-by=$k] $KM_DEBIAN $s main"; done
      for s in $KM_DEBIAN_SECURITY_SUITES; do echo "deb [signed-by=$k] $KM_DEBIAN_SECURITY $s main"; done
      ;;
  esac >"$d/sources.list"
  # A suite may be gone from a mirror: what is missing then will be said by name.
  apt-get "${APT[@]}" update >&2 || true
  updated[$1]=1
}

# The packages an image is split into (Debian, since 6.19).
# One that the archive lacks is in <>.
parts() { # package
  apt-cache "${APT[@]}" depends --no-recommends --no-suggests "$1" |
    awk -v base="linux-base-${1#linux-image-}" \
      '$1 == "Depends:" && ($2 ~ /^<?linux-(binary|modules)-/ || $2 == base) {print $2}'
}

# Sets $distro and $pkg for a VERSION.
choose() { # version
  local want=$1 flavour re kept=$cache/choice/$1
  if [[ $want == *:linux-image-* ]]; then distro=${want%%:*} pkg=${want#*:}; return; fi
  if [[ -s $kept && ! $update ]]; then read -r distro pkg <"$kept"; return; fi
  for distro in ${KM_DISTROS:-debian}; do
    [[ $want == *:* && $want != "$distro":* ]] && continue
    apt_ready "$distro" || continue
    flavour=cloud-amd64
    re=${want#*:} re=${re//./\\.}
    [[ $re != newest ]] || re='[0-9]+'
    for pkg in $(apt-cache "${APT[@]}" search --names-only "^linux-image-$re([.+-].*)?-$flavour\$" |
      awk '$1 ~ /^linux-image-[0-9]+\.[0-9]+\.[0-9]/ {print $1}' | sort -rV); do
      [[ $(parts "$pkg") == *'<'* ]] && continue # backports keep images whose modules are gone
      echo "$distro $pkg" >"$kept"
      return
    done
  done
  return 1
}

# Unpacks a kernel into the cache: vmlinuz, vmlinux when it can be had, config,
# and the modules a network plugin may need, uncompressed.
fetch() { # distro package -> $cache/kernels/<package>
  local distro=$1 pkg=$2 dir=$cache/kernels/$2 d rel tree mod want=()
  [[ -e $dir/ok ]] && return
  apt_ready "$distro" || return 1
  rm -rf "$dir" "$work/deb"
  mkdir -p "$dir" "$work/deb" "$work/deb/x"
  mapfile -t want < <(echo "$pkg"; parts "$pkg")
  (cd "$work/deb" && apt-get "${APT[@]}" download "${want[@]}") || return 1
  for d in "$work"/deb/*.deb; do
    dpkg-deb --fsys-tarfile "$d" | tar -x -C "$work/deb/x" --exclude='./usr/share/*' --exclude='*/drivers/[!n]*' \
      --exclude='*/drivers/net/ethernet' --exclude='*/drivers/net/wireless' --exclude='*/sound' || return 1
  done
  (cd "$work/deb" && sha256sum ./*.deb) >"$dir/sha256"
  tree=$(echo "$work"/deb/x/usr/lib/modules/*/ "$work"/deb/x/lib/modules/*/ | tr ' ' '\n' | grep -v '\*' | sed -n 1p)
  [[ -d $tree/kernel ]] || { echo "boot.sh: no modules in ${want[*]}" >&2; return 1; }
  cp "$work"/deb/x/boot/vmlinuz-* "$dir/vmlinuz" 2>/dev/null || cp "$tree/vmlinuz" "$dir/vmlinuz" || return 1
  cp "$work"/deb/x/boot/config-* "$dir/config" 2>/dev/null || cp "$tree/config" "$dir/config" 2>/dev/null || true
  rel=$(basename "$tree") mod=$work/deb/m/usr/lib/modules/$rel
  mkdir -p "$mod/kernel/drivers" "$mod/kernel/fs"
  cp "$tree"/modules.{order,builtin,builtin.modinfo} "$mod/" 2>/dev/null || true
  for d in net lib crypto arch drivers/net fs/overlayfs fs/fuse; do
    [[ -d $tree/kernel/$d ]] && cp -r "$tree/kernel/$d" "$mod/kernel/$d"
  done
  find "$mod" -name '*.ko.xz' -exec xz -d {} +
  find "$mod" -name '*.ko.zst' -exec zstd -q -d --rm {} +
  pack_modules "$work/deb/m" "$rel" "$dir/modules.cpio" || return 1
  if unpack_vmlinux "$dir/vmlinuz" "$dir/vmlinux"; then rm "$dir/vmlinuz"; else rm -f "$dir/vmlinux"; fi
  echo "$rel" >"$dir/release"
  rm -rf "$work/deb"
  touch "$dir/ok"
}

# The compressed ELF inside a bzImage; booting that (PVH) skips the guest's own
# decompression, one to two seconds under TCG.
unpack_vmlinux() { # bzImage out
  local magic tool at
  for magic in '\x28\xb5\x2f\xfd zstd' '\x02\x21\x4c\x18 lz4' '\xfd7zXZ\x00 xz' '\x1f\x8b\x08 gzip'; do
    tool=${magic##* }
    for at in $(LC_ALL=C grep -obUaP "${magic% *}" "$1" | cut -d: -f1 | head -n 4); do
      tail -c +$((at + 1)) "$1" | "$tool" -dc >"$2" 2>/dev/null || true
      # note type 18 of Xen is the PVH entry point
      [[ $(head -c 4 "$2" | tail -c 3) == ELF ]] && grep -q '^CONFIG_PVH=y' "${1%/*}/config" && return
    done
  done
  return 1
}

# ---- initramfs --------------------------------------------------------------

# Copies a file to the same path below root, and the libraries it needs.
ship() { # root file
  install -D -m 755 "$(realpath "$2")" "$1$(realpath -s "$2")"
  needs "$1" "$2"
}
needs() { # root elf...
  local root=$1 lib
  { ldd "${@:2}" 2>/dev/null || true; } | sed -n 's/^\t\(.* => \)\{0,1\}\(\/[^ ]*\) (0x.*/\2/p' | sort -u | while read -r lib; do
    [[ -e $root$lib ]] || install -D -m 755 "$(realpath "$lib")" "$root$lib"
  done
}

skeleton() { # root
  mkdir -p "$1"/usr/{bin,sbin,lib,lib64,lib/busybox} "$1"/{dev,proc,sys,run,tmp,etc,root,out,var}
  ln -s usr/bin usr/sbin usr/lib usr/lib64 "$1/"
  install -m 755 "$busybox" "$1/usr/lib/busybox/busybox"
  "$busybox" --list | while read -r a; do
    [[ $a == busybox ]] || ln -s busybox "$1/usr/lib/busybox/$a"
  done
  ln -s ../lib/busybox/busybox "$1/usr/sbin/modprobe" # the kernel calls it by path
  # Debian's busybox runs its own applets before anything on PATH, so whatever
  # starts other programs has to be the host's.
  for f in env timeout xargs find nsenter unshare setsid nohup nice chroot; do
    ship "$1" "$(command -v $f)"
  done
  ship "$1" "$(command -v dash)"
  ln -sf dash "$1/usr/bin/sh"
  echo 'root:x:0:0:root:/root:/bin/sh' >"$1/etc/passwd"
  echo 'root:x:0:' >"$1/etc/group"
  printf '127.0.0.1 localhost\n::1 localhost\n' >"$1/etc/hosts"
  for f in protocols services ethertypes iproute2; do
    [[ -e /etc/$f ]] && cp -rL "/etc/$f" "$1/etc/$f"
  done
  cat >"$1/init" <<'INIT'
#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/usr/lib/busybox HOME=/root TERM=dumb
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /dev/net
mknod /dev/net/tun c 10 200 2>/dev/null
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t bpf bpf /sys/fs/bpf 2>/dev/null
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null
for w in $(cat /proc/cmdline); do case $w in KM_*=*) export "$w" ;; esac; done
v1() {
  mount -t tmpfs tmpfs /sys/fs/cgroup
  for c in $(awk '$1 !~ /^#/ && $4 == 1 {print $1}' /proc/cgroups); do
    mkdir "/sys/fs/cgroup/$c"
    mount -t cgroup -o "$c" "$c" "/sys/fs/cgroup/$c" || rmdir "/sys/fs/cgroup/$c"
  done
  mkdir /sys/fs/cgroup/systemd
  mount -t cgroup -o none,name=systemd systemd /sys/fs/cgroup/systemd
}
case $KM_CGROUP in
  v2) mount -t cgroup2 cgroup2 /sys/fs/cgroup ;;
  v1) v1 ;;
  hybrid) v1; mkdir /sys/fs/cgroup/unified; mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified ;;
esac
ip link set lo up
hostname guest
cd /payload
if [ "$KM_INTERACTIVE" ]; then
  setsid -c sh <>/dev/ttyS0 >&0 2>&1
  rc=0
else
  ./test.sh </dev/null
  rc=$?
fi
stty -F /dev/ttyS2 raw
[ "$(ls -A /out)" ] && tar -C /out -czf - . >/dev/ttyS2
echo "rc=$rc" >/dev/ttyS1
sync
reboot -f
INIT
  chmod 755 "$1/init"
}

userland() { # out.cpio
  local root=$work/root f elf
  skeleton "$root"
  cp -rL "$payload" "$root/payload"
  for f in ${tools[@]+"${tools[@]}"}; do ship "$root" "$f"; done
  for f in ${files[@]+"${files[@]}"}; do
    mkdir -p "$root$(dirname "$(realpath -s "$f")")"
    cp -rL "$f" "$root$(realpath -s "$f")"
  done
  mapfile -d '' elf < <(find "$root/payload" ${files[@]+"${files[@]/#/$root}"} \
    -type f \( -perm -100 -o -name '*.so*' \) -print0)
  needs "$root" "${elf[@]}"
  (cd "$root" && find . -print0 | cpio -0 -o -H newc -R 0:0 --quiet) >"$1"
  rm -rf "$root"
}

# The modules of a kernel without those whose name matches.
modules() { # kerneldir regex out.cpio
  local root f m
  if [[ ! $2 ]]; then cp "$1/modules.cpio" "$3"; return; fi
  root=$(mktemp -d "$work/mod.XXXXXX")
  (cd "$root" && cpio -id --quiet) <"$1/modules.cpio"
  while IFS= read -r -d '' f; do
    m=${f##*/} m=${m%.ko}
    if [[ ${m//-/_} =~ ^($2)$ ]]; then rm "$f"; fi
  done < <(find "$root" -name '*.ko' -print0)
  pack_modules "$root" "$(<"$1/release")" "$3"
}
pack_modules() { # root release out.cpio; takes the root away
  ln -s usr/lib "$1/lib"
  ln -s "$2" "$1/usr/lib/modules/0.0.0" # its depmod takes x.y.z only, not 7.3-amd64
  "$busybox" depmod -b "$1" 0.0.0
  rm "$1/lib" "$1/usr/lib/modules/0.0.0"
  (cd "$1" && find usr -print0 | cpio -0 -o -H newc -R 0:0 --quiet) >"$3"
  rm -rf "$1"
}

# ---- boot -------------------------------------------------------------------

boot() { # label kerneldir regex cgroup smp append
  local label=$1 dir=$2 base=$work/$1 log=$logs/$1.log kernel t1 rc word cmdline serial=() qemu
  modules "$dir" "$3" "$base.mod"
  cat "$work/user.cpio" "$base.mod" >"$base.initrd"
  rm "$base.mod"
  kernel=$dir/vmlinux
  [[ -s $kernel ]] || kernel=$dir/vmlinuz
  cmdline="console=ttyS0 quiet loglevel=5 reboot=t panic=-1 random.trust_cpu=on mitigations=off init_on_alloc=0 KM_KERNEL=$(<"$dir/release") KM_LABEL=$label KM_CGROUP=$4"
  [[ $4 == v2 ]] && cmdline+=" cgroup_no_v1=all"
  cmdline+=$6
  if [[ $interactive ]]; then
    serial=(-serial mon:stdio) cmdline+=" KM_INTERACTIVE=1"
  else
    serial=(-serial "file:$log")
  fi
  rm -rf "$base.rc" "$logs/$label.out" "$log"
  rc=0
  t1=$(date +%s%N)
  qemu=(timeout -k 5 "$limit" nice -n 10 qemu-system-x86_64 -M pc -smp "$5" -m "$mem"
    -nodefaults -no-user-config -nic none -display none -no-reboot
    "${serial[@]}" -serial "file:$base.rc" -serial "file:$base.tgz"
    -kernel "$kernel" -initrd "$base.initrd" -append "$cmdline")
  case $accel in
    # Emulated, string instructions go byte by byte: without these the kernel uses others.
    tcg) qemu+=(-accel "tcg,thread=single,tb-size=128" -cpu "max,-erms,-fsrm,-la57") ;;
    *) qemu+=(-accel "$accel" -cpu host) ;;
  esac
  if [[ $interactive ]]; then
    "${qemu[@]:4}" || rc=$? # without the limit
  else
    "${qemu[@]}" 2>"$base.err" &
    qemu_pid=$!
    wait "$qemu_pid" || rc=$?
  fi
  rm -f "$base.initrd"
  if [[ -s $base.tgz ]]; then
    mkdir -p "$logs/$label.out"
    tar -xmzf "$base.tgz" -C "$logs/$label.out" || true
  fi
  word=$(sed -n 's/^rc=\([0-9]*\).*/\1/p' "$base.rc" 2>/dev/null || true)
  case $rc:$word in
    *:0) word=PASS ;;
    *:77) word=SKIP ;;
    *:[0-9]*) word="FAIL ($word)" ;;
    124:* | 137:*) word="FAIL (limit of ${limit}s)" ;;
    0:*) word="FAIL (kernel stopped, no result)" ;;
    *) word="FAIL (qemu: $rc $(head -c 200 "$base.err" 2>/dev/null))" ;;
  esac
  t1=$((($(date +%s%N) - t1) / 100000000))
  printf '%-26s %-28s %-6s %3d.%ds  %s\n' "$label" "$(<"$dir/release")" "$word" $((t1 / 10)) $((t1 % 10)) "$log"
  [[ $word == PASS || $word == SKIP ]]
}

# ---- main -------------------------------------------------------------------

parse() { # VERSION[,OPTION...]
  local o part
  IFS=, read -r -a part <<<"$1"
  version=${part[0]} regex='' cgroup=v2 smp=1 append='' label=${1//[^A-Za-z0-9._+=-]/_}
  for o in "${part[@]:1}"; do
    case $o in
      no=*) regex=${o#no=} ;;
      cgroup=v1 | cgroup=v2 | cgroup=hybrid | cgroup=none) cgroup=${o#cgroup=} ;;
      smp=*) smp=${o#smp=} ;;
      append=*) append+=" ${o#append=}" ;;
      name=*) label=${o#name=} ;;
      *) die "$1: unknown option $o" ;;
    esac
  done
}

for spec; do parse "$spec"; done
[[ $only_download ]] || userland "$work/user.cpio"
for spec; do
  parse "$spec"
  if ! choose "$version" || ! fetch "$distro" "$pkg"; then
    printf '%-26s %-28s %s\n' "$label" - "FAIL (no package)"
    touch "$work/failed"
    continue
  fi
  job=("$label" "$cache/kernels/$pkg" "$regex" "$cgroup" "$smp" "$append")
  if [[ $only_download ]]; then echo "$label ${job[1]}"; continue; fi
  if [[ $interactive ]]; then boot "${job[@]}"; continue; fi
  while (($(jobs -rp | wc -l) >= jobs)); do wait -n || true; done
  {
    qemu_pid=''
    trap '[[ ! $qemu_pid ]] || kill "$qemu_pid"; exit 1' TERM
    boot "${job[@]}" || touch "$work/failed"
  } &
done
wait
if [[ -e $work/failed ]]; then exit 1; fi
