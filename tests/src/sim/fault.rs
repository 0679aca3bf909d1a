//! Bugs that are put into the simulated hosts on purpose: a check that never fails proves nothing.

use ferry_protocol::PageBitmap;

use super::memory::Page;
use super::random::Random;

/// A bug that strikes one page, once, in the first attempt of a seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// A page that the sender has counted never arrives.
    DroppedPage,
    /// The receiver writes a page into its neighbour's place.
    MisplacedPage,
    /// A bit of a page flips on the way.
    CorruptPage,
    /// An older copy of a page is written over a newer one.
    StalePage,
    /// The source's dirty log loses a page that the guest has written.
    LostDirtyBit,
    /// The source forgets what its devices have written, for the whole migration.
    ForgottenDeviceLog,
}

/// What becomes of a page that arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Kept,
    Dropped,
    /// It is written to this page instead.
    Misplaced(u64),
    /// Bit 0 of this byte flips.
    Corrupt(usize),
    /// What was there before is written again behind it.
    Stale,
}

/// When a bug strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// In the first round (or, where that makes no sense, as soon as it does).
    First,
    /// In the round that is sent while the guest stands still.
    Last,
}

/// The bug of one attempt.
#[derive(Debug)]
pub(super) struct Injection {
    bug: Option<Bug>,
    stage: Stage,
    /// Pages that are let through before it strikes.
    skip: u64,
    byte: usize,
    pub(super) struck: bool,
}

/// The round that is under way.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Round {
    pub(super) fence: u32,
    pub(super) paused: bool,
}

impl Injection {
    pub(super) fn new(bug: Option<Bug>, random: &mut Random) -> Self {
        let stage = random.pick(&[Stage::First, Stage::Last]);
        let skip_max = if stage == Stage::First { 250 } else { 4 };
        Self {
            bug,
            stage,
            skip: random.below(skip_max),
            byte: usize::try_from(random.below(4096)).expect("below 4096"),
            struck: false,
        }
    }

    pub(super) fn fate(&mut self, round: Round, page: u64, page_count: u64, old: &Page, new: &Page) -> Fate {
        let fate = match self.bug {
            Some(Bug::DroppedPage) => Fate::Dropped,
            Some(Bug::MisplacedPage) if page + 1 < page_count => Fate::Misplaced(page + 1),
            Some(Bug::CorruptPage) => Fate::Corrupt(self.byte),
            Some(Bug::StalePage) if round.fence > 1 => Fate::Stale,
            Some(Bug::MisplacedPage | Bug::StalePage | Bug::LostDirtyBit | Bug::ForgottenDeviceLog)
            | None => {
                return Fate::Kept;
            }
        };
        // A page that arrives as it already was can't show what became of it.
        if old == new || self.struck || !self.due(round) || !self.skipped() {
            return Fate::Kept;
        }
        self.struck = true;
        fate
    }

    /// The dirty log as the buggy source reads it, of KVM's and the devices'.
    pub(super) fn dirty_log(
        &mut self,
        round: Round,
        mut kvm: PageBitmap,
        devices: &PageBitmap,
    ) -> PageBitmap {
        if self.bug == Some(Bug::ForgottenDeviceLog) {
            self.struck = true;
            return kvm;
        }
        kvm.union(devices);
        // The first log is not used: everything is sent anyway.
        if self.bug != Some(Bug::LostDirtyBit) || self.struck || round.fence == 0 || !self.due(round) {
            return kvm;
        }
        let pages: Vec<u64> = kvm.ranges().flat_map(|r| r.first()..r.first() + r.count()).collect();
        let Some(&lost) = pages.get(usize::try_from(self.skip).expect("small") % pages.len().max(1)) else {
            return kvm;
        };
        kvm.remove(lost);
        self.struck = true;
        kvm
    }

    fn due(&self, round: Round) -> bool {
        match self.stage {
            Stage::First => true,
            Stage::Last => round.paused,
        }
    }

    fn skipped(&mut self) -> bool {
        let over = self.skip == 0;
        self.skip = self.skip.saturating_sub(1);
        over
    }
}
