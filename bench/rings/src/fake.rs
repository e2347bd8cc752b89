//! The fake kernel as the library's contract has it: one interface, one queue, one socket.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use xsk::Device;
use xsk::abi::{
    MmapOffsets, SockaddrXdp, UmemReg, XDP_MMAP_OFFSETS, XDP_PGOFF_RX_RING, XDP_PGOFF_TX_RING,
    XDP_RING_NEED_WAKEUP, XDP_UMEM_PGOFF_COMPLETION_RING, XDP_UMEM_PGOFF_FILL_RING, bytes_of,
};
use xsk::kernel::{
    self, Devices, Errno, Handle, IFF_LOWER_UP, IFF_RUNNING, IFF_UP, InterfaceInfo, Limits, LinkInfo,
    MapInfo, MapSpec, Mapping, Numbered, PollEntry, ProgramHolder, ProgramInfo, ProgramSpec, Programs,
    RawSocket, Sockets, Watch,
};

use crate::memory::OFFSETS;
use crate::{Bench, FarSide, Kernel, RING};

/// A kernel in copy mode whose interface is always up and never changes.
///
/// A send transmits all of TX at once, as Linux does in copy mode; or it returns at once and TX is
/// [transmitted](FarSide::transmit) between bursts, so that the clock sees the program alone.
#[derive(Clone, Debug)]
pub struct Fake(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    kernel: Mutex<Kernel>,
    /// FILL, RX, TX, COMPLETION.
    rings: [Mapping; 4],
    at_once: bool,
    /// What a program could wait for: nothing ever happens to it.
    silence: File,
}

/// The interface.
const NAME: &str = "fake0";
const INDEX: u32 = 1;

impl Fake {
    pub(crate) fn new(bench: &Bench, at_once: bool) -> Self {
        // As Linux in copy mode: TX always waits for a send.
        bench.rings().tx.set_flags(XDP_RING_NEED_WAKEUP);
        Self(Arc::new(Inner {
            kernel: Mutex::new(Kernel::new(bench)),
            rings: bench.mappings().clone(),
            at_once,
            silence: File::open("/dev/null").expect("there is always nothing"),
        }))
    }

    /// Its interface.
    pub fn device(&self) -> Device {
        Device::open_on(Arc::new(self.clone()), NAME).expect("it has this one")
    }
}

impl Inner {
    fn kernel(&self) -> MutexGuard<'_, Kernel> {
        self.kernel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The work of a send, which is not the program's: `bench/instructions` leaves this function out.
    #[inline(never)]
    fn send(&self) {
        self.kernel().transmit(RING);
    }
}

impl FarSide for Fake {
    fn receive(&mut self, n: u32) -> u32 {
        self.0.kernel().receive(n)
    }

    fn transmit(&mut self, n: u32) -> u32 {
        self.0.kernel().transmit(n)
    }
}

impl kernel::Kernel for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn id(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }
}

// SAFETY: as of `Socket`.
unsafe impl Sockets for Fake {
    fn socket(&self, _: i32, _: i32) -> Result<Box<dyn RawSocket>, Errno> {
        Ok(Box::new(Socket(self.0.clone())))
    }

    fn limits(&self) -> Limits {
        Limits { page_size: 4096, memlock: None, net_raw: true, net_admin: true, bpf: true, ipc_lock: true }
    }

    fn poll(&self, _: &mut [PollEntry<'_>], _: Option<Duration>) -> Result<usize, Errno> {
        Err(Errno::DEADLK)
    }
}

/// The socket.
#[derive(Debug)]
struct Socket(Arc<Inner>);

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.silence.as_fd()
    }
}

// SAFETY: the mappings own their memory, whose far side is a `Kernel`'s alone, which keeps the
// protocol and never touches the UMEM.
unsafe impl RawSocket for Socket {
    fn register_umem(&self, _: &UmemReg, _: usize, _: &Mapping) -> Result<(), Errno> {
        Ok(())
    }

    fn setsockopt(&self, _: i32, _: i32, _: &[u8]) -> Result<(), Errno> {
        Ok(())
    }

