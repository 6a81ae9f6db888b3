/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Reading packets. Nothing is assumed about their length, and every header that a rewrite will
 * touch is known to be there before its first write.
 *
 * The verifier follows constants through all the code behind them, so that each one of two values
 * doubles its work. What can be asked of the packet again is therefore not kept as a constant.
 */
#ifndef PORTMAP_PACKET_H
#define PORTMAP_PACKET_H

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/pkt_cls.h>

#include "maps.h"

#define ICMPV6 58	/* IPPROTO_ICMPV6 is in <linux/in6.h>, which defines in6_addr again */
#define SCTP 132

/* Both addresses together and both ports together, as they are in the packet. */
struct tuple {
	struct addr source;
	struct addr destination;
	__be16 source_port;
	__be16 destination_port;
} __attribute__((aligned(8)));

struct packet {
	/* Of an ICMP error: what an answer to the quoted packet has, since it goes the same way. */
	struct tuple tuple;
	__u32 network;		/* offset of the IP header; of an ICMP error: of the quoted one */
	__u32 transport;	/* offset of the transport header behind it */
	__u32 end;		/* offset of the IP packet's end */
	__u32 outer;		/* offset of an ICMP error's own IP header */
	__u32 icmp;		/* offset of an ICMP error's ICMP header; 0: it is none */
	__be32 id;
	__be16 checksum;	/* IPv4: of the header at `network` */
	__u16 offset;		/* not 0: a fragment without the transport header */
	__u16 more;		/* not 0: fragments follow */
	__u8 protocol;		/* 0: behind a fragment's end */
	__u8 opens;		/* 1: TCP SYN or SCTP INIT */
	__u8 closes;		/* 1: TCP FIN or RST, SCTP ABORT or SHUTDOWN COMPLETE */
};

struct ipv4 {
	__u8 version_ihl, tos;
	__be16 length, id, fragment;
	__u8 ttl, protocol;
	__be16 checksum;
	__be32 source, destination;
};

struct ipv6 {
	__be32 version;
	__be16 length;
	__u8 next, hops;
	struct addr source, destination;
};

static __always_inline int is_ipv6(struct __sk_buff *skb)
{
	return skb->protocol == bpf_htons(ETH_P_IPV6);
}

static __always_inline int is_transport(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == SCTP;
}

static __always_inline int is_error(int ipv6, __u8 type)
{
	if (ipv6)	/* RFC 4443: unreachable, too big, time exceeded, parameter problem */
		return type >= 1 && type <= 4;
	return type == 3 || type == 11 || type == 12;	/* RFC 792 */
}

/*
 * Length of an IP packet by its header, or by the buffer where that has none: "big TCP" (5.19)
 * writes 0 for more than 65535 bytes.
 */
static __always_inline __u32 ip_length(struct __sk_buff *skb, __u32 offset, __u32 length)
{
	return (length || skb->len < 65536) ? length : skb->len - offset;
}

static __always_inline int parse_ipv4(struct __sk_buff *skb, struct packet *p, __u32 at)
{
	struct ipv4 ip;

	if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)) || ip.version_ihl < 0x45 ||
	    ip.version_ihl > 0x4f)
		return -1;
	set_v4(&p->tuple.source, ip.source);
	set_v4(&p->tuple.destination, ip.destination);
	p->network = at;
	p->transport = at + (ip.version_ihl & 15) * 4;
	p->end = at + ip_length(skb, at, bpf_ntohs(ip.length));
	p->id = ip.id;
	p->checksum = ip.checksum;
	p->offset = ip.fragment & bpf_htons(0x1fff);
	p->more = ip.fragment & bpf_htons(0x2000);
	p->protocol = ip.protocol;
	return 0;
}

#define HOP_BY_HOP 0
#define ROUTING 43
#define FRAGMENT 44
#define AUTHENTICATION 51
#define DESTINATION 60
/* More than this many extension headers are not understood. */
#define EXTENSIONS 6

static __always_inline int is_version_6(const struct ipv6 *ip)
{
	return (ip->version & bpf_htonl(0xf0000000)) == bpf_htonl(0x60000000);
}

