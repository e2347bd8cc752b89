//! Which processes have AF_XDP sockets open, in this network namespace.
//!
//! The kernel's own answer, `sock_diag` for AF_XDP, is absent from many kernels. But an AF_XDP
//! socket is of no use without its rings, and a mapped ring stands in `/proc/PID/maps` as a socket
//! at the offset of that ring, which no other kind of socket has.

use std::fs;

use crate::abi::{XDP_PGOFF_TX_RING, XDP_UMEM_PGOFF_COMPLETION_RING, XDP_UMEM_PGOFF_FILL_RING};
use crate::kernel::Holder;

/// The processes that can be seen; without privilege, one's own.
pub(super) fn find() -> Vec<Holder> {
    let Ok(here) = fs::read_link("/proc/thread-self/ns/net") else { return Vec::new() };
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let in_namespace = |pid: &u32| {
        // Threads can be in namespaces of their own.
        let tasks = fs::read_dir(format!("/proc/{pid}/task"));
        tasks.is_ok_and(|tasks| {
            tasks.flatten().any(|task| fs::read_link(task.path().join("ns/net")).is_ok_and(|ns| ns == here))
        })
    };
    let maps_rings = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/maps")).is_ok_and(|maps| maps.lines().any(is_ring))
    };
    let mut holders: Vec<_> = pids
        .filter(in_namespace)
        .filter(maps_rings)
        .map(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            Holder { pid, name: name.trim_end().to_owned() }
        })
        .collect();
    holders.sort_by_key(|holder| holder.pid);
    holders
}

/// Whether a line of `maps` is a ring of an AF_XDP socket.
fn is_ring(line: &str) -> bool {
    // address perms offset device inode path
    let mut fields = line.split_ascii_whitespace();
    let offset = fields.nth(2).and_then(|offset| u64::from_str_radix(offset, 16).ok());
    let path = fields.nth(2);
    path.is_some_and(|path| path.starts_with("socket:"))
        && offset.is_some_and(|offset| {
            [XDP_PGOFF_TX_RING, XDP_UMEM_PGOFF_FILL_RING, XDP_UMEM_PGOFF_COMPLETION_RING].contains(&offset)
        })
}

#[cfg(test)]
mod tests {
    use super::is_ring;

    #[test]
    fn rings_are_told_from_other_mappings() {
        assert!(is_ring("7f00-7f10 rw-s 100000000 00:08 4711   socket:[4711]"));
        assert!(is_ring("7f00-7f10 rw-s 80000000 00:08 4711 socket:[4711]"));
        assert!(!is_ring("7f00-7f10 rw-s 00000000 00:08 4711 socket:[4711]")); // a packet socket's ring
        assert!(!is_ring("7f00-7f10 r--p 100000000 fe:00 99 /usr/lib/socket:"));
        assert!(!is_ring("7f00-7f10 rw-p 00000000 00:00 0"));
        assert!(!is_ring(""));
    }
}
