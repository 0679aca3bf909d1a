//! Migrations within one host: guest memory is handed over to another machine, and is the same memory there.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ferry_migrate::Update;
use ferry_migrate::ports::SourceVm;
use ferry_migrate::protocol::message::{AbortCode, HandOver, Hello};
use ferry_migrate::protocol::negotiation::Features;
use ferry_migrate::protocol::source::{Failure, MemoryPath, Outcome, Progress};
use ferry_migrate::protocol::{Message, MigrationId, wire};
use ferry_vmm::{Backing, MachineStatus};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::sync::{mpsc, watch};

use ferry_tests::guest::{
    Guest, Held, VM, boot, config, has_kvm, local_target_for, move_guest, move_locally, never, one_at_a_time,
    runtime, source, source_with, stayed,
};

fn shared() -> Guest {
    boot("dirty rate=200 set=64 order=random write=page", &config(192, 1, Backing::SharedMemfd))
}

#[test]
fn twenty_handovers_of_a_dirtying_guest_copy_nothing_and_leak_nothing() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let runtime = runtime();
    let mut guest = shared();
    let inode = |guest: &Guest| {
        let memory = guest.machine.memory_descriptor().expect("it is shared");
        rustix::fs::fstat(&memory).expect("a memfd").st_ino
    };
    let memory = inode(&guest);
    let mut held = None;
    let mut downtimes = Vec::new();
    for number in 1..=20 {
        let before = guest.healthy();
        let (moved, summary) = runtime.block_on(move_locally(guest, |_| {}));
        guest = moved;
        assert_eq!((summary.memory, summary.rounds.len()), (MemoryPath::HandedOver, 0));
        assert_eq!(inode(&guest), memory, "it is the same memory");
        let after = guest.goes_on();
        assert!(after.heartbeat_count > before.heartbeat_count && after.pages_written > before.pages_written);
        downtimes.push(summary.downtime.total().as_secs_f64() * 1e3);
        if number == 3 {
            // By then the runtime has all the threads it will ever have for this work.
            held = Some(Held::now());
        }
    }
    let (before, after) = (held.expect("set above"), Held::now());
    assert_eq!(before.files, after.files, "file descriptors were leaked");
    assert!(after.threads <= before.threads + 2, "threads were leaked: {before:?} {after:?}");
    assert!(after.mappings <= before.mappings + 40, "mappings were leaked: {before:?} {after:?}");
    assert_eq!(guest.epoch.number(), 21);
    let report = guest.healthy();
    assert!(report.pages_checked > 0, "the guest does check itself");
    downtimes.sort_by(f64::total_cmp);
    println!(
        "20 handovers: {} pages written, {} checked, 0 errors; downtime p50 {:.1} ms, max {:.1} ms",
        report.pages_written, report.pages_checked, downtimes[10], downtimes[19]
    );
    // And on over TCP, which copies what was handed over.
    let (guest, summary) = runtime.block_on(move_guest(guest, |_| {}));
    assert_eq!(summary.memory, MemoryPath::Streams);
    guest.goes_on();
}

#[test]
fn a_guest_above_4_gib_and_a_paused_one_are_handed_over() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let runtime = runtime();
    let guest = boot("dirty rate=300 set=3500", &config(3600, 2, Backing::SharedMemfd));
    let (guest, _) = runtime.block_on(move_locally(guest, |_| {}));
    guest.goes_on();
    guest.machine.machine().pause().expect("paused");
    let count = guest.healthy().heartbeat_count;
    // Twice: once paused by its operator, once without having run there.
    let (guest, _) = runtime.block_on(move_locally(guest, |_| {}));
    let (guest, _) = runtime.block_on(move_locally(guest, |_| {}));
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(guest.healthy().heartbeat_count, count, "nobody resumed it");
    assert!(!matches!(guest.machine.machine().status(), MachineStatus::Running));
    guest.machine.machine().run().expect("resumed");
    guest.goes_on();
}

#[test]
fn private_memory_is_refused_with_what_to_do() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let guest = boot("dirty rate=100 set=32", &config(128, 1, Backing::PrivateAnonymous));
    let outcome = runtime().block_on(source(&guest, guest.options("unix:/nowhere".to_owned()), never()));
    let text = stayed(&guest, outcome).to_string();
    assert!(text.contains("shared=on") && text.contains("private"), "{text}");
}

#[test]
fn nobody_listens_at_the_socket() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let guest = shared();
    let outcome = runtime().block_on(source(&guest, guest.options("unix:/nowhere".to_owned()), never()));
    let text = stayed(&guest, outcome).to_string();
    assert!(text.contains("ferry receive") && text.contains("unix:/nowhere"), "{text}");
}