/*
 * ::/64 has ::, ::1 and the mapped IPv4 addresses, which would be taken for IPv4's here: none of them
 * belongs on a wire.
 */
static __always_inline int is_below_64(const struct addr *a)
{
	return !(a->w[0] | a->w[1]);
}

static __always_inline int parse_ipv6(struct __sk_buff *skb, struct packet *p, __u32 at)
{
	struct ipv6 ip;
	__u32 transport = at + sizeof(ip);
	__u8 next;

	if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)) || !is_version_6(&ip) ||
	    is_below_64(&ip.source) || is_below_64(&ip.destination))
		return -1;
	p->tuple.source = ip.source;
	p->tuple.destination = ip.destination;
	p->network = at;
	p->end = at + ip_length(skb, at, ip.length ? bpf_ntohs(ip.length) + sizeof(ip) : 0);
	p->id = 0;
	p->checksum = 0;
	p->offset = 0;
	p->more = 0;
	next = ip.next;
#pragma clang loop unroll(disable)
	for (int i = 0; i < EXTENSIONS; i++) {
		struct {
			__u8 next, length;
			union {
				struct { __u8 type, left; };
				__be16 fragment;
			};
			__be32 id;
		} x;

		if (next != HOP_BY_HOP && next != ROUTING && next != FRAGMENT &&
		    next != AUTHENTICATION && next != DESTINATION)
			break;
		if (bpf_skb_load_bytes(skb, transport, &x, sizeof(x)))
			return -1;
		if (next == FRAGMENT) {
			p->id = x.id;
			p->offset = x.fragment & bpf_htons(0xfff8);
			p->more = x.fragment & bpf_htons(1);
			transport += 8;
			if (p->offset)
				break;
		} else if (next == AUTHENTICATION) {
			transport += (x.length + 2) * 4;
		} else {
			/* The checksum is that of the final destination, which is not this one. */
			if (next == ROUTING && x.left)
				return -1;
			transport += (x.length + 1) * 8;
		}
		next = x.next;
	}
	p->transport = transport;
	p->protocol = next;
	return 0;
}

/* A number of which the verifier knows nothing, for FORGET. */
static __always_inline __u64 unknown_of(struct __sk_buff *skb)
{
	return (__u64)skb->len << 32 | skb->mark;
}

/* The address must be aligned to 8 bytes. */
static __always_inline void forget_addr(struct addr *addr, __u64 unknown)
{
	half *words = (void *)addr;

	FORGET(words[0], unknown);
	FORGET(words[1], unknown);
}

static __always_inline void forget_tuple(struct tuple *tuple, __u64 unknown)
{
	half *words = (void *)tuple;

#pragma clang loop unroll(full)
	for (unsigned int i = 0; i < sizeof(*tuple) / sizeof(*words); i++)
		FORGET(words[i], unknown);
}

static __always_inline int parse_ip(struct __sk_buff *skb, struct packet *p, __u32 at)
{
	__u64 unknown = unknown_of(skb);

	if (is_ipv6(skb) ? parse_ipv6(skb, p, at) : parse_ipv4(skb, p, at))
		return -1;
	/* What is constant in one of the families. */
	forget_tuple(&p->tuple, unknown);
	FORGET(p->transport, unknown);
	FORGET(p->end, unknown);
	FORGET(p->id, unknown);
	FORGET(p->checksum, unknown);
	FORGET(p->offset, unknown);
	FORGET(p->more, unknown);
	FORGET(p->protocol, unknown);
	return 0;
}

/* Bytes of transport header that must be there: up to the checksum, at least. */
static __always_inline __u32 header_length(__u8 protocol)
{
	return protocol == IPPROTO_TCP ? 20 : protocol == SCTP ? 12 : 8;
}

/* TCP's flags (RFC 9293). */
static __always_inline void take_flags(struct packet *p, __u8 flags)
{
	p->opens = (flags & 0x12) == 0x02;
	p->closes = (flags & 0x05) != 0;
}

