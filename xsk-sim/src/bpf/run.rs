//! Runs a program over a packet.
//!
//! Registers hold numbers or pointers, and a pointer is a region with an offset, never an address:
//! a program can reach nothing but its context, its packet and its stack. What the verifier of a
//! real kernel would have refused ends the run, and the packet is dropped (`XDP_ABORTED`).

use xsk::xdp::asm::{XDP_ABORTED, XDP_MD_DATA, XDP_MD_DATA_END, XDP_MD_RX_QUEUE_INDEX, XDP_REDIRECT};

use super::Program;
use super::decode::{Alu, Condition, FRAME_POINTER, Helper, Op, Operand, Register, Swap};
use crate::socket::SocketId;

/// Operations of one run, after which the program is taken to be in an endless loop. Linux
/// refuses a program that might do as many.
const MAX_OPERATIONS: u32 = 1_000_000;

/// Bytes of stack.
const STACK: usize = 512;

/// `xdp_md.data_meta`.
const XDP_MD_DATA_META: i16 = 8;
/// `xdp_md.ingress_ifindex`.
const XDP_MD_INGRESS_IFINDEX: i16 = 12;

/// Where a packet arrived.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context {
    pub(crate) ifindex: u32,
    pub(crate) queue: u16,
}

/// What a program made of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// `XDP_*`, or a number that is none of them.
    pub(crate) verdict: i32,
    /// Where a redirect helper said that the packet goes.
    pub(crate) target: Option<SocketId>,
}

/// The program did what a real kernel's verifier would not have let it do.
#[derive(Clone, Copy, Debug)]
struct Fault;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Region {
    Context,
    /// From the packet's first byte.
    Packet,
    /// From the frame pointer, downwards.
    Stack,
    /// A map, by its place in the program's list.
    Map(usize),
    /// A socket in an XSKMAP: not null, and not to be looked into.
    Socket,
}

#[derive(Clone, Copy, Debug)]
enum Value {
    /// Never written: may not be read.
    Unset,
    Number(u64),
    Pointer(Region, i64),
}

impl Value {
    fn number(self) -> Result<u64, Fault> {
        if let Self::Number(number) = self { Ok(number) } else { Err(Fault) }
    }
}

/// Stack memory, which remembers the pointers that are stored in it.
struct Stack {
    bytes: [u8; STACK],
    /// For each aligned 8 bytes, the pointer that was stored there whole.
    pointers: [Option<(Region, i64)>; STACK / 8],
}

impl Stack {
    /// The place of `size` bytes at `offset` from the frame pointer.
    fn place(offset: i64, size: usize) -> Result<usize, Fault> {
        let start = usize::try_from(offset.saturating_add(STACK as i64)).map_err(|_| Fault)?;
        if start.saturating_add(size) <= STACK { Ok(start) } else { Err(Fault) }
    }

    fn load(&self, offset: i64, size: usize) -> Result<Value, Fault> {
        let start = Self::place(offset, size)?;
        let slots = &self.pointers[start / 8..=(start + size - 1) / 8];
        match slots {
            [Some((region, at))] if size == 8 => Ok(Value::Pointer(*region, *at)),
            // Part of an address is not a number to work with.
            _ if slots.iter().any(Option::is_some) => Err(Fault),
            _ => Ok(Value::Number(number(&self.bytes[start..start + size]))),
        }
    }

    fn store(&mut self, offset: i64, size: usize, value: Value) -> Result<(), Fault> {
        let start = Self::place(offset, size)?;
        match value {
            Value::Unset => return Err(Fault),
            Value::Pointer(region, at) => {
                if size != 8 || !start.is_multiple_of(8) {
                    return Err(Fault);
                }
                self.pointers[start / 8] = Some((region, at));
            }
            Value::Number(number) => {
                self.pointers[start / 8..=(start + size - 1) / 8].fill(None);
                self.bytes[start..start + size].copy_from_slice(&number.to_le_bytes()[..size]);
            }
        }
        Ok(())
    }
}

