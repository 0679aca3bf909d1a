//! `ferry resolve`: the operator decides what becomes of a VM whose handover is in doubt.
//!
//! Where the process with the paused guest lives, it is asked; where it is gone, the records that it left are decided. What
//! they prove wrong is refused.

use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use ferry_migrate::ports::RecordStore;
use ferry_migrate::protocol::VmName;
use ferry_migrate::protocol::record::{Record, Standing};
use ferry_migrate::protocol::source::Resolution;
use ferry_migrate::records::RecordFileError;
use hyper::Method;

use super::{err, out};
use crate::api::{self, Decision, MigrationEvent, ResolveRequest, VmInfo, VmState};
use crate::cli::ResolveArgs;
use crate::client;
use crate::state_dir::StateDir;

const RESUME_RISK: &str = "If its target runs the VM, or still comes to run it, there will be TWO of it: both answer at its \
     addresses, and both write to what they share. Be sure that the target host is down for good, or that 'ferry info' there \
     shows that it does not have the VM.";

/// How long a decision may take to be carried out. A witness that is within reach answers sooner.
const DECISION_PATIENCE: Duration = Duration::from_secs(12);

const DISCARD_RISK: &str = "The guest's memory on this host is let go of. If its target does not run the VM, it is LOST with \
     all that was in its memory. Be sure that 'ferry info' on the target shows it running.";

pub(crate) async fn run(args: ResolveArgs) -> anyhow::Result<ExitCode> {
    let state = StateDir::from_environment()?;
    let decision = match (args.resume, args.without_witness) {
        (true, true) => Decision::ResumeWithoutWitness,
        (true, false) => Decision::Resume,
        (false, _) => Decision::Discard,
    };
    match client::call::<VmInfo>(&state, &args.name, Method::GET, api::VM).await {
        Ok(info) => at_process(&args, &state, &info, decision).await,
        Err(error) => at_records(&args, &state, decision).map_err(|refused| refused.unwrap_or(error)),
    }
}

