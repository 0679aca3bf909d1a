//! The serial port as people use it: `ferry console` on a terminal, and beside a migration.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use ferry_tests::process::{Host, Process, wait_until};
use nix::pty::openpty;
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};

use crate::tiny_kernel::elf;
use crate::{FERRY, turn};

const PATIENCE: Duration = Duration::from_secs(20);
const DETACH: u8 = 0x1d;

/// Says everything again that it hears on its serial port.
const ECHOING: &[u8] = &[
    0xba, 0xfd, 0x03, 0x00, 0x00, // next: mov edx, 0x3fd
    0xec, // in al, dx: the line's status
    0xa8, 0x01, // test al, 1
    0x74, 0xf6, // jz next
    0xba, 0xf8, 0x03, 0x00, 0x00, // mov edx, 0x3f8
    0xec, // in al, dx
    0xee, // out dx, al
    0xeb, 0xed, // jmp next
];

fn echoing_guest(host: &Host<'_>) -> Process {
    let kernel = host.file("echoing");
    fs::write(&kernel, elf(ECHOING)).unwrap();
    let kernel = kernel.to_str().unwrap();
    host.hosts(&["run", "--name", "web", "--kernel", kernel, "--memory", "16M", "--serial", "null"])
}

fn echoes(mut console: &UnixStream, text: &str) {
    console.set_read_timeout(Some(PATIENCE)).unwrap();
    console.write_all(text.as_bytes()).unwrap();
    let mut heard = vec![0; text.len()];
    console.read_exact(&mut heard).unwrap();
    assert_eq!(heard, text.as_bytes());
}

#[test]
fn a_console_follows_a_vm_by_attaching_again() {
    let Some(_turn) = turn() else { return };
    let (a, b) = (Host::new(FERRY), Host::new(FERRY));
    let source = echoing_guest(&a);
    let console = UnixStream::connect(a.file("web.console")).unwrap();
    echoes(&console, "a first line");
    let (_target, address) = b.receives();
    // It waits for the VM, as its owner does.
    let arriving = UnixStream::connect(b.file("web.console")).unwrap();
    a.ferry(&["migrate", "web", "--to", &address, "--downtime", "2s", "--json"]).well();
    assert_eq!((&console).read(&mut [0; 16]).unwrap(), 0, "the end of the VM here");
    echoes(&arriving, "and another");
    assert_eq!(source.end().code, Some(0));
    assert!(!a.file("web.console").exists());
}

/// A terminal with `ferry console` on it.
struct Attached {
    terminal: OwnedFd,
    before: Termios,
    keys: File,
    screen: Receiver<Vec<u8>>,
    shown: Vec<u8>,
    child: Child,
}

impl Attached {
    fn start(host: &Host<'_>) -> Self {
        let pair = openpty(None, None).unwrap();
        let before = tcgetattr(&pair.slave).unwrap();
        let end = || Stdio::from(pair.slave.try_clone().unwrap());
        let mut command = Command::new("setsid");
        command.args(["--ctty", FERRY, "console", "web"]).env("FERRY_STATE_DIR", host.state());
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap();
        let keys = File::from(pair.master);
        let (mut reader, (sender, screen)) = (keys.try_clone().unwrap(), channel());
        std::thread::spawn(move || {
            let mut chunk = [0; 256];
            while let Ok(count @ 1..) = reader.read(&mut chunk)
                && sender.send(chunk[..count].to_vec()).is_ok()
            {}
        });
        let mut attached = Self { terminal: pair.slave, before, keys, screen, shown: Vec::new(), child };
        attached.until_shown("Ctrl-] detaches");
        let flags = || tcgetattr(&attached.terminal).unwrap().local_flags;
        wait_until("raw mode", || (!flags().intersects(LocalFlags::ICANON | LocalFlags::ISIG)).then_some(()));
        attached
    }

    fn types(&self, keys: &[u8]) {
        (&self.keys).write_all(keys).unwrap();
    }

    /// Waits for `text`; what came after it is for the next time.
    fn until_shown(&mut self, text: &str) {
        loop {
            let text = text.as_bytes();
            if let Some(at) = self.shown.windows(text.len()).position(|shown| shown == text) {
                self.shown.drain(..at + text.len());
                return;
            }
            let more = self.screen.recv_timeout(PATIENCE);
            let shown = String::from_utf8_lossy(&self.shown);
            let more =
                more.unwrap_or_else(|_| panic!("{:?} is not in {shown:?}", text.escape_ascii().to_string()));
            self.shown.extend(more);
        }
    }

    /// Waits for the end, after which the terminal must be as it was; returns the exit code.
    fn end(mut self) -> Option<i32> {
        let status = wait_until("its end", || self.child.try_wait().unwrap());
        let after = tcgetattr(self.terminal.as_fd()).unwrap();
        assert_eq!(after.local_flags, self.before.local_flags, "the terminal's mode");
        assert_eq!(
            (after.input_flags, after.output_flags),
            (self.before.input_flags, self.before.output_flags)
        );
        status.code()
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_terminal_is_put_back_however_the_console_ends() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    host.refuses(&["info", "web"], &["no VM 'web'"]);
    let said = host.ferry(&["console", "web"]);
    assert!(said.code == Some(1) && said.stderr.contains("no VM 'web'"), "{said:?}");
    let vm = echoing_guest(&host);

    let mut console = Attached::start(&host);
    console.types(b"typed");
    console.until_shown("typed");
    // Ctrl-C is the guest's; what follows Ctrl-] is nobody's.
    console.types(&[3, DETACH, b'x']);
    console.until_shown("detached");
    assert_eq!(console.end(), Some(0));

    let mut console = Attached::start(&host);
    console.until_shown("typed\u{3}");
    let id = console.child.id().to_string();
    assert!(Command::new("kill").args(["-s", "TERM", &id]).status().unwrap().success());
    assert_eq!(console.end(), Some(1));

    let mut console = Attached::start(&host);
    console.types(b"last");
    console.until_shown("last");
    host.ferry(&["stop", "web"]).well();
    console.until_shown("closed");
    assert_eq!(console.end(), Some(0));
    assert_eq!(vm.end().code, Some(0));
}
