//! Threads of each role do what they are for and nothing else. A filter can't be taken off again, so every test has a process of
//! its own: the test binary, started anew.

// UNSAFETY: a test maps memory that may be executed, to see that it can't.
#![expect(unsafe_code, reason = "mmap is unsafe, whatever rights are asked for")]

use std::process::Command;

use super::*;

const STARTED_FOR: &str = "FERRY_TEST_CONFINED";

/// Runs `test` (its full name) in a process of its own, where it comes here again with `true`.
fn in_own_process(test: &str) -> bool {
    if std::env::var_os(STARTED_FOR).is_some() {
        return true;
    }
    let own = std::env::current_exe().unwrap();
    let output = Command::new(own)
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(STARTED_FOR, test)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    false
}

/// What a thread of `role` finds.
fn on_thread<T: Send + 'static>(role: Role, work: impl FnOnce() -> T + Send + 'static) -> T {
    std::thread::spawn(move || {
        enter(role);
        work()
    })
    .join()
    .unwrap()
}

fn count(role: Role, system_call: &str) -> u64 {
    let refusals = refusals();
    refusals
        .iter()
        .find(|refusal| refusal.role == role && refusal.system_call == system_call)
        .map_or(0, |refusal| refusal.count)
}

#[test]
fn a_vcpu_opens_no_file_and_no_socket_and_lives_on() {
    if !in_own_process("confine::tests::a_vcpu_opens_no_file_and_no_socket_and_lives_on") {
        return;
    }
    begin(Seccomp::On, Role::Control).unwrap();
    let errors = on_thread(Role::Vcpu, || {
        let file = std::fs::File::open("/proc/self/status").map(drop).unwrap_err();
        let socket = std::net::TcpListener::bind("127.0.0.1:0").map(drop).unwrap_err();
        // It allocates, locks and waits as before.
        let memory = vec![1_u8; 64 << 20];
        std::thread::sleep(std::time::Duration::from_millis(1));
        assert_eq!(memory[memory.len() - 1], 1);
        [file, socket].map(|error| error.raw_os_error())
    });
    assert_eq!(errors, [Some(libc::ENOSYS); 2]);
    let threads = on_thread(Role::Vcpu, || std::thread::Builder::new().spawn(|| ()).map(drop).is_ok());
    assert!(!threads, "a vCPU has no use for threads");
    assert_eq!((count(Role::Vcpu, "openat"), count(Role::Vcpu, "socket")), (1, 1));
    assert_eq!(count(Role::Control, "openat"), 0);
    // The one that started it still may.
    assert!(std::fs::File::open("/proc/self/status").is_ok());
}

#[test]
fn no_thread_starts_a_process() {
    if !in_own_process("confine::tests::no_thread_starts_a_process") {
        return;
    }
    begin(Seccomp::On, Role::Control).unwrap();
    let error = Command::new("/bin/true").status().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSYS));
    let error = on_thread(Role::Data, || Command::new("/bin/true").status().map(drop).unwrap_err());
    assert_eq!(error.raw_os_error(), Some(libc::ENOSYS));
}

#[test]
fn only_the_opener_keeps_capabilities() {
    if !in_own_process("confine::tests::only_the_opener_keeps_capabilities") {
        return;
    }
    let before = effective();
    if before.is_empty() {
        println!("SKIPPED (capabilities can only be given up by who has some: run as root)");
        assert!(std::env::var_os("CI").is_none());
        return;
    }
    let (ask, asked) = std::sync::mpsc::channel();
    let opener = std::thread::spawn(move || {
        begin(Seccomp::Off, Role::Opener).unwrap();
        let () = asked.recv().unwrap();
        // What it starts has none.
        (effective(), on_thread(Role::Vcpu, effective))
    });
    while SECCOMP.get().is_none() {
        std::thread::yield_now();
    }
    enter(Role::Control);
    ask.send(()).unwrap();
    let none = rustix::thread::CapabilitySet::empty();
    assert_eq!(opener.join().unwrap(), (before, none));
    assert_eq!((effective(), on_thread(Role::Control, effective)), (none, none));
}

