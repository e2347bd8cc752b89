//! The four rings of a socket, typed: frames and packets in, frames and packets out.
//!
//! | ring | the program | entries |
//! |---|---|---|
//! | [`FillRing`] | pushes free frames for the kernel to receive into | [`Frame`] |
//! | [`RxRing`] | takes what was received | [`Packet`] |
//! | [`TxRing`] | pushes what is to be sent | [`Packet`] |
//! | [`CompletionRing`] | takes back what was sent | [`Frame`] |
//!
//! Each is worked in batches through a guard that borrows the ring: [`take`](RxRing::take) and
//! [`reserve`](FillRing::reserve). A guard's work is published once, when it is dropped. Where
//! entries go from one ring straight to another, `extend` counts once for both ends.
//!
//! What the kernel hands back is checked. An entry that points outside its chunk or UMEM (or, with
//! the ledger, a chunk that was not the kernel's to give) never becomes a frame: it is skipped,
//! and counted in [`Umem::faults`].

use crate::abi::{Descriptor, RingKind};
use crate::ring::{self, Consumer, Entries, Producer, RingMemory, Slots};
use crate::umem::{Facts, Frame, Ledgered, Packet, Pair, Pool, Umem, Wrong};
use core::ptr::NonNull;
use std::sync::Arc;

/// A push that failed, with what was to be pushed.
#[derive(Debug)]
#[must_use = "it holds the frame that was not pushed"]
pub enum PushError<T> {
    /// There is no room left in the batch.
    Full(T),
    /// The frame belongs to another UMEM than the ring.
    Foreign(T),
}

impl<T> PushError<T> {
    /// What was to be pushed.
    pub fn into_inner(self) -> T {
        match self {
            Self::Full(value) | Self::Foreign(value) => value,
        }
    }
}

impl<T> core::fmt::Display for PushError<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Full(_) => "no room is left in the batch",
            Self::Foreign(_) => "the frame belongs to another UMEM than the ring",
        })
    }
}

impl<T: core::fmt::Debug> core::error::Error for PushError<T> {}

