//! Single-producer single-consumer rings over shared memory: indices, entries, no packets.
//!
//! Either side of a ring is one of two types. A [`Producer`] writes entries and moves the
//! producer index; a [`Consumer`] reads them and moves the consumer index. The program is the
//! producer of FILL and TX and the consumer of RX and COMPLETION; the kernel, real or simulated,
//! is the other side, and the simulated one uses these very types.
//!
//! The protocol is that of the kernel's `net/xdp/xsk_queue.h`:
//!
//! - Indices run freely over all 2^32 values and wrap; an entry's slot is its index under the mask.
//!   The ring is full when producer minus consumer equals its size.
//! - A side stores only its own index, with release, after the entries that the store speaks of.
//!   It loads the other's with acquire. One writer an index means plain stores, never a
//!   read-modify-write.
//! - Each side keeps a copy of the other's index and reads the shared one again only when the copy
//!   says that there is no room or nothing there: the line it is on travels as rarely as possible.
//!
//! A batch is a guard. [`Slots`] publishes on drop what was written to it, and stores nothing when
//! nothing was. [`Entries`] marks everything it holds as taken *before* it yields the first entry
//! and gives back the rest on drop: forgetting a guard leaks entries and can never yield one twice.
//! The next guard releases the slots of one that was forgotten, so that the ring goes on.

use core::any::Any;
use core::ptr::NonNull;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

use crate::abi::XDP_RING_NEED_WAKEUP;
use crate::sync::{AtomicU32, fence};

pub use crate::sync::Slot;

/// The memory of one ring: where its fields are, and what keeps them mapped.
#[derive(Debug)]
pub struct RingMemory<T> {
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    flags: NonNull<AtomicU32>,
    slots: NonNull<Slot<T>>,
    size: u32,
    /// Dropped last; nothing above is reached afterwards.
    owner: std::sync::Arc<dyn Any + Send + Sync>,
}

impl<T> Clone for RingMemory<T> {
    fn clone(&self) -> Self {
        Self { owner: self.owner.clone(), ..*self }
    }
}

// SAFETY: the fields point to memory that its owner keeps, and that is made to be shared: atomics,
// and slots that the ring protocol hands from side to side. Only the unsafe constructors of
// `Producer` and `Consumer` reach through them.
unsafe impl<T: Send> Send for RingMemory<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for RingMemory<T> {}

impl<T: Copy> RingMemory<T> {
    /// A ring of `size` entries whose fields are at the given places.
    ///
    /// # Safety
    ///
    /// The three words and the `size` slots are valid, aligned, initialised, and stay so for as
    /// long as `owner` lives.
    ///
    /// # Panics
    ///
    /// When `size` is not a power of two, or 0.
    pub unsafe fn new(
        producer: NonNull<AtomicU32>,
        consumer: NonNull<AtomicU32>,
        flags: NonNull<AtomicU32>,
        slots: NonNull<Slot<T>>,
        size: u32,
        owner: std::sync::Arc<dyn Any + Send + Sync>,
    ) -> Self {
        assert!(size.is_power_of_two(), "a ring of {size} entries: not a power of two");
        Self { producer, consumer, flags, slots, size, owner }
    }

    /// A ring in memory of its own, with both indices at `start`: for simulated kernels and tests.
    ///
    /// # Panics
    ///
    /// When `size` is not a power of two, or 0.
    pub fn allocate(size: u32, start: u32) -> Self
    where
        T: Default + Send + 'static,
    {
        assert!(size.is_power_of_two(), "a ring of {size} entries: not a power of two");
        let owned = std::sync::Arc::new(OwnedRing::<T> {
            producer: Line(AtomicU32::new(start)),
            consumer: Line(AtomicU32::new(start)),
            flags: Line(AtomicU32::new(0)),
            slots: (0..size).map(|_| Slot::new(T::default())).collect(),
        });
        let (producer, consumer) = (NonNull::from(&owned.producer.0), NonNull::from(&owned.consumer.0));
        let flags = NonNull::from(&owned.flags.0);
        // A pointer to the whole of the slots, not to the first.
        let slots = NonNull::from(&owned.slots[..]).cast();
        // SAFETY: the fields are those of `owned`, which is the owner and does not move.
        unsafe { Self::new(producer, consumer, flags, slots, size, owned) }
    }

    /// Entries.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// The producer's index as published.
    pub fn producer(&self) -> u32 {
        self.word(self.producer).load(Acquire)
    }

    /// The consumer's index as published.
    pub fn consumer(&self) -> u32 {
        self.word(self.consumer).load(Acquire)
    }

