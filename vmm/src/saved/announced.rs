//! What a description says of the state that will follow, and whether this version can read that.

use super::sections::{self, SectionVersion, StateSections};
use super::{OPTIONAL, Section, StateError, in_words};

/// More than any version will ever have.
const SECTIONS_MAX: usize = 1024;

const NAME_CHARACTERS_MAX: usize = 64;

/// A kind of section that a state may have, in the version that is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Announced {
    kind: u16,
    version: u16,
    name: &'static str,
}

impl Announced {
    pub(crate) const fn of<S: Section>() -> Self {
        Self { kind: S::KIND, version: S::VERSION, name: S::NAME }
    }
}

impl StateSections {
    pub(crate) fn of(announced: &[Announced]) -> Self {
        let saved = |announced: &Announced| {
            let Announced { kind, version, name } = *announced;
            SectionVersion { kind, version, name: name.to_owned() }
        };
        Self { sections: announced.iter().map(saved).collect() }
    }
}

/// Whether a state with these sections could be restored here, as far as their kinds and versions tell.
///
/// # Errors
/// The first section that can't be, by its name at the source.
pub(crate) fn check_announced(announced: &StateSections) -> Result<(), StateError> {
    let StateSections { sections: all } = announced;
    if all.len() > SECTIONS_MAX {
        let what = format!("{} sections are announced", all.len());
        return Err(StateError::Invalid { section: StateSections::NAME, what });
    }
    for SectionVersion { kind, version, name } in all {
        let name: String = name.chars().filter(|c| !c.is_control()).take(NAME_CHARACTERS_MAX).collect();
        let section = in_words(Some(&name), *kind);
        let is_optional = kind & OPTIONAL != 0;
        match sections::known(*kind) {
            _ if is_optional => {}
            None => return Err(StateError::UnknownSection { section }),
            Some(known) if !(known.oldest..=known.version).contains(version) => {
                let (found, oldest, known) = (*version, known.oldest, known.version);
                return Err(StateError::SectionVersion { section, found, oldest, known });
            }
            Some(_) => {}
        }
    }
    Ok(())
}
