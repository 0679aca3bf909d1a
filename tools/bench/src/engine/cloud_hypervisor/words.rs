//! What Cloud Hypervisor's log tells of a migration. There is no other way to learn its figures.
//!
//! Lines that another version words differently are simply not found, and their figures are then missing.

/// What a source's log tells.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Figures {
    /// `Migration completed after 1.2s with a downtime of 70ms (goal was 300ms)`.
    pub(super) downtime_ms: Option<f64>,
    /// `Precopy complete: iter=3 curr=9MiB total=522MiB ... est_downtime=17ms ...`.
    pub(super) memory: Option<Memory>,
}

/// How memory was moved, with sizes rounded up by Cloud Hypervisor. With post-copy there is no such line.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Memory {
    /// Passes over memory, that with the guest stopped included.
    pub(super) passes: f64,
    /// What was sent with the guest stopped, MiB.
    pub(super) stopped_mib: f64,
    /// What was sent in all, MiB.
    pub(super) total_mib: f64,
    /// The downtime that it expected when it had just stopped the guest, ms.
    pub(super) forecast_ms: Option<f64>,
}

impl Figures {
    /// Reads `log`.
    pub(super) fn read(log: &str) -> Self {
        let behind = |words: &str| log.lines().rev().find_map(|line| Some(line.split_once(words)?.1));
        Self {
            downtime_ms: behind("with a downtime of ").and_then(|words| number_before(words, "ms")),
            memory: behind("Precopy complete: ").and_then(memory),
        }
    }
}

fn memory(words: &str) -> Option<Memory> {
    Some(Memory {
        passes: value(words, "iter", "")?,
        stopped_mib: value(words, "curr", "MiB")?,
        total_mib: value(words, "total", "MiB")?,
        forecast_ms: value(words, "est_downtime", "ms"),
    })
}

/// The number of `key=NUMBERunit`.
fn value(words: &str, key: &str, unit: &str) -> Option<f64> {
    let of_key = |word: &'_ str| {
        word.split_once('=').filter(|(name, _)| *name == key).map(|(_, value)| value.to_owned())
    };
    number_before(&words.split_ascii_whitespace().find_map(of_key)?, unit)
}

fn number_before(words: &str, unit: &str) -> Option<f64> {
    let digits = words.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(words.len());
    let (number, rest) = words.split_at(digits);
    if rest.starts_with(unit) { number.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
cloud-hypervisor: 3.12s: <vmm> INFO:vmm/src/lib.rs:3191 -- Sending migration: destination_url=tcp:127.0.0.1:7\r
cloud-hypervisor: 3.51s: <migration-worker> INFO:vmm/src/lib.rs:1577 -- Precopy complete: iter=2 curr=9MiB \
total=522MiB bw=1850.23MiB/s transfer=0.01s overhead=3ms est_downtime=17ms elapsed=0.28s avg_bw=1832.10MiB/s\r
cloud-hypervisor: 3.53s: <migration-worker> INFO:vmm/src/lib.rs:1793 -- Migration completed after 0.4s with a \
downtime of 70ms (goal was 300ms)\r
";

    #[test]
    fn a_log_has_figures() {
        let memory = Memory { passes: 2.0, stopped_mib: 9.0, total_mib: 522.0, forecast_ms: Some(17.0) };
        assert_eq!(Figures::read(LOG), Figures { downtime_ms: Some(70.0), memory: Some(memory) });
    }

    #[test]
    fn other_words_have_none() {
        let other = LOG.replace("ms", " msec").replace("iter=", "iteration=");
        assert_eq!(Figures::read(&other), Figures::default());
    }
}
