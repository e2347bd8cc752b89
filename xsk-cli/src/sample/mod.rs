//! The sample programs: their loops, and what surrounds each of them.
//!
//! A loop takes turns with a port and does nothing else: it makes no system call of its own and reads
//! no clock. Each thread has such a loop, with queues of its own. Time, signals and reports belong to
//! the watcher, which is the main thread.

pub(crate) mod l2fwd;
pub(crate) mod rxdrop;
mod session;
mod threads;
pub(crate) mod txonly;

use std::time::Duration;

use xsk::port::{Event, PortBuilder, Queues};
use xsk::umem::{PageSize, Pool};
use xsk::xdp::{AttachMode, DefaultProgram};
use xsk::{Device, Mode, Port, Umem};

use crate::cli::{self, Attach, Interface, List, Mac, Rings};
use crate::failure::Failure;
use crate::guard::{self, Taking};
use crate::packet;
use session::{Session, queues_of};

/// How long a loop sleeps at most before it looks whether to go on.
const NAP: Duration = Duration::from_millis(100);
/// How long to wait for packets that are on their way when the work is done.
pub(crate) const DRAIN: Duration = Duration::from_millis(200);

/// Everything that a sample needs of an interface before it opens a port.
struct Ground {
    device: Device,
    queues: Queues,
    /// The same, as far as they are there now.
    numbers: Vec<u32>,
    /// Queues that it has.
    of: u32,
    /// What is to be told of it at the beginning.
    state: Option<Event>,
}

impl Ground {
    fn find(interface: &str, queues: &List) -> Result<Self, Failure> {
        let device = Device::open(interface)?;
        let info = device.info()?;
        let of = info.queues();
        let (queues, numbers) = match queues {
            List::All => (Queues::All, (0..of).collect()),
            // Those that are not there are for the port to complain of.
            List::These(numbers) => {
                let there = numbers.iter().copied().filter(|queue| *queue < of).collect();
                (Queues::Some(numbers.clone()), there)
            }
        };
        let state = match (info.is_up(), info.has_carrier()) {
            (false, _) => Some(Event::Down),
            (true, false) => Some(Event::LinkLost),
            (true, true) => None,
        };
        Ok(Self { device, queues, numbers, of, state })
    }

    fn builder(&self, interface: &Interface, rings: &Rings, umem: &Umem) -> PortBuilder {
        let mode = match (interface.copy, interface.zero_copy) {
            (true, _) => Mode::Copy,
            (_, true) => Mode::ZeroCopy,
            _ => Mode::Any,
        };
        Port::builder(&self.device)
            .queues(self.queues.clone())
            .umem(umem)
            .mode(mode)
            .ring_size(rings.ring)
            .batch(rings.batch)
            .need_wakeup(!rings.no_need_wakeup)
    }

    fn takes(&self) -> Taking<'_> {
        Taking::Received { interface: self.device.name(), queues: &self.numbers, of: self.of }
    }
}

/// A UMEM for all queues of these, and a pool with all its frames. Each of several queues takes `least`
/// frames, beside which the others have none.
fn memory(rings: &Rings, grounds: &[&Ground], least: u32) -> Result<(Umem, Pool), Failure> {
    let each = rings.frames.unwrap_or(rings.ring.saturating_mul(2));
    let queues: usize = grounds.iter().map(|ground| ground.numbers.len()).sum();
    if queues > 1 && each < least {
        return Err(Failure::new(
            &format!("cannot share out {each} frames for each of {queues} queues"),
            format!("with rings of {} entries a queue takes {least}", rings.ring),
            "All queues take their frames from one UMEM, and one that finds none would not receive.",
            format!("use --frames {least} or more, or a smaller --ring"),
        ));
    }
    let frames = each.saturating_mul(u32::try_from(queues.max(1)).unwrap_or(u32::MAX));
    let umem = Umem::builder().frames(frames).chunk_size(rings.frame_size);
    let umem = if rings.huge_pages { umem.require_pages(PageSize::Huge2M) } else { umem };
    Ok(umem.build()?)
}

fn attach_mode(how: &Attach) -> AttachMode {
    match (how.native, how.generic) {
        (true, _) => AttachMode::Native,
        (_, true) => AttachMode::Generic,
        _ => AttachMode::Best,
    }
}

