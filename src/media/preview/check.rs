//! Invariants of the rows of previews, which `db check` verifies.

use super::{address, rows};
use crate::{
    media::is_id,
    schema,
    store::{check::RowCheck, key::Json},
};

/// The checks of previews.
pub fn checks() -> Vec<RowCheck> {
    vec![RowCheck::of(&schema::URL_PREVIEW, |_, (digest, at_ms), Json(row), doubts| {
        let url = address::parse(&row.url);
        let is_it = url.is_some_and(|url| url.as_str() == row.url && rows::digest(&url) == *digest);
        doubts.unless(is_it, "it is of another URL than its key says");
        let lasts = row.until_ms.checked_sub(*at_ms);
        let is_lifetime = lasts == Some(rows::FRESH_MS) || lasts == Some(rows::FAILED_MS);
        doubts.unless(is_lifetime, "it is told for another time than previews are");
        let is_right = row.image.as_ref().is_none_or(|image| row.told.is_some() && is_id(&image.id));
        doubts.unless(is_right, "its image is no item of media, or is that of nothing");
        Ok(())
    })]
}
