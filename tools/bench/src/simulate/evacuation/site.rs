//! Sites as TOML: hosts, links, limits, the plan, and kinds of VMs with the distributions that their sizes and rates are
//! drawn from. The sites that come along lie in `sites/`; they are also the documentation of the format.
//!
//! Not here: what is drawn from it (`fleet.rs`).

use std::num::NonZeroUsize;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// The sites that come along, by name.
pub const BUILT_IN: [(&str, &str); 2] =
    [("rack", include_str!("sites/rack.toml")), ("site", include_str!("sites/site.toml"))];

/// The most VMs of a site.
pub const VMS_MAX: u32 = 50_000;

/// What is evacuated to where.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Site {
    /// One line for a heading.
    pub title: String,
    /// A sentence on what it is.
    pub summary: String,
    /// Decides what is drawn.
    pub seed: u64,
    /// The hosts that are emptied.
    pub source: Racks,
    /// The hosts that take VMs in.
    pub target: Racks,
    /// What lies between them.
    pub between: Between,
    /// What every host is like.
    pub host: Host,
    /// In which order, and what is asked for.
    pub plan: Plan,
    /// The kinds of VMs.
    pub vms: Vec<VmKind>,
}

/// Racks of hosts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Racks {
    /// How many.
    pub racks: u32,
    /// Hosts in each.
    pub hosts_per_rack: u32,
    /// Each host's link, in Gbit/s each way.
    pub host_gbit_s: f64,
    /// Each rack's link, in Gbit/s each way.
    pub uplink_gbit_s: f64,
    /// How much of each host's memory is taken at the beginning, beside the VMs that are evacuated.
    #[serde(default)]
    pub used_percent: f64,
}

impl Racks {
    /// How many hosts there are.
    #[must_use]
    pub const fn hosts(&self) -> u32 {
        self.racks.saturating_mul(self.hosts_per_rack)
    }
}

/// What lies between racks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Between {
    /// A link that everything passes through, in Gbit/s each way; none if racks see each other at their own rate.
    pub gbit_s: Option<f64>,
    /// How long a packet takes, one way, in ms.
    pub latency_ms: f64,
    /// How much longer where a link is full, in ms.
    pub queue_ms: f64,
}

/// What every host is like.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Its memory for VMs.
    pub memory_gib: f64,
    /// Its processors for migrations, beside those of its VMs.
    pub cores: f64,
    /// The most migrations away from it at a time.
    pub out_max: u32,
    /// The most migrations to it at a time.
    pub in_max: u32,
}

/// Which VM goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PlanOrder {
    /// Those with the least memory.
    SmallestFirst,
    /// Those with the most memory.
    LargestFirst,
    /// Those that write least.
    QuietestFirst,
    /// By chance.
    Shuffled,
}

/// In which order, and what is asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Which VM of a host goes first.
    pub order: PlanOrder,
    /// Data streams of each migration.
    pub streams: u16,
    /// The most migrations at a time in all; only each host's limits if not given.
    pub at_once_max: Option<NonZeroUsize>,
    /// Whether pages are packed with lz4.
    #[serde(default)]
    pub lz4: bool,
    /// What is asked for at first, and what again for VMs that stayed, behind all others.
    pub attempts: Vec<Attempt>,
}

/// What one attempt may take.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attempt {
    /// The downtime that is allowed.
    pub downtime_ms: f64,
    /// How long it may take until the guest is stopped.
    pub timeout_s: f64,
    /// What happens then.
    #[serde(default)]
    pub on_timeout: Then,
}

/// What happens once the time is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Then {
    /// The VM goes on at the source.
    #[default]
    Cancel,
    /// It is stopped whatever the downtime.
    Stop,
}

/// VMs that are alike.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmKind {
    /// Its name.
    pub name: String,
    /// How many each source host has.
    pub per_host: u32,
    /// Their memory.
    pub memory_gib: Spread,
    /// How much memory they have for each vCPU.
    pub gib_per_cpu: f64,
    /// The part of their memory that was never touched.
    pub untouched_percent: f64,
    /// The part that is zero and scattered.
    pub zero_percent: f64,
    /// The part that lz4 shrinks.
    #[serde(default)]
    pub packable_percent: f64,
    /// What they write to often.
    pub hot: Written,
    /// What they write to now and then.
    pub cold: Written,
}

/// Memory that is written to, each page as likely as any.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Written {
    /// Its part of the VM's memory.
    pub percent: f64,
    /// How long it takes to write as many pages as it has, in s.
    pub rewritten_every_s: Spread,
}

/// A log-normal distribution, cut at both ends.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spread {
    /// Half are below.
    pub median: f64,
    /// The standard deviation of the logarithm.
    pub sigma: f64,
    /// None is below.
    pub min: f64,
    /// None is above.
    pub max: f64,
}

/// Why a site can't be had.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// The file can't be read.
    #[error("there is no site '{name}': it is neither one that comes along ({built_in}) nor a file")]
    Missing {
        /// What was asked for.
        name: String,
        /// The names that come along.
        built_in: String,
        /// What the file system said.
        #[source]
        source: std::io::Error,
    },
    /// It is no TOML, or has keys that do not belong there.
    #[error("site '{name}' can't be read: {what}")]
    Toml {
        /// The site.
        name: String,
        /// Where and why.
        what: String,
    },
    /// Something in it can't be.
    #[error("site '{name}': {what}")]
    Wrong {
        /// The site.
        name: String,
        /// What is wrong and what would be right.
        what: String,
    },
}

