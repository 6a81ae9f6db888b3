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

#if LAYOUT >= 1
static __always_inline void stamp(struct flow *flow)
{
	__u32 t = now();

	/* Written once a second: the line is shared by all CPUs. */
	if (flow->last != t)
		flow->last = t;
}

/* Seconds without a packet. Less than 0 if another CPU has stamped it since this one looked. */
static __always_inline __s32 age(const struct flow *flow)
{
	return now() - flow->last;
}
#else
static __always_inline void stamp(struct flow *flow)
{
	(void)flow;
}

static __always_inline __s32 age(const struct flow *flow)
{
	(void)flow;
	return 0;
}
#endif

/* What a flow begins with. UDP's first packet may be its only one. */
static __always_inline __u32 first_flags(const struct packet *p)
{
	return p->opens || p->protocol == IPPROTO_UDP ? 0 : FLOW_GOES_ON;
}

/* A packet of the flow. `from_peer`: anybody may have sent it. Without branches, for the verifier. */
static __always_inline void touch(struct flow *flow, const struct packet *p, int from_peer)
{
	__u32 before = flow->flags, flags = before;

	/* An ICMP error says nothing about whether the flow goes on. */
	if (p->icmp)
		return;
	stamp(flow);
	if (from_peer)
		flags &= ~FLOW_PEER_CLOSED;
	flags |= p->closes * (from_peer ? FLOW_PEER_CLOSED : FLOW_CLOSED);
	/* A new connection in the place of a closed one. */
	flags &= ~((p->opens & flags / FLOW_CLOSED) *
		   (FLOW_CLOSED | FLOW_PEER_CLOSED | FLOW_GOES_ON));
	if (from_peer)
		flags |= (p->opens ^ 1) * FLOW_GOES_ON;
	if (flags != before)
		flow->flags = flags;
}

/*
 * Seconds to wait for another packet, longer than any conntrack would: a day for streams, 5 minutes for
 * UDP; while only the first packet has come, 2 minutes and half a one. Without branches, too.
 */
static __always_inline __s32 patience(const struct flow *flow, __u8 protocol)
{
	__u64 udp = protocol ^ IPPROTO_UDP, goes_on = flow->flags / FLOW_GOES_ON & 1;

	WHOLE(udp);
	WHOLE(goes_on);
	udp = (udp - 1) >> 63;
	WHOLE(udp);
	return 120 + goes_on * (86400 - 120) - udp * (120 - 30 + goes_on * (86400 - 120 - 300 + 30));
}

static __always_inline int idle(const struct flow *flow, __u8 protocol)
{
	return age(flow) > patience(flow, protocol);
}

/* Whether the packet may take the entry over. */
static __always_inline int replaceable(const struct flow *flow, const struct packet *p)
{
	return (flow->flags & FLOW_CLOSED && p->opens) || idle(flow, p->protocol);
}

/* How long a closed connection may still have packets under way (TIME_WAIT of Linux). */
#define REST 60

/*
 * Whether nobody misses the entry: not even the other half of a connection that is half closed. One that
 * was refused has none.
 */
static __always_inline int is_over(const struct flow *flow, __u8 protocol)
{
	__s32 limit = patience(flow, protocol);
	__s64 closed = flow->flags / FLOW_CLOSED & 1, goes_on = flow->flags / FLOW_GOES_ON & 1;

	WHOLE(closed);
	WHOLE(goes_on);
	return age(flow) > limit - closed * (limit + 1 - goes_on * (REST + 1));
}

/* Whether the flow is that of this original tuple. */
static __always_inline int remapped_from(const struct flow *flow, const struct remap_key *from)
{
	return flow->peer_port == from->peer_port && flow->host_port == from->host_port &&
	       same_addr(&flow->peer, &from->peer) && same_addr(&flow->host, &from->host);
}

/* Ports that Linux gives to sockets by itself, both included. */
static __always_inline void ephemeral_ports(__u32 *first, __u32 *last, __u64 unknown)
{
	struct config *config = find_config();

	*first = 32768;
	*last = 60999;
	if (config && config->ephemeral_last) {
		*first = config->ephemeral_first;
		*last = config->ephemeral_last;
	}
	FORGET(*first, unknown);
	FORGET(*last, unknown);
}

static __always_inline int is_ephemeral(__be16 port)
{
	__u32 number = bpf_ntohs(port), first, last;

	ephemeral_ports(&first, &last, port);
	return number >= first && number <= last;
}

static __always_inline __u32 hash_of(const struct remap_key *key)
{
	const word *words = (const void *)key;
	__u64 hash = 0;

#pragma clang loop unroll(full)
	for (unsigned int i = 0; i < sizeof(*key) / sizeof(*words); i++) {
		hash = (hash ^ words[i]) * 0x9e3779b97f4a7c15;
		hash ^= hash >> 32;
	}
	return hash;
}

#define ATTEMPTS 6
/* The first of them, which follow from the peer and what it called. */
#define HASHED 2

