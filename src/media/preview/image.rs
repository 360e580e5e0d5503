//! The kind and the size of an image, by its first bytes: what a page says of it is not believed.

/// The kind and the size are found within this many bytes, unless a photo begins with much about itself.
pub const PREFIX_BYTES: usize = 256 * 1_024;

/// A kind of image that clients show and nothing of which runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probed {
    /// The content type of such bytes.
    pub content_type: &'static str,
    /// The width and the height in pixels, where they were found.
    pub size: Option<(u32, u32)>,
}

/// Looks at the first bytes of what should be an image. None for what is none, or is of a kind that clients do not show.
pub fn probe(bytes: &[u8]) -> Option<Probed> {
    let (content_type, size) = if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        ("image/png", png(bytes))
    } else if bytes.starts_with(b"GIF87a") || bytes.starts_with(b"GIF89a") {
        ("image/gif", gif(bytes))
    } else if bytes.starts_with(b"\xff\xd8\xff") {
        ("image/jpeg", jpeg(bytes))
    } else if bytes.starts_with(b"RIFF") && bytes.get(8..12) == Some(b"WEBP") {
        ("image/webp", webp(bytes))
    } else if bytes.get(4..8) == Some(b"ftyp") && matches!(bytes.get(8..12), Some(b"avif" | b"avis")) {
        ("image/avif", None)
    } else {
        return None;
    };
    // An image that has no pixels shows nothing.
    Some(Probed { content_type, size: size.filter(|(width, height)| *width > 0 && *height > 0) })
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn png(bytes: &[u8]) -> Option<(u32, u32)> {
    let size = (u32::from_be_bytes(array(bytes, 16)?), u32::from_be_bytes(array(bytes, 20)?));
    (bytes.get(12..16)? == b"IHDR").then_some(size)
}

fn gif(bytes: &[u8]) -> Option<(u32, u32)> {
    let side = |at| Some(u32::from(u16::from_le_bytes(array(bytes, at)?)));
    Some((side(6)?, side(8)?))
}

/// Walks over the segments up to the one that begins the picture itself (ITU T.81, annex B). Each step goes on by two bytes or more.
fn jpeg(bytes: &[u8]) -> Option<(u32, u32)> {
    let mut at = 2;
    loop {
        let [mark, kind] = array(bytes, at)?;
        if mark != 0xff {
            return None;
        }
        match kind {
            // A byte that only fills up.
            0xff => {
                at += 1;
                continue;
            }
            // Marks without a segment.
            0x01 | 0xd0..=0xd8 => {
                at += 2;
                continue;
            }
            0xc0..=0xc3 | 0xc5..=0xc7 | 0xc9..=0xcb | 0xcd..=0xcf => {
                let side = |at| Some(u32::from(u16::from_be_bytes(array(bytes, at)?)));
                return Some((side(at + 7)?, side(at + 5)?));
            }
            // The picture begins, or has ended.
            0xd9 | 0xda => return None,
            _ => {}
        }
        let length = usize::from(u16::from_be_bytes(array(bytes, at + 2)?));
        if length < 2 {
            return None;
        }
        at += 2 + length;
    }
}

fn webp(bytes: &[u8]) -> Option<(u32, u32)> {
    match bytes.get(12..16)? {
        b"VP8X" => {
            let side = |at| {
                let [low, middle, high] = array(bytes, at)?;
                Some(u32::from_le_bytes([low, middle, high, 0]) + 1)
            };
            Some((side(24)?, side(27)?))
        }
        b"VP8L" => {
            let sides = u32::from_le_bytes(array(bytes, 21)?);
            Some(((sides & 0x3fff) + 1, (sides >> 14 & 0x3fff) + 1))
        }
        b"VP8 " => {
            let side = |at| Some(u32::from(u16::from_le_bytes(array(bytes, at)?) & 0x3fff));
            Some((side(26)?, side(28)?))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn probed(bytes: &[u8]) -> Option<(&'static str, Option<(u32, u32)>)> {
        probe(bytes).map(|it| (it.content_type, it.size))
    }

    #[test]
    fn kinds_and_sizes_are_found_in_the_first_bytes() {
        let jpeg = b"\xff\xd8\xff\xe0\0\x04ab\xff\xff\xdb\0\x03x\xff\xc2\0\x11\x08\0\x30\0\x40\x03";
        for (bytes, expected) in [
            (
                &b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x10\0\0\0\x20\x08\x06"[..],
                ("image/png", Some((16, 32))),
            ),
            (b"\x89PNG\r\n\x1a\n", ("image/png", None)),
            (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\0\0\0\0\x20", ("image/png", None)),
            (b"GIF89a\x01\x02\x03\0", ("image/gif", Some((513, 3)))),
            (jpeg, ("image/jpeg", Some((64, 48)))),
            (b"\xff\xd8\xff\xe0\0\0\0\0", ("image/jpeg", None)),
            (b"\xff\xd8\xff\xda\0\x02", ("image/jpeg", None)),
            (b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\x0f\0\0\x1f\0\0", ("image/webp", Some((16, 32)))),
            (b"RIFF\0\0\0\0WEBPVP8L\x05\0\0\0\x2f\x0f\xc0\x07\0", ("image/webp", Some((16, 32)))),
            (b"RIFF\0\0\0\0WEBPVP8 \x05\0\0\0\0\0\0\x9d\x01\x2a\x10\0\x20\0", ("image/webp", Some((16, 32)))),
            (b"\0\0\0\x20ftypavif\0\0\0\0", ("image/avif", None)),
        ] {
            assert_eq!(probed(bytes), Some(expected), "{bytes:?}");
        }
    }

    #[test]
    fn what_is_no_image_that_clients_show_is_none() {
        for bytes in [
            &b""[..],
            b"<svg xmlns=",
            b"<?xml version=",
            b"<!doctype html>",
            b"BM\0\0",
            b"II*\0",
            b"%PDF-1.7",
            b"\0\0\0\x20ftypmp42",
            b"RIFF\0\0\0\0WAVE",
            b"\xff\xd8",
        ] {
            assert_eq!(probed(bytes), None, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_fail(
            kind in prop::sample::select(vec![
                &b"\x89PNG\r\n\x1a\n"[..], b"GIF89a", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8X", b"RIFF\0\0\0\0WEBPVP8L", b"RIFF\0\0\0\0WEBPVP8 ",
            ]),
            rest: Vec<u8>,
        ) {
            probe(&[kind, &rest].concat());
        }
    }

    #[test]
    fn a_photo_of_nothing_but_fill_ends() {
        assert_eq!(
            probed(&[b"\xff\xd8".as_slice(), &[0xff; PREFIX_BYTES]].concat()),
            Some(("image/jpeg", None))
        );
    }
}
