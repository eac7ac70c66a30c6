//! Secrets are made of 32 random bytes and stored as SHA-256: with that much entropy a slow hash would add nothing.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use sha2::{Digest as _, Sha256};

pub(crate) const TOKEN_PREFIX: &str = "rlt_";
/// Characters of a token that are shown to recognise it by.
pub(crate) const SHOWN_CHARS: usize = 12;

/// 43 characters of base64url.
pub(crate) fn random() -> String {
    let bytes: [u8; 32] = rand::random();
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

pub(crate) fn token() -> String {
    format!("{TOKEN_PREFIX}{}", random())
}

pub(crate) fn hash(secret: &str) -> Vec<u8> {
    Sha256::digest(secret.as_bytes()).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_its_form() {
        let token = token();
        assert_eq!((token.len(), token.starts_with(TOKEN_PREFIX)), (47, true));
        assert_eq!(hash(&token).len(), 32);
        assert_ne!(super::token(), token);
    }
}
