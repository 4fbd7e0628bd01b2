//! The chat page: one document, put together from the files in `page/` when it is first asked for, with a policy that names
//! its parts by their digests.
//!
//! Each file of our own is a module with a scope of its own; `import { a } from "./file.js"` takes names from one before it.
//! What the browser may load is this page alone, and what it may talk to is this server, and another one if the page's
//! address names it: the user chose it in the settings, and the page went there.

use std::sync::LazyLock;

use axum::extract::Query;
use axum::extract::rejection::QueryRejection;
use axum::http::uri::Authority;
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use sha2::{Digest, Sha256};

const DOCUMENT: &str = include_str!("../page/index.html");
const STYLE: &str = concat!(include_str!("../page/style.css"), include_str!("../page/vendor/temml.css"));
/// TeX Gyre Termes Math, the characters that formulas use: many systems have no font for them.
const FONT: &[u8] = include_bytes!("../page/vendor/math.woff2");
/// Libraries, as scripts/page/vendor.mjs built them; licences are in page/vendor/LICENSES.
const LIBRARIES: &[&str] = &[
    include_str!("../page/vendor/marked.js"),
    include_str!("../page/vendor/highlight.js"),
    include_str!("../page/vendor/temml.js"),
];
/// Our own modules, each after those that it uses.
const MODULES: &[(&str, &str)] = &[
    ("elements", include_str!("../page/elements.js")),
    ("stream", include_str!("../page/stream.js")),
    ("store", include_str!("../page/store.js")),
    ("conversation", include_str!("../page/conversation.js")),
    ("settings", include_str!("../page/settings.js")),
    ("state", include_str!("../page/state.js")),
    ("markdown", include_str!("../page/markdown.js")),
    ("talk", include_str!("../page/talk.js")),
    ("chat", include_str!("../page/chat.js")),
    ("panel", include_str!("../page/panel.js")),
    ("main", include_str!("../page/main.js")),
];
/// Places in the document.
const STYLE_PLACE: &str = "/* style.css */";
const SCRIPTS_PLACE: &str = "<!-- scripts -->";

static PAGE: LazyLock<Page> = LazyLock::new(Page::new);

struct Page {
    html: String,
    /// All of the policy but the servers that may be talked to.
    policy: String,
}

impl Page {
    fn new() -> Page {
        let own = MODULES.iter().map(|(name, source)| scoped(name, source)).collect::<String>();
        let own = format!("\"use strict\";\n{own}");
        let scripts: Vec<&str> = LIBRARIES.iter().copied().chain([own.as_str()]).collect();
        let elements: String = scripts.iter().map(|script| format!("<script>{script}</script>\n")).collect();
        let font = BASE64_STANDARD.encode(FONT);
        let style = format!(
            "{STYLE}@font-face {{ font-family: \"Page Math\"; src: url(data:font/woff2;base64,{font}) format(\"woff2\"); }}\n"
        );
        let html = DOCUMENT.replacen(STYLE_PLACE, &style, 1).replacen(SCRIPTS_PLACE, elements.trim_end(), 1);
        let digests: Vec<String> = scripts.iter().map(|script| digest(script)).collect();
        let policy = format!(
            "default-src 'none'; script-src {}; style-src {}; img-src data: blob:; font-src data:; base-uri 'none'; \
             form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
            digests.join(" "),
            digest(&style),
        );
        Page { html, policy }
    }
}

/// A source as a policy names it.
fn digest(text: &str) -> String {
    format!("'sha256-{}'", BASE64_STANDARD.encode(Sha256::digest(text)))
}

/// A module as a function's body: its imports come from modules before it, its exports are the function's value.
fn scoped(name: &str, source: &str) -> String {
    let mut exports = vec![];
    let mut body = String::new();
    for line in source.lines() {
        if let Some((names, file)) = line.strip_prefix("import ").and_then(|line| line.split_once(" from \"./")) {
            body += &format!("const {names} = module_{};\n", file.trim_end_matches(".js\";"));
            continue;
        }
        let declaration = line.strip_prefix("export ");
        if let Some(declaration) = declaration {
            let words = declaration.split(|c: char| !(c.is_alphanumeric() || c == '_'));
            exports.extend(words.filter(|w| !matches!(*w, "" | "async" | "function" | "const" | "class")).take(1));
        }
        body += declaration.unwrap_or(line);
        body.push('\n');
    }
    format!("const module_{name} = (() => {{\n{body}return {{ {} }};\n}})();\n", exports.join(", "))
}

/// What the page's address may say.
#[derive(Deserialize)]
pub(crate) struct Address {
    /// Origin of another server that the page talks to.
    server: Option<String>,
}

