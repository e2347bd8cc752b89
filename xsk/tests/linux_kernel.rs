//! The Linux kernel, asked through the contract: what it does right, and the errnos of what it refuses.
//!
//! Every test makes a network namespace of its own on a thread of its own; both are gone when it ends.
#![cfg(target_os = "linux")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr::{NonNull, null, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use xsk::abi::{
    AF_XDP, BindFlags, Descriptor, MmapOffsets, RingKind, SOL_XDP, SockaddrXdp, UMEM_REG_V1_SIZE, UmemFlags,
    UmemReg, XDP_MAX_TX_SKB_BUDGET, XDP_MMAP_OFFSETS, XDP_OPTIONS, XDP_STATISTICS, XDP_UMEM_REG, XdpFeatures,
    XdpStatistics, bytes_of, bytes_of_mut,
};
use xsk::kernel::linux::{self, BPF_F_TEST_XDP_LIVE_FRAMES, Linux, XdpMd};
use xsk::kernel::{
    AttachedId, Channels, Devices, Errno, Handle, IFF_LOOPBACK, IFF_RUNNING, IFF_UP, Insn, LINK_XDP,
    LinkInfo, MapSpec, Mapping, Numbered, POLLERR, POLLIN, POLLOUT, ProgramSpec, Programs, RawSocket,
    Sockets, XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE,
};
use xsk::ring::{Consumer, Producer, RingMemory};
use xsk::xdp::asm::{self, Reg, Width};

const SOCK_RAW: i32 = libc::SOCK_RAW;
const MAP_TYPE_ARRAY: u32 = 2;
const MAP_TYPE_PERCPU_ARRAY: u32 = 6;
const MAP_TYPE_XSKMAP: u32 = 17;
const CHUNK: u32 = 4096;
const CHUNKS: u32 = 16;
const RING: u32 = 8;
const DEADLINE: Duration = Duration::from_secs(10);

/// Says that a test cannot run here; an error where the environment says that it must.
fn skip(need: &str) {
    let required = std::env::var_os("XSK_REQUIRE_TESTBED").is_some_and(|value| value == "1");
    assert!(!required, "XSK_REQUIRE_TESTBED=1, but this test needs {need}");
    println!("skipped: needs {need}");
}

/// Runs a test on a thread with namespaces of its own, where that is allowed.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        let limits = Linux.limits();
        let privileged = limits.net_raw && limits.net_admin && limits.bpf;
        // SAFETY: the call takes no pointers, and changes the calling thread alone.
        if !privileged || unsafe { libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS) } != 0 {
            return skip("root");
        }
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A netlink attribute, padded.
fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (4 + payload.len() as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// One rtnetlink request about a link, acknowledged. The attributes follow a `struct ifinfomsg`.
fn change_link(kind: u16, flags: u16, body: &[u8]) {
    const REQUEST_ACK: u16 = 0x01 | 0x04;
    let mut message = (16 + body.len() as u32).to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend((REQUEST_ACK | flags).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    // SAFETY: the call takes no pointers; the descriptor is new and owned here alone.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE);
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    };
    let mut answer = [0u8; 4096];
    // SAFETY: the buffers have the lengths given.
    let (sent, received) = unsafe {
        let sent = libc::send(socket.as_raw_fd(), message.as_ptr().cast(), message.len(), 0);
        (sent, libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0))
    };
    assert_eq!(sent as usize, message.len());
    assert!(received >= 20, "{}", io::Error::last_os_error());
    let error = i32::from_ne_bytes(answer[16..20].try_into().unwrap());
    assert_eq!(error, 0, "rtnetlink: {}", io::Error::from_raw_os_error(-error));
}

/// Makes a veth pair, up, with as many queues each way.
fn make_veth(name: &str, peer: &str, queues: u32) {
    const RTM_NEWLINK: u16 = 16;
    const RTM_SETLINK: u16 = 19;
    const EXCL_CREATE: u16 = 0x200 | 0x400;
    let (ifname, tx_queues, rx_queues, linkinfo) = (3, 31, 32, 18);
    let (info_kind, info_data, veth_peer) = (1, 2, 1);
    let end = |name: &str| {
        let count = queues.to_ne_bytes();
        let name = attribute(ifname, format!("{name}\0").as_bytes());
        [vec![0; 16], name, attribute(tx_queues, &count), attribute(rx_queues, &count)].concat()
    };
    let data = attribute(info_data, &attribute(veth_peer, &end(peer)));
    let info = attribute(linkinfo, &[attribute(info_kind, b"veth\0"), data].concat());
    change_link(RTM_NEWLINK, EXCL_CREATE, &[end(name), info].concat());
    for name in [name, peer] {
        let index = Linux.index_of(name).unwrap();
        let up = [0, index, IFF_UP, IFF_UP].map(u32::to_ne_bytes).concat();
        change_link(RTM_SETLINK, 0, &up);
    }
}

/// Page-aligned memory for a UMEM.
fn memory(len: usize) -> Mapping {
    struct Anonymous(NonNull<u8>, usize);
    // SAFETY: an address and a length.
    unsafe impl Send for Anonymous {}
    // SAFETY: as above.
    unsafe impl Sync for Anonymous {}
    impl Drop for Anonymous {
        fn drop(&mut self) {
            // SAFETY: mapped below with these values; nobody reaches it without this owner.
            unsafe { libc::munmap(self.0.as_ptr().cast(), self.1) };
        }
    }
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping replaces nothing.
    let base = unsafe { libc::mmap(null_mut(), len, protection, flags, -1, 0) };
    assert_ne!(base, libc::MAP_FAILED);
    let base = NonNull::new(base.cast()).unwrap();
    // SAFETY: mapped until the owner is dropped.
    unsafe { Mapping::new(base, len, Arc::new(Anonymous(base, len))) }
}

fn registration(memory: &Mapping) -> UmemReg {
    let addr = memory.base().as_ptr().expose_provenance() as u64;
    UmemReg { addr, len: memory.len() as u64, chunk_size: CHUNK, ..UmemReg::default() }
}

fn address(ifindex: u32, queue_id: u32) -> SockaddrXdp {
    SockaddrXdp { family: AF_XDP, flags: BindFlags::COPY.bits(), ifindex, queue_id, shared_umem_fd: 0 }
}

fn set_ring(socket: &dyn RawSocket, ring: RingKind, size: u32) -> Result<(), Errno> {
    socket.setsockopt(SOL_XDP, ring.option(), bytes_of(&size))
}

/// A socket with a UMEM and all rings, not bound.
fn ready_socket() -> (Box<dyn RawSocket>, Mapping) {
    let socket = Linux.socket(SOCK_RAW, 0).unwrap();
    let memory = memory((CHUNK * CHUNKS) as usize);
    socket.register_umem(&registration(&memory), size_of::<UmemReg>(), &memory).unwrap();
    for ring in [RingKind::Fill, RingKind::Rx, RingKind::Tx, RingKind::Completion] {
        set_ring(&*socket, ring, RING).unwrap();
    }
    (socket, memory)
}

fn offsets(socket: &dyn RawSocket) -> MmapOffsets {
    let mut offsets = MmapOffsets::default();
    let len = socket.getsockopt(SOL_XDP, XDP_MMAP_OFFSETS, bytes_of_mut(&mut offsets)).unwrap();
    assert_eq!(len, size_of::<MmapOffsets>());
    offsets
}

fn statistics(socket: &dyn RawSocket) -> XdpStatistics {
    let mut statistics = XdpStatistics::default();
    let len = socket.getsockopt(SOL_XDP, XDP_STATISTICS, bytes_of_mut(&mut statistics)).unwrap();
    assert_eq!(len, size_of::<XdpStatistics>());
    statistics
}

fn map_ring<T: Copy>(socket: &dyn RawSocket, kind: RingKind) -> RingMemory<T> {
    let all = offsets(socket);
    let at = match kind {
        RingKind::Rx => all.rx,
        RingKind::Tx => all.tx,
        RingKind::Fill => all.fr,
        RingKind::Completion => all.cr,
    };
    let len = at.desc as usize + RING as usize * kind.entry_size();
    let mapping = socket.map(kind.page_offset(), len).unwrap();
    // SAFETY: the kernel says that the fields are there, and they are within the mapping.
    unsafe {
        let word = |at: u64| mapping.base().add(at as usize).cast::<AtomicU32>();
        let slots = mapping.base().add(at.desc as usize).cast();
        let owner = mapping.owner().clone();
        RingMemory::new(word(at.producer), word(at.consumer), word(at.flags), slots, RING, owner)
    }
}

fn load(instructions: &[Insn]) -> Handle {
    let mut log = String::new();
    let spec = ProgramSpec { instructions, flags: 0, name: "xsk_test" };
    Linux.load_program(&spec, &mut log).unwrap_or_else(|errno| panic!("{errno}: {log}"))
}

fn verdict(verdict: i32) -> Handle {
    load(&[asm::alu_imm(asm::Alu::Mov, Reg::R0, verdict), asm::exit()])
}

