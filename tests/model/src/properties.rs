//! What must be true in every world that can be reached.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, PoisonError};

use ferry_protocol::record::Standing;

use crate::settings::Settings;
use crate::step::Step;
use crate::world::{Receiving, Witness, World};

/// More steps than this until everything is well again mean that it never is.
const HEALING_STEPS_MAX: usize = 400;

/// At no moment do two hosts run the guest, or are both allowed to.
pub(crate) fn one_runner(world: &World) -> bool {
    let runs = (0..2).filter(|&host| world.guest(host).is_some_and(|guest| guest.runs)).count();
    let source_may = (0..2).any(|host| world.sending(host).is_some_and(|sending| sending.core.may_run()));
    let target_may = (0..2).any(|host| {
        let taking_over = world.receiving(host).is_some_and(|receiving| receiving.core.may_run());
        taking_over && world.sending(1 - host).is_some() && world.sending(host).is_none()
    });
    runs <= 1 && !(source_may && target_may)
}

/// A copy of the guest that another has overtaken never runs again.
pub(crate) fn no_old_copy_runs(world: &World) -> bool {
    (0..2).filter_map(|host| world.guest(host)).all(|guest| !guest.runs || guest.life == world.life)
}

/// There is always a host that holds the guest and may come to run it, unless the owner was lost.
pub(crate) fn never_none(world: &World) -> bool {
    let held = |host| world.guest(host).is_some() || world.takes_over(host);
    world.owner_lost || (0..2).any(held)
}

/// What came by a migration runs only where the record says so.
pub(crate) fn runs_by_record(world: &World) -> bool {
    (0..2).all(|host| {
        let arrived = world.guest(host).filter(|guest| guest.runs && guest.arrived_by.is_some());
        let untouched = world.sending(host).is_none();
        // A commit that was recorded and then not sent: if that it is void could not be written, the disk says less than
        // is known, and a host that is started anew is in doubt.
        let never_sent = |epoch| matches!(&world.hosts[host].disk, Some(record)
            if matches!(record.standing, Standing::Committed { .. }) && record.epoch < epoch);
        let says_so = world.hosts[host].disk.as_ref().is_some_and(|record| record.standing == Standing::Running);
        !untouched || arrived.is_none_or(|guest| says_so || never_sent(guest.epoch))
    })
}

/// Memory and state of a copy that runs are what the guest has left last.
pub(crate) fn is_up_to_date(world: &World) -> bool {
    (0..2)
        .filter_map(|host| world.guest(host))
        .all(|guest| !guest.runs || (guest.memory, guest.state) == (world.written, world.state))
}

/// Remembers the worlds that are known to come to a good end.
#[derive(Debug, Default)]
pub(crate) struct Healed {
    hasher: RandomState,
    known: [Mutex<HashSet<u64>>; 16],
}

impl Healed {
    fn shard(&self, key: u64) -> &Mutex<HashSet<u64>> {
        &self.known[usize::try_from(key & 15).unwrap_or_default()]
    }

    fn contains(&self, key: u64) -> bool {
        self.shard(key).lock().unwrap_or_else(PoisonError::into_inner).contains(&key)
    }

    fn insert(&self, key: u64) {
        self.shard(key).lock().unwrap_or_else(PoisonError::into_inner).insert(key);
    }
}

/// Once nothing goes wrong any more, one host runs the guest and no migration is left half-way.
pub(crate) fn heals(world: &World, settings: &Settings, healed: &Healed) -> bool {
    let mut way = Vec::new();
    let mut now = with_witness(world);
    for _ in 0..HEALING_STEPS_MAX {
        let key = healed.hasher.hash_one(&now);
        if is_well(&now) || healed.contains(key) {
            way.push(key);
            way.into_iter().for_each(|key| healed.insert(key));
            return true;
        }
        way.push(key);
        now = match healing_step(&now, settings) {
            Some(step) => now.after(step, settings),
            None => match with_witness_for_all(&now) {
                Some(world) => world,
                None => return false,
            },
        };
    }
    false
}

