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
    /// A frame of a stream that broke is written after the source was told what has arrived.
    LateFrame,
    /// The source goes on as if what has not arrived had.
    KeptKnown,
    /// The target says of a page that was under way when its stream broke that it has arrived.
    OverclaimedPage,
    /// The source forgets what its devices have written, for the whole migration.
    ForgottenDeviceLog,
}

/// Every bug with its name on the command line.
const WORDS: [(Bug, &str); 9] = [
    (Bug::DroppedPage, "dropped-page"),
    (Bug::MisplacedPage, "misplaced-page"),
    (Bug::CorruptPage, "corrupt-page"),
    (Bug::StalePage, "stale-page"),
    (Bug::LateFrame, "late-frame"),
    (Bug::KeptKnown, "kept-known"),
    (Bug::OverclaimedPage, "overclaimed-page"),
    (Bug::LostDirtyBit, "lost-dirty-bit"),
    (Bug::ForgottenDeviceLog, "forgotten-device-log"),
];

impl Bug {
    /// All bugs.
    pub fn all() -> impl Iterator<Item = Self> {
        WORDS.into_iter().map(|(bug, _)| bug)
    }

    /// Its name on the command line.
    ///
    /// # Panics
    /// Never: every bug has one.
    #[must_use]
    pub fn word(self) -> &'static str {
        WORDS.into_iter().find(|(bug, _)| *bug == self).map(|(_, word)| word).expect("every bug has a name")
    }

    /// The bug of that name.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        WORDS.into_iter().find(|(_, name)| *name == word).map(|(bug, _)| bug)
    }

    /// Whether only a digest of all of memory shows it: what was sent and what arrived are the same.
    #[must_use]
    pub const fn is_of_the_log(self) -> bool {
        matches!(self, Self::LostDirtyBit | Self::ForgottenDeviceLog)
    }

    /// Whether it strikes only where the link breaks.
    #[must_use]
    pub const fn needs_a_break(self) -> bool {
        match self {
            Self::LateFrame | Self::KeptKnown | Self::OverclaimedPage => true,
            Self::DroppedPage
            | Self::MisplacedPage
            | Self::CorruptPage
            | Self::StalePage
            | Self::LostDirtyBit
            | Self::ForgottenDeviceLog => false,
        }
    }
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
            Some(
                Bug::MisplacedPage
                | Bug::StalePage
                | Bug::LostDirtyBit
                | Bug::ForgottenDeviceLog
                | Bug::LateFrame
                | Bug::KeptKnown
                | Bug::OverclaimedPage,
            )
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

    /// Whether a frame that was under way when its stream ended lands all the same.
    pub(super) fn lets_land_late(&mut self) -> bool {
        let strikes = self.bug == Some(Bug::LateFrame) && !self.struck;
        self.struck |= strikes;
        strikes
    }

    /// Whether the source does not forget what it knew of `lacking_pages`.
    pub(super) fn keeps_known(&mut self, lacking_pages: u64) -> bool {
        let strikes = self.bug == Some(Bug::KeptKnown) && lacking_pages > 0;
        self.struck |= strikes;
        strikes
    }

    /// Whether the target says to have `page`, which was under way when the stream ended.
    pub(super) fn overclaims(&mut self, arrived: &PageBitmap, page: u64) -> bool {
        let strikes = self.bug == Some(Bug::OverclaimedPage) && !self.struck && !arrived.contains(page);
        self.struck |= strikes;
        strikes
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
