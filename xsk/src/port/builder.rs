//! Opens a port: sockets on its queues, a UMEM if it is not given one, and the program.

use core::ops::{Range, RangeFrom, RangeInclusive};
use core::time::Duration;
use std::sync::Arc;

use super::lane::Lane;
use super::link::{Link, State};
use super::statistics::Monitor;
use super::{BATCH, Port, Shared};
use crate::abi::{TX_BATCH_SIZE, XDP_PACKET_HEADROOM};
use crate::device::Device;
use crate::error::{Cause, Doing, Error, Result};
use crate::socket::{Mode, Socket};
use crate::umem::{Pool, Umem};
use crate::xdp::{AttachMode, DefaultProgram, Steering};

/// Which queues of an interface a port has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Queues {
    /// All of them, and those that it gets while the port is open.
    #[default]
    All,
    /// These.
    Some(Vec<u32>),
    /// From this one to the last.
    From(u32),
}

impl From<Range<u32>> for Queues {
    fn from(queues: Range<u32>) -> Self {
        Self::Some(queues.collect())
    }
}

impl From<RangeInclusive<u32>> for Queues {
    fn from(queues: RangeInclusive<u32>) -> Self {
        Self::Some(queues.collect())
    }
}

impl From<RangeFrom<u32>> for Queues {
    fn from(queues: RangeFrom<u32>) -> Self {
        Self::From(queues.start)
    }
}

impl<const N: usize> From<[u32; N]> for Queues {
    fn from(queues: [u32; N]) -> Self {
        Self::Some(queues.into())
    }
}

impl From<Vec<u32>> for Queues {
    fn from(queues: Vec<u32>) -> Self {
        Self::Some(queues)
    }
}

/// Opens a [`Port`].
#[derive(Clone, Debug)]
#[must_use = "nothing is opened before `open`"]
pub struct PortBuilder {
    device: Device,
    queues: Queues,
    umem: Option<Umem>,
    steering: Option<Steering>,
    attach: AttachMode,
    link_patience: Duration,
    pub(super) how: How,
}

/// How a port's sockets are opened, for those that come later as well.
#[derive(Clone, Copy, Debug)]
pub(super) struct How {
    pub(super) ring: u32,
    /// Entries of RX, where they are fewer than those of the other rings.
    rx: Option<u32>,
    pub(super) batch: u32,
    mode: Mode,
    need_wakeup: bool,
    release_timeout: Duration,
    /// Packets are received, so FILL is filled.
    receives: bool,
}