/// The queues of who didn't say which: one takes the least away from others, and keeps one CPU busy.
fn first() -> List {
    List::These(vec![0])
}

/// `xsk rxdrop`.
pub(crate) fn run_rxdrop(args: &cli::Rxdrop) -> Result<(), Failure> {
    let cli::Rxdrop { interface, queues, attach, threads, rings, output } = args;
    let ground = Ground::find(&interface.interface, queues.queues.as_ref().unwrap_or(&first()))?;
    if !interface.take_all {
        guard::check(&[ground.takes()])?;
    }
    let (umem, _) = memory(rings, &[&ground], rings.ring)?;
    let port = ground.builder(interface, rings, &umem).attach_mode(attach_mode(attach)).open()?;

    let hint = queues.queues.is_none();
    let session = Session::start("rxdrop", [(port, &ground)], None, threads, output, hint)?;
    session.run(|_, [port], pulse| rxdrop::run(port, rings.poll, |ports, _| pulse.beat(ports)))
}

/// `xsk txonly`.
pub(crate) fn run_txonly(args: &cli::Txonly) -> Result<(), Failure> {
    let cli::Txonly { interface, queues, attach, threads, rings, packets, output } = args;
    let ground = Ground::find(&interface.interface, queues.queues.as_ref().unwrap_or(&first()))?;
    if !interface.take_all {
        guard::check(&[Taking::Bandwidth { interface: ground.device.name() }])?;
    }
    let (umem, mut pool) = memory(rings, &[&ground], 1)?;
    let info = ground.device.info()?;
    let packet = packet::udp(packets, info.mac(), info.mtu())?;
    if packet.len() > umem.chunk_size() as usize {
        return Err(Failure::new(
            &format!("cannot send packets of {} bytes", packet.len()),
            format!("a frame has {} bytes", umem.chunk_size()),
            "A packet is in one frame.",
            match packet.len() {
                ..=4096 => "use larger frames: -f 4096".into(),
                _ => "use -s 4096 or less, with -f 4096".into(),
            },
        ));
    }
    txonly::prepare(&mut pool, &packet);
    // The port takes them from the depot.
    drop(pool);
    // Before the sockets: the driver sets up the queues for both at once.
    let attached = attach.then(|| DefaultProgram::attach(&ground.device, AttachMode::Best)).transpose()?;
    let port = ground.builder(interface, rings, &umem).send_only().open()?;

    let session = Session::start("txonly", [(port, &ground)], attached.as_ref(), threads, output, false)?;
    let work = txonly::Work { len: packet.len() as u32, count: packets.count, batch: rings.batch };
    let parts = work.share_out(&queues_of(&session.parts));
    session
        .run(|place, [port], pulse| txonly::run(port, rings.poll, parts[place], |ports, _| pulse.beat(ports)))
}

/// `xsk l2fwd`.
pub(crate) fn run_l2fwd(args: &cli::L2fwd) -> Result<(), Failure> {
    match &args.out {
        None => send_back(args),
        Some(out) => forward(args, out),
    }
}

/// Everything back where it came in.
fn send_back(args: &cli::L2fwd) -> Result<(), Failure> {
    let cli::L2fwd { interface, queues, attach, addresses, threads, rings, output, .. } = args;
    let ground = Ground::find(&interface.interface, queues.as_ref().unwrap_or(&first()))?;
    if !interface.take_all {
        guard::check(&[ground.takes()])?;
    }
    let header = addresses.dst_mac.map(|to| header(&ground.device, to)).transpose()?;
    let (umem, _) = memory(rings, &[&ground], rings.ring)?;
    let port = ground.builder(interface, rings, &umem).attach_mode(attach_mode(attach)).open()?;

    let hint = queues.is_none();
    let session = Session::start("l2fwd", [(port, &ground)], None, threads, output, hint)?;
    session.run(|_, [port], pulse| {
        let go_on = |ports: &mut [&mut Port], _| pulse.beat(ports);
        match header {
            None => l2fwd::run(port, rings.poll, l2fwd::swap_macs, go_on),
            Some(header) => l2fwd::run(port, rings.poll, |packet| l2fwd::readdress(packet, &header), go_on),
        }
    })
}

