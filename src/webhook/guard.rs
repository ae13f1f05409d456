//! Where a webhook may go. A customer's URL must not reach the operator's own network, so the host is checked as the
//! parser understood it, and again every address its name resolves to, at each attempt: names change.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use url::{Host, Url};

/// Longest URL accepted, in bytes.
pub const URL_BYTES_MAX: usize = 2048;

/// Whether targets inside the operator's network, and plain http, are allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// Public https targets only.
    #[default]
    PublicOnly,
    /// Anything: for a daemon that serves its own network, for tests and the demo.
    AllowPrivate,
}

/// Why a target is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not a URL.
    #[error("not a URL")]
    Malformed,
    /// Longer than [`URL_BYTES_MAX`].
    #[error("longer than {URL_BYTES_MAX} bytes")]
    TooLong,
    /// Neither https nor, where allowed, http.
    #[error("the scheme must be https")]
    Scheme,
    /// `user:password@`: it would end up in logs, and hides the host from people.
    #[error("user and password are not allowed in the URL")]
    Userinfo,
    /// It has no host.
    #[error("the URL has no host")]
    NoHost,
    /// The host is, or resolves to, an address that is not public.
    #[error("the target is not a public address")]
    NotPublic,
}

/// Reads and checks a URL. The addresses behind a name are not known here; see [`check_address`].
///
/// # Errors
/// Why it is refused.
pub fn check_url(text: &str, policy: Policy) -> Result<Url, Refusal> {
    if text.len() > URL_BYTES_MAX {
        return Err(Refusal::TooLong);
    }
    let url = Url::parse(text).map_err(|_| Refusal::Malformed)?;
    match (url.scheme(), policy) {
        ("https", _) | ("http", Policy::AllowPrivate) => {}
        _ => return Err(Refusal::Scheme),
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(Refusal::Userinfo);
    }
    match url.host() {
        None => return Err(Refusal::NoHost),
        Some(Host::Domain(name)) => check_name(name, policy)?,
        Some(Host::Ipv4(address)) => check_address(address.into(), policy)?,
        Some(Host::Ipv6(address)) => check_address(address.into(), policy)?,
    }
    Ok(url)
}

/// Checks a host as somebody wrote it, an IPv6 address without brackets. The addresses behind a name are not known here.
///
/// # Errors
/// `NotPublic`.
pub fn check_host(host: &str, policy: Policy) -> Result<(), Refusal> {
    match host.parse() {
        Ok(address) => check_address(address, policy),
        Err(_) => check_name(host, policy),
    }
}

fn check_name(name: &str, policy: Policy) -> Result<(), Refusal> {
    let name = name.trim_end_matches('.');
    let local = name == "localhost" || [".localhost", ".local", ".internal"].iter().any(|end| name.ends_with(end));
    match policy {
        Policy::PublicOnly if local || name.is_empty() => Err(Refusal::NotPublic),
        _ => Ok(()),
    }
}

/// Checks an address that is about to be connected to.
///
/// # Errors
/// `NotPublic`.
pub fn check_address(address: IpAddr, policy: Policy) -> Result<(), Refusal> {
    let public = match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    };
    if public || policy == Policy::AllowPrivate { Ok(()) } else { Err(Refusal::NotPublic) }
}

const fn v4(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix)
}

/// IANA's special-purpose registry: everything that is not reachable on the public internet.
const REFUSED_V4: [Ipv4Net; 16] = [
    v4(0, 0, 0, 0, 8),       // this network
    v4(10, 0, 0, 0, 8),      // private
    v4(100, 64, 0, 0, 10),   // carrier-grade NAT
    v4(127, 0, 0, 0, 8),     // loopback
    v4(169, 254, 0, 0, 16),  // link-local: cloud metadata lives here
    v4(172, 16, 0, 0, 12),   // private
    v4(192, 0, 0, 0, 24),    // protocol assignments
    v4(192, 0, 2, 0, 24),    // documentation
    v4(192, 31, 196, 0, 24), // AS112
    v4(192, 88, 99, 0, 24),  // 6to4 relays
    v4(192, 168, 0, 0, 16),  // private
    v4(192, 175, 48, 0, 24), // AS112
    v4(198, 18, 0, 0, 15),   // benchmarking
    v4(198, 51, 100, 0, 24), // documentation
    v4(203, 0, 113, 0, 24),  // documentation
    v4(224, 0, 0, 0, 3),     // multicast, reserved, broadcast
];

