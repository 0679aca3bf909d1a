//! Bytes under way as fluid: what flows on shared resources get, and when they have what they want.
//!
//! A resource is a link's direction (its capacity in bytes/s) or a host's processors (CPU seconds a second). A flow uses
//! so much of each resource for every byte. Rates are max-min fair, as those of TCP connections over a shared link are
//! in the long run: all rise together, in proportion to their weights, until a resource is used up or a flow has all
//! that it can take; those stay, and the others rise further. Not here: what happens within a round trip.
//! (Bertsekas and Gallager, Data Networks, section 6.5.2, with weights and a cost for each resource.)

use std::collections::BTreeMap;
use std::time::Duration;

/// One resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ResourceId(usize);

/// One flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowId(u64);

/// What a flow wants.
#[derive(Debug, Clone, PartialEq)]
pub struct FlowRequest {
    /// Its bytes.
    pub bytes: f64,
    /// How many bytes are left when [`Milestone::Buffered`] is to be told; 0 for not at all.
    pub buffered_bytes: f64,
    /// How much of each resource a byte takes.
    pub uses: Vec<(ResourceId, f64)>,
    /// Its share beside others: the number of TCP connections.
    pub weight: f64,
    /// The most that it can take, in bytes/s.
    pub rate_max: f64,
}

/// What a flow has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Milestone {
    /// All but [`FlowRequest::buffered_bytes`] have gone.
    Buffered,
    /// Everything has gone; the flow is over.
    Done,
}

#[derive(Debug)]
struct Flow {
    left: f64,
    /// Bytes left at the next milestone.
    until: f64,
    request: FlowRequest,
    rate: f64,
}

impl Flow {
    /// Rounding to a nanosecond must not leave a flow just short of where it was to be.
    fn has_reached(&self) -> bool {
        self.left - self.until <= self.rate * 2e-9 + 1e-6
    }
}

#[derive(Debug)]
struct Resource {
    capacity: f64,
    /// What others than flows take.
    reserved: f64,
    used: f64,
}

/// All resources with the flows on them.
#[derive(Debug, Default)]
pub struct Network {
    resources: Vec<Resource>,
    flows: BTreeMap<FlowId, Flow>,
    flows_ever: u64,
    at: Duration,
    /// Whether rates have to be found again.
    stale: bool,
}

/// A resource counts as used up from this share on.
const FULL: f64 = 0.999;

/// Levels this close together are one.
const SAME_LEVEL: f64 = 1.0 + 1e-9;

impl Network {
    /// A new resource that gives `capacity` a second.
    pub fn add_resource(&mut self, capacity: f64) -> ResourceId {
        self.resources.push(Resource { capacity, reserved: 0.0, used: 0.0 });
        ResourceId(self.resources.len() - 1)
    }

    /// What a resource can give a second.
    #[must_use]
    pub fn capacity(&self, resource: ResourceId) -> f64 {
        self.resources[resource.0].capacity
    }

    /// Takes `amount` a second of a resource away from all flows, or gives it back if it is negative.
    pub fn reserve(&mut self, resource: ResourceId, amount: f64) {
        let resource = &mut self.resources[resource.0];
        resource.reserved = (resource.reserved + amount).max(0.0);
        self.stale = true;
    }

    /// What flows use of a resource now, a second.
    pub fn used(&mut self, resource: ResourceId) -> f64 {
        self.settle();
        self.resources[resource.0].used
    }

    /// Whether flows want more of a resource than there is.
    pub fn is_full(&mut self, resource: ResourceId) -> bool {
        let used = self.used(resource);
        let Resource { capacity, reserved, .. } = self.resources[resource.0];
        used >= FULL * (capacity - reserved)
    }

    /// How many flows there are.
    #[must_use]
    pub fn flow_count(&self) -> usize {
        self.flows.len()
    }

    /// Begins a flow now.
    pub fn add_flow(&mut self, request: FlowRequest) -> FlowId {
        let id = FlowId(self.flows_ever);
        self.flows_ever += 1;
        let until = if request.buffered_bytes < request.bytes { request.buffered_bytes } else { 0.0 };
        self.flows.insert(id, Flow { left: request.bytes, until, request, rate: 0.0 });
        self.stale = true;
        id
    }

    /// Ends a flow now, wherever it is.
    pub fn remove_flow(&mut self, id: FlowId) {
        self.stale |= self.flows.remove(&id).is_some();
    }

    /// When the next flow reaches a milestone, if any does.
    pub fn next_milestone(&mut self) -> Option<Duration> {
        self.settle();
        let wait = |flow: &Flow| {
            if flow.has_reached() {
                Some(0.0)
            } else {
                (flow.rate > 0.0).then(|| (flow.left - flow.until) / flow.rate)
            }
        };
        let least = self.flows.values().filter_map(wait).reduce(f64::min)?;
        // A flow that takes longer than this is stuck.
        Some(self.at + Duration::from_secs_f64(least.min(1e9)))
    }

