//! The memory that a decoder takes besides the pixels that it gives. Decoders are told how much they may take, but those of JPEG and WebP
//! do not count all of it, so that it is worked out here from the head of the file, before they begin.
//!
//! A JPEG whose picture comes in several scans has all its coefficients in memory, which are two bytes for each pixel and component
//! ([ITU T.81](https://www.w3.org/Graphics/JPEG/itu-t81.pdf), annexes B and G). A WebP has planes of colour and of transparency, and the
//! pictures in it may say another size than the whole ([RFC 9649](https://www.rfc-editor.org/rfc/rfc9649)).

use std::io::{self, BufRead, Seek};

use image::ImageFormat;

/// The sides in pixels of a block of coefficients.
const BLOCK: u64 = 8;
/// The bytes of a coefficient.
const COEFFICIENT_BYTES: u64 = 2;
/// A JPEG has at most this many components, each of which has at most as many blocks as fill the picture.
const COMPONENTS_MAX: u64 = 4;
/// A component may have this many times as many blocks on a side as another one.
const SAMPLING_MAX: u64 = 4;

/// The bytes that a decoder takes for an image of these sides, besides its pixels and the file. None where the file says of itself what
/// cannot be.
pub(super) fn besides(
    format: ImageFormat,
    reader: &mut (impl BufRead + Seek),
    size: (u32, u32),
) -> Option<u64> {
    match format {
        ImageFormat::Jpeg => Some(jpeg(reader, size)),
        ImageFormat::WebP => webp(reader, size),
        _ => Some(0),
    }
}

fn jpeg(reader: &mut (impl BufRead + Seek), (width, height): (u32, u32)) -> u64 {
    // A decoder may understand a head in another way that is odd in any, so that the worst is believed of it.
    jpeg_of_head(reader, (width, height)).unwrap_or_else(|_| {
        let padded = |side: u32| u64::from(side).next_multiple_of(BLOCK * SAMPLING_MAX);
        padded(width).saturating_mul(padded(height)).saturating_mul(COMPONENTS_MAX * COEFFICIENT_BYTES)
    })
}

/// Reads the head of a JPEG up to its first scan. Errors: it ends before, or is odd.
fn jpeg_of_head(reader: &mut (impl BufRead + Seek), (width, height): (u32, u32)) -> io::Result<u64> {
    let mut frame: Option<(bool, Vec<[u64; 2]>)> = None;
    if read::<2>(reader)? != [0xff, 0xd8] {
        return Err(odd());
    }
    loop {
        let [mark, mut kind] = read(reader)?;
        while kind == 0xff {
            [kind] = read(reader)?;
        }
        if mark != 0xff {
            return Err(odd());
        }
        let length = u64::from(u16::from_be_bytes(read(reader)?));
        let Some(rest) = length.checked_sub(2) else { return Err(odd()) };
        match kind {
            // The frame: it says how the picture comes, and what it is made of.
            0xc0..=0xc2 if frame.is_none() => {
                let [_, high_y, low_y, high_x, low_x, count] = read(reader)?;
                let size =
                    (u16::from_be_bytes([high_x, low_x]).into(), u16::from_be_bytes([high_y, low_y]).into());
                let is_right = (1..=COMPONENTS_MAX).contains(&count.into()) && size == (width, height);
                if !is_right || length != 8 + 3 * u64::from(count) {
                    return Err(odd());
                }
                let mut sampling = Vec::new();
                for _ in 0..count {
                    let [_, both, _] = read(reader)?;
                    sampling.push([u64::from(both >> 4), u64::from(both & 15)]);
                }
                let is_allowed = |side: &u64| (1..=SAMPLING_MAX).contains(side);
                let is_usual = sampling.len() > 1 || sampling == [[1, 1]];
                if !is_usual || !sampling.iter().flatten().all(is_allowed) {
                    return Err(odd());
                }
                frame = Some((kind == 0xc2, sampling));
            }
            // The first scan: where it has all components, and nothing is added to it later, only a row of blocks is in memory.
            0xda => {
                let Some((is_progressive, sampling)) = frame else { return Err(odd()) };
                let [count] = read(reader)?;
                let is_whole = usize::from(count) == sampling.len();
                return Ok(if is_progressive || !is_whole {
                    coefficients((width, height), &sampling)
                } else {
                    0
                });
            }
            // A decoder reads five bytes of the first of these, however long it says that it is.
            0xe0 if length == 6 => return Err(odd()),
            0xc4 | 0xdb | 0xdd | 0xe0..=0xef | 0xfe => {
                reader.seek_relative(i64::try_from(rest).unwrap_or_default())?;
            }
            _ => return Err(odd()),
        }
    }
}

