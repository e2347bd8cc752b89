//! The library on kernels that are older (or newer) than the simulated one.

mod wrapped;

use wrapped::*;
use xsk::abi::{RingKind, XDP_OPTIONS};
use xsk::kernel::Errno;
use xsk::xdp::AttachMode;
use xsk::{Cause, Device, Interest, Mode, Sent, Socket, Umem};
use xsk_sim::Sim;
use xsk_sim::wrap::{Builder, Call, Quirk, Wrapper};

/// A packet in and a packet out.
fn assert_works(bed: &mut Bed) {
    assert_eq!(bed.xsk.fill.refill(&mut bed.pool, 4), 4);
    bed.inject();
    assert_eq!(bed.transmit(1), 1);
    bed.sim.run();
    assert_eq!(bed.sim.stack("sim1").unwrap(), [PACKET]);
    let held = bed.take();
    assert_eq!(held.len(), 2);
    assert!(matches!(&held[0], Held::Packet(packet) if packet[..] == PACKET));
    let census = bed.assert_unique(&held);
    assert_eq!((census.contradiction(), census.faults.total()), (None, 0));
    bed.put(held);
}

#[test]
fn a_wrapper_without_differences_changes_nothing() {
    let mut bed = Bed::new(|wrapper| wrapper, true);
    assert_works(&mut bed);
    assert!(bed.program.attachment().program().has_frags());
    assert_eq!(bed.device.kernel().name(), "sim");
    let statistics = bed.xsk.socket.statistics().unwrap();
    assert_eq!(statistics.tx_ring_empty, Some(1));
    bed.close(Vec::new());
}

#[test]
fn statistics_that_an_old_kernel_does_not_keep_are_absent() {
    let counted = |wrap: fn(Builder) -> Builder| {
        let mut bed = Bed::with(wrap, true, |xsk| xsk.rx_size(2));
        bed.inject();
        bed.xsk.fill.refill(&mut bed.pool, 8);
        (0..3).for_each(|_| bed.inject());
        bed.xsk.socket.statistics().unwrap()
    };
    let new = counted(|wrapper| wrapper);
    assert_eq!((new.rx_dropped, new.rx_ring_full), (1, Some(1)));
    assert_eq!((new.rx_fill_ring_empty, new.tx_ring_empty), (Some(1), Some(0)));
    let old = counted(|wrapper| wrapper.quirk(Quirk::OldStatistics));
    assert_eq!((old.rx_dropped, old.rx_ring_full), (2, None), "a full RX is in the one counter");
    assert_eq!((old.rx_fill_ring_empty, old.tx_ring_empty), (None, None));
}

#[test]
fn without_flags_words_tx_always_needs_a_wakeup_and_fill_never() {
    let mut bed = Bed::new(|wrapper| wrapper.quirk(Quirk::OldOffsets), true);
    assert!(bed.xsk.tx.needs_wakeup());
    assert!(!bed.xsk.fill.needs_wakeup());
    assert_works(&mut bed);
    assert!(bed.xsk.tx.needs_wakeup());
    assert!(!bed.xsk.fill.needs_wakeup());
    bed.close(Vec::new());
}

#[test]
fn without_xdp_options_a_socket_is_taken_for_copy_mode() {
    let mut bed = Bed::with(|wrapper| wrapper.quirk(Quirk::NoOptions), true, |xsk| xsk.mode(Mode::Copy));
    assert_eq!((bed.xsk.socket.is_zero_copy(), bed.xsk.socket.mode()), (false, Mode::Copy));
    assert_works(&mut bed);
}

#[test]
fn a_kernel_without_need_wakeup_is_named_and_works_without_it() {
    let old = Wrapper::around(Sim::new().kernel()).quirk(Quirk::NoNeedWakeup).build();
    let device = Device::open_on(old.kernel(), "sim0").unwrap();
    let (umem, _pool) = Umem::builder().frames(FRAMES).build().unwrap();
    let error = Socket::builder(&device).ring_size(16).open(&umem).unwrap_err();
    assert_eq!(*error.cause(), Cause::KernelTooOld { feature: "need_wakeup", since: "5.4" });
    assert_eq!(error.errno(), Some(Errno::INVAL));

    let mut bed = Bed::with(|wrapper| wrapper.quirk(Quirk::NoNeedWakeup), true, |xsk| xsk.need_wakeup(false));
    assert_works(&mut bed);
}

#[test]
fn a_program_is_loaded_without_frags_where_the_kernel_has_none() {
    let mut bed = Bed::new(|wrapper| wrapper.quirk(Quirk::NoFrags), true);
    assert!(!bed.program.attachment().program().has_frags());
    assert_eq!(bed.program.mode(), AttachMode::Native);
    assert_works(&mut bed);
}