/// What the typed rings have in common: the raw ring, the UMEM's facts, the account.
macro_rules! typed_ring {
    ($(#[$doc:meta])* $name:ident, $raw:ident<$entry:ty>, $kind:ident) => {
        $(#[$doc])*
        pub struct $name {
            ring: $raw<$entry>,
            facts: Facts,
            account: Ledgered,
        }

        impl $name {
            /// The program's side of the ring in `memory`.
            ///
            /// # Safety
            ///
            /// The ring belongs to `pair`, which has no other ring of this kind, and holds only what
            /// its UMEM's frames put there; nothing else works the program's side; and the other
            /// side keeps the promises of [`RawSocket`](crate::kernel::RawSocket).
            #[allow(unsafe_code)]
            pub unsafe fn over(memory: RingMemory<$entry>, pair: &Arc<Pair>) -> Self {
                // SAFETY: as promised by the caller.
                let ring = unsafe { $raw::new(memory) };
                let account = Ledgered::open(pair, RingKind::$kind, ring.memory(), ring.index());
                Self { facts: account.facts(), ring, account }
            }

            /// Entries that the ring holds at most.
            pub fn size(&self) -> u32 {
                self.ring.memory().size()
            }

            /// The UMEM whose frames go through this ring.
            pub fn umem(&self) -> &Umem {
                self.account.pair.umem()
            }
        }

        impl Drop for $name {
            fn drop(&mut self) {
                self.account.close(self.ring.index());
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.debug_struct(stringify!($name))
                    .field("size", &self.size())
                    .field("index", &self.ring.index())
                    .finish_non_exhaustive()
            }
        }
    };
}

typed_ring! {
    /// Free frames, on their way to the kernel, which receives packets into them.
    FillRing, Producer<u64>, Fill
}
typed_ring! {
    /// Received packets.
    RxRing, Consumer<Descriptor>, Rx
}
typed_ring! {
    /// Packets to be sent.
    TxRing, Producer<Descriptor>, Tx
}
typed_ring! {
    /// Frames whose packets were sent.
    CompletionRing, Consumer<u64>, Completion
}

impl RxRing {
    /// Packets to take: as many as were seen last, looked for anew when that is none. More may be
    /// there.
    #[inline(always)]
    pub fn available(&mut self) -> u32 {
        self.ring.available()
    }

    /// Entries that were ever taken, modulo 2^32.
    #[inline(always)]
    pub(crate) fn taken(&self) -> u32 {
        self.ring.index()
    }

    /// Takes up to `n` packets of those [`available`](Self::available). Those that the guard does not
    /// yield stay in the ring.
    #[inline(always)]
    pub fn take(&mut self, n: u32) -> Packets<'_> {
        if self.ring.is_unsettled() {
            self.account.count_forgotten(self.ring.settle());
        }
        Packets(Taken { entries: self.ring.take(n), facts: self.facts, account: &self.account })
    }
}

impl CompletionRing {
    /// Frames to take: as many as were seen last, looked for anew when that is none. More may be
    /// there.
    #[inline(always)]
    pub fn available(&mut self) -> u32 {
        self.ring.available()
    }

    /// Entries that were ever taken, modulo 2^32.
    #[inline(always)]
    pub(crate) fn taken(&self) -> u32 {
        self.ring.index()
    }

    /// Takes up to `n` sent frames of those [`available`](Self::available). Those that the guard
    /// does not yield stay in the ring.
    ///
    /// In copy mode frames may come back in another order than they were sent;
    /// [`Umem::index`] tells which one a frame is.
    #[inline(always)]
    pub fn take(&mut self, n: u32) -> Frames<'_> {
        if self.ring.is_unsettled() {
            self.account.count_forgotten(self.ring.settle());
        }
        Frames(Taken { entries: self.ring.take(n), facts: self.facts, account: &self.account })
    }

    /// Takes the sent frames that are [`available`](Self::available) into a pool; returns how many.
    #[inline]
    pub fn drain_into(&mut self, pool: &mut Pool) -> u32 {
        let mut taken = 0;
        for frame in self.take(u32::MAX) {
            pool.put(frame);
            taken += 1;
        }
        taken
    }
}

impl FillRing {
    /// Room for frames.
    #[inline(always)]
    pub fn room(&mut self) -> u32 {
        self.ring.room(u32::MAX)
    }

