//! The guest's initial RAM disk: Debian's static busybox, our programs, a file for the web server.
//!
//! It is not compressed: unpacking is the guest kernel's work, which is slow where ring 0 is interpreted.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use cpio::newc::{Builder, trailer};

use super::{Places, run};

/// Where Debian's package puts it.
pub(super) const BUSYBOX: &str = "/bin/busybox";

/// The triple that the programs are built for. Naming it keeps their flags from build scripts and macros.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// The commands of busybox that get a name: what `init` uses, and what a person at the console may want.
const COMMANDS: [&str; 31] = [
    "cat", "cttyhack", "date", "dd", "df", "dmesg", "echo", "free", "grep", "hexdump", "httpd", "ifconfig",
    "ip", "kill", "ls", "mkdir", "mount", "nc", "ping", "poweroff", "ps", "reboot", "route", "setsid", "sh",
    "sleep", "sync", "top", "umount", "uptime", "wget",
];

const FOLDERS: [&str; 8] = ["bin", "dev", "proc", "root", "sys", "tmp", "usr", "www"];

const MODE_FILE: u32 = 0o100_644;
const MODE_PROGRAM: u32 = 0o100_755;
const MODE_FOLDER: u32 = 0o040_755;
const MODE_LINK: u32 = 0o120_777;
const MODE_CHARACTERS: u32 = 0o020_600;

/// What the web server serves as `/file`, in lines that tell where they are.
fn web_file() -> Vec<u8> {
    (0..256)
        .flat_map(|line| {
            format!("line {line:4} of the file that the Linux guest serves to its clients\n").into_bytes()
        })
        .collect()
}

/// Builds the programs and packs all into `initramfs.cpio`.
pub(super) fn build(places: &Places) -> anyhow::Result<PathBuf> {
    let agent = programs(places)?.join("guest-agent");
    let image = places.images.join("initramfs.cpio");
    let unfinished = places.images.join("initramfs.unfinished");
    let mut archive = Archive { out: BufWriter::new(File::create(&unfinished)?), inode: 0 };
    for folder in FOLDERS {
        archive.add(folder, MODE_FOLDER, &[])?;
    }
    // The kernel opens it for the first process, before anything could have made it.
    archive.add_device("dev/console", 5, 1)?;
    archive.add("bin/busybox", MODE_PROGRAM, &read(Path::new(BUSYBOX))?)?;
    for command in COMMANDS {
        archive.add(&format!("bin/{command}"), MODE_LINK, b"busybox")?;
    }
    archive.add("bin/guest-agent", MODE_PROGRAM, &read(&agent)?)?;
    archive.add("init", MODE_PROGRAM, &read(&places.sources.join("initramfs/init"))?)?;
    archive.add("www/file", MODE_FILE, &web_file())?;
    // For the test, which compares.
    fs::write(places.images.join("web-file"), web_file())?;
    trailer(archive.out)?.flush()?;
    fs::rename(&unfinished, &image)?;
    Ok(image)
}

/// Builds the guest's programs, linked statically, and returns where they are.
fn programs(places: &Places) -> anyhow::Result<PathBuf> {
    let target = places.images.join("programs");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--release", "--package", "ferry-linux-guest-programs"]);
    cargo.args(["--target", TRIPLE, "--target-dir"]).arg(&target).current_dir(&places.root);
    // Only what every x86-64 processor has; see the crate's own remark.
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static -C strip=symbols");
    run(&mut cargo)?;
    Ok(target.join(TRIPLE).join("release"))
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| path.display().to_string())
}

struct Archive<W> {
    out: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    fn add(&mut self, name: &str, mode: u32, contents: &[u8]) -> anyhow::Result<()> {
        self.put(Builder::new(name).mode(mode), contents)
    }

    fn add_device(&mut self, name: &str, major: u32, minor: u32) -> anyhow::Result<()> {
        self.put(Builder::new(name).mode(MODE_CHARACTERS).rdev_major(major).rdev_minor(minor), &[])
    }

    fn put(&mut self, entry: Builder, contents: &[u8]) -> anyhow::Result<()> {
        // Files with one inode number would be links to each other.
        self.inode += 1;
        let length = u32::try_from(contents.len()).context("a file of 4 GiB or more")?;
        let mut file = entry.ino(self.inode).nlink(1).write(&mut self.out, length);
        file.write_all(contents)?;
        file.finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_reads_back() {
        let mut archive = Archive { out: Vec::new(), inode: 0 };
        archive.add("bin", MODE_FOLDER, &[]).unwrap();
        archive.add_device("dev/console", 5, 1).unwrap();
        archive.add("www/file", MODE_FILE, &web_file()).unwrap();
        let bytes = trailer(archive.out).unwrap();
        let mut rest = bytes.as_slice();
        let mut seen = Vec::new();
        loop {
            let mut reader = cpio::NewcReader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let entry = reader.entry();
            seen.push((entry.name().to_owned(), entry.mode(), entry.rdev_major(), entry.rdev_minor()));
            if entry.name() == "www/file" {
                let mut contents = Vec::new();
                std::io::Read::read_to_end(&mut reader, &mut contents).unwrap();
                assert_eq!(contents, web_file());
            }
            rest = reader.finish().unwrap();
        }
        let expected = [
            ("bin".to_owned(), MODE_FOLDER, 0, 0),
            ("dev/console".to_owned(), MODE_CHARACTERS, 5, 1),
            ("www/file".to_owned(), MODE_FILE, 0, 0),
        ];
        assert_eq!(seen, expected);
    }
}
