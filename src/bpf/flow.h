/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* Flows: their age, the ports that stand for others, and the counters of their claims. */
#ifndef PORTMAP_FLOW_H
#define PORTMAP_FLOW_H

#include "packet.h"

/* What becomes of a packet. */
enum verdict {
	PASS,		/* as it is */
	DROP,
	CHANGE,		/* to another tuple */
	BOUNCE,		/* the same, and back to the link that it came from */
};

static __always_inline __u32 now(void)
{
	return bpf_ktime_get_ns() >> 30;
}

#if LAYOUT >= 1
static __always_inline void stamp(struct flow *flow)
{
	__u32 t = now();

	/* Written once a second: the line is shared by all CPUs. */
	if (flow->last != t)
		flow->last = t;
}

static __always_inline __u32 age(const struct flow *flow)
{
	return now() - flow->last;
}
#else
static __always_inline void stamp(struct flow *flow)
{
	(void)flow;
}

static __always_inline __u32 age(const struct flow *flow)
{
	(void)flow;
	return 0;
}
#endif

static __always_inline void touch(struct flow *flow, const struct packet *p)
{
	/* An ICMP error says nothing about whether the flow goes on. */
	if (p->icmp)
		return;
	stamp(flow);
	if (p->closes)
		flow->flags |= FLOW_CLOSED;
	else if (p->opens && flow->flags & FLOW_CLOSED)
		flow->flags &= ~FLOW_CLOSED;
}

/* Longer without a packet than any conntrack would have waited: a day for streams, 5 minutes. */
static __always_inline int idle(const struct flow *flow, __u8 protocol)
{
	return age(flow) > (protocol == IPPROTO_UDP ? 300 : 86400);
}

/* Whether the packet may take the entry over. */
static __always_inline int replaceable(const struct flow *flow, const struct packet *p)
{
	return (flow->flags & FLOW_CLOSED && p->opens) || idle(flow, p->protocol);
}

/* Whether the flow is that of this original tuple. */
static __always_inline int remapped_from(const struct flow *flow, const struct tuple *t)
{
	return flow->peer_port == t->source_port && flow->host_port == t->destination_port &&
	       same_addr(&flow->peer, &t->source) && same_addr(&flow->host, &t->destination);
}

/* Ports that Linux gives to sockets by itself (ip_local_port_range). */
static __always_inline int is_ephemeral(__be16 port)
{
	__u16 number = bpf_ntohs(port);

	return number >= 32768 && number < 61000;
}

#define ATTEMPTS 8

/*
 * Finds a port for a peer whose own may not be used towards the pod: fills key->peer_port, and
 * remembers the flow and the choice. `own`: the peer's own port will do if it is free. Others are
 * taken from outside the range that sockets get by themselves, so that the peer (or the node, for
 * masqueraded flows) does not come upon them later.
 */
static __always_inline int choose_port(struct flow_key *key, struct flow *flow,
				       const struct remap_key *from, __u32 own)
{
	struct remap to = {};
	__u32 found = 0;

#pragma clang loop unroll(disable)
	for (__u64 i = 0; i < ATTEMPTS; i++) {
		__u32 number = bpf_get_prandom_u32();
		struct flow *taken;

		number = i < ATTEMPTS / 2 ? 61000 + number % 4536 : 1024 + number % 31744;
		key->peer_port = i == 0 && own ? from->peer_port : bpf_htons(number);
		taken = bpf_map_lookup_elem(&pm_flows, key);
		if (!taken || taken->flags & FLOW_CLOSED || idle(taken, key->protocol)) {
			found = 1;
			break;
		}
	}
	if (!found || bpf_map_update_elem(&pm_flows, key, flow, BPF_ANY)) {
		count(REASON_DROP_NO_PORT);
		return -1;
	}
	to.port = key->peer_port;
	bpf_map_update_elem(&pm_remaps, from, &to, BPF_ANY);
	return 0;
}

/*
 * The flow of a peer that had its port replaced before; key->peer_port becomes that port. Entries
 * of the two maps are evicted on their own, so that they have to agree.
 */
static __always_inline struct flow *find_remapped(struct flow_key *key,
						  const struct remap_key *from,
						  const struct tuple *original)
{
	struct remap *remap = bpf_map_lookup_elem(&pm_remaps, from);
	struct flow *flow;

	if (!remap)
		return 0;
	key->peer_port = remap->port;
	flow = bpf_map_lookup_elem(&pm_flows, key);
	return flow && remapped_from(flow, original) ? flow : 0;
}

/* Also of a pod's own entry: the plugin looks for flows only where there were any. */
static __always_inline void count_connection(const struct claim_key *key)
{
	struct traffic *traffic = bpf_map_lookup_elem(&pm_traffic, key);

	if (traffic)
		traffic->connections++;
}

static __always_inline void count_in(const struct claim_key *key, const struct packet *p)
{
	struct traffic *traffic = bpf_map_lookup_elem(&pm_traffic, key);

	if (!traffic)
		return;
	traffic->packets_in++;
	traffic->bytes_in += p->end - p->network;
}

static __always_inline void count_out(const struct flow *flow, const struct packet *p)
{
	struct claim_key key = {
		.addr = flow->host, .port = flow->host_port, .protocol = p->protocol,
	};
	struct traffic *traffic;

	if (flow->flags & FLOW_ANY)
		set_any(&key.addr);
	traffic = bpf_map_lookup_elem(&pm_traffic, &key);
	if (!traffic)
		return;
	traffic->packets_out++;
	traffic->bytes_out += p->end - p->network;
}

#endif
