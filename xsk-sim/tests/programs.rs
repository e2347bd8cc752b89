//! XDP programs: what is loaded, what they decide, and where packets go for it.

mod common;

use std::os::fd::{AsFd, AsRawFd};

use common::*;
use xsk::kernel::{Errno, Insn, ProgramSpec};
use xsk::xdp::asm::{self, Alu, Cond, Reg::*, Width};
use xsk_sim::Sim;

/// What became of a packet that met a program on `sim0`.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Passed(Vec<u8>),
    SentBack(Vec<u8>),
    Dropped,
}

fn fate(sim: &Sim, program: &[Insn], packet: &[u8]) -> Fate {
    let kernel = sim.kernel();
    let program = load(&*kernel, program).unwrap();
    let _link = kernel.attach((*program).as_fd(), 1, 0).unwrap();
    sim.inject("sim0", packet).unwrap();
    assert!(sim.step());
    if let Some(packet) = sim.stack("sim0").unwrap().pop() {
        return Fate::Passed(packet);
    }
    sim.run();
    sim.stack("sim1").unwrap().pop().map_or(Fate::Dropped, Fate::SentBack)
}

fn verdict(number: i32) -> [Insn; 2] {
    [asm::alu_imm(Alu::Mov, R0, number), asm::exit()]
}

#[test]
fn verdicts_decide_where_packets_go() {
    let sim = Sim::new();
    let packet = packet(3, 60);
    for (number, wanted) in [
        (asm::XDP_ABORTED, Fate::Dropped),
        (asm::XDP_DROP, Fate::Dropped),
        (asm::XDP_PASS, Fate::Passed(packet.clone())),
        (asm::XDP_TX, Fate::SentBack(packet.clone())),
        (asm::XDP_REDIRECT, Fate::Dropped),
        (5, Fate::Dropped),
        (-1, Fate::Dropped),
    ] {
        assert_eq!(fate(&sim, &verdict(number), &packet), wanted, "verdict {number}");
    }
}

#[test]
fn a_redirect_without_a_socket_falls_back_to_its_flags() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let map = xskmap(&*kernel, 1);
    let packet = packet(3, 60);
    for (flags, wanted) in [
        (asm::XDP_ABORTED, Fate::Dropped),
        (asm::XDP_DROP, Fate::Dropped),
        (asm::XDP_PASS, Fate::Passed(packet.clone())),
        (asm::XDP_TX, Fate::SentBack(packet.clone())),
        (4, Fate::Dropped),
        (6, Fate::Dropped),
    ] {
        assert_eq!(fate(&sim, &redirect(&map, flags), &packet), wanted, "flags {flags}");
    }
}

#[test]
fn traffic_follows_the_map() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let mut port = Port::open(&*kernel, "sim0", Config::default());
    port.refill([0, 4096]);
    let steered = steer(&*kernel, "sim0", &*port.socket);
    let mut arrives = || {
        sim.inject("sim0", &packet(0, 60)).unwrap();
        sim.run();
        port.received().len()
    };
    assert_eq!(arrives(), 1);
    kernel.delete_from_map((*steered.map).as_fd(), &[0; 4]).unwrap();
    assert_eq!(arrives(), 0);
    drop(steered);
    assert_eq!(arrives(), 0);
    assert_eq!(sim.stack("sim0").unwrap().len(), 1, "without a program it is the stack's");
}

