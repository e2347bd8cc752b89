//! The simulated kernel: AF_XDP in process, without root and without a NIC.
//!
//! A [`Sim`] is a small machine of its own. It has two network devices, `sim0` and `sim1`, wired
//! to each other like a veth pair, or any number of such pairs ([`Builder::pair`]), of as many
//! queues as are wanted; and everything that an AF_XDP program asks of a kernel: sockets, UMEMs,
//! the four rings, `bind`, counters, XSKMAPs, and XDP programs, executed from their eBPF
//! instructions. [`Sim::kernel`] is what `xsk` is given in place of Linux.
//!
//! Answers are those of Linux 6.18 for veth in copy mode: the same errors, found in the same order,
//! and the same counters.
//!
//! # Queues
//!
//! Every queue of a device both receives and sends. Where a packet arrives depends on where it comes
//! from:
//!
//! - What a socket sends from queue *q* arrives at the other end of the wire on queue *q*, modulo the
//!   queues there, as on veth: the sender's queue decides. So does what a program sends back
//!   (`XDP_TX`) after it came in on queue *q*.
//! - What a test injects ([`Sim::inject`]) arrives where a NIC would put it by receive-side scaling:
//!   the Toeplitz hash, with Microsoft's key, of the IPv4 or IPv6 addresses, and of the ports where
//!   TCP or UDP follows at once and the packet is no fragment; one or more VLAN tags may come
//!   before. The lower 7 bits of the hash choose one of 128 entries of a table whose entries name
//!   the queues in turn. A packet that has no hash arrives on queue 0. [`Sim::receive_queue`] tells
//!   the queue, and [`Sim::inject_on`] takes another.
//!
//! One UMEM can serve several queues and devices (`XDP_SHARED_UMEM`), and several sockets one queue.
//!
//! # Links
//!
//! A device can be switched off ([`Sim::set_up`]), lose its carrier ([`Sim::set_carrier`]), get other
//! queues ([`Sim::set_queues`]) or another MTU ([`Sim::set_mtu`]), or be removed ([`Sim::remove`]);
//! each end of a wire by itself. The link of a wire is there while both ends are on and have carrier.
//! Devices can be made to lose it whenever a socket is bound or a program attached, as many NICs do
//! in zero copy: [`Builder::reset_on_bind`]. Every change of what there is to tell of a device makes
//! the watches over it readable.
//!
//! # Time
//!
//! The simulator is stepped: no thread runs in it, and what happens depends on the calls alone.
//!
//! - `send` transmits in the call, as in copy mode on Linux: packets go onto the wire and their
//!   frames to COMPLETION.
//! - A packet on the wire stays there until a step ([`Sim::step`], [`Sim::run`]) has it arrive:
//!   then the device's program runs, and the packet ends in RX, in the stack, back on the wire, or
//!   nowhere.
//! - `poll`, on one socket or on several descriptors, takes steps for as long as they are needed to
//!   make one ready. When nothing is left that could happen, a wait with a timeout is over at once,
//!   and one without ends with `EDEADLK`; one for a socket alone that is not bound, or whose device
//!   is off, with `POLLERR`.
//! - Where a descriptor is waited for that is not this kernel's (a pipe, a timer), something can
//!   always happen: then the wait sleeps in the real `poll`, until that descriptor is ready, another
//!   thread has something happen here, or the time is really over.
//! - A link that a reset took away comes back after its number of steps, and those steps are taken
//!   also when nothing else is left to happen.
//! - A queue that was bound becomes free by a step after its socket and all mappings of its rings
//!   are gone, as Linux frees it from a work queue. A `bind` that meets such a queue fails with
//!   `EBUSY` and then frees it, so trying again is enough.
//!
//! # Descriptors
//!
//! Sockets, watches, maps, programs and links have real descriptors (eventfds), so the real `poll`
//! and `epoll` work on them: readable is a socket that has packets in RX, and a watch over a device
//! that changed. The kernel learns that a program has taken
//! them when it is called the next time (`send`, `receive`, `poll`, a step); until then the
//! descriptor stays readable. Waiting for a descriptor so takes no steps, and it is always writable.
//! A duplicate of a descriptor (`dup`) is not known to be the same object.
//!
//! # Limits
//!
//! What is not simulated is refused, never ignored:
//!
//! | what | answer |
//! |---|---|
//! | unaligned chunks, TX metadata (`XDP_UMEM_REG`, valid in all else) | `EOPNOTSUPP` |
//! | `bind` with multi-buffer (`XDP_USE_SG`), valid in all else | `EOPNOTSUPP` |
//! | `bind` with `XDP_ZEROCOPY` | `EOPNOTSUPP`, as from a driver that lacks it |
//! | a descriptor of TX with `XDP_PKT_CONTD` | an invalid descriptor |
//! | a ring of more than 2^24 entries | `ENOMEM` |
//! | options of `SOL_SOCKET`, but for `SO_ERROR` and `SO_BINDTODEVICE` | `ENOPROTOOPT` |
//! | maps other than the XSKMAP | `EINVAL` |
//! | helpers other than `bpf_map_lookup_elem` and `bpf_redirect_map`, atomics, calls between functions | `EINVAL` |
//! | flags of a program, but for `BPF_F_XDP_HAS_FRAGS` | `EINVAL` |
//! | pinning | `EOPNOTSUPP` |
//!
//! Unlike veth, a device takes a native program and other numbers of queues whatever the other end
//! has, and lives on when the other end is removed.
//!
//! There are no limits of memory, and no rights to lack. An index in a ring that contradicts the
//! ring's size shows the kernel nothing; Linux would read stale entries. There is no verifier:
//! what it would refuse to load aborts here when it happens (`XDP_ABORTED`).
//!
//! # Other kernels
//!
//! Older kernels, and kernels that break their promises, are played by a wrapper: see [`wrap`].
//!
//! # Example
//!
//! ```
//! let sim = xsk_sim::Sim::new();
//! // Without an XDP program everything goes to the Linux stack.
//! sim.inject("sim0", &[0; 60])?;
//! assert!(sim.stack("sim0")?.is_empty());
//! assert_eq!(sim.run(), 1);
//! assert_eq!(sim.stack("sim0")?, [[0; 60]]);
//! # Ok::<(), xsk::kernel::Errno>(())
//! ```
#![deny(unsafe_code)]

