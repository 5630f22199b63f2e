//! Certificates: made for the test at hand, right ones and wrong ones.

use std::{fs, path::PathBuf, sync::Arc};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

use crate::house::file;

/// A certificate and its key, in PEM.
#[derive(Clone)]
pub struct Presented {
    pub certificate: String,
    pub key: String,
}

/// A certificate authority, and the file by which it is trusted.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    pub file: PathBuf,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new([]).unwrap();
        // Two of one name would be taken for one, whose signature is wrong.
        params
            .distinguished_name
            .push(DnType::CommonName, format!("an authority of the test, {}", uuid::Uuid::new_v4()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        Self { file: file(&issuer.pem()), issuer }
    }

    pub fn trusted(&self) -> &str {
        self.file.to_str().unwrap()
    }

    /// For `localhost`, today.
    pub fn right(&self) -> Presented {
        self.issued("localhost", (2020, 2120))
    }

    /// Everything that must not be believed, with the words by which it is refused.
    pub fn wrong(&self) -> [(Presented, &'static str); 5] {
        let mut alone = CertificateParams::new(["localhost".to_owned()]).unwrap();
        alone.distinguished_name.push(DnType::CommonName, format!("nobody else, {}", uuid::Uuid::new_v4()));
        [
            (Self::new().right(), "UnknownIssuer"),
            (self.issued("other.example", (2020, 2120)), "not valid for name \"localhost\""),
            (self.issued("localhost", (2020, 2021)), "certificate expired"),
            (self.issued("localhost", (2119, 2120)), "certificate not valid yet"),
            (signed(&alone, |params, key| params.self_signed(key)), "UnknownIssuer"),
        ]
    }

    fn issued(&self, name: &str, (from, to): (i32, i32)) -> Presented {
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        // Who goes by the letter of RFC 5280, section 4.2.1.1, as Python does from 3.13 on, believes none without.
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = (date_time_ymd(from, 1, 1), date_time_ymd(to, 1, 1));
        signed(&params, |params, key| params.signed_by(key, &self.issuer))
    }
}

fn signed(
    params: &CertificateParams,
    sign: impl FnOnce(&CertificateParams, &KeyPair) -> Result<Certificate, rcgen::Error>,
) -> Presented {
    let key = KeyPair::generate().unwrap();
    Presented { certificate: sign(params, &key).unwrap().pem(), key: key.serialize_pem() }
}

/// What terminates TLS before a service that speaks plain HTTP; its port.
pub async fn terminate(presented: &Presented, service: &str) -> u16 {
    let certificate = CertificateDer::from_pem_slice(presented.certificate.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(presented.key.as_bytes()).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let (acceptor, listener) = (TlsAcceptor::from(Arc::new(config)), TcpListener::bind("127.0.0.1:0").await.unwrap());
    let (port, service) = (listener.local_addr().unwrap().port(), service.trim_start_matches("http://").to_owned());
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (acceptor, service) = (acceptor.clone(), service.clone());
            tokio::spawn(async move {
                let mut client = acceptor.accept(client).await?;
                let mut server = TcpStream::connect(service).await?;
                tokio::io::copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    port
}

/// Puts a certificate and its key where a server reads them.
pub fn put(presented: &Presented, folder: &std::path::Path) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("server.crt"), &presented.certificate).unwrap();
    fs::write(folder.join("server.key"), &presented.key).unwrap();
}
