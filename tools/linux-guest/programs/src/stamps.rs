//! Pages that tell which version of which page they are, all over.
//!
//! ```text
//!   word 0        1            2 ..
//!   page number   generation   a pattern of both
//! ```
//!
//! A page that was lost, mixed up with another, brought back to an older version or changed in any bit shows.

use std::fmt;

use crate::{PAGE_WORDS, Page, fill, first_difference, spread};

/// Makes `page` generation `generation` of page `number`.
pub fn write(page: &mut Page, number: u64, generation: u64) {
    let [own_number, own_generation, pattern @ ..] = &mut page.0;
    (*own_number, *own_generation) = (number, generation);
    fill(seed(number, generation), pattern);
}

/// Checks that `page` is generation `generation` of page `number`.
///
/// # Errors
/// What it is instead.
pub fn verify(page: &Page, number: u64, generation: u64) -> Result<(), WrongPage> {
    let [found_number, found_generation, pattern @ ..] = &page.0;
    let wrong_word = first_difference(seed(*found_number, *found_generation), pattern).map(|word| word + 2);
    if (*found_number, *found_generation, wrong_word) == (number, generation, None) {
        return Ok(());
    }
    Err(WrongPage {
        number,
        generation,
        found_number: *found_number,
        found_generation: *found_generation,
        wrong_word,
    })
}

fn seed(number: u64, generation: u64) -> u64 {
    spread(number) ^ generation
}

/// A page that is not what it has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrongPage {
    /// The page's number.
    pub number: u64,
    /// The version that it has to have.
    pub generation: u64,
    /// The number that stands in it.
    pub found_number: u64,
    /// The version that stands in it.
    pub found_generation: u64,
    /// The first word that does not belong to what stands in it, if there is one.
    pub wrong_word: Option<usize>,
}

impl fmt::Display for WrongPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, generation, found_number, found_generation, wrong_word } = self;
        write!(
            f,
            "page {number} should have generation {generation} and says {found_number}/{found_generation}"
        )?;
        match wrong_word {
            Some(word) => write!(f, ", torn from word {word} of {PAGE_WORDS} on"),
            None => write!(f, ", whole"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_itself_and_nothing_else() {
        let mut page = Page::ZERO;
        write(&mut page, 7, 3);
        verify(&page, 7, 3).unwrap();
        let older = verify(&page, 7, 4).unwrap_err();
        assert_eq!((older.found_generation, older.wrong_word), (3, None));
        assert!(older.to_string().contains("says 7/3, whole"), "{older}");
        assert_eq!(verify(&page, 8, 3).unwrap_err().found_number, 7);
        for word in [0, 1, 2, 255, PAGE_WORDS - 1] {
            let mut changed = page.clone();
            changed.0[word] ^= 1 << 40;
            assert!(verify(&changed, 7, 3).is_err(), "word {word}");
        }
        assert!(verify(&Page::ZERO, 0, 0).is_err());
    }

    #[test]
    fn half_a_page_of_the_next_generation_is_torn() {
        let (mut old, mut new) = (Page::ZERO, Page::ZERO);
        write(&mut old, 1, 1);
        write(&mut new, 1, 2);
        new.0[256..].copy_from_slice(&old.0[256..]);
        assert_eq!(verify(&new, 1, 2).unwrap_err().wrong_word, Some(256));
    }
}
