/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Writing packets. Every header has been found to be there, so that a write fails for want of
 * memory alone. Failing half-way, the packet is of no use to anybody.
 *
 * Checksums are corrected by differences. Addresses are in the pseudo-header of UDP, TCP and
 * ICMPv6 (BPF_F_PSEUDO_HDR), which is all that the field has while the rest is left to the device.
 */
#ifndef PORTMAP_REWRITE_H
#define PORTMAP_REWRITE_H

#include "flow.h"
#include "sctp.h"

#define ADDRESSES (2 * sizeof(struct addr))
#define PORTS (2 * sizeof(__be16))

static __always_inline int same_addresses(const struct tuple *a, const struct tuple *b)
{
	return same_addr(&a->source, &b->source) && same_addr(&a->destination, &b->destination);
}

static __always_inline int same_ports(const struct tuple *a, const struct tuple *b)
{
	__u64 difference = (a->source_port ^ b->source_port) |
			   (a->destination_port ^ b->destination_port);

	WHOLE(difference);
	return !difference;
}

/*
 * Both addresses of the IP header at an offset, and IPv4's header checksum. `flags`: with
 * BPF_F_RECOMPUTE_CSUM, IPv6's change is added to a checksum that the device has taken of the
 * whole packet (CHECKSUM_COMPLETE); IPv4's header checksum makes up for it by itself.
 */
static __always_inline int write_addresses(struct __sk_buff *skb, __u32 at, __s64 change,
					   const struct addr *source,
					   const struct addr *destination, __u64 flags)
{
	__be32 pair[2] = { source->w[3], destination->w[3] };

	if (is_ipv6(skb))
		return bpf_skb_store_bytes(skb, at + 8, source, sizeof(*source), flags) ||
		       bpf_skb_store_bytes(skb, at + 24, destination, sizeof(*destination), flags);
	return bpf_l3_csum_replace(skb, at + 10, 0, change, 0) ||
	       bpf_skb_store_bytes(skb, at + 12, pair, sizeof(pair), 0);
}

/* An SCTP packet's checksum, unless that is left to the device (0). It does not cover addresses. */
static __always_inline int write_sctp_checksum(struct __sk_buff *skb, const struct packet *p,
					       const struct tuple *to)
{
	__u32 at = p->transport + 8, ports, new_ports;
	__le32 checksum;

	__builtin_memcpy(&ports, &p->tuple.source_port, PORTS);
	__builtin_memcpy(&new_ports, &to->source_port, PORTS);
	if (bpf_skb_load_bytes(skb, at, &checksum, sizeof(checksum)))
		return -1;
	if (!checksum)
		return 0;
	checksum ^= __cpu_to_le32(crc_change(ports, new_ports, p->end - p->transport));
	count(REASON_SCTP_CHECKSUM);
	return bpf_skb_store_bytes(skb, at, &checksum, sizeof(checksum), BPF_F_RECOMPUTE_CSUM);
}

static __always_inline int rewrite_packet(struct __sk_buff *skb, const struct packet *p,
					  const struct tuple *to)
{
	const struct tuple *t = &p->tuple;
	/* A UDP checksum of 0 is none, and stays so; one that becomes 0 is sent as 0xffff. */
	__u64 flags = p->protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	__u32 checksum = p->transport + (p->protocol == IPPROTO_TCP ? 16 : 6);
	__s64 change;

	if (!same_addresses(t, to)) {
		change = bpf_csum_diff((void *)&t->source, ADDRESSES, (void *)&to->source,
				       ADDRESSES, 0);
		if (!p->offset && p->protocol != SCTP &&
		    bpf_l4_csum_replace(skb, checksum, 0, change, flags | BPF_F_PSEUDO_HDR))
			return -1;
		if (write_addresses(skb, p->network, change, &to->source, &to->destination,
				    BPF_F_RECOMPUTE_CSUM))
			return -1;
	}
	if (p->offset || same_ports(t, to))
		return 0;
	change = bpf_csum_diff((void *)&t->source_port, PORTS, (void *)&to->source_port, PORTS, 0);
	if (p->protocol == SCTP)
		return bpf_skb_store_bytes(skb, p->transport, &to->source_port, PORTS,
					   BPF_F_RECOMPUTE_CSUM);
	return bpf_l4_csum_replace(skb, checksum, 0, change, flags) ||
	       bpf_skb_store_bytes(skb, p->transport, &to->source_port, PORTS, 0);
}

