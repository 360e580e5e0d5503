//! Thumbnails of images that are right, odd, and hostile.

use std::io::Cursor;

use image::{
    Delay, DynamicImage, Frame, GenericImageView, ImageDecoder, Rgb, RgbImage, Rgba, RgbaImage,
    codecs::gif::GifEncoder,
};

use super::*;
use crate::{
    media::{
        blobs::{Blobs, Received},
        objects::ObjectName,
    },
    schema::media::Home,
};

const PIXELS_MAX: u32 = 4_000_000;

/// The object of these bytes.
fn object(bytes: &[u8]) -> Object {
    let directory = tempfile::tempdir().unwrap();
    let blobs = Blobs::on_disk(directory.path().to_owned());
    let mut part = blobs.begin("a").unwrap();
    part.write(bytes).unwrap();
    let received: Received = part.finish().unwrap();
    let name = ObjectName { digest: received.digest, generation: 0, home: Home::Disk };
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
        Made::Thumbnail(bytes, content_type, _) => (image::load_from_memory(&bytes).unwrap(), content_type),
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
fn of_one_image_there_are_few_thumbnails_and_none_smaller_than_asked() {
    let wanted = |width, height, method| Wanted::new(width, height, Some(method), false).unwrap();
    for (width, height, method) in LISTED {
        let listed = Wanted { width, height, method, is_animated: false };
        assert_eq!(listed.rounded(), listed);
        assert!(listed.is_usual());
    }
    let mut kinds = std::collections::BTreeSet::new();
    for width in (1..2_300).step_by(13) {
        for height in (1..2_300).step_by(17) {
            for method in ["crop", "scale"] {
                let asked = wanted(width, height, method);
                let given = asked.rounded();
                assert_eq!(given.rounded(), given, "{asked:?}");
                let is_cut = asked.width > SIDE_MAX || asked.height > SIDE_MAX || given.width > SIDE_MAX;
                assert!(is_cut || given.width >= asked.width && given.height >= asked.height, "{asked:?}");
                kinds.insert(given.kind());
            }
        }
    }
    assert!(kinds.len() < 100, "{}", kinds.len());
    assert_eq!(wanted(90, 45, "crop").rounded(), wanted(96, 48, "crop"));
    assert_eq!(wanted(48, 48, "crop").rounded(), wanted(96, 96, "crop"));
    assert_eq!(wanted(400, 300, "scale").rounded(), wanted(480, 480, "scale"));
    assert!(!wanted(1280, 720, "crop").rounded().is_usual());
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
    let Ok(Made::Thumbnail(moving, "image/gif", _)) = made(&bytes, (50, 50, "scale", true)) else { panic!() };
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
    assert!(matches!(many, Ok(Made::Thumbnail(_, "image/png", _))), "it has too many pictures");
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
fn a_picture_that_is_larger_than_the_whole_is_refused_and_not_unpacked() {
    // Each of these says that the whole has 20 x 20 pixels.
    let mut moving = gif(3, 20, 20);
    let descriptor = moving.windows(9).rposition(|it| it == [0x2c, 0, 0, 0, 0, 20, 0, 20, 0]).unwrap();
    moving[descriptor + 5..descriptor + 9].copy_from_slice(&[0x9c, 0x18, 0x9c, 0x18]);
    let chunk = |name: &[u8; 4], payload: &[u8]| {
        let size = u32::try_from(payload.len()).unwrap().to_le_bytes();
        [&name[..], &size, payload, &[0][..payload.len() % 2]].concat()
    };
    let webp = |picture: &[u8]| {
        let extended = chunk(b"VP8X", &[2, 0, 0, 0, 19, 0, 0, 19, 0, 0]);
        let rest = [b"WEBP", &extended[..], picture].concat();
        chunk(b"RIFF", &rest)
    };
    let lossy =
        chunk(b"VP8 ", &[&[0x10, 0, 0, 0x9d, 1, 0x2a, 0xff, 0x3f, 0xff, 0x3f][..], &[0; 2000]].concat());
    let lossless = chunk(b"VP8L", &[&[0x2f, 0xff, 0xff, 0xff, 0x0f][..], &[0; 2001]].concat());
    let frame = |picture: &[u8]| {
        let place = [0, 0, 0, 0, 0, 0, 19, 0, 0, 19, 0, 0, 1, 0, 0, 0];
        chunk(b"ANMF", &[&place[..], picture].concat())
    };
    let all = [moving, webp(&lossy), webp(&lossless), webp(&frame(&lossy)), webp(&frame(&lossless))];
    for (number, bytes) in all.iter().enumerate() {
        assert_eq!(made(bytes, (16, 16, "crop", true)).unwrap_err(), NotMade::NoImage, "{number}");
    }
    for (bytes, count) in [(gif(3, 20, 20), 3), (gif(1, 9, 9), 1)] {
        assert_eq!(pictures::look(&object(&bytes), ImageFormat::Gif).unwrap().count, count);
        // One that ends in the middle has as many as it has.
        assert!(pictures::look(&object(&bytes[..bytes.len() / 2]), ImageFormat::Gif).unwrap().count <= count);
    }
}

#[test]
fn a_webp_that_hides_a_larger_picture_is_not_unpacked() {
    let sides = [16_383_u16.to_le_bytes(), 16_383_u16.to_le_bytes()].concat();
    let picture = [&b"VP8 \x0a\0\0\0\0\0\0\x9d\x01\x2a"[..], &sides].concat();
    let whole = b"RIFF\x2c\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\x3f\0\0\x1f\0\0";
    let hidden = [&whole[..], &picture].concat();
    assert_eq!(made(&hidden, (8, 8, "crop", false)).unwrap_err(), NotMade::NoImage);
}

/// The beginning of an AVIF of these sides.
fn avif_of(brand: &[u8; 4], width: u32, height: u32) -> Vec<u8> {
    let boxed = |kind: &[u8; 4], inside: &[u8]| {
        [&u32::try_from(inside.len() + 8).unwrap().to_be_bytes()[..], kind, inside].concat()
    };
    let sides = [&[0; 4][..], &width.to_be_bytes(), &height.to_be_bytes()].concat();
    let described = boxed(b"iprp", &boxed(b"ipco", &boxed(b"ispe", &sides)));
    [boxed(b"ftyp", &[&brand[..], &[0; 4]].concat()), boxed(b"meta", &[vec![0; 4], described].concat())]
        .concat()
}

#[test]
fn an_avif_is_known_though_nothing_unpacks_it() {
    let of = |brand, (width, height), is_animated| {
        made(&avif_of(brand, width, height), (96, 96, "scale", is_animated))
    };
    assert!(matches!(of(b"avif", (96, 50), false), Ok(Made::Original("image/avif"))));
    assert!(matches!(of(b"avis", (96, 50), true), Ok(Made::Original("image/avif"))));
    assert_eq!(of(b"avis", (96, 50), false).unwrap_err(), NotMade::Avif);
    assert_eq!(of(b"avif", (97, 50), false).unwrap_err(), NotMade::Avif);
    assert_eq!(of(b"avif", (4_000, 4_000), false).unwrap_err(), NotMade::TooLarge);
    assert_eq!(made(b"\0\0\0\x10ftypavif\0\0\0\0", (9, 9, "crop", false)).unwrap_err(), NotMade::Avif);
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

/// A JPEG of this quality in which each pixel has another colour.
fn lively(width: u32, height: u32, quality: u8, colours: Option<Vec<u8>>) -> Vec<u8> {
    let picture = RgbImage::from_fn(width, height, |x, y| {
        Rgb([u8::try_from(x * 7 % 256).unwrap(), u8::try_from(y * 5 % 256).unwrap(), 99])
    });
    let mut bytes = Vec::new();
    let mut encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, quality);
    if let Some(colours) = colours {
        image::ImageEncoder::set_icc_profile(&mut encoder, colours).unwrap();
    }
    picture.write_with_encoder(encoder).unwrap();
    bytes
}

fn compressed(bytes: &[u8], jpeg_quality: u8, side_max: u32) -> Option<(Vec<u8>, &'static str)> {
    let how = Compression { jpeg_quality, side_max, pixels_max: PIXELS_MAX };
    super::compress(&object(bytes), how).unwrap()
}

#[test]
fn a_photograph_becomes_smaller_and_says_nothing_of_its_place() {
    let plain = lively(400, 200, 100, Some(b"a description of colours".to_vec()));
    let mut exif = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0".to_vec();
    exif.extend(b"52.5N 13.4E");
    let length = u16::try_from(exif.len() + 2).unwrap().to_be_bytes();
    let bytes = [&plain[..2], b"\xff\xe1", &length, &exif, &plain[2..]].concat();
    let (small, content_type) = compressed(&bytes, 60, 0).unwrap();
    assert!(small.len() < bytes.len() && content_type == "image/jpeg");
    let has = |text: &[u8]| small.windows(text.len()).any(|part| part == text);
    assert!(!has(b"13.4E") && !has(b"Exif"));
    assert!(has(b"a description of colours"), "the colours would be others without it");
    let image = image::load_from_memory(&small).unwrap();
    assert_eq!(image.dimensions(), (200, 400), "it is turned as the camera said");
    let (small, _) = compressed(&bytes, 60, 100).unwrap();
    assert_eq!(image::load_from_memory(&small).unwrap().dimensions(), (50, 100));
}

#[test]
fn a_drawing_keeps_each_pixel() {
    let mut bytes = Vec::new();
    let drawing = RgbaImage::from_fn(300, 100, |x, _| Rgba([u8::from(x > 99), 7, 7, 200]));
    let encoder = image::codecs::png::PngEncoder::new_with_quality(
        &mut bytes,
        image::codecs::png::CompressionType::Uncompressed,
        image::codecs::png::FilterType::NoFilter,
    );
    drawing.write_with_encoder(encoder).unwrap();
    let (small, content_type) = compressed(&bytes, 1, 0).unwrap();
    assert!(small.len() < bytes.len() && content_type == "image/png");
    assert_eq!(image::load_from_memory(&small).unwrap().to_rgba8(), drawing);
}

#[test]
fn an_image_that_would_not_become_smaller_stays_as_it_is() {
    assert!(compressed(&lively(400, 200, 50, None), 100, 0).is_none());
    for format in [ImageFormat::Gif, ImageFormat::WebP] {
        assert!(compressed(&written(&halves(400, 200), format), 1, 100).is_none(), "{format:?}");
    }
    let how = Compression { jpeg_quality: 50, side_max: 0, pixels_max: 10_000 };
    let refused = super::compress(&object(&lively(400, 200, 100, None)), how);
    assert_eq!(refused.unwrap_err(), NotMade::TooLarge);
    assert!(super::compress(&object(b"\x00\x01 no image"), how).is_err());
}
