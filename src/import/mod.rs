//! Import: an existing user base, loaded through the API.
//!
//! Promise: every line is settled, by a user that is there or a refusal that is told; whatever is killed, going on doubles nobody
//! and leaves nobody out.
//! Not here, on purpose: the database. What an import may do is what its key may do, and what it brings is told like any change.

mod book;
mod bundle;
mod held;
mod journal;
mod line;
mod lines;
mod pace;
mod progress;
mod report;
mod service;
mod turns;

use std::{
    fs::File,
    io::{BufRead, BufReader, Read, Seek, SeekFrom, stdin},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use futures_util::{Stream, StreamExt, future::join_all, stream};
use tidings_sdk::owner::connections;
use tokio::{sync::mpsc, time::interval};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    config::{Import, ImportSettings, Input},
    lifecycle,
    profile::Schema,
    users::MAX_ENTRIES,
};
use book::Book;
use bundle::{Bundle, Bundles, Content, Named, Sheet, Sheets};
use held::Held;
use journal::Journal;
use line::{Person, Refused};
use lines::{Lines, Piece, Place, Text};
use pace::Pace;
use service::{Ended, Outcome, Put, ROUNDS, Service};
use turns::Turns;

pub use journal::path_of as journal_of;
pub use service::address;

/// For reading the file: a disk likes large bites.
const BITE_BYTES: usize = 256 * 1024;
/// Lines that were read and are not sent yet.
const READ_AHEAD: usize = 1024;
/// Requests over which those are spread who are asked about at once: while the service works on one, others are on their way.
const REQUESTS: usize = 4;
/// Requests in hand for each that is under way: one that is slow must not hold up the others.
const WINDOW: usize = 4;
/// Between two looks at how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// # Errors
/// When not every line is in: some were refused, or the import cannot go on.
pub async fn run(import: &Import, settings: ImportSettings) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    lifecycle::leave_on_signal(stop.clone())?;
    if import.dry_run {
        return dry_run(import, &settings, &stop);
    }
    let journal = match &settings.input {
        Input::File(file) => Some(Journal::open(file, &settings.url, import.restart)?),
        Input::Stdin => None,
    };
    let (book, lines) = open(import, &settings, journal)?;
    let halt = stop.child_token();
    let pace = Arc::new(Pace::new(settings.concurrency));
    let connections = connections(&settings.trust)?;
    let service = Service::at(&settings.url, settings.key.as_ref(), connections, pace.clone(), halt.clone());
    let service = service.map_err(|wrong| anyhow!(wrong))?;
    let import_id = book.import_id();
    let namespace = settings.namespace.unwrap_or_else(|| match settings.input {
        Input::File(_) => import_id,
        // There it is said aloud, and who knows the namespace can guess an external id. The service knows whose each is.
        Input::Stdin => Uuid::new_v4(),
    });
    let names = Names { import_id, namespace };
    let importer =
        Arc::new(Importer { service, turns: Turns::default(), writers: Turns::default(), held: Held::default() });
    let outcomes = importer.settle_all(read_ahead(lines, names), halt.clone(), settings.concurrency);
    settle(book, outcomes, &pace, &stop, &halt).await
}

/// Writes down what becomes of each line, in order.
async fn settle(
    mut book: Book,
    outcomes: impl Stream<Item = Settled>,
    pace: &Pace,
    stop: &CancellationToken,
    halt: &CancellationToken,
) -> anyhow::Result<()> {
    let mut outcomes = std::pin::pin!(outcomes);
    let mut look = interval(LOOK_EVERY);
    // The first line that was not settled ends it: what comes after it is sent again.
    let mut ended: Option<anyhow::Error> = None;
    loop {
        let outcome = tokio::select! {
            outcome = outcomes.next() => outcome,
            _ = look.tick() => {
                book.save(pace.trouble())?;
                continue;
            }
        };
        match outcome {
            None => break,
            Some(_) if ended.is_some() => {}
            Some(Ok((end, Ok(outcome)))) => book.note(end, outcome)?,
            Some(Ok((_, Err(why)))) => {
                ended = Some(why.into());
                halt.cancel();
            }
            Some(Err(why)) => {
                ended = Some(why);
                halt.cancel();
            }
        }
    }
    if stop.is_cancelled() && ended.is_none() {
        ended = Some(Ended::Stopped.into());
    }
    book.close(ended)
}

/// What became of a line, which ends there.
type Settled = anyhow::Result<(Place, Result<Outcome, Ended>)>;

