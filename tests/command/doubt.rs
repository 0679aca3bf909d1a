//! Handovers that nobody knows the end of: the link breaks for good just before the target has the commit, or just after. A
//! person decides, or a witness does by itself.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use ferry_migrate::protocol::Message;
use ferry_migrate::protocol::wire::Decoder;
use ferry_tests::process::{Host, Process};

use crate::{FERRY, turn};

/// When the link breaks, for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// The target never has the commit.
    BeforeCommit,
    /// The source never has an answer to it.
    AfterCommit,
}

/// Forwards connections to `target` until the commit comes by; then `also` happens.
fn link_to(target: &str, cut: Cut, also: impl Fn() + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (target, sockets) = (target.to_owned(), Arc::<Mutex<Vec<TcpStream>>>::default());
    let broken = Arc::new(AtomicBool::new(false));
    let also = Arc::new(also);
    std::thread::spawn(move || {
        for near in listener.incoming().map_while(Result::ok) {
            if broken.load(Ordering::SeqCst) {
                return;
            }
            let Ok(far) = TcpStream::connect(&target) else { return };
            sockets.lock().unwrap().extend([near.try_clone().unwrap(), far.try_clone().unwrap()]);
            let (mut back, mut into) = (far.try_clone().unwrap(), near.try_clone().unwrap());
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut back, &mut into);
                let _ = into.shutdown(Shutdown::Write);
            });
            let (sockets, broken) = (Arc::clone(&sockets), Arc::clone(&broken));
            let also = Arc::clone(&also);
            std::thread::spawn(move || {
                if forward(near, far, cut) {
                    also();
                    broken.store(true, Ordering::SeqCst);
                    for socket in sockets.lock().unwrap().drain(..) {
                        let _ = socket.shutdown(Shutdown::Both);
                    }
                }
            });
        }
    });
    address
}

/// Whether the commit came by.
fn forward(mut from: TcpStream, mut into: TcpStream, cut: Cut) -> bool {
    let (mut decoder, mut chunk) = (Decoder::default(), vec![0; 64 << 10]);
    let mut speaks = true;
    while let Ok(got @ 1..) = from.read(&mut chunk) {
        let mut commit = false;
        if speaks {
            decoder.push(&chunk[..got]);
            loop {
                match decoder.next_message() {
                    Ok(Some(message)) => commit |= matches!(message, Message::Commit(_)),
                    Ok(None) => break,
                    // A data stream.
                    Err(_) => {
                        speaks = false;
                        break;
                    }
                }
            }
        }
        if commit && cut == Cut::BeforeCommit {
            return true;
        }
        let passed_on = into.write_all(&chunk[..got]);
        if commit {
            return true;
        }
        if passed_on.is_err() {
            return false;
        }
    }
    let _ = into.shutdown(Shutdown::Write);
    false
}

/// A migration whose link has broken at its last moment.
struct Doubt<'a> {
    source: Process,
    target: Process,
    migrating: Process,
    a: &'a Host<'a>,
    b: &'a Host<'a>,
}

impl<'a> Doubt<'a> {
    fn make(a: &'a Host<'a>, b: &'a Host<'a>, cut: Cut, witness: &str) -> Self {
        Self::make_with(a, b, cut, witness, || ())
    }

    /// The same, and `also` happens as the link breaks.
    fn make_with(
        a: &'a Host<'a>,
        b: &'a Host<'a>,
        cut: Cut,
        witness: &str,
        also: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        let witness = ["--witness", witness];
        let run = ["run", "--name", "web", "--guest", "dirty rate=20 set=8", "--memory", "64M"];
        let source = a.hosts(&[&run[..], &["--serial", "null"], &witness].concat());
        a.until_ready("web");
        let target =
            b.hosts(&[&["receive", "--name", "web", "--listen", "127.0.0.1:0"], &witness[..]].concat());
        let address = link_to(target.first["address"].as_str().unwrap(), cut, also);
        let migrate = ["migrate", "web", "--to", &address, "--downtime", "2s", "--json"];
        let migrating = a.start(a.command(&migrate));
        Self { source, target, migrating, a, b }
    }
}

#[test]
fn a_person_takes_a_vm_back_that_the_target_never_got() {
    let Some(_turn) = turn() else { return };
    let (a, b) = (Host::new(FERRY), Host::new(FERRY));
    let Doubt { source, target, migrating, .. } = Doubt::make(&a, &b, Cut::BeforeCommit, "none");
    let info = a.until_state("web", "in-doubt");
    assert!(info["note"].as_str().unwrap().contains("ferry resolve"), "{info}");
    a.refuses(&["resume", "web"], &["in doubt"]);
    // Nobody is there to be asked, and nobody has said that this is known.
    a.refuses(&["resolve", "web", "--resume"], &["--yes"]);
    a.until_state("web", "in-doubt");
    // What makes it known: the target is gone.
    target.kill();
    a.ferry(&["resolve", "web", "--resume", "--yes", "--json"]).well();
    a.goes_on("web");
    assert_eq!(migrating.end().code, Some(1));
    // The next attempt is as good as the first.
    let (_target, address) = b.receives();
    a.ferry(&["migrate", "web", "--to", &address, "--downtime", "2s", "--json"]).well();
    b.goes_on("web");
    assert_eq!(source.end().code, Some(0));
}

