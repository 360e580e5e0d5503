//! The reader of JSON that was signed, held against another: what it reads, the other reads as the same, and its canonical form
//! is read again as itself.

#![no_main]

use federation::json::{Canonical, Json};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

/// Leaves out numbers, which one reader keeps as they are written and the other does not.
fn without_numbers(value: &mut Value) {
    match value {
        Value::Number(_) => *value = Value::Null,
        Value::Array(items) => items.iter_mut().for_each(without_numbers),
        Value::Object(fields) => fields.values_mut().for_each(without_numbers),
        Value::Null | Value::Bool(_) | Value::String(_) => {}
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(json) = Json::parse(bytes) else { return };
    let canonical = json.canonical();
    assert_eq!(
        Canonical::of(canonical.as_str().as_bytes()).as_ref(),
        Ok(&canonical),
        "a canonical form is not its own"
    );
    let read = |bytes: &[u8]| {
        let mut value: Value = serde_json::from_slice(bytes).ok()?;
        without_numbers(&mut value);
        Some(value)
    };
    let Some(whole) = read(bytes) else { return };
    assert_eq!(Some(whole), read(canonical.as_str().as_bytes()), "what was read is something else");
});
