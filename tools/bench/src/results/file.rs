//! Results as a file.

use std::path::{Path, PathBuf};

use super::{Results, SCHEMA};

/// Why results can't be had from a file.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It can't be read.
    #[error("can't read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the file system said.
        #[source]
        source: std::io::Error,
    },
    /// It holds something else.
    #[error("{} holds no results of ferry-bench", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// Its fields may mean something else.
    #[error("{} has schema {found}, this program knows {SCHEMA}: use the ferry-bench that wrote it", path.display())]
    Schema {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: u32,
    },
}

/// The results in the file at `path`.
///
/// # Errors
/// [`LoadError`], naming the file.
pub fn load(path: &Path) -> Result<Results, LoadError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| LoadError::Read { path: path.to_owned(), source })?;
    let json_error = |source| LoadError::Json { path: path.to_owned(), source };
    // Another schema may not even have these fields, so it is asked for first.
    let head: Head = serde_json::from_str(&text).map_err(json_error)?;
    if head.schema != SCHEMA {
        return Err(LoadError::Schema { path: path.to_owned(), found: head.schema });
    }
    serde_json::from_str(&text).map_err(json_error)
}

#[derive(serde::Deserialize)]
struct Head {
    schema: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_result_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        assert!(matches!(load(&path), Err(LoadError::Read { .. })));
        for (text, word) in
            [("{", "no results"), ("{\"schema\": 1}", "no results"), ("{\"schema\": 99}", "schema 99")]
        {
            std::fs::write(&path, text).unwrap();
            let error = load(&path).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("a.json"), "{error}");
        }
    }
}
