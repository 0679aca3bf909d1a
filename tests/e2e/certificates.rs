//! Migrations with certificates: what another host of the same site can't do to one, even if it has learned the migration's one-time
//! key, and links that break.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ferry_migrate::protocol::admission::{JoinKey, Place};
use ferry_migrate::protocol::frame::{DATA_MAGIC, Join};
use ferry_migrate::protocol::message::{AbortCode, Hello};
use ferry_migrate::protocol::negotiation::Features;
use ferry_migrate::protocol::source::{Outcome, Summary};
use ferry_migrate::protocol::wire::{self, Decoder};
use ferry_migrate::protocol::{Message, MigrationId};
use ferry_migrate::{BandwidthCap, MigrateOptions, Security};
use ferry_vmm::Backing;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::server::TlsStream as Accepted;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use ferry_tests::guest::{
    Guest, boot, config, has_kvm, move_to, never, one_at_a_time, runtime, secured_target_for, source,
};
use ferry_tests::proxy::{Cuts, CuttingProxy};
use ferry_tests::site::{Site, SiteHost};

/// How long the target may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);

async fn connect(connector: &TlsConnector, target: &str) -> TlsStream<TcpStream> {
    let stream = TcpStream::connect(target).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    connector.connect(name, stream).await.unwrap()
}

/// Somebody between source and target who has the keys of both hosts, and so sees everything. Data streams wait for `open`.
struct Wiretap {
    target: String,
    as_target: TlsAcceptor,
    as_source: TlsConnector,
    keys: mpsc::UnboundedSender<JoinKey>,
    open: watch::Receiver<bool>,
}

impl Wiretap {
    async fn run(self, listener: TcpListener) {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let mut near = self.as_target.accept(stream).await.unwrap();
            let mut far = connect(&self.as_source, &self.target).await;
            let (keys, mut open) = (self.keys.clone(), self.open.clone());
            tokio::spawn(async move {
                let mut magic = [0; 4];
                near.read_exact(&mut magic).await?;
                if magic == DATA_MAGIC {
                    let _ = open.wait_for(|open| *open).await;
                }
                far.write_all(&magic).await?;
                far.flush().await?;
                let ((near_in, near_out), (far_in, far_out)) = (split(near), split(far));
                let there = pass_on(near_in, far_out);
                let back = listen(far_in, near_out, keys);
                tokio::try_join!(there, back).map(drop)
            });
        }
    }
}

async fn pass_on(
    mut from: ReadHalf<Accepted<TcpStream>>,
    mut into: WriteHalf<TlsStream<TcpStream>>,
) -> std::io::Result<()> {
    tokio::io::copy(&mut from, &mut into).await?;
    into.shutdown().await
}

/// Passes on what the target says, and keeps the keys.
async fn listen(
    mut from: ReadHalf<TlsStream<TcpStream>>,
    mut into: WriteHalf<Accepted<TcpStream>>,
    keys: mpsc::UnboundedSender<JoinKey>,
) -> std::io::Result<()> {
    let (mut decoder, mut buffer) = (Decoder::default(), vec![0; 16 << 10]);
    loop {
        let got = from.read(&mut buffer).await?;
        if got == 0 {
            return into.shutdown().await;
        }
        decoder.push(&buffer[..got]);
        while let Ok(Some(message)) = decoder.next_message() {
            if let Message::Admit(admit) = message {
                let _ = keys.send(admit.key);
            }
        }
        into.write_all(&buffer[..got]).await?;
        into.flush().await?;
    }
}

/// Joins the target with `join` as `host`; the target must close the stream.
async fn is_turned_away(host: &SiteHost, target: &str, join: &Join) {
    let mut stream = connect(&host.connector(), target).await;
    stream.write_all(&join.encode()).await.unwrap();
    stream.flush().await.unwrap();
    let end = tokio::time::timeout(PATIENCE, stream.read(&mut [0; 1])).await;
    let end = end.expect("it is still let in");
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
}

/// Greets the target as `host`; the target must say that it is busy with somebody else.
async fn is_refused(host: &SiteHost, target: &str, hello: Hello) {
    let mut stream = connect(&host.connector(), target).await;
    stream.write_all(&wire::encode(&Message::Hello(hello))).await.unwrap();
    stream.flush().await.unwrap();
    let mut said = Vec::new();
    // However it ends.
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut said)).await.expect("it is let in");
    let mut decoder = Decoder::default();
    decoder.push(&said);
    match decoder.next_message() {
        Ok(Some(Message::Abort(abort))) => assert_eq!(abort.code, AbortCode::Occupied, "{abort:?}"),
        other => panic!("it was let in: {other:?}"),
    }
}

