//! What surrounds the loops: their threads, the watcher, and what is told of them.

use std::array;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use xsk::port::{Event, Monitor};
use xsk::xdp::DefaultProgram;
use xsk::{Port, Umem};

use super::threads::{self, Plan};
use super::{DRAIN, Ground};
use crate::cli::{self, Output};
use crate::failure::Failure;
use crate::report::{Reading, Report, Start, Summary};
use crate::signals::Stop;

/// How often the loops are told to look after their interfaces.
const TICK: Duration = Duration::from_millis(100);

/// A sample at work with ports of `N` interfaces: who it is, when it ends, and where it reports.
pub(super) struct Session<'a, const N: usize> {
    start: Start,
    /// Each thread's ports.
    pub(super) parts: Vec<[Port; N]>,
    cpus: Option<Vec<u32>>,
    umem: Umem,
    monitors: Vec<Monitor>,
    output: &'a Output,
    report: Report,
    stop: Stop,
}

impl<'a, const N: usize> Session<'a, N> {
    /// Shares out the queues and says what is about to begin. Signals are heard from here on. `hint`
    /// says that the user may want to know of more queues.
    pub(super) fn start(
        command: &'static str,
        ports: [(Port, &Ground); N],
        program: Option<&DefaultProgram>,
        threads: &cli::Threads,
        output: &'a Output,
        hint: bool,
    ) -> Result<Self, Failure> {
        let stop = Stop::listen()?;
        let queues = ports.iter().map(|(port, _)| port.sockets().count()).min().unwrap_or(0);
        let Plan { threads, cpus } = Plan::new(threads, queues)?;
        let start = Start::new(command, &ports.each_ref().map(|(port, ground)| (port, ground.of)), program)
            .in_threads(threads, cpus.clone());
        let report = Report::new(start.clone(), output.json, !output.interval.is_zero());
        report.start(hint)?;
        for (place, (_, ground)) in ports.iter().enumerate() {
            if let Some(state) = &ground.state {
                report.change(Duration::ZERO, place, state)?;
            }
        }
        let umem = ports[0].0.umem().clone();
        let monitors = ports.iter().map(|(port, _)| port.monitor()).collect();
        let parts = share_out(ports.map(|(port, _)| port), threads)?;
        Ok(Self { start, parts, cpus, umem, monitors, output, report, stop })
    }

