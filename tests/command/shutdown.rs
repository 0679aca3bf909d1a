//! Guests that end themselves: by the power button, and in the middle of a migration.

use std::fs;

use ferry_tests::process::{Host, Process};
use serde_json::Value;

use crate::power_button::{SWITCHES_OFF, WAITS_FOR_THE_BUTTON};
use crate::tiny_kernel::elf;
use crate::{FERRY, turn};

/// Behind [`WAITS_FOR_THE_BUTTON`]: ACPI's reset register.
const RESETS: &[u8] = &[0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xf4, 0xeb, 0xfd];

/// What a migration has to send for some seconds.
const INITRD_BYTES: u32 = 16 << 20;

/// `ferry run` with a guest that does `last` once its power button was pressed.
fn runs(host: &Host<'_>, last: &[u8]) -> Process {
    let (kernel, initrd) = (host.file("kernel"), host.file("initrd"));
    fs::write(&kernel, elf(&[WAITS_FOR_THE_BUTTON, last].concat())).unwrap();
    let bytes = (0..INITRD_BYTES / 4).flat_map(|word| word.wrapping_mul(0x9e37_79b1).to_le_bytes());
    fs::write(&initrd, bytes.collect::<Vec<_>>()).unwrap();
    let [kernel, initrd] = [&kernel, &initrd].map(|path| path.to_str().unwrap());
    let process = host.hosts(&[
        "run", "--name", "web", "--kernel", kernel, "--initrd", initrd, "--memory", "64M", "--serial", "null",
    ]);
    host.until_state("web", "running");
    process
}

/// Presses until the guest listens, which it does a few instructions after its start.
fn press(host: &Host<'_>) {
    for _ in 0..100 {
        let said = host.ferry(&["shutdown", "web", "--json"]);
        if said.code == Some(0) {
            return;
        }
        said.refusal(&["does not listen to the power button", "stop the machine"]);
    }
    panic!("the guest never listens");
}

/// What a host process said last.
fn last_event(process: Process) -> Value {
    let said = process.end();
    assert_eq!(said.code, Some(0), "{said:?}");
    said.json_lines().pop().expect("an event")
}

#[test]
fn the_power_button_ends_a_guest_that_listens_and_says_so_of_one_that_does_not() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    host.refuses(&["shutdown", "web"], &["there is no VM 'web'"]);
    let process = runs(&host, SWITCHES_OFF);
    host.ferry(&["pause", "web"]).well();
    host.refuses(&["shutdown", "web"], &["can't shut down", "paused"]);
    host.ferry(&["resume", "web"]).well();
    press(&host);
    let event = last_event(process);
    assert_eq!((&event["event"], &event["reason"]), (&"ended".into(), &"the guest has shut down".into()));

    let process = host.runs("idle");
    host.refuses(&["shutdown", "web"], &["does not listen to the power button"]);
    host.goes_on("web");
    drop(process);
}

#[test]
fn a_guest_that_ends_itself_while_it_moves_has_ended_here_and_not_there() {
    let Some(_turn) = turn() else { return };
    for (last, how) in [(SWITCHES_OFF, "the guest has shut down"), (RESETS, "the guest has reset itself")] {
        let (source, target) = (Host::new(FERRY), Host::new(FERRY));
        let running = runs(&source, last);
        let (waiting, address) = target.receives();
        let slow = ["--bandwidth", "2M/s", "--downtime", "2ms", "--json"];
        let arguments = [&["migrate", "web", "--to", &address][..], &slow].concat();
        let migrating = source.start(source.command(&arguments));
        migrating.until("transferred");
        press(&source);
        migrating.end().refusal(&[how, "while it was moving", "ended here"]);
        let event = last_event(running);
        assert_eq!((&event["event"], &event["reason"]), (&"ended".into(), &how.into()));
        target.until_state("web", "waiting");
        drop(waiting);
    }
}
