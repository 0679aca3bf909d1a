//! Builds the workload guest with a cargo of its own, so that nothing outside cargo is needed.
//!
//! The guest is always built with its release profile, whatever this crate is built for: it is an image, not
//! code that runs here. It has its own target directory below OUT_DIR, because the outer cargo holds the lock of its own.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Only what finds the toolchain reaches the inner cargo: flags, wrappers (clippy's, for one) and the job server are the outer one's.
const KEPT: [&str; 12] = [
    "PATH",
    "HOME",
    "USER",
    "TMPDIR",
    "CARGO_HOME",
    "RUSTUP_HOME",
    "RUSTUP_TOOLCHAIN",
    "CARGO_NET_OFFLINE",
    "CARGO_HTTP_PROXY",
    "HTTPS_PROXY",
    "https_proxy",
    "SSL_CERT_FILE",
];

/// The target is named, so that flags meant for it stay away from the guest's build script.
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let image = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let guest = image.parent().expect("tools/guest/image has a parent").to_path_buf();
    let out = PathBuf::from(variable("OUT_DIR"));
    for source in
        ["kernel/src", "kernel/build.rs", "kernel/guest.ld", "kernel/Cargo.toml", "kernel/Cargo.lock"]
    {
        println!("cargo::rerun-if-changed={}", guest.join(source).display());
    }
    for source in ["kernel/.cargo/config.toml", "abi/src", "abi/Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", guest.join(source).display());
    }
    let target = out.join("kernel-target");
    build(&guest.join("kernel"), &target);
    let elf = target.join(TARGET).join("release/ferry-guest");
    std::fs::copy(&elf, out.join("ferry-guest"))
        .unwrap_or_else(|error| panic!("copying the guest from {}: {error}", elf.display()));
}

fn build(kernel: &Path, target: &Path) {
    let mut cargo = Command::new(variable("CARGO"));
    cargo.args(["build", "--release", "--locked", "--target", TARGET, "--target-dir"]).arg(target);
    // The guest's flags are in its .cargo/config.toml, which cargo finds from the working directory.
    cargo.current_dir(kernel).env_clear();
    for name in KEPT {
        if let Some(value) = std::env::var_os(name) {
            cargo.env(name, value);
        }
    }
    let output = cargo.output().unwrap_or_else(|error| panic!("starting {cargo:?}: {error}"));
    assert!(
        output.status.success(),
        "building the workload guest in {} failed ({}):\n{}",
        kernel.display(),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|error| panic!("cargo sets {name} for build scripts: {error}"))
}
