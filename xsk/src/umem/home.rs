//! Where frames live: the way home for one that is dropped, and the end of a UMEM.
//!
//! A frame is a bare pointer, so one that is dropped is looked up by its address among the live
//! UMEMs. That is the slow way and off the data path: programs put frames into pools.
//!
//! A UMEM stays in this register until its last handle is gone *and* every frame is accounted for:
//! at home, or in the kernel's hands in a ring that no longer exists. A frame that outlives all
//! handles keeps the memory, and the last such frame releases it.

use core::ptr::NonNull;
use std::sync::Arc;

use super::Core;
use super::frame::Frame;
use crate::sync::RwLock;

struct Home {
    start: usize,
    end: usize,
    core: Arc<Core>,
}

#[cfg(not(loom))]
static HOMES: RwLock<Vec<Home>> = RwLock::new(Vec::new());
// Each execution that loom explores has a register of its own.
#[cfg(loom)]
loom::lazy_static! {
    static ref HOMES: RwLock<Vec<Home>> = RwLock::new(Vec::new());
}

/// Enters a UMEM that has just been made.
pub(super) fn enter(core: &Arc<Core>) {
    let start = core.facts.base.as_ptr().addr();
    let end = start + core.facts.size as usize;
    HOMES.write().unwrap_or_else(|e| e.into_inner()).push(Home { start, end, core: core.clone() });
}

/// Sends the chunk of a dropped frame back to its UMEM's depot.
#[cold]
#[inline(never)]
pub(super) fn send(frame: NonNull<u8>) {
    let at = frame.as_ptr().addr();
    let core = {
        let homes = HOMES.read().unwrap_or_else(|e| e.into_inner());
        homes.iter().find(|h| (h.start..h.end).contains(&at)).map(|h| h.core.clone())
    };
    // Every frame's UMEM is in the register: it leaves only when no frame is left.
    if let Some(core) = core {
        // SAFETY: the dropped frame was the chunk's only owner.
        core.take_home(unsafe { Frame::new(frame) });
        retire(&core);
    }
}

/// Removes the UMEM when nothing refers to it any more; its memory goes with the last reference.
pub(super) fn retire(core: &Arc<Core>) {
    if !core.is_finished() {
        return;
    }
    let start = core.facts.base.as_ptr().addr();
    let mut homes = HOMES.write().unwrap_or_else(|e| e.into_inner());
    homes.retain(|h| h.start != start || !Arc::ptr_eq(&h.core, core));
}
