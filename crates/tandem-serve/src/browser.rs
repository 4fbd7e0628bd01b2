//! What web pages may do: nothing, unless they are this server's own or --cors-origin names them.
//!
//! A browser sends a page's requests to any address, to this machine's loopback too, and a page can make its own name
//! resolve to it (DNS rebinding). So the name that was asked for is checked, then the page that asks, then the type of the
//! body: a page of any origin may send text and forms without asking first.

use std::net::IpAddr;

use axum::extract::Request;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tower_http::cors::{AllowHeaders, AllowOrigin, Any, CorsLayer};

use crate::app::ServeError;
use crate::error::ApiError;

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const SEC_FETCH_MODE: HeaderName = HeaderName::from_static("sec-fetch-mode");

/// Who may ask.
#[derive(Clone, Debug, Default)]
pub(crate) struct Access {
    /// Names besides those of this machine, in lower case; any name if there is none.
    hosts: Option<Vec<String>>,
    origins: Origins,
}

/// Pages besides the server's own.
#[derive(Clone, Debug)]
enum Origins {
    Any,
    These(Vec<HeaderValue>),
}

impl Default for Origins {
    fn default() -> Self {
        Origins::These(vec![])
    }
}

impl Access {
    /// Reads names and origins, `*` for any; without names the one that was asked for is not looked at.
    ///
    /// # Errors
    /// A value is neither a name nor an origin.
    pub(crate) fn new(hosts: Option<&[String]>, origins: &[String]) -> Result<Access, ServeError> {
        for host in hosts.unwrap_or_default() {
            let is_name = host == "*" || host.parse::<Authority>().is_ok_and(|a| a.port().is_none());
            if !is_name {
                return Err(ServeError::Host(host.clone()));
            }
        }
        let hosts = hosts.filter(|hosts| !hosts.iter().any(|host| host == "*"));
        let hosts = hosts.map(|hosts| hosts.iter().map(|host| host.to_lowercase()).collect());
        if origins.iter().any(|origin| origin == "*") {
            return Ok(Access { hosts, origins: Origins::Any });
        }
        let origins = origins.iter().map(|origin| read_origin(origin)).collect::<Result<_, _>>()?;
        Ok(Access { hosts, origins: Origins::These(origins) })
    }

    /// Answers to browsers' questions; none if only the server's own pages may ask.
    pub(crate) fn cors(&self) -> Option<CorsLayer> {
        let origins = match &self.origins {
            Origins::Any => AllowOrigin::any(),
            Origins::These(origins) if origins.is_empty() => return None,
            Origins::These(origins) => AllowOrigin::list(origins.iter().cloned()),
        };
        // By name: `*` would leave Authorization out.
        let headers = AllowHeaders::mirror_request();
        Some(CorsLayer::new().allow_origin(origins).allow_methods(Any).allow_headers(headers).expose_headers(Any))
    }

