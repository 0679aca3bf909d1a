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
    /// Pages may travel as zstd frames.
    pub const ZSTD: Self = Self(1 << 4);
    /// Pages may travel as the blocks of them that have changed.
    pub const DELTA: Self = Self(1 << 5);
    /// The target measures its record anew when asked ([`crate::message::Rehearse`]).
    pub const REHEARSAL: Self = Self(1 << 8);
    /// No digest of memory is taken or compared. A source offers this only where its operator asked for it, so both
    /// having it is an agreement.
    pub const UNVERIFIED: Self = Self(1 << 9);
    /// Guest memory may be handed over as a descriptor: only where source and target are processes of one host, so it
    /// is not in [`Features::OURS`] and is offered on connections that can carry descriptors.
    pub const HAND_OVER: Self = Self(1 << 10);
    /// From `Describe` to the commit the source pings at least once a second and the target answers, so that each notices
    /// when the other has fallen silent.
    pub const KEEPALIVE: Self = Self(1 << 16);
    /// A migration whose connections break before the commit may be taken up where it was ([`crate::message::Resume`]). A
    /// source offers this only if its operator wants it to reconnect.
    pub const RESUMPTION: Self = Self(1 << 17);
    /// Each data stream proves that it belongs to the migration ([`crate::message::Admit`]). A target that wants proof takes
    /// no streams of a source without this.
    pub const ADMISSION: Self = Self(1 << 18);
    /// The sender has a witness: offered only where one is configured, and both must have it or neither. Which one it is
    /// the source says in [`crate::Message::Witness`].
    pub const WITNESS: Self = Self(1 << 20);
    /// All that this crate can do on any connection.
    pub const OURS: Self = Self::LZ4
        .and(Self::ZSTD)
        .and(Self::DELTA)
        .and(Self::REHEARSAL)
        .and(Self::UNVERIFIED)
        .and(Self::KEEPALIVE)
        .and(Self::RESUMPTION)
        .and(Self::ADMISSION);

    /// All of either.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

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

    /// This set without what is in `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// As the wire has it: one bit each.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
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
