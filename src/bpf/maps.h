/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* The maps, and the few things that every program does with them. */
#ifndef PORTMAP_MAPS_H
#define PORTMAP_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "layout.h"

#define MAP(name, kind, of, to, size, flags)	\
	struct {				\
		__uint(type, kind);		\
		__type(key, of);		\
		__type(value, to);		\
		__uint(max_entries, size);	\
		__uint(map_flags, flags);	\
	} name SEC(".maps")

/* What is looked up. Not preallocated: most nodes have a few dozen. */
MAP(pm_claims, BPF_MAP_TYPE_HASH, struct claim_key, struct claim, 65536, BPF_F_NO_PREALLOC);
/*
 * Addresses of the node when the plugin ran last: 1. Value 0 is an address that bpf_fib_lookup does not
 * tell from one of the node's own: a broadcast address, or that of a Service.
 */
MAP(pm_addresses, BPF_MAP_TYPE_HASH, struct addr, __u32, 4096, BPF_F_NO_PREALLOC);
/*
 * One bit for each port (of any protocol) that is the hostPort of a claim or the containerPort of
 * a pod: word port >> 6, bit port & 63. Most packets need nothing else.
 */
MAP(pm_ports, BPF_MAP_TYPE_ARRAY, __u32, __u64, 1024, 0);
/* How many claims need the bit. The plugin's own: programs see bits only. */
MAP(pm_port_uses, BPF_MAP_TYPE_HASH, __u16, __u32, 65536, BPF_F_NO_PREALLOC);
MAP(pm_config, BPF_MAP_TYPE_ARRAY, __u32, struct config, 1, 0);

/*
 * What is remembered. LRU maps are preallocated, 16 to 20 MB for the flows. A flow that is evicted
 * comes back with the peer's next packet.
 */
MAP(pm_flows, BPF_MAP_TYPE_LRU_HASH, struct flow_key, struct flow, 131072, 0);
/* With masqAll, half of the flows have one. 7 MB. */
MAP(pm_remaps, BPF_MAP_TYPE_LRU_HASH, struct remap_key, struct remap, 65536, 0);
MAP(pm_fragments, BPF_MAP_TYPE_LRU_HASH, struct fragment_key, struct fragment, 16384, 0);
/* UDP sockets, which a DEL has to find; and those of TCP, which a node may have many more of. */
MAP(pm_sockets, BPF_MAP_TYPE_LRU_HASH, struct socket_key, struct socket_value, 16384, 0);
MAP(pm_streams, BPF_MAP_TYPE_LRU_HASH, struct socket_key, struct socket_value, 16384, 0);

/* What is counted: pm_traffic for claims that have had connections. */
MAP(pm_reasons, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, __u64, REASONS, 0);
MAP(pm_traffic, BPF_MAP_TYPE_PERCPU_HASH, struct claim_key, struct traffic, 65536,
    BPF_F_NO_PREALLOC);

/*
 * Makes the verifier forget what it knows of a number: it walks the code behind once for each set
 * of constants that it arrives with. `unknown` is anything that it does not know, such as a field
 * of the context.
 */
#define FORGET(number, unknown)					\
	do {							\
		__u64 _number = (number), _unknown = (unknown);	\
		asm volatile("%0 ^= %1\n%0 ^= %1"		\
			     : "+r"(_number) : "r"(_unknown));	\
		(number) = _number;				\
	} while (0)

/* Keeps the compiler from taking an expression apart into branches. */
#define WHOLE(number) asm volatile("" : "+r"(number))

static __always_inline void count(__u32 reason)
{
	__u64 *counter = bpf_map_lookup_elem(&pm_reasons, &reason);

	if (counter)
		*counter += 1;
}

static __always_inline struct config *find_config(void)
{
	__u32 only = 0;

	return bpf_map_lookup_elem(&pm_config, &only);
}

/* CLOCK_MONOTONIC in 2^30 ns. */
static __always_inline __u32 now(void)
{
	return bpf_ktime_get_ns() >> 30;
}

/* Whether another version's programs are being replaced (hold_until). */
static __always_inline int is_holding(const struct config *config)
{
	return config->hold_until && config->hold_until > now();
}

/* Whether there is no such claim: CONFIG_NO_*. */
static __always_inline int ruled_out(__u32 bit)
{
	struct config *config = find_config();

	return config && config->flags & bit;
}

/* Not zero: a claim or a pod has this port. */
static __always_inline __u64 port_known(__be16 port)
{
	__u32 number = bpf_ntohs(port);
	__u32 index = number >> 6;
	__u64 *word = bpf_map_lookup_elem(&pm_ports, &index);

	return word ? *word >> (number & 63) & 1 : 0;
}

/*
 * Half an address. All of them are aligned to 8 bytes, on the stack as well, where the verifier insists:
 * a load of 8 bytes that were stored 4 at a time has to wait until they are in the cache.
 */
typedef __u64 __attribute__((may_alias)) half;
/* Both ports, or a part of an address. */
typedef __u32 __attribute__((may_alias)) word;

#define V4_HALF ((__u64)bpf_htonl(0xffff))	/* little endian, like the object */

static __always_inline int same_addr(const struct addr *a, const struct addr *b)
{
	const half *one = (const void *)a, *other = (const void *)b;
	__u64 difference = (one[0] ^ other[0]) | (one[1] ^ other[1]);

	WHOLE(difference);
	return !difference;
}

static __always_inline void set_v4(struct addr *to, __be32 address)
{
	half *halves = (void *)to;

	halves[0] = 0;
	halves[1] = (__u64)address << 32 | V4_HALF;
}

static __always_inline int is_v4(const struct addr *a)
{
	const half *halves = (const void *)a;
	__u64 difference = halves[0] | (__u32)(halves[1] ^ V4_HALF);

	WHOLE(difference);
	return !difference;
}

/* Any address of the same family: 0.0.0.0 or ::. */
static __always_inline void set_any(struct addr *to)
{
	half *halves = (void *)to;

	halves[1] = is_v4(to) ? V4_HALF : 0;
	halves[0] = 0;
}

/*
 * The source of a pod's packets to itself, which nobody has: 192.0.0.8 (RFC 7600) and 100::8 (RFC 6666).
 */
#define DUMMY_V4 bpf_htonl(0xc0000008)
#define DUMMY_V6_FIRST bpf_htonl(0x01000000)

static __always_inline void set_dummy(struct addr *to)
{
	if (is_v4(to)) {
		set_v4(to, DUMMY_V4);
	} else {
		to->w[0] = DUMMY_V6_FIRST;
		to->w[1] = 0;
		to->w[2] = 0;
		to->w[3] = bpf_htonl(8);
	}
}

/*
 * The claim of an address and port: one of the address itself wins over one of any address.
 * `key` is left as that of the claim, *any says which it is.
 */
static __always_inline struct claim *find_claim(struct claim_key *key, __u32 *any)
{
	struct claim *claim = bpf_map_lookup_elem(&pm_claims, key);

	*any = 0;
	if (claim)
		return claim;
	*any = FLOW_ANY;
	set_any(&key->addr);
	return bpf_map_lookup_elem(&pm_claims, key);
}

#endif
