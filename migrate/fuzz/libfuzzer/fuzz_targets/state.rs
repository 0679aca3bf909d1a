//! [`ferry_fuzz::targets::state`] under libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferry_fuzz::targets::state(bytes));