/// A number of up to 8 bytes, as a little-endian machine loads it.
fn number(bytes: &[u8]) -> u64 {
    let mut whole = [0; 8];
    whole[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(whole)
}

struct Machine<'p> {
    program: &'p Program,
    context: Context,
    packet: &'p mut [u8],
    registers: [Value; 11],
    stack: Stack,
    target: Option<SocketId>,
}

impl Program {
    /// Runs the program over a packet, which it may write to.
    pub(crate) fn run(&self, packet: &mut [u8], context: Context) -> Outcome {
        let mut registers = [Value::Unset; 11];
        registers[1] = Value::Pointer(Region::Context, 0);
        registers[FRAME_POINTER as usize] = Value::Pointer(Region::Stack, 0);
        let stack = Stack { bytes: [0; STACK], pointers: [None; STACK / 8] };
        let mut machine = Machine { program: self, context, packet, registers, stack, target: None };
        match machine.run() {
            // A target is of use with its verdict only.
            Ok(verdict) => Outcome { verdict, target: machine.target.filter(|_| verdict == XDP_REDIRECT) },
            Err(Fault) => Outcome { verdict: XDP_ABORTED, target: None },
        }
    }
}

impl Machine<'_> {
    fn run(&mut self) -> Result<i32, Fault> {
        let mut next = 0;
        for _ in 0..MAX_OPERATIONS {
            let op = *self.program.ops.get(next).ok_or(Fault)?;
            next += 1;
            match op {
                Op::Alu { op, wide, dst, src } => {
                    let value = self.alu(op, wide, dst, src)?;
                    self.set(dst, value);
                }
                Op::Swap { to, dst, bits } => {
                    let value = swap(to, bits, self.get(dst).number()?);
                    self.set(dst, Value::Number(value));
                }
                Op::Constant { dst, value } => {
                    self.set(dst, Value::Number(value));
                    next += 1;
                }
                Op::Map { dst, map } => {
                    self.set(dst, Value::Pointer(Region::Map(map), 0));
                    next += 1;
                }
                Op::Load { size, signed, dst, src, offset } => {
                    let value = self.load(self.get(src), offset, size.into())?;
                    let value = if signed {
                        Value::Number(extend(value.number()?, u32::from(size) * 8) as u64)
                    } else {
                        value
                    };
                    self.set(dst, value);
                }
                Op::Store { size, dst, src, offset } => {
                    self.store(self.get(dst), offset, size.into(), self.operand(src))?;
                }
                Op::Jump { condition, wide, dst, src, target } => {
                    if compare(condition, wide, self.get(dst), self.operand(src))? {
                        next = target;
                    }
                }
                Op::Goto { target } => next = target,
                Op::Call(helper) => {
                    let result = self.call(helper)?;
                    self.registers[1..=5].fill(Value::Unset);
                    self.set(0, result);
                }
                Op::Exit => return Ok(self.get(0).number()? as i32),
                Op::SecondSlot => return Err(Fault),
            }
        }
        Err(Fault)
    }

    fn get(&self, register: Register) -> Value {
        self.registers[usize::from(register)]
    }

    fn set(&mut self, register: Register, value: Value) {
        self.registers[usize::from(register)] = value;
    }

    fn operand(&self, operand: Operand) -> Value {
        match operand {
            Operand::Register(register) => self.get(register),
            Operand::Immediate(number) => Value::Number(number),
        }
    }

    fn alu(&self, op: Alu, wide: bool, dst: Register, src: Operand) -> Result<Value, Fault> {
        let (a, b) = (self.get(dst), self.operand(src));
        match (op, a, b) {
            (Alu::Mov, _, Value::Pointer(..)) if wide => Ok(b),
            (Alu::Add, Value::Pointer(region, at), Value::Number(by))
            | (Alu::Add, Value::Number(by), Value::Pointer(region, at))
                if wide =>
            {
                Ok(Value::Pointer(region, at.wrapping_add(by as i64)))
            }
            (Alu::Sub, Value::Pointer(region, at), Value::Number(by)) if wide => {
                Ok(Value::Pointer(region, at.wrapping_sub(by as i64)))
            }
            (Alu::Sub, Value::Pointer(region, at), Value::Pointer(other, from))
                if wide && region == other =>
            {
                Ok(Value::Number(at.wrapping_sub(from) as u64))
            }
            _ => {
                // What is overwritten need not have been written.
                let a = if matches!(op, Alu::Mov | Alu::MovSigned(_)) { 0 } else { a.number()? };
                let b = b.number()?;
                Ok(Value::Number(if wide { alu64(op, a, b) } else { alu32(op, a as u32, b as u32).into() }))
            }
        }
    }

    fn load(&self, pointer: Value, offset: i16, size: usize) -> Result<Value, Fault> {
        let Value::Pointer(region, at) = pointer else { return Err(Fault) };
        let at = at.wrapping_add(offset.into());
        match region {
            Region::Context => {
                if size != 4 {
                    return Err(Fault);
                }
                match i16::try_from(at).map_err(|_| Fault)? {
                    // The simulator has no metadata in front of packets.
                    XDP_MD_DATA | XDP_MD_DATA_META => Ok(Value::Pointer(Region::Packet, 0)),
                    XDP_MD_DATA_END => Ok(Value::Pointer(Region::Packet, self.packet.len() as i64)),
                    XDP_MD_INGRESS_IFINDEX => Ok(Value::Number(self.context.ifindex.into())),
                    XDP_MD_RX_QUEUE_INDEX => Ok(Value::Number(self.context.queue.into())),
                    _ => Err(Fault),
                }
            }
            Region::Packet => {
                let start = usize::try_from(at).map_err(|_| Fault)?;
                Ok(Value::Number(number(self.packet.get(start..start + size).ok_or(Fault)?)))
            }
            Region::Stack => self.stack.load(at, size),
            Region::Map(_) | Region::Socket => Err(Fault),
        }
    }

    fn store(&mut self, pointer: Value, offset: i16, size: usize, value: Value) -> Result<(), Fault> {
        let Value::Pointer(region, at) = pointer else { return Err(Fault) };
        let at = at.wrapping_add(offset.into());
        match region {
            Region::Packet => {
                let start = usize::try_from(at).map_err(|_| Fault)?;
                let bytes = self.packet.get_mut(start..start + size).ok_or(Fault)?;
                bytes.copy_from_slice(&value.number()?.to_le_bytes()[..size]);
                Ok(())
            }
            Region::Stack => self.stack.store(at, size, value),
            Region::Context | Region::Map(_) | Region::Socket => Err(Fault),
        }
    }

    fn call(&mut self, helper: Helper) -> Result<Value, Fault> {
        let Value::Pointer(Region::Map(map), 0) = self.get(1) else { return Err(Fault) };
        let map = &self.program.maps[map];
        match helper {
            Helper::MapLookup => {
                let key = self.load(self.get(2), 0, 4)?.number()? as u32;
                Ok(match map.get(key) {
                    Some(_) => Value::Pointer(Region::Socket, 0),
                    None => Value::Number(0),
                })
            }
            Helper::RedirectMap => {
                let (key, flags) = (self.get(2).number()? as u32, self.get(3).number()?);
                if flags & !3 != 0 {
                    return Ok(Value::Number(XDP_ABORTED as u64));
                }
                self.target = map.get(key);
                Ok(Value::Number(if self.target.is_some() { XDP_REDIRECT as u64 } else { flags }))
            }
        }
    }
}

