//! Steering: what its evaluation in Rust says of a packet, the program that is made of it does, on
//! the real kernel and on the simulated one.
#![cfg(target_os = "linux")]

use std::os::fd::AsFd;

use xsk::kernel::linux::test_run;
use xsk::xdp::asm::{XDP_PASS, XDP_REDIRECT};
use xsk::xdp::{AttachMode, Program, Steering, XskMap};
use xsk::{Device, Socket, Umem};
use xsk_sim::Sim;
use xsk_testbed::bed;

/// Numbers that look random and are the same in every run (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 33) as usize % bound
    }

    /// Yes, once in `times`.
    fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    fn of<T: Copy>(&mut self, choice: &[T]) -> T {
        choice[self.below(choice.len())]
    }

    fn byte(&mut self) -> u8 {
        self.next() as u8
    }
}

/// Ports at the edges of what the steerings below take, and others.
const PORTS: [u16; 16] =
    [0, 1, 52, 53, 54, 4241, 4242, 4243, 999, 1000, 1500, 1999, 2000, 32768, 65534, 65535];

fn steerings() -> Vec<Steering> {
    vec![
        Steering::all(),
        Steering::udp_ports([53]),
        Steering::udp_ports([53, 4242]),
        Steering::udp_ports((1000..2000).chain([53, 65535])),
        Steering::udp_ports([0, 65535]),
        Steering::udp_ports(0..=u16::MAX),
        Steering::udp_ports((0..64).map(|n| n * 53)),
        Steering::udp_ports((0..Steering::MAX_PORT_RUNS as u16).map(|n| n * 53)),
    ]
}

/// A packet that is UDP or nearly so: VLAN tags, options, fragments, extension headers, wrong
/// versions and lengths, some bytes changed, cut anywhere behind its Ethernet header.
fn packet(random: &mut Random) -> Vec<u8> {
    let mut packet: Vec<u8> = (0..12).map(|_| random.byte()).collect();
    let tags = random.of(&[0, 0, 0, 1, 1, 2]);
    for _ in 0..tags {
        packet.extend(random.of(&[0x8100u16, 0x8100, 0x88a8, 0x9100]).to_be_bytes());
        packet.extend([random.byte(), random.byte()]);
    }
    let v6 = random.once_in(3);
    let ethertype = if v6 { 0x86ddu16 } else { 0x0800 };
    let ethertype = if random.once_in(16) { random.of(&[0x0806, 0x86dd, 0x0800, 0x8847]) } else { ethertype };
    packet.extend(ethertype.to_be_bytes());
    let protocol = if random.once_in(6) { random.of(&[1u8, 6, 44, 0, 58, 50]) } else { 17 };
    if v6 {
        packet.push(if random.once_in(16) { random.byte() } else { 0x60 });
        packet.extend([0, 0, 0, 0, 16, protocol, 64]);
        packet.extend((0..32).map(|_| random.byte()));
        if protocol == 44 {
            packet.extend([17, 0, 0, 1, 0, 0, 0, 1]);
        }
    } else {
        let words = random.of(&[5u8, 5, 5, 5, 6, 8, 15, 4, 0, 3]);
        packet.push(if random.once_in(16) { random.byte() } else { 0x40 | words });
        let fragment = random.of(&[0u16, 0, 0, 0x4000, 0x4000, 0x8000, 0x2000, 1, 0x1fff, 0x3456]);
        packet.extend([0, 0, 48, 0, 0]);
        packet.extend(fragment.to_be_bytes());
        packet.extend([64, protocol]);
        packet.extend((0..10).map(|_| random.byte()));
        packet.extend((0..usize::from(words.max(5) - 5) * 4).map(|_| random.byte()));
    }
    packet.extend(random.of(&PORTS).to_be_bytes());
    let port = if random.once_in(8) { random.next() as u16 } else { random.of(&PORTS) };
    packet.extend(port.to_be_bytes());
    packet.extend([0, 8, 0, 0]);
    packet.extend((0..random.of(&[0, 0, 1, 20, 100])).map(|_| random.byte()));
    while random.once_in(4) {
        let at = random.below(packet.len() - 12) + 12;
        packet[at] = random.byte();
    }
    if random.once_in(4) {
        packet.truncate(14 + random.below(packet.len() - 13));
    }
    packet
}

/// Compares what a program does with the specification. `redirects` runs the program.
fn agrees(steering: &Steering, seed: u64, cases: usize, mut redirects: impl FnMut(&[u8]) -> bool) {
    let mut random = Random(seed);
    let mut taken = 0;
    for case in 0..cases {
        let packet = packet(&mut random);
        let takes = steering.takes(&packet);
        taken += usize::from(takes);
        assert_eq!(redirects(&packet), takes, "{steering}, case {case}: {packet:02x?}");
    }
    // The generator is of use only if it makes both kinds.
    let all = *steering == Steering::all();
    assert!(taken > cases / 100 && (all || taken < cases / 2), "{steering}: {taken} of {cases}");
}

