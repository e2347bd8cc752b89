//! The packets that `txonly` sends.

use std::net::IpAddr;

use etherparse::{IpHeaders, Ipv4Header, Ipv6Header, PacketBuilder, ip_number};

use crate::cli::{Mac, Packets};
use crate::failure::Failure;

/// Hops that a packet may take.
const HOPS: u8 = 64;
/// Bytes that a packet may have beyond the MTU: its Ethernet header. (A VLAN tag would be 4 more.)
pub(crate) const ETHERNET_HEADER: u32 = 14;

/// An Ethernet frame with a UDP packet and valid checksums, as asked for.
///
/// `own` is the interface's MAC address, and `mtu` its MTU.
pub(crate) fn udp(packets: &Packets, own: Option<[u8; 6]>, mtu: u32) -> Result<Vec<u8>, Failure> {
    let size = packets.size;
    let wrong = |cause: String, why: &str, remedy: String| {
        Failure::new(&format!("cannot make packets of {size} bytes"), cause, why, remedy)
    };
    let Mac(source) = packets.src_mac.or(own.map(Mac)).ok_or_else(|| {
        wrong(
            "the interface has no MAC address".into(),
            "A packet names its sender.",
            "say which one to use: --src-mac 02:00:00:00:00:02".into(),
        )
    })?;
    let ip = match (packets.src_ip, packets.dst_ip) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => IpHeaders::Ipv4(
            Ipv4Header {
                time_to_live: HOPS,
                protocol: ip_number::UDP,
                source: source.octets(),
                destination: destination.octets(),
                ..Ipv4Header::default()
            },
            Default::default(),
        ),
        (IpAddr::V6(source), IpAddr::V6(destination)) => IpHeaders::Ipv6(
            Ipv6Header {
                hop_limit: HOPS,
                next_header: ip_number::UDP,
                source: source.octets(),
                destination: destination.octets(),
                ..Ipv6Header::default()
            },
            Default::default(),
        ),
        (source, destination) => {
            return Err(wrong(
                format!("{source} and {destination} are addresses of different IP versions"),
                "A packet is of one version.",
                "give both addresses: --src-ip and --dst-ip".into(),
            ));
        }
    };
    let builder =
        PacketBuilder::ethernet2(source, packets.dst_mac.0).ip(ip).udp(packets.src_port, packets.dst_port);
    let headers = builder.size(0);
    let most = mtu + ETHERNET_HEADER;
    if (size as usize) < headers {
        return Err(wrong(
            format!("the headers alone take {headers}"),
            "A packet has an Ethernet, an IP and a UDP header.",
            format!("use -s {headers} or more"),
        ));
    }
    if size > most {
        return Err(wrong(
            format!("the interface takes {most} at most"),
            "Its MTU and the Ethernet header limit a packet; the driver would drop longer ones.",
            format!("use -s {most} or less"),
        ));
    }
    let payload: Vec<u8> = (0..=u8::MAX).cycle().take(size as usize - headers).collect();
    let mut frame = Vec::with_capacity(size as usize);
    builder.write_to_vec(&mut frame, &payload).map_err(|error| {
        wrong(error.to_string(), "The packet's length doesn't fit its headers.", "use a smaller -s".into())
    })?;
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use etherparse::{SlicedPacket, TransportSlice};

    use super::*;
    use crate::cli::{Cli, Command};

    const OWN: Option<[u8; 6]> = Some([2, 0, 0, 0, 0, 7]);

    fn packets(arguments: &[&str]) -> Packets {
        let line = ["xsk", "txonly", "-i", "lo"].iter().chain(arguments);
        match Cli::try_parse_from(line).unwrap().command {
            Command::Txonly(txonly) => txonly.packets,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_packet_has_the_length_and_addresses_that_were_asked_for() {
        for (size, arguments) in [
            (42, vec!["-s", "42"]),
            (64, vec![]),
            (1514, vec!["-s", "1514", "--dst-mac", "02:00:00:00:00:09", "--dst-port", "4000"]),
            (777, vec!["-s", "777", "--src-ip", "fd00::1", "--dst-ip", "fd00::2"]),
        ] {
            let packets = packets(&arguments);
            let frame = udp(&packets, OWN, 1500).unwrap();
            assert_eq!(frame.len(), size);
            assert_eq!(frame[..6], packets.dst_mac.0);
            assert_eq!(Some(&frame[6..12]), OWN.as_ref().map(|own| &own[..]));
            let sliced = SlicedPacket::from_ethernet(&frame).unwrap();
            let Some(TransportSlice::Udp(header)) = &sliced.transport else { panic!("no UDP") };
            let udp = header.to_header();
            assert_eq!(udp.destination_port, packets.dst_port);
            let expected = match sliced.net.as_ref().unwrap() {
                etherparse::NetSlice::Ipv4(ip) => {
                    let ip = ip.header();
                    assert_eq!(ip.to_header().calc_header_checksum(), ip.header_checksum());
                    udp.calc_checksum_ipv4(&ip.to_header(), header.payload()).unwrap()
                }
                etherparse::NetSlice::Ipv6(ip) => {
                    udp.calc_checksum_ipv6(&ip.header().to_header(), header.payload()).unwrap()
                }
                other => panic!("{other:?}"),
            };
            assert_eq!(udp.checksum, expected);
        }
    }

    #[test]
    fn what_cannot_be_sent_is_refused_with_a_size_that_can() {
        let error = |arguments: &[&str]| udp(&packets(arguments), OWN, 1500).unwrap_err();
        for (arguments, remedy) in [
            (&["-s", "41"][..], "-s 42"),
            (&["-s", "1515"], "-s 1514"),
            (&["-s", "61", "--src-ip", "::1", "--dst-ip", "::2"], "-s 62"),
            (&["--dst-ip", "::2"], "--src-ip"),
        ] {
            let Failure::Explained(explanation) = error(arguments) else { panic!("{arguments:?}") };
            assert!(explanation.remedy.contains(remedy), "{}", explanation.remedy);
        }
    }
}
