//! What things cost: the one place with all parameters of the model, each with its default and where that comes from.
//!
//! Everything that decides is the production core; what stands here is only time. A file with fitted values comes from
//! `simulate calibrate` and is given to the other subcommands with `--hardware`. Not here: links and hosts (their
//! rates belong to what is simulated), and the guest.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A parameter as people read of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Parameter {
    /// The field's name; it ends in the unit.
    pub name: &'static str,
    /// Its default.
    pub default: f64,
    /// Where the default comes from.
    pub source: &'static str,
}

macro_rules! parameters {
    ($($(#[doc = $doc:literal])+ $name:ident: $default:literal, $source:literal;)+) => {
        /// Costs of the machine monitor, the engine and the hosts.
        #[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct Hardware { $($(#[doc = $doc])+ pub $name: f64),+ }

        impl Default for Hardware {
            fn default() -> Self {
                Self { $($name: $default),+ }
            }
        }

        impl Hardware {
            /// All parameters, in order.
            pub const PARAMETERS: &'static [Parameter] =
                &[$(Parameter { name: stringify!($name), default: $default, source: $source }),+];

            /// The values, in the order of [`Hardware::PARAMETERS`].
            #[must_use]
            pub fn values(&self) -> Vec<f64> {
                vec![$(self.$name),+]
            }
        }
    };
}

parameters! {
    /// CPU time at the source for a page that travels as it is: looking for zeroes, its digest, and the kernel's copy
    /// to the socket.
    source_page_us: 0.9, "docs/performance.md: 14 GiB/s digest, one copy in the kernel; loopback bench";
    /// CPU time at the target for a page that came as it is, into memory that it has used before: the kernel's copy
    /// and the digest.
    target_page_us: 1.25, "docs/performance.md: loopback bench, 3,010 MiB/s with the receiver as the limit";
    /// The same once more, for a page that arrives for the first time: the target's memory has to be given to it.
    first_touch_page_us: 0.25, "2 MiB at a time with transparent huge pages, about 0.1 ms each to zero";
    /// The same once more at the source, for a page that was sent before: the guest has just written it, so that it lies
    /// in another processor's cache.
    dirtied_page_us: 0.4, "last rounds of 4,000 to 33,000 pages on loopback: 1.7 to 1.9 us a page";
    /// CPU time at the target for each run of consecutive pages: a system call.
    extent_us: 0.8, "one read of a socket for each run of pages";
    /// CPU time at the source for a page that leaves through a switch in software on the same machine, as in the
    /// harness's lab; real hosts have none.
    switch_page_us: 1.0, "assumed; set by calibration";
    /// CPU time at the source for a page of zeroes.
    source_zero_page_us: 0.45, "docs/performance.md: 25 GiB/s zero scan, 14 GiB/s digest; 16 GiB idle guest in 1.9 s";
    /// CPU time at the target for a page of zeroes.
    target_zero_page_us: 0.3, "docs/performance.md: 14 GiB/s digest";
    /// CPU time at the source for trying to pack a page that shrinks, besides looking at it.
    pack_page_us: 6.3, "docs/performance.md: 0.61 GiB/s of text-like pages";
    /// CPU time at the source for trying to pack a page that does not shrink.
    pack_vain_page_us: 0.35, "docs/performance.md: 11 GiB/s of random pages";
    /// CPU time at the target for unpacking a page, its digest included.
    unpack_page_us: 1.9, "docs/performance.md: 2.7 GiB/s unpacking, 14 GiB/s digest";
    /// By how much a page that shrinks does.
    pack_ratio: 1.76, "lz4 of text-like pages, 64 at a time";
    /// What a round costs besides its pages: handing it to the streams' threads, fences, waking both engines.
    round_us: 150.0, "rounds without a page on loopback";
    /// Bytes on the wire for a byte on a data stream: headers of Ethernet, IP and TCP at an MTU of 1500.
    wire_overhead: 1.049, "1514 + 24 bytes on the wire for 1448 of TCP payload, 1.062; without preamble and gap 1.046";
    /// What one TCP connection may have under way, in bytes: bounds a stream to this much a round trip.
    window_bytes: 4194304.0, "net.ipv4.tcp_wmem, Linux's default maximum";
    /// What sockets take in before the bytes are on the wire, in bytes a stream.
    socket_buffer_bytes: 2500000.0, "ss -tm during a migration over loopback";
    /// Reading the dirty log of a guest without memory.
    log_read_us: 60.0, "GET_DIRTY_LOG with manual protect, and the change of threads";
    /// More for each GiB of guest memory.
    log_read_us_per_gib: 7.5, "30 us for 4 GiB";
    /// More for each dirty page: clearing it.
    log_clear_page_us: 0.033, "330 us for 10,000 pages";
    /// Switching the dirty log on, for each GiB of guest memory.
    log_start_us_per_gib: 50.0, "INITIALLY_SET: nothing is protected until it is cleared";
    /// CPU time of a vCPU for each page that it dirties while the log is on: the write itself and its fault. It bounds
    /// how fast a guest can write, and is what guests take of processors that they share with the migration.
    logged_write_us: 1.5, "assumed; set by calibration";
    /// Stopping the device threads and a guest without vCPUs.
    pause_us: 250.0, "docs/performance.md: 0.2 to 0.4 ms with one vCPU";
    /// More for each vCPU.
    pause_us_per_vcpu: 30.0, "assumed: one signal and one thread each";
    /// Bytes of state besides those of vCPUs.
    state_bytes: 12000.0, "docs/performance.md: 20 KiB with one vCPU";
    /// Bytes of state of a vCPU.
    state_bytes_per_vcpu: 8000.0, "docs/performance.md: 20 KiB with one vCPU";
    /// Saving the state besides that of vCPUs.
    save_us: 150.0, "docs/performance.md: 0.2 ms with one vCPU";
    /// Saving a vCPU.
    save_us_per_vcpu: 50.0, "docs/performance.md: 0.2 ms with one vCPU";
    /// Comparing digests and restoring the state besides that of vCPUs.
    restore_us: 200.0, "docs/performance.md: 0.1 to 0.6 ms with one vCPU";
    /// Restoring a vCPU.
    restore_us_per_vcpu: 100.0, "docs/performance.md: 0.1 to 0.6 ms with one vCPU";
    /// Writing a durable record at the source.
    source_record_us: 700.0, "docs/performance.md: two fsyncs, 0.5 to 1 ms";
    /// Writing a durable record at the target.
    target_record_us: 700.0, "docs/performance.md: two fsyncs, 0.5 to 1 ms";
    /// Starting a guest without vCPUs at the target.
    run_us: 100.0, "docs/performance.md: record and start 0.7 to 1.4 ms";
    /// More for each vCPU.
    run_us_per_vcpu: 50.0, "assumed: one thread each";
    /// What a control message takes besides the link: two tasks woken.
    message_us: 80.0, "round trips on an idle loopback";
    /// Building the empty machine at the target.
    build_us: 3000.0, "a machine with one vCPU and no memory touched";
    /// More for each vCPU.
    build_us_per_vcpu: 300.0, "assumed";
    /// Between being told to migrate and connecting, and between handing over and being done.
    overhead_us: 1000.0, "assumed";
    /// How far fixed costs scatter, as the standard deviation of their logarithm; 0 for none.
    jitter: 0.0, "set by calibration";
    /// The same for the cost of pages, which scatters by round.
    page_jitter: 0.0, "set by calibration";
}

/// What a model was checked against: printed with everything that it says.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Calibration {
    /// The files whose runs were used.
    pub results: Vec<String>,
    /// The machine that they were made on.
    pub machine: String,
    /// Runs from which parameters were derived.
    pub runs_fitted: u32,
    /// Other runs, which were predicted.
    pub runs_predicted: u32,
    /// The error of the predicted total time.
    pub total: ErrorFigures,
    /// The error of the predicted downtime.
    pub downtime: ErrorFigures,
}

/// Errors of predictions, relative: 0.1 is 10 %.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct ErrorFigures {
    /// Half of the predictions are off by no more.
    pub median: f64,
    /// Nine in ten are off by no more.
    pub p90: f64,
    /// The largest.
    pub max: f64,
    /// The median of prediction over measurement, less one: below zero if the model is too fast.
    pub bias: f64,
    /// What a prediction by the median of each scenario's own runs would be off by in the median: the runs' spread.
    pub spread: f64,
}