/// Redirects every packet to the socket of its queue, and passes those of queues without one.
fn redirect(map: &Handle) -> Handle {
    let [map_low, map_high] = asm::load_map(Reg::R1, map.as_fd().as_raw_fd());
    load(&[
        asm::load(Width::W, Reg::R2, Reg::R1, asm::XDP_MD_RX_QUEUE_INDEX),
        map_low,
        map_high,
        asm::alu_imm(asm::Alu::Mov, Reg::R3, asm::XDP_PASS),
        asm::call(asm::FN_REDIRECT_MAP),
        asm::exit(),
    ])
}

fn map_of(kind: u32, value_size: u32) -> Handle {
    let spec = MapSpec { kind, key_size: 4, value_size, max_entries: 2, flags: 0, name: "xsk_test" };
    Linux.create_map(&spec).unwrap()
}

#[test]
fn a_packet_travels_from_one_socket_to_another() {
    in_namespace(|| {
        make_veth("left", "right", 2);
        let (left, right) = (Linux.index_of("left").unwrap(), Linux.index_of("right").unwrap());

        let (receiver, umem) = ready_socket();
        // SAFETY: each side of each ring has one value.
        let (mut fill, mut rx) = unsafe {
            (
                Producer::<u64>::new(map_ring(&*receiver, RingKind::Fill)),
                Consumer::<Descriptor>::new(map_ring(&*receiver, RingKind::Rx)),
            )
        };
        receiver.bind(&address(right, 0)).unwrap();
        let map = map_of(MAP_TYPE_XSKMAP, 4);
        let fd = receiver.as_fd().as_raw_fd();
        Linux.update_map(map.as_fd(), &0u32.to_ne_bytes(), &fd.to_ne_bytes(), 0).unwrap();
        let program = redirect(&map);
        let _link = Linux.attach(program.as_fd(), right, XDP_FLAGS_DRV_MODE).unwrap();
        let mut slots = fill.reserve(RING);
        for chunk in 0..RING {
            assert!(slots.push(u64::from(chunk * CHUNK)));
        }
        drop(slots);

        let (sender, frames) = ready_socket();
        // SAFETY: as above.
        let (mut tx, mut completion) = unsafe {
            (
                Producer::<Descriptor>::new(map_ring(&*sender, RingKind::Tx)),
                Consumer::<u64>::new(map_ring(&*sender, RingKind::Completion)),
            )
        };
        sender.bind(&address(left, 0)).unwrap();
        // An EtherType for experiments, so that the stack's own packets are told apart.
        let mut packet = [0x5a; 60];
        packet[..6].fill(0xff);
        packet[12..14].copy_from_slice(&[0x88, 0xb5]);
        // SAFETY: chunk 1 of this UMEM, which is in no ring.
        unsafe { frames.base().add(CHUNK as usize).cast().write(packet) };
        assert!(tx.reserve(1).push(Descriptor { addr: u64::from(CHUNK), len: 60, options: 0 }));
        sender.send().unwrap();

        let start = Instant::now();
        let received = loop {
            assert!(start.elapsed() < DEADLINE, "nothing came: {:?}", statistics(&*receiver));
            let revents = receiver.poll(POLLIN, Some(Duration::from_millis(100))).unwrap();
            let Some(descriptor) = rx.take(1).next() else { continue };
            assert_eq!(revents, POLLIN);
            let (at, len) = (descriptor.addr as usize, descriptor.len as usize);
            assert!(at + len <= umem.len());
            // SAFETY: within the UMEM, and the kernel gave it back.
            let bytes = unsafe { std::slice::from_raw_parts(umem.base().add(at).as_ptr(), len) };
            if bytes[12..14] == [0x88, 0xb5] {
                break bytes.to_vec();
            }
        };
        assert_eq!(received, packet);
        receiver.receive().unwrap();

        while completion.available() == 0 {
            assert!(start.elapsed() < DEADLINE, "the frame never came back");
            sender.poll(POLLOUT, Some(Duration::ZERO)).unwrap();
        }
        assert_eq!(completion.take(1).next(), Some(u64::from(CHUNK)));
        assert_eq!(statistics(&*sender).tx_invalid_descs, 0);
        assert_eq!(statistics(&*receiver).rx_dropped, 0);
        assert_eq!(sender.poll(POLLOUT, None), Ok(POLLOUT));
        let mut options = !0u32;
        assert_eq!(receiver.getsockopt(SOL_XDP, XDP_OPTIONS, bytes_of_mut(&mut options)), Ok(4));
        assert_eq!(options, 0, "copy mode");
    });
}

#[test]
fn sockets_and_umems_that_the_kernel_refuses() {
    in_namespace(|| {
        assert_eq!(Linux.socket(libc::SOCK_DGRAM, 0).unwrap_err(), Errno::SOCKTNOSUPPORT);
        assert_eq!(Linux.socket(SOCK_RAW, 1).unwrap_err(), Errno::PROTONOSUPPORT);

        let socket = Linux.socket(SOCK_RAW, 0).unwrap();
        // SAFETY: the call takes no pointers.
        let flags = unsafe { libc::fcntl(socket.as_fd().as_raw_fd(), libc::F_GETFD) };
        assert_eq!(flags, libc::FD_CLOEXEC);

        let memory = memory((CHUNK * CHUNKS) as usize);
        let good = registration(&memory);
        let whole = size_of::<UmemReg>();
        let try_with = |change: fn(&mut UmemReg), optlen| {
            let mut registration = good;
            change(&mut registration);
            socket.register_umem(&registration, optlen, &memory)
        };
        let changes: [fn(&mut UmemReg); 8] = [
            |r| r.chunk_size = 1024,
            |r| r.chunk_size = 3000,
            |r| r.chunk_size = 1 << 20,
            |r| r.flags = 1 << 30,
            |r| r.headroom = 4096,
            |r| r.len = 0,
            |r| r.addr += 1,
            |r| r.len = u64::MAX,
        ];
        for (number, change) in changes.into_iter().enumerate() {
            assert_eq!(try_with(change, whole), Err(Errno::INVAL), "change {number}");
        }
        assert_eq!(try_with(|_| (), UMEM_REG_V1_SIZE - 1), Err(Errno::INVAL));
        assert_eq!(try_with(|_| (), usize::MAX), Err(Errno::INVAL));
        // Beyond the memory that it is said to be of.
        assert_eq!(try_with(|r| r.len += u64::from(CHUNK), whole), Err(Errno::FAULT));
        assert_eq!(try_with(|r| r.addr -= u64::from(CHUNK), whole), Err(Errno::FAULT));
        // Nor by the general way.
        assert_eq!(socket.setsockopt(SOL_XDP, XDP_UMEM_REG, bytes_of(&good)), Err(Errno::INVAL));

        // The old form loses the flags, and without them the chunk size is wrong.
        let unaligned: fn(&mut UmemReg) = |r| {
            r.flags = UmemFlags::UNALIGNED_CHUNK.bits();
            r.chunk_size = 3000;
        };
        assert_eq!(try_with(unaligned, UMEM_REG_V1_SIZE), Err(Errno::INVAL));
        // Longer than any kernel knows it.
        assert_eq!(try_with(unaligned, 64), Ok(()));
        assert_eq!(try_with(|_| (), whole), Err(Errno::BUSY));
    });
}

