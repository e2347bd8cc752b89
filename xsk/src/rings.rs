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
use crate::ring::{Consumer, Entries, Producer, RingMemory, Slots};
use crate::umem::{Facts, Frame, Ledgered, Packet, Pair, Pool, Umem};
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
    ($(#[$doc:meta])* $name:ident, $raw:ident<$entry:ty>, $kind:ident, $state:ident) => {
        $(#[$doc])*
        pub struct $name {
            ring: $raw<$entry>,
            facts: Facts,
            /// The ledger's state of the chunks that this ring has.
            state: u16,
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
                Self { facts: pair.umem().core().facts, state: pair.states().$state, ring, account }
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
    FillRing, Producer<u64>, Fill, fill
}
typed_ring! {
    /// Received packets.
    RxRing, Consumer<Descriptor>, Rx, fill
}
typed_ring! {
    /// Packets to be sent.
    TxRing, Producer<Descriptor>, Tx, tx
}
typed_ring! {
    /// Frames whose packets were sent.
    CompletionRing, Consumer<u64>, Completion, tx
}

impl RxRing {
    /// Packets that are there to be taken.
    #[inline(always)]
    pub fn available(&mut self) -> u32 {
        self.ring.available()
    }

    /// Takes up to `n` packets. Those that the guard does not yield stay in the ring.
    #[inline(always)]
    pub fn take(&mut self, n: u32) -> Packets<'_> {
        self.account.settle(self.ring.settle());
        Packets { entries: self.ring.take(n), facts: self.facts, state: self.state, account: &self.account }
    }
}

impl CompletionRing {
    /// Frames that are there to be taken.
    #[inline(always)]
    pub fn available(&mut self) -> u32 {
        self.ring.available()
    }

    /// Takes up to `n` sent frames. Those that the guard does not yield stay in the ring.
    ///
    /// In copy mode frames may come back in another order than they were sent;
    /// [`Umem::index`] tells which one a frame is.
    #[inline(always)]
    pub fn take(&mut self, n: u32) -> Frames<'_> {
        self.account.settle(self.ring.settle());
        Frames { entries: self.ring.take(n), facts: self.facts, state: self.state, account: &self.account }
    }

    /// Takes all sent frames into a pool; returns how many.
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
        FillSlots { slots: self.ring.reserve(n), facts: self.facts, state: self.state }
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
    #[inline(always)]
    #[allow(unsafe_code)]
    pub fn extend(&mut self, mut packets: Packets<'_>, mut each: impl FnMut(Packet) -> Frame) -> u32 {
        let mut to = self.reserve(packets.left());
        let n = to.room();
        packets.limit(n);
        for _ in 0..n {
            // SAFETY: `n` entries are there to be taken, and `n` slots to be filled.
            unsafe {
                if let Some(packet) = packets.next_of_left() {
                    to.push_with_room(each(packet));
                }
            }
        }
        n
    }

    /// Moves sent frames from COMPLETION straight to FILL, as many as there is room for.
    ///
    /// Returns how many were taken.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub fn extend_frames(&mut self, mut frames: Frames<'_>) -> u32 {
        let mut to = self.reserve(frames.left());
        let n = to.room();
        frames.limit(n);
        for _ in 0..n {
            // SAFETY: `n` entries are there to be taken, and `n` slots to be filled.
            unsafe {
                if let Some(frame) = frames.next_of_left() {
                    to.push_with_room(frame);
                }
            }
        }
        n
    }

    /// Takes all frames back into `pool`.
    ///
    /// # Safety
    ///
    /// The kernel is not at work on the ring: its socket was never bound.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn withdraw_into(&mut self, pool: &mut Pool) {
        // SAFETY: nobody takes entries, as promised.
        while let Some(addr) = unsafe { self.ring.withdraw() } {
            // SAFETY: the entry was pushed by this side and taken by nobody: the chunk is its own.
            if let Ok(frame) = unsafe { self.facts.frame(addr, self.state) } {
                pool.put(frame);
            }
        }
    }

    /// Moves up to `n` frames from a pool to FILL; returns how many there was room and frames for.
    #[inline]
    pub fn refill(&mut self, pool: &mut Pool, n: u32) -> u32 {
        let mut slots = self.reserve(n.min(pool.len() as u32));
        let room = slots.room();
        for _ in 0..room {
            match pool.take().map(|frame| slots.push(frame)) {
                Some(Ok(())) => {}
                Some(Err(refused)) => {
                    let left = slots.room();
                    drop(slots);
                    pool.put(refused.into_inner());
                    return room - left;
                }
                None => return room - slots.room(),
            }
        }
        room
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
        TxSlots { slots: self.ring.reserve(n), facts: self.facts, state: self.state }
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
    #[allow(unsafe_code)]
    pub fn extend(&mut self, mut packets: Packets<'_>, mut each: impl FnMut(Packet) -> Packet) -> u32 {
        let mut to = self.reserve(packets.left());
        let n = to.room();
        packets.limit(n);
        for _ in 0..n {
            // SAFETY: `n` entries are there to be taken, and `n` slots to be filled.
            unsafe {
                if let Some(packet) = packets.next_of_left() {
                    to.push_with_room(each(packet));
                }
            }
        }
        n
    }
}

