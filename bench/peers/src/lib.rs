//! xsk beside C.
//!
//! Two programs: `rings` runs the loops of `bench/rings` and the same in C over the same memory,
//! against a fake kernel; `wire` runs whole programs over a veth pair. This library is what they
//! share: the loops in C as Rust sees them.

use core::marker::PhantomData;
use core::ptr::NonNull;

use xsk_bench::{Bench, Kernel, RING, RawRing, Work};

/// Where the build put the program in C.
pub const C_PROGRAM: &str = env!("C_PROGRAM");

#[repr(C)]
struct Opaque {
    _private: [u8; 0],
}

// SAFETY: these are the functions of `c/loops.c`, of these types.
unsafe extern "C" {
    fn peer_new(rings: *const RawRing, size: u32, umem: *mut u8) -> Option<NonNull<Opaque>>;
    fn peer_end(peer: NonNull<Opaque>) -> u64;
    fn peer_rxdrop(peer: NonNull<Opaque>, batch: u32) -> u32;
    fn peer_l2fwd(peer: NonNull<Opaque>, batch: u32) -> u32;
}

/// The program's side of a bench's rings, worked in C.
#[derive(Debug)]
pub struct Peer<'b> {
    peer: NonNull<Opaque>,
    bench: PhantomData<&'b mut Bench>,
}

impl core::fmt::Debug for Opaque {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Peer")
    }
}

impl<'b> Peer<'b> {
    /// Lends the rings and the UMEM of `bench` to C, and its far side to the fake kernel.
    ///
    /// # Panics
    ///
    /// When there is no memory.
    pub fn new(bench: &'b mut Bench) -> (Self, Kernel) {
        let (rings, umem, kernel) = bench.lend();
        // SAFETY: the rings are of this size, and the bench is borrowed for as long as the peer lives.
        let peer = unsafe { peer_new(rings.as_ptr(), RING, umem) }.expect("memory for a peer");
        (Self { peer, bench: PhantomData }, kernel)
    }

    /// One batch.
    pub fn step(&mut self, work: Work, batch: u32) -> u32 {
        // SAFETY: the peer lives, and is worked by one caller at a time.
        unsafe {
            match work {
                Work::RxDrop => peer_rxdrop(self.peer, batch),
                Work::L2Fwd => peer_l2fwd(self.peer, batch),
            }
        }
    }
}

impl Drop for Peer<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `peer_new`, and ended once.
        std::hint::black_box(unsafe { peer_end(self.peer) });
    }
}
