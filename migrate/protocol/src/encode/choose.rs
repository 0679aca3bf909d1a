//! Which packing makes a stream finish sooner: a controller for each stream, fed with what was measured.
//!
//! Packing runs beside sending, in threads of its own. While they are busy and the link would run dry, the stream sends
//! pages unpacked. So packing never holds the link up, and the guest's bytes that a stream moves in a second are
//!
//! ```text
//!  link x ratio                                   if the packers keep up with the link
//!  link + packed x (1 - 1 / ratio)                if not: unpacked pages fill the rest of it
//! ```
//!
//! with `packed` the bytes that all packers take in a second. The method with the most is used; one that costs more time
//! must win by [`GAIN_MIN`]. Above [`LINK_MAX_BYTES_PER_S`] nothing is packed: a target unpacks no faster than that.
//!
//! Nothing here looks at a clock: durations come in.

use std::time::Duration;

use crate::page::Compression;

use super::pack::Method;

/// A link (as far as one stream gets it) that is faster than this gets unpacked pages: unpacking would be the limit.
pub const LINK_MAX_BYTES_PER_S: f64 = 600e6;

/// Up to this speed of the link a stream remembers what it sends from the first round on: a copy and a signature, about
/// 0.5 us a page, are then less than a thirtieth of what the page takes on the link.
pub const REMEMBER_MAX_BYTES_PER_S: f64 = 250e6;

/// How much better a method must be than a cheaper one.
pub const GAIN_MIN: f64 = 1.03;

/// What is tried, by what it costs.
const CANDIDATES: [Method; 3] = [Method::Lz4, Method::Zstd(1), Method::Zstd(3)];
const LZ4: usize = 0;
const ZSTD_1: usize = 1;
const ZSTD_3: usize = 2;

/// Once in so many decisions another method is tried again: the guest's pages may have become others.
const TRY_AGAIN_EVERY: u32 = 64;

/// What was worse than this share of the best is not tried again.
const WORTH_TRYING: f64 = 0.8;

/// How much a new measurement counts.
const GAIN: f64 = 0.3;

/// How much one counts that says the link is slower: what fits a buffer goes at the speed of memory, so that a link is
/// rather what it was at its slowest.
const GAIN_SLOWER: f64 = 0.7;

/// A share of time in writing from which on the link counts as the limit.
const WAITING_MIN: f64 = 0.5;

/// A mean that forgets.
#[derive(Debug, Clone, Copy, Default)]
struct Mean(Option<f64>);

impl Mean {
    fn add(&mut self, value: f64) {
        self.0 = Some(self.0.map_or(value, |mean| mean + GAIN * (value - mean)));
    }

