//! Data streams that somebody else opens to a migration under way: forged, repeated or of another. They are turned away,
//! and the migration does not notice.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ferry_migrate::BandwidthCap;
use ferry_migrate::protocol::admission::Proof;
use ferry_migrate::protocol::frame::{DATA_MAGIC, Frame, JOIN_BYTES, Join, UNPROVED_MAGIC};
use ferry_migrate::protocol::source::Outcome;
use ferry_migrate::protocol::{ChunkIndex, MigrationId, PageMask};
use ferry_vmm::Backing;

use ferry_tests::guest::{boot, config, has_kvm, never, one_at_a_time, runtime, source, target_for};

type Joins = Arc<Mutex<Vec<[u8; JOIN_BYTES]>>>;

/// Passes everything on to `target`, and keeps each data stream's join as somebody on the network could.
fn eavesdropper(target: String) -> (String, Joins) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, joins) = (listener.local_addr().unwrap().to_string(), Joins::default());
    let heard = Arc::clone(&joins);
    // They end with their connections, and the first with the test's process.
    std::thread::spawn(move || {
        for mut from in listener.incoming().map_while(Result::ok) {
            let Ok(mut to) = TcpStream::connect(&target) else { return };
            let (mut back_from, mut back_to) = (to.try_clone().unwrap(), from.try_clone().unwrap());
            let heard = Arc::clone(&heard);
            std::thread::spawn(move || {
                let _ = pass_on(&mut from, &mut to, &heard);
                let _ = to.shutdown(Shutdown::Write);
            });
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut back_from, &mut back_to);
                let _ = back_to.shutdown(Shutdown::Write);
            });
        }
    });
    (address, joins)
}

fn pass_on(from: &mut TcpStream, to: &mut TcpStream, heard: &Joins) -> std::io::Result<u64> {
    let mut first = [0; JOIN_BYTES];
    let (magic, rest) = first.split_at_mut(DATA_MAGIC.len());
    from.read_exact(magic)?;
    to.write_all(magic)?;
    if magic == DATA_MAGIC {
        from.read_exact(rest)?;
        to.write_all(rest)?;
        heard.lock().unwrap().push(first);
    }
    std::io::copy(from, to)
}

/// Opens a stream with `join` and sends a page over it; the target must close it.
fn is_turned_away(target: &str, join: &[u8]) {
    let mut stream = TcpStream::connect(target).unwrap();
    let mut mask = PageMask::EMPTY;
    mask.insert(3);
    let page = Frame::Raw { chunk: ChunkIndex::new(0, 512).unwrap(), mask }.encode();
    let _ = stream.write_all(join).and_then(|()| stream.write_all(&page));
    let _ = stream.write_all(&[0xee; 4096]);
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // Closed in order, or with what was sent unread.
    let end = stream.read(&mut [0; 1]);
    assert!(
        end.as_ref()
            .map_or_else(|error| error.kind() == std::io::ErrorKind::ConnectionReset, |&got| got == 0),
        "{end:?}"
    );
}

/// What somebody may try who has heard every join of the migration.
fn attempts(heard: &[[u8; JOIN_BYTES]]) -> Vec<Vec<u8>> {
    let known = Join::decode(&heard[0]).unwrap();
    let mut tries = vec![
        // The same once more, of each stream.
        heard[0].to_vec(),
        heard[1].to_vec(),
        Join { proof: Proof([0; 32]), ..known }.encode().to_vec(),
        Join { stream: 2, ..known }.encode().to_vec(),
        Join { stream: u16::MAX, ..known }.encode().to_vec(),
        Join { session: 1, ..known }.encode().to_vec(),
        Join { migration: MigrationId([9; 16]), ..known }.encode().to_vec(),
    ];
    // As the first ferries joined.
    let mut unproved = UNPROVED_MAGIC.to_vec();
    unproved.extend_from_slice(&heard[0][4..28]);
    unproved.resize(32, 0);
    tries.push(unproved);
    tries
}

#[test]
fn nobody_else_joins_a_migration() {
    if !has_kvm() {
        return;
    }
    let _turn = one_at_a_time();
    let guest = boot("dirty rate=50 set=16 fill=64 random=100", &config(128, 1, Backing::PrivateAnonymous));
    let runtime = runtime();
    let _context = runtime.enter();
    let mut target = target_for(&guest);
    let (address, joins) = eavesdropper(target.address.clone());
    let mut options = guest.options(address);
    options.streams = 2;
    let cap = BandwidthCap::new(Some(4 << 20));
    options.bandwidth = cap.clone();
    let direct = target.address.clone();
    let attack = std::thread::spawn(move || {
        let heard = loop {
            let heard = joins.lock().unwrap().clone();
            if heard.len() == 2 {
                break heard;
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        for attempt in attempts(&heard) {
            is_turned_away(&direct, &attempt);
        }
        // Fast enough now: everything was tried while pages were on their way.
        cap.set(None);
    });
    let outcome = runtime.block_on(async {
        let moving = async {
            match source(&guest, options, never()).await {
                // Said here and now: a target whose source has gone silently would be waited for without a word.
                Outcome::Stayed { failure, .. } => panic!("the guest was not moved: {failure}"),
                Outcome::LetGo { .. } => panic!("nobody has decided anything"),
                moved @ Outcome::Moved(_) => moved,
            }
        };
        tokio::join!(moving, target.receiver.receive(never())).0
    });
    attack.join().unwrap();
    let Outcome::Moved(summary) = outcome else { panic!("{outcome:?}") };
    assert_eq!(summary.digest, summary.target_digest);
    let refused = target.receiver.turned_away();
    assert_eq!(refused.streams(), 7, "{refused:?}");
    assert_eq!(refused.connections(), 1, "{refused:?}");
}
