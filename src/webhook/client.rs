//! Sends one delivery and tells what came back. Shared by all numbers: one pool of connections, no redirects, no
//! proxies, no cookies; every address a name resolves to passes the guard before it is connected to.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{CONTENT_TYPE, HeaderMap, RETRY_AFTER};
use rustls::RootCertStore;

use super::guard::{self, Policy, Refusal};
use super::payload::{self, Marks};
use super::signature::{self, Secret};
use crate::domain::id::EventId;
use crate::domain::time::Timestamp;
use crate::domain::webhook::Answer;

/// Bytes of a response that are kept for the delivery log.
const EXCERPT_BYTES: usize = 1024;
/// Bytes of a response that are read so that the connection can be used again; more, and it is closed.
const RESPONSE_BYTES_MAX: usize = 64 * 1024;
/// How long the rest of a response is read once its status is known.
const RESPONSE_PATIENCE: Duration = Duration::from_secs(2);
/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 8;
/// Idle connections kept to one host.
const IDLE_PER_HOST_MAX: usize = 4;
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What the client is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Targets allowed.
    pub policy: Policy,
    /// Limit of one attempt, connection included.
    pub timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self { policy: Policy::PublicOnly, timeout: Duration::from_secs(15) }
    }
}

/// One attempt to make.
#[derive(Debug)]
pub struct Delivery<'a> {
    /// The endpoint.
    pub url: &'a str,
    /// Its secrets: one, or two while it is being rotated.
    pub secrets: &'a [Secret],
    /// The event; receivers drop repeats by it.
    pub event: EventId,
    /// Its place and its course, also as headers.
    pub marks: Marks,
    /// What `payload::body` made.
    pub body: Vec<u8>,
    /// The present.
    pub now: Timestamp,
}

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// For `domain::webhook::verdict`.
    pub answer: Answer,
    /// How long it took.
    pub elapsed: Duration,
    /// The beginning of the response, or what went wrong. May hold a customer's text: for the delivery log only.
    pub excerpt: String,
}

impl Report {
    /// Of an attempt that was not made.
    #[must_use]
    pub fn not_sent(answer: Answer) -> Self {
        Self { answer, elapsed: Duration::ZERO, excerpt: String::new() }
    }
}

/// The client cannot be built.
#[derive(Debug, thiserror::Error)]
#[error("webhook client: {0}")]
pub struct BuildError(String);

/// Sends deliveries. Cheap to clone.
#[derive(Debug, Clone)]
pub struct WebhookClient {
    http: reqwest::Client,
    policy: Policy,
}

impl WebhookClient {
    /// A client with its own pool of connections.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn new(config: Config) -> Result<Self, BuildError> {
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls()?)
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .no_proxy()
            .referer(false)
            .dns_resolver(GuardedResolver(config.policy))
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(config.timeout)
            .pool_max_idle_per_host(IDLE_PER_HOST_MAX)
            .pool_idle_timeout(IDLE_TIMEOUT)
            .user_agent(concat!("Switchboard/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| BuildError(error.to_string()))?;
        Ok(Self { http, policy: config.policy })
    }

    /// Makes one attempt. Never fails: whatever happens is in the report.
    pub async fn deliver(&self, delivery: Delivery<'_>) -> Report {
        let begun = Instant::now();
        let (answer, excerpt) = match self.attempt(delivery).await {
            Ok(response) => read(response).await,
            Err(failure) => failure.describe(),
        };
        Report { answer, elapsed: begun.elapsed(), excerpt }
    }

    async fn attempt(&self, delivery: Delivery<'_>) -> Result<reqwest::Response, Failure> {
        // A literal address never reaches the resolver, so it is checked here.
        let url = guard::check_url(delivery.url, self.policy)?;
        let id = delivery.event.to_string();
        let seconds = delivery.now.as_secs();
        let signatures = signature::signatures(delivery.secrets, &id, seconds, &delivery.body);
        let request = self
            .http
            .post(url)
            .header(CONTENT_TYPE, "application/json")
            .header(signature::ID_HEADER, id)
            .header(signature::TIMESTAMP_HEADER, seconds)
            .header(signature::SIGNATURE_HEADER, signatures)
            .header(payload::SEQUENCE_HEADER, delivery.marks.sequence.0);
        let request = delivery.marks.flags().fold(request, |request, (name, value)| request.header(name, value));
        Ok(request.body(delivery.body).send().await?)
    }
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Http(#[from] reqwest::Error),
}

impl Failure {
    fn describe(&self) -> (Answer, String) {
        let error = match self {
            Self::Refused(refusal) => return (Answer::Refused, refusal.to_string()),
            Self::Http(error) => error,
        };
        if let Some(refusal) = refusal_within(error) {
            return (Answer::Refused, refusal.to_string());
        }
        let kind = if error.is_timeout() {
            "timeout"
        } else if error.is_connect() {
            "connection failed"
        } else {
            "request failed"
        };
        (Answer::Silence, format!("{kind}: {}", innermost(error)))
    }
}

/// The resolver's verdict, from under the layers of the HTTP client.
fn refusal_within(error: &reqwest::Error) -> Option<Refusal> {
    causes(error).find_map(|cause| cause.downcast_ref::<Refusal>().copied())
}

fn innermost(error: &reqwest::Error) -> String {
    causes(error).last().map(ToString::to_string).unwrap_or_default()
}

fn causes<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    const CAUSES_MAX: usize = 16;
    std::iter::successors(Some(error), |error| error.source()).take(CAUSES_MAX)
}