/// The form for kernels before 5.3: redirect only what the map has.
#[test]
fn a_program_can_look_a_key_up_first() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let mut port = Port::open(&*kernel, "sim0", Config::default());
    port.refill([0]);
    let map = xskmap(&*kernel, 4);
    let fd = (*map).as_fd().as_raw_fd();
    let mut program = vec![
        asm::alu(Alu::Mov, R6, R1),
        asm::load(Width::W, R7, R6, asm::XDP_MD_RX_QUEUE_INDEX),
        asm::store(Width::W, R10, -4, R7),
        asm::alu(Alu::Mov, R2, R10),
        asm::alu_imm(Alu::Add, R2, -4),
    ];
    program.extend(asm::load_map(R1, fd));
    program.extend([asm::call(asm::FN_MAP_LOOKUP_ELEM), asm::jump_imm(Cond::Eq, R0, 0, 6)]);
    program.extend(asm::load_map(R1, fd));
    program.extend([
        asm::alu(Alu::Mov, R2, R7),
        asm::alu_imm(Alu::Mov, R3, 0),
        asm::call(asm::FN_REDIRECT_MAP),
        asm::exit(),
    ]);
    program.extend(verdict(asm::XDP_PASS));
    assert_eq!(fate(&sim, &program, &packet(1, 60)), Fate::Passed(packet(1, 60)));
    enter(&*kernel, &map, 0, &*port.socket).unwrap();
    assert_eq!(fate(&sim, &program, &packet(2, 60)), Fate::Dropped);
    assert_eq!(port.received()[0].1, packet(2, 60));
}

#[test]
fn programs_read_what_they_have_checked() {
    let sim = Sim::new();
    // Pass IPv4, drop the rest: the usual start of a program.
    let mut program = vec![
        asm::load(Width::W, R2, R1, asm::XDP_MD_DATA),
        asm::load(Width::W, R3, R1, asm::XDP_MD_DATA_END),
        asm::alu_imm(Alu::Mov, R0, asm::XDP_DROP),
        asm::alu(Alu::Mov, R4, R2),
        asm::alu_imm(Alu::Add, R4, 34),
        asm::jump(Cond::Gt, R4, R3, 4),
        asm::load(Width::H, R5, R2, 12),
        asm::to_be(R5, 16),
        asm::jump_imm(Cond::Ne, R5, 0x0800, 1),
        asm::alu_imm(Alu::Mov, R0, asm::XDP_PASS),
    ];
    program.push(asm::exit());
    let mut ipv4 = packet(0, 60);
    ipv4[12..14].copy_from_slice(&[8, 0]);
    assert_eq!(fate(&sim, &program, &ipv4), Fate::Passed(ipv4.clone()));
    assert_eq!(fate(&sim, &program, &ipv4[..33]), Fate::Dropped, "too short to look");
    ipv4[12] = 9;
    assert_eq!(fate(&sim, &program, &ipv4), Fate::Dropped);
}

#[test]
fn programs_write_to_packets() {
    let sim = Sim::new();
    let mut program = vec![
        asm::load(Width::W, R2, R1, asm::XDP_MD_DATA),
        asm::alu_imm(Alu::Mov, R3, 0x0102_0304),
        asm::store(Width::B, R2, 0, R3),
        asm::store(Width::H, R2, 2, R3),
        asm::store(Width::W, R2, 4, R3),
        asm::store_imm(Width::Dw, R2, 52, -2),
    ];
    program.extend(verdict(asm::XDP_TX));
    let mut wanted = packet(0, 60);
    wanted[0] = 4;
    wanted[2..4].copy_from_slice(&[4, 3]);
    wanted[4..8].copy_from_slice(&[4, 3, 2, 1]);
    wanted[52..].copy_from_slice(&(-2i64).to_le_bytes());
    assert_eq!(fate(&sim, &program, &packet(0, 60)), Fate::SentBack(wanted));
}

#[test]
fn the_context_tells_where_a_packet_arrived() {
    let sim = Sim::new();
    let mut program = vec![
        asm::load(Width::W, R2, R1, 12),
        asm::load(Width::W, R3, R1, asm::XDP_MD_RX_QUEUE_INDEX),
        asm::alu_imm(Alu::Mov, R0, asm::XDP_DROP),
        asm::jump_imm(Cond::Ne, R2, 1, 2),
        asm::jump_imm(Cond::Ne, R3, 0, 1),
        asm::alu_imm(Alu::Mov, R0, asm::XDP_PASS),
    ];
    program.push(asm::exit());
    assert_eq!(fate(&sim, &program, &packet(0, 60)), Fate::Passed(packet(0, 60)));
}