    /// Entries published and not yet consumed; `None` when the indices contradict each other.
    ///
    /// Each side gets a true answer. To anybody else who looks while both sides are at work, a
    /// ring that was emptied and filled in between may seem to hold more than its size.
    pub fn filled(&self) -> Option<u32> {
        // The consumer first: the producer read later can only be further on.
        let consumer = self.consumer();
        let filled = self.producer().wrapping_sub(consumer);
        (filled <= self.size).then_some(filled)
    }

    /// The flags word.
    pub fn flags(&self) -> u32 {
        self.word(self.flags).load(Relaxed)
    }

    /// Sets the flags word, as the kernel's side does.
    pub fn set_flags(&self, flags: u32) {
        self.word(self.flags).store(flags, Relaxed);
    }

    /// Moves the producer's index to any place: what a broken peer might do.
    ///
    /// # Safety
    ///
    /// The entries that a consumer is made to see hold values that it may act upon.
    pub unsafe fn set_producer(&self, index: u32) {
        self.word(self.producer).store(index, Release);
    }

    /// Moves the consumer's index to any place: what a broken peer might do.
    ///
    /// # Safety
    ///
    /// The slots that a producer is made to see as free are read by nobody.
    pub unsafe fn set_consumer(&self, index: u32) {
        self.word(self.consumer).store(index, Release);
    }

    fn word(&self, word: NonNull<AtomicU32>) -> &AtomicU32 {
        // SAFETY: valid while `owner` lives, hence while `self` does.
        unsafe { word.as_ref() }
    }
}

/// A field on a cache line of its own, so that one side's stores don't disturb the other's.
#[repr(align(64))]
struct Line(AtomicU32);

struct OwnedRing<T> {
    producer: Line,
    consumer: Line,
    flags: Line,
    slots: Box<[Slot<T>]>,
}

// SAFETY: the slots are handed from side to side by the ring protocol.
unsafe impl<T: Send> Sync for OwnedRing<T> {}

/// Slots from index `next` on that lie in one piece: up to the end of the memory.
#[inline(always)]
fn piece(next: u32, mask: u32) -> u32 {
    mask - (next & mask) + 1
}

/// `n <= piece(next, mask)` in fewer instructions, for an `n` between 1 and the size of the ring.
#[inline(always)]
fn is_piece(next: u32, mask: u32, n: u32) -> bool {
    (next & mask) + (n - 1) <= mask
}

/// The side of a ring that writes entries.
#[derive(Debug)]
pub struct Producer<T> {
    /// Index of the next entry to publish; equal to the shared index between batches.
    next: u32,
    /// The consumer's index as last read, plus the size: where room ends.
    room_end: u32,
    mask: u32,
    slots: NonNull<Slot<T>>,
    memory: RingMemory<T>,
}

// SAFETY: the memory may be reached from any thread; `&mut self` keeps it to one at a time.
unsafe impl<T: Send> Send for Producer<T> {}

impl<T: Copy> Producer<T> {
    /// Works the producer's side of `memory`, from its index as it stands.
    ///
    /// # Safety
    ///
    /// Nothing else works this side for as long as the value lives, and the other side follows
    /// the protocol above.
    pub unsafe fn new(memory: RingMemory<T>) -> Self {
        // No room until the consumer's index was read, and checked.
        let next = memory.producer();
        Self { next, room_end: next, mask: memory.size - 1, slots: memory.slots, memory }
    }

    /// Room for entries, at least as much as was seen last; read anew when that is less than `want`.
    #[inline(always)]
    pub fn room(&mut self, want: u32) -> u32 {
        let room = self.room_end.wrapping_sub(self.next);
        if room >= want {
            return room;
        }
        self.refresh()
    }

    /// Reads the consumer's index anew.
    #[cold]
    #[inline(never)]
    fn refresh(&mut self) -> u32 {
        let room_end = self.memory.consumer().wrapping_add(self.mask).wrapping_add(1);
        let room = room_end.wrapping_sub(self.next);
        // A consumer that claims more than was ever produced gives no room at all.
        if room > self.mask + 1 {
            return self.room_end.wrapping_sub(self.next);
        }
        self.room_end = room_end;
        room
    }