mod bpf;
#[allow(unsafe_code)]
mod files;
#[allow(unsafe_code)]
mod kernel;
mod net;
mod poll;
mod pool;
#[allow(unsafe_code)]
mod ring;
mod rss;
mod socket;
mod state;
#[allow(unsafe_code)]
mod umem;
#[allow(unsafe_code)]
pub mod wrap;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use xsk::kernel::{Errno, Kernel};

use crate::net::{Arrival, Device, Tap};
use crate::state::State;

/// Bytes of a page, as the simulated machine has them.
const PAGE_SIZE: usize = 4096;

/// A simulated kernel, with pairs of devices that are wired to each other.
///
/// A clone is another handle of the same kernel, which lives as long as any handle, socket, map,
/// program, link or mapped ring of it.
#[derive(Clone)]
pub struct Sim {
    state: Arc<Mutex<State>>,
}

impl fmt::Debug for Sim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sim").finish_non_exhaustive()
    }
}

impl Default for Sim {
    fn default() -> Self {
        Self::new()
    }
}

impl Sim {
    /// A kernel with the devices `sim0` and `sim1`, of one queue and MTU 1500 each, both up.
    pub fn new() -> Self {
        Self::builder().build().expect("the usual devices are valid")
    }

    /// A kernel with other devices.
    pub fn builder() -> Builder {
        Builder { pairs: vec![["sim0".to_owned(), "sim1".to_owned()]], mtu: 1500, queues: 1, reset_steps: 0 }
    }

    /// The kernel, as `xsk` takes it.
    pub fn kernel(&self) -> Arc<dyn Kernel> {
        Arc::new(self.clone())
    }

    /// One of the devices, as a program opens it: in place of `xsk::Device::open`.
    ///
    /// # Errors
    ///
    /// [`xsk::Cause::NoSuchInterface`].
    pub fn device(&self, name: &str) -> xsk::Result<xsk::Device> {
        xsk::Device::open_on(self.kernel(), name)
    }

    /// Puts a packet on the wire to a device. It arrives at a step, on the queue that its
    /// [hash](crate#queues) says.
    ///
    /// `ENODEV` for an unknown device, `EMSGSIZE` for a packet that no wire would bring: shorter
    /// than an Ethernet header, or longer than the MTU with a header and a VLAN tag.
    pub fn inject(&self, device: &str, packet: &[u8]) -> Result<(), Errno> {
        self.put_on_wire(device, None, packet)
    }

