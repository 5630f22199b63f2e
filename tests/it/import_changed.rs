//! `tidings import` of a file that is changed while it comes in, or before the same command goes on.

use std::path::{Path, PathBuf};

use sqlx::PgPool;
use tokio::process::Command;

use crate::{
    house::{House, eventually, file},
    import::{Ended, Import, append, doubled, import, lines, living, name},
};

/// An import that waits for a database that is away, and has read ahead what it may.
async fn held_up(house: &House, lines: &Path) -> Import {
    house.postgres.down();
    let under_way = Import::start(&house.service.url, &[name(lines), "--concurrency", "16"]);
    eventually("an outage that is told", async || {
        let said = under_way.said.lock().unwrap().clone();
        if said.contains("the service does not take anything now") { Ok(()) } else { Err(said) }
    })
    .await;
    under_way
}

#[sqlx::test]
async fn a_file_that_becomes_shorter_meanwhile_is_not_all_in(db: PgPool) {
    let house = House::open(db).await;
    let (lines, _) = lines(10_000);
    let text = std::fs::read_to_string(&lines).unwrap();
    let under_way = held_up(&house, &lines).await;
    // Behind what it can have read ahead, and before the end: in the middle of a line, which counts for none.
    let half = text.len() / 2;
    let left = half + text[half..].find('\n').unwrap() + 1;
    let whole = text[..left].lines().count();
    let shortened = std::fs::OpenOptions::new().write(true).open(&lines).unwrap();
    shortened.set_len(left as u64 + 5).unwrap();
    house.postgres.up();
    let ended = under_way.ends().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let shorter = format!("the file became shorter meanwhile: it ended with line {whole}, after {left} of");
    ended.says(&[&shorter, ", 0 refused"]);
    assert_eq!(living(&house).await as usize, whole);
    // It is there again as a whole, and so is that line.
    std::fs::write(&lines, &text).unwrap();
    let going_on = format!("going on after line {whole}");
    import(&house.service.url, &[name(&lines)]).await.well().says(&[&going_on, ", 0 refused"]);
    assert_eq!((living(&house).await, doubled(&house).await), (10_000, 0));
}

/// What came after the lines that were read, made a file of its own as it was said.
async fn what_the_hint_has(ended: &Ended) -> PathBuf {
    let command = ended.said.split("hint: `").nth(1).and_then(|hint| hint.split('`').next());
    let command = command.unwrap_or_else(|| panic!("no command in {}", ended.said));
    let rest = Command::new("sh").args(["-c", command]).output().await.unwrap();
    file(&String::from_utf8(rest.stdout).unwrap())
}

#[sqlx::test]
async fn of_a_file_that_becomes_longer_meanwhile_what_was_there_is_in_and_the_rest_is_told(db: PgPool) {
    let house = House::open(db).await;
    const LINES: usize = 10_000;
    let (lines, _) = lines(LINES);
    let length = std::fs::metadata(&lines).unwrap().len();
    let under_way = held_up(&house, &lines).await;
    // Before it can have read to the end. Neither line is looked at, not even to be refused.
    append(&lines, "{\"profile\":{\"nickname\":\"later\"}}\n{\n");
    house.postgres.up();
    let ended = under_way.ends().await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let hint = format!("hint: `tail -c +{} {}` has it", length + 1, lines.display());
    ended.says(&["the file became longer meanwhile: what came after line 10000 was not read", &hint, ", 0 refused"]);
    assert_eq!(living(&house).await as usize, LINES);
    let rest = what_the_hint_has(&ended).await;
    import(&house.service.url, &[name(&rest)]).await.says(&["1 users created", "1 of 2 lines were refused"]);
    assert_eq!((living(&house).await as usize, doubled(&house).await), (LINES + 1, 0));
}

#[sqlx::test]
async fn a_file_that_became_longer_after_a_kill_is_gone_on_with(db: PgPool) {
    let house = House::open(db).await;
    // The first line is settled without the service, which cannot take the others yet. The last one has no end.
    let text = format!("{{\n{}", std::fs::read_to_string(lines(20).0).unwrap());
    let lines = file(text.trim_end());
    house.postgres.down();
    let under_way = Import::start(&house.service.url, &[name(&lines), "--concurrency", "1"]);
    eventually("a journal that has the first line", async || {
        let kept = std::fs::read_to_string(format!("{}.import", lines.display())).unwrap_or_default();
        if kept.contains("{\"settled\":{\"line\":1,") { Ok(()) } else { Err(kept) }
    })
    .await;
    under_way.signal("-KILL").await;
    assert_eq!(under_way.ends().await.code, None, "it was to be killed before it ended");
    house.postgres.up();
    let later = "{\"profile\":{\"nickname\":\"later\"}}\n";
    append(&lines, &format!("\n{later}"));
    let ended = import(&house.service.url, &[name(&lines)]).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let longer = "the file became longer meanwhile: what came after line 21 was not read";
    ended.says(&["going on after line 1", "line 1: malformed_json", ", 1 refused", longer]);
    assert_eq!((living(&house).await, doubled(&house).await), (20, 0));
    // So it is when everything that was there at the start is settled.
    let length = std::fs::metadata(&lines).unwrap().len();
    append(&lines, &later.replace("later", "last"));
    let again = import(&house.service.url, &[name(&lines)]).await;
    again.says(&["settled already", "line 1: malformed_json", ", 1 refused", longer]);
    import(&house.service.url, &[name(&what_the_hint_has(&again).await)]).await.well().says(&["2 users created"]);
    assert_eq!((living(&house).await, doubled(&house).await), (22, 0));
    // Another file is another file, also where it is longer.
    std::fs::write(&lines, "{}\n".repeat(length as usize)).unwrap();
    import(&house.service.url, &[name(&lines)]).await.says(&["of another file, or the file was changed", "--restart"]);
}

/// The last line had no end when it was read, and something was written right behind it. It is lost to nobody.
#[sqlx::test]
async fn what_was_appended_to_a_line_without_end_is_told_too(db: PgPool) {
    let house = House::open(db).await;
    let lines = file("{\"profile\":{\"nickname\":\"first\"}}");
    import(&house.service.url, &[name(&lines)]).await.well().says(&["1 users created"]);
    append(&lines, "{\"profile\":{\"nickname\":\"second\"}}\n");
    let ended = import(&house.service.url, &[name(&lines)]).await;
    ended.says(&["the file became longer meanwhile: what came after line 1 was not read"]);
    import(&house.service.url, &[name(&what_the_hint_has(&ended).await)]).await.well().says(&["1 users created"]);
    assert_eq!((living(&house).await, doubled(&house).await), (2, 0));
}

/// No service is needed: nothing is sent.
#[tokio::test]
async fn an_empty_file_keeps_nobody_from_importing_it_when_it_has_lines() {
    const NOBODY: &str = "http://127.0.0.1:1";
    let lines = file("");
    let empty = import(NOBODY, &[name(&lines)]).await;
    empty.well().says(&["0 users created"]);
    assert!(!empty.said.contains("settled already"), "{empty:?}");
    append(&lines, "{\n");
    import(NOBODY, &[name(&lines)]).await.says(&["line 1: malformed_json", "1 of 1 lines were refused"]);
}
