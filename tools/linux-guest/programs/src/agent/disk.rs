//! The disk load: writers that write numbered blocks past the page cache, flush, and check what they read back.
//!
//! What the blocks look like, and which fault shows how, is in [`blocks`].

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, ensure};
use ferry_linux_guest_programs::Page;
use ferry_linux_guest_programs::blocks::{self, HOT_BLOCKS, Layout, Origin};
use ferry_linux_guest_programs::lines::Answer;
use nix::fcntl::OFlag;

use crate::loads::{Errors, Options, Workers};

/// After how many steps a writer flushes the disk.
const FLUSH_STEPS: u64 = 4;

/// The most writers, each with one request under way.
const WRITERS_MAX: u64 = 16;

#[derive(Debug)]
struct Shared {
    disk: File,
    layout: Layout,
    run: u64,
    /// How many steps each writer has done.
    steps: Vec<AtomicU64>,
    flushes: AtomicU64,
    lost: AtomicU64,
    repeated: AtomicU64,
    errors: Errors,
}

/// The load, running.
#[derive(Debug)]
pub(crate) struct Disk {
    shared: Arc<Shared>,
    workers: Workers,
}

impl Disk {
    /// Starts it: `device=` (/dev/vda), `writers=` (4), `run=` a number for this run (1). The disk's contents are lost.
    ///
    /// # Errors
    /// What can't be had.
    pub(crate) fn start(options: &Options) -> anyhow::Result<Self> {
        let path = options.text("device", "/dev/vda");
        let (writers, run) = (options.number("writers", 4)?, options.number("run", 1)?);
        ensure!((1..=WRITERS_MAX).contains(&writers), "give writers=1 to {WRITERS_MAX}");
        let disk = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlag::O_DIRECT.bits())
            .open(&path)
            .with_context(|| format!("{path} can't be opened"))?;
        let bytes = size_bytes(Path::new(&path)).with_context(|| format!("the size of {path}"))?;
        let layout = Layout::new(bytes, writers)
            .with_context(|| format!("{path} with {bytes} bytes is too small for {writers} writers"))?;
        let steps = (0..writers).map(|_| AtomicU64::new(0)).collect();
        let (flushes, lost, repeated) = Default::default();
        let shared =
            Arc::new(Shared { disk, layout, run, steps, flushes, lost, repeated, errors: Errors::default() });
        let works = (0..writers).map(|writer| {
            let shared = Arc::clone(&shared);
            move |stop: &AtomicBool| {
                if let Err(error) = shared.write(writer, stop) {
                    shared.errors.note(format!("writer {writer}: {error:#}"));
                }
            }
        });
        let workers = Workers::start("disk", works)?;
        Ok(Self { shared, workers })
    }

    /// What it has done so far.
    pub(crate) fn report(&self) -> Answer {
        self.shared.report()
    }

    /// Ends it, flushes, and reads back everything.
    pub(crate) fn stop(self) -> Answer {
        let Self { shared, workers } = self;
        workers.stop(&shared.errors);
        let mut places = 0;
        match shared.read_back() {
            Ok(read) => places = read,
            Err(error) => shared.errors.note(format!("the disk can't be read back: {error:#}")),
        }
        shared.report().with("read_back", places)
    }
}

/// The size of a block device, or of a file.
fn size_bytes(path: &Path) -> anyhow::Result<u64> {
    use std::io::{Seek, SeekFrom};
    Ok(File::open(path)?.seek(SeekFrom::End(0))?)
}

impl Shared {
    fn report(&self) -> Answer {
        let read = |value: &AtomicU64| value.load(Ordering::SeqCst);
        let mut answer = Answer::default();
        for (writer, steps) in self.steps.iter().enumerate() {
            answer = answer.with(&format!("steps{writer}"), read(steps));
        }
        answer
            .with("flushes", read(&self.flushes))
            .with("lost", read(&self.lost))
            .with("repeated", read(&self.repeated))
            .with("errors", self.errors.count())
            .noting(&self.errors.first())
    }

