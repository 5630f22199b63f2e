//! Audit-leaks: looks on a live system for users' values where none may be.
//!
//! Promise: it changes nothing, names places and never a value, and finds what is there in what it looks at.
//! Not here, on purpose: proof of absence. It looks for some values in some places; the tests of `privacy` look at every way in.

mod messages;
mod needles;
mod report;
mod tables;

pub use tables::{COLUMNS, SAMPLE, STATISTICS};

use std::{
    fs::File,
    io::{BufRead, BufReader, Read, Write, stdin},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, anyhow, ensure};
use sqlx::Connection;

use crate::{
    config::{self, Faults, duration},
    db::Trouble,
};
use needles::Needles;
use report::{Found, Report};

/// A log is read line by line; of a longer line the parts are.
const LONGEST_LINE_BYTES: u64 = 1024 * 1024;
const METRICS_DEADLINE: Duration = Duration::from_secs(10);

/// False when something was found, or could not be looked at.
///
/// # Errors
/// When there is nothing to look for, or nobody reads the report.
pub async fn run(asked: config::AuditLeaks, mut faults: Faults) -> anyhow::Result<bool> {
    let db = asked.database.open(&mut faults);
    let how_long = faults.note("--listen", duration(&asked.listen));
    let listens = !asked.no_broker;
    let broker = if listens || !asked.peek.is_empty() { asked.exchange.open(&mut faults) } else { None };
    let metrics = asked.metrics.as_deref().map(str::parse::<SocketAddr>).transpose();
    let metrics =
        faults.note("--metrics", metrics.map_err(|_| "expected an IP address and a port, such as 127.0.0.1:8080"));
    let files: Vec<_> = asked.file.iter().filter_map(|path| faults.note("--file", open(path))).collect();
    faults.none()?;
    let (Some(db), Some(how_long), Some(metrics)) = (db, how_long, metrics) else {
        unreachable!("no faults, so all are there")
    };

    let mut connection = db.maintenance("audit-leaks").await?;
    // Also where its user could write.
    sqlx::query("set default_transaction_read_only = on").execute(&mut connection).await.map_err(Trouble::from)?;
    let needles = tables::sample(&mut connection, asked.values.into()).await.map_err(Trouble::from)?;
    ensure!(
        !needles.is_empty(),
        "there is no living user with a value long enough to be told from others: nothing to look for"
    );
    let mut report = Report::of(&needles);
    if let Some(broker) = broker.as_ref().filter(|_| listens) {
        let listened = messages::listen(broker, &needles, how_long, &mut report).await;
        report.looked_at(format!("exchange {}", broker.exchange()), listened);
    }
    let scanned = tables::scan(&mut connection, &needles, &asked.except, &mut report).await;
    report.looked_at("tables", scanned.map_err(|error| Trouble::from(error).into()));
    // Nothing was written, so nothing can be lost.
    let _ = connection.close().await;
    for queue in &asked.peek {
        let Some(broker) = &broker else { unreachable!("no faults, so it is there") };
        let peeked = messages::peek(broker, &needles, queue, &mut report).await;
        report.looked_at(format!("queue {queue}"), peeked);
    }
    for (name, file) in files {
        let read = scan_lines(file, &name, &needles, &mut report);
        report.looked_at(name, read);
    }
    if let Some(address) = metrics {
        let read = fetch_metrics(address).and_then(|lines| scan_lines(lines, "metrics", &needles, &mut report));
        report.looked_at("metrics", read);
    }
    report.print(asked.json).map_err(|error| anyhow!("the report cannot be written: {error}"))?;
    Ok(report.is_clean())
}

type Lines = Box<dyn BufRead>;

/// A file to look through, or stdin for `-`.
fn open(path: &str) -> anyhow::Result<(String, Lines)> {
    if path == "-" {
        return Ok(("stdin".to_owned(), Box::new(BufReader::new(stdin()))));
    }
    let file = File::open(path).with_context(|| format!("{path} cannot be opened"))?;
    Ok((path.to_owned(), Box::new(BufReader::new(file))))
}

fn scan_lines(mut lines: Lines, name: &str, needles: &Needles, report: &mut Report) -> anyhow::Result<()> {
    let (mut count, mut found, mut line) = (0, Found::default(), vec![]);
    let read = loop {
        match lines.by_ref().take(LONGEST_LINE_BYTES).read_until(b'\n', &mut line) {
            Ok(0) => break Ok(()),
            Ok(_) => {}
            Err(error) => break Err(error.into()),
        }
        count += u64::from(count == 0 || line.ends_with(b"\n"));
        found.note(format!("{name}:{}", count.max(1)), &needles.found_in(&line));
        line.clear();
    };
    report.scanned(format!("{name}, lines"), count, found, None);
    read
}

/// Plain HTTP by hand, as a health check does it: metrics are served without TLS or a key.
fn fetch_metrics(address: SocketAddr) -> anyhow::Result<Lines> {
    let mut stream = TcpStream::connect_timeout(&address, METRICS_DEADLINE).context("no instance listens there")?;
    stream.set_read_timeout(Some(METRICS_DEADLINE))?;
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut text = vec![];
    stream.read_to_end(&mut text).context("no answer in time")?;
    ensure!(text.starts_with(b"HTTP/1.1 200"), "there are no metrics there");
    Ok(Box::new(std::io::Cursor::new(text)))
}
