//! Several queues and devices: where packets arrive, and one UMEM for all of them.

mod common;

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};

use common::*;
use xsk::abi::{BindFlags, RingKind, SockaddrXdp, XdpStatistics};
use xsk::kernel::Errno;
use xsk::ring::{Consumer, Producer};
use xsk::socket::RxTx;
use xsk::umem::Census;
use xsk::xdp::{AttachMode, DefaultProgram};
use xsk::{Cause, Device, Interest, Pool, Sent, Socket, Umem};
use xsk_sim::Sim;

/// A UDP packet of IPv4 from a port.
fn udp(port: u16) -> Vec<u8> {
    let mut packet = vec![0; 60];
    packet[12..14].copy_from_slice(&[8, 0]);
    packet[14] = 0x45;
    packet[14 + 9] = 17;
    packet[26..30].copy_from_slice(&Ipv4Addr::new(10, 0, 0, 1).octets());
    packet[30..34].copy_from_slice(&Ipv4Addr::new(10, 0, 0, 2).octets());
    packet[34..36].copy_from_slice(&port.to_be_bytes());
    packet[36..38].copy_from_slice(&7u16.to_be_bytes());
    packet
}

/// A socket of the library's on each queue of a device, in one UMEM, with a program.
struct Queues {
    sockets: Vec<RxTx>,
    program: DefaultProgram,
}

impl Queues {
    fn open(device: &Device, umem: &Umem, pool: &mut Pool) -> Self {
        let program = DefaultProgram::attach(device, AttachMode::Native).unwrap();
        let open = |queue| {
            let builder = Socket::builder(device).queue(queue).ring_size(16).fill_from(pool, 8);
            let xsk = builder.open(umem).unwrap();
            program.insert(&xsk.socket).unwrap();
            xsk
        };
        let sockets = (0..device.queues().unwrap()).map(open).collect();
        Self { sockets, program }
    }

    /// How many packets each queue received. Their frames go back to FILL.
    fn received(&mut self) -> Vec<u32> {
        self.sockets.iter_mut().map(|xsk| xsk.fill.extend(xsk.rx.take(64), |packet| packet.into())).collect()
    }
}

/// Every frame is in one place, and where it is taken to be.
#[track_caller]
fn assert_conserved(umem: &Umem) -> Census {
    let census = umem.census();
    assert_eq!(census.contradiction(), None, "{census:?}");
    assert_eq!((census.total, census.program), (umem.frames(), 0), "{census:?}");
    census
}

#[test]
fn flows_spread_over_the_queues_and_stay_on_theirs() {
    let sim = Sim::builder().queues(4).build().unwrap();
    let device = sim.device("sim0").unwrap();
    let (umem, mut pool) = Umem::builder().frames(64).chunk_size(2048).ledger(true).build().unwrap();
    let mut queues = Queues::open(&device, &umem, &mut pool);
    let mut total = [0; 4];
    for port in 1000..1064 {
        let queue = sim.receive_queue("sim0", &udp(port)).unwrap();
        for _ in 0..2 {
            sim.inject("sim0", &udp(port)).unwrap();
        }
        sim.run();
        let mut wanted = vec![0; 4];
        wanted[queue as usize] = 2;
        assert_eq!(queues.received(), wanted, "port {port}");
        total[queue as usize] += 1;
    }
    assert!(total.iter().all(|&flows| flows > 4), "{total:?}");

    // What has no hash arrives on the first queue, unless the test says otherwise.
    sim.inject("sim0", &[0xff; 60]).unwrap();
    for queue in [3, 1, 3] {
        sim.inject_on("sim0", queue, &[0xff; 60]).unwrap();
    }
    sim.run();
    assert_eq!(queues.received(), [1, 1, 0, 2]);
    assert_eq!(sim.inject_on("sim0", 4, &[0; 60]), Err(Errno::INVAL));
    assert_eq!(sim.inject_on("sim0", 3, &[0; 13]), Err(Errno::MSGSIZE));
    assert_eq!(sim.inject_on("eth0", 0, &[0; 60]), Err(Errno::NODEV));
    assert_eq!(sim.receive_queue("eth0", &[0; 60]), Err(Errno::NODEV));
    assert_eq!(queues.program.map().slots(), 128);
    assert_conserved(&umem);
}