/// The bytes of all coefficients of a picture whose components have these samplings.
fn coefficients((width, height): (u32, u32), sampling: &[[u64; 2]]) -> u64 {
    let most = |side: usize| sampling.iter().filter_map(|it| it.get(side)).max().copied().unwrap_or(1);
    let units = |pixels: u32, most: u64| u64::from(pixels).div_ceil(BLOCK * most);
    let units = units(width, most(0)) * units(height, most(1));
    let blocks: u64 = sampling.iter().map(|[wide, high]| units * wide * high).sum();
    blocks * BLOCK * BLOCK * COEFFICIENT_BYTES
}

/// The bytes that a WebP takes: for each pixel one and a half for planes of colour, four for what is packed without loss and then taken
/// apart, five for transparency, and eight for the picture and its ground where there are several.
fn webp(reader: &mut (impl BufRead + Seek), size: (u32, u32)) -> Option<u64> {
    const PLANES: u64 = 2;
    const LOSSLESS: u64 = 4;
    const TRANSPARENCY: u64 = 5;
    const MOVING: u64 = 8;
    let pixels = u64::from(size.0).saturating_mul(size.1.into());
    let mut chunks = Chunks { reader, at: 12 };
    let (kind, length) = chunks.next().ok()??;
    let each = match &kind {
        b"VP8 " => PLANES,
        b"VP8L" => LOSSLESS,
        b"VP8X" => {
            let [flags] = chunks.read(0).ok()?;
            // Whatever fits better is not worth a second look at the file.
            let transparency = if flags & 0x10 == 0 { 0 } else { TRANSPARENCY };
            let moving = if flags & 0x02 == 0 { 0 } else { MOVING };
            chunks.skip(length);
            // A file that ends in the middle ends the look as one that ends where it should.
            while let Ok(Some((kind, length))) = chunks.next() {
                match &kind {
                    b"VP8 " if !chunks.fits(0, size)? => return None,
                    b"ANMF" if length % 2 == 1 || !chunks.picture_fits(size)? => return None,
                    _ => {}
                }
                chunks.skip(length);
            }
            LOSSLESS.max(PLANES + transparency) + moving
        }
        _ => return None,
    };
    Some(pixels.saturating_mul(each))
}

/// The chunks of a WebP. One of them is looked at, whose bytes begin at a place.
struct Chunks<'r, R> {
    reader: &'r mut R,
    at: u64,
}

