//! Whether this machine can run the tier at all.

use std::io::Write;

/// Whether network namespaces can be made here. If not, says so, and fails under CI.
pub(crate) fn namespaces_available(test: &str) -> bool {
    match ferry_lab::Namespace::new("tier") {
        Ok(_) => true,
        Err(why) => {
            assert!(
                std::env::var_os("CI").is_none_or(|ci| ci != "true"),
                "tier lab can't run under CI: {why}"
            );
            // Written past the test harness, which would swallow what a passing test prints.
            let _ = writeln!(std::io::stderr(), "SKIPPED tier lab: {test}: {why}");
            false
        }
    }
}
