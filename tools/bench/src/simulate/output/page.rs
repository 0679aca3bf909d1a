//! A page of HTML that needs nothing else: inline SVG and style, light and dark, no network; with its numbers as JSON.

use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde::Serialize;

use crate::report::html::STYLE;

/// The id of the element with the page's numbers as JSON.
pub const DATA_ID: &str = "simulation";

/// A page.
#[derive(Debug)]
pub struct Page {
    /// Its heading.
    pub title: String,
    /// What it shows, in a sentence.
    pub lead: String,
    /// That it is a model, and how good it is.
    pub note: String,
    /// What was simulated, as names and values.
    pub facts: Vec<(String, String)>,
    /// Its figures and tables.
    pub sections: Markup,
}

impl Page {
    /// The whole file; `data` is what it shows.
    #[must_use]
    pub fn to_html(&self, data: &impl Serialize) -> String {
        // Inside a script element only `<` could end it; in JSON it stands in strings alone.
        let json = serde_json::to_string(data).unwrap_or_else(|_| "null".to_owned()).replace('<', "\\u003c");
        let page = html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="color-scheme" content="light dark";
                    title { (self.title) }
                    // Browsers ask for an icon elsewhere unless there is one here.
                    link rel="icon" href="data:,";
                    style { (PreEscaped(STYLE)) }
                }
                body {
                    main {
                        h1 { (self.title) }
                        p class="lead" { (self.lead) }
                        p { strong { (self.note) } }
                        dl class="facts" {
                            @for (name, value) in &self.facts {
                                dt { (name) } dd { (value) }
                            }
                        }
                        (self.sections)
                    }
                    script type="application/json" id=(DATA_ID) { (PreEscaped(json)) }
                }
            }
        };
        page.into_string()
    }
}

/// A figure with its caption.
#[must_use]
pub fn captioned(title: &str, caption: &str, inside: &Markup) -> Markup {
    html! {
        figure class="wide" {
            figcaption { b { (title) ". " } (caption) }
            (inside)
        }
    }
}

/// A table; all columns but the first hold numbers.
#[must_use]
pub fn table(headings: &[&str], rows: &[Vec<String>]) -> Markup {
    html! {
        div class="scroll" {
            table {
                thead {
                    tr {
                        @for (index, heading) in headings.iter().enumerate() {
                            th class=[(index > 0).then_some("num")] scope="col" { (heading) }
                        }
                    }
                }
                tbody {
                    @for row in rows {
                        tr {
                            @for (index, cell) in row.iter().enumerate() {
                                td class=[(index > 0).then_some("num")] { (cell) }
                            }
                        }
                    }
                }
            }
        }
    }
}
