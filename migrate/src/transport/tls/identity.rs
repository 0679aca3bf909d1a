//! What a host's certificate says of it: its name, the roles that it may have, and the VMs that it may move.
//!
//! All of it stands in the certificate's subject alternative names, as URIs:
//!
//! | URI | meaning |
//! |---|---|
//! | `ferry://host/NAME` | the host's name, exactly one |
//! | `ferry-role:source`, `ferry-role:target` | it may send VMs, it may take them in |
//! | `ferry-vm:PATTERN` | which VMs, by name, `*` standing for any characters; without any such URI all of them |
//!
//! Any other URI whose scheme begins with `ferry` makes the certificate useless, for it may be a limit: a misspelt `ferry-vms:web`
//! must not mean all VMs.
//!
//! Whether the certificate can be trusted, and belongs to the address that was asked for, is found out before
//! ([`super`]); nothing here looks at keys or signatures.

use std::fmt;

use ferry_protocol::VmName;
use rustls::pki_types::CertificateDer;

/// What the URI of a host's name begins with.
const HOST: &str = "ferry://host/";

/// What the URI of a role begins with.
const ROLE: &str = "ferry-role:";

/// What the URI of a pattern of VM names begins with.
const VM: &str = "ferry-vm:";

/// The most patterns of VM names in a certificate.
pub const PATTERNS_MAX: usize = 256;

/// The longest host name, in bytes: that of a message.
const HOST_BYTES_MAX: usize = 256;

/// What a host may do with the VMs that its certificate covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Send them away.
    Source,
    /// Take them in.
    Target,
}

impl Role {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Source, Self::Target];

    /// Its word in certificates and on the command line.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Target => "target",
        }
    }

    /// The URI that says so in a certificate.
    #[must_use]
    pub fn uri(self) -> String {
        format!("{ROLE}{}", self.word())
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// Why a text is no pattern of VM names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no pattern of VM names: take 1 to 64 of A-Z a-z 0-9 . _ - and * for any characters")]
pub struct VmPatternError(String);

/// Which VMs, by name: `*` stands for any characters, also none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmPattern(String);

impl VmPattern {
    /// The URI that says so in a certificate.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("{VM}{}", self.0)
    }

    /// Whether it covers a VM of this name.
    #[must_use]
    pub fn covers(&self, name: &VmName) -> bool {
        let (mut pattern, mut rest) = (self.0.as_bytes(), name.as_str().as_bytes());
        // What to go back to: behind the last star, and behind what that has taken so far.
        let mut star: Option<(&[u8], &[u8])> = None;
        loop {
            match (pattern.split_first(), rest.split_first(), star) {
                (None, None, _) => return true,
                (Some((b'*', after)), _, _) => {
                    star = Some((after, rest));
                    pattern = after;
                }
                (Some((wanted, after)), Some((got, tail)), _) if wanted == got => {
                    (pattern, rest) = (after, tail);
                }
                (_, _, Some((after, [_, taken @ ..]))) => {
                    star = Some((after, taken));
                    (pattern, rest) = (after, taken);
                }
                (_, _, Some((_, [])) | None) => return false,
            }
        }
    }
}

impl std::str::FromStr for VmPattern {
    type Err = VmPatternError;

    fn from_str(text: &str) -> Result<Self, VmPatternError> {
        let clean = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'*');
        if (1..=64).contains(&text.len()) && text.bytes().all(clean) {
            Ok(Self(text.to_owned()))
        } else {
            Err(VmPatternError(text.chars().take(65).collect()))
        }
    }
}

impl fmt::Display for VmPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The URI of a host's name in a certificate.
#[must_use]
pub fn host_uri(name: &str) -> String {
    format!("{HOST}{name}")
}

/// Why a certificate that can be trusted says nothing that ferry can go by.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// It is not even a certificate.
    #[error("its certificate can't be read: {0}")]
    Unreadable(String),
    /// There is no name, or there are several.
    #[error("its certificate names {0} hosts as {HOST}NAME, not one; 'ferry cert issue' makes such a name")]
    Host(usize),
    /// The host's name is no name.
    #[error("its certificate has an unusable host name")]
    HostName,
    /// A role that this ferry does not know.
    #[error("its certificate has the unknown role '{0}'")]
    Role(String),
    /// Something for ferry that this ferry does not know, and that may be a limit.
    #[error(
        "its certificate says '{0}', which this ferry does not understand; it knows {HOST}NAME, {ROLE}source, {ROLE}target and \
         {VM}PATTERN ('ferry cert issue' writes them)"
    )]
    Unknown(String),
    /// A pattern that is none.
    #[error("its certificate has an unusable pattern: {0}")]
    Pattern(#[from] VmPatternError),
    /// More patterns than anybody needs.
    #[error("its certificate has more than {PATTERNS_MAX} patterns of VM names")]
    Patterns,
}

