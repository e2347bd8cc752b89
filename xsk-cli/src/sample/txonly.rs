//! Send the same packet again and again.

use std::hint::spin_loop;
use std::thread;
use std::time::{Duration, Instant};

use xsk::Result;
use xsk::socket::{Interest, TxOnly};
use xsk::umem::Pool;

use super::{Counts, DRAIN, NAP, Turn, transmit};

/// How long to sleep while every frame is on its way: no event tells when one comes back.
const ON_THE_WAY: Duration = Duration::from_micros(100);

/// What is sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    /// Bytes of each packet.
    pub(crate) len: u32,
    /// How many; `None` is no end.
    pub(crate) count: Option<u64>,
}

/// Writes the packet into every frame of the pool. A frame that was sent still holds it.
pub(crate) fn prepare(pool: &mut Pool, packet: &[u8]) {
    let mut prepared: Vec<_> = std::iter::from_fn(|| pool.packet(0, packet.len() as u32)).collect();
    for frame in &mut prepared {
        frame.copy_from_slice(packet);
    }
    // Backwards, so that they leave in the order of their addresses.
    for frame in prepared.into_iter().rev() {
        pool.put(frame);
    }
}

/// Sends prepared frames for as long as `go_on` says, or until all are sent. It is asked once a turn,
/// with the counts so far.
pub(crate) fn run(
    xsk: &mut TxOnly,
    pool: &mut Pool,
    turn: Turn,
    work: Work,
    mut go_on: impl FnMut(&Counts) -> bool,
) -> Result<Counts> {
    let mut counts = Counts::default();
    let goal = work.count.unwrap_or(u64::MAX);
    let mut pushed = 0;
    while counts.tx_packets < goal && go_on(&counts) {
        let completed = reclaim(xsk, pool, turn.batch, work.len, &mut counts);

        let wanted = (goal - pushed).min(turn.batch.into()).min(pool.len() as u64) as u32;
        let mut slots = xsk.tx.reserve(wanted);
        let room = slots.room();
        for _ in 0..room {
            let Some(packet) = pool.packet(0, work.len) else { break };
            if let Err(refused) = slots.push(packet) {
                pool.put(refused.into_inner());
                break;
            }
            pushed += 1;
        }
        drop(slots);

        if room != 0 || xsk.tx.pending() != 0 || (pushed != counts.tx_packets && xsk.socket.is_zero_copy()) {
            transmit(&xsk.socket, &xsk.tx, &mut counts)?;
        } else if completed == 0 {
            if !turn.poll {
                spin_loop();
            } else if xsk.socket.wait(Interest::Tx, Some(NAP))?.tx {
                thread::sleep(ON_THE_WAY);
            }
        }
    }
    counts.tx_unfinished = pushed - counts.tx_packets;
    Ok(counts)
}

/// Waits a while for what is still on its way.
pub(crate) fn drain(xsk: &mut TxOnly, pool: &mut Pool, len: u32, counts: &mut Counts) -> Result<()> {
    let deadline = Instant::now() + DRAIN;
    while counts.tx_unfinished != 0 && Instant::now() < deadline {
        let completed = u64::from(reclaim(xsk, pool, u32::MAX, len, counts));
        counts.tx_unfinished -= completed.min(counts.tx_unfinished);
        if completed == 0 {
            transmit(&xsk.socket, &xsk.tx, counts)?;
            thread::yield_now();
        }
    }
    Ok(())
}

/// Takes up to `n` sent frames back.
#[inline(always)]
fn reclaim(xsk: &mut TxOnly, pool: &mut Pool, n: u32, len: u32, counts: &mut Counts) -> u32 {
    let mut completed = 0;
    for frame in xsk.completion.take(n) {
        pool.put(frame);
        completed += 1;
    }
    counts.tx_packets += u64::from(completed);
    counts.tx_bytes += u64::from(completed) * u64::from(len);
    completed
}