/// The lower `bits` bits of a number, sign-extended.
fn extend(number: u64, bits: u32) -> i64 {
    let unused = 64 - bits;
    (number << unused) as i64 >> unused
}

fn swap(to: Swap, bits: u32, number: u64) -> u64 {
    // The value's bytes, as the registers hold them, are little-endian.
    let low = if bits == 64 { number } else { number & ((1 << bits) - 1) };
    match to {
        Swap::ToLittle => low,
        Swap::ToBig | Swap::Always => low.swap_bytes() >> (64 - bits),
    }
}

fn alu64(op: Alu, a: u64, b: u64) -> u64 {
    match op {
        Alu::Add => a.wrapping_add(b),
        Alu::Sub => a.wrapping_sub(b),
        Alu::Mul => a.wrapping_mul(b),
        Alu::Div => a.checked_div(b).unwrap_or(0),
        Alu::SignedDiv if b == 0 => 0,
        Alu::SignedDiv => (a as i64).wrapping_div(b as i64) as u64,
        Alu::Or => a | b,
        Alu::And => a & b,
        Alu::ShiftLeft => a.wrapping_shl(b as u32),
        Alu::ShiftRight => a.wrapping_shr(b as u32),
        Alu::SignedShiftRight => (a as i64).wrapping_shr(b as u32) as u64,
        Alu::Neg => a.wrapping_neg(),
        Alu::Mod => a.checked_rem(b).unwrap_or(a),
        Alu::SignedMod if b == 0 => a,
        Alu::SignedMod => (a as i64).wrapping_rem(b as i64) as u64,
        Alu::Xor => a ^ b,
        Alu::Mov => b,
        Alu::MovSigned(bits) => extend(b, bits) as u64,
    }
}

