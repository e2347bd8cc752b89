//! Watching an interface, on the real kernel: what is told, to whom, and what is not.
#![cfg(target_os = "linux")]

use std::os::fd::AsFd as _;
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_getfd};
use rustix::thread::{CapabilitySet, CapabilitySets};
use xsk::kernel::linux::Linux;
use xsk::kernel::{
    Devices as _, Errno, Insn, POLLIN, PollEntry, ProgramSpec, Programs as _, Sockets as _, Watch,
};
use xsk_testbed::{Channels, End, Testbed, bed};

const PATIENCE: Duration = Duration::from_secs(10);
const LOOPBACK: u32 = 1;

/// Whether a watch is readable now, or becomes so in time.
fn readable(watch: &dyn Watch, within: Duration) -> bool {
    let mut entries = [PollEntry { fd: watch.as_fd(), events: POLLIN, revents: 0 }];
    let ready = Linux.poll(&mut entries, Some(within)).unwrap();
    assert_eq!(entries[0].revents, if ready == 1 { POLLIN } else { 0 });
    ready == 1
}

/// Checks that a watch is told of something, once.
#[track_caller]
fn told(watch: &dyn Watch, what: &str) {
    assert!(readable(watch, PATIENCE), "not told: {what}");
    assert!(watch.take(), "{what}");
}

#[track_caller]
fn silent(watch: &dyn Watch, why: &str) {
    assert!(!readable(watch, Duration::ZERO), "{why}");
    assert!(!watch.take(), "{why}");
}

/// Waits until both ends are up and no word of it is still on its way, and forgets what was told.
fn settle(bed: &Testbed, watch: &dyn Watch) {
    for end in [bed.a(), bed.b()] {
        end.wait_up().unwrap();
        // The kernel tells that a link came under a lock that every request to change one takes.
        end.set_mtu(end.link().unwrap().mtu).unwrap();
    }
    watch.take();
    silent(watch, "settled");
}

fn watch(end: &End) -> Box<dyn Watch> {
    Linux.watch(end.ifindex).unwrap()
}

#[test]
fn every_change_of_the_interface_is_told_once() {
    let Some(bed) = bed(|b| b.queues(4)) else { return };
    let a = bed.a();
    let watch = watch(a);
    settle(&bed, &*watch);
    assert_eq!(fcntl_getfd(&watch).unwrap(), FdFlags::CLOEXEC);

    a.set_mtu(1400).unwrap();
    told(&*watch, "another MTU");
    silent(&*watch, "the MTU was taken");

    for queues in [2, 4] {
        a.set_channels(Channels { rx: queues, tx: queues }).unwrap();
        assert_eq!(Linux.interface(a.ifindex).unwrap().rx_queues, queues);
        told(&*watch, "another number of queues");
        silent(&*watch, "the number of queues was taken");
    }

    // BPF: `return XDP_PASS`.
    let pass = [Insn { code: 0xb7, imm: 2, ..Insn::default() }, Insn { code: 0x95, ..Insn::default() }];
    let spec = ProgramSpec { instructions: &pass, flags: 0, name: "xsk_pass" };
    let program = Linux.load_program(&spec, &mut String::new()).unwrap();
    for program in [Some(program.as_fd()), None] {
        a.set_program(program).unwrap();
        assert_eq!(Linux.interface(a.ifindex).unwrap().attached.len(), usize::from(program.is_some()));
        told(&*watch, "a program came or went");
        silent(&*watch, "the program was taken");
    }

    a.set_up(false).unwrap();
    told(&*watch, "down");
    // Where nothing else changes with the queues, ethtool alone tells of them.
    a.set_channels(Channels { rx: 3, tx: 3 }).unwrap();
    told(&*watch, "fewer queues while it is down");
    a.set_up(true).unwrap();
    told(&*watch, "up");
    settle(&bed, &*watch);

    bed.b().set_up(false).unwrap();
    told(&*watch, "the other end is down");
    bed.b().set_up(true).unwrap();
    told(&*watch, "the other end is up");
    settle(&bed, &*watch);

    a.delete().unwrap();
    told(&*watch, "removed");
    assert_eq!(Linux.interface(a.ifindex), Err(Errno::NODEV));
    silent(&*watch, "nothing comes after the removal");
}

#[test]
fn other_interfaces_wake_nobody_however_much_they_change() {
    let Some(bed) = bed(|b| b.queues(2).single_namespace(true)) else { return };
    let (watch_a, watch_lo) = (watch(bed.a()), Linux.watch(LOOPBACK).unwrap());
    settle(&bed, &*watch_a);
    let (all, few) = (Channels { rx: 2, tx: 2 }, Channels { rx: 1, tx: 1 });
    // More than the buffers of a socket hold.
    for n in 0..500 {
        bed.b().set_mtu(1000 + n).unwrap();
    }
    silent(&*watch_a, "the other end's MTU");
    // These change what the peer can do as well, so `a` has a word to say too.
    bed.b().set_channels(few).unwrap();
    bed.b().set_channels(all).unwrap();
    bed.b().set_up(false).unwrap();
    bed.b().set_up(true).unwrap();
    settle(&bed, &*watch_a);
    silent(&*watch_lo, "everything but the loopback");
    bed.a().set_mtu(1400).unwrap();
    told(&*watch_a, "its own MTU");
    bed.b().delete().unwrap();
    told(&*watch_a, "it went with the other end");
    silent(&*watch_lo, "everything but the loopback");
}

#[test]
fn more_than_is_kept_is_told_as_well_and_then_all_is_quiet() {
    let Some(bed) = bed(|b| b) else { return };
    let watch = watch(bed.a());
    settle(&bed, &*watch);
    // A message is 2 KiB and more, and a socket keeps 208 KiB.
    for n in 0..500 {
        bed.a().set_mtu(1000 + n).unwrap();
    }
    told(&*watch, "a flood");
    silent(&*watch, "the flood was taken");
    bed.a().set_mtu(1400).unwrap();
    told(&*watch, "the next change");
}

#[test]
fn it_takes_no_privilege_and_stays_in_its_namespace() {
    let Some(bed) = bed(|b| b) else { return };
    let index = bed.b().ifindex;
    let watch = bed
        .peer(|| {
            // Capabilities belong to the thread, which is one of its own.
            let none = CapabilitySet::empty();
            let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
            rustix::thread::set_capabilities(None, sets).unwrap();
            Linux.watch(index).unwrap()
        })
        .unwrap();
    settle(&bed, &*watch);
    bed.b().set_mtu(1400).unwrap();
    told(&*watch, "an MTU in the other namespace");
    // There it has the same index as here, or another: what is here is not watched.
    for n in 0..100 {
        bed.a().set_mtu(1000 + n).unwrap();
    }
    silent(&*watch, "an MTU in this namespace");
}

#[test]
fn what_is_not_there_cannot_be_watched() {
    let Some(bed) = bed(|b| b) else { return };
    for index in [0, bed.a().ifindex + 1000, i32::MAX as u32, u32::MAX] {
        assert_eq!(Linux.watch(index).err(), Some(Errno::NODEV), "{index}");
    }
    bed.a().delete().unwrap();
    assert_eq!(Linux.watch(bed.a().ifindex).err(), Some(Errno::NODEV));
}
