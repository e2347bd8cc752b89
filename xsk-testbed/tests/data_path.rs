//! The data path on the real kernel: what it allocates (nothing) and how often it calls the kernel.
//!
//! Counted, not believed: the global allocator counts for each thread, and a kernel that wraps
//! Linux counts the calls that sockets make once they are bound, all waits, and all looks at a link.
#![cfg(target_os = "linux")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use xsk::abi::{SockaddrXdp, UmemReg};
use xsk::kernel::linux::Linux;
use xsk::kernel::{
    Devices, Errno, Handle, Holder, InterfaceInfo, Kernel, Limits, LinkInfo, MapInfo, MapSpec, Mapping,
    Numbered, PollEntry, ProgramHolder, ProgramInfo, ProgramSpec, Programs, RawSocket, Sockets, Watch,
};
use xsk::port::Action;
use xsk::socket::RxTx;
use xsk::xdp::{AttachMode, DefaultProgram};
use xsk::{Device, Interest, Packet, Port, Sent, Socket, Umem};
use xsk_testbed::{Generator, Load, UdpFrame, bed, number};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct CountingAllocator;

// SAFETY: the system's allocator does all of the work.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|n| n.set(n.get() + 1));
        // SAFETY: as promised by the caller.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as promised by the caller.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// Linux, with the calls of its sockets counted.
#[derive(Debug, Default)]
struct Counting {
    calls: Arc<AtomicU64>,
}

#[derive(Debug)]
struct CountingSocket {
    inner: Box<dyn RawSocket>,
    calls: Arc<AtomicU64>,
}

impl Kernel for Counting {
    fn name(&self) -> &'static str {
        "linux"
    }
    fn id(&self) -> usize {
        Linux.id()
    }
}

// SAFETY: the sockets are Linux's.
unsafe impl Sockets for Counting {
    fn socket(&self, kind: i32, protocol: i32) -> Result<Box<dyn RawSocket>, Errno> {
        let inner = Linux.socket(kind, protocol)?;
        Ok(Box::new(CountingSocket { inner, calls: self.calls.clone() }))
    }
    fn limits(&self) -> Limits {
        Linux.limits()
    }
    fn poll(&self, entries: &mut [PollEntry<'_>], timeout: Option<Duration>) -> Result<usize, Errno> {
        self.calls.fetch_add(1, Relaxed);
        Linux.poll(entries, timeout)
    }
    fn holders(&self) -> Vec<Holder> {
        Linux.holders()
    }
}

impl AsFd for CountingSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

// SAFETY: Linux's socket does all of the work.
unsafe impl RawSocket for CountingSocket {
    fn register_umem(&self, umem: &UmemReg, optlen: usize, memory: &Mapping) -> Result<(), Errno> {
        self.inner.register_umem(umem, optlen, memory)
    }
    fn setsockopt(&self, level: i32, name: i32, value: &[u8]) -> Result<(), Errno> {
        self.inner.setsockopt(level, name, value)
    }
    fn getsockopt(&self, level: i32, name: i32, value: &mut [u8]) -> Result<usize, Errno> {
        self.inner.getsockopt(level, name, value)
    }
    fn map(&self, page_offset: u64, length: usize) -> Result<Mapping, Errno> {
        self.inner.map(page_offset, length)
    }
    fn bind(&self, address: &SockaddrXdp) -> Result<(), Errno> {
        self.inner.bind(address)
    }
    fn send(&self) -> Result<(), Errno> {
        self.calls.fetch_add(1, Relaxed);
        self.inner.send()
    }
    fn is_bound(&self) -> bool {
        self.calls.fetch_add(1, Relaxed);
        self.inner.is_bound()
    }