    /// Reserves up to `n` slots.
    #[inline(always)]
    pub fn reserve(&mut self, n: u32) -> FillSlots<'_> {
        FillSlots(Filling { slots: self.ring.reserve(n), facts: self.facts, account: &self.account })
    }

    /// Whether the driver waits for a wake-up before it looks at FILL again.
    ///
    /// Ask after publishing, and on every idle iteration: a driver may set the flag just after it
    /// was read as clear. See [`Producer::needs_wakeup`].
    #[inline(always)]
    pub fn needs_wakeup(&self) -> bool {
        self.ring.needs_wakeup()
    }

    /// Moves packets' frames from RX straight to FILL, as many as there is room for.
    ///
    /// `each` sees every packet and says which frame goes back: usually the packet's own. Frames
    /// of another UMEM are not taken; they are sent home. Returns how many packets were taken.
    ///
    /// What FILL has no room for stays in RX. There is room for all, unless more frames were put
    /// into FILL than came out of RX; who does that takes the rest of RX into a pool.
    #[inline(always)]
    pub fn extend(&mut self, packets: Packets<'_>, each: impl FnMut(Packet) -> Frame) -> u32 {
        transfer::<_, _, All>(packets.0, &mut self.ring, &self.facts, &self.account, each)
    }

    /// Moves sent frames from COMPLETION straight to FILL, as many as there is room for.
    ///
    /// Returns how many were taken.
    #[inline(always)]
    pub fn extend_frames(&mut self, frames: Frames<'_>) -> u32 {
        transfer::<_, _, All>(frames.0, &mut self.ring, &self.facts, &self.account, |frame| frame)
    }

    /// Takes all frames back into `pool`.
    ///
    /// # Safety
    ///
    /// The kernel is not at work on the ring: its socket was never bound, or taken off its
    /// interface.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn withdraw_into(&mut self, pool: &mut Pool) {
        // SAFETY: nobody takes entries, as promised.
        while let Some(addr) = unsafe { self.ring.withdraw() } {
            // SAFETY: the entry was pushed by this side and taken by nobody: the chunk is its own.
            if let Ok(frame) = unsafe { self.facts.frame::<true>(addr, self.account.state) } {
                pool.put(frame);
            }
        }
    }

    /// Frames that were ever pushed, modulo 2^32.
    #[inline(always)]
    pub(crate) fn pushed(&self) -> u32 {
        self.ring.index()
    }

    /// Moves up to `n` frames from a pool to FILL; returns how many there was room and frames for:
    /// none from a pool of another UMEM.
    #[inline]
    pub fn refill(&mut self, pool: &mut Pool, n: u32) -> u32 {
        let mut slots = self.reserve(n.min(pool.len() as u32));
        let mut moved = 0;
        while slots.room() != 0
            && let Some(frame) = pool.take()
        {
            if let Err(refused) = slots.push(frame) {
                // It is the pool of another UMEM.
                pool.put(refused.into_inner());
                break;
            }
            moved += 1;
        }
        moved
    }
}

impl TxRing {
    /// Room for packets.
    #[inline(always)]
    pub fn room(&mut self) -> u32 {
        self.ring.room(u32::MAX)
    }

    /// Reserves up to `n` slots.
    #[inline(always)]
    pub fn reserve(&mut self, n: u32) -> TxSlots<'_> {
        TxSlots(Filling { slots: self.ring.reserve(n), facts: self.facts, account: &self.account })
    }

    /// Whether the kernel waits for a wake-up before it sends.
    ///
    /// In copy mode it always does: there a send is what transmits. See
    /// [`Producer::needs_wakeup`].
    #[inline(always)]
    pub fn needs_wakeup(&self) -> bool {
        self.ring.needs_wakeup()
    }

    /// Packets published and not yet taken by the kernel.
    #[inline]
    pub fn pending(&self) -> u32 {
        self.ring.memory().filled().unwrap_or(0)
    }

    /// Moves packets from RX straight to TX, as many as there is room for.
    ///
    /// `each` sees every packet and says what is sent: usually the same packet, rewritten. Packets
    /// of another UMEM are not sent; their frames go home. Returns how many packets were taken.
    #[inline(always)]
    pub fn extend(&mut self, packets: Packets<'_>, each: impl FnMut(Packet) -> Packet) -> u32 {
        transfer::<_, _, All>(packets.0, &mut self.ring, &self.facts, &self.account, each)
    }

    /// As [`extend`](Self::extend), where not every packet is sent: `each` may keep one, or put its
    /// frame elsewhere, and returns `None` then. Returns how many packets were taken.
    #[inline(always)]
    pub fn extend_some(&mut self, packets: Packets<'_>, each: impl FnMut(Packet) -> Option<Packet>) -> u32 {
        transfer::<_, _, Chosen>(packets.0, &mut self.ring, &self.facts, &self.account, each)
    }

    /// Packets that were ever pushed, modulo 2^32.
    #[inline(always)]
    pub(crate) fn pushed(&self) -> u32 {
        self.ring.index()
    }
}

/// An entry of a ring, and what it stands for.
#[allow(unsafe_code)]
trait Entry: Copy {
    /// The owner of the chunk that the entry speaks of.
    type Item;

