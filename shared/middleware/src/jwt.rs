//! JWTs of people: EdDSA only, issuer and audience `reliant`. The algorithm is ours to choose, never the token's.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, errors::ErrorKind};
use reliant_types::{Code, Failure};

use crate::ed25519;

pub const ISSUER: &str = "reliant";
pub const AUDIENCE: &str = "reliant";
/// Clocks of two machines may differ so much.
const LEEWAY_SECONDS: u64 = 5;

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Claims {
    /// The user's subject, as the store knows it.
    pub sub: String,
    pub iss: String,
    pub aud: String,
    /// Unix seconds.
    pub exp: u64,
    pub iat: u64,
}

impl Claims {
    pub fn expires_at(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.exp.min(u32::MAX.into()))
    }
}

/// Keys, and why a token was not accepted. The token itself is in no error.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum JwtError {
    #[error("the key is not an Ed25519 key in PEM form (PKCS#8 'PRIVATE KEY', or 'PUBLIC KEY')")]
    BadKey,
    #[error("this process has only the public key and cannot sign tokens")]
    NoSigningKey,
    #[error("the token could not be signed")]
    Sign,
    #[error("the token has expired")]
    Expired,
    #[error("the token is not valid: {0}")]
    Invalid(&'static str),
}

impl From<JwtError> for Failure {
    fn from(error: JwtError) -> Self {
        match error {
            JwtError::Expired => Failure::new(Code::TokenExpired, "the token has expired; sign in again"),
            JwtError::Invalid(why) => {
                Failure::new(Code::TokenInvalid, format!("the token is not valid ({why}); sign in again"))
            }
            JwtError::BadKey | JwtError::NoSigningKey | JwtError::Sign => {
                Failure::new(Code::Internal, error.to_string())
            }
        }
    }
}

#[derive(Clone)]
pub struct Jwt {
    signing: Option<EncodingKey>,
    verifying: DecodingKey,
    validation: Validation,
}

impl std::fmt::Debug for Jwt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Jwt").field("can_sign", &self.signing.is_some()).finish_non_exhaustive()
    }
}

impl Jwt {
    /// A new private key in PEM form. To be stored with mode 0600.
    pub fn generate_pem() -> String {
        ed25519::private_pem(&rand::random())
    }

