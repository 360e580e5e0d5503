//! The range of bytes that a request asks for
//! ([RFC 9110, section 14](https://www.rfc-editor.org/rfc/rfc9110#section-14)): players seek in video and audio by it.

use std::ops::Range;

/// The part of some bytes that is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// All of them, also where the range is none that this server understands: several ranges, or another unit.
    All,
    /// This part of the file.
    Part(Range<u64>),
    /// A part that is not there.
    Outside,
}

/// Reads the header field `Range` of a request for so many bytes.
pub fn asked(field: Option<&str>, bytes: u64) -> Asked {
    let Some((unit, set)) = field.and_then(|field| field.split_once('=')) else { return Asked::All };
    if !unit.trim().eq_ignore_ascii_case("bytes") || set.contains(',') {
        return Asked::All;
    }
    let Some((first, last)) = set.trim().split_once('-') else { return Asked::All };
    match (number(first), number(last)) {
        (Some(Number::None), Some(Number::Is(length))) => match length.min(bytes) {
            0 => Asked::Outside,
            length => Asked::Part(bytes - length..bytes),
        },
        (Some(Number::Is(first)), Some(last)) => {
            let end = match last {
                Number::None => bytes,
                Number::Is(last) if last < first => return Asked::All,
                Number::Is(last) => last.saturating_add(1).min(bytes),
            };
            if first < bytes { Asked::Part(first..end) } else { Asked::Outside }
        }
        (Some(Number::None), Some(Number::None)) | (None, _) | (_, None) => Asked::All,
    }
}

enum Number {
    None,
    Is(u64),
}

/// Reads a number, or nothing. None for anything else. A number that is too large for any file stands for the largest.
fn number(text: &str) -> Option<Number> {
    let text = text.trim();
    if text.is_empty() {
        return Some(Number::None);
    }
    let is_number = text.bytes().all(|it| it.is_ascii_digit());
    is_number.then(|| Number::Is(text.parse().unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_range_is_understood() {
        let of_ten = |field| asked(Some(field), 10);
        assert_eq!(of_ten("bytes=0-"), Asked::Part(0..10));
        assert_eq!(of_ten("bytes=0-0"), Asked::Part(0..1));
        assert_eq!(of_ten("Bytes = 3 - 5 "), Asked::Part(3..6));
        assert_eq!(of_ten("bytes=9-99999999999999999999999"), Asked::Part(9..10));
        assert_eq!(of_ten("bytes=-3"), Asked::Part(7..10));
        assert_eq!(of_ten("bytes=-99"), Asked::Part(0..10));
        for outside in ["bytes=10-", "bytes=-0", "bytes=18446744073709551615-", "bytes=10-20"] {
            assert_eq!(of_ten(outside), Asked::Outside, "{outside}");
        }
        for all in [
            "",
            "bytes",
            "bytes=",
            "bytes=-",
            "bytes=5-3",
            "bytes=a-b",
            "bytes=0-1,3-4",
            "items=0-1",
            "bytes=+1-2",
        ] {
            assert_eq!(of_ten(all), Asked::All, "{all}");
        }
        assert_eq!(asked(None, 10), Asked::All);
        assert_eq!(asked(Some("bytes=0-"), 0), Asked::Outside);
        assert_eq!(asked(Some("bytes=-1"), 0), Asked::Outside);
    }

    proptest! {
        #[test]
        fn a_part_is_never_outside(field: String, first: u64, last: u64, bytes: u64) {
            for field in [field, format!("bytes={first}-{last}"), format!("bytes=-{last}"), format!("bytes={first}-")] {
                if let Asked::Part(part) = asked(Some(&field), bytes) {
                    prop_assert!(part.start < part.end && part.end <= bytes);
                }
            }
        }
    }
}
