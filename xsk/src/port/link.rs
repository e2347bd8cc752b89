//! What becomes of a port's interface, as events.

use core::time::Duration;
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::time::Instant;

use crate::device::{Device, DeviceInfo};
use crate::error::{Cause, Doing, Error, Result, general};
use crate::kernel::{POLLIN, PollEntry, Watch};
use crate::socket::Socket;

/// Something that happened to a port's interface.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// Binding or attaching reset the link; the port waited until it was back.
    LinkReset {
        /// How long that took.
        waited: Duration,
    },
    /// Binding or attaching reset the link, and it is not back. The port waited for so long.
    LinkStillDown {
        /// How long it waited.
        waited: Duration,
    },
    /// The interface was switched off. Nothing arrives, and what is in TX stays there.
    Down,
    /// The interface was switched on again. The port goes on; what was in TX is sent.
    Up,
    /// The link is lost: the cable, or the other end. What is sent now is lost.
    LinkLost,
    /// The link is back.
    LinkBack,
    /// The interface has another number of queues than before.
    ///
    /// veth (6.18) runs its program on a new queue only once it was switched off and on: until then
    /// nothing arrives there, taken on or not.
    Queues {
        /// How many it had.
        was: u32,
        /// How many it has.
        now: u32,
        /// Queues that the port has taken on: new ones, where it was opened for all of them.
        taken: Vec<u32>,
    },
    /// The interface is gone. What arrived before can still be taken; after that every call fails.
    Removed,
}

/// What is known of the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub(super) up: bool,
    pub(super) carrier: bool,
    pub(super) queues: u32,
}

impl State {
    pub(super) fn of(info: &DeviceInfo) -> Self {
        Self { up: info.is_up(), carrier: info.has_carrier(), queues: info.queues() }
    }
}

/// Looks after the interface of a port.
#[derive(Debug)]
pub(super) struct Link {
    device: Device,
    watch: Box<dyn Watch>,
    state: State,
    gone: bool,
    /// A socket of the port. The kernel takes it off an interface that goes, whatever the namespace of
    /// the thread that asks.
    socket: Option<Socket>,
    /// What the port has not heard of yet.
    news: News,
    /// The last change could not be read.
    stale: bool,
    events: VecDeque<Event>,
    /// Turns without a packet, since somebody last looked.
    idle: u32,
}

/// What a port has to do after a look at its link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct News {
    /// Something happened.
    pub(super) any: bool,
    /// What is in TX must be told to the kernel again.
    pub(super) back: bool,
    /// The number of queues changed.
    pub(super) queues: Option<(u32, u32)>,
}

/// Idle turns after which a port that never waits looks at its link: a call in some milliseconds.
const IDLE_TURNS: u32 = 1 << 16;
/// Events that are kept for a program that does not ask for them; the oldest go first.
const MAX_EVENTS: usize = 64;

impl Link {
    pub(super) fn watch(device: &Device, socket: Option<&Socket>) -> Result<Self> {
        let watching = || Doing::ReadDevice { name: device.name().into() };
        let watch = device.kernel().watch(device.index()).map_err(|errno| {
            let cause = match errno {
                crate::kernel::Errno::NODEV => Cause::InterfaceGone,
                errno => general(errno),
            };
            Error::with_errno(watching(), cause, errno)
        })?;
        let state = State::of(&device.info()?);
        Ok(Self {
            device: device.clone(),
            watch,
            state,
            gone: false,
            socket: socket.cloned(),
            news: News::default(),
            stale: false,
            events: VecDeque::new(),
            idle: 0,
        })
    }

