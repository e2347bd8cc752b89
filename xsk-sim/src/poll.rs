//! Waiting: `poll` on sockets, watches, and descriptors that are not the simulated kernel's.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use xsk::kernel::{Errno, POLLIN, PollEntry};

use crate::Sim;
use crate::files;
use crate::socket::{POLLRDNORM, SocketId};
use crate::state::{Object, State};

/// What an entry waits for.
#[derive(Clone, Copy)]
enum Target {
    Socket(SocketId),
    /// A watch over a device.
    Watch,
    /// Something else of this kernel's: its descriptor tells.
    Own,
    /// Something of another kernel's, which may happen at any time.
    Foreign,
}

/// What came of looking at all entries.
enum Now {
    Ready(usize),
    GoOn,
    /// Nothing is left that could happen here. The events that tell of it when something does.
    Still(Vec<i16>),
}

impl State {
    fn target(&self, entry: &PollEntry<'_>) -> Target {
        let fd = entry.fd.as_raw_fd();
        match self.files.get(&fd) {
            Some(Object::Socket(id)) => Target::Socket(*id),
            Some(_) => Target::Own,
            None if self.watches.contains_key(&fd) => Target::Watch,
            None => Target::Foreign,
        }
    }

    /// The events of an entry's descriptor that tell when to look again.
    fn waking(&self, entry: &PollEntry<'_>, target: Target) -> i16 {
        match target {
            // What is in RX stays there while the device is down, and the descriptor readable. It is
            // always writable: that there is room in TX, nobody tells.
            Target::Socket(id) if self.is_silent(id) => 0,
            Target::Socket(_) => entry.events & (POLLIN | POLLRDNORM),
            Target::Watch | Target::Own | Target::Foreign => entry.events,
        }
    }

    /// Whether `poll` tells nothing of a socket: it is not bound, or its device is down.
    pub(crate) fn is_silent(&self, id: SocketId) -> bool {
        self.sockets[&id].bound_to_running(&self.net).is_err()
    }
}

impl Sim {
    /// `poll`: takes steps until an entry is ready, or until nothing is left that could happen.
    pub(crate) fn wait(
        &self,
        entries: &mut [PollEntry<'_>],
        timeout: Option<Duration>,
    ) -> Result<usize, Errno> {
        // A moment beyond what can be counted never comes.
        let end = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let targets: Vec<_> = self.with(|state| entries.iter().map(|entry| state.target(entry)).collect());
        let alarm = if targets.iter().any(|target| matches!(target, Target::Foreign)) {
            Some(Arc::new(files::open()?))
        } else {
            None
        };
        let mut first = true;
        loop {
            // The lock is let go after each step, so that other threads can have their say.
            let now = self.with(|state| {
                let (ready, progress) = look(state, entries, &targets, first)?;
                if ready > 0 {
                    return Ok(Now::Ready(ready));
                }
                if progress || state.step() {
                    return Ok(Now::GoOn);
                }
                state.sleepers.extend(alarm.clone());
                let waking = entries.iter().zip(&targets).map(|(entry, target)| state.waking(entry, *target));
                Ok::<_, Errno>(Now::Still(waking.collect()))
            })?;
            first = false;
            match (now, &alarm) {
                (Now::Ready(ready), _) => return Ok(ready),
                (Now::GoOn, _) => {}
                // Nothing will happen before the time is over, so it is over now.
                (Now::Still(_), None) if timeout.is_some() => return Ok(0),
                (Now::Still(_), None) => return Err(Errno::DEADLK),
                (Now::Still(waking), Some(alarm)) => {
                    let left = end.map(|end| end.saturating_duration_since(Instant::now()));
                    let woken = sleep(entries, &waking, alarm, left);
                    self.with(|state| state.sleepers.retain(|other| !Arc::ptr_eq(other, alarm)));
                    files::clear(alarm);
                    if !woken? {
                        return Ok(0);
                    }
                }
            }
        }
    }
}

/// One look at all entries: how many are ready, and whether looking changed anything.
///
/// The first look transmits, as `poll` does on Linux.
fn look(
    state: &mut State,
    entries: &mut [PollEntry<'_>],
    targets: &[Target],
    first: bool,
) -> Result<(usize, bool), Errno> {
    let mut progress = false;
    for (entry, target) in entries.iter_mut().zip(targets) {
        entry.revents = 0;
        match *target {
            Target::Socket(id) => {
                state.socket(id).settle();
                let (ready, moved) = state.look(id, first);
                entry.revents = ready & entry.events;
                progress |= moved;
            }
            Target::Watch => {
                let told = state.watches.get(&entry.fd.as_raw_fd()).is_some_and(|watched| watched.told);
                entry.revents = if told { entry.events & POLLIN } else { 0 };
            }
            Target::Own | Target::Foreign => {}
        }
    }
    // Under the kernel's lock: no watch is told of anything meanwhile.
    let is_other = |target: &Target| matches!(target, Target::Own | Target::Foreign);
    let others = || targets.iter().enumerate().filter(|(_, target)| is_other(target));
    let mut fds: Vec<_> = others().map(|(at, _)| poll_fd(&entries[at], entries[at].events)).collect();
    if !fds.is_empty() {
        poll(&mut fds, Some(&Timespec::default()))?;
        let found: Vec<_> = fds.iter().map(|fd| fd.revents().bits() as i16).collect();
        for ((at, _), revents) in others().zip(found) {
            entries[at].revents = revents;
        }
    }
    Ok((entries.iter().filter(|entry| entry.revents != 0).count(), progress))
}

/// Sleeps until an entry may have become ready, or something can happen: the time was not over.
fn sleep(
    entries: &[PollEntry<'_>],
    waking: &[i16],
    alarm: &OwnedFd,
    left: Option<Duration>,
) -> Result<bool, Errno> {
    let mut fds: Vec<_> = entries.iter().zip(waking).map(|(entry, events)| poll_fd(entry, *events)).collect();
    fds.push(PollFd::new(alarm, PollFlags::IN));
    let left = left.and_then(|left| Timespec::try_from(left).ok());
    Ok(poll(&mut fds, left.as_ref())? > 0)
}

/// An entry as the real kernel takes it.
fn poll_fd<'e>(entry: &'e PollEntry<'_>, events: i16) -> PollFd<'e> {
    // The bits are signed or not by rustix's backend.
    PollFd::new(&entry.fd, PollFlags::from_bits_retain(events as _))
}