async fn read(mut response: reqwest::Response) -> (Answer, String) {
    let answer = Answer::Status { code: response.status().as_u16(), retry_after: retry_after(response.headers()) };
    let mut excerpt = Vec::new();
    let mut read_bytes = 0;
    // The status decides; a body that breaks off or trickles changes nothing.
    let reading = async {
        while let Ok(Some(chunk)) = response.chunk().await {
            let missing = EXCERPT_BYTES - excerpt.len();
            excerpt.extend_from_slice(&chunk[..chunk.len().min(missing)]);
            read_bytes += chunk.len();
            if read_bytes >= RESPONSE_BYTES_MAX {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(RESPONSE_PATIENCE, reading).await;
    (answer, String::from_utf8_lossy(&excerpt).into_owned())
}

/// Only the form in seconds: the form with a date would need the receiver's clock to be right.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

fn tls() -> Result<rustls::ClientConfig, BuildError> {
    let roots = RootCertStore::from_iter(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| BuildError(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

#[derive(Debug)]
struct GuardedResolver(Policy);

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let policy = self.0;
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let addresses: Vec<SocketAddr> = found.take(ADDRESSES_MAX).collect();
            // One forbidden address condemns the name: nobody serves a webhook from inside and outside at once.
            for address in &addresses {
                guard::check_address(address.ip(), policy)?;
            }
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::delivery::Course;
    use crate::domain::endpoint::DeliverySeq;
    use crate::domain::id::{EventSeq, NumberId};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    const EVENT: EventId = EventId { number: NumberId(1), seq: EventSeq(2) };

    fn client(policy: Policy) -> WebhookClient {
        let timeout = Duration::from_secs(2);
        WebhookClient::new(Config { policy, timeout }).unwrap()
    }

    async fn deliver(client: &WebhookClient, url: &str) -> Report {
        let secrets = [Secret::mint(&[1; signature::SECRET_BYTES])];
        let marks = Marks { sequence: DeliverySeq(9), course: Course::Late, missing: 1 };
        let delivery = Delivery {
            url,
            secrets: &secrets,
            event: EVENT,
            marks,
            body: b"{}".to_vec(),
            now: Timestamp(1_614_265_330_000),
        };
        client.deliver(delivery).await
    }

    /// A receiver that answers one request with `response` and returns what it was sent.
    async fn receiver(response: String) -> (String, impl Future<Output = String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook", listener.local_addr().unwrap());
        let served = async move {
            let (mut socket, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"{}") {
                let mut chunk = [0; 1024];
                let read = socket.read(&mut chunk).await.unwrap();
                assert_ne!(read, 0, "request broke off");
                request.extend_from_slice(&chunk[..read]);
            }
            let _ = socket.write_all(response.as_bytes()).await;
            String::from_utf8(request).unwrap()
        };
        (url, served)
    }

    #[tokio::test]
    async fn a_request_carries_the_three_headers_and_the_answer_comes_back() {
        let response = "HTTP/1.1 503 Busy\r\nretry-after: 120\r\ncontent-length: 4\r\n\r\nbusy";
        let (url, served) = receiver(response.to_owned()).await;
        let client = client(Policy::AllowPrivate);
        let (report, request) = tokio::join!(deliver(&client, &url), served);
        let expected = Answer::Status { code: 503, retry_after: Some(Duration::from_secs(120)) };
        assert_eq!((report.answer, report.excerpt.as_str()), (expected, "busy"));
        for header in [
            "webhook-id: evt_00000000000010000000000002",
            "webhook-timestamp: 1614265330",
            "webhook-signature: v1,",
            "webhook-sequence: 9",
            "webhook-late: true",
            "webhook-missing: 1",
        ] {
            assert!(request.contains(header), "{header} not in {request}");
        }
    }

    #[tokio::test]
    async fn redirects_are_answers_and_big_answers_are_cut() {
        let body = "x".repeat(RESPONSE_BYTES_MAX * 2);
        let response = format!("HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\n\r\n{body}");
        let (url, served) = receiver(response).await;
        let client = client(Policy::AllowPrivate);
        let (report, _) = tokio::join!(deliver(&client, &url), served);
        assert_eq!(report.answer.outcome(), "redirected");
        assert_eq!(report.excerpt.len(), EXCERPT_BYTES);
    }

    #[tokio::test]
    async fn nothing_listens_is_silence() {
        let report = deliver(&client(Policy::AllowPrivate), "http://127.0.0.1:1/").await;
        assert_eq!(report.answer, Answer::Silence);
        assert!(report.excerpt.starts_with("connection failed"), "{}", report.excerpt);
    }

    #[tokio::test]
    async fn private_targets_are_refused_as_literal_and_as_name() {
        let client = client(Policy::PublicOnly);
        for url in ["https://127.0.0.1/", "https://0x7f.1/", "https://localhost/"] {
            assert_eq!(deliver(&client, url).await.answer, Answer::Refused, "{url}");
        }
        let resolver = GuardedResolver(Policy::PublicOnly);
        let error = resolver.resolve("localhost".parse().unwrap()).await.err().unwrap();
        assert_eq!(error.downcast_ref::<Refusal>(), Some(&Refusal::NotPublic));
    }

    #[tokio::test]
    async fn a_refusing_resolver_is_seen_through_the_http_client() {
        // The name passes the check of the URL; only its address betrays it.
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls().unwrap())
            .no_proxy()
            .dns_resolver(GuardedResolver(Policy::PublicOnly))
            .build()
            .unwrap();
        let error = http.get("https://localhost/").send().await.unwrap_err();
        assert_eq!(Failure::Http(error).describe().0, Answer::Refused);
    }
}