#[test]
fn a_cancellation_at_any_moment_leaves_the_guest_with_its_memory() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let runtime = runtime();
    let mut guest = shared();
    // What is opened when its memory is first looked at stays open.
    drop(SourceVm::pages(&guest.machine));
    let held = Held::now().files;
    type Moment = fn(&Progress) -> bool;
    let moments: [Moment; 3] = [
        |progress| matches!(progress, Progress::Negotiated { .. }),
        |progress| matches!(progress, Progress::Stopping { .. }),
        |progress| matches!(progress, Progress::Paused),
    ];
    for at in moments {
        let (outcome, _) = runtime.block_on(async {
            let mut target = local_target_for(&guest);
            let (cancel, cancelled) = watch::channel(false);
            let (stop, stopped) = watch::channel(false);
            let (updates, mut told) = mpsc::unbounded_channel();
            let moving = source_with(&guest, guest.options(target.address.clone()), cancelled, updates);
            let cancelling = async {
                while let Some(update) = told.recv().await {
                    if matches!(&update, Update::Progress(progress) if at(progress)) {
                        cancel.send_replace(true);
                    }
                }
            };
            let ended = async {
                let outcome = tokio::join!(moving, cancelling).0;
                stop.send_replace(true);
                outcome
            };
            tokio::join!(ended, target.receiver.receive(stopped))
        });
        // A cancellation that comes while the commit is recorded is too late; then the guest has moved.
        match outcome {
            Outcome::Stayed { failure, .. } => assert_eq!(failure, Failure::Cancelled),
            Outcome::LetGo { .. } => panic!("nobody has decided anything"),
            Outcome::Moved(_) => return println!("the cancellation came too late"),
        }
        guest.goes_on();
    }
    assert_eq!(Held::now().files, held, "what was handed over is let go of");
    guest = runtime.block_on(move_locally(guest, |_| {})).0;
    guest.goes_on();
}

/// What a source that means harm, or is broken, hands over instead of its guest's memory.
fn bad_memory() -> Vec<(&'static str, OwnedFd, &'static str)> {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
    let memfd = |bytes: u64, seals: SealFlags| {
        let memory = memfd_create("bad", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("a memfd");
        ftruncate(&memory, bytes).expect("sized");
        fcntl_add_seals(&memory, seals).expect("sealed");
        memory
    };
    let sealed = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    let plain = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a file");
    vec![
        ("unsealed", memfd(192 << 20, SealFlags::empty()), "sealed"),
        ("too short", memfd(64 << 20, sealed), "bytes"),
        ("too long", memfd(256 << 20, sealed), "bytes"),
        ("a plain file", plain.into_file().into(), "no memfd"),
    ]
}

/// Says `bytes` with `descriptors` beside them and gives the last thing that the target answers.
fn answer_to(path: &str, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Option<Message> {
    let mut stream = UnixStream::connect(path).expect("the target listens");
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(descriptors.is_empty() || control.push(SendAncillaryMessage::ScmRights(descriptors)));
    sendmsg(&stream, &[std::io::IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).expect("sent");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let mut decoder = wire::Decoder::default();
    decoder.push(&answer);
    let mut last = None;
    while let Ok(Some(message)) = decoder.next_message() {
        if !matches!(message, Message::Discarded(_)) {
            last = Some(message);
        }
    }
    last
}

/// What a source of `guest` says first: `Hello` of attempt `number`, and `HandOver`.
fn offer(guest: &Guest, number: u8) -> Vec<u8> {
    let hello = Hello {
        version_oldest: 1,
        version_newest: 1,
        features: Features::ours_on(true),
        migration: MigrationId([number; 16]),
        vm: VM,
        name: "guest".parse().expect("a name"),
        epoch: guest.epoch,
        resumes: false,
    };
    let regions = guest.machine.pages().layout().regions().to_vec();
    let hand_over = HandOver { description: guest.machine.description(), regions };
    [wire::encode(&Message::Hello(hello)), wire::encode(&Message::HandOver(hand_over))].concat()
}

/// Offers the target at `path` everything that it must not take.
fn attack(path: &str, offers: Vec<Vec<u8>>, good: &OwnedFd) {
    let mut offers = offers.into_iter();
    for (what, memory, word) in bad_memory() {
        match answer_to(path, &offers.next().expect("enough"), &[memory.as_fd()]) {
            Some(Message::Abort(abort)) if abort.code == AbortCode::CannotBuild => {
                assert!(abort.sentence.contains(word), "{what}: {}", abort.sentence);
            }
            other => panic!("{what}: {other:?}"),
        }
    }
    // Connections of the attempts above may still be closing.
    let held = || Held::now().files.into_iter().filter(|file| file.contains("memfd")).count();
    let before = held();
    // None, and more than one: the connection ends.
    for count in [0, 2, 4] {
        let answer = answer_to(path, &offers.next().expect("enough"), &vec![good.as_fd(); count]);
        assert!(!matches!(answer, Some(Message::Ready(_))), "{count} descriptors: {answer:?}");
    }
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(held(), before, "surplus descriptors are closed");
}

#[test]
fn what_is_no_guest_memory_is_refused_and_closed() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let guest = shared();
    let runtime = runtime();
    let _context = runtime.enter();
    let mut target = local_target_for(&guest);
    let attacking = {
        let path = target.address.strip_prefix("unix:").expect("a socket").to_owned();
        let offers: Vec<Vec<u8>> = (200..207).map(|number| offer(&guest, number)).collect();
        let memory = guest.machine.memory_descriptor().expect("it is shared");
        std::thread::spawn(move || attack(&path, offers, &memory))
    };
    runtime.block_on(async {
        // After all that the guest, which has run on its memory all the time, is handed over.
        let moving = async {
            while !attacking.is_finished() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            attacking.join().expect("every attack is refused");
            guest.goes_on();
            source(&guest, guest.options(target.address.clone()), never()).await
        };
        let (outcome, received) = tokio::join!(moving, target.receiver.receive(never()));
        assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
        received.expect("threads").expect("a guest");
    });
}
