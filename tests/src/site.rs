//! A site's authority and the certificates of its hosts, made anew for each test, as `ferry cert` makes them; and connections with
//! such a certificate that speak TLS as ferry does, for whoever is not ferry.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ferry_migrate::tls::{CA_FILE, CERTIFICATE_FILE, KEY_FILE};
use ferry_migrate::{Credentials, Security};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// What ferry calls its protocol within TLS.
const PROTOCOL: &[u8] = b"ferry";

/// An authority, and the folders of its hosts.
#[derive(Debug)]
pub struct Site {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    folder: tempfile::TempDir,
}

/// A host that is reached at 127.0.0.1.
#[derive(Debug)]
pub struct SiteHost {
    /// Where its certificate and key are.
    pub folder: PathBuf,
    name: String,
    vms: Vec<String>,
}

impl Default for Site {
    fn default() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let pem = params.self_signed(&key).expect("a certificate").pem();
        Self { issuer: Issuer::new(params, key), pem, folder: tempfile::tempdir().expect("a folder") }
    }
}

impl Site {
    /// A new host, which may be source and target; for the VMs that `vms` cover, or for all of them if there is none.
    ///
    /// # Panics
    /// If there is no room for its files, or there is such a host already.
    pub fn host(&self, name: &str, vms: &[&str]) -> SiteHost {
        let folder = self.folder.path().join(name);
        fs::create_dir(&folder).expect("a new host");
        let host =
            SiteHost { folder, name: name.to_owned(), vms: vms.iter().map(ToString::to_string).collect() };
        self.issue(&host);
        host
    }

    /// Gives `host` a certificate, in the place of the one that it had: one file after the other.
    ///
    /// # Panics
    /// If there is no room for its files.
    pub fn issue(&self, host: &SiteHost) {
        let SiteHost { folder, name, vms } = host;
        let key = KeyPair::generate().expect("a key");
        let uris = [format!("ferry://host/{name}"), "ferry-role:source".into(), "ferry-role:target".into()];
        let uris = uris.into_iter().chain(vms.iter().map(|pattern| format!("ferry-vm:{pattern}")));
        let uris = uris.map(|uri| SanType::URI(uri.try_into().expect("ASCII")));
        let address = SanType::IpAddress("127.0.0.1".parse().expect("an address"));
        let mut params = CertificateParams::default();
        params.subject_alt_names = uris.chain([address]).collect();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        for (file, text) in
            [(CA_FILE, &self.pem), (CERTIFICATE_FILE, &certificate.pem()), (KEY_FILE, &key.serialize_pem())]
        {
            let new = folder.join("new");
            fs::write(&new, text).expect("room");
            fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).expect("its own file");
            fs::rename(&new, folder.join(file)).expect("the same folder");
        }
    }
}

impl SiteHost {
    /// As ferry takes it.
    ///
    /// # Panics
    /// If ferry does not.
    #[must_use]
    pub fn security(&self) -> Security {
        Security::Tls(Credentials::load(&self.folder).expect("a certificate"))
    }

    /// Connects as this host.
    ///
    /// # Panics
    /// If its files can't be used.
    #[must_use]
    pub fn connector(&self) -> TlsConnector {
        let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[&TLS13])
            .expect("TLS 1.3")
            .with_root_certificates(roots(&self.folder))
            .with_client_auth_cert(certificates(&self.folder.join(CERTIFICATE_FILE)), self.key());
        let mut config = config.expect("a key of this certificate");
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        Arc::new(config).into()
    }

    /// Accepts as this host.
    ///
    /// # Panics
    /// If its files can't be used.
    #[must_use]
    pub fn acceptor(&self) -> TlsAcceptor {
        let provider = Arc::new(default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(roots(&self.folder).into(), Arc::clone(&provider));
        let config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .expect("TLS 1.3")
            .with_client_cert_verifier(verifier.build().expect("an authority"))
            .with_single_cert(certificates(&self.folder.join(CERTIFICATE_FILE)), self.key());
        let mut config = config.expect("a key of this certificate");
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        // As ferry: nobody reads them, and unread they end a stream with a reset.
        config.send_tls13_tickets = 0;
        Arc::new(config).into()
    }

    fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::from_pem_file(self.folder.join(KEY_FILE)).expect("a key")
    }
}

fn certificates(file: &Path) -> Vec<CertificateDer<'static>> {
    let found: Result<_, _> = CertificateDer::pem_file_iter(file).expect("a file").collect();
    found.expect("certificates")
}

fn roots(folder: &Path) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    for authority in certificates(&folder.join(CA_FILE)) {
        roots.add(authority).expect("an authority");
    }
    roots
}
