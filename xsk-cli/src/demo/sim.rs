//! The demo's parts on the simulated kernel: its time passes when it is told so, between the turns of a
//! loop.

use std::time::{Duration, Instant};

use xsk::Device;
use xsk::kernel::Errno;
use xsk_sim::Sim;

use super::{PACKET, Part, REST, RoundTrips, Stage, all_arrived, forward, receive, send, until};
use crate::failure::Failure;
use crate::sample::l2fwd;

/// The device that the loops work on, and the other one on its wire.
const HERE: &str = "sim0";
const THERE: &str = "sim1";

/// Packets put on the wire between two turns.
const BURST: usize = 64;

/// The two devices of a simulated kernel and the wire between them.
#[derive(Debug, Default)]
pub(super) struct Wire(Sim);

fn refused(errno: Errno) -> Failure {
    let remedy = "please report it".to_owned();
    Failure::new(
        "cannot use the simulated wire",
        errno.to_string(),
        "It takes every packet that fits.",
        remedy,
    )
}

/// A UDP packet to `HERE`.
fn packet() -> Vec<u8> {
    let builder = etherparse::PacketBuilder::ethernet2([2, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 1])
        .ipv4([198, 18, 0, 1], [198, 18, 0, 2], 64)
        .udp(1000, 9);
    let payload = vec![0; PACKET - builder.size(0)];
    let mut packet = Vec::with_capacity(PACKET);
    builder.write(&mut packet, &payload).expect("a vector takes all, and the length fits");
    packet
}

impl Wire {
    fn device(&self) -> Result<Device, Failure> {
        Ok(self.0.device(HERE)?)
    }

    /// Puts packets on the wire and has them arrive.
    fn feed(&self, packet: &[u8], n: usize) -> Result<(), Errno> {
        for _ in 0..n {
            self.0.inject(HERE, packet)?;
        }
        self.0.run();
        Ok(())
    }

    /// Has everything arrive; tells how many packets came out at the other end.
    fn collect(&self) -> Result<u64, Errno> {
        self.0.run();
        Ok(self.0.stack(THERE)?.len() as u64)
    }
}

impl Stage for Wire {
    fn rxdrop(&self, time: Duration) -> Result<Part, Failure> {
        let packet = packet();
        let (mut sent, mut fed) = (0, Ok(()));
        let mut in_time = until(Instant::now() + time);
        let mut in_patience = until(Instant::now() + time + REST);
        let done = receive(&self.device()?, |received| {
            if fed.is_err() || !in_time(received) {
                // All that was sent has arrived; the loop takes what is left.
                return fed.is_ok() && received < sent && in_patience(received);
            }
            fed = self.feed(&packet, BURST);
            sent += BURST as u64;
            true
        })?;
        fed.map_err(refused)?;
        let received = done.received;
        Ok(done.into_part(all_arrived(sent, received, "received")))
    }

    fn txonly(&self, time: Duration) -> Result<Part, Failure> {
        let mut arrived = Ok(0);
        let mut in_time = until(Instant::now() + time);
        let done = send(&self.device()?, &packet(), |given| {
            arrived = arrived.and_then(|n| Ok(n + self.collect()?));
            arrived.is_ok() && in_time(given)
        })?;
        let arrived = arrived.and_then(|n| Ok(n + self.collect()?)).map_err(refused)?;
        let sent = done.sent;
        Ok(done.into_part(all_arrived(sent, arrived, "arrived")))
    }

    fn l2fwd(&self, time: Duration) -> Result<Part, Failure> {
        let packet = packet();
        let (mut sent, mut arrived) = (0, Ok(0));
        let mut in_time = until(Instant::now() + time);
        let mut in_patience = until(Instant::now() + time + REST);
        let done = forward(&self.device()?, "l2fwd", l2fwd::swap_macs, |forwarded| {
            arrived = arrived.and_then(|n| Ok(n + self.collect()?));
            if arrived.is_err() || !in_time(forwarded) {
                return arrived.is_ok() && forwarded < sent && in_patience(forwarded);
            }
            arrived = arrived.and_then(|n| self.feed(&packet, BURST).map(|()| n));
            sent += BURST as u64;
            true
        })?;
        let arrived = arrived.and_then(|n| Ok(n + self.collect()?)).map_err(refused)?;
        Ok(done.into_part(all_arrived(sent, arrived, "came back")))
    }

    fn latency(&self, time: Duration) -> Result<Part, Failure> {
        let packet = packet();
        let mut times = Vec::new();
        let mut asked: Option<Instant> = None;
        let deadline = Instant::now() + time;
        let mut ping = || -> Result<bool, Errno> {
            if self.collect()? != 0 {
                times.extend(asked.take().map(|asked| asked.elapsed()));
            }
            if asked.is_none() && Instant::now() < deadline {
                asked = Some(Instant::now());
                self.feed(&packet, 1)?;
            }
            // A lost answer would be waited for without end.
            Ok(asked.is_some_and(|asked| asked.elapsed() < REST))
        };
        let mut last = Ok(true);
        let done = forward(&self.device()?, "latency", l2fwd::reflect, |_| {
            last = ping();
            last == Ok(true)
        })?;
        last.map_err(refused)?;
        Ok(done.into_latency(RoundTrips::new(times), None))
    }
}