/// The site that comes along as `name`, or that of the file of that name.
///
/// # Errors
/// [`SiteError`], naming the place.
pub fn load(name: &str) -> Result<Site, SiteError> {
    if let Some((name, text)) = BUILT_IN.iter().find(|(known, _)| *known == name) {
        return parse(name, text);
    }
    let text = std::fs::read_to_string(Path::new(name)).map_err(|source| SiteError::Missing {
        name: name.to_owned(),
        built_in: BUILT_IN.map(|(name, _)| name).join(", "),
        source,
    })?;
    parse(name, &text)
}

/// Parses the site `name`.
///
/// # Errors
/// [`SiteError`], naming the place.
pub fn parse(name: &str, text: &str) -> Result<Site, SiteError> {
    let site: Site = toml::from_str(text)
        .map_err(|error| SiteError::Toml { name: name.to_owned(), what: error.to_string() })?;
    check(&site).map_err(|what| SiteError::Wrong { name: name.to_owned(), what })?;
    Ok(site)
}

fn check(site: &Site) -> Result<(), String> {
    let vms = site.vms.iter().fold(0u32, |sum, kind| sum.saturating_add(kind.per_host));
    let vms = vms.saturating_mul(site.source.hosts());
    if vms == 0 || vms > VMS_MAX {
        return Err(format!("it has {vms} VMs; give 1 to {VMS_MAX}"));
    }
    if site.target.hosts() == 0 || site.target.hosts() > VMS_MAX {
        return Err(format!("target: {} hosts; give 1 to {VMS_MAX}", site.target.hosts()));
    }
    if site.host.out_max == 0 || site.host.in_max == 0 {
        return Err("host: out_max and in_max must be above zero".to_owned());
    }
    if !(1..=ferry_migrate::protocol::ident::STREAMS_MAX).contains(&site.plan.streams) {
        return Err(format!("plan: {} streams", site.plan.streams));
    }
    if site.plan.attempts.is_empty() {
        return Err("plan: give one attempt at least".to_owned());
    }
    let mut positive = vec![
        ("source.host_gbit_s", site.source.host_gbit_s),
        ("source.uplink_gbit_s", site.source.uplink_gbit_s),
        ("target.host_gbit_s", site.target.host_gbit_s),
        ("target.uplink_gbit_s", site.target.uplink_gbit_s),
        ("between.gbit_s", site.between.gbit_s.unwrap_or(1.0)),
        ("host.memory_gib", site.host.memory_gib),
        ("host.cores", site.host.cores),
    ];
    for attempt in &site.plan.attempts {
        positive.push(("plan.attempts.downtime_ms", attempt.downtime_ms));
        positive.push(("plan.attempts.timeout_s", attempt.timeout_s));
    }
    positive.extend(site.vms.iter().map(|kind| ("vms.gib_per_cpu", kind.gib_per_cpu)));
    if let Some((key, value)) = positive.iter().find(|(_, value)| !(value.is_finite() && *value > 0.0)) {
        return Err(format!("{key} = {value}: give a number above zero"));
    }
    for (key, value) in
        [("between.latency_ms", site.between.latency_ms), ("between.queue_ms", site.between.queue_ms)]
    {
        if !(0.0..=1e6).contains(&value) {
            return Err(format!("{key} = {value}: give milliseconds"));
        }
    }
    site.vms.iter().try_for_each(check_kind)
}

fn check_kind(kind: &VmKind) -> Result<(), String> {
    let VmKind { name, memory_gib, untouched_percent, zero_percent, packable_percent, hot, cold, .. } = kind;
    let spreads =
        [("memory_gib", memory_gib), ("hot", &hot.rewritten_every_s), ("cold", &cold.rewritten_every_s)];
    for (key, Spread { median, sigma, min, max }) in spreads {
        let fine = *median > 0.0 && *sigma >= 0.0 && *min > 0.0 && min <= max && max.is_finite();
        if !(fine && median.is_finite() && sigma.is_finite()) {
            return Err(format!("VMs '{name}': {key}: give a median, min and max above zero, min to max"));
        }
    }
    let percents = [*untouched_percent, *zero_percent, *packable_percent, hot.percent, cold.percent];
    if percents.iter().any(|percent| !(0.0..=100.0).contains(percent)) {
        return Err(format!("VMs '{name}': a part is 0 to 100 percent"));
    }
    if untouched_percent + zero_percent + packable_percent > 100.0 || hot.percent + cold.percent > 90.0 {
        return Err(format!("VMs '{name}': parts of memory are more than there is"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sites_that_come_along_are_right() {
        let hosts: Vec<u32> = BUILT_IN.iter().map(|(name, _)| load(name).unwrap().source.hosts()).collect();
        assert_eq!(hosts, [16, 240]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let (_, text) = BUILT_IN[0];
        for (from, to, word) in [
            ("racks = 1\n", "rocks = 1\n", "rocks"),
            ("racks = 1\n", "racks = 0\n", "0 VMs"),
            ("out_max = 2", "out_max = 0", "out_max"),
            ("cores = 8", "cores = 0", "cores"),
            ("sigma = 0.6, min = 1,", "sigma = 0.6, min = 99,", "web"),
            ("untouched_percent = 30", "untouched_percent = 95", "web"),
            ("order = \"smallest-first\"", "order = \"fastest\"", "fastest"),
            ("streams = 2", "streams = 99", "99 streams"),
        ] {
            let changed = text.replacen(from, to, 1);
            assert_ne!(changed, text, "{from}");
            let error = parse("rack", &changed).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        assert!(load("/nowhere").unwrap_err().to_string().contains("rack, site"));
    }
}
