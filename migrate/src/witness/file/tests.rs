//! Decisions in a folder: made once, by whoever is first, whatever becomes of locks, links and the folder itself.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use ferry_protocol::witness::{Verdict, Wish};
use ferry_protocol::{Epoch, MigrationId};
use nix::libc;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use super::*;

const WISHES: [Wish; 3] = [Wish::Run, Wish::GiveUp, Wish::TakeBack];

const VM: VmId = VmId([1; 16]);

fn claim_at(wish: Wish, epoch: u64) -> Claim {
    Claim { vm: VM, epoch: Epoch::new(epoch), migration: MigrationId([3; 16]), wish }
}

fn claim(wish: Wish) -> Claim {
    claim_at(wish, 2)
}

/// A witness in a folder of its own, and which it is.
fn witness() -> (tempfile::TempDir, FileWitness, WitnessId) {
    let folder = tempfile::tempdir().unwrap();
    let witness = FileWitness::new(folder.path().join("witness"));
    let id = witness.id().unwrap();
    (folder, witness, id)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn hosts_that_ask_at_once_are_told_the_same() {
    for locked in [true, false] {
        for _ in 0..20 {
            let (_folder, witness, id) = witness();
            let path = witness.folder;
            let ask = |wish| {
                let witness = FileWitness::new(path.clone());
                std::thread::spawn(move || {
                    // A file system that has withdrawn the locks lets them all in.
                    let lock = locked.then(|| witness.open(id).unwrap().1);
                    let ruled = rule(&Folder::open(&witness.folder).unwrap(), &claim(wish)).unwrap();
                    drop(lock);
                    ruled
                })
            };
            let asked = [Wish::Run, Wish::TakeBack, Wish::Run, Wish::TakeBack].map(ask);
            let ruled = asked.map(|asked| asked.join().unwrap());
            assert!(ruled.iter().all(|ruling| *ruling == ruled[0]), "{ruled:?}, locked: {locked}");
        }
    }
}

#[test]
fn a_decision_is_not_overwritten_by_who_was_cut_off_while_deciding() {
    let (_folder, witness, id) = witness();
    // One host has read and judged, and is then cut off with its lock.
    let late = Folder::open(&witness.folder).unwrap();
    let seen = held(&late, VM).unwrap();
    let leave = judge(&claim(Wish::Run), seen.entry.as_ref()).unwrap().entry.unwrap();
    // The other one takes the guest back.
    assert_eq!(witness.claim(id, &claim(Wish::TakeBack)).unwrap(), Ruling::Source);
    // The first is back, with all that it had still to do.
    assert!(!decide(&late, &seen, &leave).unwrap());
    assert_eq!(held(&late, VM).unwrap().entry.unwrap().verdict, Verdict::Discarded);
    assert_eq!(witness.claim(id, &claim(Wish::Run)).unwrap(), Ruling::Source);
}

#[test]
fn a_number_that_was_removed_again_decides_nothing() {
    let (_folder, witness, id) = witness();
    let late = Folder::open(&witness.folder).unwrap();
    let seen = held(&late, VM).unwrap();
    let leave = judge(&claim(Wish::Run), seen.entry.as_ref()).unwrap().entry.unwrap();
    assert_eq!(witness.claim(id, &claim(Wish::TakeBack)).unwrap(), Ruling::Source);
    let last = 2 + KEPT + 1;
    for epoch in 3..=last {
        witness.claim(id, &claim_at(Wish::Run, epoch)).unwrap();
    }
    assert!(!witness.folder.join(entry_name(VM, 1)).exists(), "{:?}", names(&witness.folder));
    assert!(!decide(&late, &seen, &leave).unwrap());
    assert_eq!(held(&late, VM).unwrap().entry.unwrap().epoch, Epoch::new(last));
}

#[test]
fn few_entries_are_kept() {
    let (_folder, witness, id) = witness();
    for epoch in 2..40 {
        assert_eq!(witness.claim(id, &claim_at(Wish::Run, epoch)).unwrap(), Ruling::Target);
        assert_eq!(witness.claim(id, &claim_at(Wish::TakeBack, epoch)).unwrap(), Ruling::Target);
    }
    let entries = names(&witness.folder).into_iter().filter(|name| name.ends_with(".entry")).count();
    assert_eq!(u64::try_from(entries).unwrap(), KEPT + 1);
}

#[test]
fn a_witness_is_known_by_what_is_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let (one, other) = (folder.path().join("one"), folder.path().join("other"));
    let id = |path: &Path| FileWitness::new(path.to_owned()).id().unwrap();
    assert_eq!(id(&one), id(&one));
    assert_ne!(id(&one), id(&other));
    FileWitness::new(one.clone()).probe(id(&one)).unwrap();
    assert_eq!(names(&one), ["identity", "lock"]);
}

#[test]
fn another_folder_than_the_agreed_one_decides_nothing_and_is_left_as_it_is() {
    let (folder, witness, id) = witness();
    let unmounted = folder.path().join("elsewhere");
    fs::rename(&witness.folder, &unmounted).unwrap();
    let refused = |found: &str| {
        let asked = WISHES.map(|wish| witness.claim(id, &claim(wish)).unwrap_err());
        for error in asked.into_iter().chain([witness.probe(id).unwrap_err()]) {
            let text = error.to_string();
            assert!(text.contains(found), "{text}");
        }
    };
    // There is nothing where it was mounted; or the folder that it was mounted over, which is empty.
    refused("mounted");
    assert!(!witness.folder.exists());
    fs::create_dir(&witness.folder).unwrap();
    refused("no witness");
    assert!(names(&witness.folder).is_empty());
    // Somebody has used that one for a witness of its own.
    let other = witness.id().unwrap();
    refused(&other.to_string());
    assert_eq!(names(&witness.folder), ["identity", "lock"]);
    // Mounted again.
    fs::remove_dir_all(&witness.folder).unwrap();
    fs::rename(&unmounted, &witness.folder).unwrap();
    assert_eq!(witness.claim(id, &claim(Wish::Run)).unwrap(), Ruling::Target);
}

