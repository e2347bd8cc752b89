//! Devices that change under a program: up and down, carrier, queues, resets, removal; and who is
//! told of it.

mod common;

use std::os::fd::AsFd;

use common::*;
use xsk::abi::{BindFlags, XDP_PGOFF_RX_RING};
use xsk::kernel::{Channels, Errno, IFF_RUNNING, IFF_UP, Kernel, Watch};
use xsk::xdp::asm::{self, Reg};
use xsk::xdp::{AttachMode, DefaultProgram};
use xsk::{Cause, Interest, Socket, Umem};
use xsk_sim::Sim;

/// Which of the watches have something to tell; they are taken.
fn told<const N: usize>(watches: &[Box<dyn Watch>; N]) -> [bool; N] {
    watches.each_ref().map(|watch| {
        let told = watch.take();
        assert!(!watch.take(), "told once");
        told
    })
}

fn is_running(kernel: &dyn Kernel, index: u32) -> bool {
    kernel.interface(index).unwrap().flags & IFF_RUNNING != 0
}

#[test]
fn each_change_is_told_to_those_who_watch_the_device() {
    let sim = Sim::builder().queues(2).pair("sim2", "sim3").build().unwrap();
    let kernel = sim.kernel();
    assert_eq!(kernel.watch(9).err(), Some(Errno::NODEV));
    let watches = [1, 2, 3].map(|index| kernel.watch(index).unwrap());
    assert_eq!(told(&watches), [false; 3]);

    // The other end of the wire loses its link and gets it back.
    sim.set_up("sim0", false).unwrap();
    assert_eq!(told(&watches), [true, true, false]);
    sim.set_up("sim0", false).unwrap();
    assert_eq!(told(&watches), [false; 3], "as it was");
    sim.set_up("sim0", true).unwrap();
    assert_eq!(told(&watches), [true, true, false]);
    sim.set_carrier("sim1", false).unwrap();
    assert_eq!(told(&watches), [true, true, false]);
    sim.set_carrier("sim0", false).unwrap();
    assert_eq!(told(&watches), [false; 3], "there was no link to lose");
    sim.set_carrier("sim0", true).unwrap();
    sim.set_carrier("sim1", true).unwrap();
    assert_eq!(told(&watches), [true, true, false]);

    // These concern one end.
    sim.set_queues("sim1", 1).unwrap();
    assert_eq!(told(&watches), [false, true, false]);
    sim.set_mtu("sim0", 1400).unwrap();
    assert_eq!(told(&watches), [true, false, false]);
    let program = load(&*kernel, &[asm::alu_imm(asm::Alu::Mov, Reg::R0, asm::XDP_PASS), asm::exit()]);
    let link = kernel.attach((*program.unwrap()).as_fd(), 1, 0).unwrap();
    assert_eq!(told(&watches), [true, false, false]);
    drop(link);
    assert_eq!(told(&watches), [true, false, false]);

    // Sockets and packets are no change.
    let mut port = Port::open(&*kernel, "sim0", Config::default());
    port.queue(0, 60, 0);
    assert_eq!(port.socket.send(), Ok(()));
    sim.run();
    assert_eq!(told(&watches), [false; 3]);

    sim.set_up("sim0", false).unwrap();
    sim.set_up("sim0", true).unwrap();
    sim.remove("sim0").unwrap();
    assert_eq!(told(&watches), [true, true, false], "several changes are told as one");
    assert_eq!(kernel.watch(1).err(), Some(Errno::NODEV));
    sim.set_up("sim1", false).unwrap();
    assert_eq!(told(&watches), [false, true, false], "of what is gone there is no more to tell");
}

#[test]
fn a_watch_begins_with_nothing_to_tell_and_ends_when_it_is_dropped() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    sim.set_up("sim0", false).unwrap();
    let (first, second) = (kernel.watch(1).unwrap(), kernel.watch(1).unwrap());
    assert!(!first.take());
    drop(first);
    sim.set_up("sim0", true).unwrap();
    assert!(second.take());
}

#[test]
fn a_device_that_was_down_goes_on() {
    let sim = Sim::new();
    let device = sim.device("sim0").unwrap();
    let (umem, mut pool) = Umem::builder().frames(16).chunk_size(2048).ledger(true).build().unwrap();
    let mut xsk = Socket::builder(&device).ring_size(8).fill_from(&mut pool, 4).open(&umem).unwrap();
    let program = DefaultProgram::attach(&device, AttachMode::Native).unwrap();
    program.insert(&xsk.socket).unwrap();
    sim.inject("sim0", &[1; 60]).unwrap();
    sim.run();
    xsk.tx.reserve(1).push(pool.packet(0, 60).unwrap()).unwrap();
    let before = umem.census();

    sim.set_up("sim0", false).unwrap();
    sim.inject("sim0", &[2; 60]).unwrap();
    sim.run();
    assert_eq!(*xsk.socket.send().unwrap_err().cause(), Cause::InterfaceDown);
    assert_eq!(*xsk.socket.wait(Interest::Both, None).unwrap_err().cause(), Cause::InterfaceDown);
    assert_eq!(umem.census(), before, "every frame stays where it is");
    let mut take = || xsk.rx.take(8).map(|packet| (packet[0], pool.put(packet)).0).collect::<Vec<_>>();
    assert_eq!(take(), [1], "what had arrived can be taken");

    sim.set_up("sim0", true).unwrap();
    sim.inject("sim0", &[3; 60]).unwrap();
    let _sent = xsk.socket.send().unwrap();
    sim.run();
    assert_eq!(take(), [3]);
    assert_eq!(xsk.completion.drain_into(&mut pool), 1);
    assert_eq!(sim.stack("sim1").unwrap().len(), 1);
    let census = umem.census();
    assert_eq!((census.contradiction(), census.program), (None, 0));
}

