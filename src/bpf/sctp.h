/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * SCTP's CRC32c (RFC 9260, appendix A) after a change of the ports, without reading the packet.
 *
 * The CRC is linear over GF(2): it changes by the CRC, without its constants, of the difference of
 * the two packets. That is 4 bytes, of the ports, and then zeros up to the end, and a zero byte
 * multiplies by x^8. So the change is difference * x^(8 * length) modulo the polynomial.
 */
#ifndef PORTMAP_SCTP_H
#define PORTMAP_SCTP_H

#include "packet.h"

/* Castagnoli's polynomial, bit 31 for x^0. */
#define CRC32C 0x82f63b78

/* x^0 in the upper half of a number. */
#define ONE ((__u64)1 << 63)

/* power * change modulo the polynomial, with the power in the upper half. */
static __always_inline __u64 multiply(__u64 power, __u64 change)
{
	__u64 product = 0;

#pragma clang loop unroll_count(2)
	for (__u64 i = 0; i < 32; i++) {
		__u64 low = change & 1;

		WHOLE(low);
		product ^= change & ((__s64)power >> 63);
		power <<= 1;
		change = change >> 1 ^ low * CRC32C;
	}
	return product;
}

/*
 * What to add (exclusive or) to the checksum of `length` bytes, as little-endian numbers. Without
 * a branch that depends on the packet: the verifier walks through it once.
 */
static __always_inline __u32 crc_change(__be32 ports, __be32 new_ports, __u32 length)
{
	/* x^(8 * 2^n). Unrolled below: as data, it would be a map that old kernels do not know. */
	const __u32 powers[16] = {
		0x00800000, 0x00008000, 0x82f63b78, 0x6ea2d55c, 0x18b8ea18, 0x510ac59a,
		0xb82be955, 0xb8fdb1e7, 0x88e56f72, 0x74c360a4, 0xe4172b16, 0x0d65762a,
		0x35d73a62, 0x28461564, 0xbf455269, 0xe2ea32dc,
	};
	__u64 change = __le32_to_cpu(ports ^ new_ports);

#pragma clang loop unroll(full)
	for (int n = 0; n < 16; n++) {
		__u64 power = (__u64)powers[n] << 32, bit = length >> n & 1;

		WHOLE(bit);
		change = multiply(ONE ^ (power ^ ONE) * bit, change);
	}
	return change;
}

#endif
