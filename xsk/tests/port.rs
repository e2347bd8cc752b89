//! `Port` on the simulated kernel.

use std::sync::mpsc;
use std::time::Duration;

use xsk::port::{Action, Event, Queues, Refused};
use xsk::xdp::Steering;
use xsk::{Cause, Device, Packet, Port, PushError, Umem};
use xsk_sim::Sim;

fn world(queues: u32) -> (Sim, Device) {
    let sim = Sim::builder().queues(queues).build().unwrap();
    let device = sim.device("sim0").unwrap();
    (sim, device)
}

/// A packet that says its number, in its destination address so that nothing hashes it.
fn numbered(n: u32) -> [u8; 60] {
    let mut packet = [0; 60];
    packet[..4].copy_from_slice(&n.to_be_bytes());
    packet
}

fn number(packet: &[u8]) -> u32 {
    u32::from_be_bytes(*packet.first_chunk().unwrap())
}

/// Every frame is where it should be, and none with the program.
fn assert_all_home(umem: &Umem) {
    let census = umem.census();
    assert_eq!((census.contradiction(), census.program, census.faults.total()), (None, 0, 0), "{census:?}");
}

/// A port that has gone leaves what was in FILL with the kernel; all else is at home.
fn assert_gone(umem: &Umem, retired: u32) {
    let census = umem.census();
    assert_eq!((census.contradiction(), census.retired, census.program), (None, retired, 0), "{census:?}");
    assert_eq!(census.depot + census.retired, census.total, "{census:?}");
}

#[test]
fn every_queue_is_served_and_frames_go_round() {
    let (sim, device) = world(4);
    let mut port = Port::builder(&device).ring_size(64).open().unwrap();
    assert_eq!(port.queues(), [0, 1, 2, 3]);
    assert_eq!(port.umem().census().fill, 4 * 64);
    let mut seen = [0; 4];
    for round in 0..100 {
        for n in 0..4 * 20 {
            sim.inject_on("sim0", n % 4, &numbered(n % 4 + round * 4)).unwrap();
        }
        assert!(port.wait(None).unwrap());
        while port.receive(|packet| seen[number(packet) as usize % 4] += 1).unwrap() != 0 || sim.run() != 0 {}
    }
    assert_eq!(seen, [2000; 4]);
    let counts = port.monitor().statistics().unwrap();
    assert!(counts.queues().iter().all(|(_, c)| c.rx_packets == 2000 && c.rx_bytes == 2000 * 60));
    assert_eq!((counts.total().rx_packets, counts.total().rx_lost()), (8000, 0));
    assert_all_home(port.umem());
    let umem = port.umem().clone();
    drop(port);
    assert_gone(&umem, 4 * 64);
}

#[test]
fn an_action_decides_and_kept_packets_are_sent_later() {
    let (sim, device) = world(1);
    let mut port = Port::builder(&device).ring_size(16).open().unwrap();
    let wire = sim.capture("sim0").unwrap();
    let mut kept: Vec<Packet> = Vec::new();
    let mut sent = Vec::new();
    for n in 0..3000 {
        sim.inject("sim0", &numbered(n)).unwrap();
        // Five frames of the port's are with the program at any time.
        if kept.len() == 5 {
            let packet = kept.remove(0);
            sent.push(number(&packet));
            port.send(packet).unwrap();
        }
        assert!(port.wait(None).unwrap());
        let taken = port.process(|packet| match number(&packet) % 3 {
            0 => {
                sent.push(number(&packet));
                Action::Send(packet)
            }
            1 => Action::Drop(packet),
            _ => {
                kept.push(packet);
                Action::Keep
            }
        });
        assert_eq!(taken.unwrap(), 1);
        assert_eq!(port.umem().census().program, kept.len() as i64);
    }
    for packet in kept.drain(..) {
        port.recycle(packet);
    }
    assert_eq!(port.drain(Duration::ZERO).unwrap(), 0);
    let arrived: Vec<_> = wire.take().iter().map(|packet| number(packet)).collect();
    assert_eq!(arrived, sent);
    assert_all_home(port.umem());
}

