//! Devices, their queues, and the wire between them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use xsk::abi::XdpFeatures;
use xsk::kernel::{
    AttachedId, Channels, DriverFeatures, Errno, IFF_LOWER_UP, IFF_RUNNING, IFF_UP, InterfaceInfo,
    XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE,
};

use crate::bpf::Program;
use crate::pool::PoolId;
use crate::rss;

/// Bytes of an Ethernet header.
pub(crate) const ETHERNET_HEADER: usize = 14;
/// Bytes of a VLAN tag, which a device lets pass beyond its MTU.
const VLAN_TAG: usize = 4;

/// The most queues of a device: as many as can get a share of what arrives.
pub(crate) const MAX_QUEUES: u32 = rss::TABLE;

/// The smallest MTU of an Ethernet device that speaks IPv4.
const MIN_MTU: u32 = 68;
/// The largest MTU of which every packet fits a page with what the kernel puts around it, as on
/// veth: larger ones need multi-buffer.
const MAX_MTU: u32 = 3502;

/// Packets that were recorded, shared with who records.
pub(crate) type Tap = Mutex<Vec<Vec<u8>>>;

/// A simulated network device: one end of a wire, like a veth.
#[derive(Debug)]
pub(crate) struct Device {
    name: String,
    mtu: u32,
    pub(crate) up: bool,
    /// The link is there, as far as nobody pulled the cable.
    pub(crate) carrier: bool,
    /// Steps that the link is away when something is bound or attached.
    reset_steps: u32,
    /// Steps until the link is back.
    resetting: u32,
    /// The index of the device at the other end.
    peer: u32,
    /// Never empty.
    pub(crate) queues: Vec<Queue>,
    attached: Option<Attachment>,
    /// Packets that went on to the Linux stack.
    pub(crate) stack: Vec<Vec<u8>>,
    /// Who records what leaves the device.
    pub(crate) taps: Vec<Weak<Tap>>,
}

/// One queue of a device, both ways.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    /// What is bound to it.
    pub(crate) pool: Option<PoolId>,
}

/// A program on a device.
#[derive(Clone, Debug)]
struct Attachment {
    link: LinkId,
    /// Generic, not native.
    generic: bool,
    program: Arc<Program>,
}

/// Number of a link, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LinkId(pub(crate) u64);

impl LinkId {
    /// As the contract has it.
    pub(crate) fn id(self) -> u32 {
        self.0 as u32
    }
}

/// A packet on its way to a device.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) device: u32,
    /// The queue that was chosen for it, modulo the device's; `None` leaves it to the device.
    pub(crate) queue: Option<u16>,
    pub(crate) packet: Vec<u8>,
}

impl Device {
    /// A device that is up, with the device `peer` at the other end. `EINVAL` for an MTU or a
    /// number of queues that it can't have.
    pub(crate) fn new(
        name: String,
        mtu: u32,
        queues: u32,
        reset_steps: u32,
        peer: u32,
    ) -> Result<Self, Errno> {
        let mut device = Self {
            name,
            mtu: 0,
            up: true,
            carrier: true,
            reset_steps,
            resetting: 0,
            peer,
            queues: Vec::new(),
            attached: None,
            stack: Vec::new(),
            taps: Vec::new(),
        };
        device.set_mtu(mtu)?;
        device.set_queues(queues)?;
        Ok(device)
    }

    /// `ip link set mtu`.
    pub(crate) fn set_mtu(&mut self, mtu: u32) -> Result<(), Errno> {
        if !(MIN_MTU..=MAX_MTU).contains(&mtu) {
            return Err(Errno::INVAL);
        }
        self.mtu = mtu;
        Ok(())
    }

    /// `ethtool -L`: `EINVAL` when something is bound to a queue that would go.
    pub(crate) fn set_queues(&mut self, queues: u32) -> Result<(), Errno> {
        let kept = queues as usize;
        let used = self.queues.iter().rposition(|queue| queue.pool.is_some());
        if !(1..=MAX_QUEUES).contains(&queues) || used.is_some_and(|used| used >= kept) {
            return Err(Errno::INVAL);
        }
        self.queues.resize_with(kept, Queue::default);
        Ok(())
    }

    /// The queue on which a packet arrives.
    pub(crate) fn queue_of(&self, chosen: Option<u16>, packet: &[u8]) -> u16 {
        let queues = self.queues.len() as u16;
        chosen.map_or_else(|| rss::queue(packet, queues), |queue| queue % queues)
    }

    /// Whether packets can come in, and go out if the other end can take them.
    pub(crate) fn works(&self) -> bool {
        self.up && self.carrier && self.resetting == 0
    }

    /// Something was bound or attached: devices that start anew for it lose their link.
    pub(crate) fn reset(&mut self) {
        self.resetting = self.reset_steps;
    }

    /// Whether the link is away for a number of steps.
    pub(crate) fn is_resetting(&self) -> bool {
        self.resetting > 0
    }

    /// The program that an arriving packet meets.
    pub(crate) fn program(&self) -> Option<Arc<Program>> {
        self.attached.as_ref().map(|attachment| attachment.program.clone())
    }

