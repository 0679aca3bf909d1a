//! What the disk writer leaves on a disk, and how a lost or repeated write shows.
//!
//! Every writer has a part of the disk, and every step `n` of it writes two blocks:
//!
//! ```text
//!   | hot ring: n mod 4 | log: n mod (all the rest) |
//! ```
//!
//! A block says which run, writer, step and place it is, in every word. A place of the *log* is written once a lap, so
//! that reading all of it back finds each write that was lost. A place of the *hot ring* is written again a few
//! milliseconds later: the writer reads it right after writing, where a stale block is a lost write, and once more
//! before writing it again, where a stale block is an older write that was done again over a newer one.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use zerocopy::IntoBytes;

use crate::{PAGE_BYTES, Page, fill, first_difference, spread};

/// The places of a hot ring.
pub const HOT_BLOCKS: u64 = 4;

const MAGIC: u64 = u64::from_le_bytes(*b"ferryblk");

/// How a disk is divided among writers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    part_blocks: u64,
    writers: u64,
}

impl Layout {
    /// Divides `disk_bytes` among `writers`; `None` if a part would not hold both rings.
    #[must_use]
    pub fn new(disk_bytes: u64, writers: u64) -> Option<Self> {
        let part_blocks = (disk_bytes / PAGE_BYTES as u64).checked_div(writers)?;
        (part_blocks > HOT_BLOCKS).then_some(Self { part_blocks, writers })
    }

    /// How many writers there are.
    #[must_use]
    pub fn writers(self) -> u64 {
        self.writers
    }

    /// The steps until the log's places are used again.
    #[must_use]
    pub fn lap_steps(self) -> u64 {
        self.part_blocks - HOT_BLOCKS
    }

    /// The place, counted in blocks from the disk's start, where `writer` puts the hot block of `step`.
    #[must_use]
    pub fn hot_place(self, writer: u64, step: u64) -> u64 {
        writer * self.part_blocks + step % HOT_BLOCKS
    }

    /// The place where `writer` logs `step`.
    #[must_use]
    pub fn log_place(self, writer: u64, step: u64) -> u64 {
        writer * self.part_blocks + HOT_BLOCKS + step % self.lap_steps()
    }
}

/// Which write a block comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The number of the run.
    pub run: u64,
    /// The writer.
    pub writer: u64,
    /// Its step.
    pub step: u64,
    /// Where the block belongs, in blocks from the disk's start.
    pub place: u64,
}

impl Origin {
    /// The block as it has to be.
    #[must_use]
    pub fn block(self) -> Page {
        let mut page = Page::ZERO;
        let [magic, run, writer, step, place, pattern @ ..] = &mut page.0;
        (*magic, *run, *writer, *step, *place) = (MAGIC, self.run, self.writer, self.step, self.place);
        fill(self.seed(), pattern);
        page
    }

    /// Which write `page` comes from, if it is one of ours and whole.
    #[must_use]
    pub fn of(page: &Page) -> Option<Self> {
        let [magic, run, writer, step, place, pattern @ ..] = &page.0;
        let origin = Self { run: *run, writer: *writer, step: *step, place: *place };
        let ours = *magic == MAGIC && first_difference(origin.seed(), pattern).is_none();
        ours.then_some(origin)
    }

    fn seed(self) -> u64 {
        spread(spread(spread(self.run) ^ self.writer) ^ self.step) ^ self.place
    }
}

/// A place of the disk that does not hold what was last written there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrongBlock {
    /// What has to be there.
    pub expected: Origin,
    /// What is there, if it is a whole block of ours.
    pub found: Option<Origin>,
}

impl fmt::Display for WrongBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Origin { run, writer, step, place } = self.expected;
        write!(f, "block {place} should hold step {step} of writer {writer} in run {run} and holds ")?;
        match self.found {
            Some(Origin { run, writer, step, place }) => {
                write!(f, "step {step} of writer {writer} in run {run}, which belongs to block {place}")
            }
            None => f.write_str("no whole block"),
        }
    }
}

/// Reads the block at `expected.place` into `page` and checks it.
///
/// # Errors
/// That the file can't be read there.
pub fn check(file: &File, page: &mut Page, expected: Origin) -> io::Result<Result<(), WrongBlock>> {
    file.read_exact_at(page.0.as_mut_bytes(), expected.place * PAGE_BYTES as u64)?;
    let found = Origin::of(page);
    Ok(if found == Some(expected) { Ok(()) } else { Err(WrongBlock { expected, found }) })
}

