//! What a seed stands for: a guest, a link and the troubles that befall a migration.

use std::time::Duration;

use ferry_protocol::message::MessageType;
use ferry_protocol::page::Compression;
use ferry_protocol::source::OnTimeout;
use ferry_protocol::{MemoryLayout, Region};

use super::fault::Bug;
use super::guest::Work;
use super::random::Random;

/// Everything that is drawn before the world begins.
#[derive(Debug, Clone)]
pub(super) struct Scenario {
    pub(super) layout: MemoryLayout,
    pub(super) work: Work,
    pub(super) streams: u16,
    pub(super) compression: Compression,
    pub(super) link: LinkSpec,
    pub(super) budget: Duration,
    pub(super) timeout: Duration,
    pub(super) on_timeout: OnTimeout,
    pub(super) reconnect: Duration,
    /// Whether the source also reads all of the paused guest's memory.
    pub(super) verify_whole: bool,
    /// What happens during the first attempt; further ones are left in peace.
    pub(super) troubles: Vec<Trouble>,
}

/// A link between two hosts.
#[derive(Debug, Clone, Copy)]
pub(super) struct LinkSpec {
    pub(super) bytes_per_s: u64,
    pub(super) latency: Duration,
    /// Of a hundred messages and frames, those that TCP has to send again.
    pub(super) loss_percent: u64,
}

/// Something that goes wrong, once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trouble {
    pub(super) when: When,
    pub(super) what: What,
}

/// What sets a trouble off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    /// This long after the beginning.
    After(Duration),
    /// As this message is to be sent; a cut takes the message with it.
    Sending(MessageType),
    /// As the dirty log is read for the time of this number: what it names is on its way then.
    ReadingLog(u64),
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// The control connection breaks and can't be made again for a while.
    CutControl(Duration),
    /// So do all connections.
    CutAll(Duration),
    /// The data streams break.
    CutStreams,
    /// Nothing passes for a while; TCP delivers it afterwards, unless that takes too long for it.
    Partition(Duration, Way),
    /// The operator at the source cancels.
    CancelAtSource,
    /// The operator at the target does.
    CancelAtTarget,
    /// The target's process dies, unless it already holds the guest, and is started again.
    RestartTarget,
    /// The next record at the source is not written.
    SourceDiskFull,
    /// The next record at the source is reported as failed but is there.
    SourceDiskUnsure,
    /// The next record at the target is not written.
    TargetDiskFull,
    /// The target refuses the machine.
    NoMemoryAtTarget,
    /// Something at the source's machine fails.
    SourceVmFails,
}

/// In which direction nothing passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Both,
    ToTarget,
    ToSource,
}

/// What a cut may take with it; the messages around the commit are the ones that matter most.
const MESSAGES: [MessageType; 20] = [
    MessageType::Resume,
    MessageType::Arrived,
    MessageType::KeepFor,
    MessageType::Hello,
    MessageType::Welcome,
    MessageType::Describe,
    MessageType::Ready,
    MessageType::FenceReached,
    MessageType::Stopping,
    MessageType::State,
    MessageType::Prepare,
    MessageType::Prepared,
    MessageType::Prepared,
    MessageType::Commit,
    MessageType::Commit,
    MessageType::Commit,
    MessageType::Running,
    MessageType::Running,
    MessageType::Running,
    MessageType::Released,
];