#[test]
fn what_a_verifier_would_refuse_aborts() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let map = xskmap(&*kernel, 1);
    let fd = (*map).as_fd().as_raw_fd();
    let data = asm::load(Width::W, R2, R1, asm::XDP_MD_DATA);
    let rows: Vec<(&str, Vec<Insn>)> = vec![
        ("reads behind the packet", vec![data, asm::load(Width::Dw, R3, R2, 53)]),
        ("reads before the packet", vec![data, asm::load(Width::B, R3, R2, -1)]),
        ("writes behind the packet", vec![data, asm::store_imm(Width::B, R2, 60, 0)]),
        ("reads a register never written", vec![asm::alu(Alu::Mov, R3, R5)]),
        ("reads a number as an address", vec![asm::alu_imm(Alu::Mov, R2, 0), asm::load(Width::B, R3, R2, 0)]),
        ("reads above the stack", vec![asm::load(Width::B, R3, R10, 0)]),
        ("reads below the stack", vec![asm::load(Width::B, R3, R10, -513)]),
        ("writes the context", vec![asm::store_imm(Width::W, R1, 0, 0)]),
        ("reads the context by bytes", vec![asm::load(Width::B, R3, R1, 0)]),
        ("reads egress_ifindex", vec![asm::load(Width::W, R3, R1, 20)]),
        ("puts a pointer into the packet", vec![data, asm::store(Width::Dw, R2, 0, R2)]),
        ("puts half a pointer on the stack", vec![asm::store(Width::W, R10, -8, R1)]),
        ("reads half a pointer", vec![asm::store(Width::Dw, R10, -8, R1), asm::load(Width::W, R3, R10, -8)]),
        ("multiplies pointers", vec![asm::alu(Alu::Mul, R1, R1)]),
        ("compares stack and packet", vec![data, asm::jump(Cond::Gt, R2, R10, 0)]),
        ("calls without a map", vec![asm::call(asm::FN_REDIRECT_MAP)]),
        (
            "uses an argument after the call",
            [
                &asm::load_map(R1, fd)[..],
                &[
                    asm::alu_imm(Alu::Mov, R2, 0),
                    asm::alu_imm(Alu::Mov, R3, 2),
                    asm::call(asm::FN_REDIRECT_MAP),
                    asm::alu(Alu::Mov, R0, R2),
                ],
            ]
            .concat(),
        ),
    ];
    for (what, mut program) in rows {
        // Were the fault not found, the packet would pass.
        program.extend(verdict(asm::XDP_PASS));
        assert_eq!(fate(&sim, &program, &packet(0, 60)), Fate::Dropped, "{what}");
    }
    assert_eq!(fate(&sim, &[asm::exit()], &packet(0, 60)), Fate::Dropped, "no verdict");
}

#[test]
#[cfg_attr(miri, ignore = "a million operations")]
fn an_endless_loop_aborts() {
    let sim = Sim::new();
    assert_eq!(fate(&sim, &[asm::goto(-1)], &packet(0, 60)), Fate::Dropped);
}

#[test]
fn pointers_survive_the_stack() {
    let sim = Sim::new();
    let mut program = vec![
        asm::load(Width::W, R2, R1, asm::XDP_MD_DATA),
        asm::store(Width::Dw, R10, -16, R2),
        asm::load(Width::Dw, R3, R10, -16),
        asm::store_imm(Width::B, R3, 0, 0x55),
        asm::store_imm(Width::B, R10, -12, 7),
        asm::load(Width::B, R4, R10, -12),
        asm::store(Width::B, R3, 1, R4),
    ];
    program.extend(verdict(asm::XDP_PASS));
    let mut wanted = packet(0, 60);
    wanted[..2].copy_from_slice(&[0x55, 7]);
    assert_eq!(fate(&sim, &program, &packet(0, 60)), Fate::Passed(wanted));
}

