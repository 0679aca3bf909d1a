//! What a source would say, or not quite.

use ferry_protocol::message::{
    Abort, AtEpoch, Describe, HandOver, Hello, KeepFor, NetworkIdentity, Prepare, Rehearse, Resume, State,
};
use ferry_protocol::negotiation::Features;
use ferry_protocol::witness::WitnessId;
use ferry_protocol::{Message, MigrationId, Region};

use super::{Host, steps};
use crate::script::{EPOCH, MIGRATION, VM, WITNESS, code, digest, epoch};

impl Host {
    /// What a source would say here, or not quite.
    pub(super) fn message(&self, what: u8, how: u8) -> Option<Message> {
        let next = self.epoch();
        let at = AtEpoch { epoch: epoch(next, how) };
        Some(match what {
            steps::HELLO => Message::Hello(self.hello(how)),
            steps::WITNESS_NAMED => Message::Witness(if how < 6 { WITNESS } else { WitnessId([6; 16]) }),
            steps::DESCRIBE => Message::Describe(Describe {
                description: vec![1],
                regions: regions(how),
                streams: u16::from(how % 3) + 1,
            }),
            steps::HAND_OVER => Message::HandOver(HandOver { description: vec![1], regions: regions(how) }),
            steps::KEEP_FOR => {
                Message::KeepFor(KeepFor { wait_ms: [30_000, 0, 1, 1000, u32::MAX][usize::from(how % 5)] })
            }
            steps::STOPPING => Message::Stopping(AtEpoch { epoch: EPOCH }),
            steps::STATE => Message::State(State {
                state: vec![5; usize::from(how)],
                network: NetworkIdentity::default(),
                runs: how.is_multiple_of(2),
            }),
            steps::PREPARE => Message::Prepare(Prepare {
                epoch: epoch(next, if how == 7 { 5 } else { 0 }),
                fence: match how {
                    0..=3 => self.fence,
                    4 => self.fence + 1,
                    _ => 0,
                },
                digest: if how == 5 { digest(6) } else { self.digest },
            }),
            steps::COMMIT => Message::Commit(at),
            steps::RELEASED => Message::Released(at),
            steps::ABORT => Message::Abort(Abort::new(code(how), "enough")),
            steps::PING => Message::Ping(how.into()),
            steps::PONG => Message::Pong((how / 4).into()),
            steps::REHEARSE => Message::Rehearse(Rehearse),
            steps::RESUME => Message::Resume(Resume {
                epoch: epoch(next, if how == 6 { 4 } else { 0 }),
                session: if how == 7 { self.session } else { self.session + 1 },
                reached: self.fence,
                round: self.fence + u32::from(how % 2),
                from: if how == 5 { 100 } else { 0 },
            }),
            _ => return None,
        })
    }

    pub(super) fn hello(&self, how: u8) -> Hello {
        let features = match (how & 2 != 0, self.witness_named) {
            (false, None) => Features::OURS,
            (false, Some(_)) => Features::OURS.and(Features::WITNESS),
            (true, None) => Features::OURS.without(Features::UNVERIFIED).without(Features::KEEPALIVE),
            (true, Some(_)) => Features::OURS.and(Features::WITNESS).without(Features::KEEPALIVE),
        };
        Hello {
            version_oldest: 1,
            version_newest: 1,
            features,
            migration: if how & 4 == 0 { MIGRATION } else { MigrationId([9; 16]) },
            vm: VM,
            name: "web".parse().expect("a name"),
            epoch: EPOCH,
            resumes: how & 1 != 0,
        }
    }
}

fn regions(how: u8) -> Vec<Region> {
    let region = |gpa, pages| Region { gpa, bytes: pages * 4096 };
    match how {
        0..=3 => vec![region(0, 512)],
        4 => vec![region(0, 100), region(1 << 32, 412)],
        5 => vec![region(1 << 32, 1), region(0, 1)],
        6 => vec![region(0, u64::MAX >> 12)],
        _ => vec![region(0, 1 << 30)],
    }
}
