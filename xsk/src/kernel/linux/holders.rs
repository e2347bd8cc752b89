//! Which processes hold what, as `/proc` shows it: AF_XDP sockets in this network namespace, and
//! programs anywhere.
//!
//! The kernel's own answer for sockets, `sock_diag` for AF_XDP, is absent from many kernels. But an
//! AF_XDP socket is of no use without its rings, and a mapped ring stands in `/proc/PID/maps` as a
//! socket at the offset of that ring, which no other kind of socket has. Programs and links tell
//! their numbers in `/proc/PID/fdinfo`.

use std::fs;

use crate::abi::{XDP_PGOFF_TX_RING, XDP_UMEM_PGOFF_COMPLETION_RING, XDP_UMEM_PGOFF_FILL_RING};
use crate::kernel::{Holder, ProgramHolder};

/// The processes with sockets that can be seen; without privilege, one's own.
pub(super) fn find() -> Vec<Holder> {
    let Ok(here) = fs::read_link("/proc/thread-self/ns/net") else { return Vec::new() };
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
    processes().into_iter().filter(in_namespace).filter(maps_rings).map(holder).collect()
}

/// The processes that have a program open, or a link of it; without privilege, one's own.
pub(super) fn of_program(id: u32) -> Vec<ProgramHolder> {
    let mut holders = Vec::new();
    for pid in processes() {
        let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for fd in fds.flatten() {
            // Looking at the link alone is much cheaper, and there are few descriptors of BPF.
            let bpf = fs::read_link(fd.path()).is_ok_and(|target| {
                target.to_str().is_some_and(|target| target.starts_with("anon_inode:bpf"))
            });
            let info = || fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", fd.file_name().to_str()?)).ok();
            if let Some(link) = bpf.then(info).flatten().and_then(|info| open_program(&info, id)) {
                holders.push(ProgramHolder { process: holder(pid), link });
            }
        }
    }
    // One process may have both, or one of them twice.
    holders.sort_by_key(|holder| (holder.process.pid, holder.link));
    holders.dedup();
    holders
}

/// All processes, by number.
fn processes() -> Vec<u32> {
    let Ok(all) = fs::read_dir("/proc") else { return Vec::new() };
    let mut pids: Vec<_> =
        all.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    pids
}

fn holder(pid: u32) -> Holder {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Holder { pid, name: name.trim_end().to_owned() }
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

/// Of the `fdinfo` of a program of this number, or of a link of it: the number of the link, if it is
/// one. `None` of anything else.
fn open_program(info: &str, id: u32) -> Option<Option<u32>> {
    let number = |name: &str| {
        info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().parse::<u32>().ok())
    };
    (number("prog_id") == Some(id)).then(|| number("link_id"))
}

#[cfg(test)]
mod tests {
    use super::{is_ring, open_program};

    #[test]
    fn rings_are_told_from_other_mappings() {
        assert!(is_ring("7f00-7f10 rw-s 100000000 00:08 4711   socket:[4711]"));
        assert!(is_ring("7f00-7f10 rw-s 80000000 00:08 4711 socket:[4711]"));
        assert!(!is_ring("7f00-7f10 rw-s 00000000 00:08 4711 socket:[4711]")); // a packet socket's ring
        assert!(!is_ring("7f00-7f10 r--p 100000000 fe:00 99 /usr/lib/socket:"));
        assert!(!is_ring("7f00-7f10 rw-p 00000000 00:00 0"));
        assert!(!is_ring(""));
    }

    #[test]
    fn links_and_programs_are_told_by_their_numbers() {
        let link = "pos:\t0\nflags:\t02000002\nmnt_id:\t16\nino:\t1057\nlink_type:\txdp\nlink_id:\t7\n\
                    prog_tag:\t3b185187f1855c4c\nprog_id:\t42\nifindex:\t2\n";
        let program = "pos:\t0\nprog_type:\t6\nprog_jited:\t1\nprog_tag:\t3b185187f1855c4c\n\
                       memlock:\t4096\nprog_id:\t42\nrun_cnt:\t0\n";
        assert_eq!(open_program(link, 42), Some(Some(7)));
        assert_eq!(open_program(program, 42), Some(None));
        assert_eq!((open_program(link, 4), open_program(program, 7)), (None, None));
        assert_eq!(open_program("map_type:\t17\nmap_id:\t42\n", 42), None);
        assert_eq!(open_program("", 0), None);
    }
}