fn alu32(op: Alu, a: u32, b: u32) -> u32 {
    match op {
        Alu::SignedDiv if b == 0 => 0,
        Alu::SignedDiv => (a as i32).wrapping_div(b as i32) as u32,
        Alu::SignedMod if b == 0 => a,
        Alu::SignedMod => (a as i32).wrapping_rem(b as i32) as u32,
        Alu::ShiftLeft => a.wrapping_shl(b),
        Alu::ShiftRight => a.wrapping_shr(b),
        Alu::SignedShiftRight => (a as i32).wrapping_shr(b) as u32,
        // The lower 32 bits of these depend on no higher ones.
        _ => alu64(op, a.into(), b.into()) as u32,
    }
}

fn compare(condition: Condition, wide: bool, a: Value, b: Value) -> Result<bool, Fault> {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => Ok(if wide {
            holds(condition, a, b, a as i64, b as i64)
        } else {
            holds(condition, a as u32, b as u32, a as i32, b as i32)
        }),
        // A pointer compared with null: no region is at address 0.
        (Value::Pointer(..), Value::Number(0)) | (Value::Number(0), Value::Pointer(..)) if wide => {
            match condition {
                Condition::Equal => Ok(false),
                Condition::NotEqual => Ok(true),
                _ => Err(Fault),
            }
        }
        (Value::Pointer(region, a), Value::Pointer(other, b)) if wide && region == other => match condition {
            Condition::Equal
            | Condition::NotEqual
            | Condition::Greater
            | Condition::GreaterEqual
            | Condition::Less
            | Condition::LessEqual => Ok(holds(condition, a, b, a, b)),
            _ => Err(Fault),
        },
        _ => Err(Fault),
    }
}

