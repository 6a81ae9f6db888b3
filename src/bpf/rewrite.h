/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Writing packets. Every header has been found to be there, so that a write fails for want of
 * memory alone. Failing half-way, the packet is of no use to anybody.
 *
 * Checksums are corrected by differences (RFC 1624). Addresses are in the pseudo-header of UDP, TCP and
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

/* 32 bits of a difference that is a sum of 32-bit words: what checksums are corrected by. */
static __always_inline __u32 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	return (sum & 0xffffffff) + (sum >> 32);
}

/* How much is added where words are replaced by others (RFC 1624). */
static __always_inline __u64 change_of(const void *from, const void *to, __u32 words)
{
	const word *before = from, *after = to;
	__u64 sum = 0;

#pragma clang loop unroll(full)
	for (__u32 i = 0; i < words; i++)
		sum += (__u64)(~before[i] & 0xffffffff) + after[i];
	return fold(sum);
}

/*
 * The addresses of the IP header at an offset: a source, and a destination behind it. IPv4: its
 * checksum, which was `checksum`, and whatever stands behind the header without options as well, if
 * `more` is 4. `flags`: with BPF_F_RECOMPUTE_CSUM, IPv6's change is added to a checksum that the device has
 * taken of the whole packet (CHECKSUM_COMPLETE); IPv4's header checksum makes up for it by itself.
 */
static __always_inline int write_addresses(struct __sk_buff *skb, __u32 at,
					   const struct addr pair[2], __be16 checksum,
					   __u32 change, __u64 flags, __u32 behind, __u32 more)
{
	struct {
		__u16 pad;
		__be16 checksum;
		__be32 addresses[2], behind;
	} v4 = { .addresses = { pair[0].w[3], pair[1].w[3] }, .behind = behind };
	__u32 sum;

	if (is_ipv6(skb))
		return bpf_skb_store_bytes(skb, at + 8, pair, ADDRESSES, flags);
	sum = fold((__u64)(~checksum & 0xffff) + change);
	sum = (sum & 0xffff) + (sum >> 16);
	v4.checksum = ~((sum & 0xffff) + (sum >> 16));
	return bpf_skb_store_bytes(skb, at + 10, &v4.checksum, 10 + (more & 4), 0);
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
	__u32 ports = *(const word *)&to->source_port, together = 0;
	int other_ports = !p->offset && !same_ports(t, to);

	if (other_ports && p->protocol != SCTP &&
	    bpf_l4_csum_replace(skb, checksum, 0,
				change_of(&t->source_port, &to->source_port, 1), flags))
		return -1;
	if (!same_addresses(t, to)) {
		__u32 change = change_of(&t->source, &to->source, ADDRESSES / 4);

		if (!p->offset && p->protocol != SCTP &&
		    bpf_l4_csum_replace(skb, checksum, 0, change, flags | BPF_F_PSEUDO_HDR))
			return -1;
		if (other_ports && !is_ipv6(skb) && p->protocol != SCTP &&
		    p->transport == p->network + sizeof(struct ipv4))
			together = PORTS;
		if (write_addresses(skb, p->network, &to->source, p->checksum, change,
				    BPF_F_RECOMPUTE_CSUM, ports, together))
			return -1;
	}
	if (!other_ports || together)
		return 0;
	return bpf_skb_store_bytes(skb, p->transport, &ports, PORTS,
				   p->protocol == SCTP ? BPF_F_RECOMPUTE_CSUM : 0);
}

/*
 * An ICMP error: the quoted packet becomes the one that its sender knows, and so do the outer
 * addresses that are the same as quoted ones. The tuples are those of an answer to it.
 */
static __always_inline int rewrite_error(struct __sk_buff *skb, const struct packet *p,
					 const struct tuple *to)
{
	const struct tuple *t = &p->tuple;
	__u32 checksum = p->icmp + 2, change;
	__be16 outer_checksum = 0;
	struct tuple outer, new;

	if (!same_ports(t, to)) {
		__be16 ports[2] = { to->destination_port, to->source_port };

		if (bpf_l4_csum_replace(skb, checksum, 0,
					change_of(&t->source_port, &to->source_port, 1), 0) ||
		    bpf_skb_store_bytes(skb, p->transport, ports, PORTS, 0))
			return -1;
	}
	if (same_addresses(t, to))
		return 0;
	change = change_of(&t->source, &to->source, ADDRESSES / 4);
	/* IPv4: the quoted header's checksum changes by as much as its addresses do. */
	if (is_ipv6(skb) && bpf_l4_csum_replace(skb, checksum, 0, change, 0))
		return -1;
	new.source = to->destination;
	new.destination = to->source;
	if (write_addresses(skb, p->network, &new.source, p->checksum, change, 0, 0, 0))
		return -1;
	if (is_ipv6(skb)) {
		if (bpf_skb_load_bytes(skb, p->outer + 8, &outer.source, ADDRESSES))
			return -1;
	} else {
		struct ipv4 ip;

		if (bpf_skb_load_bytes(skb, p->outer, &ip, sizeof(ip)))
			return -1;
		set_v4(&outer.source, ip.source);
		set_v4(&outer.destination, ip.destination);
		outer_checksum = ip.checksum;
	}
	new.source = same_addr(&outer.source, &t->source) ? to->source : outer.source;
	new.destination = same_addr(&outer.destination, &t->destination) ?
			  to->destination : outer.destination;
	change = change_of(&outer.source, &new.source, ADDRESSES / 4);
	if (is_ipv6(skb) && bpf_l4_csum_replace(skb, checksum, 0, change, BPF_F_PSEUDO_HDR))
		return -1;
	return write_addresses(skb, p->outer, &new.source, outer_checksum, change,
			       BPF_F_RECOMPUTE_CSUM, 0, 0);
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