    /// Puts a packet on the wire to a device, to arrive on a queue of your choice.
    ///
    /// `EINVAL` for a queue that the device does not have, else as [`inject`](Self::inject). If the
    /// queue is gone when the packet arrives, it goes to the queue of its number modulo those left.
    pub fn inject_on(&self, device: &str, queue: u32, packet: &[u8]) -> Result<(), Errno> {
        self.put_on_wire(device, Some(queue), packet)
    }

    fn put_on_wire(&self, name: &str, queue: Option<u32>, packet: &[u8]) -> Result<(), Errno> {
        self.with(|state| {
            let index = state.net.index_of(name)?;
            let device = &state.net.devices[&index];
            if queue.is_some_and(|queue| queue as usize >= device.queues.len()) {
                return Err(Errno::INVAL);
            }
            if !device.takes(packet.len()) {
                return Err(Errno::MSGSIZE);
            }
            let queue = queue.map(|queue| queue as u16);
            state.net.wire.push_back(Arrival { device: index, queue, packet: packet.to_vec() });
            Ok(())
        })
    }

    /// The queue on which a packet would arrive at a device, by its [hash](crate#queues).
    ///
    /// `ENODEV` for an unknown device.
    pub fn receive_queue(&self, device: &str, packet: &[u8]) -> Result<u32, Errno> {
        self.with(|state| Ok(state.net.named(device)?.queue_of(None, packet).into()))
    }

    /// One thing happens: a packet arrives, a queue becomes free, or a link that a reset took away
    /// comes a step nearer. `false` when nothing is left.
    pub fn step(&self) -> bool {
        self.with(|state| {
            state.sockets.values_mut().for_each(|socket| socket.settle());
            state.step()
        })
    }

    /// Steps until nothing is left to happen, and tells how many they were.
    ///
    /// Packets that programs at both ends send back to each other (`XDP_TX`) never come to rest;
    /// then this does not return.
    pub fn run(&self) -> usize {
        core::iter::from_fn(|| self.step().then_some(())).count()
    }

    /// Takes the packets that went on to the Linux stack of a device (`XDP_PASS`, or no program).
    ///
    /// They are kept until they are taken. `ENODEV` for an unknown device.
    pub fn stack(&self, device: &str) -> Result<Vec<Vec<u8>>, Errno> {
        self.with(|state| Ok(core::mem::take(&mut state.net.named(device)?.stack)))
    }

    /// Records the packets that leave a device on its wire from now on.
    ///
    /// `ENODEV` for an unknown device.
    pub fn capture(&self, device: &str) -> Result<Capture, Errno> {
        let tap = Arc::new(Tap::default());
        self.with(|state| {
            state.net.named(device)?.taps.push(Arc::downgrade(&tap));
            Ok(Capture { tap })
        })
    }

    /// Switches a device on or off (`ip link set up`). Sockets on one that is off are told `ENETDOWN`
    /// and keep what is in their rings; packets that arrive at it are lost, and what is sent to it is
    /// dropped by the sender (`EBUSY`). Switched on again, it goes on.
    ///
    /// `ENODEV` for an unknown device.
    pub fn set_up(&self, device: &str, up: bool) -> Result<(), Errno> {
        self.with(|state| {
            state.net.named(device)?.up = up;
            Ok(())
        })
    }

    /// Takes the carrier away from a device, as when its cable is pulled, or gives it back. Without
    /// it, neither end of the wire has a link (`IFF_RUNNING`): what either sends is dropped (`EBUSY`),
    /// and what arrives at this device is lost.
    ///
    /// `ENODEV` for an unknown device.
    pub fn set_carrier(&self, device: &str, carrier: bool) -> Result<(), Errno> {
        self.with(|state| {
            state.net.named(device)?.carrier = carrier;
            Ok(())
        })
    }

    /// Changes how many queues a device has (`ethtool -L`), its peer's aside.
    ///
    /// `ENODEV` for an unknown device, `EINVAL` for a number that [`Builder::queues`] refuses, and
    /// when a socket is bound to a queue that would go. As with `bind`, a queue that only waits to
    /// become free does so then: trying again is enough.
    pub fn set_queues(&self, device: &str, queues: u32) -> Result<(), Errno> {
        self.with(|state| {
            let changed = state.net.named(device)?.set_queues(queues);
            if changed.is_err() {
                state.release_pools();
            }
            changed
        })
    }

