//! What programs do with packets, in both forms that the library offers.
//!
//! The `extend` forms move a batch from ring to ring in one call; the others take packets from an
//! iterator and push each. Every function is one batch, is compiled as one function, and has a
//! name of its own, so that instructions can be counted in it alone.

use xsk::{CompletionRing, FillRing, Packet, RxRing, TxRing};

/// The program's side of a socket.
#[derive(Debug)]
pub struct User {
    /// FILL.
    pub fill: FillRing,
    /// RX.
    pub rx: RxRing,
    /// TX.
    pub tx: TxRing,
    /// COMPLETION.
    pub completion: CompletionRing,
    /// What was read of the packets.
    pub sum: u64,
}

/// The first 8 bytes.
#[inline(always)]
fn head(packet: &[u8]) -> u64 {
    packet.first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes))
}

/// Swaps source and destination address, as whole words: what stays in memory costs a round trip.
#[inline(always)]
fn swap_macs(packet: &mut [u8]) {
    if let Some([d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5]) = packet.first_chunk_mut::<12>() {
        let to = (u32::from_ne_bytes([*d0, *d1, *d2, *d3]), u16::from_ne_bytes([*d4, *d5]));
        let from = (u32::from_ne_bytes([*s0, *s1, *s2, *s3]), u16::from_ne_bytes([*s4, *s5]));
        [*d0, *d1, *d2, *d3] = from.0.to_ne_bytes();
        [*d4, *d5] = from.1.to_ne_bytes();
        [*s0, *s1, *s2, *s3] = to.0.to_ne_bytes();
        [*s4, *s5] = to.1.to_ne_bytes();
    }
}

/// One batch of rxdrop, by `extend`.
#[inline(never)]
pub fn rxdrop_by_extend(user: &mut User, batch: u32) -> u32 {
    let mut sum = user.sum;
    let handled = user.fill.extend(user.rx.take(batch), |packet| {
        sum = sum.wrapping_add(head(&packet));
        packet.into_frame()
    });
    user.sum = sum;
    handled
}

/// One batch of rxdrop, packet by packet.
#[inline(never)]
pub fn rxdrop_by_push(user: &mut User, batch: u32) -> u32 {
    let mut sum = user.sum;
    let mut packets = user.rx.take(batch);
    let mut slots = user.fill.reserve(packets.left());
    let handled = slots.room();
    packets.limit(handled);
    for packet in packets {
        sum = sum.wrapping_add(head(&packet));
        if slots.push(packet.into_frame()).is_err() {
            break;
        }
    }
    user.sum = sum;
    handled
}

/// One batch of l2fwd, by `extend`.
#[inline(never)]
pub fn l2fwd_by_extend(user: &mut User, batch: u32) -> u32 {
    user.fill.extend_frames(user.completion.take(batch));
    user.tx.extend(user.rx.take(batch), |mut packet: Packet| {
        swap_macs(&mut packet);
        packet
    })
}

/// One batch of l2fwd, packet by packet.
#[inline(never)]
pub fn l2fwd_by_push(user: &mut User, batch: u32) -> u32 {
    let mut frames = user.completion.take(batch);
    let mut fill = user.fill.reserve(frames.left());
    frames.limit(fill.room());
    for frame in frames {
        if fill.push(frame).is_err() {
            break;
        }
    }
    drop(fill);
    let mut packets = user.rx.take(batch);
    let mut slots = user.tx.reserve(packets.left());
    let handled = slots.room();
    packets.limit(handled);
    for mut packet in packets {
        swap_macs(&mut packet);
        if slots.push(packet).is_err() {
            break;
        }
    }
    handled
}
