//! Network namespaces, held by a descriptor.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::Error;

/// A network namespace.
///
/// It has no name and no process of its own: it lives while somebody holds it (this value, a thread
/// inside it, or a socket that was opened there) and vanishes with the last of them.
#[derive(Clone, Debug)]
pub struct Namespace(Arc<OwnedFd>);

impl Namespace {
    /// A new one, empty but for a loopback device that is down.
    pub(crate) fn new() -> Result<Self, Error> {
        // On a thread of its own, so that the caller stays where it is.
        on_thread(|| {
            // SAFETY: unsharing the network namespace changes no memory and no descriptor table;
            // the thread ends right after.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
                .map_err(Error::system("making a network namespace"))?;
            Self::current()
        })?
    }

    /// The one in which the calling thread is.
    pub fn current() -> Result<Self, Error> {
        // Not `/proc/self`, which is the process's first thread.
        let file =
            File::open("/proc/thread-self/ns/net").map_err(Error::system("opening the network namespace"))?;
        Ok(Self(Arc::new(file.into())))
    }

    /// The number by which the kernel tells namespaces apart while they live.
    pub fn id(&self) -> Result<u64, Error> {
        Ok(rustix::fs::fstat(&self.0).map_err(Error::system("identifying the network namespace"))?.st_ino)
    }

    /// Moves the calling thread here, for good. Threads that it starts from then on are here too.
    ///
    /// For a thread that was started to work in this namespace; see [`Self::run`] for less.
    pub fn enter(&self) -> Result<(), Error> {
        rustix::thread::move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(Error::system("entering a network namespace"))
    }

    /// Runs `f` in this namespace and waits for it; if `f` panics, so does this.
    ///
    /// It runs on a thread of its own, so nothing that it does to its thread reaches the caller.
    pub fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> Result<R, Error> {
        on_thread(|| self.enter().map(|()| f()))?
    }
}

/// Runs `f` on a new thread and waits for it.
fn on_thread<R: Send>(f: impl FnOnce() -> R + Send) -> Result<R, Error> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("xsk-testbed".into())
            .spawn_scoped(scope, f)
            .map_err(Error::system("starting a thread"))?;
        thread.join().map_or_else(|panic| std::panic::resume_unwind(panic), Ok)
    })
}

impl AsFd for Namespace {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}
