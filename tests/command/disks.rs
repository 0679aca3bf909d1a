//! Disks as users meet them: who has one, what is refused while the guest runs on, and that a disk follows its VM.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use ferry_tests::process::{Host, Process};

use crate::{FERRY, turn};

const WORKLOAD: &str = "dirty rate=20 set=8";

/// Fits any machine that these tests may share: they are not about downtime.
const BUDGET: &str = "2s";

const SIZE_BYTES: u64 = 1 << 20;

/// An empty disk beside a host's state.
fn disk(host: &Host<'_>, name: &str) -> PathBuf {
    let path = host.file(name);
    File::create(&path).unwrap().set_len(SIZE_BYTES).unwrap();
    path
}

fn path_of(path: &Path) -> String {
    format!("path={}", path.display())
}

fn arguments<'a>(name: &'a str, disks: &'a [&'a str]) -> Vec<&'a str> {
    let mut arguments =
        vec!["run", "--name", name, "--guest", WORKLOAD, "--memory", "64M", "--serial", "null"];
    arguments.extend(disks.iter().flat_map(|disk| ["--disk", disk]));
    arguments
}

/// `ferry run` under the name `web` with these disks.
fn runs(host: &Host<'_>, disks: &[&str]) -> Process {
    let process = host.hosts(&arguments("web", disks));
    host.until_ready("web");
    process
}

/// `ferry receive` under the name `web` with these words, and where it listens.
fn receives(host: &Host<'_>, words: &[&str]) -> (Process, String) {
    let arguments = [&["receive", "--name", "web", "--listen", "127.0.0.1:0"], words].concat();
    let process = host.hosts(&arguments);
    let address = process.first["address"].as_str().expect("an address").to_owned();
    (process, address)
}

fn moves(source: &Host<'_>, target: &Host<'_>, address: &str) {
    source.ferry(&["migrate", "web", "--to", address, "--downtime", BUDGET]).well();
    target.until_state("web", "running");
    target.goes_on("web");
}

/// `ferry migrate` is refused before any page moves, and the guest runs on.
fn stays(source: &Host<'_>, address: &str, words: &[&str]) {
    let arguments = ["migrate", "web", "--to", address, "--downtime", BUDGET, "--json"];
    let said = source.ferry(&arguments);
    assert!(!said.stdout.contains("round-started"), "pages moved before it was refused: {said:?}");
    said.refusal(&[words, &["goes on here"]].concat());
    source.until_state("web", "running");
    source.goes_on("web");
}

#[test]
fn a_disk_in_use_is_refused_and_is_free_again_afterwards() {
    let Some(_turn) = turn() else { return };
    let (one, other) = (Host::new(FERRY), Host::new(FERRY));
    let (disk, spare) = (disk(&one, "a.img"), disk(&one, "b.img"));
    let words = path_of(&disk);
    let process = runs(&one, &[&words]);
    let name = disk.to_str().unwrap();
    other.refuses(&arguments("web", &[&words]), &[name, "in use by another machine"]);
    other.refuses(&arguments("web", &[&path_of(&spare), &format!("{words},ro")]), &[name, "in use"]);
    // Twice in one machine is twice too.
    let twice = path_of(&spare);
    other.refuses(&arguments("web", &[&twice, &twice]), &["b.img", "in use"]);
    one.goes_on("web");
    // A killed process has no locks any more.
    process.kill();
    let process = runs(&other, &[&words]);
    other.ferry(&["stop", "web"]).well();
    process.end().well();
    let reader = format!("{words},ro,serial=shared-1");
    let _readers = [runs(&one, &[&reader]), runs(&other, &[&reader])];
}

#[test]
fn a_disk_that_can_not_be_had_is_named() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    let good = disk(&host, "good.img");
    let odd = host.file("odd.img");
    fs::write(&odd, [0; 700]).unwrap();
    let good = path_of(&good);
    let many = vec![good.as_str(); 9];
    for (disks, words) in [
        (&["path=/nowhere/a.img"][..], &["/nowhere/a.img", "No such file"][..]),
        (&[&path_of(host.state())], &["neither a file nor a block device"]),
        (&["path=/dev/zero"], &["/dev/zero", "neither a file nor a block device"]),
        (&[&path_of(&odd)], &["odd.img", "700 bytes"]),
        (
            &[&format!("{good},serial=longer-than-twenty-characters")],
            &["longer-than-twenty-characters", "20"],
        ),
        (&many, &["9 disks", "8"]),
    ] {
        host.refuses(&arguments("web", disks), words);
        assert!(host.has_no_record_of("web"), "{disks:?}");
    }
    let said = host.ferry(&arguments("web", &["path=a,size=5"]));
    assert_eq!((said.code, said.stderr.contains("size=5")), (Some(2), true), "{said:?}");
}