#[test]
fn a_person_lets_go_of_a_vm_that_the_target_runs() {
    let Some(_turn) = turn() else { return };
    let (a, b) = (Host::new(FERRY), Host::new(FERRY));
    let doubt = Doubt::make(&a, &b, Cut::AfterCommit, "none");
    b.until_state("web", "running");
    a.until_state("web", "in-doubt");
    // Where it runs nothing is in doubt.
    b.refuses(&["resolve", "web", "--discard", "--yes"], &["web"]);
    b.goes_on("web");
    a.ferry(&["resolve", "web", "--discard", "--yes", "--json"]).well();
    assert_eq!(doubt.source.end().code, Some(0));
    b.goes_on("web");
    drop(doubt.migrating);
}

#[test]
fn a_witness_decides_by_itself() {
    let Some(_turn) = turn() else { return };
    let shared = tempfile::tempdir().unwrap();
    let witness = format!("file:{}", shared.path().display());
    for cut in [Cut::BeforeCommit, Cut::AfterCommit] {
        let (a, b) = (Host::new(FERRY), Host::new(FERRY));
        let doubt = Doubt::make(&a, &b, cut, &witness);
        match cut {
            Cut::BeforeCommit => {
                assert_eq!(doubt.migrating.end().code, Some(1));
                doubt.a.until_state("web", "running");
                doubt.a.goes_on("web");
            }
            Cut::AfterCommit => {
                doubt.b.until_state("web", "running");
                assert_eq!(doubt.source.end().code, Some(0));
                doubt.b.goes_on("web");
            }
        }
        drop(doubt.target);
    }
}

#[test]
fn a_person_who_takes_a_vm_back_is_not_overruled_by_a_witness_that_comes_back() {
    let Some(_turn) = turn() else { return };
    let shared = tempfile::tempdir().unwrap();
    let (folder, away) = (shared.path().join("witness"), shared.path().join("away"));
    let (a, b) = (Host::new(FERRY), Host::new(FERRY));
    let witness = format!("file:{}", folder.display());
    let paths = (folder.clone(), away.clone());
    let lose = move || std::fs::rename(&paths.0, &paths.1).unwrap();
    let doubt = Doubt::make_with(&a, &b, Cut::BeforeCommit, &witness, lose);
    a.until_state("web", "in-doubt");
    let refused = ["does not answer", "--without-witness"];
    a.refuses(&["resolve", "web", "--resume", "--yes"], &refused);
    a.until_state("web", "in-doubt");
    // Asked once more by a person, it decides as soon as it is there.
    std::fs::rename(&away, &folder).unwrap();
    let taken_back = a.ferry(&["resolve", "web", "--resume", "--yes", "--json"]);
    assert!(taken_back.code == Some(0) || a.vm("web")["state"] == "running", "{taken_back:?}");
    a.goes_on("web");
    drop((doubt.migrating, doubt.target));
}

#[test]
fn a_person_takes_a_vm_back_without_a_witness_that_is_lost() {
    let Some(_turn) = turn() else { return };
    let shared = tempfile::tempdir().unwrap();
    let folder = shared.path().join("witness");
    let (a, b) = (Host::new(FERRY), Host::new(FERRY));
    let witness = format!("file:{}", folder.display());
    let lose = move || std::fs::remove_dir_all(&folder).unwrap();
    let doubt = Doubt::make_with(&a, &b, Cut::BeforeCommit, &witness, lose);
    a.until_state("web", "in-doubt");
    doubt.target.kill();
    a.ferry(&["resolve", "web", "--resume", "--without-witness", "--yes", "--json"]).well();
    a.goes_on("web");
    drop(doubt.migrating);
}

#[test]
fn hosts_with_different_witnesses_find_out_before_anything_moves() {
    let Some(_turn) = turn() else { return };
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (a, b) = (Host::new(FERRY), Host::new(FERRY));
    let words = |folder: &tempfile::TempDir| format!("file:{}", folder.path().display());
    let (own, foreign) = (words(&one), words(&other));
    let run = ["run", "--name", "web", "--guest", "idle", "--memory", "64M", "--serial", "null"];
    let _source = a.hosts(&[&run[..], &["--witness", &own]].concat());
    a.until_ready("web");
    for witness in [foreign.as_str(), "none"] {
        let target = b.hosts(&["receive", "--name", "web", "--listen", "127.0.0.1:0", "--witness", witness]);
        let address = target.first["address"].as_str().unwrap().to_owned();
        a.refuses(&["migrate", "web", "--to", &address], &["witness"]);
        a.goes_on("web");
        target.kill();
    }
}
