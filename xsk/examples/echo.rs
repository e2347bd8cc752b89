//! Answers UDP packets to port 7 with what they said. Everything else, such as ARP and ping, is
//! answered by Linux, as without this program.
//!
//! ```sh
//! cargo run --example echo -- eth1
//! ```

use std::error::Error;

use xsk::port::Action;
use xsk::xdp::Steering;
use xsk::{Device, Packet, Port};

const ECHO: u16 = 7;

fn main() -> Result<(), Box<dyn Error>> {
    let name = std::env::args().nth(1).ok_or("usage: echo INTERFACE")?;
    let mut port = open(&Device::open(&name)?)?;
    loop {
        port.wait(None)?;
        port.process(answer)?;
    }
}

/// UDP packets to port 7 come here, on all queues; the rest goes on to Linux.
pub fn open(device: &Device) -> xsk::Result<Port> {
    Port::builder(device).steering(Steering::udp_ports([ECHO])).open()
}

/// Turns a packet into its answer: addresses and ports change places, so the IP checksum stays right.
pub fn answer(mut packet: Packet) -> Action {
    // Steering lets no packet through that ends before its UDP ports.
    let is_tagged = matches!(packet[12..14], [0x81, 0x00] | [0x88, 0xa8]); // with a VLAN
    let ip = if is_tagged { 18 } else { 14 };
    let is_ipv4 = packet[ip] >> 4 == 4;
    let udp = ip + if is_ipv4 { 4 * usize::from(packet[ip] & 15) } else { 40 };
    // Who is itself an echo server would answer the answer, for ever; a group is not answered.
    if packet[udp..udp + 2] == ECHO.to_be_bytes() || packet[0] & 1 == 1 {
        return Action::Drop(packet);
    }
    swap(&mut packet, 0, 6);
    let (addresses, len) = if is_ipv4 { (ip + 12, 4) } else { (ip + 8, 16) };
    swap(&mut packet, addresses, len);
    swap(&mut packet, udp, 2);
    if is_ipv4 && let Some(checksum) = packet.get_mut(udp + 6..udp + 8) {
        checksum.fill(0); // none: on its way here the kernel may have left it to a NIC
    }
    Action::Send(packet)
}

/// Exchanges two fields of `len` bytes that lie side by side.
fn swap(packet: &mut [u8], at: usize, len: usize) {
    let (first, second) = packet[at..at + 2 * len].split_at_mut(len);
    first.swap_with_slice(second);
}
