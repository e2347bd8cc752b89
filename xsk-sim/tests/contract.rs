//! The errors of each call, row by row, and which of two errors is told.

mod common;

use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use common::*;
use xsk::abi::*;
use xsk::kernel::{
    AttachedId, Channels, Errno, IFF_LOWER_UP, IFF_RUNNING, IFF_UP, Kernel, LINK_XDP, LinkInfo, MapSpec,
    Numbered, POLLERR, POLLIN, POLLOUT, RawSocket,
};
use xsk::xdp::asm::{self, Reg};
use xsk_sim::Sim;

const SOL_SOCKET: i32 = 1;
const SO_ERROR: i32 = 4;
const SO_BINDTODEVICE: i32 = 25;

const NONE: BindFlags = BindFlags::empty();

/// A ready socket with what `bind` needs: UMEM and all rings.
fn ready(kernel: &dyn Kernel) -> Box<dyn RawSocket> {
    Port::unbound(kernel, Config::default()).socket
}

#[test]
fn socket_checks_type_then_protocol() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    for (kind, protocol, wanted) in
        [(1, 0, Errno::SOCKTNOSUPPORT), (2, 1, Errno::SOCKTNOSUPPORT), (SOCK_RAW, 1, Errno::PROTONOSUPPORT)]
    {
        assert_eq!(kernel.socket(kind, protocol).err(), Some(wanted), "socket({kind}, {protocol})");
    }
    assert!(kernel.socket(SOCK_RAW, 0).is_ok());
    assert_eq!(kernel.name(), "sim");
}

#[test]
fn umem_registration_is_checked_as_on_linux() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let memory = pages(16 * 4096);
    let good = registration(&memory);
    let (ok, invalid) = (Ok(()), Err(Errno::INVAL));
    let refused = Err(Errno::OPNOTSUPP);
    let unaligned = UmemFlags::UNALIGNED_CHUNK.bits();
    let metadata = UmemFlags::TX_METADATA_LEN.bits();
    let rows = [
        ("as it should be", good, 32, ok),
        ("a longer structure", good, 40, ok),
        ("chunks of 2048", UmemReg { chunk_size: 2048, ..good }, 32, ok),
        ("part of the memory", UmemReg { len: 4096, ..good }, 32, ok),
        ("too short", good, 23, invalid),
        ("the older structure", good, 24, ok),
        ("the older structure has no flags", UmemReg { flags: 8, ..good }, 31, ok),
        ("chunks below 2048", UmemReg { chunk_size: 1024, ..good }, 32, invalid),
        ("chunks above a page", UmemReg { chunk_size: 8192, ..good }, 32, invalid),
        ("unknown flags", UmemReg { flags: 8, ..good }, 32, invalid),
        ("chunks of 3000", UmemReg { chunk_size: 3000, ..good }, 32, invalid),
        ("start off by one", UmemReg { addr: good.addr + 1, len: 4096, ..good }, 32, invalid),
        ("start off by half a page", UmemReg { addr: good.addr + 2048, len: 4096, ..good }, 32, invalid),
        ("end wraps", UmemReg { len: u64::MAX - 4095, ..good }, 32, invalid),
        ("too many pages", UmemReg { len: 1 << 46, ..good }, 32, invalid),
        ("empty", UmemReg { len: 0, ..good }, 32, invalid),
        ("less than a chunk", UmemReg { len: 4095, ..good }, 32, invalid),
        ("half a chunk at the end", UmemReg { len: 4096 + 2048, ..good }, 32, invalid),
        ("most headroom of 4096", UmemReg { headroom: 3392, ..good }, 32, ok),
        ("too much headroom of 4096", UmemReg { headroom: 3393, ..good }, 32, invalid),
        ("most headroom of 2048", UmemReg { chunk_size: 2048, headroom: 1344, ..good }, 32, ok),
        ("too much headroom of 2048", UmemReg { chunk_size: 2048, headroom: 1345, ..good }, 32, invalid),
        ("metadata without the flag", UmemReg { tx_metadata_len: 7, ..good }, 32, ok),
        ("metadata of 7", UmemReg { flags: metadata, tx_metadata_len: 7, ..good }, 32, invalid),
        ("metadata of 256", UmemReg { flags: metadata, tx_metadata_len: 256, ..good }, 32, invalid),
        ("memory of another", UmemReg { addr: good.addr + (16 << 12), ..good }, 32, Err(Errno::FAULT)),
        ("longer than the memory", UmemReg { len: good.len + 4096, ..good }, 32, Err(Errno::FAULT)),
        ("not simulated: metadata", UmemReg { flags: metadata, tx_metadata_len: 24, ..good }, 32, refused),
        ("not simulated: unaligned", UmemReg { flags: unaligned, chunk_size: 3000, ..good }, 32, refused),
    ];
    for (what, registration, optlen, wanted) in rows {
        let socket = socket(&*kernel);
        assert_eq!(socket.register_umem(&registration, optlen, &memory), wanted, "{what}");
    }
}

