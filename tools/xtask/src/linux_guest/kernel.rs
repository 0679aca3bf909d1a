//! The guest's kernels: Debian's source, our patches, two configurations.
//!
//! A kernel is built again if the source package, a patch or its configuration has changed. Left out: the compiler's
//! version; whoever changes that and cares removes `target/linux-guest`.

use std::fs;
use std::hash::Hasher;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use twox_hash::XxHash3_64;

use super::{Places, run};

/// Where Debian's package puts the source.
pub(super) const ARCHIVE: &str = "/usr/src/linux-source-6.1.tar.xz";

/// The folder inside.
const FOLDER: &str = "linux-source-6.1";

/// The kernels that are built.
const VARIANTS: [&str; 2] = ["mptable", "acpi"];

/// What a variant's folder has to hold once it is built.
const IMAGES: [&str; 2] = ["vmlinux", "bzImage"];

/// What the kernel would otherwise take from the clock and the machine that it is built on.
const REPRODUCIBLE: [(&str, &str); 3] = [
    ("KBUILD_BUILD_TIMESTAMP", "2024-01-01"),
    ("KBUILD_BUILD_USER", "ferry"),
    ("KBUILD_BUILD_HOST", "ferry"),
];

/// Builds what has changed, and returns where the images are.
pub(super) fn build(places: &Places) -> anyhow::Result<Vec<PathBuf>> {
    let patches = patches(places)?;
    let source_hash = source_hash(&patches)?;
    let mut images = Vec::new();
    for variant in VARIANTS {
        let configuration = configuration(places, variant)?;
        let inputs = hash([source_hash.as_bytes(), configuration.as_bytes()]);
        let folder = places.images.join(variant);
        let stamp = folder.join("inputs");
        let built = IMAGES.iter().all(|image| folder.join(image).exists());
        if !built || fs::read_to_string(&stamp).unwrap_or_default() != inputs {
            println!("xtask: the Linux kernel '{variant}', which takes minutes");
            let source = source(places, &source_hash, &patches)?;
            build_variant(places, &source, variant, &configuration)?;
            fs::write(&stamp, &inputs).with_context(|| stamp.display().to_string())?;
        }
        images.extend(IMAGES.iter().map(|image| folder.join(image)));
    }
    Ok(images)
}

/// The patches in the order of their names.
fn patches(places: &Places) -> anyhow::Result<Vec<PathBuf>> {
    let folder = places.sources.join("kernel/patches");
    let entries = fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
    let mut patches = entries.map(|entry| Ok(entry?.path())).collect::<anyhow::Result<Vec<_>>>()?;
    patches.sort();
    Ok(patches)
}

/// What both variants have, then what this one has.
fn configuration(places: &Places, variant: &str) -> anyhow::Result<String> {
    let read = |name: &str| {
        let path = places.sources.join("kernel").join(format!("{name}.config"));
        fs::read_to_string(&path).with_context(|| path.display().to_string())
    };
    Ok(read("base")? + &read(variant)?)
}

fn source_hash(patches: &[PathBuf]) -> anyhow::Result<String> {
    // A package's version would do where the source comes from a package; the archive's bytes do everywhere.
    let mut parts = vec![fs::read(ARCHIVE).context(ARCHIVE)?];
    for patch in patches {
        parts.push(fs::read(patch).with_context(|| patch.display().to_string())?);
    }
    Ok(hash(parts.iter().map(Vec::as_slice)))
}

fn hash<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hasher = XxHash3_64::new();
    for part in parts {
        hasher.write_usize(part.len());
        hasher.write(part);
    }
    format!("{:016x}", hasher.finish())
}

/// The unpacked and patched source; made if it is not there, and older ones removed.
fn source(places: &Places, hash: &str, patches: &[PathBuf]) -> anyhow::Result<PathBuf> {
    let folder = places.images.join(format!("source-{hash}"));
    if folder.exists() {
        return Ok(folder.join(FOLDER));
    }
    for entry in fs::read_dir(&places.images)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("source-") {
            fs::remove_dir_all(entry.path()).with_context(|| entry.path().display().to_string())?;
        }
    }
    // Under another name until it is complete, so that an attempt that was interrupted counts for nothing.
    let unfinished = places.images.join("source-unfinished");
    fs::create_dir_all(&unfinished)?;
    let mut unpack = Command::new("tar");
    unpack.args(["--extract", "--file", ARCHIVE, "--directory"]).arg(&unfinished);
    // The configuration reads one file of the documentation.
    unpack.args(["--exclude", &format!("{FOLDER}/Documentation/*/*")]);
    run(&mut unpack)?;
    for patch in patches {
        let source = unfinished.join(FOLDER);
        run(Command::new("patch")
            .args(["--strip=1", "--silent", "--forward", "--input"])
            .arg(patch)
            .current_dir(source))?;
    }
    fs::rename(&unfinished, &folder)?;
    Ok(folder.join(FOLDER))
}

