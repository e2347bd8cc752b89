//! The testbed against the real kernel: what was asked is what is there, and nothing stays behind.

use std::collections::HashSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{CapabilitySet, CapabilitySets};
use xsk_testbed::{Channels, End, Error, Namespace, Testbed, bed};

/// How long something may take that is expected to happen.
const SOON: Duration = Duration::from_secs(10);

/// Waits until `done`, and fails if that takes too long.
#[track_caller]
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < deadline, "not within {SOON:?}: {what}");
        thread::yield_now();
    }
}

/// Names of the interfaces in a namespace.
fn interfaces(namespace: &Namespace) -> HashSet<String> {
    let devices = namespace.run(|| fs::read_to_string("/proc/thread-self/net/dev").unwrap()).unwrap();
    devices.lines().skip(2).map(|line| line.split(':').next().unwrap().trim().to_owned()).collect()
}

/// Whether a descriptor or a thread of this process holds the namespace of that number.
fn held(id: u64) -> bool {
    let name = format!("net:[{id}]");
    let links = |pattern: &str, suffix: &str| -> Vec<_> {
        let entries = fs::read_dir(pattern).unwrap().filter_map(Result::ok);
        entries.filter_map(|e| fs::read_link(e.path().join(suffix)).ok()).collect()
    };
    let descriptors =
        fs::read_dir("/proc/self/fd").unwrap().filter_map(|e| fs::read_link(e.ok()?.path()).ok());
    let threads = links("/proc/self/task", "ns/net");
    descriptors.chain(threads).any(|link| link.as_os_str() == name.as_str())
}

#[test]
fn queues_and_mtu_are_what_was_asked() {
    for (queues, mtu) in [(1, 1500), (4, 9000), (7, 65535)] {
        let Some(bed) = bed(|b| b.queues(queues).mtu(mtu)) else { return };
        for end in [bed.a(), bed.b()] {
            assert_eq!(end.channels().unwrap(), Channels { rx: queues, tx: queues });
            let link = end.link().unwrap();
            assert_eq!((link.rx_queues, link.tx_queues, link.mtu), (queues, queues, mtu));
            assert!(link.up);
        }
    }
}

#[test]
fn the_caller_is_next_to_a_and_goes_back() {
    let before = Namespace::current().unwrap().id().unwrap();
    let Some(bed) = bed(|b| b) else { return };
    let inside = Namespace::current().unwrap().id().unwrap();
    assert_ne!(inside, before);
    assert_eq!(inside, bed.a().namespace.id().unwrap());
    let (there, unmoved) =
        bed.peer(|| Namespace::current().unwrap().id().unwrap()).map(|id| (id, inside)).unwrap();
    assert_eq!(there, bed.b().namespace.id().unwrap());
    assert_ne!(there, unmoved);
    drop(bed);
    assert_eq!(Namespace::current().unwrap().id().unwrap(), before);
}

#[test]
fn each_namespace_has_its_end_and_loopback_alone() {
    let Some(bed) = bed(|b| b) else { return };
    let names = |end: &End| {
        interfaces(&end.namespace).into_iter().filter(|name| name.starts_with("xsk")).collect::<Vec<_>>()
    };
    assert_eq!(names(bed.a()), ["xsk0"]);
    assert_eq!(names(bed.b()), ["xsk1"]);
}

#[test]
fn both_ends_can_share_a_namespace() {
    let Some(bed) = bed(|b| b.single_namespace(true)) else { return };
    assert_eq!(bed.a().namespace.id().unwrap(), bed.b().namespace.id().unwrap());
    assert_ne!(bed.a().ifindex, bed.b().ifindex);
    let names = interfaces(&bed.a().namespace);
    assert!(names.contains("xsk0") && names.contains("xsk1"), "{names:?}");
}

#[test]
fn dropping_it_removes_the_pair_and_the_namespaces() {
    // Of each side in turn: whoever still holds the other side sees its end go, because the
    // namespace of this one went, and the pair with it.
    for hold_b in [true, false] {
        let Some(bed) = bed(|b| b) else { return };
        let (kept, gone) = if hold_b { (bed.b(), bed.a()) } else { (bed.a(), bed.b()) };
        let (kept, id, name) = (kept.namespace.clone(), gone.namespace.id().unwrap(), kept.name.clone());
        assert!(held(id) && interfaces(&kept).contains(&name));
        drop(bed);
        assert!(!held(id), "a descriptor or a thread of a dropped testbed is left");
        wait_until("the end disappears with the other namespace", || !interfaces(&kept).contains(&name));
    }
}

#[test]
fn a_panic_leaves_nothing() {
    if !xsk_testbed::can_run() {
        return;
    }
    let (send, receive) = std::sync::mpsc::channel();
    let thread = thread::spawn(move || {
        let bed = Testbed::builder().build().unwrap();
        send.send((bed.a().namespace.id().unwrap(), bed.b().clone())).unwrap();
        panic!("on purpose");
    });
    assert!(thread.join().is_err());
    let (gone, b) = receive.recv().unwrap();
    assert!(!held(gone));
    wait_until("the end disappears with the other namespace", || !interfaces(&b.namespace).contains(&b.name));
}

