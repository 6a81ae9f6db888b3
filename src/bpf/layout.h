/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * What the programs and the plugin share: keys and values of the maps. src/backend/ebpf/layout.rs
 * has the same in Rust, and a test compares it with this object's BTF.
 *
 * Addresses are 16 bytes, IPv4 as ::ffff:a.b.c.d (RFC 4291, section 2.5.5.2). Addresses and ports
 * are in network byte order, everything else in the host's. No struct has implicit padding, so that
 * equal keys are equal bytes; padding is zero.
 *
 * Kernels before 5.10 count key and value sizes in the memory limit, and every kernel preallocates
 * LRU maps: their sizes are a compromise, stated where they are defined (maps.h).
 */
#ifndef PORTMAP_LAYOUT_H
#define PORTMAP_LAYOUT_H

#include <linux/types.h>

/*
 * Number of the layout below. It also stands for what whoever writes into the maps promises (CONFIG_NO_*):
 * plugins of one layout may write for each other's programs. Keys never change. Values change at their end only: an upgrade copies
 * the common beginning of old entries and leaves the rest zero, which every program must take.
 */
#ifndef LAYOUT
#define LAYOUT 1
#endif

/* Grows with every change of the programs: an older plugin leaves newer programs in place. */
#ifndef REVISION
#define REVISION 1
#endif

struct addr {
	__be32 w[4];
};

/* A claim: hostPort of one address, or of any (0.0.0.0 or ::) address of the node. */
struct claim_key {
	struct addr addr;
	__be16 port;
	__u8 protocol;
	__u8 pad;
};

/* The pod's own address and containerPort: flows are tracked, not translated. */
#define CLAIM_SELF 1
/* masqAll: the pod sees `source` instead of the client. Set on SELF entries as well. */
#define CLAIM_MASQUERADE 2
/* The pod is not behind a link of the node's own stack (macvlan): `mac` goes into the frame. */
#define CLAIM_MAC 4

struct claim {
	struct addr pod;
	struct addr source;	/* with CLAIM_MASQUERADE: an address of the node */
	__be16 port;		/* containerPort */
	__u16 flags;		/* CLAIM_* */
	__u32 owner;		/* attachment: the first 32 bits of its record's id */
	__u8 mac[6];
	__u16 used;		/* Set by programs: there have been connections, and flows may be left. */
};

/* A flow, keyed by what the pod's answers have. */
struct flow_key {
	struct addr pod;
	struct addr peer;
	__be16 pod_port;
	__be16 peer_port;
	__u8 protocol;
	__u8 pad[3];
};

/* The peer's port towards the pod is not its own: `peer` and `peer_port` have what it was. */
#define FLOW_REMAPPED 1
/* The pod called itself: packets turn round at its link. */
#define FLOW_HAIRPIN 2
/* Not a hostPort's: the node itself uses a hostPort's number as its source port. */
#define FLOW_NODE 4
/*
 * The pod (of FLOW_NODE: the node) has sent FIN or RST: a SYN may take the entry over. What comes from
 * outside says nothing of the kind, since anybody can forge it: a pod ignores a RST with a wrong number.
 */
#define FLOW_CLOSED 8
/* The claim is that of any address. */
#define FLOW_ANY 16
/* Answers of a masqueraded flow (masqAll): the destination is put back to `peer`. */
#define FLOW_MASQUERADED 32
/* The peer has sent more than an opening packet: worth waiting for. */
#define FLOW_GOES_ON 64
/* The peer's last packet was FIN or RST: its port may be given away when ports are scarce. */
#define FLOW_PEER_CLOSED 128

struct flow {
	struct addr host;	/* original destination */
	struct addr peer;	/* original source, with REMAPPED, HAIRPIN or MASQUERADED */
	__be16 host_port;
	__be16 peer_port;
	__u32 flags;		/* FLOW_* */
	__u32 owner;		/* as in struct claim; 0 for FLOW_NODE */
#if LAYOUT >= 1
	__u32 last;		/* time of the last packet: CLOCK_MONOTONIC in 2^30 ns */
#endif
#if LAYOUT >= 2
	__u64 later;
#endif
};

/* Which port stands for the peer's, for REMAPPED, HAIRPIN and masqueraded flows. */
struct remap_key {
	struct addr peer;
	struct addr host;	/* original destination; masquerading: the pod */
	__be16 peer_port;
	__be16 host_port;	/* masquerading: containerPort */
	__u8 protocol;
	__u8 pad[3];
};

