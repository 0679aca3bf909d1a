//! An exhaustive search of the handover: the protocol's real cores ([`ferry_protocol::source`], [`ferry_protocol::target`])
//! and their real records in every order in which messages, connections, disks, clocks, crashes and people can act.
//!
//! ```text
//!  world.rs        two hosts, their disks and processes, the connections
//!  source_side.rs  carries out the source's actions, as the engine does
//!  target_side.rs  carries out the target's
//!  streams.rs      data streams, both ends
//!  step.rs         what can happen next
//!  properties.rs   what must be true everywhere
//! ```
//!
//! Memory goes one of two ways ([`Settings::streams`]). Handed over, there are no pages to send and a broken link ends the
//! attempt; from the pause on both paths are the same code. Over a data stream, a page travels that the guest writes meanwhile,
//! and links that break before the commit are made again.
//!
//! Time is not modelled: a timeout may come at any moment at which one is waited for. With streams there are two exceptions, or the
//! search would have no end. A side that would only give up waits as long as anything else can happen: giving up has the
//! consequences of a cancellation, which may come at any moment. And that the target takes too long to answer a source that
//! has reached it again is a fault, so that it happens as often as faults are allowed.
//!
//! What is left out: damaged records, which no crash of a file system that keeps its promises leaves (their own tests are beside
//! the code that reads them); pings that only ask for a sign, for a side that takes the other for silent is the same as a connection
//! that breaks; more than one stream and one page, packing and deltas (`tests/sim.rs` has real pages); records that are measured
//! anew in a round.

mod keyed;
mod properties;
mod settings;
mod source_side;
mod step;
mod streams;
mod target_side;
mod world;

use std::fmt;
use std::sync::Arc;

use stateright::{Checker, HasDiscoveries, Model, Property};

use properties::Healed;
pub use settings::{Mistake, SEARCHES, Settings};
pub use step::{Fault, Step};
use world::World;

struct Handover {
    settings: Settings,
    healed: Arc<Healed>,
}

impl Model for Handover {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        let both = [true, false];
        if !self.settings.witness {
            return vec![World::new(&self.settings, [false, false])];
        }
        both.into_iter()
            .flat_map(|first| both.map(|second| World::new(&self.settings, [first, second])))
            .collect()
    }

    fn actions(&self, world: &World, actions: &mut Vec<Step>) {
        let patient = self.settings.streams;
        actions.extend(if patient { world.patient_steps() } else { world.ordinary_steps() });
        actions.extend(world.peoples_steps(&self.settings));
        actions.extend(world.faults(&self.settings).into_iter().map(Step::Fault));
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        Some(world.after(step, &self.settings))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("at most one runner", |_, world| properties::one_runner(world)),
            Property::always("no overtaken copy runs", |_, world| properties::no_old_copy_runs(world)),
            Property::always("some side always owns the VM", |_, world| properties::never_none(world)),
            Property::always("runs only by its record", |_, world| properties::runs_by_record(world)),
            Property::always("runs on what the guest last wrote", |_, world| {
                properties::is_up_to_date(world)
            }),
            Property::always("neither side finds fault with the other", |_, world: &World| !world.blamed),
            Property::always("every failure leads back to a running guest", |model: &Self, world| {
                properties::heals(world, &model.settings, &model.healed)
            }),
        ]
    }
}

/// A property that does not hold, with the way there.
#[derive(Debug, Clone)]
pub struct Breach {
    /// Which.
    pub property: &'static str,
    /// The shortest way to it that was found.
    pub steps: Vec<Step>,
    /// What would happen then if nothing went wrong any more.
    pub then: Vec<Step>,
    /// The world in which it does not hold.
    pub world: String,
}

/// What a search has found.
#[derive(Debug, Clone)]
pub struct Summary {
    /// Different worlds.
    pub states: usize,
    /// Steps taken.
    pub steps: usize,
    /// The longest way from the beginning.
    pub depth: usize,
    /// How many properties were looked at in every world.
    pub properties: usize,
    /// Those that do not hold.
    pub breaches: Vec<Breach>,
    /// Whether the search has seen everything within its bounds.
    pub complete: bool,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { states, steps, depth, properties, breaches, complete } = self;
        let all = if *complete { "all of them" } else { "NOT all of them" };
        write!(f, "{states} states ({all}), {steps} steps, depth {depth}, ")?;
        match breaches.len() {
            0 => write!(f, "{properties} properties held in every state"),
            broken => write!(f, "{broken} of {properties} properties BROKEN"),
        }
    }
}

/// Searches everything within the bounds, on `threads` threads.
#[must_use]
pub fn search(settings: Settings, threads: usize) -> Summary {
    let model = Handover { settings, healed: Arc::default() };
    let properties = model.properties().len();
    let mut builder = model.checker().threads(threads).finish_when(HasDiscoveries::Any);
    if let Some(steps) = settings.steps {
        builder = builder.target_state_count(steps);
    }
    let checker = builder.spawn_bfs().join();
    let breaches: Vec<Breach> = checker
        .discoveries()
        .into_iter()
        .map(|(property, path)| Breach {
            property,
            then: properties::healing(path.last_state(), &settings),
            world: format!("{:#?}", path.last_state()),
            steps: path.into_actions(),
        })
        .collect();
    Summary {
        states: checker.unique_state_count(),
        steps: checker.state_count(),
        depth: checker.max_depth(),
        properties,
        complete: breaches.is_empty() && settings.steps.is_none_or(|most| checker.state_count() < most),
        breaches,
    }
}
