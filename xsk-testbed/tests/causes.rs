//! What goes wrong on a real kernel, and what the library says of it: the cause with its values, the
//! kernel's answer, the remedy; and that everything is then as it was before.
#![cfg(target_os = "linux")]

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use xsk::abi::RingKind;
use xsk::error::Doing;
use xsk::kernel::linux::Linux;
use xsk::kernel::{
    Devices as _, Errno, Handle, ProgramSpec, Programs as _, XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE,
};
use xsk::socket::{MAX_RING_ENTRIES, RxTx, SocketBuilder};
use xsk::umem::{PageSize, Pair};
use xsk::xdp::{AttachMode, DefaultProgram, Owner, Program, Steering, XskMap, asm};
use xsk::{Cause, Device, Error, Interest, Mode, Pool, Sent, Socket, Umem};
use xsk_testbed::{PacketSocket, Testbed, UdpFrame, bed};

const PATIENCE: Duration = Duration::from_secs(10);

/// Takes an error apart: its line names every one of `named`, and the whole explanation has that
/// line, a reason, the remedy with `remedy` in it, and the kernel's answer where it gave one.
#[track_caller]
fn explained(error: &Error, errno: Option<Errno>, named: &[&str], remedy: &str) {
    assert_eq!(error.errno(), errno, "{error}");
    let line = error.to_string();
    assert!(!line.contains('\n'), "{line}");
    for value in named {
        assert!(line.contains(value), "{value:?} is not in: {line}");
    }
    let whole = format!("{error:#}");
    assert!(whole.starts_with(&line), "{whole}");
    assert!(whole.contains("\n   why: ") && !error.cause().why().is_empty(), "{whole}");
    assert!(whole.contains(&format!("\n    do: {}", error.remedy())), "{whole}");
    assert!(error.remedy().contains(remedy), "{remedy:?} is not in: {}", error.remedy());
    assert_eq!(whole.contains("\nkernel: "), errno.is_some(), "{whole}");
    assert_eq!(format!("{error:?}"), whole, "`main` prints the whole explanation");
}

/// Polls a condition until it holds.
#[track_caller]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn device(bed: &Testbed) -> Device {
    Device::open(&bed.a().name).unwrap()
}

fn small() -> (Umem, Pool) {
    Umem::builder().frames(64).chunk_size(2048).build().unwrap()
}

/// A builder that asks a busy queue once only.
fn at_once(device: &Device) -> SocketBuilder<'static> {
    Socket::builder(device).ring_size(64).release_timeout(Duration::ZERO)
}

/// Every frame is in the pool, as if nothing had been tried.
#[track_caller]
fn untouched(umem: &Umem, pool: &Pool) {
    let census = umem.census();
    assert_eq!(census.contradiction(), None);
    assert_eq!((census.pools, pool.len()), (umem.frames(), umem.frames() as usize), "{census:?}");
}

