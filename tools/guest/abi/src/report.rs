//! The report page: what a host can read out of a running guest's memory.
//!
//! ```text
//!      0  magic u64 | version u32 | mode u32 | stage u32 | reserved u32
//!     24  heartbeat, gaps, counters: u64 each, see [`offset`]
//!    512  text: why the guest stopped (UTF-8, zero-terminated)
//!   2048  gap log: 128 entries of {start_tsc u64, length_ticks u64}; entry n is gap number n mod 128
//! ```
//!
//! All fields are little-endian and naturally aligned, so the guest updates each with one store. The
//! page as a whole is not written atomically: a host that copies it from a running guest may see a
//! counter from just before and another from just after an update.
//!
//! This module neither reaches into guest memory nor knows the wall-clock: times are the guest's TSC ticks.

use crate::PAGE_SIZE;
use core::fmt;

/// `FERRYGST`, little-endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"FERRYGST");

/// Version of the page's layout.
pub const VERSION: u32 = 1;

/// Entries in the gap log.
pub const GAP_LOG_LEN: usize = 128;

/// Gaps of at least this length are logged, in microseconds, unless the command line says otherwise.
pub const GAP_LOG_MIN_US: u64 = 2_000;

/// Longest failure text, in bytes, without the terminating zero.
pub const TEXT_LEN_MAX: usize = 255;

/// Byte offsets of the fields. Everything not said otherwise is a `u64`.
pub mod offset {
    #![expect(missing_docs, reason = "the field of the same name in `Report` documents each")]
    pub const MAGIC: usize = 0;
    /// `u32`.
    pub const VERSION: usize = 8;
    /// `u32`.
    pub const MODE: usize = 12;
    /// `u32`.
    pub const STAGE: usize = 16;
    pub const BOOT_TSC: usize = 24;
    pub const HEARTBEAT_TSC: usize = 32;
    pub const HEARTBEAT_COUNT: usize = 40;
    pub const TSC_KHZ: usize = 48;
    pub const LARGEST_GAP_START: usize = 56;
    pub const LARGEST_GAP_TICKS: usize = 64;
    pub const GAP_COUNT: usize = 72;
    pub const HALTS: usize = 80;
    pub const RAM_BYTES: usize = 88;
    pub const PAGES_FILLED: usize = 96;
    pub const PAGES_WRITTEN: usize = 104;
    pub const PASSES: usize = 112;
    pub const PAGES_CHECKED: usize = 120;
    pub const ERRORS: usize = 128;
    pub const BAD_ADDRESS: usize = 136;
    pub const BAD_EXPECTED: usize = 144;
    pub const BAD_FOUND: usize = 152;
    pub const HTTP_REQUESTS: usize = 160;
    pub const HTTP_BYTES: usize = 168;
    pub const HTTP_REFUSED: usize = 176;
    pub const TCP_ACCEPTS: usize = 184;
    pub const UDP_ECHOES: usize = 192;
    pub const RX_FRAMES: usize = 200;
    pub const TX_FRAMES: usize = 208;
    pub const FAULT_VECTOR: usize = 216;
    pub const FAULT_ERROR: usize = 224;
    pub const FAULT_RIP: usize = 232;
    pub const FAULT_CR2: usize = 240;
    pub const FILL_CHECKED: usize = 248;
    /// Zero-terminated UTF-8.
    pub const TEXT: usize = 512;
    pub const GAP_LOG: usize = 2048;
}

/// How far the guest has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Stage {
    /// The page was set up; the clock is being calibrated.
    Booting = 1,
    /// Memory is being filled.
    Filling = 2,
    /// The main job runs.
    Ready = 3,
    /// The guest gave up; [`Report::text`] says why.
    Failed = 4,
    /// An exception stopped the guest; [`Report::fault`] says which.
    Faulted = 5,
}

impl Stage {
    const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::Booting,
            2 => Self::Filling,
            3 => Self::Ready,
            4 => Self::Failed,
            5 => Self::Faulted,
            _ => return None,
        })
    }
}

/// The kind of job, as numbered in the report. Its details are on the command line, not here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Mode {
    /// The command line has not been read yet.
    Unknown = 0,
    /// [`crate::workload::Workload::Idle`]
    Idle = 1,
    /// [`crate::workload::Workload::Dirty`]
    Dirty = 2,
    /// [`crate::workload::Workload::Fill`]
    Fill = 3,
    /// [`crate::workload::Workload::Http`]
    Http = 4,
}

impl Mode {
    const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Unknown,
            1 => Self::Idle,
            2 => Self::Dirty,
            3 => Self::Fill,
            4 => Self::Http,
            _ => return None,
        })
    }
}

/// A stretch of time in which the guest did not run: the span between two heartbeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Gap {
    /// TSC of the last heartbeat before the gap.
    pub start_tsc: u64,
    /// Length of the gap, in TSC ticks.
    pub length_ticks: u64,
}

