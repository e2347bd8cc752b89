//! From instructions to operations (`Documentation/bpf/standardization/instruction-set.rst`).
//!
//! Operations stand at the places of their instructions, so jumps keep their meaning.

use std::fmt::Write as _;
use std::sync::Arc;

use xsk::kernel::{Errno, Insn};
use xsk::xdp::asm::{BPF_PSEUDO_MAP_FD, BPF_PSEUDO_MAP_VALUE, FN_MAP_LOOKUP_ELEM, FN_REDIRECT_MAP};

use super::XskMap;

/// The longest program that Linux takes, in instructions.
const MAX_INSTRUCTIONS: usize = 1_000_000;

/// A register's number, at most [`FRAME_POINTER`].
pub(super) type Register = u8;

/// `r10`: read-only.
pub(super) const FRAME_POINTER: Register = 10;

/// The second operand.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operand {
    Register(Register),
    /// Sign-extended from 32 bits.
    Immediate(u64),
}

/// What an ALU operation does.
#[derive(Clone, Copy, Debug)]
pub(super) enum Alu {
    Add,
    Sub,
    Mul,
    Div,
    SignedDiv,
    Or,
    And,
    ShiftLeft,
    ShiftRight,
    SignedShiftRight,
    Neg,
    Mod,
    SignedMod,
    Xor,
    Mov,
    /// Copies that many lower bits, sign-extended.
    MovSigned(u32),
}

/// What a byte swap makes of the lower bits of a register.
#[derive(Clone, Copy, Debug)]
pub(super) enum Swap {
    ToLittle,
    ToBig,
    Always,
}

/// When a jump is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    Equal,
    NotEqual,
    Greater,
    GreaterEqual,
    Less,
    LessEqual,
    AnyBit,
    SignedGreater,
    SignedGreaterEqual,
    SignedLess,
    SignedLessEqual,
}

/// A helper of the kernel's.
#[derive(Clone, Copy, Debug)]
pub(super) enum Helper {
    MapLookup,
    RedirectMap,
}

/// A decoded instruction.
#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    /// `wide` operations work on 64 bits, others on 32 and clear the rest.
    Alu {
        op: Alu,
        wide: bool,
        dst: Register,
        src: Operand,
    },
    Swap {
        to: Swap,
        dst: Register,
        bits: u32,
    },
    /// A 64-bit constant, in two slots.
    Constant {
        dst: Register,
        value: u64,
    },
    /// The address of a map, by its place in the program's list; in two slots.
    Map {
        dst: Register,
        map: usize,
    },
    /// The second slot of the two above. Never executed: no jump leads here.
    SecondSlot,
    Load {
        size: u8,
        signed: bool,
        dst: Register,
        src: Register,
        offset: i16,
    },
    Store {
        size: u8,
        dst: Register,
        src: Operand,
        offset: i16,
    },
    Jump {
        condition: Condition,
        wide: bool,
        dst: Register,
        src: Operand,
        target: usize,
    },
    Goto {
        target: usize,
    },
    Call(Helper),
    Exit,
}

/// Decodes a program. `map` finds the map of a descriptor. On refusal `log` says why.
pub(super) fn decode(
    instructions: &[Insn],
    mut map: impl FnMut(i32) -> Result<Arc<XskMap>, Errno>,
    log: &mut String,
) -> Result<(Vec<Op>, Vec<Arc<XskMap>>), Errno> {
    if instructions.is_empty() || instructions.len() > MAX_INSTRUCTIONS {
        return Err(Errno::TOOBIG);
    }
    let mut ops = Vec::with_capacity(instructions.len());
    let mut maps = Vec::new();
    while let Some(insn) = instructions.get(ops.len()) {
        let place = ops.len();
        let op = decode_one(insn, place, instructions, &mut map, &mut maps);
        let op = op.map_err(|refusal| {
            // Writing to a string cannot fail.
            let _ = writeln!(log, "{place}: ({:02x}) {}", insn.code, refusal.reason);
            refusal.errno
        })?;
        let two_slots = matches!(op, Op::Constant { .. } | Op::Map { .. });
        ops.push(op);
        if two_slots {
            ops.push(Op::SecondSlot);
        }
    }
    for (place, op) in ops.iter().enumerate() {
        let (Op::Goto { target } | Op::Jump { target, .. }) = *op else { continue };
        if matches!(ops.get(target), None | Some(Op::SecondSlot)) {
            let _ = writeln!(log, "jump out of range from insn {place} to {}", target as isize);
            return Err(Errno::INVAL);
        }
    }
    if !matches!(ops.last(), Some(Op::Exit | Op::Goto { .. })) {
        let _ = writeln!(log, "last insn is not an exit or jmp");
        return Err(Errno::INVAL);
    }
    Ok((ops, maps))
}

