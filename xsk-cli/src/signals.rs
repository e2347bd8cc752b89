//! Ctrl-C and SIGTERM: a flag for who works, and a byte for who waits.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::{SigId, flag, low_level};

/// The wish that the work ends: by a signal, or by the command itself.
///
/// The first Ctrl-C asks for the end and the summary; a second one kills.
#[derive(Debug)]
pub(crate) struct Stop {
    asked: Arc<AtomicBool>,
    waiting: UnixStream,
    waking: UnixStream,
    registered: Vec<SigId>,
}

impl Stop {
    /// Listens to the signals for as long as it lives.
    pub(crate) fn listen() -> io::Result<Self> {
        let (waiting, waking) = UnixStream::pair()?;
        waking.set_nonblocking(true)?;
        let mut stop = Self { asked: Arc::default(), waiting, waking, registered: Vec::new() };
        for signal in [SIGINT, SIGTERM] {
            // In this order: the flag that makes the second signal kill is set by the first.
            stop.registered.push(flag::register_conditional_default(signal, stop.asked.clone())?);
            stop.registered.push(flag::register(signal, stop.asked.clone())?);
            stop.registered.push(low_level::pipe::register(signal, stop.waking.try_clone()?)?);
        }
        Ok(stop)
    }

    /// Whether the end was asked for.
    #[inline]
    pub(crate) fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// Asks for the end.
    pub(crate) fn ask(&self) {
        self.asked.store(true, Ordering::Relaxed);
        self.wake();
    }

    /// Ends a [`wait`](Self::wait) early.
    pub(crate) fn wake(&self) {
        // It fails only when it is full of earlier bytes, which do as well.
        let _ = (&self.waking).write(&[0]);
    }

    /// Waits until the time is over, a signal comes, or somebody wakes it.
    pub(crate) fn wait(&self, time: Duration) -> io::Result<()> {
        // A time of 0 would be refused.
        self.waiting.set_read_timeout(Some(time.max(Duration::from_micros(1))))?;
        // Bytes that are left over end the next wait at once, which does no harm.
        match (&self.waiting).read_exact(&mut [0]) {
            Ok(()) => Ok(()),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted => Ok(()),
                _ => Err(error),
            },
        }
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        for id in self.registered.drain(..) {
            low_level::unregister(id);
        }
    }
}
