//! Queue: lines of the log on their way to a reader who may be slow, or may never come.
//!
//! Promise: whoever logs never waits for the reader; lines that find no room are counted, and the count is told once what waited is
//! written.
//! Not here, on purpose: what a line says.

use std::{
    collections::VecDeque,
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use prometheus_client::metrics::counter::Counter;

/// Of the lines that wait: some 15,000 lines.
pub(super) const ROOM_BYTES: usize = 4 << 20;

#[derive(Clone)]
pub(super) struct Queue(Arc<Shared>);

struct Shared {
    room_bytes: usize,
    waiting: Mutex<Waiting>,
    changed: Condvar,
    dropped: Counter,
}

#[derive(Default)]
struct Waiting {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Whether a line is being written.
    is_writing: bool,
    /// Lines that found no room since the last count was told. While there are any, those who come later find none either: what is
    /// missing is missing in one place.
    dropped: u64,
}

impl Queue {
    pub(super) fn new(room_bytes: usize) -> Self {
        let (waiting, changed, dropped) = (Mutex::default(), Condvar::new(), Counter::default());
        Self(Arc::new(Shared { room_bytes, waiting, changed, dropped }))
    }

    /// Starts the thread that writes. `tell` is to log how many lines were dropped.
    ///
    /// # Errors
    /// When there is no room for another thread.
    pub(super) fn write_to(&self, out: impl Write + Send + 'static, tell: fn(u64)) -> io::Result<()> {
        let queue = self.clone();
        thread::Builder::new().name("log".to_owned()).spawn(move || queue.write_on(out, tell)).map(drop)
    }

    fn write_on(&self, mut out: impl Write, tell: fn(u64)) {
        loop {
            match self.next() {
                // Who reads a log that is gone hears of nothing anyway.
                Next::Line(line) => drop(out.write_all(&line)),
                Next::Dropped(lines) => tell(lines),
            }
        }
    }

    /// Waits for something to write; what was written before is done.
    fn next(&self) -> Next {
        let mut waiting = self.waiting();
        waiting.is_writing = false;
        self.0.changed.notify_all();
        let is_idle = |waiting: &mut Waiting| waiting.lines.is_empty() && waiting.dropped == 0;
        waiting = self.0.changed.wait_while(waiting, is_idle).unwrap_or_else(PoisonError::into_inner);
        waiting.is_writing = true;
        match waiting.lines.pop_front() {
            Some(line) => {
                waiting.bytes -= line.len();
                Next::Line(line)
            }
            None => Next::Dropped(std::mem::take(&mut waiting.dropped)),
        }
    }

    fn push(&self, line: &[u8]) {
        let mut waiting = self.waiting();
        if waiting.dropped > 0 || waiting.bytes + line.len() > self.0.room_bytes {
            waiting.dropped += 1;
            self.0.dropped.inc();
            return;
        }
        waiting.bytes += line.len();
        waiting.lines.push_back(line.to_vec());
        self.0.changed.notify_all();
    }

    /// Waits until all lines are written, no longer than this.
    pub(super) fn flush(&self, bound: Duration) {
        let is_busy = |waiting: &mut Waiting| waiting.is_writing || !waiting.lines.is_empty() || waiting.dropped > 0;
        drop(self.0.changed.wait_timeout_while(self.waiting(), bound, is_busy));
    }

    /// Lines that found no room, so far.
    pub(super) fn dropped(&self) -> Counter {
        self.0.dropped.clone()
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Next {
    Line(Vec<u8>),
    Dropped(u64),
}

/// A line is written by one call.
impl Write for Queue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, sync::mpsc};

    use super::*;

    const NO_BOUND: Duration = Duration::from_secs(60);

    /// A log that takes the first line and no other until it is told to.
    struct Stuck {
        taken: mpsc::Sender<()>,
        go_on: mpsc::Receiver<()>,
        log: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Stuck {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            let _ = self.taken.send(());
            let _ = self.go_on.recv();
            self.log.lock().unwrap().write(line)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn who_logs_does_not_wait_and_what_found_no_room_is_counted_and_told() {
        static DROPPED: Mutex<u64> = Mutex::new(0);
        let ((taken, is_taken), (release, go_on)) = (mpsc::channel(), mpsc::channel());
        let log = Arc::<Mutex<Vec<u8>>>::default();
        let queue = Queue::new(4);
        queue.write_to(Stuck { taken, go_on, log: log.clone() }, |lines| *DROPPED.lock().unwrap() += lines).unwrap();
        queue.push(b"1\n");
        is_taken.recv().unwrap();
        for line in ["2\n", "3\n", "4\n", "5\n"] {
            queue.push(line.as_bytes());
        }
        assert_eq!(queue.dropped().get(), 2);
        queue.flush(Duration::from_millis(1));
        drop(release);
        queue.flush(NO_BOUND);
        assert_eq!(*DROPPED.lock().unwrap(), 2);
        queue.push(b"6\n");
        queue.flush(NO_BOUND);
        assert_eq!(*log.lock().unwrap(), b"1\n2\n3\n6\n");
    }

    #[test]
    fn a_flush_waits_for_a_slow_reader() {
        let (mut reader, writer) = io::pipe().unwrap();
        let queue = Queue::new(ROOM_BYTES);
        queue.write_to(writer, |_| ()).unwrap();
        // More than a pipe holds.
        let line = [b'x'; 1000];
        (0..200).for_each(|_| queue.push(&line));
        let read = thread::spawn(move || reader.read_exact(&mut [0; 200_000]));
        queue.flush(NO_BOUND);
        read.join().unwrap().unwrap();
    }
}
