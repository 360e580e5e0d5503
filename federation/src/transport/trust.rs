//! Which certificates are accepted ([TLS](https://spec.matrix.org/v1.19/server-server-api/#tls)).
//!
//! The system's judgement counts. Authorities of the operator's own come besides, for federations that are closed.

use std::{path::Path, sync::Arc};

use tokio_rustls::rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, pem::PemObject},
};

/// Certificate authorities that are trusted. Cheap to clone.
#[derive(Clone)]
pub struct Trust(Arc<ClientConfig>);

/// A file of certificate authorities that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("federation.trusted_ca_file: {file}: {why}")]
pub struct BadAuthorities {
    file: String,
    why: String,
}

impl Trust {
    /// The system's authorities, or those of Mozilla where it has none, and those of these files in PEM format.
    /// It reads files, so it is called once at the start. Errors: [`BadAuthorities`].
    pub fn load<P: AsRef<Path>>(ca_files: &[P]) -> Result<Self, BadAuthorities> {
        let mut roots = RootCertStore::empty();
        let system = rustls_native_certs::load_native_certs();
        for error in &system.errors {
            tracing::debug!(%error, "a certificate authority of the system cannot be read");
        }
        let (added, _) = roots.add_parsable_certificates(system.certs);
        if added == 0 {
            tracing::info!("the system has no certificate authorities; Mozilla's are used");
            roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        }
        Self::with(roots, ca_files)
    }

    /// Only the authorities of these files. Errors: [`BadAuthorities`].
    pub fn only<P: AsRef<Path>>(ca_files: &[P]) -> Result<Self, BadAuthorities> {
        Self::with(RootCertStore::empty(), ca_files)
    }

    fn with<P: AsRef<Path>>(mut roots: RootCertStore, ca_files: &[P]) -> Result<Self, BadAuthorities> {
        for path in ca_files {
            add(&mut roots, path.as_ref())?;
        }
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| BadAuthorities { file: String::new(), why: error.to_string() })?;
        let mut config = config.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self(Arc::new(config)))
    }

    /// The same trust for a protocol that is not named within the handshake, such as SMTP.
    pub fn without_protocols(&self) -> Arc<ClientConfig> {
        let mut config = ClientConfig::clone(&self.0);
        config.alpn_protocols.clear();
        Arc::new(config)
    }

    pub(super) fn config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.0)
    }
}

fn add(roots: &mut RootCertStore, path: &Path) -> Result<(), BadAuthorities> {
    let wrong = |why: String| BadAuthorities { file: path.display().to_string(), why };
    let certificates = CertificateDer::pem_file_iter(path).map_err(|error| wrong(error.to_string()))?;
    let mut count = 0;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
        roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
        count += 1;
    }
    if count == 0 {
        Err(wrong("expected certificates in PEM format; there are none".to_owned()))
    } else {
        Ok(())
    }
}