/// Received packets being taken; an iterator. Dropping it releases the slots of those it yielded.
#[derive(Debug)]
#[must_use = "packets that are not yielded stay in the ring"]
pub struct Packets<'r> {
    entries: Entries<'r, Descriptor>,
    facts: Facts,
    state: u16,
    account: &'r Ledgered,
}

impl Packets<'_> {
    /// Entries not yet yielded.
    #[inline(always)]
    pub fn left(&self) -> u32 {
        self.entries.left()
    }

    /// Yields no more than `n` from here on; the rest stays in the ring.
    #[inline(always)]
    pub fn limit(&mut self, n: u32) {
        self.entries.limit(n);
    }

    /// The next packet, or `None` when the entry is not one.
    ///
    /// # Safety
    ///
    /// [`left`](Self::left) is not 0.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn next_of_left(&mut self) -> Option<Packet> {
        // SAFETY: something is left; the entry comes from the kernel.
        unsafe {
            let entry = self.entries.next_unchecked();
            match self.facts.packet(entry, self.state) {
                Ok(packet) => Some(packet),
                Err(wrong) => {
                    self.account.refuse(wrong, entry.addr);
                    None
                }
            }
        }
    }
}

impl Iterator for Packets<'_> {
    type Item = Packet;

    #[inline(always)]
    #[allow(unsafe_code)]
    fn next(&mut self) -> Option<Packet> {
        while self.entries.left() != 0 {
            // SAFETY: something is left.
            if let Some(packet) = unsafe { self.next_of_left() } {
                return Some(packet);
            }
        }
        None
    }

    #[inline(always)]
    fn size_hint(&self) -> (usize, Option<usize>) {
        (0, Some(self.left() as usize))
    }
}

/// Sent frames being taken; an iterator. Dropping it releases the slots of those it yielded.
#[derive(Debug)]
#[must_use = "frames that are not yielded stay in the ring"]
pub struct Frames<'r> {
    entries: Entries<'r, u64>,
    facts: Facts,
    state: u16,
    account: &'r Ledgered,
}

impl Frames<'_> {
    /// Entries not yet yielded.
    #[inline(always)]
    pub fn left(&self) -> u32 {
        self.entries.left()
    }

    /// Yields no more than `n` from here on; the rest stays in the ring.
    #[inline(always)]
    pub fn limit(&mut self, n: u32) {
        self.entries.limit(n);
    }

    /// The next frame, or `None` when the entry is not one.
    ///
    /// # Safety
    ///
    /// [`left`](Self::left) is not 0.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn next_of_left(&mut self) -> Option<Frame> {
        // SAFETY: something is left; the entry comes from the kernel.
        unsafe {
            let addr = self.entries.next_unchecked();
            match self.facts.frame(addr, self.state) {
                Ok(frame) => Some(frame),
                Err(wrong) => {
                    self.account.refuse(wrong, addr);
                    None
                }
            }
        }
    }
}

