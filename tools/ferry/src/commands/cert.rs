//! `ferry cert`: an authority of one's own for sites that have none, and the certificates of its hosts.
//!
//! ```text
//!  ferry-ca/ca.pem    what every host trusts           ferry-ca/HOST/ca.pem
//!  ferry-ca/ca.key    what vouches for hosts           ferry-ca/HOST/host.pem
//!                                                      ferry-ca/HOST/host.key
//! ```
//!
//! Folders are made whole: next to their place, looked at as a peer would, and then renamed. Nothing is ever overwritten.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow, bail};
use ferry_migrate::Tls;
use ferry_migrate::tls::identity::{HostIdentity, Role, VmPattern, host_uri};
use ferry_migrate::tls::{CA_FILE, CERTIFICATE_FILE, KEY_FILE};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use time::{Duration, OffsetDateTime};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::pem::Pem;

use super::out;
use crate::cli::{CertCommand, CertInitArgs, CertIssueArgs, CertShowArgs};
use crate::host::migration::random_id;
use crate::security;

/// The authority's key.
const CA_KEY_FILE: &str = "ca.key";

/// Where hosts look for their files.
const HOST_FOLDER: &str = security::FOLDER;

/// Certificates are valid from a little before they are made: hosts' clocks differ.
const BACKDATED: Duration = Duration::hours(1);

