//! What must fail without costing the guest: it goes on at the source, and the next attempt is as good as the first.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use ferry_migrate::Update;
use ferry_migrate::protocol::message::AbortCode;
use ferry_migrate::protocol::source::{Failure, Outcome, Progress};
use ferry_migrate::protocol::{Message, wire};
use ferry_vmm::Backing;
use tokio::sync::{mpsc, watch};

use ferry_tests::guest::{
    Guest, Held, boot, config, has_kvm, move_guest, never, one_at_a_time, runtime, source, source_with,
    stayed, target_for,
};
use ferry_tests::proxy::CuttingProxy;

fn dirtying() -> Guest {
    boot("dirty rate=100 set=32", &config(128, 1, Backing::PrivateAnonymous))
}

#[test]
fn nobody_listens() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let guest = dirtying();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let outcome = runtime().block_on(source(&guest, guest.options(format!("127.0.0.1:{port}")), never()));
    let text = stayed(&guest, outcome).to_string();
    assert!(text.contains("ferry receive") && text.contains(&port.to_string()), "{text}");
}

#[test]
fn the_target_speaks_something_else() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let guest = dirtying();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 16]);
        stream.write_all(b"SSH-2.0-OpenSSH_9.2p1\r\n").unwrap();
    });
    let outcome = runtime().block_on(source(&guest, guest.options(address), never()));
    let text = stayed(&guest, outcome).to_string();
    assert!(text.contains("does not speak ferry's protocol"), "{text}");
    server.join().unwrap();
}

#[test]
fn garbage_and_strangers_leave_the_target_as_it_was() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let guest = dirtying();
    let runtime = runtime();
    let _context = runtime.enter();
    let mut target = target_for(&guest);
    let address = target.address.clone();
    let mut wrong_version = wire::encode(&Message::Ping(1));
    wrong_version[4] = 99;
    let knocking = {
        let address = address.clone();
        std::thread::spawn(move || {
            let answer = |bytes: &[u8]| {
                let mut stream = TcpStream::connect(&address).unwrap();
                // The target may have turned it away already.
                let _ = stream.write_all(bytes).and_then(|()| stream.shutdown(Shutdown::Write));
                let mut answer = Vec::new();
                let _ = stream.read_to_end(&mut answer);
                let mut decoder = wire::Decoder::default();
                decoder.push(&answer);
                decoder.next_message()
            };
            let version = answer(&wrong_version).unwrap();
            assert!(
                matches!(&version, Some(Message::Abort(abort)) if abort.code == AbortCode::Version),
                "{version:?}"
            );
            answer(b"GET / HTTP/1.1\r\n\r\n").unwrap();
            answer(&[0xff; 4096]).unwrap();
            answer(b"FRRD with nothing sensible behind it").unwrap();
            answer(&wire::encode(&Message::Ping(1))).unwrap();
            answer(b"").unwrap();
        })
    };
    let outcome = runtime.block_on(async {
        let receiving = target.receiver.receive(never());
        let migrating = async {
            while !knocking.is_finished() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            source(&guest, guest.options(address), never()).await
        };
        tokio::join!(migrating, receiving).0
    });
    knocking.join().unwrap();
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
}

#[test]
fn a_link_that_is_cut_in_pre_copy_leaves_the_guest_here_and_the_next_attempt_works() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let runtime = runtime();
    let guest = boot("dirty rate=100 set=32 fill=150 random=100", &config(256, 1, Backing::PrivateAnonymous));
    let _context = runtime.enter();
    let mut target = target_for(&guest);
    let proxy = CuttingProxy::start(&target.address, 20 << 20);
    let outcome = runtime.block_on(async {
        let receiving = tokio::time::timeout(Duration::from_secs(20), target.receiver.receive(never()));
        let mut options = guest.options(proxy.address.clone());
        options.reconnect = Duration::from_secs(1);
        let migrating = source(&guest, options, never());
        tokio::select! {
            outcome = migrating => outcome,
            received = receiving => panic!("the target took {received:?}"),
        }
    });
    let failure = stayed(&guest, outcome);
    assert!(matches!(failure, Failure::Link(_)), "{failure}");
    drop(target);
    let (guest, _) = runtime.block_on(move_guest(guest, |_| {}));
    guest.goes_on();
}

#[test]
fn cancelling_in_pre_copy_leaves_the_guest_here_and_nothing_behind() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let runtime = runtime();
    let mut guest =
        boot("dirty rate=100 set=32 fill=150 random=100", &config(256, 1, Backing::PrivateAnonymous));
    let mut held = None;
    let _context = runtime.enter();
    for attempt in 0..6 {
        let mut target = target_for(&guest);
        let outcome = runtime.block_on(async {
            let (cancel, cancelled) = watch::channel(false);
            let (updates, mut inbox) = mpsc::unbounded_channel();
            let canceller = async {
                while let Some(update) = inbox.recv().await {
                    if matches!(&update, Update::Progress(p) if matches!(**p, Progress::RoundStarted { .. }))
                    {
                        cancel.send_replace(true);
                    }
                }
            };
            let mut options = guest.options(target.address.clone());
            options.bandwidth = ferry_migrate::BandwidthCap::new(Some(100 << 20));
            let migrating = source_with(&guest, options, cancelled, updates);
            let (stop, stopped) = watch::channel(false);
            let migrating = async {
                let (outcome, ()) = tokio::join!(migrating, canceller);
                stop.send_replace(true);
                outcome
            };
            tokio::join!(migrating, target.receiver.receive(stopped)).0
        });
        assert_eq!(stayed(&guest, outcome), Failure::Cancelled);
        drop(target);
        if attempt == 2 {
            held = Some(Held::now());
        }
    }
    let (before, after) = (held.expect("set above"), Held::now());
    assert_eq!(before.files, after.files, "file descriptors were leaked");
    assert!(after.threads <= before.threads + 2, "threads were leaked: {before:?} {after:?}");
    (guest, _) = runtime.block_on(move_guest(guest, |_| {}));
    guest.goes_on();
}

#[test]
fn a_guest_is_not_stopped_beyond_its_budget() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let guest = boot("dirty rate=400 set=64", &config(128, 1, Backing::PrivateAnonymous));
    let runtime = runtime();
    let _context = runtime.enter();
    let mut target = target_for(&guest);
    let mut options = guest.options(target.address.clone());
    options.bandwidth = ferry_migrate::BandwidthCap::new(Some(50 << 20));
    // The last round has no cap, so only a budget below what a standstill costs without any page can't be met.
    options.downtime_budget = Duration::from_millis(2);
    options.timeout = Duration::from_secs(6);
    let outcome = runtime.block_on(async {
        let (stop, stopped) = watch::channel(false);
        let migrating = async {
            let outcome = source(&guest, options, never()).await;
            stop.send_replace(true);
            outcome
        };
        tokio::join!(migrating, target.receiver.receive(stopped)).0
    });
    let text = stayed(&guest, outcome).to_string();
    assert!(text.contains("the guest dirties") && text.contains("--on-timeout stop"), "{text}");
}
