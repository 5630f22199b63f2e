//! Requests that are wrong in all the ways there are, and the judgement on each answer.

use std::{
    io::{self, Write},
    sync::LazyLock,
    time::Duration,
};

use flate2::{Compression, write::GzEncoder};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::{
    attack::{Attack, connect},
    scratch,
};

/// More than any deadline of the service: an answer later than this is none.
const PATIENCE: Duration = Duration::from_secs(40);
/// Of what takes long to send, one in so many.
const RARELY: u64 = 500;
/// How often what is random is thrown anew.
const RENEW_EVERY: u64 = 1000;
const LARGE_BYTES: usize = 2 * 1024 * 1024 + 1;

/// Sends what is next until there is nothing left, and judges the answers.
pub async fn send_all(attack: &Attack, number: usize) {
    let mut line = None;
    let mut corpus = vec![];
    while let Some(n) = attack.next() {
        if corpus.is_empty() || n.is_multiple_of(RENEW_EVERY) {
            corpus = Hostile::all(n, attack.key());
        }
        let large;
        let request = if n.is_multiple_of(RARELY) {
            large = Hostile::large(n / RARELY, attack.key());
            &large
        } else {
            &corpus[n as usize % corpus.len()]
        };
        let reused = line.is_some();
        let outcome = match send(attack, number, &mut line, request).await {
            // The service had closed after what came before.
            Err(_) if reused => {
                line = None;
                send(attack, number, &mut line, request).await
            }
            outcome => outcome,
        };
        match outcome {
            Ok(answer) => judge(attack, request, &answer, &mut line),
            Err(error) => {
                line = None;
                attack.count(if request.may_be_cut { "cut off without an answer" } else { "WRONG no answer" });
                if !request.may_be_cut {
                    eprintln!("hostile: no answer to {}: {error}", request.what);
                }
            }
        }
    }
}

async fn send(attack: &Attack, number: usize, line: &mut Option<TcpStream>, request: &Hostile) -> io::Result<Answer> {
    let stream = match line {
        Some(stream) => stream,
        None => line.insert(connect(attack.at(), number).await?),
    };
    let (mut reader, mut writer) = stream.split();
    // An answer may come before all is sent, and the rest is not taken then.
    let sending = async {
        let _ = writer.write_all(&request.bytes).await;
        std::future::pending::<()>().await;
    };
    let exchange = async {
        tokio::select! {
            answer = Answer::read(&mut reader) => answer,
            () = sending => Err(io::ErrorKind::BrokenPipe.into()),
        }
    };
    timeout(PATIENCE, exchange).await.map_err(io::Error::from)?
}

fn judge(attack: &Attack, request: &Hostile, answer: &Answer, line: &mut Option<TcpStream>) {
    attack.count(&format!("answered {}", answer.status));
    let fault = answer.fault().or_else(|| (request.refused && answer.status < 400).then_some("it was taken"));
    if let Some(fault) = fault {
        attack.count(&format!("WRONG {fault}"));
        eprintln!("hostile: {fault}: {} was answered {}", request.what, answer.head);
    }
    if answer.closes || !request.is_whole {
        *line = None;
    }
}

struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
    closes: bool,
}

