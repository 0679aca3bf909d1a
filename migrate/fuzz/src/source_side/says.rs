//! What a target would say, or not quite.

use ferry_protocol::Message;
use ferry_protocol::admission::JoinSecret;
use ferry_protocol::message::{
    Abort, Admit, Arrived, AtEpoch, FenceReached, Prepared, Ready, Rehearsed, Run, Running, Welcome,
};
use ferry_protocol::negotiation::Features;

use super::{Host, steps};
use crate::script::{EPOCH, code, digest, epoch};

impl Host {
    /// What a target would say here, or not quite.
    pub(super) fn message(&self, what: u8, how: u8) -> Option<Message> {
        let next = EPOCH.next();
        let at = AtEpoch { epoch: epoch(next, how) };
        Some(match what {
            steps::WELCOME => Message::Welcome(self.welcome(how)),
            steps::ADMIT => {
                Message::Admit(Admit { session: self.session, key: JoinSecret([1; 32]).key(self.session) })
            }
            steps::READY => {
                Message::Ready(Ready { record_us: [100, 0, 1 << 20, u64::MAX][usize::from(how % 4)] })
            }
            steps::FENCE_REACHED => Message::FenceReached(FenceReached {
                fence: match how {
                    0..=4 => self.fence,
                    5 => self.fence + 1,
                    6 => self.fence.saturating_sub(1),
                    _ => 0,
                },
            }),
            steps::PREPARED => Message::Prepared(Prepared {
                epoch: epoch(next, how),
                digest: if how == 3 { digest(7) } else { self.digest },
                wait_us: 10,
                restore_us: if how == 2 { u64::MAX } else { 10 },
            }),
            steps::RUNNING => Message::Running(Running {
                epoch: at.epoch,
                record_us: 10,
                run_us: u64::from(how % 2) * u64::MAX,
            }),
            steps::DISCARDED => Message::Discarded(at),
            steps::ABORT => Message::Abort(Abort::new(code(how), "enough")),
            steps::PING => Message::Ping(how.into()),
            steps::PONG => Message::Pong(match how {
                0..=4 => self.fence.into(),
                5 => 1,
                6 => u64::MAX,
                _ => 0,
            }),
            steps::REHEARSED => Message::Rehearsed(Rehearsed { record_us: 100 }),
            steps::ARRIVED => Message::Arrived(self.arrived(how)),
            _ => return None,
        })
    }

    fn welcome(&self, how: u8) -> Welcome {
        let ours = Features::ours_on(true);
        let ours = if self.witness_named { ours.and(Features::WITNESS) } else { ours };
        let features = match how {
            0..=2 => ours,
            3 => ours.without(Features::UNVERIFIED),
            4 => ours.without(Features::RESUMPTION),
            5 => ours.without(Features::KEEPALIVE).without(Features::REHEARSAL),
            6 => Features::NONE,
            _ => Features::OURS.without(Features::WITNESS),
        };
        Welcome { version: 1, features, host: "b".to_owned() }
    }

    /// An answer to what has arrived: all, some, in parts, or what can't be.
    fn arrived(&self, how: u8) -> Arrived {
        let of = |first, count| Run { first, count };
        let (reached, runs, next) = match how {
            0 => (self.fence, vec![], None),
            1 => (self.reached, vec![], None),
            2 => (self.reached, vec![of(0, 100), of(200, 50)], None),
            3 => (self.reached, vec![of(0, 100)], Some(100)),
            4 => (self.reached, vec![of(100, 10), of(400, 112)], None),
            5 => (self.reached, vec![of(500, 100)], None),
            6 => (self.fence, vec![of(0, 10)], Some(0)),
            _ => (self.fence + 1, vec![], None),
        };
        Arrived { reached, runs, next }
    }
}