#[test]
fn a_caught_panic_takes_the_thread_back() {
    if !xsk_testbed::can_run() {
        return;
    }
    let before = Namespace::current().unwrap().id().unwrap();
    let panic = catch_unwind(AssertUnwindSafe(|| {
        let bed = Testbed::builder().build().unwrap();
        let _: () = bed.peer(|| panic!("on purpose, at the peer")).unwrap();
    }));
    assert_eq!(*panic.unwrap_err().downcast::<&str>().unwrap(), "on purpose, at the peer");
    assert_eq!(Namespace::current().unwrap().id().unwrap(), before);
    assert!(Testbed::builder().build().is_ok(), "the thread may have a testbed again");
}

#[test]
fn a_second_testbed_on_a_thread_is_refused() {
    let Some(bed) = bed(|b| b) else { return };
    let here = Namespace::current().unwrap().id().unwrap();
    assert!(matches!(Testbed::builder().build(), Err(Error::Nested)));
    assert_eq!(Namespace::current().unwrap().id().unwrap(), here);
    drop(bed);
}

#[test]
fn what_cannot_be_made_is_an_error_and_moves_nobody() {
    if !xsk_testbed::can_run() {
        return;
    }
    let before = Namespace::current().unwrap().id().unwrap();
    for builder in
        [Testbed::builder().queues(0), Testbed::builder().queues(1 << 20), Testbed::builder().mtu(1 << 20)]
    {
        let error = builder.build().unwrap_err().to_string();
        assert!(error.starts_with("making a veth pair: "), "{error}");
        assert_eq!(Namespace::current().unwrap().id().unwrap(), before);
    }
}

#[test]
fn many_at_once_do_not_meet() {
    let threads: Vec<_> = (0..8)
        .map(|_| {
            thread::spawn(|| {
                let bed = bed(|b| b.queues(2))?;
                let (here, there) = (bed.a().udp(7).unwrap(), bed.b().udp(7).unwrap());
                here.set_read_timeout(Some(SOON)).unwrap();
                there.send_to(&bed.b().mac, (bed.a().ipv4, 7)).unwrap();
                let mut buffer = [0; 64];
                let (len, from) = here.recv_from(&mut buffer).unwrap();
                assert_eq!((&buffer[..len], from.ip()), (&bed.b().mac[..], bed.b().ipv4.into()));
                Some((bed.a().ipv4, bed.a().mac))
            })
        })
        .collect();
    let seen: Vec<_> = threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect();
    assert_eq!(seen.iter().collect::<HashSet<_>>().len(), seen.len(), "each has addresses of its own");
}

#[test]
fn deleting_an_end_takes_the_other_along() {
    let Some(bed) = bed(|b| b) else { return };
    bed.b().delete().unwrap();
    wait_until("the other end is gone", || !interfaces(&bed.a().namespace).contains("xsk0"));
}

#[test]
fn an_end_comes_back_with_its_neighbour() {
    let Some(bed) = bed(|b| b) else { return };
    bed.a().set_up(false).unwrap();
    wait_until("the other end lost its carrier", || !bed.b().link().unwrap().up);
    bed.a().set_up(true).unwrap();
    bed.a().wait_up().unwrap();
    bed.b().wait_up().unwrap();
    let (here, there) = (bed.a().udp(0).unwrap(), bed.b().udp(7).unwrap());
    there.set_read_timeout(Some(SOON)).unwrap();
    let before = bed.b().link().unwrap().counters.rx_packets;
    here.send_to(b"back", (bed.b().ipv4, 7)).unwrap();
    assert_eq!(there.recv(&mut [0; 8]).unwrap(), 4);
    assert_eq!(bed.b().link().unwrap().counters.rx_packets - before, 1, "no ARP before it");
}

#[test]
fn the_mtu_can_change_later() {
    let Some(bed) = bed(|b| b.mtu(1500)) else { return };
    bed.a().set_mtu(9000).unwrap();
    assert_eq!(bed.a().link().unwrap().mtu, 9000);
    assert_eq!(bed.b().link().unwrap().mtu, 1500);
}

#[test]
fn without_privilege_it_is_skipped_or_fails_as_ci_wants() {
    // Capabilities belong to the thread.
    let thread = thread::spawn(|| {
        let none = CapabilitySet::empty();
        let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
        rustix::thread::set_capabilities(None, sets).unwrap();
        let missing = xsk_testbed::available().unwrap_err();
        assert!(missing.starts_with("needs root (") && missing.contains("CAP_SYS_ADMIN"), "{missing}");
        let result = catch_unwind(|| bed(|b| b).is_none());
        if std::env::var(xsk_testbed::REQUIRE).is_ok_and(|value| value == "1") {
            assert!(result.is_err());
        } else {
            assert!(result.unwrap());
        }
    });
    thread.join().unwrap();
}
