//! Migrations between hosts with certificates as `ferry cert` makes them, and what is refused: without a certificate, and by
//! what one says.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use ferry_tests::process::{Host, Process};

use crate::{FERRY, turn};

const BUDGET: &str = "2s";

/// An authority, and the folders of the hosts for which it has issued certificates.
pub(crate) struct Site {
    pub(crate) host: Host<'static>,
    folder: tempfile::TempDir,
}

impl Site {
    pub(crate) fn new() -> Self {
        let site = Self { host: Host::new(FERRY), folder: tempfile::tempdir().unwrap() };
        site.host.ferry(&["cert", "init", "--dir", &site.ca()]).well();
        site
    }

    pub(crate) fn ca(&self) -> String {
        self.path("ca").display().to_string()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The folder of a new host that is reached at 127.0.0.1.
    pub(crate) fn issue(&self, name: &str, words: &[&str]) -> String {
        let ca = self.ca();
        let issue = ["cert", "issue", name, "--address", "127.0.0.1", "--ca", &ca];
        self.host.ferry(&[&issue[..], words].concat()).well();
        self.path("ca").join(name).display().to_string()
    }
}

pub(crate) fn receives(host: &Host<'_>, words: &[&str]) -> (Process, String) {
    let process = host.hosts(&[&["receive", "--name", "web", "--listen", "127.0.0.1:0"], words].concat());
    let address = process.first["address"].as_str().unwrap().to_owned();
    (process, address)
}

pub(crate) fn migrate<'a>(address: &'a str, words: &[&'a str]) -> Vec<&'a str> {
    [&["migrate", "web", "--to", address, "--downtime", BUDGET][..], words].concat()
}

#[test]
fn a_vm_moves_between_hosts_with_certificates_and_goes_on_there() {
    let Some(_turn) = turn() else { return };
    let site = Site::new();
    let (a, b) = (site.issue("host-a", &[]), site.issue("host-b", &[]));
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let running = source.runs("dirty rate=50 set=16 fill=24 zero=25 text=50 random=25");
    for streams in ["1", "3"] {
        let (_process, address) = receives(&target, &["--tls-dir", &b]);
        // Cut short, so that the same guest is there for the next round, and then for good.
        let slow = ["--tls-dir", &a, "--streams", streams, "--bandwidth", "4M/s", "--timeout", "300ms"];
        source.refuses(&migrate(&address, &slow), &["goes on here"]);
        source.goes_on("web");
        target.ferry(&["stop", "web"]).well();
    }
    let (_process, address) = receives(&target, &["--tls-dir", &b]);
    let events =
        source.ferry(&migrate(&address, &["--tls-dir", &a, "--streams", "3", "--json"])).json_lines();
    let report = events.last().unwrap();
    assert_eq!((&report["event"], &report["digest_equal"]), (&"moved".into(), &true.into()), "{report}");
    assert_eq!(report["streams"].as_array().unwrap().len(), 3, "{report}");
    target.until_state("web", "running");
    target.goes_on("web");
    assert_eq!(running.end().code, Some(0));
    // And back: the process that took it in knows its own certificate, for whoever does not ask for none.
    let (_process, address) = receives(&source, &["--tls-dir", &a]);
    target.refuses(&migrate(&address, &[]), &["only talks to hosts with certificates"]);
    let mut back = target.command(&migrate(&address, &[]));
    back.env_remove("FERRY_TLS_DIR");
    target.start(back).end().well();
    source.until_state("web", "running");
    source.goes_on("web");
}

#[test]
fn who_has_no_certificate_or_the_wrong_one_is_told_so_and_the_guest_goes_on() {
    let Some(_turn) = turn() else { return };
    let (site, elsewhere) = (Site::new(), Site::new());
    let (good, stranger) = (site.issue("good", &[]), elsewhere.issue("stranger", &[]));
    let only_target = site.issue("only-target", &["--role", "target"]);
    let other_vms = site.issue("other-vms", &["--vm", "db-*"]);
    let (source, target) = (Host::new(FERRY), Host::new(FERRY));
    let _running = source.runs("idle");
    let refused = |address: &str, words: &[&str], expected: &[&str]| {
        source.refuses(&migrate(address, words), expected);
        source.goes_on("web");
    };
    {
        let (_process, address) = receives(&target, &["--tls-dir", &good]);
        refused(&address, &[], &["only talks to hosts with certificates", "--tls-dir", "goes on here"]);
        refused(&address, &["--tls-dir", &stranger], &["another authority"]);
        refused(
            &address,
            &["--tls-dir", &only_target],
            &["'only-target' may not be the source", "ferry-role:source"],
        );
        refused(&address, &["--tls-dir", &other_vms], &["'other-vms'", "VM 'web'", "'db-*'"]);
        let by_name = address.replace("127.0.0.1", "localhost");
        refused(&by_name, &["--tls-dir", &good], &["localhost", "certificate was refused here"]);
        assert_eq!(target.vm("web")["state"], "waiting");
        target.ferry(&["stop", "web"]).well();
    }
    {
        let (_process, address) = receives(&target, &["--tls-dir", &other_vms]);
        refused(&address, &["--tls-dir", &good], &["'other-vms' may not be the target of VM 'web'"]);
        target.ferry(&["stop", "web"]).well();
    }
    {
        let (_process, address) = receives(&target, &[]);
        refused(&address, &["--tls-dir", &good], &["does not speak TLS"]);
        source.ferry(&migrate(&address, &[])).well();
    }
}

#[test]
fn without_a_certificate_only_loopback_is_used_unless_told_otherwise() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    let both = ["--tls-dir", "--insecure"];
    for open in ["0.0.0.0:0", "192.0.2.1:4444", "[::]:0"] {
        host.refuses(&["receive", "--name", "other", "--listen", open], &both);
    }
    let _running = host.runs("idle");
    host.refuses(&["migrate", "web", "--to", "192.0.2.1:4444"], &both);
    host.goes_on("web");
    let contradiction =
        host.ferry(&["migrate", "web", "--to", "127.0.0.1:1", "--insecure", "--tls-dir", "/x"]);
    assert_eq!(contradiction.code, Some(2), "{contradiction:?}");
    let waiting = host.hosts(&["receive", "--name", "other", "--listen", "0.0.0.0:0", "--insecure"]);
    host.ferry(&["stop", "other"]).well();
    assert_eq!(waiting.end().code, Some(0));
}

#[test]
fn a_certificate_that_can_not_be_used_is_refused_before_anything_listens() {
    let Some(_turn) = turn() else { return };
    let site = Site::new();
    let (good, source_only) = (site.issue("good", &[]), site.issue("src", &["--role", "source"]));
    let host = Host::new(FERRY);
    let receive = |folder: &str, words: &[&str]| {
        host.refuses(&["receive", "--name", "web", "--listen", "127.0.0.1:0", "--tls-dir", folder], words);
        assert!(!host.file("web.sock").exists());
    };
    receive("/nowhere", &["/nowhere/ca.pem"]);
    receive(&source_only, &["may not be the target", "ferry-role:target"]);
    let key = Path::new(&good).join("host.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    receive(&good, &["others may read the private key", "0644", "chmod 600"]);
    host.refuses(&["run", "--name", "web", "--guest", "idle", "--tls-dir", &good], &["chmod 600"]);
    assert!(host.has_no_record_of("web"), "nothing has run");
}

#[test]
fn an_authority_issues_what_was_asked_for_and_overwrites_nothing() {
    let site = Site::new();
    let (host, ca) = (&site.host, site.ca());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&site.path("ca")), 0o700);
    assert_eq!(mode(&site.path("ca").join("ca.key")), 0o600);
    host.refuses(&["cert", "init", "--dir", &ca], &["exists", "never overwritten"]);

