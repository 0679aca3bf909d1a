//! `ferry migrate`: asks the VM's host process to move it, and shows how that goes.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{anyhow, bail};
use ferry_migrate::report::{ForecastReport, MigrationReport, ReportKind, Round, ms};
use ferry_migrate::{Endpoint, MigrateOptions};
use hyper::Method;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};

use crate::api::{self, MigrationEvent, MigrationRequest, OnTimeoutWord, VmInfo, VmState};
use crate::cli::{MigrateArgs, OnTimeoutArg, StreamsArg, VerifyArg};
use crate::client::{self, Events};
use crate::quantity::{show_bytes, show_ms, show_rate};
use crate::security;
use crate::state_dir::StateDir;

pub(crate) async fn run(args: MigrateArgs) -> anyhow::Result<ExitCode> {
    let state = StateDir::from_environment()?;
    if args.cancel {
        client::tell(&state, &args.name, Method::DELETE, api::MIGRATION).await?;
        let mut events =
            client::events(&state, &args.name, Method::GET, api::MIGRATION_EVENTS, None::<&()>).await?;
        return follow(&args, &state, &mut events).await;
    }
    let request = request(&args)?;
    let mut events = client::events(&state, &args.name, Method::POST, api::MIGRATION, Some(&request)).await?;
    follow(&args, &state, &mut events).await
}

fn request(args: &MigrateArgs) -> anyhow::Result<MigrationRequest> {
    Ok(MigrationRequest {
        target: args.to.clone().ok_or_else(|| anyhow!("--to is missing"))?,
        downtime_ms: ms(args.downtime),
        streams: match args.streams {
            StreamsArg::Auto => MigrateOptions::streams_to_choose_from(),
            StreamsArg::Fixed(streams) => streams,
        },
        adapt_streams: args.streams == StreamsArg::Auto,
        compress: args.compress.to_string(),
        bandwidth_bytes_per_s: args.bandwidth,
        verify: args.verify != VerifyArg::Off,
        verify_whole: args.verify == VerifyArg::Full,
        reconnect_ms: ms(args.reconnect),
        timeout_ms: ms(args.timeout),
        on_timeout: match args.on_timeout {
            OnTimeoutArg::Cancel => OnTimeoutWord::Cancel,
            OnTimeoutArg::Stop => OnTimeoutWord::Stop,
        },
        // The process that hosts the VM may stand in another folder, and know another default.
        tls_dir: security::said(args.security.tls.tls_dir.clone())?,
        insecure: args.security.insecure,
    })
}

/// Shows events until the last one. Ctrl-C cancels the migration, and its end is still shown.
async fn follow(args: &MigrateArgs, state: &StateDir, events: &mut Events) -> anyhow::Result<ExitCode> {
    let mut display = Display::new(args);
    // One watch for all rounds of the loop: a signal between two of them must not be lost.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut interrupts = 0u32;
    loop {
        let event = tokio::select! {
            event = events.next() => event?,
            _ = interrupt.recv() => {
                interrupts += 1;
                if interrupts > 1 {
                    bail!("left; the migration of '{}' goes on as 'ferry info {}' shows", args.name, args.name);
                }
                display.say("cancelling; press Ctrl-C again to leave it to itself");
                client::tell(state, &args.name, Method::DELETE, api::MIGRATION).await?;
                continue;
            }
        };
        let Some(event) = event else {
            bail!("the process that hosts '{}' ended in the middle of the migration", args.name);
        };
        display.show(&event);
        match event {
            // It would be waited for until the target answers, which may be never.
            MigrationEvent::InDoubt { .. } if args.cancel => bail!(
                "it is too late to cancel: the handover is recorded; 'ferry info {}' shows what becomes of it",
                args.name
            ),
            MigrationEvent::Moved(_) if args.cancel => bail!("it was too late: '{}' has moved", args.name),
            MigrationEvent::Moved(_) => return Ok(ExitCode::SUCCESS),
            MigrationEvent::LetGo { reason } => bail!("'{}' was let go of here: {reason}", args.name),
            MigrationEvent::Failed { .. } if args.cancel => return Ok(ExitCode::SUCCESS),
            MigrationEvent::Failed { reason } => {
                let target = args.to.as_deref().unwrap_or_default();
                bail!(
                    "'{}' was not migrated to {target} and {}: {reason}",
                    args.name,
                    left_as(state, args).await
                )
            }
            MigrationEvent::Started { .. }
            | MigrationEvent::Negotiated { .. }
            | MigrationEvent::RoundStarted { .. }
            | MigrationEvent::Transferred { .. }
            | MigrationEvent::RoundDone(_)
            | MigrationEvent::Stopping { .. }
            | MigrationEvent::Paused
            | MigrationEvent::Handed
            | MigrationEvent::Reconnecting { .. }
            | MigrationEvent::Reconnected(_)
            | MigrationEvent::InDoubt { .. }
            | MigrationEvent::Undoing { .. } => {}
        }
    }
}