#[test]
fn a_umem_is_registered_once_and_before_bind() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let memory = pages(4096);
    let good = registration(&memory);
    let socket = socket(&*kernel);
    assert_eq!(socket.register_umem(&UmemReg { flags: 8, ..good }, 32, &memory), Err(Errno::INVAL));
    assert_eq!(socket.register_umem(&good, 32, &memory), Ok(()), "a failure leaves no trace");
    assert_eq!(socket.register_umem(&good, 32, &memory), Err(Errno::BUSY));
    let wrong = UmemReg { chunk_size: 1, ..good };
    assert_eq!(socket.register_umem(&wrong, 32, &memory), Err(Errno::BUSY), "busy comes before wrong");
    assert_eq!(socket.register_umem(&good, 8, &memory), Err(Errno::INVAL), "short comes before busy");
}

#[test]
fn ring_options_are_checked_as_on_linux() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    for option in [XDP_RX_RING, XDP_TX_RING, XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING] {
        let socket = socket(&*kernel);
        assert_eq!(socket.setsockopt(SOL_XDP, option, &[64, 0, 0]), Err(Errno::INVAL), "short");
        for entries in [0, 3, u32::MAX] {
            assert_eq!(set(&*socket, option, entries), Err(Errno::INVAL), "{entries} entries");
        }
        assert_eq!(set(&*socket, option, 1 << 31), Err(Errno::NOMEM));
        assert_eq!(socket.setsockopt(SOL_XDP, option, &[64, 0, 0, 0, 9]), Ok(()), "longer is tolerated");
        assert_eq!(set(&*socket, option, 64), Err(Errno::INVAL), "twice");
    }
    let port = Port::open(&*kernel, "sim0", Config::default());
    for option in [XDP_RX_RING, XDP_TX_RING, XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING] {
        assert_eq!(set(&*port.socket, option, 0), Err(Errno::BUSY), "bound comes before the value");
    }
    let good = registration(&port.memory);
    assert_eq!(port.socket.register_umem(&good, 32, &port.memory), Err(Errno::BUSY));
}

#[test]
fn only_tx_asks_to_be_woken() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let port = Port::open(&*kernel, "sim0", Config::default());
    assert_eq!(port.tx.memory().flags(), XDP_RING_NEED_WAKEUP);
    assert_eq!(port.fill.memory().flags(), 0);
}

#[test]
fn the_budget_is_between_32_and_the_size_of_tx() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let socket = socket(&*kernel);
    let budget = |value| set(&*socket, XDP_MAX_TX_SKB_BUDGET, value);
    assert_eq!(socket.setsockopt(SOL_XDP, XDP_MAX_TX_SKB_BUDGET, &[0; 8]), Err(Errno::INVAL));
    assert_eq!(budget(32), Err(Errno::ACCESS), "no TX");
    set(&*socket, XDP_TX_RING, 64).unwrap();
    assert_eq!([31, 32, 64, 65].map(budget), [Err(Errno::ACCESS), Ok(()), Ok(()), Err(Errno::ACCESS)]);
}

#[test]
fn other_options_are_not_known() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let socket = socket(&*kernel);
    for name in [XDP_STATISTICS, XDP_OPTIONS, XDP_MMAP_OFFSETS, 99] {
        assert_eq!(set(&*socket, name, 64), Err(Errno::NOPROTOOPT), "setting {name}");
    }
    assert_eq!(socket.setsockopt(SOL_XDP + 1, XDP_RX_RING, &[64, 0, 0, 0]), Err(Errno::NOPROTOOPT));
    assert_eq!(socket.getsockopt(SOL_XDP + 1, XDP_OPTIONS, &mut [0; 4]), Err(Errno::NOPROTOOPT));
    for name in [XDP_RX_RING, XDP_MAX_TX_SKB_BUDGET, 99] {
        assert_eq!(socket.getsockopt(SOL_XDP, name, &mut [0; 64]), Err(Errno::OPNOTSUPP), "getting {name}");
    }
}

#[test]
fn answers_have_the_form_that_fits_the_room() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let socket = socket(&*kernel);
    let rows = [
        (XDP_STATISTICS, 23, Err(Errno::INVAL)),
        (XDP_STATISTICS, 24, Ok(24)),
        (XDP_STATISTICS, 47, Ok(24)),
        (XDP_STATISTICS, 48, Ok(48)),
        (XDP_STATISTICS, 64, Ok(48)),
        (XDP_MMAP_OFFSETS, 95, Err(Errno::INVAL)),
        (XDP_MMAP_OFFSETS, 96, Ok(96)),
        (XDP_MMAP_OFFSETS, 127, Ok(96)),
        (XDP_MMAP_OFFSETS, 128, Ok(128)),
        (XDP_OPTIONS, 3, Err(Errno::INVAL)),
        (XDP_OPTIONS, 4, Ok(4)),
        (XDP_OPTIONS, 8, Ok(4)),
    ];
    for (name, room, wanted) in rows {
        assert_eq!(socket.getsockopt(SOL_XDP, name, &mut vec![0; room]), wanted, "{name} in {room} bytes");
    }
    let mut old = [0; 96];
    socket.getsockopt(SOL_XDP, XDP_MMAP_OFFSETS, &mut old).unwrap();
    let words: Vec<_> =
        old.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect();
    assert_eq!(words, [0, 128, 320].repeat(4));
}

