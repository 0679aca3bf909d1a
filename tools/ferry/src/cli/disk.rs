//! The words of `--disk`, for a VM that starts and for one that is taken over.

use std::path::PathBuf;

use ferry_vmm::{DiskChoice, DiskConfig};

/// `--disk`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskArg {
    path: PathBuf,
    /// As it was said, if it was.
    read_only: Option<bool>,
    serial: Option<String>,
    locked: bool,
}

impl DiskArg {
    /// The disk of a VM that starts.
    pub(crate) fn config(&self) -> DiskConfig {
        let Self { path, read_only, serial, locked } = self.clone();
        let read_only = read_only.unwrap_or(false);
        DiskConfig { path, read_only, serial, locked, taken_over: None }
    }

    /// What is said of the disk of a VM that is taken over.
    pub(crate) fn choice(&self) -> DiskChoice {
        let Self { path, read_only, serial: _, locked } = self.clone();
        DiskChoice { path, read_only, locked }
    }
}

/// What `ferry run` takes.
pub(super) fn of_new(text: &str) -> Result<DiskArg, String> {
    parse(text, "path=FILE[,ro][,serial=ID][,lock=off]")
}

/// What `ferry receive` takes: the serial number comes with the VM.
pub(super) fn of_taken_over(text: &str) -> Result<DiskArg, String> {
    let known = "path=FILE[,ro|rw][,lock=off]";
    let disk = parse(text, known)?;
    match disk.serial {
        Some(_) => Err(format!("a VM brings its disks' serial numbers along; write {known}")),
        None => Ok(disk),
    }
}

fn parse(text: &str, known: &str) -> Result<DiskArg, String> {
    let (mut path, mut read_only, mut serial, mut locked) = (None, None, None, true);
    for word in text.split(',') {
        match word.split_once('=') {
            None if word == "ro" => read_only = Some(true),
            None if word == "rw" => read_only = Some(false),
            Some(("path", file)) if !file.is_empty() => path = Some(PathBuf::from(file)),
            Some(("serial", id)) => serial = Some(id.to_owned()),
            Some(("lock", "on")) => locked = true,
            Some(("lock", "off")) => locked = false,
            _ => return Err(format!("'{word}' is not known here; write {known}")),
        }
    }
    let path = path.ok_or("path=FILE is missing")?;
    Ok(DiskArg { path, read_only, serial, locked })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_path_and_words() {
        let config = of_new("path=/shared/a.img").unwrap().config();
        assert_eq!(
            (config.path.to_str(), config.read_only, config.locked),
            (Some("/shared/a.img"), false, true)
        );
        let config = of_new("ro,path=a,serial=x-1,lock=off").unwrap().config();
        assert_eq!((config.read_only, config.serial.as_deref(), config.locked), (true, Some("x-1"), false));
        assert_eq!(of_taken_over("path=a,rw").unwrap().choice().read_only, Some(false));
        assert_eq!(of_taken_over("path=a").unwrap().choice().read_only, None);
        for bad in ["ro", "path=", "path=a,r", "path=a,lock=maybe", "a.img", ""] {
            assert!(of_new(bad).is_err(), "{bad}");
        }
        assert!(of_taken_over("path=a,serial=x").is_err());
    }
}