#[test]
fn rings_options_and_binds_that_the_kernel_refuses() {
    in_namespace(|| {
        make_veth("left", "right", 1);
        let left = Linux.index_of("left").unwrap();

        let empty = Linux.socket(SOCK_RAW, 0).unwrap();
        assert_eq!(empty.bind(&address(left, 0)), Err(Errno::INVAL), "no rings");
        assert_eq!(empty.map(RingKind::Rx.page_offset(), 4096).unwrap_err(), Errno::INVAL);
        assert_eq!(empty.send(), Err(Errno::NXIO));
        assert_eq!(empty.receive(), Err(Errno::NXIO));
        assert_eq!(empty.poll(POLLIN | POLLOUT, Some(Duration::from_millis(1))), Ok(0));
        assert_eq!(set_ring(&*empty, RingKind::Rx, 0), Err(Errno::INVAL));
        assert_eq!(set_ring(&*empty, RingKind::Rx, 100), Err(Errno::INVAL));
        assert_eq!(set_ring(&*empty, RingKind::Rx, 64), Ok(()));
        assert_eq!(set_ring(&*empty, RingKind::Rx, 64), Err(Errno::INVAL), "twice");
        let tx_ring = RingKind::Tx.option();
        assert_eq!(empty.setsockopt(SOL_XDP, tx_ring, &[64, 0]), Err(Errno::INVAL));
        assert_eq!(empty.setsockopt(SOL_XDP, 99, &[0; 4]), Err(Errno::NOPROTOOPT));
        assert_eq!(empty.setsockopt(SOL_XDP, XDP_STATISTICS, &[0; 48]), Err(Errno::NOPROTOOPT));
        let mut value = [0; 128];
        assert_eq!(empty.getsockopt(SOL_XDP, tx_ring, &mut value), Err(Errno::OPNOTSUPP));
        assert_eq!(empty.getsockopt(SOL_XDP + 1, XDP_OPTIONS, &mut value), Err(Errno::NOPROTOOPT));
        assert_eq!(empty.getsockopt(SOL_XDP, XDP_STATISTICS, &mut value[..8]), Err(Errno::INVAL));
        assert_eq!(empty.getsockopt(SOL_XDP, XDP_STATISTICS, &mut value[..30]), Ok(24));
        assert_eq!(empty.getsockopt(SOL_XDP, XDP_MMAP_OFFSETS, &mut value[..100]), Ok(96));

        let (socket, _memory) = ready_socket();
        let good = address(left, 0);
        let both = BindFlags::COPY | BindFlags::ZEROCOPY;
        for (wrong, errno) in [
            (SockaddrXdp { family: 2, ..good }, Errno::INVAL),
            (SockaddrXdp { flags: 1 << 15, ..good }, Errno::INVAL),
            (SockaddrXdp { flags: both.bits(), ..good }, Errno::INVAL),
            (SockaddrXdp { flags: BindFlags::ZEROCOPY.bits(), ..good }, Errno::OPNOTSUPP),
            (SockaddrXdp { ifindex: 9999, ..good }, Errno::NODEV),
            (SockaddrXdp { queue_id: 1, ..good }, Errno::INVAL),
        ] {
            assert_eq!(socket.bind(&wrong), Err(errno), "{wrong:?}");
        }
        assert_eq!(socket.map(RingKind::Rx.page_offset(), 1 << 20).unwrap_err(), Errno::INVAL);
        assert_eq!(socket.bind(&good), Ok(()));
        assert_eq!(socket.bind(&good), Err(Errno::BUSY), "twice");
        assert_eq!(set_ring(&*socket, RingKind::Rx, RING), Err(Errno::BUSY), "after bind");
        let budget = socket.setsockopt(SOL_XDP, XDP_MAX_TX_SKB_BUDGET, bytes_of(&1));
        // The option is of 6.17.
        assert!(matches!(budget, Err(Errno::ACCESS | Errno::NOPROTOOPT)), "{budget:?}");

        let (second, _memory) = ready_socket();
        assert_eq!(second.bind(&good), Err(Errno::BUSY), "the queue is taken");
        // By sharing the UMEM it is possible, from a socket without one.
        let sharer = Linux.socket(SOCK_RAW, 0).unwrap();
        set_ring(&*sharer, RingKind::Tx, RING).unwrap();
        let flags = BindFlags::SHARED_UMEM.bits();
        let shared = SockaddrXdp { flags, shared_umem_fd: socket.as_fd().as_raw_fd() as u32, ..good };
        let not_a_socket = SockaddrXdp { shared_umem_fd: u32::MAX, ..shared };
        assert_eq!(second.bind(&shared), Err(Errno::INVAL), "it has a UMEM");
        assert_eq!(sharer.bind(&not_a_socket), Err(Errno::NOTSOCK));
        assert_eq!(sharer.bind(&shared), Ok(()));
        assert_eq!(socket.poll(POLLERR, Some(Duration::ZERO)), Ok(0));
    });
}

#[test]
fn a_mapping_outlives_its_socket_keeps_the_queue_and_is_not_inherited() {
    in_namespace(|| {
        make_veth("left", "right", 1);
        let queue = address(Linux.index_of("left").unwrap(), 0);
        let (first, _first_memory) = ready_socket();
        let all = offsets(&*first);
        let len = all.fr.desc as usize + RING as usize * RingKind::Fill.entry_size();
        let ring = first.map(RingKind::Fill.page_offset(), len).unwrap();
        first.bind(&queue).unwrap();
        drop(first);

        // "dc" in the kernel's words: do not copy on fork.
        let smaps = std::fs::read_to_string("/proc/thread-self/smaps").unwrap();
        let start = format!("{:x}-", ring.base().as_ptr().addr());
        let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&start));
        let flags = lines.find_map(|line| line.strip_prefix("VmFlags:")).expect("the ring is mapped");
        assert!(flags.split_whitespace().any(|flag| flag == "dc"), "{flags}");

        // SAFETY: the ring is mapped, and this word is its producer's index.
        let word = unsafe { ring.base().add(all.fr.producer as usize).cast::<AtomicU32>().as_ref() };
        assert_eq!(word.load(Ordering::Acquire), 0, "still readable");
        let (second, _second_memory) = ready_socket();
        assert_eq!(second.bind(&queue), Err(Errno::BUSY), "the mapping keeps the queue");
        drop(ring);
        // The kernel releases a queue some time after the last hold on it is gone.
        let start = Instant::now();
        while let Err(errno) = second.bind(&queue) {
            assert_eq!(errno, Errno::BUSY);
            assert!(start.elapsed() < DEADLINE, "the queue is never released");
            std::thread::yield_now();
        }
    });
}

#[test]
fn programs_run_and_attach() {
    in_namespace(|| {
        make_veth("left", "right", 1);
        let left = Linux.index_of("left").unwrap();
        let pass = verdict(asm::XDP_PASS);

        let packet = [0x42; 64];
        let run = linux::test_run(pass.as_fd(), &packet, None, 1000, 0, 0).unwrap();
        assert_eq!((run.retval, &run.data_out[..]), (asm::XDP_PASS as u32, &packet[..]));
        // A context says where the packet came from: here the program answers with the queue.
        let queue = load(&[
            asm::load(Width::W, Reg::R0, Reg::R1, asm::XDP_MD_RX_QUEUE_INDEX),
            asm::alu_imm(asm::Alu::Add, Reg::R0, 40),
            asm::exit(),
        ]);
        let context = XdpMd { data_end: 64, ingress_ifindex: left, ..XdpMd::default() };
        // A queue of a veth is known to XDP once there is a program.
        let link = Linux.attach(pass.as_fd(), left, 0).unwrap();
        let run = linux::test_run(queue.as_fd(), &packet, Some(&context), 1, 0, 0).unwrap();
        assert_eq!(run.retval, 40);
        let missing = XdpMd { rx_queue_index: 7, ..context };
        let run = linux::test_run(queue.as_fd(), &packet, Some(&missing), 1, 0, 0);
        assert_eq!(run, Err(Errno::INVAL));
        let drop_all = verdict(asm::XDP_DROP);
        let live = linux::test_run(drop_all.as_fd(), &packet, None, 256, BPF_F_TEST_XDP_LIVE_FRAMES, 64);
        assert_eq!(live.unwrap().data_out, []);

        let [native] = Linux.interface(left).unwrap().attached[..] else { panic!("one program") };
        assert_eq!(native.mode, 1);
        assert_eq!(Linux.attach(pass.as_fd(), left, 0).unwrap_err(), Errno::BUSY);
        let both = XDP_FLAGS_DRV_MODE | XDP_FLAGS_SKB_MODE;
        assert_eq!(Linux.attach(pass.as_fd(), left, both).unwrap_err(), Errno::INVAL);
        assert_eq!(Linux.attach(pass.as_fd(), 9999, 0).unwrap_err(), Errno::INVAL);
        drop(link);
        assert_eq!(Linux.interface(left).unwrap().attached, []);
        let _generic = Linux.attach(pass.as_fd(), left, XDP_FLAGS_SKB_MODE).unwrap();
        let attached = Linux.interface(left).unwrap().attached;
        assert_eq!(attached, [AttachedId { mode: 2, id: native.id }]);
        assert_eq!(Linux.attach(pass.as_fd(), left, XDP_FLAGS_DRV_MODE).unwrap_err(), Errno::EXIST);
    });
}

/// All links of the machine, by number.
fn links() -> Vec<u32> {
    std::iter::successors(Linux.next_link(0).ok(), |&after| Linux.next_link(after).ok()).collect()
}

