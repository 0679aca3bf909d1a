//! How the model shows what it found: tables for the terminal, charts and pages of HTML.

pub mod table;
