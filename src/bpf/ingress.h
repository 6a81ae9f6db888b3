/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* What comes from outside or from a pod. */
#ifndef PORTMAP_INGRESS_H
#define PORTMAP_INGRESS_H

#include "flow.h"
#include "local.h"

/* <asm-generic/errno-base.h> */
#define EEXIST 17

/* Whether the packet answers a connection that the node itself made from a hostPort's number. */
static __always_inline int is_node_flow(const struct packet *p)
{
	struct flow_key key = {
		.pod = p->tuple.destination, .peer = p->tuple.source,
		.pod_port = p->tuple.destination_port, .peer_port = p->tuple.source_port,
		.protocol = p->protocol,
	};
	struct flow *flow = bpf_map_lookup_elem(&pm_flows, &key);

	if (!flow || !(flow->flags & FLOW_NODE))
		return 0;
	if (p->opens ? is_over(flow, p->protocol) : idle(flow, p->protocol)) {
		/* Should the node go on nevertheless, it is noted anew. */
		bpf_map_delete_elem(&pm_flows, &key);
		return 0;
	}
	/*
	 * Datagrams have no end that could be seen: what a peer sends without end would keep the entry of
	 * somebody who has long gone. Those of the node itself keep it.
	 */
	if (p->protocol != IPPROTO_UDP || !(flow->flags & FLOW_GOES_ON))
		touch(flow, p, 1);
	return 1;
}

/* Whether the flow is that of a call whose peer's address and port the pod sees. */
static __always_inline int is_plain(const struct flow *flow, const struct tuple *t)
{
	return !(flow->flags & (FLOW_REMAPPED | FLOW_HAIRPIN | FLOW_MASQUERADED)) &&
	       same_addr(&flow->host, &t->destination) && flow->host_port == t->destination_port;
}

/*
 * A packet to a claim: what the pod gets. The claims decide anew for every packet; flows are for
 * the answers, and made here. An ICMP error makes none.
 */
static __always_inline enum verdict forward(struct __sk_buff *skb, struct packet *p,
					    struct tuple *to, int from_pod, __u64 *mac)
{
	struct tuple *t = &p->tuple;
	struct claim_key claim_key __attribute__((aligned(8))) = {
		.addr = t->destination, .port = t->destination_port, .protocol = p->protocol,
	};
	struct flow_key key __attribute__((aligned(8))) = {
		.peer = t->source, .peer_port = t->source_port, .protocol = p->protocol,
	};
	struct claim *claim;
	struct flow *flow = 0;
	__u32 any, made = 0, hairpin = 0, own = 0;
	__u64 unknown = unknown_of(skb);

	claim = find_claim(&claim_key, &any);
	if (!claim)
		return PASS;
	key.pod = claim->pod;
	key.pod_port = claim->port;
	if (from_pod && !(claim->flags & CLAIM_SELF) && same_addr(&t->source, &claim->pod)) {
		/*
		 * Through the stack, the packet's source would be an address of its own device, or the
		 * pod's own when it gets there: a martian either way.
		 */
		hairpin = FLOW_HAIRPIN;
		if (claim->flags & CLAIM_MASQUERADE) {
			key.peer = claim->source;
			own = !is_ephemeral(t->source_port);
		} else {
			set_dummy(&key.peer);
			own = 1;
		}
	} else {
		flow = bpf_map_lookup_elem(&pm_flows, &key);
	}
	/* What is constant in a hairpin, or for claims of any address. */
	forget_addr(&claim_key.addr, unknown);
	forget_addr(&key.peer, unknown);
	FORGET(any, unknown);
	FORGET(hairpin, unknown);
	FORGET(own, unknown);

	if (flow && is_plain(flow, t)) {
		touch(flow, p, 1);
	} else {
		struct remap_key from __attribute__((aligned(8))) = {
			.peer = t->source, .host = t->destination,
			.peer_port = t->source_port, .host_port = t->destination_port,
			.protocol = p->protocol,
		};
		int taken = hairpin || (flow && !replaceable(flow, p));
		struct flow *remapped;

		if (!(claim->flags & CLAIM_SELF) && !p->icmp && !is_local(skb, p, from_pod)) {
			count(REASON_NOT_LOCAL);
			return PASS;
		}
		if (!p->icmp && is_node_flow(p)) {
			count(REASON_NODE_FLOW);
			return PASS;
		}
		FORGET(taken, unknown);
		remapped = find_remapped(&key, &from);
		if (remapped) {
			touch(remapped, p, 1);
		} else {
			struct flow new = {
				.host = t->destination, .peer = t->source,
				.host_port = t->destination_port, .peer_port = t->source_port,
				.flags = any | hairpin | first_flags(p), .owner = claim->owner,
			};

			if (p->icmp)
				return PASS;
			stamp(&new);
			made = 1;
			if (!taken) {
				key.peer_port = t->source_port;
				/* Unless another CPU was faster, for another of the peer's calls. */
				taken = bpf_map_update_elem(&pm_flows, &key, &new,
							    flow ? BPF_ANY : BPF_NOEXIST) == -EEXIST;
			}
			if (taken) {
				int there;

				new.flags |= FLOW_REMAPPED;
				there = choose_port(&key, &new, &from, p, own);
				if (there < 0)
					return DROP;
				FORGET(there, unknown);
				made = !there;
				if (!hairpin && made)
					count(REASON_REMAPPED);
			}
		}
	}

	if (claim->flags & CLAIM_MAC)
		__builtin_memcpy(mac, claim->mac, ETH_ALEN);
	to->source = key.peer;
	to->destination = key.pod;
	to->source_port = key.peer_port;
	to->destination_port = key.pod_port;
	if (made)
		count_connection(claim, &claim_key);
	if (claim->flags & CLAIM_SELF)
		return CHANGE;
	if (p->icmp) {
		count(REASON_ICMP_IN);
	} else {
		count_in(&claim_key, p);
		count(hairpin ? REASON_HAIRPIN : REASON_FORWARDED);
		if (made)
			count(REASON_NEW_FLOW);
	}
	return hairpin ? BOUNCE : CHANGE;
}

/*
 * What a pod answers to an address that stands for its peer's: to itself in a hairpin, or to the
 * node that masquerades.
 */
static __always_inline enum verdict turn_back(struct packet *p, struct tuple *to)
{
	struct tuple *t = &p->tuple;
	struct flow_key key = {
		.pod = t->source, .peer = t->destination,
		.pod_port = t->source_port, .peer_port = t->destination_port,
		.protocol = p->protocol,
	};
	struct flow *flow = bpf_map_lookup_elem(&pm_flows, &key);

	if (!flow)
		return held(p) ? DROP : PASS;
	if (!(flow->flags & (FLOW_HAIRPIN | FLOW_MASQUERADED)))
		return PASS;
	touch(flow, p, 0);
	to->destination = flow->peer;
	to->destination_port = flow->peer_port;
	if (flow->flags & FLOW_MASQUERADED) {
		/* The rest is done at egress, for the flow that this one stands for. */
		to->source = t->source;
		to->source_port = t->source_port;
		return CHANGE;
	}
	to->source = flow->host;
	to->source_port = flow->host_port;
	if (p->icmp) {
		count(REASON_ICMP_OUT);
	} else {
		count_out(flow, p);
		count(REASON_ANSWERED);
	}
	return BOUNCE;
}

#endif
