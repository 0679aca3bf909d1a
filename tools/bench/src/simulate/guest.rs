//! The guest as the model has it: how large it is, what its pages hold, and which of them it writes when.
//!
//! The core gets bitmaps with one bit a page, so that unions and counts are those of production. What a page holds is not
//! there, only of which kind it is. Guests above 1 TiB are modelled in larger pages ([`GuestModel::page_scale`]), which a test holds
//! against the exact model.
//!
//! ```text
//!  page 0                                                         last page
//!  | set 0 (hot) | set 1 | ...  | the rest: written only before the migration |
//!    each begins at a chunk of 2 MiB
//! ```

use std::time::Duration;

use ferry_migrate::protocol::bitmap::CHUNK_PAGES;
use ferry_migrate::protocol::layout::{MEMORY_BYTES_MAX, PAGE_BYTES_U64};
use ferry_migrate::protocol::{MemoryLayout, PageBitmap, Region};
use rand::{Rng, RngExt, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;
use serde::{Deserialize, Serialize};

/// A guest and its work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuestModel {
    /// Its memory, in bytes; rounded up to whole pages.
    pub memory_bytes: u64,
    /// Its vCPUs.
    pub cpus: u16,
    /// The share of pages outside the sets that lie together and were never touched, so are zero; 0 to 1.
    pub untouched_share: f64,
    /// The share of pages outside the sets that are zero and lie scattered among others, 0 to 1.
    pub zero_share: f64,
    /// The share of pages outside the sets that can be packed, 0 to 1.
    pub packable_share: f64,
    /// What it writes to while it runs.
    pub sets: Vec<WorkingSet>,
}

/// Memory that a guest writes to at a steady rate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct WorkingSet {
    /// Its size, in bytes.
    pub bytes: u64,
    /// Pages written a second, a page that is written twice counted twice.
    pub pages_per_s: f64,
    /// In which order.
    pub order: Order,
    /// The share of its pages that can be packed, 0 to 1.
    pub packable_share: f64,
}

/// In which order pages of a set are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// By increasing address, again and again: the most different pages for a rate.
    Linear,
    /// Every page once a pass, each pass in another order.
    Shuffled,
    /// Each write to any page.
    Uniform,
}

/// The most pages that a guest is modelled with: a bit for each makes 32 MiB.
pub const PAGES_MAX: u64 = 1 << 28;

/// Why a guest can't be modelled.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GuestError {
    /// More memory than the protocol allows, or none.
    #[error("a guest of {0} bytes can't be: give it a page at least and 64 TiB at most")]
    Memory(u64),
    /// The sets need more room.
    #[error("sets of {sets} bytes do not fit a guest of {memory} bytes")]
    Sets {
        /// What they need.
        sets: u64,
        /// What there is.
        memory: u64,
    },
    /// A share or rate without sense.
    #[error("{what} = {value}: {right}")]
    Value {
        /// Which.
        what: &'static str,
        /// What it is.
        value: f64,
        /// What it may be.
        right: &'static str,
    },
}

impl GuestModel {
    /// An idle guest whose memory is all in use, with nothing that could be packed.
    #[must_use]
    pub const fn idle(memory_bytes: u64, cpus: u16) -> Self {
        Self {
            memory_bytes,
            cpus,
            untouched_share: 0.0,
            zero_share: 0.0,
            packable_share: 0.0,
            sets: Vec::new(),
        }
    }

    /// How many pages of `scale` real ones it has.
    #[must_use]
    pub const fn page_count(&self, scale: u64) -> u64 {
        self.memory_bytes.div_ceil(PAGE_BYTES_U64 * scale)
    }

    /// How many real pages one of the model stands for, so that there are at most [`PAGES_MAX`]: 1 up to 1 TiB.
    #[must_use]
    pub fn page_scale(&self) -> u64 {
        self.page_count(1).div_ceil(PAGES_MAX).max(1).next_power_of_two()
    }

