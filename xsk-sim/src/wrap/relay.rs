//! A ring that is worked by two parties who do not meet: entries are carried from the memory of the
//! one to the memory of the other.

use core::ptr::NonNull;
use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;

use xsk::abi::{Descriptor, MmapOffsets, RingKind, RingOffset, SOL_XDP, XDP_MMAP_OFFSETS, bytes_of_mut};
use xsk::kernel::{Errno, Mapping, RawSocket};
use xsk::ring::{Consumer, Producer, RingMemory};

use crate::ring::{Entry, Pages};

/// What an entry becomes on its way.
pub(super) enum Altered {
    /// An entry, as it arrives.
    Entry(Descriptor),
    /// Nothing; it is counted, and the rest of the ring waits for the next time.
    Invalid,
}

/// An entry that can be seen as a descriptor, if only as its address.
pub(super) trait Relayed: Entry {
    fn into_descriptor(self) -> Descriptor;
    fn from_descriptor(descriptor: Descriptor) -> Self;
}

impl Relayed for Descriptor {
    fn into_descriptor(self) -> Descriptor {
        self
    }
    fn from_descriptor(descriptor: Descriptor) -> Self {
        descriptor
    }
}

impl Relayed for u64 {
    fn into_descriptor(self) -> Descriptor {
        Descriptor { addr: self, ..Descriptor::default() }
    }
    fn from_descriptor(descriptor: Descriptor) -> Self {
        descriptor.addr
    }
}

/// The relayed rings of a socket.
#[derive(Default)]
pub(super) struct Relays {
    pub(super) fill: Option<Relay<u64>>,
    pub(super) rx: Option<Relay<Descriptor>>,
    pub(super) tx: Option<Relay<Descriptor>>,
    pub(super) completion: Option<Relay<u64>>,
}

impl Relays {
    /// The program's memory of a ring; made at the first time.
    pub(super) fn map(
        &mut self,
        raw: &dyn RawSocket,
        ring: RingKind,
        entries: u32,
        length: usize,
    ) -> Result<Mapping, Errno> {
        fn mapped<T: Relayed>(
            slot: &mut Option<Relay<T>>,
            raw: &dyn RawSocket,
            ring: RingKind,
            entries: u32,
            length: usize,
        ) -> Result<Mapping, Errno> {
            if slot.is_none() {
                *slot = Some(Relay::new(raw, ring, entries)?);
            }
            slot.as_ref().ok_or(Errno::NOMEM)?.pages.map(length)
        }
        match ring {
            RingKind::Fill => mapped(&mut self.fill, raw, ring, entries, length),
            RingKind::Rx => mapped(&mut self.rx, raw, ring, entries, length),
            RingKind::Tx => mapped(&mut self.tx, raw, ring, entries, length),
            RingKind::Completion => mapped(&mut self.completion, raw, ring, entries, length),
        }
    }

    /// Gives every entry that has been taken at its end back to where it came from.
    pub(super) fn settle(&mut self) {
        self.fill.as_mut().map(Relay::settle);
        self.rx.as_mut().map(Relay::settle);
        self.tx.as_mut().map(Relay::settle);
        self.completion.as_mut().map(Relay::settle);
    }

    /// Moves the index that the program believes to be the kernel's, if entries have moved.
    pub(super) fn go_wild(&mut self, ring: RingKind, ahead: u32) {
        match ring {
            RingKind::Fill => self.fill.as_mut().map(|relay| relay.go_wild(ahead)),
            RingKind::Rx => self.rx.as_mut().map(|relay| relay.go_wild(ahead)),
            RingKind::Tx => self.tx.as_mut().map(|relay| relay.go_wild(ahead)),
            RingKind::Completion => self.completion.as_mut().map(|relay| relay.go_wild(ahead)),
        };
    }
}

/// One ring: entries go from the memory of one party to the memory of the other.
pub(super) struct Relay<T> {
    /// The side of the party that reads, in the memory of the one that writes. Entries are taken
    /// without being released: `released` is published.
    from: Consumer<T>,
    /// The side of the party that writes, in the memory of the one that reads.
    to: Producer<T>,
    /// Taken, and not yet carried.
    waiting: VecDeque<Waiting<T>>,
    /// For each entry that was carried and not yet taken, how many it releases.
    owed: VecDeque<u32>,
    /// The index up to which `from` is free.
    released: u32,
    /// The kernel is the one that reads.
    to_kernel: bool,
    /// Something was carried since an index was last made wild.
    moved: bool,
    pages: Arc<ProgramPages>,
}

