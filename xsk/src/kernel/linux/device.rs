//! Network interfaces by netlink.

use std::os::fd::AsFd;

use super::netlink::{GENLMSGHDR_SIZE, Netlink, Request, attributes, genlmsghdr, u32_at, u64_at};
use super::watch::LinkWatch;
use super::{Linux, ethtool, text};
use crate::abi::XdpFeatures;
use crate::kernel::{AttachedId, Devices, DriverFeatures, Errno, InterfaceInfo, Watch};

// rtnetlink: `include/uapi/linux/rtnetlink.h` and `if_link.h`.
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const IFINFOMSG_SIZE: usize = 16;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_NUM_TX_QUEUES: u16 = 31;
const IFLA_NUM_RX_QUEUES: u16 = 32;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_ATTACHED: u16 = 2;
const IFLA_XDP_PROG_ID: u16 = 4;
const IFLA_XDP_DRV_PROG_ID: u16 = 5;
const IFLA_XDP_SKB_PROG_ID: u16 = 6;
const IFLA_XDP_HW_PROG_ID: u16 = 7;
const XDP_ATTACHED_DRV: u8 = 1;
const XDP_ATTACHED_SKB: u8 = 2;
const XDP_ATTACHED_HW: u8 = 3;
/// Bytes of an interface's name, with a zero byte at the end.
const IFNAMSIZ: usize = 16;

// Family `netdev` (6.3): `include/uapi/linux/netdev.h`.
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
const NETDEV_A_DEV_XDP_ZC_MAX_SEGS: u16 = 4;
const NETDEV_A_DEV_XDP_RX_METADATA_FEATURES: u16 = 5;
const NETDEV_A_DEV_XSK_FEATURES: u16 = 6;

impl Devices for Linux {
    /// In the calling thread's network namespace; a name that no interface can have is `ENODEV`.
    fn index_of(&self, name: &str) -> Result<u32, Errno> {
        if name.is_empty() || name.len() >= IFNAMSIZ || name.contains('\0') {
            return Err(Errno::NODEV);
        }
        let mut route = Netlink::open(None)?;
        let name = [name.as_bytes(), b"\0"].concat();
        let request = Request::new(RTM_GETLINK, &ifinfomsg(0)).attribute(IFLA_IFNAME, &name);
        get_link(&mut route, &request).map(|link| link.index)
    }

    /// In the calling thread's network namespace.
    fn interface(&self, index: u32) -> Result<InterfaceInfo, Errno> {
        let mut route = Netlink::open(None)?;
        let mut link = get_link_of(&mut route, index)?;
        link.features = features(link.index)?;
        // A driver that cannot tell says so in many ways (not implemented, asleep, reset in
        // progress); none of them makes the rest less true.
        link.driver = ethtool::driver(route.as_fd(), &link.name).ok();
        link.channels = ethtool::channels(route.as_fd(), &link.name).ok();
        if let Some(channels) = link.channels {
            link.rx_queues = channels.rx.saturating_add(channels.combined);
            link.tx_queues = channels.tx.saturating_add(channels.combined);
        }
        Ok(link)
    }

    /// Those of the calling thread's network namespace.
    fn interfaces(&self) -> Result<Vec<u32>, Errno> {
        let request = Request::new(RTM_GETLINK, &ifinfomsg(0));
        let mut all = Netlink::open(None)?
            .dump(&request, |kind, body| (kind == RTM_NEWLINK).then(|| link_index(body)).flatten())?;
        // Kernels before 6.10 list them by hash.
        all.sort_unstable();
        Ok(all)
    }

    /// In the calling thread's network namespace, wherever the watch is then used. It takes no
    /// privilege.
    fn watch(&self, index: u32) -> Result<Box<dyn Watch>, Errno> {
        let watch = LinkWatch::open(index)?;
        // Only now, so that no removal falls between the look and the watch.
        get_link_of(&mut Netlink::open(None)?, index)?;
        Ok(Box::new(watch))
    }
}

/// `struct ifinfomsg` with an index: what a request about links starts with.
fn ifinfomsg(index: i32) -> [u8; IFINFOMSG_SIZE] {
    let mut body = [0; IFINFOMSG_SIZE];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body
}

fn get_link_of(route: &mut Netlink, index: u32) -> Result<InterfaceInfo, Errno> {
    // The kernel's indices are positive ints; 0 would be a question without a subject.
    let index = i32::try_from(index).ok().filter(|&index| index > 0).ok_or(Errno::NODEV)?;
    get_link(route, &Request::new(RTM_GETLINK, &ifinfomsg(index)))
}

fn get_link(route: &mut Netlink, request: &Request) -> Result<InterfaceInfo, Errno> {
    let mut link = None;
    route.get(request, |kind, body| {
        if kind == RTM_NEWLINK {
            link = parse_link(body);
        }
    })?;
    link.ok_or(Errno::BADMSG)
}

fn link_index(body: &[u8]) -> Option<u32> {
    u32_at(body, 4)
}