impl Scenario {
    /// The scenario of a seed. With a bug nothing goes wrong by itself, unless it is one that only a broken link shows.
    pub(super) fn draw(random: &mut Random, bug: Option<Bug>) -> Self {
        let layout = layout(random);
        let mut work = work(random, layout.page_count());
        // Half of the guests are quiet enough to converge, so that they may have the time that reconnecting takes.
        let quiet = bug.is_some_and(Bug::needs_a_break) || random.percent(50);
        let timeout_ms = if quiet { 15_000 } else { random.within(200, 3_000) };
        if quiet {
            work.rate = work.rate.min(500);
            work.device_rate = work.device_rate.min(50);
        }
        let mut troubles = Vec::new();
        if bug.is_none() && random.percent(65) {
            for _ in 0..random.within(1, 3) {
                troubles.push(trouble(random));
            }
        }
        let breaks = bug.is_some_and(Bug::needs_a_break);
        if breaks {
            let at = Duration::from_micros(random.within(8_000, 60_000));
            let outage = Duration::from_millis(random.pick(&[0, 5, 80]));
            troubles.push(Trouble { when: When::After(at), what: What::CutAll(outage) });
        }
        let mut scenario = Self {
            layout,
            work,
            streams: u16::try_from(random.within(1, 5)).expect("a small number"),
            compression: random.pick(&[
                Compression::None,
                Compression::Lz4,
                Compression::Zstd(1),
                Compression::Auto,
            ]),
            link: LinkSpec {
                bytes_per_s: random.pick(&[10, 30, 100, 400]) * random.within(700_000, 1_300_000),
                latency: Duration::from_micros(random.within(20, 3_000)),
                loss_percent: random.pick(&[0, 0, 0, 2]),
            },
            budget: Duration::from_millis(random.within(20, 300)),
            timeout: Duration::from_millis(timeout_ms),
            on_timeout: random.pick(&[OnTimeout::Cancel, OnTimeout::Stop]),
            reconnect: Duration::from_millis(random.pick(&[0, 1_000, 10_000, 30_000, 30_000])),
            verify_whole: random.percent(30),
            troubles,
        };
        if breaks {
            // So that the break comes in the middle of a round.
            scenario.link.bytes_per_s = scenario.link.bytes_per_s.min(60_000_000);
            scenario.reconnect = Duration::from_secs(30);
        }
        scenario
    }
}

/// 256 to 2,304 pages in two regions, with a hole in between that has no pages.
fn layout(random: &mut Random) -> MemoryLayout {
    let pages = random.within(256, 2_304);
    let low = random.within(1, pages - 1);
    let regions = vec![
        Region { gpa: 0, bytes: low * 4096 },
        Region { gpa: (low + random.within(1, 1 << 20)) * 4096, bytes: (pages - low) * 4096 },
    ];
    MemoryLayout::new(regions).expect("drawn to be in order")
}

fn work(random: &mut Random, pages: u64) -> Work {
    let rate = random.pick(&[0, 500, 3_000, 10_000, 40_000]);
    Work {
        rate,
        device_rate: random.pick(&[0, 50, 2_000]),
        first: random.below(pages),
        working_set: random.within(1, pages),
        whole_percent: random.pick(&[0, 20, 100]),
        zero_percent: random.within(0, 50),
        text_percent: random.within(0, 50),
    }
}

fn trouble(random: &mut Random) -> Trouble {
    let when = if random.percent(50) {
        let most_us = random.pick(&[30_000, 100_000, 300_000]);
        When::After(Duration::from_micros(random.below(most_us)))
    } else if random.percent(70) {
        When::Sending(random.pick(&MESSAGES))
    } else {
        When::ReadingLog(random.within(2, 5))
    };
    // Short outages are over when a source that waits tries again; long ones outlast a prepared target.
    let outage = Duration::from_millis(random.pick(&[0, 5, 80, 600, 2_500, 40_000]));
    let way = random.pick(&[Way::Both, Way::Both, Way::ToTarget, Way::ToSource]);
    let what = random.pick(&[
        What::CutControl(outage),
        What::CutControl(outage),
        What::CutAll(outage),
        What::CutAll(outage),
        What::CutStreams,
        What::Partition(outage, way),
        What::Partition(outage, way),
        What::CancelAtSource,
        What::CancelAtTarget,
        What::RestartTarget,
        What::SourceDiskFull,
        What::SourceDiskUnsure,
        What::TargetDiskFull,
        What::NoMemoryAtTarget,
        What::SourceVmFails,
    ]);
    Trouble { when, what }
}