#[test]
fn map_checks_ring_offset_and_length() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let socket = socket(&*kernel);
    for kind in [RingKind::Rx, RingKind::Tx, RingKind::Fill, RingKind::Completion] {
        let map = |length| socket.map(kind.page_offset(), length).map(|mapping| mapping.len());
        assert_eq!(map(4096), Err(Errno::INVAL), "no {kind} yet");
        set(&*socket, kind.option(), 512).unwrap();
        // 320 bytes of header: one page more than the entries alone.
        let whole = 512 * kind.entry_size() + 4096;
        let rows = [(1, Ok(1)), (whole, Ok(whole)), (whole + 1, Err(Errno::INVAL)), (0, Err(Errno::INVAL))];
        for (length, wanted) in rows {
            assert_eq!(map(length), wanted, "{length} bytes of {kind}");
        }
    }
    assert_eq!(socket.map(4096, 4096).err(), Some(Errno::INVAL), "unknown offset");
}

#[test]
fn fill_and_completion_are_the_same_before_and_after_bind() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let port = Port::open(&*kernel, "sim0", Config::default());
    for (kind, before) in [
        (RingKind::Fill, port.fill.memory().producer()),
        (RingKind::Completion, port.completion.memory().producer()),
    ] {
        let memory = map_ring::<u64>(&*port.socket, kind, 16);
        assert_eq!(memory.producer(), before);
        // SAFETY: nothing reads the ring in this test.
        unsafe { memory.set_producer(7) };
    }
    assert_eq!(port.fill.memory().producer(), 7);
    assert_eq!(port.completion.memory().producer(), 7);
}

#[test]
fn bind_checks_in_the_order_of_linux() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let good = address(1, 0, NONE);
    let bind = |socket: &dyn RawSocket, address| socket.bind(&address);

    let bare = socket(&*kernel);
    let unknown = BindFlags::from_bits_retain(0x20);
    assert_eq!(bind(&*bare, SockaddrXdp { family: 2, ..good }), Err(Errno::INVAL));
    assert_eq!(bind(&*bare, address(1, 0, unknown)), Err(Errno::INVAL));
    assert_eq!(bind(&*bare, address(9, 0, NONE)), Err(Errno::NODEV), "before the lack of rings");
    assert_eq!(bind(&*bare, good), Err(Errno::INVAL), "no RX and no TX");
    set(&*bare, XDP_RX_RING, 16).unwrap();
    assert_eq!(bind(&*bare, good), Err(Errno::INVAL), "no UMEM");
    let memory = pages(4096);
    bare.register_umem(&registration(&memory), 32, &memory).unwrap();
    assert_eq!(bind(&*bare, good), Err(Errno::INVAL), "no FILL");
    set(&*bare, XDP_UMEM_FILL_RING, 16).unwrap();
    assert_eq!(bind(&*bare, good), Err(Errno::INVAL), "no COMPLETION");
    set(&*bare, XDP_UMEM_COMPLETION_RING, 16).unwrap();

    let both = BindFlags::COPY | BindFlags::ZEROCOPY;
    assert_eq!(bind(&*bare, address(1, 0, both)), Err(Errno::INVAL));
    assert_eq!(bind(&*bare, address(1, 1, NONE)), Err(Errno::INVAL), "no such queue");
    assert_eq!(bind(&*bare, address(1, 0, BindFlags::ZEROCOPY)), Err(Errno::OPNOTSUPP));
    assert_eq!(bind(&*bare, address(1, 0, BindFlags::USE_SG)), Err(Errno::OPNOTSUPP), "not simulated");
    assert_eq!(bind(&*bare, address(1, 1, BindFlags::ZEROCOPY)), Err(Errno::INVAL), "the queue comes first");
    assert_eq!(
        bind(&*bare, address(1, 0, BindFlags::USE_NEED_WAKEUP)),
        Ok(()),
        "and no failure left a trace"
    );
    assert_eq!(bind(&*bare, good), Err(Errno::BUSY), "bound already");
    assert_eq!(bind(&*bare, address(9, 0, NONE)), Err(Errno::BUSY), "before the device");
    assert_eq!(bind(&*bare, address(9, 0, unknown)), Err(Errno::INVAL), "after the flags");

    let second = ready(&*kernel);
    assert_eq!(bind(&*second, good), Err(Errno::BUSY), "the queue is taken");
    assert_eq!(bind(&*second, address(1, 65536, NONE)), Err(Errno::BUSY), "65536 is queue 0");
    assert_eq!(bind(&*second, address(1, 0, both)), Err(Errno::INVAL), "before the queue");
    assert_eq!(bind(&*second, address(1, 0, BindFlags::ZEROCOPY)), Err(Errno::BUSY), "before the mode");
    assert_eq!(bind(&*second, address(2, 65536, NONE)), Ok(()));
}

