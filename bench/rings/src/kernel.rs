//! The far side of the rings.

use xsk::abi::{Descriptor, XDP_PACKET_HEADROOM};
use xsk::ring::{Consumer, Producer};

use crate::{Bench, CHUNK, FarSide, Layout};

/// Bytes of every received packet.
const LENGTH: u32 = 60;

/// A kernel that does nothing but move entries: FILL to RX, TX to COMPLETION.
///
/// It never touches a packet, so nothing but the program decides what is in the cache.
#[derive(Debug)]
pub struct Kernel {
    fill: Consumer<u64>,
    rx: Producer<Descriptor>,
    tx: Consumer<Descriptor>,
    completion: Producer<u64>,
    layout: Layout,
}

impl Kernel {
    pub(crate) fn new(bench: &Bench) -> Self {
        let rings = bench.rings();
        // SAFETY: a bench has one kernel at a time, and the user's side is of the same types.
        unsafe {
            Self {
                fill: Consumer::new(rings.fill.clone()),
                rx: Producer::new(rings.rx.clone()),
                tx: Consumer::new(rings.tx.clone()),
                completion: Producer::new(rings.completion.clone()),
                layout: bench.layout(),
            }
        }
    }
}

impl FarSide for Kernel {
    #[inline(never)]
    fn receive(&mut self, n: u32) -> u32 {
        let mut rx = self.rx.reserve(n);
        let room = rx.room();
        // Once for the frames that were seen before, and once for those since.
        while rx.room() != 0 && self.fill.available() != 0 {
            for addr in self.fill.take(rx.room()) {
                let chunk = addr & !u64::from(CHUNK - 1);
                let start = u64::from(XDP_PACKET_HEADROOM) + self.layout.stagger(chunk / u64::from(CHUNK));
                if !rx.push(Descriptor { addr: chunk + start, len: LENGTH, options: 0 }) {
                    break;
                }
            }
        }
        room - rx.room()
    }

    #[inline(never)]
    fn transmit(&mut self, n: u32) -> u32 {
        let mut completion = self.completion.reserve(n);
        let room = completion.room();
        for descriptor in self.tx.take(room) {
            if !completion.push(descriptor.addr) {
                break;
            }
        }
        room - completion.room()
    }
}
