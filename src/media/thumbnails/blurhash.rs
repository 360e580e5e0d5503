//! The BlurHash of an image: a few letters from which a client draws a blurred image until it has the right one.
//!
//! Specification: [the algorithm](https://github.com/woltapp/blurhash/blob/master/Algorithm.md);
//! [MSC2448](https://github.com/matrix-org/matrix-spec-proposals/pull/2448).

use std::f64::consts::PI;

use image::RgbaImage;

use crate::media::thumbnails::{NotMade, Plan, Source, draw, fit};

/// It is worked out from a picture with at most this many pixels on each side, because nobody sees more of it.
const SIDE_MAX: u32 = 64;
/// The waves along the longer side and along the shorter one.
const WAVES: (u32, u32) = (4, 3);
/// The digits of the text.
const DIGITS: &[u8; 83] =
    b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz#$%*+,-.:;=?@[]^_{|}~";

/// Red, green and blue, as linear amounts of light.
type Light = [f64; 3];

/// The BlurHash of an image, as it is shown.
pub(super) fn of(source: &Source<'_>) -> Result<String, NotMade> {
    let whole = fit((source.width, source.height), (SIDE_MAX, SIDE_MAX));
    let small = draw::small(source, Plan { whole, kept: whole })?;
    Ok(encode(&small.to_rgba8()))
}

fn encode(image: &RgbaImage) -> String {
    let (width, height) = image.dimensions();
    let (across, down) = if width >= height { WAVES } else { (WAVES.1, WAVES.0) };
    let waves: Vec<Light> =
        (0..down).flat_map(|y| (0..across).map(move |x| (x, y))).map(|wave| strength(image, wave)).collect();
    let Some((mean, others)) = waves.split_first() else { return String::new() };
    let most = others.iter().flatten().fold(0.0_f64, |most, it| most.max(it.abs()));
    let scale = quantised(most * 166.0 - 0.5, 82);
    let most = (f64::from(scale) + 1.0) / 166.0;
    let mut text = String::new();
    write(&mut text, across - 1 + (down - 1) * 9, 1);
    write(&mut text, scale, 1);
    write(&mut text, mean.iter().fold(0, |all, it| all << 8 | of_light(*it)), 4);
    for wave in others {
        let digit = |it: f64| quantised((it / most).signum() * (it / most).abs().sqrt() * 9.0 + 9.5, 18);
        write(&mut text, wave.iter().fold(0, |all, it| all * 19 + digit(*it)), 2);
    }
    text
}

/// How much of a wave is in an image.
fn strength(image: &RgbaImage, (x_wave, y_wave): (u32, u32)) -> Light {
    let (width, height) = image.dimensions();
    let turns = |wave: u32, at: u32, of: u32| (PI * f64::from(wave) * f64::from(at) / f64::from(of)).cos();
    let mut sum = [0.0; 3];
    for (x, y, pixel) in image.enumerate_pixels() {
        let basis = turns(x_wave, x, width) * turns(y_wave, y, height);
        let [red, green, blue, opacity] = pixel.0;
        for (sum, colour) in sum.iter_mut().zip([red, green, blue]) {
            *sum += basis * to_light(colour, opacity);
        }
    }
    let norm = if (x_wave, y_wave) == (0, 0) { 1.0 } else { 2.0 };
    sum.map(|it| it * norm / (f64::from(width) * f64::from(height)))
}

/// The light of a colour before white.
fn to_light(colour: u8, opacity: u8) -> f64 {
    let value = f64::from(colour) / 255.0;
    let light = if value <= 0.040_45 { value / 12.92 } else { ((value + 0.055) / 1.055).powf(2.4) };
    let opacity = f64::from(opacity) / 255.0;
    light * opacity + 1.0 - opacity
}

/// The colour of light, from 0 to 255.
fn of_light(light: f64) -> u32 {
    let light = light.clamp(0.0, 1.0);
    let value = if light <= 0.003_130_8 { light * 12.92 } else { 1.055 * light.powf(1.0 / 2.4) - 0.055 };
    quantised(value * 255.0 + 0.5, 255)
}

/// The whole number below, within 0 and a bound.
fn quantised(value: f64, most: u32) -> u32 {
    value.floor().clamp(0.0, f64::from(most)) as u32
}

/// Writes a number of this many digits, the highest first.
fn write(to: &mut String, number: u32, digits: u32) {
    for place in (0..digits).rev() {
        let digit = number / 83_u32.pow(place) % 83;
        let digit = usize::try_from(digit).ok().and_then(|at| DIGITS.get(at)).copied();
        to.push(char::from(digit.unwrap_or(b'0')));
    }
}

#[cfg(test)]
mod tests {
    use image::Rgba;

    use super::*;

    fn uniform(width: u32, height: u32, colour: [u8; 4]) -> String {
        encode(&RgbaImage::from_pixel(width, height, Rgba(colour)))
    }

    /// The number that some digits stand for.
    fn number(text: &str) -> u32 {
        let digit = |it: u8| u32::try_from(DIGITS.iter().position(|other| *other == it).unwrap()).unwrap();
        text.bytes().fold(0, |all, it| all * 83 + digit(it))
    }

    #[test]
    fn one_colour_has_its_mean_and_no_waves() {
        let text = uniform(8, 6, [255, 128, 1, 255]);
        assert_eq!(text.len(), 1 + 1 + 4 + 2 * 11);
        assert_eq!(number(&text[..1]), 3 + 2 * 9, "four waves across and three down");
        assert_eq!(number(&text[2..6]), 0xff_80_01);
        assert_eq!(number(&uniform(6, 8, [1, 2, 3, 255])[..1]), 2 + 3 * 9, "three across and four down");
        assert_eq!(uniform(1, 1, [0, 0, 0, 255]), format!("L00000{}", "fQ".repeat(11)));
        assert_eq!(uniform(4, 4, [9, 9, 9, 0])[2..6], uniform(4, 4, [255, 255, 255, 255])[2..6]);
    }

    #[test]
    fn every_colour_comes_back_as_it_was() {
        for colour in 0..=255 {
            assert_eq!(of_light(to_light(colour, 255)), u32::from(colour));
        }
    }

    #[test]
    fn what_is_bright_on_the_left_has_a_wave_across_that_begins_high() {
        let image =
            RgbaImage::from_fn(32, 24, |x, _| if x < 16 { Rgba([255; 4]) } else { Rgba([0, 0, 0, 255]) });
        let text = encode(&image);
        // This colour has half of the light of white.
        assert_eq!(number(&text[2..6]), 0xbc_bc_bc);
        let digits = |at: usize| {
            let number = number(&text[at..at + 2]);
            [number / 361, number / 19 % 19, number % 19]
        };
        assert_eq!(digits(6), [18; 3], "the first wave across");
        assert_eq!(digits(6 + 2 * 3), [12; 3], "the first wave down, which is faint");
        let turned = encode(&image::imageops::flip_horizontal(&image));
        assert_eq!(number(&turned[6..8]), 0, "the other way round");
    }
}
