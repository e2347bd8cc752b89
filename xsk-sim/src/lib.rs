//! The simulated kernel: AF_XDP in process, without root and without a NIC.
//!
//! A [`Sim`] is a small machine of its own. It has two network devices, `sim0` and `sim1`, wired
//! to each other like a veth pair, and everything that an AF_XDP program asks of a kernel:
//! sockets, UMEMs, the four rings, `bind`, counters, XSKMAPs, and XDP programs, executed from their
//! eBPF instructions. [`Sim::kernel`] is what `xsk` is given in place of Linux.
//!
//! Answers are those of Linux 6.18: the same errors, found in the same order, and the same
//! counters.
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
//! - A socket's `poll` takes steps for as long as they are needed to make the socket ready. When
//!   nothing is left that could happen, a wait with a timeout is over at once, and one without
//!   ends with `EDEADLK`.
//! - A queue that was bound becomes free by a step after its socket and all mappings of its rings
//!   are gone, as Linux frees it from a work queue. A `bind` that meets such a queue fails with
//!   `EBUSY` and then frees it, so trying again is enough.
//!
//! # Descriptors
//!
//! Sockets, maps, programs and links have real descriptors (eventfds), so `poll` and `epoll` work
//! on sockets: readable is one that has packets in RX. The kernel learns that a program has taken
//! them when it is called the next time (`send`, `receive`, `poll`, a step); until then the
//! descriptor stays readable. Waiting for a descriptor takes no steps, and it is always writable.
//! A duplicate of a descriptor (`dup`) is not known to be the same object.
//!
//! # Limits
//!
//! What is not simulated is refused, never ignored:
//!
//! | what | answer |
//! |---|---|
//! | unaligned chunks, TX metadata (`XDP_UMEM_REG`, valid in all else) | `EOPNOTSUPP` |
//! | `bind` with a shared UMEM or multi-buffer, valid in all else | `EOPNOTSUPP` |
//! | `bind` with `XDP_ZEROCOPY` | `EOPNOTSUPP`, as from a driver that lacks it |
//! | a descriptor of TX with `XDP_PKT_CONTD` | an invalid descriptor |
//! | a ring of more than 2^24 entries | `ENOMEM` |
//! | options of `SOL_SOCKET`, but for `SO_ERROR` and `SO_BINDTODEVICE` | `ENOPROTOOPT` |
//! | maps other than the XSKMAP | `EINVAL` |
//! | helpers other than `bpf_map_lookup_elem` and `bpf_redirect_map`, atomics, calls between functions | `EINVAL` |
//! | flags of a program, but for `BPF_F_XDP_HAS_FRAGS` | `EINVAL` |
//! | pinning | `EOPNOTSUPP` |
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
mod pool;
#[allow(unsafe_code)]
mod ring;
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

/// The smallest MTU of an Ethernet device that speaks IPv4.
const MIN_MTU: u32 = 68;
/// The largest MTU of which every packet fits a page with what the kernel puts around it, as on
/// veth: larger ones need multi-buffer.
const MAX_MTU: u32 = 3502;

/// A simulated kernel, with two devices that are wired to each other.
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
        Self::with_devices(["sim0".to_owned(), "sim1".to_owned()], 1500)
    }

    /// A kernel with other devices.
    pub fn builder() -> Builder {
        Builder { names: ["sim0".to_owned(), "sim1".to_owned()], mtu: 1500 }
    }

    fn with_devices([first, second]: [String; 2], mtu: u32) -> Self {
        let mut state = State::default();
        state.net.devices.insert(1, Device::new(first, mtu, 2));
        state.net.devices.insert(2, Device::new(second, mtu, 1));
        Self { state: Arc::new(Mutex::new(state)) }
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

    /// Puts a packet on the wire to a device. It arrives at a step, on queue 0.
    ///
    /// `ENODEV` for an unknown device, `EMSGSIZE` for a packet that no wire would bring: shorter
    /// than an Ethernet header, or longer than the MTU with a header and a VLAN tag.
    pub fn inject(&self, device: &str, packet: &[u8]) -> Result<(), Errno> {
        self.with(|state| {
            let index = state.net.index_of(device)?;
            if !state.net.devices[&index].takes(packet.len()) {
                return Err(Errno::MSGSIZE);
            }
            state.net.wire.push_back(Arrival { device: index, queue: 0, packet: packet.to_vec() });
            Ok(())
        })
    }

    /// One thing happens: a packet arrives, or a queue becomes free. `false` when nothing is left.
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

    /// Switches a device on or off. Packets that arrive at one that is off are lost, and what is
    /// sent to it is dropped by the sender.
    ///
    /// `ENODEV` for an unknown device.
    pub fn set_up(&self, device: &str, up: bool) -> Result<(), Errno> {
        self.with(|state| {
            state.net.named(device)?.up = up;
            Ok(())
        })
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

    /// Works on the state, and drops what became garbage when the lock is free again.
    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let result = f(&mut state);
        let dead = core::mem::take(&mut state.dead);
        drop(state);
        drop(dead);
        result
    }
}

/// Makes a [`Sim`] whose devices differ from the usual.
#[derive(Clone, Debug)]
pub struct Builder {
    names: [String; 2],
    mtu: u32,
}

impl Builder {
    /// The names of the two devices.
    #[must_use]
    pub fn names(self, first: &str, second: &str) -> Self {
        Self { names: [first.to_owned(), second.to_owned()], ..self }
    }

    /// The largest packet without its Ethernet header, in bytes; the same for both devices.
    #[must_use]
    pub fn mtu(self, mtu: u32) -> Self {
        Self { mtu, ..self }
    }

    /// The kernel.
    ///
    /// `EINVAL` for names that no interface can have (empty, longer than 15 bytes, with a slash,
    /// a colon or white space, or the same twice), and for an MTU below 68 or above 3502, where
    /// multi-buffer would begin.
    pub fn build(self) -> Result<Sim, Errno> {
        let valid = |name: &String| {
            !matches!(name.as_str(), "" | "." | "..")
                && name.len() < 16
                && !name.contains(|c: char| matches!(c, '/' | ':' | '\0') || c.is_whitespace())
        };
        let distinct = self.names[0] != self.names[1];
        if !distinct || !self.names.iter().all(valid) || !(MIN_MTU..=MAX_MTU).contains(&self.mtu) {
            return Err(Errno::INVAL);
        }
        Ok(Sim::with_devices(self.names, self.mtu))
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
