//! What the library makes of every answer that a kernel can give, also those that no kernel gives
//! here: a simulated kernel whose answer to one call is replaced.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use xsk::abi::{RingKind, SOL_XDP, SockaddrXdp, UmemReg, XDP_MAX_TX_SKB_BUDGET};
use xsk::kernel::{
    Devices, Errno, Handle, Holder, InterfaceInfo, Kernel, Limits, LinkInfo, MapInfo, MapSpec, Mapping,
    Numbered, PollEntry, ProgramHolder, ProgramInfo, ProgramSpec, Programs, RawSocket, Sockets, Watch,
    XDP_FLAGS_DRV_MODE,
};
use xsk::umem::PageSize;
use xsk::xdp::{AttachMode, DefaultProgram, Program, Steering, XskMap};
use xsk::{Cause, Device, Error, Interest, Mode, Socket, Umem};

/// The calls that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Socket,
    Register,
    Ring(RingKind),
    Budget,
    Map,
    Bind,
    Send,
    CreateMap,
    Update,
    Delete,
    Load,
    AttachNative,
    AttachAny,
    OpenById,
    OpenPinned,
    IndexOf,
    Interface,
}

/// What is different from the simulated kernel.
#[derive(Clone, Debug)]
struct Faults {
    call: Call,
    errno: Errno,
    /// What the verifier says with a refused program.
    log: &'static str,
    limits: fn(&mut Limits),
    interface: fn(&mut InterfaceInfo),
}

impl Faults {
    fn at(&self, call: Call) -> Result<(), Errno> {
        if self.call == call { Err(self.errno) } else { Ok(()) }
    }
}

#[derive(Debug)]
struct Faulty {
    inner: Arc<dyn Kernel>,
    faults: Faults,
}

#[derive(Debug)]
struct FaultySocket {
    inner: Box<dyn RawSocket>,
    faults: Faults,
}

impl AsFd for FaultySocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

// SAFETY: every call that is answered at all is answered by the simulated kernel.
unsafe impl RawSocket for FaultySocket {
    fn register_umem(&self, registration: &UmemReg, optlen: usize, memory: &Mapping) -> Result<(), Errno> {
        self.faults.at(Call::Register)?;
        self.inner.register_umem(registration, optlen, memory)
    }

    fn setsockopt(&self, level: i32, name: i32, value: &[u8]) -> Result<(), Errno> {
        for ring in [RingKind::Rx, RingKind::Tx, RingKind::Fill, RingKind::Completion] {
            if (level, name) == (SOL_XDP, ring.option()) {
                self.faults.at(Call::Ring(ring))?;
            }
        }
        if (level, name) == (SOL_XDP, XDP_MAX_TX_SKB_BUDGET) {
            self.faults.at(Call::Budget)?;
        }
        self.inner.setsockopt(level, name, value)
    }

    fn getsockopt(&self, level: i32, name: i32, value: &mut [u8]) -> Result<usize, Errno> {
        self.inner.getsockopt(level, name, value)
    }

    fn map(&self, page_offset: u64, length: usize) -> Result<Mapping, Errno> {
        self.faults.at(Call::Map)?;
        self.inner.map(page_offset, length)
    }

    fn bind(&self, address: &SockaddrXdp) -> Result<(), Errno> {
        self.faults.at(Call::Bind)?;
        self.inner.bind(address)
    }

    fn send(&self) -> Result<(), Errno> {
        self.faults.at(Call::Send)?;
        self.inner.send()
    }

    fn is_bound(&self) -> bool {
        self.inner.is_bound()
    }

    fn receive(&self) -> Result<(), Errno> {
        self.inner.receive()
    }

    fn poll(&self, events: i16, timeout: Option<Duration>) -> Result<i16, Errno> {
        self.inner.poll(events, timeout)
    }
}

