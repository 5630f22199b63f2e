//! The record of who reads what: `/v1/fields`.

use std::sync::Arc;

use axum::Json;
use serde::Serialize;
use tidings_sdk::subscription::BindingKey;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Allowed, Client, Guarded, ManageSubscriptions, Scope,
    model::declared,
    store::{self, Declaration, parsed},
};
use crate::{
    db::{self, Trouble},
    profile::{FieldSet, Schema},
    web::{Code, NoParams, Params, Place, Problem, Refusals},
};

/// What the record is made of. Cheap to clone.
#[derive(Clone)]
pub struct Processing {
    queries: sqlx::PgPool,
    schema: Arc<Schema>,
}

impl Processing {
    pub fn new(queries: sqlx::PgPool, schema: Arc<Schema>) -> Self {
        Self { queries, schema }
    }

    async fn readers(&self) -> Result<Vec<(FieldSet, Reader)>, Trouble> {
        let queries = self.queries.clone();
        let (clients, declarations) =
            db::ask(async move { Ok((store::find(&queries).await?, store::processing(&queries).await?)) }).await?;
        Ok(readers(&clients, &declarations)?)
    }
}

pub fn routes() -> OpenApiRouter<Guarded<Processing>> {
    OpenApiRouter::new().routes(routes!(list))
}

/// Every profile field, with who may read it and for what purpose.
///
/// For the record of processing (GDPR, article 30): what a subscription declares is what its client may read. Administrators, who may
/// read everything, are named with every field. Who is no administrator sees what he reads himself, and nobody else.
#[utoipa::path(get, path = "/v1/fields", tag = "subscriptions", operation_id = "listFields", security(("key" = ["subscriptions"])),
    responses((status = 200, description = "All fields in order of name", body = FieldsRead), Refusals<(ManageSubscriptions, Params<NoParams>)>))]
async fn list(
    Allowed { caller, desk: processing, .. }: Allowed<ManageSubscriptions, Processing>,
    Params(NoParams {}): Params<NoParams>,
    place: Place,
) -> Result<Json<FieldsRead>, Problem> {
    place.turn_at_the_registry(&caller.client).await?;
    let mut readers = processing.readers().await.map_err(|trouble| {
        tracing::warn!("a query failed: {}", trouble.report());
        Problem::from(Code::DatabaseUnavailable)
    })?;
    if !caller.is_admin() {
        readers.retain(|(_, reader)| reader.client.as_deref() == Some(&*caller.client));
    }
    let read = |field: &str| FieldRead {
        field: field.to_owned(),
        readers: readers.iter().filter(|(fields, _)| fields.has(field)).map(|(_, reader)| reader.clone()).collect(),
    };
    Ok(Json(FieldsRead { fields: processing.schema.names().map(|name| read(name.as_str())).collect() }))
}

/// Who reads what.
#[derive(Serialize, utoipa::ToSchema)]
struct FieldsRead {
    fields: Vec<FieldRead>,
}

#[derive(Serialize, utoipa::ToSchema)]
struct FieldRead {
    #[schema(example = "address")]
    field: String,
    readers: Vec<Reader>,
}

/// Who may read a field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[schema(as = FieldReader)]
struct Reader {
    /// Null for a subscription that no client stands for: whoever reads its queue fetches with some other key.
    #[schema(required = true, example = "invoices")]
    client: Option<String>,
    /// By which the client came to the field; null when the field is the client's own.
    #[schema(required = true, example = "invoices")]
    subscription: Option<String>,
    /// The team behind the subscription.
    #[schema(required = true, example = "team-invoices")]
    owner: Option<String>,
    /// What for; null when nobody said so.
    #[schema(required = true, example = "addresses on invoices")]
    purpose: Option<String>,
}

/// Everybody who may read, with the fields that they may.
fn readers(clients: &[Client], declarations: &[Declaration]) -> sqlx::Result<Vec<(FieldSet, Reader)>> {
    let living: Vec<&Client> = clients.iter().filter(|client| client.revoked_at.is_none()).collect();
    let mut readers = vec![];
    for declaration in declarations {
        let client = living.iter().find(|client| Some(&client.name) == declaration.client.as_ref());
        let keys: Vec<BindingKey> = parsed(&declaration.routing_keys)?;
        let declares = declared(&keys, parsed(&declaration.fields)?);
        let fields = match client {
            Some(client) if client.may(Scope::ReadUsers) => client.list()?.and(&declares),
            Some(_) => FieldSet::none(),
            None => declares,
        };
        readers.push((
            fields,
            Reader {
                client: client.map(|client| client.name.clone()),
                subscription: Some(declaration.name.clone()),
                owner: Some(declaration.owner.clone()),
                purpose: Some(declaration.purpose.clone()),
            },
        ));
    }
    let of_their_own = living
        .iter()
        .filter(|client| client.may(Scope::Admin) || (client.may(Scope::ReadUsers) && client.subscriptions.is_empty()));
    for client in of_their_own {
        let fields = if client.may(Scope::Admin) { FieldSet::All } else { client.list()? };
        let (name, purpose) = (Some(client.name.clone()), client.purpose.clone());
        readers.push((fields, Reader { client: name, subscription: None, owner: None, purpose }));
    }
    Ok(readers)
}

impl Client {
    fn may(&self, scope: Scope) -> bool {
        [scope, Scope::Admin].iter().any(|scope| self.scopes.iter().any(|one| one == scope.as_str()))
    }

    fn list(&self) -> sqlx::Result<FieldSet> {
        Ok(FieldSet::of(self.fields.as_deref().map(parsed).transpose()?))
    }
}
