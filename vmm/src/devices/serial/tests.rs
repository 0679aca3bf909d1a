//! The port with this test as its guest: output, input, and what of it is saved.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::*;
use crate::devices::Bus;
use crate::devices::power::{self, Power};
use crate::parking::Control;

const DATA: u8 = 0;
const INTERRUPT_ENABLE: u8 = 1;
const MODEM_CONTROL: u8 = 4;
const LINE_STATUS: u8 = 5;
const FIFO_BYTES: usize = 64;

/// Long enough for what must not happen to happen.
const A_WHILE: Duration = Duration::from_millis(50);

/// A port with its thread, and this test as its guest.
struct Running {
    bus: Arc<Bus>,
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start(target: &SerialTarget) -> Self {
        let power = Power::new(Box::new(power::tests::Line::default()));
        let bus = Arc::new(Bus { serial: SerialPort::open(target).unwrap(), power, virtio: Vec::new() });
        let control = Arc::new(Control::new());
        control.set_kicks(vec![bus.serial.kick()]);
        let thread = SerialPort::spawn(Arc::clone(&bus), Arc::clone(&control)).unwrap();
        assert!(control.run());
        bus.serial.write(INTERRUPT_ENABLE, 1);
        Self { bus, control, thread: Some(thread) }
    }

    fn port(&self) -> &SerialPort {
        &self.bus.serial
    }

    fn in_fifo(&self) -> usize {
        self.port().save().in_buffer.len()
    }

    /// Reads as a guest does, which waits for each byte.
    fn guest_reads(&self, count: usize) -> Vec<u8> {
        let byte = || {
            eventually("there is input", || self.port().read(LINE_STATUS) & 1 != 0);
            self.port().read(DATA)
        };
        (0..count).map(|_| byte()).collect()
    }

    fn guest_says(&self, text: &[u8]) {
        text.iter().for_each(|byte| self.port().write(DATA, *byte));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.control.exit();
        self.thread.take().unwrap().join().unwrap();
    }
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..5000 {
        if condition() {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("this never came true: {what}");
}

fn heard(console: &mut UnixStream, count: usize) -> Vec<u8> {
    console.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut bytes = vec![0; count];
    console.read_exact(&mut bytes).unwrap();
    bytes
}

fn typed(count: usize) -> Vec<u8> {
    (b'a'..=b'z').cycle().take(count).collect()
}

#[test]
fn input_waits_until_the_fifo_has_room_and_none_is_read_after_a_pause() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("port");
    let running = Running::start(&SerialTarget::Socket(path.clone()));
    let mut console = UnixStream::connect(&path).unwrap();
    let text = typed(200);
    console.write_all(&text[..150]).unwrap();
    eventually("the FIFO is full", || running.in_fifo() == FIFO_BYTES);
    assert_eq!(running.port().interrupt().read().unwrap(), 1, "one interrupt until the guest has looked");
    thread::sleep(A_WHILE);
    assert_eq!(running.in_fifo(), FIFO_BYTES, "nothing was pushed out");
    assert_eq!(running.guest_reads(128), text[..128]);
    eventually("the rest follows", || running.in_fifo() == 22);

    running.control.pause();
    console.write_all(&text[150..]).unwrap();
    thread::sleep(A_WHILE);
    let saved = running.port().save();
    assert_eq!(saved.in_buffer, text[128..150], "input was read after the pause");
    // Another host goes on with what was in the FIFO, and an interrupt for it.
    let target = Running::start(&SerialTarget::Null);
    target.control.pause();
    target.port().restore(&saved).unwrap();
    assert_eq!(target.port().save(), saved);
    assert!(target.port().interrupt().read().unwrap() > 0, "the guest is not told again");
    assert!(target.control.run());
    assert_eq!(target.guest_reads(22), text[128..150]);
    // And so does this one, if the migration was given up.
    assert!(running.control.run());
    assert_eq!(running.guest_reads(72), text[128..]);
}

#[test]
fn consoles_come_and_go_and_hear_what_was_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("port");
    let running = Running::start(&SerialTarget::Socket(path.clone()));
    running.guest_says(b"booted\r\n");
    let mut first = UnixStream::connect(&path).unwrap();
    assert_eq!(heard(&mut first, 8), b"booted\r\n");
    let mut second = UnixStream::connect(&path).unwrap();
    assert_eq!(heard(&mut second, 8), b"booted\r\n");
    running.guest_says(b"login: ");
    assert_eq!(heard(&mut first, 7), b"login: ");
    assert_eq!(heard(&mut second, 7), b"login: ");
    first.write_all(b"ro").unwrap();
    assert_eq!(running.guest_reads(2), b"ro");
    drop(first);
    second.write_all(b"ot").unwrap();
    assert_eq!(running.guest_reads(2), b"ot");
    drop(second);

