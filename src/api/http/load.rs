//! Counts every call for the load reports, and puts a report into the trailers of answered sends.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use http_body_util::BodyExt as _;

use crate::api::grpc::orca::{REPORTED, TRAILER, trailer};
use crate::api::service::Api;

const GRPC_STATUS: &str = "grpc-status";

pub(super) async fn report_load(State(api): State<Arc<Api>>, request: Request, next: Next) -> Response {
    let reported = request.uri().path() == REPORTED;
    let under_way = api.load().begin();
    let mut response = next.run(request).await;
    let refused = response.headers().get(GRPC_STATUS).is_some_and(|status| status != "0");
    under_way.end(refused || response.status().is_server_error());
    if !reported {
        return response;
    }
    let Ok(value) = HeaderValue::try_from(trailer(&api)) else { return response };
    if response.headers().contains_key(GRPC_STATUS) {
        // An answer without a body has its trailers in front.
        response.headers_mut().insert(TRAILER, value);
        return response;
    }
    response.map(|body| {
        Body::new(body.map_frame(move |frame| match frame.into_trailers() {
            Ok(trailers) => http_body::Frame::trailers(with_report(trailers, &value)),
            Err(frame) => frame,
        }))
    })
}

fn with_report(mut trailers: HeaderMap, value: &HeaderValue) -> HeaderMap {
    trailers.insert(TRAILER, value.clone());
    trailers
}
