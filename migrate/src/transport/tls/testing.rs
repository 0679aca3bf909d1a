//! Authorities and hosts for tests, made anew each time.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType, date_time_ymd,
};

use super::{CA_FILE, CERTIFICATE_FILE, KEY_FILE, Tls};

/// An authority, and the folders of the hosts that it has vouched for.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    folder: tempfile::TempDir,
}

/// What a host's certificate says; each test bends what it is about.
pub(crate) struct HostPlan {
    pub(crate) uris: Vec<String>,
    pub(crate) names: Vec<SanType>,
    pub(crate) purposes: Vec<ExtendedKeyUsagePurpose>,
    pub(crate) valid_years: (i32, i32),
}

impl HostPlan {
    /// A host on loopback, called `name`, in both roles, for all VMs.
    pub(crate) fn new(name: &str) -> Self {
        let uris = [format!("ferry://host/{name}"), "ferry-role:source".into(), "ferry-role:target".into()];
        Self {
            uris: uris.to_vec(),
            names: vec![SanType::IpAddress("127.0.0.1".parse().unwrap())],
            purposes: vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth],
            valid_years: (2020, 2100),
        }
    }
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem, folder: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn pem_of_ca(&self) -> String {
        self.pem.clone()
    }

    /// The folder of a new host.
    pub(crate) fn folder_of(&self, name: &str, plan: &HostPlan) -> PathBuf {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        let uris = plan.uris.iter().map(|uri| SanType::URI(uri.as_str().try_into().unwrap()));
        params.subject_alt_names = plan.names.iter().cloned().chain(uris).collect();
        params.extended_key_usages.clone_from(&plan.purposes);
        params.not_before = date_time_ymd(plan.valid_years.0, 1, 1);
        params.not_after = date_time_ymd(plan.valid_years.1, 1, 1);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let folder = self.folder.path().join(name);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join(CA_FILE), &self.pem).unwrap();
        fs::write(folder.join(CERTIFICATE_FILE), certificate.pem()).unwrap();
        write_key(&folder, &key.serialize_pem());
        folder
    }

    /// A new host.
    pub(crate) fn host(&self, name: &str, change: impl FnOnce(&mut HostPlan)) -> Tls {
        let mut plan = HostPlan::new(name);
        change(&mut plan);
        Tls::load(&self.folder_of(name, &plan)).unwrap()
    }

    /// A host that does not look at its own certificate first.
    pub(crate) fn careless_host(&self, name: &str, change: impl FnOnce(&mut HostPlan)) -> Tls {
        let mut plan = HostPlan::new(name);
        change(&mut plan);
        super::load::load_unchecked(&self.folder_of(name, &plan)).unwrap()
    }
}

pub(crate) fn write_key(folder: &Path, pem: &str) {
    let file = folder.join(KEY_FILE);
    fs::write(&file, pem).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
}
