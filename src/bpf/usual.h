/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * The shortest way, for what nearly all packets are that have a pod's or a hostPort's number: they belong to
 * a flow that is there, and nothing is special about either. The same becomes of them as by forward and
 * answer, in half the time. All others are left to these: PASS means that nothing has been done, CHANGE that
 * nothing is left to do.
 */
#ifndef PORTMAP_USUAL_H
#define PORTMAP_USUAL_H

#include "egress.h"
#include "ingress.h"
#include "local.h"
#include "rewrite.h"

/* Whether the address was the node's when the plugin ran last. */
static __always_inline int is_listed(const struct addr *address)
{
	__u32 *listed = bpf_map_lookup_elem(&pm_addresses, address);

	return listed && *listed;
}

/* Whether no claim is of a special kind, and nothing has to be held. */
static __always_inline int is_usual_node(void)
{
	struct config *config = find_config();

	return config && config->flags & CONFIG_NO_MASQUERADE &&
	       config->flags & CONFIG_NO_HOST_ADDRESS && !is_holding(config);
}

/* To a claim of any address, while no claim has an address of the node as its own. */
static __always_inline enum verdict forward_usual(struct __sk_buff *skb, __u32 at, int from_pod,
						  struct packet *p, struct tuple *to)
{
	struct tuple *t = &p->tuple;
	struct claim_key claim_key __attribute__((aligned(8))) = {};
	struct flow_key key __attribute__((aligned(8))) = {};
	struct claim *claim, *own;
	struct flow *flow;

	if (!parse_usual(skb, p, at) || is_reserved(&t->destination) ||
	    !ruled_out(CONFIG_NO_HOST_ADDRESS) || (from_pod && port_known(t->source_port)))
		return PASS;
	claim_key.addr = t->destination;
	set_any(&claim_key.addr);
	claim_key.port = t->destination_port;
	claim_key.protocol = p->protocol;
	key.peer = t->source;
	key.peer_port = t->source_port;
	key.protocol = p->protocol;
	claim = bpf_map_lookup_elem(&pm_claims, &claim_key);
	if (claim && !claim->flags && !(from_pod && same_addr(&t->source, &claim->pod))) {
		key.pod = claim->pod;
		key.pod_port = claim->port;
		flow = bpf_map_lookup_elem(&pm_flows, &key);
		/* A direct one is none of the claim's, though the port may have the same number. */
		if (flow && flow->flags & FLOW_ANY && is_plain(flow, t)) {
			touch(flow, p, 1);
			count_in(&claim_key, p);
			count(REASON_FORWARDED);
			to->source = t->source;
			to->source_port = t->source_port;
			to->destination = key.pod;
			to->destination_port = key.pod_port;
			return rewrite_packet(skb, p, to) ? DROP : CHANGE;
		}
	}
	claim_key.addr = t->destination;
	own = bpf_map_lookup_elem(&pm_claims, &claim_key);
	if (!own) {
		/* A pod calls somebody else, at a port of the same number. */
		if (claim && (!from_pod || is_listed(&t->destination)))
			return PASS;
		if (claim)
			count(REASON_NOT_LOCAL);
		return CHANGE;
	}
	/* A call of the pod's own address is only noted. */
	if (own->flags != CLAIM_SELF)
		return PASS;
	key.pod = t->destination;
	key.pod_port = t->destination_port;
	flow = bpf_map_lookup_elem(&pm_flows, &key);
	if (!flow || flow->flags & FLOW_ANY || !is_plain(flow, t))
		return PASS;
	touch(flow, p, 1);
	return CHANGE;
}

/* A pod's answer, to a call of its hostPort or of its own address. */
static __always_inline enum verdict answer_usual(struct __sk_buff *skb, __u32 at,
						 struct packet *p, struct tuple *to)
{
	struct tuple *t = &p->tuple;
	struct flow_key key __attribute__((aligned(8))) = {};
	struct flow *flow;

	if (!parse_usual(skb, p, at) || skb->ingress_ifindex == skb->ifindex)
		return PASS;
	key.pod = t->source;
	key.peer = t->destination;
	key.pod_port = t->source_port;
	key.peer_port = t->destination_port;
	key.protocol = p->protocol;
	flow = bpf_map_lookup_elem(&pm_flows, &key);
	/* Somebody else answers a pod, from a port of the same number. */
	if (!flow && skb->ingress_ifindex && is_usual_node() && !is_listed(&t->source))
		return CHANGE;
	if (!flow ||
	    flow->flags & (FLOW_REMAPPED | FLOW_HAIRPIN | FLOW_NODE | FLOW_MASQUERADED))
		return PASS;
	touch(flow, p, 0);
	if (same_addr(&flow->host, &t->source))
		return CHANGE;
	count_out(flow, p);
	count(REASON_ANSWERED);
	to->source = flow->host;
	to->source_port = flow->host_port;
	to->destination = t->destination;
	to->destination_port = t->destination_port;
	return rewrite_packet(skb, p, to) ? DROP : CHANGE;
}

#endif
