//! What a running socket meets when its interface changes under it: other queues, down and up, the
//! other end down, removal. In copy mode, on the real kernel.
#![cfg(target_os = "linux")]

use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use xsk::kernel::linux::Linux;
use xsk::kernel::{Devices as _, IFF_RUNNING, IFF_UP, POLLIN, POLLOUT, PollEntry, Sockets as _, Watch};
use xsk::socket::{Ready, RxTx};
use xsk::umem::Census;
use xsk::xdp::{AttachMode, DefaultProgram};
use xsk::{Cause, Device, Interest, Pool, Sent, Socket, Umem};
use xsk_testbed::{Channels, End, Error, PacketSocket, Testbed, UdpFrame, bed, number};

const PATIENCE: Duration = Duration::from_secs(10);
const MODES: [AttachMode; 2] = [AttachMode::Native, AttachMode::Generic];

/// Polls until `done` says so.
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::yield_now();
    }
}

/// A socket on queue 0 that receives what the other end sends, with 32 frames in FILL.
struct Running {
    umem: Umem,
    pool: Pool,
    xsk: RxTx,
    _program: DefaultProgram,
}

impl Running {
    fn new(device: &Device, mode: AttachMode) -> Self {
        let (umem, mut pool) = Umem::builder().frames(256).ledger(true).build().unwrap();
        let mut xsk = Socket::builder(device).ring_size(64).open(&umem).unwrap();
        xsk.fill.refill(&mut pool, 32);
        let program = DefaultProgram::attach(device, mode).unwrap();
        program.insert(&xsk.socket).unwrap();
        Self { umem, pool, xsk, _program: program }
    }

    /// Lets the other end send packets of these numbers, and waits until they are in RX.
    fn arrive(&mut self, bed: &Testbed, numbers: core::ops::Range<u64>) {
        let (peer, before) = (PacketSocket::open(bed.b()).unwrap(), self.umem.census().rx);
        let count = (numbers.end - numbers.start) as u32;
        for n in numbers {
            peer.send(&UdpFrame::new(bed.b(), bed.a()).number(n).build().unwrap()).unwrap();
        }
        until("packets in RX", || self.umem.census().rx == before + count);
    }

    /// Takes what is in RX: the packets' numbers.
    fn take(&mut self) -> Vec<u64> {
        let mut numbers = Vec::new();
        while self.xsk.rx.available() > 0 {
            for packet in self.xsk.rx.take(64) {
                numbers.extend(number(&packet));
                self.pool.put(packet);
            }
        }
        numbers
    }

    /// Puts packets to the other end into TX, and wakes nobody.
    fn enqueue(&mut self, bed: &Testbed, count: usize) {
        let frame = UdpFrame::new(bed.a(), bed.b()).build().unwrap();
        for _ in 0..count {
            let mut packet = self.pool.packet(0, frame.len() as u32).unwrap();
            packet.copy_from_slice(&frame);
            self.xsk.tx.reserve(1).push(packet).unwrap();
        }
    }

    /// What the kernel answers to a send, and to a wait for RX.
    fn causes(&self) -> (Cause, Cause) {
        let wait = self.xsk.socket.wait(Interest::Rx, Some(Duration::from_millis(1)));
        let send = self.xsk.socket.send();
        (send.unwrap_err().cause().clone(), wait.unwrap_err().cause().clone())
    }

    /// Frames in FILL, RX, TX and COMPLETION; none is anywhere else but in the pool.
    #[track_caller]
    fn expect(&self, expected: [u32; 4], when: &str) {
        let census = self.umem.census();
        assert_eq!(census.contradiction(), None, "{when}");
        let Census { fill, rx, tx, completion, kernel, program, .. } = census;
        assert_eq!(([fill, rx, tx, completion], kernel, program), (expected, 0, 0), "{when}: {census:?}");
    }
}

fn both_up(bed: &Testbed) {
    for end in [bed.a(), bed.b()] {
        end.wait_up().unwrap();
    }
}

fn set(end: &End, rx: u32, tx: u32) -> Result<(), i32> {
    end.set_channels(Channels { rx, tx }).map_err(|error| match error {
        Error::System { source, .. } => source.raw_os_error().unwrap(),
        error => panic!("{error}"),
    })
}

