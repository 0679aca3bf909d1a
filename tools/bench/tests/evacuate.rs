//! Evacuations in virtual time: every VM ends, no limit is ever exceeded, and a seed decides everything.

use std::num::NonZeroUsize;

use ferry_bench::simulate::Hardware;
use ferry_bench::simulate::evacuation::site::{self, Attempt, Then};
use ferry_bench::simulate::evacuation::{AttemptLine, Evacuation, Site, VmEnd, evacuate};

/// Two racks of three hosts with 8 VMs each, into two racks of four.
fn small() -> Site {
    let mut site = site::load("rack").expect("it comes along");
    (site.source.racks, site.source.hosts_per_rack) = (2, 3);
    (site.target.racks, site.target.hosts_per_rack) = (2, 4);
    for (kind, per_host) in site.vms.iter_mut().zip([5, 2, 1]) {
        kind.per_host = per_host;
    }
    site
}

fn run(site: &Site, seed: u64) -> Evacuation {
    let scattered = Hardware { jitter: 0.3, page_jitter: 0.1, ..Hardware::default() };
    evacuate(site, &scattered, seed, |_| {}).expect("guests that can be")
}

/// The most attempts at the same time, of those that `of` picks with the VM's source host.
fn most_at_once(evacuation: &Evacuation, of: impl Fn(usize, &AttemptLine) -> bool) -> i64 {
    let mut changes = Vec::new();
    for vm in &evacuation.vms {
        for attempt in vm.attempts.iter().filter(|attempt| of(vm.source, attempt)) {
            changes.push((attempt.from_s, 1));
            changes.push((attempt.to_s, -1));
        }
    }
    // Where one ends and another begins at the same time, the end comes first.
    changes.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut now = 0;
    changes
        .into_iter()
        .map(|(_, change)| {
            now += change;
            now
        })
        .max()
        .unwrap_or(0)
}

#[test]
fn every_vm_ends_and_no_limit_is_exceeded() {
    for (out_max, in_max, at_once_max) in
        [(2, 2, None), (1, 3, None), (4, 1, None), (4, 4, NonZeroUsize::new(5))]
    {
        let mut site = small();
        (site.host.out_max, site.host.in_max, site.plan.at_once_max) = (out_max, in_max, at_once_max);
        let evacuation = run(&site, 3);
        assert_eq!(evacuation.vms.len(), 48);
        assert!(evacuation.vms.iter().all(|vm| vm.end == VmEnd::Moved), "{:?}", evacuation.vms);
        let out = (0..6).map(|host| most_at_once(&evacuation, |source, _| source == host)).max();
        let into = (0..8).map(|host| most_at_once(&evacuation, |_, attempt| attempt.target == host)).max();
        let most = at_once_max.map_or(i64::MAX, |most| i64::try_from(most.get()).expect("a small number"));
        assert_eq!(out, Some(i64::from(out_max).min(most)));
        assert!(into.expect("hosts") <= i64::from(in_max), "{into:?}");
        let all = most_at_once(&evacuation, |_, _| true);
        assert!(all <= most, "{all}");
        // Nothing is faster than the links that everything passes through.
        let uplinks = 2.0 * 200e9 / 8.0;
        assert!(evacuation.wire_bytes / evacuation.took_s < uplinks);
        assert_eq!(evacuation.left.first().map(|(_, left)| *left), Some(48));
        assert_eq!(evacuation.left.last().map(|(_, left)| *left), Some(0));
        assert!(evacuation.left.windows(2).all(|pair| pair[1].0 >= pair[0].0 && pair[1].1 + 1 == pair[0].1));
    }
}

#[test]
fn shared_links_set_the_pace() {
    let mut site = small();
    // Fast hosts behind one slow link, and guests that write next to nothing.
    site.between.gbit_s = Some(4.0);
    for kind in &mut site.vms {
        (kind.hot.percent, kind.cold.percent) = (0.0, 0.0);
    }
    site.plan.attempts[0].timeout_s = 10_000.0;
    let evacuation = run(&site, 1);
    let rate = evacuation.wire_bytes * 8.0 / evacuation.took_s;
    assert!((3.8e9..4.0e9).contains(&rate), "{rate}");
}

#[test]
fn a_seed_decides_everything() {
    let site = small();
    let (first, again, other) = (run(&site, 5), run(&site, 5), run(&site, 6));
    assert_eq!(first, again);
    assert_ne!(first.vms, other.vms);
}

#[test]
fn what_does_not_converge_is_tried_again_or_stays() {
    let mut site = small();
    site.source.host_gbit_s = 1.0;
    // The last ones are small, so that they fit anywhere.
    site.plan.order = site::PlanOrder::LargestFirst;
    let attempt = |on_timeout| Attempt { downtime_ms: 100.0, timeout_s: 60.0, on_timeout };
    site.plan.attempts = vec![attempt(Then::Cancel)];
    let once = run(&site, 2);
    let stayed: Vec<usize> = (0..once.vms.len())
        .filter(|index| matches!(&once.vms[*index].end, VmEnd::Stayed { reason } if reason.contains("60 s")))
        .collect();
    assert!(!stayed.is_empty() && stayed.len() < 40, "{stayed:?}");
    assert!(stayed.iter().all(|index| once.vms[*index].downtime_ms.is_none()));

    site.plan.attempts.push(attempt(Then::Stop));
    // There is little more room than needed: what an attempt that failed had reserved must be free again.
    let needed: f64 = once.vms.iter().map(|vm| vm.memory_gib).sum();
    site.target.used_percent = 0.0;
    site.host.memory_gib = 1.25 * needed / 8.0;
    let twice = run(&site, 2);
    assert!(twice.vms.iter().all(|vm| vm.end == VmEnd::Moved));
    let tried_again: Vec<&usize> =
        stayed.iter().filter(|index| twice.vms[**index].attempts.len() == 2).collect();
    assert!(tried_again.len() * 4 >= stayed.len() * 3, "{} of {}", tried_again.len(), stayed.len());
}

#[test]
fn vms_without_room_are_said_to_have_none() {
    let mut site = small();
    // 8 hosts with 48 GiB each take no VM above that, and not all of the others.
    site.host.memory_gib = 48.0;
    site.target.used_percent = 0.0;
    let evacuation = run(&site, 1);
    let taken = |host: usize| -> f64 {
        let moved = evacuation.vms.iter().filter(|vm| vm.end == VmEnd::Moved);
        let there = moved.filter(|vm| vm.attempts.last().is_some_and(|last| last.target == host));
        there.map(|vm| vm.memory_gib).sum()
    };
    assert!((0..8).all(|host| taken(host) <= 48.0));
    let without: Vec<_> = evacuation.vms.iter().filter(|vm| vm.end == VmEnd::NoRoom).collect();
    assert!(!without.is_empty());
    assert!(without.iter().all(|vm| vm.attempts.is_empty()));
    // Whoever has no room would indeed fit nowhere.
    assert!(without.iter().all(|vm| (0..8).all(|host| taken(host) + vm.memory_gib > 48.0)));
}