/// What has become of a VM that was not migrated.
async fn left_as(state: &StateDir, args: &MigrateArgs) -> String {
    match client::call::<VmInfo>(state, &args.name, Method::GET, api::VM).await {
        Ok(VmInfo { state: VmState::Running, .. }) => "goes on here".to_owned(),
        Ok(VmInfo { state: VmState::Paused, .. }) => "is here, paused".to_owned(),
        Ok(VmInfo { state, note, .. }) => format!("is {state} here ({})", note.unwrap_or_default()),
        Err(_) => "its host process has ended".to_owned(),
    }
}

/// What people see: a line a round, a bar for the round under way, and a summary.
struct Display {
    json: bool,
    bar: Option<ProgressBar>,
    /// Whether memory is handed over within this host.
    local: bool,
}

impl Display {
    fn new(args: &MigrateArgs) -> Self {
        let json = args.output.json;
        let bar = (!json && std::io::stderr().is_terminal()).then(|| {
            let style = ProgressStyle::with_template("{prefix:<9} {wide_bar} {percent:>3}% {msg}")
                .expect("a constant template");
            let bar = ProgressBar::new(0).with_style(style);
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        let target = args.to.as_deref().map(str::parse);
        let local = matches!(target, Some(Ok(Endpoint::Unix(_))));
        Self { json, bar, local }
    }

    /// A line above the bar.
    fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None if self.json => eprintln!("{line}"),
            None => println!("{line}"),
        }
    }

