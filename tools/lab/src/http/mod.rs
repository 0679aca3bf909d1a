//! HTTP load: keep-alive connections that ask for one file over and over, and check every answer.
//!
//! ```text
//!   start ──> running ──stop──> draining ──> report      each request either succeeds or is a failure
//!                └────drop────> aborted
//! ```
//!
//! Stopping lets the requests in flight end, so that none is left uncounted; a request that gets no
//! answer within the target's timeout is a failure, as is one whose connection breaks. After a
//! failure the connection is made anew.
//!
//! Left out: TLS, HTTP/2, request bodies, and any rate but "as fast as the answers come".

mod exchange;
mod recorder;
pub mod report;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

pub use report::{Failure, FailureKind, HttpReport, HttpSnapshot, RequestRecord};

use crate::clock::LabClock;
use crate::namespace::{Namespace, NamespaceError};
pub(crate) use exchange::{ByteMeter, Client};
use recorder::Recorder;

/// How long a request may take unless the target says otherwise.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection that failed waits before it is made anew. It keeps a target that refuses
/// connections from being counted thousands of times a second.
const RECONNECT_PAUSE: Duration = Duration::from_millis(50);

/// Why there is no load, or no answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The load's thread could not start.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// No runtime could be had for the load's thread.
    #[error("can't start the event loop of an HTTP client")]
    Runtime {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The server gave no right answer in time.
    #[error("http://{address}{path} gave no right answer in {waited_ms} ms; the last attempt: {last}")]
    NotServed {
        /// The server.
        address: SocketAddr,
        /// The path that was asked for.
        path: String,
        /// How long it was tried, in milliseconds.
        waited_ms: u128,
        /// How the last attempt failed.
        last: String,
    },
}

/// What a right answer's body is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExpectedBody {
    /// Anything.
    Any,
    /// So many bytes, whatever they are.
    Length(u64),
    /// These bytes.
    Exactly(Bytes),
}

/// What to ask for, and what a right answer is. Its status is always to be 200.
#[derive(Debug, Clone)]
pub struct HttpTarget {
    /// The server.
    pub address: SocketAddr,
    /// The path, with its leading slash.
    pub path: String,
    /// The body that is expected.
    pub body: ExpectedBody,
    /// How long one request may take, its connection included.
    pub timeout: Duration,
}

impl HttpTarget {
    /// Any body from `path` at `address`, within [`REQUEST_TIMEOUT`].
    #[must_use]
    pub fn new(address: SocketAddr, path: &str) -> Self {
        Self { address, path: path.into(), body: ExpectedBody::Any, timeout: REQUEST_TIMEOUT }
    }

    /// The same, expecting `body`.
    #[must_use]
    pub fn expecting(mut self, body: ExpectedBody) -> Self {
        self.body = body;
        self
    }

    /// The same with another timeout.
    #[must_use]
    pub fn within(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    Draining,
    Aborted,
}

/// A running load. Dropping it aborts it.
#[derive(Debug)]
pub struct HttpLoad {
    recorder: Arc<Recorder>,
    phase: watch::Sender<Phase>,
    thread: Option<JoinHandle<()>>,
}

impl HttpLoad {
    /// Starts `connections` connections inside `namespace`, each asking for `target` again as soon
    /// as it has the answer.
    ///
    /// # Errors
    /// [`HttpError`] if the thread or its event loop could not start. A server that does not answer
    /// is no error here: it shows in the counts.
    pub fn start(
        namespace: &Namespace,
        clock: LabClock,
        target: HttpTarget,
        connections: usize,
    ) -> Result<Self, HttpError> {
        let runtime = client_runtime()?;
        let recorder = Arc::new(Recorder::start(clock, connections));
        let (phase, watched) = watch::channel(Phase::Running);
        let for_thread = Arc::clone(&recorder);
        let thread = namespace.start_thread("http-load", move || {
            let loops =
                (0..connections).map(|number| connection_loop(number, &target, &for_thread, watched.clone()));
            runtime.block_on(futures::future::join_all(loops));
            for_thread.finish();
        })?;
        Ok(Self { recorder, phase, thread: Some(thread) })
    }

