//! Settings that only some engines know: how many streams, checking, and what holds guest memory.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How many connections carry pages: a number, or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "give a number of streams, or \"auto\"")]
pub enum Streams {
    /// So many.
    Fixed(u16),
    /// As many as the engine sees fit.
    ByEngine(Auto),
}

/// The word for what an engine decides itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Auto {
    /// As the engine sees fit.
    Auto,
}

impl Streams {
    /// As many as the engine sees fit.
    pub const AUTO: Self = Self::ByEngine(Auto::Auto);

    /// The number, unless the engine chooses it.
    #[must_use]
    pub fn fixed(self) -> Option<u16> {
        match self {
            Self::Fixed(count) => Some(count),
            Self::ByEngine(Auto::Auto) => None,
        }
    }
}

impl From<u16> for Streams {
    fn from(count: u16) -> Self {
        Self::Fixed(count)
    }
}

impl fmt::Display for Streams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(count) => count.fmt(f),
            Self::ByEngine(Auto::Auto) => f.write_str("auto"),
        }
    }
}

/// What holds the guest's memory on its hosts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryBacking {
    /// Anonymous memory of the VMM alone.
    #[default]
    Private,
    /// A memfd, which other processes can map.
    Shared,
    /// Memory from the host's pool of huge pages.
    Hugepages,
}

impl MemoryBacking {
    /// Its word in suites and tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Private => "private",
            Self::Shared => "shared",
            Self::Hugepages => "hugepages",
        }
    }
}
