/* rxdrop, txonly and l2fwd in C on libxdp: what `xsk` is compared with on an interface.
 * Copy mode, 4096 frames of 4096 bytes, rings of 2048. The last line is JSON. */

#include <errno.h>
#include <net/if.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include <linux/if_link.h>
#include <xdp/xsk.h>

#define FRAMES 4096
#define FRAME_SIZE 4096
#define RING 2048
#define LENGTH 64

#ifndef XDP_MAX_TX_SKB_BUDGET
#define XDP_MAX_TX_SKB_BUDGET 9
#endif

static volatile sig_atomic_t stopped;

static struct {
	struct xsk_ring_prod fill, tx;
	struct xsk_ring_cons rx, completion;
	struct xsk_umem *umem;
	struct xsk_socket *socket;
	int fd;
	char *memory;
	uint32_t batch;
	uint64_t packets;
	/* Given to TX, and not yet back. */
	uint32_t in_flight;
	/* Frames that are in no ring: those of txonly. */
	uint64_t idle[FRAMES];
	uint32_t idle_count;
} xsk;

static void stop(int signal)
{
	(void)signal;
	stopped = 1;
}

static void fail(const char *what, int error)
{
	fprintf(stderr, "%s: %s\n", what, strerror(error));
	exit(1);
}

static void wake_rx(void)
{
	if (xsk_ring_prod__needs_wakeup(&xsk.fill))
		recvfrom(xsk.fd, NULL, 0, MSG_DONTWAIT, NULL, NULL);
}

static void kick_tx(void)
{
	if (!xsk_ring_prod__needs_wakeup(&xsk.tx))
		return;
	if (sendto(xsk.fd, NULL, 0, MSG_DONTWAIT, NULL, 0) < 0 && errno != EAGAIN && errno != EBUSY &&
	    errno != ENOBUFS)
		fail("sendto", errno);
}

static void rxdrop(void)
{
	while (!stopped) {
		uint32_t rx, fill, n = xsk_ring_cons__peek(&xsk.rx, xsk.batch, &rx);

		if (!n) {
			wake_rx();
			continue;
		}
		while (xsk_ring_prod__reserve(&xsk.fill, n, &fill) != n)
			wake_rx();
		for (uint32_t i = 0; i < n; i++)
			*xsk_ring_prod__fill_addr(&xsk.fill, fill++) =
				xsk_ring_cons__rx_desc(&xsk.rx, rx++)->addr;
		xsk_ring_prod__submit(&xsk.fill, n);
		xsk_ring_cons__release(&xsk.rx, n);
		wake_rx();
		xsk.packets += n;
	}
}

static uint32_t take_completed(uint64_t *into)
{
	uint32_t completed, n = xsk_ring_cons__peek(&xsk.completion, RING, &completed);

	for (uint32_t i = 0; i < n; i++)
		into[i] = *xsk_ring_cons__comp_addr(&xsk.completion, completed++);
	if (n)
		xsk_ring_cons__release(&xsk.completion, n);
	return n;
}

static void txonly(void)
{
	while (!stopped) {
		uint32_t tx, n = take_completed(xsk.idle + xsk.idle_count);

		xsk.idle_count += n;
		xsk.packets += n;
		n = xsk.idle_count < xsk.batch ? xsk.idle_count : xsk.batch;
		if (n && xsk_ring_prod__reserve(&xsk.tx, n, &tx) == n) {
			for (uint32_t i = 0; i < n; i++) {
				struct xdp_desc *descriptor = xsk_ring_prod__tx_desc(&xsk.tx, tx++);

				descriptor->addr = xsk.idle[--xsk.idle_count];
				descriptor->len = LENGTH;
				descriptor->options = 0;
			}
			xsk_ring_prod__submit(&xsk.tx, n);
		}
		kick_tx();
	}
}

static void swap_macs(char *packet)
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

static void l2fwd(void)
{
	static uint64_t completed[RING];

	while (!stopped) {
		uint32_t rx, tx, fill, n = take_completed(completed);

		xsk.in_flight -= n;
		if (n) {
			while (xsk_ring_prod__reserve(&xsk.fill, n, &fill) != n)
				wake_rx();
			for (uint32_t i = 0; i < n; i++)
				*xsk_ring_prod__fill_addr(&xsk.fill, fill++) = completed[i];
			xsk_ring_prod__submit(&xsk.fill, n);
		}
		n = xsk_ring_cons__peek(&xsk.rx, xsk.batch, &rx);
		if (n && xsk_ring_prod__reserve(&xsk.tx, n, &tx) != n) {
			xsk_ring_cons__cancel(&xsk.rx, n);
			n = 0;
		}
		for (uint32_t i = 0; i < n; i++) {
			const struct xdp_desc *received = xsk_ring_cons__rx_desc(&xsk.rx, rx++);
			struct xdp_desc *sent = xsk_ring_prod__tx_desc(&xsk.tx, tx++);

			swap_macs(xsk_umem__get_data(xsk.memory, received->addr));
			sent->addr = received->addr;
			sent->len = received->len;
			sent->options = 0;
		}
		if (n) {
			xsk_ring_prod__submit(&xsk.tx, n);
			xsk_ring_cons__release(&xsk.rx, n);
			xsk.in_flight += n;
			xsk.packets += n;
		}
		wake_rx();
		if (xsk.in_flight)
			kick_tx();
	}
}