struct Waiting<T> {
    entry: Result<T, Nothing>,
    /// Entries of `from` that are free when this one has been taken.
    releases: u32,
}

/// Why an entry is not carried.
enum Nothing {
    Lost,
    Invalid,
}

/// The program's memory, and the kernel's: who has the one keeps the other, and the queue with it.
struct ProgramPages {
    pages: Pages,
    _kernel: Mapping,
}

impl ProgramPages {
    fn map(self: &Arc<Self>, length: usize) -> Result<Mapping, Errno> {
        if length > self.pages.len() {
            return Err(Errno::INVAL);
        }
        // SAFETY: the owner owns the pages, and they have `length` bytes.
        Ok(unsafe { Mapping::new(self.pages.base(), length, self.clone()) })
    }
}

/// A ring in memory of the kernel's layout.
///
/// # Safety
///
/// `base` points to zeroed or shared ring memory that ends no sooner than the last entry, and lives
/// as long as `owner`.
unsafe fn ring<T: Entry>(
    base: NonNull<u8>,
    at: RingOffset,
    entries: u32,
    owner: Arc<dyn Any + Send + Sync>,
) -> RingMemory<T> {
    // SAFETY: the fields are where the kernel says, apart from each other and aligned.
    unsafe {
        RingMemory::new(
            base.add(at.producer as usize).cast(),
            base.add(at.consumer as usize).cast(),
            base.add(at.flags as usize).cast(),
            base.add(at.desc as usize).cast(),
            entries,
            owner,
        )
    }
}

/// Where the fields of a ring are; `EOPNOTSUPP` where there are no flags.
fn offsets(raw: &dyn RawSocket, ring: RingKind) -> Result<RingOffset, Errno> {
    let mut offsets = MmapOffsets::default();
    let known = raw.getsockopt(SOL_XDP, XDP_MMAP_OFFSETS, bytes_of_mut(&mut offsets))?;
    if known < size_of::<MmapOffsets>() {
        return Err(Errno::OPNOTSUPP);
    }
    Ok(match ring {
        RingKind::Rx => offsets.rx,
        RingKind::Tx => offsets.tx,
        RingKind::Fill => offsets.fr,
        RingKind::Completion => offsets.cr,
    })
}

fn map<T: Entry>(raw: &dyn RawSocket, ring: RingKind, entries: u32) -> Result<(Mapping, RingOffset), Errno> {
    let at = offsets(raw, ring)?;
    let mapping = raw.map(ring.page_offset(), at.desc as usize + entries as usize * size_of::<T>())?;
    Ok((mapping, at))
}

/// A ring as the wrapped kernel shares it.
pub(super) fn ring_of_kernel<T: Entry>(
    raw: &dyn RawSocket,
    kind: RingKind,
    entries: u32,
) -> Result<RingMemory<T>, Errno> {
    let (mapping, at) = map::<T>(raw, kind, entries)?;
    // SAFETY: the mapping has all entries, and its owner keeps it.
    Ok(unsafe { ring(mapping.base(), at, entries, mapping.owner().clone()) })
}

impl<T: Relayed> Relay<T> {
    fn new(raw: &dyn RawSocket, kind: RingKind, entries: u32) -> Result<Self, Errno> {
        let (mapping, at) = map::<T>(raw, kind, entries)?;
        let pages = Pages::allocate(mapping.len())?;
        // SAFETY: as above; and the program's memory is as long, zeroed, and owned by `pages`.
        let (kernel, pages, program) = unsafe {
            let kernel: RingMemory<T> = ring(mapping.base(), at, entries, mapping.owner().clone());
            let base = pages.base();
            let pages = Arc::new(ProgramPages { pages, _kernel: mapping });
            (kernel, pages.clone(), ring::<T>(base, at, entries, pages))
        };
        let start = kernel.consumer();
        program.set_flags(kernel.flags());
        let to_kernel = matches!(kind, RingKind::Fill | RingKind::Tx);
        // SAFETY: nobody has seen the program's memory yet, and it is empty. Each side of each ring is
        // worked by its party alone: the relay is the other party's, and there is one relay a ring.
        let (from, to) = unsafe {
            program.set_producer(start);
            program.set_consumer(start);
            let (from, to) = if to_kernel { (program, kernel) } else { (kernel, program) };
            (Consumer::new(from), Producer::new(to))
        };
        let (waiting, owed) = (VecDeque::new(), VecDeque::new());
        Ok(Self { from, to, waiting, owed, released: start, to_kernel, moved: false, pages })
    }