impl Iterator for Frames<'_> {
    type Item = Frame;

    #[inline(always)]
    #[allow(unsafe_code)]
    fn next(&mut self) -> Option<Frame> {
        while self.entries.left() != 0 {
            // SAFETY: something is left.
            if let Some(frame) = unsafe { self.next_of_left() } {
                return Some(frame);
            }
        }
        None
    }

    #[inline(always)]
    fn size_hint(&self) -> (usize, Option<usize>) {
        (0, Some(self.left() as usize))
    }
}

/// Slots of FILL being filled. Dropping it publishes the frames that were pushed.
#[derive(Debug)]
pub struct FillSlots<'r> {
    slots: Slots<'r, u64>,
    facts: Facts,
    state: u16,
}

impl FillSlots<'_> {
    /// Slots left.
    #[inline(always)]
    pub fn room(&self) -> u32 {
        self.slots.room()
    }

    /// Gives a frame to the kernel, to receive into.
    ///
    /// # Errors
    ///
    /// The frame back, when there is no slot left or it is another UMEM's.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub fn push(&mut self, frame: Frame) -> Result<(), PushError<Frame>> {
        if self.slots.room() == 0 {
            return Err(PushError::Full(frame));
        }
        let Some(offset) = self.facts.offset(&frame) else { return Err(PushError::Foreign(frame)) };
        let _ = frame.into_raw();
        // SAFETY: there is room.
        unsafe { self.slots.push_unchecked(offset) };
        Ok(())
    }

    /// # Safety
    ///
    /// There is room.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn push_with_room(&mut self, frame: Frame) {
        // A frame of another UMEM is dropped here, and so sent home.
        let Some(offset) = self.facts.offset(&frame) else { return };
        let _ = frame.into_raw();
        // SAFETY: there is room.
        unsafe { self.slots.push_unchecked(offset) };
    }
}

impl Drop for FillSlots<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        // The kernel may have the frames from here on; `slots`, dropped next, publishes them.
        if self.facts.ledger.is_on() {
            self.slots.pushed().for_each(|addr| self.facts.ledger.give(addr, self.state));
        }
    }
}

/// Slots of TX being filled. Dropping it publishes the packets that were pushed.
#[derive(Debug)]
pub struct TxSlots<'r> {
    slots: Slots<'r, Descriptor>,
    facts: Facts,
    state: u16,
}

impl TxSlots<'_> {
    /// Slots left.
    #[inline(always)]
    pub fn room(&self) -> u32 {
        self.slots.room()
    }

    /// Gives a packet to the kernel, to be sent.
    ///
    /// # Errors
    ///
    /// The packet back, when there is no slot left or it is another UMEM's.
    #[inline(always)]
    #[allow(unsafe_code)]
    pub fn push(&mut self, packet: Packet) -> Result<(), PushError<Packet>> {
        if self.slots.room() == 0 {
            return Err(PushError::Full(packet));
        }
        if self.facts.offset(packet.frame()).is_none() {
            return Err(PushError::Foreign(packet));
        }
        // SAFETY: there is room.
        unsafe { self.push_with_room(packet) };
        Ok(())
    }

    /// # Safety
    ///
    /// There is room.
    #[inline(always)]
    #[allow(unsafe_code)]
    unsafe fn push_with_room(&mut self, packet: Packet) {
        // A packet of another UMEM is dropped here, and so its frame sent home.
        let Some(at) = self.facts.offset(packet.frame()) else { return };
        let (frame, len, offset, options) = packet.into_parts();
        let _ = frame.into_raw();
        let addr = at + u64::from(offset);
        // SAFETY: there is room.
        unsafe { self.slots.push_unchecked(Descriptor { addr, len, options: u32::from(options) }) };
    }
}

impl Drop for TxSlots<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        // The kernel may have the packets from here on; `slots`, dropped next, publishes them.
        if self.facts.ledger.is_on() {
            self.slots.pushed().for_each(|entry| self.facts.ledger.give(entry.addr, self.state));
        }
    }
}
