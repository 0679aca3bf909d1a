//! Where a peer's program is, and what it says of its version.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::results::EngineInfo;
use crate::scenario::EngineConfig;

/// What a program says of itself is cut off there, bytes.
const VERSION_BYTES_MAX: usize = 200;

/// Looks for the program that `config` names, or else for `usual` in PATH, and asks it for its version. Whatever
/// keeps it from being used is in [`EngineInfo::absent`].
#[must_use]
pub fn look_for(config: &EngineConfig, usual: &str) -> EngineInfo {
    let mut info = EngineInfo {
        name: config.name.clone(),
        kind: config.kind,
        version: None,
        binary: config.binary.as_ref().map(|binary| binary.display().to_string()),
        absent: None,
    };
    let wanted = config.binary.as_deref().unwrap_or(Path::new(usual));
    let found = locate(wanted).and_then(|path| {
        info.binary = Some(path.display().to_string());
        version(&path)
    });
    match found {
        Ok(version) => info.version = Some(version),
        Err(why) => info.absent = Some(why),
    }
    info
}

/// The first executable file of that name in PATH; a name with a slash is a path.
fn locate(wanted: &Path) -> Result<PathBuf, String> {
    if wanted.components().count() > 1 {
        let fits = is_executable(wanted);
        return fits.then(|| wanted.to_owned()).ok_or_else(|| {
            format!("{} is no program that can be run; correct the engine's 'binary'", wanted.display())
        });
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|folder| folder.join(wanted)).find(|file| is_executable(file));
    found.ok_or_else(|| {
        format!("there is no {} in PATH; install it or name the engine's 'binary'", wanted.display())
    })
}

fn is_executable(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

fn version(program: &Path) -> Result<String, String> {
    let asked = Command::new(program).arg("--version").stdin(Stdio::null()).output();
    let said = asked.map_err(|error| format!("{} can't be run: {error}", program.display()))?;
    let text = String::from_utf8_lossy(&said.stdout);
    let line: String =
        text.lines().next().unwrap_or_default().trim().chars().take(VERSION_BYTES_MAX).collect();
    if said.status.success() && !line.is_empty() {
        return Ok(line);
    }
    let errors = String::from_utf8_lossy(&said.stderr);
    Err(format!("{} --version ended with {} and says: {}", program.display(), said.status, errors.trim()))
}

/// The first number with a dot in what a program says of its version: major and minor.
#[must_use]
pub fn major_minor(version: &str) -> Option<(u32, u32)> {
    version.split(|c: char| !c.is_ascii_digit() && c != '.').find_map(|word| {
        let mut parts = word.split('.');
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::EngineKind;

    fn config(binary: Option<&Path>) -> EngineConfig {
        EngineConfig { name: "peer".into(), kind: EngineKind::Qemu, binary: binary.map(Path::to_owned) }
    }

    fn script(folder: &Path, text: &str) -> PathBuf {
        let file = folder.join("peer");
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        file
    }

    #[test]
    fn a_program_is_asked_for_its_version() {
        let folder = tempfile::tempdir().unwrap();
        let file = script(folder.path(), "#!/bin/sh\nprintf 'peer 7.2.22 (x)\\nmore\\n'\n");
        let info = look_for(&config(Some(&file)), "unused");
        assert_eq!(info.absent, None);
        assert_eq!(info.version.as_deref(), Some("peer 7.2.22 (x)"));
        assert_eq!(info.binary, Some(file.display().to_string()));
        assert!(look_for(&config(None), "sh").binary.is_some_and(|path| path.ends_with("/sh")));
    }

    #[test]
    fn what_can_not_be_used_is_absent_and_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let missing = look_for(&config(None), "no-such-peer").absent.unwrap();
        assert!(missing.contains("no-such-peer in PATH"), "{missing}");
        let nowhere = look_for(&config(Some(Path::new("/no/such/peer"))), "sh").absent.unwrap();
        assert!(nowhere.contains("/no/such/peer"), "{nowhere}");
        let file = script(folder.path(), "#!/bin/sh\necho not today >&2\nexit 3\n");
        let refusing = look_for(&config(Some(&file)), "sh").absent.unwrap();
        assert!(refusing.contains("not today") && refusing.contains('3'), "{refusing}");
    }

    #[test]
    fn versions_are_read_out_of_what_programs_say() {
        assert_eq!(major_minor("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)"), Some((7, 2)));
        assert_eq!(major_minor("cloud-hypervisor v53.0-246-gae44c2971"), Some((53, 0)));
        assert_eq!(major_minor("cloud-hypervisor v54.0.0"), Some((54, 0)));
        assert_eq!(major_minor("peer"), None);
    }
}
