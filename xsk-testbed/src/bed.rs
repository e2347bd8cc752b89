//! The testbed itself: two ends of a veth pair in namespaces of their own.

use std::cell::Cell;
use std::fs;
use std::io;
use std::marker::PhantomData;
use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::{Channels, Error, Link, Namespace, ethtool, link};

/// How long an end may take to come up; it is a matter of milliseconds.
const COME_UP: Duration = Duration::from_secs(10);

/// The UDP port on which both ends swallow what they get (RFC 863).
pub const DISCARD: u16 = 9;

thread_local! {
    /// Whether the thread is inside a testbed. Leaving in another order than entering would strand
    /// it in the wrong namespace, so there is one at a time.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// A veth pair in private network namespaces.
///
/// The thread that built it is in the namespace of end [`a`](Self::a), and so are the threads that
/// it starts; dropping the testbed takes it back. A testbed therefore stays on its thread. What else
/// holds a namespace (a socket, a thread that still runs) keeps the pair alive until it is gone too.
#[derive(Debug)]
pub struct Testbed {
    pair: Pair,
    origin: Namespace,
    /// Dropping it moves the dropping thread, which must be the one that was moved.
    not_send: PhantomData<*const ()>,
}

/// A veth pair: that of a [`Testbed`], or one [beside](Builder::beside) it, which is gone when its
/// namespaces are.
#[derive(Debug)]
pub struct Pair {
    a: End,
    b: End,
    /// Takes what is sent to [`DISCARD`], which the stack would answer by ICMP otherwise.
    _discard: [UdpSocket; 2],
}

impl Pair {
    /// The end in the namespace of the testbed's thread.
    pub fn a(&self) -> &End {
        &self.a
    }

    /// The other end.
    pub fn b(&self) -> &End {
        &self.b
    }
}

/// One end of the pair.
///
/// It can be sent to other threads: each operation goes to the end's namespace by itself.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct End {
    /// The interface's name.
    pub name: String,
    /// Its index in its namespace.
    pub ifindex: u32,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Its IPv4 address, in a network of 256.
    pub ipv4: Ipv4Addr,
    /// An IPv6 address to make frames with. The stack doesn't have it: IPv6 is off there.
    pub ipv6: Ipv6Addr,
    /// Receive queues, and as many transmit queues.
    pub queues: u32,
    /// Where it lives.
    pub namespace: Namespace,
    /// The other end, as the stack knows it.
    neighbour: (Ipv4Addr, [u8; 6]),
}

/// What a testbed shall be.
#[derive(Clone, Copy, Debug)]
pub struct Builder {
    queues: u32,
    mtu: u32,
    single_namespace: bool,
    gro: bool,
    tx_checksum: bool,
}

impl Builder {
    /// Receive queues and transmit queues of each end; 1 unless said.
    pub fn queues(mut self, queues: u32) -> Self {
        self.queues = queues;
        self
    }

