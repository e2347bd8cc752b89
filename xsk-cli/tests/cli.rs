//! What the command says without a kernel's help: help, wrong usage, completions, man pages, and the
//! demo on the simulated kernel.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;
use snapbox::cmd::Command;
use snapbox::str;

fn xsk(arguments: &[&str]) -> Command {
    Command::new(snapbox::cmd::cargo_bin!("xsk")).args(arguments).env("COLUMNS", "100")
}

#[test]
fn help_names_the_commands() {
    xsk(&["-h"]).assert().success().stderr_eq("").stdout_eq(str![[r#"
Receive, send and forward packets with AF_XDP

Usage: xsk <COMMAND>

Commands:
  demo         Show AF_XDP at work, on devices of its own
  rxdrop       Receive packets and drop them
  txonly       Send UDP packets as fast as the interface takes them
  l2fwd        Send every packet back out where it came in, or forward between two interfaces
  info         Show what this machine and its interfaces can do for AF_XDP
  completions  Print a completion script for a shell
  man          Print the man page
  help         Print this message or the help of the given subcommand(s)

Options:
  -h, --help     Print help (see more with '--help')
  -V, --version  Print version

"#]]);
}

#[test]
fn help_of_a_sample_is_in_groups() {
    xsk(&["txonly", "-h"]).assert().success().stderr_eq("").stdout_eq(str![[r#"
Send UDP packets as fast as the interface takes them

Usage: xsk txonly [OPTIONS] --interface <IF>

Options:
  -h, --help  Print help (see more with '--help')

Interface:
  -i, --interface <IF>  Network interface to use
  -q, --queues <LIST>   Queues to use: 2, 0-3, 0,2-4 or all; `xsk info IF` tells how many there are
                        [default: 0] [alias: --queue]
      --copy            Have the kernel copy every packet; works everywhere [default: zero copy
                        where possible]
      --zero-copy       Have the NIC read and write the packets' memory itself, or fail
      --take-all        Allow an interface that carries the default route or your SSH connection
      --attach          Attach an XDP program that lets everything pass: igb, ixgbe, i40e and ice
                        send in zero copy only beside one

Threads:
  -t, --threads <N>  Threads that share the queues evenly, at most one a queue [default: one a
                     queue, as far as there are CPUs]
      --cpus <LIST>  Pin the threads to these CPUs, one after the other: 2, 0-3, 0,2-4 or all

Rings:
  -b, --batch <PACKETS>     Packets that are handled at a time, on each queue [default: 64]
  -f, --frame-size <BYTES>  Bytes of a frame, which holds one packet: 2048 or 4096 [default: 4096]
      --frames <FRAMES>     Frames for each queue in the UMEM, the memory that is shared with the
                            kernel [default: twice --ring]
      --ring <ENTRIES>      Entries of each ring, a power of two [default: 2048]
      --poll                Sleep while there is nothing to do; otherwise each thread keeps a CPU
                            busy, which is faster
      --no-need-wakeup      Do without the kernel's hints when to wake it
      --huge-pages          Put the frames on huge pages of 2 MiB, or fail

Packets:
  -s, --size <BYTES>     Bytes of a packet, from its Ethernet header to its end, without the frame
                         check sequence [default: 64]
  -C, --count <PACKETS>  Stop when this many packets are sent
      --dst-mac <MAC>    Destination MAC address [default: 02:00:00:00:00:01]
      --src-mac <MAC>    Source MAC address [default: the interface's own]
      --dst-ip <IP>      Destination IP address, IPv4 or IPv6 [default: 198.18.0.2]
      --src-ip <IP>      Source IP address, of the same version [default: 198.18.0.1]
      --dst-port <PORT>  Destination UDP port [default: 9]
      --src-port <PORT>  Source UDP port [default: 1000]

Output:
  -d, --duration <SECONDS>  Stop after this time [default: at Ctrl-C]
  -n, --interval <SECONDS>  Time between two reports; 0 prints the summary alone [default: 1]
      --json                Print JSON, one object a line; the last one is the summary

"#]]);
}

#[test]
fn help_of_a_forwarder_says_what_becomes_of_packets() {
    xsk(&["l2fwd", "--help"]).assert().success().stderr_eq("").stdout_eq(str![[r#"
Send every packet back out where it came in, or forward between two interfaces

With one interface, every packet goes back out of the queue where it arrived, its source and
destination MAC address swapped. With --out, what arrives at either interface leaves by the other,
byte for byte as it came unless --dst-mac says otherwise; the packets of a queue keep their order.
Packets are sent from the memory that they arrived in.

The network stack doesn't see these packets. An XDP program that sends them here is attached to each
interface for as long as the command runs. A NIC takes in only what is addressed to it, so
forwarding for others needs promiscuous mode: ip link set IF promisc on.

Usage: xsk l2fwd [OPTIONS] --interface <IF>

Options:
  -h, --help
          Print help (see a summary with '-h')

Interface:
  -i, --interface <IF>
          Network interface to use

  -o, --out <IF>
          Forward to this interface, and from it back to --interface

  -q, --queues <LIST>
          Queues to use of each interface: 2, 0-3, 0,2-4 or all; `xsk info IF` tells how many there
          are [default: 0; with --out all]
          
          [alias: --queue]

      --copy
          Have the kernel copy every packet; works everywhere [default: zero copy where possible]

      --zero-copy
          Have the NIC read and write the packets' memory itself, or fail

      --take-all
          Allow an interface that carries the default route or your SSH connection
          
          A command that receives takes what arrives on its queues away from the network stack, and
          one that sends crowds out all others, so such a connection may hang until the command
          ends.

      --native
          Run the XDP program in the driver, or fail [default: there where possible]

      --generic
          Run the XDP program in the network stack; works everywhere, slower

Addresses:
      --rewrite
          Make the interface that a packet leaves by its sender: its MAC address becomes the source
          
          As switches learn where a sender is, this keeps them from learning it wrongly. The
          destination stays, unless --dst-mac or --back-dst-mac gives one.

      --dst-mac <MAC>
          Address packets to this MAC address, and from that of the interface they leave by
          
          As a router does for its next hop. With --out this is for packets that leave there; with
          one interface it takes the place of swapping. Nothing else in a packet is changed.

      --back-dst-mac <MAC>
          The same for packets on their way back, which leave by --interface

Threads:
  -t, --threads <N>
          Threads that share the queues evenly, at most one a queue [default: one a queue, as far as
          there are CPUs]

      --cpus <LIST>
          Pin the threads to these CPUs, one after the other: 2, 0-3, 0,2-4 or all

Rings:
  -b, --batch <PACKETS>
          Packets that are handled at a time, on each queue
          
          [default: 64]

  -f, --frame-size <BYTES>
          Bytes of a frame, which holds one packet: 2048 or 4096
          
          [default: 4096]

      --frames <FRAMES>
          Frames for each queue in the UMEM, the memory that is shared with the kernel [default:
          twice --ring]

      --ring <ENTRIES>
          Entries of each ring, a power of two
          
          [default: 2048]

      --poll
          Sleep while there is nothing to do; otherwise each thread keeps a CPU busy, which is
          faster

      --no-need-wakeup
          Do without the kernel's hints when to wake it

      --huge-pages
          Put the frames on huge pages of 2 MiB, or fail

Output:
  -d, --duration <SECONDS>
          Stop after this time [default: at Ctrl-C]

  -n, --interval <SECONDS>
          Time between two reports; 0 prints the summary alone
          
          [default: 1]

      --json
          Print JSON, one object a line; the last one is the summary

"#]]);
}

#[test]
fn wrong_usage_ends_with_status_2() {
    for (arguments, hint) in [
        (&[][..], "Usage: xsk"),
        (&["rxdrop"], "--interface <IF>"),
        (&["frobnicate"], "unrecognized subcommand"),
        (&["rxdrop", "-i", "lo", "--copy", "--zero-copy"], "cannot be used with"),
        (&["l2fwd", "-i", "lo", "--native", "--generic"], "cannot be used with"),
        (&["rxdrop", "-i", "lo", "-b", "0"], "0 is not in"),
        (&["rxdrop", "-i", "lo", "-d", "0"], "must be more than 0"),
        (&["txonly", "-i", "lo", "--dst-mac", "1:2:3"], "six bytes"),
        (&["txonly", "-i", "lo", "--native"], "unexpected argument"),
        (&["rxdrop", "-i", "lo", "-q", "0,2-x"], "    0,2-x\n        ^ here"),
        (&["txonly", "-i", "lo", "--queue", "3-1"], "a range ends with 3 or more"),
        (&["l2fwd", "-i", "lo", "--cpus", "0;1"], "expected a comma, a dash or the end"),
        (&["rxdrop", "-i", "lo", "--threads", "0"], "0 is not in"),
        (&["l2fwd", "-i", "lo", "--back-dst-mac", "02:00:00:00:00:01"], "--out <IF>"),
        (&["rxdrop", "-i", "lo", "--out", "lo"], "unexpected argument"),
    ] {
        let output = xsk(arguments).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {text}");
        assert!(text.contains(hint), "{arguments:?}: {text}");
    }
}

#[test]
fn a_missing_interface_is_explained_in_words_and_as_json() {
    for arguments in [&["rxdrop", "-i", "no-such-if"][..], &["info", "no-such-if"]] {
        xsk(arguments).assert().code(1).stdout_eq("").stderr_eq(str![[r#"
error: cannot open interface no-such-if: there is no interface no-such-if in this network namespace
   why: Interfaces belong to a network namespace, and this one has no such interface.
    do: [..]
kernel: No such device (os error 19)

"#]]);
        let output = xsk(&[arguments, &["--json"]].concat()).output().unwrap();
        assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(1), &b""[..]));
        let error: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&error["event"], &error["errno"]), (&"error".into(), &19.into()));
    }
}

#[test]
fn info_tells_of_the_machine_and_its_interfaces() {
    let output = xsk(&["info", "--json"]).output().unwrap();
    assert!(output.status.success());
    let info: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(info["page_size"].as_u64().unwrap() >= 4096);
    assert!(info["cpus"].as_u64().unwrap() >= 1);
    let interfaces = info["interfaces"].as_array().unwrap();
    let lo = interfaces.iter().find(|it| it["interface"] == "lo").expect("every namespace has one");
    assert!(lo["mtu"].is_u64() && lo["queues"].is_u64() && lo["programs"].is_array());

    let text = String::from_utf8(xsk(&["info"]).output().unwrap().stdout).unwrap();
    let table: Vec<_> = text.lines().skip_while(|line| !line.starts_with("interface ")).collect();
    assert_eq!(table.len(), 1 + interfaces.len(), "{text}");
    let column = table[0].find("driver").unwrap();
    for line in table {
        assert!(line[column - 2..column] == *"  " && !line[column..].starts_with(' '), "{text}");
    }
}

#[test]
fn every_shell_gets_completions() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let output = xsk(&["completions", shell]).output().unwrap();
        let script = String::from_utf8(output.stdout).unwrap();
        assert!(
            output.status.success() && script.contains("rxdrop") && script.contains("take-all"),
            "{shell}"
        );
    }
}

#[test]
fn man_pages_come_for_all_commands() {
    let page = String::from_utf8(xsk(&["man"]).output().unwrap().stdout).unwrap();
    assert!(page.contains(".TH xsk 1") && page.contains("rxdrop"), "{page}");

    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("man");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir(&dir).unwrap();
    xsk(&["man", "--dir", dir.to_str().unwrap()]).assert().success().stdout_eq("").stderr_eq("");
    for command in ["demo", "rxdrop", "txonly", "l2fwd", "info", "completions", "man"] {
        let page = fs::read_to_string(dir.join(format!("xsk-{command}.1"))).unwrap();
        assert!(page.contains(".SH NAME"), "{page}");
    }
    xsk(&["man", "--dir", "/no/such/directory"]).assert().code(1).stdout_eq("");
}

#[test]
fn colour_is_for_terminals_and_can_be_had() {
    let plain = xsk(&["info", "no-such-if"]).output().unwrap().stderr;
    assert!(!plain.contains(&0x1b));
    let coloured = xsk(&["info", "no-such-if"]).env("CLICOLOR_FORCE", "1").output().unwrap().stderr;
    assert!(coloured.contains(&0x1b));
    let refused =
        xsk(&["info", "no-such-if"]).env("CLICOLOR_FORCE", "1").env("NO_COLOR", "1").output().unwrap();
    assert!(!refused.stderr.contains(&0x1b));
}
