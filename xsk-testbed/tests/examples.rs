//! The library's examples on the real kernel.
#![cfg(target_os = "linux")]

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use xsk::Device;
use xsk_testbed::bed;

#[allow(dead_code, unreachable_pub)]
#[path = "../../xsk/examples/echo.rs"]
mod echo;

const NAP: Duration = Duration::from_millis(50);

#[test]
fn echo_answers_a_plain_udp_socket_while_linux_answers_the_rest() {
    let Some(bed) = bed(|b| b.queues(2)) else { return };
    let mut port = echo::open(&Device::open(&bed.a().name).unwrap()).unwrap();
    // Not for the example: the stack at this end has it.
    let other = bed.a().udp(0).unwrap();
    other.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let theirs = bed.b().udp(0).unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let ours: Ipv4Addr = bed.a().ipv4;

    let stop = AtomicBool::new(false);
    let port = std::thread::scope(|threads| {
        let server = threads.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                port.wait(Some(NAP)).unwrap();
                port.process(echo::answer).unwrap();
            }
            port
        });
        let mut answer = [0; 2000];
        for n in 0..500_u32 {
            let question = n.to_be_bytes().repeat(1 + n as usize % 300);
            theirs.send_to(&question, (ours, 7)).unwrap();
            let (len, from) = theirs.recv_from(&mut answer).unwrap();
            assert_eq!((&answer[..len], from), (&question[..], (ours, 7).into()));
        }
        theirs.send_to(b"for Linux", other.local_addr().unwrap()).unwrap();
        let (len, _) = other.recv_from(&mut answer).unwrap();
        assert_eq!(&answer[..len], b"for Linux");
        stop.store(true, Ordering::Relaxed);
        server.join().unwrap()
    });
    let total = port.monitor().statistics().unwrap().total();
    assert_eq!((total.rx_packets, total.tx_packets, total.rx_lost()), (500, 500, 0));
    let census = port.umem().census();
    assert_eq!((census.contradiction(), census.program), (None, 0));
}