    /// MTU of both ends; 1500 unless said.
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = mtu;
        self
    }

    /// Puts both ends into one namespace, so that a program on one end can redirect to the other by
    /// its index. The stack then delivers between their addresses by itself, past the pair: only raw
    /// frames go through it.
    pub fn single_namespace(mut self, single: bool) -> Self {
        self.single_namespace = single;
        self
    }

    /// Generic receive offload on both ends; off unless said. A veth end without a native XDP program
    /// takes frames of a [`Generator`](crate::Generator) only with it.
    pub fn gro(mut self, on: bool) -> Self {
        self.gro = on;
        self
    }

    /// TX checksum offload on both ends; off unless said. With it the stack sends packets through the
    /// pair whose checksum is unfinished, and AF_XDP sees them so.
    pub fn tx_checksum(mut self, on: bool) -> Self {
        self.tx_checksum = on;
        self
    }

    /// Makes the pair and moves the calling thread next to end `a`.
    pub fn build(self) -> Result<Testbed, Error> {
        if INSIDE.get() {
            return Err(Error::Nested);
        }
        let origin = Namespace::current()?;
        let in_a = Namespace::new()?;
        let in_b = if self.single_namespace { in_a.clone() } else { Namespace::new()? };
        // Before the pair exists, so that it never says a word of IPv6.
        in_a.run(silence_ipv6)??;
        in_b.run(silence_ipv6)??;
        in_a.run(|| link::set_up("lo", true))??;
        let pair = self.pair("xsk0", "xsk1", &in_a, &in_b)?;
        in_a.enter()?;
        INSIDE.set(true);
        Ok(Testbed { pair, origin, not_send: PhantomData })
    }

    /// Makes another pair, whose end `a` is next to that of `bed`: a machine with two interfaces. Its
    /// end `b` has a namespace of its own, or that of end `a` too.
    pub fn beside(self, bed: &Testbed) -> Result<Pair, Error> {
        let in_a = &bed.a().namespace;
        let in_b = if self.single_namespace { in_a.clone() } else { Namespace::new()? };
        in_b.run(silence_ipv6)??;
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        self.pair(&format!("xsk{number}a"), &format!("xsk{number}b"), in_a, &in_b)
    }

    fn pair(self, name_a: &str, name_b: &str, in_a: &Namespace, in_b: &Namespace) -> Result<Pair, Error> {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let [x, y] = id.to_be_bytes();
        let end = |name: &str, host: u8, other: u8, namespace: &Namespace| End {
            name: name.into(),
            ifindex: 0,
            mac: [0x02, b'x', b's', x, y, host],
            ipv4: Ipv4Addr::new(10, x, y, host),
            ipv6: Ipv6Addr::new(0xfd78, 0x736b, 0, 0, 0, 0, id, host.into()),
            queues: self.queues,
            namespace: namespace.clone(),
            neighbour: (Ipv4Addr::new(10, x, y, other), [0x02, b'x', b's', x, y, other]),
        };
        let mut a = end(name_a, 1, 2, in_a);
        let mut b = end(name_b, 2, 1, in_b);

        in_a.run(|| {
            let elsewhere = (!self.single_namespace).then_some(in_b);
            link::create_pair(&a, &b, self.mtu, elsewhere)
        })??;
        for end in [&a, &b] {
            end.namespace.run(|| {
                link::add_address(&end.name, end.ipv4)?;
                ethtool::set_tx_checksum(&end.name, self.tx_checksum)
            })??;
            end.set_up(true)?;
        }
        for end in [&mut a, &mut b] {
            end.ifindex = end.wait_up()?.index;
        }
        for end in [&a, &b] {
            // Only now: an end learns that the other takes redirected frames if it is switched on
            // after that, or is on already, but not while the other was still off.
            end.set_gro(self.gro)?;
        }
        let discard = [a.discard()?, b.discard()?];
        Ok(Pair { a, b, _discard: discard })
    }
}

/// Keeps the calling thread's namespace from speaking IPv6 on its own: router solicitations,
/// multicast reports and duplicate address detection would be counted as packets.
fn silence_ipv6() -> Result<(), Error> {
    // Files of `/proc/sys/net` are those of the namespace of the thread that opens them.
    for scope in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
        match fs::write(&path, "1") {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {} // A kernel without IPv6.
            result => result.map_err(Error::system(format!("writing {path}")))?,
        }
    }
    Ok(())
}

impl Testbed {
    /// A testbed to be: one queue, MTU 1500, two namespaces.
    pub fn builder() -> Builder {
        Builder { queues: 1, mtu: 1500, single_namespace: false, gro: false, tx_checksum: false }
    }

    /// The end next to the thread that built the testbed.
    pub fn a(&self) -> &End {
        &self.pair.a
    }

    /// The other end.
    pub fn b(&self) -> &End {
        &self.pair.b
    }

