//! Send the same packet again and again.

use std::hint::spin_loop;
use std::thread;
use std::time::Duration;

use xsk::umem::Pool;
use xsk::{Port, Result};

use super::NAP;

/// How long to sleep while every packet is on its way: no event tells when a frame comes back.
const ON_THE_WAY: Duration = Duration::from_micros(100);

/// What is sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    /// Bytes of each packet.
    pub(crate) len: u32,
    /// How many; `None` is no end.
    pub(crate) count: Option<u64>,
    /// Packets at a time.
    pub(crate) batch: u32,
}

impl Work {
    /// The work of threads that have so many queues each, of which every one sends the same.
    pub(crate) fn share_out(self, queues: &[usize]) -> Vec<Self> {
        let all = queues.iter().sum::<usize>().max(1);
        let mut before = 0;
        let part = |queues: &usize| {
            // What comes before is rounded down for all alike, so the parts are the whole.
            let until = |place: usize| {
                self.count.map(|count| (u128::from(count) * place as u128 / all as u128) as u64)
            };
            let begin = until(before);
            before += queues;
            let count = until(before).zip(begin).map(|(end, begin)| end - begin);
            Self { count, ..self }
        };
        queues.iter().map(part).collect()
    }
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

/// Sends frames that were prepared for as long as `go_on` says, or until all packets are sent. It is
/// asked once a turn, with how many were given to the kernel so far.
pub(crate) fn run(
    port: &mut Port,
    poll: bool,
    work: Work,
    mut go_on: impl FnMut(&mut [&mut Port], u64) -> bool,
) -> Result<()> {
    let goal = work.count.unwrap_or(u64::MAX);
    let mut given = 0;
    while given < goal && go_on(&mut [port], given) {
        let n = (goal - given).min(work.batch.into()) as u32;
        let made = port.generate(n, |umem, frame| umem.packet(frame, 0, work.len))?;
        given += u64::from(made);
        if made != 0 {
            continue;
        }
        if poll {
            port.wait_to_send(Some(NAP))?;
        } else {
            spin_loop();
        }
    }
    // What was given is to arrive as well, as long as nobody wants it to end.
    while given == goal && port.flush()? != 0 && go_on(&mut [port], given) {
        if poll {
            thread::sleep(ON_THE_WAY);
        } else {
            spin_loop();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_count_are_the_whole() {
        for (count, queues, expected) in [
            (1001, &[1, 1, 1][..], &[333, 334, 334][..]),
            (1000, &[2, 1, 1], &[500, 250, 250]),
            (2, &[1, 1, 1], &[0, 1, 1]),
            (u64::MAX, &[1], &[u64::MAX]),
        ] {
            let work = Work { len: 60, count: Some(count), batch: 1 };
            let parts: Vec<_> = work.share_out(queues).iter().map(|part| part.count.unwrap()).collect();
            assert_eq!(parts, expected);
        }
        let endless = Work { len: 60, count: None, batch: 1 };
        assert!(endless.share_out(&[1, 1]).iter().all(|part| part.count.is_none()));
    }
}
