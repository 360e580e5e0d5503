//! Thumbnails of images that are right, odd, and hostile.

use std::io::Cursor;

use image::{
    Delay, DynamicImage, Frame, GenericImageView, ImageDecoder, Rgb, RgbImage, Rgba, RgbaImage,
    codecs::gif::GifEncoder,
};

use super::*;
use crate::media::{
    blobs::{Blobs, Received},
    objects::ObjectName,
};

const PIXELS_MAX: u32 = 4_000_000;

/// The object of these bytes.
fn object(bytes: &[u8]) -> Object {
    let directory = tempfile::tempdir().unwrap();
    let blobs = Blobs::on_disk(directory.path().to_owned());
    let mut part = blobs.begin("a").unwrap();
    part.write(bytes).unwrap();
    let received: Received = part.finish().unwrap();
    let name = ObjectName { digest: received.digest, generation: 0 };
    blobs.put(received, name).unwrap();
    blobs.open(name).unwrap().unwrap()
}

/// An image whose left half is red and whose right half is blue.
fn halves(width: u32, height: u32) -> DynamicImage {
    RgbImage::from_fn(width, height, |x, _| if x < width / 2 { Rgb([255, 0, 0]) } else { Rgb([0, 0, 255]) })
        .into()
}

fn written(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn made(bytes: &[u8], wanted: (u64, u64, &str, bool)) -> Result<Made, NotMade> {
    let (width, height, method, is_animated) = wanted;
    make(&object(bytes), Wanted::new(width, height, Some(method), is_animated).unwrap(), PIXELS_MAX)
}

/// The thumbnail, which must be one, and its content type.
fn drawn(bytes: &[u8], wanted: (u64, u64, &str, bool)) -> (DynamicImage, &'static str) {
    match made(bytes, wanted).unwrap() {
        Made::Thumbnail(bytes, content_type) => (image::load_from_memory(&bytes).unwrap(), content_type),
        Made::Original(_) => panic!("the original is no thumbnail"),
    }
}

fn gif(frames: u32, width: u32, height: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = GifEncoder::new(&mut bytes);
    for number in 0..frames {
        let colour = Rgba([u8::try_from(number * 40 % 256).unwrap(), 99, 0, 255]);
        let picture = RgbaImage::from_pixel(width, height, colour);
        encoder.encode_frame(Frame::from_parts(picture, 0, 0, Delay::from_numer_denom_ms(70, 1))).unwrap();
    }
    drop(encoder);
    bytes
}

#[test]
fn a_scaled_thumbnail_keeps_its_shape_and_has_one_side_as_asked() {
    for format in [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::WebP, ImageFormat::Gif] {
        let bytes = written(&halves(800, 400), format);
        let (small, _) = drawn(&bytes, (320, 240, "scale", false));
        assert_eq!(small.dimensions(), (320, 160), "{format:?}");
        let (small, _) = drawn(&bytes, (600, 100, "scale", false));
        assert_eq!(small.dimensions(), (200, 100), "{format:?}");
    }
}

#[test]
fn a_cropped_thumbnail_has_both_sides_as_asked() {
    let bytes = written(&halves(800, 400), ImageFormat::Jpeg);
    let (small, content_type) = drawn(&bytes, (96, 96, "crop", false));
    assert_eq!((small.dimensions(), content_type), ((96, 96), "image/jpeg"));
    // It is the middle that is kept.
    assert!(small.get_pixel(5, 48).0[0] > 200 && small.get_pixel(90, 48).0[2] > 200);
    // Without becoming larger, it cannot be as high as asked.
    let (small, _) = drawn(&bytes, (500, 500, "crop", false));
    assert_eq!(small.dimensions(), (500, 400));
}

#[test]
fn nothing_is_made_larger() {
    let bytes = written(&halves(100, 50), ImageFormat::Png);
    for wanted in [(100, 50, "scale", false), (640, 480, "crop", false), (5000, 1, "scale", false)] {
        assert!(matches!(made(&bytes, wanted), Ok(Made::Original("image/png"))), "{wanted:?}");
    }
    // Sides that round to nothing have a pixel.
    let (small, _) = drawn(&written(&halves(2000, 2), ImageFormat::Png), (10, 10, "scale", false));
    assert_eq!(small.dimensions(), (10, 1));
}

#[test]
fn what_can_be_seen_through_stays_so() {
    let clear = DynamicImage::from(RgbaImage::from_pixel(200, 200, Rgba([9, 9, 9, 0])));
    let (small, content_type) = drawn(&written(&clear, ImageFormat::WebP), (20, 20, "scale", false));
    assert_eq!((content_type, small.get_pixel(0, 0).0[3]), ("image/png", 0));
}

/// A JPEG with an Exif orientation put before its other segments.
fn turned(image: &DynamicImage, orientation: u8) -> Vec<u8> {
    let plain = written(image, ImageFormat::Jpeg);
    let mut exif = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0".to_vec();
    exif.extend([orientation, 0, 0, 0, 0, 0, 0]);
    let length = u16::try_from(exif.len() + 2).unwrap().to_be_bytes();
    [&plain[..2], b"\xff\xe1", &length, &exif, &plain[2..]].concat()
}

#[test]
fn a_photograph_is_turned_as_its_camera_says() {
    let (small, _) = drawn(&turned(&halves(400, 200), 6), (100, 100, "scale", false));
    assert_eq!(small.dimensions(), (50, 100));
    assert!(small.get_pixel(25, 5).0[0] > 200 && small.get_pixel(25, 95).0[2] > 200, "red is on top");
    let (small, _) = drawn(&turned(&halves(400, 200), 3), (100, 100, "scale", false));
    assert!(small.get_pixel(5, 25).0[2] > 200, "blue is on the left");
    let (small, _) = drawn(&turned(&halves(400, 200), 8), (30, 60, "crop", false));
    assert_eq!(small.dimensions(), (30, 60));
    let mut decoder = ImageReader::new(Cursor::new(turned(&halves(4, 2), 6)))
        .with_guessed_format()
        .unwrap()
        .into_decoder()
        .unwrap();
    assert_eq!(decoder.orientation().unwrap(), Orientation::Rotate90, "the test's own image is right");
}

#[test]
fn an_image_that_moves_does_so_only_where_that_is_asked_for() {
    let bytes = gif(3, 200, 100);
    let (small, content_type) = drawn(&bytes, (50, 50, "scale", false));
    assert_eq!((small.dimensions(), content_type), ((50, 25), "image/png"));
    let Ok(Made::Thumbnail(moving, "image/gif")) = made(&bytes, (50, 50, "scale", true)) else { panic!() };
    let source = object(&moving);
    let source = Source::open(&source, PIXELS_MAX.into()).unwrap();
    assert!(source.is_animated && (source.width, source.height) == (50, 25));
    // Also where it is small enough to be given as it is.
    assert!(matches!(made(&bytes, (640, 480, "scale", true)), Ok(Made::Original("image/gif"))));
    let (small, content_type) = drawn(&bytes, (640, 480, "scale", false));
    assert_eq!((small.dimensions(), content_type), ((200, 100), "image/png"));
    // One that does not move is given as it is.
    assert!(matches!(made(&gif(1, 20, 20), (640, 480, "scale", false)), Ok(Made::Original("image/gif"))));
    let many = made(&gif(140, 40, 40), (20, 20, "scale", true));
    assert!(matches!(many, Ok(Made::Thumbnail(_, "image/png"))), "it has too many pictures");
}

/// A PNG that says it has these sides, and has a few bytes of pixels.
fn bomb(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = written(&halves(4, 4), ImageFormat::Png);
    bytes[16..20].copy_from_slice(&width.to_be_bytes());
    bytes[20..24].copy_from_slice(&height.to_be_bytes());
    let crc = crc32(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&crc.to_be_bytes());
    bytes
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

#[test]
fn a_bomb_is_refused_by_its_size_and_not_unpacked() {
    let small = bomb(65_535, 65_535);
    assert!(small.len() < 1024);
    assert_eq!(made(&small, (32, 32, "crop", false)).unwrap_err(), NotMade::TooLarge);
    assert_eq!(made(&bomb(u32::MAX >> 1, 1), (32, 32, "crop", false)).unwrap_err(), NotMade::TooLarge);
    // As many pixels as may be, most of which are not there.
    assert!(made(&bomb(2000, 2000), (32, 32, "crop", false)).is_err());
    let mut wide = gif(1, 4, 4);
    wide[6..10].copy_from_slice(&[255, 255, 255, 255]);
    assert_eq!(made(&wide, (32, 32, "crop", false)).unwrap_err(), NotMade::TooLarge);
}

#[test]
fn what_is_no_image_is_refused() {
    for bytes in
        [&b""[..], b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"%PDF-1.4"]
    {
        assert_eq!(made(bytes, (32, 32, "crop", false)).unwrap_err(), NotMade::NoImage, "{bytes:?}");
    }
    for (width, height, method) in [(0, 1, "crop"), (1, 0, "scale"), (1, 1, "stretch")] {
        assert!(Wanted::new(width, height, Some(method), false).is_err());
    }
}

#[test]
fn broken_images_do_no_harm() {
    for format in [ImageFormat::Jpeg, ImageFormat::Png, ImageFormat::WebP, ImageFormat::Gif] {
        let bytes = written(&halves(64, 64), format);
        for at in (0..bytes.len()).step_by(7) {
            let mut broken = bytes.clone();
            broken[at] ^= 0x5a;
            let _ = made(&broken, (16, 16, "crop", false));
            let _ = made(&bytes[..at], (16, 16, "scale", true));
        }
    }
}