/// An interface as `RTM_NEWLINK` tells it, hence without driver, channels and features. `None` when
/// what every link has is missing.
fn parse_link(body: &[u8]) -> Option<InterfaceInfo> {
    let (mut name, mut mtu, mut mac, mut attached) = (None, None, None, Vec::new());
    // A kernel without receive packet steering has one receive queue and does not say so.
    let (mut rx_queues, mut tx_queues) = (1, 1);
    for (kind, payload) in attributes(body.get(IFINFOMSG_SIZE..)?) {
        match kind {
            IFLA_IFNAME => name = Some(text(payload)),
            IFLA_MTU => mtu = u32_at(payload, 0),
            IFLA_ADDRESS => mac = payload.try_into().ok(),
            IFLA_NUM_RX_QUEUES => rx_queues = u32_at(payload, 0).unwrap_or(rx_queues),
            IFLA_NUM_TX_QUEUES => tx_queues = u32_at(payload, 0).unwrap_or(tx_queues),
            IFLA_XDP => attached = parse_attached(payload),
            _ => {}
        }
    }
    Some(InterfaceInfo {
        index: link_index(body)?,
        name: name?,
        flags: u32_at(body, 8)?,
        mtu: mtu?,
        mac,
        driver: None,
        channels: None,
        rx_queues,
        tx_queues,
        max_queues: rx_queues.max(tx_queues),
        features: None,
        attached,
    })
}

/// The programs in `IFLA_XDP`: one for each mode that has one.
fn parse_attached(payload: &[u8]) -> Vec<AttachedId> {
    let mut attached = Vec::new();
    let (mut mode, mut only) = (None, None);
    for (kind, payload) in attributes(payload) {
        let each = match kind {
            IFLA_XDP_DRV_PROG_ID => XDP_ATTACHED_DRV,
            IFLA_XDP_SKB_PROG_ID => XDP_ATTACHED_SKB,
            IFLA_XDP_HW_PROG_ID => XDP_ATTACHED_HW,
            IFLA_XDP_ATTACHED => {
                mode = payload.first().copied();
                continue;
            }
            IFLA_XDP_PROG_ID => {
                only = u32_at(payload, 0);
                continue;
            }
            _ => continue,
        };
        attached.extend(u32_at(payload, 0).map(|id| AttachedId { mode: each, id }));
    }
    // Before 4.19 there was one program at most, with its mode beside it.
    if let (true, Some(mode @ XDP_ATTACHED_DRV..=XDP_ATTACHED_HW), Some(id)) =
        (attached.is_empty(), mode, only)
    {
        attached.push(AttachedId { mode, id });
    }
    attached.sort_unstable_by_key(|attached| attached.mode);
    attached
}