/// The process that has the paused guest decides by what it knows.
async fn at_process(
    args: &ResolveArgs,
    state: &StateDir,
    info: &VmInfo,
    decision: Decision,
) -> anyhow::Result<ExitCode> {
    if info.state == VmState::InDoubt {
        confirm(args, info.note.as_deref().unwrap_or_default(), decision)?;
    }
    let request = ResolveRequest { decision };
    client::tell_with(state, &args.name, Method::PUT, api::RESOLVE, Some(&request)).await?;
    let mut events =
        client::events(state, &args.name, Method::GET, api::MIGRATION_EVENTS, None::<&()>).await?;
    let last = async {
        loop {
            match events.next().await? {
                Some(event) if event.is_last() => return Ok(event),
                Some(_) => {}
                None => bail!("the process that hosts '{}' ended meanwhile", args.name),
            }
        }
    };
    let Ok(last) = tokio::time::timeout(DECISION_PATIENCE, last).await else { bail!("{}", undecided(args, info)) };
    let last = last?;
    let (state, text, decided) = match (last, decision) {
        (MigrationEvent::LetGo { reason }, Decision::Discard) => ("let-go", reason, true),
        (MigrationEvent::Failed { reason }, Decision::Resume | Decision::ResumeWithoutWitness) => {
            ("resumed", reason, true)
        }
        // Somebody else was faster: the target has answered, or the witness has.
        (MigrationEvent::Moved(report), _) => {
            ("moved", format!("it runs on {} now, which has just been heard", report.host), args.discard)
        }
        (MigrationEvent::Failed { reason }, Decision::Discard) => ("resumed", reason, false),
        (other, _) => bail!("an unexpected end: {other:?}"),
    };
    say(args, state, &text);
    Ok(if decided { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Why nothing has come of the decision yet.
fn undecided(args: &ResolveArgs, info: &VmInfo) -> String {
    let (name, witness) = (&args.name, info.witness.as_deref().unwrap_or("none"));
    format!(
        "'{name}' is still in doubt: its witness ({witness}) does not answer, and it may yet give the target leave to run the VM. It \
         goes on being asked; make it reachable. If it is lost for good, and the target host is down or its 'ferry receive' ended, \
         'ferry resolve {name} --resume --without-witness' decides without it"
    )
}

fn say(args: &ResolveArgs, state: &str, text: &str) {
    if args.output.json {
        out(serde_json::json!({ "name": args.name.as_str(), "state": state, "note": text }));
    } else {
        out(format_args!("{}: {state} ({text})", args.name));
    }
}

/// Has the operator say that it is meant.
fn confirm(args: &ResolveArgs, what: &str, decision: Decision) -> anyhow::Result<()> {
    if args.yes {
        return Ok(());
    }
    let risk = match decision {
        Decision::Resume | Decision::ResumeWithoutWitness => RESUME_RISK,
        Decision::Discard => DISCARD_RISK,
    };
    if !std::io::stdin().is_terminal() {
        bail!("{risk} Say --yes if that is so");
    }
    err(format_args!("'{}': {what}\n\n{risk}\n", args.name));
    let mut prompt = std::io::stderr();
    let _ = write!(prompt, "Type the VM's name to go on: ").and_then(|()| prompt.flush());
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    if line.trim() != args.name.as_str() {
        bail!("nothing was changed");
    }
    Ok(())
}

/// No process has the guest any more: the records alone are decided. `None` for a name of which there are none.
fn at_records(
    args: &ResolveArgs,
    state: &StateDir,
    decision: Decision,
) -> Result<ExitCode, Option<anyhow::Error>> {
    let records = state.records(&args.name);
    let each = records.each().map_err(|error| Some(error.into()))?;
    if each.is_empty() {
        return Err(None);
    }
    decide_records(args, state, each, decision.into(), decision).map_err(Some)
}

fn decide_records(
    args: &ResolveArgs,
    state: &StateDir,
    each: Vec<Result<Record, RecordFileError>>,
    resolution: Resolution,
    decision: Decision,
) -> anyhow::Result<ExitCode> {
    // Nobody may start it meanwhile.
    let _lock = state.claim(&args.name)?;
    let records = state.records(&args.name);
    let open = |record: &Result<Record, RecordFileError>| match record {
        Ok(record) => record.in_doubt() || matches!(record.standing, Standing::Receiving { .. }),
        Err(_) => true,
    };
    let (open, closed): (Vec<_>, Vec<_>) = each.into_iter().partition(open);
    if open.is_empty() {
        // What the records prove is said of the newest.
        let newest = closed.into_iter().flatten().max_by_key(|record| record.epoch);
        let newest = newest.context("a record has vanished")?;
        newest.resolved(resolution)?;
    }
    let what = open.iter().map(in_words).collect::<Vec<_>>().join("; ");
    // What the records refuse is refused before anybody is asked.
    let decided: Vec<_> = open
        .into_iter()
        .map(|record| match record {
            Ok(record) => Ok(Ok(record.resolved(resolution)?)),
            Err(RecordFileError::Damaged { path, .. }) if decision == Decision::Discard => Ok(Err(path)),
            Err(error) => {
                Err(anyhow!(error).context("a record that can't be read is no leave to resume anything"))
            }
        })
        .collect::<anyhow::Result<_>>()?;
    confirm(args, &what, decision)?;
    for record in decided {
        match record {
            Ok(record) => {
                records.store(&record).map_err(|error| anyhow!(error))?;
                say(args, record.standing.word(), &format!("epoch {}, by your decision", record.epoch));
            }
            Err(path) => {
                let aside = records.set_aside(&path)?;
                say(args, "set-aside", &format!("the damaged record is {} now", aside.display()));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn in_words(record: &Result<Record, RecordFileError>) -> String {
    match record {
        Ok(record) => match &record.standing {
            Standing::Committed { target } => {
                format!("epoch {} was handed to {target}, which may run it", record.epoch)
            }
            Standing::Receiving { source } => {
                format!("epoch {} was coming from {source} and has not run here", record.epoch)
            }
            Standing::Released { target } => format!("epoch {} runs at {target}", record.epoch),
            Standing::Running | Standing::Discarded | Standing::Stopped => {
                format!("epoch {} is {} here", record.epoch, record.standing.word())
            }
        },
        Err(error) => format!("{:#}", anyhow!("{error}")),
    }
}

/// What the records of a VM without a process say of it, if they leave anything in doubt.
pub(crate) fn info_of_records(state: &StateDir, name: &VmName) -> anyhow::Result<Option<VmInfo>> {
    let each = state.records(name).each()?;
    let doubtful = |record: &&Result<Record, RecordFileError>| record.as_ref().map_or(true, Record::in_doubt);
    let Some(doubt) = each.iter().find(doubtful) else { return Ok(None) };
    let note = format!(
        "{}; its process is gone. 'ferry resolve {name} --discard' ends the doubt, once you know what has become of it",
        in_words(doubt)
    );
    let record = doubt.as_ref().ok();
    Ok(Some(VmInfo {
        name: name.to_string(),
        state: VmState::InDoubt,
        pid: 0,
        id: record.map(|record| record.vm.to_string()),
        epoch: record.map(|record| record.epoch.number()),
        memory_bytes: None,
        memory_kind: None,
        cpus: None,
        cpu_profile: None,
        cpu_leaks: Vec::new(),
        network: None,
        terminal: None,
        witness: None,
        listen: None,
        refused_system_calls: Vec::new(),
        turned_away: None,
        note: Some(note),
    }))
}