/// From each of two interfaces to the other.
fn forward(args: &cli::L2fwd, out: &str) -> Result<(), Failure> {
    let cli::L2fwd { interface, queues, attach, addresses, threads, rings, output, .. } = args;
    let queues = queues.as_ref().unwrap_or(&List::All);
    let near = Ground::find(&interface.interface, queues)?;
    let far = Ground::find(out, queues)?;
    if near.device.index() == far.device.index() {
        return Err(Failure::new(
            &format!("cannot forward between {} and {out}", near.device.name()),
            "they are the same interface".into(),
            "What arrives at one leaves by the other.",
            "name another interface, or leave --out out: packets are sent back where they came in then"
                .into(),
        ));
    }
    if !interface.take_all {
        guard::check(&[near.takes(), far.takes()])?;
    }
    let rewrite = |device: &Device, to: Option<Mac>| match to {
        Some(to) => header(device, to).map(Rewrite::Both),
        None if addresses.rewrite => source(device).map(Rewrite::Source),
        None => Ok(Rewrite::Nothing),
    };
    let there = rewrite(&far.device, addresses.dst_mac)?;
    let back = rewrite(&near.device, addresses.back_dst_mac)?;
    // A port takes a full FILL and as many to send, before the other has its turn.
    let (umem, _) = memory(rings, &[&near, &far], rings.ring.saturating_mul(2))?;
    let open =
        |ground: &Ground| ground.builder(interface, rings, &umem).attach_mode(attach_mode(attach)).open();
    let ports = [(open(&near)?, &near), (open(&far)?, &far)];

    let session = Session::start("l2fwd", ports, None, threads, output, false)?;
    session.run(|_, [near, far], pulse| {
        let write = |rewrite: Rewrite| {
            move |packet: &mut [u8]| match &rewrite {
                Rewrite::Nothing => {}
                Rewrite::Source(from) => l2fwd::resource(packet, from),
                Rewrite::Both(addresses) => l2fwd::readdress(packet, addresses),
            }
        };
        let go_on = |ports: &mut [&mut Port], _| pulse.beat(ports);
        l2fwd::between([near, far], rings.poll, write(there), write(back), go_on)
    })
}

/// What a forwarder writes into packets that leave by an interface.
#[derive(Clone, Copy)]
enum Rewrite {
    Nothing,
    /// Who sends it.
    Source([u8; 6]),
    /// Who gets it and who sends it.
    Both(l2fwd::Addresses),
}

/// The MAC address of the interface that packets leave by.
fn source(device: &Device) -> Result<[u8; 6], Failure> {
    device.info()?.mac().ok_or_else(|| {
        Failure::new(
            &format!("cannot address packets that leave by {}", device.name()),
            "the interface has no MAC address".into(),
            "A packet names its sender.",
            "forward them as they are".into(),
        )
    })
}

