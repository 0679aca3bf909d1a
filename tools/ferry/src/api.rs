//! What crosses a VM's control socket: HTTP with JSON bodies, as docs/operations.md lists it.
//!
//! Server and client use the same types, so that they can't drift apart.

use ferry_migrate::protocol::source::Resolution;
use ferry_migrate::report::{ForecastReport, MigrationReport, ReconnectionReport, Round};
use serde::{Deserialize, Serialize};

/// Every path begins with this.
pub(crate) const VM: &str = "/api/v1/vm";
pub(crate) const PAUSE: &str = "/api/v1/vm/pause";
pub(crate) const RESUME: &str = "/api/v1/vm/resume";
pub(crate) const STOP: &str = "/api/v1/vm/stop";
pub(crate) const RESOLVE: &str = "/api/v1/vm/resolve";
pub(crate) const POWER_BUTTON: &str = "/api/v1/vm/power-button";
pub(crate) const GUEST: &str = "/api/v1/guest";
pub(crate) const MIGRATION: &str = "/api/v1/migration";
pub(crate) const MIGRATION_BANDWIDTH: &str = "/api/v1/migration/bandwidth";
pub(crate) const MIGRATION_EVENTS: &str = "/api/v1/migration/events";

/// What a VM's host process is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum VmState {
    /// It waits for a VM to come.
    Waiting,
    /// A VM is coming.
    Receiving,
    /// The VM runs here.
    Running,
    /// It is paused here.
    Paused,
    /// It runs here and is moving away.
    Migrating,
    /// It may or may not run at the target; it does not run here.
    InDoubt,
    /// It runs elsewhere now.
    Moved,
    /// It has ended.
    Stopped,
}

impl std::fmt::Display for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Waiting => "waiting",
            Self::Receiving => "receiving",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Migrating => "migrating",
            Self::InDoubt => "in doubt",
            Self::Moved => "moved",
            Self::Stopped => "stopped",
        })
    }
}

/// `GET /api/v1/vm`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct VmInfo {
    pub(crate) name: String,
    pub(crate) state: VmState,
    /// The host process; 0 where none lives, and only the records are left.
    pub(crate) pid: u32,
    /// The VM's identity for its whole life; absent while none is here.
    pub(crate) id: Option<String>,
    pub(crate) epoch: Option<u64>,
    pub(crate) memory_bytes: Option<u64>,
    /// What holds the memory on this host, in words.
    #[serde(default)]
    pub(crate) memory_kind: Option<String>,
    pub(crate) cpus: Option<u8>,
    /// The CPU profile with which it was started.
    #[serde(default)]
    pub(crate) cpu_profile: Option<String>,
    /// Features that the guest sees beyond that because this host's KVM lets them show through.
    #[serde(default)]
    pub(crate) cpu_leaks: Vec<String>,
    pub(crate) network: Option<NetworkInfo>,
    /// The pseudo terminal of its serial port, if it has one.
    #[serde(default)]
    pub(crate) terminal: Option<String>,
    /// System calls that its host process has no use for, but tried.
    #[serde(default)]
    pub(crate) refused_system_calls: Vec<RefusedSystemCall>,
    /// Whom a target has turned away at its door.
    #[serde(default)]
    pub(crate) turned_away: Option<TurnedAwayInfo>,
    /// Who decides what is in doubt, besides the operator.
    #[serde(default)]
    pub(crate) witness: Option<String>,
    /// Where it listens for a VM.
    pub(crate) listen: Option<String>,
    /// Something worth knowing: why it stopped, where it went, what is in doubt.
    pub(crate) note: Option<String>,
}

/// What a thread of the host process was refused by its seccomp filter.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RefusedSystemCall {
    /// What kind of thread: `opener`, `control`, `vCPU`, `device` or `data`.
    pub(crate) thread: String,
    pub(crate) system_call: String,
    pub(crate) count: u64,
}

/// How many a target has turned away since it began to listen.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct TurnedAwayInfo {
    /// Connections that did not say, or prove, who or what they are.
    pub(crate) connections: u64,
    /// Data streams that did not belong to the migration under way.
    pub(crate) streams: u64,
}

/// A VM's interface.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct NetworkInfo {
    pub(crate) tap: String,
    pub(crate) mac: String,
    pub(crate) addresses: Vec<std::net::IpAddr>,
}

