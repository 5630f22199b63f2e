//! Code: every refusal there is, by its stable code.
//!
//! Promise: a [`Problem`](super::Problem) has one of these codes and no other; each that a route answers with stands with an example in the
//! OpenAPI document.
//! Not here, on purpose: which route answers with which. Extractors and verbs say so themselves, see `problem`.

use axum::http::StatusCode;

/// One line per code: its meaning, its name in Rust, its status, what programs read, and the words for people where the one who
/// refuses has no better ones.
macro_rules! codes {
    ($($(#[doc = $meaning:literal])+ $name:ident $status:ident $code:literal $words:literal;)+) => {
        /// Why a request was refused. The text of a code never changes, nor does its status.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Code {
            $($(#[doc = $meaning])+ $name,)+
        }

        impl Code {
            pub const ALL: &[Self] = &[$(Self::$name),+];

            pub const fn status(self) -> StatusCode {
                match self { $(Self::$name => StatusCode::$status,)+ }
            }

            /// For programs.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $code,)+ }
            }

            /// For whoever reads the document.
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$name => concat!($($meaning),+).trim(),)+ }
            }

            /// For people: the detail, unless the one who refuses has a better one. Quotes nothing of a request.
            pub const fn words(self) -> &'static str {
                match self { $(Self::$name => $words,)+ }
            }
        }
    };
}

impl Code {
    /// Answered where there is no route that could list it.
    pub fn is_of_no_route(self) -> bool {
        matches!(self, Self::RouteNotFound | Self::MethodNotAllowed | Self::MalformedRequest | Self::HeadersTooLarge)
    }
}

