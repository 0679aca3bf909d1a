//! The demo without root: no network, both hosts on loopback, a guest that dirties memory and checks itself.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use ferry_lab::LabClock;
use hyper::Method;

use super::hosts::HostProcess;
use super::result::{Demo, DemoResult};
use super::{WATCH, guest, guest_gap_ms, migrate, until_ready};
use crate::api::{self, GuestReport};
use crate::cli::DemoArgs;
use crate::client;

/// How often the guest's own counter is read.
const SAMPLE_EVERY: Duration = Duration::from_millis(20);

pub(super) async fn run(args: &DemoArgs) -> anyhow::Result<DemoResult> {
    let clock = LabClock::start();
    println!(
        "without root there is no test network: no web server, no client, no announcements, only loopback"
    );
    let folder = tempfile::tempdir()?;
    println!("starting a VM of 800 MiB that dirties 200 MiB/s on host A, and waiting for it on host B");
    let workload = "dirty rate=200 set=128 fill=512 zero=25 text=50 random=25";
    let run = ["run", "--name", super::NAME, "--guest", workload, "--memory", "800M", "--serial", "null"];
    let host_a = HostProcess::start(&run, &folder.path().join("a"), None).await?;
    let receive = ["receive", "--name", super::NAME, "--listen", "127.0.0.1:0"];
    let host_b = HostProcess::start(&receive, &folder.path().join("b"), None).await?;
    let target = host_b.first_event["address"].as_str().context("host B did not say its address")?.to_owned();
    until_ready(&host_a).await?;
    println!();

    let samples: Arc<Mutex<Vec<(f64, u64)>>> = Arc::default();
    let sampler = tokio::spawn({
        let (samples, hosts) = (Arc::clone(&samples), [host_a.state.clone(), host_b.state.clone()]);
        let name = host_a.name.clone();
        async move {
            loop {
                for state in &hosts {
                    let report: Result<GuestReport, _> =
                        client::call(state, &name, Method::GET, api::GUEST).await;
                    if let Ok(report) = report {
                        let now = (clock.now_ms(), report.pages_written);
                        samples.lock().unwrap_or_else(PoisonError::into_inner).push(now);
                        break;
                    }
                }
                tokio::time::sleep(SAMPLE_EVERY).await;
            }
        }
    });
    tokio::time::sleep(WATCH).await;
    let before = guest(&host_a).await?;
    let seen = migrate(&host_a, &target, args.downtime, clock).await?;
    tokio::time::sleep(WATCH).await;
    sampler.abort();
    let after = guest(&host_b).await?;
    let samples = rates(&samples.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(DemoResult::new(Demo {
        title: "Live migration of an 800 MiB VM that dirties 200 MiB/s",
        y_label: "memory that the guest dirtied",
        seen,
        http: None,
        guest_gap_ms: guest_gap_ms(&before, &after),
        self_check_errors: after.errors,
        samples,
    }))
}

/// MiB/s between counts of pages.
fn rates(samples: &[(f64, u64)]) -> Vec<(f64, f64)> {
    samples
        .windows(2)
        .filter_map(|pair| {
            let [(from_ms, from), (to_ms, to)] = pair else { return None };
            #[expect(clippy::cast_precision_loss, reason = "a rate for a plot")]
            let mib = to.saturating_sub(*from) as f64 / 256.0;
            (to_ms > from_ms).then(|| (*to_ms, mib / (to_ms - from_ms) * 1e3))
        })
        .collect()
}