#[test]
fn the_senders_queue_decides_where_a_packet_arrives() {
    let sim = Sim::builder().queues(3).build().unwrap();
    sim.set_queues("sim1", 2).unwrap();
    let (near, far) = (sim.device("sim0").unwrap(), sim.device("sim1").unwrap());
    let (umem, mut pool) = Umem::builder().frames(96).chunk_size(2048).ledger(true).build().unwrap();
    let mut senders = Queues::open(&near, &umem, &mut pool);
    let mut receivers = Queues::open(&far, &umem, &mut pool);
    for (queue, wanted) in [(0, [1, 0]), (1, [0, 1]), (2, [1, 0])] {
        let xsk = &mut senders.sockets[queue];
        let mut packet = pool.packet(0, 60).unwrap();
        // Its hash would choose otherwise.
        packet.copy_from_slice(&udp(1000));
        xsk.tx.reserve(1).push(packet).unwrap();
        assert_eq!(xsk.socket.send().unwrap(), Sent::Done);
        assert_eq!(xsk.completion.drain_into(&mut pool), 1);
        sim.run();
        assert_eq!(receivers.received(), wanted, "from queue {queue}");
    }
    assert_conserved(&umem);
}

#[test]
fn a_program_forwards_between_two_devices_in_one_umem() {
    const PACKETS: u16 = 200;
    let sim = Sim::builder().pair("sim2", "sim3").queues(2).build().unwrap();
    let devices = ["sim0", "sim2"].map(|name| sim.device(name).unwrap());
    let (umem, mut pool) = Umem::builder().frames(128).chunk_size(2048).ledger(true).build().unwrap();
    let [mut from, mut to] = devices.each_ref().map(|device| Queues::open(device, &umem, &mut pool));
    let out = sim.capture("sim2").unwrap();
    let mut wanted = vec![Vec::new(); 2];
    for port in 1000..1000 + PACKETS {
        sim.inject("sim0", &udp(port)).unwrap();
        wanted[sim.receive_queue("sim0", &udp(port)).unwrap() as usize].push(udp(port));
        if port % 4 == 3 {
            sim.run();
            for (near, far) in from.sockets.iter_mut().zip(&mut to.sockets) {
                // Frames come in on one device and leave by the other; those that were sent refill.
                far.tx.extend(near.rx.take(16), |packet| packet);
                let _sent = far.socket.send().unwrap();
                near.fill.extend_frames(far.completion.take(16));
            }
        }
    }
    let mut sent = out.take();
    assert_eq!(sent.len(), usize::from(PACKETS));
    // Each queue keeps its order.
    for wanted in wanted {
        let queue = |packet: &Vec<u8>| wanted.contains(packet);
        assert!(sent.extract_if(.., |packet| queue(packet)).eq(wanted.iter().cloned()));
    }
    sim.run();
    assert_eq!(sim.stack("sim3").unwrap().len(), usize::from(PACKETS));
    assert_conserved(&umem);

    // Closed in any order, all frames come home.
    drop((from, pool));
    sim.run();
    drop(to);
    sim.run();
    let census = assert_conserved(&umem);
    assert_eq!(census.depot + census.retired, umem.frames());
    // SAFETY: the simulated kernel has released all sockets of this UMEM.
    unsafe { umem.reclaim() };
    assert_eq!(umem.pool().fetch(usize::MAX), 128);
}

#[test]
fn the_library_tells_what_is_wrong_with_a_queue() {
    let sim = Sim::builder().queues(2).build().unwrap();
    let device = sim.device("sim0").unwrap();
    let (umem, _pool) = Umem::builder().frames(16).build().unwrap();
    let open = |queue, umem| Socket::builder(&device).queue(queue).ring_size(16).open_tx(umem);
    assert_eq!(*open(2, &umem).unwrap_err().cause(), Cause::NoSuchQueue { queue: 2, queues: 2 });
    let first = open(1, &umem).unwrap();
    assert_eq!(*open(1, &umem).unwrap_err().cause(), Cause::QueueTaken);
    // The first socket's device decides nothing for the next: it shares the memory alone.
    let _second = open(0, &umem).unwrap();
    drop(first);
    // It waits until the queue is free.
    let _third = open(1, &umem).unwrap();
}

/// A socket that shares the queue of another: RX and TX of its own, FILL and COMPLETION of the queue.
struct Sharer {
    socket: Box<dyn xsk::kernel::RawSocket>,
    rx: Consumer<xsk::abi::Descriptor>,
    tx: Producer<xsk::abi::Descriptor>,
}