codes! {
    // Requests that make no sense, whoever sends them.

    /// What came is no request at all. The connection ends with it.
    MalformedRequest BAD_REQUEST "malformed_request" "what came is not a request of HTTP/1.1";
    /// Request line and headers are too many or too long. The connection ends with it.
    HeadersTooLarge REQUEST_HEADER_FIELDS_TOO_LARGE "headers_too_large" "request line and headers may have 16 KiB and 100 fields";
    /// The URI is too long.
    UriTooLong URI_TOO_LONG "uri_too_long" "a URI may have 8000 bytes";
    /// The body is not JSON, or has a number that no double holds, or half of a surrogate pair.
    MalformedJson BAD_REQUEST "malformed_json"
        "the body is not JSON, or has a number that no double holds, or half of a surrogate pair: see line 1, column 17";
    /// The body ended early.
    MalformedBody BAD_REQUEST "malformed_body" "the body ended before it was complete";
    /// A parameter is unknown, given twice, or out of its range.
    InvalidQuery BAD_REQUEST "invalid_query" "a parameter of the query is not one that is taken here";
    /// A header that decides what is done cannot be read.
    InvalidHeader BAD_REQUEST "invalid_header" "if-match: expected * or a list of entity tags such as \"7\"";
    /// `Idempotency-Key` is none, or is not taken here.
    InvalidIdempotencyKey BAD_REQUEST "invalid_idempotency_key" "Idempotency-Key: 1 to 255 visible ASCII characters, once";
    /// The cursor is not the `next` of a page.
    InvalidCursor BAD_REQUEST "invalid_cursor" "send back the \"next\" of an earlier page as it was";
    /// The user's id in the path is no UUID in its usual spelling.
    InvalidUserId BAD_REQUEST "invalid_user_id" "a user id is a UUID such as 0193a2b4-7c1e-7d53-9a51-2f5d8c0e4b6a";
    /// The bucket's number is out of range.
    InvalidBucket BAD_REQUEST "invalid_bucket" "a bucket is a number from 0 to one less than there are buckets";
    /// The subscription's name in the path is none.
    InvalidSubscriptionName BAD_REQUEST "invalid_subscription_name" "a subscription's name has other characters than this";
    /// The message's id in the path is no UUID.
    InvalidMessageId BAD_REQUEST "invalid_message_id" "a message id is a UUID";

    // Not for this caller.

    /// No valid key came with the request.
    Unauthenticated UNAUTHORIZED "unauthenticated" "send a valid key as Authorization: Bearer";
    /// The key lacks the scope that the route demands; or no key is asked for here (`--insecure-no-auth`), and the request may be that of
    /// somebody else's page.
    Forbidden FORBIDDEN "forbidden" "the key lacks the scope users:write";
    /// The client may not have to do with some of the fields; see `errors`.
    FieldForbidden FORBIDDEN "field_forbidden" "some fields are not for this client, see errors";

    // Nothing there.

    /// No route has this path.
    RouteNotFound NOT_FOUND "route_not_found" "there is no such resource; GET /openapi.yaml lists what there is";
    /// Nobody ever had this id.
    UserNotFound NOT_FOUND "user_not_found" "nobody ever had this id";
    /// Nobody registered this name, or another client stands for it.
    SubscriptionNotFound NOT_FOUND "subscription_not_found" "nobody registered this name, or this client does not stand for it";
    /// The subscription has no dead letter of this message.
    DeadLetterNotFound NOT_FOUND "dead_letter_not_found" "there is no such dead letter";
    /// The subscription never had a backfill.
    BackfillNotFound NOT_FOUND "backfill_not_found" "this subscription was never backfilled";
    /// The resource does not have this method; `Allow` names those it has.
    MethodNotAllowed METHOD_NOT_ALLOWED "method_not_allowed" "this resource does not have that method; see Allow";
    /// The user was deleted, with `version` and `deleted_at`. Deletion is final: the id is not used again.
    UserDeleted GONE "user_deleted" "this user was deleted";
    /// The database was restored, or another took over. Begin again without a cursor.
    CursorExpired GONE "cursor_expired"
        "the database was restored or another took over since; begin a full pass, without a cursor";

    // Requests that cannot be done as things are, or not anew.

    /// The user lives; `version` says at which version.
    UserNotDeleted CONFLICT "user_not_deleted" "this user lives";
    /// Another user has this external id.
    ExternalIdTaken CONFLICT "external_id_taken" "another user has this external id; GET /v1/users?external_id= tells who";

    /// A request with this `Idempotency-Key` is under way; see `Retry-After`.
    IdempotencyKeyInFlight CONFLICT "idempotency_key_in_flight" "a request with this Idempotency-Key is under way; ask again for its answer";
    /// The `Idempotency-Key` belongs to another request.
    IdempotencyKeyReused UNPROCESSABLE_ENTITY "idempotency_key_reused" "this Idempotency-Key belongs to another request of yours; take a new one";
    /// This deployment takes no change of a user without `If-Match`, nor an entry of many without `if_version`.
    PreconditionRequired PRECONDITION_REQUIRED "precondition_required"
        "say which version you saw, in If-Match, or in if_version where it is one of many; read the user first";

    // Bodies.

    /// The body did not arrive in time.
    BodyTimeout REQUEST_TIMEOUT "body_timeout" "the body did not arrive within 15s";
    /// The body has too many bytes; the detail says how many are taken.
    PayloadTooLarge PAYLOAD_TOO_LARGE "payload_too_large" "the body has more than 65536 bytes";
    /// The body is of another kind; `Accept`, for a patch `Accept-Patch`, names the right one.
    UnsupportedMediaType UNSUPPORTED_MEDIA_TYPE "unsupported_media_type" "send the body as application/json";
    /// The body is JSON with parts that some reader would misread; see `errors`.
    UnacceptableJson UNPROCESSABLE_ENTITY "unacceptable_json" "the body cannot be taken, see errors";
    /// The body is not what this route takes; see `errors`.
    BodyInvalid UNPROCESSABLE_ENTITY "body_invalid" "the body cannot be taken, see errors";
    /// The profile breaks the deployment's schema; see `errors`.
    ProfileInvalid UNPROCESSABLE_ENTITY "profile_invalid" "the profile breaks the schema, see errors";
    /// The registration cannot be taken; see `errors`.
    SubscriptionInvalid UNPROCESSABLE_ENTITY "subscription_invalid" "the registration cannot be taken, see errors";

    // The state of things does not allow it.

    /// `If-Match`, `If-None-Match` or `if_version` does not hold. `version` is the one that is there, if there is a user.
    VersionMismatch PRECONDITION_FAILED "version_mismatch"
        "the user is at version 8, which is not what the condition asks for; read the user and decide anew";
    /// Another owner has the name, or it is the exchange's.
    NameTaken CONFLICT "name_taken" "\"team-orders\" has registered this name: it is changed with the same owner, by the same client or an administrator";
    /// The broker has a part of this name with other properties; nothing was changed.
    QueueDiffers CONFLICT "queue_differs" "\"orders\" exists at the broker with other properties; delete it there, or choose another name; nothing was changed";
    /// As many are registered as there may be.
    TooManySubscriptions CONFLICT "too_many_subscriptions" "there are 1000 subscriptions already";
    /// Messages wait; `waiting=discard` deletes them too.
    SubscriptionNotEmpty CONFLICT "subscription_not_empty"
        "12 messages wait, 0 are on their way back, 1 are dead letters; have them handled, or lose them with ?waiting=discard";
    /// Nothing was dropped: says how many there are, and how to confirm.
    ConfirmationRequired CONFLICT "confirmation_required"
        "this would drop 12 dead letters for good; repeat it with confirm=orders";
    /// The subscription's queue is not at the broker. Its letters are kept.
    QueueLost CONFLICT "queue_lost" "the subscription's queue or exchange is not at the broker; it has to be declared again first";
    /// One is under way.
    BackfillRunning CONFLICT "backfill_running" "a backfill of this subscription is under way; cancel it first, or wait for its end";
    /// It is done, or was cancelled.
    BackfillOver CONFLICT "backfill_over" "the backfill is over";

    /// This client has sent too many requests, or this address too many wrong keys; see `Retry-After`.
    RateLimited TOO_MANY_REQUESTS "rate_limited" "this client has used up its requests for now";

    // Our own trouble. A 503 has `Retry-After`.

    /// The service failed; its log has the cause under the request's id.
    Internal INTERNAL_SERVER_ERROR "internal" "the service failed; its log has the cause under this request id";
    /// No answer was ready in time; no user was changed.
    DeadlineExceeded SERVICE_UNAVAILABLE "deadline_exceeded" "no answer within 30s";
    /// More is waiting than can be done in good time.
    Overloaded SERVICE_UNAVAILABLE "overloaded" "more is waiting than can be done in good time";
    /// The database does not answer; nothing was changed.
    DatabaseUnavailable SERVICE_UNAVAILABLE "database_unavailable" "the database does not answer; nothing was changed";
    /// The connection to the database broke under way, or there was no answer in time, or it cannot be looked up what came of the request's
    /// key: the change may have been made. Repeat it with the same `Idempotency-Key`.
    OutcomeUnknown SERVICE_UNAVAILABLE "outcome_unknown"
        "the database did not say what became of the change: it may have been made; with an Idempotency-Key repeat it";
    /// A state this new cannot be seen here yet; `version` is the one that can.
    NotYetVisible SERVICE_UNAVAILABLE "not_yet_visible" "a state this new cannot be seen here yet";
    /// This instance was started without a broker; ask another.
    NoBrokerHere SERVICE_UNAVAILABLE "no_broker_here" "this instance runs without a broker; ask one that has one";
    /// The broker does not answer.
    BrokerUnavailable SERVICE_UNAVAILABLE "broker_unavailable" "the broker does not answer";
    /// The broker does not let us.
    BrokerRefused SERVICE_UNAVAILABLE "broker_refused" "the broker refused";
    /// Somebody else is changing this subscription.
    SubscriptionBusy SERVICE_UNAVAILABLE "subscription_busy" "it is being changed by somebody else";
}