    /// A private key signs and verifies; a public key only verifies.
    pub fn from_pem(pem: &str) -> Result<Self, JwtError> {
        ed25519::install();
        let key = ed25519::Key::from_pem(pem).ok_or(JwtError::BadKey)?;
        let signing = key.pkcs8.as_deref().map(EncodingKey::from_ed_der);
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.set_issuer(&[ISSUER]);
        validation.set_audience(&[AUDIENCE]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        validation.validate_nbf = true;
        validation.leeway = LEEWAY_SECONDS;
        Ok(Self { signing, verifying: DecodingKey::from_ed_der(&key.public), validation })
    }

    /// A token for `subject`, and when it expires.
    pub fn sign(&self, subject: &str, valid_for: Duration) -> Result<(String, SystemTime), JwtError> {
        self.sign_at(subject, SystemTime::now(), valid_for)
    }

    /// [`Self::sign`], as if at another time.
    pub fn sign_at(
        &self,
        subject: &str,
        now: SystemTime,
        valid_for: Duration,
    ) -> Result<(String, SystemTime), JwtError> {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let claims = Claims {
            sub: subject.to_owned(),
            iss: ISSUER.to_owned(),
            aud: AUDIENCE.to_owned(),
            exp: now + valid_for.as_secs(),
            iat: now,
        };
        Ok((self.sign_claims(&claims)?, claims.expires_at()))
    }

    fn sign_claims<T: serde::Serialize>(&self, claims: &T) -> Result<String, JwtError> {
        let key = self.signing.as_ref().ok_or(JwtError::NoSigningKey)?;
        jsonwebtoken::encode(&Header::new(Algorithm::EdDSA), claims, key).map_err(|_| JwtError::Sign)
    }

    pub fn verify(&self, token: &str) -> Result<Claims, JwtError> {
        let error = match jsonwebtoken::decode::<Claims>(token, &self.verifying, &self.validation) {
            Ok(data) => return Ok(data.claims),
            Err(error) => error,
        };
        Err(match error.kind() {
            ErrorKind::ExpiredSignature => JwtError::Expired,
            ErrorKind::InvalidSignature => JwtError::Invalid("it was signed with another key"),
            ErrorKind::InvalidAlgorithm | ErrorKind::InvalidAlgorithmName => {
                JwtError::Invalid("only EdDSA is accepted")
            }
            ErrorKind::InvalidIssuer => JwtError::Invalid("its issuer is not 'reliant'"),
            ErrorKind::InvalidAudience => JwtError::Invalid("its audience is not 'reliant'"),
            ErrorKind::MissingRequiredClaim(_) => JwtError::Invalid("a claim of sub, iss, aud, exp is missing"),
            ErrorKind::ImmatureSignature => JwtError::Invalid("it is not valid yet"),
            _ => JwtError::Invalid("it is malformed"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn jwt() -> Jwt {
        Jwt::from_pem(&Jwt::generate_pem()).unwrap()
    }

    fn claims(change: impl FnOnce(&mut Claims)) -> Claims {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let mut claims =
            Claims { sub: "ada".into(), iss: ISSUER.into(), aud: AUDIENCE.into(), exp: now + 60, iat: now };
        change(&mut claims);
        claims
    }

    fn check(change: impl FnOnce(&mut Claims)) -> Result<Claims, JwtError> {
        let jwt = jwt();
        jwt.verify(&jwt.sign_claims(&claims(change)).unwrap())
    }

    #[test]
    fn a_token_is_read_back_by_its_key_only() {
        let jwt = jwt();
        let (token, expires_at) = jwt.sign("ada", HOUR).unwrap();
        assert!(token.starts_with("eyJ"));
        let claims = jwt.verify(&token).unwrap();
        assert_eq!(claims.sub, "ada");
        assert_eq!(claims.expires_at(), expires_at);
        assert_eq!(self::jwt().verify(&token), Err(JwtError::Invalid("it was signed with another key")));
    }

    #[test]
    fn a_public_key_verifies_and_does_not_sign() {
        let pem = Jwt::generate_pem();
        let public = ed25519::public_pem(&ed25519::Key::from_pem(&pem).unwrap().public);
        let token = Jwt::from_pem(&pem).unwrap().sign("ada", HOUR).unwrap().0;
        let reader = Jwt::from_pem(&public).unwrap();
        assert_eq!(reader.verify(&token).unwrap().sub, "ada");
        assert_eq!(reader.sign("ada", HOUR), Err(JwtError::NoSigningKey));
        assert_eq!(Jwt::from_pem("-----BEGIN NOTHING-----").unwrap_err(), JwtError::BadKey);
    }

    #[test]
    fn expired_and_foreign_tokens_say_what_they_are() {
        assert_eq!(check(|claims| claims.exp -= 120), Err(JwtError::Expired));
        assert_eq!(check(|claims| claims.iss = "other".into()), Err(JwtError::Invalid("its issuer is not 'reliant'")));
        assert_eq!(
            check(|claims| claims.aud = "other".into()),
            Err(JwtError::Invalid("its audience is not 'reliant'"))
        );
        assert_eq!(Failure::from(JwtError::Expired).code, Code::TokenExpired);
        assert_eq!(Failure::from(JwtError::Invalid("x")).code, Code::TokenInvalid);
    }

    #[test]
    fn a_token_of_another_algorithm_or_shape_is_refused() {
        let jwt = jwt();
        // {"alg":"HS256"}: the classic confusion of algorithms, a key's public text taken for a shared secret.
        let (good, _) = jwt.sign("ada", HOUR).unwrap();
        let (_, claims_and_signature) = good.split_once('.').unwrap();
        let token = format!("eyJhbGciOiJIUzI1NiJ9.{claims_and_signature}");
        assert_eq!(jwt.verify(&token), Err(JwtError::Invalid("only EdDSA is accepted")));
        // {"alg":"none"} with the right claims.
        let unsigned = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZGEifQ.";
        for bad in ["", "eyJ", "a.b.c", unsigned, &"x".repeat(100_000)] {
            assert!(matches!(jwt.verify(bad), Err(JwtError::Invalid(_))), "{}", &bad[..bad.len().min(40)]);
        }
        #[derive(serde::Serialize)]
        struct NoSubject {
            iss: &'static str,
            aud: &'static str,
            exp: u64,
        }
        let token = jwt.sign_claims(&NoSubject { iss: ISSUER, aud: AUDIENCE, exp: u64::MAX / 2 }).unwrap();
        assert!(matches!(jwt.verify(&token), Err(JwtError::Invalid(_))));
    }
}
