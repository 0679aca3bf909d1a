//! What all loads have in common: a thread or more that works until told to stop, and a count of what was wrong.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::Context;

/// How many errors of a load the console shows.
const ERRORS_SHOWN_MAX: u64 = 20;

/// Counts what a load finds wrong, keeps the first and prints the first few.
#[derive(Debug, Default)]
pub(crate) struct Errors {
    count: AtomicU64,
    first: Mutex<Option<String>>,
}

impl Errors {
    /// Takes note of something wrong.
    pub(crate) fn note(&self, what: String) {
        if self.count.fetch_add(1, Ordering::SeqCst) < ERRORS_SHOWN_MAX {
            println!("guest-agent: {what}");
        }
        self.first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(what);
    }

    /// How much was wrong.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    /// What was wrong first, or nothing.
    pub(crate) fn first(&self) -> String {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_default()
    }
}

/// Threads that end once they are told to.
#[derive(Debug)]
pub(crate) struct Workers {
    stop: &'static AtomicBool,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts one thread for each of `works`, which are given the word to stop.
    ///
    /// # Errors
    /// That the kernel has no room for a thread.
    pub(crate) fn start<W>(name: &str, works: impl IntoIterator<Item = W>) -> anyhow::Result<Self>
    where
        W: FnOnce(&AtomicBool) + Send + 'static,
    {
        // A few bytes for every start of a load, of which a test makes a handful.
        let stop: &'static AtomicBool = Box::leak(Box::default());
        let start = |work: W| {
            let thread = thread::Builder::new().name(name.into()).spawn(move || work(stop));
            thread.with_context(|| format!("no thread for {name}"))
        };
        let threads = works.into_iter().map(start).collect::<anyhow::Result<_>>()?;
        Ok(Self { stop, threads })
    }

    /// Tells all to stop and waits until they have. A thread that panicked is an error.
    pub(crate) fn stop(self, errors: &Errors) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads {
            if thread.join().is_err() {
                errors.note("a thread of a load has panicked".into());
            }
        }
    }
}

/// The words `name=value` of a request.
#[derive(Debug)]
pub(crate) struct Options(HashMap<String, String>);

impl Options {
    /// Reads them.
    ///
    /// # Errors
    /// Which word is none.
    pub(crate) fn parse(line: &str) -> anyhow::Result<Self> {
        let words = ferry_linux_guest_programs::lines::words(line).map_err(anyhow::Error::msg)?;
        Ok(Self(words.into_iter().collect()))
    }

    /// The number given as `name`, or `default`.
    ///
    /// # Errors
    /// What stands there instead.
    pub(crate) fn number(&self, name: &str, default: u64) -> anyhow::Result<u64> {
        self.0
            .get(name)
            .map_or(Ok(default), |text| text.parse().with_context(|| format!("'{name}={text}' is no number")))
    }

    /// The text given as `name`, or `default`.
    pub(crate) fn text(&self, name: &str, default: &str) -> String {
        self.0.get(name).cloned().unwrap_or_else(|| default.to_owned())
    }
}