/// Runs `f` on a thread without these capabilities.
fn without<R: Send>(dropped: CapabilitySet, f: impl FnOnce() -> R + Send) -> R {
    let run = || {
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(dropped);
        set_capabilities(None, sets).unwrap();
        f()
    };
    thread::scope(|scope| scope.spawn(run).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

/// One test of this file in another process, in the same network namespace, as [`other_process`].
fn spawn(role: &str, prepare: impl FnMut() -> std::io::Result<()> + Send + Sync + 'static) -> Other {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "other_process", "--nocapture", "--test-threads=1"]);
    command.env(ROLE, role).stdin(Stdio::piped()).stdout(Stdio::piped());
    // SAFETY: what the tests prepare is system calls, which allocate nothing and take no locks.
    let mut child = unsafe { command.pre_exec(prepare) }.spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap());
    Other { child, lines }
}

/// A process that ends with its test.
struct Other {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Other {
    /// Waits for a line that it prints.
    #[track_caller]
    fn says(&mut self, word: &str) {
        let mut said = String::new();
        while !said.lines().any(|line| line.ends_with(word)) {
            assert_ne!(self.lines.read_line(&mut said).unwrap(), 0, "it ended without {word:?}: {said}");
        }
    }

    /// Waits for its end, which must be a success.
    #[track_caller]
    fn succeeds(mut self) {
        drop(self.child.stdin.take());
        let said = std::io::read_to_string(&mut self.lines).unwrap();
        assert!(self.child.wait().unwrap().success(), "{said}");
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the other process is to do; absent in an ordinary run.
const ROLE: &str = "XSK_CAUSES_ROLE";

/// Not a test of its own: the part of another process in the tests below.
#[test]
fn other_process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let until_stdin_ends = || std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).unwrap();
    match &role[..] {
        "idle" => {
            println!("ready");
            until_stdin_ends();
        }
        "receive" => {
            let device = Device::open("xsk0").unwrap();
            let (umem, mut pool) = small();
            let mut xsk = Socket::builder(&device).ring_size(64).open(&umem).unwrap();
            xsk.fill.refill(&mut pool, 64);
            let program = DefaultProgram::attach(&device, AttachMode::Native).unwrap();
            program.insert(&xsk.socket).unwrap();
            println!("ready");
            let mut received = 0;
            loop {
                xsk.socket.wait(Interest::Rx, None).unwrap();
                received += xsk.fill.extend(xsk.rx.take(64), |packet| packet.into_frame());
                if received > 10 {
                    println!("busy");
                    std::io::stdout().flush().unwrap();
                    received = 0;
                }
            }
        }
        "user namespace" => {
            let lo = Device::open("lo").unwrap();
            let (umem, _pool) = small();
            at_once(&lo).open(&umem).unwrap();
            let error = XskMap::new(&lo).unwrap_err();
            assert_eq!(*error.cause(), Cause::MissingCapability { capability: "CAP_BPF" });
            explained(&error, Some(Errno::PERM), &["CAP_BPF"], "outside of any user namespace");
        }
        "foreign namespace" => {
            let device = Device::open("xsk0").unwrap();
            let (umem, pool) = small();
            let error = at_once(&device).open(&umem).unwrap_err();
            assert_eq!((error.doing(), error.cause()), (&Doing::MakeSocket, &Cause::Forbidden));
            explained(&error, Some(Errno::PERM), &["although"], "user namespace");
            untouched(&umem, &pool);
        }
        "no files" => {
            let device = Device::open("xsk0").unwrap();
            let (umem, pool) = small();
            let before = getrlimit(Resource::Nofile);
            setrlimit(Resource::Nofile, Rlimit { current: Some(0), ..before }).unwrap();
            let socket = at_once(&device).open(&umem).unwrap_err();
            let map = XskMap::with_slots(&device, 1).unwrap_err();
            setrlimit(Resource::Nofile, before).unwrap();
            for error in [&socket, &map] {
                assert_eq!(*error.cause(), Cause::TooManyFiles);
                explained(error, Some(Errno::MFILE), &["too many files"], "ulimit -n");
            }
            untouched(&umem, &pool);
            at_once(&device).open(&umem).unwrap();
        }
        "foreign" => {
            let program = foreign_program();
            let index = Linux.index_of("xsk0").unwrap();
            let _link = Linux.attach(program.as_fd(), index, XDP_FLAGS_DRV_MODE).unwrap();
            println!("ready");
            until_stdin_ends();
        }
        "end" => std::process::exit(3),
        role if role.starts_with("probe ") => {
            let pid = role["probe ".len()..].parse().unwrap();
            let device = Device::open("xsk0").unwrap();
            let (umem, mut pool) = small();
            // With a ring mapped of its own, of the socket that is not bound.
            let error = at_once(&device).fill_from(&mut pool, 32).open_tx(&umem).unwrap_err();
            let Cause::QueueBusy { holders, .. } = error.cause() else { panic!("{error}") };
            assert!(holders.iter().all(|holder| holder.pid != std::process::id()), "{holders:?}");
            let holder = holders.iter().find(|holder| holder.pid == pid).expect("it is named");
            assert!(holder.name.starts_with("causes"), "{holders:?}");
            let named = format!("(process {pid})");
            explained(&error, Some(Errno::BUSY), &["xsk0 queue 0", &named], &holder.to_string());
            assert!(error.remedy().starts_with("end "), "{}", error.remedy());
            untouched(&umem, &pool);
        }
        role => panic!("no role is called {role}"),
    }
}

// --- UMEM

#[test]
fn a_umem_that_no_kernel_takes_is_refused_before_it_is_made() {
    let page = rustix::param::page_size() as u32;
    let range = |chunk| Cause::ChunkSize { chunk, min: 2048, max: page };
    let headroom = |headroom, max, chunk| Cause::Headroom { headroom, max, chunk };
    let cases = [
        (0, 2048, 0, Cause::NoFrames, "0 frames", "at least one"),
        (64, 0, 0, range(0), "0 bytes", "2048 or 4096"),
        (64, 1024, 0, range(1024), "1024", "2048 or 4096"),
        (64, 2 * page, 0, range(2 * page), "8192", "2048 or 4096"),
        (64, u32::MAX, 0, range(u32::MAX), "4294967295", "2048 or 4096"),
        (64, 3000, 0, Cause::ChunkNotPowerOfTwo { chunk: 3000 }, "3000", "2048 or 4096"),
        (64, 2048, 1792, headroom(1792, 1344, 2048), "1792", "at most 1344"),
        (64, 4096, u32::MAX, headroom(u32::MAX, 3392, 4096), "4294967295", "at most 3392"),
    ];
    for (frames, chunk, headroom, cause, named, remedy) in cases {
        let error = Umem::builder().frames(frames).chunk_size(chunk).headroom(headroom).build().unwrap_err();
        assert_eq!(*error.cause(), cause);
        assert_eq!(*error.doing(), Doing::MakeUmem { frames, chunk_size: chunk });
        explained(&error, None, &[named], remedy);
    }
}

#[test]
fn more_memory_than_there_is_is_refused_before_it_is_asked_for() {
    let info = rustix::system::sysinfo();
    let installed = info.totalram as u64 * u64::from(info.mem_unit);
    let error = Umem::builder().frames(u32::MAX).chunk_size(4096).build().unwrap_err();
    let bytes = u64::from(u32::MAX) * 4096;
    assert_eq!(*error.cause(), Cause::UmemTooLarge { bytes, limit: installed });
    explained(&error, None, &["17592186040320", &installed.to_string()], "fewer frames");

    // It could be mapped, but never pinned while anything else runs.
    let frames = (installed / 4096) as u32;
    let error = Umem::builder().frames(frames).chunk_size(4096).build().unwrap_err();
    let bytes = u64::from(frames) * 4096;
    assert_eq!(*error.cause(), Cause::OutOfMemory { bytes });
    explained(&error, None, &[&bytes.to_string()], "fewer frames");
}

#[test]
fn huge_pages_are_required_or_preferred() {
    let table = std::fs::read_to_string("/proc/meminfo").unwrap();
    let free = table.lines().find_map(|line| line.strip_prefix("HugePages_Free:"));
    let Some(free) = free.map(|count| count.trim().parse::<u64>().unwrap()) else {
        return println!("skipped: needs a kernel with huge pages");
    };
    let builder = Umem::builder().frames(((free + 1) * 512) as u32).chunk_size(4096);
    let error = builder.clone().require_pages(PageSize::Huge2M).build().unwrap_err();
    assert_eq!(*error.cause(), Cause::NoHugePages { pages: PageSize::Huge2M, needed: free + 1 });
    explained(&error, Some(Errno::NOMEM), &["2 MiB", &(free + 1).to_string()], "vm.nr_hugepages");

    let (umem, pool) = builder.pages(PageSize::Huge2M).build().unwrap();
    assert_eq!((umem.pages_asked(), umem.pages()), (PageSize::Huge2M, PageSize::Ordinary));
    untouched(&umem, &pool);
}

#[test]
fn the_most_headroom_is_the_kernels_and_one_byte_more_is_told_when_it_is_registered() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    for (chunk, max) in [(2048, 1344), (4096, 3392)] {
        let with = |headroom| Umem::builder().frames(64).chunk_size(chunk).headroom(headroom).build();
        let (umem, pool) = with(max + 1).unwrap();
        let error = at_once(&device).open(&umem).unwrap_err();
        assert_eq!(*error.cause(), Cause::Headroom { headroom: max + 1, max, chunk });
        assert_eq!(*error.doing(), Doing::RegisterUmem { bytes: umem.size() });
        let (headroom, most) = ((max + 1).to_string(), format!("at most {max}"));
        explained(&error, Some(Errno::INVAL), &[&headroom], &most);
        untouched(&umem, &pool);
        Socket::builder(&device).open(&with(max).unwrap().0).unwrap();
    }
}

#[test]
fn locked_memory_is_limited_without_the_capability() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    // All of a user's UMEMs count, so one above the limit is refused whatever else there is.
    let limit = getrlimit(Resource::Memlock).current;
    let Some(limit) = limit.filter(|limit| *limit < 64 << 20) else {
        return println!("skipped: needs a limit of locked memory below 64 MiB");
    };
    let (umem, pool) = Umem::builder().frames((limit / 4096) as u32 + 1).build().unwrap();
    let error = without(CapabilitySet::IPC_LOCK, || at_once(&device).open(&umem)).unwrap_err();
    assert_eq!(*error.cause(), Cause::LockedMemory { bytes: umem.size(), limit });
    let named = [&umem.size().to_string()[..], &limit.to_string()];
    explained(&error, Some(Errno::NOBUFS), &named, "ulimit -l");
    assert!(error.remedy().contains("cap_ipc_lock"), "{}", error.remedy());
    untouched(&umem, &pool);
    at_once(&device).open(&umem).unwrap();
}

#[test]
fn a_umem_tells_a_number_of_sockets_apart() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let (umem, pool) = small();
    let mut pairs: Vec<_> = (0..Pair::MAX).map(|_| Pair::new(&umem).unwrap()).collect();
    let error = at_once(&device).open(&umem).unwrap_err();
    assert_eq!(*error.cause(), Cause::TooManySockets { max: Pair::MAX });
    explained(&error, None, &["32767"], "another UMEM");
    untouched(&umem, &pool);
    pairs.pop();
    at_once(&device).open(&umem).unwrap();
}

// --- rings

#[test]
fn ring_sizes_are_checked_before_the_kernel_tries_them() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let (umem, pool) = small();
    type Size = fn(SocketBuilder<'static>, u32) -> SocketBuilder<'static>;
    let rings: [(RingKind, Size); 4] = [
        (RingKind::Rx, SocketBuilder::rx_size),
        (RingKind::Tx, SocketBuilder::tx_size),
        (RingKind::Fill, SocketBuilder::fill_size),
        (RingKind::Completion, SocketBuilder::completion_size),
    ];
    let odd = |entries| Cause::RingNotPowerOfTwo { entries };
    let large = |entries| Cause::RingTooLarge { entries, max: MAX_RING_ENTRIES };
    let sizes = [
        (0, odd(0), "use 2048"),
        (511, odd(511), "256 or 512"),
        (u32::MAX, odd(u32::MAX), "use 2147483648"),
        (1 << 31, large(1 << 31), "at most 1048576"),
        (MAX_RING_ENTRIES * 2, large(MAX_RING_ENTRIES * 2), "at most 1048576"),
    ];
    for (ring, size) in rings {
        for (entries, cause, remedy) in sizes.clone() {
            let error = size(at_once(&device), entries).open(&umem).unwrap_err();
            assert_eq!((error.doing(), error.cause()), (&Doing::MakeRing { ring, entries }, &cause));
            explained(&error, None, &[&ring.to_string(), &entries.to_string()], remedy);
        }
    }
    untouched(&umem, &pool);
    // A ring that the socket does not have needs no size.
    at_once(&device).tx_size(0).open_rx(&umem).unwrap();
    Socket::builder(&device).ring_size(64).rx_size(0).open_tx(&umem).unwrap();
}

