//! HTTP for the library: the web client's version and, later, media. One pool for all numbers. No redirects and
//! no proxies: WhatsApp's endpoints need neither, and neither can be allowed to lead elsewhere.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, bail};
use async_trait::async_trait;
use whatsapp_rust::wacore::net::{HttpClient, HttpRequest, HttpResponse};

/// Longest time one exchange may take.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(60);
/// Largest body that is read.
const BODY_BYTES_MAX: usize = 64 << 20;

/// The shared client.
pub(super) struct LinkHttp {
    client: reqwest::Client,
    loopback_only: bool,
}

impl LinkHttp {
    pub(super) fn new(tls: rustls::ClientConfig, loopback_only: bool) -> Result<Self, reqwest::Error> {
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .timeout(EXCHANGE_TIMEOUT)
            .build()?;
        Ok(Self { client, loopback_only })
    }
}

/// The address to ask. A sandbox on the loopback interface names itself with a port and speaks no TLS, while
/// the library always writes `https`.
fn target(text: &str, loopback_only: bool) -> anyhow::Result<url::Url> {
    let mut url = url::Url::parse(text).context("address")?;
    let host: Option<IpAddr> = url.host_str().and_then(|host| host.trim_matches(['[', ']']).parse().ok());
    let is_loopback = host.is_some_and(|address| address.is_loopback());
    if loopback_only && !is_loopback {
        bail!("this build may only speak to the loopback interface");
    }
    if is_loopback && url.port().is_some() {
        url.set_scheme("http").map_err(|()| anyhow::Error::msg("address"))?;
    }
    Ok(url)
}

#[async_trait]
impl HttpClient for LinkHttp {
    async fn execute(&self, request: HttpRequest) -> anyhow::Result<HttpResponse> {
        let url = target(&request.url, self.loopback_only)?;
        let method = reqwest::Method::from_bytes(request.method.as_bytes()).context("method")?;
        let mut exchange = self.client.request(method, url);
        for (name, value) in &request.headers {
            exchange = exchange.header(name, value);
        }
        if let Some(body) = request.body {
            exchange = exchange.body(body);
        }
        // The error's text carries the address with its tokens.
        let mut response = exchange.send().await.map_err(reqwest::Error::without_url)?;
        let status_code = response.status().as_u16();
        let mut body = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(reqwest::Error::without_url)? {
            if body.len() + piece.len() > BODY_BYTES_MAX {
                bail!("the answer is larger than {BODY_BYTES_MAX} bytes");
            }
            body.extend_from_slice(&piece);
        }
        Ok(HttpResponse { status_code, body })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_loopback_address_with_a_port_loses_its_tls() {
        let of = |text| target(text, false).unwrap().to_string();
        assert_eq!(of("https://127.0.0.1:7480/media"), "http://127.0.0.1:7480/media");
        assert_eq!(of("https://[::1]:7480/"), "http://[::1]:7480/");
        assert_eq!(of("https://127.0.0.1/media"), "https://127.0.0.1/media");
        assert_eq!(of("https://web.whatsapp.com/sw.js"), "https://web.whatsapp.com/sw.js");
        assert_eq!(of("https://localhost:7480/"), "https://localhost:7480/", "a name can be resolved to anything");
    }

    #[test]
    fn a_sandbox_build_stays_on_this_machine() {
        assert!(target("https://web.whatsapp.com/sw.js", true).is_err());
        assert!(target("https://127.0.0.1:7480/sw.js", true).is_ok());
    }
}
