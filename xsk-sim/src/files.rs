//! Descriptors: every object of the simulated kernel has a real one, an eventfd.
//!
//! Sockets are readable when RX is not empty, and watches when a device changed; maps, programs and
//! links never are. What a number stands for is kept in the kernel's table, so a duplicate of a
//! descriptor (`dup`) is not known.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use xsk::kernel::{Errno, Watch};

use crate::Sim;

/// A new descriptor, not readable.
pub(crate) fn open() -> Result<OwnedFd, Errno> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
}

/// Makes a descriptor readable, with a new event for those who wait for edges.
pub(crate) fn signal(fd: impl AsFd) {
    // It can fail only if the counter is full, and then the descriptor is readable.
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

/// Makes a descriptor not readable; whether it was.
pub(crate) fn clear(fd: impl AsFd) -> bool {
    // It can fail only if the counter is 0, and then the descriptor is not readable.
    rustix::io::read(fd, &mut [0u8; 8]).is_ok()
}

/// What a number is that is not in the kernel's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Foreign {
    /// No open descriptor.
    Closed,
    /// A socket of the real kernel's.
    Socket,
    /// Anything else.
    Other,
}

impl Foreign {
    /// Looks the number up in the process.
    pub(crate) fn of(fd: RawFd) -> Self {
        // SAFETY: reads the flags of a descriptor; any number may be asked for.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } == -1 {
            return Self::Closed;
        }
        let mut stat = core::mem::MaybeUninit::<libc::stat>::uninit();
        // SAFETY: `stat` is written before it is read, which success tells.
        let mode = unsafe {
            if libc::fstat(fd, stat.as_mut_ptr()) == -1 {
                return Self::Closed;
            }
            stat.assume_init().st_mode
        };
        if mode & libc::S_IFMT == libc::S_IFSOCK { Self::Socket } else { Self::Other }
    }
}

/// The handle of a map, a program or a link: what `Handle` boxes.
#[derive(Debug)]
pub(crate) struct File {
    fd: OwnedFd,
    sim: Sim,
}

impl File {
    /// The handle of what is in the table under `fd`.
    pub(crate) fn new(fd: OwnedFd, sim: Sim) -> Self {
        Self { fd, sim }
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // The number leaves the table before it is closed, when it could be given out again.
        self.sim.with(|state| state.close(self.fd.as_raw_fd()));
    }
}

/// The handle of a watch over a device.
#[derive(Debug)]
pub(crate) struct WatchFile {
    fd: Arc<OwnedFd>,
    sim: Sim,
}

impl WatchFile {
    /// Begins a watch.
    pub(crate) fn new(sim: Sim, index: u32) -> Result<Self, Errno> {
        let fd = Arc::new(open()?);
        sim.with(|state| state.watch(index, fd.clone()))?;
        Ok(Self { fd, sim })
    }
}

impl AsFd for WatchFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Watch for WatchFile {
    fn take(&self) -> bool {
        self.sim.with(|state| {
            if let Some(watched) = state.watches.get_mut(&self.fd.as_raw_fd()) {
                watched.told = false;
            }
            clear(&self.fd)
        })
    }
}

impl Drop for WatchFile {
    fn drop(&mut self) {
        // As for `File`.
        self.sim.with(|state| state.watches.remove(&self.fd.as_raw_fd()));
    }
}
