//! Raw: nothing but a socket. What it writes was made beforehand, and of what it reads it counts the confirms: what the broker takes.

use std::{
    collections::HashSet,
    io::{self, Read, Write},
    net::TcpStream,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use amq_protocol::{
    frame::{AMQPContentHeader, AMQPFrame, ProtocolVersion, WriteContext, gen_frame, parse_frame},
    protocol::{AMQPClass, basic, channel, confirm, connection},
    uri::AMQPUri,
};
use anyhow::{Context, bail};
use url::Url;

use super::{Message, WINDOW};

const CHANNEL: u16 = 1;
/// Messages in one write.
const CHUNK: usize = 50;
/// For the broker to say anything.
const PATIENCE: Duration = Duration::from_secs(30);
/// What we ask for: a frame never holds more.
const FRAME_BYTES: u32 = 128 * 1024;
/// Class and method, as the first four bytes of a frame have them.
const ACK: [u8; 4] = [0, 60, 0, 80];

/// Messages as the socket takes them.
pub struct Frames(Vec<Vec<u8>>);

impl Frames {
    /// Of a multiple of [`CHUNK`] messages; the rest is left out.
    pub fn of(to: (&str, &str), messages: impl Iterator<Item = Message>) -> anyhow::Result<Self> {
        let messages = messages.map(|message| frames(to, message)).collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Self(messages.chunks_exact(CHUNK).map(<[_]>::concat).collect()))
    }
}

fn frames((exchange, key): (&str, &str), (properties, body): Message) -> anyhow::Result<Vec<u8>> {
    let publish =
        basic::Publish { exchange: exchange.into(), routing_key: key.into(), mandatory: true, immediate: false };
    let method = AMQPClass::Basic(basic::AMQPMethod::Publish(publish));
    let header = AMQPContentHeader { class_id: method.get_amqp_class_id(), body_size: body.len() as u64, properties };
    let frames =
        [AMQPFrame::Method(CHANNEL, method), AMQPFrame::Header(CHANNEL, header), AMQPFrame::Body(CHANNEL, body)];
    frames.iter().try_fold(vec![], write)
}

fn write(bytes: Vec<u8>, frame: &AMQPFrame) -> anyhow::Result<Vec<u8>> {
    let written = gen_frame(frame)(WriteContext::from(bytes));
    let (bytes, _) = written.map_err(|error| anyhow::anyhow!("a frame cannot be made: {error:?}"))?.into_inner();
    Ok(bytes)
}

/// A channel in confirm mode. It publishes once: its confirms are counted from the first.
pub struct Raw {
    stream: TcpStream,
}

