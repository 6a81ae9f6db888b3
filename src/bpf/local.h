/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* Which destinations a claim takes: only the node's own, also of those with a hostIP. */
#ifndef PORTMAP_LOCAL_H
#define PORTMAP_LOCAL_H

#include "packet.h"

#define AF_INET 2
#define AF_INET6 10
#define LOOPBACK_IFINDEX 1

/*
 * Never taken from the wire, whatever is claimed: 0/8, 127/8 (a claim of 127.0.0.1 is for the
 * node's own sockets), 169.254/16, multicast and what lies above it with 255.255.255.255; fe80::/10
 * and ff00::/8. IPv6's ::/64 does not get as far as here.
 */
static __always_inline int is_reserved(const struct addr *a)
{
	__u32 first = bpf_ntohl(a->w[0]), v4 = bpf_ntohl(a->w[3]);

	if (is_v4(a))
		return v4 >= 0xe0000000 || v4 >> 24 == 127 || v4 >> 24 == 0 ||
		       v4 >> 16 == 0xa9fe;
	return first >> 22 == 0xfe800000 >> 22 || first >> 24 == 0xff;
}

static __always_inline int listed_only(void)
{
	struct config *config = find_config();

	return config && config->flags & CONFIG_LISTED_ONLY;
}

/*
 * Whether the destination is the node itself. bpf_fib_lookup's NOT_FWDED means "local", "broadcast"
 * and "no route" alike. From an uplink, a packet to an address without a route is not to be
 * expected; from a pod it is, and must not be taken. Asked of the plugin's list alone, an address
 * that moved to another node would stay taken until the next call.
 */
static __always_inline int is_local(struct __sk_buff *skb, const struct packet *p, int from_pod)
{
	const struct tuple *t = &p->tuple;
	__u32 *listed = bpf_map_lookup_elem(&pm_addresses, &t->destination);
	struct bpf_fib_lookup fib = {};
	long result;

	if (listed ? !*listed : (from_pod || listed_only()))
		return 0;
	fib.ifindex = skb->ifindex;
	fib.l4_protocol = p->protocol;
	if (is_v4(&t->destination)) {
		fib.family = AF_INET;
		fib.ipv4_src = t->source.w[3];
		fib.ipv4_dst = t->destination.w[3];
	} else {
		fib.family = AF_INET6;
		__builtin_memcpy(fib.ipv6_src, &t->source, sizeof(t->source));
		__builtin_memcpy(fib.ipv6_dst, &t->destination, sizeof(t->destination));
	}
	result = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);
	/* Forwarding is off for this device alone: ask as another one. */
	if (result == BPF_FIB_LKUP_RET_FWD_DISABLED) {
		fib.ifindex = LOOPBACK_IFINDEX;
		result = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);
	}
	return result == BPF_FIB_LKUP_RET_NOT_FWDED ||
	       (result == BPF_FIB_LKUP_RET_FWD_DISABLED && listed);
}

#endif
