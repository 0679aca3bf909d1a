//! The command line as clap reads it, and the small languages inside some of its values.

mod cert;
mod disk;
mod security;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use ferry_migrate::protocol::VmName;
use ferry_migrate::protocol::ident::STREAMS_MAX;
use ferry_migrate::protocol::page::Compression;
use ferry_migrate::{ListenAddress, WitnessAddress};
use ferry_vmm::confine::Seccomp;
use ferry_vmm::{Backing, CpuProfile, HugePages, MemoryChoices, MemoryConfig, SerialTarget};

use crate::cpu_profile::cpu_profile;
use crate::quantity;
pub(crate) use cert::{CertCommand, CertInitArgs, CertIssueArgs, CertShowArgs};
pub(crate) use disk::DiskArg;
pub(crate) use security::{SecurityArgs, TlsArgs};

/// ferry moves a running virtual machine from one host to another, and proves that it did.
#[derive(Debug, Parser)]
#[command(name = "ferry", version, propagate_version = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a VM and stay with it until it stops or has moved away
    Run(RunArgs),
    /// Wait for one VM to migrate here and become its host
    Receive(ReceiveArgs),
    /// Migrate a VM to a host where 'ferry receive' waits
    Migrate(MigrateArgs),
    /// Change the bandwidth of a migration under way
    Bandwidth(BandwidthArgs),
    /// List the VMs of this host
    List(Output),
    /// Attach this terminal to a VM's serial console; Ctrl-] detaches
    Console(ConsoleArgs),
    /// Decide what becomes of a VM whose handover is in doubt
    Resolve(ResolveArgs),
    /// Show all that is known of a VM
    Info(NameArgs),
    /// Pause a VM
    Pause(NameArgs),
    /// Resume a paused VM
    Resume(NameArgs),
    /// Press a VM's power button: its guest shuts down in its own time
    Shutdown(NameArgs),
    /// Stop a VM at once, or a waiting 'ferry receive'
    Stop(NameArgs),
    /// Make an authority and certificates, so that only hosts of your own migrate to each other
    #[command(subcommand)]
    Cert(CertCommand),
    /// Show a live migration from start to end: two hosts, a loaded web server, one command
    Demo(DemoArgs),
    /// Measure ferry and its peers on this machine, side by side; the same as ferry-bench
    Bench {
        #[command(subcommand)]
        task: Box<ferry_bench::cli::Task>,
    },
}

#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Output {
    /// Print JSON for scripts
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct NameArgs {
    /// The VM's name
    pub(crate) name: VmName,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("decision").required(true).args(["resume", "discard"])))]
