//! The way to WhatsApp through a number's proxy: HTTP CONNECT or SOCKS5. Names are resolved by the proxy, so that nothing
//! but the proxy learns where the number connects to.

use std::net::IpAddr;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{HOST, PROXY_AUTHORIZATION};
use http::{HeaderValue, Method, Request, StatusCode};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_socks::Error as SocksError;
use tokio_socks::tcp::Socks5Stream;

use crate::domain::proxy::{Credentials, Proxy, ProxyAddress, Scheme};

/// Longest way to the proxy.
const CONNECT_WITHIN: Duration = Duration::from_secs(8);
/// Longest way through it. Both together end before the library gives up, which would not say why.
const TUNNEL_WITHIN: Duration = Duration::from_secs(8);

/// Why there is no way through a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ProxyFault {
    /// It is not there, or does not answer.
    Unreachable,
    /// It refuses, or does not get there itself.
    Refused,
    /// It refuses user and password, or wants some.
    LoginRefused,
}

/// Which addresses a proxy may have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reach {
    pub(super) loopback_only: bool,
    pub(super) allows: fn(IpAddr) -> bool,
}

impl Reach {
    fn allows(self, address: IpAddr) -> bool {
        if self.loopback_only { address.is_loopback() } else { (self.allows)(address) }
    }
}

/// A connection to `target` through `proxy`.
pub(super) async fn open(proxy: &Proxy, target: (&str, u16), reach: Reach) -> Result<TcpStream, ProxyFault> {
    // What the proxy makes of a name cannot be checked here.
    if reach.loopback_only && !target.0.parse().is_ok_and(|target: IpAddr| target.is_loopback()) {
        return Err(ProxyFault::Refused);
    }
    let stream = timeout(CONNECT_WITHIN, reach_proxy(proxy.address(), reach)).await;
    let stream = stream.unwrap_or(Err(ProxyFault::Unreachable))?;
    let tunnel = async {
        match proxy.scheme() {
            Scheme::Http => connect(stream, proxy.credentials(), target).await,
            Scheme::Socks5 => socks5(stream, proxy.credentials(), target).await,
        }
    };
    timeout(TUNNEL_WITHIN, tunnel).await.unwrap_or(Err(ProxyFault::Unreachable))
}

async fn reach_proxy(address: &ProxyAddress, reach: Reach) -> Result<TcpStream, ProxyFault> {
    let found = tokio::net::lookup_host((address.host.as_str(), address.port)).await;
    let mut refused = false;
    for address in found.map_err(|_| ProxyFault::Unreachable)? {
        if !reach.allows(address.ip()) {
            refused = true;
        } else if let Ok(stream) = TcpStream::connect(address).await {
            return Ok(stream);
        }
    }
    if refused {
        tracing::warn!("the proxy has an address that is not allowed");
    }
    Err(ProxyFault::Unreachable)
}

async fn connect(
    stream: TcpStream,
    credentials: Option<&Credentials>,
    target: (&str, u16),
) -> Result<TcpStream, ProxyFault> {
    let authority = ProxyAddress { host: target.0.to_owned(), port: target.1 }.authority();
    let mut request = Request::builder().method(Method::CONNECT).uri(&authority).header(HOST, &authority);
    if let Some(Credentials { user, password }) = credentials {
        let basic = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
        let mut value = HeaderValue::try_from(basic).map_err(|_| ProxyFault::LoginRefused)?;
        value.set_sensitive(true);
        request = request.header(PROXY_AUTHORIZATION, value);
    }
    let request = request.body(String::new()).map_err(|_| ProxyFault::Refused)?;
    let handshake = http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|_| ProxyFault::Unreachable)?;
    let exchange = async move {
        let response = sender.send_request(request).await.map_err(|_| ProxyFault::Unreachable)?;
        match response.status() {
            status if status.is_success() => hyper::upgrade::on(response).await.map_err(|_| ProxyFault::Unreachable),
            StatusCode::PROXY_AUTHENTICATION_REQUIRED => Err(ProxyFault::LoginRefused),
            _ => Err(ProxyFault::Refused),
        }
    };
    // The connection moves while the exchange waits, and ends with it.
    let moves = async {
        let _ = connection.with_upgrades().await;
        std::future::pending().await
    };
    let tunnel = tokio::select! {
        biased;
        tunnel = exchange => tunnel?,
        never = moves => never,
    };
    let parts = tunnel.downcast::<TokioIo<TcpStream>>().map_err(|_| ProxyFault::Refused)?;
    // WhatsApp does not speak first: what has come already is not from there.
    if parts.read_buf.is_empty() { Ok(parts.io.into_inner()) } else { Err(ProxyFault::Refused) }
}