struct Importer {
    service: Service,
    /// Of lines that share a key, as the file has them.
    turns: Turns,
    /// Of requests about the same user: an external id may lead to whom another line names, which shows only when he is asked about.
    /// Whoever has one waits for no other.
    writers: Turns,
    held: Held,
}

impl Importer {
    /// What becomes of each line, in order; so many users are asked about at once.
    fn settle_all(
        self: Arc<Self>,
        sheets: Sheets,
        halt: CancellationToken,
        concurrency: usize,
    ) -> impl Stream<Item = Settled> {
        let size = (concurrency / REQUESTS).clamp(1, MAX_ENTRIES);
        let window = concurrency / size * WINDOW;
        let held = self.held.clone();
        stream::unfold(Bundles::new(sheets, size), async |mut bundles| Some((bundles.next().await?, bundles)))
            .take_until(halt.cancelled_owned())
            .map(move |bundle| {
                // Taken here, in the order of the file, and not when the future is first polled.
                let bundle = bundle.map(|bundle| (self.turns.take(bundle.line(), &bundle.keys), bundle));
                let importer = self.clone();
                async move {
                    match bundle {
                        Ok((turn, bundle)) => {
                            turn.comes().await;
                            importer.settle(bundle).await.into_iter().map(Ok).collect()
                        }
                        Err(error) => vec![Err(error)],
                    }
                }
            })
            .buffered(window)
            .inspect(move |bundle: &Vec<Settled>| {
                // In order: whatever is not settled comes later.
                if let Some(Ok((end, _))) = bundle.last() {
                    held.settled(end.line);
                }
            })
            .flat_map(stream::iter)
    }

    /// What becomes of each line of a bundle.
    async fn settle(&self, bundle: Bundle) -> Vec<(Place, Result<Outcome, Ended>)> {
        let mut outcomes = self.put(&bundle.people()).await.into_iter();
        let settled = bundle.sheets.into_iter().map(|Sheet { end, content }| match content {
            Content::Person(_) => (end, outcomes.next().expect("there is one for each")),
            Content::Refused(refused) => (end, Ok(Outcome::Refused(refused))),
            Content::Blank => (end, Ok(Outcome::Blank)),
        });
        settled.collect()
    }

    /// All in one request, and then by themselves those whom it did not settle.
    async fn put(&self, people: &[&Named]) -> Vec<Result<Outcome, Ended>> {
        let settled = match people {
            [] | [_] => people.iter().map(|_| None).collect(),
            _ => match self.put_many(people).await {
                Ok(settled) => settled,
                Err(why) => return vec![Err(why); people.len()],
            },
        };
        let outcomes = settled.into_iter().zip(people).map(async |(settled, named)| match settled {
            Some(outcome) => Ok(outcome),
            None => self.put_alone(named).await,
        });
        join_all(outcomes).await
    }

    /// `None` for whom it did not settle, and for whom a later line has settled.
    async fn put_many(&self, people: &[&Named]) -> Result<Vec<Option<Outcome>>, Ended> {
        let ids = people.iter().map(|named| named.id).collect();
        let turn = self.writers.take(people[0].line, &ids);
        turn.comes().await;
        if people.iter().any(|named| self.held.is_later(named.id, named.line)) {
            return Ok(people.iter().map(|_| None).collect());
        }
        let settled = self.service.put_many(people).await?;
        for (named, outcome) in people.iter().zip(&settled) {
            if outcome.as_ref().is_some_and(Outcome::is_kept) {
                self.held.note(named.id, named.line);
            }
        }
        Ok(settled)
    }

    /// By himself, and where his external id leads. What a later line has brought about is left as it is.
    async fn put_alone(&self, Named { line, id, person, .. }: &Named) -> Result<Outcome, Ended> {
        let (mut id, mut seen) = (*id, None);
        for _ in 0..ROUNDS {
            let turn = self.writers.take(*line, &[id].into());
            turn.comes().await;
            if self.held.is_later(id, *line) {
                return Ok(Outcome::Replaced);
            }
            match self.service.put(id, seen, person).await? {
                Put::Settled(outcome) => {
                    if outcome.is_kept() {
                        self.held.note(id, *line);
                    }
                    return Ok(outcome);
                }
                Put::HeldBy(holder) => (id, seen) = (holder.id, Some(holder.version)),
            }
        }
        Ok(Outcome::contended())
    }
}

/// Under which id a user is sent.
struct Names {
    /// What the ids of users that bring nothing of their own are made from.
    import_id: Uuid,
    /// What the ids of users that bring an external id are made from.
    namespace: Uuid,
}