#[test]
fn without_carrier_nothing_leaves_and_nothing_arrives() {
    for end in ["sim0", "sim1"] {
        let sim = Sim::new();
        let kernel = sim.kernel();
        let mut port = Port::open(&*kernel, "sim0", Config::default());
        let _steered = steer(&*kernel, "sim0", &*port.socket);
        port.refill([8192, 12288]);
        sim.set_carrier(end, false).unwrap();
        assert_eq!([1, 2].map(|index| is_running(&*kernel, index)), [false, false]);
        assert_eq!(kernel.interface(1).unwrap().flags & IFF_UP, IFF_UP);
        port.queue(0, 60, 0);
        port.queue(4096, 60, 0);
        assert_eq!(port.socket.send(), Err(Errno::BUSY), "the device drops it, and the batch ends");
        assert_eq!(port.completed(), [0]);
        sim.inject("sim0", &packet(1, 60)).unwrap();
        sim.run();
        let arrived = usize::from(end == "sim1");
        assert_eq!(port.received().len(), arrived, "lost at the end that has no carrier");
        sim.set_carrier(end, true).unwrap();
        assert_eq!([1, 2].map(|index| is_running(&*kernel, index)), [true, true]);
        assert_eq!(port.socket.send(), Ok(()));
        assert_eq!(port.completed(), [4096]);
    }
    assert_eq!(Sim::new().set_carrier("eth0", true), Err(Errno::NODEV));
}

#[test]
fn the_link_is_away_for_so_many_steps_after_a_bind_or_an_attach() {
    let sim = Sim::builder().queues(2).reset_on_bind(3).build().unwrap();
    let kernel = sim.kernel();
    assert!(is_running(&*kernel, 1));
    let mut port = Port::open(&*kernel, "sim0", Config::default());
    assert_eq!([1, 2].map(|index| is_running(&*kernel, index)), [false, false]);
    port.refill([0, 4096, 8192, 12288]);
    port.queue(0, 60, 0);
    assert_eq!(port.socket.send(), Err(Errno::BUSY));
    assert_eq!(port.completed(), [0], "lost");
    assert_eq!(sim.run(), 3, "the link comes back by itself");
    assert!(is_running(&*kernel, 1));

    let _steered = steer(&*kernel, "sim0", &*port.socket);
    for seed in 0..5 {
        sim.inject("sim0", &packet(seed, 60)).unwrap();
    }
    assert!(sim.step() && sim.step());
    assert!(!is_running(&*kernel, 1));
    assert!(sim.step());
    assert!(is_running(&*kernel, 1));
    assert!(port.received().is_empty(), "those that came meanwhile are lost");
    assert_eq!(sim.run(), 2);
    let received: Vec<_> = port.received().into_iter().map(|(_, bytes)| bytes).collect();
    assert_eq!(received, [packet(3, 60), packet(4, 60)]);

    // A socket that joins a queue resets nothing.
    let sharer = socket(&*kernel);
    set(&*sharer, xsk::abi::XDP_RX_RING, 16).unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&port.socket.as_fd()) as u32;
    let shared = address(1, 0, BindFlags::SHARED_UMEM);
    sharer.bind(&xsk::abi::SockaddrXdp { shared_umem_fd: fd, ..shared }).unwrap();
    assert!(is_running(&*kernel, 1));
}

#[test]
fn queues_that_are_in_use_stay() {
    let sim = Sim::builder().queues(4).build().unwrap();
    let kernel = sim.kernel();
    for (queues, wanted) in [(0, Err(Errno::INVAL)), (129, Err(Errno::INVAL)), (128, Ok(())), (4, Ok(()))] {
        assert_eq!(sim.set_queues("sim0", queues), wanted, "{queues} queues");
    }
    assert_eq!(sim.set_queues("eth0", 1), Err(Errno::NODEV));
    let port = Port::unbound(&*kernel, Config::default());
    port.socket.bind(&address(1, 2, BindFlags::empty())).unwrap();
    assert_eq!(sim.set_queues("sim0", 2), Err(Errno::INVAL));
    assert_eq!(sim.set_queues("sim0", 3), Ok(()));
    assert_eq!(sim.set_queues("sim1", 1), Ok(()), "the other end is another matter");
    let info = kernel.interface(1).unwrap();
    assert_eq!((info.rx_queues, info.tx_queues), (3, 3));
    assert_eq!(info.channels, Some(Channels { rx: 0, tx: 0, combined: 3 }));

    let late = Port::unbound(&*kernel, Config::default());
    assert_eq!(late.socket.bind(&address(1, 3, BindFlags::empty())), Err(Errno::INVAL), "it went");
    drop(port);
    assert_eq!(sim.set_queues("sim0", 1), Err(Errno::INVAL), "it is not free yet");
    assert_eq!(sim.set_queues("sim0", 1), Ok(()));
    assert_eq!(late.socket.bind(&address(1, 2, BindFlags::empty())), Err(Errno::INVAL));
}