#[test]
fn bad_programs_are_refused_and_the_log_says_why() {
    let sim = Sim::new();
    let kernel = sim.kernel();
    let end = verdict(asm::XDP_PASS);
    let raw = |code, regs, off, imm| Insn { code, regs, off, imm };
    let half = asm::load_map(R1, 0)[0];
    let socket = socket(&*kernel);
    let not_a_map = asm::load_map(R1, socket.as_fd().as_raw_fd());
    let closed = asm::load_map(R1, -1);
    let map = xskmap(&*kernel, 1);
    let fd = (*map).as_fd().as_raw_fd();
    let rows: Vec<(Vec<Insn>, Errno, &str)> = vec![
        (vec![], Errno::TOOBIG, ""),
        (vec![end[0]], Errno::INVAL, "last insn is not an exit or jmp"),
        (vec![raw(0xff, 0, 0, 0), end[1]], Errno::INVAL, "0: (ff) unknown opcode ff"),
        (vec![asm::goto(1), end[1]], Errno::INVAL, "jump out of range from insn 0 to 2"),
        (vec![asm::goto(-2), end[1]], Errno::INVAL, "jump out of range from insn 0 to -1"),
        (
            [&[asm::goto(1)][..], &asm::load_map(R1, fd), &end].concat(),
            Errno::INVAL,
            "jump out of range from insn 0 to 2",
        ),
        (vec![half], Errno::INVAL, "second half"),
        (vec![raw(0xb7, 0x0b, 0, 0), end[1]], Errno::INVAL, "R11 is invalid"),
        (vec![raw(0xbf, 0xf0, 0, 0), end[1]], Errno::INVAL, "R15 is invalid"),
        (vec![asm::alu_imm(Alu::Mov, R10, 0), end[1]], Errno::ACCESS, "frame pointer is read only"),
        (vec![raw(0xb7, 0x10, 0, 0), end[1]], Errno::INVAL, "reserved"),
        (vec![asm::call(1234), end[1]], Errno::INVAL, "unknown func #1234"),
        (vec![raw(0x85, 0x10, 0, 0), end[1]], Errno::INVAL, "only helpers"),
        (vec![asm::fetch_add(R10, -8, R1), end[1]], Errno::INVAL, "unknown opcode db"),
        (vec![asm::alu_imm(Alu::Lsh, R1, 64), end[1]], Errno::INVAL, "invalid shift 64"),
        (vec![asm::alu_imm(Alu::Mod, R1, 0), end[1]], Errno::INVAL, "div by zero"),
        (vec![asm::to_be(R1, 24), end[1]], Errno::INVAL, "16, 32 or 64"),
        ([&not_a_map[..], &end].concat(), Errno::INVAL, "is not pointing to valid bpf_map"),
        ([&closed[..], &end].concat(), Errno::BADF, "fd -1 is not pointing to valid bpf_map"),
        ([&asm::load_map_value(R1, fd, 0)[..], &end].concat(), Errno::INVAL, "no direct value access"),
    ];
    for (program, errno, wanted) in rows {
        let (found, log) = load(&*kernel, &program).expect_err(wanted);
        assert_eq!(found, errno, "{wanted}");
        assert!(log.contains(wanted), "{wanted:?} is not in {log:?}");
    }
    let mut log = String::new();
    let good = ProgramSpec { instructions: &end, flags: 0, name: "good" };
    let mut load = |spec| kernel.load_program(&spec, &mut log).err();
    assert_eq!(load(good), None);
    assert_eq!(load(ProgramSpec { flags: 1 << 5, ..good }), None);
    assert_eq!(load(ProgramSpec { flags: 1 << 6, ..good }), Some(Errno::INVAL));
    assert_eq!(load(ProgramSpec { name: "not good", ..good }), Some(Errno::INVAL));
}