    /// Its memory as the core wants it, in pages of `scale` real ones.
    ///
    /// # Errors
    /// [`GuestError`] for whatever about this guest can't be.
    pub fn layout(&self, scale: u64) -> Result<MemoryLayout, GuestError> {
        self.check()?;
        if self.memory_bytes > MEMORY_BYTES_MAX {
            return Err(GuestError::Memory(self.memory_bytes));
        }
        let bytes = self.page_count(scale) * PAGE_BYTES_U64;
        MemoryLayout::new(vec![Region { gpa: 0, bytes }]).map_err(|_| GuestError::Memory(self.memory_bytes))
    }

    /// How many pages it wants to write a second.
    #[must_use]
    pub fn pages_per_s(&self) -> f64 {
        self.sets.iter().map(|set| set.pages_per_s).sum()
    }

    fn check(&self) -> Result<(), GuestError> {
        if self.cpus == 0 {
            let right = "give it one at least";
            return Err(GuestError::Value { what: "the number of vCPUs", value: 0.0, right });
        }
        let share = |what, value: f64| {
            let fine = (0.0..=1.0).contains(&value);
            let right = "give a share from 0 to 1";
            if fine { Ok(()) } else { Err(GuestError::Value { what, value, right }) }
        };
        share("the share of untouched pages", self.untouched_share)?;
        share("the share of zero pages", self.zero_share)?;
        share("the share of pages that can be packed", self.packable_share)?;
        let together = self.untouched_share + self.zero_share + self.packable_share;
        // Shares that were worked out may miss 1 by rounding.
        share("untouched, zero and packable pages together", (together - 1e-9).max(0.0))?;
        for set in &self.sets {
            share("a set's share of pages that can be packed", set.packable_share)?;
            if !(set.pages_per_s.is_finite() && set.pages_per_s >= 0.0) {
                let right = "give a number of pages a second";
                return Err(GuestError::Value { what: "a set's rate", value: set.pages_per_s, right });
            }
        }
        let scale = self.page_scale();
        let sets = place(&self.sets, scale).last().map_or(0, |last| last.first + last.pages);
        let (sets, memory) = (sets * scale * PAGE_BYTES_U64, self.page_count(scale) * scale * PAGE_BYTES_U64);
        if sets > memory { Err(GuestError::Sets { sets, memory }) } else { Ok(()) }
    }
}

/// Where a set lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) first: u64,
    pub(super) pages: u64,
}

/// Puts sets one behind the other, each at the beginning of a chunk, in pages of `scale` real ones.
pub(super) fn place(sets: &[WorkingSet], scale: u64) -> Vec<Place> {
    let mut end: u64 = 0;
    let next = |set: &WorkingSet| {
        let pages = set.bytes.div_ceil(PAGE_BYTES_U64 * scale);
        let place = Place { first: end.next_multiple_of(CHUNK_PAGES), pages };
        end = place.first + place.pages;
        place
    };
    sets.iter().map(next).collect()
}

/// Which pages a guest has written since they were last asked for.
#[derive(Debug)]
pub(super) struct GuestMemory {
    page_count: u64,
    sets: Vec<(WorkingSet, Place)>,
    read_at: Duration,
    /// When it stopped running, if it has.
    stopped_at: Option<Duration>,
    random: Xoshiro256PlusPlus,
}

impl GuestMemory {
    /// The memory of `guest`, which can write at most `pages_per_s_max` real pages, in pages of `scale` real ones.
    pub(super) fn new(
        guest: &GuestModel,
        scale: u64,
        pages_per_s_max: f64,
        random: Xoshiro256PlusPlus,
    ) -> Self {
        let wanted = guest.pages_per_s();
        let slowed = if wanted > pages_per_s_max { pages_per_s_max / wanted } else { 1.0 };
        let slow = |set: &WorkingSet| {
            let pages_per_s = set.pages_per_s * slowed / float(scale);
            WorkingSet { pages_per_s, ..*set }
        };
        let sets = guest.sets.iter().map(slow).zip(place(&guest.sets, scale)).collect();
        Self { page_count: guest.page_count(scale), sets, read_at: Duration::ZERO, stopped_at: None, random }
    }

