//! A statement beside the relay's loop, on a connection of its own.

use tokio::task::JoinHandle;

use crate::db::Line;

/// One statement at a time, in a task of its own: waiting for it never holds up the publishing, and giving up the wait never harms
/// the connection.
pub(super) struct Errand<T>(State<T>);

enum State<T> {
    Idle(Box<Line>),
    Busy(JoinHandle<(Box<Line>, T)>),
    /// Only while changing from one to the other.
    Between,
}

impl<T: Send + 'static> Errand<T> {
    pub(super) fn new(line: Line) -> Self {
        Self(State::Idle(Box::new(line)))
    }

    pub(super) fn is_idle(&self) -> bool {
        matches!(self.0, State::Idle(_))
    }

    /// Starts `work`, which gives the connection back with what came of it. Does nothing while another is under way.
    pub(super) fn start<F>(&mut self, work: impl FnOnce(Box<Line>) -> F)
    where
        F: Future<Output = (Box<Line>, T)> + Send + 'static,
    {
        self.0 = match std::mem::replace(&mut self.0, State::Between) {
            State::Idle(line) => State::Busy(tokio::spawn(work(line))),
            busy => busy,
        };
    }

    /// Waits for what was started; for ever when nothing was. Cancel safe.
    pub(super) async fn done(&mut self) -> T {
        let State::Busy(task) = &mut self.0 else { return std::future::pending().await };
        let (line, outcome) = task.await.expect("a statement does not panic, and nobody aborts it");
        self.0 = State::Idle(line);
        outcome
    }

    /// What is still under way ends by itself, and its session with it.
    pub(super) async fn hang_up(self) {
        if let State::Idle(mut line) = self.0 {
            line.hang_up().await;
        }
    }
}
