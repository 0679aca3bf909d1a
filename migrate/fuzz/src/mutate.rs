//! Bending inputs: bytes changed, moved, doubled, cut, numbers at their ends, and two inputs made into one.

use rand::RngExt;

/// Numbers at which lengths and counts go wrong.
pub const ENDS: [u64; 12] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_ffff,
];

/// The longest input that is made.
pub const INPUT_BYTES_MAX: usize = 64 << 10;

/// Bends `input` once or a few times; `other` lends what it has.
pub fn bend(input: &mut Vec<u8>, other: &[u8], random: &mut impl RngExt) {
    for _ in 0..=random.random_range(0..4u8) {
        let at = random.random_range(0..=input.len());
        match random.random_range(0..9u8) {
            0 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte ^= 1 << random.random_range(0..8u8);
                }
            }
            1 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte = random.random();
                }
            }
            2 => input.insert(at, random.random()),
            3 => {
                let end = (at + random.random_range(0..32usize)).min(input.len());
                input.drain(at..end);
            }
            4 => {
                let end = (at + random.random_range(0..64usize)).min(input.len());
                let part = input[at..end].to_vec();
                input.splice(at..at, part);
            }
            5 => {
                let number = ENDS[random.random_range(0..ENDS.len())].to_le_bytes();
                let bytes = [1, 2, 4, 8][random.random_range(0..4usize)];
                input.iter_mut().skip(at).zip(&number[..bytes]).for_each(|(byte, new)| *byte = *new);
            }
            6 => {
                let from = random.random_range(0..=other.len());
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            7 => {
                let from = random.random_range(0..=other.len());
                input.splice(at..at, other[from..].iter().copied().take(256));
            }
            _ => input.truncate(at),
        }
    }
    input.truncate(INPUT_BYTES_MAX);
}

/// So many bytes of nothing in particular.
pub fn noise(random: &mut impl RngExt) -> Vec<u8> {
    let count = random.random_range(0..600usize);
    (0..count).map(|_| random.random()).collect()
}