#[test]
fn objects_are_found_and_opened_by_their_numbers() {
    in_namespace(|| {
        make_veth("left", "right", 1);
        let left = Linux.index_of("left").unwrap();
        let spec = MapSpec {
            kind: MAP_TYPE_XSKMAP,
            key_size: 4,
            value_size: 4,
            max_entries: 3,
            flags: 0,
            name: "m",
        };
        let over_a_map = || {
            let map = Linux.create_map(&spec).unwrap();
            let [low, high] = asm::load_map(Reg::R1, map.as_fd().as_raw_fd());
            let pass = asm::alu_imm(asm::Alu::Mov, Reg::R0, asm::XDP_PASS);
            (load(&[low, high, pass, asm::exit()]), map)
        };
        let (program, map) = over_a_map();
        let link = Linux.attach(program.as_fd(), left, 0).unwrap();

        let its_map = Linux.map_info(map.as_fd()).unwrap();
        assert_eq!((its_map.kind, its_map.max_entries, &its_map.name[..]), (MAP_TYPE_XSKMAP, 3, "m"));
        assert_eq!((its_map.key_size, its_map.value_size), (4, 4));
        let its_program = Linux.program_info(program.as_fd()).unwrap();
        assert_eq!((&its_program.name[..], &its_program.maps[..]), ("xsk_test", &[its_map.id][..]));
        let its_link = Linux.link_info(link.as_fd()).unwrap();
        let info = LinkInfo { id: its_link.id, kind: LINK_XDP, program: its_program.id, ifindex: left };
        assert_eq!(its_link, info);

        // The same instructions over another map have the same tag; others have another.
        let twin = Linux.program_info(over_a_map().0.as_fd()).unwrap();
        assert_eq!(twin.tag, its_program.tag);
        assert_ne!((twin.id, &twin.maps), (its_program.id, &its_program.maps));
        let other = Linux.program_info(verdict(asm::XDP_DROP).as_fd()).unwrap();
        assert_ne!(other.tag, its_program.tag);
        assert_eq!(other.maps, []);
        // What is no program has no program's info.
        assert_eq!(Linux.program_info(map.as_fd()), Err(Errno::INVAL));
        assert_eq!(Linux.program_info(link.as_fd()).map(|info| info.maps).unwrap_or_default(), []);
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(Linux.program_info(file.as_fd()), Err(Errno::INVAL));
        assert_eq!(Linux.link_info(file.as_fd()), Err(Errno::INVAL));

        let holders = Linux.program_holders(its_program.id);
        let this = std::process::id();
        assert!(holders.iter().all(|holder| holder.process.pid == this), "{holders:?}");
        assert_eq!(holders.iter().map(|h| h.link).collect::<Vec<_>>(), [None, Some(its_link.id)]);

        // Whoever opened the link keeps the program attached, and everything that it needs.
        assert!(links().contains(&its_link.id) && links().is_sorted(), "{:?}", links());
        let again = Linux.open_by_id(Numbered::Link, its_link.id).unwrap();
        drop((link, program, map));
        assert_eq!(Linux.interface(left).unwrap().attached, [AttachedId { mode: 1, id: its_program.id }]);
        assert_eq!(Linux.link_info(again.as_fd()), Ok(info));
        let program = Linux.open_by_id(Numbered::Program, its_program.id).unwrap();
        assert_eq!(Linux.program_info(program.as_fd()), Ok(its_program.clone()));
        let map = Linux.open_by_id(Numbered::Map, its_map.id).unwrap();
        assert_eq!(Linux.map_info(map.as_fd()), Ok(its_map));

        // Neither the program nor the map keeps it attached.
        drop(again);
        assert_eq!(Linux.interface(left).unwrap().attached, []);
        assert_eq!(Linux.open_by_id(Numbered::Link, its_link.id).unwrap_err(), Errno::NOENT);
        assert!(!links().contains(&its_link.id));
        assert_eq!(Linux.next_link(i32::MAX as u32 - 1), Err(Errno::NOENT));

        // A link that has lost its interface is on none.
        let link = Linux.attach(program.as_fd(), left, 0).unwrap();
        const RTM_DELLINK: u16 = 17;
        change_link(RTM_DELLINK, 0, &[0, left, 0, 0].map(u32::to_ne_bytes).concat());
        let lost = Linux.link_info(link.as_fd()).unwrap();
        assert_eq!((lost.kind, lost.program, lost.ifindex), (LINK_XDP, its_program.id, 0));
    });
}

#[test]
fn opening_by_number_takes_cap_sys_admin() {
    in_namespace(|| {
        make_veth("left", "right", 1);
        let program = verdict(asm::XDP_PASS);
        let id = Linux.program_info(program.as_fd()).unwrap().id;
        let link = Linux.attach(program.as_fd(), Linux.index_of("left").unwrap(), 0).unwrap();
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective.remove(rustix::thread::CapabilitySet::SYS_ADMIN);
        rustix::thread::set_capabilities(None, sets).unwrap();
        for kind in [Numbered::Program, Numbered::Map, Numbered::Link] {
            assert_eq!(Linux.open_by_id(kind, id).unwrap_err(), Errno::PERM, "{kind:?}");
        }
        assert_eq!(Linux.next_link(0), Err(Errno::PERM));
        // What is open already tells all that it tells others.
        assert_eq!(Linux.program_info(program.as_fd()).unwrap().id, id);
        assert_eq!(Linux.link_info(link.as_fd()).unwrap().program, id);
    });
}

#[test]
fn a_refused_program_comes_with_the_verifiers_words() {
    in_namespace(|| {
        let refuse = |instructions: &[Insn]| {
            let mut log = String::from("of an earlier call");
            let spec = ProgramSpec { instructions, flags: 0, name: "xsk_test" };
            (Linux.load_program(&spec, &mut log).unwrap_err(), log)
        };
        let (errno, log) = refuse(&[asm::exit()]);
        assert_eq!(errno, Errno::ACCESS);
        assert!(log.contains("R0 !read_ok"), "{log}");

        // More words than the first buffer holds: a long program with its mistake at the end.
        let mut long: Vec<_> = (0..4000).map(|n| asm::alu_imm(asm::Alu::Mov, Reg::R0, n)).collect();
        long.extend([asm::alu(asm::Alu::Mov, Reg::R0, Reg::R9), asm::exit()]);
        let (errno, log) = refuse(&long);
        assert_eq!(errno, Errno::ACCESS);
        assert!(log.len() > 64 << 10 && log.contains("R9 !read_ok"), "{} bytes", log.len());

        let mut log = String::new();
        let pass = [asm::alu_imm(asm::Alu::Mov, Reg::R0, asm::XDP_PASS), asm::exit()];
        let spec = ProgramSpec { instructions: &pass, flags: 0, name: "a_name_that_is_too_long" };
        assert_eq!(Linux.load_program(&spec, &mut log).unwrap_err(), Errno::INVAL);
        assert!(Linux.load_program(&ProgramSpec { name: "", ..spec }, &mut log).is_ok());
        assert_eq!(log, "");
    });
}

#[test]
fn maps_hold_what_fits_them() {
    in_namespace(|| {
        let spec =
            MapSpec { kind: MAP_TYPE_XSKMAP, key_size: 4, value_size: 4, max_entries: 2, flags: 0, name: "" };
        for wrong in [
            MapSpec { key_size: 8, ..spec },
            MapSpec { value_size: 8, ..spec },
            MapSpec { max_entries: 0, ..spec },
            MapSpec { flags: 1, ..spec },
        ] {
            assert_eq!(Linux.create_map(&wrong).unwrap_err(), Errno::INVAL, "{wrong:?}");
        }

        let sockets = map_of(MAP_TYPE_XSKMAP, 4);
        let key = |key: u32| key.to_ne_bytes();
        let (socket, _memory) = ready_socket();
        let fd = socket.as_fd().as_raw_fd().to_ne_bytes();
        let update = |key: &[u8], value: &[u8], flags| Linux.update_map(sockets.as_fd(), key, value, flags);
        let (noexist, exist) = (1, 2);
        assert_eq!(update(&key(0), &fd, exist), Err(Errno::NOENT));
        assert_eq!(update(&key(0), &fd, 0), Ok(()));
        assert_eq!(update(&key(2), &fd, 0), Err(Errno::TOOBIG));
        assert_eq!(update(&key(1), &(-1i32).to_ne_bytes(), 0), Err(Errno::BADF));
        let map_fd = sockets.as_fd().as_raw_fd().to_ne_bytes();
        assert_eq!(update(&key(1), &map_fd, 0), Err(Errno::NOTSOCK));
        let (other, _memory) = ready_socket();
        let other_fd = other.as_fd().as_raw_fd().to_ne_bytes();
        assert_eq!(update(&key(0), &other_fd, noexist), Err(Errno::EXIST));
        // The kernel would read beyond these.
        assert_eq!(update(&[0; 3], &fd, 0), Err(Errno::INVAL));
        assert_eq!(update(&key(0), &fd[..2], 0), Err(Errno::INVAL));
        assert_eq!(Linux.delete_from_map(sockets.as_fd(), &[0]), Err(Errno::INVAL));
        assert_eq!(Linux.delete_from_map(sockets.as_fd(), &key(0)), Ok(()));
        assert_eq!(Linux.delete_from_map(sockets.as_fd(), &key(2)), Err(Errno::INVAL));
        assert_eq!(update(&key(0), &fd, exist), Err(Errno::NOENT), "deleted");
        let mut value = [0; 4];
        assert_eq!(linux::lookup_map(sockets.as_fd(), &key(0), &mut value), Err(Errno::OPNOTSUPP));
        assert_eq!(linux::lookup_map(socket.as_fd(), &key(0), &mut value), Err(Errno::INVAL), "not a map");

        let array = map_of(MAP_TYPE_ARRAY, 8);
        let mut value = [0; 8];
        Linux.update_map(array.as_fd(), &key(1), &77u64.to_ne_bytes(), 0).unwrap();
        linux::lookup_map(array.as_fd(), &key(1), &mut value).unwrap();
        assert_eq!(u64::from_ne_bytes(value), 77);
        assert_eq!(linux::lookup_map(array.as_fd(), &key(1), &mut value[..4]), Err(Errno::INVAL));
        assert_eq!(linux::lookup_map(array.as_fd(), &key(9), &mut value), Err(Errno::NOENT));
        let per_cpu = map_of(MAP_TYPE_PERCPU_ARRAY, 8);
        assert_eq!(linux::lookup_map(per_cpu.as_fd(), &key(0), &mut value), Err(Errno::OPNOTSUPP));
    });
}