    /// From `at` on it writes nothing.
    pub(super) fn stop(&mut self, at: Duration) {
        self.stopped_at = Some(at);
    }

    /// What was written since the last call, up to `at`.
    pub(super) fn read(&mut self, at: Duration) -> PageBitmap {
        let words_needed = PageBitmap::words_for(self.page_count);
        let mut words = vec![0; words_needed];
        let until = self.stopped_at.map_or(at, |stopped| at.min(stopped));
        let (from_s, to_s) =
            (self.read_at.as_secs_f64(), until.as_secs_f64().max(self.read_at.as_secs_f64()));
        self.read_at = until.max(self.read_at);
        for (set, place) in &self.sets {
            let (from, to) = (set.pages_per_s * from_s, set.pages_per_s * to_s);
            match set.order {
                Order::Linear => sweep(&mut words, *place, from, to),
                Order::Shuffled => {
                    let share = shuffled_share(from, to, float(place.pages));
                    scatter(&mut words, *place, share, &mut self.random);
                }
                Order::Uniform => {
                    let share = 1.0 - (-(to - from) / float(place.pages)).exp();
                    scatter(&mut words, *place, share, &mut self.random);
                }
            }
        }
        PageBitmap::from_words(words, self.page_count).expect("sets lie inside the guest's memory")
    }
}

/// `count` pages of a set as they would be dirty together.
pub(super) fn dirty_pages(guest: &GuestModel, set: usize, count: u64) -> PageBitmap {
    let page_count = guest.page_count(1);
    let mut words = vec![0; PageBitmap::words_for(page_count)];
    if let (Some(place), Some(set)) = (place(&guest.sets, 1).get(set), guest.sets.get(set)) {
        let count = count.min(place.pages);
        match set.order {
            Order::Linear => fill(&mut words, place.first, count),
            Order::Shuffled | Order::Uniform => {
                let share = float(count) / float(place.pages.max(1));
                scatter(&mut words, *place, share, &mut Xoshiro256PlusPlus::seed_from_u64(count));
            }
        }
    }
    PageBitmap::from_words(words, page_count).expect("sets lie inside the guest's memory")
}

/// The pages that a sweep writes from its `from`-th write to its `to`-th.
fn sweep(words: &mut [u64], place: Place, from: f64, to: f64) {
    let (from, to) = (whole(from), whole(to));
    if place.pages == 0 || from == to {
        return;
    }
    if to - from >= place.pages {
        return fill(words, place.first, place.pages);
    }
    let (first, count) = (from % place.pages, to - from);
    let before_wrap = count.min(place.pages - first);
    fill(words, place.first + first, before_wrap);
    fill(words, place.first, count - before_wrap);
}

/// The share of a set that is written at least once by writes `from` to `to` of passes in shuffled order: within a pass
/// no page comes twice, two passes know nothing of each other.
fn shuffled_share(from: f64, to: f64, pages: f64) -> f64 {
    let written = to - from;
    if pages <= 0.0 || written <= 0.0 {
        return 0.0;
    }
    let pass_end = ((from / pages).floor() + 1.0) * pages;
    let in_this_pass = written.min(pass_end - from) / pages;
    let in_next_pass = ((written - (pass_end - from)) / pages).clamp(0.0, 1.0);
    1.0 - (1.0 - in_this_pass) * (1.0 - in_next_pass)
}

/// Below this share it is faster to jump from one page to the next than to draw every word.
const SPARSE_SHARE: f64 = 1.0 / 64.0;