struct remap {
	__be16 port;
	__u16 pad;
};

/* A datagram whose first fragment was translated. */
struct fragment_key {
	struct addr source;
	struct addr destination;
	__be32 id;		/* IPv4: 16 bits, in the upper half of the bytes */
	__u8 protocol;
	__u8 outgoing;		/* 1: seen at egress */
	__u16 pad;
};

#define FRAGMENT_SOURCE 1
#define FRAGMENT_DESTINATION 2
#define FRAGMENT_BOUNCE 4
/* The first 6 bytes of `source` go into the frame (CLAIM_MAC); excludes FRAGMENT_SOURCE. */
#define FRAGMENT_MAC 8

struct fragment {
	struct addr source;
	struct addr destination;
	__u32 flags;		/* FRAGMENT_*: what is replaced */
	__u32 pad;
};

/* What a socket of the node called before its destination was replaced. */
struct socket_key {
	__u64 cookie;
	struct addr addr;	/* the pod's */
	__be16 port;
	__u8 protocol;
	__u8 pad;
	__u32 pad2;
};

struct socket_value {
	struct addr addr;
	__be16 port;
	__u16 pad;
};

/* The plugin knows the node's network namespace by `netns_cookie`. */
#define CONFIG_COOKIE 1
/*
 * The node's addresses are those that are listed, also for what comes from outside: the kernel's routes
 * call those of Services local as well, which kube-proxy binds to a device of the node (IPVS).
 */
#define CONFIG_LISTED_ONLY 2
/*
 * What no claim has: CLAIM_MASQUERADE, and an address of the node as its hostIP (but for loopback ones, which
 * no packet may have). Taken back before the first such claim is written, and given again when the last one
 * is gone. Most nodes have neither, so that there is less to ask for each packet.
 */
#define CONFIG_NO_MASQUERADE 4
#define CONFIG_NO_HOST_ADDRESS 8

/* The only entry of its map. */
struct config {
	__u64 netns_cookie;
	__u32 revision;		/* of the programs that are attached */
	__u32 flags;		/* CONFIG_* */
	/*
	 * Kernels from 5.7 to 5.13 have the cookie, and no way for a process to ask for its own: the
	 * plugin connects to this address, and the program keeps the cookie of who does.
	 */
	__be32 learn_address;
	__be16 learn_port;
	__u16 pad;
	/*
	 * Ports that sockets of the node get by themselves (ip_local_port_range); the last is 0 where the
	 * plugin has not said it. Others are chosen in a peer's stead.
	 */
	__u32 ephemeral_first;
	__u32 ephemeral_last;
	/*
	 * CLOCK_MONOTONIC in 2^30 ns until which another version's programs are being replaced, whose
	 * maps have connections that these do not.
	 */
	__u32 hold_until;
	__u32 pad_at_end;
};

/* Packets of one claim. Bytes are those of the IP packets. */
struct traffic {
	__u64 connections;
	__u64 packets_in;
	__u64 bytes_in;
	__u64 packets_out;
	__u64 bytes_out;
};

/* What became of packets that concern a hostPort: indices of the map of counters. */
enum reason {
	REASON_FORWARDED,	/* to the pod */
	REASON_ANSWERED,	/* from the pod */
	REASON_NEW_FLOW,
	REASON_HAIRPIN,
	REASON_REMAPPED,	/* the peer's port was taken */
	REASON_MASQUERADED,
	REASON_NODE_FLOW,	/* passed: the node's own, from a port that is a hostPort */
	REASON_NOT_LOCAL,	/* passed: to another node, or without a route */
	REASON_ICMP_IN,
	REASON_ICMP_OUT,
	REASON_FRAGMENT_IN,
	REASON_FRAGMENT_OUT,
	REASON_SCTP_CHECKSUM,	/* passed on with another port and a corrected CRC32c */
	REASON_CONNECT,
	REASON_SENDMSG,
	REASON_RECVMSG,
	REASON_PEERNAME,
	REASON_DROP_NO_PORT,	/* no port left for a peer */
	REASON_DROP_REWRITE,	/* the kernel refused to change a packet half-way */
	REASON_SCTP_FRAGMENT,	/* passed: its checksum needs the length of the whole datagram */
	REASON_HELD,		/* dropped: of a connection that an upgrade has not taken along yet */
	REASONS
};

#endif