    /// Where the chunk is, as the kernel writes it.
    fn addr(self) -> u64;

    /// What an entry from the kernel, had back from the ring of `expect`, stands for. `LEDGER` is
    /// `false` where the ledger is known to be off.
    ///
    /// # Safety
    ///
    /// The kernel has just handed it over on a ring of the UMEM of `facts`, which lives.
    unsafe fn open<const LEDGER: bool>(self, facts: &Facts, expect: u16) -> Result<Self::Item, Wrong>;

    /// The entry that gives `item` up.
    ///
    /// # Errors
    ///
    /// The item back, when it is not of the UMEM of `facts`.
    fn close(item: Self::Item, facts: &Facts) -> Result<Self, Self::Item>;
}

#[allow(unsafe_code)]
impl Entry for u64 {
    type Item = Frame;

    #[inline(always)]
    fn addr(self) -> u64 {
        self
    }

    #[inline(always)]
    unsafe fn open<const LEDGER: bool>(self, facts: &Facts, expect: u16) -> Result<Frame, Wrong> {
        // SAFETY: as promised by the caller.
        unsafe { facts.frame::<LEDGER>(self, expect) }
    }

    #[inline(always)]
    fn close(frame: Frame, facts: &Facts) -> Result<Self, Frame> {
        let Some(offset) = facts.offset(&frame) else { return Err(frame) };
        let _ = frame.into_raw();
        Ok(offset)
    }
}

#[allow(unsafe_code)]
impl Entry for Descriptor {
    type Item = Packet;

    #[inline(always)]
    fn addr(self) -> u64 {
        self.addr
    }

    #[inline(always)]
    unsafe fn open<const LEDGER: bool>(self, facts: &Facts, expect: u16) -> Result<Packet, Wrong> {
        // SAFETY: as promised by the caller.
        unsafe { facts.packet::<LEDGER>(self, expect) }
    }

    #[inline(always)]
    fn close(packet: Packet, facts: &Facts) -> Result<Self, Packet> {
        let Some(at) = facts.offset(packet.frame()) else { return Err(packet) };
        let (frame, len, offset, options) = packet.into_parts();
        let _ = frame.into_raw();
        Ok(Self { addr: at + u64::from(offset), len, options: u32::from(options) })
    }
}

/// A batch being taken out of a ring.
#[derive(Debug)]
struct Taken<'r, E: Copy> {
    entries: Entries<'r, E>,
    facts: Facts,
    account: &'r Ledgered,
}

impl<E: Entry> Taken<'_, E> {
    /// What the next good entry stands for.
    #[inline(always)]
    #[allow(unsafe_code)]
    fn next(&mut self) -> Option<E::Item> {
        loop {
            let entry = self.entries.next()?;
            // SAFETY: the entry comes from the kernel; the account keeps the UMEM.
            match unsafe { entry.open::<true>(&self.facts, self.account.state) } {
                Ok(item) => return Some(item),
                Err(wrong) => self.account.refuse(wrong, entry.addr()),
            }
        }
    }
}

/// A batch being put into a ring. The ledger has its chunks as lent from when it is published.
#[derive(Debug)]
struct Filling<'r, E: Entry> {
    slots: Slots<'r, E>,
    facts: Facts,
    account: &'r Ledgered,
}

impl<E: Entry> Filling<'_, E> {
    #[inline(always)]
    fn push(&mut self, item: E::Item) -> Result<(), PushError<E::Item>> {
        if self.slots.room() == 0 {
            return Err(PushError::Full(item));
        }
        let entry = E::close(item, &self.facts).map_err(PushError::Foreign)?;
        let _ = self.slots.push(entry);
        Ok(())
    }
}

impl<E: Entry> Drop for Filling<'_, E> {
    #[inline(always)]
    fn drop(&mut self) {
        // The kernel may have the chunks from here on; `slots`, dropped next, publishes them.
        if self.facts.ledger.is_on() {
            let (ring, end) = self.slots.pushed();
            lend(ring, end, self.account);
        }
    }
}

