//! Every transition of both cores as a table: in each phase, at each step, each kind of event, and what comes of it.
//!
//! Read a group as: *any of these events* `->` *the phase afterwards*`:` *what is to be done*. `noted` changes only
//! what the phase remembers; `ignored` changes nothing at all.

mod source;
mod target;

use std::fmt::{Debug, Write as _};

/// What an event came to.
#[derive(PartialEq, Eq)]
enum Came {
    Ignored,
    Noted,
    To { phase: &'static str, actions: Vec<String> },
}

/// A core of either side, just far enough alike to be put into a table.
trait Core: Debug {
    type Event: Clone;
    fn phase(&self) -> &'static str;
    /// Hands the event in (a time-out at its time) and gives the actions that come of it.
    fn take(&mut self, event: Self::Event) -> Vec<String>;
}

/// The part of the table for a core that `make` brings to a step.
fn part<C: Core>(step: &str, make: impl Fn() -> C, events: &[(String, C::Event)]) -> String {
    let mut groups: Vec<(Came, Vec<&str>)> = Vec::new();
    for (name, event) in events {
        let mut core = make();
        let (phase, before) = (core.phase(), format!("{core:?}"));
        let actions = core.take(event.clone());
        let came = if phase != core.phase() || !actions.is_empty() {
            Came::To { phase: core.phase(), actions }
        } else if before == format!("{core:?}") {
            Came::Ignored
        } else {
            Came::Noted
        };
        match groups.iter_mut().find(|(known, _)| *known == came) {
            Some((_, names)) => names.push(name),
            None => groups.push((came, vec![name])),
        }
    }
    groups.sort_by_key(|(came, _)| match came {
        Came::To { .. } => 0,
        Came::Noted => 1,
        Came::Ignored => 2,
    });
    let step = format!("[{}] {step}", make().phase());
    let mut text = format!("\n{}\n", step.trim_end());
    for (came, names) in groups {
        let names = names.join(", ");
        match came {
            Came::To { phase, actions } => {
                writeln!(text, "  {names}\n    -> {phase}: {}", actions.join(", ")).unwrap();
            }
            Came::Noted => writeln!(text, "  {names}\n    -> noted").unwrap(),
            Came::Ignored => writeln!(text, "  {names}\n    -> ignored").unwrap(),
        }
    }
    text
}

/// The messages to a source that its table has not named, for the sake of completeness.
fn other_messages() -> Vec<(String, ferry_protocol::source::Event)> {
    let mut messages = source::messages_of_a_source();
    let named = ["Welcome", "FenceReached", "Prepared", "Running", "Arrived"];
    messages.extend(target::messages_of_a_target().into_iter().filter(|(name, _)| !named.contains(name)));
    messages
        .into_iter()
        .map(|(name, message)| (name.to_owned(), ferry_protocol::source::Event::Message(message)))
        .collect()
}

fn other_messages_to_target() -> Vec<(String, ferry_protocol::target::Event)> {
    target::messages_of_a_target()
        .into_iter()
        .map(|(name, message)| (name.to_owned(), ferry_protocol::target::Event::Message(message)))
        .collect()
}

const LEGEND: &str = "\
# [phase] step, then groups of events -> the phase afterwards: what is to be done.
# noted: only what the phase remembers changes. ignored: nothing changes at all.
";

#[test]
fn every_transition_of_the_source_is_as_it_was() {
    crate::files::check("transitions-source.txt", &format!("{LEGEND}{}", source::table()));
}

#[test]
fn every_transition_of_the_target_is_as_it_was() {
    crate::files::check("transitions-target.txt", &format!("{LEGEND}{}", target::table()));
}

#[test]
fn every_transition_within_one_host_is_as_it_was() {
    let (source, target) = (source::table_of_local(), target::table_of_local());
    let text = format!("{LEGEND}\n# The source.\n{source}\n# The target.\n{target}");
    crate::files::check("transitions-local.txt", &text);
}

#[test]
fn what_a_record_makes_a_target_say_is_as_it_was() {
    crate::files::check("transitions-records.txt", &format!("{LEGEND}{}", target::table_of_records()));
}