impl PortBuilder {
    pub(super) fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            queues: Queues::All,
            umem: None,
            steering: Some(Steering::all()),
            attach: AttachMode::Best,
            link_patience: Duration::from_secs(10),
            how: How {
                ring: 2048,
                rx: None,
                batch: BATCH,
                mode: Mode::Any,
                need_wakeup: true,
                release_timeout: Duration::from_secs(1),
                receives: true,
            },
        }
    }

    /// Which queues (default all): `[0, 3]`, `0..4`, `2..`, or [`Queues`].
    pub fn queues(mut self, queues: impl Into<Queues>) -> Self {
        self.queues = queues.into();
        self
    }

    /// One queue.
    pub fn queue(self, queue: u32) -> Self {
        self.queues([queue])
    }

    /// Memory that is there already, as of [another port](Port::umem), between whose queues packets
    /// then go without a copy. The port takes its share of frames from the UMEM's depot: twice
    /// [`ring_size`](Self::ring_size) for each queue, or what there is.
    ///
    /// Without this the port makes a UMEM of that size, with chunks of 2048 bytes where packets of the
    /// interface's MTU fit them, and else of 4096. Whoever brings memory minds that himself: of a chunk,
    /// 256 bytes are headroom, and igb, igc and ixgbe receive in zero copy into whole KiB of the rest,
    /// which is 1024 bytes of a chunk of 2048; longer packets come in pieces or not at all.
    pub fn umem(mut self, umem: &Umem) -> Self {
        self.umem = Some(umem.clone());
        self
    }

    /// Which packets are received (default all). The others go on to the Linux stack.
    pub fn steering(mut self, steering: Steering) -> Self {
        self.steering = Some(steering);
        self
    }

    /// Attaches no program: packets arrive only if somebody else's program sends them here, and
    /// sockets are not entered in any map.
    pub fn no_program(mut self) -> Self {
        self.steering = None;
        self
    }

    /// Receives nothing: attaches no program, and keeps all frames for sending. This needs
    /// `CAP_NET_RAW` alone. Some drivers want a program to send in zero copy: with
    /// [`steering`](Self::steering) after this there is one, which leaves all packets to Linux.
    pub fn send_only(mut self) -> Self {
        self.how.receives = false;
        self.no_program()
    }

    /// How the program is attached (default native where the driver can, else generic).
    pub fn attach_mode(mut self, mode: AttachMode) -> Self {
        self.attach = mode;
        self
    }

    /// Copy, zero copy, or whichever the driver can (the default).
    pub fn mode(mut self, mode: Mode) -> Self {
        self.how.mode = mode;
        self
    }

    /// Entries of each of the four rings of each queue, a power of two (default 2048).
    ///
    /// A port has twice as many frames for each queue: 8 MiB with the default, where frames have 2048
    /// bytes.
    ///
    /// With igb in zero copy RX has half as many, and 1024 are the least that should be asked for: when
    /// FILL runs dry that driver stops for good, so it must hold more than RX and the NIC do. For the
    /// same reason a program leaves some frames free there when it keeps packets.
    pub fn ring_size(mut self, entries: u32) -> Self {
        self.how.ring = entries;
        self
    }

    /// Packets that a call handles at most on each queue (default 64).
    pub fn batch(mut self, packets: u32) -> Self {
        self.how.batch = packets.max(1);
        self
    }

    /// Whether the kernel tells when it needs to be woken (on by default); see
    /// [`SocketBuilder::need_wakeup`](crate::socket::SocketBuilder::need_wakeup).
    pub fn need_wakeup(mut self, on: bool) -> Self {
        self.how.need_wakeup = on;
        self
    }

    /// How long to try a queue that is busy (default one second).
    pub fn release_timeout(mut self, timeout: Duration) -> Self {
        self.how.release_timeout = timeout;
        self
    }

    /// How long to wait for a link that opening the port has reset (default ten seconds), as drivers
    /// do for a program or a zero-copy socket. What came of it is an [`Event`](super::Event).
    pub fn link_patience(mut self, patience: Duration) -> Self {
        self.link_patience = patience;
        self
    }

    /// Opens the port.
    ///
    /// # Errors
    ///
    /// As [`UmemBuilder::build`](crate::umem::UmemBuilder::build),
    /// [`SocketBuilder::open`](crate::socket::SocketBuilder::open) and
    /// [`DefaultProgram::attach_with`]; nothing is left open then. [`Cause::NoSuchQueue`] for a queue
    /// that is not there, or no queue at all.
    pub fn open(self) -> Result<Port> {
        let umem = match self.umem.clone() {
            Some(umem) => umem,
            None => {
                let need = self.need()?;
                make_umem(need.frames, need.chunk)?
            }
        };
        self.open_on(umem)
    }

    pub(super) fn open_each<const N: usize>(builders: [Self; N]) -> Result<[Port; N]> {
        let (mut frames, mut chunk) = (0, 0);
        for builder in &builders {
            let need = builder.need()?;
            frames += need.frames;
            chunk = chunk.max(need.chunk);
        }
        let umem = make_umem(frames, chunk)?;
        let ports = builders.map(|builder| builder.open_on(umem.clone()));
        let mut open = Vec::with_capacity(N);
        for port in ports {
            open.push(port?);
        }
        Ok(open.try_into().unwrap_or_else(|_| unreachable!("as many as builders")))
    }

    /// The queues, in order and each once.
    fn numbers(&self, has: u32) -> Result<Vec<u32>> {
        let mut queues = match &self.queues {
            Queues::All => (0..has).collect(),
            Queues::Some(queues) => queues.clone(),
            Queues::From(first) if *first >= has => vec![*first],
            Queues::From(first) => (*first..has).collect(),
        };
        queues.sort_unstable();
        queues.dedup();
        match queues.last() {
            Some(last) if *last < has => Ok(queues),
            last => {
                let queue = last.copied().unwrap_or(0);
                let doing = Doing::Bind { interface: self.device.name().into(), queue };
                let cause = match last {
                    Some(_) => Cause::NoSuchQueue { queue, queues: has },
                    None => Cause::NoQueues,
                };
                Err(Error::new(doing, cause))
            }
        }
    }

    fn need(&self) -> Result<Need> {
        let info = self.device.info()?;
        let queues = self.numbers(info.queues())?.len() as u32;
        // The Ethernet header and two VLAN tags.
        const HEADERS: u32 = 14 + 8;
        let room = match info.driver() {
            Some(driver) if self.how.mode != Mode::Copy => zero_copy_room(driver, 2048),
            _ => 2048 - XDP_PACKET_HEADROOM,
        };
        let fits = info.mtu().saturating_add(HEADERS) <= room;
        let frames = queues.saturating_mul(self.how.share());
        Ok(Need { frames, chunk: if fits { 2048 } else { 4096 } })
    }

    fn open_on(mut self, umem: Umem) -> Result<Port> {
        let before = self.device.info()?;
        if self.how.mode != Mode::Copy && before.driver().is_some_and(must_not_starve) {
            self.how.rx = Some(self.how.ring.div_ceil(2));
        }
        let queues = self.numbers(before.queues())?;
        let mut pool = umem.pool();
        pool.fetch(queues.len() * self.how.share() as usize);
        let mut lanes = Vec::with_capacity(queues.len());
        let tx_queues = before.tx_queues();
        let attached = self.how.open_all(&self.device, &queues, tx_queues, &umem, &mut pool, &mut lanes);
        let attached = attached.and_then(|()| match &self.steering {
            Some(steering) => DefaultProgram::attach_with(&self.device, steering, self.attach).map(Some),
            None => Ok(None),
        });
        let program = match attached {
            Ok(program) => program,
            Err(error) => {
                // The frames are the caller's again.
                lanes.into_iter().for_each(|lane| lane.undo_into(&mut pool));
                return Err(error);
            }
        };
        // A socket without frames would swallow what arrives.
        if let Some(program) = program.as_ref().filter(|_| self.how.receives) {
            for lane in &lanes {
                program.insert(lane.socket())?;
            }
        }
        let mut link = Link::watch(&self.device, lanes.first().map(Lane::socket))?;
        link.wait_for_reset(State::of(&before), self.link_patience);
        let monitor = Monitor::new();
        for lane in &lanes {
            monitor.add(lane);
        }
        let grows = self.queues == Queues::All;
        let shared = Shared { device: self.device, umem, program, monitor, how: self.how };
        Ok(Port::new(lanes, pool, Arc::new(shared), link, grows))
    }
}

