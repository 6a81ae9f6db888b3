/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * hostPorts: packets of devices, and sockets of the node.
 *
 * Nothing here needs a kernel's BTF, and the floor is 5.4: UAPI contexts and helpers, no global
 * data, loops with a constant bound (5.3). There are no functions but the programs, because
 * verifiers before 6.3 or so forget in their presence which constants do not matter, and walk many
 * more paths.
 *
 * Packets are passed on (TC_ACT_UNSPEC, which is TCX_NEXT), so that whatever else there is sees
 * them; except for a pod's packets to itself, which no stack would route.
 */
#include <stddef.h>

#include "maps.h"
#include "packet.h"
#include "local.h"
#include "flow.h"
#include "sctp.h"
#include "rewrite.h"
#include "fragment.h"
#include "ingress.h"
#include "egress.h"
#include "usual.h"
#include "socket.h"

/* <linux/if_packet.h> */
#define PACKET_BROADCAST 1
#define PACKET_MULTICAST 2

/* Carries the verdict out. `mac`: 0, or what goes into the frame. */
static __always_inline int finish(struct __sk_buff *skb, struct packet *p,
				  struct tuple *to, __u32 verdict, __u64 mac)
{
	__u64 unknown = unknown_of(skb);

	FORGET(verdict, unknown);
	FORGET(mac, unknown);
	/* What follows is walked once for all kinds of packets. */
	FORGET(p->offset, unknown);
	FORGET(p->icmp, unknown);
	FORGET(p->protocol, unknown);
	forget_tuple(to, unknown);
	if (verdict == DROP)
		return TC_ACT_SHOT;
	if (verdict == PASS)
		return TC_ACT_UNSPEC;
	if (rewrite(skb, p, to) || (mac && bpf_skb_store_bytes(skb, 0, &mac, ETH_ALEN, 0)) ||
	    (verdict == BOUNCE && bounce(skb))) {
		count(REASON_DROP_REWRITE);
		return TC_ACT_SHOT;
	}
	return verdict == BOUNCE ? bpf_redirect(skb->ifindex, 0) : TC_ACT_UNSPEC;
}

static __always_inline int finish_usual(__u32 verdict)
{
	if (verdict != DROP)
		return TC_ACT_UNSPEC;
	count(REASON_DROP_REWRITE);
	return TC_ACT_SHOT;
}

static __always_inline int ingress(struct __sk_buff *skb, __u32 at, int from_pod)
{
	struct packet p;
	struct tuple to;
	enum look look;
	__u32 verdict = PASS;
	__u64 mac = 0;

	if (skb->pkt_type == PACKET_BROADCAST || skb->pkt_type == PACKET_MULTICAST)
		return TC_ACT_UNSPEC;
	look = look_at(skb, at, from_pod ? FROM_POD : FROM_OUTSIDE);
	if (look == NOBODYS)
		return TC_ACT_UNSPEC;
	/* Not before: nearly all packets are nobody's. */
	p = (struct packet){};
	if (look == KNOWN) {
		verdict = forward_usual(skb, at, from_pod, &p, &to);
		if (verdict != PASS)
			return finish_usual(verdict);
	}
	if (parse(skb, &p, at) || is_reserved(&p.tuple.destination))
		return TC_ACT_UNSPEC;
	to = p.tuple;
	if (p.offset) {
		verdict = later_fragment(skb, &p, &to, 0, &mac);
	} else {
		if (from_pod && port_known(p.tuple.source_port))
			verdict = turn_back(&p, &to);
		if (verdict == PASS && port_known(p.tuple.destination_port))
			verdict = forward(skb, &p, &to, from_pod, &mac);
		if (from_pod || !at)
			mac = 0;
		FORGET(verdict, unknown_of(skb));
		if (p.more)
			verdict = first_fragment(skb, &p, &to, verdict, 0, mac);
	}
	return finish(skb, &p, &to, verdict, mac);
}