/// Adds each page of `place` with the chance `share`.
fn scatter(words: &mut [u64], place: Place, share: f64, random: &mut Xoshiro256PlusPlus) {
    // 16 bits of the chance are drawn; what rounds to none or all is none or all.
    let share_16 = whole(share * 65_536.0 + 0.5).min(65_536);
    if share >= 1.0 || share_16 == 65_536 {
        return fill(words, place.first, place.pages);
    }
    if share <= 0.0 {
        return;
    }
    if share < SPARSE_SHARE {
        let mut page = 0.0;
        loop {
            // The gaps between pages of a set with independent chances are geometric.
            let drawn: f64 = random.random();
            page += 1.0 + ((1.0 - drawn).ln() / (-share).ln_1p()).floor();
            if page > float(place.pages) {
                return;
            }
            fill(words, place.first + whole(page) - 1, 1);
        }
    }
    let (mut first, end) = (place.first, place.first + place.pages);
    while first < end {
        let count = (end - first).min(64 - first % 64);
        let kept = if count == 64 { u64::MAX } else { (1 << count) - 1 };
        words[index(first / 64)] |= (chance_word(share_16, random) & kept) << (first % 64);
        first += count;
    }
}

/// A word of which each bit is set with the chance `share_16` / 65,536: a random word for each binary digit, from the
/// last to the first, makes it more likely or less.
fn chance_word(share_16: u64, random: &mut Xoshiro256PlusPlus) -> u64 {
    let mut word = 0;
    for digit in share_16.trailing_zeros()..16 {
        let drawn = random.next_u64();
        word = if share_16 >> digit & 1 == 1 { word | drawn } else { word & drawn };
    }
    word
}

/// Adds `count` pages from `first`.
fn fill(words: &mut [u64], first: u64, count: u64) {
    let (mut page, end) = (first, first + count);
    while page < end {
        let bits = (end - page).min(64 - page % 64);
        let mask = if bits == 64 { u64::MAX } else { ((1 << bits) - 1) << (page % 64) };
        words[index(page / 64)] |= mask;
        page += bits;
    }
}

fn index(word: u64) -> usize {
    usize::try_from(word).expect("a bitmap fits the address space")
}