/// The witness is there again for both, if nobody reaches it; if one does, that must be enough to decide.
fn with_witness(world: &World) -> World {
    let nobody = world.witness.reached_by == [false, false];
    nobody.then(|| with_witness_for_all(world)).flatten().unwrap_or_else(|| world.clone())
}

/// The witness is reached by both, if it was not; a target that it has decided for must hear of that some day.
fn with_witness_for_all(world: &World) -> Option<World> {
    let witness = Witness { reached_by: [true, true], ..world.witness.clone() };
    (witness != world.witness).then(|| World { witness, ..world.clone() })
}

/// The steps by which `world` is to become well, as far as they are taken.
pub(crate) fn healing(world: &World, settings: &Settings) -> Vec<Step> {
    let mut now = with_witness(world);
    let mut steps = Vec::new();
    while steps.len() < HEALING_STEPS_MAX && !is_well(&now) {
        if let Some(step) = healing_step(&now, settings) {
            now = now.after(step, settings);
            steps.push(step);
        } else if let Some(world) = with_witness_for_all(&now) {
            now = world;
        } else {
            break;
        }
    }
    steps
}

/// The end that every failure must come to.
fn is_well(world: &World) -> bool {
    let runs = (0..2).filter(|&host| world.guest(host).is_some_and(|guest| guest.runs)).count();
    // One that runs the guest answers its source for as long as that may ask.
    let settled = |receiving: &Receiving| receiving.core.phase() == "running";
    let half_way = (0..2).any(|host| {
        world.sending(host).is_some() || world.receiving(host).is_some_and(|receiving| !settled(receiving))
    });
    let gone = (0..2).all(|host| world.guest(host).is_none() && world.receiving(host).is_none());
    !half_way && (runs == 1 || (gone && world.owner_lost))
}

/// The next step of a world in which nothing goes wrong any more: time passes only when nothing else happens, and people
/// do what they must.
fn healing_step(world: &World, settings: &Settings) -> Option<Step> {
    let steps = world.ordinary_steps();
    let is_timeout = |step: &Step| matches!(step, Step::SourceTimeout(_) | Step::TargetTimeout(_));
    // Nobody is there yet whom the source could reach.
    let in_vacuum = |step: &Step| matches!(step, Step::Connect(host) if world.process(1 - host).is_none_or(|process| !process.listens));
    if let Some(step) = steps.iter().find(|step| !is_timeout(step) && !in_vacuum(step)) {
        return Some(*step);
    }
    let people = world.peoples_steps(settings);
    // What only an operator can end: the target has been started anew as the VM's host, and nobody listens there.
    let decided = people.iter().find(|step| {
        matches!(step, Step::Resolve(host, false) if world.process(1 - host).is_some_and(|process| !process.listens))
    });
    if let Some(step) = decided {
        return Some(*step);
    }
    let restart =
        people.iter().find(|step| matches!(step, Step::Listen(host) if world.sending(1 - host).is_some()));
    let due = |step: &Step| {
        if let Step::SourceTimeout(host) = *step {
            return world.sending(host).and_then(|sending| sending.core.poll_timeout());
        }
        if let Step::TargetTimeout(host) = *step {
            return world.receiving(host).and_then(|receiving| receiving.core.poll_timeout());
        }
        None
    };
    // Asking a witness that is not reached once more changes nothing.
    let waits = |receiving: &Receiving| {
        matches!(receiving.core.phase(), "asking the witness" | "giving up at the witness")
    };
    let in_vain = |step: &Step| {
        matches!(*step, Step::TargetTimeout(host)
            if !world.witness.reached_by[host] && world.receiving(host).is_some_and(waits))
    };
    let first = steps.iter().filter(|step| is_timeout(step) && !in_vain(step)).min_by_key(|step| due(step));
    restart.or(first).copied()
}
