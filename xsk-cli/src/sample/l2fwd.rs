//! Send packets back out where they came in, or forward them between two interfaces.

use std::hint::spin_loop;

use xsk::{Port, Result};

use super::NAP;

/// Sends packets back, changed in place by `rewrite`, for as long as `go_on` says. It is asked once a
/// turn, with how many packets there were so far.
pub(crate) fn run(
    port: &mut Port,
    poll: bool,
    mut rewrite: impl FnMut(&mut [u8]),
    mut go_on: impl FnMut(&mut [&mut Port], u64) -> bool,
) -> Result<()> {
    let mut forwarded = 0;
    while go_on(&mut [port], forwarded) {
        let taken = port.process(|mut packet| {
            rewrite(&mut packet);
            packet
        })?;
        forwarded += u64::from(taken);
        if taken != 0 {
            continue;
        }
        if poll {
            port.wait(Some(NAP))?;
        } else {
            spin_loop();
        }
    }
    Ok(())
}

/// Forwards packets between two ports, changed in place by `there` and `back`, for as long as `go_on`
/// says. It is asked once a turn, with how many packets there were so far.
pub(crate) fn between(
    [near, far]: [&mut Port; 2],
    poll: bool,
    mut there: impl FnMut(&mut [u8]),
    mut back: impl FnMut(&mut [u8]),
    mut go_on: impl FnMut(&mut [&mut Port], u64) -> bool,
) -> Result<()> {
    let mut forwarded = 0;
    while go_on(&mut [near, far], forwarded) {
        let mut taken = near.forward(far, |mut packet| {
            there(&mut packet);
            packet
        })?;
        taken += far.forward(near, |mut packet| {
            back(&mut packet);
            packet
        })?;
        forwarded += u64::from(taken);
        if taken != 0 {
            continue;
        }
        if poll {
            Port::wait_any(&mut [near, far], Some(NAP))?;
        } else {
            spin_loop();
        }
    }
    Ok(())
}

/// Destination and source MAC address, as a packet begins with them.
pub(crate) type Addresses = [u8; 12];

/// Writes both MAC addresses.
#[inline(always)]
pub(crate) fn readdress(packet: &mut [u8], addresses: &Addresses) {
    if let Some(header) = packet.first_chunk_mut::<12>() {
        *header = *addresses;
    }
}

/// Writes the source MAC address.
#[inline(always)]
pub(crate) fn resource(packet: &mut [u8], from: &[u8; 6]) {
    if let Some(source) = packet.get_mut(6..12) {
        source.copy_from_slice(from);
    }
}

/// Swaps source and destination MAC address, in registers.
#[inline(always)]
pub(crate) fn swap_macs(packet: &mut [u8]) {
    if let Some(header) = packet.first_chunk_mut::<12>() {
        let [a, b, c, d, e, f, u, v, w, x, y, z] = *header;
        *header = [u, v, w, x, y, z, a, b, c, d, e, f];
    }
}

/// Turns a UDP packet over IPv4 into its own answer: MAC addresses, IP addresses and ports swapped.
/// The checksums stay valid, because they are sums of the same words. Anything else stays as it is.
#[inline]
pub(crate) fn reflect(packet: &mut [u8]) {
    const IPV4: usize = 14;
    const UDP: usize = IPV4 + 20;
    let plain = packet.len() >= UDP + 8
        && packet[12..14] == [0x08, 0x00]
        && packet[IPV4] == 0x45
        && packet[IPV4 + 9] == 17;
    if plain {
        swap_macs(packet);
        packet[IPV4 + 12..IPV4 + 20].rotate_left(4);
        packet[UDP..UDP + 4].rotate_left(2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macs_are_swapped_and_nothing_else() {
        let mut packet: Vec<u8> = (0..64).collect();
        swap_macs(&mut packet);
        let swapped: Vec<u8> = (6..12).chain(0..6).chain(12..64).collect();
        assert_eq!(packet, swapped);
        let mut short = [1; 11];
        swap_macs(&mut short);
        assert_eq!(short, [1; 11]);
    }

    #[test]
    fn addresses_are_written_and_nothing_else() {
        let mut packet: Vec<u8> = (0..64).collect();
        readdress(&mut packet, &[7; 12]);
        assert_eq!((&packet[..12], &packet[12..]), (&[7; 12][..], &(12..64).collect::<Vec<u8>>()[..]));
        let mut short = [1; 11];
        readdress(&mut short, &[7; 12]);
        assert_eq!(short, [1; 11]);
    }

    #[test]
    fn a_reflected_packet_is_a_valid_answer() {
        let build = |reversed: bool| {
            let [a, b] = [([2, 0, 0, 0, 0, 1], [10, 0, 0, 1], 1000), ([2, 0, 0, 0, 0, 2], [10, 0, 0, 2], 7)];
            let (from, to) = if reversed { (b, a) } else { (a, b) };
            let mut frame = Vec::new();
            etherparse::PacketBuilder::ethernet2(from.0, to.0)
                .ipv4(from.1, to.1, 64)
                .udp(from.2, to.2)
                .write(&mut frame, b"ping pong")
                .unwrap();
            frame
        };
        let mut packet = build(false);
        reflect(&mut packet);
        assert_eq!(packet, build(true));
        let mut other = vec![7; 60];
        reflect(&mut other);
        assert_eq!(other, [7; 60]);
    }
}
