//! Machines on this host's KVM, with guests of a few instructions.

mod boot;
mod life;
#[path = "../support/power_button.rs"]
mod power_button;
#[path = "../support/mod.rs"]
mod support;
mod taps;
#[path = "../support/bzimage.rs"]
mod tiny_linux;

use support::elf as tiny_kernel;
