//! The engines as figures show them: each has one colour and one mark in all figures of a report.
//!
//! Engines of a kind share a family of colours (ferry cool, QEMU warm, Cloud Hypervisor green, bare TCP grey), so that kinds can be
//! told apart at a glance and by the colour-blind, to whom blue and orange differ. Members of a family differ in
//! lightness and in their mark. The colours themselves are in the page's style, for light and dark.

use std::collections::BTreeMap;

use crate::results::Results;
use crate::scenario::EngineKind;

/// Colours that each family has in the page's style.
const FAMILY_COLOURS: usize = 4;

/// The outline of a mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// A disc.
    Circle,
    /// A square on its side.
    Square,
    /// A square on its corner.
    Diamond,
    /// A triangle, point up.
    Up,
    /// A triangle, point down.
    Down,
    /// An upright cross.
    Cross,
}

impl Mark {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Circle, Self::Square, Self::Diamond, Self::Up, Self::Down, Self::Cross];
}

/// How one engine is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Look {
    /// The class that has its colour.
    pub class: String,
    /// Its mark.
    pub mark: Mark,
}

/// The engines of a report with their looks.
#[derive(Debug, Clone, Default)]
pub struct Cast {
    looks: BTreeMap<String, Look>,
    order: Vec<String>,
}

impl Cast {
    /// A look for each engine of `results`, plain names of a family first.
    #[must_use]
    pub fn of(results: &Results) -> Self {
        let mut cast = Self::default();
        for kind in [EngineKind::Ferry, EngineKind::Qemu, EngineKind::CloudHypervisor, EngineKind::Tcp] {
            let mut members: Vec<&str> = results
                .engines
                .iter()
                .filter(|engine| engine.kind == kind)
                .map(|engine| engine.name.as_str())
                .collect();
            // `qemu` before `qemu-multifd`, whatever order the suite has.
            members.sort_by_key(|name| name.contains('-'));
            for (index, name) in members.into_iter().enumerate() {
                let class = format!("{}{}", family(kind), index % FAMILY_COLOURS);
                let mark = Mark::ALL[index % Mark::ALL.len()];
                cast.looks.insert(name.to_owned(), Look { class, mark });
                cast.order.push(name.to_owned());
            }
        }
        cast
    }

    /// The look of `engine`; one without colour if the results do not list it.
    #[must_use]
    pub fn look(&self, engine: &str) -> Look {
        self.looks.get(engine).cloned().unwrap_or(Look { class: "x0".to_owned(), mark: Mark::Circle })
    }

    /// The engines in the order of legends: by family, plain names first.
    pub fn order(&self) -> impl Iterator<Item = &str> {
        self.order.iter().map(String::as_str)
    }

    /// Where `engine` stands in that order.
    #[must_use]
    pub fn rank(&self, engine: &str) -> usize {
        self.order.iter().position(|name| name == engine).unwrap_or(self.order.len())
    }
}

fn family(kind: EngineKind) -> char {
    match kind {
        EngineKind::Ferry => 'f',
        EngineKind::Qemu => 'q',
        EngineKind::CloudHypervisor => 'c',
        EngineKind::Tcp => 't',
    }
}