pub(crate) fn run(command: CertCommand) -> anyhow::Result<ExitCode> {
    match command {
        CertCommand::Init(args) => init(&args)?,
        CertCommand::Issue(args) => issue(&args)?,
        CertCommand::Show(args) => show(args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn init(args: &CertInitArgs) -> anyhow::Result<()> {
    let key = KeyPair::generate().context("no key can be made")?;
    let mut params = CertificateParams::default();
    // Two authorities of one name would be taken for each other, and then found to have signed nothing.
    let unique: String = random_id().map_err(|refused| anyhow!(refused.0))?[..4].iter().map(hex).collect();
    params.distinguished_name = named(&format!("{} authority {unique}", args.name));
    // It vouches for hosts, and for no further authorities.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let until = set_validity(&mut params, args.days, None);
    let certificate = params.self_signed(&key).context("the authority's certificate can't be made")?;

    let folder = NewFolder::at(&args.dir)?;
    folder.write(CA_KEY_FILE, 0o600, &key.serialize_pem())?;
    folder.write(CA_FILE, 0o644, &certificate.pem())?;
    folder.finish()?;
    let dir = args.dir.display();
    if args.output.json {
        out(serde_json::json!({
            "folder": args.dir, "valid_until": until.date().to_string(), "files": [CA_FILE, CA_KEY_FILE]
        }));
        return Ok(());
    }
    out(format_args!("{dir}: the authority '{}', valid until {}", args.name, until.date()));
    out(format_args!(
        "  {CA_KEY_FILE}  vouches for hosts: keep it here, or better offline; never copy it to a host"
    ));
    out(format_args!("  {CA_FILE}  goes to every host, together with the host's own files:"));
    out(format_args!("\nnext: ferry cert issue HOST --address IP --ca {dir}"));
    Ok(())
}

fn issue(args: &CertIssueArgs) -> anyhow::Result<()> {
    let target = args.out.clone().unwrap_or_else(|| args.ca.join(&args.host));
    let authority = read(&args.ca, CA_FILE)?;
    let issuer = load_authority(&args.ca, &authority)?;
    let ends = end_of(&authority)?;
    if ends <= OffsetDateTime::now_utc() {
        bail!(
            "the authority in {} has expired ({}); make a new one with 'ferry cert init'",
            args.ca.display(),
            ends.date()
        );
    }
    let key = KeyPair::generate().context("no key can be made")?;
    let mut params = CertificateParams::default();
    params.distinguished_name = named(&args.host);
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = args.role.roles().iter().map(purpose).collect();
    params.subject_alt_names = alternative_names(args)?;
    let until = set_validity(&mut params, args.days, Some(ends));
    let certificate = params.signed_by(&key, &issuer).context("the certificate can't be made")?;

    let folder = NewFolder::at(&target)?;
    folder.write(KEY_FILE, 0o600, &key.serialize_pem())?;
    folder.write(CERTIFICATE_FILE, 0o644, &certificate.pem())?;
    folder.write(CA_FILE, 0o644, &authority)?;
    // As its peers will look at it: an authority's key that is not its certificate's shows here.
    let tls = Tls::load(folder.path()).context("what was made would be refused, and is removed again")?;
    folder.finish()?;
    let facts = Facts::of(tls.own())?;
    if args.output.json {
        out(facts.json(&target));
        return Ok(());
    }
    out(format_args!(
        "{}: the certificate of host '{}', valid until {}",
        target.display(),
        args.host,
        until.date()
    ));
    out(facts.lines());
    out(format_args!(
        "\nbring its files to the host, the first time or as a renewal ({KEY_FILE} stays readable by its owner alone):\n{}",
        copying(&target, &args.host)
    ));
    Ok(())
}

/// The commands that bring the files of `folder` to `host`, where the folder may be there already or not.
fn copying(folder: &Path, host: &str) -> String {
    let files = [CA_FILE, CERTIFICATE_FILE, KEY_FILE].map(|name| quoted(&folder.join(name)));
    // For scp the first colon ends the host.
    let bracketed = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    format!(
        "  ssh root@{host} mkdir -p -m 700 {HOST_FOLDER}\n  scp -p {} root@{bracketed}:{HOST_FOLDER}/",
        files.join(" ")
    )
}

/// A path as a shell takes it for one word.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-:+@%,=".contains(&byte);
    if text.bytes().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

fn show(args: CertShowArgs) -> anyhow::Result<()> {
    let folder = security::folder(args.dir).context(
        "this host has no certificate: there is no /etc/ferry/tls, and neither DIR nor $FERRY_TLS_DIR was given",
    )?;
    let tls = Tls::load(&folder)?;
    let facts = Facts::of(tls.own())?;
    if args.output.json {
        out(facts.json(&folder));
    } else {
        out(format_args!("{}: the certificate of host '{}'", folder.display(), tls.own().host()));
        out(facts.lines());
    }
    Ok(())
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

const fn purpose(role: &Role) -> ExtendedKeyUsagePurpose {
    match role {
        Role::Source => ExtendedKeyUsagePurpose::ClientAuth,
        Role::Target => ExtendedKeyUsagePurpose::ServerAuth,
    }
}

/// What the certificate says of its host; see [`ferry_migrate::tls::identity`].
fn alternative_names(args: &CertIssueArgs) -> anyhow::Result<Vec<SanType>> {
    let mut names = Vec::new();
    for address in std::iter::once(&args.host).chain(&args.addresses) {
        let name = match address.parse::<IpAddr>() {
            Ok(ip) => SanType::IpAddress(ip),
            Err(_) => SanType::DnsName(
                address.as_str().try_into().with_context(|| format!("'{address}' is no host name"))?,
            ),
        };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let uris = std::iter::once(host_uri(&args.host))
        .chain(args.role.roles().iter().map(|role| role.uri()))
        .chain(args.vms.iter().map(VmPattern::uri));
    for uri in uris {
        names.push(SanType::URI(uri.as_str().try_into().context("it can't stand in a certificate")?));
    }
    Ok(names)
}

fn set_validity(
    params: &mut CertificateParams,
    days: u32,
    at_most: Option<OffsetDateTime>,
) -> OffsetDateTime {
    let now = OffsetDateTime::now_utc();
    let wanted = now + Duration::days(i64::from(days));
    let until = at_most.map_or(wanted, |limit| wanted.min(limit));
    (params.not_before, params.not_after) = (now - BACKDATED, until);
    until
}

fn read(folder: &Path, name: &str) -> anyhow::Result<String> {
    let file = folder.join(name);
    fs::read_to_string(&file)
        .with_context(|| format!("can't read {}; 'ferry cert init' makes an authority", file.display()))
}

fn load_authority(folder: &Path, certificate: &str) -> anyhow::Result<Issuer<'static, KeyPair>> {
    let file = folder.join(CA_KEY_FILE);
    let key = read(folder, CA_KEY_FILE)?;
    let mode = fs::metadata(&file)?.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        bail!(
            "others may read the authority's key {} (mode {mode:04o}): 'chmod 600 {}'",
            file.display(),
            file.display()
        );
    }
    let key = KeyPair::from_pem(&key).with_context(|| format!("{} holds no key", file.display()))?;
    Issuer::from_ca_cert_pem(certificate, key)
        .with_context(|| format!("{} holds no certificate", folder.join(CA_FILE).display()))
}

/// A folder that is made next to its place, and gone again unless it was finished.
struct NewFolder {
    place: PathBuf,
    folder: tempfile::TempDir,
}

impl NewFolder {
    fn at(place: &Path) -> anyhow::Result<Self> {
        if fs::symlink_metadata(place).is_ok() {
            bail!(
                "{} exists, and keys are never overwritten: remove it, or name another folder",
                place.display()
            );
        }
        let parent = match place.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            Some(_) | None => Path::new("."),
        };
        let making = || {
            DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
            // Only its owner can enter it.
            let owner = fs::Permissions::from_mode(0o700);
            tempfile::Builder::new().prefix(".ferry-cert").permissions(owner).tempdir_in(parent)
        };
        let folder = making().with_context(|| format!("can't make a folder in {}", parent.display()))?;
        Ok(Self { place: place.to_owned(), folder })
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn write(&self, name: &str, mode: u32, text: &str) -> anyhow::Result<()> {
        let file = self.path().join(name);
        let write = || {
            let mut open = OpenOptions::new().write(true).create_new(true).mode(mode).open(&file)?;
            open.write_all(text.as_bytes())?;
            open.sync_all()
        };
        write().with_context(|| format!("can't write {}", file.display()))
    }

    fn finish(self) -> anyhow::Result<()> {
        let made = self.folder.keep();
        fs::rename(&made, &self.place).with_context(|| {
            let _ = fs::remove_dir_all(&made);
            format!("can't make {}", self.place.display())
        })
    }
}

/// What a certificate says, for people.
struct Facts {
    host: String,
    roles: Vec<&'static str>,
    vms: Vec<String>,
    addresses: Vec<String>,
    validity: (OffsetDateTime, OffsetDateTime),
}

impl Facts {
    fn of(own: &HostIdentity) -> anyhow::Result<Self> {
        let (_, parsed) = x509_parser::parse_x509_certificate(own.certificate())?;
        let names = parsed.subject_alternative_name()?.map(|names| names.value.general_names.clone());
        Ok(Self {
            host: own.host().to_owned(),
            roles: Role::ALL.into_iter().filter(|&role| own.has(role)).map(Role::word).collect(),
            vms: own.vms().iter().map(ToString::to_string).collect(),
            addresses: names.unwrap_or_default().iter().filter_map(address).collect(),
            validity: validity(&parsed)?,
        })
    }

    fn lines(&self) -> String {
        let vms = if self.vms.is_empty() { "all".to_owned() } else { self.vms.join(", ") };
        format!(
            "  roles      {}\n  VMs        {vms}\n  reached as {}\n  valid      {} to {}",
            self.roles.join(", "),
            self.addresses.join(", "),
            self.validity.0.date(),
            self.validity.1.date()
        )
    }

    fn json(&self, folder: &Path) -> serde_json::Value {
        let Self { host, roles, vms, addresses, validity: (from, until) } = self;
        serde_json::json!({
            "folder": folder, "host": host, "roles": roles, "vms": vms, "addresses": addresses,
            "valid_from": from.date().to_string(), "valid_until": until.date().to_string(),
        })
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "kinds of names that ferry has no use for")]
fn address(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
            let ip = v4.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from));
            ip.ok().map(|ip| ip.to_string())
        }
        _ => None,
    }
}

fn end_of(pem: &str) -> anyhow::Result<OffsetDateTime> {
    let pem = Pem::iter_from_buffer(pem.as_bytes()).next().context("there is no certificate (PEM)")??;
    Ok(validity(&pem.parse_x509()?)?.1)
}

fn validity(certificate: &X509Certificate<'_>) -> anyhow::Result<(OffsetDateTime, OffsetDateTime)> {
    let at = |time: &x509_parser::time::ASN1Time| OffsetDateTime::from_unix_timestamp(time.timestamp());
    let validity = certificate.validity();
    Ok((at(&validity.not_before)?, at(&validity.not_after)?))
}

fn hex(byte: &u8) -> String {
    format!("{byte:02x}")
}