/// Why an instruction is refused.
struct Refusal {
    errno: Errno,
    reason: String,
}

impl Refusal {
    fn invalid(reason: impl Into<String>) -> Self {
        Self { errno: Errno::INVAL, reason: reason.into() }
    }
}

fn decode_one(
    insn: &Insn,
    place: usize,
    instructions: &[Insn],
    map: &mut impl FnMut(i32) -> Result<Arc<XskMap>, Errno>,
    maps: &mut Vec<Arc<XskMap>>,
) -> Result<Op, Refusal> {
    let (dst, src) = (insn.regs & 0x0f, insn.regs >> 4);
    let unknown = || Refusal::invalid(format!("unknown opcode {:02x}", insn.code));
    let reserved = |clean: bool| {
        if clean { Ok(()) } else { Err(Refusal::invalid("the instruction uses reserved fields")) }
    };
    let by_register = insn.code & 0x08 != 0;
    let operand =
        if by_register { Operand::Register(src) } else { Operand::Immediate(i64::from(insn.imm) as u64) };
    // What a register operand leaves of the immediate, and an immediate of the register.
    let operand_clean = if by_register { insn.imm == 0 } else { src == 0 };
    // An offset beyond the program, or before its start, is found by the caller.
    let target = |by: i32| (place + 1).wrapping_add_signed(by as isize);
    let class = insn.code & 0x07;
    let op = match class {
        // LD: only the 64-bit immediate, in two instructions.
        0 => {
            if insn.code != 0x18 {
                return Err(unknown());
            }
            let Some(second) = instructions.get(place + 1) else {
                return Err(Refusal::invalid("the second half of a 64-bit immediate is missing"));
            };
            reserved(insn.off == 0 && second.code == 0 && second.regs == 0 && second.off == 0)?;
            match src {
                0 => {
                    let value = u64::from(insn.imm as u32) | u64::from(second.imm as u32) << 32;
                    Op::Constant { dst, value }
                }
                BPF_PSEUDO_MAP_FD => {
                    reserved(second.imm == 0)?;
                    let found = map(insn.imm).map_err(|errno| Refusal {
                        errno,
                        reason: format!("fd {} is not pointing to valid bpf_map", insn.imm),
                    })?;
                    let known = maps.iter().position(|other| Arc::ptr_eq(other, &found));
                    let map = known.unwrap_or_else(|| {
                        maps.push(found);
                        maps.len() - 1
                    });
                    Op::Map { dst, map }
                }
                BPF_PSEUDO_MAP_VALUE => {
                    return Err(Refusal::invalid("no direct value access support for this map type"));
                }
                _ => return Err(Refusal::invalid("unrecognized bpf_ld_imm64 insn")),
            }
        }
        // LDX
        1 => {
            let signed = match insn.code & 0xe0 {
                0x60 => false,
                0x80 if size(insn.code) < 8 => true,
                _ => return Err(unknown()),
            };
            reserved(insn.imm == 0)?;
            Op::Load { size: size(insn.code), signed, dst, src, offset: insn.off }
        }
        // ST, STX
        2 | 3 => {
            if insn.code & 0xe0 != 0x60 {
                return Err(unknown());
            }
            let src = if class == 2 {
                reserved(src == 0)?;
                Operand::Immediate(i64::from(insn.imm) as u64)
            } else {
                reserved(insn.imm == 0)?;
                Operand::Register(src)
            };
            Op::Store { size: size(insn.code), dst, src, offset: insn.off }
        }
        // ALU, ALU64
        4 | 7 => {
            let wide = class == 7;
            let op = match (insn.code & 0xf0, insn.off) {
                (0x00, 0) => Alu::Add,
                (0x10, 0) => Alu::Sub,
                (0x20, 0) => Alu::Mul,
                (0x30, 0) => Alu::Div,
                (0x30, 1) => Alu::SignedDiv,
                (0x40, 0) => Alu::Or,
                (0x50, 0) => Alu::And,
                (0x60, 0) => Alu::ShiftLeft,
                (0x70, 0) => Alu::ShiftRight,
                (0x80, 0) if !by_register => {
                    reserved(src == 0 && insn.imm == 0)?;
                    Alu::Neg
                }
                (0x90, 0) => Alu::Mod,
                (0x90, 1) => Alu::SignedMod,
                (0xa0, 0) => Alu::Xor,
                (0xb0, 0) => Alu::Mov,
                (0xb0, bits @ (8 | 16)) if by_register => Alu::MovSigned(bits as u32),
                (0xb0, 32) if by_register && wide => Alu::MovSigned(32),
                (0xc0, 0) => Alu::SignedShiftRight,
                (0xd0, 0) => {
                    reserved(src == 0)?;
                    let to = match (wide, by_register) {
                        (false, false) => Swap::ToLittle,
                        (false, true) => Swap::ToBig,
                        (true, false) => Swap::Always,
                        (true, true) => return Err(unknown()),
                    };
                    let (16 | 32 | 64) = insn.imm else {
                        return Err(Refusal::invalid("a byte swap is of 16, 32 or 64 bits"));
                    };
                    writable(dst)?;
                    return Ok(Op::Swap { to, dst, bits: insn.imm as u32 });
                }
                (0x00..=0xd0, _) => return Err(Refusal::invalid("the instruction uses reserved fields")),
                _ => return Err(unknown()),
            };
            reserved(operand_clean)?;
            let bits = if wide { 64 } else { 32 };
            if matches!(op, Alu::ShiftLeft | Alu::ShiftRight | Alu::SignedShiftRight)
                && !by_register
                && !(0..bits).contains(&insn.imm)
            {
                return Err(Refusal::invalid(format!("invalid shift {}", insn.imm)));
            }
            if matches!(op, Alu::Div | Alu::SignedDiv | Alu::Mod | Alu::SignedMod)
                && !by_register
                && insn.imm == 0
            {
                return Err(Refusal::invalid("div by zero"));
            }
            Op::Alu { op, wide, dst, src: operand }
        }
        // JMP, JMP32
        _ => {
            let wide = class == 5;
            let condition = match insn.code & 0xf0 {
                0x00 if !by_register => {
                    reserved(insn.regs == 0)?;
                    let by = if wide {
                        reserved(insn.imm == 0)?;
                        i32::from(insn.off)
                    } else {
                        reserved(insn.off == 0)?;
                        insn.imm
                    };
                    return Ok(Op::Goto { target: target(by) });
                }
                0x80 if wide && !by_register => {
                    if src != 0 {
                        return Err(Refusal::invalid("only helpers can be called"));
                    }
                    reserved(dst == 0 && insn.off == 0)?;
                    return match insn.imm {
                        FN_MAP_LOOKUP_ELEM => Ok(Op::Call(Helper::MapLookup)),
                        FN_REDIRECT_MAP => Ok(Op::Call(Helper::RedirectMap)),
                        other => Err(Refusal::invalid(format!("unknown func #{other}"))),
                    };
                }
                0x90 if wide && !by_register => {
                    reserved(insn.regs == 0 && insn.off == 0 && insn.imm == 0)?;
                    return Ok(Op::Exit);
                }
                0x10 => Condition::Equal,
                0x20 => Condition::Greater,
                0x30 => Condition::GreaterEqual,
                0x40 => Condition::AnyBit,
                0x50 => Condition::NotEqual,
                0x60 => Condition::SignedGreater,
                0x70 => Condition::SignedGreaterEqual,
                0xa0 => Condition::Less,
                0xb0 => Condition::LessEqual,
                0xc0 => Condition::SignedLess,
                0xd0 => Condition::SignedLessEqual,
                _ => return Err(unknown()),
            };
            reserved(operand_clean)?;
            Op::Jump { condition, wide, dst, src: operand, target: target(i32::from(insn.off)) }
        }
    };
    readable(dst)?;
    readable(src)?;
    if let Op::Alu { dst, .. } | Op::Constant { dst, .. } | Op::Map { dst, .. } | Op::Load { dst, .. } = op {
        writable(dst)?;
    }
    Ok(op)
}

fn size(code: u8) -> u8 {
    match code & 0x18 {
        0x00 => 4,
        0x08 => 2,
        0x10 => 1,
        _ => 8,
    }
}

fn readable(register: Register) -> Result<(), Refusal> {
    if register > FRAME_POINTER {
        return Err(Refusal::invalid(format!("R{register} is invalid")));
    }
    Ok(())
}

fn writable(register: Register) -> Result<(), Refusal> {
    readable(register)?;
    if register == FRAME_POINTER {
        let reason = "frame pointer is read only".to_owned();
        return Err(Refusal { errno: Errno::ACCESS, reason });
    }
    Ok(())
}