/// `POST /api/v1/migration`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct MigrationRequest {
    /// The target as `host:port` or `unix:/path`.
    pub(crate) target: String,
    pub(crate) downtime_ms: f64,
    /// Data streams to connect.
    pub(crate) streams: u16,
    /// Whether only as many of them work as make the migration faster.
    #[serde(default)]
    pub(crate) adapt_streams: bool,
    /// How pages are packed: `auto`, `none`, `lz4`, `zstd` or `zstd:LEVEL`.
    pub(crate) compress: String,
    pub(crate) bandwidth_bytes_per_s: Option<u64>,
    /// Whether digests of memory are taken and compared.
    #[serde(default = "verified")]
    pub(crate) verify: bool,
    /// Whether the source also reads all of the paused guest's memory once more.
    #[serde(default)]
    pub(crate) verify_whole: bool,
    /// How long the target is tried to be reached again each time that the link breaks; 0 for not at all.
    #[serde(default = "reconnect_ms")]
    pub(crate) reconnect_ms: f64,
    pub(crate) timeout_ms: f64,
    pub(crate) on_timeout: OnTimeoutWord,
    /// The folder with this host's certificate, instead of the one that the VM was started with.
    #[serde(default)]
    pub(crate) tls_dir: Option<std::path::PathBuf>,
    /// Whether to go without TLS over any network.
    #[serde(default)]
    pub(crate) insecure: bool,
}

/// `PUT /api/v1/vm/resolve`: what becomes of a handover that is in doubt.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ResolveRequest {
    pub(crate) decision: Decision,
}

/// What the operator decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Decision {
    /// The VM goes on here, if the witness agrees where there is one.
    Resume,
    /// The VM goes on here, whatever the witness may yet decide.
    ResumeWithoutWitness,
    /// It is the target's.
    Discard,
}

impl From<Decision> for Resolution {
    fn from(decision: Decision) -> Self {
        match decision {
            Decision::Resume => Self::Resume,
            Decision::ResumeWithoutWitness => Self::ResumeAlone,
            Decision::Discard => Self::Discard,
        }
    }
}

/// `PUT /api/v1/migration/bandwidth`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BandwidthRequest {
    /// The most to send while the VM runs, on all data streams together; `null` for no limit.
    pub(crate) bytes_per_s: Option<u64>,
}

const fn verified() -> bool {
    true
}

const fn reconnect_ms() -> f64 {
    30_000.0
}

/// What to do when the time is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum OnTimeoutWord {
    Cancel,
    Stop,
}

/// A line of `GET /api/v1/migration/events`, and of `ferry migrate --json`. The last one is `moved`, `failed` or `let-go`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub(crate) enum MigrationEvent {
    Started {
        target: String,
        memory_bytes: u64,
    },
    Negotiated {
        version: u16,
        host: String,
    },
    RoundStarted {
        round: u32,
        pages: u64,
    },
    Transferred {
        round_pages: u64,
        wire_bytes: u64,
    },
    RoundDone(Round),
    Reconnecting {
        reason: String,
    },
    Reconnected(ReconnectionReport),
    Stopping {
        pages: u64,
        forecast: ForecastReport,
        forced: bool,
    },
    Paused,
    Handed,
    InDoubt {
        reason: String,
    },
    Undoing {
        reason: String,
    },
    Moved(MigrationReport),
    /// The operator has decided that the VM is the target's.
    LetGo {
        reason: String,
    },
    Failed {
        reason: String,
    },
}

impl MigrationEvent {
    /// Whether nothing comes after it.
    pub(crate) const fn is_last(&self) -> bool {
        matches!(self, Self::Moved(_) | Self::LetGo { .. } | Self::Failed { .. })
    }
}

/// Any answer that is not 2xx.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ErrorBody {
    pub(crate) error: String,
}

/// `GET /api/v1/guest`: the workload guest's own report, times in ms.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct GuestReport {
    pub(crate) ready: bool,
    pub(crate) mode: String,
    pub(crate) heartbeats: u64,
    pub(crate) heartbeat_tsc: u64,
    pub(crate) tsc_khz: u64,
    pub(crate) largest_gap_ms: f64,
    pub(crate) gaps: Vec<GuestGap>,
    pub(crate) pages_written: u64,
    pub(crate) pages_checked: u64,
    pub(crate) errors: u64,
    pub(crate) http_requests: u64,
    pub(crate) udp_echoes: u64,
    pub(crate) fault: Option<String>,
}

/// A time in which the guest did not run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct GuestGap {
    pub(crate) start_tsc: u64,
    pub(crate) ms: f64,
}
