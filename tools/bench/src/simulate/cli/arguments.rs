//! Arguments that several subcommands of `simulate` share, and what they stand for.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use ferry_migrate::protocol::ident::STREAMS_MAX;
use ferry_migrate::protocol::page::Compression;
use ferry_migrate::protocol::source::OnTimeout;
use serde::Serialize;

use crate::report::number::digits;
use crate::simulate::costs::round;
use crate::simulate::guest::{GuestModel, Order, WorkingSet};
use crate::simulate::hardware::{Hardware, HardwareFile};
use crate::simulate::order::{Settings, streams_for};
use crate::simulate::run::Pair;

const MIB: f64 = 1_048_576.0;

/// Where results go, and where parameters come from.
#[derive(Debug, Args)]
pub(super) struct FileArgs {
    /// Parameters from `simulate calibrate --out`; the defaults otherwise
    #[arg(long, value_name = "FILE")]
    hardware: Option<PathBuf>,
    /// Decides all chances
    #[arg(long, default_value_t = 1)]
    pub(super) seed: u64,
    /// Where to write everything that was found
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where to write a page with figures
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

impl FileArgs {
    /// The parameters, with their scatter or without.
    pub(super) fn parameters(&self, scattered: bool) -> anyhow::Result<HardwareFile> {
        let mut file = match &self.hardware {
            Some(path) => HardwareFile::load(path)?,
            None => HardwareFile::default(),
        };
        if !scattered {
            file.hardware = Hardware { jitter: 0.0, page_jitter: 0.0, ..file.hardware };
        }
        Ok(file)
    }

