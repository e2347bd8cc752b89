//! Which packets go to sockets: a value, what it means, and the eBPF that does it.

use core::fmt;
use core::ops::RangeInclusive;

use super::asm::{self, Alu, Code, Cond, Label, Reg, Width};
use crate::error::{Cause, Doing, Error, Result};
use crate::kernel::Insn;
use asm::Reg::{R0, R1, R2, R3, R4, R5};

/// What a packet with a tag of its VLAN has for an EtherType (802.1Q).
const VLAN: u16 = 0x8100;
/// The same of a provider's tag (802.1ad).
const PROVIDER_VLAN: u16 = 0x88a8;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
/// The protocol number of UDP.
const UDP: u8 = 17;

/// Bytes of an Ethernet header.
const ETHERNET_LEN: usize = 14;
/// Bytes of a VLAN tag.
const TAG_LEN: usize = 4;
/// Bytes of an IPv4 header without options.
const IPV4_LEN: usize = 20;
/// Bytes of an IPv6 header without extensions.
const IPV6_LEN: usize = 40;
/// Bytes of a UDP header.
const UDP_LEN: usize = 8;

/// IPv4: more fragments follow, or this is not the first one.
const FRAGMENT: u16 = 0x3fff;

/// What the name of a program for UDP ports starts with.
const UDP_NAME: &str = "xsk_udp_";
/// Bytes of a program's name, at most.
const NAME_LEN: usize = 15;

/// Which packets go to the sockets of a program. The rest goes to the Linux stack, as if no program
/// were there, and so does a packet for which there is no socket.
///
/// ```
/// use xsk::xdp::Steering;
///
/// let dns = Steering::udp_ports([53, 4242]);
/// assert_eq!(dns.to_string(), "udp dst port 53 or 4242");
/// assert!(!dns.takes(b"not a packet for port 53"));
/// assert!(Steering::all().takes(b"anything"));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Steering {
    rule: Rule,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
enum Rule {
    #[default]
    All,
    /// Runs of ports, in order, with others between them.
    UdpPorts(Vec<RangeInclusive<u16>>),
}

impl Steering {
    /// The most runs of consecutive ports that [`udp_ports`](Self::udp_ports) has.
    pub const MAX_PORT_RUNS: usize = 1024;

    /// Every packet.
    pub fn all() -> Self {
        Self::default()
    }

    /// UDP packets to any of these ports, over IPv4 or IPv6, also inside one VLAN tag.
    ///
    /// Fragments and packets with IPv6 extension headers are for the Linux stack, and so are ARP,
    /// ICMP and neighbour discovery: the interface goes on answering by itself. Lengths and checksums
    /// are not looked at.
    ///
    /// No ports at all, or more than [`MAX_PORT_RUNS`](Self::MAX_PORT_RUNS) runs of consecutive ones,
    /// are refused when the program is made ([`Cause::SteeringPorts`]).
    pub fn udp_ports(ports: impl IntoIterator<Item = u16>) -> Self {
        let mut ports: Vec<_> = ports.into_iter().collect();
        ports.sort_unstable();
        let mut runs: Vec<RangeInclusive<u16>> = Vec::new();
        for port in ports {
            match runs.last_mut() {
                Some(run) if port - run.end() <= 1 => *run = *run.start()..=port,
                _ => runs.push(port..=port),
            }
        }
        Self { rule: Rule::UdpPorts(runs) }
    }

    /// Whether a packet, from its Ethernet header on, is for a socket.
    ///
    /// This is what the program in the kernel does too; but that sees only the first buffer of a
    /// packet that has several.
    pub fn takes(&self, packet: &[u8]) -> bool {
        match &self.rule {
            Rule::All => true,
            Rule::UdpPorts(runs) => {
                udp_port(packet).is_some_and(|port| runs.iter().any(|run| run.contains(&port)))
            }
        }
    }