#[test]
fn packets_of_ones_own_are_sent_from_frames_and_from_bytes() {
    let (sim, device) = world(2);
    let mut port = Port::builder(&device).ring_size(16).send_only().open().unwrap();
    assert!(port.program().is_none());
    let wire = sim.capture("sim0").unwrap();
    assert_eq!(port.send_bytes(&[]), Err(Refused::Empty));
    assert_eq!(port.send_bytes(&[0; 2049]), Err(Refused::TooLong { len: 2049, max: 2048 }));
    // Two queues of 16, and then nothing goes until the kernel was told.
    for n in 0..32 {
        port.send_bytes(&numbered(n)).unwrap();
    }
    assert_eq!(port.send_bytes(&numbered(0)), Err(Refused::Full));
    assert!(wire.take().is_empty());
    assert!(port.wait_to_send(None).unwrap());
    let mut packet = port.packet(60).unwrap();
    packet.copy_from_slice(&numbered(32));
    port.send(packet).unwrap();
    assert_eq!(port.flush().unwrap(), 0);
    let mut arrived: Vec<_> = wire.take().iter().map(|packet| number(packet)).collect();
    arrived.sort_unstable();
    assert_eq!(arrived, (0..33).collect::<Vec<_>>());

    let mut next = 0;
    while next < 1000 {
        let made = port.generate((1000 - next).min(7), |umem, frame| {
            let mut packet = umem.packet(frame, 0, 60)?;
            packet.copy_from_slice(&numbered(next));
            next += 1;
            Ok(packet)
        });
        assert_ne!(made.unwrap(), 0);
    }
    assert_eq!(port.drain(Duration::ZERO).unwrap(), 0);
    let mut arrived: Vec<_> = wire.take().iter().map(|packet| number(packet)).collect();
    arrived.sort_unstable();
    assert_eq!(arrived, (0..1000).collect::<Vec<_>>());
    let total = port.monitor().statistics().unwrap().total();
    assert_eq!((total.tx_packets, total.tx_completed, total.tx_bytes), (1033, 1033, 1033 * 60));
    assert_all_home(port.umem());
}

#[test]
fn another_memorys_packet_is_refused() {
    let (sim, device) = world(2);
    let mut port = Port::builder(&device).queue(0).ring_size(16).open().unwrap();
    let mut other = Port::builder(&device).queue(1).ring_size(16).open().unwrap();
    assert!(other.program().unwrap().is_joined());
    let packet = other.packet(60).unwrap();
    let Err(PushError::Foreign(packet)) = port.send(packet) else { panic!("it was sent") };
    other.recycle(packet);
    let error = port.forward(&mut other, Action::Send).unwrap_err();
    assert_eq!(*error.cause(), Cause::OtherMemory);
    // By way of a turn it can't be refused: it goes home, and is counted.
    sim.inject_on("sim0", 0, &numbered(1)).unwrap();
    let mut theirs = other.packet(60);
    assert!(port.wait(None).unwrap());
    assert_eq!(port.process(|packet| theirs.replace(packet).unwrap()).unwrap(), 1);
    port.recycle(theirs.unwrap());
    assert_all_home(port.umem());
    assert_all_home(other.umem());
    assert_eq!(other.umem().census().dropped, 1);
}

#[test]
fn queues_are_chosen_and_wrong_ones_refused() {
    let (_sim, device) = world(4);
    let open = |queues: Queues| Port::builder(&device).ring_size(16).queues(queues).open();
    assert_eq!(open([3, 1, 3].into()).unwrap().queues(), [1, 3]);
    assert_eq!(open((2..4).into()).unwrap().queues(), [2, 3]);
    assert_eq!(open((0..=1).into()).unwrap().queues(), [0, 1]);
    assert_eq!(*open(vec![].into()).unwrap_err().cause(), Cause::NoQueues);
    assert_eq!(*open((4..).into()).unwrap_err().cause(), Cause::NoSuchQueue { queue: 4, queues: 4 });
    assert_eq!(open((2..).into()).unwrap().queues(), [2, 3]);
    let _two = open([2].into()).unwrap();
    // What was opened before the failure is closed again.
    let error = open(Queues::All).unwrap_err();
    assert!(matches!(error.cause(), Cause::QueueBusy { .. }), "{error:#}");
    assert_eq!(open([0, 1, 3].into()).unwrap().queues(), [0, 1, 3]);
}

