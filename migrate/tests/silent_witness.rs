//! A witness that never answers, as a network file system that hangs: nobody waits for it longer than said, nor against the
//! operator's will.

use std::error::Error;
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use ferry_migrate::ports::{
    BuildRefusal, GuestPages, PortError, RecordStore, SavedState, SourceVm, SystemClock, TargetHost, TargetVm,
};
use ferry_migrate::protocol::message::{AbortCode, Describe, Hello};
use ferry_migrate::protocol::negotiation::Features;
use ferry_migrate::protocol::page::Compression;
use ferry_migrate::protocol::source::{Failure, OnTimeout, Outcome};
use ferry_migrate::protocol::wire::{Decoder, VERSION_NEWEST, VERSION_OLDEST, encode};
use ferry_migrate::protocol::witness::{Claim, Ruling};
use ferry_migrate::protocol::{
    ChunkIndex, Epoch, MemoryLayout, Message, MigrationId, PAGE_BYTES, PageBitmap, PageMask, PageRange,
    Record, Region, VmId, WitnessId,
};
use ferry_migrate::witness::{Witness, try_out};
use ferry_migrate::{
    BandwidthCap, ListenAddress, MigrateOptions, ReceiveOptions, Receiver, Resolver, Security, migrate,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};

/// Far above the few seconds that a witness is waited for, on a machine that is busy.
const LONG: Duration = Duration::from_secs(120);

const VM: VmId = VmId([1; 16]);
const ID: WitnessId = WitnessId([7; 16]);

/// It hangs, and says when it has begun to.
#[derive(Debug)]
struct Silent {
    /// Whether it says which it is.
    says_id: bool,
    hangs: watch::Sender<bool>,
}

impl Silent {
    fn new(says_id: bool) -> Arc<Self> {
        Arc::new(Self { says_id, hangs: watch::Sender::new(false) })
    }

    fn hang<T>(&self) -> T {
        self.hangs.send_replace(true);
        loop {
            std::thread::park();
        }
    }

    async fn asked(&self) {
        self.hangs.subscribe().wait_for(|hangs| *hangs).await.unwrap();
    }
}

impl Witness for Silent {
    fn id(&self) -> Result<WitnessId, PortError> {
        if self.says_id { Ok(ID) } else { self.hang() }
    }

    fn probe(&self, _: WitnessId) -> Result<(), PortError> {
        self.hang()
    }

    fn claim(&self, _: WitnessId, _: &Claim) -> Result<Ruling, PortError> {
        self.hang()
    }
}

impl fmt::Display for Silent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("file:/silent")
    }
}

/// A VM, or a place for one, that nothing is ever asked of but its layout.
struct Untouched;

fn layout() -> MemoryLayout {
    MemoryLayout::new(vec![Region { gpa: 0, bytes: 1 << 20 }]).unwrap()
}

impl GuestPages for Untouched {
    fn layout(&self) -> MemoryLayout {
        layout()
    }

    fn for_each_page(&self, _: PageRange, _: &mut dyn FnMut(u64, &[u8; PAGE_BYTES])) {
        unreachable!()
    }

    fn send(&self, _: BorrowedFd<'_>, _: &[u8], _: &[PageRange]) -> io::Result<()> {
        unreachable!()
    }

    fn receive(&self, _: BorrowedFd<'_>, _: &[PageRange]) -> io::Result<()> {
        unreachable!()
    }

    fn write(&self, _: u64, _: &[u8; PAGE_BYTES]) {
        unreachable!()
    }

    fn patch(&self, _: u64, _: usize, _: &[u8]) {
        unreachable!()
    }

    fn zero(&self, _: PageRange) -> io::Result<()> {
        unreachable!()
    }

    fn touched(&self, _: ChunkIndex) -> PageMask {
        unreachable!()
    }
}

impl SourceVm for Untouched {
    fn description(&self) -> Vec<u8> {
        unreachable!()
    }

    fn pages(&self) -> Arc<dyn GuestPages> {
        Arc::new(Self)
    }

    fn memory_descriptor(&self) -> Result<OwnedFd, PortError> {
        unreachable!()
    }

    fn start_dirty_log(&self) -> Result<(), PortError> {
        unreachable!()
    }

