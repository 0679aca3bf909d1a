//! Talks to the agent inside the guest, and keeps a long TCP session with it.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use ferry_lab::network::lab::VM_IPV4;
use ferry_lab::{LabClock, Namespace};
use ferry_linux_guest_programs::AGENT_PORT;
use ferry_linux_guest_programs::lines::Answer;

/// How long one answer may take. Filling memory and reading a disk back are the longest: where ring 0 is interpreted,
/// the first touch of a page costs milliseconds, and more on a busy machine.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(180);

/// How long one attempt to connect may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A connection to the agent.
#[derive(Debug)]
pub(crate) struct Agent {
    stream: TcpStream,
    answers: BufReader<TcpStream>,
}

impl Agent {
    /// Connects from inside `client`.
    pub(crate) fn connect(client: &Namespace) -> anyhow::Result<Self> {
        let address = SocketAddr::from((VM_IPV4, AGENT_PORT));
        let stream = client.run(|| TcpStream::connect_timeout(&address, CONNECT_TIMEOUT))?;
        let stream = stream.with_context(|| format!("no connection to the agent at {address}"))?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        stream.set_nodelay(true)?;
        let answers = BufReader::new(stream.try_clone()?);
        Ok(Self { stream, answers })
    }

    /// Asks one line.
    pub(crate) fn ask(&mut self, request: &str) -> anyhow::Result<Answer> {
        self.stream
            .write_all(format!("{request}\n").as_bytes())
            .with_context(|| format!("asking '{request}'"))?;
        let mut line = String::new();
        let read = self.answers.read_line(&mut line).with_context(|| format!("no answer to '{request}'"))?;
        ensure!(read > 0, "the agent closed the connection at '{request}'");
        Answer::parse(&line).map_err(|error| anyhow!("'{request}': {error}"))
    }

    /// A number from the answer to one line.
    pub(crate) fn number(answer: &Answer, field: &str) -> anyhow::Result<i64> {
        answer.number(field).map_err(anyhow::Error::msg)
    }
}

/// One connection on which a numbered line goes and comes back all the time. It may break at no time.
#[derive(Debug)]
pub(crate) struct Session {
    shared: Arc<SessionShared>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

#[derive(Debug, Default)]
struct SessionShared {
    stop: AtomicBool,
    echoes: AtomicU64,
    longest_us: AtomicU64,
}

impl Session {
    /// Starts it inside `client`.
    pub(crate) fn start(client: &Namespace, clock: LabClock) -> anyhow::Result<Self> {
        let mut agent = Agent::connect(client)?;
        let shared = Arc::new(SessionShared::default());
        let kept = Arc::clone(&shared);
        let thread = client.start_thread("session", move || {
            while !kept.stop.load(Ordering::SeqCst) {
                let number = kept.echoes.load(Ordering::SeqCst);
                let asked_us = clock.now_us();
                let answer = agent.ask(&format!("echo {number}"))?;
                ensure!(
                    answer.note() == number.to_string(),
                    "echo {number} came back as '{}'",
                    answer.note()
                );
                kept.longest_us.fetch_max(clock.now_us() - asked_us, Ordering::SeqCst);
                kept.echoes.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// How many lines have come back.
    pub(crate) fn echoes(&self) -> u64 {
        self.shared.echoes.load(Ordering::SeqCst)
    }

    /// Ends it: how many lines came back and the longest that one took, in milliseconds, or why it broke.
    pub(crate) fn stop(mut self) -> anyhow::Result<(u64, u64)> {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join().map_err(|_| anyhow!("its thread panicked"))?;
            ended.context("the TCP session broke")?;
        }
        Ok((self.echoes(), self.shared.longest_us.load(Ordering::SeqCst) / 1000))
    }
}
