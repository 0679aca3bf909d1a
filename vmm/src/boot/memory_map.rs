//! What the guest is told about its memory, whichever way it boots.

use super::{BASE_MEMORY_END, HIGH_MEMORY};
use crate::memory::GuestRam;

/// A range of guest-physical addresses. What is in none is free for devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) bytes: u64,
    pub(super) kind: Kind,
}

/// What a range is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The guest's to use.
    Ram,
    /// Memory that holds the firmware's tables.
    Reserved,
}

/// The ranges in order.
pub(super) fn of(ram: &GuestRam) -> Vec<Range> {
    let mut map = vec![
        Range { start: 0, bytes: BASE_MEMORY_END, kind: Kind::Ram },
        Range { start: BASE_MEMORY_END, bytes: HIGH_MEMORY - BASE_MEMORY_END, kind: Kind::Reserved },
    ];
    for region in ram.regions() {
        let start = region.gpa.max(HIGH_MEMORY);
        map.push(Range { start, bytes: region.gpa + region.bytes - start, kind: Kind::Ram });
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Backing, MemoryConfig};
    use crate::memory::{LOW_MEMORY_END, allocate};

    #[test]
    fn the_map_covers_memory_once_and_reserves_the_firmwares_part() {
        let memory = MemoryConfig::new(LOW_MEMORY_END + (1 << 20), Backing::PrivateAnonymous);
        let map = of(&allocate(&memory).unwrap());
        let rows: Vec<_> = map.iter().map(|range| (range.start, range.bytes, range.kind)).collect();
        assert_eq!(
            rows,
            [
                (0, 0x9_fc00, Kind::Ram),
                (0x9_fc00, 0x6_0400, Kind::Reserved),
                (1 << 20, (3 << 30) - (1 << 20), Kind::Ram),
                (4 << 30, 1 << 20, Kind::Ram)
            ]
        );
    }
}
