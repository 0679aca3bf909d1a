//! Processors: what a guest is shown, and targets that can't go on showing it.

use ferry_tests::process::{Host, Process};

use crate::{FERRY, turn};

const RUN: [&str; 8] = ["run", "--name", "web", "--memory", "64M", "--serial", "null", "--guest"];

/// `ferry receive` with this limit, and where it listens.
fn receives(host: &Host<'_>, limit: &str) -> (Process, String) {
    let process = host.hosts(&["receive", "--name", "web", "--listen", "127.0.0.1:0", "--cpu", limit]);
    let address = process.first["address"].as_str().expect("an address").to_owned();
    (process, address)
}

#[test]
fn a_target_without_a_feature_names_it_before_anything_moves_and_the_guest_runs_on() {
    let Some(_turn) = turn() else { return };
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let _running = source.runs("dirty rate=20 set=8");
    assert_eq!(source.vm("web")["cpu_profile"], "host");
    // A feature that KVM shows on every host: it brings it along itself.
    let profile = target.file("small.toml");
    std::fs::write(&profile, "base = 'host'\nremove = ['tsc_adjust', 'kvm_clocksource2']").unwrap();
    let (mut waiting, address) = receives(&target, profile.to_str().unwrap());
    let words = [
        "tsc_adjust (leaf 7, ebx bit 1)",
        "kvm_clocksource2 (leaf 0x40000001, eax bit 3)",
        "CPU profile host",
    ];
    let said = source.ferry(&["migrate", "web", "--to", &address, "--json"]);
    assert!(!said.stdout.contains("transferred"), "pages have moved: {said:?}");
    let error = said.refusal(&[&words[..], &["goes on here"]].concat());
    println!("{error}");
    source.until_state("web", "running");
    source.goes_on("web");
    assert!(waiting.lives());
    target.until_state("web", "waiting");
    drop(waiting);
    // A target that offers all of it is as good as ever.
    let (_waiting, address) = receives(&target, "host");
    source.ferry(&["migrate", "web", "--to", &address, "--downtime", "2s", "--json"]).json_lines();
    target.until_state("web", "running");
    target.goes_on("web");
    assert_eq!(target.vm("web")["cpu_profile"], "host");
}

#[test]
fn a_guest_of_a_profile_goes_where_the_profile_is_offered() {
    let Some(_turn) = turn() else { return };
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let profile = source.file("plain.toml");
    std::fs::write(&profile, "base = 'host'\nremove = ['tsc_adjust']").unwrap();
    let profile = profile.to_str().unwrap();
    let arguments = [&RUN[..], &["dirty rate=20 set=8", "--cpu", profile, "--cpus", "2"]].concat();
    let _running = source.hosts(&arguments);
    source.until_ready("web");
    let (_waiting, address) = receives(&target, profile);
    source.ferry(&["migrate", "web", "--to", &address, "--downtime", "2s", "--json"]).json_lines();
    target.until_state("web", "running");
    target.goes_on("web");
}

#[test]
fn profiles_that_can_not_be_are_refused() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    let file = |name: &str, text: &str| {
        let path = host.file(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let nonsense = file("nonsense.toml", "base = 'host'\nadd = ['warp_drive']");
    let too_much = file("much.toml", "base = 'host'\nadd = ['avx512pf', 'tbm', 'enqcmd']");
    for (profile, code, words) in [
        ("x86-64-v9", 2, &["x86-64-v9", "x86-64-v3"][..]),
        ("/does/not/exist.toml", 2, &["/does/not/exist.toml", "No such file"]),
        (&nonsense, 2, &["warp_drive"]),
        // Of Xeon Phi, of the FX series and of Sapphire Rapids: no processor has all three.
        (&too_much, 1, &["can't show", "lacks"]),
    ] {
        let said = host.ferry(&[&RUN[..], &["idle", "--cpu", profile]].concat());
        assert_eq!(said.code, Some(code), "{said:?}");
        for word in words {
            assert!(said.stderr.contains(word), "'{word}' is missing in {said:?}");
        }
    }
    assert!(host.has_no_record_of("web"));
}