    fn getsockopt(&self, _: i32, name: i32, value: &mut [u8]) -> Result<usize, Errno> {
        if name != XDP_MMAP_OFFSETS {
            return Err(Errno::NOPROTOOPT);
        }
        let offsets = MmapOffsets { rx: OFFSETS, tx: OFFSETS, fr: OFFSETS, cr: OFFSETS };
        let bytes = bytes_of(&offsets);
        value.get_mut(..bytes.len()).ok_or(Errno::INVAL)?.copy_from_slice(bytes);
        Ok(bytes.len())
    }

    fn map(&self, page_offset: u64, _: usize) -> Result<Mapping, Errno> {
        let ring = match page_offset {
            XDP_UMEM_PGOFF_FILL_RING => 0,
            XDP_PGOFF_RX_RING => 1,
            XDP_PGOFF_TX_RING => 2,
            XDP_UMEM_PGOFF_COMPLETION_RING => 3,
            _ => return Err(Errno::INVAL),
        };
        Ok(self.0.rings[ring].clone())
    }

    fn bind(&self, _: &SockaddrXdp) -> Result<(), Errno> {
        Ok(())
    }

    fn send(&self) -> Result<(), Errno> {
        if self.0.at_once {
            self.0.send();
        }
        Ok(())
    }

    fn is_bound(&self) -> bool {
        true
    }

    fn receive(&self) -> Result<(), Errno> {
        Ok(())
    }

    fn poll(&self, _: i16, _: Option<Duration>) -> Result<i16, Errno> {
        Err(Errno::DEADLK)
    }
}

impl Devices for Fake {
    fn index_of(&self, name: &str) -> Result<u32, Errno> {
        if name == NAME { Ok(INDEX) } else { Err(Errno::NODEV) }
    }

    fn interface(&self, index: u32) -> Result<InterfaceInfo, Errno> {
        if index != INDEX {
            return Err(Errno::NODEV);
        }
        Ok(InterfaceInfo {
            index,
            name: NAME.into(),
            flags: IFF_UP | IFF_RUNNING | IFF_LOWER_UP,
            mtu: 1500,
            mac: None,
            driver: None,
            channels: None,
            rx_queues: 1,
            tx_queues: 1,
            max_queues: 1,
            features: None,
            attached: Vec::new(),
        })
    }

    fn interfaces(&self) -> Result<Vec<u32>, Errno> {
        Ok(vec![INDEX])
    }

    fn watch(&self, _: u32) -> Result<Box<dyn Watch>, Errno> {
        Ok(Box::new(Quiet(self.0.clone())))
    }
}

/// A watch over an interface that never changes.
#[derive(Debug)]
struct Quiet(Arc<Inner>);

impl AsFd for Quiet {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.silence.as_fd()
    }
}

impl Watch for Quiet {
    fn take(&self) -> bool {
        false
    }
}

/// It has no programs: its only socket gets every packet.
impl Programs for Fake {
    fn create_map(&self, _: &MapSpec<'_>) -> Result<Handle, Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn update_map(&self, _: BorrowedFd<'_>, _: &[u8], _: &[u8], _: u64) -> Result<(), Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn delete_from_map(&self, _: BorrowedFd<'_>, _: &[u8]) -> Result<(), Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn load_program(&self, _: &ProgramSpec<'_>, _: &mut String) -> Result<Handle, Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn attach(&self, _: BorrowedFd<'_>, _: u32, _: u32) -> Result<Handle, Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn pin(&self, _: BorrowedFd<'_>, _: &Path) -> Result<(), Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn open_pinned(&self, _: &Path) -> Result<Handle, Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn open_by_id(&self, _: Numbered, _: u32) -> Result<Handle, Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn next_link(&self, _: u32) -> Result<u32, Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn program_info(&self, _: BorrowedFd<'_>) -> Result<ProgramInfo, Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn map_info(&self, _: BorrowedFd<'_>) -> Result<MapInfo, Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn link_info(&self, _: BorrowedFd<'_>) -> Result<LinkInfo, Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn program_holders(&self, _: u32) -> Vec<ProgramHolder> {
        Vec::new()
    }
}
