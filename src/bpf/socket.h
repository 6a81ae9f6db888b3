/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Sockets of the node itself: they call the pod instead of 127.0.0.1, ::1 or an address of the
 * node, and are told that it was those they called. Packets need no translation then.
 */
#ifndef PORTMAP_SOCKET_H
#define PORTMAP_SOCKET_H

#include <linux/in.h>

#include "flow.h"

static __always_inline void read_address(struct bpf_sock_addr *ctx, int ipv6, struct addr *to)
{
	if (ipv6) {
		to->w[0] = ctx->user_ip6[0];
		to->w[1] = ctx->user_ip6[1];
		to->w[2] = ctx->user_ip6[2];
		to->w[3] = ctx->user_ip6[3];
	} else {
		set_v4(to, ctx->user_ip4);
	}
}

static __always_inline void write_address(struct bpf_sock_addr *ctx, int ipv6,
					  const struct addr *from, __be16 port)
{
	if (ipv6) {
		ctx->user_ip6[0] = from->w[0];
		ctx->user_ip6[1] = from->w[1];
		ctx->user_ip6[2] = from->w[2];
		ctx->user_ip6[3] = from->w[3];
	} else {
		ctx->user_ip4 = from->w[3];
	}
	ctx->user_port = port;
}

/* An address that means this node to a socket: also 0.0.0.0 and ::, which connect to loopback. */
static __always_inline int means_node(const struct addr *a)
{
	__u32 *listed;

	if (is_v4(a)) {
		if (!a->w[3] || bpf_ntohl(a->w[3]) >> 24 == 127)
			return 1;
	} else if (!(a->w[0] | a->w[1] | a->w[2]) && bpf_ntohl(a->w[3]) <= 1) {
		return 1;
	}
	listed = bpf_map_lookup_elem(&pm_addresses, a);
	return listed && *listed;
}

/* What the socket called before, if its packets go where the key says. */
static __always_inline struct socket_value *find_called(const struct socket_key *key)
{
	if (key->protocol == IPPROTO_UDP)
		return bpf_map_lookup_elem(&pm_sockets, key);
	return bpf_map_lookup_elem(&pm_streams, key);
}

/* Remembers what the socket called; not again for every datagram. */
static __always_inline void remember(const struct socket_key *key, const struct addr *addr,
				     __be16 port)
{
	struct socket_value *known, value = { .addr = *addr, .port = port };

	if (key->protocol != IPPROTO_UDP) {
		bpf_map_update_elem(&pm_streams, key, &value, BPF_ANY);
		return;
	}
	known = bpf_map_lookup_elem(&pm_sockets, key);
	if (!known || known->port != port || !same_addr(&known->addr, addr))
		bpf_map_update_elem(&pm_sockets, key, &value, BPF_ANY);
}

/* A datagram of a connected socket. */
static __always_inline int is_connected(struct bpf_sock_addr *ctx, __u32 reason)
{
	struct bpf_sock *socket = ctx->sk;

	return reason == REASON_SENDMSG && socket && socket->state == BPF_TCP_ESTABLISHED;
}

static __always_inline void call(struct bpf_sock_addr *ctx, int ipv6, __u32 reason)
{
	struct claim_key claim_key __attribute__((aligned(8))) = {
		.port = ctx->user_port, .protocol = ctx->protocol,
	};
	struct socket_key key = { .protocol = claim_key.protocol };
	struct claim *claim;
	struct addr called __attribute__((aligned(8)));
	__u32 any;

	read_address(ctx, ipv6, &called);
	claim_key.addr = called;
	claim = find_claim(&claim_key, &any);
	if (!claim)
		return;
	key.cookie = bpf_get_socket_cookie(ctx);
	key.addr = claim->pod;
	key.port = claim->port;
	if (claim->flags & CLAIM_SELF) {
		/*
		 * The pod itself is called: its answers have its own address from now on. Unless the
		 * socket is connected: when an IPv6 one sends to a mapped IPv4 address, the kernel asks
		 * again, with what it is connected to.
		 */
		if (is_connected(ctx, reason))
			return;
		if (key.protocol == IPPROTO_UDP)
			bpf_map_delete_elem(&pm_sockets, &key);
		else
			bpf_map_delete_elem(&pm_streams, &key);
		return;
	}
	if (!means_node(&called))
		return;
	remember(&key, &called, claim_key.port);
	write_address(ctx, ipv6, &key.addr, key.port);
	count(reason);
	if (reason == REASON_CONNECT)
		count_connection(claim, &claim_key);
}

static __always_inline int concerns_claims(struct bpf_sock_addr *ctx)
{
	__u32 protocol = ctx->protocol;

	return (protocol == IPPROTO_TCP || protocol == IPPROTO_UDP) && port_known(ctx->user_port);
}

/* For kernels before 5.7, attached to cgroups that no pod is in. */
static __always_inline int call_any(struct bpf_sock_addr *ctx, int ipv6, __u32 reason)
{
	if (concerns_claims(ctx))
		call(ctx, ipv6, reason);
	return 1;
}

/* For the sockets of one network namespace. */
static __always_inline int call_gated(struct bpf_sock_addr *ctx, int ipv6, __u32 reason)
{
	struct config *config;

	if (!concerns_claims(ctx))
		return 1;
	config = find_config();
	if (config && config->flags & CONFIG_COOKIE &&
	    config->netns_cookie == bpf_get_netns_cookie(ctx))
		call(ctx, ipv6, reason);
	return 1;
}

/* Not 0: the plugin's own connection, which ends with EPERM here and has taught us the cookie. */
static __always_inline int learn(struct bpf_sock_addr *ctx)
{
	struct config *config = find_config();

	if (!config || !config->learn_port || (__be16)ctx->user_port != config->learn_port ||
	    ctx->user_ip4 != config->learn_address)
		return 0;
	config->netns_cookie = bpf_get_netns_cookie(ctx);
	config->learn_port = 0;
	return 1;
}

/* Whom a datagram is from, or whom the socket is connected to. */
static __always_inline int called(struct bpf_sock_addr *ctx, int ipv6, __u32 reason)
{
	struct socket_key key = { .port = ctx->user_port, .protocol = ctx->protocol };
	struct socket_value *value;

	if (!concerns_claims(ctx))
		return 1;
	key.cookie = bpf_get_socket_cookie(ctx);
	read_address(ctx, ipv6, &key.addr);
	value = find_called(&key);
	if (!value)
		return 1;
	write_address(ctx, ipv6, &value->addr, value->port);
	count(reason);
	return 1;
}

#endif
