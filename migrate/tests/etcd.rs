//! The etcd witness against the real server (Debian: etcd-server), which the test starts on loopback.

#![cfg(feature = "etcd")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use ferry_migrate::WitnessAddress;
use ferry_migrate::protocol::witness::{Claim, Ruling, Wish};
use ferry_migrate::protocol::{Epoch, MigrationId, VmId, WitnessId};
use ferry_migrate::witness::Witness;

/// A server with a folder of its own; killed when dropped.
struct Server {
    child: Option<Child>,
    address: String,
    peer: String,
    folder: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

impl Server {
    /// `None`, said, where there is no etcd; that fails in continuous integration.
    fn start() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let (client, peer) = (free_port(), free_port());
        let address = format!("http://127.0.0.1:{client}");
        let peer = format!("http://127.0.0.1:{peer}");
        let mut server = Self { child: None, address, peer, folder };
        match server.go_on() {
            Ok(()) => Some(server),
            Err(error) => {
                println!("SKIPPED (etcd can't be started: {error}; install etcd-server)");
                assert!(std::env::var_os("CI").is_none(), "continuous integration has etcd");
                None
            }
        }
    }

    /// Starts it on the data that it has.
    fn go_on(&mut self) -> std::io::Result<()> {
        let Self { address, peer, .. } = &*self;
        let started = Command::new("etcd")
            .arg("--data-dir")
            .arg(self.data())
            .args(["--listen-client-urls", address, "--advertise-client-urls", address])
            .args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        self.child = Some(started?);
        Ok(())
    }

    fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    async fn witness(&self) -> Arc<dyn Witness> {
        let address: WitnessAddress = format!("etcd:{}", self.address).parse().unwrap();
        let witness = address.open().unwrap();
        for _ in 0..100 {
            if blocking(&witness, |witness| witness.id()).await.is_ok() {
                return witness;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("etcd does not come up at {}", self.address);
    }
}

async fn blocking<T: Send + 'static>(
    witness: &Arc<dyn Witness>,
    work: impl FnOnce(&dyn Witness) -> T + Send + 'static,
) -> T {
    let witness = Arc::clone(witness);
    tokio::task::spawn_blocking(move || work(&*witness)).await.unwrap()
}

async fn ask(witness: &Arc<dyn Witness>, agreed: WitnessId, claim: Claim) -> Result<Ruling, String> {
    blocking(witness, move |witness| witness.claim(agreed, &claim).map_err(|error| error.to_string())).await
}

fn claim(wish: Wish, epoch: u64) -> Claim {
    Claim { vm: VmId([1; 16]), epoch: Epoch::new(epoch), migration: MigrationId([2; 16]), wish }
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_decides_once_for_both_hosts() {
    let Some(server) = Server::start() else { return };
    let (source, target) = (server.witness().await, server.witness().await);
    let ids = (
        blocking(&source, |witness| witness.id().unwrap()).await,
        blocking(&target, |witness| witness.id().unwrap()).await,
    );
    assert_eq!(ids.0, ids.1, "they can tell that it is the same witness");
    let id = ids.0;
    blocking(&target, move |witness| witness.probe(id).unwrap()).await;

    // Both at once, many times: they are told the same.
    for epoch in 2..22 {
        let (at_source, at_target) = tokio::join!(
            ask(&source, id, claim(Wish::TakeBack, epoch)),
            ask(&target, id, claim(Wish::Run, epoch)),
        );
        assert_eq!(at_source, at_target, "epoch {epoch}");
    }

    // A source that was told to let go leaves the target no way back.
    let run = ask(&target, id, claim(Wish::Run, 50)).await;
    let take_back = ask(&source, id, claim(Wish::TakeBack, 50)).await;
    let give_up = ask(&target, id, claim(Wish::GiveUp, 50)).await;
    assert_eq!([run, take_back, give_up], [Ok(Ruling::Target), Ok(Ruling::Target), Ok(Ruling::Target)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_is_gone_decides_nothing_and_is_named() {
    let address = format!("http://127.0.0.1:{}", free_port());
    let witness = format!("etcd:{address}").parse::<WitnessAddress>().unwrap().open().unwrap();
    let error = ask(&witness, WitnessId([1; 16]), claim(Wish::Run, 2)).await.unwrap_err();
    assert!(error.contains(&address), "{error}");
}

/// Why `witness` decides nothing, once it is up again.
async fn refused(witness: &Arc<dyn Witness>, agreed: WitnessId, claim: Claim) -> String {
    for _ in 0..100 {
        match ask(witness, agreed, claim).await {
            Err(error) if error.contains("nothing is decided") => return error,
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            Ok(ruling) => panic!("it has ruled: {ruling:?}"),
        }
    }
    panic!("{witness} does not come up");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_whose_data_was_wiped_decides_nothing() {
    let Some(mut server) = Server::start() else { return };
    let witness = server.witness().await;
    let agreed = blocking(&witness, |witness| witness.id().unwrap()).await;
    assert_eq!(ask(&witness, agreed, claim(Wish::Run, 2)).await, Ok(Ruling::Target));
    server.stop();
    std::fs::remove_dir_all(server.data()).unwrap();
    server.go_on().unwrap();
    for wish in [Wish::Run, Wish::GiveUp, Wish::TakeBack] {
        let error = refused(&witness, agreed, claim(wish, 2)).await;
        assert!(error.contains("no witness") && error.contains(&agreed.to_string()), "{error}");
    }
    // A host that did not know the old one makes it a witness, and another one.
    let other = blocking(&server.witness().await, |witness| witness.id().unwrap()).await;
    let error = refused(&witness, agreed, claim(Wish::TakeBack, 2)).await;
    assert!(error.contains(&other.to_string()), "{error}");
    let probed =
        blocking(&witness, move |witness| witness.probe(agreed).map_err(|error| error.to_string())).await;
    assert!(probed.is_err_and(|error| error.contains(&other.to_string())));
    // The next migration agrees on what there is.
    assert_eq!(blocking(&witness, |witness| witness.id().unwrap()).await, other);
    assert_eq!(ask(&witness, other, claim(Wish::Run, 2)).await, Ok(Ruling::Target));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_was_restored_from_a_backup_decides_nothing() {
    let Some(mut server) = Server::start() else { return };
    server.witness().await;
    server.stop();
    let backup = server.folder.path().join("backup");
    copy(&server.data(), &backup);
    server.go_on().unwrap();
    // Other VMs move, then this one.
    let (source, target) = (server.witness().await, server.witness().await);
    let agreed = blocking(&target, |witness| witness.id().unwrap()).await;
    for vm in 10..20 {
        let other = Claim { vm: VmId([vm; 16]), ..claim(Wish::Run, 2) };
        ask(&target, agreed, other).await.unwrap();
    }
    assert_eq!(blocking(&source, |witness| witness.id().unwrap()).await, agreed);
    assert_eq!(ask(&target, agreed, claim(Wish::Run, 2)).await, Ok(Ruling::Target));
    server.stop();
    std::fs::remove_dir_all(server.data()).unwrap();
    copy(&backup, &server.data());
    server.go_on().unwrap();
    // By the backup nobody has leave.
    let error = refused(&source, agreed, claim(Wish::TakeBack, 2)).await;
    assert!(error.contains("backup"), "{error}");
}

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
}