#[test]
fn an_object_is_pinned_in_a_bpf_file_system() {
    in_namespace(|| {
        let map = map_of(MAP_TYPE_ARRAY, 8);
        assert_eq!(Linux.pin(map.as_fd(), Path::new("/proc/a\0b")), Err(Errno::INVAL));

        // Mounts that only this thread's namespace has.
        let mount = |kind: &std::ffi::CStr, at: &std::ffi::CStr, flags| {
            // SAFETY: the strings end with a zero byte.
            let result = unsafe { libc::mount(kind.as_ptr(), at.as_ptr(), kind.as_ptr(), flags, null()) };
            assert_eq!(result, 0, "{kind:?}: {}", io::Error::last_os_error());
        };
        mount(c"none", c"/", libc::MS_REC | libc::MS_PRIVATE);
        let path = Path::new("/mnt/xsk_test");
        mount(c"tmpfs", c"/mnt", 0);
        assert_eq!(Linux.pin(map.as_fd(), path), Err(Errno::PERM), "no BPF file system");
        mount(c"bpf", c"/mnt", 0);
        Linux.pin(map.as_fd(), path).unwrap();
        assert!(path.exists());
        assert_eq!(Linux.pin(map.as_fd(), path), Err(Errno::EXIST));

        let again = Linux.open_pinned(path).unwrap();
        assert_eq!(Linux.map_info(again.as_fd()), Linux.map_info(map.as_fd()));
        for (elsewhere, errno) in
            [("/mnt/no", Errno::NOENT), ("/dev/null", Errno::ACCESS), ("/a\0b", Errno::INVAL)]
        {
            assert_eq!(Linux.open_pinned(Path::new(elsewhere)).unwrap_err(), errno, "{elsewhere:?}");
        }
    });
}

#[test]
fn interfaces_are_those_of_the_threads_namespace() {
    in_namespace(|| {
        make_veth("left", "right", 2);
        let left = Linux.index_of("left").unwrap();
        let all = Linux.interfaces().unwrap();
        assert!(all.is_sorted() && all.contains(&1) && all.contains(&left));
        let names: Vec<_> = all.iter().map(|&index| Linux.interface(index).unwrap().name).collect();
        for name in ["lo", "left", "right"] {
            assert_eq!(names.iter().filter(|&other| other == name).count(), 1, "{names:?}");
        }

        let lo = Linux.interface(1).unwrap();
        assert_eq!((&lo.name[..], lo.mac, lo.channels), ("lo", Some([0; 6]), None));
        assert_eq!(lo.flags & (IFF_LOOPBACK | IFF_UP), IFF_LOOPBACK);
        assert_eq!((lo.mtu, lo.rx_queues, lo.attached), (65536, 1, vec![]));

        let veth = Linux.interface(left).unwrap();
        assert_eq!((veth.index, &veth.name[..], veth.mtu), (left, "left", 1500));
        assert_eq!(veth.flags & (IFF_UP | IFF_RUNNING), IFF_UP | IFF_RUNNING);
        assert!(veth.mac.is_some_and(|mac| mac != [0; 6]));
        assert_eq!(veth.driver.as_deref(), Some("veth"));
        assert_eq!(veth.channels, Some(Channels { rx: 2, tx: 2, combined: 0 }));
        assert_eq!((veth.rx_queues, veth.tx_queues), (2, 2));
        // `None` before 6.3.
        if let Some(features) = veth.features {
            let expected = XdpFeatures::BASIC | XdpFeatures::REDIRECT | XdpFeatures::RX_SG;
            assert!(features.xdp.contains(expected), "{features:?}");
            assert!(!features.xdp.contains(XdpFeatures::XSK_ZEROCOPY));
            assert_eq!(features.zc_max_segs, None);
        }

        for absent in ["", "nobody", "a_name_of_16_byt", "left\0", &"x".repeat(1000)] {
            assert_eq!(Linux.index_of(absent), Err(Errno::NODEV), "{absent:?}");
        }
        for absent in [0, 9999, i32::MAX as u32, u32::MAX] {
            assert_eq!(Linux.interface(absent), Err(Errno::NODEV), "{absent}");
        }
    });
    assert_eq!(Linux.index_of("left"), Err(Errno::NODEV), "another thread is in another namespace");
}

#[test]
fn limits_are_those_of_this_process() {
    let limits = Linux.limits();
    assert!(limits.page_size.is_power_of_two() && limits.page_size >= 4096);
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    let effective = u64::from_str_radix(effective.trim(), 16).unwrap();
    let (net_admin, net_raw) = (12, 13);
    assert_eq!(limits.net_admin, effective >> net_admin & 1 == 1);
    assert_eq!(limits.net_raw, effective >> net_raw & 1 == 1);
    let table = std::fs::read_to_string("/proc/thread-self/limits").unwrap();
    let locked = table.lines().find_map(|line| line.strip_prefix("Max locked memory")).unwrap();
    let soft = locked.split_whitespace().next().unwrap();
    assert_eq!(limits.memlock, soft.parse().ok(), "{soft}");
}

#[test]
fn in_a_user_namespace_capabilities_count_for_sockets_and_not_for_programs() {
    // A process with one thread may enter a user namespace, so this one is left to a fork.
    let mut ends = [0; 2];
    // SAFETY: the array has room for two descriptors, which are owned here alone from then on.
    let (read, write) = unsafe {
        assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
        (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
    };
    // SAFETY: the child makes system calls only and allocates nothing.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "{}", io::Error::last_os_error());
    if child == 0 {
        // SAFETY: the call takes no pointers.
        let entered = unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET) } == 0;
        let limits = Linux.limits();
        let answer = [entered, limits.net_raw, limits.net_admin, limits.bpf, limits.ipc_lock].map(u8::from);
        // SAFETY: the buffer has the length given, and a child ends without unwinding.
        unsafe {
            libc::write(write.as_raw_fd(), answer.as_ptr().cast(), answer.len());
            libc::_exit(0);
        }
    }
    drop(write);
    let mut answer = Vec::new();
    io::Read::read_to_end(&mut std::fs::File::from(read), &mut answer).unwrap();
    // SAFETY: a child of this process; its status is not asked for.
    unsafe { libc::waitpid(child, null_mut(), 0) };
    match answer[..] {
        [0, ..] => skip("user namespaces"),
        _ => assert_eq!(answer, [1, 1, 1, 0, 0], "entered, net_raw, net_admin, bpf, ipc_lock"),
    }
}

/// `setsockopt(SOL_XDP, …)` with whatever address and length.
fn set_raw(socket: &dyn RawSocket, name: i32, value: *const libc::c_void, len: usize) -> Result<(), Errno> {
    // SAFETY: the kernel checks the address itself, and reads at most `len` bytes there.
    let result = unsafe { libc::setsockopt(socket.as_fd().as_raw_fd(), SOL_XDP, name, value, len as u32) };
    if result == 0 { Ok(()) } else { Err(last_errno()) }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap()
}

/// What a call that yields nothing came to.
type Outcome = Result<(), Errno>;

/// Gives up capabilities, for the rest of this thread.
fn give_up(dropped: rustix::thread::CapabilitySet) {
    let mut sets = rustix::thread::capabilities(None).unwrap();
    sets.effective.remove(dropped);
    rustix::thread::set_capabilities(None, sets).unwrap();
}

#[test]
fn a_socket_is_refused_for_its_capability_then_its_type_then_its_protocol() {
    in_namespace(|| {
        let cases = [
            (libc::SOCK_DGRAM, 1, Errno::SOCKTNOSUPPORT),
            (libc::SOCK_STREAM, 0, Errno::SOCKTNOSUPPORT),
            (SOCK_RAW, 1, Errno::PROTONOSUPPORT),
            (SOCK_RAW, -1, Errno::PROTONOSUPPORT),
        ];
        for (kind, protocol, errno) in cases {
            assert_eq!(Linux.socket(kind, protocol).unwrap_err(), errno, "{kind} {protocol}");
        }
        assert!(Linux.socket(SOCK_RAW | libc::SOCK_NONBLOCK, 0).is_ok());
        give_up(rustix::thread::CapabilitySet::NET_RAW);
        for (kind, protocol) in [(SOCK_RAW, 0), (SOCK_RAW, 1), (libc::SOCK_DGRAM, 1)] {
            assert_eq!(Linux.socket(kind, protocol).unwrap_err(), Errno::PERM, "{kind} {protocol}");
        }
    });
}

