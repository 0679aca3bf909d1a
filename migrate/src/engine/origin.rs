//! Whom a migration comes from, and so whose further connections concern it.

use ferry_protocol::VmName;

use crate::transport::tls::identity::{HostIdentity, Role};

/// The source of the migration under way.
#[derive(Debug)]
pub(super) struct Origin {
    /// The VM that it has named.
    pub(super) name: VmName,
    /// What its certificate says, with TLS: that of the control connection that it has made last.
    pub(super) identity: Option<HostIdentity>,
}

impl Origin {
    /// Whether a connection is of the host that this migration comes from. Its certificate may have been renewed.
    pub(super) fn is_host_of(&self, other: Option<&HostIdentity>) -> bool {
        self.agrees(other, |known, other| known.host() == other.host())
    }

    /// Whether a connection shows the very certificate of the control connection.
    pub(super) fn is_same(&self, other: Option<&HostIdentity>) -> bool {
        self.agrees(other, HostIdentity::is_same)
    }

    /// Whether a newer attempt at this VM may end this one. What an attempt says of itself is no proof that its host ever had
    /// the VM: that host must be the same, or one that may send the VM that is being taken in, by the name that is known here.
    pub(super) fn yields_to(&self, other: Option<&HostIdentity>) -> bool {
        self.is_host_of(other) || other.is_some_and(|other| other.check(Role::Source, &self.name).is_ok())
    }

    fn agrees(
        &self,
        other: Option<&HostIdentity>,
        same: impl FnOnce(&HostIdentity, &HostIdentity) -> bool,
    ) -> bool {
        match (&self.identity, other) {
            (Some(known), Some(other)) => same(known, other),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::tls::testing::Authority;

    #[test]
    fn only_who_may_send_the_vm_may_send_it_anew_and_only_its_own_host_goes_on_with_it() {
        let site = Authority::new();
        let of = |name: &str, words: &[&str]| {
            let host = site.host(name, |plan| {
                plan.uris.retain(|uri| !words.contains(&uri.as_str()));
                plan.uris.extend(words.iter().filter(|word| word.contains("vm")).map(ToString::to_string));
            });
            host.own().clone()
        };
        let name: VmName = "web".parse().unwrap();
        let host = of("a", &[]);
        let origin = Origin { name: name.clone(), identity: Some(host.clone()) };
        let (other, other_vms) = (of("b", &[]), of("c", &["ferry-vm:db-*"]));
        let only_target = of("d", &["ferry-role:source"]);
        let judge = |identity: &HostIdentity| {
            let identity = Some(identity);
            (origin.is_same(identity), origin.is_host_of(identity), origin.yields_to(identity))
        };
        assert_eq!(judge(&host), (true, true, true));
        assert_eq!(judge(&other), (false, false, true));
        assert_eq!(judge(&other_vms), (false, false, false));
        assert_eq!(judge(&only_target), (false, false, false));
        assert!(!origin.yields_to(None) && !origin.is_host_of(None));
        let plain = Origin { name, identity: None };
        assert!(plain.yields_to(None) && plain.is_host_of(None) && plain.is_same(None));
        assert!(!plain.is_host_of(Some(&host)));
    }
}
