//! The power button, and switching off.
//!
//! Left out: telling anybody else in the guest. There is nothing here that has to be stopped in order; what the loads
//! have written is flushed.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::Command;

/// Where the first input device appears, if the kernel knows a button.
const BUTTON: &str = "/dev/input/event0";

/// The bytes of `struct input_event` on x86-64: two words of time, then type, code and value.
const EVENT_BYTES: usize = 24;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

/// Switches off when the button is pressed, if there is one. Returns at once.
pub(crate) fn watch_button() {
    let Ok(button) = File::open(Path::new(BUTTON)) else {
        println!("guest-agent: no power button");
        return;
    };
    std::thread::spawn(move || {
        if wait_for_press(button).is_ok() {
            println!("guest-agent: the power button was pressed");
            off();
        }
    });
}

fn wait_for_press(mut button: impl Read) -> std::io::Result<()> {
    let mut event = [0; EVENT_BYTES];
    loop {
        button.read_exact(&mut event)?;
        let half = |at: usize| u16::from_le_bytes([event[at], event[at + 1]]);
        let pressed = event[20..] == 1_i32.to_le_bytes();
        if (half(16), half(18), pressed) == (EV_KEY, KEY_POWER, true) {
            return Ok(());
        }
    }
}

/// Switches the machine off, or halts it where the kernel knows no way to.
pub(crate) fn off() {
    end("poweroff");
}

/// Restarts the machine.
pub(crate) fn restart() {
    end("reboot");
}

fn end(command: &str) {
    nix::unistd::sync();
    // Busybox's own commands; with -f they don't ask an init process, which is a shell here.
    if let Err(error) = Command::new("/bin/busybox").args([command, "-f"]).status() {
        println!("guest-agent: {command}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u16, code: u16, value: i32) -> Vec<u8> {
        let words = [kind.to_le_bytes(), code.to_le_bytes()].concat();
        [vec![0; 16], words, value.to_le_bytes().to_vec()].concat()
    }

    #[test]
    fn only_pressing_power_counts() {
        let others = [event(EV_KEY, KEY_POWER, 0), event(EV_KEY, 30, 1), event(0, KEY_POWER, 1)].concat();
        assert!(wait_for_press(&others[..]).is_err(), "it read on to the end");
        let pressed = [others, event(EV_KEY, KEY_POWER, 1)].concat();
        wait_for_press(&pressed[..]).unwrap();
    }
}
