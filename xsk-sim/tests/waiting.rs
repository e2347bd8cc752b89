//! `poll` on several descriptors: sockets, watches, and what is not the simulated kernel's.

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use common::*;
use rustix::event::{EventfdFlags, eventfd};
use xsk::abi::{Descriptor, RingKind, UmemReg};
use xsk::kernel::{Errno, Kernel, POLLIN, POLLOUT, PollEntry};
use xsk_sim::Sim;
use xsk_sim::wrap::Wrapper;

const AN_HOUR: Option<Duration> = Some(Duration::from_secs(3600));

/// Waits; on success, what was found of each entry.
fn wait(
    kernel: &dyn Kernel,
    entries: &[(&dyn AsFd, i16)],
    timeout: Option<Duration>,
) -> Result<Vec<i16>, Errno> {
    // What was there before is not looked at.
    let entries = entries.iter();
    let mut entries: Vec<_> =
        entries.map(|(fd, events)| PollEntry { fd: fd.as_fd(), events: *events, revents: -1 }).collect();
    let found = kernel.poll(&mut entries, timeout)?;
    let revents: Vec<_> = entries.iter().map(|entry| entry.revents).collect();
    assert_eq!(found, revents.iter().filter(|revents| **revents != 0).count());
    Ok(revents)
}

fn foreign() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

fn make_readable(fd: &OwnedFd) {
    rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
}

/// Two sockets that receive.
fn receivers(kernel: &dyn Kernel) -> ([Port; 2], [Steered; 2]) {
    let names = ["sim0", "sim1"];
    let mut ports = names.map(|name| Port::open(kernel, name, Config::default()));
    ports.iter_mut().for_each(|port| port.refill([0, 4096]));
    let steered = [0, 1].map(|at| steer(kernel, names[at], &*ports[at].socket));
    (ports, steered)
}

#[test]
fn steps_are_taken_until_a_socket_is_ready() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let (mut ports, _steered) = receivers(&*kernel);
    let both = |ports: &[Port; 2], events| {
        wait(&*kernel, &[(&*ports[0].socket, events), (&*ports[1].socket, events)], None)
    };
    sim.inject("sim1", &packet(0, 60)).unwrap();
    sim.inject("sim0", &packet(1, 60)).unwrap();
    assert_eq!(both(&ports, POLLIN), Ok(vec![0, POLLIN]));
    assert_eq!(ports[1].received().len(), 1);
    assert_eq!(both(&ports, POLLIN), Ok(vec![POLLIN, 0]), "and no more steps than needed");
    assert_eq!(both(&ports, POLLIN | POLLOUT), Ok(vec![POLLIN | POLLOUT, POLLOUT]));
    assert_eq!(ports[0].received().len(), 1);

    // Waiting transmits for every socket, and so for one that another waits for.
    ports[0].queue_packet(8192, &packet(2, 60));
    assert_eq!(both(&ports, POLLIN), Ok(vec![0, POLLIN]));
    assert_eq!(ports[1].received()[0].1, packet(2, 60));
    assert_eq!(ports[0].completed(), [8192]);
}

#[test]
fn a_wait_that_nothing_ends_names_the_deadlock() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let (ports, _steered) = receivers(&*kernel);
    let watch = kernel.watch(1).unwrap();
    let sockets: [(&dyn AsFd, i16); 2] = [(&*ports[0].socket, POLLIN), (&*ports[1].socket, POLLIN)];
    assert_eq!(wait(&*kernel, &sockets, None), Err(Errno::DEADLK));
    assert_eq!(wait(&*kernel, &sockets, AN_HOUR), Ok(vec![0, 0]), "the hour is over at once");
    assert_eq!(wait(&*kernel, &[], None), Err(Errno::DEADLK));
    assert_eq!(wait(&*kernel, &[], AN_HOUR), Ok(vec![]));
    // Sockets that can't become ready: their device is down.
    sim.inject("sim0", &packet(0, 60)).unwrap();
    sim.run();
    sim.set_up("sim0", false).unwrap();
    assert!(watch.take());
    assert_eq!(wait(&*kernel, &sockets, None), Err(Errno::DEADLK));
}

#[test]
#[cfg_attr(miri, ignore = "needs poll(2)")]
fn watches_and_other_objects_are_waited_for() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let (ports, _steered) = receivers(&*kernel);
    let watch = kernel.watch(1).unwrap();
    let map = xskmap(&*kernel, 1);
    let entries: [(&dyn AsFd, i16); 3] = [(&*ports[0].socket, POLLIN), (&*watch, POLLIN), (&*map, POLLIN)];
    assert_eq!(wait(&*kernel, &entries, None), Err(Errno::DEADLK), "they are this kernel's own");
    assert_eq!(wait(&*kernel, &entries, AN_HOUR), Ok(vec![0; 3]));
    sim.set_mtu("sim0", 1400).unwrap();
    assert_eq!(wait(&*kernel, &entries, None), Ok(vec![0, POLLIN, 0]));
    assert_eq!(wait(&*kernel, &entries, None), Ok(vec![0, POLLIN, 0]), "until it is taken");
    assert!(watch.take());
    assert_eq!(wait(&*kernel, &entries, None), Err(Errno::DEADLK));
}

#[test]
#[cfg_attr(miri, ignore = "needs poll(2)")]
fn a_step_can_make_a_watch_readable() {
    let sim = Sim::builder().reset_on_bind(5).build().unwrap();
    let kernel = sim.kernel();
    let _port = Port::open(&*kernel, "sim0", Config::default());
    let watch = kernel.watch(1).unwrap();
    assert_eq!(wait(&*kernel, &[(&*watch, POLLIN)], None), Ok(vec![POLLIN]), "the link is back");
    assert!(!sim.step());
}

