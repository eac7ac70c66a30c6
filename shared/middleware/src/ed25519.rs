//! Ed25519 keys in PEM form, and their signatures for `jsonwebtoken`, by ring: the one cryptographic library that this
//! project links (its TLS is ring's as well). Keys are PKCS#8 version 1 (RFC 8410), as OpenSSL writes and reads them.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey,
    crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils},
    errors::{Error, ErrorKind},
};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, VerificationAlgorithm as _};
use signature::{Signer, Verifier};

const KEY_BYTES: usize = 32;
/// PKCS#8 version 1 around a seed: SEQUENCE { 0, SEQUENCE { 1.3.101.112 }, OCTET STRING { OCTET STRING { seed } } }.
const PRIVATE_PREFIX: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
/// SubjectPublicKeyInfo around a public key: SEQUENCE { SEQUENCE { 1.3.101.112 }, BIT STRING { key } }.
const PUBLIC_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// What a PEM file holds.
pub struct Key {
    /// None where the file holds a public key.
    pub pkcs8: Option<Vec<u8>>,
    pub public: [u8; KEY_BYTES],
}

impl Key {
    /// The key of the first block of `pem` that is a private or a public Ed25519 key.
    pub fn from_pem(pem: &str) -> Option<Self> {
        if let Some(pkcs8) = block(pem, "PRIVATE KEY") {
            // Also version 2, which carries the public key beside the seed.
            let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(&pkcs8).ok()?;
            let public = pair.public_key().as_ref().try_into().ok()?;
            return Some(Self { pkcs8: Some(pkcs8), public });
        }
        let der = block(pem, "PUBLIC KEY")?;
        let public = der.strip_prefix(&PUBLIC_PREFIX)?.try_into().ok()?;
        Some(Self { pkcs8: None, public })
    }
}

/// The bytes between `-----BEGIN label-----` and its end.
fn block(pem: &str, label: &str) -> Option<Vec<u8>> {
    let (_, rest) = pem.split_once(&format!("-----BEGIN {label}-----"))?;
    let (body, _) = rest.split_once(&format!("-----END {label}-----"))?;
    let body: String = body.chars().filter(|char| !char.is_ascii_whitespace()).collect();
    STANDARD.decode(body).ok()
}

pub fn private_pem(seed: &[u8; KEY_BYTES]) -> String {
    pem("PRIVATE KEY", &PRIVATE_PREFIX, seed)
}

#[cfg(test)]
pub fn public_pem(key: &[u8; KEY_BYTES]) -> String {
    pem("PUBLIC KEY", &PUBLIC_PREFIX, key)
}

/// Short enough for one line of base64.
fn pem(label: &str, prefix: &[u8], key: &[u8]) -> String {
    let body = STANDARD.encode([prefix, key].concat());
    format!("-----BEGIN {label}-----\n{body}\n-----END {label}-----\n")
}

/// Makes `jsonwebtoken` sign and verify by this module. It knows EdDSA alone, so a token of another algorithm is refused
/// here as well.
pub fn install() {
    static PROVIDER: CryptoProvider =
        CryptoProvider { signer_factory: signer, verifier_factory: verifier, key_utils: KeyUtils::new_unimplemented() };
    // A second installation is refused, and means that it is there.
    let _ = PROVIDER.install_default();
}

fn signer(algorithm: &Algorithm, key: &EncodingKey) -> Result<Box<dyn JwtSigner>, Error> {
    only_eddsa(algorithm)?;
    let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(key.as_bytes()).map_err(|_| ErrorKind::InvalidEddsaKey)?;
    Ok(Box::new(EdDsaSigner(pair)))
}

fn verifier(algorithm: &Algorithm, key: &DecodingKey) -> Result<Box<dyn JwtVerifier>, Error> {
    only_eddsa(algorithm)?;
    Ok(Box::new(EdDsaVerifier(key.try_get_as_bytes()?.to_vec())))
}

fn only_eddsa(algorithm: &Algorithm) -> Result<(), Error> {
    if *algorithm == Algorithm::EdDSA { Ok(()) } else { Err(ErrorKind::InvalidAlgorithm.into()) }
}

struct EdDsaSigner(Ed25519KeyPair);

impl Signer<Vec<u8>> for EdDsaSigner {
    fn try_sign(&self, message: &[u8]) -> Result<Vec<u8>, signature::Error> {
        Ok(self.0.sign(message).as_ref().to_vec())
    }
}

impl JwtSigner for EdDsaSigner {
    fn algorithm(&self) -> Algorithm {
        Algorithm::EdDSA
    }
}

struct EdDsaVerifier(Vec<u8>);

impl Verifier<Vec<u8>> for EdDsaVerifier {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), signature::Error> {
        let (key, message, signature) = (&self.0[..], message, &signature[..]);
        ED25519.verify(key.into(), message.into(), signature.into()).map_err(|_| signature::Error::new())
    }
}

impl JwtVerifier for EdDsaVerifier {
    fn algorithm(&self) -> Algorithm {
        Algorithm::EdDSA
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written by `openssl genpkey -algorithm ed25519`, and its public half by `openssl pkey -pubout`.
    const OPENSSL_PRIVATE: &str = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIMnbQ24XqWJ9ulix/z91pvOsw0Nkx+TxEXJGB2gHT11z\n-----END PRIVATE KEY-----\n";
    const OPENSSL_PUBLIC: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAxy1muzyYcMzKNyqsgSalV5ztnoMeC06XfkTUDnYGynI=\n-----END PUBLIC KEY-----\n";

    #[test]
    fn keys_of_openssl_are_read_and_ours_have_its_form() {
        let private = Key::from_pem(OPENSSL_PRIVATE).unwrap();
        let public = Key::from_pem(OPENSSL_PUBLIC).unwrap();
        assert!(public.pkcs8.is_none());
        assert_eq!(private.public, public.public);
        let seed = private.pkcs8.unwrap()[PRIVATE_PREFIX.len()..].try_into().unwrap();
        assert_eq!(private_pem(&seed), OPENSSL_PRIVATE);
        assert_eq!(public_pem(&public.public), OPENSSL_PUBLIC);
    }

    #[test]
    fn what_is_no_key_is_none() {
        let short = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----\n";
        let garbage = "-----BEGIN PRIVATE KEY-----\n!!!!\n-----END PRIVATE KEY-----\n";
        let unended = OPENSSL_PRIVATE.split("-----END").next().unwrap();
        for bad in ["", "-----BEGIN PRIVATE KEY-----", short, garbage, unended] {
            assert!(Key::from_pem(bad).is_none(), "{bad:?}");
        }
    }
}
