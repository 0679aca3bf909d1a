//! A witness in an etcd cluster.
//!
//! ```text
//!  /ferry/witness/v1/identity    which witness this is: 16 bytes
//!  /ferry/witness/v1/vm/VM       one entry a VM, replaced by compare-and-swap on its revision
//!  /ferry/witness/v1/probe/N     what a probe has written, under a lease: it vanishes by itself
//! ```
//!
//! Everything is read and written in transactions that compare the identity: with the one that both hosts have agreed on, or not at
//! all. A cluster whose revision has gone back since it was asked for its identity was restored from a backup, which may lack
//! decisions, and is believed nothing either.
//!
//! Only probes are under a lease. A decision must outlive everything that happens to those who asked for it: one that
//! expired could be taken a second time, and that is how two hosts would run a VM.

use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, GetOptions, GetResponse, PutOptions, ResponseHeader, Txn,
    TxnOp, TxnOpResponse, TxnResponse,
};
use ferry_protocol::record::RecordError;
use ferry_protocol::witness::{Claim, Entry, Ruling, judge};
use ferry_protocol::{VmId, WitnessId};
use tokio::runtime::Handle;
use tokio::sync::Mutex;

use super::{Witness, random_identity};
use crate::ports::PortError;

const IDENTITY: &str = "/ferry/witness/v1/identity";
const PROBES: &str = "/ferry/witness/v1/probe/";
const ENTRIES: &str = "/ferry/witness/v1/vm/";

/// How long the cluster may take for one question before it counts as out of reach.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long the cluster keeps what a probe has written.
const PROBE_LEASE_S: i64 = 60;

/// Others may replace an entry between reading and writing it; each time means that somebody else got on.
const SWAPS_MAX: u32 = 16;

/// Why an etcd cluster can't witness at this moment.
#[derive(Debug, thiserror::Error)]
pub enum EtcdWitnessError {
    /// It answers with an error, or not at all.
    #[error("etcd at {members} can't {action}")]
    Etcd {
        /// What was tried, as a verb.
        action: &'static str,
        /// Whom it was asked of.
        members: String,
        /// What the client says.
        #[source]
        source: Box<etcd_client::Error>,
    },
    /// It takes too long.
    #[error("etcd at {0} does not answer within {secs} s", secs = PATIENCE.as_secs())]
    Timeout(String),
    /// An entry is no whole entry.
    #[error("etcd's {key} can't be trusted, so nothing is decided by it; decide with 'ferry resolve'")]
    Damaged {
        /// Which key.
        key: String,
        /// What is wrong with it.
        #[source]
        source: RecordError,
    },
    /// The identity can't be read.
    #[error("etcd's {IDENTITY} does not hold the identity of a witness")]
    Identity,
    /// It is not the cluster that was agreed on, or not its data.
    #[error(
        "etcd at {members} holds {found}, but both hosts have agreed on witness {agreed}, so nothing is decided by it; was its data \
         replaced? Bring back what was there, or decide with 'ferry resolve'"
    )]
    Exchanged {
        /// Who was asked.
        members: String,
        /// What it should hold.
        agreed: WitnessId,
        /// What it holds, in words.
        found: String,
    },
    /// Its data is older than what it had when it was agreed on.
    #[error(
        "etcd at {members} is at revision {now} after it was at {before}: it was restored from a backup that may lack decisions, so \
         nothing is decided by it; decide with 'ferry resolve'"
    )]
    WentBack {
        /// Who was asked.
        members: String,
        /// The highest revision that it was seen at.
        before: i64,
        /// Its revision.
        now: i64,
    },
    /// Others were always faster.
    #[error("etcd's {0} was replaced {SWAPS_MAX} times while it was being replaced here")]
    Contended(String),
}

/// A witness in an etcd cluster.
pub struct EtcdWitness {
    members: Vec<String>,
    runtime: Handle,
    client: Mutex<Option<Client>>,
    /// The highest revision that was seen since the identity was asked for.
    revision: AtomicI64,
}

type Asked<T> = Result<T, EtcdWitnessError>;

/// A key as it was read: its value, and the revision that a swap compares, 0 for one that is not there.
struct Held {
    value: Option<Vec<u8>>,
    revision: i64,
}