    /// Up to `n` entries to write, published together when the guard is dropped.
    #[inline(always)]
    pub fn reserve(&mut self, n: u32) -> Slots<'_, T> {
        let next = self.next;
        let n = if self.room_end.wrapping_sub(next) >= n { n } else { self.refresh().min(n) };
        Slots { next, end: next.wrapping_add(n), ring: self }
    }

    #[inline(always)]
    fn publish(&mut self, next: u32) {
        self.next = next;
        self.memory.word(self.memory.producer).store(next, Release);
    }

    /// Entries that were written and not yet published, below the index `end`.
    ///
    /// # Safety
    ///
    /// A guard of this ring has pushed that far, and is not dropped yet.
    pub(crate) unsafe fn unpublished(&self, end: u32) -> impl Iterator<Item = T> {
        (0..end.wrapping_sub(self.next)).map(|i| {
            let slot = self.next.wrapping_add(i) & self.mask;
            // SAFETY: under the mask it is one of the ring's slots; it was written, and is this
            // side's alone until the index passes it.
            unsafe { self.slots.add(slot as usize).as_ref().read() }
        })
    }

    /// Whether the kernel asked to be woken.
    ///
    /// Entries published before this call are either seen by the kernel without a wake-up, or the
    /// flag is seen here: as far as this side can ensure that. Why the fence: publishing is a
    /// store (the index), then this is a load (the flag) of another word, and a processor may
    /// perform them the other way round. The kernel does the mirror image: it stores the flag,
    /// then loads the index. Without a full fence on this side both could read the old values:
    /// the kernel goes to sleep over an entry, and the program does not wake it.
    ///
    /// The kernel has no such fence on its side (`xsk_set_rx_need_wakeup` is a plain `|=`), and
    /// some drivers set the flag *after* their last look at the ring (i40e on receive). So the
    /// flag can appear a moment after it was read as clear. Ask again on every idle iteration, and
    /// go through the kernel's poll before blocking: it looks at the driver's own copy of the flag.
    #[inline(always)]
    pub fn needs_wakeup(&self) -> bool {
        fence(SeqCst);
        self.memory.flags() & XDP_RING_NEED_WAKEUP != 0
    }

    /// Takes back the entry that was published last; `None` when the other side has taken all.
    ///
    /// # Safety
    ///
    /// The other side is not at work: it takes no entry during this call.
    pub unsafe fn withdraw(&mut self) -> Option<T> {
        // Of a ring whose indices contradict each other nothing is known.
        if matches!(self.memory.filled(), None | Some(0)) {
            return None;
        }
        self.next = self.next.wrapping_sub(1);
        self.memory.word(self.memory.producer).store(self.next, Release);
        // SAFETY: under the mask it is one of the ring's slots, and this side wrote it.
        Some(unsafe { self.slots.add((self.next & self.mask) as usize).as_ref().read() })
    }

    /// Index of the next entry: how many were produced since index 0, modulo 2^32.
    #[inline(always)]
    pub fn index(&self) -> u32 {
        self.next
    }

    /// The shared memory, for a look at the indices.
    pub fn memory(&self) -> &RingMemory<T> {
        &self.memory
    }
}

/// Entries being written. Dropping it publishes what was pushed, and only if something was.
#[derive(Debug)]
pub struct Slots<'r, T: Copy> {
    next: u32,
    end: u32,
    ring: &'r mut Producer<T>,
}

impl<T: Copy> Slots<'_, T> {
    /// Entries that can still be pushed.
    #[inline(always)]
    pub fn room(&self) -> u32 {
        self.end.wrapping_sub(self.next)
    }

    /// The ring, and the index up to which it will be published when the guard is dropped: what
    /// [`Producer::unpublished`] needs.
    #[inline(always)]
    pub(crate) fn pushed(&self) -> (&Producer<T>, u32) {
        (self.ring, self.next)
    }

    /// Slots from the next on that lie in one piece, taken or not: up to the end of the memory.
    #[inline(always)]
    pub(crate) fn piece(&self) -> u32 {
        piece(self.next, self.ring.mask)
    }

    /// Whether `n` slots from the next on lie in one piece: `n <= piece()` in fewer instructions.
    ///
    /// `n` is between 1 and the size of the ring.
    #[inline(always)]
    pub(crate) fn is_piece(&self, n: u32) -> bool {
        is_piece(self.next, self.ring.mask, n)
    }

    /// Publishes what was pushed, which is something: the drop without its question.
    #[inline(always)]
    pub(crate) fn publish(self) {
        let mut slots = core::mem::ManuallyDrop::new(self);
        let next = slots.next;
        slots.ring.publish(next);
    }

    /// Writes the next entry; `false` when there is no room left.
    #[inline(always)]
    #[must_use = "without room nothing was written"]
    pub fn push(&mut self, value: T) -> bool {
        if self.next == self.end {
            return false;
        }
        // SAFETY: there is room.
        unsafe { self.push_unchecked(value) };
        true
    }

    /// Writes the next entry.
    ///
    /// # Safety
    ///
    /// [`room`](Self::room) is not 0.
    #[inline(always)]
    unsafe fn push_unchecked(&mut self, value: T) {
        // SAFETY: under the mask it is one of the ring's slots. Between consumer + size and
        // producer the slot is this side's alone: the consumer reads none beyond the producer
        // index, which moves only when this guard is dropped.
        unsafe { self.ring.slots.add((self.next & self.ring.mask) as usize).as_ref().write(value) };
        self.next = self.next.wrapping_add(1);
    }
}

