//! Every place where something can go wrong: the steps of a migration on either side, as far as a migration comes to them.
//!
//! That each of them is really come to is checked by the campaign itself: a fault whose place is not reached is a failure.

use ferry_migrate::fault::{RecordOf, RecordStep, SourceStep, Step, TargetStep};
use ferry_migrate::protocol::message::MessageType;

use crate::plan::{Before, Side};

/// A place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// In which process.
    pub side: Side,
    /// At which step.
    pub step: Step,
    /// At the how manieth time at first, from 1.
    pub nth_min: u64,
    /// How often a migration comes to it at least.
    pub nth_max: u64,
    /// What has to go wrong before.
    pub before: Before,
}

/// What the source says and hears when all goes well, in order.
const SOURCE_SAYS: [MessageType; 9] = [
    MessageType::Hello,
    MessageType::Describe,
    MessageType::KeepFor,
    MessageType::Ping,
    MessageType::Rehearse,
    MessageType::Stopping,
    MessageType::State,
    MessageType::Prepare,
    MessageType::Commit,
];

/// The target likewise.
const TARGET_SAYS: [MessageType; 8] = [
    MessageType::Welcome,
    MessageType::Admit,
    MessageType::Ready,
    MessageType::Pong,
    MessageType::Rehearsed,
    MessageType::FenceReached,
    MessageType::Prepared,
    MessageType::Running,
];

/// What the source does when all goes well, with how often it does at least.
const SOURCE_DOES: [(SourceStep, u64); 20] = [
    (SourceStep::Connects, 1),
    (SourceStep::Connected, 1),
    (SourceStep::OpensStreams, 1),
    (SourceStep::StreamsOpened, 1),
    (SourceStep::StartsDirtyLog, 1),
    (SourceStep::DirtyLogStarted, 1),
    (SourceStep::ReadsDirtyLog, 2),
    (SourceStep::DirtyLogRead, 2),
    (SourceStep::RoundStarts, 2),
    (SourceStep::ChunkSends, 8),
    (SourceStep::RoundEnds, 2),
    (SourceStep::Pauses, 1),
    (SourceStep::Paused, 1),
    (SourceStep::Saves, 1),
    (SourceStep::Saved, 1),
    (SourceStep::LetsGo, 1),
    (SourceStep::HasLetGo, 1),
    (SourceStep::ClosesStreams, 1),
    (SourceStep::Releases, 1),
    (SourceStep::Finishes, 1),
];

/// The target likewise.
const TARGET_DOES: [(TargetStep, u64); 13] = [
    (TargetStep::Builds, 1),
    (TargetStep::Built, 1),
    (TargetStep::FrameArrives, 8),
    (TargetStep::FenceReached, 2),
    (TargetStep::DropsStaleFrames, 1),
    (TargetStep::Restores, 1),
    (TargetStep::Restored, 1),
    (TargetStep::Runs, 1),
    (TargetStep::TookDisks, 1),
    (TargetStep::Started, 1),
    (TargetStep::Running, 1),
    (TargetStep::Announces, 1),
    (TargetStep::Finishes, 1),
];

/// All places.
#[must_use]
pub fn all() -> Vec<Place> {
    let mut places = Vec::new();
    let mut add = |side, step, nth_max, before| {
        places.push(Place { side, step, nth_min: 1, nth_max, before });
    };
    let none = Before::Nothing;
    for (says, side) in [(&SOURCE_SAYS[..], Side::Source), (&TARGET_SAYS[..], Side::Target)] {
        for message in says {
            add(side, Step::Sends(*message), 1, none);
            add(side, Step::Sent(*message), 1, none);
            add(side.peer(), Step::Receives(*message), 1, none);
        }
    }
    // The source leaves once it has handed this to its connection, so it need not be written or arrive.
    add(Side::Source, Step::Sends(MessageType::Released), 1, none);
    for step in RecordStep::ALL {
        // The first is written when the guest is started, long before.
        add(Side::Source, Step::Record(RecordOf::Committed, *step), 1, none);
        add(Side::Source, Step::Record(RecordOf::Released, *step), 1, none);
        add(Side::Target, Step::Record(RecordOf::Receiving, *step), 2, none);
        add(Side::Target, Step::Record(RecordOf::Running, *step), 1, none);
    }
    SOURCE_DOES.iter().for_each(|(step, nth)| add(Side::Source, Step::Source(*step), *nth, none));
    TARGET_DOES.iter().for_each(|(step, nth)| add(Side::Target, Step::Target(*step), *nth, none));
    after_failures(&mut add);
    after_a_broken_link(&mut places);
    places
}