impl EtcdWitness {
    /// The witness in the cluster of these members (`http://HOST:PORT`).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    #[must_use]
    pub fn new(members: Vec<String>) -> Self {
        Self { members, runtime: Handle::current(), client: Mutex::default(), revision: AtomicI64::new(0) }
    }

    /// Does `work` with a connected client, within [`PATIENCE`].
    fn ask<T>(&self, work: impl AsyncFnOnce(&mut Client) -> Asked<T>) -> Asked<T> {
        let asking = async {
            let mut slot = self.client.lock().await;
            let mut client = match slot.take() {
                Some(client) => client,
                None => self.connect().await?,
            };
            let answer = work(&mut client).await;
            // One that failed is not used again: what is wrong may be with its connection.
            if answer.is_ok() {
                *slot = Some(client);
            }
            answer
        };
        let patiently = async { tokio::time::timeout(PATIENCE, asking).await };
        self.runtime.block_on(patiently).unwrap_or_else(|_| Err(EtcdWitnessError::Timeout(self.name())))
    }

    async fn connect(&self) -> Asked<Client> {
        let options = ConnectOptions::new().with_connect_timeout(PATIENCE).with_timeout(PATIENCE);
        Client::connect(&self.members, Some(options)).await.map_err(self.failed("be connected"))
    }

    fn failed(&self, action: &'static str) -> impl Fn(etcd_client::Error) -> EtcdWitnessError {
        let members = self.name();
        move |source| EtcdWitnessError::Etcd { action, members: members.clone(), source: Box::new(source) }
    }

    fn name(&self) -> String {
        self.members.join(",")
    }

    /// Does `put` if everything is the `same` still; if not, the answer holds the identity.
    async fn swap(&self, client: &mut Client, same: Vec<Compare>, put: TxnOp) -> Asked<TxnResponse> {
        let swap = Txn::new().when(same).and_then([put]).or_else([TxnOp::get(IDENTITY, None)]);
        client.txn(swap).await.map_err(self.failed("be written"))
    }

    async fn identify(&self, client: &mut Client) -> Asked<WitnessId> {
        for _ in 0..SWAPS_MAX {
            let options = None::<GetOptions>;
            let answer = client.get(IDENTITY, options).await.map_err(self.failed("be read"))?;
            // From here on it must not go back. What it was at before is of no account: nothing is in doubt yet.
            self.revision.store(answer.header().map_or(0, ResponseHeader::revision), Ordering::Relaxed);
            let held = Held::of(answer);
            if let Some(value) = held.value {
                return value.try_into().map(WitnessId).map_err(|_| EtcdWitnessError::Identity);
            }
            let id = random_identity().map_err(|_| EtcdWitnessError::Identity)?;
            let put = TxnOp::put(IDENTITY, id.0.to_vec(), None);
            if self.swap(client, vec![held.unchanged(IDENTITY)], put).await?.succeeded() {
                return Ok(id);
            }
        }
        Err(EtcdWitnessError::Contended(IDENTITY.to_owned()))
    }

    /// What `key` holds in the `agreed` witness: a linearizable read.
    async fn read(&self, client: &mut Client, agreed: WitnessId, key: &str) -> Asked<Held> {
        let reads = [TxnOp::get(key, None)];
        let read = Txn::new().when([is_still(agreed)]).and_then(reads).or_else([TxnOp::get(IDENTITY, None)]);
        let answer = client.txn(read).await.map_err(self.failed("be read"))?;
        let held = got(&answer);
        if !answer.succeeded() {
            return Err(self.exchanged(agreed, &held));
        }
        self.goes_on(&answer)?;
        Ok(held)
    }

    /// What an answer that is not of the `agreed` witness means; it holds this one's identity.
    fn exchanged(&self, agreed: WitnessId, identity: &Held) -> EtcdWitnessError {
        let other = identity.value.clone().and_then(|value| value.try_into().ok()).map(WitnessId);
        let found = other.map_or_else(|| "no witness".to_owned(), |other| format!("witness {other}"));
        EtcdWitnessError::Exchanged { members: self.name(), agreed, found }
    }