    fn show(&mut self, event: &MigrationEvent) {
        if self.json {
            return println!("{}", serde_json::to_string(event).expect("our own types have a JSON form"));
        }
        match event {
            MigrationEvent::Started { target, memory_bytes } if self.local => {
                self.say(&format!("handing {} of memory over through {target}", show_bytes(*memory_bytes)));
            }
            MigrationEvent::Started { target, memory_bytes } => {
                self.say(&format!("migrating {} of memory to {target}", show_bytes(*memory_bytes)));
                self.say(HEADING);
            }
            MigrationEvent::Negotiated { .. } | MigrationEvent::Paused | MigrationEvent::Handed => {}
            MigrationEvent::RoundStarted { round, pages } => {
                if let Some(bar) = &self.bar {
                    bar.set_length(*pages);
                    bar.set_position(0);
                    bar.set_prefix(format!("round {round}"));
                }
            }
            MigrationEvent::Transferred { round_pages, wire_bytes } => {
                if let Some(bar) = &self.bar {
                    bar.set_position(*round_pages);
                    bar.set_message(show_bytes(*wire_bytes));
                }
            }
            MigrationEvent::RoundDone(round) => self.say(&round_line(round)),
            MigrationEvent::Stopping { pages, forecast, forced } => {
                let why = if *forced { " (the time is over, so whatever it takes)" } else { "" };
                let left = if self.local { String::new() } else { format!(" with {pages} pages left") };
                self.say(&format!(
                    "stopping the guest{left}; forecast downtime {}{why}",
                    show_forecast(forecast)
                ));
            }
            MigrationEvent::Reconnecting { reason } => {
                self.say(&format!("the link broke ({reason}); the guest runs on, reaching the target again"));
            }
            MigrationEvent::Reconnected(again) => self.say(&format!(
                "reached again after {}; {} pages of round {} had arrived, {} are to be sent",
                show_ms(again.ms),
                again.arrived_pages,
                again.round,
                again.again_pages,
            )),
            MigrationEvent::InDoubt { reason } => self.say(&format!(
                "IN DOUBT: the handover is recorded but the target can't be reached ({reason}); asking again"
            )),
            MigrationEvent::Undoing { reason } => self.say(&format!("giving up: {reason}")),
            MigrationEvent::Moved(report) => {
                self.clear();
                print!("{}", summary(report));
            }
            MigrationEvent::LetGo { .. } | MigrationEvent::Failed { .. } => self.clear(),
        }
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// The columns of [`round_line`].
pub(crate) const HEADING: &str =
    "round      dirty       zero        sent      time         link      dirtying   forecast downtime";

/// A round in a line.
pub(crate) fn round_line(round: &Round) -> String {
    let dirtying = match round.dirtied_pages_per_s {
        Some(rate) => show_rate(rate * 4096.0),
        None => "paused".to_owned(),
    };
    let forecast = round.forecast.as_ref().map_or_else(String::new, show_forecast);
    format!(
        "{:>5} {:>10} {:>10} {:>11} {:>9} {:>12} {:>13}   {forecast}",
        round.round,
        round.dirty_pages,
        round.zero_pages,
        show_bytes(round.wire_bytes),
        show_ms(round.ms),
        show_rate(round.link_bytes_per_s),
        dirtying,
    )
}

fn show_forecast(forecast: &ForecastReport) -> String {
    format!("{} (at most {})", show_ms(forecast.expected_ms), show_ms(forecast.upper_ms))
}

/// A finished migration for people.
pub(crate) fn summary(report: &MigrationReport) -> String {
    use std::fmt::Write as _;
    let MigrationReport { name, host, downtime_ms, downtime_budget_ms, downtime_parts: parts, .. } = report;
    let forecast = &report.forecast;
    let mut text = format!("\n'{name}' runs on {host} now (epoch {})\n\n", report.epoch);
    let mut row = |label: &str, actual: f64, forecast: f64, note: &str| {
        let _ = writeln!(text, "  {label:<12} {:>9}   {:>9}   {note}", show_ms(actual), show_ms(forecast));
    };
    row(
        "downtime",
        *downtime_ms,
        forecast.expected_ms,
        &format!("of {} allowed", show_ms(*downtime_budget_ms)),
    );
    row("  pause", parts.pause_ms, forecast.pause_ms, "");
    row("  dirty log", parts.dirty_log_ms, forecast.dirty_log_ms, "");
    row(
        "  copy",
        parts.copy_ms,
        forecast.copy_ms,
        &format!("saving the state {}", show_ms(parts.within_save_ms)),
    );
    let restore = format!(
        "waiting for the last pages {}, restoring it {}",
        show_ms(parts.within_wait_ms),
        show_ms(parts.within_restore_ms)
    );
    row("  prepare", parts.prepare_ms, forecast.prepare_ms, &restore);
    row("  record", parts.record_ms, forecast.record_ms, "");
    let target = format!(
        "record at the target {}, starting {}",
        show_ms(parts.within_target_record_ms),
        show_ms(parts.within_run_ms)
    );
    row("  commit", parts.commit_ms, forecast.commit_ms, &target);
    let _ = writeln!(text, "{:>26}{:>12}", "", "^ forecast");
    if report.kind == ReportKind::Local {
        let _ = writeln!(text, "  total        {:>9}", show_ms(report.total_ms));
        let _ = writeln!(
            text,
            "  memory       handed over: no page was copied, so there is no digest to compare"
        );
        return text;
    }
    let _ = writeln!(text, "  total        {:>9}   {} rounds", show_ms(report.total_ms), report.rounds.len());
    let _ = writeln!(text, "  sent         {:>9}   {}", show_bytes(report.wire_bytes), page_kinds(report));
    text += &link_line(report);
    for (number, stream) in report.streams.iter().enumerate() {
        let _ = writeln!(
            text,
            "  stream {number:<5} {:>9}   socket {}, encoding {}, cap {}",
            show_bytes(stream.wire_bytes),
            show_ms(ms(stream.in_socket)),
            show_ms(ms(stream.encoding)),
            show_ms(ms(stream.in_cap)),
        );
    }
    let equal = if report.digest_equal == Some(true) { "equal on both sides" } else { "DIFFERENT" };
    let digest = match &report.digest {
        Some(digest) => format!("{digest} ({equal})"),
        None => "NOT VERIFIED: nobody has compared the two memories (--verify off)".to_owned(),
    };
    let _ = writeln!(text, "  digest       {digest}");
    text
}

/// How often the link broke, if it did.
fn link_line(report: &MigrationReport) -> String {
    if report.reconnections.is_empty() {
        return String::new();
    }
    let lost_ms = report.reconnections.iter().map(|again| again.ms).sum();
    format!(
        "  link         {:>9}   until it was made again, {} times\n",
        show_ms(lost_ms),
        report.reconnections.len()
    )
}

/// How the pages of all rounds travelled, as far as there are any of a kind: `262,144 whole, 12 as deltas`.
fn page_kinds(report: &MigrationReport) -> String {
    let total = |of: fn(&Round) -> u64| report.rounds.iter().map(of).sum::<u64>();
    let kinds = [
        (total(Round::whole_pages), "whole"),
        (total(|round| round.packed_pages), "packed"),
        (total(|round| round.delta_pages), "as deltas"),
        (total(|round| round.unchanged_pages), "unchanged"),
        (total(|round| round.zero_pages), "zero"),
        (total(|round| round.untouched_pages), "never touched"),
    ];
    let said: Vec<String> =
        kinds.iter().filter(|(pages, _)| *pages > 0).map(|(pages, kind)| format!("{pages} {kind}")).collect();
    format!("pages: {}", said.join(", "))
}
