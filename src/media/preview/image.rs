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
        ("image/avif", avif(bytes))
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

/// The boxes of a file or of a box, each with its kind and what is in it (ISO/IEC 14496-12, section 4.2). One that is cut off is what there
/// is of it.
fn boxes(bytes: &[u8]) -> impl Iterator<Item = ([u8; 4], &[u8])> {
    let mut left = bytes;
    std::iter::from_fn(move || {
        let (length, kind): (u32, [u8; 4]) = (u32::from_be_bytes(array(left, 0)?), array(left, 4)?);
        let (begin, end) = match length {
            // The last box goes to the end of the file.
            0 => (8, u64::MAX),
            1 => (16, u64::from_be_bytes(array(left, 8)?)),
            length => (8, length.into()),
        };
        let end = usize::try_from(end).unwrap_or(usize::MAX).max(begin).min(left.len());
        let inside = left.get(begin..end)?;
        left = left.get(end..)?;
        Some((kind, inside))
    })
}

fn find_box<'b>(bytes: &'b [u8], kind: &[u8; 4]) -> Option<&'b [u8]> {
    boxes(bytes).find(|(other, _)| other == kind).map(|(_, inside)| inside)
}

/// The sides of the largest picture that is described: the others are parts of it, or smaller ones.
fn avif(bytes: &[u8]) -> Option<(u32, u32)> {
    let meta = find_box(bytes, b"meta")?.get(4..)?;
    let described = find_box(find_box(meta, b"iprp")?, b"ipco")?;
    let sides = boxes(described).filter(|(kind, _)| kind == b"ispe").filter_map(|(_, inside)| {
        Some((u32::from_be_bytes(array(inside, 4)?), u32::from_be_bytes(array(inside, 8)?)))
    });
    sides.max_by_key(|(width, height)| u64::from(*width) * u64::from(*height))
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

    fn boxed(kind: &[u8; 4], inside: &[u8]) -> Vec<u8> {
        [&u32::try_from(inside.len() + 8).unwrap().to_be_bytes()[..], kind, inside].concat()
    }

    #[test]
    fn an_avif_is_as_large_as_its_largest_picture() {
        let sides = |width: u32, height: u32| {
            boxed(b"ispe", &[&[0; 4][..], &width.to_be_bytes(), &height.to_be_bytes()].concat())
        };
        let begin = boxed(b"ftyp", b"avif\0\0\0\0mif1");
        let described = boxed(b"ipco", &[sides(64, 64), boxed(b"pixi", &[0; 8]), sides(640, 480)].concat());
        let iprp = boxed(b"iprp", &[described, boxed(b"ipma", &[])].concat());
        let meta = boxed(b"meta", &[[0; 4].to_vec(), boxed(b"hdlr", &[0; 24]), iprp].concat());
        let whole = [begin, meta, boxed(b"mdat", &[7; 99])].concat();
        assert_eq!(probed(&whole), Some(("image/avif", Some((640, 480)))));
        for end in 12..whole.len() {
            assert_eq!(probed(&whole[..end]).unwrap().0, "image/avif");
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
                b"\0\0\0\x0cftypavif\0\0\x01\0meta\0\0\0\0\0\0\0\0iprp\0\0\0\0ipco",
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