impl Gap {
    /// TSC of the first heartbeat after the gap.
    #[must_use]
    pub const fn end_tsc(&self) -> u64 {
        self.start_tsc.saturating_add(self.length_ticks)
    }
}

/// A page that did not hold what the guest had written there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadPage {
    /// Guest-physical address of the wrong word.
    pub address: u64,
    /// The word that the guest had written.
    pub expected: u64,
    /// The word that it found.
    pub found: u64,
}

/// An exception that the guest took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// x86 vector number.
    pub vector: u64,
    /// Error code, 0 where the vector has none.
    pub error_code: u64,
    /// Address of the instruction.
    pub rip: u64,
    /// CR2: the address accessed, for a page fault.
    pub cr2: u64,
}

/// What the guest says of itself, parsed from a copy of the report page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// What the guest was told to do.
    pub mode: Mode,
    /// How far it has come.
    pub stage: Stage,
    /// TSC when the guest set up the page.
    pub boot_tsc: u64,
    /// TSC of the last heartbeat.
    pub heartbeat_tsc: u64,
    /// Number of heartbeats.
    pub heartbeat_count: u64,
    /// TSC frequency as the guest measured it against its LAPIC timer, kHz; 0 until known.
    pub tsc_khz: u64,
    /// The largest gap since the stage became [`Stage::Ready`]; length 0 if there was none.
    pub largest_gap: Gap,
    /// Number of gaps of at least [`GAP_LOG_MIN_US`] so far.
    pub gap_count: u64,
    /// How often the guest halted to wait for an interrupt.
    pub halts: u64,
    /// Usable RAM that the guest found, bytes.
    pub ram_bytes: u64,
    /// Pages filled so far.
    pub pages_filled: u64,
    /// Pages written by the `dirty` job.
    pub pages_written: u64,
    /// Full passes of the `dirty` job over its working set.
    pub passes: u64,
    /// Self-checks of pages, by the `dirty` job and by the background verification together.
    pub pages_checked: u64,
    /// Self-checks of filled pages by the background verification; part of [`Report::pages_checked`].
    pub fill_checked: u64,
    /// Self-checks that failed.
    pub errors: u64,
    /// The first failed self-check.
    pub first_bad: Option<BadPage>,
    /// HTTP requests answered with 200.
    pub http_requests: u64,
    /// Body bytes handed to TCP for those requests.
    pub http_bytes: u64,
    /// HTTP requests answered with anything else.
    pub http_refused: u64,
    /// TCP connections accepted.
    pub tcp_accepts: u64,
    /// UDP datagrams echoed.
    pub udp_echoes: u64,
    /// Ethernet frames received.
    pub rx_frames: u64,
    /// Ethernet frames sent.
    pub tx_frames: u64,
    /// The exception that stopped the guest, if one did.
    pub fault: Option<Fault>,
    text: [u8; TEXT_LEN_MAX],
    text_len: usize,
    gaps: [Gap; GAP_LOG_LEN],
    gaps_len: usize,
}

/// Why bytes are not a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReportError {
    /// The magic number is missing.
    NotAReport {
        /// What stood in its place.
        found: u64,
    },
    /// The page has another layout.
    UnknownVersion {
        /// The version it claims.
        found: u32,
    },
    /// A field that takes a few known values has another.
    UnknownValue {
        /// The field's name.
        field: &'static str,
        /// Its value.
        found: u32,
    },
}

impl fmt::Display for ReportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAReport { found } => write!(
                f,
                "no workload report at guest address {:#x}: found {found:#018x} instead of the magic number; \
                 the guest has not started yet, or is not the workload guest",
                crate::REPORT_GPA
            ),
            Self::UnknownVersion { found } => write!(
                f,
                "the guest's report has layout version {found}, this program reads version {VERSION}; \
                 use the guest that was built with it"
            ),
            Self::UnknownValue { field, found } => {
                write!(f, "the guest's report has {field} {found}, which does not exist; its page is damaged")
            }
        }
    }
}

impl core::error::Error for ReportError {}

