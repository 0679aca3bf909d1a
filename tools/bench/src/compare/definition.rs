//! Whether two results are about the same thing.

use crate::results::{MachineInfo, Results};
use crate::scenario::Scenario;

/// Whether `engine` was given the same task in both; if not, what differs.
pub(super) fn same(a: &Scenario, b: &Scenario, engine: &str) -> Result<(), String> {
    // Without `..`, so that a new field has to be thought of here.
    let Scenario {
        name: _,
        title: _,
        guest,
        memory_mib,
        tcp_mib,
        cpus,
        link,
        client,
        downtime_ms,
        timeout_s,
        watch_ms,
        // More or fewer runs change how sure one can be, not what was measured.
        repetitions: _,
        engines,
        sweep: _,
    } = a;
    let setting = |engines: &[crate::scenario::EngineSetting]| {
        engines.iter().find(|setting| setting.engine == engine).cloned()
    };
    let equal = [
        ("guest", *guest == b.guest),
        ("memory_mib", *memory_mib == b.memory_mib),
        ("tcp_mib", *tcp_mib == b.tcp_mib),
        ("cpus", *cpus == b.cpus),
        ("link", *link == b.link),
        ("client", *client == b.client),
        ("downtime_ms", *downtime_ms == b.downtime_ms),
        ("timeout_s", *timeout_s == b.timeout_s),
        ("watch_ms", *watch_ms == b.watch_ms),
        ("the engine's settings", setting(engines) == setting(&b.engines)),
    ];
    let differ: Vec<&str> = equal.iter().filter(|(_, equal)| !equal).map(|(what, _)| *what).collect();
    if differ.is_empty() {
        Ok(())
    } else {
        Err(format!("the scenario is another: {} differ", differ.join(", ")))
    }
}

/// What may have made a difference besides the engines.
pub(super) fn warnings(a: &Results, b: &Results) -> Vec<String> {
    let MachineInfo { cpu, cores, memory_bytes, kernel, kvm, ferry: _ } = &a.machine;
    let other = &b.machine;
    let differs = [
        ("processor", *cpu != other.cpu),
        ("number of processors", *cores != other.cores),
        ("memory", *memory_bytes != other.memory_bytes),
        ("kernel", *kernel != other.kernel),
        ("KVM back end", *kvm != other.kvm),
    ];
    let differs: Vec<&str> = differs.iter().filter(|(_, differs)| *differs).map(|(what, _)| *what).collect();
    let mut warnings = Vec::new();
    if !differs.is_empty() {
        let what = differs.join(", ");
        warnings
            .push(format!("the machines differ ({what}): changes may be theirs; --ratios cancels them out"));
    }
    for (which, results) in [("first", a), ("second", b)] {
        let runs = || results.scenarios.iter().flat_map(|scenario| &scenario.runs);
        let noisy = runs().filter(|run| !run.measures.idleness.quiet).count();
        if noisy > 0 {
            warnings.push(format!(
                "the machine was not quiet in {noisy} of {} runs of the {which} file",
                runs().count()
            ));
        }
    }
    for engine in &a.engines {
        let now = b.engines.iter().find(|other| other.name == engine.name);
        if let Some(now) = now.filter(|now| now.version != engine.version) {
            let version = |version: &Option<String>| version.clone().unwrap_or_else(|| "unknown".to_owned());
            let (then, now) = (version(&engine.version), version(&now.version));
            warnings.push(format!("{} is another version: {then}, now {now}", engine.name));
        }
    }
    let new: Vec<&str> = b
        .scenarios
        .iter()
        .map(|scenario| scenario.scenario.name.as_str())
        .filter(|name| a.scenarios.iter().all(|scenario| scenario.scenario.name != *name))
        .collect();
    if !new.is_empty() {
        warnings.push(format!("only in the second file: {}", new.join(", ")));
    }
    warnings
}
