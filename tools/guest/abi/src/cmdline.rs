//! The guest's kernel command line.
//!
//! ```text
//! <words of the VMM> [gap_log_us=N] workload MODE key=value ... [virtio_mmio.device=4K@0xd0000000:5 ...]
//! ```
//!
//! The job is what follows the word `workload`. Monitors append their virtio-mmio devices to the line
//! in Linux's form, so those words are recognised wherever they stand; other words before
//! `workload` are left to the VMM and not looked at, except `gap_log_us`, from which length in microseconds on a gap between
//! two heartbeats is logged. A line without the word means an idle guest.

use crate::report::GAP_LOG_MIN_US;
use crate::workload::{Workload, WorkloadError};

/// The word that starts the job's description.
pub const WORKLOAD_WORD: &str = "workload";

/// Most virtio-mmio devices that are remembered; QEMU's microvm announces only those in use.
pub const DEVICES_MAX: usize = 32;

/// A virtio-mmio device, as in Linux's `virtio_mmio.device=SIZE@BASE:IRQ[:ID]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioMmioDevice {
    /// Length of the register window, bytes.
    pub size: u64,
    /// Guest-physical address of the registers.
    pub base: u64,
    /// IOAPIC input.
    pub irq: u32,
}

impl VirtioMmioDevice {
    /// Parses `SIZE@BASE:IRQ[:ID]`.
    fn parse(value: &str) -> Option<Self> {
        let (size, rest) = value.split_once('@')?;
        let mut rest = rest.split(':');
        let base = number(rest.next()?)?;
        let irq = u32::try_from(number(rest.next()?)?).ok()?;
        Some(Self { size: number(size)?, base, irq })
    }
}

/// A number as Linux's memparse reads it: decimal or 0x, with K, M or G behind.
fn number(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let value = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None => digits.parse().ok()?,
    };
    value.checked_mul(1 << shift)
}

/// What the guest takes from its command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommandLine {
    /// The job.
    pub workload: Workload,
    /// Gaps of at least this length are logged, in microseconds; [`GAP_LOG_MIN_US`] unless the line says otherwise.
    pub gap_log_min_us: u64,
    devices: [Option<VirtioMmioDevice>; DEVICES_MAX],
}

impl CommandLine {
    /// Parses a command line.
    ///
    /// # Errors
    /// If the words behind `workload` are not a workload. Malformed device words are passed over, as
    /// Linux does: the device is then simply not there.
    pub fn parse(line: &str) -> Result<Self, WorkloadError> {
        let mut devices = [None; DEVICES_MAX];
        let found = line.split_ascii_whitespace().filter_map(device_value);
        for (slot, device) in devices.iter_mut().zip(found.filter_map(VirtioMmioDevice::parse)) {
            *slot = Some(device);
        }
        let mut words = line.split_ascii_whitespace().filter(|word| device_value(word).is_none());
        let mut gap_log_min_us = GAP_LOG_MIN_US;
        let workload = loop {
            match words.next() {
                None => break Workload::Idle,
                Some(WORKLOAD_WORD) => break Workload::from_words(words)?,
                Some(word) => {
                    let value = word.strip_prefix("gap_log_us=").and_then(|value| value.parse().ok());
                    gap_log_min_us = value.unwrap_or(gap_log_min_us);
                }
            }
        };
        Ok(Self { workload, gap_log_min_us, devices })
    }

    /// The virtio-mmio devices, in the order given.
    pub fn devices(&self) -> impl Iterator<Item = VirtioMmioDevice> + '_ {
        self.devices.iter().copied().flatten()
    }
}

fn device_value(word: &str) -> Option<&str> {
    word.strip_prefix("virtio_mmio.device=")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    #[test]
    fn devices_are_found_before_behind_and_between() {
        let line = "console=ttyS0 virtio_mmio.device=4K@0xd0000000:5 workload \
                    dirty virtio_mmio.device=512@0xfeb00e00:12 rate=7 virtio_mmio.device=4K@oops:1";
        let parsed = CommandLine::parse(line).unwrap();
        assert_eq!(Ok(parsed.workload), Workload::parse("dirty rate=7"));
        let devices: Vec<_> = parsed.devices().collect();
        let first = VirtioMmioDevice { size: 4096, base: 0xd000_0000, irq: 5 };
        let second = VirtioMmioDevice { size: 512, base: 0xfeb0_0e00, irq: 12 };
        assert_eq!(devices, [first, second]);
    }

    #[test]
    fn the_gap_log_has_a_threshold() {
        let of = |line| CommandLine::parse(line).unwrap().gap_log_min_us;
        assert_eq!(of("quiet gap_log_us=150 workload idle"), 150);
        for line in ["workload idle", "gap_log_us=x workload idle", "xgap_log_us=1"] {
            assert_eq!(of(line), GAP_LOG_MIN_US, "{line}");
        }
        assert!(CommandLine::parse("workload idle gap_log_us=150").is_err());
    }

    #[test]
    fn no_word_means_idle_and_bad_words_are_refused() {
        assert_eq!(CommandLine::parse("console=ttyS0 quiet").unwrap().workload, Workload::Idle);
        assert_eq!(CommandLine::parse("workload"), Err(WorkloadError::Empty));
        assert!(CommandLine::parse("workload idle quiet").is_err());
    }

    proptest! {
        #[test]
        fn any_line_is_parsed_or_refused(line in "(virtio_mmio.device=.{0,12} ?|workload ?|.{0,9}){0,5}") {
            let _ = CommandLine::parse(&line);
        }
    }
}