#[test]
fn bind_to_device_holds_at_bind() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let socket = ready(&*kernel);
    assert_eq!(socket.setsockopt(SOL_SOCKET, SO_BINDTODEVICE, b"eth9\0"), Err(Errno::NODEV));
    assert_eq!(socket.setsockopt(SOL_SOCKET, SO_BINDTODEVICE, b"sim1\0"), Ok(()));
    assert_eq!(socket.bind(&address(1, 0, NONE)), Err(Errno::INVAL));
    assert_eq!(socket.bind(&address(9, 0, NONE)), Err(Errno::INVAL), "before the device");
    assert_eq!(socket.bind(&address(2, 0, NONE)), Ok(()));
    let other = ready(&*kernel);
    other.setsockopt(SOL_SOCKET, SO_BINDTODEVICE, b"sim1").unwrap();
    other.setsockopt(SOL_SOCKET, SO_BINDTODEVICE, b"").unwrap();
    assert_eq!(other.bind(&address(1, 0, NONE)), Ok(()), "taken back");
}

#[test]
fn shared_binds_are_checked_as_on_linux() {
    let sim = Sim::builder().queues(2).build().unwrap();
    let kernel = sim.kernel();
    let owner = Port::open(&*kernel, "sim0", Config::default());
    let unbound = ready(&*kernel);
    let map = xskmap(&*kernel, 1);
    let fd = |socket: &dyn RawSocket| socket.as_fd().as_raw_fd() as u32;
    let shared = |ifindex, queue, flags, fd| SockaddrXdp {
        shared_umem_fd: fd,
        ..address(ifindex, queue, BindFlags::SHARED_UMEM | flags)
    };
    let with_rings = |rings: &[i32]| {
        let socket = socket(&*kernel);
        rings.iter().for_each(|&ring| set(&*socket, ring, 16).unwrap());
        socket
    };
    let sharer = with_rings(&[XDP_RX_RING]);
    let full = with_rings(&[XDP_RX_RING, XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING]);
    let good = fd(&*owner.socket);
    let flags = [BindFlags::COPY, BindFlags::ZEROCOPY, BindFlags::USE_NEED_WAKEUP, BindFlags::USE_SG];
    for flag in flags {
        assert_eq!(sharer.bind(&shared(1, 0, flag, u32::MAX)), Err(Errno::INVAL), "{flag:?}");
    }
    assert_eq!(unbound.bind(&shared(1, 0, NONE, u32::MAX)), Err(Errno::INVAL), "has a UMEM");
    assert_eq!(sharer.bind(&shared(1, 0, NONE, u32::MAX)), Err(Errno::NOTSOCK));
    assert_eq!(sharer.bind(&shared(1, 0, NONE, (*map).as_fd().as_raw_fd() as u32)), Err(Errno::NOTSOCK));
    assert_eq!(sharer.bind(&shared(1, 0, NONE, fd(&*unbound))), Err(Errno::BADF));
    assert_eq!(full.bind(&shared(1, 0, NONE, good)), Err(Errno::INVAL), "rings of its own");
    assert_eq!(sharer.bind(&shared(2, 0, NONE, good)), Err(Errno::INVAL), "no rings for a new queue");
    assert_eq!(full.bind(&shared(1, 65536, NONE, good)), Err(Errno::BUSY), "another queue, but it is 0");
    assert_eq!(full.bind(&shared(2, 2, NONE, good)), Err(Errno::INVAL), "no such queue");
    for rings in [&[XDP_RX_RING, XDP_UMEM_FILL_RING][..], &[XDP_TX_RING, XDP_UMEM_COMPLETION_RING]] {
        let half = with_rings(rings);
        assert_eq!(half.bind(&shared(1, 0, NONE, good)), Err(Errno::INVAL), "a ring of its own");
        assert_eq!(half.bind(&shared(1, 1, NONE, good)), Err(Errno::INVAL), "one ring is missing");
    }
    let bare = with_rings(&[XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING]);
    assert_eq!(bare.bind(&shared(1, 1, NONE, u32::MAX)), Err(Errno::INVAL), "no RX and no TX");
    assert_eq!(bare.bind(&shared(9, 1, NONE, u32::MAX)), Err(Errno::NODEV), "before the rings");

    assert_eq!(sharer.bind(&shared(1, 0, NONE, good)), Ok(()), "the same queue");
    assert_eq!(sharer.bind(&shared(1, 0, NONE, u32::MAX)), Err(Errno::BUSY), "bound already");
    assert_eq!(full.bind(&shared(1, 65537, NONE, good)), Ok(()), "another queue: 1");
    assert_eq!(sharer.register_umem(&registration(&owner.memory), 32, &owner.memory), Err(Errno::BUSY));
    let own = ready(&*kernel);
    assert_eq!(own.bind(&address(1, 1, NONE)), Err(Errno::BUSY), "the queue of a sharer is taken");

    // The owner may close, and a sharer can lend what it borrowed.
    let lender = fd(&*full);
    drop(owner);
    let other = with_rings(&[XDP_TX_RING, XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING]);
    assert_eq!(other.bind(&shared(2, 0, NONE, lender)), Ok(()), "another device");
    let third = with_rings(&[XDP_TX_RING]);
    assert_eq!(third.bind(&shared(2, 0, NONE, fd(&*other))), Ok(()), "the same queue of a sharer");

    // A socket that lost its device lends nothing.
    sim.remove("sim1").unwrap();
    assert_eq!(full.bind(&shared(1, 0, NONE, fd(&*other))), Err(Errno::BUSY));
    let late = with_rings(&[XDP_RX_RING]);
    assert_eq!(late.bind(&shared(1, 0, NONE, fd(&*other))), Err(Errno::BADF));
}

