//! A value that is compared and hashed by what it prints: the protocol's cores hold floating-point measurements and
//! can't be hashed as they are, and printing shows every field.

use std::fmt::{self, Debug, Write};
use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::sync::Arc;

use twox_hash::XxHash3_128;

/// A shared value with the digest of its `Debug` output; taking a copy is cheap.
#[derive(Clone)]
pub(crate) struct Keyed<T> {
    value: Arc<T>,
    key: u128,
}

impl<T: Debug + Clone> Keyed<T> {
    pub(crate) fn new(value: T) -> Self {
        let key = key(&value);
        Self { value: Arc::new(value), key }
    }

    /// Changes the value by `change`.
    pub(crate) fn update<R>(&mut self, change: impl FnOnce(&mut T) -> R) -> R {
        let result = change(Arc::make_mut(&mut self.value));
        self.key = key(&*self.value);
        result
    }
}

fn key(value: &impl Debug) -> u128 {
    struct Into(XxHash3_128);
    impl Write for Into {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            self.0.write(text.as_bytes());
            Ok(())
        }
    }
    let mut into = Into(XxHash3_128::new());
    write!(into, "{value:?}").expect("a digest takes everything");
    into.0.finish_128()
}

impl<T> Deref for Keyed<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> PartialEq for Keyed<T> {
    fn eq(&self, other: &Self) -> bool {
        self.key == other.key
    }
}

impl<T> Eq for Keyed<T> {}

impl<T> Hash for Keyed<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key.hash(state);
    }
}

impl<T: Debug> Debug for Keyed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.value.fmt(f)
    }
}