/// Whether a condition holds for two numbers, given as the unsigned and the signed ones see them.
fn holds<U, S>(condition: Condition, a: U, b: U, signed_a: S, signed_b: S) -> bool
where
    U: Ord + Copy + core::ops::BitAnd<Output = U> + Default,
    S: Ord,
{
    match condition {
        Condition::Equal => a == b,
        Condition::NotEqual => a != b,
        Condition::Greater => a > b,
        Condition::GreaterEqual => a >= b,
        Condition::Less => a < b,
        Condition::LessEqual => a <= b,
        Condition::AnyBit => a & b != U::default(),
        Condition::SignedGreater => signed_a > signed_b,
        Condition::SignedGreaterEqual => signed_a >= signed_b,
        Condition::SignedLess => signed_a < signed_b,
        Condition::SignedLessEqual => signed_a <= signed_b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xsk::kernel::{Errno, Insn, ProgramSpec};

    const CONTEXT: Context = Context { ifindex: 1, queue: 0 };

    /// Runs instructions and gives back `r0`, whole: in two halves, as a verdict has 32 bits.
    fn eval(instructions: &[Insn]) -> u64 {
        let half = |shift| {
            let mut program = instructions.to_vec();
            program.extend([insn(0x77, 0, 0, 0, shift), insn(0x95, 0, 0, 0, 0)]);
            let spec = ProgramSpec { instructions: &program, flags: 0, name: "" };
            let mut log = String::new();
            let program = Program::load(1, &spec, |_| Err(Errno::BADF), &mut log).expect(&log);
            program.run(&mut [0; 14], CONTEXT).verdict as u32
        };
        u64::from(half(32)) << 32 | u64::from(half(0))
    }

    fn insn(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> Insn {
        Insn { code, regs: dst | src << 4, off, imm }
    }

    fn constant(dst: u8, value: u64) -> [Insn; 2] {
        [insn(0x18, dst, 0, 0, value as i32), insn(0, 0, 0, 0, (value >> 32) as i32)]
    }

    /// `r0 = a; r1 = b; r0 <op> r1`.
    fn binary(code: u8, off: i16, a: u64, b: u64) -> u64 {
        let mut program = constant(0, a).to_vec();
        program.extend(constant(1, b));
        program.push(insn(code, 0, 1, off, 0));
        eval(&program)
    }

    #[test]
    fn arithmetic_is_that_of_the_instruction_set() {
        const MIN: u64 = i64::MIN as u64;
        const MINUS: u64 = u64::MAX;
        let rows = [
            // 64 bits
            (0x0f, 0, MINUS, 2, 1),
            (0x1f, 0, 1, 2, MINUS),
            (0x2f, 0, 1 << 63, 2, 0),
            (0x3f, 0, MINUS, 2, MINUS / 2),
            (0x3f, 0, 7, 0, 0),
            (0x3f, 1, MINUS - 6, 2, MINUS - 2),
            (0x3f, 1, MIN, MINUS, MIN),
            (0x3f, 1, 7, 0, 0),
            (0x4f, 0, 0xf0, 0x0f, 0xff),
            (0x5f, 0, 0xff, 0x18, 0x18),
            (0x6f, 0, 1, 65, 2),
            (0x7f, 0, MIN, 63, 1),
            (0x9f, 0, 7, 4, 3),
            (0x9f, 0, 7, 0, 7),
            (0x9f, 1, MINUS - 6, 4, MINUS - 2),
            (0x9f, 1, MIN, MINUS, 0),
            (0x9f, 1, 7, 0, 7),
            (0xaf, 0, 0xff, 0x0f, 0xf0),
            (0xbf, 0, 1, MINUS, MINUS),
            (0xbf, 8, 0, 0x80, MINUS - 127),
            (0xbf, 16, 0, 0x17fff, 0x7fff),
            (0xbf, 32, 0, 0x8000_0000, MINUS << 31),
            (0xcf, 0, MIN, 63, MINUS),
            // 32 bits: the rest is cleared.
            (0x0c, 0, 0xffff_ffff, 1, 0),
            (0x1c, 0, 0, 1, 0xffff_ffff),
            (0x3c, 0, MINUS, 2, 0x7fff_ffff),
            (0x3c, 0, MINUS, 1 << 32, 0),
            (0x3c, 1, 0xffff_fff9, 2, 0xffff_fffd),
            (0x3c, 1, 0x8000_0000, 0xffff_ffff, 0x8000_0000),
            (0x6c, 0, 1, 33, 2),
            (0x7c, 0, MIN | 4, 1, 2),
            (0x9c, 0, MINUS, 0, 0xffff_ffff),
            (0xbc, 0, 0, MINUS, 0xffff_ffff),
            (0xbc, 8, 0, 0x80, 0xffff_ff80),
            (0xcc, 0, 0x8000_0000, 31, 0xffff_ffff),
        ];
        for (code, off, a, b, wanted) in rows {
            assert_eq!(binary(code, off, a, b), wanted, "{code:#x} off {off} of {a:#x} and {b:#x}");
        }
    }

    #[test]
    fn unary_operations_are_those_of_the_instruction_set() {
        let value = 0x0102_0304_0506_0708u64;
        let rows = [
            (0x87, 0, value.wrapping_neg()),
            (0x84, 0, u64::from((value as u32).wrapping_neg())),
            (0xd4, 16, 0x0708),
            (0xd4, 32, 0x0506_0708),
            (0xd4, 64, value),
            (0xdc, 16, 0x0807),
            (0xdc, 32, 0x0807_0605),
            (0xdc, 64, value.swap_bytes()),
            (0xd7, 16, 0x0807),
            (0xd7, 64, value.swap_bytes()),
        ];
        for (code, imm, wanted) in rows {
            let mut program = constant(0, value).to_vec();
            program.push(insn(code, 0, 0, 0, imm));
            assert_eq!(eval(&program), wanted, "{code:#x} {imm}");
        }
    }

    #[test]
    fn jumps_compare_as_wide_and_as_signed_as_they_say() {
        const MINUS: u64 = u64::MAX;
        // An operation with the 64-bit code, two numbers, and whether it jumps on 64 and 32 bits.
        let rows = [
            (0x1d, 1 << 32, 0, false, true),
            (0x5d, 1 << 32, 0, true, false),
            (0x2d, MINUS, 1, true, true),
            (0x6d, MINUS, 1, false, false),
            (0x3d, 1, 1, true, true),
            (0x7d, 0x8000_0000, 0, true, false),
            (0x4d, 1 << 32, 1 << 32, true, false),
            (0xad, 1, MINUS, true, true),
            (0xcd, 1, MINUS, false, false),
            (0xbd, 2, 1, false, false),
            (0xdd, MINUS, 0, true, true),
        ];
        for (code, a, b, wide, narrow) in rows {
            for (code, wanted) in [(code, wide), (code + 1, narrow)] {
                let mut program = constant(2, a).to_vec();
                program.extend(constant(3, b));
                program.extend([insn(0xb7, 0, 0, 0, 1), insn(code, 2, 3, 1, 0), insn(0xb7, 0, 0, 0, 0)]);
                assert_eq!(eval(&program) == 1, wanted, "{code:#x} of {a:#x} and {b:#x}");
            }
        }
        // The jump with a 32-bit offset.
        let program = [insn(0xb7, 0, 0, 0, 1), insn(0x06, 0, 0, 0, 1), insn(0xb7, 0, 0, 0, 0)];
        assert_eq!(eval(&program), 1);
    }

    #[test]
    fn immediates_and_loads_are_extended_as_they_say() {
        assert_eq!(eval(&[insn(0xb7, 0, 0, 0, -1)]), u64::MAX);
        assert_eq!(eval(&[insn(0xb4, 0, 0, 0, -1)]), 0xffff_ffff);
        let store = insn(0x7a, 10, 0, -8, -2);
        for (code, wanted) in [
            (0x71, 0xfe),
            (0x69, 0xfffe),
            (0x61, 0xffff_fffe),
            (0x79, u64::MAX - 1),
            (0x91, u64::MAX - 1),
            (0x89, u64::MAX - 1),
            (0x81, u64::MAX - 1),
        ] {
            assert_eq!(eval(&[store, insn(code, 0, 10, -8, 0)]), wanted, "{code:#x}");
        }
    }
}