/*
 * Finds a port for a peer whose own may not be used towards the pod: fills key->peer_port, and
 * remembers the flow and the choice. `own`: the peer's own port will do if it is free. Others are
 * taken from outside the range that sockets get by themselves, so that the peer (or the node, for
 * masqueraded flows) does not come upon them later.
 *
 * A flow whose choice was evicted goes on with its port, if that is one of the first. The others are
 * random, lest somebody take them all in advance.
 *
 * 0, 1 if the flow was there, or -1 without a port.
 */
static __always_inline int choose_port(struct flow_key *key, struct flow *flow,
				       const struct remap_key *from, const struct packet *p,
				       __u32 own)
{
	__u32 hash = hash_of(from), first, last, there = 0;
	__u64 update = BPF_NOEXIST;
	struct remap to = {};

	ephemeral_ports(&first, &last, hash);
	FORGET(own, hash);
	FORGET(flow->flags, hash);
#pragma clang loop unroll(disable)
	for (__u64 i = 0; i < ATTEMPTS; i++) {
		struct flow *taken;
		__u32 port;

		/* A connection that only begins has no port yet. */
		if (to.port && (p->opens || i >= HASHED))
			break;
		hash = i < HASHED ? hash * 1664525 + 1013904223 : bpf_get_prandom_u32();
		port = last + 1 + ((__u64)hash * (64512 - (last - first + 1)) >> 32);
		/* Below 1024 are servers. */
		if (port > 65535)
			port -= 64512;
		key->peer_port = i == 0 && own ? from->peer_port : bpf_htons(port);
		taken = bpf_map_lookup_elem(&pm_flows, key);
		if (i < HASHED && taken && remapped_from(taken, from)) {
			touch(taken, p, 1);
			to.port = key->peer_port;
			there = 1;
			break;
		}
		if (to.port)
			continue;
		if (taken && !is_over(taken, key->protocol)) {
			if (i < ATTEMPTS - 2 ||
			    !(taken->flags & FLOW_CLOSED ||
			      (taken->flags & FLOW_PEER_CLOSED && age(taken) > REST)))
				continue;
		}
		update = taken ? BPF_ANY : BPF_NOEXIST;
		FORGET(update, hash);
		to.port = key->peer_port;
	}
	key->peer_port = to.port;
	/* Another CPU may have taken it meanwhile. */
	if (!to.port || (!there && bpf_map_update_elem(&pm_flows, key, flow, update))) {
		count(REASON_DROP_NO_PORT);
		return -1;
	}
	bpf_map_update_elem(&pm_remaps, from, &to, BPF_ANY);
	return there;
}

/*
 * The flow of a peer that had its port replaced before; key->peer_port becomes that port. Entries
 * of the two maps are evicted on their own, so that they have to agree.
 */
static __always_inline struct flow *find_remapped(struct flow_key *key,
						  const struct remap_key *from)
{
	struct remap *remap = bpf_map_lookup_elem(&pm_remaps, from);
	struct flow *flow;

	if (!remap)
		return 0;
	key->peer_port = remap->port;
	flow = bpf_map_lookup_elem(&pm_flows, key);
	return flow && remapped_from(flow, from) ? flow : 0;
}

/*
 * Whether to drop what a pod sends by a connection that is not known: its sender will send it again, and
 * the peer would reset a connection that gets answers from an address which it has not called.
 */
static __always_inline int held(const struct packet *p)
{
	const struct tuple *t = &p->tuple;
	struct claim_key self __attribute__((aligned(8))) = {
		.addr = t->source, .port = t->source_port, .protocol = p->protocol,
	};
	struct config *config;
	struct claim *claim;

	if (p->protocol != IPPROTO_TCP || p->icmp)
		return 0;
	config = find_config();
	if (!config || !is_holding(config))
		return 0;
	claim = bpf_map_lookup_elem(&pm_claims, &self);
	if (!claim || !(claim->flags & CLAIM_SELF))
		return 0;
	count(REASON_HELD);
	return 1;
}

/*
 * A connection begins. The plugin looks for flows only where there were any, also of a pod's own entry. What
 * is counted of a claim has a value for each CPU, which the kernel takes 15 us to make (6.18): it is made when
 * there is something to count. Where there is no memory, the next connection is the first one that counts.
 */
static __always_inline void count_connection(struct claim *claim, const struct claim_key *key)
{
	struct traffic *traffic;

	if (!claim->used)
		claim->used = 1;
	if (claim->flags & CLAIM_SELF)
		return;
	traffic = bpf_map_lookup_elem(&pm_traffic, key);
	if (!traffic) {
		struct traffic none = {};

		bpf_map_update_elem(&pm_traffic, key, &none, BPF_NOEXIST);
		traffic = bpf_map_lookup_elem(&pm_traffic, key);
	}
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
	struct claim_key key __attribute__((aligned(8))) = {
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