fn build_variant(places: &Places, source: &Path, variant: &str, configuration: &str) -> anyhow::Result<()> {
    let build = places.images.join(format!("build-{variant}"));
    fs::create_dir_all(&build)?;
    let jobs = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let make = |targets: &[&str]| {
        let mut make = Command::new("make");
        make.current_dir(source).arg("--silent").arg(format!("--jobs={jobs}"));
        make.arg(format!("O={}", build.display())).envs(REPRODUCIBLE).args(targets);
        run(&mut make)
    };
    make(&["tinyconfig"])?;
    let path = build.join(".config");
    let tiny = fs::read_to_string(&path)?;
    fs::write(&path, overridden(&tiny, configuration))?;
    make(&["olddefconfig"])?;
    check_configuration(variant, configuration, &fs::read_to_string(&path)?)?;
    make(&["vmlinux", "bzImage"])?;
    let folder = places.images.join(variant);
    fs::create_dir_all(&folder)?;
    let copies = [("vmlinux", "vmlinux"), ("arch/x86/boot/bzImage", "bzImage"), (".config", "config")];
    for (from, to) in copies {
        fs::copy(build.join(from), folder.join(to)).with_context(|| format!("{from} of '{variant}'"))?;
    }
    Ok(())
}

/// The option that a line of a configuration sets, or says is not set.
fn option(line: &str) -> Option<&str> {
    let line =
        line.strip_prefix("# ").map_or(line, |comment| comment.strip_suffix(" is not set").unwrap_or(""));
    line.split('=').next().filter(|name| name.starts_with("CONFIG_"))
}

/// `base` without the options that `ours` decides, then `ours`.
fn overridden(base: &str, ours: &str) -> String {
    let decided: Vec<&str> = ours.lines().filter_map(option).collect();
    let kept = base.lines().filter(|line| option(line).is_none_or(|name| !decided.contains(&name)));
    kept.chain(ours.lines()).flat_map(|line| [line, "\n"]).collect()
}

/// An option whose conditions don't hold is dropped without a word; here it is an error.
fn check_configuration(variant: &str, ours: &str, result: &str) -> anyhow::Result<()> {
    let holds = |line: &str, name: &str| {
        let found = result.lines().find(|found| option(found) == Some(name));
        // An option that doesn't even appear is not set.
        found.map_or(line.starts_with("# "), |found| found == line)
    };
    let dropped: Vec<&str> =
        ours.lines().filter(|line| option(line).is_some_and(|name| !holds(line, name))).collect();
    if dropped.is_empty() {
        return Ok(());
    }
    bail!("the kernel's configuration '{variant}' can't have {}", dropped.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_overrides_what_the_kernel_starts_with() {
        let base = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=1\n";
        let ours = "# why\n# CONFIG_A is not set\nCONFIG_B=y\n";
        assert_eq!(overridden(base, ours), "CONFIG_C=1\n# why\n# CONFIG_A is not set\nCONFIG_B=y\n");
    }

    #[test]
    fn a_dropped_option_is_named() {
        let ours = "# CONFIG_A is not set\nCONFIG_B=y\n# a remark\n";
        check_configuration("x", ours, "CONFIG_B=y\n").unwrap();
        check_configuration("x", ours, "# CONFIG_A is not set\nCONFIG_B=y\n").unwrap();
        let refused = |result: &str| check_configuration("x", ours, result).unwrap_err().to_string();
        assert!(refused("CONFIG_A=y\nCONFIG_B=y\n").contains("CONFIG_A"));
        assert!(refused("CONFIG_B=m\n").contains("CONFIG_B=y"));
        assert!(refused("").contains("CONFIG_B=y"));
    }
}