    /// The counts so far.
    #[must_use]
    pub fn snapshot(&self) -> HttpSnapshot {
        self.recorder.snapshot()
    }

    /// Lets the requests in flight end, for at most the target's timeout, and reports.
    ///
    /// This blocks the calling thread.
    #[must_use]
    pub fn stop(mut self) -> HttpReport {
        self.end(Phase::Draining);
        self.recorder.report()
    }

    fn end(&mut self, phase: Phase) {
        // No receiver means that the loops have ended already.
        let _ = self.phase.send(phase);
        if let Some(thread) = self.thread.take()
            && let Err(panic) = thread.join()
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

impl Drop for HttpLoad {
    fn drop(&mut self) {
        self.end(Phase::Aborted);
    }
}

/// Asks for `target` from inside `namespace` until an answer is right, for at most `patience`, and
/// returns its body. It blocks the calling thread.
///
/// # Errors
/// [`HttpError::NotServed`] if none was, with the last attempt's failure.
pub fn fetch_when_served(
    namespace: &Namespace,
    clock: LabClock,
    target: &HttpTarget,
    patience: Duration,
) -> Result<Bytes, HttpError> {
    let runtime = client_runtime()?;
    let deadline = clock.now() + patience;
    let attempts = async move {
        loop {
            let attempt = async {
                let mut client = Client::connect(target, ByteMeter::none()).await?;
                client.exchange(target).await
            };
            let remaining = deadline.saturating_sub(clock.now());
            let last = match tokio::time::timeout(target.timeout.min(remaining), attempt).await {
                Ok(Ok(body)) => return Ok(body),
                Ok(Err(failed)) => failed.to_string(),
                Err(_) => "no answer".to_owned(),
            };
            if clock.now() + RECONNECT_PAUSE >= deadline {
                return Err(HttpError::NotServed {
                    address: target.address,
                    path: target.path.clone(),
                    waited_ms: patience.as_millis(),
                    last,
                });
            }
            tokio::time::sleep(RECONNECT_PAUSE).await;
        }
    };
    namespace.run(move || runtime.block_on(attempts))?
}

pub(crate) fn client_runtime() -> Result<tokio::runtime::Runtime, HttpError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| HttpError::Runtime { source })
}

async fn connection_loop(
    number: usize,
    target: &HttpTarget,
    recorder: &Arc<Recorder>,
    mut phase: watch::Receiver<Phase>,
) {
    let mut aborted = phase.clone();
    let requests = async {
        let mut client = None;
        while *phase.borrow_and_update() == Phase::Running {
            client = one_request(number, target, recorder, client).await;
            if client.is_none() {
                // Draining must not wait for a pause.
                let _ = tokio::time::timeout(RECONNECT_PAUSE, phase.changed()).await;
            }
        }
    };
    tokio::select! {
        () = requests => {}
        _ = aborted.wait_for(|phase| *phase == Phase::Aborted) => {}
    }
    recorder.connection_ended(number);
}

/// Makes one request and records how it went. Returns the connection if it can serve another.
async fn one_request(
    number: usize,
    target: &HttpTarget,
    recorder: &Arc<Recorder>,
    client: Option<Client>,
) -> Option<Client> {
    let started_us = recorder.now_us();
    let request = async {
        let mut client = match client {
            Some(client) => client,
            None => Client::connect(target, recorder.meter(number)).await?,
        };
        client.exchange(target).await?;
        Ok::<_, exchange::RequestError>(client)
    };
    match tokio::time::timeout(target.timeout, request).await {
        Ok(Ok(client)) => {
            recorder.succeeded(number, started_us);
            client.is_reusable().then_some(client)
        }
        Ok(Err(failed)) => {
            recorder.failed(number, started_us, failed.kind(), failed.to_string());
            None
        }
        Err(_) => {
            let detail = format!("no complete answer in {} ms", target.timeout.as_millis());
            recorder.failed(number, started_us, FailureKind::Timeout, detail);
            None
        }
    }
}