/// Enters what was pushed up to the index `end` into the ledger, as lent to the ring.
///
/// Not a part of the guard's drop, and not told of the guard: that would keep it in memory, also
/// where the ledger is off.
#[inline(never)]
#[allow(unsafe_code)]
fn lend<E: Entry>(ring: &Producer<E>, end: u32, account: &Ledgered) {
    let facts = account.facts();
    // SAFETY: up to there the guard has pushed, whose drop this is. An item of this UMEM became
    // each entry, and the account keeps the UMEM.
    unsafe { ring.unpublished(end).for_each(|entry| facts.lend(entry.addr(), account.state)) }
}

/// What a [`transfer`] pushes of what it takes. All of it is a case of its own: told by an
/// `Option` that is never `None`, it costs seven instructions a packet.
trait Kept<T> {
    /// What becomes of a taken item.
    type Made;

    /// The entry of what was made, where there is one.
    fn close<E>(made: Self::Made, close: impl FnOnce(T) -> Option<E>) -> Option<E>;
}

/// Every item.
struct All;

impl<T> Kept<T> for All {
    type Made = T;

    #[inline(always)]
    fn close<E>(made: T, close: impl FnOnce(T) -> Option<E>) -> Option<E> {
        close(made)
    }
}

/// Those that are chosen.
struct Chosen;

impl<T> Kept<T> for Chosen {
    type Made = Option<T>;

    #[inline(always)]
    fn close<E>(made: Option<T>, close: impl FnOnce(T) -> Option<E>) -> Option<E> {
        made.and_then(close)
    }
}

/// Moves a batch from ring to ring, as much as there is room for; returns how much was taken.
///
/// The usual case has a loop of its own, with nothing to tell apart for every packet: there both
/// ends work with the same copy of their one UMEM's facts, and then a frame that `each` hands
/// through needs no second check: the compiler sees that it is the one whose address was checked.
#[inline(always)]
#[allow(unsafe_code)]
fn transfer<A: Entry, B: Entry, K: Kept<B::Item>>(
    mut from: Taken<'_, A>,
    to: &mut Producer<B>,
    facts: &Facts,
    account: &Ledgered,
    mut each: impl FnMut(A::Item) -> K::Made,
) -> u32 {
    let n = from.entries.left();
    if n == 0 {
        return 0;
    }
    if facts.is_plainly(&from.facts) && to.room(n) >= n {
        let mut slots = to.reserve(n);
        let facts = *facts;
        let done = if n == 1 {
            // A lone packet goes without the loop and its preparations: they are half of its cost.
            let convert = convert::<A, B, K, false>(&facts, from.account, &facts, &mut each);
            // SAFETY: one entry is left, and there is room for it.
            unsafe { ring::transfer_one(&mut from.entries, &mut slots, convert) }
        } else if from.entries.is_piece(n) && slots.is_piece(n) {
            let convert = convert::<A, B, K, false>(&facts, from.account, &facts, &mut each);
            // SAFETY: `n` is what is left, and not 0; there is room for it; both are one piece.
            unsafe { ring::transfer(&mut from.entries, &mut slots, n, convert) }
        } else {
            false
        };
        if done {
            slots.publish();
            from.entries.release();
            return n;
        }
    }
    let source = (from.facts.base, from.account);
    n - from.entries.left() + transfer_unusual::<A, B, K>(from.entries, source, to, facts, account, each)
}

