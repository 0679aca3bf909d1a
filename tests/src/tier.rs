//! Whether this machine can run a tier of tests. If not, that is said; under CI it is a failure.

use std::fs::OpenOptions;
use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Whether `/dev/kvm` can be used here.
///
/// # Panics
/// Under CI if it can't.
pub fn has_kvm(tier: &str) -> bool {
    let open = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    runs(tier, open.map(drop).map_err(|error| format!("/dev/kvm: {error}")))
}

/// Whether this is root, who may make namespaces and become another user.
///
/// # Panics
/// Under CI if it is not.
pub fn is_root(tier: &str) -> bool {
    let made = ferry_lab::Namespace::new("tier").map(drop);
    runs(tier, made.map_err(|error| error.to_string()))
}

/// Whether `tier` can run, as `possible` has found out; if not, that is said with its reason.
///
/// # Panics
/// Under CI if it can't.
pub fn runs(tier: &str, possible: Result<(), String>) -> bool {
    if let Err(why) = &possible {
        assert!(
            std::env::var_os("CI").is_none_or(|ci| ci != "true"),
            "tier {tier} can't run under CI: {why}"
        );
        // Written past the test harness, which would swallow what a passing test prints.
        let _ = writeln!(std::io::stderr(), "SKIPPED tier {tier}: {why}");
    }
    possible.is_ok()
}

/// Two cores: guests that run at the same time would measure each other.
pub fn one_at_a_time() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}