#[test]
fn a_claim_stays_in_the_folder_whose_identity_it_has_seen() {
    let (folder, witness, id) = witness();
    let (open, _lock) = witness.open(id).unwrap();
    fs::rename(&witness.folder, folder.path().join("elsewhere")).unwrap();
    fs::create_dir(&witness.folder).unwrap();
    assert_eq!(rule(&open, &claim(Wish::Run)).unwrap(), Ruling::Target);
    assert!(names(&witness.folder).is_empty());
    assert!(folder.path().join("elsewhere").join(entry_name(VM, 1)).exists());
}

#[test]
fn a_damaged_entry_decides_nothing_nor_does_an_older_one_then() {
    let (_folder, witness, id) = witness();
    witness.claim(id, &claim(Wish::Run)).unwrap();
    witness.claim(id, &claim(Wish::GiveUp)).unwrap();
    let path = witness.folder.join(entry_name(VM, 2));
    let bytes = fs::read(&path).unwrap();
    for torn in [&bytes[..0], &bytes[..bytes.len() - 1]] {
        fs::write(&path, torn).unwrap();
        for wish in WISHES {
            let error = witness.claim(id, &claim(wish)).unwrap_err().to_string();
            assert!(error.contains("can't be trusted"), "{error}");
        }
    }
    assert_eq!(fs::read(&path).unwrap().len(), bytes.len() - 1, "it is left as it was");
}

#[test]
fn a_file_that_is_not_what_its_name_says_decides_nothing() {
    let (_folder, witness, id) = witness();
    witness.claim(id, &claim(Wish::Run)).unwrap();
    let bytes = fs::read(witness.folder.join(entry_name(VM, 1))).unwrap();
    let other = VmId([9; 16]);
    fs::write(witness.folder.join(entry_name(other, 1)), &bytes).unwrap();
    let error = witness.claim(id, &Claim { vm: other, ..claim(Wish::TakeBack) }).unwrap_err().to_string();
    assert!(error.contains("not what its name says"), "{error}");
    for number in ["01", "0", "two", "+2", "18446744073709551615", ""] {
        let path = witness.folder.join(format!("{VM}.{number}.entry"));
        fs::write(&path, &bytes).unwrap();
        let error = witness.claim(id, &claim_at(Wish::TakeBack, 3)).unwrap_err().to_string();
        assert!(error.contains("not what its name says"), "{number}: {error}");
        fs::remove_file(path).unwrap();
    }
}

/// Runs `work` on a thread whose system call `refused` fails with EIO.
fn without<T: Send>(refused: libc::c_long, work: impl FnOnce() -> T + Send) -> T {
    let rules = BTreeMap::from([(refused, Vec::new())]);
    let fails = SeccompAction::Errno(libc::EIO.unsigned_abs());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, fails, TargetArch::x86_64).unwrap();
    let program = BpfProgram::try_from(filter).unwrap();
    std::thread::scope(|scope| {
        let worker = scope.spawn(move || {
            seccompiler::apply_filter(&program).unwrap();
            work()
        });
        worker.join().unwrap()
    })
}

#[test]
fn what_was_decided_is_told_only_once_it_is_durable() {
    let (_folder, witness, id) = witness();
    assert_eq!(witness.claim(id, &claim(Wish::Run)).unwrap(), Ruling::Target);
    // A file is synced by either of them, the folder by fsync.
    for call in [libc::SYS_fsync, libc::SYS_fdatasync] {
        let repeated =
            without(call, || witness.claim(id, &claim(Wish::Run)).map_err(|error| error.to_string()));
        assert!(repeated.as_ref().is_err_and(|text| text.contains("sync")), "{call}: {repeated:?}");
    }
    let first = without(libc::SYS_fsync, || {
        witness.claim(id, &claim_at(Wish::Run, 3)).map_err(|error| error.to_string())
    });
    assert!(first.as_ref().is_err_and(|text| text.contains("sync")), "{first:?}");
    // Its answer was lost, not more.
    assert_eq!(witness.claim(id, &claim_at(Wish::Run, 3)).unwrap(), Ruling::Target);
}

#[test]
fn what_others_have_left_half_way_is_removed() {
    let (_folder, witness, id) = witness();
    fs::write(witness.folder.join("new-of somebody who was lost"), []).unwrap();
    assert_eq!(witness.claim(id, &claim(Wish::Run)).unwrap(), Ruling::Target);
    assert_eq!(witness.id().unwrap(), id);
    assert_eq!(names(&witness.folder), [entry_name(VM, 1).as_str(), "identity", "lock"]);
}

#[test]
fn a_folder_that_is_not_there_is_named() {
    let witness = FileWitness::new("/nonexistent/shared/witness".into());
    let errors =
        [witness.id().unwrap_err(), witness.claim(WitnessId([1; 16]), &claim(Wish::Run)).unwrap_err()];
    for error in errors {
        let text = error.to_string();
        assert!(text.contains("/nonexistent/shared/witness") && text.contains("mounted"), "{text}");
    }
}

#[test]
fn a_lock_that_somebody_holds_is_waited_for_and_named() {
    let (_folder, witness, id) = witness();
    let (_, lock) = witness.open(id).unwrap();
    let error = witness.claim(id, &claim(Wish::Run)).unwrap_err().to_string();
    assert!(error.contains("locked"), "{error}");
    drop(lock);
    assert_eq!(witness.claim(id, &claim(Wish::Run)).unwrap(), Ruling::Target);
}
