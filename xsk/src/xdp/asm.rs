//! An eBPF assembler, as small as the programs that are made here.
//!
//! Each function is one instruction and is named as the kernel's documentation names it
//! (`Documentation/bpf/standardization/instruction-set.rst`).

use crate::kernel::Insn;

/// A register, `r0` to `r10`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Reg {
    /// Result of a call, and of the program.
    R0,
    /// First argument; the context when the program starts.
    R1,
    /// Second argument.
    R2,
    /// Third argument.
    R3,
    /// Fourth argument.
    R4,
    /// Fifth argument.
    R5,
    /// Kept across calls.
    R6,
    /// Kept across calls.
    R7,
    /// Kept across calls.
    R8,
    /// Kept across calls.
    R9,
    /// The frame pointer, read-only.
    R10,
}

/// Width of a memory access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Width {
    /// 4 bytes.
    W = 0x00,
    /// 2 bytes.
    H = 0x08,
    /// 1 byte.
    B = 0x10,
    /// 8 bytes.
    Dw = 0x18,
}

/// Operation of a 64-bit ALU instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Alu {
    /// Addition.
    Add = 0x00,
    /// Subtraction.
    Sub = 0x10,
    /// Multiplication.
    Mul = 0x20,
    /// Bitwise or.
    Or = 0x40,
    /// Bitwise and.
    And = 0x50,
    /// Left shift.
    Lsh = 0x60,
    /// Logical right shift.
    Rsh = 0x70,
    /// Unsigned remainder.
    Mod = 0x90,
    /// Bitwise exclusive or.
    Xor = 0xa0,
    /// Copy.
    Mov = 0xb0,
}

/// Condition of a 64-bit jump; comparisons are unsigned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Cond {
    /// Equal.
    Eq = 0x10,
    /// Greater.
    Gt = 0x20,
    /// Greater or equal.
    Ge = 0x30,
    /// Some bit in common.
    Set = 0x40,
    /// Not equal.
    Ne = 0x50,
    /// Less.
    Lt = 0xa0,
    /// Less or equal.
    Le = 0xb0,
}

/// `bpf_redirect(ifindex, flags)`.
pub const FN_REDIRECT: i32 = 23;
/// `bpf_redirect_map(map, key, flags)`.
pub const FN_REDIRECT_MAP: i32 = 51;
/// `bpf_map_lookup_elem(map, key)`.
pub const FN_MAP_LOOKUP_ELEM: i32 = 1;

/// Verdict: an error; the packet is dropped and traced.
pub const XDP_ABORTED: i32 = 0;
/// Verdict: the packet is dropped.
pub const XDP_DROP: i32 = 1;
/// Verdict: the packet goes on to the Linux stack.
pub const XDP_PASS: i32 = 2;
/// Verdict: the packet leaves where it came in.
pub const XDP_TX: i32 = 3;
/// Verdict: the packet goes where a redirect helper said.
pub const XDP_REDIRECT: i32 = 4;

/// `xdp_md.data`.
pub const XDP_MD_DATA: i16 = 0;
/// `xdp_md.data_end`.
pub const XDP_MD_DATA_END: i16 = 4;
/// `xdp_md.rx_queue_index`.
pub const XDP_MD_RX_QUEUE_INDEX: i16 = 16;

/// The source register that says that an immediate is a map's descriptor.
pub const BPF_PSEUDO_MAP_FD: u8 = 1;
/// The source register that says: the address of the first value of the map of this descriptor.
pub const BPF_PSEUDO_MAP_VALUE: u8 = 2;

const fn insn(code: u8, dst: u8, src: u8, off: i16, imm: i32) -> Insn {
    Insn { code, regs: dst | src << 4, off, imm }
}

/// `dst = dst <op> imm`, 64 bits.
pub const fn alu_imm(op: Alu, dst: Reg, imm: i32) -> Insn {
    insn(0x07 | op as u8, dst as u8, 0, 0, imm)
}

/// `dst = dst <op> src`, 64 bits.
pub const fn alu(op: Alu, dst: Reg, src: Reg) -> Insn {
    insn(0x0f | op as u8, dst as u8, src as u8, 0, 0)
}

/// `dst = *(width *)(src + off)`.
pub const fn load(width: Width, dst: Reg, src: Reg, off: i16) -> Insn {
    insn(0x61 | width as u8, dst as u8, src as u8, off, 0)
}

/// `*(width *)(dst + off) = src`.
pub const fn store(width: Width, dst: Reg, off: i16, src: Reg) -> Insn {
    insn(0x63 | width as u8, dst as u8, src as u8, off, 0)
}

