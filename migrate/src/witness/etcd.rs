//! A witness in an etcd cluster.
//!
//! ```text
//!  /ferry/witness/v1/identity    which witness this is: 16 bytes
//!  /ferry/witness/v1/vm/VM       one entry a VM, replaced by compare-and-swap on its revision
//!  /ferry/witness/v1/probe/N     what a probe has written, under a lease: it vanishes by itself
//! ```
//!
//! Only probes are under a lease. A decision must outlive everything that happens to those who asked for it: one that
//! expired could be taken a second time, and that is how two hosts would run a VM.

use std::fmt;
use std::time::Duration;

use etcd_client::{Client, Compare, CompareOp, ConnectOptions, GetOptions, PutOptions, Txn, TxnOp};
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
    /// Others were always faster.
    #[error("etcd's {0} was replaced {SWAPS_MAX} times while it was being replaced here")]
    Contended(String),
}

/// A witness in an etcd cluster.
pub struct EtcdWitness {
    members: Vec<String>,
    runtime: Handle,
    client: Mutex<Option<Client>>,
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
        Self { members, runtime: Handle::current(), client: Mutex::default() }
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

    /// A linearizable read.
    async fn get(&self, client: &mut Client, key: &str) -> Asked<Held> {
        let options = None::<GetOptions>;
        let mut answer = client.get(key, options).await.map_err(self.failed("be read"))?;
        Ok(match answer.take_kvs().into_iter().next() {
            Some(pair) => Held { revision: pair.mod_revision(), value: Some(pair.into_key_value().1.into()) },
            None => Held { value: None, revision: 0 },
        })
    }

    /// Replaces `key`, unless it is not any more what was `held`.
    async fn swap(&self, client: &mut Client, key: &str, held: &Held, value: Vec<u8>) -> Asked<bool> {
        let unchanged = Compare::mod_revision(key, CompareOp::Equal, held.revision);
        let swap = Txn::new().when([unchanged]).and_then([TxnOp::put(key, value, None)]);
        let answer = client.txn(swap).await.map_err(self.failed("be written"))?;
        Ok(answer.succeeded())
    }

    async fn identify(&self, client: &mut Client) -> Asked<WitnessId> {
        for _ in 0..SWAPS_MAX {
            let held = self.get(client, IDENTITY).await?;
            if let Some(value) = held.value {
                return value.try_into().map(WitnessId).map_err(|_| EtcdWitnessError::Identity);
            }
            let id = random_identity().map_err(|_| EtcdWitnessError::Identity)?;
            if self.swap(client, IDENTITY, &held, id.0.to_vec()).await? {
                return Ok(id);
            }
        }
        Err(EtcdWitnessError::Contended(IDENTITY.to_owned()))
    }

    /// Reads, judges and replaces the entry of the claim's VM.
    async fn judge(&self, client: &mut Client, claim: &Claim) -> Result<Ruling, PortError> {
        let key = entry_key(claim.vm);
        for _ in 0..SWAPS_MAX {
            let held = self.get(client, &key).await?;
            let damaged = |source| EtcdWitnessError::Damaged { key: key.clone(), source };
            let entry = held.value.as_deref().map(Entry::decode).transpose().map_err(damaged)?;
            let judgement = judge(claim, entry.as_ref())?;
            let Some(entry) = judgement.entry else { return Ok(judgement.ruling) };
            if self.swap(client, &key, &held, entry.encode()).await? {
                return Ok(judgement.ruling);
            }
        }
        Err(EtcdWitnessError::Contended(key).into())
    }
}

fn entry_key(vm: VmId) -> String {
    format!("{ENTRIES}{vm}")
}

impl Witness for EtcdWitness {
    fn id(&self) -> Result<WitnessId, PortError> {
        Ok(self.ask(async |client| self.identify(client).await)?)
    }

    fn probe(&self) -> Result<(), PortError> {
        Ok(self.ask(async |client| {
            let lease =
                client.lease_grant(PROBE_LEASE_S, None).await.map_err(self.failed("grant a lease"))?;
            let options = PutOptions::new().with_lease(lease.id());
            let key = format!("{PROBES}{:x}", lease.id());
            client.put(key, Vec::new(), Some(options)).await.map_err(self.failed("be written"))?;
            Ok(())
        })?)
    }

    fn claim(&self, claim: &Claim) -> Result<Ruling, PortError> {
        self.ask(async |client| Ok(self.judge(client, claim).await))?
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
