//! The door to hosts that the operator names. Whoever asks for pages or servers that others name goes through the network of `env`, which
//! guards where it connects to.

use std::{fmt, io};

use futures_util::future::BoxFuture;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

/// A connection over which bytes go both ways.
pub trait Wire: AsyncRead + AsyncWrite + Send + Sync + Unpin + fmt::Debug {}

impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin + fmt::Debug> Wire for T {}

/// Connects to hosts in a simulated world.
pub trait Dial: Send + Sync {
    /// Opens a connection to a host and a port.
    fn dial<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, io::Result<Box<dyn Wire>>>;
}

/// Opens a connection over TCP, to the first address of the host that takes one.
#[expect(clippy::disallowed_methods, reason = "this is the door")]
pub(super) async fn over_tcp(host: &str, port: u16) -> io::Result<Box<dyn Wire>> {
    let stream = TcpStream::connect((host, port)).await?;
    stream.set_nodelay(true)?;
    Ok(Box::new(stream))
}