    fn receive(&self) -> Result<(), Errno> {
        self.calls.fetch_add(1, Relaxed);
        self.inner.receive()
    }
    fn poll(&self, events: i16, timeout: Option<Duration>) -> Result<i16, Errno> {
        self.calls.fetch_add(1, Relaxed);
        self.inner.poll(events, timeout)
    }
}

impl Programs for Counting {
    fn create_map(&self, spec: &MapSpec<'_>) -> Result<Handle, Errno> {
        Linux.create_map(spec)
    }
    fn update_map(&self, map: BorrowedFd<'_>, key: &[u8], value: &[u8], flags: u64) -> Result<(), Errno> {
        Linux.update_map(map, key, value, flags)
    }
    fn delete_from_map(&self, map: BorrowedFd<'_>, key: &[u8]) -> Result<(), Errno> {
        Linux.delete_from_map(map, key)
    }
    fn load_program(&self, spec: &ProgramSpec<'_>, log: &mut String) -> Result<Handle, Errno> {
        Linux.load_program(spec, log)
    }
    fn attach(&self, program: BorrowedFd<'_>, ifindex: u32, flags: u32) -> Result<Handle, Errno> {
        Linux.attach(program, ifindex, flags)
    }
    fn pin(&self, object: BorrowedFd<'_>, path: &Path) -> Result<(), Errno> {
        Linux.pin(object, path)
    }
    fn open_pinned(&self, path: &Path) -> Result<Handle, Errno> {
        Linux.open_pinned(path)
    }

    fn open_by_id(&self, kind: Numbered, id: u32) -> Result<Handle, Errno> {
        Linux.open_by_id(kind, id)
    }

    fn next_link(&self, after: u32) -> Result<u32, Errno> {
        Linux.next_link(after)
    }

    fn program_info(&self, program: BorrowedFd<'_>) -> Result<ProgramInfo, Errno> {
        Linux.program_info(program)
    }

    fn map_info(&self, map: BorrowedFd<'_>) -> Result<MapInfo, Errno> {
        Linux.map_info(map)
    }

    fn link_info(&self, link: BorrowedFd<'_>) -> Result<LinkInfo, Errno> {
        Linux.link_info(link)
    }