fn effective() -> rustix::thread::CapabilitySet {
    rustix::thread::capabilities(None).unwrap().effective
}

#[test]
fn with_log_everything_is_carried_out() {
    if !in_own_process("confine::tests::with_log_everything_is_carried_out") {
        return;
    }
    begin(Seccomp::Log, Role::Control).unwrap();
    assert!(on_thread(Role::Vcpu, || std::fs::File::open("/proc/self/status").is_ok()));
    assert_eq!(refusals(), []);
}

#[test]
fn nothing_happens_to_who_did_not_ask() {
    if !in_own_process("confine::tests::nothing_happens_to_who_did_not_ask") {
        return;
    }
    assert!(on_thread(Role::Vcpu, || std::fs::File::open("/proc/self/status").is_ok()));
}

#[test]
fn memory_that_is_written_and_executed_is_refused() {
    if !in_own_process("confine::tests::memory_that_is_written_and_executed_is_refused") {
        return;
    }
    begin(Seccomp::On, Role::Control).unwrap();
    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
    let length = std::num::NonZeroUsize::new(4096).unwrap();
    let map = move |rights| {
        // SAFETY: a new private mapping of its own touches nobody's memory.
        unsafe { mmap_anonymous(None, length, rights, MapFlags::MAP_PRIVATE) }.map(drop).err()
    };
    let (all, executed) = (ProtFlags::all(), ProtFlags::PROT_READ | ProtFlags::PROT_EXEC);
    let refused = Some(nix::errno::Errno::ENOSYS);
    assert_eq!((map(all), map(executed)), (refused, None));
    assert_eq!(on_thread(Role::Data, move || (map(executed), map(ProtFlags::PROT_READ))), (refused, None));
}

#[test]
fn other_processes_of_the_same_user_are_out_of_reach() {
    if !in_own_process("confine::tests::other_processes_of_the_same_user_are_out_of_reach") {
        return;
    }
    // It ends with this process, which holds the other end of what it reads.
    let mut other = Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
    let victim = i32::try_from(other.id()).unwrap();
    begin(Seccomp::On, Role::Control).unwrap();
    for role in [Role::Vcpu, Role::Device, Role::Data, Role::Control] {
        let (foreign, own) = on_thread(role, move || {
            let send = |process: i32, thread: i32| {
                // SAFETY: tgkill takes numbers only; signal 0 is none.
                unsafe { libc::syscall(libc::SYS_tgkill, process, thread, 0) }
            };
            let pid = i32::try_from(std::process::id()).unwrap();
            (send(victim, victim), send(pid, pid))
        });
        assert_eq!((foreign, own), (-1, 0), "{role:?}");
        assert_eq!(count(role, "tgkill"), 1, "{role:?}");
    }
    // Which is refused, too.
    assert!(other.wait().is_err());
}

/// One that could would have its words taken for the operator's.
#[test]
fn no_thread_types_into_the_operators_terminal() {
    if !in_own_process("confine::tests::no_thread_types_into_the_operators_terminal") {
        return;
    }
    let terminal = nix::pty::openpty(None, None).unwrap();
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&terminal.slave);
    begin(Seccomp::On, Role::Control).unwrap();
    for role in [Role::Vcpu, Role::Device, Role::Data, Role::Control] {
        let typed = on_thread(role, move || {
            let letter = b'x';
            // SAFETY: TIOCSTI reads one byte, which lives until it returns.
            unsafe { libc::ioctl(descriptor, libc::TIOCSTI, &raw const letter) }
        });
        assert_eq!((typed, count(role, "ioctl")), (-1, 1), "{role:?}");
    }
    // What a control thread does ask a terminal.
    assert!(std::io::IsTerminal::is_terminal(&terminal.slave));
}