#[test]
fn the_kernel_steers_as_specified() {
    let Some(bed) = bed(|b| b) else { return };
    let device = Device::open(&bed.a().name).unwrap();
    let (umem, _pool) = Umem::builder().frames(16).build().unwrap();
    let xsk = Socket::builder(&device).open(&umem).unwrap();
    let map = XskMap::new(&device).unwrap();
    for (seed, steering) in (1..).zip(steerings()) {
        let program = Program::steering(&map, &steering).unwrap();
        let verdict = |packet: &[u8]| test_run(program.as_fd(), packet, None, 1, 0, 0).unwrap().retval as i32;
        map.insert(0, &xsk.socket).unwrap();
        agrees(&steering, seed, 4000, |packet| match verdict(packet) {
            XDP_REDIRECT => true,
            XDP_PASS => false,
            other => panic!("verdict {other}"),
        });
        // Without a socket everything is the stack's.
        map.remove(0).unwrap();
        agrees(&steering, seed, 1000, |packet| {
            assert_eq!(verdict(packet), XDP_PASS);
            steering.takes(packet)
        });
    }
}

#[test]
fn the_simulated_kernel_steers_as_specified() {
    for (seed, steering) in (100..).zip(steerings()) {
        let sim = Sim::new();
        let device = sim.device("sim0").unwrap();
        let (umem, _pool) = Umem::builder().frames(16).build().unwrap();
        let xsk = Socket::builder(&device).open(&umem).unwrap();
        let map = XskMap::new(&device).unwrap();
        let program = Program::steering(&map, &steering).unwrap();
        let _attached = program.attach(&device, AttachMode::Native).unwrap();
        map.insert(0, &xsk.socket).unwrap();
        let passes = |packet: &[u8]| {
            sim.inject("sim0", packet).unwrap();
            sim.run();
            // What is dropped for want of a frame was for the socket all the same.
            let dropped = xsk.socket.statistics().unwrap().rx_dropped;
            (sim.stack("sim0").unwrap() == [packet], dropped)
        };
        let mut before = 0;
        agrees(&steering, seed, 4000, |packet| {
            let (passed, dropped) = passes(packet);
            let taken = dropped - before == 1;
            before = dropped;
            assert_ne!(passed, taken, "{packet:02x?}");
            taken
        });
        map.remove(0).unwrap();
        let mut random = Random(seed);
        for _ in 0..1000 {
            assert_eq!(passes(&packet(&mut random)), (true, before));
        }
    }
}

/// A UDP packet to port 53 by hand: `tags` in front of an IP header.
fn udp(tags: &[u8], ip: &[u8]) -> Vec<u8> {
    let mut packet = vec![2; 12];
    packet.extend(tags);
    packet.extend(ip);
    packet.extend([0x30, 0x39, 0, 53, 0, 8, 0, 0]);
    packet
}

#[test]
fn the_specification_takes_what_is_meant() {
    let dns = Steering::udp_ports([53]);
    let ipv4 = |words: u8, fragment: u16, protocol: u8| {
        let mut header = vec![8, 0, 0x40 | words, 0, 0, 28, 0, 0];
        header.extend(fragment.to_be_bytes());
        header.extend([64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        header.resize(2 + usize::from(words) * 4, 1);
        header
    };
    let ipv6 = |next: u8| [&[0x86, 0xdd, 0x60, 0, 0, 0, 0, 8, next, 64][..], &[0xfd; 32]].concat();
    for (what, packet, taken) in [
        ("IPv4", udp(&[], &ipv4(5, 0, 17)), true),
        ("don't fragment", udp(&[], &ipv4(5, 0x4000, 17)), true),
        ("options", udp(&[], &ipv4(15, 0, 17)), true),
        ("VLAN", udp(&[0x81, 0, 0, 5], &ipv4(5, 0, 17)), true),
        ("provider's VLAN", udp(&[0x88, 0xa8, 0, 5], &ipv4(5, 0, 17)), true),
        ("IPv6", udp(&[], &ipv6(17)), true),
        ("IPv6 in a VLAN", udp(&[0x81, 0, 0, 5], &ipv6(17)), true),
        ("two VLANs", udp(&[0x88, 0xa8, 0, 5, 0x81, 0, 0, 6], &ipv4(5, 0, 17)), false),
        ("first fragment", udp(&[], &ipv4(5, 0x2000, 17)), false),
        ("later fragment", udp(&[], &ipv4(5, 0x0007, 17)), false),
        ("TCP", udp(&[], &ipv4(5, 0, 6)), false),
        ("ICMPv6", udp(&[], &ipv6(58)), false),
        ("IPv6 hop-by-hop options", udp(&[], &ipv6(0)), false),
    ] {
        assert_eq!(dns.takes(&packet), taken, "{what}");
        assert!(!Steering::udp_ports([52, 54]).takes(&packet), "{what}");
        for len in 0..packet.len() {
            assert!(!dns.takes(&packet[..len]), "{what}, cut to {len} bytes");
        }
    }
}