    fn read_dirty_log(&self) -> Result<PageBitmap, PortError> {
        unreachable!()
    }

    fn stop_dirty_log(&self) -> Result<(), PortError> {
        unreachable!()
    }

    fn pause(&self) -> Result<(), PortError> {
        unreachable!()
    }

    fn settle(&self) -> Result<(), PortError> {
        unreachable!()
    }

    fn save(&self) -> Result<SavedState, PortError> {
        unreachable!()
    }

    fn let_go(&self) {
        unreachable!()
    }

    fn resume(&self) -> Result<(), PortError> {
        unreachable!()
    }

    fn release(&self) {
        unreachable!()
    }
}

impl TargetHost for Untouched {
    fn build(&self, _: VmId, _: &[u8], _: &MemoryLayout) -> Result<Arc<dyn TargetVm>, BuildRefusal> {
        unreachable!()
    }

    fn adopt(
        &self,
        _: VmId,
        _: &[u8],
        _: &MemoryLayout,
        _: OwnedFd,
    ) -> Result<Arc<dyn TargetVm>, BuildRefusal> {
        unreachable!()
    }
}

impl RecordStore for Untouched {
    fn load(&self, _: VmId) -> Result<Option<Record>, PortError> {
        Ok(None)
    }

    fn store(&self, _: &Record) -> Result<(), PortError> {
        Ok(())
    }
}