pub(crate) struct ResolveArgs {
    /// The VM's name
    pub(crate) name: VmName,
    /// The VM goes on here. If its target runs it, or ever comes to run it, there are two of it
    #[arg(long)]
    pub(crate) resume: bool,
    /// With --resume: don't ask the witness, which is lost for good. If it comes back and has not decided yet, it may give the
    /// target leave to run the VM too
    #[arg(long, requires = "resume")]
    pub(crate) without_witness: bool,
    /// The VM is its target's, and this host lets go of it. If the target does not run it, it is lost
    #[arg(long)]
    pub(crate) discard: bool,
    /// Don't ask
    #[arg(long)]
    pub(crate) yes: bool,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct ConsoleArgs {
    /// The VM's name
    pub(crate) name: VmName,
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("boot").required(true).args(["kernel", "guest"])))]
pub(crate) struct RunArgs {
    /// The VM's name on this host
    #[arg(long)]
    pub(crate) name: VmName,
    /// Kernel to boot: a bzImage, or a 64-bit ELF such as vmlinux (entered by PVH where it has the note)
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Boot the built-in workload guest: 'idle', 'dirty rate=500 set=256', 'fill mib=512 zero=25 text=50',
    /// 'http ip=10.0.0.2/24'
    #[arg(long, value_name = "MODE KEY=VALUE ...")]
    pub(crate) guest: Option<String>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE", conflicts_with = "guest")]
    pub(crate) initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "STR", default_value = "")]
    pub(crate) cmdline: String,
    /// Tell the kernel of processors, devices and the power button by ACPI; with 'off', virtio devices are appended to
    /// the command line instead, for a kernel built without ACPI
    #[arg(long, value_enum, default_value_t = SwitchArg::On, value_name = "on|off", conflicts_with = "guest")]
    pub(crate) acpi: SwitchArg,
    /// Guest memory: '1G', or 'size=1G' with any of shared=on (a memfd), hugepages=off (4 KiB pages only),
    /// hugepages=2M (from the host's pool), node=N (from one NUMA node)
    #[arg(long, default_value = "1G", value_parser = memory, value_name = "SIZE|size=SIZE[,..]")]
    pub(crate) memory: MemoryConfig,
    /// Number of vCPUs
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..))]
    pub(crate) cpus: u8,
    /// The processor that the guest is shown: all of the host's, or what every host has that the VM may move to
    #[arg(long, default_value = "host", value_parser = cpu_profile, value_name = "host|x86-64-v2|x86-64-v3|FILE")]
    pub(crate) cpu: CpuProfile,
    /// How the guest's clocks go on when it has moved: by the time that passed, or from where they were
    #[arg(long, value_enum, default_value_t = ClockArg::Realtime)]
    pub(crate) clock: ClockArg,
    /// Network interface: its tap, and optionally its MAC address and any number of IP addresses to announce
    #[arg(long, value_parser = net, value_name = "tap=IF[,mac=..][,ip=..]")]
    pub(crate) net: Option<NetArg>,
    /// A disk, as often as there are any: a raw image or a block device; 'ro' lets the guest only read it, 'serial' is what
    /// the guest is told, 'lock=off' leaves it to you that nobody else uses it
    #[arg(long = "disk", value_parser = disk::of_new, value_name = "path=FILE[,ro][,serial=ID][,lock=off]")]
    pub(crate) disks: Vec<DiskArg>,
    /// Whether the VM has a device that gives it random numbers
    #[arg(long, value_enum, default_value_t = SwitchArg::Off, value_name = "on|off")]
    pub(crate) rng: SwitchArg,
    /// Where the serial console goes
    #[arg(long, default_value = "stdio", value_parser = serial, value_name = "stdio|pty|socket=PATH|file=PATH|null")]
    pub(crate) serial: SerialTarget,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
    /// What becomes of system calls that the VM's host process has no use for: 'on' refuses and counts them ('ferry info'), 'log' carries
    /// them out and has the kernel log them
    #[arg(long, value_enum, default_value_t = SeccompArg::On, value_name = "on|log|off")]
    pub(crate) seccomp: SeccompArg,
    /// Who decides about a handover that is in doubt: a folder on storage that all hosts of the VM share, or an etcd cluster. The
    /// VM's other hosts must be told the same
    #[arg(long, default_value_t = WitnessAddress::None, value_name = "none|file:/FOLDER|etcd:http://HOST:PORT[,..]")]
    pub(crate) witness: WitnessAddress,
    /// End at once when standard input closes: for whoever starts this process and must not leave it behind
    #[arg(long, hide = true)]
    pub(crate) exit_with_stdin: bool,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct ReceiveArgs {
    /// The VM's name on this host
    #[arg(long)]
    pub(crate) name: VmName,
    /// Address to listen on; unix:/PATH for a VM of this host, whose memory is then handed over instead of copied
    #[arg(long, value_name = "ADDR:PORT|unix:PATH")]
    pub(crate) listen: ListenAddress,
    /// The tap for the VM's network interface
    #[arg(long, value_parser = net, value_name = "tap=IF")]
    pub(crate) net: Option<NetArg>,
    /// Where the VM's disks are here, one for each in its order, if not where they are at the source; 'ro' or 'rw' if it must
    /// be so, 'lock=off' for storage that does not carry locks between hosts
    #[arg(long = "disk", value_parser = disk::of_taken_over, value_name = "path=FILE[,ro|rw][,lock=off]")]
    pub(crate) disks: Vec<DiskArg>,
    /// What holds the VM's memory here, instead of what did at the source: any of shared=on|off, hugepages=on|off|2M,
    /// node=N. By default the pool's 2M pages are taken where the source had them and this host has enough
    #[arg(long, value_parser = memory_choices, value_name = "KEY=VALUE[,..]")]
    pub(crate) memory: Option<MemoryChoices>,
    /// What this host offers of its processor at most: VMs that were shown more are refused
    #[arg(long, default_value = "host", value_parser = cpu_profile, value_name = "host|x86-64-v2|x86-64-v3|FILE")]
    pub(crate) cpu: CpuProfile,
    /// Where the serial console goes
    #[arg(long, default_value = "null", value_parser = serial, value_name = "stdio|pty|socket=PATH|file=PATH|null")]
    pub(crate) serial: SerialTarget,
    #[command(flatten)]
    pub(crate) security: SecurityArgs,
    /// What becomes of system calls that the VM's host process has no use for: 'on' refuses and counts them ('ferry info'), 'log' carries
    /// them out and has the kernel log them
    #[arg(long, value_enum, default_value_t = SeccompArg::On, value_name = "on|log|off")]
    pub(crate) seccomp: SeccompArg,
    /// Who decides about a handover that is in doubt: a folder on storage that all hosts of the VM share, or an etcd cluster. The
    /// VM's other hosts must be told the same
    #[arg(long, default_value_t = WitnessAddress::None, value_name = "none|file:/FOLDER|etcd:http://HOST:PORT[,..]")]
    pub(crate) witness: WitnessAddress,
    /// End at once when standard input closes: for whoever starts this process and must not leave it behind
    #[arg(long, hide = true)]
    pub(crate) exit_with_stdin: bool,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// How many data streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamsArg {
    /// As many as make it faster.
    Auto,
    /// So many.
    Fixed(u16),
}

