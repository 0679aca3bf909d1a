//! Which faults a campaign has: for each its place, what happens there, and for how long.
//!
//! ```text
//!  seed ──> order of the places (every step of either side) ──> fault 0, 1, 2, ... each with a seed of its own
//!           what happens rotates, so that each place sees something else the next time it comes
//! ```
//!
//! Fault N of a seed is always the same, however many there are, so that any can be had again alone.

use std::fmt;
use std::time::Duration;

use ferry_migrate::fault::{RecordOf, SourceStep, Step, TargetStep};
use ferry_migrate::protocol::message::MessageType;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::places::{self, Place};

/// An end of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// Where the guest is at first: host A.
    Source,
    /// Where it goes: host B.
    Target,
}

impl Side {
    /// The other end.
    #[must_use]
    pub const fn peer(self) -> Self {
        match self {
            Self::Source => Self::Target,
            Self::Target => Self::Source,
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Source => "source",
            Self::Target => "target",
        })
    }
}

/// Which frames between the hosts are lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// The source's cable is pulled: all, and its interface shows it.
    CableOfSource,
    /// The target's cable.
    CableOfTarget,
    /// Those towards the target, silently.
    TowardsTarget,
    /// Those towards the source, silently.
    TowardsSource,
    /// Both ways, silently.
    BothWays,
}

/// What happens at the place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// The process that comes there is killed (SIGKILL).
    Kill,
    /// The same, but before that it is held for a moment, in which whatever it has started too early shows.
    HoldAndKill,
    /// The other one is.
    KillPeer,
    /// The process that comes there stands still (SIGSTOP) for a time.
    Stall(Duration),
    /// The other one does.
    StallPeer(Duration),
    /// The link is cut for a time.
    Cut(Cut, Duration),
    /// The link is cut until both sides have noticed.
    CutForLong(Cut),
    /// The link is cut until the source tries to make it again.
    CutUntilNoticed(Cut),
}

impl Effect {
    /// Its kind in a word or two, for tables.
    #[must_use]
    pub const fn kind(self) -> &'static str {
        match self {
            Self::Kill | Self::HoldAndKill => "killed",
            Self::KillPeer => "peer killed",
            Self::Stall(_) => "stalled",
            Self::StallPeer(_) => "peer stalled",
            Self::Cut(..) => "cut",
            Self::CutForLong(_) => "long cut",
            Self::CutUntilNoticed(_) => "noticed cut",
        }
    }

    /// Whether a migration must get over it.
    #[must_use]
    pub const fn is_passing(self) -> bool {
        match self {
            Self::Stall(_) | Self::StallPeer(_) | Self::Cut(..) | Self::CutUntilNoticed(_) => true,
            Self::Kill | Self::HoldAndKill | Self::KillPeer | Self::CutForLong(_) => false,
        }
    }
}

/// What goes wrong first, so that the place is reached at all: some steps only come after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Before {
    /// Nothing.
    Nothing,
    /// A page is damaged on its way, so the digests differ.
    PageDamaged,
    /// The source has no space for the record of its commit.
    NoSpaceAtSource,
    /// The target has no space for the record that it runs.
    NoSpaceAtTarget,
    /// The operator cancels when the first round is over.
    Cancelled,
    /// A data stream breaks in the first round, so that the link has to be made again.
    LinkBroken,
}

impl Before {
    /// Whether a migration must get over it.
    #[must_use]
    pub const fn is_passing(self) -> bool {
        match self {
            Self::Nothing | Self::LinkBroken => true,
            Self::PageDamaged | Self::NoSpaceAtSource | Self::NoSpaceAtTarget | Self::Cancelled => false,
        }
    }

    /// The fault that this is, and in which process.
    #[must_use]
    pub const fn fault(self) -> Option<(Side, &'static str)> {
        match self {
            Self::Nothing | Self::Cancelled => None,
            Self::PageDamaged => Some((Side::Target, "target-frame-arrives:2:damage")),
            Self::NoSpaceAtSource => Some((Side::Source, "record-committed-written:1:fail")),
            Self::LinkBroken => Some((Side::Source, "source-chunk-sends:4:fail")),
            Self::NoSpaceAtTarget => Some((Side::Target, "record-running-written:1:fail")),
        }
    }
}

/// What the guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// It has an address and answers for it.
    Network,
    /// It writes to its memory.
    Memory,
}

/// A fault of a campaign.
#[derive(Debug, Clone)]
pub struct Fault {
    /// Which one.
    pub number: u64,
    /// Its own seed.
    pub seed: u64,
    /// In which process.
    pub side: Side,
    /// At which step.
    pub step: Step,
    /// At the how manieth time, from 1.
    pub nth: u64,
    /// What goes wrong before.
    pub before: Before,
    /// What happens.
    pub effect: Effect,
    /// What the guest does meanwhile.
    pub load: Load,
    /// Whether it has a disk, whose lock alone would keep it from running twice.
    pub disk: bool,
    /// Whether the hosts have certificates, so that it happens to connections with TLS.
    pub tls: bool,
}