    /// Carries what there is and what there is room for; returns how many entries were invalid,
    /// which is one at most, for it ends the batch.
    pub(super) fn carry(&mut self, mut alter: impl FnMut(Descriptor) -> Vec<Altered>) -> u32 {
        self.settle();
        while self.from.available() != 0 {
            let mut batch = self.from.take(u32::MAX);
            for entry in &mut batch {
                let mut altered: Vec<_> = alter(entry.into_descriptor())
                    .into_iter()
                    .map(|altered| match altered {
                        Altered::Entry(entry) => Ok(T::from_descriptor(entry)),
                        Altered::Invalid => Err(Nothing::Invalid),
                    })
                    .collect();
                if altered.is_empty() {
                    altered.push(Err(Nothing::Lost));
                }
                // A kernel that takes an entry several times has taken it at the first; one that
                // gives it several times waits for the program to take the last.
                let releasing = if self.to_kernel { 0 } else { altered.len() - 1 };
                self.waiting.extend(
                    altered
                        .into_iter()
                        .enumerate()
                        .map(|(i, entry)| Waiting { entry, releases: u32::from(i == releasing) }),
                );
            }
            // Not released: that is done when they were taken at the other end.
            core::mem::forget(batch);
        }
        let mut invalid = 0;
        while let Some(Waiting { entry, releases }) = self.waiting.front().filter(|_| invalid == 0) {
            match entry {
                Ok(entry) if self.to.reserve(1).push(*entry) => self.owed.push_back(*releases),
                Ok(_) => break,
                Err(nothing) => {
                    // Entries are released in order.
                    let before = self.owed.back_mut().unwrap_or(&mut self.released);
                    *before = before.wrapping_add(*releases);
                    invalid += u32::from(matches!(nothing, Nothing::Invalid));
                }
            }
            self.waiting.pop_front();
            self.moved = true;
        }
        self.settle();
        invalid
    }

    /// Gives every entry that has been taken at its end back to where it came from, and makes the
    /// indices and flags true again.
    pub(super) fn settle(&mut self) {
        let to = self.to.memory().clone();
        let beyond = to.consumer().wrapping_sub(self.to.index());
        // SAFETY: the index goes to where it was published by this relay.
        unsafe { to.set_producer(self.to.index()) };
        if (1..=to.size()).contains(&beyond) {
            // A wild index made the reader take entries that never were. It goes on from there.
            // SAFETY: up to the reader's own index everything has been read, and the producer that
            // is replaced does nothing more.
            self.to = unsafe {
                to.set_producer(to.consumer());
                Producer::new(to.clone())
            };
        }
        let left = self.to.index().wrapping_sub(to.consumer()) as usize;
        while self.owed.len() > left {
            self.released = self.released.wrapping_add(self.owed.pop_front().unwrap_or(0));
        }
        // SAFETY: the entries up to there were taken by `from`, which has copied them.
        unsafe { self.from.memory().set_consumer(self.released) };
        if self.to_kernel {
            self.from.memory().set_flags(to.flags());
        }
    }

    /// Whether nothing that was carried is left to be taken.
    pub(super) fn is_empty(&self) -> bool {
        self.to.memory().filled() == Some(0)
    }

    fn go_wild(&mut self, ahead: u32) {
        if !core::mem::take(&mut self.moved) {
            return;
        }
        // SAFETY: all slots hold a value; what it means to act upon old ones, and to write where
        // something was not taken, is on whoever asked for this. No memory of the relay's is at
        // stake: it reads entries up to the writer's index before it moves its own.
        unsafe {
            if self.to_kernel {
                self.from.memory().set_consumer(self.released.wrapping_add(ahead));
            } else {
                self.to.memory().set_producer(self.to.index().wrapping_add(ahead));
            }
        }
    }
}
