//! Makes thumbnails of images.
//!
//! An image comes from anybody, so that its size is read and judged before anything of it is unpacked, and whatever a decoder does with
//! it ends here. Bytes count as what they are, and never as what their content type says.
//!
//! Specification: client-server API, "Thumbnails".

mod blurhash;
mod compress;
mod draw;
mod moving;
mod pictures;
#[cfg(test)]
mod tests;
mod weight;

use std::panic::{self, AssertUnwindSafe};

use image::{ImageDecoder, ImageFormat, ImageReader, Limits, metadata::Orientation};

pub use self::compress::Compression;
use crate::{
    error::{Refusal, Result},
    media::{
        blobs::Object,
        kinds,
        preview::image::{PREFIX_BYTES, probe},
    },
};

/// A thumbnail has at most this many pixels on each side. Whoever wants a larger one is given the image itself.
const SIDE_MAX: u32 = 2048;
/// Thumbnails are made of files of at most this many bytes, because some decoders take a file into memory.
pub const SOURCE_BYTES_MAX: u64 = 64 << 20;
/// Each pixel takes this many bytes once an image is unpacked.
const PIXEL_BYTES: u64 = 4;
/// The content type of images that are known, and of which no thumbnails are made: what unpacks them is written in C.
const AVIF: &str = "image/avif";
/// The bytes that a decoder may take besides the pixels.
const BESIDES_BYTES: u64 = 32 << 20;

/// The thumbnails that the specification lists, which clients ask for most.
const LISTED: [(u32, u32, Method); 5] = [
    (32, 32, Method::Crop),
    (96, 96, Method::Crop),
    (320, 240, Method::Scale),
    (640, 480, Method::Scale),
    (800, 600, Method::Scale),
];
/// The longer sides of the other thumbnails that there are.
const SIDES: [u32; 10] = [32, 96, 160, 320, 480, 640, 800, 1280, 1600, SIDE_MAX];
/// The shapes of the other cropped thumbnails that there are, as width and height.
const SHAPES: [(u32, u32); 7] = [(1, 1), (4, 3), (3, 4), (16, 9), (9, 16), (2, 1), (1, 2)];
/// Square thumbnails up to this side are as usual as the listed ones: they are avatars on screens with many pixels.
const USUAL_SIDE_MAX: u32 = 640;

/// The way in which an image is made smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The thumbnail has the sides that are asked for, and what does not fit is cut off.
    Crop,
    /// The thumbnail has the shape of the image, and fits into the sides that are asked for.
    Scale,
}

/// A thumbnail that somebody asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The width in pixels.
    width: u32,
    /// The height in pixels.
    height: u32,
    method: Method,
    /// Whether it moves, if the image does.
    is_animated: bool,
}

impl Wanted {
    /// Reads what a request asks for. Errors: 400 `M_INVALID_PARAM` for a side without a pixel or a method that is none.
    pub fn new(width: u64, height: u64, method: Option<&str>, is_animated: bool) -> Result<Self> {
        let method = match method {
            Some("crop") => Method::Crop,
            Some("scale") | None => Method::Scale,
            Some(_) => return Err(Refusal::invalid_param("`method` is neither `crop` nor `scale`.").into()),
        };
        let side = |name: &str, side: u64| {
            let is_none = || Refusal::invalid_param(format!("`{name}` is not a number of pixels from 1 on."));
            if side == 0 { Err(is_none()) } else { Ok(u32::try_from(side).unwrap_or(u32::MAX)) }
        };
        Ok(Self { width: side("width", width)?, height: side("height", height)?, method, is_animated })
    }

    /// The thumbnail that is given in place of this one: at least as large, and one of few, so that nobody has any number of them made of
    /// one image. The specification lets a thumbnail be larger than asked for, and a cropped one be close to the shape.
    pub fn rounded(self) -> Self {
        let Self { width, height, method, .. } = self;
        if LISTED.contains(&(width, height, method)) {
            return self;
        }
        let side = |least: u64| SIDES.into_iter().find(|side| u64::from(*side) >= least);
        let beyond = Self { width: SIDE_MAX + 1, height: SIDE_MAX + 1, ..self };
        if width > SIDE_MAX || height > SIDE_MAX {
            return beyond;
        }
        match method {
            Method::Scale => match side(width.max(height).into()) {
                Some(side) => Self { width: side, height: side, ..self },
                None => beyond,
            },
            Method::Crop => {
                let (wide, high) = nearest_shape(width, height);
                let long = u64::from(wide.max(high));
                let least = |side: u32, of: u32| (u64::from(side) * long).div_ceil(of.into());
                match side(least(width, wide).max(least(height, high))) {
                    Some(side) => {
                        let part = |of: u32| u32::try_from(u64::from(side) * u64::from(of) / long);
                        let part = |of: u32| part(of).unwrap_or(side).max(1);
                        Self { width: part(wide), height: part(high), ..self }
                    }
                    None => beyond,
                }
            }
        }
    }