    /// Changes the MTU of a device (`ip link set mtu`), its peer's aside. What arrives may be as
    /// long as the MTU of the device where it arrives.
    ///
    /// `ENODEV` for an unknown device, `EINVAL` for an MTU that [`Builder::mtu`] refuses.
    pub fn set_mtu(&self, device: &str, mtu: u32) -> Result<(), Errno> {
        self.with(|state| state.net.named(device)?.set_mtu(mtu))
    }

    /// Removes a device for ever, as when a NIC is unplugged: sockets that are bound to it lose it
    /// (`SO_ERROR` tells `ENETDOWN`), its program is detached, packets on their way to it are lost.
    ///
    /// `ENODEV` for an unknown device.
    pub fn remove(&self, device: &str) -> Result<(), Errno> {
        self.with(|state| {
            let index = state.net.index_of(device)?;
            state.remove_device(index);
            Ok(())
        })
    }

    /// Works on the state, tells who waits for changes, and drops what became garbage when the lock is free again.
    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let result = f(&mut state);
        state.tell();
        let dead = core::mem::take(&mut state.dead);
        drop(state);
        drop(dead);
        result
    }
}

/// Makes a [`Sim`] whose devices differ from the usual.
#[derive(Clone, Debug)]
pub struct Builder {
    pairs: Vec<[String; 2]>,
    mtu: u32,
    queues: u32,
    reset_steps: u32,
}

impl Builder {
    /// The names of the first two devices, which are `sim0` and `sim1` otherwise.
    #[must_use]
    pub fn names(mut self, first: &str, second: &str) -> Self {
        self.pairs[0] = [first.to_owned(), second.to_owned()];
        self
    }

    /// Two devices more, wired to each other.
    #[must_use]
    pub fn pair(mut self, first: &str, second: &str) -> Self {
        self.pairs.push([first.to_owned(), second.to_owned()]);
        self
    }

    /// The largest packet without its Ethernet header, in bytes (default 1500), of every device:
    /// [`Sim::set_mtu`] changes it for one.
    #[must_use]
    pub fn mtu(self, mtu: u32) -> Self {
        Self { mtu, ..self }
    }

    /// Queues of every device, which all receive and send (default 1): [`Sim::set_queues`] changes
    /// it for one.
    #[must_use]
    pub fn queues(self, queues: u32) -> Self {
        Self { queues, ..self }
    }

    /// Devices that start anew when a socket is bound to one of their queues or a program is attached,
    /// as NICs do in zero copy: the link is away for so many steps then (default 0), as without
    /// [carrier](Sim::set_carrier).
    #[must_use]
    pub fn reset_on_bind(self, steps: u32) -> Self {
        Self { reset_steps: steps, ..self }
    }

    /// The kernel.
    ///
    /// `EINVAL` for names that no interface can have (empty, longer than 15 bytes, with a slash,
    /// a colon or white space, or the same twice), for an MTU below 68 or above 3502, where
    /// multi-buffer would begin, and for no queues or more than 128, of which the rest would never
    /// get a packet.
    pub fn build(self) -> Result<Sim, Errno> {
        let valid = |name: &String| {
            !matches!(name.as_str(), "" | "." | "..")
                && name.len() < 16
                && !name.contains(|c: char| matches!(c, '/' | ':' | '\0') || c.is_whitespace())
        };
        let mut state = State::default();
        let net = &mut state.net;
        let mut index = 0;
        for [first, second] in self.pairs {
            for (name, from, to) in [(first, index + 1, index + 2), (second, index + 2, index + 1)] {
                if !valid(&name) || net.index_of(&name).is_ok() {
                    return Err(Errno::INVAL);
                }
                net.devices.insert(from, Device::new(name, self.mtu, self.queues, self.reset_steps, to)?);
            }
            index += 2;
        }
        Ok(Sim { state: Arc::new(Mutex::new(state)) })
    }
}

/// A recording of what leaves a device. Dropping it ends the recording.
#[derive(Debug)]
pub struct Capture {
    tap: Arc<Tap>,
}

impl Capture {
    /// Takes the packets that were recorded since the last time.
    pub fn take(&self) -> Vec<Vec<u8>> {
        core::mem::take(&mut *self.tap.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