#[test]
fn packets_go_to_another_thread_and_back_and_none_is_lost() {
    let (sim, device) = world(2);
    let port = Port::builder(&device).ring_size(32).open().unwrap();
    let umem = port.umem().clone();
    let monitor = port.monitor();
    let wire = sim.capture("sim0").unwrap();
    let mut parts = port.split(2).unwrap();
    let (mut sender, mut receiver) = (parts.pop().unwrap(), parts.pop().unwrap());
    assert_eq!((receiver.queues(), sender.queues()), (vec![0], vec![1]));
    const COUNT: u32 = 5000;
    let (give, take) = mpsc::sync_channel::<Packet>(16);
    std::thread::scope(|threads| {
        // All that one part receives is sent by the other, whose frames must find their way back.
        let sending = threads.spawn(move || {
            for packet in take {
                let mut packet = Some(packet);
                while let Some(it) = packet.take() {
                    match sender.send(it) {
                        Ok(()) => {}
                        Err(refused) => {
                            packet = Some(refused.into_inner());
                            sender.flush().unwrap();
                        }
                    }
                }
            }
            assert_eq!(sender.drain(Duration::from_secs(10)).unwrap(), 0);
        });
        let mut seen = 0;
        let mut next = 0;
        while seen < COUNT {
            while next < COUNT && next < seen + 16 {
                sim.inject_on("sim0", 0, &numbered(next)).unwrap();
                next += 1;
            }
            receiver.wait(Some(Duration::from_millis(1))).unwrap();
            receiver
                .process(|packet| {
                    assert_eq!(number(&packet), seen);
                    seen += 1;
                    give.send(packet).unwrap();
                    Action::Keep
                })
                .unwrap();
        }
        drop(give);
        sending.join().unwrap();
    });
    let arrived: Vec<_> = wire.take().iter().map(|packet| number(packet)).collect();
    assert_eq!(arrived, (0..COUNT).collect::<Vec<_>>());
    let total = monitor.statistics().unwrap().total();
    assert_eq!((total.rx_packets, total.tx_completed, total.rx_lost()), (5000, 5000, 0));
    // The last ones that it took are not replaced in FILL until it waits.
    receiver.wait(Some(Duration::ZERO)).unwrap();
    drop(receiver);
    assert_gone(&umem, 2 * 32);
}

#[test]
fn a_port_that_has_given_all_its_frames_away_gets_them_when_they_come_back() {
    let (sim, device) = world(1);
    let mut port = Port::builder(&device).ring_size(8).open().unwrap();
    let mut kept = Vec::new();
    for n in 0..16 {
        sim.inject("sim0", &numbered(n)).unwrap();
        assert!(port.wait(None).unwrap());
        let taken = port.process(|packet| {
            kept.push(packet);
            Action::Keep
        });
        assert_eq!(taken.unwrap(), 1);
    }
    // Nothing is left: this one is lost, and counted.
    sim.inject("sim0", &numbered(16)).unwrap();
    assert!(!port.wait(Some(Duration::from_millis(5))).unwrap());
    assert_eq!(port.monitor().statistics().unwrap().total().rx_fill_empty, Some(1));
    // Dropped, as by another thread: they come by the depot.
    drop(kept);
    sim.inject("sim0", &numbered(17)).unwrap();
    let mut seen = 0;
    assert!(port.wait(None).unwrap());
    port.receive(|packet| seen = number(packet)).unwrap();
    assert_eq!(seen, 17);
    assert_all_home(port.umem());
}

#[test]
fn only_what_is_steered_here_arrives() {
    let (sim, device) = world(1);
    let mut port = Port::builder(&device).steering(Steering::udp_ports([7])).open().unwrap();
    sim.inject("sim0", &numbered(1)).unwrap();
    assert!(!port.wait(Some(Duration::from_millis(1))).unwrap());
    assert_eq!(sim.stack("sim0").unwrap(), [numbered(1)]);
    let error = Port::builder(&device).queue(0).open().unwrap_err();
    assert!(matches!(error.cause(), Cause::QueueBusy { .. } | Cause::OtherRules { .. }), "{error:#}");
}

#[test]
fn an_interface_goes_down_and_up() {
    let (sim, device) = world(1);
    let mut port = Port::builder(&device).ring_size(16).open().unwrap();
    assert_eq!(port.event(), None);
    sim.set_up("sim0", false).unwrap();
    port.send_bytes(&numbered(1)).unwrap();
    // It waits in TX; nothing arrives, and no call fails.
    assert_eq!(port.flush().unwrap(), 1);
    assert!(!port.wait(Some(Duration::from_millis(1))).unwrap());
    assert_eq!(port.receive(|_| ()).unwrap(), 0);
    assert_eq!(port.event(), Some(Event::Down));
    assert_eq!(port.event(), None);
    let wire = sim.capture("sim0").unwrap();
    sim.set_up("sim0", true).unwrap();
    assert_eq!(port.event(), Some(Event::Up));
    sim.inject("sim0", &numbered(2)).unwrap();
    assert!(port.wait(None).unwrap());
    let mut seen = 0;
    assert_eq!(port.receive(|packet| seen = number(packet)).unwrap(), 1);
    assert_eq!((seen, wire.take()), (2, vec![numbered(1).to_vec()]));

    sim.set_carrier("sim0", false).unwrap();
    assert_eq!(port.event(), Some(Event::LinkLost));
    sim.set_carrier("sim0", true).unwrap();
    assert_eq!(port.event(), Some(Event::LinkBack));
    assert_all_home(port.umem());
}

