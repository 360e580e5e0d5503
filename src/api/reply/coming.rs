//! Answers with a file that is still on its way from another server: it goes to the client as it comes, and the answer breaks off where
//! the file does, so that nobody takes a part of it for the whole.
//!
//! Its tag is not known before its last byte, so that ranges and conditions are for files that are here (`file.rs`).

use axum::{body::Body, response::Response};
use futures_util::TryStreamExt;
use http::header;

use super::file::{CACHED, FileReply, guarding, put};
use crate::{
    api::reply::IntoReply,
    error::{Error, Result},
    flows::{App, media::download::Coming},
    media::kinds,
};

/// An answer with a file, which need not be whole yet.
pub(crate) enum AnyFileReply {
    /// The file is here.
    Kept(Box<FileReply>),
    /// It is on its way.
    Coming(ComingReply),
}

/// An answer with a file that is on its way.
pub(crate) struct ComingReply {
    /// The server, which receives it.
    pub(crate) app: App,
    /// The file to send.
    pub(crate) file: Coming,
    /// The name under which it is saved, in place of its own.
    pub(crate) name: Option<String>,
}

impl IntoReply for AnyFileReply {
    fn into_reply(self) -> Result<Response> {
        match self {
            Self::Kept(reply) => reply.into_reply(),
            Self::Coming(reply) => reply.into_reply(),
        }
    }
}

impl IntoReply for ComingReply {
    fn into_reply(self) -> Result<Response> {
        let Self { app, file, name } = self;
        let content_type = file.content_type().to_owned();
        let disposition = kinds::disposition(&content_type, name.as_deref().or(file.name()));
        let length = file.bytes_announced().map(|bytes| (header::CONTENT_LENGTH, bytes.to_string()));
        let pieces = file.read(&app).inspect_err(|error: &Error| {
            tracing::debug!(%error, "an answer breaks off, because a file of another server does");
        });
        let mut response = Response::new(Body::from_stream(pieces));
        put(&mut response, guarding(disposition))?;
        put(
            &mut response,
            [(header::CONTENT_TYPE, content_type), (header::CACHE_CONTROL, CACHED.to_owned())],
        )?;
        put(&mut response, length)?;
        Ok(response)
    }
}