/// Waits until a watch is told of something, in one wait with a socket that will not say a word.
#[track_caller]
fn told(watch: &dyn Watch, socket: &Socket, events: i16) {
    let mut entries = [
        PollEntry { fd: socket.as_fd(), events, revents: 0 },
        PollEntry { fd: watch.as_fd(), events: POLLIN, revents: 0 },
    ];
    assert_eq!(Linux.poll(&mut entries, Some(PATIENCE)), Ok(1));
    assert_eq!((entries[0].revents, entries[1].revents), (0, POLLIN));
    assert!(watch.take());
}

#[test]
fn a_queue_with_a_socket_cannot_be_taken_away() {
    for mode in [None, Some(AttachMode::Native), Some(AttachMode::Generic)] {
        let Some(bed) = bed(|b| b.queues(4)) else { return };
        let (a, b) = (bed.a(), bed.b());
        let device = Device::open(&a.name).unwrap();
        let (umem, _pool) = Umem::builder().frames(16).build().unwrap();
        let xsk = Socket::builder(&device).queue(2).open(&umem).unwrap();
        let program = mode.map(|mode| DefaultProgram::attach(&device, mode).unwrap());
        // With a native program, a veth end keeps a receive queue for each queue that sends to it.
        let native = mode == Some(AttachMode::Native);
        assert_eq!(set(a, 3, 3), if native { Err(libc::EINVAL) } else { Ok(()) }, "{mode:?}");
        set(b, 1, 1).unwrap();
        set(a, 3, 3).unwrap();
        // Queues are counted by the fewer of both directions, whatever the socket has rings for.
        for (rx, tx) in [(2, 2), (3, 2), (2, 3), (1, 1)] {
            assert_eq!(set(a, rx, tx), Err(libc::EINVAL), "{mode:?}: {rx} and {tx}");
        }
        assert_eq!(device.queues().unwrap(), 3);
        set(a, 4, 4).unwrap();
        assert_eq!(device.queues().unwrap(), 4);
        drop((xsk, program));
        // The queue is let go a moment after the socket is closed.
        until("the queue is free", || set(a, 1, 1).is_ok());
    }
}

#[test]
fn more_queues_disturb_nobody() {
    for mode in MODES {
        let Some(bed) = bed(|b| b.queues(4)) else { return };
        for end in [bed.a(), bed.b()] {
            set(end, 1, 1).unwrap();
        }
        let device = Device::open(&bed.a().name).unwrap();
        let mut running = Running::new(&device, mode);
        running.arrive(&bed, 0..5);
        running.enqueue(&bed, 3);
        set(bed.a(), 4, 4).unwrap();
        running.expect([27, 5, 3, 0], "with more queues");
        // Everything still comes by queue 0: the other end has one queue to send from.
        running.arrive(&bed, 5..10);
        assert_eq!(running.take(), (0..10).collect::<Vec<_>>());
        assert_eq!(running.xsk.socket.send().unwrap(), Sent::Done);
        running.expect([22, 0, 0, 3], "after a send");
    }
}

#[test]
fn down_and_up_again_loses_no_frame_and_the_rings_go_on() {
    for mode in MODES {
        let Some(bed) = bed(|b| b) else { return };
        let device = Device::open(&bed.a().name).unwrap();
        let mut running = Running::new(&device, mode);
        running.arrive(&bed, 0..5);
        running.enqueue(&bed, 3);
        let watch = Linux.watch(bed.a().ifindex).unwrap();

        bed.a().set_up(false).unwrap();
        running.expect([27, 5, 3, 0], "down");
        let ready = running.xsk.socket.wait(Interest::Both, Some(Duration::ZERO)).unwrap();
        assert_eq!(ready, Ready::default(), "poll is silent, also of what is in RX");
        assert_eq!(running.causes(), (Cause::InterfaceDown, Cause::InterfaceDown));
        assert_eq!(running.take(), [0, 1, 2, 3, 4], "RX is memory, and stays");
        assert_eq!(device.info().unwrap().programs().len(), 1, "the program stays");
        assert!(watch.take());

        // A wait that begins while the interface is down ends with the first packet after it.
        let socket = running.xsk.socket.clone();
        let (started, start) = std::sync::mpsc::channel();
        let waiter = std::thread::spawn(move || {
            started.send(()).unwrap();
            socket.wait(Interest::Rx, Some(PATIENCE)).unwrap()
        });
        start.recv().unwrap();
        bed.a().set_up(true).unwrap();
        both_up(&bed);
        running.expect([27, 0, 3, 0], "up, and nobody was woken");
        assert!(watch.take());
        running.arrive(&bed, 5..12);
        assert_eq!(waiter.join().unwrap(), Ready { rx: true, tx: false });
        assert_eq!(running.take(), (5..12).collect::<Vec<_>>());
        assert_eq!(running.xsk.socket.send().unwrap(), Sent::Done);
        assert_eq!(running.xsk.completion.drain_into(&mut running.pool), 3);
        running.expect([20, 0, 0, 0], "after all");
    }
}

