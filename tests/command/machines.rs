//! Machines that can't be built or booted: kernels, RAM disks, workloads, memory.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use ferry_tests::process::Host;

use crate::{FERRY, turn};

const GUEST: &[u8] = ferry_guest_image::WORKLOAD_GUEST;

/// A file with these bytes, beside the host's state.
fn file(host: &Host<'_>, name: &str, bytes: &[u8]) -> PathBuf {
    let path = host.file(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// `ferry run` refuses, names what and why, and leaves nothing.
fn refuses_to_run(host: &Host<'_>, arguments: &[&str], words: &[&str]) {
    let run = ["run", "--name", "web", "--serial", "null"];
    host.refuses(&[&run, arguments].concat(), words);
    assert!(!host.file("web.sock").exists() && host.has_no_record_of("web"), "{arguments:?}");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_kernel_that_can_not_boot_is_named_with_its_flaw() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    let missing = host.file("missing-kernel");
    refuses_to_run(&host, &["--kernel", text(&missing)], &[text(&missing), "No such file"]);
    refuses_to_run(&host, &["--kernel", text(host.state())], &[text(host.state()), "not a file"]);

    let words = file(&host, "words", &b"this is no kernel at all, only a long line of words. ".repeat(9));
    refuses_to_run(&host, &["--kernel", text(&words)], &[text(&words), "neither an ELF image", "bzImage"]);
    let short = file(&host, "short", &GUEST[..40]);
    refuses_to_run(&host, &["--kernel", text(&short)], &[text(&short), "40 bytes"]);
    let empty = file(&host, "empty", b"");
    refuses_to_run(&host, &["--kernel", text(&empty)], &[text(&empty), "0 bytes"]);
    let truncated = file(&host, "truncated", &GUEST[..GUEST.len() / 3]);
    refuses_to_run(&host, &["--kernel", text(&truncated)], &[text(&truncated), "truncated"]);
    let no_pvh = file(&host, "no-pvh", &without_pvh_note());
    refuses_to_run(&host, &["--kernel", text(&no_pvh)], &[text(&no_pvh), "no PVH entry", "CONFIG_PVH"]);
    let foreign = {
        let mut bytes = GUEST.to_vec();
        // e_machine: AArch64.
        bytes[18] = 183;
        file(&host, "foreign", &bytes)
    };
    refuses_to_run(&host, &["--kernel", text(&foreign)], &[text(&foreign), "64-bit x86"]);

    // Nothing of all that is in the way of a kernel that can.
    let good = file(&host, "good", GUEST);
    let arguments = ["run", "--name", "web", "--kernel", text(&good), "--memory", "64M", "--serial", "null"];
    let _process = host.hosts(&[&arguments[..], &["--cmdline", "workload idle"]].concat());
    host.until_ready("web");
}

/// The workload guest with a note of another type where its PVH entry was.
fn without_pvh_note() -> Vec<u8> {
    let mut bytes = GUEST.to_vec();
    // The type (18) and the name of the note.
    let note = b"\x12\0\0\0Xen\0";
    let at = bytes.windows(note.len()).position(|window| window == note).expect("it has a PVH note");
    bytes[at] = 0x77;
    // Nor an entry for Linux's boot protocol.
    bytes[24..32].fill(0);
    bytes
}

#[test]
fn a_ram_disk_that_is_missing_or_too_big_is_named() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    let kernel = file(&host, "kernel", GUEST);
    let with = |initrd: &Path, words: &[&str]| {
        let arguments = ["--kernel", text(&kernel), "--initrd", text(initrd), "--memory", "64M"];
        refuses_to_run(&host, &arguments, words);
    };
    let missing = host.file("missing-initrd");
    with(&missing, &[text(&missing), "No such file"]);
    let big = host.file("big-initrd");
    File::create(&big).unwrap().set_len(1 << 30).unwrap();
    with(&big, &[text(&big), "1073741824 bytes", "does not fit"]);
    let empty = file(&host, "empty-initrd", b"");
    with(&empty, &[text(&empty), "empty"]);
}

#[test]
fn a_workload_that_makes_no_sense_is_explained() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    for (words, flaw) in [
        ("juggle", "juggle"),
        ("dirty rate=fast set=1", "rate=fast"),
        ("dirty speed=5", "speed=5"),
        ("http", "ip="),
        ("idle zero", "zero"),
        ("dirty rate=1 rate=2 set=1", "rate"),
    ] {
        refuses_to_run(&host, &["--guest", words], &["--guest", words, flaw]);
    }
}

#[test]
fn more_memory_than_the_host_has_and_less_than_a_kernel_needs_are_refused() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    refuses_to_run(&host, &["--guest", "idle", "--memory", "8192G"], &["not enough memory", "8796093022208"]);
    refuses_to_run(&host, &["--guest", "idle", "--memory", "2M"], &["workload guest", "memory"]);
    refuses_to_run(&host, &["--guest", "idle", "--memory", "1000000G"], &["1073741824000000 bytes"]);
}

#[test]
fn what_the_command_line_can_not_mean_is_a_usage_error() {
    // No machine is touched, so this needs no KVM.
    let host = Host::new(FERRY);
    let kernel = ["run", "--name", "web", "--kernel", "k"];
    for (arguments, words) in [
        (&["run", "--name", "web"][..], "--guest"),
        (&[&kernel[..], &["--guest", "idle"]].concat(), "cannot be used with"),
        (&[&kernel[..], &["--memory", "lots"]].concat(), "lots"),
        (&[&kernel[..], &["--cpus", "0"]].concat(), "--cpus"),
        (&[&kernel[..], &["--net", "mac=02:00:00:00:00:01"]].concat(), "tap=IF is missing"),
        (&[&kernel[..], &["--serial", "/dev/ttyS0"]].concat(), "file=PATH"),
        (&["run", "--name", "../web", "--guest", "idle"], "../web"),
        (&["receive", "--name", "web", "--listen", "nowhere"], "nowhere"),
        (&["migrate", "web"], "--to"),
        (&["migrate", "web", "--to", "h:1", "--downtime", "soon"], "soon"),
        (&["migrate", "web", "--to", "h:1", "--streams", "0"], "--streams"),
        (&["fly"], "fly"),
    ] {
        let said = host.ferry(arguments);
        assert_eq!(said.code, Some(2), "{arguments:?}: {said:?}");
        assert!(said.stderr.contains(words) && said.stdout.is_empty(), "{arguments:?}: {said:?}");
    }
    assert_eq!(fs::read_dir(host.state()).unwrap().count(), 0);
}
