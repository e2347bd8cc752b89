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
pub(crate) fn head(packet: &[u8]) -> u64 {
    packet.first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes))
}

/// Swaps source and destination address: two words in, two words out.
#[inline(always)]
pub(crate) fn swap_macs(packet: &mut [u8]) {
    if let Some(addresses) = packet.first_chunk_mut::<12>() {
        let [a, b, c, d, e, f, g, h, rest @ ..] = *addresses;
        let (first, last) = (u64::from_le_bytes([a, b, c, d, e, f, g, h]), u32::from_le_bytes(rest));
        let (head, tail) = addresses.split_at_mut(8);
        head.copy_from_slice(&(first >> 48 | u64::from(last) << 16 | first << 48).to_le_bytes());
        tail.copy_from_slice(&((first >> 16) as u32).to_le_bytes());
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