    fn add_rate(&mut self, value: f64) {
        let gain = |mean| if value < mean { GAIN_SLOWER } else { GAIN };
        self.0 = Some(self.0.map_or(value, |mean| mean + gain(mean) * (value - mean)));
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Measured {
    /// Bytes of pages that one packer takes in a second.
    packed_per_s: Mean,
    /// Bytes of pages by bytes on the wire.
    ratio: Mean,
}

/// Chooses for one stream.
#[derive(Debug, Clone)]
pub struct Chooser {
    asked: Compression,
    packers: u16,
    link: Mean,
    methods: [Measured; CANDIDATES.len()],
    decisions: u32,
    tried_last: usize,
    deltas: Mean,
}

impl Chooser {
    /// A controller for what the operator `asked` for, with so many packing threads for this stream.
    #[must_use]
    pub fn new(asked: Compression, packers: u16) -> Self {
        Self {
            asked,
            packers: packers.max(1),
            link: Mean::default(),
            methods: [Measured::default(); CANDIDATES.len()],
            decisions: 0,
            tried_last: 0,
            deltas: Mean::default(),
        }
    }

    /// `bytes` were written, which took `writing` of the `elapsed` time.
    pub fn wrote(&mut self, bytes: u64, writing: Duration, elapsed: Duration) {
        let (writing_s, elapsed_s) = (writing.as_secs_f64(), elapsed.as_secs_f64());
        if elapsed_s > 0.0 && writing_s >= WAITING_MIN * elapsed_s {
            self.link.add_rate(as_f64(bytes) / writing_s);
        } else if let Some(link) = &mut self.link.0 {
            // The link was not full. It may have become faster: believe so, slowly, until it is full again.
            *link *= 1.01;
        }
    }

    /// One packer turned pages of `from_bytes` into `to_bytes` for the wire.
    pub fn packed(&mut self, method: Method, from_bytes: u64, to_bytes: u64, took: Duration) {
        let candidate = CANDIDATES.iter().position(|candidate| *candidate == method);
        if let Some(candidate) = candidate
            && from_bytes > 0
            && to_bytes > 0
            && !took.is_zero()
        {
            let measured = &mut self.methods[candidate];
            measured.packed_per_s.add(as_f64(from_bytes) / took.as_secs_f64());
            measured.ratio.add(as_f64(from_bytes) / as_f64(to_bytes));
        }
    }

    /// Of pages that were remembered and came again, so many travelled as deltas (or not at all) and so many whole.
    pub fn came_again(&mut self, deltas: u64, whole: u64) {
        if deltas + whole > 0 {
            self.deltas.add(as_f64(deltas) / as_f64(deltas + whole));
        }
    }

    /// What the next chunk is to be packed with.
    pub fn choose(&mut self) -> Method {
        match self.asked {
            Compression::None => Method::None,
            Compression::Lz4 => Method::Lz4,
            Compression::Zstd(level) => Method::Zstd(level),
            Compression::Auto => self.best(),
        }
    }

    fn best(&mut self) -> Method {
        let Some(link) = self.link.0.filter(|link| *link < LINK_MAX_BYTES_PER_S) else { return Method::None };
        self.decisions = self.decisions.wrapping_add(1);
        if let Some(candidate) = self.untried(link).or_else(|| self.try_again(link)) {
            return CANDIDATES[candidate];
        }
        let mut best = (Method::None, link);
        for (method, measured) in CANDIDATES.into_iter().zip(&self.methods) {
            let gets = self.guest_bytes_per_s(link, measured);
            if gets > best.1 * GAIN_MIN {
                best = (method, gets);
            }
        }
        best.0
    }

    /// What has not been tried and may be best: more packing where the packers have time left, less where they have not.
    fn untried(&self, link: f64) -> Option<usize> {
        let zstd = &self.methods[ZSTD_1];
        let next = match (zstd.packed_per_s.0, zstd.ratio.0) {
            (Some(one), Some(ratio)) if one * f64::from(self.packers) / ratio >= link => ZSTD_3,
            (Some(_), Some(_)) => LZ4,
            (None, _) | (_, None) => ZSTD_1,
        };
        self.methods[next].ratio.0.is_none().then_some(next)
    }

    /// Now and then, what was not much worse when it was last tried.
    fn try_again(&mut self, link: f64) -> Option<usize> {
        if !self.decisions.is_multiple_of(TRY_AGAIN_EVERY) {
            return None;
        }
        self.tried_last = (self.tried_last + 1) % CANDIDATES.len();
        let gets = |measured| self.guest_bytes_per_s(link, measured);
        let best = self.methods.iter().map(gets).fold(link, f64::max);
        let again = &self.methods[self.tried_last];
        (again.ratio.0.is_some() && gets(again) > best * WORTH_TRYING).then_some(self.tried_last)
    }

    /// The guest's bytes that the stream moves in a second with a method.
    fn guest_bytes_per_s(&self, link: f64, measured: &Measured) -> f64 {
        let (Some(one), Some(ratio)) = (measured.packed_per_s.0, measured.ratio.0) else { return link };
        let packed = one * f64::from(self.packers);
        if packed / ratio >= link { link * ratio } else { link + packed * (1.0 - 1.0 / ratio) }
    }

    /// Whether pages are to be copied and remembered, so that they can come again as deltas; `again` says that they
    /// have been sent before.
    #[must_use]
    pub fn remembers(&self, again: bool) -> bool {
        if self.asked == Compression::None {
            return false;
        }
        let slow = self.link.0.is_some_and(|link| link < REMEMBER_MAX_BYTES_PER_S);
        slow || (again && self.deltas.0.is_none_or(|deltas| deltas > 0.1))
    }

    /// What the link takes, in bytes/s, as far as it is known.
    #[must_use]
    pub const fn link_bytes_per_s(&self) -> Option<f64> {
        self.link.0
    }
}

#[expect(clippy::cast_precision_loss, reason = "a mean need not be exact")]
fn as_f64(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Lets the chooser see a link and pages that each method packs so (bytes/s, ratio), until it has settled.
    fn settled(link: f64, packers: u16, pages: [(f64, f64); 3]) -> Method {
        let mut chooser = Chooser::new(Compression::Auto, packers);
        assert_eq!(chooser.choose(), Method::None, "nothing is known yet");
        let mut chosen = Method::None;
        for _ in 0..40 {
            let second = Duration::from_secs(1);
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole bytes")]
            chooser.wrote(link as u64, second, second);
            chosen = chooser.choose();
            if let Some(at) = CANDIDATES.iter().position(|candidate| *candidate == chosen) {
                let (rate, ratio) = pages[at];
                let took = Duration::from_secs_f64(MIB as f64 / rate);
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "whole bytes")]
                chooser.packed(chosen, MIB, (MIB as f64 / ratio) as u64, took);
            }
        }
        chosen
    }