/// With a ledger; from one UMEM to another, where `each` copies, or what it returns goes home; past
/// the end of a ring's memory; with less room than entries; or what is left behind a refused entry.
#[inline(never)]
#[allow(unsafe_code)]
fn transfer_unusual<A: Entry, B: Entry, K: Kept<B::Item>>(
    mut from: Entries<'_, A>,
    (base, source): (NonNull<u8>, &Ledgered),
    to: &mut Producer<B>,
    facts: &Facts,
    account: &Ledgered,
    mut each: impl FnMut(A::Item) -> K::Made,
) -> u32 {
    let facts = *facts;
    // Read anew, so that the usual case need not have read all of it.
    let source_facts = if base == facts.base { facts } else { source.facts() };
    let mut to = Filling { slots: to.reserve(from.left()), facts, account };
    from.limit(to.slots.room());
    let n = from.left();
    while from.left() != 0 {
        let piece = from.left().min(from.piece()).min(to.slots.piece());
        let convert = convert::<A, B, K, true>(&source_facts, source, &facts, &mut each);
        // SAFETY: something is left, for all of which there is room; of that, one piece.
        unsafe { ring::transfer(&mut from, &mut to.slots, piece, convert) };
    }
    n
}

/// From entry to entry, by way of `each`.
///
/// `LEDGER` is no matter of the facts alone: it keeps the closure of the usual case so small that the
/// compiler inlines it also where `each` has something to choose.
#[inline(always)]
#[allow(unsafe_code)]
fn convert<A: Entry, B: Entry, K: Kept<B::Item>, const LEDGER: bool>(
    source: &Facts,
    account: &Ledgered,
    target: &Facts,
    each: &mut impl FnMut(A::Item) -> K::Made,
) -> impl FnMut(A) -> Option<B> {
    // SAFETY: the entry comes from the kernel; the account keeps the UMEM.
    move |entry| match unsafe { entry.open::<LEDGER>(source, account.state) } {
        // An item of another UMEM is dropped here, and so sent home.
        Ok(item) => K::close(each(item), |item| B::close(item, target).ok()),
        Err(wrong) => {
            account.refuse(wrong, entry.addr());
            None
        }
    }
}

/// A batch that is taken: an iterator over what a ring's entries stand for.
macro_rules! taken_batch {
    ($(#[$attribute:meta])* $name:ident, $entry:ty, $item:ty) => {
        $(#[$attribute])*
        #[derive(Debug)]
        pub struct $name<'r>(Taken<'r, $entry>);

        impl $name<'_> {
            /// Entries not yet yielded.
            #[inline(always)]
            pub fn left(&self) -> u32 {
                self.0.entries.left()
            }

            /// Yields no more than `n` from here on; the rest stays in the ring.
            #[inline(always)]
            pub fn limit(&mut self, n: u32) {
                self.0.entries.limit(n);
            }
        }

        impl Iterator for $name<'_> {
            type Item = $item;

            #[inline(always)]
            fn next(&mut self) -> Option<$item> {
                self.0.next()
            }

            #[inline(always)]
            fn size_hint(&self) -> (usize, Option<usize>) {
                (0, Some(self.left() as usize))
            }
        }
    };
}

taken_batch! {
    /// Received packets being taken; an iterator. Dropping it releases the slots of those it yielded.
    #[must_use = "packets that are not yielded stay in the ring"]
    Packets, Descriptor, Packet
}
taken_batch! {
    /// Sent frames being taken; an iterator. Dropping it releases the slots of those it yielded.
    #[must_use = "frames that are not yielded stay in the ring"]
    Frames, u64, Frame
}