#[test]
fn a_disk_follows_its_vm_there_and_back() {
    let Some(_turn) = turn() else { return };
    let (one, other) = (Host::new(FERRY), Host::new(FERRY));
    let disk = disk(&one, "a.img");
    let words = path_of(&disk);
    let first = runs(
        &one,
        &[&format!("{words},serial=root"), &format!("{},ro", path_of(&self::disk(&one, "r.img")))],
    );
    let (second, address) = receives(&other, &[]);
    moves(&one, &other, &address);
    first.end().well();
    let third = Host::new(FERRY);
    third.refuses(&arguments("web", &[&words]), &["in use by another machine"]);

    let (third_process, address) = receives(&one, &[]);
    moves(&other, &one, &address);
    second.end().well();
    third.refuses(&arguments("web", &[&words]), &["in use by another machine"]);
    one.ferry(&["stop", "web"]).well();
    third_process.end().well();
    let _process = runs(&third, &[&words]);
}

#[test]
fn what_is_wrong_with_a_disk_at_the_target_is_refused_while_the_guest_runs_on() {
    let Some(_turn) = turn() else { return };
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let shared = disk(&source, "shared.img");
    let local = disk(&target, "local.img");
    let _running = runs(&source, &[&path_of(&shared)]);
    let read_only = format!("{},ro", path_of(&shared));
    let missing = path_of(&target.file("missing.img"));
    let (local_words, shared_words) = (path_of(&local), path_of(&shared));
    let unlocked = format!("{local_words},lock=off");
    for (words, refusal) in [
        (&["--disk", &missing][..], &["missing.img", "storage that both hosts share", "No such file"][..]),
        (&["--disk", &local_words], &["local.img", "not the file that the source uses"]),
        (&["--disk", &read_only], &["shared.img", "writable at the source", "read-only here"]),
        (&["--disk", &shared_words, "--disk", &local_words], &["1 disks", "2 were named"]),
    ] {
        let (process, address) = receives(&target, words);
        stays(&source, &address, refusal);
        process.kill();
    }
    File::options().write(true).open(&local).unwrap().set_len(SIZE_BYTES * 2).unwrap();
    let (process, address) = receives(&target, &["--disk", &unlocked]);
    stays(&source, &address, &["2097152 bytes here and 1048576 at the source"]);
    process.kill();
    // A third machine has the file that is at the disk's path there.
    let third = Host::new(FERRY);
    let in_use = runs(&third, &[&local_words]);
    let (process, address) = receives(&target, &["--disk", &local_words]);
    stays(&source, &address, &["local.img", "not the file that the source uses"]);
    process.kill();
    in_use.kill();
    // After all that it moves.
    let (_process, address) = receives(&target, &["--disk", &shared_words]);
    moves(&source, &target, &address);
}

#[test]
fn two_targets_can_not_await_the_same_disk() {
    let Some(_turn) = turn() else { return };
    let (source, first, second) = (Host::new(FERRY), Host::new(FERRY), Host::new(FERRY));
    let shared = path_of(&disk(&source, "shared.img"));
    let workload = "dirty rate=20 set=8 fill=32 random=100";
    let mut command = arguments("web", &[]);
    command[4] = workload;
    let _running = source.hosts(&[&command[..], &["--disk", &shared]].concat());
    source.until_ready("web");
    let (_first, address) = receives(&first, &[]);
    let slow = ["--bandwidth", "2M/s", "--downtime", BUDGET, "--json"];
    let migrating =
        source.start(source.command(&[&["migrate", "web", "--to", &address], &slow[..]].concat()));
    migrating.until("transferred");
    // Nobody else gets it meanwhile, be it to run or to take over.
    second.refuses(&arguments("web", &[&shared]), &["being taken over"]);
    source.ferry(&["migrate", "web", "--cancel"]).well();
    assert_eq!(migrating.end().code, Some(1));
    source.goes_on("web");
    first.until_state("web", "waiting");
    second.refuses(&arguments("web", &[&shared]), &["in use by another machine"]);
    let (_second, address) = receives(&second, &[]);
    moves(&source, &second, &address);
}
