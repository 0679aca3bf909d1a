//! CPU profiles as they are given on the command line: ferry's own by name, others by their file.

use std::fs::File;
use std::io::Read;

use ferry_vmm::{CPU_PROFILE_BYTES_MAX, CpuProfile};

/// A profile by its name, or by a path, which has a slash.
pub(crate) fn cpu_profile(text: &str) -> Result<CpuProfile, String> {
    if !text.contains('/') {
        return text.parse().map_err(|error: ferry_vmm::CpuProfileError| error.to_string());
    }
    let cannot = |error| format!("can't read the CPU profile {text}: {error}");
    let file = File::open(text).map_err(cannot)?;
    let mut profile = String::new();
    // One byte more than may be shows that there is more.
    let limit = u64::try_from(CPU_PROFILE_BYTES_MAX + 1).expect("a few KiB");
    file.take(limit).read_to_string(&mut profile).map_err(cannot)?;
    CpuProfile::from_toml(text, &profile).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_ferrys_own_and_paths_are_files() {
        assert_eq!(cpu_profile("x86-64-v3").unwrap().name(), "x86-64-v3");
        assert!(cpu_profile("fleet").unwrap_err().contains("'fleet'"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fleet.toml");
        let path = path.to_str().unwrap();
        assert!(cpu_profile(path).unwrap_err().contains("No such file"));
        std::fs::write(path, "base = 'x86-64-v2'\nadd = ['aes']").unwrap();
        assert!(
            path.ends_with(cpu_profile(path).unwrap().name())
                || cpu_profile(path).unwrap().name() == "a file"
        );
        std::fs::write(path, "#".repeat(CPU_PROFILE_BYTES_MAX + 1)).unwrap();
        assert!(cpu_profile(path).unwrap_err().contains("longer"));
    }
}