/// What a port needs of a UMEM.
struct Need {
    frames: u32,
    /// Bytes of a chunk.
    chunk: u32,
}

/// Bytes of a packet that a driver receives into a chunk in zero copy.
///
/// Some NICs have their buffers in whole KiB, and their drivers round down. What is longer does not
/// come as an error: igb and igc yield its pieces as packets, ixgbe drops it.
fn zero_copy_room(driver: &str, chunk: u32) -> u32 {
    let room = chunk - XDP_PACKET_HEADROOM;
    match driver {
        "igb" | "igc" | "ixgbe" => room & !1023,
        _ => room,
    }
}

/// Whether a zero-copy driver goes astray where FILL runs dry.
///
/// igb does (seen on 6.18). Where RX and TX have interrupts of their own, which is so with few
/// queues, the wake-up for FILL reaches TX's: with its descriptors used up, the driver sleeps for
/// good. And where FILL has fewer frames than it asks for, it may take an old descriptor for a packet
/// and hand a frame out twice.
///
/// A program that is too slow runs FILL dry by leaving its frames in RX. So RX gets fewer entries than
/// FILL: then it is full first, and the driver drops packets and uses their frames again. What remains
/// in FILL must be enough for the NIC's own ring (256 descriptors, unless `ethtool -G` made it larger).
fn must_not_starve(driver: &str) -> bool {
    driver == "igb"
}

fn make_umem(frames: u32, chunk: u32) -> Result<Umem> {
    // The pool gives its frames to the depot, where the ports take them.
    Umem::builder().frames(frames).chunk_size(chunk).build().map(|(umem, _)| umem)
}

impl How {
    /// Frames for a queue: to fill FILL, and as many to send.
    pub(super) fn share(&self) -> u32 {
        self.ring.saturating_mul(2)
    }

    /// Of these, those for FILL.
    fn full(&self) -> u32 {
        if self.receives { self.ring } else { 0 }
    }

    /// The others.
    pub(super) fn spare(&self) -> u32 {
        self.share() - self.full()
    }

    /// Opens the sockets of all queues.
    fn open_all(
        &self,
        device: &Device,
        queues: &[u32],
        tx_queues: u32,
        umem: &Umem,
        pool: &mut Pool,
        lanes: &mut Vec<Lane>,
    ) -> Result<()> {
        for &queue in queues {
            lanes.push(self.open(device, queue, tx_queues, self.full(), umem, pool)?);
        }
        Ok(())
    }

    /// Frames for FILL of one of `queues` that are opened later, where a pool has `frames`: half of
    /// them are left to send. `None` where that is too few to be of use.
    pub(super) fn later(&self, frames: usize, queues: usize) -> Option<u32> {
        let full = self.full().min((frames / (2 * queues)) as u32);
        (full >= (self.full() / 4).min(self.batch)).then_some(full)
    }

    /// Opens a queue's socket, with `full` frames in FILL.
    pub(super) fn open(
        &self,
        device: &Device,
        queue: u32,
        tx_queues: u32,
        full: u32,
        umem: &Umem,
        pool: &mut Pool,
    ) -> Result<Lane> {
        let had = pool.len();
        let xsk = Socket::builder(device)
            .queue(queue)
            .ring_size(self.ring)
            .rx_size(self.rx.unwrap_or(self.ring))
            .mode(self.mode)
            .need_wakeup(self.need_wakeup)
            .release_timeout(self.release_timeout)
            .fill_from(pool, full)
            .open(umem)?;
        // In copy mode a call sends 32 packets unless told otherwise. Kernels before 6.17 can't be
        // told, and what is left goes with the next call.
        let _ = xsk.socket.set_tx_budget(self.batch.clamp(TX_BATCH_SIZE, self.ring.max(TX_BATCH_SIZE)));
        let filled = (had - pool.len()) as u32;
        Ok(Lane::new(xsk, full, filled, tx_queues))
    }
}