#[test]
fn umem_registrations_row_by_row() {
    in_namespace(|| {
        let memory = memory((CHUNK * CHUNKS) as usize);
        let unaligned = UmemFlags::UNALIGNED_CHUNK.bits();
        let metadata = UmemFlags::TX_METADATA_LEN.bits();
        let (ok, invalid) = (Ok(()), Err(Errno::INVAL));
        type Change = fn(&mut UmemReg, u32);
        type Row<'a> = (&'a str, Change, &'a [(u32, Outcome)]);
        let chunk: Change = |r, value| r.chunk_size = value;
        let flags: Change = |r, value| r.flags = value;
        let address: Change = |r, value| {
            r.addr += u64::from(value);
            r.len -= u64::from(CHUNK);
        };
        let length: Change = |r, value| r.len = value.into();
        let headroom: Change = |r, value| r.headroom = value;
        let small_headroom: Change = |r, value| (r.chunk_size, r.headroom) = (2048, value);
        let wild_chunk: Change =
            |r, value| (r.flags, r.chunk_size) = (UmemFlags::UNALIGNED_CHUNK.bits(), value);
        let with_metadata: Change =
            |r, value| (r.flags, r.tx_metadata_len) = (UmemFlags::TX_METADATA_LEN.bits(), value);
        let metadata_unasked: Change = |r, value| r.tx_metadata_len = value;
        let wild_length: Change =
            |r, value| (r.flags, r.len) = (UmemFlags::UNALIGNED_CHUNK.bits(), value.into());
        let rows: [Row<'_>; 11] = [
            (
                "chunk size",
                chunk,
                &[(0, invalid), (1024, invalid), (3000, invalid), (8192, invalid), (2048, ok)],
            ),
            ("unaligned chunk", wild_chunk, &[(2047, invalid), (3000, ok), (4001, ok), (4097, invalid)]),
            ("flags", flags, &[(8, invalid), (1 << 31, invalid), (unaligned, ok), (metadata, ok)]),
            ("address", address, &[(1, invalid), (2048, invalid), (4096, ok)]),
            ("length", length, &[(0, invalid), (2048, invalid), (CHUNK + 1, invalid), (CHUNK, ok)]),
            ("unaligned length", wild_length, &[(2048, invalid), (CHUNK + 100, ok)]),
            ("headroom", headroom, &[(3393, invalid), (u32::MAX, invalid), (3392, ok)]),
            ("headroom of small chunks", small_headroom, &[(1345, invalid), (1344, ok)]),
            ("metadata", with_metadata, &[(12, invalid), (256, invalid), (0, ok), (8, ok), (248, ok)]),
            ("metadata without its flag", metadata_unasked, &[(7, ok), (u32::MAX, ok)]),
            ("nothing", |_, _| (), &[(0, ok)]),
        ];
        for (name, change, cases) in rows {
            for &(value, expected) in cases {
                // The same memory may be in several UMEMs.
                let socket = Linux.socket(SOCK_RAW, 0).unwrap();
                let mut registration = registration(&memory);
                change(&mut registration, value);
                let result = socket.register_umem(&registration, size_of::<UmemReg>(), &memory);
                assert_eq!(result, expected, "{name} {value}");
                // What was refused left nothing.
                let again = socket.register_umem(&self::registration(&memory), size_of::<UmemReg>(), &memory);
                assert_eq!(again, if expected.is_ok() { Err(Errno::BUSY) } else { Ok(()) }, "{name} {value}");
            }
        }
    });
}

