//! The rules of this repository that no other tool checks: sizes of files, opening comments, where `unsafe`,
//! clocks and loose ends may stand, and which top-level entries there are.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// The longest source file, in lines.
const FILE_LINES_MAX: usize = 600;

/// Where `unsafe` may stand: the machine monitor, the bare-metal guest, and where the Linux guest reads its counter.
const UNSAFE_IN: [&str; 2] = ["vmm/", "tools/guest/kernel/"];

/// The protocol core does no I/O, reads no clock and draws no random number.
const SANS_IO: &str = "migrate/protocol/src/";

const IMPURE: [&str; 5] = ["Instant::now", "SystemTime::now", "thread_rng", "tokio::", "std::net::Tcp"];

const TOP_LEVEL: [&str; 16] = [
    ".cargo",
    ".ci",
    ".git",
    ".gitignore",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "benches",
    "clippy.toml",
    "docs",
    "migrate",
    "rustfmt.toml",
    "tests",
    "tools",
    "vmm",
];

/// What is untidy under `root`, one complaint a place.
pub(crate) fn check(root: &Path) -> anyhow::Result<Vec<String>> {
    let mut complaints = Vec::new();
    for entry in fs::read_dir(root).context("the repository can't be read")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let generated = name == "target" || name.ends_with(".json") || name.ends_with(".html");
        if !generated && !TOP_LEVEL.contains(&name.as_str()) {
            complaints.push(format!("{name}: not one of the agreed top-level entries"));
        }
    }
    let mut files = Vec::new();
    for folder in ["vmm", "migrate", "benches", "tests", "tools"] {
        rust_files(&root.join(folder), &mut files)?;
    }
    files.sort();
    for file in files {
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let name = file.strip_prefix(root).unwrap_or(&file).display().to_string();
        complaints.extend(check_file(&name, &text));
    }
    Ok(complaints)
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            if path.file_name().is_none_or(|name| name != "target") {
                rust_files(&path, files)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

fn check_file(name: &str, text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    let lines = text.lines().count();
    if lines > FILE_LINES_MAX {
        complaints.push(format!("{name}: {lines} lines, above {FILE_LINES_MAX}"));
    }
    if !text.starts_with("//!") && !text.starts_with("#!") {
        complaints.push(format!("{name}:1: does not open by saying what it is for (//!)"));
    }
    // This file names what it looks for.
    if name.ends_with("xtask/src/tidy.rs") {
        return complaints;
    }
    let may_be_unsafe = UNSAFE_IN.iter().any(|folder| name.starts_with(folder));
    for (number, line) in (1..).zip(text.lines()) {
        let mut complain = |what: &str| complaints.push(format!("{name}:{number}: {what}"));
        let code = line.split("//").next().unwrap_or_default();
        if !may_be_unsafe && (code.contains("unsafe {") || code.contains("unsafe fn")) {
            complain("unsafe outside the machine monitor");
        }
        if name.starts_with(SANS_IO) && IMPURE.iter().any(|word| code.contains(word)) {
            complain("clock, randomness or I/O in the protocol core");
        }
        if ["todo!(", "unimplemented!(", "#[ignore", "#[allow("].iter().any(|word| code.contains(word)) {
            complain("a loose end");
        }
        if ["TODO", "FIXME", "XXX"].iter().any(|word| line.contains(word)) {
            complain("a loose end");
        }
    }
    complaints
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rule_finds_its_breach() {
        let breaches = [
            ("migrate/src/a.rs", "fn a() {}"),
            ("migrate/src/a.rs", "//! A.\nfn a() { unsafe { b() } }"),
            ("migrate/protocol/src/a.rs", "//! A.\nlet now = Instant::now();"),
            ("vmm/src/a.rs", "//! A.\ntodo!()"),
            ("vmm/src/a.rs", "//! A.\n// FIXME: later"),
        ];
        for (name, text) in breaches {
            assert_eq!(check_file(name, text).len(), 1, "{text}");
        }
        let long = format!("//! A.\n{}", "fn a() {}\n".repeat(FILE_LINES_MAX));
        assert_eq!(check_file("vmm/src/a.rs", &long).len(), 1);
        assert!(check_file("vmm/src/a.rs", "//! A.\nfn a() { unsafe { b() } }").is_empty());
    }

    #[test]
    fn this_repository_is_tidy() {
        assert_eq!(check(&crate::root()).unwrap(), Vec::<String>::new());
    }
}