#[test]
fn a_tx_budget_is_from_32_to_the_size_of_tx() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let (umem, _pool) = small();
    let xsk = at_once(&device).open(&umem).unwrap();
    if let Err(error) = xsk.socket.set_tx_budget(64) {
        let cause = Cause::KernelTooOld { feature: "the TX budget option", since: "6.17" };
        assert_eq!(*error.cause(), cause);
        return explained(&error, Some(Errno::NOPROTOOPT), &["TX budget", "6.17"], "6.17");
    }
    xsk.socket.set_tx_budget(32).unwrap();
    for packets in [0, 31, 65, u32::MAX] {
        let error = xsk.socket.set_tx_budget(packets).unwrap_err();
        assert_eq!(*error.cause(), Cause::TxBudget { packets, min: 32, max: 64 });
        assert_eq!(*error.doing(), Doing::SetTxBudget { packets });
        explained(&error, Some(Errno::ACCESS), &[&packets.to_string()], "32 to 64");
    }
    drop(xsk);
    let xsk = Socket::builder(&device).ring_size(16).open(&umem).unwrap();
    let error = xsk.socket.set_tx_budget(32).unwrap_err();
    assert_eq!(*error.cause(), Cause::TxBudget { packets: 32, min: 32, max: 16 });
    explained(&error, Some(Errno::ACCESS), &["32"], "TX ring of at least 32");
    drop(xsk);
    let xsk = Socket::builder(&device).ring_size(64).open_rx(&umem).unwrap();
    let error = xsk.socket.set_tx_budget(32).unwrap_err();
    assert_eq!(*error.cause(), Cause::NoTxRing);
    explained(&error, Some(Errno::ACCESS), &["no TX ring"], "`open_tx`");
}

// --- sockets

#[test]
fn a_socket_needs_its_capability() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let (umem, pool) = small();
    let error = without(CapabilitySet::NET_RAW, || at_once(&device).open(&umem)).unwrap_err();
    assert_eq!(*error.cause(), Cause::MissingCapability { capability: "CAP_NET_RAW" });
    assert_eq!(*error.doing(), Doing::MakeSocket);
    explained(&error, Some(Errno::PERM), &["CAP_NET_RAW"], "setcap cap_net_raw+ep");
    assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::PermissionDenied);
    untouched(&umem, &pool);
    // And nothing else: a socket alone is no matter of the interface's administrator.
    without(CapabilitySet::NET_ADMIN | CapabilitySet::SYS_ADMIN | CapabilitySet::BPF, || {
        at_once(&device).open(&umem).unwrap();
    });
}

/// Enters a user namespace as its root, with whatever else is in `flags`.
fn enter_user_namespace(flags: libc::c_int) -> std::io::Result<()> {
    let map = b"0 0 1";
    // SAFETY: the path ends with a zero byte, and the buffer has the length given.
    unsafe {
        if libc::unshare(libc::CLONE_NEWUSER | flags) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        let file = libc::open(c"/proc/self/uid_map".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if file < 0 || libc::write(file, map.as_ptr().cast(), map.len()) != map.len() as isize {
            return Err(std::io::Error::last_os_error());
        }
        libc::close(file);
    }
    Ok(())
}

#[test]
fn in_a_user_namespace_capabilities_are_told_from_permission() {
    let Some(_bed) = bed(|b| b) else { return };
    spawn("user namespace", || enter_user_namespace(libc::CLONE_NEWNET)).succeeds();
    // The testbed's network namespace belongs to another user namespace: capabilities don't count.
    spawn("foreign namespace", || enter_user_namespace(0)).succeeds();
}

#[test]
fn too_many_open_files_are_told_as_such() {
    let Some(_bed) = bed(|b| b) else { return };
    spawn("no files", || Ok(())).succeeds();
}

// --- interfaces and queues

#[test]
fn an_interface_that_is_not_there() {
    let Some(bed) = bed(|b| b) else { return };
    let long = "x".repeat(1000);
    for name in ["nobody", "", "a_name_of_16_byt", "xsk0\0", &long] {
        let error = Device::open(name).unwrap_err();
        assert_eq!(*error.cause(), Cause::NoSuchInterface { name: name.into() });
        explained(&error, Some(Errno::NODEV), &[name], "ip link");
    }
    // One of another namespace.
    let error = Device::open(&bed.b().name).unwrap_err();
    assert_eq!(*error.cause(), Cause::NoSuchInterface { name: bed.b().name.clone() });
    let error = std::io::Error::from(error);
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    assert!(error.to_string().contains("xsk1"), "{error}");
}

#[test]
fn an_interface_that_is_removed_after_it_was_opened() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let map = XskMap::new(&device).unwrap();
    let program = Program::redirect(&map).unwrap();
    let (umem, pool) = small();
    bed.a().delete().unwrap();

    let errors = [
        (at_once(&device).open(&umem).unwrap_err(), Some(Errno::NODEV)),
        (at_once(&device).queue(65536).open(&umem).unwrap_err(), None),
        (program.attach(&device, AttachMode::Best).unwrap_err(), Some(Errno::INVAL)),
        (program.attach(&device, AttachMode::Generic).unwrap_err(), Some(Errno::INVAL)),
        (device.info().unwrap_err(), Some(Errno::NODEV)),
        (XskMap::new(&device).unwrap_err(), Some(Errno::NODEV)),
    ];
    for (error, errno) in &errors {
        assert_eq!(*error.cause(), Cause::InterfaceGone, "{error}");
        explained(error, *errno, &["xsk0", "gone"], "open the interface");
    }
    untouched(&umem, &pool);
    at_once(&Device::open("lo").unwrap()).open(&umem).unwrap();
}

#[test]
fn a_queue_that_is_not_there() {
    let Some(bed) = bed(|b| b.queues(2)) else { return };
    let device = device(&bed);
    let (umem, pool) = small();
    // Beyond 16 bits the kernel would bind another queue.
    for (queue, errno) in
        [(2, Some(Errno::INVAL)), (65535, Some(Errno::INVAL)), (65536, None), (u32::MAX, None)]
    {
        let error = at_once(&device).queue(queue).open(&umem).unwrap_err();
        assert_eq!(*error.cause(), Cause::NoSuchQueue { queue, queues: 2 });
        assert_eq!(*error.doing(), Doing::Bind { interface: "xsk0".into(), queue });
        explained(&error, errno, &["xsk0", &queue.to_string(), "it has 2"], "use queue 0 to 1;");
        assert!(error.remedy().contains("ethtool -L xsk0 "), "{}", error.remedy());
    }
    untouched(&umem, &pool);
    at_once(&device).open(&umem).unwrap();
}

#[test]
fn a_queue_that_another_socket_of_this_process_has() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let (umem, _pool) = small();
    let first = at_once(&device).open(&umem).unwrap();
    let (other, mut pool) = small();
    let patience = Duration::from_millis(30);
    let error = Socket::builder(&device).release_timeout(patience).open(&other).unwrap_err();
    let Cause::QueueBusy { holders, waited } = error.cause() else { panic!("{error}") };
    assert!(*waited >= patience && *waited < PATIENCE, "{waited:?}");
    assert!(holders.iter().any(|holder| holder.pid == std::process::id()), "{holders:?}");
    explained(&error, Some(Errno::BUSY), &["xsk0 queue 0", "another socket"], "drop the socket");
    assert_eq!(std::io::Error::from(error).kind(), std::io::ErrorKind::AddrInUse);

    let error = at_once(&device).fill_from(&mut pool, 32).open_tx(&other).unwrap_err();
    assert!(matches!(error.cause(), Cause::QueueBusy { .. }), "{error}");
    untouched(&other, &pool);
    drop(first);
    Socket::builder(&device).fill_from(&mut pool, 32).open_tx(&other).unwrap();
}

