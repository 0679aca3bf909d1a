//! [`ferry_fuzz::targets::restore`] under libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferry_fuzz::targets::restore(bytes));