    /// Has each thread do its part until the end is asked for or nothing is left to do; reports
    /// meanwhile, and what it came to. `work` is told which part it has.
    pub(super) fn run(
        mut self,
        work: impl Fn(usize, &mut [Port; N], &mut Pulse<'_>) -> xsk::Result<()> + Sync,
    ) -> Result<(), Failure> {
        let mut parts = std::mem::take(&mut self.parts);
        let (seconds, result) = self.conduct(&mut parts, work);
        // While the rings are still there.
        let summary = Reading::take(seconds, &self.monitors)
            .map(|reading| Summary::new(self.start, reading, &self.umem));
        // The programs are detached before the last word.
        drop(parts);
        let written = summary.map_err(Failure::from).and_then(|it| Ok(self.report.summary(&it)?));
        result.and(written)
    }

    /// Runs a loop on each of the threads and the watcher on this one. Tells how long it took, and why
    /// it ended before it was told to.
    fn conduct(
        &self,
        parts: &mut [[Port; N]],
        work: impl Fn(usize, &mut [Port; N], &mut Pulse<'_>) -> xsk::Result<()> + Sync,
    ) -> (Duration, Result<(), Failure>) {
        let begin = Instant::now();
        let ticks = AtomicU32::new(1);
        let at_work = AtomicUsize::new(parts.len());
        let ended = Mutex::new(Duration::ZERO);
        let (news, told) = channel();
        let result = thread::scope(|scope| {
            let mut workers = Vec::with_capacity(parts.len());
            for (place, ports) in parts.iter_mut().enumerate() {
                let (work, stop, at_work, ended) = (&work, &self.stop, &at_work, &ended);
                // All parts of a port hear the same.
                let news = (place == 0).then(|| news.clone());
                let mut pulse = Pulse { stop, ticks: &ticks, seen: 0, news };
                let cpu = self.cpus.as_ref().map(|cpus| cpus[place % cpus.len()]);
                let worker = move || {
                    let mut leave = Leave { stop, at_work, well: false };
                    if let Some(cpu) = cpu {
                        threads::pin_to(cpu)?;
                    }
                    let result = work(place, ports, &mut pulse);
                    let now = begin.elapsed();
                    let mut ended = ended.lock().unwrap_or_else(PoisonError::into_inner);
                    *ended = now.max(*ended);
                    drop(ended);
                    // That the interface is gone is told before it is an error.
                    pulse.look(&mut ports.each_mut());
                    result?;
                    for port in ports {
                        port.drain(DRAIN)?;
                    }
                    leave.well = true;
                    Ok::<_, Failure>(())
                };
                match thread::Builder::new().name(format!("xsk-{place}")).spawn_scoped(scope, worker) {
                    Ok(worker) => workers.push(worker),
                    Err(error) => {
                        self.stop.ask();
                        return Err(error.into());
                    }
                }
            }
            let watched = self.watch(&told, &ticks, begin);
            // Whatever it was, nobody would end the loops after this.
            self.stop.ask();
            let mut result = Ok(());
            for worker in workers {
                result = result.and(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            let rest = self.tell(&told, begin);
            result.and(watched).and(rest)
        });
        let seconds = *ended.lock().unwrap_or_else(PoisonError::into_inner);
        (seconds, result)
    }

    /// Reports, gives the time, and comes back when it is over or the end is asked for.
    fn watch(
        &self,
        told: &Receiver<(usize, Event)>,
        ticks: &AtomicU32,
        begin: Instant,
    ) -> Result<(), Failure> {
        let Output { duration, interval, .. } = *self.output;
        let mut last = Reading::begin(&self.monitors);
        // Never, where no reports are wanted.
        let mut next = if interval.is_zero() { Duration::MAX } else { interval };
        loop {
            self.tell(told, begin)?;
            let now = begin.elapsed();
            if self.stop.is_asked() || duration.is_some_and(|end| now >= end) {
                return Ok(());
            }
            if now >= next {
                let current = Reading::take(now, &self.monitors)?;
                self.report.interval(&last, &current)?;
                last = current;
                // One that was missed is not made up for.
                while next <= now {
                    next += interval;
                }
            }
            ticks.fetch_add(1, Ordering::Relaxed);
            let until = (now + TICK).min(next).min(duration.unwrap_or(Duration::MAX));
            self.stop.wait(until.saturating_sub(begin.elapsed()))?;
        }
    }

    /// Tells what happened to the interfaces.
    fn tell(&self, told: &Receiver<(usize, Event)>, begin: Instant) -> Result<(), Failure> {
        for (place, event) in told.try_iter() {
            self.report.change(begin.elapsed(), place, &event)?;
        }
        Ok(())
    }
}

/// Ports for each of so many threads.
pub(super) fn share_out<const N: usize>(ports: [Port; N], threads: usize) -> Result<Vec<[Port; N]>, Failure> {
    if threads == 1 {
        // A whole port takes on queues that come later.
        return Ok(vec![ports]);
    }
    let mut shares = Vec::with_capacity(N);
    for port in ports {
        shares.push(port.split(threads)?.into_iter());
    }
    let mut part = || array::from_fn(|side| shares[side].next().expect("a queue for each thread"));
    Ok((0..threads).map(|_| part()).collect())
}

/// How many queues each thread has.
pub(super) fn queues_of(parts: &[[Port; 1]]) -> Vec<usize> {
    parts.iter().map(|[port]| port.sockets().count()).collect()
}

/// What a loop is asked and told once a turn.
pub(super) struct Pulse<'a> {
    pub(super) stop: &'a Stop,
    /// Counts up from 1, now and then.
    pub(super) ticks: &'a AtomicU32,
    pub(super) seen: u32,
    /// Where to tell what happens to the interfaces.
    pub(super) news: Option<Sender<(usize, Event)>>,
}

impl Pulse<'_> {
    /// Whether to go on. With each tick of the watcher, the interfaces are looked after.
    #[inline(always)]
    pub(super) fn beat(&mut self, ports: &mut [&mut Port]) -> bool {
        let tick = self.ticks.load(Ordering::Relaxed);
        if tick != self.seen {
            self.seen = tick;
            self.look(ports);
        }
        !self.stop.is_asked()
    }

    #[cold]
    fn look(&mut self, ports: &mut [&mut Port]) {
        for (place, port) in ports.iter_mut().enumerate() {
            while let Some(event) = port.event() {
                if let Some(news) = &self.news {
                    // The watcher listens for longer than any loop runs.
                    let _ = news.send((place, event));
                    self.stop.wake();
                }
            }
        }
    }
}

/// A thread at work. The last one to leave ends the whole, and so does one that fails or panics.
struct Leave<'a> {
    stop: &'a Stop,
    at_work: &'a AtomicUsize,
    well: bool,
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        if self.at_work.fetch_sub(1, Ordering::Relaxed) == 1 || !self.well {
            self.stop.ask();
        }
    }
}