#[test]
fn a_link_that_opening_resets_is_waited_for() {
    let sim = Sim::builder().reset_on_bind(3).build().unwrap();
    let mut port = Port::open(&sim.device("sim0").unwrap()).unwrap();
    let event = port.event();
    assert!(matches!(event, Some(Event::LinkReset { .. })), "{event:?}");
    assert_eq!(port.event(), None);
    sim.inject("sim0", &numbered(1)).unwrap();
    assert!(port.wait(None).unwrap());
}

#[test]
fn new_queues_are_taken_on_by_a_port_that_has_all() {
    let (sim, device) = world(2);
    let mut all = Port::builder(&device).ring_size(16).open().unwrap();
    let monitor = all.monitor();
    sim.set_queues("sim0", 4).unwrap();
    assert_eq!(all.event(), Some(Event::Queues { was: 2, now: 4, taken: vec![2, 3] }));
    sim.inject_on("sim0", 3, &numbered(3)).unwrap();
    assert!(all.wait(None).unwrap());
    assert_eq!(all.receive(|_| ()).unwrap(), 1);
    assert_eq!(monitor.statistics().unwrap().queue(3).unwrap().rx_packets, 1);
    // Queues with a socket can't be taken away.
    sim.set_queues("sim0", 2).unwrap_err();
    drop(all);

    sim.run();
    sim.set_queues("sim0", 2).unwrap();
    let mut first = Port::builder(&device).ring_size(16).queue(0).open().unwrap();
    sim.set_queues("sim0", 3).unwrap();
    assert_eq!(first.event(), Some(Event::Queues { was: 2, now: 3, taken: vec![] }));
}

#[test]
fn an_interface_that_is_gone_is_an_event_then_an_error_and_keeps_no_frame() {
    let (sim, device) = world(2);
    let umem = Umem::builder().frames(256).chunk_size(2048).build().unwrap().0;
    let mut port = Port::builder(&device).ring_size(32).umem(&umem).open().unwrap();
    for n in 0..3 {
        sim.inject_on("sim0", 0, &numbered(n)).unwrap();
    }
    sim.run();
    port.send_bytes(&numbered(9)).unwrap();
    sim.remove("sim0").unwrap();
    assert_eq!(port.event(), Some(Event::Removed));
    // What arrived before is still there.
    assert!(port.wait(None).unwrap());
    assert_eq!(port.receive(|_| ()).unwrap(), 3);
    for error in [port.receive(|_| ()).unwrap_err(), port.wait(None).unwrap_err(), port.flush().unwrap_err()]
    {
        assert_eq!(*error.cause(), Cause::InterfaceGone);
    }
    drop(port);
    // But for what it had not sent: a kernel may have, and not said so.
    assert_gone(&umem, 1);
    // The memory serves the next one.
    let mut next = Port::builder(&sim.device("sim1").unwrap()).ring_size(32).umem(&umem).open().unwrap();
    sim.inject_on("sim1", 1, &numbered(4)).unwrap();
    assert!(next.wait(None).unwrap());
    assert_eq!(next.receive(|packet| assert_eq!(number(packet), 4)).unwrap(), 1);
}

#[test]
fn a_port_that_never_waits_hears_of_the_end() {
    let (sim, device) = world(1);
    let mut port = Port::builder(&device).ring_size(16).open().unwrap();
    sim.remove("sim0").unwrap();
    let error = (0..1 << 20).find_map(|_| port.receive(|_| ()).err()).expect("it never hears of it");
    assert_eq!(*error.cause(), Cause::InterfaceGone);
}

#[test]
fn a_wait_that_nothing_can_end_says_so() {
    let (_sim, device) = world(2);
    let mut port = Port::builder(&device).ring_size(16).open().unwrap();
    assert_eq!(*port.wait(None).unwrap_err().cause(), Cause::Deadlock);
    assert!(!port.wait(Some(Duration::from_millis(1))).unwrap());
}