const fn v6(segments: [u16; 8], prefix: u8) -> Ipv6Net {
    let [a, b, c, d, e, f, g, h] = segments;
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, d, e, f, g, h), prefix)
}

/// Everything outside is refused: loopback, mapped IPv4, NAT64, unique local, link-local, multicast.
const GLOBAL_V6: Ipv6Net = v6([0x2000, 0, 0, 0, 0, 0, 0, 0], 3);
const REFUSED_V6: [Ipv6Net; 4] = [
    v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 23),     // Teredo, benchmarking, ORCHID
    v6([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0], 32), // documentation
    v6([0x2002, 0, 0, 0, 0, 0, 0, 0], 16),     // 6to4: carries any IPv4 address
    v6([0x3fff, 0, 0, 0, 0, 0, 0, 0], 20),     // documentation
];

fn is_public_v4(address: Ipv4Addr) -> bool {
    !REFUSED_V4.iter().any(|net| net.contains(&address))
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    GLOBAL_V6.contains(&address) && !REFUSED_V6.iter().any(|net| net.contains(&address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_private_host_is_refused() {
        for host in [
            "127.0.0.1",
            "127.1",
            "0x7f.1",
            "0x7f000001",
            "2130706433",
            "0177.0.0.1",
            "017700000001",
            "127.0.0.1.",
            "１２７.0.0.1",
            "0.0.0.0",
            "0",
            "10.1.2.3",
            "100.64.0.1",
            "169.254.169.254",
            "172.31.255.255",
            "192.168.1.1",
            "192.0.0.8",
            "198.19.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "[::]",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[::127.0.0.1]",
            "[64:ff9b::7f00:1]",
            "[64:ff9b:1::7f00:1]",
            "[2002:7f00:1::]",
            "[2001:db8::1]",
            "[2001::1]",
            "[fc00::1]",
            "[fd12:3456::1]",
            "[fe80::1]",
            "[fec0::1]",
            "[ff02::1]",
            "localhost",
            "LOCALHOST",
            "localhost.",
            "metadata.google.internal",
            "printer.local",
        ] {
            let url = format!("https://{host}/hook");
            assert_eq!(check_url(&url, Policy::PublicOnly).map(drop), Err(Refusal::NotPublic), "{url}");
            assert!(check_url(&url, Policy::AllowPrivate).is_ok(), "{url}");
        }
    }

    #[test]
    fn public_hosts_pass() {
        for url in [
            "https://example.com/hook?x=1",
            "https://example.com:8443/hook",
            "https://1.1.1.1/",
            "https://[2606:4700:4700::1111]/",
            "https://bücher.example/",
        ] {
            assert!(check_url(url, Policy::PublicOnly).is_ok(), "{url}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let long = format!("https://example.com/{}", "x".repeat(URL_BYTES_MAX));
        for (url, refusal) in [
            ("", Refusal::Malformed),
            ("example.com", Refusal::Malformed),
            ("http://example.com/", Refusal::Scheme),
            ("ftp://example.com/", Refusal::Scheme),
            ("file:///etc/passwd", Refusal::Scheme),
            ("https://user@example.com/", Refusal::Userinfo),
            ("https://:secret@example.com/", Refusal::Userinfo),
            ("https://example.com@127.0.0.1/", Refusal::Userinfo),
            (&long, Refusal::TooLong),
        ] {
            assert_eq!(check_url(url, Policy::PublicOnly).map(drop), Err(refusal), "{url}");
        }
        assert!(check_url("http://127.0.0.1:9000/", Policy::AllowPrivate).is_ok());
    }
}
