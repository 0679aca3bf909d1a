//! Reports of results as people and programs read them, from made-up results: the HTML page in a real browser, CSV,
//! terminal, comparisons, and the documentation of the schema.

mod browser;
mod compare;
mod docs;
mod drawn;
mod page;
mod sample;
mod text;
