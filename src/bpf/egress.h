/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* What leaves to the outside or to a pod. */
#ifndef PORTMAP_EGRESS_H
#define PORTMAP_EGRESS_H

#include "flow.h"

/*
 * The node, or a pod that it masquerades, calls from a port that is claimed: remembers it, lest
 * the answers be taken for new connections to the hostPort.
 */
static __always_inline void note_node_flow(struct __sk_buff *skb, const struct packet *p,
					   struct flow_key *key)
{
	const struct tuple *t = &p->tuple;
	struct claim_key claim_key __attribute__((aligned(8))) = {
		.addr = t->source, .port = t->source_port, .protocol = p->protocol,
	};
	struct remap_key from __attribute__((aligned(8))) = {
		.peer = t->destination, .host = t->source,
		.peer_port = t->destination_port, .host_port = t->source_port,
		.protocol = p->protocol,
	};
	struct flow new = { .flags = FLOW_NODE | (p->closes ? FLOW_CLOSED : 0) };
	struct claim *claim;
	struct flow *flow;
	__u32 any, own;

	claim = find_claim(&claim_key, &any);
	if (!claim || claim->flags & CLAIM_SELF)
		return;
	/*
	 * What came in by no device the node's own stack has made, or that of a pod behind the same device
	 * (macvlan, ipvlan). The node knows its connections, whatever others have sent in its peers' names.
	 */
	own = !skb->ingress_ifindex && !(claim->flags & CLAIM_MAC);
	if (any) {
		__u32 *listed = bpf_map_lookup_elem(&pm_addresses, &t->source);

		if (listed ? !*listed : !own)
			return;
	}
	/*
	 * Or it is an answer that has its host's address already: one that was bounced, or that
	 * passes a second device of ours.
	 */
	if ((!own || p->closes) &&
	    (same_addr(&t->destination, &claim->pod) || bpf_map_lookup_elem(&pm_remaps, &from)))
		return;
	/* A pod that is masqueraded, or that gives itself out as the node, has to be answered first. */
	if (own && !p->closes)
		new.flags |= FLOW_GOES_ON;
	stamp(&new);
	{
		struct flow_key forwarded = {
			.pod = claim->pod, .peer = t->destination,
			.pod_port = claim->port, .peer_port = t->destination_port,
			.protocol = p->protocol,
		};

		flow = bpf_map_lookup_elem(&pm_flows, &forwarded);
		if (flow && same_addr(&flow->host, &t->source) && flow->host_port == t->source_port) {
			if ((!own || p->closes) && !replaceable(flow, p))
				return;
			bpf_map_delete_elem(&pm_flows, &forwarded);
		}
	}
	bpf_map_update_elem(&pm_flows, key, &new, BPF_NOEXIST);
	count(REASON_NODE_FLOW);
}

/* A pod's answer: source back to the address and port that the peer called. */
static __always_inline enum verdict answer(struct __sk_buff *skb, struct packet *p,
					   struct tuple *to)
{
	struct tuple *t = &p->tuple;
	struct flow_key key = {
		.pod = t->source, .peer = t->destination,
		.pod_port = t->source_port, .peer_port = t->destination_port,
		.protocol = p->protocol,
	};
	struct flow *flow = bpf_map_lookup_elem(&pm_flows, &key);

	if (!flow) {
		if (held(p))
			return DROP;
		if (!p->icmp)
			note_node_flow(skb, p, &key);
		return PASS;
	}
	/* Out by the device that it came in by: nothing says that it is the pod's. */
	if (skb->ingress_ifindex == skb->ifindex)
		p->closes = 0;
	FORGET(p->closes, skb->len);
	touch(flow, p, 0);
	if (flow->flags & (FLOW_HAIRPIN | FLOW_NODE | FLOW_MASQUERADED))
		return PASS;
	to->source = flow->host;
	to->source_port = flow->host_port;
	to->destination = t->destination;
	to->destination_port = flow->flags & FLOW_REMAPPED ? flow->peer_port : t->destination_port;
	/* A direct connection: counted nowhere, and changed only if its peer's port was. */
	if (same_addr(&flow->host, &t->source))
		return CHANGE;
	if (p->icmp) {
		count(REASON_ICMP_OUT);
	} else {
		count_out(flow, p);
		count(REASON_ANSWERED);
	}
	return CHANGE;
}

/*
 * masqAll: a forwarded packet on its last step to the pod gets an address of the node as its
 * source. Not at ingress, where the stack would refuse its own address as a source.
 */
static __always_inline enum verdict masquerade(struct __sk_buff *skb, struct packet *p,
					       struct tuple *to)
{
	struct tuple *t = &p->tuple;
	struct claim_key self __attribute__((aligned(8))) = {
		.addr = t->destination, .port = t->destination_port, .protocol = p->protocol,
	};
	struct flow_key key = {
		.pod = t->destination, .peer = t->source,
		.pod_port = t->destination_port, .peer_port = t->source_port,
		.protocol = p->protocol,
	};
	struct claim *claim = bpf_map_lookup_elem(&pm_claims, &self);
	struct remap_key from __attribute__((aligned(8))) = {
		.peer = t->source, .host = t->destination,
		.peer_port = t->source_port, .host_port = t->destination_port,
		.protocol = p->protocol,
	};
	struct flow *flow;

	if (!claim || (claim->flags & (CLAIM_SELF | CLAIM_MASQUERADE)) !=
		      (CLAIM_SELF | CLAIM_MASQUERADE))
		return PASS;
	flow = bpf_map_lookup_elem(&pm_flows, &key);
	if (flow && flow->flags & (FLOW_HAIRPIN | FLOW_MASQUERADED)) {
		/*
		 * The pod's own call, on its way back to it. Anything else with an address of the node comes
		 * from a port that has been chosen for a peer: it gets one as well.
		 */
		if (skb->ingress_ifindex == skb->ifindex ||
		    !same_addr(&t->source, &claim->source))
			return PASS;
	} else if (flow && (flow->flags & FLOW_NODE || same_addr(&flow->host, &t->destination))) {
		touch(flow, p, !(flow->flags & FLOW_NODE));
		return PASS;
	}
	if (!flow) {
		/* The node's own connection to the pod: its port is not to be chosen for others. */
		struct flow new = { .flags = FLOW_NODE | FLOW_GOES_ON };

		if (p->icmp || !same_addr(&t->source, &claim->source))
			return PASS;
		stamp(&new);
		bpf_map_update_elem(&pm_flows, &key, &new, BPF_NOEXIST);
		return PASS;
	}
	key.peer = claim->source;
	flow = find_remapped(&key, &from);
	if (flow) {
		touch(flow, p, 1);
	} else {
		struct flow new = {
			.host = t->destination, .peer = t->source,
			.host_port = t->destination_port, .peer_port = t->source_port,
			.flags = FLOW_MASQUERADED | first_flags(p), .owner = claim->owner,
		};
		int there;

		if (p->icmp)
			return PASS;
		stamp(&new);
		there = choose_port(&key, &new, &from, p, !is_ephemeral(t->source_port));
		if (there < 0)
			return DROP;
		if (!there)
			count_connection(claim, &self);
	}
	to->source = key.peer;
	to->source_port = key.peer_port;
	to->destination = t->destination;
	to->destination_port = t->destination_port;
	if (!p->icmp)
		count(REASON_MASQUERADED);
	return CHANGE;
}

#endif