    /// Lets time pass until `at`, which is not after the next milestone.
    pub fn advance(&mut self, at: Duration) {
        self.settle();
        let seconds = at.saturating_sub(self.at).as_secs_f64();
        self.at = self.at.max(at);
        if seconds > 0.0 {
            self.flows.values_mut().for_each(|flow| flow.left -= flow.rate * seconds);
        }
    }

    /// A milestone that is reached now, each once.
    pub fn take_milestone(&mut self) -> Option<(FlowId, Milestone)> {
        self.settle();
        let (&id, flow) = self.flows.iter_mut().find(|(_, flow)| flow.has_reached())?;
        if flow.until > 0.0 {
            flow.until = 0.0;
            return Some((id, Milestone::Buffered));
        }
        self.remove_flow(id);
        Some((id, Milestone::Done))
    }

    /// Finds the rates again if flows came or went.
    fn settle(&mut self) {
        if !std::mem::take(&mut self.stale) {
            return;
        }
        for resource in &mut self.resources {
            resource.used = 0.0;
        }
        let mut rising: Vec<&mut Flow> = self.flows.values_mut().collect();
        // What a level of 1 of all rising flows takes of each resource.
        let mut slopes = vec![0.0; self.resources.len()];
        for flow in &rising {
            for (resource, per_byte) in &flow.request.uses {
                slopes[resource.0] += flow.request.weight * per_byte;
            }
        }
        while !rising.is_empty() {
            let level = lowest_level(&rising, &self.resources, &slopes);
            let full: Vec<bool> = self
                .resources
                .iter()
                .zip(&slopes)
                .map(|(resource, &slope)| slope > 0.0 && level_of(resource, slope) <= level * SAME_LEVEL)
                .collect();
            let stays = |flow: &Flow| {
                let request = &flow.request;
                request.rate_max <= level * request.weight * SAME_LEVEL
                    || request.uses.iter().any(|(resource, per_byte)| *per_byte > 0.0 && full[resource.0])
            };
            rising.retain_mut(|flow| {
                if !stays(flow) {
                    return true;
                }
                flow.rate = (level * flow.request.weight).min(flow.request.rate_max);
                for (resource, per_byte) in &flow.request.uses {
                    self.resources[resource.0].used += flow.rate * per_byte;
                    slopes[resource.0] -= flow.request.weight * per_byte;
                }
                false
            });
            // What is left after subtracting equal numbers is rounding, not a flow.
            let mut users = vec![false; slopes.len()];
            rising
                .iter()
                .flat_map(|flow| &flow.request.uses)
                .for_each(|(resource, _)| users[resource.0] = true);
            slopes.iter_mut().zip(users).filter(|(_, used)| !used).for_each(|(slope, _)| *slope = 0.0);
        }
    }
}

fn level_of(resource: &Resource, slope: f64) -> f64 {
    (resource.capacity - resource.reserved - resource.used).max(0.0) / slope
}