// SAFETY: the sockets are those of the simulated kernel.
unsafe impl Sockets for Faulty {
    fn socket(&self, kind: i32, protocol: i32) -> Result<Box<dyn RawSocket>, Errno> {
        self.faults.at(Call::Socket)?;
        let inner = self.inner.socket(kind, protocol)?;
        Ok(Box::new(FaultySocket { inner, faults: self.faults.clone() }))
    }

    fn limits(&self) -> Limits {
        let mut limits = self.inner.limits();
        (self.faults.limits)(&mut limits);
        limits
    }

    fn poll(&self, entries: &mut [PollEntry<'_>], timeout: Option<Duration>) -> Result<usize, Errno> {
        self.inner.poll(entries, timeout)
    }

    fn holders(&self) -> Vec<Holder> {
        vec![Holder { pid: std::process::id(), name: "this".into() }, Holder { pid: 1, name: "init".into() }]
    }
}

impl Programs for Faulty {
    fn create_map(&self, spec: &MapSpec<'_>) -> Result<Handle, Errno> {
        self.faults.at(Call::CreateMap)?;
        self.inner.create_map(spec)
    }

    fn update_map(&self, map: BorrowedFd<'_>, key: &[u8], value: &[u8], flags: u64) -> Result<(), Errno> {
        self.faults.at(Call::Update)?;
        self.inner.update_map(map, key, value, flags)
    }

    fn delete_from_map(&self, map: BorrowedFd<'_>, key: &[u8]) -> Result<(), Errno> {
        self.faults.at(Call::Delete)?;
        self.inner.delete_from_map(map, key)
    }

    fn load_program(&self, spec: &ProgramSpec<'_>, log: &mut String) -> Result<Handle, Errno> {
        self.faults.at(Call::Load).inspect_err(|_| *log = self.faults.log.into())?;
        self.inner.load_program(spec, log)
    }

    fn attach(&self, program: BorrowedFd<'_>, ifindex: u32, flags: u32) -> Result<Handle, Errno> {
        self.faults.at(Call::AttachAny)?;
        if flags & XDP_FLAGS_DRV_MODE != 0 {
            self.faults.at(Call::AttachNative)?;
        }
        self.inner.attach(program, ifindex, flags)
    }

    fn pin(&self, object: BorrowedFd<'_>, path: &Path) -> Result<(), Errno> {
        self.inner.pin(object, path)
    }

    fn open_pinned(&self, path: &Path) -> Result<Handle, Errno> {
        self.faults.at(Call::OpenPinned)?;
        self.inner.open_pinned(path)
    }

    fn open_by_id(&self, kind: Numbered, id: u32) -> Result<Handle, Errno> {
        self.faults.at(Call::OpenById)?;
        self.inner.open_by_id(kind, id)
    }

    fn next_link(&self, after: u32) -> Result<u32, Errno> {
        self.inner.next_link(after)
    }

    fn program_info(&self, program: BorrowedFd<'_>) -> Result<ProgramInfo, Errno> {
        self.inner.program_info(program)
    }

    fn map_info(&self, map: BorrowedFd<'_>) -> Result<MapInfo, Errno> {
        self.inner.map_info(map)
    }

    fn link_info(&self, link: BorrowedFd<'_>) -> Result<LinkInfo, Errno> {
        self.inner.link_info(link)
    }

    fn program_holders(&self, id: u32) -> Vec<ProgramHolder> {
        self.inner.program_holders(id)
    }
}

impl Devices for Faulty {
    fn index_of(&self, name: &str) -> Result<u32, Errno> {
        self.faults.at(Call::IndexOf)?;
        self.inner.index_of(name)
    }

    fn interface(&self, index: u32) -> Result<InterfaceInfo, Errno> {
        self.faults.at(Call::Interface)?;
        let mut info = self.inner.interface(index)?;
        info.driver = Some("mlx5_core".into());
        (self.faults.interface)(&mut info);
        Ok(info)
    }

