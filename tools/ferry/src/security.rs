//! Where this host's certificate is, and what is to be secured with it.

use std::path::{Path, PathBuf};

use ferry_migrate::{Security, Tls, TlsError};

/// What names the folder where the command line does not.
const FOLDER_VARIABLE: &str = "FERRY_TLS_DIR";

/// The folder that is taken if there is one and nothing else was said.
const FOLDER: &str = "/etc/ferry/tls";

/// The folder with this host's certificate: the one that was said, else $FERRY_TLS_DIR (empty for none), else
/// /etc/ferry/tls if it is there.
pub(crate) fn folder(said: Option<PathBuf>) -> Option<PathBuf> {
    folder_of(said, std::env::var_os(FOLDER_VARIABLE).map(PathBuf::from), Path::new(FOLDER))
}

/// The folder that was said, or that the environment names.
pub(crate) fn said(said: Option<PathBuf>) -> Option<PathBuf> {
    folder_of(said, std::env::var_os(FOLDER_VARIABLE).map(PathBuf::from), Path::new(""))
}

fn folder_of(said: Option<PathBuf>, variable: Option<PathBuf>, default: &Path) -> Option<PathBuf> {
    match (said, variable) {
        (Some(said), _) => Some(said),
        (None, Some(named)) => Some(named).filter(|named| !named.as_os_str().is_empty()),
        (None, None) => default.is_dir().then(|| default.to_owned()),
    }
}

/// How TCP connections are secured with the certificate in `folder`, if there is one.
pub(crate) fn security(folder: Option<&Path>, insecure: bool) -> Result<Security, TlsError> {
    match folder {
        _ if insecure => Ok(Security::Insecure),
        Some(folder) => Tls::load(folder).map(Security::Tls),
        None => Ok(Security::LoopbackOnly),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_goes_before_what_is_set_and_that_before_what_is_there() {
        let there = tempfile::tempdir().unwrap();
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(folder_of(path("a"), path("b"), there.path()), path("a"));
        assert_eq!(folder_of(None, path("b"), there.path()), path("b"));
        assert_eq!(folder_of(None, path(""), there.path()), None);
        assert_eq!(folder_of(None, None, there.path()).as_deref(), Some(there.path()));
        assert_eq!(folder_of(None, None, &there.path().join("not")), None);
    }
}