fn hello(options: &MigrateOptions) -> Hello {
    Hello {
        version_oldest: wire::VERSION_OLDEST,
        version_newest: wire::VERSION_NEWEST,
        features: Features::OURS,
        migration: options.migration,
        vm: options.vm,
        name: options.name.clone(),
        epoch: options.epoch,
        resumes: true,
    }
}

/// What other hosts of the site may try who have heard everything.
async fn attack(site: &Site, target: &str, options: &MigrateOptions, key: &JoinKey) {
    let (other, other_vms) = (site.host("other", &[]), site.host("other-vms", &["other"]));
    let MigrateOptions { migration, vm, epoch, .. } = *options;
    let place = Place { vm, epoch, migration, session: 0, stream: 0 };
    let join = Join { migration, stream: 0, session: 0, proof: key.prove(&place) };
    is_turned_away(&other, target, &join).await;
    // To take the migration over.
    is_refused(&other, target, hello(options)).await;
    // To have it given up for one of a VM that this host may send.
    let newer = Hello {
        migration: MigrationId([9; 16]),
        name: "other".parse().unwrap(),
        resumes: false,
        ..hello(options)
    };
    is_refused(&other_vms, target, newer).await;
}

#[test]
fn no_other_host_of_the_site_joins_takes_over_or_ends_a_migration() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let site = Site::default();
    let (a, b) = (site.host("a", &[]), site.host("b", &[]));
    let guest = boot("dirty rate=50 set=16 fill=64 random=100", &config(128, 1, Backing::PrivateAnonymous));
    runtime().block_on(async {
        let mut target = secured_target_for(&guest, b.security());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut options = guest.options(listener.local_addr().unwrap().to_string());
        (options.streams, options.security) = (2, a.security());
        let cap = BandwidthCap::new(Some(4 << 20));
        options.bandwidth = cap.clone();
        let ((keys, mut heard), (gate, open)) = (mpsc::unbounded_channel(), watch::channel(false));
        let (as_target, as_source) = (b.acceptor(), a.connector());
        let tap = Wiretap { target: target.address.clone(), as_target, as_source, keys, open };
        let tap = tokio::spawn(tap.run(listener));
        let (direct, attacked, refused) =
            (target.address.clone(), options.clone(), target.receiver.turned_away());
        let attacking = async {
            let key = heard.recv().await.expect("the target gives its source a key");
            attack(&site, &direct, &attacked, &key).await;
            assert_eq!(refused.streams(), 1, "{refused:?}");
            // Only now do the source's own streams come through.
            gate.send_replace(true);
            cap.set(None);
        };
        let moving = async {
            match source(&guest, options, never()).await {
                // Said here and now: a target whose source has gone silently would be waited for without a word.
                Outcome::Stayed { failure, .. } => panic!("the guest was not moved: {failure}"),
                Outcome::LetGo { .. } => panic!("nobody has decided anything"),
                Outcome::Moved(summary) => summary,
            }
        };
        let (summary, received, ()) = tokio::join!(moving, target.receiver.receive(never()), attacking);
        received.expect("threads").expect("a guest");
        assert_eq!(summary.digest, summary.target_digest);
        assert!(summary.reconnections.is_empty(), "{:?}", summary.reconnections);
        assert_eq!(refused.streams(), 1, "{refused:?}");
        tap.abort();
    });
}

#[test]
fn a_link_that_breaks_is_made_again_with_certificates_even_with_renewed_ones() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let site = Site::default();
    let (a, b) = (site.host("a", &[]), site.host("b", &[]));
    let guest = boot(
        "dirty rate=100 set=16 fill=100 random=100 verify=500",
        &config(192, 1, Backing::PrivateAnonymous),
    );
    let (over, securities) = (AtomicBool::new(false), [a.security(), b.security()]);
    let (guest, summary) = std::thread::scope(|scope| {
        scope.spawn(|| {
            // So that new ones come between any two connections, and in the middle of one's handshake.
            while !over.load(Ordering::SeqCst) {
                site.issue(&a);
                site.issue(&b);
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let _over = Over(&over);
        runtime().block_on(move_over_a_bad_link(guest, securities))
    });
    guest.goes_on();
    let reconnections = &summary.reconnections;
    assert!(
        reconnections.iter().any(|again| again.arrived_pages > 0),
        "the link did break: {reconnections:?}"
    );
}

/// Ends what runs beside, however this ends.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

async fn move_over_a_bad_link(guest: Guest, [from, to]: [Security; 2]) -> (Guest, Summary) {
    let mut target = secured_target_for(&guest, to);
    let cuts = Cuts { bytes_max: 20 << 20, count: 2, outage: Some(Duration::from_millis(300)) };
    target.address = CuttingProxy::cutting(&target.address, cuts).address;
    let change = |options: &mut MigrateOptions| (options.streams, options.security) = (2, from);
    move_to(guest, target, change).await
}