    /// Whether it is one of the few that most clients ask for.
    pub fn is_usual(&self) -> bool {
        LISTED.contains(&(self.width, self.height, self.method))
            || (self.width == self.height && self.width <= USUAL_SIDE_MAX)
    }

    /// The name under which such a thumbnail of an item is kept.
    pub fn kind(&self) -> String {
        let method = match self.method {
            Method::Crop => "crop",
            Method::Scale => "scale",
        };
        let moves = if self.is_animated { " animated" } else { "" };
        format!("{}x{} {method}{moves}", self.width, self.height)
    }
}

/// The shape that a cropped thumbnail of these sides has.
fn nearest_shape(width: u32, height: u32) -> (u32, u32) {
    // One side of the other shape's rectangle is longer by this many thousandths.
    let apart = |(wide, high): &(u32, u32)| {
        let (one, other) = (u64::from(width) * u64::from(*high), u64::from(height) * u64::from(*wide));
        (one.max(other) * 1000).checked_div(one.min(other)).unwrap_or(u64::MAX)
    };
    SHAPES.into_iter().min_by_key(apart).unwrap_or((1, 1))
}

/// A thumbnail, or what is given in place of one.
#[derive(Debug)]
pub enum Made {
    /// The image itself, of this content type, because it is no larger than what is asked for.
    Original(&'static str),
    /// The bytes of a thumbnail, its content type, and that of the image.
    Thumbnail(Vec<u8>, &'static str, &'static str),
}

/// No thumbnail can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotMade {
    /// The file is no image, none of a known format, or a broken one.
    NoImage,
    /// The image has more pixels, or its file more bytes, than may be.
    TooLarge,
    /// It is an AVIF, which nothing here unpacks.
    Avif,
}

/// An image that was looked at, and of which nothing is unpacked yet.
struct Source<'o> {
    object: &'o Object,
    format: ImageFormat,
    pixels_max: u64,
    /// Its sides as they are stored.
    width: u32,
    height: u32,
    /// The turn by which it is shown.
    orientation: Orientation,
    is_animated: bool,
}

/// The sizes by which an image becomes a thumbnail, in the orientation in which it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    /// The whole image is made this large.
    whole: (u32, u32),
    /// Its middle of this size is kept.
    kept: (u32, u32),
}

/// Makes a thumbnail of an image of at most so many pixels. It takes long, and much memory.
pub fn make(object: &Object, wanted: Wanted, pixels_max: u32) -> Result<Made, NotMade> {
    // A decoder that panics has met a file that it does not understand.
    let make = AssertUnwindSafe(|| match Source::open(object, pixels_max.into()) {
        // One that is small enough needs no thumbnail.
        Err(NotMade::Avif) => avif(object, wanted, pixels_max.into()),
        source => source?.make(wanted),
    });
    panic::catch_unwind(make).unwrap_or(Err(NotMade::NoImage))
}

/// The BlurHash of an image of at most so many pixels. It takes as long, and as much memory, as making a thumbnail.
pub fn blurhash(object: &Object, pixels_max: u32) -> Result<String, NotMade> {
    let hash = AssertUnwindSafe(|| blurhash::of(&Source::open(object, pixels_max.into())?));
    panic::catch_unwind(hash).unwrap_or(Err(NotMade::NoImage))
}

/// Makes a smaller file of an image: its bytes and their content type. None where the image stays as it is. It takes as long as making a
/// thumbnail, and twice as much memory where the image is turned.
pub fn compress(object: &Object, how: Compression) -> Result<Option<(Vec<u8>, &'static str)>, NotMade> {
    let make = AssertUnwindSafe(|| compress::compress(&Source::open(object, how.pixels_max.into())?, how));
    panic::catch_unwind(make).unwrap_or(Err(NotMade::NoImage))
}

