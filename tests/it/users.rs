//! Users: what a client may ask, and what it hears.

use serde_json::json;
use sqlx::PgPool;

use crate::house::House;

#[sqlx::test]
async fn an_amended_user_is_told_once(db: PgPool) {
    let house = House::open(db).await;
    let ana = house.user(json!({ "first_name": "Ana" })).await;
    house.amend(&ana, json!({ "job_title": "Editor" })).await.ok();
    assert_eq!(house.told(&ana).await, ["user.created", "profile.updated[job_title]"]);
}