/// A file with parameters.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HardwareFile {
    /// The parameters; those that are not named keep their defaults.
    #[serde(default)]
    pub hardware: Hardware,
    /// What they were checked against, if they were.
    pub calibration: Option<Calibration>,
}

/// Why parameters can't be had from a file.
#[derive(Debug, thiserror::Error)]
pub enum HardwareError {
    /// The file can't be read.
    #[error("the parameters in {path} can't be read")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the file system said.
        #[source]
        source: std::io::Error,
    },
    /// It is neither JSON nor TOML with the right keys.
    #[error("{path} is no file of parameters: {what}")]
    Format {
        /// The file.
        path: PathBuf,
        /// Where and why.
        what: String,
    },
    /// A value that can't be.
    #[error("{path}: {name} = {value}: give a number {least} or above")]
    Value {
        /// The file.
        path: PathBuf,
        /// The parameter.
        name: &'static str,
        /// Its value.
        value: f64,
        /// The least that it may be.
        least: f64,
    },
}

impl HardwareFile {
    /// Reads parameters from a JSON file (name ending in `.json`) or a TOML file.
    ///
    /// # Errors
    /// [`HardwareError`] names the file and what is wrong in it.
    pub fn load(path: &Path) -> Result<Self, HardwareError> {
        let read = |source| HardwareError::Read { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(read)?;
        let is_json = path.extension().is_some_and(|extension| extension == "json");
        let file: Self = if is_json {
            serde_json::from_str(&text).map_err(|error| error.to_string())
        } else {
            toml::from_str(&text).map_err(|error| error.to_string())
        }
        .map_err(|what| HardwareError::Format { path: path.to_owned(), what })?;
        match file.hardware.wrong_value() {
            None => Ok(file),
            Some((name, value, least)) => {
                Err(HardwareError::Value { path: path.to_owned(), name, value, least })
            }
        }
    }
}

impl Hardware {
    /// The costs where pages leave through a switch in software, which takes its time from the source's threads.
    #[must_use]
    pub fn behind_switch(&self) -> Self {
        Self { source_page_us: self.source_page_us + self.switch_page_us, ..*self }
    }

