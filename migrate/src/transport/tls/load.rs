//! Reading a host's folder, so that whatever is wrong with it is found by its owner and not by a peer.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use webpki::{EndEntityCert, KeyUsage};

use super::identity::{HostIdentity, Role};
use super::{CA_FILE, CERTIFICATE_FILE, KEY_FILE, PROTOCOL, Tls, TlsError};

/// No certificate or key is longer.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Permissions of anybody but the owner.
const OTHERS: u32 = 0o077;

pub(super) fn load(folder: &Path) -> Result<Tls, TlsError> {
    load_and(folder, check_own)
}

/// The same without a look at whether a peer would take the certificate.
#[cfg(test)]
pub(super) fn load_unchecked(folder: &Path) -> Result<Tls, TlsError> {
    load_and(folder, |_, _, _| Ok(()))
}

type Check = fn(&HostIdentity, &[CertificateDer<'_>], &RootCertStore) -> Result<(), String>;

fn load_and(folder: &Path, check: Check) -> Result<Tls, TlsError> {
    let authorities = certificates(folder, CA_FILE)?;
    let chain = certificates(folder, CERTIFICATE_FILE)?;
    let key = key(folder)?;
    let content = |name: &str, why: String| TlsError::Content { file: folder.join(name), why };

    let mut roots = RootCertStore::empty();
    for authority in authorities {
        roots.add(authority).map_err(|error| content(CA_FILE, error.to_string()))?;
    }
    let own = HostIdentity::of(&chain[0])
        .map_err(|error| TlsError::Own { file: folder.join(CERTIFICATE_FILE), why: error.to_string() })?;
    check(&own, &chain, &roots).map_err(|why| TlsError::Own { file: folder.join(CERTIFICATE_FILE), why })?;

    let (roots, provider) = (Arc::new(roots), Arc::new(provider()));
    let does_not_fit = |error: rustls::Error| {
        content(KEY_FILE, format!("it is not the key of the certificate in {CERTIFICATE_FILE} ({error})"))
    };
    let of_tls = |error: rustls::Error| content(CERTIFICATE_FILE, error.to_string());
    let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])
        .map_err(of_tls)?
        .with_root_certificates(Arc::clone(&roots))
        .with_client_auth_cert(chain.clone(), key.clone_key())
        .map_err(does_not_fit)?;
    client.alpn_protocols = vec![PROTOCOL.to_vec()];
    client.resumption = Resumption::disabled();

    let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
        .build()
        .map_err(|error| content(CA_FILE, error.to_string()))?;
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(of_tls)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(does_not_fit)?;
    server.alpn_protocols = vec![PROTOCOL.to_vec()];
    server.session_storage = Arc::new(NoServerSessionStorage {});
    // Nobody reads what comes back on a data stream, and tickets that nobody has read turn its end into a reset.
    server.send_tls13_tickets = 0;
    Ok(Tls { folder: folder.to_owned(), own, client: Arc::new(client), server: Arc::new(server) })
}

/// The library's own choice, with the quickest first: 128 bits are enough, and guest memory is much.
fn provider() -> CryptoProvider {
    let mut provider = ring::default_provider();
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != ring::cipher_suite::TLS13_AES_128_GCM_SHA256.suite());
    provider
}

fn read(folder: &Path, name: &str) -> Result<(File, Vec<u8>), TlsError> {
    let file = folder.join(name);
    let read = || {
        let mut open = File::open(&file)?;
        let mut bytes = Vec::new();
        open.by_ref().take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
        Ok((open, bytes))
    };
    read().map_err(|cause| TlsError::Read { file: file.clone(), cause })
}

/// The certificates of a file, at least one.
fn certificates(folder: &Path, name: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let (_, bytes) = read(folder, name)?;
    let content = |why: String| TlsError::Content { file: folder.join(name), why };
    let found: Vec<_> = CertificateDer::pem_slice_iter(&bytes)
        .collect::<Result<_, _>>()
        .map_err(|error| content(error.to_string()))?;
    if found.is_empty() { Err(content("there is no certificate (PEM) in it".to_owned())) } else { Ok(found) }
}

fn key(folder: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let (open, bytes) = read(folder, KEY_FILE)?;
    let file = folder.join(KEY_FILE);
    let mode = open.metadata().map_err(|cause| TlsError::Read { file: file.clone(), cause })?.mode() & 0o7777;
    if mode & OTHERS != 0 {
        return Err(TlsError::Exposed { file, mode });
    }
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| TlsError::Content {
        file,
        why: format!("there is no private key (PEM) in it that can be used: {error}"),
    })
}

/// Whether a peer with the same authorities would take this certificate, in each of the roles that it names.
fn check_own(own: &HostIdentity, chain: &[CertificateDer<'_>], roots: &RootCertStore) -> Result<(), String> {
    let certificate = EndEntityCert::try_from(&chain[0]).map_err(|error| format!("{error:?}"))?;
    let algorithms = ring::default_provider().signature_verification_algorithms.all;
    let roles: Vec<Role> = Role::ALL.into_iter().filter(|&role| own.has(role)).collect();
    if roles.is_empty() {
        return Err("it names no role (ferry-role:source, ferry-role:target)".to_owned());
    }
    for role in roles {
        let usage = match role {
            Role::Source => KeyUsage::client_auth(),
            Role::Target => KeyUsage::server_auth(),
        };
        certificate
            .verify_for_usage(algorithms, &roots.roots, &chain[1..], UnixTime::now(), usage, None, None)
            .map_err(|error| in_words(role, &error))?;
    }
    Ok(())
}

#[expect(clippy::wildcard_enum_match_arm, reason = "the library's kinds, of which there will be more")]
fn in_words(role: Role, error: &webpki::Error) -> String {
    match error {
        webpki::Error::CertExpired { .. } => "it has expired; issue a new one".to_owned(),
        webpki::Error::CertNotValidYet { .. } => {
            "it is not valid yet; is this host's clock right?".to_owned()
        }
        webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => {
            format!("it is not of an authority in {CA_FILE}")
        }
        webpki::Error::RequiredEkuNotFoundContext(_) => {
            format!("its extended key usage does not allow the role of {role}")
        }
        other => format!("{other:?}"),
    }
}