impl Sharer {
    fn of(kernel: &dyn xsk::kernel::Kernel, owner: &Port) -> Self {
        let socket = socket(kernel);
        for kind in [RingKind::Rx, RingKind::Tx] {
            set(&*socket, kind.option(), 16).unwrap();
        }
        let shared_umem_fd = owner.socket.as_fd().as_raw_fd() as u32;
        let address = SockaddrXdp { shared_umem_fd, ..address(1, 0, BindFlags::SHARED_UMEM) };
        socket.bind(&address).unwrap();
        // SAFETY: each ring is mapped once, and its program's side is worked by this value alone.
        let (rx, tx) = unsafe {
            (
                Consumer::new(map_ring(&*socket, RingKind::Rx, 16)),
                Producer::new(map_ring(&*socket, RingKind::Tx, 16)),
            )
        };
        Self { socket, rx, tx }
    }
}

#[test]
fn sockets_of_one_queue_share_its_fill_and_completion() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let mut owner = Port::open(&*kernel, "sim0", Config::default());
    let mut sharer = Sharer::of(&*kernel, &owner);
    let steered = steer(&*kernel, "sim0", &*sharer.socket);

    // A frame of the owner's FILL, and RX of the one that the program chose.
    owner.refill([0, 4096]);
    sim.inject("sim0", &packet(1, 60)).unwrap();
    sim.run();
    let desc = sharer.rx.take(1).next().unwrap();
    assert_eq!((desc.addr, owner.read(desc.addr, desc.len)), (256, packet(1, 60)));
    enter(&*kernel, &steered.map, 0, &*owner.socket).unwrap();
    sim.inject("sim0", &packet(2, 60)).unwrap();
    sim.inject("sim0", &packet(3, 60)).unwrap();
    sim.run();
    assert_eq!(owner.received()[0].0.addr, 4096 + 256);
    // FILL is the queue's, and so is the count of times that it was empty; the loss is the socket's.
    let empty = XdpStatistics { rx_fill_ring_empty_descs: 1, ..XdpStatistics::default() };
    assert_eq!(statistics(&*sharer.socket), empty);
    assert_eq!(owner.statistics(), XdpStatistics { rx_dropped: 1, ..empty });

    // Either sends, and all comes back through one COMPLETION.
    owner.write(8192, &packet(4, 60));
    assert!(sharer.tx.reserve(1).push(xsk::abi::Descriptor { addr: 8192, len: 60, options: 0 }));
    assert_eq!(sharer.socket.send(), Ok(()));
    owner.queue_packet(12288, &packet(5, 60));
    assert_eq!(owner.socket.send(), Ok(()));
    assert_eq!(owner.completed(), [8192, 12288]);
    sim.run();
    assert_eq!(sim.stack("sim1").unwrap(), [packet(4, 60), packet(5, 60)]);

    // FILL and COMPLETION can be mapped through the sharer, and outlive the owner.
    // SAFETY: the owner's mapping of the ring is gone.
    let mut completion: Consumer<u64> = unsafe {
        let Port { completion, .. } = owner;
        drop(completion);
        Consumer::new(map_ring(&*sharer.socket, RingKind::Completion, 16))
    };
    sim.run();
    assert!(sharer.tx.reserve(1).push(xsk::abi::Descriptor { addr: 8192, len: 60, options: 0 }));
    assert_eq!(sharer.socket.send(), Ok(()));
    assert_eq!(completion.take(16).collect::<Vec<_>>(), [8192]);
}

#[test]
fn a_wait_on_one_queue_ends_with_a_packet_for_it_alone() {
    let sim = Sim::builder().queues(2).build().unwrap();
    let device = sim.device("sim0").unwrap();
    let (umem, mut pool) = Umem::builder().frames(32).chunk_size(2048).build().unwrap();
    let mut queues = Queues::open(&device, &umem, &mut pool);
    sim.inject_on("sim0", 0, &[0; 60]).unwrap();
    let error = queues.sockets[1].socket.wait(Interest::Rx, None).unwrap_err();
    assert_eq!(*error.cause(), Cause::Deadlock);
    sim.inject_on("sim0", 1, &[0; 60]).unwrap();
    assert!(queues.sockets[1].socket.wait(Interest::Rx, None).unwrap().rx);
    assert_eq!(queues.received(), [1, 1], "the wait had the other one arrive as well");
}