    fn interfaces(&self) -> Result<Vec<u32>, Errno> {
        self.inner.interfaces()
    }

    fn watch(&self, index: u32) -> Result<Box<dyn Watch>, Errno> {
        self.inner.watch(index)
    }
}

impl Kernel for Faulty {
    fn name(&self) -> &'static str {
        "faulty"
    }
}

/// A kernel that answers so to one call.
fn kernel(call: Call, errno: Errno) -> Faulty {
    let faults = Faults { call, errno, log: "", limits: |_| (), interface: |_| () };
    Faulty { inner: xsk_sim::Sim::new().kernel(), faults }
}

fn device(kernel: Faulty) -> Device {
    Device::open_on(Arc::new(kernel), "sim0").unwrap()
}

/// The cause, and that the whole explanation has no gaps.
#[track_caller]
fn assert_cause(error: &Error, errno: Errno, cause: &Cause) {
    assert_eq!(error.cause(), cause);
    assert_eq!(error.errno(), Some(errno));
    let whole = format!("{error:#}");
    assert!(whole.starts_with(&error.to_string()), "{whole}");
    for part in ["\n   why: ", "\n    do: ", "\nkernel: "] {
        assert!(whole.contains(part), "{whole}");
    }
    assert!(!error.remedy().is_empty() && !error.remedy().contains("INTERFACE"), "{whole}");
    assert!(!whole.contains("  why:  ") && !whole.contains(" 0 bytes of"), "{whole}");
}

const OLD: fn(&mut InterfaceInfo) = |info| info.features = None;
const DRIVER: fn() -> Option<String> = || Some("mlx5_core".into());

