//! Bundles: lines that go in one request.
//!
//! Promise: no two lines of a bundle are about the same user, and it fits into what the service takes. A line that was read does not
//! wait for more to be read.

use std::collections::HashSet;

use tokio::sync::mpsc;
use uuid::Uuid;

use super::{
    line::{Person, Refused},
    lines::Place,
    service::{BATCH_BYTES, FRAME_BYTES},
};

/// A line on its way. No Debug: it holds values.
pub struct Sheet {
    pub end: Place,
    pub content: Content,
}

impl Sheet {
    fn person(&self) -> Option<&Named> {
        match &self.content {
            Content::Person(named) => Some(named),
            Content::Refused(_) | Content::Blank => None,
        }
    }
}

pub enum Content {
    Person(Named),
    Refused(Refused),
    Blank,
}

/// A user, and under which id he is sent.
pub struct Named {
    pub line: u64,
    pub id: Uuid,
    /// One of them at least is that of every other line that names the same user alike.
    pub keys: Vec<Uuid>,
    pub person: Person,
}

pub type Sheets = mpsc::Receiver<anyhow::Result<Sheet>>;

/// Lines in the order of the file. Never empty.
#[derive(Default)]
pub struct Bundle {
    pub sheets: Vec<Sheet>,
    pub keys: HashSet<Uuid>,
    bytes: usize,
}

impl Bundle {
    /// Adds a line, or gives it back. The first one always fits.
    fn add(&mut self, sheet: Sheet) -> Result<(), Sheet> {
        if let Some(named) = sheet.person() {
            let bytes = self.bytes + named.person.body.len() + FRAME_BYTES;
            let is_new = named.keys.iter().all(|key| !self.keys.contains(key));
            let fits = is_new && bytes <= BATCH_BYTES;
            if !(fits || self.sheets.is_empty()) {
                return Err(sheet);
            }
            self.bytes = bytes;
            self.keys.extend(&named.keys);
        }
        self.sheets.push(sheet);
        Ok(())
    }

    pub fn people(&self) -> Vec<&Named> {
        self.sheets.iter().filter_map(Sheet::person).collect()
    }

    /// The number of its first line.
    pub fn line(&self) -> u64 {
        self.sheets[0].end.line
    }
}

/// Bundles what was read, up to `size` lines each.
pub struct Bundles {
    sheets: Sheets,
    size: usize,
    /// It did not fit into the last one.
    left: Option<anyhow::Result<Sheet>>,
}

impl Bundles {
    pub fn new(sheets: Sheets, size: usize) -> Self {
        Self { sheets, size, left: None }
    }

    /// `None` at the end.
    pub async fn next(&mut self) -> Option<anyhow::Result<Bundle>> {
        let mut bundle = Bundle::default();
        let mut next = match self.left.take() {
            Some(left) => Some(left),
            None => self.sheets.recv().await,
        };
        loop {
            match next {
                Some(Ok(sheet)) => self.left = bundle.add(sheet).err().map(Ok),
                Some(Err(error)) if bundle.sheets.is_empty() => return Some(Err(error)),
                Some(Err(error)) => self.left = Some(Err(error)),
                None => break,
            }
            if self.left.is_some() || bundle.sheets.len() >= self.size {
                break;
            }
            next = self.sheets.try_recv().ok();
        }
        Some(bundle).filter(|bundle| !bundle.sheets.is_empty()).map(Ok)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sheet(line: u64, keys: &[u128], bytes: usize) -> Sheet {
        let keys: Vec<Uuid> = keys.iter().map(|key| Uuid::from_u128(*key)).collect();
        let person = Person { id: None, external_id: None, body: vec![b' '; bytes].into() };
        let content = keys
            .first()
            .map_or(Content::Blank, |id| Content::Person(Named { line, id: *id, keys: keys.clone(), person }));
        Sheet { end: Place { line, offset: 0 }, content }
    }

    /// The numbers of the lines in each bundle.
    async fn bundled(size: usize, lines: &[(&[u128], usize)]) -> Vec<Vec<u64>> {
        let (sender, sheets) = mpsc::channel(lines.len().max(1));
        for (line, (keys, bytes)) in (1..).zip(lines) {
            sender.try_send(Ok(sheet(line, keys, *bytes))).unwrap_or_else(|_| panic!("there is room"));
        }
        drop(sender);
        let (mut bundles, mut found) = (Bundles::new(sheets, size), vec![]);
        while let Some(bundle) = bundles.next().await {
            found.push(bundle.unwrap().sheets.iter().map(|sheet| sheet.end.line).collect());
        }
        found
    }

    #[tokio::test]
    async fn a_bundle_ends_before_a_second_line_about_somebody() {
        let lines: [(&[u128], usize); 6] = [(&[1, 7], 1), (&[2], 1), (&[], 0), (&[7], 1), (&[3], 1), (&[1], 1)];
        assert_eq!(bundled(9, &lines).await, [vec![1, 2, 3], vec![4, 5, 6]]);
        assert_eq!(bundled(2, &lines).await, [vec![1, 2], vec![3, 4], vec![5, 6]]);
        assert_eq!(bundled(1, &lines[..2]).await, [vec![1], vec![2]]);
        assert_eq!(bundled(9, &[]).await, Vec::<Vec<u64>>::new());
    }

    #[tokio::test]
    async fn a_bundle_has_no_more_bytes_than_the_service_takes() {
        let most = BATCH_BYTES - 2 * FRAME_BYTES;
        assert_eq!(bundled(9, &[(&[1], most - 1), (&[2], 1)]).await, [[1, 2]]);
        assert_eq!(bundled(9, &[(&[1], most), (&[2], 1)]).await, [[1], [2]]);
        assert_eq!(
            bundled(9, &[(&[1], 2 * most), (&[2], 1)]).await,
            [[1], [2]],
            "alone it is not the bundle's business"
        );
    }

    #[tokio::test]
    async fn what_was_read_before_an_error_goes_first() {
        let (sender, sheets) = mpsc::channel(2);
        sender.try_send(Ok(sheet(1, &[1], 1))).unwrap_or_else(|_| panic!("there is room"));
        sender.try_send(Err(anyhow::anyhow!("torn"))).unwrap_or_else(|_| panic!("there is room"));
        let mut bundles = Bundles::new(sheets, 9);
        assert_eq!(bundles.next().await.unwrap().unwrap().sheets.len(), 1);
        assert_eq!(bundles.next().await.unwrap().err().unwrap().to_string(), "torn");
    }
}