#[test]
#[cfg_attr(miri, ignore = "needs poll(2)")]
fn foreign_descriptors_are_really_waited_for() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let (mut ports, _steered) = receivers(&*kernel);
    let stop = foreign();
    let entries =
        |ports: &[Port; 2], timeout| wait(&*kernel, &[(&stop, POLLIN), (&*ports[0].socket, POLLIN)], timeout);
    let short = Some(Duration::from_millis(20));
    let start = Instant::now();
    assert_eq!(entries(&ports, short), Ok(vec![0, 0]));
    assert!(start.elapsed() >= Duration::from_millis(20), "the time has really passed");

    sim.inject("sim0", &packet(0, 60)).unwrap();
    assert_eq!(entries(&ports, None), Ok(vec![0, POLLIN]), "steps come before sleep");
    make_readable(&stop);
    assert_eq!(entries(&ports, None), Ok(vec![POLLIN, POLLIN]));
    assert_eq!(ports[0].received().len(), 1);
    assert_eq!(entries(&ports, None), Ok(vec![POLLIN, 0]));
}

#[test]
#[cfg_attr(miri, ignore = "needs poll(2)")]
fn a_wait_with_a_foreign_descriptor_is_ended_by_other_threads() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let (mut ports, _steered) = receivers(&*kernel);
    let (stop, watch) = (foreign(), kernel.watch(2).unwrap());
    // Packets in RX of a device that is down: readable in name only. It must not keep the wait awake.
    sim.inject("sim1", &packet(0, 60)).unwrap();
    sim.run();
    sim.set_up("sim1", false).unwrap();
    assert!(watch.take());
    let entries = |ports: &[Port; 2]| {
        let sockets = [(&*ports[0].socket as &dyn AsFd, POLLIN), (&*ports[1].socket, POLLIN)];
        wait(&*kernel, &[sockets[0], sockets[1], (&stop, POLLIN), (&*watch, POLLIN)], None)
    };
    // What each does may come before the wait or during it.
    let causes: [(&(dyn Fn() + Sync), [i16; 4]); 4] = [
        (&|| sim.inject("sim0", &packet(1, 60)).unwrap(), [POLLIN, 0, 0, 0]),
        (
            &|| {
                sim.inject("sim0", &packet(1, 60)).unwrap();
                sim.run();
            },
            [POLLIN, 0, 0, 0],
        ),
        (&|| sim.set_up("sim1", true).unwrap(), [0, POLLIN, 0, POLLIN]),
        (&|| make_readable(&stop), [0, 0, POLLIN, 0]),
    ];
    for (at, (cause, wanted)) in causes.into_iter().enumerate() {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::yield_now();
                cause();
            });
            assert_eq!(entries(&ports), Ok(wanted.to_vec()), "cause {at}");
        });
        ports.iter_mut().zip(wanted).filter(|(_, ready)| *ready != 0).for_each(|(port, _)| {
            let taken: Vec<_> = port.received().iter().map(|(desc, _)| desc.addr & !4095).collect();
            port.refill(taken);
        });
        watch.take();
    }
}

#[test]
#[cfg_attr(miri, ignore = "needs poll(2)")]
fn a_socket_of_another_simulated_kernel_is_foreign() {
    let (here, there) = (Sim::new(), Sim::new());
    let kernel = here.kernel();
    let (_ports, _steered) = receivers(&*kernel);
    let other = there.kernel();
    let (theirs, _theirs_steered) = receivers(&*other);
    let entries: [(&dyn AsFd, i16); 1] = [(&*theirs[0].socket, POLLIN)];
    there.inject("sim0", &packet(0, 60)).unwrap();
    assert_eq!(wait(&*kernel, &entries, Some(Duration::ZERO)), Ok(vec![0]), "it takes no steps there");
    there.run();
    assert_eq!(wait(&*kernel, &entries, None), Ok(vec![POLLIN]));
}

#[test]
fn a_wrapper_carries_for_every_socket_that_is_waited_for() {
    let sim = Sim::new();
    let mut lost = 0;
    // The first packet is lost between the kernel and the program.
    let lose_first = move |entry: Descriptor, _: &UmemReg| {
        lost += 1;
        if lost == 1 { Vec::new() } else { vec![entry] }
    };
    // SAFETY: an entry is lost, and none is changed.
    let wrapper = unsafe { Wrapper::around(sim.kernel()).tamper(RingKind::Rx, lose_first) }.build();
    let kernel = wrapper.kernel();
    let (mut ports, _steered) = receivers(&*kernel);
    let entries = |ports: &[Port; 2], timeout| {
        wait(&*kernel, &[(&*ports[0].socket, POLLIN), (&*ports[1].socket, POLLIN)], timeout)
    };
    sim.inject("sim1", &packet(0, 60)).unwrap();
    assert_eq!(entries(&ports, None), Err(Errno::DEADLK), "nothing came of it");
    sim.inject("sim1", &packet(1, 60)).unwrap();
    sim.inject("sim0", &packet(2, 60)).unwrap();
    assert_eq!(entries(&ports, AN_HOUR), Ok(vec![0, POLLIN]));
    assert_eq!(ports[1].received()[0].1, packet(1, 60));
    assert_eq!(entries(&ports, None), Ok(vec![POLLIN, 0]));
    assert_eq!(ports[0].received()[0].1, packet(2, 60));
}
