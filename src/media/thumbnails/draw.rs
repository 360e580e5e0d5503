//! Draws a thumbnail that does not move.

use image::{DynamicImage, ImageFormat, ImageReader, codecs::jpeg::JpegEncoder, codecs::png::PngEncoder};

use crate::media::thumbnails::{NotMade, Plan, Source, no_image, not_made};

/// The quality of thumbnails in JPEG, out of 100.
const JPEG_QUALITY: u8 = 82;

/// Draws the image, or the first picture of one that moves. Answers the bytes and the content type.
pub(super) fn draw(source: &Source<'_>, plan: Plan) -> Result<(Vec<u8>, &'static str), NotMade> {
    encode(&small(source, plan)?, source.format).map_err(no_image)
}

/// Unpacks the image, or the first picture of one that moves, makes it smaller, and turns it as it is shown.
pub(super) fn small(source: &Source<'_>, plan: Plan) -> Result<DynamicImage, NotMade> {
    let mut reader = ImageReader::with_format(source.object.reader().map_err(no_image)?, source.format);
    reader.limits(source.limits());
    let decoder = reader.into_decoder().map_err(not_made)?;
    let image = DynamicImage::from_decoder(decoder).map_err(not_made)?;
    let mut small = shrink(&image, plan);
    drop(image);
    small.apply_orientation(source.orientation);
    Ok(small)
}

/// Makes an image smaller, and cuts off what is not kept.
pub(super) fn shrink(image: &DynamicImage, Plan { whole, kept }: Plan) -> DynamicImage {
    let small = match (image.width(), image.height()) == whole {
        true => image.clone(),
        false => image.thumbnail_exact(whole.0, whole.1),
    };
    if whole == kept {
        return small;
    }
    let (left, top) = ((whole.0 - kept.0) / 2, (whole.1 - kept.1) / 2);
    small.crop_imm(left, top, kept.0, kept.1)
}

/// Writes a photograph as JPEG, and what can be seen through, or was drawn with sharp edges, as PNG. Nothing else of the file goes along,
/// such as the place where it was taken.
fn encode(image: &DynamicImage, of: ImageFormat) -> image::ImageResult<(Vec<u8>, &'static str)> {
    let mut bytes = Vec::new();
    let is_photograph = matches!(of, ImageFormat::Jpeg | ImageFormat::WebP);
    let is_opaque =
        !image.color().has_alpha() || image.to_rgba8().pixels().all(|pixel| pixel.0[3] == u8::MAX);
    if is_photograph && is_opaque {
        image.to_rgb8().write_with_encoder(JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY))?;
        return Ok((bytes, "image/jpeg"));
    }
    match is_opaque {
        true => image.to_rgb8().write_with_encoder(PngEncoder::new(&mut bytes))?,
        false => image.to_rgba8().write_with_encoder(PngEncoder::new(&mut bytes))?,
    }
    Ok((bytes, "image/png"))
}