impl Names {
    fn named(&self, person: Person, line: u64) -> Named {
        let by_external_id =
            person.external_id.as_ref().map(|external_id| Uuid::new_v5(&self.namespace, external_id.as_bytes()));
        let by_line = || Uuid::new_v5(&self.import_id, format!("line {line}").as_bytes());
        let id = person.id.or(by_external_id).unwrap_or_else(by_line);
        let keys = [Some(id), by_external_id.filter(|other| *other != id)];
        Named { line, id, keys: keys.into_iter().flatten().collect(), person }
    }

    fn sheet(&self, Piece { text, end }: Piece) -> Sheet {
        let content = match text {
            Text::Line(text) => match line::parse(&text) {
                Ok(person) => Content::Person(self.named(person, end.line)),
                Err(refused) => Content::Refused(refused),
            },
            Text::Blank => Content::Blank,
            Text::TooLong => Content::Refused(too_long()),
        };
        Sheet { end, content }
    }
}

/// Reads and parses in a thread of its own, a little ahead. It ends when nobody receives any more.
fn read_ahead(mut lines: Lines<Box<dyn BufRead + Send>>, names: Names) -> Sheets {
    let (sheets, receiver) = mpsc::channel(READ_AHEAD);
    thread::spawn(move || {
        loop {
            let sheet = match lines.next() {
                Ok(None) => break,
                Ok(Some(piece)) => Ok(names.sheet(piece)),
                Err(error) => Err(anyhow::Error::from(error).context("the lines cannot be read")),
            };
            let failed = sheet.is_err();
            if sheets.blocking_send(sheet).is_err() || failed {
                break;
            }
        }
    });
    receiver
}

fn too_long() -> Refused {
    Refused::here("line_too_long", format!("a line has at most {} bytes", lines::LIMIT_BYTES), vec![])
}

/// The book and the lines, both where the import goes on.
fn open(
    import: &Import,
    settings: &ImportSettings,
    mut journal: Option<Journal>,
) -> anyhow::Result<(Book, Lines<Box<dyn BufRead + Send>>)> {
    let mut input: Box<dyn Read + Send> = Box::new(stdin());
    let mut place = Place::default();
    if let Input::File(file) = &settings.input {
        let mut opened = File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
        place =
            journal.as_ref().filter(|_| import.from_line.is_none()).map(|journal| journal.place).unwrap_or_default();
        opened.seek(SeekFrom::Start(place.offset))?;
        input = Box::new(opened);
    }
    let input: Box<dyn BufRead + Send> = Box::new(BufReader::with_capacity(BITE_BYTES, input));
    // As the journal saw it, by which it tells whether everything is settled.
    let size_bytes = journal.as_ref().map(Journal::size_bytes).or(settings.size_bytes);
    let mut lines = Lines::new(input, place, size_bytes);
    if let Some(from_line) = import.from_line {
        if !lines.skip_to(from_line - 1)? {
            bail!("there is no line {from_line}");
        }
        if let Some(journal) = &mut journal {
            journal.begin_at(lines.place())?;
        }
    }
    let book = Book::open(import, settings, journal, lines.place(), size_bytes)?;
    Ok((book, lines))
}

/// Says what is wrong with the lines, as far as it can be known here, and sends nothing.
fn dry_run(import: &Import, settings: &ImportSettings, stop: &CancellationToken) -> anyhow::Result<()> {
    let (mut book, mut lines) = open(import, settings, None)?;
    while !stop.is_cancelled()
        && let Some(Piece { text, end }) = lines.next().context("the lines cannot be read")?
    {
        let outcome = match text {
            Text::Line(text) => {
                check(&text, settings.schema.as_ref()).map_or_else(Outcome::Refused, |()| Outcome::Replaced)
            }
            Text::Blank => Outcome::Blank,
            Text::TooLong => Outcome::Refused(too_long()),
        };
        book.note(end, outcome)?;
        if end.line % 1_000 == 0 {
            book.save(None)?;
        }
    }
    book.close(stop.is_cancelled().then(|| Ended::Stopped.into()))
}

fn check(text: &[u8], schema: Option<&Schema>) -> Result<(), Refused> {
    let profile = line::profile(text)?;
    let faults = schema.and_then(|schema| schema.admit(profile).err());
    faults.map_or(Ok(()), |faults| {
        Err(Refused::here("profile_invalid", "the profile breaks the schema, see errors", faults))
    })
}
