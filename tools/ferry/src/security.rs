//! Where this host's certificate is, and what is to be secured with it.

use std::path::{Path, PathBuf};

use ferry_migrate::{Credentials, Security, TlsError};

use crate::permission;

/// What names the folder where the command line does not.
const FOLDER_VARIABLE: &str = "FERRY_TLS_DIR";

/// The folder that is taken if there is one and nothing else was said.
pub(crate) const FOLDER: &str = "/etc/ferry/tls";

/// The folder with this host's certificate: the one that was said, else $FERRY_TLS_DIR (empty for none), else
/// /etc/ferry/tls if it is there.
pub(crate) fn folder(said: Option<PathBuf>) -> Option<PathBuf> {
    folder_of(said, std::env::var_os(FOLDER_VARIABLE).map(PathBuf::from), Path::new(FOLDER))
}

/// What is to be asked for in a process that may know another default: the folder that was said or that the environment names,
/// an empty one for none, or nothing for that process's own.
pub(crate) fn said(said: Option<PathBuf>) -> std::io::Result<Option<PathBuf>> {
    let variable = || std::env::var_os(FOLDER_VARIABLE).map(PathBuf::from);
    match said.or_else(variable) {
        Some(none) if none.as_os_str().is_empty() => Ok(Some(none)),
        Some(folder) => std::path::absolute(folder).map(Some),
        None => Ok(None),
    }
}

/// What was asked for so; `own` is this process's own folder, and what is there now if it has none.
pub(crate) fn asked_for(asked: Option<&Path>, own: Option<&Path>) -> Option<PathBuf> {
    match asked {
        Some(folder) => Some(folder.to_owned()).filter(|folder| !folder.as_os_str().is_empty()),
        None => own.map(Path::to_owned).or_else(|| folder(None)),
    }
}

/// Reads the certificate in `folder`.
pub(crate) fn load(folder: &Path) -> anyhow::Result<Credentials> {
    Credentials::load(folder).map_err(|error| match &error {
        TlsError::Read { file, cause } => {
            let way_out = permission::way_out_of(file, cause);
            anyhow::anyhow!("{error}{way_out}")
        }
        TlsError::Exposed { .. }
        | TlsError::Content { .. }
        | TlsError::Own { .. }
        | TlsError::Forbidden { .. } => error.into(),
    })
}

fn folder_of(said: Option<PathBuf>, variable: Option<PathBuf>, default: &Path) -> Option<PathBuf> {
    match (said, variable) {
        (Some(said), _) => Some(said),
        (None, Some(named)) => Some(named).filter(|named| !named.as_os_str().is_empty()),
        (None, None) => default.is_dir().then(|| default.to_owned()),
    }
}

/// How TCP connections are secured with the certificate in `folder`, if there is one.
pub(crate) fn security(folder: Option<&Path>, insecure: bool) -> anyhow::Result<Security> {
    match folder {
        _ if insecure => Ok(Security::Insecure),
        Some(folder) => load(folder).map(Security::Tls),
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

    #[test]
    fn whoever_asks_for_none_gets_none() {
        let (empty, own) = (Path::new(""), Path::new("/own"));
        assert_eq!(asked_for(Some(empty), Some(own)), None);
        assert_eq!(asked_for(Some(Path::new("/asked")), Some(own)).as_deref(), Some(Path::new("/asked")));
        assert_eq!(asked_for(None, Some(own)).as_deref(), Some(own));
    }
}