impl<T: Copy> Drop for Slots<'_, T> {
    #[inline(always)]
    fn drop(&mut self) {
        // An unchanged index is not stored: it would take the line away from the other side.
        if self.next != self.ring.next {
            self.ring.publish(self.next);
        }
    }
}

/// The side of a ring that reads entries.
#[derive(Debug)]
pub struct Consumer<T> {
    /// Index of the next entry to take.
    next: u32,
    /// The producer's index as last read.
    end: u32,
    /// The shared index as last stored; equal to `next` unless a guard is alive or was forgotten.
    released: u32,
    mask: u32,
    slots: NonNull<Slot<T>>,
    memory: RingMemory<T>,
}

// SAFETY: the memory may be reached from any thread; `&mut self` keeps it to one at a time.
unsafe impl<T: Send> Send for Consumer<T> {}

impl<T: Copy> Consumer<T> {
    /// Works the consumer's side of `memory`, from its index as it stands.
    ///
    /// # Safety
    ///
    /// Nothing else works this side for as long as the value lives, and the other side follows
    /// the protocol above.
    pub unsafe fn new(memory: RingMemory<T>) -> Self {
        let next = memory.consumer();
        Self { next, end: next, released: next, mask: memory.size - 1, slots: memory.slots, memory }
    }

    /// Entries to take: as many as were seen last, read anew when that is none.
    #[inline(always)]
    pub fn available(&mut self) -> u32 {
        let n = self.end.wrapping_sub(self.next);
        if n != 0 {
            return n;
        }
        self.refresh()
    }

    /// Reads the producer's index anew.
    #[cold]
    #[inline(never)]
    fn refresh(&mut self) -> u32 {
        let end = self.memory.producer();
        let n = end.wrapping_sub(self.next);
        // A producer that claims more than fits has published nothing that could be trusted.
        if n > self.mask + 1 {
            return 0;
        }
        self.end = end;
        n
    }

    /// Takes up to `n` entries. What the guard does not yield stays in the ring.
    #[inline(always)]
    pub fn take(&mut self, n: u32) -> Entries<'_, T> {
        if self.is_unsettled() {
            self.settle();
        }
        let next = self.next;
        let end = next.wrapping_add(self.available().min(n));
        // Taken until proven otherwise: were the guard forgotten, the entries would be lost, and
        // not be yielded by the next call as well.
        self.next = end;
        Entries { next, end, ring: self }
    }

    /// Whether a guard was forgotten.
    #[inline(always)]
    pub(crate) fn is_unsettled(&self) -> bool {
        self.next != self.released
    }

    /// Releases the entries of a guard that was forgotten; returns how many it held.
    ///
    /// They are lost, but their slots must not be: the other side could never fill them again.
    /// [`take`](Self::take) does this first.
    #[cold]
    #[inline(never)]
    pub(crate) fn settle(&mut self) -> u32 {
        let lost = self.next.wrapping_sub(self.released);
        self.release(self.next);
        lost
    }

    #[inline(always)]
    fn release(&mut self, next: u32) {
        self.next = next;
        self.released = next;
        self.memory.word(self.memory.consumer).store(next, Release);
    }

    /// Index of the next entry: how many were consumed since index 0, modulo 2^32.
    #[inline(always)]
    pub fn index(&self) -> u32 {
        self.next
    }

    /// The shared memory, for a look at the indices.
    pub fn memory(&self) -> &RingMemory<T> {
        &self.memory
    }
}

/// Entries being taken. Dropping it releases those that were yielded.
#[derive(Debug)]
pub struct Entries<'r, T: Copy> {
    next: u32,
    end: u32,
    ring: &'r mut Consumer<T>,
}

