//! Writing predictable content into pages, and checking that it is still there.
//!
//! A check counts and records; it never stops the guest. What a page must hold is `ferry_guest_abi::content`'s.

use crate::machine::{memory::Page, report};
use ferry_guest_abi::content::{FillKind, RandomWords, WORDS, text_page};
use ferry_guest_abi::report::offset;

/// Writes a whole page of random words.
pub fn write_random(page: Page, words: RandomWords) {
    for i in 0..WORDS {
        page.write(i, words.word(i));
    }
}

/// Checks a whole page of random words, except the one at `skip`.
pub fn check_random(page: Page, words: RandomWords, skip: Option<usize>) {
    report::add(offset::PAGES_CHECKED, 1);
    check(page, |i| if Some(i) == skip { page.read(i) } else { words.word(i) });
}

/// Checks one word, as the check of its page.
#[inline]
pub fn check_word(page: Page, index: usize, expected: u64) {
    report::add(offset::PAGES_CHECKED, 1);
    let found = page.read(index);
    if found != expected {
        record(page, index, expected, found);
    }
}

/// Writes filled page number `number`.
pub fn write_filled(page: Page, number: u64, kind: FillKind) {
    match kind {
        FillKind::Zero => (0..WORDS).for_each(|i| page.write(i, 0)),
        FillKind::Random => write_random(page, RandomWords::filled(number)),
        FillKind::Text => {
            let text = text_words(number);
            text.iter().enumerate().for_each(|(i, word)| page.write(i, *word));
        }
    }
}

/// Checks filled page number `number`.
pub fn check_filled(page: Page, number: u64, kind: FillKind) {
    report::add(offset::PAGES_CHECKED, 1);
    report::add(offset::FILL_CHECKED, 1);
    match kind {
        FillKind::Zero => check(page, |_| 0),
        FillKind::Random => {
            let words = RandomWords::filled(number);
            check(page, |i| words.word(i));
        }
        FillKind::Text => {
            let text = text_words(number);
            check(page, |i| text[i]);
        }
    }
}

fn text_words(number: u64) -> [u64; WORDS] {
    let mut bytes = [0; ferry_guest_abi::PAGE_SIZE];
    text_page(number, &mut bytes);
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    words
}

/// Compares all words; only the first that differs is recorded, and the page counts as one error.
#[inline]
fn check(page: Page, expected: impl Fn(usize) -> u64) {
    for i in 0..WORDS {
        let (wanted, found) = (expected(i), page.read(i));
        if found != wanted {
            record(page, i, wanted, found);
            return;
        }
    }
}

#[cold]
fn record(page: Page, index: usize, expected: u64, found: u64) {
    if report::get(offset::ERRORS) == 0 {
        report::set(offset::BAD_ADDRESS, page.address_of(index));
        report::set(offset::BAD_EXPECTED, expected);
        report::set(offset::BAD_FOUND, found);
    }
    report::add(offset::ERRORS, 1);
}
