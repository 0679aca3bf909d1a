//! What two sides agree on before anything moves: a protocol version and a set of features.

use serde::{Deserialize, Serialize};

use crate::wire::{VERSION_NEWEST, VERSION_OLDEST};

/// Optional abilities, one bit each. Unknown bits are ignored, so that a newer peer may offer more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Features(u64);

impl Features {
    /// Nothing optional.
    pub const NONE: Self = Self(0);
    /// Pages may travel as lz4 blocks.
    pub const LZ4: Self = Self(1 << 0);
    /// Guest memory may be handed over as a descriptor: only where source and target are processes of one host, so it
    /// is not in [`Features::OURS`] and is offered on connections that can carry descriptors.
    pub const HAND_OVER: Self = Self(1 << 8);
    /// All that this crate can do on any connection.
    pub const OURS: Self = Self(Self::LZ4.0);

    /// All that this crate can do on a connection that carries descriptors or does not.
    #[must_use]
    pub const fn ours_on(carries_descriptors: bool) -> Self {
        if carries_descriptors { Self(Self::OURS.0 | Self::HAND_OVER.0) } else { Self::OURS }
    }

    /// What both can do.
    #[must_use]
    pub const fn both(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether all of `other` is in this set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// The newest version that both a peer (speaking `oldest` to `newest`) and this crate speak.
#[must_use]
pub fn common_version(oldest: u16, newest: u16) -> Option<u16> {
    let candidate = newest.min(VERSION_NEWEST);
    (candidate >= oldest && candidate >= VERSION_OLDEST).then_some(candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_wins() {
        assert_eq!(common_version(1, 1), Some(1));
        assert_eq!(common_version(1, 900), Some(VERSION_NEWEST));
        assert_eq!(common_version(2, 3), None);
        assert_eq!(common_version(0, 0), None);
        assert_eq!(common_version(3, 1), None, "a range that is upside down has no version");
    }

    #[test]
    fn memory_is_only_handed_over_where_descriptors_travel() {
        assert!(Features::ours_on(true).contains(Features::HAND_OVER));
        assert!(!Features::ours_on(false).contains(Features::HAND_OVER));
        assert!(!Features::ours_on(true).both(Features::OURS).contains(Features::HAND_OVER));
    }

    #[test]
    fn unknown_features_are_dropped() {
        assert_eq!(Features(u64::MAX).both(Features::OURS), Features::OURS);
        assert!(!Features::NONE.contains(Features::LZ4));
    }
}