/// A batch that is filled.
macro_rules! filled_batch {
    ($(#[$attribute:meta])* $name:ident, $entry:ty, $item:ty, $(#[$push:meta])*) => {
        $(#[$attribute])*
        #[derive(Debug)]
        pub struct $name<'r>(Filling<'r, $entry>);

        impl $name<'_> {
            /// Slots left.
            #[inline(always)]
            pub fn room(&self) -> u32 {
                self.0.slots.room()
            }

            $(#[$push])*
            ///
            /// # Errors
            ///
            /// What was to be pushed, when there is no slot left or it is another UMEM's.
            #[inline(always)]
            pub fn push(&mut self, item: $item) -> Result<(), PushError<$item>> {
                self.0.push(item)
            }
        }
    };
}

filled_batch! {
    /// Slots of FILL being filled. Dropping it publishes the frames that were pushed.
    FillSlots, u64, Frame,
    /// Gives a frame to the kernel, to receive into.
}
filled_batch! {
    /// Slots of TX being filled. Dropping it publishes the packets that were pushed.
    TxSlots, Descriptor, Packet,
    /// Gives a packet to the kernel, to be sent.
}

#[cfg(all(test, not(loom)))]
#[allow(unsafe_code)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    /// A socket's receiving half over rings of 8 that are about to wrap, and the kernel's side.
    struct Bed {
        umem: Umem,
        pool: Pool,
        fill: FillRing,
        rx: RxRing,
        kernel_fill: Consumer<u64>,
        kernel_rx: Producer<Descriptor>,
    }

    impl Bed {
        fn new(ledger: bool) -> Self {
            // FILL ends its memory two entries on, RX three, and both wrap their indices.
            let fill = RingMemory::<u64>::allocate(8, u32::MAX - 1);
            let rx = RingMemory::<Descriptor>::allocate(8, u32::MAX - 2);
            let (umem, pool) = Umem::builder().frames(16).chunk_size(2048).ledger(ledger).build().unwrap();
            let pair = Pair::new(&umem).unwrap();
            // SAFETY: fresh rings, each side worked once, by the protocol.
            unsafe {
                Self {
                    kernel_fill: Consumer::new(fill.clone()),
                    kernel_rx: Producer::new(rx.clone()),
                    fill: FillRing::over(fill, &pair),
                    rx: RxRing::over(rx, &pair),
                    umem,
                    pool,
                }
            }
        }

        /// Has the kernel receive `n` packets into what is in FILL; `change` is what it does wrong.
        fn receive(&mut self, n: u32, mut change: impl FnMut(usize, &mut Descriptor)) {
            let mut rx = self.kernel_rx.reserve(n);
            for (i, addr) in self.kernel_fill.take(n).enumerate() {
                let mut descriptor = Descriptor { addr: addr + 256, len: 60, options: 0 };
                change(i, &mut descriptor);
                assert!(rx.push(descriptor));
            }
        }

        fn census_is_true(&self) {
            assert_eq!(self.umem.census().contradiction(), None);
        }
    }

    #[test]
    fn extend_moves_all_of_a_batch_across_the_ends_of_both_rings() {
        for ledger in [false, true] {
            let mut bed = Bed::new(ledger);
            assert_eq!(bed.fill.refill(&mut bed.pool, 8), 8);
            for _ in 0..5 {
                bed.receive(8, |_, _| {});
                let mut lengths = Vec::new();
                let moved = bed.fill.extend(bed.rx.take(64), |packet| {
                    lengths.push(packet.len());
                    packet.into_frame()
                });
                assert_eq!((moved, lengths), (8, vec![60; 8]));
                assert_eq!(bed.umem.census().fill, 8);
                bed.census_is_true();
            }
            assert_eq!(bed.umem.faults().total(), 0);
        }
    }

    #[test]
    fn extend_takes_no_more_than_there_is_room_for() {
        for ledger in [false, true] {
            let mut bed = Bed::new(ledger);
            bed.fill.refill(&mut bed.pool, 8);
            bed.receive(5, |_, _| {});
            bed.fill.refill(&mut bed.pool, 2);
            assert_eq!(bed.fill.extend(bed.rx.take(64), Packet::into_frame), 3);
            assert_eq!((bed.umem.census().fill, bed.umem.census().rx), (8, 2));
            assert_eq!(bed.fill.extend(bed.rx.take(64), Packet::into_frame), 0);
            bed.census_is_true();
        }
    }

    #[test]
    fn extend_steps_over_entries_that_are_no_packets() {
        for ledger in [false, true] {
            let mut bed = Bed::new(ledger);
            let size = bed.umem.size();
            bed.fill.refill(&mut bed.pool, 8);
            bed.receive(8, |i, descriptor| match i {
                0 => descriptor.addr = size,
                2 => descriptor.len = 0,
                3 => descriptor.len = 2048 - 256 + 1,
                5 => descriptor.len = u32::MAX,
                7 => descriptor.addr = u64::MAX - 7,
                _ => {}
            });
            let mut seen = 0;
            let taken = bed.fill.extend(bed.rx.take(64), |packet| {
                seen += 1;
                packet.into_frame()
            });
            assert_eq!((taken, seen, bed.umem.faults().outside), (8, 3, 5));
            assert_eq!(bed.umem.census().fill, 3);
            assert_eq!(bed.umem.faults().duplicate, 0);
        }
    }

    #[test]
    fn a_packet_may_fill_its_chunk_to_the_last_byte() {
        let mut bed = Bed::new(false);
        bed.fill.refill(&mut bed.pool, 1);
        bed.receive(1, |_, descriptor| descriptor.len = 2048 - 256);
        assert_eq!(bed.rx.take(1).next().map(|packet| packet.len()), Some(2048 - 256));
    }

    #[test]
    fn the_ledger_refuses_a_chunk_that_comes_twice_in_one_batch() {
        let mut bed = Bed::new(true);
        bed.fill.refill(&mut bed.pool, 8);
        let mut first = 0;
        bed.receive(4, |i, descriptor| match i {
            0 => first = descriptor.addr,
            2 => descriptor.addr = first,
            _ => {}
        });
        assert_eq!(bed.fill.extend(bed.rx.take(64), Packet::into_frame), 4);
        assert_eq!(bed.umem.census().fill, 4 + 3);
        assert_eq!((bed.umem.faults().duplicate, bed.umem.faults().outside), (1, 0));
    }

    #[test]
    fn extend_between_umems_takes_only_frames_of_the_ring() {
        for ledger in [false, true] {
            let (mut bed, mut other) = (Bed::new(ledger), Bed::new(false));
            bed.fill.refill(&mut bed.pool, 8);
            bed.receive(5, |_, _| {});
            // The packet's own frame goes home, a copy's frame goes into the ring.
            let mut copies = 0;
            let (pool, own) = (&mut other.pool, &mut bed.pool);
            let taken = other.fill.extend(bed.rx.take(64), |packet| {
                copies += 1;
                if copies % 2 == 0 {
                    return packet.into_frame();
                }
                own.put(packet);
                pool.take().unwrap()
            });
            assert_eq!((taken, copies), (5, 5));
            assert_eq!((other.umem.census().fill, other.umem.census().program), (3, 0));
            assert_eq!((bed.umem.census().dropped, bed.umem.census().program), (2, 0));
            bed.census_is_true();
            other.census_is_true();
        }
    }

    #[test]
    fn a_panic_in_the_middle_of_extend_loses_no_more_than_its_packet() {
        for (ledger, batch) in [(false, 2), (true, 2), (false, 8), (true, 8)] {
            let mut bed = Bed::new(ledger);
            bed.fill.refill(&mut bed.pool, 8);
            bed.receive(8, |_, _| {});
            let mut seen = 0;
            let (fill, rx) = (&mut bed.fill, &mut bed.rx);
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                fill.extend(rx.take(batch), |packet| {
                    seen += 1;
                    assert_ne!(seen, 2, "on purpose");
                    packet.into_frame()
                })
            }));
            assert!(outcome.is_err());
            // One went through, one was dropped in the panic, six are still there.
            let census = bed.umem.census();
            assert_eq!((census.fill, census.dropped, census.rx), (1, 1, 6));
            bed.census_is_true();
            assert_eq!(bed.fill.extend(bed.rx.take(64), Packet::into_frame), 6);
            bed.census_is_true();
        }
    }
}