#[test]
fn opening_a_socket() {
    use Call::{Bind, Map, Register, Ring, Socket as Make};
    let umem_bytes = 64 * 2048;
    let memory = |bytes| Cause::OutOfMemory { bytes };
    let ring = |kind| Ring(kind);
    let no_raw: fn(&mut Limits) = |limits| limits.net_raw = false;
    let small_pages: fn(&mut Limits) = |limits| limits.page_size = 1024;
    let locked: fn(&mut Limits) = |limits| limits.memlock = Some(4096);
    let keep: fn(&mut Limits) = |_| ();
    let same: fn(&mut InterfaceInfo) = |_| ();
    let jumbo: fn(&mut InterfaceInfo) = |info| info.mtu = 9000;
    let queues: fn(&mut InterfaceInfo) = |info| (info.rx_queues, info.tx_queues) = (0, 0);
    let busy = Cause::QueueBusy { holders: Vec::new(), waited: Duration::ZERO };
    let cap = |capability| Cause::MissingCapability { capability };
    let old = |feature, since| Cause::KernelTooOld { feature, since };
    let (any, zc) = (Mode::Any, Mode::ZeroCopy);
    let rows = [
        (Make, Errno::PERM, any, no_raw, same, cap("CAP_NET_RAW")),
        (Make, Errno::PERM, any, keep, same, Cause::Forbidden),
        (Make, Errno::ACCESS, any, keep, same, Cause::Forbidden),
        (Make, Errno::AFNOSUPPORT, any, keep, same, Cause::NoAfXdp),
        (Make, Errno::MFILE, any, keep, same, Cause::TooManyFiles),
        (Make, Errno::NFILE, any, keep, same, Cause::TooManyFiles),
        (Make, Errno::IO, any, keep, same, Cause::Unexpected(Errno::IO)),
        (Register, Errno::NOBUFS, any, locked, same, Cause::LockedMemory { bytes: umem_bytes, limit: 4096 }),
        (Register, Errno::NOMEM, any, keep, same, memory(umem_bytes)),
        (Register, Errno::FAULT, any, keep, same, Cause::MemoryRefused),
        (
            Register,
            Errno::INVAL,
            any,
            small_pages,
            same,
            Cause::ChunkSize { chunk: 2048, min: 2048, max: 1024 },
        ),
        (Register, Errno::INVAL, any, keep, same, Cause::Unexpected(Errno::INVAL)),
        (ring(RingKind::Rx), Errno::NOMEM, any, keep, same, memory(64 * 16)),
        (ring(RingKind::Fill), Errno::NOMEM, any, keep, same, memory(64 * 8)),
        (Map, Errno::AGAIN, any, keep, same, memory(64 * 8)),
        (Map, Errno::BUSY, any, keep, same, Cause::InterfaceGone),
        (Bind, Errno::NODEV, any, keep, same, Cause::InterfaceGone),
        (Bind, Errno::BUSY, any, keep, same, busy),
        (Bind, Errno::NETDOWN, any, keep, same, Cause::InterfaceDown),
        (Bind, Errno::NOMEM, any, keep, same, memory(umem_bytes)),
        (Bind, Errno::INVAL, any, keep, queues, Cause::NoSuchQueue { queue: 0, queues: 0 }),
        (Bind, Errno::OPNOTSUPP, zc, keep, same, Cause::ZeroCopyUnsupported { driver: DRIVER() }),
        (Bind, Errno::OPNOTSUPP, any, keep, same, Cause::Unexpected(Errno::OPNOTSUPP)),
        (Bind, Errno::INVAL, zc, keep, jumbo, Cause::ZeroCopyMtu { mtu: 9000, room: 1792 }),
        (Bind, Errno::INVAL, zc, keep, same, Cause::ZeroCopyRefused { driver: DRIVER() }),
        (Bind, Errno::IO, zc, keep, same, Cause::ZeroCopyRefused { driver: DRIVER() }),
        (Bind, Errno::INVAL, any, keep, OLD, old("need_wakeup", "5.4")),
        (Bind, Errno::INVAL, any, keep, same, Cause::Unexpected(Errno::INVAL)),
    ];
    for (call, errno, mode, limits, interface, cause) in rows {
        let mut kernel = kernel(call, errno);
        (kernel.faults.limits, kernel.faults.interface) = (limits, interface);
        let device = device(kernel);
        let (umem, mut pool) = Umem::builder().frames(64).chunk_size(2048).build().unwrap();
        let builder = || Socket::builder(&device).ring_size(64).mode(mode).release_timeout(Duration::ZERO);
        let error = builder().open(&umem).unwrap_err();
        if let Cause::QueueBusy { holders, .. } = error.cause() {
            assert_eq!(holders.len(), 2);
            let remedy = error.remedy();
            assert!(
                remedy.contains("drop the socket") && remedy.contains("or end init (process 1)"),
                "{remedy}"
            );
        } else {
            assert_cause(&error, errno, &cause);
        }
        // Nothing has left the pool, nor does it by the other ways to open a socket.
        builder().open_rx(&umem).unwrap_err();
        if call != ring(RingKind::Rx) {
            builder().fill_from(&mut pool, 32).open_tx(&umem).unwrap_err();
        }
        let census = umem.census();
        assert_eq!((census.pools, census.contradiction()), (64, None), "{call:?} {errno}: {census:?}");
    }
}

#[test]
fn using_a_socket() {
    let open = |call, errno| {
        let (umem, _pool) = Umem::builder().frames(64).build().unwrap();
        Socket::builder(&device(kernel(call, errno))).ring_size(64).open(&umem).unwrap()
    };
    for (errno, cause) in [
        (Errno::NETDOWN, Cause::InterfaceDown),
        (Errno::NXIO, Cause::InterfaceGone),
        (Errno::IO, Cause::Unexpected(Errno::IO)),
    ] {
        assert_cause(&open(Call::Send, errno).socket.send().unwrap_err(), errno, &cause);
    }
    for (errno, cause) in [
        (Errno::NOPROTOOPT, Cause::KernelTooOld { feature: "the TX budget option", since: "6.17" }),
        (Errno::ACCESS, Cause::TxBudget { packets: 100, min: 32, max: 64 }),
    ] {
        assert_cause(&open(Call::Budget, errno).socket.set_tx_budget(100).unwrap_err(), errno, &cause);
    }
}