#[test]
fn a_kernel_without_tx_budget_is_named() {
    let bed = Bed::with(|wrapper| wrapper.quirk(Quirk::NoTxBudget), true, |xsk| xsk.tx_size(64));
    let error = bed.xsk.socket.set_tx_budget(64).unwrap_err();
    assert_eq!(*error.cause(), Cause::KernelTooOld { feature: "the TX budget option", since: "6.17" });
    let bed = Bed::with(|wrapper| wrapper, true, |xsk| xsk.tx_size(64));
    bed.xsk.socket.set_tx_budget(64).unwrap();
}

#[test]
fn everything_old_at_once_works() {
    let old = |wrapper: Builder| {
        wrapper
            .quirk(Quirk::OldStatistics)
            .quirk(Quirk::OldOffsets)
            .quirk(Quirk::NoOptions)
            .quirk(Quirk::NoNeedWakeup)
            .quirk(Quirk::NoFrags)
            .quirk(Quirk::NoTxBudget)
            .quirk(Quirk::SilentFullCompletion)
    };
    let mut bed = Bed::with(old, true, |xsk| xsk.need_wakeup(false));
    assert_works(&mut bed);
    bed.close(Vec::new());
}

#[test]
fn a_full_completion_ring_delays_packets_and_loses_none() {
    for (quirk, said) in [(None, Sent::Again), (Some(Quirk::SilentFullCompletion), Sent::Done)] {
        let wrap = |wrapper: Builder| match quirk {
            Some(quirk) => wrapper.quirk(quirk),
            None => wrapper,
        };
        let mut bed = Bed::with(wrap, true, |xsk| xsk.completion_size(4));
        assert_eq!(bed.transmit(FRAMES), FRAMES);
        assert_eq!(bed.xsk.tx.pending(), 12, "COMPLETION is full");
        assert_eq!(bed.xsk.socket.send().unwrap(), said);
        let mut held = Vec::new();
        for round in 1..=4 {
            assert_eq!(bed.xsk.completion.available(), 4);
            let taken = bed.take();
            held.extend(taken);
            let pending = 12u32.saturating_sub(4 * round);
            let answer = if pending > 0 { said } else { Sent::Done };
            assert_eq!(bed.xsk.socket.send().unwrap(), answer);
            assert_eq!(bed.xsk.tx.pending(), pending);
        }
        assert_eq!(held.len(), FRAMES as usize);
        let census = bed.assert_unique(&held);
        assert_eq!((census.contradiction(), census.faults.total()), (None, 0));
        bed.sim.run();
        assert_eq!(bed.sim.stack("sim1").unwrap().len(), FRAMES as usize);
        bed.close(held);
    }
}

#[test]
fn the_budget_of_a_send_is_told_where_a_full_completion_ring_is_not() {
    let sim = Sim::new();
    let old = Wrapper::around(sim.kernel()).quirk(Quirk::SilentFullCompletion).build();
    let device = Device::open_on(old.kernel(), "sim0").unwrap();
    let (umem, mut pool) = Umem::builder().frames(64).build().unwrap();
    let mut xsk = Socket::builder(&device).ring_size(64).open_tx(&umem).unwrap();
    for _ in 0..64 {
        xsk.tx.reserve(1).push(pool.packet(0, 60).unwrap()).unwrap();
    }
    assert_eq!(xsk.socket.send().unwrap(), Sent::Again);
    assert_eq!(xsk.tx.pending(), 32);
}

/// The kernel of before July 2026, with a link to it that spoils the third packet.
fn never_completes(wrapper: Builder) -> Builder {
    let mut seen = 0;
    let spoil = move |mut entry: xsk::abi::Descriptor, _: &_| {
        seen += 1;
        if seen == 3 {
            entry.len = 0;
        }
        vec![entry]
    };
    // SAFETY: a descriptor that loses its length lends the kernel nothing more.
    unsafe { wrapper.tamper(RingKind::Tx, spoil) }.quirk(Quirk::InvalidNeverCompleted)
}

#[test]
fn a_frame_that_is_never_completed_is_with_the_kernel_until_it_is_reclaimed() {
    let mut bed = Bed::new(never_completes, true);
    assert_eq!(bed.transmit(5), 5);
    assert_eq!(bed.xsk.tx.pending(), 2, "the batch ended at the invalid one");
    assert_eq!(bed.xsk.socket.statistics().unwrap().tx_invalid, 1);
    assert_eq!(bed.xsk.socket.send().unwrap(), Sent::Done);
    assert_eq!(bed.xsk.tx.pending(), 0);
    let held = bed.take_all();
    assert_eq!(held.len(), 4);
    let census = bed.assert_unique(&held);
    assert_eq!((census.kernel, census.contradiction()), (1, None), "{census:?}");
    bed.sim.run();
    assert_eq!(bed.sim.stack("sim1").unwrap().len(), 4);
    // Nothing is reclaimed while a ring is there.
    // SAFETY: then it does nothing.
    assert_eq!(unsafe { bed.umem.reclaim() }, 0);
    bed.close(held);
}

