//! Which certificates each side takes, and what a host is told of its own.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use rcgen::{ExtendedKeyUsagePurpose, KeyPair, SanType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::testing::{Authority, HostPlan, write_key};
use super::*;

/// What each side says of a connection from `source` to `target`, which is asked for by `name`. The source also reads what
/// comes: only there does it hear what the target did not like.
async fn meet(source: &Tls, target: &Tls, name: &str) -> (Result<String, String>, Result<String, String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let accepted = listener.accept().await.unwrap().0;
    let connecting = async {
        let (mut stream, peer) = source.connect(stream, server_name(name).unwrap()).await?;
        stream.read_exact(&mut [0; 5]).await?;
        Ok::<_, HandshakeError>(peer.host().to_owned())
    };
    let accepting = async {
        let (mut stream, peer) = target.accept(accepted).await?;
        stream.write_all(b"hello").await?;
        stream.flush().await?;
        Ok::<_, HandshakeError>(peer.host().to_owned())
    };
    let (one, other) = tokio::join!(connecting, accepting);
    (one.map_err(|error| error.to_string()), other.map_err(|error| error.to_string()))
}

fn contains(result: &Result<String, String>, words: &str) {
    let error = result.as_ref().unwrap_err();
    assert!(error.contains(words), "'{words}' is missing in: {error}");
}

#[tokio::test]
async fn hosts_of_one_authority_know_each_other_by_name() {
    let site = Authority::new();
    let (a, b) = (site.host("a", |_| {}), site.host("b", |_| {}));
    for name in ["127.0.0.1:4444", "127.0.0.1"] {
        assert_eq!(meet(&a, &b, name).await, (Ok("b".to_owned()), Ok("a".to_owned())));
    }
    let dns =
        site.host("c", |plan| plan.names = vec![SanType::DnsName("host-c.example".try_into().unwrap())]);
    assert_eq!(meet(&a, &dns, "host-c.example:4444").await.0, Ok("c".to_owned()));
    let v6 = site.host("d", |plan| plan.names = vec![SanType::IpAddress("::1".parse().unwrap())]);
    assert_eq!(meet(&a, &v6, "[::1]:4444").await.0, Ok("d".to_owned()));
}

#[tokio::test]
async fn a_certificate_for_another_address_is_refused() {
    let site = Authority::new();
    let (a, b) = (site.host("a", |_| {}), site.host("b", |_| {}));
    for wrong in ["127.0.0.2:1", "host-b:1", "[::1]:1"] {
        let (source, target) = meet(&a, &b, wrong).await;
        contains(&source, "its certificate was refused here");
        assert!(target.is_err());
    }
    assert!(matches!(server_name("no name:1"), Err(HandshakeError::ServerName(name)) if name == "no name"));
}

#[tokio::test]
async fn another_authority_is_refused_by_either_side() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let (ours, theirs) = (ours.host("a", |_| {}), theirs.host("b", |_| {}));
    let (source, target) = meet(&ours, &theirs, "127.0.0.1").await;
    contains(&source, "of another authority than those in this host's ca.pem");
    contains(&target, "of another authority than the peer trusts");
    // One that trusts both hears it from the other.
    let ours_site = Authority::new();
    let plain = ours_site.host("plain", |_| {});
    let folder = ours_site.folder_of("open", &HostPlan::new("open"));
    let other_site = Authority::new();
    let stranger_folder = other_site.folder_of("stranger", &HostPlan::new("stranger"));
    let trusts_both = fs::read_to_string(folder.join(CA_FILE)).unwrap()
        + &fs::read_to_string(stranger_folder.join(CA_FILE)).unwrap();
    fs::write(stranger_folder.join(CA_FILE), trusts_both).unwrap();
    let stranger = Tls::load(&stranger_folder).unwrap();
    let (source, target) = meet(&stranger, &plain, "127.0.0.1").await;
    contains(&source, "the other side refused this host's certificate: it is of another authority");
    contains(&target, "of another authority than those in this host's ca.pem");
}

#[tokio::test]
async fn what_is_not_valid_now_is_refused_by_either_side() {
    let site = Authority::new();
    let good = site.host("good", |_| {});
    let old = site.careless_host("old", |plan| plan.valid_years = (2020, 2021));
    let early = site.careless_host("early", |plan| plan.valid_years = (2090, 2091));
    contains(&meet(&good, &old, "127.0.0.1").await.0, "certificate expired");
    let (source, target) = meet(&old, &good, "127.0.0.1").await;
    contains(&source, "the other side refused this host's certificate: it is not valid now");
    contains(&target, "certificate expired");
    contains(&meet(&good, &early, "127.0.0.1").await.0, "not valid yet");
    contains(&meet(&early, &good, "127.0.0.1").await.1, "not valid yet");
}

#[tokio::test]
async fn a_key_that_is_made_for_one_role_has_no_other() {
    let site = Authority::new();
    let both = site.host("both", |_| {});
    let only = |purpose: ExtendedKeyUsagePurpose| move |plan: &mut HostPlan| plan.purposes = vec![purpose];
    let source = site.careless_host("source", only(ExtendedKeyUsagePurpose::ClientAuth));
    let target = site.careless_host("target", only(ExtendedKeyUsagePurpose::ServerAuth));
    assert!(meet(&source, &target, "127.0.0.1").await.0.is_ok());
    contains(&meet(&both, &source, "127.0.0.1").await.0, "not made for this role");
    let (said, heard) = meet(&target, &both, "127.0.0.1").await;
    contains(&heard, "not made for this role");
    contains(&said, "the other side refused this host's certificate");
}