impl<T: Copy> Entries<'_, T> {
    /// Entries not yet yielded.
    #[inline(always)]
    pub fn left(&self) -> u32 {
        self.end.wrapping_sub(self.next)
    }

    /// Yields no more than `n` from here on.
    #[inline(always)]
    pub fn limit(&mut self, n: u32) {
        if n < self.left() {
            self.end = self.next.wrapping_add(n);
        }
    }

    /// Entries from the next on that lie in one piece, there or not: up to the end of the memory.
    #[inline(always)]
    pub(crate) fn piece(&self) -> u32 {
        piece(self.next, self.ring.mask)
    }

    /// Whether `n` entries from the next on lie in one piece; see [`Slots::is_piece`].
    #[inline(always)]
    pub(crate) fn is_piece(&self, n: u32) -> bool {
        is_piece(self.next, self.ring.mask, n)
    }

    /// Releases what was yielded, which is something: the drop without its question.
    #[inline(always)]
    pub(crate) fn release(self) {
        let mut entries = core::mem::ManuallyDrop::new(self);
        let next = entries.next;
        entries.ring.release(next);
    }

    /// The next entry.
    ///
    /// # Safety
    ///
    /// [`left`](Self::left) is not 0.
    #[inline(always)]
    unsafe fn next_unchecked(&mut self) -> T {
        // SAFETY: under the mask it is one of the ring's slots. Between consumer and producer
        // index the slot is this side's: the producer writes none before the consumer index,
        // which moves only when this guard is dropped, has passed it.
        let value = unsafe { self.ring.slots.add((self.next & self.ring.mask) as usize).as_ref().read() };
        self.next = self.next.wrapping_add(1);
        value
    }
}

impl<T: Copy> Iterator for Entries<'_, T> {
    type Item = T;

    #[inline(always)]
    fn next(&mut self) -> Option<T> {
        if self.next == self.end {
            return None;
        }
        // SAFETY: something is left.
        Some(unsafe { self.next_unchecked() })
    }

    #[inline(always)]
    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left() as usize, Some(self.left() as usize))
    }
}

impl<T: Copy> ExactSizeIterator for Entries<'_, T> {}

impl<T: Copy> Drop for Entries<'_, T> {
    #[inline(always)]
    fn drop(&mut self) {
        if self.next == self.ring.released {
            self.ring.next = self.next;
        } else {
            self.ring.release(self.next);
        }
    }
}

/// [`transfer`] of a single entry.
///
/// # Safety
///
/// An entry is left, and there is room for one.
#[inline(always)]
pub(crate) unsafe fn transfer_one<A: Copy, B: Copy>(
    from: &mut Entries<'_, A>,
    to: &mut Slots<'_, B>,
    each: impl FnOnce(A) -> Option<B>,
) -> bool {
    // SAFETY: as promised by the caller.
    let entry = unsafe { from.next_unchecked() };
    let Some(entry) = each(entry) else { return false };
    // SAFETY: as promised by the caller.
    unsafe { to.push_unchecked(entry) };
    true
}

/// Takes `n` entries and pushes what `each` makes of them, in order.
///
/// Where `each` has nothing to push, the entry is taken all the same, and this ends there: it
/// returns whether all `n` were pushed.
///
/// This is what a loop over a batch comes down to, done once for both ends: from one ring's memory
/// to the other's, with one count and no mask.
///
/// # Safety
///
/// `n` entries are left, and there is room for as many; they lie in one piece on either side. `n` is
/// not 0.
#[inline(always)]
pub(crate) unsafe fn transfer<A: Copy, B: Copy>(
    from: &mut Entries<'_, A>,
    to: &mut Slots<'_, B>,
    n: u32,
    mut each: impl FnMut(A) -> Option<B>,
) -> bool {
    /// Counts what was done; on drop, as when `each` panics.
    struct Count<'p> {
        taken: usize,
        pushed: usize,
        from: &'p mut u32,
        to: &'p mut u32,
    }
    impl Drop for Count<'_> {
        #[inline(always)]
        fn drop(&mut self) {
            *self.from = self.from.wrapping_add(self.taken as u32);
            *self.to = self.to.wrapping_add(self.pushed as u32);
        }
    }

    let (first, place) = (from.next & from.ring.mask, to.next & to.ring.mask);
    // SAFETY: under the mask they are slots of their rings.
    let (source, target) =
        unsafe { (from.ring.slots.add(first as usize), to.ring.slots.add(place as usize)) };
    let last = n as usize - 1;
    let mut count = Count { taken: 0, pushed: 0, from: &mut from.next, to: &mut to.next };
    loop {
        // SAFETY: `n` entries are left, and none of them is behind the end of the memory. They are
        // this side's, as for `Entries::next_unchecked`.
        let entry = unsafe { source.add(count.taken).as_ref().read() };
        count.taken += 1;
        let Some(entry) = each(entry) else { return false };
        // SAFETY: `n` slots are free, and none of them is behind the end of the memory. They are
        // this side's, as for `Slots::push_unchecked`.
        unsafe { target.add(count.pushed).as_ref().write(entry) };
        let done = count.pushed == last;
        count.pushed += 1;
        if done {
            return true;
        }
    }
}