    fn program_holders(&self, id: u32) -> Vec<ProgramHolder> {
        Linux.program_holders(id)
    }
}

impl Devices for Counting {
    fn index_of(&self, name: &str) -> Result<u32, Errno> {
        Linux.index_of(name)
    }
    fn interface(&self, index: u32) -> Result<InterfaceInfo, Errno> {
        Linux.interface(index)
    }
    fn interfaces(&self) -> Result<Vec<u32>, Errno> {
        Linux.interfaces()
    }
    fn watch(&self, index: u32) -> Result<Box<dyn Watch>, Errno> {
        let inner = Linux.watch(index)?;
        Ok(Box::new(CountingWatch { inner, calls: self.calls.clone() }))
    }
}

#[derive(Debug)]
struct CountingWatch {
    inner: Box<dyn Watch>,
    calls: Arc<AtomicU64>,
}

impl AsFd for CountingWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

impl Watch for CountingWatch {
    fn take(&self) -> bool {
        self.calls.fetch_add(1, Relaxed);
        self.inner.take()
    }
}

const PATIENCE: Duration = Duration::from_secs(20);
const PACKETS: u64 = 300_000;

#[test]
fn receiving_allocates_nothing_and_calls_the_kernel_not_at_all() {
    let Some(bed) = bed(|b| b.single_namespace(true)) else { return };
    let kernel = Counting::default();
    let calls = kernel.calls.clone();
    let device = Device::open_on(Arc::new(kernel), &bed.a().name).unwrap();
    for ledger in [false, true] {
        let (umem, mut pool) = Umem::builder().ledger(ledger).build().unwrap();
        let mut xsk = Socket::builder(&device).open_rx(&umem).unwrap();
        let program = DefaultProgram::attach(&device, AttachMode::Native).unwrap();
        program.insert(&xsk.socket).unwrap();
        xsk.fill.refill(&mut pool, 2048);
        let frame = UdpFrame::new(bed.b(), bed.a()).number(0).build().unwrap();
        let running = Generator::new(bed.b(), frame).unwrap().start(Load::endless()).unwrap();

        let (calls_before, allocations_before) = (calls.load(Relaxed), ALLOCATIONS.get());
        let (mut taken, mut sum) = (0u64, 0u64);
        let deadline = Instant::now() + PATIENCE;
        while taken < PACKETS && Instant::now() < deadline {
            taken += u64::from(xsk.fill.extend(xsk.rx.take(64), |packet| {
                sum = sum.wrapping_add(number(&packet).unwrap_or(0));
                packet.into_frame()
            }));
            if xsk.fill.needs_wakeup() {
                xsk.socket.wake_rx().unwrap();
            }
        }
        let (calls_after, allocations_after) = (calls.load(Relaxed), ALLOCATIONS.get());
        running.stop().unwrap();
        assert!(taken >= PACKETS && sum > 0, "only {taken} packets arrived");
        assert_eq!(allocations_after, allocations_before);
        assert_eq!(calls_after, calls_before);
    }
}

#[test]
fn sending_allocates_nothing_and_calls_the_kernel_once_a_batch() {
    let Some(bed) = bed(|b| b) else { return };
    let kernel = Counting::default();
    let calls = kernel.calls.clone();
    let device = Device::open_on(Arc::new(kernel), &bed.a().name).unwrap();
    let (umem, mut pool) = Umem::builder().build().unwrap();
    let mut xsk = Socket::builder(&device).open_tx(&umem).unwrap();
    let frame = UdpFrame::new(bed.a(), bed.b()).build().unwrap();

    const BATCH: u32 = 32;
    const BATCHES: u64 = 2000;
    let (calls_before, allocations_before) = (calls.load(Relaxed), ALLOCATIONS.get());
    for _ in 0..BATCHES {
        xsk.completion.drain_into(&mut pool);
        let mut slots = xsk.tx.reserve(BATCH);
        for _ in 0..BATCH {
            let mut packet = pool.packet(0, frame.len() as u32).expect("frames come back");
            packet.copy_from_slice(&frame);
            assert!(slots.push(packet).is_ok());
        }
        drop(slots);
        assert_eq!(xsk.socket.send().unwrap(), Sent::Done);
    }
    assert_eq!(ALLOCATIONS.get(), allocations_before);
    assert_eq!(calls.load(Relaxed) - calls_before, BATCHES);
}

#[test]
fn forwarding_allocates_nothing_and_calls_the_kernel_once_a_batch() {
    let Some(bed) = bed(|b| b.single_namespace(true)) else { return };
    let kernel = Counting::default();
    let calls = kernel.calls.clone();
    let device = Device::open_on(Arc::new(kernel), &bed.a().name).unwrap();
    let (umem, mut pool) = Umem::builder().build().unwrap();
    let RxTx { socket, mut fill, mut rx, mut tx, mut completion } =
        Socket::builder(&device).open(&umem).unwrap();
    let program = DefaultProgram::attach(&device, AttachMode::Native).unwrap();
    program.insert(&socket).unwrap();
    fill.refill(&mut pool, 2048);
    let frame = UdpFrame::new(bed.b(), bed.a()).number(0).build().unwrap();
    let running = Generator::new(bed.b(), frame).unwrap().start(Load::endless()).unwrap();

    let (calls_before, allocations_before) = (calls.load(Relaxed), ALLOCATIONS.get());
    let (mut taken, mut sends) = (0u64, 0u64);
    let deadline = Instant::now() + PATIENCE;
    while taken < PACKETS / 10 && Instant::now() < deadline {
        fill.extend_frames(completion.take(u32::MAX));
        taken += u64::from(tx.extend(rx.take(32), |mut packet| {
            packet[..12].rotate_left(6);
            packet
        }));
        if tx.pending() > 0 {
            let _ = socket.send().unwrap();
            sends += 1;
        }
    }
    let (calls_after, allocations_after) = (calls.load(Relaxed), ALLOCATIONS.get());
    running.stop().unwrap();
    let _ = socket.wait(Interest::Tx, Some(Duration::ZERO)).unwrap();
    assert!(taken >= PACKETS / 10, "only {taken} packets arrived");
    assert_eq!(allocations_after, allocations_before);
    assert_eq!(calls_after - calls_before, sends);
}

/// What a loop over a port did.
#[derive(Debug, Default)]
struct Turns {
    packets: u64,
    /// Turns of the loop with a packet.
    busy: u64,
    idle: u64,
    calls: u64,
    allocations: u64,
}

/// Turns a port until it had so many packets.
fn turns(
    port: &mut Port,
    calls: &AtomicU64,
    packets: u64,
    mut turn: impl FnMut(&mut Port) -> xsk::Result<u32>,
) -> Turns {
    let (calls_before, allocations_before) = (calls.load(Relaxed), ALLOCATIONS.get());
    let mut turns = Turns::default();
    let deadline = Instant::now() + PATIENCE;
    while turns.packets < packets && Instant::now() < deadline {
        match turn(port).unwrap() {
            0 => turns.idle += 1,
            n => {
                turns.packets += u64::from(n);
                turns.busy += 1;
            }
        }
    }
    turns.calls = calls.load(Relaxed) - calls_before;
    turns.allocations = ALLOCATIONS.get() - allocations_before;
    assert!(turns.packets >= packets, "{turns:?} {:?}", port.monitor().statistics());
    turns
}

/// Turns without a packet for one look at the link; the port looks more seldom.
const IDLE_FOR_A_LOOK: u64 = 1000;

#[test]
fn a_port_receives_and_sends_back_without_allocating_and_with_a_call_a_batch() {
    let Some(bed) = bed(|b| b.single_namespace(true)) else { return };
    let kernel = Counting::default();
    let calls = kernel.calls.clone();
    let device = Device::open_on(Arc::new(kernel), &bed.a().name).unwrap();
    for ledger in [false, true] {
        let (umem, _) = Umem::builder().ledger(ledger).build().unwrap();
        let mut port = Port::builder(&device).umem(&umem).open().unwrap();
        let frame = UdpFrame::new(bed.b(), bed.a()).number(0).build().unwrap();
        let running = Generator::new(bed.b(), frame).unwrap().start(Load::endless()).unwrap();

        let mut sum = 0u64;
        let receive =
            |port: &mut Port| port.receive(|packet| sum = sum.wrapping_add(number(packet).unwrap_or(0)));
        let received = turns(&mut port, &calls, PACKETS, receive);
        assert_eq!(received.allocations, 0, "{received:?}");
        assert!(received.calls <= received.idle / IDLE_FOR_A_LOOK, "{received:?}");
        assert!(sum > 0);

        let swap = |mut packet: Packet| {
            packet[..12].rotate_left(6);
            packet
        };
        let plainly = turns(&mut port, &calls, PACKETS / 10, |port| port.process(swap));
        let by_action =
            turns(&mut port, &calls, PACKETS / 10, |port| port.process(|packet| Action::Send(swap(packet))));
        for sent in [plainly, by_action] {
            assert_eq!(sent.allocations, 0, "{sent:?}");
            // What a call left in TX takes another, in an idle turn at the latest.
            assert!(sent.calls <= sent.busy + sent.idle, "{sent:?}");
            assert!(sent.calls >= sent.busy, "{sent:?}: in copy mode each batch takes a call");
        }
        running.stop().unwrap();
        assert_eq!(port.drain(PATIENCE).unwrap(), 0);
    }
}

#[test]
fn a_port_generates_without_allocating_and_with_a_call_a_batch() {
    const BATCH: u32 = 64;
    let Some(bed) = bed(|b| b) else { return };
    let kernel = Counting::default();
    let calls = kernel.calls.clone();
    let device = Device::open_on(Arc::new(kernel), &bed.a().name).unwrap();
    let mut port = Port::builder(&device).batch(BATCH).send_only().open().unwrap();
    let frame = UdpFrame::new(bed.a(), bed.b()).build().unwrap();
    let generate = |port: &mut Port| {
        port.generate(BATCH, |umem, free| {
            let mut packet = umem.packet(free, 0, frame.len() as u32)?;
            packet.copy_from_slice(&frame);
            Ok(packet)
        })
    };
    let sent = turns(&mut port, &calls, PACKETS / 3, generate);
    assert_eq!(sent.allocations, 0, "{sent:?}");
    assert_eq!((sent.calls, sent.idle), (sent.busy, 0), "{sent:?}");
    assert_eq!(sent.busy, sent.packets / u64::from(BATCH), "each batch is full: {sent:?}");
}

#[test]
fn a_port_waits_with_one_call_and_allocates_nothing_then() {
    let Some(bed) = bed(|b| b) else { return };
    let kernel = Counting::default();
    let calls = kernel.calls.clone();
    let device = Device::open_on(Arc::new(kernel), &bed.a().name).unwrap();
    let mut port = Port::open(&device).unwrap();
    let (calls_before, allocations_before) = (calls.load(Relaxed), ALLOCATIONS.get());
    for _ in 0..100 {
        assert!(!port.wait(Some(Duration::ZERO)).unwrap());
    }
    assert_eq!((calls.load(Relaxed) - calls_before, ALLOCATIONS.get() - allocations_before), (100, 0));
}