#[test]
fn a_queue_that_another_process_has_names_the_process() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let mut other = spawn("receive", || Ok(()));
    other.says("ready");
    // Asked in a process that has nothing else: this one's other tests have sockets of their own.
    spawn(&format!("probe {}", other.child.id()), || Ok(())).succeeds();
    let (umem, _pool) = small();
    other.kill();
    Socket::builder(&device).open(&umem).unwrap();
}

#[test]
fn a_umem_has_one_socket_a_queue_and_can_have_one_on_each() {
    let Some(bed) = bed(|b| b.queues(2)) else { return };
    let device = device(&bed);
    let (umem, mut pool) = small();
    let mut first = at_once(&device).open(&umem).unwrap();
    let before = umem.census();
    let error = at_once(&device).open(&umem).unwrap_err();
    assert_eq!(*error.cause(), Cause::QueueTaken);
    explained(&error, None, &["xsk0 queue 0"], "another queue");
    let error = at_once(&device).queue(1).mode(Mode::ZeroCopy).open(&umem).unwrap_err();
    assert_eq!(*error.cause(), Cause::SharedMode { zero_copy: false });
    explained(&error, None, &["queue 1", "copy mode"], "same mode");
    assert_eq!(umem.census(), before);

    let mut second = at_once(&device).queue(1).mode(Mode::Copy).open(&umem).unwrap();
    assert_eq!(second.socket.mode(), Mode::Copy);
    assert_eq!(first.fill.refill(&mut pool, 32) + second.fill.refill(&mut pool, 32), 64);
    // The one that lent the UMEM may go first.
    drop(first);
    Socket::builder(&device).open(&umem).unwrap();
}

#[test]
fn a_umem_is_of_use_after_the_interface_of_its_socket_is_gone() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let (umem, mut pool) = small();
    let gone = at_once(&device).open_tx(&umem).unwrap();
    bed.a().delete().unwrap();
    // The first socket is still open, but lends nothing any more.
    let mut xsk = at_once(&Device::open("lo").unwrap()).open(&umem).unwrap();
    assert_eq!(xsk.fill.refill(&mut pool, 32), 32);
    assert_eq!(*gone.socket.send().unwrap_err().cause(), Cause::InterfaceGone);
}

#[test]
fn zero_copy_is_not_for_every_driver() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let (umem, mut pool) = small();
    let error = at_once(&device).mode(Mode::ZeroCopy).fill_from(&mut pool, 32).open_tx(&umem).unwrap_err();
    assert_eq!(*error.cause(), Cause::ZeroCopyUnsupported { driver: Some("veth".into()) });
    explained(&error, Some(Errno::OPNOTSUPP), &["xsk0", "veth"], "ask for copy");
    untouched(&umem, &pool);
    let xsk = Socket::builder(&device).open(&umem).unwrap();
    assert_eq!((xsk.socket.mode(), xsk.socket.is_zero_copy()), (Mode::Copy, false));
}

#[test]
fn two_kernels_do_not_mix() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let sim = xsk_sim::Sim::new();
    let simulated = Device::open_on(sim.kernel(), "sim0").unwrap();
    let (umem, _pool) = small();
    let (other, other_pool) = small();
    let xsk = at_once(&device).open(&umem).unwrap();
    let error = at_once(&simulated).open(&umem).unwrap_err();
    assert_eq!(*error.cause(), Cause::OtherKernel { what: "the UMEM" });
    explained(&error, None, &["sim0", "the UMEM"], "one kernel");

    let map = XskMap::with_slots(&simulated, 1).unwrap();
    let error = map.insert(0, &xsk.socket).unwrap_err();
    assert_eq!(*error.cause(), Cause::OtherKernel { what: "the socket" });
    explained(&error, None, &["slot 0", "the socket"], "one kernel");
    // By its index alone it would be some other interface.
    let error = Program::redirect(&map).unwrap().attach(&device, AttachMode::Best).unwrap_err();
    assert_eq!(*error.cause(), Cause::OtherKernel { what: "the interface" });
    explained(&error, None, &["xsk0", "the interface"], "one kernel");
    assert!(device.info().unwrap().programs().is_empty());
    assert!(simulated.info().unwrap().programs().is_empty());

    // Every handle of one simulated kernel is that kernel; another one is another.
    let first = at_once(&simulated).open(&other).unwrap();
    untouched(&other, &other_pool);
    let again = Device::open_on(sim.kernel(), "sim0").unwrap();
    assert_eq!(*at_once(&again).open(&other).unwrap_err().cause(), Cause::QueueTaken);
    map.insert(0, &first.socket).unwrap();
    let elsewhere = xsk_sim::Sim::new();
    let elsewhere = Device::open_on(elsewhere.kernel(), "sim0").unwrap();
    let error = at_once(&elsewhere).open(&other).unwrap_err();
    assert_eq!(*error.cause(), Cause::OtherKernel { what: "the UMEM" });
}

// --- XSKMAP

#[test]
fn an_xskmap_has_a_sensible_number_of_slots() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    for entries in [0, 65537, 1 << 20, u32::MAX] {
        let error = XskMap::with_slots(&device, entries).unwrap_err();
        assert_eq!(*error.cause(), Cause::MapSize { entries, max: 65536 });
        assert_eq!(*error.doing(), Doing::MakeMap { entries });
        explained(&error, None, &[&entries.to_string(), "1 to 65536"], "queues");
    }
    assert_eq!(XskMap::with_slots(&device, 65536).unwrap().slots(), 65536);
}

#[test]
fn slots_that_are_not_there_or_taken() {
    let Some(bed) = bed(|b| b.queues(2)) else { return };
    let device = device(&bed);
    let program = DefaultProgram::attach(&device, AttachMode::Generic).unwrap();
    let map = program.map();
    let (umem, mut pool) = small();
    let mut xsk = at_once(&device).open(&umem).unwrap();
    xsk.fill.refill(&mut pool, 32);
    let other = at_once(&device).queue(1).open(&umem).unwrap();

    for index in [2, u32::MAX] {
        let insert = map.insert(index, &xsk.socket).unwrap_err();
        assert_eq!(*insert.doing(), Doing::InsertSocket { index });
        let new = map.insert_new(index, &xsk.socket).unwrap_err();
        let remove = map.remove(index).unwrap_err();
        assert_eq!(*remove.doing(), Doing::RemoveSocket { index });
        for (error, errno) in [(insert, Errno::TOOBIG), (new, Errno::TOOBIG), (remove, Errno::INVAL)] {
            assert_eq!(*error.cause(), Cause::NoSuchSlot { index, entries: 2 });
            explained(&error, Some(errno), &[&index.to_string(), "it has 2"], "make the map larger");
        }
    }
    program.insert(&xsk.socket).unwrap();
    map.insert_new(0, &xsk.socket).unwrap();
    let error = map.insert_new(0, &other.socket).unwrap_err();
    assert_eq!(*error.cause(), Cause::SlotTaken { index: 0 });
    explained(&error, Some(Errno::EXIST), &["slot 0"], "`insert`");

    // The slot still has the first socket.
    let peer = PacketSocket::open(bed.b()).unwrap();
    let frame = UdpFrame::new(bed.b(), bed.a()).len(100).build().unwrap();
    peer.send(&frame).unwrap();
    assert!(xsk.socket.wait(Interest::Rx, Some(PATIENCE)).unwrap().rx);
    assert_eq!(xsk.rx.take(8).map(|packet| packet.len()).collect::<Vec<_>>(), [100]);

    // A socket leaves the map with its last owner; an empty slot can be emptied.
    drop(xsk);
    eventually("the slot is free", || map.insert_new(0, &other.socket).is_ok());
    map.remove(0).unwrap();
    map.remove(0).unwrap();
}

