//! Keeps a user from cutting the branch that they sit on.
//!
//! What an AF_XDP socket takes from a queue no longer reaches the network stack. On the interface
//! that carries the default route, or the SSH connection in which the command was typed, that is
//! refused unless the user says that it is meant.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;

use crate::failure::Failure;
use crate::report::queues_in_words;

/// What an interface is needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Use {
    /// A default route of IPv4.
    DefaultRoute4,
    /// A default route of IPv6.
    DefaultRoute6,
    /// The SSH connection of the caller.
    Ssh,
}

impl Use {
    /// In a table.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::DefaultRoute4 => "default route",
            Self::DefaultRoute6 => "default route (IPv6)",
            Self::Ssh => "your SSH connection",
        }
    }
}

/// What a command would take away from an interface's other users.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taking<'a> {
    /// The packets that arrive on some of its queues.
    Received { interface: &'a str, queues: &'a [u32], of: u32 },
    /// Room to send.
    Bandwidth { interface: &'a str },
}

impl<'a> Taking<'a> {
    fn interface(&self) -> &'a str {
        match self {
            Self::Received { interface, .. } | Self::Bandwidth { interface } => interface,
        }
    }
}

/// Refuses interfaces that are needed.
pub(crate) fn check(takings: &[Taking<'_>]) -> Result<(), Failure> {
    let needed: Vec<_> = takings
        .iter()
        .map(|taking| (*taking, uses_of(taking.interface()).into_iter().collect::<Vec<_>>()))
        .filter(|(_, uses)| !uses.is_empty())
        .collect();
    if needed.is_empty() { Ok(()) } else { Err(refusal(&needed)) }
}

fn refusal(needed: &[(Taking<'_>, Vec<Use>)]) -> Failure {
    let interfaces: Vec<_> = needed.iter().map(|(taking, _)| taking.interface()).collect();
    let causes: Vec<_> = needed.iter().map(|(taking, uses)| cause(*taking, uses)).collect();
    Failure::new(
        &format!("will not take over {}", interfaces.join(" and ")),
        causes.join("; "),
        "Losing the way to the machine is rarely meant.",
        "use another interface, or say --take-all if it is meant".into(),
    )
}

/// What would be lost.
fn cause(taking: Taking<'_>, uses: &[Use]) -> String {
    let labels: Vec<_> = uses
        .iter()
        .map(|it| match it {
            Use::DefaultRoute4 => "the default route",
            Use::DefaultRoute6 => "the default route of IPv6",
            Use::Ssh => "your SSH connection",
        })
        .collect();
    let labels = labels.join(" and ");
    let consequence = if uses.contains(&Use::Ssh) {
        "your session would hang, and the machine might be out of reach"
    } else {
        "the machine's connections to other networks would break"
    };
    match taking {
        Taking::Received { interface, queues, of } if queues.len() < of as usize => format!(
            "{interface} carries {labels}: what arrives on {} of its {of} would no longer reach this machine's \
             network stack; where that includes them, {consequence}",
            queues_in_words(queues)
        ),
        Taking::Received { interface, of, .. } => format!(
            "{interface} carries {labels}: everything that arrives there ({}) would no longer reach this \
             machine's network stack, and {consequence}",
            if of <= 1 { "on its only queue".to_owned() } else { format!("on all of its {of} queues") }
        ),
        Taking::Bandwidth { interface } => format!(
            "{interface} carries {labels}: packets sent at full speed would crowd out all others, and \
             {consequence} until it ends"
        ),
    }
}

/// What an interface of the calling thread's network namespace is needed for: by itself, or as a part
/// of a bridge, a bond or a VLAN device.
pub(crate) fn uses_of(interface: &str) -> BTreeSet<Use> {
    let carriers = carriers();
    let mut found = BTreeSet::new();
    let mut seen = BTreeSet::new();
    let mut ahead = vec![interface.to_owned()];
    while let Some(name) = ahead.pop() {
        found.extend(carriers.iter().filter(|(carrier, _)| *carrier == name).map(|(_, it)| *it));
        let uppers = uppers(&name);
        if seen.insert(name) {
            ahead.extend(uppers);
        }
    }
    found
}

/// Interfaces that carry something, and what.
fn carriers() -> Vec<(String, Use)> {
    // Of the calling thread: `/proc/net` shows the process's first thread's namespace.
    let read = |table| fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default();
    let mut carriers = Vec::new();
    carriers.extend(default_routes4(&read("route")).map(|name| (name, Use::DefaultRoute4)));
    carriers.extend(default_routes6(&read("ipv6_route")).map(|name| (name, Use::DefaultRoute6)));
    carriers.extend(ssh_address().and_then(interface_with).map(|name| (name, Use::Ssh)));
    carriers
}

const RTF_UP: u32 = 1;
const RTF_REJECT: u32 = 0x200;

/// Interfaces with a default route, from `/proc/net/route`.
fn default_routes4(table: &str) -> impl Iterator<Item = String> {
    table.lines().skip(1).filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let [name, destination, _gateway, flags, _, _, _, mask, ..] = fields[..] else { return None };
        let flags = u32::from_str_radix(flags, 16).ok()?;
        (is_zero(destination) && is_zero(mask) && flags & RTF_UP != 0).then(|| name.to_owned())
    })
}

/// Interfaces with a default route, from `/proc/net/ipv6_route`. The kernel's own entry that answers
/// "unreachable" is none.
fn default_routes6(table: &str) -> impl Iterator<Item = String> {
    table.lines().filter_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let [destination, prefix, _, _, _, _, _, _, flags, name] = fields[..] else { return None };
        let flags = u32::from_str_radix(flags, 16).ok()?;
        let is_default = is_zero(destination) && is_zero(prefix) && flags & RTF_UP != 0;
        (is_default && flags & RTF_REJECT == 0).then(|| name.to_owned())
    })
}