/// Why a host that is who it says may not do what it wants.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Forbidden {
    /// It may not have this role.
    #[error("host '{host}' may not be the {role} of a migration by its certificate ({} is missing there)", role.uri())]
    Role {
        /// The host.
        host: String,
        /// What it wants to be.
        role: Role,
    },
    /// Its certificate does not cover this VM.
    #[error("host '{host}' may not be the {role} of VM '{vm}' by its certificate, which covers {covered}")]
    Vm {
        /// The host.
        host: String,
        /// What it wants to be.
        role: Role,
        /// The VM.
        vm: VmName,
        /// The patterns that it has.
        covered: String,
    },
}

/// Whether a URI is meant for ferry, which then has to understand it: a limit that is not understood is none that is kept.
fn is_ours(uri: &str) -> bool {
    let scheme = uri.split(':').next().unwrap_or_default();
    scheme.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("ferry"))
}

/// A host as its certificate has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostIdentity {
    host: String,
    source: bool,
    target: bool,
    vms: Vec<VmPattern>,
    /// The certificate itself: what is compared where it must be the same host with the same rights.
    certificate: CertificateDer<'static>,
}

impl HostIdentity {
    /// Reads a certificate, which somebody else has found trustworthy.
    ///
    /// # Errors
    /// [`IdentityError`] for one that was not made for ferry, or for a newer one.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let parsed = webpki::EndEntityCert::try_from(certificate)
            .map_err(|error| IdentityError::Unreadable(format!("{error:?}")))?;
        let (mut hosts, mut vms) = (Vec::new(), Vec::new());
        let (mut source, mut target) = (false, false);
        for uri in parsed.valid_uri_names() {
            if let Some(name) = uri.strip_prefix(HOST) {
                hosts.push(name.to_owned());
            } else if let Some(word) = uri.strip_prefix(ROLE) {
                match Role::ALL.into_iter().find(|role| role.word() == word) {
                    Some(Role::Source) => source = true,
                    Some(Role::Target) => target = true,
                    None => return Err(IdentityError::Role(word.chars().take(64).collect())),
                }
            } else if let Some(pattern) = uri.strip_prefix(VM) {
                vms.push(pattern.parse()?);
            } else if is_ours(uri) {
                return Err(IdentityError::Unknown(uri.chars().take(64).collect()));
            }
            if vms.len() > PATTERNS_MAX {
                return Err(IdentityError::Patterns);
            }
        }
        let count = hosts.len();
        let host = hosts.pop().filter(|_| count == 1).ok_or(IdentityError::Host(count))?;
        if !is_host_name(&host) {
            return Err(IdentityError::HostName);
        }
        Ok(Self { host, source, target, vms, certificate: certificate.clone().into_owned() })
    }

    /// The host's name.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Whether it may have this role.
    #[must_use]
    pub const fn has(&self, role: Role) -> bool {
        match role {
            Role::Source => self.source,
            Role::Target => self.target,
        }
    }

    /// The VMs that it may move; all of them if there is no pattern.
    #[must_use]
    pub fn vms(&self) -> &[VmPattern] {
        &self.vms
    }

    /// The certificate, in DER.
    #[must_use]
    pub fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    /// Whether this is the same host by the same certificate.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.certificate == other.certificate
    }

    /// Whether it may have this role at all.
    ///
    /// # Errors
    /// That it may not.
    pub fn check_role(&self, role: Role) -> Result<(), Forbidden> {
        if self.has(role) { Ok(()) } else { Err(Forbidden::Role { host: self.host.clone(), role }) }
    }

    /// Whether it may have this role for this VM.
    ///
    /// # Errors
    /// That it may not, and why.
    pub fn check(&self, role: Role, vm: &VmName) -> Result<(), Forbidden> {
        self.check_role(role)?;
        if self.vms.is_empty() || self.vms.iter().any(|pattern| pattern.covers(vm)) {
            return Ok(());
        }
        // A refusal crosses the wire: a few say enough.
        let mut covered: Vec<_> = self.vms.iter().take(8).map(|pattern| format!("'{pattern}'")).collect();
        if self.vms.len() > covered.len() {
            covered.push("..".to_owned());
        }
        let (host, vm, covered) = (self.host.clone(), vm.clone(), covered.join(", "));
        Err(Forbidden::Vm { host, role, vm, covered })
    }
}

/// Whether a text can be a host's name: 1 to 256 bytes of printable ASCII without spaces and slashes.
#[must_use]
pub fn is_host_name(text: &str) -> bool {
    (1..=HOST_BYTES_MAX).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn covers(pattern: &str, name: &str) -> bool {
        pattern.parse::<VmPattern>().unwrap().covers(&name.parse().unwrap())
    }

    #[test]
    fn a_star_stands_for_any_characters() {
        for (pattern, name) in [
            ("web", "web"),
            ("*", "anything"),
            ("web-*", "web-1"),
            ("web-*", "web-"),
            ("*-web", "a-b-web"),
            ("a*b*c", "aXbYbZc"),
            ("a**b", "ab"),
        ] {
            assert!(covers(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in
            [("web", "web2"), ("web", "we"), ("web-*", "web"), ("*-web", "web"), ("a*b*c", "acb")]
        {
            assert!(!covers(pattern, name), "{pattern} {name}");
        }
        for bad in ["", "a b", "a/b", "é", &"x".repeat(65)] {
            assert!(bad.parse::<VmPattern>().is_err(), "{bad}");
        }
    }
}
