//! Avatars in use, which outlive what deletes media that nobody asks for: those of the users of this server and of the rooms that it is in.

use std::collections::BTreeSet;

use serde::Deserialize;

use crate::{
    accounts::profiles,
    media::Name,
    rooms::{self, directory::find_content},
    schema::event_types::AVATAR,
    store::{Fault, Read},
};

#[derive(Deserialize)]
struct Avatar {
    url: String,
}

/// Takes those away from a list of items that are avatars in use. All profiles and rooms are looked at, if the list has anything.
pub(crate) fn spare<T>(
    read: &(impl Read + ?Sized),
    items: &mut Vec<T>,
    name: impl Fn(&T) -> &Name,
) -> Result<(), Fault> {
    if items.is_empty() {
        return Ok(());
    }
    let listed: BTreeSet<&Name> = items.iter().map(&name).collect();
    let mut in_use = BTreeSet::new();
    let mut look = |uri: &str| {
        if let Some(name) = Name::of_uri(uri).filter(|name| listed.contains(name)) {
            in_use.insert(name);
        }
    };
    for avatar in profiles::list_avatars(read)? {
        look(&avatar?);
    }
    for room in rooms::list(read)? {
        if let Some(avatar) = find_content::<Avatar>(read, room?, AVATAR)? {
            look(&avatar.url);
        }
    }
    items.retain(|item| !in_use.contains(name(item)));
    Ok(())
}
