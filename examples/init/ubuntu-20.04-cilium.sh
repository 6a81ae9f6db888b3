#!/bin/sh
# Node init script for Ubuntu 20.04 (kernel 5.4) with Cilium in the chaining mode portmap, where the
# provider's image has only cilium-cni and loopback in /opt/cni/bin: the case of Naver Cloud's NKS.
# Cilium writes the list itself, so that only the binary has to be there, before the first pod. It may
# be run again at any time.
set -eu

url=${PORTMAP_URL:-https://example.com/portmap-0.1.0-x86_64.tar.gz}
sha256=${PORTMAP_SHA256:-0000000000000000000000000000000000000000000000000000000000000000}

dir=$(mktemp -d)
trap 'rm -rf -- "$dir"' EXIT
curl -fsSL --retry 5 -o "$dir/portmap.tar.gz" -- "$url"
printf '%s  %s\n' "$sha256" "$dir/portmap.tar.gz" | sha256sum -c -
tar -xzf "$dir/portmap.tar.gz" -C "$dir" --strip-components=1
sh "$dir/install.sh" --binary "$dir/portmap" --dest /opt/cni/bin