/// Reads fields at fixed offsets; a page is longer than the largest offset used, so reads cannot miss.
struct Fields<'a>(&'a [u8; PAGE_SIZE]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(&self.0[at..at + N]);
        out
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }

    fn fault(&self) -> Option<Fault> {
        // The guest stores the vector plus one, so that an untouched page says "none".
        let vector = self.u64(offset::FAULT_VECTOR).checked_sub(1)?;
        Some(Fault {
            vector,
            error_code: self.u64(offset::FAULT_ERROR),
            rip: self.u64(offset::FAULT_RIP),
            cr2: self.u64(offset::FAULT_CR2),
        })
    }

    fn first_bad(&self) -> Option<BadPage> {
        (self.u64(offset::ERRORS) > 0).then(|| BadPage {
            address: self.u64(offset::BAD_ADDRESS),
            expected: self.u64(offset::BAD_EXPECTED),
            found: self.u64(offset::BAD_FOUND),
        })
    }

    /// The logged gaps, oldest first, and how many there are.
    fn gaps(&self) -> ([Gap; GAP_LOG_LEN], usize) {
        let total = self.u64(offset::GAP_COUNT);
        let kept = total.min(GAP_LOG_LEN as u64);
        let mut gaps = [Gap::default(); GAP_LOG_LEN];
        let mut len = 0;
        for number in total - kept..total {
            // The remainder is below GAP_LOG_LEN, so nothing is cut off.
            #[expect(clippy::cast_possible_truncation, reason = "a remainder of a usize fits one")]
            let slot = (number % GAP_LOG_LEN as u64) as usize;
            let at = offset::GAP_LOG + 16 * slot;
            gaps[len] = Gap { start_tsc: self.u64(at), length_ticks: self.u64(at + 8) };
            len += 1;
        }
        (gaps, len)
    }
}

impl Report {
    /// Parses a copy of the page at [`crate::REPORT_GPA`].
    ///
    /// # Errors
    /// If the page is not a report of this version; before the guest has started there is none.
    pub fn parse(page: &[u8; PAGE_SIZE]) -> Result<Self, ReportError> {
        let fields = Fields(page);
        let magic = fields.u64(offset::MAGIC);
        if magic != MAGIC {
            return Err(ReportError::NotAReport { found: magic });
        }
        let version = fields.u32(offset::VERSION);
        if version != VERSION {
            return Err(ReportError::UnknownVersion { found: version });
        }
        let unknown = |field, found| ReportError::UnknownValue { field, found };
        let mode = fields.u32(offset::MODE);
        let stage = fields.u32(offset::STAGE);
        let text = fields.bytes::<TEXT_LEN_MAX>(offset::TEXT);
        let (gaps, gaps_len) = fields.gaps();
        Ok(Self {
            mode: Mode::from_number(mode).ok_or(unknown("mode", mode))?,
            stage: Stage::from_number(stage).ok_or(unknown("stage", stage))?,
            boot_tsc: fields.u64(offset::BOOT_TSC),
            heartbeat_tsc: fields.u64(offset::HEARTBEAT_TSC),
            heartbeat_count: fields.u64(offset::HEARTBEAT_COUNT),
            tsc_khz: fields.u64(offset::TSC_KHZ),
            largest_gap: Gap {
                start_tsc: fields.u64(offset::LARGEST_GAP_START),
                length_ticks: fields.u64(offset::LARGEST_GAP_TICKS),
            },
            gap_count: fields.u64(offset::GAP_COUNT),
            halts: fields.u64(offset::HALTS),
            ram_bytes: fields.u64(offset::RAM_BYTES),
            pages_filled: fields.u64(offset::PAGES_FILLED),
            pages_written: fields.u64(offset::PAGES_WRITTEN),
            passes: fields.u64(offset::PASSES),
            pages_checked: fields.u64(offset::PAGES_CHECKED),
            fill_checked: fields.u64(offset::FILL_CHECKED),
            errors: fields.u64(offset::ERRORS),
            first_bad: fields.first_bad(),
            http_requests: fields.u64(offset::HTTP_REQUESTS),
            http_bytes: fields.u64(offset::HTTP_BYTES),
            http_refused: fields.u64(offset::HTTP_REFUSED),
            tcp_accepts: fields.u64(offset::TCP_ACCEPTS),
            udp_echoes: fields.u64(offset::UDP_ECHOES),
            rx_frames: fields.u64(offset::RX_FRAMES),
            tx_frames: fields.u64(offset::TX_FRAMES),
            fault: fields.fault(),
            text_len: text.iter().position(|byte| *byte == 0).unwrap_or(text.len()),
            text,
            gaps,
            gaps_len,
        })
    }

    /// Why the guest gave up; empty while it is well.
    #[must_use]
    pub fn text(&self) -> &str {
        let bytes = &self.text[..self.text_len];
        match core::str::from_utf8(bytes) {
            Ok(text) => text,
            // A text cut in the middle of a character: what stands before it is still good.
            Err(error) => core::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default(),
        }
    }

    /// The logged gaps, oldest first: the last [`GAP_LOG_LEN`] of [`Report::gap_count`].
    #[must_use]
    pub fn gaps(&self) -> &[Gap] {
        &self.gaps[..self.gaps_len]
    }