    /// Writes what was asked for.
    pub(super) fn write(&self, found: &impl Serialize, page: impl FnOnce() -> String) -> anyhow::Result<()> {
        if let Some(path) = &self.json {
            write_json(path, found)?;
        }
        if let Some(path) = &self.html {
            std::fs::write(path, page()).with_context(|| format!("can't write {}", path.display()))?;
            println!("{}", path.display());
        }
        Ok(())
    }
}

/// Writes a value as JSON and says where.
pub(super) fn write_json(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    std::fs::write(path, text + "\n").with_context(|| format!("can't write {}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}

/// The guest.
#[derive(Debug, Args)]
pub(super) struct GuestArgs {
    /// Its memory
    #[arg(long, default_value_t = 16.0)]
    memory_gib: f64,
    /// Its vCPUs
    #[arg(long, default_value_t = 4)]
    cpus: u16,
    /// Memory that it writes to while it runs, as MIB_PER_S:MIB[:linear|shuffled|uniform]; may be given several times
    #[arg(long = "set", value_name = "RATE:SIZE", default_values = ["100:1024"])]
    sets: Vec<SetArg>,
    /// The part of the rest that was never touched
    #[arg(long, default_value_t = 0.0)]
    untouched_percent: f64,
    /// The part of the rest that is zero and scattered among other pages
    #[arg(long, default_value_t = 0.0)]
    zero_percent: f64,
    /// The part of the rest that lz4 shrinks
    #[arg(long, default_value_t = 0.0)]
    packable_percent: f64,
}

/// A working set on the command line.
#[derive(Debug, Clone, Copy, PartialEq)]
struct SetArg {
    mib_per_s: f64,
    mib: f64,
    order: Order,
}

impl FromStr for SetArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| {
            let parsed: Option<f64> = text.parse().ok();
            parsed.filter(|number| number.is_finite() && *number >= 0.0)
        };
        let parts: Vec<&str> = text.split(':').collect();
        let [rate, size, order @ ..] = parts.as_slice() else {
            return Err("give MIB_PER_S:MIB, for example 100:1024".to_owned());
        };
        let order = match order {
            [] | ["uniform"] => Order::Uniform,
            ["linear"] => Order::Linear,
            ["shuffled"] => Order::Shuffled,
            _ => return Err("the order is linear, shuffled or uniform".to_owned()),
        };
        let mib_per_s = number(rate).ok_or("the rate is a number of MiB a second")?;
        let mib = number(size).ok_or("the size is a number of MiB")?;
        Ok(Self { mib_per_s, mib, order })
    }
}

impl GuestArgs {
    /// The guest, with what it is in words.
    pub(super) fn guest(&self) -> anyhow::Result<(GuestModel, Vec<(String, String)>)> {
        let set = |set: &SetArg| WorkingSet {
            bytes: round(set.mib * MIB),
            pages_per_s: set.mib_per_s * 256.0,
            order: set.order,
            packable_share: 0.0,
        };
        let guest = GuestModel {
            memory_bytes: round(self.memory_gib * 1024.0 * MIB),
            cpus: self.cpus,
            untouched_share: self.untouched_percent / 100.0,
            zero_share: self.zero_percent / 100.0,
            packable_share: self.packable_percent / 100.0,
            sets: self.sets.iter().map(set).collect(),
        };
        guest.layout(guest.page_scale())?;
        let work = self.sets.iter().map(|set| {
            format!("{} MiB/s over {} MiB ({:?})", digits(set.mib_per_s), digits(set.mib), set.order)
        });
        let facts = vec![
            ("guest".to_owned(), format!("{} GiB, {} vCPUs", digits(self.memory_gib), self.cpus)),
            ("it writes".to_owned(), work.collect::<Vec<_>>().join(", ")),
            (
                "the rest".to_owned(),
                format!(
                    "{} % never touched, {} % zero, {} % that lz4 shrinks",
                    digits(self.untouched_percent),
                    digits(self.zero_percent),
                    digits(self.packable_percent)
                ),
            ),
        ];
        Ok((guest, facts))
    }
}

/// What lies between the hosts.
#[derive(Debug, Args)]
pub(super) struct LinkArgs {
    /// The link's rate
    #[arg(long, default_value_t = 10.0)]
    link_gbit_s: f64,
    /// How long a packet takes, one way
    #[arg(long, default_value_t = 0.05)]
    latency_ms: f64,
    /// How much longer it takes where the link is full
    #[arg(long, default_value_t = 1.0)]
    queue_ms: f64,
    /// Processors of each host that the migration may use
    #[arg(long, default_value_t = 16.0)]
    cores: f64,
}

impl LinkArgs {
    /// The hosts and their link, with what they are in words.
    pub(super) fn pair(&self) -> anyhow::Result<(Pair, (String, String))> {
        for (name, value) in [("link-gbit-s", self.link_gbit_s), ("cores", self.cores)] {
            ensure!(value.is_finite() && value > 0.0, "--{name} {value}: give a number above zero");
        }
        let pair = Pair {
            link_bytes_per_s: self.link_gbit_s * 1e9 / 8.0,
            latency: milliseconds("latency-ms", self.latency_ms)?,
            queue: milliseconds("queue-ms", self.queue_ms)?,
            cores: self.cores,
            one_machine: false,
            switched: false,
            page_scale: None,
        };
        let words = format!(
            "{} Gbit/s, {} ms one way, {} ms more where it is full",
            digits(self.link_gbit_s),
            digits(self.latency_ms),
            digits(self.queue_ms)
        );
        Ok((pair, ("link".to_owned(), words)))
    }
}

fn milliseconds(name: &str, value: f64) -> anyhow::Result<Duration> {
    Duration::try_from_secs_f64(value / 1e3).with_context(|| format!("--{name} {value}: give milliseconds"))
}

/// What is done once the time is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum OnTimeoutArg {
    /// The guest goes on at the source
    Cancel,
    /// It is stopped whatever the downtime
    Stop,
}

/// What is asked of the engine.
#[derive(Debug, Args)]
pub(super) struct SettingsArgs {
    /// The downtime that is allowed
    #[arg(long, default_value_t = 300.0)]
    downtime_ms: f64,
    /// How long it may take until the guest is stopped
    #[arg(long, default_value_t = 3600.0)]
    timeout_s: f64,
    /// What happens then
    #[arg(long, value_enum, default_value_t = OnTimeoutArg::Cancel)]
    on_timeout: OnTimeoutArg,
    /// Data streams; as many as fill the link if not given
    #[arg(long)]
    streams: Option<u16>,
    /// Pack pages with lz4
    #[arg(long)]
    lz4: bool,
    /// The most that is sent while the guest runs
    #[arg(long)]
    bandwidth_gbit_s: Option<f64>,
}

impl SettingsArgs {
    /// The settings for hosts like `pair`, with what they are in words.
    pub(super) fn settings(
        &self,
        pair: &Pair,
        hardware: &Hardware,
    ) -> anyhow::Result<(Settings, (String, String))> {
        let streams = self.streams.unwrap_or_else(|| streams_for(pair, hardware));
        if !(1..=STREAMS_MAX).contains(&streams) {
            bail!("--streams {streams}: give 1 to {STREAMS_MAX}");
        }
        let timeout = Duration::try_from_secs_f64(self.timeout_s);
        let settings = Settings {
            downtime_budget: milliseconds("downtime-ms", self.downtime_ms)?,
            timeout: timeout.with_context(|| format!("--timeout-s {}: give seconds", self.timeout_s))?,
            on_timeout: match self.on_timeout {
                OnTimeoutArg::Cancel => OnTimeout::Cancel,
                OnTimeoutArg::Stop => OnTimeout::Stop,
            },
            streams,
            compression: if self.lz4 { Compression::Lz4 } else { Compression::None },
            bandwidth_bytes_per_s: self.bandwidth_gbit_s.map(|gbit_s| gbit_s * 1e9 / 8.0),
        };
        let words = format!(
            "budget {} ms, {streams} streams{}, timeout {} s",
            digits(self.downtime_ms),
            if self.lz4 { ", lz4" } else { "" },
            digits(self.timeout_s)
        );
        Ok((settings, ("asked for".to_owned(), words)))
    }

    /// The downtime that is allowed, in ms.
    pub(super) const fn budget_ms(&self) -> f64 {
        self.downtime_ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_read_and_refused_by_name() {
        let set: SetArg = "100:1024:linear".parse().unwrap();
        assert_eq!(set, SetArg { mib_per_s: 100.0, mib: 1024.0, order: Order::Linear });
        assert_eq!("1.5:8".parse::<SetArg>().unwrap().order, Order::Uniform);
        for (text, word) in
            [("100", "MIB"), ("x:1", "rate"), ("1:-2", "size"), ("1:2:up", "order"), ("1:inf", "size")]
        {
            let error = text.parse::<SetArg>().unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