#[test]
fn invalid_descriptors_are_completed_where_the_kernel_does_so() {
    let mut bed = Bed::new(
        |wrapper| {
            // SAFETY: a descriptor that loses its length lends the kernel nothing more.
            unsafe { wrapper.fault(RingKind::Tx, xsk_sim::wrap::Fault::Empty) }
        },
        true,
    );
    assert_eq!(bed.transmit(2), 2);
    let _ = bed.xsk.socket.send().unwrap();
    assert_eq!(bed.xsk.socket.statistics().unwrap().tx_invalid, 2);
    let held = bed.take_all();
    assert_eq!(bed.assert_unique(&held).kernel, 0);
    assert_eq!(held.len(), 2);
}

#[test]
fn a_socket_that_only_sends_is_refused_by_maps_that_need_rx_and_changes_nothing() {
    for newer in [true, false] {
        let mut bed =
            Bed::new(|wrapper| if newer { wrapper.quirk(Quirk::MapNeedsRx) } else { wrapper }, true);
        let other = Device::open_on(bed.wrapper.kernel(), "sim1").unwrap();
        let (umem, _pool) = Umem::builder().frames(FRAMES).build().unwrap();
        let sender = Socket::builder(&other).ring_size(16).open_tx(&umem).unwrap();
        let inserted = bed.program.map().insert(0, &sender.socket);
        if newer {
            assert_eq!(*inserted.unwrap_err().cause(), Cause::NeedsRxRing);
            assert_works(&mut bed);
        } else {
            inserted.unwrap();
            bed.xsk.fill.refill(&mut bed.pool, 4);
            bed.inject();
            assert_eq!(bed.xsk.rx.available(), 0, "the slot is the sender's now");
        }
    }
}

#[test]
fn calls_are_refused_or_answered_as_told() {
    let sim = Sim::new();
    let wrapper = Wrapper::around(sim.kernel()).refuse(Call::Bind, Errno::OPNOTSUPP).build();
    let device = Device::open_on(wrapper.kernel(), "sim0").unwrap();
    let (umem, _pool) = Umem::builder().frames(FRAMES).build().unwrap();
    let error = Socket::builder(&device).ring_size(16).open(&umem).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::OPNOTSUPP));

    // A full COMPLETION ring that is told as success, and counters that don't count.
    let lies = |wrapper: Builder| {
        wrapper
            .answer(Call::Send, |_| Ok(()))
            .answer(Call::GetOption(XDP_OPTIONS), |_| Err(Errno::OPNOTSUPP))
            .count(|counters| counters.tx_ring_empty_descs = 0)
    };
    let mut bed = Bed::with(lies, true, |xsk| xsk.completion_size(1));
    assert_eq!(bed.transmit(2), 2);
    assert_eq!(bed.xsk.socket.send().unwrap(), Sent::Done);
    assert_eq!(bed.xsk.tx.pending(), 1);
    bed.take();
    let _ = bed.xsk.socket.send().unwrap();
    assert_eq!(bed.xsk.socket.statistics().unwrap().tx_ring_empty, Some(0));
}

#[test]
fn relayed_rings_that_nothing_befalls_are_as_the_kernels() {
    let all = |mut wrapper: Builder| {
        for ring in [RingKind::Fill, RingKind::Rx, RingKind::Tx, RingKind::Completion] {
            // SAFETY: every entry stays as it is.
            wrapper = unsafe { wrapper.tamper(ring, |entry, _| vec![entry]) };
        }
        wrapper
    };
    let mut bed = Bed::with(all, true, |xsk| xsk.ring_size(4));
    for _ in 0..10 {
        assert_eq!(bed.xsk.fill.refill(&mut bed.pool, 8), 4);
        assert_eq!(bed.transmit(8), 4);
        assert_eq!(bed.xsk.tx.pending(), 0);
        for _ in 0..6 {
            bed.inject();
        }
        let ready = bed.xsk.socket.wait(Interest::Both, None).unwrap();
        assert!(ready.rx && ready.tx);
        let (rx, completion) = (bed.xsk.rx.available(), bed.xsk.completion.available());
        assert_eq!((rx, completion), (4, 4));
        assert_eq!(bed.transmit(1), 1);
        assert_eq!(bed.xsk.tx.pending(), 1, "COMPLETION is full");
        let held = bed.take();
        bed.assert_inside(&held);
        assert_eq!(bed.assert_unique(&held).contradiction(), None);
        bed.put(held);
        assert_eq!(bed.xsk.socket.send().unwrap(), Sent::Done);
        let held = bed.take();
        assert_eq!(held.len(), 1);
        bed.put(held);
    }
    let statistics = bed.xsk.socket.statistics().unwrap();
    assert_eq!(statistics.rx_fill_ring_empty, Some(20));
    let error = bed.xsk.socket.wait(Interest::Rx, None).unwrap_err();
    assert_eq!(*error.cause(), Cause::Deadlock);
    bed.close(Vec::new());
}