impl<R: BufRead + Seek> Chunks<'_, R> {
    /// The kind and the length of the next chunk. None at the end of the file.
    fn next(&mut self) -> io::Result<Option<([u8; 4], u64)>> {
        let Ok(head) = self.read::<8>(0) else { return Ok(None) };
        self.at += 8;
        let [a, b, c, d, length @ ..] = head;
        Ok(Some(([a, b, c, d], u32::from_le_bytes(length).into())))
    }

    /// Goes on behind a chunk of this length.
    fn skip(&mut self, length: u64) {
        self.at += length.next_multiple_of(2);
    }

    /// Reads bytes of the chunk, from a place in it on.
    fn read<const N: usize>(&mut self, from: u64) -> io::Result<[u8; N]> {
        self.reader.seek(io::SeekFrom::Start(self.at + from))?;
        read(self.reader)
    }

    /// Whether a picture with planes of colour, which begins at a place in the chunk, is no larger than the whole. None where it is none.
    fn fits(&mut self, from: u64, (width, height): (u32, u32)) -> Option<bool> {
        let [w0, w1, h0, h1] = self.read(from + 6).ok()?;
        let side = |low, high| u32::from(u16::from_le_bytes([low, high]) & 0x3fff);
        Some(side(w0, w1) <= width && side(h0, h1) <= height)
    }

    /// Whether the picture in a chunk of an image that moves is no larger than the whole. None where it is none.
    fn picture_fits(&mut self, size: (u32, u32)) -> Option<bool> {
        // Where it is, and for how long it is shown, stands before it.
        let mut from = 16;
        let [a, b, c, d, length @ ..] = self.read::<8>(from).ok()?;
        from += 8;
        match &[a, b, c, d] {
            // One without loss has the size that stands before it, which a decoder holds against the whole.
            b"VP8L" => Some(true),
            b"VP8 " => self.fits(from, size),
            // Transparency has a chunk of its own before the colours.
            _ => self.fits(from + u64::from(u32::from_le_bytes(length)).next_multiple_of(2) + 8, size),
        }
    }
}

