//! A kernel for tests: the far end of a socket's four rings, made of the library's own ring types.

#![allow(dead_code, unreachable_pub, missing_debug_implementations, reason = "each test uses a part")]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use xsk::abi::Descriptor;
use xsk::kernel::Mapping;
use xsk::ring::{Consumer, Producer, RingMemory};
use xsk::umem::{Pair, Umem};
use xsk::{CompletionRing, FillRing, Pool, RxRing, TxRing};

/// Bytes of a packet that the kernel makes.
pub const LENGTH: u32 = 64;

/// Bytes of a chunk.
pub const CHUNK: u32 = 2048;

/// A UMEM of `frames` frames.
pub fn umem(frames: u32, ledger: bool) -> (Umem, Pool) {
    Umem::builder().frames(frames).chunk_size(CHUNK).ledger(ledger).build().unwrap()
}

/// The program's side of a socket's rings.
pub struct Rings {
    pub fill: FillRing,
    pub rx: RxRing,
    pub tx: TxRing,
    pub completion: CompletionRing,
}

/// The kernel's side. It reads and writes packets with plain accesses, so Miri sees every race.
pub struct Kernel {
    pub fill: Consumer<u64>,
    pub rx: Producer<Descriptor>,
    pub tx: Consumer<Descriptor>,
    pub completion: Producer<u64>,
    memory: Mapping,
    /// The byte that fills the packet received last.
    pub byte: u8,
    /// Packets sent, by their first byte.
    pub sent: HashMap<u8, u32>,
}

/// Both sides of four rings of `size` entries, all indices at `start`.
pub fn socket(umem: &Umem, size: u32, start: u32) -> (Rings, Kernel) {
    let pair = Pair::new(umem).unwrap();
    let (fill, completion) = (RingMemory::allocate(size, start), RingMemory::allocate(size, start));
    let (rx, tx) = (RingMemory::allocate(size, start), RingMemory::allocate(size, start));
    // SAFETY: each side of each ring is worked by one value, and both follow the protocol. Where a
    // test makes the kernel break its word, it says why nothing comes of it.
    unsafe {
        let kernel = Kernel {
            fill: Consumer::new(fill.clone()),
            rx: Producer::new(rx.clone()),
            tx: Consumer::new(tx.clone()),
            completion: Producer::new(completion.clone()),
            memory: umem.memory().clone(),
            byte: 0,
            sent: HashMap::new(),
        };
        (over(&pair, fill, rx, tx, completion), kernel)
    }
}

/// # Safety
///
/// As of the rings' `over`.
unsafe fn over(
    pair: &Arc<Pair>,
    fill: RingMemory<u64>,
    rx: RingMemory<Descriptor>,
    tx: RingMemory<Descriptor>,
    completion: RingMemory<u64>,
) -> Rings {
    // SAFETY: as promised by the caller.
    unsafe {
        Rings {
            fill: FillRing::over(fill, pair),
            rx: RxRing::over(rx, pair),
            tx: TxRing::over(tx, pair),
            completion: CompletionRing::over(completion, pair),
        }
    }
}

impl Kernel {
    /// Receives up to `n` packets into frames of FILL; each is [`LENGTH`] times one byte.
    pub fn receive(&mut self, n: u32) -> u32 {
        let n = self.rx.room(n).min(n);
        let entries = self.fill.take(n);
        let mut slots = self.rx.reserve(n);
        let mut moved = 0;
        for addr in entries {
            let addr = (addr & !u64::from(CHUNK - 1)) + 256;
            self.byte = self.byte.wrapping_add(1);
            // SAFETY: FILL gave the chunk to this side.
            unsafe {
                self.memory.base().add(addr as usize).as_ptr().write_bytes(self.byte, LENGTH as usize);
            }
            assert!(slots.push(Descriptor { addr, len: LENGTH, options: 0 }));
            moved += 1;
        }
        moved
    }

    /// Sends up to `n` packets of TX and completes them.
    pub fn send(&mut self, n: u32) -> u32 {
        let n = self.completion.room(n).min(n);
        let entries = self.tx.take(n);
        let mut slots = self.completion.reserve(n);
        let mut moved = 0;
        for entry in entries {
            // SAFETY: TX gave the chunk to this side.
            let bytes = unsafe {
                let start = self.memory.base().add(entry.addr as usize);
                core::slice::from_raw_parts(start.as_ptr(), entry.len as usize)
            };
            assert!(bytes[1..].windows(2).all(|w| w[0] == w[1]), "a packet arrived in pieces");
            *self.sent.entry(bytes[0]).or_default() += 1;
            assert!(slots.push(entry.addr));
            moved += 1;
        }
        moved
    }

    /// Both.
    pub fn step(&mut self, n: u32) -> u32 {
        self.receive(n) + self.send(n)
    }

    /// Hands over a descriptor in RX, whatever it says.
    pub fn claim_received(&mut self, addr: u64, len: u32) {
        assert!(self.rx.reserve(1).push(Descriptor { addr, len, options: 0 }));
    }

    /// Hands over an address in COMPLETION, whatever it says.
    pub fn claim_sent(&mut self, addr: u64) {
        assert!(self.completion.reserve(1).push(addr));
    }
}

/// Fails a test that waits for what never comes.
pub struct Deadline(Instant);

impl Deadline {
    pub fn new() -> Self {
        Self(Instant::now() + Duration::from_secs(if cfg!(miri) { 600 } else { 20 }))
    }

    /// Lets other threads run.
    pub fn wait(&self) {
        assert!(Instant::now() < self.0, "nothing happened before the deadline");
        std::thread::yield_now();
    }
}

/// Asserts that every chunk is in one place, and that the kernel gave back what it had.
#[track_caller]
pub fn assert_consistent(umem: &Umem) {
    let census = umem.census();
    assert_eq!(census.contradiction(), None);
    assert_eq!(census.faults.total(), 0, "{census:?}");
}

/// Asserts that all frames are at home.
#[track_caller]
pub fn assert_all_home(umem: &Umem) {
    assert_consistent(umem);
    let census = umem.census();
    assert_eq!(census.pools + census.depot, census.total, "{census:?}");
}
