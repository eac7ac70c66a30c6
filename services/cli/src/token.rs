//! `reliant token …`.

use anyhow::Result;
use reliant_types::pb;

use crate::{args::TokenCommand, front, up::say};

pub async fn run(command: TokenCommand) -> Result<()> {
    match command {
        TokenCommand::Create { front, name, days } => {
            let client = front::connect(&front).await?;
            let request = pb::CreateTokenRequest { name, scopes: vec!["api".into()], valid_days: days };
            let made = client.create_token(request).await?;
            say(&made.secret);
            eprintln!("This is the only time the token is shown.");
        }
        TokenCommand::List { front } => {
            let client = front::connect(&front).await?;
            for token in client.list_tokens(pb::ListTokensRequest {}).await?.tokens {
                let expires = token.expires_at.map_or("never".into(), |at| at.to_string());
                let state = if token.revoked { "revoked" } else { "valid" };
                let scopes = token.scopes.join(",");
                say(&format!("{}  {}…  {state}  {scopes}  expires {expires}  {}", token.id, token.prefix, token.name));
            }
        }
        TokenCommand::Revoke { front, token_id } => {
            let client = front::connect(&front).await?;
            client.revoke_token(pb::RevokeTokenRequest { token_id }).await?;
            say("revoked; it is void within a second");
        }
    }
    Ok(())
}
