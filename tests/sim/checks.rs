//! What must hold of the store itself.

use aqueduct::store::check;

use crate::world::World;

/// Every row decodes, the log goes to the head and no further, what it names is there.
pub(crate) fn store(world: &World) {
    let (store, _) = world.store().unwrap();
    let report = check::check(&store.snapshot(), &mut |_| ()).unwrap();
    // The builders' tables are not of the schema.
    let findings: Vec<_> =
        report.findings.iter().filter(|finding| !finding.contains("row of no table")).collect();
    assert!(findings.is_empty(), "{findings:#?}");
}
