//! The etcd witness against the real server (Debian: etcd-server), which the test starts on loopback.

#![cfg(feature = "etcd")]

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use ferry_migrate::WitnessAddress;
use ferry_migrate::protocol::witness::{Claim, Ruling, Wish};
use ferry_migrate::protocol::{Epoch, MigrationId, VmId};
use ferry_migrate::witness::Witness;

/// A server with a folder of its own; killed when dropped.
struct Server {
    child: Child,
    address: String,
    _folder: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
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
        let started = Command::new("etcd")
            .arg("--data-dir")
            .arg(folder.path())
            .args(["--listen-client-urls", &address, "--advertise-client-urls", &address])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        match started {
            Ok(child) => Some(Self { child, address, _folder: folder }),
            Err(error) => {
                println!("SKIPPED (etcd can't be started: {error}; install etcd-server)");
                assert!(std::env::var_os("CI").is_none(), "continuous integration has etcd");
                None
            }
        }
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
    blocking(&target, |witness| witness.probe().unwrap()).await;

    // Both at once, many times: they are told the same.
    for epoch in 2..22 {
        let (at_source, at_target) = tokio::join!(
            blocking(&source, move |witness| witness.claim(&claim(Wish::TakeBack, epoch)).unwrap()),
            blocking(&target, move |witness| witness.claim(&claim(Wish::Run, epoch)).unwrap()),
        );
        assert_eq!(at_source, at_target, "epoch {epoch}");
    }

    // A source that was told to let go leaves the target no way back.
    let run = blocking(&target, |witness| witness.claim(&claim(Wish::Run, 50)).unwrap()).await;
    let take_back = blocking(&source, |witness| witness.claim(&claim(Wish::TakeBack, 50)).unwrap()).await;
    let give_up = blocking(&target, |witness| witness.claim(&claim(Wish::GiveUp, 50)).unwrap()).await;
    assert_eq!([run, take_back, give_up], [Ruling::Target; 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_is_gone_decides_nothing_and_is_named() {
    let address = format!("http://127.0.0.1:{}", free_port());
    let witness = format!("etcd:{address}").parse::<WitnessAddress>().unwrap().open().unwrap();
    let error =
        blocking(&witness, |witness| witness.claim(&claim(Wish::Run, 2)).unwrap_err().to_string()).await;
    assert!(error.contains(&address), "{error}");
}