    /// Runs `f` next to end [`b`](Self::b) and waits for it; if `f` panics, so does this.
    ///
    /// What `f` opens stays on that side wherever it is then used. A peer that is to run beside the
    /// test enters by itself:
    ///
    /// ```no_run
    /// # let bed = xsk_testbed::Testbed::builder().build()?;
    /// let there = bed.b().namespace.clone();
    /// let peer = std::thread::spawn(move || {
    ///     there.enter()?;
    ///     // …
    ///     Ok::<_, xsk_testbed::Error>(())
    /// });
    /// # Ok::<_, xsk_testbed::Error>(())
    /// ```
    pub fn peer<R: Send>(&self, f: impl FnOnce() -> R + Send) -> Result<R, Error> {
        self.b().namespace.run(f)
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        // This fails only if the thread gave up CAP_SYS_ADMIN meanwhile; then it stays inside, and
        // may not build another testbed on top.
        if self.origin.enter().is_ok() {
            INSIDE.set(false);
        }
    }
}

impl End {
    /// State and counters of the interface.
    pub fn link(&self) -> Result<Link, Error> {
        self.namespace.run(|| link::link(&self.name))?
    }

    /// Queues in use.
    pub fn channels(&self) -> Result<Channels, Error> {
        self.namespace.run(|| ethtool::channels(&self.name))?
    }

    /// Changes how many queues are in use; at most as many as it was made with.
    pub fn set_channels(&self, channels: Channels) -> Result<(), Error> {
        self.namespace.run(|| ethtool::set_channels(&self.name, channels))?
    }

    /// Switches generic receive offload.
    pub fn set_gro(&self, on: bool) -> Result<(), Error> {
        self.namespace.run(|| ethtool::set_gro(&self.name, on))?
    }

    /// Switches TX checksum offload: see [`Builder::tx_checksum`].
    pub fn set_tx_checksum(&self, on: bool) -> Result<(), Error> {
        self.namespace.run(|| ethtool::set_tx_checksum(&self.name, on))?
    }

    /// Changes the MTU.
    pub fn set_mtu(&self, mtu: u32) -> Result<(), Error> {
        self.namespace.run(|| link::set_mtu(&self.name, mtu))?
    }

    /// Attaches an XDP program by netlink, as `ip link set xdp` does, or with `None` detaches it. Unlike
    /// by a BPF link, it stays until it is detached.
    pub fn set_program(&self, program: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        self.namespace.run(|| link::set_program(&self.name, program))?
    }

    /// Switches the interface on or off. Packets flow when both ends are on.
    pub fn set_up(&self, up: bool) -> Result<(), Error> {
        self.namespace.run(|| {
            link::set_up(&self.name, up)?;
            // Switching off made the stack forget its neighbours.
            let (address, mac) = self.neighbour;
            if up { link::set_neighbour(&self.name, address, mac) } else { Ok(()) }
        })?
    }

    /// Waits until the interface carries packets, which is a moment after both ends were switched on.
    pub fn wait_up(&self) -> Result<Link, Error> {
        let deadline = Instant::now() + COME_UP;
        self.namespace.run(|| {
            loop {
                let link = link::link(&self.name)?;
                if link.up {
                    return Ok(link);
                }
                if Instant::now() > deadline {
                    return Err(Error::LinkDown { name: self.name.clone(), seconds: COME_UP.as_secs() });
                }
                thread::sleep(Duration::from_millis(1));
            }
        })?
    }

    /// Removes the interface, and the other end with it, as a device that is pulled out.
    pub fn delete(&self) -> Result<(), Error> {
        self.namespace.run(|| link::delete(&self.name))?
    }

    /// A UDP socket of the stack, bound to this end's address; port 0 is any free one.
    pub fn udp(&self, port: u16) -> Result<UdpSocket, Error> {
        self.namespace
            .run(|| UdpSocket::bind((self.ipv4, port)))?
            .map_err(Error::system(format!("binding {}:{port}", self.ipv4)))
    }

    /// A socket on the discard port that keeps next to nothing.
    fn discard(&self) -> Result<UdpSocket, Error> {
        let socket = self.udp(DISCARD)?;
        rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 1)
            .map_err(Error::system("making the discard socket small"))?;
        Ok(socket)
    }
}