#[test]
fn memory_that_the_kernel_does_not_pin() {
    /// Memory of some kind, for as long as a thread of a test: nothing else touches it.
    fn map(protection: i32, flags: i32, fd: i32) -> *mut libc::c_void {
        // SAFETY: a new mapping replaces nothing.
        let base = unsafe { libc::mmap(null_mut(), (CHUNK * CHUNKS) as usize, protection, flags, fd, 0) };
        assert_ne!(base, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        base
    }
    in_namespace(|| {
        let both = libc::PROT_READ | libc::PROT_WRITE;
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let register = |base: *mut libc::c_void| {
            let socket = Linux.socket(SOCK_RAW, 0).unwrap();
            let len = u64::from(CHUNK * CHUNKS);
            let registration = UmemReg {
                addr: base.expose_provenance() as u64,
                len,
                chunk_size: CHUNK,
                ..UmemReg::default()
            };
            let value = (&raw const registration).cast();
            set_raw(&*socket, XDP_UMEM_REG, value, size_of::<UmemReg>())
        };
        let socket = Linux.socket(SOCK_RAW, 0).unwrap();
        assert_eq!(set_raw(&*socket, XDP_UMEM_REG, null(), size_of::<UmemReg>()), Err(Errno::FAULT));

        assert_eq!(register(map(both, private, -1)), Ok(()));
        assert_eq!(register(map(libc::PROT_READ, private, -1)), Err(Errno::FAULT), "read-only");
        let base = map(both, private, -1);
        // SAFETY: mapped above, and not used.
        unsafe { libc::munmap(base, (CHUNK * CHUNKS) as usize) };
        assert_eq!(register(base), Err(Errno::FAULT), "unmapped");
        let base = map(both, private, -1);
        // SAFETY: as above, one page in the middle.
        unsafe { libc::munmap(base.byte_add(2 * CHUNK as usize), CHUNK as usize) };
        assert_eq!(register(base), Err(Errno::NOMEM), "a hole");

        // SAFETY: the names end with a zero byte; the descriptors are owned here alone.
        let open = |fd: libc::c_int| unsafe {
            assert!(fd >= 0, "{}", io::Error::last_os_error());
            assert_eq!(libc::ftruncate(fd, i64::from(CHUNK * CHUNKS)), 0);
            OwnedFd::from_raw_fd(fd)
        };
        // SAFETY: as above.
        let in_memory = open(unsafe { libc::memfd_create(c"xsk_test".as_ptr(), libc::MFD_CLOEXEC) });
        assert_eq!(register(map(both, libc::MAP_SHARED, in_memory.as_raw_fd())), Ok(()));
        // Files of the build are on a disk, where there is one.
        let directory = std::env::current_exe().unwrap().parent().unwrap().to_owned();
        let directory = std::ffi::CString::new(directory.as_os_str().as_encoded_bytes()).unwrap();
        // SAFETY: as above.
        let file = open(unsafe {
            libc::open(directory.as_ptr(), libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC, 0o600)
        });
        // SAFETY: a structure of numbers, which the call fills.
        let kind = unsafe {
            let mut stat: libc::statfs = std::mem::zeroed();
            assert_eq!(libc::fstatfs(file.as_raw_fd(), &mut stat), 0);
            stat.f_type as i64
        };
        let on_disk = map(both, libc::MAP_SHARED, file.as_raw_fd());
        match kind {
            libc::TMPFS_MAGIC => assert_eq!(register(on_disk), Ok(())),
            libc::EXT4_SUPER_MAGIC | libc::XFS_SUPER_MAGIC | libc::BTRFS_SUPER_MAGIC => {
                assert_eq!(register(on_disk), Err(Errno::FAULT), "a file on disk");
            }
            _ => {}
        }
        assert_eq!(register(map(both, libc::MAP_PRIVATE, file.as_raw_fd())), Ok(()), "a private copy of it");
    });
}

#[test]
fn options_row_by_row() {
    in_namespace(|| {
        let rx = RingKind::Rx.option();
        let size = 64u32.to_ne_bytes();
        let longer = [&size[..], &[9; 60]].concat();
        let budget = |value: u32| value.to_ne_bytes();
        let set: [(&str, i32, i32, &[u8], Outcome); 11] = [
            ("a short size", SOL_XDP, rx, &size[..3], Err(Errno::INVAL)),
            ("no size", SOL_XDP, rx, &[], Err(Errno::INVAL)),
            ("a size of 2^31", SOL_XDP, rx, &(1u32 << 31).to_ne_bytes(), Err(Errno::NOMEM)),
            ("another level", SOL_XDP + 1, rx, &size, Err(Errno::NOPROTOOPT)),
            ("statistics", SOL_XDP, XDP_STATISTICS, &[0; 48], Err(Errno::NOPROTOOPT)),
            ("options", SOL_XDP, XDP_OPTIONS, &[0; 4], Err(Errno::NOPROTOOPT)),
            ("offsets", SOL_XDP, XDP_MMAP_OFFSETS, &[0; 128], Err(Errno::NOPROTOOPT)),
            ("an unknown option", SOL_XDP, 99, &size, Err(Errno::NOPROTOOPT)),
            ("more than a size", SOL_XDP, rx, &longer, Ok(())),
            ("a second ring", SOL_XDP, rx, &size, Err(Errno::INVAL)),
            ("TX", SOL_XDP, RingKind::Tx.option(), &size, Ok(())),
        ];
        let socket = Linux.socket(SOCK_RAW, 0).unwrap();
        assert_eq!(set_raw(&*socket, rx, null(), 4), Err(Errno::FAULT));
        let before = socket.setsockopt(SOL_XDP, XDP_MAX_TX_SKB_BUDGET, &budget(32));
        for (name, level, option, value, expected) in set {
            assert_eq!(socket.setsockopt(level, option, value), expected, "{name}");
        }
        // The option is of 6.17.
        if before != Err(Errno::NOPROTOOPT) {
            assert_eq!(before, Err(Errno::ACCESS), "without a TX ring");
            for (value, expected) in [
                (&budget(31)[..], Err(Errno::ACCESS)),
                (&budget(65), Err(Errno::ACCESS)),
                (&budget(32), Ok(())),
                (&budget(64), Ok(())),
                (&[64, 0], Err(Errno::INVAL)),
                (&[64, 0, 0, 0, 0, 0, 0, 0], Err(Errno::INVAL)),
            ] {
                let result = socket.setsockopt(SOL_XDP, XDP_MAX_TX_SKB_BUDGET, value);
                assert_eq!(result, expected, "budget {value:?}");
            }
        }

        let get = [
            (SOL_XDP, XDP_STATISTICS, 23, Err(Errno::INVAL)),
            (SOL_XDP, XDP_STATISTICS, 24, Ok(24)),
            (SOL_XDP, XDP_STATISTICS, 47, Ok(24)),
            (SOL_XDP, XDP_STATISTICS, 200, Ok(48)),
            (SOL_XDP, XDP_MMAP_OFFSETS, 95, Err(Errno::INVAL)),
            (SOL_XDP, XDP_MMAP_OFFSETS, 127, Ok(96)),
            (SOL_XDP, XDP_MMAP_OFFSETS, 200, Ok(128)),
            (SOL_XDP, XDP_OPTIONS, 3, Err(Errno::INVAL)),
            (SOL_XDP, XDP_OPTIONS, 200, Ok(4)),
            (SOL_XDP, rx, 200, Err(Errno::OPNOTSUPP)),
            (SOL_XDP, XDP_MAX_TX_SKB_BUDGET, 200, Err(Errno::OPNOTSUPP)),
            (SOL_XDP, XDP_UMEM_REG, 200, Err(Errno::OPNOTSUPP)),
            (SOL_XDP, 99, 200, Err(Errno::OPNOTSUPP)),
            (SOL_XDP + 1, XDP_OPTIONS, 200, Err(Errno::NOPROTOOPT)),
        ];
        for (level, option, len, expected) in get {
            let mut value = vec![0; len];
            assert_eq!(
                socket.getsockopt(level, option, &mut value),
                expected,
                "option {option} of {len} bytes"
            );
        }
    });
}

#[test]
fn ring_mappings_row_by_row() {
    in_namespace(|| {
        make_veth("left", "right", 1);
        let (socket, _memory) = ready_socket();
        let all = offsets(&*socket);
        let page = Linux.limits().page_size;
        for (kind, at) in [
            (RingKind::Rx, all.rx),
            (RingKind::Tx, all.tx),
            (RingKind::Fill, all.fr),
            (RingKind::Completion, all.cr),
        ] {
            let len = at.desc as usize + RING as usize * kind.entry_size();
            let map = |len| socket.map(kind.page_offset(), len).map(drop);
            assert_eq!(map(len), Ok(()), "{kind}");
            assert_eq!(map(len.next_multiple_of(page)), Ok(()), "{kind}, all of its pages");
            assert_eq!(map(len.next_multiple_of(page) + 1), Err(Errno::INVAL), "{kind}, a page more");
        }
        for offset in [page as u64, 1 << 30, 5 << 31, 1 << 40] {
            assert_eq!(socket.map(offset, page).unwrap_err(), Errno::INVAL, "{offset:#x}");
        }
        let empty = Linux.socket(SOCK_RAW, 0).unwrap();
        for kind in [RingKind::Rx, RingKind::Tx, RingKind::Fill, RingKind::Completion] {
            assert_eq!(empty.map(kind.page_offset(), page).unwrap_err(), Errno::INVAL, "{kind} is absent");
        }

        // The interface goes: nothing is mapped or bound any more.
        let left = Linux.index_of("left").unwrap();
        socket.bind(&address(left, 0)).unwrap();
        let index = [0, left, 0, 0].map(u32::to_ne_bytes).concat();
        const RTM_DELLINK: u16 = 17;
        change_link(RTM_DELLINK, 0, &index);
        assert_eq!(socket.map(RingKind::Rx.page_offset(), page).unwrap_err(), Errno::BUSY);
        assert_eq!(socket.bind(&address(1, 0)), Err(Errno::BUSY));
        assert_eq!((socket.send(), socket.receive()), (Err(Errno::NXIO), Err(Errno::NXIO)));
        assert_eq!(socket.poll(POLLIN | POLLOUT, Some(Duration::ZERO)), Ok(0));
        // What was bound to it lends its UMEM to nobody.
        let sharer = Linux.socket(SOCK_RAW, 0).unwrap();
        set_ring(&*sharer, RingKind::Tx, RING).unwrap();
        let flags = BindFlags::SHARED_UMEM.bits();
        let shared_umem_fd = socket.as_fd().as_raw_fd() as u32;
        assert_eq!(sharer.bind(&SockaddrXdp { flags, shared_umem_fd, ..address(1, 0) }), Err(Errno::BADF));
    });
}

#[test]
fn binds_row_by_row() {
    in_namespace(|| {
        make_veth("left", "right", 2);
        let (left, right) = (Linux.index_of("left").unwrap(), Linux.index_of("right").unwrap());
        let good = address(left, 0);
        let make = |umem: Option<&Mapping>, rings: &[RingKind]| {
            let socket = Linux.socket(SOCK_RAW, 0).unwrap();
            if let Some(memory) = umem {
                socket.register_umem(&registration(memory), size_of::<UmemReg>(), memory).unwrap();
            }
            for &ring in rings {
                set_ring(&*socket, ring, RING).unwrap();
            }
            socket
        };
        let memory = memory((CHUNK * CHUNKS) as usize);
        use RingKind::{Completion, Fill, Rx, Tx};
        let own: [(&str, Option<&Mapping>, &[RingKind]); 5] = [
            ("neither RX nor TX", Some(&memory), &[Fill, Completion]),
            ("no UMEM", None, &[Rx, Tx, Fill, Completion]),
            ("no FILL", Some(&memory), &[Rx, Tx, Completion]),
            ("no COMPLETION", Some(&memory), &[Rx, Tx, Fill]),
            ("no FILL, though it only sends", Some(&memory), &[Tx, Completion]),
        ];
        for (name, umem, rings) in own {
            assert_eq!(make(umem, rings).bind(&good), Err(Errno::INVAL), "{name}");
        }

        let (socket, _memory) = ready_socket();
        // SAFETY: the address has at least as many bytes as are told.
        let short = unsafe { libc::bind(socket.as_fd().as_raw_fd(), (&raw const good).cast(), 15) };
        assert_eq!((short, last_errno()), (-1, Errno::INVAL));
        let elsewhere = Linux.socket(SOCK_RAW, 0).unwrap();
        elsewhere.setsockopt(libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"right").unwrap();
        set_ring(&*elsewhere, Rx, RING).unwrap();
        assert_eq!(elsewhere.bind(&good), Err(Errno::INVAL), "tied to another interface");
        assert_eq!(elsewhere.bind(&address(9999, 0)), Err(Errno::INVAL), "and that is found first");
        for (queue, expected) in [(2, Err(Errno::INVAL)), (65535, Err(Errno::INVAL)), (65536, Ok(()))] {
            assert_eq!(socket.bind(&SockaddrXdp { queue_id: queue, ..good }), expected, "queue {queue}");
        }

        // Sharing.
        let lender = socket.as_fd().as_raw_fd() as u32;
        let shared = SockaddrXdp { flags: BindFlags::SHARED_UMEM.bits(), shared_umem_fd: lender, ..good };
        let other_queue = SockaddrXdp { queue_id: 1, ..shared };
        let other_device = SockaddrXdp { ifindex: right, ..shared };
        for flag in [BindFlags::COPY, BindFlags::ZEROCOPY, BindFlags::USE_NEED_WAKEUP, BindFlags::USE_SG] {
            let both = SockaddrXdp { flags: (BindFlags::SHARED_UMEM | flag).bits(), ..shared };
            assert_eq!(make(None, &[Tx]).bind(&both), Err(Errno::INVAL), "{flag:?}");
        }
        let unbound = make(Some(&memory), &[Tx, Fill, Completion]);
        let unbound = SockaddrXdp { shared_umem_fd: unbound.as_fd().as_raw_fd() as u32, ..shared };
        // SAFETY: the call takes no pointers; the descriptor is new and owned here alone.
        let udp = unsafe { OwnedFd::from_raw_fd(libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0)) };
        let other_family = SockaddrXdp { shared_umem_fd: udp.as_raw_fd() as u32, ..shared };
        // SAFETY: as above.
        let file = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"xsk_test".as_ptr(), 0)) };
        let no_socket = SockaddrXdp { shared_umem_fd: file.as_raw_fd() as u32, ..shared };
        let sharing = [
            ("a UMEM of its own", Some(&memory), &[Tx][..], shared, Err(Errno::INVAL)),
            (
                "not a descriptor",
                None,
                &[Tx],
                SockaddrXdp { shared_umem_fd: !0, ..shared },
                Err(Errno::NOTSOCK),
            ),
            ("not a socket", None, &[Tx], no_socket, Err(Errno::NOTSOCK)),
            ("another family", None, &[Tx], other_family, Err(Errno::NOPROTOOPT)),
            ("a lender that is not bound", None, &[Tx], unbound, Err(Errno::BADF)),
            ("the same queue, with FILL", None, &[Tx, Fill], shared, Err(Errno::INVAL)),
            ("the same queue, with COMPLETION", None, &[Tx, Completion], shared, Err(Errno::INVAL)),
            ("another queue, without FILL", None, &[Tx, Completion], other_queue, Err(Errno::INVAL)),
            ("another queue, without COMPLETION", None, &[Rx, Fill], other_queue, Err(Errno::INVAL)),
            ("another device, without both", None, &[Rx], other_device, Err(Errno::INVAL)),
            ("the same queue", None, &[Rx, Tx], shared, Ok(())),
            ("another queue", None, &[Rx, Tx, Fill, Completion], other_queue, Ok(())),
            ("another device", None, &[Rx, Tx, Fill, Completion], other_device, Ok(())),
        ];
        for (name, umem, rings, address, expected) in sharing {
            assert_eq!(make(umem, rings).bind(&address), expected, "{name}");
        }
        assert_eq!(make(Some(&memory), &[Rx, Fill, Completion]).bind(&address(1, 0)), Ok(()), "the loopback");
    });
}