    /// The first parameter that has no sense, with its value and the least that it may be.
    fn wrong_value(&self) -> Option<(&'static str, f64, f64)> {
        let least = |name: &str| match name {
            // A packed page is never longer, and headers only add.
            "pack_ratio" | "wire_overhead" => 1.0,
            "window_bytes" => 1448.0,
            // A guest that writes in no time dirties all memory at once.
            "logged_write_us" => 0.01,
            _ => 0.0,
        };
        let named = Self::PARAMETERS.iter().zip(self.values());
        named
            .map(|(parameter, value)| (parameter.name, value, least(parameter.name)))
            .find(|(_, value, least)| !(value.is_finite() && value >= least))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(name: &str, text: &str) -> Result<HardwareFile, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        HardwareFile::load(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn both_formats_are_read_and_what_is_not_named_keeps_its_default() {
        let toml = load("a.toml", "[hardware]\nrun_us = 7.5").unwrap();
        let json = load("a.json", r#"{"hardware": {"run_us": 7.5}, "calibration": null}"#).unwrap();
        assert_eq!(toml, json);
        assert_eq!(toml.hardware, Hardware { run_us: 7.5, ..Hardware::default() });
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, word) in [
            ("[hardware]\nspeed = 1.0", "speed"),
            ("[hardware]\nrun_us = -1.0", "run_us = -1"),
            ("[hardware]\nrun_us = nan", "run_us"),
            ("[hardware]\npack_ratio = 0.5", "1 or above"),
        ] {
            let error = load("a.toml", text).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn every_default_makes_sense_and_has_a_source() {
        assert_eq!(Hardware::default().wrong_value(), None);
        assert!(Hardware::PARAMETERS.iter().all(|parameter| parameter.source.len() > 6));
        assert_eq!(Hardware::PARAMETERS.len(), Hardware::default().values().len());
    }
}