impl Answer {
    async fn read(reader: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Self> {
        let mut bytes = Vec::with_capacity(1024);
        loop {
            if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
                let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
                let mut body = bytes.split_off(end + 4);
                let status =
                    head.get(9..12).and_then(|status| status.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
                if status == 100 {
                    bytes = body;
                    continue;
                }
                let header = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
                let length = header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
                let closes = header("connection") == Some("close");
                while body.len() < length {
                    if reader.read_buf(&mut body).await? == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                return Ok(Self { status, head, body, closes });
            }
            if reader.read_buf(&mut bytes).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    fn fault(&self) -> Option<&'static str> {
        let has = |text: &str| self.head.to_ascii_lowercase().contains(text);
        match self.status {
            ..400 => None,
            503 if !has("\r\nretry-after: ") => Some("503 without Retry-After"),
            500..=502 | 504.. => Some("a server error"),
            _ if !has("\r\ncontent-type: application/problem+json") || !has("\r\nx-request-id: ") => {
                Some("a refusal without a problem")
            }
            _ => match serde_json::from_slice::<Value>(&self.body) {
                Ok(problem) if problem["code"].is_string() && problem["status"] == self.status => None,
                _ => Some("a refusal without a code"),
            },
        }
    }
}

struct Hostile {
    what: &'static str,
    bytes: Vec<u8>,
    /// It must not be taken.
    refused: bool,
    /// Ends where a request ends, so that another may follow on the same connection.
    is_whole: bool,
    /// Not clear enough to be owed an answer, or cut off while it is sent.
    may_be_cut: bool,
}

impl Hostile {
    /// One of each kind, but the large ones; what is random in them is the same in every run.
    fn all(seed: u64, key: &str) -> Vec<Self> {
        let mut chance = Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut all = Self::bodies(&mut chance, key);
        all.extend(Self::requests(&mut chance, key));
        all
    }

    fn of(what: &'static str, bytes: impl Into<Vec<u8>>) -> Self {
        Self { what, bytes: bytes.into(), refused: true, is_whole: true, may_be_cut: false }
    }

    /// May be taken, or not: it must only not fail.
    fn or_not(self) -> Self {
        Self { refused: false, ..self }
    }

    /// Whatever follows on this connection is not to be trusted.
    fn broken(self) -> Self {
        Self { is_whole: false, ..self }
    }

    fn cut(self) -> Self {
        Self { may_be_cut: true, is_whole: false, ..self }
    }

    fn large(n: u64, key: &str) -> Self {
        let head = |length: &str| {
            format!(
                "POST /v1/users HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n{length}\r\n\r\n"
            )
        };
        if n.is_multiple_of(2) {
            let mut bytes = head(&format!("content-length: {LARGE_BYTES}")).into_bytes();
            bytes.resize(bytes.len() + LARGE_BYTES, b' ');
            return Self::of("a body of 2 MiB and a byte", bytes).cut();
        }
        let mut bytes = head("transfer-encoding: chunked").into_bytes();
        for _ in 0..1024 {
            bytes.extend_from_slice(b"400\r\n");
            bytes.resize(bytes.len() + 1024, b' ');
            bytes.extend_from_slice(b"\r\n");
        }
        Self::of("chunks without end", bytes).cut()
    }

    fn bodies(chance: &mut Chance, key: &str) -> Vec<Self> {
        let json = "application/json";
        let post = |media_type: &str, extra: &str, body: &[u8]| {
            let head = format!(
                "POST /v1/users HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\ncontent-type: {media_type}\r\n{extra}content-length: {}\r\n\r\n",
                body.len()
            );
            [head.as_bytes(), body].concat()
        };
        let profile = |value: &str| format!("{{\"profile\":{{\"first_name\":{value}}}}}").into_bytes();
        let noise = chance.bytes(200);
        vec![
            Self::of("a gzip bomb", post(json, "content-encoding: gzip\r\n", &GZIP_BOMB)),
            Self::of("a gzip bomb under a false name", post(json, "", &GZIP_BOMB)),
            Self::of("deep JSON", post(json, "", "[".repeat(30_000).as_bytes())),
            Self::of("deep objects", post(json, "", "{\"profile\":".repeat(5000).as_bytes())),
            Self::of("a NUL", post(json, "", &profile("\"\\u0000\""))),
            Self::of("a bare NUL", post(json, "", b"{\"profile\":{\"first_name\":\"\0\"}}")),
            Self::of("a lone surrogate", post(json, "", &profile("\"\\ud800\""))),
            Self::of("int64 + 1", post(json, "", &profile("9223372036854775808"))),
            Self::of("a number without end", post(json, "", &profile(&"9".repeat(60_000)))),
            Self::of("1e999999", post(json, "", &profile("1e999999"))),
            Self::of("duplicate keys", post(json, "", b"{\"profile\":{\"city\":\"a\",\"city\":\"b\"}}")),
            Self::of("many unknown fields", post(json, "", many_fields().as_bytes())),
            Self::of("another media type", post("text/xml", "", b"<profile/>")),
            Self::of("another charset", post("application/json; charset=utf-7", "", b"{\"profile\":{}}")),
            Self::of("a media type of noise", post("a/b;;;=\"", "", b"{\"profile\":{}}")),
            Self::of("random bytes", post(json, "", &noise)),
            Self::of("not UTF-8", post(json, "", b"{\"profile\":{\"first_name\":\"\xff\xfe\"}}")),
            Self::of("a body too large by a byte", post(json, "", &vec![b' '; 65_537])).cut(),
            Self::of("a long string", post(json, "", &profile(&format!("\"{}\"", "x".repeat(65_000))))).or_not(),
            Self::of("a number for a string", post(json, "", &profile("[[[[7]]]]"))),
            Self::of("no body", post(json, "", b"")),
        ]
    }

    fn requests(chance: &mut Chance, key: &str) -> Vec<Self> {
        let user = scratch::user(chance.below(crate::USERS));
        let ask = |line: &str, headers: &str| {
            format!("{line} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n{headers}\r\n")
        };
        let one = format!("GET /v1/users/{user}");
        let noise = chance.bytes(300);
        let wrong_key = format!("tdg_{:016x}_{:064x}", chance.next(), chance.next());
        let many = |line: &str, body: &str| {
            let headers = format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len());
            ask(line, &headers) + body
        };
        let batch = |body: &str| many("POST /v1/users:batchGet", body);
        let replace = |users: &str| many("POST /v1/users:batchReplace", &format!("{{\"users\":[{users}]}}"));
        let ids = vec![format!("\"{user}\""); 1500].join(",");
        vec![
            Self::of("random bytes for a request", noise).cut(),
            Self::of("a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n".to_vec()).broken(),
            Self::of("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec()).cut(),
            Self::of("headers of 20 KiB", ask(&one, &format!("x: {}\r\n", "x".repeat(20_480)))).cut(),
            Self::of("200 headers", ask(&one, &"x: y\r\n".repeat(200))).cut(),
            Self::of("a header with a control character", ask(&one, "x: a\x01b\r\n")).broken(),
            Self::of("a folded header", ask(&one, "x: a\r\n b\r\n")).broken(),
            Self::of("two lengths", ask("POST /v1/users", "content-length: 3\r\ncontent-length: 4\r\n") + "abc")
                .broken(),
            Self::of(
                "a length and chunks",
                ask("POST /v1/users", "content-length: 3\r\ntransfer-encoding: chunked\r\n") + "0\r\n\r\n",
            )
            .broken(),
            Self::of(
                "a chunk that is none",
                ask("POST /v1/users", "content-type: application/json\r\ntransfer-encoding: chunked\r\n")
                    + "zz\r\n\r\n",
            )
            .broken(),
            Self::of(
                "a chunk of 2^64",
                ask("POST /v1/users", "content-type: application/json\r\ntransfer-encoding: chunked\r\n")
                    + "fffffffffffffffff\r\n\r\n",
            )
            .broken(),
            Self::of("a long URI", ask(&format!("GET /v1/users?after={}", "x".repeat(9000)), "")),
            Self::of("a path out of the house", ask("GET /v1/users/..%2f..%2fetc%2fpasswd", "")),
            Self::of("a path that is not UTF-8", ask("GET /v1/users/%ff%fe", "")),
            Self::of("an id with SQL", ask("GET /v1/users/1'%20or%20'1'='1", "")),
            Self::of("a limit of -1", ask("GET /v1/users?limit=-1", "")),
            Self::of("a limit of 2^64", ask("GET /v1/users?limit=18446744073709551616", "")),
            Self::of("a cursor of noise", ask("GET /v1/users?after=AAAAAAAAAAAAAAAAAAAAAAAA", "")),
            Self::of(
                "an entity tag of noise",
                ask(&format!("PATCH /v1/users/{user}"), "if-match: \"\"\"\r\ncontent-length: 0\r\n"),
            ),
            Self::of("a method of noise", ask("BREW /v1/users", "")),
            Self::of("CONNECT", "CONNECT localhost:80 HTTP/1.1\r\nhost: localhost\r\n\r\n").broken(),
            Self::of("no key", "GET /v1/users HTTP/1.1\r\nhost: localhost\r\n\r\n"),
            Self::of(
                "a wrong key",
                format!("GET /v1/users HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {wrong_key}\r\n\r\n"),
            ),
            Self::of("two keys", ask("GET /v1/users", "authorization: Bearer tdg_1_2\r\n")),
            Self::of("Basic", "GET /v1/users HTTP/1.1\r\nhost: localhost\r\nauthorization: Basic dGRnOnRkZw==\r\n\r\n"),
            Self::of("too many ids", batch(&format!("{{\"ids\":[{ids}]}}"))),
            Self::of("a user a thousand times", replace(&vec![format!("{{\"id\":\"{user}\"}}"); 1000].join(","))),
            Self::of("users that are none", replace(&vec!["[]"; 500].join(","))),
            Self::of("users of half a mebibyte and more", replace(&"[7],".repeat(140_000))).cut(),
            Self::of("ids that are none", batch("{\"ids\":[\"\",7,null,{}]}")),
            Self::of("a version that cannot be", ask(&format!("{one}?min_version=9223372036854775807"), "")),
            Self::of(
                "a forged origin",
                ask(&one, "x-forwarded-for: 10.0.0.1\r\nx-request-id: a b\r\ntraceparent: 00-0-0-0\r\n"),
            )
            .or_not(),
            Self::of("an upgrade", ask(&one, "connection: upgrade\r\nupgrade: websocket\r\n")).or_not(),
            Self::of("an expectation", ask(&one, "expect: the-unexpected\r\nrange: bytes=0-99999999999\r\n")).or_not(),
            Self::of("HTTP/1.0", format!("{one} HTTP/1.0\r\nauthorization: Bearer {key}\r\n\r\n")).or_not().broken(),
        ]
    }
}

fn many_fields() -> String {
    let fields: Vec<String> = (0..3000).map(|n| format!("\"f{n}\":{n}")).collect();
    format!("{{\"profile\":{{{}}}}}", fields.join(","))
}

/// 32 MiB of spaces, in 32 KiB.
static GZIP_BOMB: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut packed = GzEncoder::new(vec![], Compression::best());
    let spaces = [b' '; 1024 * 1024];
    let written = (0..32).all(|_| packed.write_all(&spaces).is_ok());
    packed.finish().ok().filter(|_| written).unwrap_or_default()
});

/// Numbers that look random and are the same in every run (xorshift).
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}