/// An origin of the web that can stand in a policy; none if it is anything else.
fn read_origin(origin: &str) -> Option<&str> {
    let (scheme, host) = origin.split_once("://")?;
    let is_host = |c: char| c.is_ascii_alphanumeric() || ".-:[]".contains(c);
    let is_origin =
        matches!(scheme, "http" | "https") && host.chars().all(is_host) && host.parse::<Authority>().is_ok();
    is_origin.then_some(origin)
}

fn policy(page: &Page, server: Option<&str>) -> String {
    let other = server.and_then(read_origin).map(|origin| format!(" {origin}")).unwrap_or_default();
    format!("{}; connect-src 'self'{other}", page.policy)
}

/// The chat page.
pub(crate) async fn page(address: Result<Query<Address>, QueryRejection>) -> Response {
    let server = address.ok().and_then(|Query(address)| address.server);
    let headers = [
        (header::CONTENT_SECURITY_POLICY, policy(&PAGE, server.as_deref())),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        (header::REFERRER_POLICY, "no-referrer".to_owned()),
        (header::CACHE_CONTROL, "no-cache".to_owned()),
    ];
    (headers, Html(PAGE.html.as_str())).into_response()
}

/// The browser's question for an icon.
pub(crate) async fn no_icon() -> StatusCode {
    StatusCode::NO_CONTENT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_document_of_bounded_size() {
        let Page { html, policy } = &*PAGE;
        assert!(html.len() < 1_000_000, "{} bytes", html.len());
        assert!(!html.contains(STYLE_PLACE) && !html.contains(SCRIPTS_PLACE));
        // Nothing in a script ends it, and each is named by the policy.
        let scripts: Vec<&str> =
            html.split("<script>").skip(1).filter_map(|s| s.split_once("</script>")).map(|s| s.0).collect();
        assert_eq!(scripts.len(), LIBRARIES.len() + 1);
        for script in scripts {
            assert!(policy.contains(&digest(script)));
        }
        let style =
            html.split_once("<style>").and_then(|(_, rest)| rest.split_once("</style>")).map(|(style, _)| style);
        assert!(style.is_some_and(|style| policy.contains(&digest(style))));
        // Nothing is loaded from elsewhere, and no attribute is a script or a style.
        for attribute in ["src=", "href=\"http", " style=", " onclick=", "@import", "url(\"http", "url('http"] {
            assert!(!DOCUMENT.contains(attribute) && !STYLE.contains(attribute), "{attribute}");
        }
        for source in MODULES.iter().map(|(_, source)| source) {
            for sink in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"] {
                assert!(!source.contains(sink), "{sink}");
            }
            let imports = source.lines().filter(|line| line.starts_with("import "));
            imports.for_each(|line| assert!(line.ends_with(".js\";") && line.contains(" from \"./"), "{line}"));
        }
    }

    #[test]
    fn modules_in_their_order() {
        for (i, (name, source)) in MODULES.iter().enumerate() {
            for used in source.lines().filter_map(|line| line.strip_prefix("import ")?.split_once("\"./")) {
                let used = used.1.trim_end_matches(".js\";");
                assert!(MODULES[..i].iter().any(|(before, _)| *before == used), "{name} uses {used}");
            }
        }
        let module = scoped("a", "import { b } from \"./c.js\";\nexport async function* d() {}\nexport const e = 1;\n");
        let want = "const module_a = (() => {\nconst { b } = module_c;\nasync function* d() {}\nconst e = 1;\nreturn { d, e };\n})();\n";
        assert_eq!(module, want);
    }

    #[test]
    fn policies() {
        let own = policy(&PAGE, None);
        assert!(!own.contains("unsafe") && own.ends_with("; connect-src 'self'"), "{own}");
        for (server, want) in [
            ("https://api.example.com", Some(" https://api.example.com")),
            ("http://10.0.0.1:8000", Some(" http://10.0.0.1:8000")),
            ("http://[::1]:8000", Some(" http://[::1]:8000")),
            ("https://a.example; script-src *", None),
            ("https://a.example 'unsafe-inline'", None),
            ("https://a.example,default-src *", None),
            ("https://*", None),
            ("*", None),
            ("https:", None),
            ("https://user@a.example", None),
            ("https://a.example/path", None),
            ("javascript://a", None),
            ("ws://a.example", None),
            ("https://", None),
            ("https://a.example\r\nx: y", None),
            ("", None),
        ] {
            let got = policy(&PAGE, Some(server));
            assert_eq!(got.strip_prefix(&own), Some(want.unwrap_or_default()), "{server}");
        }
    }
}