/// Writes the block of `origin` to its place.
///
/// # Errors
/// That the file can't be written there.
pub fn write(file: &File, origin: Origin) -> io::Result<()> {
    file.write_all_at(origin.block().0.as_bytes(), origin.place * PAGE_BYTES as u64)
}

/// Reads back everything that `writer` wrote in the `steps` steps of `run`, and returns how many places were read
/// and those that are wrong.
///
/// # Errors
/// That the file can't be read.
pub fn read_back(
    file: &File,
    layout: Layout,
    run: u64,
    writer: u64,
    steps: u64,
) -> io::Result<(u64, Vec<WrongBlock>)> {
    let (mut page, mut wrong, mut places) = (Page::ZERO, Vec::new(), 0);
    let hot = (steps.saturating_sub(HOT_BLOCKS)..steps).map(|step| (step, layout.hot_place(writer, step)));
    let logged = steps.saturating_sub(layout.lap_steps())..steps;
    let log = logged.map(|step| (step, layout.log_place(writer, step)));
    for (step, place) in hot.chain(log) {
        places += 1;
        wrong.extend(check(file, &mut page, Origin { run, writer, step, place })?.err());
    }
    Ok((places, wrong))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCKS: u64 = 40;

    fn written(steps: u64) -> (File, Layout) {
        let file = nix::sys::memfd::memfd_create("disk", nix::sys::memfd::MFdFlags::empty()).unwrap();
        let file = File::from(file);
        file.set_len(BLOCKS * PAGE_BYTES as u64).unwrap();
        let layout = Layout::new(BLOCKS * PAGE_BYTES as u64, 2).unwrap();
        for (writer, step) in (0..2).flat_map(|writer| (0..steps).map(move |step| (writer, step))) {
            for place in [layout.hot_place(writer, step), layout.log_place(writer, step)] {
                write(&file, Origin { run: 1, writer, step, place }).unwrap();
            }
        }
        (file, layout)
    }

    #[test]
    fn what_was_written_reads_back_whole_whatever_the_lap() {
        for steps in [0, 1, HOT_BLOCKS, 15, 16, 17, 50] {
            let (file, layout) = written(steps);
            for writer in 0..2 {
                let (places, wrong) = read_back(&file, layout, 1, writer, steps).unwrap();
                assert_eq!(places, steps.min(HOT_BLOCKS) + steps.min(16), "{steps} steps");
                assert_eq!(wrong, [], "{steps} steps");
            }
        }
    }

    #[test]
    fn lost_repeated_misplaced_and_torn_blocks_are_found() {
        let (file, layout) = written(50);
        let place = layout.log_place(1, 40);
        let wrong = || read_back(&file, layout, 1, 1, 50).unwrap().1;
        // As if step 40 had been lost, or step 24 repeated.
        write(&file, Origin { run: 1, writer: 1, step: 24, place }).unwrap();
        assert_eq!(wrong()[0].found.unwrap().step, 24);
        // A block of another place.
        let elsewhere = Origin { run: 1, writer: 1, step: 40, place: place + 1 };
        file.write_all_at(elsewhere.block().0.as_bytes(), place * PAGE_BYTES as u64).unwrap();
        assert!(wrong()[0].to_string().contains(&format!("belongs to block {}", place + 1)));
        // The right one again, and one of its bits changed.
        write(&file, Origin { run: 1, writer: 1, step: 40, place }).unwrap();
        assert_eq!(wrong(), []);
        file.write_all_at(&[0xff], place * PAGE_BYTES as u64 + 3000).unwrap();
        assert_eq!(wrong()[0].found, None);
    }

    #[test]
    fn no_two_writers_share_a_place() {
        let layout = Layout::new(BLOCKS * PAGE_BYTES as u64, 2).unwrap();
        let places =
            |writer| (0..200).flat_map(move |n| [layout.hot_place(writer, n), layout.log_place(writer, n)]);
        assert!(places(0).all(|place| place < BLOCKS / 2));
        assert!(places(1).all(|place| (BLOCKS / 2..BLOCKS).contains(&place)));
        assert!(Layout::new(10 * PAGE_BYTES as u64, 2).is_some());
        assert_eq!(Layout::new(8 * PAGE_BYTES as u64, 2), None);
        assert_eq!(Layout::new(1 << 20, 0), None);
    }
}