#[test]
fn a_socket_that_only_receives_is_told_that_it_cannot_send() {
    let (umem, _pool) = Umem::builder().frames(64).build().unwrap();
    let device = device(kernel(Call::AttachAny, Errno::IO));
    let xsk = Socket::builder(&device).ring_size(64).open_rx(&umem).unwrap();
    assert_cause(&xsk.socket.send().unwrap_err(), Errno::NOBUFS, &Cause::NoTxRing);
    assert_eq!(*xsk.socket.wait(Interest::Tx, None).unwrap_err().cause(), Cause::NoTxRing);
}

#[test]
fn what_cannot_be_asked_about_an_interface_does_not_make_it_gone() {
    let (umem, _pool) = Umem::builder().frames(64).build().unwrap();
    let device = device(kernel(Call::Interface, Errno::MFILE));
    let error = Socket::builder(&device).queue(4711).ring_size(64).open(&umem).unwrap_err();
    assert_cause(&error, Errno::INVAL, &Cause::Unexpected(Errno::INVAL));
}

#[test]
fn maps_and_programs() {
    use Call::{CreateMap, Load};
    let keep: fn(&mut Limits) = |_| ();
    let no_bpf: fn(&mut Limits) = |limits| (limits.bpf, limits.net_admin) = (false, false);
    let no_admin: fn(&mut Limits) = |limits| limits.net_admin = false;
    let cap = |capability| Cause::MissingCapability { capability };
    let too_old = Cause::KernelTooOld { feature: "the map of AF_XDP sockets (XSKMAP)", since: "4.18" };
    let log = "R0 !read_ok";
    let rows = [
        (CreateMap, Errno::PERM, no_bpf, "", cap("CAP_BPF")),
        (CreateMap, Errno::PERM, no_admin, "", cap("CAP_NET_ADMIN")),
        (CreateMap, Errno::PERM, keep, "", Cause::Forbidden),
        (CreateMap, Errno::NOMEM, keep, "", Cause::OutOfMemory { bytes: 128 * 8 }),
        (CreateMap, Errno::INVAL, keep, "", too_old),
        (CreateMap, Errno::MFILE, keep, "", Cause::TooManyFiles),
        (Load, Errno::PERM, no_bpf, "", cap("CAP_BPF")),
        (Load, Errno::PERM, no_admin, "", cap("CAP_NET_ADMIN")),
        (Load, Errno::PERM, keep, "", Cause::Forbidden),
        (Load, Errno::PERM, keep, log, Cause::Verifier { log: log.into() }),
        (Load, Errno::ACCESS, keep, log, Cause::Verifier { log: log.into() }),
        (Load, Errno::INVAL, keep, log, Cause::Verifier { log: log.into() }),
        (Load, Errno::INVAL, keep, "", Cause::Unexpected(Errno::INVAL)),
    ];
    for (call, errno, limits, log, cause) in rows {
        let mut kernel = kernel(call, errno);
        (kernel.faults.limits, kernel.faults.log) = (limits, log);
        let device = device(kernel);
        let error = DefaultProgram::attach(&device, AttachMode::Best).unwrap_err();
        assert_cause(&error, errno, &cause);
        assert!(format!("{error:#}").ends_with(log), "{error:#}");
        assert!(device.info().unwrap().programs().is_empty());
    }

    for (call, errno, cause) in [
        (Call::Update, Errno::NOBUFS, Cause::NeedsRxRing),
        (Call::Update, Errno::TOOBIG, Cause::NoSuchSlot { index: 0, entries: 1 }),
        (Call::Update, Errno::EXIST, Cause::SlotTaken { index: 0 }),
        (Call::Update, Errno::PERM, Cause::Forbidden),
        (Call::Delete, Errno::INVAL, Cause::NoSuchSlot { index: 0, entries: 1 }),
        (Call::Delete, Errno::PERM, Cause::Forbidden),
    ] {
        let device = device(kernel(call, errno));
        let (umem, _pool) = Umem::builder().frames(64).build().unwrap();
        let xsk = Socket::builder(&device).open_tx(&umem).unwrap();
        let map = XskMap::with_slots(&device, 1).unwrap();
        let result = if call == Call::Update { map.insert(0, &xsk.socket) } else { map.remove(0) };
        assert_cause(&result.unwrap_err(), errno, &cause);
    }
}