/// Places that are only come to once the link has broken: the migration is taken up again.
fn after_a_broken_link(places: &mut Vec<Place>) {
    let (source, target) = (Side::Source, Side::Target);
    let first = [
        (source, Step::Source(SourceStep::StreamFailed)),
        (source, Step::Source(SourceStep::ClosesStreams)),
        (source, Step::Sends(MessageType::Resume)),
        (source, Step::Sent(MessageType::Resume)),
        (source, Step::Receives(MessageType::Arrived)),
        (source, Step::Source(SourceStep::ReopensStreams)),
        (target, Step::Target(TargetStep::EndsStreams)),
        (target, Step::Target(TargetStep::StreamsEnded)),
        (target, Step::Target(TargetStep::Reconnected)),
        (target, Step::Receives(MessageType::Resume)),
        (target, Step::Target(TargetStep::ExpectsStreams)),
        (target, Step::Sends(MessageType::Arrived)),
        (target, Step::Sent(MessageType::Arrived)),
    ];
    let second = [
        (source, Step::Source(SourceStep::Connects)),
        (source, Step::Source(SourceStep::Connected)),
        (source, Step::Sends(MessageType::Hello)),
        (source, Step::Source(SourceStep::StreamsOpened)),
    ];
    let before = Before::LinkBroken;
    let first = first.into_iter().map(|(side, step)| Place { side, step, nth_min: 1, nth_max: 1, before });
    let second = second.into_iter().map(|(side, step)| Place { side, step, nth_min: 2, nth_max: 2, before });
    places.extend(first.chain(second));
}

/// Places that are only come to once something has failed.
fn after_failures(add: &mut impl FnMut(Side, Step, u64, Before)) {
    let source = |step| (Side::Source, Step::Source(step));
    let target = |step| (Side::Target, Step::Target(step));
    let discarded = |step| (Side::Target, Step::Record(RecordOf::Discarded, step));
    // The source takes the guest back after its commit.
    for (side, step) in [
        (Side::Source, Step::Receives(MessageType::Discarded)),
        source(SourceStep::Resumes),
        source(SourceStep::TookBack),
        source(SourceStep::Resumed),
        source(SourceStep::StopsDirtyLog),
        target(TargetStep::Discards),
        discarded(RecordStep::Written),
        discarded(RecordStep::Renamed),
        discarded(RecordStep::Durable),
        (Side::Target, Step::Sends(MessageType::Discarded)),
        (Side::Target, Step::Sent(MessageType::Discarded)),
    ] {
        add(side, step, 1, Before::NoSpaceAtTarget);
    }
    // The target finds that memory is not what was sent.
    for (side, step) in [
        (Side::Target, Step::Sends(MessageType::Abort)),
        (Side::Target, Step::Sent(MessageType::Abort)),
        (Side::Source, Step::Receives(MessageType::Abort)),
        source(SourceStep::Resumes),
        target(TargetStep::Discards),
        discarded(RecordStep::Begins),
        discarded(RecordStep::Synced),
    ] {
        add(side, step, 1, Before::PageDamaged);
    }
    // The source can't commit.
    for (side, step) in [
        (Side::Source, Step::Sends(MessageType::Abort)),
        (Side::Source, Step::Sent(MessageType::Abort)),
        (Side::Target, Step::Receives(MessageType::Abort)),
        source(SourceStep::Resumes),
        source(SourceStep::Resumed),
        discarded(RecordStep::Created),
    ] {
        add(side, step, 1, Before::NoSpaceAtSource);
    }
    // The operator gives up.
    for (side, step) in [
        source(SourceStep::Cancelled),
        (Side::Source, Step::Sends(MessageType::Abort)),
        (Side::Target, Step::Receives(MessageType::Abort)),
        source(SourceStep::StopsDirtyLog),
        target(TargetStep::Discards),
    ] {
        add(side, step, 1, Before::Cancelled);
    }
}