    // One that the machine's owner listens for.
    let own = folder.path().join("own");
    running.port().serve_console(UnixListener::bind(&own).unwrap()).unwrap();
    let mut third = UnixStream::connect(&own).unwrap();
    assert_eq!(heard(&mut third, 15), b"booted\r\nlogin: ");
    third.write_all(b"x").unwrap();
    assert_eq!(running.guest_reads(1), b"x");
    drop(running);
    assert_eq!(third.read(&mut [0; 8]).unwrap(), 0, "the end of the machine is the end of its consoles");
    assert!(!path.exists(), "the port's socket stays behind");
    assert!(own.exists(), "this one is its owner's");
}

#[test]
fn a_console_that_nobody_reads_or_that_is_full_stops_no_pause() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("port");
    let running = Running::start(&SerialTarget::Socket(path.clone()));
    let mut deaf = UnixStream::connect(&path).unwrap();
    deaf.write_all(&typed(FIFO_BYTES + 10)).unwrap();
    eventually("it is attached", || running.in_fifo() == FIFO_BYTES);
    running.guest_says(&typed(1 << 20));
    for _ in 0..20 {
        running.control.pause();
        assert!(running.control.run());
    }
    // Hung up with something left to read, which the guest does not read either: must not spin, nor be lost.
    drop(deaf);
    assert_eq!(running.guest_reads(FIFO_BYTES + 10), typed(FIFO_BYTES + 10));
}

#[test]
fn a_pseudo_terminal_goes_both_ways_and_echoes_nothing() {
    let running = Running::start(&SerialTarget::Pty);
    let path = running.port().terminal().unwrap().to_owned();
    running.guest_says(b"login: ");
    let mut terminal = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let mut bytes = [0; 7];
    terminal.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"login: ");
    terminal.write_all(b"root\r").unwrap();
    assert_eq!(running.guest_reads(5), b"root\r");
    // Whoever looks may leave, and come again.
    drop(terminal);
    thread::sleep(A_WHILE);
    assert_eq!(running.in_fifo(), 0, "its own output came back");
    let mut terminal = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    terminal.write_all(b"x").unwrap();
    assert_eq!(running.guest_reads(1), b"x");
}

#[test]
fn a_guest_that_tests_its_port_gets_no_input_meanwhile() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("port");
    let running = Running::start(&SerialTarget::Socket(path.clone()));
    running.port().write(MODEM_CONTROL, 0x18);
    let mut console = UnixStream::connect(&path).unwrap();
    console.write_all(b"typed").unwrap();
    thread::sleep(A_WHILE);
    running.guest_says(b"\x55");
    assert_eq!(running.guest_reads(1), [0x55]);
    running.port().write(MODEM_CONTROL, 0x08);
    assert_eq!(running.guest_reads(5), b"typed");
}

#[test]
fn a_socket_that_is_in_use_or_no_socket_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("port");
    let listener = UnixListener::bind(&path).unwrap();
    let refusal = || SerialPort::open(&SerialTarget::Socket(path.clone())).unwrap_err();
    assert!(matches!(refusal(), SerialError::Socket { .. }));
    assert!(refusal().to_string().contains(path.to_str().unwrap()));
    // What a process that was killed has left is replaced.
    drop(listener);
    let port = SerialPort::open(&SerialTarget::Socket(path.clone())).unwrap();
    drop(port);
    assert!(!path.exists());
    std::fs::write(&path, "words").unwrap();
    assert!(matches!(refusal(), SerialError::Socket { .. }));
    assert_eq!(std::fs::read(&path).unwrap(), b"words");
}

#[test]
fn output_reaches_its_file_before_and_after_a_restore() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("console");
    let port = SerialPort::open(&SerialTarget::File(path.clone())).unwrap();
    port.write(0, b'a');
    port.write(7, 0x5a);
    let saved = port.save();
    port.write(7, 0);
    port.restore(&saved).unwrap();
    assert_eq!(port.save(), saved);
    assert_eq!(port.read(7), 0x5a);
    port.write(0, b'b');
    // Dropping it waits for what was said.
    drop(port);
    assert_eq!(std::fs::read(&path).unwrap(), b"ab");
}

#[test]
fn an_output_file_that_cannot_be_is_named() {
    let error = SerialPort::open(&SerialTarget::File("/nonexistent/console".into())).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/console"), "{error}");
}

#[test]
fn a_buffer_longer_than_the_device_is_refused() {
    let port = SerialPort::open(&SerialTarget::Null).unwrap();
    let mut saved = port.save();
    saved.in_buffer = vec![0; 1000];
    assert!(matches!(port.restore(&saved), Err(StateError::Device { .. })));
}
