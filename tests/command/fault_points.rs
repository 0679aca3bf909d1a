//! The program that users get has no fault points.

use crate::FERRY;

/// What a program contains that reads from its environment what shall go wrong.
const MARK: &[u8] = b"FERRY_FAULT";

#[test]
fn the_ordinary_program_knows_nothing_of_faults() {
    let bytes = std::fs::read(FERRY).unwrap();
    assert!(!bytes.windows(MARK.len()).any(|window| window == MARK), "{FERRY} has fault points");
}
