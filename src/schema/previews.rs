//! Rows of previews: what pages of the web have said about themselves.

use serde::{Deserialize, Serialize};

/// The text of a preview, in the words of [OpenGraph](https://ogp.me/): clean and bounded, as clients get it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// The title, as `og:title` tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// The description, as `og:description` tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The name of the site, as `og:site_name` tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<String>,
    /// The type of the thing, as `og:type` tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// The lasting URL, as `og:url` tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// The language and the country, as `og:locale` tells them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub locale: Option<String>,
    /// The description of the image, as `og:image:alt` tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_alt: Option<String>,
}

/// The image of a preview, which is an item of media of this server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRow {
    /// The media id of the item.
    pub id: String,
    /// The content type that its bytes have.
    pub content_type: String,
    /// The number of its bytes.
    pub bytes: u64,
    /// The width and the height in pixels, if they could be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<(u32, u32)>,
}

/// The outcome of asking for a page once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreviewRow {
    /// The URL of the page, without what is private in it.
    pub url: String,
    /// It is told until then, in milliseconds since the epoch, and not asked for again.
    pub until_ms: u64,
    /// The text. None where no preview could be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub told: Option<Told>,
    /// The image, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageRow>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_hold_what_is_there_and_nothing_else() {
        for json in [
            r#"{"url":"https://a.example/","until_ms":1}"#,
            r#"{"url":"https://a.example/","until_ms":1,"told":{}}"#,
            r#"{"url":"https://a.example/","until_ms":1,"told":{"title":"T"},"image":{"id":"x","content_type":"image/png","bytes":5,"size":[1,2]}}"#,
        ] {
            let row: PreviewRow = serde_json::from_str(json).unwrap();
            assert_eq!(serde_json::to_string(&row).unwrap(), json);
        }
    }
}
