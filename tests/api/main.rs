//! Tests over the real router in memory, with one file for each section of the specification.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "what is not as expected fails the test"
)]

#[path = "../support/mod.rs"]
mod support;

mod account_data;
mod afterwards;
mod aside;
mod carry_over;
mod dehydrated_devices;
mod cross_signing;
mod cross_signing_elsewhere;
mod cut_off_joins;
mod delayed_events;
mod derived;
mod device_lists;
mod device_ends;
mod devices;
mod devices_late;
mod discovery;
mod encrypted_rooms;
mod ephemeral;
mod erasure;
mod federated;
mod gaps;
mod gateways;
mod notifications;
mod gaps_beside;
mod guesses;
mod hostile;
mod filters;
mod first_versions;
mod forks;
mod http_rules;
mod inbound;
mod inbound_edus;
mod ingest;
mod invites;
mod key_backup;
mod keys;
mod knocks;
mod whole_rooms;
mod wrong_input;
mod large_rooms;
mod late_joins;
mod login;
mod mail;
mod media;
mod media_bucket;
mod media_coming;
mod media_compression;
mod media_kept;
mod media_links;
mod media_pauses;
mod media_remote;
mod media_spared;
mod media_thumbnails;
mod moderation;
mod odd_answers;
mod odd_names;
mod old_sync;
mod outbound;
mod pages;
mod policy;
mod policy_servers;
mod previews;
mod push_rules;
mod push_gateway;
mod pushers;
mod read_back;
mod receipts;
mod partial_joins;
mod people;
mod profile;
mod redactions;
mod remote_joins;
mod remote_spaces;
mod register;
mod relations;
mod rendezvous;
mod resident_joins;
mod resident_moves;
mod resident_rooms;
mod resident_third_party;
mod restore;
mod retention;
mod rooms;
mod search;
mod search_unseen;
mod search_index;
mod thread_subscriptions;
mod to_device;
mod transactions;
mod server_history;
mod servers;
mod sticky_events;
mod strangers;
mod sliding_extensions;
mod sliding_model;
mod sliding_sync;
mod socket;
mod sync;
mod sync_cost;
mod unread;
mod unseen;
mod untold;
mod upgrades;
mod unread_model;
mod sync_model;
mod sync_stays;
