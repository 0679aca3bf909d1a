//! `cargo xtask linux-guest`: a real Linux for the tests, and the test that migrates it.
//!
//! Everything is made from Debian's packages and from `tools/linux-guest`, and kept under `target/linux-guest`:
//!
//! ```text
//!   source-HASH/            the kernel's source with our patches
//!   build-VARIANT/          where a variant is built
//!   VARIANT/                vmlinux, bzImage, config, and inputs: the hash of what they were made from
//!   programs/               the target folder of the guest's programs
//!   initramfs.cpio, and web-file: what its web server serves
//! ```
//!
//! The test is a program of its own, so that building this one does not build the lab.

mod initramfs;
mod kernel;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

/// What has to be installed: where it shows, and Debian's package.
const NEEDED: [(&str, &str); 9] = [
    (kernel::ARCHIVE, "linux-source-6.1"),
    (initramfs::BUSYBOX, "busybox-static"),
    ("/usr/bin/make", "make"),
    ("/usr/bin/patch", "patch"),
    ("/usr/bin/flex", "flex"),
    ("/usr/bin/bison", "bison"),
    ("/usr/bin/bc", "bc"),
    ("/usr/bin/lz4", "lz4"),
    ("/usr/include/libelf.h", "libelf-dev"),
];

/// Where things are.
#[derive(Debug)]
struct Places {
    /// The repository.
    root: PathBuf,
    /// `tools/linux-guest`.
    sources: PathBuf,
    /// `target/linux-guest`.
    images: PathBuf,
}

impl Places {
    fn of(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            sources: root.join("tools/linux-guest"),
            images: root.join("target/linux-guest"),
        }
    }
}

/// Builds both kernels and the initramfs, as far as what they are made from has changed.
pub(crate) fn build(root: &Path) -> anyhow::Result<()> {
    let places = Places::of(root);
    check_installed()?;
    std::fs::create_dir_all(&places.images).with_context(|| places.images.display().to_string())?;
    println!("{}", initramfs::build(&places)?.display());
    for image in kernel::build(&places)? {
        println!("{}", image.display());
    }
    Ok(())
}

/// Builds the images, the command and the test's driver, and runs that.
pub(crate) fn test(root: &Path, arguments: &[String]) -> anyhow::Result<()> {
    build(root)?;
    let places = Places::of(root);
    cargo(root, &["build", "--package", "ferry", "--package", "ferry-linux-guest-driver"])?;
    let built = root.join("target/debug");
    run(Command::new(built.join("linux-guest-driver"))
        .arg("--ferry")
        .arg(built.join("ferry"))
        .arg("--images")
        .arg(&places.images)
        .args(arguments))
}

fn check_installed() -> anyhow::Result<()> {
    let missing: Vec<&str> =
        NEEDED.iter().filter(|(path, _)| !Path::new(path).exists()).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    bail!("packages are missing; as root: apt-get install --no-install-recommends {}", missing.join(" "))
}

fn cargo(root: &Path, arguments: &[&str]) -> anyhow::Result<()> {
    run(Command::new(env!("CARGO")).args(arguments).current_dir(root))
}

/// Runs `command` to its end; its output is the caller's.
fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("{command:?} can't be run"))?;
    if status.success() { Ok(()) } else { bail!("{command:?} failed: {status}") }
}