    /// `BPF_LINK_CREATE`.
    pub(crate) fn attach(&mut self, link: LinkId, program: Arc<Program>, flags: u32) -> Result<(), Errno> {
        // Offloading to a NIC is none of the modes here, nor is it on veth, which refuses it alike.
        let modes = XDP_FLAGS_SKB_MODE | XDP_FLAGS_DRV_MODE;
        if flags & !modes != 0 || flags.count_ones() > 1 {
            return Err(Errno::INVAL);
        }
        let generic = flags == XDP_FLAGS_SKB_MODE;
        match &self.attached {
            Some(other) if other.generic == generic => Err(Errno::BUSY),
            Some(_) => Err(Errno::EXIST),
            None => {
                self.attached = Some(Attachment { link, generic, program });
                self.reset();
                Ok(())
            }
        }
    }

    /// Takes the link's program off, if it is still there.
    pub(crate) fn detach(&mut self, link: LinkId) {
        self.attached.take_if(|attachment| attachment.link == link);
    }

    /// Whether it has the program of this link.
    pub(crate) fn has(&self, link: LinkId) -> bool {
        self.attached.as_ref().is_some_and(|attachment| attachment.link == link)
    }

    /// Shows a packet that leaves to those who record, and forgets who no longer does.
    fn record(&mut self, packet: &[u8]) {
        self.taps.retain(|tap| {
            let Some(tap) = tap.upgrade() else { return false };
            tap.lock().unwrap_or_else(PoisonError::into_inner).push(packet.to_vec());
            true
        });
    }

    /// Whether a packet of this length can arrive.
    pub(crate) fn takes(&self, len: usize) -> bool {
        (ETHERNET_HEADER..=self.mtu as usize + ETHERNET_HEADER + VLAN_TAG).contains(&len)
    }
}

/// All devices and everything that is between them.
#[derive(Debug, Default)]
pub(crate) struct Network {
    /// By index.
    pub(crate) devices: BTreeMap<u32, Device>,
    /// Packets on the wire, in order of arrival.
    pub(crate) wire: VecDeque<Arrival>,
}

impl Network {
    /// The index of a device by its name.
    pub(crate) fn index_of(&self, name: &str) -> Result<u32, Errno> {
        let found = self.devices.iter().find(|(_, device)| device.name == name);
        found.map(|(&index, _)| index).ok_or(Errno::NODEV)
    }

    /// A device by its name.
    pub(crate) fn named(&mut self, name: &str) -> Result<&mut Device, Errno> {
        self.devices.values_mut().find(|device| device.name == name).ok_or(Errno::NODEV)
    }

    /// Whether there is a link between a device and the one at the other end.
    fn is_running(&self, device: &Device) -> bool {
        device.works() && self.devices.get(&device.peer).is_some_and(Device::works)
    }

    /// Whether a link is away for a number of steps.
    pub(crate) fn is_resetting(&self) -> bool {
        self.devices.values().any(Device::is_resetting)
    }

    /// A step of those that links are away for. Whether there was one.
    pub(crate) fn step_resets(&mut self) -> bool {
        let mut happened = false;
        for device in self.devices.values_mut().filter(|device| device.is_resetting()) {
            device.resetting -= 1;
            happened = true;
        }
        happened
    }

    /// Puts a packet on the wire of device `from`; `false` when the device drops it.
    ///
    /// The sender's queue decides on which queue it arrives, as on veth.
    pub(crate) fn send(&mut self, from: u32, queue: u16, packet: Vec<u8>) -> bool {
        let Some(device) = self.devices.get(&from) else { return false };
        let index = device.peer;
        let Some(peer) = self.devices.get(&index) else { return false };
        if !self.is_running(device) || !peer.takes(packet.len()) {
            return false;
        }
        if let Some(device) = self.devices.get_mut(&from) {
            device.record(&packet);
        }
        self.wire.push_back(Arrival { device: index, queue: Some(queue), packet });
        true
    }

    /// What there is to tell of a device.
    pub(crate) fn describe(&self, index: u32) -> Result<InterfaceInfo, Errno> {
        let device = self.devices.get(&index).ok_or(Errno::NODEV)?;
        let queues = device.queues.len() as u32;
        let mut flags = 0;
        if device.up {
            flags |= IFF_UP;
        }
        if self.is_running(device) {
            flags |= IFF_RUNNING | IFF_LOWER_UP;
        }
        let [high, low] = (index as u16).to_be_bytes();
        let attached = device.attached.iter();
        Ok(InterfaceInfo {
            index,
            name: device.name.clone(),
            flags,
            mtu: device.mtu,
            // Locally administered.
            mac: Some([2, 0, 0, 0, high, low]),
            driver: Some("xsk-sim".to_owned()),
            channels: Some(Channels { rx: 0, tx: 0, combined: queues }),
            rx_queues: queues,
            tx_queues: queues,
            max_queues: MAX_QUEUES,
            features: Some(DriverFeatures {
                xdp: XdpFeatures::BASIC | XdpFeatures::REDIRECT,
                zc_max_segs: None,
                rx_metadata: Some(0),
                xsk: Some(0),
            }),
            attached: attached
                .map(|attachment| AttachedId {
                    mode: if attachment.generic { 2 } else { 1 },
                    id: attachment.program.id(),
                })
                .collect(),
        })
    }
}
