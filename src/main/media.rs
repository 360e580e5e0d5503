//! The commands about media.

use aqueduct::{
    flows::operator::media::{Chosen, MediaCommand as Operation},
    schema::media::Home,
};
use clap::{ArgGroup, Args, Subcommand, ValueEnum};

use super::seconds;

#[derive(Subcommand)]
pub(super) enum MediaCommand {
    /// Say how many files there are, and how much they take.
    Status,
    /// Say what is known of a file.
    Show {
        /// The URI, as mxc://example.org/AbC.
        uri: String,
    },
    /// Have files given to nobody any more. They stay where they are.
    Quarantine(Files),
    /// Have files given again that were quarantined.
    Unquarantine(Files),
    /// Have files kept in any case: they are neither deleted nor quarantined.
    Protect(Files),
    /// Let files be deleted and quarantined again.
    Unprotect(Files),
    /// Delete files for good. Those that are protected stay.
    Delete(Files),
    /// Move all files to the bucket of media.s3, or back to the disk, while the server runs. A move that broke off goes on when it is
    /// given again.
    Move {
        /// Where the files lie after that.
        #[arg(long, value_name = "PLACE")]
        to: To,
    },
}

/// A place for files.
#[derive(Clone, Copy, ValueEnum)]
pub(super) enum To {
    /// The bucket of media.s3.
    S3,
    /// The directory of media on the disk.
    Disk,
}

/// The files that a command is about: by their URI, or by one of the options.
#[derive(Args)]
#[group(skip)]
#[command(group(ArgGroup::new("chosen").required(true).multiple(false)))]
pub(super) struct Files {
    /// The URI of a file, as mxc://example.org/AbC.
    #[arg(group = "chosen")]
    uri: Option<String>,
    /// All files that a user of this server has uploaded.
    #[arg(long, value_name = "USER", group = "chosen")]
    user: Option<String>,
    /// All files that events of a room refer to. What encrypted events refer to is not seen.
    #[arg(long, value_name = "ROOM_ID", group = "chosen")]
    room: Option<String>,
    /// All files of users of this server that nobody has asked for in this time, as 90d.
    #[arg(long, value_name = "TIME", value_parser = seconds, group = "chosen")]
    unused: Option<u64>,
    /// All files of other servers that nobody has asked for in this time, as 30d.
    #[arg(long, value_name = "TIME", value_parser = seconds, group = "chosen")]
    remote_unused: Option<u64>,
    /// Only those of a user's files that are at least this old, as 7d.
    #[arg(long, value_name = "TIME", value_parser = seconds, requires = "user")]
    older_than: Option<u64>,
}

impl Files {
    fn chosen(&self) -> Result<Chosen, String> {
        let Self { uri, user, room, unused, remote_unused, older_than } = self;
        let chosen = match (uri, user, room, unused, remote_unused) {
            (Some(uri), ..) => Chosen::Item(uri.clone()),
            (_, Some(user), ..) => Chosen::OfUser(user.clone(), older_than.unwrap_or_default()),
            (_, _, Some(room), ..) => Chosen::OfRoom(room.clone()),
            (_, _, _, Some(seconds), _) => Chosen::OwnUnused(*seconds),
            (.., Some(seconds)) => Chosen::OthersUnused(*seconds),
            (None, None, None, None, None) => return Err("no file is named".to_owned()),
        };
        Ok(chosen)
    }
}

impl MediaCommand {
    /// The operation that is asked for. Errors: the reason why that is none.
    pub(super) fn operation(&self) -> Result<Operation, String> {
        Ok(match self {
            Self::Status => Operation::Status,
            Self::Show { uri } => Operation::Show { uri: uri.clone() },
            Self::Quarantine(of) => Operation::Quarantine { of: of.chosen()?, is: true },
            Self::Unquarantine(of) => Operation::Quarantine { of: of.chosen()?, is: false },
            Self::Protect(of) => Operation::Protect { of: of.chosen()?, is: true },
            Self::Unprotect(of) => Operation::Protect { of: of.chosen()?, is: false },
            Self::Delete(of) => Operation::Delete { of: of.chosen()? },
            Self::Move { to: To::S3 } => Operation::Move { to: Home::S3 },
            Self::Move { to: To::Disk } => Operation::Move { to: Home::Disk },
        })
    }
}
