//! Receive-side scaling: which queue a packet from the wire gets, as a NIC chooses it.
//!
//! The Toeplitz hash and its key are Microsoft's, which most NICs have by default. It is taken of
//! the IPv4 or IPv6 addresses, and of the ports where TCP or UDP follows at once and the packet is
//! no fragment. The hash picks one of 128 entries of a table whose entries name the queues in turn.

/// Entries of the indirection table, and so the most queues that can get a share.
pub(crate) const TABLE: u32 = 128;

/// The default key.
const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0,
    0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42,
    0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

/// Where the EtherType is.
const ETHERTYPE: usize = 12;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const VLAN: u16 = 0x8100;
const VLAN_OUTER: u16 = 0x88a8;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// The queue of a packet, among so many: 0 for one that has no hash.
pub(crate) fn queue(packet: &[u8], queues: u16) -> u16 {
    hash(packet).map_or(0, |hash| (hash % TABLE) as u16 % queues)
}

/// The hash of an IP packet; `None` for any other.
fn hash(packet: &[u8]) -> Option<u32> {
    let mut at = ETHERTYPE;
    let mut ethertype = word(packet, at)?;
    while matches!(ethertype, VLAN | VLAN_OUTER) {
        at += 4;
        ethertype = word(packet, at)?;
    }
    let ip = &packet[at + 2..];
    let (addresses, ports) = match ethertype {
        IPV4 => {
            let header = usize::from(ip.first()? & 0x0f) * 4;
            // More fragments, or an offset: only the first one has ports, and all are one flow.
            let fragment = word(ip, 6)? & 0x3fff != 0;
            let has_ports = matches!(ip.get(9)?, &(TCP | UDP)) && header >= 20 && !fragment;
            (ip.get(12..20)?, has_ports.then_some(header))
        }
        // Behind an extension header, that of fragments too, no ports are looked for.
        IPV6 => (ip.get(8..40)?, matches!(ip[6], TCP | UDP).then_some(40)),
        _ => return None,
    };
    let ports = ports.and_then(|at| ip.get(at..at + 4)).unwrap_or_default();
    Some(toeplitz(addresses.iter().chain(ports)))
}

/// The 16 bits at a place, in the order of the network.
fn word(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2).map(|word| u16::from_be_bytes([word[0], word[1]]))
}

