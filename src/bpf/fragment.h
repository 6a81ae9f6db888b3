/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Fragments. Only the first has ports: what became of it is remembered for the others. One that
 * comes before the first is not understood, and passes.
 */
#ifndef PORTMAP_FRAGMENT_H
#define PORTMAP_FRAGMENT_H

#include "rewrite.h"

static __always_inline void set_fragment_key(struct __sk_buff *skb, const struct packet *p,
					     struct fragment_key *key, int outgoing)
{
	key->source = p->tuple.source;
	key->destination = p->tuple.destination;
	key->id = p->id;
	/* IPv6 fragments of one datagram may differ in what they say comes next (RFC 8200, 4.5). */
	key->protocol = is_ipv6(skb) ? FRAGMENT : p->protocol;
	key->outgoing = outgoing;
	key->pad = 0;
}

static __always_inline __u32 later_fragment(struct __sk_buff *skb, const struct packet *p,
					    struct tuple *to, int outgoing, __u64 *mac)
{
	struct fragment *fragment;
	struct fragment_key key;

	set_fragment_key(skb, p, &key, outgoing);
	fragment = bpf_map_lookup_elem(&pm_fragments, &key);
	if (!fragment)
		return PASS;
	*to = p->tuple;
	if (fragment->flags & FRAGMENT_SOURCE)
		to->source = fragment->source;
	if (fragment->flags & FRAGMENT_DESTINATION)
		to->destination = fragment->destination;
	if (fragment->flags & FRAGMENT_MAC)
		__builtin_memcpy(mac, &fragment->source, ETH_ALEN);
	count(outgoing ? REASON_FRAGMENT_OUT : REASON_FRAGMENT_IN);
	return fragment->flags & FRAGMENT_BOUNCE ? BOUNCE : CHANGE;
}

/*
 * A first fragment: remembers what becomes of it, or that nothing does, since numbers of datagrams
 * are used again. `mac`: 0, or what goes into the frame.
 */
static __always_inline __u32 first_fragment(struct __sk_buff *skb, const struct packet *p,
					    const struct tuple *to, __u32 verdict, int outgoing,
					    __u64 mac)
{
	struct fragment fragment = {
		.source = to->source, .destination = to->destination,
		.flags = FRAGMENT_DESTINATION,
	};
	struct fragment_key key;

	set_fragment_key(skb, p, &key, outgoing);
	/* The checksum of an SCTP packet depends on its length, which only the last fragment has. */
	if (verdict != PASS && p->protocol == SCTP && !same_ports(&p->tuple, to)) {
		count(REASON_SCTP_FRAGMENT);
		verdict = PASS;
	}
	if (verdict == PASS || verdict == DROP || (same_addresses(&p->tuple, to) && !mac)) {
		bpf_map_delete_elem(&pm_fragments, &key);
		return verdict;
	}
	if (verdict == BOUNCE)
		fragment.flags |= FRAGMENT_BOUNCE;
	if (mac) {
		__builtin_memcpy(&fragment.source, &mac, ETH_ALEN);
		fragment.flags |= FRAGMENT_MAC;
	} else {
		fragment.flags |= FRAGMENT_SOURCE;
	}
	bpf_map_update_elem(&pm_fragments, &key, &fragment, BPF_ANY);
	return verdict;
}

#endif
