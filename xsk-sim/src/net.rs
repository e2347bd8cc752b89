//! Devices, their queues, and the wire between them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use xsk::abi::XdpFeatures;
use xsk::kernel::{
    AttachedId, Channels, DriverFeatures, Errno, IFF_RUNNING, IFF_UP, InterfaceInfo, XDP_FLAGS_DRV_MODE,
    XDP_FLAGS_SKB_MODE,
};

use crate::bpf::Program;
use crate::pool::PoolId;

/// Bytes of an Ethernet header.
pub(crate) const ETHERNET_HEADER: usize = 14;
/// Bytes of a VLAN tag, which a device lets pass beyond its MTU.
const VLAN_TAG: usize = 4;

/// Packets that were recorded, shared with who records.
pub(crate) type Tap = Mutex<Vec<Vec<u8>>>;

/// A simulated network device: one end of a wire, like a veth.
#[derive(Debug)]
pub(crate) struct Device {
    name: String,
    mtu: u32,
    pub(crate) up: bool,
    /// The index of the device at the other end.
    peer: u32,
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
    pub(crate) queue: u16,
    pub(crate) packet: Vec<u8>,
}

impl Device {
    /// A device that is up, of one queue, with the device `peer` at the other end.
    pub(crate) fn new(name: String, mtu: u32, peer: u32) -> Self {
        Self {
            name,
            mtu,
            up: true,
            peer,
            queues: vec![Queue::default()],
            attached: None,
            stack: Vec::new(),
            taps: Vec::new(),
        }
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

    /// Whether the wire at a device leads to another that is up.
    fn has_carrier(&self, device: &Device) -> bool {
        self.devices.get(&device.peer).is_some_and(|peer| peer.up)
    }

    /// Puts a packet on the wire of device `from`; `false` when the device drops it.
    ///
    /// The sender's queue decides on which queue it arrives, as on veth.
    pub(crate) fn send(&mut self, from: u32, queue: u16, packet: Vec<u8>) -> bool {
        let Some(device) = self.devices.get(&from) else { return false };
        let index = device.peer;
        let Some(peer) = self.devices.get(&index) else { return false };
        if !device.up || !peer.up || !peer.takes(packet.len()) {
            return false;
        }
        let queue = queue % peer.queues.len() as u16;
        if let Some(device) = self.devices.get_mut(&from) {
            device.record(&packet);
        }
        self.wire.push_back(Arrival { device: index, queue, packet });
        true
    }

    /// What there is to tell of a device.
    pub(crate) fn describe(&self, index: u32) -> Result<InterfaceInfo, Errno> {
        let device = self.devices.get(&index).ok_or(Errno::NODEV)?;
        let queues = device.queues.len() as u32;
        let mut flags = 0;
        if device.up {
            flags |= IFF_UP;
            if self.has_carrier(device) {
                flags |= IFF_RUNNING;
            }
        }
        let attached = device.attached.iter();
        Ok(InterfaceInfo {
            index,
            name: device.name.clone(),
            flags,
            mtu: device.mtu,
            // Locally administered.
            mac: Some([2, 0, 0, 0, 0, index as u8]),
            driver: Some("xsk-sim".to_owned()),
            channels: Some(Channels { rx: 0, tx: 0, combined: queues }),
            rx_queues: queues,
            tx_queues: queues,
            max_queues: queues,
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