    fn check(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<(), ApiError> {
        let refuse = |message: String| Err(ApiError::forbidden(message));
        let mut hosts = headers.get_all(header::HOST).iter();
        let host = match (uri.authority(), hosts.next()) {
            (Some(authority), _) => Some(authority.clone()),
            (None, None) => None,
            (None, Some(host)) => match (Authority::try_from(host.as_bytes()), hosts.next()) {
                (Ok(host), None) => Some(host),
                _ => return refuse("the Host header is not one name; send the address of this server".into()),
            },
        };
        if let (Some(names), Some(host)) = (&self.hosts, &host)
            && !is_this_machine(host.host())
            && !names.contains(&host.host().to_lowercase())
        {
            let host = host.host();
            return refuse(format!(
                "this server does not go by the name {host:?}; start it with --allowed-host {host} if it should"
            ));
        }
        let site = headers.get(SEC_FETCH_SITE).map(HeaderValue::as_bytes);
        match headers.get(header::ORIGIN) {
            Some(origin) if !self.is_allowed(origin) && !is_own(origin, host.as_ref()) => {
                let origin = String::from_utf8_lossy(origin.as_bytes());
                return refuse(format!(
                    "pages of {origin} may not use this server; start it with --cors-origin {origin} if they should"
                ));
            }
            // A link to the page may be followed from anywhere.
            None if !matches!(site, None | Some(b"same-origin" | b"none"))
                && (method != Method::GET || headers.get(SEC_FETCH_MODE).is_none_or(|mode| mode != "navigate")) =>
            {
                return refuse(
                    "pages of other sites may not use this server; --cors-origin names those that may".into(),
                );
            }
            _ => {}
        }
        if method == Method::POST {
            let is_browser = site.is_some() || headers.contains_key(header::ORIGIN);
            check_type(headers.get(header::CONTENT_TYPE), is_browser)?;
        }
        Ok(())
    }

    fn is_allowed(&self, origin: &HeaderValue) -> bool {
        match &self.origins {
            Origins::Any => true,
            Origins::These(origins) => origins.contains(origin),
        }
    }
}

/// Lets requests pass that no foreign page can have made.
pub(crate) async fn guard(access: Access, request: Request, next: Next) -> Response {
    match access.check(request.method(), request.uri(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

fn read_origin(origin: &str) -> Result<HeaderValue, ServeError> {
    let is_origin = origin == "null"
        || origin.split_once("://").is_some_and(|(scheme, host)| {
            let is_scheme = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
            !scheme.is_empty() && scheme.chars().all(is_scheme) && host.parse::<Authority>().is_ok()
        });
    let value = is_origin.then(|| origin.to_lowercase().parse().ok()).flatten();
    value.ok_or_else(|| ServeError::Origin(origin.to_owned()))
}

/// Whether a name can only mean this machine, or is an address that needs no name.
fn is_this_machine(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    let name = host.trim_end_matches('.').to_lowercase();
    name == "localhost" || name.ends_with(".localhost") || address.parse::<IpAddr>().is_ok_and(|a| a.is_loopback())
}

/// Whether the page that asks came from the server that it asks.
fn is_own(origin: &HeaderValue, host: Option<&Authority>) -> bool {
    let Some((scheme, origin)) = origin.to_str().ok().and_then(|origin| origin.split_once("://")) else { return false };
    let default = match scheme {
        "http" => 80,
        "https" => 443,
        _ => return false,
    };
    let (Ok(origin), Some(host)) = (origin.parse::<Authority>(), host) else { return false };
    let port = |authority: &Authority| authority.port_u16().unwrap_or(default);
    origin.host().eq_ignore_ascii_case(host.host()) && port(&origin) == port(host)
}

/// JSON, or what a program without care for the type sends.
fn check_type(content_type: Option<&HeaderValue>, is_browser: bool) -> Result<(), ApiError> {
    let given = content_type.map(|given| String::from_utf8_lossy(given.as_bytes()).to_lowercase());
    let essence = given.as_deref().map(|given| given.split(';').next().unwrap_or_default().trim());
    let is_json = essence.is_some_and(|essence| {
        essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
    });
    let is_simple = essence.is_some_and(|essence| essence.starts_with("text/") || essence.starts_with("multipart/"));
    if is_json || !(is_browser || is_simple) {
        return Ok(());
    }
    let found = essence.map_or("none".to_owned(), |essence| format!("{essence:?}"));
    Err(ApiError::unsupported_type(format!("the content type is {found}, expected application/json")))
}

impl ApiError {
    /// 403: a web page asks that may not.
    fn forbidden(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::FORBIDDEN, message)
    }

    /// 415: the body is not JSON.
    fn unsupported_type(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(is_loopback: bool, hosts: &[&str], origins: &[&str]) -> Access {
        let owned = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let hosts = (is_loopback || !hosts.is_empty()).then(|| owned(hosts));
        Access::new(hosts.as_deref(), &owned(origins)).unwrap()
    }

    /// Status of a request with these headers, 200 if it passes.
    #[track_caller]
    fn check(access: &Access, method: &str, headers: &[(&str, &str)], expected: u16) {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(HeaderName::try_from(*name).unwrap(), value.parse().unwrap());
        }
        let found = access.check(&method.parse().unwrap(), &"/x".parse().unwrap(), &map);
        assert_eq!(found.map_or_else(|e| e.status().as_u16(), |()| 200), expected, "{headers:?}");
    }

    #[test]
    fn names() {
        let own = access(true, &[], &[]);
        for (host, expected) in [
            ("localhost:8000", 200),
            ("LOCALHOST", 200),
            ("localhost.:8000", 200),
            ("a.localhost", 200),
            ("127.0.0.1:8000", 200),
            ("127.1.2.3", 200),
            ("[::1]:8000", 200),
            ("evil.example", 403),
            ("evil.example:8000", 403),
            ("localhost.evil.example", 403),
            ("127.0.0.1.evil.example", 403),
            ("192.168.0.4", 403),
            ("a b", 403),
            ("", 403),
        ] {
            check(&own, "GET", &[("host", host)], expected);
        }
        check(&own, "GET", &[], 200);
        check(&own, "GET", &[("host", "localhost"), ("host", "evil.example")], 403);
        let named = access(true, &["Box.example"], &[]);
        check(&named, "GET", &[("host", "box.example:8000")], 200);
        check(&named, "GET", &[("host", "localhost")], 200);
        check(&named, "GET", &[("host", "evil.example")], 403);
        check(&access(true, &["*"], &[]), "GET", &[("host", "evil.example")], 200);
        // Reached by names that it cannot know.
        check(&access(false, &[], &[]), "GET", &[("host", "box.example")], 200);
        check(&access(false, &["box.example"], &[]), "GET", &[("host", "evil.example")], 403);
        assert!(Access::new(Some(&["http://box".into()]), &[]).is_err());
        assert!(Access::new(Some(&["box:80".into()]), &[]).is_err());
    }

    #[test]
    fn pages() {
        let json = ("content-type", "application/json");
        for is_loopback in [true, false] {
            let own = access(is_loopback, &[], &["https://app.example", "null"]);
            for (origin, expected) in [
                ("http://127.0.0.1:8000", 200),
                ("https://app.example", 200),
                ("null", 200),
                ("http://localhost:8000", 403),
                ("http://127.0.0.1:3000", 403),
                ("http://127.0.0.1", 403),
                ("https://app.example.evil.example", 403),
                ("http://app.example", 403),
                ("file://", 403),
                ("x", 403),
            ] {
                for method in ["GET", "POST", "OPTIONS"] {
                    check(&own, method, &[("host", "127.0.0.1:8000"), ("origin", origin), json], expected);
                }
            }
        }
        let closed = access(true, &[], &[]);
        check(&closed, "POST", &[("host", "localhost:8000"), ("origin", "null"), json], 403);
        check(&access(true, &[], &["*"]), "POST", &[("host", "localhost"), ("origin", "http://a.example"), json], 200);
        // Behind a proxy that ends TLS.
        check(&access(false, &[], &[]), "POST", &[("host", "a.example"), ("origin", "https://a.example"), json], 200);
        for (site, mode, method, expected) in [
            ("same-origin", "cors", "POST", 200),
            ("none", "navigate", "GET", 200),
            ("cross-site", "navigate", "GET", 200),
            ("cross-site", "no-cors", "GET", 403),
            ("same-site", "no-cors", "GET", 403),
            ("cross-site", "navigate", "POST", 403),
        ] {
            let headers = [("host", "localhost"), ("sec-fetch-site", site), ("sec-fetch-mode", mode), json];
            check(&closed, method, &headers, expected);
        }
        for bad in ["app.example", "https://app.example/", "https://app.example/x", "://x", "", "http://"] {
            assert!(Access::new(None, &[bad.into()]).is_err(), "{bad}");
        }
    }

    #[test]
    fn types_of_bodies() {
        let own = access(true, &[], &[]);
        let page = [("host", "localhost"), ("origin", "http://localhost")];
        let site = [("host", "localhost"), ("sec-fetch-site", "same-origin")];
        for (content_type, of_a_program, of_a_page) in [
            ("application/json", 200, 200),
            ("application/JSON; charset=utf-8", 200, 200),
            ("application/vnd.api+json", 200, 200),
            ("application/x-www-form-urlencoded", 200, 415),
            ("application/octet-stream", 200, 415),
            ("text/plain", 415, 415),
            ("text/plain;charset=UTF-8", 415, 415),
            ("text/json", 415, 415),
            ("multipart/form-data; boundary=x", 415, 415),
        ] {
            let given = ("content-type", content_type);
            check(&own, "POST", &[("host", "localhost"), given], of_a_program);
            check(&own, "POST", &[page[0], page[1], given], of_a_page);
            check(&own, "POST", &[site[0], site[1], given], of_a_page);
        }
        check(&own, "POST", &[("host", "localhost")], 200);
        check(&own, "POST", &page, 415);
        check(&own, "POST", &site, 415);
    }
}