impl Raw {
    pub fn connect(url: &Url) -> anyhow::Result<Self> {
        let uri: AMQPUri = url.as_str().parse().map_err(|_| anyhow::anyhow!("no AMQP URL"))?;
        let stream = TcpStream::connect((uri.authority.host.as_str(), uri.authority.port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut raw = Self { stream };
        raw.shake_hands(&uri).context("the broker does not let in")?;
        Ok(raw)
    }

    fn shake_hands(&mut self, uri: &AMQPUri) -> anyhow::Result<()> {
        use AMQPClass::{Channel, Confirm, Connection};
        use connection::AMQPMethod::{Open, Start, StartOk, Tune, TuneOk};
        let (user, password) = (&uri.authority.userinfo.username, &uri.authority.userinfo.password);
        let answer = connection::StartOk {
            client_properties: Default::default(),
            mechanism: "PLAIN".into(),
            response: format!("\0{user}\0{password}").into(),
            locale: "en_US".into(),
        };
        self.say(&AMQPFrame::ProtocolHeader(ProtocolVersion::amqp_0_9_1()))?;
        let Connection(Start(_)) = self.hear()? else { bail!("no greeting") };
        self.method(0, Connection(StartOk(answer)))?;
        let Connection(Tune(connection::Tune { channel_max, .. })) = self.hear()? else { bail!("wrong user") };
        self.method(0, Connection(TuneOk(connection::TuneOk { channel_max, frame_max: FRAME_BYTES, heartbeat: 0 })))?;
        self.method(0, Connection(Open(connection::Open { virtual_host: uri.vhost.as_str().into() })))?;
        let Connection(connection::AMQPMethod::OpenOk(_)) = self.hear()? else { bail!("no such vhost") };
        self.method(CHANNEL, Channel(channel::AMQPMethod::Open(channel::Open {})))?;
        let Channel(channel::AMQPMethod::OpenOk(_)) = self.hear()? else { bail!("no channel") };
        self.method(CHANNEL, Confirm(confirm::AMQPMethod::Select(confirm::Select { nowait: false })))?;
        let Confirm(confirm::AMQPMethod::SelectOk(_)) = self.hear()? else { bail!("no confirms") };
        Ok(())
    }

    fn method(&mut self, channel: u16, method: AMQPClass) -> anyhow::Result<()> {
        self.say(&AMQPFrame::Method(channel, method))
    }

    fn say(&mut self, frame: &AMQPFrame) -> anyhow::Result<()> {
        Ok(self.stream.write_all(&write(vec![], frame)?)?)
    }

    /// Asked only while nothing but an answer can come.
    fn hear(&mut self) -> anyhow::Result<AMQPClass> {
        let mut frame = vec![0; HEAD];
        self.stream.read_exact(&mut frame)?;
        frame.resize(HEAD + length(&frame) + 1, 0);
        self.stream.read_exact(&mut frame[HEAD..])?;
        match parse_frame(frame.as_slice()) {
            Ok((_, AMQPFrame::Method(_, method))) => Ok(method),
            _ => bail!("the broker says something else"),
        }
    }

    /// Sends so many messages, the same again when there are not enough. Returns when all are confirmed.
    pub fn publish(self, frames: &Frames, count: u64) -> io::Result<()> {
        let progress = Progress::default();
        let chunks = frames.0.iter().cycle().take(usize::try_from(count).unwrap_or(usize::MAX) / CHUNK);
        thread::scope(|scope| {
            let listener = scope.spawn(|| {
                let outcome = listen(&self.stream, count, &progress);
                progress.set(|state| state.is_over = true);
                outcome
            });
            let sent = (1..).zip(chunks).try_for_each(|(number, chunk)| {
                progress.await_confirms((number * CHUNK as u64).saturating_sub(WINDOW as u64));
                (&self.stream).write_all(chunk)
            });
            let heard = listener.join().unwrap_or_else(|_| Err(io::Error::other("the listener fell")));
            heard.and(sent)
        })
    }
}

/// What the writer waits for.
#[derive(Default)]
struct Progress {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    confirmed: u64,
    /// Nothing more will be confirmed.
    is_over: bool,
}

impl Progress {
    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_one();
    }

    fn await_confirms(&self, of: u64) {
        let is_missing = |state: &mut State| state.confirmed < of && !state.is_over;
        drop(self.changed.wait_while(self.lock(), is_missing).unwrap_or_else(PoisonError::into_inner));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Type, channel and length of a frame.
const HEAD: usize = 7;

fn length(head: &[u8]) -> usize {
    u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize
}

/// Counts confirms until all are there. Whatever else the broker says is the end.
fn listen(mut stream: &TcpStream, count: u64, progress: &Progress) -> io::Result<()> {
    let (mut buffer, mut filled) = (vec![0; 64 * 1024], 0);
    let mut confirms = Confirms::default();
    while confirms.count() < count {
        let read = stream.read(&mut buffer[filled..])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        filled += read;
        let mut rest = &buffer[..filled];
        while rest.len() >= HEAD && rest.len() > HEAD + length(rest) {
            let (frame, others) = rest.split_at(HEAD + length(rest) + 1);
            confirms.hear(&frame[HEAD..])?;
            rest = others;
        }
        let left = rest.len();
        buffer.copy_within(filled - left..filled, 0);
        filled = left;
        progress.set(|state| state.confirmed = confirms.count());
    }
    Ok(())
}

/// Which messages the broker confirmed.
#[derive(Default)]
struct Confirms {
    /// All up to here, ..
    all_to: u64,
    /// .. and these beyond.
    others: HashSet<u64>,
}

impl Confirms {
    fn count(&self) -> u64 {
        self.all_to + self.others.len() as u64
    }

    fn hear(&mut self, method: &[u8]) -> io::Result<()> {
        let tag = method.strip_prefix(&ACK).and_then(|rest| rest.first_chunk().map(|tag| (*tag, rest.get(8))));
        let Some((tag, Some(multiple))) = tag else {
            return Err(io::Error::other("a message was not taken, or not routed"));
        };
        let tag = u64::from_be_bytes(tag);
        if *multiple & 1 == 1 {
            self.all_to = self.all_to.max(tag);
            self.others.retain(|other| *other > tag);
        } else {
            self.others.insert(tag);
        }
        while self.others.remove(&(self.all_to + 1)) {
            self.all_to += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ack(tag: u64, multiple: u8) -> Vec<u8> {
        [&ACK[..], &tag.to_be_bytes(), &[multiple]].concat()
    }

    #[test]
    fn confirms_are_counted_once_in_whatever_order() {
        let mut confirms = Confirms::default();
        for (tag, multiple, count) in [(2, 0, 1), (1, 0, 2), (5, 0, 3), (6, 1, 6), (7, 0, 7)] {
            confirms.hear(&ack(tag, multiple)).unwrap();
            assert_eq!(confirms.count(), count, "after {tag}");
        }
        assert!(confirms.hear(&[0, 60, 0, 120]).is_err(), "a refusal is no confirm");
    }

    #[test]
    fn a_message_is_three_frames() {
        let bytes = frames(("masterdata", "profile.updated"), super::super::change(7)).unwrap();
        let (mut rest, mut frames) = (bytes.as_slice(), 0);
        while !rest.is_empty() {
            rest = &rest[HEAD + length(rest) + 1..];
            frames += 1;
        }
        assert_eq!(frames, 3);
    }
}