fn is_zero(digits: &str) -> bool {
    digits.bytes().all(|digit| digit == b'0')
}

/// This machine's address in the caller's SSH connection.
fn ssh_address() -> Option<IpAddr> {
    let own = std::env::var("SSH_CONNECTION").ok();
    local_address(&own.or_else(ssh_connection_of_ancestors)?)
}

/// This machine's address in the value of `SSH_CONNECTION`: client, port, server, port.
fn local_address(connection: &str) -> Option<IpAddr> {
    let address = connection.split_whitespace().nth(2)?;
    // A link-local address names its interface as well.
    let address = address.split('%').next()?.parse().ok()?;
    Some(match address {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4),
        v4 => v4,
    })
}

/// The variable `SSH_CONNECTION` of a process that this one descends from: `sudo` takes it out of the
/// environment.
fn ssh_connection_of_ancestors() -> Option<String> {
    let mut process = std::os::unix::process::parent_id();
    while process > 1 {
        let environment = fs::read(format!("/proc/{process}/environ")).unwrap_or_default();
        let value = environment.split(|&byte| byte == 0).find_map(|it| it.strip_prefix(b"SSH_CONNECTION="));
        if let Some(value) = value {
            return String::from_utf8(value.to_vec()).ok();
        }
        let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        process = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()?;
    }
    None
}

/// The interface that has an address.
fn interface_with(address: IpAddr) -> Option<String> {
    let has_it = |interface: &nix::ifaddrs::InterfaceAddress| {
        interface.address.is_some_and(|it| match address {
            IpAddr::V4(v4) => it.as_sockaddr_in().is_some_and(|it| it.ip() == v4),
            IpAddr::V6(v6) => it.as_sockaddr_in6().is_some_and(|it| it.ip() == v6),
        })
    };
    nix::ifaddrs::getifaddrs().ok()?.find(has_it).map(|interface| interface.interface_name)
}

/// Devices that are stacked upon an interface: its bridge, its bond, its VLANs.
fn uppers(interface: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(format!("/sys/class/net/{interface}")) else { return Vec::new() };
    let upper = |entry: fs::DirEntry| Some(entry.file_name().to_str()?.strip_prefix("upper_")?.to_owned());
    entries.flatten().filter_map(upper).collect()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn a_default_route_is_up_and_has_no_mask() {
        let table = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                     eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                     eth1\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
                     eth2\t00000000\t00000000\t0000\t0\t0\t0\t00000000\t0\t0\t0\n\
                     tun0\t00000000\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0\n";
        assert_eq!(default_routes4(table).collect::<Vec<_>>(), ["eth0"]);
        assert_eq!(default_routes4("").count(), 0);
    }

    #[test]
    fn the_kernels_own_unreachable_route_is_no_default_route() {
        let zero = "00000000000000000000000000000000";
        let table = format!(
            "{zero} 00 {zero} 00 fe80000000000000020000fffe000001 00000400 00000001 00000000 00000003     eth0\n\
             {zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200       lo\n\
             fd000000000000000000000000000000 40 {zero} 00 {zero} 00000100 00000001 00000000 00000001     eth1\n"
        );
        assert_eq!(default_routes6(&table).collect::<Vec<_>>(), ["eth0"]);
    }

    #[test]
    fn the_servers_side_of_an_ssh_connection() {
        assert_eq!(
            local_address("198.51.100.7 50022 192.0.2.2 22"),
            Some(Ipv4Addr::new(192, 0, 2, 2).into())
        );
        assert_eq!(
            local_address("::ffff:198.51.100.7 50022 ::ffff:192.0.2.2 22"),
            Some(Ipv4Addr::new(192, 0, 2, 2).into())
        );
        assert_eq!(local_address("fe80::1%eth0 50022 fe80::2%eth0 22"), Some("fe80::2".parse().unwrap()));
        assert_eq!(local_address("nonsense"), None);
    }

    #[test]
    fn an_address_leads_to_its_interface() {
        assert_eq!(interface_with(Ipv4Addr::new(203, 0, 113, 99).into()), None);
        // The loopback device may be off in a namespace of its own, and have no address then.
        let loopback = interface_with(Ipv4Addr::LOCALHOST.into());
        assert!(loopback.is_none_or(|name| name == "lo"));
    }

    #[test]
    fn a_refusal_says_what_would_be_lost() {
        let received =
            |interface, queues, of| (Taking::Received { interface, queues, of }, vec![Use::DefaultRoute4]);
        let mut some = received("eth0", &[1, 2], 4);
        some.1.push(Use::Ssh);
        let text = refusal(&[some]).to_string();
        assert!(text.contains("the default route and your SSH connection"), "{text}");
        assert!(text.contains("queues 1-2 of its 4"), "{text}");
        assert!(text.contains("your session would hang"), "{text}");

        let text = refusal(&[received("eth0", &[0, 1], 2), received("eth1", &[0], 1)]).to_string();
        for part in
            ["take over eth0 and eth1", "(on all of its 2 queues)", "eth1 carries", "(on its only queue)"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }

        let text =
            refusal(&[(Taking::Bandwidth { interface: "eth0" }, vec![Use::DefaultRoute6])]).to_string();
        assert!(text.contains("eth0 carries the default route of IPv6: packets sent"), "{text}");
    }
}
