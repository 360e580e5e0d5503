//! Images that become smaller files, without what the camera noted besides, such as the place.

use image::{
    DynamicImage, ImageDecoder, ImageEncoder, ImageFormat, ImageReader, ImageResult,
    codecs::{
        jpeg::JpegEncoder,
        png::{CompressionType, FilterType, PngEncoder},
    },
};

use crate::media::thumbnails::{NotMade, Plan, Source, content_type, draw::shrink, fit, no_image, not_made};

/// A description of colours goes along, or the colours would be others. A larger one does not.
const COLOURS_BYTES_MAX: usize = 1 << 20;

/// The way in which images are made smaller.
#[derive(Clone, Copy, Debug)]
pub struct Compression {
    /// The quality of a JPEG, from 1 to 100.
    pub jpeg_quality: u8,
    /// The longer side has at most this many pixels afterwards; 0 for as many as it had.
    pub side_max: u32,
    /// An image with more pixels stays as it is.
    pub pixels_max: u32,
}

/// The bytes of the smaller file and its content type. None for an image that stays as it is: it moves, it has a format of which that is
/// not known, or the file would not be smaller.
pub(super) fn compress(
    source: &Source<'_>,
    how: Compression,
) -> Result<Option<(Vec<u8>, &'static str)>, NotMade> {
    let is_known = matches!(source.format, ImageFormat::Jpeg | ImageFormat::Png);
    if source.is_animated || !is_known {
        return Ok(None);
    }
    let Some(content_type) = content_type(source.format) else { return Ok(None) };
    let mut reader = ImageReader::with_format(source.object.reader().map_err(no_image)?, source.format);
    reader.limits(source.limits());
    let mut decoder = reader.into_decoder().map_err(not_made)?;
    let colours = decoder.icc_profile().ok().flatten().filter(|it| it.len() <= COLOURS_BYTES_MAX);
    let mut image = DynamicImage::from_decoder(decoder).map_err(not_made)?;
    let side_max = if how.side_max == 0 { u32::MAX } else { how.side_max };
    let whole = fit((source.width, source.height), (side_max, side_max));
    if whole != (source.width, source.height) {
        image = shrink(&image, Plan { whole, kept: whole });
    }
    image.apply_orientation(source.orientation);
    let bytes = encode(&image, source.format, (how.jpeg_quality, colours)).map_err(no_image)?;
    Ok(((bytes.len() as u64) < source.object.bytes()).then_some((bytes, content_type)))
}

fn encode(
    image: &DynamicImage,
    format: ImageFormat,
    (jpeg_quality, colours): (u8, Option<Vec<u8>>),
) -> ImageResult<Vec<u8>> {
    let mut bytes = Vec::new();
    match format {
        ImageFormat::Jpeg => {
            let mut encoder = JpegEncoder::new_with_quality(&mut bytes, jpeg_quality.clamp(1, 100));
            colour(&mut encoder, colours);
            image.write_with_encoder(encoder)?;
        }
        _ => {
            let mut encoder =
                PngEncoder::new_with_quality(&mut bytes, CompressionType::Default, FilterType::Adaptive);
            colour(&mut encoder, colours);
            image.write_with_encoder(encoder)?;
        }
    }
    Ok(bytes)
}

/// Has a file say which colours its numbers stand for. One that cannot say it means the usual ones.
fn colour(encoder: &mut impl ImageEncoder, colours: Option<Vec<u8>>) {
    if let Some(colours) = colours
        && encoder.set_icc_profile(colours).is_err()
    {
        tracing::debug!("an image is made smaller without its description of colours");
    }
}
