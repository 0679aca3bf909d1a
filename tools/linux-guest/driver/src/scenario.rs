//! What one guest goes through: boot, then load by load a handful of migrations, then off.

use std::fs::File;
use std::time::Duration;

use anyhow::{Context, ensure};
use ferry_lab::http::fetch_when_served;
use ferry_lab::network::lab::VM_IPV4;
use ferry_lab::{ExpectedBody, HttpLoad, HttpTarget, Lab, LabClock};
use ferry_linux_guest_programs::blocks::{self, Layout};
use ferry_linux_guest_programs::lines::Answer;

use crate::agent::{Agent, Session};
use crate::guest::{Guest, Images, Variant};
use crate::wall_clock::Ahead;

/// How long a load works before, between and after migrations.
const PAUSE: Duration = Duration::from_secs(2);

/// How long one HTTP request may take: it takes 0.3 s where ring 0 is interpreted, and a hundred times that on a machine
/// whose processors are busy elsewhere. An answer that was lost, or a connection that broke, is an error either way.
const HTTP_TIMEOUT: Duration = Duration::from_secs(120);

/// The most by which CLOCK_MONOTONIC may jump against the counter.
const JUMP_NS_MAX: i64 = 1_000_000;

/// How many writers the disk load has.
const WRITERS: u64 = 4;

/// What a load is started with.
const LOADS: [(&str, &str); 3] = [
    ("memory", "memory start mib=8 rate=1000"),
    ("clock", "clock start"),
    ("disk", "disk start writers=4 run=1"),
];

/// How it went.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) migrations: u32,
    pub(crate) errors: Vec<String>,
}

impl Outcome {
    /// It did not get anywhere.
    pub(crate) fn failed(why: &str) -> Self {
        Self { migrations: 0, errors: vec![why.to_owned()] }
    }
}

/// Everything about one guest under test.
struct Scenario<'a> {
    lab: &'a Lab,
    clock: LabClock,
    name: &'static str,
    guest: Guest<'a>,
    outcome: Outcome,
}

/// Runs it all.
pub(crate) fn run(
    lab: &Lab,
    images: &Images,
    variant: Variant,
    clock: LabClock,
    migrations_each: u32,
) -> Outcome {
    let name = variant.name();
    let guest = match Guest::start(lab, images, variant) {
        Ok(guest) => guest,
        Err(error) => return Outcome::failed(&format!("{name}: {error:#}")),
    };
    let mut scenario = Scenario { lab, clock, name, guest, outcome: Outcome::default() };
    if let Err(error) = scenario.all(images, migrations_each) {
        scenario.error(format!("{error:#}"));
        println!("{name}: the end of its console:\n{}", scenario.guest.console());
    }
    scenario.outcome
}

impl Scenario<'_> {
    fn all(&mut self, images: &Images, migrations_each: u32) -> anyhow::Result<()> {
        let mut agent = self.guest.until_up(self.lab, self.clock)?;
        self.say("booted");
        let web = HttpTarget::new((VM_IPV4, 80).into(), "/file");
        let web = web.expecting(ExpectedBody::Exactly(images.web_file()?.into())).within(HTTP_TIMEOUT);
        fetch_when_served(&self.lab.client, self.clock, &web, HTTP_TIMEOUT)?;
        let session = Session::start(&self.lab.client, self.clock)?;
        let requests = HttpLoad::start(&self.lab.client, self.clock, web, 1)?;
        let wall_clock = Ahead::measure(&mut agent, self.clock)?;
        for (load, start) in LOADS {
            agent.ask(start)?;
            self.move_about(&mut agent, load, migrations_each, wall_clock)?;
            let report = agent.ask(&format!("{load} stop"))?;
            self.judge(load, &report)?;
        }
        match session.stop() {
            Ok((echoes, longest_ms)) => {
                self.say(&format!("TCP session: {echoes} lines, the longest took {longest_ms} ms"));
                ensure!(echoes > 0, "the TCP session carried nothing");
            }
            Err(error) => self.error(format!("{error:#}")),
        }
        let http = requests.stop();
        self.say(&format!("HTTP: {} requests, {} failed", http.ok, http.failed));
        if http.failed > 0 || http.ok == 0 {
            self.error(format!("HTTP: {} requests, failures {:?}", http.ok, http.failures));
        }
        self.guest.end()
    }

    /// Migrates it there and back, with the load and the clients at work.
    fn move_about(
        &mut self,
        agent: &mut Agent,
        load: &str,
        migrations: u32,
        wall_clock: Ahead,
    ) -> anyhow::Result<()> {
        for number in 1..=migrations {
            std::thread::sleep(PAUSE);
            let report = self.guest.migrate()?;
            self.outcome.migrations += 1;
            let answer = agent.ask(&format!("{load} report"))?;
            let now = Ahead::measure(agent, self.clock)?;
            let apart_ms = now.apart_ns(wall_clock) as f64 / 1e6;
            self.say(&format!(
                "{load} {number}: downtime {} ms; wall clock {:.1} to {:.1} ms ahead; {answer}",
                report["downtime_ms"],
                now.least_ns as f64 / 1e6,
                now.most_ns as f64 / 1e6
            ));
            if !now.agrees_with(wall_clock) {
                self.error(format!("{load}: after migration {number} the wall clock is {apart_ms} ms off"));
            }
        }
        std::thread::sleep(PAUSE);
        Ok(())
    }

    /// Counts what a load has found.
    fn judge(&mut self, load: &str, report: &Answer) -> anyhow::Result<()> {
        self.say(&format!("{load}: {report}"));
        let number = |field: &str| Agent::number(report, field);
        let errors = number("errors")?;
        if errors > 0 {
            self.error(format!("{load}: {errors} errors, the first: {}", report.note()));
        }
        match load {
            "memory" => ensure!(number("written")? > 0, "the memory load did nothing: {report}"),
            "clock" => {
                ensure!(number("readings")? > 0, "the clock load did nothing: {report}");
                for field in ["jump_ns_max", "apart_ns_max"] {
                    if number(field)? > JUMP_NS_MAX {
                        self.error(format!("clocks: {field} is above {JUMP_NS_MAX}: {report}"));
                    }
                }
            }
            _ => self.read_image(report)?,
        }
        Ok(())
    }

    /// Reads the disk's image on the host, which has to hold what the guest wrote.
    fn read_image(&mut self, report: &Answer) -> anyhow::Result<()> {
        let image = File::open(self.guest.disk()).context("the disk's image")?;
        let layout = Layout::new(image.metadata()?.len(), WRITERS).context("the disk is too small")?;
        for writer in 0..WRITERS {
            let steps = Agent::number(report, &format!("steps{writer}"))?;
            ensure!(steps > 0, "writer {writer} did nothing: {report}");
            let (_, wrong) = blocks::read_back(&image, layout, 1, writer, u64::try_from(steps)?)?;
            wrong.iter().for_each(|wrong| self.error(format!("on the host: {wrong}")));
        }
        Ok(())
    }

    fn error(&mut self, what: String) {
        let error = format!("{}: {what}", self.name);
        println!("{error}");
        self.outcome.errors.push(error);
    }

    fn say(&self, what: &str) {
        println!("[{:>5.0} s] {}: {what}", self.clock.now().as_secs_f64(), self.name);
    }
}