#[test]
fn the_last_part_takes_the_program_along() {
    let (sim, device) = world(3);
    let port = Port::builder(&device).ring_size(16).open().unwrap();
    let mut parts = port.split(8).unwrap();
    assert_eq!(parts.len(), 3, "a part has at least one queue");
    parts.truncate(1);
    sim.inject_on("sim0", 0, &numbered(1)).unwrap();
    assert!(parts[0].wait(None).unwrap());
    assert!(!device.info().unwrap().programs().is_empty());
    drop(parts);
    assert!(device.info().unwrap().programs().is_empty());
}

#[test]
fn a_forwarder_goes_on_when_an_interface_that_was_off_is_on_again() {
    let sim = Sim::builder().names("near0", "a").pair("b", "near1").build().unwrap();
    let [a, b] = ["a", "b"].map(|name| Port::builder(&sim.device(name).unwrap()).ring_size(16));
    let [mut a, mut b] = Port::open_each([a, b]).unwrap();
    sim.set_up("b", false).unwrap();
    for n in 0..40 {
        sim.inject("a", &numbered(n)).unwrap();
    }
    // TX of `b` is filled, and what is left waits in RX.
    for _ in 0..10 {
        // It ends with an event as well.
        Port::wait_any(&mut [&mut a, &mut b], None).unwrap();
        a.forward(&mut b, |packet| packet).unwrap();
    }
    assert_eq!(b.event(), Some(Event::Down));
    sim.set_up("b", true).unwrap();
    let mut arrived = 0;
    while arrived < 16 {
        Port::wait_any(&mut [&mut a, &mut b], None).unwrap();
        a.forward(&mut b, |packet| packet).unwrap();
        sim.run();
        arrived += sim.stack("near1").unwrap().len();
    }
    assert_eq!(b.event(), Some(Event::Up));
    assert_all_home(a.umem());
}

#[test]
fn a_panic_in_a_turn_costs_no_frame() {
    let (sim, device) = world(1);
    let mut port = Port::builder(&device).ring_size(16).open().unwrap();
    for n in 0..50 {
        sim.inject("sim0", &numbered(n)).unwrap();
        sim.inject("sim0", &numbered(n)).unwrap();
        assert!(port.wait(None).unwrap());
        sim.run();
        let mut seen = 0;
        let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            port.process(|packet| {
                seen += 1;
                assert!(seen < 2, "on purpose");
                Action::Send(packet)
            })
        }));
        assert!(unwound.is_err());
    }
    // The first of each two is sent, the second one's frame is dropped and had back.
    port.wait(Some(Duration::ZERO)).unwrap();
    sim.run();
    assert_eq!(sim.stack("sim1").unwrap().len(), 50);
    let census = port.umem().census();
    assert_eq!((census.fill, census.dropped), (16, 50), "{census:?}");
    assert_all_home(port.umem());
}

#[test]
fn a_port_that_could_not_be_opened_gives_the_frames_back() {
    let (_sim, device) = world(3);
    let umem = Umem::builder().frames(256).chunk_size(2048).build().unwrap().0;
    let _third = Port::builder(&device).queue(2).ring_size(16).open().unwrap();
    for _ in 0..10 {
        let error = Port::builder(&device).ring_size(32).umem(&umem).release_timeout(Duration::ZERO).open();
        let error = error.unwrap_err();
        assert!(matches!(error.cause(), Cause::QueueBusy { .. }), "{error:#}");
        assert_eq!(umem.census().depot, 256);
    }
}

#[test]
fn who_only_sends_takes_nothing_from_linux() {
    let (sim, device) = world(1);
    let mut port = Port::builder(&device).send_only().steering(Steering::all()).open().unwrap();
    assert!(port.program().is_some());
    sim.inject("sim0", &numbered(1)).unwrap();
    sim.run();
    assert_eq!(sim.stack("sim0").unwrap(), [numbered(1)]);
    // A source that ends is not asked again, by whichever queue.
    let mut asked = 0;
    let made = port.generate(10, |_, frame| {
        asked += 1;
        Err(frame)
    });
    assert_eq!((made.unwrap(), asked), (0, 1));
    // The queue is chosen, or it is none of the port's.
    let packet = port.packet(60).unwrap();
    port.send_on(0, packet).unwrap();
    let packet = port.packet(60).unwrap();
    let Err(PushError::Full(packet)) = port.send_on(1, packet) else { panic!("it was sent") };
    port.recycle(packet);
    assert_eq!(port.flush().unwrap(), 0);
    assert_eq!(sim.run(), 1);
}