#[test]
fn a_socket_that_only_sends_is_entered_or_told_why_not() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let (umem, _pool) = small();
    let xsk = at_once(&device).open_tx(&umem).unwrap();
    let map = XskMap::new(&device).unwrap();
    // Refused since 7.1.
    if let Err(error) = map.insert(0, &xsk.socket) {
        assert_eq!(*error.cause(), Cause::NeedsRxRing);
        explained(&error, Some(Errno::NOBUFS), &["slot 0", "no RX ring"], "RX ring");
    }
}

// --- programs

/// Without `CAP_SYS_ADMIN`, which contains the others.
fn without_for_bpf<R: Send>(dropped: CapabilitySet, f: impl FnOnce() -> R + Send) -> R {
    without(dropped | CapabilitySet::SYS_ADMIN, f)
}

#[test]
fn programs_and_their_maps_need_capabilities() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let map = XskMap::new(&device).unwrap();
    for (dropped, capability) in
        [(CapabilitySet::BPF, "CAP_BPF"), (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN")]
    {
        let load = without_for_bpf(dropped, || Program::redirect(&map)).unwrap_err();
        assert_eq!(*load.doing(), Doing::LoadProgram);
        let made = without_for_bpf(dropped, || XskMap::new(&device));
        let attach =
            without_for_bpf(dropped, || DefaultProgram::attach(&device, AttachMode::Best)).unwrap_err();
        for error in [Some(load), made.err(), Some(attach)].iter().flatten() {
            assert_eq!(*error.cause(), Cause::MissingCapability { capability }, "{error:#}");
            explained(error, Some(Errno::PERM), &[capability], "setcap cap_net_raw,cap_net_admin,cap_bpf+ep");
        }
        assert!(device.info().unwrap().programs().is_empty());
    }
    drop(DefaultProgram::attach(&device, AttachMode::Best).unwrap());
}

#[test]
fn a_program_that_is_there_already_is_named() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let map = XskMap::new(&device).unwrap();
    let newcomer = Program::redirect(&map).unwrap();
    for (mode, other) in
        [(AttachMode::Native, AttachMode::Generic), (AttachMode::Generic, AttachMode::Native)]
    {
        let present = DefaultProgram::attach(&device, mode).unwrap();
        let before = device.info().unwrap();
        let [program] = before.programs() else { panic!("{before:?}") };
        let id = program.id;
        let holders = device.kernel().program_holders(id);
        let this = holders.iter().find(|holder| holder.link.is_some()).unwrap().process.clone();
        assert_eq!(this.pid, std::process::id());
        let named = format!("by {this}");
        let owner = Owner::Processes(vec![this]);
        let cause = Cause::ProgramPresent { id, name: Some("xsk_redirect".into()), mode, owner };
        for (asked, errno) in [(mode, Errno::BUSY), (other, Errno::EXIST)] {
            let error = newcomer.attach(&device, asked).unwrap_err();
            assert_eq!(*error.cause(), cause);
            assert_eq!(*error.doing(), Doing::Attach { interface: "xsk0".into(), mode: asked });
            let mode = format!("({mode})");
            let named = ["xsk0", "xsk_redirect", &id.to_string(), &mode, &named];
            explained(&error, Some(errno), &named, "this very process");
        }
        // Generic mode would not help here, so the better of both is the same error.
        let error = newcomer.attach(&device, AttachMode::Best).unwrap_err();
        assert_eq!(*error.cause(), cause);
        assert_eq!(device.info().unwrap(), before);
        drop(present);
        assert!(device.info().unwrap().programs().is_empty());
    }
}

/// A program that passes everything, of no use to sockets.
fn foreign_program() -> Handle {
    let pass = [asm::alu_imm(asm::Alu::Mov, asm::Reg::R0, asm::XDP_PASS), asm::exit()];
    let spec = ProgramSpec { instructions: &pass, flags: 0, name: "foreign" };
    Linux.load_program(&spec, &mut String::new()).unwrap()
}

/// Attaches a program without a link, as `ip link set NAME xdpgeneric` does; -1 takes it off.
fn set_generic_program(index: u32, fd: i32) {
    const RTM_SETLINK: u16 = 19;
    const REQUEST_ACK: u16 = 0x01 | 0x04;
    const IFLA_XDP: u16 = 43 | 1 << 15;
    const IFLA_XDP_FD: u16 = 1;
    const IFLA_XDP_FLAGS: u16 = 3;
    let mut message = Vec::new();
    // nlmsghdr, ifinfomsg, then one attribute around two.
    message.extend(52u32.to_ne_bytes());
    message.extend([RTM_SETLINK, REQUEST_ACK].map(u16::to_ne_bytes).concat());
    message.extend([0, 0, 0, index, 0, 0].map(u32::to_ne_bytes).concat());
    message.extend([20, IFLA_XDP, 8, IFLA_XDP_FD].map(u16::to_ne_bytes).concat());
    message.extend(fd.to_ne_bytes());
    message.extend([8, IFLA_XDP_FLAGS].map(u16::to_ne_bytes).concat());
    message.extend(XDP_FLAGS_SKB_MODE.to_ne_bytes());
    let socket = rustix::net::socket(rustix::net::AddressFamily::NETLINK, rustix::net::SocketType::RAW, None);
    let socket = socket.unwrap();
    rustix::net::send(&socket, &message, rustix::net::SendFlags::empty()).unwrap();
    let mut answer = [0u8; 1024];
    rustix::net::recv(&socket, &mut answer[..], rustix::net::RecvFlags::empty()).unwrap();
    let error = i32::from_ne_bytes(answer[16..20].try_into().unwrap());
    assert_eq!(error, 0, "rtnetlink: {}", std::io::Error::from_raw_os_error(-error));
}

#[test]
fn a_foreign_program_is_named_with_who_keeps_it() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let conflict = || {
        let error = DefaultProgram::attach(&device, AttachMode::Best).unwrap_err();
        let Cause::ProgramPresent { name, owner, .. } = error.cause() else { panic!("{error}") };
        assert_eq!(name.as_deref(), Some("foreign"));
        let owner = owner.clone();
        (error, owner)
    };

    let mut other = spawn("foreign", || Ok(()));
    other.says("ready");
    let (error, owner) = conflict();
    let Owner::Processes(processes) = owner else { panic!("{error}") };
    let pids: Vec<_> = processes.iter().map(|holder| holder.pid).collect();
    assert_eq!(pids, [other.child.id()]);
    let process = format!("(process {})", other.child.id());
    explained(
        &error,
        Some(Errno::BUSY),
        &["xsk0", "foreign", "(native)", "by causes", &process],
        "end causes",
    );
    // What the remedy says.
    other.kill();
    eventually("the program is gone", || device.info().unwrap().programs().is_empty());

    // In a BPF file system only.
    with_bpffs(|root| {
        let program = foreign_program();
        let link = Linux.attach(program.as_fd(), device.index(), XDP_FLAGS_SKB_MODE).unwrap();
        let id = Linux.link_info(link.as_fd()).unwrap().id;
        let file = root.join("bpf/foreign");
        Linux.pin(link.as_fd(), &file).unwrap();
        drop(link);
        let (error, owner) = conflict();
        assert_eq!(owner, Owner::Kept { link: id });
        let (link, detach) = (format!("link {id}"), format!("bpftool link detach id {id}"));
        explained(&error, Some(Errno::EXIST), &["(generic)", &link], &detach);
        std::fs::remove_file(file).unwrap();
        eventually("the program is gone", || device.info().unwrap().programs().is_empty());
    });

    // Without a link: as long as somebody has the program open, and when nobody has.
    let program = foreign_program();
    set_generic_program(device.index(), program.as_fd().as_raw_fd());
    let (error, owner) = conflict();
    let Owner::Nobody { open_in } = owner else { panic!("{error}") };
    assert_eq!(open_in.iter().map(|holder| holder.pid).collect::<Vec<_>>(), [std::process::id()]);
    explained(&error, Some(Errno::EXIST), &["without a link", "open in causes"], "xsk0 xdpgeneric off");
    drop(program);
    let (error, owner) = conflict();
    assert_eq!(owner, Owner::Nobody { open_in: Vec::new() });
    explained(
        &error,
        Some(Errno::EXIST),
        &["without a link"],
        "take it off: ip link set xsk0 xdpgeneric off",
    );
    set_generic_program(device.index(), -1);
    drop(DefaultProgram::attach(&device, AttachMode::Best).unwrap());
}