#[test]
fn sends_and_receives_row_by_row() {
    in_namespace(|| {
        make_veth("left", "right", 2);
        let left = Linux.index_of("left").unwrap();
        // SAFETY: no bytes are sent.
        let blocking_send =
            |socket: &dyn RawSocket| match unsafe { libc::send(socket.as_fd().as_raw_fd(), null(), 0, 0) } {
                0 => Ok(()),
                _ => Err(last_errno()),
            };
        let (unbound, _memory) = ready_socket();
        let make = |queue, ring| {
            let socket = Linux.socket(SOCK_RAW, 0).unwrap();
            let memory = memory((CHUNK * CHUNKS) as usize);
            socket.register_umem(&registration(&memory), size_of::<UmemReg>(), &memory).unwrap();
            for ring in [ring, RingKind::Fill, RingKind::Completion] {
                set_ring(&*socket, ring, RING).unwrap();
            }
            socket.bind(&address(left, queue)).unwrap();
            (socket, memory)
        };
        let (sender, _frames) = make(0, RingKind::Tx);
        let (receiver, _more) = make(1, RingKind::Rx);
        let answers = |socket: &dyn RawSocket| [socket.send(), socket.receive(), blocking_send(socket)];
        let (ok, nobufs, blocking) = (Ok(()), Err(Errno::NOBUFS), Err(Errno::OPNOTSUPP));
        assert_eq!(answers(&*unbound), [Err(Errno::NXIO); 3]);
        assert_eq!(answers(&*sender), [ok, nobufs, blocking]);
        assert_eq!(answers(&*receiver), [nobufs, ok, blocking]);
        const RTM_SETLINK: u16 = 19;
        change_link(RTM_SETLINK, 0, &[0, left, 0, IFF_UP].map(u32::to_ne_bytes).concat());
        for socket in [&sender, &receiver] {
            assert_eq!(answers(&**socket), [Err(Errno::NETDOWN); 3]);
            assert_eq!(socket.poll(POLLIN | POLLOUT, Some(Duration::ZERO)), Ok(0));
        }
    });
}

#[test]
fn xskmap_updates_row_by_row() {
    in_namespace(|| {
        let map = map_of(MAP_TYPE_XSKMAP, 4);
        let (socket, _memory) = ready_socket();
        let own = socket.as_fd().as_raw_fd();
        // SAFETY: the call takes no pointers; the descriptor is new and owned here alone.
        let udp = unsafe { OwnedFd::from_raw_fd(libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0)) };
        let (any, noexist, exist) = (0, 1, 2);
        let rows = [
            ("an unknown flag", 0, own, 3, Err(Errno::INVAL)),
            ("another family", 0, udp.as_raw_fd(), any, Err(Errno::OPNOTSUPP)),
            ("the last slot but none", 1, own, exist, Err(Errno::NOENT)),
            ("a slot too far", 2, own, noexist, Err(Errno::TOOBIG)),
            ("an unbound socket", 0, own, noexist, Ok(())),
            ("the same socket again", 0, own, noexist, Ok(())),
            ("the same socket in another slot", 1, own, noexist, Ok(())),
        ];
        for (name, key, fd, flags, expected) in rows {
            let key = u32::to_ne_bytes(key);
            assert_eq!(Linux.update_map(map.as_fd(), &key, &fd.to_ne_bytes(), flags), expected, "{name}");
        }
        for (key, expected) in [(0u32, Ok(())), (0, Ok(())), (1, Ok(())), (2, Err(Errno::INVAL))] {
            assert_eq!(Linux.delete_from_map(map.as_fd(), &key.to_ne_bytes()), expected, "delete {key}");
        }
    });
}

#[test]
fn attachments_row_by_row() {
    in_namespace(|| {
        const UPDATE_IF_NOEXIST: u32 = 1 << 0;
        const HAS_FRAGS: u32 = 1 << 5;
        const RTM_SETLINK: u16 = 19;
        make_veth("left", "right", 1);
        let [left, right] = ["left", "right"].map(|name| Linux.index_of(name).unwrap());
        let plain = verdict(asm::XDP_PASS);
        let instructions = [asm::alu_imm(asm::Alu::Mov, Reg::R0, asm::XDP_PASS), asm::exit()];
        let spec = ProgramSpec { instructions: &instructions, flags: HAS_FRAGS, name: "xsk_test" };
        let frags = Linux.load_program(&spec, &mut String::new()).unwrap();
        let attach = |program: &Handle, index, flags| Linux.attach(program.as_fd(), index, flags).map(drop);
        let set_mtu = |index: u32, mtu: u32| {
            let header = [0, index, 0, 0].map(u32::to_ne_bytes).concat();
            change_link(RTM_SETLINK, 0, &[header, attribute(4, &mtu.to_ne_bytes())].concat());
        };
        assert_eq!(attach(&plain, 1, XDP_FLAGS_DRV_MODE), Err(Errno::OPNOTSUPP), "the loopback");
        assert_eq!(attach(&plain, 1, XDP_FLAGS_SKB_MODE), Ok(()));
        assert_eq!(attach(&plain, left, UPDATE_IF_NOEXIST), Err(Errno::INVAL));
        assert_eq!(attach(&plain, 0, XDP_FLAGS_SKB_MODE), Err(Errno::INVAL));
        // It is the other end's MTU that counts.
        set_mtu(left, 9000);
        assert_eq!(attach(&plain, left, XDP_FLAGS_DRV_MODE), Ok(()));
        assert_eq!(attach(&plain, right, XDP_FLAGS_DRV_MODE), Err(Errno::RANGE));
        assert_eq!(attach(&plain, right, XDP_FLAGS_SKB_MODE), Ok(()));
        assert_eq!(attach(&frags, right, XDP_FLAGS_DRV_MODE), Ok(()));
        set_mtu(left, 65535);
        assert_eq!(attach(&frags, right, XDP_FLAGS_DRV_MODE), Ok(()), "no MTU is too large");
        // What a page holds beside the packet: 256 bytes of headroom, its Ethernet header, 320 behind.
        #[cfg(target_arch = "x86_64")]
        for (mtu, expected) in [(3507, Err(Errno::RANGE)), (3506, Ok(()))] {
            set_mtu(left, mtu);
            assert_eq!(attach(&plain, right, XDP_FLAGS_DRV_MODE), expected, "MTU {mtu}");
        }
        give_up(
            rustix::thread::CapabilitySet::NET_ADMIN
                | rustix::thread::CapabilitySet::SYS_ADMIN
                | rustix::thread::CapabilitySet::BPF,
        );
        assert_eq!(attach(&plain, left, XDP_FLAGS_DRV_MODE), Ok(()), "who has a program may attach it");
        let spec =
            MapSpec { kind: MAP_TYPE_XSKMAP, key_size: 4, value_size: 4, max_entries: 2, flags: 0, name: "" };
        assert_eq!(Linux.create_map(&spec).unwrap_err(), Errno::PERM);
    });
}