#[test]
fn a_queue_is_free_when_the_last_of_its_sockets_is_closed() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let owner = Port::open(&*kernel, "sim0", Config::default());
    let held = std::sync::Arc::downgrade(owner.memory.owner());
    let sharer = socket(&*kernel);
    set(&*sharer, XDP_RX_RING, 16).unwrap();
    let shared = SockaddrXdp {
        shared_umem_fd: owner.socket.as_fd().as_raw_fd() as u32,
        ..address(1, 0, BindFlags::SHARED_UMEM)
    };
    sharer.bind(&shared).unwrap();
    drop(owner);
    assert!(!sim.step(), "one is left");
    let next = ready(&*kernel);
    assert_eq!(next.bind(&address(1, 0, NONE)), Err(Errno::BUSY));
    assert!(held.upgrade().is_some());
    drop(sharer);
    assert!(sim.step());
    assert!(!sim.step(), "it is released once");
    assert!(held.upgrade().is_none());
    assert_eq!(next.bind(&address(1, 0, NONE)), Ok(()));
}

#[test]
#[cfg_attr(miri, ignore = "needs a socket of the real kernel")]
fn sockets_of_another_family_are_told_from_what_is_no_socket() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let (foreign, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let sharer = socket(&*kernel);
    set(&*sharer, XDP_RX_RING, 16).unwrap();
    let fd = foreign.as_raw_fd();
    let address = SockaddrXdp { shared_umem_fd: fd as u32, ..address(1, 0, BindFlags::SHARED_UMEM) };
    assert_eq!(sharer.bind(&address), Err(Errno::NOPROTOOPT));
    let map = xskmap(&*kernel, 1);
    let update = |fd: i32| kernel.update_map((*map).as_fd(), &[0; 4], &fd.to_ne_bytes(), 0);
    assert_eq!(update(fd), Err(Errno::OPNOTSUPP));
    let file = std::fs::File::open("/dev/null").unwrap();
    assert_eq!(update(file.as_raw_fd()), Err(Errno::NOTSOCK));
}

#[test]
fn calls_check_bound_then_up_then_ring() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let calls = |socket: &dyn RawSocket| [socket.send(), socket.receive()];
    let unbound = ready(&*kernel);
    assert_eq!(calls(&*unbound), [Err(Errno::NXIO); 2]);
    assert_eq!(unbound.poll(POLLIN | POLLOUT, Some(Duration::from_secs(9))), Ok(0));
    assert_eq!(unbound.poll(POLLIN | POLLOUT, None), Ok(POLLERR), "an endless wait ends");

    let build = |ring, ifindex| {
        let socket = socket(&*kernel);
        let memory = pages(4096);
        socket.register_umem(&registration(&memory), 32, &memory).unwrap();
        for option in [ring, XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING] {
            set(&*socket, option, 16).unwrap();
        }
        socket.bind(&address(ifindex, 0, NONE)).unwrap();
        socket
    };
    let (rx, tx) = (build(XDP_RX_RING, 1), build(XDP_TX_RING, 2));
    assert_eq!(calls(&*rx), [Err(Errno::NOBUFS), Ok(())]);
    assert_eq!(calls(&*tx), [Ok(()), Err(Errno::NOBUFS)]);
    sim.set_up("sim0", false).unwrap();
    assert_eq!(calls(&*rx), [Err(Errno::NETDOWN); 2], "down comes before the ring");
    assert_eq!(calls(&*tx), [Ok(()), Err(Errno::NOBUFS)], "the other device is up");
    assert_eq!([rx.poll(POLLIN, Some(Duration::ZERO)), rx.poll(POLLIN, None)], [Ok(0), Ok(POLLERR)]);
}

#[test]
fn a_removed_device_unbinds_its_sockets() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let mut port = Port::open(&*kernel, "sim0", Config::default());
    let other = Port::open(&*kernel, "sim1", Config::default());
    let _steered = steer(&*kernel, "sim0", &*port.socket);
    port.queue(0, 60, 0);
    sim.remove("sim0").unwrap();

    assert_eq!(port.socket.poll(POLLIN | POLLOUT, Some(Duration::ZERO)), Ok(0));
    assert_eq!(port.socket.send(), Err(Errno::NXIO));
    assert_eq!(port.socket.receive(), Err(Errno::NXIO));
    assert_eq!(port.socket.map(XDP_PGOFF_RX_RING, 4096).err(), Some(Errno::BUSY));
    assert_eq!(port.socket.bind(&address(2, 0, NONE)), Err(Errno::BUSY));
    assert_eq!(port.statistics(), XdpStatistics::default());
    let error = |port: &Port| {
        let mut error = [0; 4];
        assert_eq!(port.socket.getsockopt(SOL_SOCKET, SO_ERROR, &mut error), Ok(4));
        i32::from_ne_bytes(error)
    };
    assert_eq!(error(&port), Errno::NETDOWN.raw_os_error());
    assert_eq!(error(&port), 0, "told once");
    assert_eq!(error(&other), 0);

    assert_eq!(kernel.index_of("sim0"), Err(Errno::NODEV));
    assert_eq!(kernel.interface(1).err(), Some(Errno::NODEV));
    assert_eq!(kernel.interfaces(), Ok(vec![2]));
    assert_eq!(sim.inject("sim0", &[0; 60]), Err(Errno::NODEV));
    assert_eq!(kernel.interface(2).unwrap().flags & (IFF_UP | IFF_RUNNING), IFF_UP, "no carrier");
    drop(port);
    assert!(sim.step());
    assert!(!sim.step(), "the pool is released once");
}