    /// The program that does it, over the map of this descriptor.
    pub(super) fn instructions(&self, map: i32) -> Result<Vec<Insn>> {
        let mut code = Code::default();
        code.push(asm::load(Width::W, R2, R1, asm::XDP_MD_RX_QUEUE_INDEX));
        let (take, leave) = (code.label(), code.label());
        match &self.rule {
            Rule::All => {}
            Rule::UdpPorts(runs) => {
                if !(1..=Self::MAX_PORT_RUNS).contains(&runs.len()) {
                    let cause = Cause::SteeringPorts { runs: runs.len(), max: Self::MAX_PORT_RUNS };
                    return Err(Error::new(Doing::LoadProgram, cause));
                }
                load_udp_port(&mut code, leave);
                search(&mut code, runs, take, leave);
            }
        }
        // R2 is still the queue. An empty slot's packet falls back to what the flags say: the stack.
        // That flag came with Linux 5.3, the links by which programs are attached with 5.9.
        code.place(take);
        code.extend(asm::load_map(R1, map));
        code.extend([
            asm::alu_imm(Alu::Mov, R3, asm::XDP_PASS),
            asm::call(asm::FN_REDIRECT_MAP),
            asm::exit(),
        ]);
        if self.rule != Rule::All {
            code.place(leave);
            code.extend([asm::alu_imm(Alu::Mov, R0, asm::XDP_PASS), asm::exit()]);
        }
        Ok(code.finish())
    }

    /// The name of the program. It tells the rules as far as they fit: see [`rules_of`](Self::rules_of).
    pub(super) fn program_name(&self) -> String {
        let Rule::UdpPorts(runs) = &self.rule else { return "xsk_redirect".into() };
        let few: Vec<_> =
            runs.iter().cloned().flatten().take(NAME_LEN).map(|port| port.to_string()).collect();
        let name = format!("{UDP_NAME}{}", few.join("_"));
        if name.len() <= NAME_LEN {
            return name;
        }
        let count: usize = runs.iter().map(ExactSizeIterator::len).sum();
        format!("{UDP_NAME}n{count}")
    }

    /// What a program of this name steers, in words; `None` of one that is not this library's.
    pub(super) fn rules_of(name: &str) -> Option<String> {
        if name == Self::all().program_name() {
            return Some(Self::all().to_string());
        }
        let ports = name.strip_prefix(UDP_NAME)?;
        if let Some(count) = ports.strip_prefix('n') {
            return Some(format!("udp dst port, {} of them", count.parse::<u32>().ok()?));
        }
        let ports: Vec<u16> = ports.split('_').map(|port| port.parse().ok()).collect::<Option<_>>()?;
        Some(Self::udp_ports(ports).to_string())
    }
}

/// In words close to those of tcpdump.
impl fmt::Display for Steering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = match &self.rule {
            Rule::All => return f.write_str("all packets"),
            Rule::UdpPorts(runs) if runs.is_empty() => return f.write_str("no packets"),
            Rule::UdpPorts(runs) => runs,
        };
        f.write_str("udp dst port ")?;
        for (n, run) in runs.iter().enumerate() {
            f.write_str(if n == 0 { "" } else { " or " })?;
            match (run.start(), run.end()) {
                (first, last) if first == last => write!(f, "{first}")?,
                (first, last) => write!(f, "{first}-{last}")?,
            }
        }
        Ok(())
    }
}

