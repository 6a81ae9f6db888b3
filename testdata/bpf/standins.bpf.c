/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Programs for tests that do with packets what Cilium's do (its names, its verdicts), and nothing
 * else. A packet that has a way is sent on past the node's stack, all others get TC_ACT_OK: that
 * ends a chain of programs, unlike TC_ACT_UNSPEC.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define MAP(name, kind, of, to, size)		\
	struct {				\
		__uint(type, kind);		\
		__type(key, of);		\
		__type(value, to);		\
		__uint(max_entries, size);	\
	} name SEC(".maps")

struct way_key {
	__be32 destination[4];	/* IPv4 as ::ffff:a.b.c.d */
	__u32 device;		/* that the packet came in by */
};

#define TO_NEIGHBOUR 1	/* bpf_redirect_neigh: out of a device, to whoever its routes say */
#define TO_PEER 2	/* bpf_redirect_peer: into the other end of a pod's link */

struct way {
	__u32 device;
	__u32 kind;
	__u8 destination[ETH_ALEN];
	__u8 source[ETH_ALEN];
};

MAP(cil_ways, BPF_MAP_TYPE_HASH, struct way_key, struct way, 64);
/* How often each has run: from_container, from_netdev, to_netdev, connect4. */
MAP(cil_runs, BPF_MAP_TYPE_ARRAY, __u32, __u64, 4);

static __always_inline void ran(__u32 program)
{
	__u64 *runs = bpf_map_lookup_elem(&cil_runs, &program);

	if (runs)
		__sync_fetch_and_add(runs, 1);
}

static __always_inline int send_on(struct __sk_buff *skb)
{
	struct way_key key = { .device = skb->ifindex };
	struct way *way;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		key.destination[2] = bpf_htonl(0xffff);
		if (bpf_skb_load_bytes(skb, ETH_HLEN + 16, &key.destination[3], 4))
			return TC_ACT_OK;
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		if (bpf_skb_load_bytes(skb, ETH_HLEN + 24, &key.destination, 16))
			return TC_ACT_OK;
	}
	way = bpf_map_lookup_elem(&cil_ways, &key);
	if (!way)
		return TC_ACT_OK;
	if (way->kind == TO_NEIGHBOUR)
		return bpf_redirect_neigh(way->device, 0, 0, 0);
	if (bpf_skb_store_bytes(skb, 0, way->destination, 2 * ETH_ALEN, 0))
		return TC_ACT_SHOT;
	return bpf_redirect_peer(way->device, 0);
}

SEC("classifier") int cil_from_container(struct __sk_buff *skb)
{
	ran(0);
	return send_on(skb);
}

SEC("classifier") int cil_from_netdev(struct __sk_buff *skb)
{
	ran(1);
	return send_on(skb);
}

SEC("classifier") int cil_to_netdev(struct __sk_buff *skb)
{
	(void)skb;
	ran(2);
	return TC_ACT_OK;
}

SEC("cgroup/connect4") int cil_sock4_connect(struct bpf_sock_addr *ctx)
{
	(void)ctx;
	ran(3);
	return 1;
}

char _license[] SEC("license") = "GPL";