/*
 * An ICMP error: the quoted packet becomes the one that its sender knows, and so do the outer
 * addresses that are the same as quoted ones. The tuples are those of an answer to it.
 */
static __always_inline int rewrite_error(struct __sk_buff *skb, const struct packet *p,
					 const struct tuple *to)
{
	const struct tuple *t = &p->tuple;
	__u32 checksum = p->icmp + 2;
	__s64 change;

	if (!same_ports(t, to)) {
		__be16 ports[2] = { to->destination_port, to->source_port };

		change = bpf_csum_diff((void *)&t->source_port, PORTS, (void *)&to->source_port,
				       PORTS, 0);
		if (bpf_l4_csum_replace(skb, checksum, 0, change, 0) ||
		    bpf_skb_store_bytes(skb, p->transport, ports, PORTS, 0))
			return -1;
	}
	if (same_addresses(t, to))
		return 0;
	change = bpf_csum_diff((void *)&t->source, ADDRESSES, (void *)&to->source, ADDRESSES, 0);
	/* IPv4: the quoted header's checksum changes by as much as its addresses do. */
	if (is_ipv6(skb) && bpf_l4_csum_replace(skb, checksum, 0, change, 0))
		return -1;
	if (write_addresses(skb, p->network, change, &to->destination, &to->source, 0))
		return -1;
	{
		struct tuple outer, new;

		if (is_ipv6(skb)) {
			if (bpf_skb_load_bytes(skb, p->outer + 8, &outer.source, ADDRESSES))
				return -1;
		} else {
			__be32 pair[2];

			if (bpf_skb_load_bytes(skb, p->outer + 12, pair, sizeof(pair)))
				return -1;
			set_v4(&outer.source, pair[0]);
			set_v4(&outer.destination, pair[1]);
		}
		new.source = same_addr(&outer.source, &t->source) ? to->source : outer.source;
		new.destination = same_addr(&outer.destination, &t->destination) ?
				  to->destination : outer.destination;
		change = bpf_csum_diff((void *)&outer.source, ADDRESSES, (void *)&new.source,
				       ADDRESSES, 0);
		if (is_ipv6(skb) &&
		    bpf_l4_csum_replace(skb, checksum, 0, change, BPF_F_PSEUDO_HDR))
			return -1;
		return write_addresses(skb, p->outer, change, &new.source, &new.destination,
				       BPF_F_RECOMPUTE_CSUM);
	}
}

static __always_inline int rewrite(struct __sk_buff *skb, const struct packet *p,
				   const struct tuple *to)
{
	if (p->icmp)
		return rewrite_error(skb, p, to);
	if (p->protocol == SCTP && !p->offset && !same_ports(&p->tuple, to) &&
	    write_sctp_checksum(skb, p, to))
		return -1;
	return rewrite_packet(skb, p, to);
}

/* Back to the link that the frame came from. */
static __always_inline int bounce(struct __sk_buff *skb)
{
	__u8 from[ETH_ALEN], frame[2 * ETH_ALEN];

	if (bpf_skb_load_bytes(skb, 0, frame, sizeof(frame)))
		return -1;
	__builtin_memcpy(from, frame, ETH_ALEN);
	__builtin_memcpy(frame, frame + ETH_ALEN, ETH_ALEN);
	__builtin_memcpy(frame + ETH_ALEN, from, ETH_ALEN);
	return bpf_skb_store_bytes(skb, 0, frame, sizeof(frame), 0);
}

#endif