    fn write(&self, writer: u64, stop: &AtomicBool) -> anyhow::Result<()> {
        let mut page = Page::ZERO;
        let (run, layout) = (self.run, self.layout);
        let hot = |step| Origin { run, writer, step, place: layout.hot_place(writer, step) };
        for step in 0_u64.. {
            if stop.load(Ordering::SeqCst) {
                break;
            }
            if let Some(older) = step.checked_sub(HOT_BLOCKS)
                && let Err(wrong) = blocks::check(&self.disk, &mut page, hot(older))?
            {
                self.repeated.fetch_add(1, Ordering::SeqCst);
                self.errors.note(format!("a write was done again later: {wrong}"));
            }
            blocks::write(&self.disk, hot(step))?;
            blocks::write(&self.disk, Origin { run, writer, step, place: layout.log_place(writer, step) })?;
            if let Err(wrong) = blocks::check(&self.disk, &mut page, hot(step))? {
                self.lost.fetch_add(1, Ordering::SeqCst);
                self.errors.note(format!("a write was lost: {wrong}"));
            }
            if step % FLUSH_STEPS == FLUSH_STEPS - 1 {
                self.disk.sync_data().context("fsync")?;
                self.flushes.fetch_add(1, Ordering::SeqCst);
            }
            self.steps[usize::try_from(writer)?].store(step + 1, Ordering::SeqCst);
        }
        Ok(())
    }

    fn read_back(&self) -> anyhow::Result<u64> {
        self.disk.sync_data().context("fsync")?;
        let mut all = 0;
        for (writer, steps) in (0..).zip(&self.steps) {
            let steps = steps.load(Ordering::SeqCst);
            let (places, wrong) = blocks::read_back(&self.disk, self.layout, self.run, writer, steps)?;
            all += places;
            wrong.iter().for_each(|wrong| self.errors.note(format!("read back: {wrong}")));
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    use std::time::Duration;

    use super::*;

    /// A load on a file of 1 MiB, which is big enough for several laps of its hot rings.
    fn started(file: &tempfile::NamedTempFile) -> Disk {
        let mut writer = file.as_file();
        writer.write_all(&vec![0; 1 << 20]).unwrap();
        let line = format!("device={} writers=2 run=9", file.path().display());
        let disk = Disk::start(&Options::parse(&line).unwrap()).unwrap();
        while disk.report().number("steps1").unwrap() < 20 {
            std::thread::sleep(Duration::from_millis(5));
        }
        disk
    }

    #[test]
    fn a_disk_that_keeps_what_it_is_given_has_no_errors() {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let report = started(&file).stop();
        assert_eq!(report.number("errors"), Ok(0), "{report}");
        assert!(report.number("read_back").unwrap() > 20, "{report}");
    }

    #[test]
    fn a_disk_that_does_an_old_write_again_is_found_out() {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let disk = started(&file);
        let layout = disk.shared.layout;
        let old = Origin { run: 9, writer: 1, step: 1, place: layout.hot_place(1, 1) };
        let mut waited = 0;
        while disk.report().number("errors").unwrap() == 0 && waited < 1000 {
            blocks::write(file.as_file(), old).unwrap();
            // Past the writers' view of the file, which has no page cache.
            file.as_file().sync_data().unwrap();
            std::thread::sleep(Duration::from_millis(5));
            waited += 1;
        }
        let report = disk.stop();
        assert!(report.number("errors").unwrap() > 0 && !report.note().is_empty(), "{report}");
    }

    #[test]
    fn a_log_block_that_was_lost_is_found_in_the_end() {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let disk = started(&file);
        let place = disk.shared.layout.log_place(0, 3);
        file.as_file().write_all_at(&[0; 4096], place * 4096).unwrap();
        file.as_file().sync_data().unwrap();
        let laps = disk.report().number("steps0").unwrap() > 100;
        let report = disk.stop();
        assert!(laps || report.number("errors") == Ok(1), "{report}");
    }
}