#[test]
fn packets_for_a_new_queue_miss_the_map() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let mut port = Port::open(&*kernel, "sim0", Config::default());
    let map = xskmap(&*kernel, 4);
    enter(&*kernel, &map, 0, &*port.socket).unwrap();
    let program = load(&*kernel, &redirect(&map, asm::XDP_PASS)).unwrap();
    let _link = kernel.attach((*program).as_fd(), 1, 0).unwrap();
    port.refill([0, 4096]);
    sim.set_queues("sim0", 2).unwrap();
    for queue in [1, 0] {
        sim.inject_on("sim0", queue, &packet(queue as u8, 60)).unwrap();
    }
    sim.run();
    assert_eq!(port.received()[0].1, packet(0, 60));
    assert_eq!(sim.stack("sim0").unwrap(), [packet(1, 60)]);

    // A queue that goes while packets are under way leaves them to those that stay.
    sim.inject_on("sim0", 1, &packet(2, 60)).unwrap();
    sim.set_queues("sim0", 1).unwrap();
    sim.run();
    assert_eq!(port.received()[0].1, packet(2, 60));
}

#[test]
fn the_mtu_of_the_receiver_counts() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let mut port = Port::open(&*kernel, "sim0", Config::default());
    for mtu in [67, 3503] {
        assert_eq!(sim.set_mtu("sim1", mtu), Err(Errno::INVAL));
    }
    assert_eq!(sim.set_mtu("eth0", 1500), Err(Errno::NODEV));
    sim.set_mtu("sim1", 1000).unwrap();
    assert_eq!(kernel.interface(2).unwrap().mtu, 1000);
    for (len, wanted) in [(1018, Ok(())), (1019, Err(Errno::BUSY))] {
        port.queue(0, len, 0);
        assert_eq!(port.socket.send(), wanted, "{len} bytes");
    }
    assert_eq!(sim.inject("sim1", &packet(0, 1019)), Err(Errno::MSGSIZE));
    assert_eq!(sim.inject("sim0", &packet(0, 1518)), Ok(()));
}

#[test]
fn a_removed_device_leaves_the_sockets_of_others() {
    let sim = Sim::builder().pair("sim2", "sim3").queues(2).build().unwrap();
    let devices = ["sim0", "sim2"].map(|name| sim.device(name).unwrap());
    let (umem, mut pool) = Umem::builder().frames(32).chunk_size(2048).ledger(true).build().unwrap();
    let mut open = |device, queue| {
        Socket::builder(device).queue(queue).ring_size(8).fill_from(&mut pool, 4).open(&umem).unwrap()
    };
    let mut lost = [open(&devices[0], 0), open(&devices[0], 1)];
    let kept = open(&devices[1], 0);
    sim.remove("sim0").unwrap();
    for xsk in &lost {
        assert_eq!(*xsk.socket.send().unwrap_err().cause(), Cause::InterfaceGone);
        assert_eq!(*xsk.socket.wait(Interest::Rx, None).unwrap_err().cause(), Cause::InterfaceGone);
    }
    let _sent = kept.socket.send().unwrap();
    // The UMEM is lent by what is left.
    let _more = open(&devices[1], 1);
    assert_eq!(lost[0].rx.take(8).count(), 0);
    drop(lost);
    sim.run();
    let census = umem.census();
    assert_eq!((census.contradiction(), census.program), (None, 0), "{census:?}");
    assert_eq!(census.retired, 8, "what was in FILL of the device that is gone");
}

#[test]
fn rings_of_a_removed_device_cannot_be_mapped() {
    let sim = Sim::builder().queues(2).build().unwrap();
    let kernel = sim.kernel();
    let port = Port::unbound(&*kernel, Config::default());
    port.socket.bind(&address(2, 1, BindFlags::empty())).unwrap();
    sim.remove("sim1").unwrap();
    assert_eq!(port.socket.map(XDP_PGOFF_RX_RING, 4096).err(), Some(Errno::BUSY));
    assert_eq!([port.socket.send(), port.socket.receive()], [Err(Errno::NXIO); 2]);
    assert_eq!(port.socket.bind(&address(1, 0, BindFlags::empty())), Err(Errno::BUSY));
}
