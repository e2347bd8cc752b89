//! Send packets back out where they came in.

use std::hint::spin_loop;
use std::thread;
use std::time::Instant;

use xsk::Result;
use xsk::socket::{Interest, RxTx};
use xsk::umem::Pool;

use super::{Counts, DRAIN, NAP, Turn, transmit};

/// Moves packets from RX to TX, changed in place by `rewrite`, and sent frames to FILL, for as long as
/// `go_on` says. It is asked once a turn, with the counts so far.
///
/// Packets count as sent when they are completed; bytes already when they are given to TX, because a
/// completed frame doesn't tell the length of its packet.
pub(crate) fn run(
    xsk: &mut RxTx,
    pool: &mut Pool,
    turn: Turn,
    mut rewrite: impl FnMut(&mut [u8]),
    mut go_on: impl FnMut(&Counts) -> bool,
) -> Result<Counts> {
    let mut counts = Counts::default();
    let mut pushed = 0;
    while go_on(&counts) {
        let completed = xsk.fill.extend_frames(xsk.completion.take(turn.batch));
        counts.tx_packets += u64::from(completed);

        // What TX has no room for stays in RX until the next turn.
        let mut bytes = 0;
        let taken = xsk.tx.extend(xsk.rx.take(turn.batch), |mut packet| {
            rewrite(&mut packet);
            pushed += 1;
            bytes += packet.len() as u64;
            packet
        });
        counts.rx_packets = pushed;
        counts.rx_bytes += bytes;
        counts.tx_bytes += bytes;

        if taken != 0 || xsk.tx.pending() != 0 || (pushed != counts.tx_packets && xsk.socket.is_zero_copy()) {
            transmit(&xsk.socket, &xsk.tx, &mut counts)?;
        }
        if taken != 0 || completed != 0 {
            continue;
        }
        // Nothing in COMPLETION, or no room in FILL: frames of the pool may have taken it.
        counts.tx_packets += u64::from(xsk.completion.drain_into(pool));
        // A NIC holds frames beyond those in FILL, which makes room for more.
        xsk.fill.refill(pool, turn.batch);
        if turn.poll {
            xsk.socket.wait(Interest::Rx, Some(NAP))?;
        } else if xsk.fill.needs_wakeup() {
            xsk.socket.wake_rx()?;
        } else {
            spin_loop();
        }
    }
    counts.tx_unfinished = pushed - counts.tx_packets;
    Ok(counts)
}

/// Waits a while for what is still on its way.
pub(crate) fn drain(xsk: &mut RxTx, pool: &mut Pool, counts: &mut Counts) -> Result<()> {
    let deadline = Instant::now() + DRAIN;
    while counts.tx_unfinished != 0 && Instant::now() < deadline {
        let completed = u64::from(xsk.completion.drain_into(pool));
        counts.tx_packets += completed;
        counts.tx_unfinished -= completed.min(counts.tx_unfinished);
        if completed == 0 {
            transmit(&xsk.socket, &xsk.tx, counts)?;
            thread::yield_now();
        }
    }
    Ok(())
}

/// Swaps source and destination MAC address, in registers.
#[inline(always)]
pub(crate) fn swap_macs(packet: &mut [u8]) {
    if let Some(header) = packet.first_chunk_mut::<12>() {
        let [a, b, c, d, e, f, u, v, w, x, y, z] = *header;
        *header = [u, v, w, x, y, z, a, b, c, d, e, f];
    }
}

/// Turns a UDP packet over IPv4 into its own answer: MAC addresses, IP addresses and ports swapped.
/// The checksums stay valid, because they are sums of the same words. Anything else stays as it is.
#[inline]
pub(crate) fn reflect(packet: &mut [u8]) {
    const IPV4: usize = 14;
    const UDP: usize = IPV4 + 20;
    let plain = packet.len() >= UDP + 8
        && packet[12..14] == [0x08, 0x00]
        && packet[IPV4] == 0x45
        && packet[IPV4 + 9] == 17;
    if plain {
        swap_macs(packet);
        packet[IPV4 + 12..IPV4 + 20].rotate_left(4);
        packet[UDP..UDP + 4].rotate_left(2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_are_swapped_and_nothing_else() {
        let mut packet: Vec<u8> = (0..64).collect();
        swap_macs(&mut packet);
        let swapped: Vec<u8> = (6..12).chain(0..6).chain(12..64).collect();
        assert_eq!(packet, swapped);
        let mut short = [1; 11];
        swap_macs(&mut short);
        assert_eq!(short, [1; 11]);
    }

    #[test]
    fn a_reflected_packet_is_a_valid_answer() {
        let build = |reversed: bool| {
            let [a, b] = [([2, 0, 0, 0, 0, 1], [10, 0, 0, 1], 1000), ([2, 0, 0, 0, 0, 2], [10, 0, 0, 2], 7)];
            let (from, to) = if reversed { (b, a) } else { (a, b) };
            let mut frame = Vec::new();
            etherparse::PacketBuilder::ethernet2(from.0, to.0)
                .ipv4(from.1, to.1, 64)
                .udp(from.2, to.2)
                .write(&mut frame, b"ping pong")
                .unwrap();
            frame
        };
        let mut packet = build(false);
        reflect(&mut packet);
        assert_eq!(packet, build(true));
        let mut other = vec![7; 60];
        reflect(&mut other);
        assert_eq!(other, [7; 60]);
    }
}
