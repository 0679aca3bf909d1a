//! The world: virtual time, everything that comes due, and all migrations with the network that they share.
//!
//! Time jumps from one event to the next: what is on the agenda, or a flow's milestone. Equal times keep the order in
//! which things were put there, so a seed decides everything.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::guest::GuestError;
use super::hardware::Hardware;
use super::moving::{Due, Moving, Stage};
use super::network::Network;
use super::order::MigrationOrder;
use super::run::MigrationRun;

/// What comes due, in order.
#[derive(Debug, Default)]
pub(super) struct Agenda {
    entries: BTreeMap<(Duration, u64), (usize, Due)>,
    sequence: u64,
}

impl Agenda {
    pub(super) fn add(&mut self, at: Duration, migration: usize, due: Due) {
        self.sequence += 1;
        self.entries.insert((at, self.sequence), (migration, due));
    }

    fn next_at(&self) -> Option<Duration> {
        self.entries.first_key_value().map(|((at, _), _)| *at)
    }
}

/// Which migration of a world, in the order in which they were ordered.
pub type MigrationIndex = usize;

/// Migrations in virtual time.
#[derive(Debug)]
pub struct World {
    now: Duration,
    seed: u64,
    hardware: Hardware,
    agenda: Agenda,
    network: Network,
    migrations: BTreeMap<MigrationIndex, Moving>,
    ordered: usize,
    ended: VecDeque<(MigrationIndex, MigrationRun)>,
}

impl World {
    /// An empty world in which things cost what `hardware` says and chances are those of `seed`.
    #[must_use]
    pub fn new(hardware: Hardware, seed: u64) -> Self {
        Self {
            now: Duration::ZERO,
            seed,
            hardware,
            agenda: Agenda::default(),
            network: Network::default(),
            migrations: BTreeMap::new(),
            ordered: 0,
            ended: VecDeque::new(),
        }
    }

    /// The network, for building it and for looking at it.
    pub fn network(&mut self) -> &mut Network {
        &mut self.network
    }

    /// The time since the world began.
    #[must_use]
    pub const fn now(&self) -> Duration {
        self.now
    }

    /// How many migrations are under way.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.migrations.len()
    }

    /// Orders a migration now.
    ///
    /// # Errors
    /// [`GuestError`] if there can't be such a guest.
    pub fn order(&mut self, order: MigrationOrder) -> Result<MigrationIndex, GuestError> {
        let layout = order.guest.layout(order.page_scale)?;
        let index = self.ordered;
        self.ordered += 1;
        let seed = self.seed.wrapping_add(u64::try_from(index).expect("usize fits u64"));
        let mut stage = Self::stage(self.now, index, &mut self.agenda, &mut self.network, &self.hardware);
        let moving = Moving::new(order, layout, seed, &mut stage);
        self.migrations.insert(index, moving);
        Ok(index)
    }

    /// Lets time pass until a migration ends; none if none is under way.
    pub fn run_to_next_end(&mut self) -> Option<(MigrationIndex, MigrationRun)> {
        loop {
            if let Some(ended) = self.ended.pop_front() {
                return Some(ended);
            }
            if self.migrations.is_empty() || !self.step() {
                return None;
            }
        }
    }

    fn stage<'a>(
        now: Duration,
        index: usize,
        agenda: &'a mut Agenda,
        network: &'a mut Network,
        hardware: &'a Hardware,
    ) -> Stage<'a> {
        Stage { now, index, agenda, network, hardware }
    }

    /// Goes to the next event; false if there is none.
    fn step(&mut self) -> bool {
        let due_at = self.agenda.next_at();
        let milestone_at = self.network.next_milestone();
        let Some(at) = due_at.into_iter().chain(milestone_at).min() else {
            return false;
        };
        self.now = self.now.max(at);
        self.network.advance(self.now);
        let reached = if milestone_at.is_some_and(|milestone| milestone <= self.now) {
            self.network.take_milestone()
        } else {
            None
        };
        if let Some((flow, milestone)) = reached {
            let owner = self.migrations.iter_mut().find(|(_, moving)| moving.has_flow(flow));
            if let Some((&index, moving)) = owner {
                let mut stage =
                    Self::stage(self.now, index, &mut self.agenda, &mut self.network, &self.hardware);
                moving.reach(flow, milestone, &mut stage);
                self.take_if_over(index);
            }
        } else if due_at.is_some_and(|due| due <= self.now)
            && let Some((_, (index, due))) = self.agenda.entries.pop_first()
            && let Some(moving) = self.migrations.get_mut(&index)
        {
            let mut stage = Self::stage(self.now, index, &mut self.agenda, &mut self.network, &self.hardware);
            moving.happen(due, &mut stage);
            self.take_if_over(index);
        }
        true
    }

    fn take_if_over(&mut self, index: MigrationIndex) {
        if self.migrations.get(&index).is_some_and(Moving::is_over)
            && let Some(mut moving) = self.migrations.remove(&index)
        {
            moving.leave(&mut self.network);
            self.ended.push_back((index, moving.into_run(self.now)));
        }
    }
}
