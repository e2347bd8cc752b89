//! The user half of AF_XDP, measured alone.
//!
//! A socket's four rings lie in ordinary memory, laid out as the kernel lays them out, and a fake
//! kernel works their far side in bursts. What is measured is the program's side only: the loops
//! in [`loops`], written against the public interface of `xsk` and compiled as a user's crate is.
//!
//! - [`Bench`] is the memory: rings and UMEM. It outlives every run, so that all that is compared
//!   works on the same cache lines.
//! - [`Kernel`] is the far side of the rings.
//! - [`User`] is the near side, and [`loops`] what it does.
//! - [`Fake`] is the same kernel with sockets and an interface, as a [`Port`](xsk::Port) needs one;
//!   [`turns`] are whole turns of programs, over the rings and by `Port`.
//! - [`measure`] runs a loop and clocks it; [`stats`] makes sense of the figures.

mod fake;
mod kernel;
pub mod loops;
mod memory;
pub mod stats;
pub mod turns;

use std::time::{Duration, Instant};

pub use fake::Fake;
pub use kernel::Kernel;
pub use loops::User;
pub use memory::{Bench, Layout, RawRing};

/// Entries of each ring.
pub const RING: u32 = 2048;
/// Frames that go around. They fit FILL, so no loop ever runs out of room.
pub const FRAMES: u32 = 2048;
/// Bytes of a chunk.
pub const CHUNK: u32 = 4096;
/// Packets that the fake kernel delivers at a time. A kernel that sends later has so many frames at
/// most: with more than a quarter of FILL away, a port would look for others.
pub const BURST: u32 = RING / 4;

/// The kernel's half, in bursts.
pub trait FarSide {
    /// "Receives" up to `n` packets; returns how many there were frames for.
    fn receive(&mut self, n: u32) -> u32;

    /// "Sends" up to `n` packets; returns how many there were.
    fn transmit(&mut self, n: u32) -> u32;
}

/// What a program does with its packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Reads the first 8 bytes of each packet and gives its frame back: RX to FILL.
    RxDrop,
    /// Swaps the MAC addresses of each packet and sends it: RX to TX, COMPLETION to FILL.
    L2Fwd,
}

impl Work {
    /// Both.
    pub const ALL: [Self; 2] = [Self::RxDrop, Self::L2Fwd];

    /// Its name, as on a command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::RxDrop => "rxdrop",
            Self::L2Fwd => "l2fwd",
        }
    }
}

/// Runs `step`, which handles up to a batch of packets, over at least `packets` packets.
///
/// Returns how many there were and how long they took in `step`. The kernel's half is outside of
/// the clock, one burst at a time.
///
/// # Panics
///
/// When packets get lost.
pub fn measure(
    kernel: &mut impl FarSide,
    work: Work,
    packets: u64,
    mut step: impl FnMut() -> u32,
) -> (u64, Duration) {
    let (mut done, mut spent) = (0, Duration::ZERO);
    while done < packets {
        if work == Work::L2Fwd {
            kernel.transmit(RING);
        }
        let got = kernel.receive(BURST);
        assert_eq!(got, BURST, "the kernel ran out of frames");
        let start = Instant::now();
        let mut handled = 0;
        while handled < got {
            match step() {
                0 => break,
                n => handled += n,
            }
        }
        spent += start.elapsed();
        assert_eq!(handled, got, "packets got lost");
        done += u64::from(handled);
    }
    (done, spent)
}