static void make_socket(const char *interface, uint32_t queue, int receives, int sends)
{
	struct xsk_umem_config umem = {
		.fill_size = RING,
		.comp_size = RING,
		.frame_size = FRAME_SIZE,
	};
	struct xsk_socket_config config = {
		.rx_size = RING,
		.tx_size = RING,
		.libxdp_flags = receives ? 0 : XSK_LIBXDP_FLAGS__INHIBIT_PROG_LOAD,
		.xdp_flags = XDP_FLAGS_DRV_MODE,
		.bind_flags = XDP_COPY | XDP_USE_NEED_WAKEUP,
	};
	uint32_t fill;
	int error;

	xsk.memory = mmap(NULL, (size_t)FRAMES * FRAME_SIZE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (xsk.memory == MAP_FAILED)
		fail("mmap", errno);
	error = xsk_umem__create(&xsk.umem, xsk.memory, (uint64_t)FRAMES * FRAME_SIZE, &xsk.fill,
				 &xsk.completion, &umem);
	if (error)
		fail("xsk_umem__create", -error);
	if (receives) {
		if (xsk_ring_prod__reserve(&xsk.fill, RING, &fill) != RING)
			fail("filling FILL", ENOSPC);
		for (uint32_t i = 0; i < RING; i++)
			*xsk_ring_prod__fill_addr(&xsk.fill, fill++) = (uint64_t)i * FRAME_SIZE;
		xsk_ring_prod__submit(&xsk.fill, RING);
	}
	error = xsk_socket__create(&xsk.socket, interface, queue, xsk.umem, receives ? &xsk.rx : NULL,
				   sends ? &xsk.tx : NULL, &config);
	if (error)
		fail("xsk_socket__create", -error);
	xsk.fd = xsk_socket__fd(xsk.socket);
	/* A call sends a whole batch, where the kernel (6.17) can do that. */
	if (sends && xsk.batch > 32)
		setsockopt(xsk.fd, SOL_XDP, XDP_MAX_TX_SKB_BUDGET, &xsk.batch, sizeof(xsk.batch));
}

/* A UDP packet of 64 bytes to port 9 of 198.18.0.2, in every frame. */
static void make_packets(void)
{
	uint8_t packet[LENGTH] = {
		0x02, 0, 0, 0, 0, 0x01, 0x02, 0, 0, 0, 0, 0x02, 0x08, 0x00,
		0x45, 0, 0, LENGTH - 14, 0, 0, 0, 0, 64, 17, 0, 0, 198, 18, 0, 1, 198, 18, 0, 2,
		0x03, 0xe8, 0, 9, 0, LENGTH - 34, 0, 0,
	};
	uint32_t sum = 0;

	for (int i = 14; i < 34; i += 2)
		sum += (uint32_t)packet[i] << 8 | packet[i + 1];
	sum = (sum & 0xffff) + (sum >> 16);
	sum = ~((sum & 0xffff) + (sum >> 16));
	packet[24] = (uint8_t)(sum >> 8);
	packet[25] = (uint8_t)sum;
	for (uint32_t i = 0; i < FRAMES; i++) {
		memcpy(xsk.memory + (size_t)i * FRAME_SIZE, packet, LENGTH);
		xsk.idle[xsk.idle_count++] = (uint64_t)i * FRAME_SIZE;
	}
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void usage(void)
{
	fprintf(stderr, "usage: socket <rxdrop|txonly|l2fwd> -i IF [-q QUEUE] [-b BATCH] [-d SECONDS]\n");
	exit(2);
}

int main(int argc, char **argv)
{
	const char *interface = NULL, *command = argc > 1 ? argv[1] : "";
	double seconds = 1, start;
	uint32_t queue = 0;
	void (*work)(void);
	int option;

	if (!strcmp(command, "rxdrop"))
		work = rxdrop;
	else if (!strcmp(command, "txonly"))
		work = txonly;
	else if (!strcmp(command, "l2fwd"))
		work = l2fwd;
	else
		usage();
	xsk.batch = 64;
	optind = 2;
	while ((option = getopt(argc, argv, "i:q:b:d:")) != -1) {
		switch (option) {
		case 'i':
			interface = optarg;
			break;
		case 'q':
			queue = (uint32_t)strtoul(optarg, NULL, 10);
			break;
		case 'b':
			xsk.batch = (uint32_t)strtoul(optarg, NULL, 10);
			break;
		case 'd':
			seconds = strtod(optarg, NULL);
			break;
		default:
			usage();
		}
	}
	if (!interface || optind != argc || !xsk.batch || xsk.batch > RING || seconds <= 0)
		usage();

	signal(SIGINT, stop);
	signal(SIGTERM, stop);
	signal(SIGALRM, stop);
	make_socket(interface, queue, work != txonly, work != rxdrop);
	if (work == txonly)
		make_packets();
	setitimer(ITIMER_REAL,
		  &(struct itimerval){ .it_value = { .tv_sec = (time_t)seconds,
						     .tv_usec = (suseconds_t)((seconds - (time_t)seconds) * 1e6) } },
		  NULL);
	start = now();
	work();
	seconds = now() - start;
	xsk_socket__delete(xsk.socket);
	xsk_umem__delete(xsk.umem);
	printf("{\"command\":\"%s\",\"packets\":%llu,\"seconds\":%.3f,\"pps\":%.0f}\n", command,
	       (unsigned long long)xsk.packets, seconds, (double)xsk.packets / seconds);
	return 0;
}