/// `*(width *)(dst + off) = imm`.
pub const fn store_imm(width: Width, dst: Reg, off: i16, imm: i32) -> Insn {
    insn(0x62 | width as u8, dst as u8, 0, off, imm)
}

/// `src = fetch_add(*(u64 *)(dst + off), src)` (5.12).
pub const fn fetch_add(dst: Reg, off: i16, src: Reg) -> Insn {
    insn(0xdb, dst as u8, src as u8, off, 0x01)
}

/// Jump by `off` instructions, counted from the next one, if `dst <cond> imm`.
pub const fn jump_imm(cond: Cond, dst: Reg, imm: i32, off: i16) -> Insn {
    insn(0x05 | cond as u8, dst as u8, 0, off, imm)
}

/// Jump by `off` instructions, counted from the next one, if `dst <cond> src`.
pub const fn jump(cond: Cond, dst: Reg, src: Reg, off: i16) -> Insn {
    insn(0x0d | cond as u8, dst as u8, src as u8, off, 0)
}

/// Jump by `off` instructions, counted from the next one.
pub const fn goto(off: i16) -> Insn {
    insn(0x05, 0, 0, off, 0)
}

/// Call the kernel's helper of this number.
pub const fn call(helper: i32) -> Insn {
    insn(0x85, 0, 0, 0, helper)
}

/// Return `r0`.
pub const fn exit() -> Insn {
    insn(0x95, 0, 0, 0, 0)
}

/// `dst` = the map of this descriptor: one instruction in two slots.
pub const fn load_map(dst: Reg, fd: i32) -> [Insn; 2] {
    [insn(0x18, dst as u8, BPF_PSEUDO_MAP_FD, 0, fd), insn(0, 0, 0, 0, 0)]
}

/// `dst` = the address of byte `offset` of the only value of the array map of this descriptor.
pub const fn load_map_value(dst: Reg, fd: i32, offset: i32) -> [Insn; 2] {
    [insn(0x18, dst as u8, BPF_PSEUDO_MAP_VALUE, 0, fd), insn(0, 0, 0, 0, offset)]
}

/// Convert the lower 16 (`bits` 16), 32 or 64 bits of `dst` to big endian.
pub const fn to_be(dst: Reg, bits: i32) -> Insn {
    insn(0xdc, dst as u8, 0, 0, bits)
}

/// A place in a [`Code`], to jump to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Label(usize);

/// Instructions whose jumps go to labels, which may be placed later.
#[derive(Debug, Default)]
pub(super) struct Code {
    insns: Vec<Insn>,
    /// Where each label is.
    places: Vec<Option<usize>>,
    /// The instructions that jump, and where to.
    jumps: Vec<(usize, Label)>,
}

impl Code {
    /// A label, to be placed.
    pub(super) fn label(&mut self) -> Label {
        self.places.push(None);
        Label(self.places.len() - 1)
    }

    /// Puts a label in front of the next instruction.
    pub(super) fn place(&mut self, label: Label) {
        self.places[label.0] = Some(self.insns.len());
    }

    /// An instruction that is no jump.
    pub(super) fn push(&mut self, insn: Insn) {
        self.insns.push(insn);
    }

    /// Instructions that are no jumps.
    pub(super) fn extend(&mut self, insns: impl IntoIterator<Item = Insn>) {
        self.insns.extend(insns);
    }

    /// Jump if `dst <cond> imm`.
    pub(super) fn jump_imm(&mut self, cond: Cond, dst: Reg, imm: i32, to: Label) {
        self.jump_by(jump_imm(cond, dst, imm, 0), to);
    }

    /// Jump if `dst <cond> src`.
    pub(super) fn jump(&mut self, cond: Cond, dst: Reg, src: Reg, to: Label) {
        self.jump_by(jump(cond, dst, src, 0), to);
    }

    /// Jump.
    pub(super) fn goto(&mut self, to: Label) {
        self.jump_by(goto(0), to);
    }

    fn jump_by(&mut self, insn: Insn, to: Label) {
        self.jumps.push((self.insns.len(), to));
        self.insns.push(insn);
    }

    /// The instructions, when every label that is jumped to has its place.
    pub(super) fn finish(mut self) -> Vec<Insn> {
        for (at, Label(to)) in self.jumps {
            let to = self.places[to].expect("a label that is jumped to has a place");
            let off = to as isize - (at as isize + 1);
            self.insns[at].off = off.try_into().expect("no program of ours is as long as a jump");
        }
        self.insns
    }
}