/// How a migration with `witness` ends, given `timeout` for all of it.
async fn moved(
    witness: Arc<Silent>,
    (timeout, on_timeout): (Duration, OnTimeout),
    cancel: watch::Receiver<bool>,
) -> Failure {
    let options = MigrateOptions {
        migration: MigrationId([2; 16]),
        vm: VM,
        name: "web".parse().unwrap(),
        epoch: Epoch::FIRST,
        target: "127.0.0.1:9".parse().unwrap(),
        security: Security::LoopbackOnly,
        streams: 1,
        adapt_streams: false,
        compression: Compression::None,
        bandwidth: BandwidthCap::default(),
        verify: true,
        verify_whole: false,
        downtime_budget: Duration::from_millis(500),
        timeout,
        on_timeout,
        witness: Some(witness),
        resolver: Resolver::default(),
        reconnect: Duration::ZERO,
    };
    let (updates, _) = mpsc::unbounded_channel();
    let clock = Arc::new(SystemClock::default());
    let ended = migrate(Arc::new(Untouched), Arc::new(Untouched), clock, options, cancel, updates);
    match tokio::time::timeout(LONG, ended).await.expect("it waits for ever").unwrap() {
        Outcome::Stayed { failure, .. } => failure,
        other @ (Outcome::Moved(_) | Outcome::LetGo { .. }) => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_is_cancelled_while_it_waits_for_its_witness() {
    let witness = Silent::new(false);
    let (give_up, cancel) = watch::channel(false);
    let ended = tokio::spawn(moved(Arc::clone(&witness), (LONG, OnTimeout::Cancel), cancel));
    witness.asked().await;
    give_up.send_replace(true);
    assert_eq!(ended.await.unwrap(), Failure::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_does_not_wait_for_its_witness_longer_than_for_all() {
    let (_keep, cancel) = watch::channel(false);
    let given = (Duration::from_millis(50), OnTimeout::Cancel);
    let failure = moved(Silent::new(false), given, cancel).await;
    assert!(matches!(&failure, Failure::Timeout(text) if text.contains("witness")), "{failure:?}");
}

#[test]
fn a_witness_that_never_answers_keeps_no_process_from_ending() {
    let (ended, end) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let (_keep, cancel) = watch::channel(false);
        let given = (Duration::from_millis(50), OnTimeout::Stop);
        let failure = runtime.block_on(moved(Silent::new(false), given, cancel));
        drop(runtime);
        ended.send(failure).unwrap();
    });
    let failure = end.recv_timeout(LONG).expect("its runtime never ends");
    assert!(
        matches!(&failure, Failure::Local(text) if text.contains("not answered") && text.contains("file:/silent")),
        "{failure:?}"
    );
}

#[tokio::test]
async fn trying_a_witness_out_ends() {
    for says_id in [false, true] {
        let witness: Arc<dyn Witness> = Silent::new(says_id);
        let tried = tokio::time::timeout(LONG, try_out(&witness)).await.expect("it waits for ever");
        assert!(tried.as_ref().is_err_and(|text| text.contains("not answered")), "{tried:?}");
    }
}

/// A target with `witness`, what ends it, and a source that has said hello.
async fn greeted(
    witness: &Arc<Silent>,
) -> Result<(tokio::task::JoinHandle<bool>, watch::Sender<bool>, Source), Box<dyn Error>> {
    let options = ReceiveOptions {
        listen: ListenAddress::Tcp("127.0.0.1:0".parse()?),
        security: Security::LoopbackOnly,
        host: "target".into(),
        name: None,
        witness: Some(Arc::clone(witness) as _),
    };
    let (updates, _) = mpsc::unbounded_channel();
    let clock = Arc::new(SystemClock::default());
    let mut receiver = Receiver::bind(options, Arc::new(Untouched), Arc::new(Untouched), clock, updates)?;
    let ListenAddress::Tcp(address) = receiver.local_address()? else { unreachable!("it listens so") };
    let (give_up, cancel) = watch::channel(false);
    let target = tokio::spawn(async move { receiver.receive(cancel).await.unwrap().is_none() });
    let mut source = Source { stream: TcpStream::connect(address).await?, decoder: Decoder::default() };
    let hello = Hello {
        version_oldest: VERSION_OLDEST,
        version_newest: VERSION_NEWEST,
        features: Features::ours_on(false).and(Features::WITNESS),
        migration: MigrationId([2; 16]),
        vm: VM,
        name: "web".parse()?,
        epoch: Epoch::FIRST,
        resumes: false,
    };
    source.send(Message::Hello(hello)).await;
    Ok((target, give_up, source))
}

/// What a source says and hears, by hand.
struct Source {
    stream: TcpStream,
    decoder: Decoder,
}

impl Source {
    async fn send(&mut self, message: Message) {
        self.stream.write_all(&encode(&message)).await.unwrap();
    }

    async fn next(&mut self) -> Message {
        let mut chunk = [0; 4096];
        loop {
            if let Some(message) = self.decoder.next_message().unwrap() {
                return message;
            }
            let read = tokio::time::timeout(LONG, self.stream.read(&mut chunk)).await;
            match read.expect("the target says nothing").unwrap() {
                0 => panic!("the target has closed the connection"),
                got => self.decoder.push(&chunk[..got]),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_is_stopped_while_it_waits_for_its_witness() {
    let witness = Silent::new(false);
    let (target, give_up, mut source) = greeted(&witness).await.unwrap();
    witness.asked().await;
    give_up.send_replace(true);
    let Message::Abort(abort) = source.next().await else { panic!("it should give up") };
    assert_eq!(abort.code, AbortCode::Cancelled, "{}", abort.sentence);
    assert!(target.await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_whose_witness_does_not_answer_refuses_and_listens_again() {
    let witness = Silent::new(false);
    let (target, give_up, mut source) = greeted(&witness).await.unwrap();
    let Message::Abort(abort) = source.next().await else { panic!("it should refuse") };
    assert_eq!(abort.code, AbortCode::Witness, "{}", abort.sentence);
    assert!(abort.sentence.contains("not answered"), "{}", abort.sentence);
    give_up.send_replace(true);
    assert!(target.await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_that_is_not_answered_ends_the_attempt() {
    let witness = Silent::new(true);
    let (target, give_up, mut source) = greeted(&witness).await.unwrap();
    assert!(matches!(source.next().await, Message::Welcome(_)));
    source.send(Message::Witness(ID)).await;
    let regions = layout().regions().to_vec();
    source.send(Message::Describe(Describe { description: Vec::new(), regions, streams: 1 })).await;
    let Message::Abort(abort) = source.next().await else { panic!("it should give up") };
    assert_eq!(abort.code, AbortCode::Witness, "{}", abort.sentence);
    assert!(abort.sentence.contains("not answered"), "{}", abort.sentence);
    give_up.send_replace(true);
    assert!(target.await.unwrap());
}