impl Fault {
    /// Whether it comes while the migration is still being arranged: before pages move, there is nothing to take up again.
    #[must_use]
    pub const fn is_arranging(&self) -> bool {
        use MessageType::{Admit, Describe, Hello, KeepFor, Ready, Welcome};
        match self.step {
            Step::Sends(message) | Step::Sent(message) | Step::Receives(message) => {
                matches!(message, Admit | Describe | Hello | KeepFor | Ready | Welcome)
            }
            Step::Record(of, _) => matches!(of, RecordOf::Receiving),
            Step::Source(step) => {
                matches!(step, SourceStep::Connects | SourceStep::Connected | SourceStep::OpensStreams)
            }
            Step::Target(step) => matches!(step, TargetStep::Builds | TargetStep::Built),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, seed, side, step, nth, before, effect, load, disk, tls } = self;
        write!(f, "fault {number} (seed {seed:016x}): {effect:?} at {side} {step}:{nth}, guest {load:?}")?;
        write!(f, "{}", if *disk { " with a disk" } else { "" })?;
        write!(f, "{}", if *tls { ", with certificates" } else { "" })?;
        if *before == Before::Nothing { Ok(()) } else { write!(f, ", after {before:?}") }
    }
}

/// Shorter than any patience of ferry's.
const SHORT_MS: std::ops::Range<u64> = 50..900;

/// One fault in so many happens to hosts with certificates.
const ONE_IN_WITH_TLS: u64 = 4;

/// How many effects there are to choose from.
const EFFECTS: u64 = 12;

/// One of [`EFFECTS`]; those that end at once are the more frequent ones.
fn effect(which: u64, random: &mut ChaCha8Rng) -> Effect {
    let time = Duration::from_millis(random.random_range(SHORT_MS));
    let cable = if random.random_bool(0.5) { Cut::CableOfSource } else { Cut::CableOfTarget };
    match which % EFFECTS {
        0 | 4 => Effect::Kill,
        8 => Effect::HoldAndKill,
        1 | 6 => Effect::KillPeer,
        2 => Effect::Stall(time),
        3 => Effect::Cut(cable, time),
        5 => Effect::CutForLong(if random.random_bool(0.5) { Cut::BothWays } else { cable }),
        7 => Effect::StallPeer(time),
        9 => Effect::Cut(Cut::TowardsTarget, time),
        10 => Effect::Cut(Cut::TowardsSource, time),
        _ => {
            let ways = [Cut::TowardsTarget, Cut::TowardsSource, Cut::BothWays, cable];
            let way = ways[random.random_range(0..ways.len())];
            if random.random_bool(0.5) { Effect::CutForLong(way) } else { Effect::CutUntilNoticed(way) }
        }
    }
}

/// Fault `number` of the campaign with `seed`.
#[must_use]
pub fn fault(seed: u64, number: u64) -> Fault {
    let places = places::all();
    let count = u64::try_from(places.len()).expect("a few hundred");
    let (cycle, position) = (number / count, number % count);
    let mut order: Vec<usize> = (0..places.len()).collect();
    let mut shuffler = ChaCha8Rng::seed_from_u64(seed ^ cycle.rotate_right(8));
    order.shuffle(&mut shuffler);
    let index = order[usize::try_from(position).expect("below their count")];
    let Place { side, step, nth_min, nth_max, before } = places[index];
    let own = splitmix(seed ^ splitmix(number));
    let mut random = ChaCha8Rng::seed_from_u64(own);
    // Each place begins elsewhere in the list of effects, by the seed, and goes on from there cycle by cycle.
    let first = splitmix(seed.wrapping_add(u64::try_from(index).expect("a few hundred")));
    let effect = effect(first.wrapping_add(cycle.wrapping_mul(5)), &mut random);
    let nth = random.random_range(nth_min..=nth_max);
    let load = if random.random_bool(0.5) { Load::Network } else { Load::Memory };
    let disk = random.random_bool(0.5);
    // By its number, so that the seed's choices are what they were without.
    let tls = number.is_multiple_of(ONE_IN_WITH_TLS);
    Fault { number, seed: own, side, step, nth, before, effect, load, disk, tls }
}

/// The finaliser of SplitMix64: numbers that lie close together become far apart.
const fn splitmix(mut number: u64) -> u64 {
    number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn two_hundred_faults_come_to_every_place_and_are_of_every_kind() {
        let faults: Vec<Fault> = (0..200).map(|number| fault(7, number)).collect();
        for place in places::all() {
            let comes = |fault: &&Fault| {
                (fault.side, fault.step, fault.before) == (place.side, place.step, place.before)
            };
            assert!(faults.iter().any(|fault| comes(&fault)), "{place:?} is left out");
        }
        let kinds: HashSet<_> = faults.iter().map(|fault| fault.effect.kind()).collect();
        assert_eq!(kinds.len(), 7, "{kinds:?}");
        let with_tls: HashSet<_> =
            faults.iter().filter(|fault| fault.tls).map(|fault| fault.effect.kind()).collect();
        assert_eq!(with_tls.len(), 7, "with certificates: {with_tls:?}");
    }

    #[test]
    fn a_fault_is_the_same_whenever_it_is_asked_for() {
        assert_eq!(fault(7, 130).to_string(), fault(7, 130).to_string());
        assert_ne!(fault(7, 130).seed, fault(8, 130).seed);
        assert_ne!(fault(7, 130).seed, fault(7, 131).seed);
    }
}