#[test]
fn a_wait_that_nothing_ends_names_the_deadlock() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let port = Port::open(&*kernel, "sim0", Config::default());
    assert_eq!(port.socket.poll(POLLIN, None), Err(Errno::DEADLK));
    assert_eq!(port.socket.poll(POLLIN, Some(Duration::from_secs(3600))), Ok(0));
    assert_eq!(port.socket.poll(POLLIN | POLLOUT, None), Ok(POLLOUT));
}

#[test]
fn a_queue_is_free_a_step_after_socket_and_mappings_are_gone() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let Port { socket: first, rx, .. } = Port::open(&*kernel, "sim0", Config::default());
    let second = ready(&*kernel);
    let bind = || second.bind(&address(1, 0, NONE));
    drop(first);
    assert!(!sim.step(), "a mapping keeps the socket");
    assert_eq!([bind(), bind()], [Err(Errno::BUSY); 2]);
    drop(rx);
    assert!(sim.step());
    assert!(!sim.step());
    assert_eq!(bind(), Ok(()));
}

#[test]
fn trying_again_to_bind_is_enough() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    drop(Port::open(&*kernel, "sim0", Config::default()));
    let second = ready(&*kernel);
    assert_eq!(second.bind(&address(1, 0, NONE)), Err(Errno::BUSY));
    assert_eq!(second.bind(&address(1, 0, NONE)), Ok(()));
}

#[test]
fn the_kernel_holds_umem_memory_until_the_queue_is_free() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let port = Port::open(&*kernel, "sim0", Config::default());
    let held = std::sync::Arc::downgrade(port.memory.owner());
    drop(port);
    assert!(held.upgrade().is_some());
    sim.run();
    assert!(held.upgrade().is_none());
}

#[test]
fn maps_are_checked_as_on_linux() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let good =
        MapSpec { kind: XSKMAP, key_size: 4, value_size: 4, max_entries: 4, flags: 0, name: "xsks_map" };
    let rows = [
        ("good", good, None),
        ("NUMA node", MapSpec { flags: 1 << 2, ..good }, None),
        ("huge", MapSpec { max_entries: u32::MAX, ..good }, None),
        ("another kind", MapSpec { kind: 99, ..good }, Some(Errno::INVAL)),
        ("key", MapSpec { key_size: 8, ..good }, Some(Errno::INVAL)),
        ("value", MapSpec { value_size: 8, ..good }, Some(Errno::INVAL)),
        ("empty", MapSpec { max_entries: 0, ..good }, Some(Errno::INVAL)),
        ("BPF_F_NO_PREALLOC", MapSpec { flags: 1, ..good }, Some(Errno::INVAL)),
        ("read-only and write-only", MapSpec { flags: 3 << 3, ..good }, Some(Errno::INVAL)),
        ("BPF_F_RDONLY_PROG", MapSpec { flags: 1 << 7, ..good }, Some(Errno::INVAL)),
        ("long name", MapSpec { name: "a_name_of_16_byt", ..good }, Some(Errno::INVAL)),
        ("odd name", MapSpec { name: "a-b", ..good }, Some(Errno::INVAL)),
    ];
    for (what, spec, wanted) in rows {
        assert_eq!(kernel.create_map(&spec).err(), wanted, "{what}");
    }

    let map = xskmap(&*kernel, 2);
    let (a, b) = (socket(&*kernel), socket(&*kernel));
    let (a, b) = (a.as_fd().as_raw_fd(), b.as_fd().as_raw_fd());
    let update = |key: u32, fd: i32, flags| {
        kernel.update_map((*map).as_fd(), &key.to_ne_bytes(), &fd.to_ne_bytes(), flags)
    };
    let of_map = (*map).as_fd().as_raw_fd();
    let rows = [
        ("flags before key", 2, -1, 3, Err(Errno::INVAL)),
        ("key before descriptor", 2, -1, 0, Err(Errno::TOOBIG)),
        ("no descriptor", 0, -1, 0, Err(Errno::BADF)),
        ("no descriptor before an empty slot", 0, -1, 2, Err(Errno::BADF)),
        ("BPF_F_LOCK", 0, a, 4, Err(Errno::INVAL)),
        ("no socket", 0, of_map, 0, Err(Errno::NOTSOCK)),
        ("EXIST on an empty slot", 0, a, 2, Err(Errno::NOENT)),
        ("NOEXIST on an empty slot", 0, a, 1, Ok(())),
        ("NOEXIST on another", 0, b, 1, Err(Errno::EXIST)),
        ("NOEXIST on itself", 0, a, 1, Ok(())),
        ("EXIST on another", 0, b, 2, Ok(())),
        ("ANY", 1, a, 0, Ok(())),
    ];
    for (what, key, fd, flags, wanted) in rows {
        assert_eq!(update(key, fd, flags), wanted, "{what}");
    }
    let delete = |key: u32| kernel.delete_from_map((*map).as_fd(), &key.to_ne_bytes());
    assert_eq!([delete(2), delete(0), delete(0)], [Err(Errno::INVAL), Ok(()), Ok(())]);
    assert_eq!(update(0, b, 2), Err(Errno::NOENT), "deleted");

    let lone = socket(&*kernel);
    assert_eq!(kernel.delete_from_map(lone.as_fd(), &[0; 4]), Err(Errno::INVAL), "not a map");
    let read_only = kernel.create_map(&MapSpec { flags: 1 << 3, ..good }).unwrap();
    let denied = kernel.update_map((*read_only).as_fd(), &[0; 4], &a.to_ne_bytes(), 0);
    assert_eq!(denied, Err(Errno::PERM));
    assert_eq!(kernel.delete_from_map((*read_only).as_fd(), &[0; 4]), Err(Errno::PERM));
}