#[expect(clippy::cast_precision_loss, reason = "counts of pages stay below 2^53")]
fn float(count: u64) -> f64 {
    count as f64
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "never negative, below 2^53")]
fn whole(count: f64) -> u64 {
    count.max(0.0) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn memory(order: Order, pages_per_s: f64) -> GuestMemory {
        let set = WorkingSet { bytes: 64 * MIB, pages_per_s, order, packable_share: 0.0 };
        let guest = GuestModel { sets: vec![set], ..GuestModel::idle(256 * MIB, 1) };
        GuestMemory::new(&guest, 1, 1e9, Xoshiro256PlusPlus::seed_from_u64(1))
    }

    fn seconds(s: f64) -> Duration {
        Duration::from_secs_f64(s)
    }

    #[test]
    fn each_order_writes_as_many_pages_as_it_must() {
        // A set of 16,384 pages, half as many writes a second.
        for (order, after_1_s, after_5_s) in [
            (Order::Linear, 8192.0, 16384.0),
            (Order::Shuffled, 8192.0, 16384.0),
            (Order::Uniform, 6446.5, 15039.0),
        ] {
            let mut memory = memory(order, 8192.0);
            let first = float(memory.read(seconds(1.0)).count());
            let long = float(memory.read(seconds(6.0)).count());
            assert!((first - after_1_s).abs() <= 200.0, "{order:?}: {first}");
            assert!((long - after_5_s).abs() <= 200.0, "{order:?}: {long}");
            memory.stop(seconds(6.5));
            memory.read(seconds(7.0));
            assert_eq!(memory.read(seconds(9.0)).count(), 0, "{order:?}: a stopped guest writes nothing");
        }
    }

    #[test]
    fn few_writes_are_scattered_as_often_as_many() {
        let mut memory = memory(Order::Uniform, 16_384.0 * 0.001);
        let counts: Vec<u64> = (1..=400).map(|s| memory.read(seconds(f64::from(s))).count()).collect();
        let mean = float(counts.iter().sum()) / 400.0;
        assert!((mean - 16.4).abs() < 1.0, "{mean}");
    }

    #[test]
    fn writes_stay_inside_their_set_and_a_fast_guest_is_slowed_down() {
        let set = WorkingSet { bytes: 3 * MIB, pages_per_s: 1e6, order: Order::Uniform, packable_share: 0.0 };
        let sets = vec![set, WorkingSet { order: Order::Linear, ..set }];
        let guest = GuestModel { sets, ..GuestModel::idle(64 * MIB, 2) };
        let mut memory = GuestMemory::new(&guest, 1, 2e5, Xoshiro256PlusPlus::seed_from_u64(1));
        assert!((memory.sets[0].0.pages_per_s - 1e5).abs() < 1e-6);
        let ranges: Vec<(u64, u64)> =
            memory.read(seconds(1.0)).ranges().map(|range| (range.first(), range.count())).collect();
        assert_eq!(ranges, [(0, 768), (1024, 768)]);
    }

    #[test]
    fn large_guests_have_larger_pages_of_which_as_large_a_part_is_written() {
        assert_eq!(GuestModel::idle(1 << 40, 1).page_scale(), 1);
        assert_eq!(GuestModel::idle(16 << 40, 1).page_scale(), 16);
        assert_eq!(GuestModel::idle(17 << 40, 1).page_scale(), 32);
        for order in [Order::Linear, Order::Shuffled, Order::Uniform] {
            let set = WorkingSet { bytes: 256 * MIB, pages_per_s: 10_000.0, order, packable_share: 0.0 };
            let guest = GuestModel { sets: vec![set], ..GuestModel::idle(512 * MIB, 1) };
            let written = |scale: u64| {
                let mut memory = GuestMemory::new(&guest, scale, 1e9, Xoshiro256PlusPlus::seed_from_u64(1));
                float(memory.read(seconds(3.0)).count() * scale)
            };
            assert!(
                (written(16) / written(1) - 1.0).abs() < 0.03,
                "{order:?}: {} {}",
                written(16),
                written(1)
            );
        }
    }

    #[test]
    fn guests_that_can_not_be_are_refused() {
        let guest = GuestModel::idle(MIB, 1);
        let set = WorkingSet { bytes: 2 * MIB, pages_per_s: 1.0, order: Order::Linear, packable_share: 0.0 };
        let refused = |guest: &GuestModel| guest.layout(guest.page_scale()).unwrap_err();
        assert!(guest.layout(1).is_ok());
        assert!(matches!(refused(&GuestModel::idle(0, 1)), GuestError::Memory(0)));
        assert!(matches!(refused(&GuestModel::idle(65 << 40, 1)), GuestError::Memory(_)));
        assert!(matches!(refused(&GuestModel::idle(MIB, 0)), GuestError::Value { .. }));
        let full = GuestModel { sets: vec![set], ..guest.clone() };
        assert!(matches!(refused(&full), GuestError::Sets { .. }));
        let shares = GuestModel { zero_share: 0.7, packable_share: 0.7, ..guest };
        assert!(matches!(refused(&shares), GuestError::Value { .. }));
    }

    proptest! {
        #[test]
        fn a_sweep_is_the_pages_one_by_one(from in 0u64..5000, count in 0u64..3000, pages in 1u64..2000) {
            let mut words = vec![0; 64];
            sweep(&mut words, Place { first: 512, pages }, float(from), float(from + count));
            let swept = PageBitmap::from_words(words, 4096).unwrap();
            let mut single = PageBitmap::empty(4096);
            (from..from + count).for_each(|write| single.insert(512 + write % pages));
            prop_assert_eq!(swept, single);
        }

        #[test]
        fn scattered_pages_have_their_share(share in 0.0f64..1.0, pages in 100_000u64..200_000, first in 0u64..600) {
            let mut words = vec![0; PageBitmap::words_for(first + pages)];
            scatter(&mut words, Place { first, pages }, share, &mut Xoshiro256PlusPlus::seed_from_u64(7));
            let set = PageBitmap::from_words(words, first + pages).unwrap();
            prop_assert!((0..first).all(|page| !set.contains(page)));
            // Six standard deviations, and the rounding of the chance.
            let allowed = 6.0 * (float(pages) * share * (1.0 - share)).sqrt() + float(pages) / 65_536.0 + 1.0;
            prop_assert!((float(set.count()) - share * float(pages)).abs() <= allowed);
        }
    }
}
