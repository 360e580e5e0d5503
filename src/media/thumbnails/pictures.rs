//! Looks at the pictures within a GIF before a decoder does. A file says how large the whole is, and each of its pictures says its own size
//! besides: a decoder unpacks a picture by its own size ([GIF89a](https://www.w3.org/Graphics/GIF/spec-gif89a.txt)). `weight.rs` does the
//! same for WebP.

use std::io::{self, BufRead, Read, Seek};

use image::ImageFormat;

use crate::media::{
    blobs::Object,
    thumbnails::{NotMade, no_image},
};

/// The pictures of a GIF.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pictures {
    /// The number of them, as far as they were looked at.
    pub(super) count: u64,
    /// One of them is larger than the whole.
    is_too_large: bool,
}

/// Counts the pictures of a GIF; of others nothing is said. Errors: one of them is larger than the whole.
pub(super) fn look(object: &Object, format: ImageFormat) -> Result<Pictures, NotMade> {
    let reader = object.reader().map_err(no_image)?;
    let mut pictures = Pictures::default();
    let looked = match format {
        ImageFormat::Gif => look_at_gif(reader, &mut pictures),
        _ => Ok(()),
    };
    match looked {
        // A decoder goes as far as the file does, too.
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(no_image(error)),
        _ if pictures.is_too_large => Err(no_image("a picture in it is larger than the whole")),
        _ => Ok(pictures),
    }
}

impl Pictures {
    fn add(&mut self, sides: (u32, u32), whole: (u32, u32)) {
        self.count += 1;
        self.is_too_large |= sides.0 > whole.0 || sides.1 > whole.1;
    }
}

fn bytes<const N: usize>(reader: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    reader.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn look_at_gif(mut reader: impl BufRead + Seek, pictures: &mut Pictures) -> io::Result<()> {
    let [_, _, _, _, _, _, w0, w1, h0, h1, flags, _, _] = bytes(&mut reader)?;
    let side = |low, high| u32::from(u16::from_le_bytes([low, high]));
    let whole = (side(w0, w1), side(h0, h1));
    skip_colours(&mut reader, flags)?;
    loop {
        match bytes(&mut reader)? {
            // An extension: its label, then blocks.
            [0x21] => {
                let [_] = bytes(&mut reader)?;
            }
            // A picture: where it lies, its sides, and how its pixels are coded.
            [0x2c] => {
                let [_, _, _, _, w0, w1, h0, h1, flags] = bytes(&mut reader)?;
                pictures.add((side(w0, w1), side(h0, h1)), whole);
                skip_colours(&mut reader, flags)?;
                let [_] = bytes(&mut reader)?;
            }
            // The end, or what a decoder does not go beyond either.
            _ => return Ok(()),
        }
        loop {
            match bytes(&mut reader)? {
                [0] => break,
                [length] => reader.seek_relative(length.into())?,
            }
        }
    }
}

fn skip_colours(reader: &mut impl Seek, flags: u8) -> io::Result<()> {
    if flags & 0x80 != 0 {
        reader.seek_relative(3 << ((flags & 7) + 1))?;
    }
    Ok(())
}