#[test]
fn a_closed_socket_leaves_its_maps_with_its_last_mapping() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let map = xskmap(&*kernel, 1);
    let first = socket(&*kernel);
    set(&*first, XDP_RX_RING, 16).unwrap();
    let mapping = first.map(XDP_PGOFF_RX_RING, 4096).unwrap();
    enter(&*kernel, &map, 0, &*first).unwrap();
    let second = socket(&*kernel);
    let fd = second.as_fd().as_raw_fd().to_ne_bytes();
    let enter_second = || kernel.update_map((*map).as_fd(), &[0; 4], &fd, 1);
    drop(first);
    assert_eq!(enter_second(), Err(Errno::EXIST));
    drop(mapping);
    assert_eq!(enter_second(), Ok(()));
}

#[test]
fn attaching_is_checked_as_on_linux() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let program =
        load(&*kernel, &[asm::alu_imm(asm::Alu::Mov, Reg::R0, asm::XDP_PASS), asm::exit()]).unwrap();
    let attach = |ifindex, flags| kernel.attach((*program).as_fd(), ifindex, flags);
    let map = xskmap(&*kernel, 1);
    assert_eq!(kernel.attach((*map).as_fd(), 1, 0).err(), Some(Errno::INVAL), "not a program");
    let (skb, drv, hardware) = (1 << 1, 1 << 2, 1 << 3);
    for (what, ifindex, flags, wanted) in [
        ("no device", 9, 0, Errno::INVAL),
        ("two modes", 1, skb | drv, Errno::INVAL),
        ("UPDATE_IF_NOEXIST", 1, 1, Errno::INVAL),
        ("REPLACE", 1, 1 << 4, Errno::INVAL),
        ("offload", 1, hardware, Errno::INVAL),
    ] {
        assert_eq!(attach(ifindex, flags).err(), Some(wanted), "{what}");
    }
    let attached = || kernel.interface(1).unwrap().attached;
    for (first, mode, same, other) in [(0, 1, drv, skb), (skb, 2, skb, 0)] {
        let link = attach(1, first).unwrap();
        let [AttachedId { mode: found, id }] = attached()[..] else { panic!("one program") };
        assert_eq!(found, mode);
        let program = kernel.open_by_id(Numbered::Program, id).unwrap();
        assert_eq!(kernel.program_info((*program).as_fd()).unwrap().name, "test");
        assert_eq!(attach(1, same).err(), Some(Errno::BUSY));
        assert_eq!(attach(1, other).err(), Some(Errno::EXIST));
        assert!(attach(2, other).is_ok(), "another device");
        drop(link);
        assert_eq!(attached(), [], "the link is closed");
    }
    assert_eq!(kernel.open_by_id(Numbered::Program, 0).err(), Some(Errno::NOENT));
}

#[test]
fn a_program_lives_as_long_as_its_link() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let program =
        load(&*kernel, &[asm::alu_imm(asm::Alu::Mov, Reg::R0, asm::XDP_DROP), asm::exit()]).unwrap();
    let link = kernel.attach((*program).as_fd(), 1, 0).unwrap();
    drop(program);
    let id = kernel.interface(1).unwrap().attached[0].id;
    assert!(kernel.open_by_id(Numbered::Program, id).is_ok());
    drop(link);
    assert_eq!(kernel.open_by_id(Numbered::Program, id).err(), Some(Errno::NOENT));
}