/* Reads what opens and closes flows: TCP's flags, SCTP's first chunk (RFC 9260). */
static __always_inline void parse_state(struct __sk_buff *skb, struct packet *p)
{
	__u8 byte;

	if (p->protocol == IPPROTO_UDP ||
	    bpf_skb_load_bytes(skb, p->transport + (p->protocol == SCTP ? 12 : 13), &byte, 1))
		return;
	if (p->protocol == SCTP) {
		p->opens = byte == 1;
		p->closes = byte == 6 || byte == 14;
	} else {
		take_flags(p, byte);
	}
}

/* The packet that an ICMP error quotes, turned round. */
static __always_inline int parse_quoted(struct __sk_buff *skb, struct packet *p)
{
	struct addr source;
	__u32 end = p->end;
	__be16 ports[2];

	p->outer = p->network;
	p->icmp = p->transport;
	if (parse_ip(skb, p, p->icmp + 8) || p->offset || !is_transport(p->protocol))
		return -1;
	/* RFC 792: at least 8 bytes behind the header. Its own length says what it once had. */
	p->end = end;
	p->more = 0;
	if (p->transport + 8 > end || bpf_skb_load_bytes(skb, p->transport, ports, sizeof(ports)))
		return -1;
	source = p->tuple.source;
	p->tuple.source = p->tuple.destination;
	p->tuple.destination = source;
	p->tuple.source_port = ports[1];
	p->tuple.destination_port = ports[0];
	return 0;
}

/* 0, or -1 for what is not understood. */
static __always_inline int parse_all(struct __sk_buff *skb, struct packet *p, __u32 at)
{
	__u8 type;

	p->icmp = 0;
	p->opens = 0;
	p->closes = 0;
	p->tuple.source_port = 0;
	p->tuple.destination_port = 0;
	if (parse_ip(skb, p, at) || p->end > skb->len)
		return -1;
	if (p->offset)
		return p->transport > p->end ? -1 : 0;
	if (is_transport(p->protocol)) {
		if (p->transport + header_length(p->protocol) > p->end ||
		    bpf_skb_load_bytes(skb, p->transport, &p->tuple.source_port, 4))
			return -1;
		parse_state(skb, p);
		return 0;
	}
	if (p->protocol != (is_ipv6(skb) ? ICMPV6 : IPPROTO_ICMP) || p->more ||
	    p->transport + 8 > p->end || bpf_skb_load_bytes(skb, p->transport, &type, 1) ||
	    !is_error(is_ipv6(skb), type))
		return -1;
	return parse_quoted(skb, p);
}

static __always_inline int parse(struct __sk_buff *skb, struct packet *p, __u32 at)
{
	__u64 unknown = unknown_of(skb);

	if (parse_all(skb, p, at))
		return -1;
	/* What is constant in one of the kinds of packets. */
	forget_tuple(&p->tuple, unknown);
	FORGET(p->network, unknown);
	FORGET(p->outer, unknown);
	FORGET(p->icmp, unknown);
	FORGET(p->opens, unknown);
	FORGET(p->closes, unknown);
	return 0;
}

/*
 * Does what parse does, with less, for what most packets are: TCP or UDP, whole, with its headers in the
 * buffer's linear part and no others between them. 0 if the packet is none of these.
 */
