//! `docs/bench-results.md` describes the JSON and the CSV field by field, from the types themselves.
//!
//! `FERRY_BLESS=1 cargo test -p ferry-bench --test report docs` writes the generated parts anew.

use std::fmt::Write as _;
use std::path::PathBuf;

use ferry_bench::report::csv::COLUMNS;
use ferry_bench::report::number::shown;
use ferry_bench::results::{Metric, Results};
use serde_json::Value;

/// A generated part stands between this and [`END`].
const BEGIN: &str = "<!-- generated from the types: ";
const END: &str = "<!-- end of what is generated -->";

#[test]
fn docs_describe_what_is_written() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/bench-results.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut fresh = String::new();
    let mut parts = text.split_inclusive(BEGIN);
    fresh.push_str(parts.next().unwrap());
    let mut generated = Vec::new();
    for part in parts {
        let (name, rest) = part.split_once(" -->").unwrap();
        let (_, after) = rest.split_once(END).expect("a generated part has an end");
        let body = match name {
            "fields" => fields(),
            "metrics" => metrics(),
            "columns" => columns(),
            other => panic!("nobody generates '{other}'"),
        };
        generated.push(name.to_owned());
        let _ = write!(fresh, "{name} -->\n\n{body}\n{END}{after}");
    }
    assert_eq!(generated, ["fields", "metrics", "columns"]);
    if std::env::var_os("FERRY_BLESS").is_some_and(|value| value == "1") {
        std::fs::write(&path, fresh).unwrap();
    } else {
        assert!(
            text == fresh,
            "docs/bench-results.md is not what the types say: bless it with FERRY_BLESS=1 if they changed on purpose"
        );
    }
}

fn columns() -> String {
    let rows = COLUMNS.iter().map(|column| format!("| `{}` | {} |\n", column.name, column.what));
    format!("| column | what is in it |\n|---|---|\n{}", rows.collect::<String>())
}

fn metrics() -> String {
    let row = |metric: Metric| {
        let unit = if shown(metric).unit.is_empty() { "count" } else { shown(metric).unit };
        format!("| `{}` | {} | {unit} | {} |\n", metric.name(), metric.title(), metric.method())
    };
    let rows: String = Metric::ALL.into_iter().map(row).collect();
    format!("| metric | in reports | shown in | where it comes from |\n|---|---|---|---|\n{rows}")
}

/// The types of the JSON, from the outermost inwards.
fn fields() -> String {
    let schema = serde_json::to_value(schemars::schema_for!(Results)).unwrap();
    let mut text = String::new();
    let mut waiting = vec!["Results".to_owned()];
    let mut done: Vec<String> = Vec::new();
    while !waiting.is_empty() {
        let name = waiting.remove(0);
        if done.contains(&name) {
            continue;
        }
        let of_type = if name == "Results" { &schema } else { &schema["$defs"][&name] };
        let _ = writeln!(text, "### {name}\n\n{}\n", line(&of_type["description"]));
        text.push_str(&described(of_type));
        text.push('\n');
        referred(of_type, &mut waiting);
        done.push(name);
    }
    text.trim_end().to_owned() + "\n"
}

/// The names of the types that `of_type` refers to itself.
fn referred(of_type: &Value, names: &mut Vec<String>) {
    match of_type {
        Value::Object(members) => {
            for (key, member) in members {
                match (key.as_str(), member.as_str()) {
                    ("$ref", Some(name)) => names.push(name.replace("#/$defs/", "")),
                    ("$defs", _) => {}
                    (_, _) => referred(member, names),
                }
            }
        }
        Value::Array(members) => members.iter().for_each(|member| referred(member, names)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn described(of_type: &Value) -> String {
    if let Some(variants) = of_type["oneOf"].as_array() {
        let rows = variants
            .iter()
            .map(|variant| format!("| {} | {} |\n", written(variant), line(&variant["description"])));
        return format!("| one of | what it means |\n|---|---|\n{}", rows.collect::<String>());
    }
    let Some(members) = of_type["properties"].as_object() else {
        return format!("{}\n", type_of(of_type));
    };
    let rows = members.iter().map(|(name, member)| {
        format!("| `{name}` | {} | {} |\n", type_of(member), line(&member["description"]))
    });
    format!("| field | type | what it is |\n|---|---|---|\n{}", rows.collect::<String>())
}

/// How a variant is written.
fn written(variant: &Value) -> String {
    if let Some(word) = variant["const"].as_str() {
        return format!("`\"{word}\"`");
    }
    let members = variant["properties"].as_object().unwrap();
    let members = members.iter().map(|(name, member)| match member["const"].as_str() {
        Some(word) => format!("`{name}: \"{word}\"`"),
        None => {
            let what = line(&member["description"]);
            let what = if what.is_empty() { String::new() } else { format!(" ({what})") };
            format!("`{name}`: {}{what}", type_of(member))
        }
    });
    members.collect::<Vec<_>>().join(", ")
}

fn type_of(member: &Value) -> String {
    if let Some(name) = member["$ref"].as_str() {
        let name = name.replace("#/$defs/", "");
        return format!("[{name}](#{})", name.to_lowercase());
    }
    if let Some(either) = member["anyOf"].as_array() {
        return either.iter().map(type_of).collect::<Vec<_>>().join(" or ");
    }
    if let Some(parts) = member["prefixItems"].as_array() {
        let may_be_null = member["type"].as_array().is_some_and(|types| types.contains(&Value::from("null")));
        let parts = parts.iter().map(type_of).collect::<Vec<_>>().join(", ");
        return format!("[{parts}]{}", if may_be_null { " or null" } else { "" });
    }
    let named = |word: &str| match word {
        "array" => format!("list of {}", type_of(&member["items"])),
        "object" => format!("object of {}", type_of(&member["additionalProperties"])),
        other => other.to_owned(),
    };
    match &member["type"] {
        Value::String(word) => named(word),
        Value::Array(words) => {
            words.iter().map(|word| named(word.as_str().unwrap())).collect::<Vec<_>>().join(" or ")
        }
        other @ (Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_)) => {
            panic!("a field without a type: {other} in {member}")
        }
    }
}

/// A description in one line, links to code left out.
fn line(description: &Value) -> String {
    let text = description.as_str().unwrap_or_default();
    let text = text.replace('\n', " ").replace("[`", "`").replace("`]", "`").replace('|', "\\|");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
