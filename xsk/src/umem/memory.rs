//! Memory for a UMEM, in pages of a chosen size.

use std::sync::Arc;

use crate::kernel::{Errno, Mapping};

/// Size of the pages that hold a UMEM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PageSize {
    /// The system's ordinary pages (4 KiB on x86-64).
    #[default]
    Ordinary,
    /// Huge pages of 2 MiB, from `vm.nr_hugepages`.
    Huge2M,
    /// Huge pages of 1 GiB, reserved at boot.
    Huge1G,
}

impl PageSize {
    /// Bytes of a page.
    pub fn bytes(self) -> usize {
        match self {
            Self::Ordinary => rustix::param::page_size(),
            Self::Huge2M => 2 << 20,
            Self::Huge1G => 1 << 30,
        }
    }
}

impl core::fmt::Display for PageSize {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Ordinary => write!(f, "{} KiB", self.bytes() >> 10),
            Self::Huge2M => f.write_str("2 MiB"),
            Self::Huge1G => f.write_str("1 GiB"),
        }
    }
}

/// Zeroed memory of at least `bytes`, in pages of `pages`, not inherited by a fork.
#[cfg(all(target_os = "linux", not(miri)))]
pub(super) fn allocate(bytes: usize, pages: PageSize) -> Result<Mapping, Errno> {
    use core::ptr::NonNull;
    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};

    struct Mapped(NonNull<u8>, usize);
    // SAFETY: the range is only unmapped through it, once.
    unsafe impl Send for Mapped {}
    // SAFETY: a shared reference does nothing.
    unsafe impl Sync for Mapped {}
    impl Drop for Mapped {
        fn drop(&mut self) {
            // SAFETY: mapped below, and nobody can reach it once its owner is gone.
            let _ = unsafe { rustix::mm::munmap(self.0.as_ptr().cast(), self.1) };
        }
    }

    let len = bytes.next_multiple_of(pages.bytes());
    let huge = match pages {
        PageSize::Ordinary => MapFlags::empty(),
        PageSize::Huge2M => MapFlags::HUGETLB | MapFlags::HUGE_2MB,
        PageSize::Huge1G => MapFlags::HUGETLB | MapFlags::HUGE_1GB,
    };
    // SAFETY: a new mapping, at an address that the kernel chooses.
    let base = unsafe {
        mmap_anonymous(
            core::ptr::null_mut(),
            len,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | huge,
        )?
    };
    let base = NonNull::new(base.cast::<u8>()).ok_or(Errno::NOMEM)?;
    let owner = Arc::new(Mapped(base, len));
    // A child that wrote to these pages would make the parent lose sight of what the kernel
    // writes into the originals.
    // SAFETY: the range was just mapped; the advice changes nothing for this process.
    unsafe { madvise(base.as_ptr().cast(), len, Advice::LinuxDontFork)? };
    // SAFETY: `len` bytes are mapped until `owner` is dropped.
    Ok(unsafe { Mapping::new(base, bytes, owner) })
}

/// Zeroed memory from the allocator, where there is no `mmap`: other systems, and Miri.
#[cfg(not(all(target_os = "linux", not(miri))))]
pub(super) fn allocate(bytes: usize, pages: PageSize) -> Result<Mapping, Errno> {
    use core::ptr::NonNull;
    use std::alloc::{Layout, alloc_zeroed, dealloc};

    struct Allocated(NonNull<u8>, Layout);
    // SAFETY: the memory is only freed through it, once.
    unsafe impl Send for Allocated {}
    // SAFETY: a shared reference does nothing.
    unsafe impl Sync for Allocated {}
    impl Drop for Allocated {
        fn drop(&mut self) {
            // SAFETY: allocated below with this layout.
            unsafe { dealloc(self.0.as_ptr(), self.1) };
        }
    }

    if pages != PageSize::Ordinary {
        return Err(Errno::NOMEM);
    }
    let layout = Layout::from_size_align(bytes, pages.bytes().max(4096)).map_err(|_| Errno::NOMEM)?;
    // SAFETY: the caller asks for at least one chunk, so the size is not 0.
    let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(Errno::NOMEM)?;
    // SAFETY: the memory lives until `owner` is dropped.
    Ok(unsafe { Mapping::new(base, bytes, Arc::new(Allocated(base, layout))) })
}

/// Bytes of memory that this machine has; the most that could ever be pinned.
#[cfg(all(target_os = "linux", not(miri)))]
pub(super) fn installed() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram as u64 * u64::from(info.mem_unit)
}

/// Bytes of memory that could be asked for.
#[cfg(not(all(target_os = "linux", not(miri))))]
pub(super) fn installed() -> u64 {
    isize::MAX as u64
}

/// Bytes of memory that could be had now without taking it from another program; `None` where the
/// system doesn't tell.
#[cfg(all(target_os = "linux", not(miri)))]
pub(super) fn available() -> Option<u64> {
    let table = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = table.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    Some(kib << 10)
}

/// Bytes of memory that could be had now: unknown.
#[cfg(not(all(target_os = "linux", not(miri))))]
pub(super) fn available() -> Option<u64> {
    None
}