    const TEXT: [(f64, f64); 3] = [(390e6, 1.92), (260e6, 2.9), (180e6, 3.04)];
    const NOISE: [(f64, f64); 3] = [(3e9, 1.0), (1e9, 1.0), (1e9, 1.0)];

    #[test]
    fn slow_links_get_what_shrinks_most_and_fast_ones_nothing() {
        assert_eq!(settled(12e6, 2, TEXT), Method::Zstd(3));
        assert_eq!(settled(118e6, 2, TEXT), Method::Zstd(3));
        let nearly_alike = [TEXT[0], TEXT[1], (180e6, 2.95)];
        assert_eq!(settled(118e6, 2, nearly_alike), Method::Zstd(1), "not worth the time");
        assert_eq!(settled(1.2e9, 2, TEXT), Method::None);
    }

    #[test]
    fn packers_that_fall_behind_do_what_is_quick() {
        // One packer for a link of 400 MB/s: the fill decides, and lz4 saves the most bytes a second.
        assert_eq!(settled(400e6, 1, TEXT), Method::Lz4);
    }

    #[test]
    fn noise_is_not_packed() {
        assert_eq!(settled(12e6, 2, NOISE), Method::None);
    }

    #[test]
    fn what_was_asked_for_is_done() {
        let mut chooser = Chooser::new(Compression::Zstd(5), 1);
        assert_eq!(chooser.choose(), Method::Zstd(5));
        assert_eq!(Chooser::new(Compression::None, 1).choose(), Method::None);
    }

    #[test]
    fn deltas_that_do_not_pay_are_no_longer_prepared_on_a_fast_link() {
        assert!(!Chooser::new(Compression::None, 1).remembers(true), "pages as they are, it was said");
        let mut chooser = Chooser::new(Compression::Auto, 1);
        assert!(!chooser.remembers(false) && chooser.remembers(true));
        (0..20).for_each(|_| chooser.came_again(0, 100));
        assert!(!chooser.remembers(true));
        chooser.wrote(10 * MIB, Duration::from_secs(1), Duration::from_secs(1));
        assert!(chooser.remembers(false), "a slow link has time for it");
    }
}