#[test]
fn objects_are_found_and_opened_by_their_numbers() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let over_a_map = || {
        let map = xskmap(&*kernel, 3);
        (load(&*kernel, &redirect(&map, asm::XDP_PASS)).unwrap(), map)
    };
    let (program, map) = over_a_map();
    let link = kernel.attach((*program).as_fd(), 2, 0).unwrap();

    let its_map = kernel.map_info((*map).as_fd()).unwrap();
    assert_eq!((its_map.kind, its_map.max_entries, &its_map.name[..]), (XSKMAP, 3, "xsks"));
    let its_program = kernel.program_info((*program).as_fd()).unwrap();
    assert_eq!((&its_program.name[..], &its_program.maps[..]), ("test", &[its_map.id][..]));
    let its_link = kernel.link_info((*link).as_fd()).unwrap();
    let info = LinkInfo { id: its_link.id, kind: LINK_XDP, program: its_program.id, ifindex: 2 };
    assert_eq!(its_link, info);
    assert_eq!(kernel.program_info((*map).as_fd()).err(), Some(Errno::INVAL));
    assert_eq!(kernel.link_info((*program).as_fd()).err(), Some(Errno::INVAL));

    let (twin, _its_map) = over_a_map();
    assert_eq!(kernel.program_info((*twin).as_fd()).unwrap().tag, its_program.tag);
    let other = load(&*kernel, &redirect(&map, asm::XDP_DROP)).unwrap();
    assert_ne!(kernel.program_info((*other).as_fd()).unwrap().tag, its_program.tag);

    let holders = || kernel.program_holders(its_program.id).into_iter().map(|h| h.link).collect::<Vec<_>>();
    assert_eq!(holders(), [None, Some(its_link.id)]);

    assert_eq!((kernel.next_link(0), kernel.next_link(its_link.id)), (Ok(its_link.id), Err(Errno::NOENT)));
    let again = kernel.open_by_id(Numbered::Link, its_link.id).unwrap();
    drop((link, program));
    assert_eq!(
        (kernel.interface(2).unwrap().attached[0].id, holders()),
        (its_program.id, vec![Some(its_link.id)])
    );
    assert_eq!(kernel.link_info((*again).as_fd()), Ok(info));
    let its_program_again = kernel.open_by_id(Numbered::Program, its_program.id).unwrap();
    assert_eq!(kernel.program_info((*its_program_again).as_fd()), Ok(its_program));
    let its_map_again = kernel.open_by_id(Numbered::Map, its_map.id).unwrap();
    assert_eq!(kernel.map_info((*its_map_again).as_fd()), Ok(its_map));

    sim.remove("sim1").unwrap();
    assert_eq!(kernel.link_info((*again).as_fd()), Ok(LinkInfo { ifindex: 0, ..info }));
    drop(again);
    assert_eq!(kernel.open_by_id(Numbered::Link, its_link.id).err(), Some(Errno::NOENT));
    assert_eq!(kernel.next_link(0), Err(Errno::NOENT));
}

#[test]
fn devices_tell_what_they_are() {
    let sim = Sim::builder().names("left", "right").mtu(3000).build().unwrap();
    let kernel = sim.kernel();
    assert_eq!(kernel.interfaces(), Ok(vec![1, 2]));
    let left = kernel.interface(kernel.index_of("left").unwrap()).unwrap();
    assert_eq!((left.name.as_str(), left.mtu, left.rx_queues, left.tx_queues), ("left", 3000, 1, 1));
    assert_eq!(left.flags, IFF_UP | IFF_RUNNING | IFF_LOWER_UP);
    assert!(!left.features.unwrap().xdp.contains(XdpFeatures::XSK_ZEROCOPY));
    assert_ne!(left.mac, kernel.interface(2).unwrap().mac);

    let sim4 = Sim::builder().pair("sim2", "sim3").queues(4).build().unwrap();
    let kernel4 = sim4.kernel();
    assert_eq!(kernel4.interfaces(), Ok(vec![1, 2, 3, 4]));
    for (index, name) in (1..).zip(["sim0", "sim1", "sim2", "sim3"]) {
        let info = kernel4.interface(index).unwrap();
        assert_eq!((info.name.as_str(), info.rx_queues, info.tx_queues), (name, 4, 4));
        assert_eq!(info.channels, Some(Channels { rx: 0, tx: 0, combined: 4 }));
    }
    sim4.set_up("sim3", false).unwrap();
    let running = |index| kernel4.interface(index).unwrap().flags & IFF_RUNNING != 0;
    assert_eq!([1, 2, 3, 4].map(running), [true, true, false, false], "each pair has its wire");
    sim.set_up("right", false).unwrap();
    assert_eq!(kernel.interface(1).unwrap().flags, IFF_UP);
    assert_eq!(kernel.interface(2).unwrap().flags, 0);
    for wrong in [
        Sim::builder().queues(0),
        Sim::builder().queues(129),
        Sim::builder().pair("sim2", "sim2"),
        Sim::builder().pair("sim1", "sim2"),
        Sim::builder().mtu(67),
        Sim::builder().mtu(3503),
        Sim::builder().names("", "b"),
        Sim::builder().names("a", "a"),
        Sim::builder().names("a", "b/c"),
        Sim::builder().names("a_name_of_16_byt", "b"),
    ] {
        assert_eq!(wrong.build().err(), Some(Errno::INVAL));
    }
}

#[test]
fn what_has_no_file_system_cannot_be_pinned() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let map = xskmap(&*kernel, 1);
    assert_eq!(kernel.pin((*map).as_fd(), "/sys/fs/bpf/m".as_ref()), Err(Errno::OPNOTSUPP));
}