/// How high the flows can rise together until the first of them has to stay.
fn lowest_level(rising: &[&mut Flow], resources: &[Resource], slopes: &[f64]) -> f64 {
    let used_up = resources
        .iter()
        .zip(slopes)
        .filter(|(_, slope)| **slope > 0.0)
        .map(|(resource, &slope)| level_of(resource, slope));
    let content = rising.iter().map(|flow| flow.request.rate_max / flow.request.weight);
    used_up.chain(content).fold(f64::MAX, f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(bytes: f64, uses: &[ResourceId]) -> FlowRequest {
        let uses = uses.iter().map(|&resource| (resource, 1.0)).collect();
        FlowRequest { bytes, buffered_bytes: 0.0, uses, weight: 1.0, rate_max: f64::MAX }
    }

    fn rates(network: &mut Network) -> Vec<f64> {
        network.settle();
        network.flows.values().map(|flow| flow.rate).collect()
    }

    fn assert_rates(network: &mut Network, expected: &[f64]) {
        let rates = rates(network);
        let close = rates.iter().zip(expected).all(|(rate, expected)| (rate - expected).abs() < 1e-6);
        assert!(close && rates.len() == expected.len(), "{rates:?}, not {expected:?}");
    }

    #[test]
    fn a_flow_across_two_links_gets_what_the_narrower_leaves() {
        // The textbook's example: three flows on links of 10 and 30.
        let mut network = Network::default();
        let (narrow, wide) = (network.add_resource(10.0), network.add_resource(30.0));
        for uses in [&[narrow, wide][..], &[narrow], &[wide]] {
            network.add_flow(request(1e9, uses));
        }
        assert_rates(&mut network, &[5.0, 5.0, 25.0]);
    }

    #[test]
    fn weights_caps_and_costs_count() {
        let mut network = Network::default();
        let link = network.add_resource(90.0);
        network.add_flow(FlowRequest { weight: 2.0, ..request(1e9, &[link]) });
        network.add_flow(request(1e9, &[link]));
        assert_rates(&mut network, &[60.0, 30.0]);
        let capped = network.add_flow(FlowRequest { rate_max: 6.0, ..request(1e9, &[link]) });
        assert_rates(&mut network, &[56.0, 28.0, 6.0]);
        network.remove_flow(capped);
        network.reserve(link, 30.0);
        assert_rates(&mut network, &[40.0, 20.0]);
        assert!(network.is_full(link));
        network.reserve(link, -30.0);
        let processor = network.add_resource(1.0);
        network.add_flow(FlowRequest { uses: vec![(processor, 0.25)], ..request(1e9, &[]) });
        assert_rates(&mut network, &[60.0, 30.0, 4.0]);
    }

    #[test]
    fn milestones_come_when_the_bytes_have_gone() {
        let mut network = Network::default();
        let link = network.add_resource(100.0);
        let first = network.add_flow(FlowRequest { buffered_bytes: 20.0, ..request(100.0, &[link]) });
        let second = network.add_flow(request(300.0, &[link]));
        let mut seen = Vec::new();
        while let Some(at) = network.next_milestone() {
            network.advance(at);
            while let Some((flow, milestone)) = network.take_milestone() {
                seen.push((at.as_secs_f64(), flow, milestone));
            }
        }
        let expected = [
            (1.6, first, Milestone::Buffered),
            (2.0, first, Milestone::Done),
            (4.0, second, Milestone::Done),
        ];
        assert_eq!(seen.len(), expected.len(), "{seen:?}");
        for (seen, expected) in seen.iter().zip(&expected) {
            assert!(
                (seen.0 - expected.0).abs() < 1e-6 && (seen.1, seen.2) == (expected.1, expected.2),
                "{seen:?}"
            );
        }
    }

    proptest! {
        /// No resource gives more than it has, and every flow is held back by something: its own limit, or a resource
        /// that is used up and of which nobody has more than it does, weights considered.
        #[test]
        fn shares_are_max_min_fair(
            capacities in proptest::collection::vec(1.0f64..1000.0, 1..8),
            flows in proptest::collection::vec(
                (proptest::collection::btree_map(0usize..8, 0.1f64..4.0, 1..4), 1.0f64..8.0, 1.0f64..2000.0), 1..20),
        ) {
            let mut network = Network::default();
            let resources: Vec<ResourceId> = capacities.iter().map(|&c| network.add_resource(c)).collect();
            for (uses, weight, rate_max) in flows {
                let on = |(index, per_byte): (usize, f64)| (resources[index % resources.len()], per_byte);
                let uses = uses.into_iter().map(on).collect();
                network.add_flow(FlowRequest { bytes: 1e9, buffered_bytes: 0.0, uses, weight, rate_max });
            }
            network.settle();
            for (resource, &capacity) in resources.iter().zip(&capacities) {
                prop_assert!(network.used(*resource) <= capacity * (1.0 + 1e-9));
            }
            let level = |flow: &Flow| flow.rate / flow.request.weight;
            for flow in network.flows.values() {
                let content = flow.rate >= flow.request.rate_max * (1.0 - 1e-9);
                let held_back = flow.request.uses.iter().any(|(resource, _)| {
                    let others = network.flows.values().filter(|other| other.request.uses.iter().any(|(r, _)| r == resource));
                    let used_up = network.resources[resource.0].used >= capacities[resource.0] * (1.0 - 1e-6);
                    used_up && others.map(level).fold(0.0, f64::max) <= level(flow) * (1.0 + 1e-6)
                });
                prop_assert!(content || held_back, "{flow:?}");
            }
        }

        /// However flows come and go, each has all of its bytes in the end and no link is faster than it is.
        #[test]
        fn nothing_is_lost_or_invented(sizes in proptest::collection::vec(1.0f64..1e6, 1..30)) {
            let mut network = Network::default();
            let link = network.add_resource(1000.0);
            sizes.iter().for_each(|&bytes| { network.add_flow(request(bytes, &[link])); });
            let mut done = 0;
            let mut end = Duration::ZERO;
            while let Some(at) = network.next_milestone() {
                network.advance(at);
                end = at;
                while network.take_milestone().is_some() { done += 1; }
            }
            prop_assert_eq!(done, sizes.len());
            let exact = sizes.iter().sum::<f64>() / 1000.0;
            prop_assert!((end.as_secs_f64() - exact).abs() < 1e-6 * exact.max(1.0), "{:?} {}", end, exact);
        }
    }
}
