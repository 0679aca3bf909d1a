//! Bent requests to a VM's control socket: each is answered, whatever is in it, and the guest goes on.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use ferry_fuzz::mutate::bend;
use ferry_tests::process::{Host, PATIENCE};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::{FERRY, turn};

/// Requests of each kind.
const REQUESTS: usize = 400;

/// What a field may be set to: numbers at which conversions go wrong, and what belongs elsewhere.
fn odd_values() -> Vec<Value> {
    vec![
        json!(0),
        json!(-1),
        json!(1),
        json!(65_536),
        json!(u64::MAX),
        json!(-0.0),
        json!(1e-308),
        json!(9_999_999_999.0),
        json!(1e10),
        json!(1.7e308),
        json!(null),
        json!(true),
        json!(""),
        json!("zstd:99999999999"),
        json!("unix:/"),
        json!("[::1]:0"),
        json!([]),
        json!({}),
    ]
}

fn migration() -> Value {
    json!({
        "target": "127.0.0.1:1", "downtime_ms": 300.0, "streams": 2, "adapt_streams": false, "compress": "auto",
        "bandwidth_bytes_per_s": 1_000_000, "verify": true, "verify_whole": false, "reconnect_ms": 0.0,
        "timeout_ms": 1000.0, "on_timeout": "cancel", "tls_dir": null, "insecure": false,
    })
}

/// The status of the answer, of which the body is not waited for.
fn status(host: &Host<'_>, method: &str, path: &str, body: &[u8]) -> u16 {
    let mut stream = UnixStream::connect(host.file("web.sock")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: ferry\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    // It may have answered before it has read all of it.
    let _ = stream.write_all(body);
    let mut line = [0; 12];
    let shown = String::from_utf8_lossy(body);
    stream.read_exact(&mut line).unwrap_or_else(|error| panic!("no answer to {shown}: {error}"));
    let line = String::from_utf8_lossy(&line).into_owned();
    let status = line.strip_prefix("HTTP/1.1 ").and_then(|status| status.parse().ok());
    status.unwrap_or_else(|| panic!("{shown} is answered by {line:?}"))
}

/// `whole` with one field that is odd, or with its text bent.
fn bent(whole: &Value, random: &mut ChaCha8Rng) -> Vec<u8> {
    if random.random() {
        let mut bytes = whole.to_string().into_bytes();
        let other = bytes.clone();
        bend(&mut bytes, &other, random);
        return bytes;
    }
    let (mut odd, values) = (whole.clone(), odd_values());
    let fields = odd.as_object_mut().unwrap();
    let field = random.random_range(0..fields.len());
    *fields.values_mut().nth(field).unwrap() = values[random.random_range(0..values.len())].clone();
    odd.to_string().into_bytes()
}

#[test]
fn bent_requests_are_answered_and_the_guest_goes_on() {
    let Some(_turn) = turn() else { return };
    let host = Host::new(FERRY);
    let process = host.runs("dirty rate=20 set=8");
    let mut random = ChaCha8Rng::seed_from_u64(6);
    let (mut begun, mut refused) = (0, 0);
    for _ in 0..REQUESTS {
        let bandwidth = bent(&json!({ "bytes_per_s": 5 }), &mut random);
        assert!(status(&host, "PUT", "/api/v1/migration/bandwidth", &bandwidth) < 500);
        let resolve = bent(&json!({ "decision": "resume" }), &mut random);
        assert!(status(&host, "PUT", "/api/v1/vm/resolve", &resolve) < 500);
        match status(&host, "POST", "/api/v1/migration", &bent(&migration(), &mut random)) {
            202 => {
                begun += 1;
                // Nobody listens there, or it is given up.
                status(&host, "DELETE", "/api/v1/migration", b"");
                host.until_state("web", "running");
            }
            answer => {
                refused += 1;
                assert!((400..500).contains(&answer), "{answer}");
            }
        }
    }
    // Some got as far as to be begun, others not.
    assert!(begun > 5 && refused > 5, "{begun} begun, {refused} refused");
    host.goes_on("web");
    host.ferry(&["stop", "web"]).well();
    let said = process.end();
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(!said.stderr.contains("panicked"), "{}", said.stderr);
}