async fn socks5(
    stream: TcpStream,
    credentials: Option<&Credentials>,
    target: (&str, u16),
) -> Result<TcpStream, ProxyFault> {
    let tunnel = match credentials {
        None => Socks5Stream::connect_with_socket(stream, target).await,
        Some(Credentials { user, password }) => {
            Socks5Stream::connect_with_password_and_socket(stream, target, user, password).await
        }
    };
    match tunnel {
        Ok(tunnel) => Ok(tunnel.into_inner()),
        Err(SocksError::Io(_) | SocksError::ProxyServerUnreachable) => Err(ProxyFault::Unreachable),
        Err(
            SocksError::PasswordAuthFailure(_)
            | SocksError::NoAcceptableAuthMethods
            | SocksError::UnknownAuthMethod
            | SocksError::InvalidAuthValues(_)
            | SocksError::AuthorizationRequired,
        ) => Err(ProxyFault::LoginRefused),
        Err(_) => Err(ProxyFault::Refused),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::task::JoinSet;

    const TARGET: (&str, u16) = ("127.0.0.1", 7);
    const HERE: Reach = Reach { loopback_only: true, allows: |_| false };

    /// Answers each read of the one who connects with the next of `answers`, then keeps the connection open.
    async fn scripted(answers: &'static [&'static [u8]]) -> (u16, JoinSet<Vec<u8>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let (mut heard, mut piece) = (Vec::new(), [0; 1024]);
            for answer in answers {
                let read = stream.read(&mut piece).await.unwrap();
                heard.extend_from_slice(&piece[..read]);
                stream.write_all(answer).await.unwrap();
            }
            let read = stream.read(&mut piece).await.unwrap_or(0);
            heard.extend_from_slice(&piece[..read]);
            heard
        });
        (port, serving)
    }

    async fn ask(scheme: &str, user: &str, answers: &'static [&'static [u8]]) -> (Result<(), ProxyFault>, Vec<u8>) {
        let (port, mut serving) = scripted(answers).await;
        let proxy = Proxy::parse(&format!("{scheme}://{user}127.0.0.1:{port}")).unwrap();
        let opened = open(&proxy, TARGET, HERE).await;
        if let Ok(mut stream) = opened {
            stream.write_all(b"through").await.unwrap();
            drop(stream);
            return (Ok(()), serving.join_next().await.unwrap().unwrap());
        }
        (opened.map(drop), serving.join_next().await.unwrap().unwrap())
    }

    #[tokio::test]
    async fn http_connect_opens_refuses_and_asks_for_a_login() {
        let (opened, heard) = ask("http", "user:pass@", &[b"HTTP/1.1 200 Connection established\r\n\r\n"]).await;
        let heard = String::from_utf8(heard).unwrap();
        assert_eq!(opened, Ok(()));
        assert!(heard.starts_with("CONNECT 127.0.0.1:7 HTTP/1.1\r\n"), "{heard}");
        assert!(heard.contains("proxy-authorization: Basic dXNlcjpwYXNz\r\n") && heard.ends_with("\r\n\r\nthrough"));
        let table: [(&'static [&'static [u8]], ProxyFault); 5] = [
            (&[b"HTTP/1.1 407 Who are you\r\ncontent-length: 0\r\n\r\n"], ProxyFault::LoginRefused),
            (&[b"HTTP/1.1 403 No\r\ncontent-length: 0\r\n\r\n"], ProxyFault::Refused),
            (&[b"HTTP/1.1 502 Bad Gateway\r\n\r\n"], ProxyFault::Refused),
            (&[b"HTTP/1.1 200 OK\r\n\r\nearly"], ProxyFault::Refused),
            (&[b"\x05\x00 what is this\r\n\r\n"], ProxyFault::Unreachable),
        ];
        for (answers, fault) in table {
            assert_eq!(ask("http", "", answers).await.0, Err(fault));
        }
    }

    #[tokio::test]
    async fn socks5_opens_refuses_and_asks_for_a_login() {
        let (opened, heard) = ask("socks5", "", &[&[5, 0], &[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]]).await;
        assert_eq!(opened, Ok(()));
        assert!(heard.ends_with(b"through") && heard.windows(6).any(|piece| piece == [127, 0, 0, 1, 0, 7]));
        let (opened, heard) = ask("socks5h", "user:pass@", &[&[5, 2], &[1, 0], &[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]]).await;
        assert_eq!(opened, Ok(()));
        assert!(heard.windows(11).any(|piece| piece == b"\x01\x04user\x04pass"), "{heard:?}");
        assert_eq!(ask("socks5", "user:bad@", &[&[5, 2], &[1, 1]]).await.0, Err(ProxyFault::LoginRefused));
        assert_eq!(ask("socks5", "", &[&[5, 255]]).await.0, Err(ProxyFault::LoginRefused));
        let unreachable = ask("socks5", "", &[&[5, 0], &[5, 4, 0, 1, 0, 0, 0, 0, 0, 0]]).await.0;
        assert_eq!(unreachable, Err(ProxyFault::Refused), "it does not get there");
    }

    #[tokio::test]
    async fn names_are_resolved_by_the_proxy() {
        const NAMED: (&str, u16) = ("web.whatsapp.com", 443);
        let (port, mut serving) = scripted(&[&[5, 0], &[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]]).await;
        let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        assert!(socks5(stream, None, NAMED).await.is_ok());
        let heard = serving.join_next().await.unwrap().unwrap();
        assert!(heard.ends_with(b"\x05\x01\x00\x03\x10web.whatsapp.com\x01\xbb"), "{heard:?}");
        let (port, mut serving) = scripted(&[b"HTTP/1.1 200 OK\r\n\r\n"]).await;
        let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        assert!(connect(stream, None, NAMED).await.is_ok());
        let heard = serving.join_next().await.unwrap().unwrap();
        assert!(heard.starts_with(b"CONNECT web.whatsapp.com:443 HTTP/1.1\r\n"), "{heard:?}");
    }

    #[tokio::test]
    async fn a_proxy_that_is_not_there_or_not_allowed_is_not_reached() {
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let gone = Proxy::parse(&format!("http://127.0.0.1:{free}")).unwrap();
        assert_eq!(open(&gone, TARGET, HERE).await.err(), Some(ProxyFault::Unreachable));
        let (port, _serving) = scripted(&[]).await;
        let nobody = Reach { loopback_only: false, allows: |_| false };
        let here = Proxy::parse(&format!("http://127.0.0.1:{port}")).unwrap();
        assert_eq!(open(&here, TARGET, nobody).await.err(), Some(ProxyFault::Unreachable));
        let elsewhere = open(&here, ("web.whatsapp.com", 443), HERE).await;
        assert_eq!(elsewhere.err(), Some(ProxyFault::Refused), "a sandbox build stays on this machine");
    }
}