    pub(super) fn watched(&self) -> PollEntry<'_> {
        PollEntry { fd: self.watch.as_fd(), events: POLLIN, revents: 0 }
    }

    /// Whether the interface is switched on, as far as is known.
    #[inline(always)]
    pub(super) fn is_up(&self) -> bool {
        self.state.up
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone
    }

    /// The next event.
    pub(super) fn next(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    pub(super) fn tell(&mut self, event: Event) {
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    /// Events that were not asked for yet, for another port of the same interface.
    pub(super) fn take_over(&mut self, from: &mut Self) {
        self.events.append(&mut from.events);
    }

    /// Counts a turn without a packet. `true` when it is time for a look.
    #[inline(always)]
    pub(super) fn is_time(&mut self) -> bool {
        self.idle += 1;
        self.idle >= IDLE_TURNS
    }

    /// Looks whether something happened.
    pub(super) fn look(&mut self) -> News {
        self.idle = 0;
        if !self.gone && (self.watch.take() || self.stale) {
            self.read();
        }
        core::mem::take(&mut self.news)
    }

    /// Finds out what happened.
    fn read(&mut self) {
        if self.gone {
            return;
        }
        self.stale = false;
        let now = match self.device.info() {
            Ok(info) => State::of(&info),
            Err(error) if *error.cause() == Cause::InterfaceGone && !self.is_bound() => return self.lose(),
            // Nothing is known; the next look asks again.
            Err(_) => {
                self.stale = true;
                return;
            }
        };
        let was = core::mem::replace(&mut self.state, now);
        self.news.any |= now != was;
        match (was.up, now.up) {
            (true, false) => self.tell(Event::Down),
            (false, true) => {
                self.tell(Event::Up);
                self.news.back = true;
            }
            _ => {}
        }
        // That an interface which is switched off has no link goes without saying.
        let link = |state: State| state.carrier || !state.up;
        match (link(was), link(now)) {
            (true, false) => self.tell(Event::LinkLost),
            (false, true) if now.up => {
                self.tell(Event::LinkBack);
                self.news.back = true;
            }
            _ => {}
        }
        if was.queues != now.queues {
            let first = self.news.queues.map_or(was.queues, |(first, _)| first);
            self.news.queues = Some((first, now.queues));
        }
    }

    /// Whether the kernel still has the port's socket on its interface.
    fn is_bound(&self) -> bool {
        self.socket.as_ref().is_some_and(|socket| socket.raw().is_bound())
    }

    fn lose(&mut self) {
        self.gone = true;
        self.state.up = false;
        self.news.any = true;
        self.tell(Event::Removed);
    }

    /// What became of the link while the port was opened: one that was there `before` and is not any
    /// more is waited for.
    pub(super) fn wait_for_reset(&mut self, before: State, patience: Duration) {
        /// Changes of the carrier are told late, so it is asked for.
        const LOOK: Duration = Duration::from_millis(20);
        let begin = Instant::now();
        let mut missed = false;
        while let Ok(info) = self.device.info() {
            self.state = State::of(&info);
            let waited = begin.elapsed();
            if self.state.carrier || !before.carrier || !self.state.up {
                if missed {
                    self.tell(Event::LinkReset { waited });
                }
                break;
            }
            missed = true;
            if waited >= patience {
                self.tell(Event::LinkStillDown { waited });
                break;
            }
            let mut entries = [self.watched()];
            // However it ends, the state is asked for again.
            let _ = self.device.kernel().poll(&mut entries, Some(LOOK.min(patience - waited)));
            self.watch.take();
        }
        // What was told until here is known.
        self.watch.take();
    }

    /// An error of a call on a socket: that the interface is down or gone is an event, and no error.
    #[cold]
    #[inline(never)]
    pub(super) fn absorb(&mut self, error: Error) -> Result<()> {
        match error.cause() {
            Cause::InterfaceDown => {
                // It may be up again by now.
                self.read();
                Ok(())
            }
            Cause::InterfaceGone => {
                // Drivers say so as well while they have no program or no pool for a moment.
                if !self.gone && !self.is_bound() {
                    self.lose();
                }
                Ok(())
            }
            _ => Err(error),
        }
    }

    /// That the interface is gone, as an error.
    #[cold]
    pub(super) fn gone(&self, queue: u32) -> Error {
        Error::new(Doing::Wait { interface: self.device.name().into(), queue }, Cause::InterfaceGone)
    }
}