static __always_inline int parse_usual(struct __sk_buff *skb, struct packet *p, __u32 at)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct tcp {
		__be16 source, destination;
		__be32 sequence, acknowledgment;
		__u8 offset, flags;
	} *tcp;
	__u32 length;

	if (!is_ipv6(skb)) {
		struct ipv4 *ip = data + at;

		if ((void *)(ip + 1) > end || ip->version_ihl != 0x45 ||
		    ip->fragment & bpf_htons(0x3fff))
			return 0;
		set_v4(&p->tuple.source, ip->source);
		set_v4(&p->tuple.destination, ip->destination);
		p->checksum = ip->checksum;
		p->protocol = ip->protocol;
		p->transport = at + sizeof(*ip);
		length = bpf_ntohs(ip->length);
	} else {
		struct ipv6 *ip = data + at;

		if ((void *)(ip + 1) > end || !is_version_6(ip) || is_below_64(&ip->source) ||
		    is_below_64(&ip->destination))
			return 0;
		p->tuple.source = ip->source;
		p->tuple.destination = ip->destination;
		p->checksum = 0;
		p->protocol = ip->next;
		p->transport = at + sizeof(*ip);
		length = ip->length ? bpf_ntohs(ip->length) + sizeof(*ip) : 0;
	}
	p->network = at;
	p->end = at + length;
	p->icmp = 0;
	p->offset = 0;
	p->more = 0;
	p->opens = 0;
	p->closes = 0;
	tcp = data + p->transport;
	if (p->transport + header_length(p->protocol) > p->end || p->end > skb->len ||
	    (void *)(&tcp->destination + 1) > end)
		return 0;
	p->tuple.source_port = tcp->source;
	p->tuple.destination_port = tcp->destination;
	if (p->protocol == IPPROTO_UDP)
		return 1;
	if (p->protocol != IPPROTO_TCP || (void *)(tcp + 1) > end)
		return 0;
	take_flags(p, tcp->flags);
	return 1;
}

/* Where a packet is met. */
enum way {
	FROM_OUTSIDE,
	FROM_POD,
	LEAVING,		/* to either */
};

/*
 * Whether a pod's packet may have to turn round, which it does by its destination: that is a peer's of
 * a hairpin (set_dummy) or, with masqAll, an address of the node. Or it may have to be held.
 */
static __always_inline __u64 may_turn_back(__u64 to_dummy)
{
	struct config *config = find_config();

	return to_dummy || !config || !(config->flags & CONFIG_NO_MASQUERADE) ||
	       is_holding(config);
}

/* What comes of the first look. */
enum look {
	NOBODYS,		/* cannot concern any hostPort */
	UNCLEAR,		/* may do, by what is not seen at once */
	KNOWN,			/* has a port that concerns somebody */
};

/*
 * The first look, without a helper call. Headers that are not in the buffer's linear part, fragments,
 * extension headers and ICMP errors are unclear.
 */
static __always_inline enum look look_at(struct __sk_buff *skb, __u32 at, enum way way)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u64 to_dummy;
	__be16 *ports;
	__u8 protocol;

	/* A VLAN's packets belong to its own device. VLAN 0 is none, but a priority (802.1Q). */
	if (skb->vlan_present && skb->vlan_tci & 0x0fff)
		return NOBODYS;
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct ipv4 *ip = data + at;

		if ((void *)(ip + 1) > end)
			return UNCLEAR;
		protocol = ip->protocol;
		to_dummy = ip->destination == DUMMY_V4;
		ports = (void *)ip + (ip->version_ihl & 15) * 4;
		if (is_transport(protocol) && ip->fragment & bpf_htons(0x3fff))
			return UNCLEAR;
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6 *ip = data + at;

		if ((void *)(ip + 1) > end)
			return UNCLEAR;
		protocol = ip->next;
		to_dummy = ip->destination.w[0] == DUMMY_V6_FIRST;
		ports = (void *)(ip + 1);
		if (!is_transport(protocol) && protocol != ICMPV6)
			return protocol == HOP_BY_HOP || protocol == ROUTING ||
			       protocol == FRAGMENT || protocol == AUTHENTICATION ||
			       protocol == DESTINATION ? UNCLEAR : NOBODYS;
	} else {
		return NOBODYS;
	}
	if ((void *)(ports + 2) > end)
		return UNCLEAR;
	if (is_transport(protocol)) {
		if (port_known(ports[1]) && (way != LEAVING || !ruled_out(CONFIG_NO_MASQUERADE)))
			return KNOWN;
		return way != FROM_OUTSIDE && port_known(ports[0]) &&
		       (way == LEAVING || may_turn_back(to_dummy)) ? KNOWN : NOBODYS;
	}
	if (protocol == ICMPV6 || protocol == IPPROTO_ICMP)
		return is_error(protocol == ICMPV6, *(__u8 *)ports) ? UNCLEAR : NOBODYS;
	return NOBODYS;
}

#endif
