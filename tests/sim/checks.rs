//! Checks of the store itself, which must hold after every crash.

use aqueduct::{flows::operator::check, store::Store};

/// Checks that every row decodes and that everything it refers to is there.
pub(crate) fn store(store: &Store) {
    let report = check::check(store, &mut |_| ()).unwrap();
    // The builders' tables are not of the schema, and their lists no rooms.
    let is_ours =
        |finding: &&String| !finding.contains("row of no table") && !finding.contains("no room 100000");
    let findings: Vec<_> = report.findings.iter().filter(is_ours).collect();
    assert!(findings.is_empty(), "{findings:#?}");
}
