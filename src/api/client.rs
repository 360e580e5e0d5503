//! The client-server API: one file a section of the specification.

mod discovery;

use crate::api::Routes;

/// Every endpoint of the client-server API.
pub(crate) fn routes(r: &mut Routes) {
    discovery::routes(r);
}
