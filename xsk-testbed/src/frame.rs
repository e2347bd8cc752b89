//! Frames to send, and the number that each carries.

use std::io;
use std::net::IpAddr;

use etherparse::{
    IpHeaders, Ipv4Header, Ipv6Header, PacketBuilder, SlicedPacket, TransportSlice, VlanId, ip_number,
};

use crate::{DISCARD, End, Error};

/// What a numbered frame's UDP payload begins with; the number follows, 8 bytes in network order.
const MARK: [u8; 4] = *b"xsk#";
/// Bytes of mark and number.
const NUMBERED: usize = MARK.len() + size_of::<u64>();

/// An Ethernet frame with an UDP packet, to be built.
///
/// The payload fills the frame; its bytes count up (`0, 1, 2, …`, wrapping), from its start or after
/// the number.
///
/// ```
/// # let Some(bed) = xsk_testbed::bed(|b| b) else { return };
/// use xsk_testbed::{UdpFrame, number};
///
/// let frame = UdpFrame::new(bed.a(), bed.b()).len(128).number(7).build().unwrap();
/// assert_eq!(frame.len(), 128);
/// assert_eq!(number(&frame), Some(7));
/// ```
#[derive(Clone, Debug)]
pub struct UdpFrame {
    from_mac: [u8; 6],
    to_mac: [u8; 6],
    ips: Ips,
    from_v6: Ips,
    ports: (u16, u16),
    vlan: Option<u16>,
    len: usize,
    number: Option<u64>,
}

/// Source and destination.
#[derive(Clone, Copy, Debug)]
enum Ips {
    V4([u8; 4], [u8; 4]),
    V6([u8; 16], [u8; 16]),
}

impl UdpFrame {
    /// From one end to the other: IPv4, port 1000 to [`DISCARD`], 60 bytes.
    pub fn new(from: &End, to: &End) -> Self {
        Self {
            from_mac: from.mac,
            to_mac: to.mac,
            ips: Ips::V4(from.ipv4.octets(), to.ipv4.octets()),
            from_v6: Ips::V6(from.ipv6.octets(), to.ipv6.octets()),
            ports: (1000, DISCARD),
            vlan: None,
            len: 60,
            number: None,
        }
    }

    /// Sets the destination's hardware address.
    pub fn to_mac(mut self, mac: [u8; 6]) -> Self {
        self.to_mac = mac;
        self
    }

    /// Makes it an IPv6 packet between the ends' IPv6 addresses.
    pub fn ipv6(mut self) -> Self {
        self.ips = self.from_v6;
        self
    }

    /// Sets the IP addresses, and with them the version. Should one alone be IPv6, the other is mapped
    /// into it.
    pub fn addresses<A: Into<IpAddr>>(mut self, from: A, to: A) -> Self {
        self.ips = match (from.into(), to.into()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => Ips::V4(from.octets(), to.octets()),
            (from, to) => Ips::V6(mapped(from), mapped(to)),
        };
        self
    }

    /// Sets the source and the destination port.
    pub fn ports(mut self, from: u16, to: u16) -> Self {
        self.ports = (from, to);
        self
    }

    /// Sets the source port alone.
    pub fn source_port(mut self, port: u16) -> Self {
        self.ports.0 = port;
        self
    }

    /// Adds a tag of this VLAN, 0 to 4095.
    pub fn vlan(mut self, id: u16) -> Self {
        self.vlan = Some(id);
        self
    }

    /// Sets the frame's length in bytes, Ethernet header included, frame check sequence not.
    pub fn len(mut self, len: usize) -> Self {
        self.len = len;
        self
    }

    /// Puts a number into it, which [`number`](number()) reads back. The UDP checksum is then 0 ("none"), so
    /// that the number can be changed; for IPv6, where the stack wants one, such a frame is one for
    /// AF_XDP alone.
    pub fn number(mut self, number: u64) -> Self {
        self.number = Some(number);
        self
    }

    /// The frame's bytes.
    pub fn build(&self) -> Result<Vec<u8>, Error> {
        let link = PacketBuilder::ethernet2(self.from_mac, self.to_mac);
        let ip = match self.ips {
            Ips::V4(source, destination) => {
                let header = Ipv4Header {
                    time_to_live: 64,
                    protocol: ip_number::UDP,
                    source,
                    destination,
                    ..Default::default()
                };
                IpHeaders::Ipv4(header, Default::default())
            }
            Ips::V6(source, destination) => {
                let header = Ipv6Header {
                    hop_limit: 64,
                    next_header: ip_number::UDP,
                    source,
                    destination,
                    ..Default::default()
                };
                IpHeaders::Ipv6(header, Default::default())
            }
        };
        let packet = match self.vlan {
            None => link.ip(ip),
            Some(id) => {
                let tag = VlanId::try_new(id).map_err(|e| invalid(e.to_string()))?;
                link.single_vlan(tag).ip(ip)
            }
        };
        let packet = packet.udp(self.ports.0, self.ports.1);

        let headers = packet.size(0);
        let least = headers + if self.number.is_some() { NUMBERED } else { 0 };
        if self.len < least {
            return Err(Error::FrameTooShort { len: self.len, least });
        }
        // An IP packet's length is 16 bits. (IPv6 could be 40 bytes longer.)
        let most = usize::from(u16::MAX) + self.ethernet_len();
        if self.len > most {
            return Err(Error::FrameTooLong { len: self.len, most });
        }

        let mut payload = Vec::with_capacity(self.len - headers);
        if let Some(number) = self.number {
            payload.extend(MARK);
            payload.extend(number.to_be_bytes());
        }
        payload.extend((0..=u8::MAX).cycle().take(self.len - headers - payload.len()));
        let mut frame = Vec::with_capacity(self.len);
        packet.write_to_vec(&mut frame, &payload).map_err(|e| invalid(e.to_string()))?;
        if self.number.is_some() {
            frame[headers - 2..headers].fill(0);
        }
        Ok(frame)
    }

    fn ethernet_len(&self) -> usize {
        if self.vlan.is_some() { 18 } else { 14 }
    }
}

/// The 16 bytes of an address, IPv4 mapped into IPv6.
fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn invalid(what: String) -> Error {
    Error::System {
        doing: "building a frame".into(),
        source: io::Error::new(io::ErrorKind::InvalidInput, what),
    }
}

/// The number that a frame carries, if it is a numbered one.
pub fn number(frame: &[u8]) -> Option<u64> {
    let at = number_offset(frame)?;
    Some(u64::from_be_bytes(*frame[at..].first_chunk()?))
}

/// Where in a frame its number is.
pub(crate) fn number_offset(frame: &[u8]) -> Option<usize> {
    let Some(TransportSlice::Udp(udp)) = SlicedPacket::from_ethernet(frame).ok()?.transport else {
        return None;
    };
    let payload = udp.payload();
    let whole = payload.len() >= NUMBERED && payload.starts_with(&MARK);
    whole.then(|| payload.as_ptr() as usize - frame.as_ptr() as usize + MARK.len())
}
