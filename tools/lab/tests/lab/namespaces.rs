//! Namespaces and interfaces: isolation, the lab's wiring, what the switch learns, clear errors.

use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use ferry_lab::network::lab::{BRIDGE, CLIENT_IPV4, HOST_A_IPV4, HOST_B_IPV4, TAP, UPLINK, ipv6_beside};
use ferry_lab::{Lab, Links, Mac, Namespace, NetworkError, SwitchPort};

use crate::tier::namespaces_available;

const REPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// Sends a datagram from one namespace to an address of another and checks that it arrives.
fn assert_reaches(from: &Namespace, to: &Namespace, address: IpAddr) {
    let server = to.run(|| UdpSocket::bind(SocketAddr::new(address, 0)).unwrap()).unwrap();
    server.set_read_timeout(Some(REPLY_TIMEOUT)).unwrap();
    let target = server.local_addr().unwrap();
    from.run(|| {
        let any: IpAddr = if target.is_ipv4() { "0.0.0.0" } else { "::" }.parse().unwrap();
        UdpSocket::bind(SocketAddr::new(any, 0)).unwrap().send_to(b"ferry", target).unwrap();
    })
    .unwrap();
    let mut buffer = [0; 16];
    let (length, _) = server.recv_from(&mut buffer).expect("the datagram arrives");
    assert_eq!(&buffer[..length], b"ferry");
}

#[test]
fn a_new_namespace_has_nothing_but_a_loopback_that_is_up() {
    if !namespaces_available("namespaces") {
        return;
    }
    let namespace = Namespace::new("alone").unwrap();
    assert_eq!(Links::of(&namespace).names().unwrap(), ["lo"]);
    let bound = namespace.run(|| TcpListener::bind("127.0.0.1:0").map(|_| ())).unwrap();
    bound.unwrap();
    assert_reaches(&namespace, &namespace, "127.0.0.1".parse().unwrap());
}

#[test]
fn processes_and_threads_start_inside_the_namespace() {
    if !namespaces_available("processes") {
        return;
    }
    let namespace = Namespace::new("inside").unwrap();
    let here = std::fs::read_link("/proc/self/ns/net").unwrap();
    let in_thread =
        namespace.start_thread("t", || std::fs::read_link("/proc/thread-self/ns/net").unwrap()).unwrap();
    let in_thread = in_thread.join().unwrap();
    assert_ne!(in_thread, here);
    let mut readlink = Command::new("readlink");
    readlink.arg("/proc/self/ns/net").stdout(std::process::Stdio::piped());
    let output = namespace.spawn(readlink).unwrap().wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), in_thread.to_str().unwrap());
}

#[test]
fn every_station_of_the_lab_reaches_every_other() {
    if !namespaces_available("lab") {
        return;
    }
    let lab = Lab::new().unwrap();
    let stations = [(&lab.host_a, HOST_A_IPV4), (&lab.host_b, HOST_B_IPV4), (&lab.client, CLIENT_IPV4)];
    for (from, from_address) in stations {
        for (to, to_address) in stations {
            if from_address != to_address {
                assert_reaches(from, to, IpAddr::V4(to_address));
                assert_reaches(from, to, IpAddr::V6(ipv6_beside(to_address)));
            }
        }
    }
    for host in [&lab.host_a, &lab.host_b] {
        let mut names = Links::of(host).names().unwrap();
        names.sort_unstable();
        assert_eq!(names, [BRIDGE, "lo", TAP, UPLINK]);
    }
}

#[test]
fn the_switch_learns_where_an_address_is_and_forgets_an_unplugged_port() {
    if !namespaces_available("fdb") {
        return;
    }
    let lab = Lab::new().unwrap();
    let mac = Links::of(&lab.host_b).mac(BRIDGE).unwrap();
    assert_eq!(lab.vm_port(Mac::new([2, 0, 0, 0, 0, 9])).unwrap(), None);
    assert_reaches(&lab.host_b, &lab.client, IpAddr::V4(CLIENT_IPV4));
    assert_eq!(lab.vm_port(mac).unwrap(), Some(SwitchPort::HostB));
    lab.unplug(SwitchPort::HostB).unwrap();
    assert_eq!(lab.vm_port(mac).unwrap(), None);
    lab.replug(SwitchPort::HostB).unwrap();
    assert_reaches(&lab.host_b, &lab.client, IpAddr::V4(CLIENT_IPV4));
    assert_eq!(lab.vm_port(mac).unwrap(), Some(SwitchPort::HostB));
}

#[test]
fn a_bridge_keeps_its_address_when_a_port_comes() {
    if !namespaces_available("bridge address") {
        return;
    }
    let host = Namespace::new("host").unwrap();
    let links = Links::of(&host);
    let mac = "02:fe:00:00:00:77".parse().unwrap();
    links.add_bridge("br0", mac).unwrap();
    links.add_tap("tap0").unwrap();
    links.set_mac("tap0", "02:00:00:00:00:01".parse().unwrap()).unwrap();
    links.enslave("tap0", "br0").unwrap();
    assert_eq!(links.mac("br0").unwrap(), mac);
    links.remove("tap0").unwrap();
    assert!(matches!(links.mac("tap0"), Err(NetworkError::Missing { .. })));
}

#[test]
fn errors_name_the_interface_and_the_host() {
    if !namespaces_available("errors") {
        return;
    }
    let host = Namespace::new("bare").unwrap();
    let missing = Links::of(&host).up("nic7").unwrap_err().to_string();
    assert!(missing.contains("'nic7'") && missing.contains("'bare'"), "{missing}");
    let mac = Mac::new([2, 0, 0, 0, 0, 1]);
    Links::of(&host).add_bridge("br0", mac).unwrap();
    let idle = Links::of(&host).wait_until_carrying("br0", Duration::from_millis(20)).unwrap_err();
    assert!(matches!(&idle, NetworkError::NotCarrying { name, .. } if name == "br0"), "{idle}");
    let taken = Links::of(&host).add_bridge("br0", mac).unwrap_err();
    assert!(matches!(&taken, NetworkError::Netlink { name, .. } if name == "br0"), "{taken}");
}

#[test]
fn a_child_that_asks_for_it_dies_with_its_namespace_and_not_before() {
    if !namespaces_available("parent death") {
        return;
    }
    let namespace = Namespace::new("parent").unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "sleep", "60"]);
    let mut child = namespace.spawn(command).unwrap();
    sleep(Duration::from_millis(200));
    assert!(child.try_wait().unwrap().is_none(), "the child outlives the call that started it");
    drop(namespace);
    let signal = child.wait().unwrap().signal();
    assert_eq!(signal, Some(9));
}
