//! The atomics and locks that the rings, the ledger and the depot are made of; loom's under `--cfg loom`.
//!
//! Loom's atomics are larger than the hardware's: under it a ring is one of
//! [`RingMemory::allocate`](crate::ring::RingMemory::allocate), never a socket's.

#[cfg(not(loom))]
mod imp {
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, fence};
    pub(crate) use std::sync::{Mutex, MutexGuard, RwLock};

    /// One entry of a ring: memory that the two sides write and read in turn.
    #[repr(transparent)]
    #[derive(Debug)]
    pub struct Slot<T>(core::cell::UnsafeCell<T>);

    impl<T: Copy> Slot<T> {
        /// A slot that holds `value`.
        pub const fn new(value: T) -> Self {
            Self(core::cell::UnsafeCell::new(value))
        }
        /// # Safety
        /// No other thread accesses the slot at this time.
        #[inline(always)]
        pub(crate) unsafe fn write(&self, value: T) {
            // SAFETY: the caller has the slot to itself.
            unsafe { self.0.get().write(value) }
        }
        /// # Safety
        /// No other thread writes the slot at this time.
        #[inline(always)]
        pub(crate) unsafe fn read(&self) -> T {
            // SAFETY: nobody writes the slot now.
            unsafe { self.0.get().read() }
        }
    }
}

#[cfg(loom)]
mod imp {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, fence};
    pub(crate) use loom::sync::{Mutex, MutexGuard, RwLock};

    /// One entry of a ring, watched by loom.
    #[derive(Debug)]
    pub struct Slot<T>(loom::cell::UnsafeCell<T>);

    impl<T: Copy> Slot<T> {
        /// A slot that holds `value`.
        pub fn new(value: T) -> Self {
            Self(loom::cell::UnsafeCell::new(value))
        }
        /// # Safety
        /// No other thread accesses the slot at this time.
        pub(crate) unsafe fn write(&self, value: T) {
            // SAFETY: as promised by the caller, and checked by loom.
            self.0.with_mut(|p| unsafe { p.write(value) });
        }
        /// # Safety
        /// No other thread writes the slot at this time.
        pub(crate) unsafe fn read(&self) -> T {
            // SAFETY: as promised by the caller, and checked by loom.
            self.0.with(|p| unsafe { p.read() })
        }
    }
}

pub use imp::Slot;
pub(crate) use imp::*;
