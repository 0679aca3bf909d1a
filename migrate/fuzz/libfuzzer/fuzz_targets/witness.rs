//! [`ferry_fuzz::targets::witness`] under libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferry_fuzz::targets::witness(bytes));