    /// The largest gap that ended after `tsc`, among those logged and the largest of all.
    ///
    /// A host notes [`Report::heartbeat_tsc`] before it migrates the guest and asks with it afterwards.
    #[must_use]
    pub fn largest_gap_since(&self, tsc: u64) -> Option<Gap> {
        // The largest of all may have dropped out of the log, so it takes part as well.
        self.gaps()
            .iter()
            .chain([&self.largest_gap])
            .filter(|gap| gap.length_ticks > 0 && gap.end_tsc() > tsc)
            .max_by_key(|gap| gap.length_ticks)
            .copied()
    }

    /// Converts TSC ticks to milliseconds; `None` until the guest has calibrated its TSC.
    #[must_use]
    pub fn gap_ms(&self, ticks: u64) -> Option<f64> {
        (self.tsc_khz > 0).then(|| ticks as f64 / self.tsc_khz as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn put(page: &mut [u8; PAGE_SIZE], at: usize, value: u64) {
        page[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    fn page() -> [u8; PAGE_SIZE] {
        let mut page = [0; PAGE_SIZE];
        put(&mut page, offset::MAGIC, MAGIC);
        page[offset::VERSION] = 1;
        page[offset::MODE] = 2;
        page[offset::STAGE] = 3;
        page
    }

    #[test]
    fn every_field_comes_from_its_own_offset() {
        let mut page = page();
        // Distinct values, so that a swapped offset shows.
        for at in (offset::BOOT_TSC..=offset::FILL_CHECKED).step_by(8) {
            put(&mut page, at, at as u64);
        }
        put(&mut page, offset::GAP_COUNT, 0);
        page[offset::TEXT..offset::TEXT + 4].copy_from_slice(b"why\0");
        let report = Report::parse(&page).unwrap();
        assert_eq!((report.mode, report.stage), (Mode::Dirty, Stage::Ready));
        assert_eq!((report.boot_tsc, report.heartbeat_tsc, report.heartbeat_count), (24, 32, 40));
        assert_eq!(report.tsc_khz, 48);
        assert_eq!(report.largest_gap, Gap { start_tsc: 56, length_ticks: 64 });
        assert_eq!((report.halts, report.ram_bytes, report.pages_filled), (80, 88, 96));
        assert_eq!((report.pages_written, report.passes, report.pages_checked), (104, 112, 120));
        let bad = BadPage { address: 136, expected: 144, found: 152 };
        assert_eq!((report.errors, report.first_bad), (128, Some(bad)));
        assert_eq!((report.http_requests, report.http_bytes, report.http_refused), (160, 168, 176));
        assert_eq!((report.tcp_accepts, report.udp_echoes), (184, 192));
        assert_eq!((report.rx_frames, report.tx_frames, report.fill_checked), (200, 208, 248));
        assert_eq!(report.fault, Some(Fault { vector: 215, error_code: 224, rip: 232, cr2: 240 }));
        assert_eq!(report.text(), "why");
    }

    #[test]
    fn the_gap_log_wraps_and_is_searched_by_time() {
        let mut page = page();
        let total = GAP_LOG_LEN as u64 + 5;
        put(&mut page, offset::GAP_COUNT, total);
        put(&mut page, offset::TSC_KHZ, 2_000);
        for number in 0..total {
            let at = offset::GAP_LOG + 16 * (usize::try_from(number).unwrap() % GAP_LOG_LEN);
            put(&mut page, at, 1_000 * number);
            put(&mut page, at + 8, 100 + number % 7);
        }
        let report = Report::parse(&page).unwrap();
        assert_eq!(report.gaps().len(), GAP_LOG_LEN);
        assert_eq!(report.gaps()[0].start_tsc, 5_000);
        assert_eq!(report.gaps()[GAP_LOG_LEN - 1].start_tsc, 132_000);
        let since = report.largest_gap_since(131_000).unwrap();
        assert_eq!(since, Gap { start_tsc: 132_000, length_ticks: 106 });
        assert_eq!(report.largest_gap_since(132_106), None);
        assert_eq!(report.gap_ms(3_000), Some(1.5));
    }

    #[test]
    fn what_is_not_a_report_is_refused() {
        assert_eq!(Report::parse(&[0; PAGE_SIZE]), Err(ReportError::NotAReport { found: 0 }));
        let mut other = page();
        other[offset::VERSION] = 9;
        assert_eq!(Report::parse(&other), Err(ReportError::UnknownVersion { found: 9 }));
        let mut other = page();
        other[offset::STAGE] = 77;
        assert_eq!(Report::parse(&other), Err(ReportError::UnknownValue { field: "stage", found: 77 }));
    }

    proptest! {
        #[test]
        fn any_bytes_behind_the_header_parse(body in proptest::collection::vec(any::<u8>(), PAGE_SIZE - 24)) {
            let mut page = page();
            page[24..].copy_from_slice(&body);
            let report = Report::parse(&page).unwrap();
            let _ = (report.text(), report.largest_gap_since(0), report.gap_ms(1));
        }
    }
}