/// For each bit of the input that is set, the 32 bits of the key from there on, all of them added
/// without carry. The input has 36 bytes at most, for which the key is just long enough.
fn toeplitz<'b>(input: impl Iterator<Item = &'b u8>) -> u32 {
    let mut hash = 0;
    for (byte, key) in input.zip(KEY.windows(5)) {
        let window = key.iter().fold(0u64, |window, &byte| window << 8 | u64::from(byte));
        for bit in 0..8 {
            if byte & 0x80 >> bit != 0 {
                hash ^= (window >> (8 - bit)) as u32;
            }
        }
    }
    hash
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, SocketAddr};

    use super::*;

    /// The vectors of "Verifying the RSS Hash Calculation": destination, source, the hash of the
    /// addresses, the hash with ports.
    const VECTORS: [(&str, &str, u32, u32); 8] = [
        ("161.142.100.80:1766", "66.9.149.187:2794", 0x323e_8fc2, 0x51cc_c178),
        ("65.69.140.83:4739", "199.92.111.2:14230", 0xd718_262a, 0xc626_b0ea),
        ("12.22.207.184:38024", "24.19.198.95:12898", 0xd2d0_a5de, 0x5c2b_394a),
        ("209.142.163.6:2217", "38.27.205.30:48228", 0x8298_9176, 0xafc7_327f),
        ("202.188.127.2:1303", "153.39.163.191:44251", 0x5d18_09c5, 0x10e8_28a2),
        ("[3ffe:2501:200:3::1]:1766", "[3ffe:2501:200:1fff::7]:2794", 0x2cc1_8cd5, 0x4020_7d3d),
        ("[ff02::1]:4739", "[3ffe:501:8::260:97ff:fe40:efab]:14230", 0x0f0c_461c, 0xdde5_1bbf),
        (
            "[fe80::200:f8ff:fe21:67cf]:38024",
            "[3ffe:1900:4545:3:200:f8ff:fe21:67cf]:44251",
            0x4b61_e985,
            0x02d1_feef,
        ),
    ];

    /// A packet of `protocol`; `options` is how many bytes of options an IPv4 header has.
    fn packet(to: &str, from: &str, protocol: u8, options: u8) -> Vec<u8> {
        let (to, from): (SocketAddr, SocketAddr) = (to.parse().unwrap(), from.parse().unwrap());
        let mut packet = vec![0; ETHERTYPE];
        match (to.ip(), from.ip()) {
            (IpAddr::V4(to), IpAddr::V4(from)) => {
                packet.extend(IPV4.to_be_bytes());
                packet.extend([0x45 + options / 4, 0, 0, 40, 0, 0, 0x40, 0, 64, protocol, 0, 0]);
                packet.extend(from.octets().into_iter().chain(to.octets()));
                packet.extend(vec![1; usize::from(options)]);
            }
            (IpAddr::V6(to), IpAddr::V6(from)) => {
                packet.extend(IPV6.to_be_bytes());
                packet.extend([0x60, 0, 0, 0, 0, 20, protocol, 64]);
                packet.extend(from.octets().into_iter().chain(to.octets()));
            }
            _ => unreachable!("both of one family"),
        }
        packet.extend(from.port().to_be_bytes().into_iter().chain(to.port().to_be_bytes()));
        packet.extend([0; 16]);
        packet
    }

    #[test]
    fn microsofts_vectors_hash_as_published() {
        for (to, from, of_addresses, with_ports) in VECTORS {
            for (protocol, wanted) in [(TCP, with_ports), (UDP, with_ports), (1, of_addresses)] {
                let packet = packet(to, from, protocol, 0);
                assert_eq!(hash(&packet), Some(wanted), "{from} to {to}, protocol {protocol}");
            }
        }
    }

    #[test]
    fn ports_are_found_behind_options_and_tags() {
        let (to, from, _, wanted) = VECTORS[0];
        assert_eq!(hash(&packet(to, from, UDP, 8)), Some(wanted));
        for tags in [&[VLAN][..], &[VLAN_OUTER, VLAN]] {
            let mut tagged = packet(to, from, UDP, 0);
            for tag in tags.iter().rev() {
                tagged.splice(ETHERTYPE..ETHERTYPE, tag.to_be_bytes().into_iter().chain([0, 7]));
            }
            assert_eq!(hash(&tagged), Some(wanted), "{tags:x?}");
        }
    }

    #[test]
    fn fragments_and_cut_headers_have_no_ports() {
        let (to, from, wanted, _) = VECTORS[0];
        // More fragments; the last fragment.
        for (high, low) in [(0x20, 0), (0, 1)] {
            let mut fragment = packet(to, from, UDP, 0);
            (fragment[ETHERTYPE + 8], fragment[ETHERTYPE + 9]) = (high, low);
            assert_eq!(hash(&fragment), Some(wanted));
        }
        let cut = &packet(to, from, UDP, 0)[..14 + 20 + 3];
        assert_eq!(hash(cut), Some(wanted));
        assert_eq!(hash(&cut[..14 + 19]), None, "not even addresses");
        let (to, from, wanted, _) = VECTORS[5];
        assert_eq!(hash(&packet(to, from, 44, 0)), Some(wanted), "a fragment of IPv6");
    }

    #[test]
    fn what_is_not_ip_goes_to_the_first_queue() {
        let mut arp = [0xff; 60];
        arp[ETHERTYPE..ETHERTYPE + 2].copy_from_slice(&[0x08, 0x06]);
        for len in [0, 13, 14, 60] {
            assert_eq!(hash(&arp[..len]), None);
            assert_eq!(queue(&arp[..len], 7), 0);
        }
        let endless: Vec<_> = VLAN.to_be_bytes().repeat(30);
        assert_eq!(hash(&endless), None);
    }

    #[test]
    fn the_queues_share_the_table_in_turn() {
        for (to, from, _, hash) in VECTORS {
            let packet = packet(to, from, UDP, 0);
            for queues in [1, 2, 3, 128] {
                assert_eq!(u32::from(queue(&packet, queues)), hash % 128 % u32::from(queues));
            }
        }
    }
}