#[test]
fn a_program_with_other_rules_or_another_mode_is_named_with_its_owner() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let mut other = spawn("receive", || Ok(()));
    other.says("ready");
    let process = format!("(process {})", other.child.id());
    let is_other = |owner: &Owner| matches!(owner, Owner::Processes(processes) if processes.iter().all(|h| h.pid == other.child.id()));
    let there = device.info().unwrap().programs()[0].id;

    let ports = Steering::udp_ports([53, 4242]);
    let error = DefaultProgram::attach_with(&device, &ports, AttachMode::Best).unwrap_err();
    let Cause::OtherRules { id, mode: AttachMode::Native, rules, asked, owner } = error.cause() else {
        panic!("{error}")
    };
    assert_eq!((*id, &rules[..], &asked[..]), (there, "all packets", "udp dst port 53 or 4242"));
    assert!(is_other(owner), "{error}");
    let named = ["xsk0", "all packets", "udp dst port 53 or 4242", &process];
    explained(&error, Some(Errno::BUSY), &named, "ask for the same packets, or end causes");

    let error = DefaultProgram::attach(&device, AttachMode::Generic).unwrap_err();
    let Cause::OtherMode { id, mode: AttachMode::Native, owner } = error.cause() else { panic!("{error}") };
    assert!(*id == there && is_other(owner), "{error}");
    explained(&error, Some(Errno::EXIST), &["xsk0", "(native)", &process], "ask for native mode");
    // What the remedy says.
    for mode in [AttachMode::Native, AttachMode::Best] {
        let joined = DefaultProgram::attach(&device, mode).unwrap();
        assert_eq!((joined.is_joined(), joined.mode()), (true, AttachMode::Native));
    }

    // Who may not look at it is told what that takes, and that it can be had otherwise.
    let error = without(CapabilitySet::SYS_ADMIN, || DefaultProgram::attach(&device, AttachMode::Best));
    let error = error.unwrap_err();
    let Cause::SharingNeedsCapability { id, mode: AttachMode::Native, owner } = error.cause() else {
        panic!("{error}")
    };
    assert!(*id == there && is_other(owner), "{error}");
    explained(&error, Some(Errno::BUSY), &["xsk0", "CAP_SYS_ADMIN", &process], "DefaultProgram::join_kept");
}

#[test]
fn a_map_has_slots_for_queues_that_come_into_use_later() {
    let Some(bed) = bed(|b| b.queues(3)) else { return };
    let device = device(&bed);
    set_channels(&bed.a().name, 1, 1);
    bed.peer(|| set_channels("xsk1", 1, 1)).unwrap();
    let info = device.info().unwrap();
    assert_eq!((info.queues(), info.max_queues()), (1, 3));
    let program = DefaultProgram::attach(&device, AttachMode::Native).unwrap();
    assert_eq!(program.map().slots(), 3);
    set_channels(&bed.a().name, 3, 3);
    let (umem, _pool) = small();
    let xsk = at_once(&device).queue(2).open(&umem).unwrap();
    program.insert(&xsk.socket).unwrap();
}

#[test]
fn steering_by_no_ports_or_too_many_is_refused() {
    let sim = xsk_sim::Sim::new();
    let device = sim.device("sim0").unwrap();
    let odd = |count: u16| Steering::udp_ports((0..count).map(|n| 2 * n + 1));
    let max = Steering::MAX_PORT_RUNS;
    for (count, remedy) in [(0, "at least one port"), (max as u16 + 1, "consecutive")] {
        let error = DefaultProgram::attach_with(&device, &odd(count), AttachMode::Best).unwrap_err();
        let runs = usize::from(count);
        assert_eq!(
            (error.doing(), error.cause()),
            (&Doing::LoadProgram, &Cause::SteeringPorts { runs, max })
        );
        explained(&error, None, &[&count.to_string(), &max.to_string()], remedy);
    }
}

#[test]
fn a_driver_that_runs_no_programs() {
    let Some(_bed) = bed(|b| b) else { return };
    let lo = Device::open("lo").unwrap();
    let error = DefaultProgram::attach(&lo, AttachMode::Native).unwrap_err();
    let driver = lo.info().unwrap().driver().map(str::to_owned);
    assert_eq!(*error.cause(), Cause::NativeUnsupported { driver });
    explained(&error, Some(Errno::OPNOTSUPP), &["lo", "runs no XDP programs"], "generic mode");
    assert!(lo.info().unwrap().programs().is_empty());

    let program = DefaultProgram::attach(&lo, AttachMode::Best).unwrap();
    assert_eq!(program.mode(), AttachMode::Generic);
    let why = program.attachment().fallback().expect("it fell back");
    assert!(matches!(why.cause(), Cause::NativeUnsupported { .. }), "{why}");
    drop(program);
    let program = DefaultProgram::attach(&lo, AttachMode::Generic).unwrap();
    assert!(program.attachment().fallback().is_none());
}

/// Sets the queues in use (`ETHTOOL_SCHANNELS`).
fn set_channels(name: &str, rx: u32, tx: u32) {
    const ETHTOOL_SCHANNELS: u32 = 0x3d;
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    // `struct ethtool_channels`: command, four maxima, then rx, tx, other and combined.
    let mut channels = [ETHTOOL_SCHANNELS, 0, 0, 0, 0, rx, tx, 0, 0];
    // SAFETY: integers and addresses, of which zeros are values; the kernel reads the name and the
    // nine words, all of which live until after the call.
    unsafe {
        let socket =
            OwnedFd::from_raw_fd(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0));
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_data = channels.as_mut_ptr().cast();
        let result = libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &raw mut request);
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }
}

#[test]
fn too_few_receive_queues_for_a_native_program() {
    let Some(bed) = bed(|b| b.queues(2)) else { return };
    let device = device(&bed);
    set_channels(&bed.a().name, 1, 2);
    let error = DefaultProgram::attach(&device, AttachMode::Native).unwrap_err();
    assert_eq!(*error.cause(), Cause::TooFewQueues { rx_queues: 1 });
    explained(&error, Some(Errno::NOSPC), &["xsk0", "1 receive queues"], "ethtool -L xsk0 rx");
    assert!(device.info().unwrap().programs().is_empty());
    let program = DefaultProgram::attach(&device, AttachMode::Best).unwrap();
    assert_eq!(program.mode(), AttachMode::Generic);
    let why = program.attachment().fallback().expect("it fell back").cause();
    assert_eq!(*why, Cause::TooFewQueues { rx_queues: 1 });
    drop(program);
    // What the remedy says.
    set_channels(&bed.a().name, 2, 2);
    drop(DefaultProgram::attach(&device, AttachMode::Native).unwrap());
}

