//! Draws thumbnails of images that move (MSC2705), as GIF.

use image::{
    AnimationDecoder, DynamicImage, Frame, Frames, ImageDecoder, ImageFormat, ImageResult,
    codecs::{
        gif::{GifDecoder, GifEncoder, Repeat},
        png::PngDecoder,
        webp::WebPDecoder,
    },
};

use crate::media::thumbnails::{NotMade, Plan, Source, draw::shrink, no_image, not_made, pictures::Pictures};

/// A thumbnail that moves has at most this many pictures; an image of more does not move there.
const FRAMES_MAX: usize = 128;
/// It has at most this many pixels in all its pictures, because each takes long to draw.
const PIXELS_MAX: u64 = 16_000_000;
/// The image may have this many times as many pixels in all its pictures as one picture may have.
const TIMES_MAX: u64 = 8;
/// How hard the encoder looks for colours, from 1 (hardest) to 30.
const SPEED: i32 = 20;

/// Whether an image has more than one picture. What cannot be read has not.
pub(super) fn is_animated(source: &Source<'_>, pictures: Pictures) -> bool {
    let Ok(reader) = source.object.reader() else { return false };
    let is_animated = match source.format {
        ImageFormat::Gif => Ok(pictures.count > 1),
        ImageFormat::WebP => WebPDecoder::new(reader).map(|decoder| decoder.has_animation()),
        ImageFormat::Png => {
            PngDecoder::with_limits(reader, source.limits()).and_then(|decoder| decoder.is_apng())
        }
        _ => Ok(false),
    };
    is_animated.unwrap_or(false)
}

/// The pictures of a GIF or WebP.
fn frames<'s>(source: &Source<'s>) -> ImageResult<Frames<'s>> {
    let reader = source.object.reader()?;
    match source.format {
        ImageFormat::WebP => {
            let mut decoder = WebPDecoder::new(reader)?;
            decoder.set_limits(source.limits())?;
            Ok(decoder.into_frames())
        }
        ImageFormat::Png => Ok(PngDecoder::with_limits(reader, source.limits())?.apng()?.into_frames()),
        _ => {
            let mut decoder = GifDecoder::new(reader)?;
            decoder.set_limits(source.limits())?;
            Ok(decoder.into_frames())
        }
    }
}

/// Draws all pictures. None where there are too many of them, so that the first one must do.
pub(super) fn draw(source: &Source<'_>, plan: Plan) -> Result<Option<Vec<u8>>, NotMade> {
    let pixels = |(width, height): (u32, u32)| u64::from(width) * u64::from(height);
    let (mut drawn, mut read) = (0_u64, 0_u64);
    let mut small = Vec::new();
    for frame in frames(source).map_err(not_made)? {
        // A file that ends in the middle moves as far as it goes.
        let Ok(frame) = frame else { break };
        drawn = drawn.saturating_add(pixels(plan.kept));
        read = read.saturating_add(pixels((source.width, source.height)));
        if small.len() >= FRAMES_MAX
            || drawn > PIXELS_MAX
            || read > source.pixels_max.saturating_mul(TIMES_MAX)
        {
            return Ok(None);
        }
        let delay = frame.delay();
        let mut picture = shrink(&DynamicImage::ImageRgba8(frame.into_buffer()), plan);
        picture.apply_orientation(source.orientation);
        small.push(Frame::from_parts(picture.into_rgba8(), 0, 0, delay));
    }
    if small.is_empty() {
        return Err(NotMade::NoImage);
    }
    let mut bytes = Vec::new();
    let mut encoder = GifEncoder::new_with_speed(&mut bytes, SPEED);
    encoder.set_repeat(Repeat::Infinite).map_err(no_image)?;
    encoder.encode_frames(small).map_err(no_image)?;
    drop(encoder);
    Ok(Some(bytes))
}
