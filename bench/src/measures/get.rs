//! Get: reads of one user a second over real HTTP, with a key on every request.
//!
//! The limit is pgbench, with as many clients, selecting the same columns by id.

use crate::{
    contest::{Case, Contest},
    house::House,
    load::Ask,
    memory::Watch,
    pgbench::Script,
    report::{Findings, Goal},
    settings::Settings,
};

pub fn turns(settings: &Settings) -> u64 {
    2 * settings.connections.len() as u64
}

pub async fn run(house: &House) -> anyhow::Result<Findings> {
    let (contest, settings) = (Contest::open(house, "get").await?, &house.settings);
    let mut cases: Vec<Case> = settings.connections.iter().map(|connections| case(*connections)).collect();
    for case in &cases {
        contest.warm_up(case.connections, Ask::Get, &[(Script::Get, 1)]).await?;
    }
    let watch = Watch::start(&contest.service);
    for round in 1..=settings.rounds {
        eprintln!("bench: get, round {round} of {}", settings.rounds);
        for case in &mut cases {
            let (service, limit) =
                contest.round(case.connections, settings.time(), Ask::Get, &[(Script::Get, 1)]).await?;
            case.add(&service, &limit);
        }
    }
    let rows = cases.into_iter().flat_map(Case::rows).chain(watch.rows("the service")).collect();
    Ok(Findings { rows, ..Findings::default() })
}

fn case(connections: u64) -> Case {
    let mut case = Case::new(connections);
    match connections {
        32 => case.rate.goal = Some(Goal::RatioAtLeast(0.9)),
        128 => case.rate.goal = Some(Goal::RatioAtLeast(1.0)),
        _ => {}
    }
    case
}