static __always_inline int egress(struct __sk_buff *skb, __u32 at)
{
	struct packet p;
	struct tuple to;
	enum look look;
	__u32 verdict = PASS;
	__u64 mac = 0;

	look = look_at(skb, at, LEAVING);
	if (look == NOBODYS)
		return TC_ACT_UNSPEC;
	p = (struct packet){};
	if (look == KNOWN) {
		verdict = answer_usual(skb, at, &p, &to);
		if (verdict != PASS)
			return finish_usual(verdict);
	}
	if (parse(skb, &p, at))
		return TC_ACT_UNSPEC;
	to = p.tuple;
	if (p.offset) {
		verdict = later_fragment(skb, &p, &to, 1, &mac);
	} else {
		if (port_known(p.tuple.source_port))
			verdict = answer(skb, &p, &to);
		if (verdict == PASS && !ruled_out(CONFIG_NO_MASQUERADE) &&
		    port_known(p.tuple.destination_port))
			verdict = masquerade(skb, &p, &to);
		FORGET(verdict, unknown_of(skb));
		if (p.more)
			verdict = first_fragment(skb, &p, &to, verdict, 1, 0);
	}
	return finish(skb, &p, &to, verdict, 0);
}

/* From outside; _l3: a device whose packets begin with the IP header. */
SEC("classifier") int pm_uplink_in(struct __sk_buff *skb)
{
	return ingress(skb, ETH_HLEN, 0);
}

SEC("classifier") int pm_uplink_in_l3(struct __sk_buff *skb)
{
	return ingress(skb, 0, 0);
}

/* From the host's end of a pod's link. */
SEC("classifier") int pm_pod_in(struct __sk_buff *skb)
{
	return ingress(skb, ETH_HLEN, 1);
}

/* To either. */
SEC("classifier") int pm_out(struct __sk_buff *skb)
{
	return egress(skb, ETH_HLEN);
}

SEC("classifier") int pm_out_l3(struct __sk_buff *skb)
{
	return egress(skb, 0);
}

SEC("cgroup/connect4") int pm_connect4(struct bpf_sock_addr *ctx)
{
	return learn(ctx) ? 0 : call_gated(ctx, 0, REASON_CONNECT);
}

SEC("cgroup/connect6") int pm_connect6(struct bpf_sock_addr *ctx)
{
	return call_gated(ctx, 1, REASON_CONNECT);
}

SEC("cgroup/sendmsg4") int pm_sendmsg4(struct bpf_sock_addr *ctx)
{
	return call_gated(ctx, 0, REASON_SENDMSG);
}

SEC("cgroup/sendmsg6") int pm_sendmsg6(struct bpf_sock_addr *ctx)
{
	return call_gated(ctx, 1, REASON_SENDMSG);
}

SEC("cgroup/connect4") int pm_connect4_any(struct bpf_sock_addr *ctx)
{
	return call_any(ctx, 0, REASON_CONNECT);
}

SEC("cgroup/connect6") int pm_connect6_any(struct bpf_sock_addr *ctx)
{
	return call_any(ctx, 1, REASON_CONNECT);
}

SEC("cgroup/sendmsg4") int pm_sendmsg4_any(struct bpf_sock_addr *ctx)
{
	return call_any(ctx, 0, REASON_SENDMSG);
}

SEC("cgroup/sendmsg6") int pm_sendmsg6_any(struct bpf_sock_addr *ctx)
{
	return call_any(ctx, 1, REASON_SENDMSG);
}

SEC("cgroup/recvmsg4") int pm_recvmsg4(struct bpf_sock_addr *ctx)
{
	return called(ctx, 0, REASON_RECVMSG);
}

SEC("cgroup/recvmsg6") int pm_recvmsg6(struct bpf_sock_addr *ctx)
{
	return called(ctx, 1, REASON_RECVMSG);
}

SEC("cgroup/getpeername4") int pm_peername4(struct bpf_sock_addr *ctx)
{
	return called(ctx, 0, REASON_PEERNAME);
}

SEC("cgroup/getpeername6") int pm_peername6(struct bpf_sock_addr *ctx)
{
	return called(ctx, 1, REASON_PEERNAME);
}

/* bpf_fib_lookup is for GPL-compatible programs. */
char _license[] SEC("license") = "GPL";