#[test]
fn attaching() {
    use Call::{AttachAny, AttachNative};
    let same: fn(&mut InterfaceInfo) = |_| ();
    let jumbo: fn(&mut InterfaceInfo) = |info| info.mtu = 9000;
    let few: fn(&mut InterfaceInfo) = |info| info.rx_queues = 3;
    // Native mode fails for a reason that generic mode has not.
    let rows = [
        (Errno::OPNOTSUPP, same, Cause::NativeUnsupported { driver: DRIVER() }),
        (Errno::NOTCONN, same, Cause::PeerGone),
        (Errno::RANGE, jumbo, Cause::MtuTooLarge { mtu: 9000 }),
        (Errno::INVAL, jumbo, Cause::MtuTooLarge { mtu: 9000 }),
        (Errno::NOSPC, few, Cause::TooFewQueues { rx_queues: 3 }),
        (Errno::INVAL, same, Cause::NativeRefused { driver: DRIVER() }),
    ];
    for (errno, interface, cause) in rows {
        let mut kernel = kernel(AttachNative, errno);
        kernel.faults.interface = interface;
        let device = device(kernel);
        let program = Program::redirect(&XskMap::with_slots(&device, 1).unwrap()).unwrap();
        assert_cause(&program.attach(&device, AttachMode::Native).unwrap_err(), errno, &cause);
        assert!(device.info().unwrap().programs().is_empty());
        let attachment = program.attach(&device, AttachMode::Best).unwrap();
        assert_eq!(attachment.mode(), AttachMode::Generic);
        assert_cause(attachment.fallback().expect("it fell back"), errno, &cause);
    }
    // Neither mode would do.
    let rows = [
        (Errno::PERM, same, Cause::Forbidden),
        (Errno::NOMEM, same, Cause::OutOfMemory { bytes: 0 }),
        (Errno::INVAL, OLD, Cause::KernelTooOld { feature: "BPF links for XDP", since: "5.9" }),
        (Errno::MFILE, same, Cause::TooManyFiles),
    ];
    for (errno, interface, cause) in rows {
        let mut kernel = kernel(AttachAny, errno);
        kernel.faults.interface = interface;
        let device = device(kernel);
        for mode in [AttachMode::Native, AttachMode::Generic, AttachMode::Best] {
            let error = DefaultProgram::attach(&device, mode).unwrap_err();
            assert_cause(&error, errno, &cause);
            assert!(device.info().unwrap().programs().is_empty());
        }
    }
    // A program that is said to be there, and is not: one that comes and goes is waited for.
    let device = device(kernel(AttachAny, Errno::BUSY));
    let error = DefaultProgram::attach(&device, AttachMode::Best).unwrap_err();
    assert_cause(&error, Errno::BUSY, &Cause::Unexpected(Errno::BUSY));
}

