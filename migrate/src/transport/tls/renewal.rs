//! A host's certificate for as long as a process lives, which may be longer than the certificate: its folder is looked at for each
//! connection, and read anew where a file of it has changed. What can't be used then (half of a renewal, say) is said and left
//! alone: the certificate that was read last goes on to be shown.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::{CA_FILE, CERTIFICATE_FILE, KEY_FILE, Tls, TlsError};

/// The certificate in a folder.
#[derive(Clone)]
pub struct Credentials {
    shared: Arc<Shared>,
}

struct Shared {
    folder: PathBuf,
    state: Mutex<State>,
}

struct State {
    tls: Arc<Tls>,
    /// What was seen of the files before they were read last.
    seen: Vec<Option<Seen>>,
    /// Why they could not be used, if they could not.
    complaint: Option<String>,
}

/// What changes of a file when it is written or replaced.
#[derive(PartialEq, Eq)]
struct Seen {
    device: u64,
    inode: u64,
    bytes: u64,
    changed: (i64, i64),
}

impl Credentials {
    /// Reads `folder` for the first time. Blocks.
    ///
    /// # Errors
    /// As [`Tls::load`].
    pub fn load(folder: &Path) -> Result<Self, TlsError> {
        let seen = look(folder);
        let state = State { tls: Arc::new(Tls::load(folder)?), seen, complaint: None };
        let shared = Shared { folder: folder.to_owned(), state: Mutex::new(state) };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The certificate as it is now, or as it was when it could be used last. Blocks where it has changed.
    #[must_use]
    pub fn current(&self) -> Arc<Tls> {
        let Shared { folder, state } = &*self.shared;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        // Before it is read: what is written meanwhile shows next time.
        let seen = look(folder);
        if seen == state.seen && state.complaint.is_none() {
            return Arc::clone(&state.tls);
        }
        state.seen = seen;
        match Tls::load(folder) {
            Ok(tls) => {
                tracing::info!("the certificate in {} was read anew", folder.display());
                (state.tls, state.complaint) = (Arc::new(tls), None);
            }
            Err(error) => {
                let complaint = error.to_string();
                if state.complaint.as_ref() != Some(&complaint) {
                    tracing::warn!(
                        "the certificate that was read before is kept, for the new one can't be used: {complaint}"
                    );
                }
                state.complaint = Some(complaint);
            }
        }
        Arc::clone(&state.tls)
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("folder", &self.shared.folder).finish_non_exhaustive()
    }
}

fn look(folder: &Path) -> Vec<Option<Seen>> {
    let seen = |name| {
        let file = fs::metadata(folder.join(name)).ok()?;
        let changed = (file.ctime(), file.ctime_nsec());
        Some(Seen { device: file.dev(), inode: file.ino(), bytes: file.size(), changed })
    };
    [CA_FILE, CERTIFICATE_FILE, KEY_FILE].map(seen).into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::testing::{Authority, HostPlan};
    use super::*;

    #[test]
    fn a_renewed_certificate_is_taken_up_and_one_that_can_not_be_used_is_not() {
        let site = Authority::new();
        let folder = |name: &str| site.folder_of(name, &HostPlan::new(name));
        let (used, renewed) = (folder("a"), folder("b"));
        let credentials = Credentials::load(&used).unwrap();
        let host = || credentials.current().own().host().to_owned();
        assert_eq!(host(), "a");
        let unchanged = credentials.current();
        assert!(Arc::ptr_eq(&unchanged, &credentials.current()), "it is not read for nothing");
        // One file after the other, as they are copied: until all are there the key is not the certificate's.
        fs::copy(renewed.join(CERTIFICATE_FILE), used.join(CERTIFICATE_FILE)).unwrap();
        assert_eq!(host(), "a");
        fs::copy(renewed.join(KEY_FILE), used.join(KEY_FILE)).unwrap();
        assert_eq!(host(), "b");
        fs::set_permissions(used.join(KEY_FILE), fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(host(), "b");
        fs::rename(&used, used.with_extension("away")).unwrap();
        assert_eq!(host(), "b");
        fs::rename(folder("c"), &used).unwrap();
        assert_eq!(host(), "c");
    }
}
