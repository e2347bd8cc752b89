/* The loops of bench/rings in C, on libxdp's own inline functions: the leanest that a C program is,
 * for aligned chunks alone, without a check of what the kernel hands back. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <xdp/xsk.h>

/* As RawRing in bench/rings. */
struct raw_ring {
	uint32_t *producer;
	uint32_t *consumer;
	uint32_t *flags;
	void *entries;
};

struct peer {
	struct xsk_ring_prod fill, tx;
	struct xsk_ring_cons rx, completion;
	void *umem;
	uint64_t sum;
};

static void join_prod(struct xsk_ring_prod *ring, const struct raw_ring *raw, uint32_t size)
{
	ring->mask = size - 1;
	ring->size = size;
	ring->producer = raw->producer;
	ring->consumer = raw->consumer;
	ring->flags = raw->flags;
	ring->ring = raw->entries;
	ring->cached_prod = *raw->producer;
	ring->cached_cons = *raw->consumer + size;
}

static void join_cons(struct xsk_ring_cons *ring, const struct raw_ring *raw, uint32_t size)
{
	ring->mask = size - 1;
	ring->size = size;
	ring->producer = raw->producer;
	ring->consumer = raw->consumer;
	ring->flags = raw->flags;
	ring->ring = raw->entries;
	ring->cached_prod = *raw->producer;
	ring->cached_cons = *raw->consumer;
}

/* Rings: FILL, RX, TX, COMPLETION. */
struct peer *peer_new(const struct raw_ring rings[4], uint32_t size, void *umem)
{
	struct peer *peer = calloc(1, sizeof(*peer));

	if (!peer)
		return NULL;
	join_prod(&peer->fill, &rings[0], size);
	join_cons(&peer->rx, &rings[1], size);
	join_prod(&peer->tx, &rings[2], size);
	join_cons(&peer->completion, &rings[3], size);
	peer->umem = umem;
	return peer;
}

uint64_t peer_end(struct peer *peer)
{
	uint64_t sum = peer->sum;

	free(peer);
	return sum;
}

/* One batch: reads the first 8 bytes of each packet, and RX goes to FILL. */
__attribute__((noinline)) uint32_t peer_rxdrop(struct peer *peer, uint32_t batch)
{
	uint64_t sum = peer->sum;
	uint32_t rx, fill, n;

	n = xsk_ring_cons__peek(&peer->rx, batch, &rx);
	if (!n)
		return 0;
	if (xsk_ring_prod__reserve(&peer->fill, n, &fill) != n) {
		xsk_ring_cons__cancel(&peer->rx, n);
		return 0;
	}
	for (uint32_t i = 0; i < n; i++) {
		uint64_t addr = xsk_ring_cons__rx_desc(&peer->rx, rx++)->addr;
		uint64_t head;

		memcpy(&head, xsk_umem__get_data(peer->umem, addr), sizeof(head));
		sum += head;
		*xsk_ring_prod__fill_addr(&peer->fill, fill++) = addr;
	}
	peer->sum = sum;
	xsk_ring_prod__submit(&peer->fill, n);
	xsk_ring_cons__release(&peer->rx, n);
	return n;
}

static inline void swap_macs(char *packet)
{
	uint64_t first, swapped;
	uint32_t last;

	/* Two words in, two words out (little-endian). */
	memcpy(&first, packet, sizeof(first));
	memcpy(&last, packet + 8, sizeof(last));
	swapped = first >> 48 | (uint64_t)last << 16 | first << 48;
	last = (uint32_t)(first >> 16);
	memcpy(packet, &swapped, sizeof(swapped));
	memcpy(packet + 8, &last, sizeof(last));
}

/* One batch: COMPLETION goes to FILL; MAC addresses are swapped, and RX goes to TX. */
__attribute__((noinline)) uint32_t peer_l2fwd(struct peer *peer, uint32_t batch)
{
	uint32_t source, target, n;

	n = xsk_ring_cons__peek(&peer->completion, batch, &source);
	if (n && xsk_ring_prod__reserve(&peer->fill, n, &target) == n) {
		for (uint32_t i = 0; i < n; i++)
			*xsk_ring_prod__fill_addr(&peer->fill, target++) =
				*xsk_ring_cons__comp_addr(&peer->completion, source++);
		xsk_ring_prod__submit(&peer->fill, n);
		xsk_ring_cons__release(&peer->completion, n);
	} else if (n) {
		xsk_ring_cons__cancel(&peer->completion, n);
	}

	n = xsk_ring_cons__peek(&peer->rx, batch, &source);
	if (!n)
		return 0;
	if (xsk_ring_prod__reserve(&peer->tx, n, &target) != n) {
		xsk_ring_cons__cancel(&peer->rx, n);
		return 0;
	}
	for (uint32_t i = 0; i < n; i++) {
		const struct xdp_desc *received = xsk_ring_cons__rx_desc(&peer->rx, source++);
		uint64_t addr = received->addr;
		uint32_t len = received->len;
		struct xdp_desc *sent = xsk_ring_prod__tx_desc(&peer->tx, target++);

		swap_macs(xsk_umem__get_data(peer->umem, addr));
		sent->addr = addr;
		sent->len = len;
		sent->options = 0;
	}
	xsk_ring_prod__submit(&peer->tx, n);
	xsk_ring_cons__release(&peer->rx, n);
	return n;
}