#[test]
fn a_program_for_several_buffers_takes_every_mtu() {
    let Some(bed) = bed(|b| b.mtu(65535)) else { return };
    let program = DefaultProgram::attach(&device(&bed), AttachMode::Native).unwrap();
    assert!(program.attachment().program().has_frags());
}

/// Runs `f` on a thread with a BPF file system of its own at `/mnt/bpf`.
fn with_bpffs<R: Send>(f: impl FnOnce(&Path) -> R + Send) -> R {
    let mount = |kind: &std::ffi::CStr, at: &std::ffi::CStr, flags| {
        // SAFETY: the strings end with a zero byte.
        let result =
            unsafe { libc::mount(kind.as_ptr(), at.as_ptr(), kind.as_ptr(), flags, std::ptr::null()) };
        assert_eq!(result, 0, "{kind:?}: {}", std::io::Error::last_os_error());
    };
    let run = || {
        // SAFETY: the call takes no pointers, and changes the calling thread alone.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS) }, 0);
        mount(c"none", c"/", libc::MS_REC | libc::MS_PRIVATE);
        mount(c"tmpfs", c"/mnt", 0);
        std::fs::create_dir("/mnt/bpf").unwrap();
        mount(c"bpf", c"/mnt/bpf", 0);
        f(Path::new("/mnt"))
    };
    thread::scope(|scope| scope.spawn(run).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

#[test]
fn a_program_is_kept_in_a_bpf_file_system_alone() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let attached = || device.info().unwrap().programs().len();
    with_bpffs(|root| {
        let program = DefaultProgram::attach(&device, AttachMode::Best).unwrap();
        let cases = [
            ("elsewhere", Cause::NotBpffs, Errno::PERM, "mount -t bpf"),
            ("bpf/no/such", Cause::NoDirectory, Errno::NOENT, "mkdir"),
            ("bpf/my.program", Cause::DotInName { name: "my.program".into() }, Errno::PERM, "my_program"),
            ("no.where", Cause::NotBpffs, Errno::PERM, "mount -t bpf"),
        ];
        for (path, cause, errno, remedy) in cases {
            let path = root.join(path);
            let error = program.keep(&path).unwrap_err();
            assert_eq!(*error.cause(), cause);
            let name = path.display().to_string();
            assert_eq!(*error.doing(), Doing::Keep { path: name.clone() });
            explained(&error, Some(errno), &[&name], remedy);
            assert!(!path.exists(), "{name} is left behind");
        }
        // A directory that was there already stays.
        std::fs::create_dir(root.join("mine")).unwrap();
        assert_eq!(*program.keep(&root.join("mine")).unwrap_err().cause(), Cause::NotBpffs);
        assert_eq!(std::fs::read_dir(root.join("mine")).unwrap().count(), 0);

        // Another user's file system.
        let nobody = CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH | CapabilitySet::FOWNER;
        let locked = root.join("bpf/locked");
        std::fs::create_dir(&locked).unwrap();
        std::os::unix::fs::chown(&locked, Some(12345), Some(12345)).unwrap();
        // A thread that is started here has this thread's mounts.
        let error = without(nobody, || program.keep(&locked.join("program"))).unwrap_err();
        assert_eq!(*error.cause(), Cause::NoAccess);
        explained(&error, Some(Errno::ACCESS), &["/mnt/bpf/locked/program"], "owner of the directory");
        assert_eq!(std::fs::read_dir(&locked).unwrap().count(), 0);

        let directory = root.join("bpf/program");
        program.keep(&directory).unwrap();
        drop(program);
        assert_eq!(attached(), 1, "the program outlives what attached it");

        // What is kept is joined like any other, by its number or where it is kept; the latter takes
        // fewer rights.
        let by_number = DefaultProgram::attach(&device, AttachMode::Best).unwrap();
        let join = |directory: &Path| DefaultProgram::join_kept(&device, &Steering::all(), directory);
        let by_name = without(CapabilitySet::SYS_ADMIN, || join(&directory)).unwrap();
        assert!(by_number.is_joined() && by_name.is_joined());
        assert_eq!((by_name.mode(), by_name.map().slots()), (AttachMode::Native, 1));
        let (umem, _pool) = small();
        by_name.insert(&at_once(&device).open(&umem).unwrap().socket).unwrap();

        let lo = Device::open("lo").unwrap();
        let refused = |error: Error, cause: Cause, remedy| {
            assert_eq!(*error.cause(), cause);
            assert!(matches!(error.doing(), Doing::JoinKept { .. }), "{error}");
            explained(&error, error.errno(), &["kept at /mnt"], remedy);
        };
        for nothing in ["bpf/no", "bpf/mine", "elsewhere"] {
            refused(join(&root.join(nothing)).unwrap_err(), Cause::NothingKept, "DefaultProgram::keep");
        }
        let error = DefaultProgram::join_kept(&lo, &Steering::all(), &directory).unwrap_err();
        refused(error, Cause::KeptElsewhere, "belongs to the interface");
        // Files in a wrong place: a link for a program.
        std::fs::create_dir(root.join("bpf/mixed")).unwrap();
        for (name, object) in [("link", "link"), ("program", "link"), ("xsks_map", "xsks_map")] {
            let object = Linux.open_pinned(&directory.join(object)).unwrap();
            Linux.pin(object.as_fd(), &root.join("bpf/mixed").join(name)).unwrap();
        }
        refused(join(&root.join("bpf/mixed")).unwrap_err(), Cause::NothingKept, "DefaultProgram::keep");
        std::fs::remove_dir_all(root.join("bpf/mixed")).unwrap();
        std::os::unix::fs::chown(directory.join("program"), Some(12345), Some(12345)).unwrap();
        let error = without(nobody, || join(&directory)).unwrap_err();
        refused(error, Cause::NoAccess, "owner of the directory");
        let ports = Steering::udp_ports([53]);
        let error = DefaultProgram::join_kept(&device, &ports, &directory).unwrap_err();
        let Cause::OtherRules { rules, asked, .. } = error.cause() else { panic!("{error}") };
        assert_eq!((&rules[..], &asked[..]), ("all packets", "udp dst port 53"));

        // Who has joined keeps it too, and can keep it once more.
        std::fs::remove_file(directory.join("link")).unwrap();
        assert_eq!(attached(), 1);
        let twice = root.join("bpf/twice");
        by_name.keep(&twice).unwrap();
        drop((by_number, by_name));
        assert_eq!(attached(), 1);
        std::fs::rename(twice.join("link"), directory.join("link")).unwrap();

        let second = DefaultProgram::attach(&lo, AttachMode::Generic).unwrap();
        let error = second.keep(&directory).unwrap_err();
        assert_eq!(*error.cause(), Cause::PathTaken);
        explained(&error, Some(Errno::EXIST), &["/mnt/bpf/program"], "another name");
        drop(second);
        assert!(lo.info().unwrap().programs().is_empty(), "it was not kept");

        // Only the map's name is taken: the link is not left behind.
        std::fs::remove_file(directory.join("link")).unwrap();
        eventually("the program is detached", || attached() == 0);
        let third = DefaultProgram::attach(&device, AttachMode::Best).unwrap();
        assert_eq!(*third.keep(&directory).unwrap_err().cause(), Cause::PathTaken);
        assert!(!directory.join("link").exists() && directory.join("xsks_map").exists());
        drop(third);
        eventually("the program is detached", || attached() == 0);
    });
}

// --- what happens to a socket later

/// Sends one frame of 100 bytes, and sees it arrive.
#[track_caller]
fn sends(bed: &Testbed, xsk: &mut RxTx, pool: &mut Pool) {
    let peer = PacketSocket::open(bed.b()).unwrap();
    let frame = UdpFrame::new(bed.a(), bed.b()).len(100).build().unwrap();
    let mut packet = pool.packet(0, 100).unwrap();
    packet.copy_from_slice(&frame);
    xsk.tx.reserve(1).push(packet).unwrap();
    assert_eq!(xsk.socket.send().unwrap(), Sent::Done);
    assert_eq!(peer.recv(PATIENCE).unwrap().as_deref(), Some(&frame[..]));
}

#[test]
fn an_interface_that_is_down_is_told_and_works_again_when_it_is_up() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let (umem, mut pool) = small();
    let mut xsk = at_once(&device).open(&umem).unwrap();
    sends(&bed, &mut xsk, &mut pool);
    bed.a().set_up(false).unwrap();
    let packet = pool.packet(0, 100).unwrap();
    xsk.tx.reserve(1).push(packet).unwrap();
    let errors = [
        xsk.socket.send().unwrap_err(),
        xsk.socket.wake_rx().unwrap_err(),
        xsk.socket.wait(Interest::Rx, Some(Duration::from_millis(1))).unwrap_err(),
        xsk.socket.wait(Interest::Rx, None).unwrap_err(),
    ];
    for error in &errors {
        assert_eq!(*error.cause(), Cause::InterfaceDown);
        explained(error, Some(Errno::NETDOWN), &["xsk0 queue 0"], "ip link set xsk0 up");
    }
    let census = umem.census();
    assert_eq!((census.tx, census.contradiction()), (1, None), "what is in TX stays: {census:?}");
    bed.a().set_up(true).unwrap();
    bed.a().wait_up().unwrap();
    assert_eq!(xsk.socket.send().unwrap(), Sent::Done);
    assert_eq!(umem.census().tx, 0);
    sends(&bed, &mut xsk, &mut pool);
}