/// Gives an AVIF itself where it is no larger than what is asked for.
fn avif(object: &Object, wanted: Wanted, pixels_max: u64) -> Result<Made, NotMade> {
    let length = object.bytes().min(PREFIX_BYTES as u64);
    let begin = object.read(0, usize::try_from(length).unwrap_or_default()).map_err(no_image)?;
    let (width, height) = probe(&begin).and_then(|probed| probed.size).ok_or(NotMade::Avif)?;
    if u64::from(width) * u64::from(height) > pixels_max {
        return Err(NotMade::TooLarge);
    }
    let is_shown = wanted.is_animated || begin.get(8..12) != Some(b"avis");
    match is_shown && width <= wanted.width && height <= wanted.height {
        true => Ok(Made::Original(AVIF)),
        false => Err(NotMade::Avif),
    }
}

/// Whether a file that begins like this may be an image of which there are thumbnails, or an AVIF.
pub fn begins_as_image(begin: &[u8]) -> bool {
    let is_drawn = image::guess_format(begin).is_ok_and(|format| content_type(format).is_some());
    is_drawn || probe(begin).is_some_and(|probed| probed.content_type == AVIF)
}

/// Whether a file begins as an AVIF does.
fn is_avif(object: &Object) -> std::io::Result<bool> {
    let begin = object.read(0, usize::try_from(object.bytes().min(12)).unwrap_or_default())?;
    Ok(probe(&begin).is_some_and(|probed| probed.content_type == AVIF))
}

impl<'o> Source<'o> {
    fn open(object: &'o Object, pixels_max: u64) -> Result<Self, NotMade> {
        if object.bytes() > SOURCE_BYTES_MAX {
            return Err(NotMade::TooLarge);
        }
        if is_avif(object).map_err(no_image)? {
            return Err(NotMade::Avif);
        }
        let reader = ImageReader::new(object.reader().map_err(no_image)?);
        let mut reader = reader.with_guessed_format().map_err(no_image)?;
        let format = reader.format().filter(|format| content_type(*format).is_some());
        let format = format.ok_or(NotMade::NoImage)?;
        let pictures = pictures::look(object, format)?;
        let mut source = Self {
            object,
            format,
            pixels_max,
            width: 0,
            height: 0,
            orientation: Orientation::NoTransforms,
            is_animated: false,
        };
        reader.limits(source.limits());
        let mut decoder = reader.into_decoder().map_err(not_made)?;
        (source.width, source.height) = decoder.dimensions();
        if source.width == 0 || source.height == 0 {
            return Err(NotMade::NoImage);
        }
        let (pixels, bytes) =
            (u64::from(source.width).saturating_mul(source.height.into()), decoder.total_bytes());
        if pixels > pixels_max || bytes > pixels_max.saturating_mul(PIXEL_BYTES) {
            return Err(NotMade::TooLarge);
        }
        let mut head = object.reader().map_err(no_image)?;
        let besides = weight::besides(format, &mut head, (source.width, source.height));
        if bytes.saturating_add(besides.ok_or(NotMade::NoImage)?) > source.bytes_max() {
            return Err(NotMade::TooLarge);
        }
        // An image that does not say how it is turned is not.
        source.orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
        drop(decoder);
        source.is_animated = moving::is_animated(&source, pictures);
        Ok(source)
    }

    /// The bytes that a decoder may take, besides those of the file.
    fn bytes_max(&self) -> u64 {
        self.pixels_max.saturating_mul(PIXEL_BYTES).saturating_add(BESIDES_BYTES)
    }

    /// The bounds of a decoder. Some decoders count only a part of it; what they take besides is judged before (`weight.rs`).
    fn limits(&self) -> Limits {
        let mut limits = Limits::no_limits();
        limits.max_alloc = Some(self.bytes_max());
        limits
    }

    /// Whether the sides change places when the image is shown.
    fn is_lying(&self) -> bool {
        match self.orientation {
            Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH => true,
            Orientation::NoTransforms
            | Orientation::Rotate180
            | Orientation::FlipHorizontal
            | Orientation::FlipVertical => false,
        }
    }