    /// Whether the cluster's history goes on from what was seen of it.
    fn goes_on(&self, answer: &TxnResponse) -> Asked<()> {
        let now = answer.header().map_or(0, ResponseHeader::revision);
        // Questions follow each other: the client is locked.
        let before = self.revision.fetch_max(now, Ordering::Relaxed);
        if now < before {
            return Err(EtcdWitnessError::WentBack { members: self.name(), before, now });
        }
        Ok(())
    }

    /// Reads, judges and replaces the entry of the claim's VM.
    async fn judge(
        &self,
        client: &mut Client,
        agreed: WitnessId,
        claim: &Claim,
    ) -> Result<Ruling, PortError> {
        let key = entry_key(claim.vm);
        for _ in 0..SWAPS_MAX {
            let held = self.read(client, agreed, &key).await?;
            let damaged = |source| EtcdWitnessError::Damaged { key: key.clone(), source };
            let entry = held.value.as_deref().map(Entry::decode).transpose().map_err(damaged)?;
            let judgement = judge(claim, entry.as_ref())?;
            let Some(entry) = judgement.entry else { return Ok(judgement.ruling) };
            let same = vec![is_still(agreed), held.unchanged(&key)];
            let answer = self.swap(client, same, TxnOp::put(key.as_str(), entry.encode(), None)).await?;
            // If not, the next read says why.
            if answer.succeeded() {
                self.goes_on(&answer)?;
                return Ok(judgement.ruling);
            }
        }
        Err(EtcdWitnessError::Contended(key).into())
    }

    /// Writes something under a lease.
    async fn rehearse(&self, client: &mut Client, agreed: WitnessId) -> Asked<()> {
        let lease = client.lease_grant(PROBE_LEASE_S, None).await.map_err(self.failed("grant a lease"))?;
        let key = format!("{PROBES}{:x}", lease.id());
        self.read(client, agreed, &key).await?;
        let put = TxnOp::put(key, Vec::new(), Some(PutOptions::new().with_lease(lease.id())));
        let answer = self.swap(client, vec![is_still(agreed)], put).await?;
        if answer.succeeded() { Ok(()) } else { Err(self.exchanged(agreed, &got(&answer))) }
    }
}

impl Held {
    fn of(mut answer: GetResponse) -> Self {
        match answer.take_kvs().into_iter().next() {
            Some(pair) => Self { revision: pair.mod_revision(), value: Some(pair.into_key_value().1) },
            None => Self { value: None, revision: 0 },
        }
    }

    /// That `key`, which held this, still does.
    fn unchanged(&self, key: &str) -> Compare {
        Compare::mod_revision(key, CompareOp::Equal, self.revision)
    }
}

/// What a transaction has read.
fn got(answer: &TxnResponse) -> Held {
    let read = answer.op_responses().into_iter().find_map(|answer| match answer {
        TxnOpResponse::Get(read) => Some(Held::of(read)),
        TxnOpResponse::Put(_) | TxnOpResponse::Delete(_) | TxnOpResponse::Txn(_) => None,
    });
    read.unwrap_or(Held { value: None, revision: 0 })
}

/// That the witness is the `agreed` one; not so if it has no identity.
fn is_still(agreed: WitnessId) -> Compare {
    Compare::value(IDENTITY, CompareOp::Equal, agreed.0.to_vec())
}

fn entry_key(vm: VmId) -> String {
    format!("{ENTRIES}{vm}")
}

impl Witness for EtcdWitness {
    fn id(&self) -> Result<WitnessId, PortError> {
        Ok(self.ask(async |client| self.identify(client).await)?)
    }

    fn probe(&self, agreed: WitnessId) -> Result<(), PortError> {
        Ok(self.ask(async |client| self.rehearse(client, agreed).await)?)
    }

    fn claim(&self, agreed: WitnessId, claim: &Claim) -> Result<Ruling, PortError> {
        self.ask(async |client| Ok(self.judge(client, agreed, claim).await))?
    }
}

impl fmt::Display for EtcdWitness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "etcd:{}", self.name())
    }
}

impl fmt::Debug for EtcdWitness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdWitness").field("members", &self.members).finish_non_exhaustive()
    }
}