/// What the driver declares in family `netdev`; `None` on kernels without it.
fn features(ifindex: u32) -> Result<Option<DriverFeatures>, Errno> {
    let Some((mut generic, family)) = Netlink::generic("netdev")? else { return Ok(None) };
    let mut features = None;
    let request = Request::new(family.id, &genlmsghdr(NETDEV_CMD_DEV_GET))
        .attribute(NETDEV_A_DEV_IFINDEX, &ifindex.to_ne_bytes());
    match generic.get(&request, |_, body| features = parse_features(body)) {
        Ok(()) => Ok(features),
        Err(Errno::NOENT | Errno::OPNOTSUPP) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn parse_features(body: &[u8]) -> Option<DriverFeatures> {
    let mut xdp = None;
    let (mut zc_max_segs, mut rx_metadata, mut xsk) = (None, None, None);
    for (kind, payload) in attributes(body.get(GENLMSGHDR_SIZE..)?) {
        match kind {
            NETDEV_A_DEV_XDP_FEATURES => xdp = u64_at(payload, 0),
            NETDEV_A_DEV_XDP_ZC_MAX_SEGS => zc_max_segs = u32_at(payload, 0),
            NETDEV_A_DEV_XDP_RX_METADATA_FEATURES => rx_metadata = u64_at(payload, 0),
            NETDEV_A_DEV_XSK_FEATURES => xsk = u64_at(payload, 0),
            _ => {}
        }
    }
    Some(DriverFeatures { xdp: XdpFeatures::from_bits_retain(xdp?), zc_max_segs, rx_metadata, xsk })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The body of a message: a structure, then attributes.
    fn body(structure: &[u8], attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let request = Request::new(0, structure);
        attributes.iter().fold(request, |r, (kind, payload)| r.attribute(*kind, payload)).into_body()
    }

    fn link(index: i32, flags: u32) -> [u8; IFINFOMSG_SIZE] {
        let mut link = ifinfomsg(index);
        link[8..12].copy_from_slice(&flags.to_ne_bytes());
        link
    }

    fn xdp(attributes: &[(u16, &[u8])]) -> Vec<u8> {
        body(&[], attributes)
    }

    fn whole_link() -> Vec<u8> {
        let id = |id: u32| id.to_ne_bytes();
        let xdp =
            xdp(&[(IFLA_XDP_SKB_PROG_ID, &id(9)), (IFLA_XDP_DRV_PROG_ID, &id(7)), (IFLA_XDP_ATTACHED, &[4])]);
        body(
            &link(3, 0x1043),
            &[
                (IFLA_IFNAME, b"veth0\0"),
                (IFLA_MTU, &1500u32.to_ne_bytes()),
                (IFLA_ADDRESS, &[2, 0, 0, 0, 0, 1]),
                (IFLA_NUM_RX_QUEUES, &4u32.to_ne_bytes()),
                (IFLA_NUM_TX_QUEUES, &2u32.to_ne_bytes()),
                (999, b"of a newer kernel"),
                (IFLA_XDP, &xdp),
            ],
        )
    }

    #[test]
    fn a_link_is_read_whole() {
        let expected = InterfaceInfo {
            index: 3,
            name: "veth0".into(),
            flags: 0x1043,
            mtu: 1500,
            mac: Some([2, 0, 0, 0, 0, 1]),
            driver: None,
            channels: None,
            rx_queues: 4,
            tx_queues: 2,
            max_queues: 4,
            features: None,
            attached: vec![AttachedId { mode: 1, id: 7 }, AttachedId { mode: 2, id: 9 }],
        };
        assert_eq!(parse_link(&whole_link()), Some(expected));
    }

    #[test]
    fn a_link_with_little_to_tell_has_defaults_and_one_without_a_name_is_none() {
        let few = [(IFLA_IFNAME, &b"tun0\0"[..]), (IFLA_MTU, &[0, 0, 0, 0]), (IFLA_ADDRESS, &[])];
        let link = parse_link(&body(&link(1, 0), &few)).unwrap();
        assert_eq!((link.rx_queues, link.tx_queues, link.mac), (1, 1, None));
        assert_eq!(link.attached, []);
        assert_eq!(parse_link(&body(&super::ifinfomsg(1), &few[1..])), None);
        assert_eq!(parse_link(&[]), None);
    }

    #[test]
    fn messages_cut_anywhere_never_panic_nor_make_things_up() {
        let whole = whole_link();
        let reference = parse_link(&whole).unwrap();
        for len in 0..whole.len() {
            if let Some(link) = parse_link(&whole[..len]) {
                assert_eq!((&link.name, link.mtu), (&reference.name, reference.mtu));
                assert!(link.mac.is_none() || link.mac == reference.mac);
                assert!(link.attached.is_empty());
            }
        }
        // A bit flipped anywhere, the lengths included.
        for bit in 0..whole.len() * 8 {
            let mut broken = whole.clone();
            broken[bit / 8] ^= 1 << (bit % 8);
            let _ = (parse_link(&broken), parse_features(&broken));
        }
    }

    #[test]
    fn an_old_kernel_names_one_program_and_its_mode() {
        let old = [(IFLA_XDP_ATTACHED, &[XDP_ATTACHED_SKB][..]), (IFLA_XDP_PROG_ID, &[5, 0, 0, 0])];
        let id = u32::from_ne_bytes([5, 0, 0, 0]);
        assert_eq!(parse_attached(&xdp(&old)), [AttachedId { mode: XDP_ATTACHED_SKB, id }]);
        assert_eq!(parse_attached(&xdp(&[(IFLA_XDP_ATTACHED, &[0])])), []);
    }

    #[test]
    fn features_that_a_kernel_does_not_know_are_absent() {
        let header = genlmsghdr(NETDEV_CMD_DEV_GET);
        let index = (NETDEV_A_DEV_IFINDEX, &3u32.to_ne_bytes()[..]);
        let xdp = XdpFeatures::BASIC | XdpFeatures::XSK_ZEROCOPY;
        let bits = xdp.bits().to_ne_bytes();
        let oldest = body(&header, &[index, (NETDEV_A_DEV_XDP_FEATURES, &bits)]);
        let none = DriverFeatures { xdp, zc_max_segs: None, rx_metadata: None, xsk: None };
        assert_eq!(parse_features(&oldest), Some(none));
        let newer = body(
            &header,
            &[
                index,
                (NETDEV_A_DEV_XDP_FEATURES, &bits),
                (NETDEV_A_DEV_XDP_ZC_MAX_SEGS, &8u32.to_ne_bytes()),
                (NETDEV_A_DEV_XDP_RX_METADATA_FEATURES, &5u64.to_ne_bytes()),
                (NETDEV_A_DEV_XSK_FEATURES, &3u64.to_ne_bytes()),
            ],
        );
        let all = DriverFeatures { xdp, zc_max_segs: Some(8), rx_metadata: Some(5), xsk: Some(3) };
        assert_eq!(parse_features(&newer), Some(all));
        assert_eq!(parse_features(&body(&header, &[index])), None);
        assert_eq!(parse_features(&newer[..GENLMSGHDR_SIZE + 4]), None);
    }
}
