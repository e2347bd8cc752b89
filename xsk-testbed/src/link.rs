//! Links by netlink: making a pair, addresses, neighbours, state.
//!
//! A netlink socket belongs to the namespace of the thread that opened it, so each function here
//! works on the calling thread's. Call them inside [`Namespace::run`](crate::Namespace::run), whose
//! fresh thread also never has an async runtime that blocking would upset.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};

use futures_util::TryStreamExt as _;
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute, LinkMessage, LinkXdp, State};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth};

use crate::{End, Error, Namespace};

/// State of an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Whether it carries packets.
    pub up: bool,
    /// The largest packet without its Ethernet header, in bytes.
    pub mtu: u32,
    /// Receive queues that were allocated.
    pub rx_queues: u32,
    /// Transmit queues that were allocated.
    pub tx_queues: u32,
    /// What went through it.
    pub counters: Counters,
}

/// What went through an interface since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets dropped on receiving.
    pub rx_dropped: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets dropped on sending.
    pub tx_dropped: u64,
}

/// Runs netlink requests on the calling thread until they are answered.
fn netlink<R>(
    doing: &str,
    requests: impl AsyncFnOnce(Handle) -> Result<R, rtnetlink::Error>,
) -> Result<R, Error> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(Error::system(doing))?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(Error::system(doing))?;
        tokio::spawn(connection);
        requests(handle).await.map_err(|error| {
            let source = match error {
                rtnetlink::Error::NetlinkError(message) => message.to_io(),
                other => io::Error::other(other),
            };
            Error::System { doing: doing.into(), source }
        })
    })
}

fn with_properties<T>(link: LinkMessageBuilder<T>, end: &End, mtu: u32) -> LinkMessageBuilder<T> {
    link.name(&end.name)
        .address(end.mac.to_vec())
        .mtu(mtu)
        .append_extra_attribute(LinkAttribute::NumRxQueues(end.queues))
        .append_extra_attribute(LinkAttribute::NumTxQueues(end.queues))
}

/// Makes a veth pair: `a` here, `b` in that namespace, or here too without one.
pub(crate) fn create_pair(a: &End, b: &End, mtu: u32, namespace: Option<&Namespace>) -> Result<(), Error> {
    let mut peer = with_properties(LinkMessageBuilder::<LinkUnspec>::new(), b, mtu);
    if let Some(namespace) = namespace {
        peer = peer.setns_by_fd(namespace.as_fd().as_raw_fd());
    }
    let pair = with_properties(LinkVeth::new(&a.name, &b.name), a, mtu)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build())));
    netlink("making a veth pair", async |handle| handle.link().add(pair.build()).execute().await)
}

async fn get(handle: &Handle, name: &str) -> Result<LinkMessage, rtnetlink::Error> {
    let mut links = handle.link().get().match_name(name).execute();
    links.try_next().await?.ok_or(rtnetlink::Error::RequestFailed)
}

/// Gives an interface an address in a network of 256.
pub(crate) fn add_address(name: &str, address: Ipv4Addr) -> Result<(), Error> {
    netlink(&format!("adding {address} to {name}"), async |handle| {
        let index = get(&handle, name).await?.header.index;
        handle.address().add(index, IpAddr::V4(address), 24).execute().await
    })
}

/// Switches an interface on or off.
pub(crate) fn set_up(name: &str, up: bool) -> Result<(), Error> {
    let link = LinkUnspec::new_with_name(name);
    let link = if up { link.up() } else { link.down() };
    netlink(&format!("switching {name}"), async |handle| handle.link().set(link.build()).execute().await)
}

/// Changes an interface's MTU.
pub(crate) fn set_mtu(name: &str, mtu: u32) -> Result<(), Error> {
    let link = LinkUnspec::new_with_name(name).mtu(mtu);
    netlink(&format!("setting the MTU of {name} to {mtu}"), async |handle| {
        handle.link().set(link.build()).execute().await
    })
}

/// Attaches an XDP program without a BPF link, or with `None` detaches it.
pub(crate) fn set_program(name: &str, program: Option<BorrowedFd<'_>>) -> Result<(), Error> {
    let fd = program.map_or(-1, |program| program.as_raw_fd());
    let link =
        LinkUnspec::new_with_name(name).append_extra_attribute(LinkAttribute::Xdp(vec![LinkXdp::Fd(fd)]));
    netlink(&format!("attaching a program to {name}"), async |handle| {
        handle.link().set(link.build()).execute().await
    })
}

/// Tells the stack for good at which hardware address a neighbour is.
pub(crate) fn set_neighbour(name: &str, address: Ipv4Addr, mac: [u8; 6]) -> Result<(), Error> {
    netlink(&format!("telling {name} where {address} is"), async |handle| {
        let index = get(&handle, name).await?.header.index;
        handle.neighbours().add(index, IpAddr::V4(address)).link_layer_address(&mac).replace().execute().await
    })
}

/// Removes an interface; the other end of a pair goes with it.
pub(crate) fn delete(name: &str) -> Result<(), Error> {
    netlink(&format!("removing {name}"), async |handle| {
        let index = get(&handle, name).await?.header.index;
        handle.link().del(index).execute().await
    })
}

/// What there is to know of an interface.
pub(crate) fn link(name: &str) -> Result<Link, Error> {
    let message = netlink(&format!("reading the state of {name}"), async |handle| get(&handle, name).await)?;
    let mut link = Link { index: message.header.index, ..Link::default() };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::OperState(state) => link.up = state == State::Up,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::NumRxQueues(queues) => link.rx_queues = queues,
            LinkAttribute::NumTxQueues(queues) => link.tx_queues = queues,
            LinkAttribute::Stats64(stats) => {
                link.counters = Counters {
                    rx_packets: stats.rx_packets,
                    rx_bytes: stats.rx_bytes,
                    rx_dropped: stats.rx_dropped,
                    tx_packets: stats.tx_packets,
                    tx_bytes: stats.tx_bytes,
                    tx_dropped: stats.tx_dropped,
                };
            }
            _ => {}
        }
    }
    Ok(link)
}