fn streams(text: &str) -> Result<StreamsArg, String> {
    if text == "auto" {
        return Ok(StreamsArg::Auto);
    }
    let count = text.parse().ok().filter(|count| (1..=STREAMS_MAX).contains(count));
    count.map(StreamsArg::Fixed).ok_or_else(|| format!("give auto, or a number from 1 to {STREAMS_MAX}"))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ClockArg {
    /// By the time that passed
    Realtime,
    /// From where they were
    Monotonic,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SwitchArg {
    /// It is done
    On,
    /// It is left out
    Off,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SeccompArg {
    /// They are refused and counted
    On,
    /// They are carried out, and the kernel logs them
    Log,
    /// There is no filter
    Off,
}

impl From<SeccompArg> for Seccomp {
    fn from(arg: SeccompArg) -> Self {
        match arg {
            SeccompArg::On => Self::On,
            SeccompArg::Log => Self::Log,
            SeccompArg::Off => Self::Off,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum VerifyArg {
    /// Compare digests of what was sent and of what arrived
    On,
    /// Compare nothing
    Off,
    /// Read all of memory once more while the VM stands still, too
    Full,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnTimeoutArg {
    /// Give up; the VM goes on here
    Cancel,
    /// Stop the VM whatever the downtime
    Stop,
}

#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// The VM's name
    pub(crate) name: VmName,
    /// Where 'ferry receive' listens; unix:/PATH on this host
    #[arg(long, value_name = "ADDR:PORT|unix:PATH", required_unless_present = "cancel")]
    pub(crate) to: Option<String>,
    /// Cancel the migration under way instead of starting one
    #[arg(long, conflicts_with = "to")]
    pub(crate) cancel: bool,
    /// The downtime that is allowed
    #[arg(long, default_value = "50ms", value_parser = quantity::duration)]
    pub(crate) downtime: Duration,
    /// Number of parallel data streams: 'auto' uses as many as make it faster
    #[arg(long, default_value = "auto", value_name = "auto|N", value_parser = streams)]
    pub(crate) streams: StreamsArg,
    /// How pages are packed: 'auto' goes by the link and by the processor's time
    #[arg(long, default_value_t = Compression::Auto, value_name = "auto|none|lz4|zstd[:LEVEL]")]
    pub(crate) compress: Compression,
    /// The most to send while the VM runs, like 100M/s or 1Gbit/s
    #[arg(long, value_name = "RATE", value_parser = quantity::bytes_per_s)]
    pub(crate) bandwidth: Option<u64>,
    /// Compare digests of memory before the VM resumes; 'full' also reads all of it once more while the VM stands still;
    /// 'off' only shows what that costs
    #[arg(long, value_enum, default_value_t = VerifyArg::On, value_name = "on|off|full")]
    pub(crate) verify: VerifyArg,
    /// How long to try to reach the target again each time that the link breaks, before giving up; 0s for not at all
    #[arg(long, default_value = "30s", value_parser = quantity::duration)]
    pub(crate) reconnect: Duration,
    /// How long it may take until the VM is stopped
    #[arg(long, default_value = "5m", value_parser = quantity::duration)]
    pub(crate) timeout: Duration,
    /// What to do when that time is over
    #[arg(long, value_enum, default_value_t = OnTimeoutArg::Cancel)]
    pub(crate) on_timeout: OnTimeoutArg,
    #[command(flatten)]
    pub(crate) security: SecurityArgs,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Debug, Args)]
pub(crate) struct BandwidthArgs {
    /// The VM's name
    pub(crate) name: VmName,
    /// The most to send while the VM runs, like 100M/s or 1Gbit/s, or 'off'
    #[arg(value_name = "RATE|off", value_parser = rate_or_off)]
    pub(crate) rate: RateArg,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// A rate, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RateArg(pub(crate) Option<u64>);

fn rate_or_off(text: &str) -> Result<RateArg, String> {
    if text == "off" {
        Ok(RateArg(None))
    } else {
        quantity::bytes_per_s(text).map(|rate| RateArg(Some(rate)))
    }
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Write the result as JSON to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Write the plot to this file
    #[arg(long, value_name = "FILE", default_value = "ferry-demo.html")]
    pub(crate) plot: PathBuf,
    /// The downtime that is allowed
    #[arg(long, default_value = "50ms", value_parser = quantity::duration)]
    pub(crate) downtime: Duration,
    /// Skip the network even as root
    #[arg(long)]
    pub(crate) no_network: bool,
}

/// `--net`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NetArg {
    pub(crate) tap: String,
    pub(crate) mac: Option<[u8; 6]>,
    pub(crate) ips: Vec<IpAddr>,
}

/// What both sides of `--memory` can say.
const MEMORY_WORDS: &str = "shared=on|off, hugepages=on|off|2M, node=N";

fn memory(text: &str) -> Result<MemoryConfig, String> {
    if !text.contains('=') {
        return Ok(MemoryConfig::new(quantity::bytes(text)?, Backing::PrivateAnonymous));
    }
    let (mut size_bytes, mut choices) = (None, MemoryChoices::default());
    for word in text.split(',') {
        match word.split_once('=') {
            Some(("size", size)) => size_bytes = Some(quantity::bytes(size)?),
            _ if memory_choice(word, &mut choices)? => {}
            _ => return Err(format!("'{word}' is not known here; write size=1G, {MEMORY_WORDS}")),
        }
    }
    let MemoryChoices { backing, huge_pages, node } = choices;
    let mut config = MemoryConfig::new(
        size_bytes.ok_or("size=.. is missing")?,
        backing.unwrap_or(Backing::PrivateAnonymous),
    );
    config.huge_pages = huge_pages.unwrap_or(config.huge_pages);
    config.node = node;
    Ok(config)
}

fn memory_choices(text: &str) -> Result<MemoryChoices, String> {
    let mut choices = MemoryChoices::default();
    for word in text.split(',') {
        if !memory_choice(word, &mut choices)? {
            return Err(format!("'{word}' is not known here; write {MEMORY_WORDS}"));
        }
    }
    Ok(choices)
}

/// Takes in one word, if it is known.
fn memory_choice(word: &str, choices: &mut MemoryChoices) -> Result<bool, String> {
    match word.split_once('=') {
        Some(("shared", "on")) => choices.backing = Some(Backing::SharedMemfd),
        Some(("shared", "off")) => choices.backing = Some(Backing::PrivateAnonymous),
        Some(("hugepages", "on")) => choices.huge_pages = Some(HugePages::Transparent),
        Some(("hugepages", "off")) => choices.huge_pages = Some(HugePages::Off),
        Some(("hugepages", "2M")) => choices.huge_pages = Some(HugePages::Pool),
        Some(("node", number)) => {
            let bad = |_| format!("'{number}' is not the number of a NUMA node");
            choices.node = Some(number.parse().map_err(bad)?);
        }
        _ => return Ok(false),
    }
    Ok(true)
}

fn net(text: &str) -> Result<NetArg, String> {
    let (mut tap, mut mac, mut ips) = (None, None, Vec::new());
    for word in text.split(',') {
        match word.split_once('=') {
            Some(("tap", name)) => tap = Some(name.to_owned()),
            Some(("mac", text)) => mac = Some(mac_address(text)?),
            Some(("ip", text)) => {
                ips.push(text.parse().map_err(|_| format!("'{text}' is not an IP address"))?);
            }
            _ => return Err(format!("'{word}' is not known here; write tap=IF[,mac=..][,ip=..]")),
        }
    }
    let tap = tap.ok_or("tap=IF is missing")?;
    Ok(NetArg { tap, mac, ips })
}

fn mac_address(text: &str) -> Result<[u8; 6], String> {
    let bad = || format!("'{text}' is not a MAC address like 02:00:00:00:00:01");
    let bytes: Vec<u8> = text
        .split(':')
        .map(|part| u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2))
        .collect::<Option<_>>()
        .ok_or_else(bad)?;
    let mac: [u8; 6] = bytes.try_into().map_err(|_| bad())?;
    if mac[0] & 1 == 1 {
        return Err(format!("'{text}' is a multicast address; an interface's first byte is even"));
    }
    Ok(mac)
}

fn serial(text: &str) -> Result<SerialTarget, String> {
    match text.split_once('=') {
        None if text == "stdio" => Ok(SerialTarget::Stdio),
        None if text == "null" => Ok(SerialTarget::Null),
        None if text == "pty" => Ok(SerialTarget::Pty),
        Some(("socket", path)) if !path.is_empty() => Ok(SerialTarget::Socket(path.into())),
        Some(("file", path)) if !path.is_empty() => Ok(SerialTarget::File(path.into())),
        _ => Err(format!("'{text}' is not one of stdio, pty, socket=PATH, file=PATH, null")),
    }
}

/// The serial port of a process whose standard input may be there for something else.
pub(crate) fn serial_target(serial: &SerialTarget, stdin_is_taken: bool) -> SerialTarget {
    if stdin_is_taken && *serial == SerialTarget::Stdio { SerialTarget::Stdout } else { serial.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn a_serial_port_goes_to_one_of_five_places() {
        assert_eq!(serial("pty"), Ok(SerialTarget::Pty));
        assert_eq!(serial("socket=/run/x"), Ok(SerialTarget::Socket("/run/x".into())));
        assert_eq!(serial("file=x"), Ok(SerialTarget::File("x".into())));
        for bad in ["socket=", "socket", "tty", "pty=1"] {
            assert!(serial(bad).unwrap_err().contains("socket=PATH"), "{bad}");
        }
        assert_eq!(serial_target(&SerialTarget::Stdio, true), SerialTarget::Stdout);
        assert_eq!(serial_target(&SerialTarget::Stdio, false), SerialTarget::Stdio);
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn memory_is_a_size_or_words() {
        assert_eq!(memory("1G").unwrap().size_bytes, 1 << 30);
        assert_eq!(memory("size=2G,shared=on").unwrap().backing, Backing::SharedMemfd);
        assert!(memory("shared=on").unwrap_err().contains("size"));
        assert!(memory("size=1G,huge=on").unwrap_err().contains("huge=on"));
        let all = memory("size=4G,hugepages=2M,node=1,shared=off").unwrap();
        assert_eq!((all.huge_pages, all.node), (HugePages::Pool, Some(1)));
        assert_eq!(memory("1G").unwrap().huge_pages, HugePages::Transparent);
        assert_eq!(memory("size=1G,hugepages=off").unwrap().huge_pages, HugePages::Off);
        assert!(memory("size=1G,node=x").unwrap_err().contains("'x'"));
        assert!(memory("size=1G,hugepages=1G").unwrap_err().contains("hugepages=on|off|2M"));
    }

    #[test]
    fn a_target_chooses_all_but_the_size() {
        let choices = memory_choices("node=2,hugepages=on").unwrap();
        let expected =
            MemoryChoices { backing: None, huge_pages: Some(HugePages::Transparent), node: Some(2) };
        assert_eq!(choices, expected);
        assert!(memory_choices("size=1G").unwrap_err().contains("size=1G"));
    }

    #[test]
    fn a_network_names_its_tap() {
        let arg = net("tap=tap0,mac=02:fe:00:00:00:01,ip=10.0.0.2,ip=fe80::1").unwrap();
        assert_eq!((arg.tap.as_str(), arg.mac, arg.ips.len()), ("tap0", Some([2, 0xfe, 0, 0, 0, 1]), 2));
        for bad in ["mac=02:00:00:00:00:01", "tap=t,mac=1", "tap=t,mac=01:00:00:00:00:01", "tap=t,ip=x", "t"]
        {
            assert!(net(bad).is_err(), "{bad}");
        }
    }
}
