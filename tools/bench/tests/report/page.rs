//! The page in Chromium.

use std::path::PathBuf;

use ferry_bench::report::html;

use crate::browser::{self, Browser};
use crate::sample::Recipe;

fn written() -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let path = folder.join("report.html");
    std::fs::write(&path, html::page(&Recipe::new(1).results())).unwrap();
    path
}

#[test]
fn it_renders() {
    if !browser::available("it_renders") {
        return;
    }
    let mut browser = Browser::start();
    browser.open(&format!("file://{}", written().display()));
    println!("{}", browser.evaluate("document.title"));
}
