//! Trust: whose word a server's certificate must bear, beyond what this machine trusts already.
//!
//! Promise: a file that holds no certificate is refused when it is named, and not at the first connection; nothing is sent in clear to an
//! address of TLS.
//! Not here, on purpose: a switch that turns verification off, and certificates of our own (servers know us by key or password).

use std::{fmt, fs, io, path::PathBuf, sync::Arc, time::Duration};

use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use lapin::{
    Connection, ConnectionProperties,
    tcp::{AsyncTcpStream, OwnedTLSConfig},
    uri::{AMQPScheme, AMQPUri},
};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, pem::PemObject},
};

use crate::dial::dial;

/// What connects by HTTP and HTTPS.
pub type Connector = HttpsConnector<HttpConnector>;

/// The certificate authorities of this machine, and those of a file if there is one.
#[derive(Debug, Clone, Default)]
pub struct Trust {
    ca_file: Option<PathBuf>,
}

/// A file is none of certificate authorities.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct InvalidCa {
    file: PathBuf,
    why: String,
}

impl fmt::Display for InvalidCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; expected certificates in PEM", self.file.display(), self.why)
    }
}

impl Trust {
    /// Trusts the certificates in this file (PEM) as well.
    ///
    /// # Errors
    /// When it cannot be read, or holds none, or one that cannot be used.
    pub fn in_file(file: impl Into<PathBuf>) -> Result<Self, InvalidCa> {
        let trust = Self { ca_file: Some(file.into()) };
        trust.roots().map(|_| trust)
    }

    /// A connection to a broker, whose certificate is verified at an `amqps` address. The file is read anew: one that was replaced
    /// counts from the next connection on. No deadline: a silent peer is waited for.
    ///
    /// # Errors
    /// When the broker does not answer, or not with what is trusted; for `amqps` always, without the feature `tls`.
    pub async fn connect(&self, uri: &AMQPUri, properties: ConnectionProperties) -> lapin::Result<Connection> {
        if !can_reach(uri) {
            return Err(io::Error::other("amqps:// needs the feature \"tls\" of tidings-sdk").into());
        }
        let cert_chain = self.pem().map_err(io::Error::other)?;
        let tls = OwnedTLSConfig { identity: None, cert_chain };
        let connect = async move |uri: AMQPUri, runtime| {
            let (host, port) = (&uri.authority.host, uri.authority.port);
            let stream = dial(host, port, async |address| AsyncTcpStream::connect(&runtime, address).await).await?;
            match uri.scheme {
                AMQPScheme::AMQP => Ok(stream),
                AMQPScheme::AMQPS => Ok(stream.into_tls(host, tls.as_ref()).await?),
            }
        };
        let runtime = lapin::runtime::default_runtime()?;
        // It is large, and everybody who connects would be.
        Box::pin(Connection::connector(uri.clone(), runtime, connect, properties)).await
    }

    /// For HTTP and HTTPS. The file is read now, once.
    ///
    /// # Errors
    /// As [`Trust::in_file`].
    pub fn for_http(&self, connect_deadline: Duration) -> Result<Connector, InvalidCa> {
        // A machine may trust nobody. That is no harm to a server on plain http.
        let mut trusted = RootCertStore::empty();
        trusted.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        trusted.roots.extend(self.roots()?.roots);
        let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("the provider knows the versions that are safe")
            .with_root_certificates(trusted)
            .with_no_client_auth();
        let mut plain = HttpConnector::new();
        plain.enforce_http(false);
        plain.set_connect_timeout(Some(connect_deadline));
        plain.set_nodelay(true);
        Ok(HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().wrap_connector(plain))
    }

    fn pem(&self) -> Result<Option<String>, InvalidCa> {
        let Some(file) = &self.ca_file else { return Ok(None) };
        fs::read_to_string(file).map(Some).map_err(|error| self.wrong(error.to_string()))
    }

    fn roots(&self) -> Result<RootCertStore, InvalidCa> {
        let mut roots = RootCertStore::empty();
        let Some(pem) = self.pem()? else { return Ok(roots) };
        for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            let certificate = certificate.map_err(|_| self.wrong("is damaged"))?;
            roots.add(certificate).map_err(|_| self.wrong("holds a certificate that cannot be used"))?;
        }
        if roots.is_empty() { Err(self.wrong("holds no certificate")) } else { Ok(roots) }
    }

    fn wrong(&self, why: impl Into<String>) -> InvalidCa {
        InvalidCa { file: self.ca_file.clone().unwrap_or_default(), why: why.into() }
    }
}

/// Without the feature `tls` the AMQP library speaks plainly to an `amqps` address, and does not say so.
pub(crate) fn can_reach(uri: &AMQPUri) -> bool {
    uri.scheme == AMQPScheme::AMQP || cfg!(feature = "tls")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_certificates_is_refused_by_name() {
        let file = std::env::temp_dir().join(format!("tidings-{}.pem", uuid::Uuid::new_v4()));
        assert!(Trust::in_file(&file).unwrap_err().to_string().contains("No such file"));
        for (text, why) in [
            ("", "holds no certificate"),
            ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "cannot be used"),
            ("-----BEGIN CERTIFICATE-----\n", "is damaged"),
        ] {
            fs::write(&file, text).unwrap();
            let refused = Trust::in_file(&file).unwrap_err().to_string();
            assert!(refused.contains(why) && refused.contains(".pem"), "{text:?}: {refused}");
        }
        fs::remove_file(&file).unwrap();
        assert!(Trust::default().for_http(Duration::from_secs(1)).is_ok());
    }
}
