//! Network interfaces: what they are and what they can do for AF_XDP.

use core::fmt;
use std::os::fd::AsFd;
use std::sync::Arc;

use crate::abi::XdpFeatures;
use crate::error::{Cause, Doing, Error, Result, general};
use crate::kernel::{self, Errno, InterfaceInfo, Kernel, Numbered};
use crate::xdp::{AttachMode, mode_of};

/// A network interface of some kernel.
///
/// `Device::open("eth0")` is one of Linux's; a simulated kernel hands out its own. Nothing else in
/// a program depends on which it is.
#[derive(Clone)]
pub struct Device {
    kernel: Arc<dyn Kernel>,
    index: u32,
    name: Arc<str>,
}

impl Device {
    /// Opens an interface of the calling thread's network namespace.
    ///
    /// # Errors
    ///
    /// [`Cause::NoSuchInterface`].
    #[cfg(target_os = "linux")]
    pub fn open(name: &str) -> Result<Self> {
        Self::open_on(kernel::linux::Linux::kernel(), name)
    }

    /// Opens an interface of `kernel`.
    ///
    /// # Errors
    ///
    /// [`Cause::NoSuchInterface`].
    pub fn open_on(kernel: Arc<dyn Kernel>, name: &str) -> Result<Self> {
        match kernel.index_of(name) {
            Ok(index) => Ok(Self { kernel, index, name: name.into() }),
            Err(errno) => {
                let cause = match errno {
                    Errno::NODEV | Errno::NXIO | Errno::INVAL | Errno::NOENT => {
                        Cause::NoSuchInterface { name: name.into() }
                    }
                    errno => general(errno),
                };
                Err(Error::with_errno(Doing::OpenDevice { name: name.into() }, cause, errno))
            }
        }
    }

    /// The interface's index.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Its name when it was opened.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The kernel that it belongs to.
    pub fn kernel(&self) -> &Arc<dyn Kernel> {
        &self.kernel
    }

    /// What the kernel tells of the interface now.
    ///
    /// # Errors
    ///
    /// [`Cause::InterfaceGone`], when it was removed.
    pub fn info(&self) -> Result<DeviceInfo> {
        match self.kernel.interface(self.index) {
            Ok(info) => Ok(DeviceInfo { programs: attached(&*self.kernel, &info), raw: info }),
            Err(errno) => {
                let cause = match errno {
                    Errno::NODEV | Errno::NXIO => Cause::InterfaceGone,
                    errno => general(errno),
                };
                Err(Error::with_errno(Doing::ReadDevice { name: self.name().into() }, cause, errno))
            }
        }
    }

    /// Queues that a socket can be bound to: 0 to this number less one.
    ///
    /// # Errors
    ///
    /// [`Cause::InterfaceGone`], when it was removed.
    pub fn queues(&self) -> Result<u32> {
        self.info().map(|info| info.queues())
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("kernel", &self.kernel.name())
            .field("index", &self.index)
            .field("name", &self.name)
            .finish()
    }
}

/// An XDP program that is attached to an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AttachedProgram {
    /// The kernel's number for it.
    pub id: u32,
    /// Its name, where the caller may ask: with `CAP_SYS_ADMIN`, for which `CAP_BPF` does not do.
    pub name: Option<String>,
    /// How it is attached; `None` where it runs on the NIC itself.
    pub mode: Option<AttachMode>,
}

pub(crate) fn attached(kernel: &dyn Kernel, info: &InterfaceInfo) -> Vec<AttachedProgram> {
    let program = |attached: &kernel::AttachedId| AttachedProgram {
        id: attached.id,
        name: name_of(kernel, attached.id),
        mode: mode_of(attached),
    };
    info.attached.iter().map(program).collect()
}

/// The name of a program, where it has one and the caller may ask.
fn name_of(kernel: &dyn Kernel, id: u32) -> Option<String> {
    let program = kernel.open_by_id(Numbered::Program, id).ok()?;
    let info = kernel.program_info(program.as_fd()).ok()?;
    Some(info.name).filter(|name| !name.is_empty())
}

/// What an interface is and can do, at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    raw: InterfaceInfo,
    programs: Vec<AttachedProgram>,
}

impl DeviceInfo {
    /// The name that it has now.
    pub fn name(&self) -> &str {
        &self.raw.name
    }

    /// The index.
    pub fn index(&self) -> u32 {
        self.raw.index
    }

    /// The largest packet without its Ethernet header, in bytes.
    pub fn mtu(&self) -> u32 {
        self.raw.mtu
    }

    /// The hardware address, where it has one of six bytes.
    pub fn mac(&self) -> Option<[u8; 6]> {
        self.raw.mac
    }

    /// The driver's name, where the kernel tells it.
    pub fn driver(&self) -> Option<&str> {
        self.raw.driver.as_deref()
    }

    /// Whether the interface is switched on.
    pub fn is_up(&self) -> bool {
        self.raw.flags & kernel::IFF_UP != 0
    }

    /// Whether the link is there.
    pub fn is_running(&self) -> bool {
        self.raw.flags & kernel::IFF_RUNNING != 0
    }

    /// Whether the driver has a carrier, at this moment; [`is_running`](Self::is_running) follows it,
    /// up to a second later.
    pub fn has_carrier(&self) -> bool {
        self.raw.flags & kernel::IFF_LOWER_UP != 0
    }

    /// Receive queues.
    pub fn rx_queues(&self) -> u32 {
        self.raw.rx_queues
    }

    /// Transmit queues.
    pub fn tx_queues(&self) -> u32 {
        self.raw.tx_queues
    }

    /// Queues that receive and send, as the driver counts them; `None` where it doesn't tell.
    pub fn combined_queues(&self) -> Option<u32> {
        self.raw.channels.map(|c| c.combined)
    }

    /// Queues that a socket can be bound to: the more of the two kinds.
    pub fn queues(&self) -> u32 {
        self.raw.rx_queues.max(self.raw.tx_queues)
    }

    /// Queues that it could have at most, in use or not (`ethtool -L` changes how many are).
    pub fn max_queues(&self) -> u32 {
        self.raw.max_queues.max(self.queues())
    }

    /// What XDP can do on this driver; `None` on kernels that don't tell (before 6.3).
    pub fn xdp_features(&self) -> Option<XdpFeatures> {
        self.raw.features.map(|f| f.xdp)
    }

    /// Whether the driver has AF_XDP zero copy; `None` on kernels that don't tell (before 6.3).
    ///
    /// A driver may still refuse it: for its MTU, or for how the interface is set up.
    pub fn zero_copy(&self) -> Option<bool> {
        let needed = XdpFeatures::BASIC | XdpFeatures::REDIRECT | XdpFeatures::XSK_ZEROCOPY;
        self.xdp_features().map(|features| features.contains(needed))
    }

    /// Frames that one packet may span in zero copy (6.6).
    pub fn zero_copy_segments(&self) -> Option<u32> {
        self.raw.features.and_then(|f| f.zc_max_segs)
    }

    /// XDP programs that are attached.
    pub fn programs(&self) -> &[AttachedProgram] {
        &self.programs
    }

    /// As the kernel's contract has it.
    pub fn raw(&self) -> &InterfaceInfo {
        &self.raw
    }
}