    fn make(&self, wanted: Wanted) -> Result<Made, NotMade> {
        let content_type = content_type(self.format).ok_or(NotMade::NoImage)?;
        let (width, height) = match self.is_lying() {
            true => (wanted.height, wanted.width),
            false => (wanted.width, wanted.height),
        };
        let is_original =
            width > SIDE_MAX || height > SIDE_MAX || (self.width <= width && self.height <= height);
        // An image that moves is given as it is only to those who want that.
        if is_original && (wanted.is_animated || !self.is_animated) {
            return Ok(Made::Original(content_type));
        }
        let plan = match is_original {
            true => {
                let whole = fit((self.width, self.height), (width.min(SIDE_MAX), height.min(SIDE_MAX)));
                Plan { whole, kept: whole }
            }
            false => plan((self.width, self.height), (width, height), wanted.method),
        };
        if wanted.is_animated
            && self.is_animated
            && let Some(moving) = moving::draw(self, plan)?
        {
            return Ok(Made::Thumbnail(moving, "image/gif", content_type));
        }
        draw::draw(self, plan).map(|(bytes, drawn_type)| Made::Thumbnail(bytes, drawn_type, content_type))
    }
}

/// The content type of a format of which thumbnails are made.
fn content_type(format: ImageFormat) -> Option<&'static str> {
    match format {
        ImageFormat::Jpeg => Some("image/jpeg"),
        ImageFormat::Png => Some("image/png"),
        ImageFormat::Gif => Some("image/gif"),
        ImageFormat::WebP => Some("image/webp"),
        _ => None,
    }
}

/// The size that an image has when it is made to fit into these sides, and never larger than it is.
fn fit((width, height): (u32, u32), (wide, high): (u32, u32)) -> (u32, u32) {
    if width <= wide && height <= high {
        return (width, height);
    }
    let (width, height, wide, high) = (u64::from(width), u64::from(height), u64::from(wide), u64::from(high));
    let scaled =
        |side: u64, to: u64, of: u64| u32::try_from(((side * to + of / 2) / of).max(1)).unwrap_or(u32::MAX);
    // The side that is the longer one, compared with what is asked for, becomes exactly as long as that.
    if width * high >= height * wide {
        (u32::try_from(wide).unwrap_or(u32::MAX), scaled(height, wide, width))
    } else {
        (scaled(width, high, height), u32::try_from(high).unwrap_or(u32::MAX))
    }
}

/// The sizes by which an image that is larger than what is asked for, on one side at least, becomes the thumbnail.
fn plan((width, height): (u32, u32), (wide, high): (u32, u32), method: Method) -> Plan {
    match method {
        Method::Scale => {
            let whole = fit((width, height), (wide, high));
            Plan { whole, kept: whole }
        }
        // It cannot cover what is asked for without becoming larger than it is.
        Method::Crop if width <= wide || height <= high => {
            Plan { whole: (width, height), kept: (width.min(wide), height.min(high)) }
        }
        Method::Crop => {
            let (width, height) = (u64::from(width), u64::from(height));
            let (w, h) = (u64::from(wide), u64::from(high));
            let scaled =
                |side: u64, to: u64, of: u64| u32::try_from((side * to).div_ceil(of)).unwrap_or(u32::MAX);
            let whole = match width * h >= height * w {
                true => (scaled(width, h, height).max(wide), high),
                false => (wide, scaled(height, w, width).max(high)),
            };
            Plan { whole, kept: (wide, high) }
        }
    }
}

fn no_image(error: impl std::fmt::Display) -> NotMade {
    tracing::debug!(%error, reason = "it cannot be read as an image", "no thumbnail is made");
    NotMade::NoImage
}

fn not_made(error: image::ImageError) -> NotMade {
    match error {
        image::ImageError::Limits(_) => NotMade::TooLarge,
        other => no_image(other),
    }
}

/// Refuses a thumbnail that cannot be made: 400 `M_UNKNOWN`, as the specification has it.
pub fn no_thumbnail() -> Refusal {
    Refusal::new(ruma::api::error::ErrorKind::Unknown, "There can be no thumbnail of this file.")
}

/// Refuses a thumbnail of an AVIF: 400 `M_UNKNOWN`, too.
pub fn no_thumbnail_of_avif() -> Refusal {
    let why = "This server makes no thumbnails of AVIF images. Ask for the file itself.";
    Refusal::new(ruma::api::error::ErrorKind::Unknown, why)
}

/// The name of the file in which a thumbnail of this type is saved.
pub fn file_name(content_type: &str) -> String {
    let essence = kinds::essence(content_type);
    format!("thumbnail.{}", essence.strip_prefix("image/").unwrap_or("bin"))
}