    let issue = ["cert", "issue", "host-b", "--address", "10.0.0.2", "--address", "fd00::2", "--ca", &ca];
    let made = host
        .ferry(&[&issue[..], &["--role", "target", "--vm", "web-*", "--days", "9999", "--json"]].concat())
        .json();
    assert_eq!(made["addresses"], serde_json::json!(["host-b", "10.0.0.2", "fd00::2"]));
    assert_eq!(
        (&made["roles"], &made["vms"]),
        (&serde_json::json!(["target"]), &serde_json::json!(["web-*"]))
    );
    let folder = site.path("ca").join("host-b");
    assert_eq!(mode(&folder.join("host.key")), 0o600);
    let text = host.ferry(&["cert", "show", folder.to_str().unwrap()]).well();
    for word in ["'host-b'", "target", "web-*", "10.0.0.2"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    // It ends with its authority at the latest.
    let end = made["valid_until"].as_str().unwrap();
    let year = |date: &str| date[..4].parse::<u32>().unwrap();
    let from = made["valid_from"].as_str().unwrap();
    assert!(year(end) - year(from) <= 10, "{from} to {end}");

    host.refuses(&issue, &["host-b", "exists"]);
    host.refuses(&["cert", "issue", "c", "--ca", "/nowhere"], &["/nowhere/ca.pem", "ferry cert init"]);
    for bad in ["no name", "*", "*.example", "host;rm", "../a", "-a", "a.", "$(a)", "300.1.1.1", ""] {
        for words in
            [&["cert", "issue", bad, "--ca", &ca][..], &["cert", "issue", "c", "--address", bad, "--ca", &ca]]
        {
            let said = host.ferry(words);
            assert_eq!(said.code, Some(2), "{words:?}: {said:?}");
            assert!(bad.is_empty() || bad == "-a" || said.stderr.contains("as in DNS"), "{said:?}");
        }
    }
    host.refuses(&["cert", "show", "/nowhere"], &["/nowhere/ca.pem"]);
    let other = Site::new();
    fs::copy(other.path("ca").join("ca.key"), site.path("ca").join("ca.key")).unwrap();
    host.refuses(&["cert", "issue", "c", "--ca", &ca], &["would be refused"]);
    assert!(!site.path("ca").join("c").exists(), "nothing half-made is left");
    assert_eq!(fs::read_dir(site.path("ca")).unwrap().count(), 3);
    fs::set_permissions(site.path("ca").join("ca.key"), fs::Permissions::from_mode(0o640)).unwrap();
    host.refuses(&["cert", "issue", "c", "--ca", &ca], &["0640", "chmod 600"]);
}