/// How packets begin that leave by an interface for a next hop.
fn header(device: &Device, Mac(to): Mac) -> Result<l2fwd::Addresses, Failure> {
    let mut header = [0; 12];
    header[..6].copy_from_slice(&to);
    header[6..].copy_from_slice(&source(device)?);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc::channel;

    use xsk::port::Counts;
    use xsk_sim::Sim;

    use super::session::{Pulse, share_out};
    use super::*;
    use crate::signals::Stop;

    /// A packet of which each byte is `n`.
    fn packet(n: u8) -> Vec<u8> {
        vec![n; 60]
    }

    fn port(sim: &Sim, device: &str, umem: &Umem, queues: Queues) -> Port {
        let device = sim.device(device).unwrap();
        Port::builder(&device).umem(umem).queues(queues).ring_size(16).batch(8).open().unwrap()
    }

    fn umem(frames: u32) -> Umem {
        Umem::builder().frames(frames).chunk_size(2048).ledger(true).build().unwrap().0
    }

    fn total(ports: &[&Port]) -> Counts {
        let mut total = Counts::default();
        for port in ports {
            total += port.monitor().statistics().unwrap().total();
        }
        total
    }

    #[track_caller]
    fn assert_conserved(umem: &Umem) {
        let census = umem.census();
        assert_eq!(census.contradiction(), None, "{census:?}");
        assert_eq!((census.program, census.dropped, census.faults.total()), (0, 0, 0), "{census:?}");
    }

    #[test]
    fn rxdrop_takes_from_all_its_queues_and_no_others() {
        let sim = Sim::builder().queues(4).build().unwrap();
        let umem = umem(128);
        let mut port = port(&sim, "sim0", &umem, [0, 2, 3].into());
        let mut sent = 0;
        rxdrop::run(&mut port, false, |_, received| {
            if sent < 400 {
                // Eight on each queue, of which a turn takes as many.
                for n in 0..32 {
                    sim.inject_on("sim0", n % 4, &packet(n as u8)).unwrap();
                }
                sent += 32;
                sim.run();
            }
            received < 312
        })
        .unwrap();
        let counted = port.monitor().statistics().unwrap();
        let queues: Vec<_> = counted.queues().iter().map(|(queue, it)| (*queue, it.rx_packets)).collect();
        assert_eq!(queues, [(0, 104), (2, 104), (3, 104)]);
        assert_eq!((counted.total().rx_bytes, counted.total().rx_lost()), (312 * 60, 0));
        assert_eq!(sim.stack("sim0").unwrap().len(), 104, "queue 1 is the stack's");
        assert_conserved(&umem);
    }

    #[test]
    fn an_interface_that_is_switched_off_and_on_and_has_more_queues_does_not_end_it() {
        let sim = Sim::builder().queues(2).build().unwrap();
        sim.set_queues("sim0", 1).unwrap();
        let umem = umem(128);
        let mut port = port(&sim, "sim0", &umem, Queues::All);
        let stop = Stop::listen().unwrap();
        let (ticks, (news, told)) = (AtomicU32::new(1), channel());
        let mut pulse = Pulse { stop: &stop, ticks: &ticks, seen: 0, news: Some(news) };
        let mut turn = 0;
        rxdrop::run(&mut port, true, |ports, received| {
            turn += 1;
            match turn {
                1 => sim.set_up("sim0", false).unwrap(),
                3 => sim.set_up("sim0", true).unwrap(),
                5 => sim.set_queues("sim0", 2).unwrap(),
                7 => sim.inject_on("sim0", 1, &packet(1)).unwrap(),
                _ => {}
            }
            ticks.fetch_add(1, Ordering::Relaxed);
            assert!(turn < 100, "{ports:?}");
            pulse.beat(ports) && received < 1
        })
        .unwrap();
        let events: Vec<_> = told.try_iter().collect();
        let queues = Event::Queues { was: 1, now: 2, taken: vec![1] };
        assert_eq!(events, [(0, Event::Down), (0, Event::Up), (0, queues)]);
        assert_conserved(&umem);
    }

    #[test]
    fn a_loop_tells_that_its_interface_is_gone_and_ends() {
        let sim = Sim::new();
        let umem = umem(64);
        let mut port = port(&sim, "sim0", &umem, Queues::All);
        let stop = Stop::listen().unwrap();
        let (ticks, (news, told)) = (AtomicU32::new(1), channel());
        let mut pulse = Pulse { stop: &stop, ticks: &ticks, seen: 0, news: Some(news) };
        sim.remove("sim0").unwrap();
        let error = rxdrop::run(&mut port, false, |ports, _| pulse.beat(ports)).unwrap_err();
        assert_eq!(*error.cause(), xsk::Cause::InterfaceGone);
        assert_eq!(told.try_iter().collect::<Vec<_>>(), [(0, Event::Removed)]);
    }

    #[test]
    fn l2fwd_sends_back_by_the_queue_where_it_came_in() {
        let sim = Sim::builder().queues(2).build().unwrap();
        let umem = umem(64);
        let mut port = port(&sim, "sim0", &umem, Queues::All);
        let mut sent = 0;
        l2fwd::run(&mut port, false, l2fwd::swap_macs, |_, forwarded| {
            if sent < 200 {
                for n in 0..10 {
                    sim.inject_on("sim0", n % 2, &packet(n as u8)).unwrap();
                }
                sent += 10;
                sim.run();
            }
            forwarded < 200
        })
        .unwrap();
        assert_eq!(port.drain(DRAIN).unwrap(), 0);
        let counted = port.monitor().statistics().unwrap();
        let sent: Vec<_> = counted.queues().iter().map(|(_, it)| (it.rx_packets, it.tx_completed)).collect();
        assert_eq!(sent, [(100, 100); 2]);
        sim.run();
        assert_eq!(sim.stack("sim1").unwrap().len(), 200);
        assert_conserved(&umem);
    }

    #[test]
    fn l2fwd_forwards_between_two_interfaces_in_order_whatever_their_queues() {
        let sim = Sim::builder().pair("left", "right").queues(3).build().unwrap();
        sim.set_queues("left", 2).unwrap();
        let umem = umem(256);
        let mut near = port(&sim, "sim0", &umem, Queues::All);
        let mut far = port(&sim, "left", &umem, Queues::All);
        let mut sent = 0u8;
        l2fwd::between(
            [&mut near, &mut far],
            false,
            |packet| l2fwd::readdress(packet, &[0xaa; 12]),
            |_| {},
            |_, forwarded| {
                if sent < 100 {
                    sim.inject_on("sim0", 2, &packet(sent)).unwrap();
                    sim.inject_on("left", u32::from(sent) % 2, &packet(100 + sent)).unwrap();
                    sent += 1;
                    sim.run();
                }
                forwarded < 200
            },
        )
        .unwrap();
        for port in [&mut near, &mut far] {
            assert_eq!(port.drain(DRAIN).unwrap(), 0);
        }
        sim.run();
        let there: Vec<_> = (0..100).map(|n| [vec![0xaa; 12], vec![n; 48]].concat()).collect();
        assert_eq!(sim.stack("right").unwrap(), there);
        let mut back = sim.stack("sim1").unwrap();
        back.sort();
        assert_eq!(back, (100..200).map(packet).collect::<Vec<_>>());
        let total = total(&[&near, &far]);
        assert_eq!((total.rx_packets, total.tx_completed, total.rx_lost()), (200, 200, 0));
        assert_conserved(&umem);
    }

    #[test]
    fn txonly_sends_the_count_over_several_queues_and_not_one_more() {
        let packet: Vec<u8> = (0..60).collect();
        for threads in [1, 2, 3] {
            let sim = Sim::builder().queues(3).build().unwrap();
            let (umem, mut pool) = Umem::builder().frames(96).chunk_size(2048).build().unwrap();
            txonly::prepare(&mut pool, &packet);
            drop(pool);
            let device = sim.device("sim0").unwrap();
            let whole = Port::builder(&device).umem(&umem).ring_size(16).batch(8).send_only().open().unwrap();
            let monitor = whole.monitor();
            let mut parts = share_out([whole], threads).unwrap();
            let work = txonly::Work { len: 60, count: Some(1001), batch: 8 }.share_out(&queues_of(&parts));
            assert_eq!(work.len(), threads);
            for ([part], work) in parts.iter_mut().zip(work) {
                txonly::run(part, false, work, |_, _| true).unwrap();
            }
            let counted = monitor.statistics().unwrap();
            let total = counted.total();
            assert_eq!((total.tx_packets, total.tx_completed, total.tx_bytes), (1001, 1001, 1001 * 60));
            assert!(counted.queues().iter().all(|(_, it)| it.tx_packets > 300), "{counted:?}");
            sim.run();
            let arrived = sim.stack("sim1").unwrap();
            assert_eq!(arrived.len(), 1001);
            assert!(arrived.iter().all(|it| *it == packet));
            assert_conserved(&umem);
        }
    }

    #[test]
    fn frames_that_would_leave_queues_without_are_refused() {
        let sim = Sim::builder().queues(2).build().unwrap();
        let device = sim.device("sim0").unwrap();
        let ground = Ground { device, queues: Queues::All, numbers: vec![0, 1], of: 2, state: None };
        let rings = |frames| Rings {
            batch: 64,
            frame_size: 2048,
            frames,
            ring: 64,
            poll: false,
            no_need_wakeup: false,
            huge_pages: false,
        };
        let frames = |each, least| memory(&rings(each), &[&ground], least).map(|(umem, _)| umem.frames());
        for (each, least, expected) in [(None, 64, 256), (Some(64), 64, 128), (Some(8), 1, 16)] {
            assert_eq!(frames(each, least).unwrap(), expected);
        }
        let Err(Failure::Explained(told)) = frames(Some(63), 64) else { panic!("too few frames") };
        assert!(told.remedy.contains("--frames 64"), "{told:?}");
    }
}