/// The destination port of a packet that is whole UDP as far as its headers go.
fn udp_port(packet: &[u8]) -> Option<u16> {
    let u16_at = |bytes: &[u8], at: usize| Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
    let (mut ethertype, mut ip) = (u16_at(packet, ETHERNET_LEN - 2)?, ETHERNET_LEN);
    if matches!(ethertype, VLAN | PROVIDER_VLAN) {
        (ethertype, ip) = (u16_at(packet, ETHERNET_LEN + TAG_LEN - 2)?, ETHERNET_LEN + TAG_LEN);
    }
    let ip = packet.get(ip..)?;
    let udp = match ethertype {
        IPV4 => {
            let header: &[u8; IPV4_LEN] = ip.first_chunk()?;
            let (version, words) = (header[0] >> 4, header[0] & 0x0f);
            let whole = u16_at(header, 6)? & FRAGMENT == 0;
            (version == 4 && words >= 5 && whole && header[9] == UDP).then_some(usize::from(words) * 4)?
        }
        IPV6 => {
            let header: &[u8; IPV6_LEN] = ip.first_chunk()?;
            (header[0] >> 4 == 6 && header[6] == UDP).then_some(IPV6_LEN)?
        }
        _ => return None,
    };
    let header: &[u8; UDP_LEN] = ip.get(udp..)?.first_chunk()?;
    u16_at(header, 2)
}

/// [`udp_port`] in eBPF: the port goes to R0; what has none goes to `leave`. R2 is kept.
fn load_udp_port(code: &mut Code, leave: Label) {
    let (ip, tagged, ipv4, found) = (code.label(), code.label(), code.label(), code.label());
    // R4 is the start of the header at hand, R5 the end of the packet.
    code.push(asm::load(Width::W, R4, R1, asm::XDP_MD_DATA));
    code.push(asm::load(Width::W, R5, R1, asm::XDP_MD_DATA_END));
    check_len(code, ETHERNET_LEN, leave);
    load_u16(code, R0, ETHERNET_LEN - 2);
    code.push(asm::alu_imm(Alu::Add, R4, ETHERNET_LEN as i32));
    code.jump_imm(Cond::Eq, R0, VLAN.into(), tagged);
    code.jump_imm(Cond::Ne, R0, PROVIDER_VLAN.into(), ip);
    code.place(tagged);
    check_len(code, TAG_LEN, leave);
    load_u16(code, R0, TAG_LEN - 2);
    code.push(asm::alu_imm(Alu::Add, R4, TAG_LEN as i32));

    code.place(ip);
    code.jump_imm(Cond::Eq, R0, IPV4.into(), ipv4);
    code.jump_imm(Cond::Ne, R0, IPV6.into(), leave);
    check_len(code, IPV6_LEN + UDP_LEN, leave);
    code.push(asm::load(Width::B, R0, R4, 0));
    code.push(asm::alu_imm(Alu::Rsh, R0, 4));
    code.jump_imm(Cond::Ne, R0, 6, leave);
    code.push(asm::load(Width::B, R0, R4, 6));
    code.jump_imm(Cond::Ne, R0, UDP.into(), leave);
    load_u16(code, R0, IPV6_LEN + 2);
    code.goto(found);

    code.place(ipv4);
    check_len(code, IPV4_LEN, leave);
    code.push(asm::load(Width::B, R0, R4, 9));
    code.jump_imm(Cond::Ne, R0, UDP.into(), leave);
    load_u16(code, R0, 6);
    code.jump_imm(Cond::Set, R0, FRAGMENT.into(), leave);
    code.push(asm::load(Width::B, R0, R4, 0));
    code.push(asm::alu(Alu::Mov, R3, R0));
    code.push(asm::alu_imm(Alu::Rsh, R3, 4));
    code.jump_imm(Cond::Ne, R3, 4, leave);
    code.push(asm::alu_imm(Alu::And, R0, 0x0f));
    code.jump_imm(Cond::Lt, R0, 5, leave);
    code.push(asm::alu_imm(Alu::Lsh, R0, 2));
    code.push(asm::alu(Alu::Add, R4, R0));
    check_len(code, UDP_LEN, leave);
    load_u16(code, R0, 2);
    code.place(found);
}

/// Goes on if `len` bytes at R4 are in the packet. R3 is used.
fn check_len(code: &mut Code, len: usize, leave: Label) {
    code.push(asm::alu(Alu::Mov, R3, R4));
    code.push(asm::alu_imm(Alu::Add, R3, len as i32));
    code.jump(Cond::Gt, R3, R5, leave);
}

