//! The header by which a server says who it is: whatever the bytes, it is read or refused, and what is read is bounded.

#![no_main]

use federation::xmatrix::header;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|lines: &[u8]| {
    // A request may have several of these headers: one a line.
    let values: Vec<&[u8]> = lines.split(|byte| *byte == b'\n').collect();
    let Ok(Some(credentials)) = header::parse(values.iter().copied()) else { return };
    assert!(values.iter().map(|value| value.len()).sum::<usize>() <= 8192, "a long header was read");
    assert!((1..=8).contains(&credentials.signatures.len()), "there are {} signatures", credentials.signatures.len());
    assert!(credentials.origin.as_str().len() <= 255, "the name of a server is too long");
});