fn read<const N: usize>(reader: &mut impl BufRead) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    reader.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn odd() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the head of the file is odd")
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    /// The head of a JPEG of 64 by 32 pixels: a frame of this kind, with these samplings, and a scan of so many components.
    fn head(kind: u8, sampling: &[u8], scanned: u8) -> Vec<u8> {
        let mut bytes = b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0".to_vec();
        let count = u8::try_from(sampling.len()).unwrap();
        bytes.extend([0xff, 0xff, kind, 0, 8 + 3 * count, 8, 0, 32, 0, 64, count]);
        for (id, both) in (1..).zip(sampling) {
            bytes.extend([id, *both, 0]);
        }
        bytes.extend([0xff, 0xda, 0, 6 + 2 * scanned, scanned]);
        bytes
    }

    fn of_jpeg(bytes: &[u8]) -> u64 {
        besides(ImageFormat::Jpeg, &mut Cursor::new(bytes), (64, 32)).unwrap()
    }

    const PIXELS: u64 = 64 * 32;
    const WORST: u64 = PIXELS * 8;

    #[test]
    fn a_jpeg_in_several_scans_has_all_its_coefficients_in_memory() {
        for (kind, sampling, scanned, bytes) in [
            (0xc0, &[0x11, 0x11, 0x11][..], 3, 0),
            (0xc1, &[0x22, 0x11, 0x11], 3, 0),
            (0xc2, &[0x11, 0x11, 0x11], 3, PIXELS * 6),
            (0xc2, &[0x22, 0x11, 0x11], 3, PIXELS * 3),
            (0xc2, &[0x11, 0x11, 0x11, 0x11], 4, PIXELS * 8),
            (0xc2, &[0x11], 1, PIXELS * 2),
            (0xc0, &[0x11, 0x11, 0x11], 1, PIXELS * 6),
            (0xc0, &[0x21, 0x11, 0x11], 2, PIXELS * 4),
        ] {
            assert_eq!(of_jpeg(&head(kind, sampling, scanned)), bytes, "{kind:x} {sampling:x?} {scanned}");
        }
    }

    #[test]
    fn the_worst_is_believed_of_an_odd_jpeg() {
        let right = head(0xc0, &[0x11, 0x11, 0x11], 3);
        assert_eq!(of_jpeg(&right), 0);
        for end in 0..right.len() {
            assert_eq!(of_jpeg(&right[..end]), WORST, "it ends after {end} bytes");
        }
        let two_frames = [&right[..41], &right[20..]].concat();
        let no_frame = [&right[..20], &right[40..]].concat();
        let garbage = [&right[..20], b"\0\0", &right[20..]].concat();
        let mut short = right.clone();
        short[5] = 6;
        let wide = head(0xc0, &[0x51, 0x11, 0x11], 3);
        let other_size = [&right[..27], &[33], &right[28..]].concat();
        for odd in [&two_frames, &no_frame, &garbage, &short, &wide, &other_size, &head(0xc0, &[0x22], 1)] {
            assert_eq!(of_jpeg(odd), WORST, "{odd:x?}");
        }
        for unknown in [0xc3, 0xc9, 0xcc, 0xd8, 0xd9, 0x01] {
            assert_eq!(of_jpeg(&head(unknown, &[0x11, 0x11, 0x11], 3)), WORST, "{unknown:x}");
        }
    }

    fn chunk(kind: &[u8; 4], bytes: &[u8]) -> Vec<u8> {
        [&kind[..], &u32::try_from(bytes.len()).unwrap().to_le_bytes(), bytes].concat()
    }

    /// A picture with planes of colour that says these sides.
    fn colours(width: u16, height: u16) -> Vec<u8> {
        let sides = [width.to_le_bytes(), height.to_le_bytes()].concat();
        chunk(b"VP8 ", &[&[0, 0, 0, 0x9d, 1, 0x2a][..], &sides].concat())
    }

    fn of_webp(flags: Option<u8>, chunks: &[Vec<u8>]) -> Option<u64> {
        let extended = flags.map(|flags| chunk(b"VP8X", &[flags, 0, 0, 0, 63, 0, 0, 31, 0, 0]));
        let file = [b"RIFF\0\0\0\0WEBP".to_vec(), extended.unwrap_or_default(), chunks.concat()].concat();
        besides(ImageFormat::WebP, &mut Cursor::new(file), (64, 32))
    }

    #[test]
    fn a_webp_takes_as_much_as_its_parts_do() {
        let lossless = chunk(b"VP8L", &[0x2f, 0, 0, 0, 0]);
        let transparent = chunk(b"ALPH", &[0; 4]);
        let moving = |picture: &[u8]| chunk(b"ANMF", &[&[0; 16], picture].concat());
        assert_eq!(of_webp(None, &[colours(64, 32)]), Some(PIXELS * 2));
        assert_eq!(of_webp(None, std::slice::from_ref(&lossless)), Some(PIXELS * 4));
        assert_eq!(of_webp(Some(0), &[colours(64, 32)]), Some(PIXELS * 4));
        assert_eq!(of_webp(Some(0x10), &[transparent.clone(), colours(64, 32)]), Some(PIXELS * 7));
        let with_transparency = [transparent, colours(9, 9)].concat();
        let pictures = [moving(&colours(10, 10)), moving(&with_transparency), moving(&lossless[..12])];
        assert_eq!(of_webp(Some(0x12), &pictures), Some(PIXELS * 15));
    }

    #[test]
    fn a_picture_that_is_larger_than_the_whole_is_refused_wherever_it_is() {
        let huge = colours(16_383, 16_383);
        let moving = |picture: &[u8]| chunk(b"ANMF", &[&[0; 16], picture].concat());
        let behind = [chunk(b"ALPH", &[0; 4]), huge.clone()].concat();
        let fine = colours(64, 32);
        for chunks in [
            vec![huge.clone()],
            vec![fine.clone(), huge.clone()],
            vec![moving(&fine), moving(&huge)],
            vec![moving(&behind)],
            vec![moving(&[fine.clone(), vec![0]].concat())],
            vec![colours(65, 32)],
            vec![colours(64, 33)],
        ] {
            assert_eq!(of_webp(Some(0x12), &chunks), None, "{chunks:x?}");
        }
        assert!(of_webp(Some(0x12), &[moving(&fine)]).is_some());
        assert_eq!(of_webp(None, &[chunk(b"VP9 ", &[0; 8])]), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_fail(rest: Vec<u8>, size: (u32, u32)) {
            for (format, begin) in [
                (ImageFormat::Jpeg, &b"\xff\xd8"[..]),
                (ImageFormat::WebP, b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\x12\0\0\0\0\0\0\0\0\0ANMF"),
                (ImageFormat::WebP, b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\x12\0\0\0\0\0\0\0\0\0VP8 "),
            ] {
                besides(format, &mut Cursor::new([begin, &rest].concat()), size);
            }
        }
    }
}