/// A number of two bytes, in network order, at R4 and `at`.
fn load_u16(code: &mut Code, dst: Reg, at: usize) {
    code.push(asm::load(Width::H, dst, R4, at as i16));
    code.push(asm::to_be(dst, 16));
}

/// Finds R0 among the runs, by halves: to `take` if it is there, else to `leave`.
fn search(code: &mut Code, runs: &[RangeInclusive<u16>], take: Label, leave: Label) {
    match runs {
        [] => code.goto(leave),
        [run] if run.start() == run.end() => {
            code.jump_imm(Cond::Eq, R0, (*run.start()).into(), take);
            code.goto(leave);
        }
        [run] => {
            code.jump_imm(Cond::Lt, R0, (*run.start()).into(), leave);
            code.jump_imm(Cond::Gt, R0, (*run.end()).into(), leave);
            code.goto(take);
        }
        runs => {
            let (below, above) = runs.split_at(runs.len() / 2);
            let upper = code.label();
            code.jump_imm(Cond::Ge, R0, (*above[0].start()).into(), upper);
            search(code, below, take, leave);
            code.place(upper);
            search(code, above, take, leave);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_say_what_is_steered() {
        let cases: [(&[u16], &str); 6] = [
            (&[], "no packets"),
            (&[53], "udp dst port 53"),
            (&[4242, 53, 53], "udp dst port 53 or 4242"),
            (&[8, 7, 9, 1, 1], "udp dst port 1 or 7-9"),
            (&[0, 65535], "udp dst port 0 or 65535"),
            (&[65535, 65534, 0], "udp dst port 0 or 65534-65535"),
        ];
        for (ports, words) in cases {
            assert_eq!(Steering::udp_ports(ports.iter().copied()).to_string(), words);
        }
        assert_eq!(Steering::udp_ports(0..=u16::MAX).to_string(), "udp dst port 0-65535");
        assert_eq!(Steering::default().to_string(), "all packets");
    }

    #[test]
    fn names_tell_the_rules_as_far_as_they_fit() {
        let cases = [
            (Steering::all(), "xsk_redirect", "all packets"),
            (Steering::udp_ports([53]), "xsk_udp_53", "udp dst port 53"),
            (Steering::udp_ports([4242, 53]), "xsk_udp_53_4242", "udp dst port 53 or 4242"),
            (Steering::udp_ports([1, 2, 3]), "xsk_udp_1_2_3", "udp dst port 1-3"),
            (Steering::udp_ports([4242, 5353]), "xsk_udp_n2", "udp dst port, 2 of them"),
            (Steering::udp_ports(0..=u16::MAX), "xsk_udp_n65536", "udp dst port, 65536 of them"),
        ];
        for (steering, name, rules) in cases {
            assert_eq!(steering.program_name(), name);
            assert_eq!(Steering::rules_of(name).as_deref(), Some(rules));
        }
        for other in ["", "xsk_def_prog", "xsk_udp_", "xsk_udp_n", "xsk_udp_x", "xsk_udp_1__2", "xdp_pass"] {
            assert_eq!(Steering::rules_of(other), None, "{other}");
        }
    }

    #[test]
    fn ports_from_one_run_to_the_most() {
        let odd = |runs: usize| Steering::udp_ports((0..runs).map(|n| 2 * n as u16));
        for runs in [0, Steering::MAX_PORT_RUNS + 1, 1 << 15] {
            let cause = Cause::SteeringPorts { runs, max: Steering::MAX_PORT_RUNS };
            assert_eq!(*odd(runs).instructions(0).unwrap_err().cause(), cause);
        }
        for runs in [1, Steering::MAX_PORT_RUNS] {
            odd(runs).instructions(0).unwrap();
        }
    }
}
