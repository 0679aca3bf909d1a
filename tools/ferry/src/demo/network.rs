//! The demo with everything: two hosts, a client and a switch in network namespaces, a web server under load.

use anyhow::Context;
use ferry_guest_abi::content::http_file_part;
use ferry_guest_abi::{HTTP_FILE_LEN, HTTP_FILE_PATH};
use ferry_lab::http::fetch_when_served;
use ferry_lab::network::lab::{CLIENT_IPV4, HOST_B_IPV4, TAP, VM_IPV4, VM_MAC};
use ferry_lab::{ExpectedBody, HttpLoad, HttpTarget, Lab, LabClock, SwitchPort};

use super::hosts::HostProcess;
use super::result::{Demo, DemoResult, HttpFigures};
use super::{WATCH, guest, guest_gap_ms, migrate, until_ready};
use crate::cli::DemoArgs;

/// Concurrent requests of the client.
const CONNECTIONS: usize = 8;

const PORT: u16 = 4444;

pub(super) async fn run(args: &DemoArgs) -> anyhow::Result<DemoResult> {
    let clock = LabClock::start();
    println!("making two hosts, a client and a switch in network namespaces");
    let lab = tokio::task::spawn_blocking(Lab::new).await?.context("the test network can't be made")?;
    let folder = tempfile::tempdir()?;

    println!("starting a web server in a VM of 800 MiB on host A, and waiting for it on host B");
    let net = format!("tap={TAP},mac={VM_MAC}");
    let workload = format!("http ip={VM_IPV4}/24 fill=512 zero=25 text=50 random=25");
    let run = ["run", "--name", super::NAME, "--guest", &workload, "--memory", "800M", "--net", &net];
    let run = [run.as_slice(), &["--serial", "null"]].concat();
    let host_a = HostProcess::start(&run, &folder.path().join("a"), Some(&lab.host_a)).await?;
    let listen = format!("{HOST_B_IPV4}:{PORT}");
    let net = format!("tap={TAP}");
    // Nobody else is on this network.
    let receive = ["receive", "--name", super::NAME, "--listen", &listen, "--net", &net, "--insecure"];
    let host_b = HostProcess::start(&receive, &folder.path().join("b"), Some(&lab.host_b)).await?;
    until_ready(&host_a).await?;

    let address = (VM_IPV4, 80).into();
    let length = u64::try_from(HTTP_FILE_LEN)?;
    let target = HttpTarget::new(address, HTTP_FILE_PATH).expecting(ExpectedBody::Length(length));
    let lab = std::sync::Arc::new(lab);
    {
        let (lab, target) = (std::sync::Arc::clone(&lab), target.clone());
        let patience = std::time::Duration::from_secs(20);
        tokio::task::spawn_blocking(move || fetch_when_served(&lab.client, clock, &target, patience))
            .await??;
    }

    println!(
        "loading it from the client ({CLIENT_IPV4}) with {CONNECTIONS} concurrent requests for {} KiB\n",
        HTTP_FILE_LEN / 1024
    );
    let mut file = vec![0; HTTP_FILE_LEN];
    http_file_part(0, &mut file);
    let target = target.expecting(ExpectedBody::Exactly(file.into()));
    let load = HttpLoad::start(&lab.client, clock, target, CONNECTIONS)?;
    tokio::time::sleep(WATCH).await;
    let before = guest(&host_a).await?;
    let seen = migrate(&host_a, &listen, args.downtime, clock).await?;
    tokio::time::sleep(WATCH).await;
    let http = tokio::task::spawn_blocking(move || load.stop()).await?;
    let after = guest(&host_b).await?;
    let learned = lab.vm_port(VM_MAC)? == Some(SwitchPort::HostB);

    let samples = http.timeline.samples(20).into_iter().filter(|(t_ms, _)| *t_ms >= http.start_ms).collect();
    let figures = HttpFigures {
        http_ok: http.ok,
        http_failed: http.failed,
        http_failures: http.failures.iter().map(|failure| format!("{failure:?}")).take(5).collect(),
        client_gap_ms: http.longest_data_gap.ms,
        client_connections_opened: http.connections_opened,
        switch_learned: learned,
    };
    Ok(DemoResult::new(Demo {
        title: "Live migration of an 800 MiB web server under load",
        y_label: "what the client received",
        seen,
        http: Some(figures),
        guest_gap_ms: guest_gap_ms(&before, &after),
        self_check_errors: after.errors,
        samples,
    }))
}
