//! Answers requests over TCP, one thread a connection.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, bail};
use ferry_linux_guest_programs::AGENT_PORT;
use ferry_linux_guest_programs::lines::{Answer, LINE_BYTES_MAX};

use crate::clock::{self, Clock};
use crate::disk::Disk;
use crate::loads::Options;
use crate::memory::Memory;
use crate::power;

/// The loads under way.
#[derive(Debug, Default)]
struct Loads {
    memory: Mutex<Option<Memory>>,
    clock: Mutex<Option<Clock>>,
    disk: Mutex<Option<Disk>>,
}

/// Serves until the machine is switched off.
///
/// # Errors
/// That the port can't be had.
pub(crate) fn forever() -> anyhow::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, AGENT_PORT)).context("the agent's port")?;
    println!("guest-agent: ready");
    let loads = Arc::new(Loads::default());
    for stream in listener.incoming() {
        let loads = Arc::clone(&loads);
        std::thread::spawn(move || {
            if let Err(error) = stream.map_err(Into::into).and_then(|stream| converse(stream, &loads)) {
                println!("guest-agent: {error:#}");
            }
        });
    }
    Ok(())
}

fn converse(stream: TcpStream, loads: &Loads) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let mut answers = stream.try_clone()?;
    let mut requests = BufReader::new(stream);
    let mut line = String::new();
    loop {
        line.clear();
        if requests.by_ref().take(LINE_BYTES_MAX).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let answer = match loads.answer(line.trim_end()) {
            Ok(answer) => format!("{answer}\n"),
            Err(error) => format!("error {error:#}\n").replace("\r", " "),
        };
        answers.write_all(answer.as_bytes())?;
    }
}

impl Loads {
    fn answer(&self, line: &str) -> anyhow::Result<Answer> {
        let (what, rest) = line.split_once(' ').unwrap_or((line, ""));
        match what {
            "echo" => return Ok(Answer::default().noting(rest)),
            "now" => return clock::now(),
            "poweroff" => power::off(),
            "reboot" => power::restart(),
            "memory" => return run(&self.memory, rest, Memory::start, Memory::report, Memory::stop),
            "clock" => return run(&self.clock, rest, Clock::start, Clock::report, Clock::stop),
            "disk" => return run(&self.disk, rest, Disk::start, Disk::report, Disk::stop),
            _ => bail!("'{what}' is not one of echo, now, memory, clock, disk, poweroff, reboot"),
        }
        Ok(Answer::default())
    }
}

/// Does `start key=value ..`, `report` or `stop` for one load.
fn run<L>(
    slot: &Mutex<Option<L>>,
    line: &str,
    start: impl FnOnce(&Options) -> anyhow::Result<L>,
    report: impl FnOnce(&L) -> Answer,
    stop: impl FnOnce(L) -> Answer,
) -> anyhow::Result<Answer> {
    let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
    let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
    match (verb, slot.take()) {
        ("start", None) => *slot = Some(start(&Options::parse(rest)?)?),
        ("report", Some(load)) => return Ok(report(slot.insert(load))),
        ("stop", Some(load)) => return Ok(stop(load)),
        ("start", Some(load)) => {
            *slot = Some(load);
            bail!("it is running already");
        }
        ("report" | "stop", None) => bail!("it is not running"),
        (_, load) => {
            *slot = load;
            bail!("'{verb}' is not one of start, report, stop");
        }
    }
    Ok(Answer::default())
}