#[test]
fn sockets_and_programs_are_made_while_the_interface_is_down() {
    for mode in MODES {
        let Some(bed) = bed(|b| b) else { return };
        let device = Device::open(&bed.a().name).unwrap();
        bed.a().set_up(false).unwrap();
        let mut running = Running::new(&device, mode);
        bed.a().set_up(true).unwrap();
        both_up(&bed);
        running.arrive(&bed, 0..4);
        assert_eq!(running.take(), [0, 1, 2, 3]);
    }
}

#[test]
fn with_the_other_end_down_the_link_is_gone_and_each_packet_is_dropped_by_a_send_of_its_own() {
    for mode in MODES {
        let Some(bed) = bed(|b| b) else { return };
        let device = Device::open(&bed.a().name).unwrap();
        let mut running = Running::new(&device, mode);
        let watch = Linux.watch(bed.a().ifindex).unwrap();
        let flags = || Linux.interface(bed.a().ifindex).unwrap().flags & (IFF_UP | IFF_RUNNING);
        assert_eq!(flags(), IFF_UP | IFF_RUNNING);
        bed.b().set_up(false).unwrap();
        // This takes up to a second where both ends have one index, each in its own namespace: the
        // kernel does not see then that they belong together, and is in no hurry.
        told(&*watch, &running.xsk.socket, POLLIN);
        assert_eq!(flags(), IFF_UP);

        running.enqueue(&bed, 3);
        for dropped in 1..=3 {
            assert_eq!(running.xsk.socket.send().unwrap(), Sent::Dropped);
            assert_eq!(running.umem.census().completion, dropped);
        }
        assert_eq!(running.xsk.socket.send().unwrap(), Sent::Done);
        // Only now: 6.18.15 and older (6.18.44 no more) don't publish how far they took from TX when a
        // send sends nothing but drops, and a census counts the completed frame in TX as well.
        running.expect([32, 0, 0, 3], "no link");
        assert_eq!(bed.a().link().unwrap().counters.tx_dropped, 3);
        let wait = running.xsk.socket.wait(Interest::Both, Some(Duration::from_millis(1)));
        assert_eq!(wait.unwrap(), Ready { rx: false, tx: true });

        bed.b().set_up(true).unwrap();
        told(&*watch, &running.xsk.socket, POLLIN);
        both_up(&bed);
        assert_eq!(flags(), IFF_UP | IFF_RUNNING);
        running.enqueue(&bed, 3);
        assert_eq!(running.xsk.socket.send().unwrap(), Sent::Done);
        running.arrive(&bed, 0..3);
        running.expect([29, 3, 0, 6], "the link is back");
    }
}

#[test]
fn removal_leaves_every_frame_where_it_was_and_the_kernel_touches_none_any_more() {
    for mode in MODES {
        let Some(bed) = bed(|b| b) else { return };
        let device = Device::open(&bed.a().name).unwrap();
        let mut running = Running::new(&device, mode);
        running.enqueue(&bed, 4);
        assert_eq!(running.xsk.socket.send().unwrap(), Sent::Done);
        running.arrive(&bed, 0..5);
        running.enqueue(&bed, 3);
        let watch = Linux.watch(bed.a().ifindex).unwrap();

        bed.a().delete().unwrap();
        running.expect([27, 5, 3, 4], "removed");
        // RX has packets, and still poll says nothing: who waits must wait for the watch too.
        told(&*watch, &running.xsk.socket, POLLIN | POLLOUT);
        assert_eq!(running.causes(), (Cause::InterfaceGone, Cause::InterfaceGone));

        assert_eq!(running.take(), [0, 1, 2, 3, 4], "RX can be taken");
        assert_eq!(running.xsk.completion.drain_into(&mut running.pool), 4);
        running.xsk.fill.refill(&mut running.pool, 8);
        running.enqueue(&bed, 1);
        let _gone = running.causes();
        running.expect([35, 0, 4, 0], "nobody takes from FILL and TX");
    }
}
