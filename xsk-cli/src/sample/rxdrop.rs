//! Receive and drop.

use std::hint::spin_loop;

use xsk::Result;
use xsk::socket::{Interest, RxOnly};
use xsk::umem::Pool;

use super::{Counts, NAP, Turn};

/// Takes packets and gives their frames back to FILL, for as long as `go_on` says. It is asked once a
/// turn, with the counts so far.
pub(crate) fn run(
    xsk: &mut RxOnly,
    pool: &mut Pool,
    turn: Turn,
    mut go_on: impl FnMut(&Counts) -> bool,
) -> Result<Counts> {
    let mut counts = Counts::default();
    while go_on(&counts) {
        let taken = xsk.fill.extend(xsk.rx.take(turn.batch), |packet| {
            counts.rx_packets += 1;
            counts.rx_bytes += packet.len() as u64;
            packet.into_frame()
        });
        if taken != 0 {
            continue;
        }
        // Nothing in RX, or no room in FILL: frames of the pool may have taken it.
        for packet in xsk.rx.take(turn.batch) {
            counts.rx_packets += 1;
            counts.rx_bytes += packet.len() as u64;
            pool.put(packet);
        }
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
    Ok(counts)
}
