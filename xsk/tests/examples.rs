//! The examples, on the simulated kernel.

use std::net::Ipv4Addr;

use xsk::Device;
use xsk_sim::Sim;

#[allow(dead_code, unreachable_pub)]
#[path = "../examples/echo.rs"]
mod echo;
#[allow(dead_code, unreachable_pub)]
#[path = "../examples/forward.rs"]
mod forward;

/// A UDP packet over IPv4 with `options` bytes of IP options, from port `from` to port `to`.
fn udp(from: u16, to: u16, options: usize, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x00];
    let header = 20 + options;
    let total = (header + 8 + payload.len()) as u16;
    packet.extend([0x40 | (header / 4) as u8, 0]);
    packet.extend(total.to_be_bytes());
    packet.extend([0, 1, 0, 0, 64, 17, 0, 0]);
    packet.extend(Ipv4Addr::new(10, 0, 0, 2).octets());
    packet.extend(Ipv4Addr::new(10, 0, 0, 1).octets());
    packet.extend(vec![1; options]);
    packet.extend(from.to_be_bytes());
    packet.extend(to.to_be_bytes());
    packet.extend((8 + payload.len() as u16).to_be_bytes());
    packet.extend([0xbe, 0xef]);
    packet.extend(payload);
    packet
}

/// The answer to [`udp`], by what the protocol says and not by what the example does.
fn answer(from: u16, to: u16, options: usize, payload: &[u8]) -> Vec<u8> {
    let mut packet = udp(to, from, options, payload);
    packet[..12].rotate_left(6);
    packet[26..34].rotate_left(4);
    packet[14 + 20 + options + 6..][..2].fill(0);
    packet
}

#[test]
fn echo_answers_udp_and_leaves_the_rest_to_linux() {
    let sim = Sim::builder().queues(4).build().unwrap();
    let mut port = echo::open(&sim.device("sim0").unwrap()).unwrap();
    let wire = sim.capture("sim0").unwrap();
    let arp = [&[0xff; 6][..], &[2, 0, 0, 0, 0, 2, 0x08, 0x06], &[0; 46]].concat();
    let other = udp(1000, 53, 0, b"no echo");
    sim.inject("sim0", &arp).unwrap();
    sim.inject("sim0", &other).unwrap();
    let mut expected = Vec::new();
    for from in 1000_u16..1200 {
        let (options, payload) = (4 * usize::from(from % 3), from.to_be_bytes().repeat(10));
        sim.inject("sim0", &udp(from, 7, options, &payload)).unwrap();
        expected.push(answer(from, 7, options, &payload));
    }
    sim.inject("sim0", &udp(7, 7, 0, b"from another echo server")).unwrap();

    let mut seen = 0;
    while seen < 201 {
        assert!(port.wait(None).unwrap());
        seen += port.process(echo::answer).unwrap();
    }
    port.flush().unwrap();
    let mut answers = wire.take();
    answers.sort();
    expected.sort();
    assert_eq!(answers, expected);
    assert_eq!(sim.stack("sim0").unwrap(), [arp, other], "these are for Linux");
    // The packets came by several queues, and each answer left by the queue of its question.
    let statistics = port.monitor().statistics().unwrap();
    assert!(statistics.queues().iter().all(|(_, counts)| counts.rx_packets >= counts.tx_packets));
    assert!(statistics.queues().iter().filter(|(_, counts)| counts.tx_packets != 0).count() > 1);
    let census = port.umem().census();
    assert_eq!((census.contradiction(), census.program), (None, 0));
}

#[test]
fn forward_is_a_cable() {
    // near0 - a, b - near1: what goes in at one end comes out at the other.
    let sim = Sim::builder().names("near0", "a").pair("b", "near1").queues(2).build().unwrap();
    let device = |name: &str| -> Device { sim.device(name).unwrap() };
    let [mut a, mut b] = forward::open(&device("a"), &device("b")).unwrap();
    let there: Vec<_> = (0..100).map(|n| udp(1000 + n, 9, 0, &[n as u8; 30])).collect();
    let back: Vec<_> = (0..100).map(|n| udp(2000 + n, 9, 0, &[n as u8; 300])).collect();
    for (there, back) in there.iter().zip(&back) {
        sim.inject("a", there).unwrap();
        sim.inject("b", back).unwrap();
    }
    let mut seen = 0;
    while seen < 200 {
        assert!(xsk::Port::wait_any(&mut [&mut a, &mut b], None).unwrap());
        seen += forward::forward(&mut a, &mut b).unwrap();
    }
    for port in [&mut a, &mut b] {
        assert_eq!(port.flush().unwrap(), 0);
    }
    sim.run();
    let sorted = |mut packets: Vec<Vec<u8>>| {
        packets.sort();
        packets
    };
    assert_eq!(sorted(sim.stack("near1").unwrap()), there);
    assert_eq!(sorted(sim.stack("near0").unwrap()), back);
    let census = a.umem().census();
    assert_eq!((census.contradiction(), census.program), (None, 0));
}