#[test]
fn a_socket_on_an_interface_that_is_down() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let (umem, mut pool) = small();
    bed.a().set_up(false).unwrap();
    let mut xsk = at_once(&device).open(&umem).unwrap();
    assert_eq!(*xsk.socket.send().unwrap_err().cause(), Cause::InterfaceDown);
    bed.a().set_up(true).unwrap();
    bed.a().wait_up().unwrap();
    sends(&bed, &mut xsk, &mut pool);
}

#[test]
fn an_interface_that_is_removed_ends_every_wait() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let (umem, _pool) = small();
    let xsk = at_once(&device).open(&umem).unwrap();
    thread::scope(|scope| {
        let (send, waiter) = mpsc::channel();
        let socket = &xsk.socket;
        let endless = scope.spawn(move || {
            send.send(rustix::thread::gettid()).unwrap();
            socket.wait(Interest::Rx, None)
        });
        let stat = format!("/proc/self/task/{}/stat", waiter.recv().unwrap().as_raw_nonzero());
        eventually("the thread sleeps", || std::fs::read_to_string(&stat).unwrap().contains(") S "));
        bed.b().delete().unwrap();
        let error = endless.join().unwrap().unwrap_err();
        assert_eq!(*error.cause(), Cause::InterfaceGone);
        explained(&error, Some(Errno::NXIO), &["xsk0 queue 0", "gone"], "open the interface");
    });
    let errors = [
        xsk.socket.send().unwrap_err(),
        xsk.socket.wake_rx().unwrap_err(),
        xsk.socket.wait(Interest::Both, Some(Duration::from_millis(1))).unwrap_err(),
        xsk.socket.wait(Interest::Rx, None).unwrap_err(),
    ];
    for error in &errors {
        assert_eq!(*error.cause(), Cause::InterfaceGone);
        explained(error, Some(Errno::NXIO), &["xsk0 queue 0", "gone"], "open the interface");
    }
    // Its counters can still be read.
    xsk.socket.statistics().unwrap();
}

#[test]
fn a_process_killed_in_mid_traffic_leaves_nothing_behind() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let peer = PacketSocket::open(bed.b()).unwrap();
    let frame = UdpFrame::new(bed.b(), bed.a()).len(100).build().unwrap();
    let mut other = spawn("receive", || Ok(()));
    other.says("ready");
    assert_eq!(device.info().unwrap().programs().len(), 1);
    let (stop, stopped) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let (peer, frame) = (&peer, &frame);
        scope.spawn(move || {
            while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
                peer.send(frame).unwrap();
            }
        });
        let stop = stop;
        other.says("busy");
        other.kill();
        eventually("the program is gone", || device.info().unwrap().programs().is_empty());
        drop(stop);
    });
    let (umem, mut pool) = small();
    let mut xsk = Socket::builder(&device).open(&umem).unwrap();
    xsk.fill.refill(&mut pool, 32);
    let program = DefaultProgram::attach(&device, AttachMode::Native).unwrap();
    program.map().insert_new(0, &xsk.socket).unwrap();
    peer.send(&frame).unwrap();
    assert!(xsk.socket.wait(Interest::Rx, Some(PATIENCE)).unwrap().rx);
    sends(&bed, &mut xsk, &mut pool);
}

#[test]
fn a_child_that_lives_on_does_not_keep_the_queue() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let (umem, mut pool) = small();
    let mut xsk = at_once(&device).open(&umem).unwrap();
    xsk.fill.refill(&mut pool, 32);
    let program = DefaultProgram::attach(&device, AttachMode::Best).unwrap();

    // One that runs another program: descriptors are closed by that.
    let mut spawned = spawn("idle", || Ok(()));
    spawned.says("ready");
    // One that merely closes what it inherited, as a daemon does, and keeps its memory.
    let mut ends = [0; 2];
    // SAFETY: the array has room for two descriptors, which are owned here alone from then on.
    let (read, write) = unsafe {
        assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
        (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
    };
    // SAFETY: the child makes system calls only, and ends with this thread.
    let forked = unsafe { libc::fork() };
    assert!(forked >= 0, "{}", std::io::Error::last_os_error());
    if forked == 0 {
        // SAFETY: as above.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::write(write.as_raw_fd(), b"x".as_ptr().cast(), 1);
            libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0);
            loop {
                libc::pause();
            }
        }
    }
    drop(write);
    // It has closed everything when the other end of this pipe is closed.
    assert_eq!(std::io::read_to_string(std::fs::File::from(read)).unwrap(), "x");

    drop((xsk, program));
    assert!(device.info().unwrap().programs().is_empty());
    Socket::builder(&device).open(&umem).unwrap();
    let alive = |pid| {
        // SAFETY: the call takes no pointers but a null.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG) == 0 }
    };
    assert!(alive(forked) && alive(spawned.child.id() as i32), "both children still live");
    // SAFETY: a child of this thread; nothing else waits for it.
    unsafe {
        libc::kill(forked, libc::SIGKILL);
        libc::waitpid(forked, std::ptr::null_mut(), 0);
    }
}

#[test]
fn a_program_goes_with_its_last_owner() {
    let Some(bed) = bed(|b| b) else { return };
    let device = device(&bed);
    let attached = || device.info().unwrap().programs().len();
    let map = XskMap::new(&device).unwrap();
    let program = Program::redirect(&map).unwrap();
    let attachment = program.attach(&device, AttachMode::Best).unwrap();
    // Neither the program's handle nor the map's is what keeps it attached.
    let again = program.clone();
    drop((program, map));
    assert_eq!(attached(), 1);
    drop(attachment);
    assert_eq!(attached(), 0);
    drop(again.attach(&device, AttachMode::Generic).unwrap());
    assert_eq!(attached(), 0);
}

#[test]
fn the_other_process_can_run() {
    // Or else what it is to prove above is never tried.
    let mut other = spawn("end", || Ok(()));
    assert_eq!(other.child.wait().unwrap().code(), Some(3));
}