#[test]
fn joining() {
    type IsCause = fn(&Cause) -> bool;
    let rows: [(Errno, IsCause); 4] = [
        // What is there can't be looked at.
        (Errno::PERM, |cause| matches!(cause, Cause::SharingNeedsCapability { .. })),
        (Errno::IO, |cause| *cause == Cause::Unexpected(Errno::IO)),
        (Errno::MFILE, |cause| *cause == Cause::TooManyFiles),
        // It is never gone, although it can't be found: whoever waits for that gives up.
        (Errno::NOENT, |cause| matches!(cause, Cause::ProgramPresent { name: None, .. })),
    ];
    for (errno, is_cause) in rows {
        let device = device(kernel(Call::OpenById, errno));
        let first = DefaultProgram::attach(&device, AttachMode::Best).unwrap();
        let error = DefaultProgram::attach(&device, AttachMode::Best).unwrap_err();
        assert!(is_cause(error.cause()), "{errno}: {error}");
        assert_eq!(error.errno(), Some(Errno::BUSY), "the answer that led there");
        drop(first);
        assert!(device.info().unwrap().programs().is_empty());
    }
    // There is no BPF file system at `/`, so it is not the rights that lack.
    for (errno, cause) in [
        (Errno::NOENT, Cause::NothingKept),
        (Errno::NOTDIR, Cause::NothingKept),
        (Errno::ACCESS, Cause::NothingKept),
        (Errno::OPNOTSUPP, Cause::NothingKept),
        (Errno::MFILE, Cause::TooManyFiles),
        (Errno::IO, Cause::Unexpected(Errno::IO)),
    ] {
        let device = device(kernel(Call::OpenPinned, errno));
        let error = DefaultProgram::join_kept(&device, &Steering::all(), Path::new("/")).unwrap_err();
        assert_cause(&error, errno, &cause);
    }
}

#[test]
fn finding_an_interface() {
    let missing = Cause::NoSuchInterface { name: "sim0".into() };
    for (errno, cause) in [
        (Errno::NODEV, missing),
        (Errno::PERM, Cause::Forbidden),
        (Errno::MFILE, Cause::TooManyFiles),
        (Errno::IO, Cause::Unexpected(Errno::IO)),
    ] {
        let error = Device::open_on(Arc::new(kernel(Call::IndexOf, errno)), "sim0").unwrap_err();
        assert_cause(&error, errno, &cause);
    }
}

#[test]
fn huge_pages_that_nobody_has() {
    let gib = PageSize::Huge1G;
    // Boot-time pages: a machine that has any of them is none of a test's.
    let Err(error) = Umem::builder().frames(64).require_pages(gib).build() else { return };
    assert_eq!(*error.cause(), Cause::NoHugePages { pages: gib, needed: 1 });
    assert!(error.to_string().contains("1 GiB"), "{error}");
    assert!(error.remedy().contains("hugepagesz=1G hugepages=1"), "{}", error.remedy());
}

#[test]
fn fill_is_filled_from_the_pool_of_its_own_umem_only() {
    let sim = xsk_sim::Sim::new();
    let device = sim.device("sim0").unwrap();
    let (umem, mut pool) = Umem::builder().frames(16).build().unwrap();
    let (other, mut theirs) = Umem::builder().frames(16).build().unwrap();
    let error = Socket::builder(&device).fill_from(&mut theirs, 8).open(&umem).unwrap_err();
    assert_eq!(error.cause(), &Cause::ForeignPool);
    assert_eq!((theirs.len(), other.census().program, umem.census().retired), (16, 0, 0));
    let mut xsk = Socket::builder(&device).fill_from(&mut pool, 8).open(&umem).unwrap();
    assert_eq!((xsk.fill.refill(&mut theirs, 8), theirs.len()), (0, 16));
    assert_eq!((xsk.fill.refill(&mut pool, 4), pool.len(), umem.census().fill), (4, 4, 12));
}

#[test]
fn a_wait_for_a_ring_that_is_not_there_is_refused() {
    let sim = xsk_sim::Sim::new();
    let (umem, _pool) = Umem::builder().frames(16).build().unwrap();
    let sender = Socket::builder(&sim.device("sim0").unwrap()).open_tx(&umem).unwrap();
    let error = sender.socket.wait(xsk::Interest::Rx, None).unwrap_err();
    assert_eq!(error.cause(), &Cause::NoRxRing);
}