#[tokio::test]
async fn who_shows_no_certificate_gets_nowhere() {
    let site = Authority::new();
    let (a, b) = (site.host("a", |_| {}), site.host("b", |_| {}));
    let mut nameless = (*a.client).clone();
    nameless.client_auth_cert_resolver = Arc::new(NoCertificate);
    let nameless = Tls { client: Arc::new(nameless), ..a };
    let (source, target) = meet(&nameless, &b, "127.0.0.1").await;
    contains(&target, "it showed no certificate");
    contains(&source, "the other side refused this host's certificate: none was shown");
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[test]
fn a_certificate_says_what_its_host_may_do() {
    let site = Authority::new();
    let limited = site.host("limited", |plan| {
        plan.uris = ["ferry://host/limited", "ferry-role:source", "ferry-vm:web-*", "ferry-vm:db"]
            .map(str::to_owned)
            .to_vec();
    });
    let own = limited.own();
    let check = |role, vm: &str| own.check(role, &vm.parse().unwrap()).map_err(|error| error.to_string());
    assert_eq!(check(Role::Source, "web-7"), Ok(()));
    assert_eq!(check(Role::Source, "db"), Ok(()));
    let error = check(Role::Source, "db2").unwrap_err();
    assert!(error.contains("'db2'") && error.contains("'web-*', 'db'"), "{error}");
    let error = check(Role::Target, "db").unwrap_err();
    assert!(error.contains("'limited'") && error.contains("ferry-role:target"), "{error}");
    let text = limited.check_own_role(Role::Target).unwrap_err().to_string();
    assert!(text.contains(CERTIFICATE_FILE) && text.contains("target"), "{text}");
}

#[test]
fn certificates_that_were_not_made_for_ferry_are_refused() {
    let site = Authority::new();
    let bad = |name: &str, uris: &[&str]| {
        let plan = HostPlan { uris: uris.iter().map(|&uri| uri.to_owned()).collect(), ..HostPlan::new(name) };
        Tls::load(&site.folder_of(name, &plan)).unwrap_err().to_string()
    };
    for (name, uris, words) in [
        ("1", &["ferry-role:source"][..], "names 0 hosts"),
        ("2", &["ferry://host/a", "ferry://host/b", "ferry-role:source"], "names 2 hosts"),
        ("3", &["ferry://host/a/b", "ferry-role:source"], "unusable host name"),
        ("4", &["ferry://host/a", "ferry-role:root"], "unknown role 'root'"),
        ("5", &["ferry://host/a", "ferry-role:source", "ferry-vm:a/b"], "'a/b' is no pattern"),
        ("6", &["ferry://host/a"], "names no role"),
        // A limit with a slip in it must not be none.
        ("7", &["ferry://host/a", "ferry-role:source", "ferry-vms:web"], "'ferry-vms:web', which"),
        ("8", &["ferry://host/a", "ferry-role:source", "Ferry-VM:web"], "'Ferry-VM:web', which"),
        ("9", &["ferry://host/a", "ferry-role:source", "ferry:vm:web"], "'ferry:vm:web', which"),
    ] {
        let text = bad(name, uris);
        assert!(text.contains(words) && text.contains(CERTIFICATE_FILE), "{text}");
    }
    let foreign = ["ferry://host/a", "ferry-role:source", "https://example.org/ferry", "urn:x"];
    let plan = HostPlan { uris: foreign.map(str::to_owned).into(), ..HostPlan::new("a") };
    Tls::load(&site.folder_of("foreign", &plan)).unwrap();
}

#[test]
fn a_folder_that_peers_would_refuse_is_refused_at_home() {
    let site = Authority::new();
    let refused = |folder: &Path, words: &[&str]| {
        let text = Tls::load(folder).unwrap_err().to_string();
        words.iter().for_each(|word| assert!(text.contains(word), "'{word}' is missing in: {text}"));
    };
    let folder = site.folder_of("a", &HostPlan::new("a"));
    Tls::load(&folder).unwrap();
    let key = folder.join(KEY_FILE);
    for mode in [0o644, 0o640, 0o602] {
        fs::set_permissions(&key, fs::Permissions::from_mode(mode)).unwrap();
        refused(&folder, &[&format!("{mode:04o}"), "chmod 600", KEY_FILE]);
    }
    let other = KeyPair::generate().unwrap().serialize_pem();
    write_key(&folder, &other);
    refused(&folder, &[KEY_FILE, "not the key of the certificate"]);
    write_key(&folder, "-----BEGIN NONSENSE-----");
    refused(&folder, &[KEY_FILE, "no private key"]);
    fs::write(folder.join(CA_FILE), "nothing").unwrap();
    refused(&folder, &[CA_FILE, "no certificate"]);
    fs::remove_file(folder.join(CERTIFICATE_FILE)).unwrap();
    refused(
        &site.folder_of("old", &HostPlan { valid_years: (2020, 2021), ..HostPlan::new("old") }),
        &["expired"],
    );
    refused(
        &site.folder_of("new", &HostPlan { valid_years: (2090, 2091), ..HostPlan::new("new") }),
        &["not valid yet"],
    );
    let purposes = vec![ExtendedKeyUsagePurpose::ClientAuth];
    refused(&site.folder_of("half", &HostPlan { purposes, ..HostPlan::new("half") }), &["role of target"]);
    let stray = site.folder_of("stray", &HostPlan::new("stray"));
    fs::write(stray.join(CA_FILE), Authority::new().pem_of_ca()).unwrap();
    refused(&stray, &["not of an authority in ca.pem"]);
    refused(Path::new("/nowhere"), &["/nowhere/ca.pem", "ferry cert"]);
}
